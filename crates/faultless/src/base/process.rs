//! Which process this is: a forked child must know, at any instruction, that it is not the one that registered.

#![allow(
    unsafe_code,
    reason = "reads a page that the kernel wipes in a child; asks the C library"
)]

use crate::base::primitive::Ordering;
use crate::base::primitive::fixed::{AtomicPtr, AtomicU32};
use faultless_sys::{Errno, mem, raw};

/// `MADV_WIPEONFORK` (4.14): a child finds zeros.
pub(crate) const MADV_WIPEONFORK: i32 = 18;

/// A word that is 1 in the process that set up the engine and 0 in its forked children: no system call is needed to
/// tell them apart, and it cannot be fooled by a `fork` or `clone` that bypassed the C library.
static MARK: AtomicPtr<AtomicU32> = AtomicPtr::new(std::ptr::null_mut());
static PID: AtomicU32 = AtomicU32::new(0);

/// Makes this process the engine's home. Called at start, and again by a forked child that makes a pool of its own.
pub(crate) fn settle_here() -> Result<(), Errno> {
    let addr = mem::map_anonymous(mem::PAGE)?;
    // SAFETY: mapped just now, ours.
    unsafe { mem::madvise(addr, mem::PAGE, MADV_WIPEONFORK)? };
    let mark = addr as *mut AtomicU32;
    // SAFETY: a zero-initialised, aligned, never unmapped word.
    unsafe { (*mark).store(1, Ordering::Relaxed) };
    PID.store(raw::getpid(), Ordering::Relaxed);
    MARK.store(mark, Ordering::Release);
    Ok(())
}

/// Whether this is a child, forked since [`settle_here`].
#[inline]
pub(crate) fn forked() -> bool {
    let mark = MARK.load(Ordering::Acquire);
    // SAFETY: non-null means that `settle_here` mapped it; it is never unmapped, and children keep the mapping.
    !mark.is_null() && unsafe { (*mark).load(Ordering::Relaxed) } == 0
}

/// The process that settled.
#[inline]
pub(crate) fn pid() -> u32 {
    PID.load(Ordering::Relaxed)
}

/// Processors that the simulated machine has.
#[cfg(faultless_sim)]
pub(crate) fn processors() -> usize {
    4
}

/// Processors that the process may use. (The standard library reads files to find out: once is enough.)
#[cfg(not(faultless_sim))]
pub(crate) fn processors() -> usize {
    static COUNT: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    *COUNT.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Processors that the machine has, whichever of them the process may use. (Most have a number below that.)
#[cfg(not(faultless_sim))]
pub(crate) fn possible_processors() -> usize {
    static COUNT: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
    *COUNT.get_or_init(|| {
        // SAFETY: no pointers.
        let count = unsafe { libc::sysconf(libc::_SC_NPROCESSORS_CONF) };
        (count.max(1) as usize).max(processors())
    })
}

/// The same of the simulated machine.
#[cfg(faultless_sim)]
pub(crate) fn possible_processors() -> usize {
    processors()
}

/// Which of `shards` (a power of two) counters this processor should use. Any answer is right; the same answer on the
/// same processor keeps cache lines where they are.
#[cfg(not(loom))]
#[inline]
pub(crate) fn shard(shards: usize) -> usize {
    raw::processor() & (shards - 1)
}

/// The same in a model, where a thread says which processor it runs on.
#[cfg(loom)]
pub(crate) fn shard(shards: usize) -> usize {
    PROCESSOR.with(std::cell::Cell::get) & (shards - 1)
}

#[cfg(loom)]
loom::thread_local! {
    pub(crate) static PROCESSOR: std::cell::Cell<usize> = std::cell::Cell::new(0);
}
