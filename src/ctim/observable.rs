//! Observables: what the platform asks about, and which of it CyberScan can be asked. It owns the
//! line between an answerable value and one that is filtered out; it must not know what is known
//! about one.

use std::{fmt, net::IpAddr};

use serde::Serialize;

/// An observable that can be answered, as it was asked and as it is looked up.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Observable {
    kind: &'static str,
    value: String,
    subject: Subject,
}

/// What an observable stands for, in its canonical spelling.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// An IPv4 or IPv6 address; never an IPv4 address that is written as an IPv6 one.
    Ip(IpAddr),
    /// A domain name.
    Domain(DomainName),
}

impl Subject {
    /// What `text` spells: an address or a domain name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self::ip(text).or_else(|| DomainName::parse(text).map(Self::Domain))
    }

    /// The address that `text` spells; `::ffff:192.0.2.1` is 192.0.2.1 (RFC 4291 §2.5.5.2).
    fn ip(text: &str) -> Option<Self> {
        text.parse().ok().map(|ip: IpAddr| Self::Ip(ip.to_canonical()))
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::Domain(domain) => domain.fmt(f),
        }
    }
}

impl Observable {
    /// The observable of type `kind` and value `value`; `None` when it is of another type than
    /// `ip`, `ipv6` and `domain`, or is no address and no domain name. Either type of an address takes either
    /// version: the platform's own sources do not agree on what `ip` covers.
    #[must_use]
    pub fn new(kind: &str, value: &str) -> Option<Self> {
        let (kind, subject) = match kind {
            "ip" => ("ip", Subject::ip(value)?),
            "ipv6" => ("ipv6", Subject::ip(value)?),
            "domain" => ("domain", Subject::Domain(DomainName::parse(value)?)),
            _ => return None,
        };
        Some(Self { kind, value: value.to_owned(), subject })
    }

    /// The type, as it was asked.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// The value, spelt as it was asked.
    #[must_use]
    pub fn value(&self) -> &str {
        &self.value
    }

    /// What is looked up.
    #[must_use]
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// The observable as it stands in an answer.
    #[must_use]
    pub fn tag(&self) -> Tag<'_> {
        Tag { kind: self.kind, value: &self.value }
    }
}

/// `{"type": …, "value": …}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Tag<'a> {
    /// The observable's type.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The observable's value.
    pub value: &'a str,
}

/// A domain name in its canonical spelling: lower case, punycode, without a trailing dot.
///
/// Labels of `[a-z0-9_-]`, 1 to 63 long, at least two of them, at most 253 characters, and no
/// spelling of an IP address. The underscore is for names such as `_dmarc.example.com`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DomainName(String);

