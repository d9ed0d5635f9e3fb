//! The key issuers' keys. It owns one key set per allowed issuer: when it is fetched and refreshed,
//! keeping it through an outage. It must not know tokens, nor what a key set looks like.
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
//! at most once in 30 s: keys rotate, and strangers invent key ids. The same goes, by itself, for a key that is there and did not
//! make the signature: issuers replace keys without giving them new ids.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, atomic::Ordering},
    time::Duration,
};

use arc_swap::ArcSwapOption;
use futures_util::future::BoxFuture;
use jsonwebtoken::DecodingKey;
use tokio::{sync::watch::Receiver, time::Instant};
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use super::{AuthError, Config, IssuerAddress, document::Keys};
use crate::{
    flight::Flights,
    metrics::{Metrics, Success},
    sync::{AtomicU64, Mutex, MutexGuard},
};

/// From this age on a set in use is refreshed in the background.
const REFRESH: Duration = Duration::from_secs(295);
/// From this age on a set is used only if it cannot be refreshed.
const FRESH: Duration = Duration::from_secs(300);
/// From this age on a set is not used at all.
const DEAD: Duration = Duration::from_secs(3600);
/// The least time between two fetches because of unknown key ids, and between two because of keys that do not fit.
const COOL_DOWN: Duration = Duration::from_secs(30);
/// The pause after a failed fetch, doubled with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// The key sets of the allowed issuers; a cheap clone.
#[derive(Clone)]
pub(super) struct Jwks(Arc<Shared>);

/// Brings the keys behind an issuer's address, or says in a word why not.
pub(super) type Download =
    Box<dyn Fn(&IssuerAddress) -> BoxFuture<'static, Result<Keys, String>> + Send + Sync>;

struct Shared {
    issuers: HashMap<String, Arc<Issuer>>,
    download: Arc<Download>,
    /// The fetches under way; what came of one is told by the set in use afterwards.
    flights: Flights<String, ()>,
    metrics: Metrics,
    /// Numbers the sets, so that what was verified with one is not mistaken as verified with the next.
    generations: Arc<AtomicU64>,
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
    unknown: Option<Instant>,
    /// The last one for a key that did not fit: a time of its own, or forged signatures would hide a new key.
    misfit: Option<Instant>,
}

/// The usable keys of one issuer.
pub(super) struct KeySet {
    pub(super) generation: u64,
    keys: Keys,
    fetched: Instant,
}

impl KeySet {
    pub(super) fn key(&self, kid: &str) -> Option<&DecodingKey> {
        self.keys.get(kid)
    }
}

impl Jwks {
    pub(super) fn new(config: &Config, download: Download, metrics: Metrics, tasks: TaskTracker) -> Self {
        let issuers = config.jwks_hosts.iter();
        Self(Arc::new(Shared {
            issuers: issuers.map(|address| (address.as_str().to_owned(), Issuer::new(address))).collect(),
            download: Arc::new(download),
            flights: Flights::new(tasks),
            metrics,
            generations: Arc::new(AtomicU64::new(1)),
        }))
    }

    /// The same for other issuers; what is known of those that are still allowed goes along.
    pub(super) fn for_issuers(&self, addresses: &[IssuerAddress]) -> Self {
        let issuer = |address: &IssuerAddress| {
            let known = self.0.issuers.get(address.as_str()).map(Arc::clone);
            (address.as_str().to_owned(), known.unwrap_or_else(|| Issuer::new(address)))
        };
        Self(Arc::new(Shared {
            issuers: addresses.iter().map(issuer).collect(),
            download: Arc::clone(&self.0.download),
            flights: self.0.flights.clone(),
            metrics: self.0.metrics.clone(),
            generations: Arc::clone(&self.0.generations),
        }))
    }

    /// Whether `jwks_host` is, letter for letter, on the allow-list.
    pub(super) fn allows(&self, jwks_host: &str) -> bool {
        self.0.issuers.contains_key(jwks_host)
    }

    /// The age of the oldest key set in use.
    pub(super) fn age(&self) -> Option<Duration> {
        let in_use = |issuer: &&Arc<Issuer>| issuer.fetches().asked.is_some_and(|at| at.elapsed() < FRESH);
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
        if set.fetched <= asked {
            self.fetch(issuer, || issuer.may_look_again(|fetches| &mut fetches.unknown)).await;
        }
        issuer.set.load_full().filter(|set| set.key(kid).is_some()).ok_or(AuthError::UnknownKey)
    }

    /// The key set that replaced `seen`, fetched if need be: its key did not make the signature of a token that came at
    /// `asked`.
    pub(super) async fn set_after(
        &self,
        jwks_host: &str,
        seen: &KeySet,
        asked: Instant,
    ) -> Option<Arc<KeySet>> {
        let issuer = self.0.issuers.get(jwks_host)?;
        let newer = || issuer.set.load_full().filter(|set| set.generation != seen.generation);
        if newer().is_none() && seen.fetched <= asked {
            let may = || newer().is_none() && issuer.may_look_again(|fetches| &mut fetches.misfit);
            self.fetch(issuer, may).await;
        }
        newer()
    }

