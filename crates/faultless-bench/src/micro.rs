//! What single operations cost on this machine, with nobody else about: the parameters of `faultless whatif`.
//!
//! Each is the median of several repetitions. Nothing here is measured beside a neighbour: predictions of such scenarios
//! would otherwise predict what they have been told. The processor time of a read, with `pread` and by a fault, is measured with sixteen
//! threads that read, since a processor that idles between reads would charge its wake-ups to them; that is the `quiet` scenario. What switching
//! between these threads costs is subtracted, since it is a cost of its own.
//!
//! Some costs are parts of what was measured together, in a share that is fixed and no measurement (mmap and munmap, a half
//! each; of a touch of the page of zeros three quarters are the fault; of what is left of a turn between two threads six tenths
//! are the switch): predictions depend on the sum.
//!
//! Many costs are differences, and a difference can come out as nonsense. A guess replaces an impossible value,
//! and [`Micro::replaced`] says so.

#![allow(unsafe_code, reason = "maps, touches, unmaps, forks, pins threads")]

use crate::cell::cpu_seconds;
use crate::contender::{Monitor, drop_cache, open_direct};
use crate::data::{Permutation, wrong_bytes};
use anyhow::{Context, ensure};
use faultless_sys::mem::{self, PAGE};
use faultless_sys::{file, futex, raw, signal, uffd};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const REPEAT: usize = 5;
const SMALL: usize = 64 << 20;
const LARGE: usize = 1 << 30;
/// Major faults for a figure, at most.
const FAULTS: u64 = 8_000;
/// How long the device is read with so many threads; of that, what does not count at the beginning, while it fills.
const DEVICE: Duration = Duration::from_millis(300);
const DEVICE_FILLS: Duration = Duration::from_millis(50);
/// Threads that read at a time, where the processor's part of a read is measured.
const BESIDE: u32 = 16;
/// Reads under way at which the device is measured.
const DEPTHS: [u32; 5] = [1, 4, 16, 64, 256];

/// Shares of the reads whose times are told.
const SHARES: [f64; 9] = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98, 0.995, 1.0];

/// What was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Micro {
    /// Nanoseconds, by the name of the cost in the model.
    pub costs: BTreeMap<&'static str, u64>,
    /// Median time of a direct read of 4 KiB in microseconds, less the processor's part, by reads that are under way.
    pub latency_us: Vec<(u32, f64)>,
    /// How that time scatters, by reads that are under way: of a share of the reads, how many medians they take at most.
    pub spread: Vec<(u32, Vec<(f64, f64)>)>,
    /// Figures that came out as what they cannot be.
    pub replaced: Vec<Replaced>,
}

/// A figure that came out as what it cannot be, and what stands in its place: a guess.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Replaced {
    /// Which figure: a cost by its name, or in words.
    pub what: String,
    /// What was measured.
    pub came_out: f64,
    /// What is used instead.
    pub used: f64,
    /// Of both.
    pub unit: &'static str,
}

/// What has been measured so far.
#[derive(Debug, Default)]
struct Found {
    costs: BTreeMap<&'static str, u64>,
    replaced: Vec<Replaced>,
}

impl Found {
    /// A cost, in nanoseconds.
    fn set(&mut self, name: &'static str, ns: f64) {
        let ns = self.at_least(name, ns, 1.0);
        self.costs.insert(name, ns.round() as u64);
    }

    /// A figure in nanoseconds that is not less than another one: where it is, that one, and it is told.
    fn at_least(&mut self, what: &str, ns: f64, floor: f64) -> f64 {
        self.replace_unless(ns >= floor, what, ns, floor, "ns")
    }

    /// A figure, or another one where it is not right.
    fn replace_unless(
        &mut self,
        is_right: bool,
        what: &str,
        came_out: f64,
        used: f64,
        unit: &'static str,
    ) -> f64 {
        if is_right {
            return came_out;
        }
        self.replaced.push(Replaced {
            what: what.to_owned(),
            came_out,
            used,
            unit,
        });
        used
    }
}

/// Memory of our own.
struct Memory {
    start: usize,
    len: usize,
}

impl Memory {
    fn new(len: usize) -> anyhow::Result<Memory> {
        let start = mem::map_anonymous(len).context("cannot map memory")?;
        // SAFETY: mapped just now.
        let _ = unsafe { mem::madvise(start, len, libc::MADV_NOHUGEPAGE) };
        Ok(Memory { start, len })
    }

    fn write(&self, step: usize) {
        for at in (self.start..self.start + self.len).step_by(step) {
            // SAFETY: in our mapping, which is writable and known to nobody else.
            unsafe { core::ptr::write_volatile(at as *mut u8, 1) };
        }
    }

