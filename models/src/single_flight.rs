//! Single flight: callers come, wait, leave and act on failures; attempts succeed, fail, panic or are cut off.

use std::{
    collections::HashSet,
    panic::{AssertUnwindSafe, resume_unwind},
    sync::Arc,
};

use futures_util::{FutureExt, future::join_all};
use shuttle::future::{block_on, spawn};
use stand_ins::Seen;
use tokio_util::task::TaskTracker;

use crate::{
    chance::{below, for_a_while, some_time},
    flight::{Flights, Lost},
};

const CALLERS: usize = 4;
const KEYS: usize = 2;
const CALLS: usize = 3;

/// The number of an attempt, and whether it succeeded.
type Outcome = (usize, bool);

#[derive(Clone)]
struct World {
    flights: Flights<usize, Outcome>,
    tasks: TaskTracker,
    seen: Arc<Seen<Known>>,
}

/// What an onlooker knows.
#[derive(Default)]
struct Known {
    attempts: usize,
    /// Attempts under way for each key.
    under_way: [usize; KEYS],
    /// Attempts that ended without an outcome, by key.
    lost: [usize; KEYS],
    /// Attempts whose outcome somebody has.
    told: HashSet<usize>,
}

/// An attempt under way; over as soon as it is dropped.
struct UnderWay {
    world: World,
    key: usize,
    number: usize,
    done: bool,
}

impl World {
    fn new() -> Self {
        let tasks = TaskTracker::new();
        Self { flights: Flights::new(tasks.clone()), tasks, seen: Arc::default() }
    }

    fn begin(&self, key: usize) -> UnderWay {
        let mut seen = self.seen.lock();
        seen.attempts += 1;
        seen.under_way[key] += 1;
        assert_eq!(seen.under_way[key], 1, "two attempts at a time for one key");
        UnderWay { world: self.clone(), key, number: seen.attempts, done: false }
    }

    async fn attempt(self, key: usize) -> Outcome {
        let mut under_way = self.begin(key);
        some_time().await;
        let fate = below(4);
        if fate == 0 {
            resume_unwind(Box::new("a bug in the attempt"));
        }
        under_way.done = true;
        (under_way.number, fate > 1)
    }

    /// Joins the flight of `key`, if only for a while.
    async fn call(&self, key: usize) -> Option<Result<Outcome, Lost>> {
        let before = self.seen.lock().told.clone();
        let joining = self.flights.join(key, || {
            if below(16) == 0 {
                self.seen.lock().lost[key] += 1;
                resume_unwind(Box::new("a bug before the attempt"));
            }
            self.clone().attempt(key)
        });
        // Who stays is polled only when woken: a lost wake-up is a deadlock.
        let waiting =
            async { if below(3) == 0 { for_a_while(below(6), joining).await } else { Some(joining.await) } };
        let outcome = AssertUnwindSafe(waiting).catch_unwind().await.unwrap_or(None);
        let mut seen = self.seen.lock();
        match outcome {
            Some(Ok((number, _))) => {
                assert!(!before.contains(&number), "joined an attempt that was over already");
                seen.told.insert(number);
            }
            Some(Err(Lost)) => assert!(seen.lost[key] > 0, "an outcome was lost"),
            None => {}
        }
        outcome
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut seen = self.world.seen.lock();
        seen.under_way[self.key] -= 1;
        seen.lost[self.key] += usize::from(!self.done);
    }
}

async fn caller(world: World) {
    for _ in 0..CALLS {
        let key = below(KEYS);
        // Who gets a failure acts on it and asks again.
        while let Some(Ok((_, false))) = world.call(key).await {}
        some_time().await;
    }
}

/// Whoever stays gets an outcome; nobody joins what is over; one attempt at a time for a key; none is left.
pub fn callers_come_and_go() {
    block_on(async {
        let world = World::new();
        join_all((0..CALLERS).map(|_| spawn(caller(world.clone())))).await;
        world.tasks.wait().await;
        assert!(world.flights.is_empty(), "an attempt is over and still in the table");
    });
}

/// Attempts are dropped wherever they are: those who wait are told, and the table is empty.
pub fn the_process_ends() {
    block_on(async {
        let world = World::new();
        let callers = (0..CALLERS).map(|_| {
            let world = world.clone();
            spawn(async move { world.call(0).await })
        });
        let callers: Vec<_> = callers.collect();
        some_time().await;
        // From now on an outcome may be lost.
        world.seen.lock().lost[0] += 1;
        world.tasks.abort();
        join_all(callers).await;
        world.tasks.wait().await;
        assert!(world.flights.is_empty(), "an attempt is over and still in the table");
    });
}

/// Callers look into a memory first, and attempts leave what they bring there: what is there, or has failed, is not
/// attempted again by who looked just before.
pub fn what_has_just_ended_is_not_begun_again() {
    block_on(async {
        let world = World::new();
        let memory: Arc<shuttle::sync::Mutex<Option<Outcome>>> = Arc::default();
        let callers = (0..CALLERS).map(|_| {
            let (world, memory) = (world.clone(), Arc::clone(&memory));
            spawn(async move {
                some_time().await;
                let look = || *memory.lock().unwrap();
                if look().is_some() {
                    return;
                }
                let attempt = || {
                    let (memory, under_way) = (Arc::clone(&memory), world.begin(0));
                    async move {
                        some_time().await;
                        let outcome = (under_way.number, below(2) == 0);
                        *memory.lock().unwrap() = Some(outcome);
                        outcome
                    }
                };
                if let Some(mut outcome) = world.flights.start_if(0, || look().is_none(), attempt) {
                    outcome.wait_for(Option::is_some).await.expect("nobody panics");
                }
                assert!(look().is_some());
            })
        });
        join_all(callers.collect::<Vec<_>>()).await;
        assert_eq!(world.seen.lock().attempts, 1);
    });
}
