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

mod entry;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
pub mod policy;
pub mod reads;
pub mod redis;
pub mod tier;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    future::Future,
    net::IpAddr,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use moka::{Expiry, sync::Cache};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    entry::{Codec, Entry, Kept},
    policy::{Freshness, Policy},
    reads::{Note, Notes},
    redis::RedisTier,
    tier::{Claim, Event, Key, Name, Scope, SharedTier, Told, VersionClock},
};
use crate::{
    chance::chance,
    clock::Clock,
    ctim::{DomainName, Subject},
    cyberscan::{
        Answer, Call, CyberScan, DomainRecord, Error, HostRecord, Preload, Priority, Record, RecordType,
        Vulnerabilities, Wanted, tick,
    },
    flight::Flights,
    live::Live,
    metrics::{Flight, Label, Metrics, Outcome, Tier},
    redis_pool::Unavailable,
    tenant::TenantId,
    trace::{self, Stage},
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

/// The first pause after a failed question; doubled with each further failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// What the allocator adds to a text on the heap.
const BLOCK: usize = 16;
/// How many failed questions are remembered.
const FAILURES: u64 = 10_000;
/// The longest `cache.fill_timeout` there can be.
const LONGEST_FILL: Duration = Duration::from_secs(600);
/// How many tenants are remembered as accepted.
const TENANTS: u64 = 10_000;
/// How often a replica looks again while another fetches, if it is not told.
const FIRST_POLL: Duration = Duration::from_millis(20);
const LONGEST_POLL: Duration = Duration::from_millis(200);

/// A stage that answers from memory and Redis before it asks the `next` one; a cheap clone.
pub struct Cached<P, T = RedisTier>(Arc<Inner<P, T>>);

struct Inner<P, T> {
    next: P,
    config: Live<Config>,
    memory: Cache<Name, Kept>,
    shared: Option<T>,
    /// Versions where there is no Redis.
    local_clock: VersionClock,
    codec: Live<Codec>,
    flights: Flights<Name, Result<Filled, Error>>,
    /// Fills nobody waits for; what fails there is nobody's failure.
    prefetches: Flights<Name, Result<Filled, Error>>,
    /// Where reads are noted, if somebody wants to know.
    notes: OnceLock<Notes>,
    failures: Cache<Name, Failure>,
    /// When CyberScan last accepted a tenant's key.
    accepted: Cache<TenantId, Instant>,
    authentications: Flights<TenantId, Result<Instant, Error>>,
    refused: Cache<TenantId, Failure>,
    /// Nothing older than these versions may be kept.
    purged: Mutex<HashMap<Scope, u64>>,
    /// The same of single answers, as long as a fetch from before could still end.
    purged_answers: Cache<Name, u64>,
    tasks: TaskTracker,
    metrics: Metrics,
}

/// What a fill brought.
#[derive(Clone)]
struct Filled {
    kept: Kept,
    /// It was in Redis already, and may be of any age.
    adopted: bool,
}

#[derive(Clone)]
struct Failure {
    error: Error,
    until: Instant,
    pause: Duration,
}

impl<P, T> Clone for Cached<P, T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// A kind of record that is kept.
trait Kind: Serialize + DeserializeOwned + Send + Sync + Sized + 'static {
    const TYPE: RecordType;
    type Subject: Clone + ToString + Send + Sync + 'static;

    fn policy(config: &Config) -> &Policy;
    fn subject(subject: &Self::Subject) -> Subject;
    /// Where it leads, for a domain.
    fn address(&self) -> Option<IpAddr> {
        None
    }
    /// Bytes in memory, with what the allocator adds.
    fn weight(&self) -> usize;
    fn ask<P: CyberScan>(
        next: &P,
        call: &Call,
        subject: &Self::Subject,
    ) -> impl Future<Output = Result<Answer<Self>, Error>> + Send;
}

impl Kind for DomainRecord {
    const TYPE: RecordType = RecordType::Domain;
    type Subject = DomainName;

    fn policy(config: &Config) -> &Policy {
        &config.domain
    }

    fn subject(subject: &DomainName) -> Subject {
        Subject::Domain(subject.clone())
    }

    fn address(&self) -> Option<IpAddr> {
        self.ip
    }

