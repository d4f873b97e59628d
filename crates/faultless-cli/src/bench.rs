//! `faultless bench`.

use clap::ValueEnum;
use comfy_table::{CellAlignment, Table, presets};
use faultless::ByteSize;
use faultless_bench::contender::Kind;
use faultless_bench::fast::Fast;
use faultless_bench::plan::{Plan, Progress, Report, Row, about_rounds};
use faultless_bench::scenario::{Access, Scenario};
use faultless_bench::simulate::{self, Judgement};
use faultless_bench::spread::Range;
use faultless_untrusted::output::Readers;
use faultless_untrusted::printable;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

/// Measure the kernel's mmap, pread, userfaultfd with monitor threads, and Faultless, beside busy neighbours.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Every contender reads the same pages of the same file, in the same random order, and all 4,096 bytes of each page are
checked. fio is an exception: it chooses its own pages, and their bytes are not checked. Without arguments the scenarios about
mmap_lock are run (quiet, churn, smaps, smaps-gentle, pagemap, fork, bigfree), in about ten minutes; \"all\" takes an hour. The data file is kept for the next run.

A row's figures are medians over the rounds, and beneath each are the least and the most of them. The contenders take
turns within each round, and each is first equally often if --rounds is a multiple of their number. \"× mmap\" is the ratio
of the reads per second to those of the kernel's mmap in the same rounds; \"≈ 1\" where some rounds say more and some say
less. Acquisitions of mmap_lock are counted in a further round, whose times are in no figure.

