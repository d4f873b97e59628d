//! What users of the crate see, and the assembly of pools and maps.

pub(crate) mod advice;
mod assemble;
pub(crate) mod backend;
pub(crate) mod backing;
pub(crate) mod batch;
pub(crate) mod builder;
pub(crate) mod engine;
pub(crate) mod futures;
pub(crate) mod huge_pages;
pub(crate) mod kernel_map;
pub mod live;
mod load;
pub(crate) mod map;
pub(crate) mod options;
pub(crate) mod owned;
pub(crate) mod pin;
pub(crate) mod pool;
pub(crate) mod prefetching;
pub(crate) mod promise;
#[cfg(faultless_sim)]
pub mod simulation;
pub mod standin;
pub(crate) mod working_set;
mod write_to;
