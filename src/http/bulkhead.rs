//! How many requests may be under way: better to refuse a few at once than to keep all waiting. No tenant gets
//! more than three quarters, so that one tenant's storm leaves room for the others.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::tenant::TenantId;

/// Places for requests; a cheap clone.
#[derive(Clone)]
pub(super) struct Bulkhead {
    all: Arc<Semaphore>,
    taken: Arc<Mutex<HashMap<TenantId, usize>>>,
    of_one: usize,
}

/// A place of somebody unknown yet; free again when it is dropped.
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
    bulkhead: Bulkhead,
}

/// A place among those of a tenant; free again when it is dropped.
pub(super) struct TenantPlace {
    tenant: TenantId,
    place: Place,
}

impl Bulkhead {
    pub(super) fn new(places: usize) -> Self {
        Self {
            all: Arc::new(Semaphore::new(places)),
            taken: Arc::default(),
            of_one: (places * 3).div_ceil(4),
        }
    }

    /// A place, if there is one.
    pub(super) fn take(&self) -> Option<Place> {
        let place = Arc::clone(&self.all).try_acquire_owned().ok()?;
        Some(Place { _permit: place, bulkhead: self.clone() })
    }
}

impl Place {
    /// The same place as one of `tenant`, unless it has too many.
    pub(super) fn of(self, tenant: TenantId) -> Option<TenantPlace> {
        {
            let mut taken = self.bulkhead.taken.lock().unwrap_or_else(PoisonError::into_inner);
            let count = taken.entry(tenant).or_insert(0);
            if *count >= self.bulkhead.of_one {
                return None;
            }
            *count += 1;
        }
        Some(TenantPlace { tenant, place: self })
    }
}

impl Drop for TenantPlace {
    fn drop(&mut self) {
        let mut taken = self.place.bulkhead.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.tenant) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenant::{ApiKey, Tenant};

    fn id(key: &str) -> TenantId {
        Tenant::new("api.example.com".parse().unwrap(), ApiKey::new(key.into())).id()
    }

    #[test]
    fn a_tenant_has_three_quarters_at_most_and_leaves_nothing_behind() {
        let bulkhead = Bulkhead::new(8);
        let mut loud: Vec<_> =
            (0..6).map(|_| bulkhead.take().and_then(|place| place.of(id("loud"))).unwrap()).collect();
        assert!(bulkhead.take().unwrap().of(id("loud")).is_none());
        let other = bulkhead.take().unwrap().of(id("other"));
        assert!(other.is_some());
        loud.pop();
        assert!(bulkhead.take().unwrap().of(id("loud")).is_some());
        drop((loud, other));
        assert!(bulkhead.taken.lock().unwrap().is_empty());
        let all: Vec<_> = (0..8).map_while(|_| bulkhead.take()).collect();
        assert_eq!(all.len(), 8);
        assert!(bulkhead.take().is_none());
    }
}
