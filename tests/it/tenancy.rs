//! Tenants on several replicas: whose key is revoked gets nothing any more, who was accepted is served while
//! CyberScan is away, and nobody gets what is another's.

use std::time::Duration;

use cyberscan_relay::sandbox::{API_KEY, Behaviour, Call, Rule};
use serde_json::{Value, json};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep},
};

use crate::{
    fleet::{PATIENT, addresses, ask, fleet, sharing_within},
    harness::{TestRelay, codes, seen},
    redis::{RedisServer, eventually},
};

const REVALIDATE: (&str, &str) = ("RELAY_AUTH_REVALIDATE", "1s");
const KNOWN: [(&str, &str); 2] = [("ip", "203.0.113.10"), ("domain", "mail.example")];

async fn replicas(redis: &RedisServer, settings: &[(&str, &str)]) -> Vec<TestRelay> {
    let url = redis.url();
    let relays = fleet(2, &[settings, &[("RELAY_REDIS_URL", &url), PATIENT]].concat()).await;
    sharing_within(Duration::from_secs(10), &relays[0].sandbox, &addresses(&relays)).await;
    relays
}

#[tokio::test]
async fn a_revoked_key_stops_working_on_every_replica_and_an_accepted_one_works_again() {
    let redis = RedisServer::start().await;
    let relays = replicas(&redis, &[REVALIDATE]).await;
    for relay in &relays {
        assert_eq!(seen(&relay.observe(&KNOWN).await).len(), 2);
    }
    relays[0].sandbox.cyberscan.revoke_key(API_KEY);
    let revoked = Instant::now();
    for relay in &relays {
        eventually("it is refused", async || codes(&relay.observe(&KNOWN).await) == ["authorization error"])
            .await;
    }
    // A second by the setting; the rest is for a busy machine.
    assert!(revoked.elapsed() < Duration::from_secs(5), "{:?}", revoked.elapsed());
    for _ in 0..10 {
        for relay in &relays {
            let answer = relay.observe(&KNOWN).await;
            assert!(answer.get("data").is_none(), "{answer}");
        }
        sleep(Duration::from_millis(100)).await;
    }
    relays[0].sandbox.cyberscan.accept_key(API_KEY);
    for relay in &relays {
        eventually("it is accepted", async || {
            let answer = relay.observe(&KNOWN).await;
            answer.get("errors").is_none() && seen(&answer).len() == 2
        })
        .await;
    }
}

#[tokio::test]
async fn during_an_outage_tenants_accepted_before_are_served_and_others_told() {
    let redis = RedisServer::start().await;
    let relays = replicas(&redis, &[REVALIDATE]).await;
    let cyberscan = &relays[0].sandbox.cyberscan;
    cyberscan.accept_key("newcomer");
    relays[0].observe(&KNOWN).await;
    relays[1].observe(&KNOWN).await;
    for behaviour in [
        Behaviour::Status { code: 503, retry_after: None, body: String::new() },
        Behaviour::CloseBeforeAnswer,
        Behaviour::Hang,
    ] {
        cyberscan.clear_script();
        cyberscan.script(Rule::any().does(behaviour));
        let until = Instant::now() + Duration::from_millis(1800);
        while Instant::now() < until {
            for relay in &relays {
                let answer = relay.observe(&KNOWN).await;
                assert!(answer.get("errors").is_none(), "{answer}");
                assert_eq!(seen(&answer), KNOWN.map(|(_, value)| value));
            }
            sleep(Duration::from_millis(50)).await;
        }
    }
    cyberscan.clear_script();
    cyberscan.script(Rule::any().answer(503));
    let newcomer = relays[0].token_with(&[("api_key", json!("newcomer"))]);
    let answer = ask(relays[0].address, &newcomer, &KNOWN).await.unwrap();
    assert_eq!(codes(&answer), ["service unavailable"]);
    assert!(answer.get("data").is_none());
}

/// What CyberScan knows about an address, to tenant `tenant` alone.
fn record(tenant: usize, ip: &str) -> Value {
    let finding = json!({
        "name": format!("canary-{tenant}-{ip}"), "family": "General", "description": "", "severity": "High",
        "port": 443, "protocol": "tcp", "cve": "", "cvss": 7.5, "confidence": 80
    });
    json!({"ip": ip, "vulnerabilities": [finding]})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_tenants_who_ask_the_same_get_their_own() {
    const TENANTS: usize = 50;
    const ADDRESSES: usize = 10;
    const ROUNDS: usize = 20;
    let redis = RedisServer::start().await;
    // Little memory, so that answers come from CyberScan, Redis and memory alike.
    let relays = replicas(&redis, &[("RELAY_CACHE_MEMORY", "256KiB")]).await;
    let cyberscan = &relays[0].sandbox.cyberscan;
    let ips: Vec<String> = (0..ADDRESSES).map(|i| format!("192.0.2.{i}")).collect();
    let mut readers = JoinSet::new();
    for tenant in 0..TENANTS {
        let key = format!("key-{tenant}");
        cyberscan.accept_key(&key);
        for ip in &ips {
            cyberscan.set_vulnerabilities_for(&key, ip, &record(tenant, ip));
        }
        let token = relays[0].token_with(&[("api_key", json!(key))]);
        let (ips, addresses) = (ips.clone(), addresses(&relays));
        readers.spawn(async move {
            let mut reads = 0;
            for round in 0..ROUNDS {
                let asked: Vec<(&str, &str)> = ips.iter().map(|ip| ("ip", ip.as_str())).collect();
                let relay = addresses[(tenant + round) % addresses.len()];
                let answer = ask(relay, &token, &asked).await.unwrap();
                assert!(answer.get("errors").is_none(), "{answer}");
                let docs = answer["data"]["sightings"]["docs"].as_array().unwrap();
                assert_eq!(docs.len(), ADDRESSES);
                for (doc, ip) in docs.iter().zip(&ips) {
                    let text = doc.to_string();
                    assert!(text.contains(&format!("canary-{tenant}-{ip}\"")), "{tenant} got {text}");
                    assert_eq!(
                        text.matches("canary-").count(),
                        text.matches(&format!("canary-{tenant}-{ip}")).count()
                    );
                    reads += 1;
                }
            }
            reads
        });
    }
    let reads: usize = readers.join_all().await.into_iter().sum();
    assert_eq!(reads, TENANTS * ADDRESSES * ROUNDS);
    // Redis and memory took part: far fewer calls than reads.
    let calls = cyberscan.count(Call::Vulnerabilities);
    assert!((TENANTS * ADDRESSES..reads / 2).contains(&calls), "{calls} calls");
}
