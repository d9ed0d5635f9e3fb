//! The last stage: CyberScan over HTTPS. It owns paths, headers, what a status means and the limits
//! on bodies; it must not cache, wait its turn or repeat itself beyond one renewed access token.
//!
//! Source: the API as its users know it (`POST token`, `GET domain/…`, `GET ip/…`,
//! `GET vulnerabilities/ip/…` under `/api/v1/`).

use std::{
    future::Future,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use jiff::{Timestamp, fmt::rfc2822};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tokio_util::task::TaskTracker;

use super::{
    Admission, Answer, Call, CyberScan, DomainRecord, Error, HostRecord, Pace, Priority, QuotaUse, Record,
    Vulnerabilities,
    model::{Malformed, object},
    token::{AccessToken, AccessTokens},
};
use crate::{
    chance::chance,
    clock::Clock,
    ctim::DomainName,
    egress::{self, HostPatterns, Http, Reply, Transport},
    live::Live,
    metrics::{Decision, Label, Metrics, UpstreamCall, UpstreamOutcome},
    trace::{self, Stage},
};

/// Settings `cyberscan.*`.
#[derive(Clone, Debug)]
pub struct Config {
    /// `cyberscan.hosts`: the hosts that may be asked.
    pub hosts: HostPatterns,
    /// `cyberscan.timeout`: how long one call may take, from the first byte out to the last one in.
    pub timeout: Duration,
    /// `cyberscan.retries`: how often a request that failed on its way is sent again at most.
    pub retries: u32,
    /// `auth.revalidate`: how long a key counts as accepted without asking again.
    pub revalidate: Duration,
}

/// Who we are, as CyberScan has always known relays of this family.
const USER_AGENT: HeaderValue =
    HeaderValue::from_static("SecureX Threat Response Integrations <tr-integrations-support@cisco.com>");
/// The most bytes of an answer, decoded.
const BODY: usize = 2 << 20;
/// The most bytes of a token answer.
const TOKEN_BODY: usize = 64 << 10;
/// What a 429 without `Retry-After` asks for.
const RETRY_AFTER: Duration = Duration::from_secs(30);
/// The longest `Retry-After` that is believed.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(24 * 3600);
/// What may stand unescaped in a path segment.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b':');

/// The share of all requests that may be repetitions, so that a host in trouble is not put into more.
const BUDGET: f64 = 0.1;
/// The longest pause before the first repetition; doubled for the next.
const BACK_OFF: Duration = Duration::from_millis(100);

/// The client; a cheap clone.
pub struct Client<A>(Arc<Shared<A>>);

impl<A> Clone for Client<A> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

struct Shared<A> {
    http: Http,
    admission: A,
    /// Repetitions that may be made; every request adds a tenth of one.
    budget: Mutex<f64>,
    tokens: AccessTokens,
    clock: Clock,
    config: Live<Config>,
    metrics: Metrics,
    /// Where links to CyberScan's own pages may lead: the allowed hosts and CyberScan itself.
    pages: Live<HostPatterns>,
}

/// One HTTP request, before it has a host and a token.
struct Request {
    kind: UpstreamCall,
    method: Method,
    path: String,
    json: Option<Bytes>,
    limit: usize,
}

impl<A: Admission> Client<A> {
    /// A client that calls through `http` when `admission` lets it; its token calls are tracked by `tasks`.
    #[must_use]
    pub fn new(
        config: Config,
        http: Http,
        admission: A,
        clock: Clock,
        metrics: Metrics,
        tasks: TaskTracker,
    ) -> Self {
        let pages = config.hosts.with_domain("cyberscan.io");
        Self(Arc::new(Shared {
            http,
            admission,
            budget: Mutex::new(1.0),
            tokens: AccessTokens::new(clock, tasks),
            clock,
            config: Live::new(config),
            metrics,
            pages: Live::new(pages),
        }))
    }

    /// Asks as `config` says from now on.
    pub fn reconfigure(&self, config: Config) {
        self.0.pages.set(config.hosts.with_domain("cyberscan.io"));
        self.0.config.set(config);
    }

    /// Asks `GET /api/v1/<path>` with the tenant's token; a refused token is replaced once.
    async fn get(
        &self,
        call: &Call,
        kind: UpstreamCall,
        path: String,
        expected: &'static str,
    ) -> Result<Fetched, Error> {
        let request = Request { kind, method: Method::GET, path, json: None, limit: BODY };
        let (tenant, tokens) = (call.tenant.id(), &self.0.tokens);
        let fetch = || self.clone().fetch_token(call.clone());

        let token = within(call, tokens.get(tenant, fetch)).await?;
        let asked_at = self.0.clock.now();
        let mut reply = self.send_patiently(call, &request, &token).await?;
        if refused(&reply) {
            let token = within(call, tokens.instead_of(&token, tenant, fetch)).await?;
            reply = self.send(call, &request, Some(&token)).await?;
        }
        let body = match judge(&reply, expected, self.0.clock)? {
            StatusCode::NOT_FOUND => None,
            _ => Some(reply.body),
        };
        Ok(Fetched { body, asked_at, expected })
    }

    /// Sends a request and, if it failed on its way or at a gateway, sends it again after a random pause:
    /// asking twice changes nothing at CyberScan.
    async fn send_patiently(
        &self,
        call: &Call,
        request: &Request,
        token: &AccessToken,
    ) -> Result<Reply, Error> {
        let mut repeated = 0;
        loop {
            let outcome = self.send(call, request, Some(token)).await;
            let transient = match &outcome {
                Ok(reply) => matches!(reply.status.as_u16(), 502..=504),
                Err(error) => matches!(error, Error::Unreachable { .. }),
            };
            if !transient || repeated == self.0.config.get().retries || call.priority == Priority::Prefetch {
                return outcome;
            }
            let pause = BACK_OFF.saturating_mul(1 << repeated).mul_f64(chance());
            if Instant::now() + pause >= call.deadline || !self.may_repeat() {
                return outcome;
            }
            sleep(pause).await;
            self.0.metrics.upstream_retries.inc(());
            repeated += 1;
        }
    }

    fn may_repeat(&self) -> bool {
        let mut budget = self.0.budget.lock().unwrap_or_else(PoisonError::into_inner);
        let may = *budget >= 1.0;
        if may {
            *budget -= 1.0;
        }
        may
    }

    /// Runs in a task of its own (see [`AccessTokens`]), hence with a deadline of its own.
    async fn fetch_token(self, call: Call) -> Result<String, Error> {
        const EXPECTED: &str = "an access token";
        #[derive(Serialize)]
        struct Key<'a> {
            key: &'a str,
        }
        #[derive(Deserialize)]
        struct Token {
            access_token: String,
        }
        let unexpected = Error::Unexpected { expected: EXPECTED };
        let key = Key { key: call.tenant.key().expose() };
        let request = Request {
            kind: UpstreamCall::Token,
            method: Method::POST,
            path: "/api/v1/token".to_owned(),
            json: Some(serde_json::to_vec(&key).map_err(|_| unexpected.clone())?.into()),
            limit: TOKEN_BODY,
        };
        // Others may wait for the token longer than the one who asked first.
        let call = Call { deadline: Instant::now() + self.0.config.get().timeout, ..call };
        let reply = self.send(&call, &request, None).await?;
        match judge(&reply, EXPECTED, self.0.clock)? {
            StatusCode::NOT_FOUND => Err(unexpected),
            _ => object::<Token>(&reply.body).map(|token| token.access_token).map_err(|Malformed| unexpected),
        }
    }

    async fn send(
        &self,
        call: &Call,
        request: &Request,
        token: Option<&AccessToken>,
    ) -> Result<Reply, Error> {
        let tenant = &call.tenant;
        let mut headers = HeaderMap::new();
        headers.insert(header::USER_AGENT, USER_AGENT);
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        if let Some(token) = token {
            headers.insert(header::AUTHORIZATION, token.header()?);
        }
        let turn = trace::stage(Stage::Turn, self.0.admission.admit(call), |outcome, facts| {
            if outcome.is_err() {
                facts.failed(Decision::Refused.as_str());
            }
        });
        let _permit = turn.await?;
        {
            let mut budget = self.0.budget.lock().unwrap_or_else(PoisonError::into_inner);
            *budget = (*budget + BUDGET).min(10.0);
        }
        let sent = Instant::now();
        let deadline = call.deadline.min(sent + self.0.config.get().timeout);
        let sending = self.0.http.send(egress::client::Call {
            method: request.method.clone(),
            host: tenant.host(),
            path: &request.path,
            headers,
            json: request.json.clone(),
            limit: request.limit,
            deadline,
        });
        let outcome = trace::stage(Stage::CyberScan(request.kind), sending, |outcome, facts| {
            facts.method(&request.method);
            if let Ok(reply) = outcome {
                facts.status(reply.status);
            }
            match came_to(outcome) {
                UpstreamOutcome::Ok | UpstreamOutcome::NotFound => {}
                failure => facts.failed(failure.as_str()),
            }
        });
        let outcome = outcome.await;
        self.0.metrics.upstream.inc((request.kind, came_to(&outcome)));
        self.0.metrics.upstream_duration.observe((request.kind,), sent.elapsed().as_secs_f64());
        if let Ok(reply) = &outcome {
            let pace = match reply.status {
                StatusCode::TOO_MANY_REQUESTS => {
                    Pace::TooFast { retry_after: retry_after(&reply.headers, self.0.clock) }
                }
                _ => Pace::Fine,
            };
            self.0.admission.answered(call, pace).await;
        }
        outcome.map_err(|error| match error {
            Transport::Refused | Transport::Unreachable => {
                Error::Unreachable { url: format!("https://{}{}", tenant.host(), request.path) }
            }
            Transport::Untrusted(reason) => Error::Untrusted { reason: reason.0 },
            Transport::TimedOut => Error::TimedOut { after: deadline.saturating_duration_since(sent) },
            Transport::Broken => Error::Unexpected { expected: "a complete answer" },
            Transport::TooLarge => Error::Unexpected { expected: "an answer of at most 2 MiB" },
        })
    }
}

