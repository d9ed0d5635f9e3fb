//! The load bench: what an answer costs the relay, in CPU time, beside what warp needs to send as many
//! bytes. `make bench` runs it; docs/benchmarks.md says what is measured and keeps the outcome.
//!
//! Every party is a process of its own, so that CPU times are told apart: the relay (the release
//! binary), the baseline (a static reply behind the relay's own accept loop), the world (CyberScan and
//! the key issuer), Redis, nginx where it is installed, and this one, which generates the load. Relay
//! and baseline get the same requests in alternation; a round's ratio is between neighbours in time.

#![expect(
    clippy::print_stdout,
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a bench: it prints, reads real time and ends at the first thing that is not as it should be"
)]

mod ladder;
mod parties;

use std::{
    fmt::Write as _,
    process::Command,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};

use parties::{SEVEN, Server, THREADS, World, baseline, cores, world};

/// Rounds of relay and baseline per case.
const ROUNDS: usize = 15;
/// Rounds of the cases that need fresh relays.
const COLD_ROUNDS: usize = 7;
/// How long a run takes that does not end by itself.
const RUN: Duration = Duration::from_secs(1);
/// Connections, each with one request at a time.
const CONNECTIONS: usize = 16;
/// Distinct addresses of a miss or L2 round; the fake CyberScan knows 131,072.
const ADDRESSES: u32 = 20_000;
/// Observables of the memory case.
const DISTINCT: u64 = 1_000_000;
/// Observables in a large request.
const MANY: u32 = 25;
const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/benchmarks.md");

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match (arguments.get(1).map(String::as_str), arguments.get(2)) {
        (Some("role:world"), Some(ms)) => world(Duration::from_millis(ms.parse().unwrap())),
        (Some("role:baseline"), Some(size)) => baseline(size.parse().unwrap()),
        // cargo adds `--bench`.
        _ => bench(arguments.iter().skip(1).find(|it| !it.starts_with('-'))),
    }
}

// ---- the load ----

/// What a run came to.
#[derive(Clone, Copy, Debug)]
struct Run {
    answers: u64,
    /// Bytes of answers' bodies.
    bytes: u64,
    cpu_us: f64,
    seconds: f64,
}

impl Run {
    fn cpu_per_answer(&self) -> f64 {
        self.cpu_us / self.answers as f64
    }

    fn throughput(&self) -> f64 {
        self.answers as f64 / self.seconds
    }
}

/// Sends the bodies that `body` makes of 0, 1, 2 … until it makes none or the time is over; a closed
/// loop on [`CONNECTIONS`] connections. Every answer has to be a good one.
#[tokio::main(flavor = "current_thread")]
async fn load(server: &Server, token: &str, body: impl Fn(u64) -> Option<String>) -> Run {
    let authorization = header::HeaderValue::try_from(format!("Bearer {token}")).unwrap();
    let next = std::cell::Cell::new(0);
    let (cpu, started) = (server.party.cpu(), Instant::now());
    let connection = async || {
        let stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let asking = async {
            let (mut answers, mut bytes) = (0, 0);
            while started.elapsed() < RUN
                && let Some(body) = body(next.replace(next.get() + 1))
            {
                let request = Request::post("/observe/observables")
                    .header(header::HOST, "relay.bench")
                    .header(header::AUTHORIZATION, authorization.clone())
                    .header(header::CONTENT_TYPE, "application/json")
                    .body(Full::new(Bytes::from(body)));
                let answer = sender.send_request(request.unwrap()).await.unwrap();
                assert_eq!(answer.status(), StatusCode::OK);
                let answer = answer.into_body().collect().await.unwrap().to_bytes();
                let good = answer.starts_with(b"{\"data\":{\"sightings\"") && !answer.ends_with(b"]}");
                assert!(good || answer.starts_with(b"\"xx"), "{answer:?}");
                answers += 1;
                bytes += answer.len() as u64;
            }
            drop(sender);
            (answers, bytes)
        };
        let (done, ended) = tokio::join!(asking, connection);
        ended.unwrap();
        done
    };
    let done = join_all((0..CONNECTIONS).map(|_| connection())).await;
    let seconds = started.elapsed().as_secs_f64();
    Run {
        answers: done.iter().map(|(answers, _)| answers).sum(),
        bytes: done.iter().map(|(_, bytes)| bytes).sum(),
        cpu_us: server.party.cpu() - cpu,
        seconds,
    }
}

/// A question about these addresses.
fn question(addresses: impl Iterator<Item = String>) -> String {
    Value::from_iter(addresses.map(|value| json!({"type": "ip", "value": value}))).to_string()
}

/// The `k`-th question about `count` addresses of those a round has.
fn distinct(k: u64, count: u32) -> Option<String> {
    let first = u32::try_from(k).unwrap() * count;
    let address = |n: u32| format!("198.{}.{}.{}", 18 + (n >> 16), n >> 8 & 255, n & 255);
    (first + count <= ADDRESSES).then(|| question((first..first + count).map(address)))
}

