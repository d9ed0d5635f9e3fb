//! What must hold of any host a tenant may type in.

use super::{AddressGuard, Host, HostPatterns, client::url};
use crate::tenant::{ApiKey, RefusedHost, Tenant};

fn patterns(list: &[&str]) -> HostPatterns {
    list.iter().map(|pattern| pattern.parse().expect("a pattern")).collect()
}

/// The `host` of a token.
pub fn host(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    let ours = patterns(&["cyberscan.io", "*.cyberscan.io"]);
    match Tenant::admit(text, ApiKey::new("k".into()), &ours) {
        Ok(tenant) => {
            let name = tenant.host().name();
            assert!(name == "cyberscan.io" || name.ends_with(".cyberscan.io"), "{name} was admitted");
            assert_eq!(tenant.host().port(), 443);
        }
        Err(RefusedHost { url }) => {
            assert!(url.starts_with("https://") && url.chars().count() <= RefusedHost::LONGEST);
            assert!(!url.contains(char::is_control), "{url:?}");
        }
    }
    let Ok(host) = text.parse::<Host>() else {
        return;
    };
    let url = url(&host, "/api/v1/token").expect("what is a host has a URL");
    assert_eq!((url.scheme(), url.host_str(), url.path()), ("https", Some(&*host.name()), "/api/v1/token"));
    assert_eq!(url.port_or_known_default(), Some(host.port()));
    assert!(url.username().is_empty() && url.password().is_none());
    assert!(url.query().is_none() && url.fragment().is_none());
    assert_eq!(host.to_string().parse(), Ok(host.clone()), "a host is not what it says it is");
    if patterns(&["*"]).allow(&host) {
        assert!(host.ip().is_none() && host.port() == 443 && host.name().contains('.'), "{host} is public");
    }
    if let Some(ip) = host.ip()
        && AddressGuard::new(Vec::new()).allows(ip)
    {
        let ip = ip.to_canonical();
        let private = match ip {
            std::net::IpAddr::V4(ip) => ip.is_private() || ip.is_link_local() || ip.is_broadcast(),
            std::net::IpAddr::V6(ip) => ip.is_unique_local() || ip.is_unicast_link_local(),
        };
        assert!(
            !private && !ip.is_loopback() && !ip.is_unspecified() && !ip.is_multicast(),
            "{ip} is allowed"
        );
    }
}
