//! Keeping in step with the other replicas: their events, the fleet's clock, the stamps of purges. It owns when this
//! process knows enough of the others to use what Redis has; it must not know what records mean.
//!
//! A replica reads the stream all the time, and every two seconds looks whether that is still the stream, the clock and
//! the Redis it knows. After a reconnection, a gap in the stream, a step of somebody's clock or a Redis that has lost its
//! memory it reads the stamps, and gives back those that are missing there. Nothing in memory is dropped for it.

use std::{convert::Infallible, time::Duration};

use deadpool_redis::redis::{self, Value, cmd};
use tokio::time::{Instant, sleep};
use tracing::info;

use super::{
    RedisTier, bounded,
    events::{self, Heard},
    lock, millis,
};
use crate::{
    cache::{
        order::{Compared, STAMPS, Scope, TOLERANCE, Telling, micros},
        tier::{Event, Name, Told},
    },
    chance::chance,
    redis_pool::{Link, Unavailable},
    tenant::hex,
};

/// How long one blocking read of the stream waits; below the driver's own time-out.
const BLOCK: Duration = Duration::from_secs(1);
/// How often it is looked whether all is as it was.
const LOOK: Duration = Duration::from_secs(2);
/// How often stamps are compared without an occasion.
const EXCHANGE: Duration = Duration::from_secs(30);
/// How long events are kept for replicas that were cut off.
const HISTORY: Duration = Duration::from_secs(60);
/// Stamps that are read or told at once.
const PAGE: usize = 1_000;
/// The pauses between attempts to follow the stream.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause of a tenant's that is believed.
const LONGEST_PAUSE_HEARD: Duration = Duration::from_secs(24 * 3600);

/// Where this process is with what the others tell.
#[derive(Default)]
pub(super) struct Place {
    /// The last event read; `None` before the first connection.
    position: Option<String>,
    /// The name of the Redis whose stamps are known.
    name: String,
    /// When stamps were last compared; `None` if there is an occasion to.
    exchanged: Option<Instant>,
    /// The others have to compare theirs, and have not been told so yet.
    announce: bool,
}

