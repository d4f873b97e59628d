//! All designs on one workload, sweeps, and the verdict.

use crate::designs::{DESIGNS, TODAY};
use crate::run::{Outcome, simulate};
use crate::workload::{Error, Workload};
use serde::Serialize;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Differences that count for nothing, as a share.
const NOTHING: f64 = 0.05;

/// The schema of the JSON.
pub const SCHEMA: &str = "faultless.whatif/1";

/// All workloads under designs.
#[derive(Debug, Serialize)]
pub struct Matrix {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// What chance was seeded with.
    pub seed: u64,
    /// By workload, in the order of designs.
    pub outcomes: Vec<Outcome>,
}

/// What is changed from run to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Knob {
    /// Threads of the first group.
    Threads,
    /// Threads of the second group: the neighbours.
    Writers,
    /// Processors.
    Cores,
    /// Time of a read, in microseconds, whatever else is under way.
    IoLatency,
    /// A cost, by its name, in nanoseconds.
    Cost(String),
}

/// Values of a knob.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sweep {
    /// What is changed.
    pub knob: Knob,
    /// To what.
    pub values: Vec<u64>,
}

/// Values of a sweep, at most.
const VALUES_MAX: usize = 64;

impl std::str::FromStr for Sweep {
    type Err = String;

    /// `threads=1..512` (each the double of the one before), `cores=2,8,64`.
    fn from_str(text: &str) -> Result<Sweep, String> {
        let (knob, values) = text
            .split_once('=')
            .ok_or_else(|| format!("{text:?} is no sweep; write threads=1..512 or cores=2,8,64"))?;
        let mut costs = crate::costs::Costs::default();
        let knob = match knob {
            "threads" => Knob::Threads,
            "writers" => Knob::Writers,
            "cores" => Knob::Cores,
            "io-latency" => Knob::IoLatency,
            cost if costs.named(cost).is_some() => Knob::Cost(cost.to_owned()),
            other => {
                return Err(format!(
                    "there is no {other} to sweep; there are threads, writers, cores, io-latency and each cost (--costs lists them)"
                ));
            }
        };
        let number = |n: &str| {
            n.trim()
                .parse::<u64>()
                .map_err(|_| format!("{n:?} in {text:?} is no number"))
        };
        let values = match values.split_once("..") {
            Some((from, to)) => {
                let (from, to) = (number(from)?, number(to)?);
                if from == 0 || from > to {
                    return Err(format!("{text:?} goes from {from} to {to}"));
                }
                let mut values: Vec<u64> = std::iter::successors(Some(from), |v| v.checked_mul(2))
                    .take_while(|v| *v < to)
                    .collect();
                values.push(to);
                values
            }
            None => values.split(',').map(number).collect::<Result<_, _>>()?,
        };
        if values.is_empty() || values.len() > VALUES_MAX {
            return Err(format!(
                "{text:?} has {} values; up to {VALUES_MAX} will do",
                values.len()
            ));
        }
        Ok(Sweep { knob, values })
    }
}

impl Knob {
    /// For tables.
    pub fn name(&self) -> String {
        match self {
            Knob::Threads => "threads".to_owned(),
            Knob::Writers => "writers".to_owned(),
            Knob::Cores => "processors".to_owned(),
            Knob::IoLatency => "read, µs".to_owned(),
            Knob::Cost(name) => format!("{name}, ns"),
        }
    }

    /// The workload with this changed.
    ///
    /// # Errors
    ///
    /// When the workload has nothing that could be changed so.
    pub fn set(&self, w: &Workload, value: u64) -> Result<Workload, Error> {
        let mut changed = w.clone();
        let small = u32::try_from(value).unwrap_or(u32::MAX);
        match self {
            Knob::Threads | Knob::Writers if w.recorded.is_some() => {
                return Err(Error::Wrong {
                    name: w.name.clone(),
                    what:
                        "a recording has the threads that it has; sweep cores, io-latency or a cost"
                            .to_owned(),
                });
            }
            Knob::Threads | Knob::Writers => {
                let no = usize::from(*self == Knob::Writers);
                let group = changed.threads.get_mut(no).ok_or_else(|| Error::Wrong {
                    name: w.name.clone(),
                    what: "it has no second group of threads to be swept as writers".to_owned(),
                })?;
                if small == 0 && *self == Knob::Threads {
                    return Err(Error::Wrong {
                        name: w.name.clone(),
                        what: "threads=0: then there is nobody to be judged by".to_owned(),
                    });
                }
                group.count = small;
                if small == 0 {
                    changed.threads.remove(no);
                }
            }
            Knob::Cores => changed.cores = small,
            Knob::IoLatency => {
                changed.device.latency_us = vec![(1, value as f64)];
                changed.device.per_second = 0.0;
                changed.reads_anew = true;
            }
            Knob::Cost(name) => {
                if let Some(cost) = changed.costs.named(name) {
                    *cost = value;
                }
            }
        }
        changed.check()?;
        Ok(changed)
    }
}

