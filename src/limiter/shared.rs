//! The windows of the whole fleet, in Redis. It owns the keys and the scripts; it must not know who waits for a
//! call, nor what happens while Redis is away.
//!
//! An account's windows are one hash, in a slot of its own. It has no time to live while it is in use, so a Redis
//! that is full does not make room with it; when a replica has not called for as long as the longest window,
//! and nobody else has, it gets one of that length ([`Shared::rest`]).

#[cfg(test)]
use std::sync::Arc;
use std::{fmt::Write, time::Duration};

use deadpool_redis::redis::{Script, cmd};

use super::{
    bucket::Pace,
    calls::ByPart,
    local::Local,
    report::{Memory, Report, Told},
};
use crate::{
    chance::chance,
    metrics::Operation,
    redis_pool::{Redis, Unavailable},
};

/// Takes calls from windows that all replicas share; a cheap clone.
#[derive(Clone)]
pub(super) struct Shared {
    redis: Redis,
    take: Script,
    rest: Script,
    /// Who this replica is.
    replica: String,
    #[cfg(test)]
    pub(super) fault: Arc<std::sync::atomic::AtomicU8>,
}

/// What a test has become of a demand: it does not get there, or its answer does not come back.
#[cfg(test)]
pub(super) mod fault {
    pub(in crate::limiter) const NONE: u8 = 0;
    pub(in crate::limiter) const NOT_SENT: u8 = 1;
    pub(in crate::limiter) const NOT_ANSWERED: u8 = 2;
}

/// What Redis is asked for.
pub(super) struct Demand<'a> {
    /// The account's name in Redis.
    pub(super) account: &'a str,
    /// Calls wanted.
    pub(super) calls: u32,
    /// The share of each window that is to be left over.
    pub(super) reserve: f64,
    /// The share of a window that may be a burst.
    pub(super) burst: f64,
    /// What it is told.
    pub(super) told: &'a Told,
    /// How far this replica is ahead in each window, if Redis may not know.
    pub(super) ahead: &'a [Duration],
}

/// What Redis says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Reply {
    /// Its memory is not what this replica had heard of; nothing was granted.
    pub(super) forgot: bool,
    /// Calls that may be made now.
    pub(super) calls: u32,
    /// In how long there is one, if there are none left.
    pub(super) wait: Duration,
    /// For how long CyberScan wants to be left alone.
    pub(super) pause: Duration,
    /// The state of its memory.
    pub(super) memory: Memory,
    pub(super) windows: Vec<Use>,
}

/// What Redis says of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Use {
    pub(super) per: Duration,
    /// Calls used, by all replicas.
    pub(super) used: u32,
    /// In how long the next one is due.
    pub(super) due: Duration,
}

impl Shared {
    pub(super) fn new(redis: Redis) -> Self {
        Self {
            redis,
            take: Script::new(include_str!("shared.lua")),
            rest: Script::new(include_str!("rest.lua")),
            replica: random_name(),
            #[cfg(test)]
            fault: Arc::default(),
        }
    }

    fn hash_key(&self, account: &str) -> String {
        self.redis.key(&format!("{{{account}}}:quota"))
    }

    fn pause_key(&self, account: &str) -> String {
        self.redis.key(&format!("{{{account}}}:pause"))
    }

