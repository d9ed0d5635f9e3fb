//! The parties of a bench, each a process of its own; dropping one ends it.

use std::{
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
use http::header;
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use warp::Filter;

const AUDIENCE: &str = "https://relay.bench";
/// An address with seven vulnerabilities.
pub(crate) const SEVEN: &str = "192.0.2.7";
/// What tokio is told the number of its threads by.
pub(crate) const THREADS: &str = "TOKIO_WORKER_THREADS";

/// CyberScan and the key issuer, until standard input ends.
#[tokio::main]
pub(crate) async fn world(latency: Duration) {
    let sandbox = Sandbox::start(Options::default()).await.unwrap();
    sandbox.cyberscan.latency(latency);
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
pub(crate) async fn baseline(size: usize) {
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
pub(crate) struct Party {
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
    pub(crate) fn start(command: &mut Command) -> Self {
        let child = command.stdin(Stdio::piped()).spawn().unwrap();
        Self { pids: vec![child.id()], child }
    }

    /// Starts it and takes in its first line of output, a JSON object.
    pub(crate) fn introduced(command: &mut Command) -> (Self, Value) {
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

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Microseconds of CPU time since its start.
    pub(crate) fn cpu(&self) -> f64 {
        self.pids.iter().map(|&pid| cpu(pid)).sum()
    }
}

/// Microseconds of CPU time of a process since its start.
pub(crate) fn cpu(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11..13].iter().map(|ticks| ticks.parse::<f64>().unwrap() * 1e6 / 100.0).sum()
}

/// A party that answers HTTP.
pub(crate) struct Server {
    pub(crate) party: Party,
    pub(crate) address: SocketAddr,
}

impl Server {
    pub(crate) fn of((party, about): (Party, Value)) -> Self {
        Self { party, address: about["listen"].as_str().unwrap().parse().unwrap() }
    }

    pub(crate) fn baseline(size: usize, threads: usize) -> Self {
        let itself = std::env::current_exe().unwrap();
        let mut command = Command::new(itself);
        command.args(["role:baseline", &size.to_string()]).env(THREADS, threads.to_string());
        Self::of(Party::introduced(&mut command))
    }
}

/// Everything relays need.
pub(crate) struct World {
    _party: Party,
    about: Value,
    directory: tempfile::TempDir,
    pub(crate) redis: Redis,
}

impl World {
    /// Where CyberScan takes `latency` for an answer.
    pub(crate) fn start(latency: Duration) -> Self {
        let itself = std::env::current_exe().unwrap();
        let latency = latency.as_millis().to_string();
        let (party, about) = Party::introduced(Command::new(itself).args(["role:world", &latency]));
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("ca.pem"), about["ca"].as_str().unwrap()).unwrap();
        Self { _party: party, about, directory, redis: Redis::start() }
    }

    /// What callers show.
    pub(crate) fn token(&self) -> &str {
        self.about["token"].as_str().unwrap()
    }

    /// Waits until all of `addresses` are in Redis, which happens behind the answers.
    pub(crate) fn wait_until_written(&self, addresses: u32) {
        // Each write is followed by an event; when none comes any more, all are there.
        let written = || self.redis.count("xadd");
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut before = 0;
        while before < addresses.into() || before < written() {
            assert!(Instant::now() < deadline, "only {} values are in Redis", written());
            before = written();
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// A relay with room for all addresses of a round, whatever order they come in. One tenant asks for all of them;
    /// the limiter is to count, not to hold back.
    pub(crate) fn relay(&self, with_redis: bool, changes: &[(&str, &str)]) -> Server {
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
    pub(crate) fn nginx(&self, upstream: &Server, workers: usize) -> Server {
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

pub(crate) struct Redis {
    pub(crate) party: Party,
    port: u16,
}

impl Redis {
    pub(crate) fn start() -> Self {
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
        Self { party, port }
    }

    /// The answer to an inline command, which ends with `end`.
    pub(crate) fn ask(&self, command: &str, end: &str) -> String {
        let mut stream = StdStream::connect(("127.0.0.1", self.port)).unwrap();
        write!(stream, "{command}\r\n").unwrap();
        let (mut answer, mut part) = (Vec::new(), [0; 4096]);
        while !answer.ends_with(end.as_bytes()) {
            let read = stream.read(&mut part).unwrap();
            answer.extend_from_slice(&part[..read]);
        }
        String::from_utf8(answer).unwrap()
    }

    pub(crate) fn count(&self, command: &str) -> u64 {
        let stats = self.ask("INFO commandstats", "\r\n\r\n");
        let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{command}:calls=")));
        line.map_or(0, |line| line.split(',').next().unwrap().parse().unwrap())
    }
}

fn free_port() -> u16 {
    StdListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

pub(crate) fn cores() -> usize {
    std::thread::available_parallelism().unwrap().get()
}

fn wait_for_port(port: u16) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while StdStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "nobody listens on port {port}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
