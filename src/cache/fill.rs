//! How an answer that memory does not have, or not fresh enough, is got: from Redis, from a replica that is at it, or from
//! the next stage; once, by all who wait. It owns fills and what their failures lead to; it must not know when an
//! answer needs one.

use std::{sync::Arc, sync::atomic::Ordering, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout, timeout_at},
};

use super::{
    Cached,
    entry::{Entry, Kept, version_of},
    kinds::Kind,
    policy::Freshness,
    tier::{Claim, Key, Name, SharedTier, Told, Value, Write},
};
use crate::{
    chance::chance,
    cyberscan::{Call, CyberScan, Error, Priority},
    metrics::{Flight, Label, Outcome, Rejection, Tier},
    trace::{self, Stage},
};

/// The first pause after a failed question; doubled with each further failure.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest such pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How often a replica looks again while another fetches, if it is not told.
const FIRST_POLL: Duration = Duration::from_millis(20);
const LONGEST_POLL: Duration = Duration::from_millis(200);

/// What a fill brought.
#[derive(Clone)]
pub(super) struct Filled {
    pub(super) kept: Kept,
    /// It was in Redis already, and may be of any age.
    pub(super) adopted: bool,
}

/// Why a question failed, and until when it is not asked again.
#[derive(Clone)]
pub(super) struct Failure {
    pub(super) error: Error,
    pub(super) until: Instant,
    pause: Duration,
}

/// Who is to ask for what nobody has.
pub(super) enum Turn<V> {
    /// Somebody has: here it is, and whether it was waited for.
    Had(V, Flight),
    /// This process, which has the lock of that owner if there is a Redis.
    Ours(Option<String>),
}

impl<P: CyberScan, T: SharedTier> Cached<P, T> {
    /// Renews an answer in the background, unless that is under way or has just failed.
    pub(super) fn renew<K: Kind>(&self, key: &Key, call: &Call, subject: &K::Subject, version: u64) {
        if self.recent_failure(key).is_none() {
            drop(self.start_fill::<K>(key, call, subject, version));
        }
    }

    /// A value newer than `version`, waited for until `deadline`; the question is pursued beyond it.
    pub(super) async fn fill_by<K: Kind>(
        &self,
        key: &Key,
        call: &Call,
        subject: &K::Subject,
        version: u64,
        deadline: Instant,
    ) -> Result<Filled, Error> {
        if let Some(failure) = self.recent_failure(key) {
            return Err(failure.error);
        }
        let after = deadline.saturating_duration_since(Instant::now());
        // Who asks after a purge is not served what was fetched before it; who asked before it is.
        let asked = self.order().clock().now();
        let purged = |kept: &Kept| {
            let purged = self.order().purged_before(key);
            kept.version <= purged && purged <= asked
        };
        if let Some(mut ahead) = self.0.prefetches.running(&key.name)
            && let Ok(Ok(outcome)) = timeout_at(deadline, ahead.wait_for(Option::is_some)).await
            && let Some(Ok(filled)) = &*outcome
            && filled.kept.version > version
            && !purged(&filled.kept)
        {
            return Ok(filled.clone());
        }
        loop {
            let Some((mut outcome, own)) = self.start_fill::<K>(key, call, subject, version) else {
                // A fill has just ended: what came of it is for this question as well.
                let failed = || self.recent_failure(key).map_or(Error::Lost, |failure| failure.error);
                let kept = self.newer_in_memory::<K>(key, version).ok_or_else(failed)?;
                return Ok(Filled { kept, adopted: false });
            };
            let outcome = match timeout_at(deadline, outcome.wait_for(Option::is_some)).await {
                Ok(Ok(outcome)) => outcome.clone().unwrap_or(Err(Error::Lost)),
                Ok(Err(_)) => Err(Error::Lost),
                Err(_) => return Err(Error::TimedOut { after }),
            };
            match outcome {
                // Whoever began it had no time left for a call; who joined may have.
                Err(Error::Limited { .. } | Error::TooLate { .. }) if !own => {}
                Ok(filled) if !own && purged(&filled.kept) => {}
                outcome => return outcome,
            }
        }
    }

