//! Every key there is: what it holds, its smallest and largest value and why, whether it is a secret, whether a
//! reload changes it. It must not know how values are read.

use std::{fmt, time::Duration};

use super::values;

/// A key and what it can hold.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Its dotted name.
    pub name: &'static str,
    /// What it holds.
    pub kind: Kind,
    /// Whether its value is never shown.
    pub secret: bool,
    /// What a reload does with it.
    pub reload: Reload,
}

/// What a key holds.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// A duration.
    Duration(Bounds<Duration>),
    /// A whole number.
    Number(Bounds<u64>),
    /// A number of bytes.
    Size(Bounds<u64>),
    /// A share of a whole.
    Share(Bounds<f64>),
    /// Yes or no.
    Flag,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// One value of some other form, described in words.
    Value(&'static str),
    /// Any number of values, described in words.
    List(&'static str),
}

/// The smallest and the largest value, and what goes wrong beyond them.
#[derive(Clone, Copy, Debug)]
pub struct Bounds<T> {
    /// The smallest value.
    pub least: T,
    /// The largest value.
    pub most: T,
    /// Why not less and not more.
    pub why: &'static str,
}

/// What a reload does with a changed value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reload {
    /// It is in force at once.
    Live,
    /// A part of it is; the rest needs a restart.
    Partly(&'static str),
    /// It is in force after a restart.
    Restart,
}

impl Key {
    const fn new(name: &'static str, kind: Kind) -> Self {
        Self { name, kind, secret: false, reload: Reload::Restart }
    }

    const fn secret(self) -> Self {
        Self { secret: true, ..self }
    }

    const fn live(self) -> Self {
        Self { reload: Reload::Live, ..self }
    }

    const fn partly(self, what: &'static str) -> Self {
        Self { reload: Reload::Partly(what), ..self }
    }

    /// The environment variable that sets it: `a.b` is `RELAY_A_B`.
    #[must_use]
    pub fn variable(&self) -> String {
        format!("RELAY_{}", self.name.replace('.', "_").to_ascii_uppercase())
    }
}

/// The key of that name.
pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

const fn ms(count: u64) -> Duration {
    Duration::from_millis(count)
}

const fn secs(count: u64) -> Duration {
    Duration::from_secs(count)
}

const MINUTE: Duration = secs(60);
const HOUR: Duration = secs(3_600);
const DAY: Duration = secs(86_400);
const YEAR: Duration = secs(365 * 86_400);

const fn duration(name: &'static str, least: Duration, most: Duration, why: &'static str) -> Key {
    Key::new(name, Kind::Duration(Bounds { least, most, why }))
}

const fn number(name: &'static str, least: u64, most: u64, why: &'static str) -> Key {
    Key::new(name, Kind::Number(Bounds { least, most, why }))
}

const fn size(name: &'static str, least: u64, most: u64, why: &'static str) -> Key {
    Key::new(name, Kind::Size(Bounds { least, most, why }))
}

const fn share(name: &'static str, most: f64, why: &'static str) -> Key {
    Key::new(name, Kind::Share(Bounds { least: 0.0, most, why }))
}

const fn flag(name: &'static str) -> Key {
    Key::new(name, Kind::Flag)
}

const fn one_of(name: &'static str, words: &'static [&'static str]) -> Key {
    Key::new(name, Kind::OneOf(words))
}

const fn value(name: &'static str, expected: &'static str) -> Key {
    Key::new(name, Kind::Value(expected))
}

const fn list(name: &'static str, expected: &'static str) -> Key {
    Key::new(name, Kind::List(expected))
}

const NETWORKS: &str = "networks such as 10.0.0.0/8";
const QUOTAS: &str = "quotas such as 10/s, 600/m, 1000/h, 5000/d, 20000/w or 100000/30d";
const TENANT_QUOTAS: &str = "quotas of single tenants, such as <name in logs>=10/s, or =none";
const LIFETIME: &str = "0s switches it off; answers older than a year are of no use";
const PLACE: &str = "a silent peer keeps its place as long";

/// Every key, in the order of the documentation.
pub const KEYS: &[Key] = &[
    value("listen", "an IP address and a port such as 0.0.0.0:9090 or [::]:9090"),
    number("server.max_connections", 1, 1_000_000, "each costs memory and an open file"),
    duration("server.header_timeout", ms(100), HOUR, PLACE),
    duration("server.idle_timeout", ms(100), DAY, PLACE),
    size("server.body_limit", 256, 64 << 20, "one observable takes some bytes; a body is held in memory")
        .live(),
    duration("server.body_timeout", ms(100), HOUR, PLACE).live(),
    number("server.max_in_flight", 1, 100_000, "each costs memory"),
    duration("server.shutdown_timeout", secs(0), HOUR, "service managers kill what takes longer to end"),
    duration("server.shutdown_delay", secs(0), HOUR, "service managers kill what takes longer to end").live(),
    value("server.tls.certificate", "the path of a PEM file with the certificate and those of its issuers")
        .partly("another file; whether HTTPS is spoken needs a restart"),
    value("server.tls.key", "the path of a PEM file with the certificate's private key")
        .partly("another file; whether HTTPS is spoken needs a restart"),
    duration("request.deadline", secs(1), secs(600), "CyberScan takes a while; nobody waits longer").live(),
    number("request.concurrency", 1, 1_024, "each is a call to CyberScan at once").live(),
    list("auth.audiences", "URLs such as https://relay.example.com").live(),
    list("auth.jwks_hosts", "host names such as visibility.amp.cisco.com, with a port or path if need be")
        .live(),
    flag("auth.require_exp").live(),
    duration("auth.revalidate", secs(1), DAY, "each check is a call; a revoked key works as long").live(),
    list("auth.trusted_proxies", NETWORKS).live(),
    list("cyberscan.hosts", "host names, *.domain or *").live(),
    duration("cyberscan.timeout", ms(100), secs(600), "nobody answers sooner; nobody waits longer").live(),
    number("cyberscan.retries", 0, 10, "each costs a call").live(),
    flag("cyberscan.private_addresses").live(),
    list("egress.allow_cidrs", NETWORKS),
    value("egress.proxy", "a URL such as http://proxy.example:3128").secret(),
    value("egress.extra_ca_file", "the path of a file with PEM certificates"),
    duration("egress.connect_timeout", ms(50), MINUTE, "nobody answers sooner; nobody waits longer"),
    one_of("ctim.tlp", &["white", "green", "amber", "red"]).live(),
    flag("ctim.ip_details_page").live(),
    one_of("log.format", &["json", "text"]),
    value(
        "log.level",
        "a level (error, warn, info, debug, trace or off), or directives such as info,hyper=debug",
    )
    .live(),
    flag("log.observables").live(),
    value("telemetry.otlp_endpoint", "a URL such as http://127.0.0.1:4318"),
    share("telemetry.otlp_sampling", 1.0, "it is a share"),
    value("admin.listen", "an IP address and a port such as 127.0.0.1:9091"),
    list("admin.hosts", "host names such as relay.ops.example, or *.ops.example, without a port").live(),
    value("admin.token", "a text of visible ASCII characters without blanks").secret().live(),
    list("redis.url", "URLs such as redis://user:password@redis.example:6379/0, or rediss://")
        .secret()
        .partly("user and password"),
    list("redis.encryption_key", "32 random bytes in hexadecimal").secret().live(),
    one_of("redis.mode", &["single", "sentinel", "cluster"]),
    value("redis.master_name", "the name Sentinel knows the master by"),
    value("redis.username", "a user's name; empty: as in redis.url").live(),
    value("redis.password", "any text; empty: as in redis.url").secret().live(),
    value("redis.database", "a number from 0 to 65535; empty: as in redis.url"),
    value("redis.sentinel.username", "a user's name; empty: as in redis.url").live(),
    value("redis.sentinel.password", "any text; empty: as in redis.url").secret().live(),
    value("redis.sentinel.tls", "true or false; empty: as in redis.url"),
    value("redis.ca_file", "the path of a file with PEM certificates"),
    value("redis.client_certificate", "the path of a PEM file with the certificate and those of its issuers"),
    value("redis.client_key", "the path of a PEM file with the certificate's private key"),
    value(
        "redis.key_prefix",
        "up to 64 visible ASCII characters, none of them a brace, a bracket, a quote, *, ?, ^ or \\, such as relay:",
    ),
    duration(
        "redis.timeout",
        ms(1),
        secs(10),
        "nothing answers sooner; requests wait as long for what is only a cache",
    )
    .live(),
    size("cache.memory", 64 << 10, 1 << 40, "one answer takes some KiB; no machine has more"),
    duration("cache.soft_timeout", secs(0), MINUTE, "an old answer is at hand").live(),
    duration("cache.fill_timeout", ms(100), secs(600), "nobody answers sooner; nobody waits longer").live(),
    share("cache.refresh_ahead", 0.9, "with more, every read would be a call").live(),
    duration("cache.fresh", secs(0), YEAR, LIFETIME).live(),
    duration("cache.stale_while_revalidate", secs(0), YEAR, LIFETIME).live(),
    duration("cache.stale_if_error", secs(0), YEAR, LIFETIME).live(),
    duration("cache.negative", secs(0), YEAR, LIFETIME).live(),
    duration("cache.domain.fresh", secs(0), YEAR, LIFETIME).live(),
    duration("cache.domain.stale_while_revalidate", secs(0), YEAR, LIFETIME).live(),
    duration("cache.domain.stale_if_error", secs(0), YEAR, LIFETIME).live(),
    duration("cache.domain.negative", secs(0), YEAR, LIFETIME).live(),
    duration("cache.host.fresh", secs(0), YEAR, LIFETIME).live(),
    duration("cache.host.stale_while_revalidate", secs(0), YEAR, LIFETIME).live(),
    duration("cache.host.stale_if_error", secs(0), YEAR, LIFETIME).live(),
    duration("cache.host.negative", secs(0), YEAR, LIFETIME).live(),
    duration("cache.vulnerabilities.fresh", secs(0), YEAR, LIFETIME).live(),
    duration("cache.vulnerabilities.stale_while_revalidate", secs(0), YEAR, LIFETIME).live(),
    duration("cache.vulnerabilities.stale_if_error", secs(0), YEAR, LIFETIME).live(),
    duration("cache.vulnerabilities.negative", secs(0), YEAR, LIFETIME).live(),
    list("limiter.tenant", QUOTAS).live(),
    list("limiter.tenants", TENANT_QUOTAS).live(),
    list("limiter.fleet", QUOTAS).live(),
    share("limiter.burst", 1.0, "it is a share").live(),
    flag("limiter.dry_run").live(),
    share("limiter.fallback_share", 1.0, "it is a share").live(),
    share("limiter.reserve", 1.0, "it is a share").live(),
    number("limiter.queue", 1, 1_000_000, "each costs memory").live(),
    number("limiter.concurrency", 1, 100_000, "each is a call to CyberScan at once"),
    flag("worker.enabled"),
    share("worker.budget", 1.0, "it is a share"),
    number("worker.concurrency", 1, 1_024, "each is a call to CyberScan at once"),
    number("worker.entries", 1, 1_000_000, "each costs memory"),
    duration(
        "worker.idle",
        secs(1),
        secs(30 * 86_400),
        "less forgets tenants between requests; their keys are kept as long",
    ),
];

/// What was expected: `expected <this>`.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Duration(Bounds { least, most, why }) => {
                let (least, most) = (values::shown(*least), values::shown(*most));
                write!(f, "a duration such as 500ms, 10s or 15m, from {least} to {most} ({why})")
            }
            Self::Number(Bounds { least, most, why }) => write!(f, "a number from {least} to {most} ({why})"),
            Self::Size(Bounds { least, most, why }) => {
                let (least, most) = (values::Bytes(*least), values::Bytes(*most));
                write!(f, "a size such as 64MiB, or a number of bytes, from {least} to {most} ({why})")
            }
            Self::Share(Bounds { least, most, why }) => write!(f, "a number from {least} to {most} ({why})"),
            Self::Flag => f.write_str("true or false"),
            Self::OneOf(words) => match words.split_last() {
                Some((last, rest)) if !rest.is_empty() => write!(f, "{} or {last}", rest.join(", ")),
                _ => f.write_str(&words.concat()),
            },
            Self::Value(expected) | Self::List(expected) => f.write_str(expected),
        }
    }
}

impl<T: PartialOrd> Bounds<T> {
    /// `value`, if it is within the bounds.
    pub(super) fn hold(&self, value: T) -> Option<T> {
        (self.least <= value && value <= self.most).then_some(value)
    }
}
