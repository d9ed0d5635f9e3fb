//! What can go wrong with a call to CyberScan, named by what the caller can do about it. It must
//! not know how errors are told to the platform.

use std::time::Duration;

/// Why CyberScan did not answer a question. Cheap to clone, because everyone who waited for the
/// answer gets it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no connection to the host: refused, no such name, reset before an answer.
    #[error("no connection to CyberScan")]
    Unreachable {
        /// The URL of the call.
        url: String,
    },
    /// The host's certificate is not accepted.
    #[error("CyberScan's certificate is not accepted: {reason}")]
    Untrusted {
        /// Why.
        reason: String,
    },
    /// CyberScan refuses the API key.
    #[error("CyberScan refuses the API key")]
    Unauthorized,
    /// CyberScan, or our own limit in front of it, says "not now".
    #[error("too many requests, retry after {retry_after:?}")]
    Throttled {
        /// When another call makes sense.
        retry_after: Duration,
    },
    /// CyberScan is in trouble of its own (5xx).
    #[error("CyberScan answered with status {status}")]
    Unavailable {
        /// The HTTP status.
        status: u16,
    },
    /// CyberScan has failed so often that it is left alone for a while.
    #[error("CyberScan fails again and again, retry after {retry_after:?}")]
    Resting {
        /// When it is tried again.
        retry_after: Duration,
    },
    /// CyberScan did not answer in time.
    #[error("CyberScan did not answer within {after:?}")]
    TimedOut {
        /// How long was waited.
        after: Duration,
    },
    /// CyberScan answered what is not its format.
    #[error("CyberScan did not answer with {expected}")]
    Unexpected {
        /// What was expected instead.
        expected: &'static str,
    },
    /// The look-up ended without an outcome: a bug of ours.
    #[error("the look-up was lost")]
    Lost,
}

impl Error {
    /// What it is called in a trace.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::Untrusted { .. } => "untrusted",
            Self::Unauthorized => "unauthorized",
            Self::Throttled { .. } => "throttled",
            Self::Unavailable { .. } => "unavailable",
            Self::Resting { .. } => "resting",
            Self::TimedOut { .. } => "timeout",
            Self::Unexpected { .. } => "unexpected",
            Self::Lost => "lost",
        }
    }
}
