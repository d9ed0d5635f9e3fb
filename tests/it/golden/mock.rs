//! The world behind the relay, as `tests/golden/mock.json` describes it: key issuers and CyberScan
//! over TLS, behind an HTTP CONNECT proxy that finds every host and plays the connection faults.
//!
//! HTTP is read and written by hand here: broken answers are half of what this is for. It knows
//! nothing of the cases and judges nothing; it notes what it was asked ([`Upstream`]).

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, date_time_ymd};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};
use serde::Deserialize;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::sleep,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

const JWKS: &str = "/.well-known/jwks";
const TOKEN: &str = "/api/v1/token";
/// How long a silent connection is kept: longer than any time-out of the relay.
const SILENCE: Duration = Duration::from_secs(60);

/// What the mock answers, and the keys it answers with. Shared by all mocks of a test.
pub(crate) struct World {
    script: Script,
    /// The posted keys as JSON values, so that spelling does not matter.
    tokens: Vec<(Value, Reply)>,
    any_token: Reply,
    ca: Issuer<'static, KeyPair>,
    stranger: Issuer<'static, KeyPair>,
    server_key: KeyPair,
    configs: Mutex<HashMap<(String, Certificate), Arc<ServerConfig>>>,
}

#[derive(Deserialize)]
struct Script {
    hosts: BTreeMap<String, Host>,
    jwks: BTreeMap<String, Reply>,
    token: BTreeMap<String, Reply>,
    domain: BTreeMap<String, Reply>,
    ip: BTreeMap<String, Reply>,
    vulnerabilities: BTreeMap<String, Reply>,
    extra: BTreeMap<String, Reply>,
    no_route: Reply,
}

#[derive(Deserialize)]
struct Host {
    dial: Dial,
}

/// What becomes of a connection.
#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Dial {
    Tls,
    Refused,
    Nxdomain,
    Blackhole,
    Selfsigned,
    Expired,
    Wronghost,
    Untrusted,
    Plain,
    Garbage,
    Hang,
    Close,
    TlsClose,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Certificate {
    Good,
    SelfSigned,
    Expired,
    WrongHost,
    Untrusted,
}

#[derive(Deserialize, Clone)]
struct Reply {
    status: u16,
    headers: BTreeMap<String, String>,
    #[serde(default)]
    body: String,
    body_b64: Option<String>,
    delay_ms: Option<u64>,
    drip_ms: Option<u64>,
    action: Option<Action>,
}

/// How an answer breaks.
#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
enum Action {
    CloseBefore,
    Truncate,
    TruncateHalf,
    BadChunk,
    BadStatusLine,
    GarbageBefore,
    GarbageInBody,
}

