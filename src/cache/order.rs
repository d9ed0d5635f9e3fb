//! Which answers may still be served: what was purged when, on a clock that every replica reads alike. It owns
//! clock and stamps; it must not know Redis, nor what is kept where.
//!
//! Inside the process a *version* is a moment on the process's own monotonic clock, which nothing sets. What replicas
//! share (values, stamps) carries versions on the fleet's clock. [`VersionClock`] knows how far the one is ahead of the
//! other, so that a step of anybody's wall clock never changes the order of what this process has seen.
//!
//! A purge leaves a *stamp*: a scope and a version. An answer is dead if a stamp of its is not older. Stamps are looked
//! at whenever an answer is read; every replica remembers them and gives them back to a Redis that has lost them.

use std::{
    collections::HashMap,
    sync::{PoisonError, atomic::Ordering},
    time::Duration,
};

use aws_lc_rs::hmac;
use tokio::time::Instant;

use super::tier::{Key, Name};
use crate::{
    live::Live,
    sync::{AtomicI64, AtomicU64, Mutex, MutexGuard},
    tenant::{hex, unhex},
};

/// How far the clocks of two replicas may be apart. A purge is in force everywhere from that much later on.
pub const MARGIN: Duration = Duration::from_millis(100);
/// What is later than now by more than this is from a clock that was wrong, or has been set since.
pub const TOLERANCE: Duration = Duration::from_secs(2);
/// The longest step of a clock that is followed.
const LONGEST_STEP: Duration = Duration::from_secs(48 * 3600);
/// The most stamps there are; more are fewer, wider ones.
pub const STAMPS: usize = 10_000;
/// The most keys that digests of observables are made with.
const DIGESTS: usize = 8;
/// The present when the process began: early enough that what is older than the process has a version, too.
const BEGINNING: u64 = 1 << 52;
/// The clocks have not been compared yet.
const UNKNOWN: i64 = i64::MIN;

/// What a purge is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Everything.
    All,
    /// All answers of one tenant, by the name it has in the tier.
    Tenant(Name),
    /// All answers about one observable, whichever tenant's, by its digest.
    Observable(Name),
    /// All answers of one tenant, whose key CyberScan refuses.
    Revoked(Name),
}

impl Scope {
    /// As it stands in the tier.
    #[must_use]
    pub fn text(self) -> String {
        match self {
            Self::All => "all".to_owned(),
            Self::Tenant(name) => format!("t:{}", hex(name)),
            Self::Observable(digest) => format!("o:{}", hex(digest)),
            Self::Revoked(name) => format!("r:{}", hex(name)),
        }
    }

    /// The scope that [`Scope::text`] wrote.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        match text.split_once(':') {
            None => (text == "all").then_some(Self::All),
            Some(("t", name)) => unhex(name).map(Self::Tenant),
            Some(("o", digest)) => unhex(digest).map(Self::Observable),
            Some(("r", name)) => unhex(name).map(Self::Revoked),
            Some(_) => None,
        }
    }
}

/// Versions of this process, and those of the fleet.
pub struct VersionClock {
    started: Instant,
    /// What to add to a version of this process for the fleet's.
    offset: AtomicI64,
}

/// What a comparison with the fleet's clock came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compared {
    /// There was none before.
    First,
    /// As expected.
    Same,
    /// Somebody's clock has been set since: versions that were told meanwhile may be of another count.
    Stepped,
}

impl Default for VersionClock {
    fn default() -> Self {
        Self { started: Instant::now(), offset: AtomicI64::new(UNKNOWN) }
    }
}

impl VersionClock {
    /// The present moment.
    #[must_use]
    pub fn now(&self) -> u64 {
        BEGINNING + micros(self.started.elapsed())
    }

    /// How long ago `version` was; nothing for one to come.
    #[must_use]
    pub fn age(&self, version: u64) -> Duration {
        Duration::from_micros(self.now().saturating_sub(version))
    }

    /// `version` of this process as the fleet counts; `None` before the clocks were compared.
    #[must_use]
    pub fn shared(&self, version: u64) -> Option<u64> {
        match self.offset.load(Ordering::Relaxed) {
            UNKNOWN => None,
            offset => Some(version.saturating_add_signed(offset)),
        }
    }

