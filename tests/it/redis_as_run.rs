//! Redis as people run it: behind sentinels with passwords of their own, with TLS and client certificates, under a key
//! prefix, with few rights, as a cluster. Each with real servers; that two relays share an answer shows that it works.

use std::time::Duration;

use cyberscan_relay::sandbox::{Options, Sandbox};
use tokio::net::TcpListener;

use crate::{
    fleet::{PATIENT, RelayProcess, addresses, ask, fleet, fresh_ip, shares, sharing_within},
    harness::{AUDIENCE, TestRelay},
    redis::{Authority, RedisServer, eventually},
};

const SOON: Duration = Duration::from_secs(10);

fn words(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

/// Two relays with these settings share what they know.
async fn share(settings: &[(&str, &str)]) {
    let relays = fleet(2, &[settings, &[PATIENT]].concat()).await;
    sharing_within(SOON, &relays[0].sandbox, &addresses(&relays)).await;
}

/// The databases of a server that have keys.
async fn databases(server: &RedisServer) -> Vec<String> {
    let info: String = server.ask(&["INFO", "keyspace"]).await;
    info.lines().filter_map(|line| Some(line.split_once(":keys=")?.0.to_owned())).collect()
}

/// What a relay says of trouble with Redis, once it has been asked something.
async fn complaints(settings: &[(&str, &str)]) -> (RelayProcess, Vec<String>) {
    let sandbox = Sandbox::start(Options::default()).await.unwrap();
    let relay = RelayProcess::start(&sandbox, settings).await;
    for _ in 0..5 {
        let answer = ask(relay.address, &sandbox.token(AUDIENCE), &[("ip", &fresh_ip())]).await.unwrap();
        assert!(answer.get("errors").is_none(), "{answer}");
    }
    let said = || relay.said("redis is in trouble; the relay goes on without it");
    eventually("it is told", async || !said().is_empty()).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let reasons = said().iter().map(|line| line["reason"].as_str().unwrap().to_owned()).collect();
    (relay, reasons)
}

#[tokio::test]
async fn sentinels_have_logins_of_their_own_and_the_database_is_the_masters() {
    let master = RedisServer::process(&["--requirepass", "p@ss/w:rd"]).await;
    let lines = "sentinel auth-pass relays p@ss/w:rd";
    let sentinel = async |more: &str, arguments: &[&str]| {
        RedisServer::sentinel_with("relays", master.port(), &format!("{lines}\n{more}"), arguments).await
    };
    let open = sentinel("", &[]).await;
    let same = sentinel("", &["--requirepass", "p@ss/w:rd"]).await;
    let other = sentinel("", &["--requirepass", "p%40:x"]).await;
    let user = sentinel("user default on nopass -@all +ping +info\nuser watch on >word +@all", &[]).await;
    // One that is there and says nothing, before the one that does.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    // Nobody in the URL, and the master's login and database apart.
    let apart = [
        ("RELAY_REDIS_PASSWORD", "p@ss/w:rd"),
        ("RELAY_REDIS_DATABASE", "9"),
        ("RELAY_REDIS_SENTINEL_PASSWORD", "p%40:x"),
    ];
    let urls = format!("redis://{silent},redis://127.0.0.1:{}", other.port());
    let place = [
        ("RELAY_REDIS_URL", urls.as_str()),
        ("RELAY_REDIS_MODE", "sentinel"),
        ("RELAY_REDIS_MASTER_NAME", "relays"),
    ];
    share(&[&place[..], &apart].concat()).await;
    assert!(databases(&master).await.contains(&"db9".to_owned()));
    for sentinel in [&open, &same] {
        let urls = format!("redis://127.0.0.1:{}", sentinel.port());
        share(&[&[("RELAY_REDIS_URL", urls.as_str())], &place[1..], &apart[..2]].concat()).await;
    }

    let all: [(&RedisServer, &[(&str, &str)]); 4] = [
        (&open, &[]),
        (&same, &[]),
        (&other, &[("RELAY_REDIS_SENTINEL_PASSWORD", "p%40:x")]),
        (&user, &[("RELAY_REDIS_SENTINEL_USERNAME", "watch"), ("RELAY_REDIS_SENTINEL_PASSWORD", "word")]),
    ];
    for (number, (sentinel, own)) in all.into_iter().enumerate() {
        let database = number + 2;
        let url = |place: &str| format!("redis://:p%40ss%2Fw%3Ard@{place}/{database}");
        let urls = format!("{},{}", url(&silent), url(&format!("127.0.0.1:{}", sentinel.port())));
        let settings = [
            ("RELAY_REDIS_URL", urls.as_str()),
            ("RELAY_REDIS_MODE", "sentinel"),
            ("RELAY_REDIS_MASTER_NAME", "relays"),
        ];
        share(&[&settings, own].concat()).await;
        assert!(databases(&master).await.contains(&format!("db{database}")), "{number}");
    }
}

#[tokio::test]
async fn tls_is_spoken_with_authorities_and_certificates_of_ones_own() {
    let authority = Authority::new();
    let server = RedisServer::process(&words(&authority.arguments("yes"))).await;
    let url = format!("rediss://127.0.0.1:{}", server.argument("--tls-port").unwrap());
    let (ca, certificate, key) =
        (authority.path("ca.pem"), authority.path("client.pem"), authority.path("client.key"));
    let (believed, shown) = (
        [("RELAY_REDIS_URL", url.as_str()), ("RELAY_REDIS_CA_FILE", ca.as_str())],
        [("RELAY_REDIS_CLIENT_CERTIFICATE", certificate.as_str()), ("RELAY_REDIS_CLIENT_KEY", key.as_str())],
    );
    share(&[&believed[..], &shown].concat()).await;
    share(&[&[("RELAY_REDIS_URL", &*format!("{url}?protocol=resp3")), believed[1]][..], &shown].concat())
        .await;

    // What is wrong is told, and nothing else.
    let (_relay, told) = complaints(&[&believed[..1], &shown].concat()).await;
    assert_eq!(told, ["the certificate is refused: its authority is unknown here"]);
    let (_relay, told) = complaints(&believed).await;
    assert_eq!(told, ["it demands a client certificate"]);
    let another = Authority::new();
    let (certificate, key) = (another.path("client.pem"), another.path("client.key"));
    let strange =
        [("RELAY_REDIS_CLIENT_CERTIFICATE", certificate.as_str()), ("RELAY_REDIS_CLIENT_KEY", key.as_str())];
    let (_relay, told) = complaints(&[&believed[..], &strange].concat()).await;
    assert_eq!(told, ["it does not accept the client certificate"]);
    let misnamed = Authority::of(&["redis.example"]);
    let server = RedisServer::process(&words(&misnamed.arguments("no"))).await;
    let url = format!("rediss://127.0.0.1:{}", server.argument("--tls-port").unwrap());
    let ca = misnamed.path("ca.pem");
    let (_relay, told) = complaints(&[("RELAY_REDIS_URL", &url), ("RELAY_REDIS_CA_FILE", &ca)]).await;
    assert_eq!(told, ["the certificate is refused: it is for another name"]);
}

#[tokio::test]
async fn a_client_certificate_that_is_renewed_is_shown_from_then_on() {
    let (authority, old) = (Authority::new(), Authority::new());
    let server = RedisServer::process(&words(&authority.arguments("yes"))).await;
    let url = format!("rediss://127.0.0.1:{}", server.argument("--tls-port").unwrap());
    let files = tempfile::tempdir().unwrap();
    let file = |name: &str| files.path().join(name).to_str().unwrap().to_owned();
    let show = |authority: &Authority| {
        for name in ["client.pem", "client.key"] {
            std::fs::copy(authority.path(name), file(name)).unwrap();
        }
    };
    show(&old);
    let (ca, certificate, key) = (authority.path("ca.pem"), file("client.pem"), file("client.key"));
    let settings = [
        ("RELAY_REDIS_URL", url.as_str()),
        ("RELAY_REDIS_CA_FILE", &ca),
        ("RELAY_REDIS_CLIENT_CERTIFICATE", &certificate),
        ("RELAY_REDIS_CLIENT_KEY", &key),
        PATIENT,
    ];
    let relays = fleet(2, &settings).await;
    relays[0].observe(&[("ip", &fresh_ip())]).await;
    assert!(server.values().await.is_empty());
    show(&authority);
    sharing_within(SOON, &relays[0].sandbox, &addresses(&relays)).await;
}

#[tokio::test]
async fn sentinels_and_master_speak_tls_apart() {
    let authority = Authority::new();
    let ca = authority.path("ca.pem");
    let master = RedisServer::process(&words(&authority.arguments("no"))).await;
    let encrypted: u16 = master.argument("--tls-port").unwrap().parse().unwrap();
    let arguments = authority.arguments("no");
    let arguments = words(&arguments);
    // The sentinel itself speaks to a master by TLS only if its replication does.
    let both = RedisServer::sentinel_with("relays", encrypted, "tls-replication yes", &arguments).await;
    let other = authority.arguments("no");
    let clear = RedisServer::sentinel_with("relays", master.port(), "", &words(&other)).await;
    let of = |sentinel: &RedisServer, scheme: &str, tls: bool| {
        let port = if tls { sentinel.argument("--tls-port").unwrap() } else { sentinel.port().to_string() };
        format!("{scheme}://127.0.0.1:{port}")
    };
    for (url, tls) in [
        (of(&both, "rediss", true), ""),
        (of(&both, "rediss", false), "false"),
        (of(&clear, "redis", true), "true"),
        (of(&clear, "redis", false), ""),
    ] {
        share(&[
            ("RELAY_REDIS_URL", &url),
            ("RELAY_REDIS_MODE", "sentinel"),
            ("RELAY_REDIS_MASTER_NAME", "relays"),
            ("RELAY_REDIS_SENTINEL_TLS", tls),
            ("RELAY_REDIS_CA_FILE", &ca),
        ])
        .await;
    }
}

#[tokio::test]
async fn a_cluster_with_tls_and_a_password_is_shared() {
    let authority = Authority::new();
    let nodes = RedisServer::cluster_of(async |cluster: &[&str]| {
        let own = authority.arguments("no");
        let more = ["--tls-cluster", "yes", "--requirepass", "p@ss", "--masterauth", "p@ss"];
        RedisServer::process(&[&words(&own)[..], &more, cluster].concat()).await
    })
    .await;
    let url =
        |node: &RedisServer| format!("rediss://:p%40ss@127.0.0.1:{}", node.argument("--tls-port").unwrap());
    let urls = nodes.each_ref().map(url).join(",");
    let ca = authority.path("ca.pem");
    let settings =
        [("RELAY_REDIS_URL", urls.as_str()), ("RELAY_REDIS_MODE", "cluster"), ("RELAY_REDIS_CA_FILE", &ca)];
    share(&settings).await;
    let (_relay, told) = complaints(&settings[..2]).await;
    assert_eq!(told, ["the certificate is refused: its authority is unknown here"]);
}

#[tokio::test]
async fn all_keys_begin_with_the_prefix_and_another_prefix_is_another_cache() {
    let redis = RedisServer::process(&[]).await;
    let _: String = redis.ask(&["ACL", "SETUSER", "xdr", "on", ">word", "~xdr:*", "+@all"]).await;
    let url = format!("redis://xdr:word@127.0.0.1:{}", redis.port());
    let settings = [
        ("RELAY_REDIS_URL", url.as_str()),
        ("RELAY_REDIS_KEY_PREFIX", "xdr:"),
        ("RELAY_LIMITER_TENANT", "50/s,5000/d"),
        PATIENT,
    ];
    let relays = fleet(2, &settings).await;
    sharing_within(SOON, &relays[0].sandbox, &addresses(&relays)).await;
    let keys = redis.keys().await;
    for part in [":v", "xdr:1:clock", "xdr:1:memory", ":quota"] {
        assert!(keys.iter().any(|key| key.contains(part)), "{part} of {keys:?}");
    }
    assert!(keys.iter().all(|key| key.starts_with("xdr:1:")), "{keys:?}");
    // The same Redis, and nothing in common.
    let _: String = redis.ask(&["ACL", "SETUSER", "xdr", "~*"]).await;
    let settings = [("RELAY_REDIS_URL", url.as_str()), PATIENT];
    let other = TestRelay::beside(&relays[0].sandbox, &settings).await;
    other.observe(&[("ip", &fresh_ip())]).await;
    eventually("it has one as well", async || redis.keys().await.contains(&"relay:1:clock".to_owned())).await;
    assert!(!shares(&relays[0].sandbox, &[relays[0].address, other.address]).await);
}

#[tokio::test]
async fn a_user_with_too_few_rights_is_told_and_the_relay_is_degraded() {
    let redis = RedisServer::process(&[]).await;
    let url = format!("redis://relay:word@127.0.0.1:{}", redis.port());
    for rights in [
        &["~relay:*", "+@all", "-evalsha", "-eval"][..],
        &["~cache:*", "+@all"],
        &["~relay:*", "+@all", "-xread"],
    ] {
        let _: String =
            redis.ask(&[&["ACL", "SETUSER", "relay", "reset", "on", ">word"], rights].concat()).await;
        let (relay, told) = complaints(&[("RELAY_REDIS_URL", &url), PATIENT]).await;
        assert_eq!(told, ["NOPERM"], "{rights:?}");
        let ready = async || relay.admin("/readyz").await.unwrap().1;
        assert!(ready().await.contains("degraded"), "{rights:?}: {}", ready().await);
        assert_eq!(relay.metric("relay_redis_up").await, 0.0, "{rights:?}");
        let _: String = redis.ask(&["ACL", "SETUSER", "relay", "~*", "+@all"]).await;
        eventually("it is well again", async || ready().await.contains("\"ok\"")).await;
    }
}
