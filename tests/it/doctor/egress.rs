//! Calls out: CyberScan, key issuers, the proxy.

use std::time::Duration;

use cyberscan_relay::{
    doctor::{Check, Options, Severity},
    sandbox::{Behaviour, IssuerBehaviour, Rule},
    tenant::ApiKey,
};
use tokio::{net::TcpListener, time::Instant};

use super::{
    World, all, bad, found,
    front::{Forward, Way, forward, reverse},
    impatient, warned,
};
use crate::faults::untrusted::{Authority, serve};

#[tokio::test]
async fn where_all_is_well_every_stage_says_so() {
    let world = World::start().await;
    let report = world.examine(&[]).await;
    for check in [
        Check::CyberScanHosts,
        Check::CyberScanName,
        Check::CyberScanAddress,
        Check::CyberScanConnection,
        Check::CyberScanTls,
        Check::CyberScanAnswer,
        Check::CyberScanLatency,
        Check::IssuerName,
        Check::IssuerAddress,
        Check::IssuerConnection,
        Check::IssuerTls,
        Check::IssuerKeys,
        Check::Clock,
    ] {
        found(&report, check, Severity::Ok, "");
    }
}

#[tokio::test]
async fn dns_guard_and_connection_failures_are_distinguished() {
    let world = World::start().await;
    let report = world
        .examine(&[
            ("RELAY_CYBERSCAN_HOSTS", "cyberscan.invalid"),
            ("RELAY_AUTH_JWKS_HOSTS", "issuer.invalid"),
        ])
        .await;
    bad(&report, Check::CyberScanName, "does not resolve");
    bad(&report, Check::IssuerName, "does not resolve");
    assert!(all(&report, Check::CyberScanTls).is_empty(), "nothing more can be said of it");
    found(&report, Check::Clock, Severity::Unknown, "no peer");

    let report = world.examine(&[("RELAY_EGRESS_ALLOW_CIDRS", "")]).await;
    bad(&report, Check::CyberScanAddress, "no public address");
    bad(&report, Check::IssuerAddress, "no public address");
    assert_eq!((world.sandbox.cyberscan.connections(), world.sandbox.issuer.connections()), (0, 0));

    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let report =
        world.examine(&[("RELAY_CYBERSCAN_HOSTS", &closed), ("RELAY_AUTH_JWKS_HOSTS", &closed)]).await;
    bad(&report, Check::CyberScanConnection, "no connection");
    bad(&report, Check::IssuerConnection, "no connection");
}

#[tokio::test]
async fn a_port_without_tls_and_too_short_time_outs_are_reported() {
    let world = World::start().await;
    let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let host = format!("localhost:{}", plain.local_addr().unwrap().port());
    let report = world
        .examine(&[
            ("RELAY_CYBERSCAN_HOSTS", &host),
            ("RELAY_AUTH_JWKS_HOSTS", &host),
            ("RELAY_EGRESS_CONNECT_TIMEOUT", "300ms"),
        ])
        .await;
    let finding = bad(&report, Check::CyberScanTls, "no TLS comes up within 300ms");
    assert!(finding.advice.contains("egress.connect_timeout"), "{finding:?}");
    bad(&report, Check::IssuerTls, "no TLS comes up");

    world.sandbox.cyberscan.latency(Duration::from_millis(600));
    let of = async |time_out| world.examine(&[("RELAY_CYBERSCAN_TIMEOUT", time_out)]).await;
    warned(&of("1s").await, Check::CyberScanLatency, "of 1s");
    bad(&of("500ms").await, Check::CyberScanLatency, "the relay waits 500ms");
    found(&of("10s").await, Check::CyberScanLatency, Severity::Ok, "");
}

#[tokio::test]
async fn an_untrusted_certificate_is_reported_with_its_reason() {
    let world = World::start().await;
    let (authority, stranger) = (Authority::new("test CA"), Authority::new("nobody's CA"));
    world.believe(&authority.pem());
    for (port, reason) in [
        (serve("localhost", (2020, 2021), Some(&authority)).await, "expired"),
        (serve("elsewhere.test", (2020, 4000), Some(&authority)).await, "doesn't match 'elsewhere.test'"),
        (serve("localhost", (2020, 4000), None).await, "self-signed certificate"),
        (serve("localhost", (2020, 4000), Some(&stranger)).await, "unable to get local issuer"),
    ] {
        let host = format!("localhost:{port}");
        let report =
            world.examine(&[("RELAY_CYBERSCAN_HOSTS", &host), ("RELAY_AUTH_JWKS_HOSTS", &host)]).await;
        bad(&report, Check::CyberScanTls, reason);
        bad(&report, Check::IssuerTls, reason);
    }
}

