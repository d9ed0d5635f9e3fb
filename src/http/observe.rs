//! `POST /observe/observables`: what CyberScan has seen at each observable.

use std::sync::Arc;

use futures_util::Stream;
use http::HeaderMap;
use serde::Serialize;
use serde_json::value::RawValue;
use warp::{Buf, reply::Response as Reply};

use super::{Asked, Peer, Relay, error_reply, observables};
use crate::{
    ctim::ErrorItem,
    cyberscan::{CyberScan, Preload},
    enrich::Findings,
};

/// `{"sightings": {"count", "docs"}}`, or `{}` where there is none.
#[derive(Serialize)]
struct Entities {
    #[serde(skip_serializing_if = "Option::is_none")]
    sightings: Option<Sightings>,
}

#[derive(Serialize)]
struct Sightings {
    count: usize,
    docs: Vec<Arc<RawValue>>,
}

pub(super) async fn observe<P: CyberScan + Preload>(
    relay: Arc<Relay<P>>,
    headers: HeaderMap,
    peer: Option<Peer>,
    body: impl Stream<Item = Result<impl Buf, warp::Error>>,
) -> Reply {
    match sightings(&relay, &headers, peer, body).await {
        Ok((asked, Findings { docs, problems, tally })) => {
            let found = !docs.is_empty();
            let size = 256 + docs.iter().map(|doc| doc.get().len() + 1).sum::<usize>();
            let sightings = found.then_some(Sightings { count: docs.len(), docs });
            let mut reply = error_reply::partial(Entities { sightings }, found, &problems, size);
            relay.account(&mut reply, &asked, tally);
            reply
        }
        Err(error) => error_reply::error(error),
    }
}

async fn sightings<P: CyberScan + Preload>(
    relay: &Relay<P>,
    headers: &HeaderMap,
    peer: Option<Peer>,
    body: impl Stream<Item = Result<impl Buf, warp::Error>>,
) -> Result<(Asked, Findings<Arc<RawValue>>), ErrorItem> {
    let due = relay.enricher.due();
    let (authorized, _place, body) = relay.admit(headers, peer, body).await?;
    let observables = observables::parse(&body)?;
    if observables.is_empty() {
        return Ok((Asked { observables, tenant: None }, Findings::default()));
    }
    let who = authorized.tenant?;
    let tenant = Some(who.label());
    let findings = relay.enricher.observe(who, &observables, authorized.entities_limit, due).await;
    Ok((Asked { observables, tenant }, findings))
}
