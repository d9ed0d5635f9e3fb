//! The envelope of every answer: `data`, `errors`, or both. It owns the shape; it must not know
//! which cause gets which words.

use std::fmt;

use serde::Serialize;

/// `{"data": …, "errors": […]}`; `errors` is absent where there is none, `data` where nothing
/// could be done.
#[derive(Debug, Serialize)]
pub struct Envelope<D> {
    /// What was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<D>,
    /// What went wrong, one item per cause.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub errors: Vec<ErrorItem>,
}

impl<D> Envelope<D> {
    /// An answer without errors.
    #[must_use]
    pub fn data(data: D) -> Self {
        Self { data: Some(data), errors: Vec::new() }
    }
}

impl Envelope<()> {
    /// An answer that is nothing but `error`.
    #[must_use]
    pub fn error(error: ErrorItem) -> Self {
        Self { data: None, errors: vec![error] }
    }
}

/// One entry of `errors`. The platform accepts these three keys and no other.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ErrorItem {
    /// How bad it is.
    #[serde(rename = "type")]
    pub severity: Severity,
    /// The class of the cause.
    pub code: ErrorCode,
    /// What happened, for a person.
    pub message: String,
}

/// The classes of causes, in words runbooks know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum ErrorCode {
    /// The caller is not authorized.
    #[serde(rename = "authorization error")]
    Authorization,
    /// The request is malformed.
    #[serde(rename = "invalid argument")]
    InvalidArgument,
    /// `GET /watchdog` without its header.
    #[serde(rename = "health check failed")]
    HealthCheck,
    /// No connection to CyberScan.
    #[serde(rename = "connection error")]
    Connection,
    /// A certificate that is not accepted; the original relay's word for it.
    #[serde(rename = "unknown")]
    Untrusted,
    /// A quota is used up, or the relay is busy.
    #[serde(rename = "too many requests")]
    TooManyRequests,
    /// CyberScan is in trouble.
    #[serde(rename = "service unavailable")]
    Unavailable,
    /// CyberScan was too slow.
    #[serde(rename = "request timeout")]
    Timeout,
    /// CyberScan, or something in front of it, answered what is not its format.
    #[serde(rename = "unexpected response")]
    Unexpected,
    /// A bug of ours.
    #[serde(rename = "internal error")]
    Internal,
    /// A warning: the answer is old.
    #[serde(rename = "stale data")]
    Stale,
    /// A warning: the answer is cut short.
    #[serde(rename = "too-many-messages-warning")]
    LeftOut,
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// How bad an error is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The answer, or a part of it, is missing.
    Fatal,
    /// The answer is whole but needs a grain of salt.
    Warning,
}
