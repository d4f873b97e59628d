//! A bounded queue of entries with several producers and one consumer. It neither allocates after it was made nor has a lock.

use crate::base::array::Array;
use crate::base::ids::Entry;
use crate::base::padded::Padded;
use crate::base::primitive::{AtomicU64, Ordering};

/// Fewest slots: a page of them. (Simulated pools are small, and are to have several rings.)
#[cfg(not(any(loom, faultless_sim)))]
pub(crate) const LEAST: u64 = 512;
#[cfg(faultless_sim)]
pub(crate) const LEAST: u64 = 64;
#[cfg(loom)]
pub(crate) const LEAST: u64 = 2;

/// Many producers, one consumer. An entry is any non-zero word.
///
/// A producer takes a slot by advancing `head`, then publishes by storing the entry; zero means "taken, not published
/// yet". The consumer stops at such a slot and comes back. Slots are zero pages until used, so a large ring costs
/// memory only as it fills.
///
/// Producers and the consumer write to different cache lines. A producer reads the consumer's line only if the ring seems to be full.
#[derive(Debug)]
pub(crate) struct Ring {
    slots: Array<AtomicU64>,
    mask: u64,
    producers: Padded<Producers>,
    tail: Padded<AtomicU64>,
}

#[derive(Debug, Default)]
struct Producers {
    head: AtomicU64,
    /// The tail as a producer last saw it, or as one saw it earlier.
    tail: AtomicU64,
}

impl Ring {
    /// A ring of at least `entries` slots.
    pub(crate) fn new(entries: u64) -> std::io::Result<Self> {
        let capacity = entries.next_power_of_two().max(LEAST);
        Ok(Ring {
            slots: Array::new(capacity as usize)?,
            mask: capacity - 1,
            producers: Padded::default(),
            tail: Padded::default(),
        })
    }

    fn slot(&self, index: u64) -> &AtomicU64 {
        self.slots.at((index & self.mask) as usize)
    }

    /// Appends `entry`; `false` if the ring is full.
    pub(crate) fn push(&self, entry: Entry) -> bool {
        debug_assert!(entry.is_some());
        let Producers { head: place, tail } = &*self.producers;
        let mut head = place.load(Ordering::Relaxed);
        let mut seen = tail.load(Ordering::Acquire);
        loop {
            let used = head.wrapping_sub(seen);
            if used > u64::MAX / 2 {
                // Others have pushed since, and the consumer has gone on.
                head = place.load(Ordering::Relaxed);
                continue;
            }
            if used > self.mask {
                let now = self.tail.load(Ordering::Acquire);
                if now == seen {
                    return false;
                }
                seen = now;
                tail.store(now, Ordering::Release);
                continue;
            }
            match place.compare_exchange_weak(head, head + 1, Ordering::AcqRel, Ordering::Relaxed) {
                Ok(_) => break,
                Err(now) => head = now,
            }
        }
        self.slot(head).store(entry.get(), Ordering::Release);
        true
    }

    /// Takes the oldest entry. Only one thread may call this.
    pub(crate) fn pop(&self) -> Option<Entry> {
        let tail = self.tail.load(Ordering::Relaxed);
        if tail == self.producers.head.load(Ordering::Acquire) {
            return None;
        }
        let entry = self.slot(tail).swap(0, Ordering::AcqRel);
        if entry == 0 {
            return None;
        }
        self.tail.store(tail + 1, Ordering::Release);
        Some(Entry::new(entry))
    }

    /// Whether nothing is in it, nor on its way into it.
    pub(crate) fn is_empty(&self) -> bool {
        self.tail.load(Ordering::Acquire) == self.producers.head.load(Ordering::Acquire)
    }

    /// Bytes that the ring occupies once every slot was used.
    pub(crate) fn bytes(&self) -> u64 {
        (self.mask + 1) * 8
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_full_ring_refuses_and_recovers() {
        let ring = Ring::new(1).expect("memory");
        let capacity = ring.bytes() / 8;
        for lap in 0..3 {
            for i in 0..capacity {
                assert!(ring.push(Entry::new(lap * capacity + i + 1)));
            }
            assert!(!ring.push(Entry::new(1)), "full");
            for i in 0..capacity {
                assert_eq!(ring.pop(), Some(Entry::new(lap * capacity + i + 1)));
            }
            assert_eq!(ring.pop(), None);
        }
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// Producers with these entries, and a consumer that looks a few times meanwhile, and takes the rest afterwards. What
    /// the ring had no room for does not arrive, and nothing else is lost.
    fn run(producers: &'static [&'static [u64]]) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(move || {
            let ring = Arc::new(Ring::new(2).expect("memory"));
            let threads: Vec<_> = producers
                .iter()
                .map(|entries| {
                    let ring = ring.clone();
                    thread::spawn(move || -> Vec<u64> {
                        let went_in = |&&e: &&u64| ring.push(Entry::new(e));
                        entries.iter().filter(went_in).copied().collect()
                    })
                })
                .collect();
            let mut seen: Vec<_> = (0..2).filter_map(|_| ring.pop()).collect();
            let pushed: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
            seen.extend(std::iter::from_fn(|| ring.pop()));
            assert_eq!(seen.len(), pushed.iter().map(Vec::len).sum::<usize>());
            for entries in pushed {
                let its = seen.iter().map(|e| e.get()).filter(|e| entries.contains(e));
                assert!(its.eq(entries.iter().copied()), "{seen:?}");
            }
        });
    }

    #[test]
    fn a_full_ring_goes_round() {
        run(&[&[1, 2, 3, 4]]);
    }

    #[test]
    fn entries_of_two_producers_arrive_once_and_in_order() {
        run(&[&[1, 2], &[11, 12]]);
    }
}
