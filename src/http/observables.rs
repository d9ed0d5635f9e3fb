//! The request body: a list of `{"type", "value"}`. It owns what a valid list is and the words in
//! which an invalid one is refused, which are those of the Python relays (a dict of marshmallow's
//! messages, printed by Python). It must not know what happens to the observables.

use std::{collections::HashSet, fmt::Write};

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use serde_json::value::RawValue;
use unicode_properties::{GeneralCategory, UnicodeGeneralCategory};

use crate::{ctim::Observable, surrogates};

/// The most observables in one request.
const MOST: usize = 1000;
/// The longest refusal; more than anyone reads.
const LONGEST_MESSAGE: usize = 32 << 10;
/// The longest number, in digits, that Python's JSON reader takes for one.
const LONGEST_NUMBER: usize = 4300;

/// The body is not a list of valid observables; the text says where and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Invalid(pub(super) String);

/// The observables of `body` that can be answered, each once, in the order asked.
///
/// Every entry has to be valid, also of a type that is not answered; those are then left out, as
/// are values that are no address and no domain name.
pub(super) fn parse(body: &[u8]) -> Result<Vec<Observable>, Invalid> {
    let body = body.strip_prefix("\u{feff}".as_bytes()).unwrap_or(body);
    let text = std::str::from_utf8(body).map(surrogates::replaced);
    let entries = match text.ok().and_then(|text| serde_json::from_str::<Entries>(&text).ok()) {
        Some(Entries::All(entries)) => entries,
        Some(Entries::TooMany) => {
            return Err(Invalid(format!("{{'_schema': ['Longer than maximum length {MOST}.']}}")));
        }
        None => return Err(Invalid("{'_schema': ['Invalid input type.']}".into())),
    };
    let mut valid = Vec::new();
    let mut faults = String::new();
    for (place, entry) in entries.iter().enumerate() {
        match entry {
            Entry::Fields { kind: Field::Text(kind), value: Field::Text(value), unknown }
                if unknown.is_empty() =>
            {
                valid.push((kind, value));
            }
            entry if faults.len() < LONGEST_MESSAGE => {
                let separator = if faults.is_empty() { "" } else { ", " };
                let _ = write!(faults, "{separator}{place}: {}", entry.fault());
            }
            _ => {}
        }
    }
    if !faults.is_empty() {
        let cut = faults.floor_char_boundary(LONGEST_MESSAGE);
        let ellipsis = if cut < faults.len() { "…" } else { "" };
        faults.truncate(cut);
        return Err(Invalid(format!("{{{faults}{ellipsis}}}")));
    }
    let mut seen = HashSet::new();
    let observables = valid.into_iter().filter_map(|(kind, value)| Observable::new(kind, value));
    Ok(observables.filter(|observable| seen.insert(observable.subject().clone())).collect())
}

enum Entries {
    All(Vec<Entry>),
    TooMany,
}

enum Entry {
    Fields { kind: Field, value: Field, unknown: Vec<String> },
    NotAnObject,
}

enum Field {
    Missing,
    Null,
    NotText,
    Blank,
    Text(String),
}

impl Entry {
    /// The fault of an invalid entry.
    fn fault(&self) -> String {
        let Self::Fields { kind, value, unknown } = self else {
            return "{'_schema': ['Invalid input type.']}".to_owned();
        };
        let known = [("type", kind), ("value", value)];
        let known =
            known.iter().filter_map(|(name, field)| Some(format!("'{name}': ['{}']", field.fault()?)));
        let unknown = unknown.iter().map(|name| format!("{}: ['Unknown field.']", python_repr(name)));
        format!("{{{}}}", known.chain(unknown).collect::<Vec<_>>().join(", "))
    }
}

impl Field {
    fn fault(&self) -> Option<&'static str> {
        match self {
            Self::Missing => Some("Missing data for required field."),
            Self::Null => Some("Field may not be null."),
            Self::NotText => Some("Not a valid string."),
            Self::Blank => Some("Field may not be blank."),
            Self::Text(_) => None,
        }
    }
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Entries;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a list of observables")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while entries.len() < MOST {
                    let Some(raw) = list.next_element::<&RawValue>()? else {
                        return Ok(Entries::All(entries));
                    };
                    entries.push(entry(raw)?);
                }
                let mut more = 0;
                while list.next_element::<IgnoredAny>()?.is_some() {
                    more += 1;
                }
                Ok(if more == 0 { Entries::All(entries) } else { Entries::TooMany })
            }
        }
        deserializer.deserialize_seq(List)
    }
}

