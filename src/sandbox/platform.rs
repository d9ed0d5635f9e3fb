//! Owns the fake platform, SecureX/XDR as a relay meets it: API clients and their tokens, module types, their instances,
//! and the token that it sends to a relay on behalf of an instance. It answers where the key issuer does, as the real one.
//! Must not know how relays or our own module type look.
//!
//! It is as strict as the platform's interface description (`iroh-int` 1.0.107): unknown keys, a missing title or
//! default_name and wrong types are refused; a module type is changed by PATCH, which merges, and never by PUT. What an
//! instance's settings may hold beyond the form is not described; here it is refused. One route is its own: `GET
//! /iroh/iroh-int/module-instance/ID/token`, the token that the real one sends to relays only.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use http::{HeaderMap, Method, Request, Response, header};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::{
    FakeIssuer, lock,
    tls::{self, Answer, Body, Lifetime, Listener},
};

/// The id of the API client that is there from the start and may write.
pub const CLIENT_ID: &str = "client-sandbox";
/// Its password.
pub const CLIENT_PASSWORD: &str = "sandbox-password";

/// The most bytes of a request's body.
const BODY: usize = 1 << 20;

/// How the platform answers a call to its API.
#[derive(Clone, Debug)]
pub enum PlatformBehaviour {
    /// As it should.
    Works,
    /// With this status, this body and, where it is not empty, this `Retry-After`.
    Status(u16, String, String),
    /// Never.
    Hang,
    /// It does what it is asked for and closes the connection without an answer.
    LoseAnswer,
}

/// A cheap handle on the fake platform.
#[derive(Clone)]
pub struct FakePlatform {
    issuer: FakeIssuer,
    state: Arc<Mutex<State>>,
}

struct State {
    clients: HashMap<String, ApiClient>,
    /// Access tokens and whether they may write.
    tokens: HashMap<String, bool>,
    module_types: HashMap<String, Value>,
    /// Type and settings.
    instances: HashMap<String, (String, Map<String, Value>)>,
    /// Behaviours by the first part of the path they are for.
    behaviour: HashMap<&'static str, PlatformBehaviour>,
    calls: Vec<String>,
}

struct ApiClient {
    password: String,
    may_write: bool,
}

impl FakePlatform {
    pub(super) fn start(listener: Listener, issuer: FakeIssuer, lifetime: Lifetime) -> Self {
        let state = State {
            clients: HashMap::new(),
            tokens: HashMap::new(),
            module_types: HashMap::new(),
            instances: HashMap::new(),
            behaviour: HashMap::new(),
            calls: Vec::new(),
        };
        let platform = Self { issuer, state: Arc::new(Mutex::new(state)) };
        platform.add_client(CLIENT_ID, CLIENT_PASSWORD, true);
        listener.serve(platform.clone(), lifetime);
        platform
    }

    /// Where it listens: `localhost:41234`. It is the key issuer's address as well.
    #[must_use]
    pub fn host(&self) -> String {
        self.issuer.host()
    }

    /// Makes an API client, with or without the scope to write module types.
    pub fn add_client(&self, id: &str, password: &str, may_write: bool) {
        let client = ApiClient { password: password.to_owned(), may_write };
        lock(&self.state).clients.insert(id.to_owned(), client);
    }

    /// Answers calls whose path begins with `path` this way from now on; the longest beginning counts.
    pub fn respond_with(&self, path: &'static str, behaviour: PlatformBehaviour) {
        lock(&self.state).behaviour.insert(path, behaviour);
    }

    /// The module types, as they were registered and changed.
    #[must_use]
    pub fn module_types(&self) -> Vec<Value> {
        lock(&self.state).module_types.values().cloned().collect()
    }

    /// Every call to the API since the start, as method and path.
    #[must_use]
    pub fn calls(&self) -> Vec<String> {
        lock(&self.state).calls.clone()
    }

