//! The pool's own threads for what neither a signal handler nor a caller should do: reading users' sources for faulting
//! threads, prefetches, and saving a map whose lease is being broken.

#![allow(
    unsafe_code,
    reason = "answers requests that lie on faulting threads' stacks"
)]

use crate::evict::collect_group;
use crate::fault::ahead::{Owner, Request};
use crate::fault::core::{MapCore, PoolCore, Reading};
use crate::fault::counters::Count;
use crate::fault::fill::{self, Handed, Need, Piece};
use crate::fault::registry;
use crate::fault::report::Fault;
use crate::lease::{self, OnBreak};
use crate::source::{self, Source};
use crate::thread::{self, Thread};
use faultless_sys::mem::PAGE;
use faultless_sys::raw;
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Threads that prefetch: enough to keep a solid-state disk's queue filled.
const PREFETCHERS: usize = 8;
/// Parts of prefetches that may wait; more are dropped, as advice may be.
const JOBS_MAX: usize = 8192;
/// Bytes of one part of a prefetch.
pub(crate) const PART: u64 = 256 * 1024;

/// How long a worker sleeps before it looks by itself.
const IDLE_NS: u64 = 1_000_000_000;

/// Units to fill of the map with gate `id`, if it still is the one with this serial number.
pub(crate) struct Prefetch {
    pub(crate) id: u32,
    pub(crate) serial: u64,
    pub(crate) unit: u64,
    pub(crate) count: u64,
}

/// The lease of that map is being broken.
pub(crate) struct LeaseBreak {
    pub(crate) id: u32,
    pub(crate) serial: u64,
    pub(crate) what: Broken,
}

/// What is to be done about a broken lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// As the owner of the map wished.
    Save(OnBreak),
    /// The kernel's own mapping takes the map's place.
    HandBack,
}

#[derive(Default)]
struct Jobs {
    prefetches: VecDeque<Prefetch>,
    breaks: VecDeque<LeaseBreak>,
    stopping: bool,
}

/// Worker threads and their queue. Threads start when they are first needed. They are woken by the pool's `work_bell`,
/// which a signal handler can ring as well.
#[derive(Default)]
pub(crate) struct Workers {
    jobs: Mutex<Jobs>,
    threads: Mutex<Threads>,
}

