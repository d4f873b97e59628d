//! The pool's own threads for what neither a signal handler nor a caller should do: reading users' sources for faulting
//! threads, prefetches, and saving a map whose lease is being broken.

#![allow(
    unsafe_code,
    reason = "answers requests that lie on faulting threads' stacks"
)]

use crate::fault::core::{MapCore, PoolCore, Reading};
use crate::fault::counters::Count;
use crate::fault::fill::{self, Need, Request};
use crate::fault::registry;
use crate::fault::report::Fault;
use crate::lease::{self, OnBreak};
use crate::source::{self, Source};
use std::collections::VecDeque;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Threads that prefetch: enough to keep a solid-state disk's queue filled.
const PREFETCHERS: usize = 8;
/// Parts of prefetches that may wait; more are dropped, as advice may be.
const JOBS_MAX: usize = 8192;
/// Bytes of one part of a prefetch.
pub(crate) const PART: u64 = 256 * 1024;

/// Something for a worker to do.
pub(crate) enum Job {
    /// Fill units of the map with gate `id` that starts at `start`.
    Prefetch {
        id: u32,
        start: usize,
        unit: u64,
        count: u64,
    },
    /// The lease of that map is being broken.
    LeaseBreak {
        id: u32,
        start: usize,
        what: OnBreak,
    },
}

#[derive(Default)]
struct Jobs {
    queue: VecDeque<Job>,
    stopping: bool,
}

/// Worker threads and their queue. Threads start when they are first needed.
#[derive(Default)]
pub(crate) struct Workers {
    jobs: Mutex<Jobs>,
    wake: Condvar,
    threads: Mutex<Threads>,
}

#[derive(Default)]
struct Threads {
    handles: Vec<JoinHandle<()>>,
    workers: usize,
    fillers: bool,
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Workers {
    /// Makes sure that `count` workers run (at most [`PREFETCHERS`]).
    pub(crate) fn ensure(self: &Arc<Self>, count: usize) -> io::Result<()> {
        let mut threads = lock(&self.threads);
        while threads.workers < count.min(PREFETCHERS) {
            let me = self.clone();
            let handle = std::thread::Builder::new()
                .name("faultless-work".into())
                .spawn(move || me.work())?;
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
        if !std::mem::replace(&mut threads.fillers, true) {
            for _ in 0..count {
                let pool = pool.clone();
                let handle = std::thread::Builder::new()
                    .name("faultless-fill".into())
                    .spawn(move || fill_for(&pool))?;
                threads.handles.push(handle);
            }
        }
        Ok(())
    }

    pub(crate) fn all(self: &Arc<Self>) -> io::Result<()> {
        self.ensure(PREFETCHERS)
    }

    /// Queues a job. `false` if the queue is full.
    pub(crate) fn push(&self, job: Job) -> bool {
        let mut jobs = lock(&self.jobs);
        match job {
            Job::Prefetch { .. } if jobs.queue.len() >= JOBS_MAX => return false,
            Job::Prefetch { .. } => jobs.queue.push_back(job),
            Job::LeaseBreak { .. } => jobs.queue.push_front(job),
        }
        drop(jobs);
        self.wake.notify_one();
        true
    }

    fn work(&self) {
        crate::keeper::block_signals();
        loop {
            let mut jobs = lock(&self.jobs);
            let job = loop {
                if jobs.stopping {
                    return;
                }
                if let Some(job) = jobs.queue.pop_front() {
                    break job;
                }
                jobs = self.wake.wait(jobs).unwrap_or_else(PoisonError::into_inner);
            };
            drop(jobs);
            match job {
                Job::Prefetch {
                    id,
                    start,
                    unit,
                    count,
                } => prefetch(id, start, unit, count),
                Job::LeaseBreak { id, start, what } => lease::broken(id, start, what),
            }
        }
    }

    /// Stops all threads and waits for them.
    pub(crate) fn stop(&self, pool: &PoolCore) {
        lock(&self.jobs).stopping = true;
        self.wake.notify_all();
        pool.stopping.store(true, Ordering::Release);
        pool.fill_bell.ring_all();
        let handles = std::mem::take(&mut lock(&self.threads).handles);
        let me = std::thread::current().id();
        for h in handles.into_iter().filter(|h| h.thread().id() != me) {
            let _ = h.join();
        }
    }
}

fn prefetch(id: u32, start: usize, unit: u64, count: u64) {
    let Some(core) = registry::gate(id)
        .and_then(|g| g.enter())
        .filter(|c| c.start == start)
    else {
        return;
    };
    let end = (unit + count).min(core.data_units());
    let mut at = unit;
    while at < end {
        let done = match &core.reading {
            Reading::File { fd, .. } => {
                fill::prefetch(&core, at, end - at, &mut fill::file_reader(&core, fd))
            }
            Reading::Source(s) => fill::prefetch(&core, at, end - at, &mut reader(&**s)),
        };
        match done {
            Ok(n) => at += n,
            Err(_) => {
                core.counters.add(Count::PrefetchDropped, 1);
                return;
            }
        }
    }
}

/// Reads a user's source into raw staging memory. For ordinary contexts only.
///
/// Staging buffers come in the sizes that are free, and the last unit is cut off at the end of the data: what the
/// source's alignment does not allow to be read in place is read aside, whole blocks at a time.
pub(crate) fn reader(
    source: &dyn Source,
) -> impl FnMut(usize, usize, u64) -> Result<usize, Fault> + '_ {
    let fault = |e: io::Error| e.raw_os_error().map_or(Fault::Source, Fault::Read);
    move |buf, len, offset| {
        // SAFETY: the fill path passes a staging buffer that is on loan to this thread, of at least `len` bytes.
        let buf = unsafe { std::slice::from_raw_parts_mut(buf as *mut u8, len) };
        let align = source.alignment().max(1) as u64;
        let (from, to) = (
            offset - offset % align,
            (offset + len as u64).next_multiple_of(align),
        );
        if (from, to) == (offset, offset + len as u64) {
            return source::read_full(source, buf, offset).map_err(fault);
        }
        let mut blocks = vec![0u8; (to - from) as usize];
        let got = source::read_full(source, &mut blocks, from).map_err(fault)?;
        let part = &blocks[((offset - from) as usize).min(got)..got];
        let n = part.len().min(len);
        buf[..n].copy_from_slice(&part[..n]);
        Ok(n)
    }
}

/// A fill thread's life: serves requests of faulting threads.
fn fill_for(pool: &PoolCore) {
    crate::keeper::block_signals();
    while !pool.stopping.load(Ordering::Acquire) {
        let Some(at) = pool.handover.pop() else {
            pool.fill_bell.sleep(1_000_000_000, || {
                !pool.stopping.load(Ordering::Acquire) && pool.handover.is_empty()
            });
            continue;
        };
        let request = at as *const Request;
        // SAFETY: the faulting thread keeps its request, and is inside the map's gate, until it is answered.
        let (core, run): (&MapCore, &fill::Run) = unsafe { (&*(*request).core, &(*request).run) };
        let result = match &core.reading {
            Reading::Source(s) => fill::fill(
                core,
                run,
                Need::Load(core.unit_addr(run.first)),
                &mut reader(&**s),
            ),
            Reading::File { fd, .. } => fill::fill(
                core,
                run,
                Need::Load(core.unit_addr(run.first)),
                &mut fill::file_reader(core, fd),
            ),
        };
        // SAFETY: popped from the queue, so nobody else answers it.
        unsafe { fill::answer(request, result) };
    }
}
