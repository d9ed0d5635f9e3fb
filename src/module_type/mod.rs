//! Owns the module type: the document by which SecureX/XDR learns of this relay, what its form asks for and how tokens
//! for it are made. Must not know how it is sent (`platform`) nor who asks for it (`command`).
//!
//! Its form is that of the platform's interface description (`NewModuleTypeParams` of `iroh-int`, 1.0.107) and of the
//! public module types of the same kind, those with `configuration-token` and RS256.

use std::{fmt, str::FromStr};

use serde_json::{Value, json};
use url::Url;

use crate::egress::Host;

mod command;
mod platform;
mod prompt;
#[cfg(test)]
mod samples;

pub(crate) use command::outcome;
pub use command::{Options, run};
pub use platform::{Action, Client, Id, Platform, RegisterError, Stored};

/// A region of SecureX/XDR. Each has a platform of its own, which also signs its tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Region {
    /// North America
    #[value(aliases = ["na", "nam"])]
    Us,
    /// Europe
    Eu,
    /// Asia, Pacific, Japan, China
    #[value(alias = "apj")]
    Apjc,
}

impl Region {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Us, Self::Eu, Self::Apjc];

    /// Where the region's platform answers; its keys are there as well.
    #[must_use]
    pub fn host(self) -> &'static str {
        match self {
            Self::Us => "visibility.amp.cisco.com",
            Self::Eu => "visibility.eu.amp.cisco.com",
            Self::Apjc => "visibility.apjc.amp.cisco.com",
        }
    }
}

/// What differs between the module types of two relays.
#[derive(Clone, Debug)]
pub struct ModuleType {
    /// Where the platform calls the relay.
    pub url: RelayUrl,
    /// What tokens are made for, where that is not the URL.
    pub audience: Option<Audience>,
    /// Who signs the tokens: the region's host.
    pub jwks_host: String,
}

impl ModuleType {
    /// The audience of the tokens, which the relay has to have in `auth.audiences`.
    #[must_use]
    pub fn audience(&self) -> &str {
        self.audience.as_ref().map_or(&self.url.0, |audience| &audience.0)
    }

    /// The audience as a property, where tokens are not made for the URL.
    fn audience_property(&self) -> Option<Value> {
        (self.audience() != self.url.0).then(|| self.audience().into())
    }

    /// The document as it is registered. The claims of a token are the form's values and the `custom_` properties, each
    /// without that prefix.
    #[must_use]
    pub fn document(&self) -> Value {
        self.with_audience(self.audience_property())
    }

    /// What makes a registered module type this one. It is merged into what is there, so that an audience which is not
    /// wanted any more is taken away by name.
    #[must_use]
    pub fn patch(&self) -> Value {
        self.with_audience(Some(self.audience_property().unwrap_or(Value::Null)))
    }

    fn with_audience(&self, audience: Option<Value>) -> Value {
        let mut properties = json!({
            "supported-apis": ["health", "observe/observables", "refer/observables"],
            "auth-type": "configuration-token",
            "configuration-token-alg": "RS256",
            "custom_jwks_host": self.jwks_host,
            "url": self.url.0
        });
        if let (Some(properties), Some(audience)) = (properties.as_object_mut(), audience) {
            properties.insert(AUDIENCE.to_owned(), audience);
        }
        json!({
            "title": "CyberScan",
            "default_name": "CyberScan",
            "short_description": "Vulnerabilities that CyberScan has found at an IP address or a domain.",
            "description": DESCRIPTION,
            "tips": TIPS,
            "external_references": [{"label": "CyberScan", "link": "https://www.cyberscan.io"}],
            "configuration_spec": [
                {
                    "key": "custom_api_key",
                    "type": "api_key",
                    "label": "API Key",
                    "tooltip": "The API key of your CyberScan account",
                    "required": true
                },
                {
                    "key": "custom_host",
                    "type": "string",
                    "label": "CyberScan Host",
                    "tooltip": "The host of CyberScan's API, without https://",
                    "required": true
                },
                {
                    "key": "custom_CTR_ENTITIES_LIMIT",
                    "type": "integer",
                    "label": "Entities Limit",
                    "tooltip": "The maximum number of `Sightings` for each observable: 1 to 1000. The default is 100.",
                    "required": false
                }
            ],
            "capabilities": [
                {"id": "health", "description": "Healthcheck"},
                {"id": "observe", "description": "Enrichments"},
                {"id": "refer", "description": "Reference links"}
            ],
            "properties": properties,
            "logo": LOGO
        })
    }
}

/// The property that says the audience of tokens, where that is not the URL.
const AUDIENCE: &str = "configuration-token-audience";

const DESCRIPTION: &str = "CyberScan scans what an organisation shows to the internet. This module asks it about the \
    observables of an investigation (types `ip`, `ipv6` and `domain`), through a cyberscan-relay that you run yourself, \
    and shows each vulnerability as a sighting.\n\n\
    This module type was made from the platform's interface description and from public module types of its kind. It \
    is not tried in a tenant yet.";

