//! Giving up the bytes of a unit: the one place where that is done.

#![allow(unsafe_code, reason = "discards memory by address")]

use crate::base::ids::Unit;
use crate::fault::charge::release;
use crate::fault::publish::{Published, publish};
use crate::fault::run::Origin;
use crate::space::counters::Count;
use crate::space::identity;
use crate::space::map_core::MapCore;
use crate::space::page::Left;
use crate::space::table::GROUP;
use crate::space::trips::Trips;
use faultless_sys::{futex, mem};

/// Gives one claimed unit up. `charged`: its memory was charged by this claim.
pub(crate) fn abandon(core: &MapCore, unit: Unit, from: Origin, me: u32, charged: bool) {
    let page = core.page(unit);
    if from == Origin::Resident && page.load().pins() > 0 {
        // Somebody pinned it while it was there: then it still is, and it is only this look that failed.
        publish(core, unit, me, Published::default());
        return;
    }
    if charged || from == Origin::Resident {
        // What a part of the fill has installed must not stay behind a word that says absent.
        discard_unit(core, unit);
    }
    if let Some(due) = page.abandon(me, 0) {
        if charged || from == Origin::Resident {
            release(core, core.charge_of(unit));
        }
        core.table.leave(unit);
        if due.wake {
            futex::wake_at(page.futex(), futex::ALL);
        }
    }
}

/// Takes the memory of a unit away that this thread owns: its bytes can be read again.
pub(crate) fn discard_unit(core: &MapCore, unit: Unit) {
    let r = core.backed(unit, 1);
    let (addr, len) = (core.start + r.start as usize, (r.end - r.start) as usize);
    let _ours = identity::discarding();
    if core.live.covers(addr, len) {
        // SAFETY: the caller owns the unit, whose bytes can be read again; its addresses are still the map's own, for as long
        // as no report is acted on.
        unsafe { mem::discard(addr, len) };
    }
}

/// Takes back an eviction whose batch was not sent.
pub(crate) fn cancel_eviction(core: &MapCore, unit: Unit, was_soft: bool) {
    let page = core.page(unit);
    let cancelled = page.cancel_evict(was_soft);
    if cancelled.claimed {
        release(core, core.charge_of(unit));
    }
    if cancelled.wake {
        futex::wake_at(page.futex(), futex::ALL);
    }
}

/// Gives a slot of the cooling area back.
pub(crate) fn give_slot(core: &MapCore, slot: u32) {
    if Trips::is_trip(slot) {
        core.pool.trips.give(slot);
    } else if let Some(cooling) = core.pool.cooling.get() {
        cooling.give(slot);
    }
}

/// Leaves a unit in its slot that could not be rescued now: its bytes are as good as they were.
pub(crate) fn cool_again(core: &MapCore, unit: Unit, me: u32, slot: u32) {
    match core.page(unit).finish_cool(me, slot) {
        Some(due) if due.wake => futex::wake_at(core.page(unit).futex(), futex::ALL),
        Some(_) => {}
        // The claim was taken for a dead one's.
        None => give_slot(core, slot),
    }
}

/// Gives the words of an empty group back, and its page tables: a group of the smallest units is 2 MiB of the map, which is
/// what one page of them covers. Kernels with CONFIG_PT_RECLAIM (6.14) free it when the whole range is discarded at once.
pub(crate) fn collect_group(core: &MapCore, unit: u64) {
    let first = unit / GROUP * GROUP;
    let bytes = core.table.collect(unit, || {
        let start = core.unit_addr(first);
        let end = (start + ((GROUP as usize) << core.unit_shift)).min(core.region().end);
        let _ours = identity::discarding();
        if core.live.covers(start, end - start) {
            // SAFETY: all units of the range are absent, and none can be claimed before this returns; the range is still the
            // map's own, for as long as no report is acted on.
            unsafe { mem::discard(start, end - start) };
        }
    });
    if bytes > 0 {
        core.counters.add(Count::Released, bytes);
        core.pool.budget.release(bytes);
    }
}

/// What became of a unit that was taken out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settled {
    /// It is absent now: no miss was faster.
    pub(crate) absent: bool,
    /// Its group of words is empty now.
    pub(crate) emptied: bool,
}

/// Books one unit out after its memory was discarded.
pub(crate) fn settle_evicted(core: &MapCore, unit: u64, left: Left) -> Settled {
    let page = core.page(unit);
    let (absent, due) = page.settle(left);
    let cools = absent && matches!(left, Left::Slot(_));
    core.counters.add(
        if cools {
            Count::Cooled
        } else {
            Count::Evictions
        },
        1,
    );
    let bytes = core.charge_of(unit);
    core.counters.add(Count::Released, bytes);
    core.pool.budget.release(bytes);
    if due.wake {
        futex::wake_at(page.futex(), futex::ALL);
    }
    Settled {
        absent,
        // A cool unit still counts in its group.
        emptied: absent && !cools && core.table.leave(unit),
    }
}

/// Gives up the bytes of a unit that cools.
pub(crate) fn drop_cool(core: &MapCore, unit: u64) {
    let page = core.page(unit);
    let word = page.load();
    let slot = word.number();
    if word.cool() && page.drop_cool(slot, 0) {
        give_slot(core, slot);
        core.counters.add(Count::Evictions, 1);
        if core.table.leave(unit) {
            collect_group(core, unit);
        }
    }
}
