//! How connections come about: to one server, to the master that sentinels name, to a cluster. It owns who is asked
//! where and with which certificates; it must not know what a connection is for.
//!
//! The driver's clients are used for what deadpool-redis has no setting for: certificates, and logins of sentinels of
//! their own. Files with certificates are read whenever a connection is made, so a certificate that was renewed is used
//! without anybody's doing.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use deadpool::managed::{self, Manager as _, Metrics, RecycleError, RecycleResult};
use deadpool_redis::{
    cluster::ClusterConnection,
    redis::{
        AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionInfo, ErrorKind, RedisError, RedisResult,
        TlsCertificates, TlsMode,
        aio::MultiplexedConnection,
        cluster::ClusterClientBuilder,
        sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType},
    },
};
use futures_util::{StreamExt, stream::FuturesUnordered};
use rustls::{
    RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    sign::CertifiedKey,
};

use super::{
    Config, Link,
    url::{Login, Mode, Url},
};

/// How long whoever wants a connection waits for it: sentinels, the master they name, all nodes of a cluster.
pub(super) const LINK: Duration = Duration::from_secs(5);
/// How long one connection may take to come up.
const CONNECT: Duration = Duration::from_secs(1);
/// The same for a node of a cluster: the others are waited for as well, and one that is silent must not use up the time.
const CONNECT_NODE: Duration = Duration::from_millis(500);
/// The driver waits for answers as long, longer than any blocking read; the relay itself gives up sooner.
const ANSWER: Duration = Duration::from_secs(3);
/// The same for a node of a cluster, for the same reason.
const NODE_ANSWER: Duration = Duration::from_millis(1_500);
/// Connections in the pool: the shared one, one for blocking reads, and room to replace them.
const POOL: usize = 4;

/// Certificates for Redis, each in a PEM file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    /// `redis.ca_file`: who is believed, in place of the platform's authorities.
    pub authorities: Option<PathBuf>,
    /// `redis.client_certificate` and `redis.client_key`: what the relay shows.
    pub client: Option<(PathBuf, PathBuf)>,
}

/// A file that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{setting}: {path}: {reason}", path = .path.display())]
pub struct FileFault {
    /// The setting that names it.
    pub setting: &'static str,
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: String,
}

impl Files {
    /// Whether each can be read and is what it should be.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check(&self) -> Result<(), FileFault> {
        let fault =
            |setting, path: &Path, reason: String| FileFault { setting, path: path.to_owned(), reason };
        if let Some(path) = &self.authorities {
            let checking = certificates(path).and_then(|certificates| {
                let mut roots = RootCertStore::empty();
                certificates.into_iter().try_for_each(|certificate| roots.add(certificate)).map_err(told)
            });
            checking.map_err(|reason| fault("redis.ca_file", path, reason))?;
        }
        if let Some((certificate, key)) = &self.client {
            let chain = certificates(certificate)
                .map_err(|reason| fault("redis.client_certificate", certificate, reason))?;
            let wrong = |reason| fault("redis.client_key", key, reason);
            let private = read(key).map_err(told).map_err(wrong)?;
            let private = PrivateKeyDer::from_pem_slice(&private)
                .map_err(|_| wrong("no private key in PEM form, without a passphrase, in it".to_owned()))?;
            CertifiedKey::from_der(chain, private, &aws_lc_rs::default_provider())
                .map_err(|error| wrong(format!("it does not fit redis.client_certificate: {error}")))?;
        }
        Ok(())
    }

    /// What they hold, for the driver.
    fn load(&self) -> RedisResult<TlsCertificates> {
        let unread = |setting| move |_| RedisError::from((ErrorKind::InvalidClientConfig, setting));
        let client = self.client.as_ref().map(|(certificate, key)| {
            Ok::<_, RedisError>(ClientTlsConfig {
                client_cert: read(certificate).map_err(unread("redis.client_certificate cannot be read"))?,
                client_key: read(key).map_err(unread("redis.client_key cannot be read"))?,
            })
        });
        let authorities =
            self.authorities.as_ref().map(|path| read(path).map_err(unread("redis.ca_file cannot be read")));
        Ok(TlsCertificates { client_tls: client.transpose()?, root_cert: authorities.transpose()? })
    }
}

fn told(error: impl ToString) -> String {
    error.to_string()
}

