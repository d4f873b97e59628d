//! A bounded queue of entries with several producers and one consumer, the evictor: how the fault path tells of units that it
//! filled. It neither allocates after it was made nor has a lock.

#![allow(
    unsafe_code,
    reason = "slots live in mapped memory that is zero until first touched"
)]

use crate::base::area::Area;
use crate::base::ids::Entry;
use crate::base::primitive::{AtomicU64, Ordering};

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
    pub(crate) fn push(&self, entry: Entry) -> bool {
        debug_assert!(entry.is_some());
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
        self.slot(head).store(entry.get(), Ordering::Release);
        true
    }

    /// Takes the oldest entry. Only one thread may call this.
    pub(crate) fn pop(&self) -> Option<Entry> {
        let tail = self.tail.load(Ordering::Relaxed);
        if tail == self.head.load(Ordering::Acquire) {
            return None;
        }
        let entry = self.slot(tail).swap(0, Ordering::AcqRel);
        if entry == 0 {
            return None;
        }
        self.tail.store(tail + 1, Ordering::Release);
        Some(Entry::new(entry))
    }

    /// Bytes that the ring occupies once every slot was used.
    pub(crate) fn bytes(&self) -> u64 {
        (self.mask + 1) * 8
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
