//! The CVE field of a finding: the well-formed identifiers in it, and what it calls the finding. It must not know the
//! rest of the finding.
//!
//! Source: the CVE record format, `CVE-<year>-<four or more digits>`.

/// Words that stand where there is no CVE, without case and punctuation.
const NOTHING: [&str; 15] = [
    "NOCVE",
    "NA",
    "NONE",
    "NULL",
    "NIL",
    "NAN",
    "NO",
    "UNKNOWN",
    "UNDEFINED",
    "UNASSIGNED",
    "PENDING",
    "TBD",
    "EMPTY",
    "FALSE",
    "TRUE",
];

/// The CVE identifiers in `text`, upper-cased, each once: `text` may have several, or be a list.
pub(super) fn ids(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for id in words(text).filter_map(|word| well_formed(&word)) {
        if !found.contains(&id) {
            found.push(id);
        }
    }
    found
}

/// What the field calls the finding: its identifiers, else a word of another scheme. `None` where the field says that
/// there is no CVE, has one that is not finished, or is prose: there the finding's name says more.
pub(super) fn label(text: &str, ids: &[String]) -> Option<String> {
    if !ids.is_empty() {
        let plain = !text.starts_with(['[', '{']) && words(text).all(|word| well_formed(&word).is_some());
        return Some(if plain { text.to_owned() } else { ids.join(", ") });
    }
    // A list or an object without one has nothing a finding could be called by.
    let structured = text.starts_with(['[', '{']);
    let nothing = text.split([',', ';', '|']).all(|part| names_nothing(part.trim()));
    (!structured && !nothing && !names_nothing(text)).then(|| text.to_owned())
}

/// The words of `text`, with a plain hyphen for every typographic one.
fn words(text: &str) -> impl Iterator<Item = String> {
    let word = |word: &str| word.replace(is_hyphen, "-").trim_matches('-').to_owned();
    text.split(|c: char| !(c.is_alphanumeric() || is_hyphen(c))).map(word).filter(|word| !word.is_empty())
}

fn is_hyphen(c: char) -> bool {
    matches!(c, '-' | '\u{2010}'..='\u{2015}' | '\u{2212}')
}

fn well_formed(word: &str) -> Option<String> {
    let id = word.to_ascii_uppercase();
    let (year, number) = id.strip_prefix("CVE-")?.split_once('-')?;
    let digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    (year.len() == 4 && digits(year) && (4..=19).contains(&number.len()) && digits(number)).then_some(id)
}

fn names_nothing(text: &str) -> bool {
    let word = text.to_ascii_uppercase();
    let plain: String = word.chars().filter(|c| c.is_alphanumeric()).collect();
    if plain.chars().all(|c| c == '0')
        || NOTHING.contains(&plain.as_str())
        || text.contains(char::is_whitespace)
    {
        return true;
    }
    // Begun and not finished: `CVE`, `CVE-PENDING`, `CVE-2020-XXXX`.
    plain.strip_prefix("CVE").is_some_and(|rest| {
        rest.bytes().all(|byte| byte.is_ascii_alphabetic())
            || rest.get(..4).is_some_and(|year| year.bytes().all(|byte| byte.is_ascii_digit()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_well_formed_id_is_found_once_whatever_stands_around_it() {
        for (text, found) in [
            ("CVE-2020-0001", vec!["CVE-2020-0001"]),
            ("cve-2016-2183, CVE-2013-2566;CVE-2016-2183", vec!["CVE-2016-2183", "CVE-2013-2566"]),
            (r#"["CVE-2020-0001","CVE-2020-0002"]"#, vec!["CVE-2020-0001", "CVE-2020-0002"]),
            (r#"{"id":"CVE-2021-44228"}"#, vec!["CVE-2021-44228"]),
            ("see CVE-2021-44228.", vec!["CVE-2021-44228"]),
            ("CVE\u{2011}2021\u{2013}44228", vec!["CVE-2021-44228"]),
            ("NOCVE", vec![]),
            (
                "CVE-1-2 CVE-20-1234 CVE-2020-123 CVE-2020-1234-5 CVE-2020-12a4 XCVE-2020-1234 CVE-٢٠٢٠-1234",
                vec![],
            ),
            ("CVE-2020-12345678901234567890", vec![]),
        ] {
            assert_eq!(ids(text), found, "{text}");
        }
    }

    #[test]
    fn a_field_that_says_there_is_no_cve_names_nothing() {
        let label = |text: &str| label(text, &ids(text));
        for text in [
            "NOCVE",
            "nocve",
            "N/A",
            "n.a.",
            "none",
            "-",
            "--",
            "?",
            "null",
            "0",
            "CVE",
            "CVE-",
            "CVE-PENDING",
            "CVE-2020",
            "CVE-2020-XXXX",
            "CVE-2020-123",
            "No CVE assigned",
            "see the advisory",
            "False",
        ] {
            assert_eq!(label(text), None, "{text}");
        }
        for (text, said) in [
            ("CVE-2020-0001", "CVE-2020-0001"),
            ("CVE-2020-0001,CVE-2020-0002", "CVE-2020-0001,CVE-2020-0002"),
            (r#"["CVE-2020-0001","CVE-2020-0002"]"#, "CVE-2020-0001, CVE-2020-0002"),
            ("NOCVE CVE-2020-0001", "CVE-2020-0001"),
            ("GHSA-jfh8-c2jp-5v3q", "GHSA-jfh8-c2jp-5v3q"),
            ("CVE-1", "CVE-1"),
        ] {
            assert_eq!(label(text).as_deref(), Some(said), "{text}");
        }
    }
}
