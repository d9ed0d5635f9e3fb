//! Settings: compiled-in defaults, a TOML file over them, the environment over both. It owns the
//! list of keys and how faults are told; what a value means belongs to the module that uses it.
//!
//! A configuration is read to its end before it is refused, so that all its faults are told at
//! once, each with its key, where it came from and what was expected.

#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
    net::SocketAddr,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use figment::{
    Figment, Metadata, Profile, Provider,
    providers::{Format, Toml},
    value::{Dict, Map, Num, Tag, Value},
};
use url::Url;

use crate::{
    admin, auth, cache, cache::policy::Policy, cyberscan, egress, enrich, http, limiter, redis_pool,
    telemetry, trace, worker,
};

/// The documented defaults are the defaults.
const DEFAULTS: &str = include_str!("../config/default.toml");

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
}

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

/// A key and what kind of thing it holds.
struct Key {
    name: &'static str,
    secret: bool,
}

const fn key(name: &'static str) -> Key {
    Key { name, secret: false }
}

const fn secret(name: &'static str) -> Key {
    Key { name, secret: true }
}

/// Every key there is.
const KEYS: &[Key] = &[
    key("listen"),
    key("server.max_connections"),
    key("server.header_timeout"),
    key("server.idle_timeout"),
    key("server.body_limit"),
    key("server.body_timeout"),
    key("server.max_in_flight"),
    key("server.shutdown_timeout"),
    key("server.shutdown_delay"),
    key("server.tls.certificate"),
    key("server.tls.key"),
    key("request.deadline"),
    key("request.concurrency"),
    key("auth.audiences"),
    key("auth.jwks_hosts"),
    key("auth.require_exp"),
    key("auth.revalidate"),
    key("auth.trusted_proxies"),
    key("cyberscan.hosts"),
    key("cyberscan.timeout"),
    key("cyberscan.retries"),
    key("cyberscan.private_addresses"),
    key("egress.allow_cidrs"),
    secret("egress.proxy"),
    key("egress.extra_ca_file"),
    key("egress.connect_timeout"),
    key("ctim.tlp"),
    key("ctim.ip_details_page"),
    key("log.format"),
    key("log.level"),
    key("log.observables"),
    key("telemetry.otlp_endpoint"),
    key("telemetry.otlp_sampling"),
    key("admin.listen"),
    secret("admin.token"),
    secret("redis.url"),
    secret("redis.encryption_key"),
    key("redis.mode"),
    key("redis.master_name"),
    key("redis.timeout"),
    key("cache.memory"),
    key("cache.soft_timeout"),
    key("cache.fill_timeout"),
    key("cache.refresh_ahead"),
    key("cache.fresh"),
    key("cache.stale_while_revalidate"),
    key("cache.stale_if_error"),
    key("cache.negative"),
    key("cache.domain.fresh"),
    key("cache.domain.stale_while_revalidate"),
    key("cache.domain.stale_if_error"),
    key("cache.domain.negative"),
    key("cache.host.fresh"),
    key("cache.host.stale_while_revalidate"),
    key("cache.host.stale_if_error"),
    key("cache.host.negative"),
    key("cache.vulnerabilities.fresh"),
    key("cache.vulnerabilities.stale_while_revalidate"),
    key("cache.vulnerabilities.stale_if_error"),
    key("cache.vulnerabilities.negative"),
    key("limiter.tenant"),
    key("limiter.fleet"),
    key("limiter.fallback_share"),
    key("limiter.reserve"),
    key("limiter.queue"),
    key("limiter.concurrency"),
    key("worker.enabled"),
    key("worker.budget"),
    key("worker.concurrency"),
    key("worker.entries"),
    key("worker.idle"),
];

/// The keys of [`Policy`], by kind of record.
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

impl Key {
    fn variable(&self) -> String {
        variable(self.name)
    }
}

