//! The way in: what stands at the public URL, and what it changes.

use cyberscan_relay::doctor::{Check, Options, Report, Severity};
use tokio::net::TcpListener;

use super::{
    World, all, bad, found,
    front::{Way, reverse},
    impatient, warned,
};
use crate::{
    faults::untrusted::{Authority, serve},
    harness::TestRelay,
};

/// What doctor says of a relay behind a proxy that does this.
async fn behind(way: Way) -> Report {
    let world = World::start().await;
    let authority = Authority::new("the public URL's CA");
    world.believe(&authority.pem());
    let relay = TestRelay::beside(&world.sandbox, &[]).await;
    let port = reverse(&authority, "localhost", relay.address, way).await;
    world.examine(&[("RELAY_AUTH_AUDIENCES", &format!("https://localhost:{port}"))]).await
}

#[tokio::test]
async fn a_url_that_leads_back_is_well_in_all_its_parts() {
    let report = behind(Way::Pass).await;
    for check in [
        Check::Audiences,
        Check::AudienceForm,
        Check::PublicName,
        Check::PublicConnection,
        Check::PublicTls,
        Check::PublicAnswer,
        Check::PublicVersion,
        Check::ProxyAuthorization,
        Check::ProxyHeaderLimit,
        Check::ProxyBodyLimit,
    ] {
        found(&report, check, Severity::Ok, "");
    }
    assert_eq!(report.exit_status(), 0, "{}", report.text(false));
}

#[tokio::test]
async fn a_public_url_that_does_not_lead_back_is_reported_with_what_answers() {
    for (way, check, words) in [
        (Way::Answer(200, "<html>Welcome"), Check::PublicAnswer, "an HTML page answers (status 200)"),
        (Way::Answer(200, "{\"data\":\"hello\"}"), Check::PublicAnswer, "no relay answers (status 200)"),
        (Way::Answer(502, "<html>Bad Gateway"), Check::PublicAnswer, "does not reach the relay"),
        (Way::Answer(503, ""), Check::PublicAnswer, "does not reach the relay"),
        (Way::Answer(400, ""), Check::PublicAnswer, "refused as HTTP"),
        (Way::Answer(400, "<html>plain HTTP to HTTPS port"), Check::PublicAnswer, "a proxy refuses"),
        (Way::Answer(401, ""), Check::PublicAnswer, "asks for credentials (401)"),
        (
            Way::Redirect("https://login.example/?next=secret"),
            Check::PublicRedirect,
            "https://login.example;",
        ),
        (Way::Redirect("/login"), Check::PublicRedirect, "another path"),
        (Way::Silent, Check::PublicAnswer, "no answer within 3 s"),
    ] {
        let report = behind(way).await;
        let finding = bad(&report, check, words);
        assert!(!finding.state.contains("secret"), "{finding:?}");
        assert!(all(&report, Check::ProxyAuthorization).is_empty(), "{way:?}");
    }
}

#[tokio::test]
async fn whatever_a_proxy_in_front_changes_is_reported() {
    bad(&behind(Way::Without("authorization")).await, Check::ProxyAuthorization, "strips");
    bad(&behind(Way::Authorized("Basic eDp5")).await, Check::ProxyAuthorization, "replaces");
    let login = Way::AnswerBearers(403, "<html>");
    bad(
        &behind(login).await,
        Check::ProxyAuthorization,
        "answers calls with a bearer token itself (status 403)",
    );
    bad(&behind(Way::Without("health-check")).await, Check::ProxyHeaders, "strips the Health-Check");
    warned(&behind(Way::AsHtml).await, Check::ProxyHeaders, "Content-Type");
    warned(&behind(Way::OfVersion("0.0.9")).await, Check::PublicVersion, "version 0.0.9");
    warned(&behind(Way::MostBody(100_000)).await, Check::ProxyBodyLimit, "status 413");
    warned(&behind(Way::MostHeader(2_000)).await, Check::ProxyHeaderLimit, "status 400");
}

#[tokio::test]
async fn dns_connection_and_tls_failures_of_the_public_url_are_distinguished() {
    let world = World::start().await;
    let at = async |url: &str| world.examine(&[("RELAY_AUTH_AUDIENCES", url)]).await;
    bad(&at("https://relay.invalid").await, Check::PublicName, "does not resolve");
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    bad(&at(&format!("https://{closed}")).await, Check::PublicConnection, "no connection");
    let stranger = Authority::new("nobody's CA");
    let port = serve("localhost", (2020, 4000), Some(&stranger)).await;
    bad(&at(&format!("https://localhost:{port}")).await, Check::PublicTls, "unable to get local issuer");
}

#[tokio::test]
async fn a_url_that_leads_to_another_relay_than_the_one_that_runs_here_is_reported() {
    let world = World::start().await;
    let authority = Authority::new("the public URL's CA");
    world.believe(&authority.pem());
    let (relay, other) =
        (TestRelay::beside(&world.sandbox, &[]).await, TestRelay::beside(&world.sandbox, &[]).await);
    let port = reverse(&authority, "localhost", relay.address, Way::Pass).await;
    let url = format!("https://localhost:{port}");
    let of = async |admin: std::net::SocketAddr| {
        let admin = admin.to_string();
        world.examine(&[("RELAY_AUTH_AUDIENCES", &url), ("RELAY_ADMIN_LISTEN", &admin)]).await
    };
    found(&of(relay.admin).await, Check::PublicInstance, Severity::Ok, "arrive at the relay that runs here");
    warned(&of(other.admin).await, Check::PublicInstance, "not at the one that runs here");
}

#[tokio::test]
async fn a_private_address_is_no_hindrance_to_the_relays_own_url() {
    let world = World::start().await;
    let authority = Authority::new("the public URL's CA");
    world.believe(&authority.pem());
    let relay = TestRelay::beside(&world.sandbox, &[]).await;
    let port = reverse(&authority, "localhost", relay.address, Way::Pass).await;
    let url = format!("https://localhost:{port}");
    let report = world.examine(&[("RELAY_AUTH_AUDIENCES", &url), ("RELAY_EGRESS_ALLOW_CIDRS", "")]).await;
    found(&report, Check::PublicAnswer, Severity::Ok, "leads to a relay");
    // With the URL on the command line, and a path that nobody takes away.
    let options = Options { url: Some(format!("{url}/prefix").parse().unwrap()), ..impatient() };
    let report = world.examine_with(&[("RELAY_AUTH_AUDIENCES", "https://relay.invalid")], options).await;
    bad(&report, Check::PublicAnswer, "to another path");
}

#[tokio::test]
async fn audiences_that_cannot_be_right_are_reported() {
    let world = World::start().await;
    let of = async |settings: &[(&str, &str)]| world.examine(settings).await;
    let report = of(&[("RELAY_AUTH_AUDIENCES", "")]).await;
    bad(&report, Check::Audiences, "derived from each request's Host header");
    let report =
        of(&[("RELAY_AUTH_AUDIENCES", ""), ("RELAY_AUTH_TRUSTED_PROXIES", "10.0.0.0/8,0.0.0.0/0")]).await;
    warned(&report, Check::Audiences, "derived");
    warned(&report, Check::TrustedProxies, "everybody");
    // What is no URL at all is a fault of the settings.
    let expected = (Check::AudienceForm, Severity::Bad, "not https");
    world.reports(&[("RELAY_AUTH_AUDIENCES", "http://relay.example.com")], "auth.audiences", expected).await;
}
