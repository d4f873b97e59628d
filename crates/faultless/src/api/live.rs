//! Live mappings of a program that knows nothing of them.
//!
//! This is the ground for `libfaultless_preload.so`, and no part of the crate's interface.

#![allow(unsafe_code, reason = "serves a mapping by its address")]
#![allow(missing_docs, reason = "not a part of the interface")]

use crate::base::clock;
use crate::base::error::Error;
use crate::base::ids::Nanos;
use crate::base::primitive::{AtomicU64, Ordering};
use crate::base::source;
use crate::coherence::{hooks, keeper};
use crate::fault::chain::{Disposition, NotInstalled};
use crate::guards::files::LiveFile;
use crate::guards::handler::{self, SIGSEGV};
use crate::guards::mapping::{self, Child, LiveMapping, Made};
use crate::guards::table::Inside;
use crate::guards::{files, maps, serve, sweep, sweeper, table};
use faultless_sys::file::{self, FileId};
use faultless_sys::mem::PAGE;
use faultless_sys::signal;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

pub use crate::guards::support::{Support, support};

/// Most live mappings at the same time.
pub const MOST: usize = table::MOST;

/// Markers that are installed before the program learns of its mapping, in bytes of it. The rest follows.
pub const FIRST: usize = 64 << 20;
/// Serial numbers of stand-ins are below this.
const SERIALS: u64 = 1 << 48;

/// What is to be served.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The file. The descriptor is not kept.
    pub file: BorrowedFd<'a>,
    /// Where the program has it mapped, in whole pages.
    pub at: usize,
    /// Bytes, a multiple of the page size.
    pub len: usize,
    /// Offset in the file.
    pub offset: u64,
    /// `MAP_PRIVATE` or `MAP_SHARED`, with what else concerns the mapping rather than its making.
    pub flags: i32,
    /// With `PROT_WRITE`.
    pub writable: bool,
    /// The program can make it writable, for all that share it.
    pub may_be_written: bool,
    /// How the program wants to read it (`MADV_…`).
    pub advice: i32,
}

/// A mapping of the kernel's whose misses are served. It must be [ended](Live::end), or its addresses be unmapped by
/// [`unmap_with`](Live::unmap_with).
#[derive(Debug)]
pub struct Live(&'static LiveMapping);

/// What happened in one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Touches of absent pages that were served.
    pub misses: u64,
    /// Those of them whose pages were in the page cache.
    pub cached: u64,
    /// Pages that the kernel had reclaimed, and whose next touch is served again.
    pub put_back: u64,
}

impl Live {
    /// Begins to serve one.
    ///
    /// # Errors
    ///
    /// The kernel refuses what is needed. The mapping is as it was.
    ///
    /// # Safety
    ///
    /// [`start_threads`](crate::standin::start_threads) and [`watch_forks`](crate::standin::watch_forks) were called. At `at` lies a mapping of the kernel's of these bytes of the file, of which no page holds anything but the file's bytes. If it is writable,
    /// or private, the program does not know of it yet, or has one thread, which is here.
    pub unsafe fn new(wanted: &Wanted<'_>) -> Result<Live, Error> {
        SIGSEGV.install().map_err(|e| match e {
            NotInstalled::Replaced(handler) => Error::HandlerReplaced { handler },
            NotInstalled::Refused(e) => Error::kernel("cannot install a SIGSEGV handler", e),
        })?;
        Self::begin(wanted).inspect_err(|_| files::close_unused())
    }

    fn begin(wanted: &Wanted<'_>) -> Result<Live, Error> {
        let name = source::file_name(wanted.file);
        let cannot =
            |what: &str, e: std::io::Error| Error::kernel(format!("cannot {what} {name}"), e);
        let status = file::status(wanted.file.as_raw_fd()).map_err(|e| cannot("stat", e.into()))?;
        let file = files::open(wanted.file.as_raw_fd()).map_err(|e| cannot("open", e))?;
        tells_what_is_cached(&file, wanted.offset)
            .map_err(|e| cannot("learn what is in memory of", e))?;
        let at = wanted.at;
        let named = keeper::apart(move || maps::with_maps(|maps| maps::name_at(maps, at)));
        let unknown = || std::io::ErrorKind::Unsupported.into();
        let named = named
            .flatten()
            .flatten()
            .ok_or_else(|| cannot("ask the kernel about a mapping of", unknown()))?;
        let live = LiveMapping::new(
            NEXT.fetch_add(1, Ordering::Relaxed),
            at..at + wanted.len,
            wanted.offset,
            status.len,
            file,
            Made {
                flags: wanted.flags,
                writable: wanted.writable,
            },
            named,
        );
        live.advice.store(wanted.advice, Ordering::Relaxed);
        let live = Live(table::insert(live).ok_or(Error::TooManyMaps(MOST))?);
        // (Our descriptor is for reading: what it maps could never be made writable for all. And a private mapping may hold what a debugger
        // has written.)
        if live.0.is_shared() && !wanted.may_be_written {
            live.0.leave_out_of_forks();
        }
        match sweep::install(live.0, FIRST) {
            Ok(()) => Ok(live),
            Err(e) => {
                live.end();
                Err(cannot("install guard markers in a mapping of", e.into()))
            }
        }
    }

