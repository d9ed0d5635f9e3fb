//! How findings are shown: lines for people, JSON for machines, an exit status for scripts. It owns the form; it must
//! not know what was examined.

use std::time::Duration;

use serde_json::{Value, json};

use super::finding::{Finding, Severity};

/// The version of the JSON form; it grows when a member changes its meaning or goes.
const FORM: u32 = 1;

/// All findings of an examination.
#[derive(Clone, Debug)]
pub struct Report {
    /// In the order of [`Check::ALL`](super::Check::ALL).
    pub findings: Vec<Finding>,
    /// How long it took.
    pub took: Duration,
}

impl Report {
    pub(super) fn new(mut findings: Vec<Finding>, took: Duration) -> Self {
        findings.sort_by_key(|finding| finding.check as usize);
        Self { findings, took }
    }

    /// The worst finding.
    #[must_use]
    pub fn severity(&self) -> Severity {
        self.findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Ok)
    }

    /// 0: fine, though there may be warnings; 1: something is bad; 2: doctor could not tell.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self.severity() {
            Severity::Ok | Severity::Warn => 0,
            Severity::Bad => 1,
            Severity::Unknown => 2,
        }
    }

    /// For machines.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "form": FORM,
            "version": env!("CARGO_PKG_VERSION"),
            "severity": self.severity(),
            "exit_status": self.exit_status(),
            "seconds": self.took.as_secs_f64(),
            "findings": self.findings,
        })
    }

    /// For people, a line for each finding.
    #[must_use]
    pub fn text(&self, colour: bool) -> String {
        let mut text = String::new();
        for finding in &self.findings {
            let name = match finding.about.as_str() {
                "" => finding.check.id().to_owned(),
                about => format!("{} {about}", finding.check.id()),
            };
            text += &format!("{} {name}: {}", mark(finding.severity, colour), finding.state);
            if !finding.advice.is_empty() {
                text += &format!(" -> {}", finding.advice);
            }
            if !finding.advice.is_empty() && !finding.setting.is_empty() {
                text += &format!(" ({})", finding.setting);
            }
            text.push('\n');
        }
        let count = |severity| self.findings.iter().filter(|finding| finding.severity == severity).count();
        text += &format!(
            "{} ok, {} to look at, {} bad, {} unknown; {:.1} s\n",
            count(Severity::Ok),
            count(Severity::Warn),
            count(Severity::Bad),
            count(Severity::Unknown),
            self.took.as_secs_f64()
        );
        text
    }
}

/// A word in a column of its own, so that nothing is told by colour alone.
pub(super) fn mark(severity: Severity, colour: bool) -> String {
    let word = match severity {
        Severity::Ok => "ok  ",
        Severity::Warn => "warn",
        Severity::Bad => "BAD ",
        Severity::Unknown => "?   ",
    };
    let code = match severity {
        Severity::Ok => 32,
        Severity::Warn => 33,
        Severity::Bad => 31,
        Severity::Unknown => 35,
    };
    if colour { format!("\u{1b}[{code}m{word}\u{1b}[0m") } else { word.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::{super::Check, *};

    fn report(findings: Vec<Finding>) -> Report {
        Report::new(findings, Duration::from_millis(1500))
    }

    #[test]
    fn the_exit_status_is_that_of_the_worst_finding() {
        let ok = Finding::ok(Check::Clock, "", "good");
        let warn = Finding::warn(Check::Clock, "", "so so", "look");
        let unknown = Finding::unknown(Check::Clock, "", "no idea", "look");
        let bad = Finding::bad(Check::Clock, "", "no", "look");
        let status = |findings: &[&Finding]| {
            report(findings.iter().map(|finding| (*finding).clone()).collect()).exit_status()
        };
        assert_eq!(status(&[]), 0);
        assert_eq!(status(&[&ok, &warn]), 0);
        assert_eq!(status(&[&warn, &unknown, &ok]), 2);
        assert_eq!(status(&[&unknown, &bad, &ok]), 1);
    }

    #[test]
    fn a_finding_is_one_line_with_what_to_do_and_colour_only_when_asked_for() {
        let report = report(vec![
            Finding::bad(Check::RedisEviction, "redis.example:6379", "allkeys-lru", "set volatile-lfu"),
            Finding::ok(Check::Clock, "", "agrees"),
        ]);
        let text = report.text(false);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines,
            [
                "ok   clock: agrees",
                "BAD  redis-eviction redis.example:6379: allkeys-lru -> set volatile-lfu (redis.url)",
                "1 ok, 0 to look at, 1 bad, 0 unknown; 1.5 s"
            ]
        );
        assert!(!text.contains('\u{1b}') && report.text(true).contains("\u{1b}[31mBAD "));
        let json = report.json();
        assert_eq!(json["findings"][1]["id"], "redis-eviction");
        assert_eq!(json["exit_status"], 1);
    }
}
