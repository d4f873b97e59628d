//! Making a range resident before it is touched: as few reads as its gaps allow, and no signal.

use crate::base::ids::Unit;
use crate::fault::ahead;
use crate::fault::claim::{claim, extend};
use crate::fault::fill::fill;
use crate::fault::read_file::file_piece;
use crate::fault::refusal::Refusal;
use crate::fault::rescue::rescue;
use crate::fault::run::{Need, Origin, Run};
use crate::fault::serve::serve;
use crate::space::map_core::{MapCore, Reading};
use crate::space::page::State;
use faultless_sys::signal;
use std::ops::Range;

/// Whether a unit is resident, as far as is known: the kernel may have taken it back.
fn is_resident(core: &MapCore, unit: Unit) -> bool {
    core.page(unit).load().state() == State::Resident
}

/// Makes units resident. It reads absent units one run at a time, and blocks the signals of the calling thread during each.
///
/// # Errors
///
/// The unit that could not be read, and why.
pub(crate) fn ask(core: &MapCore, units: Range<Unit>) -> Result<(), (Unit, Refusal)> {
    let mut unit = units.start;
    while unit < units.end {
        if is_resident(core, unit) {
            unit += 1;
            continue;
        }
        // A signal handler that does not return (longjmp), or a cancellation, would leave the units claimed for ever.
        let blocked = signal::Blocked::all();
        let _serving = core.pool.withheld.serving(blocked.former());
        unit = ask_some(core, &units, unit)?;
    }
    Ok(())
}

/// Makes the first of some units resident, and as many of those behind it as can be read with it. Returns the unit behind them.
fn ask_some(core: &MapCore, units: &Range<Unit>, first: Unit) -> Result<Unit, (Unit, Refusal)> {
    let alone = |unit| serve(core, unit, Need::Ask).map_err(|why| (unit, why));
    let Reading::File { fd, .. } = &core.reading else {
        return alone(first).map(|()| first + 1);
    };
    let mut run = Run::new();
    claim(core, first, Need::Ask, &mut run).map_err(|why| (first, why))?;
    if run.count == 0 {
        return Ok(first + 1);
    }
    if run.from[0] == Origin::Cool {
        let rescued = rescue(core, &run, Need::Ask);
        return rescued.map(|()| first + 1).map_err(|why| (first, why));
    }
    if units.end - units.start == 1 {
        // (Of longer ranges, the caller knows best what is read next.)
        ahead::on_miss(core, first, run.me);
    }
    let most = ahead::part_units(core);
    while (run.count as u64) < most && run.end() < units.end && extend(core, &mut run) {}
    let fetch = &mut |range, keep| file_piece(core, fd, range, keep);
    let filled = fill(core, &run, Need::Ask, None, fetch);
    if run.count == 1 {
        return filled.map(|()| run.end()).map_err(|why| (first, why));
    }
    // Where something could not be read, each is read by itself.
    for unit in Unit::each(run.units()).filter(|&unit| !is_resident(core, unit)) {
        alone(unit)?;
    }
    Ok(run.end())
}