#[tokio::test]
async fn an_answer_that_is_not_cyberscans_is_reported() {
    let world = World::start().await;
    let status = |code| Behaviour::Status { code, retry_after: None, body: "{}".to_owned() };
    let page = |code| Behaviour::Status { code, retry_after: None, body: "<html>Sign in</html>".to_owned() };
    let redirect = Behaviour::Redirect { location: "https://login.example/secret?x=1".to_owned(), code: 302 };
    for (behaviour, words) in [
        (status(503), "status 503"),
        (page(404), "an HTML page answers (status 404)"),
        (page(403), "an HTML page answers (status 403)"),
        (status(404), "something else answers"),
        (redirect, "redirects (302) to https://login.example;"),
        (Behaviour::TruncateBody, "breaks off"),
        (Behaviour::EndlessBody, "far larger"),
    ] {
        world.sandbox.cyberscan.script(Rule::any().does(behaviour));
        let report = world.examine(&[]).await;
        let finding = bad(&report, Check::CyberScanAnswer, words);
        assert!(!finding.state.contains("secret"), "{finding:?}");
        world.sandbox.cyberscan.clear_script();
    }
    world.sandbox.cyberscan.script(Rule::any().does(status(429)));
    warned(&world.examine(&[]).await, Check::CyberScanAnswer, "throttles");
    world.sandbox.cyberscan.clear_script();
    world.sandbox.cyberscan.script(Rule::any().does(status(200)));
    warned(&world.examine(&[]).await, Check::CyberScanAnswer, "accepts a made-up API key");
}

#[tokio::test]
async fn a_peer_that_never_answers_is_a_finding_and_delays_nothing_else() {
    let world = World::start().await;
    world.sandbox.cyberscan.script(Rule::any().does(Behaviour::Hang));
    world.sandbox.issuer.respond_with(IssuerBehaviour::Hang);
    // Connections are taken, and nothing comes.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent_address = silent.local_addr().unwrap();
    let authority = Authority::new("the public URL's CA");
    world.believe(&authority.pem());
    let public = reverse(&authority, "localhost", silent_address, Way::Silent).await;
    let settings = [
        ("RELAY_REDIS_URL", &*format!("redis://{silent_address}")),
        ("RELAY_AUTH_AUDIENCES", &*format!("https://localhost:{public}")),
    ];
    let options = Options { patience: Duration::from_secs(1), ..Options::default() };
    let started = Instant::now();
    let report = world.examine_with(&settings, options).await;
    // The client itself gives up after five seconds of silence.
    assert!(started.elapsed() < Duration::from_millis(4_500), "{:?}", started.elapsed());
    bad(&report, Check::CyberScanAnswer, "no answer within 1 s");
    bad(&report, Check::IssuerKeys, "no answer within 1 s");
    bad(&report, Check::PublicAnswer, "no answer within 1 s");
    bad(&report, Check::RedisConnection, "no answer");
    assert_eq!(report.exit_status(), 1);
}

#[tokio::test]
async fn an_answer_that_is_no_key_set_is_reported() {
    let world = World::start().await;
    let issuer = &world.sandbox.issuer;
    for (behaviour, words) in [
        (IssuerBehaviour::Status(404), "status 404"),
        (IssuerBehaviour::Status(503), "status 503"),
        (IssuerBehaviour::Redirect("https://login.example/".to_owned()), "redirects (302)"),
        (IssuerBehaviour::Body("<html>".to_owned()), "an HTML page"),
        (IssuerBehaviour::Body("{}".to_owned()), "not with a key set"),
        (
            IssuerBehaviour::Body("{\"keys\":[{\"kid\":\"a\",\"kty\":\"EC\"}]}".to_owned()),
            "no key that can verify",
        ),
        (IssuerBehaviour::Endless, "far larger"),
    ] {
        issuer.respond_with(behaviour);
        bad(&world.examine(&[]).await, Check::IssuerKeys, words);
    }
    // Each has findings of its own.
    issuer.respond_with(IssuerBehaviour::Keys);
    let two = format!("{},issuer.invalid", issuer.host());
    let report = world.examine(&[("RELAY_AUTH_JWKS_HOSTS", &two)]).await;
    found(&report, Check::IssuerKeys, Severity::Ok, "1 usable key");
    assert_eq!(bad(&report, Check::IssuerName, "").about, "issuer.invalid");
}

