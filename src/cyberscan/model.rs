//! The records CyberScan answers with, read strictly where we rely on them and leniently where we
//! only pass them on. It must not know how they travel or what is made of them.

use std::{collections::HashMap, fmt, net::IpAddr};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, MapAccess, Visitor},
};
use serde_json::{Value, value::RawValue};
use url::Url;

use super::{cve, printed, severity};
use crate::{
    ctim::sighting::{Confidence, Severity},
    egress::{Host, HostPatterns},
    surrogates,
};

/// What CyberScan knows about a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainRecord {
    /// The address the domain resolves to; a known domain may have none.
    pub ip: Option<IpAddr>,
    /// CyberScan's page about it.
    pub details_page: Option<String>,
}

/// What CyberScan knows about an address, apart from its vulnerabilities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// CyberScan's page about it.
    pub details_page: Option<String>,
}

/// The vulnerabilities found at an address.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Vulnerabilities(pub Vec<Finding>);

/// One vulnerability.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finding {
    /// Every key of the upstream object and its value as text, in upstream order.
    pub table: Vec<(String, String)>,
    /// What it is called.
    pub name: Option<String>,
    /// What it is.
    pub description: Option<String>,
    /// How the CVE field identifies it; `None` where that field says that there is no CVE.
    pub cve: Option<String>,
    /// The well-formed CVE identifiers in that field.
    pub cves: Vec<String>,
    /// How bad it is: by CyberScan's word or, where that grades nothing, by the CVSS score.
    pub severity: Severity,
    /// The CVSS base score, 0 to 10.
    pub cvss: Option<f64>,
    /// Greenbone's quality of detection, 0 to 100.
    pub detection_quality: Option<f64>,
}

/// The body is not what the call promises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

impl DomainRecord {
    /// Reads the answer to `GET /domain/{domain}`. Links to hosts outside of `pages` are dropped.
    ///
    /// # Errors
    /// [`Malformed`] unless it is a JSON object with the key `ip`, and that is an address, empty or `null`.
    pub fn parse(body: &[u8], pages: &HostPatterns) -> Result<Self, Malformed> {
        let raw: RawRecord = record(body)?;
        let ip = match raw.ip.as_deref().map(str::trim) {
            None | Some("") => None,
            // Parsed before it is used again: what stands here becomes part of the next call.
            Some(ip) => Some(ip.parse::<IpAddr>().map_err(|_| Malformed)?.to_canonical()),
        };
        Ok(Self { ip, details_page: link(raw.details_page, pages) })
    }
}

impl HostRecord {
    /// Reads the answer to `GET /ip/{ip}`. Links to hosts outside of `pages` are dropped.
    ///
    /// # Errors
    /// [`Malformed`] unless it is a JSON object with the key `ip`, and that is a text or `null`.
    pub fn parse(body: &[u8], pages: &HostPatterns) -> Result<Self, Malformed> {
        let raw: RawRecord = record(body)?;
        Ok(Self { details_page: link(raw.details_page, pages) })
    }
}

/// A record of a domain or an address, as far as it is read.
#[derive(Deserialize)]
struct RawRecord {
    /// Has to be there: an object without it is somebody else's answer, not a record without an address.
    #[serde(deserialize_with = "Option::deserialize")]
    ip: Option<String>,
    details_page: Option<Value>,
}

impl Vulnerabilities {
    /// Reads the answer to `GET /vulnerabilities/ip/{ip}`.
    ///
    /// # Errors
    /// [`Malformed`] unless it is a JSON object with a list of objects in `vulnerabilities`.
    pub fn parse(body: &[u8]) -> Result<Self, Malformed> {
        #[derive(Deserialize)]
        struct Raw {
            vulnerabilities: Vec<Upstream>,
        }
        let raw: Raw = record(body)?;
        let mut findings: Vec<Finding> =
            raw.vulnerabilities.into_iter().map(|Upstream(finding)| finding).collect();
        // It is going to be kept for long.
        findings.shrink_to_fit();
        Ok(Self(findings))
    }
}

/// Reads a JSON object; serde on its own would take a list for a struct, too.
pub(super) fn object<T: DeserializeOwned>(body: &[u8]) -> Result<T, Malformed> {
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(Malformed);
    }
    // Looked at as a whole: serde_json alone would skip bad bytes in members nobody reads.
    let text = std::str::from_utf8(body).map_err(|_| Malformed)?;
    serde_json::from_str(&surrogates::replaced(text)).map_err(|_| Malformed)
}

