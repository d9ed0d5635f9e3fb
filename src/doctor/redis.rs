//! Redis, as the relay will use it: reached, asked about itself, and every command tried once with the relay's user on
//! keys of doctor's own, which are gone a moment later. What is the relay's own is only read. It must not know what is
//! stored.

use std::time::Duration;

use deadpool_redis::redis::{
    self, ErrorKind, FromRedisValue, InfoDict, RedisError, RedisResult, ServerErrorKind, Value, cmd,
};
use futures_util::future::join_all;
use tokio::{
    net::TcpStream,
    time::{Instant, timeout},
};
use tokio_util::task::TaskTracker;

use super::{Check, Finding};
use crate::{
    clock::Clock,
    metrics::Metrics,
    redis_pool::{Config, FileFault, Link, Mode, Redis, Url, tls_fault},
    settings::Settings,
};

/// The oldest version that has every command: PEXPIRE with GT.
const OLDEST: (u32, u32) = (7, 0);
/// Quotas of this length outlive restarts of Redis.
const LONG: Duration = Duration::from_secs(86_400);
/// Clocks may differ by so many seconds before anything goes wrong.
const SKEW: f64 = 30.0;
/// A Redis with less memory than this holds next to nothing.
const LITTLE_MEMORY: u64 = 16 << 20;

/// Every command that the relay sends, or that a script of it calls, with harmless arguments. `V`, `H`, `Z` and `S`
/// stand for keys of doctor's own: a value, a hash, a sorted set, a stream. A test holds the list against the source.
pub(super) const COMMANDS: &[&str] = &[
    "PING",
    "UNWATCH",
    "TIME",
    "SET V x PX 10000",
    "GET V",
    "GETRANGE V 0 0",
    "MGET V",
    "PEXPIRE V 10000 GT",
    "APPEND V x",
    "PTTL V",
    "HSET H f 1",
    "HSETNX H f 1",
    "HMGET H f",
    "HGET H f",
    "HLEN H",
    "HINCRBY H f 1",
    "HRANDFIELD H 1",
    "HDEL H f",
    "ZADD Z GT 1 m",
    "ZCARD Z",
    "ZRANGE Z 0 0",
    "ZSCORE Z m",
    "ZRANGEBYSCORE Z -inf 1",
    "ZREM Z m",
    "XADD S MAXLEN ~ 10 * o doctor",
    "XTRIM S MINID ~ 0",
    "XRANGE S - + COUNT 1",
    "XREVRANGE S + - COUNT 1",
    "XREAD COUNT 1 STREAMS S 0",
];

/// What is the relay's own, read only: a user that may not use these keys can do nothing.
const OWN_KEYS: [&str; 3] = ["events", "purges", "clock"];

/// What there is to say about Redis.
pub(super) async fn examine(settings: &Settings, patience: Duration, clock: Clock) -> Vec<Finding> {
    let Some(config) = &settings.redis else {
        let state = "not set: each replica has its own cache and quotas, lost when it restarts";
        return vec![Finding::ok(Check::RedisUrl, "", state)];
    };
    let about = places(config);
    let mut findings =
        vec![Finding::ok(Check::RedisUrl, &about, "set"), encryption(settings, config, &about)];
    let started = Instant::now();
    let connecting = async {
        let redis = Redis::new(config, Metrics::new(), TaskTracker::new());
        match redis {
            Ok(redis) => redis.try_link().await.map_err(|error| Ok(Box::new(error))),
            Err(error) => Err(Err(error
                .downcast::<FileFault>()
                .map_or_else(|error| error.to_string(), |fault| fault.to_string()))),
        }
    };
    let mut link = match timeout(patience, connecting).await {
        Ok(Ok(link)) => link,
        Ok(Err(Ok(error))) => {
            let finding = match without_handshake(config, &about, &error, patience).await {
                Some(finding) => finding,
                None => unreachable(config, &about, &error),
            };
            findings.push(finding);
            return findings;
        }
        Ok(Err(Err(file))) => {
            let advice = "correct the path, or let the relay's user read it";
            findings.push(Finding::bad(Check::RedisTls, &about, file, advice));
            return findings;
        }
        Err(_) => {
            findings.push(silent(&about, patience));
            return findings;
        }
    };
    let took = started.elapsed().as_millis();
    // One that asks for a password it was not given accepts the connection all the same.
    if let Ok(Err(error)) = timeout(patience, ask::<Value>(&mut link, &["PING"])).await
        && error.code() == Some("NOAUTH")
    {
        findings.push(unreachable(config, &about, &error));
        return findings;
    }
    let mut other = link.clone();
    let nodes = nodes(config, &mut other, settings, patience);
    let whole = async {
        let mut own = vec![Finding::ok(Check::RedisConnection, &about, format!("connected in {took} ms"))];
        own.push(password(config, &about));
        if config.urls.iter().any(Url::is_encrypted) {
            own.push(Finding::ok(Check::RedisTls, &about, "its certificate is accepted"));
        }
        own.push(latency(config, &about, &mut link).await);
        own.extend(time(&about, &mut link, clock).await);
        own.extend(commands(config, &about, &mut link).await);
        own
    };
    match timeout(patience, async { tokio::join!(whole, nodes) }).await {
        Ok((own, of_nodes)) => findings.extend(own.into_iter().chain(of_nodes)),
        Err(_) => findings.push(silent(&about, patience)),
    }
    findings
}

