//! Redis, as people run it.

use std::time::Duration;

use cyberscan_relay::doctor::{Check, Report, Severity};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpListener,
    time::Instant,
};

use super::{World, all, bad, found, warned};
use crate::redis::{Authority, Proxy, RedisServer, eventually};

/// What doctor says of a relay with this Redis.
async fn with(url: &str, more: &[(&str, &str)]) -> Report {
    let world = World::start().await;
    // What costs time and is not asked for here.
    let own = [
        ("RELAY_REDIS_URL", url),
        ("RELAY_CYBERSCAN_HOSTS", "*"),
        ("RELAY_AUTH_JWKS_HOSTS", "127.0.0.1:1"),
        ("RELAY_REDIS_TIMEOUT", "450ms"),
    ];
    let own = own.into_iter().filter(|(name, _)| !more.iter().any(|(given, _)| given == name));
    let all: Vec<(&str, &str)> = own.chain(more.iter().copied()).collect();
    world.examine(&all).await
}

#[tokio::test]
async fn the_rights_that_are_recommended_are_enough_and_none_is_left_behind() {
    let redis = RedisServer::process(&["--maxmemory", "64mb", "--maxmemory-policy", "volatile-lfu"]).await;
    let script = include_str!("../../../scripts/secrets.sh");
    let line = script.lines().find(|line| line.starts_with("user relay ")).unwrap();
    let rights = line.split(' ').skip_while(|word| !word.starts_with('~')).collect::<Vec<_>>();
    let _: String =
        redis.ask(&[&["ACL", "SETUSER", "relay", "on", ">p@ss/w:rd"], &rights[..]].concat()).await;
    let report = with(&format!("redis://relay:p%40ss%2Fw:rd@127.0.0.1:{}", redis.port()), &[]).await;
    for check in [
        Check::RedisUrl,
        Check::RedisConnection,
        Check::RedisAuth,
        Check::RedisMode,
        Check::RedisLatency,
        Check::RedisVersion,
        Check::RedisRole,
        Check::RedisCommands,
        Check::RedisScripts,
        Check::RedisKeys,
        Check::RedisMemory,
        Check::RedisEviction,
        Check::RedisPersistence,
        Check::RedisClock,
        Check::RedisEncryption,
    ] {
        found(&report, check, Severity::Ok, "");
    }
    assert!(redis.keys().await.is_empty(), "{:?}", redis.keys().await);
}

#[tokio::test]
async fn missing_acl_rights_are_named() {
    let redis = RedisServer::process(&[]).await;
    let url = format!("redis://relay:secret@127.0.0.1:{}", redis.port());
    let of = async |rights: &[&str]| {
        let all = [&["ACL", "SETUSER", "relay", "reset", "on", ">secret"], rights].concat();
        let _: String = redis.ask(&all).await;
        with(&url, &[]).await
    };
    let report = of(&["~*", "&*", "+@all", "-mget", "-xadd", "-zadd"]).await;
    let finding = bad(&report, Check::RedisCommands, "MGET, ZADD, XADD");
    assert!(finding.advice.contains("+mget +zadd +xadd"), "{finding:?}");
    bad(&of(&["~*", "+@all", "-evalsha"]).await, Check::RedisScripts, "may not run scripts");
    bad(&of(&["~*", "+@all", "-@scripting"]).await, Check::RedisScripts, "may not run scripts");
    bad(&of(&["~cache:*", "+@all"]).await, Check::RedisKeys, "the relay's keys");
    bad(&of(&["~relay:1:{*", "+@all"]).await, Check::RedisKeys, "its own keys");
    found(&of(&["~*", "+@all", "-info"]).await, Check::RedisInfo, Severity::Unknown, "INFO is not allowed");
    let nothing = of(&["~*", "-@all"]).await;
    bad(&nothing, Check::RedisCommands, "may not run");
    found(&nothing, Check::RedisLatency, Severity::Unknown, "PING");
    let wrong = with(&url.replace("secret", "another"), &[]).await;
    bad(&wrong, Check::RedisAuth, "refuses user and password");
    let mut asks = RedisServer::process(&[]).await;
    let none = asks.url();
    asks.change_password("p").await;
    bad(&with(&none, &[]).await, Check::RedisAuth, "refuses user and password");
}

