//! What is counted. It owns the names, the closed sets of labels and the registry; it must not know
//! why anything is counted. The number of series is constant whatever clients send.

use std::{fmt::Debug, sync::Arc};

use prometheus::{HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry};

/// All counters of the process; a cheap clone.
#[derive(Clone)]
pub struct Metrics(Arc<Families>);

struct Families {
    registry: Registry,
    cache_lookups: IntCounterVec,
    /// Each child of it, resource by resource, tier by tier: look-ups are counted several times a request.
    cache_lookup: Vec<IntCounter>,
    cache_rejected: IntCounterVec,
    flights: IntCounterVec,
    redis_operations: IntCounterVec,
    redis_duration: HistogramVec,
    dependency_up: IntGaugeVec,
}

/// A closed set of label values.
pub trait Label: Copy + Debug {
    /// The value as it stands in logs and metrics.
    fn as_str(self) -> &'static str;
}

macro_rules! labels {
    ($(#[$doc:meta])* $name:ident { $($(#[$variant_doc:meta])* $variant:ident => $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_doc])* $variant,)* }

        impl $name {
            /// Every value.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];
        }

        impl Label for $name {
            fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

labels!(
    /// What is cached.
    Resource {
        /// A domain's record.
        Domain => "domain",
        /// An address's record.
        Host => "host",
        /// An address's vulnerabilities.
        Vulnerabilities => "vulnerabilities",
    }
);
labels!(
    /// Where an answer was looked for.
    Tier {
        /// This process's memory.
        Memory => "memory",
        /// Redis, shared by all replicas.
        Redis => "redis",
        /// CyberScan itself.
        Upstream => "upstream",
    }
);
labels!(
    /// What a look-up in a tier came to. Look-ups are the sum of all outcomes.
    Outcome {
        /// An answer within its freshness.
        Fresh => "fresh",
        /// An answer past its freshness that may still be served.
        Stale => "stale",
        /// "Not known to CyberScan".
        Negative => "negative",
        /// Nothing.
        Miss => "miss",
        /// The tier failed.
        Error => "error",
    }
);
labels!(
    /// Why a value from Redis was not believed.
    Rejection {
        /// It is not in a form this version knows.
        Format => "format",
        /// It is larger than any value we write.
        Oversize => "oversize",
        /// It was sealed with a key we do not have, or not at all.
        Key => "key",
        /// It was altered, or belongs to another key.
        Sealed => "sealed",
        /// It does not decode.
        Corrupt => "corrupt",
    }
);
labels!(
    /// How a fill came to its value.
    Flight {
        /// It asked CyberScan.
        Leader => "leader",
        /// Another replica's value was there already.
        Adopted => "adopted",
        /// It waited for another replica.
        Follower => "follower",
    }
);
labels!(
    /// What Redis is used for.
    Operation {
        /// Reading values.
        Read => "read",
        /// Looking again and taking the lock.
        Claim => "claim",
        /// Writing a value.
        Store => "store",
        /// Giving a lock back.
        Release => "release",
        /// Taking calls from the fleet's quotas.
        Quota => "quota",
        /// Telling and hearing of changes.
        Events => "events",
        /// Whether it is there.
        Probe => "probe",
    }
);
labels!(
    /// What came of an operation.
    RedisOutcome {
        /// It worked.
        Ok => "ok",
        /// It took too long.
        Timeout => "timeout",
        /// Redis said no.
        Refused => "refused",
        /// There is no connection.
        Unreachable => "unreachable",
        /// It was not tried, because Redis has been failing.
        Skipped => "skipped",
    }
);

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Fresh counters in a registry of their own.
    #[must_use]
    pub fn new() -> Self {
        let registry = Registry::new();
        let counter = |name: &str, help: &str, labels: &[&str]| {
            register(&registry, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let cache_lookups = counter(
            "relay_cache_lookups_total",
            "Look-ups by resource, tier and outcome.",
            &["resource", "tier", "outcome"],
        );
        let places =
            Resource::ALL.iter().flat_map(|resource| Tier::ALL.iter().map(move |tier| (resource, tier)));
        let children = places.flat_map(|place| Outcome::ALL.iter().map(move |outcome| (place, outcome)));
        let cache_lookup = children
            .map(|((resource, tier), outcome)| {
                let labels = [resource.as_str(), tier.as_str(), outcome.as_str()];
                cache_lookups.with_label_values(&labels)
            })
            .collect();
        Self(Arc::new(Families {
            cache_lookups,
            cache_lookup,
            cache_rejected: counter(
                "relay_cache_rejected_total",
                "Values from Redis that were not believed.",
                &["reason"],
            ),
            flights: counter("relay_cache_fills_total", "Fills by how they came to their value.", &["role"]),
            redis_operations: counter(
                "relay_redis_operations_total",
                "Redis operations by outcome.",
                &["operation", "outcome"],
            ),
            redis_duration: register(
                &registry,
                HistogramVec::new(
                    HistogramOpts::new(
                        "relay_redis_operation_duration_seconds",
                        "Duration of Redis operations.",
                    )
                    .buckets(vec![0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1]),
                    &["operation"],
                ),
            ),
            dependency_up: register(
                &registry,
                IntGaugeVec::new(Opts::new("relay_redis_up", "1 while Redis answers."), &[]),
            ),
            registry,
        }))
    }

    /// The registry, for exposition.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// Counts a look-up.
    pub fn look_up(&self, resource: Resource, tier: Tier, outcome: Outcome) {
        let place = resource as usize * Tier::ALL.len() + tier as usize;
        if let Some(counter) = self.0.cache_lookup.get(place * Outcome::ALL.len() + outcome as usize) {
            counter.inc();
        }
    }

    /// How many look-ups have been counted.
    #[must_use]
    pub fn look_ups(&self, resource: Resource, tier: Tier, outcome: Outcome) -> u64 {
        let labels = [resource.as_str(), tier.as_str(), outcome.as_str()];
        self.0.cache_lookups.with_label_values(&labels).get()
    }

    /// Counts a value that was not believed.
    pub fn rejected(&self, reason: Rejection) {
        self.0.cache_rejected.with_label_values(&[reason.as_str()]).inc();
    }

    /// How many values have not been believed.
    #[must_use]
    pub fn rejections(&self) -> u64 {
        let all = Rejection::ALL.iter();
        all.map(|reason| self.0.cache_rejected.with_label_values(&[reason.as_str()]).get()).sum()
    }

    /// Counts a fill.
    pub fn flight(&self, role: Flight) {
        self.0.flights.with_label_values(&[role.as_str()]).inc();
    }

    /// Counts a Redis operation and, if it ran, how long it took in seconds.
    pub fn redis(&self, operation: Operation, outcome: RedisOutcome, seconds: f64) {
        self.0.redis_operations.with_label_values(&[operation.as_str(), outcome.as_str()]).inc();
        if outcome != RedisOutcome::Skipped {
            self.0.redis_duration.with_label_values(&[operation.as_str()]).observe(seconds);
        }
    }

    /// Notes whether Redis answers.
    pub fn redis_up(&self, up: bool) {
        self.0.dependency_up.with_label_values(&[] as &[&str]).set(i64::from(up));
    }
}

/// Registers a family whose name and labels are written in this file.
fn register<C: prometheus::core::Collector + Clone + 'static>(
    registry: &Registry,
    family: prometheus::Result<C>,
) -> C {
    let family = family.expect("names and labels are literals of this file; a test makes them all");
    let registered = registry.register(Box::new(family.clone()));
    debug_assert!(registered.is_ok(), "registered twice");
    family
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_families_are_registered_and_count() {
        let metrics = Metrics::new();
        metrics.look_up(Resource::Domain, Tier::Redis, Outcome::Miss);
        metrics.rejected(Rejection::Sealed);
        metrics.redis(Operation::Read, RedisOutcome::Ok, 0.001);
        metrics.redis_up(true);
        metrics.flight(Flight::Leader);
        assert_eq!(metrics.look_ups(Resource::Domain, Tier::Redis, Outcome::Miss), 1);
        assert_eq!(metrics.rejections(), 1);
        assert_eq!(metrics.registry().gather().len(), 6);
    }
}
