//! What is counted and logged of each request. It owns the access line; nothing of a token, key or host is ever
//! in it, and observables only where `log.observables` says so.

use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicU64, Ordering},
};

use http::{HeaderMap, Request};
use tokio::time::Instant;
use tracing::info;
use warp::reply::Response as Reply;

use crate::{
    ctim::ErrorCode,
    cyberscan::Tally,
    metrics::{self, Answered, Endpoint, Label, Metrics},
    trace::{Span, Traces},
};

/// What a handler tells about its answer, in the extensions of the reply.
#[derive(Clone, Debug, Default)]
pub(super) struct Account {
    /// The codes of error items and warnings.
    pub(super) codes: Vec<ErrorCode>,
    /// There are findings, or that there are none is known.
    pub(super) data: bool,
    /// How many observables were asked about.
    pub(super) observables: usize,
    /// The observables themselves, if they may be logged.
    pub(super) asked: Option<String>,
    /// The tenant's name in logs.
    pub(super) tenant: Option<Arc<str>>,
    /// Where answers came from.
    pub(super) tally: Option<Arc<Tally>>,
}

/// A request under way.
pub(super) struct Entry {
    metrics: Metrics,
    endpoint: Endpoint,
    id: String,
    started: Instant,
    pub(super) span: Span,
}

impl Account {
    /// Leaves it with `reply`, for [`Entry::end`].
    pub(super) fn of(reply: &mut Reply) -> Option<&mut Self> {
        reply.extensions_mut().get_mut::<Self>()
    }

    fn answered(&self) -> Answered {
        let warning = |code: &ErrorCode| matches!(code, ErrorCode::Stale | ErrorCode::LeftOut);
        match (self.codes.iter().all(warning), self.data) {
            (true, _) => Answered::Whole,
            (false, true) => Answered::Partial,
            (false, false) => Answered::Failed,
        }
    }
}

impl Entry {
    pub(super) fn begin<B>(metrics: &Metrics, traces: &Traces, request: &Request<B>) -> Self {
        let endpoint = match request.uri().path() {
            "/observe/observables" => Endpoint::Observe,
            "/refer/observables" => Endpoint::Refer,
            "/health" => Endpoint::Health,
            _ => Endpoint::Other,
        };
        metrics.requests_in_flight.add((), 1);
        Self {
            metrics: metrics.clone(),
            endpoint,
            id: id(request.headers()),
            started: Instant::now(),
            span: traces.request(request, route),
        }
    }

    /// Counts and logs the request with what its handler told of `reply`.
    pub(super) fn end(self, reply: &mut Reply) {
        let status = reply.status();
        let account = reply.extensions_mut().remove::<Account>().unwrap_or_default();
        let answered = if status.is_success() { account.answered() } else { Answered::Failed };
        let took = self.started.elapsed().as_secs_f64();
        let metrics = &self.metrics;
        metrics.requests.inc((self.endpoint, answered));
        metrics.request_duration.observe((self.endpoint,), took);
        if account.observables > 0 {
            let count = u64::try_from(account.observables).unwrap_or(u64::MAX);
            metrics.observables.inc_by((self.endpoint,), count);
        }
        for code in &account.codes {
            metrics.errors.inc((label(*code),));
        }
        let tally = account.tally.unwrap_or_default();
        let count = |of: fn(&Tally) -> &std::sync::atomic::AtomicU32| of(&tally).load(Ordering::Relaxed);
        let asked = account.asked.as_deref();
        self.span.tell(|facts| {
            facts.id(&self.id);
            facts.status(status);
            facts.text("relay.outcome", answered.as_str());
            facts.number("relay.observables", account.observables);
            facts.number("relay.answers.memory", count(|tally| &tally.memory));
            facts.number("relay.answers.redis", count(|tally| &tally.redis));
            facts.number("relay.answers.upstream", count(|tally| &tally.upstream));
            facts.number("relay.answers.stale", count(|tally| &tally.stale));
            facts.number("relay.answers.failed", count(|tally| &tally.failed));
            if let (Answered::Failed, Some(code)) = (answered, account.codes.first()) {
                facts.failed(label(*code).as_str());
            }
        });
        // Probes of load balancers and containers are many and tell nothing, as long as they succeed.
        if self.endpoint == Endpoint::Other && status.is_success() {
            return;
        }
        let _current = self.span.enter();
        info!(
            target: "access",
            id = self.id,
            endpoint = self.endpoint.as_str(),
            tenant = account.tenant.as_deref(),
            status = status.as_u16(),
            outcome = answered.as_str(),
            ms = (took * 1e6).round() / 1e3,
            observables = account.observables,
            memory = count(|tally| &tally.memory),
            redis = count(|tally| &tally.redis),
            upstream = count(|tally| &tally.upstream),
            stale = count(|tally| &tally.stale),
            failed = count(|tally| &tally.failed),
            codes = (!account.codes.is_empty()).then(|| {
                let codes = account.codes.iter().map(|code| label(*code).as_str());
                codes.collect::<Vec<_>>().join(",")
            }),
            asked,
        );
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.metrics.requests_in_flight.add((), -1);
    }
}