#[tokio::test]
async fn an_api_key_is_sent_to_one_host_only() {
    let world = World::start().await;
    let with_key = |key: &str| Options { api_key: Some(ApiKey::new(key.to_owned())), ..impatient() };
    let report = world.examine_with(&[], with_key("sandbox-key")).await;
    found(&report, Check::CyberScanKey, Severity::Ok, "accepts");
    let report = world.examine_with(&[], with_key("another-key")).await;
    bad(&report, Check::CyberScanKey, "refuses");
    assert!(all(&world.examine(&[]).await, Check::CyberScanKey).is_empty());
    let host = world.sandbox.cyberscan.host();
    let two = format!("{host},{}", host.replace("localhost", "127.0.0.1"));
    world.sandbox.cyberscan.reset_counts();
    let report = world.examine_with(&[("RELAY_CYBERSCAN_HOSTS", &two)], with_key("sandbox-key")).await;
    found(&report, Check::CyberScanKey, Severity::Unknown, "one host only");
    let calls = world.sandbox.cyberscan.calls();
    assert!(calls.len() >= 2 && calls.iter().all(|call| call.status != Some(200)), "{calls:?}");
}

#[tokio::test]
async fn the_host_to_try_has_to_be_allowed_and_to_be_known() {
    let world = World::start().await;
    let report = world.examine(&[("RELAY_CYBERSCAN_HOSTS", "*")]).await;
    found(&report, Check::CyberScanHosts, Severity::Unknown, "no host to try");
    let of = |host: &str| Options { host: Some(host.to_owned()), ..impatient() };
    for host in ["elsewhere.example", "localhost:1", "https://x"] {
        let report = world.examine_with(&[], of(host)).await;
        bad(&report, Check::CyberScanHosts, "");
        assert!(all(&report, Check::CyberScanName).is_empty());
    }
    let host = format!("{}/", world.sandbox.cyberscan.host());
    let hosts = format!("*.example,{}", world.sandbox.cyberscan.host());
    let report = world.examine_with(&[("RELAY_CYBERSCAN_HOSTS", &hosts)], of(&host)).await;
    found(&report, Check::CyberScanAnswer, Severity::Ok, "");
}

#[tokio::test]
async fn every_way_an_egress_proxy_fails_is_distinguished() {
    let world = World::start().await;
    let of = async |how: Forward, userinfo: &str| {
        let proxy = format!("http://{userinfo}{}", forward(how).await);
        world.examine(&[("RELAY_EGRESS_PROXY", &proxy)]).await
    };
    let report = of(Forward::Open(Some("Basic dXNlcjpwQHNz")), "user:p%40ss@").await;
    found(&report, Check::EgressProxy, Severity::Ok, "opens a way");
    found(&report, Check::CyberScanAnswer, Severity::Ok, "");
    found(&report, Check::CyberScanName, Severity::Ok, "left to the proxy");
    let report = of(Forward::Open(Some("Basic dXNlcjpwQHNz")), "user:other@").await;
    bad(&report, Check::EgressProxy, "407");
    bad(&report, Check::CyberScanConnection, "through the proxy");
    bad(&of(Forward::Refuse(403), "").await, Check::EgressProxy, "403");
    bad(&of(Forward::Refuse(502), "").await, Check::EgressProxy, "502");
    bad(&of(Forward::Banner, "").await, Check::EgressProxy, "does not speak HTTP");
    bad(&of(Forward::Silent, "").await, Check::EgressProxy, "no answer within");
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let proxy = format!("http://{closed}");
    bad(&world.examine(&[("RELAY_EGRESS_PROXY", &proxy)]).await, Check::EgressProxy, "no connection");
}

#[tokio::test]
async fn a_login_page_in_between_is_not_taken_for_cyberscan_nor_for_a_key_issuer() {
    let world = World::start().await;
    let authority = Authority::new("a proxy that opens TLS");
    world.believe(&authority.pem());
    let nobody = "127.0.0.1:1".parse().unwrap();
    let port = reverse(&authority, "localhost", nobody, Way::Answer(200, "<html>Sign in")).await;
    let host = format!("localhost:{port}");
    let report = world.examine(&[("RELAY_CYBERSCAN_HOSTS", &host), ("RELAY_AUTH_JWKS_HOSTS", &host)]).await;
    bad(&report, Check::CyberScanAnswer, "an HTML page answers (status 200)");
    bad(&report, Check::IssuerKeys, "an HTML page");
}
