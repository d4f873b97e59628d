//! The end of a map.

#![allow(unsafe_code, reason = "disarms and unmaps address space")]

use crate::base::descriptor::Owned;
use crate::base::primitive::{Ordering, lock};
use crate::coherence::keeper;
use crate::fault::ahead;
use crate::space::counters::Count;
use crate::space::map_core::{MapCore, Reading};
use crate::space::{alias, registry};
use faultless_sys::{file, uffd};

/// Ends the service of a map: when this returns, nobody is inside any more, no fill is in flight, and faults in its
/// region are nobody's.
///
/// # Safety
///
/// The caller is the only owner of `core`, and uses it from now on through the returned box alone.
pub(crate) unsafe fn close(core: &'static MapCore) -> Box<MapCore> {
    core.closing.store(true, Ordering::Release);
    core.pool.budget.line.call_all();
    ahead::give_up_all(core);
    {
        // `Pool::stats` holds this lock, so it counts the map either among the live ones or here.
        let mut past = lock(&core.pool.past);
        past.add(&core.counters.snapshot());
        core.summed.store(true, Ordering::Release);
    }
    // From here on nobody finds the map; who is inside (the evictor, a worker) has left when this returns.
    // SAFETY: the caller's promise.
    unsafe { registry::shut(core) }
}

/// Has `unmap` take away what is still the map's own of a closed map's addresses, without a report of it.
pub(crate) fn unmap_live(core: &MapCore, mut unmap: impl FnMut(usize, usize)) {
    for part in core.live.get().iter() {
        // If it is not disarmed, the call that unmaps it waits until the report is read.
        // SAFETY: the closed map's own addresses, which nobody may read any more.
        let _ = unsafe { uffd::unregister(core.pool.uffd.get(), part.start, part.len()) };
        unmap(part.start, part.len());
    }
}

/// Gives back all that a closed map held, but for its address space.
pub(crate) fn settle(core: Box<MapCore>) {
    let resident = core
        .counters
        .get(Count::Charged)
        .wrapping_sub(core.counters.get(Count::Released));
    core.pool
        .budget
        .release(resident + core.table.fixed_bytes());
    let MapCore {
        id,
        reading,
        lease: core_lease,
        stands_for,
        ..
    } = *core;
    if let Some(kernel) = &stands_for {
        alias::give_up(&kernel.alias);
    }
    if let Some(&lease) = core_lease.get() {
        keeper::end_lease(lease);
    }
    // The lease first: nobody is told of its break under a gate that serves another map.
    retire_reading(reading);
    registry::unreserve(id);
}

pub(crate) fn retire(fd: Owned) {
    let id = file::status(fd.number()).map(|s| s.id);
    if let (Ok(fd), Ok(id)) = (keeper::adopt(fd, None), id) {
        keeper::retire(fd, id);
    }
}

/// Lets go of what a map was read from.
pub(crate) fn retire_reading(reading: Reading) {
    if let Reading::File { fd, id, .. } = reading {
        keeper::retire(fd, id);
    }
}
