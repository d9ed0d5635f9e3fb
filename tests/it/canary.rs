//! A hunt for what must never leave the process: secrets and observables nobody else has are sent through
//! everything the relay does, with whatever can go wrong, and then looked for in its logs (at their most
//! talkative), its metrics, its answers, and all that ever went to Redis.

use std::time::Duration;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use cyberscan_relay::{
    probe,
    sandbox::{Behaviour, IssuerBehaviour, Options, Rule, Sandbox},
};
use http::{Method, Request};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::{Instant, sleep},
};

use crate::{
    fleet::{PATIENT, RelayProcess},
    harness::{AUDIENCE, list},
    redis::RedisServer,
};

pub(crate) const KEY: &str = "canary-key-6e1f0a93c4d7";
const REFUSED: &str = "canary-key-refused-51b8e2";
const ADMIN: &str = "canary-admin-token-0d9c7f";
const PASSWORD: &str = "canary-password-a7c31e";
const SEAL: &str = "c0ffee00c0ffee11c0ffee22c0ffee33c0ffee44c0ffee55c0ffee66c0ffee77";
pub(crate) const IP: &str = "198.18.77.191";
pub(crate) const DOMAIN: &str = "n19911.load.example";

/// Texts to look for, in every form they might take on their way.
pub(crate) struct Canaries(Vec<(String, Vec<u8>)>);

impl Canaries {
    pub(crate) fn of(texts: &[&str]) -> Self {
        let mut forms = Vec::new();
        for text in texts {
            let bytes = text.as_bytes();
            let hex = bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            let percent = bytes.iter().map(|byte| format!("%{byte:02x}")).collect::<String>();
            forms.extend([(*text).to_owned(), hex.to_uppercase(), hex, percent.to_uppercase(), percent]);
            // At each place a text can have within base64; what its neighbours change is cut off.
            for before in 0..3 {
                let shifted = [&[0; 3][..before], bytes].concat();
                let encoded = STANDARD.encode(&shifted[..shifted.len() / 3 * 3]);
                let whole = encoded[(before * 4).div_ceil(3)..].to_owned();
                forms.extend([whole.replace('+', "-").replace('/', "_"), whole]);
            }
        }
        Self(forms.into_iter().map(|form| (form.clone(), form.into_bytes())).collect())
    }

    fn found_in<'a>(&'a self, place: &[u8]) -> Vec<&'a str> {
        let is_in = |needle: &[u8]| place.windows(needle.len()).any(|window| window == needle);
        self.0.iter().filter(|(_, needle)| is_in(needle)).map(|(form, _)| form.as_str()).collect()
    }

    #[track_caller]
    pub(crate) fn must_not_be_in(&self, what: &str, place: &[u8]) {
        let found = self.found_in(place);
        let line = found.first().and_then(|form| {
            let text = String::from_utf8_lossy(place);
            text.lines()
                .find(|line| line.contains(form))
                .map(|line| line.chars().take(600).collect::<String>())
        });
        assert!(found.is_empty(), "{what}: {found:?}, e.g. in {line:?}");
    }
}

#[test]
fn the_hunt_finds_a_canary_in_every_form() {
    let canaries = Canaries::of(&[KEY]);
    let hex: String = KEY.bytes().map(|byte| format!("{byte:02X}")).collect();
    let percent: String = KEY.bytes().map(|byte| format!("%{byte:02x}")).collect();
    for place in [
        format!("{{\"key\":\"{KEY}\"}}"),
        format!("key={hex}."),
        format!("GET /{percent} HTTP/1.1"),
        STANDARD.encode(format!("{{\"a\":\"{KEY}\"}}")),
        STANDARD.encode(format!("{{\"ab\":\"{KEY}\"}}")),
        STANDARD.encode(format!("{{\"abc\":\"{KEY}\"}}")),
    ] {
        assert!(!canaries.found_in(place.as_bytes()).is_empty(), "{place}");
    }
    assert!(canaries.found_in(b"nothing of that kind").is_empty());
}

