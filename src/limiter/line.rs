//! Who waits for calls of one tenant, in their order, and how fast that moves. It owns places, deadlines and
//! estimates; it must not know how calls are got.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::Instant,
};

use super::quota::Grant;
use crate::{cyberscan::latency::Latency, metrics::QuotaScope};

/// How long a queue must have moved before its throughput tells how long others will wait: for longer than Redis takes
/// to come back from what happens every day.
const SPAN: Duration = Duration::from_secs(4);
/// From when on a span that is not over says something.
const PART: Duration = Duration::from_secs(1);
/// Fewer calls in a span say nothing.
const FEW: f64 = 4.0;
/// How often it is asked again whether there is a call, however long that will take as it looks: more than a window
/// of a second takes.
pub(super) const RECOUNT: Duration = Duration::from_secs(2);

/// One tenant's queue.
pub(super) struct Queue<A> {
    pub(super) account: A,
    /// Calls that may be under way at once.
    pub(super) slots: Arc<Semaphore>,
    latency: Arc<Latency>,
    line: Mutex<Line>,
}

#[derive(Default)]
pub(super) struct Line {
    pub(super) waiting: VecDeque<Waiter>,
    /// How fast it moves.
    pub(super) throughput: Throughput,
    /// A task is serving the queue.
    pub(super) served: bool,
    /// When the tenant's own quota has a call for it.
    pub(super) next: Option<Estimate>,
    /// The [`Grant::epoch`] of the last grant.
    epoch: u64,
}

/// Someone who waits for a call.
pub(super) struct Waiter {
    pub(super) granter: oneshot::Sender<Result<Permit, Refused>>,
    pub(super) came: Instant,
    /// When an answer would be too late.
    pub(super) deadline: Instant,
}

/// When a call can be granted, as it looked at some time. Redis, or its memory, may be lost or found at any moment: where
/// nobody has looked again for a while, the next caller does.
#[derive(Clone, Copy)]
pub(super) struct Estimate {
    pub(super) until: Instant,
    pub(super) as_of: Instant,
}

impl Estimate {
    /// In what time that is, for someone with `ahead` others before them.
    pub(super) fn wait(self, ahead: usize, now: Instant) -> Duration {
        if ahead == 0 && now - self.as_of >= 2 * RECOUNT {
            return Duration::ZERO;
        }
        self.until.saturating_duration_since(now)
    }
}

/// Leave to make one call. The tenant's slot is free again when it is dropped.
pub struct Permit {
    pub(super) _slot: OwnedSemaphorePermit,
}

/// There is no call in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    /// In how long there may be one.
    pub(super) wait: Duration,
    /// Whose quota it is that has none.
    pub(super) scope: QuotaScope,
}

impl<A> Queue<A> {
    /// An empty one of which `concurrency` calls may be under way at once, to a host with that latency.
    pub(super) fn new(account: A, concurrency: usize, latency: Arc<Latency>) -> Self {
        // Of the first grant nothing is known.
        let line = Mutex::new(Line { epoch: u64::MAX, ..Line::default() });
        Self { account, slots: Arc::new(Semaphore::new(concurrency)), latency, line }
    }

    /// What is known of when there will be a call is not known any more.
    pub(super) fn forget_estimate(&self) {
        self.line().next = None;
    }

    pub(super) fn line(&self) -> MutexGuard<'_, Line> {
        lock(&self.line)
    }

    /// Until when it is worth to wait: later a call would be paid for and then be cut off.
    pub(super) fn latest(&self, came: Instant, deadline: Instant) -> Instant {
        let patience = deadline.saturating_duration_since(came);
        deadline.checked_sub(self.latency.needed(patience)).unwrap_or(came)
    }
}

impl Line {
    /// Grants a call to who waits, with each of `slots`.
    pub(super) fn wake(&mut self, mut slots: Vec<OwnedSemaphorePermit>) {
        while let Some(slot) = slots.pop()
            && let Some(waiter) = self.waiting.pop_front()
        {
            // Who has left in the meantime leaves the call to the next one.
            if let Err(Ok(Permit { _slot: slot })) = waiter.granter.send(Ok(Permit { _slot: slot })) {
                slots.push(slot);
            }
        }
    }

