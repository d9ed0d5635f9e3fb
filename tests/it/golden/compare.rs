//! Judges an answer: by the recorded one where that is right, by the wire contract where it is not.
//!
//! Three layers, each asked for every case: [`Answered::read`] (is it an answer of this relay at
//! all?), [`check_calls`] (did it call only what it may?), and what the verdict demands: the
//! recorded answer with the allowances of `tests/golden/README.md`, or a row of [`CORRECTED`].

use std::net::IpAddr;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Map, Value};

use super::{Answer, Case, Suite, Verdict, mock};

type Check<T = ()> = Result<T, String>;

macro_rules! ensure {
    ($condition:expr, $($why:tt)+) => {
        if !$condition {
            return Err(format!($($why)+));
        }
    };
}

/// Whether `answer`, and what was asked `upstream` for it, is right for `case`; if not, why.
pub(crate) fn verdict(case: &Case, suite: &Suite, answer: &Answer, upstream: &mock::Upstream) -> Check {
    let question = Question::of(case);
    let answered = Answered::read(case, &question, answer)?;
    check_calls(case, &question, suite, upstream)?;
    answered.check_honesty(upstream)?;
    match case.verdict {
        Verdict::Match => answered.check_recorded(case, &question, answer),
        Verdict::Fix => {
            let row = CORRECTED.iter().find(|(prefix, _)| case.id.starts_with(prefix));
            let (_, want) = row.ok_or("no row of CORRECTED says what is right")?;
            answered.check_corrected(*want, case, &question, suite, upstream)
        }
        Verdict::Free => Ok(()),
    }
    .map_err(|why| format!("{why}; answered {} {}", answer.status, excerpt(&answer.body)))
}

fn excerpt(body: &[u8]) -> String {
    String::from_utf8_lossy(body).chars().take(400).collect()
}

// ------------------------------------------------------------------------------ what was asked

#[derive(Clone, Copy, PartialEq, Eq)]
enum Endpoint {
    Health,
    Observe,
    Refer,
    Version,
    Watchdog,
    Other,
}

/// What a request is about, as far as a relay may act on it.
struct Question {
    endpoint: Endpoint,
    /// Kind and value, in order; `None` where the body is not plainly a list of observables.
    observables: Option<Vec<(String, String)>>,
    claims: Value,
}

impl Question {
    fn of(case: &Case) -> Self {
        let path = case.request.target.split('?').next().unwrap_or_default();
        let endpoint = match path.trim_end_matches('/') {
            "/health" => Endpoint::Health,
            "/observe/observables" => Endpoint::Observe,
            "/refer/observables" => Endpoint::Refer,
            "/version" => Endpoint::Version,
            "/watchdog" => Endpoint::Watchdog,
            _ => Endpoint::Other,
        };
        let observable =
            |item: &Value| Some((text(item, "type")?.to_owned(), text(item, "value")?.to_owned()));
        let body =
            case.request.body.as_deref().and_then(|body| serde_json::from_str::<Vec<Value>>(body).ok());
        Self {
            endpoint,
            observables: body.and_then(|items| items.iter().map(observable).collect()),
            claims: case.request.token.as_deref().and_then(claims).unwrap_or_default(),
        }
    }

    /// The `host` claim, less blanks around it and trailing slashes.
    fn host(&self) -> Option<&str> {
        Some(text(&self.claims, "host")?.trim().trim_end_matches('/'))
    }

    /// `host:port` of CyberScan, if the `host` claim names one that may be contacted. Addresses
    /// never may: all those in the cases are private or special.
    fn cyberscan(&self) -> Option<String> {
        let host = self.host()?;
        let (name, port) = host.split_once(':').unwrap_or((host, "443"));
        let port: u16 = port.parse().ok()?;
        Some(format!("{}:{port}", host_name(name)?))
    }

    /// `host:port` of the key issuer, if the `jwks_host` claim is on the allow-list.
    fn issuer(&self, suite: &Suite) -> Option<String> {
        let host = text(&self.claims, "jwks_host")?.trim_end_matches('/').to_lowercase();
        suite.world.jwks_hosts().contains(&host.as_str()).then(|| format!("{host}:443"))
    }

    /// Spellings as given, and the canonical ones that upstream is asked with.
    fn spellings(&self) -> impl Iterator<Item = (&str, String)> {
        let observables = self.observables.iter().flatten().map(|(kind, value)| {
            let canonical = match kind.as_str() {
                "ip" => value.parse::<IpAddr>().map(|ip| ip.to_string()).ok(),
                _ => idna::domain_to_ascii(value.trim_end_matches('.')).ok(),
            };
            (value.as_str(), canonical.unwrap_or_else(|| value.to_lowercase()))
        });
        let host = self.host().and_then(|host| Some((host, idna::domain_to_ascii(host).ok()?)));
        observables.chain(host).filter(|(given, _)| !given.is_empty())
    }

    /// Equal, or equal once each given spelling is replaced by its canonical one.
    fn same_text(&self, recorded: &str, actual: &str) -> bool {
        let canonical = |text: &str| {
            self.spellings().fold(text.to_owned(), |text, (given, canonical)| text.replace(given, &canonical))
        };
        recorded == actual || canonical(recorded) == canonical(actual)
    }
}

/// The claims of a token, read as leniently as the original did: a relay that reads them so too may
/// ask the issuer they name.
fn claims(token: &str) -> Option<Value> {
    let payload = URL_SAFE_NO_PAD.decode(token.split('.').nth(1)?).ok()?;
    let payload = String::from_utf8(payload).ok()?;
    let payload = payload.trim_start_matches('\u{feff}').replace("\\ud800", "?");
    serde_json::from_str(&payload)
        .or_else(|_| serde_json::from_str(&payload.replace("NaN", "null").replace("Infinity", "null")))
        .ok()
}

/// A host name in ASCII; `None` for what is none.
fn host_name(name: &str) -> Option<String> {
    let ascii = idna::domain_to_ascii(name).ok()?;
    let label = |label: &str| {
        let inner = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        inner && !label.is_empty() && !label.starts_with('-') && !label.ends_with('-')
    };
    (ascii.split('.').all(label) && ascii.parse::<IpAddr>().is_err()).then_some(ascii)
}

fn text<'a>(value: &'a Value, key: &str) -> Option<&'a str> {
    value.get(key)?.as_str()
}

// ------------------------------------------------------------------------ what every answer is

/// An error item.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Item {
    kind: String,
    code: String,
    message: String,
}

