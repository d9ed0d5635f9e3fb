//! Who is served, and when: turns, batches and refusals. It must not know what a quota is made of; it knows only
//! the port ([`Quota`]).
//!
//! A call that cannot be made at once waits in its tenant's queue, first come first served. One task per
//! queue that is not empty asks for calls and hands them out. Tenants take turns at what they share. Whoever
//! could not be answered in time any more, by what is known of the wait and by what CyberScan takes
//! lately, is refused: at once when they come, and again whenever calls are handed out. A queue that lets
//! everybody wait until their last moment makes calls nobody waits for the answers of.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    time::{Instant, sleep, timeout_at},
};
use tokio_util::task::TaskTracker;

use super::{
    line::{Estimate, Line, Permit, Queue, RECOUNT, Refused, Throughput, Waiter, lock},
    quota::{Grant, Quota},
};
use crate::{chance::chance, cyberscan::Priority, metrics::QuotaScope};

/// Calls asked for at once, at most: the fewer, the finer tenants take turns.
const BATCH: usize = 16;
const SHARED_BATCH: u32 = 4;
/// How much later it is asked, at most: less than calls may come late without being lost.
const JITTER: Duration = Duration::from_millis(4);
/// What who cannot be told a time is told.
const FIRST: Duration = super::pause::FIRST;

/// The queues of all tenants; a cheap clone.
pub(super) struct Queues<Q: Quota>(Arc<Inner<Q>>);

struct Inner<Q> {
    quota: Q,
    /// Tenants take turns at what they share: the lock is fair.
    turn: tokio::sync::Mutex<()>,
    /// When what tenants share has a call for any of them.
    shared_next: Mutex<Option<Estimate>>,
    tasks: TaskTracker,
}

impl<Q: Quota> Clone for Queues<Q> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<Q: Quota> Queues<Q> {
    pub(super) fn new(quota: Q, tasks: TaskTracker) -> Self {
        let (turn, shared_next) = (tokio::sync::Mutex::default(), Mutex::default());
        Self(Arc::new(Inner { quota, turn, shared_next, tasks }))
    }

    pub(super) fn quota(&self) -> &Q {
        &self.0.quota
    }

    /// As [`Queue::forget_estimate`], of what tenants share.
    pub(super) fn forget_estimate(&self) {
        *lock(&self.0.shared_next) = None;
    }

    /// A call for who wants an answer by `deadline`, after at most `longest` others.
    pub(super) async fn admit(
        &self,
        queue: &Arc<Queue<Q::Account>>,
        deadline: Instant,
        longest: usize,
    ) -> Result<Permit, Refused> {
        if self.0.quota.pause(&queue.account).is_none()
            && !self.0.quota.counts(&queue.account)
            && queue.line().waiting.is_empty()
            && let Ok(slot) = Arc::clone(&queue.slots).try_acquire_owned()
        {
            return Ok(Permit { _slot: slot });
        }
        let came = Instant::now();
        let latest = queue.latest(came, deadline);
        let granted = {
            let mut line = queue.line();
            line.waiting.retain(|waiter| !waiter.granter.is_closed());
            let ahead = line.waiting.len();
            let (wait, scope) = self.wait_behind(&queue.account, &line, ahead);
            if ahead >= longest || came + wait > latest {
                return Err(Refused { wait: wait.max(FIRST), scope });
            }
            let (granter, granted) = oneshot::channel();
            line.waiting.push_back(Waiter { granter, came, deadline });
            if !std::mem::replace(&mut line.served, true) {
                let (this, queue) = (self.clone(), Arc::clone(queue));
                self.0.tasks.spawn(async move { this.serve(&queue).await });
            }
            granted
        };
        match timeout_at(latest, granted).await {
            Ok(Ok(outcome)) => outcome,
            // The process is shutting down, or it took until now.
            Ok(Err(_)) | Err(_) => {
                let (wait, scope) = self.wait_behind(&queue.account, &queue.line(), 0);
                Err(Refused { wait: wait.max(FIRST), scope })
            }
        }
    }

