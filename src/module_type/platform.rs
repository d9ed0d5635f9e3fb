//! Owns the calls that register a module type: a token for the client, then the document. Must not know what is in the
//! document, where a client's password comes from, or how anything is shown.
//!
//! Known of the platform's interface (its description, version 1.0.107, and clients in public repositories): `POST
//! /iroh/oauth2/token` with basic authentication, `POST /iroh/iroh-int/module-type` creates, `PATCH` of one by its id
//! merges into it, and there is no `PUT`; both need the scope `integration/module-type:write`. Errors are JSON with
//! `error` and `error_description`, or `errors` where the document is at fault.

use std::{str::FromStr, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tokio::time::Instant;
use unicode_properties::{GeneralCategory, UnicodeGeneralCategory};

use super::ModuleType;
use crate::egress::{
    Host,
    client::{Call, Http, Reply, Transport},
};

/// Where a client gets its token.
pub(super) const TOKEN: &str = "/iroh/oauth2/token";
/// What it has to say there.
pub(super) const GRANT: &str = "grant_type=client_credentials";
/// Where module types are.
const MODULE_TYPES: &str = "/iroh/iroh-int/module-type";
/// How long a call may take. The client leaves a platform that is silent for some seconds before that.
const PATIENCE: Duration = Duration::from_secs(30);
/// The most bytes of an answer: it repeats the document.
const ANSWER: usize = 1 << 20;
/// The most characters shown of what the platform says.
const REASON: usize = 300;

/// An API client of the tenant: its id and password.
#[derive(Debug)]
pub struct Client {
    id: String,
    password: SecretString,
}

/// The text cannot be a client's id or password.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadClient {
    /// The id.
    #[error("the client's id is empty, or no id: one line such as client-0e3f… is expected")]
    Id,
    /// The password.
    #[error("the client's password is empty, or no password: one line is expected")]
    Password,
}

impl Client {
    /// A client; blanks and line breaks around both are left out.
    ///
    /// # Errors
    /// When one of them is empty or could not be sent: several lines, or a colon in the id.
    pub fn new(id: &str, password: &SecretString) -> Result<Self, BadClient> {
        let (id, password) = (id.trim(), password.expose_secret().trim());
        let sendable = |text: &str| !text.is_empty() && !text.chars().any(char::is_control);
        // Basic authentication (RFC 7617) ends the id at the first colon.
        if !sendable(id) || id.contains(':') || id.contains(char::is_whitespace) {
            return Err(BadClient::Id);
        }
        if !sendable(password) {
            return Err(BadClient::Password);
        }
        Ok(Self { id: id.to_owned(), password: password.into() })
    }

    fn basic(&self) -> String {
        STANDARD.encode(format!("{}:{}", self.id, self.password.expose_secret()))
    }
}

/// The id of a module type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Id(String);

/// The text is no id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an id such as 6e5b1a0c-4d2f-4c55-9d0e-1f1f6f3b7a11 is expected; --register prints it")]
pub struct NotAnId;

impl FromStr for Id {
    type Err = NotAnId;

    fn from_str(text: &str) -> Result<Self, NotAnId> {
        let text = text.trim();
        let fits = (1..=64).contains(&text.len());
        let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
        if fits && plain { Ok(Self(text.to_owned())) } else { Err(NotAnId) }
    }
}

/// What is to be done with a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// A new module type.
    Create,
    /// This one becomes what the document says.
    Update(Id),
}

impl Action {
    /// The method of the call.
    #[must_use]
    pub fn method(&self) -> Method {
        match self {
            Self::Create => Method::POST,
            Self::Update(_) => Method::PATCH,
        }
    }

    /// The path of the call.
    #[must_use]
    pub fn path(&self) -> String {
        match self {
            Self::Create => MODULE_TYPES.to_owned(),
            Self::Update(Id(id)) => format!("{MODULE_TYPES}/{id}"),
        }
    }

    /// The body of the call.
    #[must_use]
    pub fn body(&self, module_type: &ModuleType) -> Value {
        match self {
            Self::Create => module_type.document(),
            Self::Update(_) => module_type.patch(),
        }
    }
}

/// A module type as the platform has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its id.
    pub id: String,
    /// The keys whose values are not those that were sent, if any.
    pub differs: Vec<String>,
}

