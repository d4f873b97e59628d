//! One live mapping, and what is known of it.

#![allow(
    unsafe_code,
    reason = "gives advice about a mapping, and makes it anew in a child"
)]

use crate::base::ids::Nanos;
use crate::base::primitive::{AtomicI32, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use crate::base::{clock, process};
use crate::coherence::opening::reopen;
use crate::guards::files::LiveFile;
use crate::sync::holders::{Changing, Holders};
use faultless_sys::Errno;
use faultless_sys::file::{self, CacheState};
use faultless_sys::mem::{self, PAGE};
use std::ops::Range;
use std::sync::Arc;

/// Bytes whose markers are installed together and looked at together: what one page of a page table maps.
pub(crate) const CHUNK: usize = 2 << 20;
/// What the kernel maps with one fault, if the page cache has it: markers are removed together there.
pub(crate) const WINDOW: usize = 64 << 10;
/// A file as the kernel names it in `/proc/PID/maps`: its inode, and its device.
pub(crate) type Named = (u64, (u32, u32));

/// Threads whose last windows are remembered.
const THREADS: usize = 16;

/// What is known of a chunk's markers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Markers {
    /// None was installed yet.
    None,
    /// All pages have one.
    Installed,
    /// Pages that are in memory, or were, have none.
    Opened,
    /// None has one, since the kernel was to use it.
    Removed,
}

/// How a forked child finds a mapping. The kernel would copy all page tables that may have markers, page by page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Child {
    /// The kernel copies it: our descriptor cannot make the same mapping.
    Copied,
    /// The kernel leaves it out (`MADV_DONTFORK`), and it is mapped anew.
    Anew,
    /// Not at all: the program has asked for that.
    Without,
}

/// How the program made a mapping.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Made {
    /// `MAP_PRIVATE` or `MAP_SHARED`, with what else concerns the mapping rather than its making.
    pub(crate) flags: i32,
    /// With `PROT_WRITE`.
    pub(crate) writable: bool,
}

/// No state of the page cache has this value. It says that the next round must look at the chunk.
const UNKNOWN: u32 = u32::MAX;

/// The two counts in a word. (A chunk has 512 pages.)
fn print_of(state: CacheState) -> u32 {
    (state.cached as u32) << 16 | state.evicted as u32 & 0xFFFF
}

/// What happened in a live mapping.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Touches of markers.
    pub(crate) misses: AtomicU64,
    /// Those of them whose pages were in the page cache.
    pub(crate) cached: AtomicU64,
    /// Markers that were put back on pages which the kernel had reclaimed.
    pub(crate) put_back: AtomicU64,
}

/// One live mapping.
#[derive(Debug)]
pub(crate) struct LiveMapping {
    pub(crate) serial: u64,
    /// The part of the addresses that still is the program's mapping of the file.
    start: AtomicUsize,
    end: AtomicUsize,
    /// Where it began, how long it was then, and which byte of the file lies there.
    pub(crate) first: usize,
    pub(crate) bytes: usize,
    offset: u64,
    /// Where the file ended: pages behind have no markers.
    data_end: usize,
    pub(crate) file: Arc<LiveFile>,
    pub(crate) named: Named,
    made: Made,
    /// How a forked child is to find it.
    child: AtomicU8,
    /// How often the kernel has copied its page tables.
    copied: AtomicU32,
    /// `MADV_NORMAL`, `MADV_RANDOM` or `MADV_SEQUENTIAL`.
    pub(crate) advice: AtomicI32,
    chunks: Box<[AtomicU8]>,
    /// The state of the page cache for each chunk when its markers were put back last: nothing has to be done until it changes.
    settled: Box<[AtomicU32]>,
    /// The chunk that is looked at next.
    pub(crate) hand: AtomicUsize,
    /// Misses less hits, as the kernel counts them (`mmap_miss`): above a limit, nothing is read around a miss.
    lost: AtomicU32,
    /// For some threads, the window of the last miss and how many before it were neighbours.
    last: [AtomicU64; THREADS],
    pub(crate) counts: Counts,
    /// System calls that are using a part of it now, whose markers were removed: meanwhile none is installed.
    holders: Holders,
}

/// System calls that use parts of more mappings than they can note.
static OF_ALL: AtomicUsize = AtomicUsize::new(0);