/// A plain server waits for the end of what it takes for a command, and the handshake for an answer.
async fn without_handshake(
    config: &Config,
    about: &str,
    error: &RedisError,
    patience: Duration,
) -> Option<Finding> {
    let place = config.urls.iter().find(|url| url.is_encrypted())?.place();
    if !error.is_timeout() && !error.to_string().contains("timed out") {
        return None;
    }
    let connected = timeout(patience, TcpStream::connect(place)).await;
    connected.ok()?.ok()?;
    Some(plain(about))
}

fn plain(about: &str) -> Finding {
    let advice = "write redis:// if this port is a plain one, or enable TLS in Redis (tls-port)";
    Finding::bad(Check::RedisTls, about, "takes connections, but does not speak TLS on this port", advice)
}

fn silent(about: &str, patience: Duration) -> Finding {
    let state = format!("no answer within {} s", patience.as_secs_f64());
    let advice = "look whether it is overloaded or frozen, or whether a firewall drops what comes back";
    Finding::bad(Check::RedisConnection, about, state, advice)
}

fn places(config: &Config) -> String {
    config.urls.iter().map(Url::place).collect::<Vec<_>>().join(",")
}

/// Why there is no connection. Errors of the driver are told in our words: theirs may quote what a server said.
fn unreachable(config: &Config, about: &str, error: &RedisError) -> Finding {
    let text = error.to_string();
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    let encrypted = config.urls.iter().any(Url::is_encrypted);
    if encrypted && let Some(fault) = tls_fault(error) {
        let advice = if fault.contains("client certificate") {
            "set redis.client_certificate and redis.client_key to what it accepts, or tls-auth-clients no there"
        } else if fault.contains("TLS") {
            return plain(about);
        } else {
            "name the authority's file in redis.ca_file, or have Redis use a certificate for this name"
        };
        return Finding::bad(Check::RedisTls, about, fault, advice);
    }
    if encrypted && has(&["close_notify", "eof"]) {
        return plain(about);
    }
    match (error.kind(), error.code()) {
        (ErrorKind::AuthenticationFailed, _) | (_, Some("NOAUTH" | "WRONGPASS")) => Finding::bad(
            Check::RedisAuth,
            about,
            "refuses user and password",
            "correct redis.url: redis://user:password@host:port, with %40 for an @ in the password",
        ),
        (ErrorKind::Server(ServerErrorKind::NoPerm), _) => Finding::bad(
            Check::RedisCommands,
            about,
            "the user may not even ask what a connection needs (NOPERM)",
            "grant what docs/deploying.md lists for this mode",
        ),
        (ErrorKind::Server(ServerErrorKind::BusyLoading), _) => {
            Finding::bad(Check::RedisConnection, about, "is loading its data", "wait until it has")
        }
        (_, Some("MASTERDOWN" | "CLUSTERDOWN")) => Finding::bad(
            Check::RedisConnection,
            about,
            "has no master that works",
            "look after the cluster: redis-cli --cluster check",
        ),
        _ => unreached(config, about, &text),
    }
}

