//! Which addresses may be connected to. It owns the table of private and special networks; it must
//! not know names or hosts.
//!
//! Sources: the IANA special-purpose address registries for IPv4 and IPv6 (RFC 6890 and updates),
//! 6to4 (RFC 3056), Teredo (RFC 4380), NAT64 (RFC 6052, RFC 8215).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

/// Refuses private and special addresses, but for the networks an operator lists.
#[derive(Clone, Debug, Default)]
pub struct AddressGuard {
    allowed: Vec<IpNet>,
}

impl AddressGuard {
    /// A guard that also lets `allowed` networks pass.
    #[must_use]
    pub fn new(allowed: Vec<IpNet>) -> Self {
        Self { allowed }
    }

    /// Whether a connection to `ip` may be attempted.
    #[must_use]
    pub fn allows(&self, ip: IpAddr) -> bool {
        // ::ffff:127.0.0.1 is 127.0.0.1 to the network stack.
        let ip = ip.to_canonical();
        is_public(ip) || self.allowed.iter().any(|net| net.contains(&ip))
    }
}

/// Whether `ip` is a unicast address of the public internet.
#[must_use]
pub fn is_public(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        IpAddr::V4(ip) => v4_is_public(ip),
        IpAddr::V6(ip) => v6_is_public(ip),
    }
}

fn v4_is_public(ip: Ipv4Addr) -> bool {
    /// Network and prefix length.
    const SPECIAL: [(Ipv4Addr, u32); 16] = [
        (Ipv4Addr::new(0, 0, 0, 0), 8),       // "this network"
        (Ipv4Addr::new(10, 0, 0, 0), 8),      // private
        (Ipv4Addr::new(100, 64, 0, 0), 10),   // shared address space (carrier NAT)
        (Ipv4Addr::new(127, 0, 0, 0), 8),     // loopback
        (Ipv4Addr::new(169, 254, 0, 0), 16),  // link local, cloud metadata
        (Ipv4Addr::new(172, 16, 0, 0), 12),   // private
        (Ipv4Addr::new(192, 0, 0, 0), 24),    // protocol assignments
        (Ipv4Addr::new(192, 0, 2, 0), 24),    // documentation
        (Ipv4Addr::new(192, 31, 196, 0), 24), // AS112
        (Ipv4Addr::new(192, 52, 193, 0), 24), // AMT
        (Ipv4Addr::new(192, 88, 99, 0), 24),  // 6to4 relay anycast
        (Ipv4Addr::new(192, 168, 0, 0), 16),  // private
        (Ipv4Addr::new(198, 18, 0, 0), 15),   // benchmarking
        (Ipv4Addr::new(198, 51, 100, 0), 24), // documentation
        (Ipv4Addr::new(203, 0, 113, 0), 24),  // documentation
        (Ipv4Addr::new(224, 0, 0, 0), 3),     // multicast, reserved, broadcast
    ];
    !SPECIAL.iter().any(|(net, prefix)| {
        let mask = u32::MAX << (32 - prefix);
        ip.to_bits() & mask == net.to_bits()
    })
}

fn v6_is_public(ip: Ipv6Addr) -> bool {
    let [a, b, ..] = ip.segments();
    // Everything routed today is in 2000::/3; inside it, these are special: 2001::/23 (protocol
    // assignments, Teredo, ORCHID), documentation, 6to4 (an IPv4 address inside) and 3fff::/20.
    // 64:ff9b::/96 (NAT64), fc00::/7, fe80::/10, ::/8 and ff00::/8 lie outside of 2000::/3.
    let global_unicast = a & 0xe000 == 0x2000;
    let special = (a == 0x2001 && (b < 0x0200 || b == 0x0db8))
        || a == 0x2002
        || (a == 0x3fff && b < 0x1000)
        || (a == 0x2620 && b == 0x004f);
    global_unicast && !special
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPECIAL: &str = "0.0.0.0 0.1.2.3 10.0.0.1 10.255.255.255 100.64.0.1 100.127.255.255 127.0.0.1 127.255.255.254 \
        169.254.0.1 169.254.169.254 172.16.0.1 172.31.255.255 192.0.0.1 192.0.0.170 192.0.2.1 192.31.196.1 192.52.193.1 192.88.99.1 192.168.0.1 \
        192.168.255.255 198.18.0.1 198.19.255.255 198.51.100.7 203.0.113.7 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 \
        :: ::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::127.0.0.1 64:ff9b::7f00:1 64:ff9b:1::1 100::1 2001::1 \
        2001:2::1 2001:10::1 2001:db8::1 2002:7f00:1::1 2002:a00:1::1 2620:4f:8000::1 3fff::1 3fff:fff::1 fc00::1 fd12:3456::1 fe80::1 fec0::1 ff02::1";

    #[test]
    fn private_and_special_addresses_are_refused() {
        for text in SPECIAL.split_whitespace() {
            let ip: IpAddr = text.parse().unwrap();
            assert!(!AddressGuard::default().allows(ip), "{ip}");
        }
    }

    #[test]
    fn public_addresses_pass() {
        for text in "1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.1 100.63.255.255 100.128.0.1 172.15.0.1 172.32.0.1 192.0.1.1 \
            198.17.255.255 198.20.0.1 223.255.255.255 2606:4700::1111 2001:200::1 2001:4860:4860::8888 2a00:1450::1 2620:fe::fe 2a00:4f::1 3fff:1000::1 ::ffff:8.8.8.8"
            .split_whitespace()
        {
            let ip: IpAddr = text.parse().unwrap();
            assert!(AddressGuard::default().allows(ip), "{ip}");
        }
    }

    #[test]
    fn listed_networks_pass_in_their_mapped_form_too() {
        let guard = AddressGuard::new(vec!["127.0.0.0/8".parse().unwrap()]);
        assert!(guard.allows("127.0.0.1".parse().unwrap()));
        assert!(guard.allows("::ffff:127.0.0.1".parse().unwrap()));
        assert!(!guard.allows("::1".parse().unwrap()));
        assert!(!guard.allows("10.0.0.1".parse().unwrap()));
    }
}
