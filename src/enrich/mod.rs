//! What is known about observables. It owns the fan-out: which look-ups an observable needs, how
//! many run at once, that one failing look-up costs no other its answer, and that the deadline
//! holds. It must not know HTTP, nor where answers come from.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod problem;
mod rendered;
mod sighting;

use std::{
    collections::HashMap,
    future::Future,
    net::IpAddr,
    num::NonZeroUsize,
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt, future::join_all};
use serde_json::value::RawValue;
use tokio::{
    sync::{OnceCell, Semaphore},
    time::{Instant, timeout_at},
};

pub use problem::{Problem, Problems};
use rendered::Rendered;
use sighting::Seen;

use crate::{
    ctim::{Observable, Reference, Subject, is_private, sighting::Tlp},
    cyberscan::{
        Answer, Call, CyberScan, Error, HostRecord, Preload, Priority, Record, Tally, Vulnerabilities, Wanted,
    },
    live::Live,
    tenant::Tenant,
};

/// Settings `request.*` and `ctim.*`.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// `request.deadline`: when a whole answer is due.
    pub deadline: Duration,
    /// `request.concurrency`: observables of one request that are looked up at once.
    pub concurrency: NonZeroUsize,
    /// `ctim.ip_details_page`: whether sightings at an address link to its page, which costs its record.
    pub ip_details_page: bool,
    /// `cyberscan.private_addresses`: whether addresses that are nobody's on the internet are looked up.
    pub private_addresses: bool,
    /// `ctim.tlp`: with whom sightings may be shared.
    pub tlp: Tlp,
    /// Bytes of rendered sightings that are kept; a share of `cache.memory`.
    pub rendered_memory: u64,
}

/// Answers questions about observables; a cheap clone.
pub struct Enricher<P> {
    cyberscan: Arc<P>,
    rendered: Rendered,
    config: Live<Config>,
}

impl<P> Clone for Enricher<P> {
    fn clone(&self) -> Self {
        Self {
            cyberscan: Arc::clone(&self.cyberscan),
            rendered: self.rendered.clone(),
            config: self.config.clone(),
        }
    }
}

/// What was found, in the order asked, and what went wrong on the way.
#[derive(Debug)]
pub struct Findings<T> {
    /// What was found.
    pub docs: Vec<T>,
    /// What went wrong, one entry per cause.
    pub problems: Problems,
    /// Where answers came from; known of the whole only.
    pub tally: Option<Arc<Tally>>,
}

impl<P: CyberScan + Preload> Enricher<P> {
    /// An enricher that asks `cyberscan`.
    #[must_use]
    pub fn new(cyberscan: P, config: Config) -> Self {
        let rendered = Rendered::new(config.rendered_memory);
        Self { cyberscan: Arc::new(cyberscan), rendered, config: Live::new(config) }
    }

    /// Answers as `config` says from now on.
    pub fn reconfigure(&self, config: Config) {
        self.config.set(config);
    }

    /// When the answer to a request that came now is due.
    #[must_use]
    pub fn due(&self) -> Instant {
        Instant::now() + self.config.get().deadline
    }

    /// Makes sure that CyberScan accepts the tenant's key.
    ///
    /// # Errors
    /// Why it does not, or cannot be asked.
    pub async fn check(&self, tenant: &Arc<Tenant>, deadline: Instant) -> Result<(), Error> {
        let call = Call::new(Arc::clone(tenant), deadline, Priority::Interactive);
        by(deadline, self.cyberscan.authenticate(&call)).await.map(drop)
    }

    /// The sightings of `observables`, as JSON, at most `limit` for each of them.
    pub async fn observe(
        &self,
        tenant: Arc<Tenant>,
        observables: &[Observable],
        limit: u32,
        deadline: Instant,
    ) -> Findings<Arc<RawValue>> {
        let call = Call::new(tenant, deadline, Priority::Interactive);
        let asked = Asked::default();
        let look_up = |observable| self.sightings(&call, &asked, observable, limit);
        let wanted = Wanted { hosts: self.config.get().ip_details_page, vulnerabilities: true };
        self.join(&call, observables, wanted, look_up).await
    }

    /// A reference for each of `observables` that CyberScan has a page about.
    pub async fn refer(
        &self,
        tenant: Arc<Tenant>,
        observables: &[Observable],
        deadline: Instant,
    ) -> Findings<Reference> {
        let call = Call::new(tenant, deadline, Priority::Interactive);
        let look_up = |observable| self.reference(&call, observable);
        let wanted = Wanted { hosts: true, vulnerabilities: false };
        self.join(&call, observables, wanted, look_up).await
    }

