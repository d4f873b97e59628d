//! How many bytes the pool may hold, and how many it does.

use crate::base::futex::{Futex, Wake};
use crate::base::ids::Nanos;
use crate::base::primitive::{AtomicU32, AtomicU64, Ordering, fence};

/// A limit and what is charged against it: frames (memory of resident units), staging buffers, page states, queues.
///
/// A thread that waits for room counts itself among the waiting and *then* looks for room; one that makes room does so and
/// *then* looks for waiting threads. The fences put both into one order, so that no release is missed.
/// (A charge that is refused shows for a moment as used: a thread that looks just then sleeps for its time.)
#[derive(Debug)]
pub(crate) struct Budget {
    limit: AtomicU64,
    used: AtomicU64,
    peak: AtomicU64,
    /// Bumped on release while a thread waits.
    released: Futex,
    waiting: AtomicU32,
}

impl Budget {
    pub(crate) fn new(limit: u64) -> Self {
        Budget {
            limit: AtomicU64::new(limit),
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            released: Futex::default(),
            waiting: AtomicU32::new(0),
        }
    }

    pub(crate) fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    pub(crate) fn set_limit(&self, bytes: u64) {
        self.limit.store(bytes, Ordering::Relaxed);
        self.wake();
    }

    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Most bytes ever charged at once, as far as the evictor saw it.
    pub(crate) fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed).max(self.used())
    }

    pub(crate) fn note_peak(&self) {
        self.peak.fetch_max(self.used(), Ordering::Relaxed);
    }

    /// Charges `bytes` if they fit.
    pub(crate) fn try_charge(&self, bytes: u64) -> bool {
        let before = self.used.fetch_add(bytes, Ordering::AcqRel);
        if before + bytes <= self.limit() {
            return true;
        }
        self.used.fetch_sub(bytes, Ordering::AcqRel);
        false
    }

    /// Charges `bytes` whether they fit or not: for what is small, bounded and cannot wait.
    pub(crate) fn charge_anyway(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::AcqRel);
    }

    pub(crate) fn release(&self, bytes: u64) {
        let before = self.used.fetch_sub(bytes, Ordering::AcqRel);
        debug_assert!(before >= bytes, "released {bytes} of {before}");
        self.wake_waiting();
    }

    fn wake_waiting(&self) {
        fence(Ordering::SeqCst);
        if self.waiting.load(Ordering::Relaxed) > 0 {
            self.wake();
        }
    }

    fn wake(&self) {
        self.released.bump(Wake::All);
    }

    /// Sleeps until something was released, for `time` at most, unless `bytes` fit already.
    pub(crate) fn wait(&self, bytes: u64, time: Nanos) {
        let ticket = self.released.ticket();
        self.waiting.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if self.used() + bytes > self.limit() {
            self.released.wait(ticket, time);
        }
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Time never runs out in the model: a release that a waiting thread misses is a thread that sleeps for ever.
    #[test]
    fn a_thread_that_waits_for_room_sees_each_release() {
        loom::model(|| {
            let budget = Arc::new(Budget::new(2));
            budget.charge_anyway(2);
            let frees = {
                let budget = budget.clone();
                thread::spawn(move || budget.release(1))
            };
            while !budget.try_charge(1) {
                budget.wait(1, Nanos::from_millis(1));
            }
            frees.join().unwrap();
            assert_eq!(budget.used(), 2);
        });
    }

    /// Two that want the last byte: one gets it, and neither leaves a charge behind that it did not get.
    #[test]
    fn the_last_byte_is_charged_once() {
        loom::model(|| {
            let budget = Arc::new(Budget::new(1));
            let other = {
                let budget = budget.clone();
                thread::spawn(move || budget.try_charge(1))
            };
            let mine = budget.try_charge(1);
            let others = other.join().unwrap();
            // (Each may see the other's charge before it is taken back, so both may be refused.)
            assert!(!(mine && others));
            assert_eq!(budget.used(), u64::from(mine) + u64::from(others));
        });
    }
}
