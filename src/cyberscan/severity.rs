//! How bad a finding is, from the word and the CVSS score CyberScan gives. It owns the table of words and the bands of
//! scores; it must not know where in a record they stand.
//!
//! | words | severity | source |
//! |---|---|---|
//! | critical, high, medium, low, info, none | the same | CTIM 1.1.11; CVSS v3.1 §5 |
//! | information, informational | Info | Nessus, Burp |
//! | important, moderate | High, Medium, unless there is a score; likewise the next four rows | Red Hat and Microsoft severity ratings |
//! | severe, serious, urgent, minimal | High, High, Critical, Low | Nexpose; Qualys levels 3, 5, 1 |
//! | hole, warning, note (also "security hole", …) | High, Medium, Low | OpenVAS and Nessus report classes before CVSS |
//! | negligible, unimportant | Low, Info | Debian and Ubuntu security trackers |
//! | false positive | None | Greenbone (severity −1): somebody judged that it is no finding |
//! | log, debug, error (also "log message", …) | Info, unless a score grades them | Greenbone (0, −2, −3): messages of the scan |
//! | alarm | by the score | Greenbone: every result above 0 is one |
//! | a number from 0 to 10 | by its band | Greenbone's `severity` is a CVSS score |
//!
//! Case, blanks and punctuation of a word do not matter.

use crate::ctim::sighting::Severity;

/// The severity that `word` and `cvss` come to; Unknown only where neither grades the finding.
pub(super) fn graded(word: Option<&str>, cvss: Option<f64>) -> Severity {
    let band = cvss.and_then(score);
    match word.map(meaning) {
        Some(Meaning::Grade(severity)) => severity,
        Some(Meaning::Synonym(severity)) => band.unwrap_or(severity),
        Some(Meaning::Message) => band.filter(|band| *band > Severity::Info).unwrap_or(Severity::Info),
        Some(Meaning::Unsaid) | None => band.unwrap_or(Severity::Unknown),
    }
}

/// What a word says about how bad a finding is.
enum Meaning {
    Grade(Severity),
    /// As other scanners have it; a score says more.
    Synonym(Severity),
    /// It is no finding, but a message of the scan.
    Message,
    /// Nothing that this table knows.
    Unsaid,
}

fn meaning(word: &str) -> Meaning {
    let letters: String = word.chars().filter(|c| c.is_alphabetic()).flat_map(char::to_lowercase).collect();
    Meaning::Grade(match letters.trim_start_matches("security") {
        "critical" => Severity::Critical,
        "high" => Severity::High,
        "medium" => Severity::Medium,
        "low" => Severity::Low,
        "info" | "information" | "informational" => Severity::Info,
        "none" => Severity::None,
        "urgent" => return Meaning::Synonym(Severity::Critical),
        "important" | "severe" | "serious" | "hole" => return Meaning::Synonym(Severity::High),
        "moderate" | "warning" => return Meaning::Synonym(Severity::Medium),
        "minimal" | "negligible" | "note" => return Meaning::Synonym(Severity::Low),
        "unimportant" => return Meaning::Synonym(Severity::Info),
        "falsepositive" => return Meaning::Synonym(Severity::None),
        "log" | "logmessage" | "debug" | "debugmessage" | "error" | "errormessage" => {
            return Meaning::Message;
        }
        "" => match number(word) {
            Some(-1.0) => Severity::None,
            Some(-2.0 | -3.0) => return Meaning::Message,
            Some(score) => match band(score) {
                Some(severity) => severity,
                None => return Meaning::Unsaid,
            },
            None => return Meaning::Unsaid,
        },
        _ => return Meaning::Unsaid,
    })
}

/// The band of what stands where a score should: one above 10 is no score, but nothing that may be overlooked either.
fn score(cvss: f64) -> Option<Severity> {
    if cvss > 10.0 { Some(Severity::Critical) } else { band(cvss) }
}

/// The qualitative band of a CVSS score (CVSS v3.1 §5); what is below 0 or above 10 is no score.
fn band(score: f64) -> Option<Severity> {
    match score {
        0.0 => Some(Severity::None),
        0.0..4.0 => Some(Severity::Low),
        4.0..7.0 => Some(Severity::Medium),
        7.0..9.0 => Some(Severity::High),
        9.0..=10.0 => Some(Severity::Critical),
        _ => None,
    }
}

/// The number that `text` is or begins with: `30`, `30%`, `9.8/10`, `7,5`, `9.8 (v3)`.
pub(super) fn number(text: &str) -> Option<f64> {
    let text = text.trim();
    if let Ok(number) = text.parse::<f64>() {
        return number.is_finite().then_some(number);
    }
    let end = text.find(|c: char| !(c.is_ascii_digit() || ".,+-".contains(c))).unwrap_or(text.len());
    let (digits, rest) = text.split_at_checked(end)?;
    let unit = !rest.starts_with(char::is_alphanumeric);
    let number: f64 = digits.trim_end_matches([',', '.']).replace(',', ".").parse().ok()?;
    (unit && number.is_finite()).then_some(number)
}

