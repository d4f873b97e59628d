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

use crate::base::clock;
use crate::base::ids::Nanos;
use crate::base::primitive::{AtomicU32, Ordering, real};
use crate::space::map_core::MapCore;
use crate::space::registry;
use faultless_sys::mem::PAGE;
use faultless_sys::{Errno, futex, mem, raw, uffd};
use std::ops::Range;

/// Discards that are in progress.
static DISCARDS: AtomicU32 = AtomicU32::new(0);
/// 1 from before a report is read until it has been acted on.
static REPORT: AtomicU32 = AtomicU32::new(0);

/// How long to wait for a report to be acted on before looking again.
const REPORT_WAIT: Nanos = Nanos::from_millis(10);
/// How long to wait for discards before looking again.
const DISCARDS_NAP: Nanos = Nanos::from_micros(20);

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
        futex::wait(real(&REPORT), 1, REPORT_WAIT.get());
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
        futex::wait(real(&REPORT), 1, REPORT_WAIT.get());
    }
}

/// Waits until discards that are in progress have ended: to be called after a live range was cut and before its addresses can
/// become somebody else's. Those that begin later look at what is left.
pub(crate) fn wait_for_discards() {
    while DISCARDS.load(Ordering::SeqCst) != 0 {
        clock::nap(DISCARDS_NAP);
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
        futex::wake(real(&REPORT), futex::ALL);
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
