//! Redis, as the rest of the relay sees it: an operation that ends within its time or is
//! [`Unavailable`]. It owns connections, their time-outs, the breaker and reconnection, for a single
//! server, Sentinel and Cluster alike; it must not know what is stored.
//!
//! deadpool-redis makes the connections. Each checkout of it pings, which doubles the round trips,
//! so the hot path uses a clone of one pooled multiplexed connection and gives it up only when it
//! breaks. Blocking reads take a connection of their own from the pool.

use std::{
    borrow::Cow,
    fmt,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use deadpool_redis::{
    ConnectionAddr, ConnectionInfo, ProtocolVersion, RedisConnectionInfo, Runtime,
    cluster::ClusterConnection,
    redis::{
        Cmd, ErrorKind, Pipeline, RedisError, RedisFuture, RedisResult, ServerErrorKind, Value,
        aio::{ConnectionLike, MultiplexedConnection},
    },
    sentinel,
};
use percent_encoding::percent_decode_str;
use tokio::time::{Instant, error::Elapsed, timeout};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

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
    /// `redis.timeout`: how long one operation may take.
    pub timeout: Duration,
}

/// What `redis.url` leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// One server.
    Single,
    /// Sentinels, who know the master.
    Sentinel,
    /// Nodes of a cluster.
    Cluster,
}

impl std::str::FromStr for Mode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "single" => Ok(Self::Single),
            "sentinel" => Ok(Self::Sentinel),
            "cluster" => Ok(Self::Cluster),
            _ => Err(()),
        }
    }
}

/// What a `redis://` or `rediss://` URL says. It may contain a password, so it shows itself nowhere.
#[derive(Clone, PartialEq)]
pub struct Url {
    tls: bool,
    host: String,
    port: u16,
    database: i64,
    resp3: bool,
    login: Login,
}

/// User and password, decoded.
#[derive(Clone, Default, PartialEq)]
struct Login {
    user: Option<String>,
    password: Option<String>,
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Url(..)")
    }
}

/// Why a text is no URL of Redis. It does not repeat the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotARedis {
    /// Another scheme, or none.
    #[error("it begins with redis:// or, for TLS, rediss://")]
    Scheme,
    /// No URL.
    #[error("host or port cannot be read; @, /, : and # in a password are percent-encoded")]
    Form,
    /// User or password are no text.
    #[error("user or password are not percent-encoded UTF-8")]
    Login,
    /// The path is no number.
    #[error("the path is the number of a database: /0")]
    Database,
    /// A parameter nobody knows.
    #[error("of parameters there is only protocol=resp2 or protocol=resp3")]
    Parameter,
    /// `#insecure`, for instance.
    #[error("no # in it; certificates are always verified")]
    Fragment,
}

/// The one reader of such URLs, whatever they lead to.
impl std::str::FromStr for Url {
    type Err = NotARedis;

    fn from_str(text: &str) -> Result<Self, NotARedis> {
        let (scheme, _) = text.split_once("://").ok_or(NotARedis::Scheme)?;
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "redis" => false,
            "rediss" => true,
            _ => return Err(NotARedis::Scheme),
        };
        if text.contains('#') {
            return Err(NotARedis::Fragment);
        }
        let url = url::Url::parse(text).map_err(|_| NotARedis::Form)?;
        let decoded = |text: &str| {
            percent_decode_str(text).decode_utf8().map(Cow::into_owned).map_err(|_| NotARedis::Login)
        };
        // Of a scheme it does not know the parser takes nearly anything for a host.
        let host = url.host_str().map(url::Host::parse).and_then(Result::ok).ok_or(NotARedis::Form)?;
        let host = match host {
            url::Host::Domain(name) => name,
            url::Host::Ipv4(ip) => ip.to_string(),
            url::Host::Ipv6(ip) => ip.to_string(),
        };
        let port = url.port().unwrap_or(6379);
        if port == 0 {
            return Err(NotARedis::Form);
        }
        let database = match url.path().trim_matches('/') {
            "" => 0,
            digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.parse::<u16>().map_err(|_| NotARedis::Database)?.into()
            }
            _ => return Err(NotARedis::Database),
        };
        let mut resp3 = false;
        for (name, value) in url.query_pairs() {
            resp3 = match (&*name, &*value) {
                ("protocol", "2" | "resp2") => false,
                ("protocol", "3" | "resp3") => true,
                _ => return Err(NotARedis::Parameter),
            };
        }
        let user = (!url.username().is_empty()).then(|| decoded(url.username())).transpose()?;
        let password = url.password().filter(|text| !text.is_empty()).map(decoded).transpose()?;
        Ok(Self { tls, host, port, database, resp3, login: Login { user, password } })
    }
}

