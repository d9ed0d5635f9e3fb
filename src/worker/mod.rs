//! The worker: what is asked for again and again is fetched again shortly before its end, so that nobody waits
//! for it. It owns what is worth that and how much of it there may be; it must not know where answers are
//! kept or how CyberScan is asked.
//!
//! - Every quarter of a second it collects what was read ([`Notes`]) into the index of recent answers, which
//!   replicas share where there is Redis (`index`).
//! - Shortly before an answer's end, one replica claims it from the index, and renews it if that is worth a
//!   call (`budget`). What is due is told for all tenants at once, so that one question a second is enough. A claim
//!   is a lease: what a dead replica had claimed is due again when it ends.
//! - Where analysts follow domains to their addresses, what is known about the address is fetched as soon as
//!   the domain is asked for (`relations`).
//! - Keys of tenants are in memory only, forgotten when they are idle and at once when CyberScan refuses them.
//!
//! The limiter lets prefetching use only what leaves its reserve to those who wait; the breaker's rest and
//! CyberScan's pauses are kept.

mod budget;
mod index;
mod relations;

use std::{
    collections::HashMap,
    future::Future,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{FutureExt, StreamExt, stream};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{debug, error};

use self::{
    budget::Budget,
    index::{Due, Entry, Index, Schedule, Standing, WithDue},
    relations::Relations,
};
use crate::{
    cache::{
        Cached, Renewed,
        reads::{Note, Notes},
        tier::{Key, SharedTier},
    },
    ctim::Subject,
    cyberscan::{Call, CyberScan, Error, Priority, RecordType},
    egress::HostPatterns,
    live::Live,
    metrics::{Metrics, Prefetch},
    redis_pool::Redis,
    tenant::{Tenant, TenantId},
};

/// Settings `worker.*`.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// `worker.enabled`: whether there is a worker at all.
    pub enabled: bool,
    /// `worker.budget`: calls it may cost beyond those that are made anyway, as a share of them.
    pub budget: f64,
    /// `worker.concurrency`: answers renewed at once.
    pub concurrency: usize,
    /// `worker.entries`: answers of a tenant that are watched.
    pub entries: usize,
    /// `worker.idle`: after so long without a request a tenant and its key are forgotten.
    pub idle: Duration,
    /// `cache.refresh_ahead`: in this last share of its life a read would renew an answer.
    pub refresh_ahead: f64,
}

/// How often reads are collected.
const TICK: Duration = Duration::from_millis(250);
/// Tenants that are looked after at once.
const ABREAST: usize = 32;
/// For how long a replica that claimed something keeps it from the others; longer than any renewal.
const LEASE: Duration = Duration::from_secs(30);
/// How long one renewal may take.
const RENEWAL: Duration = Duration::from_secs(20);
/// The pause after a failure that does not say how long.
const PAUSE: Duration = Duration::from_secs(10);
/// Relations that may wait for a turn, and how long.
const FOLLOWING: usize = 256;
const SOON: Duration = Duration::from_secs(5);
/// Answers brought from Redis into memory when a tenant is first seen.
const WARM: usize = 500;

/// What can be renewed: the cache stage.
pub trait Renew: Clone + Send + Sync + 'static {
    /// Renews one answer, unless it was renewed lately.
    fn renew(
        &self,
        call: &Call,
        record_type: RecordType,
        subject: &Subject,
    ) -> impl Future<Output = Result<Renewed, Error>> + Send;

    /// Brings answers from Redis into memory.
    fn warm(&self, tenant: &Tenant, answers: &[(RecordType, Subject)]) -> impl Future<Output = ()> + Send;
}

impl<P: CyberScan, T: SharedTier> Renew for Cached<P, T> {
    async fn renew(&self, call: &Call, record_type: RecordType, subject: &Subject) -> Result<Renewed, Error> {
        self.renew_ahead(call, record_type, subject).await
    }

    async fn warm(&self, tenant: &Tenant, answers: &[(RecordType, Subject)]) {
        Cached::warm(self, tenant, answers).await;
    }
}

/// The worker; a cheap clone.
pub struct Worker<C>(Arc<Inner<C>>);

impl<C> Clone for Worker<C> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

struct Inner<C> {
    cache: C,
    notes: Notes,
    config: Config,
    index: Index,
    metrics: Metrics,
    tasks: TaskTracker,
    turns: Arc<Semaphore>,
    /// Relations that are being fetched or wait for a turn.
    following: Arc<Semaphore>,
    books: Mutex<HashMap<TenantId, Book>>,
    live: Live<Changing>,
}

