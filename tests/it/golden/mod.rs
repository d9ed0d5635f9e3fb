//! The golden test: requests that were recorded with the original Python relay, sent to ours.
//!
//! `tests/golden/README.md` describes the cases. This file loads them, runs the relay as its users
//! do (a process with settings in its environment), sends every request byte for byte and reports;
//! [`mock`] is the world behind the relay, [`compare`] judges the answers.

use std::{
    collections::{BTreeMap, HashMap},
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::Deserialize;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};

use crate::fleet::RelayProcess;
use mock::{Mock, World};

pub(crate) mod compare;
pub(crate) mod mock;

/// Relays that work through the cases side by side, each with a mock of its own, so that every
/// call can be laid to one case.
const STATIONS: usize = 3;
/// How long a relay may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// The shortened time-out that the slow answers of the mock are made for.
const TIMEOUT: &str = "1s";

#[tokio::test(flavor = "multi_thread")]
async fn the_relay_answers_every_recorded_request_as_the_contract_says() {
    let suite = Arc::new(Suite::load());
    let next = Arc::new(AtomicUsize::new(0));
    let mut stations = JoinSet::new();
    for _ in 0..STATIONS {
        stations.spawn(work(Arc::clone(&suite), Arc::clone(&next)));
    }
    let mut verdicts: Vec<_> = stations.join_all().await.into_iter().flatten().collect();
    verdicts.sort_by_key(|(at, _)| *at);

    let mut tally = BTreeMap::<_, (usize, usize)>::new();
    let mut failures = Vec::new();
    for (at, verdict) in &verdicts {
        let case = &suite.cases[*at];
        let (met, all) = tally.entry((case.group.as_str(), case.verdict)).or_default();
        *all += 1;
        match verdict {
            Ok(()) => *met += 1,
            Err(why) => failures.push(format!("{} ({:?}): {why}", case.id, case.verdict)),
        }
    }
    for ((group, verdict), (met, all)) in tally {
        eprintln!("{group:>10} {:<5} {met:>3} of {all:>3}", format!("{verdict:?}"));
    }
    assert_eq!(verdicts.len(), suite.cases.len(), "every case was run");
    assert!(failures.is_empty(), "{} of {} failed:\n{}", failures.len(), verdicts.len(), failures.join("\n"));
}

/// Takes cases until none are left.
async fn work(suite: Arc<Suite>, next: Arc<AtomicUsize>) -> Vec<(usize, Result<(), String>)> {
    let mock = Mock::start(Arc::clone(&suite.world)).await;
    let mut relay = start(&suite.world, mock.address).await;
    let mut verdicts = Vec::new();
    while let at = next.fetch_add(1, Ordering::Relaxed)
        && let Some(case) = suite.cases.get(at)
    {
        // What still came in for the case before is not this one's.
        mock.take();
        let answer = answer(&relay, &case.request).await;
        let upstream = mock.take();
        let verdict = match &answer {
            Ok(answer) => compare::verdict(case, &suite, answer, &upstream),
            Err(error) => Err(format!("no answer: {error}")),
        };
        verdicts.push((at, verdict));
        // A relay may remember what failed (breaker, throttled tenant, refused key) and let the
        // next case feel it; the cases were recorded by one that remembers nothing.
        if upstream.trouble || answer.is_err() {
            relay = start(&suite.world, mock.address).await;
        }
    }
    verdicts
}

/// All cases and the world they play in.
pub(crate) struct Suite {
    /// In the order of the file.
    pub(crate) cases: Vec<Case>,
    pub(crate) world: Arc<World>,
}

/// A recorded request and what is expected of its answer.
#[derive(Deserialize)]
pub(crate) struct Case {
    /// group.name.endpoint
    pub(crate) id: String,
    pub(crate) group: String,
    flags: Vec<String>,
    pub(crate) request: Request,
    /// What the original answered.
    pub(crate) response: Recorded,
    #[serde(skip)]
    pub(crate) verdict: Verdict,
}

#[derive(Deserialize)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) target: String,
    headers: Vec<(String, String)>,
    pub(crate) body: Option<String>,
    body_b64: Option<String>,
    body_parts: Option<Vec<(String, usize)>>,
    pub(crate) token: Option<String>,
    /// Whether the body comes in chunks, already framed.
    #[serde(skip)]
    chunked: bool,
}

/// The answer of the original.
#[derive(Deserialize)]
pub(crate) struct Recorded {
    pub(crate) status: u16,
    pub(crate) text: String,
}

/// What the recorded answer is worth.
#[derive(Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// It has to be met.
    #[default]
    Match,
    /// The original is wrong there.
    Fix,
    /// Any answer of the right shape will do.
    Free,
}

