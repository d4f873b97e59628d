//! Mappings of a process with one thread: the kernel's until the program creates a second thread, which takes them over in place.
//!
//! Before a mapping is replaced, the kernel is asked what lies there now (`smaps`): the same bytes of the same file, plainly
//! mapped, with no page of the process's own. So it does not matter by which calls, seen or unseen, the program changed it since.
//! Nothing can change it between the question and the replacement: there is one thread, it is here, and its signals are blocked.

#![allow(
    unsafe_code,
    reason = "opens a descriptor, asks about pages by their address"
)]

use crate::decide::{self, Call, Known};
use crate::smaps::{self, Vma};
use crate::state::{self, State};
use crate::{limits, serving, threads, trap};
use faultless_run::Settings;
use faultless_sys::file::{self, FileId};
use faultless_sys::mem::PAGE;
use faultless_sys::raw::{self, check, gated};
use std::ffi::CString;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Why a mapping that waits is the kernel's.
pub(crate) const ALONE: &str =
    "the program has one thread, so that no other waits for its locks (--eager takes it over)";
/// Why none can be taken over any more.
pub(crate) const SHARED: &str = "another process shares the program's memory";
const CHANGED: &str = "the program changed or locked it before it had a second thread";
/// (The kernel walks the list of them when the thread ends. A page of a mutex may have been reclaimed, and would get a marker.)
const ROBUST: &str = "it is writable, and the program holds robust mutexes";
/// Most mappings that are remembered; the oldest is forgotten first.
const MOST: usize = 256;

/// The range in which they lie, for callers that must not lock; its end is 0 if there are none.
static HULL: [AtomicUsize; 2] = [AtomicUsize::new(usize::MAX), AtomicUsize::new(0)];

/// A mapping of the kernel's that would have been taken over if there had been another thread.
#[derive(Debug)]
pub(crate) struct Waiting {
    /// With the address at which it lies.
    pub(crate) call: Call,
    pub(crate) id: FileId,
    pub(crate) path: PathBuf,
    pub(crate) trusted: bool,
    /// The type of its file system.
    pub(crate) file_system: Option<u64>,
    /// Most of it had been written when it was mapped, or it is not writable.
    pub(crate) written: bool,
}

impl Waiting {
    pub(crate) fn bytes(&self) -> usize {
        self.call.len
    }

    /// Where the kernel is to put it: a stand-in begins at a granule. 0 if that cannot be said.
    pub(crate) fn place(&self) -> usize {
        match self.call.addr {
            wish if wish != 0 && !trap::active() => wish,
            _ => decide::free_place(self.call.len),
        }
    }

    /// The kernel has made it, at `at`.
    pub(crate) fn remember(mut self, at: usize) {
        self.call.addr = at;
        let range = self.range();
        let mut state = state::lock();
        // The kernel has replaced all that lay there.
        state.waiting.retain(|w| !w.has_part_of(&range));
        if state.waiting.len() == MOST {
            let oldest = state.waiting.remove(0);
            state.leave(ALONE, oldest.bytes(), || oldest.path);
        }
        state.waiting.push(self);
        tell(&state);
    }

    fn has_part_of(&self, range: &Range<usize>) -> bool {
        let own = self.range();
        own.start < range.end && range.start < own.end
    }

    fn range(&self) -> Range<usize> {
        self.call.addr..self.call.addr + self.call.len
    }
}

/// Says where they lie.
fn tell(state: &State) {
    let ranges = || state.waiting.iter().map(Waiting::range);
    let start = ranges().map(|r| r.start).min().unwrap_or(usize::MAX);
    let end = ranges().map(|r| r.end).max().unwrap_or(0);
    HULL[0].store(start, Ordering::SeqCst);
    HULL[1].store(end, Ordering::SeqCst);
}

/// A forked child has those of its parent.
pub(crate) fn in_child(state: &mut State, inherited: Vec<Waiting>) {
    state.waiting = inherited;
    tell(state);
}

