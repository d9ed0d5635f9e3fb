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
    /// CyberScan says "not now" (429).
    #[error("too many requests, retry after {retry_after:?}")]
    Throttled {
        /// When another call makes sense.
        retry_after: Duration,
    },
    /// Our own limit in front of CyberScan says so: nothing was sent.
    #[error("no call within the quotas, retry after {retry_after:?}")]
    Limited {
        /// When there may be a call.
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
    /// There was less time than CyberScan usually takes: that says nothing about it.
    #[error("there was no time for an answer of CyberScan's after {after:?}")]
    TooLate {
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
    /// Whether it is about the question, the tenant or the host. A refusal of ours and a lack of time of whoever asked
    /// are about none of them: the next who asks may have more luck.
    #[must_use]
    pub fn is_telling(&self) -> bool {
        !matches!(self, Self::Limited { .. } | Self::TooLate { .. } | Self::Lost)
    }

    /// What it is called in a trace.
    pub(crate) fn as_str(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::Untrusted { .. } => "untrusted",
            Self::Unauthorized => "unauthorized",
            Self::Throttled { .. } => "throttled",
            Self::Limited { .. } => "limited",
            Self::TooLate { .. } => "too_late",
            Self::Unavailable { .. } => "unavailable",
            Self::Resting { .. } => "resting",
            Self::TimedOut { .. } => "timeout",
            Self::Unexpected { .. } => "unexpected",
            Self::Lost => "lost",
        }
    }
}
