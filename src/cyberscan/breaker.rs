//! The stage that leaves a CyberScan host alone when it fails again and again. It owns one circuit
//! breaker per host; it must not know what is asked, nor wait.
//!
//! Closed, calls go through and are counted. Ten failures in a row, or fifteen among the last twenty,
//! open it: calls fail at once. After a pause one call is let through as a probe; if it succeeds the
//! breaker closes, if not the pause doubles, up to a minute. Both rules leave a host alone that is down,
//! but hardly ever one that fails three calls in ten, whose other seven answers are worth having.

use std::{
    future::Future,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use moka::sync::Cache;
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Answer, Call, CyberScan, DomainRecord, Error, HostRecord, Purpose, QuotaUse, Vulnerabilities};
use crate::{
    chance::chance,
    ctim::{DomainName, Subject},
    egress::Host,
    metrics::{BreakerState, Label, Metrics},
};

/// Failures in a row that open the breaker.
const IN_A_ROW: u32 = 10;
/// Calls that are looked back at, and the failures among them that open the breaker.
const WINDOW: u32 = 20;
const IN_WINDOW: u32 = 15;
/// The first pause; doubled with each probe that fails.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Hosts that are remembered, and how long without a call.
const HOSTS: u64 = 1_000;
const IDLE: Duration = Duration::from_secs(3600);

/// A stage that asks the `next` one unless its host has failed too often; a cheap clone.
#[derive(Clone)]
pub struct Breaker<P> {
    next: P,
    hosts: Cache<Host, Arc<Mutex<Circuit>>>,
}

#[derive(Debug, Default)]
struct Circuit {
    in_a_row: u32,
    /// The last calls, the newest in the lowest bit; a failure is a one.
    window: u32,
    /// Set while open: when the next probe may go.
    open_until: Option<Instant>,
    pause: Duration,
    probing: bool,
}

impl<P: CyberScan + Clone> Breaker<P> {
    /// Breakers in front of `next`, all closed.
    #[must_use]
    pub fn new(next: P) -> Self {
        Self { next, hosts: Cache::builder().max_capacity(HOSTS).time_to_idle(IDLE).build() }
    }

    /// Brings the gauges of breakers up to date.
    pub fn measure(&self, metrics: &Metrics) {
        let mut counts = [0; BreakerState::ALL.len()];
        for (_, circuit) in &self.hosts {
            if let Some(count) = counts.get_mut(lock(&circuit).state().index()) {
                *count += 1;
            }
        }
        for (state, count) in BreakerState::ALL.iter().zip(counts) {
            metrics.breakers.set((*state,), count);
        }
    }

    async fn guard<T>(
        &self,
        call: &Call,
        asking: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let circuit = self.hosts.get_with_by_ref(call.tenant.host(), Arc::default);
        let attempt = Attempt::begin(&circuit)?;
        let outcome = asking.await;
        attempt.end(outcome.as_ref().err());
        outcome
    }
}

/// A call under way; one that is dropped half-way says nothing about the host.
struct Attempt<'a> {
    circuit: &'a Mutex<Circuit>,
    probe: bool,
}

impl<'a> Attempt<'a> {
    fn begin(circuit: &'a Mutex<Circuit>) -> Result<Self, Error> {
        let mut state = lock(circuit);
        let Some(until) = state.open_until else {
            return Ok(Self { circuit, probe: false });
        };
        let wait = until.saturating_duration_since(Instant::now());
        if !wait.is_zero() || state.probing {
            return Err(Error::Resting { retry_after: wait });
        }
        state.probing = true;
        Ok(Self { circuit, probe: true })
    }

    fn end(self, error: Option<&Error>) {
        let mut state = lock(self.circuit);
        // Only what says that the host is in trouble counts; a refused key or a 429 is an answer.
        let failed = match error {
            Some(Error::Unreachable { .. } | Error::Unavailable { .. } | Error::TimedOut { .. }) => true,
            Some(
                Error::Untrusted { .. }
                | Error::Unauthorized
                | Error::Throttled { .. }
                | Error::Unexpected { .. }
                | Error::Resting { .. }
                | Error::Lost,
            )
            | None => false,
        };
        state.window = (state.window << 1 | u32::from(failed)) & ((1 << WINDOW) - 1);
        state.in_a_row = if failed { state.in_a_row.saturating_add(1) } else { 0 };
        match (self.probe, failed) {
            (true, false) => {
                *state = Circuit::default();
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
            lock(self.circuit).probing = false;
        }
    }
}

impl Circuit {
    fn state(&self) -> BreakerState {
        match self.open_until {
            None => BreakerState::Closed,
            Some(until) if self.probing || Instant::now() >= until => BreakerState::HalfOpen,
            Some(_) => BreakerState::Open,
        }
    }

