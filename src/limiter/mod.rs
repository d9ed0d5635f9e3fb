//! How many calls may be made, and who makes them first. It owns quotas, waiting and pauses; it must
//! not know what is asked or answered.
//!
//! Every request to CyberScan, token calls and repetitions too, takes a permit here first. Quotas hold
//! for one tenant and for the fleet, in several windows at once. With Redis they are counted there, for
//! all replicas; while it is away each replica keeps to a share of them, evenly spaced; without any
//! Redis this process counts alone.
//!
//! Who cannot go at once waits in a queue per tenant, first come first served, and is woken when it is
//! their turn; tenants take turns at what they share. Who could not be served in time is refused at
//! once.

pub mod quota;
mod shared;
#[cfg(test)]
mod tests;

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::future::BoxFuture;
use moka::{policy::EvictionPolicy, sync::Cache};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, sleep, timeout_at},
};
use tokio_util::task::TaskTracker;
use tracing::warn;

use self::{
    quota::{SlidingWindow, Window, micros},
    shared::{Account, Demand, Grant, SharedQuota},
};
use crate::{
    cyberscan::{Admission, Call, Error, Pace, Priority, QuotaUse, Quotas},
    live::Live,
    metrics::{Decision, Label, Metrics, QuotaScope, QuotaWindow, Urgency},
    redis_pool::{Redis, Unavailable},
    tenant::TenantId,
};

/// Settings `limiter.*`.
#[derive(Clone, Debug)]
pub struct Config {
    /// `limiter.tenant`: quotas of each tenant.
    pub tenant: Vec<Window>,
    /// `limiter.fleet`: quotas of all tenants together.
    pub fleet: Vec<Window>,
    /// `limiter.fallback_share`: the share of a quota that each replica keeps to while Redis is away.
    pub fallback_share: f64,
    /// `limiter.reserve`: the share of a quota that prefetching leaves to interactive calls.
    pub reserve: f64,
    /// `limiter.queue`: calls of one tenant that may wait.
    pub queue: usize,
    /// `limiter.concurrency`: calls of one tenant under way at once, on this replica.
    pub concurrency: usize,
}

/// Calls asked for at once, at most: the fewer, the finer tenants take turns.
const BATCH: usize = 16;
const SHARED_BATCH: u32 = 4;
/// How long a queue must have been busy before its pace tells how long others will wait.
const PACE: Duration = Duration::from_secs(1);
/// How often it is asked again whether there is a call, however long that will take as it looks: more than a window
/// of a second takes.
const RECOUNT: Duration = Duration::from_secs(2);
/// Tenants that are remembered, and how long without a call.
const TENANTS: u64 = 10_000;
const IDLE: Duration = Duration::from_secs(26 * 3600);
/// The pause after a 429 that does not say how long; doubled with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The limiter; a cheap clone.
#[derive(Clone)]
pub struct Limiter(Arc<Inner>);

struct Inner {
    config: Live<Config>,
    shared: Option<SharedQuota>,
    fleet: Live<Scope>,
    tenants: Cache<TenantId, Arc<Tenant>>,
    /// Tenants take turns at the fleet's quota: the lock is fair.
    turn: tokio::sync::Mutex<()>,
    /// When the fleet's quota has a call for any tenant.
    fleet_next: Mutex<Option<Estimate>>,
    started: Instant,
    metrics: Metrics,
    tasks: TaskTracker,
}

/// The windows of a tenant or of the fleet, as this replica knows them.
struct Scope {
    windows: Vec<Window>,
    /// All calls of this replica.
    counted: Mutex<Vec<SlidingWindow>>,
    /// Calls that Redis has not been told of, because it was away.
    untold: Mutex<Vec<SlidingWindow>>,
    /// When Redis's windows came into being, as it said last.
    born: Mutex<Vec<u64>>,
    /// Calls Redis has forgotten: of each window how many parts ago, and how many.
    forgotten: Mutex<Vec<Vec<(u64, u32)>>>,
    /// While Redis is away: this replica's share, evenly spaced, and how many calls it is in each window.
    share: Vec<Spacing>,
    shares: Vec<u32>,
}

