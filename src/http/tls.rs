//! HTTPS without a proxy: the certificate and its key, how they are renewed while the relay serves, and the
//! handshake. It must not know requests, slots or clocks: whoever calls bounds the handshake's time.
//!
//! TLS 1.2 and 1.3 with forward secrecy and authenticated encryption only, ALPN `http/1.1` only, no early data
//! (which could be replayed). Sessions are resumed by tickets, so that no client costs memory; their keys are
//! made in this process, change every six hours, and end with the certificate they were issued under.

use std::{
    fs, io,
    io::Read,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use arc_swap::ArcSwap;
use aws_lc_rs::digest;
use jiff::Timestamp;
use rustls::{
    AlertDescription, ServerConfig, ServerConnection,
    crypto::aws_lc_rs as provider,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
    sign::{CertifiedKey, SingleCertAndKey},
};
use secrecy::{ExposeSecret, SecretBox};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    task::spawn_blocking,
    time::sleep,
};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use x509_parser::parse_x509_certificate;

use crate::{
    clock::Clock,
    metrics::{Handshake, Metrics},
};

/// The setting that names the file of the certificate.
const CERTIFICATE: &str = "server.tls.certificate";
/// The setting that names the file of its key.
const KEY: &str = "server.tls.key";

/// How often the files are looked at. Whoever renews certificates does so weeks ahead.
const LOOK: Duration = Duration::from_mins(1);
/// No file of certificates is as large; a device or a log may be.
const MAX_FILE: u64 = 1 << 20;
/// The first byte of a TLS handshake.
const HANDSHAKE: u8 = 0x16;
/// What a peer is told that speaks plain HTTP. Its request is not read, so nothing of it is repeated.
const SPEAK_TLS: &str = "HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: 45\r\n\
                         connection: close\r\n\r\nThis is HTTPS; plain HTTP is not spoken here\n";

/// Settings `server.tls.*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// `server.tls.certificate`: a PEM file with the relay's certificate, then those that lead to its root.
    pub certificate: PathBuf,
    /// `server.tls.key`: a PEM file with the certificate's private key.
    pub key: PathBuf,
}

/// The files cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{setting}: {}: {fault}", path.display())]
pub struct Error {
    /// Which setting named the file.
    pub setting: &'static str,
    /// The file.
    pub path: PathBuf,
    /// What is wrong with it.
    #[source]
    pub fault: Fault,
}

/// What is wrong with a file. Nothing of its content is ever repeated.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// It is not there, or not for us to read.
    #[error("cannot be read: {0}")]
    Unreadable(#[source] io::Error),
    /// It is too large to be what it should be.
    #[error("larger than {MAX_FILE} bytes; expected a PEM file")]
    TooLarge,
    /// There is no certificate in it.
    #[error("expected a PEM file with a certificate (BEGIN CERTIFICATE), found none")]
    NoCertificate,
    /// A certificate in it does not decode.
    #[error("certificate {0} in it cannot be decoded")]
    BrokenCertificate(usize),
    /// There is no key in it.
    #[error("expected a PEM file with a private key (BEGIN PRIVATE KEY), found none")]
    NoKey,
    /// The key needs a password, which the relay has none for.
    #[error("the private key is encrypted; decrypt it: openssl pkey -in FILE -out FILE")]
    EncryptedKey,
    /// The key is of a kind that TLS has no use for.
    #[error(
        "the private key cannot be used: expected RSA (2048 to 8192 bits), ECDSA (P-256, P-384, P-521) or Ed25519"
    )]
    UnusableKey,
    /// The key is another certificate's.
    #[error("the private key does not belong to the certificate in {}", .0.display())]
    Mismatch(PathBuf),
    /// The key's certificate is not the first.
    #[error("the relay's own certificate has to be the first in {}, before those of its issuers", .0.display())]
    Order(PathBuf),
    /// rustls refused the pair for another reason.
    #[error("cannot be used: {0}")]
    Refused(#[source] rustls::Error),
}