/// How a class of errors is counted and logged.
fn label(code: ErrorCode) -> metrics::ErrorCode {
    match code {
        ErrorCode::Authorization => metrics::ErrorCode::Authorization,
        ErrorCode::InvalidArgument => metrics::ErrorCode::InvalidArgument,
        ErrorCode::HealthCheck => metrics::ErrorCode::HealthCheck,
        ErrorCode::Connection => metrics::ErrorCode::Connection,
        ErrorCode::Untrusted => metrics::ErrorCode::Unknown,
        ErrorCode::TooManyRequests => metrics::ErrorCode::TooManyRequests,
        ErrorCode::Unavailable => metrics::ErrorCode::Unavailable,
        ErrorCode::Timeout => metrics::ErrorCode::Timeout,
        ErrorCode::Unexpected => metrics::ErrorCode::Unexpected,
        ErrorCode::Internal => metrics::ErrorCode::Internal,
        ErrorCode::Stale => metrics::ErrorCode::Stale,
        ErrorCode::LeftOut => metrics::ErrorCode::LeftOut,
    }
}

/// The route that serves `path`.
fn route(path: &str) -> Option<&'static str> {
    let routes = ["/observe/observables", "/refer/observables", "/health", "/version", "/watchdog", "/"];
    routes.into_iter().find(|route| *route == path)
}

/// The request's id: that of the proxy in front, if it is a harmless one, or one of our own.
fn id(headers: &HeaderMap) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    static PROCESS: LazyLock<u32> = LazyLock::new(std::process::id);
    let harmless = |id: &&str| {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        (1..=64).contains(&id.len()) && id.bytes().all(fits)
    };
    let given = headers.get("x-request-id").and_then(|value| value.to_str().ok()).filter(harmless);
    given.map_or_else(|| format!("{:x}-{:x}", *PROCESS, NEXT.fetch_add(1, Ordering::Relaxed)), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_id_is_taken_only_if_it_is_harmless() {
        let given = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("x-request-id", value.parse().unwrap());
            id(&headers)
        };
        assert_eq!(given("f3a-9.B_7"), "f3a-9.B_7");
        for odd in ["", "a b", "\"}", "Bearer%20x", &"x".repeat(65)] {
            assert_ne!(given(odd), odd);
        }
        assert_ne!(id(&HeaderMap::new()), id(&HeaderMap::new()));
    }

    #[test]
    fn warnings_leave_an_answer_whole() {
        let account = |codes: &[ErrorCode], data| Account { codes: codes.into(), data, ..Account::default() };
        assert_eq!(account(&[ErrorCode::Stale], true).answered(), Answered::Whole);
        assert_eq!(account(&[ErrorCode::Stale, ErrorCode::Timeout], true).answered(), Answered::Partial);
        assert_eq!(account(&[ErrorCode::Timeout], false).answered(), Answered::Failed);
    }
}
