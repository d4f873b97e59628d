//! Serving a miss: claim, charge, read, check, install, publish.
//!
//! [`serve`] is called by the SIGBUS handler (`Need::Load`), by pins and prefetches, and for what is asked for ([`ask`](crate::fault::ask)). Everything here is safe in a
//! signal handler, with one exception that the types enforce: a user's [`Source`](crate::Source) is read only through
//! [`serve_from`], with a closure that ordinary contexts supply.

use crate::base::ids::Unit;
use crate::base::primitive::AtomicU32;
use crate::fault::claim::{claim, read_around};
use crate::fault::fill::fill;
use crate::fault::hand_over::{Handed, hand_over};
use crate::fault::piece::file_piece;
use crate::fault::refusal::Refusal;
use crate::fault::rescue::rescue;
use crate::fault::run::{Need, Origin, Run};
use crate::space::map_core::{MapCore, Reading};
use crate::space::page::State;

/// Serves a miss from a file, or hands it to the fill threads.
pub(crate) fn serve(core: &MapCore, unit: Unit, need: Need) -> Result<(), Refusal> {
    let mut request = Handed {
        core,
        need,
        run: Run::new(),
        done: AtomicU32::new(0),
    };
    claim(core, unit, need, &mut request.run)?;
    match &core.reading {
        _ if request.run.count == 0 => Ok(()),
        _ if request.run.from[0] == Origin::Cool => rescue(core, &request.run, need),
        Reading::File { fd, .. } => {
            let fetch = &mut |range, keep| file_piece(core, fd, range, keep);
            let guesses = match need {
                Need::Pin => false,
                Need::Load(_) => true,
                // (What is asked for is known.)
                Need::Ask | Need::Prefetch => core.stands_for.is_some(),
            };
            if guesses && request.run.was_absent() {
                read_around(core, &mut request.run);
            }
            let filled = fill(core, &request.run, need, None, fetch);
            let missing = || {
                let word = core.page(unit).load();
                word.state() == State::Absent && !word.cool()
            };
            if request.run.count == 1 || (filled.is_ok() && !missing()) {
                return filled;
            }
            // Something around it could not be read: the unit alone, then.
            request.run = Run::new();
            claim(core, unit, need, &mut request.run)?;
            match request.run.count {
                0 => Ok(()),
                _ if request.run.from[0] == Origin::Cool => rescue(core, &request.run, need),
                _ => fill(core, &request.run, need, None, fetch),
            }
        }
        Reading::Source { .. } => hand_over(core, &request),
    }
}
