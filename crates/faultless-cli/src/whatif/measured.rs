//! The model against this machine: its costs measured, its predictions beside what is measured.

use super::{rate, say, time};
use crate::bench::{Bar, size, unique, usage_error};
use crate::output::{self, right_align, table};
use anyhow::Context;
use faultless::ByteSize;
use faultless_bench::contender::{Kind, check_direct};
use faultless_bench::data::{is_cold, prepare, warm};
use faultless_bench::micro::{Micro, Replaced, measure};
use faultless_bench::order::orders;
use faultless_bench::plan::{Plan, Progress};
use faultless_bench::scenario::Scenario;
use faultless_untrusted::output::Readers;
use faultless_untrusted::printable;
use faultless_whatif::Device;
use faultless_whatif::compare::{run_all, tail, throughput};
use faultless_whatif::costs::Costs;
use faultless_whatif::workload::{Machine, Workload, built_in};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
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

/// Monitor threads of the userfaultfd, measured and predicted.
const MONITORS: usize = 16;
/// A measurement is made so often, at most, if the device has become slow meanwhile.
const ATTEMPTS: u32 = 2;

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
    size: ByteSize,
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
    /// Measurements of each contender in each setting; with a multiple of 3 each contender is first equally often.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// Write what is measured to this file as well, after each measurement (what is in it is replaced): --from predicts it, should this be interrupted.
    #[arg(long, value_name = "FILE", conflicts_with = "from")]
    keep: Option<PathBuf>,
    /// Measure nothing: predict again what was measured before, of which this is the JSON (or what --keep wrote).
    #[arg(long, value_name = "FILE", conflicts_with_all = ["threads", "scenario", "rounds", "seconds", "file", "size"])]
    from: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// A machine from its file.
pub(super) fn machine(path: &Path) -> anyhow::Result<Machine> {
    let text = super::text_of(path)?;
    Machine::parse(&text).with_context(|| format!("{} is no machine", printable(&path)))
}

pub(super) fn calibrate(args: &Calibrate) -> anyhow::Result<()> {
    let mut bar = Bar::default();
    ready(&args.data, &mut bar)?;
    let measured = micro(&args.data, 0, 1, &mut bar)?;
    bar.clear();
    let machine = machine_of(&measured);
    let text = machine
        .to_text()
        .context("the machine has no form as text")?;
    let defaults: Vec<String> = (machine.costs.explained().iter())
        .filter(|cost| !measured.costs.contains_key(cost.0))
        .map(|cost| cost.0.replace('_', "-"))
        .collect();
    say(&format!(
        "# Measured by faultless whatif calibrate on Linux {}; but these costs, which are typical ones (faultless whatif --costs):\n\
         # {}.\n{}{text}",
        faultless_observe::kernel_release(),
        defaults.join(", "),
        comment(&replaced([&measured]))
    ))
}

/// As a comment at the beginning of a machine's file; nothing, where nothing was replaced.
fn comment(replaced: &[String]) -> String {
    if replaced.is_empty() {
        return String::new();
    }
    let lines: String = replaced.iter().map(|r| format!("#   {r}\n")).collect();
    format!("# {REPLACED}\n{lines}")
}

const REPLACED: &str = "These figures came out as what they cannot be, and a guess stands in their place; calibrate again:";

/// What calibrations had to replace, each figure in a line.
fn replaced<'a>(all: impl IntoIterator<Item = &'a Micro>) -> Vec<String> {
    let mut figures: BTreeMap<&str, Vec<&Replaced>> = BTreeMap::new();
    let mut calibrations = 0;
    for micro in all {
        calibrations += 1;
        for r in &micro.replaced {
            figures.entry(&r.what).or_default().push(r);
        }
    }
    figures
        .into_iter()
        .map(|(what, times)| {
            let one = times[0];
            let often = match calibrations {
                1 => String::new(),
                of => format!(" in {} of {of} calibrations, for instance", times.len()),
            };
            format!(
                "{}{often}: {:.1} {unit}; {:.1} {unit} is used",
                what.replace('_', "-"),
                one.came_out,
                one.used,
                unit = one.unit
            )
        })
        .collect()
}

