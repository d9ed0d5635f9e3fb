//! Traces: what a collector is told of requests, what it never is, and that nobody waits for it.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use cyberscan_relay::{
    probe,
    sandbox::{Behaviour, Options, Rule, Sandbox},
};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use opentelemetry_proto::tonic::{
    collector::trace::v1::ExportTraceServiceRequest, common::v1::any_value::Value as Fact, trace::v1::Span,
};
use prost::Message;
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    time::{Instant, sleep},
};

use crate::{
    canary::{Canaries, DOMAIN, IP, KEY},
    fleet::{PATIENT, RelayProcess},
    harness::{AUDIENCE, list},
    redis::RedisServer,
};

/// A collector and what it was sent.
struct Collector {
    address: SocketAddr,
    received: Arc<Mutex<Vec<Bytes>>>,
}

impl Collector {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, received) = (listener.local_addr().unwrap(), Arc::<Mutex<Vec<Bytes>>>::default());
        let taken = Arc::clone(&received);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let taken = Arc::clone(&taken);
                let take = service_fn(move |request: Request<Incoming>| {
                    let taken = Arc::clone(&taken);
                    async move {
                        assert_eq!((request.method(), request.uri().path()), (&Method::POST, "/v1/traces"));
                        assert_eq!(request.headers()["content-type"], "application/x-protobuf");
                        let message = request.into_body().collect().await.unwrap().to_bytes();
                        taken.lock().unwrap().push(message);
                        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
                    }
                });
                let serving =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), take);
                tokio::spawn(serving);
            }
        });
        Self { address, received }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn bytes(&self) -> Vec<u8> {
        self.received.lock().unwrap().concat()
    }

    fn spans(&self) -> Vec<Span> {
        let received = self.received.lock().unwrap();
        let messages = received.iter().map(|bytes| ExportTraceServiceRequest::decode(bytes.clone()).unwrap());
        let resources = messages.flat_map(|message| message.resource_spans);
        resources.flat_map(|resource| resource.scope_spans).flat_map(|scope| scope.spans).collect()
    }

    /// The spans of a trace, once there are so many requests in it.
    async fn trace(&self, id: &str, requests: usize) -> Vec<Span> {
        let started = Instant::now();
        loop {
            let spans = self.spans().into_iter().filter(|span| hex(&span.trace_id) == id);
            let spans: Vec<Span> = spans.collect();
            if spans.iter().filter(|span| hex(&span.parent_span_id) == CALLER).count() == requests {
                return spans;
            }
            assert!(started.elapsed() < Duration::from_secs(10), "{spans:?}");
            sleep(Duration::from_millis(50)).await;
        }
    }
}

const CALLER: &str = "00f067aa0ba902b7";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Sends a request of which its caller says that it belongs to `trace`.
async fn post(relay: SocketAddr, path: &str, token: &str, trace: &str, body: String) -> StatusCode {
    let request = Request::post(path)
        .header("host", "relay.test")
        .header("authorization", format!("Bearer {token}"))
        .header("x-request-id", "id-of-the-proxy")
        .header("traceparent", format!("00-{trace}-{CALLER}-01"))
        .header("tracestate", format!("key={KEY}"));
    probe::call(relay, request.body(Full::from(body)).unwrap()).await.unwrap().status()
}

/// Each span as `name < name of its parent`, sorted; the caller's is `caller`.
fn tree(spans: &[Span]) -> Vec<String> {
    let names: HashMap<&[u8], &str> = spans.iter().map(|span| (&*span.span_id, &*span.name)).collect();
    let parent = |span: &Span| match hex(&span.parent_span_id).as_str() {
        CALLER => "caller",
        _ => names.get(&*span.parent_span_id).copied().unwrap_or("lost"),
    };
    let mut tree: Vec<String> =
        spans.iter().map(|span| format!("{} < {}", span.name, parent(span))).collect();
    tree.sort();
    tree
}

fn facts(span: &Span) -> BTreeMap<&str, Value> {
    let fact = |value: &Fact| match value {
        Fact::StringValue(text) => json!(text),
        Fact::IntValue(number) => json!(number),
        other => panic!("{other:?}"),
    };
    let facts = span.attributes.iter();
    facts.map(|said| (&*said.key, fact(said.value.as_ref().unwrap().value.as_ref().unwrap()))).collect()
}