/// What a request came to, for the metrics.
fn came_to(outcome: &Result<Reply, Transport>) -> UpstreamOutcome {
    match outcome {
        Ok(reply) => match reply.status.as_u16() {
            200..=299 => UpstreamOutcome::Ok,
            401 | 403 => UpstreamOutcome::Unauthorized,
            404 => UpstreamOutcome::NotFound,
            429 => UpstreamOutcome::Throttled,
            500.. => UpstreamOutcome::Unavailable,
            _ => UpstreamOutcome::Unexpected,
        },
        Err(Transport::Refused | Transport::Unreachable) => UpstreamOutcome::Unreachable,
        Err(Transport::Untrusted(_)) => UpstreamOutcome::Untrusted,
        Err(Transport::TimedOut) => UpstreamOutcome::Timeout,
        Err(Transport::Broken | Transport::TooLarge) => UpstreamOutcome::Unexpected,
    }
}

/// What a data call brought.
struct Fetched {
    /// `None`: CyberScan does not know the thing asked about.
    body: Option<Bytes>,
    asked_at: Timestamp,
    expected: &'static str,
}

impl Fetched {
    fn read<T>(self, parse: impl FnOnce(&[u8]) -> Result<T, Malformed>) -> Result<Answer<T>, Error> {
        let record = match self.body {
            None => Record::Unknown,
            Some(body) => Record::Known(Arc::new(
                parse(&body).map_err(|Malformed| Error::Unexpected { expected: self.expected })?,
            )),
        };
        Ok(Answer { record, asked_at: self.asked_at, stale: None })
    }
}

