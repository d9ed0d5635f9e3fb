//! Who asks about what, and what the right answer is. It owns the population, the tenants, their tokens and the
//! judgement of one answer; it must not know faults nor time.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use cyberscan_relay::{
    chance::chance,
    sandbox::{Options, Sandbox},
};
use http::{Request, StatusCode, header};
use http_body_util::Full;
use serde_json::{Value, json};

use crate::harness::{AUDIENCE, list};

/// Addresses that are asked about, and domains; the n-th domain is at the n-th address.
const ADDRESSES: u32 = 2_500;
const DOMAINS: u32 = 800;
/// 198.18.0.0, where the sandbox has its `n<k>.load.example`.
const FIRST: u32 = u32::from_be_bytes([198, 18, 0, 0]);
/// Who asks. The last one comes with a token that is newer than those of the others.
const TENANTS: [&str; 3] = ["first", "second", "newcomer"];
pub(crate) const NEWCOMER: usize = 2;

pub(crate) struct World {
    pub(crate) sandbox: Sandbox,
    /// For each tenant.
    tokens: Mutex<Vec<Token>>,
    /// How often the issuer has withdrawn the keys it had.
    withdrawals: AtomicU32,
    /// The share of questions that is about the n most popular addresses, and domains.
    addresses: Vec<f64>,
    domains: Vec<f64>,
}

#[derive(Clone)]
struct Token {
    text: Arc<str>,
    withdrawals: u32,
}

/// A question, and by what its answer is judged.
pub(crate) struct Question {
    path: &'static str,
    authorization: Option<String>,
    body: String,
    pub(crate) tenant: usize,
    /// Of the token.
    withdrawals: u32,
    wanted: Wanted,
}

enum Wanted {
    /// All findings about each of these, and nothing else.
    Sightings(Vec<(String, BTreeSet<String>)>),
    /// So many links.
    Links(usize),
    Healthy,
    /// This error.
    Refusal(&'static str),
    NotFound,
}

/// What is wrong with an answer.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// Nothing of what was found is told, and no error either: the worst a relay can do.
    FalseAllClear(String),
    /// It says what is not so, or less than there is.
    Wrong(String),
    /// No answer at all, or not one of HTTP status 200.
    None(String),
    /// It says that something went wrong.
    Errors {
        /// Code and message of each item, warnings too.
        items: Vec<(String, String)>,
        tenant: usize,
        /// The token was signed with a key that the issuer has withdrawn.
        withdrawn: bool,
    },
}

impl World {
    pub(crate) async fn new() -> Self {
        let sandbox = Sandbox::start(Options::default()).await.unwrap();
        sandbox.cyberscan.latency(Duration::from_millis(3));
        for tenant in TENANTS {
            sandbox.cyberscan.accept_key(tenant);
            for ip in (0..ADDRESSES).map(address) {
                let findings: Vec<Value> = titles(tenant, ip).iter().map(|title| finding(title)).collect();
                let record = json!({"ip": ip.to_string(), "vulnerabilities": findings});
                sandbox.cyberscan.set_vulnerabilities_for(tenant, &ip.to_string(), &record);
            }
        }
        let world = Self {
            sandbox,
            tokens: Mutex::default(),
            withdrawals: AtomicU32::new(0),
            addresses: zipf(ADDRESSES),
            domains: zipf(DOMAINS),
        };
        *world.tokens.lock().unwrap() = (0..TENANTS.len()).map(|tenant| world.token(tenant)).collect();
        world
    }

    fn token(&self, tenant: usize) -> Token {
        let mut claims = self.sandbox.claims(AUDIENCE);
        claims["api_key"] = json!(TENANTS[tenant]);
        let withdrawals = self.withdrawals.load(Ordering::SeqCst);
        Token { text: self.sandbox.issuer.mint(&claims).into(), withdrawals }
    }

    /// The issuer has a new key and withdraws the others; everybody gets a new token.
    pub(crate) async fn replace_keys(&self) {
        self.sandbox.issuer.rotate().await.unwrap();
        // Before anybody comes with the new key: not until then do relays look for it, and notice what is gone.
        self.withdrawals.fetch_add(1, Ordering::SeqCst);
        let tokens: Vec<Token> = (0..TENANTS.len()).map(|tenant| self.token(tenant)).collect();
        *self.tokens.lock().unwrap() = tokens;
    }

    /// The issuer has a new key beside the others; the newcomer gets a new token.
    pub(crate) async fn add_key(&self) {
        self.sandbox.issuer.rotate_keeping_old().await.unwrap();
        let token = self.token(NEWCOMER);
        self.tokens.lock().unwrap()[NEWCOMER] = token;
    }

