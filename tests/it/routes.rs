//! The public listener: routes, shapes, and what HTTP itself can do to it.

use std::time::Duration;

use http::{Method, StatusCode, header};
use rstest::rstest;
use serde_json::json;
use tokio::{io::AsyncWriteExt, net::TcpStream};

use crate::harness::{Over, TestRelay, codes};

#[rstest]
#[tokio::test]
async fn the_routes_without_a_tenant_answer_anyone(#[values(Over::Plain, Over::Tls)] over: Over) {
    let relay = TestRelay::over(over, &[]).await;
    let version = json!({"version": env!("CARGO_PKG_VERSION")});
    for path in ["/version", "/version/", "/version?a=b"] {
        assert_eq!(relay.send(Method::POST, path, &[], "").await.json(), version, "{path}");
    }
    let watchdog = relay.send(Method::GET, "/watchdog", &[("health-check", "ping")], "").await;
    assert_eq!(watchdog.json(), json!({"data": "ping"}));
    let watchdog = relay.send(Method::GET, "/watchdog", &[], "").await;
    let error = json!({"type": "fatal", "code": "health check failed", "message": "Invalid Health Check"});
    assert_eq!(watchdog.json(), json!({"errors": [error]}));
    let landing = relay.send(Method::GET, "/", &[], "").await.json();
    assert_eq!(landing["service"], "cyberscan-relay");
}

#[tokio::test]
async fn nothing_of_the_admin_listener_is_found_on_the_public_one() {
    let relay = TestRelay::start().await;
    for path in ["status", "status.css", "status.js", "livez", "readyz", "metrics", "purge", "log-level"] {
        let spellings = [
            format!("/{path}"),
            format!("/{path}/"),
            format!("//{path}"),
            format!("/watchdog/../{path}"),
            format!("/%{:02x}{}", path.as_bytes()[0], &path[1..]),
            format!("/{}", path.to_uppercase()),
        ];
        for path in spellings {
            for method in [Method::GET, Method::POST, Method::PUT] {
                let answer = relay.send(method, &path, &[], "").await;
                assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}");
            }
        }
    }
}

