//! The kernel interface under Faultless, and nothing but that: no policy lives here.
//!
//! Every call in this crate is one system call made by the instruction itself ([`raw`]), not through the C library. So
//! a call never touches `errno`, is never a thread-cancellation point, takes no lock, allocates nothing, and may be
//! made from a signal handler at any instruction. Errors come back as [`Errno`] values.
//!
//! | module | what |
//! |---|---|
//! | [`raw`] | the system-call instruction, and [`Errno`] |
//! | [`uffd`] | userfaultfd: open, register, copy |
//! | [`mem`] | mmap, munmap, madvise, batched process_madvise |
//! | [`futex`] | wait and wake on a 32-bit word |
//! | [`signal`] | kernel signal actions and masks, thread-directed signals |
//! | [`mod@file`] | positional reads, file identity, leases, direct-I/O alignment |
//! | [`fdtable`] | private descriptor tables, descriptors fetched from another thread's table |
//! | [`perf`] | counters on kernel tracepoints |
//!
//! Constants that the C headers of today lack are declared here, with compile-time assertions on every ioctl number
//! and structure size, so that a swapped direction bit does not compile.

#[cfg(not(target_os = "linux"))]
compile_error!(
    "Faultless is built on Linux system calls: userfaultfd has no counterpart elsewhere"
);

pub mod fdtable;
pub mod file;
pub mod futex;
pub mod mem;
pub mod perf;
pub mod raw;
pub mod signal;
pub mod uffd;

pub use raw::Errno;
