//! The soak itself: when what goes wrong, whether every answer is right or explained, and whether relays hold in the end
//! what they held before.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex},
    time::Duration,
};

use tokio::time::{MissedTickBehavior, interval, sleep, sleep_until};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    faults::{Fault, Stage},
    load::{Asked, Load, RATE},
    measure::{Calls, HELD, Life, MEMORY, SERIES, cpu, median, slope},
    world::{NEWCOMER, Trouble, World},
};

/// Calls to CyberScan a second of all tenants together.
const FLEET: usize = 150;
/// Lives of answers are short, so that there is always something to ask CyberScan for; and memory is small, so that it
/// is full before anything is measured.
const SETTINGS: &[(&str, &str)] = &[
    ("RELAY_REDIS_ENCRYPTION_KEY", "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"),
    ("RELAY_CACHE_MEMORY", "6MiB"),
    ("RELAY_CACHE_FRESH", "30s"),
    ("RELAY_CACHE_STALE_WHILE_REVALIDATE", "30s"),
    ("RELAY_CACHE_STALE_IF_ERROR", "90s"),
    ("RELAY_CACHE_NEGATIVE", "10s"),
    // A busy machine alone makes no answer a stale one.
    ("RELAY_CACHE_SOFT_TIMEOUT", "3s"),
    ("RELAY_CYBERSCAN_TIMEOUT", "2s"),
    ("RELAY_LIMITER_TENANT", "120/s"),
    ("RELAY_LIMITER_FLEET", "150/s"),
    ("RELAY_LIMITER_CONCURRENCY", "4"),
    ("RELAY_SERVER_HEADER_TIMEOUT", "3s"),
    ("RELAY_SERVER_BODY_TIMEOUT", "3s"),
    ("RELAY_SERVER_SHUTDOWN_DELAY", "3s"),
];

/// When things go wrong.
struct Plan {
    /// Each fault once, in quick succession: all that grows with the first of its kind has grown then.
    warm_up: Pace,
    /// What is measured.
    measured: Duration,
}

#[derive(Clone, Copy)]
struct Pace {
    /// From one fault to the next.
    every: Duration,
    length: Duration,
}

/// A fault that happened, and for how long it explains errors; times since the start.
struct Happened {
    fault: Fault,
    from: Duration,
    until: Duration,
}

/// While faults are measured: one is over, and what it left behind, before the next comes.
const STEADY: Pace = Pace { every: Duration::from_secs(20), length: Duration::from_secs(3) };
/// So long before each fault things are quiet.
const QUIET: Duration = Duration::from_secs(4);
/// As many quiet moments make a beginning and an end that can be compared.
const MOMENTS: usize = 9;
/// The calls of no second may be more than the quota; they are looked at where they arrive, and a busy machine delivers
/// some of them late.
const SECOND: Duration = Duration::from_millis(700);
/// So long after the machine stood still errors are its fault.
const AFTER_STANDSTILL: Duration = Duration::from_secs(10);
/// Where the machine is slow for longer than `cache.soft_timeout`, an answer comes from what is known, and says so. One
/// in so many may.
const STALE: usize = 2_000;

