//! Who stands at the head of a lock, at every instant.
//!
//! Holds arrive in the order in which they end. [`Timeline`] makes of them a sequence of segments that do not overlap: for
//! each instant, the hold that kept others out. While a writer holds the lock that is the writer. While readers hold it
//! together it is the one that has been there longest; so a long read that ends late takes over what short reads that came
//! and went meanwhile had been given.
//!
//! A wait is then explained by the segments between its beginning and its end. Where there is none, nobody held the lock:
//! it was being handed over (the next one was woken, and had to find a processor), or the holder was never seen.
//!
//! Invariant: segments are in order, each begins where the one before it ends or later, none is empty.

use faultless_trace::Nanos;
use std::collections::VecDeque;

/// Segments that are kept, at most. A wait that began before them is explained from the oldest on.
pub(crate) const SEGMENTS_MAX: usize = 1 << 15;

/// A number that the user of the timeline has given to a hold.
pub(crate) type HoldNo = u64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) from: Nanos,
    pub(crate) to: Nanos,
    pub(crate) hold: HoldNo,
    /// Whose it is, and what for: kept here, since a wait looks at hundreds of these.
    pub(crate) tid: u32,
    pub(crate) doer: u32,
    pub(crate) write: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Timeline {
    segments: VecDeque<Segment>,
}

impl Timeline {
    /// Adds a hold that has ended.
    pub(crate) fn add(&mut self, new: Segment, most: usize) {
        let (from, to) = (new.from, new.to);
        let mut start = from;
        // What lies within the new hold is overtaken by it; what began before it stays, up to its end.
        let mut later = Vec::new();
        while let Some(last) = self.segments.back().copied() {
            if last.from >= to {
                // Ended after this one, on another processor: told in the wrong order.
                later.push(last);
                self.segments.pop_back();
            } else if last.from >= from {
                self.segments.pop_back();
                if last.to > to {
                    later.push(Segment { from: to, ..last });
                }
            } else {
                start = start.max(last.to);
                break;
            }
        }
        if start < to {
            self.segments.push_back(Segment { from: start, ..new });
        }
        self.segments.extend(later.into_iter().rev());
        self.trim(most);
    }

    fn trim(&mut self, most: usize) {
        while self.segments.len() >= most.min(SEGMENTS_MAX) {
            self.segments.pop_front();
        }
    }

    /// When the last writer that is known let go.
    pub(crate) fn last_writer(&self) -> Option<Nanos> {
        self.segments.iter().rev().find(|s| s.write).map(|s| s.to)
    }

    /// Adds a hold where nobody else is known to have held the lock.
    pub(crate) fn add_between(&mut self, new: Segment, most: usize) {
        let (from, to) = (new.from, new.to);
        let mut held = Vec::new();
        while let Some(last) = self.segments.pop_back_if(|s| s.to > from) {
            held.push(last);
        }
        let mut at = from;
        for segment in held.into_iter().rev() {
            if segment.from > at && at < to {
                self.segments.push_back(Segment {
                    from: at,
                    to: segment.from.min(to),
                    ..new
                });
            }
            at = at.max(segment.to);
            self.segments.push_back(segment);
        }
        if at < to {
            self.segments.push_back(Segment { from: at, ..new });
        }
        self.trim(most);
    }

