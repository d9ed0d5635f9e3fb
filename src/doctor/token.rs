//! `doctor --token`: a token, explained with the relay's own checks. It owns the sentences; what passes and what does
//! not is decided in `auth`, what would be answered in `http::error_reply`. It must not show an API key.

use http::{HeaderMap, HeaderName, HeaderValue, header};
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use tokio_util::task::TaskTracker;
use url::Url;

use super::{
    Severity,
    egress::{Egress, authenticate},
    finding::plain,
    report::mark,
};
use crate::{
    auth::{
        AuthError, Authenticator, Authorized, Credentials,
        explain::{Explanation, Refusal, Said, Step, TokenCheck},
    },
    clock::Clock,
    ctim::ErrorItem,
    cyberscan,
    metrics::Metrics,
    settings::Settings,
};

/// A row of the README's table of errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    code: &'static str,
    means: &'static str,
    todo: &'static str,
}

macro_rules! rows {
    ($($name:ident $code:literal $means:literal $todo:literal,)*) => {
        $(const $name: Row = Row { code: $code, means: $means, todo: $todo };)*
        #[cfg(test)]
        const ROWS: &[Row] = &[$($name,)*];
    };
}

rows! {
    KEY "`authorization error` … `wrong api_key`" "CyberScan refuses the key" "enter a valid API key in the module",
    ISSUER "`authorization error` … `Wrong jwks_host`" "the token's key issuer is not in `auth.jwks_hosts`, or does not answer" "correct the module's key issuer, or allow it",
    AUDIENCE "`authorization error` … `Wrong configuration-token-audience`" "the token was made for another URL" "set `auth.audiences` to the URL in the module type",
    SIGNER "`authorization error` … `kid … not found`, `Failed to decode JWT`" "the token was signed with another issuer's key" "correct the module's key issuer",
    OTHER "`authorization error` … anything else" "the token is malformed, expired, or lacks a claim" "the message says which",
    HOST "`connection error`" "no connection to CyberScan, or its host is malformed or not in `cyberscan.hosts`" "correct the module's host, `cyberscan.hosts`, or the network",
    CERTIFICATE "`unknown` … `Unable to verify SSL certificate`" "CyberScan's certificate is not accepted" "its reason is in the message; `egress.extra_ca_file` for an own authority",
    THROTTLED "`too many requests`" "CyberScan says 429, a quota of yours has nothing left in time, or the relay has enough to do" "wait the seconds in the message",
    TROUBLE "`service unavailable`, `request timeout`, `unexpected response`" "CyberScan is in trouble, slow, or answers something else" "try again later; tell CyberScan if it lasts",
    BUG "`internal error`" "a bug of ours" "please report it",
}

fn row_of(error: AuthError) -> Row {
    match error {
        AuthError::WrongIssuer => ISSUER,
        AuthError::WrongAudience => AUDIENCE,
        AuthError::UnknownKey | AuthError::WrongSignature => SIGNER,
        AuthError::MissingHeader
        | AuthError::WrongScheme
        | AuthError::Malformed
        | AuthError::MissingIssuer
        | AuthError::Expired
        | AuthError::NotYetValid
        | AuthError::MissingClaims => OTHER,
    }
}

fn row_for(error: &cyberscan::Error) -> Row {
    use cyberscan::Error;
    match error {
        Error::Unauthorized => KEY,
        Error::Unreachable { .. } => HOST,
        Error::Untrusted { .. } => CERTIFICATE,
        Error::Throttled { .. } | Error::Limited { .. } => THROTTLED,
        Error::Unavailable { .. }
        | Error::Resting { .. }
        | Error::TimedOut { .. }
        | Error::TooLate { .. }
        | Error::Unexpected { .. } => TROUBLE,
        Error::Lost => BUG,
    }
}

