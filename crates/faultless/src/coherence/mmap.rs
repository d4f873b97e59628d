//! Maps without userfaultfd: the kernel's own mmap for files, a copy in memory for other sources.
//!
//! A lease guards a file here too, but less well: the kernel's mapping shows what a writer writes. When the lease is
//! being broken, the mapping is replaced, by a copy or by nothing, before the writer is let in. That takes time, which
//! the kernel grants (`lease-break-time`); a process that is stopped for longer than that loses the race.

#![allow(unsafe_code, reason = "maps and replaces memory by address")]

use crate::base::error::Error;
use crate::base::ids::LeaseId;
use crate::base::primitive::{
    AtomicBool, Mutex, MutexGuard, OnceLock, Ordering, TryLockError, lock,
};
use crate::base::source::Source;
use crate::base::thread::block_signals;
use crate::base::{source, thread};
use crate::coherence::lease::OnBreak;
use crate::coherence::{keeper, lease};
use crate::space::fds::Fd;
use faultless_sys::file::FileId;
use faultless_sys::mem::PAGE;
use faultless_sys::{file, mem, raw};
use std::sync::Arc;
use std::time::Instant;

/// `MADV_POPULATE_READ` (5.14).
const MADV_POPULATE_READ: i32 = 22;
/// Bytes of a copy that are read between looks at the clock.
const COPY_STEP: usize = 4 << 20;

/// What lies in the range of an mmap map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    /// The file, as the kernel maps it.
    File,
    /// A copy in memory.
    Copy,
    /// Nothing: the lease was broken.
    Refused,
    /// The map is being dropped.
    Gone,
}

/// Where an mmap map is, shared with the thread that handles a broken lease.
#[derive(Debug)]
pub(crate) struct Extent {
    pub(crate) start: usize,
    pub(crate) len: usize,
    /// Held while the range is replaced.
    state: Mutex<Content>,
    /// The map is being dropped: whoever copies its file stops.
    closing: AtomicBool,
}

/// Ranges of leased maps: a forked child does not get them, since its parent guards them.
static LEASED: Mutex<Vec<(usize, usize)>> = Mutex::new(Vec::new());

/// The lock on them, held across `fork`.
pub(crate) struct LeasedLock {
    _leased: MutexGuard<'static, Vec<(usize, usize)>>,
}

pub(crate) fn freeze() -> LeasedLock {
    LeasedLock {
        _leased: lock(&LEASED),
    }
}

/// Runs `f` on them, in the child of a fork, whose only thread is the caller and holds the lock.
pub(crate) fn for_each_leased(held: &LeasedLock, mut f: impl FnMut(std::ops::Range<usize>)) {
    for &(start, len) in held._leased.iter() {
        f(start..start + len);
    }
}

/// A map on the kernel's mmap.
#[derive(Debug)]
pub(crate) struct Mmap {
    pub(crate) range: Arc<Extent>,
    pub(crate) name: String,
    lease: Option<(LeaseId, Fd, FileId)>,
    pid: u32,
}

impl Mmap {
    /// Maps `len` bytes of an open file from `base`, a multiple of the page size. With a lease: what to do when it is
    /// broken, and the largest copy that may be made.
    pub(crate) fn file(
        fd: Fd,
        id: FileId,
        name: String,
        base: u64,
        len: usize,
        lease: Option<(OnBreak, u64)>,
    ) -> Result<Self, Error> {
        // SAFETY: the kernel chooses an unused range.
        let mapped =
            unsafe { mem::map(0, len, libc::PROT_READ, libc::MAP_PRIVATE, fd.get(), base) };
        let start = match mapped {
            Ok(start) => start,
            Err(e) => {
                keeper::retire(fd, id);
                return Err(Error::kernel(format!("cannot map {name}"), e));
            }
        };
        let mut map = Mmap {
            range: Arc::new(Extent {
                start,
                len,
                state: Mutex::new(Content::File),
                closing: AtomicBool::new(false),
            }),
            name,
            lease: None,
            pid: raw::getpid(),
        };
        let Some((what, room)) = lease else {
            keeper::retire(fd, id);
            return Ok(map);
        };
        // SAFETY: ours; the advice changes no contents.
        let _ = unsafe { mem::madvise(start, len, libc::MADV_DONTFORK) };
        match map.take_lease(&fd, base, what, room) {
            Ok(lease) => {
                lock(&LEASED).push((start, len));
                map.lease = Some((lease, fd, id));
                Ok(map)
            }
            Err(e) => {
                keeper::retire(fd, id);
                Err(e)
            }
        }
    }

