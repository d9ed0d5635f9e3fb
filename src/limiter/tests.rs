//! The limiter in virtual time, without Redis and with one that is away.

use futures_util::future::join_all;

use super::*;
use crate::{
    metrics::Metrics,
    redis_server::RedisServer,
    tenant::{ApiKey, Tenant as Who},
};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);

fn config(tenant: &str, fleet: &str) -> Config {
    let windows =
        |text: &str| text.split(',').filter(|w| !w.is_empty()).map(|w| w.parse().unwrap()).collect();
    Config {
        tenant: windows(tenant),
        fleet: windows(fleet),
        fallback_share: 0.3,
        reserve: 0.5,
        queue: 64,
        concurrency: 1_000,
    }
}

fn limiter(config: Config) -> Limiter {
    Limiter::new(config, None, Metrics::new(), TaskTracker::new())
}

fn call_of(key: &str, patience: Duration, priority: Priority) -> Call {
    let tenant = Who::new("api.example.com".parse().unwrap(), ApiKey::new(key.into()));
    Call::new(Arc::new(tenant), Instant::now() + patience, priority)
}

fn call(patience: Duration) -> Call {
    call_of("key", patience, Priority::Interactive)
}

/// Brings the windows into being and lets them grow to their limit.
async fn grown(limiter: &Limiter, keys: &[&str]) {
    for key in keys {
        drop(limiter.admit(&call_of(key, SECOND, Priority::Interactive)).await.unwrap());
    }
    sleep(3 * SECOND).await;
}

#[tokio::test(start_paused = true)]
async fn calls_wait_for_their_turn_in_the_order_they_came() {
    let limiter = limiter(config("10/s", ""));
    grown(&limiter, &["key"]).await;
    let start = Instant::now();
    let granted = Arc::new(Mutex::new(Vec::new()));
    join_all((0..60).map(|number| {
        let (limiter, granted) = (limiter.clone(), Arc::clone(&granted));
        async move {
            limiter.admit(&call(20 * SECOND)).await.unwrap();
            granted.lock().unwrap().push((number, start.elapsed()));
        }
    }))
    .await;
    let granted = granted.lock().unwrap().clone();
    assert!(granted.iter().map(|(number, _)| *number).eq(0..60), "{granted:?}");
    for (place, (_, at)) in granted.iter().enumerate() {
        let ideal = SECOND * u32::try_from(place / 10).unwrap();
        assert!(*at >= ideal && *at <= ideal + SECOND / 5, "place {place} at {at:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn who_could_not_be_served_in_time_is_refused_at_once_with_the_seconds() {
    let limiter = limiter(config("5/m", ""));
    grown(&limiter, &["key"]).await;
    sleep(70 * SECOND).await;
    let start = Instant::now();
    let outcomes = join_all((0..50).map(|_| async { limiter.admit(&call(10 * SECOND)).await })).await;
    assert!(start.elapsed() <= 10 * SECOND);
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 5);
    let asked = Instant::now();
    let refused = limiter.admit(&call(10 * SECOND)).await;
    let Err(Error::Throttled { retry_after }) = refused else { panic!("not refused") };
    assert_eq!(asked.elapsed(), Duration::ZERO);
    assert!(retry_after > 10 * SECOND && retry_after <= 61 * SECOND, "{retry_after:?}");
}

#[tokio::test(start_paused = true)]
async fn nobody_is_granted_a_call_that_could_not_be_answered_any_more() {
    let limiter = limiter(config("10/s", ""));
    grown(&limiter, &["key"]).await;
    // Batches of ten are granted a little more than a second apart: the fourth would come 3.1 s after the first.
    let start = Instant::now();
    let deadline = 3200 * SECOND / 1000;
    let waiting =
        (0..60).map(|_| async { limiter.admit(&call(deadline)).await.is_ok().then(|| start.elapsed()) });
    let granted: Vec<Duration> = join_all(waiting).await.into_iter().flatten().collect();
    let last = *granted.iter().max().unwrap();
    assert!(last >= 2 * SECOND && last <= deadline * 9 / 10, "the last one waited {last:?}");
}

#[tokio::test(start_paused = true)]
async fn the_queue_is_bounded_and_a_caller_who_leaves_gives_its_place_back() {
    let limiter = limiter(Config { queue: 10, ..config("10/s", "") });
    grown(&limiter, &["key"]).await;
    for _ in 0..10 {
        limiter.admit(&call(SECOND)).await.unwrap();
    }
    let mut waiting = Box::pin(join_all((0..10).map(|_| async { limiter.admit(&call(20 * SECOND)).await })));
    assert!(timeout_at(Instant::now() + SECOND / 100, &mut waiting).await.is_err());
    assert!(matches!(limiter.admit(&call(20 * SECOND)).await, Err(Error::Throttled { .. })));
    drop(waiting);
    assert!(limiter.admit(&call(20 * SECOND)).await.is_ok(), "places of those who left are still taken");
}

#[tokio::test(start_paused = true)]
async fn one_tenants_storm_leaves_the_others_alone() {
    let limiter = limiter(config("10/s", "1000/s"));
    grown(&limiter, &["a", "b"]).await;
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
    assert!(slowest <= SECOND / 100, "b waited {slowest:?}");
    assert!(storm.iter().filter(|granted| **granted).count() <= 10 + 64);
}

#[tokio::test(start_paused = true)]
async fn tenants_take_turns_at_what_they_share() {
    let limiter = limiter(Config { queue: 1_000, ..config("", "10/s") });
    grown(&limiter, &["a"]).await;
    let served = Arc::new(Mutex::new([0_u32; 2]));
    let ask = |key: &'static str, index: usize, count: usize| {
        let (limiter, served) = (limiter.clone(), Arc::clone(&served));
        join_all((0..count).map(move |_| {
            let (limiter, served) = (limiter.clone(), Arc::clone(&served));
            async move {
                if limiter.admit(&call_of(key, 10 * SECOND, Priority::Interactive)).await.is_ok() {
                    served.lock().unwrap()[index] += 1;
                }
            }
        }))
    };
    tokio::join!(ask("a", 0, 90), ask("b", 1, 30));
    let served = *served.lock().unwrap();
    assert!(served[1] == 30, "the smaller tenant got {served:?}");
}

