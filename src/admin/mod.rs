//! The admin listener: metrics, probes, the status page, purges and the log level. It owns these routes and
//! who may change anything; it must not know what a figure means.
//!
//! | route | answer |
//! |---|---|
//! | `GET /metrics` | all metrics, for Prometheus |
//! | `GET /livez` | 200 as long as the process answers at all |
//! | `GET /readyz` | 200 while the relay takes requests, 503 once it drains; what is degraded is named |
//! | `GET /` | the status page; `GET /status` the same as JSON |
//! | `POST /purge` | forgets answers on every replica; needs `admin.token` |
//! | `PUT /log-level` | changes what is logged; needs `admin.token` |

mod host;
mod status;

use std::{convert::Infallible, future::Future, sync::Arc, time::Duration};

use aws_lc_rs::{constant_time::verify_slices_are_equal, digest};
use bytes::Bytes;
use http::{HeaderMap, Method, Request, Response, StatusCode, header};
use hyper::{
    body::Incoming,
    service::{Service, service_fn},
};
use hyper_util::service::TowerToHyperService;
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use serde_json::json;
use tokio::{net::TcpListener, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use warp::{Filter, Rejection, path::FullPath, reply::Response as Reply};

use crate::{
    cache::{Cached, tier::Name},
    ctim::Subject,
    cyberscan::CyberScan,
    http::server::{self, Front, Peer},
    live::Live,
    metrics::{Listener, Metrics},
    redis_pool::Unavailable,
    telemetry::{Level, LogLevel},
};

pub use host::AdminHost;

/// Settings `admin.*`.
#[derive(Clone, Debug)]
pub struct Config {
    /// `admin.hosts`: names by which the listener is meant, beside addresses and names without a dot.
    pub hosts: Vec<AdminHost>,
    /// `log.observables`: whether a purge is logged with what it was about.
    pub log_observables: bool,
    /// `admin.token`: what mutating calls have to bring; without it they are refused.
    pub token: Option<SecretString>,
}

/// How long a request may take, its body included.
const WHOLE: Duration = Duration::from_secs(30);
/// The most bytes of a request's body.
const BODY: u64 = 4096;

/// What operators can ask to be forgotten.
pub trait Purge: Send + Sync + 'static {
    /// Everything.
    fn all(&self) -> impl Future<Output = Result<(), Unavailable>> + Send;

    /// All answers of a tenant, by the name it has in logs and in Redis.
    fn tenant(&self, label: Name) -> impl Future<Output = Result<(), Unavailable>> + Send;

    /// All answers about an observable, of every tenant.
    fn observable(&self, subject: &Subject) -> impl Future<Output = Result<(), Unavailable>> + Send;
}

impl<P: CyberScan> Purge for Cached<P> {
    async fn all(&self) -> Result<(), Unavailable> {
        self.purge_all().await
    }

    async fn tenant(&self, label: Name) -> Result<(), Unavailable> {
        self.purge_label(label).await
    }

    async fn observable(&self, subject: &Subject) -> Result<(), Unavailable> {
        self.purge_subject(subject).await
    }
}

/// What the routes work with.
pub struct Admin<C> {
    /// The cache.
    pub cache: C,
    /// The counters.
    pub metrics: Metrics,
    /// Brings those that are measured rather than counted up to date.
    pub measure: Box<dyn Fn() + Send + Sync>,
    /// The log.
    pub log: LogLevel,
    /// Whether there is a Redis.
    pub redis: bool,
    /// The settings.
    pub config: Live<Config>,
}

/// Serves on `listener` until `shutdown`.
pub async fn serve<C: Purge>(listener: TcpListener, admin: Admin<C>, shutdown: CancellationToken) {
    let limits = server::Config {
        max_connections: std::num::NonZeroUsize::MIN.saturating_add(127),
        header_timeout: Duration::from_secs(5),
        idle_timeout: Duration::from_secs(75),
        shutdown_timeout: Duration::from_secs(1),
    };
    let front = Front { listener: Listener::Admin, tls: None, metrics: admin.metrics.clone() };
    let config = Live::clone(&admin.config);
    let routes = TowerToHyperService::new(warp::service(routes(Arc::new(admin))));
    // Also a body that never ends is given up.
    let service = service_fn(move |request: Request<Incoming>| {
        // Targets without a path (`CONNECT host:443`, `OPTIONS *`) panic some of warp's path filters.
        let has_path = request.uri().path().starts_with('/');
        let meant = host::is_meant(&request, &config.get().hosts);
        let answering = (has_path && meant).then(|| timeout(WHOLE, routes.call(request)));
        async move {
            let failed = |status: StatusCode| answer(status, &json!({"error": status.canonical_reason()}));
            match answering {
                None if !meant => {
                    warn!("the admin listener was asked by a name that is not in admin.hosts");
                    let error = "asked by a name that is not in admin.hosts";
                    Ok(answer(StatusCode::MISDIRECTED_REQUEST, &json!({"error": error})))
                }
                Some(answering) => {
                    answering.await.unwrap_or_else(|_| Ok(failed(StatusCode::REQUEST_TIMEOUT)))
                }
                None => Ok(failed(StatusCode::METHOD_NOT_ALLOWED)),
            }
        }
    });
    server::serve(listener, service, limits, front, shutdown).await;
}

