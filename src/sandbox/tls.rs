//! Owns what both fakes stand on: a certificate authority made at start, and an HTTPS listener that counts its connections.
//! Must not know what is answered: that is the [`Answer`] of each fake.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::{Stream, StreamExt, stream};
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    body::{Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// A peer that connects and stays silent must not hold a task for ever.
const HANDSHAKE_TIME_OUT: Duration = Duration::from_secs(10);
/// `accept` fails for want of file descriptors, mostly; trying again at once would only spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The sandbox's own certificate authority. It lives as long as the process: nothing is written to disk.
pub(super) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    /// Makes a fresh authority.
    pub(super) fn new() -> io::Result<Self> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "cyberscan-relay sandbox CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let issuer = CertifiedIssuer::self_signed(params, key).map_err(io::Error::other)?;
        Ok(Self { issuer })
    }

    /// The root certificate as PEM, for the trust store of whoever connects.
    pub(super) fn ca_pem(&self) -> String {
        self.issuer.pem()
    }

    /// A new certificate for `names` (DNS names or IP addresses), and its key.
    pub(super) fn certificate(&self, names: &[String]) -> io::Result<(Certificate, KeyPair)> {
        let mut params = CertificateParams::new(names).map_err(io::Error::other)?;
        params.distinguished_name.push(DnType::CommonName, "cyberscan-relay sandbox");
        let key = KeyPair::generate().map_err(io::Error::other)?;
        let certificate = params.signed_by(&key, &self.issuer).map_err(io::Error::other)?;
        Ok((certificate, key))
    }

    /// A server configuration with a new certificate for `names`, HTTP/1.1 only.
    pub(super) fn server_config(&self, names: &[String]) -> io::Result<rustls::ServerConfig> {
        let (certificate, key) = self.certificate(names)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        // The provider is named: the sandbox must not depend on which one the process installed as its default.
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .map_err(io::Error::other)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// A body of either fake: whole, or produced while it is read.
pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// What a fake does with a request. `Err` closes the connection without an answer.
pub(super) trait Answer: Clone + Send + Sync + 'static {
    fn answer(&self, request: Request<Incoming>) -> impl Future<Output = io::Result<Response<Body>>> + Send;
}

/// When to stop, and which tasks are still to be waited for.
#[derive(Clone, Default)]
pub(super) struct Lifetime {
    pub(super) shutdown: CancellationToken,
    pub(super) tasks: TaskTracker,
}

/// A bound socket, not served yet: its address is known before the fake behind it is built.
pub(super) struct Listener {
    tcp: TcpListener,
    acceptor: TlsAcceptor,
    connections: Arc<AtomicU64>,
}

impl Listener {
    pub(super) async fn bind(address: SocketAddr, config: rustls::ServerConfig) -> io::Result<Self> {
        Ok(Self {
            tcp: TcpListener::bind(address).await?,
            acceptor: TlsAcceptor::from(Arc::new(config)),
            connections: Arc::default(),
        })
    }

    pub(super) fn port(&self) -> io::Result<u16> {
        Ok(self.tcp.local_addr()?.port())
    }

    /// The count of accepted TCP connections, whether or not TLS came about.
    pub(super) fn connections(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.connections)
    }

    /// Serves until the shutdown signal, on a task of its own.
    pub(super) fn serve(self, answer: impl Answer, lifetime: Lifetime) {
        let tasks = lifetime.tasks.clone();
        tasks.spawn(async move {
            while let Some(accepted) = lifetime.shutdown.run_until_cancelled(self.tcp.accept()).await {
                let Ok((stream, _)) = accepted else {
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                };
                self.connections.fetch_add(1, Ordering::Relaxed);
                let (acceptor, answer, shutdown) =
                    (self.acceptor.clone(), answer.clone(), lifetime.shutdown.clone());
                lifetime.tasks.spawn(async move {
                    shutdown.run_until_cancelled(connection(stream, acceptor, answer)).await
                });
            }
        });
    }
}

/// A connection that fails concerns its client, who sees it; the fake has nobody to tell.
async fn connection(stream: TcpStream, acceptor: TlsAcceptor, answer: impl Answer) {
    // Nagle's delay would be measured as the latency of the relay.
    let _ = stream.set_nodelay(true);
    let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_TIME_OUT, acceptor.accept(stream)).await else {
        return;
    };
    let service = service_fn(|request| answer.answer(request));
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

/// A body known in full.
pub(super) fn whole(body: impl Into<Bytes>) -> Body {
    Full::new(body.into()).map_err(|never| match never {}).boxed_unsync()
}

/// A body made while it is read.
pub(super) fn streamed(chunks: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Body {
    StreamBody::new(chunks.map(|chunk| chunk.map(Frame::data))).boxed_unsync()
}

/// Starts with `head` and repeats `chunk` until the reader goes away.
pub(super) fn endless(head: &'static str, chunk: Bytes) -> Body {
    streamed(stream::iter([Bytes::from_static(head.as_bytes())]).chain(stream::repeat(chunk)).map(Ok))
}

/// Never says anything.
pub(super) fn silent() -> Body {
    streamed(stream::pending())
}

/// An answer with a JSON body.
pub(super) fn json(code: u16, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    // A scripted code that HTTP does not know is a slip of the script: it shows as a 500.
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Adds a header; a value that no header can carry is left out.
pub(super) fn with_header(
    mut response: Response<Body>,
    name: header::HeaderName,
    value: &str,
) -> Response<Body> {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
    response
}