/// `a.b` is `RELAY_A_B`.
fn variable(key: &str) -> String {
    format!("RELAY_{}", key.replace('.', "_").to_ascii_uppercase())
}

/// The name of the layer of environment variables.
const ENVIRONMENT: &str = "environment";

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
        let mut figment = Figment::new();
        for layer in layers {
            match layer {
                Ok(layer) => {
                    layer.report_unknown_keys(&mut faults);
                    figment = figment.merge(layer);
                }
                Err(fault) => faults.push(fault),
            }
        }
        let merged = figment.find_value("").unwrap_or_else(|_| Dict::new().into());
        read(&mut Reader { figment, merged, faults, effective: Vec::new() })
    }

    /// Every key that is set, in the order of the documentation.
    #[must_use]
    pub fn effective(&self) -> &[Effective] {
        &self.effective
    }
}

fn read(from: &mut Reader) -> Result<Settings, Faults> {
    // Every value is read before the first is missed: this is what tells all faults at once.
    let listen = from.value("listen", "an address and a port such as 0.0.0.0:9090");
    let max_connections = from.value("server.max_connections", COUNT);
    let header_timeout = from.duration("server.header_timeout");
    let idle_timeout = from.duration("server.idle_timeout");
    let body_limit = from.value("server.body_limit", SIZE);
    let body_timeout = from.duration("server.body_timeout");
    let shutdown_timeout = from.duration("server.shutdown_timeout");
    let shutdown_delay = from.duration("server.shutdown_delay");
    let max_in_flight = from.value::<NonZeroUsize>("server.max_in_flight", COUNT);
    let tls = from.tls();
    let deadline = from.duration("request.deadline");
    let concurrency = from.value("request.concurrency", COUNT);
    let audiences = from.list::<String>("auth.audiences", "URLs");
    let jwks_hosts = from.list("auth.jwks_hosts", "host names, with a port or path if need be");
    let require_exp = from.value("auth.require_exp", "true or false");
    let trusted_proxies = from.list("auth.trusted_proxies", NETWORKS);
    let hosts = from.list::<egress::host::HostPattern>("cyberscan.hosts", "host names, *.domain or *");
    let timeout = from.duration("cyberscan.timeout");
    let retries = from.value("cyberscan.retries", "a number");
    let private_addresses = from.value("cyberscan.private_addresses", "true or false");
    let allow_cidrs = from.list("egress.allow_cidrs", NETWORKS);
    let proxy = from.optional::<ProxyUrl>("egress.proxy", "a URL such as http://proxy.example:3128");
    let extra_ca_file = from.optional::<PathBuf>("egress.extra_ca_file", "the path of a file");
    let connect_timeout = from.duration("egress.connect_timeout");
    let tlp = from.value("ctim.tlp", "white, green, amber or red");
    let ip_details_page = from.value("ctim.ip_details_page", "true or false");
    let revalidate = from.duration("auth.revalidate");
    let memory = from.value("cache.memory", SIZE);
    let soft_timeout = from.duration("cache.soft_timeout");
    let fill_timeout = from.duration("cache.fill_timeout");
    let ahead = from.value("cache.refresh_ahead", "a number from 0 to 1");
    let domain = from.policy(DOMAIN, ahead.as_ref());
    let host = from.policy(HOST, ahead.as_ref());
    let vulnerabilities = from.policy(VULNERABILITIES, ahead.as_ref());
    let urls = from.list::<redis_pool::Url>("redis.url", "URLs such as redis://redis.example:6379");
    let mode = from.value("redis.mode", "single, sentinel or cluster");
    let master_name = from.value("redis.master_name", "the name Sentinel knows the master by");
    let redis_timeout = from.duration("redis.timeout");
    let keys = from.list::<EncryptionKey>("redis.encryption_key", "32 bytes in hexadecimal");
    let tenant_quota = from.list("limiter.tenant", WINDOWS);
    let fleet_quota = from.list("limiter.fleet", WINDOWS);
    let fallback_share = from.value("limiter.fallback_share", "a number from 0 to 1");
    let reserve = from.value("limiter.reserve", "a number from 0 to 1");
    let queue = from.value::<NonZeroUsize>("limiter.queue", COUNT);
    let tenant_concurrency = from.value::<NonZeroUsize>("limiter.concurrency", COUNT);
    let format = from.value("log.format", "json or text");
    let level = from.value("log.level", "a level such as info, or filter directives");
    let log_observables = from.value("log.observables", "true or false");
    let otlp_endpoint =
        from.optional::<trace::Endpoint>("telemetry.otlp_endpoint", "a URL such as http://127.0.0.1:4318");
    let otlp_sampling = from.value::<Share>("telemetry.otlp_sampling", "a number from 0 to 1");
    let worker_enabled = from.value("worker.enabled", "true or false");
    let worker_budget = from.value::<Share>("worker.budget", "a number from 0 to 1");
    let worker_concurrency = from.value::<NonZeroUsize>("worker.concurrency", COUNT);
    let worker_entries = from.value::<NonZeroUsize>("worker.entries", COUNT);
    let worker_idle = from.duration("worker.idle");
    let admin_listen = from.optional("admin.listen", "an address such as 127.0.0.1:9091");
    let admin_token = from.optional::<String>("admin.token", "a text");
    if deadline.is_some_and(|deadline| deadline < Duration::from_secs(1)) {
        from.fault::<()>("request.deadline", "expected at least 1s");
    }
    if cfg!(not(feature = "otel")) && matches!(otlp_endpoint, Some(Some(_))) {
        from.fault::<()>("telemetry.otlp_endpoint", "this relay was built without the feature `otel`");
    }

    let settings = || {
        Some(Settings {
            listen: listen?,
            auth: auth::Config {
                audiences: audiences?,
                jwks_hosts: jwks_hosts?,
                require_exp: require_exp?,
                trusted_proxies: trusted_proxies?,
            },
            cyberscan: cyberscan::Config {
                hosts: hosts?.into_iter().collect(),
                timeout: timeout?,
                retries: retries?,
                private_addresses: private_addresses?,
                revalidate: revalidate?,
            },
            egress: egress::Config {
                allow_cidrs: allow_cidrs?,
                proxy: proxy?.map(|ProxyUrl(url)| url),
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
                rendered_memory: memory.as_ref().map(|Size(bytes)| *bytes as u64 / 4)?,
            },
            cache: cache::Config {
                memory: memory.as_ref().map(|Size(bytes)| *bytes as u64 / 4 * 3)?,
                domain: domain?,
                host: host?,
                vulnerabilities: vulnerabilities?,
                soft_timeout: soft_timeout?,
                fill_timeout: fill_timeout?,
                revalidate: revalidate?,
                encryption_keys: keys?.into_iter().map(|EncryptionKey(key)| key).collect(),
            },
            limiter: limiter::Config {
                tenant: tenant_quota?,
                fleet: fleet_quota?,
                fallback_share: fallback_share.map(|Share(share)| share)?,
                reserve: reserve.map(|Share(share)| share)?,
                queue: queue?.get(),
                concurrency: tenant_concurrency?.get(),
            },
            worker: worker::Config {
                enabled: worker_enabled?,
                budget: worker_budget?.0,
                concurrency: worker_concurrency?.get(),
                entries: worker_entries?.get(),
                idle: worker_idle?,
                refresh_ahead: ahead.as_ref().map(|Share(share)| *share)?,
            },
            redis: {
                let (urls, mode, timeout) = (urls?, mode?, redis_timeout?);
                let master_name = master_name?;
                (!urls.is_empty()).then_some(redis_pool::Config { urls, mode, master_name, timeout })
            },
            http: http::Config {
                connections: http::server::Config {
                    max_connections: max_connections?,
                    header_timeout: header_timeout?,
                    idle_timeout: idle_timeout?,
                    shutdown_timeout: shutdown_timeout?,
                },
                tls: tls?,
                body_limit: body_limit.map(|Size(bytes)| bytes)?,
                body_timeout: body_timeout?,
                max_in_flight: max_in_flight?.get(),
                log_observables: log_observables?,
            },
            admin_listen: admin_listen?,
            admin: admin::Config { token: admin_token?.map(Into::into) },
            shutdown_delay: shutdown_delay?,
            log: telemetry::Config { format: format?, level: level? },
            traces: {
                let Share(sampling) = otlp_sampling?;
                otlp_endpoint?.map(|endpoint| trace::Config { endpoint, sampling })
            },
            effective: std::mem::take(&mut from.effective),
        })
    };
    match settings() {
        Some(settings) if from.faults.is_empty() => Ok(settings),
        _ => Err(Faults(std::mem::take(&mut from.faults))),
    }
}

