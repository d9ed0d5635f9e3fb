//! What doctor can find: every check with its stable id, and how a finding is graded. It owns the words that do not
//! depend on what was seen; it must not know how anything is examined.

use serde::{Serialize, Serializer};

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// It works, but costs something or will fail one day.
    Warn,
    /// Doctor could not tell.
    Unknown,
    /// It does not work.
    Bad,
}

impl Severity {
    /// Its name in reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Unknown => "unknown",
            Self::Bad => "bad",
        }
    }
}

macro_rules! checks {
    ($($variant:ident $id:literal $key:literal $what:literal,)*) => {
        /// Everything that is examined.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Check {
            $(#[doc = $what] $variant,)*
        }

        impl Check {
            /// All of them, in the order of reports.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The stable id.
            #[must_use]
            pub fn id(self) -> &'static str {
                match self { $(Self::$variant => $id,)* }
            }

            /// The setting to look at first; empty where there is none.
            #[must_use]
            pub fn key(self) -> &'static str {
                match self { $(Self::$variant => $key,)* }
            }

            /// What is examined.
            #[must_use]
            pub fn what(self) -> &'static str {
                match self { $(Self::$variant => $what,)* }
            }
        }
    };
}

checks! {
    Configuration "configuration" "" "the settings are read without a fault",
    ConfigFile "config-file" "" "nobody else can read secrets in the settings file",
    SecretFile "secret-file" "" "nobody else can read the files of secrets",
    CaFile "ca-file" "egress.extra_ca_file" "certificates believed beside the platform's can be read and have not expired",
    ServerCertificate "server-certificate" "server.tls.certificate" "the listener's own certificate has not expired",
    Memory "memory" "cache.memory" "the cache fits into this machine's or container's memory",
    OpenFiles "open-files" "server.max_connections" "the limit of open files allows the connections that are set",
    RequestDeadline "request-deadline" "request.deadline" "answers come before the platform gives up",
    TimeOuts "time-outs" "cyberscan.timeout" "one call to CyberScan fits into a whole answer",
    IdleTimeout "idle-timeout" "server.idle_timeout" "idle connections outlive those of a load balancer",
    ShutdownTimeout "shutdown-timeout" "server.shutdown_timeout" "requests in flight may end at shutdown",
    Listen "listen" "listen" "the public listener's address is this relay's",
    AdminListen "admin-listen" "admin.listen" "the admin listener's address is this relay's",
    AdminExposure "admin-exposure" "admin.token" "the admin listener is not open to others",
    Ready "ready" "" "the relay that runs here is ready and not degraded",
    Clock "clock" "" "this machine's clock agrees with those of CyberScan and the key issuers",
    EgressProxy "egress-proxy" "egress.proxy" "the proxy lets calls through",
    CyberScanHosts "cyberscan-hosts" "cyberscan.hosts" "there is a CyberScan host to try, and it is allowed",
    CyberScanName "cyberscan-name" "cyberscan.hosts" "CyberScan's name resolves",
    CyberScanAddress "cyberscan-address" "egress.allow_cidrs" "the egress guard allows CyberScan's addresses",
    CyberScanConnection "cyberscan-connection" "cyberscan.hosts" "a connection to CyberScan comes up",
    CyberScanTls "cyberscan-tls" "egress.extra_ca_file" "CyberScan's certificate is accepted",
    CyberScanAnswer "cyberscan-answer" "cyberscan.hosts" "CyberScan's API answers at the host",
    CyberScanLatency "cyberscan-latency" "cyberscan.timeout" "CyberScan answers well within cyberscan.timeout",
    CyberScanKey "cyberscan-key" "" "CyberScan accepts the API key",
    IssuerName "issuer-name" "auth.jwks_hosts" "the key issuer's name resolves",
    IssuerAddress "issuer-address" "egress.allow_cidrs" "the egress guard allows the key issuer's addresses",
    IssuerConnection "issuer-connection" "auth.jwks_hosts" "a connection to the key issuer comes up",
    IssuerTls "issuer-tls" "egress.extra_ca_file" "the key issuer's certificate is accepted",
    IssuerKeys "issuer-keys" "auth.jwks_hosts" "the key issuer publishes keys that can verify tokens",
    Audiences "audiences" "auth.audiences" "the relay knows its public URLs",
    AudienceForm "audience-form" "auth.audiences" "an audience is a URL that the platform can call",
    TrustedProxies "trusted-proxies" "auth.trusted_proxies" "forwarded headers are read from proxies only",
    PublicName "public-name" "auth.audiences" "the public URL's name resolves",
    PublicConnection "public-connection" "auth.audiences" "a connection to the public URL comes up",
    PublicTls "public-tls" "auth.audiences" "the public URL's certificate is accepted",
    PublicRedirect "public-redirect" "auth.audiences" "the public URL leads nowhere else",
    PublicAnswer "public-answer" "auth.audiences" "a relay answers at the public URL",
    PublicVersion "public-version" "" "the relay at the public URL is of this version",
    PublicInstance "public-instance" "auth.audiences" "the public URL leads to the relay that runs here",
    ProxyHeaders "proxy-headers" "" "the proxy in front passes headers on",
    ProxyAuthorization "proxy-authorization" "" "the proxy in front passes the Authorization header on",
    ProxyHeaderLimit "proxy-header-limit" "" "the proxy in front accepts tokens of 4 KiB",
    ProxyBodyLimit "proxy-body-limit" "" "the proxy in front accepts bodies of 256 KiB",
    RedisUrl "redis-url" "redis.url" "replicas share answers and quotas",
    RedisConnection "redis-connection" "redis.url" "Redis is reached as redis.mode says",
    RedisTls "redis-tls" "redis.url" "Redis and the relay agree about TLS",
    RedisAuth "redis-auth" "redis.url" "Redis accepts user and password, and asks for them",
    RedisMode "redis-mode" "redis.mode" "Redis is what redis.mode says",
    RedisLatency "redis-latency" "redis.timeout" "Redis answers well within redis.timeout",
    RedisInfo "redis-info" "redis.url" "doctor may ask Redis about itself",
    RedisVersion "redis-version" "redis.url" "Redis is of a version that has every command used",
    RedisRole "redis-role" "redis.url" "Redis accepts writes",
    RedisCommands "redis-commands" "redis.url" "the Redis user may run every command used",
    RedisScripts "redis-scripts" "redis.url" "the Redis user may run scripts",
    RedisKeys "redis-keys" "redis.url" "the Redis user may use the relay's keys",
    RedisMemory "redis-memory" "redis.url" "Redis has a limit of memory, and room",
    RedisEviction "redis-eviction" "redis.url" "Redis evicts only keys with a time to live",
    RedisPersistence "redis-persistence" "limiter.tenant" "counted calls outlive a restart of Redis where quotas need that",
    RedisClock "redis-clock" "redis.url" "Redis's clock agrees with this machine's",
    RedisEncryption "redis-encryption" "redis.encryption_key" "nobody else can read answers on their way to Redis or in it",
}

