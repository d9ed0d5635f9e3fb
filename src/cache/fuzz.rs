//! What must hold of any value that is found in Redis.

use std::{sync::Arc, time::Duration};

use jiff::Timestamp;
use serde::{Serialize, de::DeserializeOwned};

use super::{
    entry::{Codec, Entry, enveloped},
    policy::Lifetime,
};
use crate::cyberscan::{DomainRecord, HostRecord, Vulnerabilities};

const NAME: &[u8] = b"relay:v1:name";

/// A value; instructions to alter one of ours, three bytes each; and what may be in one.
pub fn redis_value(input: &[u8]) {
    let codecs = [Codec::new(&[]), Codec::new(&[[7; 32]])];
    let [open, sealing] = &codecs;
    assert!(sealing.decode::<Vulnerabilities>(NAME, input).is_err(), "somebody else's value is served");
    for codec in &codecs {
        let value = codec.encode(NAME, &entry()).expect("a small entry can be kept");
        let altered = altered(&value, input);
        if altered != value {
            assert!(codec.decode::<Vulnerabilities>(NAME, &altered).is_err(), "an altered value is served");
        }
    }
    let inside = enveloped(NAME, input);
    comes_back::<Vulnerabilities>(open, &inside);
    comes_back::<DomainRecord>(open, &inside);
    comes_back::<HostRecord>(open, &inside);
}

fn entry() -> Entry<Vulnerabilities> {
    let body = br#"{"vulnerabilities":[{"name":"A","severity":"High","cvss":7.5,"cve":"CVE-2024-1234"}]}"#;
    Entry {
        record: Some(Arc::new(Vulnerabilities::parse(body).expect("a list of vulnerabilities"))),
        asked_at: Timestamp::UNIX_EPOCH,
        version: 0x1234,
        lifetime: Lifetime { negative: false, fresh: Duration::from_secs(60) },
    }
}

/// `value` with other bytes at some places, as `instructions` say; what is left of these cuts it.
fn altered(value: &[u8], instructions: &[u8]) -> Vec<u8> {
    let mut altered = value.to_vec();
    let (steps, rest) = instructions.as_chunks::<3>();
    for [high, low, byte] in steps {
        let at = usize::from(u16::from_be_bytes([*high, *low])) % value.len();
        altered.iter_mut().skip(at).take(1).for_each(|there| *there = *byte);
    }
    if let [length] = rest {
        altered.truncate(usize::from(*length));
    }
    altered
}

/// What is read from `value` is the same once it has been written and read again.
fn comes_back<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(codec: &Codec, value: &[u8]) {
    let Ok(entry) = codec.decode::<T>(NAME, value) else {
        return;
    };
    let Some(value) = codec.encode(NAME, &entry) else {
        return;
    };
    let again: Entry<T> = codec.decode(NAME, &value).expect("what was written can be read");
    // Not a number is not itself; nothing else may differ.
    assert_eq!(format!("{:?}", again.record), format!("{:?}", entry.record));
    assert_eq!((again.version, again.asked_at), (entry.version, entry.asked_at));
}