    async fn sightings(
        &self,
        call: &Call,
        asked: &Asked,
        observable: &Observable,
        limit: u32,
    ) -> Result<Findings<Arc<RawValue>>, Error> {
        let (ip, details_page, via) = match observable.subject() {
            Subject::Ip(ip) => (*ip, None, None),
            Subject::Domain(domain) => {
                let domain = self.cyberscan.domain(call, domain).await?;
                match domain.record.known().map(|record| (record.ip, record.details_page.clone())) {
                    Some((Some(ip), page)) if self.is_looked_up(&Subject::Ip(ip)) => (ip, page, domain.stale),
                    // A domain CyberScan does not know, or whose address is unknown or nobody's: nothing to look up.
                    _ => return Ok(Findings::of_stale(domain.stale)),
                }
            }
        };
        let answer = asked.once(ip, || self.cyberscan.vulnerabilities(call, ip)).await?;
        let mut findings = Findings::of_stale(answer.stale.max(via));
        let Record::Known(vulnerabilities) = answer.record else {
            return Ok(findings);
        };
        let details_page = match observable.subject() {
            // Paid for only where there is something to link from.
            Subject::Ip(ip) if self.config.get().ip_details_page && !vulnerabilities.0.is_empty() => {
                findings.note(self.cyberscan.host(call, *ip).await)
            }
            Subject::Ip(_) => None,
            Subject::Domain(_) => details_page,
        };
        let seen = Seen { ip, details_page, vulnerabilities, asked_at: answer.asked_at };
        let docs = self.rendered.get(seen, call.tenant.id(), observable, self.config.get().tlp);
        let limit = usize::try_from(limit).unwrap_or(usize::MAX);
        if docs.len() > limit {
            findings.problems.add(Problem::LeftOut { count: docs.len() - limit });
        }
        findings.docs.extend(docs.iter().take(limit).cloned());
        Ok(findings)
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

    /// Whether CyberScan is asked about `subject`. Addresses that are nobody's on the internet are as good as not
    /// known: looking them up would cost a call and tell a third party about an internal network.
    fn is_looked_up(&self, subject: &Subject) -> bool {
        match subject {
            Subject::Ip(ip) => self.config.get().private_addresses || !is_private(*ip),
            Subject::Domain(_) => true,
        }
    }

    /// Looks all `observables` up side by side and joins what comes of it, in their order.
    async fn join<'a, T, F>(
        &self,
        call: &Call,
        observables: &'a [Observable],
        wanted: Wanted,
        look_up: impl Fn(&'a Observable) -> F,
    ) -> Findings<T>
    where
        F: Future<Output = Result<Findings<T>, Error>>,
    {
        let mut all = Findings { tally: Some(Arc::clone(&call.tally)), ..Findings::default() };
        let observables: Vec<&Observable> =
            observables.iter().filter(|observable| self.is_looked_up(observable.subject())).collect();
        if observables.is_empty() {
            return all;
        }
        // Once for all of them: a refused key is one error, not one per observable.
        if let Err(error) = by(call.deadline, self.cyberscan.authenticate(call)).await {
            all.problems.add(Problem::Failed(error));
            return all;
        }
        let subjects: Vec<Subject> =
            observables.iter().map(|observable| observable.subject().clone()).collect();
        self.cyberscan.preload(call, &subjects, wanted).await;
        let turns = &Semaphore::new(self.config.get().concurrency.get());
        let look_up = &look_up;
        let look_ups = observables.into_iter().map(|observable| async move {
            let _turn = turns.acquire().await;
            by(call.deadline, look_up(observable)).await
        });
        for outcome in join_all(look_ups).await {
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

/// Addresses asked about within one request: several domains, and an address itself, often lead to
/// the same, and one question is enough for all of them.
#[derive(Default)]
struct Asked(Mutex<HashMap<IpAddr, Arc<OnceCell<AtAddress>>>>);

type AtAddress = Result<Answer<Vulnerabilities>, Error>;

impl Asked {
    async fn once<F>(&self, ip: IpAddr, ask: impl FnOnce() -> F) -> AtAddress
    where
        F: Future<Output = AtAddress>,
    {
        let cell = Arc::clone(self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(ip).or_default());
        cell.get_or_init(ask).await.clone()
    }
}

impl<T> Default for Findings<T> {
    fn default() -> Self {
        Self { docs: Vec::new(), problems: Problems::default(), tally: None }
    }
}

impl<T> Findings<T> {
    /// The details page in `host`; that it may be old or missing is a problem of what was found, and no reason to
    /// withhold that.
    fn note(&mut self, host: Result<Answer<HostRecord>, Error>) -> Option<String> {
        match host {
            Ok(Answer { record, stale, .. }) => {
                if let Some(age) = stale {
                    self.problems.add(Problem::Stale { age });
                }
                record.known().and_then(|host| host.details_page.clone())
            }
            Err(error) => {
                self.problems.add(Problem::Failed(error));
                None
            }
        }
    }

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
    let mut future = pin!(future);
    // What comes from memory is there at once, and needs no timer.
    if let Some(outcome) = future.as_mut().now_or_never() {
        return outcome;
    }
    let after = deadline.saturating_duration_since(Instant::now());
    timeout_at(deadline, future).await.unwrap_or(Err(Error::TimedOut { after }))
}
