//! Owns the fake CyberScan: its API (CONTRACT §4), the record of every call, and the script of its misbehaviour.
//! Must not know the data it answers from (`data`) nor how connections come about (`tls`).

use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{
        Arc, LazyLock, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use aws_lc_rs::hmac;
use bytes::Bytes;
use flate2::{Compress, Compression, Crc, FlushCompress};
use futures_util::{StreamExt, stream};
use http::{HeaderMap, Method, Request, Response, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    data::Data,
    jws, lock,
    tls::{self, Answer, Body, Lifetime, Listener},
    unix_now,
};

/// "About 100 minutes" (CONTRACT §4).
const TOKEN_LIFE: Duration = Duration::from_secs(100 * 60);
const BODY_LIMIT: usize = 64 * 1024;

/// The calls of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// `POST /api/v1/token`; its value is the API key.
    Token,
    /// `GET /api/v1/domain/{domain}`.
    Domain,
    /// `GET /api/v1/ip/{ip}`.
    Ip,
    /// `GET /api/v1/vulnerabilities/ip/{ip}`.
    Vulnerabilities,
    /// Anything else; its value is the method and the path.
    Other,
}

/// One call that arrived.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// Which call.
    pub call: Call,
    /// The domain, address or API key asked with, percent-decoded, otherwise as it came.
    pub value: String,
    /// The status it was given; `None` where no answer was ever to come.
    pub status: Option<u16>,
    /// When it arrived, before any delay.
    pub when: Instant,
    /// Whether an `Authorization` header came along, good or bad.
    pub authorization: bool,
}

/// What to do instead of the normal answer. Apart from those that end in the normal answer, they look at no token.
#[derive(Clone, Debug)]
pub enum Behaviour {
    /// This status and body.
    Status {
        /// The status code.
        code: u16,
        /// The `Retry-After` header, as it shall stand there.
        retry_after: Option<String>,
        /// The body.
        body: String,
    },
    /// 200 and this body, verbatim.
    Json(String),
    /// 200 and these bytes.
    Body(Bytes),
    /// The normal answer, this much later than [`FakeCyberScan::latency`] has it.
    Delay(Duration),
    /// Never an answer.
    Hang,
    /// The normal headers, then the normal body byte by byte.
    Drip {
        /// The pause before each byte.
        every: Duration,
    },
    /// Closes the connection instead.
    CloseBeforeAnswer,
    /// The normal answer with too big a `Content-Length`; then closes.
    TruncateBody,
    /// The normal answer as gzip that ends in its middle, under this status.
    CutGzip {
        /// The status code.
        code: u16,
    },
    /// A redirect.
    Redirect {
        /// The `Location` header.
        location: String,
        /// The status code.
        code: u16,
    },
    /// About 100 KB of gzip that inflate to 100 MB of blanks.
    GzipBomb,
    /// A list of findings that never ends.
    EndlessBody,
    /// Fails evenly spread calls, the others get the normal answer: with 25 every fourth.
    FailShare {
        /// How many of a hundred fail.
        percent: u8,
        /// The status code of those.
        code: u16,
    },
}

/// Which calls misbehave, and how. The first rule that matches a call decides.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Only this call; `None`: every call.
    pub call: Option<Call>,
    /// Only this value; `None`: every value.
    pub value: Option<String>,
    /// How many calls it applies to before it is spent; `None`: without end.
    pub times: Option<u32>,
    /// What happens.
    pub behaviour: Behaviour,
}

impl Rule {
    /// A rule for every call. Until told otherwise it answers 500.
    #[must_use]
    pub fn any() -> Self {
        Self { call: None, value: None, times: None, behaviour: status(500, None) }
    }

    /// A rule for one kind of call. Until told otherwise it answers 500.
    #[must_use]
    pub fn on(call: Call) -> Self {
        Self { call: Some(call), ..Self::any() }
    }

    /// Only for this value.
    #[must_use]
    pub fn value(self, value: &str) -> Self {
        Self { value: Some(value.to_owned()), ..self }
    }

    /// Only so many times.
    #[must_use]
    pub fn times(self, times: u32) -> Self {
        Self { times: Some(times), ..self }
    }

