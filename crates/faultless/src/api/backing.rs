//! What serves a map: the engine, or the kernel's mmap, or nothing for an empty one.

use crate::api::advice::Advice;
use crate::api::kernel_map::KernelMap;
use crate::api::pool::Pool;
use crate::base::error::Error;
use crate::base::ids::{RegionAt, Unit};
use crate::base::stats::Stats;
use crate::evict::release::release_units;
use crate::read::progress::Progress;
use crate::read::requests::Requests;
use crate::space::map_core::{MapCore, Reading};
use crate::space::streams::Mode;
use std::ops::Range;
use std::sync::Arc;

/// What serves a map. Ranges are bytes of its region, and not empty.
pub(crate) enum Backing {
    Engine(&'static MapCore),
    /// Shared with threads that read it in.
    Mmap(Arc<KernelMap>),
    Empty,
}

impl Backing {
    /// The address of the region.
    pub(crate) fn start(&self) -> usize {
        match self {
            Backing::Engine(core) => core.start.get(),
            Backing::Mmap(mmap) => mmap.start,
            Backing::Empty => std::ptr::dangling::<u8>() as usize,
        }
    }

    pub(crate) fn name(&self) -> &str {
        match self {
            Backing::Engine(core) => &core.name,
            Backing::Mmap(mmap) => &mmap.name,
            Backing::Empty => "an empty source",
        }
    }

    /// The engine's part, if the engine serves it.
    pub(crate) fn core(&self) -> Option<&'static MapCore> {
        match self {
            Backing::Engine(core) => Some(core),
            _ => None,
        }
    }

    /// Asks for a range to be read soon.
    pub(crate) fn prefetch(
        &self,
        bytes: &Range<usize>,
        pool: &Pool,
        progress: &Arc<Progress>,
    ) -> Result<(), Error> {
        match self {
            Backing::Empty => Ok(()),
            Backing::Mmap(mmap) => {
                if mmap.prefetch(bytes) {
                    // (It ends with the map.)
                    let map = Arc::downgrade(mmap);
                    let job = move || {
                        while map.upgrade().is_some_and(|map| map.serve_prefetches()) {}
                        Ok(())
                    };
                    Requests::do_later(&pool.0.workers, Box::new(job));
                }
                Ok(())
            }
            Backing::Engine(core) => pool
                .0
                .workers
                .queue(core, units_of(core, bytes), progress)
                .map_err(|e| Error::kernel("cannot start worker threads", e)),
        }
    }

    /// Says how it will be read.
    pub(crate) fn advise(&self, advice: Advice, pool: &Pool) {
        match self {
            Backing::Empty => {}
            Backing::Mmap(mmap) => mmap.will_be_read(match advice {
                Advice::Normal => libc::MADV_NORMAL,
                Advice::Random => libc::MADV_RANDOM,
                Advice::Sequential => libc::MADV_SEQUENTIAL,
            }),
            Backing::Engine(core) => {
                let mode = match advice {
                    Advice::Random => Mode::Off,
                    // A user's code is not called for a guess.
                    Advice::Normal if matches!(core.reading, Reading::Source { .. }) => Mode::Off,
                    Advice::Normal => Mode::Detect,
                    Advice::Sequential => Mode::Eager,
                };
                // Without threads that could read ahead, nothing is read ahead.
                let ready = mode == Mode::Off || pool.0.workers.all(&core.pool).is_ok();
                core.streams.set_mode(if ready { mode } else { Mode::Off });
            }
        }
    }

    /// Gives memory back: of the units that lie wholly between two bytes, the first and the last of which count as a whole
    /// if the range reaches the map's ends (`from_start`, `to_end`).
    pub(crate) fn release(&self, bytes: &Range<usize>, from_start: bool, to_end: bool) {
        match self {
            Backing::Empty => {}
            Backing::Mmap(mmap) => mmap.release(bytes),
            Backing::Engine(core) => {
                let unit = core.unit_bytes();
                let first = match from_start {
                    true => 0,
                    false => (bytes.start as u64).div_ceil(unit),
                };
                let end = match to_end {
                    true => (bytes.end as u64).div_ceil(unit),
                    false => bytes.end as u64 / unit,
                };
                let end = Unit::new(end).min(core.units_end());
                release_units(core, Unit::new(first)..end);
            }
        }
    }

    /// Whether a whole range is in memory, as far as is known.
    pub(crate) fn is_resident(&self, bytes: &Range<usize>) -> bool {
        match self {
            Backing::Empty => true,
            Backing::Mmap(mmap) => mmap.is_resident(bytes),
            Backing::Engine(core) => Unit::each(units_of(core, bytes))
                .all(|unit| unit < core.units_end() && core.is_present(unit)),
        }
    }

    /// What happened so far.
    pub(crate) fn stats(&self) -> Stats {
        match self {
            Backing::Engine(core) => core.counters.snapshot(),
            Backing::Mmap(mmap) => mmap.stats(),
            Backing::Empty => Stats::default(),
        }
    }
}

/// The units that some bytes of a map's region lie in; there is at least one byte.
pub(crate) fn units_of(core: &MapCore, bytes: &Range<usize>) -> Range<Unit> {
    let unit = |at: usize| core.unit_at(RegionAt::new(at as u64));
    unit(bytes.start)..unit(bytes.end - 1) + 1
}

/// Fails if some bytes of a map's region lie behind the pages of its source.
pub(crate) fn check_end(core: &MapCore, bytes: &Range<usize>) -> Result<(), Error> {
    if bytes.end as u64 <= core.pages_end().get() {
        return Ok(());
    }
    Err(Error::PastEnd {
        name: core.name.to_string(),
        offset: core.source_at(core.pages_end()).get(),
    })
}
