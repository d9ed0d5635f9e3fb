//! What is kept: a record, when it was asked for, how long it is good. It owns the form in which
//! an entry travels to Redis and back, compressed and sealed; it must not know Redis.
//!
//! The form, all of it but the version bound to the key it was written for:
//!
//! | bytes | content |
//! |---|---|
//! | 2 | `R2`, the form's own version |
//! | 16 | the entry's version in hexadecimal, which scripts compare |
//! | 1 | 0 as it is, 1 sealed |
//! | 4 + 12 | sealed: which key, and the nonce |
//! | 8 | not sealed: a checksum, which tells what was altered or stands under another key by accident |
//! | rest | flags, times, the record (postcard, LZ4 where it helps); sealed: and the tag |

use std::{any::Any, sync::Arc, time::Duration};

use aws_lc_rs::{
    aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey},
    digest,
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::time::Instant;

use super::{policy::Lifetime, reads::Reads, tier::Key};
use crate::{cyberscan::RecordType, metrics::Rejection};

/// The form's own version. It also changes when answers are read otherwise: what was kept of `R1` may be "not known"
/// because a proxy said 404.
const MAGIC: &[u8; 2] = b"R2";
/// Magic and version.
const HEAD: usize = 2 + 16;
const CHECKSUM: usize = 8;
/// The largest value we write or read.
pub(super) const LARGEST: usize = 1 << 20;
/// What an entry takes in memory beside its record: itself, its reads, and what moka needs for it (hash slot,
/// places in the order of use and of expiry), which was measured: 400 bytes.
const SLOT: usize = size_of::<Kept>() + size_of::<Reads>() + 32 + 400;
/// Records below this size are stored as they are; there is little to save.
const COMPRESS_FROM: usize = 512;

/// An answer that is kept. `T` is a record of CyberScan.
#[derive(Debug)]
pub(super) struct Entry<T> {
    /// `None`: not known to CyberScan.
    pub(super) record: Option<Arc<T>>,
    /// When CyberScan was asked.
    pub(super) asked_at: Timestamp,
    /// The moment the fetch began, microseconds on the clock all replicas share. A greater version
    /// is a newer answer.
    pub(super) version: u64,
    pub(super) lifetime: Lifetime,
}

/// An entry in this process's memory, whatever it is of.
#[derive(Clone)]
pub(super) struct Kept {
    record: Option<Arc<dyn Any + Send + Sync>>,
    asked_at: Timestamp,
    pub(super) version: u64,
    pub(super) lifetime: Lifetime,
    /// The moment the fetch began, on this process's clock.
    pub(super) born: Instant,
    pub(super) record_type: RecordType,
    /// Bytes it occupies, all in all.
    pub(super) weight: u32,
    pub(super) reads: Arc<Reads>,
}

impl<T> Clone for Entry<T> {
    fn clone(&self) -> Self {
        Self { record: self.record.clone(), ..*self }
    }
}

impl<T: Send + Sync + 'static> Entry<T> {
    pub(super) fn keep(&self, key: &Key, born: Instant, weight: usize) -> Kept {
        Kept {
            record: self.record.clone().map(|record| record as Arc<dyn Any + Send + Sync>),
            asked_at: self.asked_at,
            version: self.version,
            lifetime: self.lifetime,
            born,
            record_type: key.record_type,
            reads: Arc::default(),
            weight: u32::try_from(weight + SLOT).unwrap_or(u32::MAX),
        }
    }
}

impl Kept {
    /// The entry, if it is one of `T`.
    pub(super) fn entry<T: Send + Sync + 'static>(&self) -> Option<Entry<T>> {
        let record = match &self.record {
            None => None,
            Some(record) => Some(Arc::clone(record).downcast().ok()?),
        };
        Some(Entry { record, asked_at: self.asked_at, version: self.version, lifetime: self.lifetime })
    }
}

/// What is sealed: everything but the version.
#[derive(Serialize, Deserialize)]
struct Content<'a> {
    asked_at_ms: i64,
    fresh_ms: u64,
    #[serde(borrow)]
    record: Option<Packed<'a>>,
}

#[derive(Serialize, Deserialize)]
struct Packed<'a> {
    /// The record's size before compression; 0 where it is not compressed.
    unpacked: u32,
    #[serde(borrow)]
    bytes: std::borrow::Cow<'a, [u8]>,
}

/// Writes and reads entries.
#[derive(Default)]
pub(super) struct Codec {
    /// The first one seals, all open.
    keys: Vec<SealingKey>,
}

