//! Files: positional reads, identity, leases, what direct I/O wants.

#![allow(unsafe_code, reason = "passes buffers to the kernel by address")]

use crate::raw::{Errno, check, syscall};

/// `pread(2)` into memory given by address.
///
/// # Safety
///
/// `buf` must be writable for `len` bytes, and nobody else may use it during the call.
#[inline]
pub unsafe fn pread(fd: i32, buf: usize, len: usize, offset: u64) -> Result<usize, Errno> {
    // SAFETY: the caller's promise.
    check(unsafe {
        syscall(
            libc::SYS_pread64,
            [fd as usize, buf, len, offset as usize, 0, 0],
        )
    })
}

/// Writes ranges of this process's own memory, one after the other, from `offset` on (`pwritev(2)`). Returns how many
/// bytes were written: fewer than all where a range could not be read. Memory that is absent is not touched by this
/// thread: the kernel answers EFAULT.
///
/// # Safety
///
/// The ranges must be memory that may be copied at this time; what it holds is the caller's affair.
pub unsafe fn pwritev(fd: i32, ranges: &[crate::mem::IoVec], offset: u64) -> Result<usize, Errno> {
    // SAFETY: `ranges` is readable for its length and has iovec's layout; the kernel checks what they point to.
    check(unsafe {
        crate::raw::gated(
            libc::SYS_pwritev,
            [
                fd as usize,
                ranges.as_ptr() as usize,
                ranges.len(),
                offset as usize,
                0,
                0,
            ],
        )
    })
}

/// A file in memory of `len` bytes, sparse (`memfd_create(2)`).
pub fn memory_file(name: &core::ffi::CStr, len: u64) -> Result<i32, Errno> {
    // SAFETY: a NUL-terminated name.
    let fd = check(unsafe {
        syscall(
            libc::SYS_memfd_create,
            [
                name.as_ptr() as usize,
                libc::MFD_CLOEXEC as usize,
                0,
                0,
                0,
                0,
            ],
        )
    })? as i32;
    set_len(fd, len).inspect_err(|_| {
        // SAFETY: made above, and known to nobody.
        unsafe { close(fd) };
    })?;
    Ok(fd)
}

/// Takes the memory of a part of a file away (`fallocate(2)`, `FALLOC_FL_PUNCH_HOLE`): it reads as zeros.
pub fn punch_hole(fd: i32, offset: u64, len: u64) -> Result<(), Errno> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: no pointers.
    check(unsafe {
        syscall(
            libc::SYS_fallocate,
            [
                fd as usize,
                mode as usize,
                offset as usize,
                len as usize,
                0,
                0,
            ],
        )
    })
    .map(drop)
}

/// Sets the length of a file (`ftruncate(2)`).
pub fn set_len(fd: i32, len: u64) -> Result<(), Errno> {
    // SAFETY: no pointers.
    check(unsafe { syscall(libc::SYS_ftruncate, [fd as usize, len as usize, 0, 0, 0, 0]) })
        .map(drop)
}

/// How many descriptors a process may have: a soft limit, and how far that can be raised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Limit {
    /// In force.
    pub soft: u64,
    /// The most that the soft limit can be.
    pub hard: u64,
}

/// The limit on this process's descriptors (`prlimit(2)`, `RLIMIT_NOFILE`), and a new one in its place if that is given.
pub fn descriptor_limit(new: Option<Limit>) -> Result<Limit, Errno> {
    let mut old = Limit { soft: 0, hard: 0 };
    let new = new.as_ref().map_or(0, |l| &raw const *l as usize);
    let old_at = &raw mut old as usize;
    // SAFETY: two structures of the kernel's layout, the second writable.
    check(unsafe {
        syscall(
            libc::SYS_prlimit64,
            [0, libc::RLIMIT_NOFILE as usize, new, old_at, 0, 0],
        )
    })?;
    Ok(old)
}

/// What makes two descriptors the same file: device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
}

/// What `fstat(2)` says of a file.
#[derive(Debug, Clone, Copy)]
pub struct Status {
    /// Which file it is.
    pub id: FileId,
    /// Length in bytes.
    pub len: u64,
    /// Type and permission bits.
    pub mode: u32,
    /// The user that it belongs to.
    pub uid: u32,
}

