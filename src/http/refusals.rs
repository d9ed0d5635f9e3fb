//! What is refused before any route sees it. It owns the counting by reason and the log line a minute that
//! comes of it; it must not know what clients sent: nothing of that is ever told.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tracing::warn;

use crate::metrics::{Handshake, Label, Listener, Metrics, Refused};

/// The shortest time between two log lines with the same reason.
const PAUSE: Duration = Duration::from_mins(1);

/// The refusals of one listener; a cheap clone.
#[derive(Clone)]
pub(super) struct Refusals(Arc<Shared>);

struct Shared {
    listener: Listener,
    metrics: Metrics,
    /// By [`Refused::index`].
    unlogged: Vec<Mutex<Unlogged>>,
}

/// What the log does not know yet about one reason.
#[derive(Clone, Copy, Default)]
struct Unlogged {
    count: u64,
    /// The last one's peer.
    peer: Option<SocketAddr>,
    logged: Option<Instant>,
}

impl Refusals {
    pub(super) fn new(listener: Listener, metrics: Metrics) -> Self {
        let unlogged = Refused::ALL.iter().map(|_| Mutex::default()).collect();
        Self(Arc::new(Shared { listener, metrics, unlogged }))
    }

    /// One more. It is logged at once, unless there was a line about that reason within the last minute.
    pub(super) fn note(&self, reason: Refused, peer: SocketAddr) {
        self.0.metrics.refused.inc((self.0.listener, reason));
        self.update(reason, |unlogged| {
            unlogged.count += 1;
            unlogged.peer = Some(peer);
        });
    }

    /// A TLS handshake has ended.
    pub(super) fn handshake(&self, outcome: Handshake) {
        self.0.metrics.tls_handshakes.inc((outcome,));
    }

    /// Logs what came after the last line, once its minute is over. Never returns.
    pub(super) async fn report(&self) -> Infallible {
        loop {
            sleep(PAUSE).await;
            for reason in Refused::ALL {
                self.update(*reason, |_| {});
            }
        }
    }

    fn update(&self, reason: Refused, change: impl FnOnce(&mut Unlogged)) {
        let Some(unlogged) = self.0.unlogged.get(reason.index()) else { return };
        let line = {
            let mut unlogged = unlogged.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut unlogged);
            unlogged.take_line()
        };
        if let Some(Unlogged { count, peer, .. }) = line {
            warn!(
                listener = self.0.listener.as_str(),
                reason = reason.as_str(),
                count,
                last_peer = peer.map(|peer| tracing::field::display(peer.ip())),
                "requests refused before routing"
            );
        }
    }
}

impl Unlogged {
    /// What a line has to say now, if it is time for one.
    fn take_line(&mut self) -> Option<Self> {
        if self.count == 0 || self.logged.is_some_and(|at| at.elapsed() < PAUSE) {
            return None;
        }
        self.logged = Some(Instant::now());
        let line = *self;
        self.count = 0;
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_reason_is_logged_at_once_then_once_a_minute_with_a_count() {
        let metrics = Metrics::new();
        let refusals = Refusals::new(Listener::Public, metrics.clone());
        let peer = "203.0.113.7:4711".parse().unwrap();
        let unlogged = |reason: Refused| refusals.0.unlogged[reason.index()].lock().unwrap().count;
        refusals.note(Refused::Version, peer);
        assert_eq!(unlogged(Refused::Version), 0, "the first is logged at once");
        for _ in 0..5 {
            advance(Duration::from_secs(5)).await;
            refusals.note(Refused::Version, peer);
        }
        assert_eq!(unlogged(Refused::Version), 5);
        refusals.note(Refused::Malformed, peer);
        assert_eq!(unlogged(Refused::Malformed), 0, "another reason has a line of its own");
        // Nothing more comes, and yet the five are told.
        tokio::select! {
            _ = refusals.report() => {}
            () = sleep(PAUSE + Duration::from_secs(1)) => {}
        }
        assert_eq!(unlogged(Refused::Version), 0);
        assert_eq!(metrics.refused.get((Listener::Public, Refused::Version)), 6);
        assert_eq!(metrics.refused.get((Listener::Admin, Refused::Version)), 0);
    }
}
