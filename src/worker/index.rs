//! The index of recent answers and the schedule of what is due: in Redis, shared by all replicas and kept over
//! restarts, or in memory where there is no Redis. It owns both forms and what stands in them; it must not
//! know what is worth renewing.
//!
//! Nothing in Redis is readable: entries are named like answers in the cache, and what they are about is sealed
//! with a key derived from the tenant's, which only replicas have that the tenant has called.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use aws_lc_rs::aead::{AES_128_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use deadpool_redis::redis::Script;
use tokio::time::Instant;

use crate::{
    cache::{lead, reads::Note, tier::Name},
    ctim::Subject,
    cyberscan::RecordType,
    metrics::Operation,
    redis_pool::{Redis, Unavailable},
    tenant::{Tenant, TenantId, hex, unhex},
};

/// For how long a tenant's index is kept when nothing is added to it.
const KEPT: Duration = Duration::from_secs(26 * 3600);
/// Reads count less the older they are, with this many lives as time constant: the script's figure, too.
const MEMORY: f64 = 3.0;

/// Entries that one script looks at: Redis does nothing else while it runs.
const PAGE: usize = 32;

/// How often Redis is asked what is due; what is, is so two seconds at least before its end.
const ASKED: Duration = Duration::from_secs(1);
/// Tenants that are told of at once, of those that have something due, and how many times at most.
const TENANTS: usize = 256;
const TIMES: usize = 8;
/// What nobody has done for so long nobody does any more: what was to be renewed has ended, and whoever asks renews it.
const ABANDONED: Duration = Duration::from_secs(30);
/// Something due so much earlier than what was told is worth telling.
const EARLIER: Duration = Duration::from_millis(100);

/// The most entries in memory, of all tenants together: some ten megabytes.
const IN_MEMORY: usize = 50_000;

/// What is known of an answer.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    name: Name,
    record_type: RecordType,
    subject: Subject,
    /// Reads that are new.
    pub(super) reads: u32,
    due: Scheduling,
    life: Duration,
    /// Whether it has been fetched ahead and not been read; `None`: as it was.
    unread: Option<bool>,
}

#[derive(Clone, Copy, Debug)]
enum Scheduling {
    In(Duration),
    /// It is as it was.
    AsItIs,
    /// Off the schedule.
    Never,
}

/// What an entry amounts to after a change.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Standing {
    /// Reads to be expected per life.
    pub(super) expected: f64,
    /// It was fetched ahead, and is read for the first time now.
    pub(super) useful: bool,
    /// It is on the schedule.
    pub(super) scheduled: bool,
}

/// A tenant's schedule.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Schedule {
    /// How long until something is due, if anything is ever.
    pub(super) next: Option<Duration>,
    /// Entries on it.
    pub(super) entries: i64,
}

/// What was put in.
#[derive(Clone, Debug, Default)]
pub(super) struct Taken {
    /// How each entry stands now.
    pub(super) standings: Vec<Standing>,
    pub(super) schedule: Schedule,
}

/// What was claimed, and what is left.
#[derive(Clone, Debug, Default)]
pub(super) struct Claimed {
    pub(super) due: Vec<Due>,
    pub(super) schedule: Schedule,
}

/// Who has something due.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum WithDue {
    /// Tenants of these names, the longest due first.
    Tenants(Vec<String>),
    /// It is not told: each is to be looked at when its schedule says so.
    Untold,
}

/// An answer that is due and ours to renew.
#[derive(Clone, Debug)]
pub(super) struct Due {
    name: Name,
    pub(super) record_type: RecordType,
    pub(super) subject: Subject,
    /// Reads to be expected per life.
    pub(super) expected: f64,
    /// It was fetched ahead and never read.
    pub(super) unread: bool,
    pub(super) overdue: Duration,
    life: Duration,
}

