//! Calls out: names, addresses, connections, certificates and answers of CyberScan and of the key issuers, through the
//! proxy and the egress guard as a serving relay makes them. It must not know what findings become.

use std::{net::SocketAddr, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use jiff::fmt::rfc2822;
use percent_encoding::percent_decode_str;
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, lookup_host},
    time::{Instant, timeout},
};
use tokio_util::task::TaskTracker;
use url::Url;

use super::{Check, Finding, Options};
use crate::{
    auth::{IssuerAddress, explain},
    clock::Clock,
    ctim::ErrorItem,
    cyberscan::{
        self, Client, CyberScan, Error, Priority, Unlimited, client::USER_AGENT, latency::Latencies,
    },
    egress::{AddressGuard, Config, Host, Http, Reply, Transport, client::Call},
    metrics::Metrics,
    settings::Settings,
    tenant::{ApiKey, Tenant},
};

/// The most bytes of an answer.
const BODY: usize = 256 << 10;
/// What CyberScan is asked with where no key is given: it cannot be one.
const NO_KEY: &str = "cyberscan-relay-doctor-asks-whether-you-are-there";

/// The way out.
pub(super) struct Egress<'a> {
    http: Http,
    config: &'a Config,
    guard: AddressGuard,
    patience: Duration,
    clock: Clock,
}

/// What the stages of a call are called.
pub(super) struct Stages {
    pub(super) name: Check,
    pub(super) address: Option<Check>,
    pub(super) connection: Check,
    pub(super) tls: Check,
    pub(super) answer: Check,
    /// Whom they lead to, for sentences.
    pub(super) whom: &'static str,
}

const CYBERSCAN: Stages = Stages {
    name: Check::CyberScanName,
    address: Some(Check::CyberScanAddress),
    connection: Check::CyberScanConnection,
    tls: Check::CyberScanTls,
    answer: Check::CyberScanAnswer,
    whom: "CyberScan",
};

const ISSUER: Stages = Stages {
    name: Check::IssuerName,
    address: Some(Check::IssuerAddress),
    connection: Check::IssuerConnection,
    tls: Check::IssuerTls,
    answer: Check::IssuerKeys,
    whom: "the key issuer",
};

/// How far this machine's clock is ahead of another's, in seconds.
pub(super) struct Skew {
    pub(super) of: String,
    pub(super) seconds: f64,
}

/// What came of an examination.
#[derive(Default)]
pub(super) struct Found {
    pub(super) findings: Vec<Finding>,
    pub(super) skews: Vec<Skew>,
}

/// One request, as [`Http::send`] takes it.
pub(super) struct Question<'a> {
    pub(super) method: Method,
    pub(super) path: &'a str,
    pub(super) headers: HeaderMap,
    pub(super) json: Option<Bytes>,
}

impl<'a> Question<'a> {
    pub(super) fn get(path: &'a str) -> Self {
        Self { method: Method::GET, path, headers: HeaderMap::new(), json: None }
    }
}

impl<'a> Egress<'a> {
    /// The way out that `config` describes.
    ///
    /// # Errors
    /// When there is none: a certificate file that cannot be used.
    pub(super) fn new(config: &'a Config, patience: Duration, clock: Clock) -> anyhow::Result<Self> {
        let guard = AddressGuard::new(config.allow_cidrs.clone());
        Ok(Self { http: Http::new(config)?, config, guard, patience, clock })
    }

    /// The client itself.
    pub(super) fn http(&self) -> Http {
        self.http.clone()
    }

