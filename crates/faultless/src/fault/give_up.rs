//! Giving up the bytes of a unit: the one place where that is done.

#![allow(unsafe_code, reason = "discards memory by address")]

use crate::base::ids::{Slot, Unit};
use crate::fault::charge::release;
use crate::fault::publish::{Published, publish, track};
use crate::fault::run::{Origin, owner};
use crate::space::counters::Count;
use crate::space::identity;
use crate::space::map_core::MapCore;
use crate::space::page::{From, Left};
use crate::space::table::{Gone, Table};
use crate::space::trips::Trips;
use faultless_sys::mem;

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
    if let Some(gone) = core.table.give_up(unit, me, 0) {
        if charged || from == Origin::Resident {
            release(core, core.charge_of(unit));
        }
        if gone.wake {
            core.wake(unit);
        }
        if gone.emptied {
            // Only the evictor gives the words of a group back.
            track(core, unit);
        }
    }
}

/// Takes the memory of a unit away that this thread owns: its bytes can be read again.
pub(crate) fn discard_unit(core: &MapCore, unit: Unit) {
    let (addr, len) = core.backed_addrs(unit..unit + 1);
    let _ours = identity::discarding();
    if core.live.covers(addr.get(), len) {
        // SAFETY: the caller owns the unit, whose bytes can be read again; its addresses are still the map's own, for as long
        // as no report is acted on.
        unsafe { mem::discard(addr.get(), len) };
    }
}

/// Takes a unit out of its map, for a batch. Returns whether it was soft; `None` if it may not go. The batch is settled by
/// [`settle_evicted`], or taken back by [`cancel_eviction`].
pub(crate) fn begin_eviction(core: &MapCore, unit: Unit) -> Option<bool> {
    let was_soft = core.page(unit).begin_evict()?;
    if core.must_keep() {
        cancel_eviction(core, unit, was_soft);
        return None;
    }
    Some(was_soft)
}

/// Takes a unit for a batch that marks it `MADV_FREE`. `false` if it may not be marked, or is already.
pub(crate) fn begin_softening(core: &MapCore, unit: Unit) -> bool {
    let page = core.page(unit);
    if !page.begin_soften() {
        return false;
    }
    if core.must_keep() {
        if page.cancel_soften() {
            core.wake(unit);
        }
        return false;
    }
    true
}

/// Takes back an eviction whose batch was not sent.
pub(crate) fn cancel_eviction(core: &MapCore, unit: Unit, was_soft: bool) {
    let page = core.page(unit);
    let cancelled = page.cancel_evict(was_soft);
    if cancelled.claimed {
        release(core, core.charge_of(unit));
    }
    if cancelled.wake {
        core.wake(unit);
    }
}

/// Gives a slot of the cooling area back.
pub(crate) fn give_slot(core: &MapCore, slot: Slot) {
    if Trips::is_trip(slot) {
        core.pool.trips.give(slot);
    } else if let Some(cooling) = core.pool.cooling.get() {
        cooling.give(slot);
    }
}

/// Leaves a unit in its slot that could not be rescued now: its bytes are as good as they were.
pub(crate) fn cool_again(core: &MapCore, unit: Unit, me: u32, slot: Slot) {
    match core.page(unit).finish_cool(me, slot) {
        Some(due) if due.wake => core.wake(unit),
        Some(_) => {}
        // The claim was taken for a dead one's.
        None => give_slot(core, slot),
    }
}

/// Gives the words of an empty group back, and its page tables: a group of the smallest units is 2 MiB of the map, which is
/// what one page of them covers. Kernels with CONFIG_PT_RECLAIM (6.14) free it when the whole range is discarded at once.
///
/// `false` if a batch has a unit of the group, after which it is to be tried again.
pub(crate) fn collect_group(core: &MapCore, unit: Unit) -> bool {
    let collected = core.table.collect(unit, || {
        let units = Table::group_of(unit);
        let start = core.unit_addr(units.start).get();
        let end = core.unit_addr(units.end).get().min(core.region().end);
        let _ours = identity::discarding();
        if core.live.covers(start, end - start) {
            // SAFETY: all units of the range are absent, and none can be claimed before this returns; the range is still the
            // map's own, for as long as no report is acted on.
            unsafe { mem::discard(start, end - start) };
        }
    });
    let bytes = collected.unwrap_or(0);
    if bytes > 0 {
        core.counters.add(Count::Released, bytes);
        core.pool.budget.release(bytes);
    }
    collected.is_some()
}

/// The same for a thread that does not come back: where a batch has a unit, the evictor is told.
pub(crate) fn collect_group_or_tell(core: &MapCore, unit: Unit) {
    if !collect_group(core, unit) {
        track(core, unit);
    }
}

/// Books one unit out after its memory was discarded. What it was charged remains to be released, for many units in one step:
/// [`release`].
pub(crate) fn settle_evicted(core: &MapCore, unit: Unit, left: Left) -> Gone {
    let gone = core.table.settle(unit, left);
    let cools = gone.absent && matches!(left, Left::Slot(_));
    core.counters.add(
        if cools {
            Count::Cooled
        } else {
            Count::Evictions
        },
        1,
    );
    if gone.wake {
        core.wake(unit);
    }
    gone
}

/// Gives up the bytes of a unit that cools, if it still does: in `slot`, if that is given. What remains is the shadow. `None`
/// if it does not, or may not go. All signals of the caller are blocked.
///
/// The unit is claimed first. Then its slot is this thread's, and nothing may be lost by a thread that has just found the
/// unit cool and goes on to the next, because the bytes must stay.
pub(crate) fn give_up_cool(
    core: &MapCore,
    unit: Unit,
    slot: Option<Slot>,
    shadow: u32,
) -> Option<Gone> {
    let page = core.page(unit);
    let seen = page.load();
    if !seen.cool() || slot.is_some_and(|slot| slot != seen.slot()) {
        return None;
    }
    let me = owner();
    let Ok(From::Cool(slot)) = core.table.claim(unit, seen, me, || ()) else {
        return None;
    };
    if core.must_keep() {
        cool_again(core, unit, me, slot);
        return None;
    }
    give_slot(core, slot);
    core.counters.add(Count::Evictions, 1);
    let gone = core.table.give_up(unit, me, shadow)?;
    if gone.wake {
        core.wake(unit);
    }
    Some(gone)
}
