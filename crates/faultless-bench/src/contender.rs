//! Ways to read a page of the file. All of them open the file themselves, are given the same pages, and are dropped
//! after one measurement, so that each starts cold.

#![allow(
    unsafe_code,
    reason = "contenders are made of mmap, pread and userfaultfd"
)]

use crate::deep::{self, Uring};
use crate::floor::Floor;
use crate::onlooker::Way;
use anyhow::Context;
use faultless::{Advice, ByteSize, GuardMarkers, Map, Pool};
use faultless_sys::mem::{self, PAGE};
use faultless_sys::{Errno, file, uffd};
use faultless_untrusted::printable;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

/// A contender's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The kernel's mmap, with the advice that suits: `MADV_RANDOM` for random reads, or none if that is faster.
    Mmap,
    /// `pread` of one aligned page, `O_DIRECT`, no cache.
    Pread,
    /// userfaultfd, whose events monitor threads read.
    UffdMonitor,
    /// userfaultfd whose faults are signals, and a handler that does nothing but read and install the page.
    Floor,
    /// The kernel's mmap, each page asked for by `MADV_POPULATE_READ` before it is touched.
    Populate,
    /// This project.
    Faultless,
    /// The same by loads that ask first ([`Map::load`]).
    FaultlessLoad,
    /// The same in a map of the kernel's ([`Pool::map_live`]): its memory is the page cache.
    FaultlessLive,
    /// Plain loads of such a map, whose misses guard markers tell ([`GuardMarkers`]).
    FaultlessMarked,
    /// Loads by [`Map::load_many`], [`Terms::depth`] pages at a time in each thread.
    FaultlessBatch,
    /// The same by [`Map::load_async`], so many futures at a time in each thread.
    FaultlessAsync,
    /// Plain loads of a map whose units are huge pages.
    FaultlessHuge,
    /// A raw loop of io_uring, so many direct reads at a time in each thread.
    Uring,
    /// fio, by io_uring and direct reads of pages of its own choice. The benchmark does not check its bytes.
    Fio,
    /// Plain loads with a budget that is larger than the memory of its control group, or has become so.
    FaultlessOver,
    /// A plain C program that maps the file.
    Program,
    /// The same program under `faultless run --backend stand-in`.
    ProgramServed,
    /// The same under `faultless run --backend live`.
    ProgramLive,
    /// The kernel's mmap while `faultless observe` looks on.
    MmapObserved,
    /// … while it records a trace.
    MmapTraced,
    /// … while `perf record` records the same tracepoints.
    MmapRecorded,
}

impl Kind {
    /// Those that read within the benchmark's own process and are measured unless others are named, in the order in which they are shown.
    pub const ALL: [Kind; 6] = [
        Kind::Mmap,
        Kind::Pread,
        Kind::UffdMonitor,
        Kind::Faultless,
        Kind::FaultlessLoad,
        Kind::FaultlessOver,
    ];
    /// A program of its own, without and with.
    pub const UNMODIFIED: [Kind; 3] = [Kind::Program, Kind::ProgramServed, Kind::ProgramLive];
    /// The kernel's mmap, without and with somebody who looks on.
    pub const OBSERVED: [Kind; 4] = [
        Kind::Mmap,
        Kind::MmapObserved,
        Kind::MmapTraced,
        Kind::MmapRecorded,
    ];
    /// Those that show what a read costs by each way to ask for it.
    pub const READS: [Kind; 11] = [
        Kind::Mmap,
        Kind::Pread,
        Kind::Uring,
        Kind::Fio,
        Kind::Populate,
        Kind::Floor,
        Kind::Faultless,
        Kind::FaultlessLoad,
        Kind::FaultlessLive,
        Kind::FaultlessBatch,
        Kind::FaultlessAsync,
    ];
    /// All of these.
    pub const EVERY: [Kind; 21] = [
        Kind::Mmap,
        Kind::Pread,
        Kind::UffdMonitor,
        Kind::Floor,
        Kind::Populate,
        Kind::Faultless,
        Kind::FaultlessLoad,
        Kind::FaultlessLive,
        Kind::FaultlessMarked,
        Kind::FaultlessBatch,
        Kind::FaultlessAsync,
        Kind::FaultlessHuge,
        Kind::Uring,
        Kind::Fio,
        Kind::FaultlessOver,
        Kind::Program,
        Kind::ProgramServed,
        Kind::ProgramLive,
        Kind::MmapObserved,
        Kind::MmapTraced,
        Kind::MmapRecorded,
    ];