/// Until when no marker is put back, in ns of the clock: a child of vfork that has no handler may still use mappings.
static IN_PASSING: AtomicU64 = AtomicU64::new(0);

/// A child of vfork opens mappings. It does not say when it is done, so it gets some seconds.
pub(crate) fn opened_in_passing() {
    const LIFE: Nanos = Nanos::from_secs(5);
    IN_PASSING.fetch_max((clock::now() + LIFE).get(), Ordering::SeqCst);
}

fn is_kept_open() -> bool {
    OF_ALL.load(Ordering::SeqCst) > 0 || IN_PASSING.load(Ordering::SeqCst) > clock::now().get()
}

/// Keeps markers from being installed in any mapping until [`release_all`].
pub(crate) fn hold_all() {
    OF_ALL.fetch_add(1, Ordering::SeqCst);
}

pub(crate) fn release_all() {
    OF_ALL.fetch_sub(1, Ordering::SeqCst);
}

/// In a forked child: the threads that made those calls are not here.
pub(crate) fn forget_holders() {
    OF_ALL.store(0, Ordering::SeqCst);
    IN_PASSING.store(0, Ordering::SeqCst);
}

/// Sleeps before another look whether a thread still installs markers. `false` if there can be no such thread: in a copy of the process.
fn nap() -> bool {
    const NAP: Nanos = Nanos::from_micros(20);
    clock::nap(NAP);
    !process::forked()
}

impl LiveMapping {
    /// Of `range`, where the file's bytes from `offset` on are mapped, of a file of `len` bytes.
    pub(crate) fn new(
        serial: u64,
        range: Range<usize>,
        offset: u64,
        len: u64,
        file: Arc<LiveFile>,
        made: Made,
        named: Named,
    ) -> Self {
        let data = len.saturating_sub(offset).min(range.len() as u64) as usize;
        let data_end = range.start + data.next_multiple_of(PAGE);
        let chunks = range.len().div_ceil(CHUNK);
        LiveMapping {
            serial,
            start: AtomicUsize::new(range.start),
            end: AtomicUsize::new(range.end),
            first: range.start,
            bytes: range.len(),
            offset,
            data_end,
            file,
            named,
            made,
            child: AtomicU8::new(Child::Copied as u8),
            copied: AtomicU32::new(0),
            advice: AtomicI32::new(libc::MADV_NORMAL),
            chunks: (0..chunks)
                .map(|_| AtomicU8::new(Markers::None as u8))
                .collect(),
            settled: (0..chunks).map(|_| AtomicU32::new(0)).collect(),
            hand: AtomicUsize::new(0),
            lost: AtomicU32::new(0),
            last: [const { AtomicU64::new(0) }; THREADS],
            counts: Counts::default(),
            holders: Holders::changing(),
        }
    }

