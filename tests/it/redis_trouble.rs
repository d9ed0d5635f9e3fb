//! Redis in trouble, under load: no client notices, and when Redis is well again the relays share again.

use std::time::Duration;

use cyberscan_relay::sandbox::Call;
use tokio::time::sleep;

use crate::{
    fleet::{Load, PATIENT, addresses, fleet, fresh_ip, shares, sharing_within},
    harness::{TestRelay, seen},
    redis::{Proxy, RedisServer, eventually},
};

/// How long relays may take to share again once Redis is well.
const RECOVERY: Duration = Duration::from_secs(5);

async fn sharing(relays: &[TestRelay]) {
    sharing_within(RECOVERY, &relays[0].sandbox, &addresses(relays)).await;
}

/// Two relays on `url` with callers, acquainted with each other.
async fn under_load(url: &str) -> (Vec<TestRelay>, Load) {
    let relays = fleet(2, &[("RELAY_REDIS_URL", url)]).await;
    sharing(&relays).await;
    let load = Load::on(&relays);
    load.answered(30).await;
    (relays, load)
}

#[tokio::test]
async fn a_redis_that_is_not_there_at_the_start_is_found_when_it_comes() {
    let mut redis = RedisServer::process(&[]).await;
    redis.kill();
    let relays = fleet(2, &[("RELAY_REDIS_URL", &redis.url())]).await;
    let load = Load::on(&relays);
    load.answered(50).await;
    redis.restart().await;
    sharing(&relays).await;
    load.end_without_a_failure().await;
}

#[tokio::test]
async fn a_redis_that_is_killed_and_started_again_is_used_again() {
    let mut redis = RedisServer::process(&[]).await;
    let (relays, load) = under_load(&redis.url()).await;
    redis.kill();
    load.answered(50).await;
    sleep(Duration::from_secs(1)).await;
    assert!(!shares(&relays[0].sandbox, &addresses(&relays)).await, "Redis is gone");
    load.answered(50).await;
    redis.restart().await;
    sharing(&relays).await;
    load.end_without_a_failure().await;
}

#[tokio::test]
async fn a_frozen_redis_delays_nobody_for_long_and_is_used_again() {
    let redis = RedisServer::process(&[]).await;
    let (relays, load) = under_load(&redis.url()).await;
    redis.freeze();
    load.answered(50).await;
    sleep(Duration::from_secs(2)).await;
    load.answered(50).await;
    redis.thaw();
    sharing(&relays).await;
    load.end_without_a_failure().await;
}

#[tokio::test]
async fn what_was_fetched_while_redis_was_away_is_shared_when_it_is_back() {
    let mut redis = RedisServer::process(&[]).await;
    let relays = fleet(2, &[("RELAY_REDIS_URL", &redis.url())]).await;
    sharing(&relays).await;
    redis.kill();
    let ips: Vec<String> = (0..20).map(|_| fresh_ip()).collect();
    let asked: Vec<(&str, &str)> = ips.iter().map(|ip| ("ip", ip.as_str())).collect();
    assert_eq!(seen(&relays[0].observe(&asked).await), ips);
    redis.restart().await;
    eventually("the values that waited", async || redis.values().await.len() >= ips.len()).await;
    sharing(&relays).await;
    relays[0].sandbox.cyberscan.reset_counts();
    assert_eq!(seen(&relays[1].observe(&asked).await), ips);
    assert_eq!(relays[0].sandbox.cyberscan.count(Call::Vulnerabilities), 0);
}

#[tokio::test]
async fn a_slow_redis_behind_a_bad_line_costs_no_answer() {
    let redis = RedisServer::process(&[]).await;
    let proxy = Proxy::to(&redis).await;
    let (relays, load) = under_load(&proxy.url()).await;
    proxy.slow(Duration::from_millis(40), 20);
    load.answered(50).await;
    sleep(Duration::from_secs(2)).await;
    load.answered(50).await;
    proxy.slow(Duration::ZERO, 0);
    sharing(&relays).await;
    load.end_without_a_failure().await;
}

#[tokio::test]
async fn connections_that_die_without_a_sign_are_replaced() {
    let redis = RedisServer::process(&[]).await;
    let proxy = Proxy::to(&redis).await;
    let (relays, load) = under_load(&proxy.url()).await;
    // As after a fail-over of a load balancer: nothing is closed, nothing arrives, new connections work.
    proxy.silence();
    load.answered(50).await;
    sharing(&relays).await;
    load.end_without_a_failure().await;
}