    /// `version` of the fleet as this process counts; `None` before the clocks were compared.
    #[must_use]
    pub fn own(&self, version: u64) -> Option<u64> {
        match self.offset.load(Ordering::Relaxed) {
            UNKNOWN => None,
            offset => Some(version.saturating_add_signed(offset.saturating_neg())),
        }
    }

    /// The last version of the fleet's that can be true now.
    #[must_use]
    pub fn horizon(&self) -> Option<u64> {
        self.shared(self.now().saturating_add(micros(TOLERANCE)))
    }

    /// The fleet's clock shows `shared` now. It never goes back: who knows of a later time tells the others.
    pub fn compare(&self, shared: u64) -> Compared {
        let offset =
            i64::try_from(shared).unwrap_or(i64::MAX) - i64::try_from(self.now()).unwrap_or(i64::MAX);
        let before = self.offset.fetch_max(offset, Ordering::Relaxed);
        match before {
            UNKNOWN => Compared::First,
            _ if before.abs_diff(offset) > micros(TOLERANCE) => Compared::Stepped,
            _ => Compared::Same,
        }
    }
}

/// When a scope was purged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Stamp {
    /// The last version that may not be served.
    version: u64,
    /// What the tier knows of it, as the fleet counts; 0: nothing.
    told: u64,
    /// A version that the tier has yet to be told of; 0: none.
    untold: u64,
}

/// All stamps.
#[derive(Clone, Default)]
struct Stamps {
    of: HashMap<Scope, Stamp>,
    /// Whether digests are worth their while.
    observables: bool,
}

impl Stamps {
    fn version(&self, scope: Scope) -> u64 {
        self.of.get(&scope).map_or(0, |stamp| stamp.version)
    }
}

/// What this process knows of purges, and the clock they are told by.
pub struct Order {
    clock: VersionClock,
    stamps: Live<Stamps>,
    writing: Mutex<()>,
    /// What digests are made with: the first one for our purges, all for what others purged.
    digests: Live<Vec<hmac::Key>>,
    /// Until when what others tell may be of another count.
    doubted_until: AtomicU64,
}

/// What a look at all stamps of the tier came to.
#[derive(Debug, Default, PartialEq)]
pub struct Learned {
    /// What was not known here, with versions of this process.
    pub new: Vec<(Scope, u64)>,
    /// What the tier has lost or never heard of.
    pub lacking: Vec<Telling>,
}

/// A stamp, for the tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Telling {
    /// What was purged.
    pub scope: Scope,
    /// What the tier has not been told of yet, as this process counts; 0: it has lost what it was told.
    pub own: u64,
    /// The same as the fleet counts.
    pub shared: u64,
}

impl Default for Order {
    fn default() -> Self {
        let (clock, digests) = (VersionClock::default(), Live::new(vec![digest_key(&[])]));
        let (stamps, doubted_until) = (Live::new(Stamps::default()), AtomicU64::new(0));
        Self { clock, stamps, writing: Mutex::default(), digests, doubted_until }
    }
}

impl Order {
    /// The clock.
    #[must_use]
    pub fn clock(&self) -> &VersionClock {
        &self.clock
    }

    /// Digests of observables are made with the first of the keys values are sealed with from now on; those that were
    /// made with the others, or without any, are understood.
    pub fn seal_with(&self, keys: &[[u8; 32]]) {
        let new = keys.iter().map(<[u8; 32]>::as_slice).chain([&[][..]]).map(digest_key);
        let mut digests: Vec<hmac::Key> = Vec::new();
        // Those from before for as long as the process lives: what was purged by them stays purged.
        for key in new.chain(self.digests.get().iter().cloned()) {
            if digests.len() < DIGESTS && !digests.iter().any(|known| digest(known, "") == digest(&key, "")) {
                digests.push(key);
            }
        }
        self.digests.set(digests);
    }

    /// The scope of all answers about the observable that is spelt `subject`.
    #[must_use]
    pub fn about(&self, subject: &str) -> Scope {
        let keys = self.digests.get();
        Scope::Observable(keys.first().map_or([0; 16], |key| digest(key, subject)))
    }

    /// No answer under `key` up to this version may be served.
    #[must_use]
    pub fn purged_before(&self, key: &Key) -> u64 {
        let stamps = self.stamps.get();
        if stamps.of.is_empty() {
            return 0;
        }
        let scopes = [Scope::All, Scope::Tenant(key.label), Scope::Revoked(key.label)];
        let mut latest = scopes.map(|scope| stamps.version(scope)).into_iter().max().unwrap_or(0);
        if stamps.observables {
            for digests in self.digests.get().iter() {
                latest = latest.max(stamps.version(Scope::Observable(digest(digests, &key.subject))));
            }
        }
        latest
    }

