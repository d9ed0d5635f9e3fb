//! The `Cached` stage: answers from memory, from Redis, or from the next stage, each asked once. It
//! owns when an answer is served, renewed and forgotten; it must not know HTTP, sightings or how
//! CyberScan is asked.
//!
//! | found | answer |
//! |---|---|
//! | fresh | at once |
//! | fresh, near its end | at once; renewed in the background |
//! | stale, within `stale_while_revalidate` | at once; renewed in the background |
//! | stale, within `stale_if_error` | the next stage's; if that fails or takes long, the stale one with its age |
//! | nothing | the next stage's, asked once by all who wait, in all replicas |
//!
//! Errors are never kept as answers. A failed question is not asked again before a short, growing
//! pause has passed; until then its failure is the answer.

mod acceptance;
mod ahead;
mod entry;
mod fill;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod kinds;
pub mod order;
pub mod policy;
mod purge;
pub mod reads;
pub mod redis;
#[cfg(test)]
mod tests;
pub mod tier;

use std::{
    net::IpAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use moka::{Expiry, sync::Cache};
use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::ahead::{Renewed, lead};
use self::{
    acceptance::Accepted,
    entry::{Codec, Entry, Kept},
    fill::{Failure, Filled, outcome, traced},
    kinds::Kind,
    order::Order,
    policy::{Freshness, Policy},
    reads::{Note, Notes},
    redis::RedisTier,
    tier::{Key, Name, SharedTier},
};
use crate::{
    ctim::{DomainName, Subject},
    cyberscan::{
        Answer, Call, CyberScan, DomainRecord, Error, HostRecord, Preload, Record, RecordType,
        Vulnerabilities, Wanted, tick,
    },
    flight::Flights,
    live::Live,
    metrics::{Metrics, Outcome, Tier},
    tenant::TenantId,
};

/// Settings `cache.*` and `auth.revalidate`.
#[derive(Clone, Debug)]
pub struct Config {
    /// `cache.memory`: bytes of answers in memory.
    pub memory: u64,
    /// How long domain records are good.
    pub domain: Policy,
    /// How long address records are good.
    pub host: Policy,
    /// How long vulnerabilities are good.
    pub vulnerabilities: Policy,
    /// `cache.soft_timeout`: how long an answer that may be served stale is waited for.
    pub soft_timeout: Duration,
    /// `cache.fill_timeout`: how long a question is pursued, whoever still waits.
    pub fill_timeout: Duration,
    /// `auth.revalidate`: how long a key counts as accepted.
    pub revalidate: Duration,
    /// `redis.encryption_key`: the first seals, all open.
    pub encryption_keys: Vec<[u8; 32]>,
}

impl Config {
    /// After how long no answer is of use any more.
    fn longest_life(&self) -> Duration {
        let lives = [&self.domain, &self.host, &self.vulnerabilities].map(Policy::longest);
        lives.into_iter().max().unwrap_or_default()
    }
}

/// How many failed questions are remembered.
const FAILURES: u64 = 10_000;
/// How many tenants are remembered as accepted.
const TENANTS: u64 = 10_000;
/// How long a failure may have been remembered to make the next pause longer.
const REMEMBERED: Duration = Duration::from_secs(60);

/// A stage that answers from memory and Redis before it asks the `next` one; a cheap clone.
pub struct Cached<P, T = RedisTier>(Arc<Inner<P, T>>);

struct Inner<P, T> {
    next: P,
    config: Live<Config>,
    memory: Cache<Name, Kept>,
    shared: Option<T>,
    /// Where there is no Redis.
    local_order: Order,
    codec: Live<Codec>,
    flights: Flights<Name, Result<Filled, Error>>,
    /// Fills nobody waits for; what fails there is nobody's failure.
    prefetches: Flights<Name, Result<Filled, Error>>,
    /// Where reads are noted, if somebody wants to know.
    notes: OnceLock<Notes>,
    failures: Cache<Name, Failure>,
    /// When CyberScan last accepted a tenant's key.
    accepted: Cache<TenantId, Accepted>,
    authentications: Flights<TenantId, Result<Instant, Error>>,
    refused: Cache<TenantId, Failure>,
    /// No acceptance of a tenant up to this version counts: its data was refused since.
    suspected: Cache<TenantId, u64>,
    tasks: TaskTracker,
    metrics: Metrics,
}

impl<P, T> Clone for Cached<P, T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// Takes an answer out of memory when nothing of it is of use any more.
struct Life(Live<Config>);

impl Expiry<Name, Kept> for Life {
    fn expire_after_create(&self, _: &Name, kept: &Kept, _: std::time::Instant) -> Option<Duration> {
        let config = self.0.get();
        let policy = match kept.record_type {
            RecordType::Domain => &config.domain,
            RecordType::Host => &config.host,
            RecordType::Vulnerabilities => &config.vulnerabilities,
        };
        Some(policy.life(kept.lifetime).saturating_sub(kept.born.elapsed()))
    }

    fn expire_after_update(
        &self,
        name: &Name,
        kept: &Kept,
        now: std::time::Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        self.expire_after_create(name, kept, now)
    }
}

impl<P: CyberScan, T: SharedTier> Cached<P, T> {
    /// A stage in front of `next`; `shared` is what replicas share, if they share anything. Its tasks are
    /// tracked by `tasks` and end with `shutdown`.
    #[must_use]
    pub fn new(
        next: P,
        config: Config,
        shared: Option<T>,
        metrics: Metrics,
        tasks: TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        let live = Live::new(config.clone());
        let this = Self(Arc::new(Inner {
            memory: Cache::builder()
                .max_capacity(config.memory)
                .weigher(|_, kept: &Kept| kept.weight)
                .expire_after(Life(live.clone()))
                .support_invalidation_closures()
                .build(),
            codec: Live::new(Codec::new(&config.encryption_keys)),
            shared,
            local_order: Order::default(),
            flights: Flights::new(tasks.clone()),
            prefetches: Flights::new(tasks.clone()),
            notes: OnceLock::new(),
            failures: Cache::builder().max_capacity(FAILURES).time_to_live(REMEMBERED).build(),
            accepted: Cache::builder().max_capacity(TENANTS).build(),
            authentications: Flights::new(tasks.clone()),
            refused: Cache::builder().max_capacity(TENANTS).time_to_live(REMEMBERED).build(),
            suspected: Cache::builder().max_capacity(TENANTS).time_to_live(acceptance::SUSPECTED).build(),
            next,
            config: live,
            tasks: tasks.clone(),
            metrics,
        }));
        this.order().seal_with(&config.encryption_keys);
        if let Some(shared) = this.0.shared.clone() {
            let hearing = this.clone();
            tasks.spawn(shared.follow(shutdown, move |event| hearing.hear(event)));
        }
        this
    }

    /// Keeps, seals and serves as `config` says from now on. What memory has stays, and is fresh for no longer than it says;
    /// how much memory may have does not change.
    pub fn reconfigure(&self, config: Config) {
        let memory = self.0.config.get().memory;
        self.0.codec.set(Codec::new(&config.encryption_keys));
        self.order().seal_with(&config.encryption_keys);
        self.0.config.set(Config { memory, ..config });
    }

    /// What is read from now on.
    #[must_use]
    pub fn notes(&self) -> Notes {
        self.0.notes.get_or_init(Notes::default).clone()
    }

    /// An answer as the table above says.
    async fn look_up<K: Kind>(&self, call: &Call, subject: &K::Subject) -> Result<Answer<K>, Error> {
        let key = Key::new(&call.tenant, K::TYPE, subject.to_string());
        let mut there = self.in_memory::<K>(&key);
        if there.as_ref().is_some_and(|(kept, _)| kept.reads.superseded.load(Ordering::Relaxed)) {
            Box::pin(self.bring(vec![key.clone()], false)).await;
            there = self.in_memory::<K>(&key);
        }
        let (mut kept, freshness, mut source) = match there {
            Some((kept, freshness)) => {
                let source = self.count_memory::<K>(call, &kept, freshness);
                (kept, freshness, source)
            }
            None => {
                self.count::<K>(Tier::Memory, Outcome::Miss);
                let filled = traced::<K>(self.fill_by::<K>(&key, call, subject, 0, call.deadline));
                // Boxed: most look-ups are answered by memory and are not to carry the room for this about.
                let filled = Box::pin(filled).await.inspect_err(|_| tick(&call.tally.failed))?;
                if !filled.adopted {
                    tick(&call.tally.upstream);
                    self.note::<K>(call, &key, subject, &filled.kept);
                    return filled.kept.answer();
                }
                let freshness = self.freshness::<K>(&filled.kept);
                (filled.kept, freshness, &call.tally.redis)
            }
        };
        self.note::<K>(call, &key, subject, &kept);
        match freshness {
            Freshness::Fresh => {}
            Freshness::Due if kept.cared_for() => {}
            Freshness::Due | Freshness::Revalidate => self.renew::<K>(&key, call, subject, kept.version),
            Freshness::IfError | Freshness::Dead => {
                let soft = call.deadline.min(Instant::now() + self.0.config.get().soft_timeout);
                let filled = traced::<K>(self.fill_by::<K>(&key, call, subject, kept.version, soft));
                let mut filled = Box::pin(filled).await;
                // What another replica had may be as old; then CyberScan is asked.
                if let Ok(other) = &filled
                    && other.adopted
                    && matches!(self.freshness::<K>(&other.kept), Freshness::IfError | Freshness::Dead)
                {
                    (kept, source) = (other.kept.clone(), &call.tally.redis);
                    let newer = traced::<K>(self.fill_by::<K>(&key, call, subject, kept.version, soft));
                    filled = Box::pin(newer).await;
                }
                match filled {
                    Ok(filled) => {
                        tick(if filled.adopted { &call.tally.redis } else { &call.tally.upstream });
                        self.note::<K>(call, &key, subject, &filled.kept);
                        return filled.kept.answer();
                    }
                    // A refused key gets nothing, however old.
                    Err(Error::Unauthorized) => {
                        tick(&call.tally.failed);
                        return Err(Error::Unauthorized);
                    }
                    Err(_) => {
                        tick(source);
                        tick(&call.tally.stale);
                        let answer: Answer<K> = kept.answer()?;
                        return Ok(Answer { stale: Some(kept.age()), ..answer });
                    }
                }
            }
        }
        tick(source);
        kept.answer()
    }

    /// Notes that an answer was read. One that is "not known" ends soon, and is not worth a note.
    fn note<K: Kind>(&self, call: &Call, key: &Key, subject: &K::Subject, kept: &Kept) {
        let Some(notes) = self.0.notes.get() else { return };
        if kept.lifetime.negative {
            return;
        }
        notes.read(&kept.reads, |reads| Note {
            tenant: Arc::clone(&call.tenant),
            key: key.clone(),
            subject: K::subject(subject),
            address: kept.entry::<K>().and_then(|entry| entry.record?.address()),
            expires_in: kept.lifetime.fresh.saturating_sub(kept.age()),
            life: kept.lifetime.fresh,
            filled: reads.filled.swap(false, Ordering::Relaxed),
            reads,
        });
    }

    /// What memory has under `key`, unless it is as good as nothing.
    fn in_memory<K: Kind>(&self, key: &Key) -> Option<(Kept, Freshness)> {
        let kept = self.0.memory.get(&key.name)?;
        if kept.version <= self.order().purged_before(key) {
            return None;
        }
        let freshness = self.freshness::<K>(&kept);
        (freshness != Freshness::Dead).then_some((kept, freshness))
    }

    fn newer_in_memory<K: Kind>(&self, key: &Key, version: u64) -> Option<Kept> {
        let (kept, _) = self.in_memory::<K>(key)?;
        (kept.version > version).then_some(kept)
    }

    fn freshness<K: Kind>(&self, kept: &Kept) -> Freshness {
        K::policy(&self.0.config.get()).freshness(kept.lifetime, kept.age())
    }

    /// What was purged, and the clock of it.
    fn order(&self) -> &Order {
        self.0.shared.as_ref().map_or(&self.0.local_order, SharedTier::order)
    }

    /// Brings the gauges of memory up to date.
    pub fn measure(&self) {
        let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.0.memory.run_pending_tasks();
        self.0.metrics.cache_entries.set((), whole(self.0.memory.entry_count()));
        self.0.metrics.cache_bytes.set((), whole(self.0.memory.weighted_size()));
        self.0.metrics.cache_capacity.set((), whole(self.0.config.get().memory));
    }

    /// Counts a look-up that memory can answer, unless the answer has only just been brought there for it: then it has
    /// been counted where it came from. Returns what to tick in the request's tally if this is what it is answered with.
    fn count_memory<'a, K: Kind>(&self, call: &'a Call, kept: &Kept, freshness: Freshness) -> &'a AtomicU32 {
        if kept.reads.unread.swap(false, Ordering::Relaxed) {
            return &call.tally.redis;
        }
        self.count::<K>(Tier::Memory, outcome(freshness, kept.lifetime.negative));
        &call.tally.memory
    }

    fn count<K: Kind>(&self, tier: Tier, outcome: Outcome) {
        self.0.metrics.cache_lookups.inc((K::TYPE.label(), tier, outcome));
    }
}

