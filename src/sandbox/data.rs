//! Owns what the fake CyberScan knows: the demo's hosts, a generator for load tests, and records set by hand.
//! Must not know HTTP or tokens. Bodies are text, because a `serde_json::Value` would lose CyberScan's order of keys.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv4Addr},
};

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

/// The demo's hosts: domain, address, and which of [`CATALOGUE`] were found there. `clean.example` is known and has none.
const HOSTS: [(&str, Ipv4Addr, &[usize]); 3] = [
    ("shop.example", Ipv4Addr::new(203, 0, 113, 10), &[0, 2, 3, 5, 6, 8, 13, 14]),
    ("mail.example", Ipv4Addr::new(203, 0, 113, 25), &[1, 4, 9, 10, 11, 12]),
    ("clean.example", Ipv4Addr::new(203, 0, 113, 77), &[]),
];

/// Every host below it exists, for load tests; `n<k>` is at the k-th address of [`LOAD_NETWORK`], round and round.
const LOAD_ZONE: &str = ".load.example";
/// 198.18.0.0/15, set aside for benchmarks (RFC 2544): 131 072 addresses.
const LOAD_NETWORK: u32 = u32::from_be_bytes([198, 18, 0, 0]);
const LOAD_ADDRESSES: u32 = 1 << 17;

/// One finding, its keys in CyberScan's order.
#[derive(Clone, Copy, Serialize)]
struct Finding {
    name: &'static str,
    family: &'static str,
    description: &'static str,
    severity: &'static str,
    port: Option<u16>,
    protocol: &'static str,
    cve: &'static str,
    #[serde(serialize_with = "number")]
    cvss: f64,
    confidence: u8,
}

/// CyberScan prints whole numbers without a fraction.
fn number<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    if value.fract() == 0.0 {
        serializer.serialize_i64(*value as i64)
    } else {
        serializer.serialize_f64(*value)
    }
}

#[expect(clippy::too_many_arguments, reason = "one row of the table below, in the order of its columns")]
const fn row(
    name: &'static str,
    family: &'static str,
    severity: &'static str,
    port: u16,
    cve: &'static str,
    cvss: f64,
    confidence: u8,
    description: &'static str,
) -> Finding {
    let port = if port == 0 { None } else { Some(port) };
    Finding { name, family, description, severity, port, protocol: "tcp", cve, cvss, confidence }
}

/// Findings as CyberScan words them: stray blanks, line breaks and empty `cve`s are meant.
#[rustfmt::skip]
const CATALOGUE: [Finding; 15] = [
    row("OpenSSH ", "General", "Medium", 22, "CVE-2020-15778", 6.8, 30,
        "** DISPUTED ** scp in OpenSSH through 8.3p1 allows command injection in the scp.c toremote function, as demonstrated by\n backtick characters in the destination argument.  "),
    row("OpenSSH < 9.8p1 'regreSSHion' RCE Vulnerability", "General", "High", 22, "CVE-2024-6387", 8.1, 30,
        "A signal handler race condition in sshd may be exploited by an unauthenticated attacker who fails to authenticate\nwithin the LoginGraceTime."),
    row("Apache HTTP Server 2.4.49 - 2.4.50 Path Traversal", "Web Servers", "Critical", 443, "CVE-2021-42013", 9.8, 80,
        "Aliased directories let an attacker map URLs to files outside of the document root. If CGI scripts are enabled for\n  these paths, this allows remote code execution."),
    row("Apache HTTP Server mod_proxy SSRF ", "Web Servers", "High", 443, "CVE-2021-40438", 9.0, 80,
        "A crafted request uri-path can cause mod_proxy to forward the request to an origin server chosen by the remote user."),
    row("Exim 4.87 - 4.91 Remote Command Execution", "SMTP problems", "Critical", 25, "CVE-2019-10149", 9.8, 70,
        "Improper validation of the recipient address in deliver_message() may lead to remote command execution.\n"),
    row("SSL/TLS: Report Vulnerable Cipher Suites for HTTPS", "SSL and TLS", "High", 443, "CVE-2016-2183", 7.5, 97,
        "The service accepts cipher suites with 64-bit blocks (SWEET32):\n\n  TLS_RSA_WITH_3DES_EDE_CBC_SHA\n"),
    row("SSL/TLS: Deprecated TLSv1.0 and TLSv1.1 Protocol Detection", "SSL and TLS", "Medium", 443, "CVE-2011-3389", 4.3, 97,
        "It was possible to detect the usage of the deprecated TLSv1.0 and/or TLSv1.1 protocol on this system."),
    row("SSL/TLS: Known Untrusted / Dangerous Certificate Authority", "SSL and TLS", "Medium", 443, "", 5.0, 97,
        "The service is using a certificate of a CA that is\n  untrusted"),
    row(" jQuery < 3.5.0 XSS Vulnerability", "Web application abuses", "Medium", 443, "CVE-2020-11022", 6.1, 80,
        "Passing HTML from untrusted sources to jQuery's DOM manipulation methods may execute untrusted code, even after\tsanitizing it."),
    row("SSL/TLS: Certificate Expired", "SSL and TLS", "Medium", 993, "", 5.0, 97,
        "The remote server's SSL/TLS certificate has already expired.\n"),
    row("Dovecot Privilege Escalation Vulnerability", "Privilege escalation", "High", 993, "CVE-2022-30550", 8.8, 30,
        "Two passdb entries with the same driver and args settings may mix up their username_filter and mechanism settings. "),
    row("Postfix SMTP Smuggling", "SMTP problems", "Medium", 25, "CVE-2023-51764", 5.3, 50,
        "Postfix through 3.8.5 allows SMTP smuggling unless configured with\nsmtpd_data_restrictions=reject_unauth_pipelining."),
    row("Prefix Truncation Attacks in SSH Specification (Terrapin Attack)", "General", "Medium", 22, "CVE-2023-48795", 5.9, 80,
        "Parts of the SSH specification are vulnerable to a novel prefix truncation attack (a.k.a. Terrapin attack)."),
    row("TCP timestamps", "General", "Low", 0, "", 2.6, 80,
        "The remote host implements TCP timestamps and therefore allows to compute the uptime. "),
    row("HTTP Server Type and Version", "Web Servers", "Info", 80, "", 0.0, 50,
        "The remote web server is\n Apache/2.4.49 (Debian)\n"),
];

