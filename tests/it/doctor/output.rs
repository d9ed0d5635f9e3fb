//! What an operator, a script and a terminal get to see; and what nobody does.

use cyberscan_relay::{
    doctor::Check,
    sandbox::{Behaviour, Rule},
};
use serde_json::json;

use super::{
    World,
    front::{Forward, Way, forward, reverse},
    said,
};
use crate::{
    canary::Canaries, faults::untrusted::Authority, fleet::RelayProcess, harness::TestRelay,
    redis::RedisServer,
};

#[tokio::test]
async fn the_exit_status_tells_fine_bad_and_could_not_tell() {
    let world = World::start().await;
    let authority = Authority::new("the public URL's CA");
    world.believe(&authority.pem());
    let relay = TestRelay::beside(&world.sandbox, &[]).await;
    let port = reverse(&authority, "localhost", relay.address, Way::Pass).await;
    let url = format!("https://localhost:{port}");
    let fine = world.doctor(&[], &[("RELAY_AUTH_AUDIENCES", &url)]).await;
    assert_eq!(fine.status, 0, "{}", fine.out);
    let hosts = [("RELAY_AUTH_AUDIENCES", url.as_str()), ("RELAY_CYBERSCAN_HOSTS", "*")];
    assert_eq!(world.doctor(&[], &hosts).await.status, 2);
    let hosts = [("RELAY_AUTH_AUDIENCES", url.as_str()), ("RELAY_CYBERSCAN_HOSTS", "x.invalid")];
    assert_eq!(world.doctor(&[], &hosts).await.status, 1);
    for wrong in [&["--api-key-file", "/nonexistent"][..], &["--token", "/nonexistent"], &["--nonsense"]] {
        let said = world.doctor(wrong, &[]).await;
        assert!(said.status == 2 && said.out.is_empty() && !said.err.is_empty(), "{said:?}");
    }
}

#[tokio::test]
async fn a_configuration_that_would_not_serve_is_a_finding_for_each_fault() {
    let world = World::start().await;
    let said = world.doctor(&["--json"], &[("RELAY_CTIM_TLP", "purple"), ("RELAY_NONSENSE", "1")]).await;
    assert_eq!(said.status, 1);
    let report = said.json();
    let findings = report["findings"].as_array().unwrap();
    assert_eq!(findings.len(), 2, "{report}");
    assert!(
        findings
            .iter()
            .all(|finding| { finding["id"] == Check::Configuration.id() && finding["severity"] == "bad" })
    );
    assert!(findings.iter().any(|finding| finding["about"] == "ctim.tlp"), "{report}");
}

#[tokio::test]
async fn there_is_one_line_for_each_finding_and_no_colour_where_there_is_no_terminal() {
    let world = World::start().await;
    let text = world.doctor(&[], &[]).await.out;
    let report = world.doctor(&["--json"], &[]).await.json();
    assert!(!text.contains('\u{1b}'));
    assert_eq!(text.lines().count(), report["findings"].as_array().unwrap().len() + 1);
    for finding in report["findings"].as_array().unwrap() {
        let id = finding["id"].as_str().unwrap();
        assert!(text.contains(id), "{id} is not in\n{text}");
    }
    let documentation = include_str!("../../../docs/doctor.md");
    for member in report.as_object().unwrap().keys().chain(report["findings"][0].as_object().unwrap().keys())
    {
        assert!(documentation.contains(&format!("`{member}")), "{member} is not documented");
    }
    // `script` gives it a terminal.
    let on_a_terminal = async |no_colour: &str| {
        let mut script = tokio::process::Command::new("script");
        script.env_clear().env("PATH", "/usr/bin:/bin").envs(world.environment(&[("NO_COLOR", no_colour)]));
        let line = format!("{} doctor", env!("CARGO_BIN_EXE_cyberscan-relay"));
        script.args(["--quiet", "--command", &line, "/dev/null"]);
        assert!(
            std::path::Path::new("/usr/bin/script").exists(),
            "this test needs a terminal: install util-linux's script (apt-get install bsdutils)"
        );
        said(script).await.out
    };
    assert!(on_a_terminal("").await.contains("\u{1b}[32mok  "));
    assert!(!on_a_terminal("1").await.contains('\u{1b}'));
}

