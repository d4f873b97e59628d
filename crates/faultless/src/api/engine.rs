//! The running engine of a pool.

use crate::api::backend::Backend;
use crate::api::promise::Promise;
use crate::base::descriptor::Owned;
use crate::base::error::Error;
use crate::base::event::{Event, Hook};
use crate::base::padded::Padded;
use crate::base::primitive::{AtomicBool, AtomicU32, AtomicU64, Mutex, OnceLock, Ordering, lock};
use crate::base::size::ByteSize;
use crate::base::thread::{self, Thread};
use crate::base::{memory, process};
use crate::coherence::keeper;
use crate::evict::evictor::Evictor;
use crate::evict::limits::{look_at_limits, reserve_of};
use crate::evict::policy::ghost_reach;
use crate::fault::refusal::Refusal;
use crate::read::workers::Workers;
use crate::space::last_looks::LastLooks;
use crate::space::pool_core::{PoolCore, SOURCE_READERS_MAX};
use crate::space::trips::Trips;
use crate::sync::arrivals::Arrivals;
use crate::sync::bell::Bell;
use crate::sync::blocks::Blocks;
use crate::sync::budget::Budget;
use crate::sync::handover::Handover;
use crate::sync::outbox::{Outbox, Tell};
use crate::sync::staging::{CHUNK_MAX, Staging};
use crate::sync::withheld::Withheld;
use faultless_sys::mem;
use std::sync::Arc;

/// Most slots of the ring of filled units: 4 GiB of new 4 KiB pages while the evictor is held up.
const RING_MAX: u64 = 1 << 20;
/// Most memory for staging buffers.
const STAGING_MAX: u64 = 64 << 20;

/// The running engine of one pool.
pub(crate) struct Engine {
    pub(crate) core: Arc<PoolCore>,
    evictor: Option<Thread>,
}

/// Makes events of what failed.
fn teller(hook: Hook, budget: ByteSize) -> Tell {
    Box::new(move |failed| {
        let why = Refusal::decode(failed.why);
        let error = why.into_error(&failed.name, failed.offset.get(), budget);
        (hook.0)(&Event::LoadFailed(error));
    })
}

impl Engine {
    pub(crate) fn start(
        uffd: Owned,
        budget: ByteSize,
        guest: bool,
        hook: Option<&Hook>,
    ) -> Result<Self, Error> {
        let core = core_of(uffd, budget, guest, hook)?;
        look_at_limits(&core, &memory::look(), 0);
        let evict = {
            let core = core.clone();
            move || Evictor::new(core, keeper::spawn_later).run()
        };
        let evictor = keeper::spawn(c"faultless-evict", evict)
            .map_err(|e| Error::kernel("cannot start the evictor thread", e))?;
        let engine = Engine {
            core,
            evictor: Some(evictor),
        };
        if engine.core.outbox.is_some() {
            let core = engine.core.clone();
            let run = move || {
                core.outbox.iter().for_each(Outbox::run);
                let_go(core);
            };
            if let Err(e) = thread::spawn(c"faultless-tell", run) {
                engine.stop();
                return Err(Error::kernel(
                    "cannot start the thread that tells events",
                    e,
                ));
            }
        }
        Ok(engine)
    }
}

/// What the fault path knows of a pool, before there is any thread.
fn core_of(
    uffd: Owned,
    budget: ByteSize,
    guest: bool,
    hook: Option<&Hook>,
) -> Result<Arc<PoolCore>, Error> {
    let memory = |e| Error::kernel("cannot reserve memory for the pool", e);
    let limit = budget.get();
    let entries = (limit / mem::PAGE as u64).min(RING_MAX);
    let filled = Arrivals::new(entries, process::possible_processors()).map_err(memory)?;
    let staging_max = if guest {
        (memory::look().limit / 256).min(STAGING_MAX)
    } else {
        STAGING_MAX
    };
    let staging = (limit / 16).min(staging_max).max(CHUNK_MAX as u64);
    let staging = Staging::new(staging as usize).map_err(memory)?;
    let trips = Trips::new(limit).map_err(memory)?;
    let uffd =
        keeper::adopt(uffd, None).map_err(|e| Error::kernel("cannot share the userfaultfd", e))?;
    keeper::watch(&uffd).map_err(|e| Error::kernel("cannot watch the userfaultfd", e))?;
    let core = PoolCore {
        budget: Budget::new(limit),
        uffd,
        staging,
        huge: OnceLock::new(),
        blocks: Blocks::default(),
        filled,
        handover: Handover::new(),
        fill_bell: Bell::default(),
        ahead: Handover::new(),
        work_bell: Bell::default(),
        save_bell: Bell::default(),
        trips,
        evict_bell: Bell::default(),
        clock: Padded(AtomicU32::new(1)),
        evicted: Padded::default(),
        taken_back: Padded::default(),
        largest_unit: AtomicU64::new(0),
        cooling: OnceLock::new(),
        firm: Padded::default(),
        firm_max: AtomicU64::new(u64::MAX),
        guest,
        reserve: AtomicU64::new(reserve_of(limit)),
        ghost_reach: AtomicU64::new(ghost_reach(limit / mem::PAGE as u64)),
        wanted: Padded::default(),
        source_readers: AtomicU32::new(0),
        source_reader: [const { AtomicU32::new(0) }; SOURCE_READERS_MAX],
        last_looks: LastLooks::new(),
        withheld: Withheld::default(),
        stopping: AtomicBool::new(false),
        outbox: hook.map(|hook| Outbox::new(teller(hook.clone(), budget))),
        past: Mutex::default(),
    };
    core.budget.charge_anyway(core.fixed_bytes());
    Ok(Arc::new(core))
}

