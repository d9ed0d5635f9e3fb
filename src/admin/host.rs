//! By which names the admin listener is meant. A page in an operator's browser can have a name of its own lead here, and
//! read what answers (DNS rebinding); by such a name nothing is answered.

use std::str::FromStr;

use http::{Request, header, uri::Authority};

/// A name, or all names below a domain: `relay.ops.example`, `*.ops.example`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminHost {
    /// In lower case.
    name: String,
    below: bool,
}

impl FromStr for AdminHost {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let text = text.trim_end_matches('.').to_ascii_lowercase();
        let (name, below) = match text.strip_prefix("*.") {
            Some(domain) => (domain.to_owned(), true),
            None => (text, false),
        };
        let plain = |label: &str| {
            !label.is_empty()
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte))
        };
        if name.split('.').all(plain) { Ok(Self { name, below }) } else { Err(()) }
    }
}

impl AdminHost {
    fn covers(&self, name: &str) -> bool {
        match name.strip_suffix(self.name.as_str()) {
            Some("") => !self.below,
            Some(rest) => self.below && rest.ends_with('.'),
            None => false,
        }
    }
}

/// Whether `request` is for this listener: by an address, a name without a dot, which no stranger can own, or one of
/// `hosts`. A client that names no host is no browser.
pub(super) fn is_meant<B>(request: &Request<B>, hosts: &[AdminHost]) -> bool {
    let named = request.headers().get_all(header::HOST).iter().map(|value| value.to_str().ok());
    let target = request.uri().authority().map(|authority| Some(authority.as_str()));
    named.chain(target).all(|host| host.is_some_and(|host| may_be(host, hosts)))
}

fn may_be(host: &str, hosts: &[AdminHost]) -> bool {
    // A check of a load balancer that has no name for us. A browser always has one.
    if host.is_empty() {
        return true;
    }
    let Ok(authority) = host.parse::<Authority>() else { return false };
    let name = authority.host();
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>().is_ok();
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    address || !name.contains('.') || hosts.iter().any(|host| host.covers(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_somebody_else_may_own_is_not_ours() {
        let hosts: Vec<AdminHost> =
            ["relay.ops.example", "*.svc", "*.lan.example"].map(|text| text.parse().unwrap()).into();
        let meant = |host: &str| {
            let request = Request::get("/metrics").header(header::HOST, host).body(()).unwrap();
            is_meant(&request, &hosts)
        };
        for host in [
            "localhost:9091",
            "relay",
            "127.0.0.1:9091",
            "[::1]:9091",
            "10.0.0.7",
            "Relay.Ops.Example:9091",
            "relay.ops.example.",
            "relay.monitoring.svc:9091",
            "a.lan.example",
            "",
        ] {
            assert!(meant(host), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:9091",
            "127.0.0.1.evil.example",
            "relay.ops.example.evil.example",
            "other.ops.example",
            "xlan.example",
            "lan.example",
            "a b",
        ] {
            assert!(!meant(host), "{host}");
        }
        let request = |uri: &str, host: &[&str]| {
            let mut request = Request::get(uri);
            for host in host {
                request = request.header(header::HOST, *host);
            }
            is_meant(&request.body(()).unwrap(), &hosts)
        };
        assert!(request("/metrics", &[]));
        assert!(request("http://localhost/metrics", &["localhost"]));
        assert!(!request("http://evil.example/metrics", &["localhost"]));
        assert!(!request("/metrics", &["localhost", "evil.example"]));
        for text in ["", "*", "*.", "a..b", "a/b", "a:1", "http://a"] {
            assert!(text.parse::<AdminHost>().is_err(), "{text}");
        }
    }
}
