//! The public listener: routes, and what HTTP adds to a question and its answer. It must not know
//! how tokens are verified or where findings come from.
//!
//! Every answer of a relay route is HTTP 200 with `data`, `errors` or both, whatever happens:
//! the platform turns anything else into an opaque failure. Faults of HTTP itself keep their 4xx.

mod access;
mod body;
mod bulkhead;
mod error_reply;
pub(crate) mod framing;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod health;
mod observables;
mod observe;
mod plain;
mod refer;
mod refusals;
pub mod server;
pub mod tls;

use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    panic::AssertUnwindSafe,
    pin::pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt, Stream};
use http::{HeaderMap, Method, Request, StatusCode};
use hyper::{body::Incoming, service::Service};
use hyper_util::service::TowerToHyperService;
use tracing::error;
use warp::{Buf, Filter, Rejection, filters::BoxedFilter, reply::Response as Reply};

use crate::{
    auth::{Authenticator, Authorized, Credentials},
    clock::Clock,
    ctim::{ErrorItem, Observable},
    cyberscan::{CyberScan, Preload, Quotas, Tally},
    enrich::Enricher,
    live::Live,
    metrics::{Label, Metrics},
    trace::{self, Stage, Traces},
};
use access::{Account, Entry};
use body::Limits;
use bulkhead::{Bulkhead, Place, TenantPlace};
use server::Peer;

/// Settings `server.*`.
#[derive(Clone, Debug)]
pub struct Config {
    /// The connections.
    pub connections: server::Config,
    /// `server.tls.*`: HTTPS instead of plain HTTP, if it is set.
    pub tls: Option<tls::Config>,
    /// `server.body_limit`: the most bytes of a request body.
    pub body_limit: usize,
    /// `server.body_timeout`: how long a body may take to arrive.
    pub body_timeout: Duration,
    /// `server.max_in_flight`: requests of relay routes under way at once, three quarters of
    /// them of one tenant; more are refused at once.
    pub max_in_flight: usize,
    /// `log.observables`: whether the access log says which observables were asked about.
    pub log_observables: bool,
}

/// Who asked about what.
struct Asked {
    observables: Vec<Observable>,
    tenant: Option<Arc<str>>,
}

/// What the handlers work with; a cheap clone.
pub struct Relay<P> {
    authenticator: Authenticator,
    enricher: Enricher<P>,
    quotas: Arc<dyn Quotas>,
    live: Live<Changing>,
    clock: Clock,
    bulkhead: Bulkhead,
    /// Room for those who wait for an issuer's keys: they take none from whoever can be answered.
    waiting: Bulkhead,
    metrics: Metrics,
}

/// What of the settings may change.
struct Changing {
    limits: Limits,
    /// `log.observables`: whether observables may be logged.
    log_observables: bool,
}

impl Changing {
    fn of(config: &Config) -> Self {
        let limits = Limits { bytes: config.body_limit, time: config.body_timeout };
        Self { limits, log_observables: config.log_observables }
    }
}

impl<P> Clone for Relay<P> {
    fn clone(&self) -> Self {
        Self {
            authenticator: self.authenticator.clone(),
            enricher: self.enricher.clone(),
            quotas: Arc::clone(&self.quotas),
            live: self.live.clone(),
            clock: self.clock,
            bulkhead: self.bulkhead.clone(),
            waiting: self.waiting.clone(),
            metrics: self.metrics.clone(),
        }
    }
}

impl<P: CyberScan + Preload> Relay<P> {
    /// The relay behind the routes.
    #[must_use]
    pub fn new(
        authenticator: Authenticator,
        enricher: Enricher<P>,
        quotas: impl Quotas,
        clock: Clock,
        config: &Config,
        metrics: Metrics,
    ) -> Self {
        let (bulkhead, waiting) = (Bulkhead::new(config.max_in_flight), Bulkhead::new(config.max_in_flight));
        let live = Live::new(Changing::of(config));
        let quotas = Arc::new(quotas);
        Self { authenticator, enricher, quotas, live, clock, bulkhead, waiting, metrics }
    }

    /// Of `config`, takes what can change while it serves.
    pub fn reconfigure(&self, config: &Config) {
        self.live.set(Changing::of(config));
    }

