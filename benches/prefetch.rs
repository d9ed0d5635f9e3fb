//! What the worker brings and what it costs, in virtual time: `make bench-prefetch`. docs/benchmarks.md keeps the
//! outcome.

#![expect(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a bench: it prints, and ends at the first thing that is not as it should be"
)]

mod simulation;

use std::{fmt::Write, time::Duration};

use simulation::{LIFE, Outcome, REFRESH_AHEAD, bursts, scan, zipf};

const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/benchmarks.md");
/// Addresses, skew, requests per second.
const TRACE: (u32, f64, f64) = (10_000, 0.9, 20.0);
/// Lives, the first of which is not counted.
const LIVES: u32 = 7;

fn main() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let mut text = String::from(
        "| trace | worker | asked | wait for CyberScan | older than a life | calls | fetched ahead | served after it | unused |\n|---|---|---|---|---|---|---|---|---|\n",
    );
    let mut changes = String::new();
    for (name, revalidate) in [("Zipf, no stale-while-revalidate", Duration::ZERO), ("Zipf, defaults", LIFE)]
    {
        let without = runtime.block_on(zipf(false, revalidate, TRACE, LIVES));
        let with = runtime.block_on(zipf(true, revalidate, TRACE, LIVES));
        row(&mut text, name, "no", without);
        row(&mut text, name, "yes", with);
        let change = |of: fn(&Outcome) -> u64| 100.0 * (of(&with) as f64 / of(&without).max(1) as f64 - 1.0);
        let _ = writeln!(
            changes,
            "- {name}: calls {:+.1} %, waits {:+.1} %, answers older than a life {:+.1} %.",
            change(|outcome| outcome.calls),
            change(|outcome| outcome.waited),
            change(|outcome| outcome.old)
        );
    }
    for (ahead, what) in [(REFRESH_AHEAD, "the default"), (0.0, "none")] {
        let _ = writeln!(
            changes,
            "- Who knew every address's true rate could, with a tenth more calls, save {:.1} % of the waits of a relay \
             whose readers renew in the last {ahead} of a life ({what}).",
            100.0 * optimum(ahead)
        );
    }
    let _ = writeln!(changes);
    for worker in [false, true] {
        let outcome = runtime.block_on(bursts(worker, 100));
        row(&mut text, "investigations, second step", if worker { "yes" } else { "no" }, outcome);
        let _ = writeln!(
            changes,
            "- Investigations {} worker: {:.1} % of the second step's observables are answered without waiting.",
            if worker { "with" } else { "without" },
            100.0 * (1.0 - outcome.waited as f64 / outcome.asked as f64)
        );
    }
    row(&mut text, "100,000 observables, each once", "yes", runtime.block_on(scan(100_000)));
    let text = format!("{text}\n{changes}");
    println!("{text}");
    let document = std::fs::read_to_string(DOCUMENT).unwrap();
    let (before, rest) = document.split_once("<!-- prefetch -->").unwrap();
    let (_, after) = rest.split_once("<!-- /prefetch -->").unwrap();
    std::fs::write(DOCUMENT, format!("{before}<!-- prefetch -->\n{text}<!-- /prefetch -->{after}")).unwrap();
}

fn row(text: &mut String, name: &str, worker: &str, outcome: Outcome) {
    let Outcome { asked, waited, old, calls, refreshed, useful, wasted } = outcome;
    let share = 100.0 * waited as f64 / asked as f64;
    let _ = writeln!(
        text,
        "| {name} | {worker} | {asked} | {waited} ({share:.1} %) | {old} | {calls} | {refreshed} | {useful} | {wasted} |"
    );
}

/// The share of waits that renewing some addresses at the very end of each life can save for a tenth more
/// calls, if their rates are known: those that save most per call first.
fn optimum(ahead: f64) -> f64 {
    let (keys, skew, rate) = TRACE;
    let weights: Vec<f64> = (1..=keys).map(|rank| f64::from(rank).powf(-skew)).collect();
    let total: f64 = weights.iter().sum();
    let mut addresses: Vec<(f64, f64)> = weights
        .iter()
        .map(|weight| {
            let reads = rate * LIFE.as_secs_f64() * weight / total;
            let missed = (-reads * ahead).exp();
            let first = (1.0 - missed) / reads - ahead * missed;
            let cycle = (1.0 - missed) * (1.0 - ahead) + first + missed * (1.0 + 1.0 / reads);
            (1.0 / cycle, missed / cycle)
        })
        .collect();
    let (calls, waits) = addresses.iter().fold((0.0, 0.0), |(c, w), (call, wait)| (c + call, w + wait));
    let price = |(calls, waits): &(f64, f64)| (1.0 - calls) / waits.max(1e-9);
    addresses.sort_by(|a, b| price(a).total_cmp(&price(b)));
    let (mut spent, mut saved) = (0.0, 0.0);
    for (call, wait) in addresses {
        if spent + 1.0 - call > 0.1 * calls {
            break;
        }
        (spent, saved) = (spent + 1.0 - call, saved + wait);
    }
    saved / waits
}
