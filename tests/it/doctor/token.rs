//! `doctor --token`, for an operator. That it never disagrees with a relay is held in `attacks::tokens`.

use serde_json::{Value, json};

use super::World;
use crate::harness::AUDIENCE;

/// What doctor says of a token with `changes` to its claims; `null` takes one away.
async fn explained(world: &World, changes: &[(&str, Value)], settings: &[(&str, &str)]) -> (i32, Value) {
    let mut claims = world.sandbox.claims(AUDIENCE);
    for (name, value) in changes {
        match value {
            Value::Null => drop(claims.as_object_mut().unwrap().remove(*name)),
            value => claims[*name] = value.clone(),
        }
    }
    of(world, &world.sandbox.issuer.mint(&claims), settings).await
}

async fn of(world: &World, text: &str, settings: &[(&str, &str)]) -> (i32, Value) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let said = world.doctor(&["--json", "--token", file.path().to_str().unwrap()], settings).await;
    (said.status, said.json())
}

fn outcomes(report: &Value, outcome: &str) -> Vec<String> {
    let checks = report["checks"].as_array().unwrap().iter();
    checks
        .filter(|check| check["outcome"] == outcome)
        .map(|check| check["check"].as_str().unwrap().to_owned())
        .collect()
}

fn detail<'a>(report: &'a Value, check: &str) -> &'a str {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|it| it["check"] == check).unwrap()["detail"].as_str().unwrap()
}

#[tokio::test]
async fn a_good_token_passes_every_check_and_its_key_is_tried() {
    let world = World::start().await;
    let (status, report) = explained(&world, &[("exp", json!(4_102_444_800_u64))], &[]).await;
    assert_eq!((status, &report["answer"]), (0, &Value::Null), "{report:#}");
    assert_eq!(outcomes(&report, "passed").len(), 13, "{report:#}");
    assert_eq!(report["token"]["host"], json!(world.sandbox.cyberscan.host()));
    assert_eq!(report["token"]["api_key"], "(set)");
    assert_eq!(report["token"].get("others"), None, "{report:#}");
    assert!(
        report["token"]["exp"].as_str().unwrap().starts_with("2100-01-01 00:00:00 UTC (in "),
        "{report:#}"
    );
    assert!(report["token"]["alg"] == "RS256" && report["token"]["kid"].is_string());

    let (status, report) = explained(&world, &[("api_key", json!("another-key"))], &[]).await;
    assert_eq!((status, &report["answer"]["message"]), (1, &json!("Authorization failed: wrong api_key")));
    assert_eq!(report["do"], "enter a valid API key in the module");
    assert_eq!(outcomes(&report, "failed"), ["api_key"]);
}

#[tokio::test]
async fn every_fault_of_a_token_is_reported_and_the_first_decides_what_is_answered() {
    let world = World::start().await;
    let faults = [
        ("aud", json!("https://other.example")),
        ("exp", json!(1_000_000_000)),
        ("host", json!("elsewhere.example")),
    ];
    let (status, report) = explained(&world, &faults, &[]).await;
    assert_eq!(status, 1);
    assert_eq!(outcomes(&report, "failed"), ["times", "audience", "host"], "{report:#}");
    assert_eq!(report["answer"]["message"], "Authorization failed: JWT has expired");
    let audience = detail(&report, "audience");
    assert!(audience.contains("https://other.example") && audience.contains(AUDIENCE), "{audience}");
    assert!(report["token"]["exp"].as_str().unwrap().contains("days ago"));

    let connections = world.sandbox.issuer.connections();
    let (_, report) = explained(&world, &[("jwks_host", json!("visibility.example"))], &[]).await;
    assert_eq!(world.sandbox.issuer.connections(), connections, "nobody is called who is not believed");
    assert_eq!(outcomes(&report, "failed"), ["allow-list"]);
    assert_eq!(outcomes(&report, "not tried"), ["kid", "signature"]);
    let told = detail(&report, "allow-list");
    assert!(told.contains("visibility.example") && told.contains(&world.sandbox.issuer.host()), "{told}");
    assert_eq!(report["do"], "correct the module's key issuer, or allow it");

    let (_, report) = explained(&world, &[("api_key", Value::Null)], &[]).await;
    assert_eq!(detail(&report, "claims"), "api_key is missing");
    let header = json!({"alg": "HS256", "kid": world.sandbox.issuer.kid()});
    let token = world.sandbox.issuer.mint_with(header, &world.sandbox.claims(AUDIENCE));
    let (_, report) = of(&world, &token, &[]).await;
    assert!(detail(&report, "algorithm").starts_with("HS256"), "{report:#}");
}

#[tokio::test]
async fn an_audience_that_depends_on_the_request_cannot_be_told() {
    let world = World::start().await;
    let derived = |proxies| [("RELAY_AUTH_AUDIENCES", ""), ("RELAY_AUTH_TRUSTED_PROXIES", proxies)];
    let (status, report) = explained(&world, &[], &derived("10.0.0.0/8")).await;
    assert_eq!((status, &report["answer"]), (2, &Value::Null), "{report:#}");
    // Nobody's X-Forwarded-Proto is read: no https audience will ever pass.
    let (status, report) = explained(&world, &[], &derived("")).await;
    assert_eq!((status, outcomes(&report, "failed")), (1, vec!["audience".to_owned()]), "{report:#}");
}

#[tokio::test]
async fn a_malformed_token_is_explained_without_control_characters() {
    let world = World::start().await;
    for text in ["", "hello", "a.b.c", "Bearer a b", "Basic x", "a\nb", "ey.\u{1b}[2J.x"] {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let said = world.doctor(&["--token", file.path().to_str().unwrap()], &[]).await;
        assert_eq!(said.status, 1, "{text:?}: {said:?}");
        assert!(
            said.out.contains("A relay answers: authorization error: Authorization failed: "),
            "{said:?}"
        );
        assert!(!said.out.contains('\u{1b}'));
    }
    let claims = json!({"aud": "\u{1b}[31m\r\nok   signature", "jwks_host": "x", "\u{7}": 1});
    let (_, report) = of(&world, &world.sandbox.issuer.mint(&claims), &[]).await;
    let text = report["token"].to_string();
    assert!(!text.contains("\\u001b") && text.contains("\\\\u{1b}"), "{text}");
}
