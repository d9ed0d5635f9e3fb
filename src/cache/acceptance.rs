//! Whether CyberScan accepts a tenant's key. One replica's token call counts for all: what it came to, the access token
//! included, is kept in Redis beside the answers, under a name and sealed in a way that only the tenant's key can
//! reproduce. It owns who is let in; it must not know what a token is good for.

use std::{sync::Arc, time::Duration};

use aws_lc_rs::aead::{AES_128_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::{Instant, timeout, timeout_at};

use super::{
    Cached,
    entry::{version_of, version_text},
    fill::{Failure, Turn},
    order::{Scope, micros},
    tier::{Name, SharedTier, Value, Write},
};
use crate::{
    cyberscan::{Call, CyberScan, Error},
    tenant::{Tenant, TenantId},
};

/// What an acceptance begins with; the version follows, as in an entry.
const MAGIC: &[u8; 2] = b"A1";
/// Magic and version.
const HEAD: usize = 2 + 16;
/// How long data that was refused makes acceptances from before doubtful; longer than a replica could hold one.
pub(super) const SUSPECTED: Duration = Duration::from_secs(48 * 3600);

/// That CyberScan accepted a tenant's key.
#[derive(Clone, Copy)]
pub(super) struct Accepted {
    pub(super) at: Instant,
    version: u64,
}

impl<P: CyberScan, T: SharedTier> Cached<P, T> {
    /// A key counts as accepted for `auth.revalidate`. While CyberScan cannot be asked, one that was
    /// accepted before goes on being served from what is kept.
    pub(super) async fn accept(&self, call: &Call) -> Result<Instant, Error> {
        let (revalidate, longest) = {
            let config = self.0.config.get();
            (config.revalidate, config.longest_life() + config.revalidate)
        };
        let tenant = &call.tenant;
        let accepted = self.0.accepted.get(&tenant.id());
        let accepted = accepted.filter(|accepted| accepted.version > self.doubtful_before(tenant));
        let accepted = match accepted {
            Some(accepted) => Some(accepted.at),
            None if self.recent_refusal(tenant.id()).is_some() => None,
            None => Box::pin(self.accepted_elsewhere(tenant)).await,
        };
        match accepted.filter(|at| at.elapsed() < longest) {
            Some(at) if at.elapsed() < revalidate => Ok(at),
            Some(at) => {
                let soft = call.deadline.min(Instant::now() + self.0.config.get().soft_timeout);
                match Box::pin(self.ask_for_acceptance(call, soft)).await {
                    Err(error) if error != Error::Unauthorized => Ok(at),
                    outcome => outcome,
                }
            }
            None => Box::pin(self.ask_for_acceptance(call, call.deadline)).await,
        }
    }

    /// Data was refused: whether it is the key that is, the next authentication tells.
    pub(super) fn suspect(&self, tenant: TenantId) {
        self.0.suspected.insert(tenant, self.order().clock().now());
    }

    /// No acceptance up to this version says anything.
    fn doubtful_before(&self, tenant: &Tenant) -> u64 {
        let suspected = self.0.suspected.get(&tenant.id()).unwrap_or(0);
        suspected.max(self.order().revoked_before(tenant.name()))
    }

    /// Asks the other replicas, then the next stage, whether the tenant's key is accepted, in a task of its own.
    async fn ask_for_acceptance(&self, call: &Call, deadline: Instant) -> Result<Instant, Error> {
        let tenant = call.tenant.id();
        if let Some(failure) = self.recent_refusal(tenant) {
            return Err(failure.error);
        }
        let after = deadline.saturating_duration_since(Instant::now());
        let joining = self.0.authentications.join(tenant, || {
            let (this, tenant, priority) = (self.clone(), Arc::clone(&call.tenant), call.priority);
            let wanted_by = call.wanted_by;
            async move {
                let longest = this.0.config.get().fill_timeout;
                let call = Call::new(tenant, Instant::now() + longest, priority).wanted_by(wanted_by);
                let outcome = timeout(longest, this.accepted_by_somebody(&call)).await;
                let outcome = outcome.unwrap_or(Err(Error::TimedOut { after: longest }));
                this.note_refusal(&call.tenant, &outcome);
                outcome
            }
        });
        match timeout_at(deadline, joining).await {
            Ok(outcome) => outcome.unwrap_or(Err(Error::Lost)),
            Err(_) => Err(Error::TimedOut { after }),
        }
    }

    /// The last acceptance that is young enough, or a new one.
    async fn accepted_by_somebody(&self, call: &Call) -> Result<Instant, Error> {
        let (tenant, clock, revalidate) =
            (&call.tenant, self.order().clock(), self.0.config.get().revalidate);
        let young = clock.now().saturating_sub(micros(revalidate));
        let version = young.max(self.doubtful_before(tenant));
        let owner = match self.turn(name_of(tenant), version, |value| self.believe(tenant, value)).await? {
            Turn::Had(at, _) => return Ok(at),
            Turn::Ours(owner) => owner,
        };
        // A token from before the key was refused proves nothing.
        let revoked = Instant::now().checked_sub(clock.age(self.order().revoked_before(tenant.name())));
        let outcome = self.0.next.authenticate(&Call { since: revoked, ..call.clone() }).await;
        match &outcome {
            Ok(at) => {
                // It counts from when the token was given out, which may have been before data was refused.
                let suspected = self.0.suspected.get(&tenant.id()).map_or(0, |version| version + 1);
                let version = clock.now().saturating_sub(micros(at.elapsed())).max(suspected);
                self.0.accepted.insert(tenant.id(), Accepted { at: *at, version });
                self.share_acceptance(tenant, *at, version, owner);
            }
            Err(error) => {
                if *error == Error::Unauthorized {
                    // Also where nothing can be told: what others had accepted before is not believed any more.
                    self.suspect(tenant.id());
                    self.revoke(tenant).await;
                }
                if let (Some(shared), Some(owner)) = (self.0.shared.clone(), owner) {
                    let (name, error) = (name_of(tenant), error.clone());
                    self.0.tasks.spawn(async move { shared.release(name, owner, &error).await });
                }
            }
        }
        outcome
    }

    /// Forgets what is kept for a tenant whose key is refused, on every replica, if anything may be.
    async fn revoke(&self, tenant: &Tenant) {
        let known = self.0.accepted.remove(&tenant.id()).is_some();
        // Who never was accepted has nothing to lose; else strangers' keys could fill the fleet's memory with stamps.
        if known || self.in_tier(tenant).await.is_some() {
            // What could not be told is told when Redis is back.
            let _ = self.forget(Scope::Revoked(tenant.name()), self.order().clock().now()).await;
        }
    }

    /// When another replica's call was accepted, however long ago, if nothing speaks against it since.
    async fn accepted_elsewhere(&self, tenant: &Tenant) -> Option<Instant> {
        self.believe(tenant, &self.in_tier(tenant).await?)
    }

    async fn in_tier(&self, tenant: &Tenant) -> Option<Vec<u8>> {
        self.0.shared.as_ref()?.read(&[name_of(tenant)]).await.ok()?.pop()?
    }

    /// When the acceptance that is `value` was, unless it is made up or doubtful.
    fn believe(&self, tenant: &Tenant, value: &[u8]) -> Option<Instant> {
        let (token, clock) = (opened(tenant, value)?, self.order().clock());
        let shared =
            version_of(value).filter(|shared| clock.horizon().is_some_and(|horizon| *shared <= horizon))?;
        let version = clock.own(shared).filter(|version| *version > self.doubtful_before(tenant))?;
        let at = Instant::now().checked_sub(clock.age(version))?;
        self.0.accepted.insert(tenant.id(), Accepted { at, version });
        self.0.next.use_access_token(tenant, &token, at);
        Some(at)
    }

    fn share_acceptance(&self, tenant: &Arc<Tenant>, at: Instant, version: u64, owner: Option<String>) {
        let Some(shared) = self.0.shared.clone() else { return };
        let config = self.0.config.get();
        let until = at + config.longest_life() + config.revalidate;
        let token = self.0.next.access_token(tenant).unwrap_or_default();
        let size = token.expose_secret().len();
        let (name, tenant, this) = (name_of(tenant), Arc::clone(tenant), Arc::downgrade(&self.0));
        let value = move |shared| {
            let doubtful = Self(this.upgrade()?).doubtful_before(&tenant);
            (version > doubtful).then(|| sealed(&tenant, shared, &token))?
        };
        let write = Write { name, version, until, owner, size, value: Value(Arc::new(value)) };
        self.0.tasks.spawn(async move { shared.store(write).await });
    }

    fn recent_refusal(&self, tenant: TenantId) -> Option<Failure> {
        self.0.refused.get(&tenant).filter(|failure| Instant::now() < failure.until)
    }

    fn note_refusal(&self, tenant: &Tenant, outcome: &Result<Instant, Error>) {
        match outcome {
            Ok(_) => self.0.refused.invalidate(&tenant.id()),
            Err(error) if error.is_telling() && !matches!(error, Error::Resting { .. }) => {
                let failure = Failure::after(self.0.refused.get(&tenant.id()), error.clone());
                self.0.refused.insert(tenant.id(), failure);
            }
            Err(_) => {}
        }
    }
}

fn name_of(tenant: &Tenant) -> Name {
    tenant.derive("accepted", &[])
}

/// What acceptances of a tenant are sealed with.
fn seal_of(tenant: &Tenant) -> Option<RandomizedNonceKey> {
    RandomizedNonceKey::new(&AES_128_GCM, &tenant.derive("accepted/seal", &[])).ok()
}

/// An acceptance as it stands in Redis: nobody can write or read one who does not know the tenant's key.
fn sealed(tenant: &Tenant, version: u64, token: &SecretString) -> Option<Vec<u8>> {
    let head = [MAGIC.as_slice(), version_text(version).as_bytes()].concat();
    let mut body = token.expose_secret().as_bytes().to_vec();
    let nonce = seal_of(tenant)?.seal_in_place_append_tag(Aad::from(&head), &mut body).ok()?;
    Some([&head, nonce.as_ref().as_slice(), &body].concat())
}

/// The access token in what [`sealed`] made, empty where there was none.
fn opened(tenant: &Tenant, value: &[u8]) -> Option<SecretString> {
    let (head, rest) = value.split_at_checked(HEAD)?;
    let (nonce, body) = rest.split_at_checked(NONCE_LEN)?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
    let mut body = body.to_vec();
    let plain = seal_of(tenant)?.open_in_place(nonce, Aad::from(head), &mut body).ok()?;
    std::str::from_utf8(plain).ok().map(SecretString::from)
}
