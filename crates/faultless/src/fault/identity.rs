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
//! 4. The map's *live* range is cut; then discards are let in again. Each looks at the live range first ([`discarding`]).
//!
//! A discard that began before step 2 strikes while the thread that unmapped still waits, so that no memory of its making
//! can be there. One that begins after step 4 finds the range gone. Between the two there is none. What remains is another
//! thread that is given the same addresses, by a system call of its own that nobody sees, before step 2, and that has
//! written there: for a mapping call that we do see, [`MapCore::lose`] is called before it returns.

#![allow(unsafe_code, reason = "installs a page in a new range, and discards it")]

use super::core::MapCore;
use super::registry;
use faultless_sys::mem::{self, PAGE};
use faultless_sys::{Errno, futex, raw, uffd};
use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

/// Discards that are in progress.
static DISCARDS: AtomicU32 = AtomicU32::new(0);
/// 1 from before a report is read until it has been acted on.
static REPORT: AtomicU32 = AtomicU32::new(0);
/// Ranges that were moved to where no map is, and where the kernel's mapping is not yet in place.
static MOVED: AtomicU32 = AtomicU32::new(0);

/// How long to wait for a report to be acted on before looking again.
const REPORT_WAIT_NS: u64 = 10_000_000;
/// How long to wait for discards before looking again.
const DISCARDS_NAP_NS: u64 = 20_000;

/// The addresses of a map that are still its own. They only ever become fewer.
#[derive(Debug)]
pub(crate) struct Live {
    start: AtomicUsize,
    end: AtomicUsize,
}

impl Live {
    pub(crate) fn new(range: Range<usize>) -> Self {
        Live {
            start: AtomicUsize::new(range.start),
            end: AtomicUsize::new(range.end),
        }
    }

    pub(crate) fn get(&self) -> Range<usize> {
        self.start.load(Ordering::SeqCst)..self.end.load(Ordering::SeqCst)
    }

    /// Whether all of a range is the map's own.
    pub(crate) fn covers(&self, addr: usize, len: usize) -> bool {
        let live = self.get();
        live.start <= addr && addr + len <= live.end
    }

    fn none(&self) {
        // In this order: a reader in between sees an empty range.
        self.end.store(0, Ordering::SeqCst);
        self.start.store(0, Ordering::SeqCst);
    }

    /// Takes a range away. Returns what is left, if that is one range; nothing is left otherwise.
    pub(crate) fn cut(&self, gone: &Range<usize>) -> Range<usize> {
        let live = self.get();
        if gone.end <= live.start || live.end <= gone.start {
            return live;
        }
        match (gone.start <= live.start, live.end <= gone.end) {
            (true, false) => self.start.store(gone.end, Ordering::SeqCst),
            (false, true) => self.end.store(gone.start, Ordering::SeqCst),
            _ => self.none(),
        }
        self.get()
    }
}

/// What a program did to a stand-in behind our back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// The addresses that were the stand-in's before.
    pub live: Range<usize>,
    /// Those that it lost.
    pub gone: Range<usize>,
    /// Where they were moved to, if they were.
    pub moved_to: Option<usize>,
}

impl MapCore {
    /// Notes that a range was unmapped, moved or mapped over behind our back: nothing of the map is discarded any more. Returns
    /// what was the map's own before.
    pub(crate) fn lose(&self) -> Range<usize> {
        let live = self.live.get();
        self.live.none();
        live
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
    // Read is not acted on: the next turn of the reader's comes after that.
    while REPORT.load(Ordering::SeqCst) != 0 {
        futex::wait(&REPORT, 1, REPORT_WAIT_NS);
    }
    Ok(())
}

/// A report is there to be read, and no discard is in progress.
pub(crate) struct Report(i32);

/// Called by the one thread that reads reports, before it reads one from `uffd`, a number in the engine's own table.
pub(crate) fn report_pending(uffd: i32) -> Report {
    REPORT.store(1, Ordering::SeqCst);
    while DISCARDS.load(Ordering::SeqCst) != 0 {
        raw::nap(DISCARDS_NAP_NS);
    }
    Report(uffd)
}

impl Report {
    /// Whether a map's range is armed by the descriptor that reports.
    fn is_of(&self, core: &MapCore) -> bool {
        core.pool.uffd.engine_number() == self.0
    }

    /// Addresses were unmapped, or mapped over. Returns the stand-in that lost them without our doing, and what it lost.
    pub(crate) fn unmapped(&self, gone: &Range<usize>, mut tell: impl FnMut(u64, Lost)) {
        registry::for_each_in(gone, |core| {
            if self.is_of(core) && !core.gives_way() {
                let live = core.lose();
                let gone = gone.clone();
                let moved_to = None;
                if core.stands_for.is_some() {
                    tell(core.serial, Lost { live, gone, moved_to });
                }
            }
        });
    }

    /// Addresses were moved.
    pub(crate) fn moved(&self, from: &Range<usize>, to: usize, mut tell: impl FnMut(u64, Lost)) {
        registry::for_each_in(from, |core| {
            if self.is_of(core) && !core.gives_way() {
                let live = core.lose();
                if core.stands_for.is_some() {
                    // Before the report ends: a load at the new place finds one or the other.
                    MOVED.fetch_add(1, Ordering::SeqCst);
                    let gone = from.clone();
                    tell(core.serial, Lost { live, gone, moved_to: Some(to) });
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

/// The kernel's mapping is in place where a stand-in was moved to.
pub(crate) fn settle_moved() {
    let one_less = |n: u32| n.checked_sub(1);
    let _ = MOVED.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less);
}

/// Whether a fault at an address that is no map's may be one in a range that was moved there just now.
pub(crate) fn may_have_moved() -> bool {
    REPORT.load(Ordering::SeqCst) != 0 || MOVED.load(Ordering::SeqCst) != 0
}

/// A forked child has none of the threads that discard, read reports, or hand back.
pub(crate) fn in_child() {
    for word in [&DISCARDS, &REPORT, &MOVED] {
        word.store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_range_is_cut_at_its_ends_and_given_up_when_a_hole_is_cut_into_it() {
        let live = Live::new(100..200);
        assert_eq!(live.cut(&(0..100)), 100..200);
        assert_eq!(live.cut(&(50..120)), 120..200);
        assert_eq!(live.cut(&(190..300)), 120..190);
        assert!(live.covers(120, 70) && !live.covers(119, 2) && !live.covers(189, 2));
        assert_eq!(live.cut(&(130..140)), 0..0);
        assert!(!live.covers(150, 1));
        let all = Live::new(100..200);
        assert_eq!(all.cut(&(100..200)), 0..0);
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
