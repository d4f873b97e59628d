//! A whole run: which measurements, in what order, in which process; and the rows that come of them.
//!
//! Each setting (a scenario with a number of threads) has a process of its own, so that one cannot colour the next.
//! Within it come first the trials of contenders that have variants, then a round in which acquisitions of `mmap_lock` are
//! counted, then the rounds whose times are reported. In these the contenders take turns, so that each is first equally
//! often ([`order`](crate::order)).

use crate::cell::{Bench, Cell, Measured, Purpose, Setting, WRONG, proc_number};
use crate::contender::{self, Kind};
use crate::data;
use crate::floor;
use crate::group::{Group, Place};
use crate::machine::Machine;
use crate::neighbour::{AGENT_EVERY, BIG};
use crate::order::{balanced_rounds, orders};
use crate::pagemap::Pagemap;
use crate::scenario::{Access, Disturbance, PRESSURE_FRACTION, Scenario};
use crate::spread::{Range, Ratio, median};
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
/// So are measurements beside a gentle agent, rounded up to a whole number of its looks; and it looks so often at least.
const GENTLE_LONGER: f64 = 2.5;
const LOOKS_MIN: f64 = 2.0;

/// What to run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Which scenarios.
    pub scenarios: Vec<Scenario>,
    /// Which contenders.
    pub contenders: Vec<Kind>,
    /// Reader threads; `None` for the scenario's own.
    pub threads: Option<usize>,
    /// Reads that a thread has in flight, by contenders that have several.
    pub depth: usize,
    /// Length of one measurement.
    pub seconds: f64,
    /// Timed measurements of each contender in each setting; the row has their medians. `None`: as many as let each
    /// contender be first equally often.
    pub rounds: Option<usize>,
    /// Count acquisitions of `mmap_lock`, in a further round whose times are not reported, if that is possible here.
    pub count_locks: bool,
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
    /// All measurements begin with this part of the pages, of so many; `None`: each round begins with another.
    pub part: Option<(usize, usize)>,
    /// The data is served by a storage that answers after so long, in every scenario.
    pub storage_delay: Option<Duration>,
}

/// How far the rounds of a row lie apart: of each median, the least and the most.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Spread {
    /// Pages read per second.
    pub reads_per_s: Range,
    /// Median latency of a read, in microseconds.
    pub p50_us: Range,
    /// 99th percentile.
    pub p99_us: Range,
    /// 99.9th percentile.
    pub p999_us: Range,
    /// The longest of a round.
    pub max_us: Range,
    /// Processor seconds of the process.
    pub cpu_s: Range,
    /// Processor time of the process for each miss, in microseconds.
    pub cpu_us_per_miss: Range,
    /// Pages that the device delivered, divided by pages read.
    pub device_reads_per_read: Range,
    /// Rounds of the neighbour's loop per second.
    pub neighbour_per_s: Option<Range>,
    /// 99th percentile of a round of its loop.
    pub neighbour_p99_us: Option<Range>,
    /// Processor seconds of the process that looks on.
    pub onlooker_cpu_s: Option<Range>,
}

