//! The one Redis fixture: real servers that tests start, fill, break and mend. It owns processes, ports and
//! what stands between a relay and its Redis; it must not know the relay.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr, TcpListener as Probe},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use deadpool_redis::redis::{
    AsyncConnectionConfig, Client, FromRedisValue, InfoDict, RedisResult, aio::MultiplexedConnection, cmd,
};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use testcontainers::{
    ContainerAsync, GenericImage, ImageExt,
    core::{IntoContainerPort, WaitFor},
    runners::AsyncRunner,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::OnceCell,
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, sync::DropGuard, task::TaskTracker};

/// What to do for whoever has neither Docker nor Redis.
const NEEDED: &str = "these tests run on a real Redis: install redis-server (apt-get install redis-server) or \
                      start Docker";
const PATIENCE: Duration = Duration::from_secs(10);
/// In microseconds: what takes longer holds all others up.
const SLOW: &str = "5000";
/// Commands that tests send, some of them slow on purpose.
const TESTS_OWN: [&str; 12] = [
    "KEYS",
    "DEBUG",
    "CLIENT",
    "CONFIG",
    "FLUSHALL",
    "INFO",
    "ACL",
    "CLUSTER",
    "REPLICAOF",
    "EVAL",
    "SCRIPT",
    "PSYNC",
];

/// A Redis of a test's own, stopped when dropped.
pub(crate) struct RedisServer {
    host: String,
    port: u16,
    password: Option<String>,
    running: Running,
}

enum Running {
    Container(#[expect(dead_code, reason = "it stops when dropped")] Box<ContainerAsync<GenericImage>>),
    Process(Process),
}

/// A `redis-server` of this machine.
struct Process {
    child: Child,
    arguments: Vec<String>,
    directory: tempfile::TempDir,
}

impl RedisServer {
    /// An empty Redis: in a container when a Docker engine answers and has the image or can get it, else a
    /// process of this machine.
    pub(crate) async fn start() -> Self {
        match container().await {
            Some((container, host, port)) => {
                let running = Running::Container(Box::new(container));
                let mut server = Self { host, port, password: None, running };
                server.ready().await.unwrap();
                server
            }
            None => Self::process(&[]).await,
        }
    }

    /// An empty `redis-server` of this machine with these arguments, for tests that kill, freeze or restart
    /// it.
    pub(crate) async fn process(arguments: &[&str]) -> Self {
        Self::launch(arguments, None).await
    }

    /// A Sentinel that alone decides who is the master.
    pub(crate) async fn sentinel(master_name: &str, master: u16) -> Self {
        Self::sentinel_with(master_name, master, "", &[]).await
    }

    /// A Sentinel with more lines of configuration, and arguments.
    pub(crate) async fn sentinel_with(
        master_name: &str,
        master: u16,
        lines: &str,
        arguments: &[&str],
    ) -> Self {
        let configuration = format!(
            "sentinel monitor {master_name} 127.0.0.1 {master} 1\n\
             sentinel down-after-milliseconds {master_name} 500\n\
             sentinel failover-timeout {master_name} 3000\n{lines}\n"
        );
        Self::launch(arguments, Some(&configuration)).await
    }

    /// Three masters that share the slots, as one cluster.
    pub(crate) async fn cluster() -> [Self; 3] {
        Self::cluster_of(async |arguments: &[&str]| Self::process(arguments).await).await
    }

    /// Three masters as one cluster, each started by `start` with these arguments and others.
    pub(crate) async fn cluster_of(start: impl AsyncFn(&[&str]) -> Self) -> [Self; 3] {
        let node = async || {
            let port = free_port().to_string();
            let options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000", "--cluster-port"];
            start(&[&options[..], &[&port]].concat()).await
        };
        let nodes = [node().await, node().await, node().await];
        let slots = [("0", "5460"), ("5461", "10922"), ("10923", "16383")];
        for ((at, node), (first, last)) in nodes.iter().enumerate().zip(slots) {
            node.ask::<()>(&["CLUSTER", "SET-CONFIG-EPOCH", &(at + 1).to_string()]).await;
            node.ask::<()>(&["CLUSTER", "ADDSLOTSRANGE", first, last]).await;
        }
        for other in &nodes[1..] {
            let bus = other.argument("--cluster-port").unwrap();
            let port = other.argument("--tls-port").unwrap_or_else(|| other.port.to_string());
            nodes[0].ask::<()>(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus]).await;
        }
        for node in &nodes {
            eventually("the cluster is complete", async || {
                let info: String = node.ask(&["CLUSTER", "INFO"]).await;
                info.contains("cluster_state:ok") && info.contains("cluster_size:3")
            })
            .await;
        }
        nodes
    }

