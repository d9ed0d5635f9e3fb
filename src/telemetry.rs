//! Logs. It owns their form and level and what a panic leaves behind; it must not know what is
//! logged. Tokens, keys, hosts and observables never are: fields are named one by one.

use std::str::FromStr;

use tracing::error;
use tracing_subscriber::EnvFilter;

/// Settings `log.*`.
#[derive(Clone, Debug)]
pub struct Config {
    /// `log.format`
    pub format: LogFormat,
    /// `log.level`
    pub level: Level,
}

/// The form of a log line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// One JSON object per line, control characters escaped.
    Json,
    /// For people.
    Text,
}

impl FromStr for LogFormat {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "json" => Ok(Self::Json),
            "text" => Ok(Self::Text),
            _ => Err(()),
        }
    }
}

/// A level, or filter directives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Level(String);

impl FromStr for Level {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match EnvFilter::try_new(text) {
            Ok(_) => Ok(Self(text.to_owned())),
            Err(_) => Err(()),
        }
    }
}

/// Starts logging to standard output, and has panics logged by their place only: a panic's text
/// may quote what it stumbled over.
pub fn init(config: &Config) {
    let filter = EnvFilter::new(&config.level.0);
    let builder = tracing_subscriber::fmt().with_env_filter(filter);
    match config.format {
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(false).init(),
        LogFormat::Text => builder.init(),
    }
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        error!(place, "panic");
    }));
}
