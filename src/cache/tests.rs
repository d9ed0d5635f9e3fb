//! The stage in virtual time: a fake CyberScan behind it, a fake shared tier beside it, and as many
//! replicas as a test wants. The suite at the end runs over every shared tier.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64},
    },
};

use futures_util::future::join_all;
use tokio::{
    sync::{Notify, oneshot},
    time::{advance, sleep, timeout, timeout_at},
};

use super::{
    order::Scope,
    tier::{Claim, Event, Told, Value, Write},
    *,
};
use crate::{
    cyberscan::{Breaker, Priority, Tally},
    redis_pool::{Redis, Unavailable},
    redis_server::RedisServer,
    tenant::{ApiKey, Tenant},
};

const HOSTS: Wanted = Wanted { hosts: true, vulnerabilities: false };
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// A CyberScan under the test's control.
#[derive(Clone, Default)]
struct Fake(Arc<FakeState>);

#[derive(Default)]
struct FakeState {
    calls: AtomicU32,
    authentications: AtomicU32,
    latency: Mutex<Duration>,
    failure: Mutex<Option<Error>>,
    refused: AtomicBool,
    unknown: AtomicBool,
}

impl Fake {
    fn calls(&self) -> u32 {
        self.0.calls.load(Ordering::Relaxed)
    }

    fn takes(&self, latency: Duration) {
        *self.0.latency.lock().unwrap() = latency;
    }

    fn fails(&self, error: Option<Error>) {
        *self.0.failure.lock().unwrap() = error;
    }

    async fn answer<T>(&self, call: &Call, record: T) -> Result<Answer<T>, Error> {
        assert!(call.deadline > Instant::now(), "asked when it was too late");
        self.0.calls.fetch_add(1, Ordering::Relaxed);
        let asked_at = jiff::Timestamp::UNIX_EPOCH;
        let (latency, failure) = (*self.0.latency.lock().unwrap(), self.0.failure.lock().unwrap().clone());
        sleep(latency).await;
        match failure {
            Some(error) => Err(error),
            None if self.0.unknown.load(Ordering::Relaxed) => {
                Ok(Answer { record: Record::Unknown, asked_at, stale: None })
            }
            None => Ok(Answer { record: Record::Known(Arc::new(record)), asked_at, stale: None }),
        }
    }
}

impl CyberScan for Fake {
    async fn authenticate(&self, _: &Call) -> Result<Instant, Error> {
        self.0.authentications.fetch_add(1, Ordering::Relaxed);
        let latency = *self.0.latency.lock().unwrap();
        sleep(latency).await;
        if self.0.refused.load(Ordering::Relaxed) {
            return Err(Error::Unauthorized);
        }
        let failure = self.0.failure.lock().unwrap().clone();
        failure.map_or(Ok(Instant::now()), Err)
    }

    async fn domain(&self, call: &Call, _: &DomainName) -> Result<Answer<DomainRecord>, Error> {
        self.answer(call, DomainRecord { ip: Some(ip(1)), details_page: None }).await
    }

    async fn host(&self, call: &Call, _: IpAddr) -> Result<Answer<HostRecord>, Error> {
        self.answer(call, HostRecord { details_page: Some(self.calls().to_string()) }).await
    }

    async fn vulnerabilities(&self, call: &Call, _: IpAddr) -> Result<Answer<Vulnerabilities>, Error> {
        self.answer(call, Vulnerabilities(Vec::new())).await
    }
}

/// A shared tier in this process, with the promises of the real one. It is in the hands of a [`World`].
#[derive(Clone)]
struct FakeTier {
    world: Arc<World>,
    replica: u32,
    cut: Arc<AtomicBool>,
    fills: Arc<AtomicU32>,
    order: Arc<Order>,
    heard: Arc<AtomicU64>,
    waiting: Arc<Mutex<HashMap<Name, oneshot::Sender<Told>>>>,
    pending: Arc<Mutex<HashMap<Name, Write>>>,
}

/// What replicas share: a clock, and a memory that can be lost.
struct World {
    started: Instant,
    /// How far its clock was set, in microseconds.
    step: AtomicI64,
    /// It does nothing; what it is sent it does later.
    frozen: AtomicBool,
    /// What it was sent meanwhile.
    late: Mutex<Vec<(u32, Sent)>>,
    /// What another has, that follows it.
    copy: Mutex<WorldState>,
    /// How often its connections have broken.
    broken: AtomicU32,
    state: Mutex<WorldState>,
    changed: Notify,
    replicas: AtomicU32,
    names: AtomicU32,
}

/// What is under way when a replica has given up waiting.
enum Sent {
    Write(Prepared),
    Purge(Scope, u64),
}

/// A write as it is sent.
struct Prepared {
    name: Name,
    version: u64,
    horizon: u64,
    value: Option<Vec<u8>>,
    until: Instant,
    owner: Option<String>,
}

#[derive(Clone, Default)]
struct WorldState {
    name: u32,
    values: HashMap<Name, (u64, Vec<u8>, Instant)>,
    /// Owner, whether somebody waits, until when.
    locks: HashMap<Name, (String, bool, Instant)>,
    log: Vec<(u32, Happened)>,
    stamps: HashMap<Scope, u64>,
    ahead: u64,
    shown: u64,
    reads: u32,
}

/// Versions are the fleet's.
#[derive(Clone)]
enum Happened {
    Stored(Name, u64),
    Failed(Name, Error),
    Purged(Scope, u64),
    Stamps,
}

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            started: Instant::now(),
            step: AtomicI64::new(0),
            frozen: AtomicBool::new(false),
            late: Mutex::default(),
            copy: Mutex::default(),
            broken: AtomicU32::new(0),
            state: Mutex::default(),
            changed: Notify::new(),
            replicas: AtomicU32::new(0),
            names: AtomicU32::new(0),
        })
    }

    fn replica(self: &Arc<Self>) -> FakeTier {
        FakeTier {
            world: Arc::clone(self),
            replica: self.replicas.fetch_add(1, Ordering::Relaxed),
            cut: Arc::default(),
            fills: Arc::default(),
            order: Arc::default(),
            heard: Arc::default(),
            waiting: Arc::default(),
            pending: Arc::default(),
        }
    }

    /// Its memory is lost.
    fn forget(&self) {
        let name = self.names.fetch_add(1, Ordering::Relaxed) + 1;
        *self.state.lock().unwrap() = WorldState { name, ..WorldState::default() };
    }

    /// It goes on, with what it was sent before anything else.
    fn thaw(&self) {
        self.frozen.store(false, Ordering::Relaxed);
        let late = std::mem::take(&mut *self.late.lock().unwrap());
        let mut state = self.state.lock().unwrap();
        for (replica, sent) in late {
            match sent {
                Sent::Write(write) => self.apply(replica, &mut state, write),
                Sent::Purge(scope, version) => self.purge(replica, &mut state, scope, version),
            }
        }
    }

    /// Whoever followed it takes its place, with what it had got by then and a clock of its own.
    fn fail_over(&self, clock: i64) {
        self.late.lock().unwrap().clear();
        self.frozen.store(false, Ordering::Relaxed);
        self.set_clock(clock);
        *self.state.lock().unwrap() = self.copy.lock().unwrap().clone();
        self.broken.fetch_add(1, Ordering::Relaxed);
    }

    /// Whoever follows it has got all.
    fn follow(&self) {
        *self.copy.lock().unwrap() = self.state.lock().unwrap().clone();
    }

    fn happened(&self, replica: u32, state: &mut WorldState, happened: Happened) {
        state.log.push((replica, happened));
        self.changed.notify_waiters();
    }

    fn purge(&self, replica: u32, state: &mut WorldState, scope: Scope, version: u64) {
        let known = state.stamps.entry(scope).or_default();
        *known = version.max(*known);
        self.happened(replica, state, Happened::Purged(scope, version));
    }

    fn apply(&self, replica: u32, state: &mut WorldState, write: Prepared) {
        let Prepared { name, version, horizon, value, until, owner } = write;
        let now = Instant::now();
        let Some(value) = value else {
            state.locks.retain(|locked, (who, ..)| *locked != name || Some(&*who) != owner.as_ref());
            return;
        };
        let present = state.values.get(&name).filter(|(.., until)| now < *until);
        let (there, stays) = (
            present.is_some(),
            present.is_some_and(|(present, ..)| *present > version && *present <= horizon),
        );
        if !stays {
            state.values.insert(name, (version, value, until));
        }
        let lock = state.locks.get(&name).filter(|(.., until)| now < *until).cloned();
        if lock.as_ref().map(|(who, ..)| who) == owner.as_ref() {
            state.locks.remove(&name);
        }
        if lock.is_some_and(|(_, waited, _)| waited) || (there && !stays) {
            self.happened(replica, state, Happened::Stored(name, version));
        }
    }

    /// Its clock is set. What a frozen one was sent is taken to be lost then: a write from before, told by a clock that nobody
    /// has any more, would look as if it came later than a purge after it.
    fn set_clock(&self, by: i64) {
        self.late.lock().unwrap().clear();
        self.step.fetch_add(by, Ordering::Relaxed);
    }

    /// What the clock would show by itself, and what it shows.
    fn show(&self, state: &mut WorldState, known: u64) -> (u64, u64) {
        const BEGAN: u64 = 1_767_225_600_000_000;
        let now = (BEGAN + order::micros(self.started.elapsed()))
            .saturating_add_signed(self.step.load(Ordering::Relaxed));
        let by_itself = now + state.ahead;
        let mut shown = state.shown.max(known);
        if shown > by_itself + 50_000 {
            state.ahead = shown - now;
        } else {
            shown = by_itself;
        }
        state.shown = shown;
        (by_itself, shown)
    }
}

/// How long what others tell counts as known.
const HEARD: Duration = Duration::from_secs(5);

