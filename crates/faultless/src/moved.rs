//! Stand-ins that the program moves by a system call that nobody sees.
//!
//! `mremap` moves a stand-in's armed range, with its pages, to where no map is. The thread that moved it waits in its system call
//! until the kernel's report is read, and may do anything with the new addresses afterwards. So the kernel's mapping is put
//! there *before* the report is read. What the report would say is found out from the list of mappings: which of our
//! ranges is missing, and which armed range is none of ours. Only if that is ambiguous (several threads move stand-ins at
//! the same moment) is the report read first, and the mapping put there immediately after.

#![allow(unsafe_code, reason = "asks for pages by address, maps files by address")]

use crate::fault::core::MapCore;
use crate::fault::identity::Report;
use crate::fault::registry;
use crate::standin::put_kernels;
use faultless_sys::mem::{self, PAGE};
use faultless_sys::uffd;
use std::ops::Range;

/// Puts the kernel's mapping where a stand-in was moved to, as far as that can be found out before the report is read. Returns the
/// new place.
pub(crate) fn follow(report: &Report) -> Option<usize> {
    let mut torn = Vec::new();
    registry::for_each(|core| {
        let ends = |part: Range<usize>| mem::mapped(part.start) && mem::mapped(part.end - PAGE);
        if report.is_of(core) && !core.gives_way() && !core.live.get().iter().all(ends) {
            torn.push(core.serial);
        }
    });
    let [torn] = torn[..] else {
        return None;
    };
    let armed = armed_ranges();
    let mut moved = None;
    registry::for_each(|core| {
        if core.serial == torn {
            moved = unknown(&armed).and_then(|to| settle(core, &armed, &to));
        }
    });
    moved
}

/// Puts the kernel's mapping of what a map had at `from` to where the report says that it is now.
pub(crate) fn follow_report(report: &Report, from: &Range<usize>, to: usize) {
    registry::for_each_in(from, |core| {
        if report.is_of(core) && !core.gives_way() {
            put(core, from.start, &(to..to + from.len()));
        }
    });
}

/// The armed range that is no map's, if there is one only.
fn unknown(armed: &[Range<usize>]) -> Option<Range<usize>> {
    let mut known = Vec::new();
    registry::for_each(|core| known.push(core.region()));
    let ours = |r: &&Range<usize>| known.iter().any(|k| k.start < r.end && r.start < k.end);
    let mut others = armed.iter().filter(|r| !ours(r));
    let first = others.next()?.clone();
    others.next().is_none().then_some(first)
}

/// Puts the kernel's mapping of the one hole in a map's live ranges to `to`.
fn settle(core: &MapCore, armed: &[Range<usize>], to: &Range<usize>) -> Option<usize> {
    let live = core.live.get();
    let missing = |part: &Range<usize>| {
        let mut at = part.start;
        while let Some(there) = armed.iter().find(|a| a.contains(&at)) {
            at = there.end;
        }
        (at < part.end).then_some(at)
    };
    let from = live.iter().find_map(|part| missing(&part))?;
    put(core, from, to);
    Some(to.start)
}

fn put(core: &MapCore, from: usize, to: &Range<usize>) {
    let Some(kernel) = &core.stands_for else {
        return;
    };
    // Disarmed first: this thread cannot wait for a report about what it replaces.
    // SAFETY: a range of ours, whose new address nobody knows before the report is read.
    let _ = unsafe { uffd::unregister(core.pool.uffd.engine_number(), to.start, to.len()) };
    let _ = put_kernels(core, kernel, from, to.start, to.len());
}

/// The ranges of this process that are armed by userfaultfd.
fn armed_ranges() -> Vec<Range<usize>> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let mut armed: Vec<Range<usize>> = Vec::new();
    let mut now = 0..0;
    for line in smaps.lines() {
        let number = |text| usize::from_str_radix(text, 16).ok();
        let head = line.split(' ').next().and_then(|h| h.split_once('-'));
        if let Some((start, end)) = head
            && let (Some(start), Some(end)) = (number(start), number(end))
        {
            now = start..end;
        } else if let Some(flags) = line.strip_prefix("VmFlags:")
            && flags.split(' ').any(|f| f == "um")
        {
            armed.push(now.clone());
        }
    }
    armed
}
