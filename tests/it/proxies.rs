//! What stands in front of the relay in real life: Debian's nginx, Caddy and HAProxy, with the recipes of
//! `deploy/` and with their defaults.

use std::{net::SocketAddr, path::Path, process::Stdio, time::Duration};

use cyberscan_relay::probe;
use http::{Request, StatusCode, header};
use http_body_util::Full;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    net::TcpStream,
    process::{Child, Command},
    time::{sleep, timeout},
};

use crate::{
    harness::{Certificate, Connection, TestRelay, list, seen},
    redis::free_port,
};

/// A relay that derives its audience from what the proxy says of the request.
const BELIEVES_ITS_PROXY: &[(&str, &str)] =
    &[("RELAY_AUTH_AUDIENCES", ""), ("RELAY_AUTH_TRUSTED_PROXIES", "127.0.0.0/8")];

/// A proxy's process, which ends with its handle.
struct Proxy {
    address: SocketAddr,
    child: Child,
    directory: TempDir,
}

/// `recipe` with each first text replaced by the second, which it has to have.
fn adapted(recipe: &str, changes: &[(&str, &str)]) -> String {
    changes.iter().fold(recipe.to_owned(), |recipe, (from, to)| {
        assert!(recipe.contains(from), "the recipe does not say {from:?}");
        recipe.replace(from, to)
    })
}

impl Proxy {
    /// Starts `program` of the Debian package `package` with `arguments`, in which `{}` is the file of `configuration`.
    async fn start(program: &str, package: &str, arguments: &[&str], port: u16, configuration: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().to_str().unwrap();
        let file = format!("{place}/configuration");
        std::fs::write(&file, configuration.replace("{place}", place)).unwrap();
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new(program);
        command
            .args(arguments.iter().map(|argument| argument.replace("{}", &file)))
            .env("PATH", format!("{path}:/usr/sbin:/usr/local/sbin"))
            .env("HOME", place)
            .env("XDG_DATA_HOME", place)
            .env("XDG_CONFIG_HOME", place)
            .kill_on_drop(true)
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(format!("{place}/output")).unwrap())
            .stderr(std::fs::File::create(format!("{place}/errors")).unwrap());
        let child = command.spawn().unwrap_or_else(|error| {
            panic!("{program} cannot be started ({error}): scripts/need.sh {program} {package} installs it")
        });
        let mut proxy = Self { address: ([127, 0, 0, 1], port).into(), child, directory };
        for _ in 0..400 {
            if TcpStream::connect(proxy.address).await.is_ok() {
                return proxy;
            }
            if let Some(status) = proxy.child.try_wait().unwrap() {
                panic!("{program} ended: {status}\n{}", proxy.errors());
            }
            sleep(Duration::from_millis(50)).await;
        }
        panic!("{program} does not listen\n{}", proxy.errors());
    }

    fn errors(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("errors")).unwrap_or_default()
    }

    /// nginx, with `server` in its `http` block; one process, which is easily ended.
    async fn nginx(port: u16, server: &str) -> Self {
        let all = format!(
            "daemon off; master_process off; pid {{place}}/pid; error_log stderr;\nevents {{}}\nhttp {{\n\
             access_log off; client_body_temp_path {{place}}/body; proxy_temp_path {{place}}/proxy;\n\
             fastcgi_temp_path {{place}}/fastcgi; uwsgi_temp_path {{place}}/uwsgi; scgi_temp_path {{place}}/scgi;\n\
             {server}\n}}\n"
        );
        Self::start("nginx", "nginx-light", &["-c", "{}"], port, &all).await
    }

    async fn haproxy(port: u16, configuration: &str) -> Self {
        Self::start("haproxy", "haproxy", &["-db", "-f", "{}"], port, configuration).await
    }
}

