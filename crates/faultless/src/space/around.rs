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
/// Misses between two ticks of a map's clock, on the average.
const TICK: u64 = 64;
/// A miss is soon within as many misses as this part of the map has units: a reader at random hits one in so many by chance.
const SOON_PART: u64 = 16;
/// Most ticks that count as soon.
const SOON_MAX: u64 = 1 << 14;
/// Bits of an entry that say when a unit was left out. (The number of the unit, plus 1, stands above them.)
const WHEN: u32 = 16;
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
    /// Which, and when.
    left_out: [AtomicU64; REMEMBERED],
    /// The clock.
    ticks: AtomicU32,
    /// Ticks after which a miss is not soon any more.
    soon: u64,
    share: AtomicU32,
    judged: AtomicU32,
}

fn hash(number: u64) -> u64 {
    // (Not 0 for 0: the front of a file is read oftener than other parts, and would always be tried.)
    let number = number + 1;
    (number ^ number >> 32).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20
}

impl Around {
    /// For a map of so many units.
    pub(crate) fn new(units: u64) -> Self {
        Around {
            left_out: [const { AtomicU64::new(0) }; REMEMBERED],
            ticks: AtomicU32::new(0),
            soon: (units / SOON_PART / TICK).clamp(1, SOON_MAX),
            share: AtomicU32::new(0),
            judged: AtomicU32::new(0),
        }
    }

    fn place(&self, unit: Unit) -> &AtomicU64 {
        &self.left_out[hash(unit.get()) as usize % REMEMBERED]
    }

    /// Whether what lies around a miss is likely to be wanted.
    pub(crate) fn is_wanted(&self) -> bool {
        self.share.load(Ordering::Relaxed) >= ENOUGH
    }

    fn now(&self) -> u64 {
        u64::from(self.ticks.load(Ordering::Relaxed)) & ((1 << WHEN) - 1)
    }

    /// Whether an entry is of not long ago.
    fn is_recent(&self, entry: u64) -> bool {
        let age = self.now().wrapping_sub(entry) & ((1 << WHEN) - 1);
        age <= self.soon
    }

    /// What to read with a miss in a window. (The windows that are tried are a part of all: no thread writes a word for that.)
    pub(crate) fn guess(&self, window: u64) -> Guess {
        let one_of = |count: u64| hash(window).is_multiple_of(count);
        if self.is_wanted() {
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
        let entry = (unit.get() + 1) << WHEN | self.now();
        let former = self.place(unit).swap(entry, Ordering::Relaxed);
        let again = former >> WHEN == entry >> WHEN && self.is_recent(former);
        if former != 0 && !again {
            self.judge(false);
        }
    }

    /// A unit is missed. Returns whether it was left out not long ago.
    pub(crate) fn missed(&self, unit: Unit) -> bool {
        // (Some units stand for all: no word is written in most misses.)
        if hash(unit.get() ^ 0x5555).is_multiple_of(TICK) {
            self.ticks.fetch_add(1, Ordering::Relaxed);
        }
        let (place, relaxed) = (self.place(unit), Ordering::Relaxed);
        let entry = place.load(relaxed);
        if entry >> WHEN != unit.get() + 1
            || place.compare_exchange(entry, 0, relaxed, relaxed).is_err()
        {
            return false;
        }
        let soon = self.is_recent(entry);
        self.judge(soon);
        soon
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

    /// A reader that misses pages at random in so many windows, and in each the farthest page as well if `used`. Returns how many
    /// windows of a thousand misses were read around.
    fn read(around: &Around, windows: u64, misses: u64, used: bool) -> u64 {
        let mut read = 0;
        let mut random = 1u64;
        for _ in 0..misses {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let unit = Unit::new((random >> 24) % (windows * AROUND));
            around.missed(unit);
            let window = unit.get() / AROUND;
            match around.guess(window) {
                Guess::Alone => continue,
                Guess::Around => {}
                Guess::LeaveOut => {
                    let farthest = match unit.get() % AROUND < AROUND / 2 {
                        true => Unit::new(window * AROUND + AROUND - 1),
                        false => Unit::new(window * AROUND),
                    };
                    around.leave_out(farthest);
                    if used {
                        around.missed(farthest);
                    }
                }
            }
            read += 1;
        }
        read * 1000 / misses
    }

    #[test]
    fn neighbours_are_read_while_they_are_used() {
        let around = Around::new(1 << 35);
        // A reader at random: a few windows are tried, then fewer.
        let first = read(&around, 1 << 30, 5_000, false);
        assert!((4..80).contains(&first), "{first}");
        let then = read(&around, 1 << 30, 100_000, false);
        assert!((4..13).contains(&then), "{then}");
        // From now on the reader uses the neighbours. The map needs some tries to notice that.
        let used = read(&around, 1 << 30, 10_000, true);
        assert!(used > 500, "{used}");
        assert_eq!(read(&around, 1 << 30, 1_000, true), 1_000);
        // And no more.
        read(&around, 1 << 30, 20_000, false);
        let after = read(&around, 1 << 30, 100_000, false);
        assert!((4..13).contains(&after), "{after}");
    }

    #[test]
    fn a_reader_at_random_of_a_small_map_is_not_taken_for_a_local_one() {
        for windows in [64, 128, 256, 512, 2048] {
            let around = Around::new(windows * AROUND);
            let read = read(&around, windows, 200_000, false);
            assert!(read < 100, "{windows} windows: {read}");
        }
    }
}
