//! A memory budget, and the threads and descriptors that the maps under it share.

use crate::bytes::Bytes;
use crate::error::Error;
use crate::evict::{self, Evictor};
use crate::fault::ahead::Trips;
use crate::fault::budget::Budget;
use crate::fault::core::{Bell, FILLERS_MAX, LastLooks, PoolCore};
use crate::fault::counters::Stats;
use crate::fault::handler;
use crate::fault::ring::{Handover, Ring};
use crate::fault::staging::{CHUNK_MAX, Staging};
use crate::fault::{fds, process};
use crate::map::Map;
use crate::memory;
use crate::options::MapOptions;
use crate::source::Source;
use crate::workers::Workers;
use crate::{fork, keeper};
use faultless_sys::{mem, raw, uffd};

use std::fmt;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Smallest budget: below it, staging buffers would be a large share.
const MEMORY_MIN: Bytes = Bytes::mib(1);
/// Share of the available memory that a pool takes if it is not told otherwise, in percent.
const DEFAULT_SHARE_PERCENT: u64 = 50;
/// Most slots of the ring of filled units: 4 GiB of new 4 KiB pages while the evictor is held up.
const RING_MAX: u64 = 1 << 20;
/// Most memory for staging buffers.
const STAGING_MAX: u64 = 64 << 20;
/// Threads that read users' sources, if not told otherwise.
const FILL_THREADS: usize = 16;

/// What serves the misses.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// The engine, with everything that it can do: misses never take `mmap_lock`.
    Full,
    /// The engine, short of something that this kernel lacks or refuses; the text says what.
    Partial(String),
    /// The kernel's mmap, because userfaultfd is not to be had; the text says why.
    Mmap(String),
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Backend::Full => f.write_str("full"),
            Backend::Partial(why) => write!(f, "partial ({why})"),
            Backend::Mmap(why) => write!(f, "mmap ({why})"),
        }
    }
}

/// Which backend a pool may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum BackendChoice {
    /// The best that this kernel allows.
    #[default]
    Best,
    /// The kernel's mmap, whatever the kernel allows: for comparison, and for tests.
    Mmap,
}

/// How a pool is made. See [`Pool::builder`].
#[derive(Debug, Clone, Default)]
pub struct PoolBuilder {
    memory: Option<Bytes>,
    fill_threads: Option<usize>,
    backend: BackendChoice,
    guest: bool,
}

impl PoolBuilder {
    /// The budget: the most that frames, staging buffers and page states of all maps in the pool may take together.
    /// Without it, half of what the machine, or the control group, has available when the pool is built.
    ///
    /// A budget larger than the control group's limit is allowed: the kernel takes cold pages back as it needs to.
    pub fn memory(mut self, budget: Bytes) -> Self {
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
    /// larger than physical memory; [`Error::HandlerReplaced`]; [`Error::Kernel`] if threads or memory are refused.
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
        let unprotected =
            keeper::start().map_err(|e| Error::kernel("cannot start the keeper thread", e))?;
        fork::watch();
        let promise = Promise::new(budget)?;
        let _until_it_is_noted = fds::arriving();
        let (backend, uffd) = match open_uffd(self.backend) {
            Ok(fd) => (rate(unprotected), Some(fd)),
            Err(why) => (Backend::Mmap(why), None),
        };
        report_once(&backend);
        let engine = match uffd {
            None => None,
            Some(fd) => {
                install_handler()?;
                Some(Engine::start(fd, budget, self.guest)?)
            }
        };
        Ok(Pool(Arc::new(Shared {
            engine,
            backend,
            workers: Arc::default(),
            fill_threads,
            promise: Mutex::new(promise),
            pid: raw::getpid(),
            past: Mutex::default(),
        })))
    }

    fn budget(&self) -> Result<Bytes, Error> {
        let memory = memory::look();
        let budget = self.memory.unwrap_or_else(|| share_of(&memory));
        check_budget(budget, memory.machine)?;
        Ok(budget)
    }
}

fn share_of(memory: &memory::Memory) -> Bytes {
    let share = memory.available / 100 * DEFAULT_SHARE_PERCENT;
    Bytes::new(share.max(MEMORY_MIN.get()))
}

/// The budget of a pool that is not told one: half of what is available now.
pub fn default_budget() -> Bytes {
    share_of(&memory::look())
}

/// Installs the SIGBUS handler, or makes sure that it still is in place.
pub(crate) fn install_handler() -> Result<(), Error> {
    handler::install().map_err(|e| match e {
        handler::NotInstalled::Replaced(handler) => Error::HandlerReplaced { handler },
        handler::NotInstalled::Refused(e) => Error::kernel("cannot install a SIGBUS handler", e),
    })
}