/// What came of a token.
#[derive(Debug)]
pub struct TokenReport {
    said: Vec<(&'static str, String)>,
    steps: Vec<Line>,
    /// What a relay would answer, where it would refuse.
    pub answer: Option<ErrorItem>,
    row: Option<Row>,
    /// Whether the audience depends on how a request reaches the relay.
    depends: bool,
}

#[derive(Debug)]
struct Line {
    step: &'static str,
    /// `None`: not tried.
    passed: Option<bool>,
    detail: String,
}

/// Explains the text of a token file: a token, or an `Authorization` header with one.
///
/// # Errors
/// When TLS cannot be set up: nothing could be called.
pub async fn explain(
    settings: &Settings,
    text: &str,
    url: Option<&Url>,
    patience: std::time::Duration,
) -> anyhow::Result<TokenReport> {
    let clock = Clock::system();
    let egress = Egress::new(&settings.egress, patience, clock)?;
    let authenticator = Authenticator::new(
        settings.auth.clone(),
        settings.cyberscan.hosts.clone(),
        egress.http(),
        clock,
        Metrics::new(),
        TaskTracker::new(),
    );
    let Some(mut headers) = as_headers(text) else {
        return Ok(no_header_value());
    };
    let depends = settings.auth.audiences.is_empty();
    let (mut peer, tls) = (None, settings.http.tls.is_some());
    if depends {
        let first = authenticator.explain(Credentials { headers: &headers, peer, tls }).await;
        let reached = url.map(|url| url.as_str().to_owned()).or_else(|| audience(&first.said));
        if let Some(reached) = reached.and_then(|reached| Url::parse(&reached).ok()) {
            arrive(&mut headers, &reached);
            peer = settings.auth.trusted_proxies.first().map(ipnet::IpNet::addr);
        }
    }
    let explanation = authenticator.explain(Credentials { headers: &headers, peer, tls }).await;
    let mut report = TokenReport {
        said: said(&explanation.said, &explanation.verdict, clock),
        steps: explanation.steps.iter().map(|step| line(step, &explanation, settings, clock)).collect(),
        answer: None,
        row: None,
        depends: depends && url.is_none() && explanation.verdict.is_ok(),
    };
    match &explanation.verdict {
        Err(Refusal::Auth(error)) => {
            (report.answer, report.row) = (Some((*error).into()), Some(row_of(*error)));
        }
        Err(Refusal::Host(refused)) => {
            (report.answer, report.row) = (Some(refused.clone().into()), Some(HOST));
        }
        Ok(authorized) => {
            if let Ok(tenant) = &authorized.tenant {
                let outcome = authenticate(&egress, settings, tenant.as_ref().clone()).await;
                report.steps.push(Line {
                    step: "api_key",
                    passed: Some(outcome.is_ok()),
                    detail: match &outcome {
                        Ok(()) => "CyberScan accepts it".to_owned(),
                        Err(error) => error.to_string(),
                    },
                });
                if let Err(error) = outcome {
                    (report.answer, report.row) = (Some(error.clone().into()), Some(row_for(&error)));
                }
            }
        }
    }
    Ok(report)
}

/// The headers of a request that brings what `text` has; `None` where no header could.
fn as_headers(text: &str) -> Option<HeaderMap> {
    let text = text.trim();
    let named = text.split_once(':').filter(|(name, _)| name.trim().eq_ignore_ascii_case("authorization"));
    let mut headers = HeaderMap::new();
    let value = match (named, text) {
        (Some((_, value)), _) => value.trim().to_owned(),
        (None, "") => return Some(headers),
        (None, value) if value.contains([' ', '\t']) => value.to_owned(),
        (None, token) => format!("Bearer {token}"),
    };
    let mut value = HeaderValue::from_bytes(value.as_bytes()).ok()?;
    value.set_sensitive(true);
    headers.insert(header::AUTHORIZATION, value);
    Some(headers)
}

fn no_header_value() -> TokenReport {
    let passed = |check| match check {
        TokenCheck::Header => Some(true),
        TokenCheck::Scheme => Some(false),
        _ => None,
    };
    let steps = TokenCheck::ALL.map(|check| Line {
        step: check.as_str(),
        passed: passed(check),
        detail: match check {
            TokenCheck::Scheme => {
                "line breaks or control characters within: no header can carry that".to_owned()
            }
            _ => String::new(),
        },
    });
    let answer = Some(AuthError::WrongScheme.into());
    TokenReport { said: Vec::new(), steps: steps.into(), answer, row: Some(OTHER), depends: false }
}

/// Makes the request one that reached the relay as `url`, through a proxy that is trusted.
fn arrive(headers: &mut HeaderMap, url: &Url) {
    let host = match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => return,
    };
    if let (Ok(host), Ok(scheme)) = (HeaderValue::from_str(&host), HeaderValue::from_str(url.scheme())) {
        headers.insert(header::HOST, host);
        headers.insert(HeaderName::from_static("x-forwarded-proto"), scheme);
    }
}

