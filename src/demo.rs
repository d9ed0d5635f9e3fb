//! `cyberscan-relay demo`: the first day of a relay, between a fake SecureX/XDR and a fake CyberScan, on this machine, with
//! no account. It goes the production way (TLS, allow-lists, egress guard, settings, registration); it must not shortcut
//! any of it.

use std::{
    fs::OpenOptions,
    io::{self, IsTerminal, Write},
    net::{IpAddr, SocketAddr},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use http::{Request, header};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, lookup_host},
    sync::Semaphore,
    time::{Instant, sleep},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    app,
    chance::chance,
    doctor,
    egress::{self, Http},
    module_type::{self, Action, Client, ModuleType, Platform},
    probe,
    sandbox::{self, Call, Rule, Sandbox},
    settings::Settings,
    telemetry::LogLevel,
    tenant::ApiKey,
};

/// Where the status page is, if nothing else is there.
const ADMIN_PORT: u16 = 9091;
/// An address whose look-up fails.
const FAILING: &str = "203.0.113.99";
/// Where the fakes are.
const PRIVATE: &str = "127.0.0.0/8,::1/128";
/// How long the fake CyberScan takes for an answer.
const LATENCY: Duration = Duration::from_millis(120);

/// Runs the demo until `shutdown`, or with `once` until its investigation is shown.
///
/// # Errors
/// When nothing can be listened on, or the relay does not answer.
pub async fn run(listen: SocketAddr, once: bool, shutdown: CancellationToken) -> anyhow::Result<()> {
    let sandbox = Sandbox::start(sandbox::Options::default()).await?;
    sandbox.cyberscan.latency(LATENCY);
    sandbox.cyberscan.script(Rule::on(Call::Vulnerabilities).value(FAILING).answer(503));
    let files = Files::write(&sandbox)?;
    let listener = bind(listen).await?;
    let admin = bind(SocketAddr::new(listen.ip(), ADMIN_PORT)).await?;
    let (address, status) = (listener.local_addr()?, admin.local_addr()?);
    // The public URL, and so the audience of the tokens: doctor follows it.
    let url = format!("https://localhost:{}", address.port());
    let settings = Settings::load(None, settings(&sandbox, &files, &url, [address, status]))?;
    let examined = settings.clone();

    let stop = shutdown.child_token();
    let _stop_on_return = stop.clone().drop_guard();
    let mut relay = Box::pin(app::run(settings, listener, Some((admin, LogLevel::default())), stop.clone()));
    let story = async {
        say(&format!(
            "The relay serves on {url}, between a fake SecureX/XDR and a fake CyberScan.\n\
             Its status page is http://{status}/\n"
        ))?;
        examine(&examined, &sandbox).await?;
        let token = connect(&sandbox, &files, &url, &examined.egress).await?;
        show_endpoints(&url, &files, &token)?;
        investigate(&sandbox, address, &token).await?;
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

/// Runs the fake CyberScan (port 8443) and the fake platform (port 8444) alone until `shutdown`. It leaves in `directory`:
/// their root certificate (`ca.pem`), a token for a relay at `audience` (`token`), the platform's API client (`client-id`,
/// `client-password`), and a certificate for a relay that is reached by `name` (`relay.crt`, `relay.key`).
///
/// # Errors
/// When a port is taken or the directory cannot be written.
pub async fn sandbox(
    listen: IpAddr,
    name: String,
    directory: &Path,
    audience: &str,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let options = sandbox::Options { listen, name, cyberscan_port: 8443, issuer_port: 8444 };
    let sandbox = Sandbox::start(options).await?;
    sandbox.cyberscan.latency(LATENCY);
    sandbox.cyberscan.script(Rule::on(Call::Vulnerabilities).value(FAILING).answer(503));
    std::fs::create_dir_all(directory)
        .with_context(|| format!("cannot make the directory {}", directory.display()))?;
    let (certificate, key) = sandbox.certificate()?;
    for (file, content, mode) in [
        ("ca.pem", sandbox.ca_pem.as_str(), 0o644),
        ("token", &sandbox.token(audience), 0o644),
        ("client-id", sandbox::CLIENT_ID, 0o644),
        ("client-password", sandbox::CLIENT_PASSWORD, 0o644),
        ("relay.crt", &certificate, 0o644),
        // Last: whoever waits for it finds the others as well.
        ("relay.key", &key, 0o600),
    ] {
        write(&directory.join(file), content, mode).with_context(|| format!("cannot write {file}"))?;
    }
    let (cyberscan, platform) = (sandbox.cyberscan.host(), sandbox.platform.host());
    say(&format!(
        "A fake CyberScan at {cyberscan} and a fake SecureX/XDR, with its key issuer, at {platform}.\n\
         Certificates, a token and the platform's API client are in {}.\n",
        directory.display()
    ))?;
    while shutdown.run_until_cancelled(sleep(Duration::from_secs(60))).await.is_some() {
        // It records every call, for tests; here nobody looks at them.
        sandbox.cyberscan.reset_counts();
    }
    sandbox.stop().await;
    Ok(())
}

/// Asks the relay at `relay` (`http://host:port`) `rate` times a second what analysts would: mostly about one
/// observable out of a few popular and many rare ones, now and then about 25; the token is in `directory`.
///
/// # Errors
/// When `relay` is no such URL or the token cannot be read.
pub async fn traffic(relay: &str, directory: &Path, rate: u32) -> anyhow::Result<()> {
    let token = std::fs::read_to_string(directory.join("token")).context("cannot read the token")?;
    let authority =
        relay.trim_end_matches('/').strip_prefix("http://").context("expected http://host:port")?;
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / rate.max(1));
    let under_way = Arc::new(Semaphore::new(256));
    let tasks = TaskTracker::new();
    for number in 0_u64.. {
        ticks.tick().await;
        let Ok(place) = Arc::clone(&under_way).try_acquire_owned() else { continue };
        let count = if number % 20 == 19 { 25 } else { 1 };
        let observables: Vec<Value> = (0..count).map(|_| popular()).collect();
        let path = if number % 10 == 9 { "/refer/observables" } else { "/observe/observables" };
        let request = Request::post(path)
            .header(header::HOST, authority)
            .header(header::AUTHORIZATION, format!("Bearer {}", token.trim()))
            .body(Full::from(Bytes::from(Value::from(observables).to_string())))?;
        let authority = authority.to_owned();
        tasks.spawn(async move {
            let _place = place;
            // Whether the relay answers is what its own dashboards show.
            if let Ok(Some(address)) = lookup_host(authority).await.map(|mut found| found.next()) {
                let _ = probe::call(address, request).await;
            }
        });
    }
    Ok(())
}

/// An observable: the first few are asked about often, the others ever less.
fn popular() -> Value {
    let rank = (3_000_f64.powf(chance()) - 1.0) as u32;
    match rank {
        0 => json!({"type": "ip", "value": "203.0.113.10"}),
        1 => json!({"type": "ip", "value": "203.0.113.25"}),
        2 => json!({"type": "ip", "value": FAILING}),
        rank if rank % 3 == 0 => json!({"type": "domain", "value": format!("n{rank}.load.example")}),
        rank => json!({"type": "ip", "value": format!("198.18.{}.{}", rank >> 8 & 255, rank & 255)}),
    }
}

/// A listener there, or at another port if that one is taken.
async fn bind(wanted: SocketAddr) -> anyhow::Result<TcpListener> {
    match TcpListener::bind(wanted).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind((wanted.ip(), 0)).await.context("cannot listen"),
    }
}