/// Reads a record. An object that tells of an error is none, even where the rest of it has a record's form: what it
/// lacks would look like "nothing found".
fn record<T: DeserializeOwned>(body: &[u8]) -> Result<T, Malformed> {
    #[derive(Deserialize)]
    struct Told {
        error: Option<Value>,
        errors: Option<Value>,
    }
    let quiet = |error: &Value| match error {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(members) => members.is_empty(),
        // How many there are.
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::Bool(true) => false,
    };
    let Told { error, errors } = object(body)?;
    match [error, errors].iter().flatten().all(quiet) {
        true => object(body),
        false => Err(Malformed),
    }
}

/// The https link in `value`, if it leads to a host of `pages`: an analyst will click on it.
fn link(value: Option<Value>, pages: &HostPatterns) -> Option<String> {
    let Some(Value::String(text)) = value else {
        return None;
    };
    let url = Url::parse(text.trim()).ok()?;
    let host: Host = url.host_str()?.parse().ok()?;
    let fits = url.scheme() == "https"
        && url.port().is_none()
        && url.username().is_empty()
        && url.password().is_none()
        && pages.allow(&host);
    fits.then(|| url.into())
}

/// A list or an object as it is read: what is written of line breaks in it are blanks.
fn unescaped(cell: &str) -> String {
    if cell.starts_with(['[', '{']) {
        ["\\n", "\\r", "\\t"].iter().fold(cell.to_owned(), |text, escape| text.replace(escape, " "))
    } else {
        cell.to_owned()
    }
}

impl Finding {
    fn new(cells: &[(String, Box<RawValue>)]) -> Self {
        let table: Vec<(String, String)> =
            cells.iter().map(|(key, value)| (key.clone(), printed::cell(value))).collect();
        // Whatever CyberScan put there is told, but for what is empty.
        let text = |key: &str| {
            let (_, text) = table.iter().find(|(name, _)| name == key)?;
            (!matches!(text.as_str(), "" | "[]" | "{}")).then(|| text.clone())
        };
        let number = |key: &str| severity::number_in(&text(key)?);
        let cve = text("cve").unwrap_or_default();
        let cves = cve::ids(&unescaped(&cve));
        // Greenbone's `severity` is the score itself.
        let graded = || severity::number(&text("severity")?).filter(|score| (0.0..=10.0).contains(score));
        let cvss = number("cvss").or_else(graded);
        Self {
            name: text("name"),
            description: text("description"),
            cve: cve::label(&cve, &cves),
            cves,
            severity: severity::graded(text("severity").map(|word| unescaped(&word)).as_deref(), cvss),
            cvss,
            detection_quality: number("confidence"),
            table,
        }
    }

    /// The text of a key of the upstream object, if it has that key.
    #[must_use]
    pub fn cell(&self, key: &str) -> Option<&str> {
        let (_, value) = self.table.iter().find(|(name, _)| name == key)?;
        Some(value)
    }

    /// How sure CyberScan is: under 50 Low, 50 to 69 Medium, 70 and up High; High where it does
    /// not say.
    #[must_use]
    pub fn confidence(&self) -> Confidence {
        match self.detection_quality {
            Some(quality) if quality < 50.0 => Confidence::Low,
            Some(quality) if quality < 70.0 => Confidence::Medium,
            _ => Confidence::High,
        }
    }
}

/// A finding as CyberScan words it.
struct Upstream(Finding);

impl<'de> Deserialize<'de> for Upstream {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Cells;
        impl<'de> Visitor<'de> for Cells {
            type Value = Upstream;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object describing a vulnerability")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Upstream, A::Error> {
                let mut cells: Vec<(String, Box<RawValue>)> = Vec::new();
                let mut places: HashMap<String, usize> = HashMap::new();
                while let Some((key, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    // A repeated key keeps its first place and takes its last value.
                    match places.get(&key).and_then(|at| cells.get_mut(*at)) {
                        Some(cell) => cell.1 = value,
                        None => {
                            places.insert(key.clone(), cells.len());
                            cells.push((key, value));
                        }
                    }
                }
                Ok(Upstream(Finding::new(&cells)))
            }
        }
        deserializer.deserialize_map(Cells)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages() -> HostPatterns {
        ["cyberscan.io", "*.cyberscan.io"].iter().map(|p| p.parse().unwrap()).collect()
    }

