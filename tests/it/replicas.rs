//! Replicas on one Redis: what one fetched all serve, in few round trips, and nothing readable lies around.

use std::{collections::HashMap, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD_NO_PAD};
use cyberscan_relay::sandbox::{API_KEY, Call};
use serde_json::Value;

use crate::{
    fleet::{PATIENT, addresses, ask, fleet, fresh_ip, sharing_within},
    harness::{TestRelay, codes, seen},
    redis::{RedisServer, eventually},
};

/// 32 bytes in hexadecimal.
const SEAL: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

/// Nothing comes into memory before it is asked for.
const NOT_AHEAD: (&str, &str) = ("RELAY_WORKER_ENABLED", "false");

/// So many relays on one Redis, acquainted with each other.
async fn replicas(count: usize, redis: &RedisServer, settings: &[(&str, &str)]) -> Vec<TestRelay> {
    let url = redis.url();
    let settings = [settings, &[("RELAY_REDIS_URL", &url), PATIENT]].concat();
    let relays = fleet(count, &settings).await;
    sharing_within(Duration::from_secs(10), &relays[0].sandbox, &addresses(&relays)).await;
    relays
}

/// Calls of each command since `before`.
async fn since(redis: &RedisServer, before: &HashMap<String, u64>, command: &str) -> u64 {
    redis.calls().await.get(command).unwrap_or(&0) - before.get(command).unwrap_or(&0)
}

#[tokio::test]
async fn what_one_relay_fetched_another_serves_as_of_the_time_it_was_fetched() {
    let redis = RedisServer::start().await;
    let relays = replicas(2, &redis, &[]).await;
    let asked = [("domain", "shop.example"), ("ip", "203.0.113.25"), ("ip", "203.0.113.99")];
    let there = redis.values().await.len();
    let first = relays[0].observe(&asked).await;
    assert_eq!(seen(&first), ["shop.example", "203.0.113.25"]);
    eventually("four values", async || redis.values().await.len() == there + 4).await;
    tokio::time::sleep(Duration::from_millis(1200)).await;

    relays[0].sandbox.cyberscan.reset_counts();
    let second = relays[1].observe(&asked).await;
    assert_eq!(first, second, "ids, words and observed_time are those of the fetch");
    assert!(first["data"]["sightings"]["docs"][0]["observed_time"]["start_time"].is_string());
    let calls = relays[0].sandbox.cyberscan.calls();
    assert!(calls.is_empty(), "{calls:?}");
}

#[tokio::test]
async fn known_addresses_cost_one_round_trip_and_known_domains_two() {
    let redis = RedisServer::start().await;
    let relays = replicas(2, &redis, &[NOT_AHEAD]).await;
    let cyberscan = &relays[0].sandbox.cyberscan;
    let ips: Vec<String> = (0..25).map(|_| fresh_ip()).collect();
    let domains: Vec<String> = (100..125).map(|i| format!("n{i}.load.example")).collect();
    let questions = [
        (ips.iter().map(|ip| ("ip", ip.as_str())).collect::<Vec<_>>(), 25, 1),
        (domains.iter().map(|domain| ("domain", domain.as_str())).collect(), 50, 2),
    ];
    for (asked, values, round_trips) in questions {
        let there = redis.values().await.len();
        relays[0].observe(&asked).await;
        eventually("values", async || redis.values().await.len() == there + values).await;
        cyberscan.reset_counts();
        let (before, claimed) = (redis.calls().await, claims(&relays[1]).await);
        let answer = relays[1].observe(&asked).await;
        assert_eq!(seen(&answer), asked.iter().map(|(_, value)| *value).collect::<Vec<_>>());
        assert_eq!(since(&redis, &before, "mget").await, round_trips);
        for command in ["get", "eval", "set", "ping"] {
            assert_eq!(since(&redis, &before, command).await, 0, "{command}");
        }
        // Scripts are run all the time to keep in step; not to claim what is there.
        assert_eq!(claims(&relays[1]).await, claimed);
        // Now they are in memory.
        relays[1].observe(&asked).await;
        assert_eq!(since(&redis, &before, "mget").await, round_trips);
        assert_eq!(cyberscan.calls().len(), 0);
    }
}