    /// Whether this is the one that others are compared with.
    pub fn is_baseline(self) -> bool {
        matches!(self, Kind::Mmap | Kind::Program)
    }

    /// Whether this project's library reads the pages.
    pub fn is_engine(self) -> bool {
        matches!(
            self,
            Kind::Faultless
                | Kind::FaultlessLoad
                | Kind::FaultlessBatch
                | Kind::FaultlessAsync
                | Kind::FaultlessHuge
                | Kind::FaultlessOver
        )
    }

    /// Whether pages are read by the kernel's mmap.
    pub fn is_kernel_mmap(self) -> bool {
        matches!(self, Kind::Mmap | Kind::Populate) || self.way().is_some()
    }

    /// How somebody looks on.
    pub fn way(self) -> Option<Way> {
        match self {
            Kind::MmapObserved => Some(Way::Observe),
            Kind::MmapTraced => Some(Way::Trace),
            Kind::MmapRecorded => Some(Way::Perf),
            _ => None,
        }
    }

    /// As it is written on the command line and in tables.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Mmap => "mmap",
            Kind::Pread => "pread",
            Kind::UffdMonitor => "uffd-monitor",
            Kind::Floor => "floor",
            Kind::Populate => "populate",
            Kind::Faultless => "faultless",
            Kind::FaultlessLoad => "faultless-load",
            Kind::FaultlessLive => "faultless-live",
            Kind::FaultlessMarked => "faultless-marked",
            Kind::FaultlessBatch => "faultless-batch",
            Kind::FaultlessAsync => "faultless-async",
            Kind::FaultlessHuge => "faultless-huge",
            Kind::Uring => "uring",
            Kind::Fio => "fio",
            Kind::FaultlessOver => "faultless-over",
            Kind::Program => "C program",
            Kind::ProgramServed => "faultless run",
            Kind::ProgramLive => "faultless run, live",
            Kind::MmapObserved => "observed",
            Kind::MmapTraced => "observed, trace",
            Kind::MmapRecorded => "perf record",
        }
    }
}

/// Something that yields pages.
pub trait Contender: Send + Sync {
    /// Calls `check` with the 4,096 bytes of page `number`. `buffer` is the calling thread's own, page-aligned.
    fn read(
        &self,
        number: u64,
        buffer: &mut PageBuffer,
        check: &mut dyn FnMut(&[u8]),
    ) -> anyhow::Result<()>;

    /// Pages that a thread asks for at a time.
    fn depth(&self) -> usize {
        1
    }

    /// As [`read`](Self::read), for several pages that are asked for together, in any order. Contenders that do no such thing read one
    /// after the other.
    fn read_many(&self, numbers: &[u64], check: &mut dyn FnMut(u64, &[u8])) -> anyhow::Result<()> {
        let mut buffer = PageBuffer::new();
        numbers
            .iter()
            .try_for_each(|&n| self.read(n, &mut buffer, &mut |bytes| check(n, bytes)))
    }

    /// Misses served so far, where the contender counts them itself.
    fn misses(&self) -> Option<u64> {
        None
    }

    /// As [`read`](Self::read), for one thread that reads in order beside others that do not: a contender that wants to be
    /// told has a second mapping for it.
    fn read_in_order(
        &self,
        number: u64,
        buffer: &mut PageBuffer,
        check: &mut dyn FnMut(&[u8]),
    ) -> anyhow::Result<()> {
        self.read(number, buffer, check)
    }

    /// All of the data as memory, for contenders that are mappings.
    fn bytes(&self) -> Option<&[u8]> {
        None
    }

    /// The map whose loads ask first, if that is how this reads.
    fn asks_first(&self) -> Option<&Map> {
        None
    }

