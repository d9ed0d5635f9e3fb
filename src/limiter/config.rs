//! The settings of the limiter.

use std::collections::BTreeMap;

use super::{account::Terms, window::Window};

/// Settings `limiter.*`.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// `limiter.tenant`: quotas of each tenant.
    pub tenant: Vec<Window>,
    /// `limiter.tenants`: quotas of single tenants in their place, by the tenant's name in logs.
    pub tenants: BTreeMap<String, Vec<Window>>,
    /// `limiter.fleet`: quotas of all tenants together.
    pub fleet: Vec<Window>,
    /// `limiter.burst`: the share of a window of up to a minute that may be called at once, after rest.
    pub burst: f64,
    /// `limiter.dry_run`: quotas refuse nothing; what they would have refused is counted.
    pub dry_run: bool,
    /// `limiter.fallback_share`: the share of a quota that each replica keeps to while Redis is away.
    pub fallback_share: f64,
    /// `limiter.reserve`: the share of a quota that prefetching leaves to interactive calls.
    pub reserve: f64,
    /// `limiter.queue`: calls of one tenant that may wait.
    pub queue: usize,
    /// `limiter.concurrency`: calls of one tenant under way at once, on this replica.
    pub concurrency: usize,
}

impl Config {
    pub(super) fn terms(&self) -> Terms {
        Terms { burst: self.burst, fallback_share: self.fallback_share, reserve: self.reserve }
    }

    /// Whether there are quotas at all.
    pub(super) fn counts(&self) -> bool {
        ![&self.tenant, &self.fleet].into_iter().chain(self.tenants.values()).all(Vec::is_empty)
    }

    /// The windows of the tenant of that name.
    pub(super) fn windows_of(&self, tenant: &str) -> &[Window] {
        self.tenants.get(tenant).unwrap_or(&self.tenant)
    }
}
