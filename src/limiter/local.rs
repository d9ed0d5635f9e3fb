//! This replica's token buckets, kept by governor: the first gate of every call, with Redis, without it and
//! while it is away. It owns how calls are spaced; it must not know Redis, nor who waits.
//!
//! A window of up to a minute has a bucket that is refilled evenly. governor decides; what it remembers is
//! ours ([`Memory`]), for two reasons: a call that another gate refuses is put back, and a burst has to be
//! earned. A plain bucket lets a burst through *and then* the whole rate, almost twice a window's calls in
//! one window. Here only rest just before it allows a burst, and the calls after it wait until it has been
//! paid for. So no span of a window's length ever has more calls than the window says:
//!
//! Each call moves the bucket's time forward by one interval, from now at least. The last of `n` calls in a
//! span found that time at most `late` ahead of now, or it was part of a burst, which is no longer than the
//! rest before it. Either way `(n - 1) * interval < per + late`, and the interval is chosen such that
//! `n` is at most the limit, even if the last call is `SPREAD` late on its way.

use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use governor::{
    Quota, RateLimiter,
    clock::Clock,
    middleware::NoOpMiddleware,
    nanos::Nanos,
    state::{NotKeyed, StateStore},
};

use super::window::Window;

/// The longest window whose calls are spaced. Of a longer one all may be made at once.
pub(super) const LONGEST_SPACED: Duration = Duration::from_secs(60);
/// How much later than it could a call may come without being lost, as a share of the window and at most.
const LATE: (u64, u64) = (100, 20_000_000);
/// How differently long calls may take from here to CyberScan, in the same way.
const SPREAD: (u64, u64) = (71, 50_000_000);
/// The most calls at once, whatever the window.
const MOST_AT_ONCE: u32 = 1_000_000;

/// How the calls of a window are spaced. Times are nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pace {
    /// From one call to the next.
    pub(super) interval: u64,
    /// Calls at once, after rest.
    pub(super) burst: u32,
    /// How much earlier than an interval after the last a call may come, if those before it came late.
    pub(super) late: u64,
    /// How much later than the others a call may arrive without there being too many in a window.
    pub(super) spread: u64,
    /// governor counts a call as so many cells, so that its tolerance need not be whole calls.
    cells: u32,
}

impl Pace {
    /// Of `window`, if its calls are spaced, with bursts of that share of its limit.
    pub(super) fn of(window: Window, burst: f64) -> Option<Self> {
        if window.per > LONGEST_SPACED {
            return None;
        }
        let (per, limit) = (nanos(window.per), window.limit.get());
        let part = |(share, most): (u64, u64)| (per / share).min(most);
        let interval = (per + part(LATE) + part(SPREAD)).div_ceil(u64::from(limit)).max(1_000);
        // A cell is a whole microsecond's part of an interval at most, and an interval whole cells: Redis, whose
        // numbers have 53 bits, counts the same.
        let cells = (interval / 1_000).min(1_000);
        let cell = interval.div_ceil(cells);
        Some(Self {
            interval: cell * cells,
            burst: ((f64::from(limit) * burst) as u32).clamp(1, limit.min(MOST_AT_ONCE)),
            late: part(LATE) / cell * cell,
            spread: part(SPREAD),
            cells: u32::try_from(cells).unwrap_or(1),
        })
    }

    fn cell(self) -> u64 {
        self.interval / u64::from(self.cells)
    }
}

/// The bucket of one window.
pub(super) struct Bucket {
    pace: Pace,
    governor: RateLimiter<NotKeyed, Memory, Memory, NoOpMiddleware<Nanos>>,
    memory: Memory,
}

/// What a bucket remembers, governor's state and clock at once. It is behind the lock of whoever owns the
/// bucket; that governor wants to share it is why it is made of atomics.
#[derive(Clone)]
struct Memory {
    pace: Pace,
    slots: Arc<Slots>,
}

struct Slots {
    /// The time it is decided for, nanoseconds.
    now: AtomicU64,
    /// When the next call would be due if none came early: governor's theoretical arrival time.
    due: AtomicU64,
    /// Calls that may come before they are due: what is left of a burst.
    earned: AtomicU32,
}

/// A bucket as it was, to be put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Level {
    due: u64,
    earned: u32,
}

/// Nobody has called yet.
const NEVER: u64 = u64::MAX;

impl Memory {
    fn level(&self) -> Level {
        Level { due: self.slots.due.load(Relaxed), earned: self.slots.earned.load(Relaxed) }
    }

