//! What must hold of any bytes on the public listener, and of any request body.

use std::{collections::HashSet, net::IpAddr, num::NonZeroUsize, time::Duration};

use hyper::{body::Incoming, server::conn::http1, service::Service};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    runtime::Runtime,
    task::yield_now,
    time::Instant,
};
use tokio_util::task::TaskTracker;

use super::{
    Config, Relay, Reply,
    framing::{Guard, MAX_FIELDS, MAX_HEAD},
    observables::{self, Invalid},
    server, service,
};
use crate::{
    auth::{self, Authenticator},
    clock::Clock,
    ctim::{DomainName, Observable, Subject, sighting::Tlp},
    cyberscan::{
        Answer, Call, CyberScan, DomainRecord, Error, HostRecord, Preload, Unlimited, Vulnerabilities, Wanted,
    },
    egress::{self, HostPatterns, Http},
    enrich::{self, Enricher},
    metrics::Metrics,
    trace::Traces,
};

/// A request body.
pub fn request_body(input: &[u8]) {
    match observables::parse(input) {
        Ok(list) => {
            assert!(list.len() <= 1000);
            let plain = input.strip_prefix("\u{feff}".as_bytes()).unwrap_or(input);
            // Read the plain way, it is the same list.
            if let Ok(Value::Array(entries)) = serde_json::from_slice(plain) {
                let mut seen = HashSet::new();
                let read = |entry: &Value| {
                    let text = |name| entry.get(name).and_then(Value::as_str);
                    Observable::new(text("type")?, text("value")?)
                };
                let plainly: Vec<Observable> =
                    entries.iter().filter_map(read).filter(|it| seen.insert(it.subject().clone())).collect();
                assert_eq!(list, plainly);
                assert!(entries.iter().all(|entry| entry.as_object().is_some_and(|it| it.len() == 2)));
            }
            let tags: Vec<_> = list.iter().map(Observable::tag).collect();
            let rendered = serde_json::to_vec(&tags).expect("texts can be written as JSON");
            assert_eq!(observables::parse(&rendered), Ok(list));
        }
        Err(Invalid(message)) => {
            assert!(message.starts_with('{') && message.ends_with('}') && message.len() < 33_000);
            assert!(!message.contains(char::is_control), "{message:?}");
        }
    }
}

/// Sends the pieces of a stream; the statuses of what comes back.
type Talk = dyn Fn(&[&[u8]]) -> Vec<u16>;

/// What a client sends on one connection.
pub fn http(input: &[u8]) {
    thread_local! {
        static TALK: Box<Talk> = Box::new(talk());
    }
    let whole = TALK.with(|talk| talk(&[input]));
    let at = input.first().map_or(0, |first| input.len() * usize::from(*first) / 256);
    let (first, second) = input.split_at(at);
    let split = TALK.with(|talk| talk(&[first, second]));
    // After an early answer a body that is not all there ends the connection; nothing else may differ.
    assert!(whole.starts_with(&split) || split.starts_with(&whole), "{whole:?} or {split:?}");
    if let Some(first) = whole.first() {
        assert!(matches!(first, 400 | 431) || is_sound(input), "answered: {whole:?}");
    }
    for statuses in [whole, split] {
        let mut all = statuses.iter();
        all.find(|status| matches!(**status, 400 | 431));
        assert_eq!(all.next(), None, "something came after a refusal: {statuses:?}");
        let known = |status: &u16| matches!(status, 100 | 200 | 400 | 404 | 405 | 431);
        assert!(statuses.iter().all(known), "{statuses:?}");
    }
}

/// Whether the first head in `input` is one that everybody reads in the same way.
fn is_sound(input: &[u8]) -> bool {
    let text = String::from_utf8_lossy(input.strip_prefix(b"\r\n").unwrap_or(input));
    let Some((head, _)) = text.split_once("\r\n\r\n") else {
        return false;
    };
    let (request, fields) = head.split_once("\r\n").unwrap_or((head, ""));
    let fields: Vec<&str> = fields.split("\r\n").filter_map(|line| Some(line.split_once(':')?.0)).collect();
    let count = |name| fields.iter().filter(|field| field.eq_ignore_ascii_case(name)).count();
    let (lengths, codings) = (count("content-length"), count("transfer-encoding"));
    let by_version = match request.rsplit_once(' ') {
        Some((_, "HTTP/1.1")) => count("host") == 1,
        Some((_, "HTTP/1.0")) => count("host") <= 1 && codings == 0,
        _ => false,
    };
    by_version && lengths + codings <= 1 && head.split("\r\n").all(|line| !line.contains(['\r', '\n']))
}