struct Tenant {
    id: TenantId,
    scope: Live<Scope>,
    slots: Arc<Semaphore>,
    queue: Mutex<Queue>,
    /// Calls used in each window of the tenant and of the fleet, as of then.
    used: Mutex<Option<(Instant, Vec<u32>)>>,
}

/// Someone who waits for a call.
struct Waiter {
    granter: oneshot::Sender<Result<Permit, Error>>,
    deadline: Instant,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiter>,
    /// Since when there has been somebody waiting, and how many calls have been granted since.
    busy: Option<(Instant, u32)>,
    /// A task is serving the queue.
    served: bool,
    /// When the tenant's own quota has a call for it.
    next: Option<Estimate>,
    paused: Option<Instant>,
    /// When the windows came into being of which the last grant was; none while Redis is away.
    born: Vec<u64>,
    /// 429s in a row.
    strikes: u32,
}

/// When a call can be granted, as it looked at some time. Redis, or its memory, may be lost or found at any moment: where
/// nobody has looked again for a while, the next caller does.
#[derive(Clone, Copy)]
struct Estimate {
    until: Instant,
    as_of: Instant,
}

impl Estimate {
    /// In what time that is, for someone with `ahead` others before them.
    fn wait(self, ahead: usize, now: Instant) -> Duration {
        if ahead == 0 && now - self.as_of >= 2 * RECOUNT {
            return Duration::ZERO;
        }
        self.until.saturating_duration_since(now)
    }
}

/// Leave to make one call. The tenant's slot is free again when it is dropped.
pub struct Permit {
    _slot: OwnedSemaphorePermit,
}

impl Limiter {
    /// A limiter as `config` says; `redis` is where the fleet's quotas are counted.
    #[must_use]
    pub fn new(config: Config, redis: Option<Redis>, metrics: Metrics, tasks: TaskTracker) -> Self {
        let started = Instant::now();
        Self(Arc::new(Inner {
            fleet: Live::new(Scope::new(&config.fleet, config.fallback_share)),
            shared: redis.map(SharedQuota::new),
            // A tenant that is new always finds a place: what it has used is not to be forgotten at once.
            tenants: Cache::builder()
                .max_capacity(TENANTS)
                .eviction_policy(EvictionPolicy::lru())
                .time_to_idle(IDLE)
                .build(),
            turn: tokio::sync::Mutex::new(()),
            fleet_next: Mutex::default(),
            started,
            metrics,
            tasks,
            config: Live::new(config),
        }))
    }

    /// Limits as `config` says from now on. A quota of the same length goes on counting; how many calls may be under way
    /// at once does not change.
    pub fn reconfigure(&self, config: Config) {
        let (old, now, share) = (self.0.config.snapshot(), self.now(), config.fallback_share);
        let same = (&old.tenant, &old.fleet, old.fallback_share) == (&config.tenant, &config.fleet, share);
        let config = Config { concurrency: old.concurrency, ..config };
        if same {
            return self.0.config.set(config);
        }
        self.0.fleet.set(self.0.fleet.snapshot().succeeded_by(&config.fleet, share, now));
        let tenant_windows = config.tenant.clone();
        // First for those who are new, then for those there are.
        self.0.config.set(config);
        for (_, tenant) in &self.0.tenants {
            tenant.scope.set(tenant.scope.snapshot().succeeded_by(&tenant_windows, share, now));
            *lock(&tenant.used) = None;
            let mut queue = lock(&tenant.queue);
            queue.next = None;
        }
        *lock(&self.0.fleet_next) = None;
    }