fn unreached(config: &Config, about: &str, text: &str) -> Finding {
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    if has(&["cluster support disabled", "unknown command"]) {
        let state = "is not what redis.mode says";
        return Finding::bad(Check::RedisMode, about, state, "set redis.mode to single, sentinel or cluster");
    }
    let (state, advice) = if has(&["refused"]) {
        ("nothing listens there", "start Redis, or correct host and port")
    } else if has(&["lookup", "resolve", "not known", "address information", "No address"]) {
        ("the name does not resolve", "correct the host, or this machine's DNS")
    } else if has(&["timed out", "timeout"]) {
        ("no answer", "correct host and port, or open the way in the firewall")
    } else if has(&["reset", "broken pipe", "end of file", "EOF", "closed", "dropped"]) {
        ("closes the connection", "write rediss:// if this port wants TLS; look into Redis's log")
    } else if config.mode == Mode::Sentinel {
        return Finding::bad(
            Check::RedisMode,
            about,
            "the sentinels know no master of that name that answers, or they are none",
            "correct redis.master_name and redis.url; redis-cli -p 26379 SENTINEL masters tells",
        );
    } else if config.mode == Mode::Cluster {
        return Finding::bad(
            Check::RedisMode,
            about,
            "no connection to a cluster",
            "set redis.mode to single if it is none; else look after the nodes",
        );
    } else {
        ("no connection", "correct redis.url; try redis-cli from this machine")
    };
    Finding::bad(Check::RedisConnection, about, state, advice)
}

fn password(config: &Config, about: &str) -> Finding {
    let check = Check::RedisAuth;
    if config.has_password() {
        Finding::ok(check, about, "accepts user and password")
    } else if config.urls.iter().all(Url::is_local) {
        Finding::ok(check, about, "no password required; it is on this machine")
    } else {
        let advice = "set a password there (ACL SETUSER, requirepass) and in redis.url";
        Finding::warn(check, about, "accepts anyone: no password is required", advice)
    }
}

/// Who could read findings on their way, or where they are kept.
fn encryption(settings: &Settings, config: &Config, about: &str) -> Finding {
    let check = Check::RedisEncryption;
    let keys = &settings.cache.encryption_keys;
    let local = config.urls.iter().all(Url::is_local);
    let clear = config.urls.iter().any(|url| !url.is_encrypted());
    let guessed = |key: &[u8; 32]| key.iter().all(|byte| Some(byte) == key.first());
    if keys.iter().any(guessed) {
        let advice = "make one: openssl rand -hex 32";
        return Finding::bad(check, about, "the encryption key is one byte, repeated", advice);
    }
    match (keys.is_empty(), local, clear) {
        (true, false, true) => Finding::bad(
            check,
            about,
            "answers travel over the network and are stored in Redis unencrypted",
            "set redis.encryption_key (openssl rand -hex 32), or rediss://",
        ),
        (true, false, false) => Finding::warn(
            check,
            about,
            "answers are stored in Redis unencrypted",
            "set redis.encryption_key (openssl rand -hex 32) if others can read that Redis",
        ),
        (true, true, _) => Finding::ok(check, about, "answers are stored unencrypted, on this machine"),
        (false, _, _) => Finding::ok(check, about, "answers are sealed"),
    }
}

async fn latency(config: &Config, about: &str, link: &mut Link) -> Finding {
    let check = Check::RedisLatency;
    let mut best: Option<Duration> = None;
    for _ in 0..5 {
        let started = Instant::now();
        if ask::<Value>(link, &["PING"]).await.is_ok() {
            let took = started.elapsed();
            best = Some(best.map_or(took, |best| best.min(took)));
        }
    }
    let limit = config.timeout;
    let advice = "bring it nearer, or set redis.timeout above what it takes";
    match best {
        None => Finding::unknown(check, about, "PING is not answered", "see the other findings about Redis"),
        Some(best) if best > limit => {
            Finding::bad(check, about, format!("answers in {best:.1?}; the relay waits {limit:?}"), advice)
        }
        Some(best) if best > limit / 2 => {
            Finding::warn(check, about, format!("answers in {best:.1?} of {limit:?}"), advice)
        }
        Some(best) => Finding::ok(check, about, format!("answers in {best:.1?}")),
    }
}

