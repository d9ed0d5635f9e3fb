//! The command line of cyberscan-relay.

use std::{
    ffi::OsString,
    io::Write,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use clap::{
    Args, CommandFactory, Parser, Subcommand,
    builder::{OsStringValueParser, TypedValueParser},
};
use cyberscan_relay::{
    app, demo, doctor,
    hardening::{self, Hardened},
    http::server,
    module_type, probe,
    reload::Reloads,
    settings,
    settings::{Fault, Settings, Source},
    telemetry::{self, LogLevel},
};
use http::Request;
use http_body_util::Full;
use secrecy::ExposeSecret;
use serde_json::json;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::Notify,
};
use tokio_util::sync::CancellationToken;

/// Entries of all sizes come and go side by side: glibc's allocator keeps so many holes between them that a full
/// cache took twice its size.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The relay between Cisco SecureX/XDR and CyberScan.
#[derive(Parser)]
#[command(version, about)]
struct CommandLine {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    configuration: Configuration,
}

#[derive(Args)]
struct Configuration {
    /// A TOML file laid over the defaults; the environment (RELAY_*) is laid over both.
    #[arg(long, env = "RELAY_CONFIG", global = true, value_parser = OsStringValueParser::new().map(file))]
    config: Option<PathBuf>,
}

/// A file's name without blanks and quotes around it, which env files leave there; empty, it is none.
fn file(name: OsString) -> PathBuf {
    let bare = name.to_str().map(|name| name.trim().trim_matches(['"', '\'']).to_owned());
    bare.map_or_else(|| name.clone().into(), PathBuf::from)
}

#[derive(Subcommand)]
enum Command {
    /// Serve (the default).
    Serve,
    /// Run relay, fake CyberScan and fake key issuer on this machine, and one investigation.
    Demo {
        /// End after the investigation instead of serving until Ctrl-C.
        #[arg(long)]
        once: bool,
        /// Where the relay listens; any free port if this one is taken.
        #[arg(long, default_value = "127.0.0.1:9090")]
        listen: SocketAddr,
    },
    /// Check the configuration and print the settings in force, without secrets.
    Check,
    /// Try what `check` cannot: names, certificates, answers, Redis, clocks, the public URL; or explain a token.
    Doctor(doctor::Arguments),
    /// Ask a relay running on this machine whether it serves; for containers.
    Healthcheck,
    /// Have a relay running on this machine, and all replicas, forget answers; needs `admin.token`.
    Purge(What),
    /// Print the module type by which SecureX/XDR learns of this relay, or register it.
    ModuleType(Box<module_type::Options>),
    /// Run the fake CyberScan and key issuer alone, for a relay elsewhere; for demonstrations.
    Sandbox {
        /// The address to listen on.
        #[arg(long, default_value = "127.0.0.1")]
        listen: IpAddr,
        /// The name clients reach it by; its certificates are for that name.
        #[arg(long, default_value = "localhost")]
        name: String,
        /// Where to put ca.pem and a caller's token.
        #[arg(long)]
        directory: PathBuf,
        /// For which relay the token is.
        #[arg(long, default_value = "http://relay:9090")]
        audience: String,
    },
    /// Print a completion script for a shell: bash, elvish, fish, powershell or zsh.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page (roff).
    Man,
    /// Ask a relay what analysts would ask, again and again; for demonstrations.
    Traffic {
        /// The relay.
        #[arg(long, default_value = "http://relay:9090")]
        relay: String,
        /// Where the sandbox has put the token.
        #[arg(long)]
        directory: PathBuf,
        /// Requests per second.
        #[arg(long, default_value_t = 20)]
        rate: u32,
    },
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct What {
    /// Everything.
    #[arg(long)]
    all: bool,
    /// All answers of a tenant, by its name in the access log: 32 hexadecimal digits.
    #[arg(long)]
    tenant: Option<String>,
    /// All answers about an address or a domain.
    #[arg(long)]
    observable: Option<String>,
}

fn main() -> ExitCode {
    // Before anything else: the environment may hold secrets already.
    let hardened = hardening::harden();
    let CommandLine { command, configuration } = CommandLine::parse();
    if let Some(Command::Doctor(arguments)) = &command {
        return doctor::run(arguments, configuration.config.as_deref());
    }
    match run(command.unwrap_or(Command::Serve), &configuration, &hardened) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "cyberscan-relay: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command, configuration: &Configuration, hardened: &Hardened) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let source = Source::new(configuration.config.clone(), settings::environment());
    let settings = || source.load();
    match command {
        Command::Serve => {
            let asked = Arc::<Notify>::default();
            let reloads = Reloads::new(source.clone(), Arc::clone(&asked));
            let mut settings = settings()?;
            let log = telemetry::init(&settings.log);
            hardened.tell();
            let connections = &mut settings.http.connections.max_connections;
            *connections = hardened.connections(*connections);
            let served = runtime.block_on(serve(settings, log.clone(), reloads, asked));
            log.drain();
            served
        }
        Command::Demo { once, listen } => runtime.block_on(async {
            let shutdown = shutdown_on_signals()?;
            demo::run(listen, once, shutdown).await
        }),
        Command::Check => runtime.block_on(async { check(settings()?) }),
        Command::Healthcheck => runtime.block_on(healthcheck(&settings()?)),
        // Its exit status says more than success: see `main`.
        Command::Doctor(_) => Ok(()),
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut CommandLine::command(),
                "cyberscan-relay",
                &mut std::io::stdout(),
            );
            Ok(())
        }
        Command::Man => Ok(clap_mangen::Man::new(CommandLine::command()).render(&mut std::io::stdout())?),
        Command::Purge(what) => runtime.block_on(purge(&settings()?, &what)),
        Command::ModuleType(options) => {
            runtime.block_on(module_type::run(&options, || Ok(settings()?.egress)))
        }
        Command::Sandbox { listen, name, directory, audience } => runtime.block_on(async {
            let shutdown = shutdown_on_signals()?;
            demo::sandbox(listen, name, &directory, &audience, shutdown).await
        }),
        Command::Traffic { relay, directory, rate } => runtime.block_on(async {
            let shutdown = shutdown_on_signals()?;
            shutdown.run_until_cancelled(demo::traffic(&relay, &directory, rate)).await.unwrap_or(Ok(()))
        }),
    }
}

