//! Memory that belongs to the engine: mapped, zero until touched, in no core dump and in no forked child.

#![allow(unsafe_code, reason = "maps and unmaps memory")]

use faultless_sys::mem;
use std::sync::atomic::{AtomicBool, Ordering};

/// Size of a huge page.
pub(crate) const HUGE: usize = 2 << 20;

/// An owned range of private anonymous memory.
///
/// A forked child does not get it. That is not thrift but correctness: a fork in the middle of a direct read would
/// make the kernel copy the page on the next write, and the device would write into the copy that nobody looks at.
#[derive(Debug)]
pub(crate) struct Area {
    start: usize,
    len: usize,
    /// It stays mapped for ever.
    kept: AtomicBool,
}

impl Area {
    /// Maps `bytes`, rounded up to pages.
    pub(crate) fn new(bytes: usize) -> std::io::Result<Self> {
        let len = bytes.next_multiple_of(mem::PAGE).max(mem::PAGE);
        let start = mem::map_reserved(len)?;
        let area = Area {
            start,
            len,
            kept: AtomicBool::new(false),
        };
        // SAFETY: the range was mapped just now and is ours; neither advice changes its contents.
        unsafe {
            mem::protect(start, len, libc::PROT_READ | libc::PROT_WRITE)?;
            mem::madvise(start, len, libc::MADV_DONTFORK)?;
            mem::madvise(start, len, libc::MADV_DONTDUMP)?;
            // Kernels without transparent huge pages know no such advice, and need none.
            let _ = mem::madvise(start, len, libc::MADV_NOHUGEPAGE);
        }
        // The first touch of a mapping prepares its reverse map, under mmap_lock: here, not in the fault path.
        // SAFETY: the first byte is mapped and writable, and nobody else knows it yet.
        unsafe { core::ptr::write_volatile(start as *mut u8, 0) };
        Ok(area)
    }

    /// As [`new`](Self::new), for memory that is best backed by huge pages. Gives the first address that is a multiple of
    /// [`HUGE`], from which `bytes` follow.
    pub(crate) fn huge(bytes: usize) -> std::io::Result<(Self, usize)> {
        let area = Area::new(bytes + HUGE)?;
        // Not the first address, though it be a multiple: the page that `new` has touched there is a small one, and would
        // keep a huge page from its place.
        let start = (area.start + 1).next_multiple_of(HUGE);
        // SAFETY: inside the area; changes no contents. Kernels without huge pages refuse, and do without.
        let _ = unsafe { mem::madvise(start, bytes, libc::MADV_HUGEPAGE) };
        Ok((area, start))
    }

    /// Maps the huge page at `start` anew, empty and without a page table. If that fails, it stays as it is.
    #[cfg(not(loom))]
    pub(crate) fn renew_huge(&self, start: usize) {
        assert!(start >= self.start && start + HUGE <= self.start + self.len);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: inside the area; its user gives up what it holds.
        unsafe {
            let made = mem::map(
                start,
                HUGE,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            );
            if made.is_ok() {
                // (After mlockall it would be filled, and could not be moved.)
                let _ = mem::unlock(start, HUGE);
                let _ = mem::madvise(start, HUGE, libc::MADV_DONTFORK);
                let _ = mem::madvise(start, HUGE, libc::MADV_DONTDUMP);
                let _ = mem::madvise(start, HUGE, libc::MADV_HUGEPAGE);
            }
        }
    }

    /// Address of element `index` of an array of `T` that fills the area.
    #[cfg(not(loom))]
    #[inline]
    pub(crate) fn at<T>(&self, index: usize) -> *mut T {
        debug_assert!((index + 1) * size_of::<T>() <= self.len);
        (self.start + index * size_of::<T>()) as *mut T
    }

    /// Keeps the memory mapped for ever, even when this is dropped: the kernel may yet write to it.
    #[cfg(not(loom))]
    pub(crate) fn keep_for_ever(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }

    /// First address.
    pub(crate) fn start(&self) -> usize {
        self.start
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        if self.kept.load(Ordering::Relaxed) {
            return;
        }
        if super::process::forked() {
            // This is a child that never had the memory; something else may live at its address by now.
            return;
        }
        // SAFETY: mapped in `new`, owned by self; those who hold an Area keep it alive while they use its addresses.
        let _ = unsafe { mem::unmap(self.start, self.len) };
    }
}