    /// A call that nobody waits for: at once or not at all, and only what leaves the reserve.
    pub(super) async fn admit_prefetch(
        &self,
        queue: &Queue<Q::Account>,
        reserved_slots: usize,
    ) -> Result<Permit, Refused> {
        let refused = |wait| Refused { wait, scope: QuotaScope::Tenant };
        if let Some(pause) = self.0.quota.pause(&queue.account) {
            return Err(refused(pause));
        }
        if !queue.line().waiting.is_empty() {
            return Err(refused(FIRST));
        }
        let slot = (queue.slots.available_permits() > reserved_slots)
            .then(|| Arc::clone(&queue.slots).try_acquire_owned().ok())
            .flatten()
            .ok_or(refused(FIRST))?;
        if self.0.quota.counts(&queue.account) {
            let grant = self.0.quota.take(&queue.account, 1, Priority::Prefetch).await;
            if grant.calls == 0 {
                return Err(Refused { wait: grant.wait.max(FIRST), scope: grant.scope });
            }
        }
        Ok(Permit { _slot: slot })
    }

    /// A slot for a call that no quota stops, by `deadline`.
    pub(super) async fn admit_uncounted(
        &self,
        queue: &Queue<Q::Account>,
        deadline: Instant,
    ) -> Result<Permit, Refused> {
        while let Some(wait) = self.0.quota.pause(&queue.account) {
            // It may have been made longer meanwhile.
            if Instant::now() + wait > deadline {
                return Err(Refused { wait, scope: QuotaScope::Tenant });
            }
            sleep(wait).await;
        }
        let slot = timeout_at(deadline, Arc::clone(&queue.slots).acquire_owned()).await;
        let slot = slot.ok().and_then(Result::ok);
        slot.map(|slot| Permit { _slot: slot }).ok_or(Refused { wait: FIRST, scope: QuotaScope::Tenant })
    }

    /// How long someone with `ahead` others before them has to wait, and for whose quota: what the windows allow at
    /// best, or what this replica has been getting of them lately, if that is less.
    fn wait_behind(&self, account: &Q::Account, line: &Line, ahead: usize) -> (Duration, QuotaScope) {
        let now = Instant::now();
        let wait = |estimate: Option<Estimate>| {
            estimate.map(|estimate| estimate.wait(ahead, now)).unwrap_or_default()
        };
        let own = wait(line.next).max(self.0.quota.pause(account).unwrap_or_default());
        let shared = wait(*lock(&self.0.shared_next));
        let scope = if shared > own { QuotaScope::Fleet } else { QuotaScope::Tenant };
        let at_best = own.max(shared).max(self.0.quota.at_best(account, ahead));
        (at_best.max(line.throughput.wait(now, ahead)), scope)
    }

    /// Grants calls to those who wait, in their order, until nobody does.
    async fn serve(&self, queue: &Queue<Q::Account>) {
        // A slot first: who has been granted a call should not wait any more.
        while let Ok(slot) = Arc::clone(&queue.slots).acquire_owned().await {
            let mut slots = vec![slot];
            {
                let mut line = queue.line();
                line.waiting.retain(|waiter| !waiter.granter.is_closed());
                if line.waiting.is_empty() {
                    (line.served, line.throughput) = (false, Throughput::default());
                    return;
                }
                while slots.len() < line.waiting.len().min(BATCH)
                    && let Ok(slot) = Arc::clone(&queue.slots).try_acquire_owned()
                {
                    slots.push(slot);
                }
            }
            let wanted = u32::try_from(slots.len()).unwrap_or(u32::MAX);
            let grant = self.take_in_turn(queue, wanted).await;
            self.hand_out(queue, &grant, slots);
            if grant.calls == 0 {
                sleep(again(&grant)).await;
            }
        }
    }