impl Url {
    /// For the driver; of Sentinel's own connections the database and of nobody else's is left out.
    fn connection(&self) -> ConnectionInfo {
        let (host, port) = (self.host.clone(), self.port);
        let addr = if self.tls {
            ConnectionAddr::TcpTls { host, port, insecure: false }
        } else {
            ConnectionAddr::Tcp(host, port)
        };
        ConnectionInfo { addr, redis: self.settings() }
    }

    fn settings(&self) -> RedisConnectionInfo {
        let Login { user, password } = self.login.clone();
        let protocol = if self.resp3 { ProtocolVersion::RESP3 } else { ProtocolVersion::RESP2 };
        RedisConnectionInfo { db: self.database, username: user, password, protocol }
    }

    /// The same, whoever logs in.
    #[must_use]
    pub fn without_login(&self) -> Self {
        Self { login: Login::default(), ..self.clone() }
    }
}

/// Whether `urls` can be used together in `mode`.
///
/// # Errors
/// Why they cannot.
pub fn fit(urls: &[Url], mode: Mode) -> Result<(), &'static str> {
    let Some((first, others)) = urls.split_first() else { return Ok(()) };
    match mode {
        Mode::Single if !others.is_empty() => {
            Err("expected one URL in mode single; several are for redis.mode sentinel or cluster")
        }
        Mode::Cluster if urls.iter().any(|url| url.database != 0) => {
            Err("expected no database: a cluster has none but 0")
        }
        Mode::Sentinel | Mode::Cluster
            if others.iter().any(|url| url.login != first.login || url.tls != first.tls) =>
        {
            Err("expected the same user, password and scheme in all URLs")
        }
        Mode::Sentinel if others.iter().any(|url| url.database != first.database) => {
            Err("expected the same database in all URLs: it is the master's")
        }
        Mode::Single | Mode::Sentinel | Mode::Cluster => Ok(()),
    }
}

impl Url {
    /// Where it leads: host and port, nothing else.
    #[must_use]
    pub fn place(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    /// Whether it leads to this machine itself.
    #[must_use]
    pub fn is_local(&self) -> bool {
        let address = self.host.parse::<std::net::IpAddr>();
        self.host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }

    /// Whether it asks for TLS.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.tls
    }

    /// Whether it has a password.
    #[must_use]
    pub fn has_password(&self) -> bool {
        self.login.password.is_some()
    }
}

/// The operation did not happen, or nobody knows whether it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("redis is not available")]
pub struct Unavailable;

/// Failures in a row that open the breaker.
const FAILURES: u32 = 3;
/// How long the breaker stays open: doubled with each failed probe up to the second.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How long a connection may take to come up.
const CONNECT: Duration = Duration::from_secs(1);
/// How often at most trouble with Redis is logged.
const COMPLAINT: Duration = Duration::from_secs(60);
/// Connections in the pool: the shared one, one for blocking reads, and room to replace them.
const POOL: usize = 4;

/// The connection to Redis; a cheap clone.
#[derive(Clone)]
pub struct Redis(Arc<Shared>);

struct Shared {
    pool: Live<Pool>,
    timeout: Live<Duration>,
    state: Mutex<State>,
    connecting: Flights<(), Result<Link, Unavailable>>,
    metrics: Metrics,
}