struct SealingKey {
    id: [u8; 4],
    key: RandomizedNonceKey,
}

impl Codec {
    /// Seals with the first of `keys` and opens with any; without keys nothing is sealed.
    pub(super) fn new(keys: &[[u8; 32]]) -> Self {
        let sealing = |key: &[u8; 32]| {
            let mut id = [0; 4];
            let name = digest::digest(&digest::SHA256, &[b"cyberscan-relay/key/".as_slice(), key].concat());
            id.copy_from_slice(name.as_ref().split_at(4).0);
            let key = RandomizedNonceKey::new(&AES_256_GCM, key).ok()?;
            Some(SealingKey { id, key })
        };
        Self { keys: keys.iter().filter_map(sealing).collect() }
    }

    /// The value of `entry` for the Redis key `name`; `None` if it is too large to keep.
    pub(super) fn encode<T: Serialize>(&self, name: &[u8], entry: &Entry<T>) -> Option<Vec<u8>> {
        let record = match &entry.record {
            None => None,
            Some(record) => {
                let plain = postcard::to_stdvec(&**record).ok()?;
                Some(pack(plain))
            }
        };
        let content = Content {
            asked_at_ms: entry.asked_at.as_millisecond(),
            fresh_ms: u64::try_from(entry.lifetime.fresh.as_millis()).unwrap_or(u64::MAX),
            record,
        };
        let mut body = postcard::to_stdvec(&content).ok()?;
        let mut value = [MAGIC.as_slice(), version_text(entry.version).as_bytes()].concat();
        match self.keys.first() {
            None => {
                let checksum = checksum(name, &value, &body);
                value.push(0);
                value.extend_from_slice(&checksum);
            }
            Some(SealingKey { id, key }) => {
                let bound = bound(name, &value);
                let nonce = key.seal_in_place_append_tag(Aad::from(bound), &mut body).ok()?;
                value.push(1);
                value.extend_from_slice(id);
                value.extend_from_slice(nonce.as_ref());
            }
        }
        value.extend_from_slice(&body);
        (value.len() <= LARGEST).then_some(value)
    }

    /// The entry in `value`, which was found under the Redis key `name`.
    pub(super) fn decode<T: DeserializeOwned>(
        &self,
        name: &[u8],
        value: &[u8],
    ) -> Result<Entry<T>, Rejection> {
        if value.len() > LARGEST {
            return Err(Rejection::Oversize);
        }
        let (head, rest) = value.split_at_checked(HEAD).ok_or(Rejection::Format)?;
        let (sealed, body) = rest.split_first().ok_or(Rejection::Format)?;
        if !head.starts_with(MAGIC) {
            return Err(Rejection::Format);
        }
        let version = version_of(value).ok_or(Rejection::Format)?;
        let mut opened;
        let body = match (sealed, self.keys.is_empty()) {
            (0, true) => {
                let (sum, body) = body.split_at_checked(CHECKSUM).ok_or(Rejection::Format)?;
                if sum != checksum(name, head, body) {
                    return Err(Rejection::Corrupt);
                }
                body
            }
            // With a key set, what is not sealed was not written by us.
            (0, false) | (1, true) => return Err(Rejection::Key),
            (1, false) => {
                let (id, rest) = body.split_at_checked(4).ok_or(Rejection::Format)?;
                let (nonce, rest) = rest.split_at_checked(NONCE_LEN).ok_or(Rejection::Format)?;
                let key = self.keys.iter().find(|key| key.id == id).ok_or(Rejection::Key)?;
                let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| Rejection::Format)?;
                opened = rest.to_vec();
                key.key
                    .open_in_place(nonce, Aad::from(bound(name, head)), &mut opened)
                    .map_err(|_| Rejection::Sealed)?
            }
            _ => return Err(Rejection::Format),
        };
        let content: Content<'_> = postcard::from_bytes(body).map_err(|_| Rejection::Corrupt)?;
        let record = match content.record {
            None => None,
            Some(packed) => {
                let plain = unpack(packed)?;
                Some(Arc::new(postcard::from_bytes(&plain).map_err(|_| Rejection::Corrupt)?))
            }
        };
        Ok(Entry {
            asked_at: Timestamp::from_millisecond(content.asked_at_ms).map_err(|_| Rejection::Corrupt)?,
            version,
            lifetime: Lifetime { negative: record.is_none(), fresh: Duration::from_millis(content.fresh_ms) },
            record,
        })
    }
}

/// Versions as scripts compare them: text of one length.
pub(super) fn version_text(version: u64) -> String {
    format!("{version:016x}")
}

