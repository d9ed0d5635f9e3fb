//! What texts in a configuration mean: each reads one form, strictly, and says what is wrong with what it does not
//! take. None repeats the text: it may be a secret.
//!
//! What only looks odd (a trailing slash, a scheme before a host) is understood where it can mean one thing only.

use std::{fmt, net::SocketAddr, path::Path, str::FromStr, time::Duration};

use ipnet::IpNet;
use jiff::{SignedDuration, Span, SpanRelativeTo};
use secrecy::SecretString;
use url::Url;

use crate::{auth::IssuerAddress, egress::host::HostPattern};

/// What is wrong with a text, or nothing to be said beyond what was expected.
pub(super) type Wrong = Option<String>;

/// A text as it was meant: without blanks, a byte order mark or quotes around it, which env files leave there.
pub(super) fn bare(text: &str) -> &str {
    let mut text = text;
    loop {
        let around = |c: char| c.is_whitespace() || c == '\u{feff}';
        let trimmed = text.trim_matches(around);
        let unquoted =
            ['"', '\''].iter().find_map(|quote| trimmed.strip_prefix(*quote)?.strip_suffix(*quote));
        match unquoted {
            None => return trimmed,
            Some(unquoted) => text = unquoted,
        }
    }
}

/// Any value that reads itself.
pub(super) fn any<T: FromStr>(text: &str) -> Result<T, Wrong> {
    text.parse().map_err(|_| None)
}

/// `10s`, `1h 30m`, `7d`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let span: Span = text.parse().ok()?;
    span.to_duration(SpanRelativeTo::days_are_24_hours()).ok()?.try_into().ok()
}

/// A duration as people write it.
pub(super) fn shown(duration: Duration) -> String {
    match duration.as_secs() {
        days if days >= 86_400 && days.is_multiple_of(86_400) => format!("{}d", days / 86_400),
        0 if duration.is_zero() => "0s".to_owned(),
        _ => SignedDuration::try_from(duration).map(|duration| format!("{duration:#}")).unwrap_or_default(),
    }
}

/// `64MiB`, `1048576`.
pub(super) fn size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = match text.get(digits.len()..).map(str::trim) {
        Some("" | "B") => 1,
        Some("KiB") => 1 << 10,
        Some("MiB") => 1 << 20,
        Some("GiB") => 1 << 30,
        Some("TiB") => 1 << 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// A number of bytes as people write it.
pub(super) struct Bytes(pub(super) u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units.into_iter().find(|(bits, _)| self.0 > 0 && self.0.is_multiple_of(1 << bits)) {
            Some((bits, unit)) => write!(f, "{}{unit}", self.0 >> bits),
            None => write!(f, "{}", self.0),
        }
    }
}

/// An address to listen on.
pub(super) fn listen(text: &str) -> Result<SocketAddr, Wrong> {
    let address: SocketAddr = text.parse().map_err(|_| match text.rsplit_once(':') {
        Some(("", port)) if port.parse::<u16>().is_ok() => {
            Some(format!("the address is missing; 0.0.0.0:{port} is every address of this machine"))
        }
        Some((host, port)) if port.parse::<u16>().is_ok() && !host.contains(':') => {
            Some("names are not looked up; localhost is 127.0.0.1".to_owned())
        }
        _ => None,
    })?;
    let ip = address.ip();
    if ip.is_multicast() || ip == std::net::Ipv4Addr::BROADCAST {
        return Err(Some("nobody can connect to such an address".to_owned()));
    }
    Ok(address)
}

/// Whether two listeners would take each other's port.
pub(super) fn collide(one: SocketAddr, other: SocketAddr) -> bool {
    let covers = |one: SocketAddr, other: SocketAddr| {
        one.ip() == other.ip() || (one.ip().is_unspecified() && (one.is_ipv6() || other.is_ipv4()))
    };
    one.port() != 0 && one.port() == other.port() && (covers(one, other) || covers(other, one))
}

/// A public URL of the relay: what stands in tokens, without the slash that browsers add.
pub(super) fn audience(text: &str) -> Result<String, Wrong> {
    let wrong = |why: &str| Err(Some(why.to_owned()));
    let Ok(url) = Url::parse(text) else {
        return if text.contains("://") { Err(None) } else { wrong("it begins with https://") };
    };
    if !matches!(url.scheme(), "https" | "http") || !text.contains("://") {
        return wrong("it begins with https://");
    }
    if !url.username().is_empty() || url.password().is_some() {
        return wrong("a user or password is no part of it");
    }
    if url.query().is_some() || url.fragment().is_some() {
        return wrong("it ends with the path: no ? and no #");
    }
    let plain = |host: &str| host.chars().all(|c| c.is_ascii_alphanumeric() || "-._:[]".contains(c));
    if !url.host_str().is_some_and(plain) || url.port() == Some(0) {
        return Err(None);
    }
    Ok(url.as_str().trim_end_matches('/').to_owned())
}

/// A host without what people copy along with it: `https://` before and a slash behind.
fn without_scheme(text: &str) -> Result<String, Wrong> {
    let (scheme, rest) = match text.split_once("://") {
        Some((scheme, rest)) => (Some(scheme.to_ascii_lowercase()), rest),
        None => (None, text),
    };
    if scheme.is_some_and(|scheme| scheme != "https") {
        return Err(Some("only https is spoken; the name alone is enough".to_owned()));
    }
    Ok(rest.trim_end_matches('/').to_owned())
}