#[tokio::test]
async fn memory_limits_and_eviction_policies_are_judged() {
    let redis = RedisServer::process(&[]).await;
    let of = async |memory: &str, policy: &str| {
        let _: String = redis.ask(&["CONFIG", "SET", "maxmemory", memory, "maxmemory-policy", policy]).await;
        with(&redis.url(), &[]).await
    };
    let report = of("0", "noeviction").await;
    warned(&report, Check::RedisMemory, "no limit");
    found(&report, Check::RedisEviction, Severity::Ok, "");
    warned(&of("0", "allkeys-lru").await, Check::RedisEviction, "allkeys-lru");
    bad(&of("64mb", "allkeys-lfu").await, Check::RedisEviction, "allkeys-lfu: quotas and purges");
    bad(&of("64mb", "allkeys-random").await, Check::RedisEviction, "allkeys-random");
    let report = of("64mb", "noeviction").await;
    warned(&report, Check::RedisEviction, "every write is rejected");
    found(&report, Check::RedisMemory, Severity::Ok, "of 64.0 MiB");
    found(&of("64mb", "volatile-ttl").await, Check::RedisEviction, Severity::Ok, "");
    warned(&of("8mb", "volatile-lfu").await, Check::RedisMemory, "of 8.0 MiB");
    bad(&of("1mb", "noeviction").await, Check::RedisMemory, "OOM");
}

#[tokio::test]
async fn a_daily_quota_without_persistence_is_reported() {
    let redis = RedisServer::process(&["--enable-protected-configs", "yes"]).await;
    let of = async |quota: &str, on: &str| with(&redis.url(), &[(on, quota)]).await;
    for on in ["RELAY_LIMITER_TENANT", "RELAY_LIMITER_FLEET"] {
        let finding = of("10/s,5000/d", on).await;
        let finding = bad(&finding, Check::RedisPersistence, "loses the count of calls");
        assert_eq!(finding.setting, "limiter.tenant");
        found(&of("10/s,500/h", on).await, Check::RedisPersistence, Severity::Ok, "not needed");
    }
    let _: String = redis.ask(&["CONFIG", "SET", "save", "900 1"]).await;
    let with_quota = async || of("5000/d", "RELAY_LIMITER_TENANT").await;
    found(&with_quota().await, Check::RedisPersistence, Severity::Ok, "snapshots");
    // The directory it would write to goes.
    let directory = tempfile::tempdir().unwrap();
    let _: String = redis.ask(&["CONFIG", "SET", "dir", directory.path().to_str().unwrap()]).await;
    drop(directory);
    let _: String = redis.ask(&["BGSAVE"]).await;
    eventually("the snapshot fails", async || {
        let info: String = redis.ask(&["INFO", "persistence"]).await;
        info.contains("rdb_last_bgsave_status:err")
    })
    .await;
    bad(&of("10/s", "RELAY_LIMITER_TENANT").await, Check::RedisPersistence, "MISCONF");
    // Also where a single tenant alone has such a quota, or the fleet.
    let redis = RedisServer::process(&[]).await;
    let single = format!("{}=30000/w", "0".repeat(32));
    for (setting, quota) in [("RELAY_LIMITER_TENANTS", &*single), ("RELAY_LIMITER_FLEET", "100000/30d")] {
        bad(&with(&redis.url(), &[(setting, quota)]).await, Check::RedisPersistence, "loses the count");
    }
    let redis = RedisServer::process(&["--appendonly", "yes"]).await;
    let report = with(&redis.url(), &[("RELAY_LIMITER_TENANT", "5000/d")]).await;
    found(&report, Check::RedisPersistence, Severity::Ok, "append-only");
    let _: String = redis.ask(&["CONFIG", "SET", "appendonly", "no"]).await;
    let _: String = redis.ask(&["ACL", "SETUSER", "default", "-config"]).await;
    let report = with(&redis.url(), &[("RELAY_LIMITER_TENANT", "5000/d")]).await;
    found(&report, Check::RedisPersistence, Severity::Unknown, "CONFIG is not allowed");
}