impl World {
    /// Reads `mock.json` and `keys/` in `directory`.
    pub(crate) fn load(directory: &Path) -> Self {
        let read = |name: &str| {
            std::fs::read_to_string(directory.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
        };
        let key = |name: &str| KeyPair::from_pem(&read(name)).expect("the keys are PKCS#8");
        let mut script: Script = serde_json::from_str(&read("mock.json")).expect("mock.json has its shape");
        let any_token = script.token.remove("*").expect("mock.json answers unknown keys");
        let parsed = |posted: &String| serde_json::from_str(posted).expect("posted keys are JSON");
        let tokens = script.token.iter().map(|(posted, reply)| (parsed(posted), reply.clone())).collect();
        Self {
            tokens,
            any_token,
            // Its certificate is keys/ca.crt.pem; issuing takes its name and key only.
            ca: Issuer::new(authority("golden test CA"), key("keys/ca.pem")),
            stranger: Issuer::new(
                authority("nobody's CA"),
                KeyPair::generate().expect("the system has randomness"),
            ),
            server_key: key("keys/tls_server.pem"),
            configs: Mutex::default(),
            script,
        }
    }

    /// The hosts that a relay should take for key issuers: those of `mock.json` and those where
    /// connecting fails, but neither the attacker's nor addresses and single labels.
    pub(crate) fn jwks_hosts(&self) -> Vec<&str> {
        let faulty = self.script.hosts.iter().filter(|(_, host)| host.dial != Dial::Tls);
        self.script
            .jwks
            .keys()
            .chain(faulty.map(|(name, _)| name))
            .map(String::as_str)
            .filter(|name| name.ends_with(".test") && *name != "jwks-attacker.test")
            .collect()
    }

    /// The access token that the API key `posted` gets, if it gets a usable one.
    pub(crate) fn access_token(&self, posted: &Value) -> Option<String> {
        let reply = self.token_reply(posted);
        let body: Value = serde_json::from_str(&reply.body).ok()?;
        Some(body.get("access_token")?.as_str()?.to_owned())
    }

    fn token_reply(&self, posted: &Value) -> &Reply {
        self.tokens.iter().find(|(known, _)| known == posted).map_or(&self.any_token, |(_, reply)| reply)
    }

    fn reply(&self, host: &str, request: &Request) -> &Reply {
        let script = &self.script;
        let Request { method, target, .. } = request;
        if let Some(reply) = script.extra.get(&format!("{method} {host} {target}")) {
            return reply;
        }
        match method.as_str() {
            "GET" if target == JWKS => script.jwks.get(host),
            "POST" if target == TOKEN => {
                let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
                Some(self.token_reply(body.get("key").unwrap_or(&Value::Null)))
            }
            "GET" => {
                let resources = [
                    ("/api/v1/vulnerabilities/ip/", &script.vulnerabilities),
                    ("/api/v1/domain/", &script.domain),
                    ("/api/v1/ip/", &script.ip),
                ];
                let asked = |(prefix, replies)| Some((target.strip_prefix(prefix)?, replies));
                resources.into_iter().find_map(asked).and_then(|(rest, replies)| resource(replies, rest))
            }
            _ => None,
        }
        .unwrap_or(&script.no_route)
    }

    /// How a connection to `host` is served with this certificate.
    fn tls(&self, host: &str, certificate: Certificate) -> Arc<ServerConfig> {
        let mut configs = self.configs.lock().expect("nothing panics with the lock");
        let config = configs.entry((host.to_owned(), certificate)).or_insert_with(|| {
            let chain = vec![self.certify(host, certificate)];
            let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.server_key.serialize_der()));
            let config =
                ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
                    .with_safe_default_protocol_versions()
                    .expect("the provider knows TLS 1.2 and 1.3")
                    .with_no_client_auth()
                    .with_single_cert(chain, key)
                    .expect("the certificate is the key's");
            Arc::new(config)
        });
        Arc::clone(config)
    }

    fn certify(&self, host: &str, certificate: Certificate) -> CertificateDer<'static> {
        let name = if certificate == Certificate::WrongHost { "somewhere-else.test" } else { host };
        let mut params = CertificateParams::new([name.to_owned()]).expect("host names are ASCII");
        params.distinguished_name.push(DnType::CommonName, name);
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = match certificate {
            Certificate::Expired => date_time_ymd(2021, 1, 1),
            _ => date_time_ymd(2099, 1, 1),
        };
        let signed = match certificate {
            Certificate::SelfSigned => params.self_signed(&self.server_key),
            Certificate::Untrusted => params.signed_by(&self.server_key, &self.stranger),
            _ => params.signed_by(&self.server_key, &self.ca),
        };
        signed.expect("the keys can sign").into()
    }
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
}

/// The reply for `rest` of a path: as it stands, else percent-decoded, else the default.
fn resource<'a>(replies: &'a BTreeMap<String, Reply>, rest: &str) -> Option<&'a Reply> {
    let decoded = percent_encoding::percent_decode_str(rest).decode_utf8_lossy();
    replies.get(rest).or_else(|| replies.get(decoded.as_ref())).or_else(|| replies.get("*"))
}

/// What the mock was asked since it was last looked at.
#[derive(Default)]
pub(crate) struct Upstream {
    /// The targets of CONNECT (`host:port`), and whatever else was sent to the proxy.
    pub(crate) connects: Vec<String>,
    pub(crate) requests: Vec<Asked>,
    /// Whether CyberScan failed in a way that a relay may remember: a broken connection or
    /// answer, a late one, a refused key, 429 or 5xx.
    pub(crate) trouble: bool,
}

/// A request that reached the mock.
pub(crate) struct Asked {
    /// The `host:port` the connection was made to.
    pub(crate) authority: String,
    /// The `Host` header.
    pub(crate) host: Option<String>,
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) authorization: Option<String>,
    pub(crate) user_agent: Option<String>,
    /// The status it was answered with.
    pub(crate) status: u16,
}