    /// The permission to install the first markers, which a new mapping has.
    ///
    /// To be called once.
    pub(crate) fn first(&self) -> Changing<'_> {
        self.holders.first()
    }

    /// Whether writes to it are shared with the file.
    pub(crate) fn is_shared(&self) -> bool {
        self.made.flags & libc::MAP_TYPE == libc::MAP_SHARED
    }

    /// Whether the program can write to it without asking the kernel first.
    pub(crate) fn is_writable(&self) -> bool {
        self.made.writable
    }

    /// Whether markers may be installed after the program has learnt of it.
    ///
    /// * In a private mapping, a marker would destroy what was written to a page, if only by a debugger's hand.
    /// * In a writable one, the kernel uses pages by itself that the program has touched: the word of a futex, a list of robust
    ///   mutexes. It must find them. (A mapping that waited for a second thread may get a marker on a page that was touched and reclaimed,
    ///   if the only thread holds no such mutex.)
    pub(crate) fn may_get_more(&self) -> bool {
        self.is_shared() && !self.is_writable()
    }

    /// Keeps markers from being installed until [`release`](Self::release).
    pub(crate) fn hold(&self) {
        self.holders.hold(nap);
    }

    /// Waits for a thread that is installing markers, where none can begin to.
    pub(crate) fn wait_for_installer(&self) {
        self.holders.wait(nap);
    }

    pub(crate) fn release(&self) {
        self.holders.release();
    }

    /// Permission to install some markers. `None` if a system call needs that there are none, or another thread is at it.
    pub(crate) fn installing(&self) -> Option<Changing<'_>> {
        self.holders.change(is_kept_open)
    }

    /// The addresses that are still served.
    pub(crate) fn range(&self) -> Range<usize> {
        self.start.load(Ordering::SeqCst)..self.end.load(Ordering::SeqCst)
    }

    pub(crate) fn covers(&self, addr: usize) -> bool {
        self.range().contains(&addr)
    }

    /// Takes a part away that lies at the front or at the end.
    pub(crate) fn trim(&self, gone: &Range<usize>) {
        let range = self.range();
        if gone.start <= range.start {
            self.start.store(gone.end.min(range.end), Ordering::SeqCst);
        } else {
            self.end.store(gone.start, Ordering::SeqCst);
        }
    }

    /// Which byte of the file lies at an address.
    pub(crate) fn offset_of(&self, addr: usize) -> u64 {
        self.offset + (addr - self.first) as u64
    }

    /// The part of a range that has bytes of the file, and is still served.
    pub(crate) fn with_data(&self, part: Range<usize>) -> Range<usize> {
        let range = self.range();
        let start = part.start.max(range.start);
        start..part.end.min(range.end).min(self.data_end).max(start)
    }

    /// The pages that the kernel maps together with the one at `addr`.
    pub(crate) fn window(&self, addr: usize) -> Range<usize> {
        let start = addr & !(WINDOW - 1);
        self.with_data(start..start + WINDOW)
    }

    pub(crate) fn chunks(&self) -> usize {
        self.chunks.len()
    }

    /// The part of the mapping that a chunk is.
    pub(crate) fn chunk(&self, number: usize) -> Range<usize> {
        let start = self.first + number * CHUNK;
        self.with_data(start..start + CHUNK)
    }

    pub(crate) fn markers(&self, chunk: usize) -> Markers {
        match self.chunks[chunk].load(Ordering::Relaxed) {
            0 => Markers::None,
            1 => Markers::Installed,
            2 => Markers::Opened,
            _ => Markers::Removed,
        }
    }

    pub(crate) fn set_markers(&self, chunk: usize, markers: Markers) {
        let word = &self.chunks[chunk];
        // (Written seldom: every miss comes here.)
        if word.load(Ordering::Relaxed) != markers as u8 {
            word.store(markers as u8, Ordering::Relaxed);
        }
    }

    /// Whether pages of a chunk may have been reclaimed since the last [`settle`](Self::settle).
    pub(crate) fn may_be_reclaimed(&self, chunk: usize, state: CacheState) -> bool {
        match self.settled[chunk].load(Ordering::Relaxed) {
            UNKNOWN => true,
            settled => state.evicted > 0 && settled != print_of(state),
        }
    }

    /// Notes that all pages of a chunk have markers that the page cache did not have.
    pub(crate) fn settle(&self, chunk: usize, state: CacheState) {
        self.settled[chunk].store(print_of(state), Ordering::Relaxed);
    }

    /// A marker of the window at `addr` is about to be removed.
    pub(crate) fn opens(&self, addr: usize) {
        let chunk = self.chunk_of(addr);
        if self.markers(chunk) == Markers::Installed {
            self.set_markers(chunk, Markers::Opened);
        }
    }

    /// The addresses of a chunk, whether they are still the mapping's or not.
    fn whole_chunk(&self, number: usize) -> Range<usize> {
        let start = self.first + number * CHUNK;
        start..start + CHUNK
    }

    /// Removes the markers of a part, where there may be some.
    pub(crate) fn open_where_marked(&self, part: &Range<usize>) {
        let mut at = part.start;
        while at < part.end {
            let number = self.chunk_of(at);
            let end = self.whole_chunk(number).end.min(part.end);
            let markers = self.markers(number);
            if matches!(markers, Markers::Installed | Markers::Opened) {
                self.opens(at);
                self.open(at..end);
            }
            at = end;
        }
    }

    /// Removes the markers of a part that the kernel is to write to, with those of the chunks around it. None comes back. `false` if there
    /// were none.
    pub(crate) fn open_for_ever(&self, part: &Range<usize>) -> bool {
        let (first, last) = (self.chunk_of(part.start), self.chunk_of(part.end - 1));
        let some = (first..=last).any(|number| self.markers(number) != Markers::Removed);
        if some {
            let own = self.range();
            let start = self.whole_chunk(first).start.max(own.start);
            self.open_chunks(start..self.whole_chunk(last).end.min(own.end), true);
        }
        some
    }

    fn chunk_of(&self, addr: usize) -> usize {
        (addr - self.first) / CHUNK
    }

    /// Removes the markers of a part that the kernel is to use, chunk by chunk, where there may be some.
    /// With `held`, none can come back before the caller is done, and the kernel need not be asked again. Without, they come back in one
    /// of the next rounds.
    pub(crate) fn open_chunks(&self, part: Range<usize>, held: bool) {
        let mut at = part.start;
        while at < part.end {
            let number = self.chunk_of(at);
            let whole = self.whole_chunk(number);
            let end = whole.end.min(part.end);
            if !held || self.markers(number) != Markers::Removed {
                let own = self.range();
                self.opens(at);
                self.open(at.max(own.start)..end.min(own.end));
                if !held {
                    self.settled[number].store(UNKNOWN, Ordering::Relaxed);
                }
                if held && at <= whole.start.max(own.start) && end >= whole.end.min(own.end) {
                    self.set_markers(number, Markers::Removed);
                }
            }
            at = end;
        }
    }

    /// Counts a miss, and says whether what lies around it is to be read with it. As the kernel judges for its own mappings: not
    /// after many misses that no hits made up for.
    pub(crate) fn reads_around(&self, cached: bool) -> bool {
        /// `MMAP_LOTSAMISS`, and how far above it is counted.
        const LOTS: u32 = 100;
        const MOST: u32 = LOTS * 10;
        let lost = self.lost.load(Ordering::Relaxed);
        match cached {
            true if lost > 0 => self.lost.store(lost - 1, Ordering::Relaxed),
            false if lost < MOST => self.lost.store(lost + 1, Ordering::Relaxed),
            _ => {}
        }
        !cached && lost <= LOTS
    }

    /// Notes that a thread has missed in the window at `window`, and returns how many windows it has missed in before, each the next
    /// of the one before it.
    pub(crate) fn run_of(&self, thread: u32, window: usize) -> u64 {
        const RUN_BITS: u32 = 8;
        const RUN_MAX: u64 = (1 << RUN_BITS) - 1;
        let number = (window / WINDOW) as u64;
        let last = &self.last[thread as usize % THREADS];
        let before = last.load(Ordering::Relaxed);
        let (former, run) = (before >> RUN_BITS, before & RUN_MAX);
        let run = match number.wrapping_sub(former) {
            0 => run,
            1 => (run + 1).min(RUN_MAX),
            _ => 0,
        };
        last.store(number << RUN_BITS | run, Ordering::Relaxed);
        if former == number { 0 } else { run }
    }

    pub(crate) fn child(&self) -> Child {
        match self.child.load(Ordering::SeqCst) {
            0 => Child::Copied,
            1 => Child::Anew,
            _ => Child::Without,
        }
    }

    /// Notes what the program has asked for.
    pub(crate) fn set_child(&self, child: Child) {
        self.child.store(child as u8, Ordering::SeqCst);
    }

    /// From now on forked children map it anew, if the kernel agrees.
    pub(crate) fn leave_out_of_forks(&self) {
        let range = self.range();
        // SAFETY: changes no contents; a child is given the same mapping by `map_anew`.
        let left_out = unsafe { mem::madvise(range.start, range.len(), libc::MADV_DONTFORK) };
        if left_out.is_ok() {
            self.set_child(Child::Anew);
        }
    }

    /// From now on the kernel copies it into forked children, as it would have without us.
    fn let_kernel_copy(&self) {
        if self.child() == Child::Anew {
            self.let_kernel_copy_part(self.range());
            self.set_child(Child::Copied);
        }
    }

    fn let_kernel_copy_part(&self, part: Range<usize>) {
        if self.child() == Child::Anew && !part.is_empty() {
            // SAFETY: changes no contents.
            let _ = unsafe { mem::madvise(part.start, part.len(), libc::MADV_DOFORK) };
        }
    }

    /// The process is about to be forked. A mapping whose page tables the kernel copies each time gives its markers up.
    pub(crate) fn before_fork(&self) {
        /// After so many forks.
        const FORKS: u32 = 3;
        if self.file.number().is_none() {
            self.let_kernel_copy();
        }
        if self.child() == Child::Copied && self.copied.fetch_add(1, Ordering::Relaxed) + 1 == FORKS
        {
            // For ever.
            self.hold();
            self.open(self.range());
        }
    }

    /// In a forked child: the kernel serves it.
    pub(crate) fn in_child(&self) {
        if self.child() == Child::Copied {
            self.open(self.range());
        }
    }

    /// Makes the mapping in a forked child, by the descriptor that the child still has. Where something lies there by now, that stays.
    pub(crate) fn map_anew(&self) {
        let (Child::Anew, Some(fd)) = (self.child(), self.file.number_in_copy()) else {
            return;
        };
        // (An open file without advice, as the program's own.)
        let (number, own) = match reopen(fd, false) {
            Ok(fresh) => (fresh, true),
            Err(_) => (fd, false),
        };
        let range = self.range();
        if self.map_part(number, range.clone()).is_err() {
            let mut at = range.start;
            while at < range.end {
                let end = range.end.min((at + 1).next_multiple_of(CHUNK));
                let _ = self.map_part(number, at..end);
                at = end;
            }
        }
        if own {
            // SAFETY: opened above; the mapping keeps the file.
            unsafe { file::close(number) };
        }
    }

    fn map_part(&self, number: i32, part: Range<usize>) -> Result<(), Errno> {
        if part.is_empty() {
            return Ok(());
        }
        let offset = self.offset_of(part.start);
        let flags = self.made.flags | mem::MAP_FIXED_NOREPLACE;
        let prot = libc::PROT_READ;
        // SAFETY: replaces nothing: the parent's mapping was left out.
        unsafe { mem::map(part.start, part.len(), prot, flags, number, offset)? };
        let advice = self.advice.load(Ordering::Relaxed);
        // SAFETY: made above; this advice changes no contents.
        unsafe { mem::madvise(part.start, part.len(), advice) }
    }

    /// Leaves it as it would be without us.
    pub(crate) fn leave_to_kernel(&self) {
        self.leave_part_to_kernel(self.range());
    }

    /// Leaves a part as it would be without us.
    pub(crate) fn leave_part_to_kernel(&self, part: Range<usize>) {
        self.let_kernel_copy_part(part.clone());
        self.open(part);
    }

    /// Removes the markers of a range.
    pub(crate) fn open(&self, range: Range<usize>) {
        if !range.is_empty() {
            // (What the program has unmapped meanwhile has no markers, and nothing else goes wrong.)
            let _ = mem::remove_guards(range.start, range.len());
        }
    }
}