    fn take_lease(&self, fd: &Fd, base: u64, what: OnBreak, room: u64) -> Result<LeaseId, Error> {
        let taken = Arc::new(OnceLock::new());
        let (range, number, id) = (self.range.clone(), fd.engine_number(), taken.clone());
        let on_break = move || {
            // The keeper must not read a whole file itself.
            let for_thread = range.clone();
            let thread = thread::spawn(c"faultless-snap", move || {
                block_signals();
                if on_lease_break(&for_thread, number, base, what, room) {
                    // It may have been broken before the thread that took it could note it down.
                    keeper::end_lease(*id.wait());
                }
            });
            if thread.is_err() {
                // No thread to be had: nothing is kept, and the kernel takes the lease by itself.
                on_lease_break(&range, number, base, OnBreak::Fail, 0);
            }
        };
        let lease = keeper::lease(fd, Box::new(on_break))
            .map_err(|e| Error::kernel("cannot reach the keeper thread", e))?
            .map_err(|e| lease::error(&self.name, lease::refusal(e)))?;
        let _ = taken.set(lease);
        Ok(lease)
    }

    /// Reads all of a source into memory.
    pub(crate) fn copy(
        source: &dyn Source,
        name: String,
        base: u64,
        len: usize,
    ) -> Result<Self, Error> {
        let start =
            mem::map_anonymous(len).map_err(|e| Error::kernel(format!("cannot map {name}"), e))?;
        let map = Mmap {
            range: Arc::new(Extent {
                start,
                len,
                state: Mutex::new(Content::Copy),
                closing: AtomicBool::new(false),
            }),
            name,
            lease: None,
            pid: raw::getpid(),
        };
        // SAFETY: mapped just now, writable, ours.
        let bytes = unsafe { std::slice::from_raw_parts_mut(start as *mut u8, len) };
        match source::read_full(source, source.alignment().max(1), bytes, base) {
            Ok(_) => {
                // SAFETY: ours; nobody writes to it any more.
                let _ = unsafe { mem::protect(start, len, libc::PROT_READ) };
                Ok(map)
            }
            Err(error) => Err(Error::Read {
                name: map.name.clone(),
                offset: base,
                error,
            }),
        }
    }

    /// Makes a range (page-aligned, in bytes from the start) resident, and says so if it cannot be.
    pub(crate) fn populate(&self, start: usize, len: usize) -> Result<(), std::io::Error> {
        if self
            .range
            .state
            .try_lock()
            .is_ok_and(|s| *s == Content::Refused)
        {
            let why = "the file was opened for writing after it was mapped";
            return Err(std::io::Error::other(why));
        }
        // SAFETY: reads pages in; changes no contents.
        match unsafe { mem::madvise(self.range.start + start, len, MADV_POPULATE_READ) } {
            // Before 5.14 there is no way to learn of an error but to touch the pages.
            Err(e) if e.0 != libc::EINVAL => Err(e.into()),
            _ => Ok(()),
        }
    }

    /// Gives the kernel advice on a range that changes no contents.
    pub(crate) fn advise(&self, start: usize, len: usize, advice: i32) {
        debug_assert!(advice != libc::MADV_DONTNEED);
        // SAFETY: inside our mapping; callers pass advice that discards nothing.
        let _ = unsafe { mem::madvise(self.range.start + start, len, advice) };
    }

    /// Lets pages go, if they can come back.
    pub(crate) fn release(&self, start: usize, len: usize) {
        // Held, so that the range is not replaced meanwhile by a copy, which could not come back.
        match self.range.state.try_lock() {
            Ok(state) if *state == Content::File => {
                // SAFETY: a private mapping of a file that nobody wrote to is read again.
                let _ = unsafe { mem::madvise(self.range.start + start, len, libc::MADV_DONTNEED) };
            }
            Ok(_) | Err(TryLockError::WouldBlock | TryLockError::Poisoned(_)) => {}
        }
    }

