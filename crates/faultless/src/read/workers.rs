//! The pool's own threads for what neither a signal handler nor a caller should do: reading users' sources for faulting
//! threads, prefetches, and saving a map whose lease is being broken.

#![allow(
    unsafe_code,
    reason = "answers requests that lie on faulting threads' stacks"
)]

use crate::base::ids::{Nanos, Unit};
use crate::base::primitive::{Mutex, Ordering, lock};
use crate::base::thread;
use crate::base::thread::{Thread, block_signals};
use crate::read::fill_threads::fill_for;
use crate::read::prefetch;
use crate::read::prefetch::read_ahead;
use crate::read::prefetch::{PART, Prefetch};
use crate::read::progress::{Progress, Wakers};
use crate::read::requests::{Host, Requests};
use crate::read::rings::Rings;
use crate::space::counters::Count;
use crate::space::map_core::MapCore;
use crate::space::pool_core::PoolCore;
use crate::space::streams::Request;
use crate::sync::staging::CHUNK_MAX;
use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Threads that prefetch: enough to keep a solid-state disk's queue filled.
const PREFETCHERS: usize = 8;
/// Parts of prefetches that may wait; more are dropped, as advice may be.
const JOBS_MAX: usize = 8192;

/// Parts of prefetches that one thread reads together.
const TOGETHER: usize = 64;

/// How long a worker sleeps before it looks by itself.
const IDLE: Nanos = Nanos::from_secs(1);

/// Something that a worker does.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Jobs {
    prefetches: VecDeque<Prefetch>,
    saves: VecDeque<Job>,
    stopping: bool,
}

impl Jobs {
    /// Takes some prefetches of one map, as many as that at most.
    fn take(&mut self, most: usize) -> Vec<Prefetch> {
        let map = self.prefetches.front().map(|job| job.serial);
        let (mut some, mut others) = (Vec::new(), VecDeque::new());
        let looked_at = self.prefetches.len().min(most * 8);
        for job in self.prefetches.drain(..looked_at) {
            match some.len() < most && Some(job.serial) == map {
                true => some.push(job),
                false => others.push_back(job),
            }
        }
        let others = others.into_iter().rev();
        others.for_each(|job| self.prefetches.push_front(job));
        some
    }
}

/// Worker threads and their queue. Threads start when they are first needed. They are woken by the pool's `work_bell`,
/// which a signal handler can ring as well.
#[derive(Default)]
pub(crate) struct Workers {
    pub(crate) rings: Rings,
    pub(crate) requests: Requests,
    /// For tasks that wait for prefetches.
    pub(crate) wakers: Arc<Wakers>,
    jobs: Mutex<Jobs>,
    threads: Mutex<Threads>,
}

#[derive(Default)]
struct Threads {
    handles: Vec<Thread>,
    workers: usize,
    fillers: usize,
}

impl Host for Workers {
    fn requests(&self) -> &Requests {
        &self.requests
    }

    fn rings(&self) -> &Rings {
        &self.rings
    }
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
                    me.save_maps(&pool)
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
            let pool = pool.clone();
            let handle = thread::spawn(c"faultless-fill", move || fill_for(&pool))?;
            threads.handles.push(handle);
            threads.fillers += 1;
        }
        Ok(())
    }

    pub(crate) fn all(self: &Arc<Self>, pool: &Arc<PoolCore>) -> io::Result<()> {
        self.ensure(pool, 1 + PREFETCHERS)
    }

    /// Queues the units of a range to be read soon, in parts. Parts for which the queue has no room are dropped and counted.
    pub(crate) fn queue(
        self: &Arc<Self>,
        core: &MapCore,
        units: Range<Unit>,
        progress: &Arc<Progress>,
    ) -> io::Result<()> {
        self.all(&core.pool)?;
        let end = units.end.min(core.units_end());
        let step = (PART >> core.unit_shift).max(1);
        let mut unit = units.start;
        // It is not over before all is queued.
        let mut rest = progress.part((end.max(unit) - unit) << core.unit_shift);
        while unit < end {
            let count = step.min(end - unit);
            let job = Prefetch {
                id: core.id,
                serial: core.serial,
                unit,
                count,
                alone: core.is_source() || core.unit_bytes() > CHUNK_MAX as u64,
                part: progress.part(count << core.unit_shift),
            };
            rest.leave(count << core.unit_shift);
            if !self.push(&core.pool, job) {
                let dropped = (end - unit).div_ceil(step);
                core.counters.add(Count::PrefetchDropped, dropped);
                break;
            }
            unit += count;
        }
        Ok(())
    }

    /// Queues a prefetch. `false` if the queue is full.
    fn push(&self, pool: &PoolCore, job: Prefetch) -> bool {
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
    pub(crate) fn save(&self, pool: &PoolCore, job: Job) {
        lock(&self.jobs).saves.push_back(job);
        pool.save_bell.ring();
    }

    /// The life of the worker that saves maps.
    fn save_maps(&self, pool: &PoolCore) {
        block_signals();
        loop {
            let mut jobs = lock(&self.jobs);
            if jobs.stopping {
                return;
            }
            let job = jobs.saves.pop_front();
            drop(jobs);
            match job {
                Some(job) => job(),
                None => pool.save_bell.sleep(IDLE, || {
                    let jobs = lock(&self.jobs);
                    jobs.saves.is_empty() && !jobs.stopping
                }),
            }
        }
    }

    fn work(&self, pool: &PoolCore) {
        block_signals();
        pool.will_read_sources();
        loop {
            // In turns: neither kind of work keeps the other waiting.
            let ahead = pool.ahead.pop().map(Request::unpack);
            if let Some(request) = ahead {
                // (Requests behind one that was not published yet have rung in vain.)
                if !pool.ahead.is_empty() {
                    pool.work_bell.ring();
                }
                read_ahead(pool, request);
            }
            let mut jobs = lock(&self.jobs);
            if jobs.stopping {
                return;
            }
            // (Users' sources, and units larger than buffers, are read by several threads.)
            let together = match jobs.prefetches.front() {
                Some(first) if !first.alone && self.rings.are_lent() => TOGETHER,
                _ => 1,
            };
            let mut some = jobs.take(together);
            drop(jobs);
            match &mut some[..] {
                [job] => prefetch::run(job),
                jobs @ [_, ..] => prefetch::run_together(&self.rings, jobs),
                [] if ahead.is_none() => pool.work_bell.sleep(IDLE, || {
                    let jobs = lock(&self.jobs);
                    pool.ahead.is_empty() && jobs.prefetches.is_empty() && !jobs.stopping
                }),
                [] => {}
            }
        }
    }

    /// Stops all threads and waits for them.
    pub(crate) fn stop(&self, pool: &PoolCore) {
        lock(&self.jobs).stopping = true;
        self.requests.stop();
        pool.work_bell.ring_all();
        pool.save_bell.ring_all();
        pool.stopping.store(true, Ordering::Release);
        pool.fill_bell.ring_all();
        let handles = std::mem::take(&mut lock(&self.threads).handles);
        for h in handles.into_iter().filter(|h| !h.is_this()) {
            h.join();
        }
        // (Threads and tasks may wait for these.)
        let left = std::mem::take(&mut lock(&self.jobs).prefetches);
        drop(left);
    }
}
