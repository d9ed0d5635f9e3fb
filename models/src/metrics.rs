//! What the sources under test count.

use std::sync::Arc;

use stand_ins::Seen;

/// How a circuit stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    Closed,
    HalfOpen,
    Open,
}

/// What came of a fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Success {
    Ok,
    Failed,
}

#[derive(Clone, Default)]
pub struct Metrics {
    pub jwks_refresh: Counted,
}

/// What was counted, in its order.
#[derive(Clone, Default)]
pub struct Counted(Arc<Seen<Vec<Success>>>);

impl Counted {
    pub fn inc(&self, (outcome,): (Success,)) {
        self.0.lock().push(outcome);
    }

    pub fn of(&self, outcome: Success) -> usize {
        self.0.lock().iter().filter(|counted| **counted == outcome).count()
    }
}
