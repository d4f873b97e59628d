//! Releasing a range of a map when its user asks for it.

#![allow(unsafe_code, reason = "discards memory by address")]

use crate::base::primitive::Ordering;
use crate::fault::give_up::{cancel_eviction, collect_group, drop_cool, settle_evicted};
use crate::fault::publish::track;
use crate::space::identity;
use crate::space::map_core::MapCore;
use crate::space::page::Left;
use crate::space::table::GROUP;
use faultless_sys::{mem, signal};

/// Evicts the unpinned units of a range, now.
pub(crate) fn release_units(core: &MapCore, units: std::ops::Range<u64>) {
    let mut unit = units.start;
    while unit < units.end && !core.keep_all.load(Ordering::Acquire) {
        // Skip groups in which nothing is resident: a map may be huge and sparse.
        if core.table.live(unit) == 0 {
            unit = (unit / GROUP + 1) * GROUP;
            continue;
        }
        // A handler that does not return would leave the units in our hands for ever.
        let _blocked = signal::Blocked::all();
        let first = unit;
        let mut soft = [false; GROUP as usize];
        while unit < units.end
            && unit - first < GROUP
            && let Some(was_soft) = core.page(unit).begin_evict()
        {
            soft[(unit - first) as usize] = was_soft;
            unit += 1;
        }
        if unit == first {
            drop_cool(core, unit);
            unit += 1;
            continue;
        }
        let bytes = core.backed(first, unit - first);
        // Who sets `keep_all` looks at the words afterwards: one of the two sees the other.
        let (addr, len) = (
            core.start + bytes.start as usize,
            (bytes.end - bytes.start) as usize,
        );
        let ours = identity::discarding();
        let go = !core.keep_all.load(Ordering::SeqCst)
            && core.live.covers(addr, len)
            // SAFETY: `begin_evict` put these units into our hands: unpinned, and readable again.
            && unsafe { mem::discard(addr, len) };
        // What follows may discard as well, and a report may have come in between.
        drop(ours);
        for u in first..unit {
            if !go {
                cancel_eviction(core, u, soft[(u - first) as usize]);
                // The evictor may have thrown its entry away meanwhile.
                track(core, u, false);
            } else if settle_evicted(core, u, Left::Shadow(0)).emptied {
                collect_group(core, u);
            }
        }
    }
}

/// Books out the units of a range whose memory the program has unmapped: absent from now on, and never asked for again.
pub(crate) fn forget_units(core: &MapCore, units: std::ops::Range<u64>) {
    let mut unit = units.start;
    while unit < units.end {
        if core.table.live(unit) == 0 {
            unit = (unit / GROUP + 1) * GROUP;
            continue;
        }
        // A handler that does not return would leave the unit in our hands for ever.
        let _blocked = signal::Blocked::all();
        if core.page(unit).begin_evict().is_some() {
            settle_evicted(core, unit, Left::Shadow(0));
        } else {
            drop_cool(core, unit);
        }
        unit += 1;
    }
}