    /// Brings the gauges of quotas up to date.
    pub fn measure(&self) {
        let mut ratios = vec![[0.0_f64; QuotaWindow::ALL.len()]; QuotaScope::ALL.len()];
        let config = self.0.config.get();
        let of_tenant = config.tenant.iter().map(|window| (QuotaScope::Tenant, window));
        let of_fleet = config.fleet.iter().map(|window| (QuotaScope::Fleet, window));
        let windows: Vec<_> = of_tenant.chain(of_fleet).collect();
        for (_, tenant) in &self.0.tenants {
            let Some((at, used)) = &*lock(&tenant.used) else { continue };
            for ((scope, window), used) in windows.iter().zip(used) {
                let share = f64::from(*used) / f64::from(window.limit.get());
                let ratio = ratios.get_mut(scope.index()).and_then(|of| of.get_mut(window.name().index()));
                if let Some(ratio) = ratio
                    && at.elapsed() < window.per
                {
                    *ratio = ratio.max(share);
                }
            }
        }
        for (scope, ratios) in QuotaScope::ALL.iter().zip(ratios) {
            for (window, ratio) in QuotaWindow::ALL.iter().zip(ratios) {
                self.0.metrics.limiter_used.set((*scope, *window), ratio);
            }
        }
    }

    fn tenant(&self, id: TenantId) -> Arc<Tenant> {
        self.0.tenants.get_with(id, || {
            let config = self.0.config.get();
            Arc::new(Tenant {
                id,
                scope: Live::new(Scope::new(&config.tenant, config.fallback_share)),
                slots: Arc::new(Semaphore::new(config.concurrency)),
                queue: Mutex::default(),
                used: Mutex::default(),
            })
        })
    }

    /// Whether calls are counted. With Redis they are also asked about there, because of the pauses.
    fn metered(&self) -> bool {
        let config = self.0.config.get();
        let limited = !(config.tenant.is_empty() && config.fleet.is_empty());
        limited || self.0.shared.is_some()
    }

    /// Waits for a turn in the tenant's queue, unless it would come too late for an answer by `deadline`.
    async fn turn(&self, tenant: &Arc<Tenant>, deadline: Instant) -> Result<Permit, Error> {
        let deadline = latest(Instant::now(), deadline);
        let granted = {
            let mut queue = lock(&tenant.queue);
            queue.waiting.retain(|waiter| !waiter.granter.is_closed());
            let ahead = queue.waiting.len();
            let wait = self.wait_behind(&queue, ahead);
            if ahead >= self.0.config.get().queue || Instant::now() + wait > deadline {
                return Err(throttled(wait));
            }
            let (granter, granted) = oneshot::channel();
            queue.waiting.push_back(Waiter { granter, deadline });
            if !std::mem::replace(&mut queue.served, true) {
                queue.busy = Some((Instant::now(), 0));
                let (this, tenant) = (self.clone(), Arc::clone(tenant));
                self.0.tasks.spawn(async move { this.serve(&tenant).await });
            }
            granted
        };
        match timeout_at(deadline, granted).await {
            Ok(outcome) => outcome.unwrap_or(Err(Error::Lost)),
            Err(_) => {
                let queue = lock(&tenant.queue);
                Err(throttled(self.wait_behind(&queue, 0)))
            }
        }
    }

    /// How long someone with `ahead` others before them has to wait: what the windows allow at best, or what
    /// this replica has been getting of them lately, if that is less.
    fn wait_behind(&self, queue: &Queue, ahead: usize) -> Duration {
        let now = Instant::now();
        let estimates = [queue.next, *lock(&self.0.fleet_next)].into_iter().flatten();
        let until = estimates.map(|estimate| estimate.wait(ahead, now)).max().unwrap_or_default();
        let until = until.max(queue.paused.map_or(Duration::ZERO, |end| end.saturating_duration_since(now)));
        let config = self.0.config.get();
        let windows = config.tenant.iter().chain(&config.fleet);
        let whole = windows.map(|window| {
            let rounds = u32::try_from(ahead / window.limit.get() as usize).unwrap_or(u32::MAX);
            window.per.saturating_mul(rounds)
        });
        let at_best = until + whole.max().unwrap_or_default();
        match queue.busy {
            Some((since, calls)) if calls > 0 && now - since > PACE => {
                let ahead = u32::try_from(ahead).unwrap_or(u32::MAX);
                at_best.max((now - since).saturating_mul(ahead) / calls)
            }
            _ => at_best,
        }
    }

