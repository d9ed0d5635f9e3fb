//! Hostile input, from the files in `tests/attacks`: refused in the right words, and nobody who must not
//! be called is called. Hosts and observables are here; tokens, request bodies, CyberScan's answers
//! and key sets have a file each.

use rstest::rstest;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::harness::{Over, TestRelay, codes, list};

mod bodies;
mod cases;
mod key_sets;
mod tokens;
mod upstream;

/// The JSON strings of a file, one per line; `{trap}` stands for the address of a listener that
/// must never be connected to.
fn texts(file: &str, trap: &str) -> Vec<String> {
    let text = |line| serde_json::from_str::<String>(line).unwrap_or_else(|_| panic!("{line}"));
    cases::lines(file).map(|line| text(line).replace("{trap}", trap)).collect()
}

/// A listener that counts as a place nobody may call.
struct Trap(TcpListener);

impl Trap {
    async fn set() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    fn address(&self) -> String {
        self.0.local_addr().unwrap().to_string()
    }

    async fn is_untouched(&self) -> bool {
        let accepted = tokio::time::timeout(std::time::Duration::from_millis(100), self.0.accept());
        accepted.await.is_err()
    }
}

#[rstest]
#[tokio::test]
async fn hostile_hosts_are_refused_without_a_connection(#[values(Over::Plain, Over::Tls)] over: Over) {
    let trap = Trap::set().await;
    // Any public name is allowed here, so the grammar and the address guard are on their own.
    let relay = TestRelay::over(over, &[("RELAY_CYBERSCAN_HOSTS", "*")]).await;
    let hosts = texts(include_str!("../../attacks/hosts.txt"), &trap.address());
    assert!(hosts.len() >= 250, "{} hosts", hosts.len());
    for host in hosts {
        let token = relay.token_with(&[("host", json!(host))]);
        let answer = relay.post("/health", &token, "").await.json();
        assert_eq!(codes(&answer), ["connection error"], "{host:?}");
        let url = answer["errors"][0]["message"].as_str().unwrap();
        assert!(url.chars().count() < 400 && !url.contains(char::is_control), "{host:?}");
    }
    assert!(trap.is_untouched().await);
    assert_eq!(relay.sandbox.cyberscan.connections(), 0);
}

#[rstest]
#[tokio::test]
async fn hostile_key_issuers_are_refused_without_a_connection(#[values(Over::Plain, Over::Tls)] over: Over) {
    let trap = Trap::set().await;
    let relay = TestRelay::over(over, &[]).await;
    let issuers = texts(include_str!("../../attacks/hosts.txt"), &trap.address());
    for jwks_host in issuers.into_iter().map(Value::from).chain([json!(5), json!([]), json!({}), json!(true)])
    {
        let token = relay.token_with(&[("jwks_host", jwks_host.clone())]);
        let answer = relay.post("/health", &token, "").await.json();
        assert_eq!(codes(&answer), ["authorization error"], "{jwks_host}");
    }
    assert!(trap.is_untouched().await);
    assert_eq!(relay.sandbox.issuer.connections(), 0);
}

#[rstest]
#[tokio::test]
async fn hostile_observables_are_left_out_without_a_call(#[values(Over::Plain, Over::Tls)] over: Over) {
    let relay = TestRelay::over(over, &[]).await;
    let values = texts(include_str!("../../attacks/observables.txt"), "127.0.0.1:1");
    assert!(values.len() >= 500, "{} observables", values.len());
    for values in values.chunks(100) {
        for kind in ["domain", "ip"] {
            let observables: Vec<(&str, &str)> = values.iter().map(|value| (kind, value.as_str())).collect();
            for path in ["/observe/observables", "/refer/observables"] {
                let answer = relay.post(path, &relay.token(), list(&observables)).await.json();
                let empty = if path.starts_with("/observe") { json!({}) } else { json!([]) };
                assert_eq!(answer, json!({"data": empty}), "{path} {kind}");
            }
        }
    }
    assert!(relay.sandbox.cyberscan.calls().is_empty(), "{:?}", relay.sandbox.cyberscan.calls());
}

#[rstest]
#[tokio::test]
async fn no_answer_or_error_repeats_a_secret(#[values(Over::Plain, Over::Tls)] over: Over) {
    let relay = TestRelay::over(over, &[]).await;
    let token = relay.token();
    relay.sandbox.cyberscan.revoke_key("sandbox-key");
    for body in ["", "not json", &list(&[("ip", "203.0.113.10")])] {
        for path in ["/health", "/observe/observables", "/refer/observables"] {
            let answer = relay.post(path, &token, body.to_owned()).await;
            let text = String::from_utf8_lossy(&answer.body).into_owned();
            assert!(!text.contains("sandbox-key") && !text.contains(&token), "{path}: {text}");
        }
    }
}