/// The version a value claims.
pub(super) fn version_of(value: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(value.get(2..HEAD)?).ok()?;
    u64::from_str_radix(text, 16).ok()
}

/// What a value is bound to: its key and its version.
fn bound(name: &[u8], head: &[u8]) -> Vec<u8> {
    [&(name.len() as u64).to_be_bytes(), name, head].concat()
}

fn checksum(name: &[u8], head: &[u8], body: &[u8]) -> [u8; CHECKSUM] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&bound(name, head));
    context.update(body);
    let mut sum = [0; CHECKSUM];
    sum.copy_from_slice(context.finish().as_ref().split_at(CHECKSUM).0);
    sum
}

/// `body` as it would stand under the Redis key `name`, not sealed.
#[cfg(any(test, fuzzing))]
pub(super) fn enveloped(name: &[u8], body: &[u8]) -> Vec<u8> {
    let head = [MAGIC.as_slice(), version_text(1).as_bytes()].concat();
    [&*head, &[0], &checksum(name, &head, body), body].concat()
}

fn pack(plain: Vec<u8>) -> Packed<'static> {
    if plain.len() >= COMPRESS_FROM {
        let packed = lz4_flex::compress(&plain);
        if packed.len() < plain.len() - plain.len() / 8 {
            let unpacked = u32::try_from(plain.len()).unwrap_or(0);
            return Packed { unpacked, bytes: packed.into() };
        }
    }
    Packed { unpacked: 0, bytes: plain.into() }
}

