//! Quotas: how many calls in how long. It owns their notation and the arithmetic of a window; it must
//! not know whose calls they are.

use std::{num::NonZeroU32, str::FromStr, time::Duration};

use crate::metrics::QuotaWindow;

/// At most `limit` calls in any span of `per`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Window {
    /// How many calls.
    pub limit: NonZeroU32,
    /// In how long.
    pub per: Duration,
}

impl FromStr for Window {
    type Err = ();

    /// `10/s`, `600/m`, `1000/h`, `5000/d`.
    fn from_str(text: &str) -> Result<Self, ()> {
        let (limit, unit) = text.split_once('/').ok_or(())?;
        let seconds = match unit.trim() {
            "s" => 1,
            "m" => 60,
            "h" => 3_600,
            "d" => 86_400,
            _ => return Err(()),
        };
        Ok(Self { limit: limit.trim().parse().map_err(|_| ())?, per: Duration::from_secs(seconds) })
    }
}

impl Window {
    /// The name of its length.
    #[must_use]
    pub fn name(&self) -> QuotaWindow {
        match self.per.as_secs() {
            ..=1 => QuotaWindow::Second,
            2..=60 => QuotaWindow::Minute,
            61..=3_600 => QuotaWindow::Hour,
            _ => QuotaWindow::Day,
        }
    }
}

/// Parts a window is divided into. The part that is just leaving counts in full, so a window is up to
/// one part longer than it says: never a call too many, at most one in a hundred too few.
const PARTS: u64 = 100;

/// How many leaving parts of a window count in full. A call arrives some milliseconds after it was granted,
/// and not each as many: a second, whose parts are ten milliseconds, needs two parts more for that.
const fn leaving(per: Duration) -> u64 {
    if per.as_secs() > 1 { 1 } else { 3 }
}

/// The calls of the last [`Window::per`], by part: the same arithmetic as the script in Redis, whose
/// model it is. Times are microseconds on any clock.
///
/// A window that has just come into being does not know what was called before, and takes it for full:
/// its limit grows from a hundredth (at least one call) to the whole within the time of one window.
#[derive(Clone, Debug)]
pub(super) struct SlidingWindow {
    window: Window,
    born: u64,
    /// Number of the part and calls in it, oldest first.
    parts: Vec<(u64, u32)>,
}

impl SlidingWindow {
    pub(super) fn new(window: Window, now: u64) -> Self {
        Self { window, born: now, parts: Vec::new() }
    }

    pub(super) fn window(&self) -> Window {
        self.window
    }

    /// Microseconds of one part.
    fn part(&self) -> u64 {
        micros(self.window.per) / PARTS
    }

    fn forget(&mut self, now: u64) {
        let oldest = (now / self.part() + 1).saturating_sub(PARTS + leaving(self.window.per));
        self.parts.retain(|(number, _)| *number >= oldest);
    }

    /// How many calls may be made now.
    pub(super) fn available(&mut self, now: u64) -> u32 {
        self.forget(now);
        let used: u32 = self.parts.iter().map(|(_, calls)| calls).sum();
        self.ceiling(now).saturating_sub(used)
    }

    /// The limit, or what it has grown to in a young window.
    pub(super) fn ceiling(&self, now: u64) -> u32 {
        let (limit, per) = (u64::from(self.window.limit.get()), micros(self.window.per));
        let age = now.saturating_sub(self.born);
        let grown = (limit / PARTS).max(1) + limit.saturating_mul(age) / per;
        u32::try_from(grown.min(limit)).unwrap_or(u32::MAX)
    }

    /// Notes `calls` made now.
    pub(super) fn take(&mut self, now: u64, calls: u32) {
        let number = now / self.part();
        match self.parts.last_mut() {
            Some((last, noted)) if *last == number => *noted += calls,
            _ => self.parts.push((number, calls)),
        }
    }

    /// How long until a call may be made, if none may now.
    pub(super) fn wait(&mut self, now: u64) -> Duration {
        if self.available(now) > 0 {
            return Duration::ZERO;
        }
        let part = self.part();
        // The oldest part leaves, or a young window has grown by one call, whichever is sooner.
        let leaves = self
            .parts
            .first()
            .map_or(u64::MAX, |(number, _)| (number + PARTS + leaving(self.window.per)) * part);
        let grows = if self.ceiling(now) < self.window.limit.get() {
            now + micros(self.window.per) / u64::from(self.window.limit.get())
        } else {
            u64::MAX
        };
        Duration::from_micros(leaves.min(grows).saturating_sub(now).max(1))
    }

    /// Of the calls counted now all but the newest `less`, by part: how many parts ago, and how many.
    pub(super) fn history(&mut self, now: u64, mut less: u32) -> Vec<(u64, u32)> {
        self.forget(now);
        let number = now / self.part();
        let parts = self.parts.iter().rev().map(|(part, calls)| {
            let left = calls.saturating_sub(less);
            less = less.saturating_sub(*calls);
            (number.saturating_sub(*part), left)
        });
        parts.filter(|(_, calls)| *calls > 0).collect()
    }

