//! The pauses CyberScan asks for. It owns how long a tenant's calls stop after a 429; it must not know quotas
//! nor who waits.

use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use moka::{policy::EvictionPolicy, sync::Cache};
use tokio::time::Instant;

/// The pause after a 429 that does not say how long; doubled with each further one.
pub(super) const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);
/// Tenants that are remembered.
const TENANTS: u64 = 10_000;

/// The pauses of tenants, by their names; a cheap clone.
#[derive(Clone)]
pub(super) struct Pauses(Cache<Arc<str>, Arc<Mutex<Pause>>>);

#[derive(Default)]
struct Pause {
    until: Option<Instant>,
    /// 429s in a row.
    strikes: u32,
}

impl Default for Pauses {
    fn default() -> Self {
        Self(Cache::builder().max_capacity(TENANTS).eviction_policy(EvictionPolicy::lru()).build())
    }
}

impl Pauses {
    /// How long CyberScan wants to be left alone by `tenant`.
    pub(super) fn left(&self, tenant: &str) -> Option<Duration> {
        let pause = self.0.get(tenant)?;
        let left = lock(&pause).until?.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// CyberScan answered `tenant`.
    pub(super) fn answered(&self, tenant: &str) {
        if let Some(pause) = self.0.get(tenant) {
            lock(&pause).strikes = 0;
        }
    }

    /// CyberScan answered `tenant` with 429; for how long it is left alone.
    pub(super) fn too_fast(&self, tenant: &Arc<str>, retry_after: Option<Duration>) -> Duration {
        let pause = self.of(tenant);
        let mut pause = lock(&pause);
        // Of calls that were under way together each is told; that is one strike.
        if pause.until.is_none_or(|until| until <= Instant::now()) {
            pause.strikes = pause.strikes.saturating_add(1);
        }
        let growing = FIRST.saturating_mul(1 << pause.strikes.saturating_sub(1).min(6)).min(LONGEST);
        let length = retry_after.unwrap_or(growing);
        pause.extend(length);
        length
    }

    /// Another replica has heard so.
    pub(super) fn hear(&self, tenant: &Arc<str>, length: Duration) {
        lock(&self.of(tenant)).extend(length);
    }

    fn of(&self, tenant: &Arc<str>) -> Arc<Mutex<Pause>> {
        self.0.get_with_by_ref(tenant, Arc::default)
    }
}

impl Pause {
    /// A pause that is already longer stays.
    fn extend(&mut self, length: Duration) {
        let until = Instant::now() + length;
        self.until = Some(self.until.map_or(until, |before| before.max(until)));
    }
}

/// Held for a few assignments; nothing in between can panic, so poison is ignored.
fn lock(pause: &Mutex<Pause>) -> MutexGuard<'_, Pause> {
    pause.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::sleep;

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_kept_to_the_second_and_grows_where_cyberscan_says_nothing() {
        let (pauses, tenant): (_, Arc<str>) = (Pauses::default(), "one".into());
        let seven = Duration::from_secs(7);
        assert_eq!(pauses.too_fast(&tenant, Some(seven)), seven);
        assert_eq!(pauses.left("one"), Some(seven));
        assert_eq!(pauses.left("other"), None);
        pauses.hear(&tenant, Duration::from_secs(2));
        assert_eq!(pauses.left("one"), Some(seven), "a longer one stays");
        sleep(seven).await;
        assert_eq!(pauses.left("one"), None);
        pauses.answered("one");
        let mut lengths = Vec::new();
        for _ in 0..8 {
            lengths.push(pauses.too_fast(&tenant, None).as_secs());
            sleep(pauses.left("one").unwrap()).await;
        }
        assert_eq!(lengths, [1, 2, 4, 8, 16, 32, 60, 60]);
    }

    #[tokio::test(start_paused = true)]
    async fn calls_that_are_refused_together_are_one_strike() {
        let (pauses, tenant): (_, Arc<str>) = (Pauses::default(), "one".into());
        for pause in [1, 2] {
            for _ in 0..16 {
                assert_eq!(pauses.too_fast(&tenant, None).as_secs(), pause);
            }
            sleep(pauses.left("one").unwrap()).await;
        }
    }
}