/// A running mock; dropping it stops it.
pub(crate) struct Mock {
    /// Where the proxy listens.
    pub(crate) address: SocketAddr,
    log: Arc<Mutex<Upstream>>,
    _accepting: JoinSet<()>,
}

impl Mock {
    /// Starts a proxy on a free port.
    pub(crate) async fn start(world: Arc<World>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("a bound socket has an address");
        let log = Arc::new(Mutex::default());
        let mut accepting = JoinSet::new();
        let shared = Arc::clone(&log);
        accepting.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let Ok((stream, _)) = accepted else { return };
                        let connection = Connection { world: Arc::clone(&world), log: Arc::clone(&shared) };
                        connections.spawn(connection.proxy(stream));
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Self { address, log, _accepting: accepting }
    }

    /// Takes the notes.
    pub(crate) fn take(&self) -> Upstream {
        std::mem::take(&mut *self.log.lock().expect("nothing panics with the lock"))
    }
}

/// One connection of the relay to the proxy.
struct Connection {
    world: Arc<World>,
    log: Arc<Mutex<Upstream>>,
}

impl Connection {
    /// Failures are the relay's hanging up, or faults that were asked for: nothing to report.
    async fn proxy(self, mut stream: TcpStream) {
        let Ok(Some(request)) = Request::read(&mut stream, &mut Vec::new()).await else { return };
        let Request { method, target, .. } = request;
        if method != "CONNECT" {
            self.note(|log| log.connects.push(format!("{method} {target} without CONNECT")));
            let _ = refuse(&mut stream).await;
            return;
        }
        self.note(|log| log.connects.push(target.clone()));
        let host = target.rsplit_once(':').map_or(target.as_str(), |(host, _)| host);
        let host = host.trim_matches(['[', ']']).to_lowercase();
        let dial = self.world.script.hosts.get(&host).map_or(Dial::Nxdomain, |host| host.dial);
        if dial != Dial::Tls {
            self.note(|log| log.trouble = true);
        }
        let _ = self.dial(stream, dial, &host, &target).await;
    }

    async fn dial(&self, mut stream: TcpStream, dial: Dial, host: &str, target: &str) -> io::Result<()> {
        let certificate = match dial {
            Dial::Refused | Dial::Nxdomain => return refuse(&mut stream).await,
            Dial::Blackhole => return silence(stream).await,
            _ => {
                stream.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await?;
                match dial {
                    Dial::Selfsigned => Certificate::SelfSigned,
                    Dial::Expired => Certificate::Expired,
                    Dial::Wronghost => Certificate::WrongHost,
                    Dial::Untrusted => Certificate::Untrusted,
                    _ => Certificate::Good,
                }
            }
        };
        match dial {
            Dial::Hang => return silence(stream).await,
            Dial::Close => return Ok(()),
            Dial::Plain | Dial::Garbage => {
                if stream.read(&mut [0; 4096]).await? == 0 {
                    return Ok(());
                }
                let said: &[u8] = if dial == Dial::Plain {
                    b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                } else {
                    GARBAGE
                };
                stream.write_all(said).await?;
                return stream.shutdown().await;
            }
            _ => {}
        }
        let acceptor = TlsAcceptor::from(self.world.tls(host, certificate));
        let mut stream = acceptor.accept(stream).await?;
        if dial == Dial::TlsClose {
            return stream.shutdown().await;
        }
        let mut buffer = Vec::new();
        while let Some(request) = Request::read(&mut stream, &mut buffer).await? {
            let reply = self.world.reply(host, &request);
            self.note(|log| {
                log.trouble |= request.target.starts_with("/api/") && reply.is_trouble();
                log.requests.push(request.asked(target, reply.status));
            });
            if !reply.play(&mut stream).await? {
                return stream.shutdown().await;
            }
        }
        Ok(())
    }

    fn note(&self, write: impl FnOnce(&mut Upstream)) {
        write(&mut self.log.lock().expect("nothing panics with the lock"));
    }
}

const GARBAGE: &[u8] = b"\x00\xff this is neither TLS nor HTTP \xfe\x01\r\n\r\n";

async fn refuse(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await?;
    stream.shutdown().await
}

async fn silence(stream: TcpStream) -> io::Result<()> {
    sleep(SILENCE).await;
    drop(stream);
    Ok(())
}

/// A request as it came in.
struct Request {
    method: String,
    target: String,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
}

