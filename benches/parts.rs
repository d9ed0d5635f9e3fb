//! The parts of an answer from memory, one by one: where the time of the load bench goes.

#![expect(clippy::unwrap_used, reason = "a bench: it ends at the first thing that is not as it should be")]

use std::{
    hint::black_box,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use cyberscan_relay::{
    auth::{self, Authenticator, Credentials},
    cache::{
        self, Cached,
        policy::{Lifetime, Policy},
    },
    clock::Clock,
    ctim::{DomainName, Observable, Subject, sighting::Tlp},
    cyberscan::{
        Admission as _, Answer, Call, CyberScan, DomainRecord, Error, HostRecord, Preload, Priority, Record,
        Vulnerabilities, Wanted, latency::Latencies,
    },
    egress::{self, Http},
    enrich::{self, Enricher},
    limiter::{self, Limiter},
    metrics::Metrics,
    redis_pool::{self, Redis},
    sandbox::{Options, Sandbox},
    tenant::{ApiKey, Tenant},
};
use http::{HeaderMap, header};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

const AUDIENCE: &str = "https://relay.bench";
const HOUR: Duration = Duration::from_secs(3600);
const POLICY: Policy = Policy {
    fresh: HOUR,
    stale_while_revalidate: HOUR,
    stale_if_error: Duration::from_secs(24 * 3600),
    negative: Duration::from_secs(300),
    refresh_ahead: 0.2,
};

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(30).measurement_time(Duration::from_secs(2)).warm_up_time(Duration::from_secs(1));
    targets = freshness, tokens, look_ups, permits, sightings
}
criterion_main!(benches);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

fn freshness(c: &mut Criterion) {
    let lifetime = Lifetime { negative: false, fresh: HOUR };
    c.bench_function("policy: freshness", |b| {
        b.iter(|| POLICY.freshness(black_box(lifetime), black_box(HOUR / 2)));
    });
}

fn tokens(c: &mut Criterion) {
    let runtime = runtime();
    let sandbox = runtime.block_on(Sandbox::start(Options::default())).unwrap();
    let ca = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(ca.path(), &sandbox.ca_pem).unwrap();
    let http = Http::new(&egress::Config {
        allow_cidrs: vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
        extra_ca_file: Some(ca.path().to_owned()),
        proxy: None,
        connect_timeout: Duration::from_secs(2),
    });
    let config = auth::Config {
        audiences: vec![AUDIENCE.into()],
        jwks_hosts: vec![sandbox.issuer.host().parse().unwrap()],
        spellings: Vec::new(),
        require_exp: false,
        trusted_proxies: Vec::new(),
    };
    let hosts = std::iter::once(sandbox.cyberscan.host().parse().unwrap()).collect();
    let auth =
        Authenticator::new(config, hosts, http.unwrap(), Clock::system(), Metrics::new(), TaskTracker::new());

    let headers = |number: u64| {
        let mut claims = sandbox.claims(AUDIENCE);
        claims.as_object_mut().unwrap().insert("number".to_owned(), number.into());
        let mut headers = HeaderMap::new();
        let token = format!("Bearer {}", sandbox.issuer.mint(&claims));
        headers.insert(header::AUTHORIZATION, token.parse().unwrap());
        headers
    };
    let authorize = async |headers: &HeaderMap| {
        auth.authorize(Credentials { headers, peer: None, tls: false }).await.unwrap();
    };
    let seen = headers(0);
    runtime.block_on(authorize(&seen));
    c.bench_function("token: remembered", |b| b.to_async(&runtime).iter(|| authorize(&seen)));

    // A token is remembered once it is verified, so each is verified once only. Signing them takes far
    // longer than that and does not count.
    let mut number = 0;
    let mut group = c.benchmark_group("token");
    group.sample_size(10).measurement_time(Duration::from_millis(200));
    group.bench_function("in full", |b| {
        b.iter_batched_ref(
            || {
                number += 1;
                headers(number)
            },
            |headers| runtime.block_on(authorize(headers)),
            BatchSize::SmallInput,
        );
    });
}

