//! Settings: compiled-in defaults, a TOML file over them, the environment over both. It owns the
//! list of keys and how faults are told; what a value means belongs to the module that uses it.
//!
//! A configuration is read to its end before it is refused, so that all its faults are told at
//! once, each with its key, where it came from, what was found and what was expected.
//!
//! Whatever a part of the relay could not work with is a fault here: a value beyond the bounds of its key (`keys`), a
//! form that no reader takes (`values`), a file that cannot be used, values that contradict each other. What works and
//! merely looks odd is a warning.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod keys;
mod layer;
mod reader;
mod source;
#[cfg(test)]
mod tests;
mod values;

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fmt::{self, Display},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use figment::Figment;

pub use keys::{Bounds, KEYS, Key, Kind, Reload};
pub use source::Source;

use self::{layer::Layer, reader::Reader};
use crate::{
    admin, auth, cache,
    cache::policy::Policy,
    cyberscan, egress, enrich, http,
    limiter::{self, window::Window},
    redis_pool, telemetry, trace, worker,
};

/// The documented defaults are the defaults.
const DEFAULTS: &str = include_str!("../../config/default.toml");

/// Everything that can be set, read and checked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `listen`: the public listener.
    pub listen: SocketAddr,
    /// `auth.*`
    pub auth: auth::Config,
    /// `cyberscan.*`
    pub cyberscan: cyberscan::Config,
    /// `egress.*`
    pub egress: egress::Config,
    /// `request.*` and `ctim.*`
    pub enrich: enrich::Config,
    /// `server.*`
    pub http: http::Config,
    /// `cache.*`
    pub cache: cache::Config,
    /// `limiter.*`
    pub limiter: limiter::Config,
    /// `worker.*`
    pub worker: worker::Config,
    /// `redis.*`, if there is one.
    pub redis: Option<redis_pool::Config>,
    /// `admin.listen`: the admin listener, if there is one.
    pub admin_listen: Option<SocketAddr>,
    /// `admin.*`
    pub admin: admin::Config,
    /// `server.shutdown_delay`: how long the relay goes on taking requests after it has told that it drains.
    pub shutdown_delay: Duration,
    /// `log.*`
    pub log: telemetry::Config,
    /// `telemetry.*`, if there is a collector.
    pub traces: Option<trace::Config>,
    effective: Vec<Effective>,
    warnings: Vec<Fault>,
    /// Digests of the values, by key.
    digests: Digests,
}

/// By key a digest of its value, secrets included: what tells that a value has changed.
type Digests = BTreeMap<&'static str, [u8; 32]>;

/// One key, the value in force and where it was set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effective {
    /// The key.
    pub key: &'static str,
    /// The value as text; a secret shows only that it is set.
    pub value: String,
    /// The layer that set it.
    pub source: String,
}

/// What is wrong with a configuration: all of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Faults(pub Vec<Fault>);

/// One fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The key.
    pub key: String,
    /// The layer it came from.
    pub source: String,
    /// What is wrong, or what was expected.
    pub message: String,
}

impl Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the configuration has {} fault(s):", self.0.len())?;
        for Fault { key, source, message } in &self.0 {
            write!(f, "\n  {key} ({source}): {message}")?;
        }
        Ok(())
    }
}

/// The keys of [`Policy`], by kind of record.
/// What says nothing without a Redis.
const REDIS_ALONE: [&str; 6] = [
    "redis.mode",
    "redis.master_name",
    "redis.username",
    "redis.password",
    "redis.database",
    "redis.key_prefix",
];
/// What says nothing but with Sentinel.
const OF_SENTINELS: [&str; 3] = ["redis.sentinel.username", "redis.sentinel.password", "redis.sentinel.tls"];
/// What says nothing without TLS.
const OF_TLS: [&str; 3] = ["redis.ca_file", "redis.client_certificate", "redis.client_key"];
const DOMAIN: [&str; 4] = [
    "cache.domain.fresh",
    "cache.domain.stale_while_revalidate",
    "cache.domain.stale_if_error",
    "cache.domain.negative",
];
const HOST: [&str; 4] = [
    "cache.host.fresh",
    "cache.host.stale_while_revalidate",
    "cache.host.stale_if_error",
    "cache.host.negative",
];
const VULNERABILITIES: [&str; 4] = [
    "cache.vulnerabilities.fresh",
    "cache.vulnerabilities.stale_while_revalidate",
    "cache.vulnerabilities.stale_if_error",
    "cache.vulnerabilities.negative",
];

