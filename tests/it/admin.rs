//! The admin listener, as Prometheus, a load balancer and an operator meet it.

use std::{collections::BTreeMap, time::Duration};

use cyberscan_relay::{
    probe,
    sandbox::{Call, Rule},
};
use http::{Method, Request, StatusCode};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::harness::{Answer, TestRelay, seen};

pub(crate) const TOKEN: (&str, &str) = ("RELAY_ADMIN_TOKEN", "a-token-of-the-operator");

impl TestRelay {
    pub(crate) async fn administer(
        &self,
        method: Method,
        path: &str,
        token: Option<&str>,
        body: &str,
    ) -> Answer {
        let mut request = Request::builder().method(method).uri(path).header("host", "localhost");
        if let Some(token) = token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let body = Full::from(bytes::Bytes::from(body.to_owned()));
        let answer = probe::call(self.admin, request.body(body).unwrap()).await.unwrap();
        let (head, body) = answer.into_parts();
        Answer { status: head.status, headers: head.headers, body }
    }

    pub(crate) async fn purge(&self, what: &Value) -> StatusCode {
        self.administer(Method::POST, "/purge", Some(TOKEN.1), &what.to_string()).await.status
    }

    /// Every series and its value.
    pub(crate) async fn series(&self) -> BTreeMap<String, f64> {
        let text = self.administer(Method::GET, "/metrics", None, "").await.body;
        let text = String::from_utf8(text.to_vec()).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let pair = |line: &str| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        };
        lines.map(pair).collect()
    }
}

/// The sum of all series whose name and labels contain all of `parts`.
fn sum(series: &BTreeMap<String, f64>, parts: &[&str]) -> f64 {
    let fits = |name: &&String| parts.iter().all(|part| name.contains(part));
    series.keys().filter(fits).map(|name| series[name]).sum()
}

#[tokio::test]
async fn every_look_up_is_counted_once_per_tier_and_every_request_once() {
    let relay = TestRelay::start().await;
    relay.sandbox.cyberscan.script(Rule::on(Call::Vulnerabilities).value("198.18.0.9").answer(503));
    let asked =
        [("ip", "198.18.0.1"), ("domain", "shop.example"), ("ip", "203.0.113.99"), ("ip", "198.18.0.9")];
    for _ in 0..3 {
        relay.observe(&asked).await;
    }
    relay.post("/observe/observables", "no.token.atall", "[]").await;
    relay.send(Method::GET, "/nowhere", &[], "").await;
    let series = relay.series().await;
    let count = |parts: &[&str]| sum(&series, parts);
    // Five look-ups a request: three addresses, a domain and its address; one of them fails each time.
    assert_eq!(count(&["cache_lookups", "tier=\"memory\""]), 15.0);
    assert_eq!(count(&["cache_lookups", "tier=\"memory\"", "outcome=\"fresh\""]), 6.0);
    assert_eq!(count(&["cache_lookups", "tier=\"memory\"", "outcome=\"negative\""]), 2.0);
    assert_eq!(count(&["cache_lookups", "tier=\"memory\"", "outcome=\"miss\""]), 7.0);
    assert_eq!(count(&["cache_lookups", "tier=\"upstream\"", "outcome=\"fresh\""]), 3.0);
    assert_eq!(
        count(&["cache_lookups", "tier=\"upstream\"", "outcome=\"error\""]),
        1.0,
        "a failure is remembered"
    );
    assert_eq!(count(&["requests_total", "endpoint=\"observe\"", "outcome=\"partial\""]), 3.0);
    assert_eq!(count(&["requests_total", "endpoint=\"observe\"", "outcome=\"error\""]), 1.0);
    assert_eq!(count(&["requests_total", "endpoint=\"other\"", "outcome=\"error\""]), 1.0);
    assert_eq!(count(&["request_duration_seconds_count", "endpoint=\"observe\""]), 4.0);
    assert_eq!(count(&["observables_total"]), 12.0);
    assert_eq!(count(&["errors_total", "service unavailable"]), 3.0);
    assert_eq!(count(&["auth_total", "outcome=\"ok\""]), 3.0);
    assert_eq!(count(&["auth_total", "outcome=\"malformed\""]), 1.0);
    assert_eq!(count(&["upstream_requests_total", "call=\"token\"", "outcome=\"ok\""]), 1.0);
    assert_eq!(count(&["upstream_requests_total", "outcome=\"unavailable\""]), 1.0);
    assert_eq!(count(&["jwks_refresh_total", "outcome=\"ok\""]), 1.0);
    assert_eq!(count(&["limiter_decisions_total", "outcome=\"granted\""]), 6.0);
    assert_eq!(count(&["relay_ready"]), 1.0);
    assert_eq!(count(&["relay_requests_in_flight"]), 0.0);
    assert!(count(&["cache_entries"]) >= 4.0 && count(&["cache_bytes"]) > 0.0);
    assert!(count(&["process_resident_memory_bytes"]) > 0.0);
}

