//! Chance that is the schedule's, so that a replay throws the same.

use std::{
    future::{Future, poll_fn},
    pin::pin,
    task::Poll,
};

use shuttle::{future::yield_now, rand::Rng, rand::thread_rng};

/// A number from 0 to 1.
pub fn chance() -> f64 {
    thread_rng().gen_range(0.0..1.0)
}

/// A number below `end`.
pub fn below(end: usize) -> usize {
    thread_rng().gen_range(0..end)
}

/// Lets others go on, a few times or not at all.
pub async fn some_time() {
    for _ in 0..below(4) {
        yield_now().await;
    }
}

/// Polls `future` so often at most, then drops it, as a caller does who leaves.
pub async fn for_a_while<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    for _ in 0..polls {
        let poll = poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await;
        if let Poll::Ready(output) = poll {
            return Some(output);
        }
        yield_now().await;
    }
    None
}