/// Why a module type was not registered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegisterError {
    /// No complete answer to the first call: nothing was changed.
    #[error("{host} cannot be asked: {cause}. Nothing was changed{}", hint(cause))]
    Unreachable {
        /// The platform.
        host: String,
        /// What failed.
        cause: Transport,
    },
    /// No complete answer to the call that changes something.
    #[error(
        "{host} did not answer completely: {cause}. The module type may be there all the same: look at your integrations \
         before you run this again"
    )]
    Unsure {
        /// The platform.
        host: String,
        /// What failed.
        cause: Transport,
    },
    /// The token endpoint does not know the client.
    #[error(
        "{host} does not accept the client's id and password (status {status}){reason}. Both belong to one region: is the \
         client of this one? If the password is lost, create another API client there"
    )]
    Credentials {
        /// The platform.
        host: String,
        /// 400 or 401.
        status: u16,
        /// What the platform says.
        reason: Reason,
    },
    /// The client may not do this.
    #[error(
        "the client may not write module types (status {status} of {host}){reason}. Create an API client that has the scope \
         Integration (integration/module-type:write)"
    )]
    Scope {
        /// The platform.
        host: String,
        /// 401 or 403.
        status: u16,
        /// What the platform says.
        reason: Reason,
    },
    /// The document is not what the platform wants.
    #[error("{host} refuses the module type (status {status}){reason}")]
    Document {
        /// The platform.
        host: String,
        /// 400 or 422.
        status: u16,
        /// What the platform says.
        reason: Reason,
    },
    /// It cannot be there beside what is there.
    #[error(
        "{host} has something that is in the way of this module type (status 409){reason}. If it is one of an earlier \
         registration, --update ID changes it"
    )]
    Conflict {
        /// The platform.
        host: String,
        /// What the platform says.
        reason: Reason,
    },
    /// There is nothing to update.
    #[error("{host} has no module type {id} that this client could see{reason}. Is it of another region?")]
    NoSuchType {
        /// The platform.
        host: String,
        /// The id.
        id: String,
        /// What the platform says.
        reason: Reason,
    },
    /// Too many calls.
    #[error("{host} wants fewer calls (status 429){}{reason}", after.map(|after| format!(", try again in {after} s")).unwrap_or_default())]
    TooMany {
        /// The platform.
        host: String,
        /// After how many seconds it may be tried again.
        after: Option<u64>,
        /// What the platform says.
        reason: Reason,
    },
    /// Another status, or no such answer as is expected.
    #[error("{host} answers {call} with status {status}{reason}; {expected} is expected{}", advice(*status))]
    Unexpected {
        /// The platform.
        host: String,
        /// Method and path.
        call: String,
        /// The status.
        status: u16,
        /// What the platform says.
        reason: Reason,
        /// What would be understood.
        expected: &'static str,
    },
}

fn hint(cause: &Transport) -> &'static str {
    match cause {
        Transport::Refused => ". A private address has to be in egress.allow_cidrs",
        Transport::Untrusted(_) => ". An authority of your own belongs into egress.extra_ca_file",
        Transport::Unreachable => {
            ". Is a proxy on the way (egress.proxy)? Has the name a private address (egress.allow_cidrs)?"
        }
        Transport::TimedOut | Transport::Broken | Transport::TooLarge => "",
    }
}

fn advice(status: u16) -> &'static str {
    if status >= 500 { ". Try again later" } else { ". Is this the platform's host?" }
}

/// What the platform says of a failure: on one line, not longer than a few hundred characters, without secrets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reason(String);

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, ": {}", self.0) }
    }
}

impl Reason {
    /// A proxy's log-in or an error page, mostly.
    fn html() -> Self {
        Self("a page of HTML".to_owned())
    }

    fn of(body: &[u8], secrets: &[&str]) -> Self {
        let text = match serde_json::from_slice::<Value>(body) {
            Ok(json) => told(&json).unwrap_or_else(|| json.to_string()),
            Err(_) => String::from_utf8_lossy(body).trim().to_owned(),
        };
        if text.trim_start_matches('\u{feff}').starts_with('<') {
            return Self::html();
        }
        let mut text = text;
        for secret in secrets.iter().filter(|secret| !secret.is_empty()) {
            // Faults are shown as JSON, where a secret may look different.
            let json = Value::from(*secret).to_string();
            let escaped = json.strip_prefix('"').and_then(|json| json.strip_suffix('"')).unwrap_or(secret);
            text = text.replace(secret, "<secret>").replace(escaped, "<secret>");
        }
        let mut shown = String::new();
        for (index, char) in text.chars().enumerate() {
            if index == REASON {
                shown.push('…');
                break;
            }
            // What would move the cursor, turn the text around or hide in it.
            let visible = !char.is_control() && char.general_category() != GeneralCategory::Format;
            if visible { shown.push(char) } else { shown.extend(char.escape_unicode()) }
        }
        Self(shown)
    }
}

