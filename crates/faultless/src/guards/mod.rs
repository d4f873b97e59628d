//! Live mappings: the kernel's own mappings of files, whose misses are read outside `mmap_lock`.
//!
//! Guard markers (`MADV_GUARD_INSTALL`) stand in the page table where pages of the file are not in memory. A touch of a marker raises
//! SIGSEGV in the thread, under the lock of that one VMA. The handler has the page cache read the page, by a `pread` that takes no lock
//! of the memory management, and removes the marker. The load runs again, and takes an ordinary minor fault.
//!
//! Bytes, sharing, reclaim, truncation and writers are the kernel's affair. Whatever goes wrong in a miss, the marker is removed, and the
//! kernel serves the load as it would have without us. What could do harm is the installation of markers ([`sweep`]).
//!
//! The way of a live miss: [`handler`] → [`table`] (whose address is it?) → [`serve`] → back to the load. [`sweep`] installs the
//! markers, and puts them back on pages that the kernel has reclaimed. The rules of the fault path hold for the first three.

pub(crate) mod files;
pub(crate) mod fork;
pub(crate) mod handler;
pub(crate) mod mapping;
pub(crate) mod maps;
pub(crate) mod serve;
pub(crate) mod support;
pub(crate) mod sweep;
pub(crate) mod sweeper;
pub(crate) mod table;
