//! Calls that end the process, copy it, confine it, or change what it may do.

#![allow(
    unsafe_code,
    reason = "functions of the C library, with its pointers and its promises"
)]

use crate::counters::Counter;
use crate::fills::STACK;
use crate::lend::{GivenWords, filled_through, kept, may_be_kept, range};
use crate::mappings::reaches;
use crate::real::{errno, real, set_errno};
use crate::{state, threads};
use faultless::standin;
use faultless_sys::raw;
use std::ffi::{c_int, c_uint};

#[unsafe(no_mangle)]
unsafe extern "C" fn _exit(status: c_int) -> ! {
    if state::on() {
        state::end("exit");
    }
    // SAFETY: ends the process.
    unsafe { real!(_exit as unsafe extern "C" fn(c_int) -> !)(status) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn _Exit(status: c_int) -> ! {
    // SAFETY: the same.
    unsafe { _exit(status) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn _Fork() -> c_int {
    copies(0, || {
        // SAFETY: no arguments.
        unsafe { real!(_Fork as unsafe extern "C" fn() -> c_int)() }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn clone(
    function: usize,
    stack: usize,
    flags: c_int,
    arg: usize,
    parent: usize,
    tls: usize,
    child: usize,
) -> c_int {
    type Clone = unsafe extern "C" fn(usize, usize, c_int, usize, usize, usize, usize) -> c_int;
    let real = real!(clone as Clone);
    filled_through(&[parent, child]);
    if may_be_kept() {
        kept(&(stack.saturating_sub(1)..stack), STACK);
    }
    if function == 0 {
        // SAFETY: the program's own arguments, which the C library refuses.
        return unsafe { real(function, stack, flags, arg, parent, tls, child) };
    }
    // In a copy of the process this frame is a copy, at the same address.
    let programs = [function, arg];
    let [function, arg] = match flags & libc::CLONE_VM {
        0 => [begin as *const () as usize, &raw const programs as usize],
        _ => programs,
    };
    copies(flags as usize, || {
        // SAFETY: the program's own arguments; `begin` calls its function with its argument.
        unsafe { real(function, stack, flags, arg, parent, tls, child) }
    })
}

/// What a copy of the process begins with that `clone` makes: the program's function and its argument.
extern "C" fn begin(programs: *const [usize; 2]) -> c_int {
    // SAFETY: in this copy's own copy of the frame of `clone`.
    let [function, arg] = unsafe { *programs };
    standin::forsake();
    // SAFETY: the program passed it to `clone`, for this.
    let function: extern "C" fn(usize) -> c_int = unsafe { std::mem::transmute(function) };
    function(arg)
}

/// A thread, or a process in the same memory, is about to be made past the functions for that.
pub(crate) fn shares_memory(flags: usize) {
    let has = |flag: c_int| flags & flag as usize != 0;
    if has(libc::CLONE_THREAD) {
        threads::coming();
    } else if has(libc::CLONE_VM) && !has(libc::CLONE_VFORK) {
        threads::memory_is_shared();
    }
}

/// Makes a call that copies this process, or starts a thread, without handlers.
pub(crate) fn copies<R>(flags: usize, call: impl FnOnce() -> R) -> R {
    if flags & libc::CLONE_VM as usize != 0 || !state::on() || state::foreign() {
        shares_memory(flags);
        return call();
    }
    if flags & libc::CLONE_FILES as usize != 0 {
        // The child could reach whatever comes into the table later.
        state::step_aside("the program shares its descriptors with a copy of itself");
    }
    let result = state::copying(call);
    // In the child, before the program goes on there.
    standin::forsake();
    result
}

// ---- what the engine's threads would be in the way of

/// Ends the engine in this process before a call that it could be in the way of, or that could forbid it something.
fn step_aside(reason: &'static str) {
    if state::on() && !state::foreign() {
        state::step_aside(reason);
    }
}

/// Makes a call that the kernel refuses (`EINVAL`) to a process of more than one thread. The engine's have ended, but the kernel
/// may count them for a moment longer.
fn alone(reason: &'static str, call: impl Fn() -> c_int) -> c_int {
    const TRIES: u32 = 200;
    const NAP_NS: u64 = 1_000_000;
    let had_threads = state::on() && !state::foreign() && state::has_threads();
    step_aside(reason);
    let before = errno();
    for _ in 0..TRIES {
        let result = call();
        if result != -1 || errno() != libc::EINVAL || !had_threads {
            return result;
        }
        set_errno(before);
        raw::nap(NAP_NS);
    }
    set_errno(libc::EINVAL);
    -1
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn unshare(flags: c_int) -> c_int {
    let real = real!(unshare as unsafe extern "C" fn(c_int) -> c_int);
    /// What is for processes of one thread alone.
    const ALONE: c_int =
        libc::CLONE_NEWUSER | libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND;
    standin::forsake();
    if flags & ALONE == 0 {
        // SAFETY: no pointers.
        return unsafe { real(flags) };
    }
    // SAFETY: no pointers.
    alone(
        "the program enters a name space of its own (unshare)",
        || unsafe { real(flags) },
    )
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn setns(fd: c_int, kind: c_int) -> c_int {
    standin::forsake();
    let real = real!(setns as unsafe extern "C" fn(c_int, c_int) -> c_int);
    // SAFETY: no pointers.
    alone("the program enters another name space (setns)", || unsafe {
        real(fd, kind)
    })
}

/// A filter is about to be set: misses need calls that it may forbid, and so do the engine's threads.
pub(crate) fn confines() {
    step_aside("the program confines itself (seccomp)");
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn prctl(
    option: c_int,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
) -> c_int {
    type Prctl = unsafe extern "C" fn(c_int, usize, usize, usize, usize) -> c_int;
    let real = real!(prctl as Prctl);
    standin::forsake();
    if option == libc::PR_SET_SECCOMP {
        confines();
    }
    filled_through(&[a, b, c, d]);
    let hand_backs = standin::hand_backs();
    // SAFETY: the program's own arguments; the kernel checks the pointers.
    let result = unsafe { real(option, a, b, c, d) };
    if result != -1 || errno() != libc::EFAULT {
        return result;
    }
    static COUNTER: Counter = Counter::new("prctl", true);
    match GivenWords::again([a, b, c, d], hand_backs, &COUNTER) {
        Some(given) => {
            let [a, b, c, d] = given.words;
            // SAFETY: the same arguments, where pointers into our mappings are replaced by other addresses of the same bytes.
            unsafe { real(option, a, b, c, d) }
        }
        None => result,
    }
}

/// Limits on address space: what the engine reserves would count.
fn limits(resource: c_uint, new: *const libc::rlimit) {
    let bounded = |new: *const libc::rlimit| {
        crate::probe::copy(new).is_some_and(|l| l.rlim_cur != libc::RLIM_INFINITY)
    };
    let counts = matches!(
        resource,
        libc::RLIMIT_AS | libc::RLIMIT_DATA | libc::RLIMIT_NPROC
    );
    if counts && !new.is_null() && bounded(new) {
        step_aside("the program limits what the engine's own would count towards (setrlimit)");
    }
}

macro_rules! limit_setters {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(resource: c_uint, new: *const libc::rlimit) -> c_int {
            limits(resource, new);
            type Call = unsafe extern "C" fn(c_uint, *const libc::rlimit) -> c_int;
            // SAFETY: the program's own arguments.
            unsafe { real!($name as Call)(resource, new) }
        }
    )* };
}
limit_setters! { setrlimit setrlimit64 }

macro_rules! process_limits {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(pid: libc::pid_t, resource: c_uint, new: *const libc::rlimit, old: *mut libc::rlimit) -> c_int {
            if pid == 0 || pid as u32 == raw::getpid() {
                limits(resource, new);
            }
            filled_through(&[old as usize]);
            type Call = unsafe extern "C" fn(libc::pid_t, c_uint, *const libc::rlimit, *mut libc::rlimit) -> c_int;
            // SAFETY: the program's own arguments.
            unsafe { real!($name as Call)(pid, resource, new, old) }
        }
    )* };
}
process_limits! { prlimit prlimit64 }

// ---- what uses memory later

/// Reads and writes that are made behind the program's back: their memory becomes the kernel's.
unsafe fn used_later(request: *const libc::aiocb) {
    // SAFETY: null or the program's own request.
    if let Some(r) = unsafe { request.as_ref() }
        && reaches(&range(r.aio_buf.cast_const(), r.aio_nbytes))
        && !state::foreign()
        && !state::forking()
    {
        let range = range(r.aio_buf.cast_const(), r.aio_nbytes);
        state::lock().hand_back_over(&range, "the program uses it in the background (aio)");
    }
}

macro_rules! background_calls {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(request: *mut libc::aiocb) -> c_int {
            // SAFETY: the program's own request.
            unsafe {
                used_later(request);
                real!($name as unsafe extern "C" fn(*mut libc::aiocb) -> c_int)(request)
            }
        }
    )* };
}
background_calls! { aio_read aio_read64 aio_write aio_write64 }

macro_rules! background_lists {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(mode: c_int, list: *const *mut libc::aiocb, count: c_int, event: usize) -> c_int {
            type List = unsafe extern "C" fn(c_int, *const *mut libc::aiocb, c_int, usize) -> c_int;
            // SAFETY: the program's own list.
            unsafe {
                for i in 0..count.max(0) as usize {
                    used_later(*list.add(i));
                }
                real!($name as List)(mode, list, count, event)
            }
        }
    )* };
}
background_lists! { lio_listio lio_listio64 }
