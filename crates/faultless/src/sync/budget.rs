//! How many bytes the pool may hold, and how many it does.

use crate::base::primitive::{AtomicU64, Ordering};
use crate::sync::turnstile::Turnstile;

/// A limit and what is charged against it: frames (memory of resident units), staging buffers, page states, queues.
///
#[derive(Debug)]
pub(crate) struct Budget {
    /// What its user allows.
    limit: AtomicU64,
    /// The bytes for which the control group has room.
    cap: AtomicU64,
    used: AtomicU64,
    peak: AtomicU64,
    /// Threads that wait for room.
    pub(crate) line: Turnstile,
}

impl Budget {
    pub(crate) fn new(limit: u64) -> Self {
        Budget {
            limit: AtomicU64::new(limit),
            cap: AtomicU64::new(u64::MAX),
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            line: Turnstile::default(),
        }
    }

    /// What may be used: what the user allows, or what there is room for if that is less.
    pub(crate) fn limit(&self) -> u64 {
        self.allowed().min(self.cap())
    }

    /// What the user allows.
    pub(crate) fn allowed(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// The bytes for which the control group has room.
    pub(crate) fn cap(&self) -> u64 {
        self.cap.load(Ordering::Relaxed)
    }

    pub(crate) fn set_cap(&self, bytes: u64) {
        self.cap.store(bytes, Ordering::Relaxed);
        self.line.call();
    }

    pub(crate) fn set_limit(&self, bytes: u64) {
        self.limit.store(bytes, Ordering::Relaxed);
        self.line.call();
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

    /// Whether `bytes` would fit.
    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        self.used().saturating_add(bytes) <= self.limit()
    }

    /// Charges `bytes` if they fit.
    pub(crate) fn try_charge(&self, bytes: u64) -> bool {
        let limit = self.limit();
        let more = |used: u64| (used + bytes <= limit).then_some(used + bytes);
        let used = &self.used;
        used.fetch_update(Ordering::AcqRel, Ordering::Relaxed, more)
            .is_ok()
    }

    /// Charges `bytes` whether they fit or not: for what is small, bounded and cannot wait.
    pub(crate) fn charge_anyway(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::AcqRel);
    }

    pub(crate) fn release(&self, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let before = self.used.fetch_sub(bytes, Ordering::AcqRel);
        debug_assert!(before >= bytes, "released {bytes} of {before}");
        self.line.call();
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use crate::base::ids::Nanos;
    use crate::sync::turnstile::Answer;
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
            let charge = |_| match budget.try_charge(1) {
                true => Answer::Pass(()),
                false => Answer::Wait,
            };
            let room = |bytes| budget.has_room(bytes);
            budget.line.wait(1, Nanos::from_secs(1), room, charge);
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
            assert!(mine != others);
            assert_eq!(budget.used(), 1);
        });
    }
}
