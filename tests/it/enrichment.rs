//! Observables in, sightings and references out.

use std::{collections::HashSet, time::Duration};

use cyberscan_relay::sandbox::{Behaviour, Call, Rule};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::harness::{TestRelay, codes, list, seen};

#[tokio::test]
async fn observables_are_answered_in_the_order_asked_each_once_unsupported_ones_left_out() {
    let relay = TestRelay::start().await;
    let answer = relay
        .observe(&[
            ("domain", "shop.example"),
            ("ip", "203.0.113.25"),
            ("sha256", "deadbeef"),
            ("ip", "not an address"),
            ("ip", "203.0.113.25"),
            ("domain", "clean.example"),
            ("domain", "unknown.example"),
            ("ip", "203.0.113.10"),
        ])
        .await;
    assert_eq!(seen(&answer), ["shop.example", "203.0.113.25", "203.0.113.10"]);
    let docs = answer["data"]["sightings"]["docs"].as_array().unwrap();
    assert_eq!(answer["data"]["sightings"]["count"], docs.len());
    assert!(answer.get("errors").is_none());
    let ids: HashSet<&Value> = docs.iter().map(|doc| &doc["id"]).collect();
    assert_eq!(ids.len(), docs.len());
    assert_eq!(relay.sandbox.cyberscan.count_of(Call::Vulnerabilities, "203.0.113.25"), 1);
}

#[tokio::test]
async fn nothing_known_is_an_empty_answer() {
    let relay = TestRelay::start().await;
    let nothing = [("ip", "203.0.113.77"), ("domain", "clean.example"), ("domain", "unknown.example")];
    assert_eq!(relay.observe(&nothing).await, json!({"data": {}}));
    assert_eq!(relay.observe(&[("md5", "x")]).await, json!({"data": {}}));
    assert_eq!(relay.refer(&[("domain", "unknown.example"), ("md5", "x")]).await, json!({"data": []}));
}

#[tokio::test]
async fn the_same_question_has_the_same_answer_but_for_the_time() {
    let relay = TestRelay::start().await;
    let ids = async || -> Vec<Value> {
        let answer = relay.observe(&[("domain", "shop.example")]).await;
        answer["data"]["sightings"]["docs"].as_array().unwrap().iter().map(|doc| doc["id"].clone()).collect()
    };
    assert_eq!(ids().await, ids().await);
}

#[tokio::test]
async fn references_lead_to_cyberscans_pages() {
    let relay = TestRelay::start().await;
    let answer = relay
        .refer(&[("domain", "Shop.Example"), ("ip", "203.0.113.10"), ("url", "https://shop.example/")])
        .await;
    let references = answer["data"].as_array().unwrap();
    assert_eq!(references.len(), 2);
    assert_eq!(references[0]["id"], "ref-cyberscan-search-domain-Shop.Example");
    assert_eq!(references[0]["title"], "Details for this domain");
    assert_eq!(references[1]["description"], "Details for this ip in the CyberScan");
    assert_eq!(references[1]["categories"], json!(["CyberScan"]));
    assert!(
        references
            .iter()
            .all(|reference| reference["url"].as_str().unwrap().starts_with("https://www.cyberscan.io/"))
    );
}

#[tokio::test]
async fn a_failing_observable_costs_no_other_its_sightings() {
    let relay = TestRelay::start().await;
    relay.sandbox.cyberscan.script(Rule::on(Call::Vulnerabilities).value("198.18.0.1").answer(500));
    let answer =
        relay.observe(&[("ip", "203.0.113.10"), ("ip", "198.18.0.1"), ("domain", "mail.example")]).await;
    assert_eq!(seen(&answer), ["203.0.113.10", "mail.example"]);
    assert_eq!(codes(&answer), ["service unavailable"]);
}

#[tokio::test]
async fn what_is_there_at_the_deadline_is_returned() {
    let relay = TestRelay::with(&[("RELAY_REQUEST_DEADLINE", "1s")]).await;
    relay.sandbox.cyberscan.script(Rule::on(Call::Vulnerabilities).value("198.18.0.1").does(Behaviour::Hang));
    relay.observe(&[("ip", "203.0.113.10")]).await;
    let asked = Instant::now();
    let answer = relay.observe(&[("ip", "198.18.0.1"), ("ip", "203.0.113.10")]).await;
    // CyberScan itself would be waited for ten seconds.
    assert!((1..5).contains(&asked.elapsed().as_secs()), "{:?}", asked.elapsed());
    assert_eq!(seen(&answer), ["203.0.113.10"]);
    assert_eq!(codes(&answer), ["request timeout"]);
}

#[tokio::test]
async fn the_entity_limit_cuts_per_observable_and_says_so() {
    let relay = TestRelay::start().await;
    let token = relay.token_with(&[("CTR_ENTITIES_LIMIT", json!("2"))]);
    let body = list(&[("domain", "shop.example"), ("domain", "mail.example")]);
    let answer = relay.post("/observe/observables", &token, body).await.json();
    assert_eq!(answer["data"]["sightings"]["count"], 4);
    assert_eq!(codes(&answer), ["too-many-messages-warning"]);
    assert_eq!(answer["errors"][0]["type"], "warning");
    assert!(answer["errors"][0]["message"].as_str().unwrap().contains("10 of the least severe"));
}

#[tokio::test]
async fn tenants_with_different_limits_never_get_each_others() {
    let relay = TestRelay::start().await;
    let body = list(&[("domain", "shop.example")]);
    let ask = async |limit: usize| {
        let token = relay.token_with(&[("CTR_ENTITIES_LIMIT", json!(limit))]);
        let answer = relay.post("/observe/observables", &token, body.clone()).await.json();
        assert_eq!(answer["data"]["sightings"]["count"], limit.min(8));
    };
    for _ in 0..20 {
        tokio::join!(ask(1), ask(100), ask(3), ask(1));
    }
}

#[tokio::test]
async fn forty_observables_are_looked_up_side_by_side_with_one_access_token() {
    let relay = TestRelay::start().await;
    relay.sandbox.cyberscan.latency(Duration::from_millis(200));
    let values: Vec<String> = (0..40).map(|i| format!("198.18.1.{i}")).collect();
    let observables: Vec<(&str, &str)> = values.iter().map(|value| ("ip", value.as_str())).collect();
    let answer = relay.observe(&observables).await;
    assert_eq!(seen(&answer), values);
    assert_eq!(relay.sandbox.cyberscan.count(Call::Token), 1);
    assert_eq!(relay.sandbox.cyberscan.count(Call::Vulnerabilities), 40);
    // Calls began while others were under way: far fewer batches than observables.
    let starts: Vec<_> = relay.sandbox.cyberscan.calls().iter().skip(1).map(|call| call.when).collect();
    let span = *starts.last().unwrap() - starts[0];
    assert!(span < Duration::from_millis(40 * 200 / 4), "looked up one after the other: {span:?}");
}
