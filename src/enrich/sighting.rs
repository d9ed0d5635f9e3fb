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
        // However an address was spelled and typed, it is the same one.
        let (kind, subject) = match observable.subject() {
            Subject::Ip(ip) => ("ip", ip.to_string()),
            Subject::Domain(domain) => ("domain", domain.to_string()),
        };
        let parts = [kind.as_bytes(), subject.as_bytes(), ip.to_string().as_bytes()].map(<[u8]>::to_vec);
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
    use proptest::prelude::*;
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
    fn a_field_that_says_there_is_no_cve_names_no_finding_and_is_no_reference() {
        for cve in
            [json!("NOCVE"), json!("N/A"), json!("CVE-2020-XXXX"), json!([]), json!(["NOCVE"]), json!(0)]
        {
            let sighting =
                sightings(&json!([{"name": "Weak ciphers", "cve": cve}]), "ip", "192.0.2.7").remove(0);
            assert_eq!(
                sighting["short_description"], "Vulnerability Weak ciphers observed at CyberScan",
                "{cve}"
            );
            assert!(sighting.get("external_references").is_none(), "{cve}");
        }
        let both = json!([{"name": "n", "cve": ["CVE-2020-0001", "NOCVE", "cve-2020-0002"]}]);
        let sighting = sightings(&both, "ip", "192.0.2.7").remove(0);
        assert_eq!(sighting["external_ids"], json!(["CVE-2020-0001", "CVE-2020-0002"]));
        assert_eq!(
            sighting["short_description"],
            "Vulnerability CVE-2020-0001, CVE-2020-0002 observed at CyberScan"
        );
    }

    #[test]
    fn an_address_has_the_type_the_platform_gives_its_version() {
        let list = json!([{"name": "n"}]);
        let v6 = |kind: &str| {
            let observable = Observable::new(kind, "2001:DB8::5").unwrap();
            let seen = Seen { ip: "2001:db8::5".parse().unwrap(), ..seen(&list) };
            serde_json::from_str::<Value>(seen.render(tenant("k"), &observable, Tlp::Amber)[0].get()).unwrap()
        };
        let (as_ip, as_ipv6) = (v6("ip"), v6("ipv6"));
        assert_eq!(as_ip["id"], as_ipv6["id"], "it is the same finding");
        assert_eq!(as_ip["observables"], json!([{"type": "ip", "value": "2001:DB8::5"}]));
        assert_eq!(as_ipv6["observables"], json!([{"type": "ipv6", "value": "2001:DB8::5"}]));
        for sighting in [as_ip, as_ipv6] {
            assert_eq!(
                sighting["targets"][0]["observables"],
                json!([{"type": "ipv6", "value": "2001:db8::5"}])
            );
        }
        let domain = Observable::new("domain", "a.example").unwrap();
        let seen = Seen { ip: "2001:db8::5".parse().unwrap(), ..seen(&list) };
        let docs = seen.render(tenant("k"), &domain, Tlp::Amber);
        let sighting: Value = serde_json::from_str(docs[0].get()).unwrap();
        assert_eq!(sighting["relations"][0]["related"], json!({"type": "ipv6", "value": "2001:db8::5"}));
    }

    #[test]
    fn an_unnamed_severity_does_not_rank_a_finding_away() {
        let list = json!([
            {"name": "a", "severity": "Log", "cvss": 0.0},
            {"name": "b", "severity": "Log", "cvss": 0.0},
            {"name": "worst", "severity": "", "cvss": 9.8},
            {"name": "medium", "severity": "Medium", "cvss": 6.9},
        ]);
        let titles: Vec<Value> =
            sightings(&list, "ip", "192.0.2.7").iter_mut().map(|sighting| sighting["title"].take()).collect();
        assert_eq!(titles, ["worst", "medium", "a", "b"]);
    }

    /// Whatever may stand in a field: what CyberScan writes, what its kin write, and any JSON.
    fn any_field() -> impl Strategy<Value = Value> {
        let texts = prop_oneof![
            "\\PC{0,12}",
            "[\u{0}-\u{1f}\u{202a}-\u{202e}\u{200b}&<>\"'\\\\a ]{0,8}",
            "(&amp;|&#x3c;|</td>|\\n){1,4}",
            "(High|Log|False Positive|Moderate|NOCVE|N/A|CVE-20[12][0-9]-[0-9]{3,6}|[0-9]{1,3}%?|[0-9]\\.[0-9])( |, )?",
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            (-2.0..12.0f64).prop_map(Value::from),
            texts.prop_map(Value::from),
        ];
        leaf.prop_recursive(2, 8, 3, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
                proptest::collection::hash_map("[a-z]{0,3}", inner, 0..3)
                    .prop_map(|members| Value::Object(members.into_iter().collect())),
            ]
        })
    }

    fn is_filled(value: &Value) -> bool {
        match value {
            Value::Null => false,
            Value::String(text) => !text.trim().is_empty(),
            Value::Array(list) => !list.is_empty(),
            Value::Object(members) => !members.is_empty(),
            Value::Bool(_) | Value::Number(_) => true,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn nothing_that_cyberscan_filled_is_lost(
            known in proptest::collection::hash_map(
                "name|family|description|severity|port|protocol|cve|cvss|confidence", any_field(), 0..9
            ),
            others in proptest::collection::hash_map("\\PC{0,5}", any_field(), 0..3),
        ) {
            let object: serde_json::Map<String, Value> = others.into_iter().chain(known).collect();
            let list = json!([object]);
            let docs = sightings(&list, "ip", "192.0.2.7");
            prop_assert_eq!(docs.len(), 1);
            let sighting = &docs[0];
            let (columns, row) = (&sighting["data"]["columns"], &sighting["data"]["rows"][0]);
            let names: Vec<&str> =
                columns.as_array().unwrap().iter().map(|column| column["name"].as_str().unwrap()).collect();
            prop_assert_eq!(names, object.keys().map(String::as_str).collect::<Vec<_>>());
            for (value, cell) in object.values().zip(row.as_array().unwrap()) {
                let cell = cell.as_str().unwrap();
                prop_assert!(!is_filled(value) || !cell.is_empty(), "{} became an empty cell", value);
                if let Value::String(text) = value {
                    prop_assert_eq!(cell, text.trim());
                }
            }
            let filled = |key: &str| object.get(key).is_some_and(is_filled);
            for (key, member) in [("name", "title"), ("description", "description")] {
                prop_assert_eq!(filled(key), sighting.get(member).is_some_and(|text| text != ""), "{}", member);
            }
            let short = sighting["short_description"].as_str().unwrap();
            prop_assert!(!filled("name") || short != "Vulnerability observed at CyberScan");
            let ids: Vec<&str> = sighting["external_ids"].as_array().into_iter().flatten().flat_map(Value::as_str).collect();
            let references = sighting["external_references"].as_array().map_or(0, Vec::len);
            prop_assert_eq!(ids.len(), references);
            for id in ids {
                prop_assert!(short.to_uppercase().contains(id), "{} of {}", id, short);
            }
            let score = object.get("cvss").and_then(Value::as_f64).filter(|score| (0.0..=10.0).contains(score));
            prop_assert!(score.is_none() || sighting["severity"] != "Unknown", "a score grades");
        }
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