impl Suite {
    /// Reads `tests/golden`.
    pub(crate) fn load() -> Self {
        #[derive(Deserialize)]
        struct Judged {
            verdict: Verdict,
        }
        let read = |name: &str| {
            std::fs::read_to_string(directory().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
        };
        let verdicts: HashMap<String, Judged> =
            serde_json::from_str(&read("verdicts.json")).expect("verdicts.json has its shape");
        let case = |line: &str| {
            let mut case: Case = serde_json::from_str(line).expect("a line of cases.jsonl is a case");
            case.verdict = verdicts[&case.id].verdict;
            case.request.chunked = case.flags.iter().any(|flag| flag == "no_content_length");
            case
        };
        let cases = read("cases.jsonl").lines().map(case).collect();
        Self { cases, world: Arc::new(World::load(&directory())) }
    }

    /// The case with this id.
    pub(crate) fn case(&self, id: &str) -> &Case {
        self.cases.iter().find(|case| case.id == id).unwrap_or_else(|| panic!("there is no case {id}"))
    }
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

impl Request {
    /// The request as it goes over the wire.
    fn bytes(&self) -> Vec<u8> {
        let body = self.body();
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.target);
        for (name, value) in &self.headers {
            let value = value.replace("{token}", self.token.as_deref().unwrap_or("{token}"));
            head += &format!("{name}: {value}\r\n");
        }
        match &body {
            _ if self.chunked => {}
            Some(body) => head += &format!("Content-Length: {}\r\n", body.len()),
            None if self.method == "POST" => head += "Content-Length: 0\r\n",
            None => {}
        }
        head += "Connection: close\r\n\r\n";
        let latin1 = |c| u8::try_from(u32::from(c)).expect("header values are Latin-1");
        head.chars().map(latin1).chain(body.into_iter().flatten()).collect()
    }

    fn body(&self) -> Option<Vec<u8>> {
        let encoded = self.body_b64.as_ref().map(|text| STANDARD.decode(text).expect("body_b64 is base64"));
        let parts = self.body_parts.as_ref();
        let repeated =
            parts.map(|parts| parts.iter().flat_map(|(part, times)| part.repeat(*times).into_bytes()));
        self.body.clone().map(String::into_bytes).or(encoded).or(repeated.map(Iterator::collect))
    }
}

/// A relay in a process of its own that calls out through `proxy` and remembers nothing.
async fn start(world: &World, proxy: SocketAddr) -> RelayProcess {
    let settings = [
        ("RELAY_EGRESS_PROXY", format!("http://{proxy}")),
        ("RELAY_EGRESS_EXTRA_CA_FILE", directory().join("keys/ca.crt.pem").display().to_string()),
        ("RELAY_CYBERSCAN_TIMEOUT", TIMEOUT.to_owned()),
        ("RELAY_CYBERSCAN_HOSTS", "*".to_owned()),
        ("RELAY_AUTH_JWKS_HOSTS", world.jwks_hosts().join(",")),
        ("RELAY_CACHE_FRESH", "0s".to_owned()),
        ("RELAY_CACHE_STALE_WHILE_REVALIDATE", "0s".to_owned()),
        ("RELAY_CACHE_STALE_IF_ERROR", "0s".to_owned()),
        ("RELAY_CACHE_NEGATIVE", "0s".to_owned()),
    ];
    RelayProcess::with(settings.map(|(name, value)| (name.to_owned(), value))).await
}

async fn answer(relay: &RelayProcess, request: &Request) -> io::Result<Answer> {
    let bytes = request.bytes();
    let answer = exchange(relay.address, &request.method, &bytes);
    timeout(PATIENCE, answer).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// The relay's answer to a request.
pub(crate) struct Answer {
    pub(crate) status: u16,
    headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    /// A header by its lower-case name.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// Sends `request` on a connection of its own and reads the answer.
async fn exchange(address: SocketAddr, method: &str, request: &[u8]) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(address).await?;
    // A relay may answer, and hang up, before it has read everything.
    let sent = stream.write_all(request).await;
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(&mut bytes).await? == 0 {
            sent?;
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "closed before the end of the head"));
        }
    };
    let rest = bytes.split_off(head);
    let mut answer = Answer::parse_head(&bytes).ok_or_else(|| malformed("head", &bytes))?;
    let bodiless = method == "HEAD" || matches!(answer.status, 204 | 304);
    answer.body = rest;
    if answer.header("transfer-encoding").is_some() && !bodiless {
        stream.read_to_end(&mut answer.body).await?;
        answer.body = dechunked(&answer.body).ok_or_else(|| malformed("chunks", &answer.body))?;
    } else {
        let length = answer.header("content-length").filter(|_| !bodiless);
        let length = length.map_or(Some(0), |length| length.parse().ok());
        let length = length.ok_or_else(|| malformed("length", &bytes))?;
        while answer.body.len() < length {
            if stream.read_buf(&mut answer.body).await? == 0 {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "closed before the end of the body",
                ));
            }
        }
    }
    Ok(answer)
}

impl Answer {
    fn parse_head(bytes: &[u8]) -> Option<Self> {
        let head = std::str::from_utf8(bytes).ok()?;
        let mut lines = head.trim_end().split("\r\n");
        let status = lines.next()?.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
        let header = |line: &str| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_owned()))
        };
        Some(Self { status, headers: lines.map(header).collect::<Option<_>>()?, body: Vec::new() })
    }
}

/// The body that these chunks hold.
fn dechunked(mut bytes: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = bytes.windows(2).position(|window| window == b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(bytes.get(..end)?).ok()?, 16).ok()?;
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(bytes.get(end + 2..end + 2 + size)?);
        bytes = bytes.get(end + 2 + size + 2..)?;
    }
}

fn malformed(what: &str, bytes: &[u8]) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!("malformed {what}: {}", String::from_utf8_lossy(bytes)),
    )
}
