//! Who is asking. It owns the way from an `Authorization` header to a verified tenant; it must not
//! read a body, call CyberScan or know how a refusal is worded.
//!
//! Order of the checks, which decides what a faulty token is told: header, scheme, form,
//! `jwks_host`, allow-list (before anything is sent anywhere), key id, algorithm, signature, times,
//! audience, credentials.

mod claims;
mod document;
pub mod error;
pub(crate) mod explain;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod jwks;

use std::{net::IpAddr, str::FromStr, sync::Arc, time::Duration};

use aws_lc_rs::digest;
use futures_util::FutureExt;
use http::{HeaderMap, header};
use ipnet::IpNet;
use jsonwebtoken::Algorithm;
use moka::sync::Cache;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

pub use error::AuthError;

use crate::{
    clock::Clock,
    egress::{Host, HostPatterns, Http},
    live::Live,
    metrics::{Metrics, Verdict},
    tenant::{ApiKey, RefusedHost, Tenant},
};
use claims::Jwt;
use jwks::{Jwks, KeySet};

/// Settings `auth.*`.
#[derive(Clone, Debug)]
pub struct Config {
    /// `auth.audiences`: the relay's public URLs. Empty: derived from each request.
    pub audiences: Vec<String>,
    /// Audiences as they are spelt in the settings, where that differs: upper case, the usual port.
    pub spellings: Vec<String>,
    /// `auth.jwks_hosts`: the key issuers that are believed.
    pub jwks_hosts: Vec<IssuerAddress>,
    /// `auth.require_exp`: whether a token without `exp` is refused.
    pub require_exp: bool,
    /// `auth.trusted_proxies`: whose `X-Forwarded-*` headers are read.
    pub trusted_proxies: Vec<IpNet>,
}

/// How far clocks may differ.
const LEEWAY: f64 = 300.0;
/// How long a verified token is remembered at most.
const REMEMBERED: Duration = Duration::from_secs(60);
/// How many verified tokens are remembered.
const TOKENS: u64 = 10_000;

/// Where a key issuer publishes its keys: `host[:port][/path]`, compared letter for letter with
/// `jwks_host`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuerAddress {
    text: String,
    host: Host,
    jwks_path: String,
}

impl IssuerAddress {
    fn as_str(&self) -> &str {
        &self.text
    }

    fn host(&self) -> &Host {
        &self.host
    }

    fn jwks_path(&self) -> &str {
        &self.jwks_path
    }
}

impl FromStr for IssuerAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const EXPECTED: &str =
            "expected a host name such as visibility.amp.cisco.com, with a port or path if need be";
        let (host, path) = text.split_at(text.find('/').unwrap_or(text.len()));
        let plain = |c: char| c.is_ascii_alphanumeric() || "/-._~".contains(c);
        let host: Host = host.parse().map_err(|_| EXPECTED)?;
        if !path.chars().all(plain) || path.ends_with('/') || path.contains("..") || path.contains("//") {
            return Err(EXPECTED);
        }
        Ok(Self { text: text.to_owned(), host, jwks_path: format!("{path}/.well-known/jwks") })
    }
}

/// A request that may be answered.
#[derive(Clone, Debug)]
pub struct Authorized {
    /// For whom. A host that is malformed or not allowed is told apart only when CyberScan would
    /// be asked, after the body has been judged.
    pub tenant: Result<Arc<Tenant>, RefusedHost>,
    /// How many sightings at most per observable, for this request.
    pub entities_limit: u32,
}

/// What of a request decides who is asking.
#[derive(Clone, Copy, Debug)]
pub struct Credentials<'a> {
    /// The headers.
    pub headers: &'a HeaderMap,
    /// The peer's address, if known.
    pub peer: Option<IpAddr>,
    /// Whether the request came over TLS of our own.
    pub tls: bool,
}

