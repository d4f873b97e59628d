//! What the process says when it ends, executes another program, or is asked.

#![allow(unsafe_code, reason = "writes to a descriptor")]

use crate::state::{self, FORKED, LOOKED, State, Tally};
use crate::{counters, service, waiting};
use faultless_run::{FileReport, FillTimes, HandedBack, LeftAlone, Report, Totals};
use faultless_sys::raw;
use faultless_untrusted::output::reopen_log;
use faultless_untrusted::printable;
use std::io::{ErrorKind, Write};
use std::sync::atomic::Ordering;

/// Writes a report, where one is wanted.
pub(crate) fn write(reason: &'static str) {
    let Some(settings) = state::settings() else {
        return;
    };
    if !settings.stats && settings.stats_json.is_none() {
        return;
    }
    // A child that has done nothing of interest says nothing.
    if FORKED.load(Ordering::Relaxed) && !LOOKED.load(Ordering::Relaxed) && reason != "asked" {
        return;
    }
    let report = report(reason);
    // One write each, so that the reports of several processes do not mix.
    if settings.stats && (LOOKED.load(Ordering::Relaxed) || reason == "asked") {
        raw::write_stderr(report.to_string().as_bytes());
    }
    if let Some(path) = &settings.stats_json {
        let line = report.to_json() + "\n";
        let (device, inode) = settings.stats_file.unwrap_or_default();
        let file = reopen_log(path, device, inode);
        let written = file.and_then(|mut f| f.write_all(line.as_bytes()));
        // (In another root directory there is no such file, and nothing to be said about it.)
        if let Err(e) = written
            && e.kind() != ErrorKind::NotFound
        {
            state::say(&format!(
                "faultless: cannot write the report to {}: {e}\n",
                printable(&path)
            ));
        }
    }
}

fn report(reason: &'static str) -> Report {
    let program = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let state = state::lock();
    let mut report = Report {
        pid: raw::getpid(),
        program,
        reason: reason.to_owned(),
        backend: backend(&state),
        dry_run: state::settings().is_some_and(|s| s.dry_run),
        totals: totals(&state),
        files: files(&state),
        handed_back: tallies(state.handed_back.iter(), |&reason, t| HandedBack {
            reason: reason.to_owned(),
            mappings: t.mappings,
            bytes: t.bytes,
            longest_us: t.longest_ns as f64 / 1e3,
            example: t.example.clone(),
        }),
        left_alone: left_alone(&state),
        efaults: counters::efaults(),
        efaults_watched: counters::watched() || crate::trap::active(),
    };
    report
        .left_alone
        .sort_by_key(|l| std::cmp::Reverse(l.bytes));
    report
}

/// What serves misses in this process.
fn backend(state: &State) -> Option<String> {
    let of_stand_ins = state.pool.as_ref().map(|p| p.backend().to_string());
    let live = state.live.as_ref().is_some_and(Result::is_ok);
    let live = live.then(|| "live mappings".to_owned());
    let all: Vec<String> = of_stand_ins.into_iter().chain(live).collect();
    (!all.is_empty()).then(|| all.join("; "))
}

/// What stays the kernel's, and what does so as yet.
fn left_alone(state: &State) -> Vec<LeftAlone> {
    let mut left = tallies(state.left.iter(), |reason, t| LeftAlone {
        reason: reason.clone(),
        mappings: t.mappings,
        bytes: t.bytes,
        example: t.example.clone(),
    });
    if let Some(first) = state.waiting.first() {
        if !left.iter().any(|l| l.reason == waiting::ALONE) {
            left.push(LeftAlone {
                reason: waiting::ALONE.to_owned(),
                mappings: 0,
                bytes: 0,
                example: first.path.clone(),
            });
        }
        for l in left.iter_mut().filter(|l| l.reason == waiting::ALONE) {
            l.mappings += state.waiting.len() as u64;
            l.bytes += state.waiting.iter().map(|w| w.bytes() as u64).sum::<u64>();
        }
    }
    left
}

fn tallies<'a, K: 'a, R>(
    all: impl Iterator<Item = (&'a K, &'a Tally)>,
    make: impl Fn(&'a K, &'a Tally) -> R,
) -> Vec<R> {
    all.map(|(k, t)| make(k, t)).collect()
}

fn totals(state: &State) -> Totals {
    let mut totals = Totals {
        mappings: state.files.values().map(|f| f.mappings).sum(),
        mapped_bytes: state.files.values().map(|f| f.bytes).sum(),
        memory_tree_bytes: state::settings().map_or(0, |s| s.memory),
        ..Totals::default()
    };
    if let Some(pool) = &state.pool {
        let stats = pool.stats();
        let maps = &stats.maps;
        let us = |q| {
            maps.fill_latency
                .quantile(q)
                .unwrap_or_default()
                .as_secs_f64()
                * 1e6
        };
        totals.misses = maps.misses;
        totals.fills = maps.fills;
        totals.read_bytes = maps.bytes_read;
        totals.evictions = maps.evictions;
        totals.errors = maps.errors;
        totals.fill_us = FillTimes {
            p50: us(0.5),
            p99: us(0.99),
            max: us(1.0),
        };
        totals.used_bytes = stats.used.get();
        totals.peak_bytes = stats.peak.get();
        (totals.memory_bytes, totals.duplicated_bytes) = service::figures();
    }
    let standing = state.standing.values();
    let live = standing.filter(|e| e.served.live().is_some());
    totals.misses += live.map(|e| e.served.happened().misses).sum::<u64>();
    let past = state.files.values().map(|f| f.live_misses);
    totals.misses += past.sum::<u64>();
    totals
}

fn files(state: &State) -> Vec<FileReport> {
    let mut files: Vec<FileReport> = state
        .files
        .iter()
        .map(|(path, past)| {
            let mut file = FileReport {
                path: path.clone(),
                coherence: past.coherence.to_owned(),
                backend: match past.coherence {
                    "live" => "live",
                    _ => "stand-in",
                }
                .to_owned(),
                why: past.why.to_owned(),
                mappings: past.mappings,
                mapped_bytes: past.bytes,
                misses: past.misses,
                read_bytes: past.read,
                resident_bytes: 0,
                put_back: past.put_back,
            };
            for e in state.standing.values().filter(|e| *e.path == **path) {
                let happened = e.served.happened();
                file.misses += happened.misses;
                file.read_bytes += happened.read;
                file.resident_bytes += happened.resident;
                file.put_back += happened.put_back;
            }
            file
        })
        .collect();
    files.sort_by_key(|f| std::cmp::Reverse(f.mapped_bytes));
    files
}
