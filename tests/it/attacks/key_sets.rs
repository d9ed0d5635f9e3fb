//! Key sets, from `tests/attacks/key_sets.jsonl`: whatever an issuer publishes, only an RSA key for
//! signatures, sound and of its id, makes a token good.

use std::sync::Arc;

use cyberscan_relay::sandbox::{Call, IssuerBehaviour, Options, Sandbox};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    Trap,
    cases::{self, cases, check_each, fill_all},
};
use crate::harness::{AUDIENCE, TestRelay};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    /// The whole document; or
    document: Option<cases::Document>,
    /// its keys, each the issuer's own with some members changed, added or (`null`) taken away.
    keys: Option<Vec<Value>>,
    /// `good`: a token is believed; `kid`: there is no such key; `signature`: the key is another one;
    /// `issuer`: it is no key set.
    expect: String,
}

fn document(case: &Case, sandbox: &Sandbox, stranger: &Sandbox, trap: &str) -> String {
    let own = sandbox.issuer.jwk();
    let place = |name: &str| match name {
        "kid" | "n" | "e" => Some(own[name].as_str().unwrap().to_owned()),
        "stranger n" => Some(stranger.issuer.jwk()["n"].as_str().unwrap().to_owned()),
        "half n" => Some(own["n"].as_str().unwrap()[..171].to_owned()),
        "key" => Some(own.to_string()),
        "trap" => Some(trap.to_owned()),
        _ => None,
    };
    if let Some(text) = &case.document {
        return String::from_utf8(text.bytes(&place)).unwrap();
    }
    let key = |changes: &Value| {
        let Value::Object(changes) = fill_all(changes, &place) else {
            return fill_all(changes, &place);
        };
        let mut key = own.as_object().unwrap().clone();
        key.extend(changes);
        key.into_iter().filter(|(_, value)| !value.is_null()).collect::<Map<_, _>>().into()
    };
    let keys: Vec<Value> = case.keys.iter().flatten().map(key).collect();
    json!({"keys": keys}).to_string()
}

#[tokio::test]
async fn of_every_key_set_only_what_can_verify_rs256_is_used() {
    let cases: Vec<Case> = cases(include_str!("../../attacks/key_sets.jsonl"));
    let good = cases.iter().filter(|case| case.expect == "good").count();
    assert!(cases.len() - good >= 60 && good >= 15, "{} bad and {good} good key sets", cases.len() - good);
    let sandbox = Arc::new(Sandbox::start(Options::default()).await.unwrap());
    let stranger = Sandbox::start(Options::default()).await.unwrap();
    let trap = Trap::set().await;
    check_each(&cases, async |case| {
        let name = &case.name;
        let document = document(case, &sandbox, &stranger, &trap.address());
        sandbox.issuer.respond_with(IssuerBehaviour::Body(document.clone()));
        sandbox.cyberscan.reset_counts();
        let fetches = sandbox.issuer.fetches();
        // Each set meets a relay that has none yet.
        let relay = TestRelay::beside(&sandbox, &[]).await;
        let answer = relay.post("/health", &sandbox.token(AUDIENCE), "").await.json();
        let message = answer["errors"][0]["message"].as_str().unwrap_or_default();
        let words = match case.expect.as_str() {
            "good" => "",
            "kid" => "Authorization failed: kid from JWT header not found in API response",
            "signature" => "Authorization failed: Failed to decode JWT with provided key.",
            "issuer" => "Authorization failed: Wrong jwks_host in JWT payload.",
            other => panic!("{name}: {other}"),
        };
        assert!(message.starts_with(words) && message.is_empty() == words.is_empty(), "{name}: {answer}");
        assert_eq!(answer.get("data").is_some(), case.expect == "good", "{name}: {answer}");
        if case.expect != "good" {
            assert_eq!(sandbox.cyberscan.count(Call::Token), 0, "{name}");
        }
        assert_eq!(sandbox.issuer.fetches(), fetches + 1, "{name}");
        // What the set says about other keys, or other algorithms, makes no forgery good.
        let forged = stranger
            .issuer
            .mint_with(json!({"alg": "RS256", "kid": sandbox.issuer.kid()}), &sandbox.claims(AUDIENCE));
        let answer = relay.post("/health", &forged, "").await.json();
        let forgeable = document.contains(stranger.issuer.jwk()["n"].as_str().unwrap());
        assert!(forgeable || answer.get("data").is_none(), "{name}: {answer}");
    })
    .await;
    assert!(trap.is_untouched().await);
}