impl FakeTier {
    fn state(&self) -> Result<std::sync::MutexGuard<'_, WorldState>, Unavailable> {
        let away = self.cut.load(Ordering::Relaxed) || self.world.frozen.load(Ordering::Relaxed);
        if away { Err(Unavailable) } else { Ok(self.world.state.lock().unwrap()) }
    }

    /// What is sent to a tier that is frozen is done when it goes on, whether or not somebody waits for it still.
    fn send_late(&self, sent: Sent) {
        if self.world.frozen.load(Ordering::Relaxed) && !self.cut.load(Ordering::Relaxed) {
            self.world.late.lock().unwrap().push((self.replica, sent));
        }
    }

    fn hears(&self) -> bool {
        let heard = self.heard.load(Ordering::Relaxed);
        heard > 0 && self.order.clock().age(heard) < HEARD
    }

    fn happened(&self, state: &mut WorldState, happened: Happened) {
        self.world.happened(self.replica, state, happened);
    }

    fn write(&self, write: &Write) -> Result<(), Unavailable> {
        let clock = self.order.clock();
        let (Some(version), Some(horizon)) = (clock.shared(write.version), clock.horizon()) else {
            return Err(Unavailable);
        };
        let value = (write.until > Instant::now()).then(|| (write.value.0)(version)).flatten();
        let Write { name, until, owner, .. } = write.clone();
        let prepared = Prepared { name, version, horizon, value, until, owner };
        match self.state() {
            Ok(mut state) => self.world.apply(self.replica, &mut state, prepared),
            Err(unavailable) => {
                self.send_late(Sent::Write(prepared));
                return Err(unavailable);
            }
        }
        Ok(())
    }

    /// Looks whether all is as it was, and compares stamps if it is not.
    fn look(&self, state: &mut WorldState, anew: bool, hear: &impl Fn(Event)) {
        let clock = self.order.clock();
        let (by_itself, shown) = self.world.show(state, clock.shared(clock.now()).unwrap_or(0));
        let ahead = Duration::from_micros(shown.saturating_sub(by_itself));
        let mut stepped = self.order.compare(shown) == order::Compared::Stepped;
        if ahead > order::TOLERANCE && !stepped {
            self.order.doubt();
            stepped = true;
        }
        if !anew && !stepped && !self.order.is_untold() {
            return;
        }
        let stamps: Vec<(Scope, u64)> =
            state.stamps.iter().map(|(scope, version)| (*scope, *version)).collect();
        let learned = self.order.learn(&stamps);
        for (scope, version) in learned.new {
            hear(Event::Purged { scope, version });
        }
        let lacking = !learned.lacking.is_empty();
        for telling in learned.lacking {
            state.stamps.insert(telling.scope, telling.shared);
            self.order.told(&[telling]);
        }
        if lacking {
            self.happened(state, Happened::Stamps);
        }
    }

    /// Follows for as long as the tier is there; answers the pending writes that can be made now.
    fn listen(&self, place: &mut Place, hear: &impl Fn(Event)) -> Result<(), Unavailable> {
        let mut state = self.state().inspect_err(|_| place.looked = None)?;
        let (name, broken) = (state.name, self.world.broken.load(Ordering::Relaxed));
        let anew = place.looked.is_none() || name != place.name || broken != place.broken;
        if name != place.name || place.cursor > state.log.len() {
            (place.cursor, place.name) = (0, name);
        }
        place.broken = broken;
        if anew || place.looked.is_some_and(|looked| looked.elapsed() >= 2 * SECOND) {
            if place.first {
                (place.first, place.cursor) = (false, state.log.len());
            }
            self.look(&mut state, anew, hear);
            place.looked = Some(Instant::now());
        }
        let news = state.log.get(place.cursor..).unwrap_or_default().to_vec();
        place.cursor = state.log.len();
        self.heard.store(self.order.clock().now(), Ordering::Relaxed);
        let clock = self.order.clock();
        for (_, happened) in news.into_iter().filter(|(origin, _)| *origin != self.replica) {
            let wake = |name: Name, told: Told| {
                if let Some(teller) = self.waiting.lock().unwrap().remove(&name) {
                    let _ = teller.send(told);
                }
            };
            match happened {
                Happened::Stored(name, version) => {
                    hear(Event::Stored { name, version: clock.own(version).unwrap() });
                    wake(name, Told::Stored);
                }
                Happened::Failed(name, error) => wake(name, Told::Failed(error)),
                Happened::Purged(scope, version) => {
                    if let Some(version) = self.order.hear(scope, version) {
                        hear(Event::Purged { scope, version });
                    }
                }
                Happened::Stamps => place.looked = None,
            }
        }
        drop(state);
        let pending: Vec<Write> = self.pending.lock().unwrap().drain().map(|(_, write)| write).collect();
        for write in pending {
            self.write(&write)?;
        }
        Ok(())
    }
}

/// Where a replica is with what the others tell.
struct Place {
    first: bool,
    name: u32,
    broken: u32,
    cursor: usize,
    looked: Option<Instant>,
}

impl SharedTier for FakeTier {
    fn order(&self) -> &Order {
        &self.order
    }

    async fn read(&self, names: &[Name]) -> Result<Vec<Option<Vec<u8>>>, Unavailable> {
        let mut state = self.state()?;
        if !self.hears() {
            return Err(Unavailable);
        }
        state.reads += 1;
        let now = Instant::now();
        let live = |name: &Name| {
            let value = state.values.get(name).filter(|(.., until)| now < *until);
            value.map(|(_, value, _)| value.clone())
        };
        Ok(names.iter().map(live).collect())
    }

    async fn claim(&self, name: Name, version: u64, lease: Duration) -> Result<Claim, Unavailable> {
        let (teller, told) = oneshot::channel();
        let mut state = self.state()?;
        let clock = self.order.clock();
        let (true, Some(version), Some(horizon)) = (self.hears(), clock.shared(version), clock.horizon())
        else {
            return Err(Unavailable);
        };
        let now = Instant::now();
        if let Some((present, value, until)) = state.values.get(&name)
            && *present > version
            && *present <= horizon
            && now < *until
        {
            return Ok(Claim::Value(value.clone()));
        }
        if let Some((_, waited, _)) = state.locks.get_mut(&name).filter(|(.., until)| now < *until) {
            *waited = true;
            self.waiting.lock().unwrap().insert(name, teller);
            return Ok(Claim::Follower(told));
        }
        let owner = format!("{}-{}", self.replica, self.fills.fetch_add(1, Ordering::Relaxed));
        state.locks.insert(name, (owner.clone(), false, now + lease));
        Ok(Claim::Leader(owner))
    }

    async fn store(&self, write: Write) {
        if self.write(&write).is_err() {
            let mut pending = self.pending.lock().unwrap();
            if pending.get(&write.name).is_none_or(|present| present.version < write.version) {
                pending.insert(write.name, Write { owner: None, ..write });
            }
        }
    }

    async fn release(&self, name: Name, owner: String, error: &Error) {
        let Ok(mut state) = self.state() else { return };
        if let Some((holder, waited, _)) = state.locks.get(&name).cloned()
            && holder == owner
        {
            state.locks.remove(&name);
            if waited {
                self.happened(&mut state, Happened::Failed(name, error.clone()));
            }
        }
    }

    async fn tell(&self, scope: Scope) -> Result<(), Unavailable> {
        let telling = self.order.telling(scope).filter(|_| self.hears()).ok_or(Unavailable)?;
        match self.state() {
            Ok(mut state) => self.world.purge(self.replica, &mut state, scope, telling.shared),
            Err(unavailable) => {
                self.send_late(Sent::Purge(scope, telling.shared));
                return Err(unavailable);
            }
        }
        self.order.told(&[telling]);
        Ok(())
    }

    async fn follow(self, shutdown: CancellationToken, hear: impl Fn(Event) + Send + Sync + 'static) {
        let mut place = Place { first: true, name: 0, broken: 0, cursor: 0, looked: None };
        let following = async {
            loop {
                let changed = self.world.changed.notified();
                let _ = self.listen(&mut place, &hear);
                let _ = timeout(SECOND / 20, changed).await;
            }
        };
        let _: Option<()> = shutdown.run_until_cancelled(following).await;
    }
}

type Stage = Cached<Breaker<Fake>, FakeTier>;

fn config() -> Config {
    let policy = Policy {
        fresh: HOUR,
        stale_while_revalidate: HOUR,
        stale_if_error: 24 * HOUR,
        negative: 5 * MINUTE,
        refresh_ahead: 0.2,
    };
    Config {
        memory: 64 << 20,
        domain: policy,
        host: policy,
        vulnerabilities: policy,
        soft_timeout: SECOND / 3,
        fill_timeout: 15 * SECOND,
        revalidate: 15 * MINUTE,
        encryption_keys: vec![[7; 32]],
    }
}

fn stage_with(fake: &Fake, config: Config, shared: Option<FakeTier>) -> Stage {
    Cached::new(
        Breaker::new(fake.clone()),
        config,
        shared,
        Metrics::new(),
        TaskTracker::new(),
        CancellationToken::new(),
    )
}

fn stage(fake: &Fake) -> Stage {
    stage_with(fake, config(), None)
}

fn ip(number: u32) -> IpAddr {
    Ipv4Addr::from_bits(u32::from_be_bytes([198, 18, 0, 0]) + number).into()
}

fn call_of(key: &str, wait: Duration) -> Call {
    let tenant = Tenant::new("api.example.com".parse().unwrap(), ApiKey::new(key.into()));
    Call::new(Arc::new(tenant), Instant::now() + wait, Priority::Interactive)
}

fn call() -> Call {
    call_of("key", 20 * SECOND)
}

/// Lets background tasks run without moving the clock by anything that matters.
async fn settle() {
    sleep(Duration::from_millis(1)).await;
}

fn down() -> Error {
    Error::Unavailable { status: 503 }
}

#[tokio::test(start_paused = true)]
async fn who_found_nothing_just_before_a_fill_ended_does_not_ask_again() {
    let fake = Fake::default();
    let stage = stage(&fake);
    let (call, subject) = (call(), ip(1));
    let key = Key::new(&call.tenant, RecordType::Host, subject.to_string());
    let fill = async |version| {
        let filled = stage.fill_by::<HostRecord>(&key, &call, &subject, version, call.deadline).await;
        filled.map(|filled| filled.kept.version)
    };
    let first = fill(0).await.unwrap();
    assert_eq!(fill(0).await, Ok(first));
    assert_eq!(fake.calls(), 1);
    settle().await;
    assert!(fill(first).await.unwrap() > first, "a newer one was asked for");
    assert_eq!(fake.calls(), 2);

    fake.fails(Some(down()));
    assert_eq!(fill(u64::MAX).await, Err(down()));
    assert!(stage.start_fill::<HostRecord>(&key, &call, &subject, u64::MAX).is_none());
    assert_eq!(fake.calls(), 3);
}