/// The relay as it is on a connection; the statuses it answers pieces of a stream with.
fn talk() -> impl Fn(&[&[u8]]) -> Vec<u16> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let service = service(&relay(), Traces::default());
    move |pieces| converse(&runtime, &service, pieces)
}

fn converse<S>(runtime: &Runtime, service: &S, pieces: &[&[u8]]) -> Vec<u16>
where
    S: Service<http::Request<Incoming>, Response = Reply, Error = std::convert::Infallible> + Clone,
{
    let (mut client, socket) = duplex(1 << 20);
    let connection = http1::Builder::new()
        .header_read_timeout(None)
        .max_buf_size(MAX_HEAD)
        .max_headers(MAX_FIELDS)
        .serve_connection(TokioIo::new(Guard::new(socket)), service.clone());
    let conversation = async {
        for piece in pieces {
            if client.write_all(piece).await.is_err() {
                break;
            }
            yield_now().await;
        }
        // All is in this process: what has not come after so many turns does not come.
        let mut received = Vec::new();
        let mut quiet = 0;
        while quiet < 16 {
            tokio::select! {
                biased;
                read = client.read_buf(&mut received) => match read {
                    Ok(1..) => quiet = 0,
                    Ok(0) | Err(_) => break,
                },
                () = yield_now() => quiet += 1,
            }
        }
        received
    };
    let received = runtime.block_on(async {
        let mut connection = std::pin::pin!(connection);
        let mut conversation = std::pin::pin!(conversation);
        let mut ended = false;
        loop {
            tokio::select! {
                biased;
                received = &mut conversation => break received,
                _ = &mut connection, if !ended => ended = true,
            }
        }
    });
    statuses(&received)
}

/// The statuses of the answers in `received`. A status line is the last thing on its line, which a text that
/// is repeated in a JSON body never is.
fn statuses(received: &[u8]) -> Vec<u16> {
    let received = String::from_utf8_lossy(received);
    let status = |line: &str| {
        let (_, status) = line.rsplit_once("HTTP/1.1 ").or_else(|| line.rsplit_once("HTTP/1.0 "))?;
        let (code, reason) = status.split_once(' ')?;
        reason.chars().all(|c| c.is_ascii_alphabetic() || c == ' ').then(|| code.parse().ok())?
    };
    received.split("\r\n").filter_map(status).collect()
}

/// A relay that believes no issuer, so that nobody is ever asked anything.
fn relay() -> Relay<Nobody> {
    let (clock, metrics) = (Clock::system(), Metrics::new());
    let ten = NonZeroUsize::new(10).expect("not 0");
    let seconds = Duration::from_secs(10);
    let egress = egress::Config {
        allow_cidrs: Vec::new(),
        proxy: None,
        extra_ca_file: None,
        connect_timeout: seconds,
    };
    let auth = auth::Config {
        audiences: vec!["https://relay.test".into()],
        jwks_hosts: Vec::new(),
        spellings: Vec::new(),
        require_exp: false,
        trusted_proxies: Vec::new(),
    };
    let authenticator = Authenticator::new(
        auth,
        HostPatterns::default(),
        Http::new(&egress).expect("a client"),
        clock,
        metrics.clone(),
        TaskTracker::new(),
    );
    let enricher = Enricher::new(
        Nobody,
        enrich::Config {
            deadline: seconds,
            concurrency: ten,
            ip_details_page: false,
            private_addresses: false,
            tlp: Tlp::Amber,
            rendered_memory: 1 << 20,
        },
    );
    let connections = server::Config {
        max_connections: ten,
        header_timeout: seconds,
        idle_timeout: seconds,
        shutdown_timeout: seconds,
    };
    let config = Config {
        connections,
        tls: None,
        body_limit: 1 << 20,
        body_timeout: seconds,
        max_in_flight: 1000,
        log_observables: false,
    };
    Relay::new(authenticator, enricher, Unlimited, clock, &config, metrics)
}

/// In the place of CyberScan.
struct Nobody;

impl CyberScan for Nobody {
    async fn authenticate(&self, _: &Call) -> Result<Instant, Error> {
        unreachable!("no token is believed")
    }

    async fn domain(&self, _: &Call, _: &DomainName) -> Result<Answer<DomainRecord>, Error> {
        unreachable!("no token is believed")
    }

    async fn host(&self, _: &Call, _: IpAddr) -> Result<Answer<HostRecord>, Error> {
        unreachable!("no token is believed")
    }

    async fn vulnerabilities(&self, _: &Call, _: IpAddr) -> Result<Answer<Vulnerabilities>, Error> {
        unreachable!("no token is believed")
    }
}

impl Preload for Nobody {
    async fn preload(&self, _: &Call, _: &[Subject], _: Wanted) {
        unreachable!("no token is believed")
    }
}
