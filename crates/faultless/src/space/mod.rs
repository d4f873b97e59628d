//! The engine's picture of address space: maps and how they are found, the words of their units, what is still theirs.

#[cfg(not(loom))]
pub(crate) mod alias;
#[cfg(not(loom))]
pub(crate) mod around;
#[cfg(not(loom))]
pub(crate) mod cooling;
#[cfg(not(loom))]
pub(crate) mod counters;
#[cfg(not(loom))]
pub(crate) mod fds;
pub(crate) mod gate;
#[cfg(not(loom))]
pub(crate) mod identity;
#[cfg(not(loom))]
pub(crate) mod last_looks;
#[cfg(not(loom))]
pub(crate) mod live;
#[cfg(not(loom))]
pub(crate) mod map_core;
pub(crate) mod page;
#[cfg(not(loom))]
pub(crate) mod pool_core;
#[cfg(not(loom))]
pub(crate) mod recorder;
#[cfg(not(loom))]
pub(crate) mod region;
#[cfg(not(loom))]
pub(crate) mod registry;
#[cfg(not(loom))]
pub(crate) mod streams;
pub(crate) mod table;
#[cfg(not(loom))]
pub(crate) mod trips;
#[cfg(all(test, loom))]
mod unit_models;
