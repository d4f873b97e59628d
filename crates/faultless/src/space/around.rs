//! Whether what lies around a miss is likely to be wanted, judged by pages that are left out.
//!
//! A load of a page that is there tells nobody, so it cannot be seen whether a neighbour that was read with a miss is used. But now and then
//! one is left out, the farthest from the miss. If it is missed soon, its like are used.

use crate::base::ids::Unit;
use crate::base::primitive::{AtomicU32, AtomicU64, Ordering};

/// Units that are read with one that is missed, where that is done: 128 KiB of pages, as the kernel does for its mappings.
pub(crate) const AROUND: u64 = 32;
/// Units that were left out and are remembered. One is forgotten, and was not wanted, when another takes its place.
const REMEMBERED: usize = 64;
/// The whole, of which shares are parts.
const ONE: u32 = 1 << 16;
/// Neighbours are read if at least this share of those that were left out was missed.
const ENOUGH: u32 = ONE / 4;
/// The weight of one judgement in the share.
const WEIGHT: u32 = 16;
/// While they are read, one window of so many has a unit left out.
const SAMPLE: u64 = 8;
/// While they are not, one window of so many is read, and has a unit left out: at first, and once so many were judged.
const TRY_FIRST: u64 = 16;
const TRY: u64 = 128;
const JUDGED_FIRST: u32 = 64;

/// What to read with a miss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guess {
    /// Nothing.
    Alone,
    /// What lies around it.
    Around,
    /// The same, but for one unit.
    LeaveOut,
}

/// What is known of the neighbours of a map's misses.
pub(crate) struct Around {
    /// The number of each unit, plus 1.
    left_out: [AtomicU64; REMEMBERED],
    share: AtomicU32,
    judged: AtomicU32,
}

fn hash(number: u64) -> u64 {
    // (Not 0 for 0: the front of a file is read oftener than other parts, and would always be tried.)
    let number = number + 1;
    (number ^ number >> 32).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20
}

impl Around {
    pub(crate) fn new() -> Self {
        Around {
            left_out: [const { AtomicU64::new(0) }; REMEMBERED],
            share: AtomicU32::new(0),
            judged: AtomicU32::new(0),
        }
    }

    fn place(&self, unit: Unit) -> &AtomicU64 {
        &self.left_out[hash(unit.get()) as usize % REMEMBERED]
    }

    /// What to read with a miss in a window. (The windows that are tried are a part of all: no thread writes a word for that.)
    pub(crate) fn guess(&self, window: u64) -> Guess {
        let one_of = |count: u64| hash(window).is_multiple_of(count);
        if self.share.load(Ordering::Relaxed) >= ENOUGH {
            return match one_of(SAMPLE) {
                true => Guess::LeaveOut,
                false => Guess::Around,
            };
        }
        let few = self.judged.load(Ordering::Relaxed) < JUDGED_FIRST;
        match one_of(if few { TRY_FIRST } else { TRY }) {
            true => Guess::LeaveOut,
            false => Guess::Alone,
        }
    }

    /// A unit is left out.
    pub(crate) fn leave_out(&self, unit: Unit) {
        let former = self.place(unit).swap(unit.get() + 1, Ordering::Relaxed);
        if former != 0 && former != unit.get() + 1 {
            self.judge(false);
        }
    }

    /// A unit is missed.
    pub(crate) fn missed(&self, unit: Unit) {
        let (place, number) = (self.place(unit), unit.get() + 1);
        let relaxed = Ordering::Relaxed;
        if place.load(relaxed) == number
            && place.compare_exchange(number, 0, relaxed, relaxed).is_ok()
        {
            self.judge(true);
        }
    }

    fn judge(&self, wanted: bool) {
        let to = if wanted { ONE } else { 0 };
        let blend = |share: u32| Some(share - share / WEIGHT + to / WEIGHT);
        let _ = self
            .share
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, blend);
        self.judged.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(any(loom, faultless_sim))))]
mod tests {
    use super::*;

    /// Misses windows at random, and in each the unit that was left out if `used`. Returns how many were read around.
    fn miss(around: &Around, windows: u64, used: bool) -> u64 {
        let mut read = 0;
        let mut random = 1u64;
        for _ in 0..windows {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let window = random >> 30;
            match around.guess(window) {
                Guess::Alone => continue,
                Guess::Around => {}
                Guess::LeaveOut => {
                    let unit = Unit::new(window * 32 + 31);
                    around.leave_out(unit);
                    if used {
                        around.missed(unit);
                    }
                }
            }
            read += 1;
        }
        read
    }

    #[test]
    fn neighbours_are_read_while_they_are_used() {
        let around = Around::new();
        // A reader at random: a few windows are tried, then fewer.
        let first = miss(&around, 5_000, false);
        assert!((60..400).contains(&first), "{first}");
        let then = miss(&around, 100_000, false);
        assert!((500..1_200).contains(&then), "{then}");
        // What lies around is used from now on: it takes some tries to find out.
        let used = miss(&around, 10_000, true);
        assert!(used > 5_000, "{used}");
        assert_eq!(miss(&around, 1_000, true), 1_000);
        // And no more.
        miss(&around, 20_000, false);
        let after = miss(&around, 100_000, false);
        assert!((500..1_200).contains(&after), "{after}");
    }
}
