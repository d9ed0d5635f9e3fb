//! Settings that change while the relay serves, by a file and by a signal.

use std::{path::Path, sync::Arc, time::Duration};

use cyberscan_relay::{
    sandbox::{Behaviour, Call, Options, Rule, Sandbox},
    settings::{KEYS, Reload},
};
use http::{Method, StatusCode};
use serde_json::Value;
use tempfile::NamedTempFile;
use tokio::{process::Command, time::Instant};

use crate::{
    fleet::{Load, PATIENT, RelayProcess, fresh_ip},
    harness::{Certificate, TestRelay, codes, list, sandbox_settings, seen},
    redis::{RedisServer, eventually},
};

const ADMIN: &str = "first-token-of-the-operator";

/// A relay that reads all its settings from a file.
struct Reloading {
    relay: TestRelay,
    file: NamedTempFile,
    base: Vec<(String, String)>,
    _ca: NamedTempFile,
}

/// `settings` as a file of settings; of those that are there twice the last.
fn write(file: &Path, base: &[(String, String)], changes: &[(&str, &str)]) {
    let of = |variable: &str| KEYS.iter().find(|key| key.variable() == variable).unwrap().name;
    let mut all: std::collections::BTreeMap<&str, &str> =
        base.iter().map(|(variable, value)| (of(variable), value.as_str())).collect();
    all.extend(changes.iter().copied());
    let text: String = all.iter().map(|(key, value)| format!("{key} = {value:?}\n")).collect();
    std::fs::write(file, text).unwrap();
}

impl Reloading {
    async fn start(settings: &[(&str, &str)]) -> Self {
        let sandbox = Arc::new(Sandbox::start(Options::default()).await.unwrap());
        let (ca, file) = (NamedTempFile::new().unwrap(), NamedTempFile::new().unwrap());
        std::fs::write(ca.path(), &sandbox.ca_pem).unwrap();
        let mut base = sandbox_settings(&sandbox, ca.path().to_str().unwrap());
        base.push(("RELAY_ADMIN_TOKEN".to_owned(), ADMIN.to_owned()));
        base.extend(settings.iter().map(|(variable, value)| ((*variable).to_owned(), (*value).to_owned())));
        write(file.path(), &base, &[]);
        let relay = TestRelay::beside(&sandbox, &[("RELAY_CONFIG", file.path().to_str().unwrap())]).await;
        Self { relay, file, base, _ca: ca }
    }

    /// Reloads with `changes` to the settings of the start; whether they were accepted.
    async fn reload(&self, changes: &[(&str, &str)]) -> bool {
        write(self.file.path(), &self.base, changes);
        let before = self.reloads().await;
        self.relay.asked.notify_one();
        eventually("reloaded or refused", async || self.reloads().await > before).await;
        self.reloaded().await.0 == 1.0
    }

    /// How often the settings were read again, with whatever outcome.
    async fn reloads(&self) -> f64 {
        let series = self.relay.series().await;
        let of = |outcome| series.get(&format!("relay_config_reloads_total{{outcome=\"{outcome}\"}}"));
        ["ok", "error"].into_iter().filter_map(of).sum()
    }

    /// Whether the last reload was a success, and when the last success was.
    async fn reloaded(&self) -> (f64, f64) {
        let series = self.relay.series().await;
        let of = |name: &str| series[&format!("relay_config_last_reload_{name}")];
        (of("successful"), of("success_timestamp_seconds"))
    }

    async fn sightings(&self, ip: &str) -> usize {
        seen(&self.relay.observe(&[("ip", ip)]).await).len()
    }

    async fn codes(&self, token: &str) -> Vec<String> {
        let answer = self.relay.post("/observe/observables", token, list(&[("ip", "198.18.0.1")])).await;
        codes(&answer.json()).iter().map(|code| (*code).to_owned()).collect()
    }

    async fn purge_by(&self, token: &str) -> StatusCode {
        self.relay.administer(Method::POST, "/purge", Some(token), "{\"all\": true}").await.status
    }

    fn asked(&self, ip: &str) -> usize {
        self.relay.sandbox.cyberscan.count_of(Call::Vulnerabilities, ip)
    }
}

