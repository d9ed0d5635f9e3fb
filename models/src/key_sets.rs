//! The issuers' key sets: they are fetched, replaced and looked into at the same time, while time passes and
//! fetches fail. What else the source under test imports of `auth` is here.

#[path = "../../src/auth/jwks.rs"]
#[expect(dead_code, reason = "the relay uses what the models do not")]
mod jwks;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{FutureExt, future::join_all};
use jsonwebtoken::DecodingKey;
use shuttle::future::{block_on, spawn};
use stand_ins::Seen;
use tokio::time::{Instant, advance};
use tokio_util::task::TaskTracker;

use self::{document::Keys, jwks::Jwks};
use crate::{
    chance::{below, for_a_while, some_time},
    metrics::{Metrics, Success},
};

mod document {
    pub(super) type Keys = std::collections::HashMap<String, jsonwebtoken::DecodingKey>;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AuthError {
    WrongIssuer,
    UnknownKey,
}

struct Config {
    jwks_hosts: Vec<IssuerAddress>,
}

#[derive(Clone)]
struct IssuerAddress {
    text: String,
}

impl IssuerAddress {
    fn as_str(&self) -> &str {
        &self.text
    }
}

const ISSUER: &str = "issuer.test";
const CALLERS: usize = 3;
/// As in the key sets: when a set is refreshed, when a key is looked for again, the first pause after a failure.
const REFRESH: Duration = Duration::from_secs(295);
const COOL_DOWN: Duration = Duration::from_secs(30);
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// An issuer, and those who ask for its keys.
#[derive(Clone)]
struct World {
    jwks: Jwks,
    tasks: TaskTracker,
    metrics: Metrics,
    issuer: Arc<Seen<Issuer>>,
}

/// What it publishes, and what an onlooker knows.
#[derive(Default)]
struct Issuer {
    kids: Vec<&'static str>,
    /// It does not answer, now or now and then.
    down: bool,
    flaky: bool,
    /// A set that is younger needs no other.
    keep: Duration,
    downloads: usize,
    succeeded: usize,
    under_way: usize,
    last_success: Option<Instant>,
    last_failure: Option<Instant>,
    /// From which download each generation's keys are.
    generations: HashMap<u64, u64>,
    /// The newest generation somebody has.
    newest: u64,
}

impl World {
    fn new() -> Self {
        let issuer =
            Arc::new(Seen::new(Issuer { kids: vec!["old", "also"], keep: REFRESH, ..Issuer::default() }));
        let asked = Arc::clone(&issuer);
        let download = move |_: &IssuerAddress| {
            let issuer = Arc::clone(&asked);
            async move {
                let number = {
                    let mut issuer = issuer.lock();
                    issuer.downloads += 1;
                    issuer.under_way += 1;
                    assert_eq!(issuer.under_way, 1, "two fetches at a time");
                    let pause = issuer.last_failure.map(Instant::elapsed);
                    assert!(pause.is_none_or(|pause| pause >= FIRST_PAUSE), "no pause after a failure");
                    let age = issuer.last_success.map(Instant::elapsed);
                    assert!(age.is_none_or(|age| age >= issuer.keep), "a set is replaced that is not due");
                    issuer.downloads as u64
                };
                some_time().await;
                let mut issuer = issuer.lock();
                issuer.under_way -= 1;
                if issuer.down || issuer.flaky && below(2) == 0 {
                    issuer.last_failure = Some(Instant::now());
                    return Err("down".to_owned());
                }
                issuer.last_success = Some(Instant::now());
                issuer.succeeded += 1;
                let key = |kid: &&str| ((*kid).to_owned(), DecodingKey(number));
                Ok(issuer.kids.iter().map(key).collect::<Keys>())
            }
            .boxed()
        };
        let config = Config { jwks_hosts: vec![IssuerAddress { text: ISSUER.to_owned() }] };
        let (tasks, metrics) = (TaskTracker::new(), Metrics::default());
        let jwks = Jwks::new(&config, Box::new(download), metrics.clone(), tasks.clone());
        Self { jwks, tasks, metrics, issuer }
    }

    fn change(&self, change: impl FnOnce(&mut Issuer)) {
        change(&mut self.issuer.lock());
    }

    fn downloads(&self) -> usize {
        self.issuer.lock().downloads
    }

