//! Redis, as the rest of the relay sees it: an operation that ends within its time or is
//! [`Unavailable`]. It owns time-outs, the breaker, reconnection and the prefix of all keys, for a single
//! server, Sentinel and Cluster alike; it must not know what is stored.
//!
//! Connections come from a pool of deadpool (`connect.rs`). Each checkout of deadpool-redis's own pings, which doubles
//! the round trips, so the hot path uses a clone of one multiplexed connection and gives it up only when it
//! breaks. Blocking reads take a connection of their own.

mod connect;
mod trouble;
mod url;

use std::{
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use deadpool_redis::{
    cluster::ClusterConnection,
    redis::{
        Cmd, ErrorKind, Pipeline, RedisError, RedisFuture, RedisResult, ServerErrorKind, Value,
        aio::{ConnectionLike, MultiplexedConnection},
    },
};
use tokio::time::{Instant, error::Elapsed, timeout};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

pub use self::{
    connect::{FileFault, Files},
    trouble::tls_fault,
    url::{Login, Mode, NotARedis, Url, fit},
};
use self::{
    connect::{LINK, Pool},
    trouble::{Complaints, reason, refuses},
};
use crate::{
    flight::Flights,
    live::Live,
    metrics::{Label, Metrics, Operation, RedisOutcome},
    trace::{self, Stage},
};

/// Settings `redis.*`.
#[derive(Clone, Debug)]
pub struct Config {
    /// `redis.url`: where Redis is; several for Sentinel and Cluster.
    pub urls: Vec<Url>,
    /// `redis.mode`: what the URLs lead to.
    pub mode: Mode,
    /// `redis.master_name`: the name Sentinel knows the master by.
    pub master_name: String,
    /// `redis.username` and `redis.password`: who logs in, if it is not who `redis.url` says.
    pub login: Option<Login>,
    /// `redis.database`: its number, if it is not that of `redis.url`.
    pub database: Option<u16>,
    /// `redis.sentinel.username` and `redis.sentinel.password`: who logs in to the sentinels, if it is said.
    pub sentinel_login: Option<Login>,
    /// `redis.sentinel.tls`: whether sentinels speak TLS, if it is said; else as the master, whose scheme the URLs have.
    pub sentinel_tls: Option<bool>,
    /// Certificates.
    pub files: Files,
    /// `redis.key_prefix`: how all keys begin.
    pub key_prefix: String,
    /// `redis.timeout`: how long one operation may take.
    pub timeout: Duration,
}

impl Config {
    /// One server at `url`, with the defaults of everything else.
    #[must_use]
    pub fn single(url: Url, timeout: Duration) -> Self {
        Self {
            urls: vec![url],
            mode: Mode::Single,
            master_name: String::new(),
            login: None,
            database: None,
            sentinel_login: None,
            sentinel_tls: None,
            files: Files::default(),
            key_prefix: KEY_PREFIX.to_owned(),
            timeout,
        }
    }

    /// The key called `name`, as it stands in Redis.
    #[must_use]
    pub fn key(&self, name: &str) -> String {
        [&self.key_prefix, FORM, name].concat()
    }

    /// Whether there is a password to log in with.
    #[must_use]
    pub fn has_password(&self) -> bool {
        self.login.as_ref().is_some_and(|login| login.password.is_some())
            || self.urls.iter().any(Url::has_password)
    }

    /// Who logs in to what `url` leads to; to the master, if that is a sentinel.
    fn login(&self, url: &Url) -> Login {
        match &self.login {
            Some(login) if login.password.is_some() => login.clone(),
            Some(login) => Login { user: login.user.clone(), ..url.login().clone() },
            None => url.login().clone(),
        }
    }

    fn database(&self, url: &Url) -> i64 {
        self.database.map_or(url.database(), i64::from)
    }
}

/// How keys begin unless `redis.key_prefix` says otherwise.
pub const KEY_PREFIX: &str = "relay:";
/// The form of what is stored: whoever stores in another form uses other keys.
const FORM: &str = "1:";

/// The operation did not happen, or nobody knows whether it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("redis is not available")]
pub struct Unavailable;

/// Failures in a row that open the breaker.
const FAILURES: u32 = 3;
/// How long the breaker stays open: doubled with each failed probe up to the second.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The connection to Redis; a cheap clone.
#[derive(Clone)]
pub struct Redis(Arc<Shared>);

struct Shared {
    pool: Live<Pool>,
    timeout: Live<Duration>,
    state: Mutex<State>,
    connecting: Flights<(), Result<Link, Unavailable>>,
    /// How all keys begin.
    prefix: String,
    metrics: Metrics,
}

/// A connection that many operations share.
#[derive(Clone)]
pub enum Link {
    /// To one server.
    Node(MultiplexedConnection),
    /// To a cluster.
    Cluster(ClusterConnection),
}

#[derive(Default)]
struct State {
    link: Option<Link>,
    failures: u32,
    /// Operations in a row that had no answer on this link.
    silent: u32,
    pause: Duration,
    /// No operation is tried before; one probe is let through at that time.
    closed_until: Option<Instant>,
    complaints: Complaints,
    up: Option<bool>,
    /// Operations, a bit each, that were refused when they were last tried, by a server that answers.
    refused: u32,
}

impl Redis {
    /// A connection as `config` says; nothing is connected yet.
    ///
    /// # Errors
    /// When the URLs do not fit the mode, or [`FileFault`].
    pub fn new(config: &Config, metrics: Metrics, tasks: TaskTracker) -> anyhow::Result<Self> {
        let pool = Pool::new(config)?;
        Ok(Self(Arc::new(Shared {
            pool: Live::new(pool),
            timeout: Live::new(config.timeout),
            state: Mutex::default(),
            connecting: Flights::new(tasks),
            prefix: config.key(""),
            metrics,
        })))
    }

    /// The key called `name`, as it stands in Redis.
    #[must_use]
    pub fn key(&self, name: &str) -> String {
        [&self.0.prefix, name].concat()
    }

    /// From now on waits as long as `config` says, and who connects logs in as it says. A connection that works stays: its
    /// login was good when it was made. So does the prefix of keys.
    ///
    /// # Errors
    /// As [`Redis::new`].
    pub fn reconfigure(&self, config: &Config) -> anyhow::Result<()> {
        self.0.pool.set(Pool::new(config)?);
        self.0.timeout.set(config.timeout);
        // The new login may be what it has been waiting for.
        let mut state = self.state();
        if state.link.is_none() || state.up != Some(true) {
            (state.link, state.failures, state.closed_until) = (None, 0, None);
        }
        Ok(())
    }

    /// Runs `operation` on the shared connection, within the time-out and behind the breaker.
    ///
    /// # Errors
    /// [`Unavailable`] when it failed, took too long, or was not tried.
    pub async fn run<T, F>(
        &self,
        operation: Operation,
        action: impl FnOnce(Link) -> F,
    ) -> Result<T, Unavailable>
    where
        F: Future<Output = RedisResult<T>>,
    {
        let started = Instant::now();
        let note = |outcome| {
            self.0.metrics.redis_operations.inc((operation, outcome));
            if outcome != RedisOutcome::Skipped {
                self.0.metrics.redis_duration.observe((operation,), started.elapsed().as_secs_f64());
            }
        };
        if !self.may_try() {
            note(RedisOutcome::Skipped);
            return Err(Unavailable);
        }
        let whole = async { Ok(action(self.link().await?).await) };
        let running = timeout(**self.0.timeout.get(), whole);
        let outcome = trace::stage(Stage::Redis(operation), running, |outcome, facts| {
            facts.text("db.system.name", "redis");
            match came_to(outcome) {
                RedisOutcome::Ok => {}
                failure => facts.failed(failure.as_str()),
            }
        });
        let outcome = outcome.await;
        note(came_to(&outcome));
        match outcome {
            Ok(Ok(Ok(value))) => {
                self.succeeded(operation);
                return Ok(value);
            }
            Ok(Ok(Err(error))) => self.failed(operation, Some(&error)),
            Ok(Err(Unavailable)) | Err(_) => self.failed(operation, None),
        }
        Err(Unavailable)
    }

    /// A connection of the caller's own, for reads that block.
    ///
    /// # Errors
    /// [`Unavailable`] when none can be made.
    pub async fn own_link(&self) -> Result<Link, Unavailable> {
        let connecting = timeout(LINK, self.0.pool.snapshot().connect()).await;
        connecting.map_err(|_| None).and_then(|link| link.map_err(Some)).map_err(|error| {
            self.complain(error.as_ref());
            Unavailable
        })
    }

    /// As [`Redis::own_link`], with the reason where there is none and without a time-out, for whoever diagnoses.
    ///
    /// # Errors
    /// The driver's error. Its text may quote what a server said.
    pub async fn try_link(&self) -> RedisResult<Link> {
        self.0.pool.snapshot().connect().await
    }

    /// Whether it answers, and does what it is asked to.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.state().up == Some(true)
    }

    async fn link(&self) -> Result<Link, Unavailable> {
        if let Some(link) = self.state().link.clone() {
            return Ok(link);
        }
        // In a task of its own: connecting takes longer than an operation may, and the next
        // operation finds what this one did not wait for.
        let shared = Arc::clone(&self.0);
        let connecting = self.0.connecting.join((), || async move {
            let this = Self(shared);
            let link = this.own_link().await?;
            this.state().link = Some(link.clone());
            Ok(link)
        });
        connecting.await.unwrap_or(Err(Unavailable))
    }

    /// Whether the breaker lets an operation through. While it is open, one probe per pause is.
    fn may_try(&self) -> bool {
        let mut state = self.state();
        match state.closed_until {
            None => true,
            Some(until) if Instant::now() < until => false,
            Some(_) => {
                state.closed_until = Some(Instant::now() + state.pause);
                true
            }
        }
    }

    fn succeeded(&self, operation: Operation) {
        let mut state = self.state();
        state.failures = 0;
        state.silent = 0;
        state.pause = FIRST_PAUSE;
        state.closed_until = None;
        self.refused(&mut state, bit(operation), false);
        // One that answers pings and nothing else is not well.
        if state.refused == 0 && state.up != Some(true) {
            if state.up.replace(true).is_some() {
                state.complaints.clear();
            }
            info!("redis answers");
            self.0.metrics.redis_up.set((), 1);
        }
    }

    fn failed(&self, operation: Operation, error: Option<&RedisError>) {
        // A server that cannot write (a replica after a fail-over, one out of memory) still reads. Codes the
        // driver has no name for, such as OOM, MISCONF and NOREPLICAS, are extensions to it.
        let refused = error.is_some_and(|error| match error.kind() {
            ErrorKind::Server(kind) => {
                kind != ServerErrorKind::BusyLoading && kind != ServerErrorKind::ClusterDown
            }
            ErrorKind::Extension => !matches!(error.code(), Some("BUSY" | "NOAUTH")),
            _ => false,
        });
        let mut state = self.state();
        // One on which nobody has logged in is of no use for ever.
        let anonymous = error.is_some_and(|error| error.code() == Some("NOAUTH"));
        let broken = error.is_some_and(|error| error.is_io_error() || error.is_unrecoverable_error());
        let demoted = error.is_some_and(|error| error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly));
        let connected = state.link.is_some();
        if error.is_none() && connected {
            state.silent = state.silent.saturating_add(1);
        }
        // A link may die without a sign: the other side gone, a line cut, a load balancer that forgot it.
        // Nothing would ever come of waiting for it.
        if broken || anonymous || demoted || state.silent >= FAILURES {
            state.link = None;
            state.silent = 0;
        }
        if error.is_some_and(refuses) {
            self.refused(&mut state, bit(operation), true);
        }
        if !refused {
            state.failures = state.failures.saturating_add(1);
            if state.failures >= FAILURES {
                let pause = if state.pause.is_zero() { FIRST_PAUSE } else { state.pause };
                state.pause = (pause * 2).min(LONGEST_PAUSE);
                state.closed_until = Some(Instant::now() + pause);
                // What it would refuse is not known while it says nothing.
                self.refused(&mut state, u32::MAX, false);
                self.down(&mut state);
            }
        }
        drop(state);
        // Why there is no connection, whoever tries to make one tells.
        if error.is_some() || connected {
            self.complain(error);
        }
    }

    /// What came of a read on a connection of the caller's own.
    pub(crate) fn note_own(&self, error: Option<&RedisError>) {
        let mut state = self.state();
        if error.is_none_or(refuses) {
            self.refused(&mut state, OWN, error.is_some());
        }
        drop(state);
        // Connections end now and then; that something is refused has to be known.
        if let Some(error) = error.filter(|error| !error.is_io_error()) {
            self.complain(Some(error));
        }
    }

    /// Notes whether `operations` are refused by a server that answers.
    fn refused(&self, state: &mut State, operations: u32, refused: bool) {
        state.refused = if refused { state.refused | operations } else { state.refused & !operations };
        self.0.metrics.redis_refusing.set((), i64::from(state.refused != 0));
        if refused {
            self.down(state);
        }
    }

    fn down(&self, state: &mut State) {
        if state.up.replace(false) != Some(false) {
            self.0.metrics.redis_up.set((), 0);
        }
    }

    /// Logs that something could not be done, and why: the server's word for it, if there is one.
    pub(crate) fn complain(&self, error: Option<&RedisError>) {
        let reason = error.map_or("no answer in time", reason);
        if self.state().complaints.tell(reason) {
            warn!(reason, "redis is in trouble; the relay goes on without it");
        }
    }

    /// Held for a few assignments; nothing in between can panic, so poison is ignored.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bit(operation: Operation) -> u32 {
    1 << operation.index()
}