    async fn current(&self, issuer: &Issuer) -> Result<Arc<KeySet>, AuthError> {
        let set = issuer.set.load_full();
        let may = || issuer.uses(set.as_ref()) && issuer.may_fetch();
        match &set {
            Some(set) if set.fetched.elapsed() < REFRESH => return Ok(Arc::clone(set)),
            Some(set) if set.fetched.elapsed() < FRESH => {
                drop(self.start(issuer, may));
                return Ok(Arc::clone(set));
            }
            _ => self.fetch(issuer, may).await,
        }
        issuer.set.load_full().filter(|set| set.fetched.elapsed() < DEAD).ok_or(AuthError::WrongIssuer)
    }

    async fn fetch(&self, issuer: &Issuer, may: impl FnOnce() -> bool) {
        if let Some(mut fetched) = self.start(issuer, may) {
            // Success or failure, the set in use afterwards decides.
            let _ = fetched.wait_for(Option::is_some).await;
        }
    }

    /// Starts a fetch if none is under way and it `may`. What that depends on changes only here and while one is
    /// under way, so nobody fetches again what has just been fetched, or has just failed.
    fn start(&self, issuer: &Issuer, may: impl FnOnce() -> bool) -> Option<Receiver<Option<()>>> {
        let name = issuer.address.as_str().to_owned();
        self.0.flights.start_if(name.clone(), may, || {
            let shared = Arc::clone(&self.0);
            async move { shared.renew(&name).await }
        })
    }
}

impl Shared {
    /// Fetches a set and puts it in the place of the old one; a failure leaves the old one alone.
    async fn renew(&self, name: &str) {
        let Some(issuer) = self.issuers.get(name) else { return };
        let keys = (self.download)(&issuer.address).await;
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
            }
            Err(reason) => {
                let pause = FIRST_PAUSE.saturating_mul(1 << fetches.failures.min(5)).min(LONGEST_PAUSE);
                fetches.failures = fetches.failures.saturating_add(1);
                fetches.not_before = Some(Instant::now() + pause);
                warn!(issuer = name, reason, ?pause, "key set not fetched");
            }
        }
    }
}

impl Issuer {
    fn new(address: &IssuerAddress) -> Arc<Self> {
        Arc::new(Self { address: address.clone(), set: ArcSwapOption::empty(), fetches: Mutex::default() })
    }

    /// Held for a few assignments; nothing in between can panic, so poison is ignored.
    fn fetches(&self) -> MutexGuard<'_, Fetches> {
        self.fetches.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `set` is the one in use.
    fn uses(&self, set: Option<&Arc<KeySet>>) -> bool {
        self.set.load().as_ref().map(|set| set.generation) == set.map(|set| set.generation)
    }

    /// Whether the pause after a failure is over.
    fn may_fetch(&self) -> bool {
        self.fetches().not_before.is_none_or(|at| Instant::now() >= at)
    }

    /// Whether a set may be fetched again only because a key is not in it, or not the right one. The cool-down since the
    /// `last` time starts with the permission, so that it holds whatever comes of the fetch.
    fn may_look_again(&self, last: impl Fn(&mut Fetches) -> &mut Option<Instant>) -> bool {
        let may_fetch = self.may_fetch();
        let mut fetches = self.fetches();
        let last = last(&mut fetches);
        let cooled = last.is_none_or(|last| last.elapsed() >= COOL_DOWN);
        if may_fetch && cooled {
            *last = Some(Instant::now());
        }
        may_fetch && cooled
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

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
                    Ok(kids.iter().map(|kid| ((*kid).to_owned(), DecodingKey::from_secret(b"any"))).collect())
                }
                .boxed()
            };
            let config = Config {
                audiences: Vec::new(),
                jwks_hosts: vec!["issuer.test".parse().unwrap()],
                spellings: Vec::new(),
                require_exp: false,
                trusted_proxies: Vec::new(),
            };
            Self {
                jwks: Jwks::new(&config, Box::new(download), Metrics::new(), TaskTracker::new()),
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
    async fn keys_that_do_not_fit_cause_a_fetch_in_thirty_seconds_at_most_too() {
        let fake = Fake::new();
        fake.look_up("old").await.unwrap();
        for _ in 0..600 {
            tokio::time::advance(Duration::from_millis(100)).await;
            let seen = fake.jwks.set_with("issuer.test", "old").await.unwrap();
            let forged = fake.jwks.set_after("issuer.test", &seen, Instant::now()).await;
            assert!(forged.is_none_or(|set| set.generation > seen.generation));
        }
        assert!((1 + 2..=1 + 3).contains(&fake.fetches()), "{} fetches in a minute", fake.fetches());
        // None of them keeps a new key from being found.
        fake.publish(Some(vec!["old", "new"]));
        fake.look_up("new").await.unwrap();
        // A set that has come since the token did is as new as can be.
        let (asked, fetches) = (Instant::now(), fake.fetches());
        minutes(5).await;
        let set = fake.jwks.set_with("issuer.test", "old").await.unwrap();
        assert!(fake.jwks.set_after("issuer.test", &set, asked).await.is_none());
        assert_eq!(fake.fetches(), fetches + 1);
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
