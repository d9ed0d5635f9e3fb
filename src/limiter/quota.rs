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

/// The longest window.
const LONGEST: Duration = Duration::from_secs(366 * 86_400);
/// The most calls of a window; beyond them nothing is limited.
const MOST: u32 = 1_000_000_000;

/// The text is no quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAQuota {
    /// It has no such form.
    #[error("calls, a slash, and in how long: s, m, h, d, w, or a duration such as 90s, 15m or 30d")]
    Form,
    /// No calls, or more than anybody sells.
    #[error("calls are a number from 1 to {MOST}")]
    Calls,
    /// A part of a second, or more than a year.
    #[error("the time is a whole number of seconds, from 1s to 366d")]
    Length,
}

impl FromStr for Window {
    type Err = NotAQuota;

    /// `10/s`, `600/m`, `1000/h`, `5000/d`, `20000/w`, `100000/30d`.
    fn from_str(text: &str) -> Result<Self, NotAQuota> {
        let (limit, per) = text.split_once('/').ok_or(NotAQuota::Form)?;
        let per = length(per.trim()).ok_or(NotAQuota::Form)?;
        if per.subsec_nanos() != 0 || per.is_zero() || per > LONGEST {
            return Err(NotAQuota::Length);
        }
        let limit = limit.trim();
        if limit.is_empty() || !limit.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(if limit.starts_with('-') { NotAQuota::Calls } else { NotAQuota::Form });
        }
        let limit = limit.parse().ok().filter(|limit: &NonZeroU32| limit.get() <= MOST);
        Ok(Self { limit: limit.ok_or(NotAQuota::Calls)?, per })
    }
}

/// `d`, `30d`: a unit, or a duration, of which a day has 24 hours.
fn length(text: &str) -> Option<Duration> {
    let one;
    let text = if text.starts_with(|c: char| c.is_ascii_alphabetic()) {
        one = format!("1{text}");
        &one
    } else {
        text
    };
    let span: jiff::Span = text.parse().ok()?;
    span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).ok()?.try_into().ok()
}

impl Window {
    /// The name of its length.
    #[must_use]
    pub fn name(&self) -> QuotaWindow {
        match self.per.as_secs() {
            ..=1 => QuotaWindow::Second,
            2..=60 => QuotaWindow::Minute,
            61..=3_600 => QuotaWindow::Hour,
            3_601..=86_400 => QuotaWindow::Day,
            86_401..=604_800 => QuotaWindow::Week,
            _ => QuotaWindow::Month,
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

    /// The same calls, with another limit.
    pub(super) fn with_limit(&self, window: Window) -> Self {
        Self { window, ..self.clone() }
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
        // A billion calls in thirty days: more than 64 bits.
        let grown =
            u128::from(limit) * u128::from(age) / u128::from(per) + u128::from((limit / PARTS).max(1));
        u32::try_from(grown.min(limit.into())).unwrap_or(u32::MAX)
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
            ("7/w", 604_800, QuotaWindow::Week),
            ("100000/30d", 2_592_000, QuotaWindow::Month),
            ("7/15m", 900, QuotaWindow::Hour),
            ("7 / 1 week", 604_800, QuotaWindow::Week),
        ] {
            let window = window(text);
            assert!(window.per == Duration::from_secs(seconds) && window.name() == name, "{text}");
        }
        for (text, why) in [
            ("", NotAQuota::Form),
            ("10", NotAQuota::Form),
            ("10/", NotAQuota::Form),
            ("/s", NotAQuota::Form),
            ("ten/s", NotAQuota::Form),
            ("+10/s", NotAQuota::Form),
            ("10/5", NotAQuota::Form),
            ("10/mo", NotAQuota::Form),
            ("10/fortnight", NotAQuota::Form),
            ("0/s", NotAQuota::Calls),
            ("-1/s", NotAQuota::Calls),
            ("4294967296/s", NotAQuota::Calls),
            ("10/0s", NotAQuota::Length),
            ("10/-1s", NotAQuota::Form),
            ("10/1500ms", NotAQuota::Length),
            ("10/400d", NotAQuota::Length),
        ] {
            assert_eq!(text.parse::<Window>(), Err(why), "{text}");
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
    fn a_window_of_a_month_is_had_whole_however_many_calls_it_has() {
        for limit in ["1/30d", "1000/30d", "1000000000/30d", "1000000000/366d"] {
            let quota = window(limit);
            let mut month = SlidingWindow::new(quota, 0);
            let (all, per) = (quota.limit.get(), micros(quota.per));
            let half = month.available(per / 2);
            assert!(
                half >= all / 2 && u64::from(half) <= u64::from(all) / 2 + u64::from(all) / 100 + 1,
                "{half} of {limit}"
            );
            assert_eq!(month.available(per), all, "{limit}");
            month.take(per, all);
            assert_eq!(month.available(2 * per - 1), 0, "{limit}");
            assert_eq!(month.available(2 * per + per / 100), all, "{limit}");
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
            seconds in proptest::sample::select(vec![1_u64, 86_400, 604_800, 2_592_000, 366 * 86_400]),
        ) {
            let quota = Window { limit: NonZeroU32::new(limit).unwrap(), per: Duration::from_secs(seconds) };
            let mut window = SlidingWindow::new(quota, 0);
            let (mut now, mut made) = (0, Vec::new());
            for (gap, wanted) in gaps {
                now += gap * seconds;
                let granted = window.available(now).min(wanted);
                if granted > 0 {
                    window.take(now, granted);
                    made.extend(std::iter::repeat_n(now, granted as usize));
                }
            }
            for (first, start) in made.iter().enumerate() {
                let within = made.iter().skip(first).take_while(|at| **at < start + seconds * SECOND).count();
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
