//! Faults of what the relay runs on: its process, its machine's files and clock, names, certificates, and hosts that
//! are not there. What CyberScan answers is in `upstream`, Redis in `redis_trouble`, what is measured under load in
//! the test binary `overload`.

use std::{
    fs::File,
    net::SocketAddr,
    os::unix::fs::FileExt,
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cyberscan_relay::sandbox::{Behaviour, Call, IssuerBehaviour, Options, Rule, Sandbox};
use http::StatusCode;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::Command,
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use crate::{
    fleet::{Load, PATIENT, RelayProcess, ask, fresh_ip, sharing_within},
    harness::{AUDIENCE, TestRelay, codes, list, sandbox_settings, seen},
    redis::{RedisServer, eventually, free_port},
};

const IP: &str = "203.0.113.10";

async fn sandbox() -> Sandbox {
    Sandbox::start(Options::default()).await.unwrap()
}

/// What a relay says about `ip`; whole, or the test has failed.
async fn whole(relay: SocketAddr, token: &str, ip: &str) {
    let answer = ask(relay, token, &[("ip", ip)]).await.unwrap();
    assert!(answer.get("errors").is_none() && seen(&answer) == [ip], "{answer}");
}

// Redis.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_redis_that_refuses_the_user_costs_no_answer_and_one_line_in_the_log() {
    let redis = RedisServer::process(&[]).await;
    let sandbox = sandbox().await;
    let url = format!("redis://relay:secret@127.0.0.1:{}", redis.port());
    for rights in [&["on", ">another"][..], &["on", "resetpass", ">secret", "resetkeys", "-@all"]] {
        let _: String = redis.ask(&[&["ACL", "SETUSER", "relay"], rights].concat()).await;
        let relay = RelayProcess::start(&sandbox, &[("RELAY_REDIS_URL", url.as_str()), PATIENT]).await;
        let load = Load::at(&[relay.address], &sandbox.token(AUDIENCE));
        load.answered(60).await;
        sleep(Duration::from_secs(2)).await;
        load.answered(60).await;
        let trouble = relay.said("redis is in trouble; the relay goes on without it");
        assert_eq!(trouble.len(), 1, "{trouble:?}");
        let _: String =
            redis.ask(&["ACL", "SETUSER", "relay", "resetpass", ">secret", "~*", "&*", "+@all"]).await;
        let other = RelayProcess::start(&sandbox, &[("RELAY_REDIS_URL", url.as_str()), PATIENT]).await;
        sharing_within(Duration::from_secs(10), &sandbox, &[relay.address, other.address]).await;
        load.end_without_a_failure().await;
        let _: u8 = redis.ask(&["ACL", "DELUSER", "relay"]).await;
    }
}

// CyberScan and its name.

#[tokio::test]
async fn a_host_that_refuses_connections_is_answered_for_with_what_is_known_then_with_its_age() {
    let sandbox = sandbox().await;
    let settings = [("RELAY_CACHE_FRESH", "4s"), ("RELAY_CACHE_STALE_WHILE_REVALIDATE", "0s")];
    let relay = RelayProcess::start(&sandbox, &settings).await;
    let token = sandbox.token(AUDIENCE);
    let url = format!("https://{}/api/v1/vulnerabilities/ip/198.51.100.7", sandbox.cyberscan.host());
    whole(relay.address, &token, IP).await;
    sandbox.stop().await;

    whole(relay.address, &token, IP).await;
    let started = Instant::now();
    let unknown = ask(relay.address, &token, &[("ip", "198.51.100.7")]).await.unwrap();
    let took = started.elapsed();
    let message = format!("Unable to connect to CyberScan, validate the configured API endpoint: {url}");
    let error = json!({"type": "fatal", "code": "connection error", "message": message});
    assert_eq!(unknown, json!({"errors": [error]}));
    eprintln!("refused upstream: \"connection error\" after {took:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");

    let stale = async || {
        let answer = ask(relay.address, &token, &[("ip", IP)]).await.unwrap();
        assert_eq!(seen(&answer), [IP]);
        match codes(&answer)[..] {
            [] => false,
            ["stale data"] => answer["errors"][0]["type"] == "warning",
            _ => panic!("{answer}"),
        }
    };
    eventually("it is stale", stale).await;
}