fn routes<C: Purge>(
    admin: Arc<Admin<C>>,
) -> impl Filter<Extract = (Reply,), Error = Infallible> + Clone + use<C> {
    let admin = warp::any().map(move || Arc::clone(&admin));
    let get = warp::get().or(warp::head()).unify();
    let page = warp::path::end()
        .map(|| text("text/html; charset=utf-8", include_str!("page.html")))
        .or(warp::path!("status.css").map(|| text("text/css", include_str!("page.css"))))
        .unify()
        .or(warp::path!("status.js").map(|| text("text/javascript", include_str!("page.js"))))
        .unify();
    let live = warp::path!("livez").map(|| text("text/plain", "alive\n"));
    let ready = warp::path!("readyz").and(admin.clone()).map(|admin: Arc<Admin<C>>| ready(&admin));
    let metrics = warp::path!("metrics").and(admin.clone()).map(|admin: Arc<Admin<C>>| {
        (admin.measure)();
        text("text/plain; version=0.0.4; charset=utf-8", admin.metrics.render())
    });
    let status = warp::path!("status").and(admin.clone()).map(|admin: Arc<Admin<C>>| {
        (admin.measure)();
        text("application/json", status::json(&admin.metrics, admin.redis).to_string())
    });
    let reading = get.and(page.or(live).unify().or(ready).unify().or(metrics).unify().or(status).unify());
    let changing = admin
        .and(warp::header::headers_cloned())
        .and(warp::ext::optional::<Peer>())
        .and(warp::body::content_length_limit(BODY))
        .and(warp::body::bytes());
    let purge = warp::path!("purge").and(warp::post()).and(changing.clone()).then(purge);
    let level = warp::path!("log-level").and(warp::put()).and(changing).then(
        async |admin: Arc<Admin<C>>, headers: HeaderMap, peer: Option<Peer>, body: Bytes| {
            set_level(&admin, &headers, peer, &body)
        },
    );
    let nothing = warp::method()
        .and(warp::path::full())
        .and_then(async |method: Method, path: FullPath| Err::<Reply, _>(unserved(&method, path.as_str())));
    reading.or(purge).unify().or(level).unify().or(nothing).unify().recover(refuse).unify()
}

/// A known path that has not been served is asked with a method it does not have, or brings no fit body.
#[derive(Debug)]
struct Allow {
    methods: &'static str,
    /// It was asked with OPTIONS, as load balancers' checks do that want to know whether somebody is there.
    options: bool,
}

impl warp::reject::Reject for Allow {}

/// There is no such path, whatever the method.
#[derive(Debug)]
struct Nowhere;

impl warp::reject::Reject for Nowhere {}

fn unserved(method: &Method, path: &str) -> Rejection {
    let methods = match path {
        "/" | "/status" | "/status.css" | "/status.js" | "/metrics" | "/livez" | "/readyz" => {
            "GET, HEAD, OPTIONS"
        }
        "/purge" => "POST, OPTIONS",
        "/log-level" => "PUT, OPTIONS",
        _ => return warp::reject::custom(Nowhere),
    };
    warp::reject::custom(Allow { methods, options: method == Method::OPTIONS })
}

fn text(kind: &'static str, body: impl Into<Bytes>) -> Reply {
    let mut reply = Response::new(body.into().into());
    let headers = reply.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    // The page and what it loads are all there is: nothing from elsewhere, nothing inline, in no frame.
    let policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'";
    headers.insert(header::CONTENT_SECURITY_POLICY, header::HeaderValue::from_static(policy));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, header::HeaderValue::from_static("nosniff"));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    reply
}

fn answer(status: StatusCode, value: &serde_json::Value) -> Reply {
    let mut reply = text("application/json", value.to_string());
    *reply.status_mut() = status;
    reply
}

fn ready<C>(admin: &Admin<C>) -> Reply {
    let draining = admin.metrics.ready.get(()) == 0;
    let redis = match (admin.redis, admin.metrics.redis_up.get(()) == 1) {
        (false, _) => "not configured",
        (true, true) => "ok",
        // Not a reason to take the relay out: it serves from memory and asks CyberScan.
        (true, false) => "degraded",
    };
    let status = if draining { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    answer(status, &json!({"ready": !draining, "redis": redis}))
}

/// What a purge is about: exactly one of these.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Purged {
    #[serde(default)]
    all: bool,
    tenant: Option<String>,
    observable: Option<String>,
}

