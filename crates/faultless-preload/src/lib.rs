//! `libfaultless_preload.so`: unmodified programs' file mappings, served by the engine.
//!
//! `faultless run -- PROGRAM` starts a program with this library in `LD_PRELOAD`. Its functions stand before the C library's
//! (mmap, munmap, fcntl, sigaction, write and so on), and do one of three things: take a mapping over, keep up for the
//! mappings that are taken over what the kernel would have done for its own, or pass the call on. In a process that was not
//! started so, every one of them passes the call on: then the library is the engine's C interface (`capi`) and no more.
//!
//! | module | what |
//! |---|---|
//! | `real` | the C library's own functions; errno |
//! | `state` | the mappings that are taken over, the lock, the life of the process (start, fork, exec, end) |
//! | `decide` | which mappings are taken over, and why others are not |
//! | `mappings` | mmap, munmap, mremap, mprotect, madvise, mlock, mincore |
//! | `descriptors` | close, dup2 and their kin; POSIX locks |
//! | `signals` | sigaction and masks: SIGBUS stays the engine's, and unblocked |
//! | `access` | calls that hand the kernel memory to read: write, send, fwrite, paths |
//! | `service` | the thread that shares the budget with other processes and answers SIGUSR2 |
//! | `reports` | what the process says when it ends |
//! | `trap` | `--compat`: system calls that bypass the C library |
//! | `capi` | the C interface, declared in `include/faultless.h` |
//!
//! Rules for whoever changes a file here. Any function can be called at any time: before `main`, by the memory allocator, in
//! a signal handler, in a child of `vfork`. So the way of a call that concerns no mapping of ours is short: a few loads of
//! atomics, no lock, no allocation, errno untouched. What takes the lock has all signals blocked meanwhile, and touches no
//! memory of the program's.

mod access;
mod capi;
mod decide;
mod descriptors;
mod mappings;
mod real;
mod reports;
mod service;
mod signals;
mod state;
mod trap;