/// A point of a sweep: all designs with one value.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    /// The value.
    pub value: u64,
    /// In the order of designs.
    pub outcomes: Vec<Outcome>,
}

/// All designs on one workload.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// The workload.
    pub workload: Workload,
    /// What chance was seeded with.
    pub seed: u64,
    /// What was recorded, of a trace.
    pub recorded: Option<Outcome>,
    /// In the order of designs.
    pub outcomes: Vec<Outcome>,
    /// What was swept.
    pub sweep: Option<Sweep>,
    /// Its points.
    pub points: Vec<Point>,
    /// In words.
    pub verdict: String,
}

/// What is run, one after the other or beside each other: that makes no difference to what comes out.
///
/// # Errors
///
/// The first run that could not be made.
pub fn run_all(
    jobs: &[(Workload, String)],
    seed: u64,
    done: impl Fn(usize) + Sync,
) -> Result<Vec<Outcome>, Error> {
    let next = AtomicUsize::new(0);
    let finished = AtomicUsize::new(0);
    let is_broken = AtomicBool::new(false);
    let slots: Vec<Mutex<Option<Result<Outcome, Error>>>> =
        jobs.iter().map(|_| Mutex::new(None)).collect();
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|s| {
        for _ in 0..workers.min(jobs.len()) {
            s.spawn(|| {
                // (What has been taken on is done: whatever is not comes after what is broken.)
                while !is_broken.load(Ordering::Relaxed) {
                    let no = next.fetch_add(1, Ordering::Relaxed);
                    let Some((workload, design)) = jobs.get(no) else {
                        break;
                    };
                    let run = std::panic::AssertUnwindSafe(|| simulate(workload, design, seed));
                    let outcome = std::panic::catch_unwind(run).unwrap_or_else(|panic| {
                        is_broken.store(true, Ordering::Relaxed);
                        let said = panic.downcast_ref::<String>().cloned();
                        let said = said.or(panic.downcast_ref::<&str>().map(|&s| s.to_owned()));
                        Err(Error::Broken {
                            workload: workload.name.clone(),
                            design: design.clone(),
                            seed,
                            what: said.unwrap_or_default(),
                        })
                    });
                    *slots[no].lock().expect("nobody panics with it") = Some(outcome);
                    done(finished.fetch_add(1, Ordering::Relaxed) + 1);
                }
            });
        }
    });
    slots
        .into_iter()
        .map_while(|s| s.into_inner().expect("nobody panics with it"))
        .collect()
}

/// Compares designs on a workload, and along a sweep if one is given.
///
/// # Errors
///
/// When the workload cannot be run.
pub fn compare(
    w: &Workload,
    chosen: &[String],
    sweep: Option<Sweep>,
    seed: u64,
    done: impl Fn(usize, usize) + Sync,
) -> Result<Comparison, Error> {
    let mut jobs: Vec<(Workload, String)> = chosen.iter().map(|d| (w.clone(), d.clone())).collect();
    for value in sweep.iter().flat_map(|s| &s.values) {
        let changed = match &sweep {
            Some(sweep) => sweep.knob.set(w, *value)?,
            None => continue,
        };
        jobs.extend(chosen.iter().map(|d| (changed.clone(), d.clone())));
    }
    let all = jobs.len();
    let mut outcomes = run_all(&jobs, seed, |n| done(n, all))?.into_iter();
    let first: Vec<Outcome> = outcomes.by_ref().take(chosen.len()).collect();
    let values = sweep.iter().flat_map(|s| s.values.clone());
    let points = values
        .map(|value| Point {
            value,
            outcomes: outcomes.by_ref().take(chosen.len()).collect(),
        })
        .collect();
    Ok(Comparison {
        schema: SCHEMA,
        workload: w.clone(),
        seed,
        recorded: crate::run::recorded(w),
        verdict: verdict(&first),
        outcomes: first,
        sweep,
        points,
    })
}

/// Rounds a second of the first group: what a workload is for.
pub fn throughput(o: &Outcome) -> f64 {
    o.groups.first().map_or(0.0, |g| g.per_second)
}