    /// Joins or starts a fill, unless one has ended since the question was found to need it. Where there is a
    /// Redis, it tells whether there is a newer value. Answers what will come of it, and whether it was started.
    pub(super) fn start_fill<K: Kind>(
        &self,
        key: &Key,
        call: &Call,
        subject: &K::Subject,
        version: u64,
    ) -> Option<(Outcomes, bool)> {
        let mut started = false;
        let ahead = call.priority == Priority::Prefetch;
        let flights = if ahead { &self.0.prefetches } else { &self.0.flights };
        let ended = || {
            let filled = self.0.shared.is_none() && self.newer_in_memory::<K>(key, version).is_some();
            filled || self.recent_failure(key).is_some()
        };
        let outcome = flights.start_if(
            key.name,
            || ahead || !ended(),
            || {
                started = true;
                let (this, key, subject) = (self.clone(), key.clone(), subject.clone());
                let (tenant, priority) = (Arc::clone(&call.tenant), call.priority);
                // It is pursued for the cache's sake, but no call is made for it that whoever asked cannot wait for.
                let wanted_by = call.wanted_by;
                async move {
                    // Who follows a replica that dies has to wait for its lease, and may ask only then.
                    let longest = match this.0.shared {
                        Some(_) => this.lease() + this.0.config.get().fill_timeout,
                        None => this.0.config.get().fill_timeout,
                    };
                    let call = Call::new(tenant, Instant::now() + longest, priority).wanted_by(wanted_by);
                    let outcome = timeout(longest, this.fill::<K>(&key, &call, &subject, version)).await;
                    let outcome = outcome.unwrap_or(Err(Error::TimedOut { after: longest }));
                    match &outcome {
                        Ok(_) => this.0.failures.invalidate(&key.name),
                        Err(error) if !ahead => this.remember_failure(&key, error),
                        Err(_) => {}
                    }
                    outcome
                }
            },
        );
        Some((outcome?, started))
    }

    /// Gets a value newer than `version`: another replica's, or the next stage's.
    async fn fill<K: Kind>(
        &self,
        key: &Key,
        call: &Call,
        subject: &K::Subject,
        version: u64,
    ) -> Result<Filled, Error> {
        // A value that was purged is no value.
        let version = version.max(self.order().purged_before(key));
        let owner = match self.turn(key.name, version, |value| self.adopt::<K>(key, value)).await? {
            Turn::Had(kept, role) => {
                self.0.metrics.cache_fills.inc((role,));
                return Ok(Filled { kept, adopted: true });
            }
            Turn::Ours(owner) => owner,
        };
        if self.0.shared.is_some() {
            self.count::<K>(Tier::Redis, if owner.is_some() { Outcome::Miss } else { Outcome::Error });
        }
        self.0.metrics.cache_fills.inc((Flight::Leader,));
        let kept = self.fetch::<K>(key, call, subject, owner).await?;
        Ok(Filled { kept, adopted: false })
    }

    /// Finds out whose turn it is to ask for what is kept under `name`: nobody's, as soon as Redis has a value newer than
    /// `version` that `adopt` can make something of.
    ///
    /// # Errors
    /// What the replica that had the turn failed with.
    pub(super) async fn turn<V>(
        &self,
        name: Name,
        mut version: u64,
        adopt: impl Fn(&[u8]) -> Option<V>,
    ) -> Result<Turn<V>, Error> {
        let Some(shared) = &self.0.shared else { return Ok(Turn::Ours(None)) };
        let (mut poll, mut role) = (FIRST_POLL, Flight::Adopted);
        loop {
            match shared.claim(name, version, self.lease()).await {
                Ok(Claim::Value(value)) => match adopt(&value) {
                    Some(had) => return Ok(Turn::Had(had, role)),
                    // It is of no use: as if it were not there. Who replaces it writes a newer one, which is.
                    None => {
                        let its = version_of(&value).and_then(|its| shared.order().clock().own(its));
                        version = version.max(its.unwrap_or(u64::MAX));
                    }
                },
                Ok(Claim::Leader(owner)) => return Ok(Turn::Ours(Some(owner))),
                Ok(Claim::Follower(told)) => {
                    role = Flight::Follower;
                    match timeout(poll.mul_f64(0.75 + 0.5 * chance()), told).await {
                        Ok(Ok(Told::Failed(error))) => return Err(error),
                        Ok(Ok(Told::Stored)) | Err(_) => {}
                        // Another question for the same key took the place of ours.
                        Ok(Err(_)) => sleep(FIRST_POLL).await,
                    }
                    poll = (poll * 2).min(LONGEST_POLL);
                }
                Err(_) => return Ok(Turn::Ours(None)),
            }
        }
    }

