//! Prefetches, and windows that are read ahead.

use crate::base::ids::{MapId, Serial, Slot, Unit};
use crate::base::primitive::Ordering;
use crate::fault::claim::{claim, extend};
use crate::fault::fill::fill;
use crate::fault::give_up::{collect_group_or_tell, give_up_cool};
use crate::fault::refusal::Refusal;
use crate::fault::rescue::rescue;
use crate::fault::run::{Fetch, Need, Origin, Run};
use crate::read::blocks::with_pieces;
use crate::read::gather::{gather, is_absent};
use crate::read::progress::Part;
use crate::read::rings::Rings;
use crate::space::counters::Count;
use crate::space::map_core::MapCore;
use crate::space::pool_core::PoolCore;
use crate::space::registry;
use crate::space::streams::Request;
use crate::space::trips::Owner;
use faultless_sys::mem::PAGE;
use std::ops::Range;

/// Bytes of one part of a prefetch.
pub(crate) const PART: u64 = 256 * 1024;

/// Units to fill of the map with gate `id`, if it still is the one with this serial number.
pub(crate) struct Prefetch {
    pub(crate) id: MapId,
    pub(crate) serial: Serial,
    pub(crate) unit: Unit,
    pub(crate) count: u64,
    /// Each is read by itself.
    pub(crate) alone: bool,
    pub(crate) part: Part,
}

/// Reads a part of a window.
pub(crate) fn read_ahead(pool: &PoolCore, request: Request) {
    let Some(core) = registry::gate(request.map)
        .and_then(registry::enter)
        .filter(|c| std::ptr::eq(&*c.pool, pool))
    else {
        return;
    };
    let stride = core.streams.stride(request.stream);
    let (mut at, mut left) = (request.unit, request.units);
    let mut trip = request.trip;
    while left > 0 && at < core.units_end() && !core.closing.load(Ordering::Relaxed) {
        let most = if stride == 1 { left } else { 1 };
        let done = with_pieces(&core, Need::Prefetch, |fetch| {
            if !std::mem::take(&mut trip) {
                return prefetch(&core, at, most, fetch);
            }
            match trip_slot(&core, at) {
                Some(slot) => prefetch_trip(&core, at, most, slot, fetch),
                // It stays absent: the thread that stumbles over it reads it.
                None => Ok(1),
            }
        });
        let Ok(done) = done else {
            core.counters.add(Count::PrefetchDropped, 1);
            return;
        };
        left = left.saturating_sub(done);
        at = at.at_distance(if stride == 1 { done as i64 } else { stride });
    }
}

/// A slot for a trip, if units of the map fit one.
fn trip_slot(core: &MapCore, unit: Unit) -> Option<Slot> {
    if core.unit_bytes() != PAGE as u64 {
        return None;
    }
    let owner = Owner {
        map: core.id,
        serial: core.serial,
        unit,
    };
    core.pool.trips.take(owner, |slot, from| {
        // A reader that went elsewhere left it behind; or its map is gone, and all who could read the slot.
        let Some(owner) = registry::enter_map(from.map, from.serial) else {
            return !registry::may_be_in_use(from.map, from.serial);
        };
        let Some(given) = give_up_cool(&owner, from.unit, Some(slot), 0) else {
            return false;
        };
        if given.emptied {
            collect_group_or_tell(&owner, from.unit);
        }
        true
    })
}

/// Reads in what a prefetch asks for.
pub(crate) fn run(job: &mut Prefetch) {
    let &mut Prefetch {
        id,
        serial,
        unit,
        count,
        ref mut part,
        ..
    } = job;
    let Some(core) = registry::enter_map(id, serial) else {
        return;
    };
    let end = (unit + count).min(core.units_end());
    let mut at = unit;
    while at < end {
        if core.closing.load(Ordering::Relaxed) {
            return;
        }
        let done = with_pieces(&core, Need::Prefetch, |fetch| {
            prefetch(&core, at, end - at, fetch)
        });
        match done {
            Ok(n) => {
                at += n;
                part.did(n << core.unit_shift);
            }
            Err(_) => {
                core.counters.add(Count::PrefetchDropped, 1);
                return;
            }
        }
    }
}

/// Serves several prefetches of one map together, with many reads in flight. It drops units for which the budget has no room.
pub(crate) fn run_together(rings: &Rings, jobs: &mut [Prefetch]) {
    let core = jobs
        .first()
        .map(|job| registry::enter_map(job.id, job.serial));
    let Some(core) = core.flatten() else {
        return;
    };
    let units = |job: &Prefetch| job.unit..(job.unit + job.count).min(core.units_end());
    let ranges: Vec<Range<Unit>> = jobs.iter().map(units).collect();
    gather(rings, &core, Need::Prefetch, &ranges, |_| false);
    for (job, units) in jobs.iter_mut().zip(ranges) {
        let asked = units.end - units.start;
        let absent = Unit::each(units).filter(|&unit| is_absent(&core, unit));
        let absent = absent.count() as u64;
        job.part.did((asked - absent) << core.unit_shift);
        if absent > 0 {
            core.counters.add(Count::PrefetchDropped, 1);
        }
    }
}

/// Fills what the pool's budget has room for, from `unit` on, up to `count` units, never waiting: a prefetch.
/// Returns how many units were looked at.
pub(crate) fn prefetch(
    core: &MapCore,
    unit: Unit,
    count: u64,
    fetch: Fetch<'_>,
) -> Result<u64, Refusal> {
    let mut run = Run::new();
    claim(core, unit, Need::Prefetch, &mut run)?;
    if run.count == 0 {
        return Ok(1);
    }
    if run.from[0] == Origin::Cool {
        // Cannot be: who prefetches leaves cool units where they are.
        return rescue(core, &run, Need::Prefetch).map(|()| 1);
    }
    while (run.count as u64) < count && extend(core, &mut run) {}
    fill(core, &run, Need::Prefetch, None, fetch)?;
    Ok(run.count as u64)
}

/// As [`prefetch`], for one run whose first unit is a trip: its bytes go to `slot`, which is given back if that does not
/// come to pass.
pub(crate) fn prefetch_trip(
    core: &MapCore,
    unit: Unit,
    count: u64,
    slot: Slot,
    fetch: Fetch<'_>,
) -> Result<u64, Refusal> {
    let mut run = Run::new();
    let claimed = claim(core, unit, Need::Prefetch, &mut run);
    if claimed.is_err() || run.count == 0 {
        // It is there already, or there is no room.
        core.pool.trips.give(slot);
        return claimed.map(|()| 1);
    }
    while (run.count as u64) < count && extend(core, &mut run) {}
    fill(core, &run, Need::Prefetch, Some(slot), fetch)?;
    Ok(run.count as u64)
}