/// An answer of the right shape.
struct Answered {
    body: Option<Value>,
    data: Option<Value>,
    /// The error items, less warnings that results were cut.
    items: Vec<Item>,
    cut: Vec<Item>,
}

const UNREACHABLE: &str = "Unable to connect to CyberScan, validate the configured API endpoint: ";
const UNVERIFIED: &str = "Unable to verify SSL certificate: ";
const REFUSED: &str = "Authorization failed: ";
/// All that may follow [`REFUSED`].
const REASONS: [&str; 12] = [
    NO_HEADER,
    SCHEME,
    STRUCTURE,
    NO_JWKS_HOST,
    JWKS_HOST,
    KID,
    SIGNATURE,
    AUDIENCE,
    PAYLOAD,
    EXPIRED,
    NOT_YET_VALID,
    WRONG_KEY,
];
const NO_HEADER: &str = "Authorization header is missing";
const SCHEME: &str = "Wrong authorization type";
const STRUCTURE: &str = "Wrong JWT structure";
const NO_JWKS_HOST: &str =
    "jwks_host is missing in JWT payload. Make sure custom_jwks_host field is present in module_type";
const JWKS_HOST: &str =
    "Wrong jwks_host in JWT payload. Make sure domain follows the visibility.<region>.cisco.com structure";
const KID: &str = "kid from JWT header not found in API response";
const SIGNATURE: &str = "Failed to decode JWT with provided key. Make sure domain in custom_jwks_host corresponds to your SecureX instance region.";
const AUDIENCE: &str = "Wrong configuration-token-audience";
const PAYLOAD: &str = "Wrong JWT payload structure";
const EXPIRED: &str = "JWT has expired";
const NOT_YET_VALID: &str = "JWT is not yet valid";
const WRONG_KEY: &str = "wrong api_key";
const CUT: &str = "too-many-messages-warning";

impl Answered {
    fn read(case: &Case, question: &Question, answer: &Answer) -> Check<Self> {
        ensure!(answer.status < 500, "HTTP {}: {}", answer.status, excerpt(&answer.body));
        let none = Self { body: None, data: None, items: Vec::new(), cut: Vec::new() };
        if answer.body.is_empty() {
            let may = matches!(case.request.method.as_str(), "HEAD" | "OPTIONS")
                || (300..400).contains(&answer.status);
            ensure!(may, "an empty answer with status {}", answer.status);
            return Ok(none);
        }
        let content_type = answer.header("content-type").unwrap_or_default();
        ensure!(content_type == "application/json", "content type {content_type:?}");
        let body: Value = serde_json::from_slice(&answer.body)
            .map_err(|error| format!("not JSON ({error}): {}", excerpt(&answer.body)))?;
        ensure!(!has_null(&body), "null in the answer: {body}");
        let answered = Self { body: Some(body.clone()), ..none };
        match answer.status {
            200 => answered.read_body(question, &body),
            _ => check_plain_error(answer.status, answer, &body).map(|()| answered),
        }
        .map_err(|why| format!("{why} in {}", excerpt(&answer.body)))
    }

    fn read_body(mut self, question: &Question, body: &Value) -> Check<Self> {
        let members = body.as_object().ok_or("not an object")?;
        if question.endpoint == Endpoint::Version {
            let version = text(body, "version").unwrap_or_default();
            ensure!(members.len() == 1 && version.split('.').count() == 3, "no version");
            return Ok(self);
        }
        ensure!(
            !members.is_empty() && members.keys().all(|key| key == "data" || key == "errors"),
            "other members than data and errors"
        );
        if let Some(errors) = members.get("errors") {
            let errors =
                errors.as_array().filter(|errors| !errors.is_empty()).ok_or("errors is no list of items")?;
            let items = errors.iter().map(Item::read).collect::<Check<Vec<_>>>()?;
            (self.cut, self.items) = items.into_iter().partition(|item| item.code == CUT);
        }
        self.data = members.get("data").cloned();
        if let Some(data) = &self.data {
            match question.endpoint {
                Endpoint::Health => check_health(data)?,
                Endpoint::Observe => check_sightings(data, question)?,
                Endpoint::Refer => check_references(data)?,
                Endpoint::Watchdog => ensure!(data.is_string(), "data is no text"),
                Endpoint::Version | Endpoint::Other => {}
            }
        }
        let one = question
            .observables
            .as_ref()
            .is_none_or(|asked| asked.iter().all(|other| Some(other) == asked.first()));
        ensure!(
            !one || self.items.iter().all(Item::is_warning) || self.data.is_none(),
            "data beside the failure of all"
        );
        Ok(self)
    }

    fn docs(&self) -> &[Value] {
        let docs = self.data.as_ref().and_then(|data| data.pointer("/sightings/docs"));
        docs.and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    fn references(&self) -> &[Value] {
        self.data.as_ref().and_then(Value::as_array).map_or(&[], Vec::as_slice)
    }

    /// A failure of CyberScan is never told as "nothing found", and no bug of ours is an answer.
    fn check_honesty(&self, upstream: &mock::Upstream) -> Check {
        let calls = || upstream.requests.iter().filter(|request| request.target.starts_with("/api/"));
        let failed = calls().find(|request| !matches!(request.status, 200..=299 | 404));
        if let Some(failed) = failed.filter(|_| self.items.is_empty()) {
            return Err(format!(
                "{} was answered {}, but no error item says so",
                failed.target, failed.status
            ));
        }
        let refused = self.items.iter().any(|item| {
            item.code == "authorization error" && !item.message.ends_with(WRONG_KEY)
                || item.code == "invalid argument"
        });
        ensure!(!refused || calls().next().is_none(), "CyberScan was called for a refused request");
        Ok(())
    }
}

fn has_null(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.iter().any(has_null),
        Value::Object(members) => members.values().any(has_null),
        _ => false,
    }
}

/// `{"code","message","reason"}`, and who is allowed instead.
fn check_plain_error(status: u16, answer: &Answer, body: &Value) -> Check {
    ensure!(matches!(status, 400..=499), "status {status}");
    let known = |key: &String| matches!(key.as_str(), "code" | "message" | "reason");
    let sane = body.as_object().is_some_and(|members| members.len() == 3 && members.keys().all(known));
    ensure!(sane && body.get("code") == Some(&Value::from(status)), "not a plain error of this status");
    ensure!(
        text(body, "message").is_some() && text(body, "reason").is_some(),
        "message or reason is no text"
    );
    ensure!(status != 405 || allows(answer), "no Allow header");
    Ok(())
}