/// The content of a file, or why there is none.
type Content = Result<SecretBox<Vec<u8>>, Fault>;

/// Both files, read but not judged.
struct Files {
    named: Config,
    certificate: Content,
    key: Content,
}

impl Files {
    fn read(named: &Config) -> Self {
        let content = |path: &Path| {
            let read = || {
                let mut bytes = Vec::new();
                fs::File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
                io::Result::Ok(SecretBox::new(Box::new(bytes)))
            };
            match read() {
                Ok(bytes) if bytes.expose_secret().len() as u64 > MAX_FILE => Err(Fault::TooLarge),
                Ok(bytes) => Ok(bytes),
                Err(error) => Err(Fault::Unreadable(error)),
            }
        };
        Self { named: named.clone(), certificate: content(&named.certificate), key: content(&named.key) }
    }

    /// The same for as long as both files are as they are.
    fn fingerprint(&self) -> [u8; 32] {
        let mut context = digest::Context::new(&digest::SHA256);
        for content in [&self.certificate, &self.key] {
            let text = content.as_ref().err().map(Fault::to_string).unwrap_or_default();
            let bytes = content.as_ref().map_or(text.as_bytes(), |bytes| bytes.expose_secret());
            context.update(digest::digest(&digest::SHA256, bytes).as_ref());
        }
        let mut fingerprint = [0; 32];
        fingerprint.copy_from_slice(context.finish().as_ref());
        fingerprint
    }

    fn pair(self) -> Result<Pair, Error> {
        let fingerprint = self.fingerprint();
        let Self { named, certificate, key } = self;
        let in_certificate = |fault| Error { setting: CERTIFICATE, path: named.certificate.clone(), fault };
        let in_key = |fault| Error { setting: KEY, path: named.key.clone(), fault };
        let certificate = certificate.map_err(in_certificate)?;
        let key = key.map_err(in_key)?;
        let chain = certificates(certificate.expose_secret()).map_err(in_certificate)?;
        let (not_before, not_after) = validity(&chain).map_err(in_certificate)?;
        let key = private_key(key.expose_secret()).map_err(in_key)?;
        let certified = certify(&chain, &key).map_err(|error| match error {
            rustls::Error::InconsistentKeys(_) => {
                let elsewhere =
                    chain.iter().skip(1).any(|own| certify(std::slice::from_ref(own), &key).is_ok());
                let file = named.certificate.clone();
                in_key(if elsewhere { Fault::Order(file) } else { Fault::Mismatch(file) })
            }
            rustls::Error::InvalidCertificate(_) => in_certificate(Fault::BrokenCertificate(1)),
            rustls::Error::General(_) => in_key(Fault::UnusableKey),
            other => in_certificate(Fault::Refused(other)),
        })?;
        let config = server_config(certified).map_err(|error| in_certificate(Fault::Refused(error)))?;
        Ok(Pair { config: Arc::new(config), not_before, not_after, fingerprint, files: named })
    }
}

/// A certificate and its key, which fit.
pub struct Pair {
    config: Arc<ServerConfig>,
    not_before: Timestamp,
    not_after: Timestamp,
    fingerprint: [u8; 32],
    files: Config,
}

impl Pair {
    /// Reads and judges both files. What can be wrong with them is found here, before anything is replaced.
    ///
    /// # Errors
    /// The first fault, with the setting and the file.
    pub fn load(files: &Config) -> Result<Self, Error> {
        Files::read(files).pair()
    }

    /// Logs what is odd but no reason not to serve, and what is used from now on.
    fn tell(&self, clock: Clock) {
        let (certificate, expires) = (self.files.certificate.display(), self.not_after);
        if self.not_after <= clock.now() {
            warn!(%certificate, expired = %expires, "the TLS certificate has expired: clients will refuse it");
        } else if self.not_before > clock.now() {
            let valid_from = self.not_before;
            warn!(%certificate, %valid_from, "the TLS certificate is not valid yet: clients will refuse it");
        }
        let key = &self.files.key;
        if fs::metadata(key).is_ok_and(|key| key.permissions().mode() & 0o007 != 0) {
            warn!(key = %key.display(), "every user of this machine can read the TLS key: chmod o= it");
        }
        info!(%certificate, %expires, "TLS certificate in use");
    }
}