    async fn launch(arguments: &[&str], sentinel: Option<&str>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut own: Vec<String> = Vec::new();
        if let Some(configuration) = sentinel {
            let file = directory.path().join("sentinel.conf");
            std::fs::write(&file, configuration).unwrap();
            own.extend([file.to_str().unwrap().to_owned(), "--sentinel".to_owned()]);
        }
        own.extend(["--bind", "127.0.0.1", "--loglevel", "warning"].map(str::to_owned));
        if sentinel.is_none() {
            own.extend(
                ["--save", "", "--appendonly", "no", "--repl-diskless-sync-delay", "0"].map(str::to_owned),
            );
            own.extend(["--slowlog-log-slower-than", SLOW, "--slowlog-max-len", "128"].map(str::to_owned));
        }
        own.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        let password = arguments
            .iter()
            .position(|argument| *argument == "--requirepass")
            .map(|at| arguments[at + 1].to_owned());
        let port = free_port();
        let child = spawn(port, &own, directory.path());
        let running = Running::Process(Process { child, arguments: own, directory });
        let mut server = Self { host: Ipv4Addr::LOCALHOST.to_string(), port, password, running };
        for _ in 0..5 {
            match server.ready().await {
                Ok(()) => return server,
                // Somebody else was faster to take the port.
                Err(_) => {
                    server.port = free_port();
                    let port = server.port;
                    server.process_mut().spawn_again(port);
                }
            }
        }
        panic!("redis-server does not start");
    }

    /// Where it is, for a relay.
    pub(crate) fn url(&self) -> String {
        let encoded = |password: &String| format!(":{}@", utf8_percent_encode(password, NON_ALPHANUMERIC));
        let password = self.password.as_ref().map(encoded).unwrap_or_default();
        format!("redis://{password}{}:{}", self.host, self.port)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// SIGKILL, and gone.
    pub(crate) fn kill(&mut self) {
        let process = self.process_mut();
        process.child.kill().unwrap();
        process.child.wait().unwrap();
    }

    /// Starts it again on the same port, empty.
    pub(crate) async fn restart(&mut self) {
        let port = self.port;
        self.process_mut().spawn_again(port);
        self.ready().await.unwrap();
    }

    /// SIGSTOP: connections stay and nothing is answered.
    pub(crate) fn freeze(&self) {
        self.signal("-STOP");
    }

    /// SIGCONT.
    pub(crate) fn thaw(&self) {
        self.signal("-CONT");
    }

    /// Asks for another password from now on, also those who are connected.
    pub(crate) async fn change_password(&mut self, password: &str) {
        let _: String = self.ask(&["CONFIG", "SET", "requirepass", password]).await;
        self.password = Some(password.to_owned());
        let _: u32 = self.ask(&["CLIENT", "KILL", "TYPE", "normal"]).await;
    }

    /// The answer to a command.
    pub(crate) async fn ask<T: FromRedisValue>(&self, words: &[&str]) -> T {
        self.try_ask(words).await.unwrap_or_else(|error| panic!("{words:?}: {error}"))
    }

    pub(crate) async fn try_ask<T: FromRedisValue>(&self, words: &[&str]) -> RedisResult<T> {
        cmd(words[0]).arg(&words[1..]).query_async(&mut self.connection().await?).await
    }

    /// The bytes of a string; `None` where there is nothing.
    pub(crate) async fn bytes(&self, key: &str) -> Option<Vec<u8>> {
        self.ask(&["GET", key]).await
    }

    /// Puts `value` where a value is, without a change to its time to live.
    pub(crate) async fn overwrite(&self, key: &str, value: &[u8]) {
        let mut link = self.connection().await.unwrap();
        let _: String = cmd("SET").arg(key).arg(value).arg("KEEPTTL").query_async(&mut link).await.unwrap();
    }

    /// All keys, in order.
    pub(crate) async fn keys(&self) -> Vec<String> {
        let mut keys: Vec<String> = self.ask(&["KEYS", "*"]).await;
        keys.sort_unstable();
        keys
    }

    /// All keys of values, in order.
    pub(crate) async fn values(&self) -> Vec<String> {
        self.keys().await.into_iter().filter(|key| key.ends_with(":v")).collect()
    }

    /// How often each command was called, as the server counts them: `mget`, `evalsha`.
    pub(crate) async fn calls(&self) -> HashMap<String, u64> {
        let stats: String = self.ask(&["INFO", "commandstats"]).await;
        let count = |line: &str| {
            let (name, rest) = line.strip_prefix("cmdstat_")?.split_once(":calls=")?;
            Some((name.to_owned(), rest.split(',').next()?.parse().ok()?))
        };
        stats.lines().filter_map(count).collect()
    }

    async fn connection(&self) -> RedisResult<MultiplexedConnection> {
        // This machine may be busy.
        let patient = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(PATIENCE));
        Client::open(self.url())?.get_multiplexed_async_connection_with_config(&patient).await
    }