    /// One of the most popular address's questions, for slow clients who get stuck in the middle of it.
    pub(crate) fn head(&self, tenant: usize) -> String {
        let token = self.tokens.lock().unwrap()[tenant].text.clone();
        format!(
            "POST /observe/observables HTTP/1.1\r\nHost: relay.test\r\nAuthorization: Bearer {token}\r\n\
             Content-Length: 100\r\n\r\n"
        )
    }

    /// What somebody may ask next.
    pub(crate) fn question(&self) -> Question {
        let tenant = match chance() {
            ..0.62 => 0,
            ..0.98 => 1,
            _ => NEWCOMER,
        };
        let tokens = self.tokens.lock().unwrap().clone();
        let token = &tokens[tenant];
        let (path, body, wanted) = match chance() {
            ..0.88 => {
                let observables = self.observables(&[0.60, 0.76, 0.86, 0.92, 0.95, 0.97, 0.985]);
                let wanted = observables.iter().map(|(kind, value)| self.findings(tenant, kind, value));
                let wanted = Wanted::Sightings(wanted.collect());
                ("/observe/observables", body(&observables), wanted)
            }
            ..0.92 => {
                let observables = [("ip", address(drawn(&self.addresses)).to_string())];
                ("/refer/observables", body(&observables), Wanted::Links(1))
            }
            ..0.96 => ("/health", String::new(), Wanted::Healthy),
            _ => return self.mistake(tenant, &tokens),
        };
        let authorization = Some(format!("Bearer {}", token.text));
        Question { path, authorization, body, tenant, withdrawals: token.withdrawals, wanted }
    }

    /// One more with each of these shares that is not reached.
    fn observables(&self, shares: &[f64]) -> Vec<(&'static str, String)> {
        let roll = chance();
        let count = 1 + shares.iter().filter(|share| **share < roll).count();
        let mut observables = Vec::new();
        while observables.len() < count {
            let observable = match chance() {
                ..0.65 => ("ip", address(drawn(&self.addresses)).to_string()),
                ..0.93 => ("domain", format!("n{}.load.example", drawn(&self.domains))),
                // Known and harmless; not known.
                ..0.96 => ("ip", "203.0.113.77".to_owned()),
                _ => ("ip", format!("192.0.2.{}", drawn(&self.domains) % 250)),
            };
            if !observables.contains(&observable) {
                observables.push(observable);
            }
        }
        observables
    }

    fn findings(&self, tenant: usize, kind: &str, value: &str) -> (String, BTreeSet<String>) {
        let number = |name: &str| name.strip_prefix('n')?.strip_suffix(".load.example")?.parse().ok();
        let ip = match kind {
            "domain" => address(number(value).unwrap()),
            _ => value.parse().unwrap(),
        };
        let known = u32::from(ip).checked_sub(FIRST).is_some_and(|number| number < ADDRESSES);
        let titles = if known { titles(TENANTS[tenant], ip) } else { Vec::new() };
        (value.to_owned(), titles.into_iter().collect())
    }

    /// What must be refused.
    fn mistake(&self, tenant: usize, tokens: &[Token]) -> Question {
        let token = &tokens[tenant];
        let good = Some(format!("Bearer {}", token.text));
        // Another's signature below one's own claims.
        let (claims, signature) = (&tokens[0].text, &tokens[1].text);
        let forged = format!(
            "Bearer {}.{}",
            claims.rsplit_once('.').unwrap().0,
            signature.rsplit_once('.').unwrap().1
        );
        let about = list(&[("ip", "203.0.113.10")]);
        let observe = "/observe/observables";
        let (path, authorization, body, wanted) = match chance() {
            ..0.2 => (observe, None, about, Wanted::Refusal("authorization error")),
            ..0.4 => (observe, Some(forged), about, Wanted::Refusal("authorization error")),
            ..0.6 => (observe, good, "{}".to_owned(), Wanted::Refusal("invalid argument")),
            ..0.8 => (observe, good, about[..9].to_owned(), Wanted::Refusal("invalid argument")),
            _ => ("/observe/nothing", good, about, Wanted::NotFound),
        };
        Question { path, authorization, body, tenant, withdrawals: token.withdrawals, wanted }
    }