const COUNT: &str = "a number above 0";
const SIZE: &str = "a size such as 64MiB, or a number of bytes";
const WINDOWS: &str = "quotas such as 10/s, 600/m, 1000/h or 5000/d";
const NETWORKS: &str = "networks such as 10.0.0.0/8";

/// Reads values and collects what is wrong with them.
struct Reader {
    figment: Figment,
    /// All layers in one. `figment` would merge them again for every key.
    merged: Value,
    faults: Vec<Fault>,
    effective: Vec<Effective>,
}

impl Reader {
    /// The value of `key`; `None` is a fault that has been noted.
    fn value<T: FromStr>(&mut self, key: &'static str, expected: &str) -> Option<T> {
        let value = self.optional(key, expected)?;
        if value.is_none() {
            return self.fault(key, format!("expected {expected}"));
        }
        value
    }

    /// As [`Reader::value`]; a key that is absent or empty is `Some(None)`.
    fn optional<T: FromStr>(&mut self, key: &'static str, expected: &str) -> Option<Option<T>> {
        let Some(value) = self.find(key) else {
            return Some(None);
        };
        let Some(text) = text(&value) else {
            return self.fault(key, format!("expected {expected}"));
        };
        self.note(key, &text);
        match text.trim() {
            "" => Some(None),
            text => match text.parse() {
                Ok(value) => Some(Some(value)),
                Err(_) => self.unfit(key, text, expected),
            },
        }
    }