    /// Looks a key up, and checks what comes of it against what others have been told.
    async fn look_up(&self, kid: &str) -> Result<(), AuthError> {
        let newest = self.issuer.lock().newest;
        if let Some(generation) = self.jwks.fresh_generation(ISSUER) {
            assert!(generation >= newest, "an older set than somebody had");
        }
        let set = self.jwks.set_with(ISSUER, kid).await?;
        let generation = set.generation;
        assert!(generation >= newest, "an older set than somebody had");
        let from = |kid| set.key(kid).map(|DecodingKey(download)| *download);
        let downloads: HashSet<u64> = ["old", "also", "new"].into_iter().filter_map(from).collect();
        let [download] = downloads.into_iter().collect::<Vec<_>>()[..] else { panic!("two sets were mixed") };
        let mut issuer = self.issuer.lock();
        issuer.newest = issuer.newest.max(generation);
        assert_eq!(
            *issuer.generations.entry(generation).or_insert(download),
            download,
            "one number for two sets"
        );
        Ok(())
    }

    /// What becomes of all who look these keys up at the same time. Each time somebody is with them who leaves.
    async fn look_up_all(&self, kids: &[&'static str]) -> Vec<Result<(), AuthError>> {
        let (leaver, first) = (self.clone(), kids[0]);
        let leaving = spawn(async move {
            for_a_while(below(4), leaver.look_up(first)).await;
        });
        let staying = kids.iter().map(|kid| {
            let (world, kid) = (self.clone(), *kid);
            spawn(async move {
                some_time().await;
                world.look_up(kid).await
            })
        });
        let outcomes = join_all(staying.collect::<Vec<_>>()).await;
        leaving.await.expect("it ends");
        self.tasks.wait().await;
        outcomes.into_iter().map(|outcome| outcome.expect("it ends")).collect()
    }
}

/// A set in use is replaced whole and in order, while it is read and fetches fail; nobody finds it missing.
pub fn a_set_is_replaced_whole() {
    block_on(async {
        let world = World::new();
        world.look_up("old").await.expect("the first fetch succeeds");
        world.change(|issuer| issuer.flaky = true);
        let readers = (0..CALLERS).map(|_| {
            let world = world.clone();
            spawn(async move {
                for _ in 0..3 {
                    assert_eq!(world.look_up("old").await, Ok(()), "a key that was always there");
                }
            })
        });
        let readers: Vec<_> = readers.collect();
        for _ in 0..3 {
            some_time().await;
            advance(REFRESH);
        }
        join_all(readers).await;
        world.tasks.wait().await;
        let issuer = world.issuer.lock();
        let counted =
            (world.metrics.jwks_refresh.of(Success::Ok), world.metrics.jwks_refresh.of(Success::Failed));
        assert_eq!(
            counted,
            (issuer.succeeded, issuer.downloads - issuer.succeeded),
            "fetches are counted once"
        );
    });
}

/// Who asks for a new key gets it, and together with strangers who invent key ids they cause one fetch in 30 s.
pub fn a_new_key_is_looked_for_once() {
    block_on(async {
        let world = World::new();
        world.look_up("old").await.expect("the first fetch succeeds");
        world.change(|issuer| (issuer.kids, issuer.keep) = (vec!["old", "new"], Duration::ZERO));
        const KIDS: [&str; 4] = ["new", "invented", "new", "invented"];
        const FOUND: [Result<(), AuthError>; 4] =
            [Ok(()), Err(AuthError::UnknownKey), Ok(()), Err(AuthError::UnknownKey)];
        assert_eq!(world.look_up_all(&KIDS).await, FOUND);
        assert_eq!(world.downloads(), 2, "fetches because of unknown keys");
        advance(COOL_DOWN);
        assert_eq!(world.look_up_all(&KIDS).await, FOUND);
        assert!(world.downloads() <= 3, "fetches because of unknown keys");
    });
}

/// A fetch that fails is the failure of all who wait, and one failure; after its pause the next one is made.
pub fn a_failed_fetch_is_one_failure() {
    block_on(async {
        let world = World::new();
        world.change(|issuer| issuer.down = true);
        const REFUSED: [Result<(), AuthError>; CALLERS] = [Err(AuthError::WrongIssuer); CALLERS];
        // The second pause is twice the first.
        for (fetches, failures) in [(1, 1), (2, 2), (2, 2)] {
            assert_eq!(world.look_up_all(&["old"; CALLERS]).await, REFUSED);
            assert_eq!(world.downloads(), fetches, "fetches in spite of a pause, or none after it");
            assert_eq!(world.metrics.jwks_refresh.of(Success::Failed), failures);
            advance(FIRST_PAUSE);
        }
        world.change(|issuer| issuer.down = false);
        assert_eq!(world.look_up_all(&["old"; CALLERS]).await, [Ok(()); CALLERS]);
        assert_eq!(world.downloads(), 3);
    });
}
