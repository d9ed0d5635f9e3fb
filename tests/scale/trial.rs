//! The trial itself: replicas that are idle, that ask CyberScan, that share, that renew; then more of them.

use std::{
    fmt::Write,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;

use cyberscan_relay::{
    probe,
    sandbox::{Call, Options, Sandbox},
};
use futures_util::{StreamExt, stream};
use http::{Request, StatusCode, header};
use http_body_util::Full;
use serde_json::json;
use tokio::time::{Instant, sleep};

use crate::{
    cost::{Cost, Moment},
    fleet::{PATIENT, RelayProcess, ask, sharing_within},
    harness::{AUDIENCE, TestRelay, seen},
    redis::RedisServer,
};

/// Who asks at once.
const CLIENTS: usize = 16;
const ADMIN: (&str, &str) = ("RELAY_ADMIN_TOKEN", "a-token-of-the-operator");
/// Of a second's microseconds, what Redis's one thread may be used for before it is time to do something.
const ROOM: f64 = 700_000.0;

/// How much is measured.
struct Size {
    processes: usize,
    idle: Duration,
    questions: usize,
    renewed: usize,
    fleets: &'static [usize],
    tenants: usize,
}

impl Size {
    fn chosen() -> Self {
        if std::env::var_os("RELAY_SCALE").is_none() {
            let idle = Duration::from_secs(6);
            return Self { processes: 3, idle, questions: 500, renewed: 300, fleets: &[], tenants: 30 };
        }
        let tenants = std::env::var("RELAY_SCALE_TENANTS").ok().and_then(|text| text.parse().ok());
        Self {
            processes: 10,
            idle: Duration::from_secs(20),
            questions: 3_000,
            renewed: 500,
            fleets: &[25, 50, 100],
            tenants: tenants.unwrap_or(100_000),
        }
    }
}

/// The first address that is asked about by whom; of those below CyberScan knows something.
const RENEWED: usize = 10_000;
const PURGED: usize = 15_000;
const OF_FLEETS: usize = 20_000;

/// One of 131,072 addresses.
fn ip(number: usize) -> String {
    let number = u32::try_from(number).unwrap();
    assert!(number < 1 << 17);
    Ipv4Addr::from_bits(0xc612_0000 + number).to_string()
}

fn tenant(sandbox: &Sandbox, number: usize) -> String {
    let key = format!("key-of-tenant-{number}");
    sandbox.cyberscan.accept_key(&key);
    let mut claims = sandbox.claims(AUDIENCE);
    claims["api_key"] = json!(key);
    sandbox.issuer.mint(&claims)
}

/// What Redis does in a second while nobody asks anything.
async fn resting(server: &RedisServer, length: Duration) -> Cost {
    let before = Moment::of(server).await;
    sleep(length).await;
    let (cost, took) = before.until_now(server).await;
    cost / took.as_secs_f64()
}

/// The same, of a Redis that nobody is connected to.
async fn alone(length: Duration) -> Cost {
    resting(&RedisServer::process(&[]).await, length).await
}

/// Asks about each of `numbers`, each time another replica; `shift` says which begins. What that costs for each look-up,
/// beyond what Redis does while it is `resting`.
async fn questions(
    server: &RedisServer,
    relays: &[SocketAddr],
    token: &str,
    (numbers, shift): (std::ops::Range<usize>, usize),
    resting: Cost,
) -> Cost {
    let before = Moment::of(server).await;
    let count = numbers.len();
    stream::iter(numbers)
        .for_each_concurrent(CLIENTS, |number| async move {
            let ip = ip(number);
            let relay = relays[(number + shift) % relays.len()];
            let answer = ask(relay, token, &[("ip", &ip)]).await.unwrap();
            assert_eq!(seen(&answer), [ip.as_str()], "{answer}");
        })
        .await;
    // What is written behind the answers, and told to the index.
    sleep(Duration::from_secs(1)).await;
    let (cost, took) = before.until_now(server).await;
    (cost - resting * took.as_secs_f64()) / count as f64
}

/// What it costs to renew an answer ahead.
async fn renewals(sandbox: &Sandbox, size: &Size) -> Cost {
    const LIFE: Duration = Duration::from_secs(30);
    let server = RedisServer::process(&[]).await;
    let (url, token) = (server.url(), sandbox.token(AUDIENCE));
    let settings = [
        ("RELAY_REDIS_URL", url.as_str()),
        ("RELAY_CACHE_FRESH", "30s"),
        ("RELAY_WORKER_BUDGET", "1"),
        PATIENT,
    ];
    let relays = RelayProcess::fleet(3, sandbox, &settings).await;
    let addresses: Vec<_> = relays.iter().map(|relay| relay.address).collect();
    let resting = resting(&server, size.idle).await;
    let begun = Instant::now();
    for round in 0..4 {
        questions(&server, &addresses, &token, (RENEWED..RENEWED + size.renewed, round), resting).await;
    }
    let asked = begun.elapsed();
    assert!(asked < LIFE / 2, "{asked:?} to ask four times");
    let renewed = async || {
        let mut sum = 0.0;
        for relay in &relays {
            sum += relay.metric("relay_prefetch_total{outcome=\"refreshed\"}").await;
        }
        sum
    };
    let before = Moment::of(&server).await;
    // All of them are due before the last one ends.
    sleep((LIFE + asked).saturating_sub(begun.elapsed())).await;
    let (cost, took) = before.until_now(&server).await;
    let count = renewed().await;
    assert!(count >= 0.2 * size.renewed as f64, "{count} of {} were renewed", size.renewed);
    (cost - resting * took.as_secs_f64()) / count
}

/// What it costs to purge an observable on all replicas.
async fn purges(server: &RedisServer, admin: SocketAddr, resting: Cost) -> Cost {
    const PURGES: u32 = 50;
    let before = Moment::of(server).await;
    for number in 0..PURGES {
        let body = json!({"observable": ip(PURGED + number as usize)}).to_string();
        let request = Request::post("/purge")
            .header(header::HOST, "localhost")
            .header(header::AUTHORIZATION, format!("Bearer {}", ADMIN.1))
            .body(Full::<Bytes>::from(body))
            .unwrap();
        assert_eq!(probe::call(admin, request).await.unwrap().status(), StatusCode::OK);
    }
    let (cost, took) = before.until_now(server).await;
    (cost - resting * took.as_secs_f64()) / f64::from(PURGES)
}

/// The middle one of a hundred answers that another replica had, asked for one after the other.
async fn shared_answers(relays: &[SocketAddr], token: &str, from: usize) -> Duration {
    let mut times = Vec::new();
    for number in from..from + 100 {
        ask(relays[0], token, &[("ip", &ip(number))]).await.unwrap();
    }
    sleep(Duration::from_millis(500)).await;
    for number in from..from + 100 {
        let at = Instant::now();
        ask(relays[1], token, &[("ip", &ip(number))]).await.unwrap();
        times.push(at.elapsed());
    }
    times.sort_unstable();
    times[times.len() / 2]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_fleet_costs_its_redis() {
    let size = Size::chosen();
    let sandbox = Arc::new(Sandbox::start(Options::default()).await.unwrap());
    let server = RedisServer::process(&["--maxmemory", "4gb", "--maxmemory-policy", "volatile-lfu"]).await;
    let (url, token) = (server.url(), sandbox.token(AUDIENCE));
    let settings =
        [("RELAY_REDIS_URL", url.as_str()), ("RELAY_LIMITER_TENANT", "10000/s,10000000/d"), ADMIN, PATIENT];
    let relays = RelayProcess::fleet(size.processes, &sandbox, &settings).await;
    let mut addresses: Vec<_> = relays.iter().map(|relay| relay.address).collect();
    let mut table = String::new();
    let mut tell = |what: &str, cost: &Cost| {
        let row = cost.row(what);
        eprintln!("{row}");
        writeln!(table, "{row}").unwrap();
    };

    let alone = alone(size.idle).await;
    let rest = resting(&server, size.idle).await;
    let idle = (rest - alone) / relays.len() as f64;
    tell("a replica, idle, per second", &idle);
    let numbers = 0..size.questions;
    let calls = || sandbox.cyberscan.count(Call::Vulnerabilities);
    let before = calls();
    let miss = questions(&server, &addresses, &token, (numbers.clone(), 0), rest).await;
    assert_eq!(calls() - before, size.questions, "each is asked once");
    tell("an answer nobody has", &miss);
    let shared = questions(&server, &addresses, &token, (numbers.clone(), 1), rest).await;
    tell("an answer another replica has", &shared);
    let held = questions(&server, &addresses, &token, (numbers, 1), rest).await;
    tell("an answer in memory", &held);
    assert_eq!(calls() - before, size.questions, "each is asked once");
    let purge = purges(&server, relays[0].admin, rest).await;
    tell(&format!("a purge, heard by {} replicas", relays.len()), &purge);
    let renewal = renewals(&sandbox, &size).await;
    tell("an answer renewed ahead", &renewal);

    assert!(miss.events < 0.2, "{} events for a miss", miss.events);
    // Twice what a quiet machine takes.
    assert!(miss.within < 160.0, "{} µs for a miss", miss.within);
    assert!(renewal.within < 200.0, "{} µs for a renewal", renewal.within);
    if size.fleets.is_empty() {
        return;
    }

    // More of them: the same code, in this process.
    let mut more: Vec<TestRelay> = Vec::new();
    let mut fleets = String::new();
    let mut known = 0;
    for fleet in size.fleets {
        while addresses.len() < *fleet {
            let relay = TestRelay::beside(&sandbox, &settings).await;
            addresses.push(relay.address);
            more.push(relay);
        }
        sharing_within(Duration::from_secs(60), &sandbox, &addresses[..2]).await;
        let tenants = size.tenants * fleet / size.fleets.last().unwrap();
        stream::iter(known..tenants)
            .for_each_concurrent(CLIENTS, |number| {
                let (token, relay) = (tenant(&sandbox, number), addresses[number % addresses.len()]);
                async move {
                    for number in [1, 1] {
                        ask(relay, &token, &[("ip", &ip(number))]).await.unwrap();
                    }
                }
            })
            .await;
        known = tenants;
        sleep(Duration::from_secs(5)).await;
        let rest = resting(&server, size.idle).await;
        let idle = (rest - alone) / addresses.len() as f64;
        let from = OF_FLEETS + fleet * 1_000;
        let miss = questions(&server, &addresses, &token, (from..from + size.questions, 0), rest).await;
        let purge = purges(&server, relays[0].admin, rest).await;
        let answer = shared_answers(&addresses, &token, from + 5_000).await;
        let memory: f64 = {
            let info: deadpool_redis::redis::InfoDict = server.ask(&["INFO", "memory"]).await;
            info.get::<f64>("used_memory").unwrap() / f64::from(1 << 20)
        };
        let row = format!(
            "| {fleet} | {tenants} | {:.0} | {:.1} | {:.0} | {:.3} | {:.0} | {:.1} | {memory:.0} |",
            idle.cpu,
            idle.cpu * *fleet as f64 / 10_000.0,
            miss.cpu,
            miss.events,
            purge.cpu,
            answer.as_secs_f64() * 1e3
        );
        eprintln!("{row}");
        writeln!(fleets, "{row}").unwrap();
    }
    write_down(&table, &fleets, &Figures { idle, miss, shared, renewal });
    for relay in more {
        relay.shutdown.cancel();
    }
}

struct Figures {
    idle: Cost,
    miss: Cost,
    shared: Cost,
    renewal: Cost,
}

/// Puts what was measured into docs/scaling.md, and what follows from it.
fn write_down(table: &str, fleets: &str, figures: &Figures) {
    let Figures { idle, miss, shared, renewal } = figures;
    let mut follows = String::new();
    for replicas in [10.0, 100.0, 1_000.0] {
        let left = ROOM - replicas * idle.cpu;
        let row = if left > 0.0 {
            format!(
                "| {replicas} | {:.1} % | {:.0} | {:.0} | {:.0} |",
                replicas * idle.cpu / 10_000.0,
                left / miss.cpu,
                left / shared.cpu,
                left / renewal.cpu
            )
        } else {
            format!("| {replicas} | {:.1} % | none | none | none |", replicas * idle.cpu / 10_000.0)
        };
        writeln!(follows, "{row}").unwrap();
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/scaling.md");
    let mut text = std::fs::read_to_string(path).unwrap();
    for (name, rows) in [("costs", table), ("fleets", fleets), ("follows", &follows)] {
        let (begin, end) = (format!("<!-- {name}: by make scale -->\n"), format!("<!-- end of {name} -->"));
        let (before, rest) = text.split_once(&begin).unwrap();
        let (old, after) = rest.split_once(&end).unwrap();
        let head: String = old.lines().take(2).map(|line| format!("{line}\n")).collect();
        text = format!("{before}{begin}{head}{rows}{end}{after}");
    }
    std::fs::write(path, text).unwrap();
}
