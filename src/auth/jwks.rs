//! The key issuers' keys. It owns one key set per allowed issuer: fetching, importing, refreshing,
//! keeping it through an outage. It must not know tokens.
//!
//! Sets are never mixed between issuers and are replaced whole. No lock is held while a fetch runs;
//! a fetch runs in a task of its own and everyone who needs it waits for the same one.
//!
//! | age of the set | what a look-up does |
//! |---|---|
//! | under 295 s | uses it |
//! | to 5 min | uses it, and starts a refresh |
//! | to 60 min | waits for a refresh; uses the old set if that fails |
//! | beyond | waits for a refresh; without one there is no key |
//!
//! A key that is not in the set is looked for once more, unless the set came after the question, and
//! at most once in 30 s: keys rotate, and strangers invent key ids.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture};
use http::{HeaderMap, Method};
use jsonwebtoken::DecodingKey;
use serde_json::Value;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::{AuthError, Config, IssuerAddress};
use crate::{
    egress::{Http, client::Call},
    flight::Flights,
    metrics::{Metrics, Success},
};

/// From this age on a set in use is refreshed in the background.
const REFRESH: Duration = Duration::from_secs(295);
/// From this age on a set is used only if it cannot be refreshed.
const FRESH: Duration = Duration::from_secs(300);
/// From this age on a set is not used at all.
const DEAD: Duration = Duration::from_secs(3600);
/// The least time between two fetches because of an unknown key id.
const COOL_DOWN: Duration = Duration::from_secs(30);
/// The pause after a failed fetch, doubled with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long one fetch may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The most bytes of a key set.
const BODY: usize = 64 << 10;
/// The most keys taken from a set.
const KEYS: usize = 32;

/// The key sets of the allowed issuers; a cheap clone.
#[derive(Clone)]
pub(super) struct Jwks(Arc<Shared>);

/// Brings the document behind an issuer's address, or says in a word why not.
type Download = Box<dyn Fn(&IssuerAddress) -> BoxFuture<'static, Result<Bytes, String>> + Send + Sync>;

struct Shared {
    issuers: HashMap<String, Issuer>,
    download: Download,
    flights: Flights<String, Result<(), Unavailable>>,
    metrics: Metrics,
    /// Numbers the sets, so that what was verified with one is not mistaken as verified with the next.
    generations: AtomicU64,
}

struct Issuer {
    address: IssuerAddress,
    set: ArcSwapOption<KeySet>,
    fetches: Mutex<Fetches>,
}

/// When this issuer may be asked again.
#[derive(Default)]
struct Fetches {
    failures: u32,
    /// After a failure.
    not_before: Option<Instant>,
    /// When a key was last looked for.
    asked: Option<Instant>,
    /// The last fetch that was made for an unknown key id.
    looked_again: Option<Instant>,
}

/// The usable keys of one issuer.
pub(super) struct KeySet {
    pub(super) generation: u64,
    keys: HashMap<String, DecodingKey>,
    fetched: Instant,
}

/// There is no key set of this issuer.
#[derive(Clone, Copy, Debug)]
struct Unavailable;

impl KeySet {
    pub(super) fn key(&self, kid: &str) -> Option<&DecodingKey> {
        self.keys.get(kid)
    }
}

impl Jwks {
    pub(super) fn new(config: &Config, http: Http, metrics: Metrics, tasks: TaskTracker) -> Self {
        let download = move |address: &IssuerAddress| over_https(http.clone(), address.clone()).boxed();
        Self::with(config, Box::new(download), metrics, tasks)
    }

    fn with(config: &Config, download: Download, metrics: Metrics, tasks: TaskTracker) -> Self {
        let issuer = |address: &IssuerAddress| Issuer {
            address: address.clone(),
            set: ArcSwapOption::empty(),
            fetches: Mutex::default(),
        };
        let issuers = config.jwks_hosts.iter();
        Self(Arc::new(Shared {
            issuers: issuers.map(|address| (address.as_str().to_owned(), issuer(address))).collect(),
            download,
            flights: Flights::new(tasks),
            metrics,
            generations: AtomicU64::new(1),
        }))
    }

    /// Whether `jwks_host` is, letter for letter, on the allow-list.
    pub(super) fn allows(&self, jwks_host: &str) -> bool {
        self.0.issuers.contains_key(jwks_host)
    }