#[tokio::test]
async fn who_is_let_in_changes_with_a_reload() {
    let world = Reloading::start(&[]).await;
    let token = world.relay.token();
    assert!(world.codes(&token).await.is_empty());

    // A token that was verified a moment ago is judged again.
    assert!(world.reload(&[("auth.audiences", "https://other.test")]).await);
    assert_eq!(world.codes(&token).await, ["authorization error"]);
    assert!(world.codes(&world.relay.sandbox.token("https://other.test")).await.is_empty());
    assert!(world.reload(&[("auth.jwks_hosts", "keys.example")]).await);
    assert_eq!(world.codes(&token).await, ["authorization error"]);
    assert!(world.reload(&[("cyberscan.hosts", "cyberscan.example")]).await);
    assert_eq!(world.codes(&token).await, ["connection error"], "its host is not allowed any more");
    assert!(world.reload(&[]).await);
    assert!(world.codes(&token).await.is_empty());
    assert_eq!(world.relay.sandbox.issuer.fetches(), 2, "whom nobody believed in between is asked anew");

    let endless = world.relay.token_with(&[("exp", Value::Null)]);
    assert!(world.reload(&[("auth.require_exp", "false")]).await);
    assert!(world.codes(&endless).await.is_empty());
    assert!(world.reload(&[("auth.require_exp", "true")]).await);
    assert_eq!(world.codes(&endless).await, ["authorization error"]);

    assert_eq!(world.purge_by("another-token-of-the-operator").await, StatusCode::UNAUTHORIZED);
    assert!(world.reload(&[("admin.token", "another-token-of-the-operator")]).await);
    assert_eq!(world.purge_by(ADMIN).await, StatusCode::UNAUTHORIZED);
    assert!(world.purge_by("another-token-of-the-operator").await.is_success());
}

#[tokio::test]
async fn what_is_answered_changes_with_a_reload() {
    let world = Reloading::start(&[]).await;
    let (ip, relay) = (fresh_ip(), &world.relay);
    let tlp = async || {
        let answer = relay.observe(&[("ip", &ip)]).await;
        answer["data"]["sightings"]["docs"][0]["tlp"].as_str().unwrap().to_owned()
    };
    assert_eq!(tlp().await, "amber");
    assert!(world.reload(&[("ctim.tlp", "red")]).await);
    assert_eq!(tlp().await, "red");
    assert_eq!(world.asked(&ip), 1, "the cache is kept");

    // What is kept is fresh for no longer than the new lifetime.
    assert!(world.reload(&[("cache.fresh", "0s"), ("cache.stale_while_revalidate", "0s")]).await);
    tlp().await;
    assert_eq!(world.asked(&ip), 2);

    let private = "10.1.2.3";
    world.sightings(private).await;
    assert_eq!(world.asked(private), 0);
    assert!(world.reload(&[("cyberscan.private_addresses", "true")]).await);
    world.sightings(private).await;
    assert_eq!(world.asked(private), 1);

    let long = list(&[("ip", "198.18.0.1"); 20]);
    assert!(codes(&relay.post("/observe/observables", &relay.token(), long.clone()).await.json()).is_empty());
    assert!(world.reload(&[("server.body_limit", "256")]).await);
    let refused = relay.post("/observe/observables", &relay.token(), long).await;
    assert_eq!(codes(&refused.json()), ["invalid argument"]);
}

#[tokio::test]
async fn how_cyberscan_is_asked_changes_with_a_reload() {
    let world = Reloading::start(&[]).await;
    let cyberscan = &world.relay.sandbox.cyberscan;
    let failing = fresh_ip();
    cyberscan.script(Rule::on(Call::Vulnerabilities).value(&failing).times(1).answer(503));
    assert!(world.reload(&[("cyberscan.retries", "1")]).await);
    assert_eq!(world.sightings(&failing).await, 1);

    let ip = fresh_ip();
    cyberscan.script(Rule::on(Call::Vulnerabilities).value(&ip).does(Behaviour::Hang));
    assert!(world.reload(&[("cyberscan.timeout", "200ms")]).await);
    let before = Instant::now();
    let answer = world.relay.observe(&[("ip", &ip)]).await;
    assert!(before.elapsed() < Duration::from_secs(5) && codes(&answer).len() == 1, "{answer}");
    assert!(world.reload(&[("request.deadline", "1s")]).await);
    let ip = fresh_ip();
    cyberscan.script(Rule::on(Call::Vulnerabilities).value(&ip).does(Behaviour::Hang));
    let before = Instant::now();
    world.relay.observe(&[("ip", &ip)]).await;
    assert!(before.elapsed() < Duration::from_secs(5));

    // Calls that were made count in the new quota, too, where there was one as long.
    assert!(world.reload(&[("limiter.tenant", "1000/h")]).await);
    assert_eq!(world.sightings(&fresh_ip()).await, 1);
    assert!(world.reload(&[("limiter.tenant", "1/h")]).await);
    let answer = world.relay.observe(&[("ip", &fresh_ip())]).await;
    assert_eq!(codes(&answer), ["too many requests"]);
    assert!(world.reload(&[("limiter.tenant", "1000/h")]).await);
    assert_eq!(world.sightings(&fresh_ip()).await, 1);
}