    /// Whether the fleet's quota is what a tenant waits for.
    fn fleet_is_later(&self, tenant: &Tenant) -> bool {
        let queue = lock(&tenant.queue);
        let own = queue.next.map(|next| next.until).max(queue.paused);
        let of_fleet = lock(&self.0.fleet_next).map(|next| next.until);
        of_fleet.is_some_and(|until| until > Instant::now()) && of_fleet > own
    }

    /// Grants calls to those who wait, in their order, until nobody does.
    async fn serve(&self, tenant: &Tenant) {
        // A slot first: who has been granted a call should not wait any more.
        while let Ok(slot) = Arc::clone(&tenant.slots).acquire_owned().await {
            let mut slots = vec![slot];
            {
                let mut queue = lock(&tenant.queue);
                queue.waiting.retain(|waiter| !waiter.granter.is_closed());
                if queue.waiting.is_empty() {
                    (queue.served, queue.busy) = (false, None);
                    return;
                }
                while slots.len() < queue.waiting.len().min(BATCH)
                    && let Ok(slot) = Arc::clone(&tenant.slots).try_acquire_owned()
                {
                    slots.push(slot);
                }
            }
            let wanted = u32::try_from(slots.len()).unwrap_or(u32::MAX);
            let grant = self.take_in_turn(tenant, wanted).await;
            self.hand_out(tenant, &grant, slots);
            if grant.calls == 0 {
                sleep(again(&grant)).await;
            }
        }
    }

    /// Takes calls for who waits. Where only the fleet has none left, the turn is kept until it has or nobody waits:
    /// then other tenants have theirs, in the order they came.
    async fn take_in_turn(&self, tenant: &Tenant, wanted: u32) -> Grant {
        if self.0.fleet.get().windows.is_empty() {
            return self.take(tenant, wanted, Priority::Interactive).await;
        }
        let _turn = self.0.turn.lock().await;
        loop {
            let grant = self.take(tenant, wanted.min(SHARED_BATCH), Priority::Interactive).await;
            if grant.calls > 0 || !grant.fleet_exhausted {
                return grant;
            }
            self.hand_out(tenant, &grant, Vec::new());
            if lock(&tenant.queue).waiting.is_empty() {
                return grant;
            }
            sleep(again(&grant)).await;
        }
    }

    /// Wakes those a call was granted to, and those who could not be served in time any more.
    fn hand_out(&self, tenant: &Tenant, grant: &Grant, mut slots: Vec<OwnedSemaphorePermit>) {
        let mut queue = lock(&tenant.queue);
        slots.truncate(grant.calls as usize);
        let now = Instant::now();
        if let Some((since, calls)) = &mut queue.busy {
            *calls = calls.saturating_add(grant.calls);
            // What is long ago counts less and less.
            if now - *since > 10 * PACE {
                (*since, *calls) = (now - (now - *since) / 2, *calls / 2);
            }
        }
        while let Some(slot) = slots.pop()
            && let Some(waiter) = queue.waiting.pop_front()
        {
            // Who has left in the meantime leaves the call to the next one.
            if let Err(Ok(Permit { _slot: slot })) = waiter.granter.send(Ok(Permit { _slot: slot })) {
                slots.push(slot);
            }
        }
        let next = (!grant.wait.is_zero()).then(|| Estimate { until: now + grant.wait, as_of: now });
        let (own, of_fleet) = if grant.fleet_exhausted { (None, next) } else { (next, None) };
        queue.next = own;
        if grant.calls > 0 || of_fleet.is_some() {
            *lock(&self.0.fleet_next) = of_fleet;
        }
        if grant.paused {
            queue.paused = Some(now + grant.wait);
            // A pause says nothing about the pace.
            queue.busy = Some((now, 0));
        } else if queue.born != grant.born {
            // Nor does the moment in which Redis, or its memory, is lost or found: a share is used up by what Redis had
            // granted before it, and a window that Redis has lost has to grow again.
            queue.born.clone_from(&grant.born);
            queue.busy = Some((now + PACE, 0));
        }
        let waiting = std::mem::take(&mut queue.waiting);
        for waiter in waiting {
            let wait = self.wait_behind(&queue, queue.waiting.len());
            if now + wait > waiter.deadline {
                let _ = waiter.granter.send(Err(throttled(wait)));
            } else {
                queue.waiting.push_back(waiter);
            }
        }
    }

