//! A whole run: which measurements, in what order, in which process; and the rows that come of them.
//!
//! Each setting (a scenario with a number of threads) has a process of its own, so that one cannot colour the next.
//! Within it the contenders take turns, round by round, each round in another order.

use crate::cell::{Bench, Cell, Measured, Setting, proc_number};
use crate::contender::{self, Kind};
use crate::data;
use crate::group::Group;
use crate::machine::Machine;
use crate::scenario::{Access, Scenario};
use crate::unmodified::{self, Program};
use anyhow::{Context, bail};
use faultless::ByteSize;
use faultless_storage::{Delay, Faults, Storage};
use faultless_sys::mem::PAGE;
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// The control group of the pressure scenarios has this part of the data as memory.
const PRESSURE_FRACTION: u64 = 8;
/// Of that, what the engine's budget leaves to the rest of the process: its page tables, stacks, heap and program.
const PRESSURE_REST: u64 = 32 << 20;
/// Smallest control group in which anything can be measured.
const PRESSURE_MIN: u64 = 128 << 20;
/// How long the pressure scenarios read before they count, for each 512 MiB of the group's memory; and how long they
/// count, as a multiple of other scenarios.
const PRESSURE_WARM: f64 = 8.0;
const PRESSURE_LONGER: f64 = 2.0;
/// Measurements with storage that answers late are this much longer.
const LATENCY_LONGER: f64 = 2.5;

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Which scenarios.
    pub scenarios: Vec<Scenario>,
    /// Which contenders.
    pub contenders: Vec<Kind>,
    /// Reader threads; `None` for the scenario's own.
    pub threads: Option<usize>,
    /// Length of one measurement.
    pub seconds: f64,
    /// Measurements of each contender in each setting; the row has their medians.
    pub rounds: usize,
    /// The data file.
    pub file: PathBuf,
    /// How much of it to use.
    pub size: ByteSize,
    /// Read all of it once before anything is measured, if it is cold ([`data::is_cold`]).
    pub warm: bool,
    /// Budget of the contenders that have one.
    pub memory: ByteSize,
    /// Monitor threads of the userfaultfd; `None`: several numbers are tried.
    pub monitors: Option<usize>,
    /// The data is served by a storage that answers after so long, in every scenario.
    pub storage_delay: Option<Duration>,
}

/// One line of the result: a contender in a setting. Figures are medians over the rounds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The scenario.
    pub scenario: Scenario,
    /// The contender.
    pub contender: Kind,
    /// What else distinguishes it: the number of monitor threads.
    pub variant: String,
    /// Reader threads.
    pub threads: usize,
    /// Budget of the contenders that have one, in bytes. The pressure scenarios set it themselves, by the control group.
    pub memory: u64,
    /// Measurements behind the row.
    pub rounds: usize,
    /// Seconds of one measurement.
    pub seconds: f64,
    /// Pages read in one measurement.
    pub reads: u64,
    /// Pages read per second.
    pub reads_per_s: f64,
    /// Median latency of a read, in microseconds.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// The longest of all rounds.
    pub max_us: f64,
    /// Rounds of the neighbour's loop per second.
    pub neighbour_per_s: Option<f64>,
    /// 99th percentile of a round of its loop.
    pub neighbour_p99_us: Option<f64>,
    /// Touches of absent pages in one measurement.
    pub misses: u64,
    /// Acquisitions of `mmap_lock` by reader threads, divided by misses; null where they cannot be counted.
    pub mmap_lock_per_miss: Option<f64>,
    /// The same for all threads of the process, the neighbour's included.
    pub mmap_lock_per_miss_process: Option<f64>,
    /// Bytes that the device delivered in one measurement.
    pub device_bytes: u64,
    /// Processor seconds of the process in one measurement, the neighbour's threads included.
    pub cpu_s: f64,
    /// Processor seconds of the process that looks on, if one does, from its start to its end.
    pub onlooker_cpu_s: Option<f64>,
    /// The most memory that it had in any round, in bytes.
    pub onlooker_resident_bytes: Option<u64>,
    /// Records that it lost in all rounds.
    pub onlooker_lost: Option<u64>,
    /// Pages that the device delivered, divided by pages read.
    pub device_reads_per_read: f64,
    /// The latency at each of [`QUANTILES`](crate::cell::QUANTILES), in microseconds; in the hot scenarios of one load.
    pub latency_us: Vec<f64>,
    /// Of each round, reads per second in each interval of [`SAMPLE`](crate::cell::SAMPLE).
    pub reads_over_time: Vec<Vec<f64>>,
    /// Frames of the contender beyond its budget, at most of all rounds, after the measurement; null where it has none.
    pub over_budget_bytes: Option<u64>,
    /// Most memory that the process had beyond what it had before, in bytes.
    pub resident_max_bytes: u64,
    /// Bytes that were not what they must be, in all rounds.
    pub wrong_bytes: u64,
}