#[derive(Default)]
struct Threads {
    handles: Vec<Thread>,
    workers: usize,
    fillers: usize,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Workers {
    /// Makes sure that `count` workers run (at most one more than [`PREFETCHERS`]).
    ///
    /// The first of them does nothing but save maps whose leases are being broken: reads that wait for slow storage
    /// must not keep it from that.
    pub(crate) fn ensure(self: &Arc<Self>, pool: &Arc<PoolCore>, count: usize) -> io::Result<()> {
        let mut threads = lock(&self.threads);
        while threads.workers < count.min(1 + PREFETCHERS) {
            let (me, pool, first) = (self.clone(), pool.clone(), threads.workers == 0);
            let handle = thread::spawn(c"faultless-work", move || {
                if first {
                    me.save(&pool)
                } else {
                    me.work(&pool)
                }
            })?;
            threads.handles.push(handle);
            threads.workers += 1;
        }
        Ok(())
    }

    /// Makes sure that the threads which read users' sources run.
    pub(crate) fn ensure_fillers(
        self: &Arc<Self>,
        pool: &Arc<PoolCore>,
        count: usize,
    ) -> io::Result<()> {
        let mut threads = lock(&self.threads);
        while threads.fillers < count {
            let (pool, number) = (pool.clone(), threads.fillers);
            // Before it runs: it must find itself among the fill threads.
            pool.fillers_started
                .store(number as u32 + 1, Ordering::Relaxed);
            let handle = thread::spawn(c"faultless-fill", move || fill_for(&pool, number))?;
            threads.handles.push(handle);
            threads.fillers += 1;
        }
        Ok(())
    }

    pub(crate) fn all(self: &Arc<Self>, pool: &Arc<PoolCore>) -> io::Result<()> {
        self.ensure(pool, 1 + PREFETCHERS)
    }

    /// Queues a prefetch. `false` if the queue is full.
    pub(crate) fn prefetch(&self, pool: &PoolCore, job: Prefetch) -> bool {
        let mut jobs = lock(&self.jobs);
        if jobs.prefetches.len() >= JOBS_MAX {
            return false;
        }
        jobs.prefetches.push_back(job);
        drop(jobs);
        pool.work_bell.ring();
        true
    }

    /// Queues the saving of a map.
    pub(crate) fn lease_broken(&self, pool: &PoolCore, job: LeaseBreak) {
        lock(&self.jobs).breaks.push_back(job);
        pool.save_bell.ring();
    }

    /// The life of the worker that saves maps.
    fn save(&self, pool: &PoolCore) {
        crate::keeper::block_signals();
        loop {
            let mut jobs = lock(&self.jobs);
            if jobs.stopping {
                return;
            }
            let job = jobs.breaks.pop_front();
            drop(jobs);
            match job {
                Some(LeaseBreak { id, serial, what }) => lease::broken(id, serial, what),
                None => pool.save_bell.sleep(IDLE_NS, || {
                    let jobs = lock(&self.jobs);
                    jobs.breaks.is_empty() && !jobs.stopping
                }),
            }
        }
    }

    fn work(&self, pool: &PoolCore) {
        crate::keeper::block_signals();
        loop {
            // In turns: neither kind of work keeps the other waiting.
            let ahead = pool.ahead.pop().map(Request::unpack);
            if let Some(request) = ahead {
                read_ahead(pool, request);
            }
            let mut jobs = lock(&self.jobs);
            if jobs.stopping {
                return;
            }
            let job = jobs.prefetches.pop_front();
            drop(jobs);
            match job {
                Some(job) => prefetch(&job),
                None if ahead.is_none() => pool.work_bell.sleep(IDLE_NS, || {
                    let jobs = lock(&self.jobs);
                    pool.ahead.is_empty() && jobs.prefetches.is_empty() && !jobs.stopping
                }),
                None => {}
            }
        }
    }

    /// Stops all threads and waits for them.
    pub(crate) fn stop(&self, pool: &PoolCore) {
        lock(&self.jobs).stopping = true;
        pool.work_bell.ring_all();
        pool.save_bell.ring_all();
        pool.stopping.store(true, Ordering::Release);
        pool.fill_bell.ring_all();
        let handles = std::mem::take(&mut lock(&self.threads).handles);
        for h in handles.into_iter().filter(|h| !h.is_this()) {
            h.join();
        }
    }
}

/// Reads a part of a window.
fn read_ahead(pool: &PoolCore, request: Request) {
    let Some(core) = registry::gate(request.map)
        .and_then(registry::enter)
        .filter(|c| std::ptr::eq(&*c.pool, pool))
    else {
        return;
    };
    let stride = core.streams.stride(request.stream);
    let (mut at, mut left) = (request.unit, request.units);
    let mut trip = request.trip;
    while left > 0 && at < core.data_units() && !core.closing.load(Ordering::Relaxed) {
        let most = if stride == 1 { left } else { 1 };
        let done = with_pieces(&core, |fetch| {
            if !std::mem::take(&mut trip) {
                return fill::prefetch(&core, at, most, fetch);
            }
            match trip_slot(&core, at) {
                Some(slot) => fill::prefetch_trip(&core, at, most, slot, fetch),
                // It stays absent: who stumbles over it reads it.
                None => Ok(1),
            }
        });
        let Ok(done) = done else {
            core.counters.add(Count::PrefetchDropped, 1);
            return;
        };
        left = left.saturating_sub(done);
        at = at.wrapping_add_signed(if stride == 1 { done as i64 } else { stride });
    }
}

/// A slot for a trip, if units of the map fit one.
fn trip_slot(core: &MapCore, unit: u64) -> Option<u32> {
    if core.unit_bytes() != PAGE as u64 {
        return None;
    }
    let owner = Owner {
        map: core.id,
        serial: core.serial,
        unit,
    };
    core.pool.trips.take(owner, |slot, from| {
        // A reader that went elsewhere left it behind; or its map is gone, and all who could read the slot.
        let Some(owner) = registry::gate(from.map)
            .and_then(registry::enter)
            .filter(|c| c.serial == from.serial)
        else {
            return !registry::may_be_in_use(from.map, from.serial);
        };
        if owner.keep_all.load(Ordering::SeqCst) || !owner.page(from.unit).drop_cool(slot, 0) {
            return false;
        }
        owner.counters.add(Count::Evictions, 1);
        if owner.table.leave(from.unit) {
            collect_group(&owner, from.unit);
        }
        true
    })
}

fn prefetch(job: &Prefetch) {
    let &Prefetch {
        id,
        serial,
        unit,
        count,
    } = job;
    let Some(core) = registry::gate(id)
        .and_then(registry::enter)
        .filter(|c| c.serial == serial)
    else {
        return;
    };
    let end = (unit + count).min(core.data_units());
    let mut at = unit;
    while at < end {
        if core.closing.load(Ordering::Relaxed) {
            return;
        }
        let done = with_pieces(&core, |fetch| fill::prefetch(&core, at, end - at, fetch));
        match done {
            Ok(n) => at += n,
            Err(_) => {
                core.counters.add(Count::PrefetchDropped, 1);
                return;
            }
        }
    }
}

/// Largest piece of a source that is read at once, unless its blocks are larger.
const PIECE: u64 = 256 * 1024;

/// Whole blocks of a source, charged to the budget while they are held.
struct Blocks<'a> {
    core: &'a MapCore,
    bytes: Vec<u8>,
    charged: u64,
}