    /// Takes as many of `calls` as all windows allow; none are asked for to learn what is used.
    async fn take(&self, tenant: &Tenant, calls: u32, priority: Priority) -> Grant {
        let grant = self.take_unnoted(tenant, calls, priority).await;
        if !grant.used.is_empty() {
            *lock(&tenant.used) = Some((Instant::now(), grant.used.clone()));
        }
        grant
    }

    async fn take_unnoted(&self, tenant: &Tenant, calls: u32, priority: Priority) -> Grant {
        if let Some(pause) = tenant.paused() {
            return Grant { wait: pause, paused: true, ..Grant::default() };
        }
        let leave = match priority {
            Priority::Interactive => 0.0,
            Priority::Prefetch => self.0.config.get().reserve,
        };
        let Some(shared) = &self.0.shared else {
            return self.take_here(tenant, calls, leave);
        };
        // Who asks for none may leave before there is an answer.
        let tell = calls > 0;
        // Those of a reload meanwhile are for who comes later.
        let (own, fleet) = (tenant.scope.snapshot(), self.0.fleet.snapshot());
        let (of_tenant, of_fleet) = (own.owed(self.now(), tell), fleet.owed(self.now(), tell));
        let demand = Demand { tenant: tenant.id, of_tenant: &of_tenant, of_fleet: &of_fleet, calls, leave };
        match shared.take(&demand).await {
            Ok(grant) => {
                let (born, now) = (grant.born.split_at(of_tenant.len()), self.now());
                for (scope, told, born) in [(&own, &of_tenant, born.0), (&fleet, &of_fleet, born.1)] {
                    scope.settle(told);
                    scope.recall(now, told, born);
                    scope.note(now, grant.calls);
                }
                grant
            }
            Err(Unavailable) => {
                // What could not be told now is when Redis is back.
                for (scope, told) in [(&own, &of_tenant), (&fleet, &of_fleet)] {
                    if told.iter().any(|account| !account.forgotten.is_empty()) {
                        lock(&scope.born).fill(0);
                    }
                }
                self.take_share(tenant, calls, priority)
            }
        }
    }

    /// Without any Redis: this process counts alone.
    fn take_here(&self, tenant: &Tenant, calls: u32, leave: f64) -> Grant {
        let now = self.now();
        let (own, fleet) = (tenant.scope.snapshot(), self.0.fleet.snapshot());
        let (mut own, mut all) = (own.counted(now), fleet.counted(now));
        let mut windows: Vec<&mut SlidingWindow> = own.iter_mut().chain(all.iter_mut()).collect();
        let free = |window: &mut SlidingWindow| {
            let ceiling = f64::from(window.ceiling(now));
            window.available(now).saturating_sub((ceiling * leave) as u32)
        };
        let granted = windows.iter_mut().map(|window| free(window)).min().unwrap_or(calls).min(calls);
        let mut wait = Duration::ZERO;
        for window in &mut windows {
            if granted > 0 {
                window.take(now, granted);
            }
            wait = wait.max(window.wait(now));
        }
        let used = windows.iter_mut().map(|window| window.used(now)).collect();
        let used_up =
            |windows: &mut [SlidingWindow]| windows.iter_mut().any(|window| window.available(now) == 0);
        let fleet_exhausted = used_up(&mut all) && !used_up(&mut own);
        Grant { calls: granted, wait, fleet_exhausted, used, ..Grant::default() }
    }

