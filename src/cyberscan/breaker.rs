//! The stage that leaves a CyberScan host alone when it fails again and again. It owns one circuit
//! per host, and which errors count; it must not know what is asked, nor wait.

use std::{future::Future, net::IpAddr, sync::Arc, time::Duration};

use moka::{policy::EvictionPolicy, sync::Cache};
use secrecy::SecretString;
use tokio::time::Instant;

use super::{Answer, Call, CyberScan, DomainRecord, Error, HostRecord, Vulnerabilities, circuit::Circuit};
use crate::{
    ctim::DomainName,
    egress::Host,
    metrics::{BreakerState, Label, Metrics},
    tenant::Tenant,
};

/// Hosts that are remembered, and how long without a call.
const HOSTS: u64 = 1_000;
const IDLE: Duration = Duration::from_secs(3600);

/// A stage that asks the `next` one unless its host has failed too often; a cheap clone.
#[derive(Clone)]
pub struct Breaker<P> {
    next: P,
    hosts: Cache<Host, Arc<Circuit>>,
}

impl<P: CyberScan + Clone> Breaker<P> {
    /// Breakers in front of `next`, all closed.
    #[must_use]
    pub fn new(next: P) -> Self {
        // A host that is new always finds a place: its failures are not to be forgotten at once.
        let hosts = Cache::builder().max_capacity(HOSTS).eviction_policy(EvictionPolicy::lru());
        Self { next, hosts: hosts.time_to_idle(IDLE).build() }
    }

    /// Brings the gauges of breakers up to date.
    pub fn measure(&self, metrics: &Metrics) {
        let mut counts = [0; BreakerState::ALL.len()];
        for (_, circuit) in &self.hosts {
            if let Some(count) = counts.get_mut(circuit.state().index()) {
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
        let attempt = circuit.begin().map_err(|retry_after| Error::Resting { retry_after })?;
        let outcome = asking.await;
        match says(&outcome) {
            Some(trouble) => attempt.end(trouble),
            None => drop(attempt),
        }
        outcome
    }
}

/// Whether the host is in trouble; a refused key or a 429 is an answer. What was not sent, or given no time, says
/// nothing about it: neither that it is nor that it is not.
fn says<T>(outcome: &Result<T, Error>) -> Option<bool> {
    let Err(error) = outcome else { return Some(false) };
    match error {
        Error::Unreachable { .. } | Error::Unavailable { .. } | Error::TimedOut { .. } => Some(true),
        Error::Untrusted { .. }
        | Error::Unauthorized
        | Error::Throttled { .. }
        | Error::Unexpected { .. } => Some(false),
        Error::Limited { .. } | Error::TooLate { .. } | Error::Resting { .. } | Error::Lost => None,
    }
}

impl<P: CyberScan + Clone> CyberScan for Breaker<P> {
    async fn authenticate(&self, call: &Call) -> Result<Instant, Error> {
        self.guard(call, self.next.authenticate(call)).await
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

    fn access_token(&self, tenant: &Tenant) -> Option<SecretString> {
        self.next.access_token(tenant)
    }

    fn use_access_token(&self, tenant: &Tenant, token: &SecretString, given_out: Instant) {
        self.next.use_access_token(tenant, token, given_out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn answers_that_are_refusals_do_not_open_it() {
        let circuit = Circuit::default();
        for error in [Error::Unauthorized, Error::Throttled { retry_after: IDLE }] {
            for _ in 0..100 {
                circuit.begin().unwrap().end(says::<()>(&Err(error.clone())).unwrap());
            }
        }
        assert_eq!(circuit.state(), BreakerState::Closed);
    }

    /// Answers as it is told, one after the other.
    #[derive(Clone)]
    struct Says(Arc<std::sync::Mutex<Vec<Error>>>);

    impl CyberScan for Says {
        async fn authenticate(&self, _: &Call) -> Result<Instant, Error> {
            self.0.lock().unwrap().pop().map_or(Ok(Instant::now()), Err)
        }
        async fn domain(&self, _: &Call, _: &DomainName) -> Result<Answer<DomainRecord>, Error> {
            Err(Error::Lost)
        }
        async fn host(&self, _: &Call, _: IpAddr) -> Result<Answer<HostRecord>, Error> {
            Err(Error::Lost)
        }
        async fn vulnerabilities(&self, _: &Call, _: IpAddr) -> Result<Answer<Vulnerabilities>, Error> {
            Err(Error::Lost)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_not_sent_or_given_no_time_neither_opens_nor_closes_it() {
        let says = Says(Arc::default());
        let breaker = Breaker::new(says.clone());
        let tenant = Arc::new(crate::tenant::Tenant::new(
            "api.example.com".parse().unwrap(),
            crate::tenant::ApiKey::new("key".into()),
        ));
        let call = Call::new(tenant, Instant::now() + IDLE, crate::cyberscan::Priority::Interactive);
        let second = Duration::from_secs(1);
        let silent = || Error::TimedOut { after: second };
        let not_sent =
            [Error::Limited { retry_after: second }, Error::TooLate { after: second }, Error::Lost];
        // Ten in a row open it, whatever is refused in between.
        for number in 0..10 {
            for error in &not_sent {
                says.0.lock().unwrap().push(error.clone());
                assert_eq!(breaker.authenticate(&call).await.err().as_ref(), Some(error));
            }
            says.0.lock().unwrap().push(silent());
            assert_eq!(breaker.authenticate(&call).await.err(), Some(silent()), "{number}");
        }
        let resting = || async { matches!(breaker.authenticate(&call).await, Err(Error::Resting { .. })) };
        assert!(resting().await);
        // A probe that was not sent is given back: it neither closes the circuit nor costs another pause.
        tokio::time::advance(10 * second).await;
        for error in &not_sent {
            says.0.lock().unwrap().push(error.clone());
            assert_eq!(breaker.authenticate(&call).await.err().as_ref(), Some(error));
        }
        says.0.lock().unwrap().push(silent());
        assert_eq!(breaker.authenticate(&call).await.err(), Some(silent()));
        assert!(resting().await);
    }
}
