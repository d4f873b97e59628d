//! What every floor may name: numbers, sizes, errors, the trait of sources, threads, and memory of the engine's own.

pub(crate) mod area;
#[cfg(not(any(loom, faultless_sim)))]
pub(crate) mod arena;
pub(crate) mod array;
#[cfg(not(any(loom, faultless_sim)))]
pub(crate) mod channel;
pub(crate) mod clock;
#[cfg(not(loom))]
pub(crate) mod descriptor;
#[cfg(not(loom))]
pub(crate) mod error;
#[cfg(not(loom))]
pub(crate) mod event;
pub(crate) mod futex;
pub(crate) mod ids;
#[cfg(not(loom))]
pub(crate) mod memory;
pub(crate) mod padded;
pub(crate) mod primitive;
pub(crate) mod process;
#[cfg(not(any(loom, faultless_sim)))]
pub(crate) mod pthread;
#[cfg(not(loom))]
pub(crate) mod size;
#[cfg(not(loom))]
pub(crate) mod source;
#[cfg(not(loom))]
pub(crate) mod stats;
#[cfg(not(any(loom, faultless_sim)))]
pub(crate) mod stay;
#[cfg(not(loom))]
pub(crate) mod text;
#[cfg(not(loom))]
pub(crate) mod thread;