async fn time(about: &str, link: &mut Link, clock: Clock) -> Option<Finding> {
    let (seconds, micros): (f64, f64) = ask(link, &["TIME"]).await.ok()?;
    let ahead = clock.unix() - (seconds + micros / 1e6);
    let check = Check::RedisClock;
    Some(if ahead.abs() > SKEW {
        let direction = if ahead > 0.0 { "behind" } else { "ahead of" };
        let state = format!("{:.0} s {direction} this machine's clock", ahead.abs());
        Finding::warn(check, about, state, "have both follow a time server (chrony, systemd-timesyncd)")
    } else {
        Finding::ok(check, about, "agrees with this machine's clock")
    })
}

/// Every command once, by the relay's user.
async fn commands(config: &Config, about: &str, link: &mut Link) -> Vec<Finding> {
    let nonce = uuid::Uuid::new_v4().simple().to_string();
    // One hash tag: in a cluster they are on one node, as a value and its lock are.
    let key = |kind: &str| config.key(&format!("{{doctor-{nonce}}}:{kind}"));
    let mut refused = Refused::default();
    // All at once, and in order: one round trip, however far away it is.
    let asking = COMMANDS.iter().map(|line| {
        let own = |word| if let "V" | "H" | "Z" | "S" = word { key(word) } else { word.to_owned() };
        let (words, mut link): (Vec<String>, Link) = (line.split(' ').map(own).collect(), link.clone());
        async move {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            ask::<Value>(&mut link, &words).await.err()
        }
    });
    for (line, error) in COMMANDS.iter().zip(join_all(asking).await) {
        refused.note(line, error);
    }
    let reading = OWN_KEYS.iter().map(|own| {
        let (mut link, key) = (link.clone(), config.key(own));
        async move {
            let reading: &[&str] = match *own {
                "events" => &["XRANGE", &key, "-", "+", "COUNT", "1"],
                "purges" => &["ZCARD", &key],
                _ => &["HLEN", &key],
            };
            ask::<Value>(&mut link, reading).await.err()
        }
    });
    join_all(reading).await.into_iter().for_each(|error| refused.own(error));
    let keys = ["V", "H", "Z", "S"].map(key);
    for key in &keys {
        refused.note("DEL", ask::<Value>(link, &["DEL", key]).await.err());
    }
    let script = redis::Script::new("return redis.call('PTTL', KEYS[1])");
    let run = script.key(key("V")).invoke_async::<Value>(link).await;
    refused.script = run.err().filter(|error| !refused.covers(error));
    refused.findings(config, about)
}

/// What was refused, by reason.
#[derive(Default)]
struct Refused {
    commands: Vec<String>,
    keys: Vec<String>,
    unknown: Vec<String>,
    others: Vec<(String, String)>,
    full: bool,
    read_only: bool,
    unsaved: bool,
    script: Option<RedisError>,
}

impl Refused {
    fn note(&mut self, line: &str, error: Option<RedisError>) {
        let Some(error) = error else { return };
        let name = line.split(' ').next().unwrap_or(line).to_owned();
        let add = |to: &mut Vec<String>| {
            if !to.contains(&name) {
                to.push(name.clone());
            }
        };
        let detail = error.detail().unwrap_or_default().to_ascii_lowercase();
        match error.code() {
            Some("NOPERM") if detail.contains(" key") => add(&mut self.keys),
            Some("NOPERM") => add(&mut self.commands),
            Some("OOM") => self.full = true,
            Some("READONLY") => self.read_only = true,
            Some("MISCONF") => self.unsaved = true,
            Some("ERR") if detail.contains("unknown command") || detail.contains("syntax error") => {
                add(&mut self.unknown);
            }
            // What a write that was refused did not leave there.
            Some("WRONGTYPE") => {}
            Some(code) => self.others.push((name, code.to_owned())),
            None => self.others.push((name, error.category().to_owned())),
        }
    }

    fn own(&mut self, error: Option<RedisError>) {
        if let Some(error) = error
            && error.code() == Some("NOPERM")
            && error.detail().unwrap_or_default().contains(" key")
        {
            self.keys.push("its own keys".to_owned());
        }
    }

    /// Whether `error` has been told already.
    fn covers(&self, error: &RedisError) -> bool {
        match error.code() {
            Some("READONLY") => self.read_only,
            Some("OOM") => self.full,
            Some("MISCONF") => self.unsaved,
            Some("NOPERM") => error.detail().unwrap_or_default().contains(" key") && !self.keys.is_empty(),
            _ => false,
        }
    }