    /// Takes as many of the calls wanted as all windows allow, in one round trip; none, to see what is used.
    pub(super) async fn take(&self, demand: &Demand<'_>) -> Result<Reply, Unavailable> {
        let mut invocation = self.take.key(self.hash_key(demand.account));
        invocation.key(self.pause_key(demand.account));
        let memory = demand.told.memory.unwrap_or_default();
        invocation.arg(demand.calls).arg(demand.reserve).arg(&self.replica);
        invocation.arg(memory.born).arg(memory.at).arg(u8::from(demand.told.away));
        let (least, most) = demand.told.clock.unwrap_or((0, u64::MAX));
        invocation.arg(least).arg(most);
        for (report, ahead) in demand.told.windows.iter().zip(demand.ahead) {
            let window = report.window;
            invocation.arg(window.per.as_secs()).arg(window.limit.get());
            match Pace::of(window, demand.burst) {
                Some(pace) => {
                    let micros = |nanos: u64| format!("{}.{:03}", nanos / 1_000, nanos % 1_000);
                    invocation.arg(micros(pace.interval)).arg(pace.burst).arg(micros(pace.late));
                    invocation.arg(ahead.as_micros().to_string());
                }
                None => {
                    invocation.arg(0).arg(report.ever_alone);
                    invocation.arg(by_part(&report.alone)).arg(by_part(&report.lost));
                }
            }
        }
        let invocation = &invocation;
        #[cfg(test)]
        let fault = self.fault.load(std::sync::atomic::Ordering::Relaxed);
        #[cfg(test)]
        if fault == fault::NOT_SENT {
            return Err(Unavailable);
        }
        let answer: Vec<u64> = self
            .redis
            .run(Operation::Quota, |mut link| async move { invocation.invoke_async(&mut link).await })
            .await?;
        #[cfg(test)]
        if fault == fault::NOT_ANSWERED {
            return Err(Unavailable);
        }
        let (&[forgot, calls, wait, pause, born, lost, at, clock], windows) =
            answer.split_first_chunk().ok_or(Unavailable)?;
        let (windows, rest) = windows.as_chunks::<2>();
        if windows.len() != demand.told.windows.len() || !rest.is_empty() {
            return Err(Unavailable);
        }
        let of_window = |(report, [used, due]): (&Report, &[u64; 2])| Use {
            per: report.window.per,
            used: u32::try_from(*used).unwrap_or(u32::MAX),
            due: Duration::from_micros(*due),
        };
        Ok(Reply {
            forgot: forgot == 1,
            calls: u32::try_from(calls).unwrap_or(0),
            wait: Duration::from_micros(wait),
            pause: Duration::from_millis(pause),
            memory: Memory { born, lost, at, clock },
            windows: demand.told.windows.iter().zip(windows).map(of_window).collect(),
        })
    }

    /// The name of Redis's memory: another one where it has lost everything since it was asked last.
    pub(super) async fn memory(&self) -> Result<String, Unavailable> {
        let new = random_name();
        let key = &self.redis.key("memory");
        self.redis
            .run(Operation::Quota, |mut link| async move {
                let name = cmd("GET").arg(key).query_async::<Option<String>>(&mut link).await?;
                if let Some(name) = name {
                    return Ok(name);
                }
                let mut set = cmd("SET");
                set.arg(key).arg(&new).arg("NX").arg("EX").arg(86_400);
                set.query_async::<Option<String>>(&mut link).await?;
                Ok(new)
            })
            .await
    }

    /// Lets an account go that nobody has used for as long as its `longest` window, after as long again. Whether it
    /// will: otherwise it is in use, or Redis does not answer.
    pub(super) async fn rest(&self, account: &str, longest: Duration) -> bool {
        let mut invocation = self.rest.key(self.hash_key(account));
        invocation.arg(longest.as_secs());
        let invocation = &invocation;
        let resting = self
            .redis
            .run(Operation::Quota, |mut link| async move { invocation.invoke_async::<u8>(&mut link).await });
        resting.await == Ok(1)
    }

    /// Has all replicas that count the account's calls in Redis leave its CyberScan alone for `pause`.
    pub(super) async fn pause(&self, account: &str, pause: Duration) {
        let key = self.pause_key(account);
        let millis = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX).max(1);
        // A pause that is already longer stays.
        let pausing = self.redis.run(Operation::Quota, |mut link| async move {
            let mut set = cmd("SET");
            set.arg(&key)
                .arg("1")
                .arg("PX")
                .arg(millis)
                .arg("NX")
                .query_async::<Option<String>>(&mut link)
                .await?;
            cmd("PEXPIRE").arg(&key).arg(millis).arg("GT").query_async::<i64>(&mut link).await
        });
        let _ = pausing.await;
    }
}

/// How far this replica's buckets are ahead in each window of `told`, where Redis may not know of all its calls.
pub(super) fn ahead(told: &Told, local: &Local, now: u64) -> Vec<Duration> {
    told.windows.iter().map(|report| local.ahead(now, report.window.per)).collect()
}

/// Calls by part as `parts ago:calls ...`.
fn by_part(calls: &ByPart) -> String {
    calls.iter().fold(String::new(), |mut text, (ago, calls)| {
        let _ = write!(text, "{ago}:{calls} ");
        text
    })
}

