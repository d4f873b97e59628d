//! Loads and pins for tasks: they never block the thread that polls them.

use crate::api::backing::{Backing, check_end, units_of};
use crate::api::map::Map;
use crate::api::owned::PinnedOwned;
use crate::api::pin::Pinned;
use crate::base::error::Error;
use crate::base::ids::{RegionAt, Unit};
use crate::base::primitive::Mutex;
use crate::read::requests::{Failure, Job, Request, Requests, What, are_resident, pin_resident};
use crate::space::map_core::MapCore;
use std::fmt;
use std::ops::{Bound, Range, RangeBounds};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

impl Map {
    /// As [`load`](Self::load), for tasks: a page that is absent is read by a thread of the pool, and the thread that polls does
    /// other things meanwhile. It works under any executor. Reading starts with the first poll; many futures that wait at the same
    /// time are read at the depth at which devices work best. Dropping one gives up its claim, at any time.
    ///
    /// If the range is in memory, the first poll returns it. (Not on the mmap backend, which asks the kernel in a thread of the pool.
    /// Nor if the evictor has begun to take a page away, or the kernel may do so: then it is pending once, for a moment.)
    ///
    /// ```
    /// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
    /// # std::io::Write::write_all(&mut &file, &[7u8; 100_000])?;
    /// # let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    /// # let reader = std::fs::File::open(path)?;
    /// # drop(file);
    /// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    /// let pool = faultless::Pool::builder().memory(faultless::ByteSize::mib(64)).build()?;
    /// let map = pool.map(&reader)?;
    /// # runtime.block_on(async {
    /// let record = map.load_async(5_000..6_000).await?;
    /// assert!(record.iter().all(|&b| b == 7));
    /// # Ok::<(), faultless::Error>(())
    /// # })?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// As for [`load`](Self::load).
    pub fn load_async(&self, range: impl RangeBounds<usize>) -> LoadFuture<'_> {
        LoadFuture(Fetch::new(self, range, false))
    }

    /// As [`pin`](Self::pin), for tasks: see [`load_async`](Self::load_async).
    ///
    /// # Errors
    ///
    /// As for [`pin`](Self::pin).
    pub fn pin_async(&self, range: impl RangeBounds<usize>) -> PinFuture<'_> {
        PinFuture(Fetch::new(self, range, true))
    }

    /// As [`pin_owned`](Self::pin_owned), for tasks: see [`load_async`](Self::load_async).
    ///
    /// # Errors
    ///
    /// As for [`pin`](Self::pin).
    pub fn pin_owned_async(
        self: &Arc<Self>,
        range: impl RangeBounds<usize>,
    ) -> impl Future<Output = Result<PinnedOwned, Error>> + Send + 'static {
        let (map, range) = (self.clone(), bounds(&range));
        async move {
            let pinned = map.pin_async(range).await?;
            Ok(PinnedOwned::new(map.clone(), pinned))
        }
    }
}

/// Bytes of the region that are there, and the units that are pinned.
type There = (Range<usize>, Range<Unit>);

impl Map {
    fn failed(&self, why: Failure) -> Error {
        match (why, &self.backing) {
            (Failure::Unit(unit, why), Backing::Engine(core)) => {
                let offset = core.source_at(core.unit_start(unit)).get();
                why.into_error(&core.name, offset, self.pool.budget())
            }
            (Failure::Unit(..), _) => Error::Forked,
            (Failure::Other(error), _) => error,
            (Failure::NoThread(error), _) => {
                Error::kernel("cannot start a thread for futures", error)
            }
        }
    }
}

type Bounds = (Bound<usize>, Bound<usize>);

fn bounds(range: &impl RangeBounds<usize>) -> Bounds {
    (range.start_bound().cloned(), range.end_bound().cloned())
}

/// The result of [`Map::load_async`].
#[must_use = "it does nothing before it is polled"]
pub struct LoadFuture<'a>(Fetch<'a>);

/// The result of [`Map::pin_async`].
#[must_use = "it does nothing before it is polled"]
pub struct PinFuture<'a>(Fetch<'a>);

/// A range that is being made resident.
struct Fetch<'a> {
    map: &'a Map,
    range: Bounds,
    pins: bool,
    stage: Stage,
}

enum Stage {
    Begin,
    Waiting(Arc<Request>),
    Done,
}

