//! The limiter as a whole, in virtual time without Redis, and with a real Redis that comes and goes.

use std::{collections::BTreeMap, sync::Mutex};

use futures_util::future::join_all;
use tokio::time::sleep;

use super::*;
use crate::{
    cyberscan::Quotas,
    redis_server::RedisServer,
    tenant::{ApiKey, Tenant as Who},
};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);

/// Numbers that look like chance and are the same for the same seed.
pub(super) fn numbers(mut seed: u64) -> impl FnMut(u32) -> u32 {
    move |below| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from(seed >> 33).unwrap() % below
    }
}

fn config(tenant: &str, fleet: &str) -> Config {
    let windows =
        |text: &str| text.split(',').filter(|w| !w.is_empty()).map(|w| w.parse().unwrap()).collect();
    Config {
        tenant: windows(tenant),
        tenants: BTreeMap::new(),
        fleet: windows(fleet),
        burst: 0.5,
        dry_run: false,
        fallback_share: 0.3,
        reserve: 0.5,
        queue: 64,
        concurrency: 1_000,
    }
}

fn limiter_on(config: Config, redis: Option<&RedisServer>) -> Limiter {
    let redis = redis.map(|server| Redis::to(&server.url()));
    Limiter::new(config, redis, Latencies::default(), Metrics::new(), TaskTracker::new())
}

fn limiter(config: Config) -> Limiter {
    limiter_on(config, None)
}

fn call_of(key: &str, patience: Duration, priority: Priority) -> Call {
    let tenant = Who::new("api.example.com".parse().unwrap(), ApiKey::new(key.into()));
    Call::new(Arc::new(tenant), Instant::now() + patience, priority)
}

fn call(patience: Duration) -> Call {
    call_of("key", patience, Priority::Interactive)
}

/// When calls were made, of those that so many callers want at once.
async fn burst(limiters: &[Limiter], calls: usize, patience: Duration) -> Vec<Instant> {
    let callers = (0..calls).map(|number| async move {
        let _permit = limiters[number % limiters.len()].admit(&call(patience)).await.ok()?;
        Some(Instant::now())
    });
    join_all(callers).await.into_iter().flatten().collect()
}

fn most_within(made: &[Instant], span: Duration) -> usize {
    let mut made = made.to_vec();
    made.sort_unstable();
    let within = |first: usize| made[first..].iter().take_while(|at| **at < made[first] + span).count();
    (0..made.len()).map(within).max().unwrap_or(0)
}

/// What governor is there for. Without its buckets, which are the only ones a relay without Redis has, all forty calls
/// would leave at once.
#[tokio::test(start_paused = true)]
async fn under_demand_calls_are_evenly_spaced_and_after_rest_half_of_a_second_goes_at_once() {
    let limiter = limiter(config("40/s", ""));
    let start = Instant::now();
    let made = burst(&[limiter], 60, 20 * SECOND).await;
    assert_eq!(made.len(), 60);
    assert_eq!(made.iter().filter(|at| **at == start).count(), 20);
    assert_eq!(most_within(&made, SECOND), 40);
    let steady: Vec<Instant> = made.into_iter().filter(|at| *at > start + SECOND / 10).collect();
    assert!(most_within(&steady, SECOND / 10) <= 5);
    assert!(steady.iter().max().unwrap().duration_since(start) < 1600 * SECOND / 1000);
}

#[tokio::test(start_paused = true)]
async fn a_new_quota_of_a_day_is_there_in_full() {
    let limiter = limiter(config("5000/d", ""));
    let start = Instant::now();
    for _ in 0..8 {
        assert_eq!(burst(std::slice::from_ref(&limiter), 25, 20 * SECOND).await.len(), 25);
    }
    assert_eq!(start.elapsed(), Duration::ZERO);
    let quotas = limiter.quotas(&call(SECOND).tenant).await;
    assert_eq!((quotas[0].limit, quotas[0].used), (5000, 200));
}

