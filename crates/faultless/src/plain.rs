//! Maps without userfaultfd: the kernel's own mmap for files, a copy in memory for other sources.

#![allow(unsafe_code, reason = "maps and replaces memory by address")]

use crate::error::Error;
use crate::fault::fds::Fd;
use crate::lease::OnBreak;
use crate::source::{self, Source};
use faultless_sys::file::FileId;
use faultless_sys::mem::{self, PAGE};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// `MADV_POPULATE_READ` (5.14).
const MADV_POPULATE_READ: i32 = 22;

/// Where a plain map is, shared with the thread that handles a broken lease.
#[derive(Debug)]
pub(crate) struct Range {
    pub(crate) start: usize,
    pub(crate) len: usize,
    /// 0: as mapped. 1: replaced by a copy. 2: refused.
    state: AtomicU8,
}

/// A map on the kernel's mmap.
#[derive(Debug)]
pub(crate) struct Plain {
    pub(crate) range: Arc<Range>,
    pub(crate) name: String,
    lease: Option<(Fd, FileId)>,
    file_backed: bool,
}

impl Plain {
    /// Maps `len` bytes of an open file from `base`, a multiple of the page size.
    pub(crate) fn file(
        fd: Fd,
        id: FileId,
        name: String,
        base: u64,
        len: usize,
        lease: Option<(OnBreak, u64)>,
    ) -> Result<Self, Error> {
        // SAFETY: the kernel chooses an unused range.
        let start = unsafe { mem::map(0, len, libc::PROT_READ, libc::MAP_PRIVATE, fd.get(), base) };
        let start = match start {
            Ok(start) => start,
            Err(e) => {
                crate::keeper::retire(fd, id);
                return Err(Error::kernel(format!("cannot map {name}"), e));
            }
        };
        let range = Arc::new(Range {
            start,
            len,
            state: AtomicU8::new(0),
        });
        let leased = lease.is_some();
        if let Some((what, room)) = lease {
            let (broken, kept) = (range.clone(), fd.engine_number());
            let on_break = move || {
                let (range, what) = (broken.clone(), what);
                // The keeper must not read a whole file itself.
                let _ = std::thread::Builder::new()
                    .name("faultless-snap".into())
                    .spawn(move || {
                        crate::keeper::block_signals();
                        on_lease_break(&range, kept, base, what, room);
                        crate::keeper::end_lease_of(kept);
                    });
            };
            let taken = crate::keeper::lease(&fd, Box::new(on_break))
                .map_err(|e| Error::kernel("cannot reach the keeper thread", e))
                .and_then(|r| r.map_err(|e| crate::lease::error(&name, crate::lease::refusal(e))));
            if let Err(e) = taken {
                // SAFETY: mapped above, shown to nobody.
                let _ = unsafe { mem::unmap(start, len) };
                crate::keeper::retire(fd, id);
                return Err(e);
            }
        }
        if leased {
            return Ok(Plain {
                range,
                name,
                lease: Some((fd, id)),
                file_backed: true,
            });
        }
        crate::keeper::retire(fd, id);
        Ok(Plain {
            range,
            name,
            lease: None,
            file_backed: true,
        })
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
        // SAFETY: mapped just now, writable, ours.
        let bytes = unsafe { std::slice::from_raw_parts_mut(start as *mut u8, len) };
        let read = source::read_full(source, source.alignment().max(1), bytes, base);
        if let Err(error) = read {
            // SAFETY: mapped above, shown to nobody.
            let _ = unsafe { mem::unmap(start, len) };
            return Err(Error::Read {
                name,
                offset: base,
                error,
            });
        }
        // SAFETY: ours; nobody writes to it any more.
        let _ = unsafe { mem::protect(start, len, libc::PROT_READ) };
        Ok(Plain {
            range: Arc::new(Range {
                start,
                len,
                state: AtomicU8::new(1),
            }),
            name,
            lease: None,
            file_backed: false,
        })
    }

