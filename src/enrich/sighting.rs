//! From CyberScan's vulnerabilities to CTIM sightings. It owns the mapping: identity, order, the
//! cut at the entity limit, the words; it must not know how either side travels.

use std::{cmp::Reverse, collections::HashMap, net::IpAddr, sync::Arc};

use jiff::Timestamp;
use serde_json::value::{RawValue, to_raw_value};
use uuid::Uuid;

use crate::{
    ctim::{
        Observable, Sighting, Subject,
        sighting::{Draft, Tlp},
    },
    cyberscan::{Finding, Vulnerabilities},
    tenant::TenantId,
};

/// What CyberScan has seen at an observable.
pub(super) struct Seen {
    /// The address the vulnerabilities are at.
    pub(super) ip: IpAddr,
    /// CyberScan's page about the observable, where its record is at hand.
    pub(super) details_page: Option<String>,
    /// What was found there.
    pub(super) vulnerabilities: Arc<Vulnerabilities>,
    /// When CyberScan was asked.
    pub(super) asked_at: Timestamp,
}

impl Seen {
    /// All sightings as JSON, worst first. They depend on nothing but what is seen, so they can be kept
    /// as long as that is.
    pub(super) fn render(&self, tenant: TenantId, observable: &Observable, tlp: Tlp) -> Vec<Arc<RawValue>> {
        let mut identities = Identities::new(tenant, observable, self.ip);
        let sightings = ranked(&self.vulnerabilities.0).into_iter().map(|finding| {
            let short_description = short_description(finding);
            to_raw_value(&Sighting::new(&Draft {
                observable,
                ip: self.ip,
                identity: identities.of(finding),
                observed_at: self.asked_at,
                title: finding.name.as_deref(),
                short_description: &short_description,
                description: finding.description.as_deref(),
                cves: &finding.cves,
                details_page: self.details_page.as_deref(),
                severity: finding.severity,
                confidence: finding.confidence(),
                tlp,
                table: &finding.table,
            }))
        });
        sightings.filter_map(Result::ok).map(Arc::from).collect()
    }
}

/// By severity, then CVSS score, then confidence; what CyberScan has as equal stays in its order.
fn ranked(findings: &[Finding]) -> Vec<&Finding> {
    let mut ranked: Vec<&Finding> = findings.iter().collect();
    ranked.sort_by(|a, b| {
        let score = |finding: &Finding| finding.cvss.unwrap_or(-1.0);
        let quality = |finding: &Finding| finding.detection_quality.unwrap_or(100.0);
        Reverse(a.severity)
            .cmp(&Reverse(b.severity))
            .then_with(|| score(b).total_cmp(&score(a)))
            .then_with(|| quality(b).total_cmp(&quality(a)))
    });
    ranked
}

fn short_description(finding: &Finding) -> String {
    match finding.cve.as_deref().or(finding.name.as_deref()) {
        Some(name) => format!("Vulnerability {name} observed at CyberScan"),
        None => "Vulnerability observed at CyberScan".to_owned(),
    }
}

/// Names for findings: the same finding at the same observable of the same tenant has the same
/// name on every call, on every replica (UUIDv5, RFC 9562 §5.5).
struct Identities {
    namespace: Uuid,
    /// How often an otherwise equal finding came before.
    repeated: HashMap<Vec<u8>, u32>,
}

impl Identities {
    fn new(tenant: TenantId, observable: &Observable, ip: IpAddr) -> Self {
        let subject = match observable.subject() {
            Subject::Ip(ip) => ip.to_string(),
            Subject::Domain(domain) => domain.to_string(),
        };
        let parts =
            [observable.kind().as_bytes(), subject.as_bytes(), ip.to_string().as_bytes()].map(<[u8]>::to_vec);
        let parts: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        Self { namespace: Uuid::from_bytes(tenant.derive("sighting", &parts)), repeated: HashMap::new() }
    }