/// What the kernel remembers of a file, without asking a file server (`statx(2)` with `AT_STATX_DONT_SYNC`). `mask`: `STATX_…`.
///
/// The handler calls this on stacks of 8 KiB, so the structure is not passed by value: each copy takes 256 bytes where nothing is optimized.
fn remembered(
    fd: i32,
    mask: u32,
    st: &mut core::mem::MaybeUninit<libc::statx>,
) -> Result<&libc::statx, Errno> {
    // (Zeros, for a filter of system calls may say that this one succeeded.)
    // SAFETY: all of the structure, in place.
    unsafe { st.as_mut_ptr().write_bytes(0, 1) };
    // SAFETY: the path is an empty NUL-terminated string; `st` is writable and has the kernel's layout.
    check(unsafe {
        syscall(
            libc::SYS_statx,
            [
                fd as usize,
                c"".as_ptr() as usize,
                (libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC) as usize,
                mask as usize,
                st.as_mut_ptr() as usize,
                0,
            ],
        )
    })?;
    // SAFETY: zeroed, and then written by the kernel; any bytes are valid.
    Ok(unsafe { st.assume_init_ref() })
}

/// Which file a descriptor is, as the kernel remembers it: asks no file server, as `fstat(2)` may.
pub fn cached_id(fd: i32) -> Result<FileId, Errno> {
    let mut st = core::mem::MaybeUninit::uninit();
    match remembered(fd, libc::STATX_INO, &mut st) {
        // Before Linux 4.11, or behind a filter.
        Err(Errno(libc::ENOSYS | libc::EPERM)) => status(fd).map(|st| st.id),
        Err(e) => Err(e),
        Ok(st) => Ok(FileId {
            dev: libc::makedev(st.stx_dev_major, st.stx_dev_minor),
            ino: st.stx_ino,
        }),
    }
}

/// `fstat(2)`.
#[inline]
pub fn status(fd: i32) -> Result<Status, Errno> {
    let mut st = core::mem::MaybeUninit::uninit();
    let st = stat(fd, &mut st)?;
    Ok(Status {
        id: FileId {
            dev: st.st_dev,
            ino: st.st_ino,
        },
        len: st.st_size as u64,
        mode: st.st_mode,
        uid: st.st_uid,
    })
}

/// Not by value, as [`remembered`].
fn stat(fd: i32, st: &mut core::mem::MaybeUninit<libc::stat>) -> Result<&libc::stat, Errno> {
    // SAFETY: `st` is writable and has the kernel's layout on 64-bit targets.
    check(unsafe {
        syscall(
            libc::SYS_fstat,
            [fd as usize, st.as_mut_ptr() as usize, 0, 0, 0, 0],
        )
    })?;
    // SAFETY: the call succeeded, so the kernel wrote all of it.
    Ok(unsafe { st.assume_init_ref() })
}

/// Whether a file has a name. Otherwise it goes when it is closed.
pub fn is_named(fd: i32) -> Result<bool, Errno> {
    let mut st = core::mem::MaybeUninit::uninit();
    stat(fd, &mut st).map(|st| st.st_nlink != 0)
}

/// What has been written of a part of a file (`FS_IOC_FIEMAP`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Bytes that have been written: what was only reserved (`fallocate`), and holes, have not.
    pub bytes: u64,
    /// Bytes that were looked at, from the start of the part on: not all, if it lies in many pieces.
    pub of: u64,
}

/// What has been written of `len` bytes of a file, from `start` on.
pub fn written(fd: i32, start: u64, len: u64) -> Result<Written, Errno> {
    const FS_IOC_FIEMAP: usize = 0xC020_660B;
    const LAST: u64 = 1;
    const UNWRITTEN: u64 = 0x800;
    /// Pieces that are looked at.
    const MOST: usize = 64;
    // struct fiemap: start, length, flags and the number of pieces, room for so many; and the pieces, of seven words each: where it begins in
    // the file, on the device, its length, two words of nothing, flags, nothing.
    const HEAD: usize = 4;
    const PIECE: usize = 7;
    let mut words = [0u64; HEAD + MOST * PIECE];
    words[0] = start;
    words[1] = len;
    words[3] = MOST as u64;
    let args = [
        fd as usize,
        FS_IOC_FIEMAP,
        words.as_mut_ptr() as usize,
        0,
        0,
        0,
    ];
    // SAFETY: the structure is writable, and has room for the pieces that it asks for.
    check(unsafe { syscall(libc::SYS_ioctl, args) })?;
    let found = ((words[2] >> 32) as usize).min(MOST);
    let pieces = words[HEAD..].chunks_exact(PIECE).take(found);
    let end = start.saturating_add(len);
    let within = |at: u64| at.clamp(start, end) - start;
    let (mut bytes, mut of) = (0, if found < MOST { len } else { 0 });
    for piece in pieces {
        let (from, to) = (piece[0], piece[0].saturating_add(piece[2]));
        let flags = piece[5] & 0xFFFF_FFFF;
        if flags & UNWRITTEN == 0 {
            bytes += within(to) - within(from);
        }
        of = if flags & LAST != 0 {
            len
        } else {
            of.max(within(to))
        };
    }
    Ok(Written { bytes, of })
}

