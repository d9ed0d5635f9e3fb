//! The one harness: a relay on a free port, in this process, put together as in production, with a
//! sandbox behind it.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use cyberscan_relay::{
    app, probe,
    reload::Reloads,
    sandbox::{Options, Sandbox},
    settings::{Faults, Source},
    telemetry::LogLevel,
};
use http::{HeaderMap, Method, Request, StatusCode, header};
use http_body_util::Full;
use rcgen::{CertificateParams, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinHandle,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_util::{either::Either, sync::CancellationToken};

pub(crate) const AUDIENCE: &str = "https://relay.test";

/// A running relay and the world around it, which it may share with others. Dropping it stops the relay; the
/// sandbox goes with the last one.
pub(crate) struct TestRelay {
    pub(crate) address: SocketAddr,
    pub(crate) admin: SocketAddr,
    /// Asks for a reload.
    pub(crate) asked: Arc<Notify>,
    pub(crate) sandbox: Arc<Sandbox>,
    pub(crate) shutdown: CancellationToken,
    served: JoinHandle<()>,
    certificate: Option<Certificate>,
    _ca: tempfile::NamedTempFile,
}

/// What the relay is spoken to over. What must hold of requests and connections holds over both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Over {
    Plain,
    Tls,
}

/// A client's connection.
pub(crate) type Connection = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// A certificate for `relay.test` and its key, in files.
pub(crate) struct Certificate {
    pub(crate) pem: String,
    directory: tempfile::TempDir,
}

impl Certificate {
    pub(crate) fn new() -> Self {
        let this = Self { pem: String::new(), directory: tempfile::tempdir().unwrap() };
        this.renewed()
    }

    /// Another one, with another key, in the same files.
    pub(crate) fn renewed(self) -> Self {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["relay.test".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        std::fs::write(self.path("certificate.pem"), &pem).unwrap();
        std::fs::write(self.path("key.pem"), key.serialize_pem()).unwrap();
        Self { pem, ..self }
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }

    /// The settings of a relay that shows it.
    pub(crate) fn settings(&self) -> [(String, String); 2] {
        [
            ("RELAY_SERVER_TLS_CERTIFICATE".to_owned(), self.path("certificate.pem")),
            ("RELAY_SERVER_TLS_KEY".to_owned(), self.path("key.pem")),
        ]
    }

    /// A connection to `address`, whose certificate has to be this one.
    pub(crate) async fn connect(&self, address: SocketAddr) -> std::io::Result<Connection> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.pem.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let stream = TcpStream::connect(address).await?;
        let connecting =
            TlsConnector::from(Arc::new(config)).connect("relay.test".try_into().unwrap(), stream);
        Ok(Either::Right(Box::new(connecting.await?)))
    }
}

