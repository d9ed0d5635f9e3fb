//! Logs. It owns their form and level and what a panic leaves behind; it must not know what is
//! logged. Tokens, keys, hosts and observables never are: fields are named one by one.

use std::str::FromStr;

use tracing::error;
use tracing_subscriber::{EnvFilter, Registry, fmt, layer::SubscriberExt, reload, util::SubscriberInitExt};

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
        // The filter takes what says nothing for "log nothing".
        let says_something = |directive: &str| {
            let directive = directive.trim();
            !directive.is_empty() && !directive.contains(char::is_whitespace) && !directive.ends_with('=')
        };
        match EnvFilter::try_new(text) {
            Ok(_) if text.split(',').all(says_something) => Ok(Self(text.to_owned())),
            _ => Err(()),
        }
    }
}

/// Changes what is logged while the process runs; a cheap clone.
#[derive(Clone, Default)]
pub struct LogLevel(Option<reload::Handle<EnvFilter, Registry>>);

impl LogLevel {
    /// From now on logs what `level` says; `false` where nothing is logged at all.
    #[must_use]
    pub fn set(&self, level: &Level) -> bool {
        self.0.as_ref().is_some_and(|handle| handle.reload(EnvFilter::new(&level.0)).is_ok())
    }
}

/// Starts logging to standard output, and has panics logged by their place only: a panic's text
/// may quote what it stumbled over.
#[must_use]
pub fn init(config: &Config) -> LogLevel {
    let (filter, handle) = reload::Layer::new(EnvFilter::new(&config.level.0));
    let registry = tracing_subscriber::registry().with(filter);
    match config.format {
        LogFormat::Json => {
            registry.with(fmt::layer().json().flatten_event(true).with_current_span(false)).init();
        }
        LogFormat::Text => registry.with(fmt::layer()).init(),
    }
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        error!(place, "panic");
    }));
    LogLevel(Some(handle))
}