fn allows(answer: &Answer) -> bool {
    answer.header("allow").is_some_and(|methods| methods.contains("POST") || methods.contains("GET"))
}

impl Item {
    fn read(item: &Value) -> Check<Self> {
        let member =
            |key| text(item, key).map(str::to_owned).ok_or_else(|| format!("error item without {key}"));
        let this = Self { kind: member("type")?, code: member("code")?, message: member("message")? };
        ensure!(item.as_object().map(Map::len) == Some(3), "error item with other members");
        this.check_wording()?;
        Ok(this)
    }

    fn is_warning(&self) -> bool {
        self.kind == "warning"
    }

    /// The texts that the contract gives, and what it says of the others.
    fn check_wording(&self) -> Check {
        let Self { kind, code, message } = self;
        let names_cyberscan = message.contains("CyberScan");
        let names_number = message.contains(|c: char| c.is_ascii_digit());
        let right = match code.as_str() {
            "authorization error" => {
                message.strip_prefix(REFUSED).is_some_and(|reason| REASONS.contains(&reason))
            }
            "invalid argument" => message.starts_with('{') && message.ends_with('}'),
            "connection error" => message
                .strip_prefix(UNREACHABLE)
                .is_some_and(|url| url.starts_with("https://") && url.chars().count() <= 300),
            "unknown" => message.strip_prefix(UNVERIFIED).is_some_and(is_reason),
            "too many requests" | "service unavailable" | "request timeout" => {
                names_cyberscan && names_number
            }
            "unexpected response" | "stale data" | CUT => !message.is_empty(),
            "health check failed" => message == "Invalid Health Check",
            _ => false,
        };
        ensure!(right, "error item {code:?}: {message:?}");
        ensure!(!message.contains(char::is_control), "control characters in {message:?}");
        let warning = matches!(code.as_str(), "stale data" | CUT);
        ensure!(kind == if warning { "warning" } else { "fatal" }, "{code} is {kind}");
        Ok(())
    }
}

/// A reason in words; the original sometimes gave a bare error number.
fn is_reason(reason: &str) -> bool {
    reason.contains(char::is_alphabetic)
}

fn check_health(data: &Value) -> Check {
    let status = text(data, "status").unwrap_or_default();
    ensure!(matches!(status, "ok" | "error" | "unknown"), "status {status:?}");
    let members = data.as_object().ok_or("data is no object")?;
    ensure!(
        members.keys().all(|key| key == "status" || key == "quotas"),
        "other members than status and quotas"
    );
    ensure!(data.get("quotas").is_none_or(Value::is_object), "quotas is no map");
    Ok(())
}

fn check_references(data: &Value) -> Check {
    for reference in data.as_array().ok_or("data is no list")? {
        let members = reference.as_object().ok_or("a reference is no object")?;
        let texts = ["id", "title", "description", "url"];
        ensure!(texts.iter().all(|key| text(reference, key).is_some_and(|it| !it.is_empty())), "{reference}");
        ensure!(
            members.len() == 5 && reference["categories"] == Value::from(vec!["CyberScan"]),
            "{reference}"
        );
        ensure!(text(reference, "url").is_some_and(|url| url.starts_with("http")), "{reference}");
    }
    Ok(())
}

fn check_sightings(data: &Value, question: &Question) -> Check {
    let members = data.as_object().ok_or("data is no object")?;
    let Some(sightings) = members.get("sightings") else {
        ensure!(members.is_empty(), "data without sightings is not empty");
        return Ok(());
    };
    let docs =
        sightings["docs"].as_array().filter(|docs| !docs.is_empty()).ok_or("sightings without docs")?;
    ensure!(sightings["count"] == docs.len(), "count is not the number of docs");
    let mut ids = Vec::new();
    for doc in docs {
        check_sighting(doc, question).map_err(|why| format!("{why} of a sighting"))?;
        let id = text(doc, "id").unwrap_or_default();
        ensure!(!ids.contains(&id), "two sightings are {id}");
        ids.push(id);
    }
    Ok(())
}

fn check_sighting(doc: &Value, question: &Question) -> Check {
    let fixed = [("type", "sighting"), ("schema_version", "1.1.11"), ("source", "CyberScan")]
        .map(|(k, v)| (k, Value::from(v)));
    for (key, value) in fixed.into_iter().chain([("count", Value::from(1)), ("internal", Value::from(true))])
    {
        ensure!(doc.get(key) == Some(&value), "{key} is not {value}");
    }
    let id = text(doc, "id").and_then(|id| id.strip_prefix("transient:sighting-")).unwrap_or_default();
    ensure!(id.len() == 36 && uuid::Uuid::try_parse(id).is_ok(), "id");
    ensure!(
        doc.pointer("/observed_time/start_time").and_then(Value::as_str).is_some_and(is_second),
        "start_time"
    );
    ensure!(text(doc, "timestamp").is_none_or(|at| at.starts_with("20")), "timestamp");

    let cells = cells(doc).ok_or("the table is not one row of texts under columns of texts")?;
    let cell = |column| cells.iter().find(|(name, _)| *name == column).map(|(_, cell)| *cell);
    let confidence = match cell("confidence").map(str::parse::<f64>) {
        None => Some("High"),
        Some(Ok(quality)) => Some(if quality < 50.0 {
            "Low"
        } else if quality < 70.0 {
            "Medium"
        } else {
            "High"
        }),
        Some(Err(_)) => None,
    };
    let said = text(doc, "confidence").unwrap_or_default();
    ensure!(
        confidence.map_or(matches!(said, "Low" | "Medium" | "High"), |right| right == said),
        "confidence"
    );
    const SEVERITIES: [&str; 7] = ["Info", "Low", "Medium", "High", "Critical", "None", "Unknown"];
    if let Some(said) = doc.get("severity") {
        let told = cell("severity")
            .and_then(|cell| SEVERITIES.iter().find(|word| word.eq_ignore_ascii_case(cell.trim())));
        let right = told.map_or_else(|| SEVERITIES.iter().any(|word| said == word), |told| said == told);
        ensure!(right, "severity");
    }
    for (key, limit) in
        [("title", 1024), ("short_description", 2048), ("description", 5000), ("source_uri", 2048)]
    {
        let Some(value) = doc.get(key) else { continue };
        let value = value.as_str().ok_or_else(|| format!("{key} is no text"))?;
        ensure!(value.encode_utf16().count() <= limit, "{key} is longer than {limit}");
    }
    if let Some(asked) = &question.observables {
        let about = doc["observables"].as_array().filter(|list| list.len() == 1).ok_or("observables")?;
        let about =
            (text(&about[0], "type").unwrap_or_default(), text(&about[0], "value").unwrap_or_default());
        ensure!(
            asked.iter().any(|(kind, value)| (kind.as_str(), value.as_str()) == about),
            "not the observable asked for"
        );
    }
    Ok(())
}