/// What stands for reads on connections of callers' own.
const OWN: u32 = 1 << 31;

/// What an operation came to, for the metrics.
fn came_to<T>(outcome: &Result<Result<RedisResult<T>, Unavailable>, Elapsed>) -> RedisOutcome {
    match outcome {
        Ok(Ok(Ok(_))) => RedisOutcome::Ok,
        Ok(Ok(Err(error))) if !error.is_io_error() => RedisOutcome::Refused,
        Ok(Ok(Err(_)) | Err(Unavailable)) => RedisOutcome::Unreachable,
        Err(_) => RedisOutcome::Timeout,
    }
}

impl ConnectionLike for Link {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::Node(link) => link.req_packed_command(cmd),
            Self::Cluster(link) => link.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::Node(link) => link.req_packed_commands(pipeline, offset, count),
            Self::Cluster(link) => link.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::Node(link) => link.get_db(),
            Self::Cluster(link) => link.get_db(),
        }
    }
}

/// Time enough for a busy machine.
#[cfg(test)]
const PATIENCE: Duration = Duration::from_millis(500);

#[cfg(test)]
impl Redis {
    /// A connection to a test's own server, with time enough for a busy machine.
    pub(crate) fn to(url: &str) -> Self {
        Self::of_mode(Mode::Single, &[url.to_owned()])
    }

