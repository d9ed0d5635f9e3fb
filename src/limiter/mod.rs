//! How many calls may be made, and who makes them first. It owns quotas, waiting and pauses; it must
//! not know what is asked or answered.
//!
//! Every request to CyberScan, token calls and repetitions too, takes a permit here first. What happens to a call
//! that waits, from room to room:
//!
//! - `queue`, `line`: it stands in its tenant's line until it is its turn, or refused when it could not be answered in time.
//! - `quota`: for who is first, a tenant's windows and the fleet's are asked.
//! - `pause`: not while CyberScan, with a 429, has asked to be left alone.
//! - `account`: the windows of a tenant, or of the fleet. Of these, in this order:
//!   - `local`, of a `bucket` for each window: this replica's token buckets (governor) space calls; what they refuse goes no
//!     further;
//!   - `ledger`, of `calls` by part: what this replica knows of calls made, by itself and by others;
//!   - `shared`: Redis counts for all replicas, and is told in a `report` what it does not know. While it is away each
//!     replica keeps to a share.
//!
//! Until all gates have agreed the calls are a `reservation`.

mod account;
mod bucket;
mod calls;
mod config;
mod ledger;
mod line;
mod local;
mod pause;
mod queue;
mod quota;
mod report;
mod reservation;
mod shared;
#[cfg(test)]
mod tests;
pub mod window;

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures_util::{StreamExt, future::BoxFuture, stream};
use moka::{policy::EvictionPolicy, sync::Cache};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

use self::{
    account::Account,
    line::{Queue, Refused},
    pause::Pauses,
    queue::Queues,
    quota::{Quota as _, Windows},
    shared::Shared,
    window::Window,
};
pub use self::{config::Config, line::Permit};
use crate::{
    cyberscan::{Admission, Call, Error, Pace, Priority, QuotaUse, Quotas, latency::Latencies},
    live::Live,
    metrics::{Decision, DryRun, Label, Metrics, QuotaScope, QuotaWindow, Urgency},
    redis_pool::Redis,
    tenant::{Tenant, TenantId},
};

/// Tenants that are remembered.
const TENANTS: u64 = 10_000;
/// How often is looked for what Redis has to be told, and for accounts that have not been used for long.
const TIDY: Duration = Duration::from_secs(1);
/// Accounts that are looked after at once.
const ABREAST: usize = 64;
/// The fleet's name in Redis; tenants' have 32 digits.
const FLEET: &str = "fleet";

/// The limiter; a cheap clone.
#[derive(Clone)]
pub struct Limiter(Arc<Inner>);

/// Who is told of a pause: a tenant's name, and how long.
type Announce = Box<dyn Fn(&Arc<str>, Duration) + Send + Sync>;

struct Inner {
    config: Live<Config>,
    shared: Option<Shared>,
    queues: Queues<Arc<Windows>>,
    tenants: Cache<TenantId, Arc<Queue<Account>>>,
    latencies: Latencies,
    announce: OnceLock<Announce>,
    started: Instant,
    metrics: Metrics,
}

impl Limiter {
    /// A limiter as `config` says; `redis` is where the fleet's quotas are counted, and `latencies` how long calls take.
    #[must_use]
    pub fn new(
        config: Config,
        redis: Option<Redis>,
        latencies: Latencies,
        metrics: Metrics,
        tasks: TaskTracker,
    ) -> Self {
        let (started, shared) = (Instant::now(), redis.map(Shared::new));
        let fleet = Account::new(FLEET.into(), config.fleet.clone(), config.terms(), shared.clone(), started);
        let windows = Arc::new(Windows::new(fleet, Pauses::default()));
        Self(Arc::new(Inner {
            queues: Queues::new(windows, tasks),
            // A tenant that is new always finds a place: what it has used is not to be forgotten at once.
            tenants: Cache::builder().max_capacity(TENANTS).eviction_policy(EvictionPolicy::lru()).build(),
            config: Live::new(config),
            shared,
            latencies,
            announce: OnceLock::new(),
            started,
            metrics,
        }))
    }