/// The number in `text`, also where something stands before it or another follows: `QoD: 30%`, `~30`, `30-50`, `9.8,7.5`.
/// A number that is part of something else (`CVSS:3.1/AV:N`, `v2`) is none.
pub(super) fn number_in(text: &str) -> Option<f64> {
    number(text).or_else(|| {
        let text = text.trim();
        let digit = |c: char| c.is_ascii_digit() || c == '.';
        let begin = text.find(|c: char| c.is_ascii_digit())?;
        let (before, rest) = text.split_at_checked(begin)?;
        let (run, after) = rest.split_at_checked(rest.find(|c| !digit(c)).unwrap_or(rest.len()))?;
        let alone = before.chars().next_back().is_none_or(|c| c.is_whitespace() || "~(<>=≈≥≤".contains(c));
        let goes_on = after.chars().next().is_some_and(|c| c.is_alphanumeric() || c == '/');
        let another = after.contains(|c: char| c.is_ascii_digit());
        // Of several the first counts, if the text begins with it.
        if !alone || goes_on || (another && !before.is_empty()) {
            return None;
        }
        run.trim_end_matches('.').parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_found_among_words_and_before_others() {
        for (text, value) in [
            ("QoD: 30%", Some(30.0)),
            ("~30%", Some(30.0)),
            ("30+", Some(30.0)),
            ("30-50", Some(30.0)),
            ("9.8,7.5", Some(9.8)),
            ("CVSS 9.8", Some(9.8)),
            ("score (7.5)", Some(7.5)),
            ("7,5", Some(7.5)),
            ("CVSS:3.1/AV:N/AC:L", None),
            ("v2", None),
            ("30 of 50 in 7", Some(30.0)),
            ("between 30 and 50", None),
            ("1.2.3", None),
            ("0x1f", None),
            ("30days", None),
            ("high", None),
        ] {
            assert_eq!(number_in(text), value, "{text}");
        }
    }

    #[test]
    fn words_are_graded_by_the_table_whatever_their_spelling() {
        for (word, severity) in [
            ("Critical", Severity::Critical),
            ("HIGH", Severity::High),
            (" medium ", Severity::Medium),
            ("Low", Severity::Low),
            ("Informational", Severity::Info),
            ("Info.", Severity::Info),
            ("None", Severity::None),
            ("Moderate", Severity::Medium),
            ("Important", Severity::High),
            ("Severe", Severity::High),
            ("Security Hole", Severity::High),
            ("Log", Severity::Info),
            ("LOG_MESSAGE", Severity::Info),
            ("Debug", Severity::Info),
            ("False Positive", Severity::None),
            ("false-positive", Severity::None),
            ("High (7.5)", Severity::High),
            ("9.8", Severity::Critical),
            ("7,5", Severity::High),
            ("-1.0", Severity::None),
            ("-2.0", Severity::Info),
            ("0", Severity::None),
        ] {
            assert_eq!(graded(Some(word), None), severity, "{word}");
        }
        for word in ["", "Unknown", "Alarm", "Grün", "95", "-4", "?", "высокий"] {
            assert_eq!(graded(Some(word), None), Severity::Unknown, "{word}");
            assert_eq!(graded(Some(word), Some(9.8)), Severity::Critical, "{word}");
        }
    }

    #[test]
    fn a_word_counts_before_the_score_and_a_score_where_no_word_grades() {
        assert_eq!(graded(Some("Low"), Some(9.8)), Severity::Low);
        // What the contract has no word for is graded by the score, if there is one.
        assert_eq!(graded(Some("False Positive"), Some(9.8)), Severity::Critical);
        assert_eq!(graded(Some("Moderate"), Some(9.8)), Severity::Critical);
        assert_eq!(graded(Some("Informational"), Some(9.8)), Severity::Info);
        assert_eq!(graded(Some("Log"), Some(0.0)), Severity::Info);
        assert_eq!(graded(Some("Log"), Some(9.8)), Severity::Critical, "no message of a scan has a score");
        for (score, severity) in [
            (0.0, Severity::None),
            (-0.0, Severity::None),
            (0.05, Severity::Low),
            (0.1, Severity::Low),
            (3.95, Severity::Low),
            (4.0, Severity::Medium),
            (6.9, Severity::Medium),
            (7.0, Severity::High),
            (8.9, Severity::High),
            (9.0, Severity::Critical),
            (10.0, Severity::Critical),
            (10.1, Severity::Critical),
            (98.0, Severity::Critical),
            (-1.0, Severity::Unknown),
        ] {
            assert_eq!(graded(None, Some(score)), severity, "{score}");
        }
    }

    #[test]
    fn a_number_in_a_text_is_that_number() {
        for (text, value) in [
            ("30", Some(30.0)),
            (" 30 %\n", Some(30.0)),
            ("30%", Some(30.0)),
            ("7.50", Some(7.5)),
            ("7,5", Some(7.5)),
            ("9.8/10", Some(9.8)),
            ("9.8 (v3)", Some(9.8)),
            ("30.", Some(30.0)),
            ("1e1", Some(10.0)),
            ("-1.0", Some(-1.0)),
            ("", None),
            ("%", None),
            ("high", None),
            ("inf", None),
            ("NaN", None),
            ("1e999", None),
            ("0x1f", None),
            ("30days", None),
            ("1.2.3", None),
            ("..", None),
        ] {
            assert_eq!(number(text), value, "{text:?}");
        }
    }
}