/// A key issuer.
pub(super) fn issuer(text: &str) -> Result<IssuerAddress, Wrong> {
    let text = without_scheme(text)?;
    // Tokens name issuers letter for letter, in lower case; paths have a case of their own.
    let (host, path) = text.split_at(text.find('/').unwrap_or(text.len()));
    let path = path.strip_suffix("/.well-known/jwks").unwrap_or(path);
    // Tokens do not name the usual port.
    let host = host.strip_suffix(":443").unwrap_or(host);
    format!("{}{path}", host.to_ascii_lowercase()).parse().map_err(|_| None)
}

/// A host that may be asked, or a pattern of them.
pub(super) fn host_pattern(text: &str) -> Result<HostPattern, Wrong> {
    let text = without_scheme(text)?;
    if text.contains('/') {
        return Err(Some("a path is no part of it".to_owned()));
    }
    let domain = match text.strip_prefix('.') {
        Some(domain) => return Err(Some(format!("every name below a domain is *.{}", ascii(domain)))),
        None => text,
    };
    domain.to_ascii_lowercase().parse().map_err(|_| None)
}

/// Of a text only what can stand in a name.
fn ascii(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_alphanumeric() || "-.".contains(*c)).take(253).collect()
}

/// A network, or one address. IPv4 within IPv6 is IPv4, as the addresses are that are compared with it.
pub(super) fn network(text: &str) -> Result<IpNet, Wrong> {
    let network = match text.parse::<IpNet>() {
        Ok(network) => network,
        Err(_) => IpNet::from(text.parse::<std::net::IpAddr>().map_err(|_| None)?),
    };
    let mapped = match network {
        IpNet::V6(net) if net.prefix_len() >= 96 => {
            net.addr().to_ipv4_mapped().map(|ip| (ip, net.prefix_len() - 96))
        }
        _ => None,
    };
    match mapped {
        Some((ip, prefix)) => IpNet::new(ip.into(), prefix).map_err(|_| None),
        None => Ok(network),
    }
}

/// An http(s) proxy.
pub(super) fn proxy(text: &str) -> Result<Url, Wrong> {
    let wrong = |why: &str| Err(Some(why.to_owned()));
    let Ok(url) = Url::parse(text) else { return Err(None) };
    if !matches!(url.scheme(), "http" | "https") || !text.contains("://") {
        return wrong("it begins with http:// or https://");
    }
    if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
        return wrong(
            "it ends with the port: no path, no ? and no #; such characters in a password are percent-encoded",
        );
    }
    if !url.has_host() || url.port() == Some(0) {
        return Err(None);
    }
    Ok(url)
}

/// 64 hexadecimal digits that somebody has rolled dice for.
pub(super) fn encryption_key(text: &str) -> Result<[u8; 32], Wrong> {
    if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Some(format!(
            "64 digits from 0-9a-f; `openssl rand -hex 32` makes one; found {} characters",
            text.chars().count()
        )));
    }
    let half = |part: Option<&str>| u128::from_str_radix(part.unwrap_or_default(), 16).map_err(|_| None);
    let (high, low) = (half(text.get(..32))?, half(text.get(32..))?);
    let mut key = [0; 32];
    key.iter_mut().zip([high.to_be_bytes(), low.to_be_bytes()].concat()).for_each(|(to, from)| *to = from);
    if key.iter().all(|byte| Some(byte) == key.first()) {
        return Err(Some(
            "the same byte 32 times is no random key; `openssl rand -hex 32` makes one".to_owned(),
        ));
    }
    Ok(key)
}

/// What operators send as a bearer token: it has to fit into a header.
pub(super) fn token(text: &str) -> Result<SecretString, Wrong> {
    if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(None);
    }
    Ok(text.to_owned().into())
}

/// A name for Sentinel.
pub(super) fn master_name(text: &str) -> Result<String, Wrong> {
    if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(Some("no blanks".to_owned()));
    }
    Ok(text.to_owned())
}

/// How keys in Redis begin: nothing that means something in a pattern of an ACL, or chooses a cluster's slot.
pub(super) fn key_prefix(text: &str) -> Result<String, Wrong> {
    let plain = |byte: u8| byte.is_ascii_graphic() && !b"{}[]*?^\\\"'".contains(&byte);
    if text.len() > 64 || !text.bytes().all(plain) {
        return Err(None);
    }
    Ok(text.to_owned())
}

/// A user's name, or a password: any text without control characters.
pub(super) fn text(text: &str) -> Result<String, Wrong> {
    if text.chars().any(char::is_control) {
        Err(Some("no control characters".to_owned()))
    } else {
        Ok(text.to_owned())
    }
}

/// The content of a file that settings name: text of at most `most` bytes. Not of what is no regular file: it could
/// not be read again, or wait for ever.
pub(super) fn file(path: &Path, most: u64) -> Result<String, String> {
    use std::io::Read;
    let told = |error: std::io::Error| error.to_string();
    let file = std::fs::metadata(path).map_err(told)?;
    if !file.is_file() && path != Path::new("/dev/null") {
        return Err("it is no file".to_owned());
    }
    let mut bytes = Vec::new();
    std::fs::File::open(path).and_then(|file| file.take(most + 1).read_to_end(&mut bytes)).map_err(told)?;
    if bytes.len() as u64 > most {
        return Err(format!("it has more than {} bytes", most));
    }
    let text = String::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())?;
    Ok(text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text))
}
