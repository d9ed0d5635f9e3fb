//! Addresses that are nobody's on the internet: a look-up of one finds nothing, and tells a third party about an
//! internal network. It owns the table; it must not know who asks.
//!
//! Sources: the IANA special-purpose address registries (RFC 6890), RFC 1918, RFC 6598, RFC 4193, RFC 4291. The nets for
//! documentation and benchmarks are not among them: nobody has machines there, and examples and tests use them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Whether `ip` is private, loopback, link-local, multicast, unspecified, unique-local, shared, reserved, or an IPv6
/// spelling of an IPv4 address that is.
#[must_use]
pub fn is_private(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => v4_is_private(ip),
        IpAddr::V6(ip) => v6_is_private(ip),
    }
}

fn v4_is_private(ip: Ipv4Addr) -> bool {
    let [a, b, ..] = ip.octets();
    a == 0 // "this network", unspecified
        || ip.is_private()
        || (a == 100 && b & 0xc0 == 64) // shared address space (carrier NAT)
        || ip.is_loopback()
        || ip.is_link_local()
        || a >= 224 // multicast, reserved, broadcast
}

fn v6_is_private(ip: Ipv6Addr) -> bool {
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        v4_is_private(Ipv4Addr::new(a, b, c, d))
    };
    match ip.segments() {
        // Unspecified and loopback are among the IPv4-compatible ones: 0.0.0.0 and 0.0.0.1.
        [0, 0, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0, 0, 0, 0, 0xffff, 0, high, low] => embedded(high, low), // translated (RFC 2765)
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low), // NAT64 (RFC 6052)
        [0x64, 0xff9b, 1, ..] => true,                             // NAT64 within a network (RFC 8215)
        [0x100, 0, 0, 0, ..] => true,                              // discard only (RFC 6666)
        [0x2002, high, low, ..] => embedded(high, low),            // 6to4 (RFC 3056)
        [first, ..] => {
            first & 0xfe00 == 0xfc00 // unique-local
                || first & 0xff80 == 0xfe80 // link-local, and site-local before RFC 3879
                || first & 0xff00 == 0xff00 // multicast
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_nobody_are_told_from_those_of_somebody() {
        for text in "0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.255 127.0.0.1 127.255.255.254 \
            169.254.169.254 172.16.0.1 172.31.255.255 192.168.0.1 192.168.255.255 224.0.0.1 239.255.255.255 240.0.0.1 \
            255.255.255.255 :: ::1 ::10.0.0.1 ::ffff:10.0.0.1 ::ffff:127.0.0.1 ::ffff:0:192.168.1.1 64:ff9b::10.0.0.1 \
            64:ff9b:1::1 100::1 2002:a00:1::1 2002:7f00:1::1 fc00::1 fd12:3456::1 fe80::1 febf::1 fec0::1 ff02::1 ff0e::1"
            .split_whitespace()
        {
            assert!(is_private(text.parse().unwrap()), "{text}");
        }
        for text in "1.1.1.1 9.255.255.255 11.0.0.1 100.63.255.255 100.128.0.1 126.0.0.1 128.0.0.1 169.253.0.1 172.15.0.1 \
            172.32.0.1 192.0.2.1 192.167.0.1 198.18.0.1 198.51.100.1 203.0.113.1 223.255.255.255 2001:db8::1 2001:4860::8888 \
            2a00:1450::1 3fff::1 ::8.8.8.8 ::ffff:8.8.8.8 64:ff9b::8.8.8.8 2002:808:808::1 64:ff9b:2::1 100:0:0:1::1 fe00::1"
            .split_whitespace()
        {
            assert!(!is_private(text.parse().unwrap()), "{text}");
        }
    }
}
