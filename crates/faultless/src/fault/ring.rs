//! Two bounded queues that the fault path may push to: [`Ring`] carries words to one consumer (the evictor), [`Handover`]
//! carries pointers to several (the fill threads). Neither allocates after it was made, neither has a lock.

#![allow(
    unsafe_code,
    reason = "slots live in mapped memory that is zero until first touched"
)]

use super::area::Area;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Many producers, one consumer. An entry is any non-zero word.
///
/// A producer takes a slot by advancing `head`, then publishes by storing the entry; zero means "taken, not published
/// yet". The consumer stops at such a slot and comes back. Slots are zero pages until used, so a large ring costs
/// memory only as it fills.
#[derive(Debug)]
pub(crate) struct Ring {
    slots: Area,
    mask: u64,
    head: AtomicU64,
    tail: AtomicU64,
}

impl Ring {
    /// A ring of at least `entries` slots.
    pub(crate) fn new(entries: u64) -> std::io::Result<Self> {
        let capacity = entries.next_power_of_two().max(512);
        Ok(Ring {
            slots: Area::new(capacity as usize * 8)?,
            mask: capacity - 1,
            head: AtomicU64::new(0),
            tail: AtomicU64::new(0),
        })
    }

    fn slot(&self, index: u64) -> &AtomicU64 {
        // SAFETY: the area holds mask + 1 zero-initialised words, is page-aligned, and lives as long as self.
        unsafe { &*self.slots.at::<AtomicU64>((index & self.mask) as usize) }
    }

    /// Appends `entry`; `false` if the ring is full.
    pub(crate) fn push(&self, entry: u64) -> bool {
        debug_assert!(entry != 0);
        let mut head = self.head.load(Ordering::Relaxed);
        loop {
            if head.wrapping_sub(self.tail.load(Ordering::Acquire)) > self.mask {
                return false;
            }
            match self.head.compare_exchange_weak(
                head,
                head + 1,
                Ordering::AcqRel,
                Ordering::Relaxed,
            ) {
                Ok(_) => break,
                Err(now) => head = now,
            }
        }
        self.slot(head).store(entry, Ordering::Release);
        true
    }

    /// Takes the oldest entry. Only one thread may call this.
    pub(crate) fn pop(&self) -> Option<u64> {
        let tail = self.tail.load(Ordering::Relaxed);
        if tail == self.head.load(Ordering::Acquire) {
            return None;
        }
        let entry = self.slot(tail).swap(0, Ordering::AcqRel);
        if entry == 0 {
            return None;
        }
        self.tail.store(tail + 1, Ordering::Release);
        Some(entry)
    }

    /// Bytes that the ring occupies once every slot was used.
    pub(crate) fn bytes(&self) -> u64 {
        (self.mask + 1) * 8
    }
}

/// Slots of a [`Handover`].
const HANDOVER_SLOTS: usize = 1024;

struct Slot {
    turn: AtomicUsize,
    value: AtomicUsize,
}

/// Many producers, many consumers (the queue of D. Vyukov, "Bounded MPMC queue", 1024cores.net). A slot's `turn` says
/// whose it is: equal to the position, a producer's; one more, a consumer's.
pub(crate) struct Handover {
    slots: Box<[Slot]>,
    head: AtomicUsize,
    tail: AtomicUsize,
}

impl Handover {
    pub(crate) fn new() -> Self {
        let slots = (0..HANDOVER_SLOTS)
            .map(|i| Slot {
                turn: AtomicUsize::new(i),
                value: AtomicUsize::new(0),
            })
            .collect();
        Handover {
            slots,
            head: AtomicUsize::new(0),
            tail: AtomicUsize::new(0),
        }
    }

    fn slot(&self, position: usize) -> &Slot {
        &self.slots[position % HANDOVER_SLOTS]
    }

    /// Appends `value`; `false` if the queue is full.
    pub(crate) fn push(&self, value: usize) -> bool {
        let mut at = self.head.load(Ordering::Relaxed);
        loop {
            let slot = self.slot(at);
            let turn = slot.turn.load(Ordering::Acquire);
            if turn == at {
                match self.head.compare_exchange_weak(
                    at,
                    at.wrapping_add(1),
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                ) {
                    Ok(_) => {
                        slot.value.store(value, Ordering::Relaxed);
                        slot.turn.store(at.wrapping_add(1), Ordering::Release);
                        return true;
                    }
                    Err(now) => at = now,
                }
            } else if (turn.wrapping_sub(at) as isize) < 0 {
                return false;
            } else {
                at = self.head.load(Ordering::Relaxed);
            }
        }
    }

    /// Whether there is nothing to take (as far as one look can tell).
    pub(crate) fn is_empty(&self) -> bool {
        self.head.load(Ordering::SeqCst) == self.tail.load(Ordering::SeqCst)
    }

    /// Takes a value, if there is one.
    pub(crate) fn pop(&self) -> Option<usize> {
        let mut at = self.tail.load(Ordering::Relaxed);
        loop {
            let slot = self.slot(at);
            let turn = slot.turn.load(Ordering::Acquire);
            let ready = at.wrapping_add(1);
            if turn == ready {
                match self.tail.compare_exchange_weak(
                    at,
                    ready,
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                ) {
                    Ok(_) => {
                        let value = slot.value.load(Ordering::Relaxed);
                        slot.turn
                            .store(at.wrapping_add(HANDOVER_SLOTS), Ordering::Release);
                        return Some(value);
                    }
                    Err(now) => at = now,
                }
            } else if (turn.wrapping_sub(ready) as isize) < 0 {
                return None;
            } else {
                at = self.tail.load(Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_ring_refuses_and_recovers() {
        let ring = Ring::new(1).expect("memory");
        let capacity = ring.bytes() / 8;
        for lap in 0..3 {
            for i in 0..capacity {
                assert!(ring.push(lap * capacity + i + 1));
            }
            assert!(!ring.push(1), "full");
            for i in 0..capacity {
                assert_eq!(ring.pop(), Some(lap * capacity + i + 1));
            }
            assert_eq!(ring.pop(), None);
        }
    }

    #[test]
    fn nothing_is_lost_between_many_producers_and_consumers() {
        const EACH: usize = 20_000;
        let queue = Handover::new();
        let sum = AtomicUsize::new(0);
        let taken = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for p in 0..3 {
                let queue = &queue;
                s.spawn(move || {
                    for i in 0..EACH {
                        while !queue.push(p * EACH + i + 1) {
                            std::thread::yield_now();
                        }
                    }
                });
            }
            for _ in 0..3 {
                s.spawn(|| {
                    while taken.load(Ordering::Relaxed) < 3 * EACH {
                        match queue.pop() {
                            Some(v) => {
                                sum.fetch_add(v, Ordering::Relaxed);
                                taken.fetch_add(1, Ordering::Relaxed);
                            }
                            None => std::thread::yield_now(),
                        }
                    }
                });
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), (1..=3 * EACH).sum::<usize>());
    }
}
