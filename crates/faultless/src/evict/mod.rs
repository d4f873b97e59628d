//! Eviction: a thread for each pool that makes room ahead of need, off the fault path.

mod batch;
pub(crate) mod cooler;
mod crew;
pub(crate) mod evictor;
pub(crate) mod limits;
pub mod policy;
mod pressure;
pub(crate) mod release;
mod turn;
