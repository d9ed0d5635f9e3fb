//! CyberScan's access tokens: one per tenant, kept in memory until it expires, fetched once
//! however many ask. It owns when a token is used, renewed and forgotten; it must not know what it
//! is used for.

use std::{future::Future, sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use http::HeaderValue;
use moka::{policy::EvictionPolicy, sync::Cache};
use secrecy::{ExposeSecret, SecretString};
use serde::Deserialize;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;

use super::Error;
use crate::{clock::Clock, flight::Flights, tenant::TenantId};

const BEARER: &str = "Bearer ";
/// A token is renewed this long before CyberScan would refuse it.
const MARGIN: Duration = Duration::from_secs(60);
/// The life of a token that does not say when it expires.
const UNSPOKEN: Duration = Duration::from_secs(30 * 60);
/// No token is kept longer, whatever it says.
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// A token fetched because its predecessor was refused, and refused itself within this time, is
/// not renewed again: CyberScan does not mean the token, it means the key.
const PATIENCE: Duration = Duration::from_secs(60);
/// A tenant not heard of for this long is forgotten.
const IDLE: Duration = Duration::from_secs(2 * 3600);
/// The most tenants remembered.
const TENANTS: u64 = 10_000;

/// An access token. It shows itself nowhere but in [`AccessToken::header`].
pub struct AccessToken {
    bearer: SecretString,
    expires: Instant,
    fetched: Instant,
    /// It replaces a token that CyberScan refused.
    replacement: bool,
}

impl AccessToken {
    /// When CyberScan gave it out.
    #[must_use]
    pub fn fetched(&self) -> Instant {
        self.fetched
    }

    /// The `Authorization` value, marked sensitive.
    ///
    /// # Errors
    /// [`Error::Unexpected`] never in practice: the token was checked when it came.
    pub fn header(&self) -> Result<HeaderValue, Error> {
        let mut value = HeaderValue::from_str(self.bearer.expose_secret())
            .map_err(|_| Error::Unexpected { expected: "an access token" })?;
        value.set_sensitive(true);
        Ok(value)
    }
}

/// The access tokens of all tenants.
#[derive(Clone)]
pub struct AccessTokens {
    tokens: Cache<TenantId, Arc<AccessToken>>,
    flights: Flights<TenantId, Result<Arc<AccessToken>, Error>>,
    clock: Clock,
}

impl AccessTokens {
    /// No tokens yet; fetches are tracked by `tasks`.
    #[must_use]
    pub fn new(clock: Clock, tasks: TaskTracker) -> Self {
        Self {
            // A tenant that is new always finds a place, or each of its calls would fetch a token.
            tokens: Cache::builder()
                .max_capacity(TENANTS)
                .eviction_policy(EvictionPolicy::lru())
                .time_to_idle(IDLE)
                .build(),
            flights: Flights::new(tasks),
            clock,
        }
    }

    /// The tenant's token, fetched by `fetch` if there is none that still holds.
    ///
    /// # Errors
    /// What `fetch` failed with.
    pub async fn get<F>(&self, tenant: TenantId, fetch: impl FnOnce() -> F) -> Result<Arc<AccessToken>, Error>
    where
        F: Future<Output = Result<String, Error>> + Send + 'static,
    {
        match self.tokens.get(&tenant) {
            Some(token) if Instant::now() < token.expires => Ok(token),
            _ => self.fetch(tenant, false, fetch).await,
        }
    }

    /// As [`AccessTokens::get`], but a token older than `age` is fetched anew: getting one is how a key
    /// is known to be accepted.
    ///
    /// # Errors
    /// What `fetch` failed with.
    pub async fn get_younger_than<F>(
        &self,
        age: Duration,
        tenant: TenantId,
        fetch: impl FnOnce() -> F,
    ) -> Result<Arc<AccessToken>, Error>
    where
        F: Future<Output = Result<String, Error>> + Send + 'static,
    {
        match self.tokens.get(&tenant) {
            Some(token) if Instant::now() < token.expires && token.fetched.elapsed() < age => Ok(token),
            _ => self.fetch(tenant, false, fetch).await,
        }
    }

    /// The token to try instead of `refused`, which CyberScan did not accept: one that was fetched
    /// meanwhile, or a new one.
    ///
    /// # Errors
    /// [`Error::Unauthorized`] when `refused` is itself a recent replacement; else what `fetch`
    /// failed with.
    pub async fn instead_of<F>(
        &self,
        refused: &Arc<AccessToken>,
        tenant: TenantId,
        fetch: impl FnOnce() -> F,
    ) -> Result<Arc<AccessToken>, Error>
    where
        F: Future<Output = Result<String, Error>> + Send + 'static,
    {
        match self.tokens.get(&tenant) {
            Some(newer) if !Arc::ptr_eq(&newer, refused) => Ok(newer),
            _ if refused.replacement && refused.fetched.elapsed() < PATIENCE => Err(Error::Unauthorized),
            _ => self.fetch(tenant, true, fetch).await,
        }
    }

    /// The tenant's token as CyberScan gave it out, for another replica.
    #[must_use]
    pub fn lend(&self, tenant: TenantId) -> Option<SecretString> {
        let token = self.tokens.get(&tenant).filter(|token| Instant::now() < token.expires)?;
        token.bearer.expose_secret().strip_prefix(BEARER).map(SecretString::from)
    }

    /// Uses a token that another replica was given `then`, unless there is a newer one, or it is none.
    pub fn borrow(&self, tenant: TenantId, text: &SecretString, then: Instant) {
        let newer = self.tokens.get(&tenant).is_none_or(|token| token.fetched < then);
        if let (true, Ok(token)) = (newer, accept(text.expose_secret(), false, self.clock)) {
            self.tokens.insert(tenant, Arc::new(AccessToken { fetched: then, ..token }));
        }
    }

    async fn fetch<F>(
        &self,
        tenant: TenantId,
        replacement: bool,
        fetch: impl FnOnce() -> F,
    ) -> Result<Arc<AccessToken>, Error>
    where
        F: Future<Output = Result<String, Error>> + Send + 'static,
    {
        let (tokens, clock) = (self.tokens.clone(), self.clock);
        let attempt = || {
            let fetch = fetch();
            async move {
                match fetch.await {
                    Ok(text) => {
                        let token = Arc::new(accept(&text, replacement, clock)?);
                        tokens.insert(tenant, Arc::clone(&token));
                        Ok(token)
                    }
                    Err(error) => {
                        if error == Error::Unauthorized {
                            tokens.invalidate(&tenant);
                        }
                        Err(error)
                    }
                }
            }
        };
        self.flights.join(tenant, attempt).await.unwrap_or(Err(Error::Lost))
    }
}

/// Checks a token's text and reads when it expires.
fn accept(text: &str, replacement: bool, clock: Clock) -> Result<AccessToken, Error> {
    // It becomes part of a header: visible ASCII only, and no more than a header may hold.
    if text.is_empty() || text.len() > 8192 || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Error::Unexpected { expected: "an access token" });
    }
    let life = match expiry(text) {
        Some(unix) => clock.until(unix, LONGEST).saturating_sub(MARGIN),
        None => UNSPOKEN,
    };
    let now = Instant::now();
    Ok(AccessToken {
        bearer: format!("{BEARER}{text}").into(),
        expires: now + life,
        fetched: now,
        replacement,
    })
}

