//! What replicas tell each other, as it stands in the stream. It owns that form; it must not know what follows from it.

use std::{collections::HashMap, time::Duration};

use deadpool_redis::redis::{self, FromRedisValue, Value, cmd};

use super::millis;
use crate::{
    cache::{order::Scope, tier::Name},
    cyberscan::Error,
    tenant::{hex, unhex},
};

/// Events that are kept at most, however young they are.
const EVENTS: usize = 100_000;

/// Something another replica tells; versions are the fleet's.
#[derive(Debug, PartialEq)]
pub(super) enum Heard {
    /// A value was replaced, or somebody waits for it.
    Stored { name: Name, version: u64 },
    /// Nobody has a value for those who wait for it.
    Failed { name: Name, error: Error },
    /// Something was purged.
    Purged { scope: Scope, version: u64 },
    /// Redis was told of purges it had lost.
    Stamps,
    /// A tenant was asked to pause.
    Paused { tenant: Name, until: u64 },
}

/// Who tells something, and where.
pub(super) struct Teller {
    /// The key of the stream.
    pub(super) stream: String,
    /// This process, among all that share the Redis.
    pub(super) replica: String,
}

impl Teller {
    /// `number` is a version, a time or what else the kind has a number for.
    pub(super) fn event(&self, kind: &str, name: &str, number: u64) -> redis::Cmd {
        let mut event = cmd("XADD");
        event.arg(&self.stream).arg("MAXLEN").arg("~").arg(EVENTS).arg("*");
        event.arg("o").arg(&self.replica).arg("t").arg(kind).arg("k").arg(name).arg("v").arg(number);
        event
    }

    /// The event that nobody has a value, where every replica would meet the same failure.
    pub(super) fn failed(&self, name: Name, error: &Error) -> Option<redis::Cmd> {
        let (code, number) = failure_code(error)?;
        let mut event = self.event("fail", &hex(name), number);
        event.arg("e").arg(code);
        Some(event)
    }
}

/// The origin and the content of an event.
pub(super) fn parse(fields: &HashMap<String, String>) -> Option<(&str, Heard)> {
    let text = |name: &str| fields.get(name).map(String::as_str);
    let number: u64 = text("v")?.parse().ok()?;
    let name = text("k")?;
    let heard = match text("t")? {
        "set" => Heard::Stored { name: unhex(name)?, version: number },
        "fail" => Heard::Failed { name: unhex(name)?, error: failure_of(text("e")?, number)? },
        "purge" => Heard::Purged { scope: Scope::parse(name)?, version: number },
        "stamps" => Heard::Stamps,
        "pause" => Heard::Paused { tenant: unhex(name)?, until: number },
        _ => return None,
    };
    Some((text("o")?, heard))
}

/// Failures that every replica would meet in the same way. Others, such as no route to the host, each
/// has to find out for itself.
fn failure_code(error: &Error) -> Option<(&'static str, u64)> {
    match error {
        Error::Throttled { retry_after } => Some(("throttled", millis(*retry_after))),
        Error::Unavailable { status } => Some(("unavailable", u64::from(*status))),
        Error::TimedOut { after } => Some(("timed-out", millis(*after))),
        Error::Unexpected { .. } => Some(("unexpected", 0)),
        Error::Unreachable { .. }
        | Error::Untrusted { .. }
        | Error::Unauthorized
        | Error::Resting { .. }
        | Error::Limited { .. }
        | Error::TooLate { .. }
        | Error::Lost => None,
    }
}

fn failure_of(code: &str, number: u64) -> Option<Error> {
    match code {
        "throttled" => Some(Error::Throttled { retry_after: Duration::from_millis(number) }),
        "unavailable" => Some(Error::Unavailable { status: u16::try_from(number).ok()? }),
        "timed-out" => Some(Error::TimedOut { after: Duration::from_millis(number) }),
        "unexpected" => Some(Error::Unexpected { expected: "a record in its format" }),
        _ => None,
    }
}