    /// The age of the oldest key set in use.
    pub(super) fn age(&self) -> Option<Duration> {
        let in_use = |issuer: &&Issuer| issuer.fetches().asked.is_some_and(|at| at.elapsed() < FRESH);
        let sets = self.0.issuers.values().filter(in_use).filter_map(|issuer| issuer.set.load_full());
        sets.map(|set| set.fetched.elapsed()).max()
    }

    /// The number of the set in use for `jwks_host`, as long as it is fresh.
    pub(super) fn fresh_generation(&self, jwks_host: &str) -> Option<u64> {
        let set = self.0.issuers.get(jwks_host)?.set.load();
        set.as_ref().filter(|set| set.fetched.elapsed() < REFRESH).map(|set| set.generation)
    }

    /// The key set of `jwks_host` that has `kid`, fetched if need be.
    ///
    /// # Errors
    /// [`AuthError::WrongIssuer`] when the issuer is not allowed or there is no set of it,
    /// [`AuthError::UnknownKey`] when its set has no usable key of that id.
    pub(super) async fn set_with(&self, jwks_host: &str, kid: &str) -> Result<Arc<KeySet>, AuthError> {
        let asked = Instant::now();
        let issuer = self.0.issuers.get(jwks_host).ok_or(AuthError::WrongIssuer)?;
        issuer.fetches().asked = Some(asked);
        let set = self.current(issuer).await?;
        if set.key(kid).is_some() {
            return Ok(set);
        }
        if set.fetched <= asked
            && (issuer.may_look_again() || self.0.flights.is_running(&issuer.address.text))
        {
            // Success or failure, the set in use afterwards decides.
            let _ = self.fetch(issuer).await;
        }
        issuer.set.load_full().filter(|set| set.key(kid).is_some()).ok_or(AuthError::UnknownKey)
    }

    async fn current(&self, issuer: &Issuer) -> Result<Arc<KeySet>, AuthError> {
        let set = issuer.set.load_full();
        match &set {
            Some(set) if set.fetched.elapsed() < REFRESH => return Ok(Arc::clone(set)),
            Some(set) if set.fetched.elapsed() < FRESH => {
                if issuer.may_fetch() {
                    drop(self.start(issuer));
                }
                return Ok(Arc::clone(set));
            }
            _ => {}
        }
        if issuer.may_fetch() && self.fetch(issuer).await.is_ok() {
            return issuer.set.load_full().ok_or(AuthError::WrongIssuer);
        }
        set.filter(|set| set.fetched.elapsed() < DEAD).ok_or(AuthError::WrongIssuer)
    }

    async fn fetch(&self, issuer: &Issuer) -> Result<(), Unavailable> {
        let mut outcome = self.start(issuer);
        let outcome = outcome.wait_for(Option::is_some).await.map_err(|_| Unavailable)?;
        outcome.unwrap_or(Err(Unavailable))
    }

    fn start(&self, issuer: &Issuer) -> tokio::sync::watch::Receiver<Option<Result<(), Unavailable>>> {
        let name = issuer.address.as_str().to_owned();
        self.0.flights.start(name.clone(), || {
            let shared = Arc::clone(&self.0);
            async move { shared.renew(&name).await }
        })
    }
}

impl Shared {
    /// Fetches a set and puts it in the place of the old one; a failure leaves the old one alone.
    async fn renew(&self, name: &str) -> Result<(), Unavailable> {
        let issuer = self.issuers.get(name).ok_or(Unavailable)?;
        let document = (self.download)(&issuer.address).await;
        let keys = document.and_then(|body| import(&body).ok_or_else(|| "not a key set".to_owned()));
        // An issuer that publishes no key at all has a fault: nobody could log in there any more.
        let keys = keys.and_then(|keys| match issuer.set.load().as_ref() {
            Some(set) if keys.is_empty() && !set.keys.is_empty() => Err("a key set without keys".to_owned()),
            _ => Ok(keys),
        });
        let mut fetches = issuer.fetches();
        let outcome = if keys.is_ok() { Success::Ok } else { Success::Failed };
        self.metrics.jwks_refresh.inc((outcome,));
        match keys {
            Ok(keys) => {
                let generation = self.generations.fetch_add(1, Ordering::Relaxed);
                info!(issuer = name, keys = keys.len(), "key set fetched");
                issuer.set.store(Some(Arc::new(KeySet { generation, keys, fetched: Instant::now() })));
                (fetches.failures, fetches.not_before) = (0, None);
                Ok(())
            }
            Err(reason) => {
                let pause = FIRST_PAUSE.saturating_mul(1 << fetches.failures.min(5)).min(LONGEST_PAUSE);
                fetches.failures = fetches.failures.saturating_add(1);
                fetches.not_before = Some(Instant::now() + pause);
                warn!(issuer = name, reason, ?pause, "key set not fetched");
                Err(Unavailable)
            }
        }
    }
}

