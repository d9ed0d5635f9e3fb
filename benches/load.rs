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

use std::{
    fmt::Write as _,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener as StdListener, TcpStream as StdStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use bytes::Bytes;
use cyberscan_relay::{
    http::server::{self, serve},
    metrics::Metrics,
    sandbox::{Options, Sandbox},
};
use futures_util::future::join_all;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use warp::Filter;

const AUDIENCE: &str = "https://relay.bench";
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
/// An address with seven vulnerabilities.
const SEVEN: &str = "192.0.2.7";
/// What tokio is told the number of its threads by.
const THREADS: &str = "TOKIO_WORKER_THREADS";
const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/benchmarks.md");

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    match (arguments.get(1).map(String::as_str), arguments.get(2)) {
        (Some("role:world"), _) => world(),
        (Some("role:baseline"), Some(size)) => baseline(size.parse().unwrap()),
        // cargo adds `--bench`.
        _ => bench(arguments.iter().skip(1).find(|it| !it.starts_with('-'))),
    }
}

// ---- the parties ----

/// CyberScan and the key issuer, until standard input ends.
#[tokio::main]
async fn world() {
    let sandbox = Sandbox::start(Options::default()).await.unwrap();
    let finding = |n: u32| {
        json!({
            "name": format!("OpenSSH user enumeration, variant {n}"), "family": "General", "severity": "Medium",
            "description": "The remote host tells users that exist from users that do not, by the time it takes to refuse them.",
            "port": 22, "protocol": "tcp", "cve": format!("CVE-2018-1547{n}"), "cvss": 5.3, "confidence": 80
        })
    };
    let findings: Vec<Value> = (0..7).map(finding).collect();
    sandbox.cyberscan.set_vulnerabilities(SEVEN, &json!({"ip": SEVEN, "vulnerabilities": findings}));
    let about = json!({
        "token": sandbox.token(AUDIENCE),
        "ca": sandbox.ca_pem,
        "issuer": sandbox.issuer.host(),
        "cyberscan": sandbox.cyberscan.host(),
    });
    println!("{about}");
    let forget = async {
        loop {
            // It records every call; a long load would fill the memory.
            sandbox.cyberscan.reset_counts();
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    };
    tokio::select! {
        () = forget => {}
        () = end_of_input() => {}
    }
}

/// warp with one route and one answer of `size` bytes, behind the relay's accept loop.
#[tokio::main]
async fn baseline(size: usize) {
    let answer = Bytes::from(json!("x".repeat(size - 2)).to_string());
    let route = warp::path!("observe" / "observables")
        .and(warp::post())
        .and(warp::body::bytes())
        .map(move |_| {
            let mut reply = warp::reply::Response::new(answer.clone().into());
            let json = header::HeaderValue::from_static("application/json");
            reply.headers_mut().insert(header::CONTENT_TYPE, json);
            reply
        })
        .boxed();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", json!({"listen": listener.local_addr().unwrap()}));
    let config = server::Config {
        max_connections: 4096.try_into().unwrap(),
        header_timeout: Duration::from_secs(10),
        idle_timeout: Duration::from_secs(75),
        shutdown_timeout: Duration::from_secs(1),
    };
    let shutdown = CancellationToken::new();
    let service = TowerToHyperService::new(warp::service(route));
    tokio::select! {
        () = serve(listener, service, config, Metrics::new(), shutdown) => {}
        () = end_of_input() => {}
    }
}

async fn end_of_input() {
    let _ = tokio::task::spawn_blocking(|| std::io::stdin().read_to_end(&mut Vec::new())).await;
}

/// A process that ends with its handle.
struct Party {
    child: Child,
    /// Whose CPU time counts; nginx works in children of its own.
    pids: Vec<u32>,
}

impl Drop for Party {
    fn drop(&mut self) {
        // nginx's workers end with their master only if it is asked politely.
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
    }
}

impl Party {
    fn start(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::piped()).spawn().unwrap();
        Self { pids: vec![child.id()], child }
    }

    /// Starts it and takes in its first line of output, a JSON object.
    fn introduced(command: &mut Command) -> (Self, Value) {
        let mut party = Self::start(command.stdout(Stdio::piped()));
        let mut output = BufReader::new(party.child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("\"listen\"") && !line.contains("\"token\"") {
            line.clear();
            assert_ne!(output.read_line(&mut line).unwrap(), 0, "it ended before it was ready: {command:?}");
        }
        std::thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()));
        (party, serde_json::from_str(&line).unwrap())
    }

    /// Microseconds of CPU time since its start.
    fn cpu(&self) -> f64 {
        let ticks = self.pids.iter().map(|pid| {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
            fields[11..13].iter().map(|ticks| ticks.parse::<f64>().unwrap()).sum::<f64>()
        });
        ticks.sum::<f64>() * 1e6 / 100.0
    }
}

