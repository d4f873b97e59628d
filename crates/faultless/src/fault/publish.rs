//! Making a filled unit resident, and telling the evictor.

use crate::base::ids::{AHEAD, Unit, track_entry};
use crate::base::primitive::Ordering;
use crate::space::map_core::MapCore;
use faultless_sys::{futex, raw};

/// How long to wait for the evictor to take entries off its ring.
const RING_NAP_NS: u64 = 100_000;

/// How a unit becomes resident.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Published {
    pub(crate) pin: bool,
    pub(crate) hot: bool,
    pub(crate) soft: bool,
    /// It was read ahead.
    pub(crate) ahead: bool,
}

/// Makes a filled unit resident.
pub(crate) fn publish(core: &MapCore, unit: Unit, me: u32, how: Published) {
    let page = core.page(unit);
    let pool = &*core.pool;
    let clock = pool.clock.load(Ordering::Relaxed);
    let Some(due) = page.finish(me, clock, how.pin, how.hot, how.soft) else {
        return;
    };
    if due.wake {
        futex::wake_at(page.futex(), futex::ALL);
    }
    if due.track {
        track(core, unit, how.ahead);
    }
}

/// Tells the evictor of a unit.
pub(crate) fn track(core: &MapCore, unit: Unit, ahead: bool) {
    let pool = &*core.pool;
    pool.fresh.fetch_add(core.unit_bytes(), Ordering::Relaxed);
    let entry = track_entry(core.id, core.unit_shift, unit) | if ahead { AHEAD } else { 0 };
    // The ring is large; it can be full only while the evictor is held up for long.
    while !pool.filled.push(entry) {
        pool.evict_bell.ring();
        raw::nap(RING_NAP_NS);
    }
}
