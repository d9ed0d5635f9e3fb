//! What `redis.url` says, and what else says who logs in where. It owns the one reader of such URLs, whatever they lead
//! to; it must not connect.

use std::{borrow::Cow, fmt};

use deadpool_redis::redis::{
    ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, RedisConnectionInfo, RedisResult,
};
use percent_encoding::percent_decode_str;
use secrecy::{ExposeSecret, SecretString};

/// What `redis.url` leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// One server.
    Single,
    /// Sentinels, who know the master.
    Sentinel,
    /// Nodes of a cluster.
    Cluster,
}

impl std::str::FromStr for Mode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "single" => Ok(Self::Single),
            "sentinel" => Ok(Self::Sentinel),
            "cluster" => Ok(Self::Cluster),
            _ => Err(()),
        }
    }
}

/// User and password, decoded. They show themselves nowhere.
#[derive(Clone, Default)]
pub struct Login {
    /// Who logs in; the default user if nobody.
    pub user: Option<String>,
    /// With what; without one nobody logs in.
    pub password: Option<SecretString>,
}

impl Login {
    /// The password in clear, for the driver.
    pub(super) fn password(&self) -> Option<&str> {
        self.password.as_ref().map(ExposeSecret::expose_secret)
    }

    /// For the driver.
    pub(super) fn settings(&self) -> RedisConnectionInfo {
        let mut settings = RedisConnectionInfo::default();
        if let Some(user) = &self.user {
            settings = settings.set_username(user);
        }
        match self.password() {
            Some(password) => settings.set_password(password),
            None => settings,
        }
    }
}

impl PartialEq for Login {
    fn eq(&self, other: &Self) -> bool {
        (&self.user, self.password()) == (&other.user, other.password())
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Login(..)")
    }
}

/// What a `redis://` or `rediss://` URL says. It may contain a password, so it shows itself nowhere.
#[derive(Clone, PartialEq)]
pub struct Url {
    tls: bool,
    host: String,
    port: u16,
    database: i64,
    resp3: bool,
    login: Login,
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Url(..)")
    }
}

/// Why a text is no URL of Redis. It does not repeat the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotARedis {
    /// Another scheme, or none.
    #[error("it begins with redis:// or, for TLS, rediss://")]
    Scheme,
    /// No URL.
    #[error("host or port cannot be read; @, /, : and # in a password are percent-encoded")]
    Form,
    /// User or password are no text.
    #[error("user or password are not percent-encoded UTF-8")]
    Login,
    /// The path is no number.
    #[error("the path is the number of a database: /0")]
    Database,
    /// A parameter nobody knows.
    #[error("of parameters there is only protocol=resp2 or protocol=resp3")]
    Parameter,
    /// `#insecure`, for instance.
    #[error("no # in it; certificates are always verified")]
    Fragment,
}

impl std::str::FromStr for Url {
    type Err = NotARedis;

    fn from_str(text: &str) -> Result<Self, NotARedis> {
        let (scheme, _) = text.split_once("://").ok_or(NotARedis::Scheme)?;
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "redis" => false,
            "rediss" => true,
            _ => return Err(NotARedis::Scheme),
        };
        if text.contains('#') {
            return Err(NotARedis::Fragment);
        }
        let url = url::Url::parse(text).map_err(|_| NotARedis::Form)?;
        let decoded = |text: &str| {
            percent_decode_str(text).decode_utf8().map(Cow::into_owned).map_err(|_| NotARedis::Login)
        };
        // Of a scheme it does not know the parser takes nearly anything for a host.
        let host = url.host_str().map(url::Host::parse).and_then(Result::ok).ok_or(NotARedis::Form)?;
        let host = match host {
            url::Host::Domain(name) => name,
            url::Host::Ipv4(ip) => ip.to_string(),
            url::Host::Ipv6(ip) => ip.to_string(),
        };
        let port = url.port().unwrap_or(6379);
        if port == 0 {
            return Err(NotARedis::Form);
        }
        let database = match url.path().trim_matches('/') {
            "" => 0,
            digits if digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                digits.parse::<u16>().map_err(|_| NotARedis::Database)?.into()
            }
            _ => return Err(NotARedis::Database),
        };
        let mut resp3 = false;
        for (name, value) in url.query_pairs() {
            resp3 = match (&*name, &*value) {
                ("protocol", "2" | "resp2") => false,
                ("protocol", "3" | "resp3") => true,
                _ => return Err(NotARedis::Parameter),
            };
        }
        let user = (!url.username().is_empty()).then(|| decoded(url.username())).transpose()?;
        let password = url.password().filter(|text| !text.is_empty()).map(decoded).transpose()?;
        let login = Login { user, password: password.map(SecretString::from) };
        Ok(Self { tls, host, port, database, resp3, login })
    }
}

impl Url {
    /// Where it leads, for the driver.
    pub(super) fn address(&self, tls: bool) -> ConnectionAddr {
        let (host, port) = (self.host.clone(), self.port);
        if tls {
            ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None }
        } else {
            ConnectionAddr::Tcp(host, port)
        }
    }

    /// All of it, for the driver.
    pub(super) fn connection(&self, login: &Login, database: i64) -> RedisResult<ConnectionInfo> {
        let settings = login.settings().set_db(database).set_protocol(self.protocol());
        Ok(self.address(self.tls).into_connection_info()?.set_redis_settings(settings))
    }

    pub(super) fn protocol(&self) -> ProtocolVersion {
        if self.resp3 { ProtocolVersion::RESP3 } else { ProtocolVersion::RESP2 }
    }

    /// The number of the database.
    pub(super) fn database(&self) -> i64 {
        self.database
    }

    /// Who logs in.
    pub(super) fn login(&self) -> &Login {
        &self.login
    }

    /// The same, whoever logs in.
    #[must_use]
    pub fn without_login(&self) -> Self {
        Self { login: Login::default(), ..self.clone() }
    }

    /// Where it leads: host and port, nothing else.
    #[must_use]
    pub fn place(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    /// Whether it leads to this machine itself.
    #[must_use]
    pub fn is_local(&self) -> bool {
        let address = self.host.parse::<std::net::IpAddr>();
        self.host == "localhost" || address.is_ok_and(|address| address.is_loopback())
    }

    /// Whether it asks for TLS.
    #[must_use]
    pub fn is_encrypted(&self) -> bool {
        self.tls
    }

    /// Whether it has a password.
    #[must_use]
    pub fn has_password(&self) -> bool {
        self.login.password.is_some()
    }
}

/// Whether `urls` can be used together in `mode`.
///
/// # Errors
/// Why they cannot.
pub fn fit(urls: &[Url], mode: Mode) -> Result<(), &'static str> {
    let Some((first, others)) = urls.split_first() else { return Ok(()) };
    match mode {
        Mode::Single if !others.is_empty() => {
            Err("expected one URL in mode single; several are for redis.mode sentinel or cluster")
        }
        Mode::Cluster if urls.iter().any(|url| url.database != 0) => {
            Err("expected no database: a cluster has none but 0")
        }
        Mode::Sentinel | Mode::Cluster
            if others
                .iter()
                .any(|url| (&url.login, url.tls, url.resp3) != (&first.login, first.tls, first.resp3)) =>
        {
            Err("expected the same user, password, scheme and protocol in all URLs")
        }
        Mode::Sentinel if others.iter().any(|url| url.database != first.database) => {
            Err("expected the same database in all URLs: it is the master's")
        }
        Mode::Single | Mode::Sentinel | Mode::Cluster => Ok(()),
    }
}