    /// Waits until it answers, and it is this one that does.
    async fn ready(&mut self) -> Result<(), String> {
        let started = Instant::now();
        loop {
            let info = self.try_ask::<InfoDict>(&["INFO", "server"]).await;
            let ours = match &mut self.running {
                Running::Container(_) => None,
                Running::Process(process) => match process.child.try_wait() {
                    Ok(None) => Some(process.child.id()),
                    ended => return Err(format!("redis-server ended: {ended:?}")),
                },
            };
            match info {
                Ok(info) if ours.is_none_or(|ours| info.get("process_id") == Some(ours)) => return Ok(()),
                Ok(_) => return Err("another server is on this port".to_owned()),
                Err(error) if started.elapsed() > PATIENCE => return Err(error.to_string()),
                Err(_) => sleep(Duration::from_millis(10)).await,
            }
        }
    }

    fn signal(&self, name: &str) {
        let pid = self.process_of().child.id().to_string();
        assert!(Command::new("kill").args([name, &pid]).status().unwrap().success());
    }

    /// What it was started with.
    pub(crate) fn argument(&self, name: &str) -> Option<String> {
        let arguments = &self.process_of().arguments;
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    }

    fn process_of(&self) -> &Process {
        match &self.running {
            Running::Process(process) => process,
            Running::Container(_) => panic!("only a process can be treated like that"),
        }
    }

    fn process_mut(&mut self) -> &mut Process {
        match &mut self.running {
            Running::Process(process) => process,
            Running::Container(_) => panic!("only a process can be treated like that"),
        }
    }
}

/// An authority, a certificate for servers here and one for clients, in files.
pub(crate) struct Authority(tempfile::TempDir);

impl Authority {
    pub(crate) fn new() -> Self {
        Self::of(&["localhost", "127.0.0.1"])
    }

    /// The servers' certificate is for `names`.
    pub(crate) fn of(names: &[&str]) -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Else it had the name of what it signs, and that looked as if signed by itself.
        parameters.distinguished_name.push(DnType::CommonName, "an authority");
        std::fs::write(this.path("ca.pem"), parameters.self_signed(&key).unwrap().pem()).unwrap();
        let issuer = Issuer::new(parameters, key);
        for (file, names) in [("server", names), ("client", &["relay"][..])] {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let key = KeyPair::generate().unwrap();
            let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
            std::fs::write(this.path(&format!("{file}.pem")), certificate.pem()).unwrap();
            std::fs::write(this.path(&format!("{file}.key")), key.serialize_pem()).unwrap();
        }
        this
    }

    /// `ca.pem`, `server.pem`, `server.key`, `client.pem`, `client.key`.
    pub(crate) fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// What makes a server speak TLS besides, on a port of its own, with `clients` that show a certificate: `yes`, `no`.
    pub(crate) fn arguments(&self, clients: &str) -> Vec<String> {
        let port = free_port().to_string();
        [
            ("--tls-port", port),
            ("--tls-auth-clients", clients.to_owned()),
            ("--tls-cert-file", self.path("server.pem")),
            ("--tls-key-file", self.path("server.key")),
            ("--tls-ca-cert-file", self.path("ca.pem")),
        ]
        .into_iter()
        .flat_map(|(name, value)| [name.to_owned(), value])
        .collect()
    }
}