/// One line of the result: a contender in a setting. Figures are medians over the timed rounds.
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
    /// Timed measurements behind the row.
    pub rounds: usize,
    /// In so many of them the contender was the first of its round.
    pub first_in_rounds: usize,
    /// Seconds of one measurement.
    pub seconds: f64,
    /// Pages read in one measurement.
    pub reads: u64,
    /// Pages read per second.
    pub reads_per_s: f64,
    /// The same in each round, by its number.
    pub reads_per_s_by_round: Vec<(usize, f64)>,
    /// How many times as fast as the baseline; null where that was not measured.
    pub against_baseline: Option<Ratio>,
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
    /// Misses of the round in which acquisitions of `mmap_lock` were counted, the first miss of each reader included; null
    /// where there was no such round.
    pub counted_misses: Option<u64>,
    /// Acquisitions of `mmap_lock` by reader threads in that round, divided by those misses; null where they cannot be
    /// counted.
    pub mmap_lock_per_miss: Option<f64>,
    /// The same for all threads of the process, the neighbour's included.
    pub mmap_lock_per_miss_process: Option<f64>,
    /// Bytes that the device delivered in one measurement.
    pub device_bytes: u64,
    /// Processor seconds of the process in one measurement, the neighbour's threads included.
    pub cpu_s: f64,
    /// The same for each miss, in microseconds.
    pub cpu_us_per_miss: f64,
    /// Processor seconds of the process that looks on, if one does, from its start to its end.
    pub onlooker_cpu_s: Option<f64>,
    /// The most memory that it had in any round, in bytes.
    pub onlooker_resident_bytes: Option<u64>,
    /// Records that it lost in all rounds.
    pub onlooker_lost: Option<u64>,
    /// Pages that the device delivered, divided by pages read.
    pub device_reads_per_read: f64,
    /// How far the rounds lie apart; null where there is one round.
    pub spread: Option<Spread>,
    /// The latency at each of [`QUANTILES`](crate::cell::QUANTILES), in microseconds; in the hot scenarios of one load.
    pub latency_us: Vec<f64>,
    /// Of each round, reads per second in each interval of [`SAMPLE`](crate::cell::SAMPLE).
    pub reads_over_time: Vec<Vec<f64>>,
    /// Frames of the contender beyond its budget, at most of all rounds, after the measurement; null where it has none.
    pub over_budget_bytes: Option<u64>,
    /// Most memory that the process had beyond what it had before, in bytes.
    pub resident_max_bytes: u64,
    /// Bytes that were not what they must be, in all rounds, trials and the counted round included.
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

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Order {
    setting: Setting,
    cells: Vec<Cell>,
    /// The control group that the process is to join.
    group: Option<Place>,
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
        let seconds = match scenario.disturbance() {
            Disturbance::SmapsGentle => {
                let every = AGENT_EVERY.as_secs_f64();
                let looks = (self.seconds * GENTLE_LONGER / every).ceil();
                looks.max(LOOKS_MIN) * every
            }
            _ => self.seconds,
        };
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
        // What is left of a group for a budget.
        let fits = |bytes: u64| bytes.saturating_sub(PRESSURE_REST).max(bytes / 2);
        let lowered = match (scenario, group_memory) {
            (Scenario::PressureShrink, Some(bytes)) => Some(bytes / 2),
            _ => None,
        };
        let memory_over = match (lowered, group_memory) {
            (Some(_), Some(bytes)) => fits(bytes),
            (None, Some(bytes)) => bytes * 2,
            (_, None) => 0,
        };
        let memory = match group_memory {
            Some(bytes) => fits(lowered.unwrap_or(bytes)),
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
                depth: self.depth,
                seconds: seconds * longer,
                warm_seconds,
                // (Set when the turns are known.)
                parts: 1,
                file: self.file.clone(),
                size: self.size.get(),
                memory,
                memory_over,
                group_memory,
                lowered,
            })
            .collect()
    }

    /// The contenders that make sense in a scenario.
    fn contenders(&self, scenario: Scenario) -> Vec<Kind> {
        let suits = |kind: &Kind| match (scenario.access(), kind) {
            (_, Kind::Program | Kind::ProgramServed | Kind::ProgramLive) => {
                unmodified::suits(scenario)
            }
            (_, Kind::FaultlessOver) => scenario.has_large_budget(),
            (_, Kind::Fio) => scenario == Scenario::Reads,
            (Access::Resident, _) => false,
            (Access::Cold, _) => true,
            (
                Access::Hot,
                Kind::FaultlessBatch | Kind::FaultlessAsync | Kind::Populate | Kind::Uring,
            ) => false,
            (
                Access::Scan,
                Kind::FaultlessLoad
                | Kind::FaultlessLive
                | Kind::FaultlessMarked
                | Kind::FaultlessBatch
                | Kind::FaultlessAsync
                | Kind::Populate
                | Kind::Uring,
            ) => false,
            (Access::Scan, Kind::UffdMonitor | Kind::Floor) => false,
            (Access::Scan, _) => true,
            // What evicts nothing, and reads without a cache, have no part in these.
            (_, kind) => kind.is_kernel_mmap() || kind.is_engine(),
        };
        self.contenders.iter().copied().filter(suits).collect()
    }

    /// The variants of a contender that are tried: the fastest is then measured in all rounds.
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
            Kind::Floor => floor::VARIANTS.to_vec(),
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

    /// Rounds that are timed.
    fn rounds(&self, scenario: Scenario) -> usize {
        self.rounds
            .unwrap_or_else(|| balanced_rounds(self.contenders(scenario).len()))
    }

    /// All measurements of a setting, in order: trials of contenders that have variants, a round that is counted if
    /// `counted`, and the rounds that are timed.
    fn turns(&self, scenario: Scenario, threads: usize, counted: bool) -> Vec<Cell> {
        let contenders: Vec<(Kind, Vec<usize>)> = self
            .contenders(scenario)
            .into_iter()
            .map(|kind| (kind, self.variants(scenario, kind)))
            .collect();
        let mut turns = Vec::new();
        // Each round begins with other pages, and so does each variant in its trial: the device may have a cache.
        let mut part = 0;
        for (kind, variants) in contenders.iter().filter(|(_, v)| v.len() > 1) {
            for (place, &variant) in variants.iter().enumerate() {
                turns.push(Cell {
                    purpose: Purpose::Trial,
                    kind: *kind,
                    variant,
                    round: 0,
                    place,
                    part: place,
                });
            }
            part = part.max(variants.len());
        }
        let mut round_of = |purpose, round, order: &[usize]| {
            for (place, &who) in order.iter().enumerate() {
                let (kind, variants) = &contenders[who];
                turns.push(Cell {
                    purpose,
                    kind: *kind,
                    // (Where there are several, the one that wins its trial: see Trials.)
                    variant: variants.first().copied().unwrap_or(0),
                    round,
                    place,
                    part,
                });
            }
            part += 1;
        };
        if counted {
            let as_shown: Vec<usize> = (0..contenders.len()).collect();
            round_of(Purpose::Counted, 0, &as_shown);
        }
        // The same for the same setting, and others for others.
        let seed = ((scenario as u64) << 32) | threads as u64;
        let orders = orders(contenders.len(), self.rounds(scenario), seed);
        for (round, order) in orders.iter().enumerate() {
            round_of(Purpose::Timed, round, order);
        }
        if let Some((part, _)) = self.part {
            turns.iter_mut().for_each(|t| t.part = part);
        }
        turns
    }

    /// Into how many parts the pages are divided for these turns.
    fn parts(&self, turns: &[Cell]) -> usize {
        match self.part {
            Some((_, of)) => of.max(1),
            None => turns.iter().map(|t| t.part + 1).max().unwrap_or(1),
        }
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
        let counted = self.count_locks && machine.mmap_lock_uncounted.is_none();
        if let Some(why) = &machine.mmap_lock_uncounted
            && self.count_locks
        {
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
        let total = settings
            .iter()
            .map(|s| self.turns(s.scenario, s.threads, counted).len())
            .sum();
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
            let turns = self.turns(setting.scenario, setting.threads, counted);
            setting.parts = self.parts(&turns);
            let rows = self
                .run_setting(&setting, &turns, &mut |label| {
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
        let least = match scenario {
            Scenario::PressureShrink => 2 * PRESSURE_MIN,
            _ => PRESSURE_MIN,
        };
        if self.contenders(scenario).is_empty() {
            bail!("no contender that was asked for suits it");
        }
        if scenario.pressure() && group < least {
            bail!(
                "1/{PRESSURE_FRACTION} of the data is {}, too little memory for a process; make --size at least {}",
                ByteSize::new(group),
                ByteSize::new(least * PRESSURE_FRACTION)
            );
        }
        if scenario.pressure() {
            Group::new("faultless-bench-probe", group)?;
        }
        if scenario == Scenario::Pagemap {
            Pagemap::open(std::process::id())?
                .present()
                .context("it takes Linux 6.7 or later")?;
        }
        if scenario == Scenario::PressureScan && self.threads == Some(1) {
            bail!(
                "it needs one thread that scans and at least one other; make --threads at least 2"
            );
        }
        let available = proc_number("/proc/meminfo", "MemAvailable:") << 10;
        let scratch = if scenario == Scenario::Bigfree {
            BIG as u64
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
        turns: &[Cell],
        starting: &mut dyn FnMut(&str),
    ) -> anyhow::Result<Vec<(Option<Row>, Option<String>)>> {
        let contenders = self.contenders(setting.scenario);
        let mut cells: Vec<(Cell, Measured)> = Vec::new();
        let mut failures: Vec<(Kind, String)> = Vec::new();
        if contenders.iter().all(|k| Kind::UNMODIFIED.contains(k)) {
            run_programs(setting, turns, starting, &mut cells, &mut failures)?;
        } else if setting.group_memory.is_none() {
            let order = Order {
                setting: setting.clone(),
                cells: turns.to_vec(),
                group: None,
            };
            run_order(&order, starting, &mut cells, &mut failures)?;
        } else {
            let mut trials = Trials::default();
            for turn in turns {
                if failures.iter().any(|(k, _)| *k == turn.kind) {
                    continue;
                }
                let order = Order {
                    setting: setting.clone(),
                    cells: vec![trials.choose(turn.clone())],
                    group: None,
                };
                let before = cells.len();
                // A process that the kernel ends for want of memory is this contender's result.
                if let Err(e) = run_order(&order, starting, &mut cells, &mut failures) {
                    failures.push((turn.kind, format!("{e:#}")));
                }
                for (cell, m) in &cells[before..] {
                    trials.note(cell, m);
                }
            }
        }
        let mut rows: Vec<Row> = contenders
            .iter()
            .filter_map(|&kind| row(setting, kind, &cells))
            .collect();
        compare(&mut rows);
        // Without a row, nothing else tells of them.
        for &kind in &contenders {
            let of_kind = cells.iter().filter(|(c, _)| c.kind == kind);
            let wrong: u64 = of_kind.map(|(_, m)| m.wrong_bytes).sum();
            if wrong > 0 && !rows.iter().any(|r| r.contender == kind) {
                failures.push((kind, format!("{WRONG}: {wrong} bytes")));
            }
        }
        let failures = failures
            .into_iter()
            .map(|(kind, why)| (None, Some(format!("{}: {why}", kind.name()))));
        Ok(rows
            .into_iter()
            .map(|r| (Some(r), None))
            .chain(failures)
            .collect())
    }
}

/// Runs a program of its own, by turns.
fn run_programs(
    setting: &Setting,
    turns: &[Cell],
    starting: &mut dyn FnMut(&str),
    cells: &mut Vec<(Cell, Measured)>,
    failures: &mut Vec<(Kind, String)>,
) -> anyhow::Result<()> {
    let program = Program::new()?;
    for cell in turns {
        if failures.iter().any(|(k, _)| *k == cell.kind) {
            continue;
        }
        starting(&label(setting, cell));
        match program.run(setting, cell) {
            Ok(m) => cells.push((cell.clone(), m)),
            Err(e) => failures.push((cell.kind, format!("{e:#}"))),
        }
    }
    Ok(())
}

/// Has a process of its own do what is ordered.
fn run_order(
    order: &Order,
    starting: &mut dyn FnMut(&str),
    cells: &mut Vec<(Cell, Measured)>,
    failures: &mut Vec<(Kind, String)>,
) -> anyhow::Result<()> {
    let mut order = order.clone();
    let group = match order.setting.group_memory {
        Some(bytes) => Some(Group::new("faultless-bench", bytes)?),
        None => None,
    };
    order.group = group.as_ref().map(|group| group.place().clone());
    let setting = &order.setting;
    let mut child = Command::new(std::env::current_exe()?)
        .arg(WORKER_COMMAND)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the process that measures")?;
    let mut input = child.stdin.take().context("the worker has no input")?;
    serde_json::to_writer(&mut input, &order)?;
    drop(input);
    let output = child.stdout.take().context("the worker has no output")?;
    for line in BufReader::new(output).lines() {
        match serde_json::from_str(&line?).context("the worker wrote something odd")? {
            Message::Starting(cell) => starting(&label(setting, &cell)),
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

/// Which variant of each contender was the fastest in its trial.
#[derive(Debug, Default)]
struct Trials(Vec<(Kind, usize, f64)>);

impl Trials {
    /// Takes note of a measurement, if it is a trial.
    fn note(&mut self, cell: &Cell, m: &Measured) {
        if cell.purpose == Purpose::Trial {
            let speed = m.reads as f64 / m.seconds.max(1e-9);
            self.0.push((cell.kind, cell.variant, speed));
        }
    }

    /// The same measurement with the variant that won, if there was a trial.
    fn choose(&self, mut cell: Cell) -> Cell {
        if cell.purpose != Purpose::Trial
            && let Some((_, variant, _)) = self
                .0
                .iter()
                .filter(|t| t.0 == cell.kind)
                .max_by(|a, b| a.2.total_cmp(&b.2))
        {
            cell.variant = *variant;
        }
        cell
    }
}

/// What is being measured, for whoever shows progress.
fn label(setting: &Setting, cell: &Cell) -> String {
    format!(
        "{}, {} threads: {}{}",
        setting.scenario.name(),
        setting.threads,
        cell.kind.name(),
        match cell.purpose {
            Purpose::Trial => ", a trial",
            Purpose::Counted => ", counting mmap_lock",
            Purpose::Timed => "",
        }
    )
}

/// Whether a contender was the first in the round of a measurement. (A contender that failed is in no round.)
fn is_first(cell: &Cell, cells: &[(Cell, Measured)]) -> bool {
    !cells.iter().any(|(other, _)| {
        other.purpose == cell.purpose && other.round == cell.round && other.place < cell.place
    })
}

/// The medians of a contender's timed measurements.
fn row(setting: &Setting, kind: Kind, cells: &[(Cell, Measured)]) -> Option<Row> {
    fn counted_misses(m: &Measured) -> u64 {
        m.misses + m.first_misses
    }
    let of_kind = || cells.iter().filter(move |(c, _)| c.kind == kind);
    let timed: Vec<&(Cell, Measured)> = of_kind()
        .filter(|(c, _)| c.purpose == Purpose::Timed)
        .collect();
    let variant = timed.first()?.0.variant;
    let ms: Vec<&Measured> = timed.iter().map(|(_, m)| m).collect();
    let counted: Option<&Measured> = of_kind()
        .find(|(c, _)| c.purpose == Purpose::Counted)
        .map(|(_, m)| m);
    let med = |f: &dyn Fn(&Measured) -> f64| median(ms.iter().map(|m| f(m)).collect());
    let med_if = |f: &dyn Fn(&Measured) -> Option<f64>| {
        let values: Vec<f64> = ms.iter().filter_map(|m| f(m)).collect();
        (!values.is_empty()).then(|| median(values))
    };
    let range = |f: &dyn Fn(&Measured) -> f64| Range::of(ms.iter().map(|m| f(m)));
    let range_if = |f: &dyn Fn(&Measured) -> Option<f64>| Range::of(ms.iter().filter_map(|m| f(m)));
    let per_miss = |locks: &dyn Fn(&Measured) -> Option<u64>| {
        let m = counted?;
        Some(locks(m)? as f64 / counted_misses(m).max(1) as f64)
    };
    let speed = |m: &Measured| m.reads as f64 / m.seconds;
    let cpu_us = |m: &Measured| m.cpu_s * 1e6 / m.misses.max(1) as f64;
    let device = |m: &Measured| m.device_bytes as f64 / PAGE as f64 / m.reads.max(1) as f64;
    Some(Row {
        scenario: setting.scenario,
        contender: kind,
        variant: match (kind, variant) {
            (Kind::UffdMonitor, n) => format!("monitors={n}"),
            (Kind::Floor, n) => floor::variant_name(n).to_owned(),
            (kind, 1) if kind.is_kernel_mmap() => "no MADV_RANDOM".to_owned(),
            _ => String::new(),
        },
        threads: setting.threads,
        memory: setting.memory,
        rounds: ms.len(),
        first_in_rounds: timed.iter().filter(|(c, _)| is_first(c, cells)).count(),
        seconds: med(&|m| m.seconds),
        reads: med(&|m| m.reads as f64) as u64,
        reads_per_s: med(&speed),
        reads_per_s_by_round: timed.iter().map(|(c, m)| (c.round, speed(m))).collect(),
        against_baseline: None,
        p50_us: med(&|m| m.p50_us),
        p99_us: med(&|m| m.p99_us),
        p999_us: med(&|m| m.p999_us),
        max_us: ms.iter().map(|m| m.max_us).fold(0.0, f64::max),
        neighbour_per_s: med_if(&|m| m.neighbour_per_s),
        neighbour_p99_us: med_if(&|m| m.neighbour_p99_us),
        misses: med(&|m| m.misses as f64) as u64,
        counted_misses: counted.map(counted_misses),
        mmap_lock_per_miss: per_miss(&|m| m.locks_readers),
        mmap_lock_per_miss_process: per_miss(&|m| m.locks_process),
        device_bytes: med(&|m| m.device_bytes as f64) as u64,
        cpu_s: med(&|m| m.cpu_s),
        cpu_us_per_miss: med(&cpu_us),
        onlooker_cpu_s: med_if(&|m| m.onlooker_cpu_s),
        onlooker_resident_bytes: ms.iter().filter_map(|m| m.onlooker_resident_bytes).max(),
        onlooker_lost: ms.iter().map(|m| m.onlooker_lost).sum(),
        latency_us: {
            let points = ms.iter().map(|m| m.latency_us.len()).min().unwrap_or(0);
            (0..points).map(|i| med(&|m| m.latency_us[i])).collect()
        },
        reads_over_time: ms.iter().map(|m| m.reads_over_time.clone()).collect(),
        device_reads_per_read: med(&device),
        spread: (ms.len() > 1)
            .then(|| {
                Some(Spread {
                    reads_per_s: range(&speed)?,
                    p50_us: range(&|m| m.p50_us)?,
                    p99_us: range(&|m| m.p99_us)?,
                    p999_us: range(&|m| m.p999_us)?,
                    max_us: range(&|m| m.max_us)?,
                    cpu_s: range(&|m| m.cpu_s)?,
                    cpu_us_per_miss: range(&cpu_us)?,
                    device_reads_per_read: range(&device)?,
                    neighbour_per_s: range_if(&|m| m.neighbour_per_s),
                    neighbour_p99_us: range_if(&|m| m.neighbour_p99_us),
                    onlooker_cpu_s: range_if(&|m| m.onlooker_cpu_s),
                })
            })
            .flatten(),
        over_budget_bytes: ms.iter().filter_map(|m| m.over_budget_bytes).max(),
        resident_max_bytes: ms.iter().map(|m| m.resident_max_bytes).max().unwrap_or(0),
        // Of trials and of the counted round as well: no wrong byte goes unreported.
        wrong_bytes: of_kind().map(|(_, m)| m.wrong_bytes).sum(),
    })
}

/// Sets each row of a setting beside the row of the baseline.
fn compare(rows: &mut [Row]) {
    let Some(baseline) = rows.iter().find(|r| r.contender.is_baseline()) else {
        return;
    };
    let baseline = baseline.reads_per_s_by_round.clone();
    for row in rows {
        row.against_baseline = Ratio::of(&row.reads_per_s_by_round, &baseline);
    }
}

/// How the rows of a setting came about, for a line beneath their table.
pub fn about_rounds(rows: &[Row]) -> String {
    let Some(first) = rows.first() else {
        return String::new();
    };
    let rounds = rows.iter().map(|r| r.rounds).max().unwrap_or(0);
    let mut text = match rounds {
        1 => format!(
            "One round of {:.1} s: it says nothing of how far rounds differ.",
            first.seconds
        ),
        n => format!(
            "Medians of {n} rounds of {:.1} s; beneath each, the least and the most of them.",
            first.seconds
        ),
    };
    if rows.len() > 1 {
        let firsts: Vec<String> = rows
            .iter()
            .map(|r| format!("{} in {}", r.contender.name(), r.first_in_rounds))
            .collect();
        if rows
            .iter()
            .all(|r| r.first_in_rounds == first.first_in_rounds)
        {
            text += &format!(
                " Each contender was first in {} of them.",
                first.first_in_rounds
            );
        } else {
            text += &format!(
                " The contenders were not first equally often: {}",
                firsts.join(", ")
            );
            if !rounds.is_multiple_of(rows.len()) {
                text += &format!(" (--rounds {} would do)", balanced_rounds(rows.len()));
            }
            text.push('.');
        }
    }
    if rows.iter().any(|r| r.mmap_lock_per_miss.is_some()) {
        text += " mmap_lock was counted in a further round, whose times are in no figure.";
    }
    text
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
    let bench = Bench::new(order.setting, order.group)?;
    let mut trials = Trials::default();
    let mut broken: Vec<Kind> = Vec::new();
    for cell in order.cells {
        if broken.contains(&cell.kind) {
            continue;
        }
        let cell = trials.choose(cell);
        say(&Message::Starting(cell.clone()))?;
        match bench.run(&cell) {
            Ok(m) => {
                trials.note(&cell, &m);
                say(&Message::Measured(cell, m))?;
            }
            Err(e) => {
                say(&Message::Failed(cell.kind, format!("{e:#}")))?;
                broken.push(cell.kind);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(contenders: &[Kind], rounds: Option<usize>) -> Plan {
        Plan {
            scenarios: Vec::new(),
            contenders: contenders.to_vec(),
            threads: Some(4),
            depth: 8,
            seconds: 0.8,
            rounds,
            count_locks: true,
            file: PathBuf::new(),
            size: ByteSize::gib(4),
            warm: false,
            memory: ByteSize::gib(2),
            monitors: Some(16),
            part: None,
            storage_delay: None,
        }
    }

    fn setting() -> Setting {
        Setting {
            scenario: Scenario::Quiet,
            threads: 4,
            depth: 8,
            seconds: 1.0,
            warm_seconds: 0.0,
            memory_over: 0,
            group_memory: None,
            lowered: None,
            parts: 3,
            file: PathBuf::new(),
            size: 0,
            memory: 0,
        }
    }

    /// A measurement of a second.
    fn cell(
        purpose: Purpose,
        kind: Kind,
        round: usize,
        place: usize,
        reads: u64,
    ) -> (Cell, Measured) {
        let m = Measured {
            seconds: 1.0,
            reads,
            p99_us: reads as f64,
            misses: 8,
            first_misses: 2,
            locks_readers: (purpose == Purpose::Counted).then_some(5),
            wrong_bytes: 1,
            ..Measured::default()
        };
        let cell = Cell {
            purpose,
            kind,
            variant: 16,
            round,
            place,
            part: round,
        };
        (cell, m)
    }

    #[test]
    fn a_row_has_the_medians_of_the_timed_rounds_and_the_locks_of_the_counted_one() {
        use Purpose::{Counted, Timed, Trial};
        let uffd = |purpose, round, reads| cell(purpose, Kind::UffdMonitor, round, 0, reads);
        let cells = [
            uffd(Trial, 0, 1_000),
            // Counting is slow, and must not show.
            uffd(Counted, 0, 1),
            uffd(Timed, 0, 70),
            uffd(Timed, 1, 90),
            uffd(Timed, 2, 80),
        ];
        let r = row(&setting(), Kind::UffdMonitor, &cells).expect("measured");
        assert_eq!(
            (r.variant.as_str(), r.rounds, r.reads, r.first_in_rounds),
            ("monitors=16", 3, 80, 3)
        );
        let spread = r.spread.expect("three rounds");
        assert_eq!(
            (spread.reads_per_s.min, spread.reads_per_s.max),
            (70.0, 90.0)
        );
        assert_eq!((spread.p99_us.min, spread.p99_us.max), (70.0, 90.0));
        assert_eq!(r.reads_over_time.len(), 3);
        // The first miss of each reader is among the misses: 5 of 8 + 2.
        assert_eq!(
            (r.mmap_lock_per_miss, r.mmap_lock_per_miss_process),
            (Some(0.5), None)
        );
        assert_eq!((r.counted_misses, r.misses), (Some(10), 8));
        assert_eq!(r.wrong_bytes, 5);
        assert!(row(&setting(), Kind::Mmap, &cells).is_none());
        assert!(row(&setting(), Kind::UffdMonitor, &cells[..2]).is_none());
        // Where nothing is counted.
        let r = row(&setting(), Kind::UffdMonitor, &cells[2..]).expect("measured");
        assert_eq!((r.mmap_lock_per_miss, r.counted_misses), (None, None));
        let r = row(&setting(), Kind::UffdMonitor, &cells[4..]).expect("measured");
        assert_eq!(r.spread, None);
    }

    #[test]
    fn each_contender_is_first_in_equally_many_timed_rounds() {
        for (scenario, of, rounds) in [
            (Scenario::Quiet, &Kind::ALL[..], 5),
            (Scenario::Scan, &Kind::ALL[..], 3),
            (Scenario::PressureZipf, &Kind::ALL[..], 3),
            (Scenario::Smaps, &Kind::UNMODIFIED[..], 3),
            (Scenario::Quiet, &Kind::OBSERVED[..], 4),
        ] {
            let plan = plan(of, None);
            let turns = plan.turns(scenario, 16, true);
            let contenders = plan.contenders(scenario);
            for kind in &contenders {
                let first = |t: &&Cell| t.purpose == Purpose::Timed && t.place == 0;
                let times = turns
                    .iter()
                    .filter(first)
                    .filter(|t| t.kind == *kind)
                    .count();
                assert_eq!(times, rounds / contenders.len(), "{scenario:?} {kind:?}");
            }
            let timed = turns.iter().filter(|t| t.purpose == Purpose::Timed);
            assert_eq!(timed.count(), rounds * contenders.len());
        }
    }

    #[test]
    fn the_counted_round_is_apart_and_reads_other_pages() {
        let plan = plan(&Kind::ALL, Some(2));
        let turns = plan.turns(Scenario::Quiet, 16, true);
        let purposes: Vec<Purpose> = turns.iter().map(|t| t.purpose).collect();
        assert_eq!(purposes[..5], [Purpose::Counted; 5]);
        assert_eq!(purposes[5..], [Purpose::Timed; 10]);
        let parts: Vec<usize> = turns.iter().step_by(5).map(|t| t.part).collect();
        assert_eq!((parts, plan.parts(&turns)), (vec![0, 1, 2], 3));
        let turns = plan.turns(Scenario::Quiet, 16, false);
        assert!(turns.iter().all(|t| t.purpose == Purpose::Timed));
        // As validate has it: one round, of pages that it names.
        let plan = Plan {
            part: Some((2, 5)),
            ..plan
        };
        assert!(turns.len() == 10 && plan.parts(&turns) == 5);
        assert_eq!(plan.turns(Scenario::Quiet, 16, false)[0].part, 2);
    }

    #[test]
    fn a_trial_decides_and_is_not_among_the_rounds() {
        let plan = plan(&Kind::ALL, None);
        let turns = plan.turns(Scenario::PressureUniform, 16, true);
        let trials = turns.iter().filter(|t| t.purpose == Purpose::Trial);
        let trials: Vec<_> = trials.map(|t| (t.kind, t.variant, t.part)).collect();
        assert_eq!(trials, [(Kind::Mmap, 0, 0), (Kind::Mmap, 1, 1)]);
        assert_eq!(turns[2].part, 2);
        let mut chosen = Trials::default();
        for (turn, reads) in turns.iter().zip([10, 20, 5]) {
            let m = Measured {
                seconds: 1.0,
                reads,
                ..Measured::default()
            };
            chosen.note(turn, &m);
        }
        for turn in turns {
            let (kind, purpose, planned) = (turn.kind, turn.purpose, turn.variant);
            let variant = chosen.choose(turn).variant;
            match (kind, purpose) {
                (Kind::Mmap, Purpose::Counted | Purpose::Timed) => assert_eq!(variant, 1),
                _ => assert_eq!(variant, planned),
            }
        }
    }

    #[test]
    fn rows_are_set_beside_the_baseline_round_by_round() {
        let mut cells = Vec::new();
        for (round, mmap, ours) in [(0, 100, 110), (1, 200, 190)] {
            cells.push(cell(Purpose::Timed, Kind::Mmap, round, round, mmap));
            cells.push(cell(
                Purpose::Timed,
                Kind::Faultless,
                round,
                1 - round,
                ours,
            ));
        }
        let row = |kind| row(&setting(), kind, &cells).expect("measured");
        let mut rows = [row(Kind::Mmap), row(Kind::Faultless)];
        compare(&mut rows);
        let ratio = rows[1].against_baseline.expect("a ratio");
        assert_eq!(ratio.text(), "≈ 1");
        assert_eq!(ratio.spread().as_deref(), Some("0.95–1.10"));
        let text = about_rounds(&rows);
        assert!(
            text.contains("Each contender was first in 1 of them."),
            "{text}"
        );
        rows[0].first_in_rounds = 2;
        rows.iter_mut().for_each(|r| r.rounds = 3);
        let text = about_rounds(&rows);
        assert!(text.contains("mmap in 2, faultless in 1"), "{text}");
        assert!(text.contains("--rounds 4 would do"), "{text}");
        let text = about_rounds(&rows[..0]);
        assert!(text.is_empty());
    }
}