impl Settings {
    /// Reads the settings: the defaults, `file` over them, `environment` over both.
    ///
    /// # Errors
    /// All [`Faults`] of the configuration.
    pub fn load(
        file: Option<&Path>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self, Faults> {
        let mut faults = Vec::new();
        let environment = Layer::environment(environment, &mut faults);
        let file = file.map_or_else(|| Ok(Layer::default()), Layer::file);
        Self::of([Layer::toml("default", DEFAULTS), file, Ok(environment)], faults)
    }

    /// Reads `layers`, each laid over those before it.
    fn of(
        layers: impl IntoIterator<Item = Result<Layer, Fault>>,
        mut faults: Vec<Fault>,
    ) -> Result<Self, Faults> {
        let (mut figment, mut places) = (Figment::new(), Vec::new());
        for layer in layers {
            match layer {
                Ok(layer) => {
                    layer.report_unknown_keys(&mut faults);
                    places.push((layer.name.clone(), layer.places.clone()));
                    figment = figment.merge(layer);
                }
                Err(fault) => faults.push(fault),
            }
        }
        read(&mut Reader::new(figment, places, faults))
    }

    /// Every key that is set, in the order of the documentation.
    #[must_use]
    pub fn effective(&self) -> &[Effective] {
        &self.effective
    }

    /// What works but looks odd.
    #[must_use]
    pub fn warnings(&self) -> &[Fault] {
        &self.warnings
    }

    /// The keys whose values differ between these settings and `other`, in the order of the documentation.
    pub fn changed<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = &'static Key> + 'a {
        KEYS.iter().filter(|key| self.digests.get(key.name) != other.digests.get(key.name))
    }
}

fn read(from: &mut Reader) -> Result<Settings, Faults> {
    // Every value is read before the first is missed: this is what tells all faults at once.
    let listen = from.value("listen", values::listen);
    let max_connections = from.at_least_one("server.max_connections");
    let header_timeout = from.duration("server.header_timeout");
    let idle_timeout = from.duration("server.idle_timeout");
    let body_limit = from.size("server.body_limit");
    let body_timeout = from.duration("server.body_timeout");
    let shutdown_timeout = from.duration("server.shutdown_timeout");
    let shutdown_delay = from.duration("server.shutdown_delay");
    let max_in_flight = from.at_least_one("server.max_in_flight");
    let certificate = from.optional("server.tls.certificate", values::any::<PathBuf>);
    let key = from.optional("server.tls.key", values::any::<PathBuf>);
    let deadline = from.duration("request.deadline");
    let concurrency = from.at_least_one("request.concurrency");
    let spelled = RefCell::new(Vec::new());
    let audiences = from.list("auth.audiences", |text| {
        let audience = values::audience(text)?;
        // Who makes tokens may spell it as it stands here.
        let as_it_stands = text.trim_end_matches('/');
        if as_it_stands != audience {
            spelled.borrow_mut().push(as_it_stands.to_owned());
        }
        Ok(audience)
    });
    let spellings = spelled.into_inner();
    let jwks_hosts = from.list("auth.jwks_hosts", values::issuer);
    let require_exp = from.flag("auth.require_exp");
    let trusted_proxies = from.list("auth.trusted_proxies", values::network);
    let hosts = from.list("cyberscan.hosts", values::host_pattern);
    let timeout = from.duration("cyberscan.timeout");
    let retries = from.number("cyberscan.retries");
    let private_addresses = from.flag("cyberscan.private_addresses");
    let allow_cidrs = from.list("egress.allow_cidrs", values::network);
    let proxy = from.optional("egress.proxy", values::proxy);
    let extra_ca_file = from.optional("egress.extra_ca_file", values::any::<PathBuf>);
    let connect_timeout = from.duration("egress.connect_timeout");
    let tlp = from.value("ctim.tlp", values::any);
    let ip_details_page = from.flag("ctim.ip_details_page");
    let revalidate = from.duration("auth.revalidate");
    let memory = from.size("cache.memory");
    let soft_timeout = from.duration("cache.soft_timeout");
    let fill_timeout = from.duration("cache.fill_timeout");
    let ahead = from.share("cache.refresh_ahead");
    let domain = policy(from, DOMAIN, ahead);
    let host = policy(from, HOST, ahead);
    let vulnerabilities = policy(from, VULNERABILITIES, ahead);
    let urls =
        from.list("redis.url", |text| text.parse::<redis_pool::Url>().map_err(|why| Some(why.to_string())));
    let mode = from.value("redis.mode", values::any);
    let master_name = from.value("redis.master_name", values::master_name);
    let username = from.optional("redis.username", values::text);
    let password = from.optional("redis.password", values::text);
    let database = from.optional("redis.database", values::any::<u16>);
    let sentinel_user = from.optional("redis.sentinel.username", values::text);
    let sentinel_password = from.optional("redis.sentinel.password", values::text);
    let sentinel_tls = from.optional("redis.sentinel.tls", values::any::<bool>);
    let redis_ca = from.optional("redis.ca_file", values::any::<PathBuf>);
    let client_certificate = from.optional("redis.client_certificate", values::any::<PathBuf>);
    let client_key = from.optional("redis.client_key", values::any::<PathBuf>);
    let key_prefix = from.value("redis.key_prefix", values::key_prefix);
    let redis_timeout = from.duration("redis.timeout");
    let keys = from.list("redis.encryption_key", values::encryption_key);
    let tenant_quota = quotas(from, "limiter.tenant");
    let single_tenants = tenants(from, "limiter.tenants");
    let fleet_quota = quotas(from, "limiter.fleet");
    let burst = from.share("limiter.burst");
    let dry_run = from.flag("limiter.dry_run");
    let fallback_share = from.share("limiter.fallback_share");
    let reserve = from.share("limiter.reserve");
    let queue = from.at_least_one("limiter.queue");
    let tenant_concurrency = from.at_least_one("limiter.concurrency");
    let format = from.value("log.format", values::any);
    let level =
        from.value("log.level", |text| text.parse::<telemetry::Level>().map_err(|why| Some(why.to_string())));
    let log_observables = from.flag("log.observables");
    let otlp_endpoint = from.optional("telemetry.otlp_endpoint", values::any::<trace::Endpoint>);
    let otlp_sampling = from.share("telemetry.otlp_sampling");
    let worker_enabled = from.flag("worker.enabled");
    let worker_budget = from.share("worker.budget");
    let worker_concurrency = from.at_least_one("worker.concurrency");
    let worker_entries = from.at_least_one("worker.entries");
    let worker_idle = from.duration("worker.idle");
    let admin_listen = from.optional("admin.listen", values::listen);
    let admin_hosts = from.list("admin.hosts", values::any::<admin::AdminHost>);
    let admin_token = from.optional("admin.token", values::token);

    // What each may be, and both may not.
    if let (Some(listen), Some(Some(admin))) = (listen, admin_listen)
        && values::collide(listen, admin)
    {
        from.fault::<()>(
            "admin.listen",
            format!("{admin} is taken by listen, which is {listen}; expected another port"),
        );
    }
    for (key, empty) in [
        ("auth.jwks_hosts", jwks_hosts.as_ref().is_some_and(Vec::is_empty)),
        ("cyberscan.hosts", hosts.as_ref().is_some_and(Vec::is_empty)),
    ] {
        if empty {
            from.fault::<()>(key, "expected at least one: without any every request would be refused");
        }
    }
    if let (Some(urls), Some(mode)) = (&urls, mode)
        && let Err(why) = redis_pool::fit(urls, mode)
    {
        from.fault::<()>("redis.url", why);
    }
    if let (Some(Some(1..)), Some(redis_pool::Mode::Cluster)) = (database, mode) {
        from.fault::<()>("redis.database", "expected none: a cluster has no database but 0");
    }
    let client = match (client_certificate, client_key) {
        (Some(Some(certificate)), Some(Some(key))) => Some(Some((certificate, key))),
        (Some(None), Some(None)) => Some(None),
        (Some(Some(_)), Some(None)) => {
            from.fault("redis.client_key", "expected the key's file, because redis.client_certificate is set")
        }
        (Some(None), Some(Some(_))) => from.fault(
            "redis.client_certificate",
            "expected the certificate's file, because redis.client_key is set",
        ),
        (None, _) | (_, None) => None,
    };
    let files = redis_ca.zip(client).map(|(authorities, client)| redis_pool::Files { authorities, client });
    if let Some(Some(path)) = &extra_ca_file
        && let Err(why) = egress::tls::extra_roots(path)
    {
        from.fault::<()>(
            "egress.extra_ca_file",
            format!("expected a file with PEM certificates, found {path:?}: {why}"),
        );
    }
    // What is in them is for `serve`, `check` and a reload alone: a renewal that went wrong must not fail a health check
    // while the relay goes on with what it has.
    let tls = match (certificate, key) {
        (Some(Some(certificate)), Some(Some(key))) => Some(Some(http::tls::Config { certificate, key })),
        (Some(None), Some(None)) => Some(None),
        (Some(Some(_)), Some(None)) => {
            from.fault("server.tls.key", "expected the key's file, because server.tls.certificate is set")
        }
        (Some(None), Some(Some(_))) => from.fault(
            "server.tls.certificate",
            "expected the certificate's file, because server.tls.key is set",
        ),
        (None, _) | (_, None) => None,
    };
    if cfg!(not(feature = "otel")) && matches!(otlp_endpoint, Some(Some(_))) {
        from.fault::<()>("telemetry.otlp_endpoint", "this relay was built without the feature `otel`");
    }

    let settings = || {
        Some(Settings {
            listen: listen?,
            auth: auth::Config {
                audiences: audiences?,
                spellings,
                jwks_hosts: jwks_hosts?,
                require_exp: require_exp?,
                trusted_proxies: trusted_proxies?,
            },
            cyberscan: cyberscan::Config {
                hosts: hosts?.into_iter().collect(),
                timeout: timeout?,
                retries: u32::try_from(retries?).unwrap_or(u32::MAX),
                private_addresses: private_addresses?,
                revalidate: revalidate?,
            },
            egress: egress::Config {
                allow_cidrs: allow_cidrs?,
                proxy: proxy?,
                extra_ca_file: extra_ca_file?,
                // Below the time-out of a whole call, so that "no connection" is told from "too slow".
                connect_timeout: connect_timeout?.min(timeout?.mul_f64(0.8)),
            },
            enrich: enrich::Config {
                deadline: deadline?,
                concurrency: concurrency?,
                ip_details_page: ip_details_page?,
                private_addresses: private_addresses?,
                tlp: tlp?,
                rendered_memory: memory? / 4,
            },
            cache: cache::Config {
                memory: memory? / 4 * 3,
                domain: domain?,
                host: host?,
                vulnerabilities: vulnerabilities?,
                soft_timeout: soft_timeout?,
                fill_timeout: fill_timeout?,
                revalidate: revalidate?,
                encryption_keys: keys?,
            },
            limiter: limiter::Config {
                tenant: tenant_quota?,
                tenants: single_tenants?,
                fleet: fleet_quota?,
                burst: burst?,
                dry_run: dry_run?,
                fallback_share: fallback_share?,
                reserve: reserve?,
                queue: queue?.get(),
                concurrency: tenant_concurrency?.get(),
            },
            worker: worker::Config {
                enabled: worker_enabled?,
                budget: worker_budget?,
                concurrency: worker_concurrency?.get(),
                entries: worker_entries?.get(),
                idle: worker_idle?,
                refresh_ahead: ahead?,
            },
            redis: {
                let (urls, mode, timeout) = (urls?, mode?, redis_timeout?);
                let said = |user: Option<String>, password: Option<String>| {
                    let password = password.map(secrecy::SecretString::from);
                    (user.is_some() || password.is_some()).then_some(redis_pool::Login { user, password })
                };
                let config = redis_pool::Config {
                    mode,
                    timeout,
                    master_name: master_name?,
                    login: said(username?, password?),
                    database: database?,
                    sentinel_login: said(sentinel_user?, sentinel_password?),
                    sentinel_tls: sentinel_tls?,
                    files: files?,
                    key_prefix: key_prefix?,
                    urls,
                };
                (!config.urls.is_empty()).then_some(config)
            },
            http: http::Config {
                connections: http::server::Config {
                    max_connections: max_connections?,
                    header_timeout: header_timeout?,
                    idle_timeout: idle_timeout?,
                    shutdown_timeout: shutdown_timeout?,
                },
                tls: tls?,
                body_limit: usize::try_from(body_limit?).unwrap_or(usize::MAX),
                body_timeout: body_timeout?,
                max_in_flight: max_in_flight?.get(),
                log_observables: log_observables?,
            },
            admin_listen: admin_listen?,
            admin: admin::Config {
                hosts: admin_hosts?,
                log_observables: log_observables?,
                token: admin_token?,
            },
            shutdown_delay: shutdown_delay?,
            log: telemetry::Config { format: format?, level: level? },
            traces: {
                let sampling = otlp_sampling?;
                otlp_endpoint?.map(|endpoint| trace::Config { endpoint, sampling })
            },
            effective: Vec::new(),
            warnings: Vec::new(),
            digests: Digests::new(),
        })
    };
    match settings() {
        Some(settings) if from.faults.is_empty() => {
            let warnings = odd(&settings, from, connect_timeout.unwrap_or_default());
            let (effective, digests) =
                (std::mem::take(&mut from.effective), std::mem::take(&mut from.digests));
            Ok(Settings { effective, warnings, digests, ..settings })
        }
        _ => Err(Faults(std::mem::take(&mut from.faults))),
    }
}

/// How long one kind of record is good: its own key where that is set, else the general one.
fn policy(from: &mut Reader, own: [&'static str; 4], refresh_ahead: Option<f64>) -> Option<Policy> {
    const GENERAL: [&str; 4] =
        ["cache.fresh", "cache.stale_while_revalidate", "cache.stale_if_error", "cache.negative"];
    let mut keys = own.into_iter().zip(GENERAL);
    let mut next = || {
        let (own, general) = keys.next()?;
        let key = if from.is_set(own) { own } else { general };
        from.duration(key)
    };
    let (fresh, stale_while_revalidate, stale_if_error, negative) = (next(), next(), next(), next());
    Some(Policy {
        fresh: fresh?,
        stale_while_revalidate: stale_while_revalidate?,
        stale_if_error: stale_if_error?,
        negative: negative?,
        refresh_ahead: refresh_ahead?,
    })
}

/// Quotas, no two of them of one length: they are counted by their lengths.
fn quotas(from: &mut Reader, key: &'static str) -> Option<Vec<Window>> {
    let windows = from.list(key, |text| text.parse::<Window>().map_err(|why| Some(why.to_string())))?;
    match twice(&windows) {
        Some(length) => {
            from.fault(key, format!("expected one quota for each length of time, found two for {length}"))
        }
        None => Some(windows),
    }
}

/// A length of time that two windows have.
fn twice(windows: &[Window]) -> Option<String> {
    let again = |(place, window): (usize, &Window)| {
        windows.iter().skip(place + 1).any(|other| other.per == window.per).then_some(window.per)
    };
    windows.iter().enumerate().find_map(again).map(values::shown)
}

/// Quotas of single tenants.
fn tenants(from: &mut Reader, key: &'static str) -> Option<BTreeMap<String, Vec<Window>>> {
    let single = from
        .list(key, |text| text.parse::<limiter::window::OfTenant>().map_err(|why| Some(why.to_string())))?;
    let mut tenants: BTreeMap<String, Vec<Window>> = BTreeMap::new();
    for limiter::window::OfTenant { tenant, window } in single {
        tenants.entry(tenant).or_default().extend(window);
    }
    match tenants.iter().find_map(|(tenant, windows)| Some((tenant, twice(windows)?))) {
        Some((tenant, length)) => {
            let message =
                format!("expected one quota of {tenant} for each length of time, found two for {length}");
            from.fault(key, message)
        }
        None => Some(tenants),
    }
}

/// What works, and probably is not what was meant.
fn odd(settings: &Settings, from: &Reader, connect_timeout: Duration) -> Vec<Fault> {
    let mut odd = Vec::new();
    let mut say = |key: &'static str, message: String| {
        odd.push(Fault { key: key.to_owned(), source: from.source(key), message });
    };
    let (deadline, timeout) = (settings.enrich.deadline, settings.cyberscan.timeout);
    let shown = values::shown;
    if settings.auth.audiences.is_empty() {
        say(
            "auth.audiences",
            "is empty: the audience of tokens is derived from each request's Host header".to_owned(),
        );
    }
    if settings.auth.audiences.iter().any(|audience| audience.starts_with("http://")) {
        say(
            "auth.audiences",
            "has a URL that begins with http://; the platform calls https:// only".to_owned(),
        );
    }
    for (key, networks) in [
        ("auth.trusted_proxies", &settings.auth.trusted_proxies),
        ("egress.allow_cidrs", &settings.egress.allow_cidrs),
    ] {
        if networks.iter().any(|network| network.prefix_len() == 0) {
            say(key, "has a network that is every address".to_owned());
        }
    }
    if timeout > deadline {
        let (timeout, deadline) = (shown(timeout), shown(deadline));
        say(
            "cyberscan.timeout",
            format!("is {timeout}, but requests end after {deadline} (request.deadline)"),
        );
    }
    if settings.cache.fill_timeout < timeout {
        let (fill, timeout) = (shown(settings.cache.fill_timeout), shown(timeout));
        say(
            "cache.fill_timeout",
            format!("is {fill}, shorter than one call may take: {timeout} (cyberscan.timeout)"),
        );
    }
    if settings.cache.soft_timeout > deadline {
        let (soft, deadline) = (shown(settings.cache.soft_timeout), shown(deadline));
        say("cache.soft_timeout", format!("is {soft}, but requests end after {deadline} (request.deadline)"));
    }
    if connect_timeout > timeout {
        let (connect, timeout) = (shown(connect_timeout), shown(timeout));
        say(
            "egress.connect_timeout",
            format!("is {connect}, but a whole call ends after {timeout} (cyberscan.timeout)"),
        );
    }
    for (own, general, policy) in [
        (DOMAIN, "cache.stale_if_error", &settings.cache.domain),
        (HOST, "cache.stale_if_error", &settings.cache.host),
        (VULNERABILITIES, "cache.stale_if_error", &settings.cache.vulnerabilities),
    ] {
        let [_, _, own, _] = own;
        let key = if from.is_set(own) { own } else { general };
        let told = !policy.stale_if_error.is_zero() && policy.stale_if_error < policy.stale_while_revalidate;
        if told {
            say(key, "is shorter than stale_while_revalidate, and so without effect".to_owned());
        }
    }
    match &settings.redis {
        Some(redis) => {
            let encrypted =
                redis.urls.iter().any(redis_pool::Url::is_encrypted) || redis.sentinel_tls == Some(true);
            for (keys, why, unused) in [
                (&OF_SENTINELS, "redis.mode is not sentinel", redis.mode != redis_pool::Mode::Sentinel),
                (&OF_TLS, "redis.url is not rediss://", !encrypted),
            ] {
                for key in keys.iter().filter(|key| unused && !from.is_default(key)) {
                    say(key, format!("is without effect: {why}"));
                }
            }
        }
        None => {
            if !settings.cache.encryption_keys.is_empty() {
                say("redis.encryption_key", "is without effect: redis.url is not set".to_owned());
            }
            for key in REDIS_ALONE.iter().chain(&OF_SENTINELS).chain(&OF_TLS) {
                if !from.is_default(key) {
                    say(key, "is without effect: redis.url is not set".to_owned());
                }
            }
        }
    }
    if let Some(token) = &settings.admin.token {
        if settings.admin_listen.is_none() {
            say("admin.token", "is without effect: admin.listen is empty".to_owned());
        } else if secrecy::ExposeSecret::expose_secret(token).len() < 16 {
            say("admin.token", "is short enough to be guessed; `openssl rand -hex 32` makes one".to_owned());
        }
    }
    if settings.traces.as_ref().is_some_and(|traces| traces.sampling == 0.0) {
        say("telemetry.otlp_sampling", "is 0: no request is traced".to_owned());
    }
    odd.dedup();
    odd
}

/// The environment of this process.
#[expect(clippy::disallowed_methods, reason = "the environment is read here and nowhere else")]
#[must_use]
pub fn environment() -> Vec<(String, String)> {
    // A variable of somebody else's that is not UTF-8 is none of ours; one of ours is a fault of its own.
    let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
    std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect()
}