    /// Limits as `config` says from now on. A window of the same length goes on counting; how many calls may be under
    /// way at once does not change.
    pub fn reconfigure(&self, config: Config) {
        let old = self.0.config.snapshot();
        let config = Config { concurrency: old.concurrency, ..config };
        // First for those who are new, then for those there are.
        self.0.config.set(config.clone());
        self.windows().fleet.reconfigure(&config.fleet, config.terms());
        for (_, queue) in &self.0.tenants {
            queue.account.reconfigure(config.windows_of(queue.account.name()), config.terms());
            queue.forget_estimate();
        }
        self.0.queues.forget_estimate();
    }

    /// Has `announce` told of every pause that CyberScan asks for, to pass it on to other replicas.
    pub fn announce_pauses(&self, announce: impl Fn(&Arc<str>, Duration) + Send + Sync + 'static) {
        let _ = self.0.announce.set(Box::new(announce));
    }

    /// Another replica was asked for a pause: the tenant of that name in logs, and for how long.
    pub fn hear_pause(&self, tenant: &Arc<str>, pause: Duration) {
        self.windows().pauses.hear(tenant, pause);
    }

    /// Once a second, until `shutdown`: tells Redis of calls that were made while it was away or that it has forgotten,
    /// and lets windows go there that nobody uses any more.
    pub async fn tidy(self, shutdown: CancellationToken) {
        let mut ticks = interval(TIDY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let tidying = async {
            let mut known = None;
            loop {
                ticks.tick().await;
                let Some(shared) = self.0.shared.as_ref().filter(|_| self.0.config.snapshot().counts())
                else {
                    continue;
                };
                let Ok(memory) = shared.memory().await else { continue };
                let forgotten = known.as_ref() != Some(&memory);
                // Side by side, each whatever becomes of the others: what Redis does not know others may spend.
                let fleet = self.windows().fleet.tidy(forgotten).await;
                let tenants: Vec<_> = self.0.tenants.iter().map(|(_, queue)| queue).collect();
                let tidying = |queue: Arc<Queue<Account>>| async move { queue.account.tidy(forgotten).await };
                let all = stream::iter(tenants).map(tidying).buffer_unordered(ABREAST);
                let told = all.fold(fleet, |all, one| std::future::ready(all && one)).await;
                if told {
                    known = Some(memory);
                }
            }
        };
        let _: Option<std::convert::Infallible> = shutdown.run_until_cancelled(tidying).await;
    }

    /// Brings the gauges of quotas up to date.
    pub fn measure(&self) {
        let mut ratios = vec![[0.0_f64; QuotaWindow::ALL.len()]; QuotaScope::ALL.len()];
        let mut note = |uses: Vec<QuotaUse>, scope: QuotaScope| {
            for quota in uses {
                let window = Window {
                    limit: quota.limit.try_into().unwrap_or(std::num::NonZeroU32::MIN),
                    per: quota.per,
                };
                let ratio = ratios.get_mut(scope.index()).and_then(|of| of.get_mut(window.name().index()));
                if let Some(ratio) = ratio {
                    *ratio = ratio.max(f64::from(quota.used) / f64::from(quota.limit));
                }
            }
        };
        note(self.windows().fleet.known_use(true), QuotaScope::Fleet);
        for (_, queue) in &self.0.tenants {
            note(queue.account.known_use(false), QuotaScope::Tenant);
        }
        for (scope, ratios) in QuotaScope::ALL.iter().zip(ratios) {
            for (window, ratio) in QuotaWindow::ALL.iter().zip(ratios) {
                self.0.metrics.limiter_used.set((*scope, *window), ratio);
            }
        }
    }

    fn windows(&self) -> &Windows {
        self.0.queues.quota()
    }

    fn queue(&self, tenant: &Tenant) -> Arc<Queue<Account>> {
        self.0.tenants.get_with(tenant.id(), || {
            let config = self.0.config.get();
            let name = tenant.label();
            let windows = config.windows_of(&name).to_vec();
            let account = Account::new(name, windows, config.terms(), self.0.shared.clone(), self.0.started);
            Arc::new(Queue::new(account, config.concurrency, self.0.latencies.of(tenant.host())))
        })
    }

    async fn decide(&self, queue: &Arc<Queue<Account>>, call: &Call) -> Result<Permit, Refused> {
        let config = self.0.config.snapshot();
        if config.dry_run {
            return self.try_dry(queue, call).await;
        }
        match call.priority {
            Priority::Interactive => self.0.queues.admit(queue, call.wanted_by, config.queue).await,
            Priority::Prefetch => {
                // Of the slots, too, a reserve is left to who waits.
                let reserved = (config.concurrency as f64 * config.reserve) as usize;
                self.0.queues.admit_prefetch(queue, reserved).await
            }
        }
    }

    /// Grants a call that the quotas might have refused, and counts it then.
    async fn try_dry(&self, queue: &Arc<Queue<Account>>, call: &Call) -> Result<Permit, Refused> {
        let quota = self.0.queues.quota();
        if quota.counts(&queue.account) && quota.pause(&queue.account).is_none() {
            let grant = quota.take(&queue.account, 1, call.priority).await;
            let waits =
                call.priority == Priority::Interactive && Instant::now() + grant.wait < call.wanted_by;
            if grant.calls == 0 {
                let fate = if waits { DryRun::Delayed } else { DryRun::Refused };
                self.0.metrics.limiter_dry_run.inc((grant.scope, urgency(call.priority), fate));
            }
        }
        self.0.queues.admit_uncounted(queue, call.wanted_by).await
    }
}

fn urgency(priority: Priority) -> Urgency {
    match priority {
        Priority::Interactive => Urgency::Interactive,
        Priority::Prefetch => Urgency::Prefetch,
    }
}

impl Admission for Limiter {
    type Permit = Permit;

