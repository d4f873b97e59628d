//! Releasing a range of a map when its user asks for it.

#![allow(unsafe_code, reason = "discards memory by address")]

use crate::base::ids::Unit;
use crate::base::primitive::Ordering;
use crate::fault::charge::release;
use crate::fault::give_up::{
    begin_eviction, cancel_eviction, collect_group_or_tell, give_up_cool, settle_evicted,
};
use crate::fault::publish::track;
use crate::space::identity;
use crate::space::map_core::MapCore;
use crate::space::page::Left;
use crate::space::table::{GROUP, Table};
use faultless_sys::{mem, signal};
use std::ops::Range;

/// Evicts the unpinned units of a range, now.
pub(crate) fn release_units(core: &MapCore, units: Range<Unit>) {
    let mut unit = units.start;
    while unit < units.end && !core.keep_all.load(Ordering::Acquire) {
        // Skip groups in which nothing is resident: a map may be huge and sparse.
        let group = Table::group_of(unit);
        if core.table.live(unit) == 0 {
            unit = group.end;
            continue;
        }
        // A handler that does not return would leave the units in our hands for ever.
        let _blocked = signal::Blocked::all();
        let first = unit;
        let mut soft = [false; GROUP as usize];
        while unit < units.end
            && unit - first < GROUP
            && let Some(was_soft) = begin_eviction(core, unit)
        {
            soft[(unit - first) as usize] = was_soft;
            unit += 1;
        }
        if unit == first {
            release_cool(core, unit);
            unit += 1;
            continue;
        }
        let (addr, len) = core.backed_addrs(first..unit);
        let ours = identity::discarding();
        let go = core.live.covers(addr.get(), len)
            // SAFETY: `begin_eviction` put these units into our hands: unpinned, and readable again.
            && unsafe { mem::discard(addr.get(), len) };
        // What follows may discard as well, and a report may have come in between.
        drop(ours);
        if go {
            for u in Unit::each(first..unit) {
                if settle_evicted(core, u, Left::Shadow(0)).emptied {
                    collect_group_or_tell(core, u);
                }
            }
            release(core, len as u64);
            continue;
        }
        for u in Unit::each(first..unit) {
            cancel_eviction(core, u, soft[(u - first) as usize]);
            // The evictor may have thrown its entry away meanwhile.
            track(core, u);
        }
    }
}

/// Gives up the bytes of a unit, if it cools.
fn release_cool(core: &MapCore, unit: Unit) {
    if give_up_cool(core, unit, None, 0).is_some_and(|given| given.emptied) {
        collect_group_or_tell(core, unit);
    }
}

/// Books out the units of a range whose memory the program has unmapped: absent from now on, and never asked for again.
pub(crate) fn forget_units(core: &MapCore, units: Range<Unit>) {
    let mut unit = units.start;
    while unit < units.end {
        if core.table.live(unit) == 0 {
            unit = Table::group_of(unit).end;
            continue;
        }
        // A handler that does not return would leave the unit in our hands for ever.
        let _blocked = signal::Blocked::all();
        if core.page(unit).begin_evict().is_some() {
            let gone = settle_evicted(core, unit, Left::Shadow(0));
            release(core, core.charge_of(unit));
            if gone.emptied {
                collect_group_or_tell(core, unit);
            }
        } else {
            release_cool(core, unit);
        }
        unit += 1;
    }
}