/// Takes connections with the certificate in use; a cheap clone.
#[derive(Clone)]
pub struct TlsAcceptor(Arc<Shared>);

struct Shared {
    current: ArcSwap<ServerConfig>,
    seen: Mutex<Seen>,
    clock: Clock,
    metrics: Metrics,
}

/// The files as they were last looked at.
struct Seen {
    files: Config,
    fingerprint: [u8; 32],
}

impl TlsAcceptor {
    /// One that uses `pair`.
    #[must_use]
    pub fn new(pair: Pair, clock: Clock, metrics: Metrics) -> Self {
        let seen = Seen { files: pair.files.clone(), fingerprint: pair.fingerprint };
        let current = ArcSwap::new(Arc::clone(&pair.config));
        let this = Self(Arc::new(Shared { current, seen: Mutex::new(seen), clock, metrics }));
        this.install(pair);
        this
    }

    /// Uses `pair` from the next handshake on; connections that are there go on as they are.
    pub fn install(&self, pair: Pair) {
        pair.tell(self.0.clock);
        self.0.metrics.tls_certificate_expiry.set((), pair.not_after.as_second());
        self.0.current.store(Arc::clone(&pair.config));
        *self.seen() = Seen { files: pair.files, fingerprint: pair.fingerprint };
    }

    /// Reads `files` and uses them from now on, also if they seem to be the same.
    ///
    /// # Errors
    /// When they cannot be used; what was in use stays so.
    pub fn reload(&self, files: &Config) -> Result<(), Error> {
        self.install(Pair::load(files)?);
        Ok(())
    }

    /// Looks each minute whether the files have changed, and uses what they have become. A faulty pair is
    /// logged once and changes nothing.
    pub async fn watch(self, shutdown: CancellationToken) {
        let watching = async {
            loop {
                sleep(LOOK).await;
                let this = self.clone();
                // A file system may be slow, or somebody else's.
                let _ = spawn_blocking(move || this.look()).await;
            }
        };
        let _: Option<()> = shutdown.run_until_cancelled(watching).await;
    }

    fn look(&self) {
        let named = self.seen().files.clone();
        let files = Files::read(&named);
        let fingerprint = files.fingerprint();
        if std::mem::replace(&mut self.seen().fingerprint, fingerprint) == fingerprint {
            return;
        }
        match files.pair() {
            Ok(pair) => self.install(pair),
            Err(error) => {
                error!(%error, "the renewed TLS certificate cannot be used; the old one stays in use")
            }
        }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The handshake; without a connection, why there is none. It takes as long as the peer takes.
    pub(super) async fn accept<IO>(&self, mut io: IO) -> Result<TlsStream<IO>, Handshake>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let first = io.read_u8().await.map_err(|_| Handshake::Closed)?;
        // Methods begin with a letter. rustls would answer an alert, which no client of plain HTTP understands.
        if first.is_ascii_alphabetic() {
            refuse_plain_http(io).await;
            return Err(Handshake::PlainHttp);
        }
        let give_back = |connection: &mut ServerConnection| {
            // Into an empty buffer: it is always taken.
            let _ = connection.read_tls(&mut [first].as_slice());
        };
        if first != HANDSHAKE {
            return Err(Handshake::Failed);
        }
        let acceptor = tokio_rustls::TlsAcceptor::from(self.0.current.load_full());
        acceptor.accept_with(io, give_back).await.map_err(|error| outcome(&error))
    }
}