    async fn admit(&self, call: &Call) -> Result<Permit, Error> {
        let queue = self.queue(&call.tenant);
        let (asked, urgency) = (Instant::now(), urgency(call.priority));
        let outcome = self.decide(&queue, call).await;
        let (scope, decision) = match &outcome {
            Ok(_) => (QuotaScope::Tenant, Decision::Granted),
            Err(refused) => (refused.scope, Decision::Refused),
        };
        self.0.metrics.limiter_decisions.inc((scope, urgency, decision));
        if urgency == Urgency::Interactive && outcome.is_ok() {
            self.0.metrics.limiter_wait.observe((), asked.elapsed().as_secs_f64());
        }
        outcome.map_err(|refused| Error::Limited { retry_after: refused.wait })
    }

    async fn answered(&self, call: &Call, pace: Pace) {
        let (pauses, name) = (&self.windows().pauses, call.tenant.label());
        let Pace::TooFast { retry_after } = pace else { return pauses.answered(&name) };
        let pause = pauses.too_fast(&name, retry_after);
        warn!(?pause, "cyberscan asks for fewer calls; the tenant pauses");
        if let Some(announce) = self.0.announce.get() {
            announce(&name, pause);
        }
        if let Some(shared) = &self.0.shared
            && self.0.queues.quota().counts(&self.queue(&call.tenant).account)
        {
            shared.pause(&name, pause).await;
        }
    }
}

impl Quotas for Limiter {
    fn quotas<'a>(&'a self, tenant: &'a Arc<Tenant>) -> BoxFuture<'a, Vec<QuotaUse>> {
        Box::pin(async move {
            let queue = self.queue(tenant);
            let (own, fleet) = tokio::join!(queue.account.used(false), self.windows().fleet.used(true));
            [own, fleet].concat()
        })
    }
}
