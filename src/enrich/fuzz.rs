//! What must hold of anything CyberScan answers, and of the sightings made of it.

use std::{collections::HashSet, sync::Arc};

use jiff::Timestamp;
use serde_json::Value;
use url::Url;

use super::sighting::Seen;
use crate::{
    ctim::{Observable, sighting::Tlp},
    cyberscan::{DomainRecord, HostRecord, Vulnerabilities},
    egress::HostPatterns,
    tenant::{ApiKey, Tenant},
};

/// The body of an answer, to whichever call.
pub fn upstream(input: &[u8]) {
    let pages = HostPatterns::default().with_domain("cyberscan.io");
    let domain = DomainRecord::parse(input, &pages);
    let host = HostRecord::parse(input, &pages);
    let vulnerabilities = Vulnerabilities::parse(input);
    if domain.is_ok() || host.is_ok() || vulnerabilities.is_ok() {
        assert!(std::str::from_utf8(input).is_ok() && input.trim_ascii_start().starts_with(b"{"));
    }
    let link = domain.ok().and_then(|record| record.details_page);
    for link in [&link, &host.ok().and_then(|record| record.details_page)].into_iter().flatten() {
        let url = Url::parse(link).expect("a link is a URL");
        assert_eq!(url.as_str(), link);
        let name = url.host_str().expect("a link has a host");
        assert!(name == "cyberscan.io" || name.ends_with(".cyberscan.io"), "{link}");
        assert!(url.scheme() == "https" && url.port().is_none() && url.username().is_empty(), "{link}");
        assert!(url.password().is_none() && link.bytes().all(|b| b.is_ascii_graphic()), "{link}");
    }
    if let Ok(vulnerabilities) = vulnerabilities {
        let plain = serde_json::from_slice::<Value>(input).ok();
        let count = |it: &Value| it.get("vulnerabilities").and_then(Value::as_array).map(Vec::len);
        assert!(plain.as_ref().is_none_or(|plain| count(plain) == Some(vulnerabilities.0.len())));
        sightings(&Arc::new(vulnerabilities), link);
    }
}

fn sightings(vulnerabilities: &Arc<Vulnerabilities>, details_page: Option<String>) {
    let host = "api.example.com".parse().expect("a host");
    let tenant = Tenant::new(host, ApiKey::new("k".into())).id();
    let ip = "192.0.2.7".parse().expect("an address");
    for (kind, value) in [("ip", "192.0.2.7"), ("domain", "Shop.example")] {
        let observable = Observable::new(kind, value).expect("an observable");
        let seen = Seen {
            ip,
            details_page: details_page.clone(),
            vulnerabilities: Arc::clone(vulnerabilities),
            asked_at: Timestamp::UNIX_EPOCH,
        };
        let docs = seen.render(tenant, &observable, Tlp::Amber);
        assert_eq!(docs.len(), vulnerabilities.0.len(), "a finding is lost");
        let mut ids = HashSet::new();
        let mut worst = 7;
        for doc in docs {
            let doc: Value = serde_json::from_str(doc.get()).expect("a sighting is JSON");
            let text = |name: &str| doc.get(name).and_then(Value::as_str);
            assert!(ids.insert(text("id").map(String::from)), "two sightings have one id");
            for (name, most) in
                [("title", 1024), ("short_description", 2048), ("description", 5000), ("source_uri", 2048)]
            {
                assert!(
                    text(name).is_none_or(|text| text.encode_utf16().count() <= most),
                    "{name} is too long"
                );
            }
            assert!(doc.as_object().is_some_and(|members| members.values().all(|value| !value.is_null())));
            assert_eq!(doc.pointer("/observables/0/value"), Some(&value.into()));
            let (columns, cells) = (doc.pointer("/data/columns"), doc.pointer("/data/rows/0"));
            let count = |it: Option<&Value>| it.and_then(Value::as_array).map(Vec::len);
            assert!(count(columns).is_some() && count(columns) == count(cells));
            const SEVERITIES: [&str; 7] = ["Unknown", "None", "Info", "Low", "Medium", "High", "Critical"];
            let rank = SEVERITIES.iter().position(|it| Some(*it) == text("severity"));
            let rank = rank.expect("a severity of CTIM");
            assert!(rank <= worst, "the worst does not come first");
            worst = rank;
            for id in doc.get("external_ids").and_then(Value::as_array).into_iter().flatten() {
                let id = id.as_str().and_then(|id| id.strip_prefix("CVE-")).expect("the id of a CVE");
                assert!(id.bytes().all(|b| b.is_ascii_digit() || b == b'-'), "{id}");
            }
        }
    }
}