    /// Takes calls for who waits. Where only what is shared has none left, the turn is kept until it has or nobody
    /// waits: then other tenants have theirs, in the order they came.
    async fn take_in_turn(&self, queue: &Queue<Q::Account>, wanted: u32) -> Grant {
        if !self.0.quota.is_shared() {
            return self.0.quota.take(&queue.account, wanted, Priority::Interactive).await;
        }
        let _turn = self.0.turn.lock().await;
        loop {
            let wanted = wanted.min(SHARED_BATCH);
            let grant = self.0.quota.take(&queue.account, wanted, Priority::Interactive).await;
            if grant.calls > 0 || grant.scope == QuotaScope::Tenant {
                return grant;
            }
            self.hand_out(queue, &grant, Vec::new());
            if queue.line().waiting.is_empty() {
                return grant;
            }
            sleep(again(&grant)).await;
        }
    }

    /// Wakes those a call was granted to, and those who could not be answered in time any more.
    fn hand_out(&self, queue: &Queue<Q::Account>, grant: &Grant, mut slots: Vec<OwnedSemaphorePermit>) {
        let mut line = queue.line();
        let now = Instant::now();
        slots.truncate(grant.calls as usize);
        line.wake(slots);
        line.note(now, grant);
        let next = (!grant.wait.is_zero()).then(|| Estimate { until: now + grant.wait, as_of: now });
        let (own, shared) = match grant.scope {
            QuotaScope::Tenant => (next, None),
            QuotaScope::Fleet => (None, next),
        };
        line.next = own;
        if grant.calls > 0 || shared.is_some() {
            *lock(&self.0.shared_next) = shared;
        }
        let waiting = std::mem::take(&mut line.waiting);
        for waiter in waiting {
            let (wait, scope) = self.wait_behind(&queue.account, &line, line.waiting.len());
            if now + wait > queue.latest(waiter.came, waiter.deadline) {
                let _ = waiter.granter.send(Err(Refused { wait: wait.max(FIRST), scope }));
            } else {
                line.waiting.push_back(waiter);
            }
        }
    }
}

