//! The words of a map's units, and the counters that tell which parts of that table are in use.
//!
//! A map of a huge sparse file would need a table in proportion to the file. The table is virtual memory, so only
//! touched parts cost anything; a *group* of 512 words is one page of it. A group counts its units that are not absent,
//! is charged to the budget on its first use, and can be given back when the count is zero.

use crate::base::array::Array;
use crate::base::clock;
use crate::base::ids::{Nanos, Unit};
use crate::base::primitive::{AtomicU32, Ordering};
use crate::space::page::{From, Left, Page, State, Word};
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

/// What became of a unit that was given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub(crate) struct Gone {
    /// It is absent now: no miss was faster.
    pub(crate) absent: bool,
    /// Somebody waits on the word.
    pub(crate) wake: bool,
    /// Its group of words is empty now.
    pub(crate) emptied: bool,
}

#[derive(Debug)]
pub(crate) struct Table {
    words: Array<Page>,
    groups: Array<AtomicU32>,
    units: u64,
}

impl Table {
    pub(crate) fn new(units: u64) -> std::io::Result<Self> {
        Ok(Table {
            words: Array::new(units as usize)?,
            groups: Array::new(units.div_ceil(GROUP) as usize)?,
            units,
        })
    }

    /// Bytes charged when the map is made, whatever is touched later.
    pub(crate) fn fixed_bytes(&self) -> u64 {
        self.groups.bytes()
    }

    #[inline]
    pub(crate) fn page(&self, unit: Unit) -> &Page {
        self.words.at(unit.get() as usize)
    }