/// The type of file system that a file lies on (`statfs.f_type`).
pub fn fs_magic(fd: i32) -> Result<u64, Errno> {
    let mut st = core::mem::MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: `st` is writable and has the kernel's layout on 64-bit targets.
    check(unsafe {
        syscall(
            libc::SYS_fstatfs,
            [fd as usize, st.as_mut_ptr() as usize, 0, 0, 0, 0],
        )
    })?;
    // SAFETY: the call succeeded, so the kernel wrote all of it.
    Ok(unsafe { st.assume_init() }.f_type as u64)
}

fn fcntl(fd: i32, cmd: i32, arg: usize) -> Result<usize, Errno> {
    // SAFETY: only commands with integer arguments, or with a pointer to a live local, are passed by this module.
    check(unsafe { syscall(libc::SYS_fcntl, [fd as usize, cmd as usize, arg, 0, 0, 0]) })
}

/// Takes a read lease (`F_SETLEASE`, `F_RDLCK`): granted while nobody has the file open for writing; from then on it
/// holds back who opens it for writing, until it is given up.
pub fn take_read_lease(fd: i32) -> Result<(), Errno> {
    fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK as usize).map(drop)
}

/// Gives a lease up.
pub fn give_up_lease(fd: i32) -> Result<(), Errno> {
    fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK as usize).map(drop)
}

/// Whether this descriptor holds a read lease that nobody is waiting to see broken (`F_GETLEASE`).
#[inline]
pub fn holds_read_lease(fd: i32) -> bool {
    fcntl(fd, libc::F_GETLEASE, 0) == Ok(libc::F_RDLCK as usize)
}

/// `fcntl(2)` with one of the commands about record locks.
///
/// # Safety
///
/// `cmd` must be one of those: it reads and writes the structure and nothing else.
pub unsafe fn lock_command(fd: i32, cmd: i32, lock: &mut libc::flock) -> Result<(), Errno> {
    fcntl(fd, cmd, lock as *mut libc::flock as usize).map(drop)
}

/// The flags that a file was opened with (`F_GETFL`).
pub fn open_flags(fd: i32) -> Result<i32, Errno> {
    fcntl(fd, libc::F_GETFL, 0).map(|flags| flags as i32)
}

/// How many pages of a part of a file the page cache holds, and held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheState {
    /// Pages that it holds, including pages that are being read.
    pub cached: u64,
    /// Pages that it no longer holds and still remembers.
    pub evicted: u64,
}

/// Asks how many pages of a part of a file the page cache holds, and held (`cachestat(2)`, 6.5).
pub fn cache_state(fd: i32, offset: u64, len: u64) -> Result<CacheState, Errno> {
    const SYS_CACHESTAT: libc::c_long = 451;
    let range = [offset, len];
    // struct cachestat: cached, dirty, under write-back, evicted, recently evicted.
    let mut stat = [0u64; 5];
    // SAFETY: both structures have the kernel's layout.
    check(unsafe {
        syscall(
            SYS_CACHESTAT,
            [
                fd as usize,
                range.as_ptr() as usize,
                stat.as_mut_ptr() as usize,
                0,
                0,
                0,
            ],
        )
    })?;
    Ok(CacheState {
        cached: stat[0],
        evicted: stat[3],
    })
}

/// How many pages of a part of a file the page cache holds (`cachestat(2)`, 6.5).
pub fn cached_pages(fd: i32, offset: u64, len: u64) -> Result<u64, Errno> {
    cache_state(fd, offset, len).map(|state| state.cached)
}

/// Whether loads from a mapping of a file reach its storage directly, so that there is no page cache between (`STATX_ATTR_DAX`).
pub fn is_dax(fd: i32) -> bool {
    const STATX_ATTR_DAX: u64 = 0x20_0000;
    let mut st = core::mem::MaybeUninit::uninit();
    remembered(fd, 0, &mut st).is_ok_and(|st| st.stx_attributes & STATX_ATTR_DAX != 0)
}

/// Gives advice about a part of a file, or of an open file (`posix_fadvise(2)`, `POSIX_FADV_…`).
pub fn advise(fd: i32, offset: u64, len: u64, advice: i32) -> Result<(), Errno> {
    // SAFETY: no pointers.
    check(unsafe {
        syscall(
            libc::SYS_fadvise64,
            [
                fd as usize,
                offset as usize,
                len as usize,
                advice as usize,
                0,
                0,
            ],
        )
    })
    .map(drop)
}

