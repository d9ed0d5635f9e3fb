//! The tier all replicas share: values, locks, stamps of purges and the event stream in Redis. It owns the keys, the
//! scripts and what is told to other replicas; it must not know what records mean or when they are good.
//!
//! | key | content |
//! |---|---|
//! | `relay:1:{h}:v` | a value; `h` is a 128-bit name that only the tenant's API key could reproduce |
//! | `relay:1:{h}:l` | the lock of whoever fetches it; ends with `+` if somebody waits |
//! | `relay:1:events` | the stream (`events.rs`), a minute of it |
//! | `relay:1:purges` | what was purged when: scopes, sorted by version |
//! | `relay:1:clock` | how far the fleet's clock is ahead of Redis's own |
//!
//! `relay:` is `redis.key_prefix`.
//!
//! The braces keep a value and its lock on one node of a cluster. Values and locks carry a time to live; the others do
//! not, so that memory pressure (`volatile-*`) never takes them.

mod events;
mod follow;
mod pending;

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use deadpool_redis::redis::{self, Script, cmd};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::info;

use self::{events::Teller, pending::Pending};
use super::{
    entry::version_text,
    order::{Order, Scope, micros},
    tier::{Claim, Event, Name, SharedTier, Told, Write},
};
use crate::{
    cyberscan::Error,
    metrics::Operation,
    redis_pool::{Link, Redis, Unavailable},
    tenant::hex,
};

/// How often writes that failed are tried again.
const RETRY: Duration = Duration::from_millis(300);
/// How often a Redis nobody uses is asked whether it is there.
const PROBE: Duration = Duration::from_secs(2);
/// What Redis has is used no longer than this after the last word of the other replicas.
const HEARD: Duration = Duration::from_secs(5);

/// The tier in Redis; a cheap clone.
#[derive(Clone)]
pub struct RedisTier(Arc<Inner>);

struct Inner {
    redis: Redis,
    teller: Teller,
    /// The key of what was purged when.
    purges: String,
    /// The key of what the fleet's clock is kept by.
    shown: String,
    fills: AtomicU64,
    order: Order,
    /// When this process last heard what the others tell, as a version; 0: never.
    heard: AtomicU64,
    /// Who waits for another replica's value.
    waiting: Mutex<HashMap<Name, oneshot::Sender<Told>>>,
    /// Writes that failed.
    pending: Mutex<Pending>,
    claim: Script,
    store: Script,
    release: Script,
    stamp: Script,
    clock: Script,
    /// Who is told of the pauses other replicas were asked for.
    paused: OnceLock<HearPause>,
}

/// A tenant's name in logs, and how long its calls are to pause.
type HearPause = Box<dyn Fn(&Arc<str>, Duration) + Send + Sync>;

impl RedisTier {
    /// The tier that `redis` leads to.
    #[must_use]
    pub fn new(redis: Redis) -> Self {
        let replica = uuid::Uuid::new_v4().simple().to_string();
        Self(Arc::new(Inner {
            teller: Teller { stream: redis.key("events"), replica },
            purges: redis.key("purges"),
            shown: redis.key("clock"),
            redis,
            fills: AtomicU64::new(0),
            order: Order::default(),
            heard: AtomicU64::new(0),
            waiting: Mutex::default(),
            pending: Mutex::default(),
            claim: Script::new(include_str!("claim.lua")),
            store: Script::new(include_str!("store.lua")),
            release: Script::new(include_str!("release.lua")),
            stamp: Script::new(include_str!("stamp.lua")),
            clock: Script::new(include_str!("clock.lua")),
            paused: OnceLock::new(),
        }))
    }