/// The part of an error that says what is wrong.
fn told(json: &Value) -> Option<String> {
    let text = |key: &str| json.get(key)?.as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    let faults = json.get("errors").filter(|errors| !errors.is_null()).map(Value::to_string);
    let said =
        faults.or_else(|| text("error_description")).or_else(|| text("message")).or_else(|| text("error"))?;
    Some(match text("trace_id") {
        Some(trace) => format!("{said} (trace_id {trace})"),
        None => said,
    })
}

/// The platform of a region, for one client.
#[derive(Debug)]
pub struct Platform<'a> {
    /// The client for calls out.
    pub http: &'a Http,
    /// Where it answers.
    pub host: &'a Host,
    /// Who asks.
    pub client: &'a Client,
}

impl Platform<'_> {
    /// Gets a token and does `action`.
    ///
    /// # Errors
    /// As [`RegisterError`] says. Nothing is tried twice: the platform could not tell the second from another one.
    pub async fn register(&self, action: &Action, module_type: &ModuleType) -> Result<Stored, RegisterError> {
        let token = self.token().await?;
        self.send_document(action, module_type, &token).await
    }

    async fn token(&self) -> Result<SecretString, RegisterError> {
        let basic = self.client.basic();
        let authorization = ("Basic", basic.as_str());
        let body = (Bytes::from_static(GRANT.as_bytes()), "application/x-www-form-urlencoded");
        let reply = self.call(Method::POST, TOKEN, authorization, body).await;
        let reply =
            reply.map_err(|cause| RegisterError::Unreachable { host: self.host.to_string(), cause })?;
        let reason = Reason::of(&reply.body, &[&basic, self.client.password.expose_secret()]);
        let (host, status) = (self.host.to_string(), reply.status.as_u16());
        match reply.status {
            status_code if status_code.is_success() => serde_json::from_slice::<Value>(&reply.body)
                .ok()
                .and_then(|json| json.get("access_token")?.as_str().map(SecretString::from))
                .filter(|token| HeaderValue::from_str(token.expose_secret()).is_ok())
                .ok_or_else(|| RegisterError::Unexpected {
                    host,
                    call: format!("POST {TOKEN}"),
                    status,
                    // Anything else may be a token in another form.
                    reason: if reason == Reason::html() { reason } else { Reason::default() },
                    expected: "JSON with an access_token",
                }),
            StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED => {
                Err(RegisterError::Credentials { host, status, reason })
            }
            StatusCode::FORBIDDEN => Err(RegisterError::Scope { host, status, reason }),
            StatusCode::TOO_MANY_REQUESTS => Err(self.too_many(&reply, reason)),
            _ => Err(self.unexpected(&Method::POST, TOKEN, status, reason)),
        }
    }

    async fn send_document(
        &self,
        action: &Action,
        module_type: &ModuleType,
        token: &SecretString,
    ) -> Result<Stored, RegisterError> {
        let (method, path, sent) = (action.method(), action.path(), action.body(module_type));
        let body = (Bytes::from(sent.to_string()), "application/json");
        let authorization = ("Bearer", token.expose_secret());
        let reply = self.call(method.clone(), &path, authorization, body).await;
        let reply = reply.map_err(|cause| match cause {
            Transport::Refused => RegisterError::Unreachable { host: self.host.to_string(), cause },
            cause => RegisterError::Unsure { host: self.host.to_string(), cause },
        })?;
        let basic = self.client.basic();
        let secrets = [token.expose_secret(), &basic, self.client.password.expose_secret()];
        let reason = Reason::of(&reply.body, &secrets);
        let (host, status) = (self.host.to_string(), reply.status.as_u16());
        match (reply.status, action) {
            (status_code, _) if status_code.is_success() => {
                stored(&sent, &reply.body).ok_or(RegisterError::Unexpected {
                    host,
                    call: format!("{method} {path}"),
                    status,
                    reason,
                    expected: "the module type with its id",
                })
            }
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => {
                Err(RegisterError::Scope { host, status, reason })
            }
            (StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY, _) => {
                Err(RegisterError::Document { host, status, reason })
            }
            (StatusCode::CONFLICT, _) => Err(RegisterError::Conflict { host, reason }),
            (StatusCode::NOT_FOUND, Action::Update(Id(id))) => {
                Err(RegisterError::NoSuchType { host, id: id.clone(), reason })
            }
            (StatusCode::TOO_MANY_REQUESTS, _) => Err(self.too_many(&reply, reason)),
            _ => Err(self.unexpected(&method, &path, status, reason)),
        }
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        (scheme, credentials): (&str, &str),
        (body, content_type): (Bytes, &'static str),
    ) -> Result<Reply, Transport> {
        let mut headers = HeaderMap::new();
        // Neither base64 nor a token that was looked at can be refused here.
        let mut authorization =
            HeaderValue::from_str(&format!("{scheme} {credentials}")).map_err(|_| Transport::Refused)?;
        authorization.set_sensitive(true);
        headers.insert(header::AUTHORIZATION, authorization);
        headers.insert(header::ACCEPT, HeaderValue::from_static("application/json"));
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
        let agent = concat!("cyberscan-relay/", env!("CARGO_PKG_VERSION"));
        headers.insert(header::USER_AGENT, HeaderValue::from_static(agent));
        let deadline = Instant::now() + PATIENCE;
        let call = Call { method, host: self.host, path, headers, json: Some(body), limit: ANSWER, deadline };
        self.http.send(call).await
    }

    fn too_many(&self, reply: &Reply, reason: Reason) -> RegisterError {
        let after = reply.headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
        // "3172s" is what the platform's own description has.
        let after = after.and_then(|text| text.trim().trim_end_matches('s').parse().ok());
        RegisterError::TooMany { host: self.host.to_string(), after, reason }
    }

    fn unexpected(&self, method: &Method, path: &str, status: u16, reason: Reason) -> RegisterError {
        let expected = if method == Method::POST { "200 or 201" } else { "200" };
        RegisterError::Unexpected {
            host: self.host.to_string(),
            call: format!("{method} {path}"),
            status,
            reason,
            expected,
        }
    }
}

