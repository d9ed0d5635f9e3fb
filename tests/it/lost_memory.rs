//! What replicas tell each other survives: purges, acceptances, what is known, whatever becomes of Redis.

use std::time::Duration;

use cyberscan_relay::sandbox::{Call, Rule};
use http::{Method, StatusCode};
use serde_json::json;

use crate::{
    admin::TOKEN,
    fleet::{addresses, fleet, fresh_ip, sharing_within},
    harness::{TestRelay, codes, seen},
    redis::{RedisServer, eventually},
};

/// How long relays may take to share again once Redis is well.
const RECOVERY: Duration = Duration::from_secs(8);
/// Nothing comes into memory before it is asked for.
const NOT_AHEAD: (&str, &str) = ("RELAY_WORKER_ENABLED", "false");

async fn replicas(count: usize, redis: &RedisServer) -> Vec<TestRelay> {
    let relays = fleet(count, &[("RELAY_REDIS_URL", &redis.url()), TOKEN, NOT_AHEAD]).await;
    sharing_within(RECOVERY, &relays[0].sandbox, &addresses(&relays)).await;
    relays
}

#[tokio::test]
async fn a_redis_without_its_memory_costs_no_answer_while_cyberscan_is_down() {
    let mut redis = RedisServer::process(&[]).await;
    let relays = replicas(3, &redis).await;
    let known: Vec<String> = (0..20).map(|_| fresh_ip()).collect();
    let asked: Vec<(&str, &str)> = known.iter().map(|ip| ("ip", ip.as_str())).collect();
    for relay in &relays {
        assert_eq!(seen(&relay.observe(&asked).await), known);
    }
    let cyberscan = &relays[0].sandbox.cyberscan;
    cyberscan.script(Rule::any().answer(503));
    for restart in [true, false] {
        if restart {
            redis.kill();
            redis.restart().await;
        } else {
            let _: String = redis.ask(&["FLUSHALL"]).await;
        }
        tokio::time::sleep(RECOVERY / 2).await;
        for relay in &relays {
            let answer = relay.observe(&asked).await;
            assert_eq!((seen(&answer), codes(&answer)), (known.iter().map(String::as_str).collect(), vec![]));
        }
    }
}

#[tokio::test]
async fn what_was_purged_while_redis_was_away_is_served_by_nobody_once_it_is_back() {
    let mut redis = RedisServer::process(&[]).await;
    let relays = replicas(2, &redis).await;
    let (purged, kept) = (fresh_ip(), fresh_ip());
    let asked = [("ip", purged.as_str()), ("ip", kept.as_str())];
    for relay in &relays {
        relay.observe(&asked).await;
    }
    let calls = |ip: &str| relays[0].sandbox.cyberscan.count_of(Call::Vulnerabilities, ip);
    assert_eq!((calls(&purged), calls(&kept)), (1, 1));
    redis.kill();
    let by_observable = json!({"observable": purged});
    assert_eq!(relays[0].purge(&by_observable).await, StatusCode::BAD_GATEWAY, "it could tell nobody");
    redis.restart().await;
    eventually("the other hears of it", async || {
        relays[1].observe(&asked).await;
        calls(&purged) == 2
    })
    .await;
    assert_eq!(calls(&kept), 1, "what was not purged was asked for again");
}

#[tokio::test]
async fn a_relay_that_has_just_started_purges_for_all_tenants_of_all_replicas() {
    let redis = RedisServer::process(&[]).await;
    let relays = replicas(2, &redis).await;
    let ip = fresh_ip();
    let (domain, asked) = ("shop.example", [("ip", ip.as_str())]);
    relays[0].observe(&asked).await;
    relays[0].observe(&[("domain", domain)]).await;
    let cyberscan = &relays[0].sandbox.cyberscan;
    let domains = || cyberscan.count_of(Call::Domain, domain);
    let before = (cyberscan.count_of(Call::Vulnerabilities, &ip), domains());
    // No request has come to this one yet.
    let settings = [("RELAY_REDIS_URL", redis.url()), (TOKEN.0, TOKEN.1.to_owned())];
    let settings: Vec<(&str, &str)> = settings.iter().map(|(key, value)| (*key, value.as_str())).collect();
    let late = TestRelay::beside(&relays[0].sandbox, &settings).await;
    for observable in [ip.as_str(), domain] {
        assert_eq!(late.purge(&json!({"observable": observable})).await, StatusCode::OK);
    }
    relays[0].observe(&asked).await;
    relays[0].observe(&[("domain", domain)]).await;
    assert_eq!((cyberscan.count_of(Call::Vulnerabilities, &ip), domains()), (before.0 + 1, before.1 + 1));
}

#[tokio::test]
async fn ten_replicas_ask_for_one_token_and_tell_each_other_little() {
    let redis = RedisServer::process(&[]).await;
    let relays = replicas(10, &redis).await;
    let events = async || redis.ask::<i64>(&["XLEN", "relay:1:events"]).await;
    let before = events().await;
    let mut asked = 0;
    for _ in 0..5 {
        for relay in &relays {
            assert_eq!(relay.observe(&[("ip", &fresh_ip())]).await.get("errors"), None);
            asked += 1;
        }
    }
    let told = events().await - before;
    assert!(told * 5 <= asked, "{told} events for {asked} misses");
    let tokens = relays[0].sandbox.cyberscan.count(Call::Token);
    assert!(tokens <= 2, "{tokens} token calls");
}

#[tokio::test]
async fn a_redis_that_refuses_is_degraded_and_what_it_has_is_served_still() {
    let redis = RedisServer::process(&["--maxmemory-policy", "noeviction"]).await;
    let relays = replicas(2, &redis).await;
    let known: Vec<String> = (0..10).map(|_| fresh_ip()).collect();
    let asked: Vec<(&str, &str)> = known.iter().map(|ip| ("ip", ip.as_str())).collect();
    let there = redis.values().await.len();
    relays[0].observe(&asked).await;
    eventually("values", async || redis.values().await.len() >= there + known.len()).await;
    let state = async || {
        let ready = relays[0].administer(Method::GET, "/readyz", None, "").await;
        (ready.status, ready.json()["redis"].clone())
    };
    assert_eq!(state().await, (StatusCode::OK, json!("ok")));

    let _: String = redis.ask(&["CONFIG", "SET", "maxmemory", "1mb"]).await;
    relays[0].observe(&[("ip", &fresh_ip())]).await;
    eventually("it is known", async || state().await == (StatusCode::OK, json!("degraded"))).await;
    assert_eq!(relays[0].series().await["relay_redis_up"], 0.0);
    tokio::time::sleep(RECOVERY).await;
    relays[0].sandbox.cyberscan.script(Rule::any().answer(503));
    let answer = relays[1].observe(&asked).await;
    assert_eq!((seen(&answer), codes(&answer)), (known.iter().map(String::as_str).collect(), vec![]));

    relays[0].sandbox.cyberscan.clear_script();
    let _: String = redis.ask(&["CONFIG", "SET", "maxmemory", "0"]).await;
    relays[0].observe(&[("ip", &fresh_ip())]).await;
    eventually("it is well again", async || state().await == (StatusCode::OK, json!("ok"))).await;
}