    /// Follows a question to `host` and notes how far it comes; the answer, if there is one.
    pub(super) async fn follow(
        &self,
        stages: &Stages,
        host: &Host,
        question: Question<'_>,
        found: &mut Found,
    ) -> Option<Reply> {
        let about = host.to_string();
        if !self.resolves(stages, host, found).await {
            return None;
        }
        let mut note = |finding| found.findings.push(finding);
        let started = Instant::now();
        let reply = self.ask(host, question).await;
        let seconds = self.patience.as_secs_f64();
        let whom = stages.whom;
        match reply {
            Ok(reply) => {
                let took = started.elapsed().as_millis();
                note(Finding::ok(stages.connection, &about, format!("an answer in {took} ms")));
                note(Finding::ok(stages.tls, &about, "its certificate is accepted"));
                found.skews.extend(self.skew(&about, &reply.headers));
                return Some(reply);
            }
            Err(Transport::Refused) => note(Finding::bad(
                stages.address.unwrap_or(stages.connection),
                &about,
                "the egress guard refuses the address",
                "list its network in egress.allow_cidrs if it is meant to be called",
            )),
            Err(Transport::Unreachable) if self.config.proxy.is_some() => note(Finding::bad(
                stages.connection,
                &about,
                "no connection through the proxy",
                "see egress-proxy; have the proxy allow this host and port",
            )),
            Err(Transport::Unreachable) if self.connects(host).await => note(Finding::bad(
                stages.tls,
                &about,
                format!("takes connections, but no TLS comes up within {:?}", self.config.connect_timeout),
                "correct the port if TLS is not spoken there; raise egress.connect_timeout if it is far away",
            )),
            Err(Transport::Unreachable) => note(Finding::bad(
                stages.connection,
                &about,
                format!("no connection to port {}", host.port()),
                "correct host or port, or open the way in the firewall, or set egress.proxy",
            )),
            Err(Transport::Untrusted(reason)) => note(Finding::bad(
                stages.tls,
                &about,
                format!("its certificate is not accepted: {reason}"),
                format!(
                    "have {whom} mend it; where a proxy opens TLS, or for an authority of your own, name its \
                     certificate in egress.extra_ca_file"
                ),
            )),
            Err(Transport::TimedOut) => note(Finding::bad(
                stages.answer,
                &about,
                format!("connected, but no answer within {seconds} s"),
                "look whether it is overloaded, or whether something in between holds the call",
            )),
            Err(Transport::Broken) => note(Finding::bad(
                stages.answer,
                &about,
                "the answer breaks off or cannot be decoded",
                "look for something in between that cuts or changes answers",
            )),
            Err(Transport::TooLarge) => note(Finding::bad(
                stages.answer,
                &about,
                "the answer is far larger than one should be",
                "look whether it is the right host",
            )),
        }
        None
    }

    /// As [`Egress::follow`], without notes.
    pub(super) async fn ask(&self, host: &Host, question: Question<'_>) -> Result<Reply, Transport> {
        let Question { method, path, mut headers, json } = question;
        headers.insert(header::USER_AGENT, USER_AGENT);
        let deadline = Instant::now() + self.patience;
        self.http.send(Call { method, host, path, headers, json, limit: BODY, deadline }).await
    }

    /// Whether `host` takes connections at all. It was called a moment ago, so the guard allows it.
    async fn connects(&self, host: &Host) -> bool {
        let name = host.name();
        let place = (name.trim_matches(['[', ']']).to_owned(), host.port());
        matches!(timeout(self.patience, TcpStream::connect(place)).await, Ok(Ok(_)))
    }

    /// Whether the name of `host` leads to addresses that may be called.
    async fn resolves(&self, stages: &Stages, host: &Host, found: &mut Found) -> bool {
        let about = host.to_string();
        let mut note = |finding| found.findings.push(finding);
        if self.config.proxy.is_some() && host.ip().is_none() {
            note(Finding::ok(stages.name, &about, "left to the proxy"));
            return true;
        }
        let addresses: Vec<SocketAddr> = match host.ip() {
            Some(ip) => vec![(ip, host.port()).into()],
            None => match timeout(self.patience, lookup_host((host.name(), host.port()))).await {
                Ok(Ok(addresses)) => addresses.collect(),
                Ok(Err(_)) => Vec::new(),
                Err(_) => {
                    let state =
                        format!("the resolver did not answer within {} s", self.patience.as_secs_f64());
                    note(Finding::bad(stages.name, &about, state, "correct this machine's DNS"));
                    return false;
                }
            },
        };
        if addresses.is_empty() {
            let advice = "correct the name, or this machine's DNS";
            note(Finding::bad(stages.name, &about, "the name does not resolve", advice));
            return false;
        }
        note(Finding::ok(stages.name, &about, format!("{} address(es)", addresses.len())));
        let Some(check) = stages.address else { return true };
        match addresses.iter().find(|address| !self.guard.allows(address.ip())) {
            Some(refused) => {
                let state = format!("{} is no public address, and the egress guard refuses it", refused.ip());
                let advice = "list its network in egress.allow_cidrs if it is meant to be called; else correct the name";
                note(Finding::bad(check, &about, state, advice));
                false
            }
            None => {
                note(Finding::ok(check, &about, "allowed"));
                true
            }
        }
    }

