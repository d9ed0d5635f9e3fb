//! Quotas, pauses and overload, as a client meets them.

use std::time::Duration;

use cyberscan_relay::sandbox::{Behaviour, Call, Rule};
use rstest::rstest;
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::harness::{Over, TestRelay, codes, list, seen};

#[tokio::test]
async fn health_shows_how_much_of_the_quotas_is_used() {
    let relay =
        TestRelay::with(&[("RELAY_LIMITER_TENANT", "50/s, 6000/m"), ("RELAY_LIMITER_FLEET", "90000/h")])
            .await;
    relay.observe(&[("ip", "198.18.0.1")]).await;
    let health = relay.health().await;
    assert_eq!(health["data"]["status"], "ok");
    let quotas = health["data"]["quotas"].as_object().unwrap();
    assert_eq!(quotas.keys().collect::<Vec<_>>(), ["fleet-hour", "tenant-minute"]);
    let minute = &quotas["tenant-minute"];
    assert_eq!(minute["values"]["bucket_unit"], "minute");
    assert_eq!(minute["values"]["bucket_limit"], 6000);
    assert_eq!(minute["values"]["current_bucket_consumption"], 2, "a token call and a look-up");
    assert_eq!(minute["values"]["current_bucket_limit_reached"], false);
    assert_eq!(TestRelay::start().await.health().await, json!({"data": {"status": "ok"}}));
}

#[tokio::test]
async fn cyberscan_never_sees_more_calls_than_the_quota() {
    let relay = TestRelay::with(&[("RELAY_LIMITER_TENANT", "20/s"), ("RELAY_REQUEST_DEADLINE", "3s")]).await;
    let values: Vec<String> = (0..200).map(|i| format!("198.18.3.{i}")).collect();
    let observables: Vec<(&str, &str)> = values.iter().map(|value| ("ip", value.as_str())).collect();
    let answer = relay.observe(&observables).await;
    assert!(seen(&answer).len() >= 20, "a batch gets what it can");
    assert_eq!(codes(&answer).len(), 1, "one error item for the rest");
    assert!(matches!(codes(&answer)[0], "too many requests" | "request timeout"));
    let calls = relay.sandbox.cyberscan.calls();
    for (first, call) in calls.iter().enumerate() {
        let within =
            calls[first..].iter().take_while(|other| other.when < call.when + Duration::from_millis(990));
        assert!(within.count() <= 20, "more than 20 calls within a second");
    }
}

#[tokio::test]
async fn a_pause_is_kept_and_what_is_known_goes_on_being_served() {
    let relay = TestRelay::start().await;
    relay.observe(&[("ip", "198.18.0.1")]).await;
    let slow_down = Behaviour::Status { code: 429, retry_after: Some("3".into()), body: String::new() };
    relay.sandbox.cyberscan.script(Rule::on(Call::Vulnerabilities).times(1).does(slow_down));
    assert_eq!(codes(&relay.observe(&[("ip", "198.18.0.2")]).await), ["too many requests"]);
    let before = relay.sandbox.cyberscan.calls().len();
    let answer = relay
        .post("/observe/observables", &relay.token(), list(&[("ip", "198.18.0.1"), ("ip", "198.18.0.3")]))
        .await
        .json();
    // The known one at once; the other waits for the end of the pause, which its deadline allows.
    assert_eq!(seen(&answer), ["198.18.0.1", "198.18.0.3"]);
    let calls = relay.sandbox.cyberscan.calls();
    let (throttled, next) = (&calls[before - 1], &calls[before]);
    assert!(next.when - throttled.when >= Duration::from_millis(2_900), "{:?}", next.when - throttled.when);
}

#[tokio::test]
async fn a_relay_with_enough_to_do_refuses_more_at_once() {
    let relay = TestRelay::with(&[("RELAY_SERVER_MAX_IN_FLIGHT", "2")]).await;
    relay.sandbox.cyberscan.latency(Duration::from_millis(500));
    let slow = || relay.observe(&[("ip", "198.18.0.1")]);
    let late = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        relay.observe(&[("ip", "198.18.0.1")]).await
    };
    let (one, two, refused) = tokio::join!(slow(), slow(), late);
    assert_eq!((seen(&one).len(), seen(&two).len()), (1, 1));
    assert_eq!(codes(&refused), ["too many requests"]);
    assert_eq!(seen(&relay.observe(&[("ip", "198.18.0.1")]).await).len(), 1);
}

#[tokio::test]
async fn look_ups_that_fail_on_their_way_are_repeated_within_the_budget() {
    let relay = TestRelay::with(&[("RELAY_CYBERSCAN_RETRIES", "2")]).await;
    relay.sandbox.cyberscan.script(Rule::on(Call::Vulnerabilities).times(1).answer(503));
    let answer = relay.observe(&[("ip", "198.18.0.1")]).await;
    assert_eq!(seen(&answer), ["198.18.0.1"]);
    relay.sandbox.cyberscan.reset_counts();
    relay
        .sandbox
        .cyberscan
        .script(Rule::on(Call::Vulnerabilities).does(Behaviour::FailShare { percent: 30, code: 503 }));
    for i in 0..100 {
        relay.observe(&[("ip", &format!("198.18.4.{i}"))]).await;
    }
    let sent = relay.sandbox.cyberscan.count(Call::Vulnerabilities);
    assert!((101..=111).contains(&sent), "{sent} requests for 100 look-ups");
}

#[rstest]
#[tokio::test]
async fn a_tenant_whose_bodies_come_slowly_leaves_room_for_others(
    #[values(Over::Plain, Over::Tls)] over: Over,
) {
    let relay = TestRelay::over(over, &[("RELAY_SERVER_MAX_IN_FLIGHT", "8")]).await;
    relay.sandbox.cyberscan.accept_key("slow");
    let slow = relay.token_with(&[("api_key", json!("slow"))]);
    let half = format!(
        "POST /observe/observables HTTP/1.1\r\nHost: relay.test\r\nAuthorization: Bearer {slow}\r\n\
         Content-Length: 100\r\n\r\n["
    );
    let mut bodies = Vec::new();
    for _ in 0..20 {
        let mut stream = relay.connect().await;
        stream.write_all(half.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        bodies.push(stream);
    }
    tokio::time::sleep(Duration::from_millis(300)).await;
    let answer = relay.observe(&[("ip", "198.18.0.1")]).await;
    assert_eq!(seen(&answer), ["198.18.0.1"], "{answer}");
    let refused = relay.post("/observe/observables", &slow, list(&[("ip", "198.18.0.1")])).await.json();
    assert_eq!(codes(&refused), ["too many requests"]);
}