    /// Does what an administrator does who fills in a module type's form; the answer is the instance's id.
    ///
    /// # Errors
    /// What is wrong, by name.
    pub fn create_instance(&self, request: &Value) -> Result<String, Value> {
        let mut faults = Faults::default();
        faults.object("", request, &INSTANCE, &["name", "module_type_id", "visibility"]);
        let mut state = lock(&self.state);
        let type_id = request.get("module_type_id").and_then(Value::as_str).unwrap_or_default().to_owned();
        let settings = request.get("settings").and_then(Value::as_object).cloned().unwrap_or_default();
        match state.module_types.get(&type_id) {
            Some(module_type) => faults.form(module_type, &settings),
            None => faults.add("module_type_id", "no such module type"),
        }
        faults.none()?;
        let id = Uuid::new_v4().to_string();
        state.instances.insert(id.clone(), (type_id, settings));
        Ok(id)
    }

    /// The token that is sent to the relay for an instance: what module type and form say, and nothing else.
    ///
    /// # Errors
    /// When there is no such instance, or its module type does not say how tokens are made.
    pub fn token(&self, instance: &str) -> Result<String, &'static str> {
        let state = lock(&self.state);
        let (type_id, settings) = state.instances.get(instance).ok_or("no such instance")?;
        let module_type = state.module_types.get(type_id).ok_or("no such module type")?;
        let properties = module_type.get("properties").and_then(Value::as_object);
        let properties = properties.ok_or("the module type has no properties")?;
        let text = |name: &str| properties.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        if text("auth-type") != Some("configuration-token") {
            return Err("auth-type is not configuration-token");
        }
        if text("configuration-token-alg") != Some("RS256") {
            return Err("configuration-token-alg is not RS256");
        }
        let audience = text("configuration-token-audience").or_else(|| text("url"));
        let mut claims = Map::new();
        claims.insert("aud".to_owned(), audience.ok_or("neither an audience nor a URL")?.into());
        for (key, value) in properties.iter().chain(settings) {
            if let Some(claim) = key.strip_prefix("custom_") {
                claims.insert(claim.to_owned(), value.clone());
            }
        }
        Ok(self.issuer.mint(&claims.into()))
    }

    fn behaviour(&self, path: &str) -> PlatformBehaviour {
        let state = lock(&self.state);
        let fitting = state.behaviour.iter().filter(|(beginning, _)| path.starts_with(**beginning));
        fitting
            .max_by_key(|(beginning, _)| beginning.len())
            .map_or(PlatformBehaviour::Works, |(_, behaviour)| behaviour.clone())
    }

    fn respond(&self, method: &Method, path: &str, headers: &HeaderMap, body: &[u8]) -> Response<Body> {
        if (method, path) == (&Method::POST, "/iroh/oauth2/token") {
            return self.grant(headers, body);
        }
        let Some(rest) = path.strip_prefix("/iroh/iroh-int/") else {
            return refuse(404, "not_found", "no such route");
        };
        let may_write = match bearer(headers).and_then(|token| lock(&self.state).tokens.get(&token).copied())
        {
            Some(may_write) => may_write,
            None => return refuse(401, "invalid_request", "No JWT found in HTTP Authorization header"),
        };
        if *method != Method::GET && !may_write {
            return refuse(403, "missing_scope", "required scopes: integration/module-type:write");
        }
        let json: Value = if *method == Method::GET {
            Value::Null
        } else {
            match serde_json::from_slice(body) {
                Ok(json) => json,
                Err(_) => return refuse(400, "invalid_request", "the body is no JSON"),
            }
        };
        match (method.as_str(), rest.split_once('/').map_or((rest, None), |(kind, id)| (kind, Some(id)))) {
            ("GET", ("module-type", None)) => answer(200, &self.module_types().into()),
            ("POST", ("module-type", None)) => self.create(json),
            ("GET", ("module-type", Some(id))) => match lock(&self.state).module_types.get(id) {
                Some(module_type) => answer(200, module_type),
                None => refuse(404, "module_type_not_found", "Module Type not found"),
            },
            ("PATCH", ("module-type", Some(id))) => self.change(id, json),
            ("POST", ("module-instance", None)) => match self.create_instance(&json) {
                Ok(id) => {
                    let mut created = json;
                    extend(&mut created, &[("id", id.into()), ("enabled", true.into())]);
                    answer(201, &created)
                }
                Err(faults) => answer(400, &json!({"errors": faults})),
            },
            // The real platform shows this to nobody but the relay.
            ("GET", ("module-instance", Some(path))) => {
                match path.strip_suffix("/token").ok_or("no such route").and_then(|id| self.token(id)) {
                    Ok(token) => answer(200, &json!({"token": token})),
                    Err(why) => refuse(404, "not_found", why),
                }
            }
            (_, ("module-type" | "module-instance", _)) => {
                refuse(405, "method_not_allowed", "Method not allowed")
            }
            _ => refuse(404, "not_found", "no such route"),
        }
    }

    fn grant(&self, headers: &HeaderMap, body: &[u8]) -> Response<Body> {
        let form =
            headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind == "application/x-www-form-urlencoded");
        if !form || body != b"grant_type=client_credentials" {
            return refuse(400, "unsupported_grant_type", "grant_type is missing or unknown");
        }
        let credentials = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let credentials = credentials.and_then(|value| STANDARD.decode(value.strip_prefix("Basic ")?).ok());
        let credentials = credentials.and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or_default();
        let (id, password) = credentials.split_once(':').unwrap_or_default();
        let mut state = lock(&self.state);
        let Some(client) = state.clients.get(id).filter(|client| client.password == password) else {
            return refuse(401, "invalid_client", "wrong client creds");
        };
        let (token, may_write) = (Uuid::new_v4().to_string(), client.may_write);
        state.tokens.insert(token.clone(), may_write);
        answer(
            200,
            &json!({"access_token": token, "token_type": "bearer", "expires_in": 600, "scope": "integration"}),
        )
    }

    fn create(&self, mut document: Value) -> Response<Body> {
        let mut faults = Faults::default();
        faults.module_type(&document, false);
        if let Err(faults) = faults.none() {
            return answer(400, &json!({"errors": faults}));
        }
        let id = Uuid::new_v4().to_string();
        let own = [
            ("id", id.as_str().into()),
            ("record", "relay-module.module/RelayModule".into()),
            ("org_id", "sandbox".into()),
            ("user_id", "sandbox".into()),
            ("client_id", CLIENT_ID.into()),
            ("enabled", true.into()),
            ("visibility", "org".into()),
            ("created_at", "2026-01-01T00:00:00.000Z".into()),
        ];
        extend(&mut document, &own);
        let created = answer(201, &document);
        lock(&self.state).module_types.insert(id, document);
        created
    }

    fn change(&self, id: &str, patch: Value) -> Response<Body> {
        let mut faults = Faults::default();
        faults.module_type(&patch, true);
        let mut state = lock(&self.state);
        let Some(module_type) = state.module_types.get_mut(id) else {
            return refuse(404, "module_type_not_found", "Module Type not found");
        };
        if let Err(faults) = faults.none() {
            return answer(400, &json!({"errors": faults}));
        }
        merge(module_type, patch);
        answer(200, module_type)
    }
}

