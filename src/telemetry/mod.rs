//! Logs. It owns their form and level and what a panic leaves behind; it must not know what is
//! logged. Tokens, keys, hosts and observables never are: fields are named one by one.

mod json;

use std::{
    io::{self, Write},
    str::FromStr,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

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

/// The most bytes of log lines that wait to be written; beyond them lines are dropped.
const WAITING: usize = 1 << 20;
/// How long a line waits for others, so that a busy relay writes many at once.
const GATHER: Duration = Duration::from_millis(10);

/// Standard output, written by a thread of its own: no request waits for whoever reads the log, and one that
/// is not read at all costs its lines and nothing else.
#[derive(Clone, Default)]
struct Output(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Output {
    fn start() -> Self {
        let this = Self::default();
        let writing = this.clone();
        std::thread::spawn(move || {
            loop {
                {
                    let (lines, filled) = &*writing.0;
                    let lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
                    drop(filled.wait_while(lines, |lines| lines.is_empty()));
                }
                std::thread::sleep(GATHER);
                writing.write_out();
            }
        });
        this
    }

    /// Writes what waits.
    fn write_out(&self) {
        let mut out = io::stdout().lock();
        let lines = std::mem::take(&mut *self.0.0.lock().unwrap_or_else(PoisonError::into_inner));
        let _ = out.write_all(&lines).and_then(|()| out.flush());
    }
}

impl io::Write for Output {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let (lines, filled) = &*self.0;
        let mut lines = lines.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() + line.len() <= WAITING {
            if lines.is_empty() {
                filled.notify_one();
            }
            lines.extend_from_slice(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Changes what is logged while the process runs; a cheap clone.
#[derive(Clone, Default)]
pub struct LogLevel(Option<(reload::Handle<EnvFilter, Registry>, Output)>);

impl LogLevel {
    /// From now on logs what `level` says; `false` where nothing is logged at all.
    #[must_use]
    pub fn set(&self, level: &Level) -> bool {
        self.0.as_ref().is_some_and(|(handle, _)| handle.reload(EnvFilter::new(&level.0)).is_ok())
    }

    /// Writes the lines that wait to be written.
    pub fn write_out(&self) {
        if let Some((_, output)) = &self.0 {
            output.write_out();
        }
    }
}

/// Starts logging to standard output, and has panics logged by their place only: a panic's text
/// may quote what it stumbled over.
#[must_use]
pub fn init(config: &Config) -> LogLevel {
    let (filter, handle) = reload::Layer::new(EnvFilter::new(&config.level.0));
    let output = Output::start();
    let writer = {
        let output = output.clone();
        move || output.clone()
    };
    let registry = tracing_subscriber::registry().with(filter);
    match config.format {
        LogFormat::Json => {
            registry.with(fmt::layer().event_format(json::Json).with_writer(writer)).init();
        }
        LogFormat::Text => registry.with(fmt::layer().with_writer(writer)).init(),
    }
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        error!(place, "panic");
    }));
    LogLevel(Some((handle, output)))
}
