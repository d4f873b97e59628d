//! One measurement: some threads read pages through one contender, beside one neighbour, for a while.

#![allow(unsafe_code, reason = "reads resource usage, warms memory")]

use crate::contender::{self, Contender, Hint, Kind, PageBuffer, Terms};
use crate::data::{Permutation, mix, word_of, wrong_bytes};
use crate::fio;
use crate::group::Place;
use crate::machine::LockTracepoint;
use crate::neighbour::{Ballast, Neighbour, histogram};
use crate::onlooker::Onlooker;
use crate::scenario::{Access, Scenario};
use crate::simulate::Zipf;
use anyhow::{Context, bail};
use faultless::ByteSize;
use faultless_sys::mem::PAGE;
use faultless_sys::perf::{Counter, Scope};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Memory that a contender may touch in a second: what is warmed before each measurement.
pub(crate) const WARM_PER_SECOND: u64 = 500 << 20;
/// Theta of the Zipf distributions.
pub(crate) const THETA: f64 = 0.99;
/// Of so many reads in [`Access::ZipfAndScan`], one is the scanning thread's.
pub(crate) const SCAN_SHARE: u64 = 4;
/// Reads by which the scan and the others may be ahead of each other.
const PACE_SLACK: u64 = 3_000;
/// Reads after which a reader looks how far the scan is.
const PACE_LOOK: u64 = 16;
/// Random loads between looks at the clock in [`Access::Hot`].
const HOT_LOADS: u64 = 4096;
/// Most memory that the hot scenarios load from, and threads that make it resident at random.
const HOT_MAX: u64 = 1 << 30;
const HOT_READERS: usize = 32;
/// Time between two points of the throughput's curve.
pub const SAMPLE: Duration = Duration::from_millis(20);
/// Quantiles of the latency that are reported.
pub const QUANTILES: [f64; 15] = [
    0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975, 0.99, 0.995, 0.9975, 0.999, 0.9995, 0.9999, 1.0,
];

/// How long the limit of a group may take to be lowered while the readers read.
const LOWER_WAIT: Duration = Duration::from_secs(2);

/// How a failure begins that is about wrong bytes.
pub const WRONG: &str = "wrong bytes";

/// The purpose of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    /// Finds out which of a contender's variants is the fastest. No figure of it is reported.
    Trial,
    /// Counts acquisitions of `mmap_lock`. Counting costs the contender that takes the lock most, so its times are not
    /// reported.
    Counted,
    /// Takes the times that are reported. Nothing is counted meanwhile.
    Timed,
}

/// What to measure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// What for.
    pub purpose: Purpose,
    /// Who reads.
    pub kind: Kind,
    /// Which of several ways the contender has: see [`Terms::variant`].
    pub variant: usize,
    /// Which measurement of the same kind and purpose this is, from 0.
    pub round: usize,
    /// How many contenders are measured before it in the same round.
    pub place: usize,
    /// Which of the [`parts`](Setting::parts) of the pages is read first.
    pub part: usize,
}

/// What all measurements of a group have in common.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// What is measured.
    pub scenario: Scenario,
    /// Reader threads.
    pub threads: usize,
    /// Reads that a thread has in flight, by contenders that have several.
    pub depth: usize,
    /// Length of a measurement.
    pub seconds: f64,
    /// How long to read before it.
    pub warm_seconds: f64,
    /// So many parts are the pages divided into: each round begins with another one.
    pub parts: usize,
    /// The data file.
    pub file: PathBuf,
    /// How much of it is used, in bytes.
    pub size: u64,
    /// Budget of contenders that have one, in bytes.
    pub memory: u64,
    /// Budget of [`Kind::FaultlessOver`], in bytes.
    pub memory_over: u64,
    /// Memory that the control group of the process is allowed, where it has one.
    pub group_memory: Option<u64>,
    /// What that is lowered to while the readers warm up, if it is.
    pub lowered: Option<u64>,
}