/// Asks about all addresses, and waits until their answers are in Redis.
fn fill(world: &World, relay: &Server) {
    for first in (0..ADDRESSES / MANY).map(u64::from).step_by(100) {
        load(relay, world.token(), |k| (k < 100).then(|| distinct(first + k, MANY)).flatten());
    }
    world.wait_until_written(ADDRESSES);
}

/// The same question again and again.
fn repeated(addresses: &[&str]) -> impl Fn(u64) -> Option<String> + use<> {
    let question = question(addresses.iter().map(|&address| address.to_owned()));
    move |_| Some(question.clone())
}

/// A thousand answers, so that everything is in memory; how many bytes one has.
fn size_of_answer(server: &Server, token: &str, question: impl Fn(u64) -> Option<String>) -> usize {
    let sample = load(server, token, |k| (k < 1000).then(|| question(k)).flatten());
    usize::try_from(sample.bytes / sample.answers).unwrap()
}

/// One request, so that the relay has its keys, tokens and connections.
fn warm_up(server: &Server, token: &str) {
    let question = question(["203.0.113.25".to_owned()].into_iter());
    load(server, token, |k| (k < 1).then(|| question.clone()));
    // What goes on behind the answer.
    std::thread::sleep(Duration::from_millis(200));
}

// ---- the cases ----

/// The runs of one case: the subject's and, each beside it, the baseline's.
struct Outcome {
    name: &'static str,
    rounds: Vec<(Run, Run)>,
}

