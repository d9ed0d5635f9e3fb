//! What is counted. It owns the names, the closed sets of labels and the registry; it must not know
//! why anything is counted. Every series exists from the start, so their number is constant whatever
//! clients send.

use std::{marker::PhantomData, ops::Deref, sync::Arc};

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
    core::{Collector, Metric},
    proto::MetricFamily,
};

/// A closed set of values of one label.
pub trait Label: Copy + 'static {
    /// Every value, in the order of [`Label::index`].
    const ALL: &'static [Self];

    /// Its place in [`Label::ALL`].
    fn index(self) -> usize;

    /// The value as it stands in logs and metrics.
    fn as_str(self) -> &'static str;
}

macro_rules! labels {
    ($($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident => $text:literal,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl Label for $name {
            const ALL: &'static [Self] = &[$(Self::$variant,)*];

            fn index(self) -> usize {
                self as usize
            }

            fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    )*};
}

labels! {
    /// Who is spoken to.
    Endpoint {
        /// `POST /observe/observables`
        Observe => "observe",
        /// `POST /refer/observables`
        Refer => "refer",
        /// `POST /health`
        Health => "health",
        /// Anything else.
        Other => "other",
    }
    /// What a request came to.
    Answered {
        /// An answer without an error.
        Whole => "ok",
        /// An answer, and errors beside it.
        Partial => "partial",
        /// Errors only.
        Failed => "error",
    }
    /// The `code` of an error item.
    ErrorCode {
        /// Who asks is not authorized.
        Authorization => "authorization error",
        /// The request is malformed.
        InvalidArgument => "invalid argument",
        /// `GET /watchdog` without its header.
        HealthCheck => "health check failed",
        /// No connection to CyberScan.
        Connection => "connection error",
        /// A certificate that is not accepted.
        Unknown => "unknown",
        /// A quota is used up, or the relay has enough to do.
        TooManyRequests => "too many requests",
        /// CyberScan is in trouble.
        Unavailable => "service unavailable",
        /// CyberScan was too slow.
        Timeout => "request timeout",
        /// CyberScan answered something odd.
        Unexpected => "unexpected response",
        /// A bug of ours.
        Internal => "internal error",
        /// A warning: the answer is old.
        Stale => "stale data",
        /// A warning: the answer is cut short.
        LeftOut => "too-many-messages-warning",
    }
    /// What came of verifying a token.
    Verdict {
        /// It is good.
        Good => "ok",
        /// There is none.
        MissingHeader => "missing_header",
        /// The header is not a bearer token.
        WrongScheme => "wrong_scheme",
        /// It is no JWT.
        Malformed => "malformed",
        /// It names no key issuer.
        MissingIssuer => "missing_issuer",
        /// Its key issuer is not allowed or silent.
        WrongIssuer => "wrong_issuer",
        /// Its key is not known.
        UnknownKey => "unknown_key",
        /// Its signature is wrong.
        WrongSignature => "wrong_signature",
        /// It has expired.
        Expired => "expired",
        /// It is not valid yet.
        NotYetValid => "not_yet_valid",
        /// It is meant for somebody else.
        WrongAudience => "wrong_audience",
        /// It names no key or host.
        MissingClaims => "missing_claims",
    }
    /// Where clients connect.
    Listener {
        /// For the platform.
        Public => "public",
        /// For operators.
        Admin => "admin",
    }
    /// Why a request, or the connection it would have come on, was refused before any route saw it.
    Refused {
        /// Its head is not HTTP, or could be read in two ways.
        Malformed => "malformed",
        /// HTTP, but neither 1.0 nor 1.1.
        Version => "version",
        /// Its head has too many bytes or fields.
        HeadTooLarge => "head_too_large",
        /// It has no path: `CONNECT`, `OPTIONS *`.
        NoPath => "no_path",
        /// Its head did not end in time.
        HeaderTimeout => "header_timeout",
        /// A new connection brought none in time.
        NoRequest => "no_request",
        /// A connection without a request gave its slot to a new one.
        ConnectionLimit => "connection_limit",
        /// TLS was spoken to a listener of plain HTTP.
        TlsToPlain => "tls_to_plain_http",
        /// No TLS came about.
        Handshake => "tls_handshake",
    }
    /// How a TLS handshake ended.
    Handshake {
        /// With a connection.
        Ok => "ok",
        /// The peer offered no version, cipher suite or protocol that is spoken here.
        Incompatible => "incompatible",
        /// The peer did not accept the certificate.
        Rejected => "rejected",
        /// What the peer sent is not TLS, or broken.
        Failed => "failed",
        /// The peer spoke plain HTTP.
        PlainHttp => "plain_http",
        /// It did not end in time.
        Timeout => "timeout",
        /// The peer left.
        Closed => "closed",
        /// The connection gave its slot to a new one, or the relay was ending.
        Evicted => "evicted",
    }
    /// Whether something worked.
    Success {
        /// It did.
        Ok => "ok",
        /// It did not.
        Failed => "error",
    }
    /// What is cached.
    Resource {
        /// A domain's record.
        Domain => "domain",
        /// An address's record.
        Host => "host",
        /// An address's vulnerabilities.
        Vulnerabilities => "vulnerabilities",
    }
    /// Where an answer was looked for.
    Tier {
        /// This process's memory.
        Memory => "memory",
        /// Redis, shared by all replicas.
        Redis => "redis",
        /// CyberScan itself.
        Upstream => "upstream",
    }
    /// What a look-up in a tier came to. Look-ups are the sum of all outcomes.
    Outcome {
        /// An answer within its freshness.
        Fresh => "fresh",
        /// An answer past its freshness that may still be served.
        Stale => "stale",
        /// "Not known to CyberScan".
        Negative => "negative",
        /// Nothing.
        Miss => "miss",
        /// The tier failed.
        Error => "error",
    }
    /// Why a value from Redis was not believed.
    Rejection {
        /// It is not in a form this version knows.
        Format => "format",
        /// It is larger than any value we write.
        Oversize => "oversize",
        /// It was sealed with a key we do not have, or not at all.
        Key => "key",
        /// It was altered, or belongs to another key.
        Sealed => "sealed",
        /// It does not decode.
        Corrupt => "corrupt",
        /// It says that it is from a time to come.
        Future => "future",
    }
    /// How a fill came to its value.
    Flight {
        /// It asked CyberScan.
        Leader => "leader",
        /// Another replica's value was there already.
        Adopted => "adopted",
        /// It waited for another replica.
        Follower => "follower",
    }
    /// What CyberScan is asked.
    UpstreamCall {
        /// An access token.
        Token => "token",
        /// A domain's record.
        Domain => "domain",
        /// An address's record.
        Host => "host",
        /// An address's vulnerabilities.
        Vulnerabilities => "vulnerabilities",
    }
    /// What CyberScan's answer was.
    UpstreamOutcome {
        /// An answer.
        Ok => "ok",
        /// "Not known" (404).
        NotFound => "not_found",
        /// Refused (401, 403).
        Unauthorized => "unauthorized",
        /// Too fast (429).
        Throttled => "throttled",
        /// In trouble (5xx).
        Unavailable => "unavailable",
        /// Something else.
        Unexpected => "unexpected",
        /// No connection.
        Unreachable => "unreachable",
        /// A certificate that is not accepted.
        Untrusted => "untrusted",
        /// None in time.
        Timeout => "timeout",
    }
    /// Whose quota.
    QuotaScope {
        /// A tenant's own.
        Tenant => "tenant",
        /// That of all tenants together.
        Fleet => "fleet",
    }
    /// How urgent a call is.
    Urgency {
        /// Someone waits.
        Interactive => "interactive",
        /// Nobody waits.
        Prefetch => "prefetch",
    }
    /// What the limiter says to a call.
    Decision {
        /// Go.
        Granted => "granted",
        /// Not now.
        Refused => "refused",
    }
    /// What would have become of a call that the quotas do not stop in a dry run.
    DryRun {
        /// It would have waited.
        Delayed => "delayed",
        /// It would have been refused.
        Refused => "refused",
    }
    /// The length of a quota's window.
    QuotaWindow {
        /// A second.
        Second => "second",
        /// A minute.
        Minute => "minute",
        /// An hour.
        Hour => "hour",
        /// A day.
        Day => "day",
        /// A week.
        Week => "week",
        /// A month.
        Month => "month",
    }
    /// How a host's circuit breaker stands.
    BreakerState {
        /// Calls go through.
        Closed => "closed",
        /// Calls fail at once.
        Open => "open",
        /// One call is let through.
        HalfOpen => "half_open",
    }
    /// What became of an answer that could be fetched ahead.
    Prefetch {
        /// It was due and this replica took it on.
        Claimed => "claimed",
        /// It was fetched.
        Refreshed => "refreshed",
        /// Somebody had fetched it already.
        Unneeded => "unneeded",
        /// It was served after it had been fetched ahead.
        Useful => "useful",
        /// It ended without having been served.
        Wasted => "wasted",
        /// The tenant's budget for prefetching is used up.
        OverBudget => "refused_budget",
        /// The limiter keeps the rest of the quota for who waits.
        Limited => "refused_limiter",
        /// The tenant's key is not at hand, or refused.
        NoCredentials => "refused_credentials",
        /// The host is left alone.
        Resting => "refused_breaker",
        /// CyberScan did not answer.
        Failed => "failed",
    }
    /// What Redis is used for.
    Operation {
        /// Reading values.
        Read => "read",
        /// Looking again and taking the lock.
        Claim => "claim",
        /// Writing a value.
        Store => "store",
        /// Giving a lock back.
        Release => "release",
        /// Taking calls from the fleet's quotas.
        Quota => "quota",
        /// Telling and hearing of changes.
        Events => "events",
        /// What was asked for lately and is due.
        Schedule => "schedule",
        /// Whether it is there.
        Probe => "probe",
    }
    /// What came of an operation.
    RedisOutcome {
        /// It worked.
        Ok => "ok",
        /// It took too long.
        Timeout => "timeout",
        /// Redis said no.
        Refused => "refused",
        /// There is no connection.
        Unreachable => "unreachable",
        /// It was not tried, because Redis has been failing.
        Skipped => "skipped",
    }
}

/// The values of all labels of a family.
pub trait Labels: Copy + 'static {
    /// How many combinations there are.
    const COUNT: usize;

    /// The place of this one among them.
    fn index(self) -> usize;

    /// Every combination, in the order of [`Labels::index`], as text.
    fn each() -> Vec<Vec<&'static str>>;
}