    fn read(&self, step: usize) {
        for at in (self.start..self.start + self.len).step_by(step) {
            // SAFETY: in our mapping.
            black_box(unsafe { core::ptr::read_volatile(at as *const u8) });
        }
    }

    fn discard(&self) {
        // SAFETY: ours, and nothing in it is needed.
        let _ = unsafe { mem::madvise(self.start, self.len, libc::MADV_DONTNEED) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: ours; addresses are known to nobody else.
        let _ = unsafe { mem::unmap(self.start, self.len) };
    }
}

/// The median, in nanoseconds for each of `n` operations.
fn median(n: usize, mut f: impl FnMut() -> u64) -> f64 {
    let mut all: Vec<u64> = (0..REPEAT).map(|_| f()).collect();
    all.sort_unstable();
    all[REPEAT / 2] as f64 / n as f64
}

fn timed(f: impl FnOnce()) -> u64 {
    let began = Instant::now();
    f();
    began.elapsed().as_nanos() as u64
}

/// Processors that this process may run on.
fn allowed() -> anyhow::Result<Vec<usize>> {
    // SAFETY: a set of processors is plain bits; the call fills it.
    let (got, set) = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        let got = libc::sched_getaffinity(0, size_of_val(&set), &mut set);
        (got, set)
    };
    ensure!(got == 0, "cannot ask for the processors that may be used");
    // SAFETY: the numbers are below the set's size.
    let is_in = |cpu: &usize| unsafe { libc::CPU_ISSET(*cpu, &set) };
    Ok((0..libc::CPU_SETSIZE as usize).filter(is_in).collect())
}

/// Keeps this thread on a processor that it may run on.
pub(crate) fn pin(cpu: usize) {
    // SAFETY: a set of processors is plain bits; the call reads it.
    let done = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set)
    };
    assert_eq!(done, 0, "processor {cpu} has gone");
}

/// Two threads that wake each other in turn; nanoseconds for each wake-up.
fn hand_over(cpus: [usize; 2]) -> f64 {
    const TURNS: u32 = 20_000;
    let word = AtomicU32::new(0);
    let turn = |me: u32, cpu: usize| {
        pin(cpu);
        for _ in 0..TURNS {
            while word.load(Ordering::Acquire) % 2 != me {
                futex::wait(&word, 1 - me, 1_000_000_000);
            }
            word.store(1 - me, Ordering::Release);
            futex::wake(&word, 1);
        }
    };
    let took = timed(|| {
        std::thread::scope(|s| {
            s.spawn(|| turn(0, cpus[0]));
            s.spawn(|| turn(1, cpus[1]));
        });
    });
    took as f64 / f64::from(2 * TURNS)
}

/// What waking a thread costs the one that wakes it, on another processor.
fn wake(cpus: [usize; 2]) -> f64 {
    const TIMES: u64 = 3_000;
    let word = AtomicU32::new(0);
    let over = AtomicBool::new(false);
    let mut spent = 0;
    std::thread::scope(|s| {
        s.spawn(|| {
            pin(cpus[1]);
            while !over.load(Ordering::Acquire) {
                futex::wait(&word, 0, 1_000_000_000);
                word.store(0, Ordering::Release);
            }
        });
        s.spawn(|| {
            pin(cpus[0]);
            for _ in 0..TIMES {
                let until = raw::monotonic_ns() + 50_000;
                while raw::monotonic_ns() < until {
                    std::hint::spin_loop();
                }
                word.store(1, Ordering::Release);
                spent += timed(|| futex::wake(&word, 1));
            }
            over.store(true, Ordering::Release);
            word.store(1, Ordering::Release);
            futex::wake(&word, 1);
        });
    });
    spent as f64 / TIMES as f64
}

/// Maps, touches and unmaps a page, so many times.
fn map_pages(times: usize) {
    for _ in 0..times {
        if let Ok(m) = Memory::new(PAGE) {
            m.write(PAGE);
        }
    }
}

/// Nanoseconds to map, touch and unmap a page.
fn page_loop() -> f64 {
    const TIMES: usize = 2_000;
    median(TIMES, || timed(|| map_pages(TIMES)))
}

