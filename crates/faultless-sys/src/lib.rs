//! The kernel interface under Faultless, and nothing but that: no policy lives here.
//!
//! Every call in this crate makes its system calls by the instruction itself ([`raw`]), not through the C library (but for the
//! clock and the number of the processor, which the vDSO tells, and the page size). So a call never touches `errno`, is never a thread-cancellation point, takes no lock, allocates nothing, and may be
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
//! | [`poll`] | waiting for several descriptors |
//! | [`perf`] | counters on kernel tracepoints |
//!
//! Constants that the C headers of today lack are declared here. The ioctl numbers and structures of userfaultfd have
//! compile-time assertions, so that a swapped direction bit does not compile.
//!
//! Under `--cfg faultless_sim` all of it runs over a simulated kernel (`simulated.rs`), without any other change to this crate or to
//! those above it.

#[cfg(not(target_os = "linux"))]
compile_error!(
    "Faultless is built on Linux system calls: userfaultfd has no counterpart elsewhere"
);

pub mod fdtable;
pub mod file;
pub mod futex;
pub mod mem;
pub mod perf;
pub mod poll;
pub mod raw;
pub mod signal;
#[cfg(faultless_sim)]
pub mod simulated;
pub mod uffd;

pub use raw::Errno;