    /// The segments between two instants, cut to them, latest first.
    pub(crate) fn between(&self, from: Nanos, to: Nanos) -> impl Iterator<Item = Segment> + '_ {
        self.segments
            .iter()
            .rev()
            .skip_while(move |s| s.from >= to)
            .take_while(move |s| s.to > from)
            .map(move |s| Segment {
                from: s.from.max(from),
                to: s.to.min(to),
                ..*s
            })
    }

    #[cfg(test)]
    fn is_sound(&self) -> bool {
        self.segments.iter().all(|s| s.from < s.to)
            && self
                .segments
                .iter()
                .zip(self.segments.iter().skip(1))
                .all(|(a, b)| a.to <= b.from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn segment(from: Nanos, to: Nanos, hold: HoldNo, write: bool) -> Segment {
        Segment {
            from,
            to,
            hold,
            tid: 0,
            doer: 0,
            write,
        }
    }

    fn of(holds: &[(Nanos, Nanos, bool)]) -> Timeline {
        let mut timeline = Timeline::default();
        for (no, &(from, to, write)) in holds.iter().enumerate() {
            timeline.add(segment(from, to, no as HoldNo, write), 100);
        }
        timeline
    }

    fn explained(timeline: &Timeline, from: Nanos, to: Nanos) -> Vec<(Nanos, Nanos, HoldNo)> {
        let mut all: Vec<_> = timeline
            .between(from, to)
            .map(|s| (s.from, s.to, s.hold))
            .collect();
        all.reverse();
        all
    }

    #[test]
    fn a_long_read_is_the_head_although_short_ones_ended_before() {
        let timeline = of(&[(10, 20, false), (30, 40, false), (5, 100, false)]);
        assert_eq!(explained(&timeline, 0, 200), [(5, 100, 2)]);
    }

    #[test]
    fn a_read_that_joined_late_is_the_head_only_after_the_first_has_gone() {
        let timeline = of(&[(0, 10, false), (9, 12, false)]);
        assert_eq!(explained(&timeline, 0, 20), [(0, 10, 0), (10, 12, 1)]);
    }

    #[test]
    fn what_is_added_between_leaves_the_others_alone() {
        let mut timeline = of(&[(0, 10, true), (12, 20, true), (25, 30, true)]);
        timeline.add_between(segment(5, 40, 9, true), 100);
        assert!(timeline.is_sound());
        assert_eq!(
            explained(&timeline, 0, 50),
            [
                (0, 10, 0),
                (10, 12, 9),
                (12, 20, 1),
                (20, 25, 9),
                (25, 30, 2),
                (30, 40, 9)
            ]
        );
        let mut timeline = of(&[(0, 10, true)]);
        timeline.add_between(segment(2, 8, 9, true), 100);
        assert_eq!(explained(&timeline, 0, 50), [(0, 10, 0)]);
    }

    #[test]
    fn a_wait_sees_its_own_part() {
        let timeline = of(&[(0, 10, true), (12, 20, true), (21, 30, false)]);
        assert_eq!(
            explained(&timeline, 5, 25),
            [(5, 10, 0), (12, 20, 1), (21, 25, 2)]
        );
        assert_eq!(explained(&timeline, 10, 12), []);
    }

    proptest! {
        /// Against a model that looks at each instant by itself.
        #[test]
        fn at_each_instant_that_somebody_held_it_one_of_them_is_the_head(
            spans in proptest::collection::vec((0u64..60, 1u64..20), 1..20),
        ) {
            let mut holds: Vec<(Nanos, Nanos, bool)> =
                spans.iter().map(|&(from, len)| (from, from + len, false)).collect();
            holds.sort_by_key(|h| h.1);
            let timeline = of(&holds);
            prop_assert!(timeline.is_sound());
            for t in 0..80 {
                let held = holds.iter().any(|h| h.0 <= t && t < h.1);
                let head = timeline.between(t, t + 1).next();
                prop_assert_eq!(head.is_some(), held, "at {}", t);
                if let Some(head) = head {
                    let hold = holds[head.hold as usize];
                    prop_assert!(hold.0 <= t && t < hold.1, "a hold that was not there, at {}", t);
                }
            }
        }

        /// Writers exclude all others: then every hold is the head for all of its time.
        #[test]
        fn exclusive_holds_are_heads_from_beginning_to_end(
            lengths in proptest::collection::vec((1u64..9, 0u64..3), 1..40),
        ) {
            let mut at = 0;
            let mut holds = Vec::new();
            for (len, gap) in lengths {
                holds.push((at + gap, at + gap + len, true));
                at += gap + len;
            }
            let timeline = of(&holds);
            let all = explained(&timeline, 0, at + 1);
            let expected: Vec<_> = holds.iter().enumerate().map(|(no, h)| (h.0, h.1, no as HoldNo)).collect();
            prop_assert_eq!(all, expected);
        }
    }
}