    /// The files of HTTPS: both or none. What is in them is for `serve` and `check` alone: a renewal that went
    /// wrong must not fail a health check while the relay goes on with what it has.
    fn tls(&mut self) -> Option<Option<http::tls::Config>> {
        const CERTIFICATE: &str = "server.tls.certificate";
        const KEY: &str = "server.tls.key";
        const EXPECTED: &str = "the path of a PEM file";
        let (certificate, key) = (self.optional(CERTIFICATE, EXPECTED), self.optional(KEY, EXPECTED));
        match (certificate?, key?) {
            (None, None) => Some(None),
            (Some(certificate), Some(key)) => Some(Some(http::tls::Config { certificate, key })),
            (Some(_), None) => self.fault(KEY, format!("expected {EXPECTED}, because {CERTIFICATE} is set")),
            (None, Some(_)) => self.fault(CERTIFICATE, format!("expected {EXPECTED}, because {KEY} is set")),
        }
    }

    fn duration(&mut self, key: &'static str) -> Option<Duration> {
        self.value(key, "a duration such as 500ms, 10s or 15m").map(|Span(duration)| duration)
    }

    /// How long one kind of record is good: its own key where that is set, else the general one.
    fn policy(&mut self, own: [&'static str; 4], refresh_ahead: Option<&Share>) -> Option<Policy> {
        const GENERAL: [&str; 4] =
            ["cache.fresh", "cache.stale_while_revalidate", "cache.stale_if_error", "cache.negative"];
        let mut keys = own.into_iter().zip(GENERAL);
        let mut next = || {
            let (own, general) = keys.next()?;
            self.duration(if self.find(own).is_some() { own } else { general })
        };
        let (fresh, stale_while_revalidate, stale_if_error, negative) = (next(), next(), next(), next());
        Some(Policy {
            fresh: fresh?,
            stale_while_revalidate: stale_while_revalidate?,
            stale_if_error: stale_if_error?,
            negative: negative?,
            refresh_ahead: refresh_ahead?.0,
        })
    }

    /// The values of a list: a TOML list, or a text with commas.
    fn list<T: FromStr>(&mut self, key: &'static str, expected: &str) -> Option<Vec<T>> {
        let texts: Option<Vec<String>> = match self.find(key) {
            None => Some(Vec::new()),
            Some(Value::Array(_, items)) => items.iter().map(text).collect(),
            Some(value) => {
                text(&value).map(|text| text.split(',').map(|item| item.trim().to_owned()).collect())
            }
        };
        let Some(mut texts) = texts else {
            return self.fault(key, format!("expected {expected}"));
        };
        texts.retain(|text| !text.is_empty());
        self.note(key, &texts.join(","));
        let mut values = Some(Vec::new());
        for text in &texts {
            match text.parse() {
                Ok(value) => {
                    values = values.map(|mut values| {
                        values.push(value);
                        values
                    })
                }
                Err(_) => values = self.unfit(key, text, expected),
            }
        }
        values
    }

    fn find(&self, key: &str) -> Option<Value> {
        self.merged.find_ref(key).cloned()
    }

    fn source(&self, key: &str) -> String {
        let found = self.merged.find_ref(key).and_then(|value| self.figment.get_metadata(value.tag()));
        match found.map(|found| found.name.as_ref()) {
            None => "default".to_owned(),
            Some(ENVIRONMENT) => format!("environment variable {}", variable(key)),
            Some(layer) => layer.to_owned(),
        }
    }

    fn note(&mut self, key: &'static str, text: &str) {
        let value = if is_secret(key) && !text.trim().is_empty() { "(set)" } else { text.trim() };
        if !self.effective.iter().any(|noted| noted.key == key) {
            self.effective.push(Effective { key, value: value.to_owned(), source: self.source(key) });
        }
    }

    fn unfit<T>(&mut self, key: &'static str, found: &str, expected: &str) -> Option<T> {
        let found = if is_secret(key) { "something else".to_owned() } else { format!("{found:?}") };
        self.fault(key, format!("expected {expected}, found {found}"))
    }

    fn fault<T>(&mut self, key: &'static str, message: impl Into<String>) -> Option<T> {
        let fault = Fault { key: key.to_owned(), source: self.source(key), message: message.into() };
        if !self.faults.contains(&fault) {
            self.faults.push(fault);
        }
        None
    }
}

fn is_secret(name: &str) -> bool {
    KEYS.iter().any(|key| key.name == name && key.secret)
}

/// One source of values.
#[derive(Clone, Default)]
struct Layer {
    name: String,
    values: Dict,
}

impl Layer {
    fn toml(name: &str, text: &str) -> Result<Self, Fault> {
        let values = Toml::from_str::<Dict>(text).map_err(|error| {
            // Not the line itself, as the error's own text has it: there may be a secret in it.
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let (line, column) =
                (before.split('\n').count(), before.rsplit('\n').next().map_or(0, str::len) + 1);
            let message = error.message().trim().replace('\n', ", ");
            Fault {
                key: "(file)".to_owned(),
                source: name.to_owned(),
                message: format!("line {line}, column {column}: {message}"),
            }
        })?;
        Ok(Self { name: name.to_owned(), values })
    }

