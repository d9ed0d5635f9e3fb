//! The checks of a token, one by one, for an operator who wants to know which of them fails. It owns the walk; every
//! decision is made by the functions that decide for requests, and the verdict is [`Authenticator::judge`]'s own.
//!
//! Where a check fails those after it are tried all the same, as far as they can be: a token often has more than one
//! fault, and whoever mends it wants to know all of them.

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::header;
use jsonwebtoken::Algorithm;
use serde_json::{Map, Value};

use super::{
    AuthError, Authenticator, Authorized, Credentials, IssuerAddress, LEEWAY, bearer, claims::Jwt, document,
};
use crate::{
    egress::Host,
    tenant::{ApiKey, RefusedHost, Tenant},
};

/// How far clocks may differ, in seconds.
pub(crate) const CLOCKS_MAY_DIFFER: f64 = LEEWAY;

/// The checks, in the order in which they are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenCheck {
    /// There is an `Authorization` header.
    Header,
    /// It is `Bearer <token>`.
    Scheme,
    /// The token is a JWT in its strict form.
    Shape,
    /// The payload names a key issuer.
    Issuer,
    /// The key issuer is on the allow-list.
    AllowList,
    /// The key issuer answers, and has a key of that id.
    KeyId,
    /// The algorithm is RS256.
    Algorithm,
    /// The signature is that key's.
    Signature,
    /// `exp`, `nbf` and `iat`.
    Times,
    /// The audience is this relay.
    Audience,
    /// API key and host are there.
    Claims,
    /// The host is well-formed and allowed.
    Host,
}

impl TokenCheck {
    /// All, in order.
    pub const ALL: [Self; 12] = [
        Self::Header,
        Self::Scheme,
        Self::Shape,
        Self::Issuer,
        Self::AllowList,
        Self::KeyId,
        Self::Algorithm,
        Self::Signature,
        Self::Times,
        Self::Audience,
        Self::Claims,
        Self::Host,
    ];

    /// Its name in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::Scheme => "scheme",
            Self::Shape => "shape",
            Self::Issuer => "jwks_host",
            Self::AllowList => "allow-list",
            Self::KeyId => "kid",
            Self::Algorithm => "algorithm",
            Self::Signature => "signature",
            Self::Times => "times",
            Self::Audience => "audience",
            Self::Claims => "claims",
            Self::Host => "host",
        }
    }
}

/// Why a request would be refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// It is not authorized.
    Auth(AuthError),
    /// Its host would not be called.
    Host(RefusedHost),
}

/// What came of one check; `None`: it could not be tried, because of one before it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The check.
    pub check: TokenCheck,
    /// Its outcome.
    pub outcome: Option<Result<(), Refusal>>,
}

/// What a token says. Nothing of it is verified; the API key is not in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// The header's members.
    pub header: Option<Map<String, Value>>,
    /// The claims but `api_key`.
    pub claims: Option<Map<String, Value>>,
    /// Whether there is an `api_key`.
    pub has_api_key: bool,
}

/// A request, explained.
#[derive(Debug)]
pub struct Explanation {
    /// All checks, in order.
    pub steps: Vec<Step>,
    /// What a relay would say.
    pub verdict: Result<Authorized, Refusal>,
    /// What the token says.
    pub said: Said,
}

impl Authenticator {
    /// Explains `request`.
    pub async fn explain(&self, request: Credentials<'_>) -> Explanation {
        let steps = self.walk(request).await;
        let verdict = match self.judge(request).await {
            Ok(authorized) => match &authorized.tenant {
                Ok(_) => Ok(authorized),
                Err(refused) => Err(Refusal::Host(refused.clone())),
            },
            Err(error) => Err(Refusal::Auth(error)),
        };
        Explanation { steps, verdict, said: said(request) }
    }