/// `YYYY-MM-DDTHH:MM:SSZ`.
fn is_second(time: &str) -> bool {
    let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    shape == "0000-00-00T00:00:00Z"
}

/// The table of a sighting: its columns and the cells below them.
fn cells(doc: &Value) -> Option<Vec<(&str, &str)>> {
    let columns = doc.pointer("/data/columns")?.as_array()?;
    let [row] = doc.pointer("/data/rows")?.as_array()?.as_slice() else { return None };
    let row = row.as_array().filter(|row| row.len() == columns.len())?;
    let named = |column| text(column, "name").filter(|_| text(column, "type") == Some("string"));
    columns.iter().zip(row).map(|(column, cell)| Some((named(column)?, cell.as_str()?))).collect()
}

// ---------------------------------------------------------------------------- what was called

const USER_AGENT: &str = "SecureX Threat Response Integrations <tr-integrations-support@cisco.com>";

/// Only what the contract names was called, at the hosts of this request, and nothing twice.
fn check_calls(case: &Case, question: &Question, suite: &Suite, upstream: &mock::Upstream) -> Check {
    let (issuer, cyberscan) = (question.issuer(suite), question.cyberscan());
    for target in &upstream.connects {
        let may = Some(target) == issuer.as_ref() || Some(target) == cyberscan.as_ref();
        ensure!(may, "connected to {target:?}");
    }
    let mut tokens = 0;
    let mut seen = Vec::new();
    let mut denied = 0;
    for call in &upstream.requests {
        let mock::Asked { authority, method, target, authorization, .. } = call;
        let what = format!("{method} https://{authority}{target}");
        let host = authority.strip_suffix(":443").unwrap_or(authority);
        ensure!(call.host.as_deref() == Some(host), "{what} has the Host {:?}", call.host);
        let at = match (method.as_str(), target.as_str()) {
            ("GET", "/.well-known/jwks") => {
                ensure!(authorization.is_none(), "{what} carries an Authorization");
                &issuer
            }
            ("POST", "/api/v1/token") => {
                tokens += 1;
                ensure!(authorization.is_none(), "{what} carries an Authorization");
                &cyberscan
            }
            ("GET", path) if is_resource(path) => {
                let bearer = authorization.as_deref().and_then(|header| header.strip_prefix("Bearer "));
                let right = suite.world.access_token(&question.claims["api_key"]);
                let fits =
                    right.is_none_or(|token| Some(token.as_str()) == bearer) || case.verdict == Verdict::Free;
                ensure!(bearer.is_some() && fits, "{what} carries {authorization:?}");
                denied += usize::from(matches!(call.status, 401 | 403));
                &cyberscan
            }
            _ => return Err(format!("called {what}")),
        };
        ensure!(at.as_ref() == Some(authority), "called {what}");
        ensure!(
            !target.starts_with("/api/") || call.user_agent.as_deref() == Some(USER_AGENT),
            "{what} has the User-Agent {:?}",
            call.user_agent
        );
        let repeats = seen.iter().filter(|(seen, _)| *seen == what);
        let repeats: Vec<u16> = repeats.map(|(_, status)| *status).collect();
        ensure!(
            method != "GET" || repeats.is_empty() || matches!(repeats[..], [401 | 403]),
            "{what} more than once"
        );
        seen.push((what, call.status));
    }
    ensure!(tokens <= 1 + usize::from(denied > 0), "{tokens} token calls");
    Ok(())
}

/// `/api/v1/<resource>/<one segment>`.
fn is_resource(path: &str) -> bool {
    ["/api/v1/domain/", "/api/v1/vulnerabilities/ip/", "/api/v1/ip/"]
        .iter()
        .find_map(|prefix| path.strip_prefix(prefix))
        .is_some_and(|segment| !segment.is_empty() && !segment.contains(['/', '?', '#']))
}

// ------------------------------------------------------------------------ the recorded answer

impl Answered {
    fn check_recorded(&self, case: &Case, question: &Question, answer: &Answer) -> Check {
        let recorded = &case.response;
        ensure!(answer.status == recorded.status, "recorded was the status {}", recorded.status);
        if recorded.text.is_empty() {
            ensure!(self.body.is_none(), "a body where none was recorded");
            ensure!(answer.status == 404 || allows(answer), "no Allow header");
            return Ok(());
        }
        if answer.status != 200 || question.endpoint == Endpoint::Version {
            return Ok(());
        }
        let recorded: Value =
            serde_json::from_str(&recorded.text).map_err(|error| format!("the record: {error}"))?;
        self.check_items(&recorded, question)?;
        self.check_data(recorded.get("data"), question)?;
        self.check_cut(case, question)
    }

    fn check_items(&self, recorded: &Value, question: &Question) -> Check {
        let recorded = recorded["errors"].as_array().into_iter().flatten();
        let mut left = self.items.clone();
        for item in recorded {
            let of = |key| text(item, key).unwrap_or_default();
            let same = |actual: &Item| {
                actual.kind == of("type")
                    && actual.code == of("code")
                    && (question.same_text(of("message"), &actual.message)
                        || is_escape(of("message"), &actual.message))
            };
            let at = left.iter().position(same).ok_or_else(|| format!("recorded was the error {item}"))?;
            left.remove(at);
        }
        ensure!(left.is_empty(), "not recorded: {left:?}");
        Ok(())
    }

