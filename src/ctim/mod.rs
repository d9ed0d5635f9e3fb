//! The platform's vocabulary (CTIM 1.1.11): what comes in ([`observable`], [`address`]), what goes out
//! ([`sighting`], [`mod@reference`]) and the envelope around it ([`envelope`]). It must not know where
//! the data comes from.

pub mod address;
pub mod envelope;
pub mod observable;
pub mod reference;
pub mod sighting;

pub use address::is_private;
pub use envelope::{Envelope, ErrorCode, ErrorItem, Severity as ErrorSeverity};
pub use observable::{DomainName, Observable, Subject};
pub use reference::Reference;
pub use sighting::Sighting;

/// `text`, or as much of it as fits into `units` UTF-16 code units with an ellipsis at the end.
///
/// The platform counts as JavaScript and Java do; a surrogate pair is never cut in two.
#[must_use]
pub fn truncate(text: &str, units: usize) -> String {
    if text.encode_utf16().count() <= units {
        return text.to_owned();
    }
    let mut left = units.saturating_sub(1);
    let mut cut = String::new();
    for char in text.chars() {
        let Some(rest) = left.checked_sub(char.len_utf16()) else {
            break;
        };
        left = rest;
        cut.push(char);
    }
    cut.push('…');
    cut
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn long_texts_are_cut_with_an_ellipsis() {
        assert_eq!(truncate("abcdef", 6), "abcdef");
        assert_eq!(truncate("abcdefg", 6), "abcde…");
        assert_eq!(truncate("ab😀", 4), "ab😀");
        assert_eq!(truncate("ab😀c", 4), "ab…");
    }

    proptest! {
        #[test]
        fn a_cut_text_fits_and_begins_as_the_whole_did(text in "\\PC{0,40}", units in 1..50usize) {
            let cut = truncate(&text, units);
            prop_assert!(cut.encode_utf16().count() <= units);
            if cut != text {
                prop_assert!(cut.ends_with('…') && text.starts_with(cut.trim_end_matches('…')));
                prop_assert!(cut.encode_utf16().count() + 2 >= units);
            }
        }
    }
}