    /// Calls counted now.
    pub(super) fn used(&mut self, now: u64) -> u32 {
        self.forget(now);
        self.parts.iter().map(|(_, calls)| calls).sum()
    }
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000;

    fn window(text: &str) -> Window {
        text.parse().unwrap()
    }

    #[test]
    fn windows_have_a_notation() {
        assert_eq!(
            window("10/s"),
            Window { limit: NonZeroU32::new(10).unwrap(), per: Duration::from_secs(1) }
        );
        assert_eq!(window(" 5000 / d ").per, Duration::from_secs(86_400));
        for (text, seconds, name) in [
            ("7/s", 1, QuotaWindow::Second),
            ("7/m", 60, QuotaWindow::Minute),
            ("7/h", 3_600, QuotaWindow::Hour),
            ("7/d", 86_400, QuotaWindow::Day),
        ] {
            let window = window(text);
            assert!(window.per == Duration::from_secs(seconds) && window.name() == name, "{text}");
        }
        for text in ["", "10", "0/s", "-1/s", "10/w", "10/", "/s", "ten/s"] {
            assert!(text.parse::<Window>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_new_window_grows_into_its_limit_and_an_old_one_has_it_whole() {
        let mut young = SlidingWindow::new(window("100/s"), 0);
        assert_eq!(young.available(0), 1);
        assert_eq!(young.available(SECOND / 2), 51);
        assert_eq!(young.available(SECOND), 100);
        young.take(SECOND, 100);
        assert_eq!(young.available(SECOND + SECOND / 2), 0);
        assert_eq!(young.available(2 * SECOND + SECOND / 25), 100);
    }

    #[test]
    fn the_wait_ends_when_a_young_window_has_grown_or_the_oldest_calls_have_left() {
        let mut young = SlidingWindow::new(window("10/s"), 0);
        assert_eq!(young.wait(0), Duration::ZERO);
        young.take(0, 1);
        assert_eq!(young.wait(0), Duration::from_millis(100), "it grows by a call in 100 ms");

        for (text, seconds, part) in [("10/s", 1, 10), ("10/m", 60, 600)] {
            let mut old = SlidingWindow::new(window(text), 0);
            let now = 2 * seconds * SECOND;
            old.take(now, 4);
            old.take(now + seconds * SECOND / 2, 6);
            let leaving = if seconds == 1 { 3 } else { 1 };
            let left = Duration::from_millis(seconds * 500 + leaving * part);
            assert_eq!(old.wait(now + seconds * SECOND / 2), left, "the oldest calls of {text} leave");
            assert_eq!(old.used(now + seconds * SECOND / 2), 10);
            assert_eq!(old.available(now + micros(left) + seconds * SECOND / 2 - 1), 0);
            assert_eq!(old.available(now + micros(left) + seconds * SECOND / 2), 4);
        }
    }

    #[test]
    fn under_constant_demand_almost_the_whole_quota_is_used() {
        let mut window = SlidingWindow::new(window("10/s"), 0);
        let mut calls = 0;
        for step in 0..60_000_u64 {
            let now = 10 * SECOND + step * 1_000;
            if window.available(now) > 0 {
                window.take(now, 1);
                calls += 1;
            }
        }
        assert!(calls >= 582, "{calls} of 600");
    }

    proptest! {
        #[test]
        fn no_span_holds_more_calls_than_the_limit(
            limit in 1..40_u32, gaps in proptest::collection::vec((0..200_000_u64, 1..10_u32), 1..300),
        ) {
            let quota = Window { limit: NonZeroU32::new(limit).unwrap(), per: Duration::from_secs(1) };
            let mut window = SlidingWindow::new(quota, 0);
            let (mut now, mut made) = (0, Vec::new());
            for (gap, wanted) in gaps {
                now += gap;
                let granted = window.available(now).min(wanted);
                if granted > 0 {
                    window.take(now, granted);
                    made.extend(std::iter::repeat_n(now, granted as usize));
                }
            }
            for (first, start) in made.iter().enumerate() {
                let within = made.iter().skip(first).take_while(|at| **at < start + SECOND).count();
                prop_assert!(within <= limit as usize);
            }
        }

        #[test]
        fn after_the_wait_a_call_may_be_made(limit in 1..40_u32, age in 0..3_000_000_u64, used in 0..50_u32) {
            let quota = Window { limit: NonZeroU32::new(limit).unwrap(), per: Duration::from_secs(1) };
            let mut window = SlidingWindow::new(quota, 0);
            let granted = window.available(age).min(used);
            if granted > 0 {
                window.take(age, granted);
            }
            let wait = micros(window.wait(age));
            prop_assert!(wait <= 1_030_000);
            prop_assert!(window.available(age + wait) > 0);
        }
    }
}