    /// The counter of a unit's group.
    fn group(&self, unit: Unit) -> &AtomicU32 {
        self.groups.at((unit.get() / GROUP) as usize)
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
    fn enter(&self, unit: Unit) -> bool {
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
    fn leave(&self, unit: Unit) -> bool {
        let before = self.group(unit).fetch_sub(1, Ordering::AcqRel);
        debug_assert!(before & COUNT > 0);
        before & COUNT == 1
    }

    /// Claims a unit whose word was `seen`. `charge` is called if the words of its group must be charged. If another thread was faster,
    /// the error says whether the group is empty again.
    pub(crate) fn claim(
        &self,
        unit: Unit,
        seen: Word,
        owner: u32,
        charge: impl FnOnce(),
    ) -> Result<From, bool> {
        // A cool unit counts in its group as it did when it was resident.
        let absent = seen.state() == State::Absent && !seen.cool();
        if absent && self.enter(unit) {
            charge();
        }
        let claimed = self.page(unit).claim(seen, owner);
        claimed.map_err(|_| absent && self.leave(unit))
    }

    /// The owner gives a unit up: it is absent from now on. `None` if the claim was no longer the owner's.
    pub(crate) fn give_up(&self, unit: Unit, owner: u32, shadow: u32) -> Option<Gone> {
        let due = self.page(unit).abandon(owner, shadow)?;
        Some(Gone {
            absent: true,
            wake: due.wake,
            emptied: self.leave(unit),
        })
    }

    /// The batch that took a unit out is through. `left` is what the unit leaves, if no miss was faster.
    pub(crate) fn settle(&self, unit: Unit, left: Left) -> Gone {
        let (absent, due) = self.page(unit).settle(left);
        // A cool unit still counts in its group.
        let leaves = absent && matches!(left, Left::Shadow(_));
        Gone {
            absent,
            wake: due.wake,
            emptied: leaves && self.leave(unit),
        }
    }

    /// Whether the words of a unit's group are charged for nothing.
    pub(crate) fn is_spent(&self, unit: Unit) -> bool {
        self.group(unit).load(Ordering::Acquire) == CHARGED
    }

    /// Gives the memory of an empty group's words back (their shadows are forgotten). Returns the bytes to release; `None` if a batch
    /// has a unit of the group, after which it is to be tried again.
    /// Takes `mmap_lock` for reading: never called in the fault path.
    ///
    /// `empty` is called while no unit of the group can be claimed, and all are absent.
    pub(crate) fn collect(&self, unit: Unit, empty: impl FnOnce()) -> Option<u64> {
        let group = self.group(unit);
        if group
            .compare_exchange(CHARGED, LOCKED, Ordering::AcqRel, Ordering::Acquire)
            .is_err()
        {
            return Some(0);
        }
        let group_units = Self::group_of(unit);
        let end = group_units.end.min(Unit::new(self.units));
        if Unit::each(group_units.start..end).any(|u| self.page(u).load().batch()) {
            // Absent by a failed fill, but still in somebody's batch, who will come back to the word.
            group.store(CHARGED, Ordering::Release);
            return None;
        }
        empty();
        // All words of the group are ABSENT, and LOCKED keeps claims away, so zeros (ABSENT without a shadow) may replace them.
        let gone = self.words.discard_page((unit.get() / GROUP) as usize);
        group.store(if gone { 0 } else { CHARGED }, Ordering::Release);
        Some(if gone { GROUP_BYTES } else { 0 })
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

#[cfg(all(test, not(loom)))]
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
            Some(0),
            "in use"
        );
        assert!(table.leave(Unit::new(1)));
        assert!(table.is_spent(Unit::new(0)) && !table.is_spent(Unit::new(GROUP)));
        assert_eq!(table.collect(Unit::new(0), || ()), Some(GROUP_BYTES));
        assert_eq!(table.collect(Unit::new(0), || ()), Some(0), "once");
        assert!(!table.is_spent(Unit::new(0)));
        assert!(table.enter(Unit::new(5)), "charged again");
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicU64;
    use loom::thread;

    struct Shared {
        table: Table,
        /// What the group's words are charged.
        charged: AtomicU64,
    }

    impl Shared {
        fn new() -> Arc<Self> {
            Arc::new(Shared {
                table: Table::new(2).expect("memory"),
                charged: AtomicU64::new(0),
            })
        }

        /// As a miss does it: counted in the group first, then claimed. Returns whether this thread filled the unit.
        fn fill(&self, unit: Unit, me: u32) -> bool {
            let page = self.table.page(unit);
            let seen = page.load();
            if seen.state() != State::Absent {
                return false;
            }
            let charge = || _ = self.charged.fetch_add(GROUP_BYTES, Ordering::Relaxed);
            if self.table.claim(unit, seen, me, charge).is_err() {
                return false;
            }
            page.finish(me, 1, false, false, false)
                .expect("a word that was given back is nobody's");
            true
        }

        /// A miss that claims the unit from a batch that is under way, and whose read fails.
        fn fail(&self, unit: Unit, me: u32) {
            let seen = self.table.page(unit).load();
            let claims = || self.table.claim(unit, seen, me, || unreachable!());
            if seen.state() == State::Evicting && claims().is_ok() {
                let gone = self.table.give_up(unit, me, 0);
                assert!(gone.is_some(), "a word that was given back is nobody's");
            }
        }

        fn evict(&self, unit: Unit) {
            let page = self.table.page(unit);
            if page.begin_evict().is_none() {
                return;
            }
            if self.table.settle(unit, Left::Shadow(1)).emptied {
                self.collect(unit);
            }
        }

        fn collect(&self, unit: Unit) {
            let gone = self.table.collect(unit, || {
                let all = [Unit::new(0), Unit::new(1)];
                let absent = |&u: &Unit| self.table.page(u).load().state() == State::Absent;
                assert!(all.iter().all(absent), "a unit that is not absent");
            });
            self.charged.fetch_sub(gone.unwrap_or(0), Ordering::Relaxed);
        }

        fn check_at_rest(&self) {
            let all = [Unit::new(0), Unit::new(1)];
            let present = |&&u: &&Unit| self.table.page(u).load().state() == State::Resident;
            let present = all.iter().filter(present).count();
            assert_eq!(self.table.live(all[0]) as usize, present);
            assert!(present == 0 || self.table.charged_bytes() > 0);
            assert_eq!(
                self.charged.load(Ordering::Relaxed),
                self.table.charged_bytes()
            );
        }
    }

    fn run(parts: Vec<fn(&Shared)>) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(move || {
            let shared = Shared::new();
            let threads: Vec<_> = parts
                .iter()
                .map(|&part| {
                    let shared = shared.clone();
                    thread::spawn(move || part(&shared))
                })
                .collect();
            for t in threads {
                t.join().unwrap();
            }
            shared.check_at_rest();
        });
    }

    #[test]
    fn a_group_is_given_back_only_while_none_of_its_units_can_be_claimed() {
        run(vec![
            |s| {
                s.fill(Unit::new(0), 1);
                s.evict(Unit::new(0));
            },
            |s| _ = s.fill(Unit::new(1), 2),
        ]);
    }

    #[test]
    fn two_evictions_and_a_miss_of_the_same_unit() {
        run(vec![
            |s| {
                s.fill(Unit::new(0), 1);
                s.evict(Unit::new(0));
            },
            |s| {
                s.fill(Unit::new(0), 2);
                s.evict(Unit::new(0));
            },
        ]);
    }

    #[test]
    fn a_group_that_is_collected_twice_is_released_once() {
        run(vec![
            |s| {
                s.fill(Unit::new(0), 1);
                s.evict(Unit::new(0));
                s.collect(Unit::new(0));
            },
            |s| s.collect(Unit::new(1)),
        ]);
    }

    #[test]
    fn a_group_with_a_unit_in_a_batch_is_not_given_back() {
        run(vec![
            |s| {
                s.fill(Unit::new(0), 1);
                s.evict(Unit::new(0));
            },
            |s| {
                s.fail(Unit::new(0), 2);
                s.collect(Unit::new(0));
            },
        ]);
    }
}