/// A CyberScan with moods: it answers, refuses, takes long, never answers or has a bug. It knows how often it is
/// asked about one address at a time.
#[derive(Clone)]
struct Moody {
    number: Arc<Mutex<u64>>,
    under_way: Arc<Mutex<HashMap<IpAddr, u32>>>,
    /// The most there ever were.
    most: Arc<AtomicU32>,
    calm: Arc<AtomicBool>,
}

/// A question under way, however it ends.
struct Asked(Moody, IpAddr);

impl Moody {
    fn new(seed: u64) -> Self {
        Self {
            number: Arc::new(Mutex::new(seed)),
            under_way: Arc::default(),
            most: Arc::default(),
            calm: Arc::default(),
        }
    }

    /// A number that looks like chance and is the same for the same seed.
    fn below(&self, below: u64) -> u64 {
        let mut number = self.number.lock().unwrap();
        *number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*number >> 33) % below
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        *self.0.under_way.lock().unwrap().get_mut(&self.1).unwrap() -= 1;
    }
}

impl CyberScan for Moody {
    async fn authenticate(&self, _: &Call) -> Result<Instant, Error> {
        Ok(Instant::now())
    }

    async fn domain(&self, _: &Call, _: &DomainName) -> Result<Answer<DomainRecord>, Error> {
        Err(Error::Lost)
    }

    async fn host(&self, _: &Call, ip: IpAddr) -> Result<Answer<HostRecord>, Error> {
        let now = {
            let mut under_way = self.under_way.lock().unwrap();
            let now = under_way.entry(ip).or_insert(0);
            *now += 1;
            *now
        };
        self.most.fetch_max(now, Ordering::Relaxed);
        let _asked = Asked(self.clone(), ip);
        sleep(Duration::from_millis(self.below(400))).await;
        match self.below(8) {
            _ if self.calm.load(Ordering::Relaxed) => {}
            0 => std::panic::resume_unwind(Box::new("a bug")),
            1 => std::future::pending().await,
            2..4 => return Err(down()),
            _ => {}
        }
        let record = Record::Known(Arc::new(HostRecord { details_page: None }));
        Ok(Answer { record, asked_at: jiff::Timestamp::UNIX_EPOCH, stale: None })
    }

    async fn vulnerabilities(&self, _: &Call, _: IpAddr) -> Result<Answer<Vulnerabilities>, Error> {
        Err(Error::Lost)
    }
}

