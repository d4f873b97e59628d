//! What threads hand to each other, and wait for: lock-free, without the heap, and without any knowledge of maps.

pub(crate) mod bell;
#[cfg(not(loom))]
pub(crate) mod blocks;
pub(crate) mod budget;
pub(crate) mod handover;
#[cfg(not(loom))]
pub(crate) mod outbox;
#[cfg(not(loom))]
pub(crate) mod ring;
#[cfg(not(loom))]
pub(crate) mod staging;
