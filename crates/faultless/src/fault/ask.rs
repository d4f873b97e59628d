//! Making a range resident before it is touched: as few reads as its gaps allow, and no signal.

use crate::base::ids::Unit;
use crate::base::primitive::AtomicU32;
use crate::fault::ahead;
use crate::fault::claim::{claim, extend};
use crate::fault::fill::fill;
use crate::fault::hand_over::{Handed, hand_over};
use crate::fault::piece::file_piece;
use crate::fault::refusal::Refusal;
use crate::fault::rescue::rescue;
use crate::fault::run::{Need, Origin, Run, owner};
use crate::space::counters::Count;
use crate::space::map_core::{MapCore, Reading};
use faultless_sys::signal;
use std::ops::Range;

/// Makes units resident. It reads absent units one run at a time, and blocks the signals of the calling thread during each. `follow`:
/// threads that ask in order are read ahead of.
///
/// # Errors
///
/// The unit that could not be read, and why.
pub(crate) fn ask(core: &MapCore, units: Range<Unit>, follow: bool) -> Result<(), (Unit, Refusal)> {
    let mut unit = units.start;
    // Units below this are read by themselves: together they could not be.
    let mut alone = units.start;
    let mut told = !follow;
    while unit < units.end {
        if core.is_resident(unit) {
            unit += 1;
            continue;
        }
        // A signal handler that does not return (longjmp), or a cancellation, would leave the units claimed for ever.
        let blocked = signal::Blocked::all();
        let _serving = core.pool.withheld.serving(blocked.former());
        if !std::mem::replace(&mut told, true) {
            ahead::on_ask(core, unit..units.end, owner());
        }
        let most = if unit < alone { unit + 1 } else { units.end };
        let end = ask_some(core, unit..most).map_err(|why| (unit, why))?;
        if end - unit == 1 {
            unit = end;
            continue;
        }
        let missing = Unit::each(unit..end).find(|&unit| !core.is_resident(unit));
        if missing.is_some() {
            alone = end;
        }
        unit = missing.unwrap_or(end);
    }
    Ok(())
}

/// Makes the first of some units resident, and as many of those behind it as can be read with it. Returns the unit behind them. Where
/// several were read, some of them may not have come.
fn ask_some(core: &MapCore, units: Range<Unit>) -> Result<Unit, Refusal> {
    let first = units.start;
    let mut request = Handed {
        core,
        need: Need::Ask,
        run: Run::new(),
        done: AtomicU32::new(0),
    };
    let run = &mut request.run;
    claim(core, first, Need::Ask, run)?;
    if run.count == 0 {
        return Ok(first + 1);
    }
    if run.from[0] == Origin::Cool {
        return rescue(core, run, Need::Ask).map(|()| first + 1);
    }
    let most = ahead::part_units(core);
    while (run.count as u64) < most && run.end() < units.end && extend(core, run) {}
    let (end, count) = (run.end(), run.count as u64);
    core.counters.add(Count::Misses, count - 1);
    let filled = match &core.reading {
        Reading::File { fd, .. } => {
            let fetch = &mut |range, keep| file_piece(core, fd, range, keep);
            fill(core, &request.run, Need::Ask, None, fetch)
        }
        Reading::Source { .. } => hand_over(core, &request),
    };
    if count == 1 {
        filled?;
    }
    Ok(end)
}
