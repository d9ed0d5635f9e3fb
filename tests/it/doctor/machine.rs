//! This machine: files, limits, addresses, clocks.

use std::os::unix::fs::FileExt;

use cyberscan_relay::doctor::{Check, Options, Severity};
use tokio::{io::AsyncWriteExt, net::TcpListener, process::Command};

use super::{World, bad, found, impatient, said, set_mode, warned};
use crate::{
    faults::wall_clock,
    harness::TestRelay,
    redis::{RedisServer, eventually},
};

#[tokio::test]
async fn files_with_secrets_that_others_can_read_are_reported() {
    let world = World::start().await;
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str, mode| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        set_mode(&path, mode);
        path
    };
    let report = |config: &str, mode: u32, secret_mode: u32| {
        let config = file("relay.toml", config, mode);
        let secret = file("token", "a-long-enough-admin-token", secret_mode);
        let environment = world.environment(&[("RELAY_ADMIN_TOKEN_FILE", secret.to_str().unwrap())]);
        let settings = cyberscan_relay::settings::Settings::load(Some(&config), environment).unwrap();
        let options = Options { config_file: Some(config), secret_files: vec![secret], ..impatient() };
        async move { cyberscan_relay::doctor::examine(&settings, &options).await }
    };
    let secret =
        "[redis]\nencryption_key = \"c0ffee00c0ffee11c0ffee22c0ffee33c0ffee44c0ffee55c0ffee66c0ffee77\"";
    let well = report(secret, 0o640, 0o600).await;
    found(&well, Check::ConfigFile, Severity::Ok, "640");
    found(&well, Check::SecretFile, Severity::Ok, "600");
    let open = report(secret, 0o644, 0o604).await;
    warned(&open, Check::ConfigFile, "anybody may read it (mode 644)");
    warned(&open, Check::SecretFile, "anybody may read it (mode 604)");
    let writable = report(secret, 0o666, 0o606).await;
    bad(&writable, Check::ConfigFile, "anybody may write");
    bad(&writable, Check::SecretFile, "anybody may write");
    found(&report("", 0o644, 0o600).await, Check::ConfigFile, Severity::Ok, "no secret");
}

#[tokio::test]
async fn a_certificate_file_that_cannot_be_used_is_reported() {
    let world = World::start().await;
    let empty = tempfile::NamedTempFile::new().unwrap();
    for (file, words) in
        [("/nonexistent/ca.pem", "cannot be read"), (empty.path().to_str().unwrap(), "no certificate in it")]
    {
        let key = "egress.extra_ca_file";
        let expected = (Check::CaFile, Severity::Bad, words);
        world.reports(&[("RELAY_EGRESS_EXTRA_CA_FILE", file)], key, expected).await;
    }
    // One that was there when the settings were read.
    let settings = world.settings(&[]);
    std::fs::write(world.ca.path(), "").unwrap();
    let report = cyberscan_relay::doctor::examine(&settings, &impatient()).await;
    bad(&report, Check::CaFile, "no certificate in it");
    found(&report, Check::CyberScanTls, Severity::Unknown, "not tried");
    found(&report, Check::RedisUrl, Severity::Ok, "");
}

#[tokio::test]
async fn settings_that_do_not_go_together_are_reported() {
    let world = World::start().await;
    let (warn, bad) = (Severity::Warn, Severity::Bad);
    for (changes, key, expected) in [
        (&[("RELAY_REQUEST_DEADLINE", "40s")][..], "request.deadline", (Check::RequestDeadline, warn, "40s")),
        (&[("RELAY_CYBERSCAN_TIMEOUT", "20s")], "cyberscan.timeout", (Check::TimeOuts, warn, "20s")),
        (
            &[("RELAY_CACHE_FILL_TIMEOUT", "5s")],
            "cache.fill_timeout",
            (Check::TimeOuts, warn, "a fetch is given up"),
        ),
        (&[("RELAY_SERVER_IDLE_TIMEOUT", "30s")], "server.idle_timeout", (Check::IdleTimeout, warn, "30s")),
        (
            &[("RELAY_SERVER_SHUTDOWN_TIMEOUT", "5s")],
            "server.shutdown_timeout",
            (Check::ShutdownTimeout, warn, "5s"),
        ),
        (
            &[("RELAY_ADMIN_LISTEN", "0.0.0.0:0")],
            "admin.listen",
            (Check::AdminExposure, warn, "there is no token"),
        ),
        (&[("RELAY_ADMIN_TOKEN", "short")], "admin.token", (Check::AdminExposure, warn, "guessed")),
        (
            &[("RELAY_ADMIN_LISTEN", "0.0.0.0:0"), ("RELAY_ADMIN_TOKEN", "0123456789abcdef0123456789abcdef")],
            "admin.listen",
            (Check::AdminExposure, Severity::Ok, "changes need the token"),
        ),
        (&[("RELAY_CACHE_MEMORY", "100000GiB")], "cache.memory", (Check::Memory, bad, "MiB of memory")),
    ] {
        world.reports(changes, key, expected).await;
    }
}

