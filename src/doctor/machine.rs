//! This machine: whether the relay's addresses are its own, whether the relay that runs is ready, limits of the system,
//! and settings that are sound one by one but not together. It must not call anything but this machine.

use std::{net::SocketAddr, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::Full;
use secrecy::ExposeSecret;
use serde_json::Value;
use tokio::time::timeout;

use super::{Check, Finding};
use crate::{hardening, http::server, probe, settings::Settings};

/// The platform gives up after an undocumented while; relays of this family cap themselves here.
const PLATFORM: Duration = Duration::from_secs(25);
/// Load balancers keep idle connections for so long.
const BALANCER: Duration = Duration::from_secs(60);
/// The least bytes of an admin token.
const TOKEN: usize = 16;

/// What the settings say by themselves.
pub(super) fn limits(settings: &Settings) -> Vec<Finding> {
    let mut findings = vec![open_files(settings)];
    findings.extend(memory(settings));
    let deadline = settings.enrich.deadline;
    findings.push(if deadline > PLATFORM {
        Finding::warn(
            Check::RequestDeadline,
            "",
            format!("{deadline:?}: the platform may have given up by then"),
            "set request.deadline to 20s",
        )
    } else {
        Finding::ok(Check::RequestDeadline, "", format!("{deadline:?}"))
    });
    let call = settings.cyberscan.timeout;
    findings.push(if call >= deadline {
        Finding::warn(
            Check::TimeOuts,
            "",
            format!("one call may take {call:?}, a whole answer {deadline:?}: a slow call leaves no time for another"),
            "set cyberscan.timeout to half of request.deadline",
        )
    } else if settings.cache.fill_timeout < call {
        Finding::warn(
            Check::TimeOuts,
            "",
            format!("a fetch is given up after {:?}, a call after {call:?}", settings.cache.fill_timeout),
            "set cache.fill_timeout above cyberscan.timeout",
        )
    } else {
        Finding::ok(Check::TimeOuts, "", format!("a call {call:?}, an answer {deadline:?}"))
    });
    let idle = settings.http.connections.idle_timeout;
    findings.push(if idle <= BALANCER {
        Finding::warn(
            Check::IdleTimeout,
            "",
            format!("{idle:?}: a load balancer that keeps connections for 60 s sends calls into closed ones"),
            "set server.idle_timeout to 75s, or above your load balancer's",
        )
    } else {
        Finding::ok(Check::IdleTimeout, "", format!("{idle:?}"))
    });
    let shutdown = settings.http.connections.shutdown_timeout;
    findings.push(if shutdown < deadline {
        Finding::warn(
            Check::ShutdownTimeout,
            "",
            format!("{shutdown:?}: answers that take {deadline:?} are cut off when the relay stops"),
            "set server.shutdown_timeout to request.deadline at least",
        )
    } else {
        Finding::ok(Check::ShutdownTimeout, "", format!("{shutdown:?}"))
    });
    findings.push(exposure(settings));
    findings
}

fn open_files(settings: &Settings) -> Finding {
    let (check, wanted) = (Check::OpenFiles, settings.http.connections.max_connections);
    match hardening::open_files() {
        Some((files, room)) if room < wanted => Finding::warn(
            check,
            "",
            format!("{files} files allow {room} connections; {wanted} are set"),
            "raise the limit (systemd: LimitNOFILE=), or lower server.max_connections",
        ),
        Some((files, _)) => Finding::ok(check, "", format!("{files} files, {wanted} connections")),
        None => Finding::ok(check, "", "no limit"),
    }
}

/// What a relay needs beside its cache, roughly: bodies, connections, the binary.
const BESIDE: u64 = 64 << 20;

fn memory(settings: &Settings) -> Option<Finding> {
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let container = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    let machine = std::fs::read_to_string("/proc/meminfo").ok();
    let machine = machine.as_deref().and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
        number(line.trim().strip_suffix("kB")?).map(|kib| kib << 10)
    });
    let there = container.as_deref().and_then(number).into_iter().chain(machine).min()?;
    let cache = settings.cache.memory.saturating_add(settings.enrich.rendered_memory);
    let mib = |bytes: u64| bytes >> 20;
    let state = format!("{} MiB of cache, {} MiB of memory", mib(cache), mib(there));
    Some(if cache.saturating_add(BESIDE) > there {
        let advice = "lower cache.memory, or give the relay more; it needs 64 MiB beside the cache";
        Finding::bad(Check::Memory, "", state, advice)
    } else {
        Finding::ok(Check::Memory, "", state)
    })
}

fn exposure(settings: &Settings) -> Finding {
    let check = Check::AdminExposure;
    let Some(listen) = settings.admin_listen else {
        return Finding::ok(check, "", "there is no admin listener");
    };
    let about = listen.to_string();
    let token = settings.admin.token.as_ref().map(|token| token.expose_secret().len());
    match token {
        Some(length) if length < TOKEN => Finding::warn(
            check,
            &about,
            "the token can be guessed",
            "set admin.token to at least 16 random characters: openssl rand -hex 32",
        ),
        _ if listen.ip().is_loopback() => Finding::ok(check, &about, "reachable from this machine only"),
        None => Finding::warn(
            check,
            &about,
            "reachable from other machines, and there is no token",
            "keep it inside (admin.listen = 127.0.0.1:9091, or a firewall); set admin.token for purges",
        ),
        Some(_) => Finding::ok(
            check,
            &about,
            "reachable from other machines: metrics are open, changes need the token",
        ),
    }
}

