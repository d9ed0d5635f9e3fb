//! What a tier that replicas share has to do: keep values, let one replica fetch, and tell the others.
//! It owns the vocabulary and the promises; it must not know Redis, nor what a record means.

use std::{
    future::Future,
    sync::atomic::{AtomicI64, Ordering},
    time::Duration,
};

use tokio::{sync::oneshot, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    clock::Clock,
    cyberscan::{Error, RecordType},
    redis_pool::Unavailable,
    tenant::{Tenant, TenantId},
};

/// A tier that replicas share. One suite of tests runs over every implementation.
pub trait SharedTier: Clone + Send + Sync + 'static {
    /// The clock all replicas share, for versions.
    fn clock(&self) -> &VersionClock;

    /// The values of `keys`, all in one round trip.
    fn read(&self, keys: &[Key]) -> impl Future<Output = Result<Vec<Option<Vec<u8>>>, Unavailable>> + Send;

    /// Looks for a value newer than `version` and, if there is none, tries to become the one who
    /// fetches it, in one step. The lock is lost after `lease`.
    fn claim(
        &self,
        key: &Key,
        version: u64,
        lease: Duration,
    ) -> impl Future<Output = Result<Claim, Unavailable>> + Send;

    /// Writes a value unless a newer one is there, gives the lock of `owner` back and tells the others.
    /// A tier that cannot be reached is written to when it comes back.
    fn store(
        &self,
        key: &Key,
        value: Vec<u8>,
        version: u64,
        life: Duration,
        owner: Option<String>,
    ) -> impl Future<Output = ()> + Send;

    /// Gives the lock back without a value and tells the others why, where they would fare no better.
    fn release(&self, key: &Key, owner: String, error: &Error) -> impl Future<Output = ()> + Send;

    /// Tells all replicas, also those that are cut off now, that nothing older than now may be served.
    fn purge(&self, scope: Scope) -> impl Future<Output = Result<u64, Unavailable>> + Send;

    /// Tells all replicas that CyberScan refuses a tenant's key.
    fn revoke(&self, tenant: Name) -> impl Future<Output = ()> + Send;

    /// Listens to the other replicas until `shutdown`: wakes who waits for a value, and has `hear` told
    /// of everything else.
    fn follow(
        self,
        shutdown: CancellationToken,
        hear: impl Fn(Event) + Send + Sync + 'static,
    ) -> impl Future<Output = ()> + Send;
}

/// What an answer is kept under.
pub type Name = [u8; 16];

/// The name of an answer, and what it is an answer to.
#[derive(Clone, Debug)]
pub struct Key {
    /// Of what type it is.
    pub record_type: RecordType,
    /// Whose it is.
    pub tenant: TenantId,
    /// Derived from the tenant, the record type and the subject.
    pub name: Name,
}

impl Key {
    /// The key of the answer about `subject`, in its canonical spelling.
    #[must_use]
    pub fn new(tenant: &Tenant, record_type: RecordType, subject: &str) -> Self {
        let name = tenant.derive("cache", &[record_type.key_part().as_bytes(), subject.as_bytes()]);
        Self { record_type, tenant: tenant.id(), name }
    }

    /// The same for a tenant of whom no more than the identity is at hand.
    #[must_use]
    pub fn of(tenant: TenantId, record_type: RecordType, subject: &str) -> Self {
        let name = tenant.derive("cache", &[record_type.key_part().as_bytes(), subject.as_bytes()]);
        Self { record_type, tenant, name }
    }
}

/// What a look at the shared tier with the intent to fetch comes to.
pub enum Claim {
    /// There is a newer value already.
    Value(Vec<u8>),
    /// The lock is ours; it has this owner.
    Leader(String),
    /// Another replica fetches; it tells when it is done.
    Follower(oneshot::Receiver<Told>),
}

/// What another replica told about a fetch.
#[derive(Clone, Debug, PartialEq)]
pub enum Told {
    /// The value is there.
    Stored,
    /// There is none, for this reason.
    Failed(Error),
}

/// Something that happened on another replica.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A newer value of this name is there.
    Stored {
        /// The name.
        name: Name,
        /// Its version.
        version: u64,
    },
    /// Nothing older than `version` may be served, of everyone or of one tenant.
    Purged {
        /// What of.
        scope: Scope,
        /// The last version that may not be served.
        version: u64,
    },
    /// CyberScan refuses this tenant's key.
    Revoked {
        /// The tenant, by the name it has in the tier.
        tenant: Name,
        /// When.
        version: u64,
    },
    /// Events were missed: nothing kept from before can be relied on.
    Missed,
}

/// What a purge is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Everything.
    All,
    /// All answers of one tenant, by the name it has in the tier.
    Tenant(Name),
    /// One answer.
    Answer(Name),
}

/// Microseconds on a clock that all replicas share: Redis's, as soon as it was read once. It runs with
/// this process's monotonic clock, so a jump of the wall clock does not reach it.
pub struct VersionClock {
    started: Instant,
    /// What to add to the microseconds since `started`.
    offset: AtomicI64,
}

impl VersionClock {
    /// Shows the wall clock's time until it is [`VersionClock::set`].
    #[must_use]
    pub fn new(wall: Clock) -> Self {
        Self { started: Instant::now(), offset: AtomicI64::new(wall.now().as_microsecond()) }
    }

    /// The present moment.
    #[must_use]
    pub fn now(&self) -> u64 {
        let now = self.elapsed().saturating_add(self.offset.load(Ordering::Relaxed));
        u64::try_from(now).unwrap_or(0)
    }

    /// How long ago `version` was.
    #[must_use]
    pub fn age(&self, version: u64) -> Duration {
        Duration::from_micros(self.now().saturating_sub(version))
    }

    /// Shows `now`, and runs on from there.
    pub fn set(&self, now: u64) {
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        self.offset.store(now.saturating_sub(self.elapsed()), Ordering::Relaxed);
    }

    fn elapsed(&self) -> i64 {
        i64::try_from(self.started.elapsed().as_micros()).unwrap_or(i64::MAX)
    }
}