#[tokio::test(start_paused = true)]
async fn callers_come_and_go_whatever_becomes_of_fills() {
    for seed in 0..300 {
        let moody = Moody::new(seed);
        let (world, stop) = (World::new(), CancellationToken::new());
        // Alone, or two that share a tier.
        let replicas: Vec<Cached<Moody, FakeTier>> = (0..1 + seed % 2)
            .map(|_| {
                let shared = (seed % 2 == 1).then(|| world.replica());
                let (metrics, tasks) = (Metrics::new(), TaskTracker::new());
                Cached::new(moody.clone(), config(), shared, metrics, tasks, stop.clone())
            })
            .collect();
        let callers: Vec<_> = (0..40)
            .map(|_| {
                let stage = replicas[moody.below(replicas.len() as u64) as usize].clone();
                let millis = |below| Duration::from_millis(moody.below(below));
                let (comes, patience, leaves) = (millis(90_000), millis(40_000), millis(2_000));
                let ip = ip(moody.below(2) as u32);
                let leaves = (moody.below(3) == 0).then_some(leaves);
                async move {
                    sleep(comes).await;
                    let asked = call_of("key", patience);
                    let latest = Instant::now() + leaves.unwrap_or(patience + SECOND / 1_000);
                    let outcome = timeout_at(latest, stage.host(&asked, ip)).await;
                    assert!(outcome.is_ok() || leaves.is_some(), "seed {seed}: who stayed has no outcome");
                }
            })
            .collect();
        join_all(callers).await;
        // What is still under way comes to its end, also where a lease has to run out first.
        moody.calm.store(true, Ordering::Relaxed);
        sleep(2 * MINUTE).await;
        for stage in &replicas {
            assert!(stage.0.flights.is_empty(), "seed {seed}: a fill is over and still in the table");
            for number in 0..2 {
                assert!(stage.host(&call(), ip(number)).await.is_ok(), "seed {seed}: it can be asked again");
            }
        }
        assert_eq!(
            moody.most.load(Ordering::Relaxed),
            1,
            "seed {seed}: asked twice at a time about one address"
        );
        let left = moody.under_way.lock().unwrap().values().sum::<u32>();
        assert_eq!(left, 0, "seed {seed}: a question is still under way");
        stop.cancel();
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_passes_through_every_state_of_its_life() {
    let fake = Fake::default();
    let stage = stage(&fake);
    let ask = async || stage.host(&call(), ip(1)).await;
    ask().await.unwrap();
    ask().await.unwrap();
    assert_eq!(fake.calls(), 1, "fresh");

    advance(55 * MINUTE).await;
    ask().await.unwrap();
    settle().await;
    assert_eq!(fake.calls(), 2, "near its end: renewed in the background");
    ask().await.unwrap();
    assert_eq!(fake.calls(), 2);

    advance(100 * MINUTE).await;
    fake.takes(5 * SECOND);
    let asked = Instant::now();
    let answer = ask().await.unwrap();
    assert_eq!(
        (answer.stale, asked.elapsed()),
        (None, Duration::ZERO),
        "stale: at once, renewed in the background"
    );
    sleep(6 * SECOND).await;
    assert_eq!(fake.calls(), 3);

    advance(3 * HOUR).await;
    fake.takes(Duration::ZERO);
    ask().await.unwrap();
    assert_eq!(fake.calls(), 4, "older: CyberScan is asked first");

    advance(30 * HOUR).await;
    fake.fails(Some(down()));
    assert_eq!(ask().await.err(), Some(down()), "too old to be served");
}

#[tokio::test(start_paused = true)]
async fn what_is_renewed_ahead_costs_one_call_in_half_a_life() {
    let about = [
        (RecordType::Domain, Subject::Domain(DomainName::parse("example.com").unwrap())),
        (RecordType::Host, Subject::Ip(ip(1))),
        (RecordType::Vulnerabilities, Subject::Ip(ip(1))),
    ];
    let fake = Fake::default();
    let stage = stage(&fake);
    for (record_type, subject) in &about {
        let calls = fake.calls();
        let ahead = || Call { priority: Priority::Prefetch, ..call() };
        let renew = async || stage.renew_ahead(&ahead(), *record_type, subject).await.unwrap();
        let Renewed { asked: true, expires_in: Some(expires_in), life } = renew().await else {
            panic!("{record_type:?}: nobody was asked")
        };
        assert!(life - expires_in < SECOND, "{record_type:?}: {expires_in:?} of {life:?}");
        advance(life / 2 - SECOND).await;
        assert!(!renew().await.asked, "{record_type:?}: it is young");
        advance(SECOND).await;
        assert!(renew().await.asked, "{record_type:?}: half its life is over");
        assert_eq!(fake.calls(), calls + 2);
    }
    // What cannot be asked is no answer.
    let nonsense = stage.renew_ahead(&call(), RecordType::Domain, &about[1].1).await;
    assert_eq!(nonsense, Err(Error::Lost));
}

#[tokio::test(start_paused = true)]
async fn a_reader_leaves_renewing_to_whoever_cares_until_it_is_late() {
    let fake = Fake::default();
    let stage = stage(&fake);
    let notes = stage.notes();
    let ask = async || {
        stage.host(&call(), ip(1)).await.unwrap();
        settle().await;
    };
    ask().await;
    let [note] = &notes.collect()[..] else { panic!("not one note") };
    note.reads.care(true);
    let late = lead(note.life) / 2;
    advance(note.life - late - SECOND).await;
    ask().await;
    assert_eq!(fake.calls(), 1, "a reader did what somebody else will do");
    advance(SECOND).await;
    ask().await;
    assert_eq!(fake.calls(), 2, "nobody did it");
}

#[tokio::test(start_paused = true)]
async fn a_stale_answer_stands_in_for_a_cyberscan_that_fails_or_is_slow() {
    let fake = Fake::default();
    let stage = stage(&fake);
    stage.host(&call(), ip(1)).await.unwrap();
    advance(5 * HOUR).await;

    fake.fails(Some(down()));
    let answer = stage.host(&call(), ip(1)).await.unwrap();
    assert!(answer.stale.unwrap() >= 5 * HOUR);
    for _ in 0..10 {
        assert!(stage.host(&call(), ip(1)).await.unwrap().stale.is_some());
    }
    assert_eq!(fake.calls(), 2, "it was asked again before its pause was over");

    advance(MINUTE).await;
    fake.fails(None);
    fake.takes(5 * SECOND);
    let asked = Instant::now();
    assert!(stage.host(&call(), ip(1)).await.unwrap().stale.is_some());
    assert!(asked.elapsed() <= SECOND / 2, "waited {:?}", asked.elapsed());
    sleep(6 * SECOND).await;
    assert_eq!(stage.host(&call(), ip(1)).await.unwrap().stale, None, "the slow answer was kept");
}

#[tokio::test(start_paused = true)]
async fn a_request_is_told_where_its_answers_came_from() {
    let (fake, world) = (Fake::default(), World::new());
    let stages = [world.replica(), world.replica()].map(|tier| stage_with(&fake, config(), Some(tier)));
    let ask = async |stage: &Stage| {
        let call = call();
        let _ = stage.host(&call, ip(1)).await;
        settle().await;
        let Tally { memory, redis, upstream, stale, failed } = &*call.tally;
        [memory, redis, upstream, stale, failed].map(|count| count.load(Ordering::Relaxed))
    };
    assert_eq!(ask(&stages[0]).await, [0, 0, 1, 0, 0]);
    assert_eq!(ask(&stages[0]).await, [1, 0, 0, 0, 0]);
    assert_eq!(ask(&stages[1]).await, [0, 1, 0, 0, 0]);
    advance(5 * HOUR).await;
    assert_eq!(ask(&stages[0]).await, [0, 0, 1, 0, 0], "older than may be served, and CyberScan answers");
    advance(5 * HOUR).await;
    fake.fails(Some(down()));
    assert_eq!(ask(&stages[0]).await, [1, 0, 0, 1, 0]);
    advance(48 * HOUR).await;
    assert_eq!(ask(&stages[0]).await, [0, 0, 0, 0, 1]);
}

#[tokio::test(start_paused = true)]
async fn not_known_is_kept_shortly_and_never_served_past_its_time() {
    let fake = Fake::default();
    fake.0.unknown.store(true, Ordering::Relaxed);
    let stage = stage(&fake);
    for _ in 0..5 {
        assert_eq!(stage.host(&call(), ip(1)).await.unwrap().record, Record::Unknown);
    }
    assert_eq!(fake.calls(), 1);
    advance(6 * MINUTE).await;
    fake.fails(Some(down()));
    assert_eq!(stage.host(&call(), ip(1)).await.err(), Some(down()));
}

#[tokio::test(start_paused = true)]
async fn errors_are_never_kept_as_answers_and_their_pause_grows() {
    let fake = Fake::default();
    fake.fails(Some(down()));
    let stage = stage(&fake);
    let mut asked_at = Vec::new();
    let start = Instant::now();
    while start.elapsed() < MINUTE {
        let before = fake.calls();
        assert_eq!(stage.host(&call(), ip(1)).await.err(), Some(down()));
        if fake.calls() > before {
            asked_at.push(start.elapsed());
        }
        advance(SECOND / 10).await;
    }
    assert!((5..=8).contains(&asked_at.len()), "{asked_at:?}");
    let pauses: Vec<Duration> = asked_at.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(pauses.windows(2).all(|pair| pair[1] > pair[0]), "{pauses:?}");
    fake.fails(None);
    advance(MINUTE).await;
    assert!(stage.host(&call(), ip(1)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn impatient_callers_cost_one_call_and_the_patient_are_served() {
    let fake = Fake::default();
    fake.takes(SECOND * 3 / 10);
    let stage = stage(&fake);
    let callers = (0..10_000).map(|i| {
        let (stage, patience) = (stage.clone(), if i % 10 == 0 { SECOND } else { SECOND / 5 });
        async move { timeout(patience, stage.host(&call(), ip(1))).await }
    });
    let outcomes = join_all(callers).await;
    assert_eq!(outcomes.iter().filter(|outcome| matches!(outcome, Ok(Ok(_)))).count(), 1_000);
    assert_eq!(fake.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_failure_reaches_all_who_wait_in_the_moment_it_happens() {
    let fake = Fake::default();
    fake.takes(SECOND);
    fake.fails(Some(down()));
    let stage = stage(&fake);
    let asked = Instant::now();
    let outcomes = join_all((0..1_000).map(|_| {
        let stage = stage.clone();
        async move { (stage.host(&call(), ip(1)).await.err(), asked.elapsed()) }
    }))
    .await;
    assert!(
        outcomes.iter().all(|(error, waited)| *error == Some(down()) && *waited <= SECOND + SECOND / 200)
    );
    assert_eq!(fake.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_question_that_hangs_is_given_up_and_can_be_asked_again() {
    let fake = Fake::default();
    fake.takes(HOUR);
    let stage = stage(&fake);
    let error = stage.host(&call_of("key", SECOND), ip(1)).await.err();
    assert_eq!(error, Some(Error::TimedOut { after: SECOND }));
    sleep(20 * SECOND).await;
    fake.takes(Duration::ZERO);
    assert!(stage.host(&call(), ip(1)).await.is_ok());
    assert_eq!(fake.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_key_counts_as_accepted_for_its_time_and_a_refused_one_gets_nothing_old() {
    let fake = Fake::default();
    let stage = stage(&fake);
    for _ in 0..100 {
        stage.authenticate(&call()).await.unwrap();
    }
    assert_eq!(fake.0.authentications.load(Ordering::Relaxed), 1);
    stage.host(&call(), ip(1)).await.unwrap();

    fake.0.refused.store(true, Ordering::Relaxed);
    assert!(stage.authenticate(&call()).await.is_ok(), "within its time");
    advance(15 * MINUTE).await;
    for _ in 0..10 {
        assert_eq!(stage.authenticate(&call()).await.err(), Some(Error::Unauthorized));
    }
    assert_eq!(fake.0.authentications.load(Ordering::Relaxed), 2, "asked again in the pause after a refusal");
    // What was kept for it is gone, should the key ever come back.
    fake.fails(Some(down()));
    assert_eq!(stage.host(&call(), ip(1)).await.err(), Some(down()));
}

#[tokio::test(start_paused = true)]
async fn while_cyberscan_is_down_tenants_accepted_before_go_on_being_served() {
    let fake = Fake::default();
    let stage = stage(&fake);
    stage.authenticate(&call()).await.unwrap();
    stage.host(&call(), ip(1)).await.unwrap();
    fake.fails(Some(down()));
    fake.takes(10 * SECOND);
    for _ in 0..20 {
        advance(HOUR).await;
        let asked = Instant::now();
        stage.authenticate(&call()).await.unwrap();
        stage.host(&call(), ip(1)).await.unwrap();
        assert!(asked.elapsed() < SECOND, "waited {:?}", asked.elapsed());
    }
    let stranger = call_of("stranger", 20 * SECOND);
    assert!(stage.authenticate(&stranger).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn data_refused_for_a_key_is_never_answered_from_what_is_old() {
    let fake = Fake::default();
    let stage = stage(&fake);
    stage.host(&call(), ip(1)).await.unwrap();
    advance(5 * HOUR).await;
    fake.fails(Some(Error::Unauthorized));
    assert_eq!(stage.host(&call(), ip(1)).await.err(), Some(Error::Unauthorized));
}

#[tokio::test(start_paused = true)]
async fn tenants_share_nothing() {
    let fake = Fake::default();
    let stage = stage(&fake);
    for tenant in 0..50 {
        for subject in 0..20 {
            let call = call_of(&format!("key-{tenant}"), 20 * SECOND);
            let record = stage.host(&call, ip(subject)).await.unwrap();
            // Every answer of the fake carries its own number.
            let number = (fake.calls() - 1).to_string();
            assert_eq!(record.record.known().unwrap().details_page, Some(number));
        }
    }
    assert_eq!(fake.calls(), 1_000);
    stage.purge_label(call_of("key-7", SECOND).tenant.id().label()).await.unwrap();
    for tenant in 0..50 {
        stage.host(&call_of(&format!("key-{tenant}"), 20 * SECOND), ip(3)).await.unwrap();
    }
    assert_eq!(fake.calls(), 1_001, "a purge of one tenant took others along");
}

#[tokio::test(start_paused = true)]
async fn what_is_purged_about_a_subject_is_purged_for_all_tenants_and_nothing_else() {
    let fake = Fake::default();
    let stage = stage(&fake);
    let ask = async || {
        for call in ["a", "b"].map(|key| call_of(key, 20 * SECOND)) {
            stage.authenticate(&call).await.unwrap();
            stage.host(&call, ip(1)).await.unwrap();
            stage.vulnerabilities(&call, ip(1)).await.unwrap();
            stage.host(&call, ip(2)).await.unwrap();
        }
        fake.calls()
    };
    assert_eq!((ask().await, ask().await), (6, 6));
    stage.purge_subject(&Subject::Ip(ip(1))).await.unwrap();
    assert_eq!(ask().await, 10);
}

/// A fetch that began in the very moment of a purge may have been answered before it.
#[tokio::test(start_paused = true)]
async fn a_value_as_old_as_a_purge_is_not_served() {
    let fake = Fake::default();
    let stage = stage(&fake);
    let version = async || {
        stage.host(&call(), ip(1)).await.unwrap();
        let key = Key::new(&call().tenant, RecordType::Host, ip(1).to_string());
        stage.0.memory.get(&key.name).unwrap().version
    };
    let first = version().await;
    advance(SECOND).await;
    stage.order().purge(Scope::Tenant(call().tenant.name()), first - 1);
    assert_eq!((version().await, fake.calls()), (first, 1));
    stage.order().purge(Scope::Tenant(call().tenant.name()), first);
    assert!(version().await > first);
    assert_eq!(fake.calls(), 2);
}

#[test]
fn an_answer_weighs_what_it_occupies() {
    use crate::{ctim::sighting::Severity, cyberscan::Finding};
    // Its texts, what holds them, and for each text not more than an allocator adds.
    let within = |weight: usize, inline: usize, texts: &[usize]| {
        let least = inline + texts.iter().sum::<usize>();
        assert!((least..=least + 64 * texts.len()).contains(&weight), "{weight} for {inline} and {texts:?}");
    };
    let text = |length: usize| Some("x".repeat(length));
    within(HostRecord { details_page: None }.weight(), size_of::<HostRecord>(), &[]);
    within(HostRecord { details_page: text(900) }.weight(), size_of::<HostRecord>(), &[900]);
    within(DomainRecord { ip: None, details_page: text(900) }.weight(), size_of::<DomainRecord>(), &[900]);

    let bare = Finding {
        table: Vec::new(),
        name: None,
        description: None,
        cve: None,
        cves: Vec::new(),
        severity: Severity::High,
        cvss: None,
        detection_quality: None,
    };
    let table = || (0..3).map(|_| ("key".repeat(10), "value".repeat(10))).collect::<Vec<_>>();
    let cves = || vec!["CVE-2021-42013".to_owned(); 4];
    let strings = |count: usize| count * size_of::<String>();
    for (finding, extra, texts) in [
        (bare.clone(), 0, vec![]),
        (Finding { name: text(70), ..bare.clone() }, 0, vec![70]),
        (Finding { description: text(800), ..bare.clone() }, 0, vec![800]),
        (Finding { cve: text(60), ..bare.clone() }, 0, vec![60]),
        (Finding { cves: cves(), ..bare.clone() }, strings(4), vec![14; 4]),
        (Finding { table: table(), ..bare.clone() }, strings(6), [[30; 3], [50; 3]].concat()),
        (
            Finding {
                table: table(),
                name: text(70),
                description: text(800),
                cve: text(60),
                cves: cves(),
                ..bare
            },
            strings(10),
            [vec![70, 800, 60], vec![14; 4], vec![30; 3], vec![50; 3]].concat(),
        ),
    ] {
        let inline = size_of::<Vulnerabilities>() + 2 * (size_of::<Finding>() + extra);
        let texts = texts.repeat(2);
        within(Vulnerabilities(vec![finding.clone(), finding]).weight(), inline, &texts);
    }
}

#[tokio::test]
async fn memory_is_bounded_in_bytes() {
    let fake = Fake::default();
    let small = Config { memory: 100_000, ..config() };
    let stage = stage_with(&fake, small, None);
    for number in 0..5_000 {
        stage.host(&call(), ip(number)).await.unwrap();
    }
    stage.0.memory.run_pending_tasks();
    let size = stage.0.memory.weighted_size();
    assert!(size <= 100_000, "{size} bytes");
    assert!(stage.0.memory.entry_count() > 100);
}

#[tokio::test(start_paused = true)]
async fn look_ups_are_counted_once_in_every_tier_they_reach() {
    let (fake, world) = (Fake::default(), World::new());
    let first = stage_with(&fake, config(), Some(world.replica()));
    let second = stage_with(&fake, config(), Some(world.replica()));
    first.host(&call(), ip(1)).await.unwrap();
    settle().await;
    second.preload(&call(), &[Subject::Ip(ip(1)), Subject::Ip(ip(2))], HOSTS).await;
    second.host(&call(), ip(1)).await.unwrap();
    second.host(&call(), ip(1)).await.unwrap();
    second.host(&call(), ip(2)).await.unwrap();
    let counted =
        |tier, outcome| second.0.metrics.cache_lookups.get((RecordType::Host.label(), tier, outcome));
    assert_eq!((counted(Tier::Memory, Outcome::Miss), counted(Tier::Memory, Outcome::Fresh)), (2, 1));
    assert_eq!((counted(Tier::Redis, Outcome::Fresh), counted(Tier::Redis, Outcome::Miss)), (1, 1));
    assert_eq!(counted(Tier::Upstream, Outcome::Fresh), 1);
}

#[tokio::test(start_paused = true)]
async fn one_call_serves_all_replicas_and_a_copy_gets_no_second_life() {
    let (fake, world) = (Fake::default(), World::new());
    fake.takes(SECOND);
    let replicas: Vec<Stage> = (0..3).map(|_| stage_with(&fake, config(), Some(world.replica()))).collect();
    let callers = (0..3_000).map(|i| {
        let stage = replicas[i % 3].clone();
        async move { stage.host(&call(), ip(1)).await }
    });
    assert!(join_all(callers).await.iter().all(Result::is_ok));
    assert_eq!(fake.calls(), 1);

    // A replica that comes later takes the copy over, with the age it has.
    advance(53 * MINUTE).await;
    let late = stage_with(&fake, config(), Some(world.replica()));
    late.host(&call(), ip(1)).await.unwrap();
    sleep(2 * SECOND).await;
    assert_eq!(fake.calls(), 2, "near its end: renewed once");
    for replica in &replicas {
        replica.host(&call(), ip(1)).await.unwrap();
    }
    sleep(2 * SECOND).await;
    assert_eq!(fake.calls(), 2, "the others adopt what one has renewed");
}

#[tokio::test(start_paused = true)]
async fn a_failure_is_told_to_replicas_that_wait_for_it() {
    let (fake, world) = (Fake::default(), World::new());
    fake.takes(SECOND);
    fake.fails(Some(down()));
    let replicas: Vec<Stage> = (0..3).map(|_| stage_with(&fake, config(), Some(world.replica()))).collect();
    let outcomes = join_all((0..300).map(|i| {
        let stage = replicas[i % 3].clone();
        async move { stage.host(&call(), ip(1)).await.err() }
    }))
    .await;
    assert!(outcomes.iter().all(|error| *error == Some(down())));
    assert_eq!(fake.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_replica_that_dies_while_it_fetches_costs_its_lease_and_nothing_else() {
    let (fake, world) = (Fake::default(), World::new());
    let dead = world.replica();
    let key = Key::new(&call().tenant, RecordType::Host, ip(1).to_string());
    let stop = CancellationToken::new();
    let following = TaskTracker::new().spawn(dead.clone().follow(stop.clone(), |_| {}));
    settle().await;
    assert!(matches!(dead.claim(key.name, 0, 16 * SECOND).await, Ok(Claim::Leader(_))));
    stop.cancel();
    following.await.unwrap();
    let alive = stage_with(&fake, Config { fill_timeout: 18 * SECOND, ..config() }, Some(world.replica()));
    let asked = Instant::now();
    assert!(alive.host(&call(), ip(1)).await.is_ok());
    assert!(asked.elapsed() >= 16 * SECOND && asked.elapsed() <= 17 * SECOND, "waited {:?}", asked.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_purge_reaches_every_replica_also_one_that_was_cut_off() {
    let (fake, world) = (Fake::default(), World::new());
    let tiers = [world.replica(), world.replica()];
    let [one, two] = tiers.clone().map(|tier| stage_with(&fake, config(), Some(tier)));
    for stage in [&one, &two] {
        stage.host(&call(), ip(1)).await.unwrap();
    }
    settle().await;
    assert_eq!(fake.calls(), 1);
    one.purge_all().await.unwrap();
    sleep(SECOND / 10).await;
    two.host(&call(), ip(1)).await.unwrap();
    assert_eq!(fake.calls(), 2, "the other replica, or Redis, still had the purged value");
    settle().await;

    tiers[1].cut.store(true, Ordering::Relaxed);
    advance(30 * SECOND).await;
    settle().await;
    one.purge_all().await.unwrap();
    tiers[1].cut.store(false, Ordering::Relaxed);
    sleep(SECOND / 10).await;
    let before = fake.calls();
    two.host(&call(), ip(1)).await.unwrap();
    assert_eq!(fake.calls(), before + 1, "a purged value was served after the replica was back");
}

#[tokio::test(start_paused = true)]
async fn a_fetch_that_began_before_a_purge_is_not_kept() {
    let fake = Fake::default();
    fake.takes(SECOND);
    let stage = stage(&fake);
    let (answer, ()) = tokio::join!(async { stage.host(&call(), ip(1)).await }, async {
        sleep(SECOND / 2).await;
        stage.purge_all().await.unwrap();
    });
    assert!(answer.is_ok());
    stage.host(&call(), ip(1)).await.unwrap();
    assert_eq!(fake.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn data_that_is_refused_is_not_asked_for_without_a_pause() {
    let fake = Fake::default();
    let stage = stage(&fake);
    fake.fails(Some(Error::Unauthorized));
    for _ in 0..5 {
        assert_eq!(stage.host(&call(), ip(1)).await.err(), Some(Error::Unauthorized));
    }
    assert_eq!(fake.calls(), 1);
    sleep(MINUTE).await;
    fake.fails(None);
    assert!(stage.host(&call(), ip(1)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_failure_that_says_when_to_come_back_is_not_remembered_for_longer() {
    let fake = Fake::default();
    let stage = stage(&fake);
    fake.fails(Some(Error::Throttled { retry_after: SECOND }));
    for round in 1..6 {
        assert!(stage.host(&call(), ip(1)).await.is_err());
        assert_eq!(fake.calls(), round);
        sleep(SECOND).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_purged_about_an_observable_stays_purged_when_keys_change() {
    let fake = Fake::default();
    let stage = stage(&fake);
    stage.host(&call(), ip(1)).await.unwrap();
    stage.purge_subject(&Subject::Ip(ip(1))).await.unwrap();
    for keys in [vec![[8; 32], [7; 32]], vec![[8; 32]], vec![]] {
        stage.order().seal_with(&keys);
        let key = Key::new(&call().tenant, RecordType::Host, ip(1).to_string());
        assert!(stage.order().purged_before(&key) > 0, "{} keys", keys.len());
    }
}

/// Whoever asked before the purge is answered by the fetch that was under way; whoever asks after it is not.
#[tokio::test(start_paused = true)]
async fn who_asks_after_a_purge_does_not_join_a_fetch_from_before_it() {
    let fake = Fake::default();
    fake.takes(4 * SECOND);
    let stage = stage(&fake);
    let ask = async |after: u32| {
        sleep(after * SECOND).await;
        let answer = stage.host(&call(), ip(1)).await.unwrap();
        answer.record.known().unwrap().details_page.clone().unwrap()
    };
    let (first, before, (), later) = tokio::join!(
        ask(0),
        ask(1),
        async {
            sleep(2 * SECOND).await;
            stage.purge_all().await.unwrap();
        },
        ask(3)
    );
    assert_eq!([&*first, &*before, &*later], ["0", "0", "1"]);
    assert_eq!(fake.calls(), 2);
}

/// What another replica has may be as old as what this one has: it is served with its age, if at all.
#[tokio::test(start_paused = true)]
async fn an_old_answer_of_another_replica_is_not_shown_as_new() {
    let (fake, world) = (Fake::default(), World::new());
    let stages = [(); 2].map(|()| stage_with(&fake, config(), Some(world.replica())));
    settle().await;
    for stage in &stages {
        stage.host(&call(), ip(1)).await.unwrap();
        settle().await;
    }
    // Redis has lost it, so the other is not told when it is replaced.
    world.forget();
    sleep(3 * HOUR).await;
    assert_eq!(stages[0].host(&call(), ip(1)).await.unwrap().stale, None);
    assert_eq!(fake.calls(), 2);
    sleep(3 * HOUR).await;
    fake.fails(Some(down()));
    let stale = stages[1].host(&call(), ip(1)).await.unwrap().stale.unwrap();
    assert!(stale.abs_diff(3 * HOUR) < MINUTE, "{stale:?}");
    assert_eq!(fake.calls(), 3, "CyberScan is asked");
}

#[tokio::test(start_paused = true)]
async fn what_was_fetched_while_another_replica_purged_it_is_not_shared() {
    let (fake, world) = (Fake::default(), World::new());
    let (a, b) = (world.replica(), world.replica());
    let stages = [&a, &b].map(|tier| stage_with(&fake, config(), Some(tier.clone())));
    stages[0].host(&call(), ip(2)).await.unwrap();
    fake.takes(SECOND);
    let (answer, ()) = tokio::join!(async { stages[1].host(&call(), ip(1)).await }, async {
        sleep(SECOND / 2).await;
        stages[0].purge_subject(&Subject::Ip(ip(1))).await.unwrap();
    });
    assert!(answer.is_ok());
    settle().await;
    assert_eq!(world.state.lock().unwrap().values.len(), 1, "only the other one's is shared");
    stages[0].host(&call(), ip(1)).await.unwrap();
    assert_eq!(fake.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn whatever_is_asked_what_is_kept_beside_answers_is_bounded() {
    let fake = Fake::default();
    let stage = stage(&fake);
    stage.host(&call(), ip(1)).await.unwrap();
    let stamp = |number: u32| u128::from(number).to_be_bytes();
    for number in 0..11_000 {
        advance(SECOND / 100).await;
        stage.order().purge(Scope::Revoked(stamp(number)), stage.order().clock().now());
    }
    assert_eq!(stage.order().len(), order::STAMPS);
    stage.host(&call(), ip(1)).await.unwrap();
    assert_eq!(fake.calls(), 1, "refusals of others cost an answer");
    for number in 0..11_000 {
        advance(SECOND / 100).await;
        stage.order().purge(Scope::Observable(stamp(number)), stage.order().clock().now());
    }
    assert_eq!(stage.order().len(), order::STAMPS);
    stage.host(&call(), ip(1)).await.unwrap();
    assert_eq!(fake.calls(), 2, "of so many purges the first are remembered as one of everything");
    let bounds = [
        stage.0.memory.policy().max_capacity(),
        stage.0.failures.policy().max_capacity(),
        stage.0.accepted.policy().max_capacity(),
        stage.0.refused.policy().max_capacity(),
        stage.0.suspected.policy().max_capacity(),
    ];
    assert!(bounds.iter().all(Option::is_some), "{bounds:?}");
}

#[tokio::test(start_paused = true)]
async fn a_revoked_key_is_forgotten_by_all_replicas() {
    let (fake, world) = (Fake::default(), World::new());
    let [one, two] = [(); 2].map(|()| stage_with(&fake, config(), Some(world.replica())));
    for stage in [&one, &two] {
        stage.authenticate(&call()).await.unwrap();
        stage.host(&call(), ip(1)).await.unwrap();
        settle().await;
        advance(8 * MINUTE).await;
    }
    fake.0.refused.store(true, Ordering::Relaxed);
    assert_eq!(one.authenticate(&call()).await.err(), Some(Error::Unauthorized), "16 minutes ago");
    sleep(SECOND / 10).await;
    assert_eq!(two.authenticate(&call()).await.err(), Some(Error::Unauthorized), "its own time was not over");
}

#[tokio::test(start_paused = true)]
async fn without_the_shared_tier_the_stage_goes_on_alone() {
    let (fake, world) = (Fake::default(), World::new());
    let tier = world.replica();
    let stage = stage_with(&fake, config(), Some(tier.clone()));
    stage.host(&call(), ip(1)).await.unwrap();
    tier.cut.store(true, Ordering::Relaxed);
    stage.preload(&call(), &[Subject::Ip(ip(1)), Subject::Ip(ip(2))], HOSTS).await;
    stage.host(&call(), ip(1)).await.unwrap();
    stage.host(&call(), ip(2)).await.unwrap();
    assert_eq!(fake.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn what_a_request_will_ask_is_read_in_one_round_trip_and_domains_in_two() {
    let (fake, world) = (Fake::default(), World::new());
    let writer = stage_with(&fake, config(), Some(world.replica()));
    let domains: Vec<Subject> =
        (0..25).map(|i| Subject::Domain(DomainName::parse(&format!("n{i}.example")).unwrap())).collect();
    let addresses: Vec<Subject> = (0..25).map(|i| Subject::Ip(ip(i))).collect();
    for subject in domains.iter().chain(&addresses) {
        match subject {
            Subject::Domain(domain) => drop(writer.domain(&call(), domain).await.unwrap()),
            Subject::Ip(ip) => {
                writer.vulnerabilities(&call(), *ip).await.unwrap();
                writer.host(&call(), *ip).await.unwrap();
            }
        }
    }
    settle().await;
    let (reads, calls) = (|| world.state.lock().unwrap().reads, fake.calls());
    let vulnerabilities = Wanted { hosts: false, vulnerabilities: true };
    let both = Wanted { hosts: true, vulnerabilities: true };
    for (subjects, wanted, round_trips) in [
        (&addresses, vulnerabilities, 1),
        (&addresses, both, 1),
        (&domains, vulnerabilities, 2),
        (&domains, HOSTS, 1),
    ] {
        let reader = stage_with(&fake, config(), Some(world.replica()));
        settle().await;
        let before = reads();
        reader.preload(&call(), subjects, wanted).await;
        assert_eq!(reads() - before, round_trips);
        for subject in subjects {
            match subject {
                Subject::Domain(domain) => drop(reader.domain(&call(), domain).await.unwrap()),
                Subject::Ip(ip) if wanted.hosts => drop(reader.host(&call(), *ip).await.unwrap()),
                Subject::Ip(ip) => drop(reader.vulnerabilities(&call(), *ip).await.unwrap()),
            }
        }
        assert_eq!((reads() - before, fake.calls()), (round_trips, calls));
    }
}

/// Zipf with exponent `s` over `keys` ranks: the inverse of the cumulated weights.
fn zipf(keys: u32, s: f64) -> impl FnMut(f64) -> u32 {
    let mut sum = 0.0;
    let cumulated: Vec<f64> = (1..=keys)
        .map(|rank| {
            sum += f64::from(rank).powf(-s);
            sum
        })
        .collect();
    move |chance| u32::try_from(cumulated.partition_point(|weight| *weight < chance * sum)).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_hundred_thousand_requests_cost_one_call_per_key_and_lifetime() {
    let fake = Fake::default();
    let policy = Policy {
        stale_while_revalidate: Duration::ZERO,
        stale_if_error: Duration::ZERO,
        refresh_ahead: 0.0,
        ..config().host
    };
    let stage = stage_with(&fake, Config { host: policy, ..config() }, None);
    let (mut pick, mut seed, mut best) = (zipf(10_000, 0.9), 7_u64, 0_u32);
    let mut live: HashMap<u32, Instant> = HashMap::new();
    for _ in 0..100_000 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let key = pick((seed >> 11) as f64 / (1_u64 << 53) as f64);
        let now = Instant::now();
        if live.get(&key).is_none_or(|born| now - *born >= HOUR) {
            live.insert(key, now);
            best += 1;
        }
        stage.host(&call(), ip(key)).await.unwrap();
        advance(SECOND / 10).await;
    }
    let over = f64::from(fake.calls()) / f64::from(best) - 1.0;
    assert!(over.abs() <= 0.05, "{} calls, {best} keys and lifetimes", fake.calls());
}

#[tokio::test(start_paused = true)]
async fn three_nodes_ride_out_a_slow_and_a_dead_source_without_an_error() {
    // FusionCache's published scenario: 3 nodes, 1,000 keys, 100 concurrent callers, a lifetime of
    // one minute, ten minutes of which the source is slow for two and down for three. With everything
    // switched on it needs 10,000 calls; ten lifetimes of 1,000 keys are the least without staleness.
    let (fake, world) = (Fake::default(), World::new());
    let policy = Policy { fresh: MINUTE, stale_while_revalidate: Duration::ZERO, ..config().host };
    let replicas: Vec<Stage> = (0..3)
        .map(|_| stage_with(&fake, Config { host: policy, ..config() }, Some(world.replica())))
        .collect();
    let (start, mut errors, mut slowest) = (Instant::now(), 0, Duration::ZERO);
    for step in 0_u32..600 {
        match step {
            0..120 => fake.takes(SECOND / 20),
            120..240 => fake.takes(2 * SECOND),
            240..420 => {
                fake.takes(SECOND / 20);
                fake.fails(Some(down()));
            }
            _ => fake.fails(None),
        }
        // Each second a sixtieth of the keys is asked for, by 100 callers at once, on all nodes.
        let keys = (0..1_000).filter(|key| key % 60 == step % 60);
        let callers = keys.flat_map(|key| {
            replicas.iter().flat_map(move |stage| (0..33).map(move |_| (stage.clone(), key)))
        });
        let outcomes = join_all(callers.map(|(stage, key)| async move {
            let asked = Instant::now();
            let outcome = stage.host(&call(), ip(key)).await;
            (outcome.is_err(), asked.elapsed())
        }))
        .await;
        errors += outcomes.iter().filter(|(failed, _)| *failed).count();
        if step >= 60 {
            slowest = outcomes.iter().map(|(_, took)| *took).max().unwrap_or_default().max(slowest);
        }
        tokio::time::sleep_until(start + SECOND * (step + 1)).await;
    }
    assert_eq!(errors, 0);
    assert!(fake.calls() <= 7_100, "{} calls", fake.calls());
    assert!(slowest <= SECOND / 2, "someone waited {slowest:?}");
}

/// What every shared tier promises; `a` and `b` are two replicas on one world.
async fn keeps_the_promises_of_a_shared_tier<T: SharedTier>(a: T, b: T) {
    let shutdown = CancellationToken::new();
    let heard: Arc<Mutex<Vec<Event>>> = Arc::default();
    let listening = |tier: &T| {
        let (tier, heard) = (tier.clone(), Arc::clone(&heard));
        TaskTracker::new()
            .spawn(tier.follow(shutdown.clone(), move |event| heard.lock().unwrap().push(event)))
    };
    let key = |subject: &str| Key::new(&call().tenant, RecordType::Host, subject).name;
    assert!(a.read(&[key("x")]).await.is_err(), "read before it knew what was purged");
    let listeners = [&a, &b].map(listening);
    let wait = async || sleep(SECOND / 4).await;
    wait().await;

    let (lease, life) = (2 * SECOND, HOUR);
    let version_of = |value: &[u8]| entry::version_of(value).unwrap();
    // A version of `a` as `b` counts.
    let of_b = |version| b.order().clock().own(a.order().clock().shared(version).unwrap()).unwrap();
    let write = |subject: &str, version: u64, text: &'static str, owner: Option<String>| Write {
        name: key(subject),
        version,
        until: Instant::now() + life,
        owner,
        size: text.len(),
        value: Value(Arc::new(move |version| {
            Some([b"R2", entry::version_text(version).as_bytes(), text.as_bytes()].concat())
        })),
    };
    let text = |value: &Option<Vec<u8>>| {
        value.as_ref().map(|value| String::from_utf8_lossy(value.split_at(18).1).into_owned())
    };
    let read = async |tier: &T, subject: &str| text(&tier.read(&[key(subject)]).await.unwrap()[0]);

    // Nothing there: one leads, the other follows and is told.
    assert_eq!(a.read(&[key("x"), key("y")]).await.unwrap(), [None, None]);
    let Ok(Claim::Leader(owner)) = a.claim(key("x"), 0, lease).await else { panic!("no leader") };
    let Ok(Claim::Follower(told)) = b.claim(key("x"), 0, lease).await else { panic!("two leaders") };
    let version = a.order().clock().now();
    a.store(write("x", version, "one", Some(owner))).await;
    assert_eq!(timeout(SECOND, told).await.unwrap().unwrap(), Told::Stored);
    let Ok(Claim::Value(found)) = b.claim(key("x"), 0, lease).await else { panic!("no value") };
    assert_eq!(Some(version_of(&found)), a.order().clock().shared(version));
    let both = b.read(&[key("y"), key("x")]).await.unwrap();
    assert_eq!(both.iter().map(text).collect::<Vec<_>>(), [None, Some("one".to_owned())]);

    // Something newer is wanted: the lock is free again.
    let Ok(Claim::Leader(owner)) = b.claim(key("x"), of_b(version), lease).await else {
        panic!("the lock was kept")
    };
    // An older write does not replace a newer one.
    a.store(write("x", version - 1_000, "old", None)).await;
    assert_eq!(read(&a, "x").await.as_deref(), Some("one"));
    // A failure is told, and gives the lock back.
    let Ok(Claim::Follower(told)) = a.claim(key("x"), version, lease).await else { panic!("two leaders") };
    b.release(key("x"), owner, &down()).await;
    assert_eq!(timeout(SECOND, told).await.unwrap().unwrap(), Told::Failed(down()));
    assert!(matches!(a.claim(key("x"), version, lease).await, Ok(Claim::Leader(_))));
    // Nobody gives it back: it is lost after its lease.
    assert!(matches!(b.claim(key("x"), of_b(version), lease).await, Ok(Claim::Follower(_))));
    sleep(lease + SECOND / 10).await;
    assert!(matches!(b.claim(key("x"), of_b(version), lease).await, Ok(Claim::Leader(_))));

    // A life ends.
    a.store(Write { until: Instant::now() + SECOND / 5, ..write("z", version, "short", None) }).await;
    sleep(SECOND / 2).await;
    assert_eq!(read(&a, "z").await, None);

    // What claims to be from the future is no value, and any other replaces it.
    let future = a.order().clock().now() + order::micros(HOUR);
    a.store(write("f", future, "future", None)).await;
    assert!(matches!(b.claim(key("f"), 0, lease).await, Ok(Claim::Leader(_))));
    b.store(write("f", b.order().clock().now(), "present", None)).await;
    assert_eq!(read(&a, "f").await.as_deref(), Some("present"));

    // Nobody waited and nothing was replaced: nobody is told. What is replaced is told of.
    wait().await;
    heard.lock().unwrap().clear();
    a.store(write("n", a.order().clock().now(), "new", None)).await;
    wait().await;
    assert_eq!(*heard.lock().unwrap(), []);
    a.store(write("n", a.order().clock().now(), "newer", None)).await;
    wait().await;
    assert!(matches!(&heard.lock().unwrap()[..], [Event::Stored { name, .. }] if *name == key("n")));

    // Others hear of purges.
    heard.lock().unwrap().clear();
    let scopes = [Scope::Tenant([1; 16]), Scope::Revoked([2; 16]), Scope::Observable([3; 16]), Scope::All];
    for scope in scopes {
        a.order().purge(scope, a.order().clock().now());
        a.tell(scope).await.unwrap();
    }
    wait().await;
    for scope in scopes {
        let of = |tier: &T| tier.order().clock().shared(tier.order().all()[&scope]).unwrap();
        assert_eq!(of(&a), of(&b), "{scope:?}");
        let said = |event: &Event| matches!(event, Event::Purged { scope: said, .. } if *said == scope);
        assert_eq!(heard.lock().unwrap().iter().filter(|event| said(event)).count(), 1);
    }

    shutdown.cancel();
    for listener in listeners {
        timeout(5 * SECOND, listener).await.unwrap().unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn the_fake_tier_keeps_the_promises_of_a_shared_tier() {
    let world = World::new();
    keeps_the_promises_of_a_shared_tier(world.replica(), world.replica()).await;
}

#[tokio::test]
async fn the_tier_in_redis_keeps_the_promises_of_a_shared_tier() {
    let server = RedisServer::start().await;
    let replica = || RedisTier::new(Redis::to(&server.url()));
    keeps_the_promises_of_a_shared_tier(replica(), replica()).await;
}

/// A CyberScan that numbers its answers, so that each can be told from all others.
#[derive(Clone, Default)]
struct Numbered(Arc<NumberedState>);

#[derive(Default)]
struct NumberedState {
    /// When it was asked for each.
    asked: Mutex<Vec<Instant>>,
    down: AtomicBool,
    latency: AtomicU64,
}

impl CyberScan for Numbered {
    async fn authenticate(&self, _: &Call) -> Result<Instant, Error> {
        Ok(Instant::now())
    }

    async fn domain(&self, _: &Call, _: &DomainName) -> Result<Answer<DomainRecord>, Error> {
        Err(Error::Lost)
    }

    async fn host(&self, _: &Call, _: IpAddr) -> Result<Answer<HostRecord>, Error> {
        let number = {
            let mut asked = self.0.asked.lock().unwrap();
            asked.push(Instant::now());
            asked.len() - 1
        };
        sleep(Duration::from_millis(self.0.latency.load(Ordering::Relaxed))).await;
        if self.0.down.load(Ordering::Relaxed) {
            return Err(down());
        }
        let record = Record::Known(Arc::new(HostRecord { details_page: Some(number.to_string()) }));
        Ok(Answer { record, asked_at: jiff::Timestamp::UNIX_EPOCH, stale: None })
    }

    async fn vulnerabilities(&self, _: &Call, _: IpAddr) -> Result<Answer<Vulnerabilities>, Error> {
        Err(Error::Lost)
    }
}

/// A replica of a schedule.
struct Replica {
    tier: FakeTier,
    stage: Cached<Numbered, FakeTier>,
    stop: CancellationToken,
    /// Since when nothing was done to it.
    undisturbed: Instant,
    /// Purges that it has to know of.
    knows: Vec<bool>,
    /// When CyberScan was asked for the newest answer it has given, per question.
    has: HashMap<(usize, u32), Instant>,
}

/// Everything that was purged, everything that happens, and what has to hold.
struct Schedule {
    moody: Moody,
    cyberscan: Numbered,
    world: Arc<World>,
    replicas: Vec<Replica>,
    /// Whose, about what, when.
    purges: Vec<(Option<usize>, Option<u32>, Instant)>,
    /// Whether a purge counts as of when others hear of it: who made it had not seen the clock.
    wide: Vec<bool>,
    /// Purges that the tier has been told of, and not forgotten.
    told: Vec<bool>,
    stepped: bool,
    seed: u64,
}

const OWNERS: [&str; 2] = ["a", "b"];
const ADDRESSES: u32 = 3;
/// How long replicas take, at most, to notice and tell each other everything.
const NOTICED: Duration = Duration::from_secs(5);

impl Schedule {
    fn new(seed: u64) -> Self {
        let (cyberscan, world) = (Numbered::default(), World::new());
        let replicas = (0..3).map(|_| Self::replica(&cyberscan, &world)).collect();
        let (purges, told) = (Vec::new(), Vec::new());
        let (moody, wide) = (Moody::new(seed), Vec::new());
        Self { moody, cyberscan, world, replicas, purges, wide, told, stepped: false, seed }
    }

    fn replica(cyberscan: &Numbered, world: &Arc<World>) -> Replica {
        let (tier, stop) = (world.replica(), CancellationToken::new());
        let (metrics, tasks) = (Metrics::new(), TaskTracker::new());
        let shared = Some(tier.clone());
        let stage = Cached::new(cyberscan.clone(), config(), shared, metrics, tasks, stop.clone());
        let undisturbed = Instant::now();
        Replica { tier, stage, stop, undisturbed, knows: Vec::new(), has: HashMap::new() }
    }

    fn below(&self, below: u64) -> usize {
        usize::try_from(self.moody.below(below)).unwrap()
    }

    /// Who has had the time to tell or to hear, has.
    fn spread(&mut self) {
        let quiet = |replica: &Replica| {
            let away =
                replica.tier.cut.load(Ordering::Relaxed) || replica.tier.world.frozen.load(Ordering::Relaxed);
            !away && replica.undisturbed.elapsed() >= NOTICED
        };
        for purge in 0..self.purges.len() {
            let knows = |replica: &Replica| replica.knows.get(purge) == Some(&true);
            self.told[purge] |= self.replicas.iter().any(|replica| quiet(replica) && knows(replica));
            for replica in &mut self.replicas {
                replica.knows.resize(self.purges.len(), false);
                replica.knows[purge] |= quiet(replica) && self.told[purge];
            }
        }
    }

    fn disturb_all(&mut self) {
        self.replicas.iter_mut().for_each(|replica| replica.undisturbed = Instant::now());
    }

    async fn read(&mut self, at: usize, owner: usize, address: u32) {
        self.spread();
        let (cyberscan, purges, wide, seed) = (self.cyberscan.clone(), &self.purges, &self.wide, self.seed);
        let replica = &mut self.replicas[at];
        let of = |(tenant, about, _): &(Option<usize>, Option<u32>, Instant)| {
            tenant.is_none_or(|tenant| tenant == owner) && about.is_none_or(|about| about == address)
        };
        let (down, before) =
            (cyberscan.0.down.load(Ordering::Relaxed), replica.has.get(&(owner, address)).copied());
        let answer = replica.stage.host(&call_of(OWNERS[owner], 20 * SECOND), ip(address)).await;
        let asked = answer.as_ref().ok().map(|answer| {
            let number: usize =
                answer.record.known().unwrap().details_page.as_ref().unwrap().parse().unwrap();
            cyberscan.0.asked.lock().unwrap()[number]
        });
        if let Some(asked) = asked {
            for (number, purge) in purges.iter().enumerate().filter(|(_, purge)| of(purge)) {
                let served = replica.knows[number] && asked < purge.2;
                assert!(!served, "seed {seed}: replica {at} served {asked:?}, purged {:?}", purge.2);
            }
            let has = replica.has.entry((owner, address)).or_insert(asked);
            *has = asked.max(*has);
        } else if let Some(before) = before.filter(|before| down && before.elapsed() < 20 * HOUR) {
            // Where clocks were set, more may count as purged than was; never what nobody purged.
            let mut purged = purges.iter().zip(wide).filter(|(purge, _)| of(purge));
            let lost = if self.stepped {
                purged.next().is_none()
            } else {
                purged.all(|(purge, wide)| !wide && purge.2 + SECOND < before)
            };
            assert!(!lost, "seed {seed}: replica {at} has lost what it knew: {answer:?}");
        }
    }

    async fn purge(&mut self, at: usize) {
        self.spread();
        let (owner, address) = (self.below(2), u32::try_from(self.below(ADDRESSES.into())).unwrap());
        let started = Instant::now();
        let clock = self.replicas[at].tier.order.clock();
        self.wide.push(clock.shared(clock.now()).is_none());
        let stage = self.replicas[at].stage.clone();
        let name = call_of(OWNERS[owner], SECOND).tenant.name();
        let (of, told) = match self.below(4) {
            0 => ((None, None), stage.purge_all().await),
            1 => ((Some(owner), None), stage.purge_label(name).await),
            2 => ((None, Some(address)), stage.purge_subject(&Subject::Ip(ip(address))).await),
            _ => {
                let now = stage.order().clock().now();
                ((Some(owner), None), stage.forget(Scope::Revoked(name), now).await)
            }
        };
        self.purges.push((of.0, of.1, started));
        self.told.push(told.is_ok());
        for (number, replica) in self.replicas.iter_mut().enumerate() {
            replica.knows.resize(self.purges.len(), number == at);
        }
    }

    async fn step(&mut self) {
        let at = self.below(3);
        let (owner, address) = (self.below(2), u32::try_from(self.below(ADDRESSES.into())).unwrap());
        if self.below(2) == 0 && !self.world.frozen.load(Ordering::Relaxed) {
            self.world.follow();
        }
        match self.below(27) {
            0..12 => self.read(at, owner, address).await,
            12..15 => self.purge(at).await,
            15..18 => {
                self.replicas[at].tier.cut.fetch_xor(true, Ordering::Relaxed);
                self.replicas[at].undisturbed = Instant::now();
            }
            18 => {
                let cut = self.below(2) == 0;
                self.replicas.iter().for_each(|replica| replica.tier.cut.store(cut, Ordering::Relaxed));
                self.disturb_all();
            }
            19 => {
                self.world.forget();
                self.told.iter_mut().for_each(|told| *told = false);
                self.disturb_all();
            }
            // Whether time was lost while nobody could look, nobody could tell.
            20 if self.world.frozen.load(Ordering::Relaxed) => {}
            20 => {
                let by = [3_600_000_000, -3_600_000_000, 45_000_000, -45_000_000][self.below(4)];
                self.world.set_clock(by);
                self.stepped = true;
                self.disturb_all();
            }
            21 => {
                self.replicas[at].stop.cancel();
                self.replicas[at] = Self::replica(&self.cyberscan, &self.world);
            }
            22 | 23 => {
                if self.world.frozen.load(Ordering::Relaxed) {
                    self.world.thaw();
                } else {
                    self.world.frozen.store(true, Ordering::Relaxed);
                }
                self.disturb_all();
            }
            24 => {
                let clock = [0, 0, 300_000, -300_000, 45_000_000, -45_000_000][self.below(6)];
                self.world.fail_over(clock);
                self.stepped |= clock != 0;
                self.told.iter_mut().for_each(|told| *told = false);
                self.disturb_all();
            }
            _ => {
                self.cyberscan.0.down.fetch_xor(true, Ordering::Relaxed);
            }
        }
        self.cyberscan.0.latency.store(self.moody.below(300), Ordering::Relaxed);
        let pause = [10, 300, 3_000, 6_000, 20_000][self.below(5)];
        sleep(Duration::from_millis(self.moody.below(pause))).await;
        if self.below(20) == 0 {
            advance(Duration::from_millis(self.moody.below(3_600_000))).await;
            self.disturb_all();
        }
    }

    /// In the end all know the same.
    async fn converge(&mut self) {
        self.cyberscan.0.down.store(false, Ordering::Relaxed);
        self.replicas.iter().for_each(|replica| replica.tier.cut.store(false, Ordering::Relaxed));
        self.world.thaw();
        self.disturb_all();
        sleep(MINUTE).await;
        for at in 0..3 {
            for owner in 0..2 {
                for address in 0..ADDRESSES {
                    self.read(at, owner, address).await;
                }
            }
        }
        let scopes = |replica: &Replica| {
            let mut scopes: Vec<String> = replica.tier.order.all().into_keys().map(Scope::text).collect();
            scopes.sort_unstable();
            let clock = replica.tier.order.clock();
            (scopes, clock.shared(clock.now()).unwrap())
        };
        let all: Vec<_> = self.replicas.iter().map(scopes).collect();
        let same =
            |(scopes, clock): &(Vec<String>, u64)| *scopes == all[0].0 && clock.abs_diff(all[0].1) <= 50_000;
        assert!(all.iter().all(same), "seed {}: {all:#?}", self.seed);
        self.replicas.iter().for_each(|replica| replica.stop.cancel());
    }
}

/// Redis killed, emptied, cut off, frozen, set to another time, replaced by a copy that lags; replicas that die; purges of every scope by any of them. More
/// schedules: `SCHEDULES=10000`; one of them: `SCHEDULES=1 SEED=7`.
#[tokio::test(start_paused = true)]
#[expect(clippy::disallowed_methods, reason = "how many schedules there are is for whoever runs it")]
async fn whatever_becomes_of_the_shared_tier_nothing_purged_is_served_and_nothing_known_is_lost() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (first, schedules) = (number("SEED").unwrap_or(0), number("SCHEDULES").unwrap_or(150));
    for seed in first..first + schedules {
        let mut schedule = Schedule::new(seed);
        sleep(SECOND).await;
        for _ in 0..80 {
            schedule.step().await;
        }
        schedule.converge().await;
    }
}

#[tokio::test(start_paused = true)]
async fn one_replicas_token_call_counts_for_all_and_so_does_a_refusal() {
    let (fake, world) = (Fake::default(), World::new());
    let tiers: Vec<FakeTier> = (0..10).map(|_| world.replica()).collect();
    let stages: Vec<Stage> =
        tiers.iter().map(|tier| stage_with(&fake, config(), Some(tier.clone()))).collect();
    settle().await;
    let authentications = || fake.0.authentications.load(Ordering::Relaxed);
    let began = Instant::now();
    while began.elapsed() < HOUR {
        for stage in &stages {
            stage.authenticate(&call()).await.unwrap();
        }
        sleep(MINUTE / 2).await;
    }
    assert!(authentications() <= 5, "{} token calls in an hour", authentications());

    // All at once, when it is due.
    sleep(15 * MINUTE).await;
    let before = authentications();
    fake.takes(SECOND / 5);
    let asked = stages.iter().map(|stage| async { stage.authenticate(&call()).await.is_ok() });
    assert!(join_all(asked).await.into_iter().all(|accepted| accepted));
    assert_eq!(authentications(), before + 1);

    // A replica that has just started lets in whom the others know, also while CyberScan is down.
    sleep(HOUR).await;
    fake.fails(Some(down()));
    let late = stage_with(&fake, config(), Some(world.replica()));
    settle().await;
    assert!(late.authenticate(&call()).await.is_ok());
    assert!(late.authenticate(&call_of("stranger", 20 * SECOND)).await.is_err());

    // Nobody can make an acceptance up, nor pass one on to another tenant.
    fake.fails(None);
    fake.0.refused.store(true, Ordering::Relaxed);
    let mine = world.state.lock().unwrap().values.clone();
    let theirs = call_of("another", 20 * SECOND).tenant.derive("accepted", &[]);
    let (version, value, until) = mine[&call().tenant.derive("accepted", &[])].clone();
    world.state.lock().unwrap().values.insert(theirs, (version, value, until));
    let outcome = stages[0].authenticate(&call_of("another", 20 * SECOND)).await;
    assert_eq!(outcome.err(), Some(Error::Unauthorized));

    // Refused by one, refused by all, also by one that was cut off.
    tiers[9].cut.store(true, Ordering::Relaxed);
    assert_eq!(stages[0].authenticate(&call()).await.err(), Some(Error::Unauthorized));
    tiers[9].cut.store(false, Ordering::Relaxed);
    sleep(SECOND / 10).await;
    for stage in &stages {
        assert_eq!(stage.authenticate(&call()).await.err(), Some(Error::Unauthorized));
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_read_costs_one_call_in_the_fleet() {
    let (fake, world) = (Fake::default(), World::new());
    fake.takes(SECOND / 10);
    let before = stage_with(&fake, Config { encryption_keys: Vec::new(), ..config() }, Some(world.replica()));
    settle().await;
    for number in 0..20 {
        before.host(&call(), ip(number)).await.unwrap();
    }
    settle().await;
    let stages: Vec<Stage> = (0..5).map(|_| stage_with(&fake, config(), Some(world.replica()))).collect();
    settle().await;
    let asked = (0..100).map(|number| (&stages[number % 5], ip(u32::try_from(number / 5).unwrap())));
    let asked = asked.map(|(stage, ip)| async move { stage.host(&call(), ip).await.is_ok() });
    assert!(join_all(asked).await.into_iter().all(|answered| answered));
    assert_eq!(fake.calls(), 40, "twenty to begin with, and one each for what cannot be opened");
}
