//! Tokens, from `tests/attacks/tokens.jsonl`: what is forged, bent or expired is refused on every
//! route with the words for it, and what is merely unusual is believed.

use std::{collections::HashSet, time::Duration};

use aws_lc_rs::{
    hmac,
    rand::SystemRandom,
    signature::{
        self, ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair,
    },
};
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE, URL_SAFE_NO_PAD},
};
use cyberscan_relay::{
    clock::Clock,
    doctor::explain_token,
    sandbox::{Call, Options, Sandbox},
    settings::Settings,
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    Trap,
    cases::{cases, check_each, fill, fill_all},
};
use crate::harness::{AUDIENCE, TestRelay, list, sandbox_settings};

/// One token. What is not said is as in a good one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    /// Members of the header beside or in place of the usual ones; or its text.
    #[serde(default)]
    header: Value,
    /// The same for the claims.
    #[serde(default)]
    claims: Value,
    /// Members of header and claims that are left out.
    #[serde(default)]
    without: Vec<String>,
    /// Claims that are a time, in seconds from now.
    #[serde(default)]
    times: serde_json::Map<String, Value>,
    /// What is signed: `<<h>>` and `<<p>>` are header and payload in base64url.
    #[serde(default = "usual_message")]
    message: String,
    /// By whom and how: see [`Forge::sign`].
    #[serde(default = "issuer")]
    sign: String,
    /// The token: `<<m>>` is the message, `<<s>>` the signature in base64url. A colon and a word after the
    /// name bend the spelling: see [`bent`].
    #[serde(default = "usual_token")]
    token: String,
    /// The lines of the request's head, `<<t>>` is the token.
    #[serde(default = "usual_lines")]
    lines: Vec<String>,
    /// One of [`ANSWERS`].
    expect: String,
}

fn usual_message() -> String {
    "<<h>>.<<p>>".into()
}

fn issuer() -> String {
    "issuer".into()
}

fn usual_token() -> String {
    "<<m>>.<<s>>".into()
}

fn usual_lines() -> Vec<String> {
    vec!["Authorization: Bearer <<t>>".into()]
}

/// What a case may expect, and what is then answered: a message after "Authorization failed: ", a
/// status of HTTP itself, or something else.
const ANSWERS: [(&str, &str); 16] = [
    ("good", ""),
    ("no header", "Authorization header is missing"),
    ("scheme", "Wrong authorization type"),
    ("structure", "Wrong JWT structure"),
    (
        "no issuer",
        "jwks_host is missing in JWT payload. Make sure custom_jwks_host field is present in module_type",
    ),
    (
        "issuer",
        "Wrong jwks_host in JWT payload. Make sure domain follows the visibility.<region>.cisco.com structure",
    ),
    ("kid", "kid from JWT header not found in API response"),
    (
        "signature",
        "Failed to decode JWT with provided key. \
         Make sure domain in custom_jwks_host corresponds to your SecureX instance region.",
    ),
    ("expired", "JWT has expired"),
    ("early", "JWT is not yet valid"),
    ("audience", "Wrong configuration-token-audience"),
    ("claims", "Wrong JWT payload structure"),
    ("key", "wrong api_key"),
    ("host", "Unable to connect to CyberScan, validate the configured API endpoint: "),
    ("400", ""),
    ("431", ""),
];

const ROUTES: [&str; 3] = ["/health", "/observe/observables", "/refer/observables"];

/// Who makes the tokens, with everything an attacker may have: keys of their own, the issuer's public
/// key, and signatures of the issuer's that are none of RS256.
struct Forge<'a> {
    sandbox: &'a Sandbox,
    stranger: &'a Sandbox,
    trap: String,
}

