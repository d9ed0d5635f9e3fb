//! Something in front of CyberScan answers in its place: an ingress, a firewall, a sign-in page, a gateway. What is not
//! CyberScan's format is an error item, is never kept, and takes nothing away that was known.

use std::{collections::HashMap, time::Duration};

use cyberscan_relay::sandbox::{Behaviour, Call, Rule};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    fleet::{PATIENT, fleet, fresh_ip},
    harness::{TestRelay, codes, list},
    redis::{RedisServer, eventually},
};

/// Bodies that are no JSON object.
pub(crate) const ODD: [&str; 26] = [
    "",
    " ",
    "<html><head><title>404 Not Found</title></head><body><center><h1>404 Not Found</h1></center><hr>nginx</body></html>",
    "<!DOCTYPE html><html><body>Request blocked. Incident 4711.</body></html>",
    "<html><form action=\"/login\"><input name=\"user\"></form></html>",
    "<?xml version=\"1.0\"?><Error><Code>NoSuchKey</Code></Error>",
    "404 page not found\n",
    "Not Found",
    "default backend - 404",
    "null",
    "true",
    "5",
    "\"not found\"",
    "[]",
    "[{\"error\":\"not found\"}]",
    "[{}]",
    "{\"error\":\"not fo",
    "{} x",
    "{}{}",
    "{\"error\":NaN}",
    "{'error': 'not found'}",
    "callback({})",
    ")]}',\n{}",
    "data: {}\n\n",
    "\u{feff}{}",
    "{\0}",
];

/// JSON objects under 200 that are nobody's record, by call.
const NO_RECORDS: [(Call, &[&str]); 3] = [
    (
        Call::Vulnerabilities,
        &[
            "{}",
            r#"{"ip":"192.0.2.1"}"#,
            r#"{"ip":"192.0.2.1","vulnerabilities":null}"#,
            r#"{"vulnerabilities":{}}"#,
            r#"{"vulnerabilities":[null]}"#,
            r#"{"vulnerabilities":[],"error":"backend timeout"}"#,
            r#"{"vulnerabilities":[],"errors":[{"code":1}]}"#,
            r#"{"error":"backend timeout"}"#,
            r#"{"message":"no Route matched with those values"}"#,
        ],
    ),
    (
        Call::Domain,
        &[
            "{}",
            r#"{"domain":"a.example","details_page":"https://www.cyberscan.io/a"}"#,
            r#"{"error":"backend timeout"}"#,
            r#"{"ip":null,"error":"backend timeout"}"#,
            r#"{"ip":{}}"#,
            r#"{"message":"no Route matched with those values"}"#,
        ],
    ),
    (
        Call::Ip,
        &[
            "{}",
            r#"{"details_page":"https://www.cyberscan.io/a"}"#,
            r#"{"error":"backend timeout"}"#,
            r#"{"ip":"","errors":"backend timeout"}"#,
            r#"{"ip":[]}"#,
        ],
    ),
];

fn answer(code: u16, body: &str) -> Behaviour {
    Behaviour::Status { code, retry_after: None, body: body.to_owned() }
}