impl<'a> Fetch<'a> {
    fn new(map: &'a Map, range: impl RangeBounds<usize>, pins: bool) -> Self {
        Fetch {
            map,
            range: bounds(&range),
            pins,
            stage: Stage::Begin,
        }
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<There, Error>> {
        let none = Unit::new(0)..Unit::new(0);
        let map = self.map;
        let bytes = map.range(self.range)?;
        if let Err(error) = map.check_process() {
            // (In a forked child, no thread is there to serve it, and one may have had its lock.)
            std::mem::forget(std::mem::replace(&mut self.stage, Stage::Done));
            return Poll::Ready(Err(error));
        }
        if let Stage::Waiting(request) = &self.stage {
            let Some(outcome) = request.poll(context.waker()) else {
                return Poll::Pending;
            };
            self.stage = Stage::Done;
            let units = match &map.backing {
                Backing::Engine(core) => units_of(core, &bytes),
                Backing::Mmap(mmap) if self.pins && outcome.is_ok() => mmap.keep_open(&bytes),
                Backing::Mmap(_) | Backing::Empty => none,
            };
            let there = outcome.map(|()| (bytes, units));
            return Poll::Ready(there.map_err(|why| map.failed(why)));
        }
        assert!(
            matches!(self.stage, Stage::Begin),
            "a future was polled after it had ended"
        );
        if bytes.is_empty() {
            self.stage = Stage::Done;
            return Poll::Ready(Ok((bytes, none)));
        }
        let what = match &map.backing {
            Backing::Empty => return Poll::Ready(Ok((bytes, none))),
            Backing::Mmap(mmap) => {
                let (mmap, bytes) = (mmap.clone(), bytes.clone());
                let with = std::sync::Arc::as_ptr(&mmap).addr();
                let job: Job = Box::new(move || mmap.populate(&bytes));
                What::Other {
                    with,
                    job: Mutex::new(Some(job)),
                }
            }
            Backing::Engine(core) => {
                check_end(core, &bytes)?;
                let units = units_of(core, &bytes);
                let budget = map.pool.budget();
                if self.pins
                    && (units.end - units.start).saturating_mul(core.unit_bytes()) > budget.get()
                {
                    return Poll::Ready(Err(Error::BudgetExhausted { budget }));
                }
                if self.is_there(core, &units) {
                    self.stage = Stage::Done;
                    return Poll::Ready(Ok((bytes, units)));
                }
                if core.is_source() && core.pool.reads_sources() {
                    return Poll::Ready(Err(Error::Recursion {
                        name: core.name.to_string(),
                        offset: core.source_at(RegionAt::new(bytes.start as u64)).get(),
                    }));
                }
                What::Units {
                    map: core.id,
                    serial: core.serial,
                    units,
                    pins: self.pins,
                }
            }
        };
        let request = Request::new(what, context.waker().clone());
        Requests::push(&map.pool.0.workers, request.clone());
        self.stage = Stage::Waiting(request);
        Poll::Pending
    }

    /// Whether all is resident; if so it is pinned, where that is wanted.
    fn is_there(&self, core: &MapCore, units: &Range<Unit>) -> bool {
        match self.pins {
            true => pin_resident(core, units.clone()),
            false => are_resident(core, units.clone()),
        }
    }
}

impl Drop for Fetch<'_> {
    fn drop(&mut self) {
        if let Stage::Waiting(request) = &self.stage
            && self.map.check_process().is_ok()
            && let Some(pinned) = self.map.pool.0.workers.requests.abandon(request)
        {
            self.map.unpin(pinned);
        }
    }
}

impl<'a> Future for LoadFuture<'a> {
    type Output = Result<&'a [u8], Error>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let fetch = &mut self.get_mut().0;
        let map = fetch.map;
        fetch
            .poll(context)
            .map_ok(|(bytes, _)| &map[bytes.start - map.head..bytes.end - map.head])
    }
}

impl<'a> Future for PinFuture<'a> {
    type Output = Result<Pinned<'a>, Error>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let fetch = &mut self.get_mut().0;
        let map = fetch.map;
        fetch
            .poll(context)
            .map_ok(|(bytes, units)| Pinned::of(map, &bytes, units))
    }
}

impl fmt::Debug for LoadFuture<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("LoadFuture").field(&self.0.range).finish()
    }
}

impl fmt::Debug for PinFuture<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PinFuture").field(&self.0.range).finish()
    }
}

const _: fn() = || {
    fn anywhere<T: Send + Sync>() {}
    anywhere::<LoadFuture<'static>>();
    anywhere::<PinFuture<'static>>();
};