fn check_budget(budget: Bytes, machine: u64) -> Result<(), Error> {
    let wrong = |remedy| {
        Err(Error::InvalidOption {
            what: "the memory budget",
            value: budget.to_string(),
            remedy,
        })
    };
    if budget < MEMORY_MIN {
        return wrong("give it at least 1 MiB");
    }
    if budget.get() > machine {
        return wrong("it is more than the machine's physical memory; give it less");
    }
    Ok(())
}

/// A budget must have room for a few fill units: some in use while others make room.
pub(crate) fn check_units(budget: Bytes, unit: u64) -> Result<(), Error> {
    if unit > budget.get() / UNITS_MIN {
        return Err(Error::InvalidOption {
            what: "the memory budget",
            value: format!("{budget}, with a fill unit of {}", Bytes::new(unit)),
            remedy: "it must hold at least eight fill units; give it more, or choose a smaller unit",
        });
    }
    Ok(())
}

/// Fill units that a budget must have room for.
const UNITS_MIN: u64 = 8;

/// Budgets of all pools of the process, so that together they do not exceed physical memory.
static PROMISED: AtomicU64 = AtomicU64::new(0);

#[derive(Debug)]
struct Promise(u64);

impl Promise {
    fn new(budget: Bytes) -> Result<Self, Error> {
        let mut promise = Promise(0);
        promise.change(budget)?;
        Ok(promise)
    }

    fn change(&mut self, budget: Bytes) -> Result<(), Error> {
        let machine = memory::look().machine;
        PROMISED
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |p| {
                (p - self.0).checked_add(budget.get()).filter(|&sum| sum <= machine)
            })
            .map_err(|_| Error::InvalidOption {
                what: "the memory budget",
                value: budget.to_string(),
                remedy: "together with this process's other pools it exceeds physical memory; give them less, or share one pool",
            })?;
        self.0 = budget.get();
        Ok(())
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        PROMISED.fetch_sub(self.0, Ordering::AcqRel);
    }
}

/// Opens a userfaultfd in the mode that the engine needs, or says why not.
fn open_uffd(choice: BackendChoice) -> Result<OwnedFd, String> {
    if choice == BackendChoice::Mmap
        || (!raw::is_privileged()
            && std::env::var_os("FAULTLESS_BACKEND").is_some_and(|v| v == "mmap"))
    {
        return Err("it was asked for".to_owned());
    }
    if mem::kernel_page_size() != mem::PAGE {
        return Err(format!(
            "the kernel's pages have {} bytes, and the engine wants 4096",
            mem::kernel_page_size()
        ));
    }
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u32 | uffd::USER_MODE_ONLY;
    let fd = uffd::open(flags).map_err(|e| match e.0 {
        libc::ENOSYS => "the kernel has no userfaultfd, or a seccomp filter hides it".to_owned(),
        libc::EPERM => {
            "userfaultfd is forbidden here (a seccomp filter or a container's policy)".to_owned()
        }
        libc::EINVAL => {
            "the kernel's userfaultfd lacks UFFD_USER_MODE_ONLY (Linux 5.11)".to_owned()
        }
        _ => format!("userfaultfd failed: {e}"),
    })?;

    let fd = own(fd);
    use std::os::fd::AsRawFd;
    uffd::enable(
        fd.as_raw_fd(),
        uffd::FEATURE_SIGBUS | uffd::FEATURE_EVENT_REMAP | uffd::FEATURE_EVENT_UNMAP,
    )
    .map_err(|e| format!("userfaultfd lacks SIGBUS mode (Linux 4.14): {e}"))?;
    Ok(fd)
}

