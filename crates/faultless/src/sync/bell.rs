//! A bell: something to wait for, and to ring.

use crate::base::futex::{Futex, Wake};
use crate::base::ids::Nanos;
use crate::base::primitive::{AtomicU32, Ordering, fence};

/// A bell. A thread that has something for another rings; the other sleeps until then.
///
/// The one publishes what it has and *then* looks for sleepers; the other counts itself among the sleepers and *then* looks for
/// what there is. The fences put both into one order, so that either the one sees the sleeper, or the other sees what there is
/// to do, however weakly that was published.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rung: Futex,
    sleepers: AtomicU32,
}

impl Bell {
    /// Wakes one sleeper, if there is one.
    pub(crate) fn ring(&self) {
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::Relaxed) > 0 {
            self.rung.bump(Wake::One);
        }
    }

    /// Wakes all sleepers.
    pub(crate) fn ring_all(&self) {
        self.rung.bump(Wake::All);
    }

    /// Sleeps until rung, unless `idle` says (after this sleeper can be seen) that there is something to do.
    pub(crate) fn sleep(&self, time: Nanos, idle: impl FnOnce() -> bool) {
        let ticket = self.rung.ticket();
        self.sleepers.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if idle() {
            self.rung.wait(ticket, time);
        }
        self.sleepers.fetch_sub(1, Ordering::Relaxed);
    }
}