#[cfg(all(test, not(faultless_sim)))]
mod tests {
    use super::*;
    use crate::space::fds::Fd;
    use faultless_sys::file::FileId;

    const AT: usize = 0x7000_0000_3000;

    /// 5 MiB of a file that ends 100 bytes into its fourth MiB.
    fn mapping() -> LiveMapping {
        made(libc::MAP_SHARED, false)
    }

    fn made(flags: i32, writable: bool) -> LiveMapping {
        let id = FileId { dev: 1, ino: 2 };
        let file = LiveFile::of(Fd::new(-1, -1), id);
        let (offset, len) = (8192, (3 << 20) + 100 + 8192);
        let range = AT..AT + (5 << 20);
        LiveMapping::new(
            7,
            range,
            offset,
            len,
            Arc::new(file),
            Made { flags, writable },
            (2, (0, 1)),
        )
    }

    #[test]
    fn parts_end_where_the_file_and_the_mapping_end() {
        let live = mapping();
        assert_eq!(live.chunks(), 3);
        assert_eq!(live.chunk(0), AT..AT + CHUNK);
        assert_eq!(live.chunk(1), AT + CHUNK..AT + (3 << 20) + PAGE);
        assert!(live.chunk(2).is_empty());
        // Windows lie where the kernel's do, by address.
        let window = live.window(AT + WINDOW);
        assert_eq!(window, 0x7000_0001_0000..0x7000_0002_0000);
        assert_eq!(live.window(AT), AT..0x7000_0001_0000);
        assert_eq!(live.offset_of(AT + PAGE), 8192 + PAGE as u64);
    }