    fn check_data(&self, recorded: Option<&Value>, question: &Question) -> Check {
        let Some(recorded) = recorded else {
            ensure!(self.data.is_none(), "data where none was recorded");
            return Ok(());
        };
        let data = self
            .data
            .as_ref()
            .ok_or_else(|| format!("recorded was the data {}", excerpt(recorded.to_string().as_bytes())))?;
        match question.endpoint {
            Endpoint::Observe => {
                let docs = recorded.pointer("/sightings/docs").and_then(Value::as_array);
                let mut docs = docs.cloned().unwrap_or_default();
                let mut seen = Vec::new();
                docs.retain(|doc| once(&mut seen, doc.clone()));
                pair(&docs, self.docs(), |recorded, actual| same_sighting(question, recorded, actual))
            }
            Endpoint::Refer => {
                let mut references = recorded.as_array().cloned().unwrap_or_default();
                let mut seen = Vec::new();
                references.retain(|reference| once(&mut seen, reference.clone()));
                pair(&references, self.references(), |recorded, actual| {
                    same_reference(question, recorded, actual)
                })
            }
            Endpoint::Health => {
                ensure!(
                    data["status"] == recorded["status"],
                    "recorded was the status {}",
                    recorded["status"]
                );
                Ok(())
            }
            _ => {
                ensure!(data == recorded, "recorded was {recorded}");
                Ok(())
            }
        }
    }

    /// When the entity limit cuts, a warning says how many were left out.
    fn check_cut(&self, case: &Case, question: &Question) -> Check {
        const SEVEN: &str = "192.0.2.5";
        let all = |asked: &Vec<(String, String)>| matches!(&asked[..], [(_, value)] if value == SEVEN);
        if !question.observables.as_ref().is_some_and(all) || self.docs().is_empty() {
            return Ok(());
        }
        let left_out = 7 - self.docs().len().min(7);
        let told = self.cut.iter().any(|item| item.message.contains(&left_out.to_string()));
        ensure!(told == (left_out > 0), "{left_out} left out in {}, told: {:?}", case.id, self.cut);
        Ok(())
    }
}

/// Whether `thing` comes for the first time: duplicates are answered once.
fn once(seen: &mut Vec<Value>, thing: Value) -> bool {
    let new = !seen.contains(&thing);
    if new {
        seen.push(thing);
    }
    new
}

/// Every recorded thing has its actual one and the other way round, in any order.
fn pair(recorded: &[Value], actual: &[Value], same: impl Fn(&Value, &Value) -> Check) -> Check {
    let mut left: Vec<&Value> = actual.iter().collect();
    for expected in recorded {
        let verdicts: Vec<Check> = left.iter().map(|actual| same(expected, actual)).collect();
        let Some(at) = verdicts.iter().position(Result::is_ok) else {
            let why: Vec<String> = verdicts.into_iter().filter_map(Result::err).collect();
            let expected = excerpt(expected.to_string().as_bytes());
            return Err(format!("recorded was {expected}; against those answered: {}", why.join("; ")));
        };
        left.remove(at);
    }
    ensure!(left.is_empty(), "{} more than recorded", left.len());
    Ok(())
}

/// A recorded text with control characters, and one where each is spelled out somehow.
fn is_escape(recorded: &str, actual: &str) -> bool {
    let mut parts = recorded.split(char::is_control).filter(|part| !part.is_empty());
    let starts = parts.clone().next().is_some_and(|part| actual.starts_with(part));
    let ends = parts.clone().next_back().is_some_and(|part| actual.ends_with(part));
    let mut rest = actual;
    let follow = parts.all(|part| rest.split_once(part).map(|(_, after)| rest = after).is_some());
    recorded.contains(char::is_control) && starts && ends && follow && actual.len() > recorded.len()
}

fn same_reference(question: &Question, recorded: &Value, actual: &Value) -> Check {
    for key in ["title", "description", "categories"] {
        ensure!(recorded[key] == actual[key], "{key} is {}", actual[key]);
    }
    for key in ["id", "url"] {
        let same = |recorded, actual| question.same_text(recorded, actual);
        let same = text(recorded, key)
            .zip(text(actual, key))
            .is_some_and(|(recorded, actual)| same(recorded, actual));
        ensure!(same, "{key} is {}", actual[key]);
    }
    Ok(())
}

fn same_sighting(question: &Question, recorded: &Value, actual: &Value) -> Check {
    ensure!(recorded["observables"] == actual["observables"], "about {}", actual["observables"]);
    for (key, limit) in [("title", 1024), ("description", 5000)] {
        same_cut(question, limit, text(recorded, key), text(actual, key))
            .map_err(|why| format!("{key} {why}"))?;
    }
    let (recorded_cells, actual_cells) =
        (cells(recorded).unwrap_or_default(), cells(actual).unwrap_or_default());
    ensure!(recorded_cells.len() == actual_cells.len(), "the table has {} columns", actual_cells.len());
    for ((name, cell), (actual_name, actual_cell)) in recorded_cells.iter().zip(&actual_cells) {
        ensure!(name.trim() == actual_name.trim(), "the column {actual_name:?} stands for {name:?}");
        let same = question.same_text(&printed(cell), &printed(actual_cell));
        let compact = !cell.starts_with(['[', '{']) || serde_json::from_str::<Value>(actual_cell).is_ok();
        let told = *actual_cell != "None";
        ensure!(same && compact && told, "{name} is {actual_cell:?}");
    }
    let cve = recorded_cells.iter().find(|(name, _)| *name == "cve").map_or("", |(_, cve)| cve.trim());
    let said = text(actual, "short_description");
    if matches!(cve, "" | "None") {
        return names_finding(said, text(actual, "title"));
    }
    same_cut(question, 2048, text(recorded, "short_description"), said)
        .map_err(|why| format!("short_description {why}"))
}

/// A cell less what may differ: blanks around it, Python's spelling of null, lists and objects.
fn printed(cell: &str) -> String {
    match cell.trim() {
        "None" => String::new(),
        list if list.starts_with(['[', '{']) => {
            let list = list.replace("None", "null").replace("True", "true").replace("False", "false");
            list.chars().filter(|c| !c.is_whitespace() && !matches!(c, '"' | '\'')).collect()
        }
        plain => plain.to_owned(),
    }
}

/// Blanks are trimmed, an empty text is an absent one, and a long one ends early with an ellipsis.
fn same_cut(question: &Question, limit: usize, recorded: Option<&str>, actual: Option<&str>) -> Check {
    let recorded = recorded.map(str::trim).unwrap_or_default();
    let said = actual.map(str::trim).unwrap_or_default();
    let same = if recorded.encode_utf16().count() > limit {
        let start = said.strip_suffix('…').or_else(|| said.strip_suffix("..."));
        start.is_some_and(|start| start.len() > limit / 2 && recorded.starts_with(start.trim_end()))
    } else {
        question.same_text(recorded, said)
    };
    ensure!(same, "is {actual:?}");
    Ok(())
}

