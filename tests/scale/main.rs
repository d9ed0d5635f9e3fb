//! What a fleet costs its Redis. A test binary of its own: it wants the machine for itself.
//!
//! `make scale` measures ten processes, then fleets of 25, 50 and 100 replicas with 100,000 tenants, and writes
//! docs/scaling.md; it takes some twenty minutes. Without `RELAY_SCALE` three processes are measured for some seconds.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::disallowed_methods,
    clippy::print_stderr,
    dead_code,
    reason = "a test that cannot go on has failed; figures are printed; not all of the harness is needed here"
)]

#[path = "../it/fleet.rs"]
mod fleet;
#[path = "../it/harness.rs"]
mod harness;
#[path = "../it/redis.rs"]
mod redis;

mod cost;
mod trial;
