//! One HTTP call to a listener of our own on this machine, for `healthcheck` and the demo. It is
//! no client for anything else: no redirects, no names, and TLS without a question of whom.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::rt::TokioIo;
use rustls::{
    ClientConfig, DigitallySignedStruct, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;

/// How long the whole call may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The most bytes of an answer.
const ANSWER: usize = 16 << 20;

/// Sends `request` to `listener` and reads the answer.
///
/// # Errors
/// When there is no complete answer.
pub async fn call(listener: SocketAddr, request: Request<Full<Bytes>>) -> anyhow::Result<Response<Bytes>> {
    in_time(async { exchange(connect(listener).await?, request).await }).await
}

/// As [`call`], to a listener that speaks TLS. Whose certificate it shows is not looked at: it is this machine's
/// own, found by its address, and a probe has no secret to lose. (Kubernetes probes in the same way.)
///
/// # Errors
/// When there is no complete answer.
pub async fn call_tls(
    listener: SocketAddr,
    request: Request<Full<Bytes>>,
) -> anyhow::Result<Response<Bytes>> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Anyone(provider)))
        .with_no_client_auth();
    let name = ServerName::IpAddress(reachable(listener).ip().into());
    in_time(async {
        let connector = TlsConnector::from(Arc::new(config));
        let stream = connector.connect(name, connect(listener).await?).await.context("no TLS connection")?;
        exchange(stream, request).await
    })
    .await
}

/// Sends `request` on a connection that is used for nothing else, and reads the answer.
///
/// # Errors
/// When there is no complete answer.
pub async fn exchange<IO>(io: IO, request: Request<Full<Bytes>>) -> anyhow::Result<Response<Bytes>>
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(io)).await?;
    let answer = async {
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, ANSWER).collect().await.map_err(anyhow::Error::from_boxed)?;
        drop(sender);
        Ok(Response::from_parts(head, body.to_bytes()))
    };
    let (answer, _) = tokio::join!(answer, connection);
    answer
}

async fn connect(listener: SocketAddr) -> anyhow::Result<TcpStream> {
    TcpStream::connect(reachable(listener)).await.context("cannot connect")
}

async fn in_time<T>(call: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::time::timeout(TIMEOUT, call).await.context("no answer in time")?
}

/// The address by which a listener is reached from this machine.
fn reachable(listener: SocketAddr) -> SocketAddr {
    match listener.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => (Ipv4Addr::LOCALHOST, listener.port()).into(),
        IpAddr::V6(ip) if ip.is_unspecified() => (Ipv6Addr::LOCALHOST, listener.port()).into(),
        _ => listener,
    }
}

/// Takes any certificate whose key its owner has.
#[derive(Debug)]
struct Anyone(Arc<CryptoProvider>);

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
