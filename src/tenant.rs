//! Who is being served: a CyberScan host and the API key for it, as a verified token named them.
//! It owns the key's secrecy and the derived identity; it must not know tokens or calls.

use std::{fmt, sync::Arc};

use aws_lc_rs::hmac;
use secrecy::{ExposeSecret, SecretString};

use crate::egress::{Host, HostPatterns};

/// An API key of CyberScan. It is wiped from memory when dropped and shows itself nowhere: no
/// `Debug` of its content, no `Display`, no `Serialize`.
#[derive(Clone)]
pub struct ApiKey(Arc<SecretString>);

impl ApiKey {
    /// Takes the key over.
    #[must_use]
    pub fn new(key: String) -> Self {
        Self(Arc::new(key.into()))
    }

    /// The key itself, for the one call that sends it.
    #[must_use]
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

/// A tenant: everything kept or counted is kept and counted under its [`TenantId`].
#[derive(Clone, Debug)]
pub struct Tenant {
    id: TenantId,
    host: Host,
    key: ApiKey,
    /// Of `id`, ready to derive names with.
    naming: hmac::Key,
    name: [u8; 16],
    label: Arc<str>,
}

impl Tenant {
    /// The tenant that uses `key` at `host`.
    #[must_use]
    pub fn new(host: Host, key: ApiKey) -> Self {
        let id = TenantId::of(&host, &key);
        let name = id.label();
        Self { naming: id.naming(), name, label: hex(name).into(), id, host, key }
    }

    /// The tenant a token's `host` and `api_key` claims stand for, if `allowed` has its host.
    /// Administrators type the host in by hand; slashes at its end are forgiven.
    ///
    /// # Errors
    /// [`RefusedHost`] when the host is malformed or not allowed; it is never contacted then.
    pub fn admit(host: &str, key: ApiKey, allowed: &HostPatterns) -> Result<Self, RefusedHost> {
        let host = host.trim_end_matches('/').trim_end();
        match host.parse::<Host>() {
            Ok(parsed) if allowed.allow(&parsed) => Ok(Self::new(parsed, key)),
            _ => Err(RefusedHost::new(host)),
        }
    }

    /// The identity under which everything of this tenant is kept.
    #[must_use]
    pub fn id(&self) -> TenantId {
        self.id
    }

    /// The tenant's name in logs: 32 hexadecimal digits.
    #[must_use]
    pub fn label(&self) -> Arc<str> {
        Arc::clone(&self.label)
    }

    /// The same, as bytes.
    #[must_use]
    pub fn name(&self) -> [u8; 16] {
        self.name
    }

    /// As [`TenantId::derive`], in half the time.
    #[must_use]
    pub fn derive(&self, purpose: &str, parts: &[&[u8]]) -> [u8; 16] {
        name(&self.naming, purpose, parts)
    }

    /// The CyberScan host to ask.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// The key to ask with.
    #[must_use]
    pub fn key(&self) -> &ApiKey {
        &self.key
    }
}

/// A host claim that is malformed or not allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the host is malformed or not allowed")]
pub struct RefusedHost {
    /// The URL that would have been called, for the error text: control characters are escaped and
    /// it has at most [`RefusedHost::LONGEST`] characters.
    pub url: String,
}

impl RefusedHost {
    /// The most characters shown of such a URL.
    pub const LONGEST: usize = 300;

    fn new(host: &str) -> Self {
        let mut url = String::from("https://");
        for char in host.chars().take(Self::LONGEST) {
            if char.is_control() {
                url.extend(char.escape_default());
            } else {
                url.push(char);
            }
        }
        url.push_str("/api/v1/token");
        Self { url: url.chars().take(Self::LONGEST).collect() }
    }
}

/// A hash of host and API key, keyed with the API key: the same on every replica and after every
/// restart, and without the key nobody can tell which host or tenant it stands for.
///
/// It is itself treated as a secret: what leaves the process is [`TenantId::derive`]d from it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TenantId([u8; 32]);

impl TenantId {
    fn of(host: &Host, key: &ApiKey) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, key.expose().as_bytes());
        Self(mac(&key, [b"cyberscan-relay/tenant/1".as_slice(), host.to_string().as_bytes()]))
    }

    /// The tenant's name where operators see it: in logs and in Redis.
    #[must_use]
    pub fn label(&self) -> [u8; 16] {
        self.derive("label", &[])
    }

    /// A 128-bit name for `parts` within this tenant, unrelated between `purpose`s.
    ///
    /// Every part is hashed with its length, so no shift of a boundary between two parts gives
    /// the same name.
    #[must_use]
    pub fn derive(&self, purpose: &str, parts: &[&[u8]]) -> [u8; 16] {
        name(&self.naming(), purpose, parts)
    }

    fn naming(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &self.0)
    }
}

