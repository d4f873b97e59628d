//! A map: bytes that are read as they are touched.

#![allow(unsafe_code, reason = "makes slices of mapped memory, discards ranges")]

use crate::alias;
use crate::error::{Error, LeaseRefusal};
use crate::evict::{collect_group, settle_evicted};
use crate::fault::ahead::Mode;
use crate::fault::core::{MapCore, Reading};
use crate::fault::counters::{Count, Stats};
use crate::fault::fill::{self, Need};
use crate::fault::identity;
use crate::fault::page::{Left, State};
use crate::fault::process;
use crate::fault::registry;
use crate::fault::report::Fault;
use crate::fault::table::GROUP;
use crate::keeper;
use crate::lease;
use crate::options::{Advice, retire_reading};
use crate::plain::Plain;
use crate::pool::Pool;
use crate::workers::{Broken, LeaseBreak, PART, Prefetch, with_pieces};
use faultless_sys::mem::{self, PAGE};
use faultless_sys::{file, signal, uffd};
use std::fmt;
use std::ops::{Deref, RangeBounds};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

enum Inner {
    Engine(&'static MapCore),
    Plain(Plain),
    Empty,
}

/// A file, or another [`Source`](crate::Source), as memory: a `&[u8]` that is read as it is touched.
///
/// ```
/// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
/// # std::io::Write::write_all(&mut &file, &[7u8; 100_000])?;
/// # let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
/// # let reader = std::fs::File::open(path)?;
/// # drop(file);
/// use faultless::{Bytes, Pool};
///
/// let pool = Pool::builder().memory(Bytes::mib(64)).build()?;
/// let map = pool.map(&reader)?;
/// assert_eq!(map[99_999], 7); // a miss: read now, by this thread
/// let part = map.pin(5_000..6_000)?; // resident until dropped; a read error would be an Err
/// std::io::Write::write_all(&mut std::io::sink(), &part)?; // safe to hand to a system call
/// map.prefetch(..)?; // returns at once
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # What a load can meet
///
/// * A read error, or a page beyond the end of a file that was truncated: the process gets SIGBUS, as with mmap, after
///   one line on stderr. [`pin`](Self::pin) reports the same as an error value.
/// * A system call that is handed a pointer to a page which is not resident fails with `EFAULT`. Pin the range first.
/// * A thread that blocks SIGBUS and misses is killed by the kernel. Do not block SIGBUS.
pub struct Map {
    ptr: usize,
    len: usize,
    /// Bytes between the start of the region and the start of the map.
    head: usize,
    inner: Inner,
    pool: Pool,
}

impl fmt::Debug for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Map")
            .field("source", &self.name())
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range is mapped for as long as self lives; its bytes do not change, by the lease or by the
        // promise of the caller of `map_trusted`; an empty map has a dangling, aligned pointer.
        unsafe { std::slice::from_raw_parts(self.ptr as *const u8, self.len) }
    }
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Map {
    pub(crate) fn empty(pool: Pool) -> Map {
        Map {
            ptr: std::ptr::dangling::<u8>() as usize,
            len: 0,
            head: 0,
            inner: Inner::Empty,
            pool,
        }
    }

    pub(crate) fn engine(pool: Pool, core: &'static MapCore, head: usize, len: usize) -> Map {
        Map {
            ptr: core.start + head,
            len,
            head,
            inner: Inner::Engine(core),
            pool,
        }
    }

    pub(crate) fn plain(pool: Pool, plain: Plain, head: usize, len: usize) -> Map {
        Map {
            ptr: plain.range.start + head,
            len,
            head,
            inner: Inner::Plain(plain),
            pool,
        }
    }

    /// The pool that the map belongs to.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Name of the source.
    pub fn name(&self) -> &str {
        match &self.inner {
            Inner::Engine(core) => &core.name,
            Inner::Plain(plain) => &plain.name,
            Inner::Empty => "an empty source",
        }
    }

    /// Takes the lease that makes the map safe. `len_before` is the file's length that the map was made for.
    pub(crate) fn take_lease(&self, what: Broken, len_before: u64) -> Result<(), Error> {
        let Inner::Engine(core) = &self.inner else {
            return Ok(());
        };
        let Reading::File { fd, .. } = &core.reading else {
            return Ok(());
        };
        self.pool
            .0
            .workers
            .ensure(&core.pool, 1)
            .map_err(|e| Error::kernel("cannot start a worker thread", e))?;
        let (id, serial) = (core.id, core.serial);
        let (pool, workers) = (core.pool.clone(), self.pool.0.workers.clone());
        let on_break = Box::new(move || {
            workers.lease_broken(&pool, LeaseBreak { id, serial, what });
        });
        let id = keeper::lease(fd, on_break)
            .map_err(|e| Error::kernel("cannot reach the keeper thread", e))?
            .map_err(|e| lease::error(&core.name, lease::refusal(e)))?;
        let _ = core.lease.set(id);
        // Somebody may have truncated it between the look at its length and the lease.
        match file::status(fd.get()) {
            Ok(st) if st.len == len_before => Ok(()),
            Ok(_) => Err(lease::error(&core.name, LeaseRefusal::OpenForWriting)),
            Err(e) => Err(Error::kernel(format!("cannot stat {}", core.name), e)),
        }
    }

    /// Checks a range of the map, and turns it into bytes of the region.
    fn range(&self, range: impl RangeBounds<usize>) -> Result<std::ops::Range<usize>, Error> {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        let start = match range.start_bound() {
            Included(&s) => s,
            Excluded(&s) => s.saturating_add(1),
            Unbounded => 0,
        };
        let end = match range.end_bound() {
            Included(&e) => e.saturating_add(1),
            Excluded(&e) => e,
            Unbounded => self.len,
        };
        if start > end || end > self.len {
            return Err(Error::OutOfRange {
                start,
                end,
                len: self.len,
            });
        }
        Ok(self.head + start..self.head + end)
    }

    fn check_process(&self) -> Result<(), Error> {
        if process::forked() || process::pid() != self.pool.0.pid {
            Err(Error::Forked)
        } else {
            Ok(())
        }
    }

    /// Makes a range resident and keeps it so until the result is dropped. The bytes may then be handed to system
    /// calls, and touching them never faults. (On the mmap backend the range is read in; it stays as long as memory lasts,
    /// and system calls take it in either way.)
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; [`Error::Read`], [`Error::PastEnd`], [`Error::LeaseBroken`] if a page cannot be read;
    /// [`Error::BudgetExhausted`] if the budget has no room for it beside what is pinned already (after up to ten
    /// seconds without any progress, or at once if the range is larger than the budget); [`Error::Forked`].
    pub fn pin(&self, range: impl RangeBounds<usize>) -> Result<Pinned<'_>, Error> {
        let bytes = self.range(range)?;
        self.check_process()?;
        let slice = (self.ptr - self.head + bytes.start, bytes.len());
        let mut pinned = Pinned {
            map: self,
            slice,
            first: 0,
            end: 0,
        };
        if bytes.is_empty() {
            return Ok(pinned);
        }
        match &self.inner {
            Inner::Empty => {}
            Inner::Plain(plain) => {
                let (start, end) = (bytes.start & !(PAGE - 1), bytes.end.next_multiple_of(PAGE));
                plain
                    .populate(start, end - start)
                    .map_err(|error| Error::Read {
                        name: plain.name.clone(),
                        offset: bytes.start as u64,
                        error,
                    })?;
            }
            Inner::Engine(core) => {
                let units = core.unit_of(core.start + bytes.start)
                    ..core.unit_of(core.start + bytes.end - 1) + 1;
                let budget = self.pool.budget();
                if (units.end - units.start).saturating_mul(core.unit_bytes()) > budget.get() {
                    return Err(Error::BudgetExhausted { budget });
                }
                if bytes.end as u64 > core.data_len.next_multiple_of(PAGE as u64) {
                    return Err(Error::PastEnd {
                        name: core.name.to_string(),
                        offset: core.base + core.data_len.next_multiple_of(PAGE as u64),
                    });
                }
                pinned.first = units.start;
                pinned.end = units.start;
                for unit in units {
                    pin_unit(core, unit).map_err(|fault| {
                        let offset = core.base + (unit << core.unit_shift);
                        Error::from_fault(fault, &core.name, offset, budget)
                    })?;
                    pinned.end = unit + 1;
                }
            }
        }
        Ok(pinned)
    }

    /// Asks for a range to be read soon, and returns at once. Parts for which there is no room are dropped (counted in
    /// [`Stats::prefetch_dropped`]).
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; [`Error::Kernel`] if the worker threads cannot be started; [`Error::Forked`].
    pub fn prefetch(&self, range: impl RangeBounds<usize>) -> Result<(), Error> {
        let bytes = self.range(range)?;
        self.check_process()?;
        if bytes.is_empty() {
            return Ok(());
        }
        match &self.inner {
            Inner::Empty => {}
            Inner::Plain(plain) => {
                let start = bytes.start & !(PAGE - 1);
                plain.advise(start, bytes.end - start, libc::MADV_WILLNEED);
            }
            Inner::Engine(core) => {
                let workers = &self.pool.0.workers;
                workers
                    .all(&core.pool)
                    .map_err(|e| Error::kernel("cannot start worker threads", e))?;
                let end = (core.unit_of(core.start + bytes.end - 1) + 1).min(core.data_units());
                let step = (PART >> core.unit_shift).max(1);
                let mut unit = core.unit_of(core.start + bytes.start);
                while unit < end {
                    let count = step.min(end - unit);
                    let job = Prefetch {
                        id: core.id,
                        serial: core.serial,
                        unit,
                        count,
                    };
                    if !workers.prefetch(&core.pool, job) {
                        core.counters
                            .add(Count::PrefetchDropped, (end - unit).div_ceil(step));
                        break;
                    }
                    unit += count;
                }
            }
        }
        Ok(())
    }

    /// Says how the map will be read from now on.
    pub fn advise(&self, advice: Advice) {
        match &self.inner {
            Inner::Empty => {}
            Inner::Plain(plain) => {
                let advice = match advice {
                    Advice::Normal => libc::MADV_NORMAL,
                    Advice::Random => libc::MADV_RANDOM,
                    Advice::Sequential => libc::MADV_SEQUENTIAL,
                };
                plain.advise(0, plain.range.len, advice);
            }
            Inner::Engine(core) => {
                if self.check_process().is_err() {
                    return;
                }
                let mode = match advice {
                    Advice::Random => Mode::Off,
                    // A user's code is not called for a guess.
                    Advice::Normal if matches!(core.reading, Reading::Source { .. }) => Mode::Off,
                    Advice::Normal => Mode::Detect,
                    Advice::Sequential => Mode::Eager,
                };
                // Without threads that could read ahead, nothing is read ahead.
                let ready = mode == Mode::Off || self.pool.0.workers.all(&core.pool).is_ok();
                core.streams.set_mode(if ready { mode } else { Mode::Off });
            }
        }
    }

    /// Gives the memory of a range back now: of the units that lie wholly in it and are not pinned. They are read
    /// again when touched.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; [`Error::Forked`].
    pub fn release(&self, range: impl RangeBounds<usize>) -> Result<(), Error> {
        let bytes = self.range(range)?;
        self.check_process()?;
        match &self.inner {
            Inner::Empty => {}
            Inner::Plain(plain) => {
                let (start, end) = (bytes.start.next_multiple_of(PAGE), bytes.end & !(PAGE - 1));
                if start < end {
                    plain.release(start, end - start);
                }
            }
            Inner::Engine(core) => {
                let unit = core.unit_bytes() as usize;
                // The last unit is wholly inside if the range reaches the end of the map.
                let to_end = bytes.end == self.head + self.len;
                let first = bytes.start.div_ceil(unit);
                let first = if bytes.start <= self.head { 0 } else { first };
                let end = if to_end {
                    bytes.end.div_ceil(unit)
                } else {
                    bytes.end / unit
                };
                release_units(core, first as u64..(end as u64).min(core.data_units()));
            }
        }
        Ok(())
    }

    /// Whether a whole range is in memory, as far as is known: under memory pressure, the kernel may have taken cold
    /// pages back. `false` for ranges outside the map.
    pub fn is_resident(&self, range: impl RangeBounds<usize>) -> bool {
        let Ok(bytes) = self.range(range) else {
            return false;
        };
        if bytes.is_empty() || self.check_process().is_err() {
            return bytes.is_empty();
        }
        match &self.inner {
            Inner::Empty => true,
            Inner::Plain(plain) => {
                let start = bytes.start & !(PAGE - 1);
                plain.is_resident(start, bytes.end - start)
            }
            Inner::Engine(core) => {
                let mut units = core.unit_of(core.start + bytes.start)
                    ..core.unit_of(core.start + bytes.end - 1) + 1;
                units.all(|u| {
                    let word = core.page(u).load();
                    word.state() == State::Resident || word.cool()
                })
            }
        }
    }

    /// What happened in the map so far. All zero on the mmap backend, where the kernel does not tell.
    pub fn stats(&self) -> Stats {
        match &self.inner {
            Inner::Engine(core) => core.counters.snapshot(),
            _ => Stats::default(),
        }
    }
}