/// Tells a peer what is spoken here, and takes what it still sends: closing with unread bytes would reset the
/// connection, and the peer might lose the answer.
async fn refuse_plain_http<IO: AsyncRead + AsyncWrite + Unpin>(mut io: IO) {
    let told = async {
        io.write_all(SPEAK_TLS.as_bytes()).await?;
        io.shutdown().await?;
        let mut rest = [0; 1024];
        while io.read(&mut rest).await? > 0 {}
        io::Result::Ok(())
    };
    // A peer that is gone cannot be told.
    let _ = told.await;
}

/// What a handshake that failed with `error` came to.
fn outcome(error: &io::Error) -> Handshake {
    let Some(error) = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) else {
        return Handshake::Closed;
    };
    use AlertDescription as Alert;
    match error {
        rustls::Error::PeerIncompatible(_) | rustls::Error::NoApplicationProtocol => Handshake::Incompatible,
        rustls::Error::AlertReceived(alert) => match alert {
            Alert::ProtocolVersion | Alert::HandshakeFailure | Alert::InsufficientSecurity => {
                Handshake::Incompatible
            }
            Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::DecryptError => Handshake::Rejected,
            Alert::CloseNotify | Alert::UserCanceled => Handshake::Closed,
            _ => Handshake::Failed,
        },
        _ => Handshake::Failed,
    }
}