#[tokio::test]
async fn a_replica_is_reported() {
    let master = RedisServer::process(&[]).await;
    let replica = RedisServer::process(&[]).await;
    let _: String = replica.ask(&["REPLICAOF", "127.0.0.1", &master.port().to_string()]).await;
    eventually("it follows", async || {
        let info: String = replica.ask(&["INFO", "replication"]).await;
        info.contains("master_link_status:up")
    })
    .await;
    let report = with(&replica.url(), &[]).await;
    let roles = all(&report, Check::RedisRole);
    assert!(roles.iter().all(|finding| finding.severity == Severity::Bad), "{roles:?}");
    assert!(roles.iter().any(|finding| finding.state.contains("is a replica")), "{roles:?}");
    assert!(roles.iter().any(|finding| finding.state.contains("READONLY")), "{roles:?}");
}

#[tokio::test]
async fn a_redis_that_does_not_fit_redis_mode_is_reported() {
    let single = RedisServer::process(&[]).await;
    let sentinel = RedisServer::sentinel("mymaster", single.port()).await;
    let cluster = RedisServer::cluster().await;
    bad(&with(&cluster[0].url(), &[]).await, Check::RedisMode, "a node of a cluster");
    bad(&with(&sentinel.url(), &[]).await, Check::RedisMode, "a sentinel");
    let as_cluster = [("RELAY_REDIS_MODE", "cluster")];
    bad(&with(&single.url(), &as_cluster).await, Check::RedisMode, "");
    let as_sentinel = [("RELAY_REDIS_MODE", "sentinel")];
    bad(&with(&single.url(), &as_sentinel).await, Check::RedisMode, "");
    let other = [("RELAY_REDIS_MODE", "sentinel"), ("RELAY_REDIS_MASTER_NAME", "another")];
    bad(&with(&sentinel.url(), &other).await, Check::RedisMode, "no master of that name");

    let report = with(&sentinel.url(), &as_sentinel).await;
    found(&report, Check::RedisMode, Severity::Ok, "");
    found(&report, Check::RedisCommands, Severity::Ok, "");
    let urls = cluster.iter().map(RedisServer::url).collect::<Vec<_>>().join(",");
    let report = with(&urls, &as_cluster).await;
    found(&report, Check::RedisCommands, Severity::Ok, "");
    assert_eq!(all(&report, Check::RedisVersion).len(), 3);
}

#[tokio::test]
async fn an_unreachable_redis_is_reported_with_the_cause() {
    let mut redis = RedisServer::process(&[]).await;
    redis.freeze();
    let started = Instant::now();
    bad(&with(&redis.url(), &[]).await, Check::RedisConnection, "no answer");
    assert!(started.elapsed() < Duration::from_secs(12), "{:?}", started.elapsed());
    redis.thaw();
    redis.kill();
    bad(&with(&redis.url(), &[]).await, Check::RedisConnection, "nothing listens there");
    bad(&with("redis://redis.invalid:6379", &[]).await, Check::RedisConnection, "does not resolve");
}