/// Everything the fake CyberScan can be asked for.
#[derive(Default)]
pub(super) struct Data {
    domains: HashMap<String, String>,
    ips: HashMap<String, String>,
    vulnerabilities: HashMap<String, String>,
}

impl Data {
    pub(super) fn set_domain(&mut self, domain: &str, record: &Value) {
        self.domains.insert(domain.to_ascii_lowercase(), record.to_string());
    }

    pub(super) fn set_ip(&mut self, ip: &str, record: &Value) {
        self.ips.insert(canonical(ip), record.to_string());
    }

    pub(super) fn set_vulnerabilities(&mut self, ip: &str, record: &Value) {
        self.vulnerabilities.insert(canonical(ip), record.to_string());
    }

    /// The body for `GET /domain/{domain}`, if the domain is known.
    pub(super) fn domain(&self, domain: &str) -> Option<String> {
        let domain = domain.to_ascii_lowercase();
        if let Some(record) = self.domains.get(&domain) {
            return Some(record.clone());
        }
        let ip = HOSTS.iter().find(|(name, ..)| *name == domain).map(|(_, ip, _)| *ip);
        let ip = ip.or_else(|| load_address(&domain))?;
        Some(record(Some(&domain), ip, &findings(ip)?))
    }

    /// The body for `GET /ip/{ip}`, if the address is known.
    pub(super) fn ip(&self, ip: &str) -> Option<String> {
        if let Some(record) = self.ips.get(&canonical(ip)) {
            return Some(record.clone());
        }
        let ip = ip.parse().ok()?;
        Some(record(None, ip, &findings(ip)?))
    }

    /// The body for `GET /vulnerabilities/ip/{ip}`, if the address is known.
    pub(super) fn vulnerabilities(&self, ip: &str) -> Option<String> {
        #[derive(Serialize)]
        struct Body {
            ip: Ipv4Addr,
            vulnerabilities: Vec<Finding>,
        }
        if let Some(record) = self.vulnerabilities.get(&canonical(ip)) {
            return Some(record.clone());
        }
        let ip = ip.parse().ok()?;
        serde_json::to_string(&Body { ip, vulnerabilities: findings(ip)? }).ok()
    }
}

/// One spelling per address, so that `2001:DB8::1` finds what was set for `2001:db8::1`.
fn canonical(ip: &str) -> String {
    ip.parse::<IpAddr>().map_or_else(|_| ip.to_owned(), |ip| ip.to_string())
}

fn load_address(domain: &str) -> Option<Ipv4Addr> {
    let host = domain.strip_suffix(LOAD_ZONE)?;
    let numbered = host.strip_prefix('n').and_then(|k| k.parse::<u32>().ok());
    // Hosts with other names share the addresses: FNV-1a picks one that is the same in every run.
    let k = numbered.unwrap_or_else(|| {
        host.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
    });
    Some(Ipv4Addr::from(LOAD_NETWORK + k % LOAD_ADDRESSES))
}

/// What was found at an address; `None` if CyberScan does not know it.
fn findings(ip: Ipv4Addr) -> Option<Vec<Finding>> {
    if let Some((.., found)) = HOSTS.iter().find(|(_, address, _)| *address == ip) {
        return Some(found.iter().filter_map(|&at| CATALOGUE.get(at)).copied().collect());
    }
    let k = u32::from(ip).checked_sub(LOAD_NETWORK).filter(|k| *k < LOAD_ADDRESSES)?;
    // Knuth's multiplicative hash spreads neighbouring addresses; a run of the catalogue never repeats a finding.
    let seed = (k.wrapping_mul(2_654_435_761) >> 16) as usize;
    let count = 1 + seed % 5;
    Some(CATALOGUE.iter().cycle().skip(seed / 5 % CATALOGUE.len()).take(count).copied().collect())
}

