//! Which hosts may be called: a strict grammar for `host[:port]` and the patterns an operator
//! allows. It compares text only; it must not resolve or connect.

use std::{fmt, net::IpAddr, str::FromStr};

/// The port of https, which is the only scheme spoken.
const HTTPS: u16 = 443;

/// A host that follows the grammar: a lower-case DNS name or an IP literal, and a port.
///
/// Names are labels of `[a-z0-9-]` (1 to 63, no hyphen at either end), at most 253 characters in
/// all, and a URL parser reads them as the same name, so that no spelling of an IPv4 address passes.
/// Unicode, percent signs, user information, paths and blanks do not fit the grammar.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Host {
    name: Name,
    port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Name {
    Dns(String),
    Ip(IpAddr),
}

/// The text is no `host` or `host:port`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a host name such as api.example.com, or host:port")]
pub struct NotAHost;

impl Host {
    /// The IP address, where the host is one.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        match self.name {
            Name::Ip(ip) => Some(ip),
            Name::Dns(_) => None,
        }
    }

    /// The host without its port, as it stands in a URL (an IPv6 address in brackets).
    #[must_use]
    pub fn name(&self) -> String {
        match &self.name {
            Name::Dns(name) => name.clone(),
            Name::Ip(IpAddr::V4(ip)) => ip.to_string(),
            // As a URL spells it, which differs from std where an IPv4 address is mapped.
            Name::Ip(IpAddr::V6(ip)) => url::Host::<&str>::Ipv6(*ip).to_string(),
        }
    }

    /// The port, 443 unless one was given.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for Host {
    type Err = NotAHost;

    fn from_str(text: &str) -> Result<Self, NotAHost> {
        let (name, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (ip, rest) = rest.split_once(']').ok_or(NotAHost)?;
                let ip: std::net::Ipv6Addr = ip.parse().map_err(|_| NotAHost)?;
                let port = match rest {
                    "" => None,
                    rest => Some(rest.strip_prefix(':').ok_or(NotAHost)?),
                };
                (Name::Ip(ip.into()), port)
            }
            None => {
                let (name, port) = match text.split_once(':') {
                    Some((name, port)) => (name, Some(port)),
                    None => (text, None),
                };
                match name.parse::<std::net::Ipv4Addr>() {
                    Ok(ip) => (Name::Ip(ip.into()), port),
                    Err(_) => (Name::Dns(dns_name(name)?), port),
                }
            }
        };
        let port = match port {
            None => HTTPS,
            Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) && digits.len() <= 5 => {
                digits.parse().ok().filter(|port| *port > 0).ok_or(NotAHost)?
            }
            Some(_) => return Err(NotAHost),
        };
        Ok(Self { name, port })
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())?;
        if self.port != HTTPS {
            write!(f, ":{}", self.port)?;
        }
        Ok(())
    }
}

fn dns_name(text: &str) -> Result<String, NotAHost> {
    let name = text.to_ascii_lowercase();
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    let fits = name.len() <= 253 && name.split('.').all(label);
    // The URL parser has the last word: it must read the very same name, not an IPv4 address in
    // disguise (127.1, 0x7f.1) nor a broken punycode label.
    match url::Host::parse(&name) {
        Ok(url::Host::Domain(read)) if fits && read == name => Ok(name),
        _ => Err(NotAHost),
    }
}