/// The most bytes of a file of certificates: a whole platform's are some 200 KiB.
const MOST: u64 = 4 << 20;

/// A regular file: a device or a pipe might never end.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let about = fs::metadata(path)?;
    if !about.is_file() || about.len() > MOST {
        return Err(io::Error::other(format!("it is no file of at most {MOST} bytes")));
    }
    let text = fs::read(path)?;
    // An editor's mark at the beginning would hide the first certificate.
    Ok(text.strip_prefix(b"\xef\xbb\xbf").map_or_else(|| text.clone(), <[u8]>::to_vec))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let text = read(path).map_err(told)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&text).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => Err("no PEM certificate in it".to_owned()),
        Ok(certificates) => Ok(certificates),
        Err(_) => Err("it is not in PEM form".to_owned()),
    }
}

/// Connections to what `redis.url` leads to; they are taken out of it for good.
#[derive(Clone)]
pub(super) struct Pool(managed::Pool<Manager>);

impl Pool {
    /// Connects nowhere yet.
    pub(super) fn new(config: &Config) -> anyhow::Result<Self> {
        super::url::fit(&config.urls, config.mode).map_err(anyhow::Error::msg)?;
        config.files.check()?;
        let Some(first) = config.urls.first().cloned() else { anyhow::bail!("redis.url is not set") };
        let manager = Manager { first, config: Arc::new(config.clone()) };
        Ok(Self(managed::Pool::builder(manager).max_size(POOL).build()?))
    }

    pub(super) async fn connect(&self) -> RedisResult<Link> {
        match self.0.get().await {
            Ok(link) => Ok(managed::Object::take(link)),
            Err(managed::PoolError::Backend(error)) => Err(error),
            Err(_) => Err(RedisError::from((ErrorKind::Io, "no connection from the pool"))),
        }
    }
}

/// Makes connections for the pool.
struct Manager {
    first: Url,
    config: Arc<Config>,
}

impl managed::Manager for Manager {
    type Type = Link;
    type Error = RedisError;

    async fn create(&self) -> RedisResult<Link> {
        Ok(match self.config.mode {
            Mode::Single => Link::Node(self.node(self.info(&self.first)?).await?),
            Mode::Sentinel => Link::Node(self.master().await?),
            Mode::Cluster => Link::Cluster(self.cluster().await?),
        })
    }

    async fn recycle(&self, _: &mut Link, _: &Metrics) -> RecycleResult<RedisError> {
        Err(RecycleError::message("connections are taken for good"))
    }
}

impl Manager {
    /// How long the driver waits.
    fn patience(&self) -> AsyncConnectionConfig {
        let answer = ANSWER.max(self.config.timeout);
        AsyncConnectionConfig::new().set_connection_timeout(Some(CONNECT)).set_response_timeout(Some(answer))
    }

    /// How what `url` leads to is spoken to.
    fn info(&self, url: &Url) -> RedisResult<ConnectionInfo> {
        url.connection(&self.config.login(url), self.config.database(url))
    }

    async fn node(&self, info: ConnectionInfo) -> RedisResult<MultiplexedConnection> {
        let info = if self.first.is_encrypted() {
            Client::build_with_tls(info, self.config.files.load()?)?.get_connection_info().clone()
        } else {
            info
        };
        deadpool_redis::Manager::new_with_config(info, self.patience())?.create().await
    }

    async fn cluster(&self) -> RedisResult<ClusterConnection> {
        let nodes: RedisResult<Vec<ConnectionInfo>> =
            self.config.urls.iter().map(|url| self.info(url)).collect();
        let mut builder = ClusterClientBuilder::new(nodes?)
            .use_protocol(self.first.protocol())
            .connection_timeout(CONNECT_NODE)
            .response_timeout(NODE_ANSWER.max(self.config.timeout));
        if self.first.is_encrypted() {
            builder = builder.certs(self.config.files.load()?);
        }
        builder.build()?.get_async_connection().await
    }