#[allow(
    unsafe_code,
    reason = "takes ownership of a descriptor that the kernel just made"
)]
pub(crate) fn own(fd: i32) -> OwnedFd {
    // SAFETY: callers pass a descriptor that a system call returned to them, and that nobody else knows.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// What this kernel lacks.
fn rate(unprotected: Option<&'static str>) -> Backend {
    let mut lacks = Vec::new();
    if let Some((major, minor)) = kernel_version() {
        if (major, minor) < (6, 6) {
            lacks.push(format!("Linux {major}.{minor} serves faults in armed mappings under mmap_lock; 6.6 does not"));
        }
        if (major, minor) < (6, 9) {
            lacks.push(format!(
                "Linux {major}.{minor} installs pages under mmap_lock; 6.9 does not"
            ));
        }
    }
    if !evict::batches_work() {
        lacks.push("process_madvise does not take MADV_DONTNEED for the own process, so eviction costs more".to_owned());
    }
    lacks.extend(unprotected.map(str::to_owned));
    if lacks.is_empty() {
        Backend::Full
    } else {
        Backend::Partial(lacks.join("; "))
    }
}

fn kernel_version() -> Option<(u32, u32)> {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let mut numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// One line on stderr for each process whose engine is not all that it could be.
fn report_once(backend: &Backend) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if *backend != Backend::Full && !SAID.swap(true, Ordering::Relaxed) {
        // (Standard error may be a broken pipe, which is no reason to panic.)
        faultless_sys::raw::write_stderr(format!("faultless: backend {backend}\n").as_bytes());
    }
}

/// The running engine of one pool.
pub(crate) struct Engine {
    pub(crate) core: Arc<PoolCore>,
    evictor: Option<crate::thread::Thread>,
}

impl Engine {
    fn start(uffd: OwnedFd, budget: Bytes, guest: bool) -> Result<Self, Error> {
        let memory = |e| Error::kernel("cannot reserve memory for the pool", e);
        let limit = budget.get();
        let ring = Ring::new((limit / mem::PAGE as u64).min(RING_MAX)).map_err(memory)?;
        let staging_max = if guest {
            (memory::look().limit / 256).min(STAGING_MAX)
        } else {
            STAGING_MAX
        };
        let staging = (limit / 16).min(staging_max).max(CHUNK_MAX as u64);
        let staging = Staging::new(staging as usize).map_err(memory)?;
        let uffd =
            keeper::adopt(uffd).map_err(|e| Error::kernel("cannot share the userfaultfd", e))?;
        keeper::watch(&uffd).map_err(|e| Error::kernel("cannot watch the userfaultfd", e))?;
        let core = Arc::new(PoolCore {
            budget: Budget::new(limit),
            uffd,
            staging,
            filled: ring,
            handover: Handover::new(),
            fill_bell: Bell::default(),
            ahead: Handover::new(),
            work_bell: Bell::default(),
            save_bell: Bell::default(),
            trips: Trips::new(limit).map_err(memory)?,
            evict_bell: Bell::default(),
            clock: AtomicU32::new(1),
            evicted: AtomicU32::new(0),
            cooling: std::sync::OnceLock::new(),
            fresh: AtomicU64::new(0),
            firm: AtomicU64::new(0),
            firm_max: AtomicU64::new(u64::MAX),
            guest,
            reserve: AtomicU64::new(evict::reserve_of(limit)),
            wanted: AtomicU64::new(0),
            fillers_started: AtomicU32::new(0),
            fillers: [const { AtomicU32::new(0) }; FILLERS_MAX],
            last_looks: LastLooks::new(),
            stopping: AtomicBool::new(false),
        });
        core.budget
            .charge_anyway(core.filled.bytes() + core.trips.bytes());
        evict::look_at_limits(&core);
        let evictor = {
            let core = core.clone();
            keeper::spawn(c"faultless-evict", move || Evictor::run(core))
                .map_err(|e| Error::kernel("cannot start the evictor thread", e))?
        };
        Ok(Engine {
            core,
            evictor: Some(evictor),
        })
    }
}

/// What a pool and its maps hold together.
pub(crate) struct Shared {
    pub(crate) engine: Option<Engine>,
    backend: Backend,
    pub(crate) workers: Arc<Workers>,
    pub(crate) fill_threads: usize,
    promise: Mutex<Promise>,
    pub(crate) pid: u32,
    /// Counters of maps that are gone.
    pub(crate) past: Mutex<Stats>,
}

impl Shared {
    pub(crate) fn budget(&self) -> Bytes {
        Bytes::new(
            self.promise
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .0,
        )
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let foreign = process::forked() || process::pid() != self.pid;
        let Some(mut engine) = self.engine.take() else {
            return;
        };
        if foreign {
            // A forked child: the threads are not here, and the descriptors are its parent's affair.
            std::mem::forget(engine);
            std::mem::forget(std::mem::take(&mut self.workers));
            return;
        }
        self.workers.stop(&engine.core);
        engine.core.evict_bell.ring_all();
        if let Some(e) = engine.evictor.take() {
            e.join();
        }
        if let Some(core) = Arc::into_inner(engine.core) {
            keeper::unwatch(core.uffd);
        }
    }
}

/// A memory budget shared by any number of maps. Cloning gives another handle to the same pool; the pool lives until
/// its last handle and its last map are gone.
///
/// ```
/// use faultless::{Bytes, Pool};
/// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
/// # file.set_len(1 << 20)?;
/// # let file = std::fs::File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)))?;
/// let pool = Pool::builder().memory(Bytes::mib(64)).build()?;
/// println!("misses are served by: {}", pool.backend());
/// # let map = unsafe { pool.map_trusted(file) }?;
/// # assert_eq!(map[4096], 0);
/// pool.resize(Bytes::mib(32))?;
/// assert!(pool.stats().used <= Bytes::mib(32));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Pool(pub(crate) Arc<Shared>);

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("budget", &self.budget())
            .field("backend", &self.0.backend)
            .finish_non_exhaustive()
    }
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

    /// What serves the misses of this pool.
    pub fn backend(&self) -> &Backend {
        &self.0.backend
    }

    /// The budget.
    pub fn budget(&self) -> Bytes {
        self.0.budget()
    }

    /// Changes the budget. A smaller one is reached by eviction, soon after; pages that are pinned stay.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] as for [`PoolBuilder::build`]; the budget is then unchanged.
    pub fn resize(&self, budget: Bytes) -> Result<(), Error> {
        check_budget(budget, memory::look().machine)?;
        if let Some(engine) = &self.0.engine {
            let mut largest = 0;
            crate::fault::registry::for_each(|core| {
                if Arc::ptr_eq(&core.pool, &engine.core) {
                    largest = largest.max(core.unit_bytes());
                }
            });
            check_units(budget, largest)?;
        }
        self.0
            .promise
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .change(budget)?;
        if let Some(engine) = &self.0.engine {
            let core = &engine.core;
            core.reserve
                .store(evict::reserve_of(budget.get()), Ordering::Relaxed);
            core.budget.set_limit(budget.get());
            core.evict_bell.ring();
        }
        Ok(())
    }

    /// Starts to describe a map: a part of a file, another fill unit, and so on.
    pub fn options(&self) -> MapOptions {
        MapOptions::new(self)
    }

    /// Maps a whole file, safely: a read lease guarantees that its bytes do not change under the map. See
    /// [`MapOptions::map`].
    ///
    /// # Errors
    ///
    /// [`Error::Lease`] where a lease cannot be had, with the reason and the remedy.
    pub fn map(&self, file: impl AsFd) -> Result<Map, Error> {
        self.options().map(file)
    }

    /// Maps a whole source for whose bytes the caller vouches. See [`MapOptions::map_trusted`].
    ///
    /// # Safety
    ///
    /// The bytes of the source must not change while the map lives: the map hands them out as `&[u8]`.
    ///
    /// # Errors
    ///
    /// As [`MapOptions::map_trusted`].
    #[allow(unsafe_code, reason = "the caller vouches for the bytes")]
    pub unsafe fn map_trusted(&self, source: impl Source) -> Result<Map, Error> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.options().map_trusted(source) }
    }

    /// What happened in all maps of the pool, and what it holds.
    pub fn stats(&self) -> PoolStats {
        let maps = {
            // Held all the while: a map that closes meanwhile is counted once, so that no figure goes back.
            let past = self.0.past.lock().unwrap_or_else(PoisonError::into_inner);
            let mut maps = past.clone();
            for map in live_maps(self) {
                maps.add(&map);
            }
            maps
        };
        let (used, peak) = self
            .0
            .engine
            .as_ref()
            .map_or((0, 0), |e| (e.core.budget.used(), e.core.budget.peak()));
        PoolStats {
            maps,
            budget: self.budget(),
            used: Bytes::new(used),
            peak: Bytes::new(peak),
            page_tables: Bytes::new(memory::page_tables()),
        }
    }
}

fn live_maps(pool: &Pool) -> Vec<Stats> {
    let mut all = Vec::new();
    if let Some(engine) = &pool.0.engine {
        crate::fault::registry::for_each(|core| {
            if Arc::ptr_eq(&core.pool, &engine.core) && !core.summed.load(Ordering::Acquire) {
                all.push(core.counters.snapshot());
            }
        });
    }
    all
}

/// What a pool holds, and what happened in its maps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStats {
    /// The sum over all maps that the pool has, and had.
    pub maps: Stats,
    /// The budget.
    pub budget: Bytes,
    /// What is charged to it now: frames, staging buffers, page states, queues. 0 on the mmap backend.
    pub used: Bytes,
    /// The most that was ever charged at once.
    pub peak: Bytes,
    /// Page tables of the whole process, which the kernel allocates beside the budget (`VmPTE`).
    pub page_tables: Bytes,
}

const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Pool>();
};
