//! The model against this machine: its costs measured, its predictions beside what is measured.

use super::{rate, say, time};
use crate::bench::{size, usage_error};
use crate::output::{right_align, table};
use anyhow::Context;
use faultless::Bytes;
use faultless_bench::contender::Kind;
use faultless_bench::micro::{Micro, measure};
use faultless_bench::plan::{Plan, Report};
use faultless_bench::scenario::Scenario;
use faultless_whatif::Device;
use faultless_whatif::compare::{run_all, tail, throughput};
use faultless_whatif::costs::Costs;
use faultless_whatif::workload::{Machine, Workload, built_in};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};

/// Scenarios that are predicted: each is a built-in workload of that name.
const SCENARIOS: [(&str, Scenario); 5] = [
    ("quiet", Scenario::Quiet),
    ("churn", Scenario::Churn),
    ("smaps", Scenario::Smaps),
    ("fork", Scenario::Fork),
    ("bigfree", Scenario::Bigfree),
];
/// Designs that exist here, and who they are in the benchmark.
const CONTENDERS: [(&str, Kind); 3] = [
    ("vma-then-mmap", Kind::Mmap),
    ("uffd-monitor", Kind::UffdMonitor),
    ("faultless", Kind::Faultless),
];

#[derive(Debug, clap::Args)]
pub(super) struct Calibrate {
    #[command(flatten)]
    data: Data,
}

#[derive(Debug, clap::Args)]
struct Data {
    /// Test data: made if it is not there, and kept.
    #[arg(long, default_value = "faultless-bench.data")]
    file: PathBuf,
    /// Its size.
    #[arg(long, default_value = "4G", value_parser = size)]
    size: Bytes,
}

#[derive(Debug, clap::Args)]
pub(super) struct Validate {
    #[command(flatten)]
    data: Data,
    /// A machine that was calibrated before; otherwise this one is calibrated first.
    #[arg(long, value_name = "FILE")]
    machine: Option<PathBuf>,
    /// Reader threads.
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64,256")]
    threads: Vec<u32>,
    /// Only these scenarios: quiet, churn, smaps, fork, bigfree.
    #[arg(long, value_delimiter = ',')]
    scenario: Vec<String>,
    /// Length of a measurement, in seconds.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Measurements of each contender in each setting.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn spinner() -> Option<indicatif::ProgressBar> {
    std::io::stderr()
        .is_terminal()
        .then(indicatif::ProgressBar::new_spinner)
}

/// A machine from its file.
pub(super) fn machine(path: &Path) -> anyhow::Result<Machine> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the machine {}", path.display()))?;
    Machine::parse(&text).with_context(|| format!("{} is no machine", path.display()))
}

pub(super) fn calibrate(args: &Calibrate) -> anyhow::Result<()> {
    let machine = calibrated(&args.data)?;
    let text = machine
        .to_text()
        .context("the machine has no form as text")?;
    say(&format!(
        "# Measured by faultless whatif calibrate on Linux {}.\n{text}",
        faultless_observe::kernel_release()
    ))
}

fn calibrated(data: &Data) -> anyhow::Result<Machine> {
    if let Err(e) = faultless_bench::data::check_size(data.size) {
        usage_error(&format!("--size: {e}"));
    }
    let bar = spinner();
    faultless_bench::data::prepare(&data.file, data.size, |_, _| {})?;
    let measured = measure(&data.file, data.size.get(), |what| {
        if let Some(bar) = &bar {
            bar.set_message(format!("measuring {what}"));
            bar.tick();
        }
    })?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    Ok(machine_of(&measured))
}

fn machine_of(measured: &Micro) -> Machine {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let mut costs = Costs::default();
    for (name, ns) in &measured.costs {
        if let Some(cost) = costs.named(name) {
            *cost = *ns;
        }
    }
    // kernel/sched/fair.c: 0.7 ms x (1 + log2 of the processors, at most 8).
    costs.slice = 700_000 * u64::from(1 + cores.min(8).ilog2());
    Machine {
        cores,
        preempt: is_preempted(),
        device: Device {
            latency_us: measured.latency_us.clone(),
            scatter: measured.scatter.clamp(0.0, 3.0),
            ..Device::default()
        },
        costs,
    }
}

