//! `POST /health`: are this tenant's credentials good and CyberScan there, and how much of its quotas is
//! used?

use std::{collections::BTreeMap, sync::Arc};

use http::HeaderMap;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;
use warp::reply::Response as Reply;

use super::{Peer, Relay, error_reply};
use crate::{
    ctim::{Envelope, ErrorItem},
    cyberscan::{CyberScan, Preload, QuotaUse},
};

#[derive(Serialize)]
struct Health {
    status: &'static str,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    quotas: BTreeMap<String, Quota>,
}

/// A quota as the platform describes it. The relay's windows slide: the current one always ends now.
#[derive(Serialize)]
struct Quota {
    description: String,
    values: Bucket,
}

#[derive(Serialize)]
struct Bucket {
    bucket_unit: &'static str,
    bucket_limit: u32,
    current_bucket_consumption: u32,
    current_bucket_start_time: String,
    current_bucket_end_time: String,
    current_bucket_limit_reached: bool,
}

pub(super) async fn health<P: CyberScan + Preload>(
    relay: Arc<Relay<P>>,
    headers: HeaderMap,
    peer: Option<Peer>,
) -> Reply {
    match check(&relay, &headers, peer).await {
        Ok(health) => error_reply::json(&Envelope::data(health)),
        Err(error) => error_reply::error(error),
    }
}

async fn check<P: CyberScan + Preload>(
    relay: &Relay<P>,
    headers: &HeaderMap,
    peer: Option<Peer>,
) -> Result<Health, ErrorItem> {
    let due = relay.enricher.due();
    let (authorized, _place) = relay.enter(headers, peer).await?;
    let tenant = authorized.tenant?;
    relay.enricher.check(&tenant, due).await?;
    let quotas = relay.quotas.quotas(&tenant).await;
    let now = relay.clock.now();
    Ok(Health { status: "ok", quotas: quotas.iter().filter_map(|quota| bucket(quota, now)).collect() })
}

/// Quotas of lengths the platform has no unit for, a second above all, are not shown.
fn bucket(quota: &QuotaUse, now: Timestamp) -> Option<(String, Quota)> {
    let unit = match quota.per.as_secs() {
        60 => "minute",
        3_600 => "hour",
        86_400 => "day",
        604_800 => "week",
        // The platform has no word for thirty days but this.
        2_592_000 => "month",
        _ => return None,
    };
    let whose = if quota.of_fleet { "all tenants" } else { "this tenant" };
    let start = now.checked_sub(SignedDuration::try_from(quota.per).ok()?).ok()?;
    let time = |at: Timestamp| at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let values = Bucket {
        bucket_unit: unit,
        bucket_limit: quota.limit,
        current_bucket_consumption: quota.used,
        current_bucket_start_time: time(start),
        current_bucket_end_time: time(now),
        current_bucket_limit_reached: quota.used >= quota.limit,
    };
    let name = format!("{}-{unit}", if quota.of_fleet { "fleet" } else { "tenant" });
    Some((name, Quota { description: format!("Calls to CyberScan per {unit} for {whose}"), values }))
}
