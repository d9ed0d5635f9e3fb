//! `POST /refer/observables`: where CyberScan shows each observable to a person.

use std::sync::Arc;

use futures_util::Stream;
use http::HeaderMap;
use warp::{Buf, reply::Response as Reply};

use super::{Asked, Peer, Relay, error_reply, observables};
use crate::{
    ctim::{ErrorItem, Reference},
    cyberscan::{CyberScan, Preload},
    enrich::Findings,
};

pub(super) async fn refer<P: CyberScan + Preload>(
    relay: Arc<Relay<P>>,
    headers: HeaderMap,
    peer: Option<Peer>,
    body: impl Stream<Item = Result<impl Buf, warp::Error>>,
) -> Reply {
    match references(&relay, &headers, peer, body).await {
        Ok((asked, Findings { docs, problems, tally })) => {
            let found = !docs.is_empty();
            let mut reply = error_reply::partial(docs, found, &problems, error_reply::USUAL);
            relay.account(&mut reply, &asked, tally);
            reply
        }
        Err(error) => error_reply::error(error),
    }
}

async fn references<P: CyberScan + Preload>(
    relay: &Relay<P>,
    headers: &HeaderMap,
    peer: Option<Peer>,
    body: impl Stream<Item = Result<impl Buf, warp::Error>>,
) -> Result<(Asked, Findings<Reference>), ErrorItem> {
    let due = relay.enricher.due();
    let (authorized, _place, body) = relay.admit(headers, peer, body).await?;
    let observables = observables::parse(&body)?;
    if observables.is_empty() {
        return Ok((Asked { observables, tenant: None }, Findings::default()));
    }
    let who = authorized.tenant?;
    let tenant = Some(who.label());
    let findings = relay.enricher.refer(who, &observables, due).await;
    Ok((Asked { observables, tenant }, findings))
}
