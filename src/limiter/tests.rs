//! The limiter in virtual time, without Redis and with one that is away.

use futures_util::future::join_all;

use super::*;
use crate::tenant::{ApiKey, Tenant as Who};

const SECOND: Duration = Duration::from_secs(1);

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
    Limiter::new(config, None, TaskTracker::new())
}

fn call_of(key: &str, patience: Duration, priority: Priority) -> Call {
    let tenant = Who::new("api.example.com".parse().unwrap(), ApiKey::new(key.into()));
    Call { tenant: Arc::new(tenant), deadline: Instant::now() + patience, priority }
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
