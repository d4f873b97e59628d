//! The cooling area, as the fault path sees it: slots that hold the bytes of units which were taken out of their maps a
//! while ago. The evictor writes them; whoever claims a cool unit owns its slot, reads it, and gives it back.

use crate::base::array::Array;
use crate::base::ids::{Addr, Slot};
use crate::base::primitive::{AtomicU8, AtomicU32, AtomicUsize, Ordering};
use faultless_sys::mem::PAGE;

/// How often a unit that is rescued from a slot may stay when its next turns to go come: the sooner it was rescued, the hotter it is. The
/// slots from `first` on, `len` of them, are filled in turn, and `next` is the next. Other slots give no credit.
///
/// A unit that is touched once in each round of a loop is rescued late, and gets none.
pub(crate) fn credit(slot: Slot, first: u32, len: u32, next: u32) -> u8 {
    let Some(at) = slot.get().checked_sub(first).filter(|&at| at < len) else {
        return 0;
    };
    // Slots that were filled since.
    let age = (u64::from(next) + u64::from(len) - 1 - u64::from(at)) % u64::from(len);
    match age * 4 / u64::from(len) {
        0 => 2,
        1 | 2 => 1,
        _ => 0,
    }
}

/// Slots of one page each, in memory that this process maps read-only.
#[derive(Debug)]
pub(crate) struct Cooling {
    /// Where they are mapped now. It changes only while no unit is cool, so whoever owns a slot finds it.
    start: AtomicUsize,
    slots: u32,
    /// The slots from here on are those of units that had proved themselves; how many there are, and which of them is filled next.
    main: [AtomicU32; 3],
    /// For each slot, whether it holds a unit's bytes, or a rescuer still reads it.
    busy: Array<AtomicU8>,
}

impl Cooling {
    /// Room for `slots` slots at most, not mapped yet.
    pub(crate) fn new(slots: u32) -> std::io::Result<Self> {
        Ok(Cooling {
            start: AtomicUsize::new(0),
            slots,
            main: Default::default(),
            busy: Array::new(slots as usize)?,
        })
    }

    /// The slots are mapped here from now on. No unit is cool.
    pub(crate) fn set_start(&self, start: usize) {
        self.start.store(start, Ordering::Release);
    }

    /// Says which slots are those of units that had proved themselves: their first, their number, and which of them is filled next.
    pub(crate) fn set_main(&self, main: [u32; 3]) {
        for (to, value) in self.main.iter().zip(main) {
            to.store(value, Ordering::Relaxed);
        }
    }

    /// The credit of a unit that is rescued from a slot. (A hint: the three values may not belong together.)
    pub(crate) fn credit(&self, slot: Slot) -> u8 {
        let [first, len, next] = [0, 1, 2].map(|i| self.main[i].load(Ordering::Relaxed));
        credit(slot, first, len, next)
    }

    /// Address of a slot's bytes.
    pub(crate) fn addr(&self, slot: Slot) -> Addr {
        debug_assert!(slot.get() < self.slots);
        Addr::new(self.start.load(Ordering::Acquire) + slot.get() as usize * PAGE)
    }

    fn flag(&self, slot: Slot) -> &AtomicU8 {
        self.busy.at(slot.get() as usize)
    }

    /// Whether somebody's bytes are in the slot, or are still being read.
    pub(crate) fn busy(&self, slot: Slot) -> bool {
        self.flag(slot).load(Ordering::Acquire) != 0
    }

    /// The slot holds a unit's bytes from now on.
    pub(crate) fn fill(&self, slot: Slot) {
        self.flag(slot).store(1, Ordering::Release);
    }

    /// The slot may be used again. Its owner says so: who cleared COOL in the unit's word.
    pub(crate) fn give(&self, slot: Slot) {
        self.flag(slot).store(0, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn credit_is_for_units_that_were_rescued_soon() {
        // Slots 10 to 17; slot 13 is the next to be filled, so that slot 12 is the youngest.
        let credits = |slot| credit(Slot::new(slot), 10, 8, 3);
        assert_eq!(
            [12, 11, 10, 17, 16, 15, 14, 13].map(credits),
            [2, 2, 1, 1, 1, 1, 0, 0]
        );
        assert_eq!([9, 18].map(credits), [0, 0]);
        assert_eq!(credit(Slot::new(3), 0, 0, 0), 0);
    }
}
