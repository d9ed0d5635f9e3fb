//! The calls of one window, by part. It owns the arithmetic of sliding windows.

use std::{collections::VecDeque, time::Duration};

use super::bucket::nanos;

/// Parts a window is divided into. The part that is just leaving counts in full, so a window is up to one part
/// longer than it says: never a call too many, at most one in a hundred too few.
pub(super) const PARTS: u64 = 100;
/// The calls of the last [`per`](super::window::Window::per), by part. Times are nanoseconds on any clock that does not step back.
#[derive(Clone, Debug)]
pub(super) struct Calls {
    pub(super) part: u64,
    /// Number of the part and calls in it, oldest first.
    parts: VecDeque<(u64, u32)>,
    sum: u32,
}

/// How many parts ago, and how many calls; newest first.
pub(super) type ByPart = Vec<(u64, u32)>;

impl Calls {
    pub(super) fn new(per: Duration) -> Self {
        Self { part: (nanos(per) / PARTS).max(1), parts: VecDeque::new(), sum: 0 }
    }

    fn forget(&mut self, now: u64) {
        let oldest = (now / self.part).saturating_sub(PARTS);
        while let Some((number, calls)) = self.parts.front().copied()
            && number < oldest
        {
            self.parts.pop_front();
            self.sum -= calls;
        }
    }

    /// Calls made in the window that ends now.
    pub(super) fn made(&mut self, now: u64) -> u32 {
        self.forget(now);
        self.sum
    }

    pub(super) fn add(&mut self, now: u64, calls: u32) {
        if calls == 0 {
            return;
        }
        let number = now / self.part;
        match self.parts.back_mut() {
            Some((last, noted)) if *last >= number => *noted += calls,
            _ => self.parts.push_back((number, calls)),
        }
        self.sum += calls;
    }

    /// Takes the newest `calls` out again: they were not made.
    pub(super) fn take_back(&mut self, mut calls: u32) {
        while calls > 0
            && let Some((_, noted)) = self.parts.back_mut()
        {
            let these = calls.min(*noted);
            *noted -= these;
            self.sum -= these;
            calls -= these;
            if *noted == 0 {
                self.parts.pop_back();
            }
        }
    }

    /// In how long the oldest of the calls leaves the window.
    pub(super) fn leaves(&self, now: u64) -> Duration {
        let leaves = self.parts.front().map_or(0, |(number, _)| (number + PARTS + 1) * self.part);
        Duration::from_nanos(leaves.saturating_sub(now))
    }

    /// The calls by part, newest first.
    pub(super) fn by_part(&mut self, now: u64) -> ByPart {
        self.forget(now);
        let number = now / self.part;
        let parts = self.parts.iter().rev();
        parts.map(|(part, calls)| (number.saturating_sub(*part), *calls)).collect()
    }
}
