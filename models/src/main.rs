//! Runs the relay's single flight, circuit breaker, key sets and order of purges, from their very sources, under thousands
//! of schedules: which task goes on at each lock is chosen at random, or by PCT, which holds
//! tasks up at few places and for long. The same seed makes the same choices.
//!
//! `models [--seed N] [--schedules N] [--replay FILE] [MODEL...]`; of each kind there are so many schedules.

// Under these names the sources under test find what is in `stand-ins`.
extern crate stand_ins as arc_swap;
extern crate stand_ins as aws_lc_rs;
extern crate stand_ins as jsonwebtoken;
extern crate stand_ins as tokio;
extern crate stand_ins as tokio_util;

#[path = "../../src/cyberscan/circuit.rs"]
mod circuit;
#[path = "../../src/flight.rs"]
#[expect(dead_code, reason = "the relay uses what the models do not")]
mod flight;

#[path = "../../src/live.rs"]
#[expect(dead_code, reason = "the relay uses what the models do not")]
mod live;

mod breaker;
mod cache;
mod chance;
mod key_sets;
mod metrics;
mod purges;
mod single_flight;

/// No traces are made of a schedule.
mod trace {
    pub fn inherit<F: Future>(future: F) -> F {
        future
    }
}

/// The locks and atomics of the schedule.
mod sync {
    pub use shuttle::sync::{
        Mutex, MutexGuard,
        atomic::{AtomicI64, AtomicU64},
    };
}

/// Names as they stand in Redis, which no model looks at.
mod tenant {
    pub fn hex(name: [u8; 16]) -> String {
        format!("{:032x}", u128::from_be_bytes(name))
    }

    pub fn unhex(text: &str) -> Option<[u8; 16]> {
        u128::from_str_radix(text, 16).ok().map(u128::to_be_bytes)
    }
}

use std::{env, fs, panic::catch_unwind, path::PathBuf, process::ExitCode, time::Instant};

use shuttle::{
    Config, FailurePersistence, Runner,
    scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler},
};

type Model = (&'static str, fn());

const MODELS: &[Model] = &[
    ("callers_of_a_flight_come_and_go", single_flight::callers_come_and_go),
    ("flights_end_with_the_process", single_flight::the_process_ends),
    ("what_has_just_ended_is_not_begun_again", single_flight::what_has_just_ended_is_not_begun_again),
    ("one_probe_at_a_time", breaker::one_probe_at_a_time),
    ("a_probe_that_ends_late", breaker::a_probe_that_ends_late),
    ("every_failure_counts_once", breaker::every_failure_counts_once),
    ("a_key_set_is_replaced_whole", key_sets::a_set_is_replaced_whole),
    ("a_new_key_is_looked_for_once", key_sets::a_new_key_is_looked_for_once),
    ("a_failed_fetch_is_one_failure", key_sets::a_failed_fetch_is_one_failure),
    ("what_is_purged_is_told", purges::what_is_purged_is_told_by_the_clock_as_it_is),
];

/// PCT's depth: it holds tasks up at so many places, less one.
const DEPTH: usize = 3;

struct Options {
    seed: u64,
    schedules: usize,
    replay: Option<PathBuf>,
    models: Vec<String>,
}

fn main() -> ExitCode {
    let options = match options(env::args().skip(1)) {
        Ok(options) => options,
        Err(fault) => {
            eprintln!("models: {fault}");
            return ExitCode::FAILURE;
        }
    };
    let chosen = |name: &str| options.models.is_empty() || options.models.iter().any(|model| model == name);
    for (name, model) in MODELS.iter().filter(|(name, _)| chosen(name)) {
        let began = Instant::now();
        let Ok(schedules) = catch_unwind(|| run(*model, &options)) else {
            eprintln!("models: {name} does not hold (SEED={} SCHEDULES={})", options.seed, options.schedules);
            eprintln!("models: its schedule again: make models ONLY={name} REPLAY=<the file above>");
            return ExitCode::FAILURE;
        };
        println!("models: {name} holds: {schedules} schedules in {:.1} s", began.elapsed().as_secs_f64());
    }
    ExitCode::SUCCESS
}

fn run(model: fn(), options: &Options) -> usize {
    match &options.replay {
        Some(file) => under(ReplayScheduler::new_from_file(file).expect("the schedule is a file"), model),
        None => {
            under(RandomScheduler::new_from_seed(options.seed, options.schedules), model)
                + under(PctScheduler::new_from_seed(options.seed, DEPTH, options.schedules), model)
        }
    }
}

fn under(scheduler: impl Scheduler + 'static, model: fn()) -> usize {
    let mut config = Config::new();
    config.failure_persistence = FailurePersistence::File(Some(schedules()));
    // Of the orderings of atomics only SeqCst is modelled; the one there is only counts.
    config.silence_warnings = true;
    Runner::new(scheduler, config).run(move || {
        tokio::time::begin();
        model();
    })
}

/// Where schedules that failed are written: beside the executable.
fn schedules() -> PathBuf {
    let executable = env::current_exe().expect("it is a file");
    let directory = executable.with_file_name("schedules");
    fs::create_dir_all(&directory).expect("the target directory can be written to");
    directory
}

fn options(mut arguments: impl Iterator<Item = String>) -> Result<Options, String> {
    let mut options = Options { seed: 1, schedules: 20_000, replay: None, models: Vec::new() };
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--seed" => options.seed = value()?.parse().map_err(|_| "a seed is a number")?,
            "--schedules" => options.schedules = value()?.parse().map_err(|_| "schedules are a number")?,
            "--replay" => options.replay = Some(value()?.into()),
            name if MODELS.iter().any(|(model, _)| *model == name) => options.models.push(argument),
            _ => {
                let names: Vec<&str> = MODELS.iter().map(|(name, _)| *name).collect();
                return Err(format!("there is no {argument}; the models are {}", names.join(", ")));
            }
        }
    }
    Ok(options)
}