    /// To a test's own cluster.
    pub(crate) fn to_cluster(urls: &[String]) -> Self {
        Self::of_mode(Mode::Cluster, urls)
    }

    fn of_mode(mode: Mode, urls: &[String]) -> Self {
        let urls: Vec<Url> = urls.iter().map(|url| url.parse().unwrap()).collect();
        let config = Config { mode, urls: urls.clone(), ..Config::single(urls[0].clone(), PATIENCE) };
        Self::new(&config, Metrics::new(), TaskTracker::new()).unwrap()
    }
}

#[cfg(test)]
mod tests {
    use deadpool_redis::redis::cmd;
    use tokio::net::TcpListener;

    use super::*;

    /// The driver's own time-out is ten times as long.
    const TIMEOUT: Duration = Duration::from_millis(50);

    fn redis(url: &str) -> (Redis, Metrics) {
        let (config, metrics) = (Config::single(url.parse().unwrap(), TIMEOUT), Metrics::new());
        (Redis::new(&config, metrics.clone(), TaskTracker::new()).unwrap(), metrics)
    }

    async fn ping(redis: &Redis) -> (bool, Duration) {
        let started = Instant::now();
        let ping = |mut link: Link| async move { cmd("PING").query_async::<String>(&mut link).await };
        (redis.run(Operation::Read, ping).await.is_ok(), started.elapsed())
    }

