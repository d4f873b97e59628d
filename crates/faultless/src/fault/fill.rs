//! Filling: a run that a thread owns is read, installed and published.

use crate::base::clock;
use crate::base::ids::{Addr, Nanos, RegionAt, Slot, Unit};
use crate::base::primitive::Ordering;
use crate::fault::charge::release;
use crate::fault::give_up::{abandon, discard_unit};
use crate::fault::publish::{Published, publish};
use crate::fault::refusal::Refusal;
use crate::fault::run::Fetch;
use crate::fault::run::{Need, Origin, Run};
use crate::space::counters::Count;
use crate::space::map_core::MapCore;
use std::ops::Range;

/// Reads and installs a run that this thread owns, and publishes its units.
///
/// With `trip`, the first unit's bytes go to that slot, and the unit becomes cool.
pub(crate) fn fill(
    core: &MapCore,
    run: &Run,
    need: Need,
    trip: Option<Slot>,
    fetch: Fetch<'_>,
) -> Result<(), Refusal> {
    let began = clock::now();
    if need == Need::Pin && run.from[0] == Origin::Resident {
        // Renewal: what is there may be marked MADV_FREE; only a fresh page can be pinned.
        discard_unit(core, run.first);
    }
    let keep = trip.map(|slot| core.pool.trips.addr(slot));
    let result = read_and_install(&core.backed(run.units()), keep, fetch);
    settle(core, run, need, trip, began, result)
}

/// What came of reading a run: the end of what is installed, and how many bytes were not there before; or the end of what was
/// installed before an error.
pub(crate) type Outcome = Result<(RegionAt, u64), (RegionAt, Refusal)>;

/// Publishes the units of a run that are there, and gives the others up. The run was begun at `began`.
pub(crate) fn settle(
    core: &MapCore,
    run: &Run,
    need: Need,
    trip: Option<Slot>,
    began: Nanos,
    result: Outcome,
) -> Result<(), Refusal> {
    let backed = core.backed(run.units());
    let (good, installed_new) = match result {
        Ok((end, new)) => (end, new),
        Err((end, _)) => (end, 0),
    };
    let mut filled = 0;
    for i in 0..run.count {
        let unit = run.first + i as u64;
        let whole = core.backed(unit..unit + 1).end <= good;
        if whole {
            let how = Published {
                pin: need == Need::Pin,
                hot: run.from[i] == Origin::Hot,
                // A unit of several pages, some of which were there: those may still be marked MADV_FREE.
                soft: run.from[i] == Origin::Resident && installed_new < backed.end - backed.start,
                ahead: need == Need::Prefetch,
                credit: 0,
            };
            match trip {
                Some(slot) if i == 0 => park(core, unit, run, slot),
                _ => publish(core, unit, run.me, how),
            }
            filled += 1;
        } else {
            abandon(core, unit, run.from[i], run.me, true);
            if i == 0
                && let Some(slot) = trip
            {
                core.pool.trips.give(slot);
            }
        }
    }
    core.counters.add(
        Count::Fills,
        filled - u64::from(trip.is_some() && filled > 0),
    );
    core.counters
        .record_fill_ns(clock::now().since(began).get());
    if run.from[0] == Origin::Resident && need != Need::Pin && installed_new > 0 {
        core.counters.add(Count::TakenBack, 1);
        core.pool.taken_back.fetch_add(1, Ordering::Relaxed);
    }
    core.pool.nudge_evictor();
    match result {
        Err((_, why)) if filled == 0 => {
            // (What is read ahead goes without, where there is no room: that is no failure.)
            if !(need == Need::Prefetch && why == Refusal::Budget) {
                core.counters.add(Count::Errors, 1);
            }
            Err(why)
        }
        // The unit that was wanted is there; the rest of the run was a guess.
        _ if filled > 0 => Ok(()),
        _ => Err(Refusal::PastEnd),
    }
}

/// Leaves a unit that was read in its slot.
fn park(core: &MapCore, unit: Unit, run: &Run, slot: Slot) {
    match core.page(unit).finish_cool(run.me, slot) {
        // The slots are charged by themselves.
        Some(due) => {
            release(core, core.charge_of(unit));
            if due.wake {
                core.wake(unit);
            }
        }
        None => {
            core.pool.trips.give(slot);
            abandon(core, unit, run.from[0], run.me, true);
        }
    }
}

/// Reads `range` (bytes of the region, whole pages) in pieces and installs them, but for the first page if it is to be
/// kept elsewhere.
fn read_and_install(range: &Range<RegionAt>, mut keep: Option<Addr>, fetch: Fetch<'_>) -> Outcome {
    let mut at = range.start;
    let mut new = 0;
    while at < range.end {
        let piece = fetch(at..range.end, keep.take()).map_err(|why| (at, why))?;
        at += piece.present;
        new += piece.new;
        if piece.present < piece.wanted {
            // The source ended early: it was truncated since it was mapped.
            break;
        }
    }
    Ok((at, new))
}
