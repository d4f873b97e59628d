//! Address space: mmap, munmap, madvise, and process_madvise in batches.

#![allow(unsafe_code, reason = "maps, unmaps and discards memory by address")]

use crate::raw::{Errno, check, gated, syscall};
use core::sync::atomic::{AtomicUsize, Ordering};

/// Bytes in a page. Some kernels have others (arm64: 16 or 64 KiB): whatever relies on this checks [`kernel_page_size`] first.
pub const PAGE: usize = 4096;

/// Most ranges that one [`madvise_batch`] call takes (`UIO_MAXIOV`).
pub const BATCH_MAX: usize = 1024;

/// `MAP_FIXED_NOREPLACE` of `linux/mman.h` (4.17).
pub const MAP_FIXED_NOREPLACE: i32 = 0x10_0000;

/// The page size of the running kernel, in bytes.
pub fn kernel_page_size() -> usize {
    // SAFETY: no pointers; a POSIX name that always exists.
    unsafe { libc::sysconf(libc::_SC_PAGESIZE) as usize }
}

/// `mmap(2)`.
///
/// # Safety
///
/// With `MAP_FIXED` in `flags`, whatever lies in the range is replaced: it must be the caller's to replace.
pub unsafe fn map(
    addr: usize,
    len: usize,
    prot: i32,
    flags: i32,
    fd: i32,
    offset: u64,
) -> Result<usize, Errno> {
    // SAFETY: passes integers only; the effect on the address space is the caller's promise.
    check(unsafe {
        gated(
            libc::SYS_mmap,
            [
                addr,
                len,
                prot as usize,
                flags as usize,
                fd as usize,
                offset as usize,
            ],
        )
    })
}

/// Maps `len` bytes of the engine's own in a part of the address space that nobody else is likely to use (`mmap(2)`, without an address).
///
/// By itself the kernel would fill the holes that a program has just unmapped. A program with one thread knows what is in those holes:
/// nothing. It may unmap them again, together with what lies around them, and would take the engine's memory away.
pub fn map_aside(len: usize, prot: i32, flags: i32, fd: i32, offset: u64) -> Result<usize, Errno> {
    /// Tries, each farther from the one before; and how far the second is from the first.
    const TRIES: u32 = 8;
    const STEP: usize = 64 << 20;
    for n in 0..TRIES {
        let skip = if n == 0 { 0 } else { STEP << (2 * (n - 1)) };
        let Some(at) = place(len, skip) else {
            break;
        };
        // SAFETY: replaces nothing.
        match unsafe { map(at, len, prot, flags | MAP_FIXED_NOREPLACE, fd, offset) } {
            Ok(got) if got == at => return Ok(at),
            // (Linux before 4.17 does not know the flag.)
            // SAFETY: mapped just now, shown to nobody.
            Ok(other) => _ = unsafe { unmap(other, len) },
            Err(Errno(libc::EEXIST)) => {}
            Err(_) => break,
        }
    }
    // SAFETY: no MAP_FIXED: the kernel chooses an unused range.
    unsafe { map(0, len, prot, flags, fd, offset) }
}

/// An address for `len` bytes of the engine's own, so many behind the last. `None` if there is no such part of the address space.
fn place(len: usize, skip: usize) -> Option<usize> {
    /// A step between huge pages, so that large ranges begin at one.
    const HUGE: usize = 2 << 20;
    /// Where the next range is to be; 0 before the first.
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    // An eighth of the address space below this code (16 TiB of the usual 128): the kernel maps from the top down. The address of the
    // code is random, and so is this. Half of the way to the code is used; then from the front again.
    let code = place as fn(usize, usize) -> Option<usize> as usize;
    let base = (code - code / 8) & !(HUGE - 1);
    let most = code / 16;
    if cfg!(faultless_sim) || len.saturating_add(skip).saturating_add(HUGE) > most {
        return None;
    }
    let align = if len < HUGE { PAGE } else { HUGE };
    let mut next = NEXT.load(Ordering::Relaxed);
    loop {
        let start = (next.max(base) + skip).next_multiple_of(align);
        let fits = start + len <= base + most;
        let start = if fits {
            start
        } else {
            base + skip.next_multiple_of(align)
        };
        // A page between: what runs over the end of one range is in no other.
        let end = (start + len).next_multiple_of(PAGE) + PAGE;
        match NEXT.compare_exchange_weak(next, end, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return Some(start),
            Err(other) => next = other,
        }
    }
}

/// Private anonymous memory, readable and writable, not counted towards commit limits where the kernel allows it.
pub fn map_anonymous(len: usize) -> Result<usize, Errno> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    map_aside(len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
}