    fn file(path: &Path) -> Result<Self, Fault> {
        let name = format!("file {}", path.display());
        let text = std::fs::read_to_string(path).map_err(|error| Fault {
            key: "(file)".to_owned(),
            source: name.clone(),
            message: error.to_string(),
        })?;
        Self::toml(&name, &text)
    }

    /// The variables that begin with `RELAY_`. What none of them can mean is a fault, too.
    fn environment(variables: impl IntoIterator<Item = (String, String)>, faults: &mut Vec<Fault>) -> Self {
        let mut flat: BTreeMap<&'static str, (String, String)> = BTreeMap::new();
        for (variable, value) in variables {
            if !variable.starts_with("RELAY_") || variable == "RELAY_CONFIG" {
                continue;
            }
            let source = format!("environment variable {variable}");
            let plain = KEYS.iter().find(|key| key.variable() == variable);
            let from_file = || KEYS.iter().find(|key| key.secret && variable == key.variable() + "_FILE");
            let (key, value) = match (plain, from_file()) {
                (Some(key), _) => (key, Ok(value)),
                (None, Some(key)) => (key, std::fs::read_to_string(value.trim())),
                (None, None) => {
                    let names = KEYS.iter().map(Key::variable);
                    let message = unknown(&variable, names);
                    faults.push(Fault { key: variable, source: ENVIRONMENT.to_owned(), message });
                    continue;
                }
            };
            let mut fault = |message: String| {
                faults.push(Fault { key: key.name.to_owned(), source: source.clone(), message });
            };
            match value {
                Ok(_) if flat.contains_key(key.name) => {
                    fault(format!("set twice: {} and as a file", key.variable()))
                }
                Ok(value) => {
                    flat.insert(key.name, (value.trim().to_owned(), source));
                }
                Err(error) => fault(format!("the file cannot be read: {error}")),
            }
        }
        let mut values = Dict::new();
        for (name, (value, _)) in flat {
            insert(&mut values, name, value);
        }
        Self { name: ENVIRONMENT.to_owned(), values }
    }