    /// Reads pages `from` to `to` in order, and shows each. Contenders that are no mappings read as large a piece at once
    /// as serves them.
    fn scan(
        &self,
        from: u64,
        to: u64,
        check: &mut dyn FnMut(u64, &[u8]) -> bool,
    ) -> anyhow::Result<()> {
        let mut buffer = PageBuffer::new();
        let mut go_on = true;
        for number in from..to {
            self.read(number, &mut buffer, &mut |bytes| {
                go_on = check(number, bytes)
            })?;
            if !go_on {
                break;
            }
        }
        Ok(())
    }
}

/// How a contender is told that it will be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hint {
    /// At random: nothing is to be read ahead.
    Random,
    /// In order: `MADV_SEQUENTIAL`. The engine is told nothing: it has to find out.
    InOrder,
    /// At random, but for [`read_in_order`](Contender::read_in_order). The kernel's mmap has a second mapping for that,
    /// with `MADV_SEQUENTIAL`; the engine is told nothing of either.
    Both,
}

/// What a contender is made of.
#[derive(Debug, Clone, Copy)]
pub struct Terms<'a> {
    /// The data file.
    pub path: &'a Path,
    /// How much of it is used, in bytes.
    pub len: u64,
    /// Budget of contenders that have one.
    pub memory: ByteSize,
    /// Which of several ways: the number of monitor threads of [`Kind::UffdMonitor`]; 1 for a [`Kind::Mmap`] that is told
    /// nothing, and for a [`Kind::Floor`] that blocks no signals.
    pub variant: usize,
    /// What the contender is told.
    pub hint: Hint,
    /// Reads that a thread has in flight, where the contender has several.
    pub depth: usize,
}

/// A page-aligned page, present in memory.
#[repr(align(4096))]
#[derive(Debug)]
pub struct PageBuffer([u8; PAGE]);

impl PageBuffer {
    /// A zeroed page.
    pub fn new() -> Box<Self> {
        Box::new(PageBuffer([0; PAGE]))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.0.as_mut_ptr()
    }
}

/// Opens a contender.
pub fn open(kind: Kind, terms: &Terms<'_>) -> anyhow::Result<Box<dyn Contender>> {
    let engine = |way| Engine::open(terms, way).map(|c| Box::new(c) as _);
    let opened: anyhow::Result<Box<dyn Contender>> = match kind {
        Kind::Mmap
        | Kind::Populate
        | Kind::MmapObserved
        | Kind::MmapTraced
        | Kind::MmapRecorded => {
            KernelMmap::open(terms, kind == Kind::Populate).map(|c| Box::new(c) as _)
        }
        Kind::Floor => Floor::open(terms).map(|c| Box::new(c) as _),
        Kind::Pread => Pread::open(terms.path).map(|c| Box::new(c) as _),
        Kind::UffdMonitor => Monitor::open(terms).map(|c| Box::new(c) as _),
        Kind::Faultless | Kind::FaultlessOver => engine(Asking::Touch),
        Kind::FaultlessLoad => engine(Asking::Load { live: false }),
        Kind::FaultlessLive => engine(Asking::Load { live: true }),
        Kind::FaultlessMarked => engine(Asking::TouchMarked),
        Kind::FaultlessBatch => engine(Asking::Batch(terms.depth)),
        Kind::FaultlessAsync => engine(Asking::Futures(terms.depth)),
        Kind::FaultlessHuge => engine(Asking::TouchHuge),
        Kind::Uring => Uring::open(terms).map(|c| Box::new(c) as _),
        Kind::Fio | Kind::Program | Kind::ProgramServed | Kind::ProgramLive => {
            anyhow::bail!("{} is a process of its own", kind.name())
        }
    };
    opened.with_context(|| format!("cannot set up contender {}", kind.name()))
}

/// Drops the file's pages from the page cache.
pub fn drop_cache(path: &Path) -> anyhow::Result<()> {
    let file = File::open(path)?;
    // SAFETY: advice on a descriptor.
    unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    Ok(())
}

pub(crate) fn open_direct(path: &Path) -> anyhow::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)
        .with_context(|| {
            format!(
                "cannot open {} for direct reads (its file system may not have them)",
                printable(&path)
            )
        })
}