/// Verifies tokens; a cheap clone.
#[derive(Clone)]
pub struct Authenticator(Arc<Shared>);

struct Shared {
    rules: Live<Rules>,
    clock: Clock,
    metrics: Metrics,
    /// Verified tokens, by the SHA-256 of their exact bytes.
    verified: Cache<[u8; 32], Arc<Verified>>,
}

/// By what tokens are judged: all of it changes at once.
struct Rules {
    config: Config,
    cyberscan_hosts: HostPatterns,
    jwks: Jwks,
    /// Numbers them: what was verified by others counts for nothing.
    edition: u64,
}

/// What a verified token says, and what it was verified with.
struct Verified {
    authorized: Result<Authorized, AuthError>,
    audiences: Vec<String>,
    expires: Option<f64>,
    jwks_host: String,
    generation: u64,
    edition: u64,
}

impl Authenticator {
    /// Verifies with the keys of `config.jwks_hosts`, fetched through `http`; admits tenants of
    /// `cyberscan_hosts`.
    #[must_use]
    pub fn new(
        config: Config,
        cyberscan_hosts: HostPatterns,
        http: Http,
        clock: Clock,
        metrics: Metrics,
        tasks: TaskTracker,
    ) -> Self {
        let download = move |address: &IssuerAddress| document::fetch(http.clone(), address.clone()).boxed();
        let jwks = Jwks::new(&config, Box::new(download), metrics.clone(), tasks);
        Self(Arc::new(Shared {
            rules: Live::new(Rules { config, cyberscan_hosts, jwks, edition: 0 }),
            metrics,
            clock,
            verified: Cache::builder().max_capacity(TOKENS).time_to_live(REMEMBERED).build(),
        }))
    }

    /// Judges by other rules from now on; no token that was verified before is remembered.
    pub fn reconfigure(&self, config: Config, cyberscan_hosts: HostPatterns) {
        let old = self.0.rules.snapshot();
        let jwks = old.jwks.for_issuers(&config.jwks_hosts);
        self.0.rules.set(Rules { config, cyberscan_hosts, jwks, edition: old.edition + 1 });
        self.0.verified.invalidate_all();
    }

    /// Who is asking.
    ///
    /// # Errors
    /// The first check that fails.
    pub async fn authorize(&self, request: Credentials<'_>) -> Result<Authorized, AuthError> {
        let outcome = self.judge(request).await;
        let verdict = outcome.as_ref().map_or_else(|error| error.verdict(), |_| Verdict::Good);
        self.0.metrics.auth.inc((verdict,));
        outcome
    }

    /// Brings the age of the key sets up to date.
    pub fn measure(&self) {
        self.0.metrics.jwks_age.set((), self.0.rules.get().jwks.age().map_or(0.0, |age| age.as_secs_f64()));
    }

    async fn judge(&self, request: Credentials<'_>) -> Result<Authorized, AuthError> {
        let token = bearer(request.headers)?;
        let verified = self.verify(token).await?;
        if !verified.audiences.iter().any(|audience| self.is_ours(audience, request)) {
            return Err(AuthError::WrongAudience);
        }
        verified.authorized.clone()
    }

    async fn verify(&self, token: &str) -> Result<Arc<Verified>, AuthError> {
        let mut name = [0; 32];
        name.copy_from_slice(digest::digest(&digest::SHA256, token.as_bytes()).as_ref());
        if let Some(verified) = self.0.verified.get(&name)
            && self.still_holds(&verified)
        {
            return Ok(verified);
        }
        let verified = Arc::new(self.verify_in_full(token).await?);
        self.0.verified.insert(name, Arc::clone(&verified));
        Ok(verified)
    }

    fn still_holds(&self, verified: &Verified) -> bool {
        let rules = self.0.rules.get();
        verified.expires.is_none_or(|expires| self.0.clock.unix() < expires)
            && rules.edition == verified.edition
            && rules.jwks.fresh_generation(&verified.jwks_host) == Some(verified.generation)
    }

