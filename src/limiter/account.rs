//! An account: whose calls are counted in windows, a tenant's or the fleet's. It owns the order in which the gates
//! decide: this replica's buckets and its own calls, then Redis, or while that is away a share. It must not know
//! who waits.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{
    bucket::{Pace, nanos},
    ledger::Ledger,
    local::Local,
    reservation::Reservation,
    shared::{Demand, Reply, Shared, ahead},
    window::Window,
};
use crate::{
    cyberscan::{Priority, QuotaUse},
    redis_pool::Unavailable,
};

/// What all accounts are limited by, beside their windows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Terms {
    /// The share of a window that may be a burst, after rest.
    pub(super) burst: f64,
    /// The share of a window that each replica keeps to while Redis is away.
    pub(super) fallback_share: f64,
    /// The share of a window that is left to calls somebody waits for.
    pub(super) reserve: f64,
}

/// See the module.
pub(super) struct Account {
    name: Arc<str>,
    state: Mutex<State>,
    pub(super) shared: Option<Shared>,
    started: Instant,
    /// Time that a test lets pass.
    #[cfg(test)]
    skew: std::sync::atomic::AtomicU64,
}

pub(super) struct State {
    windows: Vec<Window>,
    pub(super) terms: Terms,
    pub(super) local: Local,
    /// Buckets of this replica's share, for when Redis is away.
    pub(super) share: Local,
    pub(super) ledger: Ledger,
    /// When calls were last granted, and whether Redis knows that the account is at rest since.
    pub(super) last: Option<u64>,
}

/// How often Redis is asked again for the same calls, where it had lost its memory.
const TRIES: u32 = 3;
/// Redis is away for longer than a new connection takes.
const GONE: Duration = Duration::from_secs(4);
/// After how long without calls an account's windows in Redis may be let go, at least.
const SHORTEST_REST: Duration = Duration::from_secs(1);

impl Account {
    pub(super) fn new(
        name: Arc<str>,
        windows: Vec<Window>,
        terms: Terms,
        shared: Option<Shared>,
        started: Instant,
    ) -> Self {
        let state = State {
            local: Local::new(&windows, terms.burst, &Local::default()),
            share: share_of(&windows, terms, &Local::default()),
            ledger: Ledger::new(&windows, Ledger::default()),
            windows,
            terms,
            last: None,
        };
        Self {
            name,
            state: Mutex::new(state),
            shared,
            started,
            #[cfg(test)]
            skew: 0.into(),
        }
    }

    pub(super) fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(super) fn windows(&self) -> Vec<Window> {
        self.state().windows.clone()
    }

    /// Whether there are windows at all.
    pub(super) fn counts(&self) -> bool {
        !self.state().windows.is_empty()
    }

    /// From now on it has these windows. Those of a length it had go on, calls under way included.
    pub(super) fn reconfigure(&self, windows: &[Window], terms: Terms) {
        let mut state = self.state();
        if state.windows == windows && state.terms == terms {
            return;
        }
        state.local = Local::new(windows, terms.burst, &state.local);
        state.share = share_of(windows, terms, &state.share);
        state.ledger = Ledger::new(windows, std::mem::take(&mut state.ledger));
        (state.windows, state.terms) = (windows.to_vec(), terms);
    }

