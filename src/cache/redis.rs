//! The tier all replicas share: values, locks and the event stream in Redis. It owns the keys, the
//! scripts and what is told to other replicas; it must not know what records mean or when they are
//! good.
//!
//! Keys, `h` being a 128-bit name that only the tenant's API key could reproduce:
//! `relay:1:{h}:v` a value, `relay:1:{h}:l` the lock of whoever fetches it, `relay:1:events` the stream,
//! `relay:1:purged` what was purged when. The braces keep a value and its lock on one node of a
//! cluster. Values and locks carry a time to live; stream and purges do not, so that memory pressure
//! (`volatile-*`) never takes them.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use deadpool_redis::redis::{self, FromRedisValue, Script, Value, cmd};
use tokio::{
    sync::oneshot,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::info;

use super::{
    entry::version_text,
    tier::{Claim, Event, Key, Name, Scope, SharedTier, Told, VersionClock},
};
use crate::{
    chance::chance,
    clock::Clock,
    cyberscan::Error,
    metrics::Operation,
    redis_pool::{Link, Redis, Unavailable},
    tenant::{hex, unhex},
};

const STREAM: &str = "relay:1:events";
const PURGED: &str = "relay:1:purged";
/// Events kept for replicas that were cut off.
const EVENTS: usize = 10_000;
/// How long one blocking read of the stream waits; below the driver's own time-out of 500 ms.
const BLOCK: Duration = Duration::from_millis(300);
/// The longest pause between two attempts to follow the stream.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause that is believed.
const LONGEST_PAUSE_HEARD: Duration = Duration::from_secs(24 * 3600);
/// How long the clocks may run before they are compared again.
const COMPARE: Duration = Duration::from_secs(10);
/// Writes that wait for Redis to come back, at most.
const PENDING: usize = 1_000;

/// KEYS value, lock; ARGV owner, lease in ms, version a value has to be newer than. What has no version, or is
/// no string at all, is no value: compared as text it could be newer than everything.
const CLAIM: &str = r"
local value = redis.pcall('GET', KEYS[1])
local present = type(value) == 'string' and string.sub(value, 3, 18) or ''
if #present == 16 and not string.find(present, '[^0-9a-f]') and present > ARGV[3] then return {1, value} end
if redis.call('SET', KEYS[2], ARGV[1], 'NX', 'PX', ARGV[2]) then return {2, ''} end
return {3, ''}";

/// KEYS value, lock; ARGV owner, version, value, time to live in ms, a version beyond all that can be.
/// A newer value stays; one that claims to be from the future does not, nor does what is no string.
const STORE: &str = r"
local present = redis.pcall('GETRANGE', KEYS[1], 2, 17)
if type(present) ~= 'string' then present = '' end
local newer = #present == 16 and not string.find(present, '[^0-9a-f]') and present > ARGV[2] and present < ARGV[5]
if not newer then redis.call('SET', KEYS[1], ARGV[3], 'PX', ARGV[4]) end
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
return newer and 0 or 1";

/// KEYS lock; ARGV owner.
const RELEASE: &str =
    r"if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0";

/// The tier in Redis; a cheap clone.
#[derive(Clone)]
pub struct RedisTier(Arc<Inner>);

struct Inner {
    redis: Redis,
    /// This process, among all that share the Redis.
    replica: String,
    fills: AtomicU64,
    clock: VersionClock,
    /// Who waits for another replica's value.
    waiting: Mutex<HashMap<[u8; 16], oneshot::Sender<Told>>>,
    /// Writes that failed, newest per key.
    pending: Mutex<HashMap<Name, Pending>>,
    claim: Script,
    store: Script,
    release: Script,
    /// Who is told of the pauses other replicas were asked for.
    paused: OnceLock<HearPause>,
}

/// A tenant's name in logs, and how long its calls are to pause.
type HearPause = Box<dyn Fn(&Arc<str>, Duration) + Send + Sync>;

struct Pending {
    key: Key,
    value: Vec<u8>,
    version: u64,
    /// When the value is of no use any more.
    until: Instant,
}

/// How often a Redis nobody uses is asked whether it is there.
const PROBE: Duration = Duration::from_secs(2);

impl RedisTier {
    /// The tier that `redis` leads to.
    #[must_use]
    pub fn new(redis: Redis, wall: Clock) -> Self {
        Self(Arc::new(Inner {
            redis,
            replica: uuid::Uuid::new_v4().simple().to_string(),
            fills: AtomicU64::new(0),
            clock: VersionClock::new(wall),
            waiting: Mutex::default(),
            pending: Mutex::default(),
            claim: Script::new(CLAIM),
            store: Script::new(STORE),
            release: Script::new(RELEASE),
            paused: OnceLock::new(),
        }))
    }

    async fn write(
        &self,
        key: &Key,
        value: &[u8],
        version: u64,
        life: Duration,
        owner: String,
    ) -> Result<(), Unavailable> {
        let script = &self.0.store;
        let horizon = self.0.clock.now().saturating_add(3_600_000_000);
        let told = self.event("set", &hex(key.name), version);
        self.0
            .redis
            .run(Operation::Store, |mut link| async move {
                let _: u8 = script
                    .key(value_key(&key.name))
                    .key(lock_key(&key.name))
                    .arg(owner)
                    .arg(version_text(version))
                    .arg(value)
                    .arg(millis(life))
                    .arg(version_text(horizon))
                    .invoke_async(&mut link)
                    .await?;
                told.query_async::<String>(&mut link).await
            })
            .await?;
        Ok(())
    }

    /// Keeps a write for later: the newest of its key, and the newest of all.
    fn postpone(&self, write: Pending) {
        let mut pending = lock(&self.0.pending);
        if pending.len() >= PENDING
            && let Some(oldest) = pending.iter().min_by_key(|(_, write)| write.version).map(|(name, _)| *name)
        {
            pending.remove(&oldest);
        }
        if pending.get(&write.key.name).is_none_or(|present| present.version < write.version) {
            pending.insert(write.key.name, write);
        }
    }

    /// Drops the write of an answer that was purged. Of wider purges Redis itself keeps a note, which all heed.
    fn forget_pending(&self, scope: Scope, version: u64) {
        if let Scope::Answer(name) = scope {
            lock(&self.0.pending).retain(|of, write| *of != name || write.version > version);
        }
    }

    /// Has `hear` told of every pause another replica announces.
    pub fn hear_pauses(&self, hear: impl Fn(&Arc<str>, Duration) + Send + Sync + 'static) {
        let _ = self.0.paused.set(Box::new(hear));
    }

    /// Tells all replicas that the tenant of that name has been asked to pause. Who is cut off meanwhile will be asked
    /// themselves.
    pub async fn announce_pause(&self, tenant: &str, pause: Duration) {
        let until =
            self.0.clock.now().saturating_add(u64::try_from(pause.as_micros()).unwrap_or(u64::MAX / 2));
        let told = self.event("pause", tenant, until);
        let telling = self
            .0
            .redis
            .run(Operation::Events, |mut link| async move { told.query_async::<String>(&mut link).await });
        let _ = telling.await;
    }

    fn event(&self, kind: &str, name: &str, number: u64) -> redis::Cmd {
        let mut event = cmd("XADD");
        event.arg(STREAM).arg("MAXLEN").arg("~").arg(EVENTS).arg("*");
        event.arg("o").arg(&self.0.replica).arg("t").arg(kind).arg("k").arg(name).arg("v").arg(number);
        event
    }

    /// Follows the stream on one connection; ends with how long it worked.
    async fn follow_once(
        &self,
        cursor: &mut Option<String>,
        hear: &(impl Fn(Event) + Send),
    ) -> Result<std::convert::Infallible, Duration> {
        let started = Instant::now();
        let lost = |_| started.elapsed();
        let mut link = self.0.redis.own_link().await.map_err(|Unavailable| started.elapsed())?;
        self.compare_clocks(&mut link).await.map_err(lost)?;
        let mut position = self.resume(&mut link, cursor.as_deref(), hear).await.map_err(lost)?;
        *cursor = Some(position.clone());
        let (mut compared, mut written) = (Instant::now(), None);
        loop {
            let mut read = cmd("XREAD");
            read.arg("COUNT")
                .arg(1000)
                .arg("BLOCK")
                .arg(millis(BLOCK))
                .arg("STREAMS")
                .arg(STREAM)
                .arg(&position);
            let batch: Value = bounded(read.query_async(&mut link), BLOCK * 2).await.map_err(lost)?;
            for (id, event) in events(&batch) {
                position = id;
                if let Some((origin, event)) = event.as_ref().and_then(parse)
                    && origin != self.0.replica
                {
                    self.pass_on(event, hear);
                }
            }
            *cursor = Some(position.clone());
            // After what was purged meanwhile has been heard. Also while the stream works: the breaker may have been
            // open when it began to, or only writes may have been refused.
            if written.is_none_or(|last: Instant| last.elapsed() >= BLOCK) {
                self.write_pending().await;
                written = Some(Instant::now());
            }
            if compared.elapsed() >= COMPARE {
                self.compare_clocks(&mut link).await.map_err(lost)?;
                compared = Instant::now();
            }
        }
    }

    /// Where to read on: at the end on a first connection; else after the last event heard, unless
    /// events after it are gone.
    async fn resume(
        &self,
        link: &mut Link,
        cursor: Option<&str>,
        hear: &(impl Fn(Event) + Send),
    ) -> redis::RedisResult<String> {
        let edge = async |link: &mut Link, reverse: bool| -> redis::RedisResult<Option<String>> {
            let (command, from, to) = if reverse { ("XREVRANGE", "+", "-") } else { ("XRANGE", "-", "+") };
            let found: Value = bounded(
                cmd(command).arg(STREAM).arg(from).arg(to).arg("COUNT").arg(1).query_async(link),
                LONGEST_PAUSE,
            )
            .await?;
            Ok(entries(&found).into_iter().next().map(|(id, _)| id))
        };
        let (first, last) = (edge(link, false).await?, edge(link, true).await?);
        let purged: HashMap<String, u64> =
            bounded(cmd("HGETALL").arg(PURGED).query_async(link), LONGEST_PAUSE).await?;
        for (name, version) in purged {
            if let Some(scope) = scope_of(&name) {
                hear(Event::Purged { scope, version });
            }
        }
        match cursor {
            None => Ok(last.unwrap_or_else(|| "0-0".to_owned())),
            Some(cursor) => {
                let unbroken = first.is_some_and(|first| stream_id(&first) <= stream_id(cursor));
                if !unbroken && cursor != "0-0" {
                    info!("events were missed; what is in memory is dropped");
                    hear(Event::Missed);
                    return Ok(last.unwrap_or_else(|| "0-0".to_owned()));
                }
                Ok(cursor.to_owned())
            }
        }
    }

    fn pass_on(&self, event: Heard, hear: &impl Fn(Event)) {
        let wake = |name: &[u8; 16], told: Told| {
            if let Some(teller) = lock(&self.0.waiting).remove(name) {
                let _ = teller.send(told);
            }
        };
        match event {
            Heard::Stored { name, version } => {
                hear(Event::Stored { name, version });
                wake(&name, Told::Stored);
            }
            Heard::Failed { name, error } => wake(&name, Told::Failed(error)),
            Heard::Purged { scope, version } => {
                self.forget_pending(scope, version);
                hear(Event::Purged { scope, version });
            }
            Heard::Revoked { tenant, version } => hear(Event::Revoked { tenant, version }),
            Heard::Paused { tenant, until } => {
                let left = Duration::from_micros(until.saturating_sub(self.0.clock.now()));
                if let Some(hear) = self.0.paused.get() {
                    hear(&hex(tenant).into(), left.min(LONGEST_PAUSE_HEARD));
                }
            }
        }
    }

    async fn compare_clocks(&self, link: &mut Link) -> redis::RedisResult<()> {
        let (seconds, micros): (u64, u64) = bounded(cmd("TIME").query_async(link), LONGEST_PAUSE).await?;
        self.0.clock.set(seconds.saturating_mul(1_000_000).saturating_add(micros));
        Ok(())
    }

    /// Writes what could not be written before, one after the other and up to the first that fails: a Redis
    /// that comes back is not to be overrun, and one that does not costs one attempt.
    async fn write_pending(&self) {
        let waiting: Vec<Pending> = lock(&self.0.pending).drain().map(|(_, write)| write).collect();
        if waiting.is_empty() {
            return;
        }
        let (count, mut all_done) = (waiting.len(), true);
        let mut waiting = waiting.into_iter();
        for write in waiting.by_ref() {
            let life = write.until.saturating_duration_since(Instant::now());
            let written = self.write(&write.key, &write.value, write.version, life, String::new());
            if !life.is_zero() && written.await.is_err() {
                self.postpone(write);
                all_done = false;
                break;
            }
        }
        waiting.for_each(|write| self.postpone(write));
        if all_done {
            info!(count, "writes that had waited for redis are done");
        }
    }
}

impl SharedTier for RedisTier {
    fn clock(&self) -> &VersionClock {
        &self.0.clock
    }

    async fn read(&self, keys: &[Key]) -> Result<Vec<Option<Vec<u8>>>, Unavailable> {
        let mut read = cmd("MGET");
        for key in keys {
            read.arg(value_key(&key.name));
        }
        self.0.redis.run(Operation::Read, |mut link| async move { read.query_async(&mut link).await }).await
    }

    async fn claim(&self, key: &Key, version: u64, lease: Duration) -> Result<Claim, Unavailable> {
        // Registered first, so that whatever is told after the look is heard.
        let (teller, told) = oneshot::channel();
        lock(&self.0.waiting).insert(key.name, teller);
        let owner = format!("{}-{}", self.0.replica, self.0.fills.fetch_add(1, Ordering::Relaxed));
        let script = &self.0.claim;
        let owner_arg = owner.clone();
        let outcome: Result<(u8, Vec<u8>), Unavailable> = self
            .0
            .redis
            .run(Operation::Claim, |mut link| async move {
                script
                    .key(value_key(&key.name))
                    .key(lock_key(&key.name))
                    .arg(owner_arg)
                    .arg(millis(lease))
                    .arg(version_text(version))
                    .invoke_async(&mut link)
                    .await
            })
            .await;
        let claim = match outcome {
            Ok((1, value)) => Ok(Claim::Value(value)),
            Ok((2, _)) => Ok(Claim::Leader(owner)),
            Ok(_) => return Ok(Claim::Follower(told)),
            Err(unavailable) => Err(unavailable),
        };
        lock(&self.0.waiting).remove(&key.name);
        claim
    }

    async fn store(&self, key: &Key, value: Vec<u8>, version: u64, life: Duration, owner: Option<String>) {
        let until = Instant::now() + life;
        if self.write(key, &value, version, life, owner.unwrap_or_default()).await.is_err() {
            self.postpone(Pending { key: key.clone(), value, version, until });
        }
    }

    async fn release(&self, key: &Key, owner: String, error: &Error) {
        let script = &self.0.release;
        let mut told = failure_code(error).map(|(code, number)| {
            let mut event = self.event("fail", &hex(key.name), number);
            event.arg("e").arg(code);
            event
        });
        let _ = self
            .0
            .redis
            .run(Operation::Release, |mut link| async move {
                let _: u8 = script.key(lock_key(&key.name)).arg(owner).invoke_async(&mut link).await?;
                match &mut told {
                    Some(told) => told.query_async::<String>(&mut link).await.map(drop),
                    None => Ok(()),
                }
            })
            .await;
    }

    async fn purge(&self, scope: Scope) -> Result<u64, Unavailable> {
        let version = self.0.clock.now();
        self.forget_pending(scope, version);
        let name = scope_text(scope);
        let told = self.event("purge", &name, version);
        self.0
            .redis
            .run(Operation::Events, |mut link| async move {
                let forget = match scope {
                    Scope::Answer(answer) => cmd("DEL").arg(value_key(&answer)).to_owned(),
                    Scope::All | Scope::Tenant(_) => {
                        cmd("HSET").arg(PURGED).arg(name).arg(version).to_owned()
                    }
                };
                let _: i64 = forget.query_async(&mut link).await?;
                told.query_async::<String>(&mut link).await
            })
            .await?;
        Ok(version)
    }

    async fn revoke(&self, tenant: [u8; 16]) {
        let told = self.event("revoke", &hex(tenant), self.0.clock.now());
        let told = self
            .0
            .redis
            .run(Operation::Events, |mut link| async move { told.query_async::<String>(&mut link).await });
        let _ = told.await;
    }

    async fn follow(self, shutdown: CancellationToken, hear: impl Fn(Event) + Send) {
        let mut cursor: Option<String> = None;
        let mut pause = Duration::from_millis(50);
        let following = async {
            loop {
                match self.follow_once(&mut cursor, &hear).await {
                    Ok(never) => match never {},
                    Err(lived) if lived > LONGEST_PAUSE => pause = Duration::from_millis(50),
                    Err(_) => {}
                }
                sleep(pause.mul_f64(0.75 + 0.5 * chance())).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        };
        // Also while nobody asks anything it is known whether Redis answers.
        let probing = async {
            loop {
                let ping = |mut link: Link| async move { cmd("PING").query_async::<String>(&mut link).await };
                let _ = self.0.redis.run(Operation::Probe, ping).await;
                sleep(PROBE).await;
            }
        };
        let both = async {
            tokio::select! {
                never = following => never,
                never = probing => never,
            }
        };
        let _: Option<std::convert::Infallible> = Box::pin(shutdown.run_until_cancelled(both)).await;
    }
}

enum Heard {
    Stored { name: [u8; 16], version: u64 },
    Failed { name: [u8; 16], error: Error },
    Purged { scope: Scope, version: u64 },
    Revoked { tenant: [u8; 16], version: u64 },
    Paused { tenant: [u8; 16], until: u64 },
}

/// The origin and the content of an event.
fn parse(fields: &HashMap<String, String>) -> Option<(&str, Heard)> {
    let text = |name: &str| fields.get(name).map(String::as_str);
    let number: u64 = text("v")?.parse().ok()?;
    let name = text("k")?;
    let heard = match text("t")? {
        "set" => Heard::Stored { name: unhex(name)?, version: number },
        "fail" => Heard::Failed { name: unhex(name)?, error: failure_of(text("e")?, number)? },
        "purge" => Heard::Purged { scope: scope_of(name)?, version: number },
        "revoke" => Heard::Revoked { tenant: unhex(name)?, version: number },
        "pause" => Heard::Paused { tenant: unhex(name)?, until: number },
        _ => return None,
    };
    Some((text("o")?, heard))
}

/// Failures that every replica would meet in the same way. Others, such as no route to the host, each
/// has to find out for itself.
fn failure_code(error: &Error) -> Option<(&'static str, u64)> {
    match error {
        Error::Throttled { retry_after } => Some(("throttled", millis(*retry_after))),
        Error::Unavailable { status } => Some(("unavailable", u64::from(*status))),
        Error::TimedOut { after } => Some(("timed-out", millis(*after))),
        Error::Unexpected { .. } => Some(("unexpected", 0)),
        Error::Unreachable { .. }
        | Error::Untrusted { .. }
        | Error::Unauthorized
        | Error::Resting { .. }
        | Error::Limited { .. }
        | Error::TooLate { .. }
        | Error::Lost => None,
    }
}

fn failure_of(code: &str, number: u64) -> Option<Error> {
    match code {
        "throttled" => Some(Error::Throttled { retry_after: Duration::from_millis(number) }),
        "unavailable" => Some(Error::Unavailable { status: u16::try_from(number).ok()? }),
        "timed-out" => Some(Error::TimedOut { after: Duration::from_millis(number) }),
        "unexpected" => Some(Error::Unexpected { expected: "a record in its format" }),
        _ => None,
    }
}

/// The entries in the answer of XREAD on one stream.
fn events(answer: &Value) -> Vec<(String, Option<HashMap<String, String>>)> {
    // RESP2: [[stream, entries]]; RESP3: {stream: entries}; nothing: nil.
    match answer {
        Value::Array(streams) => match streams.first() {
            Some(Value::Array(stream)) => stream.get(1).map(entries).unwrap_or_default(),
            _ => Vec::new(),
        },
        Value::Map(streams) => streams.first().map(|(_, stream)| entries(stream)).unwrap_or_default(),
        _ => Vec::new(),
    }
}

/// The entries in the answer of XRANGE; what is not in our form has an id only.
fn entries(answer: &Value) -> Vec<(String, Option<HashMap<String, String>>)> {
    let Value::Array(entries) = answer else {
        return Vec::new();
    };
    let entry = |entry: &Value| match entry {
        Value::Array(parts) => {
            let id = String::from_redis_value(parts.first()?.clone()).ok()?;
            Some((id, parts.get(1).and_then(|fields| HashMap::from_redis_value(fields.clone()).ok())))
        }
        _ => None,
    };
    entries.iter().filter_map(entry).collect()
}

/// A stream id as it sorts.
fn stream_id(id: &str) -> (u64, u64) {
    let (millis, sequence) = id.split_once('-').unwrap_or((id, "0"));
    (millis.parse().unwrap_or(0), sequence.parse().unwrap_or(0))
}

fn value_key(name: &Name) -> String {
    format!("relay:1:{{{}}}:v", hex(*name))
}

fn lock_key(name: &Name) -> String {
    format!("relay:1:{{{}}}:l", hex(*name))
}

fn scope_text(scope: Scope) -> String {
    match scope {
        Scope::All => "all".to_owned(),
        Scope::Tenant(name) => hex(name),
        Scope::Answer(name) => format!("answer:{}", hex(name)),
    }
}

fn scope_of(text: &str) -> Option<Scope> {
    match text.strip_prefix("answer:") {
        Some(name) => unhex(name).map(Scope::Answer),
        None if text == "all" => Some(Scope::All),
        None => unhex(text).map(Scope::Tenant),
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
    fn what_is_told_to_other_replicas_is_what_they_hear() {
        let heard = |kind: &str, name: &str, number: u64, code: Option<&str>| {
            let mut fields: HashMap<String, String> =
                [("o", "replica"), ("t", kind), ("k", name)].map(|(k, v)| (k.into(), v.into())).into();
            fields.insert("v".into(), number.to_string());
            fields.extend(code.map(|code| ("e".into(), code.to_owned())));
            parse(&fields).map(|(origin, event)| (origin.to_owned(), event))
        };
        for error in [
            Error::Throttled { retry_after: Duration::from_secs(7) },
            Error::Unavailable { status: 503 },
            Error::TimedOut { after: Duration::from_millis(1_500) },
            Error::Unexpected { expected: "a record in its format" },
        ] {
            let (code, number) = failure_code(&error).unwrap();
            let Some((origin, Heard::Failed { name, error: told })) =
                heard("fail", &hex([0xa7; 16]), number, Some(code))
            else {
                panic!("{code} was not understood")
            };
            assert_eq!((origin.as_str(), name, told), ("replica", [0xa7; 16], error));
        }
        for scope in [Scope::All, Scope::Tenant([0x0f; 16]), Scope::Answer([0xf0; 16])] {
            let Some((_, Heard::Purged { scope: told, version: 9 })) =
                heard("purge", &scope_text(scope), 9, None)
            else {
                panic!("{scope:?} was not understood")
            };
            assert_eq!(told, scope);
        }
        // What each replica has to find out for itself.
        assert_eq!(failure_code(&Error::Unauthorized), None);
        assert_eq!(failure_code(&Error::Lost), None);
        // What a later version, or somebody else, wrote.
        for (kind, name, code) in [
            ("set", "short", None),
            ("set", "+1234567890123456789012345678901", None),
            ("purge", "everything", None),
            ("fail", "00000000000000000000000000000000", Some("bored")),
            ("sing", "00000000000000000000000000000000", None),
        ] {
            assert!(heard(kind, name, 1, code).is_none(), "{kind} {name}");
        }
    }

    #[test]
    fn stream_ids_sort_as_numbers() {
        assert!(stream_id("9-0") < stream_id("10-0"));
        assert!(stream_id("10-9") < stream_id("10-10"));
        assert!(stream_id("10") < stream_id("10-1"));
        assert_eq!(stream_id("10-2"), (10, 2));
    }

    #[test]
    fn times_to_live_are_never_nothing() {
        // Redis refuses an expiry of 0.
        assert_eq!([Duration::ZERO, Duration::from_micros(1_900)].map(millis), [1, 1]);
        assert_eq!(millis(Duration::from_secs(2)), 2_000);
    }

    #[test]
    fn writes_that_wait_are_the_newest_of_their_keys_and_the_newest_of_all() {
        let tier = RedisTier::new(Redis::to("redis://127.0.0.1:1"), Clock::system());
        let write = |number: usize, version: u64| {
            let tenant = crate::tenant::Tenant::new(
                "api.example.com".parse().unwrap(),
                crate::tenant::ApiKey::new("key".into()),
            );
            let key = Key::new(&tenant, crate::cyberscan::RecordType::Host, &number.to_string());
            tier.postpone(Pending { key: key.clone(), value: Vec::new(), version, until: Instant::now() });
            key.name
        };
        let waiting = |name: &Name| lock(&tier.0.pending).get(name).map(|write| write.version);
        let first = write(0, 7);
        write(0, 6);
        assert_eq!(waiting(&first), Some(7), "an older one took its place");
        write(0, 8);
        assert_eq!(waiting(&first), Some(8));
        let all: Vec<Name> = (1..=PENDING).map(|number| write(number, 100 + number as u64)).collect();
        assert_eq!(lock(&tier.0.pending).len(), PENDING);
        assert_eq!(waiting(&first), None, "the oldest did not make room");
        assert!(all.iter().all(|name| waiting(name).is_some()));
        // What is purged is not written later, what was asked since is.
        tier.forget_pending(Scope::Answer(all[0]), 100);
        assert!(waiting(&all[0]).is_some());
        tier.forget_pending(Scope::Answer(all[0]), 101);
        assert_eq!((waiting(&all[0]), waiting(&all[1])), (None, Some(102)));
    }

    #[tokio::test]
    async fn who_was_cut_off_hears_what_was_said_meanwhile_or_that_some_of_it_is_gone() {
        let server = crate::redis_server::RedisServer::start().await;
        let redis = Redis::to(&server.url());
        let tier = || RedisTier::new(redis.clone(), Clock::system());
        let (teller, mut link) = (tier(), redis.own_link().await.unwrap());
        let revoked = |tenant: u8| teller.event("revoke", &hex([tenant; 16]), 0);
        let shutdown = CancellationToken::new();
        let (sender, mut heard) = tokio::sync::mpsc::unbounded_channel();
        let listener = tokio_util::task::TaskTracker::new()
            .spawn(tier().follow(shutdown.clone(), move |event| sender.send(event).unwrap()));
        // The tenant the next event is about; `None` says that events are gone.
        let mut next = async || match timeout(5 * LONGEST_PAUSE, heard.recv()).await.unwrap().unwrap() {
            Event::Revoked { tenant, .. } => Some(tenant[0]),
            Event::Missed => None,
            Event::Purged { scope: Scope::Tenant(tenant), version: 7 } => Some(tenant[0]),
            other => panic!("{other:?}"),
        };
        let listening = async |link: &mut Link| loop {
            let clients: String = cmd("CLIENT").arg("LIST").query_async(link).await.unwrap();
            let reader = clients.lines().find(|client| client.contains("cmd=xread"));
            if let Some((id, _)) = reader.and_then(|reader| reader.strip_prefix("id=")?.split_once(' ')) {
                return id.to_owned();
            }
            sleep(Duration::from_millis(5)).await;
        };
        let mut cut_off = async |meanwhile: &[redis::Cmd]| {
            let mut all = redis::pipe();
            all.atomic().cmd("CLIENT").arg("KILL").arg("ID").arg(listening(&mut link).await);
            for command in meanwhile {
                all.add_command(command.clone());
            }
            all.exec_async(&mut link).await.unwrap();
            listening(&mut link).await;
        };
        let empty = || cmd("XTRIM").arg(STREAM).arg("MAXLEN").arg(0).to_owned();

        // Nobody who has heard nothing yet has missed anything.
        cut_off(&[]).await;
        cut_off(&[revoked(1)]).await;
        assert_eq!(next().await, Some(1));
        // Nothing new, and the last it heard is the oldest there is.
        cut_off(&[]).await;
        cut_off(&[revoked(2), revoked(3)]).await;
        assert_eq!([next().await, next().await], [Some(2), Some(3)]);
        // Of what it has not heard, the first is gone, and with it the last it has heard.
        cut_off(&[revoked(4), empty(), revoked(5)]).await;
        assert_eq!(next().await, None);
        // It goes on from there: what is gone is not told in part.
        cut_off(&[revoked(6)]).await;
        assert_eq!(next().await, Some(6));
        // Purges are heard of even so.
        let purge = cmd("HSET").arg(PURGED).arg(scope_text(Scope::Tenant([8; 16]))).arg(7).to_owned();
        cut_off(&[purge, empty()]).await;
        assert_eq!([next().await, next().await], [Some(8), None]);

        shutdown.cancel();
        listener.await.unwrap();
    }
}
