//! CyberScan's answers, from `tests/attacks/upstream.jsonl`: what is not its format is an error item and
//! never "nothing found"; what is, is mapped with nothing in it that could do harm further on.

use std::{
    cell::Cell,
    net::{IpAddr, Ipv4Addr},
};

use cyberscan_relay::sandbox::{Behaviour, Call, Rule};
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    Trap,
    cases::{Document, cases, check_each, fill, fill_all},
};
use crate::harness::{TestRelay, codes, list};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    call: Kind,
    /// What CyberScan answers that call with.
    body: Document,
    expect: Expect,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Token,
    Vulnerabilities,
    Domain,
    Ip,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Expect {
    /// The code of the only error item; there is no data beside it.
    Error(String),
    /// Of each sighting some members, in their order.
    Sightings(Vec<Value>),
    /// The page a reference leads to, if there is one, and the address that is looked up for a domain.
    Record {
        page: Option<String>,
        #[serde(default)]
        address: Option<String>,
    },
    /// The token is used: it comes back in one header, where CyberScan does not know it.
    Used,
}

/// The relay, and how many questions it was asked: each case has its own observables and its own key.
struct Rig {
    relay: TestRelay,
    trap: String,
    asked: Cell<u32>,
}

impl Rig {
    fn place(&self, name: &str) -> Option<String> {
        match name {
            "trap" => Some(self.trap.clone()),
            _ => None,
        }
    }

    /// Makes CyberScan answer the case's call so.
    fn script(&self, case: &Case) {
        self.asked.set(self.asked.get() + 1);
        let call = match case.call {
            Kind::Token => Call::Token,
            Kind::Vulnerabilities => Call::Vulnerabilities,
            Kind::Domain => Call::Domain,
            Kind::Ip => Call::Ip,
        };
        let body = case.body.bytes(&|name| self.place(name));
        let cyberscan = &self.relay.sandbox.cyberscan;
        cyberscan.clear_script();
        cyberscan.reset_counts();
        cyberscan.script(Rule::on(call).does(Behaviour::Body(body.into())));
    }

    async fn ask(&self, case: &Case, route: &str) -> Value {
        let ip = Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 0)) + self.asked.get()).to_string();
        let domain = format!("n{}.load.example", self.asked.get());
        let observable = match case.call {
            Kind::Domain => ("domain", domain.as_str()),
            Kind::Token | Kind::Vulnerabilities | Kind::Ip => ("ip", ip.as_str()),
        };
        let token = match case.call {
            Kind::Token => self.relay.token_with(&[("api_key", json!(format!("key-{}", self.asked.get())))]),
            _ => self.relay.token(),
        };
        let answer = self.relay.post(route, &token, list(&[observable])).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", case.name);
        let answer = answer.json();
        is_within_bounds(&case.name, &answer);
        self.calls_are_of_the_template(&case.name);
        answer
    }

    fn calls_are_of_the_template(&self, name: &str) {
        for call in self.relay.sandbox.cyberscan.calls() {
            let sound = match call.call {
                Call::Token => call.value.starts_with("key-") || call.value == "sandbox-key",
                Call::Domain => call.value.ends_with(".load.example"),
                Call::Ip | Call::Vulnerabilities => call.value.parse::<IpAddr>().is_ok(),
                Call::Other => false,
            };
            assert!(sound, "{name}: {call:?}");
        }
    }
}

/// What holds of every answer, whatever CyberScan says.
fn is_within_bounds(name: &str, answer: &Value) {
    let text = answer.to_string();
    assert!(!text.contains("s3cret"), "{name}: {text}");
    let Some(data) = answer.get("data") else {
        return;
    };
    assert!(!data.to_string().contains(":null"), "{name}: {data}");
    for doc in data["sightings"]["docs"].as_array().into_iter().flatten() {
        for (member, most) in
            [("title", 1024), ("short_description", 2048), ("description", 5000), ("source_uri", 2048)]
        {
            let units = doc[member].as_str().unwrap_or_default().encode_utf16().count();
            assert!(units <= most, "{name}: {units} units of {member}");
        }
        for link in doc["external_references"].as_array().into_iter().flatten() {
            let url = link["url"].as_str().unwrap();
            assert!(url.starts_with("https://nvd.nist.gov/vuln/detail/CVE-"), "{name}: {url}");
        }
    }
}