fn entry<E: serde::de::Error>(raw: &RawValue) -> Result<Entry, E> {
    if !raw.get().starts_with('{') {
        return number_is_bearable(raw).map(|()| Entry::NotAnObject);
    }
    serde_json::from_str(raw.get()).map_err(E::custom)
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Entry;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an observable")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry, A::Error> {
                let (mut kind, mut value, mut unknown) = (Field::Missing, Field::Missing, Vec::new());
                let mut seen = HashSet::new();
                while let Some((name, raw)) = map.next_entry::<Name, &RawValue>()? {
                    number_is_bearable(raw)?;
                    match name {
                        Name::Kind => kind = field(raw),
                        Name::Value => value = field(raw),
                        Name::Unknown(name) if seen.insert(name.clone()) => unknown.push(name),
                        Name::Unknown(_) => {}
                    }
                }
                Ok(Entry::Fields { kind, value, unknown })
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// The name of a field; only an unknown one is kept.
enum Name {
    Kind,
    Value,
    Unknown(String),
}

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Name;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("the name of a field")
            }

            fn visit_str<E>(self, name: &str) -> Result<Name, E> {
                Ok(match name {
                    "type" => Name::Kind,
                    "value" => Name::Value,
                    name => Name::Unknown(name.to_owned()),
                })
            }
        }
        deserializer.deserialize_str(Text)
    }
}

fn field(raw: &RawValue) -> Field {
    match raw.get().as_bytes().first() {
        Some(b'n') => Field::Null,
        Some(b'"') => match serde_json::from_str::<String>(raw.get()) {
            Ok(text) if text.is_empty() => Field::Blank,
            Ok(text) => Field::Text(text),
            Err(_) => Field::NotText,
        },
        _ => Field::NotText,
    }
}

fn number_is_bearable<E: serde::de::Error>(raw: &RawValue) -> Result<(), E> {
    let number = raw.get().starts_with(|c: char| c == '-' || c.is_ascii_digit());
    if number && raw.get().len() > LONGEST_NUMBER { Err(E::custom("a number too long")) } else { Ok(()) }
}

/// `text` as Python's `repr` prints it: in single quotes unless it contains some and no double
/// ones, with escapes for what cannot be printed.
fn python_repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut repr = String::from(quote);
    for char in text.chars() {
        match char {
            '\n' => repr.push_str("\\n"),
            '\r' => repr.push_str("\\r"),
            '\t' => repr.push_str("\\t"),
            '\\' => repr.push_str("\\\\"),
            char if char == quote => repr.extend(['\\', char]),
            char if is_printable(char) => repr.push(char),
            char => {
                let _ = match u32::from(char) {
                    code @ ..0x100 => write!(repr, "\\x{code:02x}"),
                    code @ 0x100..0x10000 => write!(repr, "\\u{code:04x}"),
                    code => write!(repr, "\\U{code:08x}"),
                };
            }
        }
    }
    repr.push(quote);
    repr
}