    async fn walk(&self, request: Credentials<'_>) -> Vec<Step> {
        let mut walk = Walk::default();
        let token = match bearer(request.headers) {
            Err(AuthError::MissingHeader) => {
                walk.note::<()>(TokenCheck::Header, Err(AuthError::MissingHeader));
                return walk.steps();
            }
            token => walk.note(TokenCheck::Scheme, token),
        };
        walk.note(TokenCheck::Header, Ok(()));
        let Some(jwt) = token.and_then(|token| walk.note(TokenCheck::Shape, Jwt::parse(token))) else {
            return walk.steps();
        };
        let (shared, rules) = (&self.0, self.0.rules.snapshot());
        let named = jwt.claims.jwks_host();
        // A claim that is there but no text is on nobody's list.
        walk.note(TokenCheck::Issuer, named.map(drop));
        let jwks_host = match named {
            Ok(named) => {
                let allowed = named.filter(|jwks_host| rules.jwks.allows(jwks_host));
                walk.note(TokenCheck::AllowList, allowed.ok_or(AuthError::WrongIssuer))
            }
            Err(_) => None,
        };
        let rs256 = if jwt.header.is_rs256() { Ok(()) } else { Err(AuthError::Malformed) };
        let rs256 = walk.note(TokenCheck::Algorithm, rs256).is_some();
        if let Some(jwks_host) = jwks_host {
            let kid = jwt.header.kid().ok_or(AuthError::UnknownKey);
            let keys = match kid {
                Ok(kid) => rules.jwks.set_with(jwks_host, kid).await.map(|keys| (kid, keys)),
                Err(error) => Err(error),
            };
            if let Some((kid, keys)) = walk.note(TokenCheck::KeyId, keys)
                && let Some(key) = keys.key(kid)
                && rs256
            {
                let signed = jsonwebtoken::crypto::verify(
                    jwt.signature,
                    jwt.message.as_bytes(),
                    key,
                    Algorithm::RS256,
                );
                let signed = if let Ok(true) = signed { Ok(()) } else { Err(AuthError::WrongSignature) };
                walk.note(TokenCheck::Signature, signed);
            }
        }
        let times = jwt.claims.times(shared.clock.unix(), LEEWAY, rules.config.require_exp);
        walk.note(TokenCheck::Times, times);
        let ours = jwt.claims.audiences().iter().any(|audience| self.is_ours(audience, request));
        walk.note(TokenCheck::Audience, if ours { Ok(()) } else { Err(AuthError::WrongAudience) });
        if let Some((key, host)) = walk.note(TokenCheck::Claims, jwt.claims.credentials()) {
            let admitted = Tenant::admit(host, ApiKey::new(key.to_owned()), &rules.cyberscan_hosts);
            walk.0.push((TokenCheck::Host, admitted.map(drop).map_err(Refusal::Host)));
        }
        walk.steps()
    }
}

/// What has been tried so far.
#[derive(Default)]
struct Walk(Vec<(TokenCheck, Result<(), Refusal>)>);

impl Walk {
    fn note<T>(&mut self, check: TokenCheck, outcome: Result<T, AuthError>) -> Option<T> {
        match outcome {
            Ok(value) => {
                self.0.push((check, Ok(())));
                Some(value)
            }
            Err(error) => {
                self.0.push((check, Err(Refusal::Auth(error))));
                None
            }
        }
    }

    fn steps(self) -> Vec<Step> {
        let outcome = |check| self.0.iter().find(|(of, _)| *of == check).map(|(_, outcome)| outcome.clone());
        TokenCheck::ALL.map(|check| Step { check, outcome: outcome(check) }).into()
    }
}

/// What the token in `request` says, as far as it can be read: also of one that is not in its strict form.
fn said(request: Credentials<'_>) -> Said {
    let value = request.headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let token = value.unwrap_or_default().trim().rsplit([' ', '\t']).next().unwrap_or_default();
    let part = |number: usize| -> Option<Map<String, Value>> {
        let text = token.split('.').nth(number)?.trim_end_matches('=').replace('+', "-").replace('/', "_");
        serde_json::from_slice(&URL_SAFE_NO_PAD.decode(text).ok()?).ok()
    };
    let mut claims = part(1);
    let api_key = claims.as_mut().and_then(|claims| claims.shift_remove("api_key"));
    Said { header: part(0), claims, has_api_key: api_key.is_some() }
}

/// Where the keys of an issuer are: its name on the allow-list, its host, the path.
pub(crate) fn keys_at(address: &IssuerAddress) -> (&str, &Host, &str) {
    (address.as_str(), address.host(), address.jwks_path())
}

/// How many keys of a document can verify tokens; `None` if it is no key set.
pub(crate) fn usable_keys(body: &[u8]) -> Option<usize> {
    document::import(body).map(|keys| keys.len())
}

/// Whether a document is larger than any that is read.
pub(crate) fn is_too_large(body: &[u8]) -> bool {
    body.len() > document::BODY
}