/// None of what the relay asks of Redis may hold it up, in no test.
impl Drop for RedisServer {
    fn drop(&mut self) {
        let sentinel = |process: &Process| process.arguments.iter().any(|argument| argument == "--sentinel");
        let runs = match &mut self.running {
            Running::Process(process) => !sentinel(process) && matches!(process.child.try_wait(), Ok(None)),
            Running::Container(_) => false,
        };
        // One that is frozen, paused or full of another's password says nothing.
        let (slow, all) = if runs { slow(&self.url()).unwrap_or_default() } else { Default::default() };
        if !slow.is_empty() {
            eprintln!("held up by: {slow:?}");
        }
        let times = |name: &String, least: u64| {
            slow.iter().filter(|(other, micros)| name == other && *micros >= least).count() as u64
        };
        // Now and then somebody else may have had the processor.
        let too_often = |name: &String| times(name, 0) > 2 && times(name, 0) * 100 > all;
        let far_too_long = |name: &String| times(name, 50_000) > 2;
        let again: Vec<_> = slow.iter().filter(|(name, _)| too_often(name) || far_too_long(name)).collect();
        assert!(again.is_empty() || std::thread::panicking(), "Redis is held up by {again:?}");
    }
}

/// The commands of the relay that took long, and their microseconds; and how many commands there were in all.
fn slow(url: &str) -> RedisResult<(Vec<(String, u64)>, u64)> {
    let patience = Duration::from_millis(200);
    let mut link = Client::open(url)?.get_connection_with_timeout(patience)?;
    link.set_read_timeout(Some(patience))?;
    type Entry = (u64, u64, u64, Vec<String>);
    let entries: Vec<Entry> = cmd("SLOWLOG").arg("GET").arg(128).query(&mut link)?;
    let of_the_relay = entries.into_iter().filter_map(|(_, _, micros, words)| {
        let name = words.first()?.to_ascii_uppercase();
        (!TESTS_OWN.contains(&&*name))
            .then(|| (words.into_iter().take(2).collect::<Vec<_>>().join(" "), micros))
    });
    let stats: InfoDict = cmd("INFO").arg("stats").query(&mut link)?;
    Ok((of_the_relay.collect(), stats.get("total_commands_processed").unwrap_or(0)))
}

impl Process {
    fn spawn_again(&mut self, port: u16) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.child = spawn(port, &self.arguments, self.directory.path());
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(port: u16, arguments: &[String], directory: &Path) -> Child {
    let (configuration, options) = match arguments.first() {
        Some(first) if !first.starts_with("--") => arguments.split_at(1),
        _ => arguments.split_at(0),
    };
    // Before the tests themselves, where that is allowed: what is slow is a command then, not the machine.
    let mut command = Command::new("nice");
    command
        .args(["-n", "-10", "redis-server"])
        .args(configuration)
        .args(["--port", &port.to_string()])
        .args(options)
        .current_dir(directory);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap_or_else(|error| panic!("{NEEDED} (redis-server: {error})"))
}

/// A free port below those that outgoing connections get, so that a server that was killed finds its own
/// free when it comes back.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    const FIRST: u32 = 12_000;
    const COUNT: u32 = 20_000;
    let start = std::process::id().wrapping_mul(7919);
    loop {
        let step = u32::from(NEXT.fetch_add(1, Ordering::Relaxed));
        let port = u16::try_from(FIRST + start.wrapping_add(step) % COUNT).unwrap();
        if Probe::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// A container, unless there is no engine or the image cannot be had; that is found out once.
async fn container() -> Option<(ContainerAsync<GenericImage>, String, u16)> {
    static ENGINE: OnceCell<bool> = OnceCell::const_new();
    static FAILED: AtomicBool = AtomicBool::new(false);
    if FAILED.load(Ordering::Relaxed) || !*ENGINE.get_or_init(engine_answers).await {
        return None;
    }
    let started = start_container().await;
    FAILED.fetch_or(started.is_none(), Ordering::Relaxed);
    started
}

async fn start_container() -> Option<(ContainerAsync<GenericImage>, String, u16)> {
    let image = GenericImage::new("redis", "7-alpine")
        .with_exposed_port(6379.tcp())
        .with_wait_for(WaitFor::message_on_stdout("Ready to accept connections"))
        .with_cmd(["redis-server", "--save", "", "--appendonly", "no"]);
    let container = timeout(Duration::from_secs(60), image.start()).await.ok()?.ok()?;
    let port = container.get_host_port_ipv4(6379).await.ok()?;
    let host = container.get_host().await.ok()?.to_string();
    Some((container, host, port))
}

/// Whether something listens where testcontainers would look for a Docker engine.
async fn engine_answers() -> bool {
    let variable = |name: &str| std::env::var(name).ok();
    if let Some(host) = variable("DOCKER_HOST") {
        return match host.split_once("://") {
            Some(("unix", path)) => socket_answers(Path::new(path)).await,
            Some((_, address)) => {
                let connecting = timeout(Duration::from_secs(1), TcpStream::connect(address)).await;
                matches!(connecting, Ok(Ok(_)))
            }
            None => false,
        };
    }
    let below = |name: &str, rest: &str| variable(name).map(|home| Path::new(&home).join(rest));
    let sockets = [
        Some(PathBuf::from("/var/run/docker.sock")),
        below("XDG_RUNTIME_DIR", ".docker/run/docker.sock"),
        below("XDG_RUNTIME_DIR", "docker.sock"),
        below("HOME", ".docker/run/docker.sock"),
        below("HOME", ".docker/desktop/docker.sock"),
    ];
    for socket in sockets.into_iter().flatten() {
        if socket_answers(&socket).await {
            return true;
        }
    }
    false
}

async fn socket_answers(path: &Path) -> bool {
    tokio::net::UnixStream::connect(path).await.is_ok()
}

/// A way to a server on which things go wrong.
pub(crate) struct Proxy {
    port: u16,
    faults: Arc<Faults>,
    _stop: DropGuard,
}

#[derive(Default)]
struct Faults {
    /// How much later answers come.
    delay_ms: AtomicU64,
    /// Of a hundred answers, after how many the connection is cut.
    cut_percent: AtomicU32,
    /// Connections up to this one are dead without a sign: nothing comes, nothing is closed.
    silent: AtomicU32,
    connections: AtomicU32,
    answers: AtomicU32,
}

impl Proxy {
    pub(crate) async fn to(server: &RedisServer) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, free_port())).await.unwrap();
        let (port, target) = (listener.local_addr().unwrap().port(), server.port);
        let (stop, faults) = (CancellationToken::new(), Arc::<Faults>::default());
        let (shutdown, shared, tasks) = (stop.clone(), Arc::clone(&faults), TaskTracker::new());
        tokio::spawn(async move {
            while let Some(Ok((client, _))) = shutdown.run_until_cancelled(listener.accept()).await {
                let (faults, shutdown) = (Arc::clone(&shared), shutdown.clone());
                tasks.spawn(async move {
                    shutdown.run_until_cancelled(pass_on(client, target, &faults)).await;
                });
            }
        });
        Self { port, faults, _stop: stop.drop_guard() }
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Answers come so much later, and of a hundred so many never, their connection being cut.
    pub(crate) fn slow(&self, delay: Duration, cut_percent: u32) {
        self.faults.delay_ms.store(u64::try_from(delay.as_millis()).unwrap(), Ordering::Relaxed);
        self.faults.cut_percent.store(cut_percent, Ordering::Relaxed);
    }

