//! The whole relay, put together. It alone knows all parts; it decides nothing they could decide.

use std::time::Duration;

use tokio::{net::TcpListener, runtime::Handle, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    admin::{self, Admin},
    auth::Authenticator,
    cache::{Cached, redis::RedisTier},
    clock::Clock,
    cyberscan::{Breaker, Client},
    egress::Http,
    enrich::Enricher,
    http::{
        self, Relay,
        server::Front,
        tls::{Pair, TlsAcceptor},
    },
    limiter::Limiter,
    metrics::{Listener, Metrics},
    redis_pool::Redis,
    settings::Settings,
    telemetry::LogLevel,
    trace::Traces,
    worker::Worker,
};

/// How long background tasks may take to end after the last request.
const LAST_TASKS: Duration = Duration::from_secs(2);

/// Serves on `listener` until `shutdown` is cancelled and everything under way has ended; operators are served
/// on that of `admin`.
///
/// # Errors
/// When a part cannot be set up: a certificate file that cannot be read, TLS without any root.
pub async fn run(
    settings: Settings,
    listener: TcpListener,
    admin: Option<(TcpListener, LogLevel)>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    if settings.auth.audiences.is_empty() {
        warn!("auth.audiences is not set: the audience of tokens is derived from each request's Host header");
    }
    let clock = Clock::system();
    let tasks = TaskTracker::new();
    let metrics = Metrics::new();
    let background = CancellationToken::new();
    let egress = Http::new(&settings.egress)?;
    let traces = Traces::start(settings.traces.as_ref(), &settings.egress, &tasks, background.clone())?;
    let authenticator = Authenticator::new(
        settings.auth,
        settings.cyberscan.hosts.clone(),
        egress.clone(),
        clock,
        metrics.clone(),
        tasks.clone(),
    );
    let redis = match &settings.redis {
        Some(config) => Some(Redis::new(config, metrics.clone(), tasks.clone())?),
        None => None,
    };
    // Without a Redis nothing is missing.
    metrics.redis_up.set((), i64::from(redis.is_none()));
    let with_redis = redis.is_some();
    let for_worker = redis.clone();
    let shared = redis.clone().map(|redis| RedisTier::new(redis, clock));
    let limiter = Limiter::new(settings.limiter, redis, metrics.clone(), tasks.clone());
    let client =
        Client::new(settings.cyberscan, egress, limiter.clone(), clock, metrics.clone(), tasks.clone());
    let breaker = Breaker::new(client);
    let cached = Cached::new(
        breaker.clone(),
        settings.cache,
        shared,
        clock,
        metrics.clone(),
        tasks.clone(),
        background.clone(),
    );
    if settings.worker.enabled {
        let notes = cached.notes();
        let worker =
            Worker::new(cached.clone(), notes, settings.worker, for_worker, metrics.clone(), tasks.clone());
        tasks.spawn(worker.run(background.clone()));
    }
    let enricher = Enricher::new(cached.clone(), settings.enrich);
    let relay =
        Relay::new(authenticator.clone(), enricher, limiter.clone(), clock, &settings.http, metrics.clone());
    let service = http::service(&relay, traces);
    let tls = match &settings.http.tls {
        Some(files) => Some(TlsAcceptor::new(Pair::load(files)?, clock, metrics.clone())),
        None => None,
    };
    if let Some(tls) = tls.clone() {
        tasks.spawn(tls.watch(background.clone()));
    }
    let front = Front { listener: Listener::Public, tls, metrics: metrics.clone() };
    let administered = admin.as_ref().map(|(listener, _)| listener.local_addr()).transpose()?;
    if let Some((listener, log)) = admin {
        let (measured, cache, runtime) = (metrics.clone(), cached.clone(), Handle::current().metrics());
        let measure = move || {
            measured.tasks.set((), i64::try_from(runtime.num_alive_tasks()).unwrap_or(i64::MAX));
            cache.measure();
            limiter.measure();
            breaker.measure(&measured);
            authenticator.measure();
        };
        let admin = Admin {
            cache: cached,
            metrics: metrics.clone(),
            measure: Box::new(measure),
            log,
            redis: with_redis,
            config: settings.admin,
        };
        tasks.spawn(admin::serve(listener, admin, background.clone()));
    }

    metrics.ready.set((), 1);
    info!(
        listen = %listener.local_addr()?,
        tls = front.tls.is_some(),
        admin = administered.map(tracing::field::display),
        version = env!("CARGO_PKG_VERSION"),
        "ready"
    );
    // Told first that no more should come, then nothing more is taken.
    let draining = CancellationToken::new();
    let tell = async {
        shutdown.cancelled().await;
        metrics.ready.set((), 0);
        info!("draining");
        sleep(settings.shutdown_delay).await;
        draining.cancel();
    };
    let serving = http::server::serve(listener, service, settings.http.connections, front, draining.clone());
    tokio::join!(serving, tell);
    background.cancel();
    tasks.close();
    if tokio::time::timeout(LAST_TASKS, tasks.wait()).await.is_err() {
        warn!(tasks = tasks.len(), "background tasks did not end in time");
    }
    info!("stopped");
    Ok(())
}
