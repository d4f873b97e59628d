//! What a forked child finds where its parent had maps.
//!
//! A map that stands in for the kernel's mapping becomes that mapping. All others: the regions are not inherited (a child that installed a page through the inherited userfaultfd would write into its
//! parent). A hole, however, could be filled by the child's next `mmap`, and a stale slice would read foreign bytes. So
//! each region becomes a mapping of an empty file: every access raises SIGBUS, which the handler explains.
//!
//! The engine's locks are held across the fork, so that the child can drop its maps and build a pool of its own.

#![allow(unsafe_code, reason = "replaces mappings in a forked child")]

use crate::base::ids::Addr;
use crate::base::primitive::Ordering;
use crate::base::process;
use crate::coherence::opening::reopen;
use crate::coherence::{hooks, keeper};
use crate::fault::chain::HandlerLock;
use crate::fault::handler;
use crate::space::map_core::{KernelMapping, MapCore, Reading};
use crate::space::{fds, identity, registry};
use faultless_sys::{file, mem};
use std::cell::UnsafeCell;
use std::ops::Range;
use std::sync::Once;

type Locks = (HandlerLock, keeper::KeeperLocks, registry::GatesLock);

struct Slot(UnsafeCell<Option<Locks>>);
// SAFETY: written and emptied only by the thread that holds the locks in question.
unsafe impl Sync for Slot {}
static SLOT: Slot = Slot(UnsafeCell::new(None));

/// Registers the handlers, once for the life of the program.
pub(crate) fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // (A simulated fork calls them by itself.)
        #[cfg(not(faultless_sim))]
        // SAFETY: the three functions are static and do what pthread_atfork allows.
        unsafe {
            libc::pthread_atfork(Some(before), Some(after), Some(in_child))
        };
    });
}

pub(crate) extern "C" fn before() {
    // A child that was made without these handlers has no maps, and perhaps locks that nobody gives back.
    if process::forked() {
        return;
    }
    // What the program has closed and used again is not to be closed in the child.
    fds::for_each_number(|number| {
        if !fds::is_engines(number) {
            fds::forget(number);
        }
    });
    // What a child's mappings are made from must be there when the table of descriptors is copied.
    registry::for_each(|core| {
        if let (Some(_), Reading::File { fd, id, .. }) = (&core.stands_for, &core.reading) {
            let _ = fd.current(*id);
        }
    });
    let locks = (
        handler::SIGBUS.freeze(),
        keeper::freeze(),
        registry::freeze(),
    );
    fds::forking();
    // SAFETY: we hold the locks, so no other thread is here.
    unsafe { *SLOT.0.get() = Some(locks) };
}

pub(crate) extern "C" fn after() {
    fds::forked();
    // SAFETY: `before` took the locks on this thread, and they are released only as this value is dropped.
    drop(unsafe { (*SLOT.0.get()).take() });
}

#[cfg_attr(
    faultless_sim,
    allow(dead_code, reason = "a simulated fork has no child")
)]
extern "C" fn in_child() {
    // SAFETY: as in `after`.
    let locks = unsafe { (*SLOT.0.get()).take() };
    if let Some(mut locks) = locks {
        // Calls of the parent's other threads, which nobody ends here.
        locks.1.forget_calls();
        bar_regions();
        fds::prepared();
        identity::in_child();
    }
}

/// Makes the kernel's mapping that a map stood in for in the parent. `false` if it cannot be made.
fn restore(core: &MapCore, kernel: &KernelMapping) -> bool {
    let Reading::File { fd, .. } = &core.reading else {
        return false;
    };
    // An open file of the child's own: the parent's would keep the parent's lease alive for as long as the mapping.
    let (number, own) = match reopen(fd.get(), false) {
        Ok(fresh) => (fresh, true),
        Err(_) => (fd.get(), false),
    };
    let advice = kernel.advice.load(Ordering::Relaxed);
    let mut all = true;
    for part in core.live.in_child().iter() {
        let offset = core.base + (Addr::new(part.start) - core.start) as u64;
        let flags = kernel.flags | mem::MAP_FIXED_NOREPLACE;
        // SAFETY: replaces nothing: the parent's region is a hole here.
        let made = unsafe {
            mem::map(
                part.start,
                part.len(),
                libc::PROT_READ,
                flags,
                number,
                offset.get(),
            )
        };
        if made.is_ok() {
            // SAFETY: made above; this advice changes no contents.
            let _ = unsafe { mem::madvise(part.start, part.len(), advice) };
        }
        all &= made.is_ok();
    }
    if own {
        // SAFETY: opened above; the mapping keeps the file.
        unsafe { file::close(number) };
    }
    all
}

/// Puts what belongs there where the maps were: the kernel's mapping where one stood in for that, otherwise an empty
/// file.
fn bar_regions() {
    let fd = file::memory_file(c"faultless-forked", 0).unwrap_or(-1);
    let bar = |region: Range<usize>| {
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
    registry::for_each_after_fork(|core| match &core.stands_for {
        Some(kernel) if kernel.dont_fork.load(Ordering::Relaxed) => {}
        Some(kernel) if restore(core, kernel) => {}
        _ => bar(core.region()),
    });
    hooks::in_child();
    // An open file of the parent's that lived on in the child would keep the parent's lease, with nobody to give it up.
    // A new process has no POSIX locks to lose.
    fds::for_each_number(|number| {
        fds::forget(number);
        // SAFETY: a copy of the engine's descriptor in the child's own table; the child has no maps that use it.
        unsafe { file::close(number) };
    });
    if fd >= 0 {
        // SAFETY: made above; the mappings keep the file.
        unsafe { file::close(fd) };
    }
}
