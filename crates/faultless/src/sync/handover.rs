//! A bounded queue of words with several producers and several consumers: how faulting threads hand requests to the pool's
//! threads. It neither allocates after it was made nor has a lock.

use crate::base::primitive::{AtomicUsize, Ordering};

/// Slots of a [`Handover`].
const HANDOVER_SLOTS: usize = if cfg!(loom) { 2 } else { 1024 };

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

#[cfg(all(test, not(loom)))]
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

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Two producers and a consumer, in a queue that is as short as can be.
    #[test]
    fn each_value_arrives_once_and_whole() {
        loom::model(|| {
            let queue = Arc::new(Handover::new());
            let consumer = {
                let queue = queue.clone();
                thread::spawn(move || queue.pop())
            };
            let producer = {
                let queue = queue.clone();
                thread::spawn(move || assert!(queue.push(2), "there is room for two"))
            };
            assert!(queue.push(1), "there is room for two");
            producer.join().unwrap();
            let mut got = consumer.join().unwrap().into_iter().collect::<Vec<_>>();
            got.extend(std::iter::from_fn(|| queue.pop()));
            got.sort();
            assert_eq!(got, [1, 2]);
            assert!(queue.is_empty());
        });
    }

    /// A slot that is used again: its second value is not taken for the first, by either of two consumers.
    #[test]
    fn a_slot_that_is_used_again_gives_each_value_once() {
        loom::model(|| {
            let queue = Arc::new(Handover::new());
            assert!(queue.push(1) && queue.push(2) && !queue.push(4));
            let other = {
                let queue = queue.clone();
                thread::spawn(move || queue.pop().unwrap_or(0))
            };
            let first = queue.pop().unwrap_or(0);
            let pushed = queue.push(4);
            let mut got = first + other.join().unwrap();
            while let Some(value) = queue.pop() {
                got += value;
            }
            assert_eq!(got, if pushed { 7 } else { 3 });
        });
    }
}
