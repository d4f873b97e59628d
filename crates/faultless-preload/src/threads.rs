//! The moment at which the program gets its second thread.
//!
//! A process with one thread has nothing to gain: no other thread waits for its locks, and the engine would bring it threads that
//! programs can see (a warning of Python's at fork, a sandbox that refuses to start). So its mappings stay the kernel's until it is
//! about to create a thread; `waiting` has what happens then.

#![allow(
    unsafe_code,
    reason = "functions of the C library, with its pointers and its promises"
)]

use crate::real::real;
use crate::{state, waiting};
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether this process has, or had, more than one thread of its own.
static THREADED: AtomicBool = AtomicBool::new(false);

/// Whether the program has one thread. (A file of /proc knows of threads that were made past the C library; the engine's threads
/// count as well, but there are none before this has been `false` once.)
pub(crate) fn alone() -> bool {
    if THREADED.load(Ordering::SeqCst) {
        return false;
    }
    let alone = counted() == Some(1);
    if !alone {
        THREADED.store(true, Ordering::SeqCst);
    }
    alone
}

/// How many threads the kernel counts.
pub(crate) fn counted() -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    // A directory has two links, and one more for each directory in it.
    let links = std::fs::metadata("/proc/self/task").ok()?.nlink();
    links.checked_sub(2)
}

/// Notes that the program does not stay alone. `true` the first time, and only in the process that may change the state.
fn no_longer_alone() -> bool {
    state::on()
        && !THREADED.load(Ordering::Relaxed)
        && !state::foreign()
        && !state::forking()
        && !THREADED.swap(true, Ordering::SeqCst)
}

/// The program is about to create a thread.
pub(crate) fn coming() {
    if no_longer_alone() {
        waiting::take_over();
    }
}

/// The program is about to create a process that shares its memory: nothing can be replaced in place any more, since that process
/// may use it, which has no handler of ours.
pub(crate) fn memory_is_shared() {
    if no_longer_alone() {
        waiting::forget_all(&mut state::lock(), waiting::SHARED);
    }
}

/// A forked child has one thread.
pub(crate) fn in_child() {
    THREADED.store(false, Ordering::SeqCst);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_create(
    thread: *mut c_void,
    attributes: *const c_void,
    start: *mut c_void,
    argument: *mut c_void,
) -> c_int {
    type Create =
        unsafe extern "C" fn(*mut c_void, *const c_void, *mut c_void, *mut c_void) -> c_int;
    coming();
    // SAFETY: the program's own arguments.
    unsafe { real!(pthread_create as Create)(thread, attributes, start, argument) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn thrd_create(
    thread: *mut c_void,
    start: *mut c_void,
    argument: *mut c_void,
) -> c_int {
    type Create = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut c_void) -> c_int;
    coming();
    // SAFETY: the program's own arguments.
    unsafe { real!(thrd_create as Create)(thread, start, argument) }
}
