//! Logs. It owns their form and level and what a panic leaves behind; it must not know what is
//! logged. Tokens, keys, hosts and observables never are: fields are named one by one.

mod json;

use std::{
    io::{self, Write},
    str::FromStr,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tracing::error;
use tracing_subscriber::{
    EnvFilter, Registry, filter::LevelFilter, fmt, layer::SubscriberExt, reload, util::SubscriberInitExt,
};

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

/// The text is no level, or would leave the relay without a log by accident.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotALevel {
    /// A directive that is none.
    #[error("levels are error, warn, info, debug, trace and off; a directive for a part is <target>=<level>")]
    Directive,
    /// Nothing in it is about the relay.
    #[error(
        "nothing would be logged of the relay itself; begin with a level for everything: info,hyper=debug"
    )]
    Silent,
}

impl FromStr for Level {
    type Err = NotALevel;

    /// Stricter than the filter, which takes a word it does not know for the name of a target, and a target without a
    /// level for everything of it.
    fn from_str(text: &str) -> Result<Self, NotALevel> {
        let mut about_us = false;
        let mut directives = Vec::new();
        for directive in text.split(',').map(str::trim) {
            let (target, level) = match directive.split_once('=') {
                Some((target, level)) => (Some(target.trim()), level.trim()),
                None => (None, directive),
            };
            let named = !level.is_empty() && level.bytes().all(|byte| byte.is_ascii_alphabetic());
            let level: LevelFilter = level.parse().ok().filter(|_| named).ok_or(NotALevel::Directive)?;
            match target {
                None => {
                    about_us = true;
                    directives.push(level.to_string());
                }
                Some(target) => {
                    let plain = |c: char| c.is_ascii_alphanumeric() || "_:-.".contains(c);
                    if target.is_empty() || !target.chars().all(plain) {
                        return Err(NotALevel::Directive);
                    }
                    about_us |= target.starts_with(env!("CARGO_CRATE_NAME"));
                    directives.push(format!("{target}={level}"));
                }
            }
        }
        let text = directives.join(",");
        match EnvFilter::try_new(&text) {
            Ok(_) if about_us => Ok(Self(text)),
            Ok(_) => Err(NotALevel::Silent),
            Err(_) => Err(NotALevel::Directive),
        }
    }
}

/// The most bytes of log lines that wait to be written; beyond them lines are dropped.
const WAITING: usize = 1 << 20;
/// How long a line waits for others, so that a busy relay writes many at once.
const GATHER: Duration = Duration::from_millis(10);
/// How long the end of the process waits for its last lines.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Standard output, written by a thread of its own: no request waits for whoever reads the log, and one that
/// is not read at all costs its lines and nothing else.
#[derive(Clone, Default)]
struct Output(Arc<(Mutex<Waiting>, Condvar)>);

#[derive(Default)]
struct Waiting {
    lines: Vec<u8>,
    /// The thread is about to write some.
    writing: bool,
}

impl Output {
    fn start() -> Self {
        let this = Self::default();
        let writing = this.clone();
        std::thread::spawn(move || {
            loop {
                drop(writing.changed().wait_while(writing.waiting(), |waiting| waiting.lines.is_empty()));
                std::thread::sleep(GATHER);
                writing.write();
            }
        });
        this
    }

    /// Writes what waits. A disk that is full or a reader that is gone costs the lines.
    fn write(&self) {
        let lines = {
            let mut waiting = self.waiting();
            waiting.writing = true;
            std::mem::take(&mut waiting.lines)
        };
        let mut out = io::stdout().lock();
        let _ = out.write_all(&lines).and_then(|()| out.flush());
        self.waiting().writing = false;
        self.changed().notify_all();
    }

    /// Waits until everything is written, but not for ever: whoever reads the log may have stopped reading.
    fn drain(&self) {
        let unwritten = |waiting: &mut Waiting| waiting.writing || !waiting.lines.is_empty();
        drop(self.changed().wait_timeout_while(self.waiting(), LAST_LINES, unwritten));
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lines came, or were written.
    fn changed(&self) -> &Condvar {
        &self.0.1
    }
}

impl io::Write for Output {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut waiting = self.waiting();
        if waiting.lines.len() + line.len() <= WAITING {
            if waiting.lines.is_empty() {
                self.changed().notify_all();
            }
            waiting.lines.extend_from_slice(line);
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

    /// Waits until the lines that wait are written, at most a second.
    pub fn drain(&self) {
        if let Some((_, output)) = &self.0 {
            output.drain();
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

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_word_that_is_no_level_is_none_and_nobody_loses_the_log_by_a_slip() {
        for (text, filter) in [
            ("info", "info"),
            ("WARN", "warn"),
            ("off", "off"),
            ("info,hyper=debug", "info,hyper=debug"),
            (" info , cyberscan_relay::cache = trace ", "info,cyberscan_relay::cache=trace"),
            ("cyberscan_relay=debug", "cyberscan_relay=debug"),
        ] {
            assert_eq!(text.parse::<Level>(), Ok(Level(filter.to_owned())), "{text}");
        }
        for text in [
            "",
            " ",
            "warning",
            "fatal",
            "verbose",
            "inf",
            "3",
            "none",
            "info,",
            ",info",
            "info debug",
            "hyper=",
            "=info",
            "info,hyper",
            "hyper=warning",
            "[x]=info",
            "info;debug",
            "\"info\"",
            "info,hyper=4",
        ] {
            assert_eq!(text.parse::<Level>(), Err(NotALevel::Directive), "{text:?}");
        }
        assert_eq!("hyper=debug".parse::<Level>(), Err(NotALevel::Silent));
    }

    #[test]
    fn of_a_log_nobody_reads_a_megabyte_waits_and_no_more() {
        let mut output = Output::default();
        let line = [b'x'; 1_000];
        for _ in 0..3_000 {
            output.write_all(&line).unwrap();
        }
        let waiting = output.waiting().lines.len();
        assert!(waiting <= WAITING && waiting + line.len() > WAITING, "{waiting} bytes wait");
    }

    /// In a process of its own: what a panic says is the same for all threads of one.
    #[test]
    fn a_panic_is_logged_by_its_place_and_not_by_its_text() {
        const PANICS: &str = "RELAY_TEST_PANICS";
        const TEXT: &str = "key-4f1d90c2";
        if std::env::var_os(PANICS).is_some() {
            let level = init(&Config { format: LogFormat::Json, level: "info".parse().unwrap() });
            let ended = std::thread::spawn(|| panic!("stumbled over {TEXT}")).join();
            assert!(ended.is_err());
            level.drain();
            return;
        }
        let this = "telemetry::tests::a_panic_is_logged_by_its_place_and_not_by_its_text";
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", this, "--nocapture", "--test-threads=1"])
            .env(PANICS, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&[child.stdout, child.stderr].concat()).into_owned();
        assert!(child.status.success() && said.contains(file!()) && said.contains("panic"), "{said}");
        assert!(!said.contains(TEXT), "{said}");
    }
}
