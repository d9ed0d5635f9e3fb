//! Sightings that are rendered already. Ids are deterministic and times are those of the fetch, so the
//! JSON of an answer does not change while the answer lives: it is made once and served as bytes. It
//! owns when a rendering still fits; it must not know how one is made.

use std::{
    net::IpAddr,
    sync::{Arc, Weak},
};

use moka::sync::Cache;
use serde_json::value::RawValue;

use super::sighting::Seen;
use crate::{
    ctim::{Observable, sighting::Tlp},
    cyberscan::Vulnerabilities,
    tenant::TenantId,
};

/// What a document takes beside its text: its counts, its place in the list, what the allocator adds.
const BLOCK: usize = 48;
/// What moka and the allocator add to a rendering; measured.
const SLOT: usize = 450;

/// Renderings by tenant and observable, bounded in bytes; a cheap clone.
#[derive(Clone)]
pub(super) struct Rendered(Cache<(TenantId, Observable), Arc<Rendering>>);

struct Rendering {
    /// What it is a rendering of: the very record, not one like it. It is not kept alive, but nothing else can
    /// come to stand at its address.
    vulnerabilities: Weak<Vulnerabilities>,
    ip: IpAddr,
    details_page: Option<String>,
    tlp: Tlp,
    docs: Arc<[Arc<RawValue>]>,
}

impl Rendered {
    pub(super) fn new(bytes: u64) -> Self {
        let weigh = |of: &(TenantId, Observable), rendering: &Arc<Rendering>| {
            let bytes: usize = rendering.docs.iter().map(|doc| doc.get().len() + BLOCK).sum();
            let page = rendering.details_page.as_ref().map_or(0, String::len);
            let slot = size_of_val(of) + of.1.value().len() + size_of::<Rendering>() + SLOT;
            u32::try_from(bytes + page + slot).unwrap_or(u32::MAX)
        };
        Self(Cache::builder().max_capacity(bytes).weigher(weigh).build())
    }

    /// The sightings of `seen`: those made before, if they were made from the same.
    pub(super) fn get(
        &self,
        seen: Seen,
        tenant: TenantId,
        observable: &Observable,
        tlp: Tlp,
    ) -> Arc<[Arc<RawValue>]> {
        // It stays in this process, so it needs no derived name.
        let of = (tenant, observable.clone());
        if let Some(rendering) = self.0.get(&of)
            && std::ptr::eq(rendering.vulnerabilities.as_ptr(), Arc::as_ptr(&seen.vulnerabilities))
            && rendering.ip == seen.ip
            && rendering.details_page == seen.details_page
            && rendering.tlp == tlp
        {
            return Arc::clone(&rendering.docs);
        }
        let docs: Arc<[_]> = seen.render(tenant, observable, tlp).into();
        let Seen { ip, details_page, vulnerabilities, asked_at: _ } = seen;
        let vulnerabilities = Arc::downgrade(&vulnerabilities);
        let rendering = Rendering { vulnerabilities, ip, details_page, tlp, docs: Arc::clone(&docs) };
        self.0.insert(of, Arc::new(rendering));
        docs
    }
}
