//! How a pool is made.

use crate::api::backend::{Backend, BackendChoice, open_uffd, rate, report_once};
use crate::api::engine::{Engine, Shared};
use crate::api::pool::Pool;
use crate::api::promise::{MEMORY_MIN, Promise, check_budget};
use crate::base::error::Error;
use crate::base::event::{Event, Hook};
use crate::base::memory;
use crate::base::primitive::Mutex;
use crate::base::size::ByteSize;
use crate::coherence::{fork, keeper};
use crate::fault::chain::NotInstalled;
use crate::fault::handler;
use crate::read::workers::Workers;
use crate::space::fds;
use crate::space::pool_core::FILLERS_MAX;
use crate::sync::budget::Budget;
use faultless_sys::raw;
use std::sync::Arc;

/// Share of the available memory that a pool takes if it is not told otherwise, in percent.
const DEFAULT_SHARE_PERCENT: u64 = 50;
/// Threads that read users' sources, if not told otherwise.
const FILL_THREADS: usize = 16;

/// How a pool is made. See [`Pool::builder`].
#[derive(Debug, Clone, Default)]
pub struct PoolBuilder {
    memory: Option<ByteSize>,
    fill_threads: Option<usize>,
    backend: BackendChoice,
    full: bool,
    hook: Option<Hook>,
    guest: bool,
    no_rings: bool,
}

impl PoolBuilder {
    /// The budget: the most that frames, staging buffers and page states of all maps in the pool may take together.
    /// Without it, half of what the machine, or the control group, has available when the pool is built.
    ///
    /// A budget larger than the control group's limit is allowed, and the limit may change: the pool uses what the group has left beside
    /// the program's own memory, if that is less than the budget.
    pub fn memory(mut self, budget: ByteSize) -> Self {
        self.memory = Some(budget);
        self
    }

    /// Threads that read users' sources for faulting threads; 16 by default. They start with the first such map.
    pub fn fill_threads(mut self, threads: usize) -> Self {
        self.fill_threads = Some(threads);
        self
    }

    /// Which backend to use. The environment variable `FAULTLESS_BACKEND=mmap` does the same for a whole process.
    pub fn backend(mut self, choice: BackendChoice) -> Self {
        self.backend = choice;
        self
    }

    /// Makes [`build`](Self::build) fail where the backend would be less than [`Backend::Full`]: for programs that would rather
    /// not run than run with maps that are copies, or whose misses take `mmap_lock`.
    pub fn require_full(mut self) -> Self {
        self.full = true;
        self
    }

    /// Tells `hook` what is otherwise written to stderr: that the backend is not [`Backend::Full`], and which plain load failed
    /// before its thread gets SIGBUS.
    ///
    /// A thread of the pool calls `hook` with loads that failed, so `hook` may allocate, log and take locks. The thread whose load
    /// failed waits for it, for a second at most: then, or if more than eight loads fail concurrently, it writes its line to
    /// stderr as well and gets its SIGBUS. So `hook` should not need a lock that a thread holds while it loads. On
    /// [`Backend::Mmap`] the kernel serves the loads, and tells nobody.
    ///
    /// ```
    /// # fn main() -> Result<(), faultless::Error> {
    /// let pool = faultless::Pool::builder()
    ///     .on_event(|event| eprintln!("my program: {event}"))
    ///     .build()?;
    /// # Ok(()) }
    /// ```
    pub fn on_event(mut self, hook: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        self.hook = Some(Hook(Arc::new(hook)));
        self
    }

    /// Whether batches may be read by io_uring (default: where the kernel permits it). Switch it off in a process whose system-call
    /// filter ends it for a call of `io_uring_setup`.
    pub fn io_uring(mut self, permitted: bool) -> Self {
        self.no_rings = !permitted;
        self
    }

    /// The pool is in a process that does not know of it, and whose memory it must not be in the way of.
    #[doc(hidden)]
    pub fn guest(mut self) -> Self {
        self.guest = true;
        self
    }