const KEY: &str = "canary-key-6e1f0a93c4d7";
const ADMIN: &str = "canary-admin-token-0d9c7f";
const PASSWORD: &str = "canary-password-a7c31e";
const PROXY: &str = "canary-proxy-password-77aa";
const SEAL: &str = "c0ffee00c0ffee11c0ffee22c0ffee33c0ffee44c0ffee55c0ffee66c0ffee77";

#[tokio::test]
async fn no_secret_is_in_any_output_whatever_goes_wrong() {
    let world = World::start().await;
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    world.sandbox.cyberscan.accept_key(KEY);
    let mut claims = world.sandbox.claims(crate::harness::AUDIENCE);
    claims["api_key"] = json!(KEY);
    claims["custom"] = json!("canary-claim-94ab");
    let token = world.sandbox.issuer.mint(&claims);
    let (key_file, token_file) = (file("key", KEY), file("token", &token));
    let redis = RedisServer::process(&["--requirepass", PASSWORD]).await;
    let right = format!("redis://:{PASSWORD}@127.0.0.1:{}", redis.port());
    let wrong = format!("redis://someone:{PASSWORD}@127.0.0.1:{}", redis.port());
    let echo =
        Behaviour::Status { code: 500, retry_after: None, body: format!("{{\"error\": \"{KEY} {token}\"}}") };
    let proxy = format!("http://user:{PROXY}@{}", forward(Forward::Refuse(407)).await);
    let mut outputs = Vec::new();
    for (url, proxy, broken) in [
        (right.as_str(), "", false),
        (wrong.as_str(), "", true),
        (&right.replace("redis://", "rediss://"), proxy.as_str(), false),
        (&format!("redis://:{PASSWORD}@redis.invalid:6379"), "", false),
    ] {
        if broken {
            world.sandbox.cyberscan.script(Rule::any().does(echo.clone()));
        }
        let settings = [
            ("RELAY_REDIS_URL", url),
            ("RELAY_EGRESS_PROXY", proxy),
            ("RELAY_ADMIN_TOKEN", ADMIN),
            ("RELAY_REDIS_ENCRYPTION_KEY", SEAL),
        ];
        for arguments in [
            &["--api-key-file", &key_file][..],
            &["--api-key-file", &key_file, "--json"],
            &["--token", &token_file],
            &["--token", &token_file, "--json"],
        ] {
            outputs.push(world.doctor(arguments, &settings).await);
        }
        world.sandbox.cyberscan.clear_script();
    }
    // A configuration that is refused, too; and tokens that are none.
    let url = format!("redis://:{PASSWORD}@:x");
    outputs.push(world.doctor(&[], &[("RELAY_REDIS_URL", &url), ("RELAY_EGRESS_PROXY", PROXY)]).await);
    for text in [&token[..token.len() - 9], &format!("Basic {token}"), &format!("{token}\n{token}"), KEY] {
        outputs.push(world.doctor(&["--token", &file("odd", text)], &[]).await);
    }
    let mut command = RelayProcess::command();
    command.arg("doctor").arg("--api-key-file").arg(&key_file);
    outputs.push(said(command).await);

    let signature = token.rsplit('.').next().unwrap();
    let payload = token.split('.').nth(1).unwrap();
    let secrets =
        Canaries::of(&[KEY, ADMIN, PASSWORD, PROXY, SEAL, &token, signature, payload, "canary-claim-94ab"]);
    for output in &outputs {
        assert!(output.out.len() + output.err.len() > 50, "{output:?}");
        secrets.must_not_be_in("standard output", output.out.as_bytes());
        secrets.must_not_be_in("standard error", output.err.as_bytes());
    }
    // The hunt was in the right places.
    assert!(outputs[0].out.contains("cyberscan-key") && outputs[0].out.contains("accepts the API key"));
    assert!(outputs[2].out.contains("A relay accepts it."), "{}", outputs[2].out);
}