/// An answer through a connection of the proxy's.
async fn post(stream: Connection, host: &str, path: &str, token: &str, body: String) -> (StatusCode, Value) {
    let request = Request::post(path)
        .header(header::HOST, host)
        .header(header::AUTHORIZATION, format!("Bearer {token}"))
        // What a client says of itself must not be believed.
        .header("x-forwarded-proto", "http")
        .header("x-forwarded-host", "evil.test")
        .body(Full::from(bytes::Bytes::from(body)));
    let answering = probe::exchange(stream, request.unwrap());
    let answer = timeout(Duration::from_secs(30), answering).await.unwrap().unwrap();
    (answer.status(), serde_json::from_slice(answer.body()).unwrap_or_default())
}

/// Health, an observation and a refusal of the relay's own go through a proxy with TLS, and the audience is the
/// proxy's URL.
async fn works_through(proxy: &Proxy, certificate: &Certificate, relay: &TestRelay) {
    let host = format!("relay.test:{}", proxy.address.port());
    let connect = || async { certificate.connect(proxy.address).await.unwrap() };
    let token = relay.sandbox.token(&format!("https://{host}"));
    let (status, health) = post(connect().await, &host, "/health", &token, String::new()).await;
    assert_eq!((status, health), (StatusCode::OK, json!({"data": {"status": "ok"}})), "{}", proxy.errors());
    let about = list(&[("ip", "203.0.113.10")]);
    let (_, answer) = post(connect().await, &host, "/observe/observables", &token, about).await;
    assert_eq!(seen(&answer), ["203.0.113.10"], "{answer}");
    // More than the relay takes is refused by the relay, in an answer the platform understands.
    let large = "x".repeat(1_200_000);
    let (status, answer) = post(connect().await, &host, "/observe/observables", &token, large).await;
    assert_eq!((status, &answer["errors"][0]["code"]), (StatusCode::OK, &json!("invalid argument")));
    // Another URL is another audience.
    for audience in ["https://evil.test".to_owned(), format!("http://{host}")] {
        let token = relay.sandbox.token(&audience);
        let (_, answer) = post(connect().await, &host, "/health", &token, String::new()).await;
        assert_eq!(answer["errors"][0]["code"], "authorization error", "{audience}");
    }
    let refused = relay.series().await.into_iter().filter(|(name, _)| name.starts_with("relay_refused"));
    assert_eq!(refused.map(|(_, count)| count).sum::<f64>(), 0.0);
}

fn recipe(path: &str) -> String {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy").join(path);
    std::fs::read_to_string(file).unwrap()
}

#[tokio::test]
async fn the_recipe_for_nginx_works() {
    let (relay, certificate, port) =
        (TestRelay::with(BELIEVES_ITS_PROXY).await, Certificate::new(), free_port());
    let server = adapted(
        &recipe("nginx/cyberscan-relay.conf"),
        &[
            ("127.0.0.1:9090", &relay.address.to_string()),
            ("listen 443 ssl", &format!("listen 127.0.0.1:{port} ssl")),
            ("/etc/ssl/relay.example.com/certificate.pem", &certificate.path("certificate.pem")),
            ("/etc/ssl/relay.example.com/key.pem", &certificate.path("key.pem")),
        ],
    );
    let proxy = Proxy::nginx(port, &server).await;
    works_through(&proxy, &certificate, &relay).await;
}

#[tokio::test]
async fn the_recipe_for_caddy_works() {
    let (relay, certificate, port) =
        (TestRelay::with(BELIEVES_ITS_PROXY).await, Certificate::new(), free_port());
    let files = format!("tls {} {}", certificate.path("certificate.pem"), certificate.path("key.pem"));
    let site = adapted(
        &recipe("caddy/Caddyfile"),
        &[
            ("127.0.0.1:9090", &relay.address.to_string()),
            ("\nrelay.example.com {\n", &format!("\nhttps://relay.test:{port} {{\n\t{files}\n")),
        ],
    );
    // No certificate from elsewhere, no second listener, no admin port that another one has.
    let all = format!("{{\n\tadmin off\n\tauto_https disable_redirects\n}}\n{site}");
    let arguments = ["run", "--adapter", "caddyfile", "--config", "{}"];
    let proxy = Proxy::start("caddy", "caddy", &arguments, port, &all).await;
    works_through(&proxy, &certificate, &relay).await;
}