    /// Takes as many of `calls` as this replica's buckets and its own calls allow.
    pub(super) fn begin(&self, calls: u32, priority: Priority) -> Reservation<'_> {
        let now = self.now();
        let mut state = self.state();
        let reserve = match priority {
            Priority::Interactive => None,
            Priority::Prefetch => Some(state.terms.reserve),
        };
        let (free, wait) = state.ledger.free(now, reserve.unwrap_or_default());
        let taken = state.local.take(now, calls.min(free), reserve);
        state.ledger.begin(now, taken.calls);
        let wait = wait.max(taken.wait);
        Reservation { account: self, begun: taken.calls, taken, wait, priority }
    }

    /// In how long at best there is a call for who has `ahead` others before them.
    pub(super) fn at_best(&self, ahead: usize) -> Duration {
        let now = self.now();
        let state = self.state();
        let whole = state.windows.iter().filter(|window| Pace::of(**window, 0.0).is_none()).map(|window| {
            let rounds = u32::try_from(ahead / window.limit.get() as usize).unwrap_or(u32::MAX);
            window.per.saturating_mul(rounds)
        });
        // A Redis that has just gone may come back just as soon: who is refused for it does not.
        let gone = state.ledger.away_for(now) >= GONE;
        let buckets = if gone { &state.share } else { &state.local };
        whole.max().unwrap_or_default().max(buckets.at_best(now, ahead))
    }

    pub(super) fn epoch(&self) -> u64 {
        self.state().ledger.epoch()
    }

    /// Whether Redis is away, as it looked last.
    pub(super) fn is_without_redis(&self) -> bool {
        self.state().ledger.is_away()
    }

    /// Redis does not answer.
    pub(super) fn lose_redis(&self) {
        let (now, mut state) = (self.now(), self.state());
        if state.ledger.lose_redis(now) {
            // What Redis granted just before is in the windows of a second still.
            state.share.hold(now, Duration::from_secs(1));
        }
    }

    /// How much of each window is used; that is asked of Redis where there is one.
    pub(super) async fn used(&self, of_fleet: bool) -> Vec<QuotaUse> {
        if self.counts() {
            let _ = self.ask(0, Priority::Interactive).await;
        }
        self.known_use(of_fleet)
    }

    /// As [`Account::used`], as far as it is known here.
    pub(super) fn known_use(&self, of_fleet: bool) -> Vec<QuotaUse> {
        let now = self.now();
        let mut state = self.state();
        let (away, share) = (state.ledger.is_away(), state.terms.fallback_share);
        let used = state.ledger.used(now).into_iter().map(|(window, used)| {
            let limit = if away { share_of_window(window, share).limit } else { window.limit };
            QuotaUse { of_fleet, limit: limit.get(), per: window.per, used }
        });
        used.collect()
    }

    /// Lets Redis do away with the windows once nobody has used them for twice their length.
    async fn rest_if_idle(&self) {
        let (Some(shared), now) = (&self.shared, self.now()) else { return };
        let longest = {
            let state = self.state();
            let longest = state.windows.iter().map(|window| window.per).max().unwrap_or_default();
            let longest = longest.max(SHORTEST_REST);
            match state.last {
                Some(last) if now.saturating_sub(last) > nanos(longest) => longest,
                _ => return,
            }
        };
        let resting = shared.rest(&self.name, longest).await;
        let mut state = self.state();
        if resting && state.last.is_some_and(|last| last < now) {
            state.last = None;
        }
    }

    /// Tells Redis of calls it does not know of, or may have `forgotten`, and lets windows go there that nobody
    /// uses; `false` if it is away.
    pub(super) async fn tidy(&self, forgotten: bool) -> bool {
        let tell = forgotten || self.state().ledger.owes();
        if tell && self.state().last.is_some() && self.ask(0, Priority::Interactive).await.is_err() {
            return false;
        }
        self.rest_if_idle().await;
        true
    }

    /// Asks Redis for so many calls, and tells it what it does not know.
    pub(super) async fn ask(&self, calls: u32, priority: Priority) -> Result<Reply, Unavailable> {
        let Some(shared) = &self.shared else { return Err(Unavailable) };
        for _ in 0..TRIES {
            let (told, ahead, terms) = {
                let (now, mut state) = (self.now(), self.state());
                let told = state.ledger.tell(now);
                let ahead = ahead(&told, &state.local, now);
                (told, ahead, state.terms)
            };
            let reserve = if priority == Priority::Prefetch { terms.reserve } else { 0.0 };
            let (account, told, ahead) = (&*self.name, &told, &*ahead);
            let demand = Demand { account, calls, reserve, burst: terms.burst, told, ahead };
            let reply = shared.take(&demand).await?;
            let (now, mut state) = (self.now(), self.state());
            let current = state.ledger.hear(now, told, reply.memory);
            if !reply.forgot {
                state.ledger.acknowledged(told);
                reply.windows.iter().for_each(|window| state.ledger.hear_used(now, window.per, window.used));
                if !current {
                    // Redis has lost these since.
                    state.ledger.made_alone(now, reply.calls.min(calls));
                }
                return Ok(reply);
            }
        }
        Ok(Reply::default())
    }

    /// Nanoseconds on the limiter's clock. A year ahead, so that the longest window does not begin before nought.
    pub(super) fn now(&self) -> u64 {
        let now = nanos(self.started.elapsed() + Duration::from_secs(366 * 86_400));
        #[cfg(test)]
        let now = now + self.skew.load(std::sync::atomic::Ordering::Relaxed);
        now
    }

    /// Held for some arithmetic; nothing in between can panic, so poison is ignored.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Buckets of this replica's share, evenly spaced: several replicas may have one.