    fn open(&mut self, pause: Duration) {
        self.pause = pause;
        // Replicas that opened together need not probe together.
        self.open_until = Some(Instant::now() + pause.mul_f64(0.8 + 0.4 * chance()));
    }
}

/// Held for a few assignments; nothing in between can panic, so poison is ignored.
fn lock(circuit: &Mutex<Circuit>) -> MutexGuard<'_, Circuit> {
    circuit.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<P: CyberScan + Clone> CyberScan for Breaker<P> {
    async fn authenticate(&self, call: &Call) -> Result<Instant, Error> {
        self.guard(call, self.next.authenticate(call)).await
    }

    async fn announce(&self, call: &Call, subjects: &[Subject], purpose: Purpose) {
        self.next.announce(call, subjects, purpose).await;
    }

    async fn quotas(&self, call: &Call) -> Vec<QuotaUse> {
        self.next.quotas(call).await
    }

    async fn domain(&self, call: &Call, domain: &DomainName) -> Result<Answer<DomainRecord>, Error> {
        self.guard(call, self.next.domain(call, domain)).await
    }

    async fn host(&self, call: &Call, ip: IpAddr) -> Result<Answer<HostRecord>, Error> {
        self.guard(call, self.next.host(call, ip)).await
    }

    async fn vulnerabilities(&self, call: &Call, ip: IpAddr) -> Result<Answer<Vulnerabilities>, Error> {
        self.guard(call, self.next.vulnerabilities(call, ip)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    fn down() -> Error {
        Error::Unavailable { status: 503 }
    }

    /// Makes a call with that outcome; what the breaker makes of it.
    fn call(circuit: &Mutex<Circuit>, outcome: Option<Error>) -> Result<(), Error> {
        let attempt = Attempt::begin(circuit)?;
        attempt.end(outcome.as_ref());
        outcome.map_or(Ok(()), Err)
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_after_failures_in_a_row_and_closes_after_a_probe() {
        let circuit = Mutex::default();
        for _ in 0..IN_A_ROW {
            assert_eq!(call(&circuit, Some(down())), Err(down()));
        }
        assert!(matches!(call(&circuit, None), Err(Error::Resting { .. })));
        advance(FIRST_PAUSE.mul_f64(1.3)).await;
        assert_eq!(call(&circuit, Some(down())), Err(down()), "the probe");
        advance(FIRST_PAUSE.mul_f64(1.3)).await;
        assert!(matches!(call(&circuit, None), Err(Error::Resting { .. })), "the pause has doubled");
        advance(FIRST_PAUSE * 2).await;
        assert_eq!(call(&circuit, None), Ok(()));
        assert_eq!(call(&circuit, None), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn one_probe_at_a_time_and_a_dropped_one_makes_room() {
        let circuit = Mutex::default();
        for _ in 0..IN_A_ROW {
            let _ = call(&circuit, Some(down()));
        }
        advance(LONGEST_PAUSE).await;
        let probe = Attempt::begin(&circuit).ok().unwrap();
        assert!(matches!(call(&circuit, None), Err(Error::Resting { .. })));
        drop(probe);
        assert_eq!(call(&circuit, None), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_fails_three_calls_in_ten_is_not_left_alone() {
        let circuit = Mutex::default();
        for i in 0..10_000_u32 {
            let failed = (i.wrapping_mul(2_654_435_761) >> 8) % 10 < 3;
            let outcome = call(&circuit, failed.then(down));
            assert!(!matches!(outcome, Err(Error::Resting { .. })), "opened at call {i}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn answers_that_are_refusals_do_not_open_it() {
        let circuit = Mutex::default();
        for error in [Error::Unauthorized, Error::Throttled { retry_after: FIRST_PAUSE }] {
            for _ in 0..100 {
                assert_eq!(call(&circuit, Some(error.clone())), Err(error.clone()));
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_host_that_is_down_costs_few_calls() {
        let circuit = Mutex::default();
        let mut calls = 0;
        for _ in 0..36_000 {
            calls += u32::from(call(&circuit, Some(down())) == Err(down()));
            advance(Duration::from_millis(100)).await;
        }
        assert!(calls <= 90, "{calls} calls in an hour");
    }
}