/// Private anonymous memory with no access and none of it present, whatever `mlockall(2)` the program has called: a
/// range that the kernel had filled with zero pages in advance would never fault.
///
/// Give it its access with [`protect`].
pub fn map_reserved(len: usize) -> Result<usize, Errno> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let start = map_aside(len, libc::PROT_NONE, flags, -1, 0)?;
    if let Err(e) = unlock(start, len) {
        // SAFETY: mapped above, shown to nobody.
        let _ = unsafe { unmap(start, len) };
        return Err(e);
    }
    Ok(start)
}

/// `munlock(2)`: changes no contents.
pub fn unlock(start: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: passes integers only.
    check(unsafe { syscall(libc::SYS_munlock, [start, len, 0, 0, 0, 0]) }).map(drop)
}

/// Takes the pages of a range away, locked ones included. Returns whether they are gone.
///
/// # Safety
///
/// The range must be one whose contents may go.
pub unsafe fn discard(addr: usize, len: usize) -> bool {
    /// `MADV_DONTNEED_LOCKED` (5.18): for ranges that the program has locked into memory with mlock.
    const MADV_DONTNEED_LOCKED: i32 = 24;
    // SAFETY: the caller's promise, for both.
    unsafe {
        madvise(addr, len, libc::MADV_DONTNEED).is_ok()
            || madvise(addr, len, MADV_DONTNEED_LOCKED).is_ok()
    }
}

/// A mapping of the process, as the kernel describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapped {
    /// Where the mapping begins.
    pub start: usize,
    /// Where it ends.
    pub end: usize,
    /// Whether the process may write to it now.
    pub writable: bool,
    /// Whether writes are shared with the file.
    pub shared: bool,
    /// The byte of the file that lies at `start`.
    pub offset: u64,
    /// The file's inode on its device; 0 for memory.
    pub inode: u64,
    /// The device, as its major and minor number.
    pub device: (u32, u32),
}

/// Asks which mapping lies at an address (`PROCMAP_QUERY` on `/proc/PID/maps`, 6.11).
///
/// # Errors
///
/// `ENOENT` if nothing is mapped there; `ENOTTY` where the kernel does not know the question.
pub fn mapped_at(maps: i32, addr: usize) -> Result<Mapped, Errno> {
    /// `_IOWR('f', 17, struct procmap_query)`
    const PROCMAP_QUERY: usize = 0xC068_6611;
    const WRITABLE: u64 = 2;
    const SHARED: u64 = 8;
    // size, what is asked for, the address; start, end, flags, page size, offset, inode, device, lengths, pointers
    let mut query = [0u64; 13];
    (query[0], query[2]) = (104, addr as u64);
    // SAFETY: the structure has the kernel's layout; it asks for no names, so no pointer in it is followed.
    check(unsafe {
        syscall(
            libc::SYS_ioctl,
            [
                maps as usize,
                PROCMAP_QUERY,
                query.as_mut_ptr() as usize,
                0,
                0,
                0,
            ],
        )
    })?;
    Ok(Mapped {
        start: query[3] as usize,
        end: query[4] as usize,
        writable: query[5] & WRITABLE != 0,
        shared: query[5] & SHARED != 0,
        offset: query[7],
        inode: query[8],
        device: (query[9] as u32, (query[9] >> 32) as u32),
    })
}

/// Puts a guard marker into each page table entry of a range (`MADV_GUARD_INSTALL`, 6.13; in mappings of files, 6.15): a touch raises
/// SIGSEGV until the marker is removed. The call unmaps the pages that are mapped in the range now.
///
/// # Errors
///
/// `EINVAL` where the kernel does not know markers, or for a locked or special mapping; `ENOMEM` if not all of the range is mapped.
///
/// # Safety
///
/// The range must be the caller's. Pages of a private mapping that were written to lose what was written.
pub unsafe fn install_guards(addr: usize, len: usize) -> Result<(), Errno> {
    const MADV_GUARD_INSTALL: i32 = 102;
    // SAFETY: the caller's promise.
    unsafe { madvise(addr, len, MADV_GUARD_INSTALL) }
}

/// Removes the guard markers of a range, if it has some (`MADV_GUARD_REMOVE`, 6.13). Nothing else is changed.
///
/// # Errors
///
/// `ENOMEM` if not all of the range is mapped: what is mapped has no markers any more.
pub fn remove_guards(addr: usize, len: usize) -> Result<(), Errno> {
    const MADV_GUARD_REMOVE: i32 = 103;
    // SAFETY: a page without a marker is what the mapping says that it is; no contents are changed.
    unsafe { madvise(addr, len, MADV_GUARD_REMOVE) }
}