/// The same while another thread computes on another processor; and what that loses with each of them, to the interrupt that it
/// answers.
fn page_loop_beside(cpus: [usize; 2]) -> anyhow::Result<(f64, f64)> {
    const COUNTED: usize = 5_000;
    let over = AtomicBool::new(false);
    let counted = AtomicU64::new(0);
    std::thread::scope(|s| {
        s.spawn(|| {
            pin(cpus[1]);
            while !over.load(Ordering::Relaxed) {
                counted.fetch_add(1, Ordering::Relaxed);
            }
        });
        let measured = s.spawn(|| {
            pin(cpus[0]);
            std::thread::sleep(Duration::from_millis(5));
            let ns = page_loop();
            let lost = (0..REPEAT).map(|_| {
                // How much it counts in a nanosecond, undisturbed and not.
                let rate = |f: &mut dyn FnMut()| {
                    let before = counted.load(Ordering::Relaxed);
                    let took = timed(f) as f64;
                    let n = counted.load(Ordering::Relaxed) - before;
                    (n as f64 / took, took)
                };
                let (undisturbed, _) = rate(&mut || {
                    let until = raw::monotonic_ns() + 20_000_000;
                    while raw::monotonic_ns() < until {
                        std::hint::spin_loop();
                    }
                });
                let (disturbed, took) = rate(&mut || map_pages(COUNTED));
                took * (1.0 - disturbed / undisturbed) / COUNTED as f64
            });
            let mut lost: Vec<f64> = lost.collect();
            lost.sort_unstable_by(f64::total_cmp);
            (ns, lost[REPEAT / 2])
        });
        let measured = measured.join();
        over.store(true, Ordering::Relaxed);
        measured.map_err(|_| anyhow::anyhow!("a thread that measures panicked"))
    })
}

/// Nanoseconds between two ticks: that is how often the coarse clock moves.
fn tick() -> f64 {
    let mut every = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the call fills a structure of ours.
    unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &mut every) };
    every.tv_sec as f64 * 1e9 + every.tv_nsec as f64
}

/// Switches of this process's threads so far, of their own accord or not.
fn switches() -> u64 {
    // SAFETY: plain numbers, which the call fills.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    (usage.ru_nvcsw + usage.ru_nivcsw) as u64
}

/// Nanoseconds of a fork in the parent, and until the child, which ends at once, has ended.
fn fork() -> anyhow::Result<(f64, f64)> {
    let (mut forked, mut waited) = (Vec::new(), Vec::new());
    for _ in 0..REPEAT {
        let began = Instant::now();
        // SAFETY: the child does nothing but end.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: ends this process.
            unsafe { libc::_exit(0) };
        }
        forked.push(began.elapsed().as_nanos() as u64);
        if pid < 0 {
            let e = std::io::Error::last_os_error();
            return Err(e).context("cannot fork, to measure what that costs");
        }
        let began = Instant::now();
        // SAFETY: takes no pointer that is not null.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        waited.push(began.elapsed().as_nanos() as u64);
    }
    forked.sort_unstable();
    waited.sort_unstable();
    Ok((forked[REPEAT / 2] as f64, waited[REPEAT / 2] as f64))
}

/// Nanoseconds that each further mapping adds to a fork.
fn fork_vma(without: f64) -> anyhow::Result<f64> {
    const MAPPINGS: usize = 8_000;
    // Mappings of one page each, that are not merged: every other one may be written.
    let m = Memory::new(2 * MAPPINGS * PAGE)?;
    for at in (m.start..m.start + m.len).step_by(2 * PAGE) {
        // SAFETY: in our mapping, which nobody uses.
        let done = unsafe { libc::mprotect(at as *mut libc::c_void, PAGE, libc::PROT_READ) };
        ensure!(
            done == 0,
            "cannot make {MAPPINGS} pairs of mappings, to measure what they cost a fork: vm.max_map_count may be too low"
        );
    }
    Ok((fork()?.0 - without) / (2 * MAPPINGS) as f64)
}

fn smaps() -> f64 {
    median(1, || {
        timed(|| drop(black_box(std::fs::read("/proc/self/smaps_rollup"))))
    })
}

