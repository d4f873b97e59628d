//! Rescuing a cool unit: its bytes are still in memory.

use crate::fault::charge::release;
use crate::fault::give_up::{cool_again, give_slot};
use crate::fault::install::install;
use crate::fault::publish::{Published, publish};
use crate::fault::refusal::Refusal;
use crate::fault::run::{Need, Run};
use crate::space::counters::Count;
use crate::space::map_core::MapCore;
use crate::space::trips::Trips;
use faultless_sys::mem::PAGE;

/// Installs a cool unit, which this thread owns, from its slot. No device is asked, so its source is not either.
pub(crate) fn rescue(core: &MapCore, run: &Run, need: Need) -> Result<(), Refusal> {
    let (to, len) = core.backed_addrs(run.first..run.first + 1);
    let trip = Trips::is_trip(run.slot);
    let from = match core.pool.cooling.get() {
        _ if trip => Some(core.pool.trips.addr(run.slot)),
        cooling => cooling.map(|c| c.addr(run.slot)),
    };
    let installed = match from {
        // Slots are pages, and only units of a page are put there.
        Some(from) if len == PAGE => install(core, to, from, PAGE),
        _ => Err(Refusal::Source),
    };
    match installed {
        Ok(_) => {
            let cooling = core.pool.cooling.get().filter(|_| !trip);
            let credit = cooling.map_or(0, |c| c.credit(run.slot));
            give_slot(core, run.slot);
            let how = Published {
                pin: need == Need::Pin,
                // That a trip is touched says nothing: it was meant to be.
                hot: !trip,
                ahead: trip,
                soft: false,
                credit,
            };
            publish(core, run.first, run.me, how);
            let what = if trip { Count::Fills } else { Count::Rescued };
            core.counters.add(what, 1);
        }
        Err(_) => {
            release(core, core.charge_of(run.first));
            cool_again(core, run.first, run.me, run.slot);
            core.counters.add(Count::Errors, 1);
        }
    }
    core.pool.nudge_evictor();
    installed.map(drop)
}
