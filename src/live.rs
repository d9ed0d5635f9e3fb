//! A configuration that may change while it is used. It owns the swap; it must not know what is configured.
//!
//! The mechanism is the same everywhere: a part holds a `Live<Config>`, reads it where it needs a value, and has a method
//! `reconfigure` that sets it and draws the consequences (forgets what was decided by the old one, for instance). A
//! reader never waits and never sees half of a change.

use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};

/// The value in force; a cheap clone of one shared place.
#[derive(Debug)]
pub struct Live<T>(Arc<ArcSwap<T>>);

impl<T> Clone for Live<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Live<T> {
    /// A place with `value` in it.
    pub fn new(value: T) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(value)))
    }

    /// The value in force, for a moment: not to be kept over an await.
    #[must_use]
    pub fn get(&self) -> Guard<Arc<T>> {
        self.0.load()
    }

    /// The value in force, for as long as it is needed.
    #[must_use]
    pub fn snapshot(&self) -> Arc<T> {
        self.0.load_full()
    }

    /// From now on it is `value`.
    pub fn set(&self, value: T) {
        self.0.store(Arc::new(value));
    }
}
