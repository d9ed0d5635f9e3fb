//! The one place where errors get their words. Every message a client can see on a relay route is
//! written here; administrators and runbooks know them.

use std::time::Duration;

use http::{Response, StatusCode, header};
use serde::Serialize;
use warp::reply::Response as Reply;

use super::{access::Account, body::BodyError, observables::Invalid};
use crate::{
    auth::AuthError,
    ctim::{Envelope, ErrorCode, ErrorItem, ErrorSeverity},
    cyberscan::Error,
    enrich::{Problem, Problems},
    tenant::RefusedHost,
};

/// The size of most answers, in bytes.
pub(super) const USUAL: usize = 256;

/// `value` as a JSON answer with status 200.
pub(super) fn json(value: &impl Serialize) -> Reply {
    with_status(StatusCode::OK, value, USUAL)
}

fn accounted<D: Serialize>(envelope: &Envelope<D>, size: usize) -> Reply {
    let mut reply = with_status(StatusCode::OK, envelope, size);
    reply.extensions_mut().insert(Account {
        codes: envelope.errors.iter().map(|error| error.code).collect(),
        data: envelope.data.is_some(),
        ..Account::default()
    });
    reply
}

/// An answer that is nothing but `error`.
pub(super) fn error(error: impl Into<ErrorItem>) -> Reply {
    accounted(&Envelope::error(error.into()), USUAL)
}

/// `data`, and `problems` beside it. Where a look-up failed, `data` stands there only if something
/// was `found`: an empty list beside an error would look like "nothing found".
/// The answer will have about `size` bytes.
pub(super) fn partial<D: Serialize>(data: D, found: bool, problems: &Problems, size: usize) -> Reply {
    let envelope = Envelope {
        data: (found || !problems.any_failed()).then_some(data),
        errors: problems.as_slice().iter().map(ErrorItem::from).collect(),
    };
    accounted(&envelope, size)
}

/// A fault of HTTP itself: no such route, or not with this method.
pub(super) fn http_error(status: StatusCode, allow: Option<&'static str>) -> Reply {
    #[derive(Serialize)]
    struct Fault {
        code: u16,
        message: &'static str,
        reason: &'static str,
    }
    let message = match status {
        StatusCode::METHOD_NOT_ALLOWED => "The method is not allowed for the requested URL.",
        _ => "The requested URL was not found on the server.",
    };
    let fault =
        Fault { code: status.as_u16(), message, reason: status.canonical_reason().unwrap_or_default() };
    let mut reply = with_status(status, &fault, USUAL);
    if let Some(allow) = allow {
        reply.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static(allow));
    }
    reply
}

/// The answer to a bug of ours.
pub(super) fn internal_error() -> Reply {
    error(fatal(ErrorCode::Internal, "Something went wrong."))
}

fn with_status(status: StatusCode, value: &impl Serialize, size: usize) -> Reply {
    let mut body = Vec::with_capacity(size);
    // What is serialized here are our own types, whose keys are strings: it cannot fail.
    if serde_json::to_writer(&mut body, value).is_err() {
        body.clear();
    }
    let mut reply = Response::new(body.into());
    *reply.status_mut() = status;
    let json = header::HeaderValue::from_static("application/json");
    reply.headers_mut().insert(header::CONTENT_TYPE, json);
    reply
}

fn fatal(code: ErrorCode, message: impl Into<String>) -> ErrorItem {
    ErrorItem { severity: ErrorSeverity::Fatal, code, message: message.into() }
}

fn warning(code: ErrorCode, message: impl Into<String>) -> ErrorItem {
    ErrorItem { severity: ErrorSeverity::Warning, code, message: message.into() }
}

fn unauthorized(reason: &str) -> ErrorItem {
    fatal(ErrorCode::Authorization, format!("Authorization failed: {reason}"))
}

fn unreachable(url: &str) -> ErrorItem {
    let message = format!("Unable to connect to CyberScan, validate the configured API endpoint: {url}");
    fatal(ErrorCode::Connection, message)
}

fn invalid_argument(message: impl Into<String>) -> ErrorItem {
    fatal(ErrorCode::InvalidArgument, message)
}

impl From<AuthError> for ErrorItem {
    fn from(error: AuthError) -> Self {
        unauthorized(match error {
            AuthError::MissingHeader => "Authorization header is missing",
            AuthError::WrongScheme => "Wrong authorization type",
            AuthError::Malformed => "Wrong JWT structure",
            AuthError::MissingIssuer => {
                "jwks_host is missing in JWT payload. Make sure custom_jwks_host field is present in module_type"
            }
            AuthError::WrongIssuer => {
                "Wrong jwks_host in JWT payload. Make sure domain follows the visibility.<region>.cisco.com structure"
            }
            AuthError::UnknownKey => "kid from JWT header not found in API response",
            AuthError::WrongSignature => {
                "Failed to decode JWT with provided key. \
                 Make sure domain in custom_jwks_host corresponds to your SecureX instance region."
            }
            AuthError::Expired => "JWT has expired",
            AuthError::NotYetValid => "JWT is not yet valid",
            AuthError::WrongAudience => "Wrong configuration-token-audience",
            AuthError::MissingClaims => "Wrong JWT payload structure",
        })
    }
}