    /// Answers this status with a small body.
    #[must_use]
    pub fn answer(self, code: u16) -> Self {
        self.does(status(code, None))
    }

    /// Answers this status with a `Retry-After` header.
    #[must_use]
    pub fn answer_retry_after(self, code: u16, retry_after: &str) -> Self {
        self.does(status(code, Some(retry_after.to_owned())))
    }

    /// Does this.
    #[must_use]
    pub fn does(self, behaviour: Behaviour) -> Self {
        Self { behaviour, ..self }
    }

    fn matches(&self, call: Call, value: &str) -> bool {
        self.call.is_none_or(|only| only == call) && self.value.as_deref().is_none_or(|only| only == value)
    }
}

fn status(code: u16, retry_after: Option<String>) -> Behaviour {
    Behaviour::Status { code, retry_after, body: json!({ "error": format!("scripted {code}") }).to_string() }
}

/// A cheap handle on the fake CyberScan.
#[derive(Clone)]
pub struct FakeCyberScan {
    shared: Arc<Shared>,
}

struct Shared {
    host: String,
    connections: Arc<AtomicU64>,
    state: Mutex<State>,
}

struct State {
    keys: HashSet<String>,
    tokens: HashMap<String, Grant>,
    /// Tells apart tokens issued in the same instant.
    issued: u64,
    signing: hmac::Key,
    token_life: Duration,
    latency: Duration,
    /// Each rule and how many calls it was applied to.
    script: Vec<(Rule, u32)>,
    calls: Vec<Recorded>,
    data: Data,
    /// What is known to one API key, in place of `data`.
    own: HashMap<String, Data>,
}

struct Grant {
    key: String,
    until: Instant,
}

impl FakeCyberScan {
    pub(super) fn start(listener: Listener, name: &str, lifetime: Lifetime) -> io::Result<Self> {
        let state = State {
            keys: HashSet::new(),
            tokens: HashMap::new(),
            issued: 0,
            signing: hmac::Key::new(hmac::HMAC_SHA256, b"known to CyberScan alone"),
            token_life: TOKEN_LIFE,
            latency: Duration::ZERO,
            script: Vec::new(),
            calls: Vec::new(),
            data: Data::default(),
            own: HashMap::new(),
        };
        let shared = Shared {
            host: format!("{name}:{}", listener.port()?),
            connections: listener.connections(),
            state: Mutex::new(state),
        };
        let cyberscan = Self { shared: Arc::new(shared) };
        listener.serve(cyberscan.clone(), lifetime);
        Ok(cyberscan)
    }

    /// Where it listens, as a token's `host` has it: `localhost:41234`.
    #[must_use]
    pub fn host(&self) -> String {
        self.shared.host.clone()
    }

    /// Gives access tokens for this API key from now on.
    pub fn accept_key(&self, key: &str) {
        self.state(|state| state.keys.insert(key.to_owned()));
    }

    /// Answers 403 to this API key from now on, and 401 to the access tokens it was given.
    pub fn revoke_key(&self, key: &str) {
        self.state(|state| {
            state.keys.remove(key);
            state.tokens.retain(|_, grant| grant.key != key);
        });
    }

    /// How long access tokens issued from now on are good for.
    pub fn set_token_life(&self, life: Duration) {
        self.state(|state| state.token_life = life);
    }

    /// Answers 401 to every access token issued so far.
    pub fn invalidate_tokens(&self) {
        self.state(|state| state.tokens.clear());
    }

    /// Sets the answer to `GET /domain/{domain}`.
    pub fn set_domain(&self, domain: &str, record: &Value) {
        self.state(|state| state.data.set_domain(domain, record));
    }

    /// Sets the answer to `GET /ip/{ip}`.
    pub fn set_ip(&self, ip: &str, record: &Value) {
        self.state(|state| state.data.set_ip(ip, record));
    }

    /// Sets the answer to `GET /vulnerabilities/ip/{ip}`, the whole body.
    pub fn set_vulnerabilities(&self, ip: &str, record: &Value) {
        self.state(|state| state.data.set_vulnerabilities(ip, record));
    }

