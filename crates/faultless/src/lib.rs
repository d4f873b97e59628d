//! File maps whose misses stay off `mmap_lock`.
//!
//! Threads that share an address space stall each other when they take major page faults: the kernel reads the page,
//! then retries the fault under `mmap_lock`, the one lock that every thread of the process shares. Behind a busy
//! `mmap`/`munmap`, a `fork`, or an agent that reads `/proc/PID/smaps`, a service with mapped files falls to a fraction
//! of its speed. This crate serves the misses itself, in the thread that faulted, under the lock of one mapping (Linux 6.9
//! and later). The exception is `fork`: the kernel locks every mapping while it copies the process, and a miss in that time
//! takes `mmap_lock` as any other does.
//!
//! ```
//! # let dir = tempfile::tempdir_in(std::env::current_dir().unwrap())?;
//! # let path = dir.path().join("index.bin");
//! # std::fs::write(&path, vec![1u8; 1 << 20])?;
//! use faultless::{ByteSize, Pool};
//!
//! let pool = Pool::builder().memory(ByteSize::mib(256)).build()?;
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
//! | the same, for files that change | `unsafe { pool.map_live(&file) }`: the kernel's mapping, and explicit loads without `mmap_lock` |
//! | memory use is the kernel's affair | [`Pool`] has a budget, shared by all its maps |
//! | a fault for each absent page | [`Map::load`] asks first: a miss without a fault and a signal |
//! | a read error is SIGBUS | [`Map::load`] and [`Map::pin`] return an error of their own reads; on a plain load it is SIGBUS, with a line on stderr |
//! | one fault after the other | [`Map::load_many`] and [`Map::pin_many`] read many ranges at the depth of the device |
//! | a fault stalls an executor's thread | [`Map::load_async`] and [`Map::pin_async`] do not |
//! | slices borrow the map | [`PinnedOwned`] keeps it, and becomes `Bytes` with the feature `bytes` |
//! | `advise(WillNeed)` | [`Map::prefetch`]; [`Map::record`] and [`Map::warm`] bring in what the last run used |
//! | files | files, and whatever implements [`Source`] |
//!
//! # What it wants
//!
//! Linux 6.9 or later for all of it, no privilege. Where userfaultfd is not to be had, the same API runs on the
//! kernel's mmap, and a safe map is a copy in memory; [`Pool::backend`] tells, and [`PoolBuilder::require_full`] refuses. The process's SIGBUS handler is the engine's (faults that are not its own
//! go on to the handler that was there before). A handler that another part of the program installs *later* takes its
//! place: [`Pool::map`] then fails with [`Error::HandlerReplaced`]. Such code must come first.

#![cfg_attr(
    loom,
    allow(dead_code, unused_imports, reason = "the models use a part of it")
)]

#[cfg(not(loom))]
mod api;
mod base;
#[cfg(not(loom))]
mod coherence;
#[cfg(not(loom))]
mod evict;
#[cfg(not(loom))]
mod fault;
#[cfg(not(loom))]
#[cfg_attr(
    faultless_sim,
    allow(dead_code, reason = "a simulated fork has no child")
)]
mod guards;
#[cfg(not(loom))]
mod read;
mod space;
mod sync;

#[cfg(not(loom))]
pub use api::advice::{Advice, GuardMarkers, Reads};
#[cfg(not(loom))]
pub use api::backend::{Backend, BackendChoice};
#[cfg(not(loom))]
pub use api::builder::PoolBuilder;
#[cfg(not(loom))]
pub use api::futures::{LoadFuture, PinFuture};
#[cfg(not(loom))]
#[doc(hidden)]
pub use api::live;
#[cfg(not(loom))]
pub use api::map::Map;
#[cfg(not(loom))]
pub use api::options::MapOptions;
#[cfg(not(loom))]
pub use api::owned::PinnedOwned;
#[cfg(not(loom))]
pub use api::pin::Pinned;
#[cfg(not(loom))]
pub use api::pool::{Batches, Pool, PoolStats};
#[cfg(not(loom))]
pub use api::prefetching::{Prefetched, Prefetching};
#[cfg(faultless_sim)]
#[doc(hidden)]
pub use api::simulation;
#[cfg(not(loom))]
#[doc(hidden)]
pub use api::standin;
#[cfg(not(loom))]
pub use api::working_set::{Recording, Warmed};
#[cfg(not(loom))]
pub use base::error::{Error, LeaseRefusal};
#[cfg(not(loom))]
pub use base::event::Event;
#[cfg(not(loom))]
pub use base::size::{ByteSize, ParseByteSizeError};
#[cfg(not(loom))]
pub use base::source::Source;
#[cfg(not(loom))]
pub use base::stats::{Latency, Stats};
#[cfg(not(loom))]
pub use coherence::lease::OnBreak;

/// For this project's own tools. Not a part of the interface: it may change with any release.
#[cfg(not(loom))]
#[doc(hidden)]
pub mod internals {
    pub use crate::api::builder::{default_budget, memory_limit};
    pub use crate::base::ids::{Entry, Serial, Slot};
    pub use crate::evict::policy;
}
