//! Calls that this replica's gates have let through and the next one has not decided about yet. It owns that each of
//! them is made or given back, also where whoever wanted it goes away in between.

use std::time::Duration;

use super::{account::Account, local::Taken, quota::Grant};
use crate::{cyberscan::Priority, redis_pool::Unavailable};

/// Calls of which this replica's gates have nothing against; given back when dropped.
pub(super) struct Reservation<'a> {
    pub(super) account: &'a Account,
    pub(super) taken: Taken,
    /// Those of them that the ledger counts.
    pub(super) begun: u32,
    pub(super) wait: Duration,
    pub(super) priority: Priority,
}

impl Reservation<'_> {
    /// How many they are.
    pub(super) fn calls(&self) -> u32 {
        self.taken.calls
    }

    /// In how long there is one, where there are fewer than were wanted.
    pub(super) fn wait(&self) -> Duration {
        self.wait
    }

    /// Gives all but `calls` back.
    pub(super) fn keep(&mut self, calls: u32) {
        let mut state = self.account.state();
        state.local.give_back(&mut self.taken, calls);
        let keep = self.begun.min(calls);
        state.ledger.give_back(self.begun - keep);
        self.begun = keep;
    }

    /// Has the next gate decide: those that may be made.
    pub(super) async fn settle(self) -> Grant {
        self.settle_with_pause().await.0
    }

    /// As [`Reservation::settle`], with the pause Redis knows of.
    pub(super) async fn settle_with_pause(mut self) -> (Grant, Option<Duration>) {
        let account = self.account;
        let wanted = self.taken.calls;
        if wanted == 0 {
            return (self.made(0, self.wait), None);
        }
        if account.shared.is_none() || !account.counts() {
            return (self.made(wanted, self.wait), None);
        }
        match account.ask(wanted, self.priority).await {
            Ok(reply) => {
                let calls = reply.calls.min(wanted);
                // Who was given all that the gates here had waits for these.
                let wait = if calls == wanted { reply.wait.max(self.wait) } else { reply.wait };
                let grant = self.made(calls, wait);
                let (now, state) = (account.now(), account.state());
                reply.windows.iter().for_each(|window| state.local.keep_up(now, window.per, window.due));
                (grant, (!reply.pause.is_zero()).then_some(reply.pause))
            }
            Err(Unavailable) => {
                let (calls, wait) = self.alone(wanted);
                (self.made(calls, wait), None)
            }
        }
    }

    /// Redis is away: of `wanted` those that this replica's share has. Prefetching can wait until the fleet counts
    /// together again.
    fn alone(&self, wanted: u32) -> (u32, Duration) {
        self.account.lose_redis();
        let now = self.account.now();
        let mut state = self.account.state();
        let share = state.terms.fallback_share;
        let (free, wait) = state.ledger.free_alone(now, share);
        if self.priority == Priority::Prefetch {
            return (0, wait);
        }
        let taken = state.share.take(now, wanted.min(free), None);
        state.ledger.made_alone(now, taken.calls);
        let wait = if taken.calls == wanted { self.wait } else { wait.max(taken.wait) };
        (taken.calls, wait)
    }

    /// Of the calls begun so many are made.
    fn made(&mut self, calls: u32, wait: Duration) -> Grant {
        let mut state = self.account.state();
        state.local.give_back(&mut self.taken, calls);
        state.ledger.end(self.begun, calls);
        if calls > 0 {
            state.last = Some(self.account.now());
        }
        (self.begun, self.taken.calls) = (0, 0);
        Grant { wait, ..Grant::whole(calls) }
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if self.begun > 0 {
            self.made(0, Duration::ZERO);
        }
    }
}
