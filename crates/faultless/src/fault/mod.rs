//! The fault path: everything that may run inside the SIGBUS handler, in one folder.
//!
//! Whoever changes a file here keeps these rules: raw system calls, atomics and futexes only; no heap, no lock, no
//! thread-local, no panic that a caller could provoke; little stack; every loop bounded, every wait with a time limit
//! after which it looks again. (Constructors and destructors, which run in ordinary contexts, may do more; they are
//! the functions that return owned values or take a `Mutex`.)
//!
//! The way of a miss: [`handler`] → [`registry`] and [`gate`] (whose address is it?) → [`fill`] (claim in [`table`] and [`page`],
//! charge to [`budget`], read into [`staging`], check, install, publish to [`ring`]) → back to the load.

#[cfg(not(loom))]
pub(crate) mod ahead;
#[cfg(not(loom))]
pub(crate) mod area;
#[cfg(not(loom))]
pub(crate) mod budget;
#[cfg(not(loom))]
pub(crate) mod cooling;
#[cfg(not(loom))]
pub(crate) mod core;
#[cfg(not(loom))]
pub(crate) mod counters;
#[cfg(not(loom))]
pub(crate) mod fds;
#[cfg(not(loom))]
pub(crate) mod fill;
pub(crate) mod gate;
#[cfg(not(loom))]
pub(crate) mod handler;
#[cfg(not(loom))]
pub(crate) mod identity;
pub(crate) mod page;
#[cfg(not(loom))]
pub(crate) mod process;
#[cfg(not(loom))]
pub(crate) mod registry;
#[cfg(not(loom))]
pub(crate) mod report;
#[cfg(not(loom))]
pub(crate) mod ring;
#[cfg(not(loom))]
pub(crate) mod staging;
#[cfg(not(loom))]
pub(crate) mod table;
