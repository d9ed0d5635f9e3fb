//! What renewing ahead may cost. It owns the arithmetic of one tenant's budget: the calls that are made beyond
//! those that would be made anyway.
//!
//! An answer that is asked for `x` times in its life, at no particular times, is renewed by its readers
//! `without(x)` times in that span; by the worker once, a little early. The difference is what the worker
//! costs: nearly a call where it is asked for rarely, less than nothing where readers would renew it early.

/// The budget of one tenant: a bucket of calls.
#[derive(Clone, Debug)]
pub(super) struct Budget {
    share: f64,
    refresh_ahead: f64,
    level: f64,
}

/// The most calls that are saved up: what an hour's lull leaves is not to be spent in a minute.
const MOST: f64 = 100.0;
/// Where a budget begins.
const FIRST: f64 = 20.0;
/// The part of the share that is spent by expectation: expectations err on the high side.
const SPENT: f64 = 0.9;
/// Renewals of an answer per life by the worker; a little over one, because each is a little early.
const WITH: f64 = 1.01;
/// The fewest reads per life that are worth a renewal, when the bucket is full.
const LEAST: f64 = 1.2;
/// How much more is asked for as the bucket empties.
const DEARER: f64 = 4.0;

impl Budget {
    /// From now on readers renew in the last `share` of a life.
    pub(super) fn readers_renew_in(&mut self, share: f64) {
        self.refresh_ahead = share;
    }

    /// A budget of `share` of the calls made anyway, where readers renew in the last `refresh_ahead` of a life.
    pub(super) fn new(share: f64, refresh_ahead: f64) -> Self {
        Self { share: share * SPENT, refresh_ahead, level: FIRST }
    }

    /// A reader's call was made.
    pub(super) fn filled(&mut self) {
        self.add(self.share);
    }

    /// Whether an answer that is asked for `expected` times in its life may be renewed; if so it is paid for.
    pub(super) fn take(&mut self, expected: f64) -> bool {
        let without = without(expected, self.refresh_ahead);
        // The call that is made takes the place of `without`, which allow for their share of others. That it may
        // turn out to have been made for nobody is paid for when it does: expectations are too high more often
        // than too low among what is chosen for being expected.
        let cost = WITH - without * (1.0 + self.share) - (-expected).exp();
        let may = cost <= 0.0 || (expected >= self.threshold() && self.level >= cost.max(0.0));
        if may {
            self.add(-cost);
        }
        may
    }

    /// An answer was renewed for nobody.
    pub(super) fn wasted(&mut self) {
        self.level -= 1.0;
    }

    /// How often an answer has to be asked for in its life to be worth a call now.
    pub(super) fn threshold(&self) -> f64 {
        LEAST + DEARER * (1.0 - 2.0 * self.level / MOST).max(0.0)
    }

    fn add(&mut self, calls: f64) {
        self.level = (self.level + calls).min(MOST);
    }
}

/// How many calls readers cause per life of an answer that is asked for `reads` times in it, at times that
/// know nothing of each other: the first in the last `ahead` of its life renews it, else the first after.
pub(super) fn without(reads: f64, ahead: f64) -> f64 {
    if reads <= 0.0 {
        return 0.0;
    }
    let missed = (-reads * ahead).exp();
    let renewed = 1.0 - missed;
    // The mean time from the beginning of the last share to the first read in it, times how often there is one.
    let first = renewed / reads - ahead * missed;
    let cycle = renewed * (1.0 - ahead) + first + missed * (1.0 + 1.0 / reads);
    1.0 / cycle
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_cause_what_a_renewal_process_does() {
        // Without refreshing ahead: a life, then the wait for a reader.
        for reads in [0.1, 1.0, 3.0, 100.0] {
            assert!((without(reads, 0.0) - 1.0 / (1.0 + 1.0 / reads)).abs() < 1e-9);
        }
        // With it, what is asked for all the time is renewed at the beginning of the last share.
        assert!((without(1e6, 0.2) - 1.25).abs() < 1e-3);
        assert!(without(3.0, 0.2) > without(3.0, 0.0));
    }

    #[test]
    fn what_is_asked_for_often_costs_nothing_and_what_is_rare_soon_costs_too_much() {
        let mut budget = Budget::new(0.1, 0.2);
        assert!((0..10_000).all(|_| budget.take(50.0)), "the worker is cheaper than readers");
        let mut budget = Budget::new(0.1, 0.2);
        let granted = (0..1_000).filter(|_| budget.take(1.5)).count();
        assert!(granted < 100, "{granted}");
        assert!(budget.threshold() > LEAST);
    }

    #[test]
    fn no_more_is_spent_than_the_share_of_what_is_made_anyway() {
        for reads in [1.3, 2.0, 3.0, 5.0] {
            let mut budget = Budget::new(0.1, 0.0);
            let (mut extra, mut anyway, mut unread) = (0.0, 0.0, 0.0);
            for _ in 0..100_000 {
                if budget.take(reads) {
                    extra += WITH - without(reads, 0.0);
                    anyway += without(reads, 0.0);
                    unread += f64::exp(-reads);
                    if unread >= 1.0 {
                        unread -= 1.0;
                        budget.wasted();
                    }
                } else {
                    budget.filled();
                    anyway += 1.0;
                }
            }
            assert!(extra <= 0.1 * anyway + FIRST, "{reads}: {extra} beyond {anyway}");
        }
    }
}