#[tokio::test]
async fn a_name_that_does_not_exist_is_a_connection_error() {
    let relay = TestRelay::with(&[("RELAY_CYBERSCAN_HOSTS", "*.invalid")]).await;
    let token = relay.token_with(&[("host", json!("cyberscan.invalid"))]);
    let started = Instant::now();
    let answer = relay.post("/observe/observables", &token, list(&[("ip", IP)])).await.json();
    let took = started.elapsed();
    assert_eq!(codes(&answer), ["connection error"], "{answer}");
    assert!(answer.get("data").is_none());
    let message = answer["errors"][0]["message"].as_str().unwrap();
    assert!(message.ends_with(": https://cyberscan.invalid/api/v1/token"), "{message}");
    eprintln!("a name that does not exist: \"connection error\" after {took:?}");
    assert!(took < Duration::from_secs(11), "{took:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_the_environment_names_is_not_used() {
    let (sandbox, trap) = (sandbox().await, tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap());
    let url = format!("http://{}", trap.local_addr().unwrap());
    let mut command = RelayProcess::command();
    for name in ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"] {
        command.env(name, &url);
    }
    let relay = RelayProcess::start_by(command, &sandbox, &[]).await;
    let token = sandbox.token(AUDIENCE);
    tokio::select! {
        () = whole(relay.address, &token, IP) => {}
        _ = trap.accept() => panic!("it was connected to"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_without_end_costs_a_few_megabytes_and_is_an_error_item() {
    let sandbox = sandbox().await;
    let relay = RelayProcess::start(&sandbox, &[]).await;
    let token = sandbox.token(AUDIENCE);
    for _ in 0..50 {
        whole(relay.address, &token, &fresh_ip()).await;
    }
    let before = relay.memory("VmRSS");
    for behaviour in [Behaviour::EndlessBody, Behaviour::GzipBomb] {
        sandbox.cyberscan.script(Rule::on(Call::Vulnerabilities).does(behaviour));
        for _ in 0..5 {
            let answer = ask(relay.address, &token, &[("ip", &fresh_ip())]).await.unwrap();
            assert_eq!(codes(&answer), ["unexpected response"]);
            assert!(answer.get("data").is_none(), "{answer}");
        }
        sandbox.cyberscan.clear_script();
        whole(relay.address, &token, &fresh_ip()).await;
    }
    let grown = relay.memory("VmHWM").saturating_sub(before);
    eprintln!("bodies without end: {before} KiB resident before, {grown} KiB more at the peak");
    assert!(grown <= 24 << 10, "{grown} KiB");
}

// Certificates.

/// Servers whose certificates nobody should believe, each on a port of its own.
pub(crate) mod untrusted {
    use std::{
        net::Ipv4Addr,
        path::Path,
        process::Stdio,
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering},
        },
        time::Duration,
    };

    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd};
    use rustls::{
        ServerConfig,
        pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    };
    use tokio::{
        net::{TcpListener, TcpStream},
        process::{Child, Command},
        time::sleep,
    };
    use tokio_rustls::TlsAcceptor;

    use crate::redis::free_port;

    /// An authority, as good as its certificate in a trust store.
    pub(crate) struct Authority {
        issuer: CertifiedIssuer<'static, KeyPair>,
        key_pem: String,
    }

    impl Authority {
        pub(crate) fn new(name: &str) -> Self {
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, name);
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            let key = KeyPair::generate().unwrap();
            let key_pem = key.serialize_pem();
            Self { issuer: CertifiedIssuer::self_signed(params, key).unwrap(), key_pem }
        }

        pub(crate) fn pem(&self) -> String {
            self.issuer.pem()
        }
    }

    /// Handshakes a client went through with, although it should not have.
    pub(crate) static BELIEVED: AtomicU32 = AtomicU32::new(0);

    /// Serves with a certificate for `name`, good from `from` to `to` (years), signed by `by` or by itself.
    pub(crate) async fn serve(name: &str, (from, to): (i32, i32), by: Option<&Authority>) -> u16 {
        let acceptor = acceptor(name, (from, to), by);
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if acceptor.accept(stream).await.is_ok() {
                    BELIEVED.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        port
    }

    /// What serves with such a certificate.
    pub(crate) fn acceptor(name: &str, (from, to): (i32, i32), by: Option<&Authority>) -> TlsAcceptor {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(to, 1, 1));
        let key = KeyPair::generate().unwrap();
        let certificate = match by {
            Some(authority) => params.signed_by(&key, &authority.issuer),
            None => params.self_signed(&key),
        };
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.unwrap().der().clone()], key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }

    /// OpenSSL's own server, for what no library of ours would do; its certificate is for localhost, with a key of
    /// `kind`, signed by `by`, and whatever else `arguments` say.
    pub(crate) async fn openssl(
        directory: &Path,
        kind: &str,
        by: &Authority,
        arguments: &[&str],
    ) -> (Child, u16) {
        let file = |name: &str| directory.join(name).to_str().unwrap().to_owned();
        std::fs::write(file("ca.pem"), by.pem()).unwrap();
        std::fs::write(file("ca.key"), &by.key_pem).unwrap();
        std::fs::write(file("extensions"), "subjectAltName = DNS:localhost\n").unwrap();
        let (key, request, certificate) = (file("key"), file("request"), file("certificate"));
        let curve = "ec_paramgen_curve:prime256v1";
        let curve: &[&str] = if kind == "ec" { &["-pkeyopt", curve] } else { &[] };
        let new =
            ["req", "-new", "-newkey", kind, "-nodes", "-subj", "/CN=localhost", "-keyout", &key, "-out"];
        run(&[&new[..], &[&request], curve].concat()).await;
        run(&[
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            &file("ca.pem"),
            "-CAkey",
            &file("ca.key"),
            "-set_serial",
            "1",
            "-days",
            "30",
            "-extfile",
            &file("extensions"),
            "-out",
            &certificate,
        ])
        .await;
        let port = free_port();
        let accept = format!("127.0.0.1:{port}");
        let serve = ["s_server", "-quiet", "-accept", &accept, "-cert", &certificate, "-key", &key];
        // What is bad enough for this test, OpenSSL does only when it is told not to mind.
        let careless = ["-cipher", "ALL:@SECLEVEL=0"];
        let mut server = command(&[&serve[..], &careless, arguments].concat());
        let child = server.stdin(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.is_err() {
            sleep(Duration::from_millis(20)).await;
        }
        (child, port)
    }

    async fn run(arguments: &[&str]) {
        let output = command(arguments).output().await;
        let output = output
            .unwrap_or_else(|error| panic!("this test needs openssl (apt-get install openssl): {error}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn command(arguments: &[&str]) -> Command {
        let mut command = Command::new("openssl");
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }
}

#[tokio::test]
async fn a_certificate_that_cannot_be_believed_is_told_with_its_reason_and_nothing_is_sent() {
    use untrusted::{Authority, openssl, serve};
    let (authority, stranger) = (Authority::new("test CA"), Authority::new("nobody's CA"));
    let directories = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let (_old, old_port) = openssl(directories[0].path(), "ec", &authority, &["-tls1_1"]).await;
    let (_weak, weak_port) = openssl(directories[1].path(), "rsa:1024", &authority, &[]).await;
    let (_older, weak_older_port) =
        openssl(directories[2].path(), "rsa:1024", &authority, &["-tls1_2"]).await;
    let age = (2020, 4000);
    let servers = [
        (serve("localhost", (2020, 2021), Some(&authority)).await, "certificate has expired"),
        (serve("localhost", (3000, 4000), Some(&authority)).await, "certificate is not yet valid"),
        (
            serve("elsewhere.test", age, Some(&authority)).await,
            "hostname 'localhost' doesn't match 'elsewhere.test'",
        ),
        (serve("localhost", age, None).await, "self-signed certificate"),
        (serve("localhost", age, Some(&stranger)).await, "unable to get local issuer certificate"),
        (old_port, "unsupported protocol, TLS 1.2 or 1.3 is needed"),
        (weak_port, "certificate key too weak, or its signature wrong"),
        (weak_older_port, "certificate key too weak, or its signature wrong"),
    ];

    let sandbox = Arc::new(sandbox().await);
    let roots = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(roots.path(), [sandbox.ca_pem.as_str(), &authority.pem()].concat()).unwrap();
    let hosts: Vec<String> = servers.iter().map(|(port, _)| format!("localhost:{port}")).collect();
    let settings = [
        ("RELAY_CYBERSCAN_HOSTS", &*hosts.join(",")),
        ("RELAY_EGRESS_EXTRA_CA_FILE", roots.path().to_str().unwrap()),
    ];
    let relay = TestRelay::beside(&sandbox, &settings).await;
    for (host, (_, reason)) in hosts.iter().zip(servers) {
        let token = relay.token_with(&[("host", json!(host))]);
        let message = format!("Unable to verify SSL certificate: {reason}");
        let expected = json!({"errors": [{"type": "fatal", "code": "unknown", "message": message}]});
        assert_eq!(relay.post("/health", &token, "").await.json(), expected);
        let observed = relay.post("/observe/observables", &token, list(&[("ip", IP)])).await.json();
        assert_eq!(observed, expected);
    }
    assert_eq!(untrusted::BELIEVED.load(Ordering::Relaxed), 0);
}

// The key issuer.

#[tokio::test]
async fn a_key_issuer_that_hangs_is_waited_for_once_and_found_again() {
    let relay = TestRelay::start().await;
    relay.sandbox.issuer.respond_with(IssuerBehaviour::Hang);
    let refused = |answer: &Value| {
        let message = answer["errors"][0]["message"].as_str().unwrap_or_default();
        message.starts_with("Authorization failed: Wrong jwks_host")
    };
    let started = Instant::now();
    let (one, two) = tokio::join!(relay.health(), relay.health());
    let first = started.elapsed();
    assert!(refused(&one) && refused(&two), "{one} {two}");
    let started = Instant::now();
    assert!(refused(&relay.health().await));
    let again = started.elapsed();
    eprintln!("a key issuer that hangs: refused after {first:?}, then {again:?}");
    assert!(first < Duration::from_secs(7) && again < Duration::from_millis(500), "{first:?} {again:?}");
    assert_eq!(relay.sandbox.issuer.fetches(), 1, "the two who waited, and the third, cost one fetch");
    relay.sandbox.issuer.respond_with(IssuerBehaviour::Keys);
    eventually("it is found again", async || relay.health().await["data"]["status"] == "ok").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_who_wait_for_a_key_issuer_take_no_place_from_others() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    let sandbox = Arc::new(sandbox().await);
    let issuers = format!("{},{silent}", sandbox.issuer.host());
    let settings = [("RELAY_AUTH_JWKS_HOSTS", issuers.as_str()), ("RELAY_SERVER_MAX_IN_FLIGHT", "8")];
    let relay = TestRelay::beside(&sandbox, &settings).await;
    whole(relay.address, &relay.token(), IP).await;
    let stranger = relay.token_with(&[("jwks_host", json!(silent))]);
    let mut strangers = JoinSet::new();
    for number in 0..20 {
        let (address, token) = (relay.address, stranger.clone());
        let path = if number % 2 == 0 { "/observe/observables" } else { "/health" };
        strangers.spawn(async move {
            let request = http::Request::post(path)
                .header("host", "relay.test")
                .header("authorization", format!("Bearer {token}"))
                .body(http_body_util::Full::<bytes::Bytes>::from(list(&[("ip", IP)])));
            let answer = cyberscan_relay::probe::call(address, request.unwrap()).await.unwrap();
            serde_json::from_slice::<Value>(answer.body()).unwrap()
        });
    }
    sleep(Duration::from_millis(300)).await;
    for _ in 0..20 {
        whole(relay.address, &relay.token(), IP).await;
    }
    let answers = strangers.join_all().await;
    let busy = answers.iter().filter(|answer| codes(answer) == ["too many requests"]).count();
    let refused = answers.iter().filter(|answer| codes(answer) == ["authorization error"]).count();
    assert_eq!((busy, refused), (12, 8), "{answers:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_are_replaced_under_load_refuse_nobody() {
    let relay = TestRelay::start().await;
    let mut callers = JoinSet::new();
    let stop = Arc::new(AtomicBool::new(false));
    for _ in 0..4 {
        let (stop, address, sandbox) = (Arc::clone(&stop), relay.address, Arc::clone(&relay.sandbox));
        callers.spawn(async move {
            let mut answers = 0;
            while !stop.load(Ordering::Relaxed) {
                whole(address, &sandbox.token(AUDIENCE), IP).await;
                answers += 1;
            }
            answers
        });
    }
    sleep(Duration::from_millis(300)).await;
    let old = relay.token();
    relay.sandbox.issuer.rotate_keeping_old().await.unwrap();
    sleep(Duration::from_millis(300)).await;
    whole(relay.address, &old, IP).await;
    stop.store(true, Ordering::Relaxed);
    let answers: u32 = callers.join_all().await.into_iter().sum();
    eprintln!("keys replaced under load: {answers} answers, all whole");
    assert_eq!(relay.sandbox.issuer.fetches(), 2);
}

#[tokio::test]
async fn what_is_no_key_set_replaces_none() {
    for nonsense in [
        IssuerBehaviour::Body("<html>".into()),
        IssuerBehaviour::Body(r#"{"keys": []}"#.into()),
        IssuerBehaviour::Body(r#"{"keys": [{"kty": "oct", "kid": "a", "k": "c2VjcmV0"}]}"#.into()),
        IssuerBehaviour::Status(503),
        IssuerBehaviour::Endless,
    ] {
        let relay = TestRelay::start().await;
        let told = format!("{nonsense:?}");
        whole(relay.address, &relay.token(), IP).await;
        relay.sandbox.issuer.respond_with(nonsense);
        let header = json!({"alg": "RS256", "kid": "makes the relay look again"});
        let invented = relay.sandbox.issuer.mint_with(header, &relay.sandbox.claims(AUDIENCE));
        let refused = relay.post("/health", &invented, "").await.json();
        assert_eq!(codes(&refused), ["authorization error"], "{told}");
        assert_eq!(relay.sandbox.issuer.fetches(), 2, "{told}");
        // Not the token seen before, which is remembered: one that has to be verified.
        whole(relay.address, &relay.token_with(&[("nonce", json!(told))]), IP).await;
    }
}

// The clock.

/// A library that moves a process's wall clock, compiled for the test; and where it reads by how much.
pub(crate) async fn wall_clock(directory: &Path) -> (String, String, File) {
    let (library, jump) = (directory.join("wall_clock.so"), directory.join("jump"));
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/wall_clock.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o"]).arg(&library).arg(source);
    let compiled = compiler.output().await;
    let compiled = compiled
        .unwrap_or_else(|error| panic!("this test needs a C compiler (apt-get install gcc): {error}"));
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    std::fs::write(&jump, [0; 8]).unwrap();
    let file = File::options().write(true).open(&jump).unwrap();
    (library.to_str().unwrap().to_owned(), jump.to_str().unwrap().to_owned(), file)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wall_clock_that_jumps_an_hour_judges_tokens_and_expires_nothing() {
    const HOUR: i64 = 3600;
    let directory = tempfile::tempdir().unwrap();
    let (library, jump_file, jump) = wall_clock(directory.path()).await;
    let (redis, sandbox) = (RedisServer::start().await, sandbox().await);
    let url = redis.url();
    let settings = [("RELAY_REDIS_URL", url.as_str()), PATIENT];
    let moved = [("LD_PRELOAD", library.as_str()), ("WALL_CLOCK_JUMP", jump_file.as_str())];
    let relay = RelayProcess::start(&sandbox, &[&settings[..], &moved].concat()).await;
    let other = RelayProcess::start(&sandbox, &settings).await;
    let both = [relay.address, other.address];
    sharing_within(Duration::from_secs(10), &sandbox, &both).await;

    let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap();
    let lasting = sandbox.token(AUDIENCE);
    let known: Vec<String> = (0..20).map(|_| fresh_ip()).collect();
    for ip in &known {
        whole(relay.address, &lasting, ip).await;
    }
    sandbox.cyberscan.reset_counts();
    let jumps = [0, HOUR, 0, -HOUR, 0];
    for (round, by) in jumps.into_iter().enumerate() {
        jump.write_all_at(&by.to_ne_bytes(), 0).unwrap();
        // Not one seen before: that it has begun is not judged again for a minute.
        let said = async |times: &[(&str, i64)]| {
            let mut claims = sandbox.claims(AUDIENCE);
            let unique = ("round", i64::try_from(round).unwrap());
            for (name, value) in times.iter().chain([&unique]) {
                claims[*name] = json!(value);
            }
            let token = sandbox.issuer.mint(&claims);
            let answer = ask(relay.address, &token, &[("ip", &known[0])]).await.unwrap();
            answer["errors"][0]["message"].as_str().map(str::to_owned)
        };
        let verdict =
            |refused: bool, message: &str| refused.then(|| format!("Authorization failed: JWT {message}"));
        assert_eq!(said(&[("exp", now + HOUR / 2)]).await, verdict(by > 0, "has expired"), "{by} s");
        assert_eq!(said(&[("nbf", now - HOUR / 2)]).await, verdict(by < 0, "is not yet valid"), "{by} s");
        for ip in &known {
            whole(relay.address, &lasting, ip).await;
        }
        let calls = sandbox.cyberscan.calls();
        assert!(calls.is_empty(), "at {by} s: {} calls, e.g. {:?}", calls.len(), calls[0]);
        // What it asks now is as fresh to others as ever, and what they ask to it.
        sharing_within(Duration::from_secs(10), &sandbox, &both).await;
        sharing_within(Duration::from_secs(10), &sandbox, &[other.address, relay.address]).await;
        assert_eq!(sandbox.cyberscan.count(Call::Token), 0, "{by} s");
        sandbox.cyberscan.reset_counts();
    }
    assert_eq!(relay.metric("relay_panics_total").await, 0.0);
}

// The process.

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_under_load_is_told_first_drops_nothing_and_ends_in_time() {
    let sandbox = sandbox().await;
    let relay = RelayProcess::start(&sandbox, &[("RELAY_SERVER_SHUTDOWN_DELAY", "2s")]).await;
    let (address, token) = (relay.address, sandbox.token(AUDIENCE));
    whole(address, &token, IP).await;
    sandbox.cyberscan.latency(Duration::from_millis(50));
    let slow: Vec<String> = (0..8).map(|_| fresh_ip()).collect();
    for ip in &slow {
        let late = Behaviour::Delay(Duration::from_secs(4));
        sandbox.cyberscan.script(Rule::on(Call::Vulnerabilities).value(ip).does(late));
    }
    // As a load balancer does: requests go where /readyz says 200.
    let ready = Arc::new(AtomicBool::new(true));
    let mut callers = JoinSet::new();
    for _ in 0..12 {
        let (ready, token) = (Arc::clone(&ready), token.clone());
        callers.spawn(async move {
            let mut answers = 0_u32;
            while ready.load(Ordering::Relaxed) {
                whole(address, &token, &fresh_ip()).await;
                answers += 1;
            }
            answers
        });
    }
    sleep(Duration::from_millis(500)).await;
    for ip in slow {
        let token = token.clone();
        callers.spawn(async move {
            whole(address, &token, &ip).await;
            1
        });
    }
    sleep(Duration::from_millis(300)).await;
    relay.terminate().await;
    let told = Instant::now();
    while relay.admin("/readyz").await.unwrap().0 == StatusCode::OK {
        sleep(Duration::from_millis(20)).await;
    }
    let unready = told.elapsed();
    TcpStream::connect(address).await.expect("the listener is open when the probe already says no");
    ready.store(false, Ordering::Relaxed);
    let status = relay.end_within(Duration::from_secs(25)).await;
    let took = told.elapsed();
    let answers: u32 = callers.join_all().await.into_iter().sum();
    eprintln!(
        "SIGTERM under load: not ready after {unready:?}, ended after {took:?}, {answers} answers, all whole"
    );
    assert!(status.success());
    assert!(TcpStream::connect(address).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_killed_costs_its_own_callers_only() {
    let (redis, sandbox) = (RedisServer::process(&[]).await, sandbox().await);
    let url = redis.url();
    let settings = [("RELAY_REDIS_URL", url.as_str()), PATIENT];
    let mut relays = RelayProcess::fleet(2, &sandbox, &settings).await;
    sandbox.cyberscan.latency(Duration::from_millis(30));
    let addresses = [relays[0].address, relays[1].address];
    let load = Load::at(&addresses, &sandbox.token(AUDIENCE));
    load.answered(60).await;
    relays[0].kill().await;
    load.answered(100).await;
    let failures = load.end().await;
    assert!(!failures.is_empty(), "nobody noticed");
    for failure in &failures {
        assert!(failure.relay == addresses[0] && failure.said.is_err(), "{failure:?}");
    }
    eprintln!("SIGKILL: {} connections of the dead one failed, none of the other", failures.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn few_open_files_are_shared_out_and_none_at_all_are_survived() {
    let sandbox = sandbox().await;
    let mut relay = RelayProcess::start_by(RelayProcess::command_with_files(64), &sandbox, &[]).await;
    let token = sandbox.token(AUDIENCE);
    // More than it may have files, and they stay.
    let mut crowd = Vec::new();
    for _ in 0..200 {
        crowd.push(TcpStream::connect(relay.address).await.unwrap());
    }
    // Each of these needs one for the question and one for the call.
    sandbox.cyberscan.latency(Duration::from_millis(300));
    let ips: Vec<String> = (0..10).map(|_| fresh_ip()).collect();
    futures_util::future::join_all(ips.iter().map(|ip| whole(relay.address, &token, ip))).await;
    sandbox.cyberscan.latency(Duration::ZERO);

    // Not a single one more.
    let pid = Pid::from_raw(i32::try_from(relay.pid()).unwrap());
    let limits = |current| Rlimit { current: Some(current), maximum: Some(64) };
    prlimit(pid, Resource::Nofile, limits(3)).unwrap();
    let mut waiting = TcpStream::connect(relay.address).await.unwrap();
    waiting.write_all(b"GET / HTTP/1.1\r\nHost: relay.test\r\nConnection: close\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let unanswered = timeout(Duration::from_secs(3), waiting.read_to_end(&mut answer)).await;
    assert!(unanswered.is_err() && answer.is_empty(), "there was a file left: {answer:?}");
    assert!(relay.is_alive());
    let complaints = relay.said("cannot accept connections").len();
    assert!((1..=5).contains(&complaints), "{complaints} lines in three seconds");

    prlimit(pid, Resource::Nofile, limits(64)).unwrap();
    let started = Instant::now();
    timeout(Duration::from_secs(5), waiting.read_to_end(&mut answer)).await.unwrap().unwrap();
    let took = started.elapsed();
    assert!(answer.starts_with(b"HTTP/1.1 200 OK"), "{answer:?}");
    eprintln!("no files left: {complaints} lines in three seconds; {took:?} after there are some it answers");
    for _ in 0..20 {
        whole(relay.address, &token, &fresh_ip()).await;
    }
}

/// What starts a relay for `sandbox`; its root certificate goes with the file.
fn command_for(sandbox: &Sandbox) -> (Command, tempfile::NamedTempFile) {
    let ca = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(ca.path(), &sandbox.ca_pem).unwrap();
    let mut command = RelayProcess::command();
    command.envs(sandbox_settings(sandbox, ca.path().to_str().unwrap()));
    (command, ca)
}

/// Asks so often that the lines about it are more than a pipe holds.
async fn talkative(address: SocketAddr, token: &str) {
    for _ in 0..400 {
        whole(address, token, IP).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_nobody_reads_holds_up_neither_answers_nor_the_end() {
    let sandbox = sandbox().await;
    let token = sandbox.token(AUDIENCE);
    for closed in [true, false] {
        let (command, _ca) = command_for(&sandbox);
        let (relay, unread) = RelayProcess::launch_unread(command).await;
        let unread = (!closed).then_some(unread);
        talkative(relay.address, &token).await;
        relay.terminate().await;
        let started = Instant::now();
        let status = relay.end_within(Duration::from_secs(15)).await;
        eprintln!("a log nobody reads (closed: {closed}): ended after {:?}", started.elapsed());
        assert!(status.success(), "{status}");
        drop(unread);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_is_full_costs_the_log_and_nothing_else() {
    let sandbox = sandbox().await;
    let (mut command, _ca) = command_for(&sandbox);
    let address: SocketAddr = ([127, 0, 0, 1], free_port()).into();
    let full = File::options().write(true).open("/dev/full").unwrap();
    command.env("RELAY_LISTEN", address.to_string()).stdout(Stdio::from(full));
    let mut relay = command.spawn().unwrap();
    eventually("it listens", async || TcpStream::connect(address).await.is_ok()).await;
    talkative(address, &sandbox.token(AUDIENCE)).await;
    assert!(relay.try_wait().unwrap().is_none());
    let pid = relay.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    let status = timeout(Duration::from_secs(15), relay.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn nobody_but_root_looks_into_the_process_and_it_leaves_no_core() {
    const NOBODY: u32 = 65_534;
    let root = rustix::process::geteuid().is_root();
    // As root the relay is started for somebody else, who has to be able to reach the binary.
    let directory = tempfile::Builder::new().permissions(mode(0o755)).tempdir().unwrap();
    let binary = directory.path().join("cyberscan-relay");
    // By a process of its own: a file that any thread here has open for writing cannot be executed.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_cyberscan-relay")).arg(&binary).status().await;
    assert!(copied.unwrap().success());
    let as_user = |mut command: Command| {
        if root {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    };
    let mut command = as_user(RelayProcess::command_of(binary.to_str().unwrap()));
    command.env("RELAY_ADMIN_TOKEN", "a-secret-of-the-operator");
    let (relay, _lines) = RelayProcess::launch_unread(command).await;

    let proc = |file: &str| format!("/proc/{}/{file}", relay.pid());
    let limits = std::fs::read_to_string(proc("limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(limit("Max core file size")[..2], ["0", "0"]);
    let files = limit("Max open files");
    assert_eq!(files[0], files[1], "as many files as it may have");
    for file in ["environ", "maps"] {
        let mut reader = as_user(Command::new("head"));
        let read = reader.args(["-c", "1", &proc(file)]).output().await.unwrap();
        assert!(!read.status.success() && read.stdout.is_empty(), "{file} can be read");
    }
    // Its own files it still counts itself.
    assert!(relay.metric("process_open_fds").await > 5.0);
}

fn mode(mode: u32) -> std::fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(mode)
}
