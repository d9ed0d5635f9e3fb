//! Owns a world to run the relay in: a fake CyberScan, and a fake platform that is its own key issuer, both over HTTPS, in this process.
//! Must not know the relay: it speaks to it only through sockets, and no module but the demo, tests and benches uses it.
//!
//! Reading order: `cyberscan` (API, scripts, records of calls), `issuer` (JWKS and tokens), `platform` (module types and
//! what tokens come of them), `data` (what CyberScan knows), `tls` (certificates and the listener of both).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use serde_json::{Value, json};
use tokio_util::sync::DropGuard;

mod cyberscan;
mod data;
mod issuer;
mod platform;
mod tls;

pub use cyberscan::{Behaviour, Call, FakeCyberScan, Recorded, Rule};
pub use issuer::{FakeIssuer, IssuerBehaviour};
pub use platform::{CLIENT_ID, CLIENT_PASSWORD, FakePlatform, PlatformBehaviour};

/// The API key the fake CyberScan accepts from the start.
pub const API_KEY: &str = "sandbox-key";

/// Where the sandbox listens.
#[derive(Clone, Debug)]
pub struct Options {
    /// The address both fakes bind.
    pub listen: IpAddr,
    /// The name by which clients reach them; the certificates cover it besides `localhost` and the loopback addresses.
    pub name: String,
    /// CyberScan's port, 0 for a free one.
    pub cyberscan_port: u16,
    /// The port of issuer and platform, 0 for a free one.
    pub issuer_port: u16,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            listen: Ipv4Addr::LOCALHOST.into(),
            name: "localhost".to_owned(),
            cyberscan_port: 0,
            issuer_port: 0,
        }
    }
}

/// Both fakes and the authority that certifies them. Dropping it stops them; their handles then only answer questions.
pub struct Sandbox {
    /// The root certificate that clients have to trust, as PEM.
    pub ca_pem: String,
    /// The fake CyberScan.
    pub cyberscan: FakeCyberScan,
    /// The fake key issuer.
    pub issuer: FakeIssuer,
    /// The fake platform; it answers where the issuer does.
    pub platform: FakePlatform,
    authority: tls::Authority,
    names: Vec<String>,
    lifetime: tls::Lifetime,
    _stop: DropGuard,
}

impl Sandbox {
    /// Makes certificates and keys and starts both fakes.
    ///
    /// # Errors
    /// If an address cannot be bound, `name` fits no certificate, or a key cannot be made.
    pub async fn start(options: Options) -> io::Result<Self> {
        let authority = tls::Authority::new()?;
        let names: Vec<String> = [&options.name, "localhost", "127.0.0.1", "::1"].map(str::to_owned).into();
        let bind = async |port| {
            tls::Listener::bind(SocketAddr::new(options.listen, port), authority.server_config(&names)?).await
        };
        let lifetime = tls::Lifetime::default();
        let stop = lifetime.shutdown.clone().drop_guard();
        let cyberscan =
            FakeCyberScan::start(bind(options.cyberscan_port).await?, &options.name, lifetime.clone())?;
        let listener = bind(options.issuer_port).await?;
        let issuer = FakeIssuer::at(&listener, &options.name).await?;
        let platform = FakePlatform::start(listener, issuer.clone(), lifetime.clone());
        cyberscan.accept_key(API_KEY);
        Ok(Self {
            ca_pem: authority.ca_pem(),
            cyberscan,
            issuer,
            platform,
            authority,
            names,
            lifetime,
            _stop: stop,
        })
    }

    /// A certificate and its key, as PEM, for a relay that is reached by the names of the fakes.
    ///
    /// # Errors
    /// If no key can be made.
    pub fn certificate(&self) -> io::Result<(String, String)> {
        let (certificate, key) = self.authority.certificate(&self.names)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }

    /// The payload of a token that the relay accepts: `jwks_host`, `aud`, `api_key`, `host`.
    #[must_use]
    pub fn claims(&self, audience: &str) -> Value {
        json!({
            "jwks_host": self.issuer.host(),
            "aud": audience,
            "api_key": API_KEY,
            "host": self.cyberscan.host(),
        })
    }

    /// A signed token with those [`claims`](Self::claims).
    #[must_use]
    pub fn token(&self, audience: &str) -> String {
        self.issuer.mint(&self.claims(audience))
    }

