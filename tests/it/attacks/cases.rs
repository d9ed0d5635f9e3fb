//! The files of `tests/attacks`: one case per line, written by people. It owns how a line is read
//! and what `<<…>>` stands for; it must not know what is attacked.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// The lines of a file that are no comment.
pub(super) fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'))
}

/// The cases of a file of JSON objects, one per line.
pub(super) fn cases<T: DeserializeOwned>(text: &str) -> Vec<T> {
    let case = |line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    lines(text).map(case).collect()
}

/// Checks every case and fails at the end, so that one run tells all that are wrong.
pub(super) async fn check_each<C>(cases: &[C], check: impl AsyncFn(&C)) {
    let mut wrong = 0;
    for case in cases {
        wrong += usize::from(AssertUnwindSafe(check(case)).catch_unwind().await.is_err());
    }
    assert_eq!(wrong, 0, "{wrong} of {} cases are answered wrongly; they are told above", cases.len());
}

/// `text` with every `<<name>>` replaced by what `place` has for it, and `<<ab*3>>` by `ababab`.
pub(super) fn fill(text: &str, place: &dyn Fn(&str) -> Option<String>) -> String {
    let mut filled = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once("<<") {
        let (name, after) = after.split_once(">>").unwrap_or_else(|| panic!("no end of << in {text}"));
        let repeated = || {
            let (what, times) = name.rsplit_once('*')?;
            Some(what.repeat(times.parse().ok()?))
        };
        filled += before;
        filled += &place(name).or_else(repeated).unwrap_or_else(|| panic!("<<{name}>> in {text}"));
        rest = after;
    }
    filled + rest
}

/// Fills the texts in `value`, names of members included.
pub(super) fn fill_all(value: &Value, place: &dyn Fn(&str) -> Option<String>) -> Value {
    match value {
        Value::String(text) => fill(text, place).into(),
        Value::Array(items) => items.iter().map(|item| fill_all(item, place)).collect(),
        Value::Object(members) => {
            let members = members.iter().map(|(name, value)| (fill(name, place), fill_all(value, place)));
            members.collect::<Map<_, _>>().into()
        }
        other => other.clone(),
    }
}

/// A text that stands in a file in one of three ways: as it is; as bytes, each written as the
/// character of that number; or as JSON, which is easier to read.
#[derive(Debug, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Document {
    Text(String),
    Bytes(String),
    Json(Value),
}

impl Document {
    pub(super) fn bytes(&self, place: &dyn Fn(&str) -> Option<String>) -> Vec<u8> {
        match self {
            Self::Text(text) => fill(text, place).into_bytes(),
            Self::Bytes(text) => {
                let byte =
                    |char| u8::try_from(u32::from(char)).unwrap_or_else(|_| panic!("{char:?} is no byte"));
                fill(text, place).chars().map(byte).collect()
            }
            Self::Json(value) => fill_all(value, place).to_string().into_bytes(),
        }
    }
}
