//! The way in: whether the public URL leads back to a relay, and what is changed on the way. It sends nothing that is
//! secret: a random text that a relay says back, and a bearer that is no token, whose refusal tells whether the header
//! arrived. It must not know how the platform calls.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use serde_json::Value;
use url::Url;

use super::{
    Check, Finding,
    egress::{Egress, Found, Question, Stages, is_page, redirect},
    machine,
};
use crate::{
    auth::AuthError,
    clock::Clock,
    ctim::ErrorItem,
    egress::{Config, Host, Reply},
    settings::Settings,
};

const STAGES: Stages = Stages {
    name: Check::PublicName,
    address: None,
    connection: Check::PublicConnection,
    tls: Check::PublicTls,
    answer: Check::PublicAnswer,
    whom: "whoever runs what stands there",
};

/// As long as tokens get.
const LONG_TOKEN: usize = 4 << 10;
/// As large as a request with a thousand observables gets.
const LARGE_BODY: usize = 256 << 10;

/// What the settings say about audiences, and the URLs to follow.
pub(super) fn audiences(settings: &Settings, url: Option<&Url>) -> (Vec<(Host, String)>, Vec<Finding>) {
    let audiences = &settings.auth.audiences;
    let mut findings = Vec::new();
    let mut urls = Vec::new();
    let trusted = &settings.auth.trusted_proxies;
    let own_tls =
        settings.effective().iter().any(|key| key.key == "server.tls.certificate" && !key.value.is_empty());
    if audiences.is_empty() {
        let advice = "set auth.audiences to the URL in the module type";
        findings.push(if trusted.is_empty() && !own_tls {
            let state = "derived from each request's Host header, as http://<host>: a token for an https:// URL is refused";
            Finding::bad(Check::Audiences, "", state, advice)
        } else {
            let state = "derived from each request's headers: whoever chooses these chooses the audience";
            Finding::warn(Check::Audiences, "", state, advice)
        });
    } else {
        findings.push(Finding::ok(Check::Audiences, "", format!("{} listed", audiences.len())));
    }
    if trusted.iter().any(|net| net.prefix_len() == 0) {
        findings.push(Finding::warn(
            Check::TrustedProxies,
            "",
            "everybody's forwarded headers are read",
            "list the networks of your proxies only",
        ));
    } else if !trusted.is_empty() {
        findings.push(Finding::ok(Check::TrustedProxies, "", format!("{} network(s)", trusted.len())));
    }
    let given = url.map(|url| url.as_str().trim_end_matches('/').to_owned());
    for audience in audiences.iter().chain(given.iter()) {
        match callable(audience) {
            Ok((host, prefix)) => {
                findings.push(Finding::ok(Check::AudienceForm, audience, "an https URL"));
                if !urls.contains(&(host.clone(), prefix.clone())) {
                    urls.push((host, prefix));
                }
            }
            Err(wrong) => findings.push(Finding::bad(
                Check::AudienceForm,
                audience,
                wrong,
                "write it as the module type does: https://relay.example.com",
            )),
        }
    }
    (urls, findings)
}

/// Host and path of a URL the platform can call.
fn callable(audience: &str) -> Result<(Host, String), &'static str> {
    let url = Url::parse(audience).map_err(|_| "no URL")?;
    match url.scheme() {
        "https" => {}
        "http" => return Err("not https: the platform calls nothing else"),
        _ => return Err("no https URL"),
    }
    if !url.username().is_empty()
        || url.password().is_some()
        || url.query().is_some()
        || url.fragment().is_some()
    {
        return Err("has more than a host and a path");
    }
    let host = url.host_str().ok_or("no host")?;
    let host = format!("{host}:{}", url.port().unwrap_or(443));
    let host = host.parse::<Host>().map_err(|_| "no host that could be called")?;
    Ok((host, url.path().trim_end_matches('/').to_owned()))
}

/// The settings for calls to the relay's own URL: an operator chose it, so it may well be private.
pub(super) fn unguarded(config: &Config) -> Config {
    let everywhere = ["0.0.0.0/0", "::/0"].iter().filter_map(|net| net.parse().ok());
    Config { allow_cidrs: everywhere.collect(), ..config.clone() }
}

/// What answers at `https://<host><prefix>`.
pub(super) async fn examine(
    config: &Config,
    patience: Duration,
    clock: Clock,
    host: &Host,
    prefix: &str,
) -> Found {
    let mut found = Found::default();
    let about = format!("https://{host}{prefix}");
    let Ok(egress) = Egress::new(config, patience, clock) else {
        return found;
    };
    let nonce = uuid::Uuid::new_v4().simple().to_string();
    let path = format!("{prefix}/watchdog");
    let mut question = Question::get(&path);
    if let Ok(nonce) = HeaderValue::from_str(&nonce) {
        question.headers.insert("health-check", nonce);
    }
    let reply = egress.follow(&STAGES, host, question, &mut found).await;
    // The clock of what stands in front is nobody's measure.
    found.skews.clear();
    for finding in &mut found.findings {
        finding.about.clone_from(&about);
    }
    let Some(reply) = reply else { return found };
    let is_relay = what_answers(&about, &reply, &nonce);
    let relay = is_relay.is_ok();
    found.findings.push(is_relay.unwrap_or_else(|finding| finding));
    if relay {
        let way = Way { egress: &egress, host, prefix, about: &about };
        let (version, authorization, long, large) =
            tokio::join!(way.version(), way.authorization(), way.long_token(), way.large_body());
        found.findings.extend(version.into_iter().chain([authorization, long, large]));
    }
    found
}