impl From<RefusedHost> for ErrorItem {
    fn from(refused: RefusedHost) -> Self {
        unreachable(&refused.url)
    }
}

impl From<BodyError> for ErrorItem {
    fn from(error: BodyError) -> Self {
        invalid_argument(match error {
            BodyError::TooLarge { limit } => format!("The request body is larger than {limit} bytes."),
            BodyError::TooLate { after } => {
                format!("The request body did not arrive within {}.", seconds(after))
            }
            BodyError::Broken => "The request body could not be read.".to_owned(),
            BodyError::Encoded => "A Content-Encoding of the request body is not supported.".to_owned(),
        })
    }
}

impl From<Invalid> for ErrorItem {
    fn from(invalid: Invalid) -> Self {
        invalid_argument(invalid.0)
    }
}

impl From<Error> for ErrorItem {
    fn from(error: Error) -> Self {
        match error {
            Error::Unreachable { url } => unreachable(&url),
            Error::Untrusted { reason } => {
                fatal(ErrorCode::Untrusted, format!("Unable to verify SSL certificate: {reason}"))
            }
            Error::Unauthorized => unauthorized("wrong api_key"),
            Error::Throttled { retry_after } | Error::Limited { retry_after } => fatal(
                ErrorCode::TooManyRequests,
                format!("Too many requests to CyberScan. Try again in {}.", seconds(retry_after)),
            ),
            Error::Unavailable { status } => fatal(
                ErrorCode::Unavailable,
                format!("CyberScan is unavailable: it answered with HTTP status {status}. Try again later."),
            ),
            Error::Resting { retry_after } => fatal(
                ErrorCode::Unavailable,
                format!(
                    "CyberScan is unavailable: it has failed again and again and is left alone for {}.",
                    seconds(retry_after)
                ),
            ),
            Error::TimedOut { after } | Error::TooLate { after } => {
                fatal(ErrorCode::Timeout, format!("CyberScan did not answer within {}.", seconds(after)))
            }
            Error::Unexpected { expected } => {
                fatal(ErrorCode::Unexpected, format!("CyberScan answered something else than {expected}."))
            }
            Error::Lost => fatal(ErrorCode::Internal, "Something went wrong."),
        }
    }
}

impl From<&Problem> for ErrorItem {
    fn from(problem: &Problem) -> Self {
        match problem {
            Problem::Failed(error) => error.clone().into(),
            Problem::Stale { age } => warning(
                ErrorCode::Stale,
                format!(
                    "CyberScan could not be asked; the answer contains data that is {} old.",
                    rough(*age)
                ),
            ),
            Problem::LeftOut { count } => warning(
                ErrorCode::LeftOut,
                format!(
                    "There are more sightings than CTR_ENTITIES_LIMIT allows: {count} of the least severe were left out."
                ),
            ),
        }
    }
}

/// A duration in whole seconds, rounded up: a retry after it does make sense.
fn seconds(duration: Duration) -> String {
    match duration.as_secs() + u64::from(duration.subsec_nanos() > 0) {
        0 | 1 => "1 second".to_owned(),
        seconds => format!("{seconds} seconds"),
    }
}

/// An age, as precise as a person cares.
fn rough(age: Duration) -> String {
    match age.as_secs() {
        0..120 => seconds(age),
        s @ 120..7200 => format!("{} minutes", s / 60),
        s => format!("{} hours", s / 3600),
    }
}

/// The refusal of a relay that has as many requests under way as it can bear.
pub(super) fn busy() -> ErrorItem {
    fatal(ErrorCode::TooManyRequests, "The relay has too many requests under way. Try again in 1 second.")
}

/// The answer to a missing `Health-Check` header.
pub(super) fn invalid_health_check() -> Reply {
    error(fatal(ErrorCode::HealthCheck, "Invalid Health Check"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_are_rounded_up_to_whole_seconds() {
        assert_eq!(seconds(Duration::ZERO), "1 second");
        assert_eq!(seconds(Duration::from_millis(1001)), "2 seconds");
        assert_eq!(rough(Duration::from_secs(7199)), "119 minutes");
    }

    #[test]
    fn an_empty_answer_stands_beside_a_warning_but_never_beside_a_failure() {
        let body = |problems: &Problems| {
            let errors: Vec<ErrorItem> = problems.as_slice().iter().map(ErrorItem::from).collect();
            let envelope = Envelope { data: (!problems.any_failed()).then_some([(); 0]), errors };
            serde_json::to_value(envelope).unwrap()
        };
        let mut problems = Problems::default();
        problems.add(Problem::Stale { age: Duration::from_secs(4000) });
        assert_eq!(body(&problems)["data"], serde_json::json!([]));
        assert_eq!(body(&problems)["errors"][0]["type"], "warning");
        problems.add(Problem::Failed(Error::Unauthorized));
        assert!(body(&problems).get("data").is_none());
    }
}