impl Entry {
    /// An answer that was read.
    pub(super) fn read(note: &Note) -> Self {
        let lead = lead(note.life);
        let due = match note.expires_in.checked_sub(lead) {
            Some(due) if !due.is_zero() => Scheduling::In(due),
            _ => Scheduling::AsItIs,
        };
        Self {
            name: note.key.name,
            record_type: note.key.record_type,
            subject: note.subject.clone(),
            reads: note.reads.take(),
            due,
            life: note.life,
            unread: None,
        }
    }

    /// An answer that was fetched although nobody has asked for it.
    pub(super) fn ahead(
        name: Name,
        record_type: RecordType,
        subject: Subject,
        expires_in: Duration,
        life: Duration,
    ) -> Self {
        let due = Scheduling::In(expires_in.saturating_sub(lead(life)));
        Self { name, record_type, subject, reads: 0, due, life, unread: Some(true) }
    }
}

impl Due {
    /// It was renewed, by us or by somebody else.
    pub(super) fn renewed(self, asked: bool, expires_in: Duration, life: Duration) -> Entry {
        Entry {
            unread: asked.then_some(true),
            ..Entry::ahead(self.name, self.record_type, self.subject, expires_in, life)
        }
    }

    /// It is left to whoever asks for it.
    pub(super) fn dropped(self) -> Entry {
        Entry {
            due: Scheduling::Never,
            unread: Some(false),
            ..Entry::ahead(self.name, self.record_type, self.subject, self.life, self.life)
        }
    }
}

/// The index.
pub(super) struct Index {
    shared: Option<Shared>,
    own: Mutex<HashMap<TenantId, Own>>,
    most: usize,
}

impl Index {
    /// An index in `redis`, if there is one, of at most `most` entries per tenant.
    pub(super) fn new(redis: Option<Redis>, most: usize) -> Self {
        let shared = redis.map(|redis| Shared {
            redis,
            script: Script::new(include_str!("index.lua")),
            due: Script::new(include_str!("due.lua")),
            told: Mutex::default(),
            asked: Mutex::default(),
        });
        Self { shared, own: Mutex::default(), most }
    }

    /// Takes entries in.
    pub(super) async fn put(&self, tenant: &Tenant, entries: &[Entry]) -> Result<Taken, Unavailable> {
        match &self.shared {
            Some(shared) => shared.put(tenant, entries, self.most).await,
            None => {
                let tenants = self.own.lock().unwrap_or_else(PoisonError::into_inner).len().max(1);
                let most = self.most.min(IN_MEMORY / tenants).max(1);
                Ok(self.own(tenant, |own| own.put(entries, most)))
            }
        }
    }

    /// Which tenants have something due: one question for all of them, whoever put it in.
    ///
    /// Redis is asked once a second at most; in between nobody is told to have anything due.
    pub(super) async fn with_due(&self) -> Result<WithDue, Unavailable> {
        match &self.shared {
            Some(shared) => shared.with_due().await.map(WithDue::Tenants),
            None => Ok(WithDue::Untold),
        }
    }

    /// At most `most` entries that are due. They are due again after `lease`, unless they are put in again.
    pub(super) async fn claim(
        &self,
        tenant: &Tenant,
        most: usize,
        lease: Duration,
    ) -> Result<Claimed, Unavailable> {
        match &self.shared {
            Some(shared) => shared.claim(tenant, most, lease).await,
            None => Ok(self.own(tenant, |own| own.claim(most, lease))),
        }
    }

    /// What has been asked for more than once, the latest first, to be had from Redis. Without Redis there is nothing to
    /// be had.
    pub(super) async fn recent(
        &self,
        tenant: &Tenant,
        most: usize,
    ) -> Result<Vec<(RecordType, Subject)>, Unavailable> {
        match &self.shared {
            Some(shared) => shared.recent(tenant, most).await,
            None => Ok(Vec::new()),
        }
    }

    /// Forgets what is in memory of all tenants but those that are `known`.
    pub(super) fn retain(&self, known: impl Fn(&TenantId) -> bool) {
        self.own.lock().unwrap_or_else(PoisonError::into_inner).retain(|id, _| known(id));
        if let Some(shared) = &self.shared {
            shared.told().retain(|id, _| known(id));
        }
    }