    /// The last version at which the key of the tenant of that name was refused.
    #[must_use]
    pub fn revoked_before(&self, label: Name) -> u64 {
        self.stamps.get().version(Scope::Revoked(label))
    }

    /// Nothing of `scope` up to `version` may be served, whether the tier hears of it or not.
    pub fn purge(&self, scope: Scope, version: u64) {
        let _writing = self.writing();
        let mut stamps = self.stamps.get().of.clone();
        let stamp = stamps.entry(scope).or_default();
        (stamp.version, stamp.untold) = (stamp.version.max(version), stamp.untold.max(version));
        self.put(stamps);
    }

    /// What the tier is to be told of `scope`; `None` where nothing was purged or the clocks were not compared yet.
    #[must_use]
    pub fn telling(&self, scope: Scope) -> Option<Telling> {
        let Stamp { told, untold, .. } = self.stamps.get().of.get(&scope).copied()?;
        let shared = if untold == 0 { told } else { self.clock.shared(untold)?.max(told) };
        Some(Telling { scope, own: untold, shared })
    }

    /// Whether the tier has yet to be told of anything.
    #[must_use]
    pub fn is_untold(&self) -> bool {
        self.stamps.get().of.values().any(|stamp| stamp.untold > 0)
    }

    /// The tier has been told; what was purged since, it was not.
    pub fn told(&self, tellings: &[Telling]) {
        let _writing = self.writing();
        let mut stamps = self.stamps.get().of.clone();
        for telling in tellings {
            if let Some(stamp) = stamps.get_mut(&telling.scope) {
                stamp.told = stamp.told.max(telling.shared);
                // If the clock was set while it was under way, it was told by the one before.
                let holds = self.clock.shared(telling.own).is_none_or(|shared| shared <= telling.shared);
                if stamp.untold == telling.own && holds {
                    stamp.untold = 0;
                }
            }
        }
        self.put(stamps);
    }

    /// The fleet's clock shows `shared` now. Draws the consequences of what that tells.
    pub fn compare(&self, shared: u64) -> Compared {
        let compared = self.clock.compare(shared);
        match compared {
            Compared::First => self.purge_until_now(),
            Compared::Stepped => self.doubt(),
            Compared::Same => {}
        }
        compared
    }

    /// What was purged before the clocks were ever compared counts as of now: of what the fleet's clock did meanwhile
    /// nothing is known.
    fn purge_until_now(&self) {
        let _writing = self.writing();
        let now = self.clock.now();
        let mut stamps = self.stamps.get().of.clone();
        let untold = stamps.values_mut().filter(|stamp| stamp.untold > 0);
        untold.for_each(|stamp| {
            let least = stamp.version.max(now);
            (stamp.version, stamp.untold) = (least, least);
        });
        self.put(stamps);
    }

    /// The clocks have been set. From now on, and for as long as others may not have noticed, what is not known yet counts
    /// as of now. What this process knows it tells again, as it is counted now.
    pub fn doubt(&self) {
        let _writing = self.writing();
        let (now, noticed) = (self.clock.now(), 5 * micros(TOLERANCE));
        self.doubted_until.fetch_max(now.saturating_add(noticed), Ordering::Relaxed);
        let mut stamps = self.stamps.get().of.clone();
        stamps.values_mut().for_each(|stamp| stamp.untold = stamp.version);
        self.put(stamps);
    }

    /// Another replica tells of a purge, with the fleet's `version`. Answers the version of this process that it comes to,
    /// unless that was known.
    pub fn hear(&self, scope: Scope, version: u64) -> Option<u64> {
        let _writing = self.writing();
        let mut stamps = self.stamps.get().of.clone();
        let new = self.take(&mut stamps, scope, version);
        self.put(stamps);
        new
    }

