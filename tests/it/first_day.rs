//! The first day: the module type is registered with the command people use, the platform makes tokens of it, and the relay
//! answers them. And what the command says when that does not go well.

use std::{io::Read, os::fd::OwnedFd, process::Stdio, sync::Arc, time::Duration};

use cyberscan_relay::sandbox::{
    API_KEY, CLIENT_ID, CLIENT_PASSWORD, Options, PlatformBehaviour as Platform, Sandbox,
};
use rustix::{
    fs::{Mode, OFlags},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;

use crate::harness::{TestRelay, codes, list, seen};

const URL: &str = "https://relay.example.com";
const TOKEN: &str = "/iroh/oauth2/token";
const MODULE_TYPES: &str = "/iroh/iroh-int/module-type";

/// A platform, and a directory with the files of somebody who registers at it.
struct Desk {
    sandbox: Arc<Sandbox>,
    files: TempDir,
}

/// What a command has said.
struct Said {
    success: bool,
    out: String,
    err: String,
}

impl Desk {
    async fn new() -> Self {
        let sandbox = Arc::new(Sandbox::start(Options::default()).await.unwrap());
        let desk = Self { sandbox, files: TempDir::new().unwrap() };
        desk.write("ca.pem", &desk.sandbox.ca_pem);
        desk.write("id", &format!("{CLIENT_ID}\n"));
        desk.write("password", &format!("{CLIENT_PASSWORD}\n"));
        desk
    }

    fn file(&self, name: &str) -> String {
        self.files.path().join(name).to_str().unwrap().to_owned()
    }

    fn write(&self, name: &str, content: &str) {
        std::fs::write(self.files.path().join(name), content).unwrap();
    }

    /// `cyberscan-relay module-type`, with the settings that lead to the sandbox.
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cyberscan-relay"));
        command.arg("module-type").args(arguments).env_clear().kill_on_drop(true);
        command.env("RELAY_EGRESS_EXTRA_CA_FILE", self.file("ca.pem"));
        command.env("RELAY_EGRESS_ALLOW_CIDRS", "127.0.0.0/8,::1/128");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// The command for this platform, the client's id and password read from files.
    fn at_platform(&self, arguments: &[&str]) -> Command {
        let (host, id, password) = (self.sandbox.platform.host(), self.file("id"), self.file("password"));
        let mut command = self.command(&["--platform-host", &host, "--url", URL]);
        command.args(["--client-id-file", &id, "--client-password-file", &password]).args(arguments);
        command
    }

    /// Registers the module type, and fills in its form.
    async fn instance(&self, settings: Value) -> (String, String) {
        let said = run(self.at_platform(&["--register"])).await;
        assert!(said.success, "{}", said.err);
        let id = said.out.split("as module type ").nth(1).unwrap().split('.').next().unwrap().to_owned();
        let request =
            json!({"name": "CyberScan", "module_type_id": id, "visibility": "org", "settings": settings});
        (id, self.sandbox.platform.create_instance(&request).unwrap())
    }
}

async fn run(mut command: Command) -> Said {
    let output = tokio::time::timeout(Duration::from_secs(60), command.output()).await.unwrap().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let said =
        Said { success: output.status.success(), out: text(&output.stdout), err: text(&output.stderr) };
    assert!(!format!("{}{}", said.out, said.err).contains(CLIENT_PASSWORD), "{}\n{}", said.out, said.err);
    said
}

#[tokio::test]
async fn from_registration_to_the_first_sighting() {
    let desk = Desk::new().await;
    let relay = TestRelay::beside(&desk.sandbox, &[("RELAY_AUTH_AUDIENCES", URL)]).await;
    let form = json!({"custom_api_key": API_KEY, "custom_host": desk.sandbox.cyberscan.host()});
    let (id, instance) = desk.instance(form).await;

    // What was registered is what is printed, no more and no less.
    let host = desk.sandbox.platform.host();
    let printed: Value =
        serde_json::from_str(&run(desk.command(&["--platform-host", &host, "--url", URL])).await.out)
            .unwrap();
    let registered = desk.sandbox.platform.module_types().remove(0);
    assert_eq!(registered["id"], id);
    for (key, value) in printed.as_object().unwrap() {
        assert_eq!(&registered[key], value, "{key}");
    }

    let token = desk.sandbox.platform.token(&instance).unwrap();
    let health = relay.post("/health", &token, "").await.json();
    assert_eq!(health["data"]["status"], "ok", "{health}");
    let asked = list(&[("ip", "203.0.113.10"), ("domain", "mail.example")]);
    let observed = relay.post("/observe/observables", &token, asked.clone()).await.json();
    assert_eq!((seen(&observed), codes(&observed)), (vec!["203.0.113.10", "mail.example"], vec![]));
    let referred = relay.post("/refer/observables", &token, asked).await.json();
    assert!(!referred["data"].as_array().unwrap().is_empty(), "{referred}");

    // What is changed at the platform changes its tokens, and what is taken back is as before.
    let health = async |arguments: &[&str]| {
        let said = run(desk.at_platform(&[&["--update", &id], arguments].concat())).await;
        assert!(said.success && said.out.contains("is up to date"), "{}", said.err);
        relay.post("/health", &desk.sandbox.platform.token(&instance).unwrap(), "").await.json()
    };
    for (arguments, words) in [
        (&["--audience", "https://other.example"][..], "Wrong configuration-token-audience"),
        (&["--region", "eu"], "Wrong jwks_host in JWT payload"),
        (&[], r#""status":"ok""#),
    ] {
        let answer = health(arguments).await.to_string();
        assert!(answer.contains(words), "{arguments:?}: {answer}");
    }
    assert_eq!(desk.sandbox.platform.module_types().len(), 1);
}

#[tokio::test]
async fn the_limit_in_the_form_is_the_limit_of_the_answers() {
    let desk = Desk::new().await;
    let relay = TestRelay::beside(&desk.sandbox, &[("RELAY_AUTH_AUDIENCES", URL)]).await;
    let host = desk.sandbox.cyberscan.host();
    let form = json!({"custom_api_key": API_KEY, "custom_host": host, "custom_CTR_ENTITIES_LIMIT": 2});
    let (_, instance) = desk.instance(form).await;
    let token = desk.sandbox.platform.token(&instance).unwrap();
    let observed = relay.post("/observe/observables", &token, list(&[("ip", "203.0.113.10")])).await.json();
    assert_eq!(observed["data"]["sightings"]["count"], 2);
    assert_eq!(codes(&observed), ["too-many-messages-warning"]);
}

#[tokio::test]
async fn each_way_in_which_registration_fails_says_what_to_do() {
    let desk = Desk::new().await;
    let html = "<!DOCTYPE html><title>Sign in</title>";
    let echo = format!(r#"{{"error_description":"no client {CLIENT_ID}:{CLIENT_PASSWORD}"}}"#);
    let status = |code, body: &str| Platform::Status(code, body.to_owned(), String::new());
    for (path, behaviour, words) in [
        (TOKEN, status(200, html), "status 200: a page of HTML; JSON with an access_token is expected"),
        (TOKEN, status(200, r#"{"token":"secret"}"#), "status 200; JSON with an access_token is expected"),
        (TOKEN, status(302, ""), "status 302; 200 or 201 is expected. Is this the platform's host?"),
        (TOKEN, status(400, &echo), "(status 400): no client client-sandbox:<secret>"),
        (
            TOKEN,
            status(401, html),
            "does not accept the client's id and password (status 401): a page of HTML",
        ),
        (TOKEN, status(403, "{}"), "may not write module types (status 403"),
        (TOKEN, status(404, html), "Is this the platform's host?"),
        (TOKEN, Platform::Status(429, "{}".into(), "7".into()), "(status 429), try again in 7 s"),
        (TOKEN, status(503, ""), "status 503; 200 or 201 is expected. Try again later"),
        (TOKEN, Platform::LoseAnswer, "no connection. Nothing was changed"),
        (
            MODULE_TYPES,
            status(201, html),
            "status 201: a page of HTML; the module type with its id is expected",
        ),
        (MODULE_TYPES, status(200, "{}"), "the module type with its id is expected"),
        (
            MODULE_TYPES,
            status(400, r#"{"errors":{"title":"missing-required-key"}}"#),
            r#"refuses the module type (status 400): {"title":"missing-required-key"}"#,
        ),
        (MODULE_TYPES, status(401, "{}"), "Create an API client that has the scope"),
        (MODULE_TYPES, status(403, "{}"), "integration/module-type:write"),
        (
            MODULE_TYPES,
            status(409, r#"{"message":"is there"}"#),
            "(status 409): is there. If it is one of an earlier",
        ),
        (MODULE_TYPES, Platform::Status(429, String::new(), "3172s".into()), "try again in 3172 s"),
        (MODULE_TYPES, status(500, html), "status 500: a page of HTML"),
        (MODULE_TYPES, Platform::LoseAnswer, "may be there all the same"),
    ] {
        desk.sandbox.platform.respond_with(path, behaviour.clone());
        let said = run(desk.at_platform(&["--register"])).await;
        assert!(!said.success && said.err.contains(words), "{behaviour:?} of {path}: {}", said.err);
        assert_eq!(said.out, "");
        desk.sandbox.platform.respond_with(path, Platform::Works);
    }
    // Only the last of them got as far as that.
    assert_eq!(desk.sandbox.platform.module_types().len(), 1);
}

#[tokio::test]
async fn whoever_may_not_register_is_told_why() {
    let desk = Desk::new().await;
    desk.sandbox.platform.add_client("reader", CLIENT_PASSWORD, false);
    let refused = async |command: Command, words: &str| {
        let said = run(command).await;
        assert!(!said.success && said.err.contains(words), "{words} is missing: {}", said.err);
    };
    desk.write("id", "client-of-another-region");
    let words = "does not accept the client's id and password (status 401): wrong client creds. Both belong to one region";
    refused(desk.at_platform(&["--register"]), words).await;
    desk.write("id", "reader");
    refused(desk.at_platform(&["--register"]), "has the scope Integration (integration/module-type:write)")
        .await;
    for (content, words) in [
        ("", "id: empty"),
        (" \n", "id: empty"),
        ("a\nb", "the client's id is empty, or no id"),
        (&"a".repeat(5000), "more than 4096 bytes"),
    ] {
        desk.write("id", content);
        refused(desk.at_platform(&["--register"]), words).await;
    }
    desk.write("id", CLIENT_ID);
    refused(
        desk.at_platform(&["--update", "6e5b1a0c"]),
        "has no module type 6e5b1a0c that this client could see",
    )
    .await;
    refused(desk.at_platform(&[]), "needed with --register, --update or --dry-run only").await;
    let host = desk.sandbox.platform.host();
    let unasked = &["--platform-host", &host, "--url", URL, "--register"];
    refused(desk.command(unasked), "the client's id is missing; --client-id-file FILE reads it").await;

    let mut untrusting = desk.at_platform(&["--register"]);
    untrusting.env_remove("RELAY_EGRESS_EXTRA_CA_FILE");
    refused(untrusting, "An authority of your own belongs into egress.extra_ca_file").await;
    let mut guarded = desk.at_platform(&["--register"]);
    guarded.env_remove("RELAY_EGRESS_ALLOW_CIDRS");
    refused(guarded, "Has the name a private address (egress.allow_cidrs)?").await;
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    desk.write("id", CLIENT_ID);
    let mut elsewhere =
        desk.command(&["--platform-host", &format!("localhost:{}", nobody.port()), "--url", URL]);
    elsewhere.args(["--register", "--client-id-file", &desk.file("id")]);
    elsewhere.args(["--client-password-file", &desk.file("password")]);
    refused(elsewhere, "no connection. Nothing was changed. Is a proxy on the way (egress.proxy)?").await;
    assert!(desk.sandbox.platform.module_types().is_empty());
}

#[tokio::test]
async fn a_dry_run_shows_the_calls_and_makes_none() {
    let desk = Desk::new().await;
    let said = run(desk.at_platform(&["--dry-run"])).await;
    let host = desk.sandbox.platform.host();
    assert!(said.success, "{}", said.err);
    for words in [
        &format!("POST https://{host}{TOKEN}\nAuthorization: Basic <client id and password>"),
        "grant_type=client_credentials",
        &format!("POST https://{host}{MODULE_TYPES}\nAuthorization: Bearer <the token of the first answer>"),
        "\"configuration-token-alg\": \"RS256\"",
    ] {
        assert!(said.out.contains(words), "{words} is missing:\n{}", said.out);
    }
    let said = run(desk.at_platform(&["--dry-run", "--update", "6e5b1a0c"])).await;
    assert!(said.out.contains(&format!("PATCH https://{host}{MODULE_TYPES}/6e5b1a0c\n")), "{}", said.out);
    assert!(desk.sandbox.platform.calls().is_empty());
}

#[tokio::test]
async fn each_region_has_a_document_of_its_own_printed_or_in_a_file() {
    let desk = Desk::new().await;
    for (region, host) in [
        ("us", "visibility.amp.cisco.com"),
        ("EU", "visibility.eu.amp.cisco.com"),
        ("apjc", "visibility.apjc.amp.cisco.com"),
    ] {
        let printed = run(desk.command(&["--region", region, "--url", "https://Relay.Example.com/"])).await;
        assert!(printed.success, "{}", printed.err);
        let document: Value = serde_json::from_str(&printed.out).unwrap();
        assert_eq!(document["properties"]["custom_jwks_host"], host);
        assert_eq!(document["properties"]["url"], URL);
        let file = desk.file("module_type.json");
        let written = run(desk.command(&["--region", region, "--url", URL, "--output", &file])).await;
        assert!(written.success && written.out.is_empty(), "{}", written.err);
        assert_eq!(std::fs::read_to_string(file).unwrap(), printed.out);
    }
    for (arguments, words) in [
        (&["--url", URL][..], "--region <REGION>"),
        (&["--region", "mars", "--url", URL], "[possible values: us, eu, apjc]"),
        (&["--region", "us"], "--url <URL>"),
        (&["--region", "us", "--url", "http://relay.example.com"], "it has to begin with https://"),
        (&["--region", "us", "--url", URL, "--update", "a/b"], "--register prints it"),
        (
            &["--region", "us", "--url", URL, "--output", "/nowhere/file"],
            "--output: cannot write /nowhere/file",
        ),
    ] {
        let said = run(desk.command(arguments)).await;
        assert!(!said.success && said.err.contains(words), "{arguments:?}: {}", said.err);
    }
}

#[tokio::test]
async fn a_password_typed_at_the_prompt_is_not_shown() {
    let desk = Desk::new().await;
    let host = desk.sandbox.platform.host();
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let typed: OwnedFd = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    let mut command = desk.command(&["--platform-host", &host, "--url", URL, "--register"]);
    command.stdin(typed);
    let mut child = command.spawn().unwrap();
    // It holds the terminal's other end, and its end is how the reading below ends.
    drop(command);
    let mut err = child.stderr.take().unwrap();
    for (question, answer) in
        [("Id of the API client", CLIENT_ID), ("password (not shown): ", CLIENT_PASSWORD)]
    {
        let mut asked = Vec::new();
        while !String::from_utf8_lossy(&asked).contains(question) || !asked.ends_with(b": ") {
            let byte =
                tokio::time::timeout(Duration::from_secs(20), tokio::io::AsyncReadExt::read_u8(&mut err));
            asked.push(byte.await.unwrap().unwrap());
        }
        rustix::io::write(&terminal, format!("{answer}\n").as_bytes()).unwrap();
    }
    let output = child.wait_with_output().await.unwrap();
    assert!(output.status.success());
    assert_eq!(desk.sandbox.platform.module_types().len(), 1);
    let mut shown = Vec::new();
    // Ends with an error (EIO): nobody has the other end any more.
    let _ = std::fs::File::from(terminal).read_to_end(&mut shown);
    let shown = String::from_utf8_lossy(&shown);
    assert!(shown.contains(CLIENT_ID) && !shown.contains(CLIENT_PASSWORD), "{shown}");
}
