//! How many bytes the pool may hold, and how many it does.

use crate::base::padded::Padded;
use crate::base::primitive::{AtomicU64, Ordering, fence};
use crate::sync::portions::Portions;
use crate::sync::turnstile::Turnstile;

/// Most bytes that a processor has at hand of a budget.
const PORTION_MAX: u64 = 64 << 10;
/// The part of a limit that a processor has at hand, as a divisor. (In simulated pools, which are small, portions are larger.)
#[cfg(not(any(loom, faultless_sim)))]
const PORTION_SHARE: u64 = 4096;
#[cfg(faultless_sim)]
const PORTION_SHARE: u64 = 64;
#[cfg(loom)]
const PORTION_SHARE: u64 = 4;
/// Portions are whole pages. (In a model, a page is one byte.)
#[cfg(not(loom))]
const STEP: u64 = faultless_sys::mem::PAGE as u64;
#[cfg(loom)]
const STEP: u64 = 1;

/// The size of a portion of a sum with that limit. It is 0 if the limit is small.
pub(crate) fn portion_of(limit: u64) -> u64 {
    (limit / PORTION_SHARE / STEP * STEP).min(PORTION_MAX)
}

/// A limit and what is charged against it: frames (memory of resident units), staging buffers, page states, queues.
///
/// Threads charge in portions ([`Portions`]), so that they write the sum once for many misses. Portions count as used. Before a charge is
/// refused, all portions are given back. While a thread waits for room, no portion is left to a processor.
#[derive(Debug)]
pub(crate) struct Budget {
    /// What its user allows.
    limit: AtomicU64,
    /// The bytes for which the control group has room.
    cap: AtomicU64,
    used: Padded<AtomicU64>,
    at_hand: Portions,
    peak: Padded<AtomicU64>,
    /// Threads that wait for room.
    pub(crate) line: Turnstile,
}

impl Budget {
    pub(crate) fn new(limit: u64) -> Self {
        Budget {
            limit: AtomicU64::new(limit),
            cap: AtomicU64::new(u64::MAX),
            used: Padded::default(),
            at_hand: Portions::default(),
            peak: Padded::default(),
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
        self.gather();
        self.line.call();
    }

    pub(crate) fn set_limit(&self, bytes: u64) {
        self.limit.store(bytes, Ordering::Relaxed);
        self.gather();
        self.line.call();
    }

    /// All charges, and the rests of portions.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// All charges, without the rests of portions.
    pub(crate) fn charged(&self) -> u64 {
        let at_hand = self.at_hand.left();
        self.used().saturating_sub(at_hand)
    }

    /// Most bytes ever charged at once, as far as the evictor saw it.
    pub(crate) fn peak(&self) -> u64 {
        self.peak.load(Ordering::Relaxed).max(self.charged())
    }

    pub(crate) fn note_peak(&self) {
        self.peak.fetch_max(self.charged(), Ordering::Relaxed);
    }

    /// Whether `bytes` would fit.
    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        self.used().saturating_add(bytes) <= self.limit()
    }

    /// Whether `bytes` would fit. Gathers portions, if they are what leaves no room.
    pub(crate) fn makes_room(&self, bytes: u64) -> bool {
        self.has_room(bytes) || (self.gather() && self.has_room(bytes))
    }

    /// Charges `bytes` if they fit.
    pub(crate) fn try_charge(&self, bytes: u64) -> bool {
        let portion = portion_of(self.limit());
        if bytes <= portion && (self.at_hand.take(bytes) || self.charge_portion(bytes, portion)) {
            return true;
        }
        self.charge_exactly(bytes) || (self.gather() && self.charge_exactly(bytes))
    }

    fn charge_exactly(&self, bytes: u64) -> bool {
        let limit = self.limit();
        let more = |used: u64| (used + bytes <= limit).then_some(used + bytes);
        let used = &self.used;
        used.fetch_update(Ordering::AcqRel, Ordering::Relaxed, more)
            .is_ok()
    }

    /// Charges `bytes` and a portion for the next threads on this processor, if no thread waits and both fit.
    fn charge_portion(&self, bytes: u64, portion: u64) -> bool {
        if self.line.crowded() || !self.charge_exactly(bytes + portion) {
            return false;
        }
        self.release(self.at_hand.leave(portion));
        // A thread that waits counts itself first and gathers portions then: it finds this one, or is found here.
        fence(Ordering::SeqCst);
        if self.line.crowded() {
            self.gather();
        }
        true
    }

    /// Gives back the rests of all portions. Returns whether there were any.
    pub(crate) fn gather(&self) -> bool {
        let gathered = self.at_hand.gather();
        self.release(gathered);
        gathered > 0
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
    use crate::base::process;
    use crate::sync::turnstile::Answer;
    use loom::sync::Arc;
    use loom::thread;

    fn wait_for_a_byte(budget: &Budget) {
        let charge = |_| match budget.try_charge(1) {
            true => Answer::Pass(()),
            false => Answer::Wait,
        };
        let room = |bytes| budget.has_room(bytes);
        budget.line.wait(1, Nanos::from_secs(1), room, charge);
    }

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
            wait_for_a_byte(&budget);
            frees.join().unwrap();
            assert_eq!(budget.used(), 2);
        });
    }

    /// One thread charges while another waits for room. The portion that the first leaves to its processor must not be kept from the other,
    /// which sleeps for ever if it finds no room and is not called.
    #[test]
    fn a_thread_that_waits_for_room_gets_what_lies_in_portions() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(|| {
            let budget = Arc::new(Budget::new(4));
            budget.charge_anyway(2);
            let other = {
                let budget = budget.clone();
                thread::spawn(move || {
                    process::PROCESSOR.with(|p| p.set(1));
                    assert!(budget.try_charge(1));
                })
            };
            wait_for_a_byte(&budget);
            other.join().unwrap();
            assert_eq!((budget.charged(), budget.used()), (4, 4));
        });
    }

    /// Two that charge and release leave nothing behind but what lies in portions.
    #[test]
    fn portions_add_up() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(|| {
            let budget = Arc::new(Budget::new(8));
            let other = {
                let budget = budget.clone();
                // (On the same processor.)
                thread::spawn(move || {
                    assert!(budget.try_charge(1) && budget.try_charge(2));
                    budget.release(3);
                })
            };
            assert!(budget.try_charge(2));
            other.join().unwrap();
            assert_eq!(budget.charged(), 2);
            assert!(budget.used() <= 2 + 2 * portion_of(8));
            budget.gather();
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

#[cfg(all(test, not(loom), not(faultless_sim)))]
mod tests {
    use super::*;

    #[test]
    fn portions_are_a_small_part_of_the_limit() {
        assert_eq!(
            [2 << 20, 16 << 20, 1 << 30].map(portion_of),
            [0, 4096, PORTION_MAX]
        );
        assert_eq!(portion_of(u64::MAX), PORTION_MAX);
    }

    /// All of the budget can be charged, though other processors have portions.
    #[test]
    fn portions_refuse_no_charge_that_fits() {
        let budget = Budget::new(64 << 20);
        assert!(budget.try_charge(4096));
        assert!(budget.used() > budget.charged());
        assert_eq!(budget.charged(), 4096);
        assert!(budget.try_charge((64 << 20) - 4096));
        assert!(!budget.try_charge(4096));
        assert_eq!((budget.used(), budget.charged()), (64 << 20, 64 << 20));
        budget.release(4096);
        assert!(budget.try_charge(4096));
    }
}