#[tokio::test(start_paused = true)]
async fn who_shares_the_quota_with_others_is_told_by_what_they_leave() {
    let limiter = limiter(Config { queue: 1_000, ..config("", "10/s") });
    grown(&limiter, &["a"]).await;
    let ask = |key: &'static str, count: usize| {
        let limiter = limiter.clone();
        join_all((0..count).map(move |_| {
            let limiter = limiter.clone();
            async move { limiter.admit(&call_of(key, 60 * SECOND, Priority::Interactive)).await.is_ok() }
        }))
    };
    let late = async {
        sleep(4 * SECOND).await;
        // 60 or so are before it. The whole quota would serve them in 6 s, half of it needs longer.
        let asked = Instant::now();
        let refused = limiter.admit(&call_of("a", 7 * SECOND, Priority::Interactive)).await.map(drop);
        (refused, asked.elapsed())
    };
    let (a, b, (refused, waited)) = tokio::join!(ask("a", 80), ask("b", 80), late);
    assert!(a.iter().chain(&b).all(|granted| *granted));
    let Err(Error::Throttled { retry_after }) = refused else { panic!("not refused") };
    assert_eq!(waited, Duration::ZERO, "it could have been told at once");
    assert!(retry_after > 7 * SECOND && retry_after < 16 * SECOND, "{retry_after:?}");
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_has_just_formed_is_not_judged_by_its_pace() {
    let limiter = limiter(config("10/s", ""));
    grown(&limiter, &["key"]).await;
    let admit = async |patience| limiter.admit(&call(patience)).await.map(drop);
    for _ in 0..9 {
        admit(SECOND).await.unwrap();
    }
    // One is left for six; the next ten are there in a second, but until then this looks like one in 0.9 s.
    let early = join_all((0..6).map(|_| admit(60 * SECOND)));
    let late = async {
        sleep(9 * SECOND / 10).await;
        admit(3 * SECOND).await
    };
    let (early, late) = tokio::join!(early, late);
    assert!(early.iter().all(Result::is_ok));
    assert_eq!(late, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn what_the_fleet_has_used_up_is_told_from_what_a_tenant_has() {
    let limiter = limiter(config("10/s", "12/s"));
    grown(&limiter, &["a", "b"]).await;
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
    grown(&limiter, &["first"]).await;
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
        let Some(Error::Throttled { retry_after }) = refused else { panic!("{refused:?}") };
        assert!(retry_after > 50 * SECOND, "{retry_after:?}");
    }
    assert_eq!(asked.elapsed(), Duration::ZERO);
    patient.await.unwrap().unwrap();
    assert!(asked.elapsed() < 61 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_its_own_quota_does_not_keep_the_turn_at_the_fleets() {
    let limiter = limiter(config("1/h", "1/s"));
    grown(&limiter, &["first"]).await;
    // In a moment in which the fleet has nothing left either.
    drop(limiter.admit(&call_of("second", SECOND, Priority::Interactive)).await.unwrap());
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
    grown(&limiter, &["key"]).await;
    // What that took is out of the longest window.
    sleep(2 * 3600 * SECOND).await;
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
async fn a_pause_cyberscan_asks_for_is_kept_to_the_second_and_grows_where_it_says_nothing() {
    let limiter = limiter(config("", ""));
    limiter.answered(&call(SECOND), Pace::TooFast { retry_after: Some(7 * SECOND) }).await;
    let Err(Error::Throttled { retry_after }) = limiter.admit(&call(5 * SECOND)).await.map(drop) else {
        panic!("not refused")
    };
    assert_eq!(retry_after, 7 * SECOND);
    assert!(limiter.admit(&call_of("other", SECOND, Priority::Interactive)).await.is_ok());
    sleep(7 * SECOND).await;
    assert!(limiter.admit(&call(SECOND)).await.is_ok());
    limiter.answered(&call(SECOND), Pace::Fine).await;

    let mut pauses = Vec::new();
    for _ in 0..8 {
        limiter.answered(&call(SECOND), Pace::TooFast { retry_after: None }).await;
        let paused = limiter.tenant(call(SECOND).tenant.id()).paused().unwrap();
        pauses.push(paused.as_secs());
        sleep(paused).await;
    }
    assert_eq!(pauses, [1, 2, 4, 8, 16, 32, 60, 60]);
}

#[tokio::test(start_paused = true)]
async fn prefetching_never_waits_and_leaves_a_reserve() {
    let limiter = limiter(config("10/s", ""));
    grown(&limiter, &["key"]).await;
    let prefetch = async || limiter.admit(&call_of("key", 20 * SECOND, Priority::Prefetch)).await.is_ok();
    let start = Instant::now();
    let mut granted = 0;
    for _ in 0..20 {
        granted += u32::from(prefetch().await);
    }
    assert_eq!((granted, start.elapsed()), (5, Duration::ZERO));
    for _ in 0..5 {
        limiter.admit(&call(SECOND)).await.unwrap();
    }
    assert_eq!(start.elapsed(), Duration::ZERO, "the reserve was gone");
}

#[tokio::test(start_paused = true)]
async fn prefetching_leaves_a_reserve_of_slots_and_keeps_a_pause() {
    let limiter = limiter(Config { concurrency: 4, ..config("", "") });
    let prefetch = async || limiter.admit(&call_of("key", 20 * SECOND, Priority::Prefetch)).await;
    let (one, two) = (prefetch().await.unwrap(), prefetch().await.unwrap());
    assert!(
        matches!(prefetch().await.map(drop), Err(Error::Throttled { .. })),
        "half of the slots is the reserve"
    );
    let interactive =
        [limiter.admit(&call(SECOND)).await.unwrap(), limiter.admit(&call(SECOND)).await.unwrap()];
    drop((one, two, interactive));

    limiter.answered(&call(SECOND), Pace::TooFast { retry_after: Some(5 * SECOND) }).await;
    assert_eq!(prefetch().await.map(drop), Err(Error::Throttled { retry_after: 5 * SECOND }));
}

#[tokio::test(start_paused = true)]
async fn a_tenant_has_so_many_calls_under_way_and_no_more() {
    let limiter = limiter(Config { concurrency: 3, ..config("", "") });
    let mut under_way = Vec::new();
    for _ in 0..3 {
        under_way.push(limiter.admit(&call(SECOND)).await.unwrap());
    }
    assert!(matches!(limiter.admit(&call(SECOND)).await, Err(Error::Throttled { .. })));
    under_way.pop();
    assert!(limiter.admit(&call(SECOND)).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_tenants_are_remembered_those_who_asked_last() {
    let limiter = limiter(config("10/s", ""));
    let id = |number: u32| call_of(&format!("key-{number}"), SECOND, Priority::Interactive).tenant.id();
    for number in 0..12_000 {
        limiter.tenant(id(number));
        sleep(Duration::from_millis(1)).await;
    }
    let newest = limiter.tenant(id(12_000));
    limiter.0.tenants.run_pending_tasks();
    assert_eq!(limiter.0.tenants.entry_count(), TENANTS);
    assert!(Arc::ptr_eq(&newest, &limiter.tenant(id(12_000))));
}

#[tokio::test(start_paused = true)]
async fn several_windows_hold_at_once() {
    let limiter = limiter(config("10/s,30/m", ""));
    grown(&limiter, &["key"]).await;
    sleep(70 * SECOND).await;
    let start = Instant::now();
    let mut at = Vec::new();
    while start.elapsed() < 50 * SECOND {
        if limiter.admit(&call(SECOND / 2)).await.is_ok() {
            at.push(start.elapsed());
        }
        sleep(SECOND / 20).await;
    }
    assert_eq!(at.len(), 30);
    assert!(at[29] >= 2 * SECOND && at[29] <= 4 * SECOND, "{:?}", at[29]);
}

/// What a caller does: comes, waits as long as it has, may leave before, holds its call for a moment.
struct Caller {
    comes: Duration,
    patience: Duration,
    leaves: Option<Duration>,
    holds: Duration,
    too_fast: bool,
}

#[tokio::test(start_paused = true)]
async fn callers_come_and_go_and_nobody_who_stays_is_forgotten() {
    const AT_ONCE: usize = 3;
    for seed in 0..300 {
        let mut number = numbers(seed);
        let limiter = limiter(Config { concurrency: AT_ONCE, ..config("10/s", "") });
        grown(&limiter, &["key"]).await;
        let under_way = Semaphore::new(AT_ONCE);
        let callers: Vec<Caller> = (0..50)
            .map(|_| {
                let mut millis = |below| Duration::from_millis(number(below).into());
                let (comes, short, leaves, holds) =
                    (millis(3_000), millis(3_000), millis(1_500), millis(200));
                let patient = number(2) == 0;
                Caller {
                    comes,
                    patience: if patient { 60 * SECOND } else { short },
                    leaves: (number(3) == 0).then_some(leaves),
                    holds,
                    too_fast: number(25) == 0,
                }
            })
            .collect();
        let (limiter, under_way) = (&limiter, &under_way);
        let granted = join_all(callers.into_iter().map(|caller| async move {
            sleep(caller.comes).await;
            let latest = Instant::now() + caller.leaves.unwrap_or(caller.patience + SECOND / 1_000);
            let call = call(caller.patience);
            let Ok(outcome) = timeout_at(latest, limiter.admit(&call)).await else {
                assert!(caller.leaves.is_some(), "seed {seed}: who stayed has no outcome");
                return None;
            };
            let at = Instant::now();
            let patient = caller.patience == 60 * SECOND;
            assert!(outcome.is_ok() || !patient, "seed {seed}: who had time was refused");
            let permit = outcome.ok()?;
            let place = under_way.try_acquire();
            assert!(place.is_ok(), "seed {seed}: more than {AT_ONCE} calls at once");
            sleep(caller.holds).await;
            if caller.too_fast {
                limiter.answered(&call, Pace::TooFast { retry_after: Some(SECOND) }).await;
            }
            drop(place);
            drop(permit);
            Some(at)
        }))
        .await;
        let mut granted: Vec<Instant> = granted.into_iter().flatten().collect();
        granted.sort();
        for eleven in granted.windows(11) {
            assert!(eleven[10] - eleven[0] >= SECOND, "seed {seed}: eleven calls in a second");
        }
        // The last who left may still have been in the queue.
        sleep(3 * SECOND).await;
        let tenant = limiter.tenant(call(SECOND).tenant.id());
        assert_eq!(tenant.slots.available_permits(), AT_ONCE, "seed {seed}: a slot was not given back");
        {
            let queue = lock(&tenant.queue);
            assert!(queue.waiting.is_empty() && !queue.served, "seed {seed}: the queue is served for nobody");
        }
        let asked = Instant::now();
        drop(limiter.admit(&call(SECOND)).await.unwrap());
        assert_eq!(asked.elapsed(), Duration::ZERO, "seed {seed}");
    }
}

/// Numbers that look like chance and are the same for the same seed.
fn numbers(mut seed: u64) -> impl FnMut(u32) -> u32 {
    move |below| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from(seed >> 33).unwrap() % below
    }
}

#[tokio::test]
async fn the_script_does_what_the_model_does() {
    let server = RedisServer::start().await;
    let quota = SharedQuota::new(Redis::to(&server.url()));
    let mut number = numbers(7);
    for (case, (of_tenant, of_fleet)) in [
        ("20/s", ""),
        ("7/s,40/m", ""),
        ("200/s", "50/s"),
        ("", "3/s"),
        ("1000/s,5000/d", "700/s"),
        ("40000/w,100000/30d", "1000000000/366d"),
    ]
    .iter()
    .enumerate()
    {
        let Config { tenant, fleet, .. } = config(of_tenant, of_fleet);
        let id = call_of(&format!("key-{case}"), SECOND, Priority::Interactive).tenant.id();
        let owe_nothing =
            |windows: &[Window]| windows.iter().map(|window| owing(*window, 0, &[])).collect::<Vec<_>>();
        let (of_tenant, of_fleet) = (owe_nothing(&tenant), owe_nothing(&fleet));
        // The fleet's keys are shared by all cases.
        server.ask::<String>(&["FLUSHALL"]).await;
        let mut models: Vec<SlidingWindow> = Vec::new();
        for step in 0..150 {
            let (calls, leave) = (1 + number(12), f64::from(number(4) / 3) / 2.0);
            let demand = Demand { tenant: id, of_tenant: &of_tenant, of_fleet: &of_fleet, calls, leave };
            let (grant, now) = quota.take_at(&demand).await.unwrap();
            if models.is_empty() {
                models.extend(tenant.iter().chain(&fleet).map(|window| SlidingWindow::new(*window, now)));
            }
            let free = models.iter_mut().map(|model| {
                let kept = (f64::from(model.ceiling(now)) * leave) as u32;
                model.available(now).saturating_sub(kept)
            });
            let expected = free.min().unwrap().min(calls);
            assert_eq!(grant.calls, expected, "case {case}, step {step}");
            for (model, used) in models.iter_mut().zip(&grant.used) {
                if expected > 0 {
                    model.take(now, expected);
                }
                assert_eq!(model.used(now), *used, "case {case}, step {step}");
            }
            sleep(Duration::from_millis(u64::from(number(25)))).await;
        }
    }
}

#[tokio::test]
async fn what_redis_has_lost_starts_empty_and_what_was_made_meanwhile_is_counted() {
    let server = RedisServer::start().await;
    let quota = SharedQuota::new(Redis::to(&server.url()));
    let hundred = config("100/m", "").tenant[0];
    let take = async |calls, meanwhile, forgotten: &[(u64, u32)]| {
        let demand = Demand {
            tenant: call(SECOND).tenant.id(),
            of_tenant: &[owing(hundred, meanwhile, forgotten)],
            of_fleet: &[],
            calls,
            leave: 0.0,
        };
        quota.take(&demand).await.unwrap()
    };
    assert_eq!(take(100, 0, &[]).await.calls, 1, "a window that has just come into being is no licence");
    let grant = take(0, 30, &[]).await;
    assert_eq!(grant.used, [31]);
    assert!(grant.wait > Duration::ZERO);

    // Old enough to have grown to its limit; of the calls before it, those of a minute ago are over.
    let key = server.ask::<Vec<String>>(&["KEYS", "relay:1:{lim}:*:60"]).await.remove(0);
    server.ask::<i64>(&["HSET", &key, "b", "1"]).await;
    let grant = take(100, 0, &[(0, 20), (50, 20), (99, 4), (102, 100)]).await;
    assert_eq!((grant.calls, grant.used[0]), (25, 56), "100 less 44 of before, less 31");
    // The oldest of before leave next, in two parts of a hundred.
    assert!(grant.wait > Duration::ZERO && grant.wait <= MINUTE / 50, "{:?}", grant.wait);
    assert_eq!(take(100, 0, &[(0, 200)]).await.calls, 0);
}

fn owing(window: Window, meanwhile: u32, forgotten: &[(u64, u32)]) -> Account {
    Account { window, meanwhile, forgotten: forgotten.to_vec() }
}

/// A window that begins anew grows to its limit in its own time; together with what came in a burst just before, that
/// was almost twice the limit.
#[tokio::test]
async fn what_redis_forgets_the_replicas_remember() {
    let server = RedisServer::process(&[]).await;
    let replicas = [(); 2].map(|()| {
        let config = Config { queue: 1_000, ..config("1000/s", "100/s") };
        Limiter::new(config, Some(Redis::to(&server.url())), Metrics::new(), TaskTracker::new())
    });
    let mut granted: Vec<Instant> = Vec::new();
    let burst = async |calls: usize, patience: Duration| {
        let callers = (0..calls).map(|number| {
            let replica = &replicas[number % 2];
            async move {
                let _permit = replica.admit(&call(patience)).await.ok()?;
                Some(Instant::now())
            }
        });
        join_all(callers).await.into_iter().flatten().collect::<Vec<_>>()
    };
    // Both windows are as large as they get, and empty.
    granted.extend(burst(2, SECOND).await);
    sleep(SECOND + SECOND / 5).await;
    granted.extend(burst(90, SECOND).await);
    let _: String = server.ask(&["FLUSHALL"]).await;
    granted.extend(burst(300, 3 * SECOND).await);
    granted.sort();
    let after = |from: Instant| granted.iter().filter(|at| (from..from + SECOND).contains(at)).count();
    let most = granted.iter().map(|from| after(*from)).max().unwrap();
    assert!(most <= 105, "{most} calls in a second");
    assert!(granted.len() > 90 + 150, "{} calls: there is no more than a second to lose", granted.len());
}

#[tokio::test]
async fn a_pause_holds_for_every_replica() {
    let server = RedisServer::start().await;
    let replicas = [(); 2].map(|()| {
        Limiter::new(config("", ""), Some(Redis::to(&server.url())), Metrics::new(), TaskTracker::new())
    });
    for replica in &replicas {
        drop(replica.admit(&call(5 * SECOND)).await.unwrap());
    }
    let pace = Pace::TooFast { retry_after: Some(2 * SECOND) };
    replicas[0].answered(&call(SECOND), pace).await;
    let refused = replicas[1].admit(&call(SECOND / 2)).await.map(drop);
    assert!(matches!(refused, Err(Error::Throttled { .. })), "{refused:?}");
    let asked = Instant::now();
    replicas[1].admit(&call(10 * SECOND)).await.unwrap();
    assert!(asked.elapsed() >= SECOND, "the pause was over too soon");
}

#[tokio::test]
async fn replicas_together_keep_the_quota_with_and_without_redis() {
    let mut server = RedisServer::process(&[]).await;
    let quota = config("40/s", "");
    let replicas: Vec<Limiter> = (0..3)
        .map(|_| {
            Limiter::new(quota.clone(), Some(Redis::to(&server.url())), Metrics::new(), TaskTracker::new())
        })
        .collect();
    let stop = tokio_util::sync::CancellationToken::new();
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
    sleep(4 * SECOND).await;
    let with_redis = made.lock().unwrap().len();
    server.kill();
    sleep(4 * SECOND).await;
    let without = made.lock().unwrap().len() - with_redis;
    server.restart().await;
    sleep(3 * SECOND).await;
    stop.cancel();
    join_all(callers).await;
    let made = made.lock().unwrap().clone();
    for (first, at) in made.iter().enumerate() {
        // Granted and noted are not the same moment; on a busy machine they are some milliseconds apart.
        let within = made.iter().skip(first).take_while(|other| **other < *at + SECOND * 97 / 100).count();
        assert!(within <= 40, "{within} calls in a second");
    }
    assert!(with_redis >= 90, "{with_redis} calls in 4 seconds, the first of which is half");
    assert!((40..=160).contains(&without), "{without} calls in 4 seconds without redis");
}

/// A share is used up by what Redis granted in the last second: taken for the pace, that was a refusal of everyone
/// who could have been served a moment later.
#[tokio::test]
async fn who_waits_while_redis_is_lost_is_not_told_that_it_takes_for_ever() {
    let mut server = RedisServer::process(&[]).await;
    let config = Config { queue: 256, ..config("100/s", "") };
    let limiter = Limiter::new(config, Some(Redis::to(&server.url())), Metrics::new(), TaskTracker::new());
    grown(&limiter, &["key"]).await;
    for _ in 0..90 {
        drop(limiter.admit(&call(SECOND)).await.unwrap());
    }
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

/// What a tenant's share grants and the fleet's refuses was lost: two who asked together got less than half of it,
/// and of them one almost all.
/// Without Redis a share of a day has its next call in minutes. That holds for as long as Redis is away.
#[tokio::test]
async fn a_moment_without_redis_refuses_nobody_for_long() {
    let server = RedisServer::process(&[]).await;
    for (of_tenant, of_fleet) in [("1000/d", "2000/d"), ("", "1000/d")] {
        let _: String = server.ask(&["FLUSHALL"]).await;
        let limiter = Limiter::new(
            config(of_tenant, of_fleet),
            Some(Redis::to(&server.url())),
            Metrics::new(),
            TaskTracker::new(),
        );
        drop(limiter.admit(&call(5 * SECOND)).await.unwrap());
        server.freeze();
        let (mut refused, mut told) = (0, Duration::ZERO);
        for _ in 0..8 {
            if let Err(error) = limiter.admit(&call(2 * SECOND)).await.map(drop) {
                let Error::Throttled { retry_after } = error else { panic!("{error:?}") };
                (refused, told) = (refused + 1, told.max(retry_after));
            }
        }
        assert!(
            refused > 0 && told > MINUTE,
            "{refused} of 8 were refused for {told:?}: Redis was not missed"
        );
        // To ask costs nothing, neither with Redis nor without.
        assert!(limiter.quotas(&call(SECOND).tenant).await.is_empty());
        // Redis has forgotten nothing: it is not going to be told again what it knows.
        assert!(lock(&limiter.0.fleet.get().born).iter().all(|born| *born > 0));
        server.thaw();
        let thawed = Instant::now();
        while limiter.admit(&call(2 * SECOND)).await.is_err() {
            assert!(thawed.elapsed() < 10 * SECOND, "refused although Redis is back");
            sleep(SECOND / 10).await;
        }
        let callers = call(2 * SECOND);
        let several = join_all((0..3).map(|_| limiter.admit(&callers))).await;
        assert!(
            several.iter().all(Result::is_ok),
            "one was granted a call, and others at the same time were not"
        );
    }
}

#[tokio::test]
async fn without_redis_tenants_take_turns_at_the_whole_share_of_the_fleet() {
    let mut server = RedisServer::process(&[]).await;
    let (redis, config) = (Redis::to(&server.url()), config("120/s", "150/s"));
    server.kill();
    let limiter = &Limiter::new(config, Some(redis), Metrics::new(), TaskTracker::new());
    // Forty a second for four seconds; the share is 45.
    let callers = (0..160).map(|number| async move {
        sleep(SECOND * number / 40).await;
        let key = ["one", "another", "one"][number as usize % 3];
        let asked = Instant::now();
        limiter.admit(&call_of(key, 10 * SECOND, Priority::Interactive)).await.ok().map(|_| asked.elapsed())
    });
    let waits: Option<Vec<Duration>> = join_all(callers).await.into_iter().collect();
    let longest = waits.expect("refused").into_iter().max().unwrap();
    assert!(longest < 2 * SECOND, "{longest:?}");
}