impl fmt::Debug for TenantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TenantId(..)")
    }
}

/// A derived name as text: 32 hexadecimal digits.
#[must_use]
pub fn hex(name: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(name))
}

/// The name that [`hex`] wrote; `None` if it did not.
#[must_use]
pub fn unhex(text: &str) -> Option<[u8; 16]> {
    let plain = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    plain.then(|| u128::from_str_radix(text, 16).ok()).flatten().map(u128::to_be_bytes)
}

fn name(key: &hmac::Key, purpose: &str, parts: &[&[u8]]) -> [u8; 16] {
    let mac = mac(key, std::iter::once(purpose.as_bytes()).chain(parts.iter().copied()));
    let mut name = [0; 16];
    name.copy_from_slice(mac.split_at(16).0);
    name
}

fn mac<'a>(key: &hmac::Key, parts: impl IntoIterator<Item = &'a [u8]>) -> [u8; 32] {
    let mut context = hmac::Context::with_key(key);
    for part in parts {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part);
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.sign().as_ref());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(host: &str, key: &str) -> TenantId {
        Tenant::new(host.parse().unwrap(), ApiKey::new(key.into())).id()
    }

    #[test]
    fn a_tenant_is_its_host_and_its_key() {
        assert_eq!(id("api.example.com", "k"), id("API.example.com:443", "k"));
        assert_ne!(id("api.example.com", "k"), id("api.example.com", "l"));
        assert_ne!(id("api.example.com", "k"), id("api.example.com:8443", "k"));
    }

    #[test]
    fn only_well_formed_and_allowed_hosts_are_admitted() {
        let allowed: HostPatterns = ["*.cyberscan.io"].iter().map(|p| p.parse().unwrap()).collect();
        let admit = |host: &str| Tenant::admit(host, ApiKey::new("k".into()), &allowed);
        assert_eq!(admit("api.cyberscan.io/").unwrap().host().to_string(), "api.cyberscan.io");
        for (host, url) in [
            ("/", "https:///api/v1/token"),
            ("evil.test", "https://evil.test/api/v1/token"),
            ("a b\r\nX: y", "https://a b\\r\\nX: y/api/v1/token"),
            ("http://api.cyberscan.io", "https://http://api.cyberscan.io/api/v1/token"),
        ] {
            assert_eq!(admit(host).unwrap_err().url, url);
        }
        let long = admit(&"a".repeat(100_000)).unwrap_err().url;
        assert_eq!(long.chars().count(), RefusedHost::LONGEST);
    }

    #[test]
    fn names_do_not_collide_when_a_boundary_shifts() {
        let tenant = id("api.example.com", "k");
        assert_ne!(tenant.derive("a", &[b"bc", b"d"]), tenant.derive("a", &[b"b", b"cd"]));
        assert_ne!(tenant.derive("a", &[b"bc"]), tenant.derive("ab", &[b"c"]));
        assert_ne!(tenant.derive("a", &[]), tenant.derive("a", &[b""]));
    }

    #[test]
    fn a_tenant_derives_the_names_its_identity_does() {
        let tenant = Tenant::new("api.example.com".parse().unwrap(), ApiKey::new("k".into()));
        assert_eq!(tenant.derive("a", &[b"b"]), tenant.id().derive("a", &[b"b"]));
    }

    #[test]
    fn nothing_of_a_tenant_shows_in_its_debug_text() {
        let tenant = Tenant::new("api.example.com".parse().unwrap(), ApiKey::new("s3cret".into()));
        assert!(!format!("{tenant:?}").contains("s3cret"));
        assert!(format!("{:?}", tenant.id()).ends_with("(..)"));
    }
}