fn bench(only: Option<&String>) {
    let wanted = |name: &str| only.is_none_or(|only| name.contains(only.as_str()));
    let world = World::start(Duration::ZERO);
    let token = world.token();
    let mut outcomes = Vec::new();

    let many: Vec<String> = (0..MANY).map(|n| format!("198.18.0.{n}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    for (threads, names) in [
        (1, ["L1 hit, 1 observable, one thread", "nginx proxy_cache, the same bytes, one worker"]),
        (
            cores(),
            [
                "L1 hit, 1 observable, a thread per core",
                "nginx proxy_cache, the same bytes, a worker per core",
            ],
        ),
    ] {
        if names.iter().any(|name| wanted(name)) {
            let relay = world.relay(false, &[(THREADS, &threads.to_string())]);
            let question = repeated(&[SEVEN]);
            let baseline = Server::baseline(size_of_answer(&relay, token, &question), threads);
            let cache = world.nginx(&baseline, threads);
            size_of_answer(&cache, token, &question);
            let run = || [&relay, &cache, &baseline].map(|server| load(server, token, &question));
            let rounds: Vec<_> = (0..ROUNDS).map(|_| run()).collect();
            for (name, subject) in names.into_iter().zip(0..) {
                outcomes.push(report(name, rounds.iter().map(|runs| (runs[subject], runs[2])).collect()));
            }
        }
    }
    let name = "L1 hit, 25 observables";
    if wanted(name) {
        let (relay, question) = (world.relay(false, &[]), repeated(&many));
        let baseline = Server::baseline(size_of_answer(&relay, token, &question), cores());
        let run = || (load(&relay, token, &question), load(&baseline, token, &question));
        outcomes.push(report(name, (0..ROUNDS).map(|_| run()).collect()));
    }

    let names =
        ["L2 hit, 25 observables", "miss, 1 observable, with Redis", "miss, 1 observable, without Redis"];
    if names.iter().any(|name| wanted(name)) {
        let mut rounds = names.map(|_| Vec::new());
        for _ in 0..COLD_ROUNDS {
            for (runs, round) in rounds.iter_mut().zip(cold_round(&world, token)) {
                runs.push(round);
            }
        }
        let cold = names.into_iter().zip(rounds).map(|(name, rounds)| report(name, rounds));
        outcomes.extend(cold.collect::<Vec<_>>());
    }
    if only.is_none() {
        write_down(&outcomes);
    }
    if wanted("ladder") {
        replace("ladder", &ladder::climb());
    }
    if wanted("memory") {
        memory(&world, token);
    }
}

/// A relay with room for 64 MiB of answers is asked about a million domains.
fn memory(world: &World, token: &str) {
    let relay = world.relay(false, &[("RELAY_CACHE_MEMORY", "64MiB"), ("RELAY_LIMITER_CONCURRENCY", "32")]);
    let status = |name: &str| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", relay.party.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    };
    warm_up(&relay, token);
    let before = status("VmRSS:");
    let requests = DISTINCT / u64::from(MANY);
    let mut asked = 0;
    while asked < requests {
        let first = asked;
        let run = load(&relay, token, |k| {
            (first + k < requests).then(|| {
                let names = (0..u64::from(MANY))
                    .map(|n| format!("n{}.load.example", (first + k) * u64::from(MANY) + n));
                Value::from_iter(names.map(|value| json!({"type": "domain", "value": value}))).to_string()
            })
        });
        asked += run.answers;
    }
    let text = format!(
        "`cache.memory = 64MiB`, {} domains, each once, {MANY} a request: {before} MiB resident before, {} MiB after, {} MiB at most.\n",
        asked * u64::from(MANY),
        status("VmRSS:"),
        status("VmHWM:")
    );
    print!("{text}");
    replace("memory", &text);
}

/// Fresh relays meet the same addresses: without Redis, with an empty one, with what that one has got.
/// In the order of the names: L2 hit, miss with Redis, miss without.
fn cold_round(world: &World, token: &str) -> [(Run, Run); 3] {
    let beside = |relay: &Server, count: u32| {
        warm_up(relay, token);
        world.redis.ask("CONFIG RESETSTAT", "+OK\r\n");
        let run = load(relay, token, |k| distinct(k, count));
        let size = usize::try_from(run.bytes / run.answers).unwrap();
        (run, load(&Server::baseline(size, cores()), token, |k| distinct(k, count)))
    };
    let alone = beside(&world.relay(false, &[]), 1);
    world.redis.ask("FLUSHALL", "+OK\r\n");
    let filling = world.relay(true, &[]);
    let with_redis = beside(&filling, 1);
    fill(world, &filling);
    drop(filling);
    let shared = beside(&world.relay(true, &[]), MANY);
    // One round trip per request, and nothing was asked for one by one.
    assert_eq!((world.redis.count("mget"), world.redis.count("evalsha")), (shared.0.answers, 0));
    [shared, with_redis, alone]
}

// ---- the outcome ----

fn report(name: &'static str, rounds: Vec<(Run, Run)>) -> Outcome {
    let outcome = Outcome { name, rounds };
    println!("{}", outcome.row());
    outcome
}

impl Outcome {
    fn row(&self) -> String {
        let (subject, baseline): (Vec<&Run>, Vec<&Run>) = self.rounds.iter().map(|(a, b)| (a, b)).unzip();
        let of =
            |runs: &[&Run], figure: fn(&Run) -> f64| median(runs.iter().map(|run| figure(run)).collect());
        let ratios: Vec<f64> =
            self.rounds.iter().map(|(a, b)| a.cpu_per_answer() / b.cpu_per_answer()).collect();
        let (least, most) = ratios.iter().fold((f64::MAX, 0.0_f64), |(l, m), r| (l.min(*r), m.max(*r)));
        format!(
            "| {} | {:.0} | {:.1} | {:.1} | **{:.2}** ({least:.2}–{most:.2}) | {:.0} | {:.0} |",
            self.name,
            of(&subject, |run| run.bytes as f64 / run.answers as f64),
            of(&subject, Run::cpu_per_answer),
            of(&baseline, Run::cpu_per_answer),
            median(ratios),
            of(&subject, Run::throughput),
            of(&baseline, Run::throughput),
        )
    }
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[figures.len() / 2]
}

/// Puts the table into docs/benchmarks.md, between its marks.
fn write_down(outcomes: &[Outcome]) {
    let machine = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = machine.lines().find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1));
    let version = |program: &str, flag: &str| {
        let output = Command::new(program).arg(flag).output().ok()?;
        let text = [output.stdout, output.stderr].concat();
        String::from_utf8(text).ok()?.lines().next().map(str::to_owned)
    };
    let versions: Vec<String> =
        [("rustc", "--version"), ("redis-server", "--version"), ("nginx", "-v"), ("uname", "-sr")]
            .into_iter()
            .filter_map(|(program, flag)| version(program, flag))
            .collect();
    let mut text = format!(
        "{} × {}; {}. {ROUNDS} rounds ({COLD_ROUNDS} of the cold cases) of at most {} s, {CONNECTIONS} connections.\n\n",
        cores(),
        model.unwrap_or("unknown processor"),
        versions.join("; "),
        RUN.as_secs()
    );
    text += "| case | bytes of an answer | CPU µs per answer | baseline's | ratio (least–most) | answers per s | baseline's |\n";
    text += "|---|---|---|---|---|---|---|\n";
    for outcome in outcomes {
        let _ = writeln!(text, "{}", outcome.row());
    }
    replace("load", &text);
}

/// Puts `text` between the marks of `part` in docs/benchmarks.md.
fn replace(part: &str, text: &str) {
    let (begin, end) = (format!("<!-- {part} -->"), format!("<!-- /{part} -->"));
    let document = std::fs::read_to_string(DOCUMENT).unwrap();
    let (before, rest) = document.split_once(&begin).unwrap();
    let (_, after) = rest.split_once(&end).unwrap();
    std::fs::write(DOCUMENT, format!("{before}{begin}\n{text}{end}{after}")).unwrap();
}
