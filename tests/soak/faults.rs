//! What goes wrong, one thing at a time. It owns how each fault is brought about and what of it callers may see; it
//! must not know who asks nor how answers are judged.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use cyberscan_relay::sandbox::{Behaviour, IssuerBehaviour, Rule};
use deadpool_redis::redis::InfoDict;
use http::StatusCode;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{
    fleet::RelayProcess,
    harness::sandbox_settings,
    load::{Door, Load},
    measure::Life,
    redis::{Proxy, RedisServer},
    world::World,
};

/// How many times more is asked in a burst, and for how long at most.
const BURST: u32 = 10;
const BURST_LENGTH: Duration = Duration::from_secs(2);
const SLOW_CLIENTS: usize = 150;
/// How long a slow client stays that nobody sends away: longer than any time-out of the relay that it meets.
const STAY: Duration = Duration::from_secs(15);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The issuer has another key and withdraws the one it had.
    NewKeys,
    RedisFrozen,
    RedisKilled,
    RedisEmptied,
    /// The issuer does not answer, and somebody comes with a new key of its.
    IssuerDown,
    /// Redis answers late, and one answer in five is cut off.
    RedisSlow,
    /// CyberScan answers 503 to three calls in ten.
    Failing,
    /// CyberScan answers 429 and wants to be left alone for two seconds.
    Throttled,
    /// CyberScan answers what is no JSON.
    Garbage,
    /// CyberScan never answers.
    BlackHole,
    /// Clients that send nothing, half a head or half a body.
    SlowClients,
    /// Ten times as many questions.
    Burst,
    /// One relay is started, then another gets SIGTERM.
    Replaced,
}

impl Fault {
    /// In this order, because a relay looks for new keys once in 30 s, also if it has looked in vain: keys that are
    /// withdrawn a minute or less after the issuer was down are missed for a while, by all callers.
    pub(crate) const ALL: [Self; 13] = [
        Self::NewKeys,
        Self::RedisFrozen,
        Self::RedisKilled,
        Self::RedisEmptied,
        Self::IssuerDown,
        Self::RedisSlow,
        Self::Failing,
        Self::Throttled,
        Self::Garbage,
        Self::BlackHole,
        Self::SlowClients,
        Self::Burst,
        Self::Replaced,
    ];

    /// The codes of errors and warnings that it explains: of Redis, of slow clients and of a replica that is
    /// replaced nobody notices anything.
    pub(crate) fn explains(self) -> &'static [&'static str] {
        match self {
            Self::RedisFrozen | Self::RedisKilled | Self::RedisEmptied | Self::RedisSlow => &[],
            Self::SlowClients | Self::Replaced => &[],
            Self::Failing => &["service unavailable", "stale data"],
            Self::Throttled => &["too many requests", "stale data"],
            Self::Garbage => &["unexpected response", "stale data"],
            Self::BlackHole => &["request timeout", "service unavailable", "too many requests", "stale data"],
            Self::Burst => &["too many requests", "stale data"],
            // Not to everyone; see `trial`.
            Self::NewKeys | Self::IssuerDown => &["authorization error"],
        }
    }

    /// For how long after its end it explains them.
    pub(crate) fn recovery(self) -> Duration {
        Duration::from_secs(match self {
            // What has failed again and again is left alone for a while, and so is a host: the first rest takes 5 s,
            // and begins when the last call has timed out.
            Self::Failing | Self::BlackHole => 10,
            // A relay looks for unknown keys once in 30 s, and waits for an issuer for 5 s.
            Self::IssuerDown => 36,
            _ => 5,
        })
    }
}

/// Everything that things can be done to.
pub(crate) struct Stage {
    pub(crate) world: Arc<World>,
    pub(crate) load: Arc<Load>,
    pub(crate) redis: RedisServer,
    /// Of servers that were killed.
    redis_cpu: f64,
    proxy: Proxy,
    settings: Vec<(String, String)>,
    ca: tempfile::NamedTempFile,
    relays: Vec<Relay>,
    /// Every relay there has been.
    pub(crate) lives: Arc<Mutex<Vec<Arc<Life>>>>,
    /// Lines of their logs that tell of a bug.
    pub(crate) complaints: Arc<Mutex<Vec<String>>>,
    slow: JoinSet<()>,
}

struct Relay {
    process: RelayProcess,
    door: Arc<Door>,
    life: Arc<Life>,
}