    /// While Redis is away: one call, if this replica's share has one. What is granted is remembered, so
    /// that Redis can be told when it is back.
    fn take_share(&self, tenant: &Tenant, calls: u32, priority: Priority) -> Grant {
        let (scopes, now) = ([tenant.scope.snapshot(), self.0.fleet.snapshot()], self.now());
        // Both are asked before either is taken from: what one grants and the other refuses would be lost.
        let [own, all] = scopes.each_ref().map(|scope| scope.wait_for_share(now));
        // Prefetching can wait until the fleet counts together again.
        let granted = calls > 0 && own.max(all).is_zero() && priority == Priority::Interactive;
        if granted {
            for scope in scopes {
                scope.share.iter().for_each(Spacing::take);
                scope.note(now, 1);
                lock(&scope.untold).iter_mut().for_each(|window| window.take(now, 1));
            }
        }
        // Who waits for the fleet's share only keeps the turn, or others with more luck would go first for ever.
        let fleet_exhausted = own.is_zero() && !all.is_zero();
        let calls = u32::from(granted);
        Grant { calls, wait: own.max(all), fleet_exhausted, ..Grant::default() }
    }

    fn now(&self) -> u64 {
        // A day ahead, so that the first parts of a day's window do not begin before nought.
        micros(self.0.started.elapsed() + IDLE)
    }
}

impl Limiter {
    async fn admit_interactive(&self, tenant: &Arc<Tenant>, call: &Call) -> Result<Permit, Error> {
        match tenant.paused() {
            Some(pause) if Instant::now() + pause > call.deadline => return Err(throttled(pause)),
            None if !self.metered()
                && lock(&tenant.queue).waiting.is_empty()
                && let Ok(slot) = Arc::clone(&tenant.slots).try_acquire_owned() =>
            {
                return Ok(Permit { _slot: slot });
            }
            _ => {}
        }
        self.turn(tenant, call.deadline).await
    }

    /// At once or not at all, and only what leaves the reserve.
    async fn admit_prefetch(&self, tenant: &Tenant) -> Result<Permit, Error> {
        if let Some(pause) = tenant.paused() {
            return Err(throttled(pause));
        }
        if !lock(&tenant.queue).waiting.is_empty() {
            return Err(throttled(FIRST_PAUSE));
        }
        // Of the slots, too, a reserve is left to who waits.
        let reserve = {
            let config = self.0.config.get();
            (config.concurrency as f64 * config.reserve) as usize
        };
        let slot = (tenant.slots.available_permits() > reserve)
            .then(|| Arc::clone(&tenant.slots).try_acquire_owned().ok())
            .flatten()
            .ok_or_else(|| throttled(FIRST_PAUSE))?;
        if self.metered() {
            let grant = self.take(tenant, 1, Priority::Prefetch).await;
            if grant.calls == 0 {
                return Err(throttled(grant.wait));
            }
        }
        Ok(Permit { _slot: slot })
    }
}

impl Admission for Limiter {
    type Permit = Permit;

    async fn admit(&self, call: &Call) -> Result<Permit, Error> {
        let tenant = self.tenant(call.tenant.id());
        let asked = Instant::now();
        let (urgency, outcome) = match call.priority {
            Priority::Interactive => (Urgency::Interactive, self.admit_interactive(&tenant, call).await),
            Priority::Prefetch => (Urgency::Prefetch, self.admit_prefetch(&tenant).await),
        };
        let decision = if outcome.is_ok() { Decision::Granted } else { Decision::Refused };
        let scope = match outcome {
            Err(_) if self.fleet_is_later(&tenant) => QuotaScope::Fleet,
            _ => QuotaScope::Tenant,
        };
        self.0.metrics.limiter_decisions.inc((scope, urgency, decision));
        if urgency == Urgency::Interactive && outcome.is_ok() {
            self.0.metrics.limiter_wait.observe((), asked.elapsed().as_secs_f64());
        }
        outcome
    }

