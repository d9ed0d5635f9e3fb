//! How long calls to a host have been taking. It owns the estimate; it must not know who waits for it.
//!
//! A call that cannot be answered before it is too late is paid for nothing, so who waits for a turn has to
//! know how long CyberScan takes: nearly all calls, not most. And a call that was given less than that and was
//! cut off says nothing about the host.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use moka::{policy::EvictionPolicy, sync::Cache};
use tokio::time::Instant;

use crate::egress::Host;

/// Calls that are looked back at, and for how long.
const CALLS: usize = 64;
const AGE: Duration = Duration::from_secs(60);
/// Fewer do not say what is usual; of those the longest of a longer time is believed.
const ENOUGH: usize = 8;
const LONG_AGO: Duration = Duration::from_secs(900);
/// What is left for a call where calls take no time, and the part of the whole time that may be left at most:
/// who comes has a right to try.
const FLOOR: Duration = Duration::from_millis(100);
const CAP: f64 = 0.9;
/// Hosts that are remembered.
const HOSTS: u64 = 1_000;

/// The latencies of hosts; a cheap clone.
#[derive(Clone)]
pub struct Latencies(Cache<Host, Arc<Latency>>);

impl Default for Latencies {
    fn default() -> Self {
        Self(Cache::builder().max_capacity(HOSTS).eviction_policy(EvictionPolicy::lru()).build())
    }
}

impl Latencies {
    /// That of `host`.
    #[must_use]
    pub fn of(&self, host: &Host) -> Arc<Latency> {
        self.0.get_with_by_ref(host, Arc::default)
    }
}

/// How long calls to one host have been taking.
#[derive(Debug, Default)]
pub struct Latency(Mutex<VecDeque<Sample>>);

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    took: Duration,
    answered: bool,
}

impl Latency {
    /// A call was answered after so long.
    pub fn answered(&self, took: Duration) {
        self.note(took, true);
    }

    /// A call had no answer after so long: one would have taken longer.
    pub fn unanswered(&self, after: Duration) {
        if self.quantile(|_| true).is_none_or(|usual| after > usual) {
            self.note(after, false);
        }
    }

    /// How long 95 of 100 answers have taken lately at most; none if there were too few.
    #[must_use]
    pub fn usual(&self) -> Option<Duration> {
        self.quantile(|sample| sample.answered)
    }

    /// How much time has to be left for a call, such that it will most likely be answered, of `patience` that
    /// there was when it was asked for.
    #[must_use]
    pub fn needed(&self, patience: Duration) -> Duration {
        match self.quantile(|_| true) {
            // A little more: five in a hundred took longer, and an answer has to be passed on.
            Some(usual) => (usual.mul_f64(1.25) + FLOOR / 2).max(FLOOR).min(patience.mul_f64(CAP)),
            None => {
                let cold = (patience / 10).min(Duration::from_secs(1));
                let seen = self.longest(|_| true).unwrap_or_default();
                cold.max(seen.mul_f64(1.25).min(patience.mul_f64(CAP)))
            }
        }
    }

    /// How long answers have taken at most, where there were too few of late to say what is usual.
    #[must_use]
    pub fn longest_answer(&self) -> Option<Duration> {
        self.longest(|sample| sample.answered)
    }

    fn longest(&self, of: impl Fn(&Sample) -> bool) -> Option<Duration> {
        let samples = self.samples();
        let recent = samples.iter().rev().filter(|sample| of(sample) && sample.at.elapsed() <= LONG_AGO);
        recent.take(ENOUGH).map(|sample| sample.took).max()
    }

    fn note(&self, took: Duration, answered: bool) {
        let mut samples = self.samples();
        if samples.len() == CALLS {
            samples.pop_front();
        }
        samples.push_back(Sample { at: Instant::now(), took, answered });
    }

    fn quantile(&self, of: impl Fn(&Sample) -> bool) -> Option<Duration> {
        let samples = self.samples();
        let recent = samples.iter().filter(|sample| of(sample) && sample.at.elapsed() <= AGE);
        let mut took: Vec<Duration> = recent.map(|sample| sample.took).collect();
        drop(samples);
        if took.len() < ENOUGH {
            return None;
        }
        let place = (took.len() * 95).div_ceil(100) - 1;
        Some(*took.select_nth_unstable(place).1)
    }

    /// Held for a few assignments; nothing in between can panic, so poison is ignored.
    fn samples(&self) -> MutexGuard<'_, VecDeque<Sample>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn what_nearly_all_answers_take_is_left_for_a_call_within_bounds() {
        let latency = Latency::default();
        assert_eq!(latency.needed(20 * SECOND), SECOND, "nothing is known");
        assert_eq!(latency.needed(3 * SECOND), 3 * SECOND / 10);
        for number in 0..60 {
            latency.answered(if number % 30 == 0 { 10 * SECOND } else { 3 * SECOND });
        }
        assert_eq!(latency.usual(), Some(3 * SECOND));
        assert_eq!(latency.needed(20 * SECOND), 3800 * SECOND / 1000);
        assert_eq!(latency.needed(2 * SECOND), 1800 * SECOND / 1000, "who comes may try");
        advance(AGE + SECOND).await;
        assert_eq!(latency.usual(), None, "that was long ago");
        for _ in 0..ENOUGH {
            latency.answered(Duration::from_millis(1));
        }
        assert_eq!(latency.needed(20 * SECOND), FLOOR);
    }

    /// A small quota makes few calls: those there were say what the next one takes.
    #[tokio::test(start_paused = true)]
    async fn few_calls_say_how_long_one_may_take() {
        let latency = Latency::default();
        latency.answered(3 * SECOND);
        assert_eq!((latency.usual(), latency.longest_answer()), (None, Some(3 * SECOND)));
        assert_eq!(latency.needed(15 * SECOND), 3750 * SECOND / 1000);
        advance(AGE + SECOND).await;
        latency.answered(SECOND / 10);
        assert_eq!(latency.needed(15 * SECOND), 3750 * SECOND / 1000);
        advance(LONG_AGO).await;
        latency.answered(SECOND / 10);
        assert_eq!(latency.needed(15 * SECOND), SECOND, "nothing is known any more");
    }

    #[tokio::test(start_paused = true)]
    async fn calls_that_were_cut_off_show_that_it_takes_longer_but_not_how_long_is_usual() {
        let latency = Latency::default();
        for _ in 0..60 {
            latency.answered(SECOND / 10);
        }
        latency.unanswered(SECOND / 20);
        for _ in 0..20 {
            latency.unanswered(2 * SECOND);
        }
        assert_eq!(latency.usual(), Some(SECOND / 10));
        assert_eq!(latency.needed(20 * SECOND), 2550 * SECOND / 1000);
    }
}