#[tokio::test]
async fn whatever_clients_send_the_number_of_series_stays() {
    let relay = TestRelay::start().await;
    relay.observe(&[("ip", "198.18.0.1")]).await;
    let before: Vec<String> = relay.series().await.into_keys().collect();
    let methods = ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "BREW"];
    let mut sent = Vec::new();
    for number in 0..2_500 {
        let method = Method::from_bytes(methods[number % methods.len()].as_bytes()).unwrap();
        let path = format!("/p{number}/observe");
        let token =
            relay.token_with(&[("iss", json!(number)), ("jwks_host", json!(format!("h{number}.example")))]);
        let body =
            json!([{"type": format!("kind-{number}"), "value": format!("value-{number}")}]).to_string();
        sent.push((method, path, token, body));
    }
    for chunk in sent.chunks(50) {
        let asking = chunk.iter().map(|(method, path, token, body)| async {
            relay.send(method.clone(), path, &[], "").await;
            relay.post("/observe/observables", token, body.clone()).await;
            relay.post("/observe/observables", &relay.token(), body.clone()).await;
            relay.send(Method::POST, "/refer/observables", &[("authorization", "Basic eA==")], "").await;
        });
        futures_util::future::join_all(asking).await;
    }
    let after = relay.series().await;
    assert!(sum(&after, &["relay_requests_total"]) >= 10_000.0);
    assert_eq!(after.into_keys().collect::<Vec<_>>(), before);
}

