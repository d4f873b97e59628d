//! File maps whose misses never take `mmap_lock`.
//!
//! Threads that share an address space stall each other when they take major page faults: the kernel reads the page,
//! then retries the fault under `mmap_lock`, the one lock that every thread of the process shares. Behind a busy
//! `mmap`/`munmap`, a `fork`, or an agent that reads `/proc/PID/smaps`, a service with mapped files falls to a fraction
//! of its speed. This crate serves the misses itself, in the thread that faulted, and takes that lock never.
//!
//! ```
//! # let dir = tempfile::tempdir_in(std::env::current_dir().unwrap())?;
//! # let path = dir.path().join("index.bin");
//! # std::fs::write(&path, vec![1u8; 1 << 20])?;
//! use faultless::{Bytes, Pool};
//!
//! let pool = Pool::builder().memory(Bytes::mib(256)).build()?;
//! let map = pool.map(std::fs::File::open(&path)?)?; // safe: a read lease guards the bytes
//! let sum: u64 = map.iter().map(|&b| u64::from(b)).sum();
//! # assert_eq!(sum, 1 << 20);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # How
//!
//! A [`Map`] is anonymous memory that is registered with userfaultfd in SIGBUS mode. A touch of an absent page raises
//! SIGBUS in the thread, without a lock of the memory manager. The handler claims the page in a table of atomic words,
//! reads it from the file into a buffer, installs it with `UFFDIO_COPY` (under the per-VMA lock), and returns; the load
//! runs again. Resident pages are plain memory. What stays resident is the engine's decision, within the budget of the
//! [`Pool`]; an evictor thread makes room ahead of need, in large batches.
//!
//! # Beside memmap2
//!
//! | memmap2 | here |
//! |---|---|
//! | `unsafe { Mmap::map(&file) }` | [`pool.map(&file)`](Pool::map): safe, under a read lease |
//! | the same, for files that cannot be leased | `unsafe { pool.map_trusted(file) }` |
//! | memory use is the kernel's affair | [`Pool`] has a budget, shared by all its maps |
//! | a read error is SIGBUS | [`Map::pin`] returns it; on a plain load it is SIGBUS, with a line on stderr |
//! | `advise(WillNeed)` | [`Map::prefetch`] |
//! | files | files, and whatever implements [`Source`] |
//!
//! # What it wants
//!
//! Linux 6.9 or later for all of it, no privilege. Where userfaultfd is not to be had, the same API runs on the
//! kernel's mmap; [`Pool::backend`] tells. The process's SIGBUS handler is the engine's (faults that are not its own
//! go on to the handler that was there before). A handler that another part of the program installs *later* takes its
//! place: [`Pool::map`] then fails with [`Error::HandlerReplaced`]. Such code must come first.

#[cfg(not(loom))]
mod alias;
#[cfg(not(loom))]
mod bytes;
#[cfg(not(loom))]
mod error;
#[cfg(not(loom))]
mod evict;
mod fault;
#[cfg(not(loom))]
mod fork;
#[cfg(not(loom))]
mod keeper;
#[cfg(not(loom))]
mod lease;
#[cfg(not(loom))]
mod map;
#[cfg(not(loom))]
mod memory;
#[cfg(not(loom))]
mod moved;
#[cfg(not(loom))]
mod options;
#[cfg(not(loom))]
mod plain;
#[cfg(not(loom))]
mod pool;
mod primitive;
#[cfg(not(loom))]
mod source;
#[cfg(not(loom))]
#[doc(hidden)]
pub mod standin;
mod thread;
#[cfg(not(loom))]
mod workers;

#[cfg(not(loom))]
pub use bytes::{Bytes, ParseBytesError};
#[cfg(not(loom))]
pub use error::{Error, LeaseRefusal};
#[cfg(not(loom))]
pub use fault::counters::{Latency, Stats};
#[cfg(not(loom))]
pub use lease::OnBreak;
#[cfg(not(loom))]
pub use map::{Map, Pinned};
#[cfg(not(loom))]
pub use options::{Advice, MapOptions, Reads};
#[cfg(not(loom))]
pub use pool::{Backend, BackendChoice, Pool, PoolBuilder, PoolStats};
#[cfg(not(loom))]
pub use source::Source;

/// For this project's own tools. Not a part of the interface: it may change with any release.
#[cfg(not(loom))]
#[doc(hidden)]
pub mod internals {
    pub use crate::evict::policy;
    pub use crate::pool::default_budget;
}
