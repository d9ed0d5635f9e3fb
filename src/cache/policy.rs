//! How long an answer is good for. It owns the one function that decides what an age means; it must
//! not know where answers are kept or how they are renewed.

use std::time::Duration;

/// Settings `cache.*` that say how long: for one kind of record.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Policy {
    /// `cache.fresh`: served as it is.
    pub fresh: Duration,
    /// `cache.stale_while_revalidate`: after that, served at once while it is renewed.
    pub stale_while_revalidate: Duration,
    /// `cache.stale_if_error`: after being fresh, served if CyberScan cannot be asked.
    pub stale_if_error: Duration,
    /// `cache.negative`: "not known to CyberScan" is served so long, and never past it.
    pub negative: Duration,
    /// `cache.refresh_ahead`: in this last share of its freshness a read renews an answer.
    pub refresh_ahead: f64,
}

/// What may be done with an answer of a certain age.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Serve it.
    Fresh,
    /// Serve it, and renew it in the background.
    Due,
    /// Serve it although it is past its freshness, and renew it in the background.
    Revalidate,
    /// Renew it; serve it only if that fails or takes too long.
    IfError,
    /// It is as good as absent.
    Dead,
}

/// How long one particular answer stays fresh: its share of the policy's time, fixed when it was
/// fetched, so that every replica sees it go stale in the same moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifetime {
    /// The answer is "not known to CyberScan".
    pub negative: bool,
    /// How long it is fresh.
    pub fresh: Duration,
}

impl Policy {
    /// The lifetime of an answer fetched now. `chance`, 0 to 1, spreads those fetched together over the last
    /// tenth of their time, so that they do not all go stale together; none is fresh for longer than was set.
    #[must_use]
    pub fn lifetime(&self, negative: bool, chance: f64) -> Lifetime {
        let whole = if negative { self.negative } else { self.fresh };
        Lifetime { negative, fresh: whole.mul_f64(0.9 + 0.1 * chance.clamp(0.0, 1.0)) }
    }

    /// After how long nothing of any answer is of use any more.
    #[must_use]
    pub fn longest(&self) -> Duration {
        [false, true]
            .map(|negative| self.life(self.lifetime(negative, 1.0)))
            .into_iter()
            .max()
            .unwrap_or_default()
    }

    /// What may be done with an answer of that age.
    #[must_use]
    pub fn freshness(&self, lifetime: Lifetime, age: Duration) -> Freshness {
        let lifetime = self.cap(lifetime);
        match age.checked_sub(lifetime.fresh) {
            None if lifetime.negative => Freshness::Fresh,
            None if age.as_secs_f64() >= lifetime.fresh.as_secs_f64() * (1.0 - self.refresh_ahead) => {
                Freshness::Due
            }
            None => Freshness::Fresh,
            // An old "unknown" is no better than none: it would pass for "nothing found".
            Some(_) if lifetime.negative => Freshness::Dead,
            Some(past) if past < self.stale_while_revalidate => Freshness::Revalidate,
            Some(past) if past < self.stale_if_error => Freshness::IfError,
            Some(_) => Freshness::Dead,
        }
    }

    /// What a lifetime comes to by this policy: it may have been fixed by one that was more generous.
    fn cap(&self, lifetime: Lifetime) -> Lifetime {
        let whole = if lifetime.negative { self.negative } else { self.fresh };
        Lifetime { fresh: lifetime.fresh.min(whole), ..lifetime }
    }

    /// After how long nothing of such an answer is of use any more.
    #[must_use]
    pub fn life(&self, lifetime: Lifetime) -> Duration {
        let lifetime = self.cap(lifetime);
        if lifetime.negative {
            lifetime.fresh
        } else {
            lifetime.fresh + self.stale_while_revalidate.max(self.stale_if_error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn policy() -> Policy {
        Policy {
            fresh: HOUR,
            stale_while_revalidate: HOUR,
            stale_if_error: 24 * HOUR,
            negative: HOUR / 12,
            refresh_ahead: 0.2,
        }
    }

    #[test]
    fn an_answer_goes_from_fresh_to_dead_through_every_state() {
        let (policy, lifetime) = (policy(), Lifetime { negative: false, fresh: HOUR });
        let at = |minutes: u32| policy.freshness(lifetime, minutes * HOUR / 60);
        assert_eq!(at(0), Freshness::Fresh);
        assert_eq!(at(47), Freshness::Fresh);
        assert_eq!(at(48), Freshness::Due);
        assert_eq!(at(59), Freshness::Due);
        assert_eq!(at(60), Freshness::Revalidate);
        assert_eq!(at(119), Freshness::Revalidate);
        assert_eq!(at(120), Freshness::IfError);
        assert_eq!(at(25 * 60 - 1), Freshness::IfError);
        assert_eq!(at(25 * 60), Freshness::Dead);
    }

    #[test]
    fn answers_fetched_together_end_one_after_the_other_in_the_last_tenth_of_their_time() {
        let fresh = |negative, chance| policy().lifetime(negative, chance).fresh.as_secs();
        assert_eq!([fresh(false, 0.0), fresh(false, 0.5), fresh(false, 1.0)], [54 * 60, 57 * 60, 60 * 60]);
        assert_eq!([fresh(true, 0.0), fresh(true, 1.0)], [270, 300]);
    }

    #[test]
    fn not_known_is_never_served_past_its_time() {
        let (policy, lifetime) = (policy(), Lifetime { negative: true, fresh: HOUR / 12 });
        assert_eq!(policy.freshness(lifetime, HOUR / 13), Freshness::Fresh);
        assert_eq!(policy.freshness(lifetime, HOUR / 12), Freshness::Dead);
    }

    #[test]
    fn zero_switches_a_state_off() {
        let off = Policy {
            stale_while_revalidate: Duration::ZERO,
            stale_if_error: Duration::ZERO,
            refresh_ahead: 0.0,
            ..policy()
        };
        let lifetime = Lifetime { negative: false, fresh: HOUR };
        assert_eq!(off.freshness(lifetime, HOUR - Duration::from_secs(1)), Freshness::Fresh);
        assert_eq!(off.freshness(lifetime, HOUR), Freshness::Dead);
        let nothing = Policy { fresh: Duration::ZERO, ..off };
        assert_eq!(nothing.freshness(nothing.lifetime(false, 0.5), Duration::ZERO), Freshness::Dead);
    }

    proptest! {
        #[test]
        fn nothing_gets_fresher_with_age(
            fresh in 0..5000u64, swr in 0..5000u64, sie in 0..9000u64, ahead in 0.0..1.0f64, negative: bool,
            chance in 0.0..1.0f64, early in 0..20_000u64, later in 0..20_000u64,
        ) {
            let policy = Policy {
                fresh: Duration::from_secs(fresh),
                stale_while_revalidate: Duration::from_secs(swr),
                stale_if_error: Duration::from_secs(sie),
                negative: Duration::from_secs(fresh / 2),
                refresh_ahead: ahead,
            };
            let lifetime = policy.lifetime(negative, chance);
            let rank = |age| match policy.freshness(lifetime, Duration::from_secs(age)) {
                Freshness::Fresh => 0,
                Freshness::Due => 1,
                Freshness::Revalidate => 2,
                Freshness::IfError => 3,
                Freshness::Dead => 4,
            };
            prop_assert!(rank(early) <= rank(early + later));
            let life = policy.life(lifetime);
            prop_assert_eq!(policy.freshness(lifetime, life), Freshness::Dead);
        }
    }
}