impl Engine {
    /// Ends the threads that every pool has, and lets its userfaultfd go.
    fn stop(mut self) {
        self.core.stopping.store(true, Ordering::Release);
        self.core.evict_bell.ring_all();
        if let Some(evictor) = self.evictor.take() {
            evictor.join();
        }
        // The thread that tells events ends by itself: the program's code, which it may be in, may wait for this thread.
        self.core.outbox.iter().for_each(Outbox::stop);
        let_go(self.core);
    }
}

/// The last thread that has the core lets its userfaultfd go.
pub(crate) fn let_go(core: Arc<PoolCore>) {
    if let Some(core) = Arc::into_inner(core) {
        #[cfg(faultless_sim)]
        core.check_settled();
        keeper::unwatch(core.uffd);
    }
}

/// What a pool and its maps hold together.
pub(crate) struct Shared {
    pub(crate) engine: Option<Engine>,
    pub(crate) backend: Backend,
    pub(crate) workers: Arc<Workers>,
    pub(crate) fill_threads: usize,
    /// What the copies of maps are charged to on the mmap backend.
    pub(crate) copies: Arc<Budget>,
    pub(crate) promise: Mutex<Promise>,
    pub(crate) pid: u32,
}

impl Shared {
    pub(crate) fn budget(&self) -> ByteSize {
        ByteSize::new(lock(&self.promise).0)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let foreign = process::forked() || process::pid() != self.pid;
        let Some(engine) = self.engine.take() else {
            return;
        };
        if foreign {
            // A forked child: the threads are not here, and the descriptors are its parent's affair.
            std::mem::forget(engine);
            std::mem::forget(std::mem::take(&mut self.workers));
            return;
        }
        self.workers.stop(&engine.core);
        engine.stop();
    }
}

#[cfg(all(test, not(any(loom, faultless_sim))))]
mod tests {
    use super::*;
    use crate::api::backend::{BackendChoice, open_uffd};
    use crate::base::clock;
    use crate::base::ids::Nanos;
    use crate::fault::charge::{Wish, wait_for_room};

    /// Nothing can leave, and a thread waits for more than the evictor keeps free: the cap is raised until that fits.
    #[test]
    fn the_evictor_makes_room_for_what_a_thread_waits_for() {
        keeper::start().expect("the keeper");
        let uffd = open_uffd(BackendChoice::default()).expect("a userfaultfd");
        let core = core_of(uffd, ByteSize::new(64 << 20), false, None).expect("a pool");
        let mut evictor = Evictor::new(core.clone(), keeper::spawn_later);
        let (budget, cap) = (&core.budget, 16 << 20);
        budget.set_cap(cap);
        let reserve = core.reserve.load(Ordering::Relaxed);
        budget.charge_anyway(cap - budget.used() - reserve);
        let wish = Wish {
            bytes: 2 * reserve,
            pages: false,
            look: Nanos::from_millis(10),
        };
        let (passed, given_up) = (AtomicBool::new(false), AtomicBool::new(false));
        let refuse = |_| {
            let given_up = given_up.load(Ordering::Relaxed);
            given_up.then_some(Err(Refusal::Budget))
        };
        let got_in = std::thread::scope(|s| {
            let waits = s.spawn(|| {
                let answer = wait_for_room(&core, wish, refuse);
                passed.store(true, Ordering::Release);
                answer
            });
            for _ in 0..10_000 {
                evictor.pass();
                clock::nap(Nanos::from_millis(2));
                if passed.load(Ordering::Acquire) {
                    break;
                }
            }
            given_up.store(true, Ordering::Relaxed);
            waits.join().expect("it does not panic")
        });
        assert!(got_in.is_ok(), "waited in vain: cap {}", budget.cap());
        assert!(budget.cap() >= cap + reserve);
        evictor.end();
        let_go(core);
    }
}