impl Answer for FakePlatform {
    async fn answer(&self, request: Request<Incoming>) -> io::Result<Response<Body>> {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        if !path.starts_with("/iroh/") {
            return self.issuer.answer(request).await;
        }
        lock(&self.state).calls.push(format!("{method} {path}"));
        let (head, body) = request.into_parts();
        let Ok(body) = Limited::new(body, BODY).collect().await else {
            return Ok(refuse(413, "too_large", "the body is too large"));
        };
        let behaviour = self.behaviour(&path);
        match behaviour {
            PlatformBehaviour::Works => {}
            PlatformBehaviour::Status(code, body, retry_after) => {
                let answer = tls::json(code, tls::whole(body));
                let later = !retry_after.is_empty();
                return Ok(if later {
                    tls::with_header(answer, header::RETRY_AFTER, &retry_after)
                } else {
                    answer
                });
            }
            PlatformBehaviour::Hang => std::future::pending().await,
            PlatformBehaviour::LoseAnswer => {
                self.respond(&method, &path, &head.headers, &body.to_bytes());
                // A peer that is gone for a while and then resets.
                tokio::time::sleep(Duration::from_millis(10)).await;
                return Err(io::ErrorKind::ConnectionReset.into());
            }
        }
        Ok(self.respond(&method, &path, &head.headers, &body.to_bytes()))
    }
}