/// A range of address space that is given back when dropped.
pub(crate) struct Mapping {
    pub(crate) start: usize,
    pub(crate) len: usize,
}

impl Mapping {
    pub(crate) fn page(&self, number: u64) -> &[u8] {
        let at = number as usize * PAGE;
        assert!(at + PAGE <= self.len);
        // SAFETY: inside the mapping, which lives as long as self; nobody writes to the file during a benchmark.
        unsafe { std::slice::from_raw_parts((self.start + at) as *const u8, PAGE) }
    }
}

impl Mapping {
    fn of_file(file: &File, len: usize, advice: i32) -> anyhow::Result<Self> {
        // SAFETY: the kernel chooses the range.
        let start = unsafe {
            mem::map(
                0,
                len,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )?
        };
        let mapping = Mapping { start, len };
        // SAFETY: changes no contents.
        unsafe { mem::madvise(start, len, advice)? };
        Ok(mapping)
    }

    fn all(&self) -> &[u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.start as *const u8, self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: ours, and `page` hands out borrows of self only.
        let _ = unsafe { mem::unmap(self.start, self.len) };
    }
}

struct KernelMmap {
    map: Mapping,
    /// For a thread that reads in order beside others.
    in_order: Option<Mapping>,
    /// Each page is asked for before it is touched.
    populates: bool,
}

impl KernelMmap {
    fn open(terms: &Terms<'_>, populates: bool) -> anyhow::Result<Self> {
        let file = File::open(terms.path)?;
        let random = match terms.variant {
            0 => libc::MADV_RANDOM,
            _ => libc::MADV_NORMAL,
        };
        let (advice, second) = match terms.hint {
            Hint::Random => (random, false),
            Hint::InOrder => (libc::MADV_SEQUENTIAL, false),
            Hint::Both => (random, true),
        };
        let len = terms.len as usize;
        let in_order = if second {
            // An open file of its own: the kernel keeps what it learns for read-ahead with the open file.
            let file = File::open(terms.path)?;
            Some(Mapping::of_file(&file, len, libc::MADV_SEQUENTIAL)?)
        } else {
            None
        };
        Ok(KernelMmap {
            map: Mapping::of_file(&file, len, advice)?,
            in_order,
            populates,
        })
    }
}

impl Contender for KernelMmap {
    fn read(
        &self,
        number: u64,
        _: &mut PageBuffer,
        check: &mut dyn FnMut(&[u8]),
    ) -> anyhow::Result<()> {
        let page = self.map.page(number);
        if self.populates {
            // SAFETY: changes no contents.
            unsafe { mem::madvise(page.as_ptr() as usize, PAGE, libc::MADV_POPULATE_READ) }
                .context("MADV_POPULATE_READ")?;
        }
        check(page);
        Ok(())
    }

    fn read_in_order(
        &self,
        number: u64,
        _: &mut PageBuffer,
        check: &mut dyn FnMut(&[u8]),
    ) -> anyhow::Result<()> {
        check(self.in_order.as_ref().unwrap_or(&self.map).page(number));
        Ok(())
    }

    fn bytes(&self) -> Option<&[u8]> {
        Some(self.map.all())
    }
}

struct Pread(File);

impl Pread {
    fn open(path: &Path) -> anyhow::Result<Self> {
        open_direct(path).map(Pread)
    }
}