/// The data is there, and has been read once.
fn ready(data: &Data, bar: &mut Bar) -> anyhow::Result<()> {
    if let Err(e) = faultless_bench::data::check_size(data.size) {
        usage_error(&format!("--size: {e}"));
    }
    prepare(&data.file, data.size, |n, of| {
        bar.show(Progress::Data(n, of))
    })?;
    check_direct(&data.file)?;
    if is_cold(&data.file, data.size)? {
        warm_up(data, bar)?;
    }
    Ok(())
}

/// What gives at once what it has just given, even after all of it has been read, has a cache of its own: that is no reason to read it
/// again.
fn is_cold_by_nature(data: &Data, bar: &mut Bar) -> anyhow::Result<bool> {
    let is_so = is_cold(&data.file, data.size)?;
    if is_so {
        bar.show(Progress::Note(format!(
            "{} is read faster the second time, however often all of it is read: its device has a cache that is smaller",
            printable(&data.file)
        )));
    }
    Ok(is_so)
}

fn warm_up(data: &Data, bar: &mut Bar) -> anyhow::Result<()> {
    warm(&data.file, data.size, |n, of| {
        bar.show(Progress::Warm(n, of))
    })
}

/// Measures the costs, as step `n` of `of`.
fn micro(data: &Data, n: usize, of: usize, bar: &mut Bar) -> anyhow::Result<Micro> {
    measure(&data.file, data.size.get(), |what| {
        bar.show(Progress::Cell(n, of, what))
    })
}

/// Of several calibrations, the median of each figure.
fn middle(all: &[Micro]) -> Micro {
    let of =
        |figure: &dyn Fn(&Micro) -> f64| median(&mut all.iter().map(figure).collect::<Vec<_>>());
    let first = &all[0];
    Micro {
        costs: first
            .costs
            .keys()
            .map(|&name| {
                (
                    name,
                    of(&|m| m.costs.get(name).map_or(0.0, |&ns| ns as f64)) as u64,
                )
            })
            .collect(),
        latency_us: (0..first.latency_us.len())
            .map(|i| (first.latency_us[i].0, of(&|m| m.latency_us[i].1)))
            .collect(),
        spread: (0..first.spread.len())
            .map(|i| {
                let shares = 0..first.spread[i].1.len();
                let of = |share: usize| {
                    let first = first.spread[i].1[share].0;
                    (first, of(&|m| m.spread[i].1[share].1))
                };
                (first.spread[i].0, shares.map(of).collect())
            })
            .collect(),
        replaced: all.iter().flat_map(|m| m.replaced.clone()).collect(),
    }
}