fn claim<'a>(said: &'a Said, name: &str) -> Option<&'a Value> {
    said.claims.as_ref()?.get(name)
}

/// The first audience that is a text.
fn audience(said: &Said) -> Option<String> {
    match claim(said, "aud")? {
        Value::String(audience) => Some(audience.clone()),
        Value::Array(list) => list.iter().find_map(Value::as_str).map(str::to_owned),
        _ => None,
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => plain(text),
        other => plain(&other.to_string()),
    }
}

/// What the token says, for people: its header, its claims, its times in words.
fn said(said: &Said, verdict: &Result<Authorized, Refusal>, clock: Clock) -> Vec<(&'static str, String)> {
    let mut lines = Vec::new();
    let members = |map: &Option<Map<String, Value>>, names: &[&'static str]| -> Vec<(&'static str, String)> {
        let map = map.as_ref();
        names.iter().filter_map(|name| Some((*name, shown(map?.get(*name)?)))).collect()
    };
    match &said.header {
        Some(_) => lines.extend(members(&said.header, &["alg", "kid", "typ"])),
        None => lines.push(("header", "cannot be read".to_owned())),
    }
    let Some(claims) = &said.claims else {
        lines.push(("claims", "cannot be read".to_owned()));
        return lines;
    };
    lines.extend(members(&said.claims, &["iss", "jwks_host", "aud", "host"]));
    lines.push(("api_key", if said.has_api_key { "(set)" } else { "(none)" }.to_owned()));
    for name in ["iat", "nbf", "exp"] {
        if let Some(value) = claims.get(name) {
            let seconds = value.as_f64().or_else(|| value.as_str()?.parse().ok());
            lines.push((name, seconds.map_or_else(|| shown(value), |seconds| moment(seconds, clock))));
        }
    }
    if !claims.contains_key("exp") {
        lines.push(("exp", "(none: it never expires)".to_owned()));
    }
    let limit = verdict.as_ref().ok().map(|authorized| authorized.entities_limit.to_string());
    lines.extend(claims.get("CTR_ENTITIES_LIMIT").map(|value| {
        let reads = limit.map(|limit| format!(", read as {limit}")).unwrap_or_default();
        ("CTR_ENTITIES_LIMIT", shown(value) + &reads)
    }));
    const KNOWN: [&str; 8] = ["iss", "jwks_host", "aud", "host", "iat", "nbf", "exp", "CTR_ENTITIES_LIMIT"];
    let others: Vec<String> =
        claims.keys().filter(|name| !KNOWN.contains(&name.as_str())).map(|name| plain(name)).collect();
    if !others.is_empty() {
        lines.push(("others", plain(&others.join(", "))));
    }
    lines
}

/// A point in time, as a date and as a distance.
fn moment(seconds: f64, clock: Clock) -> String {
    #[expect(clippy::cast_possible_truncation, reason = "what does not fit is no date")]
    let Ok(at) = Timestamp::from_second(seconds as i64) else {
        return format!("{seconds} (no date)");
    };
    format!("{} ({})", at.strftime("%Y-%m-%d %H:%M:%S UTC"), distance(seconds - clock.unix()))
}