    /// Nothing more comes through the connections there are, and nobody is told; new ones work.
    pub(crate) fn silence(&self) {
        self.faults.silent.store(self.faults.connections.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

async fn pass_on(mut client: TcpStream, target: u16, faults: &Faults) {
    let number = faults.connections.fetch_add(1, Ordering::Relaxed) + 1;
    let Ok(mut server) = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, target))).await else {
        return;
    };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (mut from_client, mut to_client) = client.split();
    let (mut from_server, mut to_server) = server.split();
    let dead = async || {
        if faults.silent.load(Ordering::Relaxed) >= number {
            std::future::pending::<()>().await;
        }
    };
    let questions = async {
        let mut bytes = vec![0; 65536];
        while let Ok(read @ 1..) = from_client.read(&mut bytes).await {
            dead().await;
            if to_server.write_all(&bytes[..read]).await.is_err() {
                return;
            }
        }
    };
    let answers = async {
        let mut bytes = vec![0; 65536];
        while let Ok(read @ 1..) = from_server.read(&mut bytes).await {
            dead().await;
            let answer = faults.answers.fetch_add(1, Ordering::Relaxed);
            sleep(Duration::from_millis(faults.delay_ms.load(Ordering::Relaxed))).await;
            let cut = u64::from(faults.cut_percent.load(Ordering::Relaxed));
            let cuts = |answers: u32| u64::from(answers) * cut / 100;
            if cuts(answer.wrapping_add(1)) > cuts(answer)
                || to_client.write_all(&bytes[..read]).await.is_err()
            {
                return;
            }
        }
    };
    tokio::select! {
        () = questions => {}
        () = answers => {}
    }
}

/// Waits until `condition` holds.
pub(crate) async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let started = Instant::now();
    while !condition().await {
        assert!(started.elapsed() < PATIENCE, "{what}: not within {PATIENCE:?}");
        sleep(Duration::from_millis(20)).await;
    }
}