impl Contender for Pread {
    fn read(
        &self,
        number: u64,
        buffer: &mut PageBuffer,
        check: &mut dyn FnMut(&[u8]),
    ) -> anyhow::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.0, &mut buffer.0, number * PAGE as u64)?;
        check(&buffer.0);
        Ok(())
    }

    /// As fast as the device goes: several threads keep large reads in flight, in order, and this one checks.
    fn scan(
        &self,
        from: u64,
        to: u64,
        check: &mut dyn FnMut(u64, &[u8]) -> bool,
    ) -> anyhow::Result<()> {
        let pages = (SCAN_PIECE / PAGE) as u64;
        let pieces = (to - from).div_ceil(pages);
        let buffers = || {
            (0..2)
                .map(|_| Piece::new())
                .collect::<anyhow::Result<Vec<_>>>()
        };
        let buffers = (0..SCAN_READERS)
            .map(|_| buffers())
            .collect::<anyhow::Result<Vec<_>>>()?;
        std::thread::scope(|scope| {
            let channels: Vec<_> = (0..SCAN_READERS)
                .zip(buffers)
                .map(|(first, buffers)| {
                    let (give, take) = std::sync::mpsc::sync_channel(1);
                    let (again, spare) = std::sync::mpsc::channel::<Piece>();
                    buffers.into_iter().for_each(|b| _ = again.send(b));
                    scope.spawn(move || {
                        for piece in (first..pieces).step_by(SCAN_READERS as usize) {
                            let Ok(mut buffer) = spare.recv() else { return };
                            let at = from + piece * pages;
                            let n = pages.min(to - at) as usize * PAGE;
                            let read = std::os::unix::fs::FileExt::read_exact_at(
                                &self.0,
                                &mut buffer.bytes()[..n],
                                at * PAGE as u64,
                            );
                            if give.send((at, n, buffer, read)).is_err() {
                                return;
                            }
                        }
                    });
                    (take, again)
                })
                .collect();
            for piece in 0..pieces {
                let (take, again) = &channels[(piece % SCAN_READERS) as usize];
                let (at, n, mut buffer, read) = take.recv().context("a reader ended early")?;
                read?;
                for (i, page) in buffer.bytes()[..n].chunks(PAGE).enumerate() {
                    if !check(at + i as u64, page) {
                        return Ok(());
                    }
                }
                let _ = again.send(buffer);
            }
            Ok(())
        })
    }
}

/// Reads in flight, and their size, of a scan by `pread`.
const SCAN_READERS: u64 = 4;
const SCAN_PIECE: usize = 2 << 20;

/// A buffer that the device can read into at its full speed: in huge pages, where there are any.
struct Piece {
    map: usize,
    start: usize,
}

/// Size of a huge page.
const HUGE: usize = 2 << 20;

impl Piece {
    fn new() -> anyhow::Result<Self> {
        let map = mem::map_anonymous(SCAN_PIECE + HUGE)?;
        let start = map.next_multiple_of(HUGE);
        // SAFETY: ours, mapped just now; without huge pages it is as good as it can be.
        let _ = unsafe { mem::madvise(start, SCAN_PIECE, libc::MADV_HUGEPAGE) };
        let mut piece = Piece { map, start };
        piece.bytes().fill(0);
        Ok(piece)
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: inside the mapping, writable, and borrowed from its only owner.
        unsafe { std::slice::from_raw_parts_mut(self.start as *mut u8, SCAN_PIECE) }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        // SAFETY: ours, and no borrow of it is left.
        let _ = unsafe { mem::unmap(self.map, SCAN_PIECE + HUGE) };
    }
}

/// userfaultfd as a careful program would use it today: user faults only, every monitor sleeps in its own exclusive
/// epoll (so that one event wakes one of them), takes one event at a time, and reads into a buffer of its own.
pub(crate) struct Monitor {
    map: Mapping,
    stop: Arc<AtomicBool>,
    served: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
    _fd: Arc<OwnedFd>,
}

impl Monitor {
    fn open(terms: &Terms<'_>) -> anyhow::Result<Self> {
        Self::serve(
            open_direct(terms.path)?,
            terms.len as usize,
            terms.variant,
            None,
        )
    }

