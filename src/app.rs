//! The whole relay, put together. It alone knows all parts; it decides nothing they could decide.

use std::{sync::Arc, time::Duration};

use tokio::{net::TcpListener, runtime::Handle, time::sleep};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{error, info, warn};

use crate::{
    admin::{self, Admin},
    auth::Authenticator,
    cache::{Cached, redis::RedisTier},
    clock::Clock,
    cyberscan::{Breaker, Client, latency::Latencies},
    egress::{self, Http},
    enrich::Enricher,
    http::{
        self, Relay,
        server::Front,
        tls::{Pair, TlsAcceptor},
    },
    limiter::Limiter,
    live::Live,
    metrics::{Listener, Metrics},
    redis_pool::{self, Redis},
    reload::Reloads,
    settings::{Fault, Faults, Settings},
    telemetry::LogLevel,
    trace::{Exporting, Traces},
    worker::Worker,
};

/// How long background tasks may take to end after the last request.
const LAST_TASKS: Duration = Duration::from_secs(2);
/// How long a relay that starts waits for Redis.
const FIRST_CONNECTION: Duration = Duration::from_secs(1);

/// Everything that serving needs and might not get: files have been read, TLS and the connections' clients are set up.
/// Nothing is connected yet, and no port is taken.
pub struct Prepared {
    settings: Settings,
    clock: Clock,
    tasks: TaskTracker,
    metrics: Metrics,
    egress: Http,
    traces: (Traces, Exporting),
    redis: Option<Redis>,
    tls: Option<Pair>,
}

/// Sets up what `settings` say. Both `check` and `serve` go through here, so that the one finds what the other would.
///
/// # Errors
/// All parts that cannot be set up.
pub fn prepare(settings: Settings) -> Result<Prepared, Faults> {
    let mut faults = Vec::new();
    let source = |key: &str| {
        let set = settings.effective().iter().find(|set| set.key == key);
        set.map_or_else(|| "set-up".to_owned(), |set| set.source.clone())
    };
    // What a library says might quote a secret: it is not repeated.
    let mut fault = |key: &str, message: String| {
        faults.push(Fault { key: key.to_owned(), source: source(key), message });
    };
    let (tasks, metrics) = (TaskTracker::new(), Metrics::new());
    let egress = Http::new(&settings.egress);
    if let Err(error) = &egress {
        let told = error.downcast_ref::<egress::tls::SetUpError>().map(ToString::to_string);
        fault("egress", told.unwrap_or_else(|| "calls through egress.proxy cannot be set up".to_owned()));
    }
    let traces = Traces::new(settings.traces.as_ref(), &settings.egress);
    if traces.is_err() {
        fault("telemetry.otlp_endpoint", "calls to the collector cannot be set up".to_owned());
    }
    let redis = settings.redis.as_ref().map(|config| Redis::new(config, metrics.clone(), tasks.clone()));
    let redis = redis.transpose();
    if let Err(error) = &redis {
        match error.downcast_ref::<redis_pool::FileFault>() {
            Some(file) => fault(file.setting, format!("{}: {}", file.path.display(), file.reason)),
            None => fault("redis.url", "the connection cannot be set up".to_owned()),
        }
    }
    let tls = settings.http.tls.as_ref().map(Pair::load).transpose();
    if let Err(error) = &tls {
        fault(error.setting, format!("{}: {}", error.path.display(), error.fault));
    }
    match (egress, traces, redis, tls) {
        (Ok(egress), Ok(traces), Ok(redis), Ok(tls)) => {
            Ok(Prepared { settings, clock: Clock::system(), tasks, metrics, egress, traces, redis, tls })
        }
        _ => Err(Faults(faults)),
    }
}

/// Prepares `settings` and serves as [`serve`] does, without reloads.
///
/// # Errors
/// When a part cannot be set up: a certificate file that cannot be read, TLS without any root.
pub async fn run(
    settings: Settings,
    listener: TcpListener,
    admin: Option<(TcpListener, LogLevel)>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    serve(prepare(settings)?, listener, admin, None, shutdown).await
}

