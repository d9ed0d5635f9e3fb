//! CyberScan, as the rest of the relay sees it: one port ([`CyberScan`]) that the HTTP client and
//! every stage in front of it implement, the records it answers with and the errors it can give.

pub mod breaker;
mod circuit;
pub mod client;
mod cve;
pub mod error;
pub mod latency;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub mod model;
mod printed;
mod severity;
pub mod token;

use std::{
    future::Future,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use secrecy::SecretString;
use tokio::time::Instant;

pub use breaker::Breaker;
pub use client::{Client, Config};
pub use error::Error;
pub use model::{DomainRecord, Finding, HostRecord, Vulnerabilities};

use crate::{
    ctim::{DomainName, Subject},
    metrics::Resource,
    tenant::Tenant,
};

/// The port: what can be asked of CyberScan.
///
/// Every stage implements it around the next one, so a question runs through them in one
/// direction and a test can put a fake at any depth.
pub trait CyberScan: Send + Sync + 'static {
    /// Makes sure that CyberScan accepts the tenant's key; the answer is when it last did.
    fn authenticate(&self, call: &Call) -> impl Future<Output = Result<Instant, Error>> + Send;

    /// The record of a domain.
    fn domain(
        &self,
        call: &Call,
        domain: &DomainName,
    ) -> impl Future<Output = Result<Answer<DomainRecord>, Error>> + Send;

    /// The record of an address.
    fn host(&self, call: &Call, ip: IpAddr)
    -> impl Future<Output = Result<Answer<HostRecord>, Error>> + Send;

    /// The vulnerabilities found at an address.
    fn vulnerabilities(
        &self,
        call: &Call,
        ip: IpAddr,
    ) -> impl Future<Output = Result<Answer<Vulnerabilities>, Error>> + Send;

    /// The access token that the tenant's calls are made with, if they are made with one: for other replicas to use.
    fn access_token(&self, _: &Tenant) -> Option<SecretString> {
        None
    }

    /// Makes the tenant's calls with `token`, which another replica was given then, unless there is a newer one.
    fn use_access_token(&self, _: &Tenant, _token: &SecretString, _given_out: Instant) {}
}

/// A stage that keeps answers: told beforehand what a request is going to ask, it brings all of it near at once.
pub trait Preload: Send + Sync + 'static {
    /// Brings near what is known of `subjects`; that changes no answer, only how soon it comes.
    fn preload(&self, call: &Call, subjects: &[Subject], wanted: Wanted) -> impl Future<Output = ()> + Send;
}

/// Which records a request is going to ask for, beside those of domains.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Those of addresses.
    pub hosts: bool,
    /// The vulnerabilities of addresses, and of those that domains lead to.
    pub vulnerabilities: bool,
}

/// Who knows how much of the quotas is used.
pub trait Quotas: Send + Sync + 'static {
    /// How much of each quota of `tenant`, and of all tenants together, is used.
    fn quotas<'a>(&'a self, tenant: &'a Arc<Tenant>) -> BoxFuture<'a, Vec<QuotaUse>>;
}

/// No quotas: each call may be made at once.
pub(crate) struct Unlimited;

impl Admission for Unlimited {
    type Permit = ();

    async fn admit(&self, _: &Call) -> Result<(), Error> {
        Ok(())
    }

    async fn answered(&self, _: &Call, _: Pace) {}
}

#[cfg(any(test, fuzzing))]
impl Quotas for Unlimited {
    fn quotas<'a>(&'a self, _: &'a Arc<Tenant>) -> BoxFuture<'a, Vec<QuotaUse>> {
        Box::pin(std::future::ready(Vec::new()))
    }
}

/// The types of records that CyberScan has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RecordType {
    /// Of a domain.
    Domain,
    /// Of an address.
    Host,
    /// The vulnerabilities at an address.
    Vulnerabilities,
}

impl RecordType {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Domain, Self::Host, Self::Vulnerabilities];

    /// Its name in keys of caches and indexes; it must never change, or what is kept is not found any more.
    #[must_use]
    pub const fn key_part(self) -> &'static str {
        match self {
            Self::Domain => "domain",
            Self::Host => "host",
            Self::Vulnerabilities => "vulnerabilities",
        }
    }

    /// The label under which it is counted.
    #[must_use]
    pub const fn label(self) -> Resource {
        match self {
            Self::Domain => Resource::Domain,
            Self::Host => Resource::Host,
            Self::Vulnerabilities => Resource::Vulnerabilities,
        }
    }
}