/// The result of a run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// What it ran on.
    pub machine: Machine,
    /// How much data was used, in bytes.
    pub size: u64,
    /// Microseconds that the storage took to answer in every scenario, if it was not the disk.
    pub storage_delay_us: Option<u64>,
    /// The rows, by scenario and number of threads.
    pub rows: Vec<Row>,
    /// Scenarios that this machine does not permit, and why.
    pub left_out: Vec<String>,
    /// Contenders that failed, and why.
    pub failed: Vec<String>,
}

impl Report {
    /// Bytes that were not what they must be, in all measurements that were completed.
    pub fn wrong_bytes(&self) -> u64 {
        self.rows.iter().map(|r| r.wrong_bytes).sum()
    }
}

/// What happens during a run, for whoever shows progress.
#[derive(Debug)]
pub enum Progress<'a> {
    /// So many bytes of so many of the data file are written.
    Data(u64, u64),
    /// So many bytes of so many of it are read, once before all measurements.
    Warm(u64, u64),
    /// So many measurements of so many are done; this one is next.
    Cell(usize, usize, &'a str),
    /// Something that the reader should know.
    Note(String),
}

/// The hidden subcommand that runs [`serve_storage`].
pub const STORAGE_COMMAND: &str = "bench-storage";

/// Serves the data, of so many bytes, as a file system of its own, until standard input ends.
///
/// # Errors
///
/// It cannot be mounted.
pub fn serve_storage(mountpoint: &Path, len: u64) -> anyhow::Result<()> {
    faultless_storage::serve(mountpoint, len, |offset, bytes| {
        let mut page = [0; PAGE];
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let (number, within) = (at / PAGE as u64, at as usize % PAGE);
            let n = (PAGE - within).min(bytes.len() - done);
            data::fill_page(&mut page, number);
            bytes[done..done + n].copy_from_slice(&page[within..within + n]);
            done += n;
        }
    })
    .context("cannot serve the data as a file system (FUSE)")
}

/// The hidden subcommand that runs [`work`].
pub const WORKER_COMMAND: &str = "bench-worker";

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    setting: Setting,
    /// With the variants that are tried.
    contenders: Vec<(Kind, Vec<usize>)>,
    first_round: usize,
    rounds: usize,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(
    clippy::large_enum_variant,
    reason = "one at a time, on its way to JSON"
)]
enum Message {
    Starting(Cell),
    Measured(Cell, Measured),
    Failed(Kind, String),
}