/// An entry of the stream: its id and, if it is in our form, its fields.
pub(super) type Entry = (String, Option<HashMap<String, String>>);

/// The entries in the answer of XREAD on one stream.
pub(super) fn of_read(answer: &Value) -> Vec<Entry> {
    // RESP2: [[stream, entries]]; RESP3: {stream: entries}; nothing: nil.
    match answer {
        Value::Array(streams) => match streams.first() {
            Some(Value::Array(stream)) => stream.get(1).map(entries).unwrap_or_default(),
            _ => Vec::new(),
        },
        Value::Map(streams) => streams.first().map(|(_, stream)| entries(stream)).unwrap_or_default(),
        _ => Vec::new(),
    }
}

/// The entries in the answer of XRANGE; what is not in our form has an id only.
pub(super) fn entries(answer: &Value) -> Vec<Entry> {
    let Value::Array(entries) = answer else {
        return Vec::new();
    };
    let entry = |entry: &Value| match entry {
        Value::Array(parts) => {
            let id = String::from_redis_value(parts.first()?.clone()).ok()?;
            Some((id, parts.get(1).and_then(|fields| HashMap::from_redis_value(fields.clone()).ok())))
        }
        _ => None,
    };
    entries.iter().filter_map(entry).collect()
}

/// A stream id as it sorts.
pub(super) fn stream_id(id: &str) -> (u64, u64) {
    let (millis, sequence) = id.split_once('-').unwrap_or((id, "0"));
    (millis.parse().unwrap_or(0), sequence.parse().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_to_other_replicas_is_what_they_hear() {
        let heard = |kind: &str, name: &str, number: u64, code: Option<&str>| {
            let mut fields: HashMap<String, String> =
                [("o", "replica"), ("t", kind), ("k", name)].map(|(k, v)| (k.into(), v.into())).into();
            fields.insert("v".into(), number.to_string());
            fields.extend(code.map(|code| ("e".into(), code.to_owned())));
            parse(&fields).map(|(origin, event)| (origin.to_owned(), event))
        };
        for error in [
            Error::Throttled { retry_after: Duration::from_secs(7) },
            Error::Unavailable { status: 503 },
            Error::TimedOut { after: Duration::from_millis(1_500) },
            Error::Unexpected { expected: "a record in its format" },
        ] {
            let (code, number) = failure_code(&error).unwrap();
            let told = heard("fail", &hex([0xa7; 16]), number, Some(code));
            assert_eq!(told, Some(("replica".to_owned(), Heard::Failed { name: [0xa7; 16], error })));
        }
        for scope in
            [Scope::All, Scope::Tenant([0x0f; 16]), Scope::Observable([0xf0; 16]), Scope::Revoked([0; 16])]
        {
            let told = heard("purge", &scope.text(), 9, None);
            assert_eq!(told, Some(("replica".to_owned(), Heard::Purged { scope, version: 9 })));
        }
        // What each replica has to find out for itself.
        assert_eq!(failure_code(&Error::Unauthorized), None);
        assert_eq!(failure_code(&Error::Lost), None);
        // What a later version, or somebody else, wrote.
        for (kind, name, code) in [
            ("set", "short", None),
            ("set", "+1234567890123456789012345678901", None),
            ("purge", "everything", None),
            ("purge", "t:00", None),
            ("fail", "00000000000000000000000000000000", Some("bored")),
            ("sing", "00000000000000000000000000000000", None),
        ] {
            assert!(heard(kind, name, 1, code).is_none(), "{kind} {name}");
        }
    }

    #[test]
    fn stream_ids_sort_as_numbers() {
        assert!(stream_id("9-0") < stream_id("10-0"));
        assert!(stream_id("10-9") < stream_id("10-10"));
        assert!(stream_id("10") < stream_id("10-1"));
        assert_eq!(stream_id("10-2"), (10, 2));
    }
}