impl Forge<'_> {
    fn place(&self, name: &str) -> Option<String> {
        Some(match name {
            "kid" => self.sandbox.issuer.kid(),
            "stranger kid" => self.stranger.issuer.kid(),
            "issuer" => self.sandbox.issuer.host(),
            "stranger" => self.stranger.issuer.host(),
            "host" => self.sandbox.cyberscan.host(),
            "port" => self.sandbox.cyberscan.host().rsplit_once(':')?.1.to_owned(),
            "issuer port" => self.sandbox.issuer.host().rsplit_once(':')?.1.to_owned(),
            "audience" => AUDIENCE.to_owned(),
            "trap" => self.trap.clone(),
            "claims" => self.sandbox.claims(AUDIENCE).to_string().trim_matches(['{', '}']).to_owned(),
            "stranger n" => self.stranger.issuer.jwk()["n"].as_str()?.to_owned(),
            _ => return None,
        })
    }

    /// The text of header or claims: `usual`, changed as the case says.
    fn part(&self, case: &Case, usual: Value, changes: &Value) -> String {
        let place = |name: &str| self.place(name);
        if let Value::String(text) = changes {
            return fill(text, &place);
        }
        let mut members = usual.as_object().unwrap().clone();
        for (name, value) in fill_all(changes, &place).as_object().into_iter().flatten() {
            members.insert(name.clone(), value.clone());
        }
        for name in &case.without {
            members.remove(name);
        }
        Value::from(members).to_string()
    }

    fn token(&self, case: &Case) -> String {
        let usual = json!({"alg": "RS256", "typ": "JWT", "kid": self.sandbox.issuer.kid()});
        let header = self.part(case, usual, &case.header);
        let mut usual = self.sandbox.claims(AUDIENCE);
        for (name, offset) in &case.times {
            usual[name] = json!(Clock::system().unix().floor() + offset.as_f64().unwrap());
        }
        let payload = self.part(case, usual, &case.claims);
        let message = fill(&case.message, &|name| {
            let (name, bend) = name.split_once(':').unwrap_or((name, ""));
            let part = [("h", &header), ("p", &payload)].into_iter().find(|(it, _)| *it == name)?.1;
            Some(bent(part.as_bytes(), bend))
        });
        let signature = self.sign(&case.sign, message.as_bytes());
        fill(&case.token, &|name| {
            let (name, bend) = name.split_once(':').unwrap_or((name, ""));
            match name {
                "m" => Some(message.clone()),
                "h" => Some(bent(header.as_bytes(), bend)),
                "p" => Some(bent(payload.as_bytes(), bend)),
                "s" => Some(bent(&signature, bend)),
                _ => None,
            }
        })
    }

    /// `issuer` signs as it should, a `stranger` with another key; a word of RFC 7518 names a scheme the
    /// issuer's key can be made to sign by or, for HMAC, what of the issuer's is taken for the secret.
    fn sign(&self, how: &str, message: &[u8]) -> Vec<u8> {
        let (issuer, random) = (&self.sandbox.issuer, SystemRandom::new());
        let pem = issuer.public_pem();
        let der = || STANDARD.decode(pem.lines().filter(|line| !line.starts_with('-')).collect::<String>());
        let jwk = issuer.jwk();
        let (how, secret) = how.split_once(" with ").unwrap_or((how, ""));
        let mac = |algorithm| {
            let secret = match secret {
                "pem" => pem.clone().into_bytes(),
                "trimmed pem" => pem.trim_end().as_bytes().to_vec(),
                "der" => der().unwrap(),
                "n" => jwk["n"].as_str().unwrap().as_bytes().to_vec(),
                "modulus" => URL_SAFE_NO_PAD.decode(jwk["n"].as_str().unwrap()).unwrap(),
                "jwk" => jwk.to_string().into_bytes(),
                "kid" => issuer.kid().into_bytes(),
                "nothing" => Vec::new(),
                "secret" => b"secret".to_vec(),
                other => panic!("no secret is called {other:?}"),
            };
            hmac::sign(&hmac::Key::new(algorithm, &secret), message).as_ref().to_vec()
        };
        let own = |scheme| issuer.signature(scheme, message);
        match how {
            "issuer" => own(&signature::RSA_PKCS1_SHA256),
            "stranger" => self.stranger.issuer.signature(&signature::RSA_PKCS1_SHA256, message),
            "another message" => issuer.signature(&signature::RSA_PKCS1_SHA256, b"another message"),
            "RS384" => own(&signature::RSA_PKCS1_SHA384),
            "RS512" => own(&signature::RSA_PKCS1_SHA512),
            "PS256" => own(&signature::RSA_PSS_SHA256),
            "PS384" => own(&signature::RSA_PSS_SHA384),
            "PS512" => own(&signature::RSA_PSS_SHA512),
            "HS256" => mac(hmac::HMAC_SHA256),
            "HS384" => mac(hmac::HMAC_SHA384),
            "HS512" => mac(hmac::HMAC_SHA512),
            "ES256" => {
                let key = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
                key.sign(&random, message).unwrap().as_ref().to_vec()
            }
            "ES384" => {
                let key = EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING).unwrap();
                key.sign(&random, message).unwrap().as_ref().to_vec()
            }
            "EdDSA" => Ed25519KeyPair::generate().unwrap().sign(message).as_ref().to_vec(),
            "nothing" => Vec::new(),
            "zeros" => vec![0; 256],
            "ones" => vec![0xff; 256],
            "one bit wrong" => {
                let mut signature = own(&signature::RSA_PKCS1_SHA256);
                signature[100] ^= 1;
                signature
            }
            "a byte short" => own(&signature::RSA_PKCS1_SHA256)[..255].to_vec(),
            "a byte long" => [own(&signature::RSA_PKCS1_SHA256).as_slice(), &[0]].concat(),
            "a zero before" => [&[0], own(&signature::RSA_PKCS1_SHA256).as_slice()].concat(),
            "twice" => own(&signature::RSA_PKCS1_SHA256).repeat(2),
            other => panic!("nobody signs {other:?}"),
        }
    }
}