fn random_name() -> String {
    format!("{:x}", (chance() * (1_u64 << 52) as f64) as u64)
}

#[cfg(test)]
pub(super) mod tests {
    use tokio::time::sleep;

    use super::*;
    use crate::{
        limiter::{bucket::nanos, calls::Calls, window::Window},
        redis_server::RedisServer,
    };

    const SECOND: Duration = Duration::from_secs(1);

    fn windows(text: &str) -> Vec<Window> {
        text.split(',').map(|window| window.parse().unwrap()).collect()
    }

    fn hash_key(account: &str) -> String {
        format!("relay:1:{{{account}}}:quota")
    }

    /// Nothing to report.
    fn nothing(windows: &[Window]) -> Told {
        Told { windows: windows.iter().map(|window| Report::nothing(*window)).collect(), ..Told::default() }
    }

    /// A replica that asks for what it is told to.
    struct Replica(Shared);

    impl Replica {
        fn of(server: &RedisServer) -> Self {
            Self(Shared::new(Redis::to(&server.url())))
        }

        async fn ask(&self, account: &str, calls: u32, reserve: f64, told: &Told, ahead: Duration) -> Reply {
            let ahead = vec![ahead; told.windows.len()];
            self.0.take(&Demand { account, calls, reserve, burst: 0.5, told, ahead: &ahead }).await.unwrap()
        }

        async fn take(&self, account: &str, calls: u32, windows: &[Window]) -> Reply {
            self.ask(account, calls, 0.0, &nothing(windows), Duration::ZERO).await
        }
    }

    /// Moves the account's time on, as if so long had passed; or back, as if Redis's clock had stepped.
    pub(in crate::limiter) async fn shift(server: &RedisServer, account: &str, micros: i64) {
        const SHIFT: &str = "local c = {struct.unpack('<dddddd', redis.call('HGET', KEYS[1], 'c'))} \
                             c[2] = c[2] + ARGV[1] \
                             redis.call('HSET', KEYS[1], 'c', struct.pack('<dddddd', unpack(c, 1, 6)))";
        let (key, micros) = (hash_key(account), micros.to_string());
        if server.ask::<i64>(&["EXISTS", &key]).await == 1 {
            server.ask::<()>(&["EVAL", SHIFT, "1", &key, &micros]).await;
        }
    }

    async fn pass(server: &RedisServer, account: &str, time: Duration) {
        shift(server, account, i64::try_from(time.as_micros()).unwrap()).await;
    }

    /// The script counts as governor's buckets and this replica's own windows do, call by call.
    #[tokio::test]
    async fn the_script_decides_as_the_buckets_and_the_ledger_do() {
        let server = RedisServer::start().await;
        let replica = Replica::of(&server);
        let mut seed = 7_u64;
        let mut number = move |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        for (case, text) in
            ["20/s", "7/s,40/m", "200/s,90/h", "1/s", "60/d", "900/m,100000/30d"].iter().enumerate()
        {
            let (account, windows) = (format!("case-{case}"), windows(text));
            let buckets = Local::new(&windows, 0.5, &Local::default());
            let mut sums: Vec<_> = windows
                .iter()
                .filter(|window| Pace::of(**window, 0.5).is_none())
                .map(|window| (window.limit.get(), Calls::new(window.per)))
                .collect();
            for step in 0..200 {
                let calls = 1 + u32::try_from(number(12)).unwrap();
                let reserve = if number(4) == 0 { 0.5 } else { 0.0 };
                let reply = replica.ask(&account, calls, reserve, &nothing(&windows), Duration::ZERO).await;
                let now = if reply.calls > 0 || step == 0 {
                    reply.memory.at * 1_000
                } else {
                    // Nothing was written, so the time is not told: the wait says what is left.
                    assert!(!reply.wait.is_zero(), "{text}, step {step}: {reply:?}");
                    pass(&server, &account, reply.wait.min(Duration::from_secs(number(5)))).await;
                    continue;
                };
                let free = sums.iter_mut().map(|(limit, calls)| {
                    (*limit - (f64::from(*limit) * reserve) as u32).saturating_sub(calls.made(now))
                });
                let free = free.min().unwrap_or(u32::MAX).min(calls);
                let prefetch = (reserve > 0.0).then_some(reserve);
                let expected = buckets.take(now, free, prefetch).calls;
                assert_eq!(reply.calls, expected, "{text}, step {step}: {reply:?}");
                sums.iter_mut().for_each(|(_, calls)| calls.add(now, expected));
                let gap = Duration::from_millis(number(60) * number(60) / 20);
                pass(&server, &account, gap).await;
            }
        }
    }