    fn findings(self, config: &Config, about: &str) -> Vec<Finding> {
        let mut findings = Vec::new();
        let list = |names: &[String]| names.join(", ");
        let denied = [self.commands.as_slice(), self.unknown.as_slice()].concat();
        findings.push(if !self.commands.is_empty() {
            let rights: Vec<String> =
                self.commands.iter().map(|name| format!("+{}", name.to_ascii_lowercase())).collect();
            Finding::bad(
                Check::RedisCommands,
                about,
                format!("the Redis user may not run {}", list(&self.commands)),
                format!("ACL SETUSER <user> {}", rights.join(" ")),
            )
        } else if !self.unknown.is_empty() {
            Finding::bad(
                Check::RedisCommands,
                about,
                format!("lacks {}", list(&self.unknown)),
                "use Redis 7 or later; look for rename-command in its configuration",
            )
        } else if let Some((name, code)) = self.others.first() {
            let state = format!("{name} is refused: {code}");
            Finding::bad(Check::RedisCommands, about, state, "look into Redis's log")
        } else {
            Finding::ok(Check::RedisCommands, about, format!("all {} are allowed", COMMANDS.len() + 1))
        });
        findings.push(if self.keys.is_empty() {
            Finding::ok(Check::RedisKeys, about, format!("may use {}*", config.key("")))
        } else {
            Finding::bad(
                Check::RedisKeys,
                about,
                format!("the Redis user may not use the relay's keys ({})", list(&self.keys)),
                format!("ACL SETUSER <user> ~{}*", config.key_prefix),
            )
        });
        match self.script {
            Some(error) if error.code() == Some("NOPERM") => findings.push(Finding::bad(
                Check::RedisScripts,
                about,
                "the Redis user may not run scripts",
                "ACL SETUSER <user> +evalsha +script|load",
            )),
            Some(error) => findings.push(Finding::bad(
                Check::RedisScripts,
                about,
                format!("a script fails: {}", error.code().unwrap_or_else(|| error.category())),
                "look into Redis's log; scripts must not be disabled",
            )),
            None if denied.is_empty() && self.keys.is_empty() => {
                findings.push(Finding::ok(Check::RedisScripts, about, "scripts run"));
            }
            None => {}
        }
        if self.full {
            let advice = "raise maxmemory, and set maxmemory-policy volatile-lfu";
            findings.push(Finding::bad(Check::RedisMemory, about, "full: writes are rejected (OOM)", advice));
        }
        if self.read_only {
            let advice = "point redis.url at the master, or set redis.mode to sentinel or cluster";
            findings.push(Finding::bad(Check::RedisRole, about, "rejects writes (READONLY)", advice));
        }
        if self.unsaved {
            let state = "writes are rejected, because the last snapshot failed (MISCONF)";
            let advice = "make room on Redis's disk, or CONFIG SET stop-writes-on-bgsave-error no";
            findings.push(Finding::bad(Check::RedisPersistence, about, state, advice));
        }
        findings
    }
}

/// What each node says of itself.
async fn nodes(config: &Config, link: &mut Link, settings: &Settings, patience: Duration) -> Vec<Finding> {
    if config.mode != Mode::Cluster {
        return node(&places(config), config.mode, link, settings).await;
    }
    let each = config.urls.iter().map(|url| async move {
        let about = url.place();
        let single = Config { urls: vec![url.clone()], mode: Mode::Single, ..config.clone() };
        let connecting =
            async { Redis::new(&single, Metrics::new(), TaskTracker::new()).ok()?.try_link().await.ok() };
        match timeout(patience, connecting).await {
            Ok(Some(mut link)) => node(&about, config.mode, &mut link, settings).await,
            _ => {
                let advice = "start it, or take it out of redis.url";
                vec![Finding::warn(Check::RedisConnection, &about, "this node does not answer", advice)]
            }
        }
    });
    join_all(each).await.into_iter().flatten().collect()
}

