//! What threads hand to each other, and wait for, without any knowledge of maps. Except for `blocks`, without locks and the heap.

pub(crate) mod arrivals;
pub(crate) mod bell;
#[cfg(not(loom))]
pub(crate) mod blocks;
pub(crate) mod budget;
pub(crate) mod handover;
#[cfg_attr(
    loom,
    allow(dead_code, reason = "live mappings use it, which are not modelled")
)]
pub(crate) mod holders;
#[cfg(not(loom))]
pub(crate) mod huge_slots;
#[cfg(not(loom))]
pub(crate) mod outbox;
pub(crate) mod portions;
pub(crate) mod ring;
pub(crate) mod staging;
pub(crate) mod turnstile;
#[cfg(not(loom))]
pub(crate) mod withheld;