    /// Makes a range (page-aligned, in bytes from the start) resident, and says so if it cannot be.
    pub(crate) fn populate(&self, start: usize, len: usize) -> Result<(), std::io::Error> {
        if self.range.state.load(Ordering::Acquire) == 2 {
            return Err(std::io::Error::other(
                "the file was opened for writing after it was mapped",
            ));
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
        debug_assert!(advice != libc::MADV_DONTNEED || self.file_backed);
        // SAFETY: inside our mapping; a private file mapping that nobody wrote to is read again after DONTNEED.
        let _ = unsafe { mem::madvise(self.range.start + start, len, advice) };
    }

    /// Lets pages go, if they can come back.
    pub(crate) fn release(&self, start: usize, len: usize) {
        if self.file_backed && self.range.state.load(Ordering::Acquire) == 0 {
            self.advise(start, len, libc::MADV_DONTNEED);
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

impl Drop for Plain {
    fn drop(&mut self) {
        // The lease first: no break is handled on a range that is gone.
        if let Some((fd, id)) = self.lease.take() {
            crate::keeper::retire(fd, id);
        }
        while Arc::strong_count(&self.range) > 1 && self.range.state.load(Ordering::Acquire) == 3 {
            faultless_sys::raw::nap(1_000_000);
        }
        // SAFETY: ours; the map is being dropped, so nobody holds a slice of it.
        let _ = unsafe { mem::unmap(self.range.start, self.range.len) };
    }
}

/// Replaces the file under a map before a writer gets at it: by a copy, or by nothing.
fn on_lease_break(range: &Range, fd: i32, base: u64, what: OnBreak, room: u64) {
    // 3: being replaced; the dropper waits.
    if range
        .state
        .compare_exchange(0, 3, Ordering::AcqRel, Ordering::Acquire)
        .is_err()
    {
        return;
    }
    let copied = what == OnBreak::Snapshot
        && range.len as u64 <= room
        && replace_by_copy(range, fd, base).is_some();
    if !copied {
        // An empty file: every access raises SIGBUS, as a truncated file would.
        // SAFETY: plain system calls; the range is ours until the map is dropped, which waits for us.
        unsafe {
            let empty = libc::memfd_create(c"faultless-lease-broken".as_ptr(), libc::MFD_CLOEXEC);
            let flags = libc::MAP_FIXED | libc::MAP_SHARED;
            let _ = mem::map(range.start, range.len, libc::PROT_READ, flags, empty, 0);
            if empty >= 0 {
                faultless_sys::file::close(empty);
            }
        }
    }
    range
        .state
        .store(if copied { 1 } else { 2 }, Ordering::Release);
}

fn replace_by_copy(range: &Range, fd: i32, base: u64) -> Option<()> {
    let copy = mem::map_anonymous(range.len).ok()?;
    let mut got = 0;
    while got < range.len {
        // SAFETY: inside the copy, which is ours and writable.
        match unsafe {
            faultless_sys::file::pread(fd, copy + got, range.len - got, base + got as u64)
        } {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(e) if e.0 == libc::EINTR => {}
            Err(_) => {
                // SAFETY: mapped above.
                let _ = unsafe { mem::unmap(copy, range.len) };
                return None;
            }
        }
    }
    // Read before the lease was given up? The kernel knows.
    if !faultless_sys::file::lease_still_listed(fd) {
        // SAFETY: mapped above.
        let _ = unsafe { mem::unmap(copy, range.len) };
        return None;
    }
    // SAFETY: both ranges are ours and equally long; readers of the old one find the same bytes in the new.
    unsafe {
        mem::protect(copy, range.len, libc::PROT_READ).ok()?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        let moved = libc::mremap(
            copy as *mut _,
            range.len,
            range.len,
            flags,
            range.start as *mut libc::c_void,
        );
        (moved != libc::MAP_FAILED).then_some(())
    }
}