/// `bytes` in base64url, or in a spelling of it that is not the one of RFC 7515.
fn bent(bytes: &[u8], bend: &str) -> String {
    let text = URL_SAFE_NO_PAD.encode(bytes);
    let half = text.len() / 2;
    let into = |middle: &str| format!("{}{middle}{}", &text[..half], &text[half..]);
    match bend {
        "" => text,
        "padded" => {
            let padded = URL_SAFE.encode(bytes);
            assert!(padded.ends_with('='), "this part needs no padding: make it longer");
            padded
        }
        "overpadded" => text + "====",
        // `+` and `/` in place of `-` and `_`.
        "standard" => text.replace('-', "+").replace('_', "/"),
        // The bits that are left over in the last character are set.
        "loose" => {
            const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
            assert!(!text.len().is_multiple_of(4), "this part leaves no bits over: make it longer");
            let last = ALPHABET.iter().position(|char| Some(char) == text.as_bytes().last()).unwrap();
            format!("{}{}", &text[..text.len() - 1], char::from(ALPHABET[last + 1]))
        }
        "spaced" => into(" "),
        "tabbed" => into("\t"),
        "folded" => into("\r\n "),
        "percent" => into("%41"),
        "nul" => into("\0"),
        "equals" => into("="),
        "bang" => into("!"),
        "star" => into("*"),
        "quoted" => format!("\"{text}\""),
        "cut" => text[..text.len() - 1].to_owned(),
        "longer" => text + "A",
        "upper" => text.to_uppercase(),
        "lower" => text.to_lowercase(),
        "reversed" => text.chars().rev().collect(),
        "hex" => bytes.iter().map(|byte| format!("{byte:02x}")).collect(),
        "raw" => String::from_utf8_lossy(bytes).into_owned(),
        "twice" => URL_SAFE_NO_PAD.encode(text),
        other => panic!("nothing is bent {other:?}"),
    }
}

/// Sends the case's request to `route`; the status and the JSON of the answer.
async fn ask(relay: &TestRelay, case: &Case, token: &str, route: &str) -> (String, Value) {
    let head: String =
        case.lines.iter().map(|line| fill(line, &|_| Some(token.to_owned())) + "\r\n").collect();
    let body = list(&[("ip", "203.0.113.10")]);
    let request = format!(
        "POST {route} HTTP/1.1\r\nHost: relay.test\r\nConnection: close\r\nContent-Length: {}\r\n{head}\r\n{body}",
        body.len()
    );
    let answer = relay.raw_and_close(request.as_bytes()).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{}: {answer:?}", case.name));
    let status = head.strip_prefix("HTTP/1.1 ").unwrap().chars().take(3).collect();
    (status, serde_json::from_str(body).unwrap_or_default())
}