async fn serve(
    settings: Settings,
    log: LogLevel,
    reloads: Reloads,
    asked: Arc<Notify>,
) -> anyhow::Result<()> {
    let shutdown = shutdown_on_signals()?;
    reload_on_signal(asked)?;
    let listen = |key: &str, address: SocketAddr| {
        server::listen(address).with_context(|| format!("{key}: cannot listen on {address}"))
    };
    let (public, admin) = (settings.listen, settings.admin_listen);
    let prepared = app::prepare(settings)?;
    let listener = listen("listen", public)?;
    let admin = match admin {
        Some(address) => Some((listen("admin.listen", address)?, log.clone())),
        None => None,
    };
    app::serve(prepared, listener, admin, Some(reloads.logging_by(log)), shutdown).await
}

async fn purge(settings: &Settings, what: &What) -> anyhow::Result<()> {
    let listen = settings.admin_listen.context("admin.listen is empty: there is no admin listener")?;
    let token = settings.admin.token.as_ref().context("admin.token is not set: nothing can be changed")?;
    let body = match what {
        What { tenant: Some(tenant), .. } => json!({"tenant": tenant}),
        What { observable: Some(observable), .. } => json!({"observable": observable}),
        What { .. } => json!({"all": true}),
    };
    let request = Request::post("/purge")
        .header("host", "localhost")
        .header("authorization", format!("Bearer {}", token.expose_secret()));
    let answer = probe::call(listen, request.body(Full::from(Bytes::from(body.to_string())))?).await?;
    let text = String::from_utf8_lossy(answer.body()).into_owned();
    ensure!(answer.status().is_success(), "status {}: {text}", answer.status());
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}

/// Everything `serve` does before it takes a port.
fn check(settings: Settings) -> anyhow::Result<()> {
    let (effective, warnings) = (settings.effective().to_vec(), settings.warnings().to_vec());
    app::prepare(settings)?;
    let mut out = std::io::stdout().lock();
    for key in effective {
        writeln!(out, "{} = {}  # {}", key.key, key.value, key.source)?;
    }
    let mut errors = std::io::stderr().lock();
    for Fault { key, source, message } in warnings {
        writeln!(errors, "cyberscan-relay: warning: {key} ({source}) {message}")?;
    }
    Ok(())
}

async fn healthcheck(settings: &Settings) -> anyhow::Result<()> {
    let request = Request::get("/watchdog").header("host", "localhost").header("health-check", "ok");
    let request = request.body(Full::default())?;
    let answer = match settings.http.tls {
        Some(_) => probe::call_tls(settings.listen, request).await?,
        None => probe::call(settings.listen, request).await?,
    };
    ensure!(answer.status().is_success(), "the relay answered with status {}", answer.status());
    Ok(())
}

/// Each SIGHUP asks for a reload; some in a row may ask for one.
fn reload_on_signal(asked: Arc<Notify>) -> anyhow::Result<()> {
    let mut hang_up = signal(SignalKind::hangup())?;
    #[expect(clippy::disallowed_methods, reason = "it waits for signals as long as the process lives")]
    tokio::spawn(async move {
        while hang_up.recv().await.is_some() {
            asked.notify_one();
        }
    });
    Ok(())
}

/// A token that the first SIGTERM or SIGINT cancels; the second ends the process at once.
fn shutdown_on_signals() -> anyhow::Result<CancellationToken> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let shutdown = CancellationToken::new();
    let cancel = shutdown.clone();
    #[expect(clippy::disallowed_methods, reason = "it waits for signals as long as the process lives")]
    tokio::spawn(async move {
        for _ in 0..2 {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if cancel.is_cancelled() {
                std::process::exit(130);
            }
            cancel.cancel();
        }
    });
    Ok(shutdown)
}
