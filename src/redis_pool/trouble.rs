//! What is wrong with Redis, in words for operators. It owns the reading of the driver's errors; of their texts, which
//! may quote a command, nothing is repeated.

use std::{collections::HashMap, time::Duration};

use deadpool_redis::redis::{ErrorKind, RedisError};
use tokio::time::Instant;

/// How often at most the same trouble is logged.
const COMPLAINT: Duration = Duration::from_secs(60);
/// Kinds of trouble told apart; what else there may be is told when one of them is over.
const KINDS: usize = 16;

/// What has been complained about, and when.
#[derive(Default)]
pub(super) struct Complaints(HashMap<String, Instant>);

impl Complaints {
    /// Whether `reason` is to be told now.
    pub(super) fn tell(&mut self, reason: &str) -> bool {
        let now = Instant::now();
        self.0.retain(|_, told| now.duration_since(*told) < COMPLAINT);
        if self.0.contains_key(reason) || self.0.len() >= KINDS {
            return false;
        }
        self.0.insert(reason.to_owned(), now);
        true
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// Whether a server that answers says that it will not do such a thing for now: out of memory, not permitted, not the
/// master, unable to keep it.
pub(super) fn refuses(error: &RedisError) -> bool {
    matches!(error.code(), Some("OOM" | "NOPERM" | "READONLY" | "MISCONF" | "NOREPLICAS"))
}

/// Why something could not be done: the server's own word where it has one.
pub(super) fn reason(error: &RedisError) -> &str {
    let word = |code: &&str| code.len() <= 20 && code.bytes().all(|byte| byte.is_ascii_uppercase());
    if let Some(code) = error.code().filter(word) {
        return code;
    }
    if let Some(fault) = tls_fault(error) {
        return fault;
    }
    let known = matches!(
        error.kind(),
        ErrorKind::AuthenticationFailed
            | ErrorKind::MasterNameNotFoundBySentinel
            | ErrorKind::RESP3NotSupported
    );
    if known {
        return error.category();
    }
    if error.to_string().contains("sentinel node") {
        return "it is no sentinel";
    }
    if error.kind() == ErrorKind::InvalidClientConfig {
        return "a file with certificates, or the key, cannot be used";
    }
    let text = error.to_string();
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    if error.is_connection_refusal() || has(&["refused"]) {
        "nothing listens there"
    } else if has(&["lookup", "resolve", "not known", "address information", "No address"]) {
        "the name does not resolve"
    } else if error.is_timeout() {
        "no answer in time"
    } else if error.is_connection_dropped() {
        "the connection was lost"
    } else {
        error.category()
    }
}

/// What is wrong with TLS, if it is that. By the text: a cluster's client keeps no more of an error, and texts are
/// rustls's own.
#[must_use]
pub fn tls_fault(error: &RedisError) -> Option<&'static str> {
    let text = error.to_string();
    let has = |words: &[&str]| words.iter().any(|word| text.contains(word));
    let fault = if has(&["UnknownIssuer"]) {
        "the certificate is refused: its authority is unknown here"
    } else if has(&["certificate expired", "Expired"]) {
        "the certificate is refused: it has expired"
    } else if has(&["not valid yet", "NotValidYet"]) {
        "the certificate is refused: it is not yet valid"
    } else if has(&["not valid for name", "NotValidForName"]) {
        "the certificate is refused: it is for another name"
    } else if has(&["invalid peer certificate"]) {
        "the certificate is refused"
    } else if has(&["CertificateRequired"]) {
        "it demands a client certificate"
    } else if has(&[
        "UnknownCA",
        "BadCertificate",
        "CertificateUnknown",
        "CertificateExpired",
        "DecryptError",
    ]) {
        "it does not accept the client certificate"
    } else if has(&["HandshakeFailure", "ProtocolVersion", "incompatible"]) {
        "it offers no TLS that is safe, or demands a client certificate"
    } else if has(&["corrupt message", "InvalidContentType", "InvalidMessage"]) {
        "it does not speak TLS on this port"
    } else {
        return None;
    };
    Some(fault)
}
