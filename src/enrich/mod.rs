//! What is known about observables. It owns the fan-out: which look-ups an observable needs, how
//! many run at once, that one failing look-up costs no other its answer, and that the deadline
//! holds. It must not know HTTP, nor where answers come from.

mod problem;
mod sighting;

use std::{future::Future, num::NonZeroUsize, sync::Arc, time::Duration};

use futures_util::{StreamExt, stream};
use serde_json::value::RawValue;
use tokio::time::{Instant, timeout_at};

pub use problem::{Problem, Problems};
use sighting::Seen;

use crate::{
    ctim::{Observable, Reference, Subject, sighting::Tlp},
    cyberscan::{Call, CyberScan, Error},
    tenant::Tenant,
};

/// Settings `request.*` and `ctim.*`.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// `request.deadline`: when a whole answer is due.
    pub deadline: Duration,
    /// `request.concurrency`: observables of one request that are looked up at once.
    pub concurrency: NonZeroUsize,
    /// `ctim.tlp`: with whom sightings may be shared.
    pub tlp: Tlp,
}

/// Answers questions about observables; a cheap clone.
#[derive(Debug)]
pub struct Enricher<P> {
    cyberscan: Arc<P>,
    config: Config,
}

impl<P> Clone for Enricher<P> {
    fn clone(&self) -> Self {
        Self { cyberscan: Arc::clone(&self.cyberscan), config: self.config }
    }
}

/// What was found, in the order asked, and what went wrong on the way.
#[derive(Debug)]
pub struct Findings<T> {
    /// What was found.
    pub docs: Vec<T>,
    /// What went wrong, one entry per cause.
    pub problems: Problems,
}

impl<P: CyberScan> Enricher<P> {
    /// An enricher that asks `cyberscan`.
    #[must_use]
    pub fn new(cyberscan: P, config: Config) -> Self {
        Self { cyberscan: Arc::new(cyberscan), config }
    }

    /// When the answer to a request that came now is due.
    #[must_use]
    pub fn due(&self) -> Instant {
        Instant::now() + self.config.deadline
    }

    /// Whether CyberScan accepts the tenant's key.
    ///
    /// # Errors
    /// Why it does not, or cannot be asked.
    pub async fn check(&self, tenant: Arc<Tenant>, deadline: Instant) -> Result<(), Error> {
        by(deadline, self.cyberscan.authenticate(&Call { tenant, deadline })).await
    }

    /// The sightings of `observables`, as JSON, at most `limit` for each of them.
    pub async fn observe(
        &self,
        tenant: Arc<Tenant>,
        observables: &[Observable],
        limit: u32,
        deadline: Instant,
    ) -> Findings<Box<RawValue>> {
        let call = Call { tenant, deadline };
        let look_ups =
            observables.iter().map(|observable| self.sightings(&call, observable, limit)).collect();
        self.join(&call, look_ups).await
    }

    /// A reference for each of `observables` that CyberScan has a page about.
    pub async fn refer(
        &self,
        tenant: Arc<Tenant>,
        observables: &[Observable],
        deadline: Instant,
    ) -> Findings<Reference> {
        let call = Call { tenant, deadline };
        let look_ups = observables.iter().map(|observable| self.reference(&call, observable)).collect();
        self.join(&call, look_ups).await
    }

    async fn sightings(
        &self,
        call: &Call,
        observable: &Observable,
        limit: u32,
    ) -> Result<Findings<Box<RawValue>>, Error> {
        let (ip, details_page, via) = match observable.subject() {
            Subject::Ip(ip) => (*ip, None, None),
            Subject::Domain(domain) => {
                let domain = self.cyberscan.domain(call, domain).await?;
                match domain.record.known().map(|record| (record.ip, record.details_page.clone())) {
                    Some((Some(ip), page)) => (ip, page, domain.stale),
                    // A domain CyberScan does not know, or knows no address of: nothing to look up.
                    _ => return Ok(Findings::of_stale(domain.stale)),
                }
            }
        };
        let vulnerabilities = self.cyberscan.vulnerabilities(call, ip).await?;
        let seen = Seen { ip, details_page, vulnerabilities, via };
        Ok(seen.sightings(call.tenant.id(), observable, limit, self.config.tlp))
    }

    async fn reference(&self, call: &Call, observable: &Observable) -> Result<Findings<Reference>, Error> {
        let (page, stale) = match observable.subject() {
            Subject::Ip(ip) => {
                let host = self.cyberscan.host(call, *ip).await?;
                (host.record.known().and_then(|record| record.details_page.clone()), host.stale)
            }
            Subject::Domain(domain) => {
                let domain = self.cyberscan.domain(call, domain).await?;
                (domain.record.known().and_then(|record| record.details_page.clone()), domain.stale)
            }
        };
        let mut findings = Findings::of_stale(stale);
        findings.docs.extend(page.map(|page| Reference::new(observable, &page)));
        Ok(findings)
    }

    /// Runs `look_ups` side by side and joins what comes of them, in their order.
    async fn join<T>(
        &self,
        call: &Call,
        look_ups: Vec<impl Future<Output = Result<Findings<T>, Error>>>,
    ) -> Findings<T> {
        let mut all = Findings::default();
        // Once for all of them: a refused key is one error, not one per observable.
        if let Err(error) = by(call.deadline, self.cyberscan.authenticate(call)).await {
            all.problems.add(Problem::Failed(error));
            return all;
        }
        let look_ups = look_ups.into_iter().map(|look_up| by(call.deadline, look_up));
        let mut outcomes = stream::iter(look_ups).buffered(self.config.concurrency.get());
        while let Some(outcome) = outcomes.next().await {
            match outcome {
                Ok(findings) => {
                    all.docs.extend(findings.docs);
                    all.problems.join(findings.problems);
                }
                Err(error) => all.problems.add(Problem::Failed(error)),
            }
        }
        all
    }
}

impl<T> Default for Findings<T> {
    fn default() -> Self {
        Self { docs: Vec::new(), problems: Problems::default() }
    }
}

impl<T> Findings<T> {
    /// Nothing yet, but from data of this age if it is past its freshness.
    fn of_stale(age: Option<Duration>) -> Self {
        let mut findings = Self::default();
        if let Some(age) = age {
            findings.problems.add(Problem::Stale { age });
        }
        findings
    }
}

/// `future`, unless `deadline` comes first.
async fn by<T>(deadline: Instant, future: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let started = Instant::now();
    timeout_at(deadline, future).await.unwrap_or_else(|_| Err(Error::TimedOut { after: started.elapsed() }))
}
