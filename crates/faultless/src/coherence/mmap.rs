//! Maps without userfaultfd: the kernel's own mapping of a file for whose bytes the user vouches or which may change, and a copy in memory
//! of everything else.
//!
//! A lease would guard the kernel's mapping less well than it guards the engine's: the mapping shows what a writer writes, and a
//! process that is stopped for longer than `lease-break-time` cannot take it away in time. So a safe map is a copy here, made
//! under a lease, and needs none afterwards.

#![allow(unsafe_code, reason = "maps memory by address")]

use crate::base::error::{Error, LeaseRefusal};
use crate::base::ids::FileAt;
use crate::base::size::ByteSize;
use crate::base::source;
use crate::base::source::Source;
use crate::coherence::page_cache::{Missing, PageCache};
use crate::coherence::{keeper, lease};
use crate::space::fds::Fd;
use crate::sync::budget::Budget;
use faultless_sys::file::{self, FileId};
use faultless_sys::mem::{self, PAGE};
use faultless_sys::{Errno, raw};
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// `MADV_POPULATE_READ` (5.14).
const MADV_POPULATE_READ: i32 = 22;

/// What lies in the range of a map.
#[derive(Debug)]
enum Content {
    /// The file, as the kernel maps it.
    File,
    /// A copy in memory, charged to this budget.
    Copy(Arc<Budget>),
    /// The file, in the kernel's shared mapping. Explicit loads read into the page cache first.
    Live(PageCache),
}

/// A map without userfaultfd.
#[derive(Debug)]
pub(crate) struct Mmap {
    pub(crate) start: usize,
    pub(crate) len: usize,
    pub(crate) name: String,
    /// Where in its source it begins.
    base: u64,
    content: Content,
    /// The process that made it.
    pub(crate) pid: u32,
}

/// What a descriptor's number named before something was done through it.
struct Witness {
    id: FileId,
    noted: Option<u32>,
}

impl Witness {
    fn of(fd: &Fd, id: FileId) -> Self {
        Witness {
            id,
            noted: Fd::noted(fd.get()),
        }
    }

    /// Whether the number has named the same open file all the while. A program that closes all descriptors may have put another
    /// file there.
    fn still_names(&self, fd: &Fd) -> bool {
        let number = fd.get();
        fd.is_kept_open_file(number)
            && fd.owns(number) != Some(false)
            && file::status(number).is_ok_and(|st| st.id == self.id)
            && self.noted.is_some()
            && Fd::noted(number) == self.noted
    }
}

fn closed_meanwhile(name: &str) -> Error {
    let error = io::Error::from_raw_os_error(libc::EBADF);
    Error::kernel(
        format!("the program closed the engine's descriptor of {name} while it was mapped"),
        error,
    )
}

/// A part of an open file that is to be mapped or copied.
pub(crate) struct Part {
    pub(crate) fd: Fd,
    pub(crate) id: FileId,
    /// For messages.
    pub(crate) name: String,
    /// Where it begins: a multiple of the page size.
    pub(crate) base: u64,
    /// Bytes of it.
    pub(crate) len: usize,
}

impl Mmap {
    /// Maps a part of a file. Nobody may change its bytes.
    pub(crate) fn trusted(part: Part) -> Result<Self, Error> {
        let start = map_part(&part, libc::MAP_PRIVATE);
        keeper::retire(part.fd, part.id);
        Ok(Mmap {
            start: start?,
            len: part.len,
            name: part.name,
            base: part.base,
            content: Content::File,
            pid: raw::getpid(),
        })
    }

    /// Maps a part of a file whose bytes may change.
    pub(crate) fn live(part: Part) -> Result<Self, Error> {
        let start = map_part(&part, libc::MAP_SHARED);
        let cache = PageCache::new(part.fd, part.id, part.base);
        Ok(Mmap {
            start: start?,
            len: part.len,
            name: part.name,
            base: part.base,
            content: Content::Live(cache),
            pid: raw::getpid(),
        })
    }