    /// The addresses that are still served.
    pub fn range(&self) -> Range<usize> {
        self.0.range()
    }

    /// Whether some of a range is still served.
    pub fn touches(&self, range: &Range<usize>) -> bool {
        let own = self.range();
        own.start < range.end && range.start < own.end
    }

    /// Whether all of a range is still served.
    pub fn covers(&self, range: &Range<usize>) -> bool {
        let own = self.range();
        own.start <= range.start && range.end <= own.end
    }

    /// Whether the program made it with `PROT_WRITE`.
    pub fn is_writable(&self) -> bool {
        self.0.is_writable()
    }

    /// How many bytes the program had mapped with it, at first.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Never used again by another one of the process, or by a stand-in.
    pub fn serial(&self) -> u64 {
        self.0.serial
    }

    pub fn file_id(&self) -> FileId {
        self.0.file.id
    }

    pub fn counts(&self) -> Counts {
        let counts = &self.0.counts;
        Counts {
            misses: counts.misses.load(Ordering::Relaxed),
            cached: counts.cached.load(Ordering::Relaxed),
            put_back: counts.put_back.load(Ordering::Relaxed),
        }
    }

    /// `MADV_NORMAL`, `MADV_RANDOM` or `MADV_SEQUENTIAL`. (The kernel is told by the program itself.)
    pub fn advise(&self, advice: i32) {
        self.0.advice.store(advice, Ordering::Relaxed);
    }

    /// `MADV_DONTFORK` or `MADV_DOFORK`, which the program gives the kernel itself.
    pub fn set_dont_fork(&self, dont: bool) {
        self.0.set_child(match dont {
            true => Child::Without,
            false => Child::Copied,
        });
    }

    /// Removes the markers of a part that is in memory: its touch is no signal.
    pub(crate) fn open(&self, part: &Range<usize>) {
        self.0.open_where_marked(&pages(part));
    }

    /// Keeps markers out of a part until [`let_go`](Self::let_go), for system calls.
    pub(crate) fn keep_open(&self, part: &Range<usize>) {
        self.0.hold();
        self.0.open_chunks(pages(part), true);
    }

    pub(crate) fn let_go(&self) {
        self.0.release();
    }

    /// Whether the rest can be served if a part is unmapped.
    pub fn can_be_trimmed(&self, gone: &Range<usize>) -> bool {
        let range = self.range();
        let front = gone.start <= range.start && gone.end < range.end;
        let end = range.start < gone.start && range.end <= gone.end;
        front || end
    }

    /// Unmaps a part at the front or the end, by a call that does so.
    ///
    /// # Errors
    ///
    /// The call's: then all of it is still mapped, and that part is not served any more.
    pub fn trim_with<E>(
        &self,
        gone: &Range<usize>,
        unmap: impl FnOnce() -> Result<usize, E>,
    ) -> Result<usize, E> {
        let range = self.range();
        handler::expect_latecomers();
        // Until the part is unmapped, no marker is on its way to it.
        self.0.hold();
        self.0
            .leave_part_to_kernel(gone.start.max(range.start)..gone.end.min(range.end));
        self.0.trim(gone);
        table::trimmed(self.0);
        let result = unmap();
        self.0.release();
        result
    }

    /// Ends it with a call that unmaps its addresses.
    ///
    /// # Errors
    ///
    /// The call's: then it is left to the kernel.
    pub fn unmap_with<E>(self, unmap: impl FnOnce() -> Result<usize, E>) -> Result<usize, E> {
        // For ever: what the program maps there next must find no marker.
        self.0.hold();
        // (Until they are unmapped, touches are served.)
        let result = unmap().inspect_err(|_| self.0.leave_to_kernel());
        self.leave();
        result
    }

