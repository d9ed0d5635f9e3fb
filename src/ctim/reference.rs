//! A reference: a link with which an analyst pivots to CyberScan.

use serde::Serialize;

use super::Observable;

/// One entry of the answer to `/refer/observables`.
#[derive(Debug, Serialize)]
pub struct Reference {
    id: String,
    title: String,
    description: String,
    url: String,
    categories: [&'static str; 1],
}

impl Reference {
    /// The reference from `observable` to its `details_page`.
    #[must_use]
    pub fn new(observable: &Observable, details_page: &str) -> Self {
        let kind = observable.kind();
        Self {
            id: format!("ref-cyberscan-search-{kind}-{}", observable.value()),
            title: format!("Details for this {kind}"),
            description: format!("Details for this {kind} in the CyberScan"),
            url: details_page.to_owned(),
            categories: ["CyberScan"],
        }
    }
}