/// A party that answers HTTP.
struct Server {
    party: Party,
    address: SocketAddr,
}

impl Server {
    fn of((party, about): (Party, Value)) -> Self {
        Self { party, address: about["listen"].as_str().unwrap().parse().unwrap() }
    }

    fn baseline(size: usize, threads: usize) -> Self {
        let itself = std::env::current_exe().unwrap();
        let mut command = Command::new(itself);
        command.args(["role:baseline", &size.to_string()]).env(THREADS, threads.to_string());
        Self::of(Party::introduced(&mut command))
    }
}

/// Everything relays need.
struct World {
    _party: Party,
    about: Value,
    directory: tempfile::TempDir,
    redis: Redis,
}

impl World {
    fn start() -> Self {
        let itself = std::env::current_exe().unwrap();
        let (party, about) = Party::introduced(Command::new(itself).arg("role:world"));
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), about["ca"].as_str().unwrap()).unwrap();
        Self { _party: party, about, directory, redis: Redis::start() }
    }

    /// A relay with room for all addresses of a round, whatever order they come in. One tenant asks for all of them;
    /// the limiter is to count, not to hold back.
    fn relay(&self, with_redis: bool, changes: &[(&str, &str)]) -> Server {
        let text = |name: &str| self.about[name].as_str().unwrap();
        // Another build can be named, to compare two.
        let binary = std::env::var("BENCH_RELAY");
        let binary = binary.unwrap_or_else(|_| env!("CARGO_BIN_EXE_cyberscan-relay").to_owned());
        let mut command = Command::new(binary);
        command
            .env("RELAY_LISTEN", "127.0.0.1:0")
            .env("RELAY_ADMIN_LISTEN", "127.0.0.1:0")
            .env("RELAY_AUTH_AUDIENCES", AUDIENCE)
            .env("RELAY_AUTH_JWKS_HOSTS", text("issuer"))
            .env("RELAY_CYBERSCAN_HOSTS", text("cyberscan"))
            .env("RELAY_EGRESS_ALLOW_CIDRS", "127.0.0.0/8,::1/128")
            .env("RELAY_EGRESS_EXTRA_CA_FILE", self.directory.path().join("ca.pem"))
            .env("RELAY_CACHE_MEMORY", "512MiB")
            .env("RELAY_LIMITER_CONCURRENCY", "1000")
            .env("RELAY_LIMITER_QUEUE", "1000")
            .envs(changes.iter().copied());
        if with_redis {
            command.env("RELAY_REDIS_URL", format!("redis://127.0.0.1:{}", self.redis.port));
            // What requests send to Redis is counted; the worker's warm start would be among it.
            command.env("RELAY_WORKER_ENABLED", "false");
            // A machine that is busy for a moment must not turn an L2 hit into a miss.
            command.env("RELAY_REDIS_TIMEOUT", "2s");
        }
        Server::of(Party::introduced(&mut command))
    }

    /// nginx with its cache in front of `upstream`, keyed by what decides an answer of the relay.
    fn nginx(&self, upstream: &Server, workers: usize) -> Server {
        let (place, port) = (self.directory.path().display(), free_port());
        let configuration = format!(
            "worker_processes {workers}; daemon off; pid {place}/nginx.pid; error_log {place}/error.log; user root;
             events {{ worker_connections 256; }}
             http {{ access_log {place}/access.log combined buffer=64k flush=1s; keepalive_requests 1000000000; client_body_temp_path {place}/body;
               proxy_temp_path {place}/temp; fastcgi_temp_path {place}/f; uwsgi_temp_path {place}/u; scgi_temp_path {place}/s;
               proxy_cache_path {place}/cache keys_zone=answers:10m;
               server {{ listen 127.0.0.1:{port} reuseport; location / {{ proxy_pass http://{};
                 proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_cache answers; proxy_cache_methods POST; proxy_cache_valid 200 1h;
                 proxy_cache_key $uri$http_authorization$request_body; }} }} }}",
            upstream.address
        );
        let file = self.directory.path().join("nginx.conf");
        std::fs::write(&file, configuration).unwrap();
        let mut party = Party::start(Command::new("nginx").arg("-c").arg(file).stderr(Stdio::null()));
        wait_for_port(port);
        let children = format!("/proc/{0}/task/{0}/children", party.child.id());
        let title = |child: &str| std::fs::read_to_string(format!("/proc/{child}/cmdline"));
        let works = |child: &&str| title(child).is_ok_and(|title| title.contains("worker process"));
        let workers_now = || -> Vec<u32> {
            let children = std::fs::read_to_string(&children).unwrap();
            children.split_whitespace().filter(works).map(|child| child.parse().unwrap()).collect()
        };
        while workers_now().len() < workers {
            std::thread::sleep(Duration::from_millis(20));
        }
        party.pids = workers_now();
        Server { party, address: ([127, 0, 0, 1], port).into() }
    }
}

