//! Stand-ins that the program moves by a system call that nobody sees.
//!
//! `mremap` moves a stand-in's armed range, with its pages, to where no map is. The thread that moved it waits in its system call
//! until the kernel's report is read. The reader of reports puts the kernel's mapping there as the very next thing that it does.
//! (Before the report is read the place is not known. A thread that within these microseconds is woken, unmaps what it has moved by
//! another such call, and is given the same addresses for something else would find that replaced.)

#![allow(unsafe_code, reason = "disarms and maps ranges by address")]

use crate::fault::core::{MapCore, Reading};
use crate::fault::identity::Report;
use crate::fault::registry;
use crate::standin::put_kernels;
use faultless_sys::uffd;
use std::ops::Range;

/// Puts the kernel's mapping of what a map had at `from` to where the report says that it is now.
pub(crate) fn follow(report: &Report, from: &Range<usize>, to: usize) {
    registry::for_each_in(from, |core| {
        if report.is_of(core) && !core.takes_away(from) {
            put(core, from.start, &(to..to + from.len()));
            // The report does not tell how long the range has become: what is behind it and still armed belongs to it.
            if let Some(end) = armed_until(to + from.len()) {
                put(core, from.end, &(to + from.len()..end));
            }
        }
    });
}

/// Puts the kernel's mapping of what a map has, or had, from `from` on to `to`, on a thread with the keeper's descriptors.
pub(crate) fn put(core: &MapCore, from: usize, to: &Range<usize>) {
    let (Some(kernel), Reading::File { fd, .. }) = (&core.stands_for, &core.reading) else {
        return;
    };
    // Disarmed first: this thread cannot wait for a report about what it replaces.
    // SAFETY: a range of ours.
    let disarmed = unsafe { uffd::unregister(core.pool.uffd.engine_number(), to.start, to.len()) };
    if disarmed.is_ok() {
        let _ = put_kernels(core, kernel, fd.engine_number(), from, to.start, to.len());
    }
}

/// The end of the mapping that begins at an address, if it is armed by userfaultfd.
fn armed_until(start: usize) -> Option<usize> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").ok()?;
    let head = format!("{start:x}-");
    let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&head));
    let end = lines.next()?[head.len()..].split(' ').next()?;
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:"))?;
    let armed = flags.split(' ').any(|f| f == "um");
    usize::from_str_radix(end, 16).ok().filter(|_| armed)
}