/// What is at the relay's own addresses.
pub(super) async fn listeners(settings: &Settings, patience: Duration) -> Vec<Finding> {
    let encrypted =
        settings.effective().iter().any(|key| key.key == "server.tls.certificate" && !key.value.is_empty());
    let public = async {
        if encrypted {
            return occupied(Check::Listen, settings.listen);
        }
        let landing = ask(settings.listen, "/", patience).await;
        let what = landing.map(|(_, body)| {
            let body: Value = serde_json::from_slice(&body).unwrap_or_default();
            let text = |name| body.get(name).and_then(Value::as_str).map(str::to_owned);
            (text("service").as_deref() == Some(env!("CARGO_PKG_NAME")))
                .then(|| format!("a relay serves, version {}", text("version").unwrap_or_default()))
        });
        address(Check::Listen, settings.listen, what)
    };
    let admin = async {
        let Some(listen) = settings.admin_listen else { return Vec::new() };
        match ask(listen, "/readyz", patience).await {
            Ok((status, body)) => match serde_json::from_slice::<Value>(&body) {
                Ok(body) if body.get("ready").is_some() => {
                    vec![
                        address(Check::AdminListen, listen, Ok(Some("a relay's admin listener".to_owned()))),
                        ready(listen, status, &body),
                    ]
                }
                _ => vec![address(Check::AdminListen, listen, Ok(None))],
            },
            Err(error) => vec![address(Check::AdminListen, listen, Err(error))],
        }
    };
    let (public, mut findings) = tokio::join!(public, admin);
    findings.push(public);
    findings
}

/// How many tokens without the form of one the relay that runs here has refused so far; `None` where none runs.
pub(super) async fn refusals(settings: &Settings, patience: Duration) -> Option<f64> {
    let (_, metrics) = ask(settings.admin_listen?, "/metrics", patience).await.ok()?;
    let metrics = std::str::from_utf8(&metrics).ok()?;
    let value = |line: &str| line.strip_prefix("relay_auth_total{outcome=\"malformed\"} ")?.parse().ok();
    metrics.lines().find_map(value)
}

fn ready(listen: SocketAddr, status: StatusCode, body: &Value) -> Finding {
    let (check, about) = (Check::Ready, listen.to_string());
    let degraded = body.get("redis").and_then(Value::as_str) == Some("degraded");
    match status {
        StatusCode::OK if degraded => Finding::warn(
            check,
            &about,
            "ready, but degraded: Redis is away or refuses",
            "see the findings about Redis",
        ),
        StatusCode::OK => Finding::ok(check, &about, "ready"),
        status => {
            let state = format!("not ready (status {}): it is stopping", status.as_u16());
            Finding::warn(check, &about, state, "wait until it has stopped, or start it again")
        }
    }
}

/// The answer of whatever listens there.
async fn ask(listen: SocketAddr, path: &str, patience: Duration) -> Result<(StatusCode, Bytes), Nothing> {
    if can_listen(listen).is_ok() {
        return Err(Nothing::Listens);
    }
    let request = Request::get(path).header("host", "localhost").body(Full::default());
    let request = request.map_err(|_| Nothing::Answers)?;
    match timeout(patience, probe::call(listen, request)).await {
        Ok(Ok(answer)) => Ok((answer.status(), answer.into_body())),
        Ok(Err(_)) | Err(_) => Err(Nothing::Answers),
    }
}

enum Nothing {
    Listens,
    Answers,
}

/// Whether the relay could listen there now.
fn can_listen(listen: SocketAddr) -> std::io::Result<()> {
    // Port 0 is any that is free.
    server::listen(listen).map(drop)
}

fn address(check: Check, listen: SocketAddr, what: Result<Option<String>, Nothing>) -> Finding {
    let about = listen.to_string();
    let setting = check.key();
    match what {
        Ok(Some(state)) => Finding::ok(check, &about, state),
        Err(Nothing::Listens) => Finding::ok(check, &about, "free: no relay runs here now"),
        Ok(None) | Err(Nothing::Answers) => match can_listen(listen) {
            Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => {
                let state = format!("the relay cannot listen there: {}", error.kind());
                let advice = format!("set {setting} to an address of this machine, with a port above 1023");
                Finding::bad(check, &about, state, advice)
            }
            _ => {
                let state = "in use by something that is not a relay, or by a relay that does not answer";
                Finding::bad(check, &about, state, format!("stop it, or set {setting} to another port"))
            }
        },
    }
}

/// As [`address`], where what listens cannot be asked.
fn occupied(check: Check, listen: SocketAddr) -> Finding {
    match can_listen(listen) {
        Ok(()) => address(check, listen, Err(Nothing::Listens)),
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
            Finding::ok(check, &listen.to_string(), "something listens; it speaks TLS")
        }
        Err(_) => address(check, listen, Err(Nothing::Answers)),
    }
}