/// Whether the kernel itself is preempted here: what the build says, or what was chosen at boot.
fn is_preempted() -> bool {
    let chosen = std::fs::read_to_string("/sys/kernel/debug/sched/preempt").unwrap_or_default();
    if !chosen.is_empty() {
        return chosen.contains("(full)");
    }
    let build = std::fs::read_to_string("/proc/sys/kernel/version").unwrap_or_default();
    build
        .split_whitespace()
        .any(|w| w == "PREEMPT" || w == "PREEMPT_RT")
}

/// A setting: what was measured, and what was predicted.
#[derive(Debug, Serialize)]
struct Setting {
    scenario: String,
    design: String,
    threads: u32,
    measured_per_s: f64,
    /// Largest less smallest of the rounds, by the median.
    spread: f64,
    predicted_per_s: f64,
    measured_p99_us: f64,
    predicted_p99_us: f64,
}

fn error(predicted: f64, measured: f64) -> f64 {
    (predicted / measured.max(1e-9) - 1.0).abs()
}

#[derive(Debug, Serialize)]
struct Validation {
    machine: Machine,
    settings: Vec<Setting>,
    median_error_reads: f64,
    median_error_p99: f64,
    /// Pairs of contenders in a scenario whose medians differ by more than their spread; and those of them whose order was
    /// predicted.
    pairs: usize,
    right_pairs: usize,
}