    async fn answered(&self, call: &Call, pace: Pace) {
        let tenant = self.tenant(call.tenant.id());
        let pause = {
            let mut queue = lock(&tenant.queue);
            let Pace::TooFast { retry_after } = pace else {
                queue.strikes = 0;
                return;
            };
            let growing = FIRST_PAUSE.saturating_mul(1 << queue.strikes.min(6)).min(LONGEST_PAUSE);
            queue.strikes = queue.strikes.saturating_add(1);
            let pause = retry_after.unwrap_or(growing);
            let until = Instant::now() + pause;
            queue.paused = Some(queue.paused.map_or(until, |paused| paused.max(until)));
            pause
        };
        warn!(?pause, "cyberscan asks for fewer calls; the tenant pauses");
        if let Some(shared) = &self.0.shared {
            shared.pause(tenant.id, pause).await;
        }
    }
}

impl Quotas for Limiter {
    fn quotas<'a>(&'a self, tenant: &'a Arc<crate::tenant::Tenant>) -> BoxFuture<'a, Vec<QuotaUse>> {
        Box::pin(async move {
            let tenant = self.tenant(tenant.id());
            let grant = self.take(&tenant, 0, Priority::Interactive).await;
            let of = |windows: &[Window], of_fleet| {
                let quota = move |window: &Window| (of_fleet, window.limit.get(), window.per);
                windows.iter().map(quota).collect::<Vec<_>>()
            };
            let config = self.0.config.get();
            let windows = [of(&config.tenant, false), of(&config.fleet, true)].concat();
            let windows = windows.into_iter().zip(grant.used);
            windows.map(|((of_fleet, limit, per), used)| QuotaUse { of_fleet, limit, per, used }).collect()
        })
    }
}

impl Tenant {
    /// How long CyberScan wants to be left alone.
    fn paused(&self) -> Option<Duration> {
        let left = lock(&self.queue).paused?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }
}

impl Scope {
    fn new(windows: &[Window], share: f64) -> Self {
        let part = |window: &Window| (f64::from(window.limit.get()) * share) as u32;
        Self {
            windows: windows.to_vec(),
            counted: Mutex::default(),
            untold: Mutex::default(),
            born: Mutex::default(),
            forgotten: Mutex::default(),
            share: windows.iter().map(|window| Spacing::new(*window, share)).collect(),
            shares: windows.iter().map(|window| part(window).max(1)).collect(),
        }
    }

    /// The same for other windows. What was counted in one of the same length goes on counting; another is new.
    fn succeeded_by(&self, windows: &[Window], share: f64, now: u64) -> Self {
        let successor = Self::new(windows, share);
        for (old, new) in [(&self.counted, &successor.counted), (&self.untold, &successor.untold)] {
            let old = lock(old);
            if old.is_empty() {
                continue;
            }
            let known = |window: &Window| old.iter().find(|known| known.window().per == window.per);
            let carried = windows.iter().map(|window| match known(window) {
                Some(known) => known.with_limit(*window),
                None => SlidingWindow::new(*window, now),
            });
            lock(new).extend(carried);
        }
        successor
    }