impl Plan {
    fn settings(&self, scenario: Scenario) -> Vec<Setting> {
        let threads = match self.threads {
            Some(n) => vec![n],
            None => scenario.threads(),
        };
        let group_memory = scenario
            .pressure()
            .then_some(self.size.get() / PRESSURE_FRACTION);
        let (warm_seconds, longer) = match group_memory {
            Some(bytes) => (
                PRESSURE_WARM * bytes as f64 / (512 << 20) as f64,
                PRESSURE_LONGER,
            ),
            None if scenario.storage_delay_us().is_some() => (0.0, LATENCY_LONGER),
            None => (0.0, 1.0),
        };
        let memory = match group_memory {
            Some(bytes) => bytes.saturating_sub(PRESSURE_REST).max(bytes / 2),
            // All of the data, and what is needed beside it.
            None if scenario.access() == Access::Resident => {
                self.size.get() + self.size.get() / 4 + PRESSURE_REST
            }
            None => self.memory.get(),
        };
        threads
            .into_iter()
            .map(|threads| Setting {
                scenario,
                threads,
                seconds: self.seconds * longer,
                warm_seconds,
                rounds: self.rounds,
                file: self.file.clone(),
                size: self.size.get(),
                memory,
                group_memory,
            })
            .collect()
    }

    /// The contenders that make sense in a scenario.
    fn contenders(&self, scenario: Scenario) -> Vec<Kind> {
        let suits = |kind: &Kind| match (scenario.access(), kind) {
            (_, Kind::Program | Kind::ProgramServed) => unmodified::suits(scenario),
            (Access::Resident, _) => false,
            (Access::Cold, _) => true,
            (Access::Scan, Kind::UffdMonitor) => false,
            (Access::Scan, _) => true,
            // A monitor that evicts nothing, and reads without a cache, have no part in these.
            (_, kind) => kind.is_kernel_mmap() || kind == &Kind::Faultless,
        };
        self.contenders.iter().copied().filter(suits).collect()
    }

    /// The variants of a contender that are tried: the best is then measured in all rounds.
    fn variants(&self, scenario: Scenario, kind: Kind) -> Vec<usize> {
        match kind {
            Kind::UffdMonitor => {
                let mut counts = self.monitors();
                if self.monitors.is_none() && self.delay(scenario).is_some() {
                    // As many reads in flight as there are readers.
                    counts.extend(scenario.threads().iter().map(|&n| n.min(256)));
                    counts.extend(self.threads.map(|n| n.min(256)));
                    counts.sort_unstable();
                    counts.dedup();
                }
                counts
            }
            // MADV_RANDOM reads nothing ahead, but makes the kernel forget which pages are in use.
            kind if kind.is_kernel_mmap() && scenario.pressure() => vec![0, 1],
            _ => vec![0],
        }
    }

    /// Numbers of monitor threads that are tried: as many as processors, 16, and 48.
    fn monitors(&self) -> Vec<usize> {
        if let Some(n) = self.monitors {
            return vec![n];
        }
        let mut counts = vec![
            std::thread::available_parallelism().map_or(1, usize::from),
            16,
            48,
        ];
        counts.sort_unstable();
        counts.dedup();
        counts
    }

    fn cells_of(&self, scenario: Scenario) -> usize {
        self.contenders(scenario)
            .iter()
            .map(|&kind| self.rounds + self.variants(scenario, kind).len() - 1)
            .sum()
    }

