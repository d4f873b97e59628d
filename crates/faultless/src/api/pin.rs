//! Pinned ranges.

#![allow(unsafe_code, reason = "makes slices of mapped memory")]

use crate::api::backing::{Backing, check_end, units_of};
use crate::api::map::Map;
use crate::base::error::Error;
use crate::base::ids::Unit;
use crate::fault::ask::ask;
use crate::fault::refusal::Refusal;
use crate::fault::run::Need;
use crate::fault::serve::serve;
use crate::space::map_core::MapCore;
use faultless_sys::signal;
use std::fmt;
use std::ops::{Deref, Range, RangeBounds};

impl Map {
    /// Makes a range resident and keeps it so until the result is dropped. The bytes may then be handed to system
    /// calls, and touching them never faults. (On the mmap backend the range is read in; it stays as long as memory lasts,
    /// and system calls take it in either way.)
    ///
    /// A page that is absent is read with all signals of the calling thread blocked, so that no signal handler leaves it half
    /// read: signals wait for as long as the storage takes. (SIGHUP, SIGINT, SIGQUIT and SIGTERM, where they are neither caught nor
    /// blocked by the program, end it after a second.) A user's [`Source`](crate::Source) is read by the pool's fill
    /// threads, and never by the caller: it must not count on a lock that the caller holds, nor
    /// read another user's source in the same pool.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; [`Error::Read`], [`Error::PastEnd`], [`Error::LeaseBroken`] if a page cannot be read;
    /// [`Error::BudgetExhausted`] if the budget has no room for it beside what is pinned already (after ten
    /// seconds without any progress, or more beside threads that go on; immediately if the range is larger than the budget); [`Error::Forked`].
    pub fn pin(&self, range: impl RangeBounds<usize>) -> Result<Pinned<'_>, Error> {
        let bytes = self.range(range)?;
        self.check_process()?;
        let mut pinned = Pinned::of(self, &bytes, Unit::new(0)..Unit::new(0));
        if bytes.is_empty() {
            return Ok(pinned);
        }
        match &self.backing {
            Backing::Empty => {}
            Backing::Mmap(mmap) => {
                mmap.populate(&bytes)?;
                pinned.units = mmap.keep_open(&bytes);
            }
            Backing::Engine(core) => {
                let units = units_of(core, &bytes);
                let budget = self.pool.budget();
                if (units.end - units.start).saturating_mul(core.unit_bytes()) > budget.get() {
                    return Err(Error::BudgetExhausted { budget });
                }
                check_end(core, &bytes)?;
                pinned.units = units.start..units.start;
                let several = units.end - units.start > 1;
                if several && self.leaves_room_for_buffers(bytes.len() as u64) {
                    // (The loop below finds out what cannot be read.)
                    self.fetch_units(core, std::slice::from_ref(&units), false);
                    let _ = ask(core, units.clone(), false);
                }
                for unit in Unit::each(units) {
                    pin_unit(core, unit).map_err(|refusal| {
                        let offset = core.source_at(core.unit_start(unit)).get();
                        refusal.into_error(&core.name, offset, budget)
                    })?;
                    pinned.units.end = unit + 1;
                }
            }
        }
        Ok(pinned)
    }
}

fn pin_unit(core: &MapCore, unit: Unit) -> Result<(), Refusal> {
    let word = core.page(unit).load();
    if core.page(unit).pin(word).is_ok() {
        return Ok(());
    }
    // A signal handler that does not return (longjmp), or a cancellation, would leave the unit claimed for ever.
    let blocked = signal::Blocked::all();
    let _serving = core.pool.withheld.serving(blocked.former());
    serve(core, unit, Need::Pin)
}

/// A part of a map that is resident and stays so until this is dropped. See [`Map::pin`].
pub struct Pinned<'a> {
    map: &'a Map,
    pub(crate) slice: (usize, usize),
    /// The engine's units; of a map of the kernel's, what it was given for them.
    pub(crate) units: Range<Unit>,
}

impl<'a> Pinned<'a> {
    /// Some bytes of the map's region, whose units are pinned.
    pub(crate) fn of(map: &'a Map, bytes: &Range<usize>, units: Range<Unit>) -> Self {
        Pinned {
            map,
            slice: (map.ptr - map.head + bytes.start, bytes.len()),
            units,
        }
    }
}

impl Deref for Pinned<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: a checked part of the map, which outlives self.
        unsafe { std::slice::from_raw_parts(self.slice.0 as *const u8, self.slice.1) }
    }
}

impl AsRef<[u8]> for Pinned<'_> {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Pinned<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pinned")
            .field("source", &self.map.name())
            .field("len", &self.slice.1)
            .finish_non_exhaustive()
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.map.unpin(self.units.clone());
    }
}

impl Map {
    /// Units that were pinned need not stay any more.
    pub(crate) fn unpin(&self, units: Range<Unit>) {
        if self.check_process().is_err() {
            return;
        }
        match &self.backing {
            Backing::Engine(core) => Unit::each(units).for_each(|unit| core.page(unit).unpin()),
            Backing::Mmap(mmap) => mmap.let_go(&units),
            Backing::Empty => {}
        }
    }
}

const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Map>();
    shared::<Pinned<'static>>();
};