async fn node(about: &str, mode: Mode, link: &mut Link, settings: &Settings) -> Vec<Finding> {
    let info: InfoDict = match ask(link, &["INFO"]).await {
        Ok(info) => info,
        Err(_) => {
            let state = "INFO is not allowed: version, role, memory, eviction and persistence are not known";
            let advice = "ACL SETUSER <user> +info, at least while doctor looks";
            return vec![Finding::unknown(Check::RedisInfo, about, state, advice)];
        }
    };
    let text = |name: &str| info.get::<String>(name);
    let number = |name: &str| info.get::<u64>(name);
    let mut findings = vec![version(about, text("redis_version").as_deref())];
    findings.extend(kind(about, mode, text("redis_mode").as_deref()));
    if text("role").as_deref() == Some("slave") && mode != Mode::Cluster {
        let advice = "point redis.url at the master, or set redis.mode to sentinel";
        findings.push(Finding::bad(Check::RedisRole, about, "is a replica: it rejects writes", advice));
    } else {
        findings.push(Finding::ok(Check::RedisRole, about, "accepts writes"));
    }
    let (used, most) = (number("used_memory").unwrap_or(0), number("maxmemory"));
    findings.extend(most.map(|most| memory(about, used, most)));
    findings.extend(text("maxmemory_policy").map(|policy| eviction(about, &policy, most.unwrap_or(0))));
    findings.push(persistence(about, &info, link, settings).await);
    findings
}

fn version(about: &str, version: Option<&str>) -> Finding {
    let check = Check::RedisVersion;
    let numbers = version.and_then(|version| {
        let mut numbers = version.split('.').map(|number| number.parse::<u32>().ok());
        Some((numbers.next()??, numbers.next()??))
    });
    match (numbers, version) {
        (Some(numbers), Some(version)) if numbers < OLDEST => {
            Finding::bad(check, about, format!("version {version}"), "use Redis 7.0 or later, or Valkey")
        }
        (Some(_), Some(version)) => Finding::ok(check, about, format!("version {version}")),
        _ => Finding::unknown(
            check,
            about,
            "does not tell its version",
            "look whether it is Redis 7.0 or later",
        ),
    }
}

fn kind(about: &str, mode: Mode, says: Option<&str>) -> Option<Finding> {
    let check = Check::RedisMode;
    let says = says?;
    let fits = match mode {
        Mode::Single | Mode::Sentinel => says == "standalone",
        Mode::Cluster => says == "cluster",
    };
    Some(if fits {
        Finding::ok(check, about, "fits redis.mode")
    } else {
        let what = match says {
            "cluster" => "a node of a cluster",
            "sentinel" => "a sentinel",
            "standalone" => "a single server",
            _ => "something else",
        };
        let advice = match says {
            "cluster" | "sentinel" => format!("set redis.mode to {says}"),
            _ => "set redis.mode to single".to_owned(),
        };
        Finding::bad(check, about, format!("is {what}, which redis.mode does not say"), advice)
    })
}

fn memory(about: &str, used: u64, most: u64) -> Finding {
    let check = Check::RedisMemory;
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    if most == 0 {
        let advice = "set maxmemory, below what its machine or container has, and volatile-lfu";
        Finding::warn(
            check,
            about,
            "no limit (maxmemory 0): it grows until its machine has no memory",
            advice,
        )
    } else if most < LITTLE_MEMORY {
        let advice = "set maxmemory to 64mb at least; an answer takes 2 to 50 KB";
        Finding::warn(check, about, format!("{} of {}", mib(used), mib(most)), advice)
    } else {
        Finding::ok(check, about, format!("{} of {}", mib(used), mib(most)))
    }
}

fn eviction(about: &str, policy: &str, most: u64) -> Finding {
    let check = Check::RedisEviction;
    let advice = "CONFIG SET maxmemory-policy volatile-lfu, and in its configuration";
    let state = match policy {
        _ if policy.starts_with("volatile-") => return Finding::ok(check, about, policy),
        "noeviction" if most == 0 => return Finding::ok(check, about, "noeviction, and no limit of memory"),
        "noeviction" => "noeviction: once it is full every write is rejected, and replicas share nothing",
        _ if policy.starts_with("allkeys-") => {
            let state = format!("{policy}: quotas and purges can be evicted, and calls are then made twice");
            return if most == 0 {
                Finding::warn(check, about, state, advice)
            } else {
                Finding::bad(check, about, state, advice)
            };
        }
        _ => "an unknown policy",
    };
    Finding::warn(check, about, state, advice)
}

