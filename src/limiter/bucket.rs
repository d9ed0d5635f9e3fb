//! A token bucket, kept by governor. It owns how the calls of one window are spaced; it must not know what other
//! buckets and gates there are.
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
pub(super) struct Level {
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
    pub(super) fn open_to_prefetch(&self, now: u64, reserve: f64) -> u32 {
        let level = self.level();
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

    /// Goes on where an `old` bucket of the same length was.
    pub(super) fn go_on(&self, old: &Self) {
        let level = old.level();
        self.set(Level { earned: level.earned.min(self.pace.burst - 1), ..level });
    }

    pub(super) fn level(&self) -> Level {
        self.memory.level()
    }

    /// Puts the bucket back as it was.
    pub(super) fn set(&self, level: Level) {
        self.memory.set(level);
    }

    /// From one call to the next.
    pub(super) fn interval(&self) -> u64 {
        self.pace.interval
    }

    /// In how long there is a call for who has `calls` others before them.
    pub(super) fn at_best(&self, now: u64, calls: u64) -> u64 {
        let ahead = self.ahead(now);
        let at_once = u64::from(self.memory.earned(self.level(), now)) + u64::from(ahead == 0);
        if calls < at_once { 0 } else { ahead.saturating_add(calls.saturating_mul(self.pace.interval)) }
    }

    /// In how long the next call is due.
    pub(super) fn ahead(&self, now: u64) -> u64 {
        match self.level().due {
            NEVER => 0,
            due => due.saturating_sub(now),
        }
    }

    /// Another gate is so far `ahead`: here the next call is due no earlier.
    pub(super) fn keep_up(&self, now: u64, ahead: Duration) {
        let (level, due) = (self.level(), now.saturating_add(nanos(ahead)));
        if level.due != NEVER && level.due < due && !ahead.is_zero() {
            self.set(Level { due, ..level });
        }
    }

    /// No call for `pause`, and no burst until there has been rest.
    pub(super) fn hold(&self, now: u64, pause: Duration) {
        let until = now.saturating_add(nanos(pause));
        let due = match self.level().due {
            NEVER => until,
            due => due.max(until),
        };
        self.set(Level { due, earned: 0 });
    }
}

/// Nanoseconds.
pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