fn is_printable(char: char) -> bool {
    use GeneralCategory as Category;
    char == ' '
        || !matches!(
            char.general_category(),
            Category::Control
                | Category::Format
                | Category::Surrogate
                | Category::PrivateUse
                | Category::Unassigned
                | Category::LineSeparator
                | Category::ParagraphSeparator
                | Category::SpaceSeparator
        )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refusal(body: &str) -> String {
        parse(body.as_bytes()).unwrap_err().0
    }

    #[test]
    fn observables_come_out_once_each_in_the_order_asked() {
        let body = r#"[{"type":"domain","value":"b.example"},{"type":"ip","value":"192.0.2.1"},{"value":"192.0.2.1","type":"ip"},
            {"type":"sha256","value":"x"},{"type":"domain","value":"B.Example."},{"type":"ip","value":"nonsense"},{"type":"ip","value":"192.0.2.2"}]"#;
        let values: Vec<String> =
            parse(body.as_bytes()).unwrap().iter().map(|o| o.value().to_owned()).collect();
        assert_eq!(values, ["b.example", "192.0.2.1", "192.0.2.2"]);
        assert_eq!(parse(b"[]"), Ok(vec![]));
        assert_eq!(parse("\u{feff}[]".as_bytes()), Ok(vec![]));
    }

    #[test]
    fn what_is_no_list_is_refused_as_a_whole() {
        let long_number = format!(r#"[{{"type":"ip","value":{}}}]"#, "9".repeat(5000));
        for body in [
            "",
            " ",
            "{}",
            "null",
            "true",
            "5",
            "\"x\"",
            "[",
            "[{]",
            "[{\"type\":\"ip\"]",
            "[/* */]",
            "[1,]",
            "[] x",
            "{'type':'ip'}",
            &long_number,
        ] {
            assert_eq!(refusal(body), "{'_schema': ['Invalid input type.']}", "{body}");
        }
        assert_eq!(parse(b"\xff\xfe[\0]\0").unwrap_err().0, "{'_schema': ['Invalid input type.']}");
    }

    #[test]
    fn a_value_with_half_a_character_is_a_text_and_no_name() {
        let body = r#"[{"type":"domain","value":"one\ud800.example"},{"type":"ip","value":"192.0.2.1"}]"#;
        let values: Vec<String> =
            parse(body.as_bytes()).unwrap().iter().map(|o| o.value().to_owned()).collect();
        assert_eq!(values, ["192.0.2.1"]);
        assert_eq!(parse(br#"[{"type":"\udfff","value":"x"}]"#), Ok(vec![]));
    }

    #[test]
    fn spellings_and_types_of_one_address_are_one_observable() {
        let body = r#"[{"type":"ip","value":"::ffff:192.0.2.1"},{"type":"ip","value":"192.0.2.1"},{"type":"ipv6","value":"2001:db8::5"},
            {"type":"ip","value":"2001:DB8:0::5"},{"type":"ipv6","value":"::FFFF:192.0.2.1"}]"#;
        let asked = parse(body.as_bytes()).unwrap();
        let asked: Vec<(&str, &str)> = asked.iter().map(|asked| (asked.kind(), asked.value())).collect();
        assert_eq!(asked, [("ip", "::ffff:192.0.2.1"), ("ipv6", "2001:db8::5")]);
    }

    #[test]
    fn faulty_entries_are_told_by_place_and_field() {
        for (body, message) in [
            (
                r#"[1,"x",null,[]]"#,
                "{0: {'_schema': ['Invalid input type.']}, 1: {'_schema': ['Invalid input type.']}, 2: {'_schema': ['Invalid input type.']}, 3: {'_schema': ['Invalid input type.']}}",
            ),
            (
                r#"[{}]"#,
                "{0: {'type': ['Missing data for required field.'], 'value': ['Missing data for required field.']}}",
            ),
            (
                r#"[{"type":"ip","value":"192.0.2.1"},{"type":"ip","value":""}]"#,
                "{1: {'value': ['Field may not be blank.']}}",
            ),
            (
                r#"[{"type":null,"value":5}]"#,
                "{0: {'type': ['Field may not be null.'], 'value': ['Not a valid string.']}}",
            ),
            (r#"[{"type":"ip","value":"x","type":{}}]"#, "{0: {'type': ['Not a valid string.']}}"),
            (
                r#"[{"extra":1,"type":"ip","value":"","extra":2}]"#,
                "{0: {'value': ['Field may not be blank.'], 'extra': ['Unknown field.']}}",
            ),
            (r#"[{"type":"ip","value":"x","it's":1}]"#, r#"{0: {"it's": ['Unknown field.']}}"#),
            (r#"[{"type":"ip","value":1e999}]"#, "{0: {'value': ['Not a valid string.']}}"),
        ] {
            assert_eq!(refusal(body), message, "{body}");
        }
    }

    #[test]
    fn field_names_are_printed_as_python_prints_them() {
        for (text, repr) in [
            ("a", "'a'"),
            ("", "''"),
            ("a'b", "\"a'b\""),
            ("a'b\"c", "'a\\'b\"c'"),
            ("a\n\t\0\\b", "'a\\n\\t\\x00\\\\b'"),
            ("😀\u{200b}\u{a0}", "'😀\\u200b\\xa0'"),
            ("ключ", "'ключ'"),
            ("\u{e0001}", "'\\U000e0001'"),
            ("\u{2028}\u{7f}", "'\\u2028\\x7f'"),
        ] {
            assert_eq!(python_repr(text), repr);
        }
    }

    #[test]
    fn a_thousand_observables_are_bearable_and_more_are_not() {
        let body =
            |count: usize| format!("[{}]", vec![r#"{"type":"ip","value":"192.0.2.1"}"#; count].join(","));
        assert_eq!(parse(body(1000).as_bytes()).unwrap().len(), 1);
        assert_eq!(refusal(&body(1001)), "{'_schema': ['Longer than maximum length 1000.']}");
        assert_eq!(refusal(&format!("{}x", body(1001))), "{'_schema': ['Invalid input type.']}");
        let keys: Vec<String> = (0..50_000).map(|i| format!("\"k{i}\":1")).collect();
        assert!(refusal(&format!("[{{{}}}]", keys.join(","))).len() < LONGEST_MESSAGE + 10);
    }

    proptest! {
        #[test]
        fn any_body_is_read_or_refused(body in "\\PC{0,80}|[\\[\\]{}\":,0-9a-z\\\\ ]{0,80}") {
            let _ = parse(body.as_bytes());
        }
    }
}