/// How often a relay has tried to become the one who fetches something.
async fn claims(relay: &TestRelay) -> f64 {
    let claim = |name: &str| name.starts_with("relay_redis_operations_total") && name.contains("\"claim\"");
    relay.series().await.iter().filter(|(name, _)| claim(name)).map(|(_, count)| *count).sum()
}

/// How `canary` may stand in a dump: as it is, in hexadecimal, in base64 at each of the three alignments.
fn spellings(canary: &[u8]) -> Vec<Vec<u8>> {
    let hex: String = canary.iter().map(|byte| format!("{byte:02x}")).collect();
    let base64 = (0..3).map(|shift| {
        let text = STANDARD_NO_PAD.encode([&vec![0; shift], canary].concat());
        // The first and the last characters depend on the neighbours.
        text.as_bytes()[(shift * 8).div_ceil(6)..(shift + canary.len()) * 8 / 6].to_vec()
    });
    let mut all: Vec<Vec<u8>> = base64.collect();
    all.extend([canary.to_vec(), hex.to_uppercase().into_bytes(), hex.into_bytes()]);
    all
}

fn contains(hay: &[u8], needle: &[u8]) -> bool {
    hay.windows(needle.len()).any(|window| window == needle)
}

/// Everything in Redis, key by key: name and what is there.
async fn dump(redis: &RedisServer) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for key in redis.keys().await {
        let kind: String = redis.ask(&["TYPE", &key]).await;
        let content = match kind.as_str() {
            "string" => redis.bytes(&key).await.unwrap_or_default(),
            "stream" => {
                let entries: deadpool_redis::redis::Value = redis.ask(&["XRANGE", &key, "-", "+"]).await;
                flat(&entries)
            }
            "hash" => redis.ask::<Vec<Vec<u8>>>(&["HGETALL", &key]).await.concat(),
            "none" => continue,
            other => panic!("{key} is a {other}"),
        };
        all.push((key, content));
    }
    all
}

fn flat(value: &deadpool_redis::redis::Value) -> Vec<u8> {
    use deadpool_redis::redis::Value;
    match value {
        Value::Array(items) => items.iter().map(flat).collect::<Vec<_>>().join(&b' '),
        Value::BulkString(bytes) => bytes.clone(),
        other => format!("{other:?}").into_bytes(),
    }
}