enum Pool {
    Single(deadpool_redis::Pool),
    Sentinel(sentinel::Pool),
    Cluster(deadpool_redis::cluster::Pool),
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
    complained: Option<Instant>,
    up: Option<bool>,
    /// Operations, a bit each, that were refused when they were last tried, by a server that answers.
    refused: u32,
}

impl Redis {
    /// A connection as `config` says; nothing is connected yet.
    ///
    /// # Errors
    /// When the URLs do not fit the mode.
    pub fn new(config: &Config, metrics: Metrics, tasks: TaskTracker) -> anyhow::Result<Self> {
        let pool = Pool::new(config)?;
        Ok(Self(Arc::new(Shared {
            pool: Live::new(pool),
            timeout: Live::new(config.timeout),
            state: Mutex::default(),
            connecting: Flights::new(tasks),
            metrics,
        })))
    }

    /// From now on waits as long as `config` says, and who connects logs in as it says. The connection there is stays: its
    /// login was good when it was made.
    ///
    /// # Errors
    /// When the URLs do not fit the mode.
    pub fn reconfigure(&self, config: &Config) -> anyhow::Result<()> {
        self.0.pool.set(Pool::new(config)?);
        self.0.timeout.set(config.timeout);
        // The new login may be what it has been waiting for.
        let mut state = self.state();
        if state.link.is_none() {
            (state.failures, state.closed_until) = (0, None);
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
        timeout(CONNECT, self.0.pool.snapshot().connect()).await.map_err(|_| Unavailable)?.map_err(|error| {
            self.complain(Some(&error));
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
            let link = timeout(CONNECT, shared.pool.snapshot().connect()).await.map_err(|_| Unavailable)?;
            let this = Self(shared);
            match link {
                Ok(link) => {
                    this.state().link = Some(link.clone());
                    Ok(link)
                }
                Err(error) => {
                    this.complain(Some(&error));
                    Err(Unavailable)
                }
            }
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
        state.refused &= !bit(operation);
        // One that answers pings and nothing else is not well.
        if state.refused == 0 && state.up.replace(true) != Some(true) {
            state.complained = None;
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
        let broken = error.is_some_and(|error| error.is_io_error() || error.is_unrecoverable_error());
        let demoted = error.is_some_and(|error| error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly));
        if error.is_none() && state.link.is_some() {
            state.silent = state.silent.saturating_add(1);
        }
        // A link may die without a sign: the other side gone, a line cut, a load balancer that forgot it.
        // Nothing would ever come of waiting for it.
        if broken || demoted || state.silent >= FAILURES {
            state.link = None;
            state.silent = 0;
        }
        if error.is_some_and(refuses) {
            state.refused |= bit(operation);
            if state.up.replace(false) != Some(false) {
                self.0.metrics.redis_up.set((), 0);
            }
        }
        if !refused {
            state.failures = state.failures.saturating_add(1);
            if state.failures >= FAILURES {
                let pause = if state.pause.is_zero() { FIRST_PAUSE } else { state.pause };
                state.pause = (pause * 2).min(LONGEST_PAUSE);
                state.closed_until = Some(Instant::now() + pause);
                if state.up.replace(false) != Some(false) {
                    self.0.metrics.redis_up.set((), 0);
                }
            }
        }
        drop(state);
        self.complain(error);
    }

    /// Logs that something could not be done, and the server's word for why.
    pub(crate) fn complain(&self, error: Option<&RedisError>) {
        let mut state = self.state();
        if state.complained.is_none_or(|last| last.elapsed() >= COMPLAINT) {
            state.complained = Some(Instant::now());
            // The error's class only: its text may quote a command.
            let reason = error.map_or("no answer in time", |error| {
                let word =
                    |code: &&str| code.len() <= 20 && code.bytes().all(|byte| byte.is_ascii_uppercase());
                error.code().filter(word).unwrap_or_else(|| error.category())
            });
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

/// Whether a server that answers says that it will not do such a thing for now: out of memory, not permitted, not the
/// master, unable to keep it.
fn refuses(error: &RedisError) -> bool {
    matches!(error.code(), Some("OOM" | "NOPERM" | "READONLY" | "MISCONF" | "NOREPLICAS"))
}

/// What an operation came to, for the metrics.
fn came_to<T>(outcome: &Result<Result<RedisResult<T>, Unavailable>, Elapsed>) -> RedisOutcome {
    match outcome {
        Ok(Ok(Ok(_))) => RedisOutcome::Ok,
        Ok(Ok(Err(error))) if !error.is_io_error() => RedisOutcome::Refused,
        Ok(Ok(Err(_)) | Err(Unavailable)) => RedisOutcome::Unreachable,
        Err(_) => RedisOutcome::Timeout,
    }
}

impl Pool {
    /// Connects nowhere yet.
    fn new(config: &Config) -> anyhow::Result<Self> {
        let runtime = Some(Runtime::Tokio1);
        let connections = config.urls.iter().map(Url::connection);
        let Some(first) = config.urls.first() else { anyhow::bail!("redis.url is not set") };
        fit(&config.urls, config.mode).map_err(anyhow::Error::msg)?;
        Ok(match config.mode {
            Mode::Single => {
                let mut config = deadpool_redis::Config::from_connection_info(first.connection());
                config.pool = Some(deadpool_redis::PoolConfig::new(POOL));
                Self::Single(config.create_pool(runtime)?)
            }
            Mode::Sentinel => {
                // The database is the master's: sentinels have none.
                let sentinel = |mut connection: ConnectionInfo| {
                    connection.redis.db = 0;
                    connection
                };
                let config = sentinel::Config {
                    urls: None,
                    server_type: sentinel::SentinelServerType::Master,
                    master_name: config.master_name.clone(),
                    connections: Some(connections.map(sentinel).collect()),
                    // Sentinels and the master share user and password, as in the URL.
                    node_connection_info: Some(sentinel::SentinelNodeConnectionInfo {
                        tls_mode: first.tls.then_some(sentinel::TlsMode::Secure),
                        redis_connection_info: Some(first.settings()),
                    }),
                    pool: Some(sentinel::PoolConfig::new(POOL)),
                };
                Self::Sentinel(config.create_pool(runtime)?)
            }
            Mode::Cluster => {
                let config = deadpool_redis::cluster::Config {
                    urls: None,
                    connections: Some(connections.collect()),
                    pool: Some(deadpool_redis::cluster::PoolConfig::new(POOL)),
                    read_from_replicas: false,
                };
                Self::Cluster(config.create_pool(runtime)?)
            }
        })
    }

    async fn connect(&self) -> RedisResult<Link> {
        match self {
            Self::Single(pool) => {
                Ok(Link::Node(deadpool_redis::Connection::take(pool.get().await.map_err(inner)?)))
            }
            Self::Sentinel(pool) => {
                Ok(Link::Node(sentinel::Connection::take(pool.get().await.map_err(inner)?)))
            }
            Self::Cluster(pool) => {
                Ok(Link::Cluster(deadpool_redis::cluster::Connection::take(pool.get().await.map_err(inner)?)))
            }
        }
    }
}

/// The Redis error behind a pool's.
fn inner(error: deadpool_redis::PoolError) -> RedisError {
    match error {
        deadpool_redis::PoolError::Backend(error) => error,
        _ => RedisError::from((ErrorKind::Io, "no connection from the pool")),
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
        let urls = urls.iter().map(|url| url.parse().unwrap()).collect();
        let config = Config { urls, mode, master_name: String::new(), timeout: CONNECT };
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
        let (urls, metrics) = (vec![url.parse().unwrap()], Metrics::new());
        let config = Config { urls, mode: Mode::Single, master_name: String::new(), timeout: TIMEOUT };
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
