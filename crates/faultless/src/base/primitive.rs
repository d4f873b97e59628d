//! What threads share: the standard library's atomics and locks in a build, loom's under `--cfg loom`, and those of the
//! simulated machine under `--cfg faultless_sim`.

#[cfg(faultless_sim)]
pub(crate) use faultless_sys::simulated::{
    AtomicBool, AtomicI32, AtomicI64, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize,
    Mutex, MutexGuard, OnceLock, Ordering, fence, mpsc,
};
#[cfg(loom)]
pub(crate) use loom::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};
#[cfg(not(any(loom, faultless_sim)))]
pub(crate) use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicI64, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize,
    Ordering, fence,
};
#[cfg(not(any(loom, faultless_sim)))]
pub(crate) use std::sync::{Mutex, MutexGuard, OnceLock};

#[cfg(not(any(loom, faultless_sim)))]
pub(crate) use crate::base::channel as mpsc;

/// For statics that no model is about: loom's atomics live only as long as a model.
#[cfg(loom)]
pub(crate) mod fixed {
    pub(crate) use std::sync::atomic::{AtomicPtr, AtomicU32};
}
#[cfg(not(loom))]
pub(crate) mod fixed {
    pub(crate) use super::{AtomicPtr, AtomicU32};
}

/// Takes a lock, whatever became of a thread that had it.
#[cfg(not(loom))]
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A word as the kernel interface takes it.
#[cfg(not(any(loom, faultless_sim)))]
pub(crate) fn real(word: &AtomicU32) -> &std::sync::atomic::AtomicU32 {
    word
}

/// A word as the kernel interface takes it.
#[cfg(faultless_sim)]
pub(crate) fn real(word: &AtomicU32) -> &std::sync::atomic::AtomicU32 {
    word.real()
}