    fn finding(json: &str) -> Finding {
        let body = format!(r#"{{"vulnerabilities": [{json}]}}"#);
        Vulnerabilities::parse(body.as_bytes()).unwrap().0.remove(0)
    }

    #[test]
    fn what_stands_for_no_cve_or_beside_one_hides_no_finding() {
        let named = |cve: &str| finding(&format!(r#"{{"cve":{cve},"name":"Weak ciphers"}}"#));
        for cve in [r#""NOCVE,NOCVE""#, r#"["NOCVE","N/A"]"#, r#"{"id":null}"#, r#""N/A; none""#] {
            assert_eq!(named(cve).cve, None, "{cve}");
        }
        for cve in [r#"["\nCVE-2020-0001"]"#, r#"["CVE-2020-0001\r\n", "\t"]"#] {
            assert_eq!(named(cve).cves, ["CVE-2020-0001"], "{cve}");
        }
        assert_eq!(
            finding(r#"{"severity":["High\n"]}"#).severity,
            finding(r#"{"severity":"High"}"#).severity
        );
        assert!(DomainRecord::parse(br#"{"ip":"192.0.2.1","errors":0}"#, &pages()).is_ok());
        assert!(DomainRecord::parse(br#"{"ip":"192.0.2.1","errors":2}"#, &pages()).is_err());
    }

    #[test]
    fn a_domain_record_has_an_address_and_a_page() {
        let body = br#"{"domain":"a.example","ip":" 192.0.2.1 ","cvss_total":1,"details_page":"https://www.cyberscan.io/a"}"#;
        let record = DomainRecord::parse(body, &pages()).unwrap();
        assert_eq!(record.ip, Some("192.0.2.1".parse().unwrap()));
        assert_eq!(record.details_page.as_deref(), Some("https://www.cyberscan.io/a"));
        for body in [r#"{"ip":null}"#, r#"{"ip":""}"#, r#"{"ip":" \n"}"#] {
            assert_eq!(DomainRecord::parse(body.as_bytes(), &pages()).unwrap().ip, None);
        }
        let mapped = DomainRecord::parse(br#"{"ip":"::ffff:192.0.2.1"}"#, &pages()).unwrap();
        assert_eq!(mapped.ip, Some("192.0.2.1".parse().unwrap()));
    }

    #[test]
    fn what_is_no_record_is_malformed() {
        for body in [
            "",
            "[]",
            "{}",
            r#"{"error":"backend timeout"}"#,
            r#"{"details_page":"https://www.cyberscan.io/a"}"#,
            r#"{"domain":"a.example","IP":"192.0.2.1"}"#,
            "null",
            "5",
            "\"abc\"",
            "<html>",
            "{",
            r#"{"ip":5}"#,
            r#"{"ip":["192.0.2.1"]}"#,
            r#"{"ip":"../../admin"}"#,
        ] {
            assert!(DomainRecord::parse(body.as_bytes(), &pages()).is_err(), "{body}");
            let host = HostRecord::parse(body.as_bytes(), &pages());
            assert_eq!(host.is_err(), !body.contains("admin"), "{body}");
        }
        for error in [r#""backend timeout""#, "true", "5", r#"["x"]"#, r#"{"code":1}"#, r#""half \ud83d""#] {
            for name in ["error", "errors"] {
                let body = format!(r#"{{"ip":"","vulnerabilities":[],"{name}":{error}}}"#);
                assert!(DomainRecord::parse(body.as_bytes(), &pages()).is_err(), "{body}");
                assert!(HostRecord::parse(body.as_bytes(), &pages()).is_err(), "{body}");
                assert!(Vulnerabilities::parse(body.as_bytes()).is_err(), "{body}");
            }
        }
        for none in ["null", "false", r#"" ""#, "[]", "{}"] {
            let body = format!(r#"{{"ip":"","vulnerabilities":[],"error":{none},"errors":{none}}}"#);
            assert!(DomainRecord::parse(body.as_bytes(), &pages()).is_ok(), "{body}");
            assert!(Vulnerabilities::parse(body.as_bytes()).is_ok(), "{body}");
        }
        for body in [
            "",
            "[]",
            "{}",
            "null",
            r#"{"vulnerabilities":null}"#,
            r#"{"vulnerabilities":{}}"#,
            r#"{"vulnerabilities":["a"]}"#,
            r#"{"vulnerabilities":[5]}"#,
            r#"{"vulnerabilities":[{}, null]}"#,
            r#"[[]]"#,
            r#"{"vulnerabilities":[]} x"#,
        ] {
            assert!(Vulnerabilities::parse(body.as_bytes()).is_err(), "{body}");
        }
    }

    #[test]
    fn a_link_leads_to_cyberscan_over_https_or_is_dropped() {
        let link = |page: &str| {
            let body = format!(r#"{{"ip":"192.0.2.1","details_page":{page}}}"#);
            HostRecord::parse(body.as_bytes(), &pages()).unwrap().details_page
        };
        assert_eq!(
            link(r#""https://www.cyberscan.io/ü?a=<b>""#).as_deref(),
            Some("https://www.cyberscan.io/%C3%BC?a=%3Cb%3E")
        );
        for page in [
            r#""""#,
            "null",
            "5",
            "{}",
            r#""http://www.cyberscan.io/""#,
            r#""javascript:alert(1)""#,
            r#""https://evil.test/""#,
            r#""https://u@www.cyberscan.io/""#,
            r#""https://www.cyberscan.io:8443/""#,
            r#""//www.cyberscan.io/""#,
            r#""https://cyberscan.io.evil.test/""#,
        ] {
            assert_eq!(link(page), None, "{page}");
        }
    }

    #[test]
    fn a_finding_keeps_every_key_in_order_and_understands_some() {
        let finding = finding(
            r#"{"name":" Weak\u0020ciphers \n","family":null,"severity":"HIGH","port":443,"cve":"cve-2016-2183, CVE-2013-2566; NOCVE CVE-1-2",
               "cvss":"7.50","confidence":70,"extra":[1, 2],"name":"Weak ciphers"}"#,
        );
        let keys: Vec<&str> = finding.table.iter().map(|(key, _)| key.as_str()).collect();
        assert_eq!(keys, ["name", "family", "severity", "port", "cve", "cvss", "confidence", "extra"]);
        assert_eq!(finding.name.as_deref(), Some("Weak ciphers"));
        assert_eq!(finding.cves, ["CVE-2016-2183", "CVE-2013-2566"]);
        assert_eq!((finding.severity, finding.cvss), (Severity::High, Some(7.5)));
        assert_eq!(finding.confidence(), Confidence::High);
        assert_eq!(finding.cell("extra"), Some("[1,2]"));
        assert_eq!(finding.description, None);
    }

    #[test]
    fn half_a_character_costs_no_more_than_itself() {
        let finding = finding(
            r#"{"name":"cut \ud83d","severity":"High\udc00","cve":"CVE-2020-0001 \ud800","key \udfff":["\ud83d"],"cvss":9.8}"#,
        );
        assert_eq!(finding.name.as_deref(), Some("cut \u{fffd}"));
        assert_eq!((finding.severity, finding.cves.len()), (Severity::High, 1));
        assert_eq!(finding.cell("key \u{fffd}"), Some("[\"\u{fffd}\"]"));
    }

    #[test]
    fn a_finding_without_a_word_for_it_is_graded_by_its_score() {
        for json in [
            r#"{"cvss":9.8}"#,
            r#"{"severity":"","cvss":"9.8"}"#,
            r#"{"severity":null,"cvss":"9.8 (v3)"}"#,
            r#"{"severity":"Alarm","cvss":9.8}"#,
            r#"{"severity":"Unknown","cvss":9.8}"#,
            r#"{"severity":9.8}"#,
            r#"{"severity":"9.8","cvss":null}"#,
        ] {
            let finding = finding(json);
            assert_eq!((finding.severity, finding.cvss), (Severity::Critical, Some(9.8)), "{json}");
        }
    }

    #[test]
    fn confidence_has_three_bands() {
        for (quality, band) in [
            ("0", Confidence::Low),
            ("49.9", Confidence::Low),
            ("50", Confidence::Medium),
            ("69", Confidence::Medium),
            ("70", Confidence::High),
            ("null", Confidence::High),
            (r#""30""#, Confidence::Low),
            (r#""30%""#, Confidence::Low),
            (r#"" 69 % ""#, Confidence::Medium),
            (r#""95 of 100""#, Confidence::High),
            (r#""low""#, Confidence::High),
            ("[30]", Confidence::High),
            ("1e999", Confidence::High),
        ] {
            assert_eq!(finding(&format!(r#"{{"confidence":{quality}}}"#)).confidence(), band, "{quality}");
        }
    }
}
