//! `cyberscan-relay doctor`: tries, with the settings in force, what reading them cannot tell: names, certificates and
//! answers of all whom the relay calls, Redis, files, clocks, and whether the public URL leads back. It owns what is
//! tried side by side and for how long; it changes nothing but keys of its own in Redis, and shows no secret.
//!
//! Reading order: `finding` (what can be found), `report` (how it is shown), then what looks: `files`, `machine`,
//! `egress`, `public_url`, `redis`; `token` explains a token.

mod egress;
mod files;
mod finding;
mod machine;
mod public_url;
mod redis;
mod report;
mod token;

use std::{
    future::Future,
    io::{IsTerminal, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Args;
use futures_util::future::join_all;
use tokio::time::{Instant, timeout};
use url::Url;

pub use finding::{Check, Finding, Severity};
pub use report::Report;
pub use token::{TokenReport, explain as explain_token};

use crate::{
    auth::explain::CLOCKS_MAY_DIFFER,
    clock::Clock,
    settings::{self, Faults, Settings},
    tenant::ApiKey,
};
use egress::{Egress, Found, Skew};

/// How long one step may take: a name, a call, Redis.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long everything may take. What is examined side by side has ended long before.
const WHOLE: Duration = Duration::from_secs(20);
/// From here on a clock that is off is worth a line.
const SKEW: f64 = 30.0;
/// The most bytes of a file with a key or a token.
const FILE: u64 = 64 << 10;

/// What an examination needs beside the settings.
#[derive(Clone, Debug)]
pub struct Options {
    /// The file the settings were read from.
    pub config_file: Option<PathBuf>,
    /// The files that secrets were read from.
    pub secret_files: Vec<PathBuf>,
    /// The CyberScan host to try instead of those that are listed.
    pub host: Option<String>,
    /// A public URL to follow beside `auth.audiences`.
    pub url: Option<Url>,
    /// A tenant's key to try.
    pub api_key: Option<ApiKey>,
    /// How long one step may take.
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            config_file: None,
            secret_files: Vec::new(),
            host: None,
            url: None,
            api_key: None,
            patience: PATIENCE,
        }
    }
}

/// Examines everything, side by side.
pub async fn examine(settings: &Settings, options: &Options) -> Report {
    let (started, clock) = (Instant::now(), Clock::system());
    let patience = options.patience;
    let mut findings = vec![Finding::ok(Check::Configuration, "", "read without a fault")];
    let (config_file, secret_files) = (options.config_file.as_deref(), &options.secret_files);
    findings.extend(files::examine(settings, config_file, secret_files, clock));
    findings.extend(machine::limits(settings));
    let (calls, public, redis, listeners) = tokio::join!(
        within(Check::CyberScanConnection, Box::pin(calls(settings, options, clock))),
        within(Check::PublicConnection, Box::pin(public(settings, options, clock))),
        within(
            Check::RedisConnection,
            Box::pin(async {
                let findings = redis::examine(settings, patience, clock).await;
                Found { findings, skews: Vec::new() }
            })
        ),
        within(
            Check::Listen,
            Box::pin(async {
                let findings = machine::listeners(settings, patience).await;
                Found { findings, skews: Vec::new() }
            })
        ),
    );
    findings.push(clocks(&calls.skews));
    for found in [calls, public, redis, listeners] {
        findings.extend(found.findings);
    }
    Report::new(findings, started.elapsed())
}

/// Each step has its own time-out; should their sum be too long, that is a finding and not a doctor who hangs.
async fn within(check: Check, examination: impl Future<Output = Found>) -> Found {
    timeout(WHOLE, examination).await.unwrap_or_else(|_| {
        let state = format!("the examination did not end within {} s", WHOLE.as_secs());
        let finding =
            Finding::unknown(check, "", state, "try again; look whether this machine is overloaded");
        Found { findings: vec![finding], skews: Vec::new() }
    })
}

