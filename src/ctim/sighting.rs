//! A sighting, as CTIM 1.1.11 defines it. It owns the shape, the fixed values and the limits of
//! length; it must not know how CyberScan words things.

use std::net::IpAddr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Observable, observable::Tag, truncate};

/// Longest title, in UTF-16 units.
const TITLE: usize = 1024;
/// Longest short description, in UTF-16 units.
const SHORT_DESCRIPTION: usize = 2048;
/// Longest description, in UTF-16 units.
const DESCRIPTION: usize = 5000;
/// Longest URI, in UTF-16 units. A longer one is left out: half a link leads astray.
const URI: usize = 2048;

/// One finding at one observable. Absent values are absent keys, never `null`.
#[derive(Debug, Serialize)]
pub struct Sighting<'a> {
    id: String,
    #[serde(rename = "type")]
    kind: &'static str,
    schema_version: &'static str,
    source: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    source_uri: Option<&'a str>,
    confidence: Confidence,
    severity: Severity,
    count: u32,
    internal: bool,
    sensor: &'static str,
    resolution: &'static str,
    tlp: Tlp,
    language: &'static str,
    revision: u32,
    timestamp: String,
    observed_time: ObservedTime,
    observables: [Tag<'a>; 1],
    #[serde(skip_serializing_if = "Option::is_none")]
    title: Option<String>,
    short_description: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    external_ids: &'a [String],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    external_references: Vec<ExternalReference<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    relations: Option<[Relation<'a>; 1]>,
    targets: [Target; 1],
    data: Table<'a>,
}

/// What a sighting is made from.
#[derive(Debug)]
pub struct Draft<'a> {
    /// The observable asked for.
    pub observable: &'a Observable,
    /// The address the finding was made at.
    pub ip: IpAddr,
    /// Tells this finding from the others at the observable.
    pub identity: Uuid,
    /// When CyberScan was asked.
    pub observed_at: Timestamp,
    /// The finding's name.
    pub title: Option<&'a str>,
    /// One line.
    pub short_description: &'a str,
    /// Many lines.
    pub description: Option<&'a str>,
    /// CVE identifiers, well-formed.
    pub cves: &'a [String],
    /// CyberScan's page about the observable.
    pub details_page: Option<&'a str>,
    /// How bad the finding is.
    pub severity: Severity,
    /// How sure CyberScan is.
    pub confidence: Confidence,
    /// With whom it may be shared.
    pub tlp: Tlp,
    /// Names and values of the upstream object, in upstream order.
    pub table: &'a [(String, String)],
}

impl<'a> Sighting<'a> {
    /// The sighting of `draft`, within CTIM's limits.
    #[must_use]
    pub fn new(draft: &Draft<'a>) -> Self {
        let at = draft.observed_at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let relation = (draft.observable.kind() == "domain").then(|| Relation {
            origin: "CyberScan",
            relation: "Resolved_To",
            source: draft.observable.tag(),
            related: Address::new(draft.ip),
        });
        Self {
            id: format!("transient:sighting-{}", draft.identity),
            kind: "sighting",
            schema_version: "1.1.11",
            source: "CyberScan",
            source_uri: draft.details_page.filter(|uri| uri.len() <= URI),
            confidence: draft.confidence,
            severity: draft.severity,
            count: 1,
            internal: true,
            sensor: "process.vulnerability-scanner",
            resolution: "detected",
            tlp: draft.tlp,
            language: "en",
            revision: 0,
            timestamp: at.clone(),
            observed_time: ObservedTime { start_time: at.clone() },
            observables: [draft.observable.tag()],
            title: draft.title.map(|text| truncate(text, TITLE)),
            short_description: truncate(draft.short_description, SHORT_DESCRIPTION),
            description: draft.description.map(|text| truncate(text, DESCRIPTION)),
            external_ids: draft.cves,
            external_references: draft.cves.iter().map(|cve| ExternalReference::nvd(cve)).collect(),
            relations: relation.map(|relation| [relation]),
            targets: [Target {
                kind: "endpoint",
                observables: [Address::new(draft.ip)],
                observed_time: ObservedTime { start_time: at },
            }],
            data: Table(draft.table),
        }
    }
}

/// How bad a finding is; worse ones are greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[expect(missing_docs, reason = "CTIM's own words")]
pub enum Severity {
    Unknown,
    None,
    Info,
    Low,
    Medium,
    High,
    Critical,
}

/// How sure the source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[expect(missing_docs, reason = "CTIM's own words")]
pub enum Confidence {
    Low,
    Medium,
    High,
}

/// The Traffic Light Protocol: with whom a sighting may be shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "TLP's own words")]
pub enum Tlp {
    White,
    Green,
    #[default]
    Amber,
    Red,
}

impl std::str::FromStr for Tlp {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "white" => Ok(Self::White),
            "green" => Ok(Self::Green),
            "amber" => Ok(Self::Amber),
            "red" => Ok(Self::Red),
            _ => Err("expected white, green, amber or red"),
        }
    }
}

#[derive(Debug, Serialize)]
struct ObservedTime {
    start_time: String,
}

#[derive(Debug, Serialize)]
struct ExternalReference<'a> {
    source_name: &'static str,
    external_id: &'a str,
    url: String,
}

impl<'a> ExternalReference<'a> {
    fn nvd(cve: &'a str) -> Self {
        Self { source_name: "NVD", external_id: cve, url: format!("https://nvd.nist.gov/vuln/detail/{cve}") }
    }
}

#[derive(Debug, Serialize)]
struct Relation<'a> {
    origin: &'static str,
    relation: &'static str,
    source: Tag<'a>,
    related: Address,
}

#[derive(Debug, Serialize)]
struct Target {
    #[serde(rename = "type")]
    kind: &'static str,
    observables: [Address; 1],
    observed_time: ObservedTime,
}

#[derive(Debug, Serialize)]
struct Address {
    #[serde(rename = "type")]
    kind: &'static str,
    value: IpAddr,
}

impl Address {
    fn new(value: IpAddr) -> Self {
        Self { kind: if value.is_ipv6() { "ipv6" } else { "ip" }, value }
    }
}

/// CTIM's data table with one row: `{"columns": [{"name", "type"}], "rows": [[…]]}`.
#[derive(Debug)]
struct Table<'a>(&'a [(String, String)]);

impl Serialize for Table<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Column<'a> {
            name: &'a str,
            #[serde(rename = "type")]
            kind: &'static str,
        }
        #[derive(Serialize)]
        struct Whole<'a> {
            columns: Vec<Column<'a>>,
            rows: [Vec<&'a str>; 1],
        }
        Whole {
            columns: self.0.iter().map(|(name, _)| Column { name, kind: "string" }).collect(),
            rows: [self.0.iter().map(|(_, value)| value.as_str()).collect()],
        }
        .serialize(serializer)
    }
}