/// Whether this descriptor holds a lease of any kind.
pub fn holds_lease(fd: i32) -> bool {
    fcntl(fd, libc::F_GETLEASE, 0).is_ok_and(|kind| kind != libc::F_UNLCK as usize)
}

/// Switches an open file from direct to buffered reads.
pub fn clear_direct(fd: i32) -> Result<(), Errno> {
    let flags = fcntl(fd, libc::F_GETFL, 0)?;
    fcntl(fd, libc::F_SETFL, flags & !(libc::O_DIRECT as usize)).map(drop)
}

/// Has lease-break signals of this descriptor sent as `signal` to thread `tid` alone.
pub fn direct_signals(fd: i32, tid: u32, signal: i32) -> Result<(), Errno> {
    #[repr(C)]
    struct OwnerEx {
        kind: i32,
        pid: i32,
    }
    const F_SETOWN_EX: i32 = 15;
    const F_OWNER_TID: i32 = 0;
    const F_SETSIG: i32 = 10;
    let owner = OwnerEx {
        kind: F_OWNER_TID,
        pid: tid as i32,
    };
    fcntl(fd, F_SETOWN_EX, &raw const owner as usize)?;
    fcntl(fd, F_SETSIG, signal as usize).map(drop)
}

/// `open(2)` of a NUL-terminated path, relative to the working directory.
pub fn open(path: &core::ffi::CStr, flags: i32) -> Result<i32, Errno> {
    // SAFETY: the path is NUL-terminated and outlives the call.
    check(unsafe {
        syscall(
            libc::SYS_openat,
            [
                libc::AT_FDCWD as usize,
                path.as_ptr() as usize,
                flags as usize,
                0,
                0,
                0,
            ],
        )
    })
    .map(|fd| fd as i32)
}

/// Opens a path for naming the file alone (`O_PATH`), if all of it is known to the kernel already: no file system is asked, and
/// a link at its end is not followed (`openat2(2)`, `RESOLVE_CACHED`, 5.12).
///
/// # Errors
///
/// `EAGAIN` where a file system would have to be asked.
pub fn open_cached(path: &core::ffi::CStr) -> Result<i32, Errno> {
    const RESOLVE_CACHED: u64 = 0x20;
    let flags = (libc::O_PATH | libc::O_CLOEXEC | libc::O_NOFOLLOW) as u64;
    let how = [flags, 0, RESOLVE_CACHED];
    // SAFETY: a NUL-terminated path and a `struct open_how`, which outlive the call.
    check(unsafe {
        syscall(
            libc::SYS_openat2,
            [
                libc::AT_FDCWD as usize,
                path.as_ptr() as usize,
                how.as_ptr() as usize,
                size_of_val(&how),
                0,
                0,
            ],
        )
    })
    .map(|fd| fd as i32)
}

/// Whether some page of a range has all of these categories (`PAGEMAP_SCAN` on `/proc/self/pagemap`, 6.7).
///
/// # Errors
///
/// `EINVAL` or `ENOTTY` where the kernel does not know the question.
pub fn scan_pages(
    pagemap: i32,
    range: &core::ops::Range<usize>,
    categories: u64,
) -> Result<bool, Errno> {
    /// `_IOWR('f', 16, struct pm_scan_arg)`
    const PAGEMAP_SCAN: usize = 0xC060_6610;
    let mut found = [0u64; 3];
    // size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, any of, returned
    let mut arg = [
        96,
        0,
        range.start as u64,
        range.end as u64,
        0,
        found.as_mut_ptr() as u64,
        1,
        1,
        0,
        categories,
        0,
        categories,
    ];
    // SAFETY: both structures have the kernel's layout; the answer is written into `found`.
    let count = check(unsafe {
        syscall(
            libc::SYS_ioctl,
            [
                pagemap as usize,
                PAGEMAP_SCAN,
                arg.as_mut_ptr() as usize,
                0,
                0,
                0,
            ],
        )
    })?;
    Ok(count > 0)
}

/// `read(2)` into a byte slice.
pub fn read(fd: i32, buf: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: the slice is writable for its length.
    check(unsafe {
        syscall(
            libc::SYS_read,
            [fd as usize, buf.as_mut_ptr() as usize, buf.len(), 0, 0, 0],
        )
    })
}

/// `close(2)`.
///
/// # Safety
///
/// The descriptor must be the caller's own: somebody else's may by now name another file.
pub unsafe fn close(fd: i32) {
    // SAFETY: no pointers; ownership is the caller's promise. An error changes nothing: the descriptor is gone.
    unsafe { syscall(libc::SYS_close, [fd as usize, 0, 0, 0, 0, 0]) };
}

