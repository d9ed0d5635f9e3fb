//! What a tier that replicas share has to do: keep values, let one replica fetch, and tell the others.
//! It owns the vocabulary and the promises; it must not know Redis, nor what a record means.

use std::{fmt, future::Future, sync::Arc, time::Duration};

use tokio::{sync::oneshot, time::Instant};
use tokio_util::sync::CancellationToken;

use super::order::{Order, Scope};
use crate::{
    cyberscan::{Error, RecordType},
    redis_pool::Unavailable,
    tenant::{Tenant, TenantId},
};

/// A tier that replicas share. One suite of tests runs over every implementation. Versions are those of this process
/// ([`super::order::VersionClock`]); in the tier they stand as the fleet counts.
///
/// Nothing is read from the tier, nor is anybody's lock heeded, before this process knows what was purged in it, and no
/// longer than that knowledge is kept up to date.
pub trait SharedTier: Clone + Send + Sync + 'static {
    /// What this process knows of purges, and the clock versions are told by.
    fn order(&self) -> &Order;

    /// The values of `names`, all in one round trip.
    fn read(&self, names: &[Name]) -> impl Future<Output = Result<Vec<Option<Vec<u8>>>, Unavailable>> + Send;

    /// Looks for a value newer than `version` and, if there is none, tries to become the one who
    /// fetches it, in one step. The lock is lost after `lease`.
    fn claim(
        &self,
        name: Name,
        version: u64,
        lease: Duration,
    ) -> impl Future<Output = Result<Claim, Unavailable>> + Send;

    /// Writes a value unless a newer one is there, gives the lock back, and tells those who wait for it or have an older
    /// one. A tier that cannot be reached is written to when it comes back.
    fn store(&self, write: Write) -> impl Future<Output = ()> + Send;

    /// Gives the lock back without a value and tells who waits for it why, where they would fare no better.
    fn release(&self, name: Name, owner: String, error: &Error) -> impl Future<Output = ()> + Send;

    /// Tells all replicas what this process knows of `scope`, also those that are cut off now. What could not be told is
    /// told when the tier comes back.
    fn tell(&self, scope: Scope) -> impl Future<Output = Result<(), Unavailable>> + Send;

    /// Listens to the other replicas until `shutdown`: wakes who waits for a value, learns what was purged, and has `hear`
    /// told of what becomes of that.
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
    /// The tenant's name in logs and in the tier.
    pub label: Name,
    /// Derived from the tenant, the record type and the subject.
    pub name: Name,
    /// What it is about, in its canonical spelling.
    pub subject: Box<str>,
}

impl Key {
    /// The key of the answer about `subject`, in its canonical spelling.
    #[must_use]
    pub fn new(tenant: &Tenant, record_type: RecordType, subject: impl Into<Box<str>>) -> Self {
        let subject = subject.into();
        let name = tenant.derive("cache", &[record_type.key_part().as_bytes(), subject.as_bytes()]);
        Self { record_type, tenant: tenant.id(), label: tenant.name(), name, subject }
    }
}

/// A value on its way into the tier.
#[derive(Clone)]
pub struct Write {
    /// What it is kept under.
    pub name: Name,
    /// The moment its fetch began.
    pub version: u64,
    /// When it is of no use any more.
    pub until: Instant,
    /// Who has the lock, if it was fetched under one.
    pub owner: Option<String>,
    /// Bytes it occupies while it waits.
    pub size: usize,
    /// What it is.
    pub value: Value,
}

/// Makes a value of what was fetched, at the moment it is written: given the version it is to carry; `None` if it is too
/// large, or was purged meanwhile.
#[derive(Clone)]
pub struct Value(pub Arc<dyn Fn(u64) -> Option<Vec<u8>> + Send + Sync>);

impl fmt::Debug for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Value(..)")
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
    /// Nothing of `scope` up to `version` may be served; the tier's [`Order`] knows it already.
    Purged {
        /// What of.
        scope: Scope,
        /// The last version that may not be served.
        version: u64,
    },
}