/// Everything that must not be readable in Redis.
fn secrets(relay: &TestRelay) -> Vec<Vec<u8>> {
    let mut secrets: Vec<Vec<u8>> = [
        API_KEY,
        "localhost",
        "127.0.0.1",
        "shop.example",
        "example",
        "203.0.113.10",
        "203.0.113.25",
        // How the sandbox's access tokens and the callers' tokens begin.
        "eyJhbGciOi",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into();
    secrets.push(relay.sandbox.cyberscan.host().into_bytes());
    secrets.push(vec![203, 0, 113, 10]);
    secrets
}

#[tokio::test]
async fn every_key_in_redis_has_the_prefix_and_a_time_to_live_and_tells_nothing() {
    for seal in [None, Some(("RELAY_REDIS_ENCRYPTION_KEY", SEAL))] {
        let redis = RedisServer::start().await;
        let relays = replicas(2, &redis, seal.as_slice()).await;
        let there = redis.values().await.len();
        let asked = [("domain", "shop.example"), ("ip", "203.0.113.25"), ("domain", "unknown.example")];
        relays[0].observe(&asked).await;
        relays[0].refer(&[("ip", "203.0.113.10")]).await;
        eventually("five values", async || redis.values().await.len() == there + 5).await;

        let all = dump(&redis).await;
        assert!(all.iter().any(|(key, _)| key == "relay:1:clock"));
        for (key, content) in &all {
            assert!(key.starts_with("relay:1:"), "{key}");
            let life: i64 = redis.ask(&["PTTL", key]).await;
            let forever = ["relay:1:events", "relay:1:purges", "relay:1:clock"].contains(&key.as_str());
            assert!(if forever { life == -1 } else { life > 0 || life == -2 }, "{key} lives {life} ms");
            for secret in secrets(&relays[0]) {
                for spelling in spellings(&secret) {
                    let said = String::from_utf8_lossy(&secret);
                    assert!(!contains(key.as_bytes(), &spelling), "{key} tells {said}");
                    assert!(seal.is_none() || !contains(content, &spelling), "what is at {key} tells {said}");
                }
            }
            for word in ["CVE", "OpenSSH", "Apache", "SSL", "severity", "cyberscan.io"] {
                assert!(seal.is_none() || !contains(content, word.as_bytes()), "{key} tells {word}");
            }
        }
        // The search finds what is there: without a seal, findings can be read.
        let readable = all.iter().any(|(_, content)| contains(content, b"OpenSSH"));
        assert_eq!(readable, seal.is_none());
    }
}

/// What can have happened to a value: from what was there, and what is under another key.
type Harm = fn(&[u8], &[u8]) -> Vec<u8>;

const HARMS: [(&str, Harm); 13] = [
    ("a bit of the body flipped", |value, _| flipped(value, value.len() - 5)),
    ("a bit near the body's start flipped", |value, _| flipped(value, 40)),
    ("a bit of the version flipped", |value, _| flipped(value, 16)),
    ("the value of another key", |_, other| other.to_vec()),
    ("cut in the middle", |value, _| value[..value.len() / 2].to_vec()),
    ("cut in the head", |value, _| value[..10].to_vec()),
    ("nothing left", |_, _| Vec::new()),
    ("longer than it was", |value, _| [value, b"more"].concat()),
    ("oversize", |value, _| [value, &vec![b'x'; 2 << 20]].concat()),
    ("another program's", |_, _| br#"{"ip":"203.0.113.10","vulnerabilities":[]}"#.to_vec()),
    ("an old form", |value, _| [b"R1", &value[2..]].concat()),
    ("from the end of time", |value, _| [&b"R2"[..], &[b'f'; 16], &value[18..]].concat()),
    ("a form to come", |value, _| [b"R3", &value[2..]].concat()),
];

fn flipped(value: &[u8], at: usize) -> Vec<u8> {
    let mut value = value.to_vec();
    value[at] ^= 1;
    value
}

/// Harms values under the eyes of a second relay, which must ask CyberScan, answer what is right and leave
/// behind what a third can use.
async fn harmed_values_are_misses(settings: &[(&str, &str)]) {
    let redis = RedisServer::start().await;
    let relays = replicas(3, &redis, &[settings, &[NOT_AHEAD]].concat()).await;
    let cyberscan = &relays[0].sandbox.cyberscan;
    let mut values: Vec<(String, String, Value)> = Vec::new();
    // That the key is accepted is kept as well.
    relays[0].observe(&[("ip", &fresh_ip())]).await;
    eventually("two values", async || redis.values().await.len() >= 2).await;
    // One more, to be swapped in: with other findings than its neighbour.
    for _ in 0..=HARMS.len() {
        let (ip, before) = (fresh_ip(), redis.values().await);
        let answer = relays[0].observe(&[("ip", &ip)]).await;
        eventually("its value", async || redis.values().await.len() > before.len()).await;
        let key = redis.values().await.into_iter().find(|key| !before.contains(key)).unwrap();
        values.push((ip, key, answer));
    }
    let other = redis.bytes(&values.pop().unwrap().1).await.unwrap();
    for ((_, key, _), (_, harm)) in values.iter().zip(HARMS) {
        let value = redis.bytes(key).await.unwrap();
        redis.overwrite(key, &harm(&value, &other)).await;
    }
    let asked: Vec<(&str, &str)> = values.iter().map(|(ip, ..)| ("ip", ip.as_str())).collect();
    for relay in &relays[1..] {
        let answer = relay.observe(&asked).await;
        assert_eq!(codes(&answer), [""; 0]);
        let docs = answer["data"]["sightings"]["docs"].as_array().unwrap();
        for ((ip, _, right), (harm, _)) in values.iter().zip(HARMS) {
            let ids = |docs: &[Value]| -> Vec<Value> {
                let of = |doc: &&Value| doc["observables"][0]["value"] == *ip;
                docs.iter().filter(of).map(|doc| doc["id"].clone()).collect()
            };
            let right = right["data"]["sightings"]["docs"].as_array().unwrap();
            assert_eq!(ids(docs), ids(right), "{harm}");
            assert_eq!(cyberscan.count_of(Call::Vulnerabilities, ip), 2, "{harm}");
        }
        // The values are whole again before the third relay asks.
        eventually("new values", async || {
            let mut whole = true;
            for (_, key, _) in &values {
                let value = redis.bytes(key).await.unwrap();
                whole &= value.starts_with(b"R2") && value.len() < 1 << 20 && value.len() > 100;
            }
            whole
        })
        .await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    // Who met them counted them, some more than once: a value is looked at again before CyberScan is asked.
    for (relay, met) in relays.iter().zip([false, true, false]) {
        let series = relay.series().await;
        let sum = |parts: [&str; 2]| {
            let fits = |name: &&String| parts.iter().all(|part| name.contains(part));
            series.keys().filter(fits).map(|name| series[name] as usize).sum::<usize>()
        };
        let rejected = sum(["relay_cache_rejected_total", ""]);
        assert!(if met { rejected >= HARMS.len() } else { rejected == 0 }, "{rejected} rejected");
        let misses = sum(["relay_cache_lookups_total{outcome=\"miss\"", "tier=\"redis\""]);
        let calls = sum(["relay_cache_fills_total", "leader"]);
        assert_eq!(misses, calls, "each look-up is one miss, whatever it found");
        assert!(!met || misses >= HARMS.len(), "{misses} misses");
    }
}

#[tokio::test]
async fn a_harmed_value_is_a_miss() {
    harmed_values_are_misses(&[]).await;
}

#[tokio::test]
async fn a_harmed_value_is_a_miss_also_when_values_are_sealed() {
    harmed_values_are_misses(&[("RELAY_REDIS_ENCRYPTION_KEY", SEAL)]).await;
}

#[tokio::test]
async fn what_is_no_string_where_a_value_should_be_harms_nobody() {
    let redis = RedisServer::start().await;
    let relays = replicas(2, &redis, &[]).await;
    let (ip, before) = (fresh_ip(), redis.values().await);
    let right = relays[0].observe(&[("ip", &ip)]).await;
    eventually("its value", async || redis.values().await.len() > before.len()).await;
    let key = redis.values().await.into_iter().find(|key| !before.contains(key)).unwrap();
    let _: u8 = redis.ask(&["DEL", &key]).await;
    let _: u8 = redis.ask(&["RPUSH", &key, "a", "list"]).await;
    let answer = relays[1].observe(&[("ip", &ip)]).await;
    assert!(answer.get("errors").is_none(), "{answer}");
    assert_eq!(seen(&answer), seen(&right));
    eventually("a value in its place", async || redis.ask::<String>(&["TYPE", &key]).await == "string").await;
}

#[tokio::test]
async fn a_replica_with_another_key_reads_nothing_and_one_that_knows_the_old_key_everything() {
    const NEXT: &str = "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100";
    let redis = RedisServer::start().await;
    let both = format!("{NEXT},{SEAL}");
    let url = redis.url();
    let settings =
        |key: &'static str| [("RELAY_REDIS_URL", url.as_str()), PATIENT, ("RELAY_REDIS_ENCRYPTION_KEY", key)];
    let old = TestRelay::with(&settings(SEAL)).await;
    let rotated_settings =
        [("RELAY_REDIS_URL", url.as_str()), PATIENT, ("RELAY_REDIS_ENCRYPTION_KEY", both.as_str())];
    let rotated = TestRelay::beside(&old.sandbox, &rotated_settings).await;
    let stranger = TestRelay::beside(&old.sandbox, &settings(NEXT)).await;
    sharing_within(Duration::from_secs(10), &old.sandbox, &[old.address, rotated.address]).await;

    let (ip, token) = (fresh_ip(), old.token());
    let count = || old.sandbox.cyberscan.count_of(Call::Vulnerabilities, &ip);
    let there = redis.values().await.len();
    old.observe(&[("ip", &ip)]).await;
    eventually("its value", async || redis.values().await.len() > there).await;
    for (relay, calls) in [(&rotated, 1), (&stranger, 2)] {
        let answer = ask(relay.address, &token, &[("ip", &ip)]).await.unwrap();
        assert_eq!(seen(&answer), [ip.as_str()]);
        assert_eq!(count(), calls);
    }
}
