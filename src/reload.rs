//! Settings that change while the relay serves. It owns when they are read again, that a faulty configuration is refused
//! whole, and that what has to wait for a restart is named; it must not know what a part does with its settings.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::Notify,
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    clock::Clock,
    metrics::{Metrics, Success},
    redis_pool,
    settings::{Fault, Faults, KEYS, Reload, Settings, Source},
    telemetry::LogLevel,
};

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(30);

/// What makes a relay read its settings again: whoever asks for it, or a file with other content.
pub struct Reloads {
    source: Source,
    /// The content of the files when they were read last.
    content: Vec<Option<Vec<u8>>>,
    asked: Arc<Notify>,
    look: Duration,
    log: LogLevel,
}

/// What a reload has changed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Changes {
    /// Keys whose new values are in force.
    live: Vec<&'static str>,
    /// Keys whose values differ from those the relay was started with, and which need a restart.
    restart: Vec<&'static str>,
}

impl Reloads {
    /// Reads from `source` again whenever `asked`, and when a file has changed. To be made before the settings are read
    /// for the first time, or a change in between is missed.
    #[must_use]
    pub fn new(source: Source, asked: Arc<Notify>) -> Self {
        Self { content: source.content(), source, asked, look: LOOK, log: LogLevel::default() }
    }

    /// Changes the level of `log`, too.
    #[must_use]
    pub fn logging_by(self, log: LogLevel) -> Self {
        Self { log, ..self }
    }

    /// Looks at the files every `look`.
    #[must_use]
    pub fn looking_every(self, look: Duration) -> Self {
        Self { look, ..self }
    }

    /// Reads the settings again until `shutdown`. What `check` refuses goes no further; `apply` gets the rest, and whether
    /// any of it is new. The relay was `started` with settings of its own.
    pub(crate) async fn follow(
        mut self,
        started: Settings,
        check: fn(Settings) -> Result<(), Faults>,
        apply: impl Fn(&Settings, bool),
        (metrics, clock): (Metrics, Clock),
        shutdown: CancellationToken,
    ) {
        let mut current = started.clone();
        let mut looks = interval(self.look);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let asked = tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.asked.notified() => true,
                _ = looks.tick() => false,
            };
            let source = self.source.clone();
            // The content first: what changes while the settings are read is found at the next look.
            let Ok(content) = tokio::task::spawn_blocking(move || source.content()).await else { continue };
            if !asked && content == self.content {
                continue;
            }
            self.content = content;
            let source = self.source.clone();
            let read = move || source.load().and_then(|new| check(new.clone()).map(|()| new));
            let Ok(read) = tokio::task::spawn_blocking(read).await else {
                refused(&metrics);
                error!("the configuration could not be read again; the one before stays in force");
                continue;
            };
            match read {
                Ok(new) => {
                    let changes = Changes::between(&started, &current, &new);
                    let new = attainable(&started, &current, new);
                    if changes.live.contains(&"log.level") {
                        // Otherwise a level set by hand stays.
                        let _ = self.log.set(&new.log.level);
                    }
                    apply(&new, !changes.live.is_empty());
                    changes.tell(&new);
                    current = new;
                    metrics.config_reloaded.set((), 1);
                    metrics.config_reloaded_at.set((), clock.unix());
                    metrics.config_reloads.inc((Success::Ok,));
                }
                Err(Faults(faults)) => {
                    refused(&metrics);
                    for Fault { key, source, message } in &faults {
                        error!(key, source, "the new configuration is refused: {message}");
                    }
                    error!(faults = faults.len(), "the configuration before stays in force, all of it");
                }
            }
        }
    }
}

fn refused(metrics: &Metrics) {
    metrics.config_reloaded.set((), 0);
    metrics.config_reloads.inc((Success::Failed,));
}

impl Changes {
    fn between(started: &Settings, current: &Settings, new: &Settings) -> Self {
        let mut changes = Self::default();
        let since_start: Vec<_> = new.changed(started).map(|key| key.name).collect();
        let since_last: Vec<_> = new.changed(current).map(|key| key.name).collect();
        for key in KEYS {
            let live = match key.reload {
                Reload::Live => true,
                Reload::Restart => false,
                Reload::Partly(_) if key.name.starts_with("redis.") => {
                    same_servers(started.redis.as_ref(), new.redis.as_ref())
                }
                Reload::Partly(_) => speak_the_same(started, new),
            };
            if live && since_last.contains(&key.name) {
                changes.live.push(key.name);
            } else if !live && since_start.contains(&key.name) {
                changes.restart.push(key.name);
            }
        }
        changes
    }

    fn tell(&self, new: &Settings) {
        for Fault { key, source, message } in new.warnings() {
            warn!(key, source, "the configuration looks odd: {key} {message}");
        }
        if !self.restart.is_empty() {
            let keys = self.restart.join(", ");
            warn!(keys, "needs a restart: these settings are not in force yet");
        }
        info!(changed = self.live.join(", "), "configuration reloaded");
    }
}

/// Of `new`, what can be in force without a restart.
fn attainable(started: &Settings, current: &Settings, mut new: Settings) -> Settings {
    new.redis = started.redis.clone().map(|at_start| {
        let now = current.redis.as_ref().unwrap_or(&at_start);
        let wanted = new.redis.as_ref();
        let urls = match wanted {
            Some(wanted) if same_servers(Some(&at_start), Some(wanted)) => &wanted.urls,
            _ => &now.urls,
        };
        let redis_pool::Config { timeout, login, sentinel_login, .. } = wanted.unwrap_or(now).clone();
        redis_pool::Config { urls: urls.clone(), timeout, login, sentinel_login, ..at_start }
    });
    if !speak_the_same(started, &new) {
        new.http.tls.clone_from(&current.http.tls);
    }
    new
}

/// Whether both speak HTTPS to callers, or neither.
fn speak_the_same(one: &Settings, other: &Settings) -> bool {
    one.http.tls.is_some() == other.http.tls.is_some()
}

/// Whether both lead to the same servers, whoever logs in there.
fn same_servers(one: Option<&redis_pool::Config>, other: Option<&redis_pool::Config>) -> bool {
    let servers = |config: Option<&redis_pool::Config>| {
        let urls = config.iter().flat_map(|config| &config.urls);
        urls.map(redis_pool::Url::without_login).collect::<Vec<_>>()
    };
    servers(one) == servers(other)
}
