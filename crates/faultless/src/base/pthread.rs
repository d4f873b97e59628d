//! Threads of the engine, by the C library.
//!
//! Not the standard library's: those register a destructor of a thread-local variable before they run what they are given, and to do
//! so they take the dynamic linker's lock. An engine can be started by the constructor of a library that `dlopen` loads, whose
//! thread has that lock; it waits for the keeper, which would wait for the lock.

#![allow(unsafe_code, reason = "creates threads by the C library's functions")]

use std::ffi::CStr;
use std::ffi::c_void;
use std::io;
use std::mem::MaybeUninit;

/// Bytes of a thread's stack, as the standard library has it.
const STACK: usize = 2 << 20;

/// What a thread does, and its name.
struct Body {
    run: Box<dyn FnOnce() + Send>,
    name: &'static CStr,
}

/// A running thread. Dropping this lets it run on by itself.
#[derive(Debug)]
pub struct Thread(Option<libc::pthread_t>);

/// Starts a thread, with a name of 15 bytes at most.
///
/// # Errors
///
/// The system refuses another thread.
pub fn spawn(name: &'static CStr, body: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
    let body = Box::into_raw(Box::new(Body {
        run: Box::new(body),
        name,
    }));
    let mut attributes = MaybeUninit::uninit();
    let mut thread = MaybeUninit::uninit();
    // SAFETY: initialised by the first call and destroyed by the last; `begin` takes the box back.
    let failed = unsafe {
        libc::pthread_attr_init(attributes.as_mut_ptr());
        libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), STACK);
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
        return Err(io::Error::from_raw_os_error(failed));
    }
    // SAFETY: written, since the call succeeded.
    let thread = unsafe { thread.assume_init() };
    Ok(Thread(Some(thread)))
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
        self.0 == Some(unsafe { libc::pthread_self() })
    }

    /// Waits until it has ended.
    pub fn join(mut self) {
        if let Some(thread) = self.0.take() {
            // SAFETY: neither joined nor detached.
            unsafe { libc::pthread_join(thread, std::ptr::null_mut()) };
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        if let Some(thread) = self.0.take() {
            // SAFETY: neither joined nor detached.
            unsafe { libc::pthread_detach(thread) };
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::sync::mpsc;

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