    fn weight(&self) -> usize {
        size_of::<Self>() + self.details_page.as_ref().map_or(0, |page| page.capacity() + BLOCK)
    }

    fn ask<P: CyberScan>(
        next: &P,
        call: &Call,
        domain: &DomainName,
    ) -> impl Future<Output = Result<Answer<Self>, Error>> + Send {
        next.domain(call, domain)
    }
}

impl Kind for HostRecord {
    const TYPE: RecordType = RecordType::Host;
    type Subject = IpAddr;

    fn policy(config: &Config) -> &Policy {
        &config.host
    }

    fn subject(subject: &IpAddr) -> Subject {
        Subject::Ip(*subject)
    }

    fn weight(&self) -> usize {
        size_of::<Self>() + self.details_page.as_ref().map_or(0, |page| page.capacity() + BLOCK)
    }

    fn ask<P: CyberScan>(
        next: &P,
        call: &Call,
        ip: &IpAddr,
    ) -> impl Future<Output = Result<Answer<Self>, Error>> + Send {
        next.host(call, *ip)
    }
}

impl Kind for Vulnerabilities {
    const TYPE: RecordType = RecordType::Vulnerabilities;
    type Subject = IpAddr;

    fn policy(config: &Config) -> &Policy {
        &config.vulnerabilities
    }

    fn subject(subject: &IpAddr) -> Subject {
        Subject::Ip(*subject)
    }

    fn weight(&self) -> usize {
        let string = |text: &String| size_of::<String>() + text.capacity() + BLOCK;
        // The text itself counts with the finding.
        let text = |text: &Option<String>| text.as_ref().map_or(0, |text| text.capacity() + BLOCK);
        let finding = |finding: &crate::cyberscan::Finding| {
            let cells = finding.table.iter().map(|(name, value)| string(name) + string(value));
            let cves = finding.cves.iter().map(string);
            size_of_val(finding)
                + cells.sum::<usize>()
                + cves.sum::<usize>()
                + text(&finding.name)
                + text(&finding.description)
                + text(&finding.cve)
        };
        size_of::<Self>() + self.0.iter().map(finding).sum::<usize>()
    }