    #[tokio::test]
    async fn a_wait_is_as_long_as_it_says() {
        let server = RedisServer::start().await;
        let replica = Replica::of(&server);
        for (text, first, least, most) in
            [("20/s", 10, 500, 520), ("5/m,100/h", 2, 22_000, 25_000), ("3/h", 3, 3_590_000, 3_640_000)]
        {
            let windows = windows(text);
            let reply = replica.take(text, 16, &windows).await;
            assert_eq!(reply.calls, first, "{text}");
            let wait = u64::try_from(reply.wait.as_millis()).unwrap();
            assert!((least..=most).contains(&wait), "{text}: {wait} ms");
            pass(&server, text, reply.wait - Duration::from_millis(300)).await;
            assert_eq!(replica.take(text, 1, &windows).await.calls, 0, "{text}");
            pass(&server, text, Duration::from_millis(300)).await;
            assert_eq!(replica.take(text, 1, &windows).await.calls, 1, "{text}");
        }
    }

    #[tokio::test]
    async fn calls_of_a_long_window_leave_it_part_by_part() {
        let server = RedisServer::start().await;
        let (replica, day) = (Replica::of(&server), windows("100/d"));
        for _ in 0..10 {
            assert_eq!(replica.take("day", 10, &day).await.calls, 10);
            pass(&server, "day", Duration::from_secs(3_600)).await;
        }
        assert_eq!(replica.take("day", 10, &day).await.calls, 0);
        pass(&server, "day", Duration::from_secs(14 * 3_600 + 900)).await;
        let reply = replica.take("day", 16, &day).await;
        assert_eq!((reply.calls, reply.windows[0].used), (10, 100), "those of the first hour have left");
        pass(&server, "day", Duration::from_secs(40 * 3_600)).await;
        let reply = replica.take("day", 16, &day).await;
        assert_eq!((reply.calls, reply.windows[0].used), (16, 16));
        let fields: Vec<String> = server.ask(&["HKEYS", &hash_key("day")]).await;
        assert!(fields.len() <= 3, "what has left the window is there still: {fields:?}");
    }

    #[tokio::test]
    async fn a_clock_that_steps_back_stops_nothing_and_one_that_stands_still_grants_nothing_twice() {
        let server = RedisServer::start().await;
        let replica = Replica::of(&server);
        for text in ["20/s", "20/s,5000/d", "60/m"] {
            let windows = windows(text);
            assert!(replica.take(text, 16, &windows).await.calls > 0);
            pass(&server, text, 5 * SECOND).await;
            replica.take(text, 1, &windows).await;
            let before = replica.take(text, 16, &windows).await;
            shift(&server, text, -45_000_000).await;
            let after = replica.take(text, 16, &windows).await;
            assert!(after.memory.at >= before.memory.at && after.wait < 32 * SECOND, "{text}: {after:?}");
            assert!(after.calls <= 1, "{text}: {after:?}");
            sleep(Duration::from_millis(120)).await;
            pass(&server, text, after.wait.saturating_sub(SECOND / 10)).await;
            assert!(replica.take(text, 1, &windows).await.calls == 1, "{text}: its time does not go on");
        }
    }

