//! The cooling area, as the fault path sees it: slots that hold the bytes of units which were taken out of their maps a
//! while ago. The evictor writes them; whoever claims a cool unit owns its slot, reads it, and gives it back.

use crate::base::array::Array;
use crate::base::ids::{Addr, Slot};
use crate::base::primitive::{AtomicU8, AtomicUsize, Ordering};
use faultless_sys::mem::PAGE;

/// Slots of one page each, in memory that this process maps read-only.
#[derive(Debug)]
pub(crate) struct Cooling {
    /// Where they are mapped now. It changes only while no unit is cool, so whoever owns a slot finds it.
    start: AtomicUsize,
    slots: u32,
    /// For each slot, whether it holds a unit's bytes, or a rescuer still reads it.
    busy: Array<AtomicU8>,
}

impl Cooling {
    /// Room for `slots` slots at most, not mapped yet.
    pub(crate) fn new(slots: u32) -> std::io::Result<Self> {
        Ok(Cooling {
            start: AtomicUsize::new(0),
            slots,
            busy: Array::new(slots as usize)?,
        })
    }

    /// The slots are mapped here from now on. No unit is cool.
    pub(crate) fn set_start(&self, start: usize) {
        self.start.store(start, Ordering::Release);
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
