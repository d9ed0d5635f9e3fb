//! The last stage: CyberScan over HTTPS. It owns paths, headers, what a status means and the limits
//! on bodies; it must not cache, wait its turn or repeat itself beyond one renewed access token.
//!
//! Source: the API as its users know it (`POST token`, `GET domain/…`, `GET ip/…`,
//! `GET vulnerabilities/ip/…` under `/api/v1/`).

use std::{
    collections::HashMap,
    future::Future,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use jiff::fmt::rfc2822;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use secrecy::SecretString;
use serde::{Deserialize, Serialize, de::IgnoredAny};
use tokio::time::{Instant, sleep};
use tokio_util::task::TaskTracker;

use super::{
    Admission, Answer, Call, CyberScan, DomainRecord, Error, HostRecord, Pace, Priority, Record,
    Vulnerabilities,
    latency::Latencies,
    model::{Malformed, object},
    token::{AccessToken, AccessTokens},
};
use crate::{
    chance::chance,
    clock::Clock,
    ctim::{DomainName, is_private},
    egress::{self, HostPatterns, Http, Reply, Transport},
    live::Live,
    metrics::{Decision, Label, Metrics, UpstreamCall, UpstreamOutcome},
    tenant::Tenant,
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
    /// `cyberscan.private_addresses`: whether addresses that are nobody's on the internet are looked up.
    pub private_addresses: bool,
    /// `auth.revalidate`: how long a key counts as accepted without asking again.
    pub revalidate: Duration,
}

/// Who we are, as CyberScan has always known relays of this family.
pub(crate) const USER_AGENT: HeaderValue =
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
    latencies: Latencies,
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
    /// What a good answer is, for the error where it is something else.
    expected: &'static str,
}

