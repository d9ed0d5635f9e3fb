//! Single flight: while an attempt for a key runs, everyone who asks joins it. It owns the table of
//! running attempts; it must not know what is attempted, nor remember an outcome.
//!
//! An attempt runs in a task of its own, so a caller that leaves never cancels it and those who
//! stay are served. All who joined share its outcome, failures too.

use std::{
    collections::HashMap,
    future::Future,
    hash::Hash,
    sync::{Arc, PoisonError},
};

use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::{
    sync::{Mutex, MutexGuard},
    trace,
};

type Table<K, T> = Mutex<HashMap<K, watch::Receiver<Option<T>>>>;

/// The attempts under way, by key. A cheap clone of one shared table.
pub struct Flights<K, T> {
    table: Arc<Table<K, T>>,
    tasks: TaskTracker,
}

/// The attempt ended without an outcome: its task panicked or the process is shutting down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the attempt ended without an outcome")]
pub struct Lost;

impl<K, T> Clone for Flights<K, T> {
    fn clone(&self) -> Self {
        Self { table: Arc::clone(&self.table), tasks: self.tasks.clone() }
    }
}

impl<K, T> Flights<K, T>
where
    K: Hash + Eq + Clone + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// An empty table whose attempts are tracked by `tasks`.
    #[must_use]
    pub fn new(tasks: TaskTracker) -> Self {
        Self { table: Arc::default(), tasks }
    }

    /// Joins the attempt running for `key`, or starts `attempt` as one, and waits for its outcome.
    ///
    /// # Errors
    /// [`Lost`] when the attempt's task ended without an outcome.
    pub async fn join<F>(&self, key: K, attempt: impl FnOnce() -> F) -> Result<T, Lost>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut outcome = self.start(key, attempt);
        let outcome = outcome.wait_for(Option::is_some).await.map_err(|_| Lost)?;
        outcome.clone().ok_or(Lost)
    }

    /// As [`Flights::join`], without waiting: starts `attempt` unless one is running for `key`.
    pub fn start<F>(&self, key: K, attempt: impl FnOnce() -> F) -> watch::Receiver<Option<T>>
    where
        F: Future<Output = T> + Send + 'static,
    {
        self.start_if(key, || true, attempt).expect("nothing forbids it")
    }

    /// As [`Flights::start`], if none is running and `may` says so; else nothing is started. No attempt for
    /// `key` ends or starts while `may` is asked, which is to be short and must not ask this table anything.
    pub fn start_if<F>(
        &self,
        key: K,
        may: impl FnOnce() -> bool,
        attempt: impl FnOnce() -> F,
    ) -> Option<watch::Receiver<Option<T>>>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut running = lock(&self.table);
        if let Some(outcome) = running.get(&key) {
            return Some(outcome.clone());
        }
        if !may() {
            return None;
        }
        let (sender, outcome) = watch::channel(None);
        running.insert(key.clone(), outcome.clone());
        drop(running);

        let landing = Landing { key, table: Arc::clone(&self.table) };
        let attempt = attempt();
        self.tasks.spawn(trace::inherit(async move {
            // Taken out of the table before the outcome is told, so that whoever acts on a failure
            // starts anew instead of joining what has just failed.
            let value = attempt.await;
            drop(landing);
            sender.send_replace(Some(value));
        }));
        Some(outcome)
    }

    /// The outcome to come of the attempt running for `key`, if there is one.
    #[must_use]
    pub fn running(&self, key: &K) -> Option<watch::Receiver<Option<T>>> {
        lock(&self.table).get(key).cloned()
    }

    /// Whether an attempt for `key` is running.
    #[must_use]
    pub fn is_running(&self, key: &K) -> bool {
        lock(&self.table).contains_key(key)
    }

    /// Attempts running now.
    #[must_use]
    pub fn len(&self) -> usize {
        lock(&self.table).len()
    }

    /// Whether nothing is running.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Takes an attempt out of the table when it ends, however it ends.
struct Landing<K: Hash + Eq, T> {
    key: K,
    table: Arc<Table<K, T>>,
}

impl<K: Hash + Eq, T> Drop for Landing<K, T> {
    fn drop(&mut self) {
        lock(&self.table).remove(&self.key);
    }
}

/// No map operation can panic half-way, so poison is ignored.
fn lock<K, T>(table: &Table<K, T>) -> MutexGuard<'_, HashMap<K, watch::Receiver<Option<T>>>> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::atomic::{AtomicU32, Ordering},
        time::Duration,
    };
    use tokio::time::{sleep, timeout};

    fn flights() -> Flights<&'static str, Result<u32, &'static str>> {
        Flights::new(TaskTracker::new())
    }

    #[tokio::test(start_paused = true)]
    async fn a_thousand_callers_share_one_attempt() {
        let (flights, starts) = (flights(), Arc::new(AtomicU32::new(0)));
        let callers = (0..1000).map(|_| {
            flights.join("key", || {
                let starts = Arc::clone(&starts);
                async move {
                    starts.fetch_add(1, Ordering::Relaxed);
                    sleep(Duration::from_millis(300)).await;
                    Ok(7)
                }
            })
        });
        let outcomes = futures_util::future::join_all(callers).await;
        assert!(outcomes.iter().all(|outcome| *outcome == Ok(Ok(7))));
        assert_eq!(starts.load(Ordering::Relaxed), 1);
        assert!(flights.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn callers_that_leave_do_not_cancel_the_attempt() {
        let flights = flights();
        let slow = || async {
            sleep(Duration::from_millis(300)).await;
            Ok(7)
        };
        let impatient = timeout(Duration::from_millis(200), flights.join("key", slow)).await;
        assert!(impatient.is_err());
        let patient = flights.join("key", || async { Err("a second attempt was started") }).await;
        assert_eq!(patient, Ok(Ok(7)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_reaches_everyone_who_joined_and_the_next_caller_starts_anew() {
        let flights = flights();
        let failing = || async {
            sleep(Duration::from_millis(10)).await;
            Err("down")
        };
        let (one, two) = tokio::join!(flights.join("key", failing), flights.join("key", failing));
        assert_eq!((one, two), (Ok(Err("down")), Ok(Err("down"))));
        assert_eq!(flights.join("key", || async { Ok(1) }).await, Ok(Ok(1)));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_under_way_can_be_seen_until_it_has_ended() {
        let flights = flights();
        let slow = || async {
            sleep(Duration::from_millis(10)).await;
            Ok(7)
        };
        let mut outcome = flights.start("key", slow);
        let mut joined = flights.running(&"key").unwrap();
        assert!(flights.is_running(&"key") && !flights.is_running(&"other"));
        assert!(flights.running(&"other").is_none());
        assert!(flights.clone().is_running(&"key"), "a clone is of the same table");
        assert_eq!((flights.len(), flights.is_empty()), (1, false));
        for outcome in [&mut outcome, &mut joined] {
            assert_eq!(*outcome.wait_for(Option::is_some).await.unwrap(), Some(Ok(7)));
        }
        assert!(flights.running(&"key").is_none() && !flights.is_running(&"key"));
        assert_eq!((flights.len(), flights.is_empty()), (0, true));
    }

    #[tokio::test]
    async fn an_attempt_that_panics_loses_its_callers_but_not_the_key() {
        let flights = flights();
        let lost = flights.join("key", || async { panic!("a bug in the attempt") }).await;
        assert_eq!(lost, Err(Lost));
        assert_eq!(flights.join("key", || async { Ok(1) }).await, Ok(Ok(1)));
    }
}
