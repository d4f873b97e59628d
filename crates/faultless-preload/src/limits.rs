//! Whether the engine fits into a process as it is: its resource limits and its sandbox.
//!
//! Whatever the engine needs for itself, the program would find missing: addresses, descriptors, threads. Where the program
//! has a limit that this could make it run into, it keeps the kernel's mappings.

#![allow(unsafe_code, reason = "asks for limits")]

use crate::state;
use faultless_sys::raw;

/// Descriptors from this number of permitted ones on are so many that the engine's few are not missed.
const PLENTY_OF_DESCRIPTORS: u64 = 1 << 14;
/// The same for threads and processes of a user.
const PLENTY_OF_THREADS: u64 = 2048;

/// A resource limit of this process.
fn limit(resource: libc::__rlimit_resource_t) -> libc::rlimit {
    let mut limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    let args = [0, resource as usize, 0, &raw mut limit as usize, 0, 0];
    // SAFETY: writes the structure; not through the C library, whose functions stand behind ours.
    let _ = unsafe { raw::syscall(libc::SYS_prlimit64, args) };
    limit
}

/// Why the engine must not start in this process, if there is a reason.
pub(crate) fn check() -> Result<(), String> {
    let no = |why: &str| Err(why.to_owned());
    if state::settings().is_some_and(|s| !s.sandbox.covers_this_process()) {
        return no("the process is confined (seccomp), and what its filter permits is not known");
    }
    if limit(libc::RLIMIT_AS).rlim_cur != libc::RLIM_INFINITY {
        return no(
            "the process's address space is limited (ulimit -v), and the engine's own would count",
        );
    }
    if limit(libc::RLIMIT_DATA).rlim_cur != libc::RLIM_INFINITY {
        return no("the process's data are limited (ulimit -d), and the engine's own would count");
    }
    let files = limit(libc::RLIMIT_NOFILE);
    if files.rlim_cur == files.rlim_max && files.rlim_cur < PLENTY_OF_DESCRIPTORS {
        return no(
            "the process may open few files and no more (ulimit -Hn), and the engine's own would count",
        );
    }
    // SAFETY: no arguments.
    let root = unsafe { libc::geteuid() } == 0;
    if !root && limit(libc::RLIMIT_NPROC).rlim_cur < PLENTY_OF_THREADS {
        return no(
            "the user may have few processes (ulimit -u), and the engine's threads would count",
        );
    }
    Ok(())
}
