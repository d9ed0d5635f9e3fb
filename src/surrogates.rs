//! JSON text with lone surrogates: half of a character that was cut in two, which JSON's grammar allows and Unicode
//! does not. It owns their replacement before a text is parsed; it must not know what the text says.

use std::borrow::Cow;

/// Length of an escape such as `\ud83d`.
const ESCAPE: usize = 6;

/// `json` with `\ufffd` (REPLACEMENT CHARACTER) in the place of every lone surrogate (RFC 8259 §8.2 leaves them to
/// the reader). serde_json refuses a text that has one, whichever member it stands in.
#[must_use]
pub fn replaced(json: &str) -> Cow<'_, str> {
    let mut repaired = String::new();
    let (mut copied, mut from) = (0, 0);
    while let Some(found) = memchr::memchr(b'\\', json.as_bytes().get(from..).unwrap_or_default()) {
        let at = from + found;
        match code_unit(json, at) {
            Some(0xd800..=0xdbff) if matches!(code_unit(json, at + ESCAPE), Some(0xdc00..=0xdfff)) => {
                from = at + 2 * ESCAPE;
            }
            Some(0xd800..=0xdfff) => {
                repaired.push_str(json.get(copied..at).unwrap_or_default());
                repaired.push_str("\\ufffd");
                (copied, from) = (at + ESCAPE, at + ESCAPE);
            }
            // Whatever is escaped, it is no beginning of another escape.
            _ => from = at + 2,
        }
    }
    if copied == 0 {
        return Cow::Borrowed(json);
    }
    repaired.push_str(json.get(copied..).unwrap_or_default());
    Cow::Owned(repaired)
}

/// The UTF-16 code unit that is escaped at `at`, if one is.
fn code_unit(json: &str, at: usize) -> Option<u16> {
    let digits = json.get(at..at + ESCAPE)?.strip_prefix("\\u")?;
    // `from_str_radix` would take a sign.
    digits.bytes().all(|byte| byte.is_ascii_hexdigit()).then(|| u16::from_str_radix(digits, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(json: &str) -> String {
        serde_json::from_str(&replaced(json)).unwrap()
    }

    #[test]
    fn only_lone_surrogates_are_replaced() {
        for (json, text) in [
            (r#""a\ud83d""#, "a\u{fffd}"),
            (r#""\ud83d b""#, "\u{fffd} b"),
            (r#""\uDE00b""#, "\u{fffd}b"),
            (r#""\ud83d\ud83d\ude00""#, "\u{fffd}😀"),
            (r#""\ude00\ud83d""#, "\u{fffd}\u{fffd}"),
            (r#""\ud83d\u0041""#, "\u{fffd}A"),
            (r#""\ud83d\n""#, "\u{fffd}\n"),
            (r#""\ud83d\\ude00""#, "\u{fffd}\\ude00"),
        ] {
            assert_eq!(read(json), text, "{json}");
        }
        for json in [r#""\ud83d\ude00""#, r#""\\ud83d""#, r#""é😀""#, r#""\u12""#, r#""\u+d80""#, "\"\\", ""]
        {
            assert!(matches!(replaced(json), Cow::Borrowed(same) if same == json), "{json}");
        }
    }

    proptest! {
        #[test]
        fn every_string_of_escapes_can_be_read_and_whole_ones_are_left_alone(
            units in proptest::collection::vec(prop_oneof![any::<u16>(), 0xd7f0..0xe010u16], 0..12)
        ) {
            let json = format!("\"{}\"", units.iter().map(|unit| format!("\\u{unit:04x}")).collect::<String>());
            prop_assert_eq!(read(&json), String::from_utf16_lossy(&units));
        }

        #[test]
        fn any_text_is_left_alone_or_repaired(json in "(\\\\u?[dD]?[89a-f0-9]{0,4}|[\"\\\\a-z😀]){0,12}") {
            let once = replaced(&json).into_owned();
            prop_assert_eq!(replaced(&once), once.as_str());
        }
    }
}