    fn counted(&self, now: u64) -> MutexGuard<'_, Vec<SlidingWindow>> {
        let mut counted = lock(&self.counted);
        if counted.is_empty() {
            counted.extend(self.windows.iter().map(|window| SlidingWindow::new(*window, now)));
        }
        counted
    }

    fn note(&self, now: u64, calls: u32) {
        if calls > 0 {
            self.counted(now).iter_mut().for_each(|window| window.take(now, calls));
        }
    }

    /// How long until this replica's share has a call.
    fn wait_for_share(&self, now: u64) -> Duration {
        // What was granted before Redis went away counts: the quota's window may still be full of it.
        let full = self
            .counted(now)
            .iter_mut()
            .zip(&self.shares)
            .filter_map(|(window, share)| (window.used(now) >= *share).then_some(window.window().per / 100))
            .max();
        full.unwrap_or_else(|| self.share.iter().map(Spacing::wait).max().unwrap_or_default())
    }

    /// The windows, each with the calls Redis has not been told of; those it has forgotten only to `tell` it.
    fn owed(&self, now: u64, tell: bool) -> Vec<Account> {
        let mut untold = lock(&self.untold);
        if untold.is_empty() {
            untold.extend(self.windows.iter().map(|window| SlidingWindow::new(*window, now)));
        }
        let mut accounts: Vec<Account> = untold
            .iter_mut()
            .map(|window| Account {
                window: window.window(),
                meanwhile: window.used(now),
                forgotten: Vec::new(),
            })
            .collect();
        if tell {
            // Told once: who asks at the same time tells nothing of it.
            for (account, forgotten) in accounts.iter_mut().zip(std::mem::take(&mut *lock(&self.forgotten))) {
                account.forgotten = forgotten;
            }
        }
        accounts
    }

    /// Redis has been told of them.
    fn settle(&self, told: &[Account]) {
        if told.iter().any(|account| account.meanwhile > 0) {
            lock(&self.untold).clear();
        }
    }

    /// Where a window of Redis's is not the one it was, Redis has lost its memory; this replica has not, and is going to
    /// tell it what it granted before, but for what it has just been `told`.
    fn recall(&self, now: u64, told: &[Account], born: &[u64]) {
        let mut known = lock(&self.born);
        if !known.is_empty() && *known != born {
            let mut counted = self.counted(now);
            let windows = counted.iter_mut().zip(told).zip(known.iter().zip(born));
            let forgotten =
                windows.map(
                    |((window, account), (known, born))| {
                        if known == born { Vec::new() } else { window.history(now, account.meanwhile) }
                    },
                );
            *lock(&self.forgotten) = forgotten.collect();
        }
        *known = born.to_vec();
    }
}

/// Until when it is worth to wait for a call: a tenth of the time, a second at most, is left to CyberScan. A
/// call granted later would be paid for and then cut off.
fn latest(now: Instant, deadline: Instant) -> Instant {
    let left = deadline.saturating_duration_since(now);
    deadline - (left / 10).min(Duration::from_secs(1))
}

/// When to ask for calls again after a `grant` of none.
fn again(grant: &Grant) -> Duration {
    grant.wait.clamp(Duration::from_millis(1), RECOUNT)
}

fn throttled(wait: Duration) -> Error {
    Error::Throttled { retry_after: wait.max(FIRST_PAUSE) }
}

/// A share of a window, evenly spaced: a hundredth of it at once, at least one call. (GCRA, whose asking and taking
/// are two steps here.)
struct Spacing {
    one: Duration,
    /// How far calls may be ahead of their time.
    ahead: Duration,
    /// The time of the next call.
    next: Mutex<Option<Instant>>,
}

impl Spacing {
    fn new(window: Window, share: f64) -> Self {
        let calls = (f64::from(window.limit.get()) * share).max(f64::MIN_POSITIVE);
        let one = Duration::try_from_secs_f64(window.per.as_secs_f64() / calls).unwrap_or(window.per);
        let more = ((calls / 100.0) as u32).saturating_sub(1);
        Self { one, ahead: one.saturating_mul(more), next: Mutex::default() }
    }

    fn wait(&self) -> Duration {
        let next = lock(&self.next).unwrap_or_else(Instant::now);
        next.saturating_duration_since(Instant::now() + self.ahead)
    }

    fn take(&self) {
        let (mut next, now) = (lock(&self.next), Instant::now());
        *next = Some(next.map_or(now, |next| next.max(now)) + self.one);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
