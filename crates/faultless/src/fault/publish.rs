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
    /// See [`Policy::arrive`](crate::evict::policy::Policy::arrive).
    pub(crate) credit: u8,
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
        let entry = entry(core, unit).with_credit(how.credit);
        tell(
            core,
            match how.ahead {
                true => entry.marked_ahead(),
                false => entry,
            },
        );
    }
}

fn entry(core: &MapCore, unit: Unit) -> Entry {
    Entry::of(core.id, core.unit_shift, unit)
}

/// Tells the evictor of a unit: one that was filled, or the last of its group that failed to be.
pub(crate) fn track(core: &MapCore, unit: Unit) {
    tell(core, entry(core, unit));
}

fn tell(core: &MapCore, entry: Entry) {
    let pool = &*core.pool;
    pool.filled.count(core.unit_bytes(), pool.fill_portion());
    // The rings are large; they can be full only while the evictor is held up for long. No count bounds this loop, since an entry that is
    // lost is memory that is never evicted. It ends because the evictor waits for no thread that serves a miss.
    while !pool.filled.push(entry) {
        pool.evict_bell.ring();
        clock::nap(RING_NAP);
    }
}