#[track_caller]
fn one<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("{name}: {:?}", tree(spans)))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_tells_where_the_time_went_and_nothing_that_is_secret() {
    let (sandbox, collector) = (Sandbox::start(Options::default()).await.unwrap(), Collector::start().await);
    let redis = RedisServer::process(&[]).await;
    sandbox.cyberscan.accept_key(KEY);
    let mut claims = sandbox.claims(AUDIENCE);
    claims["api_key"] = json!(KEY);
    let token = sandbox.issuer.mint(&claims);
    let settings = [
        ("RELAY_TELEMETRY_OTLP_ENDPOINT", &*collector.url()),
        ("RELAY_TELEMETRY_OTLP_SAMPLING", "1"),
        ("RELAY_REDIS_URL", &redis.url()),
        ("RELAY_LOG_LEVEL", "trace"),
        // Of the SDK's own variables none counts.
        ("OTEL_RESOURCE_ATTRIBUTES", "canary=1"),
        ("OTEL_TRACES_SAMPLER", "always_off"),
        PATIENT,
    ];
    let relay = RelayProcess::start(&sandbox, &settings).await;
    let ask = async |path, token: &str, trace: &str, body: &str| {
        assert_eq!(post(relay.address, path, token, trace, body.to_owned()).await, StatusCode::OK);
    };

    let (cold, warm) = ("4bf92f3577b34da6a3ce929d0e0e4736", "4bf92f3577b34da6a3ce929d0e0e4737");
    let about = list(&[("ip", IP)]);
    ask("/observe/observables", &token, cold, &about).await;
    ask("/observe/observables", &token, warm, &about).await;
    let spans = collector.trace(cold, 1).await;
    assert_eq!(
        tree(&spans),
        [
            "POST /observe/observables < caller",
            "cyberscan token < POST /observe/observables",
            "cyberscan vulnerabilities < look up vulnerabilities",
            "fetch key set < verify token",
            "look up vulnerabilities < POST /observe/observables",
            "read body < POST /observe/observables",
            // Whether the key is accepted is kept in Redis as well: read, and claimed by the replica that asks.
            "redis claim < POST /observe/observables",
            "redis claim < look up vulnerabilities",
            "redis read < POST /observe/observables",
            "redis read < POST /observe/observables",
            "verify token < POST /observe/observables",
            "wait for limiter < POST /observe/observables",
            "wait for limiter < look up vulnerabilities",
        ]
    );
    let request = one(&spans, "POST /observe/observables");
    let told = |upstream, memory| {
        json!({
            "http.request.method": "POST", "http.route": "/observe/observables", "http.response.status_code": 200,
            "relay.request_id": "id-of-the-proxy", "relay.outcome": "ok", "relay.observables": 1,
            "relay.answers.memory": memory, "relay.answers.redis": 0, "relay.answers.upstream": upstream,
            "relay.answers.stale": 0, "relay.answers.failed": 0,
        })
    };
    assert_eq!((json!(facts(request)), request.kind), (told(1, 0), 2));
    let call = one(&spans, "cyberscan vulnerabilities");
    let expected = json!({"http.request.method": "GET", "http.response.status_code": 200});
    assert_eq!((json!(facts(call)), call.kind), (expected, 3));
    assert_eq!(json!(facts(one(&spans, "look up vulnerabilities"))), json!({"relay.tier": "upstream"}));
    for span in &spans {
        assert!(
            span.trace_state.is_empty() && span.events.is_empty() && span.status.as_ref().unwrap().code == 0
        );
        assert!(request.start_time_unix_nano <= span.start_time_unix_nano, "{}", span.name);
        assert!(span.end_time_unix_nano <= request.end_time_unix_nano, "{}", span.name);
    }
    let spans = collector.trace(warm, 1).await;
    assert_eq!(json!(facts(one(&spans, "POST /observe/observables"))), told(0, 1));
    assert_eq!(spans.len(), 3, "{:?}", tree(&spans));
    let lines = relay.log();
    let line = lines.lines().find(|line| line.contains("\"target\":\"access\"")).unwrap();
    assert!(line.contains(&format!("\"trace_id\":\"{cold}\"")), "{line}");

    // Whatever fails: what is told of it is a word.
    let failing = "4bf92f3577b34da6a3ce929d0e0e4738";
    let echo = format!("{{\"error\": \"{KEY} {IP} {DOMAIN} {token}\"}}");
    let status = |code| Behaviour::Status { code, retry_after: None, body: echo.clone() };
    let failures = [status(500), status(403), Behaviour::Json(echo.clone()), Behaviour::CloseBeforeAnswer];
    let mut requests = 0;
    for (number, failure) in failures.into_iter().enumerate() {
        sandbox.cyberscan.script(Rule::any().does(failure));
        let domain = format!("{number}.{DOMAIN}");
        ask("/observe/observables", &token, failing, &list(&[("domain", &domain)])).await;
        ask("/refer/observables", &token, failing, &list(&[("domain", DOMAIN), ("ip", IP)])).await;
        sandbox.cyberscan.clear_script();
        requests += 2;
    }
    ask("/health", &format!("{token}{KEY}"), failing, "").await;
    let odd = format!("/{KEY}/{IP}?{DOMAIN}");
    assert_eq!(post(relay.address, &odd, &token, failing, about).await, StatusCode::NOT_FOUND);
    let spans = collector.trace(failing, requests + 2).await;
    let failed = |name, why: &str| {
        let failed = |span: &&Span| span.name == name && facts(span).get("error.type") == Some(&json!(why));
        let span = spans.iter().find(failed).unwrap_or_else(|| panic!("{name}: {why}"));
        assert_eq!(span.status.as_ref().unwrap().code, 2);
        assert_eq!(span.status.as_ref().unwrap().message, "");
    };
    failed("cyberscan domain", "unavailable");
    failed("look up domain", "unavailable");
    failed("cyberscan domain", "unauthorized");
    failed("verify token", "malformed");
    failed("POST /health", "authorization error");
    assert_eq!(facts(one(&spans, "POST"))["http.response.status_code"], json!(404));

    // The last spans are sent before the end.
    let last = "4bf92f3577b34da6a3ce929d0e0e4739";
    ask("/version", &token, last, "").await;
    relay.terminate().await;
    assert!(relay.end_within(Duration::from_secs(5)).await.success());
    one(&collector.trace(last, 1).await, "POST /version");

    let exported = collector.bytes();
    assert!(exported.len() > 1000 && String::from_utf8_lossy(&exported).contains("cyberscan-relay"));
    let mut secrets = vec![KEY, IP, DOMAIN, token.as_str(), "canary"];
    secrets.extend(token.split('.').skip(1));
    let (access_tokens, host) = (sandbox.cyberscan.access_tokens(), sandbox.cyberscan.host());
    secrets.extend(access_tokens.iter().map(String::as_str));
    secrets.extend([host.as_str(), host.split(':').next().unwrap()]);
    Canaries::of(&secrets).must_not_be_in("what was exported", &exported);
}

