//! One host's circuit: whether it may be called, by what came of the last calls. It must not know what
//! is asked or what an error is, nor wait.
//!
//! Closed, calls go through and are counted. Ten failures in a row, or fifteen among the last twenty,
//! open it: calls fail at once. After a pause one call is let through as a probe; if it succeeds the
//! circuit closes, if not the pause doubles, up to a minute. Both rules leave a host alone that is down,
//! but hardly ever one that fails three calls in ten, whose other seven answers are worth having.

use std::{sync::PoisonError, time::Duration};

use tokio::time::Instant;
use tracing::{info, warn};

use crate::{
    chance::chance,
    metrics::BreakerState,
    sync::{Mutex, MutexGuard},
};

/// Failures in a row that open the circuit.
const IN_A_ROW: u32 = 10;
/// Calls that are looked back at, and the failures among them that open the circuit.
const WINDOW: u32 = 20;
const IN_WINDOW: u32 = 15;
/// The first pause; doubled with each probe that fails.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Closed at first.
#[derive(Debug, Default)]
pub(super) struct Circuit(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    in_a_row: u32,
    /// The last calls, the newest in the lowest bit; a failure is a one.
    window: u32,
    /// Set while open: when the next probe may go.
    open_until: Option<Instant>,
    pause: Duration,
    probing: bool,
}

/// A call under way; one that is dropped says nothing about the host, and if it was the probe there may be another.
pub(super) struct Attempt<'a> {
    circuit: &'a Circuit,
    probe: bool,
}

impl Circuit {
    /// Begins a call. `Err` says how long the host is to be left alone.
    pub(super) fn begin(&self) -> Result<Attempt<'_>, Duration> {
        let mut state = self.lock();
        let Some(until) = state.open_until else {
            return Ok(Attempt { circuit: self, probe: false });
        };
        let wait = until.saturating_duration_since(Instant::now());
        if !wait.is_zero() || state.probing {
            return Err(wait);
        }
        state.probing = true;
        Ok(Attempt { circuit: self, probe: true })
    }

    pub(super) fn state(&self) -> BreakerState {
        let state = self.lock();
        match state.open_until {
            None => BreakerState::Closed,
            Some(until) if state.probing || Instant::now() >= until => BreakerState::HalfOpen,
            Some(_) => BreakerState::Open,
        }
    }

    /// Held for a few assignments; nothing in between can panic, so poison is ignored.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Attempt<'_> {
    /// Ends the call. It `failed` if what came of it says that the host is in trouble.
    pub(super) fn end(mut self, failed: bool) {
        let circuit = self.circuit;
        let mut state = circuit.lock();
        // Now and not when it is dropped: by then another probe may be under way.
        let probe = std::mem::take(&mut self.probe);
        if probe {
            state.probing = false;
        }
        state.window = (state.window << 1 | u32::from(failed)) & ((1 << WINDOW) - 1);
        state.in_a_row = if failed { state.in_a_row.saturating_add(1) } else { 0 };
        match (probe, failed) {
            (true, false) => {
                *state = State::default();
                info!("a cyberscan host answers again");
            }
            (true, true) => {
                let pause = (state.pause * 2).min(LONGEST_PAUSE);
                state.open(pause);
            }
            (false, true)
                if state.open_until.is_none()
                    && (state.in_a_row >= IN_A_ROW || state.window.count_ones() >= IN_WINDOW) =>
            {
                warn!("a cyberscan host fails again and again and is left alone");
                state.open(FIRST_PAUSE);
            }
            (false, _) => {}
        }
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if self.probe {
            self.circuit.lock().probing = false;
        }
    }
}

impl State {
    fn open(&mut self, pause: Duration) {
        self.pause = pause;
        // Replicas that opened together need not probe together.
        self.open_until = Some(Instant::now() + pause.mul_f64(0.8 + 0.4 * chance()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    /// Makes a call with that outcome; `Err` if the host is left alone.
    fn call(circuit: &Circuit, failed: bool) -> Result<(), Duration> {
        circuit.begin().map(|attempt| attempt.end(failed))
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_after_failures_in_a_row_and_closes_after_a_probe() {
        let circuit = Circuit::default();
        for _ in 0..IN_A_ROW {
            assert_eq!(call(&circuit, true), Ok(()));
        }
        assert!(call(&circuit, false).is_err());
        advance(FIRST_PAUSE.mul_f64(1.3)).await;
        assert_eq!(call(&circuit, true), Ok(()), "the probe");
        advance(FIRST_PAUSE.mul_f64(1.3)).await;
        assert!(call(&circuit, false).is_err(), "the pause has doubled");
        advance(FIRST_PAUSE * 2).await;
        assert_eq!(call(&circuit, false), Ok(()));
        assert_eq!(call(&circuit, false), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn one_probe_at_a_time_and_a_dropped_one_makes_room() {
        let circuit = Circuit::default();
        for _ in 0..IN_A_ROW {
            let _ = call(&circuit, true);
        }
        advance(LONGEST_PAUSE).await;
        let probe = circuit.begin().unwrap();
        assert!(call(&circuit, false).is_err());
        drop(probe);
        assert_eq!(call(&circuit, false), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_fails_three_calls_in_ten_is_not_left_alone() {
        let circuit = Circuit::default();
        for i in 0..10_000_u32 {
            let failed = (i.wrapping_mul(2_654_435_761) >> 8) % 10 < 3;
            assert_eq!(call(&circuit, failed), Ok(()), "opened at call {i}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_is_down_costs_few_calls() {
        let circuit = Circuit::default();
        let mut calls = 0;
        for _ in 0..36_000 {
            calls += u32::from(call(&circuit, true).is_ok());
            advance(Duration::from_millis(100)).await;
        }
        assert!(calls <= 90, "{calls} calls in an hour");
    }
}
