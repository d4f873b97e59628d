//! Keeping the engine's code in memory.

#![allow(unsafe_code, reason = "asks the dynamic linker by address")]

use std::mem::MaybeUninit;

/// Keeps the library that this code is part of in memory until the process ends, even if the program unloads it (`dlclose`): the kernel calls
/// the SIGBUS handler by its address, and threads of the engine run on.
///
/// Takes the dynamic linker's lock. The caller holds no lock that a library's constructor may wait for.
pub(crate) fn stay_loaded() {
    let mut info = MaybeUninit::<libc::Dl_info>::zeroed();
    let here = stay_loaded as fn() as *const libc::c_void;
    // SAFETY: any address may be asked for, and `info` is writable.
    if unsafe { libc::dladdr(here, info.as_mut_ptr()) } == 0 {
        return;
    }
    // SAFETY: written, since the call succeeded; zeroed before.
    let name = unsafe { info.assume_init() }.dli_fname;
    if !name.is_null() {
        // (Of a program that is not a library, the name may be none that can be opened: it stays anyway.)
        // SAFETY: a NUL-terminated name; with RTLD_NOLOAD nothing is loaded, and no constructor runs.
        unsafe {
            libc::dlopen(
                name,
                libc::RTLD_NOW | libc::RTLD_NOLOAD | libc::RTLD_NODELETE,
            )
        };
    }
}