async fn over_https(http: Http, address: IssuerAddress) -> Result<Bytes, String> {
    let call = Call {
        method: Method::GET,
        host: address.host(),
        path: address.jwks_path(),
        headers: HeaderMap::new(),
        json: None,
        limit: BODY,
        deadline: Instant::now() + TIMEOUT,
    };
    let reply = http.send(call).await.map_err(|error| error.to_string())?;
    if reply.status.is_success() { Ok(reply.body) } else { Err(format!("status {}", reply.status.as_u16())) }
}

impl Issuer {
    /// Held for a few assignments; nothing in between can panic, so poison is ignored.
    fn fetches(&self) -> std::sync::MutexGuard<'_, Fetches> {
        self.fetches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the pause after a failure is over.
    fn may_fetch(&self) -> bool {
        self.fetches().not_before.is_none_or(|at| Instant::now() >= at)
    }

    /// Whether a set may be fetched again only because a key id is not in it. The cool-down starts
    /// with the permission, so that it holds whatever comes of the fetch.
    fn may_look_again(&self) -> bool {
        let may_fetch = self.may_fetch();
        let mut fetches = self.fetches();
        let cooled = fetches.looked_again.is_none_or(|last| last.elapsed() >= COOL_DOWN);
        if may_fetch && cooled {
            fetches.looked_again = Some(Instant::now());
        }
        may_fetch && cooled
    }
}

/// The usable keys of a key set (RFC 7517); `None` when `body` is none.
///
/// Keys that cannot verify RS256 are left out: other types, other uses, other algorithms, weak or
/// malformed ones. Of several keys with one id the first usable one counts. A document in which no
/// key has an id is not a key set that tokens could refer to.
pub(super) fn import(body: &[u8]) -> Option<HashMap<String, DecodingKey>> {
    let document: Value = serde_json::from_slice(body).ok()?;
    let entries = document.as_object()?.get("keys")?.as_array()?;
    if !entries.is_empty() && entries.iter().all(|entry| entry.get("kid").is_none()) {
        return None;
    }
    let mut keys = HashMap::new();
    for entry in entries {
        if keys.len() == KEYS {
            break;
        }
        if let Some((kid, key)) = usable(entry) {
            keys.entry(kid).or_insert(key);
        }
    }
    Some(keys)
}