    /// Adds to the account of `reply` what was asked and where answers came from.
    fn account(&self, reply: &mut Reply, asked: &Asked, tally: Option<Arc<Tally>>) {
        if let Some(account) = Account::of(reply) {
            account.observables = asked.observables.len();
            account.tenant.clone_from(&asked.tenant);
            account.tally = tally;
            account.asked = self.live.get().log_observables.then(|| {
                let asked = asked.observables.iter().map(|observable| observable.subject().to_string());
                asked.collect::<Vec<_>>().join(",")
            });
        }
    }

    /// A place among the requests under way.
    fn place(&self) -> Result<Place, ErrorItem> {
        self.bulkhead.take().ok_or_else(error_reply::busy)
    }

    /// Who asks, and a place among the requests under way. Who has to wait for an issuer's keys waits elsewhere, and gets
    /// a place when they have come.
    async fn enter(&self, headers: &HeaderMap, peer: Option<Peer>) -> Result<(Authorized, Place), ErrorItem> {
        let place = self.place()?;
        let mut authorizing = pin!(self.authorize(headers, peer));
        if let Poll::Ready(authorized) =
            poll_fn(|context| Poll::Ready(authorizing.as_mut().poll(context))).await
        {
            return Ok((authorized?, place));
        }
        drop(place);
        let waiting = self.waiting.take().ok_or_else(error_reply::busy)?;
        let authorized = authorizing.await?;
        drop(waiting);
        Ok((authorized, self.place()?))
    }

    async fn authorize(&self, headers: &HeaderMap, peer: Option<Peer>) -> Result<Authorized, ErrorItem> {
        let credentials = Credentials {
            headers,
            peer: peer.map(|peer| peer.address.ip()),
            tls: peer.is_some_and(|peer| peer.tls),
        };
        let verifying = self.authenticator.authorize(credentials);
        let authorized = trace::stage(Stage::Token, verifying, |outcome, facts| {
            if let Err(error) = outcome {
                facts.failed(error.verdict().as_str());
            }
        });
        Ok(authorized.await?)
    }

    /// Who asks and what: a request that is not authorized never has its body read. The place becomes one of the
    /// tenant's before that, so that bodies which come slowly leave other tenants room; who has no tenant to be
    /// asked about keeps none.
    async fn admit(
        &self,
        headers: &HeaderMap,
        peer: Option<Peer>,
        body: impl Stream<Item = Result<impl Buf, warp::Error>>,
    ) -> Result<(Authorized, Option<TenantPlace>, Bytes), ErrorItem> {
        let (authorized, place) = self.enter(headers, peer).await?;
        let place = match &authorized.tenant {
            Ok(tenant) => Some(place.of(tenant.id()).ok_or_else(error_reply::busy)?),
            Err(_) => None,
        };
        let reading = body::read(headers, body, self.live.get().limits);
        Ok((authorized, place, trace::stage(Stage::Body, reading, |_, _| {}).await?))
    }
}

/// The whole service: the routes, behind what would break them, with a net below them.
pub fn service<P: CyberScan + Preload>(
    relay: &Relay<P>,
    traces: Traces,
) -> impl Service<Request<Incoming>, Response = Reply, Error = Infallible, Future: Send> + Clone + use<P> {
    let routes = TowerToHyperService::new(warp::service(routes(relay)));
    let metrics = relay.metrics.clone();
    hyper::service::service_fn(move |request: Request<Incoming>| {
        let metrics = &metrics;
        // Targets without a path (`CONNECT host:443`, `OPTIONS *`) panic some of warp's path filters.
        let has_path = request.uri().path().starts_with('/');
        let answer = |request| has_path.then(|| catching_panics(routes.call(request), metrics.clone()));
        let (method, allow) = (StatusCode::METHOD_NOT_ALLOWED, Some("GET, POST, OPTIONS"));
        let entry = Entry::begin(metrics, &traces, &request);
        let answer = answer(request);
        async move {
            let mut reply = match answer {
                Some(answer) => entry.span.around(answer).await?,
                None => error_reply::http_error(method, allow),
            };
            entry.end(&mut reply);
            Ok(reply)
        }
    })
}

