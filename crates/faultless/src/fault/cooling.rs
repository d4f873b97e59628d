//! The cooling area, as the fault path sees it: slots that hold the bytes of units which were taken out of their maps a
//! while ago. The evictor writes them; whoever claims a cool unit owns its slot, reads it, and gives it back.

use super::area::Area;
use faultless_sys::mem::PAGE;
use std::sync::atomic::{AtomicU8, Ordering};

/// Slots of one page each, in memory that this process maps read-only.
#[derive(Debug)]
pub(crate) struct Cooling {
    start: usize,
    slots: u32,
    /// For each slot, whether it holds a unit's bytes, or a rescuer still reads it.
    busy: Area,
}

impl Cooling {
    /// Describes `slots` slots at `start`, which must stay mapped for as long as units are in them.
    pub(crate) fn new(start: usize, slots: u32) -> std::io::Result<Self> {
        Ok(Cooling {
            start,
            slots,
            busy: Area::new(slots as usize)?,
        })
    }

    /// Address of the mapping.
    pub(crate) fn start(&self) -> usize {
        self.start
    }

    /// Length of the mapping, in bytes.
    pub(crate) fn len(&self) -> usize {
        self.slots as usize * PAGE
    }

    /// Address of a slot's bytes.
    pub(crate) fn addr(&self, slot: u32) -> usize {
        debug_assert!(slot < self.slots);
        self.start + slot as usize * PAGE
    }

    fn flag(&self, slot: u32) -> &AtomicU8 {
        assert!(slot < self.slots);
        #[allow(unsafe_code, reason = "one flag for each slot, in mapped memory")]
        // SAFETY: in bounds; zero-initialised, and lives as long as self.
        unsafe {
            &*self.busy.at::<AtomicU8>(slot as usize)
        }
    }

    /// Whether somebody's bytes are in the slot, or are still being read.
    pub(crate) fn busy(&self, slot: u32) -> bool {
        self.flag(slot).load(Ordering::Acquire) != 0
    }

    /// The slot holds a unit's bytes from now on.
    pub(crate) fn fill(&self, slot: u32) {
        self.flag(slot).store(1, Ordering::Release);
    }

    /// The slot may be used again. Its owner says so: who cleared COOL in the unit's word.
    pub(crate) fn give(&self, slot: u32) {
        self.flag(slot).store(0, Ordering::Release);
    }
}