    /// Serves the beginning of a file with so many threads, all of them on one processor if that is named.
    pub(crate) fn serve(
        source: File,
        len: usize,
        monitors: usize,
        cpu: Option<usize>,
    ) -> anyhow::Result<Self> {
        let source = Arc::new(source);
        let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u32 | uffd::USER_MODE_ONLY;
        let raw = uffd::open(flags).context("userfaultfd")?;
        // SAFETY: the kernel made it for us.
        let fd = Arc::new(unsafe { OwnedFd::from_raw_fd(raw) });
        uffd::enable(raw, 0).context("userfaultfd")?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the kernel chooses the range, which is ours to register.
        let start = unsafe { mem::map(0, len, libc::PROT_READ, flags, -1, 0)? };
        let map = Mapping { start, len };
        // SAFETY: our own mapping.
        unsafe { uffd::register(raw, start, len).context("userfaultfd")? };
        let (stop, served) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let threads = (0..monitors)
            .map(|_| {
                let (fd, source, stop, served) =
                    (fd.clone(), source.clone(), stop.clone(), served.clone());
                std::thread::spawn(move || {
                    if let Some(cpu) = cpu {
                        crate::micro::pin(cpu);
                    }
                    monitor(&fd, &source, start, &stop, &served)
                })
            })
            .collect();
        Ok(Monitor {
            map,
            stop,
            served,
            threads,
            _fd: fd,
        })
    }

    /// Where the file is mapped.
    pub(crate) fn start(&self) -> usize {
        self.map.start
    }
}

