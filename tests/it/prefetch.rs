//! The worker, as a tenant and an operator meet it: real relays, a real Redis, a fake CyberScan that counts. What
//! it brings over hours is simulated in virtual time.

use std::time::Duration;

use cyberscan_relay::sandbox::{API_KEY, Call, Options, Sandbox};
use tokio::time::{Instant, sleep};

use crate::{
    fleet::{PATIENT, RelayProcess, ask, fresh_ip},
    harness::{AUDIENCE, TestRelay, seen},
    redis::{RedisServer, eventually},
    simulation::{self, LIFE},
};

/// Answers that live for some seconds: the last moment in which the worker renews is two seconds before the end.
const SHORT: [(&str, &str); 3] = [
    ("RELAY_CACHE_FRESH", "8s"),
    ("RELAY_CACHE_STALE_WHILE_REVALIDATE", "0s"),
    ("RELAY_CACHE_REFRESH_AHEAD", "0"),
];

async fn count(relay: &TestRelay, outcome: &str) -> f64 {
    relay.series().await[&format!("relay_prefetch_total{{outcome=\"{outcome}\"}}")]
}

#[tokio::test]
async fn what_is_asked_for_again_and_again_is_renewed_before_its_end_and_what_is_not_is_not() {
    let relay = TestRelay::with(&SHORT).await;
    let (often, once) = (fresh_ip(), fresh_ip());
    relay.observe(&[("ip", &often), ("ip", &once)]).await;
    for _ in 0..8 {
        sleep(Duration::from_millis(300)).await;
        relay.observe(&[("ip", &often)]).await;
    }
    let calls = |ip: &str| relay.sandbox.cyberscan.count_of(Call::Vulnerabilities, ip);
    eventually("a renewal", async || calls(&often) == 2).await;
    assert_eq!(calls(&once), 1);
    assert_eq!(count(&relay, "refreshed").await, 1.0);
    assert_eq!(count(&relay, "useful").await, 0.0);
    relay.observe(&[("ip", &often)]).await;
    eventually("use", async || count(&relay, "useful").await == 1.0).await;
    // Nobody asks any more: it is let go, not renewed for ever.
    sleep(Duration::from_secs(8)).await;
    assert!(calls(&often) <= 3, "{}", calls(&often));
    assert_eq!(calls(&once), 1);
}

#[tokio::test]
async fn a_worker_that_is_switched_off_does_nothing() {
    let relay = TestRelay::with(&[&SHORT[..], &[("RELAY_WORKER_ENABLED", "false")]].concat()).await;
    let ip = fresh_ip();
    for _ in 0..5 {
        relay.observe(&[("ip", &ip)]).await;
    }
    sleep(Duration::from_secs(7)).await;
    assert_eq!(relay.sandbox.cyberscan.count_of(Call::Vulnerabilities, &ip), 1);
}

#[tokio::test]
async fn a_key_that_is_refused_is_not_used_again() {
    let relay = TestRelay::with(&SHORT).await;
    let ip = fresh_ip();
    for _ in 0..5 {
        relay.observe(&[("ip", &ip)]).await;
    }
    sleep(Duration::from_millis(600)).await;
    relay.sandbox.cyberscan.revoke_key(API_KEY);
    relay.sandbox.cyberscan.invalidate_tokens();
    eventually("a refusal", async || count(&relay, "refused_credentials").await == 1.0).await;
    let calls = relay.sandbox.cyberscan.calls().len();
    sleep(Duration::from_secs(3)).await;
    assert_eq!(relay.sandbox.cyberscan.calls().len(), calls);
}