fn distance(seconds: f64) -> String {
    let (size, unit) = match seconds.abs() {
        s if s < 120.0 => (s, "seconds"),
        s if s < 7_200.0 => (s / 60.0, "minutes"),
        s if s < 172_800.0 => (s / 3_600.0, "hours"),
        s => (s / 86_400.0, "days"),
    };
    if seconds < 0.0 { format!("{size:.0} {unit} ago") } else { format!("in {size:.0} {unit}") }
}

/// One check, with what is to be known about it.
fn line(step: &Step, explanation: &Explanation, settings: &Settings, clock: Clock) -> Line {
    let said = &explanation.said;
    let named = |name: &str| claim(said, name).map_or_else(|| "none".to_owned(), shown);
    let ours = || match settings.auth.audiences.join(", ") {
        none if none.is_empty() => "derived from the request".to_owned(),
        audiences => audiences,
    };
    let issuers = || {
        let listed = settings.effective().iter().find(|key| key.key == "auth.jwks_hosts");
        listed.map_or_else(String::new, |listed| listed.value.clone())
    };
    let kid =
        || said.header.as_ref().and_then(|header| header.get("kid")).map_or_else(|| "none".to_owned(), shown);
    let detail = match (step.check, &step.outcome) {
        (_, None) => "not tried: a check before it failed".to_owned(),
        (TokenCheck::Audience, Some(Err(_))) => {
            format!("the token is for {}; this relay is {}", named("aud"), ours())
        }
        (TokenCheck::Audience, Some(Ok(()))) => format!("for {}", named("aud")),
        (TokenCheck::AllowList, Some(Err(_))) => {
            format!("the token names {}; believed are {}", named("jwks_host"), issuers())
        }
        (TokenCheck::KeyId, Some(Err(Refusal::Auth(AuthError::WrongIssuer)))) => {
            format!("{} does not answer with a key set", named("jwks_host"))
        }
        (TokenCheck::KeyId, Some(Err(_))) => format!("{} has no key {}", named("jwks_host"), kid()),
        (TokenCheck::Algorithm, Some(Err(_))) => {
            let alg = said.header.as_ref().and_then(|header| header.get("alg"));
            let alg = alg.map_or_else(|| "none".to_owned(), shown);
            format!("{alg}: only RS256 is taken (configuration-token-alg in the module type)")
        }
        (TokenCheck::Times, Some(Err(Refusal::Auth(AuthError::Malformed)))) => {
            "exp, nbf or iat is no time, iss no text, or exp is required and missing".to_owned()
        }
        (TokenCheck::Times, Some(Err(_))) => {
            let now = plain(&clock.now().strftime("%Y-%m-%d %H:%M:%S UTC").to_string());
            format!("it is {now} here; clocks may differ by 5 minutes")
        }
        (TokenCheck::Shape, Some(Err(_))) => shape(said),
        (TokenCheck::Claims, Some(Err(_))) => {
            let host = claim(said, "host").is_some_and(Value::is_string);
            match (said.has_api_key, host) {
                (false, false) => "api_key and host are missing".to_owned(),
                (false, true) => "api_key is missing".to_owned(),
                (true, false) => "host is missing, or no text".to_owned(),
                (true, true) => {
                    "api_key is no key: no text, empty, too long, or with blanks within".to_owned()
                }
            }
        }
        (TokenCheck::Host, Some(Err(_))) => {
            format!("{} is malformed, or not in cyberscan.hosts", named("host"))
        }
        (TokenCheck::Host, Some(Ok(()))) => named("host"),
        (_, Some(Err(Refusal::Auth(error)))) => error.to_string(),
        (_, Some(Err(Refusal::Host(error)))) => error.to_string(),
        (_, Some(Ok(()))) => String::new(),
    };
    Line {
        step: step.check.as_str(),
        passed: step.outcome.as_ref().map(Result::is_ok),
        detail: plain(&detail),
    }
}

