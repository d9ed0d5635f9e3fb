//! Answers that are got before anybody asks for them: renewed ahead for the worker, read from Redis for a request that is
//! about to ask, or for a tenant that has just come. It owns how much of Redis is read at once.

use std::{sync::atomic::Ordering, time::Duration};

use super::{
    Cached,
    entry::Kept,
    fill::landed,
    kinds::Kind,
    order::micros,
    tier::{Key, SharedTier},
};
use crate::{
    ctim::Subject,
    cyberscan::{Call, CyberScan, DomainRecord, Error, HostRecord, RecordType, Vulnerabilities},
    metrics::{Outcome, Tier},
    tenant::Tenant,
};

/// Values that are read at once as long as nobody knows how large they are.
const FIRST: usize = 64;
/// Bytes that are read at once where that can be told.
const PIECE: usize = 256 << 10;
/// Values that are read at once at most.
const MOST: usize = 500;

/// How long before an answer's end it is renewed if nobody waits for it: late, because early renewal is what
/// costs calls, but not too late to be told and tried.
#[must_use]
pub fn lead(life: Duration) -> Duration {
    (life / 100).clamp(Duration::from_secs(2), Duration::from_secs(30))
}

/// What came of renewing an answer nobody waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Renewed {
    /// CyberScan was asked; otherwise somebody else had renewed it.
    pub asked: bool,
    /// How long the answer stays fresh; `None` if it is "not known".
    pub expires_in: Option<Duration>,
    /// How long it is fresh in all.
    pub life: Duration,
}

impl<P: CyberScan, T: SharedTier> Cached<P, T> {
    /// Renews the answer about `subject` unless it has been renewed lately; nobody waits for it.
    ///
    /// # Errors
    /// Why it could not be renewed. That is no answer to anybody.
    pub async fn renew_ahead(
        &self,
        call: &Call,
        record_type: RecordType,
        subject: &Subject,
    ) -> Result<Renewed, Error> {
        match (record_type, subject) {
            (RecordType::Domain, Subject::Domain(domain)) => self.ahead::<DomainRecord>(call, domain).await,
            (RecordType::Host, Subject::Ip(ip)) => self.ahead::<HostRecord>(call, ip).await,
            (RecordType::Vulnerabilities, Subject::Ip(ip)) => self.ahead::<Vulnerabilities>(call, ip).await,
            _ => Err(Error::Lost),
        }
    }

    async fn ahead<K: Kind>(&self, call: &Call, subject: &K::Subject) -> Result<Renewed, Error> {
        let key = Key::new(&call.tenant, K::TYPE, subject.to_string());
        let renewed = |kept: &Kept, asked| Renewed {
            asked,
            expires_in: (!kept.lifetime.negative).then(|| kept.lifetime.fresh.saturating_sub(kept.age())),
            life: kept.lifetime.fresh,
        };
        // Younger than half its life is renewed already.
        let half = match self.in_memory::<K>(&key) {
            Some((kept, _)) if kept.age() < kept.lifetime.fresh / 2 => return Ok(renewed(&kept, false)),
            Some((kept, _)) => kept.lifetime.fresh / 2,
            None => K::policy(&self.0.config.get()).fresh / 2,
        };
        let version = self.order().clock().now().saturating_sub(micros(half));
        let filled = match self.0.flights.running(&key.name) {
            Some(running) => landed(running).await?,
            None => landed(self.start_fill::<K>(&key, call, subject, version).ok_or(Error::Lost)?.0).await?,
        };
        Ok(renewed(&filled.kept, !filled.adopted))
    }

    /// Brings what Redis has of these answers into memory.
    pub async fn warm(&self, tenant: &Tenant, answers: &[(RecordType, Subject)]) {
        let keys =
            answers.iter().map(|(record_type, subject)| Key::new(tenant, *record_type, subject.to_string()));
        self.bring(keys.collect(), false).await;
    }

    /// Brings what Redis has of `keys` into memory, for look-ups to come.
    pub(super) async fn read_ahead(&self, keys: Vec<Key>) {
        self.bring(keys, true).await;
    }

    /// Reads `keys` in pieces of so many bytes that no piece is long under way: in one, if they are few or small.
    pub(super) async fn bring(&self, mut keys: Vec<Key>, for_a_look_up: bool) {
        let Some(shared) = &self.0.shared else { return };
        let there = |key: &Key| {
            let kept = self.0.memory.get(&key.name);
            // One attempt: what cannot be had now is as good as what is here.
            kept.is_some_and(|kept| !kept.reads.superseded.swap(false, Ordering::Relaxed))
        };
        keys.retain(|key| !there(key));
        keys.sort_unstable_by_key(|key| key.name);
        keys.dedup_by_key(|key| key.name);
        let (mut left, mut count) = (keys.as_slice(), FIRST);
        while !left.is_empty() {
            let (piece, rest) = left.split_at(count.min(left.len()));
            left = rest;
            let names: Vec<_> = piece.iter().map(|key| key.name).collect();
            let Ok(values) = shared.read(&names).await else { return };
            let bytes: usize = values.iter().flatten().map(Vec::len).sum();
            count = (PIECE * piece.len() / bytes.max(1)).clamp(1, MOST);
            for (key, value) in piece.iter().zip(values) {
                if let Some(value) = value {
                    self.bring_one(key, &value, for_a_look_up);
                }
            }
        }
    }

    fn bring_one(&self, key: &Key, value: &[u8], for_a_look_up: bool) {
        let kept = match key.record_type {
            RecordType::Domain => self.adopt::<DomainRecord>(key, value),
            RecordType::Host => self.adopt::<HostRecord>(key, value),
            RecordType::Vulnerabilities => self.adopt::<Vulnerabilities>(key, value),
        };
        if let Some(kept) = kept
            && for_a_look_up
        {
            kept.reads.unread.store(true, Ordering::Relaxed);
            self.0.metrics.cache_lookups.inc((key.record_type.label(), Tier::Memory, Outcome::Miss));
        }
    }
}