#[tokio::test]
async fn every_token_is_answered_as_it_deserves_on_every_route_and_only_the_issuer_is_called() {
    let cases: Vec<Case> = cases(include_str!("../../attacks/tokens.jsonl"));
    let good = cases.iter().filter(|case| case.expect == "good").count();
    assert!(cases.len() - good >= 300 && good >= 40, "{} bad and {good} good tokens", cases.len() - good);
    let names: HashSet<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    assert_eq!(names.len(), cases.len(), "two tokens have one name");
    for (answer, _) in ANSWERS {
        assert!(cases.iter().any(|case| case.expect == answer), "no token is answered with {answer:?}");
    }

    let trap = Trap::set().await;
    let (relay, started) = (TestRelay::start().await, Instant::now());
    let stranger = Sandbox::start(Options::default()).await.unwrap();
    let forge = Forge { sandbox: &relay.sandbox, stranger: &stranger, trap: trap.address() };
    check_each(&cases, async |case| {
        let name = &case.name;
        let (_, words) =
            ANSWERS.iter().find(|(it, _)| *it == case.expect).unwrap_or_else(|| panic!("{name}"));
        let asked = relay.sandbox.cyberscan.calls().len();
        for route in ROUTES {
            let (status, answer) = ask(&relay, case, &forge.token(case), route).await;
            if let "400" | "431" = case.expect.as_str() {
                assert_eq!(status, case.expect, "{name} {route}");
                continue;
            }
            assert_eq!(status, "200", "{name} {route}");
            if case.expect == "good" {
                assert!(answer.get("data").is_some(), "{name} {route}: {answer}");
                assert!(
                    answer["errors"]
                        .as_array()
                        .is_none_or(|errors| { errors.iter().all(|error| error["type"] == "warning") }),
                    "{name} {route}: {answer}"
                );
                continue;
            }
            let (code, message) = match case.expect.as_str() {
                "host" => ("connection error", answer["errors"][0]["message"].as_str().unwrap_or_default()),
                _ => ("authorization error", ""),
            };
            let expected = match message {
                "" => format!("Authorization failed: {words}"),
                message => {
                    assert!(message.starts_with(words), "{name} {route}: {answer}");
                    message.to_owned()
                }
            };
            let error = json!({"type": "fatal", "code": code, "message": expected});
            assert_eq!(answer, json!({"errors": [error]}), "{name} {route}");
        }
        // Of the refused, only whom CyberScan itself has to refuse costs it a call.
        if !matches!(case.expect.as_str(), "good" | "key") {
            assert_eq!(relay.sandbox.cyberscan.calls().len(), asked, "{name}");
        }
    })
    .await;
    assert!(trap.is_untouched().await);
    assert_eq!(relay.sandbox.cyberscan.count(Call::Other), 0);
    assert_eq!((stranger.issuer.connections(), stranger.cyberscan.connections()), (0, 0));
    let fetches = relay.sandbox.issuer.fetches();
    let most = 3 + started.elapsed().as_secs() / 30;
    assert!(fetches <= most, "{fetches} fetches of the key set for {} tokens", 3 * cases.len());
}

/// Whatever a relay says of a token, `doctor --token` says as well.
#[tokio::test]
async fn doctor_and_the_relay_never_disagree_about_a_token() {
    let cases: Vec<Case> = cases(include_str!("../../attacks/tokens.jsonl"));
    let relay = TestRelay::start().await;
    let stranger = Sandbox::start(Options::default()).await.unwrap();
    let trap = Trap::set().await;
    let forge = Forge { sandbox: &relay.sandbox, stranger: &stranger, trap: trap.address() };
    let ca = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(ca.path(), &relay.sandbox.ca_pem).unwrap();
    let settings = sandbox_settings(&relay.sandbox, ca.path().to_str().unwrap());
    let settings = Settings::load(None, settings).unwrap();
    // What a file can say: a token, or one line of a head. Faults of HTTP itself are no token's.
    let usual = usual_lines();
    let told: Vec<&Case> = cases
        .iter()
        .filter(|case| !matches!(case.expect.as_str(), "400" | "431"))
        .filter(|case| match &case.lines[..] {
            [line] => line.to_ascii_lowercase().starts_with("authorization:"),
            _ => false,
        })
        .collect();
    assert!(told.len() > 300, "{} tokens", told.len());
    check_each(&told, async |case| {
        let token = forge.token(case);
        let text = if case.lines == usual && !token.is_empty() {
            token.clone()
        } else {
            fill(&case.lines[0], &|_| Some(token.clone()))
        };
        let explained = explain_token(&settings, &text, None, Duration::from_secs(5)).await.unwrap();
        let (_, answer) = ask(&relay, case, &token, "/health").await;
        let fatal = answer["errors"].as_array().and_then(|errors| errors.first()).cloned();
        let said = explained.answer.as_ref().map(|error| serde_json::to_value(error).unwrap());
        assert_eq!(said, fatal, "{}: {:#}", case.name, explained.json());
        // The first check that fails is the one that decides.
        let report = explained.json();
        let failed = report["checks"].as_array().unwrap().iter().find(|check| check["outcome"] == "failed");
        let expected: &[&str] = match case.expect.as_str() {
            "good" => &[""],
            "no header" => &["header"],
            "scheme" => &["scheme"],
            "structure" => &["shape", "algorithm", "times"],
            "no issuer" => &["jwks_host"],
            "issuer" => &["allow-list"],
            "kid" => &["kid"],
            "signature" => &["signature"],
            "expired" | "early" => &["times"],
            "audience" => &["audience"],
            "claims" => &["claims"],
            "key" => &["api_key"],
            "host" => &["host", "api_key"],
            other => panic!("{other}"),
        };
        let failed = failed.map_or("", |check| check["check"].as_str().unwrap());
        assert!(expected.contains(&failed), "{}: {failed}", case.name);
    })
    .await;
    assert!(trap.is_untouched().await);
}