    /// Sets the answer to `GET /vulnerabilities/ip/{ip}` for one API key. From then on that key gets the
    /// answers set for it and those built in, none that were set for all.
    pub fn set_vulnerabilities_for(&self, key: &str, ip: &str, record: &Value) {
        self.state(|state| state.own.entry(key.to_owned()).or_default().set_vulnerabilities(ip, record));
    }

    /// Makes every answer take this long.
    pub fn latency(&self, latency: Duration) {
        self.state(|state| state.latency = latency);
    }

    /// Adds a rule behind those already there.
    pub fn script(&self, rule: Rule) {
        self.state(|state| state.script.push((rule, 0)));
    }

    /// As `rule` says and no other, without a moment of good behaviour in between.
    pub fn script_only(&self, rule: Rule) {
        self.state(|state| state.script = vec![(rule, 0)]);
    }

    /// Behaves again.
    pub fn clear_script(&self) {
        self.state(|state| state.script.clear());
    }

    /// Every call since the start or [`reset_counts`](Self::reset_counts), in order of arrival. They are all kept: a long
    /// load test resets them now and then, or [takes](Self::take_calls) them.
    #[must_use]
    pub fn calls(&self) -> Vec<Recorded> {
        self.state(|state| state.calls.clone())
    }

    /// As [`calls`](Self::calls), and forgets them: of those that are taken again and again none is missed.
    #[must_use]
    pub fn take_calls(&self) -> Vec<Recorded> {
        self.state(|state| std::mem::take(&mut state.calls))
    }

    /// How many calls of a kind arrived.
    #[must_use]
    pub fn count(&self, call: Call) -> usize {
        self.state(|state| state.calls.iter().filter(|it| it.call == call).count())
    }

    /// How many calls of a kind arrived for this value.
    #[must_use]
    pub fn count_of(&self, call: Call, value: &str) -> usize {
        self.state(|state| state.calls.iter().filter(|it| it.call == call && it.value == value).count())
    }

    /// The access tokens issued since the start or [`invalidate_tokens`](Self::invalidate_tokens).
    #[must_use]
    pub fn access_tokens(&self) -> Vec<String> {
        self.state(|state| state.tokens.keys().cloned().collect())
    }

    /// How many TCP connections were accepted.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Forgets the recorded calls and counts connections from 0.
    pub fn reset_counts(&self) {
        self.state(|state| state.calls.clear());
        self.shared.connections.store(0, Ordering::Relaxed);
    }

    fn state<T>(&self, with: impl FnOnce(&mut State) -> T) -> T {
        with(&mut lock(&self.shared.state))
    }
}

impl Answer for FakeCyberScan {
    async fn answer(&self, request: Request<Incoming>) -> io::Result<Response<Body>> {
        let (parts, body) = request.into_parts();
        let body = Limited::new(body, BODY_LIMIT).collect().await.map_err(io::Error::other)?.to_bytes();
        let (call, value) = route(&parts.method, parts.uri.path(), &body);
        // Decided and recorded on arrival: who waits for a call to come in must see it although its answer hangs.
        let (latency, behaviour, normal) = self.state(|state| state.decide(call, value, &parts.headers));
        if !latency.is_zero() {
            tokio::time::sleep(latency).await;
        }
        match behaviour {
            Some(behaviour) => behave(behaviour, normal).await,
            None => Ok(normal.into_response()),
        }
    }
}

/// Which call a request is, and its value.
fn route(method: &Method, path: &str, body: &[u8]) -> (Call, String) {
    if method == Method::POST && path == "/api/v1/token" {
        let body: Value = serde_json::from_slice(body).unwrap_or_default();
        return (Call::Token, body.get("key").and_then(Value::as_str).unwrap_or_default().to_owned());
    }
    let get = path.strip_prefix("/api/v1/").filter(|_| method == Method::GET).unwrap_or_default();
    let calls =
        [(Call::Domain, "domain/"), (Call::Ip, "ip/"), (Call::Vulnerabilities, "vulnerabilities/ip/")];
    let known = calls.iter().find_map(|(call, prefix)| Some((*call, get.strip_prefix(prefix)?)));
    match known {
        Some((call, value)) if !value.is_empty() && !value.contains('/') => (call, percent_decoded(value)),
        _ => (Call::Other, format!("{method} {path}")),
    }
}

