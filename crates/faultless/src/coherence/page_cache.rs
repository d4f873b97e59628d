//! Reading a file into the page cache, by a descriptor of the engine's own: without `mmap_lock`, which the kernel's own advice on a mapping
//! takes.

#![allow(unsafe_code, reason = "reads into a byte of its own by address")]

use crate::coherence::keeper;
use crate::space::fds::Fd;
use faultless_sys::file::{self, FileId};
use faultless_sys::mem::PAGE;
use faultless_sys::{Errno, raw};
use std::ops::Range;

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

impl PageCache {
    pub(crate) fn new(fd: Fd, id: FileId) -> Self {
        PageCache {
            fd: Some(fd),
            id,
            pid: raw::getpid(),
        }
    }

    /// The descriptor, if it still names the file.
    fn number(&self) -> Option<i32> {
        let fd = self.fd.as_ref()?;
        let number = fd.get();
        if file::cached_id(number) == Ok(self.id) {
            return Some(number);
        }
        fd.current(self.id).ok()
    }

    /// Brings in the pages that a range of the file lies in, and waits for them. Fails with the offset of the first page that cannot be.
    pub(crate) fn bring_in(&self, range: &Range<u64>) -> Result<(), (u64, Missing)> {
        let start = page_of(range.start);
        let number = self.number().ok_or((start, Missing::Closed))?;
        if range.end - start > PAGE as u64 && !has_all(number, range) {
            ask(number, range);
        }
        (start..range.end)
            .step_by(PAGE)
            .try_for_each(|page| read_byte(number, page).map_err(|why| (page, why)))
    }

    /// Has the kernel begin to read what is absent of a range.
    pub(crate) fn will_need(&self, range: &Range<u64>) {
        if let Some(number) = self.number()
            && !has_all(number, range)
        {
            ask(number, range);
        }
    }

    /// Says how the file will be read (`POSIX_FADV_…`).
    pub(crate) fn advise(&self, advice: i32) {
        if let Some(number) = self.number() {
            let _ = file::advise(number, 0, 0, advice);
        }
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

/// Whether the page cache has all pages of a range, or is reading them. `false` if the kernel does not tell (before Linux 6.5).
fn has_all(number: i32, range: &Range<u64>) -> bool {
    let start = page_of(range.start);
    let pages = (range.end - start).div_ceil(PAGE as u64);
    let state = file::cache_state(number, start, range.end - start);
    state.is_ok_and(|state| state.cached >= pages)
}

fn ask(number: i32, range: &Range<u64>) {
    let start = page_of(range.start);
    let _ = file::advise(number, start, range.end - start, libc::POSIX_FADV_WILLNEED);
}

/// Waits until the page of a byte is in memory.
fn read_byte(number: i32, offset: u64) -> Result<(), Missing> {
    let mut byte = 0u8;
    let at = &raw mut byte as usize;
    loop {
        // SAFETY: a byte of this frame.
        match unsafe { file::pread(number, at, 1, offset) } {
            Ok(0) => return Err(Missing::PastEnd),
            Ok(_) => return Ok(()),
            Err(Errno(libc::EINTR)) => {}
            Err(e) => return Err(Missing::Read(e)),
        }
    }
}