    /// Takes over all stamps the tier has, which are `shared`.
    pub fn learn(&self, shared: &[(Scope, u64)]) -> Learned {
        let _writing = self.writing();
        let mut stamps = self.stamps.get().of.clone();
        let mut learned = Learned::default();
        for (scope, version) in shared {
            if let Some(own) = self.take(&mut stamps, *scope, *version) {
                learned.new.push((*scope, own));
            }
        }
        let shared: HashMap<Scope, u64> = shared.iter().copied().collect();
        for (scope, stamp) in stamps.iter_mut().filter(|(_, stamp)| stamp.untold > 0) {
            // Somebody has told of as much.
            let untold = self.clock.shared(stamp.untold);
            if let Some(there) =
                shared.get(scope).filter(|there| untold.is_some_and(|untold| untold <= **there))
            {
                (stamp.told, stamp.untold) = (stamp.told.max(*there), 0);
            }
        }
        self.put(stamps);
        let telling = |scope: &Scope| self.telling(*scope);
        let lacks =
            |telling: &Telling| shared.get(&telling.scope).is_none_or(|there| *there < telling.shared);
        learned.lacking = self.stamps.get().of.keys().filter_map(telling).filter(lacks).collect();
        learned
    }

    fn take(&self, stamps: &mut HashMap<Scope, Stamp>, scope: Scope, version: u64) -> Option<u64> {
        let known = stamps.get(&scope).copied().unwrap_or_default();
        if version <= known.told {
            return None;
        }
        let now = self.clock.now();
        let ahead = version.saturating_sub(self.clock.horizon()?);
        if ahead > 0 && ahead < micros(LONGEST_STEP) {
            // Purges were made later than the clock shows: it has forgotten, and what is dead might seem newer.
            self.clock.compare(version);
        }
        let doubted = now < self.doubted_until.load(Ordering::Relaxed);
        let told = self.clock.own(version)?;
        // What is known already, and told again by another clock, is not purged anew.
        let again = known.version > 0 && told.abs_diff(known.version) <= 2 * micros(MARGIN);
        let least = if doubted && !again { now.saturating_add(micros(MARGIN)) } else { 0 };
        let own = told.clamp(least, now.saturating_add(micros(TOLERANCE)));
        stamps.insert(scope, Stamp { version: known.version.max(own), told: version, ..known });
        (own > known.version).then_some(own)
    }

    /// Makes `stamps` those in force. Beyond [`STAMPS`] the oldest go: a refusal is asked for again anyway, of everything
    /// else as much is purged as is needed to be sure.
    fn put(&self, mut stamps: HashMap<Scope, Stamp>) {
        if stamps.len() > STAMPS {
            let mut all = stamps.remove(&Scope::All).unwrap_or_default();
            let mut oldest: Vec<(Scope, Stamp)> =
                stamps.iter().map(|(scope, stamp)| (*scope, *stamp)).collect();
            oldest.sort_unstable_by_key(|(_, stamp)| stamp.version);
            for (scope, stamp) in oldest.into_iter().take(stamps.len() + 1 - STAMPS) {
                stamps.remove(&scope);
                if !matches!(scope, Scope::Revoked(_)) {
                    all = Stamp {
                        version: all.version.max(stamp.version),
                        told: all.told.max(stamp.told),
                        untold: all.untold.max(stamp.version),
                    };
                }
            }
            if all.version > 0 {
                stamps.insert(Scope::All, all);
            }
        }
        let observables = stamps.keys().any(|scope| matches!(scope, Scope::Observable(_)));
        self.stamps.set(Stamps { of: stamps, observables });
    }

    /// How many stamps there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.stamps.get().of.len()
    }

    /// Whether nothing was ever purged.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All stamps, for tests that compare replicas.
    #[cfg(test)]
    pub(super) fn all(&self) -> HashMap<Scope, u64> {
        self.stamps.get().of.iter().map(|(scope, stamp)| (*scope, stamp.version)).collect()
    }

    /// Held for changes to a map that is replaced as a whole; poison says nothing.
    fn writing(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What digests of observables are made with where values are sealed with `key`. Without one the digest is of what
/// everybody knows: then values are readable in the tier as well.
fn digest_key(key: &[u8]) -> hmac::Key {
    hmac::Key::new(hmac::HMAC_SHA256, &[b"cyberscan-relay/observable/1/".as_slice(), key].concat())
}

fn digest(key: &hmac::Key, subject: &str) -> Name {
    let mut name = [0; 16];
    name.copy_from_slice(hmac::sign(key, subject.as_bytes()).as_ref().split_at(16).0);
    name
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