    fn own<R>(&self, tenant: &Tenant, work: impl FnOnce(&mut Own) -> R) -> R {
        let mut own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        work(own.entry(tenant.id()).or_default())
    }
}

// ---- in memory ----

/// One tenant's entries in memory.
#[derive(Default)]
struct Own {
    entries: BTreeMap<Name, Known>,
    schedule: BTreeSet<(Instant, Name)>,
}

struct Known {
    record_type: RecordType,
    subject: Subject,
    reads: f64,
    at: Instant,
    since: Instant,
    all: u32,
    unread: bool,
    life: Duration,
    due: Option<Instant>,
}

impl Known {
    fn faded(&self, now: Instant) -> f64 {
        let memory = MEMORY * self.life.as_secs_f64();
        self.reads * (-(now - self.at).as_secs_f64() / memory).exp()
    }

    fn expected(&self, now: Instant) -> f64 {
        let life = self.life.as_secs_f64();
        let watched = (now - self.since).as_secs_f64().max(life);
        self.faded(now) / MEMORY / (1.0 - (-watched / (MEMORY * life)).exp())
    }
}

impl Own {
    fn schedule(&self, now: Instant) -> Schedule {
        Schedule {
            next: self.schedule.first().map(|(due, _)| due.saturating_duration_since(now)),
            entries: i64::try_from(self.schedule.len()).unwrap_or(i64::MAX),
        }
    }

    fn put(&mut self, entries: &[Entry], most: usize) -> Taken {
        let now = Instant::now();
        let standings = entries.iter().map(|entry| self.put_one(entry, now)).collect();
        while self.entries.len() > most {
            self.forget_one(now);
        }
        Taken { standings, schedule: self.schedule(now) }
    }

    fn put_one(&mut self, entry: &Entry, now: Instant) -> Standing {
        let known = self.entries.entry(entry.name).or_insert_with(|| Known {
            record_type: entry.record_type,
            subject: entry.subject.clone(),
            reads: 0.0,
            at: now,
            since: now,
            all: 0,
            unread: false,
            life: entry.life,
            due: None,
        });
        // The read that began the watch says nothing of how many there are in a life.
        let first = u32::from(known.all == 0);
        known.reads = known.faded(now) + f64::from(entry.reads.saturating_sub(first));
        (known.at, known.life) = (now, entry.life);
        known.all = known.all.saturating_add(entry.reads);
        let useful = known.unread && entry.reads > 0;
        known.unread = entry.unread.unwrap_or(known.unread && entry.reads == 0);
        let (before, mut scheduled) = (known.due, false);
        match entry.due {
            Scheduling::Never => known.due = None,
            Scheduling::In(due) if known.all >= 2 || known.unread => {
                // A claim or a later renewal is not undone by a read of an older copy.
                known.due = Some(known.due.map_or(now + due, |present| present.max(now + due)));
                scheduled = true;
            }
            Scheduling::In(_) | Scheduling::AsItIs => {}
        }
        let standing = Standing { expected: known.expected(now), useful, scheduled };
        let after = known.due;
        if before != after {
            before.map(|before| self.schedule.remove(&(before, entry.name)));
            after.map(|after| self.schedule.insert((after, entry.name)));
        }
        standing
    }

    fn claim(&mut self, most: usize, lease: Duration) -> Claimed {
        let now = Instant::now();
        let mut claimed = Claimed::default();
        while claimed.due.len() < most
            && let Some((due, name)) = self.schedule.first().copied()
            && due <= now
        {
            self.schedule.remove(&(due, name));
            if let Some(known) = self.entries.get_mut(&name) {
                known.due = Some(now + lease);
                self.schedule.insert((now + lease, name));
                claimed.due.push(Due {
                    name,
                    record_type: known.record_type,
                    subject: known.subject.clone(),
                    expected: known.expected(now),
                    unread: known.unread,
                    overdue: now - due,
                    life: known.life,
                });
            }
        }
        claimed.schedule = self.schedule(now);
        claimed
    }