/// Whether calls to `urls`, where a relay answers, arrive at the relay that runs here: it counts what it refuses, and
/// had refused `before` when nothing had been sent.
pub(super) async fn arrives_here(
    settings: &Settings,
    patience: Duration,
    clock: Clock,
    urls: &[(Host, String)],
    before: f64,
) -> Finding {
    /// Connections to each URL, each of which a load balancer may lead to another replica.
    const TRIES: usize = 8;
    let check = Check::PublicInstance;
    let config = unguarded(&settings.egress);
    let rose = async || machine::refusals(settings, patience).await.is_some_and(|after| after > before);
    for _ in 0..TRIES {
        if rose().await {
            return Finding::ok(check, "", "calls arrive at the relay that runs here");
        }
        for (host, prefix) in urls {
            if let Ok(egress) = Egress::new(&config, patience, clock) {
                let way = Way { egress: &egress, host, prefix, about: "" };
                let _ = way.refusal("/health", "doctor", None).await;
            }
        }
    }
    Finding::warn(
        check,
        "",
        "calls arrive at a relay, but not at the one that runs here",
        "correct the URL, or where its proxy leads; nothing is wrong where several replicas stand behind it",
    )
}

/// Whether the answer to a watchdog call is a relay's.
fn what_answers(about: &str, reply: &Reply, nonce: &str) -> Result<Finding, Finding> {
    let status = reply.status.as_u16();
    if let Some(to) = redirect(reply) {
        let state = format!("redirects ({status}) to {to}; the platform's calls would not arrive");
        return Err(Finding::bad(
            Check::PublicRedirect,
            about,
            state,
            "set auth.audiences and the module type to the URL that answers itself; take login pages away from it",
        ));
    }
    let body: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
    if reply.status == StatusCode::OK && body.get("data").and_then(Value::as_str) == Some(nonce) {
        let json = reply.headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/json");
        return if json {
            Ok(Finding::ok(Check::PublicAnswer, about, "leads to a relay"))
        } else {
            let state = "leads to a relay, but a proxy in between changes the Content-Type of its answers";
            Ok(Finding::warn(Check::ProxyHeaders, about, state, "have the proxy pass answers on as they are"))
        };
    }
    if code_of(&body) == Some("health check failed") {
        return Err(Finding::bad(
            Check::ProxyHeaders,
            about,
            "leads to a relay, but a proxy in between strips the Health-Check header",
            "have the proxy pass request headers on as they are",
        ));
    }
    let check = Check::PublicAnswer;
    Err(match status {
        502..=504 => Finding::bad(
            check,
            about,
            format!("a proxy answers ({status}): it does not reach the relay"),
            "start the relay; correct the address that the proxy passes calls to; the relay speaks HTTP/1.1",
        ),
        400 if !reply.body.is_empty() && is_page(reply) => Finding::bad(
            check,
            about,
            "a proxy refuses the call (400)",
            "look into the proxy's log: TLS spoken to a plain port, or a name it does not serve",
        ),
        400 => Finding::bad(
            check,
            about,
            "the call is refused as HTTP (400)",
            "have the proxy speak HTTP/1.1 to the relay (nginx: proxy_http_version 1.1;)",
        ),
        404 if code_is(&body, 404) => Finding::bad(
            check,
            about,
            "leads to a relay, but to another path",
            "have the proxy take the path of auth.audiences away, or set auth.audiences without it",
        ),
        401 | 403 | 407 => Finding::bad(
            check,
            about,
            format!("a proxy in front of the relay asks for credentials ({status})"),
            "exempt this URL: the platform brings nothing but its token",
        ),
        _ => {
            let what = if is_page(reply) { "an HTML page" } else { "something that is no relay" };
            let state = format!("{what} answers (status {status})");
            Finding::bad(check, about, state, "point the URL, or its proxy, at the relay")
        }
    })
}

/// The code of the first error in an answer.
fn code_of(body: &Value) -> Option<&str> {
    body.pointer("/errors/0/code")?.as_str()
}

fn code_is(body: &Value, code: u16) -> bool {
    body.get("code").and_then(Value::as_u64) == Some(code.into()) && body.get("reason").is_some()
}

/// A way on which a relay answers.
struct Way<'a> {
    egress: &'a Egress<'a>,
    host: &'a Host,
    prefix: &'a str,
    about: &'a str,
}

