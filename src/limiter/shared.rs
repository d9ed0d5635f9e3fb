//! The quotas of the whole fleet, in Redis. It owns the keys and the script; it must not know who waits
//! for a call, nor what happens while Redis is away.
//!
//! Windows have no time to live: a Redis that is full makes room with what has one, and a window it forgot would be
//! taken for new. There is one for each quota of each tenant that ever called, of some hundred bytes.

use std::{fmt::Write, time::Duration};

use deadpool_redis::redis::{Script, cmd};

use super::quota::{Window, micros};
use crate::{
    metrics::Operation,
    redis_pool::{Redis, Unavailable},
    tenant::{TenantId, hex},
};

/// Takes calls from windows that all replicas share.
#[derive(Clone)]
pub(super) struct SharedQuota {
    redis: Redis,
    script: Script,
}

/// What a request for calls came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Grant {
    /// Calls that may be made now.
    pub(super) calls: u32,
    /// How long until the next one, if there are none left.
    pub(super) wait: Duration,
    /// CyberScan has asked for a pause.
    pub(super) paused: bool,
    /// The fleet's quota has nothing left, and that is all the tenant waits for.
    pub(super) fleet_exhausted: bool,
    /// Calls used in each window, in the order asked.
    pub(super) used: Vec<u32>,
    /// When each window came into being, on Redis's clock; none if this replica decided alone.
    pub(super) born: Vec<u64>,
}

/// A window, and the calls in it that Redis does not know of.
#[derive(Clone, Debug)]
pub(super) struct Account {
    pub(super) window: Window,
    /// Those made while Redis was away.
    pub(super) meanwhile: u32,
    /// Those it has forgotten with the window that was there before: how many parts ago, and how many.
    pub(super) forgotten: Vec<(u64, u32)>,
}

/// Windows of a tenant, then of the fleet.
pub(super) struct Demand<'a> {
    pub(super) tenant: TenantId,
    pub(super) of_tenant: &'a [Account],
    pub(super) of_fleet: &'a [Account],
    /// Calls wanted.
    pub(super) calls: u32,
    /// The share of each window's ceiling that is to be left over.
    pub(super) leave: f64,
}

impl SharedQuota {
    pub(super) fn new(redis: Redis) -> Self {
        Self { redis, script: Script::new(include_str!("windows.lua")) }
    }

    /// Takes as many of the calls wanted as all windows allow, in one round trip.
    pub(super) async fn take(&self, demand: &Demand<'_>) -> Result<Grant, Unavailable> {
        self.take_at(demand).await.map(|(grant, _)| grant)
    }

    /// As [`SharedQuota::take`], with the time on Redis's clock, microseconds.
    pub(super) async fn take_at(&self, demand: &Demand<'_>) -> Result<(Grant, u64), Unavailable> {
        let tenant = name(demand.tenant);
        let mut invocation = self.script.key(pause_key(&tenant));
        for account in demand.of_tenant {
            invocation.key(format!("relay:1:{{lim}}:{tenant}:{}", account.window.per.as_secs()));
        }
        for account in demand.of_fleet {
            invocation.key(format!("relay:1:{{lim}}:fleet:{}", account.window.per.as_secs()));
        }
        invocation.arg(demand.calls).arg(demand.leave);
        for Account { window, meanwhile, forgotten } in demand.of_tenant.iter().chain(demand.of_fleet) {
            invocation.arg(window.limit.get()).arg(micros(window.per)).arg(*meanwhile);
            invocation.arg(forgotten.iter().fold(String::new(), |mut text, (ago, calls)| {
                let _ = write!(text, "{ago}:{calls} ");
                text
            }));
        }
        let invocation = &invocation;
        let answer: Vec<u64> = self
            .redis
            .run(Operation::Quota, |mut link| async move { invocation.invoke_async(&mut link).await })
            .await?;
        let (&[calls, wait, paused, now], windows) = answer.split_first_chunk().ok_or(Unavailable)?;
        if windows.len() != 3 * (demand.of_tenant.len() + demand.of_fleet.len()) {
            return Err(Unavailable);
        }
        let used_up = |window: &[u64]| window.first() >= window.get(1);
        let (of_tenant, of_fleet) = windows.split_at(3 * demand.of_tenant.len());
        let any_used_up = |windows: &[u64]| windows.chunks(3).any(used_up);
        let grant = Grant {
            fleet_exhausted: paused == 0 && any_used_up(of_fleet) && !any_used_up(of_tenant),
            calls: u32::try_from(calls).unwrap_or(0),
            wait: Duration::from_micros(wait),
            paused: paused == 1,
            used: windows.iter().step_by(3).map(|used| u32::try_from(*used).unwrap_or(u32::MAX)).collect(),
            born: windows.iter().skip(2).step_by(3).copied().collect(),
        };
        Ok((grant, now))
    }

    /// Has all replicas leave the tenant's CyberScan alone for `pause`.
    pub(super) async fn pause(&self, tenant: TenantId, pause: Duration) {
        let key = pause_key(&name(tenant));
        let millis = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX).max(1);
        // A pause that is already longer stays.
        let pausing = self.redis.run(Operation::Quota, |mut link| async move {
            let mut set = cmd("SET");
            set.arg(&key)
                .arg("1")
                .arg("PX")
                .arg(millis)
                .arg("NX")
                .query_async::<Option<String>>(&mut link)
                .await?;
            cmd("PEXPIRE").arg(&key).arg(millis).arg("GT").query_async::<i64>(&mut link).await
        });
        let _ = pausing.await;
    }
}

fn pause_key(tenant: &str) -> String {
    format!("relay:1:{{lim}}:{tenant}:pause")
}

fn name(tenant: TenantId) -> String {
    hex(tenant.derive("limiter", &[]))
}
