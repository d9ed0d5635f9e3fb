//! Purges: made, told, heard and told again, while the fleet's clock is set and Redis loses its memory.

use std::{collections::HashMap, sync::Arc, time::Duration};

use futures_util::future::join_all;
use shuttle::future::{block_on, spawn};
use stand_ins::Seen;
use tokio::time::advance;

use crate::{
    cache::{
        order::{Order, Scope},
        tier::Key,
    },
    chance::{below, some_time},
};

/// What the fleet's clock shows first; an hour later is as good.
const BEGAN: u64 = 1 << 52;
const HOUR: u64 = 3_600_000_000;
const SCOPES: [Scope; 2] = [Scope::All, Scope::Tenant([7; 16])];

/// What Redis has, and what an onlooker knows.
#[derive(Default)]
struct Fleet {
    /// How far the clock was set.
    set: u64,
    stamps: HashMap<Scope, u64>,
    /// The latest purge of each scope that is made.
    purged: HashMap<Scope, u64>,
}

impl Fleet {
    fn note(&mut self, scope: Scope, version: u64) {
        let stamp = self.stamps.entry(scope).or_default();
        *stamp = version.max(*stamp);
    }
}

/// As a replica does after a purge.
async fn tell(order: &Order, fleet: &Seen<Fleet>, scope: Scope) {
    let Some(telling) = order.telling(scope) else { return };
    some_time().await;
    fleet.lock().note(scope, telling.shared);
    some_time().await;
    order.told(&[telling]);
}

/// As a replica does after a reconnection.
async fn exchange(order: &Order, fleet: &Seen<Fleet>) {
    let stamps: Vec<_> = fleet.lock().stamps.iter().map(|(scope, version)| (*scope, *version)).collect();
    some_time().await;
    let lacking = order.learn(&stamps).lacking;
    some_time().await;
    lacking.iter().for_each(|telling| fleet.lock().note(telling.scope, telling.shared));
    some_time().await;
    order.told(&lacking);
}

/// As a replica does every two seconds.
fn look(order: &Order, fleet: &Seen<Fleet>) {
    let set = fleet.lock().set;
    order.compare(BEGAN + set);
}

/// Whatever happens at once: what was purged is dead at every read from then on, and in the end Redis has a stamp of it
/// that says so by the clock as it is then.
pub fn what_is_purged_is_told_by_the_clock_as_it_is() {
    block_on(async {
        let (order, fleet) = (Arc::new(Order::default()), Arc::new(Seen::new(Fleet::default())));
        look(&order, &fleet);
        let mut tasks = Vec::new();
        for scope in SCOPES {
            let (order, fleet) = (Arc::clone(&order), Arc::clone(&fleet));
            tasks.push(spawn(async move {
                for _ in 0..2 {
                    some_time().await;
                    advance(Duration::from_micros(1));
                    let version = order.clock().now();
                    order.purge(scope, version);
                    fleet.lock().purged.insert(scope, version);
                    tell(&order, &fleet, scope).await;
                }
            }));
        }
        let (following, followed) = (Arc::clone(&order), Arc::clone(&fleet));
        tasks.push(spawn(async move {
            for _ in 0..3 {
                some_time().await;
                match below(3) {
                    0 => followed.lock().set += HOUR,
                    1 => followed.lock().stamps.clear(),
                    _ => {
                        let version = BEGAN + followed.lock().set;
                        followed.lock().note(SCOPES[1], version);
                        following.hear(SCOPES[1], version);
                    }
                }
                look(&following, &followed);
                exchange(&following, &followed).await;
            }
        }));
        let (reading, read) = (Arc::clone(&order), Arc::clone(&fleet));
        tasks.push(spawn(async move {
            let key = Key { label: [7; 16], subject: "203.0.113.7".into() };
            for _ in 0..4 {
                some_time().await;
                let latest = read.lock().purged.values().copied().max().unwrap_or(0);
                assert!(reading.purged_before(&key) >= latest, "what is purged is served");
            }
        }));
        join_all(tasks).await;
        look(&order, &fleet);
        for _ in 0..3 {
            exchange(&order, &fleet).await;
        }
        assert!(!order.is_untold(), "something is never told");
        let purged = fleet.lock().purged.clone();
        for (scope, version) in purged {
            let told = fleet.lock().stamps.get(&scope).copied().unwrap_or(0);
            assert!(Some(told) >= order.clock().shared(version), "{scope:?} is told by a clock that was");
        }
    });
}