/// Every way to be answered by something else, for one call.
fn ways(call: Call) -> Vec<Behaviour> {
    let odd = ODD.iter().flat_map(|body| [404, 200].map(|code| answer(code, body)));
    let no_records = NO_RECORDS.iter().filter(|(of, _)| *of == call).flat_map(|(_, bodies)| *bodies);
    let others = [
        answer(502, ODD[2]),
        answer(204, ""),
        answer(410, r#"{"error":"gone"}"#),
        Behaviour::CutGzip { code: 404 },
        Behaviour::CutGzip { code: 200 },
        Behaviour::TruncateBody,
        Behaviour::Redirect { location: "https://elsewhere.test/".into(), code: 302 },
        Behaviour::Redirect { location: "/login".into(), code: 307 },
    ];
    odd.chain(no_records.map(|body| answer(200, body))).chain(others).collect()
}

/// A question of one call, and what it is about.
struct Asked {
    call: Call,
    /// What the call is made with: its rules go by that.
    value: String,
    behaviour: Behaviour,
}

impl Asked {
    /// One for each way, each about something of its own.
    fn all() -> Vec<Self> {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(5_000);
        let asked = |call, behaviour| {
            let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let value = match call {
                Call::Domain => format!("n{number}.load.example"),
                _ => fresh_ip(),
            };
            Self { call, value, behaviour }
        };
        let calls = [Call::Domain, Call::Vulnerabilities, Call::Ip];
        calls.into_iter().flat_map(|call| ways(call).into_iter().map(move |way| asked(call, way))).collect()
    }

    fn route(&self) -> (&'static str, &'static str) {
        match self.call {
            Call::Domain => ("/observe/observables", "domain"),
            Call::Vulnerabilities => ("/observe/observables", "ip"),
            _ => ("/refer/observables", "ip"),
        }
    }

    async fn of(&self, relay: &TestRelay) -> Value {
        let (route, kind) = self.route();
        relay.post(route, &relay.token(), list(&[(kind, &self.value)])).await.json()
    }

    fn name(&self) -> String {
        format!("{:?} {:?}", self.call, self.behaviour)
    }

    fn misbehave(&self, relay: &TestRelay) {
        let rule = Rule::on(self.call).value(&self.value).does(self.behaviour.clone());
        relay.sandbox.cyberscan.script(rule);
    }

    /// The answer is an error and nothing else.
    fn is_an_error(&self, answer: &Value) {
        let expected = match &self.behaviour {
            Behaviour::Status { code: 502, .. } => ["service unavailable"],
            _ => ["unexpected response"],
        };
        assert_eq!(codes(answer), expected, "{}: {answer}", self.name());
        assert!(answer.get("data").is_none(), "{}: {answer}", self.name());
    }
}

/// The sightings or references in an answer, by id.
fn ids(answer: &Value) -> Vec<&str> {
    let list = answer["data"]["sightings"]["docs"].as_array().or(answer["data"].as_array());
    list.into_iter().flatten().map(|doc| doc["id"].as_str().unwrap()).collect()
}

fn found(answer: &Value) -> usize {
    ids(answer).len()
}

/// Answers are fresh for a second and serve for an hour.
const SHORT: [(&str, &str); 8] = [
    ("RELAY_CACHE_FRESH", "1s"),
    ("RELAY_CACHE_STALE_WHILE_REVALIDATE", "0s"),
    ("RELAY_CACHE_STALE_IF_ERROR", "1h"),
    ("RELAY_CACHE_NEGATIVE", "1s"),
    ("RELAY_CACHE_REFRESH_AHEAD", "0"),
    ("RELAY_WORKER_ENABLED", "false"),
    ("RELAY_LIMITER_CONCURRENCY", "512"),
    ("RELAY_LIMITER_QUEUE", "4096"),
];
const SOON: Duration = Duration::from_millis(1_100);

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_something_else_is_never_nothing_found_and_takes_nothing_away() {
    let redis = RedisServer::start().await;
    let url = redis.url();
    for replicas in [1, 3] {
        let shared = [("RELAY_REDIS_URL", url.as_str()), PATIENT];
        let settings = if replicas > 1 { [&SHORT[..], &shared].concat() } else { SHORT.to_vec() };
        let relays = fleet(replicas, &settings).await;
        let (first, cyberscan) = (&relays[0], &relays[0].sandbox.cyberscan);
        if replicas > 1 {
            crate::fleet::sharing_within(
                Duration::from_secs(10),
                &first.sandbox,
                &crate::fleet::addresses(&relays),
            )
            .await;
        }
        let (nothing, stale, negative) = (Asked::all(), Asked::all(), Asked::all());
        // What is known, and what is known to be unknown, before it begins.
        let mut known = HashMap::new();
        for asked in &stale {
            let answer = asked.of(first).await;
            assert!(found(&answer) > 0 && codes(&answer).is_empty(), "{answer}");
            known.insert(asked.value.clone(), answer);
        }
        for asked in &negative {
            cyberscan.script(Rule::on(asked.call).value(&asked.value).times(1).answer(404));
            let answer = asked.of(first).await;
            assert!(codes(&answer).is_empty() && found(&answer) == 0, "a 404 of CyberScan's own: {answer}");
        }
        for asked in nothing.iter().chain(&stale).chain(&negative) {
            asked.misbehave(first);
        }
        sleep(SOON).await;
        for relay in &relays {
            for asked in nothing.iter().chain(&negative) {
                asked.is_an_error(&asked.of(relay).await);
            }
            for asked in &stale {
                let answer = asked.of(relay).await;
                assert_eq!(codes(&answer), ["stale data"], "{}: {answer}", asked.name());
                assert_eq!(ids(&answer), ids(&known[&asked.value]), "{}", asked.name());
            }
        }
        // It is over: everything is there again, as soon as the questions may be asked again.
        cyberscan.clear_script();
        for relay in &relays {
            for asked in nothing.iter().chain(&negative).chain(&stale) {
                eventually("a whole answer", async || {
                    let answer = asked.of(relay).await;
                    codes(&answer).is_empty() && found(&answer) > 0
                })
                .await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_fresh_is_not_touched_by_renewals_that_something_else_answers() {
    let settings = [
        ("RELAY_CACHE_FRESH", "20ms"),
        ("RELAY_CACHE_STALE_WHILE_REVALIDATE", "1h"),
        ("RELAY_CACHE_STALE_IF_ERROR", "1h"),
        ("RELAY_CACHE_REFRESH_AHEAD", "0.9"),
        ("RELAY_WORKER_ENABLED", "false"),
    ];
    let relay = TestRelay::with(&settings).await;
    let all = Asked::all();
    for asked in &all {
        let known = asked.of(&relay).await;
        assert!(found(&known) > 0, "{known}");
        asked.misbehave(&relay);
        for _ in 0..3 {
            // Almost each read starts a renewal, whose answer is no record.
            assert_eq!(ids(&asked.of(&relay).await), ids(&known), "{}", asked.name());
            sleep(Duration::from_millis(2)).await;
        }
    }
    let renewed = relay.sandbox.cyberscan.calls().len();
    assert!(renewed > 3 * all.len() / 2, "{renewed} calls for {} answers: nothing was renewed", all.len());
    for asked in &all {
        let answer = asked.of(&relay).await;
        assert!(found(&answer) > 0 && codes(&answer).is_empty(), "{}: {answer}", asked.name());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_call_that_something_else_answers_is_an_error_and_a_tenant_known_before_is_served_on() {
    let relay = TestRelay::with(&[("RELAY_AUTH_REVALIDATE", "1s")]).await;
    let cyberscan = &relay.sandbox.cyberscan;
    let ways = ways(Call::Token);
    let ip = fresh_ip();
    let token = |key: &str| relay.token_with(&[("api_key", json!(key))]);
    let observe = async |key: &str| {
        let answer = relay.post("/observe/observables", &token(key), list(&[("ip", &ip)])).await;
        answer.json()
    };
    let mut known = Vec::new();
    for (number, _) in ways.iter().enumerate() {
        for who in ["old", "new"] {
            cyberscan.accept_key(&format!("{who}-{number}"));
        }
        known.push(observe(&format!("old-{number}")).await);
        assert!(found(&known[number]) > 0);
    }
    for (number, behaviour) in ways.iter().enumerate() {
        for who in ["old", "new"] {
            let rule = Rule::on(Call::Token).value(&format!("{who}-{number}")).does(behaviour.clone());
            cyberscan.script(rule);
        }
    }
    sleep(SOON).await;
    for (number, behaviour) in ways.iter().enumerate() {
        let expected = match behaviour {
            Behaviour::Status { code: 502, .. } => "service unavailable",
            _ => "unexpected response",
        };
        let answer = observe(&format!("new-{number}")).await;
        assert_eq!((codes(&answer), answer.get("data")), (vec![expected], None), "{behaviour:?}");
        let health = relay.post("/health", &token(&format!("new-{number}")), "").await.json();
        assert_eq!((codes(&health), health.get("data")), (vec![expected], None), "{behaviour:?}");
        assert_eq!(observe(&format!("old-{number}")).await, known[number], "{behaviour:?}");
    }
}