    fn set(&self, level: Level) {
        self.slots.due.store(level.due, Relaxed);
        self.slots.earned.store(level.earned, Relaxed);
    }

    /// Calls that rest until `now` has earned, beside the one that is due.
    fn earned(&self, level: Level, now: u64) -> u32 {
        let most = self.pace.burst - 1;
        match level.due {
            NEVER => most,
            due if due <= now => u32::try_from((now - due) / self.pace.interval).unwrap_or(most).min(most),
            _ => level.earned,
        }
    }
}

impl Clock for Memory {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        self.slots.now.load(Relaxed).into()
    }
}

impl StateStore for Memory {
    type Key = NotKeyed;

    fn measure_and_replace<T, F, E>(&self, _: &NotKeyed, decide: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let (now, level) = (self.slots.now.load(Relaxed), self.level());
        let earned = self.earned(level, now);
        let early = level.due != NEVER && level.due > now;
        let shown = match level.due {
            NEVER => None,
            // governor would allow a burst at any time; without rest there is none.
            due if early && earned == 0 => Some(due + u64::from(self.pace.burst - 1) * self.pace.interval),
            due => Some(due),
        };
        let (outcome, due) = decide(shown.map(Nanos::from))?;
        // What was shown later than it is was allowed for coming late only, and is no later for it.
        let hidden = shown.zip(Some(level.due)).map_or(0, |(shown, due)| shown - due);
        let due = due.as_u64() - hidden;
        self.set(Level { due, earned: if early { earned.saturating_sub(1) } else { earned } });
        Ok(outcome)
    }
}

impl Bucket {
    /// A full one.
    pub(super) fn full(pace: Pace) -> Self {
        let slots = Slots {
            now: AtomicU64::new(0),
            due: AtomicU64::new(NEVER),
            earned: AtomicU32::new(pace.burst - 1),
        };
        let memory = Memory { pace, slots: Arc::new(slots) };
        let late = u32::try_from(pace.late / pace.cell()).unwrap_or(u32::MAX);
        let cells = pace.cells.saturating_mul(pace.burst).saturating_add(late);
        let cell = Duration::from_nanos(pace.cell());
        let quota = Quota::with_period(cell).expect("a cell takes some time");
        let quota = quota.allow_burst(NonZeroU32::new(cells).unwrap_or(NonZeroU32::MIN));
        let governor = RateLimiter::new(quota, memory.clone(), memory.clone());
        Self { pace, governor, memory }
    }

    /// Takes a call at `now`, or says in how long there is one.
    pub(super) fn take(&self, now: u64) -> Result<(), Duration> {
        self.memory.slots.now.store(now, Relaxed);
        let cells = NonZeroU32::new(self.pace.cells).unwrap_or(NonZeroU32::MIN);
        match self.governor.check_n(cells) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(not_until)) => {
                Err(not_until.wait_time_from(Nanos::from(now)).max(Duration::from_nanos(1)))
            }
            Err(_) => Err(Duration::from_nanos(self.pace.interval)),
        }
    }

    /// How many calls nobody waits for may be taken at `now`, such that `reserve` of the rate, and of a burst,
    /// is left to those who do.
    fn open_to_prefetch(&self, now: u64, reserve: f64) -> u32 {
        let level = self.memory.level();
        let of_burst = (f64::from(self.pace.burst) * reserve).ceil() as u32;
        let earned = self.memory.earned(level, now).saturating_sub(of_burst);
        // After each the bucket rests for so much longer that the rest of the rate is free.
        let rest = self.pace.interval as f64 * reserve / (1.0 - reserve).max(f64::MIN_POSITIVE);
        match level.due {
            NEVER if reserve < 1.0 => 1 + earned,
            due if due != NEVER && (now as f64) >= due as f64 + rest => 1 + earned,
            due if due > now && due != NEVER => earned,
            _ => 0,
        }
    }

    /// No call for `pause`, and no burst until there has been rest.
    pub(super) fn hold(&self, now: u64, pause: Duration) {
        let until = now.saturating_add(nanos(pause));
        let due = match self.memory.level().due {
            NEVER => until,
            due => due.max(until),
        };
        self.memory.set(Level { due, earned: 0 });
    }
}

/// The buckets of an account's windows.
#[derive(Default)]
pub(super) struct Local(Vec<(Duration, Bucket)>);

/// Calls taken from all buckets, which may be given back as long as nobody else has taken one.
#[derive(Default)]
pub(super) struct Taken {
    pub(super) calls: u32,
    /// In how long there is a call, where there are fewer than were wanted.
    pub(super) wait: Duration,
    /// How each bucket was before each call, and after the last.
    before: Vec<Vec<Level>>,
    after: Vec<Level>,
}

