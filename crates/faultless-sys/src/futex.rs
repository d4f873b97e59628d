//! Waiting on a 32-bit word, and waking those who wait (`futex(2)`).

#![allow(unsafe_code, reason = "passes the addresses of atomics to the kernel")]

use crate::raw::{Errno, check, syscall};
use core::sync::atomic::AtomicU32;

/// What ended a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Woken {
    /// A wake, a signal, or a word that already differed: look at the word again.
    Look,
    /// The time given was up.
    TimedOut,
}

/// Sleeps while `*word == expected`, for `timeout_ns` at most. May return early at any time.
#[inline]
pub fn wait(word: &AtomicU32, expected: u32, timeout_ns: u64) -> Woken {
    // SAFETY: a reference to a live, aligned 32-bit atomic is valid for the kernel to read.
    unsafe { wait_at(word.as_ptr(), expected, timeout_ns) }
}

/// As [`wait`], by address: for the half of a wider atomic.
///
/// # Safety
///
/// `word` must be aligned and stay mapped for the whole wait.
#[inline]
pub unsafe fn wait_at(word: *const u32, expected: u32, timeout_ns: u64) -> Woken {
    let t = libc::timespec {
        tv_sec: (timeout_ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (timeout_ns % 1_000_000_000) as libc::c_long,
    };
    let op = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the word is valid by the caller's promise; the timespec lives on this frame.
    let ret = unsafe {
        syscall(
            libc::SYS_futex,
            [
                word as usize,
                op as usize,
                expected as usize,
                &raw const t as usize,
                0,
                0,
            ],
        )
    };
    match check(ret) {
        Err(Errno(libc::ETIMEDOUT)) => Woken::TimedOut,
        _ => Woken::Look,
    }
}

/// Wakes up to `n` threads that wait on `word`.
#[inline]
pub fn wake(word: &AtomicU32, n: u32) {
    wake_at(word.as_ptr(), n);
}

/// As [`wake`], by address. Nothing is read or written there: a private futex is named by its address alone.
#[inline]
pub fn wake_at(word: *const u32, n: u32) {
    let op = libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: FUTEX_WAKE does not access the memory of a private futex; a stale address wakes nobody, or wakes a
    // waiter early, which every wait allows for.
    unsafe {
        syscall(
            libc::SYS_futex,
            [word as usize, op as usize, n as usize, 0, 0, 0],
        )
    };
}

/// "All of them", for [`wake`].
pub const ALL: u32 = i32::MAX as u32;