/// What the platform has made of what was `sent`.
fn stored(sent: &Value, body: &[u8]) -> Option<Stored> {
    let has: Value = serde_json::from_slice(body).ok()?;
    let id: Id = has.get("id")?.as_str()?.parse().ok()?;
    let mut differs = Vec::new();
    for (key, value) in sent.as_object()? {
        let has = has.get(key).unwrap_or(&Value::Null);
        match value.as_object() {
            Some(properties) => {
                let changed =
                    properties.iter().filter(|(name, value)| has.get(name).unwrap_or(&Value::Null) != *value);
                differs.extend(changed.map(|(name, _)| format!("{key}.{name}")));
            }
            None if value != has => differs.push(key.clone()),
            None => {}
        }
    }
    Some(Stored { id: id.0, differs })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        egress::Config,
        module_type::Region,
        sandbox::{CLIENT_ID, CLIENT_PASSWORD, Options, PlatformBehaviour, Sandbox},
    };

    #[tokio::test]
    async fn a_platform_that_never_answers_is_left_in_time() {
        let ca = tempfile::NamedTempFile::new().unwrap();
        for (path, calls, words) in [
            (TOKEN, 1, "no answer in time. Nothing was changed"),
            (MODULE_TYPES, 2, "no answer in time. The module type may be there all the same"),
        ] {
            let sandbox = Sandbox::start(Options::default()).await.unwrap();
            std::fs::write(ca.path(), &sandbox.ca_pem).unwrap();
            sandbox.platform.respond_with(path, PlatformBehaviour::Hang);
            let http = Http::new(&Config {
                allow_cidrs: vec!["127.0.0.0/8".parse().unwrap(), "::1/128".parse().unwrap()],
                proxy: None,
                extra_ca_file: Some(ca.path().to_owned()),
                connect_timeout: Duration::from_secs(2),
            })
            .unwrap();
            let host = sandbox.platform.host().parse().unwrap();
            let client = Client::new(CLIENT_ID, &CLIENT_PASSWORD.into()).unwrap();
            let module_type = ModuleType {
                url: "https://relay.example.com".parse().unwrap(),
                audience: None,
                jwks_host: Region::Us.host().to_owned(),
            };
            let platform = Platform { http: &http, host: &host, client: &client };
            // The clock stands still once the platform has the call: then only time-outs go on.
            let stop_the_clock = async {
                while sandbox.platform.calls().len() < calls {
                    tokio::task::yield_now().await;
                }
                tokio::time::pause();
            };
            let (registered, ()) =
                tokio::join!(platform.register(&Action::Create, &module_type), stop_the_clock);
            let error = registered.unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
            tokio::time::resume();
        }
    }

    #[test]
    fn a_client_is_two_single_lines_as_they_stand_in_a_file() {
        let client =
            |id: &str, password: &str| Client::new(id, &password.into()).map(|client| client.basic());
        assert_eq!(client("id\n", "  pass word\r\n"), Ok(STANDARD.encode("id:pass word")));
        for id in ["", "\n", "a:b", "two words", "a\nb"] {
            assert_eq!(client(id, "p"), Err(BadClient::Id), "{id:?}");
        }
        for password in ["", " \n", "a\nb"] {
            assert_eq!(client("id", password), Err(BadClient::Password), "{password:?}");
        }
        let shown = format!("{:?}", Client::new("id", &"secret-word".into()).unwrap());
        assert!(!shown.contains("secret-word"), "{shown}");
    }

    #[test]
    fn an_id_cannot_lead_to_another_path() {
        assert_eq!("6e5b1a0c-4d2f\n".parse(), Ok(Id("6e5b1a0c-4d2f".to_owned())));
        for text in ["", "a/b", "..", "a?b", "a b", "%2e", &"a".repeat(65)] {
            assert_eq!(text.parse::<Id>(), Err(NotAnId), "{text:?}");
        }
    }

    #[test]
    fn what_the_platform_says_is_shown_on_one_line_bounded_and_without_secrets() {
        let reason = |body: &str| Reason::of(body.as_bytes(), &["hunter2", "quo\"te\\d", ""]).to_string();
        for (body, shown) in [
            ("", ""),
            ("{}", ": {}"),
            (r#"{"error":"invalid_client"}"#, ": invalid_client"),
            (r#"{"error":"x","error_description":"why","trace_id":"7"}"#, ": why (trace_id 7)"),
            (r#"{"errors":{"title":"missing"},"value":{"logo":"long"}}"#, r#": {"title":"missing"}"#),
            (r#"{"message":"no hunter2 here"}"#, ": no <secret> here"),
            ("plain hunter2\u{1b}[31m\r\nred \u{202e}", r": plain <secret>\u{1b}[31m\u{d}\u{a}red \u{202e}"),
            (r#"{"errors":{"password":"quo\"te\\d"}}"#, r#": {"password":"<secret>"}"#),
            (" \n<html>gateway</html>", ": a page of HTML"),
            ("\u{feff}<!DOCTYPE html><title>hunter2</title>", ": a page of HTML"),
        ] {
            assert_eq!(reason(body), shown, "{body}");
        }
        assert_eq!(reason(&"ä".repeat(5000)).chars().count(), REASON + ": …".chars().count());
        assert!(!Reason::of(b"\xff\xfe", &[]).to_string().is_empty());
    }

    #[test]
    fn what_is_stored_otherwise_than_sent_is_named() {
        let sent = json!({"title": "a", "tips": "b", "properties": {"url": "u", "gone": null}});
        let differs = |body: Value| stored(&sent, body.to_string().as_bytes()).map(|stored| stored.differs);
        let whole = json!({"id": "7", "org_id": "o", "title": "a", "tips": "b", "properties": {"url": "u", "more": 1}});
        assert_eq!(differs(whole), Some(vec![]));
        let other = json!({"id": "7", "title": "a", "properties": {"url": "x", "gone": "still"}});
        assert_eq!(
            differs(other),
            Some(vec!["tips".into(), "properties.url".into(), "properties.gone".into()])
        );
        assert_eq!(differs(json!({"title": "a"})), None);
        assert_eq!(differs(json!([])), None);
    }
}
