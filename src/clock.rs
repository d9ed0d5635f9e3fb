//! The wall clock, as an argument. It owns the only reading of the machine's time of day; it must
//! not know what the time is used for.
//!
//! Lifetimes inside the process are measured with [`tokio::time::Instant`], which a jump of the
//! wall clock leaves alone. The wall clock judges what others wrote: `exp` of a token, `expires` of
//! an access token, the time at which CyberScan was asked.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

/// Tells the time of day. A cheap copy.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    source: Source,
}

#[derive(Clone, Copy, Debug)]
enum Source {
    Machine,
    Anchored { wall: Timestamp, at: Instant },
}

impl Clock {
    /// The machine's own clock.
    #[must_use]
    pub fn system() -> Self {
        Self { source: Source::Machine }
    }

    /// A clock that shows `wall` now and runs with tokio's clock, so that a test which pauses and
    /// advances the latter moves the former too.
    #[must_use]
    pub fn starting_at(wall: Timestamp) -> Self {
        Self { source: Source::Anchored { wall, at: Instant::now() } }
    }

    /// The present moment.
    #[must_use]
    #[expect(clippy::disallowed_methods, reason = "the one place where wall time is read")]
    pub fn now(&self) -> Timestamp {
        match self.source {
            Source::Machine => Timestamp::now(),
            Source::Anchored { wall, at } => wall.checked_add(at.elapsed()).unwrap_or(Timestamp::MAX),
        }
    }

    /// Seconds since the Unix epoch, with their fraction.
    #[must_use]
    pub fn unix(&self) -> f64 {
        self.now().as_duration().as_secs_f64()
    }

    /// How long from now until `unix` seconds; zero for the past, at most `longest`.
    #[must_use]
    pub fn until(&self, unix: f64, longest: Duration) -> Duration {
        Duration::try_from_secs_f64(unix - self.unix())
            .unwrap_or(if unix > self.unix() { longest } else { Duration::ZERO })
            .min(longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_anchored_clock_runs_with_tokios_clock() {
        let clock = Clock::starting_at(Timestamp::UNIX_EPOCH);
        tokio::time::advance(Duration::from_secs(90)).await;
        assert_eq!(clock.unix(), 90.0);
    }

    #[tokio::test(start_paused = true)]
    async fn the_time_until_a_moment_is_never_negative_and_never_beyond_the_longest() {
        let clock = Clock::starting_at(Timestamp::from_second(1_000).unwrap());
        let hour = Duration::from_secs(3600);
        assert_eq!(clock.until(1_060.0, hour), Duration::from_secs(60));
        assert_eq!(clock.until(5.0, hour), Duration::ZERO);
        assert_eq!(clock.until(1e300, hour), hour);
        assert_eq!(clock.until(f64::NAN, hour), Duration::ZERO);
    }
}