fn usable(entry: &Value) -> Option<(String, DecodingKey)> {
    let text = |name: &str| entry.get(name).and_then(Value::as_str);
    let absent_or = |name: &str, value: &str| entry.get(name).is_none_or(|v| v.as_str() == Some(value));
    if text("kty") != Some("RSA") || !absent_or("use", "sig") || !absent_or("alg", "RS256") {
        return None;
    }
    let kid = text("kid").filter(|kid| !kid.is_empty() && kid.len() <= 256)?;
    let modulus = URL_SAFE_NO_PAD.decode(text("n")?).ok()?;
    let exponent = URL_SAFE_NO_PAD.decode(text("e")?).ok()?;
    let bits = match modulus.iter().position(|byte| *byte != 0) {
        Some(zeros) => (modulus.len() - zeros) * 8 - modulus.get(zeros)?.leading_zeros() as usize,
        None => 0,
    };
    let odd = |number: &[u8]| number.last().is_some_and(|byte| byte % 2 == 1);
    let sound = (2048..=8192).contains(&bits)
        && odd(&modulus)
        && odd(&exponent)
        && exponent.len() <= 8
        && exponent != [1];
    sound.then(|| (kid.to_owned(), DecodingKey::from_rsa_raw_components(&modulus, &exponent)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const N: &str = "ngYq_pxlxLv45e14mSpULWLlJbcpyAboFKQg3im_gk_H5QYSiNCVOtlpaMJnGnetztyG8M_YJ8v5i9G2SRu7ZB3J_z-KVukaiO8dAz5jdctm2aC5jtBC4Jy2JwlKPuO15LbC47TfEasFapu9pKsLcJlujA-HQUcYhK4CG3JH-OThFH6bVDgOmGeloTrYH2ro-kY3ph4PbtDx6TlZgLjkbBLP8cugvVFwtL0tuHRpTftMYqgbFDjwHFBv-_7FAaX2igFjkLPKJtTIS_P2P7sGBBZp55mgeLro-EdPTBo9kriP3Dzh1BQ7lcz3OQEVBcj4dj-SXHsjCxmF_gREDnweGw";

    fn kids(document: &str) -> Option<Vec<String>> {
        let mut kids: Vec<String> = import(document.as_bytes())?.into_keys().collect();
        kids.sort();
        Some(kids)
    }

    #[test]
    fn only_keys_that_can_verify_rs256_are_imported() {
        let key = |members: &str| format!(r#"{{"n":"{N}","e":"AQAB",{members}}}"#);
        let good = key(r#""kid":"good","kty":"RSA","alg":"RS256","use":"sig""#);
        let odd = [
            key(r#""kid":"a","kty":"oct","k":"c2VjcmV0""#),
            key(r#""kid":"b","kty":"EC""#),
            key(r#""kid":"c","kty":"RSA","use":"enc""#),
            key(r#""kid":"d","kty":"RSA","alg":"RS512""#),
            key(r#""kid":5,"kty":"RSA""#),
            key(r#""kty":"RSA""#),
            key(r#""kid":"","kty":"RSA""#),
            key(&format!(r#""kid":"{}","kty":"RSA""#, "a".repeat(257))),
            format!(r#"{{"kid":"e","kty":"RSA","e":"AQAB","n":"{}"}}"#, &N[..171]),
            format!(r#"{{"kid":"f","kty":"RSA","e":"AQAA","n":"{N}"}}"#),
            format!(r#"{{"kid":"g","kty":"RSA","e":"AQ","n":"{N}"}}"#),
            r#"{"kid":"h","kty":"RSA","e":"AQAB","n":"!!!"}"#.to_owned(),
            r#"{"kid":"i","kty":"RSA","e":"AQAB","n":5}"#.to_owned(),
            r#""text""#.to_owned(),
            "null".to_owned(),
        ];
        let document = format!(r#"{{"keys":[{},{good}]}}"#, odd.join(","));
        assert_eq!(kids(&document), Some(vec!["good".into()]));
        let minimal = format!(r#"{{"keys":[{}]}}"#, key(r#""kid":"k","kty":"RSA""#));
        assert_eq!(kids(&minimal), Some(vec!["k".into()]));
    }

    #[test]
    fn a_key_is_as_long_as_its_modulus_without_leading_zeros() {
        let imported = |modulus: &[u8]| {
            let n = URL_SAFE_NO_PAD.encode(modulus);
            kids(&format!(r#"{{"keys":[{{"kid":"k","kty":"RSA","n":"{n}","e":"AQAB"}}]}}"#)).unwrap().len()
        };
        let modulus = URL_SAFE_NO_PAD.decode(N).unwrap();
        let with_first = |byte: u8| [&[byte], &modulus[1..]].concat();
        assert_eq!(imported(&with_first(0x80)), 1, "2048 bits");
        assert_eq!(imported(&with_first(0x7f)), 0, "2047 bits");
        assert_eq!(imported(&[&[0], modulus.as_slice()].concat()), 1, "2048 bits behind a zero");
        assert_eq!(imported(&[&[0], &modulus[1..]].concat()), 0, "2040 bits behind a zero");
        assert_eq!(imported(&[0; 256]), 0);
        let even = [&modulus[..255], &[0x1a]].concat();
        assert_eq!(imported(&even), 0, "an even number is no modulus");
    }

    #[test]
    fn what_is_no_key_set_is_told_from_an_empty_one() {
        assert_eq!(kids(r#"{"keys":[]}"#), Some(vec![]));
        for document in [
            "",
            "{}",
            "[]",
            "5",
            "<html>",
            r#"{"keys":{}}"#,
            r#"{"keys":[{"kty":"RSA"}]}"#,
            r#"{"keys":["a"]}"#,
        ] {
            assert_eq!(kids(document), None, "{document}");
        }
    }

    #[test]
    fn a_set_is_cut_at_thirty_two_keys() {
        let keys: Vec<String> =
            (0..100).map(|i| format!(r#"{{"kid":"{i}","kty":"RSA","n":"{N}","e":"AQAB"}}"#)).collect();
        assert_eq!(kids(&format!(r#"{{"keys":[{}]}}"#, keys.join(","))).unwrap().len(), KEYS);
    }

    /// An issuer under the test's control, on a paused clock.
    struct Fake {
        jwks: Jwks,
        kids: Arc<Mutex<Option<Vec<&'static str>>>>,
        fetches: Arc<AtomicU64>,
    }

    impl Fake {
        fn new() -> Self {
            let kids = Arc::new(Mutex::new(Some(vec!["old"])));
            let fetches = Arc::new(AtomicU64::new(0));
            let (k, f) = (Arc::clone(&kids), Arc::clone(&fetches));
            let download = move |_: &IssuerAddress| {
                f.fetch_add(1, Ordering::Relaxed);
                let kids = k.lock().unwrap().clone();
                async move {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    let kids = kids.ok_or("down")?;
                    let keys = kids
                        .iter()
                        .map(|kid| format!(r#"{{"kid":"{kid}","kty":"RSA","n":"{N}","e":"AQAB"}}"#));
                    Ok(format!(r#"{{"keys":[{}]}}"#, keys.collect::<Vec<_>>().join(",")).into())
                }
                .boxed()
            };
            let config = Config {
                audiences: Vec::new(),
                jwks_hosts: vec!["issuer.test".parse().unwrap()],
                require_exp: false,
                trusted_proxies: Vec::new(),
            };
            Self {
                jwks: Jwks::with(&config, Box::new(download), Metrics::new(), TaskTracker::new()),
                kids,
                fetches,
            }
        }

        async fn look_up(&self, kid: &str) -> Result<(), AuthError> {
            self.jwks.set_with("issuer.test", kid).await.map(drop)
        }

        fn publish(&self, kids: Option<Vec<&'static str>>) {
            *self.kids.lock().unwrap() = kids;
        }

        fn fetches(&self) -> u64 {
            self.fetches.load(Ordering::Relaxed)
        }
    }

    async fn minutes(minutes: u64) {
        tokio::time::advance(Duration::from_secs(60 * minutes)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_key_is_found_at_once_and_a_removed_one_is_dead_after_five_minutes() {
        let fake = Fake::new();
        fake.look_up("old").await.unwrap();
        fake.publish(Some(vec!["old", "new"]));
        let all = futures_util::future::join_all((0..100).map(|_| fake.look_up("new"))).await;
        assert!(all.iter().all(Result::is_ok));
        assert_eq!(fake.fetches(), 2);
        fake.publish(Some(vec!["new"]));
        fake.look_up("old").await.unwrap();
        minutes(5).await;
        assert_eq!(fake.look_up("old").await, Err(AuthError::UnknownKey));
        assert_eq!(fake.look_up("new").await, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn unknown_key_ids_cause_a_fetch_in_thirty_seconds_at_most() {
        let fake = Fake::new();
        fake.look_up("old").await.unwrap();
        for _ in 0..600 {
            assert_eq!(fake.look_up("invented").await, Err(AuthError::UnknownKey));
            tokio::time::advance(Duration::from_millis(100)).await;
        }
        // Not fewer either: a key that is new is found, however many invented ids are asked for meanwhile.
        assert!((1 + 2..=1 + 3).contains(&fake.fetches()), "{} fetches in a minute", fake.fetches());
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_look_up_at_an_issuer_asks_it_once_even_for_an_unknown_key() {
        let fake = Fake::new();
        assert_eq!(fake.look_up("invented").await, Err(AuthError::UnknownKey));
        assert_eq!(fake.fetches(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_of_an_hour_goes_unnoticed_and_a_longer_one_closes() {
        let fake = Fake::new();
        fake.look_up("old").await.unwrap();
        fake.publish(None);
        for _ in 0..59 {
            minutes(1).await;
            assert_eq!(fake.look_up("old").await, Ok(()));
        }
        minutes(2).await;
        assert_eq!(fake.look_up("old").await, Err(AuthError::WrongIssuer));
        fake.publish(Some(vec!["old"]));
        minutes(1).await;
        assert_eq!(fake.look_up("old").await, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn keys_of_an_issuer_that_is_down_end_after_exactly_an_hour() {
        let fake = Fake::new();
        fake.look_up("old").await.unwrap();
        fake.publish(None);
        // A failed attempt of a moment ago, so that nobody waits for another one.
        tokio::time::advance(DEAD - Duration::from_millis(150)).await;
        assert_eq!(fake.look_up("old").await, Ok(()));
        tokio::time::advance(Duration::from_millis(99)).await;
        assert_eq!(fake.look_up("old").await, Ok(()));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(fake.look_up("old").await, Err(AuthError::WrongIssuer));
        assert_eq!(fake.fetches(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_issuer_that_fails_is_asked_less_and_less_until_it_answers() {
        let fake = Fake::new();
        fake.publish(None);
        let asked = async || {
            let (before, start) = (fake.fetches(), Instant::now());
            while fake.fetches() == before {
                tokio::time::sleep(Duration::from_millis(100)).await;
                let _ = fake.look_up("old").await;
            }
            start.elapsed().as_secs()
        };
        let mut pauses = Vec::new();
        for _ in 0..8 {
            pauses.push(asked().await);
        }
        assert_eq!(pauses, [0, 1, 2, 4, 8, 16, 30, 30]);
        fake.publish(Some(vec!["old"]));
        tokio::time::sleep(LONGEST_PAUSE).await;
        fake.look_up("old").await.unwrap();
        fake.publish(None);
        tokio::time::advance(FRESH).await;
        assert_eq!([asked().await, asked().await], [0, 1], "an answer did not end the growth");
    }

    #[tokio::test(start_paused = true)]
    async fn an_issuer_that_has_just_failed_is_not_asked_for_an_unknown_key_either() {
        let fake = Fake::new();
        fake.look_up("old").await.unwrap();
        fake.publish(None);
        tokio::time::advance(REFRESH).await;
        fake.look_up("old").await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(fake.fetches(), 2);
        assert_eq!(fake.look_up("invented").await, Err(AuthError::UnknownKey));
        assert_eq!(fake.fetches(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn an_issuer_that_publishes_no_keys_any_more_keeps_those_it_had() {
        let fake = Fake::new();
        fake.look_up("old").await.unwrap();
        fake.publish(Some(Vec::new()));
        minutes(10).await;
        assert_eq!(fake.look_up("old").await, Ok(()));
        assert_eq!(fake.fetches(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_set_tells_its_age_while_it_is_in_use_and_its_number_while_it_is_fresh() {
        let fake = Fake::new();
        let number = || fake.jwks.fresh_generation("issuer.test");
        assert_eq!((fake.jwks.age(), number()), (None, None));
        fake.look_up("old").await.unwrap();
        let first = number().unwrap();
        tokio::time::advance(REFRESH - Duration::from_millis(1)).await;
        assert_eq!(number(), Some(first));
        // Asked for 50 ms before it was there.
        assert_eq!(fake.jwks.age(), Some(REFRESH - Duration::from_millis(1)));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert_eq!(number(), None, "what was verified with it has to be verified anew");
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(fake.jwks.age(), None, "nobody has asked for it in five minutes");
        fake.look_up("old").await.unwrap();
        assert!(number().is_some_and(|second| second != first));
    }

    #[tokio::test(start_paused = true)]
    async fn a_set_in_use_is_refreshed_before_anyone_has_to_wait() {
        let fake = Fake::new();
        fake.look_up("old").await.unwrap();
        tokio::time::advance(REFRESH).await;
        let asked = Instant::now();
        fake.look_up("old").await.unwrap();
        assert_eq!(asked.elapsed(), Duration::ZERO);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(fake.fetches(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn two_who_wait_for_a_fetch_that_fails_are_both_refused_and_the_next_fetch_works() {
        let fake = Fake::new();
        fake.publish(None);
        let (one, two) = tokio::join!(fake.look_up("old"), fake.look_up("old"));
        assert_eq!((one, two), (Err(AuthError::WrongIssuer), Err(AuthError::WrongIssuer)));
        assert_eq!(fake.fetches(), 1);
        fake.publish(Some(vec!["old"]));
        tokio::time::advance(FIRST_PAUSE).await;
        assert_eq!(fake.look_up("old").await, Ok(()));
    }
}