/// The 99th percentile of the first group's rounds, in microseconds.
pub fn tail(o: &Outcome) -> f64 {
    o.groups.first().map_or(0.0, |g| g.round_us.p99)
}

/// Which design serves the workload best, by how much, and what that costs others.
pub fn verdict(outcomes: &[Outcome]) -> String {
    let Some(best) = outcomes.iter().map(throughput).max_by(f64::total_cmp) else {
        return "nothing was run".to_owned();
    };
    // Of those that are as fast, the one with the shortest tail; of those that are alike in that as well, the oldest.
    let fast = outcomes
        .iter()
        .filter(|o| throughput(o) >= best * (1.0 - NOTHING));
    let Some(shortest) = fast.clone().map(tail).min_by(f64::total_cmp) else {
        return "nothing was run".to_owned();
    };
    let Some(winner) = fast.clone().find(|o| tail(o) <= shortest * (1.0 + NOTHING)) else {
        return "nothing was run".to_owned();
    };
    let alike: Vec<&str> = fast
        .filter(|o| o.design != winner.design && tail(o) <= shortest * (1.0 + NOTHING))
        .map(|o| o.design.as_str())
        .collect();
    let first = winner.groups.first().map_or("", |g| g.name.as_str());
    let Some(today) = outcomes.iter().find(|o| o.design == TODAY) else {
        return format!(
            "{} serves {first} best: {:.0} rounds a second, 99 % of them within {:.0} µs.",
            winner.design,
            throughput(winner),
            tail(winner)
        );
    };
    if throughput(winner) == 0.0 {
        return format!(
            "Under no design does a round of {first} end in the time that was simulated: simulate more seconds."
        );
    }
    if throughput(today) == 0.0 {
        return format!(
            "{} serves {first} best: {:.2} rounds a second, 99 % of them within {:.0} µs; with today's kernel no round ended.",
            winner.design,
            throughput(winner),
            tail(winner)
        );
    }
    let gain = throughput(winner) / throughput(today);
    let shorter = tail(today) / tail(winner).max(1e-9);
    if gain <= 1.0 + NOTHING && shorter <= 1.0 + NOTHING {
        return format!(
            "No design serves {first} noticeably better than today's kernel: {:.0} rounds a second, 99 % of them within {:.0} µs.",
            throughput(today),
            tail(today)
        );
    }
    let mut text = format!(
        "{} serves {first} best: {:.0} rounds a second, {gain:.2} x today's kernel, 99 % of them within {:.0} µs (today {:.0} µs).",
        winner.design,
        throughput(winner),
        tail(winner),
        tail(today)
    );
    if !alike.is_empty() {
        text.push_str(&format!(" As good: {}.", alike.join(", ")));
    }
    let mut costs = Vec::new();
    for (now, then) in winner.groups.iter().zip(&today.groups).skip(1) {
        if now.name != then.name || then.per_second == 0.0 {
            continue;
        }
        let rate = now.per_second / then.per_second;
        let (p99, was) = (now.round_us.p99, then.round_us.p99);
        let (max, was_max) = (now.round_us.max, then.round_us.max);
        // The longest of a run is as chance has it: it counts if it is far longer, and long.
        let is_longer = max > 2.0 * was_max && max > 1_000.0;
        if rate < 1.0 - NOTHING || p99 > was * (1.0 + 2.0 * NOTHING) || is_longer {
            costs.push(format!(
                "{} {rate:.2} x the rounds, p99 {:.2} ms instead of {:.2}, at most {:.1} ms instead of {:.1}",
                now.name,
                p99 / 1e3,
                was / 1e3,
                max / 1e3,
                was_max / 1e3
            ));
        }
    }
    if costs.is_empty() {
        text.push_str(" It costs the other threads nothing that counts.");
    } else {
        text.push_str(&format!(" What it costs others: {}.", costs.join("; ")));
    }
    text
}

/// The designs of these names; all of them for `all`.
///
/// # Errors
///
/// When there is no such design.
pub fn designs(names: &[String]) -> Result<Vec<String>, Error> {
    let all: Vec<String> = DESIGNS.iter().map(|d| d.id.to_owned()).collect();
    if names.is_empty() || names.iter().any(|n| n == "all") {
        return Ok(all);
    }
    for name in names {
        if !all.contains(name) {
            return Err(Error::Design(name.clone(), all.join(", ")));
        }
    }
    // In their order, each once.
    Ok(all.into_iter().filter(|d| names.contains(d)).collect())
}