    /// Which pages of a page-aligned range are in memory: all of them?
    pub(crate) fn is_resident(&self, start: usize, len: usize) -> bool {
        let mut seen = vec![0u8; len.div_ceil(PAGE)];
        // SAFETY: one byte for each page of the range.
        let ok =
            unsafe { libc::mincore((self.range.start + start) as *mut _, len, seen.as_mut_ptr()) }
                == 0;
        ok && seen.iter().all(|b| b & 1 == 1)
    }
}

impl Drop for Mmap {
    fn drop(&mut self) {
        if raw::getpid() != self.pid {
            // A forked child: a leased range is barred there, another is its own affair, and nothing else is its to end.
            return;
        }
        self.range.closing.store(true, Ordering::Relaxed);
        *lock(&self.range.state) = Content::Gone;
        if let Some((lease, fd, id)) = self.lease.take() {
            keeper::end_lease(lease);
            keeper::retire(fd, id);
            lock(&LEASED).retain(|&(start, _)| start != self.range.start);
        }
        // SAFETY: ours; the map is being dropped, so nobody holds a slice of it, and nobody replaces it any more.
        let _ = unsafe { mem::unmap(self.range.start, self.range.len) };
    }
}

/// Replaces the file under a map before a writer gets at it: by a copy, or by nothing. `false` if there is nothing to
/// replace.
fn on_lease_break(range: &Extent, fd: i32, base: u64, what: OnBreak, room: u64) -> bool {
    let mut state = lock(&range.state);
    if *state != Content::File {
        return false;
    }
    let copied = what == OnBreak::Snapshot
        && range.len as u64 <= room
        && replace_by_copy(range, fd, base).is_some();
    *state = if copied {
        Content::Copy
    } else {
        bar(range);
        Content::Refused
    };
    true
}

/// Makes every access to a range fail.
fn bar(range: &Extent) {
    // SAFETY: plain system calls; the range is ours until the map is dropped, which takes the lock that the caller has.
    unsafe {
        // An empty file: SIGBUS, as a truncated file would give.
        let empty = libc::memfd_create(c"faultless-lease-broken".as_ptr(), libc::MFD_CLOEXEC);
        let flags = libc::MAP_FIXED | libc::MAP_SHARED;
        let barred = empty >= 0
            && mem::map(range.start, range.len, libc::PROT_READ, flags, empty, 0).is_ok();
        if empty >= 0 {
            file::close(empty);
        }
        if !barred {
            // Without a descriptor to be had: no access at all.
            let _ = mem::protect(range.start, range.len, libc::PROT_NONE);
        }
    }
}

fn replace_by_copy(range: &Extent, fd: i32, base: u64) -> Option<()> {
    let deadline = lease::deadline();
    let copy = mem::map_anonymous(range.len).ok()?;
    let stop =
        || range.closing.load(Ordering::Relaxed) || deadline.is_some_and(|d| Instant::now() > d);
    let read = read_all(copy, range.len, fd, base, stop);
    // Was the lease still held when the last byte was read? The kernel knows.
    let good = read && file::lease_still_listed(fd);
    // SAFETY: both ranges are ours and equally long; readers of the old one find the same bytes in the new.
    let moved = good
        && unsafe {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let to = range.start as *mut libc::c_void;
            mem::protect(copy, range.len, libc::PROT_READ).is_ok()
                && libc::mremap(copy as *mut _, range.len, range.len, flags, to) != libc::MAP_FAILED
        };
    if !moved {
        // SAFETY: mapped above, shown to nobody.
        let _ = unsafe { mem::unmap(copy, range.len) };
    }
    moved.then_some(())
}

fn read_all(to: usize, len: usize, fd: i32, base: u64, stop: impl Fn() -> bool) -> bool {
    let mut got = 0;
    while got < len {
        if stop() {
            return false;
        }
        let n = (len - got).min(COPY_STEP);
        // SAFETY: inside the copy, which is ours and writable.
        match unsafe { file::pread(fd, to + got, n, base + got as u64) } {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.0 == libc::EINTR => {}
            Err(_) => return false,
        }
    }
    true
}