impl Way<'_> {
    /// Whether the relay there is of this version.
    async fn version(&self) -> Option<Finding> {
        let path = format!("{}/", self.prefix);
        let reply = self.egress.ask(self.host, Question::get(&path)).await.ok()?;
        let body: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
        let text = |name| body.get(name).and_then(Value::as_str).unwrap_or("unknown");
        let (service, version) = (text("service"), text("version"));
        let check = Check::PublicVersion;
        Some(if service != env!("CARGO_PKG_NAME") {
            let state = format!("the relay there calls itself {service}");
            Finding::warn(check, self.about, state, "look whether the URL leads to another relay")
        } else if version != env!("CARGO_PKG_VERSION") {
            let state = format!("version {version}; doctor is {}", env!("CARGO_PKG_VERSION"));
            Finding::warn(check, self.about, state, "upgrade, or ask the doctor of that version")
        } else {
            Finding::ok(check, self.about, format!("version {version}"))
        })
    }

    /// The relay's answer to a bearer that is no token.
    async fn refusal(&self, path: &str, bearer: &str, body: Option<Bytes>) -> Result<Reply, String> {
        let mut headers = HeaderMap::new();
        if let Ok(value) = HeaderValue::from_str(&format!("Bearer {bearer}")) {
            headers.insert(header::AUTHORIZATION, value);
        }
        let path = format!("{}{path}", self.prefix);
        let question = Question { method: Method::POST, path: &path, headers, json: body };
        self.egress.ask(self.host, question).await.map_err(|error| error.to_string())
    }

    async fn authorization(&self) -> Finding {
        let check = Check::ProxyAuthorization;
        let advice =
            "have the proxy pass the Authorization header on (nginx: no proxy_set_header Authorization)";
        let reply = match self.refusal("/health", "doctor", None).await {
            Ok(reply) => reply,
            Err(error) => return Finding::unknown(check, self.about, error, "try again"),
        };
        if says(&reply, AuthError::Malformed) {
            Finding::ok(check, self.about, "arrives as it was sent")
        } else if says(&reply, AuthError::MissingHeader) {
            Finding::bad(check, self.about, "a proxy in between strips the Authorization header", advice)
        } else if says(&reply, AuthError::WrongScheme) {
            Finding::bad(check, self.about, "a proxy in between replaces the Authorization header", advice)
        } else {
            let status = reply.status.as_u16();
            let state =
                format!("a proxy in between answers calls with a bearer token itself (status {status})");
            Finding::bad(check, self.about, state, advice)
        }
    }

    async fn long_token(&self) -> Finding {
        let reply = self.refusal("/health", &"a".repeat(LONG_TOKEN), None).await;
        let advice =
            "have the proxy take request heads of 16 KiB (nginx: large_client_header_buffers 4 16k;)";
        self.passes(Check::ProxyHeaderLimit, "a token of 4 KiB", reply, advice)
    }

    async fn large_body(&self) -> Finding {
        let body = Bytes::from(format!("[{}]", " ".repeat(LARGE_BODY - 2)));
        let reply = self.refusal("/observe/observables", "doctor", Some(body)).await;
        let advice = "have the proxy take bodies of 1 MiB (nginx: client_max_body_size 1m;)";
        self.passes(Check::ProxyBodyLimit, "a body of 256 KiB", reply, advice)
    }

    fn passes(&self, check: Check, what: &str, reply: Result<Reply, String>, advice: &str) -> Finding {
        match reply {
            Ok(reply)
                if [AuthError::Malformed, AuthError::MissingHeader, AuthError::WrongScheme]
                    .into_iter()
                    .any(|error| says(&reply, error)) =>
            {
                Finding::ok(check, self.about, format!("{what} arrives"))
            }
            Ok(reply) => {
                let state = format!("{what} does not arrive (status {})", reply.status.as_u16());
                Finding::warn(check, self.about, state, advice)
            }
            Err(error) => {
                Finding::warn(check, self.about, format!("{what} does not arrive: {error}"), advice)
            }
        }
    }
}

/// Whether an answer is the relay's refusal for this reason.
fn says(reply: &Reply, error: AuthError) -> bool {
    let body: Value = serde_json::from_slice(&reply.body).unwrap_or_default();
    let message = body.pointer("/errors/0/message").and_then(Value::as_str);
    reply.status == StatusCode::OK && message == Some(&ErrorItem::from(error).message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_audience_is_an_https_url_of_host_and_path() {
        let place = |text: &str| callable(text).map(|(host, path)| format!("{host}{path}"));
        assert_eq!(place("https://relay.example.com").unwrap(), "relay.example.com");
        assert_eq!(place("https://relay.example.com:8443/x/").unwrap(), "relay.example.com:8443/x");
        for text in [
            "\"https://relay.example.com\"",
            "relay.example.com",
            "http://relay.example.com",
            "https://user@relay.example.com",
            "https://relay.example.com/?a",
            "ftp://relay.example.com",
            "",
        ] {
            assert!(place(text).is_err(), "{text}");
        }
    }
}