impl Request {
    /// The next request of a connection, `None` at its end; `buffer` keeps what came too early.
    async fn read(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> io::Result<Option<Self>> {
        let end = loop {
            if let Some(at) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
                break at + 4;
            }
            if stream.read_buf(buffer).await? == 0 {
                return Ok(None);
            }
        };
        let head: Vec<u8> = buffer.drain(..end).collect();
        let head = String::from_utf8_lossy(&head);
        let mut lines = head.split("\r\n");
        let mut first = lines.next().unwrap_or_default().splitn(3, ' ').map(str::to_owned);
        let mut request = Self {
            method: first.next().unwrap_or_default(),
            target: first.next().unwrap_or_default(),
            headers: lines
                .filter_map(|line| line.split_once(':'))
                .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
                .collect(),
            body: Vec::new(),
        };
        let length = request.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
        while buffer.len() < length {
            if stream.read_buf(buffer).await? == 0 {
                return Ok(None);
            }
        }
        request.body = buffer.drain(..length).collect();
        Ok(Some(request))
    }

    fn header(&self, name: &str) -> Option<String> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone())
    }

    fn asked(&self, authority: &str, status: u16) -> Asked {
        Asked {
            authority: authority.to_owned(),
            host: self.header("host"),
            method: self.method.clone(),
            target: self.target.clone(),
            authorization: self.header("authorization"),
            user_agent: self.header("user-agent"),
            status,
        }
    }
}

impl Reply {
    fn is_trouble(&self) -> bool {
        let sound = matches!(self.status, 200..=299 | 404);
        !sound || self.action.is_some() || self.delay_ms.is_some() || self.drip_ms.is_some()
    }

    /// Writes the answer; whether the connection lives on.
    async fn play(&self, stream: &mut TlsStream<TcpStream>) -> io::Result<bool> {
        sleep(Duration::from_millis(self.delay_ms.unwrap_or(0))).await;
        let body = match &self.body_b64 {
            Some(encoded) => STANDARD.decode(encoded).expect("mock.json has base64 there"),
            None => self.body.clone().into_bytes(),
        };
        let (half, _) = body.split_at(body.len() / 2);
        let length = |length: usize| format!("Content-Length: {length}");
        match self.action {
            None => {
                let bodiless = matches!(self.status, 204 | 304);
                let framing = if bodiless { String::new() } else { length(body.len()) };
                stream.write_all(self.head(&framing).as_bytes()).await?;
                self.write_body(stream, &body).await?;
            }
            Some(Action::CloseBefore) => {}
            Some(Action::Truncate) => {
                stream.write_all(self.head(&length(body.len() + 50)).as_bytes()).await?;
                stream.write_all(&body).await?;
            }
            Some(Action::TruncateHalf) => {
                stream.write_all(self.head(&length(body.len())).as_bytes()).await?;
                stream.write_all(half).await?;
            }
            Some(Action::BadChunk) => {
                stream.write_all(self.head("Transfer-Encoding: chunked").as_bytes()).await?;
                stream.write_all(format!("{:x}\r\n", body.len()).as_bytes()).await?;
                stream.write_all(&body).await?;
                stream.write_all(b"\r\nzz\r\n").await?;
            }
            Some(Action::BadStatusLine) => stream.write_all(b"NONSENSE\r\n\r\n").await?,
            // Both break TLS itself: the garbage is no record.
            Some(Action::GarbageBefore) => stream.get_mut().0.write_all(GARBAGE).await?,
            Some(Action::GarbageInBody) => {
                stream.write_all(self.head(&length(body.len())).as_bytes()).await?;
                stream.write_all(half).await?;
                stream.flush().await?;
                stream.get_mut().0.write_all(GARBAGE).await?;
            }
        }
        stream.flush().await?;
        Ok(self.action.is_none())
    }

    fn head(&self, framing: &str) -> String {
        let mut head = format!("HTTP/1.1 {} Mocked\r\n", self.status);
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        if !framing.is_empty() {
            head += &format!("{framing}\r\n");
        }
        head + "\r\n"
    }

    async fn write_body(&self, stream: &mut (impl AsyncWrite + Unpin), body: &[u8]) -> io::Result<()> {
        let Some(pause) = self.drip_ms else { return stream.write_all(body).await };
        for byte in body {
            stream.write_all(std::slice::from_ref(byte)).await?;
            stream.flush().await?;
            sleep(Duration::from_millis(pause)).await;
        }
        Ok(())
    }
}
