//! TLS towards others: which roots are believed and what is said when a certificate is not. It
//! owns the client configuration; it must not relax a check.

use std::{error::Error, path::Path, sync::Arc};

use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore,
    SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};

/// The TLS side of the egress guard could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetUpError {
    /// `egress.extra_ca_file` cannot be read as PEM certificates.
    #[error("egress.extra_ca_file: {path}: {reason}")]
    ExtraCa {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// rustls refused the roots.
    #[error("TLS set-up: {0}")]
    Tls(#[from] rustls::Error),
    /// rustls could not build a verifier.
    #[error("TLS set-up: {0}")]
    Verifier(#[from] rustls::client::VerifierBuilderError),
}

/// TLS 1.2 and 1.3, the platform's roots and those of `extra_ca`.
///
/// # Errors
/// When `extra_ca` is not a PEM file with at least one certificate, or no root is known at all.
pub fn client_config(extra_ca: Option<&Path>) -> Result<ClientConfig, SetUpError> {
    let mut roots = RootCertStore::empty();
    // A platform certificate that does not parse is the platform's affair; the others still count.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(path) = extra_ca {
        let fault = |reason: String| SetUpError::ExtraCa { path: path.display().to_string(), reason };
        for certificate in extra_roots(path).map_err(fault)? {
            roots.add(certificate).map_err(|error| fault(error.to_string()))?;
        }
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Explaining {
        inner: WebPkiServerVerifier::builder_with_provider(roots.into(), Arc::clone(&provider)).build()?,
    };
    Ok(builder(provider)?
        .dangerous() // "Dangerous" names the place; every decision stays with webpki.
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth())
}

/// The most bytes of a file of certificates: a whole platform's are some 200 KiB.
const CERTIFICATES: u64 = 4 << 20;

/// The certificates in the PEM file `path`, each fit to be a root.
///
/// # Errors
/// What is wrong with the file.
pub fn extra_roots(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    // A device or a pipe might never end.
    let told = |error: std::io::Error| error.to_string();
    let file = std::fs::metadata(path).map_err(told)?;
    if !file.is_file() {
        return Err("it is no file".to_owned());
    }
    if file.len() > CERTIFICATES {
        return Err(format!("it has more than {CERTIFICATES} bytes"));
    }
    let text = std::fs::read(path).map_err(told)?;
    let text = text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(&text);
    let certificates: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(text)
        .collect::<Result<_, _>>()
        .map_err(|_| "it is not in PEM form".to_owned())?;
    if certificates.is_empty() {
        let der = text.first() == Some(&0x30);
        let hint = if der { "; it looks like DER: `openssl x509 -inform der` makes PEM of it" } else { "" };
        return Err(format!("no PEM certificate in it{hint}"));
    }
    for certificate in &certificates {
        RootCertStore::empty()
            .add(certificate.clone())
            .map_err(|error| format!("a certificate in it is no root: {error}"))?;
    }
    Ok(certificates)
}

fn builder(
    provider: Arc<CryptoProvider>,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, rustls::Error> {
    ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
}

/// The reason why a certificate was not accepted, in the words administrators know from OpenSSL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Untrusted(pub String);

impl Untrusted {
    /// The reason within `error` or one of its sources, if a certificate or the protocol was the cause.
    #[must_use]
    pub fn find(error: &(dyn Error + 'static)) -> Option<Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(io) = error.downcast_ref::<std::io::Error>()
                && let Some(inner) = io.get_ref()
                && let Some(found) = Self::find(inner)
            {
                return Some(found);
            }
            if let Some(error) = error.downcast_ref::<rustls::Error>() {
                return Self::reason(error);
            }
            next = error.source();
        }
        None
    }

    fn reason(error: &rustls::Error) -> Option<Self> {
        let reason = match error {
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(reason))) => {
                return reason.downcast_ref::<Self>().cloned();
            }
            // The chain was accepted. What the server signed with its key was not; aws-lc takes no RSA key below
            // 2048 bits.
            rustls::Error::InvalidCertificate(_) => "certificate key too weak, or its signature wrong",
            rustls::Error::PeerIncompatible(_)
            | rustls::Error::AlertReceived(
                AlertDescription::ProtocolVersion | AlertDescription::HandshakeFailure,
            ) => "unsupported protocol, TLS 1.2 or 1.3 is needed",
            _ => return None,
        };
        Some(Self(reason.into()))
    }
}

/// Asks webpki and, where it refuses, adds the reason. It never turns a refusal into a success.
#[derive(Debug)]
struct Explaining {
    inner: Arc<WebPkiServerVerifier>,
}

impl ServerCertVerifier for Explaining {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now).map_err(
            |error| match error {
                rustls::Error::InvalidCertificate(cause) => {
                    let reason = explain(&cause, end_entity, intermediates, server_name);
                    let reason = OtherError(Arc::new(Untrusted(reason)));
                    rustls::Error::InvalidCertificate(CertificateError::Other(reason))
                }
                other => other,
            },
        )
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

fn explain(
    cause: &CertificateError,
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    server_name: &ServerName<'_>,
) -> String {
    match cause {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "certificate has expired".into()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "certificate is not yet valid".into()
        }
        // The latter where a root happens to have the certificate's own name.
        CertificateError::UnknownIssuer
        | CertificateError::BadSignature
        | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. }
            if signs_itself(end_entity) =>
        {
            "self-signed certificate".into()
        }
        CertificateError::UnknownIssuer if intermediates.iter().any(signs_itself) => {
            "self-signed certificate in certificate chain".into()
        }
        CertificateError::UnknownIssuer => "unable to get local issuer certificate".into(),
        CertificateError::NotValidForNameContext { presented, .. } => {
            let asked = server_name.to_str();
            let names: Vec<String> = presented.iter().map(|name| format!("'{}'", bare(name))).collect();
            match names.as_slice() {
                [] => format!("hostname '{asked}' doesn't match: the certificate names no host"),
                [name] => format!("hostname '{asked}' doesn't match {name}"),
                names => format!("hostname '{asked}' doesn't match either of {}", names.join(", ")),
            }
        }
        CertificateError::Revoked => "certificate revoked".into(),
        CertificateError::BadSignature => "certificate signature failure".into(),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "unsuitable certificate purpose".into()
        }
        CertificateError::UnsupportedSignatureAlgorithmContext { .. }
        | CertificateError::UnsupportedSignatureAlgorithmForPublicKeyContext { .. } => {
            "certificate signature algorithm not supported".into()
        }
        CertificateError::BadEncoding => "certificate cannot be decoded".into(),
        other => other.to_string(),
    }
}