impl Serialize for Check {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.id())
    }
}

/// One line of a report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was examined.
    #[serde(rename = "id")]
    pub check: Check,
    /// Of which host, file or URL; empty where there is only one.
    pub about: String,
    /// How bad it is.
    pub severity: Severity,
    /// How it is.
    pub state: String,
    /// What to do; empty where there is nothing to do.
    pub advice: String,
    /// The setting to look at first; empty where there is none.
    pub setting: &'static str,
}

impl Finding {
    fn new(check: Check, about: &str, severity: Severity, state: &str, advice: &str) -> Self {
        let (about, state, advice) = (plain(about), plain(state), plain(advice));
        Self { check, about, severity, state, advice, setting: check.key() }
    }

    pub(super) fn ok(check: Check, about: &str, state: impl AsRef<str>) -> Self {
        Self::new(check, about, Severity::Ok, state.as_ref(), "")
    }

    pub(super) fn warn(check: Check, about: &str, state: impl AsRef<str>, advice: impl AsRef<str>) -> Self {
        Self::new(check, about, Severity::Warn, state.as_ref(), advice.as_ref())
    }

    pub(super) fn bad(check: Check, about: &str, state: impl AsRef<str>, advice: impl AsRef<str>) -> Self {
        Self::new(check, about, Severity::Bad, state.as_ref(), advice.as_ref())
    }

    pub(super) fn unknown(
        check: Check,
        about: &str,
        state: impl AsRef<str>,
        advice: impl AsRef<str>,
    ) -> Self {
        Self::new(check, about, Severity::Unknown, state.as_ref(), advice.as_ref())
    }
}

/// `text` on one line, without anything that a terminal would obey: some of it was written by whoever answered.
pub(super) fn plain(text: &str) -> String {
    const LONGEST: usize = 400;
    let mut plain = String::new();
    for char in text.chars().take(LONGEST) {
        if char.is_control() {
            plain.extend(char.escape_default());
        } else {
            plain.push(char);
        }
    }
    if text.chars().nth(LONGEST).is_some() {
        plain.push('…');
    }
    plain
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn ids_are_unique_and_the_documentation_has_a_row_for_each_and_no_other() {
        let ids: HashSet<&str> = Check::ALL.iter().map(|check| check.id()).collect();
        assert_eq!(ids.len(), Check::ALL.len());
        let documentation = include_str!("../../docs/doctor.md");
        let row = |line: &'static str| line.strip_prefix("| `")?.split_once('`').map(|(id, _)| id);
        let rows: Vec<&str> = documentation
            .lines()
            .skip_while(|line| !line.starts_with("## Findings"))
            .skip(1)
            .take_while(|line| !line.starts_with("## "))
            .filter_map(row)
            .collect();
        let all: Vec<&str> = Check::ALL.iter().map(|check| check.id()).collect();
        assert_eq!(rows, all);
        for check in Check::ALL {
            assert!(documentation.contains(check.what()), "{}", check.what());
        }
    }

    #[test]
    fn nothing_a_terminal_obeys_is_repeated() {
        let finding = Finding::bad(Check::PublicAnswer, "a\u{1b}[2J", "b\r\nc\u{9b}31m", "d");
        assert_eq!((finding.about.as_str(), finding.state.as_str()), ("a\\u{1b}[2J", "b\\r\\nc\\u{9b}31m"));
        assert!(plain(&"x".repeat(10_000)).chars().count() <= 401);
    }
}