#[rstest]
#[tokio::test]
async fn a_head_of_too_many_fields_or_bytes_is_refused(#[values(Over::Plain, Over::Tls)] over: Over) {
    let relay = TestRelay::over(over, &[]).await;
    let head = |fields: String| format!("GET /watchdog HTTP/1.1\r\nHost: h\r\n{fields}\r\n");
    for (fields, status) in [
        ("X: y\r\n".repeat(63), "200"),
        ("X: y\r\n".repeat(64), "431"),
        (format!("X: {}\r\n", "y".repeat(100_000)), "431"),
    ] {
        let answer = relay.raw(head(fields).as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
    }
}

#[tokio::test]
async fn unknown_paths_and_wrong_methods_are_faults_of_http() {
    let relay = TestRelay::start().await;
    for (method, path) in [
        (Method::POST, "/nope"),
        (Method::POST, "/observe"),
        (Method::POST, "/observe/observables/x"),
        (Method::GET, "/metrics"),
        (Method::GET, "/%D0%BF"),
    ] {
        let answer = relay.send(method, path, &[], "").await;
        assert_eq!((answer.status, &answer.json()["code"]), (StatusCode::NOT_FOUND, &json!(404)), "{path}");
    }
    for (method, path, allow) in [
        (Method::GET, "/health", "POST, OPTIONS"),
        (Method::DELETE, "/observe/observables", "POST, OPTIONS"),
        (Method::PUT, "/refer/observables/", "POST, OPTIONS"),
        (Method::POST, "/watchdog", "GET, HEAD, OPTIONS"),
    ] {
        let answer = relay.send(method, path, &[], "").await;
        assert_eq!(
            (answer.status, &answer.json()["code"]),
            (StatusCode::METHOD_NOT_ALLOWED, &json!(405)),
            "{path}"
        );
        assert_eq!(answer.headers[header::ALLOW], allow);
    }
    let options = relay.send(Method::OPTIONS, "/health", &[], "").await;
    assert_eq!(
        (options.status, &options.headers[header::ALLOW]),
        (StatusCode::OK, &"POST, OPTIONS".parse().unwrap())
    );
}

#[rstest]
#[tokio::test]
async fn targets_without_a_path_are_refused_and_the_relay_lives_on(
    #[values(Over::Plain, Over::Tls)] over: Over,
) {
    let relay = TestRelay::over(over, &[]).await;
    for request in ["CONNECT evil.test:443", "CONNECT /health", "OPTIONS *", "TRACE /health"] {
        let answer = relay
            .raw(format!("{request} HTTP/1.1\r\nHost: relay.test\r\nConnection: close\r\n\r\n").as_bytes())
            .await;
        assert!(answer.starts_with("HTTP/1.1 405 "), "{request}: {answer}");
    }
    assert_eq!(relay.health().await, json!({"data": {"status": "ok"}}));
}

#[rstest]
#[tokio::test]
async fn a_body_that_is_too_large_late_or_encoded_is_an_error_item(
    #[values(Over::Plain, Over::Tls)] over: Over,
) {
    let relay =
        TestRelay::over(over, &[("RELAY_SERVER_BODY_LIMIT", "1000"), ("RELAY_SERVER_BODY_TIMEOUT", "200ms")])
            .await;
    let token = relay.token();
    let large = relay.post("/observe/observables", &token, vec![b'x'; 1001]).await;
    assert_eq!((large.status, codes(&large.json())), (StatusCode::OK, vec!["invalid argument"]));

    let head = format!(
        "POST /observe/observables HTTP/1.1\r\nHost: relay.test\r\nAuthorization: Bearer {token}\r\n"
    );
    let chunk = format!("3e8\r\n{}\r\n", "x".repeat(1000));
    let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n{}0\r\n\r\n", chunk.repeat(5));
    let late = format!("{head}Content-Length: 10\r\n\r\n[");
    let encoded = format!("{head}Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n[]");
    for (request, words) in
        [(chunked, "larger than 1000 bytes"), (late, "did not arrive"), (encoded, "Content-Encoding")]
    {
        let answer = relay.raw(request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
        assert!(answer.contains("invalid argument") && answer.contains(words), "{answer}");
    }
}

#[tokio::test]
async fn a_body_is_not_judged_before_the_token() {
    let relay = TestRelay::start().await;
    let unauthorized = relay.send(Method::POST, "/observe/observables", &[], "not json").await.json();
    assert_eq!(codes(&unauthorized), ["authorization error"]);
    let refused = relay.token_with(&[("api_key", json!("refused"))]);
    let judged = relay.post("/refer/observables", &refused, "not json").await.json();
    assert_eq!(codes(&judged), ["invalid argument"]);
}

#[tokio::test]
async fn a_request_in_flight_is_answered_while_the_relay_drains() {
    let relay = TestRelay::start().await;
    relay.sandbox.cyberscan.latency(Duration::from_millis(300));
    let (token, address, shutdown) = (relay.token(), relay.address, relay.shutdown.clone());
    let (answer, ()) = tokio::join!(relay.post("/health", &token, ""), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        shutdown.cancel();
    });
    assert_eq!(answer.json(), json!({"data": {"status": "ok"}}));
    assert!(TcpStream::connect(address).await.is_err(), "still listening");
    relay.stop().await;
}

#[rstest]
#[tokio::test]
async fn silent_and_half_sent_connections_do_not_stay(#[values(Over::Plain, Over::Tls)] over: Over) {
    let relay = TestRelay::over(over, &[("RELAY_SERVER_HEADER_TIMEOUT", "100ms")]).await;
    for start in ["", "POST /hea", "POST /health HTTP/1.1\r\nHost: rel"] {
        let mut stream = relay.connect().await;
        stream.write_all(start.as_bytes()).await.unwrap();
        stream.flush().await.unwrap();
        let closed = tokio::time::timeout(Duration::from_secs(5), async {
            let mut rest = Vec::new();
            tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut rest).await
        });
        assert!(closed.await.is_ok(), "{start:?} is still open");
    }
}