    #[test]
    fn a_mapping_is_cut_at_its_ends() {
        let live = mapping();
        live.trim(&(AT - PAGE..AT + PAGE));
        live.trim(&(AT + (4 << 20)..AT + (9 << 20)));
        assert_eq!(live.range(), AT + PAGE..AT + (4 << 20));
        assert_eq!(live.chunk(0).start, AT + PAGE);
        live.trim(&(AT..AT + (5 << 20)));
        assert!(live.range().is_empty() && !live.covers(AT + PAGE));
    }

    #[test]
    fn nothing_is_read_around_after_many_misses_that_no_hits_made_up_for() {
        let live = mapping();
        let around = |n: usize, cached| (0..n).filter(|_| live.reads_around(cached)).count();
        assert_eq!(around(101, false), 101);
        assert_eq!(around(50, false), 0);
        assert_eq!(around(100, true), 0);
        assert_eq!(around(10, false), 10);
    }

    #[test]
    fn threads_that_miss_in_one_window_after_the_other_are_told_apart() {
        let live = mapping();
        for n in 0..4 {
            assert_eq!(live.run_of(1, AT + n * WINDOW), n as u64);
            assert_eq!(live.run_of(2, AT + n * 7 * WINDOW), 0);
        }
        // Again in the same one: no step.
        assert_eq!(live.run_of(1, AT + 3 * WINDOW), 0);
        assert_eq!(live.run_of(1, AT + 4 * WINDOW), 4);
        assert_eq!(live.run_of(1, AT), 0);
    }

