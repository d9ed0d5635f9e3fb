//! Trials under load. They are a test binary of their own because cargo runs one after the other: what is
//! measured here would be the other tests' load, too. For the same reason they take turns.

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

mod trials;