/// Times of direct reads, in nanoseconds, with so many threads that read for so long; in order of length. `reads` counts them all,
/// those of the beginning as well.
fn device(
    path: &Path,
    pages: u64,
    depth: u32,
    long: Duration,
    reads: &AtomicU64,
) -> anyhow::Result<Vec<u64>> {
    let order = Permutation::new(pages);
    let file = open_direct(path)?;
    let counts = Instant::now() + DEVICE_FILLS.min(long / 4);
    let over = Instant::now() + long;
    let mut all = Vec::new();
    std::thread::scope(|s| -> anyhow::Result<()> {
        let threads: Vec<_> = (0..depth)
            .map(|_| {
                let (file, order) = (&file, &order);
                s.spawn(move || -> anyhow::Result<Vec<u64>> {
                    let buffer = Memory::new(PAGE)?;
                    buffer.write(PAGE);
                    let mut times = Vec::new();
                    loop {
                        // Elsewhere each time: what was just read comes faster from many a device.
                        let page = order.at(reads.fetch_add(1, Ordering::Relaxed) % pages);
                        let began = Instant::now();
                        // SAFETY: the buffer is ours, and a page long.
                        let n = unsafe {
                            file::pread(file.as_raw_fd(), buffer.start, PAGE, page * PAGE as u64)
                        };
                        ensure!(matches!(n, Ok(PAGE)), "a read of page {page} failed");
                        if began >= counts {
                            times.push(began.elapsed().as_nanos() as u64);
                        }
                        if Instant::now() >= over && !times.is_empty() {
                            return Ok(times);
                        }
                    }
                })
            })
            .collect();
        for t in threads {
            all.extend(
                t.join()
                    .map_err(|_| anyhow::anyhow!("a reader panicked"))??,
            );
        }
        Ok(())
    })?;
    all.sort_unstable();
    Ok(all)
}

/// Reads that are handed to the kernel and not waited for (`io_submit(2)`).
struct Queue(usize);

/// The kernel's `struct iocb`, as far as it is needed.
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    key: [u32; 2],
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    len: u64,
    offset: i64,
    reserved: u64,
    flags: [u32; 2],
}

const _: () = assert!(size_of::<Request>() == 64);

/// The kernel's `struct io_event`.
#[repr(C)]
#[derive(Default)]
struct Ended {
    data: u64,
    request: u64,
    result: i64,
    second_result: i64,
}

const _: () = assert!(size_of::<Ended>() == 32);

impl Queue {
    /// For so many reads under way. `None` where the kernel has no such calls, or permits none.
    fn new(depth: u32) -> Option<Queue> {
        let mut queue = 0usize;
        let to = &raw mut queue as usize;
        // SAFETY: the call writes a word of ours.
        let done = unsafe { raw::syscall(libc::SYS_io_setup, [depth as usize, to, 0, 0, 0, 0]) };
        raw::check(done).ok()?;
        Some(Queue(queue))
    }

    /// Hands over the read of a page. Returns how long the call took, in nanoseconds.
    ///
    /// # Safety
    ///
    /// The buffer must be a page that nobody else uses, and must live until the read has ended.
    unsafe fn read(
        &self,
        file: &File,
        offset: u64,
        buffer: usize,
        name: u64,
    ) -> anyhow::Result<u64> {
        let request = Request {
            data: name,
            // (Opcode 0 is a read.)
            fd: file.as_raw_fd() as u32,
            buffer: buffer as u64,
            len: PAGE as u64,
            offset: offset as i64,
            ..Request::default()
        };
        let requests = [&raw const request];
        let arguments = [self.0, 1, requests.as_ptr() as usize, 0, 0, 0];
        let mut done = 0;
        // SAFETY: one request, which the kernel copies; its buffer is the caller's promise.
        let took = timed(|| done = unsafe { raw::syscall(libc::SYS_io_submit, arguments) });
        ensure!(raw::check(done) == Ok(1), "io_submit failed");
        Ok(took)
    }

    /// Waits for the end of a read. Returns its name.
    fn wait(&self) -> anyhow::Result<u64> {
        let mut ended = Ended::default();
        let to = &raw mut ended as usize;
        // SAFETY: the call writes one structure of ours.
        let n = unsafe { raw::syscall(libc::SYS_io_getevents, [self.0, 1, 1, to, 0, 0]) };
        ensure!(raw::check(n) == Ok(1), "io_getevents failed");
        ensure!(ended.result == PAGE as i64, "a read of a page failed");
        Ok(ended.data)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: ours; the call waits for the reads that are under way.
        unsafe { raw::syscall(libc::SYS_io_destroy, [self.0, 0, 0, 0, 0, 0]) };
    }
}

/// What it takes to hand a direct read of a page to the device and not to wait for it, in nanoseconds, system call and all.
/// `None` where there is no such call.
fn submission(path: &Path, pages: u64, reads: &AtomicU64) -> anyhow::Result<Option<f64>> {
    const TIMES: usize = 4_000;
    let order = Permutation::new(pages);
    let file = open_direct(path)?;
    let buffers = Memory::new(BESIDE as usize * PAGE)?;
    buffers.write(PAGE);
    // (Dropped before the buffers: no read is under way when they go.)
    let Some(queue) = Queue::new(BESIDE) else {
        return Ok(None);
    };
    let mut free: Vec<u64> = (0..u64::from(BESIDE)).collect();
    let mut times = Vec::with_capacity(TIMES);
    while times.len() < TIMES {
        let slot = match free.pop() {
            Some(slot) => slot,
            None => queue.wait()?,
        };
        let page = order.at(reads.fetch_add(1, Ordering::Relaxed) % pages);
        let buffer = buffers.start + slot as usize * PAGE;
        // SAFETY: the page of a slot that is free; the queue is dropped, and has waited for its reads, before the buffers.
        times.push(unsafe { queue.read(&file, page * PAGE as u64, buffer, slot)? });
    }
    times.sort_unstable();
    Ok(Some(times[TIMES / 2] as f64))
}