    /// Copies a part of a file, while a lease keeps writers out. The file had `file_len` bytes before.
    pub(crate) fn leased(part: Part, file_len: u64, budget: &Arc<Budget>) -> Result<Self, Error> {
        let copied = Self::copy_leased(&part, file_len, budget);
        keeper::retire(part.fd, part.id);
        copied
    }

    fn copy_leased(part: &Part, file_len: u64, budget: &Arc<Budget>) -> Result<Self, Error> {
        let (fd, name, id, base) = (&part.fd, &part.name, part.id, part.base);
        let witness = Witness::of(fd, id);
        let lease = keeper::lease(fd, Box::new(|| ()))
            .map_err(|e| Error::kernel("cannot reach the keeper thread", e))?
            .map_err(|e| lease::error(name, lease::refusal(e)))?;
        // A writer that came and went before the lease may have changed the length.
        if file::status(fd.get()).is_ok_and(|st| st.id == id && st.len != file_len) {
            keeper::end_lease(lease);
            return Err(lease::error(name, LeaseRefusal::OpenForWriting));
        }
        let read = |to: &mut [u8]| read_all(fd.get(), to, base);
        let copied = Self::filled(name.clone(), base, part.len, budget, read);
        // The kernel lists a lease until it is given up, or taken by force; it lets no writer in before.
        let held = file::lease_still_listed(fd.get());
        let ours = witness.still_names(fd);
        keeper::end_lease(lease);
        let copied = copied?;
        if !ours {
            return Err(closed_meanwhile(&copied.name));
        }
        if held != Ok(true) {
            return Err(Error::LeaseBroken {
                name: copied.name.clone(),
                offset: base,
            });
        }
        Ok(copied)
    }

    /// Reads all of a source into memory.
    pub(crate) fn copy(
        source: &dyn Source,
        name: String,
        base: u64,
        len: usize,
        budget: &Arc<Budget>,
    ) -> Result<Self, Error> {
        Self::filled(name, base, len, budget, |to| {
            let align = source.alignment().max(1);
            source::read_full(source, align, to, FileAt::new(base))
        })
    }

    /// Memory that `fill` has filled as far as it says, and that nobody can write to any more. Pages behind that cannot be read, as
    /// those of a file behind its end.
    fn filled(
        name: String,
        base: u64,
        len: usize,
        budget: &Arc<Budget>,
        fill: impl FnOnce(&mut [u8]) -> std::io::Result<usize>,
    ) -> Result<Self, Error> {
        if !budget.try_charge(len as u64) {
            return Err(Error::TooLargeToCopy {
                name,
                len: len as u64,
                budget: ByteSize::new(budget.limit()),
            });
        }
        let start = match mem::map_anonymous(len) {
            Ok(start) => start,
            Err(e) => {
                budget.release(len as u64);
                return Err(Error::kernel(format!("cannot map {name}"), e));
            }
        };
        let map = Mmap {
            start,
            len,
            name,
            base,
            content: Content::Copy(budget.clone()),
            pid: raw::getpid(),
        };
        // SAFETY: mapped just now, writable, ours, and known to nobody else.
        let bytes = unsafe { std::slice::from_raw_parts_mut(start as *mut u8, len) };
        let got = fill(bytes).map_err(|error| Error::Read {
            name: map.name.clone(),
            offset: base,
            error,
        })?;
        // SAFETY: ours; nobody writes to it any more.
        unsafe { mem::protect(start, len, libc::PROT_READ) }
            .map_err(|e| Error::kernel(format!("cannot protect the copy of {}", map.name), e))?;
        let data = got.next_multiple_of(PAGE);
        if data < len {
            bar(start + data, len - data)
                .map_err(|e| Error::kernel(format!("cannot end the map of {}", map.name), e))?;
        }
        Ok(map)
    }

