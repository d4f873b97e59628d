//! Which units of a map were used, and in what order.

use crate::base::ids::Unit;
use crate::base::primitive::{AtomicBool, Mutex, Ordering, lock};
use faultless_sys::signal;
use std::collections::HashMap;

/// Units of a group, which has one bit for each.
pub(crate) const GROUP: u64 = 512;
/// The bits of a group.
pub(crate) type Mask = [u64; GROUP as usize / 64];

/// Units, by groups, in the order in which a unit of each was first used.
#[derive(Debug, Clone, Default)]
pub(crate) struct Used {
    groups: Vec<(u64, Mask)>,
    at: HashMap<u64, usize>,
}

impl Used {
    pub(crate) fn note(&mut self, unit: Unit) {
        let (group, bit) = (unit.get() / GROUP, unit.get() % GROUP);
        let mut mask = Mask::default();
        mask[bit as usize / 64] = 1 << (bit % 64);
        self.add(group, mask);
    }

    /// Adds what was used later.
    fn append(&mut self, later: &Used) {
        for &(group, mask) in &later.groups {
            self.add(group, mask);
        }
    }

    fn add(&mut self, group: u64, mask: Mask) {
        let at = *self.at.entry(group).or_insert_with(|| {
            self.groups.push((group, Mask::default()));
            self.groups.len() - 1
        });
        for (to, bits) in self.groups[at].1.iter_mut().zip(mask) {
            *to |= bits;
        }
    }

    /// The groups: the number of each, and which of its units were used.
    pub(crate) fn groups(&self) -> &[(u64, Mask)] {
        &self.groups
    }
}

/// Notes units while somebody wants to know.
#[derive(Default)]
pub(crate) struct Recorder {
    on: AtomicBool,
    /// What was noted since the last beginning, and which beginning that was.
    used: Mutex<(u64, Used)>,
    /// A thread has taken that away, and brings it back.
    saving: Mutex<()>,
}

impl Recorder {
    /// Begins anew. Returns the number of this beginning.
    pub(crate) fn start(&self) -> u64 {
        self.change(|used| {
            let former = std::mem::take(&mut used.1);
            used.0 += 1;
            self.on.store(true, Ordering::Relaxed);
            (used.0, former)
        })
        .0
    }

    /// Ends, and forgets, unless it has begun anew since that beginning.
    pub(crate) fn stop(&self, beginning: u64) {
        self.change(|used| {
            if used.0 != beginning {
                return Used::default();
            }
            self.on.store(false, Ordering::Relaxed);
            used.0 += 1;
            std::mem::take(&mut used.1)
        });
    }

    /// The evictor may wait for the lock. So its holder does little, and no signal handler interrupts it: one that misses would wait for
    /// the evictor.
    fn change<R>(&self, change: impl FnOnce(&mut (u64, Used)) -> R) -> R {
        let _blocked = signal::Blocked::all();
        change(&mut lock(&self.used))
    }

    /// Adds units that were used before those that were noted so far, unless it has begun anew since that beginning.
    pub(crate) fn add(&self, beginning: u64, mut earlier: Used) {
        let left = self.change(|used| {
            if used.0 == beginning {
                earlier.append(&used.1);
                std::mem::swap(&mut used.1, &mut earlier);
            }
            earlier
        });
        drop(left);
    }

    /// A unit was read in. Not to be called by the fault path: it takes a lock.
    pub(crate) fn note(&self, unit: Unit) {
        if self.on.load(Ordering::Relaxed) {
            lock(&self.used).1.note(unit);
        }
    }

    /// What was noted since the last beginning.
    pub(crate) fn used(&self) -> Used {
        let _one = lock(&self.saving);
        // (It may be large: it is copied while others note in another.)
        let (beginning, used) = self.change(|used| (used.0, std::mem::take(&mut used.1)));
        let copy = used.clone();
        self.add(beginning, used);
        copy
    }
}

#[cfg(all(test, not(any(loom, faultless_sim))))]
mod tests {
    use super::*;

    #[test]
    fn groups_stand_in_the_order_of_their_first_use_and_have_a_bit_for_each_unit() {
        let recorder = Recorder::default();
        recorder.note(Unit::new(1));
        let first = recorder.start();
        let second = recorder.start();
        recorder.stop(first);
        for unit in [5000, 3, 5001, 511, 512, 3] {
            recorder.note(Unit::new(unit));
        }
        let used = recorder.used();
        let numbers: Vec<u64> = used.groups().iter().map(|g| g.0).collect();
        assert_eq!(numbers, [9, 0, 1]);
        assert_eq!(used.groups()[1].1[0], 1 << 3);
        assert_eq!(used.groups()[1].1[7], 1 << 63);
        assert_eq!(used.groups()[0].1[392 / 64], 0b11 << (392 % 64));
        let mut earlier = Used::default();
        earlier.note(Unit::new(600));
        earlier.note(Unit::new(1500));
        recorder.add(first, earlier.clone());
        assert_eq!(recorder.used().groups(), used.groups());
        recorder.add(second, earlier);
        let numbers: Vec<u64> = recorder.used().groups().iter().map(|g| g.0).collect();
        assert_eq!(numbers, [1, 2, 9, 0]);
        recorder.stop(second);
        recorder.note(Unit::new(1));
        assert!(recorder.used().groups().is_empty());
    }
}