    /// Waits until what Redis has can be used, at most `longest`.
    pub async fn connected(&self, longest: Duration) {
        let connecting = async {
            while !self.hears() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        let _ = timeout(longest, connecting).await;
    }

    /// Has `hear` told of every pause another replica announces.
    pub fn hear_pauses(&self, hear: impl Fn(&Arc<str>, Duration) + Send + Sync + 'static) {
        let _ = self.0.paused.set(Box::new(hear));
    }

    /// Tells all replicas that the tenant of that name has been asked to pause. Who is cut off meanwhile will be asked
    /// themselves.
    pub async fn announce_pause(&self, tenant: &str, pause: Duration) {
        let clock = self.0.order.clock();
        if let Some(until) = clock.shared(clock.now().saturating_add(micros(pause))) {
            let _ = self.announce(self.0.teller.event("pause", tenant, until)).await;
        }
    }

    fn value_key(&self, name: &Name) -> String {
        self.0.redis.key(&format!("{{{}}}:v", hex(*name)))
    }

    fn lock_key(&self, name: &Name) -> String {
        self.0.redis.key(&format!("{{{}}}:l", hex(*name)))
    }

    /// The others have been heard just now.
    fn heard(&self) {
        self.0.heard.store(self.0.order.clock().now(), Ordering::Relaxed);
    }

    /// Whether this process knows what the others have purged.
    fn hears(&self) -> bool {
        let heard = self.0.heard.load(Ordering::Relaxed);
        heard > 0 && self.0.order.clock().age(heard) < HEARD
    }

    async fn announce(&self, event: redis::Cmd) -> Result<(), Unavailable> {
        let telling = |mut link: Link| async move { event.query_async::<String>(&mut link).await };
        self.0.redis.run(Operation::Events, telling).await.map(drop)
    }

    async fn write(&self, write: &Write) -> Result<(), Unavailable> {
        let clock = self.0.order.clock();
        let (Some(version), Some(horizon)) = (clock.shared(write.version), clock.horizon()) else {
            return Err(Unavailable);
        };
        let life = write.until.saturating_duration_since(Instant::now());
        let value = if life.is_zero() { None } else { (write.value.0)(version) };
        let Some(value) = value else {
            // Whoever waits for it elsewhere asks again.
            if let Some(owner) = &write.owner {
                self.release(write.name, owner.clone(), &Error::Lost).await;
            }
            return Ok(());
        };
        let mut invocation = self.0.store.key(self.value_key(&write.name));
        invocation.key(self.lock_key(&write.name)).arg(write.owner.as_deref().unwrap_or_default());
        invocation.arg(version_text(version)).arg(value).arg(millis(life)).arg(version_text(horizon));
        let told = self.0.teller.event("set", &hex(write.name), version);
        let writing = |mut link: Link| async move {
            if invocation.invoke_async::<u8>(&mut link).await? == 1 {
                told.query_async::<String>(&mut link).await?;
            }
            Ok(())
        };
        self.0.redis.run(Operation::Store, writing).await
    }

    /// Writes what could not be written before, one after the other and up to the first that fails: a Redis
    /// that comes back is not to be overrun, and one that does not costs one attempt.
    async fn keep_writing(&self) -> Infallible {
        loop {
            sleep(RETRY).await;
            if !self.hears() {
                continue;
            }
            let waiting = lock(&self.0.pending).take();
            let (count, mut failed) = (waiting.len(), false);
            for write in waiting {
                failed = failed || self.write(&write).await.is_err();
                if failed {
                    lock(&self.0.pending).add(write);
                }
            }
            if count > 0 && !failed {
                info!(count, "writes that had waited for redis are done");
            }
        }
    }

    /// Also while nobody asks anything it is known whether Redis answers.
    async fn keep_probing(&self) -> Infallible {
        loop {
            let ping = |mut link: Link| async move { cmd("PING").query_async::<String>(&mut link).await };
            let _ = self.0.redis.run(Operation::Probe, ping).await;
            sleep(PROBE).await;
        }
    }
}

impl SharedTier for RedisTier {
    fn order(&self) -> &Order {
        &self.0.order
    }

    async fn read(&self, names: &[Name]) -> Result<Vec<Option<Vec<u8>>>, Unavailable> {
        if !self.hears() {
            return Err(Unavailable);
        }
        let mut read = cmd("MGET");
        for name in names {
            read.arg(self.value_key(name));
        }
        self.0.redis.run(Operation::Read, |mut link| async move { read.query_async(&mut link).await }).await
    }