impl Labels for () {
    const COUNT: usize = 1;

    fn index(self) -> usize {
        0
    }

    fn each() -> Vec<Vec<&'static str>> {
        vec![Vec::new()]
    }
}

macro_rules! combinations {
    ($first:ident $(, $rest:ident)*) => {
        impl<$first: Label, $($rest: Label),*> Labels for ($first, $($rest,)*) {
            const COUNT: usize = $first::ALL.len() * <($($rest,)*)>::COUNT;

            fn index(self) -> usize {
                #[expect(non_snake_case, reason = "the variables are named after the type parameters")]
                let ($first, $($rest,)*) = self;
                $first.index() * <($($rest,)*)>::COUNT + ($($rest,)*).index()
            }

            fn each() -> Vec<Vec<&'static str>> {
                let rest = <($($rest,)*)>::each();
                let with = |first: &$first| {
                    let first = first.as_str();
                    rest.iter().map(move |rest| [vec![first], rest.clone()].concat()).collect::<Vec<_>>()
                };
                $first::ALL.iter().flat_map(with).collect()
            }
        }
    };
}

combinations!(A);
combinations!(A, B);
combinations!(A, B, C);

/// Members of a family, one for each combination of its labels.
pub struct Family<M, L> {
    members: Vec<M>,
    labels: PhantomData<L>,
}