    fn report_unknown_keys(&self, faults: &mut Vec<Fault>) {
        let mut names = Vec::new();
        flatten("", &self.values, &mut names);
        for name in names {
            if !KEYS.iter().any(|key| key.name == name) {
                let message = unknown(&name, KEYS.iter().map(|key| key.name.to_owned()));
                faults.push(Fault { key: name, source: self.name.clone(), message });
            }
        }
    }
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Profile::Default.collect(self.values.clone()))
    }
}

/// Puts `text` at the dotted place `name`.
fn insert(values: &mut Dict, name: &str, text: String) {
    match name.split_once('.') {
        None => {
            values.insert(name.to_owned(), text.into());
        }
        Some((table, rest)) => {
            let table =
                values.entry(table.to_owned()).or_insert_with(|| Value::Dict(Tag::Default, Dict::new()));
            if let Value::Dict(_, table) = table {
                insert(table, rest, text);
            }
        }
    }
}

/// The dotted names of all values in `values`.
fn flatten(prefix: &str, values: &Dict, names: &mut Vec<String>) {
    for (name, value) in values {
        let name = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        match value {
            Value::Dict(_, table) => flatten(&name, table, names),
            _ => names.push(name),
        }
    }
}

fn unknown(name: &str, known: impl Iterator<Item = String>) -> String {
    const FAR: usize = 4;
    let near = known.filter(|known| known.len().abs_diff(name.len()) <= FAR);
    let closest = near.map(|known| (strsim::damerau_levenshtein(name, &known), known)).min();
    match closest {
        Some((distance, known)) if distance <= FAR => format!("there is no such key; did you mean {known}?"),
        _ => "there is no such key".to_owned(),
    }
}

/// A scalar as text: `12`, `true` and `"12"` are the same to whoever reads a file or a variable.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(_, text) => Some(text.clone()),
        Value::Bool(_, value) => Some(value.to_string()),
        Value::Num(_, Num::F64(number)) => Some(number.to_string()),
        Value::Num(_, number) => number
            .to_i128()
            .map(|number| number.to_string())
            .or_else(|| number.to_u128().map(|n| n.to_string())),
        _ => None,
    }
}

