//! HTTPS without a proxy, HTTP/1.0, and what is refused before any route sees it.

use std::{os::unix::fs::PermissionsExt, process::Stdio, time::Duration};

use cyberscan_relay::sandbox::{Options, Sandbox};
use http::{Method, StatusCode};
use rstest::rstest;
use tokio::{net::TcpStream, process::Command};

use crate::{
    fleet::RelayProcess,
    harness::{Certificate, Connection, Over, TestRelay, list, seen},
};

const PATIENCE: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_relay_with_a_certificate_is_asked_over_https_and_without_audiences_says_so() {
    let relay = TestRelay::over(Over::Tls, &[("RELAY_AUTH_AUDIENCES", "")]).await;
    let authorized = async |audience: &str| {
        let answer = relay.post("/health", &relay.sandbox.token(audience), "").await.json();
        answer.get("errors").is_none()
    };
    assert!(authorized("https://relay.test").await);
    assert!(!authorized("http://relay.test").await);
    let token = relay.sandbox.token("https://relay.test");
    let answer = relay.post("/observe/observables", &token, list(&[("ip", "203.0.113.10")])).await.json();
    assert_eq!(seen(&answer), ["203.0.113.10"]);
    let series = relay.series().await;
    assert_eq!(series["relay_tls_handshakes_total{outcome=\"ok\"}"], 3.0);
    assert!(series["relay_tls_certificate_expiry_timestamp_seconds"] > 2e9);
}

