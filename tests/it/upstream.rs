//! CyberScan in trouble: a failed look-up is an error item, never "nothing found".

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use cyberscan_relay::sandbox::{Behaviour, Call, IssuerBehaviour, Rule};
use serde_json::{Value, json};

use crate::harness::{TestRelay, codes, seen};

const IP: &str = "203.0.113.10";

/// What the relay says about a domain it was not asked about before when `call` behaves so.
async fn with(relay: &TestRelay, call: Call, behaviour: Behaviour) -> Value {
    static ASKED: AtomicU32 = AtomicU32::new(0);
    relay.sandbox.cyberscan.clear_script();
    relay.sandbox.cyberscan.script(Rule::on(call).does(behaviour));
    let domain = format!("n{}.load.example", ASKED.fetch_add(1, Ordering::Relaxed));
    relay.observe(&[("domain", &domain)]).await
}

fn status(code: u16) -> Behaviour {
    Behaviour::Status { code, retry_after: None, body: r#"{"error":"scripted"}"#.into() }
}

#[tokio::test]
async fn every_failure_of_a_look_up_is_an_error_item_and_never_a_clean_answer() {
    let relay = TestRelay::with(&[("RELAY_CYBERSCAN_TIMEOUT", "1s")]).await;
    let failures = || {
        [
            (status(429), "too many requests"),
            (status(500), "service unavailable"),
            (status(502), "service unavailable"),
            (status(503), "service unavailable"),
            (status(400), "unexpected response"),
            (status(204), "unexpected response"),
            (Behaviour::Redirect { location: "https://evil.test/".into(), code: 302 }, "unexpected response"),
            (Behaviour::Json(String::new()), "unexpected response"),
            (Behaviour::Json("<html>".into()), "unexpected response"),
            (Behaviour::Json("null".into()), "unexpected response"),
            (Behaviour::Json("[]".into()), "unexpected response"),
            (Behaviour::Json("{\"vulnerabilities\":".into()), "unexpected response"),
            (
                Behaviour::Json("{\"ip\": \"../../x\", \"vulnerabilities\": [null]}".into()),
                "unexpected response",
            ),
            (Behaviour::TruncateBody, "unexpected response"),
            (Behaviour::GzipBomb, "unexpected response"),
            (Behaviour::EndlessBody, "unexpected response"),
            (Behaviour::CloseBeforeAnswer, "connection error"),
            (Behaviour::Hang, "request timeout"),
            (Behaviour::Drip { every: Duration::from_millis(100) }, "request timeout"),
        ]
    };
    for call in [Call::Domain, Call::Vulnerabilities] {
        for (behaviour, code) in failures() {
            let told = format!("{call:?} {behaviour:?}");
            let answer = with(&relay, call, behaviour).await;
            assert_eq!(codes(&answer), [code], "{told}: {answer}");
            assert!(answer.get("data").is_none(), "{told}");
        }
    }
}

#[tokio::test]
async fn failures_of_the_token_call_are_told_by_health_and_by_look_ups() {
    for (behaviour, code) in [
        (status(401), "authorization error"),
        (status(403), "authorization error"),
        (status(404), "unexpected response"),
        (status(429), "too many requests"),
        (status(500), "service unavailable"),
        (Behaviour::Json("{}".into()), "unexpected response"),
        (Behaviour::Json(r#"{"access_token": null}"#.into()), "unexpected response"),
        (Behaviour::Json(r#"{"access_token": ""}"#.into()), "unexpected response"),
        (Behaviour::Json(r#"{"access_token": "a\r\nX-Injected: 1"}"#.into()), "unexpected response"),
        (
            Behaviour::Redirect { location: "https://evil.test/steal".into(), code: 307 },
            "unexpected response",
        ),
        (Behaviour::CloseBeforeAnswer, "connection error"),
    ] {
        let relay = TestRelay::start().await;
        let told = format!("{behaviour:?}");
        relay.sandbox.cyberscan.script(Rule::on(Call::Token).does(behaviour));
        let (health, look_up) = (relay.health().await, relay.observe(&[("ip", IP)]).await);
        assert_eq!((codes(&health), codes(&look_up)), (vec![code], vec![code]), "{told}");
        assert!(health.get("data").is_none() && look_up.get("data").is_none(), "{told}");
    }
}

#[tokio::test]
async fn too_many_requests_says_when_to_come_back() {
    let relay = TestRelay::start().await;
    let slow_down = Behaviour::Status { code: 429, retry_after: Some("7".into()), body: String::new() };
    let answer = with(&relay, Call::Vulnerabilities, slow_down).await;
    let message = answer["errors"][0]["message"].as_str().unwrap();
    assert!(message.contains("CyberScan") && message.contains("7 seconds"), "{message}");
    assert_eq!(relay.sandbox.cyberscan.count(Call::Vulnerabilities), 1, "429 was retried");
}

#[tokio::test]
async fn an_access_token_is_kept_and_replaced_once_when_refused() {
    let relay = TestRelay::start().await;
    relay.observe(&[("ip", "198.18.0.1")]).await;
    assert_eq!(relay.sandbox.cyberscan.count(Call::Token), 1);
    relay.sandbox.cyberscan.invalidate_tokens();
    let answer = relay.observe(&[("ip", "198.18.0.2"), ("ip", "198.18.0.3"), ("ip", "198.18.0.4")]).await;
    assert_eq!(seen(&answer).len(), 3);
    assert!(answer.get("errors").is_none());
    assert_eq!(relay.sandbox.cyberscan.count(Call::Token), 2);
}

#[tokio::test]
async fn a_key_that_is_refused_is_one_error_and_few_calls() {
    for status in [401, 403] {
        let relay = TestRelay::start().await;
        assert_eq!(seen(&relay.observe(&[("ip", IP)]).await), [IP]);
        relay.sandbox.cyberscan.script(Rule::on(Call::Vulnerabilities).answer(status));
        let answer = relay.observe(&[("ip", "198.18.0.1"), ("ip", "198.18.0.2"), ("ip", "198.18.0.3")]).await;
        let message = "Authorization failed: wrong api_key";
        let error = json!({"type": "fatal", "code": "authorization error", "message": message});
        assert_eq!(answer, json!({"errors": [error]}), "{status}");
        assert_eq!(relay.sandbox.cyberscan.count(Call::Token), 2, "{status}: one more, for all of them");
    }
}

#[tokio::test]
async fn an_address_the_relay_was_sent_is_checked_before_it_is_looked_up() {
    let relay = TestRelay::start().await;
    relay
        .sandbox
        .cyberscan
        .set_domain("evil.example", &json!({"ip": "../../token?x=#", "details_page": "javascript:alert(1)"}));
    let answer = relay.observe(&[("domain", "evil.example")]).await;
    assert_eq!(codes(&answer), ["unexpected response"]);
    assert_eq!(
        relay.sandbox.cyberscan.count(Call::Vulnerabilities) + relay.sandbox.cyberscan.count(Call::Other),
        0
    );
}

#[tokio::test]
async fn connections_are_reused() {
    let relay = TestRelay::start().await;
    for i in 0..50 {
        relay.observe(&[("ip", &format!("198.18.2.{i}"))]).await;
    }
    let opened = relay.sandbox.cyberscan.connections();
    assert!(opened <= 5, "{opened} connections for 51 calls one after the other");
}

#[tokio::test]
async fn a_key_issuer_that_is_down_is_told_and_found_again() {
    let relay = TestRelay::start().await;
    relay.sandbox.issuer.respond_with(IssuerBehaviour::Status(503));
    let refused = relay.health().await;
    assert!(refused["errors"][0]["message"].as_str().unwrap().contains("Wrong jwks_host"));
    relay.sandbox.issuer.respond_with(IssuerBehaviour::Keys);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(relay.health().await, json!({"data": {"status": "ok"}}));
    relay.sandbox.issuer.respond_with(IssuerBehaviour::Status(503));
    assert_eq!(relay.health().await, json!({"data": {"status": "ok"}}));
}
