//! Files: who can read those with secrets, and whether certificates are still good. It must not know their content but
//! for the certificates.

use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use rustls::pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject};

use super::{Check, Finding, Severity};
use crate::{
    clock::Clock,
    settings::{KEYS, Settings},
};

/// Certificates that expire within this time are told.
const SOON: Duration = Duration::from_secs(30 * 24 * 3600);

/// What there is to say about all files.
pub(super) fn examine(
    settings: &Settings,
    config_file: Option<&Path>,
    secret_files: &[PathBuf],
    clock: Clock,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let secret = |name: &str| KEYS.iter().any(|key| key.secret && key.name == name);
    let has_secret = settings
        .effective()
        .iter()
        .any(|key| secret(key.key) && !key.value.is_empty() && key.source.starts_with("file "));
    if let Some(file) = config_file {
        let advice = "chmod 640, owned by root and the group of the relay's user; or keep secrets in files of their own";
        findings.push(if has_secret {
            private(Check::ConfigFile, file, advice)
        } else {
            Finding::ok(Check::ConfigFile, &file.display().to_string(), "has no secret in it")
        });
    }
    for file in secret_files {
        findings.push(private(Check::SecretFile, file, "chmod 600, owned by the relay's user"));
    }
    if let Some(file) = &settings.egress.extra_ca_file {
        findings.push(certificates(Check::CaFile, file, clock));
    }
    let value = |name: &str| {
        let found = settings.effective().iter().find(|key| key.key == name && !key.value.is_empty());
        found.map(|key| key.value.clone())
    };
    if let Some(certificate) = value("server.tls.certificate") {
        let finding = certificates(Check::ServerCertificate, Path::new(&certificate), clock);
        let misnamed = misnamed(Path::new(&certificate), &settings.auth.audiences);
        findings.push(misnamed.filter(|_| finding.severity == Severity::Ok).unwrap_or(finding));
    }
    if let Some(key) = value("server.tls.key") {
        findings.push(private(Check::SecretFile, Path::new(&key), "chmod 600, owned by the relay's user"));
    }
    findings
}

/// Whether others can read `file`.
fn private(check: Check, file: &Path, advice: &str) -> Finding {
    let about = file.display().to_string();
    match std::fs::metadata(file) {
        Err(error) => {
            let state = format!("cannot be looked at: {}", error.kind());
            Finding::bad(check, &about, state, "correct the path, or let the relay's user read it")
        }
        Ok(metadata) => match metadata.permissions().mode() & 0o777 {
            mode if mode & 0o002 != 0 => {
                Finding::bad(check, &about, format!("anybody may write it (mode {mode:o})"), advice)
            }
            mode if mode & 0o004 != 0 => {
                Finding::warn(check, &about, format!("anybody may read it (mode {mode:o})"), advice)
            }
            mode => Finding::ok(check, &about, format!("mode {mode:o}")),
        },
    }
}

/// Whether the certificates in `file` are good, and for how long.
pub(super) fn certificates(check: Check, file: &Path, clock: Clock) -> Finding {
    let about = file.display().to_string();
    let read: Result<Vec<CertificateDer<'static>>, _> =
        CertificateDer::pem_file_iter(file).and_then(Iterator::collect);
    let certificates = match read {
        Err(error) => {
            let state = format!("cannot be read as PEM: {error}");
            return Finding::bad(check, &about, state, "correct the path, or let the relay's user read it");
        }
        Ok(certificates) if certificates.is_empty() => {
            return Finding::bad(
                check,
                &about,
                "has no certificate in it",
                "name a PEM file with certificates",
            );
        }
        Ok(certificates) => certificates,
    };
    let now = Duration::try_from(clock.now().as_duration()).unwrap_or_default();
    let mut expiring = None;
    for certificate in &certificates {
        match at(certificate, now) {
            Err(Fault::Expired) => {
                return Finding::bad(check, &about, "a certificate in it has expired", "renew it");
            }
            Err(Fault::NotYet) => {
                let advice = "wait, or correct this machine's clock";
                return Finding::bad(check, &about, "a certificate in it is not yet valid", advice);
            }
            Err(Fault::Broken) => {
                return Finding::bad(check, &about, "a certificate in it cannot be decoded", "make it anew");
            }
            Ok(()) if at(certificate, now + SOON).is_err() => expiring = Some(()),
            Ok(()) => {}
        }
    }
    match expiring {
        Some(()) => {
            let state = "a certificate in it expires within 30 days";
            Finding::warn(check, &about, state, "renew it")
        }
        None => Finding::ok(
            check,
            &about,
            format!("{} certificate(s), good for a month at least", certificates.len()),
        ),
    }
}

