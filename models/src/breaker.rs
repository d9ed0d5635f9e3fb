//! The circuit breaker: calls begin, end and are cut off at any moment, before, while and after it opens.

use std::{sync::Arc, time::Duration};

use futures_util::future::join_all;
use shuttle::future::{block_on, spawn, yield_now};
use stand_ins::Seen;
use tokio::time::advance;

use crate::{
    chance::{below, some_time},
    circuit::Circuit,
    metrics::BreakerState,
};

const CALLERS: usize = 4;
/// As in the circuit.
const IN_A_ROW: usize = 10;
/// Longer than any pause.
const LONG: Duration = Duration::from_secs(120);

#[derive(Clone, Copy)]
enum Ending {
    Dropped,
    Failed,
    Succeeded,
}

/// What an onlooker knows of probes; from the first success on, calls are none.
#[derive(Default)]
struct Known {
    probing: bool,
    failed: bool,
    succeeded: bool,
}

impl Known {
    fn begins(&mut self) {
        assert!(self.succeeded || !self.failed, "a probe in the pause after one that failed");
        assert!(self.succeeded || !self.probing, "two probes at a time");
        self.probing = true;
    }

    fn ends(&mut self, ending: Ending) {
        self.probing = false;
        match ending {
            Ending::Dropped => {}
            Ending::Failed => self.failed = true,
            Ending::Succeeded => self.succeeded = true,
        }
    }
}

/// Calls fail until it is open.
fn open(circuit: &Circuit) {
    while let Ok(attempt) = circuit.begin() {
        attempt.end(true);
    }
}

/// Of all who call when the pause is over, one at a time goes through, until a probe succeeds; whatever becomes
/// of probes, there is another one.
pub fn one_probe_at_a_time() {
    block_on(async {
        let circuit = Arc::new(Circuit::default());
        open(&circuit);
        advance(LONG);
        let known = Arc::new(Seen::new(Known::default()));
        let callers = (0..CALLERS).map(|_| {
            let (circuit, known) = (Arc::clone(&circuit), Arc::clone(&known));
            spawn(async move {
                some_time().await;
                let Ok(attempt) = circuit.begin() else { return };
                known.lock().begins();
                some_time().await;
                let ending = [Ending::Dropped, Ending::Failed, Ending::Succeeded][below(3)];
                known.lock().ends(ending);
                match ending {
                    Ending::Dropped => drop(attempt),
                    Ending::Failed => attempt.end(true),
                    Ending::Succeeded => attempt.end(false),
                }
            })
        });
        join_all(callers.collect::<Vec<_>>()).await;
        let expected = match *known.lock() {
            Known { succeeded: true, .. } => BreakerState::Closed,
            Known { failed: true, .. } => BreakerState::Open,
            _ => BreakerState::HalfOpen,
        };
        assert_eq!(circuit.state(), expected);
        advance(LONG);
        assert!(circuit.begin().is_ok(), "a host is left alone for ever");
    });
}

/// A probe has closed the circuit, and its task goes on only when the circuit has opened again: the next probe is
/// still the only one.
pub fn a_probe_that_ends_late() {
    block_on(async {
        let circuit = Arc::new(Circuit::default());
        open(&circuit);
        advance(LONG);
        let late = {
            let circuit = Arc::clone(&circuit);
            spawn(async move { circuit.begin().expect("the pause is over").end(false) })
        };
        while circuit.state() != BreakerState::Closed {
            yield_now().await;
        }
        open(&circuit);
        advance(LONG);
        let probe = circuit.begin().expect("the pause is over");
        late.await.expect("it ends");
        assert!(circuit.begin().is_err(), "two probes at a time");
        probe.end(false);
        assert!(circuit.begin().is_ok());
    });
}

/// Of failures that end together each counts once: the tenth in a row opens, the ninth does not.
pub fn every_failure_counts_once() {
    block_on(async {
        let circuit = Arc::new(Circuit::default());
        let tenth = below(2) == 1;
        let failures = if tenth { [3, 3, 4] } else { [3, 3, 3] };
        assert!(failures.iter().sum::<usize>() + usize::from(!tenth) == IN_A_ROW);
        join_all(failures.map(|failures| {
            let circuit = Arc::clone(&circuit);
            spawn(async move {
                for _ in 0..failures {
                    circuit.begin().expect("closed").end(true);
                }
            })
        }))
        .await;
        let expected = if tenth { BreakerState::Open } else { BreakerState::Closed };
        assert_eq!(circuit.state(), expected);
    });
}