async fn purge<C: Purge>(admin: Arc<Admin<C>>, headers: HeaderMap, peer: Option<Peer>, body: Bytes) -> Reply {
    if let Some(refusal) = refusal(&admin.config.get(), &headers, peer, "a purge") {
        return refusal;
    }
    const EXPECTED: &str = "expected {\"all\": true}, {\"tenant\": \"<32 hex digits>\"} or {\"observable\": \"<address or domain>\"}";
    let invalid = || answer(StatusCode::BAD_REQUEST, &json!({"error": EXPECTED}));
    let Ok(purged) = serde_json::from_slice::<Purged>(&body) else { return invalid() };
    let what = match (&purged.tenant, &purged.observable) {
        (Some(tenant), _) => format!("tenant {tenant}"),
        (None, Some(observable)) if admin.config.get().log_observables => format!("observable {observable}"),
        (None, Some(_)) => "an observable".to_owned(),
        (None, None) => "all".to_owned(),
    };
    let outcome = match (purged.all, purged.tenant, purged.observable) {
        (true, None, None) => admin.cache.all().await,
        (false, Some(label), None) => match name(&label) {
            Some(label) => admin.cache.tenant(label).await,
            None => return invalid(),
        },
        (false, None, Some(observable)) => match Subject::parse(&observable) {
            Some(subject) => admin.cache.observable(&subject).await,
            None => return invalid(),
        },
        _ => return invalid(),
    };
    info!(what, by = "admin.token", from = from(peer), everywhere = outcome.is_ok(), "answers were purged");
    match outcome {
        Ok(()) => answer(StatusCode::OK, &json!({"purged": "on every replica"})),
        Err(Unavailable) => answer(
            StatusCode::BAD_GATEWAY,
            &json!({"error": "forgotten here; Redis, and so the other replicas, will be told when it answers"}),
        ),
    }
}

fn set_level<C>(admin: &Admin<C>, headers: &HeaderMap, peer: Option<Peer>, body: &[u8]) -> Reply {
    if let Some(refusal) = refusal(&admin.config.get(), headers, peer, "a change of the log level") {
        return refusal;
    }
    let text = String::from_utf8_lossy(body);
    let level = match text.parse::<Level>() {
        Ok(level) => level,
        Err(why) => return answer(StatusCode::BAD_REQUEST, &json!({"error": why.to_string()})),
    };
    if admin.log.set(&level) {
        info!(to = text.trim(), by = "admin.token", from = from(peer), "the log level was changed");
        answer(StatusCode::OK, &json!({"level": text.trim()}))
    } else {
        answer(StatusCode::CONFLICT, &json!({"error": "this process does not log"}))
    }
}

/// Where a request came from, for the log.
fn from(peer: Option<Peer>) -> String {
    peer.map(|peer| peer.address.to_string()).unwrap_or_default()
}

/// What is said to those whose `headers` do not bring `admin.token`; compared by digests, in constant time. `what` they
/// wanted is logged.
fn refusal(config: &Config, headers: &HeaderMap, peer: Option<Peer>, what: &str) -> Option<Reply> {
    let Some(token) = &config.token else {
        let error = "admin.token is not set: nothing can be changed here";
        return Some(answer(StatusCode::FORBIDDEN, &json!({"error": error})));
    };
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let given = given.and_then(|value| value.split_once(' '));
    let given = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    let given = given.map(|(_, token)| token.trim()).unwrap_or_default();
    let hash = |text: &str| digest::digest(&digest::SHA256, text.as_bytes());
    if verify_slices_are_equal(hash(given).as_ref(), hash(token.expose_secret()).as_ref()).is_ok() {
        return None;
    }
    warn!(what, from = from(peer), "refused: admin.token does not match");
    let mut refusal = answer(StatusCode::UNAUTHORIZED, &json!({"error": "admin.token does not match"}));
    let bearer = header::HeaderValue::from_static("Bearer");
    refusal.headers_mut().insert(header::WWW_AUTHENTICATE, bearer);
    Some(refusal)
}

/// 32 hexadecimal digits.
fn name(text: &str) -> Option<Name> {
    let number =
        u128::from_str_radix(text, 16).ok().filter(|_| text.len() == 32 && !text.starts_with('+'))?;
    Some(number.to_be_bytes())
}

async fn refuse(rejection: Rejection) -> Result<Reply, Infallible> {
    let allow = rejection.find::<Allow>();
    if let Some(Allow { methods, options: true }) = allow {
        let mut reply = text("text/plain", "");
        reply.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static(methods));
        return Ok(reply);
    }
    let status = if rejection.find::<Nowhere>().is_some() {
        StatusCode::NOT_FOUND
    } else if rejection.find::<warp::reject::PayloadTooLarge>().is_some() {
        StatusCode::PAYLOAD_TOO_LARGE
    } else if rejection.find::<warp::reject::LengthRequired>().is_some() {
        StatusCode::LENGTH_REQUIRED
    } else if allow.is_some() {
        StatusCode::METHOD_NOT_ALLOWED
    } else if rejection.is_not_found() {
        StatusCode::NOT_FOUND
    } else {
        StatusCode::BAD_REQUEST
    };
    let mut reply = answer(status, &json!({"error": status.canonical_reason()}));
    if let Some(Allow { methods, .. }) = allow.filter(|_| status == StatusCode::METHOD_NOT_ALLOWED) {
        reply.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static(methods));
    }
    Ok(reply)
}
