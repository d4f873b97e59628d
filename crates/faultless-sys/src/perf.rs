//! Counters on kernel tracepoints (`perf_event_open(2)`): how often a thread, or a whole process, passed one.

#![allow(unsafe_code, reason = "perf_event_open takes a structure by address")]

use crate::raw::{Errno, check, syscall};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

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

    /// Passes counted so far.
    pub fn read(&self) -> Result<u64, Errno> {
        let mut value = [0u8; 8];
        match crate::file::read(self.0.as_raw_fd(), &mut value)? {
            8 => Ok(u64::from_ne_bytes(value)),
            _ => Err(Errno(libc::EIO)),
        }
    }
}
