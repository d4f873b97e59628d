//! Descriptors: a program does not see those of the engine, and loses no POSIX lock by them.
//!
//! Closing *any* descriptor of a file drops all POSIX locks that the process holds on it. So the engine closes none of its
//! own while there are locks on the file, and the program must not close one of the engine's by chance.

#![allow(
    unsafe_code,
    reason = "functions of the C library, with its pointers and its promises"
)]

use crate::lend::filled_through;
use crate::real::{Errno, real};
use crate::state::{self, LOOKED, STANDING};
use crate::{counters, probe};
use faultless::{live, standin};
use faultless_sys::file::{self, FileId};
use std::ffi::{c_int, c_uint, c_void};
use std::sync::atomic::Ordering;

/// Whether a number is a descriptor of the engine's.
fn engines(fd: c_int) -> bool {
    (LOOKED.load(Ordering::Relaxed) && standin::is_engines_descriptor(fd)) || counters::watches(fd)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn close(fd: c_int) -> c_int {
    standin::forsake();
    if engines(fd) {
        // A program that closes what it finds in /proc/self/fd has closed it, as far as it can tell.
        return 0;
    }
    // SAFETY: the program's own argument.
    unsafe { real!(close as unsafe extern "C-unwind" fn(c_int) -> c_int)(fd) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    let real = real!(close_range as unsafe extern "C" fn(c_uint, c_uint, c_int) -> c_int);
    standin::forsake();
    // Ours are all close-on-exec already.
    const CLOEXEC: c_int = 4;
    if !LOOKED.load(Ordering::Relaxed) || flags & CLOEXEC != 0 || first > last {
        // SAFETY: the program's own arguments.
        return unsafe { real(first, last, flags) };
    }
    // (Without memory of the heap: this is called between fork and exec.)
    let mut next = first;
    let mut result = 0;
    let mut part = |from: u32, to: u32| {
        if from <= to && result == 0 {
            // SAFETY: a part of what the program wants closed.
            result = unsafe { real(from, to, flags) };
        }
        result
    };
    // In the order of their numbers.
    standin::for_each_descriptor(|fd| {
        let number = fd as u32;
        if (next..=last).contains(&number) && engines(fd) {
            if number > next {
                part(next, number - 1);
            }
            next = number + 1;
        }
    });
    part(next, last)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn closefrom(first: c_int) {
    // SAFETY: the program's own wish.
    unsafe { close_range(first.max(0) as c_uint, c_uint::MAX, 0) };
}

/// A number is the program's from now on, whatever it was.
fn taken(fd: c_int) -> c_int {
    standin::forsake();
    if fd >= 0 && LOOKED.load(Ordering::Relaxed) && !state::foreign() {
        standin::descriptor_is_programs(fd);
    }
    fd
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dup2(old: c_int, new: c_int) -> c_int {
    // SAFETY: the program's own arguments.
    let result = unsafe { real!(dup2 as unsafe extern "C" fn(c_int, c_int) -> c_int)(old, new) };
    if old == new { result } else { taken(result) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn dup3(old: c_int, new: c_int, flags: c_int) -> c_int {
    let real = real!(dup3 as unsafe extern "C" fn(c_int, c_int, c_int) -> c_int);
    // SAFETY: the program's own arguments.
    taken(unsafe { real(old, new, flags) })
}

/// Which file a descriptor is of.
fn file_of(fd: c_int) -> Option<FileId> {
    file::status(fd).ok().map(|st| st.id)
}

/// Around a call that takes a POSIX lock on `fd`, for writing or not.
fn locking(fd: c_int, write: bool, call: impl FnOnce() -> c_int) -> c_int {
    let served = state::on() && !state::foreign();
    let Some(id) = served.then(|| file_of(fd)).flatten() else {
        return call();
    };
    if write {
        let mut state = state::lock();
        state.note_write_locked(id);
        state.hand_back_file(id, "the program takes POSIX locks for writing on it");
    }
    standin::locks_coming(id);
    let settled = Settled(id);
    let result = call();
    drop(settled);
    result
}

/// Also where the thread is cancelled while it waits for the lock.
struct Settled(FileId);

impl Drop for Settled {
    fn drop(&mut self) {
        let _errno = Errno::keep();
        standin::locks_settled(self.0);
    }
}

fn control(
    real: unsafe extern "C-unwind" fn(c_int, c_int, ...) -> c_int,
    fd: c_int,
    cmd: c_int,
    arg: *mut c_void,
) -> c_int {
    filled_through(&[arg as usize]);
    // SAFETY: the program's own arguments.
    let call = || unsafe { real(fd, cmd, arg) };
    match cmd {
        libc::F_SETLK | libc::F_SETLKW if !arg.is_null() => {
            let Some(kind) = probe::copy(arg.cast::<libc::flock>()).map(|l| l.l_type) else {
                return call();
            };
            if kind == libc::F_UNLCK as i16 {
                call()
            } else {
                locking(fd, kind == libc::F_WRLCK as i16, call)
            }
        }
        // The kernel grants a lease for writing only if nobody else has the file open.
        libc::F_SETLEASE if STANDING.load(Ordering::Relaxed) != 0 && !state::foreign() => {
            if let Some(id) = file_of(fd) {
                let reason = "the program takes a lease on it";
                let mut state = state::lock();
                state.hand_back_file(id, reason);
                // (The engine's descriptor counts as another that has the file open.)
                let writes = arg as usize == libc::F_WRLCK as usize;
                let live = writes && state.hand_back_live(Some(id), reason);
                drop(state);
                if live {
                    live::settle_until(|| live::holds_none_of(id));
                }
            }
            call()
        }
        _ => call(),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn fcntl(fd: c_int, cmd: c_int, arg: *mut c_void) -> c_int {
    control(
        real!(fcntl as unsafe extern "C-unwind" fn(c_int, c_int, ...) -> c_int),
        fd,
        cmd,
        arg,
    )
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn fcntl64(fd: c_int, cmd: c_int, arg: *mut c_void) -> c_int {
    control(
        real!(fcntl64 as unsafe extern "C-unwind" fn(c_int, c_int, ...) -> c_int),
        fd,
        cmd,
        arg,
    )
}

macro_rules! region_locks {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(fd: c_int, cmd: c_int, len: i64) -> c_int {
            let real = real!($name as unsafe extern "C-unwind" fn(c_int, c_int, i64) -> c_int);
            // SAFETY: the program's own arguments.
            let call = || unsafe { real(fd, cmd, len) };
            if matches!(cmd, libc::F_LOCK | libc::F_TLOCK) {
                locking(fd, true, call)
            } else {
                call()
            }
        }
    )* };
}
region_locks! { lockf lockf64 }

/// A file that shrinks under a mapping that the user vouches for: where the program does it itself, its mappings become the
/// kernel's first.
fn shrinking(fd: c_int) {
    if STANDING.load(Ordering::Relaxed) != 0
        && !state::foreign()
        && let Some(id) = file_of(fd)
    {
        state::lock().hand_back_file(id, "the program changes the length of its file");
    }
}

macro_rules! truncations {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(fd: c_int, len: i64) -> c_int {
            shrinking(fd);
            // SAFETY: the program's own arguments.
            unsafe { real!($name as unsafe extern "C" fn(c_int, i64) -> c_int)(fd, len) }
        }
    )* };
}
truncations! { ftruncate ftruncate64 }
