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
//! | `serving` | what serves a mapping: a stand-in, or markers in the kernel's own |
//! | `decide` | which mappings are taken over, and why others are not |
//! | `threads`, `waiting`, `smaps` | nothing is taken over while the program has one thread; what is when it creates a second |
//! | `mappings` | mmap, munmap, mremap, mprotect, madvise, mlock, mincore |
//! | `descriptors` | close, dup2 and their kin; POSIX locks |
//! | `signals` | sigaction and masks: SIGBUS stays the engine's, and unblocked |
//! | `writes`, `stdio`, `short` | calls that hand the kernel memory to read: write, send, fwrite; paths and other short things |
//! | `fills` | calls that have the kernel write to memory: recv, fread, wait; what keeps memory for later: stacks, buffers of streams |
//! | `memory` | `read` and `pread`; reads of `/proc/self/mem` |
//! | `exec` | calls that execute a program, and what they hand on to it |
//! | `process` | calls that end, copy or confine the process |
//! | `privileges` | calls with which it gives up a privilege |
//! | `raw` | the C library's `syscall` |
//! | `heap` | the engine's own allocations, apart from the program's |
//! | `lend` | what the kernel is given to read in the place of memory that may be absent |
//! | `probe` | memory of the program's that may not be there |
//! | `counters` | EFAULT, counted |
//! | `limits` | whether the engine fits into a process as it is |
//! | `service` | the thread that shares the budget with other processes and answers SIGUSR2 |
//! | `reports` | what the process says when it ends |
//! | `trap` | `--compat`: system calls that bypass the C library |
//! | `capi` | the C interface, declared in `include/faultless.h` |
//!
//! Rules for whoever changes a file here. Any function can be called at any time: before `main`, by the memory allocator, in
//! a signal handler, in a child of `vfork`. So:
//!
//! 1. Until it is known that a call concerns a mapping of ours, it costs a few loads of atomics: no allocation, no lock, no
//!    lazily initialised thread-local, no function that somebody may stand before, errno untouched.
//! 2. No pointer of the program's is followed before the kernel has, or `probe` has asked it.
//! 3. A call that promises to do its work in one piece is made once.
//! 4. A thread that holds the lock has all signals blocked and touches no memory of the program's. A thread that waits for it has
//!    the program's signal mask.

mod capi;
mod counters;
mod decide;
mod descriptors;
mod exec;
mod fills;
mod heap;
mod lend;
mod limits;
mod mappings;
mod memory;
mod privileges;
mod probe;
mod process;
mod raw;
mod real;
mod reports;
mod service;
mod serving;
mod short;
mod signals;
mod smaps;
mod state;
mod stdio;
mod threads;
mod trap;
mod waiting;
mod writes;