/// What of the settings may change while the worker works.
struct Changing {
    /// Where tenants may be; `None`: wherever they come from.
    hosts: Option<HostPatterns>,
    refresh_ahead: f64,
}

/// What is known of a tenant. Its key is in here, and nowhere else in the worker.
struct Book {
    tenant: Arc<Tenant>,
    seen: Instant,
    budget: Budget,
    relations: Relations,
    /// Nothing is renewed before.
    look: Instant,
    /// When something is due, as far as this replica knows.
    due: Option<Instant>,
    /// Answers on the tenant's schedule, as of the last look.
    scheduled: i64,
}

impl Book {
    fn new(tenant: Arc<Tenant>, share: f64, refresh_ahead: f64) -> Self {
        let (budget, now) = (Budget::new(share, refresh_ahead), Instant::now());
        Self {
            tenant,
            seen: now,
            budget,
            relations: Relations::default(),
            look: now,
            due: None,
            scheduled: 0,
        }
    }

    /// Notes what is on the schedule.
    fn planned(&mut self, schedule: Schedule) {
        self.due = schedule.next.map(|next| Instant::now() + next);
        self.scheduled = schedule.entries;
    }
}

impl<C: Renew> Worker<C> {
    /// A worker that renews what `notes` say is asked for in `cache`; its index is in `redis`, if there is one.
    #[must_use]
    pub fn new(
        cache: C,
        notes: Notes,
        config: Config,
        redis: Option<Redis>,
        metrics: Metrics,
        tasks: TaskTracker,
    ) -> Self {
        Self(Arc::new(Inner {
            cache,
            notes,
            index: Index::new(redis, config.entries),
            turns: Arc::new(Semaphore::new(config.concurrency)),
            following: Arc::new(Semaphore::new(FOLLOWING)),
            live: Live::new(Changing { hosts: None, refresh_ahead: config.refresh_ahead }),
            config,
            metrics,
            tasks,
            books: Mutex::default(),
        }))
    }

    /// From now on works for tenants of `hosts` only, whose readers renew in the last `refresh_ahead` of a life; the
    /// keys of other tenants are forgotten.
    pub fn reconfigure(&self, hosts: HostPatterns, refresh_ahead: f64) {
        self.0.live.set(Changing { hosts: Some(hosts), refresh_ahead });
        self.books().retain(|_, book| {
            book.budget.readers_renew_in(refresh_ahead);
            self.may_work_for(&book.tenant)
        });
    }

    fn may_work_for(&self, tenant: &Tenant) -> bool {
        self.0.live.get().hosts.as_ref().is_none_or(|hosts| hosts.allow(tenant.host()))
    }

    /// Works until `shutdown`. A panic costs the round it happens in.
    pub async fn run(self, shutdown: CancellationToken) {
        let working = async {
            loop {
                let round = std::panic::AssertUnwindSafe(self.round());
                if round.catch_unwind().await.is_err() {
                    self.0.metrics.panics.inc(());
                    error!("a round of the worker panicked");
                }
                sleep(TICK).await;
            }
        };
        let _: Option<()> = shutdown.run_until_cancelled(working).await;
    }

    /// Collects what was read, then renews what is due.
    async fn round(&self) {
        let mut by_tenant: HashMap<TenantId, Vec<Note>> = HashMap::new();
        for note in self.0.notes.collect().into_iter().filter(|note| self.may_work_for(&note.tenant)) {
            by_tenant.entry(note.tenant.id()).or_default().push(note);
        }
        stream::iter(by_tenant)
            .for_each_concurrent(ABREAST, |(id, notes)| async move { self.learn(id, &notes).await })
            .await;
        let now = Instant::now();
        {
            let mut books = self.books();
            books.retain(|_, book| now - book.seen < self.0.config.idle);
            self.0.index.retain(|id| books.contains_key(id));
            self.0.metrics.prefetch_scheduled.set((), books.values().map(|book| book.scheduled).sum());
            if books.is_empty() {
                return;
            }
        }
        let Ok(with_due) = self.0.index.with_due().await else { return };
        let due: Vec<Arc<Tenant>> = {
            let books = self.books();
            let may_work = books.values().filter(|book| book.look <= now);
            match with_due {
                WithDue::Untold => {
                    let due = may_work.filter(|book| book.due.is_some_and(|due| due <= now));
                    due.map(|book| Arc::clone(&book.tenant)).collect()
                }
                WithDue::Tenants(names) => {
                    let known: HashMap<Arc<str>, &Arc<Tenant>> =
                        may_work.map(|book| (book.tenant.label(), &book.tenant)).collect();
                    names
                        .iter()
                        .filter_map(|name| known.get(name.as_str()).copied())
                        .map(Arc::clone)
                        .collect()
                }
            }
        };
        // Each may claim its part of the turns there are.
        let share = self.0.turns.available_permits().div_ceil(due.len().max(1));
        let looking = |tenant| async move { self.look(&tenant, share).await };
        stream::iter(due).for_each_concurrent(ABREAST, looking).await;
    }

