//! Places in which huge pages are filled before they are moved into maps.

use crate::base::area::{Area, HUGE};
use crate::base::ids::Addr;
use crate::base::primitive::{AtomicU32, Ordering};

/// Places. (A thread that finds none does without a huge page.)
const COUNT: u32 = 16;

/// Address space for some huge pages. Between two uses it holds no memory.
#[derive(Debug)]
pub(crate) struct HugeSlots {
    area: Area,
    start: usize,
    /// A bit for each that is in use.
    taken: AtomicU32,
    uses: [AtomicU32; COUNT as usize],
}

impl HugeSlots {
    pub(crate) fn new() -> std::io::Result<Self> {
        let (area, start) = Area::huge(COUNT as usize * HUGE)?;
        Ok(HugeSlots {
            area,
            start,
            taken: AtomicU32::new(0),
            uses: [const { AtomicU32::new(0) }; COUNT as usize],
        })
    }

    /// A place of [`HUGE`] bytes, unless all are in use.
    pub(crate) fn take(&self) -> Option<Addr> {
        let first_free = |taken: u32| {
            let bit = taken.trailing_ones();
            (bit < COUNT).then_some(taken | 1 << bit)
        };
        let taken = &self.taken;
        let before = taken.fetch_update(Ordering::Acquire, Ordering::Relaxed, first_free);
        let bit = before.ok()?.trailing_ones();
        Some(Addr::new(self.start + bit as usize * HUGE))
    }

    /// Now and then makes a place anew that was used and holds no memory: one in which the kernel once had to put small pages has a page
    /// table, and gets no huge page until that is gone.
    pub(crate) fn renew(&self, slot: Addr) {
        let uses = &self.uses[(slot.get() - self.start) / HUGE];
        if uses.fetch_add(1, Ordering::Relaxed) % 64 == 63 {
            self.area.renew_huge(slot.get());
        }
    }

    /// Gives a place back that [`take`](Self::take) has given, and that holds no memory any more.
    pub(crate) fn give(&self, slot: Addr) {
        let bit = (slot.get() - self.start) / HUGE;
        self.taken.fetch_and(!(1 << bit), Ordering::Release);
    }
}

#[cfg(all(test, not(any(loom, faultless_sim))))]
mod tests {
    use super::*;

    #[test]
    fn each_place_is_given_to_one_and_can_be_given_again() {
        let slots = HugeSlots::new().expect("address space");
        let all: Vec<Addr> = std::iter::from_fn(|| slots.take()).collect();
        assert_eq!(all.len(), COUNT as usize);
        for (i, slot) in all.iter().enumerate() {
            assert!(slot.get().is_multiple_of(HUGE) && !all[..i].contains(slot));
        }
        slots.give(all[5]);
        assert_eq!(slots.take(), Some(all[5]));
        assert_eq!(slots.take(), None);
    }
}