    fn ask<P: CyberScan>(
        next: &P,
        call: &Call,
        ip: &IpAddr,
    ) -> impl Future<Output = Result<Answer<Self>, Error>> + Send {
        next.vulnerabilities(call, *ip)
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
        clock: Clock,
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
            local_clock: VersionClock::new(clock),
            flights: Flights::new(tasks.clone()),
            prefetches: Flights::new(tasks.clone()),
            notes: OnceLock::new(),
            failures: Cache::builder().max_capacity(FAILURES).time_to_live(2 * LONGEST_PAUSE).build(),
            accepted: Cache::builder().max_capacity(TENANTS).support_invalidation_closures().build(),
            authentications: Flights::new(tasks.clone()),
            refused: Cache::builder().max_capacity(TENANTS).time_to_live(2 * LONGEST_PAUSE).build(),
            purged: Mutex::default(),
            purged_answers: Cache::builder().max_capacity(FAILURES).time_to_live(4 * LONGEST_FILL).build(),
            next,
            config: live,
            tasks: tasks.clone(),
            metrics,
        }));
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
        self.0.config.set(Config { memory, ..config });
    }

    /// What is read from now on.
    #[must_use]
    pub fn notes(&self) -> Notes {
        self.0.notes.get_or_init(Notes::default).clone()
    }

    /// An answer as the table above says.
    async fn look_up<K: Kind>(&self, call: &Call, subject: &K::Subject) -> Result<Answer<K>, Error> {
        let key = Key::new(&call.tenant, K::TYPE, &subject.to_string());
        let (kept, freshness, source) = match self.in_memory::<K>(&key) {
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
                match Box::pin(filled).await {
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

    /// Renews an answer in the background, unless that is under way or has just failed.
    fn renew<K: Kind>(&self, key: &Key, call: &Call, subject: &K::Subject, version: u64) {
        if self.recent_failure(key).is_none() {
            drop(self.start_fill::<K>(key, call, subject, version));
        }
    }

    /// A value newer than `version`, waited for until `deadline`; the question is pursued beyond it.
    async fn fill_by<K: Kind>(
        &self,
        key: &Key,
        call: &Call,
        subject: &K::Subject,
        version: u64,
        deadline: Instant,
    ) -> Result<Filled, Error> {
        if let Some(failure) = self.recent_failure(key) {
            return Err(failure.error);
        }
        let after = deadline.saturating_duration_since(Instant::now());
        if let Some(mut ahead) = self.0.prefetches.running(&key.name)
            && let Ok(Ok(outcome)) = timeout_at(deadline, ahead.wait_for(Option::is_some)).await
            && let Some(Ok(filled)) = &*outcome
            && filled.kept.version > version
        {
            return Ok(filled.clone());
        }
        loop {
            let Some((mut outcome, own)) = self.start_fill::<K>(key, call, subject, version) else {
                // A fill has just ended: what came of it is for this question as well.
                let failed = || self.recent_failure(key).map_or(Error::Lost, |failure| failure.error);
                let kept = self.newer_in_memory::<K>(key, version).ok_or_else(failed)?;
                return Ok(Filled { kept, adopted: false });
            };
            let outcome = match timeout_at(deadline, outcome.wait_for(Option::is_some)).await {
                Ok(Ok(outcome)) => outcome.clone().unwrap_or(Err(Error::Lost)),
                Ok(Err(_)) => Err(Error::Lost),
                Err(_) => return Err(Error::TimedOut { after }),
            };
            match outcome {
                // Whoever began it had no time left for a call; who joined may have.
                Err(Error::Limited { .. } | Error::TooLate { .. }) if !own => {}
                outcome => return outcome,
            }
        }
    }

    /// Joins or starts a fill, unless one has ended since the question was found to need it. Where there is a
    /// Redis, it tells whether there is a newer value. Answers what will come of it, and whether it was started.
    fn start_fill<K: Kind>(
        &self,
        key: &Key,
        call: &Call,
        subject: &K::Subject,
        version: u64,
    ) -> Option<(Outcomes, bool)> {
        let mut started = false;
        let ahead = call.priority == Priority::Prefetch;
        let flights = if ahead { &self.0.prefetches } else { &self.0.flights };
        let ended = || {
            let filled = self.0.shared.is_none() && self.newer_in_memory::<K>(key, version).is_some();
            filled || self.recent_failure(key).is_some()
        };
        let outcome = flights.start_if(
            key.name,
            || ahead || !ended(),
            || {
                started = true;
                let (this, key, subject) = (self.clone(), key.clone(), subject.clone());
                let (tenant, priority) = (Arc::clone(&call.tenant), call.priority);
                // It is pursued for the cache's sake, but no call is made for it that whoever asked cannot wait for.
                let wanted_by = call.wanted_by;
                async move {
                    // Who follows a replica that dies has to wait for its lease, and may ask only then.
                    let longest = match this.0.shared {
                        Some(_) => this.lease() + this.0.config.get().fill_timeout,
                        None => this.0.config.get().fill_timeout,
                    };
                    let call = Call::new(tenant, Instant::now() + longest, priority).wanted_by(wanted_by);
                    let outcome = timeout(longest, this.fill::<K>(&key, &call, &subject, version)).await;
                    let outcome = outcome.unwrap_or(Err(Error::TimedOut { after: longest }));
                    match &outcome {
                        Ok(_) => this.0.failures.invalidate(&key.name),
                        Err(error) if !ahead => this.remember_failure(&key, error),
                        Err(_) => {}
                    }
                    outcome
                }
            },
        );
        Some((outcome?, started))
    }

    /// Gets a value newer than `version`: another replica's, or the next stage's.
    async fn fill<K: Kind>(
        &self,
        key: &Key,
        call: &Call,
        subject: &K::Subject,
        version: u64,
    ) -> Result<Filled, Error> {
        // A value that was purged is no value.
        let mut version = version.max(self.purged_before(key));
        let mut poll = FIRST_POLL;
        let mut role = Flight::Adopted;
        let owner = loop {
            let Some(shared) = &self.0.shared else { break None };
            match shared.claim(key, version, self.lease()).await {
                Ok(Claim::Value(value)) => match self.adopt::<K>(key, &value) {
                    Some(kept) => {
                        self.0.metrics.cache_fills.inc((role,));
                        return Ok(Filled { kept, adopted: true });
                    }
                    // It cannot be read: as if it were not there.
                    None => version = u64::MAX,
                },
                Ok(Claim::Leader(owner)) => {
                    self.count::<K>(Tier::Redis, Outcome::Miss);
                    break Some(owner);
                }
                Ok(Claim::Follower(told)) => {
                    role = Flight::Follower;
                    match timeout(poll.mul_f64(0.75 + 0.5 * chance()), told).await {
                        Ok(Ok(Told::Failed(error))) => return Err(error),
                        Ok(Ok(Told::Stored)) | Err(_) => {}
                        // Another question for the same key took the place of ours.
                        Ok(Err(_)) => sleep(FIRST_POLL).await,
                    }
                    poll = (poll * 2).min(LONGEST_POLL);
                }
                Err(_) => {
                    self.count::<K>(Tier::Redis, Outcome::Error);
                    break None;
                }
            }
        };
        self.0.metrics.cache_fills.inc((Flight::Leader,));
        let kept = self.fetch::<K>(key, call, subject, owner).await?;
        Ok(Filled { kept, adopted: false })
    }

    /// How long the lock of one who fetches holds: it outlives the longest fetch, so it is lost by dead
    /// replicas only.
    fn lease(&self) -> Duration {
        self.0.config.get().fill_timeout + Duration::from_secs(1)
    }

    /// Asks the next stage and keeps its answer.
    async fn fetch<K: Kind>(
        &self,
        key: &Key,
        call: &Call,
        subject: &K::Subject,
        owner: Option<String>,
    ) -> Result<Kept, Error> {
        let (born, version) = (Instant::now(), self.version_now());
        let shared = self.0.shared.clone();
        let longest = self.0.config.get().fill_timeout;
        let call = Call { deadline: born + longest, ..call.clone() }.wanted_by(call.wanted_by);
        // Also one that takes too long gives its lock back.
        let outcome = timeout(longest, K::ask(&self.0.next, &call, subject)).await;
        match outcome.unwrap_or(Err(Error::TimedOut { after: longest })) {
            Ok(answer) => {
                let record = answer.record.known().cloned();
                self.count::<K>(
                    Tier::Upstream,
                    if record.is_none() { Outcome::Negative } else { Outcome::Fresh },
                );
                let lifetime = K::policy(&self.0.config.get()).lifetime(record.is_none(), chance());
                let entry = Entry { record, asked_at: answer.asked_at, version, lifetime };
                let kept = self.keep(key, &entry, born);
                kept.reads.filled.store(call.priority == Priority::Interactive, Ordering::Relaxed);
                if let Some(shared) = shared
                    && !K::policy(&self.0.config.get()).life(lifetime).is_zero()
                    && let Some(value) = self.0.codec.get().encode(&binding(key), &entry)
                {
                    let life = K::policy(&self.0.config.get()).life(lifetime);
                    let (this, shared, key) = (self.clone(), shared.clone(), key.clone());
                    // In the background: who waits needs the answer, not its copy.
                    self.0.tasks.spawn(async move {
                        if version > this.purged_before(&key) {
                            shared.store(&key, value, version, life, owner).await;
                        } else if let Some(owner) = owner {
                            // It was purged while it was fetched: whoever waits for it elsewhere asks again.
                            shared.release(&key, owner, &Error::Lost).await;
                        }
                    });
                }
                Ok(kept)
            }
            Err(error) => {
                self.count::<K>(Tier::Upstream, Outcome::Error);
                if let (Some(shared), Some(owner)) = (shared, owner) {
                    // That nobody's fetch was refused is no answer to those who wait elsewhere.
                    let ahead = call.priority == Priority::Prefetch;
                    let (key, error) = (key.clone(), if ahead { Error::Lost } else { error.clone() });
                    self.0.tasks.spawn(async move { shared.release(&key, owner, &error).await });
                }
                if error == Error::Unauthorized {
                    // Whether it is the key that is refused, the next authentication tells.
                    self.0.accepted.invalidate(&key.tenant);
                }
                Err(error)
            }
        }
    }

    /// Takes a value from Redis into memory; its age counts from when CyberScan was asked. One that is of no use is
    /// no look-up's outcome yet: whoever asks CyberScan in its stead counts the miss.
    fn adopt<K: Kind>(&self, key: &Key, value: &[u8]) -> Option<Kept> {
        let shared = self.0.shared.as_ref()?;
        let entry = match self.0.codec.get().decode::<K>(&binding(key), value) {
            Ok(entry) => entry,
            Err(reason) => {
                self.0.metrics.cache_rejected.inc((reason,));
                return None;
            }
        };
        let age = shared.clock().age(entry.version);
        let freshness = K::policy(&self.0.config.get()).freshness(entry.lifetime, age);
        let outcome = match entry.version > self.purged_before(key) {
            true => outcome(freshness, entry.lifetime.negative),
            false => Outcome::Miss,
        };
        if outcome == Outcome::Miss {
            return None;
        }
        self.count::<K>(Tier::Redis, outcome);
        let now = Instant::now();
        Some(self.keep(key, &entry, now.checked_sub(age).unwrap_or(now)))
    }

    /// Puts an entry into memory, unless there is a newer one or it was purged meanwhile.
    fn keep<K: Kind>(&self, key: &Key, entry: &Entry<K>, born: Instant) -> Kept {
        let weight = entry.record.as_ref().map_or(0, |record| record.weight());
        let kept = entry.keep(key, born, weight);
        let dead =
            K::policy(&self.0.config.get()).freshness(kept.lifetime, born.elapsed()) == Freshness::Dead;
        if !dead && entry.version > self.purged_before(key) {
            use moka::ops::compute::Op;
            self.0.memory.entry_by_ref(&key.name).and_compute_with(|present| match present {
                Some(present) if present.value().version > kept.version => Op::Nop,
                _ => Op::Put(kept.clone()),
            });
            // It may have been purged between the look and the put.
            if entry.version <= self.purged_before(key) {
                self.0.memory.invalidate(&key.name);
            }
        }
        kept
    }

    fn recent_failure(&self, key: &Key) -> Option<Failure> {
        self.0.failures.get(&key.name).filter(|failure| Instant::now() < failure.until)
    }

    fn remember_failure(&self, key: &Key, error: &Error) {
        // A refused key is the tenant's affair, a host's rest the breaker's; that nothing was sent is nobody's.
        if !error.is_telling() || matches!(error, Error::Unauthorized | Error::Resting { .. }) {
            return;
        }
        let failure = Failure::after(self.0.failures.get(&key.name), error.clone());
        self.0.failures.insert(key.name, failure);
    }

    fn version_now(&self) -> u64 {
        self.0.shared.as_ref().map_or_else(|| self.0.local_clock.now(), |shared| shared.clock().now())
    }

    /// No answer of this name up to this version may be served.
    fn purged_before(&self, key: &Key) -> u64 {
        let answer = self.0.purged_answers.get(&key.name).unwrap_or(0);
        let purged = self.0.purged.lock().unwrap_or_else(PoisonError::into_inner);
        if purged.is_empty() {
            return answer;
        }
        let of = |scope: &Scope| purged.get(scope).copied().unwrap_or(0);
        answer.max(of(&Scope::All)).max(of(&Scope::Tenant(key.tenant.label())))
    }

    fn hear(&self, event: Event) {
        match event {
            Event::Stored { name, version } => {
                // The next read adopts the newer value.
                if self.0.memory.get(&name).is_some_and(|kept| kept.version < version) {
                    self.0.memory.invalidate(&name);
                }
            }
            Event::Purged { scope, version } => self.drop_before(scope, version),
            Event::Revoked { tenant, version } => {
                let revoked = move |id: &TenantId, _: &Instant| id.label() == tenant;
                let _ = self.0.accepted.invalidate_entries_if(revoked);
                self.drop_before(Scope::Tenant(tenant), version);
            }
            Event::Missed => {
                self.0.memory.invalidate_all();
                self.0.accepted.invalidate_all();
            }
        }
    }

    /// Drops what memory has of `scope` up to `version`, and does not take it back.
    fn drop_before(&self, scope: Scope, version: u64) {
        if let Scope::Answer(name) = scope {
            let known = self.0.purged_answers.get(&name).unwrap_or(0);
            self.0.purged_answers.insert(name, version.max(known));
            if self.0.memory.get(&name).is_some_and(|kept| kept.version <= version) {
                self.0.memory.invalidate(&name);
            }
            return;
        }
        {
            // What is older than any answer lives has nothing left to keep out.
            let longest = micros(self.0.config.get().longest_life());
            let oldest = self.version_now().saturating_sub(longest);
            let mut purged = self.0.purged.lock().unwrap_or_else(PoisonError::into_inner);
            purged.retain(|_, stamp| *stamp >= oldest);
            let known = purged.entry(scope).or_insert(0);
            if *known >= version {
                return;
            }
            *known = version;
        }
        let _ = self.0.memory.invalidate_entries_if(move |_, kept: &Kept| {
            kept.version <= version
                && match scope {
                    Scope::All => true,
                    Scope::Tenant(tenant) => kept.tenant.label() == tenant,
                    Scope::Answer(_) => false,
                }
        });
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

/// A look-up that memory could not answer, as a span.
fn traced<K: Kind>(
    filling: impl Future<Output = Result<Filled, Error>>,
) -> impl Future<Output = Result<Filled, Error>> {
    trace::stage(Stage::LookUp(K::TYPE.label()), filling, |outcome, facts| match outcome {
        Ok(filled) => {
            let tier = if filled.adopted { Tier::Redis } else { Tier::Upstream };
            facts.text("relay.tier", tier.as_str());
        }
        Err(error) => facts.failed(error.as_str()),
    })
}

/// What a fill comes to.
async fn landed(mut flight: watch::Receiver<Option<Result<Filled, Error>>>) -> Result<Filled, Error> {
    let outcome = flight.wait_for(Option::is_some).await.map_err(|_| Error::Lost)?;
    outcome.clone().unwrap_or(Err(Error::Lost))
}

fn outcome(freshness: Freshness, negative: bool) -> Outcome {
    match freshness {
        Freshness::Fresh | Freshness::Due if negative => Outcome::Negative,
        Freshness::Fresh | Freshness::Due => Outcome::Fresh,
        Freshness::Revalidate | Freshness::IfError => Outcome::Stale,
        Freshness::Dead => Outcome::Miss,
    }
}

/// What a value is bound to when it is sealed: where it stands.
fn binding(key: &Key) -> [u8; 16] {
    key.name
}

/// What will come of a fill.
type Outcomes = watch::Receiver<Option<Result<Filled, Error>>>;

impl Failure {
    /// The failure that follows `last`: each pause is twice the last one, give or take a fifth.
    fn after(last: Option<Self>, error: Error) -> Self {
        let pause = last.map_or(FIRST_PAUSE, |last| (last.pause * 2).min(LONGEST_PAUSE));
        Self { error, until: Instant::now() + pause.mul_f64(0.8 + 0.4 * chance()), pause }
    }
}

/// How long before an answer's end it is renewed if nobody waits for it: late, because early renewal is what
/// costs calls, but not too late to be told and tried.
#[must_use]
pub fn lead(life: Duration) -> Duration {
    (life / 100).clamp(Duration::from_secs(2), Duration::from_secs(30))
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// What came of renewing an answer nobody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewed {
    /// CyberScan was asked; otherwise somebody else had renewed it.
    pub asked: bool,
    /// How long the answer stays fresh; `None` if it is "not known".
    pub expires_in: Option<Duration>,
    /// How long it is fresh in all.
    pub life: Duration,
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

impl<P: CyberScan, T: SharedTier> Cached<P, T> {
    /// Forgets everything, on every replica.
    ///
    /// # Errors
    /// [`Unavailable`] when the other replicas could not be told; this one has forgotten.
    pub async fn purge_all(&self) -> Result<(), Unavailable> {
        self.purge(Scope::All).await
    }

    /// Forgets what is kept for one tenant, on every replica; `label` is the tenant's name in logs.
    ///
    /// # Errors
    /// [`Unavailable`] when the other replicas could not be told; this one has forgotten.
    pub async fn purge_label(&self, label: Name) -> Result<(), Unavailable> {
        self.purge(Scope::Tenant(label)).await
    }

    /// Forgets what is kept about one observable for the tenants known here, on every replica.
    ///
    /// # Errors
    /// [`Unavailable`] when the other replicas could not be told; this one has forgotten.
    pub async fn purge_subject(&self, subject: &Subject) -> Result<(), Unavailable> {
        let (types, subject): (&[RecordType], String) = match subject {
            Subject::Domain(domain) => (&[RecordType::Domain], domain.to_string()),
            Subject::Ip(ip) => (&[RecordType::Host, RecordType::Vulnerabilities], ip.to_string()),
        };
        let mut told = Ok(());
        for (tenant, _) in &self.0.accepted {
            for record_type in types {
                told =
                    told.and(self.purge(Scope::Answer(Key::of(*tenant, *record_type, &subject).name)).await);
            }
        }
        told
    }

    /// Renews the answer about `subject` unless it has been renewed lately; nobody waits for it.
    ///
    /// # Errors
    /// Why it could not be renewed. That is no answer to anybody.
    pub async fn renew_ahead(
        &self,
        call: &Call,
        record_type: RecordType,
        subject: &Subject,
    ) -> Result<Renewed, Error> {
        match (record_type, subject) {
            (RecordType::Domain, Subject::Domain(domain)) => self.ahead::<DomainRecord>(call, domain).await,
            (RecordType::Host, Subject::Ip(ip)) => self.ahead::<HostRecord>(call, ip).await,
            (RecordType::Vulnerabilities, Subject::Ip(ip)) => self.ahead::<Vulnerabilities>(call, ip).await,
            _ => Err(Error::Lost),
        }
    }

    async fn ahead<K: Kind>(&self, call: &Call, subject: &K::Subject) -> Result<Renewed, Error> {
        let key = Key::new(&call.tenant, K::TYPE, &subject.to_string());
        let renewed = |kept: &Kept, asked| Renewed {
            asked,
            expires_in: (!kept.lifetime.negative).then(|| kept.lifetime.fresh.saturating_sub(kept.age())),
            life: kept.lifetime.fresh,
        };
        // Younger than half its life is renewed already.
        let half = match self.in_memory::<K>(&key) {
            Some((kept, _)) if kept.age() < kept.lifetime.fresh / 2 => return Ok(renewed(&kept, false)),
            Some((kept, _)) => kept.lifetime.fresh / 2,
            None => K::policy(&self.0.config.get()).fresh / 2,
        };
        let version = self.version_now().saturating_sub(micros(half));
        let filled = match self.0.flights.running(&key.name) {
            Some(running) => landed(running).await?,
            None => landed(self.start_fill::<K>(&key, call, subject, version).ok_or(Error::Lost)?.0).await?,
        };
        Ok(renewed(&filled.kept, !filled.adopted))
    }

    /// Brings what Redis has of these answers into memory, a hundred in a round trip.
    pub async fn warm(&self, tenant: TenantId, answers: &[(RecordType, Subject)]) {
        for some in answers.chunks(100) {
            let keys =
                some.iter().map(|(record_type, subject)| Key::of(tenant, *record_type, &subject.to_string()));
            self.bring(keys.collect(), false).await;
        }
    }

    /// Brings the gauges of memory up to date.
    pub fn measure(&self) {
        let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        self.0.memory.run_pending_tasks();
        self.0.metrics.cache_entries.set((), whole(self.0.memory.entry_count()));
        self.0.metrics.cache_bytes.set((), whole(self.0.memory.weighted_size()));
        self.0.metrics.cache_capacity.set((), whole(self.0.config.get().memory));
    }

    async fn purge(&self, scope: Scope) -> Result<(), Unavailable> {
        let told = match &self.0.shared {
            Some(shared) => shared.purge(scope).await.map(drop),
            None => Ok(()),
        };
        self.drop_before(scope, self.version_now());
        told
    }

    /// Asks the next stage whether the tenant's key is accepted, in a task of its own.
    async fn reauthenticate(&self, call: &Call, deadline: Instant) -> Result<Instant, Error> {
        let tenant = call.tenant.id();
        if let Some(failure) = self.0.refused.get(&tenant).filter(|failure| Instant::now() < failure.until) {
            return Err(failure.error);
        }
        let after = deadline.saturating_duration_since(Instant::now());
        let joining = self.0.authentications.join(tenant, || {
            let (this, tenant, priority) = (self.clone(), Arc::clone(&call.tenant), call.priority);
            let wanted_by = call.wanted_by;
            async move {
                let longest = this.0.config.get().fill_timeout;
                let call = Call::new(tenant, Instant::now() + longest, priority).wanted_by(wanted_by);
                let outcome = timeout(longest, this.0.next.authenticate(&call)).await;
                let outcome = outcome.unwrap_or(Err(Error::TimedOut { after: longest }));
                this.note_authentication(call.tenant.id(), &outcome).await;
                outcome
            }
        });
        match timeout_at(deadline, joining).await {
            Ok(outcome) => outcome.unwrap_or(Err(Error::Lost)),
            Err(_) => Err(Error::TimedOut { after }),
        }
    }

    async fn note_authentication(&self, tenant: TenantId, outcome: &Result<Instant, Error>) {
        match outcome {
            Ok(at) => {
                self.0.accepted.insert(tenant, *at);
                self.0.refused.invalidate(&tenant);
            }
            Err(error) => {
                if error.is_telling() && !matches!(error, Error::Resting { .. }) {
                    let failure = Failure::after(self.0.refused.get(&tenant), error.clone());
                    self.0.refused.insert(tenant, failure);
                }
                if *error == Error::Unauthorized {
                    self.0.accepted.invalidate(&tenant);
                    self.drop_before(Scope::Tenant(tenant.label()), self.version_now());
                    if let Some(shared) = &self.0.shared {
                        shared.revoke(tenant.label()).await;
                    }
                }
            }
        }
    }

    /// Brings what Redis has of `keys` into memory, in one round trip.
    async fn read_ahead(&self, keys: Vec<Key>) {
        self.bring(keys, true).await;
    }

    async fn bring(&self, mut keys: Vec<Key>, for_a_look_up: bool) {
        let Some(shared) = &self.0.shared else { return };
        keys.retain(|key| !self.0.memory.contains_key(&key.name));
        keys.sort_unstable_by_key(|key| key.name);
        keys.dedup_by_key(|key| key.name);
        if keys.is_empty() {
            return;
        }
        let Ok(values) = shared.read(&keys).await else { return };
        for (key, value) in keys.iter().zip(values) {
            let Some(value) = value else { continue };
            let kept = match key.record_type {
                RecordType::Domain => self.adopt::<DomainRecord>(key, &value),
                RecordType::Host => self.adopt::<HostRecord>(key, &value),
                RecordType::Vulnerabilities => self.adopt::<Vulnerabilities>(key, &value),
            };
            if let Some(kept) = kept
                && for_a_look_up
            {
                kept.reads.unread.store(true, Ordering::Relaxed);
                self.0.metrics.cache_lookups.inc((key.record_type.label(), Tier::Memory, Outcome::Miss));
            }
        }
    }
}

impl<P: CyberScan, T: SharedTier> CyberScan for Cached<P, T> {
    /// A key counts as accepted for `auth.revalidate`. While CyberScan cannot be asked, one that was
    /// accepted before goes on being served from what is kept.
    async fn authenticate(&self, call: &Call) -> Result<Instant, Error> {
        let config = self.0.config.snapshot();
        let longest = config.longest_life().max(config.revalidate);
        let before = self.0.accepted.get(&call.tenant.id()).filter(|at| at.elapsed() < longest);
        match before {
            Some(at) if at.elapsed() < self.0.config.get().revalidate => Ok(at),
            Some(at) => {
                let soft = call.deadline.min(Instant::now() + self.0.config.get().soft_timeout);
                match Box::pin(self.reauthenticate(call, soft)).await {
                    Ok(at) => Ok(at),
                    Err(Error::Unauthorized) => Err(Error::Unauthorized),
                    Err(_) => Ok(at),
                }
            }
            None => Box::pin(self.reauthenticate(call, call.deadline)).await,
        }
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
            |record_type, subject: &dyn ToString| Key::new(&call.tenant, record_type, &subject.to_string());
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