    /// Runs everything.
    ///
    /// # Errors
    ///
    /// An unusable data file or a scenario that breaks off. What a machine does not permit is left out, and named.
    pub fn run(&self, progress: &mut dyn FnMut(Progress<'_>)) -> anyhow::Result<Report> {
        data::check_size(self.size)?;
        if self.scenarios.iter().any(|&s| self.delay(s).is_none()) {
            data::prepare(&self.file, self.size, |n, of| {
                progress(Progress::Data(n, of))
            })?;
            contender::check_direct(&self.file)?;
            if self.warm && data::is_cold(&self.file, self.size)? {
                data::warm(&self.file, self.size, |n, of| {
                    progress(Progress::Warm(n, of))
                })?;
            }
        }
        let machine = Machine::look(&self.file);
        if let Some(why) = &machine.mmap_lock_uncounted {
            progress(Progress::Note(format!(
                "acquisitions of mmap_lock are not counted: {why}"
            )));
        }
        let mut report = Report {
            machine,
            size: self.size.get(),
            storage_delay_us: self.storage_delay.map(|d| d.as_micros() as u64),
            rows: Vec::new(),
            left_out: Vec::new(),
            failed: Vec::new(),
        };
        let settings: Vec<Setting> = self
            .scenarios
            .iter()
            .filter(|s| match self.permitted(**s) {
                Ok(()) => true,
                Err(why) => {
                    report.left_out.push(format!("{}: {why}", s.name()));
                    false
                }
            })
            .flat_map(|&s| self.settings(s))
            .collect();
        let total = settings.iter().map(|s| self.cells_of(s.scenario)).sum();
        let mut done = 0;
        for mut setting in settings {
            let storage = match self.delay(setting.scenario).map(|d| self.storage(d)) {
                None => None,
                Some(Ok(storage)) => Some(storage),
                Some(Err(e)) => {
                    let name = setting.scenario.name();
                    report.left_out.push(format!("{name}: {e}"));
                    continue;
                }
            };
            if let Some(storage) = &storage {
                setting.file = storage.file();
            }
            let rows = self
                .run_setting(&setting, &mut |label| {
                    progress(Progress::Cell(done.min(total), total, label));
                    done += 1;
                })
                .with_context(|| {
                    format!(
                        "scenario {} with {} threads",
                        setting.scenario.name(),
                        setting.threads
                    )
                })?;
            for (row, failure) in rows {
                match failure {
                    None => report.rows.extend(row),
                    Some(why) => {
                        report.failed.push(format!(
                            "{} at {} threads: {why}",
                            setting.scenario.name(),
                            setting.threads
                        ));
                    }
                }
            }
        }
        progress(Progress::Cell(total, total, "done"));
        Ok(report)
    }

    /// How long the storage takes to answer, where it is not the disk's affair.
    fn delay(&self, scenario: Scenario) -> Option<Duration> {
        scenario
            .storage_delay_us()
            .map(Duration::from_micros)
            .or(self.storage_delay)
    }

    /// Starts a storage that answers after `delay`.
    fn storage(&self, delay: Duration) -> std::io::Result<Storage> {
        let program = std::env::current_exe()?;
        let mut storage = Storage::start(|at| {
            let mut server = Command::new(program);
            // Apart from the terminal's signals: it ends, and unmounts, when this process does.
            std::os::unix::process::CommandExt::process_group(&mut server, 0);
            server
                .arg(STORAGE_COMMAND)
                .arg(at)
                .arg(self.size.get().to_string());
            server
        })?;
        let delay = Delay::fixed(delay);
        storage.set(&Faults {
            delay,
            ..Faults::default()
        })?;
        Ok(storage)
    }

    /// Whether the machine has the memory that a scenario takes.
    fn permitted(&self, scenario: Scenario) -> anyhow::Result<()> {
        let group = self.size.get() / PRESSURE_FRACTION;
        if self.contenders(scenario).is_empty() {
            bail!("no contender that was asked for suits it");
        }
        if scenario.pressure() && group < PRESSURE_MIN {
            bail!(
                "an eighth of the data is {}, too little memory for a process; make --size at least {}",
                ByteSize::new(group),
                ByteSize::new(PRESSURE_MIN * PRESSURE_FRACTION)
            );
        }
        if scenario.pressure() {
            Group::new("faultless-bench-probe", group)?;
        }
        if scenario == Scenario::PressureScan && self.threads == Some(1) {
            bail!(
                "it needs one thread that scans and at least one other; make --threads at least 2"
            );
        }
        let available = proc_number("/proc/meminfo", "MemAvailable:") << 10;
        let scratch = if scenario == Scenario::Bigfree {
            1 << 30
        } else {
            0
        };
        let own = match scenario.access() {
            Access::Hot => self.memory.get() * 2,
            Access::Resident => self.size.get() * 2,
            _ => self.memory.get(),
        };
        let need = scenario.ballast() + scratch + own.min(self.size.get());
        if need > available {
            bail!(
                "it needs {} of free memory, and there are {}",
                ByteSize::new(need),
                ByteSize::new(available)
            );
        }
        Ok(())
    }

    /// Runs one setting in a process of its own; or, where memory is short, each measurement in its own.
    fn run_setting(
        &self,
        setting: &Setting,
        starting: &mut dyn FnMut(&str),
    ) -> anyhow::Result<Vec<(Option<Row>, Option<String>)>> {
        let contenders = self.contenders(setting.scenario);
        let all: Vec<(Kind, Vec<usize>)> = contenders
            .iter()
            .map(|&kind| (kind, self.variants(setting.scenario, kind)))
            .collect();
        let mut cells: Vec<(Cell, Measured)> = Vec::new();
        let mut failures: Vec<(Kind, String)> = Vec::new();
        if contenders.iter().all(|k| Kind::UNMODIFIED.contains(k)) {
            self.run_programs(setting, &contenders, starting, &mut cells, &mut failures)?;
        } else if setting.group_memory.is_none() {
            let order = Order {
                setting: setting.clone(),
                contenders: all,
                first_round: 0,
                rounds: self.rounds,
            };
            run_order(&order, starting, &mut cells, &mut failures)?;
        } else {
            let mut all = all;
            for round in 0..self.rounds {
                for (kind, variants) in &mut all {
                    if failures.iter().any(|(k, _)| k == kind) {
                        continue;
                    }
                    for &variant in &*variants {
                        let order = Order {
                            setting: setting.clone(),
                            contenders: vec![(*kind, vec![variant])],
                            first_round: round,
                            rounds: 1,
                        };
                        // A process that the kernel ends for want of memory is this contender's result.
                        if let Err(e) = run_order(&order, starting, &mut cells, &mut failures) {
                            failures.push((*kind, format!("{e:#}")));
                            break;
                        }
                    }
                    if variants.len() > 1
                        && let Some(best) = best_variant(*kind, &cells)
                    {
                        *variants = vec![best];
                    }
                }
                all.rotate_left(1);
            }
        }
        let mut rows: Vec<_> = contenders
            .iter()
            .filter_map(|&kind| row(setting, kind, &cells))
            .map(|r| (Some(r), None))
            .collect();
        rows.extend(
            failures
                .into_iter()
                .map(|(kind, why)| (None, Some(format!("{}: {why}", kind.name())))),
        );
        Ok(rows)
    }
}

impl Plan {
    /// Runs a program of its own, by turns.
    fn run_programs(
        &self,
        setting: &Setting,
        contenders: &[Kind],
        starting: &mut dyn FnMut(&str),
        cells: &mut Vec<(Cell, Measured)>,
        failures: &mut Vec<(Kind, String)>,
    ) -> anyhow::Result<()> {
        let program = Program::new()?;
        let mut order = contenders.to_vec();
        for round in 0..self.rounds {
            for kind in order.clone() {
                starting(&format!(
                    "{}, {} threads: {}",
                    setting.scenario.name(),
                    setting.threads,
                    kind.name()
                ));
                let cell = Cell {
                    kind,
                    variant: 0,
                    round,
                };
                match program.run(setting, kind, round) {
                    Ok(m) => cells.push((cell, m)),
                    Err(e) => {
                        failures.push((kind, format!("{e:#}")));
                        order.retain(|&k| k != kind);
                    }
                }
            }
            // Nobody always goes first.
            if !order.is_empty() {
                order.rotate_left(1);
            }
        }
        Ok(())
    }
}

/// Has a process of its own do what is ordered.
fn run_order(
    order: &Order,
    starting: &mut dyn FnMut(&str),
    cells: &mut Vec<(Cell, Measured)>,
    failures: &mut Vec<(Kind, String)>,
) -> anyhow::Result<()> {
    let setting = &order.setting;
    let group = match setting.group_memory {
        Some(bytes) => Some(Group::new("faultless-bench", bytes)?),
        None => None,
    };
    let mut child = Command::new(std::env::current_exe()?)
        .arg(WORKER_COMMAND)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the process that measures")?;
    let mut input = child.stdin.take().context("the worker has no input")?;
    if let Some(group) = &group {
        // It waits for its order: nothing of what it measures is allocated yet.
        group.admit(child.id())?;
    }
    serde_json::to_writer(&mut input, &order)?;
    drop(input);
    let output = child.stdout.take().context("the worker has no output")?;
    for line in BufReader::new(output).lines() {
        match serde_json::from_str(&line?).context("the worker wrote something odd")? {
            Message::Starting(cell) => starting(&format!(
                "{}, {} threads: {}",
                setting.scenario.name(),
                setting.threads,
                cell.kind.name()
            )),
            Message::Measured(cell, m) => cells.push((cell, m)),
            Message::Failed(kind, why) => failures.push((kind, why)),
        }
    }
    let status = child.wait()?;
    if !status.success() {
        bail!("the measuring process ended with {status}");
    }
    Ok(())
}

/// The fastest of the variants that were measured.
fn best_variant(kind: Kind, cells: &[(Cell, Measured)]) -> Option<usize> {
    let speed = |m: &Measured| m.reads as f64 / m.seconds.max(1e-9);
    cells
        .iter()
        .filter(|(c, _)| c.kind == kind)
        .max_by(|(_, a), (_, b)| speed(a).total_cmp(&speed(b)))
        .map(|(c, _)| c.variant)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// The medians of a contender's measurements: of the best variant, where there are several.
fn row(setting: &Setting, kind: Kind, cells: &[(Cell, Measured)]) -> Option<Row> {
    let of_kind: Vec<_> = cells.iter().filter(|(c, _)| c.kind == kind).collect();
    // The variant that was measured in all rounds is the one that won the first; with one round, the fastest.
    let rank = |m: usize| {
        let cells = of_kind.iter().filter(|(c, _)| c.variant == m);
        let reads = cells.clone().map(|(_, m)| m.reads).max();
        (cells.count(), reads)
    };
    let variant = of_kind
        .iter()
        .map(|(c, _)| c.variant)
        .max_by_key(|&m| rank(m))?;
    let ms: Vec<&Measured> = of_kind
        .iter()
        .filter(|(c, _)| c.variant == variant)
        .map(|(_, m)| m)
        .collect();
    let med = |f: &dyn Fn(&Measured) -> f64| median(ms.iter().map(|m| f(m)).collect());
    let med_if = |f: &dyn Fn(&Measured) -> Option<f64>| {
        let values: Vec<f64> = ms.iter().filter_map(|m| f(m)).collect();
        (!values.is_empty()).then(|| median(values))
    };
    let per_miss = |m: &Measured, locks: Option<u64>| Some(locks? as f64 / m.misses.max(1) as f64);
    Some(Row {
        scenario: setting.scenario,
        contender: kind,
        variant: match (kind, variant) {
            (Kind::UffdMonitor, n) => format!("monitors={n}"),
            (kind, 1) if kind.is_kernel_mmap() => "no MADV_RANDOM".to_owned(),
            _ => String::new(),
        },
        threads: setting.threads,
        memory: setting.memory,
        rounds: ms.len(),
        seconds: med(&|m| m.seconds),
        reads: med(&|m| m.reads as f64) as u64,
        reads_per_s: med(&|m| m.reads as f64 / m.seconds),
        p50_us: med(&|m| m.p50_us),
        p99_us: med(&|m| m.p99_us),
        p999_us: med(&|m| m.p999_us),
        max_us: ms.iter().map(|m| m.max_us).fold(0.0, f64::max),
        neighbour_per_s: med_if(&|m| m.neighbour_per_s),
        neighbour_p99_us: med_if(&|m| m.neighbour_p99_us),
        misses: med(&|m| m.misses as f64) as u64,
        mmap_lock_per_miss: med_if(&|m| per_miss(m, m.locks_readers)),
        mmap_lock_per_miss_process: med_if(&|m| per_miss(m, m.locks_process)),
        device_bytes: med(&|m| m.device_bytes as f64) as u64,
        cpu_s: med(&|m| m.cpu_s),
        onlooker_cpu_s: med_if(&|m| m.onlooker_cpu_s),
        onlooker_resident_bytes: ms.iter().filter_map(|m| m.onlooker_resident_bytes).max(),
        onlooker_lost: ms.iter().map(|m| m.onlooker_lost).sum(),
        latency_us: {
            let points = ms.iter().map(|m| m.latency_us.len()).min().unwrap_or(0);
            (0..points).map(|i| med(&|m| m.latency_us[i])).collect()
        },
        reads_over_time: ms.iter().map(|m| m.reads_over_time.clone()).collect(),
        device_reads_per_read: med(&|m| {
            m.device_bytes as f64 / PAGE as f64 / m.reads.max(1) as f64
        }),
        over_budget_bytes: ms.iter().filter_map(|m| m.over_budget_bytes).max(),
        resident_max_bytes: ms.iter().map(|m| m.resident_max_bytes).max().unwrap_or(0),
        // Of all variants: no wrong byte goes unreported.
        wrong_bytes: of_kind.iter().map(|(_, m)| m.wrong_bytes).sum(),
    })
}

/// The worker's side: reads an order from standard input, measures, and reports on standard output.
///
/// # Errors
///
/// An order that cannot be read, or a process that cannot be prepared.
pub fn work() -> anyhow::Result<()> {
    let order: Order =
        serde_json::from_reader(std::io::stdin()).context("cannot read the order")?;
    let say = |m: &Message| -> anyhow::Result<()> {
        let mut out = std::io::stdout().lock();
        serde_json::to_writer(&mut out, m)?;
        out.write_all(b"\n")?;
        out.flush()?;
        Ok(())
    };
    let bench = Bench::new(order.setting)?;
    let mut contenders = order.contenders;
    for round in order.first_round..order.first_round + order.rounds {
        let mut broken = Vec::new();
        for (kind, variants) in &mut contenders {
            let kind = *kind;
            let mut best = (-1.0, variants.first().copied().unwrap_or(0));
            for &variant in &*variants {
                let cell = Cell {
                    kind,
                    variant,
                    round,
                };
                say(&Message::Starting(cell.clone()))?;
                match bench.run(&cell) {
                    Ok(m) => {
                        let speed = m.reads as f64 / m.seconds;
                        if speed > best.0 {
                            best = (speed, variant);
                        }
                        say(&Message::Measured(cell, m))?;
                    }
                    Err(e) => {
                        say(&Message::Failed(kind, format!("{e:#}")))?;
                        broken.push(kind);
                        break;
                    }
                }
            }
            *variants = vec![best.1];
        }
        contenders.retain(|(k, _)| !broken.contains(k));
        // Nobody always goes first.
        if !contenders.is_empty() {
            contenders.rotate_left(1);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_medians_of_the_variant_that_won() {
        let setting = Setting {
            scenario: Scenario::Quiet,
            threads: 4,
            seconds: 1.0,
            warm_seconds: 0.0,
            group_memory: None,
            rounds: 3,
            file: PathBuf::new(),
            size: 0,
            memory: 0,
        };
        let cell = |variant, round, reads| {
            let m = Measured {
                seconds: 1.0,
                reads,
                misses: 10,
                locks_readers: Some(5),
                ..Measured::default()
            };
            (
                Cell {
                    kind: Kind::UffdMonitor,
                    variant,
                    round,
                },
                m,
            )
        };
        let cells = [
            cell(2, 0, 50),
            cell(16, 0, 70),
            cell(48, 0, 60),
            cell(16, 1, 90),
            cell(16, 2, 10),
        ];
        let r = row(&setting, Kind::UffdMonitor, &cells).expect("measured");
        assert_eq!(
            (r.variant.as_str(), r.rounds, r.reads),
            ("monitors=16", 3, 70)
        );
        assert_eq!(
            (r.mmap_lock_per_miss, r.mmap_lock_per_miss_process),
            (Some(0.5), None)
        );
        assert!(row(&setting, Kind::Mmap, &cells).is_none());
    }
}