/// A CyberScan that has its answer at hand.
struct AtHand(Arc<Vulnerabilities>);

impl CyberScan for AtHand {
    async fn authenticate(&self, _: &Call) -> Result<tokio::time::Instant, Error> {
        Ok(tokio::time::Instant::now())
    }

    async fn domain(&self, _: &Call, _: &DomainName) -> Result<Answer<DomainRecord>, Error> {
        Ok(Answer { record: Record::Unknown, asked_at: Timestamp::UNIX_EPOCH, stale: None })
    }

    async fn host(&self, _: &Call, _: IpAddr) -> Result<Answer<HostRecord>, Error> {
        Ok(Answer { record: Record::Unknown, asked_at: Timestamp::UNIX_EPOCH, stale: None })
    }

    async fn vulnerabilities(&self, _: &Call, _: IpAddr) -> Result<Answer<Vulnerabilities>, Error> {
        let record = Record::Known(Arc::clone(&self.0));
        Ok(Answer { record, asked_at: Timestamp::UNIX_EPOCH, stale: None })
    }
}

impl Preload for AtHand {
    async fn preload(&self, _: &Call, _: &[Subject], _: Wanted) {}
}

/// Seven vulnerabilities at each address.
fn at_hand() -> AtHand {
    let finding = |n: u32| {
        json!({
            "name": format!("OpenSSH user enumeration, variant {n}"), "family": "General", "severity": "Medium",
            "description": "The remote host tells users that exist from users that do not, by the time it takes to refuse them.",
            "port": 22, "protocol": "tcp", "cve": format!("CVE-2018-1547{n}"), "cvss": 5.3, "confidence": 80
        })
    };
    let body = json!({"vulnerabilities": (0..7).map(finding).collect::<Vec<Value>>()}).to_string();
    AtHand(Arc::new(Vulnerabilities::parse(body.as_bytes()).unwrap()))
}

fn tenant() -> Arc<Tenant> {
    Arc::new(Tenant::new("api.example.com".parse().unwrap(), ApiKey::new("key".into())))
}

fn cached() -> Cached<AtHand> {
    let config = cache::Config {
        memory: 64 << 20,
        domain: POLICY,
        host: POLICY,
        vulnerabilities: POLICY,
        soft_timeout: Duration::from_millis(300),
        fill_timeout: Duration::from_secs(15),
        revalidate: HOUR,
        encryption_keys: Vec::new(),
    };
    let (metrics, tasks) = (Metrics::new(), TaskTracker::new());
    Cached::new(at_hand(), config, None, metrics, tasks, CancellationToken::new())
}

fn look_ups(c: &mut Criterion) {
    let runtime = runtime();
    let deadline = tokio::time::Instant::now() + HOUR;
    let (stage, call) = (cached(), Call::new(tenant(), deadline, Priority::Interactive));
    let ip: IpAddr = "192.0.2.7".parse().unwrap();
    let look_up = async || stage.vulnerabilities(&call, black_box(ip)).await.unwrap();
    runtime.block_on(look_up());
    c.bench_function("cache: hit in memory", |b| b.to_async(&runtime).iter(look_up));
    // What the worker adds to it: a count, and once between two collections a note.
    let noting = cached();
    let notes = noting.notes();
    let noted = async || noting.vulnerabilities(&call, black_box(ip)).await.unwrap();
    runtime.block_on(noted());
    c.bench_function("cache: hit in memory, counted for the worker", |b| b.to_async(&runtime).iter(noted));
    c.bench_function("cache: hit in memory, noted for the worker and collected", |b| {
        b.to_async(&runtime).iter(async || {
            let answer = noted().await;
            black_box(notes.collect().iter().map(|note| note.reads.take()).sum::<u32>());
            answer
        });
    });
    c.bench_function("cache: key accepted", |b| {
        b.to_async(&runtime).iter(async || stage.authenticate(&call).await.unwrap());
    });

    let mut number = 0_u32;
    c.bench_function("cache: miss, the next stage answers at once", |b| {
        b.iter_custom(|times| {
            let started = now();
            for _ in 0..times {
                number += 1;
                let ip = IpAddr::from(number.to_be_bytes());
                runtime.block_on(stage.vulnerabilities(&call, ip)).unwrap();
            }
            started.elapsed()
        });
    });
}