#[tokio::test(start_paused = true)]
async fn several_windows_hold_at_once() {
    let limiter = limiter(config("10/s,30/h", ""));
    let start = Instant::now();
    let mut made = Vec::new();
    while start.elapsed() < 50 * SECOND {
        if limiter.admit(&call(SECOND / 2)).await.is_ok() {
            made.push(Instant::now());
        }
        sleep(SECOND / 20).await;
    }
    assert_eq!(made.len(), 30);
    assert!(most_within(&made, SECOND) <= 10 && made[29] <= start + 5 * SECOND, "{:?}", made[29] - start);
    let Err(Error::Limited { retry_after }) = limiter.admit(&call(SECOND)).await.map(drop) else {
        panic!("not refused")
    };
    assert!(retry_after > HOUR - MINUTE && retry_after <= HOUR * 102 / 100, "{retry_after:?}");
}

#[tokio::test(start_paused = true)]
async fn one_tenants_storm_leaves_the_others_alone() {
    let limiter = limiter(config("10/s", "1000/s"));
    let storm = join_all((0..2_000).map(|_| {
        let limiter = limiter.clone();
        async move { limiter.admit(&call_of("a", 20 * SECOND, Priority::Interactive)).await.is_ok() }
    }));
    let calm = async {
        let mut slowest = Duration::ZERO;
        for _ in 0..50 {
            let asked = Instant::now();
            limiter.admit(&call_of("b", 20 * SECOND, Priority::Interactive)).await.unwrap();
            slowest = slowest.max(asked.elapsed());
            sleep(SECOND / 5).await;
        }
        slowest
    };
    let (storm, slowest) = tokio::join!(storm, calm);
    assert!(slowest <= SECOND / 50, "b waited {slowest:?}");
    assert!(storm.iter().filter(|granted| **granted).count() <= 10 + 64);
}

#[tokio::test(start_paused = true)]
async fn who_shares_the_quota_with_others_is_told_by_what_they_leave() {
    let limiter = limiter(Config { queue: 1_000, ..config("", "10/s") });
    let ask = |key: &'static str, count: usize| {
        let limiter = limiter.clone();
        join_all((0..count).map(move |_| {
            let limiter = limiter.clone();
            async move { limiter.admit(&call_of(key, 60 * SECOND, Priority::Interactive)).await.is_ok() }
        }))
    };
    let late = async {
        // Once a whole span has shown how fast it moves.
        sleep(5 * SECOND).await;
        // 55 or so are before it. The whole quota would serve them in 5.5 s, half of it needs longer.
        let asked = Instant::now();
        let refused = limiter.admit(&call_of("a", 13 * SECOND / 2, Priority::Interactive)).await.map(drop);
        (refused, asked.elapsed())
    };
    let (a, b, (refused, waited)) = tokio::join!(ask("a", 80), ask("b", 80), late);
    assert!(a.iter().chain(&b).all(|granted| *granted));
    let Err(Error::Limited { retry_after }) = refused else { panic!("not refused") };
    assert_eq!(waited, Duration::ZERO, "it could have been told at once");
    assert!(retry_after > 13 * SECOND / 2 && retry_after < 16 * SECOND, "{retry_after:?}");
}

#[tokio::test(start_paused = true)]
async fn what_the_fleet_has_used_up_is_told_from_what_a_tenant_has() {
    let limiter = limiter(config("10/h", "12/h"));
    let refused =
        |scope| limiter.0.metrics.limiter_decisions.get((scope, Urgency::Interactive, Decision::Refused));
    let ask = async |key| {
        for _ in 0..11 {
            drop(limiter.admit(&call_of(key, SECOND / 10, Priority::Interactive)).await);
        }
    };
    ask("a").await;
    assert_eq!((refused(QuotaScope::Tenant), refused(QuotaScope::Fleet)), (1, 0));
    ask("b").await;
    assert_eq!((refused(QuotaScope::Tenant), refused(QuotaScope::Fleet)), (1, 9));
}