    /// Makes a range of bytes resident, and says so if it cannot be.
    ///
    /// # Errors
    ///
    /// [`Error::PastEnd`] or [`Error::Read`], with the place of the first page that could not be read.
    pub(crate) fn populate(&self, bytes: &Range<usize>) -> Result<(), Error> {
        if let Content::Live(cache) = &self.content {
            let brought = cache.bring_in(&self.in_source(bytes));
            return brought.map_err(|(offset, why)| self.missing(offset, why));
        }
        let (at, len) = self.pages(bytes);
        let Err(error) = populate(at, len) else {
            return Ok(());
        };
        // Each page by itself, to find the one.
        let pages = (at..at + len).step_by(PAGE);
        let first = |&page: &usize| populate(page, PAGE.min(at + len - page)).is_err();
        let offset = self.base + (pages.clone().find(first).unwrap_or(at) - self.start) as u64;
        Err(self.missing(
            offset,
            match error.0 {
                libc::EFAULT => Missing::PastEnd,
                _ => Missing::Read(error),
            },
        ))
    }

    fn missing(&self, offset: u64, why: Missing) -> Error {
        let name = self.name.clone();
        match why {
            Missing::PastEnd => Error::PastEnd { name, offset },
            Missing::Closed => closed_meanwhile(&name),
            Missing::Read(error) => Error::Read {
                name,
                offset,
                error: error.into(),
            },
        }
    }

    /// Begins to read the absent pages of some ranges, where many can be read at a time.
    pub(crate) fn begin_all(&self, ranges: impl Iterator<Item = Range<usize>>) {
        if let Content::Live(cache) = &self.content {
            cache.begin_all(ranges.map(|bytes| self.in_source(&bytes)));
        }
    }

    /// Begins to read a range. `true` if a thread that may wait is to [serve](Self::serve_prefetches) it: the kernel takes requests one after
    /// the other.
    pub(crate) fn prefetch(&self, bytes: &Range<usize>) -> bool {
        match &self.content {
            Content::Live(cache) => cache.note_prefetch(self.in_source(bytes)),
            Content::File | Content::Copy(_) => {
                self.advise(bytes, libc::MADV_WILLNEED);
                false
            }
        }
    }

    /// Reads a part of a range that is to be read soon. `false` if there is none.
    pub(crate) fn serve_prefetches(&self) -> bool {
        match &self.content {
            Content::Live(cache) => cache.serve_prefetches(),
            Content::File | Content::Copy(_) => false,
        }
    }

    /// Whether a file's bytes may change.
    pub(crate) fn is_live(&self) -> bool {
        matches!(self.content, Content::Live(_))
    }

    /// Says how all of it will be read (`MADV_NORMAL`, `MADV_RANDOM`, `MADV_SEQUENTIAL`, which are `POSIX_FADV_…` as well).
    pub(crate) fn will_be_read(&self, advice: i32) {
        match &self.content {
            Content::Live(cache) => {
                cache.advise(advice);
                // (Of a mapping with `MADV_RANDOM`, reclaim does not note which pages are used.)
                let of_mapping = match advice {
                    libc::MADV_RANDOM => libc::MADV_NORMAL,
                    other => other,
                };
                self.advise(&(0..self.len), of_mapping);
            }
            Content::File | Content::Copy(_) => self.advise(&(0..self.len), advice),
        }
    }

    /// The part of the source that some bytes are.
    fn in_source(&self, bytes: &Range<usize>) -> Range<u64> {
        self.base + bytes.start as u64..self.base + bytes.end as u64
    }

    /// Where in its source it begins.
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    /// Gives the kernel advice on a range that changes no contents.
    fn advise(&self, bytes: &Range<usize>, advice: i32) {
        debug_assert!(advice != libc::MADV_DONTNEED);
        let (at, len) = self.pages(bytes);
        // SAFETY: inside our mapping; callers pass advice that discards nothing.
        let _ = unsafe { mem::madvise(at, len, advice) };
    }