    /// Leaves it to the kernel.
    pub fn end(self) {
        // For ever.
        self.0.hold();
        self.0.leave_to_kernel();
        self.leave();
    }

    fn leave(self) {
        handler::expect_latecomers();
        // SAFETY: from `insert`, and consumed here.
        unsafe { table::remove(self.0) };
        files::close_unused();
    }
}

/// The pages that some bytes lie in.
fn pages(bytes: &Range<usize>) -> Range<usize> {
    bytes.start & !(PAGE - 1)..bytes.end.next_multiple_of(PAGE)
}

static NEXT: AtomicU64 = AtomicU64::new(SERIALS);

/// Whether a live mapping has a part of a range. Takes no lock.
pub fn touches(range: &Range<usize>) -> bool {
    table::touches(range)
}

/// No program has memory from here on.
const LAST: usize = isize::MAX as usize;

/// Live mappings of which one system call can use parts.
const PARTS: usize = 4;

/// Memory of live mappings that a system call is to read: the kernel cannot be interrupted by SIGSEGV in the middle of it, and a marker is
/// `EFAULT` to it. So the markers are removed, and none is installed in these mappings while this lives.
#[derive(Default)]
pub struct Opened {
    parts: [Option<Inside>; PARTS],
    /// There were more.
    all: bool,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened").finish_non_exhaustive()
    }
}

impl Opened {
    /// Opens what live mappings have of a range, and asks the page cache for it. Takes no lock.
    pub fn open(&mut self, range: &Range<usize>) {
        self.open_in(range, true);
    }

    /// The same for a child of vfork, which may never return here: markers come back some seconds later.
    pub fn open_in_passing(range: &Range<usize>) {
        mapping::opened_in_passing();
        Opened::default().open_in(range, false);
    }

    fn open_in(&mut self, range: &Range<usize>, hold: bool) {
        // (The whole range, though one system call moves 2 GiB at most: the C library may make several for one call of the program's.)
        let end = range.end.min(LAST);
        let mut at = range.start;
        while at < end {
            let Some(next) = table::next_part(at..end) else {
                return;
            };
            let start = next & !(PAGE - 1);
            at = start + PAGE;
            if let Some(live) = table::find(next) {
                let of = live.range();
                let part = start..end.next_multiple_of(PAGE).min(of.end);
                at = part.end.max(at);
                match hold {
                    true => self.hold(&live),
                    false => live.wait_for_installer(),
                }
                open(&live, part, hold);
            }
        }
    }

    /// Keeps markers out of a mapping.
    fn hold(&mut self, live: &LiveMapping) {
        let is_it = |held: &Option<Inside>| held.as_ref().is_some_and(|h| h.serial == live.serial);
        if self.parts.iter().any(is_it) {
            return;
        }
        if self.all {
            return live.wait_for_installer();
        }
        let free = self.parts.iter_mut().find(|part| part.is_none());
        match (free, table::find(live.range().start)) {
            (Some(free), Some(inside)) if inside.serial == live.serial => {
                inside.hold();
                *free = Some(inside);
            }
            _ => {
                mapping::hold_all();
                self.all = true;
                live.wait_for_installer();
            }
        }
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        self.parts.iter().flatten().for_each(|live| live.release());
        if self.all {
            mapping::release_all();
        }
    }
}

/// Removes the markers of a part, for the kernel.
fn open(live: &LiveMapping, part: Range<usize>, hold: bool) {
    read_in(live, part.clone(), !hold);
    live.open_chunks(part, hold);
}

/// Whether there is a live mapping that is writable: then calls that have the kernel write to memory need [`open_for_writing`].
#[inline]
pub fn any_writable() -> bool {
    table::any_writable()
}

/// Whether a writable live mapping may have a part of a range. Two loads.
#[inline]
pub fn may_be_writable(range: &Range<usize>) -> bool {
    table::may_be_writable(range)
}