/// On whose behalf a question is asked, and how long it is worth waiting.
#[derive(Clone, Debug)]
pub struct Call {
    /// The tenant who asks.
    pub tenant: Arc<Tenant>,
    /// When it ends without an answer.
    pub deadline: Instant,
    /// When an answer comes too late for who asked; what is pursued beyond that is no reason to make another call.
    pub wanted_by: Instant,
    /// How urgent it is.
    pub priority: Priority,
    /// A key that was accepted before proves nothing.
    pub since: Option<Instant>,
    /// Where its answers came from.
    pub tally: Arc<Tally>,
}

impl Call {
    /// A call that nothing has been answered to yet.
    #[must_use]
    pub fn new(tenant: Arc<Tenant>, deadline: Instant, priority: Priority) -> Self {
        Self { tenant, deadline, wanted_by: deadline, priority, since: None, tally: Arc::default() }
    }

    /// The same for someone who wants an answer by then, if that is before its end.
    #[must_use]
    pub fn wanted_by(self, wanted_by: Instant) -> Self {
        Self { wanted_by: wanted_by.min(self.deadline), ..self }
    }
}

/// Where the answers to a request's look-ups came from.
#[derive(Debug, Default)]
pub struct Tally {
    /// Memory.
    pub memory: AtomicU32,
    /// Redis, or another replica.
    pub redis: AtomicU32,
    /// CyberScan.
    pub upstream: AtomicU32,
    /// Any of them, past its freshness, because CyberScan could not be asked.
    pub stale: AtomicU32,
    /// Nowhere: the look-up failed.
    pub failed: AtomicU32,
}

/// One more of these.
pub(crate) fn tick(count: &AtomicU32) {
    count.fetch_add(1, Ordering::Relaxed);
}

/// How urgent a call is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// Someone waits for it.
    Interactive,
    /// Nobody waits for it: it must not cost anyone else a call.
    Prefetch,
}

/// Who decides when a request may go to CyberScan. The client asks before each one it sends, token calls
/// and repetitions too.
pub trait Admission: Send + Sync + 'static {
    /// Leave to send one request; it is given back when dropped.
    type Permit: Send;

    /// Waits until a request may be sent.
    ///
    /// An error is [`Error::Limited`] when that would be too late.
    fn admit(&self, call: &Call) -> impl Future<Output = Result<Self::Permit, Error>> + Send;

    /// Hears what CyberScan says to the pace.
    fn answered(&self, call: &Call, pace: Pace) -> impl Future<Output = ()> + Send;
}

/// How much of a quota is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaUse {
    /// Whose quota it is: the tenant's, or that of all tenants together.
    pub of_fleet: bool,
    /// At most so many calls …
    pub limit: u32,
    /// … in any span of this length.
    pub per: Duration,
    /// Calls made in the last such span.
    pub used: u32,
}

/// What CyberScan says to the pace of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// It answered.
    Fine,
    /// It said 429.
    TooFast {
        /// When it wants to hear of us again, if it said so.
        retry_after: Option<Duration>,
    },
}

/// An answer of CyberScan.
#[derive(Debug)]
pub struct Answer<T> {
    /// What it knows.
    pub record: Record<T>,
    /// When it was asked; an answer from a cache is as old as its question.
    pub asked_at: Timestamp,
    /// The age of an answer that is served although it is no longer fresh, because CyberScan
    /// could not be asked again.
    pub stale: Option<Duration>,
}

/// What CyberScan knows about something.
#[derive(Debug, PartialEq, Eq)]
pub enum Record<T> {
    /// This.
    Known(Arc<T>),
    /// It does not know the thing asked about (404).
    Unknown,
}

impl<T> Record<T> {
    /// The record, if there is one.
    #[must_use]
    pub fn known(&self) -> Option<&Arc<T>> {
        match self {
            Self::Known(record) => Some(record),
            Self::Unknown => None,
        }
    }
}

impl<T> Clone for Record<T> {
    fn clone(&self) -> Self {
        match self {
            Self::Known(record) => Self::Known(Arc::clone(record)),
            Self::Unknown => Self::Unknown,
        }
    }
}

impl<T> Clone for Answer<T> {
    fn clone(&self) -> Self {
        Self { record: self.record.clone(), asked_at: self.asked_at, stale: self.stale }
    }
}
