//! The whole relay, put together. It alone knows all parts; it decides nothing they could decide.

use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use crate::{
    auth::Authenticator,
    cache::{Cached, redis::RedisTier},
    clock::Clock,
    cyberscan::{Breaker, Client},
    egress::Http,
    enrich::Enricher,
    http::{self, Relay},
    limiter::Limiter,
    metrics::Metrics,
    redis_pool::Redis,
    settings::Settings,
};

/// How long background tasks may take to end after the last request.
const LAST_TASKS: Duration = Duration::from_secs(2);

/// Serves on `listener` until `shutdown` is cancelled and everything under way has ended.
///
/// # Errors
/// When a part cannot be set up: a certificate file that cannot be read, TLS without any root.
pub async fn run(
    settings: Settings,
    listener: TcpListener,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    if settings.auth.audiences.is_empty() {
        warn!("auth.audiences is not set: the audience of tokens is derived from each request's Host header");
    }
    let clock = Clock::system();
    let tasks = TaskTracker::new();
    let metrics = Metrics::new();
    let egress = Http::new(&settings.egress)?;
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
    let shared = redis.clone().map(|redis| RedisTier::new(redis, clock));
    let limiter = Limiter::new(settings.limiter, redis, metrics.clone(), tasks.clone());
    let client =
        Client::new(settings.cyberscan, egress, limiter.clone(), clock, metrics.clone(), tasks.clone());
    let client = Breaker::new(client);
    let background = CancellationToken::new();
    let cached =
        Cached::new(client, settings.cache, shared, clock, metrics, tasks.clone(), background.clone());
    let enricher = Enricher::new(cached, settings.enrich);
    let service = http::service(&Relay::new(authenticator, enricher, clock, &settings.http));

    info!(listen = %listener.local_addr()?, version = env!("CARGO_PKG_VERSION"), "ready");
    http::server::serve(listener, service, settings.http.connections, shutdown).await;
    background.cancel();
    tasks.close();
    if tokio::time::timeout(LAST_TASKS, tasks.wait()).await.is_err() {
        warn!(tasks = tasks.len(), "background tasks did not end in time");
    }
    info!("stopped");
    Ok(())
}