#[tokio::test]
async fn a_redis_that_became_read_only_is_read_and_written_again_later() {
    let redis = RedisServer::process(&["--replica-read-only", "yes"]).await;
    let (relays, load) = under_load(&redis.url()).await;
    let known: Vec<String> = (0..10).map(|_| fresh_ip()).collect();
    let asked: Vec<(&str, &str)> = known.iter().map(|ip| ("ip", ip.as_str())).collect();
    let there = redis.values().await.len();
    relays[0].observe(&asked).await;
    eventually("values", async || redis.values().await.len() >= there + known.len()).await;

    // Nobody listens on port 1.
    let _: String = redis.ask(&["REPLICAOF", "127.0.0.1", "1"]).await;
    load.answered(50).await;
    sleep(Duration::from_secs(1)).await;
    still_reads(&relays, &asked).await;
    load.answered(50).await;
    let _: String = redis.ask(&["REPLICAOF", "NO", "ONE"]).await;
    sharing(&relays).await;
    load.end_without_a_failure().await;
}

#[tokio::test]
async fn a_redis_out_of_memory_is_read_and_written_again_later() {
    let redis = RedisServer::process(&["--maxmemory-policy", "noeviction"]).await;
    let (relays, load) = under_load(&redis.url()).await;
    let known: Vec<String> = (0..10).map(|_| fresh_ip()).collect();
    let asked: Vec<(&str, &str)> = known.iter().map(|ip| ("ip", ip.as_str())).collect();
    let there = redis.values().await.len();
    relays[0].observe(&asked).await;
    eventually("values", async || redis.values().await.len() >= there + known.len()).await;

    let _: String = redis.ask(&["CONFIG", "SET", "maxmemory", "1mb"]).await;
    let refused = redis.try_ask::<String>(&["SET", "relay:1:test", "x"]).await.unwrap_err();
    assert_eq!(refused.code(), Some("OOM"), "{refused}");
    load.answered(50).await;
    sleep(Duration::from_secs(1)).await;
    still_reads(&relays, &asked).await;
    load.answered(50).await;
    let _: String = redis.ask(&["CONFIG", "SET", "maxmemory", "0"]).await;
    sharing(&relays).await;
    load.end_without_a_failure().await;
}

/// The second relay answers from Redis what the first one had put there; while others fail to write, most of
/// it at least.
async fn still_reads(relays: &[TestRelay], asked: &[(&str, &str)]) {
    let cyberscan = &relays[0].sandbox.cyberscan;
    for (kind, ip) in asked {
        assert_eq!(seen(&relays[1].observe(&[(kind, ip)]).await), [*ip]);
    }
    let again = asked.iter().filter(|(_, ip)| cyberscan.count_of(Call::Vulnerabilities, ip) > 1).count();
    assert!(again * 2 <= asked.len(), "{again} of {} were asked again", asked.len());
}

#[tokio::test]
async fn a_redis_whose_password_changes_is_used_again_when_it_fits() {
    let mut redis = RedisServer::process(&["--requirepass", "first"]).await;
    let (relays, load) = under_load(&redis.url()).await;
    redis.change_password("second").await;
    load.answered(50).await;
    sleep(Duration::from_secs(1)).await;
    assert!(!shares(&relays[0].sandbox, &addresses(&relays)).await, "the password is wrong");
    load.answered(50).await;
    redis.change_password("first").await;
    sharing(&relays).await;
    load.end_without_a_failure().await;
}

#[tokio::test]
async fn a_redis_that_is_emptied_is_filled_again() {
    let redis = RedisServer::start().await;
    let (relays, load) = under_load(&redis.url()).await;
    let known: Vec<String> = (0..20).map(|_| fresh_ip()).collect();
    let asked: Vec<(&str, &str)> = known.iter().map(|ip| ("ip", ip.as_str())).collect();
    for _ in 0..3 {
        let _: String = redis.ask(&["FLUSHALL"]).await;
        load.answered(30).await;
        for relay in &relays {
            assert_eq!(seen(&relay.observe(&asked).await), known);
        }
    }
    sharing(&relays).await;
    load.end_without_a_failure().await;
    // What is in a memory is asked for no more; what is in none, once for each replica at most.
    let calls = known.iter().map(|ip| relays[0].sandbox.cyberscan.count_of(Call::Vulnerabilities, ip));
    let calls: Vec<usize> = calls.collect();
    assert!(calls.iter().all(|calls| (1..=relays.len()).contains(calls)), "{calls:?}");
}