/// Fields in bold are labels of the form, but for the two that the platform adds.
const TIPS: &str = "When configuring the CyberScan integration, you must first obtain an API key for your CyberScan \
    account and then add the CyberScan integration module.\n\n\
    1. Take an API key from your CyberScan account.\n\
    2. Complete the form:\n\
    \x20   - **Integration Module Name** - Leave the default name or enter one that is meaningful to you.\n\
    \x20   - **API Key** - Enter the CyberScan API key.\n\
    \x20   - **CyberScan Host** - Enter the host of CyberScan's API, without https://.\n\
    \x20   - **Entities Limit** - Enter how many sightings an observable may have at most, or leave it empty for 100.\n\
    3. Click **Save**. The health check says what is wrong, if anything is.";

const LOGO: &str = "data:image/svg+xml;base64,PHN2ZyB4bWxucz0iaHR0cDovL3d3dy53My5vcmcvMjAwMC9zdmciIHZpZXdCb3g9IjAgMCAzMiAzMiI+PGNpcmNsZSBjeD0iMTYiIGN5PSIxNiIgcj0iMTUiIGZpbGw9IiMwYjNjNWQiLz48cGF0aCBkPSJNMTYgNmExMCAxMCAwIDEgMCAxMCAxMCIgZmlsbD0ibm9uZSIgc3Ryb2tlPSIjZmZmIiBzdHJva2Utd2lkdGg9IjMiLz48L3N2Zz4K";

/// The relay's public URL: `https://`, a host, perhaps a port and a path, and no slash at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayUrl(String);

impl RelayUrl {
    /// The path below which the platform finds the relay's routes, where it is not the root.
    #[must_use]
    pub fn path(&self) -> Option<&str> {
        let after_scheme = self.0.get("https://".len()..)?;
        after_scheme.find('/').and_then(|at| after_scheme.get(at..))
    }
}

impl fmt::Display for RelayUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Why a text is not taken as the relay's public URL.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotARelayUrl {
    /// There is no scheme.
    #[error("a URL is expected, with its scheme: https://relay.example.com")]
    NoScheme,
    /// Another scheme than https.
    #[error("SecureX/XDR sends API keys to this URL: it has to begin with https://")]
    NotHttps,
    /// It cannot be read, or its host is none.
    #[error("this is no URL with a host: https://relay.example.com is expected")]
    Malformed,
    /// A user or password, a query or a fragment.
    #[error("only a host, a port and a path are expected: https://relay.example.com")]
    Surplus,
    /// It names a route instead of the place where the routes are.
    #[error("the platform adds {0} to this URL by itself: leave it out")]
    Route(&'static str),
}

/// What the platform and people add to a relay's URL.
const ROUTES: [&str; 5] = ["/health", "/observe/observables", "/refer/observables", "/version", "/watchdog"];

impl FromStr for RelayUrl {
    type Err = NotARelayUrl;

    /// Blanks and quotes around it and slashes at its end are left out; host and port are written in the usual way.
    fn from_str(text: &str) -> Result<Self, NotARelayUrl> {
        let text = unquoted(text);
        if !text.contains("://") {
            return Err(NotARelayUrl::NoScheme);
        }
        // A URL parser drops line breaks and turns backslashes around; nobody means either.
        if text.chars().any(|c| c.is_whitespace() || c.is_control() || c == '\\') {
            return Err(NotARelayUrl::Malformed);
        }
        let url = Url::parse(text).map_err(|_| NotARelayUrl::Malformed)?;
        if url.scheme() != "https" {
            return Err(NotARelayUrl::NotHttps);
        }
        let named = match (url.host_str(), url.port()) {
            (Some(host), Some(port)) => format!("{host}:{port}"),
            (host, _) => host.unwrap_or_default().to_owned(),
        };
        let host: Host = named.parse().map_err(|_| NotARelayUrl::Malformed)?;
        let has_user = !url.username().is_empty() || url.password().is_some();
        if has_user || url.query().is_some() || url.fragment().is_some() {
            return Err(NotARelayUrl::Surplus);
        }
        let path = url.path().trim_end_matches('/');
        if let Some(route) = ROUTES.into_iter().find(|route| path.ends_with(route)) {
            return Err(NotARelayUrl::Route(route));
        }
        Ok(Self(format!("https://{host}{path}")))
    }
}

/// What tokens are made for: any text, as a rule a URL, which is then written as [`RelayUrl`] writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Audience(String);

/// The text is no audience.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an audience is expected: a text without blanks, of at most 1024 characters")]
pub struct NotAnAudience;

impl FromStr for Audience {
    type Err = NotAnAudience;

    fn from_str(text: &str) -> Result<Self, NotAnAudience> {
        let text = unquoted(text);
        let fits = (1..=1024).contains(&text.chars().count())
            && !text.chars().any(|c| c.is_whitespace() || c.is_control());
        if !fits {
            return Err(NotAnAudience);
        }
        Ok(Self(text.parse::<RelayUrl>().map_or_else(|_| text.to_owned(), |url| url.0)))
    }
}

