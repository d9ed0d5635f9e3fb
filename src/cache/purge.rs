//! Forgetting: what operators purge, what CyberScan no longer lets a tenant have, and what other replicas tell of both.
//! It owns how far a purge reaches; that nothing purged is served is [`super::order`]'s.

use std::sync::atomic::Ordering;

use tokio::time::sleep;

use super::{
    Cached,
    order::{MARGIN, Scope, micros},
    tier::{Event, Name, SharedTier},
};
use crate::{ctim::Subject, cyberscan::CyberScan, redis_pool::Unavailable};

impl<P: CyberScan, T: SharedTier> Cached<P, T> {
    /// Forgets everything, on every replica.
    ///
    /// # Errors
    /// [`Unavailable`] when the other replicas could not be told yet; this one has forgotten, and tells them later.
    pub async fn purge_all(&self) -> Result<(), Unavailable> {
        self.purge(Scope::All).await
    }

    /// Forgets what is kept for one tenant, on every replica; `label` is the tenant's name in logs.
    ///
    /// # Errors
    /// [`Unavailable`] when the other replicas could not be told yet; this one has forgotten, and tells them later.
    pub async fn purge_label(&self, label: Name) -> Result<(), Unavailable> {
        self.purge(Scope::Tenant(label)).await
    }

    /// Forgets what is kept about one observable for whichever tenant, on every replica.
    ///
    /// # Errors
    /// [`Unavailable`] when the other replicas could not be told yet; this one has forgotten, and tells them later.
    pub async fn purge_subject(&self, subject: &Subject) -> Result<(), Unavailable> {
        self.purge(self.order().about(&subject.to_string())).await
    }

    /// Ends when what is fetched from now on is newer than the purge, by whichever replica's clock.
    pub(super) async fn purge(&self, scope: Scope) -> Result<(), Unavailable> {
        let version = self.order().clock().now().saturating_add(if self.0.shared.is_some() {
            micros(MARGIN)
        } else {
            0
        });
        let told = self.forget(scope, version).await;
        while self.order().clock().now() <= version {
            sleep(MARGIN / 10).await;
        }
        told
    }

    /// Nothing of `scope` up to `version` is served from now on, here and where it can be told.
    pub(super) async fn forget(&self, scope: Scope, version: u64) -> Result<(), Unavailable> {
        self.order().purge(scope, version);
        self.make_room(scope, version);
        match &self.0.shared {
            Some(shared) => shared.tell(scope).await,
            None => Ok(()),
        }
    }

    pub(super) fn hear(&self, event: Event) {
        match event {
            Event::Stored { name, version } => {
                // The next read adopts the newer value, if it can be had then.
                if let Some(kept) = self.0.memory.get(&name).filter(|kept| kept.version < version) {
                    kept.reads.superseded.store(true, Ordering::Relaxed);
                }
            }
            Event::Purged { scope, version } => self.make_room(scope, version),
        }
    }

    /// What was purged is served no more, and need not take up memory. Of wide purges that is worth a look at all there is;
    /// the rest goes as it would have gone.
    fn make_room(&self, scope: Scope, version: u64) {
        if scope == Scope::All {
            // Fails only where such predicates are not supported; the cache was built with them.
            let _ = self.0.memory.invalidate_entries_if(move |_, kept| kept.version <= version);
        }
    }
}