    #[tokio::test]
    async fn a_redis_that_refuses_is_not_up_until_it_does_what_it_refused() {
        let server = crate::redis_server::RedisServer::process(&["--maxmemory-policy", "noeviction"]).await;
        let redis = Redis::to(&server.url());
        let set = async || {
            let set = |mut link: Link| async move {
                cmd("SET").arg("k").arg("v").query_async::<String>(&mut link).await
            };
            redis.run(Operation::Store, set).await.is_ok()
        };
        assert!(ping(&redis).await.0 && set().await && redis.is_up());
        let _: String = server.ask(&["CONFIG", "SET", "maxmemory", "1"]).await;
        assert!(!set().await && !redis.is_up());
        assert!(ping(&redis).await.0 && !redis.is_up(), "it answers, and refuses still");
        // Somebody's key of another kind says nothing about the server.
        let _: String = server.ask(&["CONFIG", "SET", "maxmemory", "0"]).await;
        assert!(set().await && redis.is_up());
        let length = |mut link: Link| async move { cmd("HLEN").arg("k").query_async::<u32>(&mut link).await };
        assert!(redis.run(Operation::Store, length).await.is_err() && redis.is_up());
        // Nor is it forgotten by the breaker that it answers.
        let _: String = server.ask(&["CONFIG", "SET", "maxmemory", "1"]).await;
        for _ in 0..3 * FAILURES {
            assert!(!set().await);
        }
        assert!(ping(&redis).await.0);
    }