    /// Stops both fakes and waits until their connections are closed.
    pub async fn stop(self) {
        self.lifetime.shutdown.cancel();
        self.lifetime.tasks.close();
        self.lifetime.tasks.wait().await;
    }
}

/// A panic of one test must not be hidden behind the poisoned lock of another.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Unix seconds, for the times inside tokens. The sandbox plays other machines, so it has a wall clock of its own.
#[expect(clippy::disallowed_methods, reason = "the fakes are not the relay: its clock module is not theirs")]
fn unix_now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

/// The compact JWS of `header` and `claims` (RFC 7515), with whatever `sign` makes of the signing input.
fn jws(header: &Value, claims: &Value, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    let encode = |part: &Value| URL_SAFE_NO_PAD.encode(part.to_string());
    let input = format!("{}.{}", encode(header), encode(claims));
    let signature = URL_SAFE_NO_PAD.encode(sign(input.as_bytes()));
    format!("{input}.{signature}")
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};

    use super::*;

    /// A client that trusts the sandbox and follows no redirect.
    #[expect(clippy::disallowed_methods, reason = "the client under test is the sandbox's, not the relay's")]
    pub(super) fn client(sandbox: &Sandbox) -> reqwest::Client {
        // Another test may have installed it already.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        reqwest::Client::builder()
            .tls_certs_only([reqwest::Certificate::from_pem(sandbox.ca_pem.as_bytes()).unwrap()])
            .redirect(reqwest::redirect::Policy::none())
            .timeout(Duration::from_secs(20))
            .build()
            .unwrap()
    }

    pub(super) async fn sandbox() -> Sandbox {
        Sandbox::start(Options::default()).await.unwrap()
    }

    #[tokio::test]
    async fn both_fakes_are_reached_by_name_and_by_address() {
        let sandbox = sandbox().await;
        let client = client(&sandbox);
        for host in [sandbox.issuer.host(), sandbox.issuer.host().replace("localhost", "127.0.0.1")] {
            let url = format!("https://{host}/.well-known/jwks");
            assert_eq!(client.get(url).send().await.unwrap().status(), 200);
        }
        assert_eq!(sandbox.issuer.connections(), 2);
    }

    #[tokio::test]
    async fn a_client_that_does_not_know_the_authority_refuses_the_sandbox() {
        let (one, other) = (sandbox().await, sandbox().await);
        let url = format!("https://{}/.well-known/jwks", other.issuer.host());
        assert!(client(&one).get(url).send().await.unwrap_err().is_connect());
        assert_eq!((other.issuer.connections(), other.issuer.fetches()), (1, 0));
    }

    #[tokio::test]
    async fn its_certificate_for_a_relay_is_believed_by_whoever_believes_the_sandbox() {
        let sandbox = sandbox().await;
        let (certificate, key) = sandbox.certificate().unwrap();
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)
            .unwrap();
        let listener = tls::Listener::bind("127.0.0.1:0".parse().unwrap(), config).await.unwrap();
        let url = format!("https://localhost:{}/.well-known/jwks", listener.port().unwrap());
        listener.serve(sandbox.issuer.clone(), sandbox.lifetime.clone());
        assert_eq!(client(&sandbox).get(url).send().await.unwrap().status(), 200);
    }

    #[tokio::test]
    async fn a_stopped_sandbox_takes_no_connection_and_leaves_no_task() {
        let sandbox = sandbox().await;
        let client = client(&sandbox);
        let url = format!("https://{}/.well-known/jwks", sandbox.issuer.host());
        sandbox.issuer.respond_with(IssuerBehaviour::Hang);
        let hanging = client.get(&url).send();
        let stopping = async {
            while sandbox.issuer.fetches() == 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            sandbox.stop().await;
        };
        let (answer, ()) = tokio::join!(hanging, stopping);
        assert!(answer.is_err());
        assert!(client.get(&url).send().await.unwrap_err().is_connect());
    }

    #[tokio::test]
    async fn dropping_the_sandbox_stops_it() {
        let sandbox = sandbox().await;
        let client = client(&sandbox);
        let (url, tasks) = (format!("https://{}/", sandbox.issuer.host()), sandbox.lifetime.tasks.clone());
        client.get(&url).send().await.unwrap();
        drop(sandbox);
        tasks.close();
        tokio::time::timeout(Duration::from_secs(5), tasks.wait()).await.unwrap();
        assert!(client.get(&url).send().await.is_err());
    }
}
