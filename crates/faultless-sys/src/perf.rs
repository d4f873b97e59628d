//! Counters on kernel tracepoints (`perf_event_open(2)`): how often a thread, or a whole process, passed one.

#![allow(unsafe_code, reason = "perf_event_open takes a structure by address")]

use crate::raw::{Errno, check, syscall};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The first published version of `struct perf_event_attr`, which is all that is needed here.
#[repr(C)]
struct Attr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    bp_type: u32,
    config1: u64,
}

const _: () = assert!(size_of::<Attr>() == 64);

const PERF_TYPE_TRACEPOINT: u32 = 2;
/// Bit of `flags`: children inherit the counter, and their counts are added to it.
const INHERIT: u64 = 1 << 1;
/// Bit of `flags`: only threads inherit it, not child processes (5.13).
const INHERIT_THREAD: u64 = 1 << 35;

/// A running counter. It is closed when dropped.
#[derive(Debug)]
pub struct Counter(OwnedFd);

/// Whom a counter counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The calling thread.
    Thread,
    /// The calling thread and every thread that it, or one of those, starts from now on.
    ThreadAndDescendants,
}

impl Counter {
    /// Starts to count passes of tracepoint `id` (the number in its `id` file under tracefs).
    ///
    /// Errors: `EACCES` or `EPERM` without privilege (see `perf_event_paranoid`), `ENOENT` where the kernel lacks it.
    pub fn tracepoint(id: u64, scope: Scope) -> Result<Counter, Errno> {
        let flags = match scope {
            Scope::Thread => 0,
            Scope::ThreadAndDescendants => INHERIT | INHERIT_THREAD,
        };
        let attr = Attr {
            kind: PERF_TYPE_TRACEPOINT,
            size: size_of::<Attr>() as u32,
            config: id,
            sample_period: 0,
            sample_type: 0,
            read_format: 0,
            flags,
            wakeup: 0,
            bp_type: 0,
            config1: 0,
        };
        const FLAG_FD_CLOEXEC: usize = 8;
        // SAFETY: `attr` says its own size; pid 0 and cpu -1 mean this thread on every processor.
        let fd = check(unsafe {
            syscall(
                libc::SYS_perf_event_open,
                [
                    &raw const attr as usize,
                    0,
                    usize::MAX,
                    usize::MAX,
                    FLAG_FD_CLOEXEC,
                    0,
                ],
            )
        })?;
        // SAFETY: the kernel made this descriptor for us just now.
        Ok(Counter(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// Counts only passes that meet a condition on the tracepoint's fields, such as `ret == -14`.
    ///
    /// Errors: `EINVAL` for a condition that is none.
    pub fn filter(&self, condition: &core::ffi::CStr) -> Result<(), Errno> {
        /// `PERF_EVENT_IOC_SET_FILTER`: `_IOW('$', 6, char *)`.
        const SET_FILTER: usize = 0x4008_2406;
        let fd = self.0.as_raw_fd() as usize;
        // SAFETY: a NUL-terminated string.
        check(unsafe {
            syscall(
                libc::SYS_ioctl,
                [fd, SET_FILTER, condition.as_ptr() as usize, 0, 0, 0],
            )
        })
        .map(drop)
    }

    /// Its descriptor.
    pub fn number(&self) -> i32 {
        self.0.as_raw_fd()
    }

    /// Whether its descriptor still is a counter, and not something that was put in its place.
    pub fn is_there(&self) -> bool {
        /// `PERF_EVENT_IOC_ID`: `_IOR('$', 7, __u64 *)`.
        const ID: usize = 0x8008_2407;
        let mut id = 0u64;
        let fd = self.0.as_raw_fd() as usize;
        // SAFETY: writes the word, if it is a counter.
        check(unsafe { syscall(libc::SYS_ioctl, [fd, ID, &raw mut id as usize, 0, 0, 0]) }).is_ok()
    }

    /// Moves its descriptor to the lowest free number from `floor` on, where that is possible.
    pub fn lift(&mut self, floor: i32) {
        if let Ok(high) = crate::fdtable::duplicate_above(self.0.as_raw_fd(), floor) {
            // SAFETY: the kernel made this descriptor for us just now.
            self.0 = unsafe { OwnedFd::from_raw_fd(high) };
        }
    }

    /// Passes counted so far.
    pub fn read(&self) -> Result<u64, Errno> {
        let mut value = [0u8; 8];
        match crate::file::read(self.0.as_raw_fd(), &mut value)? {
            8 => Ok(u64::from_ne_bytes(value)),
            _ => Err(Errno(libc::EIO)),
        }
    }
}

/// The numbers of tracepoints such as `syscalls/sys_exit_write`, from tracefs. Where that is not mounted, root can mount it
/// aside, read the numbers, and leave no trace.
pub fn tracepoint_ids(names: &[&str]) -> std::io::Result<Vec<u64>> {
    for root in ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"] {
        if let Ok(ids) = read_ids(Path::new(root), names) {
            return Ok(ids);
        }
    }
    let template = std::env::temp_dir().join("faultless-tracefs-XXXXXX");
    let mut template =
        std::ffi::CString::new(template.as_os_str().as_encoded_bytes())?.into_bytes_with_nul();
    // (With a name that nobody can guess, for this user alone.)
    // SAFETY: a NUL-terminated template of our own, which it fills in.
    if unsafe { libc::mkdtemp(template.as_mut_ptr().cast()) }.is_null() {
        return Err(std::io::Error::last_os_error());
    }
    let target = std::ffi::CString::from_vec_with_nul(template).map_err(std::io::Error::other)?;
    let dir = Path::new(std::ffi::OsStr::from_bytes(target.as_bytes())).to_owned();
    // SAFETY: NUL-terminated strings; the directory is ours and empty.
    let mounted = unsafe {
        libc::mount(
            c"tracefs".as_ptr(),
            target.as_ptr(),
            c"tracefs".as_ptr(),
            0,
            std::ptr::null(),
        )
    } == 0;
    let found = if mounted {
        read_ids(&dir, names)
    } else {
        Err(std::io::Error::last_os_error())
    };
    if mounted {
        // SAFETY: mounted above.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH | libc::UMOUNT_NOFOLLOW) };
    }
    let _ = std::fs::remove_dir(&dir);
    found
}

fn read_ids(root: &Path, names: &[&str]) -> std::io::Result<Vec<u64>> {
    let read = |name: &&str| {
        let text = std::fs::read_to_string(root.join("events").join(name).join("id"))?;
        text.trim().parse().map_err(std::io::Error::other)
    };
    names.iter().map(read).collect()
}