    fn skew(&self, of: &str, headers: &HeaderMap) -> Option<Skew> {
        let date = headers.get(header::DATE)?.to_str().ok()?;
        let date = rfc2822::parse(date).ok()?.timestamp().as_duration().as_secs_f64();
        // A date is cut to its second.
        Some(Skew { of: of.to_owned(), seconds: self.clock.unix() - (date + 0.5) })
    }

    /// Whether the proxy lets a connection to `host` through.
    pub(super) async fn proxy(&self, host: Option<&Host>) -> Vec<Finding> {
        let Some(proxy) = &self.config.proxy else { return Vec::new() };
        let (Some(name), Some(port)) = (proxy.host_str(), proxy.port_or_known_default()) else {
            return Vec::new();
        };
        let about = format!("{name}:{port}");
        let check = Check::EgressProxy;
        let mut stream =
            match timeout(self.patience, TcpStream::connect((name.trim_matches(['[', ']']), port))).await {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => {
                    let state = format!("no connection: {}", error.kind());
                    return vec![Finding::bad(
                        check,
                        &about,
                        state,
                        "correct egress.proxy, or start the proxy",
                    )];
                }
                Err(_) => {
                    let state = format!("no connection within {} s", self.patience.as_secs_f64());
                    return vec![Finding::bad(check, &about, state, "correct egress.proxy, or the firewall")];
                }
            };
        let Some(host) = host.filter(|_| proxy.scheme() == "http") else {
            return vec![Finding::ok(check, &about, "takes connections")];
        };
        let target = format!("{}:{}", host.name(), host.port());
        let asking = async {
            stream.write_all(connect(proxy, &target).as_bytes()).await.ok()?;
            let mut head = [0; 64];
            let read = stream.read(&mut head).await.ok()?;
            let head = String::from_utf8_lossy(head.get(..read)?).into_owned();
            head.strip_prefix("HTTP/1.")?.get(2..5)?.parse::<u16>().ok()
        };
        vec![match timeout(self.patience, asking).await {
            Ok(Some(200..=299)) => Finding::ok(check, &about, format!("opens a way to {target}")),
            Ok(Some(407)) => Finding::bad(
                check,
                &about,
                "asks for other credentials (407)",
                "put user and password into egress.proxy: http://user:password@proxy.example:3128",
            ),
            Ok(Some(status @ (403 | 405))) => Finding::bad(
                check,
                &about,
                format!("does not open a way to {target} ({status})"),
                "have the proxy allow CONNECT to this host and port",
            ),
            Ok(Some(status)) => Finding::bad(
                check,
                &about,
                format!("cannot open a way to {target} ({status})"),
                "look into the proxy's log: its DNS, its own way out",
            ),
            Ok(None) => Finding::bad(
                check,
                &about,
                "does not speak HTTP as a proxy does",
                "correct egress.proxy: scheme, host, port",
            ),
            Err(_) => Finding::bad(
                check,
                &about,
                format!("no answer within {} s", self.patience.as_secs_f64()),
                "look into the proxy's log",
            ),
        }]
    }
}

fn connect(proxy: &Url, target: &str) -> String {
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let credentials =
        format!("{}:{}", decoded(proxy.username()), decoded(proxy.password().unwrap_or_default()));
    let authorization = match proxy.username() {
        "" => String::new(),
        _ => format!("Proxy-Authorization: Basic {}\r\n", STANDARD.encode(credentials)),
    };
    format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{authorization}\r\n")
}

/// Whether an answer is an HTML page.
pub(super) fn is_page(reply: &Reply) -> bool {
    reply.body.trim_ascii_start().first() == Some(&b'<')
}