impl<A: Admission> CyberScan for Client<A> {
    async fn authenticate(&self, call: &Call) -> Result<Instant, Error> {
        let fetch = || self.clone().fetch_token(call.clone());
        let token = self.0.tokens.get_younger_than(self.0.config.get().revalidate, call.tenant.id(), fetch);
        Ok(within(call, token).await?.fetched())
    }

    async fn quotas(&self, call: &Call) -> Vec<QuotaUse> {
        self.0.admission.quotas(call).await
    }

    async fn domain(&self, call: &Call, domain: &DomainName) -> Result<Answer<DomainRecord>, Error> {
        let path = path("domain", domain.as_str());
        let fetched = self.get(call, UpstreamCall::Domain, path, "a domain record").await?;
        fetched.read(|body| DomainRecord::parse(body, &self.0.pages.get()))
    }

    async fn host(&self, call: &Call, ip: IpAddr) -> Result<Answer<HostRecord>, Error> {
        let path = path("ip", &ip.to_string());
        let fetched = self.get(call, UpstreamCall::Host, path, "an address record").await?;
        fetched.read(|body| HostRecord::parse(body, &self.0.pages.get()))
    }

    async fn vulnerabilities(&self, call: &Call, ip: IpAddr) -> Result<Answer<Vulnerabilities>, Error> {
        let path = path("vulnerabilities/ip", &ip.to_string());
        let fetched =
            self.get(call, UpstreamCall::Vulnerabilities, path, "a list of vulnerabilities").await?;
        fetched.read(Vulnerabilities::parse)
    }
}