fn answer(code: u16, json: &Value) -> Response<Body> {
    tls::json(code, tls::whole(json.to_string()))
}

fn refuse(code: u16, error: &str, description: &str) -> Response<Body> {
    answer(code, &json!({"error": error, "error_description": description}))
}

fn bearer(headers: &HeaderMap) -> Option<String> {
    headers.get(header::AUTHORIZATION)?.to_str().ok()?.strip_prefix("Bearer ").map(str::to_owned)
}

fn extend(object: &mut Value, with: &[(&str, Value)]) {
    if let Some(object) = object.as_object_mut() {
        object.extend(with.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    }
}

/// Objects are merged, everything else is replaced, `null` takes away.
fn merge(into: &mut Value, patch: Value) {
    let (Some(into), Value::Object(patch)) = (into.as_object_mut(), patch) else { return };
    for (key, value) in patch {
        match value {
            Value::Null => drop(into.remove(&key)),
            Value::Object(_) if into.get(&key).is_some_and(Value::is_object) => {
                if let Some(inner) = into.get_mut(&key) {
                    merge(inner, value);
                }
            }
            value => drop(into.insert(key, value)),
        }
    }
}

/// What may stand under a key.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    Bool,
    Integer,
    Object,
    /// A list of texts.
    Texts,
    /// One of these texts.
    OneOf(&'static [&'static str]),
    /// A list of objects with these keys, of which so many at the beginning are required.
    Objects(&'static [(&'static str, Kind)], usize),
    Any,
}

const MODULE_TYPE: [(&str, Kind); 22] = [
    ("title", Kind::Text),
    ("default_name", Kind::Text),
    ("short_description", Kind::Text),
    ("description", Kind::Text),
    ("tips", Kind::Text),
    ("logo", Kind::Text),
    ("logo_dark", Kind::Text),
    ("former_title", Kind::Text),
    ("app_link", Kind::Text),
    ("app_link_meta", Kind::Object),
    ("integration_id", Kind::Text),
    ("integration", Kind::Object),
    ("ocsf-product-uid", Kind::Text),
    ("product_categories", Kind::Any),
    ("max_nb_instances", Kind::Integer),
    ("enabled", Kind::Bool),
    ("flags", Kind::Texts),
    ("external_references", Kind::Objects(&REFERENCE, 0)),
    ("configuration_spec", Kind::Objects(&FIELD, 3)),
    ("capabilities", Kind::Objects(&CAPABILITY, 2)),
    ("properties", Kind::Object),
    ("disable_automatic_health_check", Kind::Bool),
];
const REFERENCE: [(&str, Kind); 4] =
    [("label", Kind::Text), ("link", Kind::Text), ("external_id", Kind::Text), ("class", Kind::Text)];
