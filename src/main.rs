//! The command line of cyberscan-relay.

use std::{io::Write, net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::{Context, ensure};
use clap::{Args, Parser, Subcommand};
use cyberscan_relay::{app, demo, probe, settings, settings::Settings, telemetry};
use http::Request;
use http_body_util::Full;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_util::sync::CancellationToken;

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
    #[arg(long, env = "RELAY_CONFIG", global = true)]
    config: Option<PathBuf>,
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
    /// Ask a relay running on this machine whether it serves; for containers.
    Healthcheck,
}

fn main() -> ExitCode {
    let CommandLine { command, configuration } = CommandLine::parse();
    match run(command.unwrap_or(Command::Serve), &configuration) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "cyberscan-relay: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command, configuration: &Configuration) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let settings = || Settings::load(configuration.config.as_deref(), settings::environment());
    match command {
        Command::Serve => {
            let settings = settings()?;
            telemetry::init(&settings.log);
            runtime.block_on(serve(settings))
        }
        Command::Demo { once, listen } => runtime.block_on(async {
            let shutdown = shutdown_on_signals()?;
            demo::run(listen, once, shutdown).await
        }),
        Command::Check => check(&settings()?),
        Command::Healthcheck => runtime.block_on(healthcheck(settings()?.listen)),
    }
}

async fn serve(settings: Settings) -> anyhow::Result<()> {
    let shutdown = shutdown_on_signals()?;
    let listener = TcpListener::bind(settings.listen)
        .await
        .with_context(|| format!("listen: cannot listen on {}", settings.listen))?;
    app::run(settings, listener, shutdown).await
}

fn check(settings: &Settings) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for key in settings.effective() {
        writeln!(out, "{} = {}  # {}", key.key, key.value, key.source)?;
    }
    Ok(())
}

async fn healthcheck(listen: SocketAddr) -> anyhow::Result<()> {
    let request = Request::get("/watchdog").header("host", "localhost").header("health-check", "ok");
    let answer = probe::call(listen, request.body(Full::default())?).await?;
    ensure!(answer.status().is_success(), "the relay answered with status {}", answer.status());
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
