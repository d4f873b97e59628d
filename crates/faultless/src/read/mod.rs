//! Reading in ordinary contexts: users' sources, prefetches, and windows that are read ahead.

pub(crate) mod blocks;
pub(crate) mod fill_threads;
pub(crate) mod gather;
pub(crate) mod lanes;
pub(crate) mod prefetch;
pub(crate) mod progress;
pub(crate) mod requests;
pub(crate) mod rings;
pub(crate) mod uring;
pub(crate) mod workers;