/// All calls out.
async fn calls(settings: &Settings, options: &Options, clock: Clock) -> Found {
    let (hosts, finding) = egress::hosts(settings, options);
    let mut found = Found { findings: vec![finding], skews: Vec::new() };
    let egress = match Egress::new(&settings.egress, options.patience, clock) {
        Ok(egress) => egress,
        Err(_) => {
            // The file itself is a finding of its own.
            let state = "not tried: TLS cannot be set up";
            found.findings.push(Finding::unknown(Check::CyberScanTls, "", state, "see ca-file"));
            return found;
        }
    };
    let one_host = hosts.len() == 1;
    let key = options.api_key.as_ref().filter(|_| one_host);
    if options.api_key.is_some() && !one_host {
        let state = "not tried: a key is for one host only";
        let advice = "say which: doctor --host HOST";
        found.findings.push(Finding::unknown(Check::CyberScanKey, "", state, advice));
    }
    let (proxy, of_hosts, of_issuers) = tokio::join!(
        egress.proxy(hosts.first()),
        join_all(hosts.iter().map(|host| egress::cyberscan(&egress, settings, host, key))),
        join_all(settings.auth.jwks_hosts.iter().map(|address| egress::issuer(&egress, address))),
    );
    found.findings.extend(proxy);
    for of in of_hosts.into_iter().chain(of_issuers) {
        found.findings.extend(of.findings);
        found.skews.extend(of.skews);
    }
    found
}

/// The way in.
async fn public(settings: &Settings, options: &Options, clock: Clock) -> Found {
    let (urls, findings) = public_url::audiences(settings, options.url.as_ref());
    let config = public_url::unguarded(&settings.egress);
    let each =
        urls.iter().map(|(host, prefix)| public_url::examine(&config, options.patience, clock, host, prefix));
    // What is asked beside the way itself must not take the time of what is asked on it.
    let brief = options.patience / 4;
    let before = machine::refusals(settings, brief).await;
    let mut found = Found { findings, skews: Vec::new() };
    for of in join_all(each).await {
        found.findings.extend(of.findings);
    }
    let arrive =
        |finding: &Finding| finding.check == Check::ProxyAuthorization && finding.severity == Severity::Ok;
    if let Some(before) = before.filter(|_| found.findings.iter().any(arrive)) {
        let here = public_url::arrives_here(settings, options.patience, clock, &urls, before);
        found.findings.extend(timeout(brief, here).await.ok());
    }
    found
}

/// This machine's clock against those of others: where most say the same, they are right.
fn clocks(skews: &[Skew]) -> Finding {
    let check = Check::Clock;
    let mut sorted: Vec<&Skew> = skews.iter().collect();
    sorted.sort_by(|one, other| one.seconds.total_cmp(&other.seconds));
    let Some(middle) = sorted.get(sorted.len() / 2) else {
        let state = "not known: no peer answered with a date";
        return Finding::unknown(check, "", state, "see the findings about CyberScan and the key issuers");
    };
    let ahead = middle.seconds;
    let direction = if ahead > 0.0 { "ahead of" } else { "behind" };
    let state = format!("{:.0} s {direction} that of {}", ahead.abs(), middle.of);
    let advice = "have this machine follow a time server (chrony, systemd-timesyncd)";
    if ahead.abs() > CLOCKS_MAY_DIFFER {
        Finding::bad(check, "", state + "; tokens with times are refused", advice)
    } else if ahead.abs() > SKEW {
        Finding::warn(check, "", state, advice)
    } else {
        Finding::ok(check, "", format!("agrees with that of {}", middle.of))
    }
}

/// The command line of `doctor`.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Report as JSON.
    #[arg(long)]
    json: bool,
    /// The CyberScan host to try, instead of those listed in cyberscan.hosts.
    #[arg(long)]
    host: Option<String>,
    /// A file with a tenant's API key, to see whether CyberScan accepts it.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// A public URL to follow, beside those in auth.audiences.
    #[arg(long)]
    url: Option<Url>,
    /// Explain the token in this file (- for standard input) instead.
    #[arg(long, value_name = "FILE")]
    token: Option<PathBuf>,
}

/// Examines, reports on standard output, and tells by the exit status: 0 fine, 1 something is bad, 2 could not tell.
#[must_use]
pub fn run(arguments: &Arguments, config_file: Option<&Path>) -> ExitCode {
    let environment = settings::environment();
    let colour = std::io::stdout().is_terminal()
        && !environment.iter().any(|(name, value)| name == "NO_COLOR" && !value.is_empty());
    let (text, status) = match outcome(arguments, config_file, environment) {
        Ok(Outcome::Examined(report)) if arguments.json => (as_line(&report.json()), report.exit_status()),
        Ok(Outcome::Examined(report)) => (report.text(colour), report.exit_status()),
        Ok(Outcome::Explained(report)) if arguments.json => (as_line(&report.json()), report.exit_status()),
        Ok(Outcome::Explained(report)) => (report.text(colour), report.exit_status()),
        Err(reason) => {
            let _ = writeln!(std::io::stderr(), "cyberscan-relay: {reason:#}");
            return ExitCode::from(2);
        }
    };
    // Whoever reads no further has read enough.
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
    ExitCode::from(status)
}