fn percent_decoded(segment: &str) -> String {
    let mut pieces = segment.split('%');
    let mut decoded = pieces.next().unwrap_or_default().as_bytes().to_vec();
    for piece in pieces {
        let digits = piece.split_at_checked(2);
        match digits.and_then(|(digits, rest)| Some((u8::from_str_radix(digits, 16).ok()?, rest))) {
            Some((byte, rest)) => {
                decoded.push(byte);
                decoded.extend_from_slice(rest.as_bytes());
            }
            None => decoded.extend([b"%", piece.as_bytes()].concat()),
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

/// The answer a well-behaved CyberScan gives.
struct Normal {
    code: u16,
    body: String,
}

impl Normal {
    fn error(code: u16, why: &str) -> Self {
        Self { code, body: json!({ "error": why }).to_string() }
    }

    fn into_response(self) -> Response<Body> {
        tls::json(self.code, tls::whole(self.body))
    }
}

impl State {
    /// Decides a call and writes it down: the latency, the misbehaviour if any, and the normal answer.
    fn decide(
        &mut self,
        call: Call,
        value: String,
        headers: &HeaderMap,
    ) -> (Duration, Option<Behaviour>, Normal) {
        let now = Instant::now();
        let authorization = headers.get(header::AUTHORIZATION);
        let bearer = authorization.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let behaviour = self.scripted(call, &value);
        let normal = self.normal(call, &value, bearer, now);
        let status = match &behaviour {
            Some(Behaviour::Hang | Behaviour::CloseBeforeAnswer) => None,
            Some(
                Behaviour::Status { code, .. }
                | Behaviour::Redirect { code, .. }
                | Behaviour::CutGzip { code },
            ) => Some(*code),
            Some(Behaviour::Json(_) | Behaviour::Body(_) | Behaviour::GzipBomb | Behaviour::EndlessBody) => {
                Some(200)
            }
            None
            | Some(
                Behaviour::Delay(_)
                | Behaviour::Drip { .. }
                | Behaviour::TruncateBody
                | Behaviour::FailShare { .. },
            ) => Some(normal.code),
        };
        self.calls.push(Recorded { call, value, status, when: now, authorization: authorization.is_some() });
        (self.latency, behaviour, normal)
    }

    /// The behaviour of the first rule that matches and is not spent. A share that spares this call is none.
    fn scripted(&mut self, call: Call, value: &str) -> Option<Behaviour> {
        let (rule, applied) = self.script.iter_mut().find(|(rule, applied)| {
            rule.matches(call, value) && rule.times.is_none_or(|times| *applied < times)
        })?;
        let before = u64::from(*applied);
        *applied = applied.saturating_add(1);
        match rule.behaviour.clone() {
            Behaviour::FailShare { percent, code } => {
                let failures = |calls: u64| calls * u64::from(percent) / 100;
                (failures(before + 1) > failures(before)).then(|| status(code, None))
            }
            behaviour => Some(behaviour),
        }
    }

    fn normal(&mut self, call: Call, value: &str, bearer: Option<&str>, now: Instant) -> Normal {
        if call == Call::Token {
            return self.issue(value, now);
        }
        let grant = bearer.and_then(|token| self.tokens.get(token)).filter(|grant| now < grant.until);
        let Some(grant) = grant else {
            return Normal::error(401, "missing, unknown or expired access token");
        };
        let data = self.own.get(&grant.key).unwrap_or(&self.data);
        let found = match call {
            Call::Domain => data.domain(value),
            Call::Ip => data.ip(value),
            Call::Vulnerabilities => data.vulnerabilities(value),
            Call::Token | Call::Other => None,
        };
        found.map_or_else(|| Normal::error(404, "not found"), |body| Normal { code: 200, body })
    }

    fn issue(&mut self, key: &str, now: Instant) -> Normal {
        if !self.keys.contains(key) {
            return Normal::error(403, "invalid API key");
        }
        self.issued += 1;
        let claims = json!({ "jti": self.issued, "expires": unix_now() + self.token_life.as_secs_f64() });
        let token = jws(&json!({"alg": "HS256", "typ": "JWT"}), &claims, |input| {
            hmac::sign(&self.signing, input).as_ref().to_vec()
        });
        self.tokens.retain(|_, grant| now < grant.until);
        self.tokens.insert(token.clone(), Grant { key: key.to_owned(), until: now + self.token_life });
        Normal { code: 200, body: json!({ "access_token": token }).to_string() }
    }
}

async fn behave(behaviour: Behaviour, normal: Normal) -> io::Result<Response<Body>> {
    Ok(match behaviour {
        Behaviour::Status { code, retry_after, body } => {
            let response = tls::json(code, tls::whole(body));
            match retry_after {
                Some(value) => tls::with_header(response, header::RETRY_AFTER, &value),
                None => response,
            }
        }
        Behaviour::Json(body) => tls::json(200, tls::whole(body)),
        Behaviour::Body(body) => tls::json(200, tls::whole(body)),
        Behaviour::Delay(delay) => {
            tokio::time::sleep(delay).await;
            normal.into_response()
        }
        Behaviour::Hang => std::future::pending().await,
        Behaviour::Drip { every } => {
            let (code, length) = (normal.code, normal.body.len());
            let bytes = stream::unfold(normal.body.into_bytes().into_iter(), move |mut bytes| async move {
                let byte = bytes.next()?;
                tokio::time::sleep(every).await;
                Some((Ok(Bytes::copy_from_slice(&[byte])), bytes))
            });
            with_length(tls::json(code, tls::streamed(bytes)), length)
        }
        Behaviour::CloseBeforeAnswer => return Err(io::ErrorKind::ConnectionAborted.into()),
        Behaviour::TruncateBody => {
            let (code, length) = (normal.code, normal.body.len() + 50);
            // A pending body makes hyper flush; an error at once would take head and body with it.
            let broken = stream::once(async {
                tokio::task::yield_now().await;
                Err(io::ErrorKind::UnexpectedEof.into())
            });
            let body = stream::iter([Ok(normal.body.into())]).chain(broken);
            with_length(tls::json(code, tls::streamed(body)), length)
        }
        Behaviour::CutGzip { code } => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), Compression::default());
            io::Write::write_all(&mut gzip, normal.body.as_bytes())?;
            let mut body = gzip.finish()?;
            body.truncate(body.len() / 2);
            tls::with_header(tls::json(code, tls::whole(body)), header::CONTENT_ENCODING, "gzip")
        }
        Behaviour::Redirect { location, code } => {
            tls::with_header(tls::json(code, tls::whole("")), header::LOCATION, &location)
        }
        Behaviour::GzipBomb => {
            tls::with_header(tls::json(200, tls::whole(GZIP_BOMB.clone())), header::CONTENT_ENCODING, "gzip")
        }
        Behaviour::EndlessBody => {
            let finding =
                r#"{"name":"Endless","severity":"Low","port":1,"protocol":"tcp","cve":"","cvss":1},"#;
            tls::json(200, tls::endless(r#"{"ip":"x","vulnerabilities":["#, finding.repeat(100).into()))
        }
        // `State::scripted` has already made of it a status or nothing.
        Behaviour::FailShare { .. } => normal.into_response(),
    })
}

fn with_length(response: Response<Body>, length: usize) -> Response<Body> {
    tls::with_header(response, header::CONTENT_LENGTH, &length.to_string())
}

/// One megabyte of blanks, compressed with a full flush at its end so that it may be repeated, a hundred times over.
static GZIP_BOMB: LazyLock<Bytes> = LazyLock::new(|| {
    const REPEATS: usize = 100;
    let blanks = vec![b' '; 1_000_000];
    let mut deflated = Vec::with_capacity(16 * 1024);
    let mut part = Crc::new();
    part.update(&blanks);
    Compress::new(Compression::best(), false)
        .compress_vec(&blanks, &mut deflated, FlushCompress::Full)
        .expect("a fresh compressor takes any input");
    let mut whole = Crc::new();
    let mut bomb = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];
    for _ in 0..REPEATS {
        bomb.extend_from_slice(&deflated);
        whole.combine(&part);
    }
    // An empty last block, then the trailer of RFC 1952.
    bomb.extend_from_slice(&[3, 0]);
    bomb.extend_from_slice(&whole.sum().to_le_bytes());
    bomb.extend_from_slice(&whole.amount().to_le_bytes());
    bomb.into()
});

#[cfg(test)]
mod tests {
    use std::error::Error;

    use super::{
        super::{
            API_KEY, Sandbox,
            tests::{client, sandbox},
        },
        *,
    };

    const KNOWN: &str = "vulnerabilities/ip/203.0.113.10";

    /// A sandbox, a client of it, and a good access token.
    struct Fixture {
        sandbox: Sandbox,
        client: reqwest::Client,
        token: String,
    }

    impl Fixture {
        async fn new() -> Self {
            let sandbox = sandbox().await;
            let client = client(&sandbox);
            let mut fixture = Self { sandbox, client, token: String::new() };
            fixture.token = fixture.fresh_token().await;
            fixture.fake().reset_counts();
            fixture
        }

        fn fake(&self) -> &FakeCyberScan {
            &self.sandbox.cyberscan
        }

        fn url(&self, path: &str) -> String {
            format!("https://{}/api/v1/{path}", self.fake().host())
        }

        async fn post_key(&self, key: &str) -> reqwest::Response {
            let body = json!({ "key": key }).to_string();
            self.client.post(self.url("token")).body(body).send().await.unwrap()
        }

        async fn fresh_token(&self) -> String {
            let body = self.post_key(API_KEY).await.text().await.unwrap();
            let body: Value = serde_json::from_str(&body).unwrap();
            body["access_token"].as_str().unwrap().to_owned()
        }

        async fn get(&self, path: &str) -> reqwest::Result<reqwest::Response> {
            self.client
                .get(self.url(path))
                .bearer_auth(&self.token)
                .timeout(Duration::from_secs(10))
                .send()
                .await
        }

        async fn status(&self, path: &str) -> u16 {
            self.get(path).await.unwrap().status().as_u16()
        }

        async fn scripted(&self, behaviour: Behaviour) -> reqwest::Result<reqwest::Response> {
            self.fake().clear_script();
            self.fake().script(Rule::any().does(behaviour));
            self.get(KNOWN).await
        }
    }

    #[tokio::test]
    async fn a_key_is_exchanged_for_a_token_that_opens_the_data() {
        let it = Fixture::new().await;
        assert_eq!(it.post_key("wrong").await.status(), 403);
        let body = it.get("domain/shop.example").await.unwrap().text().await.unwrap();
        assert!(
            body.starts_with(r#"{"domain":"shop.example","ip":"203.0.113.10","vulns":{"critical":1,"#),
            "{body}"
        );
        assert_eq!(it.status("ip/203.0.113.10").await, 200);
        assert_eq!(it.status(KNOWN).await, 200);
        assert_eq!(it.status("ip/192.0.2.1").await, 404);
        assert_eq!(it.status("domain/unknown.example").await, 404);
        assert_eq!(it.status("elsewhere").await, 404);
        let anonymous = it.client.get(it.url(KNOWN)).send().await.unwrap();
        assert_eq!(anonymous.status(), 401);
        let recorded = it.fake().calls().pop().unwrap();
        assert_eq!((recorded.status, recorded.authorization), (Some(401), false));
    }

    #[tokio::test]
    async fn a_token_carries_the_float_expires_and_is_refused_after_it() {
        let it = Fixture::new().await;
        let payload = it.token.split('.').nth(1).unwrap();
        let payload =
            base64::Engine::decode(&base64::engine::general_purpose::URL_SAFE_NO_PAD, payload).unwrap();
        let payload: Value = serde_json::from_slice(&payload).unwrap();
        let left = payload["expires"].as_f64().unwrap() - unix_now();
        assert!(payload["expires"].is_f64() && (5900.0..=6000.0).contains(&left), "{payload}");

        it.fake().set_token_life(Duration::ZERO);
        let it = Fixture { token: it.fresh_token().await, ..it };
        assert_eq!(it.status(KNOWN).await, 401);
    }

    #[tokio::test]
    async fn a_revoked_key_takes_its_tokens_with_it_and_invalidated_tokens_can_be_replaced() {
        let it = Fixture::new().await;
        it.fake().invalidate_tokens();
        assert_eq!(it.status(KNOWN).await, 401);
        let it = Fixture { token: it.fresh_token().await, ..it };
        assert_eq!(it.status(KNOWN).await, 200);
        it.fake().accept_key("second");
        it.fake().revoke_key(API_KEY);
        assert_eq!(it.status(KNOWN).await, 401);
        assert_eq!(it.post_key(API_KEY).await.status(), 403);
        assert_eq!(it.post_key("second").await.status(), 200);
    }

    #[tokio::test]
    async fn calls_and_connections_are_counted_until_reset() {
        let it = Fixture::new().await;
        for path in
            ["ip/2001%3adb8::1", "ip/203.0.113.10", "ip/203.0.113.10", "domain/mail.example", "nothing"]
        {
            // Read to its end, so that the connection can be used again.
            it.get(path).await.unwrap().bytes().await.unwrap();
        }
        let fake = it.fake();
        assert_eq!(fake.count(Call::Ip), 3);
        assert_eq!(fake.count_of(Call::Ip, "203.0.113.10"), 2);
        assert_eq!(fake.count_of(Call::Ip, "2001:db8::1"), 1);
        assert_eq!(fake.count_of(Call::Other, "GET /api/v1/nothing"), 1);
        assert_eq!(fake.count(Call::Token), 0);
        assert!(fake.connections() < 5, "connections are kept alive");
        let calls = fake.calls();
        assert_eq!(
            calls.iter().map(|call| call.status.unwrap()).collect::<Vec<_>>(),
            [404, 200, 200, 200, 404]
        );
        assert!(calls.is_sorted_by_key(|call| call.when));
        fake.reset_counts();
        assert!(fake.calls().is_empty());
    }

    #[tokio::test]
    async fn the_first_matching_rule_wins_until_it_is_spent() {
        let it = Fixture::new().await;
        it.fake().script(Rule::on(Call::Vulnerabilities).value("203.0.113.10").times(2).answer(503));
        it.fake().script(Rule::on(Call::Vulnerabilities).times(1).answer_retry_after(429, "7"));
        assert_eq!(it.status("ip/203.0.113.10").await, 200);
        assert_eq!(it.status(KNOWN).await, 503);
        assert_eq!(it.status(KNOWN).await, 503);
        let throttled = it.get(KNOWN).await.unwrap();
        assert_eq!(
            (throttled.status().as_u16(), &throttled.headers()["retry-after"]),
            (429, &"7".parse().unwrap())
        );
        assert_eq!(it.status(KNOWN).await, 200);
        it.fake().script(Rule::any());
        assert_eq!(it.post_key(API_KEY).await.status(), 500);
        it.fake().clear_script();
        assert_eq!(it.post_key(API_KEY).await.status(), 200);
    }

    #[tokio::test]
    async fn a_share_of_failures_is_spread_evenly() {
        let it = Fixture::new().await;
        it.fake()
            .script(Rule::on(Call::Vulnerabilities).does(Behaviour::FailShare { percent: 25, code: 502 }));
        let mut statuses = Vec::new();
        for _ in 0..8 {
            statuses.push(it.status(KNOWN).await);
        }
        assert_eq!(statuses, [200, 200, 200, 502, 200, 200, 200, 502]);
        assert_eq!(it.fake().calls().iter().filter(|call| call.status == Some(502)).count(), 2);
    }

    #[tokio::test]
    async fn answers_can_be_verbatim_redirected_or_late() {
        let it = Fixture::new().await;
        let normal = it.get(KNOWN).await.unwrap().text().await.unwrap();
        let verbatim = it.scripted(Behaviour::Json("{\"a\":1,\"a\":NaN}".to_owned())).await.unwrap();
        assert_eq!(verbatim.text().await.unwrap(), "{\"a\":1,\"a\":NaN}");
        let redirect = Behaviour::Redirect { location: "https://other.example/".to_owned(), code: 307 };
        let redirect = it.scripted(redirect).await.unwrap();
        assert_eq!(redirect.status(), 307);
        assert_eq!(redirect.headers()["location"], "https://other.example/");

        let start = Instant::now();
        it.fake().latency(Duration::from_millis(50));
        let late = it.scripted(Behaviour::Delay(Duration::from_millis(50))).await.unwrap();
        assert_eq!(late.text().await.unwrap(), normal);
        assert!(start.elapsed() >= Duration::from_millis(100));
    }

    #[tokio::test]
    async fn a_dripped_body_is_the_normal_one_slowly() {
        let it = Fixture::new().await;
        let normal = it.get("ip/203.0.113.77").await.unwrap().text().await.unwrap();
        it.fake().script(Rule::any().does(Behaviour::Drip { every: Duration::from_millis(1) }));
        let start = Instant::now();
        let dripped = it.get("ip/203.0.113.77").await.unwrap();
        assert_eq!(dripped.content_length(), Some(normal.len() as u64));
        assert_eq!(dripped.text().await.unwrap(), normal);
        assert!(start.elapsed() >= Duration::from_millis(normal.len() as u64));
    }

    #[tokio::test]
    async fn a_hanging_call_is_recorded_while_it_hangs() {
        let it = Fixture::new().await;
        it.fake().script(Rule::any().does(Behaviour::Hang));
        let arrived = async {
            while it.fake().count(Call::Vulnerabilities) == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            answer = it.get(KNOWN) => panic!("{answer:?}"),
            () = arrived => assert_eq!(it.fake().calls()[0].status, None),
        }
    }

    #[tokio::test]
    async fn connections_break_before_the_answer_or_within_the_body() {
        let it = Fixture::new().await;
        let closed = it.scripted(Behaviour::CloseBeforeAnswer).await.unwrap_err();
        assert!(closed.is_request() && !closed.is_timeout(), "{closed:?}");
        let mut truncated = it.scripted(Behaviour::TruncateBody).await.unwrap();
        assert_eq!(truncated.status(), 200);
        assert!(truncated.chunk().await.unwrap().unwrap().starts_with(b"{\"ip\""));
        let broken = truncated.chunk().await.unwrap_err();
        assert!(!broken.is_timeout() && broken.source().is_some(), "{broken:?}");
    }

    #[tokio::test]
    async fn the_gzip_bomb_is_small_on_the_wire_and_inflates_to_a_hundred_megabytes() {
        let it = Fixture::new().await;
        assert!((90_000..200_000).contains(&GZIP_BOMB.len()), "{}", GZIP_BOMB.len());
        let mut answer = it.scripted(Behaviour::GzipBomb).await.unwrap();
        let mut read = 0;
        while read < 5_000_000 {
            read += answer.chunk().await.unwrap().unwrap().len();
        }
        // The whole of it, without the slow client: checksum and length must hold as well.
        let mut inflated = flate2::read::GzDecoder::new(&GZIP_BOMB[..]);
        assert_eq!(io::copy(&mut inflated, &mut io::sink()).unwrap(), 100_000_000);
    }

    #[tokio::test]
    async fn an_endless_body_does_not_end() {
        let it = Fixture::new().await;
        let mut answer = it.scripted(Behaviour::EndlessBody).await.unwrap();
        let mut read = 0;
        while read < 3_000_000 {
            read += answer.chunk().await.unwrap().unwrap().len();
        }
    }

    #[test]
    fn percent_signs_are_decoded_where_they_mean_something() {
        assert_eq!(percent_decoded("2001%3Adb8%3a%3A1"), "2001:db8::1");
        assert_eq!(percent_decoded("b%C3%BCcher"), "bücher");
        assert_eq!(percent_decoded("100%"), "100%");
        assert_eq!(percent_decoded("%zz%é"), "%zz%é");
    }
}
