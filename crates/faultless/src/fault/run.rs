//! A run: neighbouring units that one thread has claimed.

use crate::base::ids::{Addr, RegionAt, Slot, Unit};
use crate::fault::refusal::Refusal;
use std::ops::Range;

/// Most units that one fill covers: bounds the stack that the handler needs.
pub(crate) const RUN_MAX: usize = 64;

/// Why a unit is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// A load at this address faulted.
    Load(Addr),
    /// It is to be resident before it is touched.
    Ask,
    /// It is to be pinned.
    Pin,
    /// It may be wanted soon: never waits.
    Prefetch,
}

/// What a unit of a run was claimed from, in one byte: a run lies on the stack of a signal handler.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Origin {
    /// A miss.
    Cold,
    /// A miss soon after the unit was evicted.
    Hot,
    /// Its bytes are in the run's slot.
    Cool,
    Resident,
    Evicting,
}

/// The number under which this thread claims units, until it gives them up. All of its signals are blocked meanwhile, so no
/// handler takes it elsewhere, and no other thread cancels it: nothing but the end of the process gets in between. Threads
/// are told apart by their stacks, which saves a system call in each miss.
#[cfg(not(faultless_sim))]
pub(crate) fn owner() -> u32 {
    let here = 0u8;
    1 << 31 | (&raw const here as usize >> 12) as u32
}

/// The same in the simulated machine, where a thread's stack lies elsewhere in each run.
#[cfg(faultless_sim)]
pub(crate) fn owner() -> u32 {
    1 << 31 | faultless_sys::raw::gettid()
}

/// A unit range whose words this thread owns.
pub(crate) struct Run {
    pub(crate) first: Unit,
    pub(crate) count: usize,
    pub(crate) me: u32,
    /// The slot in which the bytes of the first unit are, if it was cool.
    pub(crate) slot: Slot,
    pub(crate) from: [Origin; RUN_MAX],
}

impl Run {
    /// The units.
    pub(crate) fn units(&self) -> Range<Unit> {
        self.first..self.end()
    }

    /// The unit behind the last.
    pub(crate) fn end(&self) -> Unit {
        self.first + self.count as u64
    }

    /// Whether its one unit was absent, and nobody's.
    pub(crate) fn was_absent(&self) -> bool {
        self.count == 1 && matches!(self.from[0], Origin::Cold | Origin::Hot)
    }

    pub(crate) const fn new() -> Self {
        Run {
            first: Unit::new(0),
            count: 0,
            me: 0,
            slot: Slot::new(0),
            from: [Origin::Cold; RUN_MAX],
        }
    }
}

/// What was installed of a piece of the region.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    /// Bytes present now, from the start of the piece.
    pub(crate) present: u64,
    /// Bytes of these that were not there before.
    pub(crate) new: u64,
    /// Bytes that would be present had the source its full length.
    pub(crate) wanted: u64,
}

/// Reads and installs a piece of the region that starts where a range does and ends with it at the latest. Where an address
/// is given, the bytes of the first page go there and are not installed.
pub(crate) type Fetch<'a> =
    &'a mut dyn FnMut(Range<RegionAt>, Option<Addr>) -> Result<Piece, Refusal>;
