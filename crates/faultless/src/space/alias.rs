//! The kernel's own mapping of what a stand-in maps, at another address.
//!
//! The kernel cannot be interrupted by SIGBUS in the middle of a system call: an absent page is `EFAULT` to it. Where a call
//! reads more than can be pinned, or has to do all of its work in one piece (a record appended to a log, a datagram), it is
//! given this address instead. The bytes are the same, the kernel reads what is absent into the page cache, and every promise
//! of the call holds. The mapping is made when it is first needed and costs address space alone.

#![allow(
    unsafe_code,
    reason = "maps files, and unmaps them when the last user is gone"
)]

use crate::base::primitive::{AtomicPtr, AtomicUsize, Ordering};
use faultless_sys::mem;

/// Where the mapping lies, and how many calls use it.
#[derive(Debug)]
pub(crate) struct Alias {
    pub(crate) start: usize,
    pub(crate) len: usize,
    /// Calls that use it; with [`ORPHAN`], once the stand-in is gone.
    pub(crate) users: AtomicUsize,
}

pub(crate) const ORPHAN: usize = 1 << (usize::BITS - 1);

/// # Safety
///
/// Nobody uses it any more.
pub(crate) unsafe fn free(alias: *mut Alias) {
    // SAFETY: made in `make`, in a page of its own, and freed once, by the caller's promise; the mapping is our own, which nobody
    // reads any more.
    unsafe {
        let (start, len) = ((*alias).start, (*alias).len);
        let _ = mem::unmap(start, len);
        let _ = mem::unmap(alias as usize, mem::PAGE);
    }
}

/// Gives the mapping up with the map that it belongs to; the last call that uses it unmaps it.
pub(crate) fn give_up(alias: &AtomicPtr<Alias>) {
    let alias = alias.swap(std::ptr::null_mut(), Ordering::AcqRel);
    // SAFETY: null, or made in `make` and not freed before it is an orphan without users.
    if let Some(a) = unsafe { alias.as_ref() }
        && a.users.fetch_or(ORPHAN, Ordering::AcqRel) == 0
    {
        // SAFETY: no call uses it, and none can find it any more.
        unsafe { free(alias) };
    }
}