/// What it takes a thread to send itself a signal, to run its handler and to return from it, in nanoseconds, system call
/// and all.
fn signal_to_self() -> anyhow::Result<f64> {
    const TIMES: usize = 20_000;
    static HANDLED: AtomicU64 = AtomicU64::new(0);
    extern "C" fn handler(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        HANDLED.fetch_add(1, Ordering::Relaxed);
    }
    // Ignored unless somebody asks for it.
    const SIGNAL: i32 = libc::SIGURG;
    let before = HANDLED.load(Ordering::Relaxed);
    // SAFETY: the handler adds to a number, and nothing here has one for this signal.
    let former = unsafe { signal::set_action(SIGNAL, &signal::Action::new(handler, signal::ALL)) }
        .context("cannot set a signal handler, to measure what a signal costs")?;
    let (pid, tid) = (raw::getpid(), raw::gettid());
    let mut failed = 0;
    let ns = median(TIMES, || {
        timed(|| {
            for _ in 0..TIMES {
                failed += usize::from(signal::tgkill(pid, tid, SIGNAL).is_err());
            }
        })
    });
    // SAFETY: what was there before.
    let restored = unsafe { signal::set_action(SIGNAL, &former) };
    restored.context("cannot give a signal handler back")?;
    let handled = HANDLED.load(Ordering::Relaxed) - before;
    ensure!(
        failed == 0 && handled == (TIMES * REPEAT) as u64,
        "a signal that a thread sends itself did not arrive, so that it cannot be measured"
    );
    Ok(ns)
}