impl RedisTier {
    /// Follows for ever, on one connection after the other.
    pub(super) async fn keep_following(&self, hear: &(impl Fn(Event) + Send + Sync)) -> Infallible {
        let (mut place, mut pause) = (Place::default(), FIRST_PAUSE);
        loop {
            let started = Instant::now();
            place.exchanged = None;
            match self.follow_once(&mut place, hear).await {
                Ok(never) => match never {},
                Err(_) if started.elapsed() > LONGEST_PAUSE => pause = FIRST_PAUSE,
                Err(_) => {}
            }
            sleep(pause.mul_f64(0.75 + 0.5 * chance())).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn follow_once(
        &self,
        place: &mut Place,
        hear: &(impl Fn(Event) + Send + Sync),
    ) -> Result<Infallible, Unavailable> {
        let mut link = self.0.redis.own_link().await?;
        let lost = |error: redis::RedisError| {
            self.0.redis.note_own(Some(&error));
            Unavailable
        };
        let mut looks = 0;
        loop {
            let master = self.look(&mut link, place, hear).await.map_err(lost)?;
            self.heard();
            looks += 1;
            // It may have been one: elsewhere there may be another. Until then what it has is as good.
            if !master && looks > 1 {
                return Err(Unavailable);
            }
            let looked = Instant::now();
            while looked.elapsed() < LOOK {
                let asked = self.read_events(&mut link, place, hear).await.map_err(lost)?;
                self.heard();
                self.0.redis.note_own(None);
                if asked {
                    place.exchanged = None;
                    break;
                }
            }
        }
    }

    /// Reads what was told since; answers whether somebody asked to compare stamps.
    async fn read_events(
        &self,
        link: &mut Link,
        place: &mut Place,
        hear: &(impl Fn(Event) + Send + Sync),
    ) -> redis::RedisResult<bool> {
        let mut read = cmd("XREAD");
        read.arg("COUNT").arg(1000).arg("BLOCK").arg(millis(BLOCK));
        read.arg("STREAMS").arg(&self.0.teller.stream).arg(place.position.as_deref().unwrap_or("0-0"));
        let batch: Value = bounded(read.query_async(link), BLOCK * 2).await?;
        let mut asked = false;
        for (id, event) in events::of_read(&batch) {
            place.position = Some(id);
            if let Some((origin, heard)) = event.as_ref().and_then(events::parse)
                && origin != self.0.teller.replica
            {
                asked |= heard == Heard::Stamps;
                self.pass_on(heard, hear);
            }
        }
        Ok(asked)
    }

    fn pass_on(&self, heard: Heard, hear: &impl Fn(Event)) {
        let clock = self.0.order.clock();
        match heard {
            Heard::Stored { name, version } => {
                if let Some(version) = clock.own(version) {
                    hear(Event::Stored { name, version });
                }
                self.wake(name, Told::Stored);
            }
            Heard::Failed { name, error } => self.wake(name, Told::Failed(error)),
            Heard::Purged { scope, version } => {
                if let Some(version) = self.0.order.hear(scope, version) {
                    hear(Event::Purged { scope, version });
                }
            }
            Heard::Stamps => {}
            Heard::Paused { tenant, until } => {
                let now = clock.shared(clock.now()).unwrap_or(u64::MAX);
                let left = Duration::from_micros(until.saturating_sub(now));
                if let Some(hear) = self.0.paused.get() {
                    hear(&hex(tenant).into(), left.min(LONGEST_PAUSE_HEARD));
                }
            }
        }
    }

    fn wake(&self, name: Name, told: Told) {
        if let Some(teller) = lock(&self.0.waiting).remove(&name) {
            let _ = teller.send(told);
        }
    }

    /// Looks whether stream, clock and Redis are those it knows, and compares stamps if they are not. Answers whether it is
    /// a master.
    async fn look(
        &self,
        link: &mut Link,
        place: &mut Place,
        hear: &(impl Fn(Event) + Send + Sync),
    ) -> redis::RedisResult<bool> {
        // In this order: what is told after the end of the stream was read is heard.
        let (first, last) = (self.edge(link, false).await?, self.edge(link, true).await?);
        let clock = self.0.order.clock();
        let known = clock.shared(clock.now()).unwrap_or(0);
        let mut show = self.0.clock.key(&self.0.shown);
        show.arg(&self.0.teller.replica).arg(known);
        let (name, by_itself, shown, follows): (String, u64, u64, u8) =
            bounded(show.invoke_async(link), LONGEST_PAUSE).await?;
        let stepped = self.0.order.compare(shown) == Compared::Stepped;
        let raised = shown - by_itself.min(shown) > micros(TOLERANCE);
        if raised && !stepped {
            self.0.order.doubt();
        }
        if stepped || raised {
            info!("a clock was set; what was purged is asked for again");
            place.exchanged = None;
        }
        let missed = place.resume(first.as_deref(), last.as_deref());
        if missed || place.name != name || self.0.order.is_untold() {
            place.exchanged = None;
        }
        place.name = name;
        if let Some((now, _)) = last.as_deref().map(events::stream_id) {
            let mut trim = cmd("XTRIM");
            trim.arg(&self.0.teller.stream).arg("MINID").arg("~").arg(now.saturating_sub(millis(HISTORY)));
            // That it may not is no reason not to hear.
            let _: redis::RedisResult<Value> = bounded(trim.query_async(link), LONGEST_PAUSE).await;
        }
        if place.exchanged.is_none_or(|last| last.elapsed() >= EXCHANGE) {
            let whole = self.exchange(link, &mut place.announce, hear).await?;
            place.exchanged = whole.then(Instant::now);
        }
        Ok(follows == 0)
    }

    /// The id of the first or the last event there is.
    async fn edge(&self, link: &mut Link, last: bool) -> redis::RedisResult<Option<String>> {
        let (command, from, to) = if last { ("XREVRANGE", "+", "-") } else { ("XRANGE", "-", "+") };
        let mut range = cmd(command);
        range.arg(&self.0.teller.stream).arg(from).arg(to).arg("COUNT").arg(1);
        let found: Value = bounded(range.query_async(link), LONGEST_PAUSE).await?;
        Ok(events::entries(&found).into_iter().next().map(|(id, _)| id))
    }

    /// Reads what was purged, and tells what Redis does not know of it. Answers whether it could be told all.
    async fn exchange(
        &self,
        link: &mut Link,
        announce: &mut bool,
        hear: &(impl Fn(Event) + Send + Sync),
    ) -> redis::RedisResult<bool> {
        // A stamp may have got there without the event that tells of it.
        *announce |= self.0.order.is_untold();
        let mut stamps = Vec::new();
        for from in (0..=STAMPS).step_by(PAGE) {
            let mut range = cmd("ZRANGE");
            range.arg(&self.0.purges).arg(from).arg(from + PAGE - 1).arg("WITHSCORES");
            let page: Vec<(String, f64)> = bounded(range.query_async(link), LONGEST_PAUSE).await?;
            let whole = page.len() < PAGE;
            // Versions are whole numbers below 2^53.
            let stamp = |(scope, version): (String, f64)| Some((Scope::parse(&scope)?, version as u64));
            stamps.extend(page.into_iter().filter_map(stamp));
            if whole {
                break;
            }
        }
        let learned = self.0.order.learn(&stamps);
        for (scope, version) in learned.new {
            hear(Event::Purged { scope, version });
        }
        if !learned.lacking.is_empty() {
            *announce = true;
            info!(count = learned.lacking.len(), "redis is told what was purged before");
        }
        for some in learned.lacking.chunks(PAGE / 10) {
            let invocation = self.stamping(some);
            match bounded(invocation.invoke_async::<i64>(link), LONGEST_PAUSE).await {
                Ok(_) => self.0.order.told(some),
                Err(error) if error.is_io_error() => return Err(error),
                // What it has can be read all the same.
                Err(error) => {
                    self.0.redis.complain(Some(&error));
                    return Ok(false);
                }
            }
        }
        if *announce {
            let told = self.0.teller.event("stamps", "", 0);
            let _: String = bounded(told.query_async(link), LONGEST_PAUSE).await?;
            *announce = false;
        }
        Ok(true)
    }

    /// The script that notes `tellings` in Redis.
    pub(super) fn stamping(&self, tellings: &[Telling]) -> redis::ScriptInvocation<'_> {
        let mut invocation = self.0.stamp.key(&self.0.purges);
        invocation.arg(STAMPS);
        for telling in tellings {
            invocation.arg(telling.scope.text()).arg(telling.shared);
        }
        invocation
    }
}

impl Place {
    /// Goes on from the last event read in a stream that reaches from `first` to `last`. Answers whether events may have
    /// been missed.
    fn resume(&mut self, first: Option<&str>, last: Option<&str>) -> bool {
        let Some(position) = self.position.as_deref().map(events::stream_id) else {
            // Nobody who has heard nothing yet has missed anything.
            self.position = Some(last.unwrap_or("0-0").to_owned());
            return false;
        };
        match (first.map(events::stream_id), last.map(events::stream_id)) {
            // It is another stream, or all of it is gone.
            (_, last) if last.is_none_or(|last| last < position) => {
                self.position = Some("0-0".to_owned());
                position > (0, 0)
            }
            (first, _) => first.is_some_and(|first| first > position),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tokio::time::timeout;
    use tokio_util::{sync::CancellationToken, task::TaskTracker};

    use super::*;
    const STREAM: &str = "relay:1:events";
    const PURGES: &str = "relay:1:purges";
    const CLOCK: &str = "relay:1:clock";

    use crate::{
        cache::{
            order::Order,
            tier::{SharedTier, Value, Write},
        },
        redis_pool::Redis,
        redis_server::RedisServer,
    };

    /// A replica that follows.
    struct Replica {
        tier: RedisTier,
        heard: Arc<Mutex<Vec<Event>>>,
        stop: CancellationToken,
    }

    impl Replica {
        async fn of(server: &RedisServer) -> Self {
            let (tier, heard) =
                (RedisTier::new(Redis::to(&server.url())), Arc::<Mutex<Vec<Event>>>::default());
            let (stop, hearing) = (CancellationToken::new(), Arc::clone(&heard));
            let hear = move |event| hearing.lock().unwrap().push(event);
            TaskTracker::new().spawn(tier.clone().follow(stop.clone(), hear));
            tier.connected(5 * LONGEST_PAUSE).await;
            assert!(tier.hears());
            Self { tier, heard, stop }
        }

        fn order(&self) -> &Order {
            self.tier.order()
        }

        async fn purge(&self, scope: Scope) -> bool {
            self.order().purge(scope, self.order().clock().now());
            self.tier.tell(scope).await.is_ok()
        }

        /// Waits until it knows of `scope`, for at most `longest`.
        async fn knows(&self, scope: Scope, longest: Duration) -> bool {
            let knowing = async {
                while !self.order().all().contains_key(&scope) {
                    sleep(Duration::from_millis(5)).await;
                }
            };
            timeout(longest, knowing).await.is_ok()
        }
    }

    impl Drop for Replica {
        fn drop(&mut self) {
            self.stop.cancel();
        }
    }

    fn tenant(number: u8) -> Scope {
        Scope::Tenant([number; 16])
    }

    /// Two looks, and what a busy machine takes.
    const NOTICED: Duration = Duration::from_secs(8);

    #[tokio::test]
    async fn whoever_was_cut_off_or_comes_later_learns_what_was_purged() {
        let server = RedisServer::start().await;
        let (one, two) = (Replica::of(&server).await, Replica::of(&server).await);
        assert!(one.purge(tenant(1)).await);
        assert!(two.knows(tenant(1), NOTICED).await);
        // Its connections are lost, and of what is told meanwhile nothing is left.
        let _: i64 = server.ask(&["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
        let _ = one.purge(tenant(2)).await;
        let _: i64 = server.ask(&["XTRIM", STREAM, "MAXLEN", "0"]).await;
        assert!(two.knows(tenant(2), NOTICED).await);
        assert!(Replica::of(&server).await.order().all().len() == 2);
        let heard = two.heard.lock().unwrap().len();
        assert_eq!(heard, 2, "each once: {:?}", two.heard.lock().unwrap());
    }

    #[tokio::test]
    async fn a_redis_that_has_lost_its_memory_is_told_again_and_so_are_others() {
        let server = RedisServer::start().await;
        let one = Replica::of(&server).await;
        assert!(one.purge(tenant(1)).await);
        let clock = |replica: &Replica| {
            let clock = replica.order().clock();
            clock.shared(clock.now()).unwrap()
        };
        let _: String = server.ask(&["FLUSHALL"]).await;
        let two = Replica::of(&server).await;
        assert!(two.knows(tenant(1), NOTICED).await, "nobody told it");
        let stamps: Vec<String> = server.ask(&["ZRANGE", PURGES, "0", "-1"]).await;
        assert_eq!(stamps, [tenant(1).text()]);
        assert!(clock(&one).abs_diff(clock(&two)) < 100_000);
    }

    #[tokio::test]
    async fn the_fleets_clock_never_goes_back() {
        let server = RedisServer::start().await;
        let hour = 3_600_000_000_u64;
        let one = Replica::of(&server).await;
        let now = |replica: &Replica| {
            let clock = replica.order().clock();
            clock.shared(clock.now()).unwrap()
        };
        // As if its clock had shown an hour more, and been set right since.
        let later = (now(&one) + hour).to_string();
        let _: i64 = server.ask(&["HSET", CLOCK, "shown", &later]).await;
        let two = Replica::of(&server).await;
        assert!(now(&two) >= now(&one) + hour / 2, "it went back");
        let followed = async {
            while now(&one).abs_diff(now(&two)) > 100_000 {
                sleep(Duration::from_millis(20)).await;
            }
        };
        assert!(timeout(NOTICED, followed).await.is_ok(), "the other does not follow");
        // All that is kept is lost: the replicas know the time still.
        let _: String = server.ask(&["FLUSHALL"]).await;
        sleep(LOOK + LONGEST_PAUSE).await;
        let three = Replica::of(&server).await;
        assert!(now(&three).abs_diff(now(&one)) < 100_000);
    }

    #[tokio::test]
    async fn a_write_that_waited_is_not_made_if_it_was_purged_meanwhile() {
        let server = RedisServer::start().await;
        let one = Replica::of(&server).await;
        let _: String = server.ask(&["CLIENT", "PAUSE", "4000", "ALL"]).await;
        let written = Arc::new(Mutex::new(Vec::new()));
        for name in [1, 2] {
            let (order, purged) = (one.tier.clone(), name == 1);
            let (version, log) = (one.order().clock().now(), Arc::clone(&written));
            let value = Value(Arc::new(move |shared| {
                let dead = purged && order.order().all().contains_key(&tenant(1));
                log.lock().unwrap().push((name, dead));
                (!dead).then(|| [b"R2", crate::cache::entry::version_text(shared).as_bytes()].concat())
            }));
            let until = Instant::now() + 60 * LONGEST_PAUSE;
            let write = Write { name: [name; 16], version, until, owner: None, size: 20, value };
            one.tier.store(write).await;
        }
        assert!(!one.purge(tenant(1)).await);
        let done = async {
            while server.ask::<i64>(&["EXISTS", &one.tier.value_key(&[2; 16])]).await == 0 {
                sleep(Duration::from_millis(20)).await;
            }
        };
        assert!(timeout(2 * NOTICED, done).await.is_ok(), "what waited was not written");
        let there: i64 = server.ask(&["EXISTS", &one.tier.value_key(&[1; 16])]).await;
        assert_eq!(there, 0, "{:?}", written.lock().unwrap());
        assert!(
            timeout(NOTICED, async {
                while server.ask::<Vec<String>>(&["ZRANGE", PURGES, "0", "-1"]).await != [tenant(1).text()] {
                    sleep(Duration::from_millis(20)).await;
                }
            })
            .await
            .is_ok()
        );
    }

    #[test]
    fn what_may_have_been_missed_is_told_by_the_ends_of_the_stream() {
        let place =
            |position: Option<&str>| Place { position: position.map(str::to_owned), ..Place::default() };
        for (position, first, last, missed, goes_on) in [
            (None, None, None, false, "0-0"),
            (None, Some("5-0"), Some("7-0"), false, "7-0"),
            (Some("5-1"), Some("5-0"), Some("7-0"), false, "5-1"),
            (Some("7-0"), Some("7-0"), Some("7-0"), false, "7-0"),
            // The next one may be gone.
            (Some("5-0"), Some("5-1"), Some("7-0"), true, "5-0"),
            (Some("0-0"), Some("5-1"), Some("7-0"), true, "0-0"),
            // It is another stream.
            (Some("9-0"), Some("5-0"), Some("7-0"), true, "0-0"),
            (Some("9-0"), None, None, true, "0-0"),
            (Some("0-0"), None, None, false, "0-0"),
        ] {
            let mut place = place(position);
            assert_eq!(place.resume(first, last), missed, "{position:?} {first:?} {last:?}");
            assert_eq!(place.position.as_deref(), Some(goes_on), "{position:?} {first:?} {last:?}");
        }
    }
}