fn pin_unit(core: &MapCore, unit: u64) -> Result<(), Fault> {
    match &core.reading {
        Reading::File { .. } => {
            // A signal handler that does not return (longjmp), or a cancelled thread, would leave the unit claimed
            // until others find its owner dead. With a fill to do, none may come in between.
            let word = core.page(unit).load();
            if core.page(unit).pin(word).is_ok() {
                return Ok(());
            }
            let _blocked = signal::Blocked::all();
            fill::serve(core, unit, Need::Pin)
        }
        Reading::Source { .. } => {
            with_pieces(core, |fetch| fill::serve_from(core, unit, Need::Pin, fetch))
        }
    }
}

/// Evicts the unpinned units of a range, now.
fn release_units(core: &MapCore, units: std::ops::Range<u64>) {
    let mut unit = units.start;
    while unit < units.end && !core.keep_all.load(Ordering::Acquire) {
        // Skip groups in which nothing is resident: a map may be huge and sparse.
        if core.table.live(unit) == 0 {
            unit = (unit / GROUP + 1) * GROUP;
            continue;
        }
        // A handler that does not return would leave the units in our hands for ever.
        let _blocked = signal::Blocked::all();
        let first = unit;
        let mut soft = [false; GROUP as usize];
        while unit < units.end
            && unit - first < GROUP
            && let Some(was_soft) = core.page(unit).begin_evict()
        {
            soft[(unit - first) as usize] = was_soft;
            unit += 1;
        }
        if unit == first {
            drop_cool(core, unit);
            unit += 1;
            continue;
        }
        let bytes = core.backed(first, unit - first);
        // Who sets `keep_all` looks at the words afterwards: one of the two sees the other.
        let (addr, len) = (
            core.start + bytes.start as usize,
            (bytes.end - bytes.start) as usize,
        );
        let ours = identity::discarding();
        let go = !core.keep_all.load(Ordering::SeqCst)
            && core.live.covers(addr, len)
            // SAFETY: `begin_evict` put these units into our hands: unpinned, and readable again.
            && unsafe { mem::discard(addr, len) };
        // What follows may discard as well, and a report may have come in between.
        drop(ours);
        for u in first..unit {
            if !go {
                fill::cancel_eviction(core, u, soft[(u - first) as usize]);
                // The evictor may have thrown its entry away meanwhile.
                fill::track(core, u, false);
            } else if settle_evicted(core, u, Left::Shadow(0)).emptied {
                collect_group(core, u);
            }
        }
    }
}

