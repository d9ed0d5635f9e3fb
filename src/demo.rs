//! `cyberscan-relay demo`: the relay between a fake CyberScan and a fake key issuer, on this
//! machine, with no account. It goes the production way (TLS, allow-lists, egress guard, settings);
//! it must not shortcut any of it.

use std::{
    io::{self, Write},
    net::SocketAddr,
    path::PathBuf,
};

use anyhow::Context;
use bytes::Bytes;
use http::{Request, header};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::{
    app, probe,
    sandbox::{self, Call, Rule, Sandbox},
    settings::Settings,
};

/// The audience of the demo's tokens.
const AUDIENCE: &str = "https://relay.demo";
/// An address whose look-up fails.
const FAILING: &str = "203.0.113.99";

/// Runs the demo until `shutdown`, or with `once` until its investigation is shown.
///
/// # Errors
/// When nothing can be listened on, or the relay does not answer.
pub async fn run(listen: SocketAddr, once: bool, shutdown: CancellationToken) -> anyhow::Result<()> {
    let sandbox = Sandbox::start(sandbox::Options::default()).await?;
    sandbox.cyberscan.script(Rule::on(Call::Vulnerabilities).value(FAILING).answer(503));
    let certificate = CertificateFile::write(&sandbox.ca_pem)?;
    let listener = match TcpListener::bind(listen).await {
        Ok(listener) => listener,
        Err(_) => TcpListener::bind((listen.ip(), 0)).await.context("cannot listen")?,
    };
    let address = listener.local_addr()?;
    let settings = Settings::load(None, settings(&sandbox, &certificate))?;

    let stop = shutdown.child_token();
    let _stop_on_return = stop.clone().drop_guard();
    let mut relay = std::pin::pin!(app::run(settings, listener, stop.clone()));
    let story = async {
        show(&sandbox, address).await?;
        if once {
            stop.cancel();
        } else {
            say("\nThe relay goes on serving until Ctrl-C.\n")?;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        ended = &mut relay => return ended,
        told = story => told?,
    }
    relay.await
}

/// What an operator would set to use this CyberScan and this key issuer.
fn settings(sandbox: &Sandbox, certificate: &CertificateFile) -> Vec<(String, String)> {
    [
        ("RELAY_AUTH_AUDIENCES", AUDIENCE.to_owned()),
        ("RELAY_AUTH_JWKS_HOSTS", sandbox.issuer.host()),
        ("RELAY_CYBERSCAN_HOSTS", sandbox.cyberscan.host()),
        ("RELAY_EGRESS_ALLOW_CIDRS", "127.0.0.0/8,::1/128".to_owned()),
        ("RELAY_EGRESS_EXTRA_CA_FILE", certificate.0.display().to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

async fn show(sandbox: &Sandbox, address: SocketAddr) -> anyhow::Result<()> {
    let token = sandbox.token(AUDIENCE);
    let observables = json!([
        {"type": "ip", "value": "203.0.113.10"},
        {"type": "domain", "value": "mail.example"},
        {"type": "sha256", "value": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"type": "ip", "value": FAILING},
    ]);
    say(&format!(
        "The relay serves on http://{address}, with a fake CyberScan and a fake key issuer behind it.\n\n\
         A token, as SecureX would send it:\n\nTOKEN={token}\n\nTry each endpoint:\n\n\
         curl -X POST http://{address}/health -H \"Authorization: Bearer $TOKEN\"\n\
         curl -X POST http://{address}/observe/observables -H \"Authorization: Bearer $TOKEN\" -d '[{{\"type\":\"ip\",\"value\":\"203.0.113.10\"}}]'\n\
         curl -X POST http://{address}/refer/observables -H \"Authorization: Bearer $TOKEN\" -d '[{{\"type\":\"domain\",\"value\":\"shop.example\"}}]'\n\
         curl -X POST http://{address}/version\n\
         curl http://{address}/watchdog -H 'Health-Check: ping'\n\
         curl http://{address}/\n\n\
         An investigation: an address, a domain, a file hash (not answered), an address whose look-up fails.\n\n"
    ))?;
    let request = Request::post("/observe/observables")
        .header(header::HOST, address.to_string())
        .header(header::AUTHORIZATION, format!("Bearer {token}"))
        .body(Full::from(Bytes::from(observables.to_string())))?;
    let answer = probe::call(address, request).await?;
    let answer: Value = serde_json::from_slice(answer.body()).context("the relay's answer is no JSON")?;
    say(&table(&answer))
}

/// The sightings and errors of an answer, for a person.
fn table(answer: &Value) -> String {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or("-").to_owned();
    let all = |pointer: &str| answer.pointer(pointer).and_then(Value::as_array).into_iter().flatten();
    let mut rows = vec![["SEVERITY", "CONFIDENCE", "OBSERVABLE", "CVE", "TITLE"].map(String::from)];
    rows.extend(all("/data/sightings/docs").map(|doc| {
        ["/severity", "/confidence", "/observables/0/value", "/external_ids/0", "/title"]
            .map(|pointer| text(doc.pointer(pointer)))
    }));
    let mut widths = [0; 5];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut shown = String::new();
    for row in &rows {
        let cells: Vec<String> =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        shown += cells.join("  ").trim_end();
        shown.push('\n');
    }
    shown += &format!("\n{} sightings\n", rows.len() - 1);
    for error in all("/errors") {
        let [severity, code, message] = ["type", "code", "message"].map(|key| text(error.get(key)));
        shown += &format!("{severity}: {code}: {message}\n");
    }
    shown
}

fn say(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// The sandbox's root certificate in a file, as long as the demo runs.
struct CertificateFile(PathBuf);

impl CertificateFile {
    fn write(pem: &str) -> io::Result<Self> {
        let path = std::env::temp_dir().join(format!("cyberscan-relay-demo-{}.pem", uuid::Uuid::now_v7()));
        std::fs::write(&path, pem)?;
        Ok(Self(path))
    }
}

impl Drop for CertificateFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