fn monitor(fd: &OwnedFd, source: &File, start: usize, stop: &AtomicBool, served: &AtomicU64) {
    // SAFETY: plain descriptors and structures.
    let epoll = unsafe { OwnedFd::from_raw_fd(libc::epoll_create1(libc::EPOLL_CLOEXEC)) };
    let mut event = libc::epoll_event {
        events: (libc::EPOLLIN | libc::EPOLLEXCLUSIVE) as u32,
        u64: 0,
    };
    // SAFETY: both descriptors live, the structure is valid.
    unsafe {
        libc::epoll_ctl(
            epoll.as_raw_fd(),
            libc::EPOLL_CTL_ADD,
            fd.as_raw_fd(),
            &mut event,
        )
    };
    let mut buffer = PageBuffer::new();
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: room for one event.
        unsafe { libc::epoll_wait(epoll.as_raw_fd(), &mut event, 1, 100) };
        let mut message = [MaybeUninit::<uffd::Event>::uninit()];
        while let Ok(1) = uffd::read_events(fd.as_raw_fd(), &mut message) {
            // SAFETY: the kernel wrote one whole event.
            let message = unsafe { message[0].assume_init() };
            if message.event != uffd::EVENT_PAGEFAULT {
                continue;
            }
            let page = message.arg[1] as usize & !(PAGE - 1);
            let read = std::os::unix::fs::FileExt::read_exact_at(
                source,
                &mut buffer.0,
                (page - start) as u64,
            );
            if let Err(e) = read {
                // The reader would wait for ever.
                eprintln!("uffd-monitor: cannot read the data file: {e}");
                std::process::abort();
            }
            loop {
                // SAFETY: a page of the registered range, which nobody else writes to.
                let copied = unsafe {
                    uffd::copy(fd.as_raw_fd(), page, buffer.0.as_ptr() as usize, PAGE, true)
                };
                match copied.error {
                    Some(Errno(libc::EAGAIN)) => continue,
                    Some(Errno(libc::EEXIST)) => {
                        let _ = uffd::wake(fd.as_raw_fd(), page, PAGE);
                        break;
                    }
                    None => break,
                    Some(e) => {
                        eprintln!("uffd-monitor: cannot install a page: {e}");
                        std::process::abort();
                    }
                }
            }
            served.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Contender for Monitor {
    fn read(
        &self,
        number: u64,
        _: &mut PageBuffer,
        check: &mut dyn FnMut(&[u8]),
    ) -> anyhow::Result<()> {
        check(self.map.page(number));
        Ok(())
    }

    fn misses(&self) -> Option<u64> {
        Some(self.served.load(Ordering::Relaxed))
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for t in self.threads.drain(..) {
            let _ = t.join();
        }
    }
}

/// How the engine's pages are asked for.
#[derive(Clone, Copy)]
enum Asking {
    /// They are touched.
    Touch,
    /// The same, in a map of huge pages.
    TouchHuge,
    /// The same, in a live map with guard markers.
    TouchMarked,
    /// [`Map::load`], in a map of the engine's or in a live one.
    Load { live: bool },
    /// [`Map::load_many`], so many at a time.
    Batch(usize),
    /// [`Map::load_async`], so many at a time.
    Futures(usize),
}

impl Asking {
    /// Whether the map is the kernel's.
    fn is_live(self) -> bool {
        matches!(self, Asking::Load { live: true } | Asking::TouchMarked)
    }
}

struct Engine {
    map: Map,
    way: Asking,
}

/// Maps the data file by this project's engine.
fn open_map(terms: &Terms<'_>, way: Asking) -> anyhow::Result<Map> {
    let pool = Pool::builder().memory(terms.memory).build()?;
    if let faultless::Backend::Mmap(why) = pool.backend() {
        anyhow::bail!("the engine does not run here: {why}");
    }
    let file = File::open(terms.path)?;
    let advice = match terms.hint {
        Hint::Random => Advice::Random,
        Hint::InOrder | Hint::Both => Advice::Normal,
    };
    let options = pool
        .options()
        .advice(advice)
        .huge_pages(matches!(way, Asking::TouchHuge));
    let options = options.len(terms.len as usize);
    if way.is_live() {
        let marked = matches!(way, Asking::TouchMarked);
        let options = match marked {
            true => options.markers(GuardMarkers::WherePossible),
            false => options,
        };
        // SAFETY: nobody writes to the data file during a benchmark, and every byte is checked.
        let map = unsafe { options.map_live(&file)? };
        anyhow::ensure!(
            map.has_markers() == marked,
            "a mapping of {} can have no guard markers here",
            printable(&terms.path)
        );
        return Ok(map);
    }
    let map = match options.map(&file) {
        Ok(map) => map,
        // SAFETY: nobody writes to the data file during a benchmark, and every byte is checked.
        Err(faultless::Error::Lease { .. }) => unsafe { options.map_trusted(file)? },
        Err(e) => return Err(e.into()),
    };
    Ok(map)
}

impl Engine {
    fn open(terms: &Terms<'_>, way: Asking) -> anyhow::Result<Self> {
        Ok(Engine {
            map: open_map(terms, way)?,
            way,
        })
    }
}

impl Contender for Engine {
    fn read(
        &self,
        number: u64,
        _: &mut PageBuffer,
        check: &mut dyn FnMut(&[u8]),
    ) -> anyhow::Result<()> {
        self.read_many(&[number], &mut |_, bytes| check(bytes))
    }

    fn depth(&self) -> usize {
        match self.way {
            Asking::Touch | Asking::TouchHuge | Asking::TouchMarked | Asking::Load { .. } => 1,
            Asking::Batch(depth) | Asking::Futures(depth) => depth,
        }
    }

    fn asks_first(&self) -> Option<&Map> {
        matches!(self.way, Asking::Load { .. }).then_some(&self.map)
    }

    fn read_many(&self, numbers: &[u64], check: &mut dyn FnMut(u64, &[u8])) -> anyhow::Result<()> {
        match self.way {
            Asking::Batch(_) => return deep::load_many(&self.map, numbers, check),
            Asking::Futures(_) => return deep::load_async(&self.map, numbers, check),
            Asking::Touch | Asking::TouchHuge | Asking::TouchMarked | Asking::Load { .. } => {}
        }
        for &number in numbers {
            let at = number as usize * PAGE;
            let bytes = match self.way {
                Asking::Load { .. } => self.map.load(at..at + PAGE)?,
                _ => &self.map[at..at + PAGE],
            };
            check(number, bytes);
        }
        Ok(())
    }

    fn misses(&self) -> Option<u64> {
        // (Of a live map, the kernel alone knows what was absent.)
        (!self.way.is_live()).then(|| self.map.stats().misses)
    }

    fn bytes(&self) -> Option<&[u8]> {
        Some(&self.map)
    }
}

/// The descriptor-free check that a file can be read directly at all, for a clear message at the start.
pub fn check_direct(path: &Path) -> anyhow::Result<()> {
    let direct = open_direct(path)?;
    if file::direct_io(direct.as_raw_fd()) == file::DirectIo::Unsupported {
        anyhow::bail!(
            "{} lies on a file system without direct reads; name a file on a disk with --file",
            printable(&path)
        );
    }
    Ok(())
}