/// The hosts an operator allows: exact ones (`api.example.com`, `localhost:8443`), whole domains
/// (`*.example.com`: every name below it, not itself), or `*` for any public name.
#[derive(Clone, Debug, Default)]
pub struct HostPatterns(Vec<Pattern>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Pattern {
    Any,
    Below(String),
    Exactly(Host),
}

impl FromIterator<HostPattern> for HostPatterns {
    fn from_iter<I: IntoIterator<Item = HostPattern>>(patterns: I) -> Self {
        Self(patterns.into_iter().map(|pattern| pattern.0).collect())
    }
}

/// One entry of [`HostPatterns`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPattern(Pattern);

impl FromStr for HostPattern {
    type Err = NotAHost;

    fn from_str(text: &str) -> Result<Self, NotAHost> {
        let pattern = match (text, text.strip_prefix("*.")) {
            ("*", _) => Pattern::Any,
            (_, Some(parent)) => Pattern::Below(dns_name(parent)?),
            (_, None) => Pattern::Exactly(text.parse()?),
        };
        Ok(Self(pattern))
    }
}

impl HostPatterns {
    /// These patterns, and `domain` with everything below it.
    #[must_use]
    pub fn with_domain(&self, domain: &str) -> Self {
        let more = [domain.to_owned(), format!("*.{domain}")];
        let more = more.iter().filter_map(|text| text.parse::<HostPattern>().ok());
        Self(self.0.iter().cloned().chain(more.map(|pattern| pattern.0)).collect())
    }

    /// The hosts that are named: those listed exactly, and the domain of each `*.domain` where it is allowed itself.
    #[must_use]
    pub fn named(&self) -> Vec<Host> {
        let mut named = Vec::new();
        for pattern in &self.0 {
            let host = match pattern {
                Pattern::Any => None,
                Pattern::Below(parent) => Some(Host { name: Name::Dns(parent.clone()), port: HTTPS }),
                Pattern::Exactly(host) => Some(host.clone()),
            };
            named.extend(host.filter(|host| self.allow(host) && !named.contains(host)));
        }
        named
    }

    /// Whether `host` may be called.
    ///
    /// A port other than 443, an IP literal and a name without a dot have to be listed exactly:
    /// `*` and `*.example.com` stand for public names on the usual port.
    #[must_use]
    pub fn allow(&self, host: &Host) -> bool {
        self.0.iter().any(|pattern| match (pattern, &host.name) {
            (Pattern::Exactly(listed), _) => listed == host,
            (_, Name::Ip(_)) => false,
            (Pattern::Any, Name::Dns(name)) => host.port == HTTPS && name.contains('.'),
            (Pattern::Below(parent), Name::Dns(name)) => {
                host.port == HTTPS && name.strip_suffix(parent).is_some_and(|prefix| prefix.ends_with('.'))
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn patterns(list: &str) -> HostPatterns {
        list.split(',').map(|p| p.parse::<HostPattern>().unwrap()).collect()
    }

    #[test]
    fn hosts_follow_a_strict_grammar() {
        for (text, host) in [
            ("api.cyberscan.io", "api.cyberscan.io"),
            ("API.CyberScan.IO", "api.cyberscan.io"),
            ("api.cyberscan.io:443", "api.cyberscan.io"),
            ("localhost:8443", "localhost:8443"),
            ("127.0.0.1:8443", "127.0.0.1:8443"),
            ("[::1]:8443", "[::1]:8443"),
            ("[::ffff:192.0.2.1]", "[::ffff:c000:201]"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ] {
            assert_eq!(text.parse::<Host>().unwrap().to_string(), host);
        }
    }

    #[test]
    fn what_is_no_host_is_refused() {
        for text in [
            "",
            ".",
            "..",
            "a..b",
            ".a.b",
            "a.b.",
            "-a.b",
            "a-.b",
            "a_b.c",
            "a b.c",
            " a.b",
            "a.b ",
            "a.b\n",
            "a.b\t",
            "a.b\0",
            "a.b/",
            "a.b/c",
            "a.b?c",
            "a.b#c",
            "a.b\\c",
            "u@a.b",
            "u:p@a.b",
            "a.b:",
            "a.b:0",
            "a.b:65536",
            "a.b:+443",
            "a.b: 443",
            "a.b:443:443",
            "a%2eb",
            "a。b",
            "bücher.example",
            "①②⑦.⓪.⓪.①",
            "127.1",
            "2130706433",
            "0x7f.1",
            "0x7f000001",
            "0177.0.0.1.",
            "1.2.3",
            "127.0.0.01",
            "::1",
            "[::1",
            "::1]",
            "[::1]x",
            "[fe80::1%eth0]",
            "[v1.a]",
            "https://a.b",
            "//a.b",
            "*",
            "*.a.b",
            "{host}",
            "a.1",
            "a.0x1",
        ] {
            assert_eq!(text.parse::<Host>(), Err(NotAHost), "{text:?}");
        }
        let long = format!("{}.example", "a".repeat(64));
        assert!(long.parse::<Host>().is_err());
        assert!(vec!["abcdefg"; 33].join(".").parse::<Host>().is_err());
    }

    #[test]
    fn patterns_allow_what_they_name_and_nothing_beside() {
        let allowed = |list: &str, host: &str| patterns(list).allow(&host.parse().unwrap());
        let default = "cyberscan.io,*.cyberscan.io";
        for host in ["cyberscan.io", "api.cyberscan.io", "a.b.cyberscan.io", "API.CYBERSCAN.IO"] {
            assert!(allowed(default, host), "{host}");
        }
        for host in [
            "evilcyberscan.io",
            "cyberscan.io.evil.test",
            "cyberscan.com",
            "api.cyberscan.io:8443",
            "localhost",
            "127.0.0.1",
            "io",
        ] {
            assert!(!allowed(default, host), "{host}");
        }
        assert!(allowed("*", "anything.example"));
        for host in ["localhost", "127.0.0.1", "[::1]", "anything.example:8443"] {
            assert!(!allowed("*", host), "{host}");
        }
        assert!(allowed("*,localhost:8443", "localhost:8443"));
        assert!(!allowed("*,localhost:8443", "localhost"));
        assert!(allowed("10.1.2.3", "10.1.2.3"));
    }

    #[test]
    fn the_hosts_that_are_named_are_allowed_and_each_is_named_once() {
        let named =
            |list: &str| -> Vec<String> { patterns(list).named().iter().map(ToString::to_string).collect() };
        assert_eq!(named("cyberscan.io,*.cyberscan.io"), ["cyberscan.io"]);
        assert_eq!(named("*.cyberscan.io,localhost:8443,a.example"), ["localhost:8443", "a.example"]);
        assert_eq!(named("*,*.example.com"), ["example.com"]);
        assert!(named("*").is_empty());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn an_accepted_host_is_the_host_a_url_parser_sees(text in "\\PC{0,40}|[a-zA-Z0-9.:\\-\\[\\]@/#?%\\\\ ]{0,40}|[a-z0-9]{1,5}(\\.[a-z0-9x-]{1,6}){0,4}(:[0-9]{1,6})?") {
            if let Ok(host) = text.parse::<Host>() {
                let url = url::Url::parse(&format!("https://{host}/api/v1")).unwrap();
                prop_assert_eq!(url.host_str().unwrap(), host.name());
                prop_assert_eq!(url.port_or_known_default(), Some(host.port()));
                prop_assert_eq!(url.username(), "");
                prop_assert!(url.password().is_none() && url.query().is_none() && url.fragment().is_none());
                prop_assert_eq!(url.path(), "/api/v1");
            }
        }

        #[test]
        fn only_names_below_an_allowed_domain_are_allowed(prefix in "[a-z0-9.-]{0,20}", suffix in "[a-z0-9.]{0,10}") {
            let text = format!("{prefix}cyberscan.io{suffix}");
            if let Ok(host) = text.parse::<Host>() {
                let right = suffix.is_empty() && (prefix.is_empty() || prefix.ends_with('.'));
                prop_assert_eq!(patterns("cyberscan.io,*.cyberscan.io").allow(&host), right);
            }
        }
    }
}
