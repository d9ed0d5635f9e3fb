//! The figures of the status page, as JSON. Counters run from the process's start; who shows them takes
//! differences.

use serde_json::{Map, Value, json};

use crate::metrics::{
    Answered, BreakerState, Counters, Decision, Endpoint, ErrorCode, Label, Labels, Metrics, Operation,
    Outcome, Prefetch, QuotaScope, QuotaWindow, RedisOutcome, Resource, Success, Tier, UpstreamCall,
    UpstreamOutcome, Urgency, revision,
};

pub(super) fn json(metrics: &Metrics, redis: bool) -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "revision": revision(),
        "ready": metrics.ready.get(()) == 1,
        "connections": metrics.connections.get(()),
        "in_flight": metrics.requests_in_flight.get(()),
        "requests": by(Endpoint::ALL, |endpoint| by(Answered::ALL, |outcome| {
            metrics.requests.get((endpoint, outcome)).into()
        })),
        "latency": by(Endpoint::ALL, |endpoint| {
            let (count, sum, buckets) = metrics.request_duration.read((endpoint,));
            json!({"count": count, "sum": sum, "buckets": buckets})
        }),
        "errors": single(&metrics.errors, ErrorCode::ALL, |code| (code,)),
        "cache": {
            "lookups": by(Tier::ALL, |tier| by(Outcome::ALL, |outcome| {
                let all = Resource::ALL.iter();
                all.map(|resource| metrics.cache_lookups.get((*resource, tier, outcome))).sum::<u64>().into()
            })),
            "entries": metrics.cache_entries.get(()),
            "bytes": metrics.cache_bytes.get(()),
            "capacity": metrics.cache_capacity.get(()),
        },
        "upstream": by(UpstreamOutcome::ALL, |outcome| {
            let all = UpstreamCall::ALL.iter();
            all.map(|call| metrics.upstream.get((*call, outcome))).sum::<u64>().into()
        }),
        "breakers": by(BreakerState::ALL, |state| metrics.breakers.get((state,)).into()),
        "limiter": {
            "used": by(QuotaScope::ALL, |scope| by(QuotaWindow::ALL, |window| {
                metrics.limiter_used.get((scope, window)).into()
            })),
            "refused": QuotaScope::ALL.iter().map(|scope| {
                metrics.limiter_decisions.get((*scope, Urgency::Interactive, Decision::Refused))
            }).sum::<u64>(),
        },
        "redis": {
            "configured": redis,
            "up": metrics.redis_up.get(()) == 1,
            "operations": by(RedisOutcome::ALL, |outcome| {
                let all = Operation::ALL.iter();
                all.map(|operation| metrics.redis_operations.get((*operation, outcome))).sum::<u64>().into()
            }),
        },
        "jwks": {
            "age": metrics.jwks_age.get(()),
            "refreshes": single(&metrics.jwks_refresh, Success::ALL, |outcome| (outcome,)),
        },
        "prefetch": single(&metrics.prefetch, Prefetch::ALL, |outcome| (outcome,)),
    })
}

fn by<L: Label>(all: &[L], value: impl Fn(L) -> Value) -> Value {
    let members = all.iter().map(|label| (label.as_str().to_owned(), value(*label)));
    Value::Object(members.collect::<Map<_, _>>())
}

fn single<L: Label, S: Labels>(counters: &Counters<S>, all: &[L], labels: impl Fn(L) -> S) -> Value {
    by(all, |label| counters.get(labels(label)).into())
}
