//! The words of a map's units, and the counters that tell which parts of that table are in use.
//!
//! A map of a huge sparse file would need a table in proportion to the file. The table is virtual memory, so only
//! touched parts cost anything; a *group* of 512 words is one page of it. A group counts its units that are not absent,
//! is charged to the budget on its first use, and can be given back when the count is zero.

#![allow(
    unsafe_code,
    reason = "words live in mapped memory that is zero until first touched"
)]

use crate::base::area::Area;
use crate::base::clock;
use crate::base::ids::{Nanos, Unit};
use crate::base::primitive::{AtomicU32, Ordering};
use crate::space::page::Page;
use faultless_sys::mem;
use faultless_sys::mem::PAGE;
use std::ops::Range;

/// Units in a group.
pub(crate) const GROUP: u64 = (PAGE / size_of::<Page>()) as u64;
/// Budget charged for a group in use: its page of the table.
pub(crate) const GROUP_BYTES: u64 = PAGE as u64;

/// The group's page is being given back.
const LOCKED: u32 = 1 << 31;
/// The group is charged to the budget.
const CHARGED: u32 = 1 << 30;
const COUNT: u32 = CHARGED - 1;

#[derive(Debug)]
pub(crate) struct Table {
    words: Area,
    groups: Area,
    units: u64,
}

impl Table {
    pub(crate) fn new(units: u64) -> std::io::Result<Self> {
        Ok(Table {
            words: Area::new(units as usize * size_of::<Page>())?,
            groups: Area::new(units.div_ceil(GROUP) as usize * 4)?,
            units,
        })
    }

    /// Bytes charged when the map is made, whatever is touched later.
    pub(crate) fn fixed_bytes(&self) -> u64 {
        self.groups.len() as u64
    }

    pub(crate) fn page(&self, unit: Unit) -> &Page {
        assert!(unit.get() < self.units);
        // SAFETY: in bounds; the memory is zero-initialised, which is a valid word (absent), and lives as long as self.
        unsafe { &*self.words.at::<Page>(unit.get() as usize) }
    }

    fn group(&self, unit: Unit) -> &AtomicU32 {
        assert!(unit.get() < self.units);
        // SAFETY: one counter for each group, zero-initialised.
        unsafe { &*self.groups.at::<AtomicU32>((unit.get() / GROUP) as usize) }
    }

    /// The units of `unit`'s group.
    pub(crate) fn group_of(unit: Unit) -> Range<Unit> {
        let first = Unit::new(unit.get() / GROUP * GROUP);
        first..first + GROUP
    }

    /// Units of `unit`'s group that are not absent.
    pub(crate) fn live(&self, unit: Unit) -> u32 {
        self.group(unit).load(Ordering::Acquire) & COUNT
    }

    /// Counts one more unit of the group, before its word leaves ABSENT. Returns whether the group must be charged.
    pub(crate) fn enter(&self, unit: Unit) -> bool {
        let group = self.group(unit);
        let mut now = group.load(Ordering::Acquire);
        loop {
            if now & LOCKED != 0 {
                clock::nap(Nanos::from_micros(20));
                now = group.load(Ordering::Acquire);
                continue;
            }
            match group.compare_exchange_weak(
                now,
                (now + 1) | CHARGED,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return now & CHARGED == 0,
                Err(other) => now = other,
            }
        }
    }

    /// Takes the count of [`enter`](Self::enter) back, after the word became ABSENT. Returns whether the group is
    /// empty now.
    pub(crate) fn leave(&self, unit: Unit) -> bool {
        let before = self.group(unit).fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before & COUNT > 0);
        before & COUNT == 1
    }

    /// Gives the memory of an empty group's words back (their shadows are forgotten). Returns the bytes to release.
    /// Takes `mmap_lock` for reading: never called in the fault path.
    ///
    /// `empty` is called while no unit of the group can be claimed, and all are absent.
    pub(crate) fn collect(&self, unit: Unit, empty: impl FnOnce()) -> u64 {
        let group = self.group(unit);
        if group
            .compare_exchange(CHARGED, LOCKED, Ordering::AcqRel, Ordering::Acquire)
            .is_err()
        {
            return 0;
        }
        let group_units = Self::group_of(unit);
        let end = group_units.end.min(Unit::new(self.units));
        if Unit::each(group_units.start..end).any(|u| self.page(u).load().batch()) {
            // Absent by a failed fill, but still in somebody's batch, who will come back to the word.
            group.store(CHARGED, Ordering::Release);
            return 0;
        }
        empty();
        let page = self.words.start() + (unit.get() / GROUP) as usize * PAGE;
        // SAFETY: all words of the group are ABSENT, and LOCKED keeps claims away, so zeros (ABSENT without a shadow)
        // may replace them.
        let gone = unsafe { mem::madvise(page, PAGE, libc::MADV_DONTNEED) };
        group.store(if gone.is_ok() { 0 } else { CHARGED }, Ordering::Release);
        if gone.is_ok() { GROUP_BYTES } else { 0 }
    }

    /// Bytes charged for groups now.
    #[cfg(test)]
    fn charged_bytes(&self) -> u64 {
        let groups = self.units.div_ceil(GROUP);
        (0..groups)
            .filter(|g| self.group(Unit::new(g * GROUP)).load(Ordering::Acquire) & CHARGED != 0)
            .count() as u64
            * GROUP_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_charged_once_and_collected_only_when_empty() {
        let table = Table::new(2 * GROUP).expect("memory");
        assert!(table.enter(Unit::new(0)), "first use");
        assert!(!table.enter(Unit::new(1)));
        assert!(table.enter(Unit::new(GROUP)), "another group");
        assert_eq!(table.charged_bytes(), 2 * GROUP_BYTES);
        assert!(!table.leave(Unit::new(0)));
        assert_eq!(
            table.collect(Unit::new(0), || panic!("it is not")),
            0,
            "in use"
        );
        assert!(table.leave(Unit::new(1)));
        assert_eq!(table.collect(Unit::new(0), || ()), GROUP_BYTES);
        assert_eq!(table.collect(Unit::new(0), || ()), 0, "once");
        assert!(table.enter(Unit::new(5)), "charged again");
    }
}