impl<A: Admission> Client<A> {
    /// A client that calls through `http` when `admission` lets it, and notes in `latencies` how long that takes; its token
    /// calls are tracked by `tasks`.
    #[must_use]
    pub fn new(
        config: Config,
        http: Http,
        admission: A,
        latencies: Latencies,
        clock: Clock,
        metrics: Metrics,
        tasks: TaskTracker,
    ) -> Self {
        let pages = config.hosts.with_domain("cyberscan.io");
        Self(Arc::new(Shared {
            http,
            admission,
            latencies,
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

    /// The answer about an address that CyberScan is not asked about, whoever wants to know: no internal address is
    /// told to a third party.
    fn unasked<T>(&self, ip: IpAddr) -> Option<Answer<T>> {
        let asked = self.0.config.get().private_addresses || !is_private(ip);
        (!asked).then(|| Answer { record: Record::Unknown, asked_at: self.0.clock.now(), stale: None })
    }

    /// Asks `GET /api/v1/<path>` with the tenant's token; a refused token is replaced once.
    async fn get<T>(
        &self,
        call: &Call,
        kind: UpstreamCall,
        path: String,
        expected: &'static str,
        parse: impl Fn(&[u8]) -> Result<T, Malformed>,
    ) -> Result<Answer<T>, Error> {
        let request = Request { kind, method: Method::GET, path, json: None, limit: BODY, expected };
        let (tenant, tokens) = (call.tenant.id(), &self.0.tokens);
        let fetch = || self.clone().fetch_token(call.clone());

        let token = within(call, tokens.get(tenant, fetch)).await?;
        let asked_at = self.0.clock.now();
        let mut outcome = self.send_with_retries(call, &request, &token, &parse).await;
        if matches!(outcome, Err(Error::Unauthorized)) {
            let token = within(call, tokens.instead_of(&token, tenant, fetch)).await?;
            outcome = self.send(call, &request, Some(&token), &parse).await;
        }
        Ok(Answer { record: outcome?, asked_at, stale: None })
    }

    /// Sends a request and, if it failed on its way or at a gateway, sends it again after a random pause:
    /// asking twice changes nothing at CyberScan.
    async fn send_with_retries<T>(
        &self,
        call: &Call,
        request: &Request,
        token: &AccessToken,
        parse: impl Fn(&[u8]) -> Result<T, Malformed>,
    ) -> Result<Record<T>, Error> {
        let mut repeated = 0;
        loop {
            let outcome = self.send(call, request, Some(token), &parse).await;
            let transient =
                matches!(outcome, Err(Error::Unreachable { .. } | Error::Unavailable { status: 502..=504 }));
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
        #[derive(Serialize)]
        struct Key<'a> {
            key: &'a str,
        }
        #[derive(Deserialize)]
        struct Token {
            access_token: String,
        }
        let unexpected = Error::Unexpected { expected: "an access token" };
        let key = Key { key: call.tenant.key().expose() };
        let request = Request {
            kind: UpstreamCall::Token,
            method: Method::POST,
            path: "/api/v1/token".to_owned(),
            json: Some(serde_json::to_vec(&key).map_err(|_| unexpected.clone())?.into()),
            limit: TOKEN_BODY,
            expected: "an access token",
        };
        // Others may wait for the token longer than the one who asked first.
        let deadline = Instant::now() + self.0.config.get().timeout;
        let call = Call { deadline, wanted_by: deadline, ..call };
        match self.send(&call, &request, None, object::<Token>).await? {
            Record::Known(token) => Ok(token.access_token.clone()),
            Record::Unknown => Err(unexpected),
        }
    }

    async fn send<T>(
        &self,
        call: &Call,
        request: &Request,
        token: Option<&AccessToken>,
        parse: impl Fn(&[u8]) -> Result<T, Malformed>,
    ) -> Result<Record<T>, Error> {
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
        let exchange = async {
            let reply = sending.await;
            let outcome = match &reply {
                Ok(reply) => read(reply, request.expected, self.0.clock, &parse),
                Err(error) => Err(self.not_answered(call, request, error, deadline - sent)),
            };
            (reply, outcome)
        };
        let exchange = trace::stage(Stage::CyberScan(request.kind), exchange, |(reply, outcome), facts| {
            facts.method(&request.method);
            if let Ok(reply) = reply {
                facts.status(reply.status);
            }
            match came_to(outcome) {
                UpstreamOutcome::Ok | UpstreamOutcome::NotFound => {}
                failure => facts.failed(failure.as_str()),
            }
        });
        let (reply, mut outcome) = exchange.await;
        self.note_latency(tenant.host(), &mut outcome, sent.elapsed(), deadline - sent);
        self.0.metrics.upstream.inc((request.kind, came_to(&outcome)));
        self.0.metrics.upstream_duration.observe((request.kind,), sent.elapsed().as_secs_f64());
        if let Ok(reply) = &reply {
            let pace = match reply.status {
                StatusCode::TOO_MANY_REQUESTS => {
                    Pace::TooFast { retry_after: retry_after(&reply.headers, self.0.clock) }
                }
                _ => Pace::Fine,
            };
            self.0.admission.answered(call, pace).await;
        }
        outcome
    }

    /// Notes how long an answer took. One that did not come says something about the host if it was given as long as
    /// answers usually take.
    fn note_latency<T>(
        &self,
        host: &egress::Host,
        outcome: &mut Result<Record<T>, Error>,
        took: Duration,
        allowed: Duration,
    ) {
        let latency = self.0.latencies.of(host);
        match outcome {
            Ok(_) => latency.answered(took),
            Err(Error::TimedOut { after }) => {
                let cut_short = allowed < self.0.config.get().timeout
                    && latency
                        .usual()
                        .or_else(|| latency.longest_answer())
                        .is_some_and(|usual| allowed < usual);
                latency.unanswered(allowed);
                if cut_short {
                    *outcome = Err(Error::TooLate { after: *after });
                }
            }
            Err(_) => {}
        }
    }

    /// Why there is no complete answer to `request`.
    fn not_answered(&self, call: &Call, request: &Request, error: &Transport, allowed: Duration) -> Error {
        match error {
            Transport::Refused | Transport::Unreachable => {
                Error::Unreachable { url: format!("https://{}{}", call.tenant.host(), request.path) }
            }
            Transport::Untrusted(reason) => Error::Untrusted { reason: reason.0.clone() },
            Transport::TimedOut => Error::TimedOut { after: allowed },
            Transport::Broken => Error::Unexpected { expected: "a complete answer" },
            Transport::TooLarge => Error::Unexpected { expected: "an answer of at most 2 MiB" },
        }
    }
}

/// What an answer says: a record, that there is none, or why it is neither.
///
/// "Not known" is believed only from CyberScan, which says it in JSON. A 404 page comes from something in front of it,
/// and a success that is no record does, too.
fn read<T>(
    reply: &Reply,
    expected: &'static str,
    clock: Clock,
    parse: impl Fn(&[u8]) -> Result<T, Malformed>,
) -> Result<Record<T>, Error> {
    let record = match reply.status {
        status if status.is_success() => parse(&reply.body).map(|record| Record::Known(Arc::new(record))),
        StatusCode::NOT_FOUND => object::<IgnoredMembers>(&reply.body).map(|_| Record::Unknown),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => return Err(Error::Unauthorized),
        StatusCode::TOO_MANY_REQUESTS => {
            let retry_after = retry_after(&reply.headers, clock).unwrap_or(RETRY_AFTER);
            return Err(Error::Throttled { retry_after });
        }
        status if status.is_server_error() => return Err(Error::Unavailable { status: status.as_u16() }),
        _ => Err(Malformed),
    };
    record.map_err(|Malformed| Error::Unexpected { expected })
}

/// A JSON object, whatever is in it.
type IgnoredMembers = HashMap<String, IgnoredAny>;

/// What a request came to, for the metrics.
fn came_to<T>(outcome: &Result<Record<T>, Error>) -> UpstreamOutcome {
    match outcome {
        Ok(Record::Known(_)) => UpstreamOutcome::Ok,
        Ok(Record::Unknown) => UpstreamOutcome::NotFound,
        Err(Error::Unreachable { .. }) => UpstreamOutcome::Unreachable,
        Err(Error::Untrusted { .. }) => UpstreamOutcome::Untrusted,
        Err(Error::Unauthorized) => UpstreamOutcome::Unauthorized,
        Err(Error::Throttled { .. } | Error::Limited { .. }) => UpstreamOutcome::Throttled,
        Err(Error::Unavailable { .. } | Error::Resting { .. }) => UpstreamOutcome::Unavailable,
        Err(Error::TimedOut { .. } | Error::TooLate { .. }) => UpstreamOutcome::Timeout,
        Err(Error::Unexpected { .. } | Error::Lost) => UpstreamOutcome::Unexpected,
    }
}

impl<A: Admission> CyberScan for Client<A> {
    async fn authenticate(&self, call: &Call) -> Result<Instant, Error> {
        let fetch = || self.clone().fetch_token(call.clone());
        let revalidate = self.0.config.get().revalidate;
        let age = call.since.map_or(revalidate, |since| revalidate.min(since.elapsed()));
        let token = self.0.tokens.get_younger_than(age, call.tenant.id(), fetch);
        Ok(within(call, token).await?.fetched())
    }

    async fn domain(&self, call: &Call, domain: &DomainName) -> Result<Answer<DomainRecord>, Error> {
        let parse = |body: &[u8]| DomainRecord::parse(body, &self.0.pages.get());
        self.get(call, UpstreamCall::Domain, path("domain", domain.as_str()), "a domain record", parse).await
    }

    async fn host(&self, call: &Call, ip: IpAddr) -> Result<Answer<HostRecord>, Error> {
        if let Some(answer) = self.unasked(ip) {
            return Ok(answer);
        }
        let parse = |body: &[u8]| HostRecord::parse(body, &self.0.pages.get());
        self.get(call, UpstreamCall::Host, path("ip", &ip.to_string()), "an address record", parse).await
    }

    async fn vulnerabilities(&self, call: &Call, ip: IpAddr) -> Result<Answer<Vulnerabilities>, Error> {
        if let Some(answer) = self.unasked(ip) {
            return Ok(answer);
        }
        let (kind, path) = (UpstreamCall::Vulnerabilities, path("vulnerabilities/ip", &ip.to_string()));
        self.get(call, kind, path, "a list of vulnerabilities", Vulnerabilities::parse).await
    }

    fn access_token(&self, tenant: &Tenant) -> Option<SecretString> {
        self.0.tokens.lend(tenant.id())
    }

    fn use_access_token(&self, tenant: &Tenant, token: &SecretString, given_out: Instant) {
        self.0.tokens.borrow(tenant.id(), token, given_out);
    }
}

/// `/api/v1/<resource>/<segment>`; whatever the segment is, it stays one segment.
pub(super) fn path(resource: &str, segment: &str) -> String {
    format!("/api/v1/{resource}/{}", utf8_percent_encode(segment, SEGMENT))
}

/// `future`, for as long as the caller waits.
async fn within<T>(call: &Call, future: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let after = call.deadline.saturating_duration_since(Instant::now());
    tokio::time::timeout_at(call.deadline, future).await.unwrap_or(Err(Error::TooLate { after }))
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