/// What was measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// How long it took.
    pub seconds: f64,
    /// Pages read and checked; in the hot scenarios, words.
    pub reads: u64,
    /// Median of a read, in microseconds.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
    /// The latency at each of [`QUANTILES`], in microseconds.
    pub latency_us: Vec<f64>,
    /// Reads per second in each interval of [`SAMPLE`].
    pub reads_over_time: Vec<f64>,
    /// Rounds of the neighbour per second.
    pub neighbour_per_s: Option<f64>,
    /// 99th percentile of a round of the neighbour.
    pub neighbour_p99_us: Option<f64>,
    /// Touches of absent pages: major faults of the kernel's mmap; misses of the engine, of which those that find a page
    /// cooling ask no device.
    pub misses: u64,
    /// Misses of each reader's first read, which is not timed.
    pub first_misses: u64,
    /// Acquisitions of `mmap_lock` by reader threads, their first reads included; `None` where they are not counted.
    pub locks_readers: Option<u64>,
    /// Acquisitions of `mmap_lock` by all threads of the process, the readers' first reads included.
    pub locks_process: Option<u64>,
    /// Bytes that the device delivered.
    pub device_bytes: u64,
    /// Processor time of the process, the neighbour's threads included.
    pub cpu_s: f64,
    /// Processor time of the process that looks on, if one does, from its start to its end.
    pub onlooker_cpu_s: Option<f64>,
    /// The most memory that it had, in bytes.
    pub onlooker_resident_bytes: Option<u64>,
    /// Records that it lost.
    pub onlooker_lost: Option<u64>,
    /// Most memory that the process had beyond what it had before.
    pub resident_max_bytes: u64,
    /// Frames of the contender beyond its budget, at most, where it has one and they can be told: from smaps, after the
    /// measurement.
    pub over_budget_bytes: Option<u64>,
    /// Bytes that were not what they must be.
    pub wrong_bytes: u64,
}

pub(crate) fn cpu_seconds() -> f64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the structure is valid for writing, and zero is a valid value for all of it.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    let s = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    s(usage.ru_utime) + s(usage.ru_stime)
}

fn major_faults() -> u64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: as above.
    unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init().ru_majflt as u64
    }
}

/// A number from a file of `NAME: VALUE` lines.
pub(crate) fn proc_number(path: &str, field: &str) -> u64 {
    std::fs::read_to_string(path)
        .ok()
        .and_then(|t| {
            t.lines().find_map(|l| {
                l.strip_prefix(field)?
                    .split_whitespace()
                    .next()?
                    .parse()
                    .ok()
            })
        })
        .unwrap_or(0)
}

fn resident_now() -> u64 {
    proc_number("/proc/self/status", "VmRSS:") << 10
}

/// Resident memory of this process, counted page by page: slow, and exact.
fn rollup_rss() -> Option<u64> {
    let path = "/proc/self/smaps_rollup";
    match proc_number(path, "Rss:") {
        0 => None,
        kib => Some(kib << 10),
    }
}

/// A counter with a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Progress(AtomicU64);

/// What the reader threads share.
struct Readers<'a> {
    contender: &'a dyn Contender,
    access: Access,
    threads: usize,
    order: Permutation,
    zipf: Option<Zipf>,
    pages: u64,
    /// Position in the order of the next cold page, and the position at which all pages have been read: they begin
    /// anywhere, and go round.
    next: AtomicU64,
    past: u64,
    progress: Vec<Progress>,
    /// Warming up is over: from here on it counts.
    counts: AtomicBool,
    /// Readers pause while the limit of the group is lowered.
    paused: AtomicBool,
    stop: AtomicBool,
    /// Readers that have ended, by error or because there was nothing left to read.
    ended: AtomicUsize,
    /// Wrong bytes of readers that have ended.
    wrong: AtomicU64,
    /// All readers have done what they do once.
    ready: Barrier,
    /// The measurement begins.
    start: Barrier,
    tracepoint: Option<LockTracepoint>,
}

/// Counts a reader as ended when dropped.
struct Ended<'a>(&'a AtomicUsize);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

struct OneReader {
    number: usize,
    times: Histogram<u64>,
    reads: u64,
    wrong: u64,
    /// Acquisitions of `mmap_lock`: of the first read, and of that and all others that count.
    first_locks: u64,
    locks: Option<u64>,
    ended: Instant,
    random: u64,
}