    /// Makes the pool. The first pool of a process installs the SIGBUS handler (others' faults are passed on to the
    /// handler that was there before).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] for a budget that is zero, too small, or, with those of the process's other pools,
    /// larger than physical memory; [`Error::NotFull`] after [`require_full`](Self::require_full); [`Error::HandlerReplaced`];
    /// [`Error::Kernel`] if threads or memory are refused.
    pub fn build(self) -> Result<Pool, Error> {
        let budget = self.budget()?;
        let fill_threads = self.fill_threads.unwrap_or(FILL_THREADS);
        if !(1..=FILLERS_MAX).contains(&fill_threads) {
            return Err(Error::InvalidOption {
                what: "the number of fill threads",
                value: fill_threads.to_string(),
                remedy: "choose 1 to 1024",
            });
        }
        // (A preloaded library is never unloaded.)
        #[cfg(not(faultless_sim))]
        if !self.guest {
            crate::base::stay::stay_loaded();
        }
        let unprotected =
            keeper::start().map_err(|e| Error::kernel("cannot start the keeper thread", e))?;
        fork::watch();
        let promise = Promise::new(budget)?;
        let _until_it_is_noted = fds::arriving();
        let (backend, uffd) = match open_uffd(self.backend) {
            Ok(fd) => (rate(unprotected), Some(fd)),
            Err(why) => (Backend::Mmap(why), None),
        };
        if self.full && backend != Backend::Full {
            return Err(Error::NotFull(backend.to_string()));
        }
        match &self.hook {
            Some(hook) if backend != Backend::Full => {
                (hook.0)(&Event::Degraded(backend.to_string()))
            }
            Some(_) => {}
            None => report_once(&backend),
        }
        let engine = match uffd {
            None => None,
            Some(fd) => {
                install_handler()?;
                Some(Engine::start(fd, budget, self.guest, self.hook.as_ref())?)
            }
        };
        let workers = Arc::<Workers>::default();
        if self.guest || self.no_rings {
            // (A ring has a descriptor, which a program that knows of no pool might close, or take for its own.)
            workers.rings.refuse("it is switched off".to_owned());
        }
        Ok(Pool(Arc::new(Shared {
            engine,
            backend,
            workers,
            fill_threads,
            copies: Arc::new(Budget::new(budget.get())),
            promise: Mutex::new(promise),
            pid: raw::getpid(),
        })))
    }

    fn budget(&self) -> Result<ByteSize, Error> {
        let memory = memory::look();
        let budget = self.memory.unwrap_or_else(|| share_of(&memory));
        check_budget(budget, memory.machine)?;
        Ok(budget)
    }
}

fn share_of(memory: &memory::Memory) -> ByteSize {
    let share = memory.available / 100 * DEFAULT_SHARE_PERCENT;
    ByteSize::new(share.max(MEMORY_MIN.get()))
}

/// The budget of a pool that is not told one: half of what is available now.
pub fn default_budget() -> ByteSize {
    share_of(&memory::look())
}

/// The most memory that this process can have: the machine's, or its control group's.
pub fn memory_limit() -> ByteSize {
    ByteSize::new(memory::look().limit)
}

/// Installs the SIGBUS handler, or makes sure that it still is in place.
pub(crate) fn install_handler() -> Result<(), Error> {
    handler::SIGBUS.install().map_err(|e| match e {
        NotInstalled::Replaced(handler) => Error::HandlerReplaced { handler },
        NotInstalled::Refused(e) => Error::kernel("cannot install a SIGBUS handler", e),
    })
}

impl Pool {
    /// Starts to describe a pool.
    pub fn builder() -> PoolBuilder {
        PoolBuilder::default()
    }

    /// A pool with the default budget: half of the memory that is available now.
    ///
    /// # Errors
    ///
    /// As [`PoolBuilder::build`].
    pub fn new() -> Result<Pool, Error> {
        Self::builder().build()
    }
}
