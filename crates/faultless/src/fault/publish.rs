//! Making a filled unit resident, and telling the evictor.

use crate::base::clock;
use crate::base::ids::{Entry, Nanos, Unit};
use crate::base::primitive::Ordering;
use crate::space::map_core::MapCore;

/// How long to wait for the evictor to take entries off its ring.
const RING_NAP: Nanos = Nanos::from_micros(100);

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
        core.wake(unit);
    }
    if due.track {
        track(core, unit, how.ahead);
    }
}

/// Tells the evictor of a unit: one that was filled, or the last of its group that failed to be.
pub(crate) fn track(core: &MapCore, unit: Unit, ahead: bool) {
    let pool = &*core.pool;
    pool.fresh.fetch_add(core.unit_bytes(), Ordering::Relaxed);
    let entry = Entry::of(core.id, core.unit_shift, unit);
    let entry = if ahead { entry.marked_ahead() } else { entry };
    // The ring is large; it can be full only while the evictor is held up for long. No count bounds this loop, since an entry that is
    // lost is memory that is never evicted. It ends because the evictor waits for no thread that serves a miss.
    while !pool.filled.push(entry) {
        pool.evict_bell.ring();
        clock::nap(RING_NAP);
    }
}