/// What the first certificate in `file` is not for, of the public URLs.
fn misnamed(file: &Path, audiences: &[String]) -> Option<Finding> {
    let certificate = CertificateDer::pem_file_iter(file).ok()?.next()?.ok()?;
    let certificate = webpki::EndEntityCert::try_from(&certificate).ok()?;
    let not_for = |audience: &&String| {
        let url = url::Url::parse(audience).ok();
        let name = url.as_ref().and_then(|url| ServerName::try_from(url.host_str()?.to_owned()).ok());
        name.is_some_and(|name| certificate.verify_is_valid_for_subject_name(&name).is_err())
    };
    let audience = audiences.iter().find(not_for)?;
    Some(Finding::warn(
        Check::ServerCertificate,
        &file.display().to_string(),
        format!("is not for {audience}, where callers come in unless a proxy stands in front"),
        "use a certificate with the name of the public URL",
    ))
}

enum Fault {
    Expired,
    NotYet,
    Broken,
}

/// Whether a certificate is within its time at `time`. webpki looks at that before it looks for an issuer.
fn at(certificate: &CertificateDer<'_>, time: Duration) -> Result<(), Fault> {
    let certificate = webpki::EndEntityCert::try_from(certificate).map_err(|_| Fault::Broken)?;
    let usage = webpki::KeyUsage::server_auth();
    let time = UnixTime::since_unix_epoch(time);
    match certificate.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &[], &[], time, usage, None, None) {
        Err(webpki::Error::CertExpired { .. }) => Err(Fault::Expired),
        Err(webpki::Error::CertNotValidYet { .. }) => Err(Fault::NotYet),
        Err(webpki::Error::BadDer | webpki::Error::BadDerTime | webpki::Error::InvalidCertValidity) => {
            Err(Fault::Broken)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair, date_time_ymd};

    use super::*;

    #[test]
    fn a_certificate_is_told_before_it_expires_and_after() {
        let clock = Clock::starting_at("2030-06-15T00:00:00Z".parse().unwrap());
        let directory = tempfile::tempdir().unwrap();
        let severity = |name: &str, text: String| {
            let file = directory.path().join(name);
            std::fs::write(&file, text).unwrap();
            certificates(Check::ServerCertificate, &file, clock).severity
        };
        let pem = |from: (i32, u8, u8), to: (i32, u8, u8), is_ca: bool| {
            let mut params = CertificateParams::new(["relay.example.com".to_owned()]).unwrap();
            params.not_before = date_time_ymd(from.0, from.1, from.2);
            params.not_after = date_time_ymd(to.0, to.1, to.2);
            if is_ca {
                params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
            }
            params.self_signed(&KeyPair::generate().unwrap()).unwrap().pem()
        };
        for is_ca in [false, true] {
            let good = pem((2030, 1, 1), (2031, 1, 1), is_ca);
            assert_eq!(severity("good", good.clone()), Severity::Ok);
            assert_eq!(severity("soon", pem((2030, 1, 1), (2030, 7, 1), is_ca)), Severity::Warn);
            let old = pem((2029, 1, 1), (2030, 1, 1), is_ca);
            assert_eq!(severity("old", old.clone()), Severity::Bad);
            assert_eq!(severity("good and old", format!("{good}{old}")), Severity::Bad);
            assert_eq!(severity("early", pem((2031, 1, 1), (2032, 1, 1), is_ca)), Severity::Bad);
        }
        let names = |audience: &str| misnamed(&directory.path().join("good"), &[audience.to_owned()]);
        assert_eq!(names("https://relay.example.com"), None);
        assert_eq!(
            names("https://other.example.com/x").map(|finding| finding.severity),
            Some(Severity::Warn)
        );
        assert_eq!(severity("empty", String::new()), Severity::Bad);
        let missing = certificates(Check::CaFile, &directory.path().join("missing"), clock);
        assert_eq!(missing.severity, Severity::Bad);
    }
}
