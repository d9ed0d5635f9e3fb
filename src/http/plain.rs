//! The routes that need neither a tenant nor CyberScan.

use http::{HeaderMap, HeaderValue, header};
use serde::Serialize;
use warp::reply::Response as Reply;

use super::error_reply;
use crate::ctim::Envelope;

/// The version of this build.
const VERSION: &str = env!("CARGO_PKG_VERSION");

/// `POST /version`.
pub(super) fn version() -> Reply {
    #[derive(Serialize)]
    struct Version {
        version: &'static str,
    }
    error_reply::json(&Version { version: VERSION })
}

/// `GET /watchdog`: says back what the `Health-Check` header says, read as Latin-1, several joined
/// by commas.
pub(super) fn watchdog(headers: HeaderMap) -> Reply {
    let values = headers.get_all("health-check").iter();
    let values: Vec<String> =
        values.map(|value| value.as_bytes().iter().map(|b| char::from(*b)).collect()).collect();
    if values.is_empty() {
        return error_reply::invalid_health_check();
    }
    error_reply::json(&Envelope::data(values.join(",")))
}

/// `GET /`: something to see for whoever opens the relay in a browser.
pub(super) fn landing() -> Reply {
    #[derive(Serialize)]
    struct Landing {
        service: &'static str,
        version: &'static str,
    }
    error_reply::json(&Landing { service: env!("CARGO_PKG_NAME"), version: VERSION })
}

/// `OPTIONS` on any route.
pub(super) fn options(allow: &'static str) -> Reply {
    let mut reply = Reply::default();
    reply.headers_mut().insert(header::ALLOW, HeaderValue::from_static(allow));
    reply.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    reply
}