/// Counters.
pub type Counters<L> = Family<IntCounter, L>;
/// Whole numbers that go up and down.
pub type Gauges<L> = Family<IntGauge, L>;
/// Numbers that go up and down.
pub type Ratios<L> = Family<Gauge, L>;
/// Distributions.
pub type Histograms<L> = Family<Histogram, L>;

impl<M, L: Labels> Family<M, L> {
    fn new(member: impl Fn(&[&str]) -> M) -> Self {
        Self { members: L::each().iter().map(|values| member(values)).collect(), labels: PhantomData }
    }

    fn of(&self, labels: L) -> Option<&M> {
        self.members.get(labels.index())
    }
}

impl<L: Labels> Family<IntCounter, L> {
    /// One more.
    pub fn inc(&self, labels: L) {
        self.inc_by(labels, 1);
    }

    /// So many more.
    pub fn inc_by(&self, labels: L, count: u64) {
        if let Some(counter) = self.of(labels) {
            counter.inc_by(count);
        }
    }

    /// How many so far.
    pub fn get(&self, labels: L) -> u64 {
        self.of(labels).map_or(0, IntCounter::get)
    }

    /// How many so far of all.
    pub fn sum(&self) -> u64 {
        self.members.iter().map(IntCounter::get).sum()
    }
}