    /// Of eight, the one with the fewest reads goes.
    fn forget_one(&mut self, now: Instant) {
        // Names are hashes: those after any place among them are a fair sample.
        let place = uuid::Uuid::new_v4().into_bytes();
        let some = self.entries.range(place..).chain(&self.entries).take(8);
        let least = some.min_by(|(_, a), (_, b)| a.faded(now).total_cmp(&b.faded(now)));
        let Some(victim) = least.map(|(name, _)| *name) else { return };
        if let Some(due) = self.entries.remove(&victim).and_then(|known| known.due) {
            self.schedule.remove(&(due, victim));
        }
    }
}

// ---- in Redis ----

struct Shared {
    redis: Redis,
    script: Script,
    due: Script,
    /// What this replica has told of when tenants have something due.
    told: Mutex<HashMap<TenantId, Instant>>,
    /// When it asked last what is due.
    asked: Mutex<Option<Instant>>,
}

impl Shared {
    async fn put(&self, tenant: &Tenant, entries: &[Entry], most: usize) -> Result<Taken, Unavailable> {
        let seal = Seal::of(tenant);
        let mut taken = Taken::default();
        for some in entries.chunks(PAGE) {
            let mut invocation = self.script.prepare_invoke();
            for key in self.keys(tenant) {
                invocation.key(key);
            }
            invocation.arg("put").arg(most).arg(millis(KEPT));
            for entry in some {
                let due = match entry.due {
                    Scheduling::In(due) => millis(due).to_string(),
                    Scheduling::AsItIs => "0".to_owned(),
                    Scheduling::Never => "-1".to_owned(),
                };
                let unread = entry.unread.map_or("-", |unread| if unread { "1" } else { "0" });
                let sealed = seal.close(entry.name, &entry.subject).ok_or(Unavailable)?;
                invocation.arg(hex(entry.name)).arg(entry.reads).arg(due).arg(millis(entry.life));
                invocation.arg(entry.record_type.key_part()).arg(sealed).arg(unread);
            }
            let invocation = &invocation;
            let answer: Vec<i64> = self
                .redis
                .run(Operation::Schedule, |mut link| async move { invocation.invoke_async(&mut link).await })
                .await?;
            let (schedule, standings) = answer.split_at_checked(2).ok_or(Unavailable)?;
            taken.schedule = schedule_of(schedule);
            taken.standings.extend(standings.chunks(3).map(|standing| Standing {
                expected: standing.first().copied().unwrap_or(0) as f64 / 1000.0,
                useful: standing.get(1) == Some(&1),
                scheduled: standing.get(2) == Some(&1),
            }));
        }
        self.tell(tenant, taken.schedule.next, false).await?;
        Ok(taken)
    }

    /// Tells when something of the tenant is due next, unless that, or something earlier, has been told. After a claim it
    /// is told in any case.
    async fn tell(&self, tenant: &Tenant, next: Option<Duration>, claimed: bool) -> Result<(), Unavailable> {
        let now = Instant::now();
        let due = next.map(|next| now + next);
        {
            let mut told = self.told();
            let known = told.get(&tenant.id()).copied().filter(|told| *told > now);
            let news = due.is_some_and(|due| known.is_none_or(|known| due + EARLIER < known));
            if !claimed && !news {
                return Ok(());
            }
            match due {
                Some(due) => told.insert(tenant.id(), due),
                None => told.remove(&tenant.id()),
            };
        }
        let mut invocation = self.due.key(self.redis.key("due"));
        invocation.arg("tell").arg(millis(KEPT)).arg(&*tenant.label());
        invocation.arg(next.map_or(-1, |next| i64::try_from(next.as_millis()).unwrap_or(i64::MAX)));
        invocation.arg(u8::from(claimed));
        let invocation = &invocation;
        let telling = self.redis.run(Operation::Schedule, |mut link| async move {
            invocation.invoke_async::<u8>(&mut link).await
        });
        telling.await.map(drop).inspect_err(|_| {
            self.told().remove(&tenant.id());
        })
    }