/// `munmap(2)`.
///
/// # Safety
///
/// The range must be the caller's, and nobody may use it afterwards.
pub unsafe fn unmap(addr: usize, len: usize) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    check(unsafe { gated(libc::SYS_munmap, [addr, len, 0, 0, 0, 0]) }).map(drop)
}

/// Moves the pages of a private anonymous range to `to`, whose former mapping goes, and leaves the range itself mapped and empty
/// (`mremap(2)`, `MREMAP_DONTUNMAP`, 5.7).
///
/// # Safety
///
/// Both ranges must be the caller's.
pub unsafe fn move_pages_away(addr: usize, len: usize, to: usize) -> Result<(), Errno> {
    /// Leaves the old range mapped.
    const DONTUNMAP: i32 = 4;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | DONTUNMAP;
    // SAFETY: the caller's promise.
    check(unsafe { gated(libc::SYS_mremap, [addr, len, len, flags as usize, to, 0]) }).map(drop)
}

/// Whether anything is mapped at an address (`mincore(2)`).
pub fn mapped(addr: usize) -> bool {
    let mut seen = 0u8;
    let at = &raw mut seen as usize;
    // SAFETY: the call asks about one page and writes one byte.
    let answer = unsafe { gated(libc::SYS_mincore, [addr & !(PAGE - 1), PAGE, at, 0, 0, 0]) };
    check(answer) != Err(Errno(libc::ENOMEM))
}

/// Which pages of a page-aligned range are in memory (`mincore(2)`): bit 0 of a byte for each.
pub fn in_memory(addr: usize, pages: &mut [u8]) -> Result<(), Errno> {
    let at = pages.as_mut_ptr() as usize;
    // SAFETY: the call writes one byte for each page.
    check(unsafe { gated(libc::SYS_mincore, [addr, pages.len() * PAGE, at, 0, 0, 0]) }).map(drop)
}

/// `mprotect(2)`.
///
/// # Safety
///
/// The range must be the caller's, and no live reference may need the access that is taken away.
pub unsafe fn protect(addr: usize, len: usize, prot: i32) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    check(unsafe { gated(libc::SYS_mprotect, [addr, len, prot as usize, 0, 0, 0]) }).map(drop)
}

/// `madvise(2)`.
///
/// # Safety
///
/// Some advice discards contents (`MADV_DONTNEED`, `MADV_FREE`): the range must be one whose contents may go.
pub unsafe fn madvise(addr: usize, len: usize, advice: i32) -> Result<(), Errno> {
    // SAFETY: the caller's promise.
    check(unsafe { gated(libc::SYS_madvise, [addr, len, advice as usize, 0, 0, 0]) }).map(drop)
}

/// A range of memory, laid out as the kernel's `struct iovec`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoVec {
    /// First byte.
    pub addr: usize,
    /// Length in bytes.
    pub len: usize,
}

const _: () = assert!(size_of::<IoVec>() == size_of::<libc::iovec>());

/// Gives the same advice on up to [`BATCH_MAX`] ranges of the process behind `pidfd` in one call
/// (`process_madvise(2)`), which takes `mmap_lock` once. Returns how many bytes were advised, which is less than all
/// where a range failed.
///
/// # Safety
///
/// As [`madvise`], for each range, in the process that `pidfd` names.
pub unsafe fn madvise_batch(pidfd: i32, ranges: &[IoVec], advice: i32) -> Result<usize, Errno> {
    // SAFETY: `ranges` is readable for its length and has iovec's layout; the effect is the caller's promise.
    check(unsafe {
        syscall(
            libc::SYS_process_madvise,
            [
                pidfd as usize,
                ranges.as_ptr() as usize,
                ranges.len(),
                advice as usize,
                0,
                0,
            ],
        )
    })
}

/// A descriptor that names process `pid` (`pidfd_open(2)`), or thread `pid` with [`PIDFD_THREAD`].
pub fn pidfd_open(pid: u32, flags: u32) -> Result<i32, Errno> {
    // SAFETY: no pointers.
    check(unsafe {
        syscall(
            libc::SYS_pidfd_open,
            [pid as usize, flags as usize, 0, 0, 0, 0],
        )
    })
    .map(|fd| fd as i32)
}

/// Flag of [`pidfd_open`]: the number names one thread (6.9).
pub const PIDFD_THREAD: u32 = libc::O_EXCL as u32;