    /// Asks all sentinels side by side: one that is silent holds nobody up. The first that leads to a master counts.
    async fn master(&self) -> RedisResult<MultiplexedConnection> {
        let mut asking: FuturesUnordered<_> = self.config.urls.iter().map(|url| self.ask(url)).collect();
        let mut worst: Option<RedisError> = None;
        while let Some(answer) = asking.next().await {
            match answer {
                Ok(link) => return Ok(link),
                // That one of several is gone says less than what the others say.
                Err(error) if worst.as_ref().is_none_or(|worst| worst.is_io_error()) => worst = Some(error),
                Err(_) => {}
            }
        }
        Err(worst.unwrap_or_else(|| RedisError::from((ErrorKind::EmptySentinelList, "no sentinel"))))
    }

    /// Asks one sentinel for the master, and connects to it.
    async fn ask(&self, url: &Url) -> RedisResult<MultiplexedConnection> {
        // Unless it is said who logs in to the sentinels, it is who the URL says, or who logs in to the master; but to a
        // sentinel that knows of no password nobody can.
        let logins = match &self.config.sentinel_login {
            Some(own) => vec![own.clone()],
            None => vec![url.login().clone(), self.config.login(url), Login::default()],
        };
        let mut refused: Option<RedisError> = None;
        for (at, login) in logins.iter().enumerate() {
            if logins.iter().take(at).any(|tried| tried == login) {
                continue;
            }
            let outcome = self.sentinel(url, login)?.get_async_connection_with_config(&self.patience()).await;
            match outcome {
                Err(error)
                    if error.kind() == ErrorKind::AuthenticationFailed || error.code() == Some("NOAUTH") =>
                {
                    refused = refused.or(Some(error));
                }
                outcome => return outcome,
            }
        }
        Err(refused.unwrap_or_else(|| RedisError::from((ErrorKind::AuthenticationFailed, "nobody logs in"))))
    }

    fn sentinel(&self, url: &Url, login: &Login) -> RedisResult<SentinelClient> {
        let (master_tls, sentinel_tls) =
            (url.is_encrypted(), self.config.sentinel_tls.unwrap_or(url.is_encrypted()));
        let mut builder = SentinelClientBuilder::new(
            [url.address(sentinel_tls)],
            &self.config.master_name,
            SentinelServerType::Master,
        )?
        .set_client_to_redis_db(self.config.database(url))
        .set_client_to_redis_protocol(url.protocol());
        if master_tls {
            builder = builder
                .set_client_to_redis_tls_mode(TlsMode::Secure)
                .set_client_to_redis_certificates(self.config.files.load()?);
        }
        if sentinel_tls {
            builder = builder.set_client_to_sentinel_certificates(self.config.files.load()?);
        }
        let of_master = self.config.login(url);
        if let Some(user) = &of_master.user {
            builder = builder.set_client_to_redis_username(user);
        }
        if let Some(password) = of_master.password() {
            builder = builder.set_client_to_redis_password(password);
        }
        if let Some(user) = &login.user {
            builder = builder.set_client_to_sentinel_username(user);
        }
        if let Some(password) = login.password() {
            builder = builder.set_client_to_sentinel_password(password);
        }
        builder.build()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redis_server::Authority;

    #[test]
    fn files_that_cannot_be_used_are_told_by_their_setting() {
        let (one, other) = (Authority::new(), Authority::new());
        let of = |authorities: Option<&str>, client: Option<(&str, &str)>| {
            let files = Files {
                authorities: authorities.map(PathBuf::from),
                client: client.map(|(certificate, key)| (certificate.into(), key.into())),
            };
            files.check().map_err(|fault| (fault.setting, fault.reason))
        };
        let [ca, certificate, key] = ["ca.pem", "client.pem", "client.key"].map(|name| one.path(name));
        assert_eq!(of(Some(&ca), Some((&certificate, &key))), Ok(()));
        for (authorities, client, setting, said) in [
            (Some("/nowhere/at.all"), None, "redis.ca_file", "No such file"),
            (Some("/dev/zero"), None, "redis.ca_file", "no file"),
            (Some(&*key), None, "redis.ca_file", "no PEM certificate"),
            (None, Some((&*key, &*key)), "redis.client_certificate", "no PEM certificate"),
            (None, Some((&*certificate, &*certificate)), "redis.client_key", "no private key"),
            (None, Some((&*certificate, &*other.path("client.key"))), "redis.client_key", "does not fit"),
        ] {
            let (named, reason) = of(authorities, client).unwrap_err();
            assert!(named == setting && reason.contains(said), "{named}: {reason}");
        }
    }
}