    /// What is wrong with the answer to `question`, if anything is.
    pub(crate) fn judge(&self, question: &Question, status: StatusCode, body: &[u8]) -> Option<Trouble> {
        let told = || format!("{} {}", question.path, question.body);
        if status == StatusCode::NOT_FOUND && matches!(question.wanted, Wanted::NotFound) {
            return None;
        }
        if status != StatusCode::OK {
            return Some(Trouble::None(format!("{}: {status}", told())));
        }
        let Ok(answer) = serde_json::from_slice::<Value>(body) else {
            return Some(Trouble::Wrong(format!("{}: no JSON", told())));
        };
        let wrong = |what: &str| Some(Trouble::Wrong(format!("{}: {what}: {answer}", told())));
        let items: Vec<(String, String)> = answer["errors"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|item| {
                ["code", "message"].map(|part| item[part].as_str().unwrap_or_default().to_owned()).into()
            })
            .collect();
        let failed = answer["errors"].as_array().into_iter().flatten().any(|item| item["type"] == "fatal");
        match &question.wanted {
            Wanted::Refusal(code) if items.len() == 1 && items[0].0 == *code => return None,
            Wanted::Refusal(_) | Wanted::NotFound if !failed => return wrong("not refused"),
            Wanted::Refusal(_) | Wanted::NotFound => {}
            Wanted::Healthy if !failed && answer["data"]["status"] != "ok" => return wrong("not healthy"),
            Wanted::Healthy => {}
            Wanted::Links(count) if !failed && answer["data"].as_array().map(Vec::len) != Some(*count) => {
                return wrong("a link is missing");
            }
            Wanted::Links(_) => {}
            Wanted::Sightings(wanted) => {
                let told_about = sightings(&answer);
                for (value, findings) in wanted {
                    match told_about.get(value.as_str()) {
                        // With an error it may be this one that failed.
                        None if findings.is_empty() || failed => {}
                        None => {
                            let told = format!("{}: nothing about {value}: {answer}", told());
                            return Some(Trouble::FalseAllClear(told));
                        }
                        Some(seen) if seen.iter().eq(findings.iter()) => {}
                        Some(seen) => {
                            return wrong(&format!("about {value} {seen:?} instead of {findings:?}"));
                        }
                    }
                }
                let asked = |value: &&str| wanted.iter().any(|(wanted, _)| wanted == value);
                if !told_about.keys().all(asked) {
                    return wrong("sightings nobody asked for");
                }
            }
        }
        let withdrawn = question.withdrawals < self.withdrawals.load(Ordering::SeqCst);
        (!items.is_empty()).then_some(Trouble::Errors { items, tenant: question.tenant, withdrawn })
    }
}

impl Question {
    pub(crate) fn request(&self) -> Request<Full<Bytes>> {
        let mut request = Request::post(self.path).header(header::HOST, "relay.test");
        if let Some(authorization) = &self.authorization {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        request.body(Full::from(self.body.clone())).unwrap()
    }
}

/// The titles of the sightings in an answer, by the observable they are about, each as often as it is there.
fn sightings(answer: &Value) -> BTreeMap<&str, Vec<String>> {
    let mut found: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for doc in answer["data"]["sightings"]["docs"].as_array().into_iter().flatten() {
        let about = doc["observables"][0]["value"].as_str().unwrap_or_default();
        found.entry(about).or_default().push(doc["title"].as_str().unwrap_or_default().to_owned());
    }
    found.values_mut().for_each(|titles| titles.sort_unstable());
    found
}

fn body(observables: &[(&'static str, String)]) -> String {
    list(&observables.iter().map(|(kind, value)| (*kind, value.as_str())).collect::<Vec<_>>())
}

fn address(number: u32) -> Ipv4Addr {
    (FIRST + number).into()
}

/// What CyberScan tells this tenant and no other about an address.
fn titles(tenant: &str, ip: Ipv4Addr) -> Vec<String> {
    (0..=u32::from(ip) % 4).map(|number| format!("Finding {number} for the {tenant} at {ip}")).collect()
}

fn finding(title: &str) -> Value {
    json!({"name": title, "family": "General", "description": "A service tells too much. ".repeat(8),
        "severity": "Medium", "port": 443, "protocol": "tcp", "cve": "", "cvss": 5.0, "confidence": 80})
}

/// The share of questions that is about the first, the first two, … of `count`: the n-th is asked about 1/n as
/// often as the first.
fn zipf(count: u32) -> Vec<f64> {
    let mut shares: Vec<f64> = (1..=count).map(|rank| 1.0 / f64::from(rank)).collect();
    let whole: f64 = shares.iter().sum();
    let mut sum = 0.0;
    for share in &mut shares {
        sum += *share / whole;
        *share = sum;
    }
    shares
}

fn drawn(shares: &[f64]) -> u32 {
    let roll = chance();
    u32::try_from(shares.partition_point(|share| *share < roll).min(shares.len() - 1)).unwrap()
}