/// `10s`, `1h 30m`.
struct Span(Duration);

impl FromStr for Span {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let duration: jiff::SignedDuration = text.parse().map_err(|_| ())?;
        Duration::try_from(duration).map(Self).map_err(|_| ())
    }
}

/// `64MiB`, `1048576`.
struct Size(usize);

impl FromStr for Size {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = match text.get(digits.len()..).map(str::trim) {
            Some("" | "B") => 1,
            Some("KiB") => 1 << 10,
            Some("MiB") => 1 << 20,
            Some("GiB") => 1 << 30,
            _ => return Err(()),
        };
        let number: usize = digits.parse().map_err(|_| ())?;
        number.checked_mul(unit).filter(|bytes| *bytes > 0).map(Self).ok_or(())
    }
}

/// A number from 0 to 1.
struct Share(f64);

impl FromStr for Share {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        text.parse().ok().filter(|share| (0.0..=1.0).contains(share)).map(Self).ok_or(())
    }
}

/// 64 hexadecimal digits.
struct EncryptionKey([u8; 32]);

impl FromStr for EncryptionKey {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(());
        }
        let half = |part: Option<&str>| u128::from_str_radix(part.unwrap_or_default(), 16).map_err(|_| ());
        let (high, low) = (half(text.get(..32))?, half(text.get(32..))?);
        let mut key = [0; 32];
        key.iter_mut()
            .zip([high.to_be_bytes(), low.to_be_bytes()].concat())
            .for_each(|(to, from)| *to = from);
        Ok(Self(key))
    }
}

/// An http or https URL with a host.
struct ProxyUrl(Url);

impl FromStr for ProxyUrl {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let url = Url::parse(text).map_err(|_| ())?;
        let fits = matches!(url.scheme(), "http" | "https") && url.has_host();
        if fits { Ok(Self(url)) } else { Err(()) }
    }
}