/// When to ask for calls again after a `grant` of none: a little after there is one, each replica by chance, or the
/// same one would always be first.
fn again(grant: &Grant) -> Duration {
    grant.wait.clamp(Duration::from_millis(1), RECOUNT) + JITTER.mul_f64(chance())
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;
    use tokio::sync::Semaphore;

    use super::*;
    use crate::cyberscan::latency::Latency;

    const SECOND: Duration = Duration::from_secs(1);

    /// A call every so often, and nothing else.
    struct Every {
        interval: Duration,
        next: Mutex<Option<Instant>>,
        shared: bool,
        paused: Mutex<Option<Instant>>,
        asked: std::sync::atomic::AtomicU32,
    }

    impl Every {
        fn new(interval: Duration) -> Self {
            let (next, paused) = (Mutex::default(), Mutex::default());
            Self { interval, next, shared: false, paused, asked: 0.into() }
        }
    }

    impl Quota for Every {
        type Account = &'static str;

        async fn take(&self, _: &Self::Account, calls: u32, _: Priority) -> Grant {
            self.asked.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let scope = if self.shared { QuotaScope::Fleet } else { QuotaScope::Tenant };
            // Redis would take some time, too.
            sleep(Duration::from_micros(300)).await;
            let (mut next, now) = (lock(&self.next), Instant::now());
            let due = next.unwrap_or(now);
            if due > now || calls == 0 {
                return Grant { wait: due - now, scope, ..Grant::whole(0) };
            }
            // Who comes a little late has lost nothing.
            *next = Some(due.max(now - 3 * JITTER) + self.interval);
            Grant { wait: self.interval, scope, ..Grant::whole(1) }
        }

        fn at_best(&self, _: &Self::Account, ahead: usize) -> Duration {
            self.interval * u32::try_from(ahead).unwrap()
        }

        fn counts(&self, _: &Self::Account) -> bool {
            !self.interval.is_zero()
        }

        fn is_shared(&self) -> bool {
            self.shared
        }

        fn pause(&self, _: &Self::Account) -> Option<Duration> {
            lock(&self.paused).map(|until| until - Instant::now()).filter(|left| !left.is_zero())
        }
    }

    struct Bench {
        queues: Queues<Every>,
        queue: Arc<Queue<&'static str>>,
        latency: Arc<Latency>,
    }

    impl Bench {
        fn new(quota: Every, concurrency: usize) -> Self {
            let latency = Arc::<Latency>::default();
            let queue = Arc::new(Queue::new("one", concurrency, Arc::clone(&latency)));
            Self { queues: Queues::new(quota, TaskTracker::new()), queue, latency }
        }

        async fn admit(&self, patience: Duration) -> Result<Permit, Refused> {
            self.queues.admit(&self.queue, Instant::now() + patience, 1_000).await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn calls_wait_for_their_turn_in_the_order_they_came() {
        let bench = Bench::new(Every::new(SECOND / 10), 1_000);
        let (start, granted) = (Instant::now(), Mutex::new(Vec::new()));
        join_all((0..60).map(|number| {
            let (bench, granted) = (&bench, &granted);
            async move {
                bench.admit(20 * SECOND).await.unwrap();
                lock(granted).push((number, start.elapsed()));
            }
        }))
        .await;
        let granted = lock(&granted).clone();
        assert!(granted.iter().map(|(number, _)| *number).eq(0..60), "{granted:?}");
        for (place, (_, at)) in granted.iter().enumerate() {
            let ideal = SECOND / 10 * u32::try_from(place).unwrap();
            assert!(*at >= ideal && *at <= ideal + SECOND / 5, "place {place} at {at:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_could_not_be_answered_in_time_is_refused_at_once_with_the_seconds() {
        let bench = Bench::new(Every::new(12 * SECOND), 1_000);
        let start = Instant::now();
        let outcomes = join_all((0..5).map(|_| bench.admit(30 * SECOND))).await;
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 3);
        let refused: Vec<Refused> = outcomes.into_iter().filter_map(Result::err).collect();
        assert!(refused.iter().all(|refused| refused.wait >= 36 * SECOND), "{refused:?}");
        assert!(start.elapsed() < 25 * SECOND);
        let asked = Instant::now();
        let wait = bench.admit(5 * SECOND).await.map(drop).unwrap_err().wait;
        assert_eq!(asked.elapsed(), Duration::ZERO);
        assert!(wait > 10 * SECOND && wait <= 12 * SECOND, "{wait:?}");
    }

    /// As after a Redis that came back.
    #[tokio::test(start_paused = true)]
    async fn who_has_to_wait_for_the_first_call_is_not_taken_to_wait_as_long_for_each() {
        let bench = Bench::new(Every::new(SECOND / 20), 1_000);
        bench.admit(SECOND).await.unwrap();
        *lock(&bench.queues.quota().next) = Some(Instant::now() + SECOND);
        let callers = (0..60).map(|number| {
            let bench = &bench;
            async move {
                sleep(SECOND * number / 30).await;
                bench.admit(10 * SECOND).await.map(drop)
            }
        });
        let outcomes = join_all(callers).await;
        assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    }

    /// Four calls a second, twelve wanted, each takes three seconds: a queue that served everybody at their last
    /// moment made calls nobody waited for any more.
    #[tokio::test(start_paused = true)]
    async fn under_overload_the_calls_that_are_made_are_answered() {
        for (patience, takes) in
            [(20 * SECOND, 3 * SECOND), (4 * SECOND, 3 * SECOND), (3 * SECOND, SECOND / 5)]
        {
            let bench = Bench::new(Every::new(SECOND / 4), 1_000);
            let (made, answered) = (Mutex::new(0_u32), Mutex::new(0_u32));
            let callers = (0..12 * 60).map(|number| {
                let (bench, made, answered) = (&bench, &made, &answered);
                async move {
                    sleep(SECOND * number / 12).await;
                    let deadline = Instant::now() + patience;
                    let Ok(permit) = bench.admit(patience).await else { return };
                    *lock(made) += 1;
                    // Some take longer.
                    let this = if number % 25 == 0 { takes * 6 / 5 } else { takes };
                    if timeout_at(deadline, sleep(this)).await.is_ok() {
                        bench.latency.answered(this);
                        *lock(answered) += 1;
                    } else {
                        bench.latency.unanswered(deadline - (deadline - this));
                    }
                    drop(permit);
                }
            });
            join_all(callers).await;
            let (made, answered) = (*lock(&made), *lock(&answered));
            assert!(made >= 4 * 60 * 97 / 100, "{made} calls of 240 in {patience:?}");
            assert!(
                answered * 10 >= made * 9,
                "{answered} of {made} calls of {takes:?} were answered in {patience:?}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_refused_as_soon_as_it_is_known_that_it_would_be_too_late() {
        let bench = Bench::new(Every::new(SECOND), 1_000);
        let start = Instant::now();
        let waiting =
            join_all((0..8).map(|_| async { (bench.admit(10 * SECOND).await.map(drop), start.elapsed()) }));
        let slower = async {
            sleep(2 * SECOND).await;
            for _ in 0..20 {
                bench.latency.answered(5 * SECOND);
            }
        };
        let (outcomes, ()) = tokio::join!(waiting, slower);
        // 3.7 s are left for a wait, not 9: of eight, four are served; the others are told when the next call is.
        let granted = outcomes.iter().filter(|(outcome, _)| outcome.is_ok()).count();
        assert_eq!(granted, 4, "{outcomes:?}");
        assert!(outcomes.iter().all(|(_, at)| *at <= 4 * SECOND), "{outcomes:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn the_queue_is_bounded_and_a_caller_who_leaves_gives_its_place_back() {
        let bench = Bench::new(Every::new(SECOND), 1_000);
        let admit = || bench.queues.admit(&bench.queue, Instant::now() + 60 * SECOND, 10);
        admit().await.unwrap();
        let mut waiting = Box::pin(join_all((0..10).map(|_| admit())));
        assert!(timeout_at(Instant::now() + SECOND / 100, &mut waiting).await.is_err());
        assert!(admit().await.is_err());
        drop(waiting);
        assert!(admit().await.is_ok(), "places of those who left are still taken");
    }

    #[tokio::test(start_paused = true)]
    async fn tenants_take_turns_at_what_they_share() {
        let bench = Bench::new(Every { shared: true, ..Every::new(SECOND / 10) }, 1_000);
        let other = Arc::new(Queue::new("other", 1_000, Arc::default()));
        let ask = |queue: &Arc<Queue<&'static str>>, count: usize| {
            let (queues, queue) = (bench.queues.clone(), Arc::clone(queue));
            async move {
                let deadline = Instant::now() + 10 * SECOND;
                let outcomes = join_all((0..count).map(|_| queues.admit(&queue, deadline, 1_000))).await;
                outcomes.iter().filter(|outcome| outcome.is_ok()).count()
            }
        };
        let (many, few) = tokio::join!(ask(&bench.queue, 90), ask(&other, 30));
        assert_eq!(few, 30, "the smaller tenant; the other one got {many}");
        assert!(many >= 40, "{many}");
    }

    #[tokio::test(start_paused = true)]
    async fn where_nothing_is_counted_calls_wait_for_slots_and_pauses_only() {
        let bench = Bench::new(Every::new(Duration::ZERO), 3);
        let mut under_way = Vec::new();
        for _ in 0..3 {
            under_way.push(bench.admit(SECOND).await.unwrap());
        }
        assert_eq!(bench.queues.quota().asked.load(std::sync::atomic::Ordering::Relaxed), 0);
        assert!(bench.admit(SECOND).await.is_err());
        under_way.pop();
        assert!(bench.admit(SECOND).await.is_ok());
        *lock(&bench.queues.quota().paused) = Some(Instant::now() + 5 * SECOND);
        under_way.clear();
        let refused = bench.admit(2 * SECOND).await.map(drop).unwrap_err();
        assert_eq!(refused.wait, 5 * SECOND);
        let prefetch = bench.queues.admit_prefetch(&bench.queue, 0).await.map(drop).unwrap_err();
        assert_eq!(prefetch.wait, 5 * SECOND);
    }

    #[tokio::test(start_paused = true)]
    async fn prefetching_never_waits_and_leaves_slots_to_who_does() {
        let bench = Bench::new(Every::new(Duration::ZERO), 4);
        let prefetch = async || bench.queues.admit_prefetch(&bench.queue, 2).await;
        let (one, two) = (prefetch().await.unwrap(), prefetch().await.unwrap());
        assert!(prefetch().await.is_err(), "half of the slots is the reserve");
        let waiting = [bench.admit(SECOND).await.unwrap(), bench.admit(SECOND).await.unwrap()];
        drop((one, two, waiting));
        let bench = Bench::new(Every::new(SECOND), 4);
        bench.admit(SECOND).await.unwrap();
        let (waits, refused) = tokio::join!(bench.admit(5 * SECOND), async {
            sleep(SECOND / 10).await;
            bench.queues.admit_prefetch(&bench.queue, 0).await.is_err()
        });
        assert!(waits.is_ok() && refused, "who waits goes first");
    }

    /// What a caller does: comes, waits as long as it has, may leave before, holds its call for a moment.
    struct Caller {
        comes: Duration,
        patience: Duration,
        leaves: Option<Duration>,
        holds: Duration,
    }

    #[tokio::test(start_paused = true)]
    async fn callers_come_and_go_and_nobody_who_stays_is_forgotten() {
        const AT_ONCE: usize = 3;
        for seed in 0..300 {
            let mut number = crate::limiter::tests::numbers(seed);
            let bench = Bench::new(Every::new(SECOND / 10), AT_ONCE);
            let under_way = Semaphore::new(AT_ONCE);
            let callers: Vec<Caller> = (0..50)
                .map(|_| {
                    let mut millis = |below| Duration::from_millis(number(below).into());
                    let (comes, short, leaves, holds) =
                        (millis(3_000), millis(3_000), millis(1_500), millis(200));
                    let patience = if number(2) == 0 { 60 * SECOND } else { short };
                    Caller { comes, patience, leaves: (number(3) == 0).then_some(leaves), holds }
                })
                .collect();
            let (bench, under_way) = (&bench, &under_way);
            join_all(callers.into_iter().map(|caller| async move {
                sleep(caller.comes).await;
                let latest = Instant::now() + caller.leaves.unwrap_or(caller.patience + SECOND / 1_000);
                let Ok(outcome) = timeout_at(latest, bench.admit(caller.patience)).await else {
                    assert!(caller.leaves.is_some(), "seed {seed}: who stayed has no outcome");
                    return;
                };
                let patient = caller.patience == 60 * SECOND;
                assert!(outcome.is_ok() || !patient, "seed {seed}: who had time was refused");
                let Ok(permit) = outcome else { return };
                let place = under_way.try_acquire();
                assert!(place.is_ok(), "seed {seed}: more than {AT_ONCE} calls at once");
                sleep(caller.holds).await;
                drop(place);
                drop(permit);
            }))
            .await;
            // The last who left may still have been in the queue.
            sleep(3 * SECOND).await;
            assert_eq!(
                bench.queue.slots.available_permits(),
                AT_ONCE,
                "seed {seed}: a slot was not given back"
            );
            {
                let line = bench.queue.line();
                assert!(line.waiting.is_empty() && !line.served, "seed {seed}: it is served for nobody");
            }
            assert!(bench.admit(SECOND).await.is_ok(), "seed {seed}");
        }
    }
}
