//! `doctor`: each fault it can find is brought about, against real servers, and found; where all is well it says so.

use std::{os::unix::fs::PermissionsExt, path::Path, process::Stdio, sync::Arc, time::Duration};

use cyberscan_relay::{
    doctor::{self, Check, Finding, Options, Report, Severity},
    sandbox::Sandbox,
    settings::Settings,
};
use serde_json::Value;
use tokio::process::Command;

use crate::{fleet::RelayProcess, harness::sandbox_settings};

mod egress;
mod front;
mod machine;
mod output;
mod public_url;
mod redis;
mod token;

/// A sandbox, and the certificates a relay there believes.
struct World {
    sandbox: Arc<Sandbox>,
    ca: tempfile::NamedTempFile,
}

impl World {
    async fn start() -> Self {
        let sandbox = Sandbox::start(cyberscan_relay::sandbox::Options::default()).await.unwrap();
        let ca = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(ca.path(), &sandbox.ca_pem).unwrap();
        Self { sandbox: Arc::new(sandbox), ca }
    }

    /// Has relays believe this authority, too.
    fn believe(&self, pem: &str) {
        std::fs::write(self.ca.path(), format!("{}{pem}", self.sandbox.ca_pem)).unwrap();
    }

    /// What leads a relay to the sandbox, with `changes`.
    fn environment(&self, changes: &[(&str, &str)]) -> Vec<(String, String)> {
        let own = sandbox_settings(&self.sandbox, self.ca.path().to_str().unwrap());
        let ports = [("RELAY_LISTEN", "127.0.0.1:0"), ("RELAY_ADMIN_LISTEN", "127.0.0.1:0")];
        let ports = ports.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let mut all: Vec<(String, String)> = own.into_iter().chain(ports).collect();
        all.retain(|(name, _)| !changes.iter().any(|(changed, _)| changed == name));
        all.extend(changes.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        all
    }

    fn settings(&self, changes: &[(&str, &str)]) -> Settings {
        Settings::load(None, self.environment(changes)).unwrap()
    }

    /// What only looks odd may be a finding, or refused already when the settings are read; it is reported either way.
    async fn reports(
        &self,
        changes: &[(&str, &str)],
        key: &str,
        (check, severity, words): (Check, Severity, &str),
    ) {
        match Settings::load(None, self.environment(changes)) {
            Ok(settings) => {
                let report = doctor::examine(&settings, &impatient()).await;
                found(&report, check, severity, words);
            }
            Err(faults) => assert!(faults.0.iter().any(|fault| fault.key == key), "{key}: {faults}"),
        }
    }

    async fn examine(&self, changes: &[(&str, &str)]) -> Report {
        self.examine_with(changes, impatient()).await
    }

    async fn examine_with(&self, changes: &[(&str, &str)], options: Options) -> Report {
        doctor::examine(&self.settings(changes), &options).await
    }

    /// The binary, as an operator calls it.
    async fn doctor(&self, arguments: &[&str], changes: &[(&str, &str)]) -> Said {
        let mut command = RelayProcess::command();
        command.args(["doctor"]).args(arguments).env_remove("RELAY_LISTEN").env_remove("RELAY_ADMIN_LISTEN");
        command.envs(self.environment(changes));
        said(command).await
    }
}

/// What the binary said.
#[derive(Debug)]
struct Said {
    status: i32,
    out: String,
    err: String,
}

impl Said {
    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

async fn said(mut command: Command) -> Said {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = tokio::time::timeout(Duration::from_secs(60), command.output()).await.unwrap().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Said { status: output.status.code().unwrap(), out: text(&output.stdout), err: text(&output.stderr) }
}

/// Time enough for a busy machine, and not more than a test wants to wait for who never answers.
fn impatient() -> Options {
    Options { patience: Duration::from_secs(3), ..Options::default() }
}

fn all(report: &Report, check: Check) -> Vec<&Finding> {
    report.findings.iter().filter(|finding| finding.check == check).collect()
}

/// The one finding of `check`, which has to be as bad as `severity` and to say `words`.
#[track_caller]
fn found<'a>(report: &'a Report, check: Check, severity: Severity, words: &str) -> &'a Finding {
    let text = report.text(false);
    let matching: Vec<&Finding> =
        all(report, check).into_iter().filter(|finding| finding.severity == severity).collect();
    let [finding] = matching[..] else {
        panic!("{} findings {check:?} {severity:?} in\n{text}", matching.len())
    };
    assert!(finding.state.contains(words), "{words:?} is not in {finding:?}");
    assert_eq!(finding.advice.is_empty(), severity == Severity::Ok, "{finding:?}");
    finding
}

#[track_caller]
fn bad<'a>(report: &'a Report, check: Check, words: &str) -> &'a Finding {
    found(report, check, Severity::Bad, words)
}

#[track_caller]
fn warned<'a>(report: &'a Report, check: Check, words: &str) -> &'a Finding {
    found(report, check, Severity::Warn, words)
}

fn set_mode(file: &Path, mode: u32) {
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(mode)).unwrap();
}

#[test]
fn every_finding_has_a_test_that_brings_it_about() {
    let tests = [
        include_str!("egress.rs"),
        include_str!("machine.rs"),
        include_str!("output.rs"),
        include_str!("public_url.rs"),
        include_str!("redis.rs"),
        include_str!("../../../src/doctor/files.rs"),
    ]
    .concat();
    // That there is no Redis is nothing bad.
    for check in Check::ALL.iter().filter(|check| **check != Check::RedisUrl) {
        let name = format!("Check::{check:?}");
        let tested = tests
            .match_indices(&name)
            .any(|(at, _)| !tests[at + name.len()..].starts_with(char::is_alphanumeric));
        assert!(tested, "no test for {}", check.id());
    }
}