#[tokio::test]
async fn plain_http_on_the_port_of_https_and_the_reverse_are_told_and_counted() {
    let relay = TestRelay::over(Over::Tls, &[]).await;
    let stream = Connection::Left(TcpStream::connect(relay.address).await.unwrap());
    let request = b"GET /secret-path HTTP/1.1\r\nHost: relay.test\r\nAuthorization: Bearer x.y.z\r\n\r\n";
    let answer = TestRelay::converse_on(stream, request, PATIENCE).await;
    assert!(answer.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{answer}");
    assert!(answer.ends_with("This is HTTPS; plain HTTP is not spoken here\n"), "{answer}");
    let series = relay.series().await;
    assert_eq!(series["relay_tls_handshakes_total{outcome=\"plain_http\"}"], 1.0);
    let refused = |reason: &str| {
        format!("relay_refused_before_routing_total{{listener=\"public\",reason=\"{reason}\"}}")
    };
    assert_eq!(series[&refused("tls_handshake")], 1.0);

    let plain = TestRelay::start().await;
    assert!(Certificate::new().connect(plain.address).await.is_err());
    let counted = async || plain.series().await[&refused("tls_to_plain_http")];
    for _ in 0..100 {
        if counted().await == 1.0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("not counted: {}", counted().await);
}

#[rstest]
#[tokio::test]
async fn http_1_0_is_answered_once_on_each_connection(#[values(Over::Plain, Over::Tls)] over: Over) {
    let relay = TestRelay::over(over, &[]).await;
    let body = list(&[("ip", "203.0.113.10")]);
    let observe = format!(
        "POST /observe/observables HTTP/1.0\r\nHost: relay.test\r\nConnection: keep-alive\r\n\
         Authorization: Bearer {}\r\nContent-Length: {}\r\n\r\n{body}",
        relay.token(),
        body.len()
    );
    let answer = relay.raw_and_close(observe.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer}");
    assert!(answer.contains("203.0.113.10") && answer.contains("connection: close\r\n"), "{answer}");
    for (request, status) in [
        ("GET / HTTP/1.0\r\n\r\n", "200"),
        ("OPTIONS / HTTP/1.0\r\n\r\n", "200"),
        ("GET /nowhere HTTP/1.0\r\n\r\n", "404"),
        ("GET /watchdog HTTP/1.0\r\nHealth-Check: a\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\n\r\n", "200"),
    ] {
        let answer = relay.raw_and_close(request.as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.0 {status} ")), "{request}: {answer}");
        assert_eq!(answer.matches("HTTP/1.").count(), 1, "{answer}");
    }
    let chunked = "POST /health HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    assert!(relay.raw_and_close(chunked.as_bytes()).await.starts_with("HTTP/1.1 400 "));
}

#[tokio::test]
async fn probes_of_load_balancers_are_answered_on_the_admin_listener() {
    let relay = TestRelay::start().await;
    let probe = async |request: &str| {
        let stream = Connection::Left(TcpStream::connect(relay.admin).await.unwrap());
        TestRelay::converse_on(stream, request.as_bytes(), PATIENCE).await
    };
    for (request, status) in [
        ("GET /readyz HTTP/1.0\r\n\r\n", "200"),
        ("HEAD /livez HTTP/1.0\r\n\r\n", "200"),
        ("GET /metrics HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "200"),
        ("OPTIONS / HTTP/1.0\r\n\r\n", "200"),
        ("OPTIONS /readyz HTTP/1.0\r\n\r\n", "200"),
        ("POST /purge HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}", "403"),
        ("OPTIONS /nowhere HTTP/1.0\r\n\r\n", "404"),
        ("OPTIONS * HTTP/1.0\r\n\r\n", "405"),
        ("CONNECT h:1 HTTP/1.0\r\n\r\n", "405"),
    ] {
        let answer = probe(request).await;
        assert!(answer.starts_with(&format!("HTTP/1.0 {status} ")), "{request}: {answer}");
    }
    let answer = relay.send(Method::OPTIONS, "/", &[], "").await;
    assert_eq!(answer.status, StatusCode::OK);
    // What is refused there is counted apart, and its connections are nobody's clients.
    probe("GET /readyz HTTP/3.0\r\n\r\n").await;
    let series = relay.series().await;
    assert_eq!(series["relay_refused_before_routing_total{listener=\"admin\",reason=\"version\"}"], 1.0);
    assert_eq!(series["relay_refused_before_routing_total{listener=\"public\",reason=\"version\"}"], 0.0);
    assert_eq!(series["relay_connections"], 0.0);
}

#[tokio::test]
async fn refusals_are_one_line_in_the_log_for_each_reason_and_repeat_nothing() {
    let sandbox = Sandbox::start(Options::default()).await.unwrap();
    let relay = RelayProcess::start(&sandbox, &[]).await;
    for number in 0..20 {
        for request in [
            format!("GET /canary-{number} HTTP/2.0\r\nAuthorization: Bearer canary.x.y\r\n\r\n"),
            format!(
                "GET /canary-{number} HTTP/1.1\r\nX-canary: a\r\nAuthorization: Bearer canary.x.y\r\n\r\n"
            ),
            "CONNECT canary.test:443 HTTP/1.1\r\nHost: canary.test\r\nConnection: close\r\n\r\n".to_owned(),
        ] {
            let stream = Connection::Left(TcpStream::connect(relay.address).await.unwrap());
            TestRelay::converse_on(stream, request.as_bytes(), PATIENCE).await;
        }
    }
    let name = "relay_refused_before_routing_total{listener=\"public\"";
    for _ in 0..100 {
        if relay.metric(name).await == 60.0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(relay.metric(name).await, 60.0);
    let lines = relay.said("requests refused before routing");
    let mut reasons: Vec<&str> = lines.iter().map(|line| line["reason"].as_str().unwrap()).collect();
    reasons.sort_unstable();
    assert_eq!(reasons, ["malformed", "no_path", "version"], "{lines:?}");
    assert!(lines.iter().all(|line| line["count"] == 1 && line["last_peer"] == "127.0.0.1"), "{lines:?}");
    assert!(!relay.log().contains("canary"), "{}", relay.log());
}

#[tokio::test]
async fn a_start_with_a_faulty_certificate_names_the_setting_and_the_file() {
    let certificate = Certificate::new();
    let start = async |command: &str, settings: &[(&str, &str)]| {
        let mut relay = Command::new(env!("CARGO_BIN_EXE_cyberscan-relay"));
        relay.arg(command).env_clear().kill_on_drop(true).stdin(Stdio::null());
        relay.env("RELAY_LISTEN", "127.0.0.1:0").env("RELAY_ADMIN_LISTEN", "");
        relay.envs(settings.iter().copied());
        let output = tokio::time::timeout(Duration::from_secs(30), relay.output()).await.unwrap().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let (good, key) = (certificate.path("certificate.pem"), certificate.path("key.pem"));
    let secret = std::fs::read_to_string(&key).unwrap();
    let missing = certificate.path("missing.pem");
    for command in ["serve", "check"] {
        for (settings, words) in [
            (
                &[("RELAY_SERVER_TLS_CERTIFICATE", good.as_str()), ("RELAY_SERVER_TLS_KEY", missing.as_str())][..],
                format!("server.tls.key (environment variable RELAY_SERVER_TLS_KEY): {missing}: cannot be read: No such file"),
            ),
            (
                &[("RELAY_SERVER_TLS_CERTIFICATE", &key), ("RELAY_SERVER_TLS_KEY", &key)],
                format!("server.tls.certificate (environment variable RELAY_SERVER_TLS_CERTIFICATE): {key}: expected a PEM file with a certificate"),
            ),
            (
                &[("RELAY_SERVER_TLS_CERTIFICATE", &good)],
                "server.tls.key (default): expected the key's file, because server.tls.certificate is set"
                    .to_owned(),
            ),
            (
                &[("RELAY_SERVER_TLS_KEY", &key)],
                "server.tls.certificate (default): expected the certificate's file, because server.tls.key is set"
                    .to_owned(),
            ),
        ] {
            let errors = start(command, settings).await;
            assert!(errors.contains(&words), "{command}: {words}: {errors}");
            assert!(!errors.contains(secret.lines().nth(1).unwrap()), "{errors}");
        }
    }
}

#[tokio::test]
async fn healthcheck_asks_over_tls_and_a_key_everybody_can_read_is_warned_of() {
    let sandbox = Sandbox::start(Options::default()).await.unwrap();
    let certificate = Certificate::new();
    std::fs::set_permissions(certificate.path("key.pem"), std::fs::Permissions::from_mode(0o644)).unwrap();
    let files = certificate.settings();
    let settings: Vec<(&str, &str)> =
        files.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let relay = RelayProcess::start(&sandbox, &settings).await;
    let healthcheck = async || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cyberscan-relay"));
        command.arg("healthcheck").env_clear().envs(settings.iter().copied());
        command.env("RELAY_LISTEN", relay.address.to_string()).output().await.unwrap().status.success()
    };
    assert!(healthcheck().await);
    // A renewal that has gone wrong is no reason to restart a relay that goes on with what it has.
    std::fs::write(certificate.path("key.pem"), "not PEM").unwrap();
    assert!(healthcheck().await);
    assert_eq!(relay.said("every user of this machine can read the TLS key: chmod o= it").len(), 1);
    assert_eq!(relay.said("TLS certificate in use").len(), 1);
}