    /// How long the lock of one who fetches holds: it outlives the longest fetch, so it is lost by dead
    /// replicas only.
    fn lease(&self) -> Duration {
        self.0.config.get().fill_timeout + Duration::from_secs(1)
    }

    /// Asks the next stage and keeps its answer.
    async fn fetch<K: Kind>(
        &self,
        key: &Key,
        call: &Call,
        subject: &K::Subject,
        owner: Option<String>,
    ) -> Result<Kept, Error> {
        let (born, version) = (Instant::now(), self.order().clock().now());
        let longest = self.0.config.get().fill_timeout;
        let call = Call { deadline: born + longest, ..call.clone() }.wanted_by(call.wanted_by);
        // Also one that takes too long gives its lock back.
        let outcome = timeout(longest, K::ask(&self.0.next, &call, subject)).await;
        match outcome.unwrap_or(Err(Error::TimedOut { after: longest })) {
            Ok(answer) => {
                let record = answer.record.known().cloned();
                self.count::<K>(
                    Tier::Upstream,
                    if record.is_none() { Outcome::Negative } else { Outcome::Fresh },
                );
                let lifetime = K::policy(&self.0.config.get()).lifetime(record.is_none(), chance());
                let entry = Entry { record, asked_at: answer.asked_at, version, lifetime };
                let kept = self.keep(key, &entry, born);
                kept.reads.filled.store(call.priority == Priority::Interactive, Ordering::Relaxed);
                self.share(key, entry, &kept, owner);
                Ok(kept)
            }
            Err(error) => {
                self.count::<K>(Tier::Upstream, Outcome::Error);
                if let (Some(shared), Some(owner)) = (self.0.shared.clone(), owner) {
                    // That nobody's fetch was refused is no answer to those who wait elsewhere.
                    let ahead = call.priority == Priority::Prefetch;
                    let (name, error) = (key.name, if ahead { Error::Lost } else { error.clone() });
                    self.0.tasks.spawn(async move { shared.release(name, owner, &error).await });
                }
                if error == Error::Unauthorized {
                    self.suspect(key.tenant);
                }
                Err(error)
            }
        }
    }

    /// Gives the other replicas an answer, in the background: who waits needs the answer, not its copy.
    fn share<K: Kind>(&self, key: &Key, entry: Entry<K>, kept: &Kept, owner: Option<String>) {
        let Some(shared) = self.0.shared.clone() else { return };
        let life = K::policy(&self.0.config.get()).life(entry.lifetime);
        let (this, size, key) = (Arc::downgrade(&self.0), kept.weight as usize, key.clone());
        let (name, version, until) = (key.name, entry.version, kept.born + life);
        // It may have to wait, and may be purged or sealed otherwise until it is written.
        let value = move |version| {
            let this = Self(this.upgrade()?);
            let alive = entry.version > this.order().purged_before(&key);
            let entry = Entry { version, ..entry.clone() };
            alive.then(|| this.0.codec.get().encode(&binding(&key), &entry))?
        };
        let write = Write { name, version, until, owner, size, value: Value(Arc::new(value)) };
        self.0.tasks.spawn(async move { shared.store(write).await });
    }