/// None is taken over any more.
pub(crate) fn forget_all(state: &mut State, reason: &str) {
    for mapped in std::mem::take(&mut state.waiting) {
        state.leave(reason, mapped.bytes(), || mapped.path);
    }
    tell(state);
}

/// Whether some wait.
#[inline]
pub(crate) fn any() -> bool {
    HULL[1].load(Ordering::Relaxed) != 0
}

/// The program is about to change, or unmap, what lies in a range.
pub(crate) fn changing(range: &Range<usize>) {
    if range.end <= HULL[0].load(Ordering::Relaxed)
        || HULL[1].load(Ordering::Relaxed) <= range.start
        || state::foreign()
        || state::forking()
    {
        return;
    }
    let mut state = state::lock();
    let all = std::mem::take(&mut state.waiting);
    for mapped in all {
        if !mapped.has_part_of(range) {
            state.waiting.push(mapped);
            continue;
        }
        let whole = range.start <= mapped.range().start && mapped.range().end <= range.end;
        let why = if whole { ALONE } else { CHANGED };
        state.leave(why, mapped.bytes(), || mapped.path);
    }
    tell(&state);
}

/// Takes over what waits, before the program's second thread exists.
pub(crate) fn take_over() {
    let Some(settings) = state::settings() else {
        return;
    };
    if HULL[1].load(Ordering::SeqCst) == 0 {
        return;
    }
    // A program that has confined itself may be forbidden all that follows.
    let unfit = {
        let state = state::lock();
        state
            .closed
            .map(str::to_owned)
            .or_else(|| limits::check().err())
    };
    if let Some(why) = unfit {
        return forget_all(&mut state::lock(), &why);
    }
    // Before the lock, as everywhere.
    let ring = decide::uses_io_uring();
    // A listener that grants permission to open files would wait for itself.
    let grants = decide::has_descriptor_of("anon_inode:[fanotify]");
    let mut state = state::lock();
    let waiting = std::mem::take(&mut state.waiting);
    tell(&state);
    // The program may be creating its threads past the C library as well.
    let ready = threads::counted() == Some(1) && !grants;
    let text = ready
        .then(|| std::fs::read("/proc/self/smaps").ok())
        .flatten();
    // If it cannot be seen who holds leases, it is better not to open a file.
    let locks = ready.then(|| std::fs::read("/proc/locks").ok()).flatten();
    let (Some(text), Some(locks)) = (text, locks) else {
        state.waiting = waiting;
        return forget_all(&mut state, ALONE);
    };
    let looked = Looked {
        vmas: smaps::files(&text),
        locks: String::from_utf8_lossy(&locks),
        ring,
    };
    for mapped in waiting {
        if let Err(why) = promote(&mut state, settings, &looked, &mapped) {
            state.leave(&why, mapped.bytes(), || mapped.path);
        }
    }
}

/// What the kernel says of this process and its files.
struct Looked<'a> {
    vmas: Vec<Vma<'a>>,
    locks: std::borrow::Cow<'a, str>,
    ring: bool,
}

/// Takes one over in place. (One that is not there any more is not spoken of.)
fn promote(
    state: &mut State,
    settings: &Settings,
    looked: &Looked<'_>,
    mapped: &Waiting,
) -> Result<(), String> {
    let range = mapped.range();
    let is_at = |part| smaps::containing(&looked.vmas, &part).filter(|vma| mapped.is(vma));
    if mapped.call.writable && !raw::has_no_robust_mutex() {
        return Err(ROBUST.to_owned());
    }
    let Some(vma) = is_at(range.clone()).filter(|vma| vma.plain() && !guarded(&range)) else {
        // Gone, or something else lies there; or some of it is left.
        let is_left = |at| is_at(at..at + PAGE).is_some();
        return match is_left(range.start) || is_left(range.end - PAGE) {
            true => Err(CHANGED.to_owned()),
            false => Ok(()),
        };
    };
    if serving::touches(&range) {
        return Ok(());
    }
    let again = || "its file cannot be opened again by its name".to_owned();
    let file = mapped.open().ok_or_else(again)?;
    if leased(&looked.locks, mapped.id) {
        return Err("the program, or another, has a lease on its file".to_owned());
    }
    let status = file::status(file.as_raw_fd()).map_err(|_| again())?;
    let call = Call {
        fd: file.as_raw_fd(),
        ..mapped.call
    };
    let data = status.len.saturating_sub(call.offset).min(call.len as u64);
    let mut cached = decide::cached_share(data, |at, len| {
        resident(range.start + at as usize, len as usize)
    });
    if cached >= 1.0 && status.uid != raw::geteuid() && raw::geteuid() != 0 {
        // The kernel says so of all pages of a file that is neither the caller's nor writable to it: it is not known.
        cached = 0.0;
    }
    decide::promises(settings, cached)?;
    let known = Known {
        status: &status,
        path: &mapped.path,
        trusted: mapped.trusted,
        file_system: mapped.file_system,
        ring: looked.ring,
        cached,
        written: mapped.written,
        may_be_written: vma.may_be_written(),
    };
    decide::serve(state, settings, &call, &known, Some(vma.advice())).map(drop)
}