/// Measures everything, with a file of test data that is not in memory.
///
/// # Errors
///
/// When the file cannot be read, or memory is short.
pub fn measure(path: &Path, bytes: u64, mut progress: impl FnMut(&str)) -> anyhow::Result<Micro> {
    let pages = bytes / PAGE as u64;
    let allowed = allowed()?;
    let processors = allowed.len();
    let one = *allowed.first().context("no processor may be used")?;
    let other = *allowed.get(1).unwrap_or(&one);
    let mut found = Found::default();

    progress("system calls and wake-ups");
    let syscall = median(100_000, || {
        timed(|| (0..100_000).for_each(|_| _ = black_box(raw::getpid())))
    });
    found.set("syscall", syscall);
    let same = hand_over([one, one]);
    let across = hand_over([one, other]);
    let wake = wake([one, other]);
    found.set("wake", wake);
    // A turn on one processor is a wake-up (without an interrupt), two system calls and a switch.
    let switch = (same - 2.0 * syscall) * 0.6;
    found.set("context_switch", switch);
    found.set("tick", tick());
    let wakeup = found.at_least("wakeup", across - wake - syscall, switch);
    found.set("wakeup", wakeup);

    progress("anonymous memory");
    // What the machine gives for the first time is slower than what it has given before.
    for _ in 0..2 {
        Memory::new(LARGE)?.write(PAGE);
    }
    let m = Memory::new(SMALL)?;
    let n = SMALL / PAGE;
    // A read of memory that was never written maps the page of zeros: a fault, and nothing else.
    let fault = median(n, || {
        m.discard();
        timed(|| m.read(PAGE))
    });
    let touch = median(n, || {
        m.discard();
        timed(|| m.write(PAGE))
    });
    // Each touch by itself: how much they scatter. A hundredth at either end does not count.
    m.discard();
    let mut touches: Vec<u64> = (m.start..m.start + m.len)
        .step_by(PAGE)
        .map(|at| {
            // SAFETY: in our mapping, which is writable and known to nobody else.
            timed(|| unsafe { core::ptr::write_volatile(at as *mut u8, 1) })
        })
        .collect();
    touches.sort_unstable();
    let middle = &touches[touches.len() / 100..touches.len() - touches.len() / 100];
    let mean = middle.iter().sum::<u64>() as f64 / middle.len() as f64;
    let squares = middle.iter().map(|&ns| (ns as f64 - mean).powi(2));
    let deviation = (squares.sum::<f64>() / middle.len() as f64).sqrt();
    // That of numbers which are spread evenly, from so much less to so much more.
    let scatter = 100.0 * 3f64.sqrt() * deviation / mean;
    let scatter = found.replace_unless(scatter <= 100.0, "scatter", scatter, 100.0, "%");
    found.set("scatter", scatter);
    let unmap = median(n, || {
        m.write(PAGE);
        timed(|| m.discard())
    });
    let zero = median(n, || {
        m.write(PAGE);
        // SAFETY: our mapping, as long as that.
        timed(|| unsafe { std::ptr::write_bytes(m.start as *mut u8, 0, m.len) })
    });
    m.write(PAGE);
    let mut failed = 0;
    let mut protect = |pages: usize, times: usize| {
        median(times, || {
            timed(|| {
                for i in 0..times {
                    let rights = [libc::PROT_READ, libc::PROT_READ | libc::PROT_WRITE][i % 2];
                    let at = m.start as *mut libc::c_void;
                    // SAFETY: our own mapping, and nobody writes to it meanwhile.
                    failed += unsafe { libc::mprotect(at, pages * PAGE, rights) };
                }
            })
        })
    };
    let (one_page, all_pages) = (protect(1, 1_000), protect(n, 2));
    ensure!(
        failed == 0,
        "mprotect failed, so that it cannot be measured"
    );
    found.set("mprotect", one_page - syscall);
    found.set("mprotect_page", (all_pages - one_page) / n as f64);
    drop(m);
    found.set("fault", fault * 0.75);
    found.set("zero_page", zero);
    found.set("unmap_page", unmap);
    let alone = page_loop();
    let empty = median(2_000, || {
        timed(|| {
            for _ in 0..2_000 {
                if let Ok(start) = mem::map_anonymous(PAGE) {
                    // SAFETY: mapped just now; its address is known to nobody else.
                    let _ = unsafe { mem::unmap(start, PAGE) };
                }
            }
        })
    });
    found.set("mmap", (empty - 2.0 * syscall) * 0.5);
    found.set("munmap", (empty - 2.0 * syscall) * 0.5);
    if processors > 1 {
        let (beside, lost) = page_loop_beside([one, other])?;
        let ipi = found.at_least("ipi", beside - alone, 500.0);
        found.set("ipi", ipi);
        let lost = found.at_least("ipi_handle", lost, 200.0);
        found.set("ipi_handle", lost);
    }

    progress("fork and smaps");
    let (small_fork, small_wait) = fork()?;
    let small_smaps = smaps();
    let m = Memory::new(LARGE)?;
    m.write(PAGE);
    // (Before the fork, after which a page is looked at for longer.)
    let large_smaps = smaps();
    let (large_fork, large_wait) = fork()?;
    drop(m);
    let n = (LARGE / PAGE) as f64;
    found.set("fork", small_fork + small_wait);
    found.set("fork_vma", fork_vma(small_fork)?);
    found.set("fork_page", (large_fork - small_fork) / n);
    found.set("exit_page", (large_wait - small_wait) / n);
    found.set("smaps_page", (large_smaps - small_smaps) / n);

    progress("reads from the device");
    // A processor that goes idle between reads charges its wake-up to them; so several read at a time.
    let (processor, switches) = (cpu_seconds(), switches());
    let first = raw::monotonic_ns() >> 10;
    let reads = AtomicU64::new(first);
    let pread = {
        let several = device(path, pages, BESIDE, DEVICE, &reads)?;
        drop(several);
        let switched = (self::switches() - switches) as f64 * switch;
        ((cpu_seconds() - processor) * 1e9 - switched)
            / (reads.load(Ordering::Relaxed) - first) as f64
    };
    let submit = submission(path, pages, &reads)?;
    let mut latency_us: Vec<(u32, f64)> = Vec::new();
    let mut spread = Vec::new();
    for depth in DEPTHS {
        let times = device(path, pages, depth, DEVICE, &reads)?;
        let us = |share: f64| {
            let at = (share * (times.len() - 1) as f64).round() as usize;
            (times[at] as f64 - pread) / 1e3
        };
        // (Noise must not make the device faster under load.)
        let least = latency_us.last().map_or(1.0, |l| l.1);
        let half = us(0.5);
        let what = format!("the time of a read with {depth} under way");
        let latency = found.replace_unless(half >= least, &what, half, least, "µs");
        latency_us.push((depth, latency));
        let mut shares = Vec::new();
        for share in SHARES {
            let what = format!(
                "the time of {:.1} % of the reads with {depth} under way",
                100.0 * share
            );
            let time = found.replace_unless(us(share) >= 1.0, &what, us(share), 1.0, "µs");
            shares.push((share, time / half.max(1.0)));
        }
        spread.push((depth, shares));
    }

    progress("major faults");
    drop_cache(path)?;
    let file = File::open(path)?;
    // SAFETY: a new mapping of a file that nobody changes meanwhile.
    let mapped = unsafe { map_file(&file, bytes as usize)? };
    let order = Permutation::new(pages);
    let faults = FAULTS.min(pages / 2);
    let from = raw::monotonic_ns() % pages;
    let at = |i: u64| mapped.start + order.at((from + i) % pages) as usize * PAGE;
    let (before, switches) = (cpu_seconds(), self::switches());
    std::thread::scope(|s| {
        for t in 0..u64::from(BESIDE) {
            let at = &at;
            s.spawn(move || {
                for i in (t..faults).step_by(BESIDE as usize) {
                    // SAFETY: in the mapping.
                    black_box(unsafe { core::ptr::read_volatile(at(i) as *const u8) });
                }
            });
        }
    });
    let switched = (self::switches() - switches) as f64 * switch;
    let major = ((cpu_seconds() - before) * 1e9 - switched) / faults as f64;
    // The same pages once more, which are in the page cache and in no page table.
    // SAFETY: a mapping of a file, which can be read again.
    let _ = unsafe { mem::madvise(mapped.start, mapped.len, libc::MADV_DONTNEED) };
    let minor = timed(|| {
        for i in 0..faults {
            // SAFETY: in the mapping.
            black_box(unsafe { core::ptr::read_volatile(at(i) as *const u8) });
        }
    }) as f64
        / faults as f64;
    let used = timed(|| {
        for i in 0..faults {
            // SAFETY: in the mapping, a page long; its number is that of the page in the file.
            let page = unsafe { core::slice::from_raw_parts(at(i) as *const u8, PAGE) };
            black_box(wrong_bytes(page, ((at(i) - mapped.start) / PAGE) as u64));
        }
    }) as f64
        / faults as f64;
    drop(mapped);
    found.set("use_page", used);
    let map_page = found.at_least("map_page", minor - fault * 0.75, 100.0);
    found.set("map_page", map_page);
    let alloc = found.at_least("alloc_page", touch - fault * 0.75 - zero, 100.0);
    found.set("alloc_page", alloc);
    let io = major - fault * 0.75 - alloc - map_page;
    let io = found.at_least("submit_read and complete_read", io, 1_000.0);
    // (Where it cannot be told what is whose, both costs are the typical ones.)
    if let Some(submit) = submit {
        let submit = found.at_least("submit_read", submit - syscall, 100.0);
        found.set("submit_read", submit);
        let complete = found.at_least("complete_read", io - submit, 100.0);
        found.set("complete_read", complete);
    }
    let besides = found.at_least("pread", pread - io - syscall, 200.0);
    found.set("pread", besides);

    progress("userfaultfd");
    let copy = uffd_copy()?;
    found.set("uffd_copy", copy);
    let memory_read = memory_read()?;
    // On one processor a fault that a monitor serves is two faults, a read, a copy, two wake-ups with their switches, and the rest.
    let event = monitored_miss(one)?
        - (2.0 * fault * 0.75 + memory_read + copy)
        - 2.0 * (same - 2.0 * syscall);
    let event = found.at_least("uffd_event", event, 500.0);
    found.set("uffd_event", event);
    let delivered = signal_to_self()? - syscall;
    let delivered = found.at_least("signal", delivered, 100.0);
    found.set("signal", delivered);
    let engine = engine_miss()? - fault * 0.75 - delivered - copy - memory_read;
    let engine = found.at_least("engine", engine, 100.0);
    found.set("engine", engine);
    Ok(Micro {
        costs: found.costs,
        latency_us,
        spread,
        replaced: found.replaced,
    })
}