    /// Enters what a tenant has read into the index and its book.
    async fn learn(&self, id: TenantId, notes: &[Note]) {
        let Some(tenant) = notes.first().map(|note| Arc::clone(&note.tenant)) else { return };
        let (mut new, mut follow) = (false, Vec::new());
        let threshold = {
            let mut books = self.books();
            let book = books.entry(id).or_insert_with(|| {
                new = true;
                Book::new(Arc::clone(&tenant), self.0.config.budget, self.0.live.get().refresh_ahead)
            });
            (book.tenant, book.seen) = (Arc::clone(&tenant), Instant::now());
            for note in notes {
                if note.filled {
                    book.budget.filled();
                }
                book.relations.read(note, &mut follow);
            }
            book.budget.threshold()
        };
        if new {
            self.warm(&tenant);
        }
        for ip in follow {
            self.fetch_relations(&tenant, ip);
        }
        let entries: Vec<Entry> = notes.iter().map(Entry::read).collect();
        let standings = self.put(&tenant, &entries).await;
        for (note, standing) in notes.iter().zip(&standings) {
            note.reads.care(standing.scheduled && standing.expected >= threshold);
            if standing.useful {
                self.0.metrics.prefetch.inc((Prefetch::Useful,));
            }
        }
    }

    /// Brings the tenant's recent answers from Redis into memory, in the background.
    fn warm(&self, tenant: &Arc<Tenant>) {
        let (this, tenant) = (self.clone(), Arc::clone(tenant));
        self.0.tasks.spawn(async move {
            if let Ok(recent) = this.0.index.recent(&tenant, WARM).await {
                this.0.cache.warm(&tenant, &recent).await;
            }
        });
    }

    /// Fetches what is known of an address that a domain leads to, in the background.
    fn fetch_relations(&self, tenant: &Arc<Tenant>, ip: IpAddr) {
        for record_type in [RecordType::Vulnerabilities, RecordType::Host] {
            let (this, tenant) = (self.clone(), Arc::clone(tenant));
            let Ok(place) = Arc::clone(&self.0.following).try_acquire_owned() else { return };
            self.0.tasks.spawn(async move {
                let _place = place;
                let turn = timeout(SOON, Arc::clone(&this.0.turns).acquire_owned()).await;
                let Ok(Ok(turn)) = turn else { return };
                let subject = Subject::Ip(ip);
                let outcome = this.renew(turn, &tenant, record_type, &subject).await;
                if let Ok(Renewed { asked: true, expires_in: Some(expires_in), life }) = outcome {
                    let key = Key::new(&tenant, record_type, ip.to_string());
                    let entry = Entry::ahead(key.name, record_type, subject, expires_in, life);
                    this.put(&tenant, &[entry]).await;
                }
            });
        }
    }

    /// Claims what of a tenant is due, at most `most` answers, and renews what is worth it.
    async fn look(&self, tenant: &Arc<Tenant>, most: usize) {
        // Only what there are turns for is claimed: the rest is for others, or for later.
        let free = self.0.turns.available_permits().min(most);
        let turns = u32::try_from(free)
            .ok()
            .filter(|free| *free > 0)
            .and_then(|free| Arc::clone(&self.0.turns).try_acquire_many_owned(free).ok());
        let Some(mut turns) = turns else { return };
        let Ok(claimed) = self.0.index.claim(tenant, turns.num_permits(), LEASE).await else { return };
        self.with(tenant, |book| book.planned(claimed.schedule));
        let mut dropped = Vec::new();
        for due in claimed.due {
            self.0.metrics.prefetch.inc((Prefetch::Claimed,));
            self.0.metrics.prefetch_lag.observe((), due.overdue.as_secs_f64());
            if due.unread {
                self.0.metrics.prefetch.inc((Prefetch::Wasted,));
                self.with(tenant, |book| book.budget.wasted());
            }
            if due.unread {
                dropped.push(due.dropped());
            } else if let Some(turn) = turns.split(1) {
                if self.with(tenant, |book| book.budget.take(due.expected)).unwrap_or(false) {
                    self.renew_due(turn, tenant, due);
                } else {
                    self.0.metrics.prefetch.inc((Prefetch::OverBudget,));
                    dropped.push(due.dropped());
                }
            }
        }
        self.put(tenant, &dropped).await;
    }

