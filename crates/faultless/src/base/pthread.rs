//! Threads of the engine, by the C library.
//!
//! Not the standard library's: those register a destructor of a thread-local variable before they run what they are given, and to do
//! so they take the dynamic linker's lock. An engine can be started by the constructor of a library that `dlopen` loads, whose
//! thread has that lock; it waits for the keeper, which would wait for the lock.
//!
//! Their stacks are the engine's own memory. The C library would put them into any hole that the program has just unmapped.

#![allow(unsafe_code, reason = "creates threads by the C library's functions")]

use crate::base::process;
use faultless_sys::{mem, raw};
use std::ffi::CStr;
use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Bytes of a thread's stack, with a page before it that nothing may touch.
const STACK: usize = 2 << 20;

/// What a thread does, and its name.
struct Body {
    run: Box<dyn FnOnce() + Send>,
    name: &'static CStr,
}

/// A thread, and where its stack begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Running {
    thread: libc::pthread_t,
    stack: usize,
}

/// A running thread. Dropping this lets it run on by itself.
#[derive(Debug)]
pub struct Thread(Option<Running>);

/// A thread that runs on by itself, in a list of them.
struct Left {
    running: Running,
    /// Its process.
    pid: u32,
    next: *mut Left,
}

/// Threads that run on by themselves. Each [`spawn`] takes back the stacks of those that have ended. (A list without a lock: a forked
/// child may find it in any state.)
static LEFT: AtomicPtr<Left> = AtomicPtr::new(ptr::null_mut());

fn leave(left: Box<Left>) {
    let left = Box::into_raw(left);
    let mut next = LEFT.load(Ordering::Relaxed);
    loop {
        // SAFETY: made from a box above, and not shown to others yet.
        unsafe { (*left).next = next };
        match LEFT.compare_exchange_weak(next, left, Ordering::Release, Ordering::Relaxed) {
            Ok(_) => return,
            Err(other) => next = other,
        }
    }
}

fn new_stack() -> io::Result<usize> {
    let stack = mem::map_anonymous(STACK)?;
    // SAFETY: mapped just now; no thread uses it.
    unsafe { mem::protect(stack, mem::PAGE, libc::PROT_NONE) }
        .inspect_err(|_| free_stack(stack))?;
    Ok(stack)
}

fn free_stack(stack: usize) {
    // SAFETY: made by `new_stack`; its thread has ended, or was never started. (That may fail, and leaves it mapped.)
    let _ = unsafe { mem::unmap(stack, STACK) };
}

/// Takes back the stacks of threads that were left to themselves and have ended.
fn reap() {
    let mut next = LEFT.swap(ptr::null_mut(), Ordering::Acquire);
    while !next.is_null() {
        // SAFETY: put there by `leave`, and taken out by this thread alone.
        let left = unsafe { Box::from_raw(next) };
        next = left.next;
        let Running { thread, stack } = left.running;
        if left.pid != raw::getpid() {
            // The parent's. One of them may have forked this process, and so be this thread: the memory stays.
            continue;
        }
        // SAFETY: neither joined nor detached: the list alone had it.
        let ended = unsafe { libc::pthread_tryjoin_np(thread, ptr::null_mut()) } == 0;
        match ended {
            true => free_stack(stack),
            false => leave(left),
        }
    }
}

/// Starts a thread, with a name of 15 bytes at most.
///
/// # Errors
///
/// The system refuses another thread, or its stack.
pub fn spawn(name: &'static CStr, body: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
    reap();
    let stack = new_stack()?;
    let body = Box::into_raw(Box::new(Body {
        run: Box::new(body),
        name,
    }));
    let mut attributes = MaybeUninit::uninit();
    let mut thread = MaybeUninit::uninit();
    let usable = (stack + mem::PAGE) as *mut c_void;
    // SAFETY: initialised by the first call and destroyed by the last; `begin` takes the box back. The stack is this thread's alone, and
    // stays until the thread was joined.
    let failed = unsafe {
        libc::pthread_attr_init(attributes.as_mut_ptr());
        libc::pthread_attr_setstack(attributes.as_mut_ptr(), usable, STACK - mem::PAGE);
        let failed = libc::pthread_create(
            thread.as_mut_ptr(),
            attributes.as_ptr(),
            begin,
            body.cast::<c_void>(),
        );
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
        failed
    };
    if failed != 0 {
        // SAFETY: no thread has it.
        drop(unsafe { Box::from_raw(body) });
        free_stack(stack);
        return Err(io::Error::from_raw_os_error(failed));
    }
    // SAFETY: written, since the call succeeded.
    let thread = unsafe { thread.assume_init() };
    Ok(Thread(Some(Running { thread, stack })))
}

extern "C" fn begin(body: *mut c_void) -> *mut c_void {
    // SAFETY: made by `spawn`, for this thread alone.
    let body = unsafe { Box::from_raw(body.cast::<Body>()) };
    // (From outside, the C library would open a file of /proc for that.)
    // SAFETY: a NUL-terminated name.
    unsafe { libc::prctl(libc::PR_SET_NAME, body.name.as_ptr()) };
    // A panic ends the thread, and was told on stderr.
    let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body.run));
    std::ptr::null_mut()
}

impl Thread {
    /// Whether the calling thread is this one.
    pub(crate) fn is_this(&self) -> bool {
        // SAFETY: no arguments.
        let this = unsafe { libc::pthread_self() };
        self.0.is_some_and(|running| running.thread == this)
    }

    /// Waits until it has ended.
    pub fn join(mut self) {
        let Some(running) = self.0.take() else {
            return;
        };
        // SAFETY: neither joined nor detached.
        let failed = unsafe { libc::pthread_join(running.thread, std::ptr::null_mut()) };
        if failed == 0 {
            free_stack(running.stack);
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        let Some(running) = self.0.take() else {
            return;
        };
        if process::forked() {
            // The thread is the parent's; the stack's memory is not worth a look at what of it was copied.
            return;
        }
        leave(Box::new(Left {
            running,
            pid: raw::getpid(),
            next: ptr::null_mut(),
        }));
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn the_stack_of_a_thread_that_was_left_to_itself_is_taken_back() {
        let (tell, told) = mpsc::channel();
        let thread = spawn(c"left", move || {
            let here = 0u8;
            let _ = tell.send(&raw const here as usize);
        });
        drop(thread.expect("a thread"));
        let here = told.recv().expect("it runs");
        assert!(mem::mapped(here));
        while mem::mapped(here) {
            reap();
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_thread_runs_what_it_was_given_under_its_name_and_is_waited_for() {
        let (tell, told) = mpsc::channel();
        let thread = spawn(c"fifteen-letters", move || {
            let name = std::fs::read("/proc/thread-self/comm");
            let _ = tell.send(name);
        });
        thread.expect("a thread").join();
        let name = told.try_recv().expect("it has ended").expect("readable");
        assert_eq!(name, b"fifteen-letters\n");
    }
}