/// Removes the markers of what writable live mappings have of a range, which the kernel is to write to: it would end with `EFAULT`, perhaps
/// after it has read from a pipe what it cannot put anywhere. They do not come back. `in_copy`: in a child of vfork. Takes no lock.
pub fn open_for_writing(range: &Range<usize>, in_copy: bool) {
    let end = range.end.min(LAST);
    let mut at = range.start;
    while at < end {
        let Some(next) = table::next_part(at..end) else {
            return;
        };
        at = (next & !(PAGE - 1)) + PAGE;
        // A handler that does not return would leave the mapping in use for ever.
        let _blocked = signal::Blocked::all();
        if let Some(live) = table::find(next) {
            let own = live.range();
            let part = next & !(PAGE - 1)..end.next_multiple_of(PAGE).min(own.end);
            at = at.max(part.end);
            if live.is_writable() && !part.is_empty() && live.open_for_ever(&part) {
                read_in(&live, part, in_copy);
            }
        }
    }
}

/// Asks the page cache for a part that the kernel is to use.
fn read_in(live: &LiveMapping, part: Range<usize>, in_copy: bool) {
    /// More than this the kernel reads by itself.
    const MOST: usize = 1 << 20;
    let data = live.with_data(part);
    // (A child of vfork has a table of its own, and its parent's memory: it fetches nothing.)
    let number = match in_copy {
        true => live.file.number_in_copy(),
        false => live.file.number(),
    };
    if data.len() <= MOST
        && let Some(fd) = number
    {
        serve::ask_for(live, fd, data);
    }
}

/// Removes all markers of all live mappings, for a child of vfork. Some seconds later they come back.
pub fn open_all() {
    mapping::opened_in_passing();
    table::for_each(|live| {
        live.wait_for_installer();
        live.open_chunks(live.range(), false);
    });
}

/// The kernel has given out addresses that were thought to be a live mapping's: whichever they belonged to has lost them. To be called
/// before the program learns the addresses.
pub fn given_out(range: &Range<usize>) {
    table::for_each(|live| {
        let of = live.range();
        if range.end <= of.start || of.end <= range.start {
            return;
        }
        handler::expect_latecomers();
        live.hold();
        if of.start < range.start && range.end < of.end {
            // What is left of it, the kernel serves.
            for rest in [of.start..range.start, range.end..of.end] {
                live.leave_part_to_kernel(rest);
            }
            live.trim(&of);
        } else {
            live.trim(range);
        }
        table::trimmed(live);
        // (One that was installed since the kernel gave them out.)
        live.open(of.start.max(range.start)..of.end.min(range.end));
        live.release();
        if live.range().is_empty() {
            hooks::lost();
        }
    });
}

/// Whether the kernel says what the page cache has of a file: not of another user's, and not on every file system.
fn tells_what_is_cached(file: &LiveFile, offset: u64) -> std::io::Result<()> {
    let number = file.number().ok_or(std::io::ErrorKind::NotFound)?;
    serve::read_byte(number, offset);
    match file::cache_state(number, offset, PAGE as u64)?.cached {
        0 => Err(std::io::ErrorKind::Unsupported.into()),
        _ => Ok(()),
    }
}

/// The signal that is blocked while the program's SIGSEGV handler runs, since SIGSEGV itself stays open.
pub use crate::fault::chain::RUNS;

/// Whether another SIGSEGV handler was installed by a call that nobody saw: then touches of markers are not served.
pub fn handler_is_lost() -> bool {
    SIGSEGV.is_lost()
}

/// Whether the engine has no descriptor of a file for live mappings.
pub fn holds_none_of(id: FileId) -> bool {
    files::holds_none_of(id)
}

/// Whether the engine has no descriptor of any file for live mappings.
pub fn holds_nothing() -> bool {
    files::holds_nothing()
}

/// Frees what mappings that have ended held, where no thread is in them any more.
pub fn settle() {
    sweeper::settle();
}

/// The same, again and again until `done`, for about 50 ms at most. (A thread that still uses such a mapping may be in a system call.)
pub fn settle_until(done: impl Fn() -> bool) {
    const TRIES: u32 = 50;
    const NAP: Nanos = Nanos::from_millis(1);
    for _ in 0..TRIES {
        settle();
        if done() {
            break;
        }
        clock::nap(NAP);
    }
}

/// A round of the work that is done beside the program: installing the markers of large mappings, and putting markers back. Returns
/// whether there is more to do immediately.
pub fn work() -> bool {
    !table::is_unused() && sweeper::round()
}

/// Replaces (or, without a new one, reads) the disposition of SIGSEGV that the program believes in. While the engine's handler is not
/// installed, `kernels` is called instead.
///
/// # Errors
///
/// What `kernels` returned.
pub fn sigsegv<R>(new: Option<Disposition>, kernels: impl FnOnce() -> R) -> Result<Disposition, R> {
    SIGSEGV.replace_former(new, kernels)
}
