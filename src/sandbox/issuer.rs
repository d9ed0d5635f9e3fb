//! Owns the fake key issuer: RSA keys, the key set it serves at `/.well-known/jwks` (CONTRACT §3), and the tokens it signs.
//! Must not know what the claims mean, nor CyberScan.

use std::{
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use aws_lc_rs::{
    digest,
    encoding::{AsDer, PublicKeyX509Der},
    rand::SystemRandom,
    rsa::KeySize,
    signature::{KeyPair, RSA_PKCS1_SHA256, RsaEncoding, RsaKeyPair},
};
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use bytes::Bytes;
use http::{Request, Response, header};
use hyper::body::Incoming;
use serde_json::{Value, json};

use super::{
    jws, lock,
    tls::{self, Answer, Body, Listener},
};

/// How the issuer answers a fetch of its keys.
#[derive(Clone, Debug)]
pub enum IssuerBehaviour {
    /// With the key set.
    Keys,
    /// With this status and a small body.
    Status(u16),
    /// 200 and this body, verbatim.
    Body(String),
    /// Never.
    Hang,
    /// 200, and a body that never comes.
    HangInBody,
    /// With the key set, this much later.
    Delay(Duration),
    /// 302 to this location.
    Redirect(String),
    /// 200 and a body without end.
    Endless,
}

/// A cheap handle on the fake issuer.
#[derive(Clone)]
pub struct FakeIssuer {
    shared: Arc<Shared>,
}

struct Shared {
    host: String,
    connections: Arc<AtomicU64>,
    fetches: AtomicU64,
    state: Mutex<State>,
}

struct State {
    current: Arc<Key>,
    /// Still in the set, no longer signing.
    old: Vec<Arc<Key>>,
    behaviour: IssuerBehaviour,
}

impl FakeIssuer {
    /// An issuer to be reached at `listener`, which whoever shares it with this issuer serves.
    pub(super) async fn at(listener: &Listener, name: &str) -> io::Result<Self> {
        let state =
            State { current: Key::generate().await?, old: Vec::new(), behaviour: IssuerBehaviour::Keys };
        let shared = Shared {
            host: format!("{name}:{}", listener.port()?),
            connections: listener.connections(),
            fetches: AtomicU64::new(0),
            state: Mutex::new(state),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Where it listens, as `jwks_host` has it: `localhost:41234`.
    #[must_use]
    pub fn host(&self) -> String {
        self.shared.host.clone()
    }

    /// A token with exactly these claims, RS256, signed with the current key.
    #[must_use]
    pub fn mint(&self, claims: &Value) -> String {
        self.mint_with(json!({"alg": "RS256", "typ": "JWT", "kid": self.kid()}), claims)
    }

    /// Signs with the current key whatever header is given, for tokens no honest issuer makes.
    #[must_use]
    pub fn mint_with(&self, header: Value, claims: &Value) -> String {
        let key = self.current();
        jws(&header, claims, |input| key.sign(&RSA_PKCS1_SHA256, input))
    }

    /// The signature of `message` with the current key, by whatever RSA scheme.
    #[must_use]
    pub fn signature(&self, scheme: &'static dyn RsaEncoding, message: &[u8]) -> Vec<u8> {
        self.current().sign(scheme, message)
    }

    /// The current public key, as it stands in the key set.
    #[must_use]
    pub fn jwk(&self) -> Value {
        self.current().jwk.clone()
    }

    /// Replaces the key; the old one is dropped from the set at once.
    ///
    /// # Errors
    /// If no key can be generated.
    pub async fn rotate(&self) -> io::Result<()> {
        self.replace(false).await
    }

    /// Replaces the key; the old ones stay in the set, as careful issuers do.
    ///
    /// # Errors
    /// If no key can be generated.
    pub async fn rotate_keeping_old(&self) -> io::Result<()> {
        self.replace(true).await
    }

    async fn replace(&self, keep_old: bool) -> io::Result<()> {
        let key = Key::generate().await?;
        let mut state = lock(&self.shared.state);
        let old = std::mem::replace(&mut state.current, key);
        if keep_old {
            state.old.push(old);
        } else {
            state.old.clear();
        }
        Ok(())
    }

    /// The id of the current key.
    #[must_use]
    pub fn kid(&self) -> String {
        self.current().kid.clone()
    }

    /// The current public key as PEM (SPKI), the "secret" of an HS256 confusion attack.
    #[must_use]
    pub fn public_pem(&self) -> String {
        self.current().public_pem.clone()
    }

    /// Answers this way from now on.
    pub fn respond_with(&self, behaviour: IssuerBehaviour) {
        lock(&self.shared.state).behaviour = behaviour;
    }

    /// How often the key set was asked for, answered or not.
    #[must_use]
    pub fn fetches(&self) -> u64 {
        self.shared.fetches.load(Ordering::Relaxed)
    }

    /// How many TCP connections were accepted.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::Relaxed)
    }

    fn current(&self) -> Arc<Key> {
        Arc::clone(&lock(&self.shared.state).current)
    }

    fn key_set(&self) -> Response<Body> {
        let state = lock(&self.shared.state);
        let keys: Vec<&Value> = state.old.iter().chain([&state.current]).map(|key| &key.jwk).collect();
        tls::json(200, tls::whole(json!({ "keys": keys }).to_string()))
    }
}

impl Answer for FakeIssuer {
    async fn answer(&self, request: Request<Incoming>) -> io::Result<Response<Body>> {
        if request.method() != http::Method::GET || request.uri().path() != "/.well-known/jwks" {
            return Ok(tls::json(404, tls::whole(r#"{"error":"no such route"}"#)));
        }
        self.shared.fetches.fetch_add(1, Ordering::Relaxed);
        let behaviour = lock(&self.shared.state).behaviour.clone();
        Ok(match behaviour {
            IssuerBehaviour::Keys => self.key_set(),
            IssuerBehaviour::Status(code) => tls::json(code, tls::whole(r#"{"error":"scripted"}"#)),
            IssuerBehaviour::Body(body) => tls::json(200, tls::whole(body)),
            IssuerBehaviour::Hang => std::future::pending().await,
            IssuerBehaviour::Delay(delay) => {
                tokio::time::sleep(delay).await;
                self.key_set()
            }
            IssuerBehaviour::Redirect(location) => {
                tls::with_header(tls::json(302, tls::whole("")), header::LOCATION, &location)
            }
            IssuerBehaviour::HangInBody => tls::json(200, tls::silent()),
            IssuerBehaviour::Endless => {
                tls::json(200, tls::endless(r#"{"keys":["#, Bytes::from_static(&[b' '; 8192])))
            }
        })
    }
}

struct Key {
    kid: String,
    pair: RsaKeyPair,
    jwk: Value,
    public_pem: String,
}

impl Key {
    /// Finding primes takes a fraction of a second of pure computing, which must not hold up the runtime.
    async fn generate() -> io::Result<Arc<Self>> {
        let key =
            tokio::task::spawn_blocking(|| Self::from_pair(RsaKeyPair::generate(KeySize::Rsa2048)?)).await?;
        key.map(Arc::new).map_err(io::Error::other)
    }

    fn from_pair(pair: RsaKeyPair) -> Result<Self, aws_lc_rs::error::Unspecified> {
        let public = pair.public_key();
        let n = public.modulus().big_endian_without_leading_zero();
        let e = public.exponent().big_endian_without_leading_zero();
        // Derived from the key, so that two sandboxes never share a kid for different keys.
        let kid = URL_SAFE_NO_PAD.encode(digest::digest(&digest::SHA256, n));
        let jwk = json!({
            "kty": "RSA",
            "n": URL_SAFE_NO_PAD.encode(n),
            "e": URL_SAFE_NO_PAD.encode(e),
            "alg": "RS256",
            "kid": kid,
            "use": "sig",
        });
        let der: PublicKeyX509Der<'_> = public.as_der()?;
        let public_pem = pem(der.as_ref());
        Ok(Self { kid, jwk, public_pem, pair })
    }

    fn sign(&self, scheme: &'static dyn RsaEncoding, input: &[u8]) -> Vec<u8> {
        let mut signature = vec![0; self.pair.public_modulus_len()];
        self.pair
            .sign(scheme, &SystemRandom::new(), input, &mut signature)
            .expect("the buffer has the length of the modulus, and 2048 bits hold any SHA-2");
        signature
    }
}

fn pem(der: &[u8]) -> String {
    // 48 bytes make a line of 64 characters (RFC 7468).
    let lines: Vec<String> = der.chunks(48).map(|line| STANDARD.encode(line)).collect();
    format!("-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----\n", lines.join("\n"))
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::{
        Algorithm, DecodingKey, Validation, decode, decode_header,
        jwk::{Jwk, JwkSet},
    };

    use super::{
        super::tests::{client, sandbox},
        *,
    };

    fn validation() -> Validation {
        let mut validation = Validation::new(Algorithm::RS256);
        validation.set_required_spec_claims::<&str>(&[]);
        validation.set_audience(&["https://relay.example"]);
        validation
    }

    fn verifies(token: &str, jwk: &Jwk) -> bool {
        decode::<Value>(token, &DecodingKey::from_jwk(jwk).unwrap(), &validation()).is_ok()
    }

    async fn keys(client: &reqwest::Client, issuer: &FakeIssuer) -> JwkSet {
        let url = format!("https://{}/.well-known/jwks", issuer.host());
        let body = client.get(url).send().await.unwrap().text().await.unwrap();
        serde_json::from_str(&body).unwrap()
    }

    #[tokio::test]
    async fn a_minted_token_verifies_against_the_served_keys_and_adds_no_claim() {
        let sandbox = sandbox().await;
        let set = keys(&client(&sandbox), &sandbox.issuer).await;
        let token = sandbox.token("https://relay.example");
        let kid = decode_header(&token).unwrap().kid.unwrap();
        let key = DecodingKey::from_jwk(set.find(&kid).unwrap()).unwrap();
        let decoded = decode::<Value>(&token, &key, &validation()).unwrap();
        assert_eq!(decoded.claims, sandbox.claims("https://relay.example"));
        assert_eq!(sandbox.issuer.fetches(), 1);
    }

    #[tokio::test]
    async fn the_public_pem_is_the_key_of_the_set() {
        let sandbox = sandbox().await;
        let token = sandbox.token("https://relay.example");
        let key = DecodingKey::from_rsa_pem(sandbox.issuer.public_pem().as_bytes()).unwrap();
        decode::<Value>(&token, &key, &validation()).unwrap();
    }

    #[tokio::test]
    async fn any_header_can_be_signed() {
        let sandbox = sandbox().await;
        let token = sandbox.issuer.mint_with(json!({"alg": "none", "kid": 5}), &json!({"x": 1}));
        let parts: Vec<Vec<u8>> =
            token.split('.').map(|part| URL_SAFE_NO_PAD.decode(part).unwrap()).collect();
        assert_eq!(parts[0], br#"{"alg":"none","kid":5}"#);
        assert_eq!(parts[1], br#"{"x":1}"#);
        assert_eq!(parts[2].len(), 256);
    }

    #[tokio::test]
    async fn rotation_changes_the_key_and_its_id_and_keeps_the_old_one_only_when_told() {
        let sandbox = sandbox().await;
        let (client, issuer) = (client(&sandbox), &sandbox.issuer);
        let (first, first_kid) = (sandbox.token("https://relay.example"), issuer.kid());

        issuer.rotate_keeping_old().await.unwrap();
        let set = keys(&client, issuer).await;
        let second_kid = issuer.kid();
        assert_ne!(first_kid, second_kid);
        assert_eq!(set.keys.len(), 2);
        assert!(verifies(&first, set.find(&first_kid).unwrap()));
        let second = sandbox.token("https://relay.example");
        assert!(verifies(&second, set.find(&second_kid).unwrap()));
        assert!(!verifies(&second, set.find(&first_kid).unwrap()));

        issuer.rotate().await.unwrap();
        let set = keys(&client, issuer).await;
        assert_eq!(set.keys.len(), 1);
        assert!(set.find(&issuer.kid()).is_some());
    }

    #[tokio::test]
    async fn every_behaviour_is_what_it_says() {
        let sandbox = sandbox().await;
        let (client, issuer) = (client(&sandbox), &sandbox.issuer);
        let url = format!("https://{}/.well-known/jwks", issuer.host());
        let get = || client.get(&url).send();

        issuer.respond_with(IssuerBehaviour::Status(503));
        assert_eq!(get().await.unwrap().status(), 503);
        issuer.respond_with(IssuerBehaviour::Body("[1]".to_owned()));
        assert_eq!(get().await.unwrap().text().await.unwrap(), "[1]");
        issuer.respond_with(IssuerBehaviour::Redirect("http://127.0.0.1/".to_owned()));
        let answer = get().await.unwrap();
        assert_eq!(
            (answer.status().as_u16(), &answer.headers()["location"]),
            (302, &"http://127.0.0.1/".parse().unwrap())
        );
        issuer.respond_with(IssuerBehaviour::Hang);
        let hanging = client.get(&url).timeout(Duration::from_millis(200)).send().await;
        assert!(hanging.unwrap_err().is_timeout());
        issuer.respond_with(IssuerBehaviour::Endless);
        let mut answer = get().await.unwrap();
        assert_eq!(answer.status(), 200);
        let mut read = 0;
        while read < 100_000 {
            read += answer.chunk().await.unwrap().unwrap().len();
        }
        drop(answer);
        let before = tokio::time::Instant::now();
        issuer.respond_with(IssuerBehaviour::Delay(Duration::from_millis(60)));
        assert_eq!(get().await.unwrap().status(), 200);
        assert!(before.elapsed() >= Duration::from_millis(60));
        assert_eq!(issuer.fetches(), 6);
    }
}