impl Stage {
    pub(crate) async fn new(world: Arc<World>, load: Arc<Load>, settings: &[(&str, &str)]) -> Self {
        let redis = RedisServer::process(&[]).await;
        let proxy = Proxy::to(&redis).await;
        let ca = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(ca.path(), &world.sandbox.ca_pem).unwrap();
        let mut all = sandbox_settings(&world.sandbox, ca.path().to_str().unwrap());
        all.push(("RELAY_REDIS_URL".to_owned(), proxy.url()));
        all.extend(settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let mut stage = Self {
            world,
            load,
            redis,
            redis_cpu: 0.0,
            proxy,
            settings: all,
            ca,
            relays: Vec::new(),
            lives: Arc::default(),
            complaints: Arc::default(),
            slow: JoinSet::new(),
        };
        stage.add_relay().await;
        stage.add_relay().await;
        stage
    }

    async fn add_relay(&mut self) {
        let mut command = RelayProcess::command();
        command.envs(self.settings.iter().map(|(name, value)| (name, value)));
        let (process, mut log) = RelayProcess::launch_unread(command).await;
        // Read on, or the relay's lines would be lost; an hour of them is too much to keep.
        let complaints = Arc::clone(&self.complaints);
        tokio::spawn(async move {
            while let Ok(Some(line)) = log.next_line().await {
                if line.contains("\"ERROR\"") || line.contains("panic") {
                    complaints.lock().unwrap().push(line);
                }
            }
        });
        let name = format!("relay {}", self.lives.lock().unwrap().len() + 1);
        let life = Life::new(name, process.pid(), process.admin);
        self.lives.lock().unwrap().push(Arc::clone(&life));
        let door = Door::to(process.address);
        self.load.doors.lock().unwrap().push(Arc::clone(&door));
        self.relays.push(Relay { process, door, life });
    }

    /// Brings `fault` about for `length`, or as long as it takes.
    pub(crate) async fn bring_about(&mut self, fault: Fault, length: Duration) {
        match fault {
            Fault::NewKeys => self.world.replace_keys().await,
            Fault::RedisFrozen => {
                self.redis.freeze();
                sleep(length).await;
                self.redis.thaw();
            }
            Fault::RedisKilled => {
                self.redis_cpu = self.redis_cpu().await;
                self.redis.kill();
                sleep(length).await;
                self.redis.restart().await;
            }
            Fault::RedisEmptied => {
                let _: String = self.redis.ask(&["FLUSHALL"]).await;
            }
            Fault::RedisSlow => {
                self.proxy.slow(Duration::from_millis(40), 20);
                sleep(length).await;
                self.proxy.slow(Duration::ZERO, 0);
            }
            Fault::Failing => {
                self.misbehave(Behaviour::FailShare { percent: 30, code: 503 }, length).await;
            }
            Fault::Throttled => {
                let retry_after = Some("2".to_owned());
                let body = String::new();
                self.misbehave(Behaviour::Status { code: 429, retry_after, body }, length).await;
            }
            Fault::Garbage => {
                self.misbehave(Behaviour::Body("<html>Welcome!</html>".into()), length).await;
            }
            Fault::BlackHole => self.misbehave(Behaviour::Hang, length).await,
            Fault::IssuerDown => {
                self.world.sandbox.issuer.respond_with(IssuerBehaviour::Hang);
                self.world.add_key().await;
                sleep(length).await;
                self.world.sandbox.issuer.respond_with(IssuerBehaviour::Keys);
            }
            Fault::SlowClients => self.slow_clients(length).await,
            Fault::Burst => {
                self.load.times.store(BURST, Ordering::Relaxed);
                sleep(length.min(BURST_LENGTH)).await;
                self.load.times.store(1, Ordering::Relaxed);
            }
            Fault::Replaced => self.replace().await,
        }
    }

    async fn misbehave(&self, behaviour: Behaviour, length: Duration) {
        self.world.sandbox.cyberscan.script(Rule::any().does(behaviour));
        sleep(length).await;
        self.world.sandbox.cyberscan.clear_script();
    }

    /// They come within `length` and leave when they are sent away.
    async fn slow_clients(&mut self, length: Duration) {
        while self.slow.try_join_next().is_some() {}
        let half_body = self.world.head(1) + "[{";
        let half_head = "POST /observe/observables HTTP/1.1\r\nHost: rel".to_owned();
        for number in 0..SLOW_CLIENTS {
            let relay = self.relays[number % self.relays.len()].process.address;
            let beginning = [&half_body, &half_head, &String::new()][number % 3].clone();
            self.slow.spawn(async move {
                let _ = timeout(STAY, slow_client(relay, beginning)).await;
            });
            sleep(length / u32::try_from(SLOW_CLIENTS).unwrap()).await;
        }
    }

    /// As in a rolling update behind a load balancer that heeds `/readyz`. The first relay stays for ever.
    async fn replace(&mut self) {
        self.add_relay().await;
        let leaving = self.relays.remove(1);
        leaving.life.over.store(true, Ordering::Relaxed);
        leaving.process.terminate().await;
        let ready = async || {
            let answer = leaving.process.admin("/readyz").await;
            answer.is_ok_and(|(status, _)| status == StatusCode::OK)
        };
        while ready().await {
            sleep(Duration::from_millis(50)).await;
        }
        self.load.doors.lock().unwrap().retain(|door| !Arc::ptr_eq(door, &leaving.door));
        drop(leaving.door);
        let started = Instant::now();
        let status = leaving.process.end_within(Duration::from_secs(40)).await;
        assert!(status.success(), "{} ended with {status} after {:?}", leaving.life.name, started.elapsed());
    }

    /// Seconds of processor time of all Redis servers so far.
    pub(crate) async fn redis_cpu(&self) -> f64 {
        let info: InfoDict = self.redis.ask(&["INFO", "cpu"]).await;
        let seconds = |name: &str| info.get::<f64>(name).unwrap_or_default();
        self.redis_cpu + seconds("used_cpu_user") + seconds("used_cpu_sys")
    }

    /// The sum of a metric over the relays that serve.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let mut sum = 0.0;
        for relay in &self.relays {
            sum += relay.process.metric(name).await;
        }
        sum
    }
}

async fn slow_client(relay: SocketAddr, beginning: String) {
    let Ok(mut stream) = TcpStream::connect(relay).await else { return };
    let _ = stream.write_all(beginning.as_bytes()).await;
    let mut rest = [0; 1024];
    while let Ok(1..) = stream.read(&mut rest).await {}
}
