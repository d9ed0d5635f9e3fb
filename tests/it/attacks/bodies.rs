//! Request bodies, from `tests/attacks/bodies.jsonl`: each is answered from the observables in it or
//! refused in the words of the Python relays, never with a fault of HTTP, and CyberScan is asked about
//! nothing else.

use http::StatusCode;
use rstest::rstest;
use serde::Deserialize;
use serde_json::{Value, json};

use super::cases::{Document, cases, check_each};
use crate::harness::{Over, TestRelay, codes, seen};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    body: Document,
    expect: Expect,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Expect {
    /// The message of the only error item.
    Invalid(String),
    /// What the message begins and ends with, where it is long.
    Around(String, String),
    /// The observables that are answered, in order.
    Answers(Vec<String>),
}

#[rstest]
#[tokio::test]
async fn every_body_is_answered_or_refused_on_both_routes_in_the_right_words(
    #[values(Over::Plain, Over::Tls)] over: Over,
) {
    let cases: Vec<Case> = cases(include_str!("../../attacks/bodies.jsonl"));
    let answered = cases.iter().filter(|case| matches!(case.expect, Expect::Answers(_))).count();
    assert!(cases.len() >= 200 && answered >= 30, "{} bodies, {answered} answered", cases.len());
    let relay = TestRelay::over(over, &[]).await;
    let token = relay.token();
    check_each(&cases, async |Case { name, body, expect }| {
        let body = body.bytes(&|_| None);
        for route in ["/observe/observables", "/refer/observables"] {
            let answer = relay.post(route, &token, body.clone()).await;
            assert_eq!(answer.status, StatusCode::OK, "{name} {route}");
            let answer = answer.json();
            match expect {
                Expect::Invalid(message) => {
                    let error = json!({"type": "fatal", "code": "invalid argument", "message": message});
                    assert_eq!(answer, json!({"errors": [error]}), "{name} {route}");
                }
                Expect::Around(begin, end) => {
                    assert_eq!(codes(&answer), ["invalid argument"], "{name} {route}");
                    let message = answer["errors"][0]["message"].as_str().unwrap();
                    assert!(
                        message.starts_with(begin) && message.ends_with(end),
                        "{name} {route}: {message}"
                    );
                    assert!(message.len() < 33_000, "{name} {route}: {} bytes", message.len());
                }
                Expect::Answers(values) => {
                    assert!(answer.get("errors").is_none(), "{name} {route}: {answer}");
                    assert_eq!(told(&answer), *values, "{name} {route}");
                }
            }
        }
    })
    .await;
    let asked = ["sandbox-key", "shop.example", "mail.example", "203.0.113.10", "203.0.113.25"];
    for call in relay.sandbox.cyberscan.calls() {
        assert!(asked.contains(&call.value.as_str()), "{call:?}");
    }
}

/// The values an answer is about: of its sightings, or of its references.
fn told(answer: &Value) -> Vec<String> {
    let Some(references) = answer["data"].as_array() else {
        return seen(answer).into_iter().map(String::from).collect();
    };
    let value = |reference: &Value| {
        let id = reference["id"].as_str().unwrap().strip_prefix("ref-cyberscan-search-").unwrap();
        id.split_once('-').unwrap().1.to_owned()
    };
    references.iter().map(value).collect()
}