impl DomainName {
    /// The name that `text` spells, if it spells one.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        // The ideographic full stops, too: IDNA takes them for dots.
        let text = text.strip_suffix(['.', '\u{3002}', '\u{ff0e}', '\u{ff61}']).unwrap_or(text);
        let name = if text.is_ascii() {
            text.to_ascii_lowercase()
        } else {
            idna::domain_to_ascii_cow(text.as_bytes(), idna::AsciiDenyList::EMPTY).ok()?.into_owned()
        };
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
        };
        let fits = name.len() <= 253
            && name.contains('.')
            && name.split('.').all(label)
            // Names that end in a number are spellings of IPv4 addresses to a URL parser.
            && !matches!(
                url::Host::parse(&name),
                Ok(url::Host::Ipv4(_)) | Err(url::ParseError::InvalidIpv4Address)
            );
        fits.then_some(Self(name))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn subject(kind: &str, value: &str) -> Option<String> {
        Observable::new(kind, value).map(|observable| match observable.subject() {
            Subject::Ip(ip) => ip.to_string(),
            Subject::Domain(name) => name.to_string(),
        })
    }

    #[test]
    fn a_full_stop_of_any_script_may_end_a_name() {
        for stop in ['.', '\u{3002}', '\u{ff0e}', '\u{ff61}'] {
            for name in ["one.example", "bücher.example"] {
                assert_eq!(subject("domain", &format!("{name}{stop}")), subject("domain", name), "{stop}");
            }
        }
    }

    #[test]
    fn addresses_and_names_are_looked_up_in_their_canonical_spelling() {
        for (kind, value, canonical) in [
            ("ip", "192.0.2.1", "192.0.2.1"),
            ("ip", "2001:DB8:0:0::1", "2001:db8::1"),
            ("ip", "::ffff:192.0.2.1", "192.0.2.1"),
            ("ip", "::FFFF:c000:201", "192.0.2.1"),
            ("ipv6", "2001:DB8::5", "2001:db8::5"),
            ("ipv6", "::ffff:192.0.2.1", "192.0.2.1"),
            ("ipv6", "192.0.2.1", "192.0.2.1"),
            ("domain", "One.Example", "one.example"),
            ("domain", "one.example.", "one.example"),
            ("domain", "bücher.example", "xn--bcher-kva.example"),
            ("domain", "xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("domain", "_dmarc.one.example", "_dmarc.one.example"),
            ("domain", "3.example", "3.example"),
        ] {
            assert_eq!(subject(kind, value).as_deref(), Some(canonical), "{value}");
            let tag = Observable::new(kind, value).unwrap();
            assert_eq!((tag.kind(), tag.value()), (kind, value));
        }
    }

    #[test]
    fn everything_else_is_filtered_out() {
        for (kind, value) in [
            ("IP", "192.0.2.1"),
            (" ip ", "192.0.2.1"),
            ("sha256", "deadbeef"),
            ("url", "https://one.example/"),
            ("", "192.0.2.1"),
            ("ipv6", "one.example"),
            ("IPv6", "::1"),
            ("ipv4", "192.0.2.1"),
            ("ip", ""),
            ("ip", " 192.0.2.1"),
            ("ip", "192.0.2.1 "),
            ("ip", "192.0.2"),
            ("ip", "192.000.002.001"),
            ("ip", "192.0.2.256"),
            ("ip", "fe80::1%eth0"),
            ("ip", "192.0.2.1/32"),
            ("ip", "[::1]"),
            ("ip", "192.0.2.1?x=1"),
            ("ip", "one.example"),
            ("ip", "3221225985"),
            ("ip", "0xc0.0.2.1"),
            ("domain", ""),
            ("domain", "."),
            ("domain", ".."),
            ("domain", "one..example"),
            ("domain", ".one.example"),
            ("domain", "one.example.."),
            ("domain", "localhost"),
            ("domain", "192.0.2.2"),
            ("domain", "0x7f.1"),
            ("domain", "127.1"),
            ("domain", "a.b.1"),
            ("domain", "::1"),
            ("domain", "one.example/x"),
            ("domain", "../token"),
            ("domain", "one.example?x"),
            ("domain", "one.example#x"),
            ("domain", "one.example:443"),
            ("domain", "u@one.example"),
            ("domain", "one%2eexample.com"),
            ("domain", "a b.example"),
            ("domain", "one\t.example"),
            ("domain", "one.example\r\nX: y"),
            ("domain", "one\0.example"),
            ("domain", "one\\.example"),
            ("domain", "-one.example"),
            ("domain", "one-.example"),
            ("domain", "one\u{a0}.example"),
            ("domain", "{0}.example"),
            ("domain", "*.example"),
            ("domain", "https://one.example"),
        ] {
            assert_eq!(subject(kind, value), None, "{kind} {value:?}");
        }
        assert_eq!(subject("domain", &format!("{}.example", "a".repeat(64))), None);
        assert_eq!(subject("domain", &vec!["abcdefg"; 33].join(".")), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn a_canonical_name_is_plain_and_names_itself(text in "\\PC{0,30}|[a-zA-Z0-9._%/?#\\\\@:\\-]{0,30}|[a-zäöß。-]{1,8}\\.[a-zé]{2,5}\\.?") {
            if let Some(name) = DomainName::parse(&text) {
                prop_assert!(name.as_str().bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b)));
                prop_assert!(name.as_str().parse::<IpAddr>().is_err());
                prop_assert_eq!(DomainName::parse(name.as_str()), Some(name));
            }
        }
    }
}
