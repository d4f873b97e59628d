//! Numbers that must not be taken for each other.
//!
//! An address is not an offset, a slot is not a unit: each has a type of its own, and the arithmetic that makes sense.

/// A number of a fill unit within a map.
pub(crate) type Unit = u64;

const UNIT_BITS: u32 = 40;
const ID_BITS: u32 = 17;

/// An entry of the evictor's queue: which unit of which map, and how large it is. Never zero.
pub(crate) fn track_entry(id: u32, unit_shift: u32, unit: Unit) -> u64 {
    u64::from(unit_shift) << (UNIT_BITS + ID_BITS) | (u64::from(id) + 1) << UNIT_BITS | unit
}

/// Undoes [`track_entry`]: the map's gate, and the unit.
pub(crate) fn entry_parts(entry: u64) -> (u32, Unit) {
    let id = (entry >> UNIT_BITS) as u32 & ((1 << ID_BITS) - 1);
    (id - 1, entry & ((1 << UNIT_BITS) - 1))
}

/// Marks the entry of a unit that was read ahead.
pub(crate) const AHEAD: u64 = 1 << 63;

/// Whether the unit was read ahead.
pub(crate) fn entry_ahead(entry: u64) -> bool {
    entry & AHEAD != 0
}

/// The size of an entry's unit, in bytes.
pub(crate) fn entry_bytes(entry: u64) -> u64 {
    1 << ((entry & !AHEAD) >> (UNIT_BITS + ID_BITS))
}

/// A lease taken, to be given up by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LeaseId {
    pub(crate) number: i32,
    pub(crate) serial: u64,
}