    /// Takes a value from Redis into memory; its age counts from when CyberScan was asked. One that is of no use is
    /// no look-up's outcome yet: whoever asks CyberScan in its stead counts the miss.
    pub(super) fn adopt<K: Kind>(&self, key: &Key, value: &[u8]) -> Option<Kept> {
        let clock = self.order().clock();
        let entry = match self.0.codec.get().decode::<K>(&binding(key), value) {
            Ok(entry) if clock.horizon().is_some_and(|horizon| entry.version <= horizon) => entry,
            Ok(_) => {
                self.0.metrics.cache_rejected.inc((Rejection::Future,));
                return None;
            }
            Err(reason) => {
                self.0.metrics.cache_rejected.inc((reason,));
                return None;
            }
        };
        let entry = Entry { version: clock.own(entry.version)?, ..entry };
        let age = clock.age(entry.version);
        let freshness = K::policy(&self.0.config.get()).freshness(entry.lifetime, age);
        let outcome = match entry.version > self.order().purged_before(key) {
            true => outcome(freshness, entry.lifetime.negative),
            false => Outcome::Miss,
        };
        if outcome == Outcome::Miss {
            return None;
        }
        self.count::<K>(Tier::Redis, outcome);
        let now = Instant::now();
        Some(self.keep(key, &entry, now.checked_sub(age).unwrap_or(now)))
    }

    /// Puts an entry into memory, unless there is a newer one or it is purged already. If it is purged in this moment, who
    /// reads it will see that.
    fn keep<K: Kind>(&self, key: &Key, entry: &Entry<K>, born: Instant) -> Kept {
        let weight = entry.record.as_ref().map_or(0, |record| record.weight());
        let kept = entry.keep(key, born, weight);
        let dead =
            K::policy(&self.0.config.get()).freshness(kept.lifetime, born.elapsed()) == Freshness::Dead;
        if !dead && entry.version > self.order().purged_before(key) {
            use moka::ops::compute::Op;
            self.0.memory.entry_by_ref(&key.name).and_compute_with(|present| match present {
                Some(present) if present.value().version > kept.version => Op::Nop,
                _ => Op::Put(kept.clone()),
            });
        }
        kept
    }

    fn recent_failure(&self, key: &Key) -> Option<Failure> {
        self.0.failures.get(&key.name).filter(|failure| Instant::now() < failure.until)
    }

    fn remember_failure(&self, key: &Key, error: &Error) {
        // A host's rest is the breaker's affair; that nothing was sent is nobody's.
        if !error.is_telling() || matches!(error, Error::Resting { .. }) {
            return;
        }
        let failure = Failure::after(self.0.failures.get(&key.name), error.clone());
        self.0.failures.insert(key.name, failure);
    }
}

/// A look-up that memory could not answer, as a span.
pub(super) fn traced<K: Kind>(
    filling: impl Future<Output = Result<Filled, Error>>,
) -> impl Future<Output = Result<Filled, Error>> {
    trace::stage(Stage::LookUp(K::TYPE.label()), filling, |outcome, facts| match outcome {
        Ok(filled) => {
            let tier = if filled.adopted { Tier::Redis } else { Tier::Upstream };
            facts.text("relay.tier", tier.as_str());
        }
        Err(error) => facts.failed(error.as_str()),
    })
}

/// What a fill comes to.
pub(super) async fn landed(
    mut flight: watch::Receiver<Option<Result<Filled, Error>>>,
) -> Result<Filled, Error> {
    let outcome = flight.wait_for(Option::is_some).await.map_err(|_| Error::Lost)?;
    outcome.clone().unwrap_or(Err(Error::Lost))
}

pub(super) fn outcome(freshness: Freshness, negative: bool) -> Outcome {
    match freshness {
        Freshness::Fresh | Freshness::Due if negative => Outcome::Negative,
        Freshness::Fresh | Freshness::Due => Outcome::Fresh,
        Freshness::Revalidate | Freshness::IfError => Outcome::Stale,
        Freshness::Dead => Outcome::Miss,
    }
}

/// What a value is bound to when it is sealed: where it stands.
fn binding(key: &Key) -> [u8; 16] {
    key.name
}

/// What will come of a fill.
pub(super) type Outcomes = watch::Receiver<Option<Result<Filled, Error>>>;

impl Failure {
    /// The failure that follows `last`: each pause is twice the last one, give or take a fifth.
    pub(super) fn after(last: Option<Self>, error: Error) -> Self {
        let pause = last.map_or(FIRST_PAUSE, |last| (last.pause * 2).min(LONGEST_PAUSE));
        let mut rest = pause.mul_f64(0.8 + 0.4 * chance());
        if let Error::Throttled { retry_after } = error {
            // It was said when to come back; the limiter keeps the pause of all others.
            rest = rest.min(retry_after);
        }
        Self { error, until: Instant::now() + rest, pause }
    }
}