/// rustls tells names as `DnsName("a.example")`; people know them bare.
fn bare(presented: &str) -> &str {
    presented.split_once('"').and_then(|(_, rest)| rest.rsplit_once('"')).map_or(presented, |(name, _)| name)
}

fn signs_itself(certificate: &CertificateDer<'_>) -> bool {
    webpki::EndEntityCert::try_from(certificate)
        .is_ok_and(|certificate| certificate.issuer() == certificate.subject())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_certificate_is_told_in_the_words_of_openssl() {
        let name = || ServerName::try_from("api.example.com").unwrap();
        let other_name = |presented: &[&str]| CertificateError::NotValidForNameContext {
            expected: name().to_owned(),
            presented: presented.iter().map(|name| format!("DnsName(\"{name}\")")).collect(),
        };
        let nobody = CertificateDer::from(Vec::new());
        for (cause, said) in [
            (CertificateError::Expired, "certificate has expired"),
            (CertificateError::NotValidYet, "certificate is not yet valid"),
            (CertificateError::UnknownIssuer, "unable to get local issuer certificate"),
            (CertificateError::Revoked, "certificate revoked"),
            (CertificateError::BadSignature, "certificate signature failure"),
            (CertificateError::InvalidPurpose, "unsuitable certificate purpose"),
            (CertificateError::BadEncoding, "certificate cannot be decoded"),
            (
                CertificateError::UnsupportedSignatureAlgorithmContext {
                    signature_algorithm_id: vec![1],
                    supported_algorithms: Vec::new(),
                },
                "certificate signature algorithm not supported",
            ),
            (other_name(&[]), "hostname 'api.example.com' doesn't match: the certificate names no host"),
            (other_name(&["a.test"]), "hostname 'api.example.com' doesn't match 'a.test'"),
            (
                other_name(&["a.test", "b.test"]),
                "hostname 'api.example.com' doesn't match either of 'a.test', 'b.test'",
            ),
        ] {
            assert_eq!(explain(&cause, &nobody, &[], &name()), said, "{cause:?}");
        }

        let key = rcgen::KeyPair::generate().unwrap();
        let itself = rcgen::CertificateParams::new(["api.example.com".to_owned()]).unwrap().self_signed(&key);
        let itself = itself.unwrap().der().clone();
        for cause in [CertificateError::UnknownIssuer, CertificateError::BadSignature] {
            assert_eq!(explain(&cause, &itself, &[], &name()), "self-signed certificate");
        }
        assert_eq!(explain(&CertificateError::Expired, &itself, &[], &name()), "certificate has expired");
        assert_eq!(
            explain(&CertificateError::UnknownIssuer, &nobody, &[itself], &name()),
            "self-signed certificate in certificate chain"
        );

        let protocol = Some(Untrusted("unsupported protocol, TLS 1.2 or 1.3 is needed".into()));
        for alert in [AlertDescription::ProtocolVersion, AlertDescription::HandshakeFailure] {
            assert_eq!(Untrusted::find(&rustls::Error::AlertReceived(alert)), protocol);
        }
        // Trouble that says nothing of who is on the other side.
        assert_eq!(Untrusted::find(&rustls::Error::AlertReceived(AlertDescription::InternalError)), None);
    }
}