impl Waiting {
    /// Whether what lies there now is what was mapped. (On some file systems the kernel names another device here than to `stat`.)
    fn is(&self, vma: &Vma<'_>) -> bool {
        // (The part of it that was found may begin before it, or behind its start.)
        let origin = vma.range.start as i128 - i128::from(vma.offset);
        let device = vma.device == (libc::major(self.id.dev), libc::minor(self.id.dev));
        vma.inode == self.id.ino
            && vma.is_writable() == self.call.writable
            && (device || vma.path == self.path.as_os_str().as_bytes())
            && origin == self.call.addr as i128 - i128::from(self.call.offset)
            && vma.access.ends_with(b"s") == (self.call.flags & libc::MAP_TYPE == libc::MAP_SHARED)
    }

    /// The file by its name, if it is still the same. It is not opened for reading, so that nobody is told and no lock is lost when it
    /// is closed; and no file system is asked, since it may be served by this very thread.
    fn open(&self) -> Option<OwnedFd> {
        let path = CString::new(self.path.as_os_str().as_bytes()).ok()?;
        let fd = file::open_cached(&path).ok()?;
        // SAFETY: opened just now.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        (file::status(fd.as_raw_fd()).ok()?.id == self.id).then_some(fd)
    }
}

/// Whether a lease is held on a file that another opener would break, or that is the program's own.
fn leased(locks: &str, id: FileId) -> bool {
    let inode = format!(":{} ", id.ino);
    let own = format!(" {} ", std::process::id());
    locks.lines().any(|line| {
        line.contains(" LEASE ")
            && line.contains(&inode)
            && (!line.contains(" READ ") || line.contains(&own))
    })
}

/// Whether the program has put guards into a range (`MADV_GUARD_INSTALL`, which a mapping's flags do not tell before 6.19). Kernels
/// that do not know the question know no guards in mappings of files, but for 6.15.
fn guarded(range: &Range<usize>) -> bool {
    const GUARD: u64 = 1 << 8;
    let Ok(pagemap) = file::open(c"/proc/self/pagemap", libc::O_RDONLY | libc::O_CLOEXEC) else {
        return true;
    };
    let found = file::scan_pages(pagemap, range, GUARD);
    // SAFETY: opened above.
    unsafe { file::close(pagemap) };
    found.is_ok_and(|found| found)
}

/// Pages of a mapping of the kernel's that are in the page cache.
fn resident(at: usize, len: usize) -> u64 {
    let mut seen = [0u8; 256];
    let mut pages = 0;
    let end = at + len.next_multiple_of(PAGE);
    for from in (at..end).step_by(seen.len() * PAGE) {
        let part = (end - from).min(seen.len() * PAGE);
        let args = [from, part, seen.as_mut_ptr() as usize, 0, 0, 0];
        // SAFETY: it writes a byte for each page, for which there is room.
        if check(unsafe { gated(libc::SYS_mincore, args) }).is_ok() {
            let of_part = &seen[..part / PAGE];
            pages += of_part.iter().filter(|s| *s & 1 != 0).count() as u64;
        }
    }
    pages
}