#[tokio::test]
async fn a_faulty_configuration_is_refused_whole() {
    let world = Reloading::start(&[]).await;
    let (refused_at, ip) = (world.reloaded().await.1, fresh_ip());
    let faulty = [("ctim.tlp", "red"), ("auth.audiences", "https://other.test"), ("cache.fresh", "soon")];
    assert!(!world.reload(&faulty).await);
    assert_eq!(world.reloaded().await, (0.0, refused_at), "the time is that of the last success");
    let answer = world.relay.observe(&[("ip", &ip)]).await;
    assert_eq!(answer["data"]["sightings"]["docs"][0]["tlp"], "amber");
    assert!(world.reload(&[("ctim.tlp", "red")]).await);
    std::fs::remove_file(world.file.path()).unwrap();
    world.relay.asked.notify_one();
    eventually("refused", async || world.reloaded().await.0 == 0.0).await;
    assert_eq!(world.sightings(&ip).await, 1);
}

#[tokio::test]
async fn another_certificate_is_used_after_a_reload_and_one_that_does_not_fit_refuses_all_of_it() {
    let (first, second) = (Certificate::new(), Certificate::new());
    let files = first.settings();
    let files = files.each_ref().map(|(variable, path)| (variable.as_str(), path.as_str()));
    let world = Reloading::start(&files).await;
    let address = world.relay.address;
    assert!(first.connect(address).await.is_ok() && second.connect(address).await.is_err());

    let [(_, certificate), (_, key)] = second.settings();
    let other = [("server.tls.certificate", certificate.as_str()), ("server.tls.key", key.as_str())];
    assert!(world.reload(&other).await);
    assert!(second.connect(address).await.is_ok() && first.connect(address).await.is_err());

    // A key that is not the certificate's: nothing else of that configuration is used, either.
    assert!(!world.reload(&[other[0], ("admin.token", "another-token-of-the-operator")]).await);
    assert_eq!(world.purge_by("another-token-of-the-operator").await, StatusCode::UNAUTHORIZED);
    assert!(second.connect(address).await.is_ok());
    // The same names with other content are found by a reload at once.
    assert!(world.reload(&other).await);
    let renewed = second.renewed();
    assert!(world.reload(&other).await);
    assert!(renewed.connect(address).await.is_ok());
}

#[tokio::test]
async fn a_hundred_reloads_under_load_cost_no_answer_and_no_cache() {
    let redis = RedisServer::start().await;
    let world = Reloading::start(&[("RELAY_REDIS_URL", &redis.url()), PATIENT]).await;
    let known: Vec<String> = (0..20).map(|_| fresh_ip()).collect();
    let asked: Vec<(&str, &str)> = known.iter().map(|ip| ("ip", ip.as_str())).collect();
    assert_eq!(seen(&world.relay.observe(&asked).await), known);
    let load = Load::at(&[world.relay.address], &world.relay.token());
    for round in 0..100 {
        let (even, keys) = (
            round % 2 == 0,
            ["01".repeat(16) + &"23".repeat(16), "45".repeat(16) + &"67".repeat(16)].join(","),
        );
        // Everything a part could stumble over; every tenth is refused.
        let mut changes = vec![
            ("limiter.tenant", if even { "100000/m" } else { "200000/m,1000000/h" }),
            ("limiter.fleet", if even { "" } else { "1000000/m" }),
            ("cache.fresh", if even { "2h" } else { "3h" }),
            ("auth.revalidate", if even { "16m" } else { "17m" }),
            ("redis.encryption_key", if even { "" } else { &keys }),
            ("redis.timeout", if even { "450ms" } else { "440ms" }),
            ("server.body_timeout", if even { "9s" } else { "8s" }),
            ("cyberscan.timeout", if even { "9s" } else { "8s" }),
            ("worker.budget", if even { "0.1" } else { "0.2" }),
        ];
        if round % 10 == 9 {
            changes.push(("ctim.tlp", "purple"));
        }
        assert_eq!(world.reload(&changes).await, round % 10 != 9);
        load.answered(1).await;
    }
    load.end_without_a_failure().await;
    assert_eq!(seen(&world.relay.observe(&asked).await), known);
    assert!(known.iter().all(|ip| world.asked(ip) == 1), "the cache is kept");
}