impl<L: Labels> Family<IntGauge, L> {
    /// It is now this.
    pub fn set(&self, labels: L, value: i64) {
        if let Some(gauge) = self.of(labels) {
            gauge.set(value);
        }
    }

    /// It is so much more now, or less.
    pub fn add(&self, labels: L, difference: i64) {
        if let Some(gauge) = self.of(labels) {
            gauge.add(difference);
        }
    }

    /// What it is now.
    pub fn get(&self, labels: L) -> i64 {
        self.of(labels).map_or(0, IntGauge::get)
    }
}

impl<L: Labels> Family<Gauge, L> {
    /// It is now this.
    pub fn set(&self, labels: L, value: f64) {
        if let Some(gauge) = self.of(labels) {
            gauge.set(value);
        }
    }

    /// What it is now.
    pub fn get(&self, labels: L) -> f64 {
        self.of(labels).map_or(0.0, Gauge::get)
    }
}

impl<L: Labels> Family<Histogram, L> {
    /// One more, of so many seconds.
    pub fn observe(&self, labels: L, seconds: f64) {
        if let Some(histogram) = self.of(labels) {
            histogram.observe(seconds);
        }
    }

    /// How many, their sum, and how many up to each bound; the last has none.
    pub fn read(&self, labels: L) -> (u64, f64, Vec<(Option<f64>, u64)>) {
        let Some(histogram) = self.of(labels) else { return (0, 0.0, Vec::new()) };
        let metric = histogram.metric();
        let read = metric.get_histogram();
        let (count, sum) = (read.get_sample_count(), read.get_sample_sum());
        let bucket =
            |bucket: &prometheus::proto::Bucket| (Some(bucket.upper_bound()), bucket.cumulative_count());
        let buckets = read.get_bucket().iter().map(bucket).chain([(None, count)]);
        (count, sum, buckets.collect())
    }
}

/// All counters of the process; a cheap clone.
#[derive(Clone)]
pub struct Metrics(Arc<Families>);