impl Kept {
    fn age(&self) -> Duration {
        self.born.elapsed()
    }

    /// Whether somebody will renew it in time; not any more once that time has passed.
    fn cared_for(&self) -> bool {
        self.reads.cared_for() && self.age() + lead(self.lifetime.fresh) / 2 < self.lifetime.fresh
    }

    fn answer<T: Send + Sync + 'static>(&self) -> Result<Answer<T>, Error> {
        let entry: Entry<T> = self.entry().ok_or(Error::Lost)?;
        let record = entry.record.map_or(Record::Unknown, Record::Known);
        Ok(Answer { record, asked_at: entry.asked_at, stale: None })
    }
}

impl<P: CyberScan, T: SharedTier> CyberScan for Cached<P, T> {
    async fn authenticate(&self, call: &Call) -> Result<Instant, Error> {
        self.accept(call).await
    }

    async fn domain(&self, call: &Call, domain: &DomainName) -> Result<Answer<DomainRecord>, Error> {
        self.look_up(call, domain).await
    }

    async fn host(&self, call: &Call, ip: IpAddr) -> Result<Answer<HostRecord>, Error> {
        self.look_up(call, &ip).await
    }

    async fn vulnerabilities(&self, call: &Call, ip: IpAddr) -> Result<Answer<Vulnerabilities>, Error> {
        self.look_up(call, &ip).await
    }
}

