//! One measurement: some threads read pages through one contender, beside one neighbour, for a while.

#![allow(unsafe_code, reason = "reads resource usage, warms memory")]

use crate::contender::{self, Contender, Kind, PageBuffer};
use crate::data::{Permutation, wrong_bytes};
use crate::machine::LockTracepoint;
use crate::neighbour::{Ballast, Neighbour, Scenario, histogram};
use anyhow::{Context, bail};
use faultless::Bytes;
use faultless_sys::mem::PAGE;
use faultless_sys::perf::{Counter, Scope};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Memory that a contender may touch in a second: what is warmed before each measurement.
const WARM_PER_SECOND: u64 = 500 << 20;

/// What to measure.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Who reads.
    pub kind: Kind,
    /// Monitor threads of `uffd-monitor`; 0 for the others.
    pub monitors: usize,
    /// Which measurement of the same kind this is, from 0.
    pub round: usize,
}

/// What all measurements of a group have in common.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// Who disturbs.
    pub scenario: Scenario,
    /// Reader threads.
    pub threads: usize,
    /// Length of a measurement.
    pub seconds: f64,
    /// Rounds that the whole group has (for the pages to be shared out).
    pub rounds: usize,
    /// The data file.
    pub file: PathBuf,
    /// How much of it is used, in bytes.
    pub size: u64,
    /// Budget of contenders that have one, in bytes.
    pub memory: u64,
}

/// What was measured.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// How long it took.
    pub seconds: f64,
    /// Pages read and checked.
    pub reads: u64,
    /// Median of a read, in microseconds.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// The longest.
    pub max_us: f64,
    /// Rounds of the neighbour per second.
    pub neighbour_per_s: Option<f64>,
    /// 99th percentile of a round of the neighbour.
    pub neighbour_p99_us: Option<f64>,
    /// Touches of absent pages.
    pub misses: u64,
    /// Acquisitions of `mmap_lock` by reader threads; `None` where they cannot be counted.
    pub locks_readers: Option<u64>,
    /// Acquisitions of `mmap_lock` by all threads of the process.
    pub locks_process: Option<u64>,
    /// Bytes that the device delivered.
    pub device_bytes: u64,
    /// Processor time of the process, the neighbour's threads included.
    pub cpu_s: f64,
    /// Most memory that the process had beyond what it had before.
    pub resident_max_bytes: u64,
    /// Bytes that were not what they must be.
    pub wrong_bytes: u64,
}

fn cpu_seconds() -> f64 {
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
fn proc_number(path: &str, field: &str) -> u64 {
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

/// What the reader threads share.
struct Readers<'a> {
    contender: &'a dyn Contender,
    order: Permutation,
    pages: u64,
    next: AtomicU64,
    read: AtomicU64,
    stop: AtomicBool,
    /// All readers have done what they do once.
    ready: Barrier,
    /// The measurement begins.
    start: Barrier,
    tracepoint: Option<LockTracepoint>,
}

struct OneReader {
    times: Histogram<u64>,
    wrong: u64,
    locks: Option<u64>,
    ended: Instant,
}

impl Readers<'_> {
    /// Reads and checks the next page. `false` if there is none: each is read once, since a second time it would not
    /// be cold.
    fn read_one(&self, buffer: &mut PageBuffer, r: &mut OneReader) -> anyhow::Result<bool> {
        let i = self.next.fetch_add(1, Ordering::Relaxed);
        if i >= self.pages {
            return Ok(false);
        }
        let number = self.order.at(i);
        let began = Instant::now();
        self.contender.read(number, buffer, &mut |bytes| {
            r.wrong += wrong_bytes(bytes, number)
        })?;
        r.times.saturating_record(began.elapsed().as_nanos() as u64);
        Ok(true)
    }

    fn run(&self) -> anyhow::Result<OneReader> {
        let mut buffer = PageBuffer::new();
        let mut r = OneReader {
            times: histogram(),
            wrong: 0,
            locks: None,
            ended: Instant::now(),
        };
        let counter = self
            .tracepoint
            .and_then(|t| Counter::tracepoint(t.0, Scope::Thread).ok());
        // What a thread sets up once (its first touch of its stacks, its first miss) is not what is measured.
        let first = self.read_one(&mut buffer, &mut r);
        r.times.reset();
        self.ready.wait();
        self.start.wait();
        first?;
        let before = counter.as_ref().and_then(|c| c.read().ok());
        while !self.stop.load(Ordering::Relaxed) {
            if !self.read_one(&mut buffer, &mut r)? {
                break;
            }
        }
        r.ended = Instant::now();
        r.locks = counter.and_then(|c| Some(c.read().ok()? - before?));
        self.read.fetch_add(r.times.len(), Ordering::Relaxed);
        Ok(r)
    }
}

