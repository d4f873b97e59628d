//! Loads and pins of many ranges in one call.

use crate::api::backing::{Backing, check_end, units_of};
use crate::api::map::Map;
use crate::api::owned::PinnedOwned;
use crate::api::pin::Pinned;
use crate::base::error::Error;
use crate::base::ids::Unit;
use crate::fault::ahead::{self, part_units};
use crate::fault::run::{Need, owner};
use crate::fault::serve::serve;
use crate::read::gather::gather;
use crate::read::progress::Progress;
use crate::space::map_core::MapCore;
use faultless_sys::signal;
use std::ops::Range;
use std::sync::Arc;

impl Map {
    /// [`load`](Self::load)s many ranges: results in their order, an error for each that has one.
    ///
    /// It reads what is absent at the depth at which devices work best: up to 64 reads in flight, each of up to 256 KiB, neighbouring
    /// units in one. (Where io_uring is refused, one after the other: [`PoolStats::batches`](crate::PoolStats::batches) says so.) The
    /// calling thread does the work, with its signals blocked for up to 1,024 units at a time. Users' sources are read by the pool's
    /// worker threads.
    ///
    /// As after a load, nothing is pinned: ask for a small part of the budget at a time.
    ///
    /// ```
    /// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
    /// # std::io::Write::write_all(&mut &file, &[7u8; 1_000_000])?;
    /// # let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    /// # let reader = std::fs::File::open(path)?;
    /// # drop(file);
    /// let pool = faultless::Pool::builder().memory(faultless::ByteSize::mib(64)).build()?;
    /// let map = pool.map(&reader)?;
    /// let records = [90_000..90_100, 5_000..6_000, 500_000..700_000];
    /// for record in map.load_many(&records) {
    ///     assert!(record?.iter().all(|&b| b == 7));
    /// }
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn load_many(&self, ranges: &[Range<usize>]) -> Vec<Result<&[u8], Error>> {
        self.fetch(ranges);
        ranges
            .iter()
            .map(|range| self.load(range.clone()))
            .collect()
    }

    /// [`pin`](Self::pin)s many ranges, which are read as [`load_many`](Self::load_many) reads them: results in their order, an error
    /// for each that has one. Once the budget has no room for one, those behind it are not waited for.
    pub fn pin_many(&self, ranges: &[Range<usize>]) -> Vec<Result<Pinned<'_>, Error>> {
        let bytes = ranges
            .iter()
            .fold(0, |sum: u64, range| sum.saturating_add(range.len() as u64));
        if self.leaves_room_for_buffers(bytes) || matches!(self.backing, Backing::Mmap(_)) {
            self.fetch(ranges);
        }
        let mut exhausted = None;
        let pin = |range: &Range<usize>| match exhausted {
            Some(budget) if !self.is_resident(range.clone()) => {
                Err(Error::BudgetExhausted { budget })
            }
            _ => {
                let pinned = self.pin(range.clone());
                if let Err(Error::BudgetExhausted { budget }) = pinned {
                    exhausted = Some(budget);
                }
                pinned
            }
        };
        ranges.iter().map(pin).collect()
    }

    /// As [`pin_many`](Self::pin_many); the results keep the map.
    pub fn pin_many_owned(
        self: &Arc<Self>,
        ranges: &[Range<usize>],
    ) -> Vec<Result<PinnedOwned, Error>> {
        let own = |pinned: Result<Pinned<'_>, Error>| {
            pinned.map(|pinned| PinnedOwned::new(self.clone(), pinned))
        };
        self.pin_many(ranges).into_iter().map(own).collect()
    }

    /// Whether so many bytes can be pinned without the memory that buffers for several reads take for good.
    pub(crate) fn leaves_room_for_buffers(&self, bytes: u64) -> bool {
        bytes <= self.pool.budget().get() / 4 * 3
    }

    /// Reads the absent units of some ranges, but for those that have to wait for other threads or cannot be read: the caller finds out
    /// about those.
    fn fetch(&self, ranges: &[Range<usize>]) {
        if self.check_process().is_err() {
            return;
        }
        let core = match &self.backing {
            Backing::Engine(core) => core,
            Backing::Mmap(mmap) => {
                let bytes = ranges.iter().filter_map(|r| self.range(r.clone()).ok());
                return mmap.begin_all(bytes.filter(|bytes| !bytes.is_empty()));
            }
            Backing::Empty => return,
        };
        let units = |range: &Range<usize>| {
            let bytes = self.range(range.clone()).ok()?;
            (!bytes.is_empty() && check_end(core, &bytes).is_ok()).then(|| units_of(core, &bytes))
        };
        let units: Vec<Range<Unit>> = ranges.iter().filter_map(units).collect();
        self.fetch_units(core, &units, false);
    }

    /// Reads the absent ones of some units at the depth of the device, if that takes more than one read. `follow`: threads that ask in order
    /// are read ahead of.
    pub(crate) fn fetch_units(&self, core: &MapCore, units: &[Range<Unit>], follow: bool) {
        let one_read = match units {
            [] => true,
            [one] => one.end - one.start <= part_units(core),
            _ => false,
        };
        if one_read {
            return;
        }
        if follow && let Some(absent) = units.iter().find_map(|units| first_absent(core, units)) {
            let _blocked = signal::Blocked::all();
            ahead::on_ask(core, absent, owner());
        }
        let workers = &self.pool.0.workers;
        if core.is_source() {
            // (It is advice: what the queue has no room for is read later, one after the other.)
            for units in units {
                let _ = workers.queue(core, units.clone(), &Progress::new(&workers.wakers));
            }
            return;
        }
        gather(&workers.rings, core, Need::Ask, units, |unit| {
            let blocked = signal::Blocked::all();
            let _serving = core.pool.withheld.serving(blocked.former());
            // Where there is no room for one, there is none for the others.
            serve(core, unit, Need::Ask).is_ok()
        });
    }
}

/// The part of some units that begins with the first that is absent.
fn first_absent(core: &MapCore, units: &Range<Unit>) -> Option<Range<Unit>> {
    Unit::each(units.clone())
        .find(|&unit| !core.is_resident(unit))
        .map(|unit| unit..units.end)
}
