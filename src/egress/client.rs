//! The one HTTP client. It owns time-outs, the limits on what is read and what an outcome is
//! called; it must not know what is asked.
//!
//! Redirects are never followed, nothing is taken from the environment, only https is spoken, and
//! bodies are counted after decompression while they arrive (`reqwest`'s own `bytes()` would
//! inflate 100 MB from a gzip bomb of 100 KB).

use std::{error::Error as _, path::PathBuf, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use ipnet::IpNet;
use tokio::time::{Instant, timeout, timeout_at};
use url::Url;

use super::{AddressGuard, Host, resolver::GuardedResolver, tls};

/// Settings `egress.*`.
#[derive(Clone, Debug)]
pub struct Config {
    /// `egress.allow_cidrs`: private networks that may be connected to.
    pub allow_cidrs: Vec<IpNet>,
    /// `egress.proxy`: an http(s) proxy through which every call goes.
    pub proxy: Option<Url>,
    /// `egress.extra_ca_file`: PEM certificates believed beside the platform's.
    pub extra_ca_file: Option<PathBuf>,
    /// `egress.connect_timeout`: how long a connection (TCP, proxy, TLS) may take to come up.
    pub connect_timeout: Duration,
}

/// The guarded client; a cheap clone.
#[derive(Clone, Debug)]
pub struct Http {
    client: reqwest::Client,
    guard: Arc<AddressGuard>,
}

/// A request to be sent by [`Http::send`].
#[derive(Debug)]
pub struct Call<'a> {
    /// The method.
    pub method: Method,
    /// Whom to ask.
    pub host: &'a Host,
    /// The path, percent-encoded, beginning with a slash.
    pub path: &'a str,
    /// Headers; secret values are marked sensitive.
    pub headers: HeaderMap,
    /// A body: JSON, unless `headers` say of what type it is.
    pub json: Option<Bytes>,
    /// The most bytes of (decoded) body that are read.
    pub limit: usize,
    /// When to give up.
    pub deadline: Instant,
}

/// A complete answer.
#[derive(Debug)]
pub struct Reply {
    /// The status code.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body, decoded.
    pub body: Bytes,
}

/// Why there is no complete answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Transport {
    /// The address guard refused the host's address, before any connection.
    #[error("the address is not allowed")]
    Refused,
    /// No connection, or it ended before a status line came.
    #[error("no connection")]
    Unreachable,
    /// The certificate was not accepted.
    #[error("certificate not accepted: {0}")]
    Untrusted(#[from] tls::Untrusted),
    /// The deadline passed.
    #[error("no answer in time")]
    TimedOut,
    /// The answer began and then broke off, or could not be decoded.
    #[error("the answer broke off")]
    Broken,
    /// The answer is larger than the limit.
    #[error("the answer is too large")]
    TooLarge,
}

/// How long a body may stay silent. How long the head may take is for whoever calls to say.
const READ: Duration = Duration::from_secs(5);

impl Http {
    /// A client behind the guard of `config`.
    ///
    /// # Errors
    /// When `egress.extra_ca_file` cannot be used or TLS cannot be set up.
    pub fn new(config: &Config) -> anyhow::Result<Self> {
        let guard = Arc::new(AddressGuard::new(config.allow_cidrs.clone()));
        let proxy_host = config.proxy.as_ref().and_then(Url::host_str).map(String::from);
        #[expect(clippy::disallowed_methods, reason = "this is the guarded client")]
        let mut builder = reqwest::Client::builder()
            .tls_backend_preconfigured(tls::client_config(config.extra_ca_file.as_deref())?)
            .dns_resolver(Arc::new(GuardedResolver::new(Arc::clone(&guard), proxy_host)))
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .no_proxy()
            .referer(false)
            .https_only(true)
            .http1_only()
            .gzip(true)
            .tcp_nodelay(true)
            .connect_timeout(config.connect_timeout)
            .pool_idle_timeout(Duration::from_secs(60))
            .pool_max_idle_per_host(32);
        if let Some(proxy) = &config.proxy {
            builder = builder.proxy(reqwest::Proxy::all(proxy.clone())?);
        }
        Ok(Self { client: builder.build()?, guard })
    }

    /// Sends `call` and reads the whole answer.
    ///
    /// # Errors
    /// A [`Transport`] error when there is no complete answer. A status such as 404 or 503 is an
    /// answer, not an error.
    pub async fn send(&self, call: Call<'_>) -> Result<Reply, Transport> {
        // The resolver is never asked about literals.
        if call.host.ip().is_some_and(|ip| !self.guard.allows(ip)) {
            return Err(Transport::Refused);
        }
        let deadline = call.deadline;
        timeout_at(deadline, self.exchange(call)).await.unwrap_or(Err(Transport::TimedOut))
    }