#[tokio::test]
async fn a_relay_that_drains_says_so_first_and_still_answers() {
    let relay = TestRelay::with(&[("RELAY_SERVER_SHUTDOWN_DELAY", "1s")]).await;
    let ready = async || relay.administer(Method::GET, "/readyz", None, "").await;
    assert_eq!(ready().await.status, StatusCode::OK);
    assert_eq!(ready().await.json(), json!({"ready": true, "redis": "not configured"}));
    relay.shutdown.cancel();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(ready().await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(relay.administer(Method::GET, "/livez", None, "").await.status, StatusCode::OK);
    assert_eq!(seen(&relay.observe(&[("ip", "198.18.0.1")]).await), ["198.18.0.1"]);
    relay.stop().await;
}

#[tokio::test]
async fn a_redis_that_is_away_is_a_degraded_relay_and_a_ready_one() {
    let relay = TestRelay::with(&[("RELAY_REDIS_URL", "redis://127.0.0.1:1")]).await;
    relay.observe(&[("ip", "198.18.0.1")]).await;
    let ready = relay.administer(Method::GET, "/readyz", None, "").await;
    assert_eq!((ready.status, ready.json()["redis"].clone()), (StatusCode::OK, json!("degraded")));
}

#[tokio::test]
async fn nothing_is_answered_by_a_name_that_somebody_else_may_own() {
    let settings = [("RELAY_ADMIN_HOSTS", "relay.ops.example,*.lan.example"), TOKEN];
    let relay = TestRelay::with(&settings).await;
    let asked = async |host: &str, path: &str| {
        let request = Request::get(path).header("host", host);
        let request = request.body(Full::<bytes::Bytes>::default()).unwrap();
        probe::call(relay.admin, request).await.unwrap().status()
    };
    for path in ["/", "/metrics", "/status", "/readyz", "/livez"] {
        assert_eq!(asked("rebound.evil.example:9091", path).await, StatusCode::MISDIRECTED_REQUEST, "{path}");
        for host in ["localhost", "127.0.0.1:9091", "[::1]", "relay", "relay.ops.example", "a.lan.example"] {
            assert_eq!(asked(host, path).await, StatusCode::OK, "{path} by {host}");
        }
    }
}

#[tokio::test]
async fn only_who_has_the_token_can_purge_and_what_is_purged_is_asked_again() {
    let relay = TestRelay::with(&[TOKEN]).await;
    let asked = [("ip", "198.18.0.1"), ("ip", "198.18.0.2")];
    let calls = || {
        let count = |ip| relay.sandbox.cyberscan.count_of(Call::Vulnerabilities, ip);
        (count("198.18.0.1"), count("198.18.0.2"))
    };
    relay.observe(&asked).await;
    for token in [None, Some(""), Some("a-token-of-the-operato"), Some("a-token-of-the-operator2")] {
        for (method, path, body) in
            [(Method::POST, "/purge", r#"{"all":true}"#), (Method::PUT, "/log-level", "info")]
        {
            let answer = relay.administer(method, path, token, body).await;
            assert_eq!(answer.status, StatusCode::UNAUTHORIZED, "{path}");
        }
    }
    relay.observe(&asked).await;
    assert_eq!(calls(), (1, 1));

    assert_eq!(relay.purge(&json!({"observable": "198.18.0.1"})).await, StatusCode::OK);
    relay.observe(&asked).await;
    assert_eq!(calls(), (2, 1));
    assert_eq!(relay.purge(&json!({"all": true})).await, StatusCode::OK);
    relay.observe(&asked).await;
    assert_eq!(calls(), (3, 2));

    for odd in
        [json!({}), json!([]), json!({"all": true, "tenant": "x"}), json!({"tenant": "x"}), json!({"al": 1})]
    {
        assert_eq!(relay.purge(&odd).await, StatusCode::BAD_REQUEST, "{odd}");
    }
    for (level, status) in [
        ("info,access=warn", StatusCode::CONFLICT),
        ("", StatusCode::LENGTH_REQUIRED),
        (" ", StatusCode::BAD_REQUEST),
        ("a b=", StatusCode::BAD_REQUEST),
        ("=", StatusCode::BAD_REQUEST),
    ] {
        // A relay within a test does not log; what is no level is refused before that is found out.
        let answer = relay.administer(Method::PUT, "/log-level", Some(TOKEN.1), level).await;
        assert_eq!(answer.status, status, "{level:?}");
    }
    let without = TestRelay::start().await;
    assert_eq!(without.purge(&json!({"all": true})).await, StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn the_page_loads_nothing_from_elsewhere_and_shows_what_the_json_says() {
    let relay = TestRelay::start().await;
    relay.observe(&[("ip", "198.18.0.1")]).await;
    for (path, kind) in [("/", "text/html"), ("/status.css", "text/css"), ("/status.js", "text/javascript")] {
        let answer = relay.administer(Method::GET, path, None, "").await;
        assert_eq!(answer.status, StatusCode::OK);
        assert!(answer.headers["content-type"].to_str().unwrap().starts_with(kind));
        assert!(
            answer.headers["content-security-policy"].to_str().unwrap().starts_with("default-src 'none'")
        );
        let text = String::from_utf8(answer.body.to_vec()).unwrap();
        assert!(
            !text.contains("https://") && !text.contains("<script>") && !text.contains("style="),
            "{path}"
        );
    }
    let status = relay.administer(Method::GET, "/status", None, "").await.json();
    assert_eq!(status["requests"]["observe"]["ok"], 1);
    assert_eq!(status["cache"]["lookups"]["upstream"]["fresh"], 1);
    assert_eq!(status["redis"]["configured"], false);
    assert_eq!(relay.administer(Method::GET, "/nothing", None, "").await.status, StatusCode::NOT_FOUND);
    let wrong = relay.administer(Method::DELETE, "/metrics", None, "").await;
    assert_eq!(
        (wrong.status, &wrong.headers["allow"]),
        (StatusCode::METHOD_NOT_ALLOWED, &"GET, HEAD, OPTIONS".parse().unwrap())
    );
    let wrong = relay.administer(Method::GET, "/purge", None, "").await;
    assert_eq!(
        (wrong.status, &wrong.headers["allow"]),
        (StatusCode::METHOD_NOT_ALLOWED, &"POST, OPTIONS".parse().unwrap())
    );
}