struct Redis {
    _party: Party,
    port: u16,
}

impl Redis {
    fn start() -> Self {
        let port = free_port();
        let mut command = Command::new("redis-server");
        command.args([
            "--port",
            &port.to_string(),
            "--save",
            "",
            "--bind",
            "127.0.0.1",
            "--loglevel",
            "warning",
        ]);
        let party = Party::start(command.stdout(Stdio::null()));
        wait_for_port(port);
        Self { _party: party, port }
    }

    /// The answer to an inline command, which ends with `end`.
    fn ask(&self, command: &str, end: &str) -> String {
        let mut stream = StdStream::connect(("127.0.0.1", self.port)).unwrap();
        write!(stream, "{command}\r\n").unwrap();
        let (mut answer, mut part) = (Vec::new(), [0; 4096]);
        while !answer.ends_with(end.as_bytes()) {
            let read = stream.read(&mut part).unwrap();
            answer.extend_from_slice(&part[..read]);
        }
        String::from_utf8(answer).unwrap()
    }

    fn count(&self, command: &str) -> u64 {
        let stats = self.ask("INFO commandstats", "\r\n\r\n");
        let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
        line.map_or(0, |line| line.split(',').next().unwrap().parse().unwrap())
    }
}

fn free_port() -> u16 {
    StdListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn cores() -> usize {
    std::thread::available_parallelism().unwrap().get()
}

fn wait_for_port(port: u16) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while StdStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "nobody listens on port {port}");
        std::thread::sleep(Duration::from_millis(20));
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
    let world = World::start();
    let token = world.about["token"].as_str().unwrap();
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
    if wanted("memory") {
        memory(&world, token);
    }
}

/// A relay with room for 64 MiB of answers is asked about a million domains.
fn memory(world: &World, token: &str) {
    let relay = world.relay(false, &[("RELAY_CACHE_MEMORY", "64MiB"), ("RELAY_LIMITER_CONCURRENCY", "32")]);
    let status = |name: &str| {
        let status = std::fs::read_to_string(format!("/proc/{}/status", relay.party.child.id())).unwrap();
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
    // The rest of the addresses, and the writes behind the answers.
    for first in (0..ADDRESSES / MANY).map(u64::from).step_by(100) {
        load(&filling, token, |k| (k < 100).then(|| distinct(first + k, MANY)).flatten());
    }
    // Each write is followed by an event; when none comes any more, all are there.
    let written = || world.redis.count("xadd");
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut before = 0;
    while before < ADDRESSES.into() || before < written() {
        assert!(Instant::now() < deadline, "only {} values are in Redis", written());
        before = written();
        std::thread::sleep(Duration::from_millis(300));
    }
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