/// A panic of a handler is one error reply; the connection and all others go on.
async fn catching_panics(
    answer: impl Future<Output = Result<Reply, Infallible>>,
    metrics: Metrics,
) -> Result<Reply, Infallible> {
    AssertUnwindSafe(answer).catch_unwind().await.unwrap_or_else(|_| {
        metrics.panics.inc(());
        error!("a handler panicked");
        Ok(error_reply::internal_error())
    })
}

/// The routes of the public listener.
fn routes<P: CyberScan + Preload>(
    relay: &Relay<P>,
) -> impl Filter<Extract = (Reply,), Error = Infallible> + Clone + use<P> {
    let with_relay = {
        let relay = Arc::new(relay.clone());
        warp::any().map(move || Arc::clone(&relay))
    };
    let health = warp::path!("health")
        .and(on(&[Method::POST], "POST, OPTIONS"))
        .and(with_relay.clone())
        .and(warp::header::headers_cloned())
        .and(warp::ext::optional())
        .then(health::health)
        .boxed();
    let observe = warp::path!("observe" / "observables")
        .and(on(&[Method::POST], "POST, OPTIONS"))
        .and(with_relay.clone())
        .and(warp::header::headers_cloned())
        .and(warp::ext::optional())
        .and(warp::body::stream())
        .then(observe::observe)
        .boxed();
    let refer = warp::path!("refer" / "observables")
        .and(on(&[Method::POST], "POST, OPTIONS"))
        .and(with_relay)
        .and(warp::header::headers_cloned())
        .and(warp::ext::optional())
        .and(warp::body::stream())
        .then(refer::refer)
        .boxed();
    let version =
        warp::path!("version").and(on(&[Method::POST], "POST, OPTIONS")).map(plain::version).boxed();
    let watchdog = warp::path!("watchdog")
        .and(on(&[Method::GET, Method::HEAD], "GET, HEAD, OPTIONS"))
        .and(warp::header::headers_cloned())
        .map(plain::watchdog)
        .boxed();
    let landing = warp::path::end()
        .and(on(&[Method::GET, Method::HEAD], "GET, HEAD, OPTIONS"))
        .map(plain::landing)
        .boxed();
    // In the order of how often they are asked for.
    let routes = observe.or(refer).unify().or(health).unify().or(version).unify();
    routes.or(watchdog).unify().or(landing).unify().recover(refuse).unify()
}

/// A known path with a method it does not have.
#[derive(Debug)]
struct WrongMethod {
    asked: Method,
    allow: &'static str,
}

impl warp::reject::Reject for WrongMethod {}

/// Passes requests of the given `methods`.
fn on(methods: &'static [Method], allow: &'static str) -> BoxedFilter<()> {
    warp::method()
        .and_then(move |asked: Method| async move {
            if methods.contains(&asked) {
                Ok(())
            } else {
                Err(warp::reject::custom(WrongMethod { asked, allow }))
            }
        })
        .untuple_one()
        .boxed()
}

/// The answer where no route answered.
async fn refuse(rejection: Rejection) -> Result<Reply, Infallible> {
    Ok(match rejection.find::<WrongMethod>() {
        Some(WrongMethod { asked, allow }) if *asked == Method::OPTIONS => plain::options(allow),
        Some(WrongMethod { allow, .. }) => {
            error_reply::http_error(StatusCode::METHOD_NOT_ALLOWED, Some(allow))
        }
        None => error_reply::http_error(StatusCode::NOT_FOUND, None),
    })
}

#[cfg(test)]
mod tests {
    use std::{net::IpAddr, num::NonZeroUsize};

    use futures_util::future::join_all;
    use http_body_util::Full;
    use serde_json::{Value, json};
    use tokio::{net::TcpListener, time::Instant};
    use tokio_util::{sync::CancellationToken, task::TaskTracker};

    use super::*;
    use crate::{
        auth,
        ctim::{DomainName, Subject, sighting::Tlp},
        cyberscan::{
            Answer, Call, DomainRecord, Error, HostRecord, Record, Unlimited, Vulnerabilities, Wanted,
        },
        egress, enrich, probe,
        sandbox::{self, Sandbox},
    };

    const AUDIENCE: &str = "https://relay.test";

    /// A stage with a bug: it panics at addresses that end in 0.
    struct Shaky;

