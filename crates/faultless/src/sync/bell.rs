//! A bell: something to wait for, and to ring.

use crate::base::primitive::{AtomicU32, Ordering};
use faultless_sys::futex;

/// Something to wait for and to ring.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rung: AtomicU32,
    sleepers: AtomicU32,
}

impl Bell {
    /// Wakes one sleeper, if there is one.
    pub(crate) fn ring(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.rung.fetch_add(1, Ordering::SeqCst);
            futex::wake(&self.rung, 1);
        }
    }

    /// Wakes all sleepers.
    pub(crate) fn ring_all(&self) {
        self.rung.fetch_add(1, Ordering::SeqCst);
        futex::wake(&self.rung, futex::ALL);
    }

    /// Sleeps until rung, unless `idle` says (after this sleeper can be seen) that there is something to do.
    pub(crate) fn sleep(&self, timeout_ns: u64, idle: impl FnOnce() -> bool) {
        let ticket = self.rung.load(Ordering::SeqCst);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        if idle() {
            futex::wait(&self.rung, ticket, timeout_ns);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}