    fn of(&mut self, finding: &Finding) -> Uuid {
        let mut name = Vec::new();
        for key in ["cve", "name", "family", "port", "protocol"] {
            let text = finding.cell(key).unwrap_or_default();
            name.extend_from_slice(&(text.len() as u64).to_be_bytes());
            name.extend_from_slice(text.as_bytes());
        }
        let repeated = self.repeated.entry(name.clone()).or_default();
        name.extend_from_slice(&repeated.to_be_bytes());
        *repeated += 1;
        Uuid::new_v5(&self.namespace, &name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenant::{ApiKey, Tenant};
    use serde_json::{Value, json};

    fn tenant(key: &str) -> TenantId {
        Tenant::new("api.example.com".parse().unwrap(), ApiKey::new(key.into())).id()
    }

    fn seen(vulnerabilities: &Value) -> Seen {
        let body = json!({"vulnerabilities": vulnerabilities}).to_string();
        Seen {
            ip: "192.0.2.7".parse().unwrap(),
            details_page: Some("https://www.cyberscan.io/x".into()),
            vulnerabilities: Arc::new(Vulnerabilities::parse(body.as_bytes()).unwrap()),
            asked_at: "2026-01-02T03:04:05.678Z".parse().unwrap(),
        }
    }

    fn sightings(vulnerabilities: &Value, kind: &str, value: &str) -> Vec<Value> {
        let observable = Observable::new(kind, value).unwrap();
        let docs = seen(vulnerabilities).render(tenant("k"), &observable, Tlp::Amber);
        docs.iter().map(|doc| serde_json::from_str(doc.get()).unwrap()).collect()
    }

    #[test]
    fn a_vulnerability_becomes_a_sighting() {
        let vulnerability = json!({
            "name": "OpenSSH user enumeration", "family": "General", "description": "Tells users apart.", "severity": "Medium",
            "port": 22, "protocol": "tcp", "cve": "CVE-2018-15473", "cvss": 5.3, "confidence": 80
        });
        let mut sighting = sightings(&json!([vulnerability]), "domain", "Shop.Example").remove(0);
        let id = sighting["id"].take();
        assert!(id.as_str().unwrap().starts_with("transient:sighting-"));
        let at = "2026-01-02T03:04:05Z";
        let cells =
            ["name", "family", "description", "severity", "port", "protocol", "cve", "cvss", "confidence"];
        assert_eq!(
            sighting,
            json!({
                "id": null,
                "type": "sighting",
                "schema_version": "1.1.11",
                "source": "CyberScan",
                "source_uri": "https://www.cyberscan.io/x",
                "confidence": "High",
                "severity": "Medium",
                "count": 1,
                "internal": true,
                "sensor": "process.vulnerability-scanner",
                "resolution": "detected",
                "tlp": "amber",
                "language": "en",
                "revision": 0,
                "timestamp": at,
                "observed_time": {"start_time": at},
                "observables": [{"type": "domain", "value": "Shop.Example"}],
                "title": "OpenSSH user enumeration",
                "short_description": "Vulnerability CVE-2018-15473 observed at CyberScan",
                "description": "Tells users apart.",
                "external_ids": ["CVE-2018-15473"],
                "external_references": [{
                    "source_name": "NVD", "external_id": "CVE-2018-15473", "url": "https://nvd.nist.gov/vuln/detail/CVE-2018-15473"
                }],
                "relations": [{
                    "origin": "CyberScan", "relation": "Resolved_To",
                    "source": {"type": "domain", "value": "Shop.Example"}, "related": {"type": "ip", "value": "192.0.2.7"}
                }],
                "targets": [{
                    "type": "endpoint", "observables": [{"type": "ip", "value": "192.0.2.7"}], "observed_time": {"start_time": at}
                }],
                "data": {
                    "columns": cells.map(|name| json!({"name": name, "type": "string"})),
                    "rows": [["OpenSSH user enumeration", "General", "Tells users apart.", "Medium", "22", "tcp", "CVE-2018-15473", "5.3", "80"]]
                }
            })
        );
    }

    #[test]
    fn an_empty_finding_is_still_a_sighting_without_nulls() {
        let sighting = sightings(&json!([{"cve": "", "port": null}]), "ip", "192.0.2.7").remove(0);
        assert!(!sighting.to_string().contains("null"));
        assert_eq!(sighting["short_description"], "Vulnerability observed at CyberScan");
        assert_eq!((&sighting["severity"], &sighting["confidence"]), (&json!("Unknown"), &json!("High")));
        assert_eq!(sighting["data"]["rows"], json!([["", ""]]));
        for key in ["title", "description", "external_ids", "external_references", "relations"] {
            assert!(sighting.get(key).is_none(), "{key}");
        }
    }

    #[test]
    fn without_a_cve_the_finding_is_named() {
        let sighting = sightings(&json!([{"name": "Weak ciphers", "cve": " "}]), "ip", "192.0.2.7").remove(0);
        assert_eq!(sighting["short_description"], "Vulnerability Weak ciphers observed at CyberScan");
    }

    #[test]
    fn the_same_finding_has_the_same_id_and_no_other_has() {
        let list = json!([
            {"name": "a", "port": 1}, {"name": "a", "port": 2}, {"name": "a", "port": 1}, {"name": "", "family": "a"}, {"name": "b", "severity": "High"}
        ]);
        let ids = |list: &Value, kind: &str, value: &str| -> Vec<String> {
            sightings(list, kind, value).iter().map(|s| s["id"].as_str().unwrap().to_owned()).collect()
        };
        let first = ids(&list, "ip", "192.0.2.7");
        assert_eq!(first, ids(&list, "ip", "192.0.2.7"));
        let distinct: std::collections::HashSet<_> = first.iter().collect();
        assert_eq!(distinct.len(), first.len());
        // Another spelling is the same domain; another observable or tenant is not the same sighting.
        assert_eq!(ids(&list, "domain", "a.example"), ids(&list, "domain", "A.example."));
        assert_ne!(ids(&list, "domain", "a.example"), ids(&list, "domain", "b.example"));
        let observable = Observable::new("ip", "192.0.2.7").unwrap();
        let other = seen(&list).render(tenant("other"), &observable, Tlp::Amber);
        assert!(!other.iter().any(|doc| first.iter().any(|id| doc.get().contains(id))));
    }

    #[test]
    fn the_worst_come_first() {
        let list = json!([
            {"name": "low", "severity": "Low", "cvss": 9.9},
            {"name": "unsure", "severity": "High", "cvss": 7.0, "confidence": 30},
            {"name": "sure", "severity": "High", "cvss": 7.0, "confidence": 97},
            {"name": "worst", "severity": "Critical"},
            {"name": "high", "severity": "High", "cvss": 7.5, "confidence": 30},
        ]);
        let titles: Vec<Value> =
            sightings(&list, "ip", "192.0.2.7").iter_mut().map(|sighting| sighting["title"].take()).collect();
        assert_eq!(titles, ["worst", "high", "sure", "unsure", "low"]);
    }

    #[test]
    fn texts_keep_to_ctims_limits() {
        let list = json!([{"name": "n".repeat(3000), "cve": "", "description": "😀".repeat(4000)}]);
        let sighting = sightings(&list, "ip", "192.0.2.7").remove(0);
        let units = |key: &str| sighting[key].as_str().unwrap().encode_utf16().count();
        assert_eq!((units("title"), units("short_description"), units("description")), (1024, 2048, 4999));
    }
}