impl Local {
    /// Full buckets, but for windows that were in `before`: these go on.
    pub(super) fn new(windows: &[Window], burst: f64, before: &Self) -> Self {
        let bucket = |window: &Window| {
            let bucket = Bucket::full(Pace::of(*window, burst)?);
            if let Some((_, old)) = before.0.iter().find(|(per, _)| *per == window.per) {
                let level = old.memory.level();
                bucket.memory.set(Level { due: level.due, earned: level.earned.min(bucket.pace.burst - 1) });
            }
            Some((window.per, bucket))
        };
        Self(windows.iter().filter_map(bucket).collect())
    }

    /// Takes as many of `calls` as every bucket has, `reserve` left out for calls nobody waits for.
    pub(super) fn take(&self, now: u64, calls: u32, reserve: Option<f64>) -> Taken {
        let open = |(_, bucket): &(_, Bucket)| {
            reserve.map_or(u32::MAX, |reserve| bucket.open_to_prefetch(now, reserve))
        };
        let open = self.0.iter().map(open).min().unwrap_or(u32::MAX);
        let mut taken = Taken::default();
        if open < calls {
            let intervals = self.0.iter().map(|(_, bucket)| bucket.pace.interval);
            taken.wait = Duration::from_nanos(intervals.max().unwrap_or_default());
        }
        while taken.calls < calls.min(open) {
            let before = self.levels();
            let refused = self.0.iter().filter_map(|(_, bucket)| bucket.take(now).err()).max();
            if let Some(wait) = refused {
                self.set(&before);
                taken.wait = wait;
                break;
            }
            taken.before.push(before);
            taken.calls += 1;
        }
        taken.after = self.levels();
        taken
    }

    /// Gives back all but the first `keep` calls. Where somebody else has taken one since, they are lost: a call
    /// given back in between could be had a second time.
    pub(super) fn give_back(&self, taken: &mut Taken, keep: u32) {
        if keep >= taken.calls {
            return;
        }
        if let Some(before) = taken.before.get(keep as usize)
            && self.levels() == taken.after
        {
            self.set(before);
            taken.after.clone_from(before);
        }
        taken.before.truncate(keep as usize);
        taken.calls = keep;
    }

    /// No call for at most a second, and no burst until there has been rest.
    pub(super) fn hold(&self, now: u64, longest: Duration) {
        for (per, bucket) in &self.0 {
            bucket.hold(now, (*per).min(longest));
        }
    }

    /// In how long every bucket has a call for who has `ahead` others before them.
    pub(super) fn at_best(&self, now: u64, ahead: usize) -> Duration {
        let calls = u64::try_from(ahead).unwrap_or(u64::MAX);
        let wait = |(_, bucket): &(_, Bucket)| {
            let level = bucket.memory.level();
            let lead = if level.due == NEVER { 0 } else { level.due.saturating_sub(now) };
            let at_once = u64::from(bucket.memory.earned(level, now)) + u64::from(lead == 0);
            if calls < at_once { 0 } else { lead.saturating_add(calls.saturating_mul(bucket.pace.interval)) }
        };
        Duration::from_nanos(self.0.iter().map(wait).max().unwrap_or_default())
    }

    /// How far the bucket of the window of length `per` is ahead of now: in how long the next call is due.
    pub(super) fn ahead(&self, now: u64, per: Duration) -> Duration {
        let bucket = self.0.iter().find(|(of, _)| *of == per);
        let due = bucket.map(|(_, bucket)| bucket.memory.level().due).filter(|due| *due != NEVER);
        Duration::from_nanos(due.unwrap_or_default().saturating_sub(now))
    }

    /// Another gate is so far ahead in the window of length `per`: here the next call is due no earlier.
    pub(super) fn keep_up(&self, now: u64, per: Duration, ahead: Duration) {
        if let Some((_, bucket)) = self.0.iter().find(|(of, _)| *of == per) {
            let (level, due) = (bucket.memory.level(), now.saturating_add(nanos(ahead)));
            if level.due != NEVER && level.due < due && !ahead.is_zero() {
                bucket.memory.set(Level { due, ..level });
            }
        }
    }

    fn levels(&self) -> Vec<Level> {
        self.0.iter().map(|(_, bucket)| bucket.memory.level()).collect()
    }

    fn set(&self, levels: &[Level]) {
        for ((_, bucket), level) in self.0.iter().zip(levels) {
            bucket.memory.set(*level);
        }
    }
}

