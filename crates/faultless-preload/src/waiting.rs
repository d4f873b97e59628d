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
use crate::threads;
use faultless::standin;
use faultless_run::Settings;
use faultless_sys::file::{self, FileId};
use faultless_sys::mem::PAGE;
use faultless_sys::raw::{check, gated};
use std::ffi::CString;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Why a mapping that waits is the kernel's.
pub(crate) const ALONE: &str =
    "the program has one thread, so that no other waits for its locks (--eager takes it over)";
const CHANGED: &str = "the program changed or locked it before it had a second thread";
/// Most mappings that are remembered; the oldest is forgotten first.
const MOST: usize = 256;

/// How many there are, for those that must not lock.
static COUNT: AtomicUsize = AtomicUsize::new(0);

/// A mapping of the kernel's that would have been taken over if there had been another thread.
#[derive(Debug)]
pub(crate) struct Waiting {
    /// With the address at which it lies.
    call: Call,
    id: FileId,
    path: PathBuf,
    /// How the program's descriptor was opened.
    access: i32,
    trusted: bool,
}

impl Waiting {
    pub(crate) fn new(call: Call, known: &Known<'_>) -> Waiting {
        Waiting {
            call,
            id: known.status.id,
            path: known.path.to_owned(),
            access: known.access,
            trusted: known.trusted,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.call.len
    }

    pub(crate) fn path(&self) -> &PathBuf {
        &self.path
    }

    /// Where the kernel is to put it: a stand-in begins at a granule. 0 if that cannot be said.
    pub(crate) fn place(&self) -> usize {
        match self.call.addr {
            0 => decide::free_place(self.call.len),
            wish => wish,
        }
    }

    /// The kernel has made it, at `at`.
    pub(crate) fn remember(mut self, at: usize) {
        self.call.addr = at;
        let range = self.range();
        let mut state = state::lock();
        // What lay there before is gone.
        let apart = |w: &Waiting| w.range().end <= range.start || range.end <= w.range().start;
        state.waiting.retain(apart);
        if state.waiting.len() == MOST {
            let oldest = state.waiting.remove(0);
            state.leave(ALONE, oldest.bytes(), || oldest.path);
        }
        state.waiting.push(self);
        COUNT.store(state.waiting.len(), Ordering::SeqCst);
    }

    fn range(&self) -> std::ops::Range<usize> {
        self.call.addr..self.call.addr + self.call.len
    }
}

/// A forked child has those of its parent.
pub(crate) fn in_child(state: &mut State, inherited: Vec<Waiting>) {
    state.waiting = inherited;
    COUNT.store(state.waiting.len(), Ordering::SeqCst);
}

/// Takes over what waits, before the program's second thread exists.
pub(crate) fn take_over() {
    let Some(settings) = state::settings() else {
        return;
    };
    if COUNT.load(Ordering::SeqCst) == 0 {
        return;
    }
    // Before the lock, as everywhere.
    let ring = decide::uses_io_uring();
    let mut state = state::lock();
    let waiting = std::mem::take(&mut state.waiting);
    COUNT.store(0, Ordering::SeqCst);
    // The program may be creating its threads past the C library as well.
    let alone = threads::counted() == Some(1);
    let text = if alone {
        std::fs::read("/proc/self/smaps").ok()
    } else {
        None
    };
    for mapped in waiting {
        let taken = match &text {
            Some(text) => promote(&mut state, settings, text, &mapped, ring),
            None => Err(ALONE.to_owned()),
        };
        if let Err(why) = taken {
            state.leave(&why, mapped.bytes(), || mapped.path);
        }
    }
}

/// Takes one over in place. (One that is not there any more is not spoken of.)
fn promote(
    state: &mut State,
    settings: &Settings,
    smaps: &[u8],
    mapped: &Waiting,
    ring: bool,
) -> Result<(), String> {
    let range = mapped.range();
    let is_at = |part| smaps::containing(smaps, &part).filter(|vma| mapped.is(vma));
    let Some(vma) = is_at(range.clone()).filter(Vma::plain) else {
        // Gone, or something else lies there; or some of it is left.
        let is_left = |at| is_at(at..at + PAGE).is_some();
        return match is_left(range.start) || is_left(range.end - PAGE) {
            true => Err(CHANGED.to_owned()),
            false => Ok(()),
        };
    };
    if standin::touches(&range) {
        return Ok(());
    }
    let again = || "its file cannot be opened again by its name".to_owned();
    let file = mapped.open().ok_or_else(again)?;
    if writes_by_lease(mapped.id) {
        return Err("the program, or another, has a lease on its file".to_owned());
    }
    let status = file::status(file.as_raw_fd()).map_err(|_| again())?;
    let call = Call {
        fd: file.as_raw_fd(),
        ..mapped.call
    };
    let data = status.len.saturating_sub(call.offset).min(call.len as u64);
    let cached = decide::cached_share(data, |at, len| {
        resident(range.start + at as usize, len as usize)
    });
    decide::promises(settings, &call, cached)?;
    let known = Known {
        status: &status,
        access: mapped.access,
        path: &mapped.path,
        trusted: mapped.trusted,
        ring,
        cached,
    };
    decide::permitted(state, settings, &call, &known)?;
    decide::stand_in(state, settings, &call, &known, Some(vma.advice()))?;
    Ok(())
}

impl Waiting {
    /// Whether what lies there now is what was mapped. (On some file systems the kernel names another device here than to `stat`.)
    fn is(&self, vma: &Vma<'_>) -> bool {
        // (The part of it that was found may begin before it, or behind its start.)
        let origin = vma.range.start as i128 - i128::from(vma.offset);
        let device = vma.device == (libc::major(self.id.dev), libc::minor(self.id.dev));
        vma.inode == self.id.ino
            && (device || vma.path == self.path.as_os_str().as_bytes())
            && origin == self.call.addr as i128 - i128::from(self.call.offset)
            && vma.access.ends_with(b"s") == (self.call.flags & libc::MAP_TYPE == libc::MAP_SHARED)
    }

    /// The file by its name, if it is still the same. It is not opened for reading, so that nobody is told and no lock is lost when it
    /// is closed.
    fn open(&self) -> Option<OwnedFd> {
        let path = CString::new(self.path.as_os_str().as_bytes()).ok()?;
        let fd = file::open(&path, libc::O_PATH | libc::O_CLOEXEC | libc::O_NOFOLLOW).ok()?;
        // SAFETY: opened just now.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        (file::status(fd.as_raw_fd()).ok()?.id == self.id).then_some(fd)
    }
}

/// Whether a lease is held on a file that another opener would break, or that is the program's own.
fn writes_by_lease(id: FileId) -> bool {
    let Ok(locks) = std::fs::read("/proc/locks") else {
        // Not to be seen: then it is better not to open the file.
        return true;
    };
    let inode = format!(":{} ", id.ino);
    let own = format!(" {} ", std::process::id());
    String::from_utf8_lossy(&locks).lines().any(|line| {
        line.contains(" LEASE ")
            && line.contains(&inode)
            && (!line.contains(" READ ") || line.contains(&own))
    })
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
