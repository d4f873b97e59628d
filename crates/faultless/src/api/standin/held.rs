//! Pages that system calls count on.

use crate::api::pool::Pool;
use crate::base::ids::{Addr, MapId, Nanos, Serial, Unit};
use crate::base::primitive::Ordering;
use crate::base::{clock, process};
use crate::fault::piece::file_piece;
use crate::fault::refusal::Refusal;
use crate::fault::run::{Need, RUN_MAX};
use crate::fault::serve::serve;
use crate::read::prefetch::prefetch;
use crate::space::map_core::{MapCore, Reading};
use crate::space::page::State;
use crate::space::registry;
use faultless_sys::signal;
use std::ops::Range;

/// Most parts that one [`Held`] can keep.
const PARTS: usize = 8;

#[derive(Debug, Clone, Copy)]
struct Part {
    id: MapId,
    serial: Serial,
    first: Unit,
    end: Unit,
}

/// Pages that stay where they are until this is dropped: for the time of a system call that reads them. A map that goes
/// away meanwhile is not kept from it.
#[derive(Debug)]
pub struct Held {
    parts: [Part; PARTS],
    count: usize,
    /// Something was there to be held.
    any: bool,
    /// Something could not be read.
    failed: bool,
    /// A stand-in is being handed back, so that nothing of it can be held.
    gives_way: bool,
}

impl Default for Held {
    fn default() -> Self {
        Held::new()
    }
}

impl Held {
    /// Nothing yet.
    pub const fn new() -> Self {
        Held {
            parts: [Part {
                id: MapId::new(0),
                serial: Serial::new(0),
                first: Unit::new(0),
                end: Unit::new(0),
            }; PARTS],
            count: 0,
            any: false,
            failed: false,
            gives_way: false,
        }
    }

    /// Whether all pages could be read.
    pub fn complete(&self) -> bool {
        !self.failed
    }

    /// Whether all that was asked for is held until this is dropped.
    pub fn holds(&self) -> bool {
        !self.gives_way
    }

    /// Reads in, and holds, all pages of a range that stand-ins have, as far as they can be read; what lies elsewhere is
    /// left alone. Blocks signals meanwhile. May be called in a signal handler.
    pub fn hold(&mut self, range: Range<usize>) {
        let mut at = range.start;
        while at < range.end {
            // A handler that does not return would leave pages claimed, or somebody inside.
            let no_handler_in_between = signal::Blocked::all();
            let Some(core) = registry::find(at) else {
                // To the next granule: another map may begin there.
                at = (at + 1).next_multiple_of(registry::GRANULE);
                continue;
            };
            let serving = core.pool.withheld.serving(no_handler_in_between.former());
            // First counted, then looked: a hand-back does it the other way round.
            if let Some(kernel) = &core.stands_for
                && self.count < PARTS
            {
                kernel.holders.fetch_add(1, Ordering::SeqCst);
                if core.leaving() {
                    kernel.holders.fetch_sub(1, Ordering::SeqCst);
                    self.gives_way = true;
                    return;
                }
            }
            let end = range.end.min(core.region().end);
            let units = core.unit_of(Addr::new(at))..core.unit_of(Addr::new(end - 1)) + 1;
            self.any = true;
            read_in(&core, units.clone());
            let mut held = units.start;
            let mut broken = false;
            for unit in Unit::each(units.clone()) {
                match serve(&core, unit, Need::Pin) {
                    Ok(()) => {}
                    Err(Refusal::LeaseBroken) if core.being_handed_back() => {
                        broken = true;
                        break;
                    }
                    Err(_) => {
                        self.failed = true;
                        break;
                    }
                }
                if self.count < PARTS {
                    held = unit + 1;
                } else {
                    // There for now, which is long enough as a rule.
                    core.page(unit).unpin();
                }
            }
            if self.count == PARTS {
                self.gives_way = true;
            } else if held == units.start {
                if let Some(kernel) = &core.stands_for {
                    kernel.holders.fetch_sub(1, Ordering::SeqCst);
                }
            } else {
                self.parts[self.count] = Part {
                    id: core.id,
                    serial: core.serial,
                    first: units.start,
                    end: held,
                };
                self.count += 1;
            }
            if broken {
                // The kernel's mapping will be here soon, and serves the rest.
                at = core.unit_addr(held).get().max(at);
                drop(serving);
                drop(core);
                drop(no_handler_in_between);
                clock::nap(Nanos::from_millis(1));
                continue;
            }
            at = end;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.count == 0 {
            return;
        }
        // A handler that does not return would leave the counter of those inside raised for ever.
        let _blocked = signal::Blocked::all();
        for part in &self.parts[..self.count] {
            if let Some(core) = registry::gate(part.id).and_then(registry::enter)
                && core.serial == part.serial
            {
                for unit in Unit::each(part.first..part.end) {
                    core.page(unit).unpin();
                }
                if let Some(kernel) = &core.stands_for {
                    kernel.holders.fetch_sub(1, Ordering::SeqCst);
                }
            }
        }
    }
}

/// Reads in what is absent of some units, many with one read.
fn read_in(core: &MapCore, units: Range<Unit>) {
    let Reading::File { fd, .. } = &core.reading else {
        return;
    };
    if units.end - units.start < 2 || process::forked() {
        return;
    }
    let mut unit = units.start;
    while unit < units.end {
        if core.page(unit).load().state() != State::Absent {
            unit += 1;
            continue;
        }
        let most = (units.end - unit).min(RUN_MAX as u64);
        let fetch = &mut |range, keep| file_piece(core, fd, range, keep);
        unit += prefetch(core, unit, most, fetch).unwrap_or(1).max(1);
    }
}

/// Reads in what stand-ins have of a range, without keeping it there. `None` if they have nothing of it; otherwise whether
/// all of it could be read.
pub fn read_range(range: Range<usize>) -> Option<bool> {
    let (mut any, mut complete) = (false, true);
    let mut at = range.start;
    while at < range.end && complete {
        let end = range.end.min((at + 1).next_multiple_of(READ_STEP));
        let mut held = Held::new();
        held.hold(at..end);
        any |= held.any;
        complete &= held.complete();
        at = end;
    }
    any.then_some(complete)
}

/// Bytes that are read in at a time.
const READ_STEP: usize = 256 << 10;

/// Most bytes that one call should hold, so that many can do so at once in what the pools have.
pub fn hold_at_most(pool: &Pool) -> usize {
    // Whole blocks. What is longer is read through the kernel's own mapping ([`lend`]).
    (pool.budget().get() / 32).clamp(64 << 10, 1 << 20) as usize & !((64 << 10) - 1)
}