/// Nanoseconds.
pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;
    const MILLI: u64 = 1_000_000;
    /// No test begins at nought: a bucket looks back.
    const START: u64 = 1_000 * SECOND;

    fn local(windows: &str, burst: f64) -> Local {
        let windows: Vec<Window> = windows.split(',').map(|window| window.parse().unwrap()).collect();
        Local::new(&windows, burst, &Local::default())
    }

    fn take(local: &Local, now: u64, calls: u32) -> u32 {
        local.take(now, calls, None).calls
    }

    /// When calls are made under constant demand, looked for each `step`.
    fn demand(local: &Local, from: u64, to: u64, step: u64) -> Vec<u64> {
        let mut made = Vec::new();
        let mut now = from;
        while now < to {
            made.extend(std::iter::repeat_n(now, take(local, now, 16) as usize));
            now += step;
        }
        made
    }

    fn most_within(made: &[u64], span: u64) -> usize {
        let within = |first: usize| made[first..].iter().take_while(|at| **at < made[first] + span).count();
        (0..made.len()).map(within).max().unwrap_or(0)
    }

    #[test]
    fn after_rest_there_is_a_burst_and_under_demand_calls_are_spaced() {
        let bucket = local("20/s", 0.5);
        let made = demand(&bucket, START, START + 10 * SECOND, MILLI);
        assert!(
            made[9] == START && made[10] > START + SECOND / 2,
            "a burst of ten, and what it cost: {made:?}"
        );
        let steady: Vec<u64> = made[10..].windows(2).map(|two| two[1] - two[0]).collect();
        assert!(steady.iter().all(|gap| (45 * MILLI..=55 * MILLI).contains(gap)), "{steady:?}");
        assert!(made.len() >= 194, "{} of 200", made.len());
        assert_eq!(most_within(&made, SECOND), 20);
        // A call at a time earns no burst.
        let calls = demand(&bucket, START + 10 * SECOND, START + 11 * SECOND, 51 * MILLI);
        assert_eq!(most_within(&calls, 100 * MILLI), 2);
        // Rest does, as much as there was of it.
        let now = START + 11 * SECOND;
        assert!((4..=6).contains(&take(&bucket, now + 250 * MILLI, 16)));
    }

    #[test]
    fn without_a_burst_the_first_call_is_alone() {
        let bucket = local("20/s", 0.0);
        assert_eq!(take(&bucket, START, 16), 1);
        assert_eq!(take(&bucket, START + 40 * MILLI, 16), 0);
        assert_eq!(take(&bucket, START + 52 * MILLI, 16), 1);
    }

    #[test]
    fn windows_of_more_than_a_minute_are_not_spaced() {
        assert!(local("5000/d,1000/h", 0.5).0.is_empty());
        assert_eq!(take(&local("5000/d", 0.5), START, 200), 200);
    }

    #[test]
    fn a_call_is_taken_from_all_buckets_or_from_none_and_can_be_given_back() {
        let buckets = local("20/s,3/m", 1.0);
        let mut taken = buckets.take(START, 16, None);
        assert_eq!(taken.calls, 3);
        assert!(taken.wait > Duration::from_secs(59), "{:?}", taken.wait);
        buckets.give_back(&mut taken, 1);
        let mut taken = buckets.take(START, 16, None);
        assert_eq!(taken.calls, 2);
        buckets.give_back(&mut taken, 0);
        let mut taken = buckets.take(START, 1, None);
        assert_eq!(take(&buckets, START, 16), 1, "the minute's third");
        buckets.give_back(&mut taken, 0);
        assert_eq!(take(&buckets, START, 16), 0, "somebody has called since: what is given back is lost");
    }

    #[test]
    fn calls_that_come_late_are_not_lost() {
        let bucket = local("20/s", 0.0);
        let mut made = 0;
        for slot in 0..2_000 {
            // Each up to 9 ms after it could be.
            made += take(&bucket, START + slot * 51_210_000 + slot * 7_919_477 % (9 * MILLI), 1);
        }
        assert_eq!(made, 2_000);
    }

    #[test]
    fn prefetching_leaves_half_of_the_rate_and_of_a_burst() {
        let bucket = local("20/s", 0.5);
        let prefetch = |now| bucket.take(now, 16, Some(0.5)).calls;
        assert_eq!(prefetch(START), 5);
        assert_eq!(prefetch(START), 0);
        assert_eq!(take(&bucket, START, 16), 5, "the reserve was gone");
        let mut made = 0;
        for step in 0..10_000 {
            made += prefetch(START + 10 * SECOND + step * MILLI);
        }
        assert!((94..=106).contains(&made), "{made} of half of 200");
        let never = |reserve| local("20/s", 0.5).take(START, 16, Some(reserve)).calls;
        assert_eq!((never(1.0), never(0.0)), (0, 10));
    }

    #[test]
    fn the_wait_is_as_long_as_it_says_and_the_place_in_a_queue_tells_more() {
        let bucket = local("20/s", 0.5);
        assert_eq!(bucket.at_best(START, 9), Duration::ZERO);
        assert!(bucket.at_best(START, 10) > Duration::from_millis(500));
        assert_eq!(take(&bucket, START, 16), 10);
        let wait = nanos(bucket.take(START, 1, None).wait);
        assert_eq!(take(&bucket, START + wait - 1_000, 1), 0);
        assert_eq!(take(&bucket, START + wait, 1), 1);
        let ten = nanos(bucket.at_best(START + wait, 9));
        assert!((500 * MILLI..=530 * MILLI).contains(&ten), "{ten}");
    }

    #[test]
    fn a_hold_and_another_gate_that_is_ahead_are_kept() {
        let bucket = local("20/s", 0.5);
        bucket.hold(START, Duration::from_secs(5));
        assert_eq!(take(&bucket, START + SECOND - 20 * MILLI, 16), 0);
        assert_eq!(take(&bucket, START + SECOND, 16), 1, "and there is no burst");
        let now = START + 2 * SECOND;
        take(&bucket, now, 1);
        bucket.keep_up(now, Duration::from_secs(1), Duration::from_millis(300));
        assert_eq!(bucket.ahead(now, Duration::from_secs(1)), Duration::from_millis(300));
    }

    #[test]
    fn a_window_of_the_same_length_goes_on_under_another_limit() {
        let old = local("20/s", 0.5);
        take(&old, START, 16);
        let new = Local::new(&["40/s".parse().unwrap()], 0.5, &old);
        assert_eq!(take(&new, START, 16), 0, "the burst has been had");
        assert!(take(&new, START + 530 * MILLI, 16) > 0);
    }

    #[test]
    fn every_quota_there_can_be_has_a_bucket() {
        for limit in [1_u32, 2, 3, 999, 1_000, 1_001, 999_999, 1_000_000, 1_000_000_000] {
            for seconds in [1, 2, 59, 60] {
                let window = Window { limit: limit.try_into().unwrap(), per: Duration::from_secs(seconds) };
                let buckets = Local::new(&[window], 0.5, &Local::default());
                let made = take(&buckets, START, 16);
                assert!(made >= 1 && made <= limit, "{made} of {limit}/{seconds}s");
            }
        }
    }

    proptest! {
        /// Whatever is asked for and when: the promise the whole module is about.
        #[test]
        fn no_span_holds_more_calls_than_the_limit(
            limit in 1..60_u32, burst in 0.0..=1.0_f64, seconds in prop::sample::select(vec![1_u64, 7, 60]),
            asks in prop::collection::vec((0..300_u64, 0..20_u32, prop::bool::weighted(0.2)), 1..400),
        ) {
            let bucket = local(&format!("{limit}/{seconds}s"), burst);
            let (mut now, mut made) = (START, Vec::new());
            for (gap, calls, given_back) in asks {
                now += gap * gap * MILLI / 90 * seconds;
                let mut taken = bucket.take(now, calls, None);
                if given_back {
                    bucket.give_back(&mut taken, 0);
                }
                made.extend(std::iter::repeat_n(now, taken.calls as usize));
            }
            prop_assert!(most_within(&made, seconds * SECOND) <= limit as usize);
        }

        /// Half of a window at once, and calls that are delayed by up to a fifth of it on their way.
        #[test]
        fn what_arrives_late_is_at_most_a_quarter_more(
            limit in 4..60_u32, asks in prop::collection::vec((0..200_u64, 0..20_u32, 0..200_u64), 1..400),
        ) {
            let bucket = local(&format!("{limit}/s"), 0.5);
            let (mut now, mut arrived) = (START, Vec::new());
            for (gap, calls, delay) in asks {
                now += gap * gap * MILLI / 90;
                let made = take(&bucket, now, calls);
                arrived.extend(std::iter::repeat_n(now + delay * MILLI, made as usize));
            }
            arrived.sort_unstable();
            let most = most_within(&arrived, SECOND);
            prop_assert!(most as f64 <= (f64::from(limit) * 1.25).ceil(), "{most} of {limit}");
        }
    }
}
