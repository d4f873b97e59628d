//! Stand-ins that the program moves by a system call that nobody sees.
//!
//! `mremap` moves a stand-in's armed range, with its pages, to where no map is. The thread that moved it waits in its system call
//! until the kernel's report is read. The kernel's mapping is put there as the very next thing. The range stays armed until
//! then: a load of an absent page raises SIGBUS and waits (`identity::may_have_moved`); disarmed, it would read zeros. Replacing an
//! armed range is itself reported, and the call waits for that, so a thread of its own makes it, while this one reads on.
//!
//! Before the report is read the new place is not known. A thread that within these microseconds is woken, unmaps what it has moved
//! by another such call, and is given the same addresses for something else would find that replaced.

#![allow(unsafe_code, reason = "reads what the kernel writes")]

use crate::base::ids::Nanos;
use crate::base::thread::block_signals;
use crate::base::{clock, text};
use crate::coherence::hand_back::put_kernels;
use crate::space::identity::Report;
use crate::space::map_core::{MapCore, Reading};
use crate::space::registry;
use faultless_sys::{mem, uffd};
use std::ops::Range;

/// Puts the kernel's mapping of what a map had at `from` to where the report says that it is now.
pub(crate) fn follow(report: &Report, from: &Range<usize>, to: usize) {
    registry::for_each_in(from, |core| {
        if report.is_of(core) && !core.takes_away(from) {
            put(core, from.start, &(to..to + from.len()));
            // The report does not tell how long the range has become: what is behind it, armed and no map's, belongs to it.
            let behind = to + from.len();
            if mem::mapped(behind)
                && let Some(end) = armed_until(behind)
                && !registry::touches(&(behind..end))
            {
                put(core, from.end, &(behind..end));
            }
        }
    });
}

/// Puts the kernel's mapping of what a map has, or had, from `from` on to `to`, on a thread with the keeper's descriptors.
pub(crate) fn put(core: &MapCore, from: usize, to: &Range<usize>) {
    let (Some(kernel), Reading::File { fd, .. }) = (&core.stands_for, &core.reading) else {
        return;
    };
    let (number, uffd) = (fd.engine_number(), core.pool.uffd.engine_number());
    std::thread::scope(|scope| {
        // (It shares this thread's descriptors.)
        let mapping = std::thread::Builder::new().spawn_scoped(scope, || {
            block_signals();
            put_kernels(core, kernel, number, from, to.start, to.len())
        });
        let Ok(mapping) = mapping else {
            return;
        };
        while !mapping.is_finished() {
            read_on(uffd, to);
        }
    });
}

/// Reads a report, if there is one, while a range is being replaced by the engine itself.
fn read_on(uffd: i32, replaced: &Range<usize>) {
    let mut events = [const { std::mem::MaybeUninit::uninit() }; 1];
    match uffd::read_events(uffd, &mut events) {
        Ok(1) => {}
        _ => return clock::nap(READ_AGAIN),
    }
    // SAFETY: the kernel has written one.
    let event: uffd::Event = unsafe { events[0].assume_init() };
    let gone = event.arg[0] as usize..event.arg[1] as usize;
    // (If another thread moves a stand-in at this moment, the range is cut and its new place is not followed.)
    let gone = match event.event {
        uffd::EVENT_UNMAP => gone,
        _ => gone.start..gone.start + event.arg[2] as usize,
    };
    if gone != *replaced {
        registry::for_each_in(&gone, |core| {
            if core.pool.uffd.engine_number() == uffd && !core.takes_away(&gone) {
                core.live.cut(&gone);
            }
        });
    }
}

/// How long to wait for the next report.
const READ_AGAIN: Nanos = Nanos::from_micros(5);

/// The end of the mapping that begins at an address, if it is armed by userfaultfd.
fn armed_until(start: usize) -> Option<usize> {
    let smaps = text::read("/proc/self/smaps").ok()?;
    let head = format!("{start:x}-");
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&head));
    let end = lines.next()?[head.len()..].split(' ').next()?;
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:"))?;
    let armed = flags.split(' ').any(|f| f == "um");
    usize::from_str_radix(end, 16).ok().filter(|_| armed)
}