impl Plan {
    fn of_environment() -> Self {
        let seconds = std::env::var("RELAY_SOAK_SECONDS").ok();
        match seconds.map(|seconds| seconds.parse().expect("RELAY_SOAK_SECONDS is a number")) {
            Some(seconds) => Self {
                warm_up: Pace { every: Duration::from_secs(6), length: Duration::from_secs(2) },
                measured: Duration::from_secs(seconds),
            },
            None => Self {
                warm_up: Pace { every: Duration::from_millis(2500), length: Duration::from_secs(1) },
                measured: Duration::ZERO,
            },
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_goes_wrong_answers_are_right_or_explained_and_nothing_is_left_behind() {
    let plan = Plan::of_environment();
    let world = Arc::new(World::new().await);
    let load = Arc::new(Load::new(Arc::clone(&world)));
    let mut stage = Stage::new(Arc::clone(&world), Arc::clone(&load), SETTINGS).await;
    let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
    let calls =
        Arc::new(Mutex::new((Calls::within(Duration::from_secs(1), FLEET), Calls::within(SECOND, FLEET))));
    tasks.spawn(Arc::clone(&load).run(stop.clone()));
    tasks.spawn(watch(
        Arc::clone(&load),
        Arc::clone(&world),
        stage.lives.clone(),
        calls.clone(),
        stop.clone(),
    ));
    tasks.close();

    let mut happened = Vec::new();
    sleep(plan.warm_up.every).await;
    for fault in Fault::ALL {
        happened.push(bring_about(&mut stage, fault, plan.warm_up).await);
    }
    let mut moments = Vec::new();
    let begin = load.started.elapsed();
    let mut faults = Fault::ALL.into_iter().cycle();
    // The first comes after a quiet while, too.
    sleep(STEADY.every.min(plan.measured)).await;
    while load.started.elapsed() < begin + plan.measured {
        moments.push(load.started.elapsed());
        happened.push(bring_about(&mut stage, faults.next().unwrap(), STEADY).await);
    }
    if plan.measured.is_zero() {
        sleep(Duration::from_secs(5)).await;
    } else {
        moments.push(load.started.elapsed());
    }
    stop.cancel();
    tasks.wait().await;

    let mut failures = Vec::new();
    judge(&load, &happened, &mut failures);
    {
        let (second, less) = &*calls.lock().unwrap();
        let (most, at) = second.most;
        let at = at.map_or(0.0, |at| (at - load.started).as_secs_f64());
        eprintln!("{} calls to CyberScan, at most {most} in a second ({FLEET}), before {at:.1} s", less.all);
        if let Some((at, count)) = less.too_many.first() {
            let at = (*at - load.started).as_secs_f64();
            failures.push(format!("{count} calls to CyberScan in {SECOND:?} before {at:.1} s"));
        }
    }
    let panics = stage.metric("relay_panics_total").await;
    let complaints = stage.complaints.lock().unwrap().clone();
    if panics > 0.0 || !complaints.is_empty() {
        failures.push(format!("{panics} panics; {complaints:?}"));
    }
    hold(&stage, &moments, &mut failures);
    eprintln!(
        "processor time: Redis {:.1} s, whoever asks and the sandbox {:.1} s",
        stage.redis_cpu().await,
        cpu("self").as_secs_f64()
    );
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

async fn bring_about(stage: &mut Stage, fault: Fault, pace: Pace) -> Happened {
    let started = tokio::time::Instant::now();
    let from = stage.load.started.elapsed();
    stage.bring_about(fault, pace.length).await;
    let end = stage.load.started.elapsed();
    eprintln!("{:6.1} s: {fault:?} for {:.1} s", from.as_secs_f64(), (end - from).as_secs_f64());
    sleep_until(started + pace.every).await;
    Happened { fault, from, until: end + fault.recovery() }
}

/// Takes samples once a second.
async fn watch(
    load: Arc<Load>,
    world: Arc<World>,
    lives: Arc<Mutex<Vec<Arc<Life>>>>,
    calls: Arc<Mutex<(Calls, Calls)>>,
    stop: CancellationToken,
) {
    let mut ticks = interval(Duration::from_secs(1));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let lives = lives.lock().unwrap().clone();
        for life in lives {
            life.sample(load.started).await;
        }
        let arrived = world.sandbox.cyberscan.take_calls();
        let mut calls = calls.lock().unwrap();
        calls.0.add(&arrived);
        calls.1.add(&arrived);
    }
}

/// What explains that an answer has this trouble.
fn explanation(asked: &Asked, trouble: &Trouble, happened: &[Happened], load: &Load) -> Option<String> {
    let Trouble::Errors { items, tenant, withdrawn } = trouble else { return None };
    let at_the_time = |happened: &&Happened| happened.from <= asked.answered && asked.due <= happened.until;
    let explains = |happened: &&Happened| {
        let concerned = match happened.fault {
            Fault::NewKeys => *withdrawn,
            Fault::IssuerDown => *tenant == NEWCOMER,
            _ => true,
        };
        let codes = happened.fault.explains();
        concerned && items.iter().any(|(code, _)| codes.contains(&code.as_str()))
    };
    let faults: Vec<&Happened> = happened.iter().filter(at_the_time).filter(explains).collect();
    let all = items
        .iter()
        .all(|(code, _)| faults.iter().any(|happened| happened.fault.explains().contains(&code.as_str())));
    if all {
        return faults.last().map(|happened| format!("{:?}", happened.fault));
    }
    let standstills = load.standstills.lock().unwrap();
    let stood = standstills.iter().any(|(end, length)| {
        end.saturating_sub(*length) <= asked.answered && asked.due <= *end + AFTER_STANDSTILL
    });
    stood.then(|| "the machine stood still".to_owned())
}

/// Every answer has to be right, or its errors explained by what went wrong at the time.
fn judge(load: &Load, happened: &[Happened], failures: &mut Vec<String>) {
    let asked = load.asked.lock().unwrap();
    let mut explained: BTreeMap<(String, String), usize> = BTreeMap::new();
    let mut unexplained = Vec::new();
    let (mut all_clear, mut stale) = (0, 0);
    for asked in asked.iter() {
        let Some(trouble) = asked.trouble.as_deref() else { continue };
        all_clear += usize::from(matches!(trouble, Trouble::FalseAllClear(_)));
        match (explanation(asked, trouble, happened, load), trouble) {
            (Some(fault), Trouble::Errors { items, .. }) => {
                let codes: BTreeSet<&str> = items.iter().map(|(code, _)| code.as_str()).collect();
                for code in codes {
                    *explained.entry((fault.clone(), code.to_owned())).or_default() += 1;
                }
            }
            (None, Trouble::Errors { items, .. }) if items.iter().all(|(code, _)| code == "stale data") => {
                stale += 1
            }
            _ => unexplained.push((asked.due, asked.answered, trouble)),
        }
    }
    let standstills = load.standstills.lock().unwrap();
    let longest = standstills.iter().map(|(_, length)| *length).max().unwrap_or_default();
    eprintln!(
        "{} questions, {RATE} a second; the machine stood still {} times, {longest:?} at most",
        asked.len(),
        standstills.len()
    );
    eprintln!("{all_clear} false all-clears, {} answers with unexplained trouble", unexplained.len());
    eprintln!("{stale} answers were stale for no fault's sake");
    if stale > asked.len() / STALE {
        failures.push(format!("{stale} answers were stale for no fault's sake"));
    }
    for ((fault, code), count) in explained {
        eprintln!("{count:7} {code}: {fault}");
    }
    let in_fault = |asked: &&Asked| {
        happened.iter().any(|happened| happened.from <= asked.answered && asked.due <= happened.until)
    };
    let (fault, quiet): (Vec<&Asked>, Vec<&Asked>) = asked.iter().partition(in_fault);
    eprintln!(
        "{:>20} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "", "answers", "p50 ms", "p99 ms", "p99.9 ms", "most ms"
    );
    for (name, asked) in [("while all is well", quiet), ("while something is wrong", fault)] {
        let mut times: Vec<Duration> = asked.iter().map(|asked| asked.answered - asked.due).collect();
        times.sort_unstable();
        let of = |thousandths: usize| {
            let at = (times.len() * thousandths / 1000).min(times.len().saturating_sub(1));
            times.get(at).map_or(0.0, |time| time.as_secs_f64() * 1000.0)
        };
        let (half, p99, p999, most) = (of(500), of(990), of(999), of(1000));
        eprintln!("{name:>20} {:9} {half:9.1} {p99:9.1} {p999:9.1} {most:9.1}", times.len());
    }
    if !unexplained.is_empty() {
        failures.push(format!("{} answers with unexplained trouble:", unexplained.len()));
        failures.extend(unexplained.iter().take(10).map(|(due, answered, trouble)| {
            format!("  {:.1} to {:.1} s: {trouble:?}", due.as_secs_f64(), answered.as_secs_f64())
        }));
    }
}

/// What relays held in quiet moments at the beginning and at the end.
fn hold(stage: &Stage, moments: &[Duration], failures: &mut Vec<String>) {
    let lives = stage.lives.lock().unwrap();
    eprintln!("{:>10} {:>22} {:>9} {:>9} {:>11}", "", "", "first", "last", "an hour");
    for (number, life) in lives.iter().enumerate() {
        let samples = life.samples.lock().unwrap().clone();
        let (Some(first), Some(last)) = (samples.first(), samples.last()) else { continue };
        let cpu = last.cpu.as_secs_f64();
        let lived = (last.at - first.at).as_secs_f64();
        eprintln!("{:>10} processor time {cpu:.1} s in {lived:.0} s", life.name);
        for (at, held) in HELD.iter().enumerate() {
            if at == SERIES && samples.iter().any(|sample| sample.held[at] != first.held[at]) {
                failures.push(format!("{}: not always {} series", life.name, first.held[at]));
            }
            let levels = life.levels(at, moments, QUIET);
            if levels.len() < MOMENTS {
                continue;
            }
            let third = levels.len() / 3;
            let middle = |levels: &[(Duration, f64)]| median(levels.iter().map(|(_, level)| *level));
            let (before, after) = (middle(&levels[..third]), middle(&levels[levels.len() - third..]));
            eprintln!("{:>10} {:>22} {before:9.1} {after:9.1} {:>+11.2}", "", held.name, slope(&levels));
            // The memory of one that has just been started is not full yet.
            let settled = at != MEMORY || number == 0;
            if settled && after - before > held.more {
                let levels: Vec<f64> = levels.into_iter().map(|(_, level)| level).collect();
                failures
                    .push(format!("{}: {} rose from {before} to {after}: {levels:?}", life.name, held.name));
            }
        }
    }
}