#[tokio::test]
async fn where_domains_are_followed_to_their_addresses_these_are_there_before() {
    let relay = TestRelay::start().await;
    let cyberscan = &relay.sandbox.cyberscan;
    let investigate = async |number: u32| {
        let domain = format!("n{number}.load.example");
        let found = relay.refer(&[("domain", &domain)]).await;
        assert!(found["data"].is_array(), "{found}");
        sleep(Duration::from_secs(1)).await;
        let ip = format!("198.18.{}.{}", number >> 8 & 255, number & 255);
        let before = cyberscan.calls().len();
        relay.refer(&[("ip", &ip)]).await;
        relay.observe(&[("ip", &ip)]).await;
        cyberscan.calls().len() - before
    };
    // Nobody knows yet that this is what analysts do here.
    for number in 1000..1006 {
        assert_eq!(investigate(number).await, 2);
    }
    for number in 1006..1009 {
        assert_eq!(investigate(number).await, 0);
    }
}

/// Relay processes on one Redis, one address asked for often enough by all of them.
async fn replicas(redis: &RedisServer, sandbox: &Sandbox, ips: &[String]) -> Vec<RelayProcess> {
    let url = redis.url();
    let settings = [&SHORT[..], &[("RELAY_REDIS_URL", url.as_str()), PATIENT]].concat();
    let relays = RelayProcess::fleet(3, sandbox, &settings).await;
    let token = sandbox.token(AUDIENCE);
    let asked: Vec<(&str, &str)> = ips.iter().map(|ip| ("ip", ip.as_str())).collect();
    for _ in 0..3 {
        for relay in &relays {
            let answer = ask(relay.address, &token, &asked).await.unwrap();
            assert_eq!(seen(&answer).len(), ips.len());
        }
        sleep(Duration::from_millis(300)).await;
    }
    relays
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_three_replicas_one_renews_what_is_due() {
    let (redis, sandbox) =
        (RedisServer::process(&[]).await, Sandbox::start(Options::default()).await.unwrap());
    let ips: Vec<String> = (0..10).map(|_| fresh_ip()).collect();
    let _relays = replicas(&redis, &sandbox, &ips).await;
    let calls = |ip: &String| sandbox.cyberscan.count_of(Call::Vulnerabilities, ip);
    eventually("a renewal of each", async || ips.iter().all(|ip| calls(ip) >= 2)).await;
    assert!(ips.iter().all(|ip| calls(ip) == 2), "{:?}", ips.iter().map(calls).collect::<Vec<_>>());

    // Nothing of it is readable in Redis.
    for key in redis.keys().await {
        let kind: String = redis.ask(&["TYPE", &key]).await;
        let text = match kind.as_str() {
            "hash" => redis.ask::<Vec<String>>(&["HGETALL", &key]).await.join(" "),
            "zset" => redis.ask::<Vec<String>>(&["ZRANGE", &key, "0", "-1"]).await.join(" "),
            _ => continue,
        };
        for secret in [ips[0].as_str(), API_KEY, "localhost", "198.19."] {
            assert!(!text.contains(secret) && !key.contains(secret), "{key}: {text}");
        }
        let forever = ["relay:1:purges", "relay:1:clock"].contains(&key.as_str());
        assert!(redis.ask::<i64>(&["TTL", &key]).await > 0 || forever, "{key} stays for ever");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_replica_had_claimed_when_it_was_killed_is_renewed_by_another() {
    let (redis, sandbox) =
        (RedisServer::process(&[]).await, Sandbox::start(Options::default()).await.unwrap());
    let ips: Vec<String> = (0..10).map(|_| fresh_ip()).collect();
    let mut relays = replicas(&redis, &sandbox, &ips).await;
    // Whoever claims something now does not get done with it.
    sandbox.cyberscan.latency(Duration::from_secs(8));
    sandbox.cyberscan.reset_counts();
    eventually("a claim", async || sandbox.cyberscan.count(Call::Vulnerabilities) > 0).await;
    relays.truncate(1);
    sandbox.cyberscan.latency(Duration::ZERO);
    sandbox.cyberscan.reset_counts();
    let (started, token) = (Instant::now(), sandbox.token(AUDIENCE));
    // Those the survivor had claimed itself end after eight seconds, the others' when their leases do.
    while started.elapsed() < Duration::from_secs(60) {
        let due: Vec<String> = redis.keys().await.into_iter().filter(|key| key.ends_with(":d")).collect();
        if due.is_empty() {
            break;
        }
        let scores: Vec<String> = redis.ask(&["ZRANGE", &due[0], "0", "-1", "WITHSCORES"]).await;
        let time: Vec<i64> = redis.ask(&["TIME"]).await;
        let now = time[0] as f64 * 1000.0;
        for score in scores.iter().skip(1).step_by(2).map(|score| score.parse::<f64>().unwrap()) {
            assert!(score > now - 15_000.0, "something is claimed by nobody");
            assert!(score < now + 32_000.0, "something is claimed for longer than a renewal may take");
        }
        if scores.is_empty() {
            break;
        }
        sleep(Duration::from_millis(500)).await;
    }
    let answer = ask(relays[0].address, &token, &[("ip", &ips[0])]).await.unwrap();
    assert_eq!(seen(&answer), [ips[0].as_str()]);
}

#[tokio::test]
async fn a_new_replica_has_the_hottest_answers_in_memory_within_seconds() {
    let redis = RedisServer::start().await;
    let url = redis.url();
    let settings = [("RELAY_REDIS_URL", url.as_str()), PATIENT];
    let first = TestRelay::with(&settings).await;
    let ips: Vec<String> = (0..20).map(|_| fresh_ip()).collect();
    let asked: Vec<(&str, &str)> = ips.iter().map(|ip| ("ip", ip.as_str())).collect();
    for _ in 0..3 {
        first.observe(&asked).await;
        sleep(Duration::from_millis(400)).await;
    }
    eventually("values", async || redis.values().await.len() >= 20).await;
    let second = TestRelay::beside(&first.sandbox, &settings).await;
    second.observe(&[("ip", &fresh_ip())]).await;
    eventually("a warm memory", async || second.series().await["relay_cache_entries"] >= 20.0).await;
    let before = redis.calls().await.get("mget").copied().unwrap_or(0);
    assert_eq!(seen(&second.observe(&asked).await).len(), 20);
    assert_eq!(redis.calls().await.get("mget").copied().unwrap_or(0), before, "they were in memory");
}

#[tokio::test(start_paused = true)]
async fn a_tenth_more_calls_spare_almost_half_of_the_waits() {
    // A fifth of the addresses at a fifth of the rate: each is asked for as often as in the bench. Over so few
    // lives the first ones, in which little is known, weigh more than there.
    let trace = (2_000, 0.9, 4.0);
    let without = simulation::zipf(false, Duration::ZERO, trace, 5).await;
    let with = simulation::zipf(true, Duration::ZERO, trace, 5).await;
    let (calls, waits) =
        (with.calls as f64 / without.calls as f64, with.waited as f64 / without.waited as f64);
    assert!(calls <= 1.13, "{calls} times the calls");
    assert!(waits <= 0.55, "{waits} times the waits");
    assert_eq!(with.old, 0);
    let without = simulation::zipf(false, LIFE, trace, 5).await;
    let with = simulation::zipf(true, LIFE, trace, 5).await;
    assert!(with.calls as f64 <= 1.13 * without.calls as f64);
    assert!(with.old as f64 <= 0.55 * without.old as f64, "{} and {}", with.old, without.old);
}

#[tokio::test(start_paused = true)]
async fn the_second_step_of_investigations_waits_for_little_and_a_scan_sets_nothing_off() {
    let with = simulation::bursts(true, 40).await;
    assert!(with.waited * 5 <= with.asked, "{} of {} wait", with.waited, with.asked);
    let scan = simulation::scan(2_000).await;
    assert_eq!((scan.refreshed, scan.useful, scan.wasted, scan.calls), (0, 0, 0, 2_000));
}
