//! Reading a file into the page cache, by a descriptor of the engine's own: without `mmap_lock`, which the kernel's own advice on a mapping
//! takes.

#![allow(unsafe_code, reason = "reads into a buffer of its own by address")]

use crate::base::primitive::{Mutex, lock};
use crate::coherence::keeper;
use crate::fault::read_file::patient_pread;
use crate::space::fds::Fd;
use faultless_sys::file::{self, FileId};
use faultless_sys::mem::PAGE;
use faultless_sys::{Errno, raw};
use std::collections::VecDeque;
use std::mem::MaybeUninit;
use std::ops::Range;

/// The most that the kernel is asked for in one call. It reads its own read-ahead at most (128 KiB, unless it was changed).
const ASK: u64 = 128 << 10;
/// A part of a large range: the next one is asked for before this one is waited for.
const PART: u64 = 1 << 20;
/// The most that is asked for in advance, of one range and of all ranges of a call. The kernel might reclaim more before it is read.
const BEGIN: u64 = 2 << 20;
const BEGIN_ALL: u64 = 64 << 20;
/// The most that one call reads. Nobody uses the bytes. But if a call reads less than a page, the kernel may leave the rest of the page absent.
const READ: usize = 4 * PAGE;
/// Times that a part is read through a descriptor that turns out to be foreign.
const TRIES: u32 = 4;

/// A file that is mapped by the kernel.
#[derive(Debug)]
pub(crate) struct PageCache {
    /// `None` as it is being dropped.
    fd: Option<Fd>,
    id: FileId,
    pid: u32,
    /// The kernel tells what the page cache has of the file.
    tells: bool,
    prefetches: Mutex<Prefetches>,
}

/// Ranges that are to be read soon.
#[derive(Debug, Default)]
struct Prefetches {
    ranges: VecDeque<Range<u64>>,
    /// A thread reads them.
    served: bool,
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
    /// Of a file that is used from `base` on.
    pub(crate) fn new(fd: Fd, id: FileId, base: u64) -> Self {
        let mut cache = PageCache {
            fd: Some(fd),
            id,
            pid: raw::getpid(),
            tells: true,
            prefetches: Mutex::default(),
        };
        // (On overlayfs, whose pages belong to another file, the kernel reports that there are none.)
        let page = base..base + 1;
        cache.tells = cache.bring_in(&page).is_ok() && cache.has_all(&page) == Some(true);
        cache
    }

    /// The descriptor, if it still names the file, or the engine can get it back.
    fn number(&self) -> Option<i32> {
        self.fd.as_ref()?.found(self.id)
    }

    /// Brings in the pages that a range of the file lies in, and waits for them. Fails with the offset of the first page that cannot be.
    pub(crate) fn bring_in(&self, range: &Range<u64>) -> Result<(), Failed> {
        let first = part_of(range, page_of(range.start));
        if first.end - first.start > PAGE as u64 {
            self.ask(&first);
        }
        let mut at = first.start;
        while let Some(next) = self.bring_in_part(range, at)? {
            at = next;
        }
        Ok(())
    }

    /// Brings in the part of a range that begins at `at`, and asks for the next one. Returns where that begins.
    fn bring_in_part(&self, range: &Range<u64>, at: u64) -> Result<Option<u64>, Failed> {
        let part = part_of(range, at);
        if part.is_empty() {
            return Ok(None);
        }
        self.ask(&part_of(range, part.end));
        self.read_part(&part)?;
        Ok(Some(part.end))
    }

    /// Has the kernel begin to read the absent pages of some ranges: the first part of each.
    pub(crate) fn begin_all(&self, ranges: impl Iterator<Item = Range<u64>>) {
        let mut left = BEGIN_ALL;
        for range in ranges {
            let start = page_of(range.start);
            let end = range.end.min(start + BEGIN.min(left));
            self.ask(&(start..end));
            left -= end - start;
            if left == 0 {
                break;
            }
        }
    }

    /// Notes a range that is to be read soon. `true` if the caller must start a thread that [serves](Self::serve_prefetches) all such ranges.
    pub(crate) fn note_prefetch(&self, range: Range<u64>) -> bool {
        let mut prefetches = lock(&self.prefetches);
        prefetches.ranges.push_back(range);
        !std::mem::replace(&mut prefetches.served, true)
    }

    /// Reads a part of a noted range. `false` if there is none.
    pub(crate) fn serve_prefetches(&self) -> bool {
        let range = {
            let mut prefetches = lock(&self.prefetches);
            let range = prefetches.ranges.pop_front();
            prefetches.served = range.is_some();
            range
        };
        let Some(range) = range else {
            return false;
        };
        // (A part that cannot be read is skipped. A load of it reports the error.)
        if let Ok(Some(next)) = self.bring_in_part(&range, page_of(range.start))
            && next < range.end
        {
            lock(&self.prefetches).ranges.push_front(next..range.end);
        }
        true
    }

    /// Whether the page cache has all pages of a range, or is reading them. `None` if the kernel does not tell: before Linux 6.5, on some file
    /// systems, or of a file of another user's.
    pub(crate) fn has_all(&self, range: &Range<u64>) -> Option<bool> {
        let number = self.number().filter(|_| self.tells)?;
        has_all(number, &(page_of(range.start)..range.end))
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
            && !(self.tells && has_all(number, part) == Some(true))
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
            if file::cached_id(number) == Ok(self.id) {
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

/// Whether the page cache has all pages of a part, which begins with one, or is reading them. `None` if the kernel does not tell.
///
/// The handler of SIGSEGV calls this: one system call, no heap, no lock.
pub(crate) fn has_all(number: i32, part: &Range<u64>) -> Option<bool> {
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
    // SAFETY: a buffer of this frame, which has room for `len`.
    unsafe { patient_pread(number, nowhere.as_mut_ptr().addr(), len, offset, &mut 0) }
}