/// Where an answer redirects to: a host at most, no path.
pub(super) fn redirect(reply: &Reply) -> Option<String> {
    reply.status.is_redirection().then(|| {
        let location = reply.headers.get(header::LOCATION).and_then(|value| value.to_str().ok());
        let url = location.and_then(|location| Url::parse(location).ok());
        let host = url.as_ref().and_then(|url| Some(format!("{}://{}", url.scheme(), url.host_str()?)));
        host.unwrap_or_else(|| "another path".to_owned())
    })
}

/// CyberScan at `host`: whether it is there at all, and whether it accepts the key, if one is given.
pub(super) async fn cyberscan(
    egress: &Egress<'_>,
    settings: &Settings,
    host: &Host,
    key: Option<&ApiKey>,
) -> Found {
    let mut found = Found::default();
    let json = serde_json::json!({ "key": NO_KEY }).to_string().into();
    let question = Question {
        method: Method::POST,
        path: "/api/v1/token",
        headers: [(header::ACCEPT, HeaderValue::from_static("application/json"))].into_iter().collect(),
        json: Some(json),
    };
    if let Some(reply) = egress.follow(&CYBERSCAN, host, question, &mut found).await {
        found.findings.push(is_cyberscan(host, &reply));
        let accepts = async {
            match key {
                Some(key) => Some(accepts(egress, settings, host, key).await),
                None => None,
            }
        };
        let (latency, accepts) = tokio::join!(latency(egress, settings.cyberscan.timeout, host), accepts);
        found.findings.extend([Some(latency), accepts].into_iter().flatten());
    }
    found
}

/// How long CyberScan takes on a connection that is there, against what the relay waits.
async fn latency(egress: &Egress<'_>, limit: Duration, host: &Host) -> Finding {
    let (check, about) = (Check::CyberScanLatency, host.to_string());
    let started = Instant::now();
    let answered = egress.ask(host, Question::get("/api/v1/")).await;
    let took = started.elapsed();
    let advice = "raise cyberscan.timeout, and request.deadline above it";
    match answered {
        _ if took > limit => {
            Finding::bad(check, &about, format!("takes {took:.1?}; the relay waits {limit:?}"), advice)
        }
        Err(error) => Finding::unknown(check, &about, format!("a second call failed: {error}"), "try again"),
        Ok(_) if took > limit / 2 => {
            Finding::warn(check, &about, format!("takes {took:.1?} of {limit:?}"), advice)
        }
        Ok(_) => Finding::ok(check, &about, format!("takes {took:.1?}")),
    }
}

fn is_cyberscan(host: &Host, reply: &Reply) -> Finding {
    let (check, about, status) = (Check::CyberScanAnswer, &host.to_string(), reply.status.as_u16());
    if let Some(to) = redirect(reply) {
        let state = format!("redirects ({status}) to {to}; the relay follows no redirect");
        return Finding::bad(check, about, state, "enter the host that answers itself");
    }
    let json = serde_json::from_slice::<Value>(&reply.body).is_ok_and(|body| body.is_object());
    match reply.status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if !is_page(reply) => {
            Finding::ok(check, about, format!("rejects a made-up API key ({status}), as it should"))
        }
        StatusCode::TOO_MANY_REQUESTS => Finding::warn(
            check,
            about,
            "throttles this address (429)",
            "wait, and set limiter.tenant to what CyberScan allows",
        ),
        status_code if status_code.is_server_error() => Finding::bad(
            check,
            about,
            format!("is in trouble: status {status}"),
            "try again later; tell CyberScan if it lasts",
        ),
        status_code if status_code.is_success() && json => {
            Finding::warn(check, about, "accepts a made-up API key", "look whether this is CyberScan")
        }
        _ => {
            let what = if is_page(reply) { "an HTML page" } else { "something else" };
            let state = format!("{what} answers (status {status}), not CyberScan's interface");
            let advice = "enter the host of CyberScan's API; look for a proxy or a login page in between";
            Finding::bad(check, about, state, advice)
        }
    }
}

