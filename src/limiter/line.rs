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

/// How long a queue must have moved before its pace tells how long others will wait.
const PACE: Duration = Duration::from_secs(1);
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
    /// When calls were first granted to who waits now, and how many have been since. Where the first one has to
    /// wait, for a Redis that came back or for rest, that says nothing about the next.
    pub(super) pace: Option<(Instant, u32)>,
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
    pub(super) fn note_pace(&mut self, now: Instant, grant: &Grant) {
        // A pause says nothing about it, nor does the moment in which Redis, or its memory, is lost or found.
        if grant.paused || self.epoch != grant.epoch {
            self.epoch = grant.epoch;
            self.pace = None;
        }
        match &mut self.pace {
            None if grant.calls > 0 => self.pace = Some((now, 0)),
            None => {}
            Some((since, calls)) => {
                *calls = calls.saturating_add(grant.calls);
                // What is long ago counts less and less.
                if now > *since + 10 * PACE {
                    (*since, *calls) = (now - (now - *since) / 2, *calls / 2);
                }
            }
        }
    }

    /// How long someone with `ahead` others before them waits at least if it moves on as fast as it has. Few calls say
    /// little: it may have been by chance that they were so few, and who is refused does not come back.
    pub(super) fn at_its_pace(&self, now: Instant, ahead: usize) -> Duration {
        match self.pace {
            Some((since, calls)) if calls > 0 && now > since + PACE => {
                let calls = f64::from(calls);
                (now - since).mul_f64(ahead as f64 / (calls + 2.0 * calls.sqrt()))
            }
            _ => Duration::ZERO,
        }
    }
}

/// Held for a few assignments; nothing in between can panic, so poison is ignored.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