fn shape(said: &Said) -> String {
    match (&said.header, &said.claims) {
        (None, None) => "neither header nor payload can be read: expected header.payload.signature in base64url",
        (None, Some(_)) => "the header cannot be read",
        (Some(_), None) => "the payload cannot be read",
        (Some(_), Some(_)) => {
            "it can be read, but is not in its strict form: padding, a repeated key, crit, typ, or a bad signature part"
        }
    }
    .to_owned()
}

impl TokenReport {
    /// 0: a relay would accept it; 1: it would not; 2: that depends on how the request reaches it.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match (&self.answer, self.depends) {
            (Some(_), _) => 1,
            (None, true) => 2,
            (None, false) => 0,
        }
    }

    /// For machines.
    #[must_use]
    pub fn json(&self) -> Value {
        let outcome = |passed| match passed {
            Some(true) => "passed",
            Some(false) => "failed",
            None => "not tried",
        };
        let steps: Vec<Value> = self
            .steps
            .iter()
            .map(|line| json!({"check": line.step, "outcome": outcome(line.passed), "detail": line.detail}))
            .collect();
        let said: Map<String, Value> =
            self.said.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        json!({
            "form": 1,
            "version": env!("CARGO_PKG_VERSION"),
            "exit_status": self.exit_status(),
            "token": said,
            "checks": steps,
            "answer": self.answer,
            "means": self.row.map(|row| row.means),
            "do": self.row.map(|row| row.todo),
        })
    }

    /// For people.
    #[must_use]
    pub fn text(&self, colour: bool) -> String {
        let mut text = "The token says (whether it is true, the checks tell):\n".to_owned();
        for (name, value) in &self.said {
            text += &format!("     {name}: {value}\n");
        }
        for Line { step, passed, detail } in &self.steps {
            let severity = match passed {
                Some(true) => Severity::Ok,
                Some(false) => Severity::Bad,
                None => Severity::Unknown,
            };
            text += &format!("{} {step}", mark(severity, colour));
            if !detail.is_empty() {
                text += &format!(": {detail}");
            }
            text.push('\n');
        }
        match (&self.answer, self.row) {
            (Some(answer), Some(row)) => {
                text += &format!("A relay answers: {}: {}\n", answer.code, plain(&answer.message));
                text += &format!("The README says: {} | {} | {}\n", row.code, row.means, row.todo);
            }
            _ if self.depends => {
                text += "A relay accepts it where the call reaches it under the token's audience. Set auth.audiences.\n";
            }
            _ => text += "A relay accepts it.\n",
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_one_of_the_readme() {
        let readme = include_str!("../../README.md");
        for Row { code, means, todo } in ROWS {
            let row = format!("| {code} | {means} | {todo} |");
            assert!(readme.contains(&row), "the README has no row {row}");
        }
    }

    #[test]
    fn a_file_has_a_token_or_a_header_with_one() {
        let header = |text: &str| {
            let headers = as_headers(text)?;
            headers.get(header::AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(header(" a.b.c\n").as_deref(), Some("Bearer a.b.c"));
        assert_eq!(header("Bearer a.b.c").as_deref(), Some("Bearer a.b.c"));
        assert_eq!(header("authorization:  Basic x").as_deref(), Some("Basic x"));
        assert_eq!(header(""), None);
        assert!(as_headers("").is_some() && as_headers("a.b\n.c").is_none());
    }

    #[test]
    fn times_are_told_in_words() {
        let clock = Clock::starting_at("2026-01-01T00:00:00Z".parse().unwrap());
        let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        rt.block_on(async {
            let told = moment(clock.unix() - 200.0, clock);
            assert_eq!(told, "2025-12-31 23:56:40 UTC (3 minutes ago)");
            assert!(moment(1e300, clock).ends_with("(no date)"));
        });
        assert_eq!(distance(7_300.0), "in 2 hours");
    }
}
