//! What a queue asks for calls: the port, and how a tenant's windows and the fleet's come together in it. It must
//! not know who waits, nor how windows are counted.

use std::{
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::{account::Account, bucket::Pace, pause::Pauses};
use crate::{cyberscan::Priority, metrics::QuotaScope};

/// Where calls come from.
pub(super) trait Quota: Send + Sync + 'static {
    /// Whose calls they are.
    type Account: Send + Sync + 'static;

    /// Takes as many of `calls` as there are.
    fn take(
        &self,
        account: &Self::Account,
        calls: u32,
        priority: Priority,
    ) -> impl Future<Output = Grant> + Send;

    /// In how long at best there is a call for who has `ahead` others before them.
    fn at_best(&self, account: &Self::Account, ahead: usize) -> Duration;

    /// Whether there is anything to ask for: otherwise calls may be made at any time.
    fn counts(&self, account: &Self::Account) -> bool;

    /// Whether accounts share something, so that they have to take turns.
    fn is_shared(&self) -> bool;

    /// How long CyberScan wants to be left alone.
    fn pause(&self, account: &Self::Account) -> Option<Duration>;
}

/// What asking for calls came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grant {
    /// Calls that may be made now.
    pub(super) calls: u32,
    /// In how long there is one, where there are fewer than were wanted.
    pub(super) wait: Duration,
    /// Whose quota it is that has no more.
    pub(super) scope: QuotaScope,
    /// That is because CyberScan has asked for a pause.
    pub(super) paused: bool,
    /// Another number where Redis, or its memory of the tenant's windows or the fleet's, was lost or found: what was
    /// granted before says nothing about how quickly calls will be granted.
    pub(super) epoch: u64,
}

impl Grant {
    /// All that were wanted.
    pub(super) fn whole(calls: u32) -> Self {
        Self { calls, wait: Duration::ZERO, scope: QuotaScope::Tenant, paused: false, epoch: 0 }
    }
}

/// A tenant's windows, and the fleet's.
pub(super) struct Windows {
    pub(super) fleet: Account,
    lease: Mutex<Lease>,
    pub(super) pauses: Pauses,
    started: Instant,
}

/// Calls of the fleet's windows that no tenant has made yet.
#[derive(Clone, Copy, Default)]
struct Lease {
    calls: u32,
    until: Duration,
}

/// How long the fleet's calls are kept where its windows are long.
const LEASE: Duration = Duration::from_millis(250);

impl Windows {
    pub(super) fn new(fleet: Account, pauses: Pauses) -> Self {
        Self { fleet, lease: Mutex::default(), pauses, started: Instant::now() }
    }

    /// Calls of the fleet's windows: those left over, then others. They are taken in advance, and tenants' windows
    /// need not lie in one place with the fleet's.
    async fn of_fleet(&self, calls: u32, priority: Priority) -> Grant {
        if !self.fleet.counts() {
            return Grant::whole(calls);
        }
        let asked = self.started.elapsed();
        let left_over = {
            let mut lease = self.lease();
            if lease.until <= asked {
                *lease = Lease::default();
            }
            let calls = lease.calls.min(calls);
            lease.calls -= calls;
            calls
        };
        if left_over == calls {
            return Grant::whole(calls);
        }
        let grant = self.fleet.begin(calls - left_over, priority).settle().await;
        Grant { calls: grant.calls + left_over, scope: QuotaScope::Fleet, ..grant }
    }

    /// Keeps calls of the fleet's windows that were taken from `asked` on. A call may not be made much later than it
    /// was granted.
    fn leave(&self, calls: u32, asked: Duration) {
        let spaced = self.fleet.windows().into_iter().filter_map(|window| Pace::of(window, 0.0));
        let life = spaced.map(|pace| Duration::from_nanos(pace.spread)).min().unwrap_or(LEASE);
        let mut lease = self.lease();
        let until = asked + life;
        *lease = Lease {
            calls: lease.calls + calls,
            until: if lease.calls == 0 { until } else { lease.until.min(until) },
        };
    }

    fn lease(&self) -> MutexGuard<'_, Lease> {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls that the tenant's windows and the fleet's allow.
    async fn of_all_windows(&self, tenant: &Account, calls: u32, priority: Priority) -> Grant {
        if let Some(wait) = self.pauses.left(tenant.name()) {
            return Grant { calls: 0, wait, paused: true, ..Grant::whole(0) };
        }
        // This replica's buckets and its own calls first: what they refuse costs nobody a round trip.
        let mut own = tenant.begin(calls, priority);
        if own.calls() == 0 {
            return Grant { wait: own.wait(), ..Grant::whole(0) };
        }
        let asked = self.started.elapsed();
        let fleet = self.of_fleet(own.calls(), priority).await;
        if self.fleet.is_without_redis() {
            // Its time without Redis begins now, and not when the fleet has a call for it.
            tenant.lose_redis();
        }
        if fleet.calls == 0 {
            return fleet;
        }
        own.keep(fleet.calls);
        let (grant, pause) = own.settle_with_pause().await;
        if self.fleet.counts() && grant.calls < fleet.calls {
            self.leave(fleet.calls - grant.calls, asked);
        }
        if let Some(pause) = pause {
            self.pauses.hear(tenant.name(), pause);
            return Grant { wait: pause, paused: true, ..grant };
        }
        if grant.calls > 0 && fleet.calls < calls {
            Grant { wait: fleet.wait, scope: fleet.scope, ..grant }
        } else {
            grant
        }
    }
}

impl Quota for Arc<Windows> {
    type Account = Account;

    async fn take(&self, tenant: &Account, calls: u32, priority: Priority) -> Grant {
        let grant = self.of_all_windows(tenant, calls, priority).await;
        Grant { epoch: tenant.epoch().wrapping_add(self.fleet.epoch()), ..grant }
    }

    fn at_best(&self, tenant: &Account, ahead: usize) -> Duration {
        tenant.at_best(ahead).max(self.fleet.at_best(ahead))
    }

    fn counts(&self, tenant: &Account) -> bool {
        tenant.counts() || self.fleet.counts()
    }

    fn is_shared(&self) -> bool {
        self.fleet.counts()
    }

    fn pause(&self, tenant: &Account) -> Option<Duration> {
        self.pauses.left(tenant.name())
    }
}
