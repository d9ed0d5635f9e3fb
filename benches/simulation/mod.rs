//! The cache stage and the worker in virtual time, between analysts who follow a trace and a CyberScan that
//! takes a third of a second. `make bench-prefetch` runs it at full size, a test at a smaller one.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cyberscan_relay::{
    cache::{self, Cached, policy::Policy},
    clock::Clock,
    ctim::DomainName,
    cyberscan::{
        Answer, Call, CyberScan, DomainRecord, Error, HostRecord, Priority, Record, Vulnerabilities,
    },
    metrics::{Metrics, Prefetch},
    tenant::{ApiKey, Tenant},
    worker::{self, Worker},
};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How long CyberScan takes.
const LATENCY: Duration = Duration::from_millis(300);
/// How long answers are fresh.
pub(crate) const LIFE: Duration = Duration::from_secs(3600);
/// In which last share of that a read renews: the default.
pub(crate) const REFRESH_AHEAD: f64 = 0.2;

/// What a run came to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Outcome {
    /// Look-ups by analysts.
    pub(crate) asked: u64,
    /// Of which had to wait for CyberScan.
    pub(crate) waited: u64,
    /// Of which got an answer older than one life.
    pub(crate) old: u64,
    /// Requests CyberScan got.
    pub(crate) calls: u64,
    /// Answers fetched ahead; served after it; not served.
    pub(crate) refreshed: u64,
    /// Served after it.
    pub(crate) useful: u64,
    /// Never served.
    pub(crate) wasted: u64,
}

/// Numbers that look random and are the same each time (xorshift64*).
pub(crate) struct Dice(u64);

impl Dice {
    /// Dice that fall as `seed` says.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// From 0 to 1.
    pub(crate) fn roll(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1_u64 << 53) as f64
    }
}

/// Knows everything, takes its time and counts.
#[derive(Clone)]
struct Upstream {
    calls: Arc<AtomicU64>,
    clock: Clock,
}

impl Upstream {
    async fn answer<T>(&self, record: T) -> Result<Answer<T>, Error> {
        let asked_at = self.clock.now();
        self.calls.fetch_add(1, Ordering::Relaxed);
        sleep(LATENCY).await;
        Ok(Answer { record: Record::Known(Arc::new(record)), asked_at, stale: None })
    }
}

impl CyberScan for Upstream {
    async fn authenticate(&self, _: &Call) -> Result<Instant, Error> {
        Ok(Instant::now())
    }

    async fn domain(&self, _: &Call, domain: &DomainName) -> Result<Answer<DomainRecord>, Error> {
        let number: u32 = domain.as_str().trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0);
        let ip = Some(address(number));
        self.answer(DomainRecord { ip, details_page: None }).await
    }

    async fn host(&self, _: &Call, _: IpAddr) -> Result<Answer<HostRecord>, Error> {
        self.answer(HostRecord { details_page: None }).await
    }

    async fn vulnerabilities(&self, _: &Call, _: IpAddr) -> Result<Answer<Vulnerabilities>, Error> {
        self.answer(Vulnerabilities(Vec::new())).await
    }
}

fn address(number: u32) -> IpAddr {
    Ipv4Addr::from_bits(0x0B00_0000 + number).into()
}

fn domain(number: u32) -> DomainName {
    DomainName::parse(&format!("n{number}.example")).expect("a domain name")
}

/// The stage, the worker if there is one, and who asks.
struct World {
    cached: Cached<Upstream>,
    upstream: Upstream,
    tenant: Arc<Tenant>,
    metrics: Metrics,
    clock: Clock,
    stop: CancellationToken,
}

impl World {
    fn new(with_worker: bool, stale_while_revalidate: Duration) -> Self {
        let clock = Clock::starting_at("2026-01-01T00:00:00Z".parse().expect("a time"));
        let upstream = Upstream { calls: Arc::default(), clock };
        let policy = Policy {
            fresh: LIFE,
            stale_while_revalidate,
            stale_if_error: 24 * LIFE,
            negative: LIFE / 12,
            refresh_ahead: REFRESH_AHEAD,
        };
        let config = cache::Config {
            memory: 1 << 30,
            domain: policy,
            host: policy,
            vulnerabilities: policy,
            soft_timeout: LATENCY * 10,
            fill_timeout: Duration::from_secs(15),
            revalidate: 24 * LIFE,
            encryption_keys: Vec::new(),
        };
        let (metrics, tasks, stop) = (Metrics::new(), TaskTracker::new(), CancellationToken::new());
        let cached =
            Cached::new(upstream.clone(), config, None, metrics.clone(), tasks.clone(), stop.clone());
        if with_worker {
            let config = worker::Config {
                enabled: true,
                budget: 0.1,
                concurrency: 8,
                entries: 20_000,
                idle: LIFE,
                refresh_ahead: REFRESH_AHEAD,
            };
            let worker =
                Worker::new(cached.clone(), cached.notes(), config, None, metrics.clone(), tasks.clone());
            tasks.spawn(worker.run(stop.clone()));
        }
        let tenant = Tenant::new("api.example.com".parse().expect("a host"), ApiKey::new("key".into()));
        Self { cached, upstream, tenant: Arc::new(tenant), metrics, clock, stop }
    }

