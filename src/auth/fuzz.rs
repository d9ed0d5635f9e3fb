//! What must hold of any token and any key set, before a signature says whose they are.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::Algorithm;
use serde_json::Value;

use super::{
    LEEWAY,
    claims::{Jwt, pasted},
    document,
};

/// A token; or its header and its payload, with a line feed between them.
pub fn token(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else {
        return;
    };
    taken_apart(text);
    if let Some((header, payload)) = text.split_once('\n') {
        let encode = |part| URL_SAFE_NO_PAD.encode(part);
        taken_apart(&format!("{}.{}.AAAA", encode(header), encode(payload)));
    }
}

fn taken_apart(token: &str) {
    const NOW: f64 = 1_800_000_000.0;
    let Ok(jwt) = Jwt::parse(token) else {
        return;
    };
    assert!(token.len() <= 8192 && format!("{}.{}", jwt.message, jwt.signature) == token);
    let decoded: Vec<Vec<u8>> = token
        .split('.')
        .map(|part| {
            let bytes = URL_SAFE_NO_PAD.decode(part).expect("a token taken apart is base64url");
            assert_eq!(URL_SAFE_NO_PAD.encode(&bytes), part, "one token has two spellings");
            bytes
        })
        .collect();
    let [header, payload, _signature] = <&[_; 3]>::try_from(&*decoded).expect("a token has three parts");
    assert!(std::str::from_utf8(header).is_ok() && std::str::from_utf8(payload).is_ok());

    assert!((1..=1000).contains(&jwt.claims.entities_limit()));
    if let Ok(expires) = jwt.claims.times(NOW, LEEWAY, false) {
        assert!(expires.is_none_or(|expires| expires >= NOW - LEEWAY));
        assert_eq!(jwt.claims.times(NOW, LEEWAY, true).is_ok(), expires.is_some());
    }
    let (key, host) = jwt.claims.credentials().map_or((None, None), |(key, host)| (Some(key), Some(host)));
    assert!(
        key.is_none_or(|key| (1..=256).contains(&key.len()) && key.bytes().all(|b| b.is_ascii_graphic()))
    );
    assert!(jwt.header.kid().is_none_or(|kid| kid.len() <= 256));

    // What is read is what everyone else reads there. A plain reader refuses more: numbers and nestings
    // without end in members that are not read here.
    let (Ok(header), Ok(claims)) =
        (serde_json::from_slice::<Value>(header), serde_json::from_slice::<Value>(payload))
    else {
        return;
    };
    assert!(header.is_object() && claims.is_object() && header.get("crit").is_none());
    assert_eq!(jwt.header.is_rs256(), header.get("alg") == Some(&"RS256".into()));
    let same =
        |read: Option<&str>, there: Option<&Value>| read.is_none() || read == there.and_then(Value::as_str);
    assert!(same(jwt.header.kid(), header.get("kid")));
    // What was pasted loses what is around it, and nothing else.
    let within = |read: Option<&str>, there: Option<&Value>| {
        read.is_none_or(|read| there.and_then(Value::as_str).is_some_and(|there| pasted(there) == read))
    };
    assert!(within(key, claims.get("api_key")) && within(host, claims.get("host")));
    assert!(same(jwt.claims.jwks_host().ok().flatten(), claims.get("jwks_host")));
    for audience in jwt.claims.audiences() {
        let there = claims.get("aud").expect("an audience comes from its claim");
        assert!(
            *there == *audience || there.as_array().is_some_and(|all| all.iter().any(|it| *it == *audience))
        );
    }
}

/// A key set.
pub fn key_set(input: &[u8]) {
    let Some(keys) = document::import(input) else {
        return;
    };
    let document: Value = serde_json::from_slice(input).expect("a key set is JSON");
    let entries = document.get("keys").and_then(Value::as_array).expect("a key set has a list of keys");
    assert!(keys.len() <= entries.len());
    for (kid, key) in &keys {
        assert!((1..=256).contains(&kid.len()));
        let is = |entry: &Value, name, value: &str| entry.get(name).is_some_and(|it: &Value| *it == *value);
        let may_be = |entry: &Value, name, value: &str| {
            entry.get(name).is_none_or(|it: &Value| it.is_null() || *it == *value)
        };
        let its = |entry: &Value| {
            is(entry, "kid", kid.as_str())
                && is(entry, "kty", "RSA")
                && may_be(entry, "use", "sig")
                && may_be(entry, "alg", "RS256")
        };
        assert!(entries.iter().any(its), "{kid:?} is no key for signatures");
        for signature in ["", "AAAA", &"A".repeat(342), &"_".repeat(341)] {
            let verified = jsonwebtoken::crypto::verify(signature, b"a.b", key, Algorithm::RS256);
            assert!(!matches!(verified, Ok(true)), "{kid:?} verifies anything");
        }
    }
}
