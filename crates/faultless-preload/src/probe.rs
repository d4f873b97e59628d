//! Memory of the program's that may not be there.
//!
//! A pointer that cannot be read is `EFAULT` to the kernel, and programs count on that: stack walkers, crash reporters and
//! allocators ask whether an address can be read by a system call that fails. A function that stands before such a call must
//! not follow the pointer before the kernel has. So whatever a function of ours reads or writes through a pointer of the
//! program's, it asks here first; where the answer is no, the call goes to the kernel as it is.

#![allow(unsafe_code, reason = "reads memory that was found to be there")]

use crate::mappings::reaches;
use crate::{lend, state};
use faultless::standin;
use faultless_sys::mem::PAGE;
use faultless_sys::raw;

/// A value of `how` that `rt_sigprocmask(2)` refuses, after it has looked at its arguments.
const NO_SUCH_HOW: usize = usize::MAX;

/// Whether the kernel can read the eight bytes around an address.
///
/// `rt_sigprocmask` copies a set of eight bytes in before it refuses `how`: `EINVAL` says that they can be read. No filter
/// forbids this call, and it has no effect.
fn kernel_reads(at: usize) -> bool {
    // SAFETY: an argument that is refused; the kernel checks the pointer.
    let answer =
        unsafe { raw::syscall(libc::SYS_rt_sigprocmask, [NO_SUCH_HOW, at & !7, 0, 8, 0, 0]) };
    answer == -(libc::EINVAL as isize)
}

/// Whether a page can be read by this thread.
fn page_is_there(page: usize) -> bool {
    let range = page..page + PAGE;
    if !reaches(&range) {
        return kernel_reads(page);
    }
    if !standin::touches(&range) {
        // A live mapping's: the kernel can read it without its markers.
        let _opened = lend::opened(&range);
        return kernel_reads(page);
    }
    // Pages of a stand-in are read in; a child of vfork may not claim them, but its loads are served like any other.
    state::foreign() || standin::read_range(range) == Some(true)
}

/// Whether `len` bytes can be read.
pub(crate) fn readable(at: usize, len: usize) -> bool {
    let Some(end) = at.checked_add(len) else {
        return false;
    };
    (at & !(PAGE - 1)..end).step_by(PAGE).all(page_is_there)
}

/// A copy of what a pointer points to, if it can be read.
pub(crate) fn copy<T: Copy>(at: *const T) -> Option<T> {
    // SAFETY: it was found to be there. `T` is a structure of the kernel's interface, valid for any bytes.
    readable(at as usize, size_of::<T>()).then(|| unsafe { at.read_unaligned() })
}

/// Whether the kernel can write the eight bytes from an address on. They change: the caller is about to write them.
pub(crate) fn writable(at: usize) -> bool {
    // SAFETY: changes no mask; the kernel checks the pointer.
    unsafe { raw::syscall(libc::SYS_rt_sigprocmask, [0, 0, at, 8, 0, 0]) == 0 }
}

/// Whether a string begins with some bytes. `false` where it cannot be read.
pub(crate) fn begins(string: usize, with: &[u8]) -> bool {
    let mut there = 0;
    with.iter().enumerate().all(|(i, &expected)| {
        let at = string.wrapping_add(i);
        if i == 0 || at.is_multiple_of(PAGE) || there == 0 {
            there = usize::from(page_is_there(at & !(PAGE - 1)));
        }
        // SAFETY: its page was found to be there.
        there == 1 && unsafe { (at as *const u8).read() } == expected
    })
}