/// An answer of the relay.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl TestRelay {
    pub(crate) async fn start() -> Self {
        Self::with(&[]).await
    }

    /// A relay with `settings` (names of variables and their values) beside those that lead it to
    /// the sandbox.
    pub(crate) async fn with(settings: &[(&str, &str)]) -> Self {
        let sandbox = Arc::new(Sandbox::start(Options::default()).await.unwrap());
        Self::beside(&sandbox, settings).await
    }

    /// As [`TestRelay::with`], spoken to over TLS of its own or without.
    pub(crate) async fn over(over: Over, settings: &[(&str, &str)]) -> Self {
        if over == Over::Plain {
            return Self::with(settings).await;
        }
        let certificate = Certificate::new();
        let files = certificate.settings();
        let files = files.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let settings: Vec<(&str, &str)> = settings.iter().copied().chain(files).collect();
        let mut relay = Self::with(&settings).await;
        relay.certificate = Some(certificate);
        relay
    }

    /// As [`TestRelay::with`], in the world of other relays.
    pub(crate) async fn beside(sandbox: &Arc<Sandbox>, settings: &[(&str, &str)]) -> Self {
        Self::attempt(sandbox, settings).await.unwrap()
    }

    /// As [`TestRelay::beside`]; or what `check` says against it.
    pub(crate) async fn attempt(sandbox: &Arc<Sandbox>, settings: &[(&str, &str)]) -> Result<Self, Faults> {
        let ca = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(ca.path(), &sandbox.ca_pem).unwrap();
        let own = sandbox_settings(sandbox, ca.path().to_str().unwrap());
        let given = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        let mut all: Vec<(String, String)> = given.collect();
        all.extend(own.into_iter().filter(|(name, _)| !settings.iter().any(|(given, _)| given == name)));
        // Those of a file are whole, and all of them can be changed there.
        let file =
            settings.iter().find(|(name, _)| *name == "RELAY_CONFIG").map(|(_, path)| PathBuf::from(path));
        if file.is_some() {
            all.clear();
        }
        let (source, asked) = (Source::new(file, all), Arc::<Notify>::default());
        let mut reloads = Reloads::new(source.clone(), Arc::clone(&asked));
        if settings.iter().any(|(name, _)| name.ends_with("_FILE")) {
            reloads = reloads.looking_every(Duration::from_millis(100));
        }
        let prepared = app::prepare(source.load()?)?;

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let admin_listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = admin_listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let running = app::serve(
            prepared,
            listener,
            Some((admin_listener, LogLevel::default())),
            Some(reloads),
            shutdown.clone(),
        );
        let served = tokio::spawn(async move { running.await.unwrap() });
        let sandbox = Arc::clone(sandbox);
        Ok(Self { address, admin, asked, sandbox, shutdown, served, certificate: None, _ca: ca })
    }

    /// A connection, as the relay wants it.
    pub(crate) async fn connect(&self) -> Connection {
        match &self.certificate {
            None => Either::Left(TcpStream::connect(self.address).await.unwrap()),
            Some(certificate) => certificate.connect(self.address).await.unwrap(),
        }
    }

    /// Stops the relay and waits until it has drained.
    pub(crate) async fn stop(mut self) {
        self.shutdown.cancel();
        (&mut self.served).await.unwrap();
    }

    pub(crate) fn token(&self) -> String {
        self.sandbox.token(AUDIENCE)
    }

    /// A token with some claims changed; `null` takes one away.
    pub(crate) fn token_with(&self, changes: &[(&str, Value)]) -> String {
        let mut claims = self.sandbox.claims(AUDIENCE);
        for (name, value) in changes {
            match value {
                Value::Null => drop(claims.as_object_mut().unwrap().remove(*name)),
                value => claims[*name] = value.clone(),
            }
        }
        self.sandbox.issuer.mint(&claims)
    }

    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<Bytes>,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path).header(header::HOST, "relay.test");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::from(body.into())).unwrap();
        let answering = probe::exchange(self.connect().await, request);
        let answer = tokio::time::timeout(Duration::from_secs(60), answering).await.unwrap().unwrap();
        let (head, body) = answer.into_parts();
        Answer { status: head.status, headers: head.headers, body }
    }

    pub(crate) async fn post(&self, path: &str, token: &str, body: impl Into<Bytes>) -> Answer {
        self.send(Method::POST, path, &[("authorization", &format!("Bearer {token}"))], body).await
    }

    pub(crate) async fn health(&self) -> Value {
        self.post("/health", &self.token(), "").await.json()
    }

    pub(crate) async fn observe(&self, observables: &[(&str, &str)]) -> Value {
        self.post("/observe/observables", &self.token(), list(observables)).await.json()
    }

    pub(crate) async fn refer(&self, observables: &[(&str, &str)]) -> Value {
        self.post("/refer/observables", &self.token(), list(observables)).await.json()
    }

    /// Sends `bytes` as they are and reads until the relay closes the connection or is silent for
    /// a second.
    pub(crate) async fn raw(&self, bytes: &[u8]) -> String {
        self.converse(bytes, Duration::from_secs(1)).await
    }

    /// As [`TestRelay::raw`], for a request after which the relay closes, however long it takes.
    pub(crate) async fn raw_and_close(&self, bytes: &[u8]) -> String {
        self.converse(bytes, Duration::from_secs(60)).await
    }

    async fn converse(&self, bytes: &[u8], patience: Duration) -> String {
        Self::converse_on(self.connect().await, bytes, patience).await
    }

    /// Sends `bytes` on `stream` and reads until it is closed, or silent for so long.
    pub(crate) async fn converse_on(mut stream: Connection, bytes: &[u8], patience: Duration) -> String {
        // The relay may answer and close before it has read everything.
        let _ = stream.write_all(bytes).await;
        let _ = stream.flush().await;
        let mut answer = Vec::new();
        let mut part = [0; 4096];
        while let Ok(Ok(read @ 1..)) = tokio::time::timeout(patience, stream.read(&mut part)).await {
            answer.extend_from_slice(&part[..read]);
        }
        String::from_utf8_lossy(&answer).into_owned()
    }
}

impl Drop for TestRelay {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// The settings that lead a relay to `sandbox`.
pub(crate) fn sandbox_settings(sandbox: &Sandbox, ca_file: &str) -> Vec<(String, String)> {
    [
        ("RELAY_AUTH_AUDIENCES", AUDIENCE.to_owned()),
        ("RELAY_AUTH_JWKS_HOSTS", sandbox.issuer.host()),
        ("RELAY_CYBERSCAN_HOSTS", sandbox.cyberscan.host()),
        ("RELAY_EGRESS_ALLOW_CIDRS", "127.0.0.0/8,::1/128".to_owned()),
        ("RELAY_EGRESS_EXTRA_CA_FILE", ca_file.to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.headers.get(header::CONTENT_TYPE).unwrap(), "application/json");
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// `[{"type", "value"}]`.
pub(crate) fn list(observables: &[(&str, &str)]) -> String {
    let list: Vec<Value> =
        observables.iter().map(|(kind, value)| json!({"type": kind, "value": value})).collect();
    Value::from(list).to_string()
}

/// The codes of the errors in an answer.
pub(crate) fn codes(answer: &Value) -> Vec<&str> {
    answer["errors"].as_array().into_iter().flatten().map(|error| error["code"].as_str().unwrap()).collect()
}

/// The values of the observables that sightings in an answer are about, in order, each once.
pub(crate) fn seen(answer: &Value) -> Vec<&str> {
    let docs = answer["data"]["sightings"]["docs"].as_array().into_iter().flatten();
    let mut values: Vec<&str> = docs.map(|doc| doc["observables"][0]["value"].as_str().unwrap()).collect();
    values.dedup();
    values
}