fn machine_of(measured: &Micro) -> Machine {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let mut costs = Costs::default();
    for (name, ns) in &measured.costs {
        if let Some(cost) = costs.named(name) {
            *cost = *ns;
        }
    }
    Machine {
        cores,
        preempt: is_preempted(),
        device: Device {
            latency_us: measured.latency_us.clone(),
            spread: measured.spread.clone(),
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
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
#[serde(default)]
struct Setting {
    scenario: String,
    design: String,
    threads: u32,
    /// Its place among the machines.
    machine: usize,
    measured_per_s: f64,
    /// Largest less smallest of the rounds, by the median.
    spread: f64,
    predicted_per_s: f64,
    measured_p99_us: f64,
    predicted_p99_us: f64,
    /// Measurements that were made again, because the device had become slow.
    repeated: u32,
    /// In so many rounds it was measured before the other contenders.
    first_in_rounds: u32,
    /// Each round's reads a second, and 99th percentile in microseconds.
    rates: Vec<f64>,
    tails: Vec<f64>,
}

impl Setting {
    fn new(scenario: &str, design: &str, threads: u32) -> Setting {
        Setting {
            scenario: scenario.to_owned(),
            design: design.to_owned(),
            threads,
            ..Setting::default()
        }
    }

    /// Reads a second, and the 99th percentile in microseconds, of one round: each begins with other pages.
    fn measure(&self, args: &Validate, round: usize) -> anyhow::Result<(f64, f64)> {
        let (_, scenario) = SCENARIOS
            .into_iter()
            .find(|s| s.0 == self.scenario)
            .context("there is no such scenario")?;
        let (_, kind) = CONTENDERS
            .into_iter()
            .find(|c| c.0 == self.design)
            .context("there is no such contender")?;
        let plan = Plan {
            scenarios: vec![scenario],
            contenders: vec![kind],
            threads: Some(self.threads as usize),
            depth: 1,
            seconds: args.seconds,
            rounds: Some(1),
            // That would cost the contenders that take the lock most.
            count_locks: false,
            file: args.data.file.clone(),
            size: args.data.size,
            // (That is seen to between measurements.)
            warm: false,
            memory: ByteSize::gib(2),
            monitors: Some(MONITORS),
            part: Some((round, args.rounds as usize)),
            storage_delay: None,
        };
        let report = plan.run(&mut |_| {})?;
        let wrong = report.wrong_bytes();
        anyhow::ensure!(wrong == 0, "{wrong} bytes were wrong");
        let row = report.rows.first().with_context(|| {
            let why = report.left_out.iter().chain(&report.failed).next();
            why.map_or("nothing was measured", String::as_str)
                .to_owned()
        })?;
        Ok((row.reads_per_s, row.p99_us))
    }
}

fn error(predicted: f64, measured: f64) -> f64 {
    (predicted / measured.max(1e-9) - 1.0).abs()
}

#[derive(Debug, Serialize)]
struct Validation {
    schema: &'static str,
    machines: Vec<Machine>,
    settings: Vec<Setting>,
    /// Costs that came out of calibrations as what they cannot be.
    replaced: Vec<String>,
    median_error_reads: f64,
    median_error_p99: f64,
    /// Measurements that were made again, because the device had become slow.
    repeated: u32,
    /// Pairs of contenders in a scenario whose medians differ by more than their spread; and those of them whose order was
    /// predicted.
    pairs: usize,
    right_pairs: usize,
    /// The same, of today's kernel and Faultless alone.
    pairs_without_monitor: usize,
    right_pairs_without_monitor: usize,
}

pub(super) fn validate(mut args: Validate) -> anyhow::Result<()> {
    unique(&mut args.threads);
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
    if let Some(path) = &args.from {
        return again(path, args.machine.as_deref(), args.json);
    }
    let given = args.machine.as_deref().map(machine).transpose()?;
    if let Some(machine) = &given {
        check(machine).context("--machine")?;
    }
    if let Some(path) = &args.keep {
        keep(path, &before(given.as_ref(), &[], &[]))?;
    }
    let mut bar = Bar::default();
    ready(&args.data, &mut bar)?;
    let has_cache = is_cold_by_nature(&args.data, &mut bar)?;
    let mut settings: Vec<Setting> = Vec::new();
    for &threads in &args.threads {
        for (name, _) in &chosen {
            for (design, _) in CONTENDERS {
                settings.push(Setting::new(name, design, threads));
            }
        }
    }
    // By place: threads and scenario.
    let mut calibrations: Vec<Vec<Micro>> = Vec::new();
    let steps = args.rounds as usize * settings.len();
    let rounds = args.rounds as usize;
    // By place and round: the contenders take turns, so that each is first equally often.
    let turns: Vec<Vec<Vec<usize>>> = (0..settings.len() / CONTENDERS.len())
        .map(|place| orders(CONTENDERS.len(), rounds, place as u64))
        .collect();
    let whose_turn = |place: usize, round: usize, turn: usize| turns[place][round][turn];
    for round in 0..rounds {
        for n in 0..settings.len() {
            let step = round * settings.len() + n;
            let (place, turn) = (n / CONTENDERS.len(), n % CONTENDERS.len());
            let i = place * CONTENDERS.len() + whose_turn(place, round, turn);
            // The machine is not the same from minute to minute: it is calibrated beside what it is to predict.
            if given.is_none() && turn == 0 {
                let measured = micro(&args.data, step, steps, &mut bar)?;
                check(&machine_of(&measured))?;
                match calibrations.get_mut(place) {
                    Some(all) => all.push(measured),
                    None => calibrations.push(vec![measured]),
                }
            }
            let setting = &mut settings[i];
            setting.first_in_rounds += u32::from(turn == 0);
            let what = format!(
                "{}, {} threads, {}, round {} of {}",
                setting.scenario,
                setting.threads,
                setting.design,
                round + 1,
                args.rounds
            );
            bar.show(Progress::Cell(step, steps, &what));
            for attempt in 1..=ATTEMPTS {
                let (rate, p99) = setting.measure(&args, round).context(what.clone())?;
                // The device gave out meanwhile: that says nothing of designs.
                if attempt < ATTEMPTS && !has_cache && is_cold(&args.data.file, args.data.size)? {
                    setting.repeated += 1;
                    warm_up(&args.data, &mut bar)?;
                    bar.show(Progress::Cell(step, steps, &what));
                    continue;
                }
                setting.rates.push(rate);
                setting.tails.push(p99);
                break;
            }
            if let Some(path) = &args.keep {
                keep(path, &before(given.as_ref(), &calibrations, &settings))?;
            }
        }
    }
    bar.clear();
    predict(before(given.as_ref(), &calibrations, &settings), args.json)
}

/// Whether anything can be run on a machine.
fn check(machine: &Machine) -> anyhow::Result<()> {
    let workload = built_in("quiet").context("a built-in workload")?;
    Ok(workload.on(machine).check()?)
}

fn keep(path: &Path, before: &Before) -> anyhow::Result<()> {
    let (page, mut file) = output::create(path, Readers::AsUsual)?;
    let written = file.write_all(&serde_json::to_vec_pretty(before)?);
    Ok(page.finish(written.map(|()| file))?)
}

/// What was measured, and on what.
#[derive(Debug, Serialize, Deserialize)]
struct Before {
    /// The machine as it was when it was measured; each setting has a place here.
    machines: Vec<Machine>,
    settings: Vec<Setting>,
    /// Costs that came out of calibrations as what they cannot be.
    #[serde(default)]
    replaced: Vec<String>,
}

fn before(given: Option<&Machine>, calibrations: &[Vec<Micro>], settings: &[Setting]) -> Before {
    let machines = match given {
        Some(machine) => vec![machine.clone()],
        None => calibrations
            .iter()
            .map(|all| machine_of(&middle(all)))
            .collect(),
    };
    let mut settings = settings.to_vec();
    for (no, setting) in settings.iter_mut().enumerate() {
        let place = no / CONTENDERS.len();
        setting.machine = place.min(machines.len().saturating_sub(1));
    }
    Before {
        machines,
        settings,
        replaced: replaced(calibrations.iter().flatten()),
    }
}

fn again(path: &Path, machine_from: Option<&Path>, json: bool) -> anyhow::Result<()> {
    /// ByteSize of what `--keep` writes, at most.
    const KEPT_MAX: u64 = 64 << 20;
    let text = faultless_untrusted::input::text(path, KEPT_MAX)
        .with_context(|| format!("cannot read {}", printable(path)))?;
    let mut before: Before = serde_json::from_str(&text)
        .with_context(|| format!("{} is not what validate --json prints", printable(&path)))?;
    if let Some(path) = machine_from {
        before.machines = vec![machine(path)?];
        before.settings.iter_mut().for_each(|s| s.machine = 0);
        before.replaced.clear();
    }
    let of = |s: &Setting| before.machines.get(s.machine).is_none();
    if let Some(lost) = before.settings.iter().find(|s| of(s)) {
        anyhow::bail!(
            "{} is not what validate --json prints: there is no machine {} in it",
            printable(&path),
            lost.machine
        );
    }
    predict(before, json)
}

/// Predicts what was measured, and says both.
fn predict(before: Before, json: bool) -> anyhow::Result<()> {
    let Before {
        machines,
        mut settings,
        replaced,
    } = before;
    // An interrupted run has measured some of them.
    settings.retain(|s| !s.rates.is_empty());
    anyhow::ensure!(!settings.is_empty(), "nothing was measured");
    let mut jobs: Vec<(Workload, String)> = Vec::new();
    for setting in &mut settings {
        setting.measured_per_s = median(&mut setting.rates);
        setting.measured_p99_us = median(&mut setting.tails);
        let (least, most) = (setting.rates[0], setting.rates[setting.rates.len() - 1]);
        setting.spread = (most - least) / setting.measured_per_s.max(1e-9);
        let mut workload = built_in(&setting.scenario)
            .with_context(|| format!("there is no workload {}", setting.scenario))?
            .on(&machines[setting.machine]);
        workload.threads[0].count = setting.threads;
        workload.monitors = MONITORS as u32;
        jobs.push((workload, setting.design.clone()));
    }
    for (setting, outcome) in settings.iter_mut().zip(run_all(&jobs, 1, |_| {})?) {
        setting.predicted_per_s = throughput(&outcome);
        setting.predicted_p99_us = tail(&outcome);
    }
    let (pairs, right_pairs) = order(&settings, |_| true);
    let (pairs_without_monitor, right_pairs_without_monitor) =
        order(&settings, |s| s.design != "uffd-monitor");
    let errors = |of: fn(&Setting) -> f64| median(&mut settings.iter().map(of).collect::<Vec<_>>());
    let validation = Validation {
        schema: "faultless.whatif-validation/1",
        median_error_reads: errors(|s| error(s.predicted_per_s, s.measured_per_s)),
        median_error_p99: errors(|s| error(s.predicted_p99_us, s.measured_p99_us)),
        repeated: settings.iter().map(|s| s.repeated).sum(),
        machines,
        settings,
        replaced,
        pairs,
        right_pairs,
        pairs_without_monitor,
        right_pairs_without_monitor,
    };
    if json {
        return say(&crate::output::json(&validation)?);
    }
    say(&tables(&validation))
}

/// The middle one, or between the middle two; they are in order afterwards.
fn median(all: &mut [f64]) -> f64 {
    all.sort_by(f64::total_cmp);
    let half = all.len() / 2;
    match all.len() {
        0 => 0.0,
        n if n % 2 == 0 => (all[half - 1] + all[half]) / 2.0,
        _ => all[half],
    }
}

/// Of the pairs of contenders in a setting whose medians differ by more than their rounds do: how many, and of how many the order was
/// predicted. (With one round nothing is known of how rounds differ.)
fn order(settings: &[Setting], counts: impl Fn(&Setting) -> bool) -> (usize, usize) {
    let settings: Vec<&Setting> = settings
        .iter()
        .filter(|s| s.rates.len() > 1 && counts(s))
        .collect();
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
        "Median error: reads/s {}, p99 {}. Of {} pairs of contenders that differ by more than their spread, {} are in the right order; without uffd-monitor, of {} {}.\n\
         (Designs that exist in no kernel cannot be measured: of the twelve, these three are validated.)",
        percent(v.median_error_reads),
        percent(v.median_error_p99),
        v.pairs,
        v.right_pairs,
        v.pairs_without_monitor,
        v.right_pairs_without_monitor
    );
    if v.repeated > 0 {
        let _ = writeln!(
            text,
            "{} measurements were made again, because the device had become slow meanwhile.",
            v.repeated
        );
    }
    let first = |s: &Setting| s.first_in_rounds;
    let (least, most) = (
        v.settings.iter().map(first).min(),
        v.settings.iter().map(first).max(),
    );
    match most {
        // (Of a file that does not say so.)
        None | Some(0) => {}
        Some(n) if least == most => {
            let _ = writeln!(text, "Each contender was first in {n} of the rounds.");
        }
        _ => {
            let _ = writeln!(
                text,
                "The contenders were not first equally often: that takes --rounds {} or a multiple, not broken off.",
                CONTENDERS.len()
            );
        }
    }
    if !v.replaced.is_empty() {
        let _ = writeln!(text, "{REPLACED}");
        for r in &v.replaced {
            let _ = writeln!(text, "  {r}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_replaced_is_told_in_the_file_of_a_machine() {
        let micro = |came_out: &[f64]| Micro {
            costs: BTreeMap::new(),
            latency_us: Vec::new(),
            spread: Vec::new(),
            replaced: came_out
                .iter()
                .map(|&came_out| Replaced {
                    what: "alloc_page".to_owned(),
                    came_out,
                    used: 100.0,
                    unit: "ns",
                })
                .collect(),
        };
        assert!(comment(&replaced([&micro(&[])])).is_empty());
        let text = comment(&replaced([&micro(&[-35.0])]));
        assert!(text.lines().all(|l| l.starts_with('#')), "{text}");
        assert!(
            text.contains("alloc-page: -35.0 ns; 100.0 ns is used"),
            "{text}"
        );
        let three = [micro(&[]), micro(&[-35.0]), micro(&[20.0])];
        assert_eq!(
            replaced(&three),
            ["alloc-page in 2 of 3 calibrations, for instance: -35.0 ns; 100.0 ns is used"]
        );
    }
}
