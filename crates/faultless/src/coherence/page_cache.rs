//! Reading a file into the page cache, by a descriptor of the engine's own: without `mmap_lock`, which the kernel's own advice on a mapping
//! takes.

#![allow(unsafe_code, reason = "reads into a buffer of its own by address")]

use crate::base::clock;
use crate::base::ids::Nanos;
use crate::coherence::keeper;
use crate::space::fds::Fd;
use faultless_sys::file::{self, FileId};
use faultless_sys::mem::PAGE;
use faultless_sys::{Errno, raw};
use std::mem::MaybeUninit;
use std::ops::Range;

/// As much as the kernel is asked for in one call, of which it reads no more than its own read-ahead (128 KiB unless it was changed).
const ASK: u64 = 128 << 10;
/// A part of a large range: the next one is asked for before this one is waited for.
const PART: u64 = 1 << 20;
/// As much as one call reads. The bytes go nowhere: but for reading all of a page, the kernel may leave the rest of it absent.
const READ: usize = 4 * PAGE;
/// Naps of 1 ms for a file that says EAGAIN.
const AGAIN_MAX: u32 = 2_000;
/// Times that a part is read through a descriptor that turns out to be foreign.
const TRIES: u32 = 4;

/// A file that is mapped by the kernel.
#[derive(Debug)]
pub(crate) struct PageCache {
    /// `None` as it is being dropped.
    fd: Option<Fd>,
    id: FileId,
    pid: u32,
}

/// Why a page cannot be brought in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// The file ends before it.
    PastEnd,
    /// The program has closed the descriptor, and the engine cannot get it back.
    Closed,
    /// The kernel's error.
    Read(Errno),
}

type Failed = (u64, Missing);

impl PageCache {
    pub(crate) fn new(fd: Fd, id: FileId) -> Self {
        PageCache {
            fd: Some(fd),
            id,
            pid: raw::getpid(),
        }
    }

    fn names(&self, number: i32) -> bool {
        file::cached_id(number) == Ok(self.id)
    }

    /// The descriptor, if it still names the file, or can be had back.
    fn number(&self) -> Option<i32> {
        let fd = self.fd.as_ref()?;
        let number = fd.get();
        match self.names(number) {
            true => Some(number),
            false => fd.current(self.id).ok(),
        }
    }

    /// Brings in the pages that a range of the file lies in, and waits for them. Fails with the offset of the first page that cannot be.
    pub(crate) fn bring_in(&self, range: &Range<u64>) -> Result<(), Failed> {
        let mut part = part_of(range, page_of(range.start));
        if part.end - part.start > PAGE as u64 {
            self.ask(&part);
        }
        while !part.is_empty() {
            let next = part_of(range, part.end);
            self.ask(&next);
            self.read_part(&part)?;
            part = next;
        }
        Ok(())
    }

    /// Has the kernel begin to read what is absent of a range.
    pub(crate) fn will_need(&self, range: &Range<u64>) {
        let mut part = part_of(range, page_of(range.start));
        while !part.is_empty() {
            self.ask(&part);
            part = part_of(range, part.end);
        }
    }

    /// Whether the page cache has all pages of a range, or is reading them. `None` if the kernel does not tell: before Linux 6.5, or of a file
    /// of another user's.
    pub(crate) fn has_all(&self, range: &Range<u64>) -> Option<bool> {
        has_all(self.number()?, &(page_of(range.start)..range.end))
    }

    /// Says how the file will be read (`POSIX_FADV_…`).
    pub(crate) fn advise(&self, advice: i32) {
        if let Some(number) = self.number() {
            let _ = file::advise(number, 0, 0, advice);
        }
    }

    fn ask(&self, part: &Range<u64>) {
        if !part.is_empty()
            && let Some(number) = self.number()
            && has_all(number, part) != Some(true)
        {
            for at in (part.start..part.end).step_by(ASK as usize) {
                let len = ASK.min(part.end - at);
                let _ = file::advise(number, at, len, libc::POSIX_FADV_WILLNEED);
            }
        }
    }

    /// Reads all pages of a part, through a descriptor that named the file before and after.
    fn read_part(&self, part: &Range<u64>) -> Result<(), Failed> {
        for _ in 0..TRIES {
            let number = self.number().ok_or((part.start, Missing::Closed))?;
            let read = read_all(number, part);
            if self.names(number) {
                return read;
            }
        }
        Err((part.start, Missing::Closed))
    }
}

impl Drop for PageCache {
    fn drop(&mut self) {
        // (A forked child has closed what it had of it.)
        if let Some(fd) = self.fd.take().filter(|_| raw::getpid() == self.pid) {
            keeper::retire(fd, self.id);
        }
    }
}

fn page_of(offset: u64) -> u64 {
    offset / PAGE as u64 * PAGE as u64
}

/// The part of a range that begins at `start`, up to the next multiple of [`PART`].
fn part_of(range: &Range<u64>, start: u64) -> Range<u64> {
    start..((start / PART + 1) * PART).min(range.end).max(start)
}

fn has_all(number: i32, part: &Range<u64>) -> Option<bool> {
    let len = part.end - part.start;
    let state = file::cache_state(number, part.start, len).ok()?;
    Some(state.cached >= len.div_ceil(PAGE as u64))
}

/// Reads the pages of a part, which begins with one.
fn read_all(number: i32, part: &Range<u64>) -> Result<(), Failed> {
    let end = part.end.next_multiple_of(PAGE as u64);
    let mut at = part.start;
    while at < end {
        let len = READ.min((end - at) as usize);
        match read(number, at, len) {
            Ok(0) => {
                // (The rest of the file's last page is there with it.)
                let first = at.next_multiple_of(PAGE as u64);
                return match first < end {
                    true => Err((first, Missing::PastEnd)),
                    false => Ok(()),
                };
            }
            Ok(got) => at += got as u64,
            Err(e) => return Err((page_of(at), Missing::Read(e))),
        }
    }
    Ok(())
}

/// Reads, and forgets what was read.
fn read(number: i32, offset: u64, len: usize) -> Result<usize, Errno> {
    let mut nowhere = MaybeUninit::<[u8; READ]>::uninit();
    let mut again = 0;
    loop {
        // SAFETY: a buffer of this frame, which has room for `len`.
        match unsafe { file::pread(number, nowhere.as_mut_ptr().addr(), len, offset) } {
            Err(Errno(libc::EINTR)) => {}
            Err(Errno(libc::EAGAIN)) if again < AGAIN_MAX => {
                again += 1;
                clock::nap(Nanos::from_millis(1));
            }
            done => return done,
        }
    }
}