/// A path in `/proc` that ends in a descriptor's number, without allocating.
pub fn numbered_path<'a>(dir: &str, fd: i32, buf: &'a mut [u8; 64]) -> &'a core::ffi::CStr {
    buf[..dir.len()].copy_from_slice(dir.as_bytes());
    let mut digits = [0u8; 10];
    let mut n = fd.unsigned_abs();
    let mut count = 0;
    loop {
        digits[count] = b'0' + (n % 10) as u8;
        count += 1;
        n /= 10;
        if n == 0 {
            break;
        }
    }
    for i in 0..count {
        buf[dir.len() + i] = digits[count - 1 - i];
    }
    buf[dir.len() + count] = 0;
    core::ffi::CStr::from_bytes_until_nul(buf).unwrap_or(c"/")
}

const FDINFO: &str = "/proc/thread-self/fdinfo/";

/// Whether this descriptor still has a lease, one that is being broken included. The kernel lists a lease there until
/// it is given up or taken by force, and lets no writer in before. May be called in a signal handler.
///
/// # Errors
///
/// The list cannot be read: the descriptor, or the one through which it is read, is closed.
pub fn lease_still_listed(fd: i32) -> Result<bool, Errno> {
    let mut path = [0u8; 64];
    let path = numbered_path(FDINFO, fd, &mut path);
    let info = open(path, libc::O_RDONLY | libc::O_CLOEXEC)?;
    let mut text = [0u8; 512];
    let mut len = 0;
    let ended = loop {
        match read(info, &mut text[len..]) {
            Ok(0) => break Ok(()),
            Ok(n) => len += n,
            Err(Errno(libc::EINTR)) => {}
            Err(e) => break Err(e),
        }
    };
    // SAFETY: opened above, by this thread, and given to nobody.
    unsafe { close(info) };
    ended.map(|()| text[..len].windows(5).any(|w| w == b"LEASE"))
}

/// What direct I/O demands of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirectIo {
    /// Possible; memory and file offset must be multiples of these, in bytes.
    Aligned {
        /// Of the buffer's address.
        memory: u32,
        /// Of the offset in the file, and the length.
        offset: u32,
    },
    /// Not possible on this file.
    Unsupported,
    /// The kernel (before 6.1) or the file system does not say.
    Unknown,
}

/// Asks `statx(2)` for `STATX_DIOALIGN`.
pub fn direct_io(fd: i32) -> DirectIo {
    const STATX_DIOALIGN: u32 = 0x2000;
    // struct statx: stx_mask at byte 0, stx_dio_mem_align at 0x98, stx_dio_offset_align at 0x9C; 256 bytes in all.
    let mut st = [0u32; 64];
    // SAFETY: the path is an empty NUL-terminated string, the buffer 256 bytes.
    let ret = unsafe {
        syscall(
            libc::SYS_statx,
            [
                fd as usize,
                c"".as_ptr() as usize,
                libc::AT_EMPTY_PATH as usize,
                STATX_DIOALIGN as usize,
                st.as_mut_ptr() as usize,
                0,
            ],
        )
    };
    if check(ret).is_err() || st[0] & STATX_DIOALIGN == 0 {
        return DirectIo::Unknown;
    }
    match (st[0x98 / 4], st[0x9C / 4]) {
        (0, _) | (_, 0) => DirectIo::Unsupported,
        (memory, offset) => DirectIo::Aligned { memory, offset },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_the_same_by_either_call() {
        let file = std::fs::File::open("/proc/self/exe").expect("this program");
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        let id = status(fd).expect("open").id;
        assert_eq!(cached_id(fd), Ok(id));
        assert_eq!(cached_id(-1), Err(Errno(libc::EBADF)));
    }

    #[test]
    fn fdinfo_paths_are_spelled_in_decimal() {
        let mut buf = [0u8; 64];
        assert_eq!(
            numbered_path(FDINFO, 0, &mut buf),
            c"/proc/thread-self/fdinfo/0"
        );
        let mut buf = [0u8; 64];
        assert_eq!(
            numbered_path(FDINFO, 1_048_575, &mut buf),
            c"/proc/thread-self/fdinfo/1048575"
        );
    }

    #[test]
    fn a_file_without_a_lease_lists_none() {
        let file = std::fs::File::open("/proc/self/exe").expect("the test's own binary");
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        assert_eq!(lease_still_listed(fd), Ok(false));
        assert!(!holds_read_lease(fd));
    }
}