    async fn with_due(&self) -> Result<Vec<String>, Unavailable> {
        {
            let mut asked = self.asked();
            if asked.is_some_and(|asked| asked.elapsed() < ASKED) {
                return Ok(Vec::new());
            }
            *asked = Some(Instant::now());
        }
        let mut tenants = Vec::new();
        for from in (0..TIMES * TENANTS).step_by(TENANTS) {
            let mut invocation = self.due.key(self.redis.key("due"));
            invocation.arg("due").arg(from).arg(TENANTS).arg(millis(ABANDONED));
            let mut answer = self.ask(&invocation).await?.into_iter();
            if answer.next().as_deref() == Some("0") {
                // There is nothing, or nothing any more.
                self.told().clear();
            }
            let before = tenants.len();
            tenants.extend(answer);
            if tenants.len() - before < TENANTS {
                break;
            }
        }
        Ok(tenants)
    }

    fn asked(&self) -> MutexGuard<'_, Option<Instant>> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn told(&self) -> MutexGuard<'_, HashMap<TenantId, Instant>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn claim(&self, tenant: &Tenant, most: usize, lease: Duration) -> Result<Claimed, Unavailable> {
        let mut invocation = self.script.prepare_invoke();
        for key in self.keys(tenant) {
            invocation.key(key);
        }
        invocation.arg("claim").arg(most).arg(millis(lease));
        let answer = self.ask(&invocation).await?;
        let (schedule, due) = answer.split_at_checked(2).ok_or(Unavailable)?;
        let schedule: Vec<i64> = schedule.iter().filter_map(|number| number.parse().ok()).collect();
        let schedule = schedule_of(&schedule);
        let seal = Seal::of(tenant);
        let due = due.chunks(7).filter_map(|fields| {
            let [name, record_type, subject, expected, unread, overdue, life] = fields else { return None };
            let name = unhex(name)?;
            Some(Due {
                name,
                record_type: type_named(record_type)?,
                subject: seal.open(name, subject)?,
                expected: expected.parse::<f64>().ok()? / 1000.0,
                unread: unread == "1",
                overdue: Duration::from_millis(overdue.parse().ok()?),
                life: Duration::from_millis(life.parse().ok()?),
            })
        });
        let claimed = Claimed { due: due.collect(), schedule };
        if schedule.next.is_some_and(|next| next.is_zero()) {
            // More is due than could be claimed.
            *self.asked() = None;
        }
        // What is claimed is ours, also if this is not told: others look, and find nothing due.
        let _ = self.tell(tenant, schedule.next, true).await;
        Ok(claimed)
    }

    async fn recent(&self, tenant: &Tenant, most: usize) -> Result<Vec<(RecordType, Subject)>, Unavailable> {
        let (seal, mut recent) = (Seal::of(tenant), Vec::new());
        for from in (0..most).step_by(PAGE) {
            let mut invocation = self.script.prepare_invoke();
            for key in self.keys(tenant) {
                invocation.key(key);
            }
            invocation.arg("recent").arg(from).arg(PAGE.min(most - from));
            let page = self.ask(&invocation).await?;
            recent.extend(page.chunks(3).filter_map(|fields| {
                let [name, record_type, subject] = fields else { return None };
                Some((type_named(record_type)?, seal.open(unhex(name)?, subject)?))
            }));
            if page.len() < 3 * PAGE {
                break;
            }
        }
        Ok(recent)
    }

    /// The hash of entries and the schedule, on one node of a cluster.
    fn keys(&self, tenant: &Tenant) -> [String; 2] {
        let label = tenant.label();
        ["e", "d"].map(|kind| self.redis.key(&format!("{{idx:{label}}}:{kind}")))
    }

    async fn ask(
        &self,
        invocation: &deadpool_redis::redis::ScriptInvocation<'_>,
    ) -> Result<Vec<String>, Unavailable> {
        self.redis
            .run(Operation::Schedule, |mut link| async move { invocation.invoke_async(&mut link).await })
            .await
    }
}

/// The first two numbers of an answer.
fn schedule_of(numbers: &[i64]) -> Schedule {
    let next = numbers.first().and_then(|next| u64::try_from(*next).ok());
    Schedule { next: next.map(Duration::from_millis), entries: numbers.get(1).copied().unwrap_or(0) }
}

