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

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::base::primitive::AtomicBool;
    use loom::sync::Arc;
    use loom::thread;

    /// Time never runs out in the model: a ring that is missed is a thread that sleeps for ever.
    #[test]
    fn no_work_is_slept_through_however_weakly_it_is_published() {
        loom::model(|| {
            let shared = Arc::new((Bell::default(), AtomicBool::new(false)));
            let rings = {
                let shared = shared.clone();
                thread::spawn(move || {
                    shared.1.store(true, Ordering::Relaxed);
                    shared.0.ring();
                })
            };
            while !shared.1.load(Ordering::Relaxed) {
                shared
                    .0
                    .sleep(Nanos::from_secs(1), || !shared.1.load(Ordering::Relaxed));
            }
            rings.join().unwrap();
        });
    }
}