fn as_line(report: &serde_json::Value) -> String {
    format!("{report:#}\n")
}

enum Outcome {
    Examined(Report),
    Explained(TokenReport),
}

fn outcome(
    arguments: &Arguments,
    config_file: Option<&Path>,
    environment: Vec<(String, String)>,
) -> anyhow::Result<Outcome> {
    let secret_files = secret_files(&environment);
    let settings = match Settings::load(config_file, environment) {
        Ok(settings) => settings,
        Err(faults) => return Ok(Outcome::Examined(refused(&faults))),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let outcome = match &arguments.token {
        Some(file) => {
            let text = read(file)?;
            let explaining = token::explain(&settings, &text, arguments.url.as_ref(), PATIENCE);
            Outcome::Explained(runtime.block_on(async { timeout(WHOLE, explaining).await })??)
        }
        None => {
            let api_key = match &arguments.api_key_file {
                Some(file) => Some(ApiKey::new(read(file)?.trim().to_owned())),
                None => None,
            };
            let options = Options {
                config_file: config_file.map(Path::to_owned),
                secret_files,
                host: arguments.host.clone(),
                url: arguments.url.clone(),
                api_key,
                patience: PATIENCE,
            };
            Outcome::Examined(runtime.block_on(examine(&settings, &options)))
        }
    };
    // A resolver that hangs holds a thread; nobody waits for it.
    runtime.shutdown_background();
    Ok(outcome)
}

/// Settings that `serve` would refuse are all there is to say.
fn refused(faults: &Faults) -> Report {
    let finding = |fault: &settings::Fault| {
        let state = format!("{}: {}", fault.source, fault.message);
        let mut finding = Finding::bad(Check::Configuration, &fault.key, state, "correct it; see `check`");
        finding.about.clone_from(&fault.key);
        finding
    };
    Report::new(faults.0.iter().map(finding).collect(), Duration::ZERO)
}

/// The files that variables such as `RELAY_REDIS_URL_FILE` name.
fn secret_files(environment: &[(String, String)]) -> Vec<PathBuf> {
    let names_secret =
        |name: &str| name.starts_with("RELAY_") && name.ends_with("_FILE") && !name.ends_with("_CA_FILE");
    environment
        .iter()
        .filter(|(name, _)| names_secret(name))
        .map(|(_, value)| PathBuf::from(value.trim()))
        .collect()
}

fn read(file: &Path) -> anyhow::Result<String> {
    use anyhow::Context;
    let mut text = String::new();
    let what = || file.display().to_string();
    if file == Path::new("-") {
        std::io::stdin().take(FILE).read_to_string(&mut text).with_context(what)?;
    } else {
        std::fs::File::open(file)
            .with_context(what)?
            .take(FILE)
            .read_to_string(&mut text)
            .with_context(what)?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_clocks_disagree_the_majority_is_right() {
        let severity = |seconds: &[f64]| {
            let skews: Vec<Skew> =
                seconds.iter().map(|seconds| Skew { of: String::new(), seconds: *seconds }).collect();
            clocks(&skews).severity
        };
        assert_eq!(severity(&[]), Severity::Unknown);
        assert_eq!(severity(&[0.4]), Severity::Ok);
        assert_eq!(severity(&[0.1, 0.2, 9_999.0]), Severity::Ok);
        assert_eq!(severity(&[-60.0, -61.0, 0.0]), Severity::Warn);
        assert_eq!(severity(&[3_600.0, 3_601.0, 3_599.5]), Severity::Bad);
    }

    #[test]
    fn the_files_of_secrets_are_those_that_variables_name() {
        let environment = [
            ("RELAY_REDIS_URL_FILE", "/run/secrets/redis\n"),
            ("RELAY_EGRESS_EXTRA_CA_FILE", "/etc/ca.pem"),
            ("RELAY_LISTEN", "x"),
            ("LLVM_PROFILE_FILE", "y"),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(secret_files(&environment), [PathBuf::from("/run/secrets/redis")]);
    }
}