/// One look whether CyberScan accepts `key`, by the client that serves.
pub(super) async fn accepts(egress: &Egress<'_>, settings: &Settings, host: &Host, key: &ApiKey) -> Finding {
    let check = Check::CyberScanKey;
    let about = host.to_string();
    match authenticate(egress, settings, Tenant::new(host.clone(), key.clone())).await {
        Ok(()) => Finding::ok(check, &about, "accepts the API key"),
        Err(Error::Unauthorized) => Finding::bad(
            check,
            &about,
            "refuses the API key",
            "enter a valid API key, and the host it is for",
        ),
        Err(error @ (Error::Throttled { .. } | Error::Limited { .. })) => {
            Finding::warn(check, &about, ErrorItem::from(error).message, "try again later")
        }
        Err(error) => Finding::bad(
            check,
            &about,
            format!("could not be asked: {}", ErrorItem::from(error).message),
            "see the findings about this host",
        ),
    }
}

/// Whether CyberScan accepts the tenant, by the client that serves.
pub(super) async fn authenticate(
    egress: &Egress<'_>,
    settings: &Settings,
    tenant: Tenant,
) -> Result<(), Error> {
    let (clock, tasks) = (egress.clock, TaskTracker::new());
    let config = cyberscan::Config { timeout: egress.patience, ..settings.cyberscan.clone() };
    // One call more or less is no quota's affair.
    let http = egress.http.clone();
    let client = Client::new(config, http, Unlimited, Latencies::default(), clock, Metrics::new(), tasks);
    let call = cyberscan::Call::new(tenant.into(), Instant::now() + egress.patience, Priority::Interactive);
    client.authenticate(&call).await.map(drop)
}

/// The key issuer at `address`.
pub(super) async fn issuer(egress: &Egress<'_>, address: &IssuerAddress) -> Found {
    let mut found = Found::default();
    let (name, host, path) = explain::keys_at(address);
    let Some(reply) = egress.follow(&ISSUER, host, Question::get(path), &mut found).await else {
        return found;
    };
    let check = Check::IssuerKeys;
    let status = reply.status.as_u16();
    found.findings.push(if let Some(to) = redirect(&reply) {
        let state = format!("redirects ({status}) to {to}; the relay follows no redirect");
        Finding::bad(check, name, state, "name the host that answers itself")
    } else if !reply.status.is_success() {
        let state = format!("answers with status {status} instead of keys");
        Finding::bad(check, name, state, "correct the name; try again later if it is right")
    } else {
        match explain::usable_keys(&reply.body) {
            Some(_) if explain::is_too_large(&reply.body) => {
                let state =
                    format!("publishes {} bytes; the relay reads no key set as large", reply.body.len());
                Finding::bad(check, name, state, "have the issuer publish fewer keys, or name another")
            }
            None if is_page(&reply) => Finding::bad(
                check,
                name,
                "answers with an HTML page",
                "correct the name; look for a proxy or a login page in between",
            ),
            None => Finding::bad(check, name, "answers, but not with a key set", "correct the name"),
            Some(0) => Finding::bad(
                check,
                name,
                "publishes no key that can verify RS256",
                "correct the name; RSA keys of 2048 bits and more are needed",
            ),
            Some(keys) => Finding::ok(check, name, format!("{keys} usable key(s)")),
        }
    });
    found
}

/// The hosts of CyberScan to try, and what there is to say about that.
pub(super) fn hosts(settings: &Settings, options: &Options) -> (Vec<Host>, Finding) {
    let check = Check::CyberScanHosts;
    let allowed = &settings.cyberscan.hosts;
    match &options.host {
        Some(text) => match text.trim_end_matches('/').parse::<Host>() {
            Ok(host) if allowed.allow(&host) => {
                let finding = Finding::ok(check, &host.to_string(), "allowed");
                (vec![host], finding)
            }
            Ok(host) => {
                let advice =
                    "add it to cyberscan.hosts; with a port other than 443 it has to be listed exactly";
                (Vec::new(), Finding::bad(check, &host.to_string(), "not allowed", advice))
            }
            Err(error) => {
                let finding = Finding::bad(check, text, format!("no host: {error}"), "correct --host");
                (Vec::new(), finding)
            }
        },
        None => match allowed.named() {
            named if named.is_empty() => {
                let state = "only patterns are allowed: there is no host to try";
                (Vec::new(), Finding::unknown(check, "", state, "say which: doctor --host HOST"))
            }
            named => {
                let finding = Finding::ok(check, "", format!("{} host(s) to try", named.len()));
                (named, finding)
            }
        },
    }
}
