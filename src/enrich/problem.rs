//! What went wrong while a request was answered, folded to one entry per cause. It must not know
//! the words in which a client is told.

use std::{mem::discriminant, time::Duration};

use crate::cyberscan::Error;

/// Something the client has to be told beside what was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// A look-up failed; its observable is missing from the answer.
    Failed(Error),
    /// CyberScan could not be asked; the answer contains data that old.
    Stale {
        /// The greatest age.
        age: Duration,
    },
    /// There are more sightings than the tenant wants.
    LeftOut {
        /// How many were left out.
        count: usize,
    },
}

/// Problems in the order in which their causes first showed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// Adds `problem`: to the entry of the same cause, if there is one.
    pub fn add(&mut self, problem: Problem) {
        // For who reads it these are the same.
        let problem = match problem {
            Problem::Failed(Error::Limited { retry_after }) => {
                Problem::Failed(Error::Throttled { retry_after })
            }
            Problem::Failed(Error::TooLate { after }) => Problem::Failed(Error::TimedOut { after }),
            other => other,
        };
        for present in &mut self.0 {
            match (present, &problem) {
                (Problem::Stale { age }, Problem::Stale { age: other }) => {
                    *age = (*age).max(*other);
                    return;
                }
                (Problem::LeftOut { count }, Problem::LeftOut { count: other }) => {
                    *count += other;
                    return;
                }
                (
                    Problem::Failed(Error::Throttled { retry_after }),
                    Problem::Failed(Error::Throttled { retry_after: other }),
                ) => {
                    *retry_after = (*retry_after).max(*other);
                    return;
                }
                (Problem::Failed(present), Problem::Failed(other))
                    if discriminant(present) == discriminant(other) =>
                {
                    return;
                }
                _ => {}
            }
        }
        self.0.push(problem);
    }

    /// Adds all of `others`.
    pub fn join(&mut self, others: Self) {
        for problem in others.0 {
            self.add(problem);
        }
    }

    /// The entries.
    #[must_use]
    pub fn as_slice(&self) -> &[Problem] {
        &self.0
    }

    /// Whether a look-up failed.
    #[must_use]
    pub fn any_failed(&self) -> bool {
        self.0.iter().any(|problem| matches!(problem, Problem::Failed(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_of_one_cause_become_one_entry() {
        let throttled =
            |seconds| Problem::Failed(Error::Throttled { retry_after: Duration::from_secs(seconds) });
        let unreachable = |url: &str| Problem::Failed(Error::Unreachable { url: url.into() });
        let mut problems = Problems::default();
        for problem in [
            throttled(3),
            Problem::LeftOut { count: 2 },
            unreachable("a"),
            Problem::Failed(Error::Limited { retry_after: Duration::from_secs(7) }),
            unreachable("b"),
            Problem::LeftOut { count: 5 },
            Problem::Stale { age: Duration::from_secs(9) },
            Problem::Stale { age: Duration::from_secs(4) },
        ] {
            problems.add(problem);
        }
        let expected = [
            throttled(7),
            Problem::LeftOut { count: 7 },
            unreachable("a"),
            Problem::Stale { age: Duration::from_secs(9) },
        ];
        assert_eq!(problems.as_slice(), expected);
    }
}