impl<P: CyberScan, T: SharedTier> Preload for Cached<P, T> {
    /// One round trip to Redis for all of a request, two where domains lead to addresses.
    async fn preload(&self, call: &Call, subjects: &[Subject], wanted: Wanted) {
        if self.0.shared.is_none() {
            return;
        }
        let key =
            |record_type, subject: &dyn ToString| Key::new(&call.tenant, record_type, subject.to_string());
        let mut first = Vec::with_capacity(subjects.len());
        for subject in subjects {
            match subject {
                Subject::Domain(domain) => first.push(key(RecordType::Domain, domain)),
                Subject::Ip(ip) => {
                    first.extend(wanted.vulnerabilities.then(|| key(RecordType::Vulnerabilities, ip)));
                    first.extend(wanted.hosts.then(|| key(RecordType::Host, ip)));
                }
            }
        }
        Box::pin(self.read_ahead(first)).await;
        if wanted.vulnerabilities {
            let addresses = subjects.iter().filter_map(|subject| match subject {
                Subject::Domain(domain) => {
                    let (kept, _) = self.in_memory::<DomainRecord>(&key(RecordType::Domain, domain))?;
                    Some(key(RecordType::Vulnerabilities, &kept.entry::<DomainRecord>()?.record?.ip?))
                }
                Subject::Ip(_) => None,
            });
            Box::pin(self.read_ahead(addresses.collect())).await;
        }
    }
}
