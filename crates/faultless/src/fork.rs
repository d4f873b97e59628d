//! What a forked child finds where its parent had maps.
//!
//! The regions are not inherited (a child that installed a page through the inherited userfaultfd would write into its
//! parent). A hole, however, could be filled by the child's next `mmap`, and a stale slice would read foreign bytes. So
//! each region becomes a mapping of an empty file: every access raises SIGBUS, which the handler explains.
//!
//! The engine's locks are held across the fork, so that the child can drop its maps and build a pool of its own.

#![allow(unsafe_code, reason = "replaces mappings in a forked child")]

use crate::fault::{handler, registry};
use crate::{keeper, plain};
use faultless_sys::mem;
use std::cell::UnsafeCell;
use std::sync::Once;

type Locks = (
    handler::Frozen,
    keeper::Frozen,
    registry::Frozen,
    plain::Frozen,
);

struct Slot(UnsafeCell<Option<Locks>>);
// SAFETY: written and emptied only by the thread that holds the locks in question.
unsafe impl Sync for Slot {}
static SLOT: Slot = Slot(UnsafeCell::new(None));

/// Registers the handlers, once for the life of the program.
pub(crate) fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the three functions are static and do what pthread_atfork allows.
        unsafe { libc::pthread_atfork(Some(before), Some(after), Some(in_child)) };
    });
}

extern "C" fn before() {
    let locks = (
        handler::freeze(),
        keeper::freeze(),
        registry::freeze(),
        plain::freeze(),
    );
    // SAFETY: we hold the locks, so no other thread is here.
    unsafe { *SLOT.0.get() = Some(locks) };
}

extern "C" fn after() {
    // SAFETY: `before` took the locks on this thread, and they are released only as this value is dropped.
    drop(unsafe { (*SLOT.0.get()).take() });
}

extern "C" fn in_child() {
    // SAFETY: as in `after`.
    let locks = unsafe { (*SLOT.0.get()).take() };
    if let Some(locks) = locks {
        bar_regions(&locks.3);
    }
}

/// Puts an empty file where the maps were.
fn bar_regions(leased: &plain::Frozen) {
    // SAFETY: a NUL-terminated name; the flag is defined.
    let fd = unsafe { libc::memfd_create(c"faultless-forked".as_ptr(), libc::MFD_CLOEXEC) };
    let bar = |region: std::ops::Range<usize>| {
        let len = region.end - region.start;
        // Only where there is a hole: what a child has mapped there since (or inherited from its own parent) stays.
        let flags = mem::MAP_FIXED_NOREPLACE
            | if fd >= 0 {
                libc::MAP_SHARED
            } else {
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
            };
        let prot = if fd >= 0 {
            libc::PROT_READ
        } else {
            libc::PROT_NONE
        };
        // SAFETY: replaces nothing.
        let _ = unsafe { mem::map(region.start, len, prot, flags, fd, 0) };
    };
    registry::for_each_after_fork(bar);
    plain::for_each_leased(leased, bar);
    if fd >= 0 {
        // SAFETY: made above; the mappings keep the file.
        unsafe { faultless_sys::file::close(fd) };
    }
}
