//! Several relays on one sandbox and one Redis, in this process or in their own, and the crowds that ask
//! them.

use std::{
    net::SocketAddr,
    process::{ExitStatus, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use cyberscan_relay::{
    probe,
    sandbox::{Call, Sandbox},
};
use http::{Request, StatusCode, header};
use http_body_util::Full;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use crate::harness::{AUDIENCE, TestRelay, list, sandbox_settings, seen};

/// A time-out for Redis that a busy machine cannot exceed, for tests that are not about it. The driver's own
/// is 500 ms.
pub(crate) const PATIENT: (&str, &str) = ("RELAY_REDIS_TIMEOUT", "450ms");

/// `count` relays in this process, in one world.
pub(crate) async fn fleet(count: usize, settings: &[(&str, &str)]) -> Vec<TestRelay> {
    let mut relays = vec![TestRelay::with(settings).await];
    while relays.len() < count {
        relays.push(TestRelay::beside(&relays[0].sandbox, settings).await);
    }
    relays
}

/// An address nobody asked about before, that CyberScan knows.
pub(crate) fn fresh_ip() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("198.19.{}.{}", number / 250 % 250, number % 250)
}

/// What a relay says about `observables`, or why it says nothing.
pub(crate) async fn ask(
    address: SocketAddr,
    token: &str,
    observables: &[(&str, &str)],
) -> anyhow::Result<Value> {
    let request = Request::post("/observe/observables")
        .header(header::HOST, "relay.test")
        .header(header::AUTHORIZATION, format!("Bearer {token}"))
        .body(Full::<Bytes>::from(list(observables)))?;
    Ok(serde_json::from_slice(probe::call(address, request).await?.body())?)
}

/// Whether what one relay fetches is served by each other without another call to CyberScan.
pub(crate) async fn shares(sandbox: &Sandbox, relays: &[SocketAddr]) -> bool {
    let (token, ip) = (sandbox.token(AUDIENCE), fresh_ip());
    for relay in relays {
        if ask(*relay, &token, &[("ip", &ip)]).await.is_err() {
            return false;
        }
        // The value is written behind the answer.
        sleep(Duration::from_millis(20)).await;
    }
    sandbox.cyberscan.count_of(Call::Vulnerabilities, &ip) == 1
}

/// Waits until they do, at most so long.
pub(crate) async fn sharing_within(longest: Duration, sandbox: &Sandbox, relays: &[SocketAddr]) {
    let started = Instant::now();
    while !shares(sandbox, relays).await {
        assert!(started.elapsed() < longest, "the relays share nothing after {longest:?}");
        sleep(Duration::from_millis(50)).await;
    }
}

pub(crate) fn addresses(relays: &[TestRelay]) -> Vec<SocketAddr> {
    relays.iter().map(|relay| relay.address).collect()
}

/// Callers who keep asking, about what is known and about what is not.
pub(crate) struct Load {
    stop: CancellationToken,
    callers: JoinSet<Vec<Failure>>,
    answers: Arc<AtomicU32>,
    /// How long each answer took.
    times: Arc<Mutex<Vec<Duration>>>,
}

/// A question that was not answered in full.
#[derive(Debug)]
pub(crate) struct Failure {
    /// Who was asked.
    pub(crate) relay: SocketAddr,
    /// What came instead, or why nothing came.
    pub(crate) said: Result<Value, String>,
}

impl Load {
    pub(crate) fn on(relays: &[TestRelay]) -> Self {
        Self::at(&addresses(relays), &relays[0].token())
    }

    /// Two callers for each of these.
    pub(crate) fn at(relays: &[SocketAddr], token: &str) -> Self {
        let (stop, answers) = (CancellationToken::new(), Arc::<AtomicU32>::default());
        let (mut callers, times) = (JoinSet::new(), Arc::<Mutex<Vec<Duration>>>::default());
        for relay in relays.iter().cycle().take(2 * relays.len()).copied() {
            let (token, stop, answers) = (token.to_owned(), stop.clone(), Arc::clone(&answers));
            let times = Arc::clone(&times);
            callers.spawn(async move {
                let mut failures = Vec::new();
                while !stop.is_cancelled() {
                    let ip = fresh_ip();
                    let asked = [("ip", "203.0.113.10"), ("domain", "mail.example"), ("ip", ip.as_str())];
                    let at = Instant::now();
                    let answer = ask(relay, &token, &asked).await;
                    times.lock().unwrap().push(at.elapsed());
                    match answer {
                        Ok(answer)
                            if answer.get("errors").is_none()
                                && seen(&answer) == asked.map(|(_, value)| value) =>
                        {
                            answers.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(answer) => failures.push(Failure { relay, said: Ok(answer) }),
                        Err(error) => failures.push(Failure { relay, said: Err(error.to_string()) }),
                    }
                    sleep(Duration::from_millis(20)).await;
                }
                failures
            });
        }
        Self { stop, callers, answers, times }
    }

    /// Answers so far.
    pub(crate) fn answers(&self) -> u32 {
        self.answers.load(Ordering::Relaxed)
    }

    /// Waits for `more` answers, so that whatever was done has been felt.
    pub(crate) async fn answered(&self, more: u32) {
        let goal = self.answers() + more;
        while self.answers() < goal {
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends it and tells what failed.
    pub(crate) async fn end(self) -> Vec<Failure> {
        self.stop.cancel();
        self.callers.join_all().await.into_iter().flatten().collect()
    }

    /// Ends it; every answer must have been whole.
    pub(crate) async fn end_without_a_failure(self) {
        let mut times = self.times.lock().unwrap().clone();
        times.sort_unstable();
        let (half, last) = (times[times.len() / 2], times[times.len() - 1]);
        let p99 = times[times.len() * 99 / 100];
        let failures = self.end().await;
        let test = std::thread::current().name().unwrap_or_default().to_owned();
        eprintln!("{test}: {} answers in {half:?} (median), {p99:?} (p99), {last:?} (most)", times.len());
        assert!(failures.is_empty(), "{} failed, e.g. {:?}", failures.len(), failures[0]);
    }
}

/// The binary, serving.
pub(crate) struct RelayProcess {
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    log: Arc<Mutex<Vec<Value>>>,
    child: Child,
    _ca: Option<tempfile::NamedTempFile>,
}

impl RelayProcess {
    pub(crate) async fn start(sandbox: &Sandbox, settings: &[(&str, &str)]) -> Self {
        Self::start_by(Self::command(), sandbox, settings).await
    }

    /// As [`RelayProcess::start`], by a command of the test's own.
    pub(crate) async fn start_by(mut command: Command, sandbox: &Sandbox, settings: &[(&str, &str)]) -> Self {
        let ca = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(ca.path(), &sandbox.ca_pem).unwrap();
        command.envs(sandbox_settings(sandbox, ca.path().to_str().unwrap())).envs(settings.iter().copied());
        let mut relay = Self::launch(command).await;
        relay._ca = Some(ca);
        relay
    }

    /// One with these settings, and nothing else in its environment, on ports it chooses itself.
    pub(crate) async fn with(settings: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut command = Self::command();
        command.envs(settings);
        Self::launch(command).await
    }

    /// What starts the binary.
    pub(crate) fn command() -> Command {
        Self::command_of(env!("CARGO_BIN_EXE_cyberscan-relay"))
    }

    /// What starts the binary where no process can have more than `files` files open.
    pub(crate) fn command_with_files(files: u32) -> Command {
        let mut shell = Self::command_of("/bin/sh");
        let script = format!("ulimit -n {files} && exec \"$0\"");
        shell.args(["-c", &script, env!("CARGO_BIN_EXE_cyberscan-relay")]);
        shell
    }

    /// What starts `program`, which is the relay or becomes it.
    pub(crate) fn command_of(program: &str) -> Command {
        let mut command = Command::new(program);
        command.env_clear().kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped());
        // Where lines that are run are counted, if they are.
        command.envs(std::env::var_os("LLVM_PROFILE_FILE").map(|file| ("LLVM_PROFILE_FILE", file)));
        command.env("RELAY_LISTEN", "127.0.0.1:0").env("RELAY_ADMIN_LISTEN", "127.0.0.1:0");
        command
    }

    async fn launch(command: Command) -> Self {
        let (relay, mut lines) = Self::launch_unread(command).await;
        let log = Arc::clone(&relay.log);
        // Read on, or the relay's lines would be lost.
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                log.lock().unwrap().push(serde_json::from_str(&line).unwrap());
            }
        });
        relay
    }

    /// One whose log is read up to where it is ready.
    pub(crate) async fn launch_unread(mut command: Command) -> (Self, Lines<BufReader<ChildStdout>>) {
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut log = Vec::new();
        let (address, admin) = loop {
            let line = timeout(Duration::from_secs(20), lines.next_line()).await.unwrap().unwrap();
            let line = line.expect("the relay ended at its start; it says why above");
            let line: Value = serde_json::from_str(&line).unwrap();
            let address = |name: &str| line[name].as_str().map(|address| address.parse().unwrap());
            if let (Some(listen), Some(admin)) = (address("listen"), address("admin")) {
                break (listen, admin);
            }
            log.push(line);
        };
        (Self { address, admin, log: Arc::new(Mutex::new(log)), child, _ca: None }, lines)
    }

    /// As many as `count` on one sandbox, ready and acquainted with each other.
    pub(crate) async fn fleet(count: usize, sandbox: &Sandbox, settings: &[(&str, &str)]) -> Vec<Self> {
        let starting = (0..count).map(|_| Self::start(sandbox, settings));
        let fleet = futures_util::future::join_all(starting).await;
        let addresses: Vec<SocketAddr> = fleet.iter().map(|relay| relay.address).collect();
        sharing_within(Duration::from_secs(10), sandbox, &addresses).await;
        fleet
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    /// Its log so far, a line for each.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().iter().map(|line| format!("{line}\n")).collect()
    }

    /// The lines of its log so far that say `message`.
    pub(crate) fn said(&self, message: &str) -> Vec<Value> {
        let log = self.log.lock().unwrap();
        log.iter().filter(|line| line["message"] == message).cloned().collect()
    }

    /// A figure of its memory in KiB: `VmRSS`, `VmHWM`.
    pub(crate) fn memory(&self, figure: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(figure)?.strip_prefix(':'));
        line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok()).unwrap()
    }

    /// The answer of its admin listener: status and body.
    pub(crate) async fn admin(&self, path: &str) -> anyhow::Result<(StatusCode, String)> {
        let request = Request::get(path).header(header::HOST, "localhost").body(Full::default())?;
        let answer = probe::call(self.admin, request).await?;
        Ok((answer.status(), String::from_utf8(answer.body().to_vec())?))
    }

    /// The sum of its series whose names and labels begin so.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.admin("/metrics").await.unwrap();
        let values = text.lines().filter(|line| line.starts_with(name));
        values.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()).sum()
    }

    /// SIGTERM.
    pub(crate) async fn terminate(&self) {
        let pid = self.pid().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    }

    /// Waits until it has ended.
    pub(crate) async fn end_within(mut self, longest: Duration) -> ExitStatus {
        timeout(longest, self.child.wait()).await.expect("it goes on").unwrap()
    }

    /// Whether it has not ended.
    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// SIGKILL, and gone.
    pub(crate) async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }
}