/// Everything Redis is told, as it sees it.
async fn monitor(redis: &RedisServer) -> JoinHandle<Vec<u8>> {
    let mut stream = TcpStream::connect(("127.0.0.1", redis.port())).await.unwrap();
    // A pause between the two: the answer to each is read with it.
    stream.write_all(format!("AUTH {PASSWORD}\r\nMONITOR\r\n").as_bytes()).await.unwrap();
    let mut told = vec![0; 10];
    stream.read_exact(&mut told).await.unwrap();
    assert_eq!(told, b"+OK\r\n+OK\r\n");
    tokio::spawn(async move {
        let mut told = Vec::new();
        let _ = stream.read_to_end(&mut told).await;
        told
    })
}

/// What a client of the relay and its operator do, and what comes back.
struct Client<'a> {
    relay: &'a RelayProcess,
    errors: Vec<u8>,
}

impl Client<'_> {
    async fn post(&mut self, path: &str, token: &str, body: String) -> Value {
        let request = Request::post(path).header("host", "relay.test");
        let request = request.header("authorization", format!("Bearer {token}")).body(Full::from(body));
        let answer = probe::call(self.relay.address, request.unwrap()).await.unwrap();
        let body: Value = serde_json::from_slice(answer.body()).unwrap();
        self.errors.extend(body["errors"].to_string().into_bytes());
        body
    }

    /// Everything a tenant can ask.
    async fn ask(&mut self, token: &str) -> Vec<Value> {
        let about = list(&[("ip", IP), ("domain", DOMAIN)]);
        let mut answers = Vec::new();
        for (path, body) in [
            ("/health", String::new()),
            ("/observe/observables", about.clone()),
            ("/refer/observables", about),
            ("/observe/observables", format!("[{{\"type\": \"ip\", \"value\": \"{IP}\", \"odd\": \"{KEY}\"")),
        ] {
            answers.push(self.post(path, token, body).await);
        }
        answers
    }

    async fn administer(&self, method: Method, path: &str, body: String) -> Bytes {
        let request = Request::builder().method(method).uri(path).header("host", "localhost");
        let request = request.header("authorization", format!("Bearer {ADMIN}")).body(Full::from(body));
        probe::call(self.relay.admin, request.unwrap()).await.unwrap().into_body()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_secret_and_no_observable_is_found_where_it_does_not_belong() {
    let mut redis = RedisServer::process(&["--requirepass", PASSWORD, "--rdbcompression", "no"]).await;
    let sandbox = Sandbox::start(Options::default()).await.unwrap();
    let cyberscan = &sandbox.cyberscan;
    cyberscan.accept_key(KEY);
    let token_of = |key: &str| {
        let mut claims = sandbox.claims(AUDIENCE);
        claims["api_key"] = json!(key);
        sandbox.issuer.mint(&claims)
    };
    let (token, refused) = (token_of(KEY), token_of(REFUSED));
    let told = monitor(&redis).await;
    let relay = RelayProcess::start(
        &sandbox,
        &[
            ("RELAY_LOG_LEVEL", "trace"),
            ("RELAY_REDIS_URL", &redis.url()),
            ("RELAY_REDIS_ENCRYPTION_KEY", SEAL),
            ("RELAY_ADMIN_TOKEN", ADMIN),
            ("RELAY_CACHE_FRESH", "8s"),
            ("RELAY_CACHE_STALE_WHILE_REVALIDATE", "0s"),
            ("RELAY_CACHE_REFRESH_AHEAD", "0"),
            ("RELAY_AUTH_REVALIDATE", "2s"),
            ("RELAY_CYBERSCAN_TIMEOUT", "1s"),
            PATIENT,
        ],
    )
    .await;
    let mut client = Client { relay: &relay, errors: Vec::new() };

    // All is well; the worker learns what is asked for, and renews it.
    let started = Instant::now();
    while relay.metric("relay_prefetch_total{outcome=\"refreshed\"}").await < 1.0 {
        assert!(started.elapsed() < Duration::from_secs(40), "the worker renews nothing");
        let answers = client.ask(&token).await;
        assert_eq!(answers[0], json!({"data": {"status": "ok"}}));
        assert!(answers[1]["data"]["sightings"]["count"].as_u64().unwrap() >= 1, "{}", answers[1]);
        sleep(Duration::from_millis(200)).await;
    }
    // Every way to be refused and to fail, with texts that repeat what they were sent.
    client.ask(&refused).await;
    client.ask(&token[..token.len() - 4]).await;
    client.ask(&format!("{token}{KEY}")).await;
    let mut access_tokens = Vec::new();
    let echo = || format!("{{\"error\": \"{KEY} {IP} {DOMAIN} {token}\"}}");
    let status = |code| Behaviour::Status { code, retry_after: None, body: echo() };
    for failure in [
        status(401),
        status(429),
        status(500),
        Behaviour::Json(echo()),
        Behaviour::Redirect { location: format!("https://{DOMAIN}/{KEY}"), code: 302 },
        Behaviour::CloseBeforeAnswer,
        Behaviour::TruncateBody,
        Behaviour::Hang,
    ] {
        cyberscan.script(Rule::any().does(failure));
        let purge = json!({"observable": {"type": "ip", "value": IP}}).to_string();
        client.administer(Method::POST, "/purge", purge).await;
        access_tokens.extend(cyberscan.access_tokens());
        cyberscan.invalidate_tokens();
        client.ask(&token).await;
        cyberscan.clear_script();
        client.administer(Method::POST, "/purge", json!({"all": true}).to_string()).await;
    }
    sandbox.issuer.respond_with(IssuerBehaviour::Status(500));
    sandbox.issuer.rotate().await.unwrap();
    client.ask(&token_of(KEY)).await;
    sandbox.issuer.respond_with(IssuerBehaviour::Keys);
    client.administer(Method::POST, "/purge", json!({"odd": KEY}).to_string()).await;
    let metrics = client.administer(Method::GET, "/metrics", String::new()).await;
    let page = client.administer(Method::GET, "/status", String::new()).await;
    let _: String = redis.ask(&["SAVE"]).await;
    let directory: Vec<String> = redis.ask(&["CONFIG", "GET", "dir"]).await;
    let dump = std::fs::read(std::path::Path::new(&directory[1]).join("dump.rdb")).unwrap();
    // A Redis that goes away, and one whose password is another.
    redis.kill();
    client.ask(&token).await;
    sleep(Duration::from_secs(1)).await;
    let told = told.await.unwrap();
    let errors = std::mem::take(&mut client.errors);
    let log = relay.log();

    // The hunt was in the right places.
    let text = String::from_utf8_lossy(&told).into_owned();
    assert!(
        text.contains("relay:1:") && (text.contains("\"mget\"") || text.contains("\"MGET\"")),
        "{} bytes",
        told.len()
    );
    assert!(dump.len() > 500 && metrics.len() > 10_000 && page.len() > 500 && !access_tokens.is_empty());
    assert!(
        log.contains("\"target\":\"access\"") && log.contains("\"level\":\"TRACE\""),
        "{} bytes",
        log.len()
    );

    let signature = token.rsplit('.').next().unwrap();
    let claims = token.split('.').nth(1).unwrap();
    let mut secrets = vec![KEY, REFUSED, ADMIN, PASSWORD, SEAL, token.as_str(), signature, claims];
    secrets.extend(access_tokens.iter().map(String::as_str));
    let secrets = Canaries::of(&secrets);
    let observables = Canaries::of(&[IP, DOMAIN]);
    let host = Canaries::of(&[&sandbox.cyberscan.host()]);
    // The tenant's; that of the issuer is a setting. Libraries, at their most talkative, say whom they connect to.
    let own = |line: &&str| {
        ["access", "cyberscan_relay"].iter().any(|of| line.contains(&format!("\"target\":\"{of}")))
    };
    let own_log = log.lines().filter(own).collect::<Vec<_>>().join("\n");
    for (what, place) in [
        ("the log", log.as_bytes()),
        ("the metrics", &metrics),
        ("/status", &page),
        ("Redis", &told),
        ("its dump", &dump),
    ] {
        secrets.must_not_be_in(what, place);
        observables.must_not_be_in(what, place);
        host.must_not_be_in(what, if what == "the log" { own_log.as_bytes() } else { place });
    }
    secrets.must_not_be_in("an error", &errors);
}