const FIELD: [(&str, Kind); 11] = [
    ("key", Kind::Text),
    (
        "type",
        Kind::OneOf(&[
            "remote", "password", "file", "string", "api_key", "integer", "device", "options", "boolean",
        ]),
    ),
    ("label", Kind::Text),
    ("group", Kind::Text),
    ("beta", Kind::Bool),
    ("strict-options", Kind::Bool),
    ("options", Kind::Objects(&[("value", Kind::Text), ("label", Kind::Text)], 2)),
    ("default_value", Kind::Any),
    ("tooltip", Kind::Text),
    ("required", Kind::Bool),
    ("subtype", Kind::Text),
];
const CAPABILITY: [(&str, Kind); 2] = [
    (
        "id",
        Kind::OneOf(&[
            "detection_source",
            "device_insights",
            "respond",
            "observe",
            "assets",
            "incident/resolve",
            "notifications",
            "data_ingestion",
            "target_records",
            "health",
            "automate",
            "tiles",
            "refer",
            "threat_hunts",
            "deliberate",
        ]),
    ),
    ("description", Kind::Text),
];
const INSTANCE: [(&str, Kind); 7] = [
    ("name", Kind::Text),
    ("module_type_id", Kind::Text),
    ("visibility", Kind::OneOf(&["global", "org", "user"])),
    ("parent_id", Kind::Text),
    ("settings", Kind::Object),
    ("external_references", Kind::Any),
    ("enabled", Kind::Bool),
];

/// What is wrong with a document, by the place where it is.
#[derive(Default)]
struct Faults(Map<String, Value>);

impl Faults {
    fn add(&mut self, place: &str, what: &str) {
        self.0.insert(place.to_owned(), what.into());
    }

    fn none(self) -> Result<(), Value> {
        if self.0.is_empty() { Ok(()) } else { Err(self.0.into()) }
    }

    fn module_type(&mut self, document: &Value, partial: bool) {
        let mut given = document.clone();
        if partial {
            let nullable =
                |key: &str, value: &Value| value.is_null() && !matches!(key, "title" | "default_name");
            if let Some(object) = given.as_object_mut() {
                object.retain(|key, value| !nullable(key, value));
            }
        }
        self.object("", &given, &MODULE_TYPE, if partial { &[] } else { &["title", "default_name"] });
        let properties = given.get("properties").and_then(Value::as_object);
        for (name, _) in properties.into_iter().flatten().filter(|(_, value)| value.is_null() && !partial) {
            self.add(&format!("properties.{name}"), "(not (nil? nil))");
        }
    }

    fn object(&mut self, place: &str, value: &Value, known: &[(&str, Kind)], required: &[&str]) {
        let at = |key: &str| if place.is_empty() { key.to_owned() } else { format!("{place}.{key}") };
        let Some(object) = value.as_object() else { return self.add(&at(""), "(not (map? it))") };
        for key in required.iter().filter(|key| !object.contains_key(**key)) {
            self.add(&at(key), "missing-required-key");
        }
        for (key, value) in object {
            match known.iter().find(|(name, _)| name == key) {
                Some((_, kind)) => self.kind(&at(key), value, *kind),
                None => self.add(&at(key), "disallowed-key"),
            }
        }
    }

