//! Whether addresses are still ours.
//!
//! A program can unmap, move or map over a region of ours by a system call that nobody sees: in assembly, in the dynamic
//! linker, in a plugin that binds its own C library. The kernel then gives the addresses to somebody else, and a discard that
//! was right a moment ago destroys foreign memory. So nothing is discarded on the strength of our own books alone.
//!
//! The kernel itself says when a region goes: userfaultfd reports an unmapped or moved range
//! (`UFFD_FEATURE_EVENT_UNMAP`, `UFFD_FEATURE_EVENT_REMAP`), and **the thread that unmapped it does not return from its system
//! call before the report is read**. The engine reads reports in one thread, which proceeds in this order:
//!
//! 1. The descriptor polls readable: some thread has unmapped something and waits.
//! 2. [`report_pending`] stops new discards, and waits until none is in progress.
//! 3. The report is read: the waiting thread goes on, and may reuse the addresses from here on.
//! 4. The map's *live* ranges are cut; then discards are let in again. Each looks at the live ranges first ([`discarding`]).
//!
//! A discard that began before step 2 strikes while the thread that unmapped still waits, so that no memory of its making
//! can be there. One that begins after step 4 finds the range gone. Between the two there is none. What remains is another
//! thread that is given the same addresses, by a system call of its own that nobody sees, before step 2, and that has
//! written there: a mapping call that we do see cuts the live ranges before it returns (`standin::given_out`).

#![allow(
    unsafe_code,
    reason = "installs a page in a new range, and discards it"
)]

use super::core::MapCore;
use super::registry;
use faultless_sys::mem::{self, PAGE};
use faultless_sys::{Errno, futex, raw, signal, uffd};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Discards that are in progress.
static DISCARDS: AtomicU32 = AtomicU32::new(0);
/// 1 from before a report is read until it has been acted on.
static REPORT: AtomicU32 = AtomicU32::new(0);

/// How long to wait for a report to be acted on before looking again.
const REPORT_WAIT_NS: u64 = 10_000_000;
/// How long to wait for discards before looking again.
const DISCARDS_NAP_NS: u64 = 20_000;

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

/// While this lives, no report is being acted on: what is live stays ours for as long as the thread that takes it away is
/// held up. Not to be held by who unmaps something of ours: that waits for a report.
pub(crate) struct Discarding(());

/// Waits until no report is being acted on.
pub(crate) fn discarding() -> Discarding {
    loop {
        DISCARDS.fetch_add(1, Ordering::SeqCst);
        if REPORT.load(Ordering::SeqCst) == 0 {
            return Discarding(());
        }
        DISCARDS.fetch_sub(1, Ordering::SeqCst);
        futex::wait(&REPORT, 1, REPORT_WAIT_NS);
    }
}

impl Drop for Discarding {
    fn drop(&mut self) {
        DISCARDS.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Tries while the kernel says that reports are pending: each is read within microseconds.
const BARRIER_TRIES: u32 = 200_000;

/// Waits until all reports have been acted on that concern former owners of a range: to be called when a new map's range is
/// armed, and before the map can be found. A report names addresses, and must not be taken for one about the new map.
///
/// The kernel refuses to install pages (`EAGAIN`) from the moment that it unmaps or moves an armed range until the report has been
/// read. So a page that can be installed in the new range proves that none is pending. (It also has the kernel prepare the
/// range, which would take `mmap_lock` at the first miss.)
pub(crate) fn wait_for_older_reports(uffd: i32, addr: usize) -> Result<(), Errno> {
    #[repr(align(4096))]
    struct Page([u8; PAGE]);
    static ZEROS: Page = Page([0; PAGE]);
    let mut tries = 0;
    loop {
        // SAFETY: an armed range of the caller's, which nobody reads yet.
        let copied = unsafe { uffd::copy(uffd, addr, ZEROS.0.as_ptr() as usize, PAGE, false) };
        match copied.error {
            None => break,
            Some(Errno(libc::EAGAIN)) if tries < BARRIER_TRIES => tries += 1,
            Some(e) => return Err(e),
        }
        raw::sched_yield();
    }
    // SAFETY: the page that was installed just now.
    unsafe { mem::discard(addr, PAGE) };
    wait_for_report();
    Ok(())
}

/// Waits until a report that has been read has been acted on.
pub(crate) fn wait_for_report() {
    while REPORT.load(Ordering::SeqCst) != 0 {
        futex::wait(&REPORT, 1, REPORT_WAIT_NS);
    }
}

/// Waits until discards that are in progress have ended: to be called after a live range was cut and before its addresses can
/// become somebody else's. Those that begin later look at what is left.
pub(crate) fn wait_for_discards() {
    while DISCARDS.load(Ordering::SeqCst) != 0 {
        raw::nap(DISCARDS_NAP_NS);
    }
}

/// A report is there to be read, and no discard is in progress.
pub(crate) struct Report(i32);

/// Called by the one thread that reads reports, before it reads one from `uffd`, a number in the engine's own table.
pub(crate) fn report_pending(uffd: i32) -> Report {
    REPORT.store(1, Ordering::SeqCst);
    wait_for_discards();
    Report(uffd)
}

impl Report {
    /// Whether a map's range is armed by the descriptor that reports.
    pub(crate) fn is_of(&self, core: &MapCore) -> bool {
        core.pool.uffd.engine_number() == self.0
    }

    /// Addresses went without our doing, or by it. `tell` is called where a stand-in has none left.
    /// `dropped` is called with a part that can be served no longer because there would be too many.
    pub(crate) fn gone(
        &self,
        gone: &Range<usize>,
        mut dropped: impl FnMut(&MapCore, &Range<usize>),
        mut tell: impl FnMut(),
    ) {
        registry::for_each_in(gone, |core| {
            if self.is_of(core) && !core.takes_away(gone) {
                let (left, part) = core.live.cut(gone);
                if let Some(part) = part {
                    dropped(core, &part);
                }
                if left.hull().is_empty() && core.stands_for.is_some() {
                    tell();
                }
            }
        });
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        REPORT.store(0, Ordering::SeqCst);
        futex::wake(&REPORT, futex::ALL);
    }
}

/// Whether a fault at an address that is no map's may be one in a range that is being moved there.
pub(crate) fn may_have_moved() -> bool {
    REPORT.load(Ordering::SeqCst) != 0
}

/// A forked child has none of the threads that discard, read reports, or hand back.
pub(crate) fn in_child() {
    for word in [&DISCARDS, &REPORT] {
        word.store(0, Ordering::SeqCst);
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

    #[test]
    fn no_discard_begins_between_the_look_for_others_and_the_end_of_a_report() {
        let before = discarding();
        let (tell, told) = std::sync::mpsc::channel();
        std::thread::scope(|s| {
            let reader = s.spawn(|| {
                let report = report_pending(-1);
                assert_eq!(DISCARDS.load(Ordering::SeqCst), 0, "none is in progress");
                tell.send(()).expect("the test listens");
                report
            });
            // The reader waits for the discard that is in progress.
            while REPORT.load(Ordering::SeqCst) == 0 {
                std::thread::yield_now();
            }
            assert!(told.try_recv().is_err());
            drop(before);
            let report = reader.join().expect("it comes to its turn");
            let late = s.spawn(|| {
                let _guard = discarding();
                REPORT.load(Ordering::SeqCst)
            });
            while DISCARDS.load(Ordering::SeqCst) == 0 && !late.is_finished() {
                std::thread::yield_now();
            }
            assert!(!late.is_finished());
            drop(report);
            assert_eq!(late.join().expect("it is let in"), 0);
        });
    }
}
