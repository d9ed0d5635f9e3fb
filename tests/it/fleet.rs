//! Several relays on one sandbox and one Redis, in this process or in their own, and the crowds that ask
//! them.

use std::{
    fmt::Write as _,
    net::SocketAddr,
    process::Stdio,
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
use http::{Request, header};
use http_body_util::Full;
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
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
    callers: JoinSet<Vec<String>>,
    answers: Arc<AtomicU32>,
}

impl Load {
    pub(crate) fn on(relays: &[TestRelay]) -> Self {
        let (stop, answers) = (CancellationToken::new(), Arc::<AtomicU32>::default());
        let mut callers = JoinSet::new();
        for relay in relays.iter().cycle().take(2 * relays.len()) {
            let (address, token) = (relay.address, relay.token());
            let (stop, answers) = (stop.clone(), Arc::clone(&answers));
            callers.spawn(async move {
                let mut failures = Vec::new();
                while !stop.is_cancelled() {
                    let ip = fresh_ip();
                    let asked = [("ip", "203.0.113.10"), ("domain", "mail.example"), ("ip", ip.as_str())];
                    match ask(address, &token, &asked).await {
                        Ok(answer)
                            if answer.get("errors").is_none()
                                && seen(&answer) == asked.map(|(_, value)| value) =>
                        {
                            answers.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(answer) => failures.push(answer.to_string()),
                        Err(error) => failures.push(error.to_string()),
                    }
                    sleep(Duration::from_millis(20)).await;
                }
                failures
            });
        }
        Self { stop, callers, answers }
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

    /// Ends it; every answer must have been whole.
    pub(crate) async fn end_without_a_failure(self) {
        self.stop.cancel();
        let failures: Vec<String> = self.callers.join_all().await.concat();
        assert!(failures.is_empty(), "{} failed, e.g. {}", failures.len(), failures[0]);
    }
}

/// The binary, serving.
pub(crate) struct RelayProcess {
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    log: Arc<Mutex<String>>,
    child: Child,
    _ca: Option<tempfile::NamedTempFile>,
}

impl RelayProcess {
    pub(crate) async fn start(sandbox: &Sandbox, settings: &[(&str, &str)]) -> Self {
        let ca = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(ca.path(), &sandbox.ca_pem).unwrap();
        let given = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let mut relay =
            Self::with(sandbox_settings(sandbox, ca.path().to_str().unwrap()).into_iter().chain(given)).await;
        relay._ca = Some(ca);
        relay
    }

    /// One with these settings, and nothing else in its environment, on ports it chooses itself.
    pub(crate) async fn with(settings: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cyberscan-relay"));
        command.env_clear().kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped());
        command.env("RELAY_LISTEN", "127.0.0.1:0").env("RELAY_ADMIN_LISTEN", "127.0.0.1:0").envs(settings);
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let log = Arc::<Mutex<String>>::default();
        let note = {
            let log = Arc::clone(&log);
            move |line: &str| writeln!(log.lock().unwrap(), "{line}").unwrap()
        };
        let (address, admin) = loop {
            let line = timeout(Duration::from_secs(20), lines.next_line()).await.unwrap().unwrap();
            let line = line.expect("the relay ended at its start; it says why above");
            note(&line);
            let line: Value = serde_json::from_str(&line).unwrap();
            if let (Some(address), Some(admin)) = (line["listen"].as_str(), line["admin"].as_str()) {
                break (address.parse().unwrap(), admin.parse().unwrap());
            }
        };
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                note(&line);
            }
        });
        Self { address, admin, log, child, _ca: None }
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// As many as `count` on one sandbox, ready and acquainted with each other.
    pub(crate) async fn fleet(count: usize, sandbox: &Sandbox, settings: &[(&str, &str)]) -> Vec<Self> {
        let starting = (0..count).map(|_| Self::start(sandbox, settings));
        let fleet = futures_util::future::join_all(starting).await;
        let addresses: Vec<SocketAddr> = fleet.iter().map(|relay| relay.address).collect();
        sharing_within(Duration::from_secs(10), sandbox, &addresses).await;
        fleet
    }

    /// SIGKILL, and gone.
    pub(crate) async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }
}