/// A short description without a CVE names the finding instead of leaving a hole.
fn names_finding(short: Option<&str>, title: Option<&str>) -> Check {
    let short = short.unwrap_or_default();
    let whole = !short.is_empty() && !short.contains("None") && !short.contains("  ");
    let hole = short == "Vulnerability observed at CyberScan" && title.is_some();
    ensure!(
        whole && !hole && title.is_none_or(|title| short.contains(title)),
        "short_description is {short:?}"
    );
    Ok(())
}

// ----------------------------------------------------------------------- the corrected answer

/// What is right where the original is wrong.
#[derive(Clone, Copy)]
enum Want {
    /// One error item of one of these causes, and no data.
    Only(&'static [Cause]),
    /// No error and no data: the observable is filtered out, CyberScan is not asked about it.
    Filtered,
    /// No error and no data: CyberScan knows nothing that could be told.
    Empty,
    /// What the same call answers when nothing is special.
    Plain,
    /// The same, or one error item of one of these causes.
    PlainOr(&'static [Cause]),
    /// The recorded answer, each thing once: only the calls were wrong, or something came twice.
    Recorded,
    /// What another case answers about this observable, and one error item of one of these causes
    /// (if there are any) beside it.
    Part { of: &'static str, about: &'static str, beside: &'static [Cause] },
    /// One sighting.
    Finding(Finding),
}

/// Why an answer is an error item.
#[derive(Clone, Copy)]
enum Cause {
    /// `authorization error` for this reason.
    Auth(&'static str),
    /// `invalid argument` with one of these texts.
    Invalid(&'static [&'static str]),
    /// `connection error`.
    Unreachable,
    /// `unknown`, with the reason why TLS failed.
    Tls,
    /// `too many requests`, with one of these numbers of seconds in it (any if there are none).
    Throttled(&'static [&'static str]),
    /// `service unavailable`, naming this status.
    Unavailable(&'static str),
    /// `request timeout`, naming the one second of this test.
    Late,
    /// `unexpected response`.
    Unexpected,
}

/// A sighting of a vulnerability that lacks something.
#[derive(Clone, Copy)]
struct Finding {
    title: Option<&'static str>,
    description: Option<&'static str>,
    cve: Option<&'static str>,
    cells: &'static [(&'static str, &'static str)],
}

const fn auth(reason: &'static str) -> [Cause; 1] {
    [Cause::Auth(reason)]
}

const BROKEN: Want = Want::Only(&[Cause::Unexpected, Cause::Unreachable]);
const UNEXPECTED: Want = Want::Only(&[Cause::Unexpected]);
const LATE: Want = Want::Only(&[Cause::Late]);
const THROTTLED: Want = Want::Only(&[Cause::Throttled(&[])]);
const BAD_STRUCTURE: Want = Want::Only(&auth(STRUCTURE));
const BAD_PAYLOAD: Want = Want::Only(&auth(PAYLOAD));
const BAD_JWKS_HOST: Want = Want::Only(&auth(JWKS_HOST));
const HAS_EXPIRED: Want = Want::Only(&auth(EXPIRED));
/// A key that is there but cannot be used: the contract does not say in which of these words.
const UNUSABLE_KEY: Want =
    Want::Only(&[Cause::Auth(KID), Cause::Auth(JWKS_HOST), Cause::Auth(SIGNATURE), Cause::Auth(STRUCTURE)]);

/// Prefixes of the ids of all `fix` cases and what is right there; the first that fits decides.
const CORRECTED: &[(&str, Want)] = &[
    // The header has not two parts.
    ("auth.scheme_only.", Want::Only(&auth(SCHEME))),
    ("auth.token_only.", Want::Only(&auth(SCHEME))),
    ("auth.three_parts.", Want::Only(&auth(SCHEME))),
    // Base64 and JSON are read strictly, and only RS256 is believed.
    ("auth.padded_signature.", BAD_STRUCTURE),
    ("auth.junk4_in_signature.", BAD_STRUCTURE),
    ("auth.payload_nan.", BAD_STRUCTURE),
    ("auth.payload_bom.", BAD_STRUCTURE),
    ("auth.alg_", BAD_STRUCTURE),
    ("auth.hs256_", BAD_STRUCTURE),
    ("auth.rs384.", BAD_STRUCTURE),
    ("auth.rs512.", BAD_STRUCTURE),
    ("auth.ps256.", BAD_STRUCTURE),
    // RFC 7515 §4.1.11 refuses it; the contract has no words for it.
    ("auth.crit_unknown.", Want::Only(&[Cause::Auth(STRUCTURE), Cause::Auth(SIGNATURE)])),
    ("auth.kid_", Want::Only(&auth(KID))),
    // Both apply: it is null, so it is not on the list; it is null, so it is missing.
    ("auth.jwks_host_null.", Want::Only(&[Cause::Auth(JWKS_HOST), Cause::Auth(NO_JWKS_HOST)])),
    // Not on the allow-list, letter for letter.
    ("auth.jwks_host_", BAD_JWKS_HOST),
    // No key set, or none that came whole from where it was asked for.
    ("auth.jwks_resp_keys_object.", BAD_JWKS_HOST),
    ("auth.jwks_resp_list.", BAD_JWKS_HOST),
    ("auth.jwks_resp_string.", BAD_JWKS_HOST),
    ("auth.jwks_resp_number.", BAD_JWKS_HOST),
    ("auth.jwks_resp_redirect_", BAD_JWKS_HOST),
    ("auth.jwks_resp_truncated.", BAD_JWKS_HOST),
    ("auth.jwks_resp_badgzip.", BAD_JWKS_HOST),
    // The wanted key is there; another one without a kid does not spoil the set.
    ("auth.jwks_resp_second_no_kid.", Want::Plain),
    // A set without the key, or no set of keys.
    ("auth.jwks_resp_string_entry.", Want::Only(&[Cause::Auth(KID), Cause::Auth(JWKS_HOST)])),
    // ec_only, no_n, no_kty, bad_n, number_n, even_e, weak1024, alg_rs512.
    ("auth.jwks_resp_", UNUSABLE_KEY),
    ("auth.jwks_oct_hs256.", UNUSABLE_KEY),
    ("auth.aud_", Want::Only(&auth(AUDIENCE))),
    ("auth.exp_past.", HAS_EXPIRED),
    ("auth.exp_zero.", HAS_EXPIRED),
    // Dates that are no numbers: expired if read as the numbers they could stand for, else malformed.
    ("auth.exp_string_number_past.", Want::Only(&[Cause::Auth(EXPIRED), Cause::Auth(STRUCTURE)])),
    ("auth.exp_true.", Want::Only(&[Cause::Auth(EXPIRED), Cause::Auth(STRUCTURE), Cause::Auth(PAYLOAD)])),
    ("auth.exp_list.", Want::Only(&[Cause::Auth(STRUCTURE), Cause::Auth(PAYLOAD)])),
    ("auth.nbf_future.", Want::Only(&auth(NOT_YET_VALID))),
    // The order of checks: kid, algorithm, signature, times, audience.
    ("auth.order_expired_and_wrong_aud.", HAS_EXPIRED),
    ("auth.order_alg_none_unknown_kid.", Want::Only(&auth(KID))),
    // A limit that is no number means the default.
    ("limit.list.", Want::Plain),
    ("host.null.", BAD_PAYLOAD),
    ("host.number.", BAD_PAYLOAD),
    ("host.true.", BAD_PAYLOAD),
    ("host.list.", BAD_PAYLOAD),
    ("host.surrogate.", Want::Only(&[Cause::Unreachable, Cause::Auth(STRUCTURE), Cause::Auth(PAYLOAD)])),
    ("host.conn_plain_http.", Want::Only(&[Cause::Unreachable, Cause::Tls])),
    ("host.conn_garbage_tls.", Want::Only(&[Cause::Unreachable, Cause::Tls])),
    ("host.conn_tls_hang.", Want::Only(&[Cause::Late, Cause::Unreachable])),
    // What pasting leaves around a host does not make it malformed.
    ("host.leading_space.", Want::Plain),
    ("host.trailing_space.", Want::Plain),
    ("host.newline.", Want::Plain),
    // Malformed or not allowed: never contacted.
    ("host.", Want::Only(&[Cause::Unreachable])),
    ("token.401.", Want::Only(&auth(WRONG_KEY))),
    ("token.429_retry.", Want::Only(&[Cause::Throttled(&["6", "7", "8"])])),
    ("token.429.", THROTTLED),
    ("token.500.", Want::Only(&[Cause::Unavailable("500")])),
    ("token.503.", Want::Only(&[Cause::Unavailable("503")])),
    ("token.slow.", LATE),
    // Four seconds for the whole answer, of one allowed.
    ("token.drip.", Want::Only(&[Cause::Late, Cause::Unreachable, Cause::Unexpected])),
    ("token.chunked_broken.", BROKEN),
    ("token.garbage_", Want::Only(&[Cause::Unreachable, Cause::Unexpected, Cause::Tls])),
    ("token.badgzip.", BROKEN),
    // Valid JSON, only deep: reading it is as right as giving up.
    ("token.deep.", Want::PlainOr(&[Cause::Unexpected])),
    ("token.apikey_", BAD_PAYLOAD),
    // Other statuses, redirects (with the key in hand), and whatever holds no usable access_token.
    ("token.", UNEXPECTED),
    (
        "vuln.item_only_name.",
        Want::Finding(Finding { title: Some("n"), description: None, cve: None, cells: &[("name", "n")] }),
    ),
    (
        "vuln.item_no_name.",
        Want::Finding(Finding {
            title: None,
            description: Some("d"),
            cve: Some("CVE-1"),
            cells: &[("cve", "CVE-1"), ("description", "d")],
        }),
    ),
    (
        "vuln.item_no_description.",
        Want::Finding(Finding {
            title: Some("n"),
            description: None,
            cve: Some("CVE-1"),
            cells: &[("cve", "CVE-1"), ("name", "n")],
        }),
    ),
    (
        "vuln.item_utf8_texthtml.",
        Want::Finding(Finding {
            title: Some("Größe"),
            description: Some("é"),
            cve: Some("CVE-1"),
            cells: &[("cve", "CVE-1"), ("name", "Größe"), ("description", "é")],
        }),
    ),
    (
        "vuln.item_case_keys.",
        Want::Finding(Finding {
            title: None,
            description: None,
            cve: None,
            cells: &[("CVE", "upper"), ("Name", "N"), ("Description", "D")],
        }),
    ),
    ("vuln.slow.", LATE),
    // Items and lists of the wrong type, redirects.
    ("vuln.", UNEXPECTED),
    ("domain.status_401.", Want::Only(&auth(WRONG_KEY))),
    // No page, no reference.
    ("domain.details_", Want::Empty),
    ("domain.step_status_404.", Want::Empty),
    ("domain.step_status_429.", THROTTLED),
    ("domain.step_status_500.", Want::Only(&[Cause::Unavailable("500")])),
    ("domain.step_status_502.", Want::Only(&[Cause::Unavailable("502")])),
    ("domain.step_status_503.", Want::Only(&[Cause::Unavailable("503")])),
    ("domain.step_slow.", LATE),
    ("domain.step_bad_chunk.", BROKEN),
    ("domain.step_badgzip.", BROKEN),
    ("domain.a_slash_b.", Want::Filtered),
    // Bodies that are no record (also where the original made "nothing" of them), redirects.
    ("domain.", UNEXPECTED),
    ("ip_lookup.status_429", THROTTLED),
    ("ip_lookup.status_500", Want::Only(&[Cause::Unavailable("500")])),
    ("ip_lookup.status_503", Want::Only(&[Cause::Unavailable("503")])),
    ("ip_lookup.", UNEXPECTED),
    ("body.whitespace_", Want::Filtered),
    // A thousand brackets: a list of something else, or more than a parser takes.
    (
        "body.deep_1000.",
        Want::Only(&[Cause::Invalid(&[
            "{'_schema': ['Invalid input type.']}",
            "{0: {'_schema': ['Invalid input type.']}}",
        ])]),
    ),
    // Duplicates are answered once.
    ("body.", Want::Recorded),
    // Looked up as 192.0.2.1, where nothing was found.
    ("value.ip_ipv6_mapped.", Want::Empty),
    // Unsupported types, no domain names, no addresses, addresses that are nobody's on the internet.
    ("value.", Want::Filtered),
    // Right but for a call without an address.
    ("mixed.404_then_ok.observe", Want::Recorded),
    ("mixed.404_then_ok.refer", Want::Part { of: THREE_REFERRED, about: THREE, beside: &[] }),
    (
        "mixed.ok_then_vuln_429.",
        Want::Part { of: THREE_OBSERVED, about: THREE, beside: &[Cause::Throttled(&[])] },
    ),
    ("mixed.ok_then_domain_403.", Want::Part { of: THREE_REFERRED, about: THREE, beside: &auth(WRONG_KEY) }),
    (
        "mixed.ok_then_refer_500.",
        Want::Part { of: THREE_REFERRED, about: THREE, beside: &[Cause::Unavailable("500")] },
    ),
    ("mixed.ok_then_unsupported.observe", Want::Part { of: THREE_OBSERVED, about: THREE, beside: &[] }),
    ("mixed.ok_then_unsupported.refer", Want::Part { of: THREE_REFERRED, about: THREE, beside: &[] }),
    ("mixed.unsupported_then_ok.", Want::Part { of: THREE_REFERRED, about: THREE, beside: &[] }),
    ("mixed.only_unsupported.", Want::Filtered),
];

/// The address that is fine in the mixed cases, and cases whose answers tell of it.
const THREE: &str = "192.0.2.3";
const THREE_OBSERVED: &str = "vuln.two.observe";
const THREE_REFERRED: &str = "mixed.ok_then_vuln_403.refer";

impl Answered {
    fn check_corrected(
        &self,
        want: Want,
        case: &Case,
        question: &Question,
        suite: &Suite,
        upstream: &mock::Upstream,
    ) -> Check {
        ensure!(self.body.is_some(), "no body");
        match want {
            Want::Only(causes) => {
                ensure!(self.data.is_none(), "data where an error is right");
                self.check_causes(causes, question)
            }
            Want::Filtered => {
                let asked = upstream.requests.iter().find(|call| is_resource(&call.target));
                ensure!(asked.is_none(), "CyberScan was asked {:?}", asked.map(|call| &call.target));
                self.check_empty()
            }
            Want::Empty => self.check_empty(),
            Want::Plain => self.check_plain(question, suite),
            Want::PlainOr(_) if self.items.is_empty() => self.check_plain(question, suite),
            Want::PlainOr(causes) => {
                self.check_corrected(Want::Only(causes), case, question, suite, upstream)
            }
            Want::Recorded => {
                ensure!(self.items.is_empty(), "errors");
                let recorded: Value =
                    serde_json::from_str(&case.response.text).map_err(|e| format!("the record: {e}"))?;
                self.check_data(recorded.get("data"), question)
            }
            Want::Part { of, about, beside } => {
                self.check_part(suite.case(of), about, question)?;
                if beside.is_empty() {
                    ensure!(self.items.is_empty(), "errors where all is fine");
                    return Ok(());
                }
                self.check_causes(beside, question)
            }
            Want::Finding(finding) => {
                ensure!(self.items.is_empty(), "errors");
                let [doc] = self.docs() else {
                    return Err(format!("{} sightings, not one", self.docs().len()));
                };
                finding.check(doc)
            }
        }
    }

    /// One error item, of one of these causes.
    fn check_causes(&self, causes: &[Cause], question: &Question) -> Check {
        let [item] = &self.items[..] else {
            return Err(format!("{} error items, not one", self.items.len()));
        };
        ensure!(causes.iter().any(|cause| cause.fits(item, question)), "not the right error");
        Ok(())
    }

    /// `{"data":{}}` or `{"data":[]}`.
    fn check_empty(&self) -> Check {
        ensure!(self.items.is_empty(), "errors where nothing is wrong");
        let empty = self.docs().is_empty() && self.references().is_empty();
        ensure!(empty && self.data.is_some(), "not an empty answer");
        Ok(())
    }

    fn check_plain(&self, question: &Question, suite: &Suite) -> Check {
        ensure!(self.items.is_empty(), "errors where nothing is wrong");
        let like = match question.endpoint {
            Endpoint::Observe => "ok.basic.observe",
            Endpoint::Refer => "ok.basic.refer",
            _ => "ok.health.with_list_body",
        };
        let plain: Value =
            serde_json::from_str(&suite.case(like).response.text).map_err(|e| format!("the record: {e}"))?;
        self.check_data(plain.get("data"), question)
    }

    /// The data are those that `case` recorded about `value`.
    fn check_part(&self, case: &Case, value: &str, question: &Question) -> Check {
        let mut recorded: Value =
            serde_json::from_str(&case.response.text).map_err(|e| format!("the record: {e}"))?;
        if let Some(references) = recorded["data"].as_array_mut() {
            let id = format!("ref-cyberscan-search-ip-{value}");
            references.retain(|reference| text(reference, "id") == Some(&id));
        }
        self.check_data(recorded.get("data"), question)
    }
}

impl Cause {
    fn fits(self, item: &Item, question: &Question) -> bool {
        let Item { code, message, .. } = item;
        match self {
            Self::Auth(reason) => {
                code == "authorization error" && message.strip_prefix(REFUSED) == Some(reason)
            }
            Self::Invalid(texts) => code == "invalid argument" && texts.contains(&message.as_str()),
            Self::Unreachable => code == "connection error" && names_url(message, question),
            Self::Tls => code == "unknown",
            Self::Throttled(seconds) => {
                let said = seconds.is_empty() || seconds.iter().any(|seconds| message.contains(seconds));
                code == "too many requests" && said
            }
            Self::Unavailable(status) => code == "service unavailable" && message.contains(status),
            Self::Late => code == "request timeout" && message.contains('1'),
            Self::Unexpected => code == "unexpected response",
        }
    }
}

/// The URL of the call that failed; of the token call where the host is never contacted.
fn names_url(message: &str, question: &Question) -> bool {
    let host = question.host().unwrap_or_default();
    // The lone surrogate, which no JSON text can carry: any spelling will do.
    if host == "a?.test" {
        return true;
    }
    let base = format!("{UNREACHABLE}https://{host}/api/v1/");
    match question.cyberscan() {
        Some(_) => message.starts_with(&base),
        None => message == base + "token",
    }
}

impl Finding {
    fn check(&self, doc: &Value) -> Check {
        for (key, right) in [("title", self.title), ("description", self.description)] {
            let said = text(doc, key);
            match right {
                Some(right) => ensure!(said == Some(right), "{key} is {said:?}"),
                None => {
                    ensure!(said.is_none_or(|said| !said.is_empty() && said != "None"), "{key} is {said:?}")
                }
            }
        }
        ensure!(cells(doc).as_deref() == Some(self.cells), "the table is {}", doc["data"]);
        let short = text(doc, "short_description");
        match self.cve {
            Some(cve) => {
                let right = format!("Vulnerability {cve} observed at CyberScan");
                ensure!(short == Some(&right), "short_description is {short:?}");
                Ok(())
            }
            None => names_finding(short, text(doc, "title")),
        }
    }
}