/// Without the blanks around it, and the quotes of an environment file.
fn unquoted(text: &str) -> &str {
    let text = text.trim();
    let inside = |quote| text.strip_prefix(quote).and_then(|text| text.strip_suffix(quote));
    inside('"').or_else(|| inside('\'')).map_or(text, str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Result<String, NotARelayUrl> {
        text.parse::<RelayUrl>().map(|url| url.0)
    }

    #[test]
    fn a_url_is_understood_in_the_spellings_people_paste() {
        for text in [
            "https://relay.example.com",
            "https://relay.example.com/",
            "https://relay.example.com//",
            "https://relay.example.com:443",
            "HTTPS://Relay.Example.COM/",
            " https://relay.example.com\n",
            "\"https://relay.example.com\"",
            "'https://relay.example.com/'",
            "\" https://relay.example.com \"",
        ] {
            assert_eq!(url(text).as_deref(), Ok("https://relay.example.com"), "{text:?}");
        }
        for (text, written) in [
            ("https://relay.example.com:8443/", "https://relay.example.com:8443"),
            ("https://gateway.example.com/cyberscan/", "https://gateway.example.com/cyberscan"),
            ("https://bücher.example", "https://xn--bcher-kva.example"),
            ("https://[2001:db8::1]/", "https://[2001:db8::1]"),
            // A name that begins like a route is none.
            ("https://relay.example.com/unhealth", "https://relay.example.com/unhealth"),
        ] {
            assert_eq!(url(text).as_deref(), Ok(written), "{text:?}");
        }
        assert_eq!("https://a.example/b/".parse::<RelayUrl>().unwrap().path(), Some("/b"));
        assert_eq!("https://a.example/".parse::<RelayUrl>().unwrap().path(), None);
    }

    #[test]
    fn a_url_that_the_platform_could_not_use_is_refused_with_its_reason() {
        use NotARelayUrl as No;
        for (text, reason) in [
            ("", No::NoScheme),
            ("relay.example.com", No::NoScheme),
            ("relay.example.com:9090", No::NoScheme),
            ("https:relay.example.com", No::NoScheme),
            ("http://relay.example.com", No::NotHttps),
            ("\"http://relay.example.com\"", No::NotHttps),
            ("ftp://relay.example.com", No::NotHttps),
            ("https://", No::Malformed),
            ("https:///", No::Malformed),
            ("https://relay example.com", No::Malformed),
            ("https://relay.exam\nple.com", No::Malformed),
            ("https://relay.example.com\\x", No::Malformed),
            ("https://relay_1.example.com", No::Malformed),
            ("https://*.example.com", No::Malformed),
            ("https://relay.example.com:99999", No::Malformed),
            ("\"https://relay.example.com", No::Malformed),
            ("https://me@relay.example.com", No::Surplus),
            ("https://me:pw@relay.example.com", No::Surplus),
            ("https://relay.example.com/?a=b", No::Surplus),
            ("https://relay.example.com/#a", No::Surplus),
            ("https://relay.example.com/health", No::Route("/health")),
            ("https://relay.example.com/observe/observables/", No::Route("/observe/observables")),
            ("https://relay.example.com/a/refer/observables", No::Route("/refer/observables")),
        ] {
            assert_eq!(url(text), Err(reason), "{text:?}");
        }
    }

    fn module_type(audience: Option<&str>) -> ModuleType {
        ModuleType {
            url: "https://relay.example.com".parse().unwrap(),
            audience: audience.map(|audience| audience.parse().unwrap()),
            jwks_host: Region::Us.host().to_owned(),
        }
    }

    #[test]
    fn an_audience_stands_in_the_document_only_where_it_is_not_the_url() {
        let stated = |audience| module_type(audience).document()["properties"].get(AUDIENCE).cloned();
        assert_eq!(stated(None), None);
        assert_eq!(stated(Some("https://RELAY.example.com/")), None);
        assert_eq!(stated(Some("\"https://other.example.com/\"")), Some("https://other.example.com".into()));
        assert_eq!(stated(Some("everyone")), Some("everyone".into()));
        assert_eq!(module_type(None).patch()["properties"].get(AUDIENCE), Some(&Value::Null));
        assert_eq!(module_type(Some("everyone")).patch()["properties"][AUDIENCE], "everyone");
        for text in ["", "\"\"", " ", "two words", "a\nb", &"a".repeat(1025)] {
            assert_eq!(text.parse::<Audience>(), Err(NotAnAudience), "{text:?}");
        }
    }

    #[test]
    fn the_regions_are_the_key_issuers_that_are_believed_by_default() {
        let settings = crate::settings::Settings::load(None, []).unwrap();
        let believed = settings.effective().iter().find(|key| key.key == "auth.jwks_hosts").unwrap();
        for region in Region::ALL {
            assert!(believed.value.contains(region.host()), "{region:?}: {}", believed.value);
        }
    }

    /// To renew it: `cyberscan-relay module-type --region us --url https://relay.example.com --output deploy/securex/module_type.json`
    #[test]
    fn the_document_in_deploy_is_what_the_command_makes() {
        let written = include_str!("../../deploy/securex/module_type.json");
        assert_eq!(written, command::pretty(&module_type(None).document()));
    }
}