    /// What a grant says about how fast this line moves.
    pub(super) fn note(&mut self, now: Instant, grant: &Grant) {
        // A pause says nothing about it, nor does what was before Redis, or its memory, was lost or found.
        if grant.paused || self.epoch != grant.epoch {
            self.epoch = grant.epoch;
            self.throughput = Throughput::default();
        }
        self.throughput.note(now, grant.calls);
    }
}

/// Calls a second granted to who waits. Who is refused does not come back, so it is the most of what can be true: of the
/// last spans the best one counts, and chance may have made its calls fewer.
#[derive(Clone, Copy, Default)]
pub(super) struct Throughput {
    /// When this span began, and the calls in it. The first begins with a call: how long that had to be waited for
    /// says nothing about the next.
    span: Option<(Instant, u32)>,
    /// Of the spans before it, newest first.
    before: [Option<f64>; 2],
}

impl Throughput {
    fn note(&mut self, now: Instant, calls: u32) {
        match &mut self.span {
            None if calls > 0 => self.span = Some((now, 0)),
            None => {}
            Some((since, counted)) => {
                *counted = counted.saturating_add(calls);
                let length = now.saturating_duration_since(*since);
                if length >= SPAN {
                    self.before = [rate(*counted, length), self.before[0]];
                    self.span = Some((now, 0));
                }
            }
        }
    }

    /// How long someone with `ahead` others before them waits at least if it goes on like that; nothing if that is not
    /// known.
    pub(super) fn wait(&self, now: Instant, ahead: usize) -> Duration {
        let this = self.span.map(|(since, calls)| (now.saturating_duration_since(since), calls));
        let this = this.filter(|(length, _)| *length >= PART).and_then(|(length, calls)| rate(calls, length));
        let before = self.before.into_iter().flatten().max_by(f64::total_cmp);
        let rate = before.map(|before| this.map_or(before, |this| this.max(before)));
        rate.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(ahead as f64 / rate))
    }
}

/// Calls a second at most where `calls` were counted; nothing where so few may be chance.
fn rate(calls: u32, length: Duration) -> Option<f64> {
    let calls = f64::from(calls);
    (calls >= FEW).then(|| (calls + 2.0 * calls.sqrt()) / length.as_secs_f64())
}

/// Held for a few assignments; nothing in between can panic, so poison is ignored.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls `(milliseconds, granted)` of one line, and what one with 100 others before them then waits, in seconds.
    fn wait(grants: &[(u64, u32)], at: u64) -> f64 {
        let start = Instant::now();
        let mut throughput = Throughput::default();
        for (ms, calls) in grants {
            throughput.note(start + Duration::from_millis(*ms), *calls);
        }
        throughput.wait(start + Duration::from_millis(at), 100).as_secs_f64()
    }

    fn steady(from: u64, to: u64, every: u64) -> Vec<(u64, u32)> {
        (from..=to).step_by(every as usize).map(|ms| (ms, 1)).collect()
    }

    #[test]
    fn a_line_that_has_not_moved_for_a_whole_span_tells_nothing() {
        assert_eq!(wait(&[], 60_000), 0.0);
        assert_eq!(wait(&steady(0, 3_900, 100), 3_900), 0.0);
        // However long the first call, or one of a few, had to be waited for.
        assert_eq!(wait(&[(30_000, 1)], 60_000), 0.0);
        assert_eq!(wait(&[(0, 1), (3_000, 1), (9_000, 1), (20_000, 1)], 20_000), 0.0);
    }

    #[test]
    fn a_line_that_moves_tells_what_is_waited_at_least() {
        // Ten a second: 100 others take ten seconds, and chance may have made it slower than it is.
        let told = wait(&steady(0, 20_000, 100), 20_000);
        assert!((7.0..=10.0).contains(&told), "{told} s");
    }

    #[test]
    fn a_stall_does_not_make_a_line_slow_that_was_quick_just_before() {
        let quick = steady(0, 8_000, 50);
        let told = wait(&quick, 8_000);
        let stalled = [quick.clone(), vec![(12_000, 0)]].concat();
        assert_eq!(wait(&stalled, 12_000), told);
        // Two spans later it is believed.
        let slow = [quick, steady(12_000, 40_000, 500)].concat();
        assert!(wait(&slow, 40_000) > 2.0 * told);
    }

    #[test]
    fn a_line_that_becomes_quick_tells_so_within_a_second() {
        let told = wait(&[steady(0, 8_000, 500), steady(8_050, 9_500, 50)].concat(), 9_500);
        assert!(told <= 5.0, "{told} s");
    }
}
