//! The thread that reads the reports of userfaultfd.

#![allow(unsafe_code, reason = "reads what the kernel writes")]

use crate::base::clock;
use crate::base::ids::Nanos;
use crate::base::thread::block_signals;
use crate::coherence::{hooks, moved};
use crate::space::identity;
use faultless_sys::uffd::Event;
use faultless_sys::{poll, uffd};
use std::ops::Range;

/// The data of the event that ends the reader of reports: no number of a descriptor.
pub(super) const END: u64 = u64::MAX;

/// Reads the reports of all userfaultfds: a thread that unmapped or moved a range of ours waits in its system call until its
/// report is read. `identity.rs` says what follows from that. A moved range stays armed, so that a touch of an absent page in
/// it raises SIGBUS and never reads as zero.
pub(super) fn read_reports(epoll: i32) {
    block_signals();
    loop {
        let Ok(number) = poll::wait(epoll) else {
            continue;
        };
        if number == END {
            return;
        }
        let report = identity::report_pending(number as i32);
        // One at a time: each is acted on before the next thread goes on.
        let mut events = [const { std::mem::MaybeUninit::uninit() }; 1];
        let Ok(read) = uffd::read_events(number as i32, &mut events) else {
            drop(report);
            clock::nap(Nanos::from_millis(1));
            continue;
        };
        let in_place = |core: &_, part: &Range<usize>| moved::put(core, part.start, part);
        for event in &events[..read] {
            // SAFETY: the kernel has written so many.
            let Event { event, arg, .. } = unsafe { event.assume_init() };
            let [a, b, c] = arg.map(|x| x as usize);
            match event {
                uffd::EVENT_UNMAP => report.gone(&(a..b), in_place, hooks::lost),
                uffd::EVENT_REMAP => {
                    moved::follow(&report, &(a..a + c), b);
                    report.gone(&(a..a + c), in_place, hooks::lost);
                }
                _ => {}
            }
        }
    }
}