    impl CyberScan for Shaky {
        async fn authenticate(&self, _: &Call) -> Result<Instant, Error> {
            Ok(Instant::now())
        }

        async fn domain(&self, _: &Call, _: &DomainName) -> Result<Answer<DomainRecord>, Error> {
            panic!("on purpose")
        }

        async fn host(&self, _: &Call, _: IpAddr) -> Result<Answer<HostRecord>, Error> {
            panic!("on purpose")
        }

        async fn vulnerabilities(&self, _: &Call, ip: IpAddr) -> Result<Answer<Vulnerabilities>, Error> {
            assert!(!ip.to_string().ends_with(".0"), "on purpose");
            let record = Record::Known(Arc::new(Vulnerabilities(Vec::new())));
            Ok(Answer { record, asked_at: jiff::Timestamp::UNIX_EPOCH, stale: None })
        }
    }

    impl Preload for Shaky {
        async fn preload(&self, _: &Call, _: &[Subject], _: Wanted) {}
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_handler_that_panics_costs_its_own_answer_and_no_other() {
        let sandbox = Sandbox::start(sandbox::Options::default()).await.unwrap();
        let ca = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(ca.path(), &sandbox.ca_pem).unwrap();
        let egress = egress::Config {
            allow_cidrs: vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
            extra_ca_file: Some(ca.path().to_owned()),
            proxy: None,
            connect_timeout: Duration::from_secs(2),
        };
        let auth = auth::Config {
            audiences: vec![AUDIENCE.into()],
            jwks_hosts: vec![sandbox.issuer.host().parse().unwrap()],
            spellings: Vec::new(),
            require_exp: false,
            trusted_proxies: Vec::new(),
        };
        let (clock, metrics, tasks) = (Clock::system(), Metrics::new(), TaskTracker::new());
        let hosts = std::iter::once(sandbox.cyberscan.host().parse().unwrap()).collect();
        let http = egress::Http::new(&egress).unwrap();
        let authenticator = Authenticator::new(auth, hosts, http, clock, metrics.clone(), tasks.clone());
        let enrich = enrich::Config {
            deadline: Duration::from_secs(20),
            concurrency: NonZeroUsize::MIN,
            ip_details_page: false,
            private_addresses: false,
            tlp: Tlp::Amber,
            rendered_memory: 1 << 20,
        };
        let config = Config {
            connections: server::Config {
                max_connections: NonZeroUsize::new(100).unwrap(),
                header_timeout: Duration::from_secs(10),
                idle_timeout: Duration::from_secs(75),
                shutdown_timeout: Duration::from_secs(20),
            },
            tls: None,
            body_limit: 1 << 20,
            body_timeout: Duration::from_secs(10),
            max_in_flight: 100,
            log_observables: false,
        };
        let enricher = Enricher::new(Shaky, enrich);
        let relay = Relay::new(authenticator, enricher, Unlimited, clock, &config, metrics.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let serving = server::serve(
            listener,
            service(&relay, Traces::default()),
            config.connections,
            metrics.clone(),
            shutdown.clone(),
        );
        tasks.spawn(serving);

        let token = sandbox.token(AUDIENCE);
        let ask = async |ip: String| {
            let request = Request::post("/observe/observables")
                .header("host", "relay.test")
                .header("authorization", format!("Bearer {token}"))
                .body(Full::from(Bytes::from(json!([{"type": "ip", "value": ip}]).to_string())));
            let answer = probe::call(address, request.unwrap()).await.unwrap();
            assert_eq!(answer.status(), StatusCode::OK);
            serde_json::from_slice::<Value>(answer.body()).unwrap()
        };
        for net in 0..20 {
            let answers = join_all((0..50).map(|host| ask(format!("198.18.{net}.{}", host * 5 % 250)))).await;
            for (host, answer) in answers.iter().enumerate() {
                let expected = match host {
                    0 => json!({"errors": [
                        {"type": "fatal", "code": "internal error", "message": "Something went wrong."}
                    ]}),
                    _ => json!({"data": {}}),
                };
                assert_eq!(*answer, expected, "198.18.{net}.{}", host * 5);
            }
        }
        assert_eq!(metrics.panics.get(()), 20);
        assert_eq!(metrics.requests_in_flight.get(()), 0);
        shutdown.cancel();
    }
}