    async fn exchange(&self, call: Call<'_>) -> Result<Reply, Transport> {
        let url = url(call.host, call.path).ok_or(Transport::Refused)?;
        let mut headers = call.headers;
        if call.json.is_some() {
            headers.entry(header::CONTENT_TYPE).or_insert(HeaderValue::from_static("application/json"));
        }
        let mut request = self.client.request(call.method, url).headers(headers);
        if let Some(body) = call.json {
            request = request.body(body);
        }
        let mut response = request.send().await.map_err(|error| classify(&error))?;
        let mut body = BytesMut::new();
        loop {
            let chunk = timeout(READ, response.chunk()).await.map_err(|_| Transport::TimedOut)?;
            let Some(chunk) = chunk.map_err(|error| broken(&error))? else { break };
            if body.len() + chunk.len() > call.limit {
                return Err(Transport::TooLarge);
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Reply {
            status: response.status(),
            headers: std::mem::take(response.headers_mut()),
            body: body.freeze(),
        })
    }
}

/// `https://<host><path>`, built from parts; `None` if the parts would read as something else.
pub(super) fn url(host: &Host, path: &str) -> Option<Url> {
    let url = Url::parse(&format!("https://{}:{}{path}", host.name(), host.port())).ok()?;
    (url.host_str() == Some(&host.name()) && url.path() == path && url.query().is_none()).then_some(url)
}

pub(super) fn classify(error: &reqwest::Error) -> Transport {
    if let Some(untrusted) = error.source().and_then(tls::Untrusted::find) {
        return Transport::Untrusted(untrusted);
    }
    if error.is_timeout() && !error.is_connect() {
        return Transport::TimedOut;
    }
    // A connection that cannot be made, a proxy that says no, a reset, a garbled status line.
    Transport::Unreachable
}

pub(super) fn broken(error: &reqwest::Error) -> Transport {
    if error.is_timeout() { Transport::TimedOut } else { Transport::Broken }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::sandbox::{self, IssuerBehaviour, Sandbox};

    fn get<'a>(host: &'a Host, path: &'a str, limit: usize, patience: Duration) -> Call<'a> {
        Call {
            method: Method::GET,
            host,
            path,
            headers: HeaderMap::new(),
            json: None,
            limit,
            deadline: Instant::now() + patience,
        }
    }

    #[test]
    fn a_url_says_what_its_parts_say_or_is_none() {
        let host: Host = "api.example.com".parse().unwrap();
        assert_eq!(url(&host, "/api/v1/token").unwrap().as_str(), "https://api.example.com/api/v1/token");
        for path in
            ["", "x", "//a/../b", "/a/../b", "/a/%2e%2e/b", "/a?b", "/a#b", "/a b", "/a\tb", "@evil.test/"]
        {
            assert_eq!(url(&host, path), None, "{path:?}");
        }
    }

    /// A key issuer, and a client that believes it.
    async fn issuer() -> (Http, Host, Sandbox) {
        let sandbox = Sandbox::start(sandbox::Options::default()).await.unwrap();
        let ca = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(ca.path(), &sandbox.ca_pem).unwrap();
        let config = Config {
            allow_cidrs: vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
            proxy: None,
            extra_ca_file: Some(ca.path().to_owned()),
            connect_timeout: Duration::from_secs(2),
        };
        (Http::new(&config).unwrap(), sandbox.issuer.host().parse().unwrap(), sandbox)
    }

    #[tokio::test]
    async fn a_body_is_read_up_to_the_limit_and_not_a_byte_further() {
        let (http, host, sandbox) = issuer().await;
        // Of a size that comes in several pieces.
        let body = "x".repeat(100_000);
        sandbox.issuer.respond_with(IssuerBehaviour::Body(body.clone()));
        let read = async |limit| {
            let call = get(&host, "/.well-known/jwks", limit, Duration::from_secs(5));
            http.send(call).await.map(|reply| reply.body)
        };
        assert_eq!(read(body.len()).await.unwrap(), body);
        assert_eq!(read(body.len() - 1).await.unwrap_err(), Transport::TooLarge);
    }

    #[tokio::test]
    async fn a_private_address_is_refused_before_any_connection_as_a_literal_and_behind_a_name() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let config = |allow_cidrs| Config {
            allow_cidrs,
            proxy: None,
            extra_ca_file: None,
            connect_timeout: Duration::from_secs(2),
        };
        let guarded = Http::new(&config(vec![])).unwrap();
        let allowed = Http::new(&config(vec!["127.0.0.0/8".parse().unwrap()])).unwrap();
        for (name, refused) in [("127.0.0.1", Transport::Refused), ("localhost", Transport::Unreachable)] {
            let host: Host = format!("{name}:{port}").parse().unwrap();
            let call = || get(&host, "/", 1, Duration::from_secs(5));
            assert_eq!(guarded.send(call()).await.unwrap_err(), refused);
            assert!(listener.accept().now_or_never().is_none(), "{name} was connected to");

            let (outcome, accepted) =
                tokio::join!(allowed.send(call()), async { listener.accept().await.map(drop) });
            assert_eq!(outcome.unwrap_err(), Transport::Unreachable);
            assert!(accepted.is_ok());
        }
    }

    #[tokio::test]
    async fn a_host_that_falls_silent_is_given_up_before_the_deadline() {
        let (http, host, sandbox) = issuer().await;
        sandbox.issuer.respond_with(IssuerBehaviour::HangInBody);
        let hour = Duration::from_secs(3_600);
        let asking = tokio_util::task::TaskTracker::new().spawn(async move {
            let call = get(&host, "/.well-known/jwks", 1, hour);
            http.send(call).await.map(|reply| reply.body)
        });
        // From here on only clocks are waited for.
        while sandbox.issuer.fetches() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::pause();
        let silent = Instant::now();
        assert_eq!(asking.await.unwrap(), Err(Transport::TimedOut));
        assert!(silent.elapsed() <= READ + READ / 10, "{:?}", silent.elapsed());
    }

    /// It is the caller who says how long an answer may take to begin.
    #[tokio::test]
    async fn an_answer_that_begins_late_is_waited_for() {
        let (http, host, sandbox) = issuer().await;
        sandbox.issuer.respond_with(IssuerBehaviour::Delay(2 * READ));
        let minute = Duration::from_secs(60);
        let asking = tokio_util::task::TaskTracker::new().spawn(async move {
            http.send(get(&host, "/.well-known/jwks", 1 << 20, minute)).await.map(|reply| reply.status)
        });
        while sandbox.issuer.fetches() == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        tokio::time::pause();
        assert_eq!(asking.await.unwrap(), Ok(StatusCode::OK));
    }
}