    /// Lets the pages go that lie wholly in a range, if they can come back.
    pub(crate) fn release(&self, bytes: &Range<usize>) {
        let (start, end) = (bytes.start.next_multiple_of(PAGE), bytes.end & !(PAGE - 1));
        if start < end && !matches!(self.content, Content::Copy(_)) {
            // SAFETY: a mapping of a file that was not written to through it is read again.
            let _ = unsafe { mem::madvise(self.start + start, end - start, libc::MADV_DONTNEED) };
        }
    }

    /// Whether all pages of a range are in memory.
    pub(crate) fn is_resident(&self, bytes: &Range<usize>) -> bool {
        if let Content::Live(cache) = &self.content
            && let Some(all) = cache.has_all(&self.in_source(bytes))
        {
            return all;
        }
        let (at, len) = self.pages(bytes);
        let mut seen = vec![0u8; len.div_ceil(PAGE)];
        mem::in_memory(at, &mut seen).is_ok() && seen.iter().all(|b| b & 1 == 1)
    }

    /// Address and length of the pages that a range of bytes lies in.
    fn pages(&self, bytes: &Range<usize>) -> (usize, usize) {
        let start = bytes.start & !(PAGE - 1);
        (self.start + start, bytes.end - start)
    }
}

impl Drop for Mmap {
    fn drop(&mut self) {
        if raw::getpid() != self.pid {
            // A forked child has it from its parent, whose charge it is. Slices of the parent's may be in use here.
            return;
        }
        // SAFETY: ours; the map is being dropped, so nobody holds a slice of it.
        let _ = unsafe { mem::unmap(self.start, self.len) };
        if let Content::Copy(budget) = &self.content {
            budget.release(self.len as u64);
        }
    }
}

/// Maps a part of a file for reading, where the kernel chooses.
fn map_part(part: &Part, flags: i32) -> Result<usize, Error> {
    let Part {
        fd,
        id,
        name,
        base,
        len,
    } = part;
    let witness = Witness::of(fd, *id);
    // SAFETY: the kernel chooses an unused range.
    let mapped = unsafe { mem::map(0, *len, libc::PROT_READ, flags, fd.get(), *base) };
    let ours = witness.still_names(fd);
    let start = mapped.map_err(|e| Error::kernel(format!("cannot map {name}"), e))?;
    if !ours {
        // SAFETY: mapped just now, and shown to nobody.
        let _ = unsafe { mem::unmap(start, *len) };
        return Err(closed_meanwhile(name));
    }
    Ok(start)
}

/// Has the kernel read pages in. (Before Linux 5.14 there is no way to learn of an error but to touch them: it does nothing then.)
fn populate(start: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: reads pages in; changes no contents.
    match unsafe { mem::madvise(start, len, MADV_POPULATE_READ) } {
        Err(Errno(libc::EINVAL)) => Ok(()),
        done => done,
    }
}

/// Makes every access to a range of ours raise SIGBUS, as behind the end of a file: it becomes a mapping of an empty one.
fn bar(start: usize, len: usize) -> Result<(), Errno> {
    let empty = file::memory_file(c"faultless-behind-the-end", 0)?;
    let flags = libc::MAP_FIXED | libc::MAP_SHARED;
    // SAFETY: the range is the caller's, and nobody has a reference into it yet.
    let barred = unsafe { mem::map(start, len, libc::PROT_READ, flags, empty, 0) };
    // SAFETY: made above; the mapping keeps the file.
    unsafe { file::close(empty) };
    barred.map(drop)
}

/// Reads from `base` on until `to` is full or the file ends. Returns how many bytes were read.
fn read_all(fd: i32, to: &mut [u8], base: u64) -> std::io::Result<usize> {
    let mut got = 0;
    while got < to.len() {
        let rest = &mut to[got..];
        let (at, len) = (rest.as_mut_ptr() as usize, rest.len());
        // SAFETY: the slice is writable for its length, and this thread has it.
        match unsafe { file::pread(fd, at, len, base + got as u64) } {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.0 == libc::EINTR => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(got)
}