    fn kind(&mut self, place: &str, value: &Value, kind: Kind) {
        let fits = match kind {
            Kind::Any => true,
            Kind::Text => value.is_string(),
            Kind::Bool => value.is_boolean(),
            Kind::Integer => value.is_i64() || value.is_u64(),
            Kind::Object => value.is_object(),
            Kind::Texts => value.as_array().is_some_and(|list| list.iter().all(Value::is_string)),
            Kind::OneOf(texts) => value.as_str().is_some_and(|text| texts.contains(&text)),
            Kind::Objects(known, required) => {
                let required: Vec<&str> = known.iter().take(required).map(|(key, _)| *key).collect();
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    self.object(&format!("{place}.{index}"), item, known, &required);
                }
                value.is_array()
            }
        };
        if !fits {
            self.add(place, "not what is expected there");
        }
    }

    /// Whether `settings` fill in the form of `module_type`.
    fn form(&mut self, module_type: &Value, settings: &Map<String, Value>) {
        let form =
            module_type.get("configuration_spec").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let key = |field: &Value| field.get("key").and_then(Value::as_str).unwrap_or_default().to_owned();
        for name in settings.keys().filter(|name| !form.iter().any(|field| key(field) == **name)) {
            self.add(&format!("settings.{name}"), "no such field");
        }
        for field in form {
            let place = format!("settings.{}", key(field));
            let required = field.get("required").and_then(Value::as_bool).unwrap_or_default();
            let kind = field.get("type").and_then(Value::as_str).unwrap_or_default();
            match settings.get(&key(field)) {
                None | Some(Value::Null) if required => self.add(&place, "missing-required-key"),
                Some(Value::String(text)) if required && text.is_empty() => self.add(&place, "is empty"),
                Some(value) if kind == "integer" && !value.is_number() => self.add(&place, "is no number"),
                Some(value) if matches!(kind, "string" | "api_key") && !value.is_string() => {
                    self.add(&place, "is no text");
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::tests::{client, sandbox},
        *,
    };
    use crate::sandbox::Sandbox;

    struct Caller {
        http: reqwest::Client,
        base: String,
    }

    impl Caller {
        fn of(sandbox: &Sandbox) -> Self {
            Self { http: client(sandbox), base: format!("https://{}/iroh", sandbox.platform.host()) }
        }

        async fn token(&self, id: &str, password: &str) -> (u16, Value) {
            let request =
                self.http.post(format!("{}/oauth2/token", self.base)).basic_auth(id, Some(password));
            let request = request.header("content-type", "application/x-www-form-urlencoded");
            read(request.body("grant_type=client_credentials")).await
        }

        async fn call(&self, method: Method, path: &str, token: &str, body: &Value) -> (u16, Value) {
            let request = self.http.request(method, format!("{}/iroh-int/{path}", self.base));
            read(request.bearer_auth(token).body(body.to_string())).await
        }
    }

    async fn read(request: reqwest::RequestBuilder) -> (u16, Value) {
        let answer = request.send().await.unwrap();
        let status = answer.status().as_u16();
        (status, serde_json::from_str(&answer.text().await.unwrap()).unwrap())
    }

    fn named() -> Value {
        json!({"title": "T", "default_name": "D"})
    }

    #[tokio::test]
    async fn only_who_has_password_and_scope_writes() {
        let sandbox = sandbox().await;
        sandbox.platform.add_client("reader", "pw", false);
        let caller = Caller::of(&sandbox);
        assert_eq!(caller.token(CLIENT_ID, "wrong").await.0, 401);
        assert_eq!(caller.call(Method::POST, "module-type", "made-up", &named()).await.0, 401);
        let reader = caller.token("reader", "pw").await.1["access_token"].as_str().unwrap().to_owned();
        assert_eq!(caller.call(Method::POST, "module-type", &reader, &named()).await.0, 403);
        let writer =
            caller.token(CLIENT_ID, CLIENT_PASSWORD).await.1["access_token"].as_str().unwrap().to_owned();
        let (status, created) = caller.call(Method::POST, "module-type", &writer, &named()).await;
        assert_eq!(status, 201);
        let path = format!("module-type/{}", created["id"].as_str().unwrap());
        assert_eq!(caller.call(Method::GET, &path, &reader, &Value::Null).await, (200, created));
        assert_eq!(caller.call(Method::PUT, &path, &writer, &named()).await.0, 405);
        assert_eq!(caller.call(Method::PATCH, "module-type/none", &writer, &named()).await.0, 404);
    }

    #[test]
    fn what_the_interface_does_not_describe_is_refused_by_name() {
        let faults = |document: Value, partial| {
            let mut faults = Faults::default();
            faults.module_type(&document, partial);
            faults.0.keys().cloned().collect::<Vec<String>>()
        };
        assert!(faults(named(), false).is_empty());
        assert!(faults(json!({"description": null}), true).is_empty());
        for (document, place) in [
            (json!({"title": "T"}), "default_name"),
            (json!({"default_name": "D"}), "title"),
            (json!({"title": "T", "default_name": "D", "x": 1}), "x"),
            (json!({"title": 5, "default_name": "D"}), "title"),
            (json!({"title": "T", "default_name": "D", "description": null}), "description"),
            (json!({"title": "T", "default_name": "D", "flags": [1]}), "flags"),
            (json!({"title": "T", "default_name": "D", "properties": {"url": null}}), "properties.url"),
            (
                json!({"title": "T", "default_name": "D", "capabilities": [{"id": "look", "description": ""}]}),
                "capabilities.0.id",
            ),
            (
                json!({"title": "T", "default_name": "D", "capabilities": [{"id": "health"}]}),
                "capabilities.0.description",
            ),
            (
                json!({"title": "T", "default_name": "D", "configuration_spec": [{"key": "k", "type": "text", "label": "l"}]}),
                "configuration_spec.0.type",
            ),
            (
                json!({"title": "T", "default_name": "D", "configuration_spec": [{"key": "k", "type": "string", "label": "l", "help": ""}]}),
                "configuration_spec.0.help",
            ),
        ] {
            assert_eq!(faults(document.clone(), false), [place], "{document}");
        }
        assert_eq!(faults(json!({"title": null}), true), ["title"]);
    }

    #[tokio::test]
    async fn a_token_says_what_module_type_and_form_say_and_nothing_else() {
        let sandbox = sandbox().await;
        let platform = &sandbox.platform;
        let mut document = named();
        document["configuration_spec"] = json!([
            {"key": "custom_api_key", "type": "api_key", "label": "Key", "required": true},
            {"key": "custom_limit", "type": "integer", "label": "Limit"},
        ]);
        document["properties"] = json!({
            "auth-type": "configuration-token", "configuration-token-alg": "RS256", "url": "https://relay.example",
            "custom_jwks_host": "keys.example", "supported-apis": ["health"],
        });
        assert_eq!(platform.create(document).status(), 201);
        let id = platform.module_types()[0]["id"].as_str().unwrap().to_owned();
        let request = |settings: Value| json!({"name": "n", "module_type_id": id, "visibility": "org", "settings": settings});
        for settings in [
            json!({}),
            json!({"custom_api_key": ""}),
            json!({"custom_api_key": 5}),
            json!({"custom_api_key": "k", "custom_limit": "many"}),
            json!({"custom_api_key": "k", "custom_other": "x"}),
        ] {
            assert!(platform.create_instance(&request(settings.clone())).is_err(), "{settings}");
        }
        let claims = |instance: &str| {
            let token = platform.token(instance).unwrap();
            let payload = token.split('.').nth(1).unwrap();
            let payload = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(payload).unwrap();
            serde_json::from_slice::<Value>(&payload).unwrap()
        };
        let instance = platform.create_instance(&request(json!({"custom_api_key": "k"}))).unwrap();
        let mut expected =
            json!({"aud": "https://relay.example", "jwks_host": "keys.example", "api_key": "k"});
        assert_eq!(claims(&instance), expected);
        let caller = Caller::of(&sandbox);
        let access =
            caller.token(CLIENT_ID, CLIENT_PASSWORD).await.1["access_token"].as_str().unwrap().to_owned();
        let (status, shown) = caller
            .call(Method::GET, &format!("module-instance/{instance}/token"), &access, &Value::Null)
            .await;
        assert_eq!((status, &shown["token"]), (200, &platform.token(&instance).unwrap().into()));
        assert_eq!(
            caller.call(Method::GET, "module-instance/other/token", &access, &Value::Null).await.0,
            404
        );

        let audience = |value: Value| json!({"properties": {"configuration-token-audience": value}});
        assert_eq!(platform.change(&id, audience("other".into())).status(), 200);
        expected["aud"] = "other".into();
        assert_eq!(claims(&instance), expected);
        assert_eq!(platform.change(&id, audience(Value::Null)).status(), 200);
        expected["aud"] = "https://relay.example".into();
        assert_eq!(claims(&instance), expected);
        for property in ["auth-type", "configuration-token-alg", "url"] {
            platform.change(&id, json!({"properties": {property: null}}));
            assert!(platform.token(&instance).is_err(), "{property}");
        }
    }
}