/// Books out the units of a range whose memory the program has unmapped: absent from now on, and never asked for again.
pub(crate) fn forget_units(core: &MapCore, units: std::ops::Range<u64>) {
    let mut unit = units.start;
    while unit < units.end {
        if core.table.live(unit) == 0 {
            unit = (unit / GROUP + 1) * GROUP;
            continue;
        }
        // A handler that does not return would leave the unit in our hands for ever.
        let _blocked = signal::Blocked::all();
        if core.page(unit).begin_evict().is_some() {
            settle_evicted(core, unit, Left::Shadow(0));
        } else {
            drop_cool(core, unit);
        }
        unit += 1;
    }
}

/// Gives up the bytes of a unit that cools.
fn drop_cool(core: &MapCore, unit: u64) {
    let page = core.page(unit);
    let word = page.load();
    let slot = word.number();
    if word.cool() && page.drop_cool(slot, 0) {
        fill::give_slot(core, slot);
        core.counters.add(Count::Evictions, 1);
        if core.table.leave(unit) {
            collect_group(core, unit);
        }
    }
}

impl Map {
    /// Takes the engine's part out of the map, which is empty from then on.
    pub(crate) fn take_core(&mut self) -> Option<&'static MapCore> {
        match std::mem::replace(&mut self.inner, Inner::Empty) {
            Inner::Engine(core) => Some(core),
            other => {
                self.inner = other;
                None
            }
        }
    }

    /// The engine's part of the map.
    pub(crate) fn core(&self) -> Option<&'static MapCore> {
        match &self.inner {
            Inner::Engine(core) => Some(core),
            _ => None,
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        let Inner::Engine(core) = &self.inner else {
            return;
        };
        let core: &'static MapCore = core;
        if self.check_process().is_err() {
            // A forked child: the bar at the addresses stays, and all else is its parent's.
            return;
        }
        // SAFETY: `self` is the only owner, and is being dropped: nobody holds a slice.
        unsafe {
            let core = close(&self.pool, core);
            unmap_live(&core, |at, len| {
                let _ = mem::unmap(at, len);
            });
            settle(core);
        }
    }
}

/// Ends the service of a map: when this returns, nobody is inside any more, no fill is in flight, and faults in its
/// region are nobody's.
///
/// # Safety
///
/// The caller is the only owner of `core`, and uses it from now on through the returned box alone.
pub(crate) unsafe fn close(pool: &Pool, core: &'static MapCore) -> Box<MapCore> {
    core.closing.store(true, Ordering::Release);
    core.streams.give_up(core);
    {
        // `Pool::stats` holds this lock, so it counts the map either among the live ones or here.
        let mut past = pool.0.past.lock().unwrap_or_else(PoisonError::into_inner);
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

/// A part of a map that is resident and stays so until this is dropped. See [`Map::pin`].
pub struct Pinned<'a> {
    map: &'a Map,
    slice: (usize, usize),
    first: u64,
    end: u64,
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
        if let Inner::Engine(core) = &self.map.inner
            && self.map.check_process().is_ok()
        {
            for unit in self.first..self.end {
                core.page(unit).unpin();
            }
        }
    }
}

const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Map>();
    shared::<Pinned<'static>>();
};