/// What an operator would set to use this CyberScan and this key issuer, with a certificate of the fakes' authority.
fn settings(
    sandbox: &Sandbox,
    files: &Files,
    url: &str,
    [listen, admin]: [SocketAddr; 2],
) -> Vec<(String, String)> {
    [
        ("RELAY_LISTEN", listen.to_string()),
        ("RELAY_ADMIN_LISTEN", admin.to_string()),
        ("RELAY_SERVER_TLS_CERTIFICATE", files.path("relay.crt")),
        ("RELAY_SERVER_TLS_KEY", files.path("relay.key")),
        ("RELAY_AUTH_AUDIENCES", url.to_owned()),
        ("RELAY_AUTH_JWKS_HOSTS", sandbox.issuer.host()),
        ("RELAY_CYBERSCAN_HOSTS", sandbox.cyberscan.host()),
        ("RELAY_EGRESS_ALLOW_CIDRS", PRIVATE.to_owned()),
        ("RELAY_EGRESS_EXTRA_CA_FILE", files.path("ca.pem")),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// What doctor says about this relay.
async fn examine(settings: &Settings, sandbox: &Sandbox) -> anyhow::Result<()> {
    say("\n1. Is everything as it should be? cyberscan-relay doctor tries it:\n\n")?;
    let options = doctor::Options {
        host: Some(sandbox.cyberscan.host()),
        api_key: Some(ApiKey::new(sandbox::API_KEY.to_owned())),
        ..doctor::Options::default()
    };
    let report = doctor::examine(settings, &options).await;
    say(&report.text(io::stdout().is_terminal()))
}

/// Registers the relay at the platform and fills in its form, as an administrator does; the answer is the token that the
/// platform sends from then on.
async fn connect(
    sandbox: &Sandbox,
    files: &Files,
    url: &str,
    egress: &egress::Config,
) -> anyhow::Result<String> {
    let platform = sandbox.platform.host();
    say(&format!(
        "\n2. Its module type is registered at the platform, for the API client {} with the password {}. By hand:\n\n\
         RELAY_EGRESS_EXTRA_CA_FILE={} RELAY_EGRESS_ALLOW_CIDRS={PRIVATE} \\\n\
         cyberscan-relay module-type --register --platform-host {platform} --url {url}\n\n",
        sandbox::CLIENT_ID,
        sandbox::CLIENT_PASSWORD,
        files.path("ca.pem")
    ))?;
    let (http, host) = (Http::new(egress)?, platform.parse()?);
    let client = Client::new(sandbox::CLIENT_ID, &sandbox::CLIENT_PASSWORD.into())?;
    let module_type = ModuleType { url: url.parse()?, audience: None, jwks_host: platform };
    let at_platform = Platform { http: &http, host: &host, client: &client };
    let registered = at_platform.register(&Action::Create, &module_type).await?;
    say(&module_type::outcome(&host, &Action::Create, &registered))?;
    say(&format!(
        "\n3. An administrator fills in its form:\n\nAPI Key         {}\nCyberScan Host  {}\n\n",
        sandbox::API_KEY,
        sandbox.cyberscan.host()
    ))?;
    let instance = sandbox.platform.create_instance(&json!({
        "name": "CyberScan",
        "module_type_id": registered.id,
        "visibility": "org",
        "settings": {"custom_api_key": sandbox::API_KEY, "custom_host": sandbox.cyberscan.host()},
    }));
    let instance = instance.map_err(|faults| anyhow::anyhow!("the platform refuses the form: {faults}"))?;
    sandbox.platform.token(&instance).map_err(anyhow::Error::msg)
}

fn show_endpoints(url: &str, files: &Files, token: &str) -> anyhow::Result<()> {
    let curl = format!("curl --cacert {}", files.path("ca.pem"));
    say(&format!(
        "The platform signs this token with it, and sends it along with each question:\n\nTOKEN={token}\n\n\
         Try each endpoint:\n\n\
         {curl} -X POST {url}/health -H \"Authorization: Bearer $TOKEN\"\n\
         {curl} -X POST {url}/observe/observables -H \"Authorization: Bearer $TOKEN\" -d '[{{\"type\":\"ip\",\"value\":\"203.0.113.10\"}}]'\n\
         {curl} -X POST {url}/refer/observables -H \"Authorization: Bearer $TOKEN\" -d '[{{\"type\":\"domain\",\"value\":\"shop.example\"}}]'\n\
         {curl} -X POST {url}/version\n\
         {curl} {url}/watchdog -H 'Health-Check: ping'\n\
         {curl} {url}/\n"
    ))
}

/// Asks the same twice, and shows what the relay's memory saves.
async fn investigate(sandbox: &Sandbox, address: SocketAddr, token: &str) -> anyhow::Result<()> {
    let observables = json!([
        {"type": "ip", "value": "203.0.113.10"},
        {"type": "domain", "value": "mail.example"},
        {"type": "sha256", "value": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
        {"type": "ip", "value": FAILING},
    ]);
    say(
        "\n4. An investigation: an address, a domain, a file hash (not answered), an address whose look-up fails.\n\n",
    )?;
    let first = ask(sandbox, address, token, &observables).await?;
    say(&table(&first.answer))?;
    say("\n5. The same again, from memory:\n\n")?;
    let again = ask(sandbox, address, token, &observables).await?;
    say(&format!("       {:>9}  {:>9}  {:>18}\n", "SIGHTINGS", "TIME", "CALLS TO CYBERSCAN"))?;
    for (name, asked) in [("first", &first), ("again", &again)] {
        let milliseconds = format!("{:.1} ms", asked.took.as_secs_f64() * 1000.0);
        say(&format!(
            "{name}  {:>9}  {milliseconds:>9}  {:>18}\n",
            sightings(&asked.answer).count(),
            asked.calls
        ))?;
    }
    Ok(())
}

/// What the relay answers, how long that takes, and how often CyberScan is called for it.
struct Asked {
    answer: Value,
    took: Duration,
    calls: usize,
}

async fn ask(
    sandbox: &Sandbox,
    address: SocketAddr,
    token: &str,
    observables: &Value,
) -> anyhow::Result<Asked> {
    let request = Request::post("/observe/observables")
        .header(header::HOST, address.to_string())
        .header(header::AUTHORIZATION, format!("Bearer {token}"))
        .body(Full::from(Bytes::from(observables.to_string())))?;
    let (before, start) = (sandbox.cyberscan.calls().len(), Instant::now());
    let answer = probe::call_tls(address, request).await?;
    let (took, calls) = (start.elapsed(), sandbox.cyberscan.calls().len() - before);
    let answer = serde_json::from_slice(answer.body()).context("the relay's answer is no JSON")?;
    Ok(Asked { answer, took, calls })
}

fn sightings(answer: &Value) -> impl Iterator<Item = &Value> {
    answer.pointer("/data/sightings/docs").and_then(Value::as_array).into_iter().flatten()
}

/// The sightings and errors of an answer, for a person.
fn table(answer: &Value) -> String {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or("-").to_owned();
    let mut rows = vec![["SEVERITY", "CONFIDENCE", "OBSERVABLE", "CVE", "TITLE"].map(String::from)];
    rows.extend(sightings(answer).map(|doc| {
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
    for error in answer.get("errors").and_then(Value::as_array).into_iter().flatten() {
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

/// A file with `content`, whole or not there, and of `mode` from its first byte on.
fn write(path: &Path, content: &str, mode: u32) -> io::Result<()> {
    let beside = path.with_extension("new");
    match std::fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
    file.write_all(content.as_bytes())?;
    std::fs::rename(beside, path)
}

/// The sandbox's root certificate, and the relay's own with its key, in files for as long as the demo runs.
struct Files(PathBuf);

impl Files {
    fn write(sandbox: &Sandbox) -> io::Result<Self> {
        let directory = std::env::temp_dir().join(format!("cyberscan-relay-demo-{}", uuid::Uuid::now_v7()));
        std::fs::DirBuilder::new().mode(0o700).create(&directory)?;
        let files = Self(directory);
        let (certificate, key) = sandbox.certificate()?;
        for (name, content) in [("ca.pem", &sandbox.ca_pem), ("relay.crt", &certificate), ("relay.key", &key)]
        {
            write(&files.0.join(name), content, 0o600)?;
        }
        Ok(files)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).display().to_string()
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