fn certificates(bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, Fault> {
    // An editor's mark at the beginning would hide the first certificate.
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let chain: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(bytes).collect();
    match chain {
        Ok(chain) if !chain.is_empty() => Ok(chain),
        // The error would repeat a line of the file, which may be the key's.
        Ok(_) | Err(_) => Err(Fault::NoCertificate),
    }
}

/// From when until when all of `chain` is valid.
fn validity(chain: &[CertificateDer<'_>]) -> Result<(Timestamp, Timestamp), Fault> {
    let (mut from, mut until) = (Timestamp::MIN, Timestamp::MAX);
    for (number, certificate) in chain.iter().enumerate() {
        let broken = || Fault::BrokenCertificate(number + 1);
        let (_, certificate) = parse_x509_certificate(certificate).map_err(|_| broken())?;
        let time = |time: x509_parser::time::ASN1Time| Timestamp::from_second(time.timestamp());
        from = from.max(time(certificate.validity().not_before).map_err(|_| broken())?);
        until = until.min(time(certificate.validity().not_after).map_err(|_| broken())?);
    }
    Ok((from, until))
}

fn private_key(bytes: &[u8]) -> Result<PrivateKeyDer<'static>, Fault> {
    PrivateKeyDer::from_pem_slice(bytes).map_err(|_| {
        // `BEGIN ENCRYPTED PRIVATE KEY`, and `Proc-Type: 4,ENCRYPTED` of old.
        let encrypted = bytes.windows(9).any(|word| word == b"ENCRYPTED");
        if encrypted { Fault::EncryptedKey } else { Fault::NoKey }
    })
}

fn certify(
    chain: &[CertificateDer<'static>],
    key: &PrivateKeyDer<'static>,
) -> Result<CertifiedKey, rustls::Error> {
    CertifiedKey::from_der(chain.to_vec(), key.clone_key(), &provider::default_provider())
}

fn server_config(certified: CertifiedKey) -> Result<ServerConfig, rustls::Error> {
    // The provider's suites are those: ECDHE with AES-GCM or ChaCha20-Poly1305, and nothing else.
    let mut config = ServerConfig::builder_with_provider(Arc::new(provider::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.ticketer = provider::Ticketer::new()?;
    Ok(config)
}

/// A client's connection, with TLS of our own or without: what is without costs no call through a table.
pub(super) enum Stream<IO> {
    Plain(IO),
    Tls(Box<TlsStream<IO>>),
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Stream<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_read(cx, out),
            Self::Tls(io) => Pin::new(io).poll_read(cx, out),
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Stream<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_write(cx, bytes),
            Self::Tls(io) => Pin::new(io).poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_write_vectored(cx, slices),
            Self::Tls(io) => Pin::new(io).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(io) => io.is_write_vectored(),
            Self::Tls(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_flush(cx),
            Self::Tls(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Self::Tls(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use rcgen::{CertificateParams, KeyPair};
    use rustls::{ClientConfig, RootCertStore, SupportedCipherSuite};
    use tempfile::TempDir;
    use tokio::io::duplex;
    use tokio_rustls::TlsConnector;

    use super::*;

    /// A ClientHello of TLS 1.0, as a client of 2005 sends it: no extension, one suite.
    pub(in crate::http) const TLS_1_0: &[u8] = &[
        0x16, 3, 1, 0, 45, // a handshake record
        1, 0, 0, 41, 3, 1, // ClientHello, TLS 1.0
        1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27,
        28, 29, 30, 31, 32, 0, // random, no session
        0, 2, 0, 0x2f, // TLS_RSA_WITH_AES_128_CBC_SHA
        1, 0, // no compression
    ];

    /// A certificate that signs itself, and its key, in files.
    pub(in crate::http) struct Issued {
        pub(in crate::http) pem: String,
        key: String,
        directory: TempDir,
    }

    impl Issued {
        pub(in crate::http) fn to(name: &str) -> Self {
            Self::with(name, |_| {})
        }

        fn with(name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new([name.to_owned()]).unwrap();
            change(&mut params);
            let pem = params.self_signed(&key).unwrap().pem();
            let this = Self { pem, key: key.serialize_pem(), directory: TempDir::new().unwrap() };
            this.write(&this.pem, &this.key);
            this
        }

        pub(in crate::http) fn files(&self) -> Config {
            let file = |name| self.directory.path().join(name);
            Config { certificate: file("certificate.pem"), key: file("key.pem") }
        }

        pub(in crate::http) fn pair(&self) -> Pair {
            Pair::load(&self.files()).unwrap()
        }

        fn write(&self, certificate: impl AsRef<[u8]>, key: impl AsRef<[u8]>) {
            fs::write(self.files().certificate, certificate).unwrap();
            fs::write(self.files().key, key).unwrap();
        }

        fn fault(&self, certificate: impl AsRef<[u8]>, key: impl AsRef<[u8]>) -> Error {
            self.write(certificate, key);
            Pair::load(&self.files()).err().unwrap()
        }
    }

    fn roots(pem: &str) -> RootCertStore {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(pem.as_bytes()).unwrap()).unwrap();
        roots
    }

    /// A client that believes the certificate `pem`.
    pub(in crate::http) fn trusting(pem: &str) -> TlsConnector {
        let config = ClientConfig::builder_with_provider(Arc::new(provider::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots(pem))
            .with_no_client_auth();
        TlsConnector::from(Arc::new(config))
    }

    fn acceptor(issued: &Issued) -> TlsAcceptor {
        TlsAcceptor::new(issued.pair(), Clock::system(), Metrics::new())
    }

    /// Whether a client that believes `pem` gets a connection.
    async fn is_believed(acceptor: &TlsAcceptor, pem: &str) -> bool {
        let (client, server) = duplex(16 * 1024);
        let connecting = trusting(pem).connect("relay.test".try_into().unwrap(), client);
        let (believed, accepted) = tokio::join!(connecting, acceptor.accept(server));
        assert_eq!(believed.is_ok(), accepted.is_ok());
        believed.is_ok()
    }

    #[test]
    fn what_is_offered_is_modern_and_cannot_be_replayed() {
        let config = Issued::to("relay.test").pair().config;
        for suite in &config.crypto_provider().cipher_suites {
            let name = format!("{:?}", suite.suite());
            match suite {
                SupportedCipherSuite::Tls13(_) => {}
                SupportedCipherSuite::Tls12(_) => assert!(name.starts_with("TLS_ECDHE_"), "{name}"),
            }
            assert!(name.contains("_GCM_") || name.contains("_CHACHA20_POLY1305_"), "{name}");
        }
        assert_eq!(config.alpn_protocols, [b"http/1.1"]);
        assert_eq!(config.max_early_data_size, 0);
        assert!(config.ticketer.enabled());
    }

    #[tokio::test]
    async fn http_2_is_not_negotiated_and_http_1_1_is() {
        let issued = Issued::to("relay.test");
        let acceptor = acceptor(&issued);
        for (offered, agreed) in [
            (&[][..], Ok(None)),
            (&["h2", "http/1.1"], Ok(Some("http/1.1"))),
            (&["h2"], Err(Handshake::Incompatible)),
        ] {
            let mut config = ClientConfig::clone(trusting(&issued.pem).config());
            config.alpn_protocols = offered.iter().map(|name| name.as_bytes().to_vec()).collect();
            let (client, server) = duplex(16 * 1024);
            let connector = TlsConnector::from(Arc::new(config));
            let connecting = connector.connect("relay.test".try_into().unwrap(), client);
            let (client, accepted) = tokio::join!(connecting, acceptor.accept(server));
            let came = accepted.map(|_| {
                let client = client.unwrap();
                client.get_ref().1.alpn_protocol().map(|name| String::from_utf8(name.to_vec()).unwrap())
            });
            assert_eq!(came, agreed.map(|name| name.map(String::from)), "{offered:?}");
        }
    }

    #[tokio::test]
    async fn a_session_is_resumed_until_the_certificate_is_replaced() {
        let issued = Issued::to("relay.test");
        let acceptor = acceptor(&issued);
        for version in [&rustls::version::TLS13, &rustls::version::TLS12] {
            let config = ClientConfig::builder_with_provider(Arc::new(provider::default_provider()))
                .with_protocol_versions(&[version])
                .unwrap()
                .with_root_certificates(roots(&issued.pem))
                .with_no_client_auth();
            let connector = TlsConnector::from(Arc::new(config));
            let kind = async || {
                let (client, server) = duplex(16 * 1024);
                let talking = async {
                    let mut client =
                        connector.connect("relay.test".try_into().unwrap(), client).await.unwrap();
                    // Tickets of TLS 1.3 come after the handshake.
                    client.read_u8().await.unwrap();
                    client.get_ref().1.handshake_kind().unwrap()
                };
                let answering = async {
                    let mut server = acceptor.accept(server).await.unwrap();
                    server.write_all(b".").await.unwrap();
                    server.flush().await.unwrap();
                    server
                };
                tokio::join!(talking, answering).0
            };
            assert_eq!(kind().await, rustls::HandshakeKind::Full);
            assert_eq!(kind().await, rustls::HandshakeKind::Resumed);
            acceptor.reload(&issued.files()).unwrap();
            assert_eq!(kind().await, rustls::HandshakeKind::Full, "tickets are not carried over");
        }
    }

    #[test]
    fn every_fault_of_the_files_is_told_with_the_setting_and_nothing_of_their_content() {
        let issued = Issued::to("relay.test");
        let (pem, key) = (issued.pem.clone(), issued.key.clone());
        let other = Issued::to("relay.test");
        let encrypted = key.replace("PRIVATE KEY", "ENCRYPTED PRIVATE KEY");
        let old = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA\n\
                   -----END RSA PRIVATE KEY-----\n";
        let nonsense = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        let unusable = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
        let half = &key[..key.len() / 2];
        for (certificate, private, setting, words) in [
            ("", key.as_str(), CERTIFICATE, "found none"),
            ("not PEM", &key, CERTIFICATE, "found none"),
            (&key, &key, CERTIFICATE, "found none"),
            (nonsense, &key, CERTIFICATE, "certificate 1 in it cannot be decoded"),
            (&(pem.clone() + nonsense), &key, CERTIFICATE, "certificate 2 in it cannot be decoded"),
            (&pem, "", KEY, "found none"),
            (&pem, &pem, KEY, "found none"),
            (&pem, half, KEY, "found none"),
            (&pem, &encrypted, KEY, "is encrypted; decrypt it"),
            (&pem, old, KEY, "is encrypted; decrypt it"),
            (&pem, unusable, KEY, "cannot be used: expected RSA"),
            (&pem, &other.key, KEY, "does not belong to the certificate in "),
            (&(other.pem.clone() + &pem), &key, KEY, "has to be the first"),
            (&"a".repeat(2 << 20), &key, CERTIFICATE, "larger than 1048576 bytes"),
        ] {
            let error = issued.fault(certificate, private);
            let text = format!("{error} {error:?}");
            assert_eq!(error.setting, setting, "{text}");
            assert!(text.contains(words), "{words}: {text}");
            let files = issued.files();
            let file = if setting == KEY { files.key } else { files.certificate };
            assert!(error.to_string().starts_with(&format!("{setting}: {}: ", file.display())), "{text}");
            let secret = key.lines().nth(1).unwrap();
            assert!(!text.contains(secret) && !text.contains("AAAA"), "{text}");
        }
        issued.write(&pem, &key);
        fs::remove_file(issued.files().key).unwrap();
        let error = Pair::load(&issued.files()).err().unwrap();
        assert!(error.to_string().contains("No such file"), "{error}");
        let directory = Config { certificate: issued.directory.path().to_owned(), ..issued.files() };
        assert_eq!(Pair::load(&directory).err().unwrap().setting, CERTIFICATE);
        // One file for both will do.
        let both = pem + &key;
        issued.write(&both, &both);
        issued.pair();
    }

    #[tokio::test(start_paused = true)]
    async fn a_renewed_pair_is_used_within_a_minute_and_a_faulty_one_never() {
        let (issued, next) = (Issued::to("relay.test"), Issued::to("relay.test"));
        let acceptor = acceptor(&issued);
        let shutdown = CancellationToken::new();
        let watching = acceptor.clone().watch(shutdown.clone());
        let story = async {
            // The key is not there yet; then both are; then half a file.
            for (certificate, key, believed) in [
                (&next.pem, &issued.key, &issued),
                (&next.pem, &next.key, &next),
                (&next.pem[..100].to_owned(), &next.key, &next),
                (&issued.pem, &issued.key, &issued),
            ] {
                issued.write(certificate, key);
                sleep(LOOK * 2).await;
                let refused = if believed.pem == next.pem { &issued } else { &next };
                assert!(is_believed(&acceptor, &believed.pem).await);
                assert!(!is_believed(&acceptor, &refused.pem).await);
            }
            fs::remove_file(issued.files().certificate).unwrap();
            assert!(acceptor.reload(&issued.files()).is_err());
            assert!(is_believed(&acceptor, &issued.pem).await);
            shutdown.cancel();
        };
        tokio::join!(watching, story);
    }

    #[test]
    fn when_the_certificate_ends_is_a_metric_and_an_expired_one_is_served() {
        let year = |year| rcgen::date_time_ymd(year, 1, 1);
        let issued = Issued::with("relay.test", |params| {
            (params.not_before, params.not_after) = (year(2001), year(2002));
        });
        let metrics = Metrics::new();
        let acceptor = TlsAcceptor::new(issued.pair(), Clock::system(), metrics.clone());
        assert_eq!(metrics.tls_certificate_expiry.get(()), 1_009_843_200);
        // Of a chain, what ends first.
        let longer = Issued::with("relay.test", |params| params.not_after = year(2091));
        issued.write(longer.pem.clone() + &issued.pem, &longer.key);
        acceptor.reload(&issued.files()).unwrap();
        assert_eq!(metrics.tls_certificate_expiry.get(()), 1_009_843_200);
        issued.write(&longer.pem, &longer.key);
        acceptor.reload(&issued.files()).unwrap();
        assert_eq!(metrics.tls_certificate_expiry.get(()), 3_818_448_000);
    }
}