    async fn verify_in_full(&self, token: &str) -> Result<Verified, AuthError> {
        let asked = Instant::now();
        let jwt = Jwt::parse(token)?;
        let jwks_host = jwt.claims.jwks_host()?.ok_or(AuthError::WrongIssuer)?;
        let rules = self.0.rules.snapshot();
        if !rules.jwks.allows(jwks_host) {
            return Err(AuthError::WrongIssuer);
        }
        let kid = jwt.header.kid().ok_or(AuthError::UnknownKey)?;
        let mut keys = rules.jwks.set_with(jwks_host, kid).await?;
        if !jwt.header.is_rs256() {
            return Err(AuthError::Malformed);
        }
        let signed = |keys: &KeySet| {
            let verify = |key| {
                jsonwebtoken::crypto::verify(jwt.signature, jwt.message.as_bytes(), key, Algorithm::RS256)
            };
            keys.key(kid).is_some_and(|key| matches!(verify(key), Ok(true)))
        };
        if !signed(&keys) {
            let newer = rules.jwks.set_after(jwks_host, &keys, asked).await;
            keys = newer.filter(|keys| signed(keys)).ok_or(AuthError::WrongSignature)?;
        }
        let expires = jwt.claims.times(self.0.clock.unix(), LEEWAY, rules.config.require_exp)?;
        let authorized = jwt.claims.credentials().map(|(key, host)| Authorized {
            tenant: Tenant::admit(host, ApiKey::new(key.to_owned()), &rules.cyberscan_hosts).map(Arc::new),
            entities_limit: jwt.claims.entities_limit(),
        });
        Ok(Verified {
            authorized,
            audiences: jwt.claims.audiences(),
            expires,
            jwks_host: jwks_host.to_owned(),
            generation: keys.generation,
            edition: rules.edition,
        })
    }

    /// Whether `audience` means this relay: one of the configured URLs or, without any, the URL
    /// under which the request reached us.
    fn is_ours(&self, audience: &str, request: Credentials<'_>) -> bool {
        let rules = self.0.rules.get();
        if !rules.config.audiences.is_empty() {
            // The settings leave no slash at the end; whoever made the token may have.
            let audience = audience.trim_end_matches('/');
            let ours = rules.config.audiences.iter().chain(&rules.config.spellings);
            return ours.into_iter().any(|ours| ours == audience);
        }
        let forwarded = |name: &str| {
            let proxy = request.peer?.to_canonical();
            if !rules.config.trusted_proxies.iter().any(|net| net.contains(&proxy)) {
                return None;
            }
            // The right-most value is the one the trusted proxy itself has set.
            let value = request.headers.get_all(name).iter().next_back()?.to_str().ok()?;
            Some(value.rsplit(',').next().unwrap_or(value).trim())
        };
        let https = forwarded("x-forwarded-proto").map_or(request.tls, |scheme| scheme == "https");
        let scheme = if https { "https" } else { "http" };
        let host = forwarded("x-forwarded-host")
            .or_else(|| request.headers.get(header::HOST)?.to_str().ok())
            .unwrap_or_default();
        let usual_port = if https { ":443" } else { ":80" };
        let host = host.strip_suffix(usual_port).unwrap_or(host);
        !host.is_empty()
            && audience.strip_prefix(scheme).and_then(|rest| rest.strip_prefix("://")) == Some(host)
    }
}