async fn persistence(about: &str, info: &InfoDict, link: &mut Link, settings: &Settings) -> Finding {
    let check = Check::RedisPersistence;
    let limiter = &settings.limiter;
    let mut quotas = limiter.tenant.iter().chain(&limiter.fleet).chain(limiter.tenants.values().flatten());
    if !quotas.any(|window| window.per >= LONG) {
        return Finding::ok(check, about, "not needed: no quota of a day or longer is set");
    }
    if info.get::<u8>("aof_enabled") == Some(1) {
        return Finding::ok(check, about, "append-only file");
    }
    let snapshots = match ask::<Vec<String>>(link, &["CONFIG", "GET", "save"]).await {
        Ok(save) => save.get(1).map(|save| !save.trim().is_empty()),
        Err(_) => None,
    };
    let advice = "set appendonly yes in Redis, or shorter windows in limiter.tenant, limiter.tenants and limiter.fleet";
    match snapshots {
        Some(true) => Finding::ok(check, about, "snapshots; a restart forgets the calls since the last one"),
        Some(false) => Finding::bad(
            check,
            about,
            "none, and a quota of a day or longer is set: a restart of Redis loses the count of calls",
            advice,
        ),
        None => Finding::unknown(
            check,
            about,
            "no append-only file; whether there are snapshots is not known (CONFIG is not allowed)",
            advice,
        ),
    }
}

async fn ask<T: FromRedisValue>(link: &mut Link, words: &[&str]) -> RedisResult<T> {
    let Some((name, arguments)) = words.split_first() else {
        return Err(RedisError::from((ErrorKind::InvalidClientConfig, "no command")));
    };
    cmd(name).arg(arguments).query_async(link).await
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use super::*;

    /// Commands that the tests' own code or the driver's set-up sends.
    const NOT_OURS: [&str; 4] = ["CLIENT", "XTRIM", "INFO", "CONFIG"];

    fn commands_in(text: &str, found: &mut BTreeSet<String>) {
        for opening in ["redis.call('", "redis.pcall('", "cmd(\""] {
            for rest in text.split(opening).skip(1) {
                found.insert(rest.split(['\'', '"']).next().unwrap().to_owned());
            }
        }
    }

    fn sources(directory: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if !path.ends_with("doctor") {
                    sources(&path, found);
                }
            } else if path.extension().is_some_and(|kind| kind == "rs" || kind == "lua") {
                commands_in(&std::fs::read_to_string(path).unwrap(), found);
            }
        }
    }

    #[test]
    fn every_command_of_the_source_is_tried() {
        let mut used = BTreeSet::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut used);
        assert!(used.len() > 20, "{used:?}");
        let tried: BTreeSet<&str> = COMMANDS.iter().map(|line| line.split(' ').next().unwrap()).collect();
        let untried: Vec<&String> = used
            .iter()
            .filter(|name| {
                *name != "DEL" && !NOT_OURS.contains(&name.as_str()) && !tried.contains(name.as_str())
            })
            .collect();
        assert!(untried.is_empty(), "the relay uses {untried:?}, and doctor does not try them");
    }

    #[test]
    fn every_command_that_is_tried_is_in_the_rights_that_are_recommended() {
        let script = include_str!("../../scripts/secrets.sh");
        let rights = script.lines().find(|line| line.starts_with("user relay ")).unwrap();
        for line in COMMANDS.iter().chain(&["DEL", "EVALSHA", "INFO"]) {
            let right = format!("+{}", line.split(' ').next().unwrap().to_ascii_lowercase());
            assert!(rights.split(' ').any(|given| given == right), "{right}");
        }
    }

    #[test]
    fn a_version_is_compared_as_numbers() {
        let severity = |text| version("", text).severity;
        use super::super::Severity::{Bad, Ok, Unknown};
        assert_eq!(severity(Some("7.0.15")), Ok);
        assert_eq!(severity(Some("10.2.0")), Ok);
        assert_eq!(severity(Some("6.2.14")), Bad);
        assert_eq!(severity(Some("255.255.255")), Ok);
        assert_eq!(severity(Some("unstable")), Unknown);
        assert_eq!(severity(None), Unknown);
    }
}