#[tokio::test]
async fn a_caller_cannot_have_itself_recorded() {
    let (sandbox, collector) = (Sandbox::start(Options::default()).await.unwrap(), Collector::start().await);
    let settings =
        [("RELAY_TELEMETRY_OTLP_ENDPOINT", &*collector.url()), ("RELAY_TELEMETRY_OTLP_SAMPLING", "0")];
    let relay = RelayProcess::start(&sandbox, &settings).await;
    let trace = "00000000000000000000000000000001";
    post(relay.address, "/health", &sandbox.token(AUDIENCE), trace, String::new()).await;
    assert!(!relay.log().contains("trace_id"));
    relay.terminate().await;
    assert!(relay.end_within(Duration::from_secs(5)).await.success());
    assert_eq!(collector.spans().len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_is_gone_or_hangs_costs_no_answer_and_no_time_at_the_end() {
    let sandbox = Sandbox::start(Options::default()).await.unwrap();
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for collector in [gone, silent.local_addr().unwrap()] {
        let settings = [
            ("RELAY_TELEMETRY_OTLP_ENDPOINT", &*format!("http://{collector}")),
            ("RELAY_TELEMETRY_OTLP_SAMPLING", "1"),
        ];
        let relay = RelayProcess::start(&sandbox, &settings).await;
        let (token, started, mut slowest) = (sandbox.token(AUDIENCE), Instant::now(), Duration::ZERO);
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        while started.elapsed() < Duration::from_millis(3500) {
            let asked = Instant::now();
            let body = list(&[("ip", "203.0.113.10")]);
            let status = post(relay.address, "/observe/observables", &token, trace, body).await;
            assert_eq!(status, StatusCode::OK);
            slowest = slowest.max(asked.elapsed());
            sleep(Duration::from_millis(20)).await;
        }
        assert!(slowest < Duration::from_secs(1), "{slowest:?}");
        // Several batches were lost; that is told once.
        if collector == gone {
            assert_eq!(relay.said("traces are lost").len(), 1);
            assert_eq!(relay.said("traces are lost")[0]["reason"], "no connection");
        }
        let ending = Instant::now();
        relay.terminate().await;
        assert!(relay.end_within(Duration::from_secs(10)).await.success());
        let ended = ending.elapsed();
        assert!(ended < Duration::from_secs(2), "{ended:?}");
        eprintln!("collector gone or silent: slowest answer {slowest:?}, ended after {ended:?}");
    }
}
