//! The addresses of a map that are still its own.

use crate::base::primitive::{AtomicU32, AtomicUsize, Ordering};
use faultless_sys::{raw, signal};
use std::ops::Range;

/// Ranges that what is left of a map can consist of.
const PARTS: usize = 16;

/// The addresses of a map that are still its own. They only ever become fewer.
#[derive(Debug)]
pub(crate) struct Live {
    /// Odd while the rest is being written, by one thread.
    version: AtomicU32,
    /// First address and end of each part; parts that are empty come last.
    parts: [[AtomicUsize; 2]; PARTS],
}

/// What is left of a map, as it was at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Parts([[usize; 2]; PARTS]);

impl Parts {
    /// The parts, of which none is empty.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let all = self.0.iter().map(|&[start, end]| start..end);
        all.take_while(|part| !part.is_empty())
    }

    /// From the first address of the first part to the end of the last.
    pub(crate) fn hull(&self) -> Range<usize> {
        let starts = self.iter().map(|p| p.start).min();
        let ends = self.iter().map(|p| p.end).max();
        starts.unwrap_or(0)..ends.unwrap_or(0)
    }

    pub(crate) fn touch(&self, range: &Range<usize>) -> bool {
        self.iter()
            .any(|p| p.start < range.end && range.start < p.end)
    }

    /// What is left without a range; and the smallest part, if it is one too many to be kept.
    pub(crate) fn without(&self, gone: &Range<usize>) -> (Parts, Option<Range<usize>>) {
        // A range cut out of the middle makes two parts of one.
        let mut left = [[0; 2]; PARTS + 1];
        let mut n = 0;
        for p in self.iter() {
            let cut = gone.start.clamp(p.start, p.end)..gone.end.clamp(p.start, p.end);
            for part in [p.start..cut.start.min(p.end), cut.end.max(p.start)..p.end] {
                let whole = cut.is_empty();
                let part = if whole { p.clone() } else { part };
                if !part.is_empty() && n <= PARTS {
                    left[n] = [part.start, part.end];
                    n += 1;
                }
                if whole {
                    break;
                }
            }
        }
        let mut dropped = None;
        if n > PARTS {
            let smallest = (0..n).min_by_key(|&i| left[i][1] - left[i][0]).unwrap_or(0);
            dropped = Some(left[smallest][0]..left[smallest][1]);
            left[smallest] = left[n - 1];
        }
        let mut parts = [[0; 2]; PARTS];
        parts.copy_from_slice(&left[..PARTS]);
        (Parts(parts), dropped)
    }
}

impl Live {
    pub(crate) fn new(range: Range<usize>) -> Self {
        let live = Live {
            version: AtomicU32::new(0),
            parts: Default::default(),
        };
        live.parts[0][0].store(range.start, Ordering::SeqCst);
        live.parts[0][1].store(range.end, Ordering::SeqCst);
        live
    }

    /// What is left now. A handler may ask.
    pub(crate) fn get(&self) -> Parts {
        loop {
            let version = self.version.load(Ordering::SeqCst);
            let parts = std::array::from_fn(|i| {
                [0, 1].map(|end| self.parts[i][end].load(Ordering::SeqCst))
            });
            if version & 1 == 0 && self.version.load(Ordering::SeqCst) == version {
                return Parts(parts);
            }
            raw::sched_yield();
        }
    }

    /// What is left, for a forked child: the thread that was writing when the process was copied is not here. (A part that is
    /// being cut at that moment may still be there.)
    pub(crate) fn in_child(&self) -> Parts {
        Parts(std::array::from_fn(|i| {
            [0, 1].map(|end| self.parts[i][end].load(Ordering::SeqCst))
        }))
    }

    /// Whether all of a range is the map's own.
    pub(crate) fn covers(&self, addr: usize, len: usize) -> bool {
        let Some(end) = addr.checked_add(len) else {
            return false;
        };
        // A map that has lost nothing is the first part alone, and each miss asks.
        let version = self.version.load(Ordering::SeqCst);
        let [first, last] = [0, 1].map(|i| self.parts[0][i].load(Ordering::SeqCst));
        let steady = version & 1 == 0 && self.version.load(Ordering::SeqCst) == version;
        if steady && first <= addr && end <= last {
            return true;
        }
        self.get().iter().any(|p| p.start <= addr && end <= p.end)
    }

    /// Takes a range away, and returns what is left; and a part that goes with it, because there would be too many.
    pub(crate) fn cut(&self, gone: &Range<usize>) -> (Parts, Option<Range<usize>>) {
        let _no_handler_here = signal::Blocked::all();
        loop {
            let version = self.version.load(Ordering::SeqCst);
            let (old, order) = (self.get(), Ordering::SeqCst);
            if version & 1 != 0
                || self
                    .version
                    .compare_exchange(version, version + 1, order, order)
                    .is_err()
            {
                raw::sched_yield();
                continue;
            }
            let (left, dropped) = old.without(gone);
            for (part, new) in self.parts.iter().zip(left.0) {
                part[0].store(new[0], Ordering::SeqCst);
                part[1].store(new[1], Ordering::SeqCst);
            }
            self.version.store(version + 2, Ordering::SeqCst);
            return (left, dropped);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn live_ranges_are_cut_at_their_ends_and_in_their_middle() {
        let live = Live::new(100..200);
        let left = |(parts, dropped): (Parts, Option<_>)| {
            assert_eq!(dropped, None);
            parts.iter().map(|p| (p.start, p.end)).collect::<Vec<_>>()
        };
        assert_eq!(left(live.cut(&(0..100))), [(100, 200)]);
        assert_eq!(left(live.cut(&(50..120))), [(120, 200)]);
        assert_eq!(left(live.cut(&(190..300))), [(120, 190)]);
        assert!(live.covers(120, 70) && !live.covers(119, 2) && !live.covers(189, 2));
        assert_eq!(left(live.cut(&(130..140))), [(120, 130), (140, 190)]);
        assert!(!live.covers(125, 10) && live.covers(120, 10) && live.covers(140, 50));
        assert_eq!(live.get().hull(), 120..190);
        assert_eq!(left(live.cut(&(125..150))), [(120, 125), (150, 190)]);
        assert_eq!(left(live.cut(&(0..1000))), []);
        assert_eq!(live.get().hull(), 0..0);
    }

    #[test]
    fn a_map_that_is_cut_into_too_many_parts_tells_which_it_loses() {
        let live = Live::new(0..100_000);
        for i in 1..PARTS {
            assert_eq!(live.cut(&(i * 100..i * 100 + 1)).1, None);
        }
        // One of a single address, which is one too many.
        let (left, dropped) = live.cut(&(50_000..50_001));
        assert_eq!(left.iter().count(), PARTS);
        let dropped = dropped.expect("one too many");
        assert_eq!(dropped.len(), 99);
        assert!(!live.covers(dropped.start, 1) && live.covers(60_000, 1));
    }
}