/// What leave for one call costs: of governor's buckets and the ledger alone, of Redis as well, and while Redis is away.
fn permits(c: &mut Criterion) {
    let runtime = runtime();
    let directory = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut server = std::process::Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--loglevel", "warning"])
        .current_dir(directory.path())
        .spawn()
        .expect("this bench needs redis-server: apt-get install redis-server");
    let call = Call::new(tenant(), tokio::time::Instant::now() + HOUR, Priority::Interactive);
    let limiter = |redis: Option<Redis>| {
        let windows = |text: &str| text.split(',').map(|window| window.parse().unwrap()).collect();
        let config = limiter::Config {
            tenant: windows("1000000000/s,1000000000/d"),
            tenants: std::collections::BTreeMap::new(),
            fleet: Vec::new(),
            burst: 0.5,
            dry_run: false,
            fallback_share: 0.9,
            reserve: 0.5,
            queue: 256,
            concurrency: 16,
        };
        Limiter::new(config, redis, Latencies::default(), Metrics::new(), TaskTracker::new())
    };
    let redis = || {
        let url = format!("redis://127.0.0.1:{port}").parse().unwrap();
        let config = redis_pool::Config::single(url, Duration::from_secs(1));
        Some(Redis::new(&config, Metrics::new(), TaskTracker::new()).unwrap())
    };
    let alone = limiter(None);
    c.bench_function("limiter: a permit, no redis", |b| {
        b.to_async(&runtime).iter(async || drop(alone.admit(&call).await.unwrap()));
    });
    let shared = limiter(redis());
    let started = now();
    while runtime.block_on(shared.admit(&call)).is_err() {
        assert!(started.elapsed() < Duration::from_secs(10), "redis-server does not answer");
    }
    c.bench_function("limiter: a permit, with redis", |b| {
        b.to_async(&runtime).iter(async || drop(shared.admit(&call).await.unwrap()));
    });
    server.kill().unwrap();
    server.wait().unwrap();
    // Until the breaker is open, and the first second without calls is over.
    let started = now();
    while started.elapsed() < Duration::from_secs(2) {
        let _ = runtime.block_on(shared.admit(&call));
    }
    c.bench_function("limiter: a permit, redis away", |b| {
        b.to_async(&runtime).iter(async || drop(shared.admit(&call).await.unwrap()));
    });
}

#[expect(clippy::disallowed_methods, reason = "real time is what a bench measures")]
fn now() -> Instant {
    Instant::now()
}

fn sightings(c: &mut Criterion) {
    let runtime = runtime();
    let observables = [Observable::new("ip", "192.0.2.7").unwrap()];
    for (name, rendered_memory) in
        [("enrich: 7 sightings rendered", 0), ("enrich: 7 sightings at hand", 1 << 20)]
    {
        let config = enrich::Config {
            deadline: HOUR,
            concurrency: 16.try_into().unwrap(),
            ip_details_page: false,
            private_addresses: false,
            tlp: Tlp::Amber,
            rendered_memory,
        };
        let (enricher, tenant) = (Enricher::new(at_hand(), config), tenant());
        let ask = async || {
            let findings = enricher.observe(Arc::clone(&tenant), &observables, 100, enricher.due()).await;
            assert_eq!(findings.docs.len(), 7);
        };
        c.bench_function(name, |b| b.to_async(&runtime).iter(ask));
    }
}
