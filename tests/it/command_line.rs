//! The binary: its commands, signals and exit codes.

use std::{process::Stdio, time::Duration};

use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

fn relay() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cyberscan-relay"));
    command.env_clear().kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

async fn output(mut command: Command) -> (bool, String, String) {
    let output = tokio::time::timeout(Duration::from_secs(60), command.output()).await.unwrap().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

#[tokio::test]
async fn the_demo_shows_the_first_day_and_ends_when_told_to() {
    let mut command = relay();
    command.args(["demo", "--once", "--listen", "127.0.0.1:0"]);
    let (success, shown, errors) = output(command).await;
    assert!(success, "{errors}");
    for words in [
        " ok, 0 to look at, 0 bad, 0 unknown",
        "module-type --register",
        "Registered at localhost:",
        "CyberScan Host  localhost:",
        "TOKEN=ey",
        "curl --cacert",
        "203.0.113.10",
        "mail.example",
        "CVE-2021-42013",
        "14 sightings",
        "service unavailable",
    ] {
        assert!(shown.contains(words), "{words} is missing:\n{shown}");
    }
    // Sightings, time, its unit, calls.
    let row = |name: &str| {
        let row = shown.lines().find(|line| line.starts_with(name)).unwrap();
        row.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<String>>()
    };
    let (first, again) = (row("first "), row("again "));
    let time = |row: &[String]| row[1].parse::<f64>().unwrap();
    assert_eq!([&first[0], &again[0], &again[3]], ["14", "14", "0"], "{shown}");
    assert!(time(&again) < time(&first) && first[3] != "0", "{shown}");
}

#[tokio::test]
async fn check_prints_the_settings_in_force_or_all_faults() {
    let mut command = relay();
    command.arg("check").env("RELAY_REQUEST_DEADLINE", "7s");
    let (success, shown, _) = output(command).await;
    assert!(
        success && shown.contains("request.deadline = 7s  # environment variable RELAY_REQUEST_DEADLINE"),
        "{shown}"
    );

    let mut command = relay();
    command
        .arg("check")
        .env("RELAY_REQUEST_DEADLINE", "soon")
        .env("RELAY_CTIM_TLP", "purple")
        .env("RELAY_NONSENSE", "1");
    let (success, _, errors) = output(command).await;
    assert!(!success);
    for words in ["request.deadline", "ctim.tlp", "RELAY_NONSENSE", "3 fault(s)"] {
        assert!(errors.contains(words), "{words} is missing:\n{errors}");
    }
}

#[cfg(not(feature = "otel"))]
#[tokio::test]
async fn a_relay_without_traces_does_not_take_a_collector() {
    let mut command = relay();
    command.arg("check").env("RELAY_TELEMETRY_OTLP_ENDPOINT", "http://127.0.0.1:4318");
    let (success, _, errors) = output(command).await;
    let told = "telemetry.otlp_endpoint (environment variable RELAY_TELEMETRY_OTLP_ENDPOINT): this relay was built \
                without the feature `otel`";
    assert!(!success && errors.contains(told), "{errors}");
}

/// A serving relay and where it listens.
async fn serving() -> (Child, String) {
    let mut child =
        relay().env("RELAY_LISTEN", "127.0.0.1:0").env("RELAY_ADMIN_LISTEN", "127.0.0.1:0").spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let address = loop {
        let line =
            tokio::time::timeout(Duration::from_secs(20), lines.next_line()).await.unwrap().unwrap().unwrap();
        let line: serde_json::Value = serde_json::from_str(&line).expect("every log line is JSON");
        if let Some(address) = line["listen"].as_str() {
            break address.to_owned();
        }
    };
    (child, address)
}

async fn signal(child: &Child, name: &str) {
    let pid = child.id().unwrap().to_string();
    assert!(Command::new("kill").args([name, &pid]).status().await.unwrap().success());
}

#[tokio::test]
async fn sigterm_ends_an_idle_relay_with_success_and_healthcheck_tells_the_difference() {
    let (mut child, address) = serving().await;
    let mut healthcheck = relay();
    healthcheck.arg("healthcheck").env("RELAY_LISTEN", &address);
    assert!(output(healthcheck).await.0);
    signal(&child, "-TERM").await;
    let status = tokio::time::timeout(Duration::from_secs(10), child.wait()).await.unwrap().unwrap();
    assert!(status.success());
    let mut healthcheck = relay();
    healthcheck.arg("healthcheck").env("RELAY_LISTEN", &address);
    assert!(!output(healthcheck).await.0);
}

#[tokio::test]
async fn a_port_that_is_taken_is_told() {
    let (_child, address) = serving().await;
    let mut second = relay();
    second.env("RELAY_LISTEN", &address);
    let (success, _, errors) = output(second).await;
    assert!(!success && errors.contains(&address), "{errors}");
}