/// The environment of this process.
#[expect(clippy::disallowed_methods, reason = "the environment is read here and nowhere else")]
#[must_use]
pub fn environment() -> Vec<(String, String)> {
    std::env::vars().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(file: &str, environment: &[(&str, &str)]) -> Result<Settings, Faults> {
        let path = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(path.path(), file).unwrap();
        let environment = environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        Settings::load(Some(path.path()), environment)
    }

    #[test]
    fn the_documented_defaults_are_the_defaults() {
        let settings = Settings::load(None, []).unwrap();
        assert_eq!(settings.listen.to_string(), "0.0.0.0:9090");
        assert_eq!(settings.enrich.deadline, Duration::from_secs(20));
        assert_eq!(settings.http.body_limit, 1 << 20);
        assert_eq!(settings.auth.jwks_hosts.len(), 3);
        assert!(settings.cyberscan.hosts.allow(&"api.cyberscan.io".parse().unwrap()));
        assert!(settings.effective().iter().all(|key| key.source == "default"));
    }

    #[test]
    fn the_environment_is_laid_over_the_file_and_the_file_over_the_defaults() {
        let file = "listen = \"127.0.0.1:1\"\n[request]\ndeadline = \"7s\"\nconcurrency = 3\n";
        let environment = [
            ("RELAY_LISTEN", "127.0.0.1:2"),
            ("RELAY_CYBERSCAN_HOSTS", "a.example, b.example"),
            ("RELAY_AUTH_REQUIRE_EXP", "true"),
            ("PATH", "/bin"),
        ];
        let settings = load(file, &environment).unwrap();
        assert_eq!(settings.listen.port(), 2);
        assert_eq!(settings.enrich.deadline, Duration::from_secs(7));
        assert_eq!(settings.enrich.concurrency.get(), 3);
        assert!(settings.auth.require_exp);
        assert!(settings.cyberscan.hosts.allow(&"b.example".parse().unwrap()));
        let source =
            |key| settings.effective().iter().find(|e| e.key == key).map(|e| e.source.clone()).unwrap();
        assert_eq!(source("listen"), "environment variable RELAY_LISTEN");
        assert!(source("request.deadline").starts_with("file "));
        assert_eq!(source("log.level"), "default");
    }

    #[test]
    fn all_faults_are_told_at_once_with_key_source_and_what_was_expected() {
        let file =
            "lisen = \"x\"\n[request]\ndeadline = \"soon\"\nconcurrency = 0\n[server]\nbody_limit = [1]\n";
        let environment = [
            ("RELAY_CTIM_TLP", "purple"),
            ("RELAY_EGRESS_ALLOW_CIDRS", "10.0.0.0/8,nonsense"),
            ("RELAY_LOG_LEVLE", "info"),
        ];
        let Faults(faults) = load(file, &environment).unwrap_err();
        let told: Vec<(&str, bool, &str)> = faults
            .iter()
            .map(|f| (f.key.as_str(), f.source.starts_with("environment"), f.message.as_str()))
            .collect();
        assert_eq!(
            told,
            [
                ("RELAY_LOG_LEVLE", true, "there is no such key; did you mean RELAY_LOG_LEVEL?"),
                ("lisen", false, "there is no such key; did you mean listen?"),
                ("server.body_limit", false, "expected a size such as 64MiB, or a number of bytes"),
                ("request.deadline", false, "expected a duration such as 500ms, 10s or 15m, found \"soon\""),
                ("request.concurrency", false, "expected a number above 0, found \"0\""),
                ("egress.allow_cidrs", true, "expected networks such as 10.0.0.0/8, found \"nonsense\""),
                ("ctim.tlp", true, "expected white, green, amber or red, found \"purple\""),
            ]
        );
    }

    #[test]
    fn a_file_that_is_no_toml_is_a_fault_and_so_is_one_that_is_not_there() {
        let Faults(faults) = load("[auth]\nlisten = ", &[]).unwrap_err();
        assert_eq!(faults.len(), 1);
        assert!(faults[0].message.starts_with("line 2, column 10: "), "{}", faults[0].message);
        let missing = Settings::load(Some(Path::new("/nonexistent/relay.toml")), []).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/relay.toml"));
    }

    #[test]
    fn a_secret_shows_neither_in_the_effective_settings_nor_in_a_fault() {
        let settings = load("", &[("RELAY_EGRESS_PROXY", "http://user:s3cret@proxy.example")]).unwrap();
        assert!(settings.egress.proxy.is_some());
        assert!(!format!("{:?}", settings.effective()).contains("s3cret"));
        let faults = load("", &[("RELAY_EGRESS_PROXY", "s3cret")]).unwrap_err();
        assert!(!faults.to_string().contains("s3cret"), "{faults}");
        // Quotes that were forgotten make a file that is no TOML.
        for file in ["[admin]\ntoken = s3cret", "admin.token = 's3cret", "admin.token = 5s3cret\nlisten = 1"]
        {
            let faults = load(file, &[]).unwrap_err();
            assert!(!faults.to_string().contains("s3cret"), "{faults}");
        }
    }

    #[test]
    fn secrets_can_come_from_files_but_not_twice() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "http://proxy.example:3128\n").unwrap();
        let path = file.path().to_str().unwrap();
        let settings = load("", &[("RELAY_EGRESS_PROXY_FILE", path)]).unwrap();
        assert_eq!(settings.egress.proxy.unwrap().port(), Some(3128));
        let twice = [("RELAY_EGRESS_PROXY_FILE", path), ("RELAY_EGRESS_PROXY", "http://other.example")];
        assert!(load("", &twice).unwrap_err().to_string().contains("set twice"));
    }
}
