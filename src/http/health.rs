//! `POST /health`: are this tenant's credentials good and CyberScan there?

use http::HeaderMap;
use serde::Serialize;
use warp::reply::Response as Reply;

use super::{Peer, Relay, error_reply};
use crate::{ctim::Envelope, ctim::ErrorItem, cyberscan::CyberScan};

#[derive(Serialize)]
struct Health {
    status: &'static str,
}

pub(super) async fn health<P: CyberScan>(relay: Relay<P>, headers: HeaderMap, peer: Option<Peer>) -> Reply {
    match check(&relay, &headers, peer).await {
        Ok(health) => error_reply::json(&Envelope::data(health)),
        Err(error) => error_reply::error(error),
    }
}

async fn check<P: CyberScan>(
    relay: &Relay<P>,
    headers: &HeaderMap,
    peer: Option<Peer>,
) -> Result<Health, ErrorItem> {
    let due = relay.enricher.due();
    let authorized = relay.authorize(headers, peer).await?;
    relay.enricher.check(authorized.tenant?, due).await?;
    Ok(Health { status: "ok" })
}