impl Blocks<'_> {
    fn resize(&mut self, len: usize) {
        self.bytes.resize(len, 0);
        let now = self.bytes.capacity() as u64;
        if now > self.charged {
            self.core.pool.budget.charge_anyway(now - self.charged);
            self.charged = now;
        }
    }
}

impl Drop for Blocks<'_> {
    fn drop(&mut self) {
        self.core.pool.budget.release(self.charged);
    }
}

/// Fetches pieces of a user's source, whole blocks at a time. For ordinary contexts only.
pub(crate) fn source_pieces<'a>(
    core: &'a MapCore,
    source: &'a dyn Source,
    align: u64,
) -> impl FnMut(u64, u64, Option<usize>) -> Result<Piece, Fault> + 'a {
    let mut blocks = Blocks {
        core,
        bytes: Vec::new(),
        charged: 0,
    };
    move |at, end, keep| {
        // Pieces begin at multiples of the alignment, since units do.
        let want = (end - at).min(PIECE.max(align));
        blocks.resize(want.next_multiple_of(align) as usize);
        let bytes = &mut blocks.bytes;
        let got = source::read_full(source, align as usize, bytes, core.base + at)
            .map_err(|e| e.raw_os_error().map_or(Fault::Source, Fault::Read))?;
        fill::install_piece(
            core,
            at,
            bytes.as_mut_ptr() as usize,
            got,
            want as usize,
            keep,
        )
    }
}

/// Runs `f` with what fetches pieces of a map, whatever it is made of. For ordinary contexts only.
pub(crate) fn with_pieces<R>(core: &MapCore, f: impl FnOnce(fill::Fetch<'_>) -> R) -> R {
    match &core.reading {
        Reading::File { fd, .. } => {
            f(&mut |at, end, keep| fill::file_piece(core, fd, at, end, keep))
        }
        Reading::Source { source, align } => f(&mut source_pieces(core, &**source, *align)),
    }
}

/// A fill thread's life: serves requests of faulting threads.
fn fill_for(pool: &PoolCore, number: usize) {
    crate::keeper::block_signals();
    pool.fillers[number].store(raw::gettid(), Ordering::Release);
    while !pool.stopping.load(Ordering::Acquire) {
        let Some(at) = pool.handover.pop() else {
            pool.fill_bell.sleep(1_000_000_000, || {
                !pool.stopping.load(Ordering::Acquire) && pool.handover.is_empty()
            });
            continue;
        };
        let request = at as *const Handed;
        // SAFETY: the faulting thread keeps its request, and is inside the map's gate, until it is answered.
        let (core, run): (&MapCore, &fill::Run) = unsafe { (&*(*request).core, &(*request).run) };
        let need = Need::Load(core.unit_addr(run.first));
        let result = with_pieces(core, |fetch| fill::fill(core, run, need, None, fetch));
        // SAFETY: popped from the queue, so nobody else answers it.
        unsafe { fill::answer(request, result) };
    }
}