#[tokio::test]
async fn the_recipe_for_haproxy_works() {
    let (relay, certificate, port) =
        (TestRelay::with(BELIEVES_ITS_PROXY).await, Certificate::new(), free_port());
    let both = std::fs::read_to_string(certificate.path("certificate.pem")).unwrap()
        + &std::fs::read_to_string(certificate.path("key.pem")).unwrap();
    std::fs::write(certificate.path("both.pem"), both).unwrap();
    let configuration = adapted(
        &recipe("haproxy/haproxy.cfg"),
        &[
            ("127.0.0.1:9090", &relay.address.to_string()),
            ("check port 9091", &format!("check port {} inter 100ms", relay.admin.port())),
            ("bind :443", &format!("bind 127.0.0.1:{port}")),
            ("/etc/haproxy/relay.example.com.pem", &certificate.path("both.pem")),
        ],
    );
    let proxy = Proxy::haproxy(port, &configuration).await;
    works_through(&proxy, &certificate, &relay).await;
}

#[tokio::test]
async fn nginx_with_its_default_proxy_pass_works() {
    let (relay, port) = (TestRelay::start().await, free_port());
    let server = format!(
        "server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://{}; }} }}",
        relay.address
    );
    let proxy = Proxy::nginx(port, &server).await;
    for _ in 0..3 {
        let connect = || async { Connection::Left(TcpStream::connect(proxy.address).await.unwrap()) };
        let health = post(connect().await, "relay.test", "/health", &relay.token(), String::new()).await;
        assert_eq!(health, (StatusCode::OK, json!({"data": {"status": "ok"}})), "{}", proxy.errors());
        // A body as large as is allowed.
        let about = list(&[("ip", "203.0.113.10"); 1000]) + &" ".repeat(900_000);
        let token = relay.token();
        let (_, answer) = post(connect().await, "relay.test", "/observe/observables", &token, about).await;
        assert_eq!(seen(&answer), ["203.0.113.10"], "{answer}");
    }
}

#[tokio::test]
async fn haproxy_with_its_default_check_takes_both_listeners_for_alive() {
    let (relay, port) = (TestRelay::start().await, free_port());
    // The relay is used only while it passes; each check fails or holds by itself.
    let configuration = |checked: u16| {
        format!(
            "defaults\n mode http\n timeout connect 5s\n timeout client 30s\n timeout server 60s\n\
             frontend public\n bind 127.0.0.1:{port}\n default_backend relays\n\
             backend relays\n option httpchk\n\
             server relay1 {} check port {checked} inter 100ms rise 1 fall 1\n",
            relay.address
        )
    };
    for checked in [relay.address.port(), relay.admin.port()] {
        let proxy = Proxy::haproxy(port, &configuration(checked)).await;
        // Long enough for several checks.
        for _ in 0..5 {
            sleep(Duration::from_millis(150)).await;
            let stream = Connection::Left(TcpStream::connect(proxy.address).await.unwrap());
            let health = post(stream, "relay.test", "/health", &relay.token(), String::new()).await;
            assert_eq!(health, (StatusCode::OK, json!({"data": {"status": "ok"}})));
        }
        assert!(!proxy.errors().contains("DOWN"), "{}", proxy.errors());
    }
    // A port where nobody is: the check is one that can fail.
    let proxy = Proxy::haproxy(port, &configuration(free_port())).await;
    sleep(Duration::from_millis(500)).await;
    let stream = Connection::Left(TcpStream::connect(proxy.address).await.unwrap());
    let (status, _) = post(stream, "relay.test", "/health", &relay.token(), String::new()).await;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
}