    #[test]
    fn markers_come_back_where_they_went_in_passing() {
        let live = mapping();
        let untouched = CacheState {
            cached: 3,
            evicted: 0,
        };
        for held in [true, false] {
            live.set_markers(0, Markers::Installed);
            live.settle(0, untouched);
            live.open_chunks(live.chunk(0), held);
            assert_eq!(live.may_be_reclaimed(0, untouched), !held);
        }
        live.settle(0, untouched);
        assert!(!live.may_be_reclaimed(0, untouched));
    }

    #[test]
    fn only_what_nobody_writes_to_gets_markers_later() {
        let gets = |flags, writable| made(flags, writable).may_get_more();
        assert!(gets(libc::MAP_SHARED, false) && !gets(libc::MAP_SHARED, true));
        assert!(!gets(libc::MAP_PRIVATE, false) && !gets(libc::MAP_PRIVATE, true));
    }

    #[test]
    fn what_the_kernel_writes_to_is_open_for_ever_in_whole_chunks() {
        let live = made(libc::MAP_SHARED, true);
        live.trim(&(AT..AT + PAGE));
        let byte = |at: usize| AT + at..AT + at + 1;
        for number in 0..3 {
            live.set_markers(number, Markers::Installed);
        }
        assert!(live.open_for_ever(&byte(CHUNK + 5)));
        let markers = [0, 1, 2].map(|number| live.markers(number));
        assert_eq!(
            markers,
            [Markers::Installed, Markers::Removed, Markers::Installed]
        );
        assert!(!live.open_for_ever(&byte(CHUNK + 77)));
        // A part that ends meanwhile is looked at chunk by chunk.
        let trimmed = made(libc::MAP_SHARED, true);
        trimmed.trim(&(AT + PAGE..AT + (5 << 20)));
        trimmed.open_chunks(AT..AT + (5 << 20), true);
        assert_eq!(trimmed.markers(2), Markers::Removed);
        // The first and the last one, of which the mapping has but a part.
        assert!(live.open_for_ever(&(AT + PAGE..AT + (5 << 20))));
        assert!(!live.open_for_ever(&byte(PAGE)) && !live.open_for_ever(&byte((5 << 20) - 1)));
    }

    #[test]
    fn a_held_mapping_gets_no_markers() {
        let live = mapping();
        drop(live.first());
        live.hold();
        assert!(live.installing().is_none());
        live.release();
        hold_all();
        assert!(live.installing().is_none());
        release_all();
        let permission = live.installing();
        assert!(permission.is_some() && live.installing().is_none());
    }
}