/// # Safety
///
/// The file must not get shorter while it is mapped.
unsafe fn map_file(file: &File, len: usize) -> anyhow::Result<Memory> {
    // SAFETY: a new mapping, at an address that the kernel chooses.
    let start = unsafe {
        mem::map(
            0,
            len,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    }
    .context("cannot map the file")?;
    // SAFETY: mapped just now.
    let _ = unsafe { mem::madvise(start, len, libc::MADV_RANDOM) };
    Ok(Memory { start, len })
}

fn uffd_copy() -> anyhow::Result<f64> {
    let m = Memory::new(SMALL)?;
    let source = Memory::new(PAGE)?;
    source.write(PAGE);
    let fd = uffd::open(uffd::USER_MODE_ONLY | libc::O_CLOEXEC as u32)
        .context("cannot open a userfaultfd")?;
    let copied = (|| {
        uffd::enable(fd, uffd::FEATURE_SIGBUS).context("cannot switch userfaultfd on")?;
        // SAFETY: our mapping.
        unsafe { uffd::register(fd, m.start, m.len) }.context("cannot register memory")?;
        let mut copied = 0;
        let ns = median(m.len / PAGE, || {
            m.discard();
            timed(|| {
                for at in (m.start..m.start + m.len).step_by(PAGE) {
                    // SAFETY: registered, and read by nobody.
                    copied += unsafe { uffd::copy(fd, at, source.start, PAGE, false) }.bytes;
                }
            })
        });
        ensure!(
            copied == m.len * REPEAT,
            "UFFDIO_COPY failed, so that it cannot be measured"
        );
        Ok(ns)
    })();
    // SAFETY: opened above, and used by nobody else.
    unsafe { file::close(fd) };
    copied
}

/// A fault on a file in memory that a monitor of a userfaultfd serves, on the same processor.
fn monitored_miss(cpu: usize) -> anyhow::Result<f64> {
    let file = memory_file()?;
    let pages = (SMALL / PAGE / 4) as u64;
    let order = Permutation::new((SMALL / PAGE) as u64);
    let monitor = Monitor::serve(file, SMALL, 1, Some(cpu))?;
    let start = monitor.start();
    let took = std::thread::scope(|s| {
        let faults = s.spawn(|| {
            pin(cpu);
            timed(|| {
                for i in 0..pages {
                    let at = start + order.at(i) as usize * PAGE;
                    // SAFETY: in the monitor's mapping, which lives until it is dropped.
                    black_box(unsafe { core::ptr::read_volatile(at as *const u8) });
                }
            })
        });
        faults.join()
    });
    let took = took.map_err(|_| anyhow::anyhow!("a reader panicked"))?;
    Ok(took as f64 / pages as f64)
}

/// A file in memory, of [`SMALL`] bytes.
fn memory_file() -> anyhow::Result<File> {
    let mut file = tempfile::tempfile_in("/dev/shm").context("cannot make a file in /dev/shm")?;
    std::io::Write::write_all(&mut file, &vec![7; SMALL])?;
    Ok(file)
}

fn memory_read() -> anyhow::Result<f64> {
    let file = memory_file()?;
    let buffer = Memory::new(PAGE)?;
    buffer.write(PAGE);
    let mut read = 0;
    let ns = median(SMALL / PAGE, || {
        timed(|| {
            for at in (0..SMALL).step_by(PAGE) {
                // SAFETY: the buffer is ours, and a page long.
                let n = unsafe { file::pread(file.as_raw_fd(), buffer.start, PAGE, at as u64) };
                read += n.unwrap_or(0);
            }
        })
    });
    ensure!(read == SMALL * REPEAT, "a file in /dev/shm cannot be read");
    Ok(ns)
}

/// A miss of the engine on a file in memory.
fn engine_miss() -> anyhow::Result<f64> {
    let file = memory_file()?;
    let pool = faultless::Pool::builder()
        .memory(faultless::ByteSize::gib(1))
        .build()?;
    // SAFETY: nobody else has this file.
    let map = unsafe { pool.map_trusted(file)? };
    let order = Permutation::new((SMALL / PAGE) as u64);
    let n = SMALL / PAGE / 2;
    let took = timed(|| {
        for i in 0..n {
            black_box(map[order.at(i as u64) as usize * PAGE]);
        }
    });
    Ok(took as f64 / n as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_floor_that_is_hit_is_told() {
        let mut found = Found::default();
        assert_eq!(found.at_least("map_page", 600.0, 100.0), 600.0);
        assert!(found.replaced.is_empty());
        assert_eq!(found.at_least("alloc_page", -35.0, 100.0), 100.0);
        found.set("mprotect", -2.0);
        found.set("zero_page", 250.4);
        let told: Vec<_> = found
            .replaced
            .iter()
            .map(|r| (r.what.as_str(), r.came_out, r.used, r.unit))
            .collect();
        assert_eq!(
            told,
            [
                ("alloc_page", -35.0, 100.0, "ns"),
                ("mprotect", -2.0, 1.0, "ns")
            ]
        );
        assert_eq!(found.costs.get("mprotect"), Some(&1));
        assert_eq!(found.costs.get("zero_page"), Some(&250));
        // A value that is not a number counts as impossible.
        assert_eq!(found.at_least("fault", f64::NAN, 100.0), 100.0);
    }

    #[test]
    fn a_signal_costs_more_than_its_system_call() {
        let syscall = median(10_000, || {
            timed(|| (0..10_000).for_each(|_| _ = black_box(raw::getpid())))
        });
        assert!(signal_to_self().expect("measured") > syscall);
    }
}