pub(super) fn validate(args: Validate) -> anyhow::Result<()> {
    let chosen: Vec<(&str, Scenario)> = SCENARIOS
        .into_iter()
        .filter(|s| args.scenario.is_empty() || args.scenario.iter().any(|n| n == s.0))
        .collect();
    if let Some(wrong) = args
        .scenario
        .iter()
        .find(|n| !SCENARIOS.iter().any(|s| s.0 == **n))
    {
        usage_error(&format!(
            "there is no scenario {wrong} to be predicted; there are quiet, churn, smaps, fork, bigfree"
        ));
    }
    if args.threads.is_empty() || args.threads.iter().any(|n| !(1..=1024).contains(n)) {
        usage_error("--threads must be 1 to 1024, separated by commas");
    }
    if !(0.05..=600.0).contains(&args.seconds) || !(1..=100).contains(&args.rounds) {
        usage_error("--seconds must be 0.05 to 600, and --rounds 1 to 100");
    }
    let machine = match &args.machine {
        Some(path) => machine(path)?,
        None => calibrated(&args.data)?,
    };
    let bar = spinner();
    let mut measured: Vec<(u32, Vec<Report>)> = Vec::new();
    for &threads in &args.threads {
        let mut rounds = Vec::new();
        for round in 0..args.rounds {
            if let Some(bar) = &bar {
                bar.set_message(format!("measuring {threads} threads, round {}", round + 1));
                bar.tick();
            }
            let plan = Plan {
                scenarios: chosen.iter().map(|s| s.1).collect(),
                contenders: CONTENDERS.iter().map(|c| c.1).collect(),
                threads: Some(threads as usize),
                seconds: args.seconds,
                rounds: 1,
                file: args.data.file.clone(),
                size: args.data.size,
                memory: Bytes::gib(2),
                storage_delay: None,
            };
            let report = plan.run(&mut |_| {
                if let Some(bar) = &bar {
                    bar.tick();
                }
            })?;
            let wrong = report.wrong_bytes();
            anyhow::ensure!(wrong == 0, "{wrong} bytes were wrong");
            rounds.push(report);
        }
        measured.push((threads, rounds));
    }
    if let Some(bar) = &bar {
        bar.set_message("predicting");
    }
    let mut jobs: Vec<(Workload, String)> = Vec::new();
    let mut settings = Vec::new();
    for (threads, rounds) in &measured {
        for (name, scenario) in &chosen {
            for (design, kind) in CONTENDERS {
                let mut rates = Vec::new();
                let mut tails = Vec::new();
                let rows = rounds.iter().flat_map(|r| &r.rows);
                for row in rows.filter(|r| r.scenario == *scenario && r.contender == kind) {
                    rates.push(row.reads_per_s);
                    tails.push(row.p99_us);
                }
                if rates.is_empty() {
                    continue;
                }
                let mut workload = built_in(name).context("a built-in workload")?.on(&machine);
                workload.threads[0].count = *threads;
                jobs.push((workload, design.to_owned()));
                let per_s = median(&mut rates);
                settings.push(Setting {
                    scenario: (*name).to_owned(),
                    design: design.to_owned(),
                    threads: *threads,
                    measured_per_s: per_s,
                    spread: (rates[rates.len() - 1] - rates[0]) / per_s.max(1e-9),
                    predicted_per_s: 0.0,
                    measured_p99_us: median(&mut tails),
                    predicted_p99_us: 0.0,
                });
            }
        }
    }
    for (setting, outcome) in settings.iter_mut().zip(run_all(&jobs, 1, |_| {})?) {
        setting.predicted_per_s = throughput(&outcome);
        setting.predicted_p99_us = tail(&outcome);
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let (pairs, right_pairs) = order(&settings);
    let errors = |of: fn(&Setting) -> f64| median(&mut settings.iter().map(of).collect::<Vec<_>>());
    let validation = Validation {
        median_error_reads: errors(|s| error(s.predicted_per_s, s.measured_per_s)),
        median_error_p99: errors(|s| error(s.predicted_p99_us, s.measured_p99_us)),
        machine,
        settings,
        pairs,
        right_pairs,
    };
    if args.json {
        let mut text = serde_json::to_string_pretty(&validation)?;
        text.push('\n');
        return say(&text);
    }
    say(&tables(&validation))
}

/// The middle one; they are in order afterwards.
fn median(all: &mut [f64]) -> f64 {
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(0.0)
}

fn order(settings: &[Setting]) -> (usize, usize) {
    let (mut pairs, mut right) = (0, 0);
    for (i, a) in settings.iter().enumerate() {
        for b in &settings[i + 1..] {
            if a.scenario != b.scenario || a.threads != b.threads {
                continue;
            }
            let spread = a.spread.max(b.spread);
            let larger = a.measured_per_s.max(b.measured_per_s);
            if (a.measured_per_s - b.measured_per_s).abs() <= spread * larger {
                continue;
            }
            pairs += 1;
            let same =
                (a.measured_per_s > b.measured_per_s) == (a.predicted_per_s > b.predicted_per_s);
            right += usize::from(same);
        }
    }
    (pairs, right)
}

fn tables(v: &Validation) -> String {
    let mut t = table(&[
        "Scenario",
        "design",
        "threads",
        "measured/s",
        "spread",
        "predicted/s",
        "error",
        "p99",
        "predicted",
        "error",
    ]);
    let percent = |e: f64| format!("{:.0} %", 100.0 * e);
    for s in &v.settings {
        t.add_row([
            s.scenario.clone(),
            s.design.clone(),
            s.threads.to_string(),
            rate(s.measured_per_s),
            percent(s.spread),
            rate(s.predicted_per_s),
            percent(error(s.predicted_per_s, s.measured_per_s)),
            time(s.measured_p99_us),
            time(s.predicted_p99_us),
            percent(error(s.predicted_p99_us, s.measured_p99_us)),
        ]);
    }
    right_align(&mut t, 2);
    let mut text = format!("{t}\n\n");
    let _ = writeln!(
        text,
        "Median error: reads/s {}, p99 {}. Of {} pairs of contenders that differ by more than their spread, {} are in the right order.",
        percent(v.median_error_reads),
        percent(v.median_error_p99),
        v.pairs,
        v.right_pairs
    );
    text
}