/// How much of `whole` is as in `part`: all of it is what is expected.
fn differs(part: &Value, whole: &Value) -> Option<String> {
    let members = part.as_object().unwrap().iter();
    let differing =
        members.filter(|(member, value)| whole.get(member.as_str()).unwrap_or(&Value::Null) != *value);
    differing.map(|(member, value)| format!("{member} is {}, not {value}", whole[member])).next()
}

#[tokio::test]
async fn every_answer_of_cyberscan_is_mapped_cleanly_or_told_as_an_error() {
    let cases: Vec<Case> = cases(include_str!("../../attacks/upstream.jsonl"));
    let errors = cases.iter().filter(|case| matches!(case.expect, Expect::Error(_))).count();
    assert!(cases.len() >= 250 && errors >= 150, "{} answers, {errors} are errors", cases.len());
    let trap = Trap::set().await;
    let relay = TestRelay::with(&[("RELAY_WORKER_ENABLED", "false")]).await;
    let rig = Rig { relay, trap: trap.address(), asked: Cell::new(0) };
    check_each(&cases, async |case| {
        let name = &case.name;
        let routes: &[&str] = match case.call {
            Kind::Token => &["/health", "/observe/observables", "/refer/observables"],
            Kind::Vulnerabilities => &["/observe/observables"],
            Kind::Domain => &["/observe/observables", "/refer/observables"],
            Kind::Ip => &["/refer/observables"],
        };
        for route in routes {
            rig.script(case);
            let answer = rig.ask(case, route).await;
            let calls = rig.relay.sandbox.cyberscan.calls();
            match &case.expect {
                Expect::Error(code) => {
                    assert_eq!(codes(&answer), [code], "{name} {route}: {answer}");
                    assert!(answer.get("data").is_none(), "{name} {route}: {answer}");
                    let sent = calls.iter().filter(|call| call.authorization).count();
                    assert!(sent == 0 || !matches!(case.call, Kind::Token), "{name} {route}: {calls:?}");
                }
                Expect::Sightings(expected) => {
                    let place = |text: &Value| fill_all(text, &|name| rig.place(name));
                    assert!(answer.get("errors").is_none(), "{name}: {answer}");
                    let none = Vec::new();
                    let docs = answer["data"]["sightings"]["docs"].as_array().unwrap_or(&none);
                    assert_eq!(docs.len(), expected.len(), "{name}: {answer}");
                    for (expected, doc) in expected.iter().zip(docs) {
                        assert_eq!(differs(&place(expected), doc), None, "{name}");
                    }
                }
                Expect::Record { page, address } => {
                    assert!(answer.get("errors").is_none(), "{name} {route}: {answer}");
                    if let Some(references) = answer["data"].as_array() {
                        let urls: Vec<&str> =
                            references.iter().map(|it| it["url"].as_str().unwrap()).collect();
                        let page = page.as_ref().map(|page| fill(page, &|name| rig.place(name)));
                        assert_eq!(urls, Vec::from_iter(page.as_deref()), "{name}");
                    } else {
                        let next = calls.iter().filter(|call| call.call == Call::Vulnerabilities);
                        let next: Vec<&str> = next.map(|call| call.value.as_str()).collect();
                        assert_eq!(next, Vec::from_iter(address.as_deref()), "{name}");
                    }
                }
                Expect::Used if *route == "/health" => {
                    assert_eq!(answer, json!({"data": {"status": "ok"}}), "{name}");
                }
                Expect::Used => {
                    assert_eq!(codes(&answer), ["authorization error"], "{name} {route}: {answer}");
                    assert!(calls.iter().any(|call| call.authorization), "{name} {route}: {calls:?}");
                }
            }
        }
    })
    .await;
    assert!(trap.is_untouched().await);
}
