//! This replica's token buckets: the first gate of every call, with Redis, without it and while it is away. It owns
//! that a call is taken from all of them or from none; it must not know Redis, nor who waits.

use std::time::Duration;

use super::{
    bucket::{Bucket, Level, Pace},
    window::Window,
};

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
                bucket.go_on(old);
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
            let intervals = self.0.iter().map(|(_, bucket)| bucket.interval());
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
        let wait = self.0.iter().map(|(_, bucket)| bucket.at_best(now, calls)).max();
        Duration::from_nanos(wait.unwrap_or_default())
    }

    /// How far the bucket of the window of length `per` is ahead of now: in how long the next call is due.
    pub(super) fn ahead(&self, now: u64, per: Duration) -> Duration {
        Duration::from_nanos(self.of(per).map(|bucket| bucket.ahead(now)).unwrap_or_default())
    }

    /// Another gate is so far ahead in the window of length `per`: here the next call is due no earlier.
    pub(super) fn keep_up(&self, now: u64, per: Duration, ahead: Duration) {
        if let Some(bucket) = self.of(per) {
            bucket.keep_up(now, ahead);
        }
    }

    fn of(&self, per: Duration) -> Option<&Bucket> {
        self.0.iter().find(|(of, _)| *of == per).map(|(_, bucket)| bucket)
    }

    fn levels(&self) -> Vec<Level> {
        self.0.iter().map(|(_, bucket)| bucket.level()).collect()
    }

    fn set(&self, levels: &[Level]) {
        for ((_, bucket), level) in self.0.iter().zip(levels) {
            bucket.set(*level);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::bucket::nanos, *};
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