The title of each table says what the neighbour does.")]
pub(crate) struct Args {
    /// What is read, in what order, beside whom.
    #[arg(value_enum)]
    scenario: Vec<ScenarioArg>,
    /// The data file; made if it does not exist.
    #[arg(long, default_value = "faultless-bench.data")]
    file: PathBuf,
    /// How much of the data file to use.
    #[arg(long, default_value = "4G", value_parser = size)]
    size: ByteSize,
    /// Memory budget of the contenders that have one (faultless).
    #[arg(long, default_value = "2G", value_parser = size)]
    memory: ByteSize,
    /// Reader threads [default: 16; in quiet 1, 4, 16, 64 and 256].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=4096))]
    threads: Option<u16>,
    /// Use so many of the processors that this process may use [default: all].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    cores: Option<u16>,
    /// Reads that each thread has in flight, by the contenders that have several: uring, fio, faultless-batch, faultless-async.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    depth: u16,
    /// Length of one measurement, in seconds (pressure, latency and smaps-gentle: twice to three times as long).
    #[arg(long, default_value_t = 0.8, value_parser = seconds)]
    seconds: f64,
    /// Timed measurements of each contender in each setting [default: 3 or 4, so that each contender is first equally
    /// often].
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: Option<u16>,
    /// Where the data is: a file on a disk, or a disk in memory (zram with ext4; root) that is taken down afterwards.
    #[arg(long, value_enum, default_value_t = StorageArg::Disk, conflicts_with_all = ["file", "storage_delay"])]
    storage: StorageArg,
    /// Serve the data by a file system of this program's own (FUSE) that answers each read after so long, such as 5ms.
    #[arg(long, value_parser = delay)]
    storage_delay: Option<Duration>,
    /// Only these contenders.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAME,…")]
    contenders: Vec<KindArg>,
    /// Measure a plain C program that maps the file, by itself and under `faultless run`, in place of the contenders.
    #[arg(long, conflicts_with_all = ["contenders", "storage_delay"])]
    unmodified: bool,
    /// Measure what observing costs: the kernel's mmap by itself, under `faultless observe`, with its --trace, and under
    /// `perf record` of the same tracepoints.
    #[arg(long, conflicts_with_all = ["contenders", "unmodified"])]
    observed: bool,
    /// Print one JSON object instead of tables.
    #[arg(long)]
    json: bool,
    /// Write a self-contained page with plots, too.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum StorageArg {
    Disk,
    Fast,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ScenarioArg {
    /// Cold random reads, and nobody else.
    Quiet,
    /// … beside threads that map and unmap (an allocator under load).
    Churn,
    /// … while another process reads smaps_rollup without pause, beside a thread that maps (the most eager of agents).
    Smaps,
    /// … while another process reads smaps_rollup once a second (an ordinary metrics agent).
    SmapsGentle,
    /// … while another process scans the page tables without pause, beside a thread that maps (a checkpoint; Linux 6.7).
    Pagemap,
    /// … beside a thread that forks.
    Fork,
    /// … beside a thread that allocates and frees 1 GiB (a growing hash table).
    Bigfree,
    /// In a control group of an eighth of the data: uniform, Zipf, Zipf with a scan.
    Pressure,
    /// The first of these alone
    PressureUniform,
    /// The second
    PressureZipf,
    /// The third
    PressureScan,
    /// The first, beside threads that map and unmap.
    PressureChurn,
    /// The first, while another process reads smaps_rollup without pause.
    PressureSmaps,
    /// The second, with a budget that is larger than the group's memory, too.
    PressureOver,
    /// The second, in a group whose memory is halved meanwhile.
    PressureShrink,
    /// Quiet, by every way to ask for a page: faults, MADV_POPULATE_READ, loads that ask first, batches, futures, pread, io_uring (and
    /// fio, if it is installed).
    Reads,
    /// All of the data in order, by words.
    Scan,
    /// Random loads from resident pages.
    Hot,
    /// Storage that answers after 5 ms and 50 ms, beside churn.
    Latency,
    /// With --unmodified: all pages are in memory, and halfway somebody opens the file for writing.
    Writer,
    /// All of these, but for reads.
    All,
    /// Eviction alone, judged by generated traces in a simulator.
    Policy,
}

impl ScenarioArg {
    fn scenarios(self) -> Vec<Scenario> {
        match self {
            ScenarioArg::Quiet => vec![Scenario::Quiet],
            ScenarioArg::Churn => vec![Scenario::Churn],
            ScenarioArg::Smaps => vec![Scenario::Smaps],
            ScenarioArg::SmapsGentle => vec![Scenario::SmapsGentle],
            ScenarioArg::Pagemap => vec![Scenario::Pagemap],
            ScenarioArg::Fork => vec![Scenario::Fork],
            ScenarioArg::Bigfree => vec![Scenario::Bigfree],
            ScenarioArg::PressureUniform => vec![Scenario::PressureUniform],
            ScenarioArg::PressureZipf => vec![Scenario::PressureZipf],
            ScenarioArg::PressureScan => vec![Scenario::PressureScan],
            ScenarioArg::PressureChurn => vec![Scenario::PressureChurn],
            ScenarioArg::PressureSmaps => vec![Scenario::PressureSmaps],
            ScenarioArg::PressureOver => vec![Scenario::PressureOver],
            ScenarioArg::PressureShrink => vec![Scenario::PressureShrink],
            ScenarioArg::Pressure => vec![
                Scenario::PressureUniform,
                Scenario::PressureZipf,
                Scenario::PressureScan,
            ],
            ScenarioArg::Reads => vec![Scenario::Reads],
            ScenarioArg::Scan => vec![Scenario::Scan],
            ScenarioArg::Hot => vec![Scenario::HotInOrder, Scenario::HotAtRandom],
            ScenarioArg::Latency => vec![Scenario::Latency5, Scenario::Latency50],
            ScenarioArg::Writer => vec![Scenario::Writer],
            ScenarioArg::All => {
                let all = Scenario::ALL.into_iter();
                all.filter(|&s| s != Scenario::Reads).collect()
            }
            ScenarioArg::Policy => Vec::new(),
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum KindArg {
    Mmap,
    Pread,
    UffdMonitor,
    Floor,
    Populate,
    Faultless,
    FaultlessLoad,
    FaultlessLive,
    FaultlessMarked,
    FaultlessBatch,
    FaultlessAsync,
    FaultlessHuge,
    Uring,
    Fio,
    FaultlessOver,
}

impl From<KindArg> for Kind {
    fn from(k: KindArg) -> Kind {
        match k {
            KindArg::Mmap => Kind::Mmap,
            KindArg::Pread => Kind::Pread,
            KindArg::UffdMonitor => Kind::UffdMonitor,
            KindArg::Floor => Kind::Floor,
            KindArg::Populate => Kind::Populate,
            KindArg::Faultless => Kind::Faultless,
            KindArg::FaultlessLoad => Kind::FaultlessLoad,
            KindArg::FaultlessLive => Kind::FaultlessLive,
            KindArg::FaultlessMarked => Kind::FaultlessMarked,
            KindArg::FaultlessBatch => Kind::FaultlessBatch,
            KindArg::FaultlessAsync => Kind::FaultlessAsync,
            KindArg::FaultlessHuge => Kind::FaultlessHuge,
            KindArg::Uring => Kind::Uring,
            KindArg::Fio => Kind::Fio,
            KindArg::FaultlessOver => Kind::FaultlessOver,
        }
    }
}

pub(crate) fn size(text: &str) -> Result<ByteSize, String> {
    text.parse()
        .map_err(|e: faultless::ParseByteSizeError| e.to_string())
}

fn delay(text: &str) -> Result<Duration, String> {
    let units = [("us", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    let seconds = units.iter().find_map(|(unit, seconds)| {
        let number = text.strip_suffix(unit)?.trim();
        number.parse::<f64>().ok().map(|n| n * seconds)
    });
    match seconds {
        Some(s) if (0.0..=60.0).contains(&s) => Ok(Duration::from_secs_f64(s)),
        _ => Err("it must be a time up to 60s with its unit, such as 500us, 5ms or 1s".to_owned()),
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(s) if (0.05..=3600.0).contains(&s) => Ok(s),
        _ => Err("it must be a number from 0.05 to 3600".to_owned()),
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if let Some(n) = args.cores {
        // (Before any thread is there: those that come, and the processes, have the same.)
        if let Err(e) = faultless_bench::machine::use_processors(usize::from(n)) {
            usage_error(&format!("--cores {n}: {e}"));
        }
    }
    if args
        .scenario
        .iter()
        .any(|s| matches!(s, ScenarioArg::Policy))
    {
        if args.scenario.len() > 1 {
            usage_error("policy is a simulation, and runs alone; leave the other scenarios out");
        }
        if args.html.is_some() {
            usage_error("--html: policy has no plots; use --json, or leave it out");
        }
        return judge_policies(args.json);
    }
    let mut scenarios: Vec<Scenario> = args
        .scenario
        .into_iter()
        .flat_map(ScenarioArg::scenarios)
        .collect();
    if scenarios.is_empty() {
        scenarios = Scenario::ABOUT_THE_LOCK.to_vec();
    }
    let mut contenders: Vec<Kind> = args.contenders.into_iter().map(Kind::from).collect();
    if args.unmodified {
        contenders = Kind::UNMODIFIED.to_vec();
        if let Err(why) = faultless::live::support() {
            eprintln!("faultless: without live mappings: {why}");
            contenders.retain(|&kind| kind != Kind::ProgramLive);
        }
        // Found out before minutes are spent.
        crate::run::library()?;
    } else if args.observed {
        contenders = Kind::OBSERVED.to_vec();
    } else if contenders.is_empty() {
        contenders = match scenarios[..] {
            [Scenario::Reads] => Kind::READS.to_vec(),
            _ => Kind::ALL.to_vec(),
        };
        if contenders.contains(&Kind::Fio) && !faultless_bench::fio::is_installed() {
            eprintln!("faultless: left out: fio, since none with io_uring is installed");
            contenders.retain(|&kind| kind != Kind::Fio);
        }
    } else if contenders.contains(&Kind::Fio) {
        anyhow::ensure!(
            faultless_bench::fio::is_installed(),
            "no fio with io_uring is installed: install the package fio, or name other --contenders"
        );
    }
    unique(&mut scenarios);
    unique(&mut contenders);
    let mut plan = Plan {
        scenarios,
        contenders,
        threads: args.threads.map(usize::from),
        depth: usize::from(args.depth),
        seconds: args.seconds,
        rounds: args.rounds.map(usize::from),
        count_locks: true,
        file: args.file,
        size: args.size,
        warm: true,
        memory: args.memory,
        monitors: None,
        part: None,
        storage_delay: args.storage_delay,
    };
    // Checked before minutes are spent: the engine itself refuses such a budget.
    let budget = faultless::Pool::builder().memory(plan.memory).build();
    if let Err(e @ faultless::Error::InvalidOption { .. }) = &budget {
        usage_error(&format!("--memory: {e}"));
    }
    drop(budget);
    if let Err(e) = faultless_bench::data::check_size(plan.size) {
        usage_error(&format!("--size: {e}"));
    }

    // Known before minutes are spent as well.
    if let Some(path) = args.html.as_ref().filter(|p| p.is_dir()) {
        usage_error(&format!(
            "--html: {} is a directory; name a file in it",
            printable(&path)
        ));
    }
    if let Some(path) = &args.html
        && let Some(dir) = path.parent().filter(|d| !d.as_os_str().is_empty())
        && !dir.is_dir()
    {
        usage_error(&format!(
            "--html: {} is not a directory; make it first, or name another",
            printable(&dir)
        ));
    }

    let mut bar = Bar::default();
    let fast = match args.storage {
        StorageArg::Disk => None,
        StorageArg::Fast => Some(Fast::start(plan.size)?),
    };
    if let Some(fast) = &fast {
        plan.file = fast.file();
        if let Some(note) = fast.note() {
            bar.show(Progress::Note(note.to_owned()));
        }
    }
    let report = plan.run(&mut |p| bar.show(p))?;
    drop(fast);
    bar.clear();
    if args.json {
        std::io::stdout().write_all(crate::output::json(&report)?.as_bytes())?;
    } else {
        // Whoever closes the pipe has seen enough.
        let _ = std::io::stdout().write_all(tables(&report).as_bytes());
    }
    if let Some(path) = &args.html {
        // Nothing half-written: the page appears whole, or not at all.
        let page = faultless_bench::html::page(&report)?;
        let (output, mut file) = crate::output::create(path, Readers::AsUsual)?;
        let written = file.write_all(page.as_bytes());
        output.finish(written.map(|()| file))?;
        eprintln!("faultless: plots are in {}", printable(path));
    }
    for left_out in &report.left_out {
        eprintln!("faultless: left out: {}", printable(left_out));
    }
    for failed in &report.failed {
        eprintln!("faultless: failed: {}", printable(failed));
    }
    let wrong = report.wrong_bytes();
    anyhow::ensure!(
        wrong == 0,
        "{wrong} bytes were wrong: these figures are worth nothing"
    );
    anyhow::ensure!(!report.rows.is_empty(), "nothing could be measured here");
    anyhow::ensure!(
        report.failed.is_empty(),
        "{} measurements failed (above); the others are good",
        report.failed.len()
    );
    Ok(())
}

/// `faultless bench policy`: pages, touches, and the parts of the pages that caches hold.
const POLICY_PAGES: u32 = 1 << 17;
const POLICY_TOUCHES: usize = 2_000_000;
const POLICY_CACHES: [u32; 3] = [4, 8, 32];

#[derive(Serialize)]
struct Judged {
    /// The cache holds this part of the pages.
    fraction: u32,
    traces: Vec<Judgement>,
}

fn judge_policies(json: bool) -> anyhow::Result<()> {
    let mut bar = Bar::default();
    let mut all = Vec::new();
    for (i, fraction) in POLICY_CACHES.into_iter().enumerate() {
        let traces = simulate::judge(POLICY_PAGES, fraction, POLICY_TOUCHES, |n, of| {
            bar.show(Progress::Cell(
                i * of + n,
                POLICY_CACHES.len() * of,
                "simulating",
            ))
        });
        all.push(Judged { fraction, traces });
    }
    bar.clear();
    let mut out = std::io::stdout().lock();
    if json {
        out.write_all(crate::output::json(&all)?.as_bytes())?;
        return Ok(());
    }
    let mut text = format!(
        "Share of touches that miss: {POLICY_PAGES} pages, {POLICY_TOUCHES} touches, of which the second half counts.\n\
         \"faultless\" sees no loads of resident pages; \"seen\" are accesses that are seen (pins); \"uncooled\" is without\n\
         the cooling area; \"swept\" is without it too, and as if the engine asked Linux 7.3 now and then which pages were touched.\n\
         All others see every access.\n"
    );
    for judged in &all {
        let _ = writeln!(
            text,
            "\nThe cache holds 1/{} of the pages:",
            judged.fraction
        );
        let mut t = Table::new();
        t.load_preset(presets::NOTHING);
        t.set_header([
            "",
            "LRU",
            "CLOCK",
            "2Q",
            "S3-FIFO",
            "faultless",
            "× S3-FIFO",
            "seen",
            "swept",
            "uncooled",
            "rescues/miss",
        ]);
        for j in &judged.traces {
            let ratio = |x: f64| format!("{x:.4}");
            t.add_row([
                j.trace.clone(),
                ratio(j.lru),
                ratio(j.clock),
                ratio(j.two_q),
                ratio(j.s3_fifo),
                ratio(j.invisible),
                format!("{:.3}", j.against_s3_fifo()),
                ratio(j.seen),
                ratio(j.swept),
                ratio(j.uncooled),
                format!("{:.2}", j.rescues_per_miss),
            ]);
        }
        for column in t.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let _ = writeln!(text, "{t}");
    }
    let _ = out.write_all(text.as_bytes());
    Ok(())
}

/// Ends the program as a wrong command line does.
pub(crate) fn usage_error(text: &str) -> ! {
    eprintln!("faultless: {}", printable(text).lines());
    std::process::exit(2)
}

/// Drops repetitions and keeps the order.
pub(crate) fn unique<T: PartialEq + Copy>(items: &mut Vec<T>) {
    let mut seen = Vec::new();
    items.retain(|&i| {
        let new = !seen.contains(&i);
        seen.push(i);
        new
    });
}

/// Progress on a terminal; nothing in a pipe (indicatif sees to that).
#[derive(Default)]
pub(crate) struct Bar {
    bar: Option<ProgressBar>,
    /// Of what kind, and how long.
    shown: (&'static str, u64),
}

impl Bar {
    pub(crate) fn show(&mut self, p: Progress<'_>) {
        match p {
            Progress::Data(n, of) => {
                self.bar(
                    of,
                    "making the data file {bar:40} {bytes}/{total_bytes}, {eta} left",
                )
                .set_position(n);
            }
            Progress::Warm(n, of) => {
                self.bar(
                    of,
                    "reading it once {bar:40} {bytes}/{total_bytes}, {eta} left",
                )
                .set_position(n);
            }
            Progress::Cell(n, of, label) => {
                let bar = self.bar(of as u64, "{bar:40} {pos}/{len} {msg}");
                bar.set_position(n as u64);
                bar.set_message(label.to_owned());
            }
            Progress::Note(text) => {
                let text = printable(&text).lines();
                match &self.bar {
                    Some(bar) => bar.suspend(|| eprintln!("faultless: {text}")),
                    None => eprintln!("faultless: {text}"),
                }
            }
        }
    }

    fn bar(&mut self, length: u64, template: &'static str) -> &ProgressBar {
        if self.shown != (template, length) {
            self.clear();
        }
        self.shown = (template, length);
        self.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(length).with_style(style)
        })
    }

    pub(crate) fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

fn tables(report: &Report) -> String {
    let mut text = String::new();
    let _ = writeln!(text, "{}", report.machine.line());
    if let Some(us) = report.storage_delay_us {
        let _ = writeln!(
            text,
            "The data is not on that disk: a file system of this program's own answers after {}",
            micros(us as f64)
        );
    }
    let mut rest = &report.rows[..];
    while let Some(first) = rest.first() {
        let same = |r: &Row| r.scenario == first.scenario && r.threads == first.threads;
        let n = rest.iter().take_while(|r| same(r)).count();
        let (group, others) = rest.split_at(n);
        let _ = writeln!(
            text,
            "\n{}, {} threads: {}",
            first.scenario.name(),
            first.threads,
            first.scenario.describe(
                ByteSize::new(report.size),
                report.storage_delay_us.map(Duration::from_micros)
            )
        );
        let _ = writeln!(text, "{}\n{}", table(group), about_rounds(group));
        rest = others;
    }
    text
}

/// A figure, and beneath it the least and the most of its rounds.
fn with_spread(text: String, range: Option<Range>, show: impl Fn(f64) -> String) -> String {
    match range {
        Some(range) => format!("{text}\n{}", range.text(show)),
        None => text,
    }
}

/// How many times as fast as the baseline, and beneath that the least and the most of the rounds.
fn against_baseline(row: &Row) -> String {
    match &row.against_baseline {
        None => "–".to_owned(),
        // That is 1 by definition.
        Some(ratio) if row.contender.is_baseline() => format!("{:.2}", ratio.value),
        Some(ratio) => match ratio.spread() {
            Some(spread) => format!("{}\n{spread}", ratio.text()),
            None => ratio.text(),
        },
    }
}

fn table(rows: &[Row]) -> Table {
    let mut t = Table::new();
    t.load_preset(presets::NOTHING);
    let access = rows.first().map_or(Access::Cold, |r| r.scenario.access());
    let neighbour = rows.iter().any(|r| r.neighbour_per_s.is_some());
    let pressure = rows.iter().any(|r| r.scenario.pressure());
    let onlooker = rows.iter().any(|r| r.onlooker_cpu_s.is_some());
    let mut header = vec![""];
    match access {
        Access::Hot => header.extend(["loads/s", "× mmap", "ns/load", "p99 of 4,096"]),
        Access::Scan => header.extend(["MiB/s", "× mmap", "CPU s", "mmap_lock/miss"]),
        _ => header.extend([
            "reads/s",
            "× mmap",
            "p50",
            "p99",
            "p99.9",
            "max",
            "CPU/miss",
            "mmap_lock/miss",
        ]),
    }
    if pressure {
        header.extend(["device/read", "process's locks/miss"]);
    }
    if neighbour {
        header.extend(["neighbour/s", "its p99"]);
    }
    if onlooker {
        header.extend(["observer's CPU s", "its memory", "lost"]);
    }
    t.set_header(header);
    for r in rows {
        let name = if r.variant.is_empty() {
            r.contender.name().to_owned()
        } else {
            format!("{} ({})", r.contender.name(), r.variant)
        };
        let spread = r.spread.as_ref();
        let speed = with_spread(count(r.reads_per_s), spread.map(|s| s.reads_per_s), count);
        let locks = |l: Option<f64>| l.map_or_else(|| "?".to_owned(), |l| format!("{l:.4}"));
        let mut line = vec![name];
        match access {
            Access::Hot => {
                let tenths = |x: f64| format!("{x:.1}");
                let ns_per_load = |per_s: f64| r.threads as f64 * 1e9 / per_s;
                let p99_ns = |us: f64| us * 1e3;
                line.extend([
                    speed,
                    against_baseline(r),
                    with_spread(
                        tenths(ns_per_load(r.reads_per_s)),
                        spread.map(|s| s.reads_per_s.map(ns_per_load)),
                        tenths,
                    ),
                    with_spread(
                        tenths(p99_ns(r.p99_us)),
                        spread.map(|s| s.p99_us.map(p99_ns)),
                        tenths,
                    ),
                ]);
            }
            Access::Scan => {
                let mib = |pages: f64| format!("{:.0}", pages * 4096.0 / f64::from(1 << 20));
                let seconds = |s: f64| format!("{s:.2}");
                line.extend([
                    with_spread(mib(r.reads_per_s), spread.map(|s| s.reads_per_s), mib),
                    against_baseline(r),
                    with_spread(seconds(r.cpu_s), spread.map(|s| s.cpu_s), seconds),
                    locks(r.mmap_lock_per_miss),
                ]);
            }
            _ => line.extend([
                speed,
                against_baseline(r),
                with_spread(micros(r.p50_us), spread.map(|s| s.p50_us), micros),
                with_spread(micros(r.p99_us), spread.map(|s| s.p99_us), micros),
                with_spread(micros(r.p999_us), spread.map(|s| s.p999_us), micros),
                with_spread(micros(r.max_us), spread.map(|s| s.max_us), micros),
                // With a neighbour in the same process, its time cannot be told from the readers'.
                if neighbour {
                    "–".to_owned()
                } else {
                    with_spread(
                        micros(r.cpu_us_per_miss),
                        spread.map(|s| s.cpu_us_per_miss),
                        micros,
                    )
                },
                locks(r.mmap_lock_per_miss),
            ]),
        }
        if pressure {
            let thousandths = |x: f64| format!("{x:.3}");
            line.push(with_spread(
                thousandths(r.device_reads_per_read),
                spread.map(|s| s.device_reads_per_read),
                thousandths,
            ));
            line.push(locks(r.mmap_lock_per_miss_process));
        }
        if neighbour {
            let per_s = spread.and_then(|s| s.neighbour_per_s);
            let p99 = spread.and_then(|s| s.neighbour_p99_us);
            line.push(
                r.neighbour_per_s
                    .map_or_else(String::new, |x| with_spread(count(x), per_s, count)),
            );
            line.push(
                r.neighbour_p99_us
                    .map_or_else(String::new, |x| with_spread(micros(x), p99, micros)),
            );
        }
        if onlooker {
            let bytes = |b| format!("{} MiB", b >> 20);
            let seconds = |s: f64| format!("{s:.2}");
            let range = spread.and_then(|s| s.onlooker_cpu_s);
            line.push(
                r.onlooker_cpu_s
                    .map_or_else(String::new, |s| with_spread(seconds(s), range, seconds)),
            );
            line.push(r.onlooker_resident_bytes.map_or_else(String::new, bytes));
            line.push(r.onlooker_lost.map_or_else(String::new, |n| n.to_string()));
        }
        t.add_row(line);
    }
    for column in t.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    t
}

fn count(x: f64) -> String {
    match x {
        x if x >= 9_999_500.0 => format!("{:.1} M", x / 1e6),
        x if x >= 9_999.5 => format!("{:.1} k", x / 1e3),
        x if x >= 99.95 => format!("{x:.0}"),
        x => format!("{x:.1}"),
    }
}

fn micros(us: f64) -> String {
    match us {
        us if us >= 999_500.0 => format!("{:.2} s", us / 1e6),
        us if us >= 999.5 => format!("{:.2} ms", us / 1e3),
        us if us >= 99.5 => format!("{us:.0} µs"),
        us => format!("{us:.1} µs"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_spread_stands_beneath_its_figure() {
        let range = Some(Range {
            min: 40_100.0,
            max: 46_200.0,
        });
        assert_eq!(
            with_spread(count(43_900.0), range, count),
            "43.9 k\n40.1 k–46.2 k"
        );
        assert_eq!(with_spread(count(43_900.0), None, count), "43.9 k");
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(count(123_456.0), "123.5 k");
        assert_eq!(count(7.25), "7.2");
        assert_eq!(micros(45_500.0), "45.50 ms");
        assert_eq!(micros(3.25), "3.2 µs");
        assert_eq!(micros(2_500_000.0), "2.50 s");
    }
}