/// The summary record of a domain or an address.
fn record(domain: Option<&str>, ip: Ipv4Addr, findings: &[Finding]) -> String {
    let of = |severity| findings.iter().filter(|finding| finding.severity == severity).count();
    let [critical, high, medium, low, info] = ["Critical", "High", "Medium", "Low", "Info"].map(of);
    let open_ports: HashSet<u16> = findings.iter().filter_map(|finding| finding.port).collect();
    let open_ports = open_ports.len();
    // Not `sum`, whose zero is -0; rounded, because a sum of tenths shows its binary error.
    let cvss_total = findings.iter().fold(0.0, |total, finding| total + finding.cvss);
    let cvss_total = (cvss_total * 10.0).round() / 10.0;
    let page = "https://www.cyberscan.io/vulnerabilities";
    let (domain, details_page) = match domain {
        Some(name) => (format!(r#""domain":{},"#, json!(name)), json!(format!("{page}/{name}/{ip}"))),
        None => (String::new(), json!(format!("{page}/{ip}"))),
    };
    let vulns =
        format!(r#"{{"critical":{critical},"high":{high},"medium":{medium},"low":{low},"info":{info}}}"#);
    format!(
        r#"{{{domain}"ip":"{ip}","vulns":{vulns},"cvss_total":{cvss_total},"open_ports":{open_ports},"details_page":{details_page}}}"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(body: Option<String>) -> Value {
        serde_json::from_str(&body.unwrap()).unwrap()
    }

    #[test]
    fn every_demo_domain_leads_to_an_address_that_is_known() {
        let data = Data::default();
        for (domain, ip, found) in HOSTS {
            let record = parsed(data.domain(domain));
            assert_eq!(record["ip"], ip.to_string());
            assert_eq!(
                record["details_page"],
                format!("https://www.cyberscan.io/vulnerabilities/{domain}/{ip}")
            );
            let address = parsed(data.ip(&ip.to_string()));
            assert_eq!(address["vulns"], record["vulns"]);
            let vulnerabilities = parsed(data.vulnerabilities(&ip.to_string()));
            assert_eq!(vulnerabilities["vulnerabilities"].as_array().unwrap().len(), found.len());
        }
        assert_eq!(parsed(data.domain("clean.example"))["cvss_total"], 0);
    }

    #[test]
    fn keys_come_in_the_order_of_cyberscan_and_whole_numbers_without_a_fraction() {
        let body = Data::default().vulnerabilities("203.0.113.25").unwrap();
        assert!(body.contains(r#""cve":"","cvss":5,"confidence":97}"#), "{body}");
        let first = body.split('}').next().unwrap();
        let at =
            ["name", "family", "description", "severity", "port", "protocol", "cve", "cvss", "confidence"]
                .map(|key| first.find(&format!("\"{key}\":")).unwrap());
        assert!(at.is_sorted(), "{first}");
    }

    #[test]
    fn load_hosts_are_distinct_and_the_same_in_every_run() {
        let data = Data::default();
        assert_eq!(parsed(data.domain("n300.load.example"))["ip"], "198.18.1.44");
        assert_eq!(parsed(data.domain("N65536.LOAD.example"))["ip"], "198.19.0.0");
        assert_eq!(data.domain("other.load.example"), data.domain("other.load.example"));
        assert_eq!(parsed(data.domain("a\"b.load.example"))["domain"], "a\"b.load.example");
        for k in 0..2000 {
            let found = findings(Ipv4Addr::from(LOAD_NETWORK + k)).unwrap();
            assert!((1..=5).contains(&found.len()), "{k}: {}", found.len());
        }
        assert!(data.ip("198.20.0.0").is_none());
        assert!(data.ip("198.17.255.255").is_none());
    }

    #[test]
    fn what_is_set_by_hand_comes_before_what_is_built_in() {
        let mut data = Data::default();
        data.set_domain("Shop.example", &serde_json::json!({"ip": "192.0.2.1"}));
        data.set_ip("2001:DB8::1", &serde_json::json!({"ip": "x"}));
        data.set_vulnerabilities("2001:DB8::1", &serde_json::json!([]));
        assert_eq!(parsed(data.domain("shop.example"))["ip"], "192.0.2.1");
        assert_eq!(parsed(data.ip("2001:db8:0::1"))["ip"], "x");
        assert_eq!(data.vulnerabilities("2001:db8::1").unwrap(), "[]");
        assert!(data.domain("unknown.example").is_none());
    }
}
