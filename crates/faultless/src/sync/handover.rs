//! A bounded queue of words with several producers and several consumers: how faulting threads hand requests to the pool's
//! threads. It neither allocates after it was made nor has a lock.

use crate::base::primitive::{AtomicUsize, Ordering};

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

    /// Whether there is nothing to take (as far as one look can tell). A producer that has a slot and has not published it yet does
    /// not count: a consumer that did not sleep for that would only spin, and keep the producer from its processor.
    pub(crate) fn is_empty(&self) -> bool {
        let mut at = self.tail.load(Ordering::Acquire);
        loop {
            let turn = self.slot(at).turn.load(Ordering::Acquire);
            let now = self.tail.load(Ordering::Acquire);
            if now == at {
                return turn != at.wrapping_add(1);
            }
            at = now;
        }
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