/// Seals what entries are about with a key derived from the tenant's.
struct Seal(Option<RandomizedNonceKey>);

impl Seal {
    fn of(tenant: &Tenant) -> Self {
        Self(RandomizedNonceKey::new(&AES_128_GCM, &tenant.derive("index", &[b"seal"])).ok())
    }

    fn close(&self, name: Name, subject: &Subject) -> Option<String> {
        let mut text = subject.to_string().into_bytes();
        let nonce = self.0.as_ref()?.seal_in_place_append_tag(Aad::from(name), &mut text).ok()?;
        Some(URL_SAFE_NO_PAD.encode([nonce.as_ref().as_slice(), &text].concat()))
    }

    fn open(&self, name: Name, sealed: &str) -> Option<Subject> {
        let mut bytes = URL_SAFE_NO_PAD.decode(sealed).ok()?;
        let (nonce, text) = bytes.split_at_mut_checked(NONCE_LEN)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let text = self.0.as_ref()?.open_in_place(nonce, Aad::from(name), text).ok()?;
        Subject::parse(std::str::from_utf8(text).ok()?)
    }
}

fn type_named(text: &str) -> Option<RecordType> {
    RecordType::ALL.iter().copied().find(|record_type| record_type.key_part() == text)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{redis_server::RedisServer, tenant::ApiKey};

    async fn what_is_claimed_is_nobodys_until_its_lease_ends(redis: Option<Redis>) {
        let lease = Duration::from_millis(600);
        let index = Index::new(redis, 100);
        let tenant = Tenant::new("api.example.com".parse().unwrap(), ApiKey::new("key".into()));
        let subject = Subject::parse("203.0.113.7").unwrap();
        let hour = Duration::from_secs(3_600);
        let due_at_once = Entry::ahead([7; 16], RecordType::Host, subject.clone(), Duration::ZERO, hour);
        index.put(&tenant, &[due_at_once]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;

        let claimed = index.claim(&tenant, 10, lease).await.unwrap();
        assert!(matches!(&claimed.due[..], [due] if due.subject == subject && due.unread));
        let Schedule { next, entries } = claimed.schedule;
        assert!(entries == 1 && next.unwrap() <= lease, "{claimed:?}");
        let meanwhile = index.claim(&tenant, 10, lease).await.unwrap();
        assert!(meanwhile.due.is_empty(), "{meanwhile:?}");
        // Who claimed it was killed.
        tokio::time::sleep(lease + Duration::from_millis(20)).await;
        let again = index.claim(&tenant, 10, lease).await.unwrap();
        let [due] = <[Due; 1]>::try_from(again.due).unwrap();
        assert_eq!(due.subject, subject);
        // Who renews it takes it off the others' hands.
        index.put(&tenant, &[due.renewed(true, hour, hour)]).await.unwrap();
        tokio::time::sleep(lease + Duration::from_millis(20)).await;
        assert!(index.claim(&tenant, 10, lease).await.unwrap().due.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_claim_ends_with_its_lease_in_memory() {
        what_is_claimed_is_nobodys_until_its_lease_ends(None).await;
    }

    #[tokio::test]
    async fn a_claim_ends_with_its_lease_in_redis() {
        let server = RedisServer::start().await;
        what_is_claimed_is_nobodys_until_its_lease_ends(Some(Redis::to(&server.url()))).await;
    }

    /// One question tells which of all tenants have something due; who claims it takes it off the others' hands.
    #[tokio::test]
    async fn what_is_due_is_told_to_all_and_claimed_by_one() {
        let server = RedisServer::start().await;
        let index = || Index::new(Some(Redis::to(&server.url())), 100);
        let (one, other) = (index(), index());
        let tenant = |key: &str| Tenant::new("api.example.com".parse().unwrap(), ApiKey::new(key.into()));
        let (soon, later) = (tenant("soon"), tenant("later"));
        let hour = Duration::from_secs(3_600);
        let subject = Subject::parse("203.0.113.7").unwrap();
        let entry = |due| Entry::ahead([7; 16], RecordType::Host, subject.clone(), due, hour);
        let due = async |index: &Index| {
            *index.shared.as_ref().unwrap().asked.lock().unwrap() = None;
            match index.with_due().await.unwrap() {
                WithDue::Tenants(names) => names,
                WithDue::Untold => panic!("it is shared"),
            }
        };
        let only = |tenant: &Tenant| vec![tenant.label().to_string()];
        let none = Vec::<String>::new;
        assert_eq!(due(&one).await, none());
        one.put(&soon, &[entry(Duration::ZERO)]).await.unwrap();
        one.put(&later, &[entry(hour / 2)]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!((due(&one).await, due(&other).await), (only(&soon), only(&soon)));
        let lease = Duration::from_millis(400);
        assert_eq!(other.claim(&soon, 10, lease).await.unwrap().due.len(), 1);
        assert_eq!((due(&one).await, due(&other).await), (none(), none()));
        tokio::time::sleep(lease + Duration::from_millis(20)).await;
        assert_eq!(due(&one).await, only(&soon), "whoever claimed it is dead");

        // What somebody else puts in meanwhile is not lost by a claim.
        assert_eq!(one.claim(&soon, 10, hour).await.unwrap().due.len(), 1);
        other.put(&later, &[entry(Duration::ZERO)]).await.unwrap();
        let [first, second] = [6, 5].map(|name| Entry { name: [name; 16], ..entry(Duration::ZERO) });
        other.put(&soon, &[first]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(due(&one).await, only(&soon), "an entry is never due earlier than it was");
        // A Redis that has lost its memory is told again.
        let _: String = server.ask(&["FLUSHALL"]).await;
        assert_eq!(due(&one).await, none());
        assert_eq!(due(&other).await, none());
        other.put(&soon, &[second]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(due(&one).await, only(&soon));
        // What nobody does is not kept before the others for ever.
        let _: i64 = server.ask(&["ZADD", "relay:1:due", "1", &soon.label()]).await;
        assert_eq!(due(&one).await, none());
        assert_eq!(server.ask::<i64>(&["EXISTS", "relay:1:due"]).await, 0);
    }

    /// What a full index costs Redis, for a replica that joins and for one that puts entries in.
    #[tokio::test]
    async fn no_script_holds_redis_up_however_much_is_in_the_index() {
        let server = RedisServer::process(&[]).await;
        let index = Index::new(Some(Redis::to(&server.url())), 10_000);
        let tenant = Tenant::new("api.example.com".parse().unwrap(), ApiKey::new("key".into()));
        let hour = Duration::from_secs(3_600);
        let entry = |number: u32| {
            let subject = Subject::Ip(std::net::Ipv4Addr::from_bits(0xc612_0000 + number).into());
            let name = u128::from(number).to_be_bytes();
            Entry::ahead(name, RecordType::Host, subject, hour + Duration::from_secs(number.into()), hour)
        };
        for from in (0..11_000).step_by(500) {
            let entries: Vec<Entry> = (from..from + 500).map(entry).collect();
            assert_eq!(index.put(&tenant, &entries).await.unwrap().standings.len(), 500);
        }
        let recent = index.recent(&tenant, 500).await.unwrap();
        assert_eq!(recent.len(), 500);
        let last = entry(10_999).subject;
        assert!(
            recent[..50].iter().any(|(_, subject)| *subject == last),
            "the latest are not among the first"
        );
        // The mean: a machine that does something else meanwhile makes a single one long.
        let stats: String = server.ask(&["INFO", "commandstats"]).await;
        let cost =
            stats.split("cmdstat_evalsha:").nth(1).and_then(|rest| rest.split("usec_per_call=").nth(1));
        let cost: f64 = cost.unwrap().split(',').next().unwrap().parse().unwrap();
        eprintln!("a page of the index, which is full: {cost:.0} µs of Redis");
        assert!(cost < 5_000.0, "{cost} µs");
    }
}