#[tokio::test(start_paused = true)]
async fn what_the_fleet_lacks_is_told_to_every_tenant_at_once() {
    let limiter = limiter(config("1000/s", "1/m"));
    limiter.admit(&call_of("first", SECOND, Priority::Interactive)).await.unwrap();
    let patient = {
        let limiter = limiter.clone();
        TaskTracker::new().spawn(async move {
            limiter.admit(&call_of("first", HOUR, Priority::Interactive)).await.map(drop)
        })
    };
    sleep(SECOND).await;
    let asked = Instant::now();
    for _ in 0..3 {
        let refused = limiter.admit(&call_of("second", 20 * SECOND, Priority::Interactive)).await.err();
        let Some(Error::Limited { retry_after }) = refused else { panic!("{refused:?}") };
        assert!(retry_after > 50 * SECOND, "{retry_after:?}");
    }
    assert_eq!(asked.elapsed(), Duration::ZERO);
    patient.await.unwrap().unwrap();
    assert!(asked.elapsed() < 61 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_its_own_quota_does_not_keep_the_turn_at_the_fleets() {
    let limiter = limiter(config("1/h", "1/s"));
    for key in ["first", "second"] {
        drop(limiter.admit(&call_of(key, 3 * SECOND, Priority::Interactive)).await.unwrap());
    }
    let waiting = {
        let limiter = limiter.clone();
        TaskTracker::new().spawn(async move {
            limiter.admit(&call_of("first", 2 * HOUR, Priority::Interactive)).await.map(drop)
        })
    };
    sleep(SECOND / 10).await;
    drop(limiter.admit(&call_of("third", 3 * SECOND, Priority::Interactive)).await.unwrap());
    waiting.await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_use_of_each_quota_is_told_to_who_asks_and_to_the_gauges() {
    let limiter = limiter(config("10/s,100/m", "1000/h"));
    for _ in 0..5 {
        drop(limiter.admit(&call(SECOND)).await.unwrap());
    }
    let quotas = limiter.quotas(&call(SECOND).tenant).await;
    let told: Vec<_> =
        quotas.iter().map(|quota| (quota.of_fleet, quota.limit, quota.per.as_secs(), quota.used)).collect();
    assert_eq!(told, [(false, 10, 1, 5), (false, 100, 60, 5), (true, 1000, 3_600, 5)]);

    let gauge = |scope, window| limiter.0.metrics.limiter_used.get((scope, window));
    limiter.measure();
    assert_eq!(gauge(QuotaScope::Tenant, QuotaWindow::Second), 0.5);
    assert_eq!(gauge(QuotaScope::Tenant, QuotaWindow::Minute), 0.05);
    assert_eq!(gauge(QuotaScope::Fleet, QuotaWindow::Hour), 0.005);
    assert_eq!(gauge(QuotaScope::Fleet, QuotaWindow::Second), 0.0);
    sleep(2 * SECOND).await;
    limiter.measure();
    assert_eq!(gauge(QuotaScope::Tenant, QuotaWindow::Second), 0.0, "what was used in a second that is over");
    assert_eq!(gauge(QuotaScope::Tenant, QuotaWindow::Minute), 0.05);
}

#[tokio::test(start_paused = true)]
async fn a_tenant_may_have_quotas_of_its_own() {
    let name = |key| call_of(key, SECOND, Priority::Interactive).tenant.label().to_string();
    let tenants = [(name("large"), vec!["50/h".parse().unwrap()]), (name("free"), Vec::new())];
    let limiter = limiter(Config { tenants: tenants.into(), ..config("5/h", "") });
    let granted = async |key| {
        let calls = (0..60).map(|_| call_of(key, SECOND / 10, Priority::Interactive));
        let mut granted = 0;
        for call in calls {
            granted += usize::from(limiter.admit(&call).await.is_ok());
        }
        granted
    };
    assert_eq!((granted("small").await, granted("large").await, granted("free").await), (5, 50, 60));
    limiter.reconfigure(Config {
        tenants: [(name("small"), vec!["20/h".parse().unwrap()])].into(),
        ..config("5/h", "")
    });
    assert_eq!(granted("small").await, 15, "those made before count");
    assert_eq!((granted("large").await, granted("free").await), (0, 5));
}

#[tokio::test(start_paused = true)]
async fn a_call_under_way_while_quotas_change_is_counted_in_the_new_window_too() {
    let limiter = limiter(config("5/h", ""));
    let permit = limiter.admit(&call(SECOND)).await.unwrap();
    limiter.reconfigure(config("3/h", ""));
    drop(permit);
    assert_eq!(limiter.quotas(&call(SECOND).tenant).await[0].used, 1);
    assert_eq!(burst(&[limiter], 5, SECOND).await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_dry_run_refuses_nothing_and_counts_what_it_would_have_refused() {
    let limiter = limiter(Config { dry_run: true, ..config("10/h,4/s", "") });
    let fate = |priority, fate| limiter.0.metrics.limiter_dry_run.get((QuotaScope::Tenant, priority, fate));
    for _ in 0..20 {
        limiter.admit(&call(SECOND)).await.unwrap();
    }
    assert_eq!(fate(Urgency::Interactive, DryRun::Delayed), 18);
    for _ in 0..20 {
        sleep(SECOND).await;
        limiter.admit(&call(SECOND)).await.unwrap();
    }
    assert_eq!(fate(Urgency::Interactive, DryRun::Refused), 12);
    limiter.admit(&call_of("key", SECOND, Priority::Prefetch)).await.unwrap();
    assert_eq!(fate(Urgency::Prefetch, DryRun::Refused), 1);
    assert_eq!(
        limiter.quotas(&call(SECOND).tenant).await[0].used,
        10,
        "what would have been made is counted"
    );
    // A pause is CyberScan's wish, and no quota of ours.
    limiter.answered(&call(SECOND), Pace::TooFast { retry_after: Some(5 * SECOND) }).await;
    assert!(limiter.admit(&call(SECOND)).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_pause_cyberscan_asks_for_is_kept_by_that_tenant_only() {
    let limiter = limiter(config("", ""));
    limiter.answered(&call(SECOND), Pace::TooFast { retry_after: Some(7 * SECOND) }).await;
    let Err(Error::Limited { retry_after }) = limiter.admit(&call(5 * SECOND)).await.map(drop) else {
        panic!("not refused")
    };
    assert_eq!(retry_after, 7 * SECOND);
    assert!(limiter.admit(&call_of("other", SECOND, Priority::Interactive)).await.is_ok());
    sleep(7 * SECOND).await;
    assert!(limiter.admit(&call(SECOND)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn prefetching_never_waits_and_leaves_a_reserve() {
    let limiter = limiter(config("100/h", ""));
    let prefetch = async || limiter.admit(&call_of("key", 20 * SECOND, Priority::Prefetch)).await.is_ok();
    let mut granted = 0;
    for _ in 0..200 {
        granted += u32::from(prefetch().await);
    }
    assert_eq!(granted, 50);
    assert_eq!(burst(&[limiter], 60, SECOND).await.len(), 50, "the reserve was gone");
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_tenants_are_remembered_those_who_asked_last() {
    let limiter = limiter(config("10/s", ""));
    let tenant = |number: u32| call_of(&format!("key-{number}"), SECOND, Priority::Interactive).tenant;
    for number in 0..12_000 {
        limiter.queue(&tenant(number));
        sleep(Duration::from_millis(1)).await;
    }
    let newest = limiter.queue(&tenant(12_000));
    limiter.0.tenants.run_pending_tasks();
    assert_eq!(limiter.0.tenants.entry_count(), TENANTS);
    assert!(Arc::ptr_eq(&newest, &limiter.queue(&tenant(12_000))));
}

#[tokio::test]
async fn a_new_quota_of_a_day_is_there_in_full_with_redis_too() {
    let server = RedisServer::start().await;
    let replicas = [(); 2].map(|()| limiter_on(config("5000/d", ""), Some(&server)));
    for _ in 0..8 {
        assert_eq!(burst(&replicas, 25, 20 * SECOND).await.len(), 25);
    }
    let quotas = replicas[0].quotas(&call(SECOND).tenant).await;
    assert_eq!((quotas[0].limit, quotas[0].used), (5000, 200));
}

#[tokio::test]
async fn without_quotas_redis_is_not_asked() {
    let server = RedisServer::process(&[]).await;
    let limiter = limiter_on(config("", ""), Some(&server));
    assert_eq!(burst(&[limiter], 100, SECOND).await.len(), 100);
    let stats: String = server.ask(&["INFO", "commandstats"]).await;
    assert!(!stats.contains("evalsha"), "{stats}");
}

#[tokio::test]
async fn a_pause_holds_for_every_replica() {
    let server = RedisServer::start().await;
    let replicas = [(); 2].map(|()| limiter_on(config("100/s", ""), Some(&server)));
    for replica in &replicas {
        drop(replica.admit(&call(5 * SECOND)).await.unwrap());
    }
    let pace = Pace::TooFast { retry_after: Some(2 * SECOND) };
    replicas[0].answered(&call(SECOND), pace).await;
    let refused = replicas[1].admit(&call(SECOND / 2)).await.map(drop);
    assert!(matches!(refused, Err(Error::Limited { .. })), "{refused:?}");
    let asked = Instant::now();
    replicas[1].admit(&call(10 * SECOND)).await.unwrap();
    assert!(asked.elapsed() >= SECOND, "the pause was over too soon");
}

#[tokio::test]
async fn a_fleets_quota_is_kept_by_all_replicas_and_shared_by_all_tenants() {
    let server = RedisServer::start().await;
    let replicas =
        [(); 3].map(|()| limiter_on(Config { queue: 1_000, ..config("1000/s", "40/s") }, Some(&server)));
    let start = Instant::now();
    let callers = (0..200).map(|number: usize| {
        let replica = &replicas[number % 3];
        async move {
            let key = ["one", "two", "three", "four"][number / 3 % 4];
            let _permit = replica.admit(&call_of(key, 20 * SECOND, Priority::Interactive)).await.ok()?;
            Some(Instant::now())
        }
    });
    let made: Vec<Instant> = join_all(callers).await.into_iter().flatten().collect();
    assert_eq!(made.len(), 200);
    let took = start.elapsed();
    assert!(most_within(&made, SECOND * 98 / 100) <= 40, "{}", most_within(&made, SECOND));
    // 180 beyond the burst, at 39 a second.
    assert!(took < SECOND * 57 / 10, "{took:?}: calls of the fleet's are lost");
    let slots: Vec<String> = server.ask(&["KEYS", "relay:1:{*}:quota"]).await;
    assert_eq!(slots.len(), 5, "four tenants and the fleet: {slots:?}");
}

#[tokio::test]
async fn replicas_together_keep_the_quota_with_and_without_redis() {
    let mut server = RedisServer::process(&[]).await;
    let replicas: Vec<Limiter> = (0..3).map(|_| limiter_on(config("40/s", ""), Some(&server))).collect();
    let stop = CancellationToken::new();
    let made: Arc<Mutex<Vec<Instant>>> = Arc::default();
    let callers: Vec<_> = replicas
        .iter()
        .flat_map(|replica| (0..8).map(move |_| replica.clone()))
        .map(|replica| {
            let (made, stop) = (Arc::clone(&made), stop.clone());
            TaskTracker::new().spawn(stop.run_until_cancelled_owned(async move {
                loop {
                    match replica.admit(&call(2 * SECOND)).await {
                        Ok(_) => made.lock().unwrap().push(Instant::now()),
                        // Refused at once: without a break nobody else would ever run.
                        Err(_) => sleep(SECOND / 100).await,
                    }
                }
            }))
        })
        .collect();
    let so_far = || made.lock().unwrap().len();

    sleep(4 * SECOND).await;
    let with_redis = so_far();
    server.kill();
    sleep(4 * SECOND).await;
    let without = so_far() - with_redis;
    server.restart().await;
    sleep(3 * SECOND).await;
    let back = so_far() - with_redis - without;
    stop.cancel();
    join_all(callers).await;
    let made = made.lock().unwrap().clone();
    // Granted and noted are not the same moment; on a busy machine they are some milliseconds apart.
    let most = most_within(&made, SECOND * 97 / 100);
    assert!(most <= 40, "{most} calls in a second");
    assert!(with_redis >= 145, "{with_redis} calls in 4 seconds");
    assert!(
        (60..=130).contains(&without),
        "{without} calls in 4 seconds without redis: nine tenths of three"
    );
    assert!(back >= 50, "{back} calls in 3 seconds after it came back");
}

/// A memory that is lost begins anew after a second, without a burst, and with what was used of a day.
#[tokio::test]
async fn what_redis_forgets_the_replicas_remember() {
    let server = RedisServer::process(&[]).await;
    let quota = Config { queue: 1_000, ..config("100/s,260/d", "") };
    let replicas = [(); 2].map(|()| limiter_on(quota.clone(), Some(&server)));
    let mut made = burst(&replicas, 90, 3 * SECOND).await;
    for _ in 0..3 {
        let _: String = server.ask(&["FLUSHALL"]).await;
        made.extend(burst(&replicas, 60, 5 * SECOND).await);
    }
    assert_eq!(made.len(), 260, "all of the day, and no more");
    let most = most_within(&made, SECOND * 98 / 100);
    assert!(most <= 100, "{most} calls in a second");
}

/// A Redis that is started again without its data grants what is left, in seconds as in days. When all replicas are, too,
/// nobody knows what has been used of the day: that is what Redis's persistence is for.
#[tokio::test]
async fn a_restart_of_redis_without_its_data_costs_no_call_too_many_and_one_of_everything_a_day_at_most() {
    let mut server = RedisServer::process(&[]).await;
    let quota = Config { queue: 1_000, ..config("50/s,200/d", "") };
    let replicas = [(); 3].map(|()| limiter_on(quota.clone(), Some(&server)));
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    for limiter in &replicas {
        tasks.spawn(limiter.clone().tidy(shutdown.clone()));
    }
    let mut made = burst(&replicas, 60, 5 * SECOND).await;
    for _ in 0..2 {
        server.kill();
        let (more, ()) = tokio::join!(burst(&replicas, 60, 5 * SECOND), async {
            sleep(SECOND).await;
            server.restart().await;
        });
        made.extend(more);
    }
    made.extend(burst(&replicas, 150, 5 * SECOND).await);
    eprintln!("redis twice: {} of 200, {} in a second", made.len(), most_within(&made, SECOND * 98 / 100));
    assert!((195..=200).contains(&made.len()), "{} of a day's 200", made.len());
    assert!(most_within(&made, SECOND * 98 / 100) <= 50);
    shutdown.cancel();
    drop(replicas);
    server.kill();
    server.restart().await;
    let replicas = [(); 3].map(|()| limiter_on(quota.clone(), Some(&server)));
    let again = burst(&replicas, 250, 6 * SECOND).await;
    made.extend(&again);
    eprintln!("all: {} more, {} in a second", again.len(), most_within(&made, SECOND * 98 / 100));
    assert_eq!(again.len(), 200, "a new day");
    assert!(most_within(&made, SECOND * 98 / 100) <= 75, "more than a burst besides");
}

#[tokio::test]
async fn tenants_windows_are_on_all_nodes_of_a_cluster() {
    let nodes = RedisServer::cluster().await;
    let redis = Redis::to_cluster(&nodes.each_ref().map(RedisServer::url));
    let limiter = Limiter::new(
        config("20/s", "1000/s"),
        Some(redis),
        Latencies::default(),
        Metrics::new(),
        TaskTracker::new(),
    );
    for number in 0..30 {
        let call = call_of(&number.to_string(), SECOND, Priority::Interactive);
        drop(limiter.admit(&call).await.unwrap());
    }
    let mut windows = 0;
    for node in &nodes {
        let here = node.ask::<Vec<String>>(&["KEYS", "relay:1:*:quota"]).await.len();
        assert!(here > 3, "{here} of 31 on one node");
        windows += here;
    }
    assert_eq!(windows, 31, "one of each tenant, and the fleet's");
}

/// Others do not spend what one has spent already, also if that one has no more to ask.
#[tokio::test]
async fn who_has_nothing_to_ask_tells_redis_what_it_has_forgotten() {
    let server = RedisServer::process(&[]).await;
    let replicas = [(); 2].map(|()| limiter_on(config("100/d,40/s", ""), Some(&server)));
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    for limiter in &replicas {
        tasks.spawn(limiter.clone().tidy(shutdown.clone()));
    }
    let [quiet, other] = &replicas;
    assert_eq!(burst(std::slice::from_ref(quiet), 60, 5 * SECOND).await.len(), 60);
    let _: String = server.ask(&["FLUSHALL"]).await;
    sleep(SECOND * 5 / 2).await;
    assert_eq!(burst(std::slice::from_ref(other), 60, 3 * SECOND).await.len(), 40, "all that was left");
    shutdown.cancel();
}

/// A share is used up by what Redis granted in the last second: taken for the pace, that was a refusal of everyone
/// who could have been served a moment later.
#[tokio::test]
async fn who_waits_while_redis_is_lost_is_not_told_that_it_takes_for_ever() {
    let mut server = RedisServer::process(&[]).await;
    let limiter = limiter_on(Config { queue: 256, ..config("100/s", "") }, Some(&server));
    burst(std::slice::from_ref(&limiter), 90, 5 * SECOND).await;
    server.kill();
    // Thirty a second, once a second has passed. Some come later, and find the others.
    let callers = (0..100).map(|number| {
        let limiter = &limiter;
        async move {
            sleep(SECOND * (number % 10) / 5).await;
            limiter.admit(&call(8 * SECOND)).await.map(drop)
        }
    });
    let refused = join_all(callers).await.into_iter().filter_map(Result::err).collect::<Vec<_>>();
    assert!(refused.is_empty(), "{} refused: {:?}", refused.len(), refused[0]);
}

#[tokio::test]
async fn a_moment_without_redis_costs_nobody_an_answer_and_is_counted() {
    let server = RedisServer::process(&[]).await;
    let limiter = limiter_on(config("100/d", "1000/d"), Some(&server));
    assert_eq!(burst(std::slice::from_ref(&limiter), 10, 5 * SECOND).await.len(), 10);
    server.freeze();
    // Of the 90 that are left this replica has three tenths.
    assert_eq!(burst(std::slice::from_ref(&limiter), 40, 2 * SECOND).await.len(), 27);
    let quotas = limiter.quotas(&call(SECOND).tenant).await;
    assert_eq!((quotas[0].limit, quotas[0].used), (30, 37), "what is in force");
    server.thaw();
    let thawed = Instant::now();
    while limiter.admit(&call(SECOND)).await.is_err()
        || limiter.quotas(&call(SECOND).tenant).await[0].limit != 100
    {
        assert!(thawed.elapsed() < 10 * SECOND, "Redis is not found again");
        sleep(SECOND / 10).await;
    }
    let other = limiter_on(config("100/d", "1000/d"), Some(&server));
    let used = other.quotas(&call(SECOND).tenant).await[0].used;
    let own = limiter.quotas(&call(SECOND).tenant).await[0].used;
    assert_eq!(used, own, "Redis has been told, once");
    assert!(own >= 38, "{own}");
}

#[tokio::test]
async fn without_redis_tenants_take_turns_at_the_whole_share_of_the_fleet() {
    let mut server = RedisServer::process(&[]).await;
    let limiter = &limiter_on(config("120/s", "150/s"), Some(&server));
    server.kill();
    // Forty a second for four seconds; the share is 45.
    let callers = (0..160).map(|number| async move {
        sleep(SECOND * number / 40).await;
        let key = ["one", "another", "one"][number as usize % 3];
        let asked = Instant::now();
        limiter.admit(&call_of(key, 10 * SECOND, Priority::Interactive)).await.ok().map(|_| asked.elapsed())
    });
    let waits: Option<Vec<Duration>> = join_all(callers).await.into_iter().collect();
    let longest = waits.expect("refused").into_iter().max().unwrap();
    assert!(longest < 3 * SECOND, "{longest:?}");
}

#[tokio::test]
async fn windows_nobody_uses_are_gone_from_redis() {
    let server = RedisServer::start().await;
    let limiter = limiter_on(config("10/s", "100/s"), Some(&server));
    let shutdown = CancellationToken::new();
    let tasks = TaskTracker::new();
    tasks.spawn(limiter.clone().tidy(shutdown.clone()));
    drop(limiter.admit(&call(SECOND)).await.unwrap());
    let windows = async || server.ask::<Vec<String>>(&["KEYS", "*:quota"]).await.len();
    assert_eq!(windows().await, 2);
    let start = Instant::now();
    while windows().await > 0 {
        assert!(start.elapsed() < 6 * SECOND, "still there");
        sleep(SECOND / 10).await;
    }
    drop(limiter.admit(&call(SECOND)).await.unwrap());
    shutdown.cancel();
}