/// The token of `Authorization: Bearer <token>` (RFC 6750 §2.1); the scheme's case and the number
/// of blanks do not matter.
fn bearer(headers: &HeaderMap) -> Result<&str, AuthError> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let value = values.next().ok_or(AuthError::MissingHeader)?;
    if values.next().is_some() {
        return Err(AuthError::WrongScheme);
    }
    let text = value.to_str().map_err(|_| AuthError::WrongScheme)?;
    let (scheme, token) = text.trim_ascii().split_once([' ', '\t']).ok_or(AuthError::WrongScheme)?;
    let token = token.trim_ascii_start();
    // Two searches for one byte are faster than one for a set, and a token is long.
    if scheme.eq_ignore_ascii_case("Bearer") && !token.contains(' ') && !token.contains('\t') {
        Ok(token)
    } else {
        Err(AuthError::WrongScheme)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        egress,
        sandbox::{self, IssuerBehaviour, Sandbox},
    };
    use http::HeaderValue;
    use serde_json::{Value, json};

    const AUDIENCE: &str = "http://relay.example";

    struct Rig {
        sandbox: Sandbox,
        auth: Authenticator,
        clock: Clock,
    }

    /// An authenticator that believes the sandbox's issuer, over real TLS.
    async fn rig() -> Rig {
        rig_with(|_| {}).await
    }

    async fn rig_with(change: impl FnOnce(&mut Config)) -> Rig {
        let sandbox = Sandbox::start(sandbox::Options::default()).await.unwrap();
        let ca = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(ca.path(), &sandbox.ca_pem).unwrap();
        let http = Http::new(&egress::Config {
            allow_cidrs: vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
            extra_ca_file: Some(ca.path().to_owned()),
            proxy: None,
            connect_timeout: Duration::from_secs(2),
        })
        .unwrap();
        let mut config = Config {
            audiences: vec![AUDIENCE.into()],
            jwks_hosts: vec![sandbox.issuer.host().parse().unwrap()],
            spellings: Vec::new(),
            require_exp: false,
            trusted_proxies: vec!["10.0.0.0/8".parse().unwrap()],
        };
        change(&mut config);
        let hosts = std::iter::once(sandbox.cyberscan.host().parse().unwrap()).collect();
        let clock = Clock::starting_at(Clock::system().now());
        let auth = Authenticator::new(config, hosts, http, clock, Metrics::new(), TaskTracker::new());
        Rig { sandbox, auth, clock }
    }

    impl Rig {
        async fn authorize(&self, token: &str) -> Result<Authorized, AuthError> {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
            self.auth.authorize(Credentials { headers: &headers, peer: None, tls: false }).await
        }

        fn claims(&self, changes: &[(&str, Value)]) -> Value {
            let mut claims = self.sandbox.claims(AUDIENCE);
            for (name, value) in changes {
                claims[*name] = value.clone();
            }
            claims
        }
    }

    #[tokio::test]
    async fn a_good_token_is_verified_with_one_fetch_however_many_ask() {
        let rig = rig().await;
        let token = rig.sandbox.token(AUDIENCE);
        let all = futures_util::future::join_all((0..50).map(|_| rig.authorize(&token))).await;
        assert!(all.iter().all(|outcome| outcome.as_ref().is_ok_and(|a| a.tenant.is_ok())));
        assert_eq!(rig.sandbox.issuer.fetches(), 1);
    }

    #[tokio::test]
    async fn a_remembered_token_is_good_no_longer_than_its_key_and_its_time() {
        let rig = rig().await;
        let old = rig.sandbox.token(AUDIENCE);
        rig.authorize(&old).await.unwrap();
        rig.sandbox.issuer.rotate().await.unwrap();
        rig.authorize(&rig.sandbox.token(AUDIENCE)).await.unwrap();
        assert_eq!(rig.authorize(&old).await.err(), Some(AuthError::UnknownKey));

        let expired = json!(rig.clock.unix() - LEEWAY + 1.0);
        let ending = rig.sandbox.issuer.mint(&rig.claims(&[("exp", expired)]));
        rig.authorize(&ending).await.unwrap();
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(2)).await;
        assert_eq!(rig.authorize(&ending).await.err(), Some(AuthError::Expired));
    }

    #[tokio::test]
    async fn the_limit_belongs_to_the_token() {
        let rig = rig().await;
        for limit in [1, 100] {
            let token = rig.sandbox.issuer.mint(&rig.claims(&[("CTR_ENTITIES_LIMIT", json!(limit))]));
            assert_eq!(rig.authorize(&token).await.unwrap().entities_limit, limit);
        }
    }

    #[tokio::test]
    async fn an_issuer_that_is_not_listed_letter_for_letter_is_never_asked() {
        let rig = rig().await;
        let host = rig.sandbox.issuer.host();
        let (name, port) = host.split_once(':').unwrap();
        let spellings = [
            host.to_uppercase(),
            format!("{host}/"),
            format!(" {host}"),
            format!("{host} "),
            format!("{host}."),
            format!("{name}.:{port}"),
            format!("127.0.0.1:{port}"),
            format!("[::1]:{port}"),
            format!("2130706433:{port}"),
            format!("user@{host}"),
            format!("{host}@evil.test"),
            format!("{host}#evil.test"),
            format!("{host}?x=evil.test"),
            format!("{host}\\evil.test"),
            format!("https://{host}"),
            format!("//{host}"),
            format!("{host}\n"),
            format!("{host}\0"),
            name.to_string(),
            format!("{name}:0{port}"),
            format!("{host}/../x"),
            format!("evil{host}"),
            String::new(),
        ];
        let odd = [json!(null), json!(5), json!([host.clone()]), json!({}), json!(true)];
        for jwks_host in spellings.into_iter().map(Value::from).chain(odd) {
            let token = rig.sandbox.issuer.mint(&rig.claims(&[("jwks_host", jwks_host.clone())]));
            assert_eq!(rig.authorize(&token).await.err(), Some(AuthError::WrongIssuer), "{jwks_host}");
        }
        assert_eq!(rig.sandbox.issuer.connections(), 0);
    }

    #[tokio::test]
    async fn only_rs256_by_the_issuers_key_is_believed() {
        let rig = rig().await;
        let issuer = &rig.sandbox.issuer;
        let claims = rig.claims(&[]);
        let header = |alg: &str| json!({"alg": alg, "kid": issuer.kid(), "typ": "JWT"});
        for alg in
            ["none", "nOnE", "HS256", "HS512", "RS384", "RS512", "PS256", "ES256", "EdDSA", "rs256", ""]
        {
            let token = issuer.mint_with(header(alg), &claims);
            assert_eq!(rig.authorize(&token).await.err(), Some(AuthError::Malformed), "{alg}");
        }
        let hmac = jsonwebtoken::encode(
            &jsonwebtoken::Header { kid: Some(issuer.kid()), ..Default::default() },
            &claims,
            &jsonwebtoken::EncodingKey::from_secret(issuer.public_pem().as_bytes()),
        )
        .unwrap();
        assert_eq!(rig.authorize(&hmac).await.err(), Some(AuthError::Malformed));

        let stranger = Sandbox::start(sandbox::Options::default()).await.unwrap();
        let forged = stranger.issuer.mint_with(header("RS256"), &claims);
        assert_eq!(rig.authorize(&forged).await.err(), Some(AuthError::WrongSignature));
        let good = issuer.mint(&claims);
        let (message, _) = good.rsplit_once('.').unwrap();
        assert_eq!(rig.authorize(&format!("{message}.")).await.err(), Some(AuthError::WrongSignature));
        assert_eq!(rig.authorize(&good).await.err(), None);
        assert_eq!(rig.authorize(&format!("{good}==")).await.err(), Some(AuthError::Malformed));
    }

    #[tokio::test]
    async fn keys_verify_however_their_issuer_writes_them_down() {
        use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
        let jwk = |rig: &Rig| rig.sandbox.issuer.jwk();
        let number = |jwk: &Value, name: &str| URL_SAFE_NO_PAD.decode(jwk[name].as_str().unwrap()).unwrap();
        let zeros = |jwk: &Value, name: &str, count: usize| {
            URL_SAFE_NO_PAD.encode([vec![0; count], number(jwk, name)].concat())
        };
        type Spell<'a> = &'a dyn Fn(&mut Value);
        let spellings: [(&str, Spell<'_>); 6] = [
            ("a zero before n", &|jwk| jwk["n"] = zeros(jwk, "n", 1).into()),
            ("zeros before e", &|jwk| jwk["e"] = zeros(jwk, "e", 9).into()),
            ("padded n", &|jwk| jwk["n"] = format!("{}==", jwk["n"].as_str().unwrap()).into()),
            ("a zero before a padded n", &|jwk| jwk["n"] = format!("{}=", zeros(jwk, "n", 1)).into()),
            ("padded e", &|jwk| jwk["e"] = format!("{}==", zeros(jwk, "e", 1)).into()),
            ("null members", &|jwk| {
                for name in ["use", "alg", "x5c", "key_ops"] {
                    jwk[name] = Value::Null;
                }
            }),
        ];
        for (name, spell) in spellings {
            let rig = rig().await;
            let mut spelled = jwk(&rig);
            spell(&mut spelled);
            let document = json!({"keys": [spelled]}).to_string();
            rig.sandbox.issuer.respond_with(IssuerBehaviour::Body(document));
            assert!(rig.authorize(&rig.sandbox.token(AUDIENCE)).await.is_ok(), "{name}");
        }

        let rig = rig().await;
        let others = (0..100).map(|i| {
            let mut other = jwk(&rig);
            other["kid"] = format!("other-{i}").into();
            other
        });
        let all: Vec<Value> = others.chain([jwk(&rig)]).collect();
        rig.sandbox.issuer.respond_with(IssuerBehaviour::Body(json!({ "keys": all }).to_string()));
        assert!(rig.authorize(&rig.sandbox.token(AUDIENCE)).await.is_ok(), "the last of 101 keys");
    }

    #[tokio::test]
    async fn a_key_that_is_replaced_under_its_id_is_found_and_the_old_one_is_dead() {
        let (rig, successor) = (rig().await, Sandbox::start(sandbox::Options::default()).await.unwrap());
        let kid = rig.sandbox.issuer.kid();
        let old = rig.sandbox.token(AUDIENCE);
        rig.authorize(&old).await.unwrap();
        let mut jwk = successor.issuer.jwk();
        jwk["kid"] = kid.clone().into();
        rig.sandbox.issuer.respond_with(IssuerBehaviour::Body(json!({ "keys": [jwk] }).to_string()));
        let header = json!({"alg": "RS256", "kid": kid});
        let new = successor.issuer.mint_with(header.clone(), &rig.claims(&[]));
        assert!(rig.authorize(&new).await.is_ok(), "the next token finds the new key");
        assert_eq!(rig.authorize(&old).await.err(), Some(AuthError::WrongSignature));
        assert_eq!(rig.sandbox.issuer.fetches(), 2);

        let stranger = Sandbox::start(sandbox::Options::default()).await.unwrap();
        for number in 0..50 {
            let forged = stranger.issuer.mint_with(header.clone(), &rig.claims(&[("n", json!(number))]));
            assert_eq!(rig.authorize(&forged).await.err(), Some(AuthError::WrongSignature));
        }
        assert_eq!(
            rig.sandbox.issuer.fetches(),
            2,
            "forged signatures cost a fetch in thirty seconds at most"
        );
    }

    #[tokio::test]
    async fn headers_that_point_to_other_keys_are_not_followed() {
        let rig = rig().await;
        let trap = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://{}/jwks", trap.local_addr().unwrap());
        let stranger = Sandbox::start(sandbox::Options::default()).await.unwrap();
        for name in ["jku", "x5u"] {
            let header = json!({"alg": "RS256", "kid": rig.sandbox.issuer.kid(), name: url});
            let token = stranger.issuer.mint_with(header, &rig.claims(&[]));
            assert_eq!(rig.authorize(&token).await.err(), Some(AuthError::WrongSignature));
        }
        let accepted = tokio::time::timeout(Duration::from_millis(50), trap.accept()).await;
        assert!(accepted.is_err(), "the URL of a header was called");
    }

    #[tokio::test]
    async fn strangers_with_invented_key_ids_cause_one_more_fetch() {
        let rig = rig().await;
        rig.authorize(&rig.sandbox.token(AUDIENCE)).await.unwrap();
        for i in 0..200 {
            let header = json!({"alg": "RS256", "kid": format!("stranger-{i}")});
            let token = rig.sandbox.issuer.mint_with(header, &rig.claims(&[]));
            assert_eq!(rig.authorize(&token).await.err(), Some(AuthError::UnknownKey));
        }
        assert_eq!(rig.sandbox.issuer.fetches(), 2);
        rig.authorize(&rig.sandbox.token(AUDIENCE)).await.unwrap();
    }

    #[tokio::test]
    async fn an_issuer_that_fails_is_left_alone_for_a_while_and_then_found_again() {
        let rig = rig().await;
        let token = rig.sandbox.token(AUDIENCE);
        for behaviour in [
            IssuerBehaviour::Status(500),
            IssuerBehaviour::Body("<html>".into()),
            IssuerBehaviour::Redirect("https://127.0.0.1:1/".into()),
            IssuerBehaviour::Endless,
        ] {
            rig.sandbox.issuer.respond_with(behaviour);
            assert_eq!(rig.authorize(&token).await.err(), Some(AuthError::WrongIssuer));
        }
        assert_eq!(rig.sandbox.issuer.fetches(), 1, "it was asked again at once");
        rig.sandbox.issuer.respond_with(IssuerBehaviour::Keys);
        tokio::time::sleep(Duration::from_millis(1100)).await;
        rig.authorize(&token).await.unwrap();
    }

    #[tokio::test]
    async fn checks_come_in_their_order() {
        let rig = rig().await;
        let mint = |changes: &[(&str, Value)]| rig.sandbox.issuer.mint(&rig.claims(changes));
        let long_ago = ("exp", json!(1));
        let elsewhere = ("aud", json!("http://elsewhere"));
        let no_host = ("host", json!(null));
        for (changes, error) in [
            (vec![long_ago.clone(), elsewhere.clone(), no_host.clone()], AuthError::Expired),
            (vec![elsewhere, no_host.clone()], AuthError::WrongAudience),
            (vec![no_host], AuthError::MissingClaims),
            (vec![("nbf", json!(4_102_444_800_u64))], AuthError::NotYetValid),
        ] {
            assert_eq!(rig.authorize(&mint(&changes)).await.err(), Some(error));
        }
        let header = json!({"alg": "none", "kid": "unknown"});
        let token = rig.sandbox.issuer.mint_with(header, &rig.claims(&[long_ago]));
        assert_eq!(rig.authorize(&token).await.err(), Some(AuthError::UnknownKey));
    }

    #[tokio::test]
    async fn without_configured_audiences_the_request_says_who_we_are() {
        let rig = rig_with(|config| config.audiences.clear()).await;
        let ask = async |aud: &str, host: &str, peer: &str, forwarded: &[(&'static str, &str)], tls| {
            let token = rig.sandbox.issuer.mint(&rig.claims(&[("aud", json!(aud))]));
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, format!("Bearer {token}").parse().unwrap());
            headers.insert(header::HOST, HeaderValue::from_str(host).unwrap());
            for (name, value) in forwarded {
                headers.append(*name, HeaderValue::from_str(value).unwrap());
            }
            let peer = Some(peer.parse().unwrap());
            rig.auth.authorize(Credentials { headers: &headers, peer, tls }).await.err()
        };
        let outcome = async |aud: &str, host: &str, peer: &str, forwarded: &[(&'static str, &str)]| {
            ask(aud, host, peer, forwarded, false).await
        };
        let https = [("x-forwarded-proto", "http, https")];
        let elsewhere = [("x-forwarded-host", "evil.test, relay.example")];
        let (stranger, proxy) = ("192.0.2.1", "10.1.2.3");
        assert_eq!(outcome("http://relay.example", "relay.example", stranger, &[]).await, None);
        assert_eq!(outcome("http://relay.example", "relay.example:80", stranger, &[]).await, None);
        assert_eq!(outcome("http://relay.example:9090", "relay.example:9090", stranger, &[]).await, None);
        assert_eq!(outcome("https://relay.example", "relay.example:443", proxy, &https).await, None);
        assert_eq!(outcome("http://relay.example", "internal:9090", proxy, &elsewhere).await, None);
        for (aud, host, peer, forwarded) in [
            ("http://relay.example", "relay.example:443", stranger, &[][..]),
            ("http://relay.example/", "relay.example", stranger, &[]),
            ("relay.example", "relay.example", stranger, &[]),
            ("https://relay.example", "relay.example", stranger, &https),
            ("http://evil.test", "internal:9090", proxy, &elsewhere),
            ("http://relay.example", "internal:9090", stranger, &elsewhere),
            ("http://", "", stranger, &[]),
        ] {
            let error = Some(AuthError::WrongAudience);
            assert_eq!(outcome(aud, host, peer, forwarded).await, error, "{aud} {host} {peer}");
        }

        // Over TLS of our own.
        let http = [("x-forwarded-proto", "http")];
        for (aud, host, peer, forwarded, error) in [
            ("https://relay.example", "relay.example", stranger, &[][..], None),
            ("https://relay.example", "relay.example:443", stranger, &[], None),
            ("https://relay.example:8443", "relay.example:8443", stranger, &http, None),
            ("http://relay.example", "relay.example", proxy, &http, None),
            ("http://relay.example", "relay.example", stranger, &[], Some(AuthError::WrongAudience)),
            ("http://relay.example", "relay.example", stranger, &http, Some(AuthError::WrongAudience)),
            ("https://relay.example", "relay.example", proxy, &http, Some(AuthError::WrongAudience)),
        ] {
            assert_eq!(ask(aud, host, peer, forwarded, true).await, error, "{aud} {host} {peer}");
        }
    }

    #[test]
    fn the_header_is_bearer_and_one_token() {
        let read = |values: &[&[u8]]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, HeaderValue::from_bytes(value).unwrap());
            }
            bearer(&headers).map(String::from)
        };
        assert_eq!(read(&[]), Err(AuthError::MissingHeader));
        assert_eq!(read(&[b"bEARER   a.b.c  "]), Ok("a.b.c".into()));
        for bad in
            [&b""[..], b"Bearer", b"a.b.c", b"Basic a.b.c", b"Bearer: a.b.c", b"Bearer a b", b"Bearer \xe9"]
        {
            assert_eq!(read(&[bad]), Err(AuthError::WrongScheme));
        }
        assert_eq!(read(&[b"Bearer a", b"Bearer b"]), Err(AuthError::WrongScheme));
    }

    #[test]
    fn an_issuers_address_may_have_a_port_and_a_path() {
        let parse = |text: &str| text.parse::<IssuerAddress>().map(|a| (a.host.to_string(), a.jwks_path));
        assert_eq!(parse("a.test"), Ok(("a.test".into(), "/.well-known/jwks".into())));
        assert_eq!(parse("a.test:8443/x/y"), Ok(("a.test:8443".into(), "/x/y/.well-known/jwks".into())));
        for text in [
            "",
            "https://a.test",
            "a.test/",
            "a.test/x?y",
            "a.test/x#y",
            "a.test/../y",
            "a.test//y",
            "a b.test",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
