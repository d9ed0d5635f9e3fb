//! Where the time of a request goes, told to an OpenTelemetry collector. It owns what a span can say; it must not
//! know what is asked or answered.
//!
//! A span says what is written in the source, numbers, and the id of the access log. There is no way to put a
//! key, a host, an observable or the text of an error into one. Chance alone decides which requests are recorded,
//! so nobody can force it.
//!
//! Only the feature `otel` brings this in. Without it a stage is the future it was given and costs nothing.

#[cfg(feature = "otel")]
mod export;
#[cfg(not(feature = "otel"))]
mod none;
#[cfg(feature = "otel")]
mod spans;

use std::{borrow::Cow, str::FromStr};

use http::{Method, StatusCode};
use url::Url;

#[cfg(not(feature = "otel"))]
pub use none::{Exporting, Span, Traces, id, inherit, stage};
#[cfg(feature = "otel")]
pub use spans::{Exporting, Span, Traces, id, inherit, stage};

use crate::metrics::{Operation, Resource, UpstreamCall};

/// Settings `telemetry.*`.
#[derive(Clone, Debug)]
pub struct Config {
    /// `telemetry.otlp_endpoint`: the collector.
    pub endpoint: Endpoint,
    /// `telemetry.otlp_sampling`: the share of requests that are recorded.
    pub sampling: f64,
}

/// Where a collector takes traces (OTLP over HTTP): `<the URL that was set>/v1/traces`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(pub(crate) Url);

impl FromStr for Endpoint {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut url = Url::parse(text).map_err(|_| ())?;
        // The URL is printed with the settings in force: no secret belongs into it.
        let bare = url.username().is_empty() && url.password().is_none() && url.query().is_none();
        if !matches!(url.scheme(), "http" | "https") || !bare || url.fragment().is_some() {
            return Err(());
        }
        url.path_segments_mut()?.pop_if_empty().extend(["v1", "traces"]);
        Ok(Self(url))
    }
}

/// What a request spends time with; each is a span below the request's.
#[derive(Clone, Copy, Debug)]
pub enum Stage {
    /// Verifying the token.
    Token,
    /// Reading the body.
    Body,
    /// Looking up what memory does not have.
    LookUp(Resource),
    /// Waiting until the limiter lets a call go.
    Turn,
    /// A call to CyberScan.
    CyberScan(UpstreamCall),
    /// A call to a key issuer.
    KeySet,
    /// An operation of Redis.
    Redis(Operation),
}

/// What a span says.
#[derive(Debug, Default)]
pub struct Facts(Vec<(&'static str, Fact)>);

/// One thing a span says.
#[derive(Debug)]
pub enum Fact {
    /// A text of the source, or the request's id.
    Text(Cow<'static, str>),
    /// A number.
    Number(i64),
}

/// The name that says why something failed; a span that has it has failed.
pub(crate) const FAILED: &str = "error.type";

impl Facts {
    /// One of the texts of the source.
    pub fn text(&mut self, name: &'static str, text: &'static str) {
        self.0.push((name, Fact::Text(text.into())));
    }

    /// A number.
    pub fn number(&mut self, name: &'static str, number: impl TryInto<i64>) {
        self.0.push((name, Fact::Number(number.try_into().unwrap_or(i64::MAX))));
    }

    /// The method of a request.
    pub fn method(&mut self, method: &Method) {
        self.text("http.request.method", known(method));
    }

    /// The status of an answer.
    pub fn status(&mut self, status: StatusCode) {
        self.number("http.response.status_code", status.as_u16());
    }

    /// The request's id in the access log.
    pub fn id(&mut self, id: &str) {
        self.0.push(("relay.request_id", Fact::Text(id.to_owned().into())));
    }

    /// It failed, for this reason.
    pub fn failed(&mut self, why: &'static str) {
        self.text(FAILED, why);
    }
}

/// The method, if it is a usual one: clients may invent others.
fn known(method: &Method) -> &'static str {
    let usual = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"];
    usual.into_iter().find(|usual| method == usual).unwrap_or("_OTHER")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_a_bare_url_and_gets_the_path_of_traces() {
        let url = |text: &str| text.parse().map(|Endpoint(url)| url.to_string());
        assert_eq!(url("http://127.0.0.1:4318").as_deref(), Ok("http://127.0.0.1:4318/v1/traces"));
        assert_eq!(url("https://otel.example/a/").as_deref(), Ok("https://otel.example/a/v1/traces"));
        for odd in [
            "",
            "127.0.0.1:4318",
            "grpc://a.example",
            "http://",
            "http://a:b@c.example",
            "http://c.example?k=v",
        ] {
            assert_eq!(url(odd), Err(()), "{odd}");
        }
    }
}