    #[tokio::test]
    async fn a_memory_that_is_lost_grants_nothing_until_it_has_been_told() {
        let server = RedisServer::start().await;
        let (one, two) = (Replica::of(&server), Replica::of(&server));
        let quota = windows("20/s,100/d");
        let first = one.take("t", 8, &quota).await;
        assert_eq!(first.calls, 8);
        let _: String = server.ask(&["FLUSHALL"]).await;
        let knows = |reply: &Reply| Told { memory: Some(reply.memory), ..nothing(&quota) };
        let lost = one.ask("t", 8, 0.0, &knows(&first), SECOND / 5).await;
        assert!(lost.forgot && lost.calls == 0, "{lost:?}");
        let mut told = knows(&lost);
        told.windows[1].lost = vec![(0, 60), (3, 30)];
        let told_once = one.ask("t", 8, 0.0, &told, SECOND / 5).await;
        assert!(
            !told_once.forgot && told_once.calls == 0,
            "a second begins anew after a second: {told_once:?}"
        );
        assert!(told_once.wait > SECOND * 9 / 10, "{told_once:?}");
        assert_eq!(told_once.windows[1].used, 90);
        // Its answer was lost: it is told again, and counted once.
        assert_eq!(one.ask("t", 8, 0.0, &told, SECOND / 5).await.windows[1].used, 90);
        // Another one has heard of the old memory, too, and was not there for the loss.
        let other = two.ask("t", 8, 0.0, &knows(&first), Duration::ZERO).await;
        assert!(other.forgot && other.memory.born == lost.memory.born);
        let mut told = knows(&other);
        told.windows[1].lost = vec![(1, 8)];
        assert_eq!(two.ask("t", 0, 0.0, &told, Duration::ZERO).await.windows[1].used, 98);
        pass(&server, "t", 2 * SECOND).await;
        assert_eq!(
            two.ask("t", 8, 0.0, &knows(&other), Duration::ZERO).await.calls,
            2,
            "all that is left of the day"
        );
    }

    #[tokio::test]
    async fn an_older_state_that_comes_back_is_a_loss_of_what_came_since() {
        let server = RedisServer::start().await;
        let replica = Replica::of(&server);
        let quota = windows("100/d");
        replica.take("t", 10, &quota).await;
        let saved: Vec<u8> = server.ask(&["DUMP", &hash_key("t")]).await;
        let _: i64 = server.ask(&["COPY", &hash_key("t"), "kept"]).await;
        let later = replica.take("t", 10, &quota).await;
        assert!(!saved.is_empty());
        let _: i64 = server.ask(&["DEL", &hash_key("t")]).await;
        let _: String = server.ask(&["RENAME", "kept", &hash_key("t")]).await;
        let knows = |memory| Told { memory: Some(memory), ..nothing(&quota) };
        let back = replica.ask("t", 10, 0.0, &knows(later.memory), Duration::ZERO).await;
        assert!(back.forgot && back.memory.lost > 0 && back.memory.lost < later.memory.at, "{back:?}");
        let mut told = knows(back.memory);
        told.windows[0].lost = vec![(0, 10)];
        assert_eq!(replica.ask("t", 0, 0.0, &told, Duration::ZERO).await.windows[0].used, 20);
    }

    #[tokio::test]
    async fn calls_made_while_redis_was_away_are_counted_once() {
        let server = RedisServer::start().await;
        let replica = Replica::of(&server);
        let quota = windows("20/s,100/d");
        let told = |ever_alone, recent| {
            let mut told = Told { away: true, ..nothing(&quota) };
            told.windows[1].ever_alone = ever_alone;
            told.windows[1].alone = vec![(0, recent)];
            told
        };
        replica.take("t", 1, &quota).await;
        assert_eq!(replica.ask("t", 0, 0.0, &told(30, 30), Duration::ZERO).await.windows[1].used, 31);
        assert_eq!(replica.ask("t", 0, 0.0, &told(30, 30), Duration::ZERO).await.windows[1].used, 31);
        assert_eq!(replica.ask("t", 0, 0.0, &told(35, 35), Duration::ZERO).await.windows[1].used, 36);
        // Most of them are over: a replica that was without Redis for days.
        assert_eq!(replica.ask("t", 0, 0.0, &told(1_000, 4), Duration::ZERO).await.windows[1].used, 40);
        // Who has been without Redis does not begin with a burst: others may be at it as well.
        pass(&server, "t", 10 * SECOND).await;
        assert_eq!(replica.ask("t", 8, 0.0, &told(1_000, 0), Duration::ZERO).await.calls, 0);
        pass(&server, "t", SECOND).await;
        assert_eq!(replica.take("t", 8, &quota).await.calls, 1);
    }