/// `/api/v1/<resource>/<segment>`; whatever the segment is, it stays one segment.
pub(super) fn path(resource: &str, segment: &str) -> String {
    format!("/api/v1/{resource}/{}", utf8_percent_encode(segment, SEGMENT))
}

/// `future`, for as long as the caller waits.
async fn within<T>(call: &Call, future: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let after = call.deadline.saturating_duration_since(Instant::now());
    tokio::time::timeout_at(call.deadline, future).await.unwrap_or(Err(Error::TimedOut { after }))
}

fn refused(reply: &Reply) -> bool {
    matches!(reply.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

/// What a status means: success or 404 go on, everything else is an error.
fn judge(reply: &Reply, expected: &'static str, clock: Clock) -> Result<StatusCode, Error> {
    match reply.status {
        status if status.is_success() || status == StatusCode::NOT_FOUND => Ok(status),
        _ if refused(reply) => Err(Error::Unauthorized),
        StatusCode::TOO_MANY_REQUESTS => {
            Err(Error::Throttled { retry_after: retry_after(&reply.headers, clock).unwrap_or(RETRY_AFTER) })
        }
        status if status.is_server_error() => Err(Error::Unavailable { status: status.as_u16() }),
        _ => Err(Error::Unexpected { expected }),
    }
}

/// `Retry-After`, as seconds or as a date (RFC 9110 §10.2.3).
fn retry_after(headers: &HeaderMap, clock: Clock) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match text.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => {
            let at = rfc2822::parse(text).ok()?.timestamp();
            clock.until(at.as_duration().as_secs_f64(), LONGEST_RETRY_AFTER)
        }
    };
    Some(wait.min(LONGEST_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn retry_after_is_read_as_seconds_and_as_a_date() {
        let clock = Clock::system();
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::RETRY_AFTER, HeaderValue::from_str(text).unwrap());
            retry_after(&headers, clock)
        };
        assert_eq!(read("7"), Some(Duration::from_secs(7)));
        assert_eq!(read("99999999999"), Some(LONGEST_RETRY_AFTER));
        assert_eq!(read("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert_eq!(read("Fri, 31 Dec 2100 23:59:59 GMT"), Some(LONGEST_RETRY_AFTER));
        assert_eq!(read("soon"), None);
        assert_eq!(read("-1"), None);
    }

    proptest! {
        #[test]
        fn a_path_never_leaves_its_template(segment in "\\PC{1,40}|[./%?#\\\\\r\n\t:@a-z]{1,20}") {
            let path = path("domain", &segment);
            let rest = path.strip_prefix("/api/v1/domain/").unwrap();
            prop_assert!(!rest.is_empty() && !rest.contains(['/', '?', '#', '\\', '\r', '\n', ' ']));
        }
    }
}