#[tokio::test]
async fn secrets_in_files_are_found_when_they_change_and_the_password_of_redis_follows() {
    let mut redis = RedisServer::process(&["--requirepass", "first"]).await;
    let port = redis.port();
    let (url, token) = (NamedTempFile::new().unwrap(), NamedTempFile::new().unwrap());
    let write_url = |password: &str| {
        std::fs::write(url.path(), format!("redis://:{password}@127.0.0.1:{port}")).unwrap();
    };
    write_url("first");
    std::fs::write(token.path(), ADMIN).unwrap();
    let path = |file: &NamedTempFile| file.path().to_str().unwrap().to_owned();
    let settings = [
        ("RELAY_REDIS_URL_FILE", path(&url)),
        ("RELAY_ADMIN_TOKEN_FILE", path(&token)),
        ("RELAY_REDIS_TIMEOUT", "450ms".to_owned()),
    ];
    let settings: Vec<(&str, &str)> = settings.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let relay = TestRelay::with(&settings).await;
    let purge = async |token: &str| {
        relay.administer(Method::POST, "/purge", Some(token), "{\"all\": true}").await.status
    };
    assert!(purge(ADMIN).await.is_success());

    // Another file under the same name, as secrets are renewed.
    let renewed = NamedTempFile::new().unwrap();
    std::fs::write(renewed.path(), "another-token-of-the-operator\n").unwrap();
    std::fs::rename(renewed.path(), token.path()).unwrap();
    eventually("the new token counts", async || purge("another-token-of-the-operator").await.is_success())
        .await;
    assert_eq!(purge(ADMIN).await, StatusCode::UNAUTHORIZED);

    redis.change_password("second").await;
    write_url("second");
    eventually("what is fetched is in Redis", async || {
        relay.observe(&[("ip", &fresh_ip())]).await;
        !redis.values().await.is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_hang_up_reloads_names_what_needs_a_restart_and_tells_no_secret() {
    let sandbox = Sandbox::start(Options::default()).await.unwrap();
    let file = NamedTempFile::new().unwrap();
    let base = [("RELAY_ADMIN_TOKEN".to_owned(), ADMIN.to_owned())];
    write(file.path(), &base, &[]);
    let relay = RelayProcess::start(&sandbox, &[("RELAY_CONFIG", file.path().to_str().unwrap())]).await;
    let hang_up = async || {
        let pid = relay.pid().to_string();
        assert!(Command::new("kill").args(["-HUP", &pid]).status().await.unwrap().success());
    };
    // Every setting that needs a restart, and what each may be.
    let restart = KEYS.iter().filter(|key| key.reload != Reload::Live).map(|key| key.name);
    let environment = ["egress.allow_cidrs", "egress.extra_ca_file", "telemetry.otlp_endpoint"];
    let others = [
        "listen",
        "admin.listen",
        "server.tls.certificate",
        "server.tls.key",
        "redis.ca_file",
        "redis.client_certificate",
        "redis.client_key",
    ];
    let tried: Vec<&str> =
        restart.filter(|key| !environment.contains(key) && !others.contains(key)).collect();
    let mut changes: Vec<(&str, &str)> = tried
        .iter()
        .map(|key| {
            let value = match *key {
                "server.max_connections" | "server.max_in_flight" | "limiter.concurrency" => "77",
                "worker.concurrency" | "worker.entries" => "77",
                "server.header_timeout" | "server.idle_timeout" | "server.shutdown_timeout" => "7s",
                "egress.proxy" => "http://user:hunter2@proxy.example:3128",
                "egress.connect_timeout" => "1234ms",
                "log.format" => "text",
                "telemetry.otlp_sampling" | "worker.budget" => "0.7",
                "redis.url" => "redis://:hunter2@127.0.0.1:1",
                "redis.mode" => "cluster",
                "redis.master_name" => "another",
                "redis.database" => "0",
                "redis.sentinel.tls" => "true",
                "redis.key_prefix" => "another:",
                "cache.memory" => "77MiB",
                "worker.enabled" => "false",
                "worker.idle" => "77m",
                other => panic!("{other} needs a restart; what may it be?"),
            };
            (*key, value)
        })
        .collect();
    changes.extend([("log.level", "debug"), ("admin.token", "hunter2hunter2hunter2")]);
    write(file.path(), &base, &changes);
    hang_up().await;
    eventually("reloaded", async || !relay.said("configuration reloaded").is_empty()).await;
    let told = relay.said("needs a restart: these settings are not in force yet");
    let told = told[0]["keys"].as_str().unwrap().to_owned();
    let mut named: Vec<&str> = told.split(", ").collect();
    let mut expected = tried.clone();
    named.sort_unstable();
    expected.sort_unstable();
    assert_eq!(named, expected);
    assert_eq!(relay.said("configuration reloaded")[0]["changed"], "log.level, admin.token");

    write(file.path(), &base, &[("log.level", "loud"), ("admin.token", "hunter2 hunter2")]);
    hang_up().await;
    let refused = "the configuration before stays in force, all of it";
    eventually("refused", async || !relay.said(refused).is_empty()).await;
    assert_eq!(relay.said(refused)[0]["faults"], 2);
    let log = relay.log();
    assert!(log.contains("log.level") && log.contains("admin.token") && log.contains("line "), "{log}");
    assert!(!log.contains("hunter2"), "{log}");
    assert_eq!(relay.metric("relay_config_last_reload_successful").await, 0.0);
    relay.terminate().await;
    assert!(relay.end_within(Duration::from_secs(20)).await.success());
}