    async fn claim(&self, name: Name, version: u64, lease: Duration) -> Result<Claim, Unavailable> {
        let clock = self.0.order.clock();
        let (true, Some(version), Some(horizon)) = (self.hears(), clock.shared(version), clock.horizon())
        else {
            return Err(Unavailable);
        };
        // Registered first, so that whatever is told after the look is heard.
        let (teller, told) = oneshot::channel();
        lock(&self.0.waiting).insert(name, teller);
        let owner = format!("{}-{}", self.0.teller.replica, self.0.fills.fetch_add(1, Ordering::Relaxed));
        let mut invocation = self.0.claim.key(self.value_key(&name));
        invocation.key(self.lock_key(&name)).arg(&owner).arg(millis(lease));
        invocation.arg(version_text(version)).arg(version_text(horizon));
        let claiming = |mut link: Link| async move { invocation.invoke_async(&mut link).await };
        let outcome: Result<(u8, Vec<u8>), Unavailable> = self.0.redis.run(Operation::Claim, claiming).await;
        let claim = match outcome {
            Ok((1, value)) => Ok(Claim::Value(value)),
            Ok((2, _)) => Ok(Claim::Leader(owner)),
            Ok(_) => return Ok(Claim::Follower(told)),
            // It may have been granted all the same: then it is given back, or ends with the value.
            Err(Unavailable) => Ok(Claim::Leader(owner)),
        };
        lock(&self.0.waiting).remove(&name);
        claim
    }

    async fn store(&self, write: Write) {
        if self.write(&write).await.is_err() {
            lock(&self.0.pending).add(write);
        }
    }

    async fn release(&self, name: Name, owner: String, error: &Error) {
        let mut invocation = self.0.release.key(self.lock_key(&name));
        invocation.arg(owner);
        let told = self.0.teller.failed(name, error);
        let releasing = |mut link: Link| async move {
            let waited = invocation.invoke_async::<u8>(&mut link).await? == 1;
            if let (true, Some(told)) = (waited, told) {
                told.query_async::<String>(&mut link).await?;
            }
            Ok(())
        };
        let _ = self.0.redis.run(Operation::Release, releasing).await;
    }

    async fn tell(&self, scope: Scope) -> Result<(), Unavailable> {
        // Who does not hear the others may not know what the fleet's clock shows.
        let telling = self.0.order.telling(scope).filter(|_| self.hears()).ok_or(Unavailable)?;
        let invocation = self.stamping(&[telling]);
        let told = self.0.teller.event("purge", &scope.text(), telling.shared);
        let tell = |mut link: Link| async move {
            let _: i64 = invocation.invoke_async(&mut link).await?;
            told.query_async::<String>(&mut link).await
        };
        self.0.redis.run(Operation::Events, tell).await?;
        self.0.order.told(&[telling]);
        Ok(())
    }

    async fn follow(self, shutdown: CancellationToken, hear: impl Fn(Event) + Send + Sync + 'static) {
        let all = async {
            tokio::select! {
                never = self.keep_following(&hear) => never,
                never = self.keep_writing() => never,
                never = self.keep_probing() => never,
            }
        };
        let _: Option<Infallible> = Box::pin(shutdown.run_until_cancelled(all)).await;
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).max(1)
}

async fn bounded<T>(
    operation: impl Future<Output = redis::RedisResult<T>>,
    longest: Duration,
) -> redis::RedisResult<T> {
    let late = || redis::RedisError::from((redis::ErrorKind::Io, "no answer in time"));
    timeout(longest, operation).await.unwrap_or_else(|_| Err(late()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_to_live_are_never_nothing() {
        // Redis refuses an expiry of 0.
        assert_eq!([Duration::ZERO, Duration::from_micros(1_900)].map(millis), [1, 1]);
        assert_eq!(millis(Duration::from_secs(2)), 2_000);
    }
}
