//! The locks and atomics of what `models/` runs under every schedule it can think of: there they are the
//! model's, here they are std's.

pub use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicI64, AtomicU64},
};