    #[tokio::test]
    async fn windows_live_while_they_are_in_use_and_twice_their_length_after() {
        // A Redis that is full does away with what has a time to live.
        let server =
            RedisServer::process(&["--maxmemory", "4mb", "--maxmemory-policy", "volatile-ttl"]).await;
        let replica = Replica::of(&server);
        let (used, idle) = (windows("10/s"), windows("10/s"));
        replica.take("used", 1, &used).await;
        replica.take("idle", 1, &idle).await;
        for number in 0..200 {
            let value = "x".repeat(60_000);
            let key = format!("other-{number}");
            server.ask::<String>(&["SET", &key, &value, "EX", "1000"]).await;
        }
        assert!(server.ask::<i64>(&["DBSIZE"]).await < 100, "nothing had to go");
        assert_eq!(server.ask::<i64>(&["TTL", &hash_key("used")]).await, -1);
        let _: String = server.ask(&["CONFIG", "SET", "maxmemory", "0"]).await;
        assert!(!replica.0.rest("used", SECOND).await, "it has just been used");
        sleep(SECOND + SECOND / 10).await;
        replica.take("used", 1, &used).await;
        assert!(!replica.0.rest("used", SECOND).await);
        assert!(replica.0.rest("idle", SECOND).await);
        assert!((1..=1_000).contains(&server.ask::<i64>(&["PTTL", &hash_key("idle")]).await));
        // Whoever uses it again keeps it.
        replica.take("idle", 1, &idle).await;
        assert_eq!(server.ask::<i64>(&["TTL", &hash_key("idle")]).await, -1);
        sleep(SECOND + SECOND / 10).await;
        assert!(replica.0.rest("idle", SECOND).await);
        sleep(SECOND + SECOND / 10).await;
        assert_eq!(server.ask::<i64>(&["EXISTS", &hash_key("idle")]).await, 0);
        assert!(replica.0.rest("idle", SECOND).await, "it is gone");
    }

    #[tokio::test]
    async fn to_ask_for_nothing_makes_nothing() {
        let server = RedisServer::start().await;
        let quota = windows("10/s,5000/d");
        let reply = Replica::of(&server).take("t", 0, &quota).await;
        assert_eq!((reply.calls, reply.windows[1].used), (0, 0));
        assert_eq!(server.ask::<i64>(&["DBSIZE"]).await, 0);
    }

    #[tokio::test]
    async fn a_pause_stops_calls_and_says_how_long() {
        let server = RedisServer::start().await;
        let (replica, quota) = (Replica::of(&server), windows("10/s"));
        replica.0.pause("t", 3 * SECOND).await;
        replica.0.pause("t", SECOND).await;
        let reply = replica.take("t", 5, &quota).await;
        assert!(reply.calls == 0 && reply.pause > 2 * SECOND && reply.wait >= reply.pause, "{reply:?}");
        assert_eq!(replica.take("other", 1, &quota).await.calls, 1);
        assert!(nanos(reply.pause) > 0);
    }

    /// What a call costs Redis. The figure has no noise but the machine's speed; the bound is generous because the
    /// tests run unoptimised beside each other. `make bench` has the exact one.
    #[tokio::test]
    async fn a_full_day_and_a_second_cost_redis_little() {
        let server = RedisServer::process(&[]).await;
        let (replica, quota) = (Replica::of(&server), windows("100000/s,1000000/d"));
        // A day in which every part has calls.
        for _ in 0..100 {
            assert_eq!(replica.take("t", 5, &quota).await.calls, 5);
            pass(&server, "t", Duration::from_secs(870)).await;
        }
        let mut costs = Vec::new();
        for _ in 0..3 {
            let _: String = server.ask(&["CONFIG", "RESETSTAT"]).await;
            for _ in 0..2_000 {
                assert_eq!(replica.take("t", 1, &quota).await.calls, 1);
            }
            let stats: String = server.ask(&["INFO", "commandstats"]).await;
            let line = stats.lines().find(|line| line.starts_with("cmdstat_evalsha:")).unwrap();
            let cost = line.split("usec_per_call=").nth(1).unwrap().split(',').next().unwrap();
            costs.push(cost.parse::<f64>().unwrap());
        }
        costs.sort_by(f64::total_cmp);
        eprintln!(
            "quota script with a full day and a second: {:.1} µs of Redis CPU (median of {costs:?})",
            costs[1]
        );
        assert!(costs[1] < 100.0, "{costs:?} µs");
    }
}