    fn call(&self) -> Call {
        Call::new(Arc::clone(&self.tenant), Instant::now() + LIFE, Priority::Interactive)
    }

    fn end(self, outcome: Outcome) -> Outcome {
        self.stop.cancel();
        let count = |what| self.metrics.prefetch.get((what,));
        Outcome {
            calls: self.upstream.calls.load(Ordering::Relaxed),
            refreshed: count(Prefetch::Refreshed),
            useful: count(Prefetch::Useful),
            wasted: count(Prefetch::Wasted),
            ..outcome
        }
    }
}

/// Analysts who ask about `keys` addresses, the k-th k^-`skew` times as often as the first, `rate` times a second
/// for `lives` lives; the first life is not counted.
pub(crate) async fn zipf(
    with_worker: bool,
    stale_while_revalidate: Duration,
    (keys, skew, rate): (u32, f64, f64),
    lives: u32,
) -> Outcome {
    let world = World::new(with_worker, stale_while_revalidate);
    let weights: Vec<f64> = (1..=keys).map(|rank| f64::from(rank).powf(-skew)).collect();
    let total: f64 = weights.iter().sum();
    let cumulative: Vec<f64> = weights
        .iter()
        .scan(0.0, |sum, weight| {
            *sum += weight / total;
            Some(*sum)
        })
        .collect();
    let mut dice = Dice::new(1);
    let begun = Instant::now();
    let (mut at, mut counting, mut before) = (begun, false, 0);
    let mut asking = JoinSet::new();
    let mut outcome = Outcome::default();
    let count = |outcome: &mut Outcome, (waited, old): (bool, bool)| {
        outcome.asked += 1;
        outcome.waited += u64::from(waited);
        outcome.old += u64::from(old);
    };
    while at - begun < LIFE * lives {
        at += Duration::from_secs_f64(-(1.0 - dice.roll()).ln() / rate);
        sleep_until(at).await;
        if !counting && at - begun >= LIFE {
            (counting, before) = (true, world.upstream.calls.load(Ordering::Relaxed));
        }
        let fallen = dice.roll();
        let rank = cumulative.partition_point(|share| *share < fallen);
        let (cached, call, clock) = (world.cached.clone(), world.call(), world.clock);
        let ip = address(u32::try_from(rank).unwrap_or(0));
        asking.spawn(async move {
            let asked = Instant::now();
            let answer = cached.vulnerabilities(&call, ip).await;
            let age = answer.map(|answer| clock.now().duration_since(answer.asked_at).as_secs_f64());
            let old = age.is_ok_and(|age| age > LIFE.as_secs_f64());
            (counting, (asked.elapsed() >= LATENCY / 3, old))
        });
        while let Some(answered) = asking.try_join_next() {
            if let Ok((true, answer)) = answered {
                count(&mut outcome, answer);
            }
        }
    }
    while let Some(answered) = asking.join_next().await {
        if let Ok((true, answer)) = answered {
            count(&mut outcome, answer);
        }
    }
    let outcome = world.end(outcome);
    Outcome { calls: outcome.calls - before, ..outcome }
}

/// Investigations, one every half minute: 25 domains nobody has asked about before, one per request; a second after
/// the answers the 25 addresses they lead to, in one request, for findings and for links. Only the second step
/// is counted.
pub(crate) async fn bursts(with_worker: bool, investigations: u32) -> Outcome {
    let world = World::new(with_worker, LIFE);
    let mut outcome = Outcome::default();
    for investigation in 0..investigations {
        let numbers = (0..25).map(|number| investigation * 25 + number);
        let mut asking = JoinSet::new();
        for number in numbers.clone() {
            let (cached, call) = (world.cached.clone(), world.call());
            asking.spawn(async move {
                let _ = cached.domain(&call, &domain(number)).await;
                let _ = cached.vulnerabilities(&call, address(number)).await;
            });
        }
        asking.join_all().await;
        sleep(Duration::from_secs(1)).await;
        let mut asking = JoinSet::new();
        for number in numbers {
            let (cached, call) = (world.cached.clone(), world.call());
            asking.spawn(async move {
                let asked = Instant::now();
                let (found, linked) = tokio::join!(
                    cached.vulnerabilities(&call, address(number)),
                    cached.host(&call, address(number))
                );
                assert!(found.is_ok() && linked.is_ok(), "CyberScan always answers");
                asked.elapsed() >= LATENCY / 3
            });
        }
        for waited in asking.join_all().await {
            outcome.asked += 1;
            outcome.waited += u64::from(waited);
        }
        sleep(Duration::from_secs(30)).await;
    }
    world.end(outcome)
}

/// Someone who asks about `count` observables, each once, half of them domains.
pub(crate) async fn scan(count: u32) -> Outcome {
    let world = World::new(true, LIFE);
    for number in 0..count / 2 {
        let (call, number) = (world.call(), number + 1_000_000);
        let (domain, ip) = (domain(number), address(number + 1_000_000));
        let (one, two) =
            tokio::join!(world.cached.domain(&call, &domain), world.cached.vulnerabilities(&call, ip));
        assert!(one.is_ok() && two.is_ok(), "CyberScan always answers");
    }
    sleep(2 * LIFE).await;
    world.end(Outcome { asked: u64::from(count), ..Outcome::default() })
}