macro_rules! families {
    ($($(#[$doc:meta])* $field:ident: $kind:ident<$labels:ty> = $make:ident($name:literal, [$($label:literal),*] $(, $buckets:expr)?);)*) => {
        /// Every family; what each counts stands in its documentation, which is also its help text.
        pub struct Families {
            registry: Registry,
            $($(#[$doc])* pub $field: $kind<$labels>,)*
        }

        impl Families {
            fn new() -> Self {
                let registry = Registry::new();
                $(let $field = $make(&registry, $name, &help(stringify!($(#[$doc])*)), &[$($label),*] $(, $buckets)?);)*
                Self { registry, $($field,)* }
            }
        }
    };
}

families! {
    /// Requests by endpoint and by what they came to.
    requests: Counters<(Endpoint, Answered)> = counters("relay_requests_total", ["endpoint", "outcome"]);
    /// Time from a request's head to the whole answer, by endpoint.
    request_duration: Histograms<(Endpoint,)> = histograms("relay_request_duration_seconds", ["endpoint"], LATENCIES);
    /// Requests under way.
    requests_in_flight: Gauges<()> = gauges("relay_requests_in_flight", []);
    /// Error items and warnings in answers, by their code.
    errors: Counters<(ErrorCode,)> = counters("relay_errors_total", ["code"]);
    /// Observables asked about, by endpoint.
    observables: Counters<(Endpoint,)> = counters("relay_observables_total", ["endpoint"]);
    /// Handlers that ended in a panic: bugs.
    panics: Counters<()> = counters("relay_panics_total", []);
    /// Open client connections.
    connections: Gauges<()> = gauges("relay_connections", []);
    /// Requests and connections refused before any route saw them, by listener and reason.
    refused: Counters<(Listener, Refused)> = counters("relay_refused_before_routing_total", ["listener", "reason"]);
    /// TLS handshakes of clients, by outcome.
    tls_handshakes: Counters<(Handshake,)> = counters("relay_tls_handshakes_total", ["outcome"]);
    /// When the certificate in use ends, in seconds since the Unix epoch; 0 without TLS.
    tls_certificate_expiry: Gauges<()> = gauges("relay_tls_certificate_expiry_timestamp_seconds", []);
    /// Tasks of the runtime that have not ended: connections, calls under way, and what runs all the time.
    tasks: Gauges<()> = gauges("relay_tasks", []);
    /// 1 while serving, 0 once the relay has begun to drain.
    ready: Gauges<()> = gauges("relay_ready", []);
    /// Tokens verified, by verdict.
    auth: Counters<(Verdict,)> = counters("relay_auth_total", ["outcome"]);
    /// Fetches of key sets, by outcome.
    jwks_refresh: Counters<(Success,)> = counters("relay_jwks_refresh_total", ["outcome"]);
    /// Age of the oldest key set in use, in seconds; 0 while there is none.
    jwks_age: Ratios<()> = ratios("relay_jwks_age_seconds", []);
    /// Look-ups by resource, tier and outcome.
    cache_lookups: Counters<(Resource, Tier, Outcome)> = counters("relay_cache_lookups_total", ["resource", "tier", "outcome"]);
    /// Fills by how they came to their value.
    cache_fills: Counters<(Flight,)> = counters("relay_cache_fills_total", ["role"]);
    /// Values from Redis that were not believed, by reason.
    cache_rejected: Counters<(Rejection,)> = counters("relay_cache_rejected_total", ["reason"]);
    /// Answers in memory.
    cache_entries: Gauges<()> = gauges("relay_cache_entries", []);
    /// Bytes of answers in memory.
    cache_bytes: Gauges<()> = gauges("relay_cache_bytes", []);
    /// Bytes of answers memory may hold.
    cache_capacity: Gauges<()> = gauges("relay_cache_capacity_bytes", []);
    /// Requests to CyberScan, by call and outcome.
    upstream: Counters<(UpstreamCall, UpstreamOutcome)> = counters("relay_upstream_requests_total", ["call", "outcome"]);
    /// Duration of requests to CyberScan, by call.
    upstream_duration: Histograms<(UpstreamCall,)> = histograms("relay_upstream_request_duration_seconds", ["call"], LATENCIES);
    /// Requests to CyberScan that repeat one which failed on its way.
    upstream_retries: Counters<()> = counters("relay_upstream_retries_total", []);
    /// What the limiter said to calls, by whose quota decided, urgency and outcome.
    limiter_decisions: Counters<(QuotaScope, Urgency, Decision)> = counters("relay_limiter_decisions_total", ["scope", "priority", "outcome"]);
    /// Calls that went through in a dry run although a quota had none left, by whose quota, urgency and what would have become of them.
    limiter_dry_run: Counters<(QuotaScope, Urgency, DryRun)> = counters("relay_limiter_dry_run_total", ["scope", "priority", "outcome"]);
    /// Time calls somebody waits for spent waiting for their turn.
    limiter_wait: Histograms<()> = histograms("relay_limiter_wait_seconds", [], LATENCIES);
    /// Share of a quota that is used: of the fleet's, and the largest among tenants.
    limiter_used: Ratios<(QuotaScope, QuotaWindow)> = ratios("relay_limiter_used_ratio", ["scope", "window"]);
    /// CyberScan hosts by the state of their circuit breaker.
    breakers: Gauges<(BreakerState,)> = gauges("relay_breaker_state", ["state"]);
    /// Answers fetched ahead, by what became of them.
    prefetch: Counters<(Prefetch,)> = counters("relay_prefetch_total", ["outcome"]);
    /// How long ago what is refreshed now was due.
    prefetch_lag: Histograms<()> = histograms("relay_prefetch_lag_seconds", [], LAGS);
    /// Answers on the schedule of this replica.
    prefetch_scheduled: Gauges<()> = gauges("relay_prefetch_scheduled", []);
    /// Redis operations by outcome.
    redis_operations: Counters<(Operation, RedisOutcome)> = counters("relay_redis_operations_total", ["operation", "outcome"]);
    /// Duration of Redis operations.
    redis_duration: Histograms<(Operation,)> = histograms("relay_redis_operation_duration_seconds", ["operation"], ROUND_TRIPS);
    /// 1 while Redis answers and refuses nothing, or where none is configured.
    redis_up: Gauges<()> = gauges("relay_redis_up", []);
    /// 1 while Redis answers and refuses what it is asked: full, not permitted, not the master.
    redis_refusing: Gauges<()> = gauges("relay_redis_refusing", []);
    /// Times the configuration was read again, by whether it was accepted.
    config_reloads: Counters<(Success,)> = counters("relay_config_reloads_total", ["outcome"]);
    /// 1 if the configuration that was read last is in force, 0 if it was refused and the one before goes on.
    config_reloaded: Gauges<()> = gauges("relay_config_last_reload_successful", []);
    /// When the configuration in force was read, in seconds since 1970.
    config_reloaded_at: Ratios<()> = ratios("relay_config_last_reload_success_timestamp_seconds", []);
}

/// Seconds: from an answer out of memory to the longest that is waited for.
const LATENCIES: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0];
const ROUND_TRIPS: &[f64] = &[0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1];
const LAGS: &[f64] = &[0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0];

/// The text of a field's documentation.
fn help(documentation: &str) -> String {
    let lines = documentation.lines().map(|line| {
        // The compiler hands it over as an attribute with a raw string, the way it stands here with slashes.
        let line = line.trim().trim_start_matches("///").trim_start_matches("#[doc =").trim_end_matches(']');
        line.trim().trim_start_matches('r').trim_matches('"').trim()
    });
    lines.collect::<Vec<_>>().join(" ")
}

fn counters<L: Labels>(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Counters<L> {
    let family = register(registry, IntCounterVec::new(Opts::new(name, help), labels));
    Family::new(|values| family.with_label_values(values))
}

fn gauges<L: Labels>(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Gauges<L> {
    let family = register(registry, IntGaugeVec::new(Opts::new(name, help), labels));
    Family::new(|values| family.with_label_values(values))
}

fn ratios<L: Labels>(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> Ratios<L> {
    let family = register(registry, GaugeVec::new(Opts::new(name, help), labels));
    Family::new(|values| family.with_label_values(values))
}

fn histograms<L: Labels>(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
    buckets: &[f64],
) -> Histograms<L> {
    let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
    let family = register(registry, HistogramVec::new(options, labels));
    Family::new(|values| family.with_label_values(values))
}

/// Registers a family whose name and labels are written in this file.
fn register<C: Collector + Clone + 'static>(registry: &Registry, family: prometheus::Result<C>) -> C {
    let family = family.expect("names and labels are literals of this file; a test makes them all");
    let registered = registry.register(Box::new(family.clone()));
    debug_assert!(registered.is_ok(), "registered twice");
    family
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Deref for Metrics {
    type Target = Families;

    fn deref(&self) -> &Families {
        &self.0
    }
}

impl Metrics {
    /// Fresh counters in a registry of their own, with those of the process and of the build.
    #[must_use]
    pub fn new() -> Self {
        let families = Families::new();
        let options = Opts::new("relay_build_info", "Always 1; which build this is.");
        let build = register(&families.registry, GaugeVec::new(options, &["version", "revision"]));
        build.with_label_values(&[env!("CARGO_PKG_VERSION"), revision()]).set(1.0);
        #[cfg(target_os = "linux")]
        {
            let process = prometheus::process_collector::ProcessCollector::for_self();
            let _ = families.registry.register(Box::new(process));
        }
        Self(Arc::new(families))
    }

    /// All families as they stand now.
    #[must_use]
    pub fn gather(&self) -> Vec<MetricFamily> {
        self.registry.gather()
    }

    /// All families as text, in the format Prometheus reads (version 0.0.4).
    #[must_use]
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::with_capacity(64 << 10);
        // Writing to memory cannot fail, and a family without a name is not registered.
        let _ = TextEncoder::new().encode(&self.gather(), &mut text);
        text
    }
}

/// What the binary was built from, if its build was told.
#[must_use]
pub fn revision() -> &'static str {
    option_env!("RELAY_REVISION").unwrap_or("unknown")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn series(metrics: &Metrics) -> usize {
        metrics.gather().iter().map(|family| family.get_metric().len()).sum()
    }

    #[test]
    fn every_series_is_there_from_the_start() {
        let metrics = Metrics::new();
        let before = series(&metrics);
        metrics.cache_lookups.inc((Resource::Domain, Tier::Redis, Outcome::Miss));
        metrics.redis_operations.inc((Operation::Read, RedisOutcome::Ok));
        metrics.prefetch.inc((Prefetch::Useful,));
        assert_eq!(metrics.cache_lookups.get((Resource::Domain, Tier::Redis, Outcome::Miss)), 1);
        assert_eq!(metrics.cache_lookups.sum(), 1);
        assert_eq!(series(&metrics), before);
        assert!(before > 200, "{before}");
    }

    #[test]
    fn each_combination_of_labels_has_its_place() {
        let mut places = HashSet::new();
        for resource in Resource::ALL {
            for tier in Tier::ALL {
                for outcome in Outcome::ALL {
                    let labels = (*resource, *tier, *outcome);
                    let texts = vec![resource.as_str(), tier.as_str(), outcome.as_str()];
                    assert_eq!(<(Resource, Tier, Outcome)>::each()[labels.index()], texts);
                    assert!(places.insert(labels.index()));
                }
            }
        }
        assert_eq!(places.len(), <(Resource, Tier, Outcome)>::COUNT);
    }

    #[test]
    fn every_family_says_what_it_is_and_is_named_as_prometheus_wants_it() {
        for family in Metrics::new().gather() {
            let (name, help) = (family.name(), family.help());
            assert!(help.len() > 10 && !help.contains(['"', '/', '#', '[']), "{name}: {help}");
            if name.starts_with("relay_") {
                let counts = family.get_field_type() == prometheus::proto::MetricType::COUNTER;
                assert_eq!(counts, name.ends_with("_total"), "{name}");
            }
        }
    }
}