#[tokio::test]
async fn addresses_that_are_taken_or_are_not_ours_are_reported() {
    let world = World::start().await;
    let other = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = other.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = other.accept().await {
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi").await;
        }
    });
    // Neither an answer, nor an end.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_address = silent.local_addr().unwrap().to_string();
    let report = world.examine(&[("RELAY_LISTEN", &address), ("RELAY_ADMIN_LISTEN", &silent_address)]).await;
    bad(&report, Check::Listen, "in use by something that is not a relay");
    bad(&report, Check::AdminListen, "in use by something that is not a relay");
    let report =
        world.examine(&[("RELAY_LISTEN", "192.0.2.1:9090"), ("RELAY_ADMIN_LISTEN", "192.0.2.1:9091")]).await;
    bad(&report, Check::Listen, "cannot listen there");
    bad(&report, Check::AdminListen, "cannot listen there");
}

#[tokio::test]
async fn a_relay_that_runs_is_recognised_and_asked_how_it_is() {
    let world = World::start().await;
    let mut redis = RedisServer::process(&[]).await;
    let url = redis.url();
    let relay = TestRelay::beside(&world.sandbox, &[("RELAY_REDIS_URL", &url)]).await;
    let (listen, admin) = (relay.address.to_string(), relay.admin.to_string());
    let settings = [
        ("RELAY_REDIS_URL", url.as_str()),
        ("RELAY_LISTEN", listen.as_str()),
        ("RELAY_ADMIN_LISTEN", admin.as_str()),
    ];
    eventually("ready", async || {
        let report = world.examine(&settings).await;
        report
            .findings
            .iter()
            .any(|finding| finding.check == Check::Ready && finding.severity == Severity::Ok)
    })
    .await;
    let report = world.examine(&settings).await;
    found(&report, Check::Listen, Severity::Ok, "a relay serves, version");
    found(&report, Check::AdminListen, Severity::Ok, "a relay's admin listener");
    redis.kill();
    eventually("degraded", async || {
        let report = world.examine(&settings).await;
        report
            .findings
            .iter()
            .any(|finding| finding.check == Check::Ready && finding.severity == Severity::Warn)
    })
    .await;
    warned(&world.examine(&settings).await, Check::Ready, "degraded");
}

#[tokio::test]
async fn too_few_open_files_are_reported() {
    let world = World::start().await;
    let mut shell = Command::new("/bin/sh");
    shell.env_clear().envs(world.environment(&[]));
    shell.args(["-c", "ulimit -n 256 && exec \"$0\" doctor --json", env!("CARGO_BIN_EXE_cyberscan-relay")]);
    let report = said(shell).await.json();
    let findings = report["findings"].as_array().unwrap();
    let finding = findings.iter().find(|finding| finding["id"] == Check::OpenFiles.id()).unwrap();
    assert_eq!(finding["severity"], "warn", "{finding}");
    assert!(finding["state"].as_str().unwrap().contains("256 files allow 192 connections"), "{finding}");
}

#[tokio::test]
async fn a_wrong_clock_is_reported_by_how_much() {
    let world = World::start().await;
    let redis = RedisServer::process(&[]).await;
    let directory = tempfile::tempdir().unwrap();
    let (library, jump_file, jump) = wall_clock(directory.path()).await;
    for (by, severity, words) in [
        (0_i64, "ok", "agrees"),
        (100, "warn", "100 s ahead of"),
        (3_600, "bad", "3600 s ahead of"),
        (-3_600, "bad", "3600 s behind"),
    ] {
        jump.write_all_at(&by.to_ne_bytes(), 0).unwrap();
        let moved = [
            ("LD_PRELOAD", library.as_str()),
            ("WALL_CLOCK_JUMP", jump_file.as_str()),
            ("RELAY_REDIS_URL", &redis.url()),
        ];
        let report = world.doctor(&["--json"], &moved).await.json();
        let findings = report["findings"].as_array().unwrap();
        let of = |check: Check| findings.iter().find(|finding| finding["id"] == check.id()).unwrap();
        let clock = of(Check::Clock);
        assert_eq!(clock["severity"], severity, "{clock}");
        // Dates are cut to seconds.
        let seconds = |text: &str| text.split(' ').next().and_then(|number| number.parse::<i64>().ok());
        let state = clock["state"].as_str().unwrap();
        match seconds(words) {
            Some(wanted) => {
                assert!((seconds(state).unwrap() - wanted).abs() <= 2, "{state}");
                assert!(state.contains(words.split_once(" s ").unwrap().1), "{state}");
            }
            None => assert!(state.contains(words), "{state}"),
        }
        let expected = if by == 0 { "ok" } else { "warn" };
        assert_eq!(of(Check::RedisClock)["severity"], expected, "{}", of(Check::RedisClock));
    }
}
