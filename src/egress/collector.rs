//! The client for the one collector of traces that an operator has named. It leads nowhere else: no guard has to
//! look at its address, and what the other client may call does not matter here.

use std::time::Duration;

use http::{HeaderValue, StatusCode, header};
use url::Url;

use super::{
    client::{self, Config, Transport},
    tls,
};

/// How long a batch may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A client of one URL.
#[derive(Debug)]
pub(crate) struct Collector {
    client: reqwest::Client,
    url: Url,
}

impl Collector {
    /// A client of `url`; of `config` only certificates and the time to connect count.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub(crate) fn new(url: &Url, config: &Config) -> anyhow::Result<Self> {
        #[expect(clippy::disallowed_methods, reason = "it calls the one URL an operator has set")]
        let builder = reqwest::Client::builder()
            .tls_backend_preconfigured(tls::client_config(config.extra_ca_file.as_deref())?)
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .no_proxy()
            .referer(false)
            .http1_only()
            .connect_timeout(config.connect_timeout)
            .timeout(TIMEOUT);
        Ok(Self { client: builder.build()?, url: url.clone() })
    }

    /// Sends a protobuf message; the answer's body says nothing of interest.
    ///
    /// # Errors
    /// A [`Transport`] error when there is no complete answer.
    pub(crate) async fn post(&self, message: Vec<u8>) -> Result<StatusCode, Transport> {
        let protobuf = HeaderValue::from_static("application/x-protobuf");
        let request = self.client.post(self.url.clone()).header(header::CONTENT_TYPE, protobuf).body(message);
        let mut response = request.send().await.map_err(|error| client::classify(&error))?;
        // Read to its end, so that the connection can be used again.
        while response.chunk().await.map_err(|error| client::broken(&error))?.is_some() {}
        Ok(response.status())
    }
}