impl OneReader {
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(1);
        mix(self.random)
    }

    fn unit(&mut self) -> f64 {
        (self.random() >> 11) as f64 / (1u64 << 53) as f64
    }
}

impl Readers<'_> {
    /// Which page this reader reads next. `None` if there is none.
    fn next_page(&self, r: &mut OneReader) -> Option<u64> {
        match self.access {
            Access::Cold => {
                // Each is read once, since a second time it would not be cold.
                let i = self.next.fetch_add(1, Ordering::Relaxed);
                (i < self.past).then(|| self.order.at(i % self.pages))
            }
            Access::ZipfAndScan => {
                let own = self.progress[r.number].0.load(Ordering::Relaxed);
                if r.number == 0 || own.is_multiple_of(PACE_LOOK) {
                    self.keep_pace(r.number == 0);
                }
                match r.number {
                    0 => Some(self.progress[0].0.load(Ordering::Relaxed) % self.pages),
                    _ => self.zipf_page(r),
                }
            }
            Access::Zipf => self.zipf_page(r),
            Access::Uniform | Access::Hot | Access::Scan | Access::Resident => {
                Some(r.random() % self.pages)
            }
        }
    }

    fn zipf_page(&self, r: &mut OneReader) -> Option<u64> {
        let u = r.unit();
        let rank = self.zipf.as_ref().map_or(0, |z| z.rank(u));
        Some(self.order.at(rank as u64))
    }

    /// Waits for the others where this reader is ahead of them: the scan's share of reads is the same for every
    /// contender, whichever part it is better at.
    fn keep_pace(&self, scanner: bool) {
        while !self.stop.load(Ordering::Relaxed) {
            let scanned = self.progress[0].0.load(Ordering::Relaxed) * (SCAN_SHARE - 1);
            let others: u64 = self.progress[1..]
                .iter()
                .map(|p| p.0.load(Ordering::Relaxed))
                .sum();
            let ahead = if scanner {
                scanned > others + PACE_SLACK
            } else {
                others > scanned + PACE_SLACK
            };
            if !ahead {
                return;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Reads and checks the next page. `false` if there is none.
    fn read_one(&self, buffer: &mut PageBuffer, r: &mut OneReader) -> anyhow::Result<bool> {
        let Some(number) = self.next_page(r) else {
            return Ok(false);
        };
        let began = Instant::now();
        let in_order = self.access == Access::ZipfAndScan && r.number == 0;
        let check = &mut |bytes: &[u8]| r.wrong += wrong_bytes(bytes, number);
        if in_order {
            self.contender.read_in_order(number, buffer, check)?;
        } else {
            self.contender.read(number, buffer, check)?;
        }
        self.record(r, began);
        Ok(true)
    }

    /// Reads and checks the next pages, as many as the contender takes at a time. `false` if there are none.
    fn read_some(&self, buffer: &mut PageBuffer, r: &mut OneReader) -> anyhow::Result<bool> {
        let depth = self.contender.depth();
        if depth == 1 {
            return self.read_one(buffer, r);
        }
        let numbers: Vec<u64> = (0..depth).map_while(|_| self.next_page(r)).collect();
        if numbers.is_empty() {
            return Ok(false);
        }
        let began = Instant::now();
        let check = &mut |number: u64, bytes: &[u8]| r.wrong += wrong_bytes(bytes, number);
        self.contender.read_many(&numbers, check)?;
        for _ in numbers {
            self.record(r, began);
        }
        Ok(true)
    }

    fn record(&self, r: &mut OneReader, began: Instant) {
        if self.counts.load(Ordering::Relaxed) {
            r.times.saturating_record(began.elapsed().as_nanos() as u64);
            r.reads += 1;
        }
        let progress = &self.progress[r.number].0;
        progress.store(progress.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// This reader's part of the data, in order.
    fn scan(&self, r: &mut OneReader) -> anyhow::Result<()> {
        let part = self.pages.div_ceil(self.threads as u64);
        let from = (part * r.number as u64).min(self.pages);
        let to = (from + part).min(self.pages);
        let mut began = Instant::now();
        let wrong = &mut 0;
        self.contender.scan(from, to, &mut |number, bytes| {
            *wrong += wrong_bytes(bytes, number);
            self.record(r, began);
            began = Instant::now();
            !self.stop.load(Ordering::Relaxed)
        })?;
        r.wrong += *wrong;
        Ok(())
    }

    /// Random words of resident pages.
    fn hot(&self, r: &mut OneReader) -> anyhow::Result<()> {
        let bytes = self
            .contender
            .bytes()
            .context("the hot scenarios are for mappings")?;
        let asks_first = self.contender.asks_first();
        let words = self.pages * (PAGE / 8) as u64;
        while !self.stop.load(Ordering::Relaxed) {
            let began = Instant::now();
            let mut wrong = 0;
            for _ in 0..HOT_LOADS {
                let at = (r.random() % words) as usize * 8;
                let (page, index) = (at / PAGE, at % PAGE / 8);
                let word = match asks_first {
                    Some(map) => &map.load(page * PAGE..(page + 1) * PAGE)?[index * 8..][..8],
                    None => &bytes[at..at + 8],
                };
                let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
                wrong += u64::from(word != word_of(page as u64, index as u64));
            }
            r.wrong += wrong * 8;
            let ns = began.elapsed().as_nanos() as f64 / HOT_LOADS as f64;
            // In thousandths of a nanosecond: the histogram's unit is too coarse for a load.
            r.times.saturating_record((ns * 1e3) as u64);
            r.reads += HOT_LOADS;
            let progress = &self.progress[r.number].0;
            progress.store(r.reads, Ordering::Relaxed);
        }
        Ok(())
    }

    fn run(&self, number: usize) -> anyhow::Result<OneReader> {
        let mut buffer = PageBuffer::new();
        let mut r = OneReader {
            number,
            times: histogram(),
            reads: 0,
            wrong: 0,
            first_locks: 0,
            locks: None,
            ended: Instant::now(),
            random: (number as u64) << 40,
        };
        let counter = self
            .tracepoint
            .and_then(|t| Counter::tracepoint(t.0, Scope::Thread).ok());
        let locks_now = || counter.as_ref().and_then(|c| c.read().ok());
        let none = locks_now();
        // A thread's set-up (the first touch of its stacks) is not timed. The mmap_lock that its first miss takes is counted.
        let first = match self.access {
            Access::Scan => Ok(true),
            _ => self.read_one(&mut buffer, &mut r),
        };
        let first_locks = locks_now().zip(none).map(|(now, then)| now - then);
        self.ready.wait();
        self.start.wait();
        first?;
        while !self.counts.load(Ordering::Relaxed) {
            while self.paused.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(1));
            }
            self.read_some(&mut buffer, &mut r)?;
        }
        r.times.reset();
        r.reads = 0;
        let before = locks_now();
        match self.access {
            Access::Scan => self.scan(&mut r)?,
            Access::Hot => self.hot(&mut r)?,
            _ => {
                while !self.stop.load(Ordering::Relaxed) {
                    if !self.read_some(&mut buffer, &mut r)? {
                        break;
                    }
                }
            }
        }
        r.ended = Instant::now();
        self.wrong.fetch_add(r.wrong, Ordering::Relaxed);
        r.first_locks = first_locks.unwrap_or(0);
        r.locks = locks_now()
            .zip(before)
            .zip(first_locks)
            .map(|((now, then), first)| first + now - then);
        Ok(r)
    }

    /// Lowers the limit of the group while the readers read. A kernel with control groups of version 1 tries again for as long as the
    /// readers fill what it frees, so after a while they pause. (This is before they are measured.)
    fn lower(&self, group: &Place, to: u64) -> anyhow::Result<()> {
        let began = Instant::now();
        let lowered = std::thread::scope(|scope| {
            let lowering = std::thread::Builder::new()
                .spawn_scoped(scope, || group.lower(to))
                .context("cannot start the thread that lowers the limit")?;
            while !lowering.is_finished() {
                if began.elapsed() > LOWER_WAIT {
                    self.paused.store(true, Ordering::Relaxed);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            let lowered = lowering.join();
            lowered.unwrap_or_else(|_| bail!("the thread that lowers the limit panicked"))
        });
        self.paused.store(false, Ordering::Relaxed);
        lowered
    }

    fn done(&self) -> u64 {
        self.progress
            .iter()
            .map(|p| p.0.load(Ordering::Relaxed))
            .sum()
    }
}

/// Runs the measurements of one setting, one after the other, in this process.
pub struct Bench {
    setting: Setting,
    group: Option<Place>,
    tracepoint: Option<LockTracepoint>,
    _ballast: Ballast,
}

impl Bench {
    /// Prepares the process: first what it holds all the time, which counts in no control group; then it joins its group.
    pub fn new(setting: Setting, group: Option<Place>) -> anyhow::Result<Self> {
        let tracepoint = LockTracepoint::find().ok();
        let ballast = Ballast::new(setting.scenario.ballast())?;
        if let Some(group) = &group {
            group.join()?;
        }
        Ok(Bench {
            setting,
            group,
            tracepoint,
            _ballast: ballast,
        })
    }

    /// Runs one measurement.
    pub fn run(&self, cell: &Cell) -> anyhow::Result<Measured> {
        let s = &self.setting;
        let path: &Path = &s.file;
        contender::drop_cache(path)?;
        self.warm()?;
        if cell.kind == Kind::Fio {
            return fio::run(s);
        }
        // Counting costs the contender that takes the lock most: it has a round of its own, whose times enter no median.
        let counting = cell.purpose == Purpose::Counted;
        // Threads that start from here on inherit it: the contender's, the neighbour's, the readers.
        let process_locks = self
            .tracepoint
            .filter(|_| counting)
            .and_then(|t| Counter::tracepoint(t.0, Scope::ThreadAndDescendants).ok());
        let locks_now = || process_locks.as_ref().and_then(|c| c.read().ok());
        let memory = match cell.kind {
            Kind::FaultlessOver => s.memory_over,
            _ => s.memory,
        };
        let terms = Terms {
            path,
            len: s.size,
            memory: ByteSize::new(memory),
            variant: cell.variant,
            depth: s.depth,
            hint: match s.scenario.access() {
                Access::Scan => Hint::InOrder,
                Access::Hot if s.scenario == Scenario::HotInOrder => Hint::InOrder,
                Access::ZipfAndScan => Hint::Both,
                _ => Hint::Random,
            },
        };
        let before = rollup_rss();
        let contender = contender::open(cell.kind, &terms)?;

        // All contenders of a round read the same pages; every round begins with others, as far as there are any.
        let pages_all = s.size / PAGE as u64;
        let parts = s.parts.max(1);
        let first = pages_all / parts as u64 * (cell.part % parts) as u64;
        let access = s.scenario.access();
        // The hot scenarios are about pages that fit the budget.
        let pages = match access {
            Access::Hot => pages_all.min((s.memory / 4 * 3).min(HOT_MAX) / PAGE as u64),
            _ => pages_all,
        };
        let readers = Readers {
            contender: &*contender,
            access,
            threads: s.threads,
            order: Permutation::new(pages),
            zipf: matches!(access, Access::Zipf | Access::ZipfAndScan)
                .then(|| Zipf::new(pages as usize, THETA)),
            pages,
            next: AtomicU64::new(first),
            past: first + pages,
            progress: (0..s.threads).map(|_| Progress::default()).collect(),
            counts: AtomicBool::new(s.warm_seconds == 0.0),
            paused: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            ended: AtomicUsize::new(0),
            wrong: AtomicU64::new(0),
            ready: Barrier::new(s.threads + 1),
            start: Barrier::new(s.threads + 1),
            tracepoint: self.tracepoint.filter(|_| counting),
        };
        let wrong_before = match access {
            Access::Hot => self.make_hot(&*contender, pages, s.scenario)?,
            _ => 0,
        };
        let neighbour = Neighbour::start(s.scenario.disturbance())?;
        if neighbour.is_some() {
            // Let it get going.
            std::thread::sleep(Duration::from_millis(100));
        }
        let onlooker = cell.kind.way().map(Onlooker::start).transpose()?;
        let mut m = Measured {
            wrong_bytes: wrong_before,
            ..Measured::default()
        };
        // Of contenders that count them themselves, or whose misses are the kernel's major faults.
        let misses_now = || {
            let faults = || cell.kind.is_kernel_mmap().then(major_faults);
            contender.misses().or_else(faults)
        };
        let no_misses = misses_now();
        let mut lowered = Ok(());
        let measured: anyhow::Result<Vec<OneReader>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..s.threads)
                .map(|number| {
                    let readers = &readers;
                    std::thread::Builder::new()
                        .stack_size(256 << 10)
                        .spawn_scoped(scope, move || {
                            // However it ends, by panic too: nobody waits for it for ever.
                            let _ended = Ended(&readers.ended);
                            readers.run(number)
                        })
                })
                .collect::<Result<_, _>>()
                .unwrap_or_else(|e| {
                    // Those that run wait at a barrier for the others: only the end of the process frees them.
                    eprintln!("faultless: cannot start {} reader threads: {e}", s.threads);
                    std::process::exit(1)
                });
            // Resets the kernel's high-water mark.
            let _ = std::fs::write("/proc/self/clear_refs", "5");
            let resident = resident_now();
            readers.ready.wait();
            m.first_misses = match (misses_now().zip(no_misses), access) {
                (Some((now, then)), _) => now - then,
                (None, Access::Scan) => 0,
                (None, _) => s.threads as u64,
            };
            if s.warm_seconds > 0.0 {
                readers.start.wait();
                let warm = Duration::from_secs_f64(s.warm_seconds);
                std::thread::sleep(warm);
                if let (Some(group), Some(to)) = (&self.group, s.lowered) {
                    lowered = readers.lower(group, to);
                    std::thread::sleep(warm);
                }
            }
            let cpu = cpu_seconds();
            let device = proc_number("/proc/self/io", "read_bytes:");
            let misses = misses_now();
            let locks = locks_now();
            let began = Instant::now();
            if s.warm_seconds > 0.0 {
                readers.counts.store(true, Ordering::Relaxed);
            } else {
                readers.start.wait();
            }
            let end = began + Duration::from_secs_f64(s.seconds);
            let finished = || match access {
                Access::Cold => readers.next.load(Ordering::Relaxed) >= readers.past,
                _ => false,
            } || readers.ended.load(Ordering::Relaxed) == s.threads;
            let mut sampled = (began, readers.done());
            while (access == Access::Scan || Instant::now() < end) && !finished() {
                let left = end.saturating_duration_since(Instant::now());
                std::thread::sleep(
                    Duration::from_millis(2).min(left.max(Duration::from_micros(200))),
                );
                let passed = sampled.0.elapsed();
                if passed >= SAMPLE {
                    let done = readers.done();
                    m.reads_over_time
                        .push((done - sampled.1) as f64 / passed.as_secs_f64());
                    sampled = (Instant::now(), done);
                }
            }
            readers.stop.store(true, Ordering::Relaxed);
            let results: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
            // All pages may have been read before the time was up.
            let ended = results.iter().flatten().flatten().map(|r| r.ended).max();
            m.seconds = (ended.unwrap_or_else(Instant::now) - began).as_secs_f64();
            m.locks_process = locks_now().zip(locks).map(|(now, then)| now - then);
            m.cpu_s = cpu_seconds() - cpu;
            m.device_bytes = proc_number("/proc/self/io", "read_bytes:") - device;
            m.misses = match misses_now().zip(misses) {
                Some((now, then)) => now - then,
                None => results.iter().flatten().flatten().map(|r| r.reads).sum(),
            };
            m.resident_max_bytes =
                (proc_number("/proc/self/status", "VmHWM:") << 10).saturating_sub(resident);
            results
                .into_iter()
                .map(|r| r.unwrap_or_else(|_| bail!("a reader thread panicked")))
                .collect()
        });
        lowered?;
        if let Some(onlooker) = onlooker {
            let done = onlooker.stop()?;
            m.onlooker_cpu_s = Some(done.cpu_s);
            m.onlooker_resident_bytes = Some(done.resident_max_bytes);
            m.onlooker_lost = done.lost;
        }
        if let Some(n) = neighbour {
            let done = n.stop()?;
            m.neighbour_per_s = Some(done.per_s);
            m.neighbour_p99_us = Some(done.p99_us);
        }
        if cell.kind.is_engine()
            && let (Some(before), Some(after)) = (before, rollup_rss())
        {
            m.over_budget_bytes = Some(after.saturating_sub(before + memory));
        }
        let mut times = histogram();
        let mut locks = Some(0);
        let mut first_locks = 0;
        anyhow::ensure!(
            readers.wrong.load(Ordering::Relaxed) == 0 || measured.is_ok(),
            "{WRONG}: {} bytes, before a reader failed",
            readers.wrong.load(Ordering::Relaxed)
        );
        for r in measured? {
            m.reads += r.reads;
            times.add(&r.times).context("histograms differ")?;
            m.wrong_bytes += r.wrong;
            locks = locks.zip(r.locks).map(|(a, b)| a + b);
            first_locks += r.first_locks;
        }
        let us = |ns: u64| match access {
            Access::Hot => ns as f64 / 1e6,
            _ => ns as f64 / 1e3,
        };
        anyhow::ensure!(
            m.reads > 0,
            "nothing was read in {:.2} s: fewer --threads, a larger --size or more --seconds may help",
            m.seconds
        );
        m.latency_us = QUANTILES
            .iter()
            .map(|&q| us(times.value_at_quantile(q)))
            .collect();
        m.p50_us = us(times.value_at_quantile(0.5));
        m.p99_us = us(times.value_at_quantile(0.99));
        m.p999_us = us(times.value_at_quantile(0.999));
        m.max_us = us(times.max());
        m.locks_readers = locks;
        m.locks_process = m.locks_process.map(|n| n + first_locks);
        Ok(m)
    }

    /// Makes pages resident, in order or at random. Returns how many bytes were wrong.
    fn make_hot(
        &self,
        contender: &dyn Contender,
        pages: u64,
        scenario: Scenario,
    ) -> anyhow::Result<u64> {
        let order = Permutation::new(pages);
        let at_random = scenario == Scenario::HotAtRandom;
        let next = AtomicU64::new(0);
        let all_wrong = AtomicU64::new(0);
        let read_all = || -> anyhow::Result<()> {
            let mut buffer = PageBuffer::new();
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= pages {
                    return Ok(());
                }
                let number = if at_random { order.at(i) } else { i };
                let mut wrong = 0;
                contender.read(number, &mut buffer, &mut |bytes| {
                    wrong = wrong_bytes(bytes, number)
                })?;
                all_wrong.fetch_add(wrong, Ordering::Relaxed);
            }
        };
        // At random, many threads read, since each read takes its time; in order, one does.
        let threads = if at_random { HOT_READERS } else { 1 };
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..threads).map(|_| scope.spawn(read_all)).collect();
            readers.into_iter().try_for_each(|r| {
                r.join()
                    .unwrap_or_else(|_| bail!("a reader thread panicked"))
            })
        })?;
        Ok(all_wrong.into_inner())
    }

    /// Touches and frees memory, so that no contender pays for what the hypervisor has not backed.
    fn warm(&self) -> anyhow::Result<()> {
        let s = &self.setting;
        let bytes = match s.scenario.access() {
            Access::Hot => s.memory.min(HOT_MAX),
            Access::Scan => s.size.min(4 << 30),
            _ => ((s.seconds + s.warm_seconds) * WARM_PER_SECOND as f64) as u64,
        };
        let room = s.group_memory.map_or(u64::MAX, |m| m / 4 * 3);
        Ballast::new(bytes.min(s.size).min(room) & !(PAGE as u64 - 1)).map(drop)
    }
}