fn share_of(windows: &[Window], terms: Terms, before: &Local) -> Local {
    let windows: Vec<Window> =
        windows.iter().map(|window| share_of_window(*window, terms.fallback_share)).collect();
    Local::new(&windows, 0.0, before)
}

fn share_of_window(window: Window, share: f64) -> Window {
    let limit = (f64::from(window.limit.get()) * share) as u32;
    Window { limit: limit.try_into().unwrap_or(std::num::NonZeroU32::MIN), ..window }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::Relaxed;

    use futures_util::future::join_all;

    use super::*;
    use crate::{
        limiter::{
            shared::{fault, tests::shift},
            tests::numbers,
        },
        redis_pool::Redis,
        redis_server::RedisServer,
    };

    const SECOND: u64 = 1_000_000_000;
    const DAY: u64 = 86_400 * SECOND;
    const PER_SECOND: usize = 12;
    const PER_DAY: usize = 60;

    /// Three replicas on one Redis, and the calls they made.
    struct Fleet {
        server: RedisServer,
        replicas: Vec<Account>,
        made: Vec<u64>,
        /// Calls Redis has granted and nobody has made, because its answer got lost, at most.
        lost: usize,
        /// Calls made while who made them did not reach Redis.
        alone: usize,
    }

    impl Fleet {
        async fn new(server: RedisServer) -> Self {
            server.ask::<String>(&["FLUSHALL"]).await;
            let windows: Vec<Window> = [format!("{PER_SECOND}/s"), format!("{PER_DAY}/d")]
                .map(|window| window.parse().unwrap())
                .to_vec();
            let terms = Terms { burst: 0.5, fallback_share: 0.3, reserve: 0.5 };
            let started = Instant::now();
            let replica = || {
                let shared = Shared::new(Redis::to(&server.url()));
                Account::new("t".into(), windows.clone(), terms, Some(shared), started)
            };
            let replicas = vec![replica(), replica(), replica()];
            Self { server, replicas, made: Vec::new(), lost: 0, alone: 0 }
        }

        /// What so many calls wanted by each of these come to.
        async fn take(&mut self, who: &[usize], calls: u32) {
            let taking = who.iter().map(|who| async {
                let replica = &self.replicas[*who];
                let grant = replica.begin(calls, Priority::Interactive).settle().await;
                (replica.now(), grant.calls)
            });
            let reached = self.replicas[0].shared.as_ref().unwrap().fault.load(Relaxed) == fault::NONE;
            for (at, calls) in join_all(taking).await {
                self.alone += if reached { 0 } else { calls as usize };
                self.made.extend(std::iter::repeat_n(at, calls as usize));
            }
        }

        fn break_all(&self, fault: u8) {
            for replica in &self.replicas {
                replica.shared.as_ref().unwrap().fault.store(fault, Relaxed);
            }
        }

        /// Redis is there again, and has been told within a second.
        async fn mend_all(&self) {
            self.break_all(fault::NONE);
            for replica in &self.replicas {
                assert!(replica.tidy(false).await);
            }
        }

        /// Time passes, here and there.
        async fn pass(&self, time: Duration) {
            for replica in &self.replicas {
                replica.skew.fetch_add(nanos(time), Relaxed);
            }
            shift(&self.server, "t", i64::try_from(time.as_micros()).unwrap()).await;
        }

        fn most_within(&self, span: u64) -> usize {
            let mut made = self.made.clone();
            made.sort_unstable();
            let within =
                |first: usize| made[first..].iter().take_while(|at| **at < made[first] + span).count();
            (0..made.len()).map(within).max().unwrap_or(0)
        }
    }

    /// The promise of the limiter over everything that can happen to it: Redis's clock steps, its memory
    /// is lost, demands and answers are, Redis is away for all, replicas ask at once.
    #[tokio::test]
    async fn whatever_happens_no_window_has_more_calls_than_it_says() {
        let mut server = Some(RedisServer::process(&[]).await);
        for seed in 0..120 {
            let mut number = numbers(seed);
            let mut fleet = Fleet::new(server.take().unwrap()).await;
            // Who has never asked cannot notice that Redis has forgotten.
            for who in 0..3 {
                fleet.take(&[who], 1).await;
                fleet.pass(Duration::from_secs(1)).await;
            }
            let mut log = Vec::new();
            for _ in 0..90 {
                let who = number(3) as usize;
                let happens = number(100);
                log.push((happens, who));
                match happens {
                    0..50 => fleet.take(&[who], 1 + number(6)).await,
                    50..60 => fleet.take(&[0, 1, 2], 1 + number(4)).await,
                    60..75 => fleet.pass(Duration::from_millis(u64::from(number(1_500)))).await,
                    75..79 => fleet.pass(Duration::from_secs(u64::from(number(4 * 3_600)))).await,
                    // Its clock steps.
                    79..81 => shift(&fleet.server, "t", -45_000_000).await,
                    81..83 => {
                        // Who has not heard of this memory does not know what its clock should show.
                        let heard = |replica: &Account| replica.epoch() == fleet.replicas[who].epoch();
                        if fleet.replicas.iter().all(heard) {
                            shift(&fleet.server, "t", 3_600_000_000).await;
                        }
                    }
                    83..87 => {
                        fleet.break_all(fault::NOT_ANSWERED);
                        fleet.take(&[who], 3).await;
                        fleet.lost += 3;
                        fleet.mend_all().await;
                    }
                    87..91 => {
                        fleet.break_all(fault::NOT_SENT);
                        for _ in 0..number(12) {
                            fleet.take(&[number(3) as usize], 2).await;
                            fleet.pass(Duration::from_millis(u64::from(number(900)))).await;
                        }
                        fleet.mend_all().await;
                    }
                    91..93 => {
                        fleet.server.ask::<String>(&["FLUSHALL"]).await;
                        // Each notices within a second.
                        for replica in &fleet.replicas {
                            assert!(replica.tidy(true).await);
                        }
                    }
                    _ => {}
                }
            }
            // On a busy machine a grant is noted some milliseconds after it was made.
            let most = fleet.most_within(SECOND * 19 / 20);
            assert!(most <= PER_SECOND, "seed {seed}: {most} calls in a second: {log:?}");
            let most = fleet.most_within(DAY);
            // Who does not reach Redis does not know what the others have used since.
            let most_of_day = PER_DAY + fleet.alone;
            assert!(most <= most_of_day, "seed {seed}: {most} calls in a day: {log:?}");
            // In the end everybody has told everything, and Redis knows of every call.
            for who in 0..3 {
                fleet.pass(Duration::from_secs(5)).await;
                fleet.take(&[who], 1).await;
            }
            fleet.take(&[0, 1, 2], 1).await;
            let now = fleet.replicas[0].now();
            let made = fleet.made.iter().filter(|at| **at + DAY > now).count();
            let used = fleet.replicas[0].used(false).await[1].used as usize;
            assert!(used >= made, "seed {seed}: {used} of {made} calls are known: {log:?}");
            let lost = fleet.lost;
            // Those of the part that is leaving count as well; those made without Redis from when it is told of them.
            let leaving = fleet.made.iter().filter(|at| **at + DAY + DAY / 2 > now).count();
            assert!(used <= leaving + lost, "seed {seed}: {used} of {leaving}, {lost} lost: {log:?}");
            server = Some(fleet.server);
        }
    }
}