/// Runs the measurements of one setting, one after the other, in this process.
pub struct Bench {
    setting: Setting,
    tracepoint: Option<LockTracepoint>,
    _ballast: Ballast,
}

impl Bench {
    /// Prepares the process.
    pub fn new(setting: Setting) -> anyhow::Result<Self> {
        let tracepoint = LockTracepoint::find().ok();
        let ballast = Ballast::new(setting.scenario.ballast())?;
        Ok(Bench {
            setting,
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
        // Counting costs the contender that takes the lock most: it is done in the first round alone, so that the
        // medians of three rounds and more are free of it.
        let counting = cell.round == 0;
        // Threads that start from here on inherit it: the contender's, the neighbour's, the readers.
        let process_locks = self
            .tracepoint
            .filter(|_| counting)
            .and_then(|t| Counter::tracepoint(t.0, Scope::ThreadAndDescendants).ok());
        let locks_now = || process_locks.as_ref().and_then(|c| c.read().ok());
        let contender =
            contender::open(cell.kind, path, s.size, Bytes::new(s.memory), cell.monitors)?;

        // All contenders of a round read the same pages; every round reads others, as far as there are any.
        let pages_all = s.size / PAGE as u64;
        let share = pages_all / s.rounds.max(1) as u64;
        let first = share * (cell.round % s.rounds.max(1)) as u64;
        let readers = Readers {
            contender: &*contender,
            order: Permutation::new(pages_all),
            pages: pages_all,
            next: AtomicU64::new(first),
            read: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            ready: Barrier::new(s.threads + 1),
            start: Barrier::new(s.threads + 1),
            tracepoint: self.tracepoint.filter(|_| counting),
        };
        let neighbour = Neighbour::start(s.scenario)?;
        if neighbour.is_some() {
            // Let it get going.
            std::thread::sleep(Duration::from_millis(100));
        }
        let mut m = Measured::default();
        let measured: anyhow::Result<Vec<OneReader>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..s.threads)
                .map(|_| {
                    std::thread::Builder::new()
                        .stack_size(256 << 10)
                        .spawn_scoped(scope, || readers.run())
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
            let (cpu, faults) = (cpu_seconds(), major_faults());
            let device = proc_number("/proc/self/io", "read_bytes:");
            let misses = contender.misses();
            let locks = locks_now();
            let began = Instant::now();
            readers.start.wait();
            let end = began + Duration::from_secs_f64(s.seconds);
            while Instant::now() < end && readers.next.load(Ordering::Relaxed) < pages_all {
                std::thread::sleep(
                    Duration::from_millis(2).min(end.saturating_duration_since(Instant::now())),
                );
            }
            readers.stop.store(true, Ordering::Relaxed);
            let results: Vec<_> = threads.into_iter().map(|t| t.join()).collect();
            // All pages may have been read before the time was up.
            let ended = results.iter().flatten().flatten().map(|r| r.ended).max();
            m.seconds = (ended.unwrap_or_else(Instant::now) - began).as_secs_f64();
            m.locks_process = locks_now().zip(locks).map(|(now, then)| now - then);
            m.cpu_s = cpu_seconds() - cpu;
            m.device_bytes = proc_number("/proc/self/io", "read_bytes:") - device;
            m.misses = match (cell.kind, contender.misses().zip(misses)) {
                (_, Some((now, then))) => now - then,
                (Kind::Mmap, None) => major_faults() - faults,
                _ => readers.read.load(Ordering::Relaxed),
            };
            m.resident_max_bytes =
                (proc_number("/proc/self/status", "VmHWM:") << 10).saturating_sub(resident);
            results
                .into_iter()
                .map(|r| r.unwrap_or_else(|_| bail!("a reader thread panicked")))
                .collect()
        });
        if let Some(n) = neighbour {
            let done = n.stop()?;
            m.neighbour_per_s = Some(done.per_s);
            m.neighbour_p99_us = Some(done.p99_us);
        }
        let mut times = histogram();
        let mut locks = Some(0);
        for r in measured? {
            times.add(&r.times).context("histograms differ")?;
            m.wrong_bytes += r.wrong;
            locks = locks.zip(r.locks).map(|(a, b)| a + b);
        }
        let us = |ns: u64| ns as f64 / 1e3;
        m.reads = times.len();
        m.p50_us = us(times.value_at_quantile(0.5));
        m.p99_us = us(times.value_at_quantile(0.99));
        m.p999_us = us(times.value_at_quantile(0.999));
        m.max_us = us(times.max());
        m.locks_readers = locks;
        Ok(m)
    }

    /// Touches and frees memory, so that no contender pays for what the hypervisor has not backed.
    fn warm(&self) -> anyhow::Result<()> {
        let bytes = (self.setting.seconds * WARM_PER_SECOND as f64) as u64;
        Ballast::new(bytes.min(self.setting.size) & !(PAGE as u64 - 1)).map(drop)
    }
}