/// The `expires` claim (Unix seconds), which CyberScan's JWTs carry in place of `exp`. The
/// signature is CyberScan's own affair; a wrong hint costs one more token call.
fn expiry(token: &str) -> Option<f64> {
    #[derive(Deserialize)]
    struct Claims {
        expires: f64,
    }
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let claims: Claims = serde_json::from_slice(&payload).ok()?;
    Some(claims.expires)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenant::{ApiKey, Tenant};
    use std::sync::atomic::{AtomicU32, Ordering};

    fn tenant() -> TenantId {
        Tenant::new("api.example.com".parse().unwrap(), ApiKey::new("k".into())).id()
    }

    fn tokens() -> AccessTokens {
        AccessTokens::new(Clock::starting_at("2026-01-01T00:00:00Z".parse().unwrap()), TaskTracker::new())
    }

    fn token(expires: f64) -> String {
        format!("h.{}.s", URL_SAFE_NO_PAD.encode(format!(r#"{{"expires":{expires}}}"#)))
    }

    /// A fetch that counts itself and answers `text`.
    fn counted(
        calls: &Arc<AtomicU32>,
        text: String,
    ) -> impl FnOnce() -> std::future::Ready<Result<String, Error>> {
        let calls = Arc::clone(calls);
        move || {
            calls.fetch_add(1, Ordering::Relaxed);
            std::future::ready(Ok(text))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_is_kept_until_shortly_before_it_expires() {
        let (tokens, calls) = (tokens(), Arc::new(AtomicU32::new(0)));
        let expires = tokens.clock.unix() + 6000.0;
        for _ in 0..3 {
            tokens.get(tenant(), counted(&calls, token(expires))).await.unwrap();
        }
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        tokio::time::advance(Duration::from_secs(5941)).await;
        tokens.get(tenant(), counted(&calls, token(expires))).await.unwrap();
        assert_eq!(calls.load(Ordering::Relaxed), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_refused_token_is_replaced_once_and_a_refused_replacement_means_the_key() {
        let (tokens, calls) = (tokens(), Arc::new(AtomicU32::new(0)));
        let first = tokens.get(tenant(), counted(&calls, "one".into())).await.unwrap();
        let second = tokens.instead_of(&first, tenant(), counted(&calls, "two".into())).await.unwrap();
        // Another look-up that was refused with the first token gets the second without a call.
        let same = tokens.instead_of(&first, tenant(), counted(&calls, "three".into())).await.unwrap();
        assert!(Arc::ptr_eq(&second, &same));
        let refused = tokens.instead_of(&second, tenant(), counted(&calls, "four".into())).await;
        assert_eq!(refused.err(), Some(Error::Unauthorized));
        assert_eq!(calls.load(Ordering::Relaxed), 2);
        tokio::time::advance(PATIENCE).await;
        assert!(tokens.instead_of(&second, tenant(), counted(&calls, "five".into())).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_of_another_replica_is_used_if_it_is_newer_and_can_be_one() {
        let (one, two, calls) = (tokens(), tokens(), Arc::new(AtomicU32::new(0)));
        assert!(one.lend(tenant()).is_none());
        let expires = one.clock.unix() + 6000.0;
        one.get(tenant(), counted(&calls, token(expires))).await.unwrap();
        let (lent, given_out) = (one.lend(tenant()).unwrap(), Instant::now());
        assert_eq!(lent.expose_secret(), token(expires));
        tokio::time::advance(Duration::from_secs(600)).await;
        two.borrow(tenant(), &lent, given_out);
        let age = Duration::from_secs(900);
        let used = two.get_younger_than(age, tenant(), counted(&calls, token(expires))).await.unwrap();
        assert_eq!((used.fetched(), calls.load(Ordering::Relaxed)), (given_out, 1));
        // It is as old as it is, and ends when it ends.
        let age = Duration::from_secs(600);
        two.get_younger_than(age, tenant(), counted(&calls, "newer".into())).await.unwrap();
        assert_eq!(calls.load(Ordering::Relaxed), 2);
        for none in [lent, "a\nb".to_owned().into(), String::new().into()] {
            two.borrow(tenant(), &none, given_out);
            assert_eq!(two.lend(tenant()).unwrap().expose_secret(), "newer");
        }
        tokio::time::advance(Duration::from_secs(5400)).await;
        assert!(one.lend(tenant()).is_none(), "it has expired");
    }

    #[tokio::test]
    async fn what_cannot_be_a_header_is_no_token() {
        for text in ["", "a b", "abc\r\nX-Injected: 1", "abc\n", "a\0b", "tök", &"T".repeat(9000)] {
            let refused = tokens().get(tenant(), || std::future::ready(Ok(text.to_owned()))).await;
            assert!(matches!(refused.err(), Some(Error::Unexpected { .. })), "{text:?}");
        }
    }
}