    #[tokio::test]
    async fn a_redis_that_says_nothing_is_waited_for_three_times_and_then_left_alone() {
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (redis, metrics) = redis(&format!("redis://{}", silent.local_addr().unwrap()));
        // The quickest of some: a busy machine may hold up any of them.
        let quickest = async |pings: u32| {
            let mut quickest = Duration::MAX;
            for _ in 0..pings {
                let (answered, took) = ping(&redis).await;
                assert!(!answered);
                quickest = quickest.min(took);
            }
            quickest
        };
        let waited = quickest(FAILURES).await;
        assert!(waited >= TIMEOUT && waited < 5 * TIMEOUT, "{waited:?}");
        let skipped = quickest(10).await;
        assert!(skipped < TIMEOUT / 2, "{skipped:?}");
        let count = |outcome| metrics.redis_operations.get((Operation::Read, outcome));
        assert!(count(RedisOutcome::Timeout) >= FAILURES.into() && count(RedisOutcome::Skipped) > 0);
        assert!(!redis.is_up());
    }

    #[tokio::test]
    async fn a_node_that_is_silent_keeps_nobody_from_a_cluster() {
        let nodes = crate::redis_server::RedisServer::cluster().await;
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silent = format!("redis://{}", silent.local_addr().unwrap());
        let urls: Vec<String> = [silent].into_iter().chain(nodes.iter().map(|node| node.url())).collect();
        let redis = Redis::to_cluster(&urls);
        let began = Instant::now();
        while !ping(&redis).await.0 {
            assert!(began.elapsed() < 2 * LINK, "no connection");
        }
    }

    #[tokio::test]
    async fn a_login_that_is_corrected_is_used_at_once() {
        let server = crate::redis_server::RedisServer::process(&["--requirepass", "word"]).await;
        let of = |login: &str| {
            let url = format!("redis://{login}127.0.0.1:{}", server.port());
            Config::single(url.parse().unwrap(), PATIENCE)
        };
        for wrong in ["", ":another@"] {
            let redis = Redis::new(&of(wrong), Metrics::new(), TaskTracker::new()).unwrap();
            for _ in 0..2 * FAILURES {
                assert!(!ping(&redis).await.0);
            }
            redis.reconfigure(&of(":word@")).unwrap();
            assert!(ping(&redis).await.0, "{wrong:?}");
        }
    }

    #[tokio::test]
    async fn many_who_find_no_connection_make_one() {
        let server = crate::redis_server::RedisServer::start().await;
        let redis = Redis::to(&server.url());
        let all = futures_util::future::join_all((0..50).map(|_| ping(&redis))).await;
        assert!(all.iter().all(|(answered, _)| *answered));
        let stats: deadpool_redis::redis::InfoDict = server.ask(&["INFO", "clients"]).await;
        // This one's, and that of whoever asks how many there are.
        let clients: u32 = stats.get("connected_clients").unwrap();
        assert!(clients <= 3, "{clients} connections");
    }
}
