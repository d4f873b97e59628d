//! The C library's own functions, behind ours; and errno.

#![allow(unsafe_code, reason = "looks functions up by name")]

use std::ffi::{CStr, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

/// A function of the C library that has ours before it.
pub(crate) struct Real {
    name: &'static CStr,
    at: AtomicPtr<c_void>,
}

impl Real {
    pub(crate) const fn new(name: &'static CStr) -> Self {
        Real {
            name,
            at: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    /// Its address; where the C library has no such function, that of one which says so. (A program may have looked for it at
    /// run time, and found ours.)
    #[inline]
    pub(crate) fn get(&self) -> *mut c_void {
        let at = self.at.load(Ordering::Relaxed);
        if at.is_null() { self.find() } else { at }
    }

    /// Its address, if the C library has such a function.
    pub(crate) fn found(&self) -> Option<*mut c_void> {
        let at = self.get();
        (!at.is_null() && at != missing as *mut c_void).then_some(at)
    }

    fn look_up(&self) -> *mut c_void {
        // SAFETY: a NUL-terminated name.
        unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) }
    }

    /// For calls that come before [`find_all`].
    #[cold]
    fn find(&self) -> *mut c_void {
        let errno = Errno::keep();
        let at = self.look_up();
        let at = if at.is_null() {
            missing as *mut c_void
        } else {
            at
        };
        self.at.store(at, Ordering::Relaxed);
        drop(errno);
        at
    }
}

/// Stands for a function that the C library does not have.
extern "C" fn missing() -> libc::c_long {
    set_errno(libc::ENOSYS);
    -1
}

unsafe extern "C" {
    /// The linker's: the first and the end of all [`Real`]s, which `real!` puts into a section of that name.
    #[link_name = "__start_faultless_real"]
    static FIRST: u8;
    #[link_name = "__stop_faultless_real"]
    static END: u8;
}

/// Looks all of them up: before `main`, while there is one thread. Later the dynamic linker may be at work on behalf of a thread
/// that waits for the one that calls us.
pub(crate) fn find_all() {
    unsafe extern "C" {
        /// Those of print.c.
        fn faultless_find_prints();
    }
    // SAFETY: no arguments; there is one thread.
    unsafe { faultless_find_prints() };
    let (mut at, end) = (
        (&raw const FIRST).cast::<Real>(),
        (&raw const END).cast::<Real>(),
    );
    while at < end {
        // SAFETY: between the linker's two symbols lie `Real`s alone, which live for ever.
        let real = unsafe { &*at };
        if real.at.load(Ordering::Relaxed).is_null() {
            // (A function that this C library lacks is called by nobody.)
            real.at.store(real.look_up(), Ordering::Relaxed);
        }
        at = at.wrapping_add(1);
    }
}

/// `real!(name as fn(types) -> type)`: the C library's function of that name.
macro_rules! real {
    ($name:ident as $type:ty) => {{
        #[unsafe(link_section = "faultless_real")]
        static REAL: $crate::real::Real = $crate::real::Real::new(
            match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => panic!("no NUL inside an identifier"),
            },
        );
        #[allow(
            clippy::missing_transmute_annotations,
            unused_unsafe,
            reason = "the type is the macro's argument; some uses are in an unsafe block already"
        )]
        // SAFETY: the C library's function of that name has this type.
        unsafe {
            std::mem::transmute::<*mut std::ffi::c_void, $type>(REAL.get())
        }
    }};
}
pub(crate) use real;

/// The calling thread's errno.
pub(crate) fn errno() -> i32 {
    // SAFETY: points to the calling thread's variable.
    unsafe { *libc::__errno_location() }
}

pub(crate) fn set_errno(e: i32) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = e };
}

/// Gives errno back its value when dropped.
pub(crate) struct Errno(i32);

impl Errno {
    pub(crate) fn keep() -> Self {
        Errno(errno())
    }
}

impl Drop for Errno {
    fn drop(&mut self) {
        set_errno(self.0);
    }
}

/// A system call's result as the C library returns it.
pub(crate) fn returned(result: Result<usize, faultless_sys::Errno>) -> isize {
    match result {
        Ok(value) => value as isize,
        Err(e) => {
            set_errno(e.0);
            -1
        }
    }
}