/// Serves on `listener` until `shutdown` is cancelled and everything under way has ended; operators are served
/// on that of `admin`. The settings change as `reloads` say.
///
/// # Errors
/// When a listener is gone.
pub async fn serve(
    prepared: Prepared,
    listener: TcpListener,
    admin: Option<(TcpListener, LogLevel)>,
    reloads: Option<Reloads>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let Prepared { settings, clock, tasks, metrics, egress, traces: (traces, exporting), redis, tls } =
        prepared;
    for Fault { key, source, message } in settings.warnings() {
        warn!(key, source, "the configuration looks odd: {key} {message}");
    }
    let started = settings.clone();
    let background = CancellationToken::new();
    exporting.start(&tasks, background.clone());
    let authenticator = Authenticator::new(
        settings.auth,
        settings.cyberscan.hosts.clone(),
        egress.clone(),
        clock,
        metrics.clone(),
        tasks.clone(),
    );
    // Without a Redis nothing is missing.
    metrics.redis_up.set((), i64::from(redis.is_none()));
    let with_redis = redis.is_some();
    let for_worker = redis.clone();
    let shared = redis.clone().map(RedisTier::new);
    let latencies = Latencies::default();
    let limiter =
        Limiter::new(settings.limiter, redis.clone(), latencies.clone(), metrics.clone(), tasks.clone());
    tasks.spawn(limiter.clone().tidy(background.clone()));
    if let Some(tier) = shared.clone() {
        let hearing = limiter.clone();
        tier.hear_pauses(move |tenant, pause| hearing.hear_pause(tenant, pause));
        let telling = tasks.clone();
        limiter.announce_pauses(move |tenant, pause| {
            let (tier, tenant) = (tier.clone(), Arc::clone(tenant));
            telling.spawn(async move { tier.announce_pause(&tenant, pause).await });
        });
    }
    let client = Client::new(
        settings.cyberscan,
        egress,
        limiter.clone(),
        latencies,
        clock,
        metrics.clone(),
        tasks.clone(),
    );
    let breaker = Breaker::new(client.clone());
    let cached = Cached::new(
        breaker.clone(),
        settings.cache,
        shared.clone(),
        metrics.clone(),
        tasks.clone(),
        background.clone(),
    );
    if let Some(shared) = shared {
        // The first requests would go to CyberScan for what Redis has.
        shared.connected(FIRST_CONNECTION).await;
    }
    let worker = settings.worker.enabled.then(|| {
        let notes = cached.notes();
        Worker::new(cached.clone(), notes, settings.worker, for_worker, metrics.clone(), tasks.clone())
    });
    if let Some(worker) = worker.clone() {
        tasks.spawn(worker.run(background.clone()));
    }
    let enricher = Enricher::new(cached.clone(), settings.enrich);
    let administration = Live::new(settings.admin);
    let shutdown_delay = Live::new(settings.shutdown_delay);
    let relay = Relay::new(
        authenticator.clone(),
        enricher.clone(),
        limiter.clone(),
        clock,
        &settings.http,
        metrics.clone(),
    );
    let service = http::service(&relay, traces);
    let tls = tls.map(|pair| TlsAcceptor::new(pair, clock, metrics.clone()));
    if let Some(tls) = tls.clone() {
        tasks.spawn(tls.watch(background.clone()));
    }
    metrics.config_reloaded.set((), 1);
    metrics.config_reloaded_at.set((), clock.unix());
    if let Some(reloads) = reloads {
        let (authenticator, limiter, cached) = (authenticator.clone(), limiter.clone(), cached.clone());
        let (administration, shutdown_delay) = (administration.clone(), shutdown_delay.clone());
        let tls = tls.clone();
        let apply = move |new: &Settings, changed: bool| {
            // Also where all keys are as they were: what the files hold may be new.
            if let (Some(tls), Some(files)) = (&tls, &new.http.tls)
                && let Err(error) = tls.reload(files)
            {
                error!(%error, "the TLS certificate stays as it was");
            }
            if !changed {
                return;
            }
            if let (Some(redis), Some(config)) = (&redis, &new.redis)
                && redis.reconfigure(config).is_err()
            {
                warn!("the settings of Redis stay as they were");
            }
            limiter.reconfigure(new.limiter.clone());
            client.reconfigure(new.cyberscan.clone());
            cached.reconfigure(new.cache.clone());
            if let Some(worker) = &worker {
                worker.reconfigure(new.cyberscan.hosts.clone(), new.worker.refresh_ahead);
            }
            enricher.reconfigure(new.enrich);
            administration.set(new.admin.clone());
            shutdown_delay.set(new.shutdown_delay);
            relay.reconfigure(&new.http);
            // Last: who is let in from now on finds everything else as it is meant.
            authenticator.reconfigure(new.auth.clone(), new.cyberscan.hosts.clone());
        };
        let check = |settings| prepare(settings).map(drop);
        let following = reloads.follow(started, check, apply, (metrics.clone(), clock), background.clone());
        tasks.spawn(following);
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
            config: administration,
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
        sleep(**shutdown_delay.get()).await;
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