#[tokio::test]
async fn a_redis_whose_certificate_is_not_believed_is_reported_and_so_is_one_without_tls() {
    let authority = Authority::of(&["localhost"]);
    let arguments = authority.arguments("no");
    let redis = RedisServer::process(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let port = redis.argument("--tls-port").unwrap();
    let url = format!("rediss://localhost:{port}");
    bad(&with(&url, &[]).await, Check::RedisTls, "authority is unknown");
    let ca = authority.path("ca.pem");
    found(&with(&url, &[("RELAY_REDIS_CA_FILE", &ca)]).await, Check::RedisTls, Severity::Ok, "");
    let elsewhere = format!("rediss://127.0.0.1:{port}");
    bad(&with(&elsewhere, &[("RELAY_REDIS_CA_FILE", &ca)]).await, Check::RedisTls, "for another name");
    let plain = redis.url().replace("redis://", "rediss://");
    bad(&with(&plain, &[]).await, Check::RedisTls, "does not speak TLS");
    // TLS wanted, and not spoken.
    let spoken_to_in_clear = url.replace("rediss://", "redis://");
    bad(&with(&spoken_to_in_clear, &[]).await, Check::RedisConnection, "closes the connection");

    // The platform's store, as its tools set it.
    let world = World::start().await;
    let settings = [("RELAY_REDIS_URL", url.as_str()), ("SSL_CERT_FILE", ca.as_str())];
    let report = world.doctor(&["--json"], &settings).await.json();
    let findings = report["findings"].as_array().unwrap();
    let tls = findings.iter().find(|finding| finding["id"] == Check::RedisTls.id()).unwrap();
    assert_eq!(tls["severity"], "ok", "{tls}");
}

#[tokio::test]
async fn a_redis_that_answers_late_is_reported() {
    let redis = RedisServer::process(&[]).await;
    let proxy = Proxy::to(&redis).await;
    let of = async |delay: u64| {
        proxy.slow(Duration::from_millis(delay), 0);
        with(&proxy.url(), &[("RELAY_REDIS_TIMEOUT", "150ms")]).await
    };
    warned(&of(90).await, Check::RedisLatency, "of 150ms");
    bad(&of(200).await, Check::RedisLatency, "the relay waits 150ms");
}

/// Says that it is of this version, and OK to everything else: no such server can be had here any more.
async fn of_version(version: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("redis://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                loop {
                    let mut line = String::new();
                    if stream.read_line(&mut line).await.unwrap_or(0) == 0 {
                        return;
                    }
                    let count: usize = line.trim().trim_start_matches('*').parse().unwrap();
                    let mut words = Vec::new();
                    for _ in 0..count {
                        line.clear();
                        stream.read_line(&mut line).await.unwrap();
                        let length: usize = line.trim().trim_start_matches('$').parse().unwrap();
                        let mut word = vec![0; length + 2];
                        stream.read_exact(&mut word).await.unwrap();
                        words.push(String::from_utf8_lossy(&word[..length]).into_owned());
                    }
                    let info = format!("redis_version:{version}\r\nredis_mode:standalone\r\nrole:master\r\n");
                    let answer = match words[0].as_str() {
                        "INFO" => format!("${}\r\n{info}\r\n", info.len()),
                        _ => "+OK\r\n".to_owned(),
                    };
                    if stream.get_mut().write_all(answer.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    url
}

#[tokio::test]
async fn an_old_version_is_reported() {
    bad(&with(&of_version("6.2.14").await, &[]).await, Check::RedisVersion, "version 6.2.14");
    found(&with(&of_version("8.0.1").await, &[]).await, Check::RedisVersion, Severity::Ok, "");
    let odd = with(&of_version("next").await, &[]).await;
    found(&odd, Check::RedisVersion, Severity::Unknown, "does not tell");
    let redis = RedisServer::process(&["--rename-command", "HRANDFIELD", ""]).await;
    bad(&with(&redis.url(), &[]).await, Check::RedisCommands, "lacks HRANDFIELD");
}

#[tokio::test]
async fn unencrypted_answers_are_reported() {
    const KEY: &str = "c0ffee00c0ffee11c0ffee22c0ffee33c0ffee44c0ffee55c0ffee66c0ffee77";
    let of = async |url: &str, key: &str| with(url, &[("RELAY_REDIS_ENCRYPTION_KEY", key)]).await;
    let (clear, sealed) = ("redis://redis.invalid", "rediss://redis.invalid");
    bad(&of(clear, "").await, Check::RedisEncryption, "unencrypted");
    warned(&of(sealed, "").await, Check::RedisEncryption, "stored in Redis unencrypted");
    found(&of(clear, KEY).await, Check::RedisEncryption, Severity::Ok, "sealed");
    found(&of("redis://127.0.0.1:1", "").await, Check::RedisEncryption, Severity::Ok, "on this machine");
    let guessed = "00".repeat(32);
    let changes = [("RELAY_REDIS_URL", clear), ("RELAY_REDIS_ENCRYPTION_KEY", guessed.as_str())];
    let expected = (Check::RedisEncryption, Severity::Bad, "one byte");
    World::start().await.reports(&changes, "redis.encryption_key", expected).await;
}