#[tokio::test]
async fn a_storm_of_connections_does_not_greet_a_redis_that_comes_back() {
    let mut redis = RedisServer::process(&[]).await;
    let (relays, load) = under_load(&redis.url()).await;
    redis.kill();
    load.answered(100).await;
    redis.restart().await;
    sharing(&relays).await;
    load.answered(50).await;
    let stats: deadpool_redis::redis::InfoDict = redis.ask(&["INFO", "stats"]).await;
    let connections: u32 = stats.get("total_connections_received").unwrap();
    // Two for each relay, some in vain, and ours.
    assert!(connections <= 30, "{connections} connections since the start");
    load.end_without_a_failure().await;
}

#[tokio::test]
async fn sentinels_lead_to_the_master_and_after_a_fail_over_to_the_next() {
    let mut master = RedisServer::process(&[]).await;
    let replica = RedisServer::process(&["--replicaof", "127.0.0.1", &master.port().to_string()]).await;
    eventually("the replica follows", async || {
        master.ask::<String>(&["INFO", "replication"]).await.contains("state=online")
    })
    .await;
    let sentinel = RedisServer::sentinel("relays", master.port()).await;
    eventually("the sentinel knows the replica", async || {
        sentinel.ask::<String>(&["INFO", "sentinel"]).await.contains("slaves=1")
    })
    .await;

    let settings = [
        // One that is gone, before the one that is there.
        ("RELAY_REDIS_URL", &*format!("redis://127.0.0.1:1,{}", sentinel.url())),
        ("RELAY_REDIS_MODE", "sentinel"),
        ("RELAY_REDIS_MASTER_NAME", "relays"),
    ];
    let relays = fleet(2, &settings).await;
    sharing(&relays).await;
    assert!(!master.values().await.is_empty());
    let load = Load::on(&relays);
    load.answered(30).await;
    master.kill();
    eventually("the replica is the master", async || {
        // A Sentinel closes all connections of the server it promotes.
        let info = replica.try_ask::<String>(&["INFO", "replication"]).await;
        info.is_ok_and(|info| info.contains("role:master"))
    })
    .await;
    sharing(&relays).await;
    load.end_without_a_failure().await;
}

#[tokio::test]
async fn a_cluster_keeps_values_on_all_nodes_and_loses_no_answer_with_a_node() {
    let mut nodes = RedisServer::cluster().await;
    let urls = nodes.each_ref().map(RedisServer::url).join(",");
    let settings = [("RELAY_REDIS_URL", urls.as_str()), ("RELAY_REDIS_MODE", "cluster")];
    let relays = fleet(2, &[&settings[..], &[PATIENT]].concat()).await;
    sharing(&relays).await;
    let ips: Vec<String> = (0..25).map(|_| fresh_ip()).collect();
    let asked: Vec<(&str, &str)> = ips.iter().map(|ip| ("ip", ip.as_str())).collect();
    let count = async || {
        let mut count = Vec::new();
        for node in &nodes {
            count.push(node.values().await.len());
        }
        count
    };
    let there: usize = count().await.iter().sum();
    relays[0].observe(&asked).await;
    eventually("25 values", async || count().await.iter().sum::<usize>() == there + 25).await;
    assert!(count().await.iter().all(|values| *values > 0), "{:?}", count().await);
    relays[0].sandbox.cyberscan.reset_counts();
    assert_eq!(seen(&relays[1].observe(&asked).await), ips);
    assert_eq!(relays[0].sandbox.cyberscan.calls().len(), 0);

    let load = Load::on(&relays);
    load.answered(30).await;
    nodes[1].kill();
    load.answered(50).await;
    sleep(Duration::from_secs(2)).await;
    load.answered(50).await;
    nodes[1].restart().await;
    for node in &nodes {
        eventually("the cluster is whole", async || {
            node.ask::<String>(&["CLUSTER", "INFO"]).await.contains("cluster_state:ok")
        })
        .await;
    }
    sharing(&relays).await;
    load.end_without_a_failure().await;
}