    /// Puts entries into the index, and notes in the book what is due when. How each of them stands, if it could be done.
    async fn put(&self, tenant: &Tenant, entries: &[Entry]) -> Vec<Standing> {
        if entries.is_empty() {
            return Vec::new();
        }
        let Ok(taken) = self.0.index.put(tenant, entries).await else { return Vec::new() };
        self.with(tenant, |book| book.planned(taken.schedule));
        taken.standings
    }

    fn renew_due(&self, turn: OwnedSemaphorePermit, tenant: &Arc<Tenant>, due: Due) {
        let (this, tenant) = (self.clone(), Arc::clone(tenant));
        self.0.tasks.spawn(async move {
            let entry = match this.renew(turn, &tenant, due.record_type, &due.subject).await {
                Ok(Renewed { asked, expires_in: Some(expires_in), life }) => {
                    due.renewed(asked, expires_in, life)
                }
                // Whoever asks next finds out what is the matter.
                Ok(Renewed { expires_in: None, .. }) | Err(_) => due.dropped(),
            };
            this.put(&tenant, &[entry]).await;
        });
    }

    /// Renews one answer and draws the consequences for its tenant.
    async fn renew(
        &self,
        _turn: OwnedSemaphorePermit,
        tenant: &Arc<Tenant>,
        record_type: RecordType,
        subject: &Subject,
    ) -> Result<Renewed, Error> {
        let call = Call::new(Arc::clone(tenant), Instant::now() + RENEWAL, Priority::Prefetch);
        let outcome = timeout(RENEWAL, self.0.cache.renew(&call, record_type, subject)).await;
        let outcome = outcome.unwrap_or(Err(Error::TimedOut { after: RENEWAL }));
        let pause = |pause: Duration| {
            self.with(tenant, |book| book.look = book.look.max(Instant::now() + pause));
        };
        self.0.metrics.prefetch.inc((match &outcome {
            Ok(Renewed { asked: true, .. }) => Prefetch::Refreshed,
            Ok(_) => Prefetch::Unneeded,
            Err(Error::Unauthorized) => {
                self.books().remove(&tenant.id());
                Prefetch::NoCredentials
            }
            Err(Error::Throttled { retry_after } | Error::Limited { retry_after }) => {
                pause(*retry_after);
                Prefetch::Limited
            }
            Err(Error::Resting { retry_after }) => {
                pause((*retry_after).max(PAUSE));
                Prefetch::Resting
            }
            Err(_) => {
                debug!("an answer could not be renewed ahead");
                pause(PAUSE);
                Prefetch::Failed
            }
        },));
        outcome
    }

    fn with<R>(&self, tenant: &Tenant, change: impl FnOnce(&mut Book) -> R) -> Option<R> {
        self.books().get_mut(&tenant.id()).map(change)
    }

    fn books(&self) -> std::sync::MutexGuard<'_, HashMap<TenantId, Book>> {
        self.0.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenant::ApiKey;

    const HOUR: Duration = Duration::from_secs(3_600);

    #[derive(Clone)]
    struct Renewing;

    impl Renew for Renewing {
        async fn renew(&self, _: &Call, _: RecordType, _: &Subject) -> Result<Renewed, Error> {
            Ok(Renewed { asked: true, expires_in: Some(HOUR), life: HOUR })
        }

        async fn warm(&self, _: &Tenant, _: &[(RecordType, Subject)]) {}
    }

    #[tokio::test(start_paused = true)]
    async fn a_tenant_that_asks_no_more_is_forgotten_with_its_key() {
        let config = Config {
            enabled: true,
            budget: 0.1,
            concurrency: 4,
            entries: 100,
            idle: HOUR,
            refresh_ahead: 0.2,
        };
        let worker =
            Worker::new(Renewing, Notes::default(), config, None, Metrics::new(), TaskTracker::new());
        let tenant = Arc::new(Tenant::new("api.example.com".parse().unwrap(), ApiKey::new("key".into())));
        let subject = Subject::parse("203.0.113.7").unwrap();
        let note = Note {
            key: Key::new(&tenant, RecordType::Host, "203.0.113.7"),
            tenant: Arc::clone(&tenant),
            subject,
            address: None,
            expires_in: HOUR,
            life: HOUR,
            filled: true,
            reads: Arc::default(),
        };
        worker.learn(tenant.id(), &[note]).await;
        tokio::time::advance(HOUR - TICK).await;
        worker.round().await;
        assert_eq!(worker.books().len(), 1);
        tokio::time::advance(TICK).await;
        worker.round().await;
        assert!(worker.books().is_empty());
        assert_eq!(Arc::strong_count(&tenant), 1, "its key is still held");
    }
}