fn unpack(packed: Packed<'_>) -> Result<std::borrow::Cow<'_, [u8]>, Rejection> {
    match packed.unpacked as usize {
        0 => Ok(packed.bytes),
        // The size is checked before anything is allocated for it.
        size if size > 8 * LARGEST => Err(Rejection::Oversize),
        size => {
            let plain = lz4_flex::decompress(&packed.bytes, size).map_err(|_| Rejection::Corrupt)?;
            Ok(plain.into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cyberscan::{DomainRecord, Vulnerabilities};
    use proptest::prelude::*;

    fn entry() -> Entry<Vulnerabilities> {
        let items: Vec<String> = (0..20)
            .map(|i| format!(r#"{{"name":"Finding {i}","description":"Some words that repeat themselves.","severity":"High","port":{i}}}"#))
            .collect();
        let body = format!(r#"{{"vulnerabilities":[{}]}}"#, items.join(","));
        Entry {
            record: Some(Arc::new(Vulnerabilities::parse(body.as_bytes()).unwrap())),
            asked_at: "2026-01-02T03:04:05.678Z".parse().unwrap(),
            version: 0x1234_5678,
            lifetime: Lifetime { negative: false, fresh: Duration::from_secs(3600) },
        }
    }

    fn codecs() -> [Codec; 2] {
        [Codec::new(&[]), Codec::new(&[[7; 32], [8; 32]])]
    }

    #[test]
    fn an_entry_comes_back_as_it_was() {
        for codec in codecs() {
            let value = codec.encode(b"name", &entry()).unwrap();
            let back: Entry<Vulnerabilities> = codec.decode(b"name", &value).unwrap();
            assert_eq!(back.record, entry().record);
            assert_eq!(
                (back.asked_at, back.version, back.lifetime),
                (entry().asked_at, entry().version, entry().lifetime)
            );
            let unknown = Entry::<DomainRecord> {
                record: None,
                asked_at: entry().asked_at,
                version: 9,
                lifetime: Lifetime { negative: true, fresh: Duration::from_secs(1) },
            };
            let value = codec.encode(b"name", &unknown).unwrap();
            assert!(codec.decode::<DomainRecord>(b"name", &value).unwrap().lifetime.negative);
        }
    }

    #[test]
    fn repeating_records_are_compressed() {
        let plain = postcard::to_stdvec(&*entry().record.unwrap()).unwrap().len();
        let value = Codec::new(&[]).encode(b"name", &entry()).unwrap().len();
        assert!(value * 2 < plain, "{value} of {plain}");
    }

    #[test]
    fn a_sealed_value_tells_nothing_and_opens_for_its_own_key_only() {
        let codec = Codec::new(&[[7; 32]]);
        let value = codec.encode(b"name", &entry()).unwrap();
        assert!(!value.windows(7).any(|bytes| bytes == b"Finding"));
        assert_eq!(codec.decode::<Vulnerabilities>(b"other", &value).err(), Some(Rejection::Sealed));
        assert_eq!(
            Codec::new(&[[9; 32]]).decode::<Vulnerabilities>(b"name", &value).err(),
            Some(Rejection::Key)
        );
        assert_eq!(Codec::new(&[]).decode::<Vulnerabilities>(b"name", &value).err(), Some(Rejection::Key));
        let plain = Codec::new(&[]).encode(b"name", &entry()).unwrap();
        assert_eq!(codec.decode::<Vulnerabilities>(b"name", &plain).err(), Some(Rejection::Key));
        // After a rotation the old key still opens.
        assert!(Codec::new(&[[9; 32], [7; 32]]).decode::<Vulnerabilities>(b"name", &value).is_ok());
    }

    #[test]
    fn every_altered_byte_is_noticed_and_so_is_the_value_of_another_key() {
        for codec in codecs() {
            let value = codec.encode(b"name", &entry()).unwrap();
            for at in 0..value.len() {
                let mut altered = value.clone();
                altered[at] ^= 1;
                assert!(codec.decode::<Vulnerabilities>(b"name", &altered).is_err(), "byte {at}");
                assert!(codec.decode::<Vulnerabilities>(b"name", &value[..at]).is_err(), "cut at {at}");
            }
            let longer = [value.as_slice(), b"x"].concat();
            assert!(codec.decode::<Vulnerabilities>(b"name", &longer).is_err());
            assert!(codec.decode::<Vulnerabilities>(b"other", &value).is_err());
        }
    }

    #[test]
    fn a_record_is_compressed_where_that_saves_an_eighth() {
        let unpacked = |plain: Vec<u8>| pack(plain).unpacked;
        assert_eq!(unpacked(vec![b'a'; COMPRESS_FROM]), 512);
        assert_eq!(unpacked(vec![b'a'; COMPRESS_FROM - 1]), 0, "there is little to save");
        // As good as chance: nothing to compress in it.
        let noise: Vec<u8> = (0..125_u32)
            .flat_map(|number| digest::digest(&digest::SHA256, &number.to_be_bytes()).as_ref().to_vec())
            .collect();
        assert_eq!(unpacked(noise.clone()), 0);
        let with_zeros = |zeros: usize| [&noise[..4_000 - zeros], &vec![0; zeros]].concat();
        assert_eq!(unpacked(with_zeros(400)), 0, "a tenth");
        assert_eq!(unpacked(with_zeros(600)), 4_000, "a seventh");
    }

    #[test]
    fn what_is_too_large_or_says_it_would_become_so_is_not_unpacked() {
        let oversize = Codec::new(&[]).decode::<Vulnerabilities>(b"name", &vec![b'R'; LARGEST + 1]);
        assert_eq!(oversize.err(), Some(Rejection::Oversize));
        let largest = Codec::new(&[]).decode::<Vulnerabilities>(b"name", &vec![b'R'; LARGEST]);
        assert_eq!(largest.err(), Some(Rejection::Format));

        let claiming = |unpacked: usize| {
            let bytes = lz4_flex::compress(b"a little").into();
            unpack(Packed { unpacked: u32::try_from(unpacked).unwrap(), bytes }).err()
        };
        assert_eq!(claiming(8), None);
        assert_eq!(claiming(8 * LARGEST), None);
        assert_eq!(claiming(8 * LARGEST + 1), Some(Rejection::Oversize));
    }

    #[test]
    fn an_entry_too_large_is_not_written() {
        let body = format!(
            r#"{{"vulnerabilities":[{{"name":"{}"}}]}}"#,
            (0..300_000).map(|i| format!("{i} ")).collect::<String>()
        );
        let large =
            Entry { record: Some(Arc::new(Vulnerabilities::parse(body.as_bytes()).unwrap())), ..entry() };
        assert!(Codec::new(&[]).encode(b"name", &large).is_none());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]

        #[test]
        fn mutated_values_are_refused_and_never_panic(
            sealed: bool, cut in 0..4000usize, changes in proptest::collection::vec((0..4000usize, any::<u8>()), 1..6),
        ) {
            let codec = &codecs()[usize::from(sealed)];
            let value = codec.encode(b"name", &entry()).unwrap();
            let mut mutated = value.clone();
            for (at, byte) in changes {
                let len = mutated.len();
                mutated[at % len] = byte;
            }
            mutated.truncate(cut.max(1));
            let outcome = codec.decode::<Vulnerabilities>(b"name", &mutated);
            if mutated != value {
                prop_assert!(outcome.is_err());
            }
        }
    }
}
