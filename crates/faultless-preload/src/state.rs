//! What this process has taken over, and its life: start, fork, exec, end.

#![allow(
    unsafe_code,
    reason = "start and end functions of a shared library, fork handlers"
)]

use crate::real::Errno;
use crate::serving::Served;
use crate::waiting::{self, Waiting};
use crate::{counters, decide, lend, limits, real, reports, service, signals, threads, trap};
use faultless::{ByteSize, Pool, live, standin};
use faultless_run::{Settings, VARIABLE};
use faultless_sys::file::FileId;
use faultless_sys::{mem, raw, signal};
use std::cell::UnsafeCell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, OnceLock, TryLockError};

/// How many mappings are taken over now. While it is 0, all calls but a few pass at once.
pub(crate) static STANDING: AtomicUsize = AtomicUsize::new(0);
/// The smallest mapping that is looked at; `usize::MAX` where this process is not to be served.
static MIN_SIZE: AtomicUsize = AtomicUsize::new(usize::MAX);

const UNKNOWN: u8 = 0;
const OFF: u8 = 1;
const ON: u8 = 2;
static MODE: AtomicU8 = AtomicU8::new(UNKNOWN);
static SETTINGS: OnceLock<Settings> = OnceLock::new();

/// Whether this process was started by `faultless run`. Not before this library's own start: what calls it earlier, the memory
/// allocator while it prepares itself, for one, gets the kernel's mappings.
#[inline]
pub(crate) fn on() -> bool {
    MODE.load(Ordering::Relaxed) == ON
}

/// Whether nothing is taken over: then every function passes its call on.
#[inline(always)]
pub(crate) fn idle() -> bool {
    STANDING.load(Ordering::Relaxed) == 0
}

/// The smallest mapping that is looked at.
#[inline]
pub(crate) fn min_size() -> usize {
    MIN_SIZE.load(Ordering::Relaxed)
}

/// The settings, where [`on`].
pub(crate) fn settings() -> Option<&'static Settings> {
    SETTINGS.get()
}

/// Reads the settings. Called before `main`, by nobody else.
#[cold]
fn start() -> bool {
    // What runs with privileges that its caller lacks obeys nothing in the environment.
    let text = std::env::var_os(VARIABLE).filter(|_| !raw::is_privileged());
    let Some(text) = text else {
        MODE.store(OFF, Ordering::Relaxed);
        return false;
    };
    let settings = text.to_str().and_then(|t| Settings::decode(t).ok());
    let Some(settings) = settings else {
        raw::write_stderr(b"faultless: the environment variable FAULTLESS_RUN is not what `faultless run` sets; this process is not served\n");
        MODE.store(OFF, Ordering::Relaxed);
        return false;
    };
    let min_size = settings.min_size.max(mem::PAGE as u64) as usize;
    if SETTINGS.set(settings).is_ok() {
        MIN_SIZE.store(min_size, Ordering::Relaxed);
    }
    MODE.store(ON, Ordering::Relaxed);
    true
}

extern "C" fn at_start() {
    let _errno = Errno::keep();
    real::find_all();
    if start() {
        HOME.store(raw::getpid() as usize, Ordering::Relaxed);
        watch_forks();
        signals::at_start();
        trap::at_start();
        counters::watch();
        STARTED.store(true, Ordering::Release);
    }
}

/// Everything is prepared: mappings that constructors of other libraries make before are left to the kernel.
pub(crate) static STARTED: AtomicBool = AtomicBool::new(false);

extern "C" fn at_end() {
    if on() {
        end("exit");
    }
}

#[used]
#[unsafe(link_section = ".init_array")]
static AT_START: extern "C" fn() = at_start;
#[used]
#[unsafe(link_section = ".fini_array")]
static AT_END: extern "C" fn() = at_end;

/// Writes the last report, and leaves the others that share the budget.
pub(crate) fn end(reason: &'static str) {
    let _errno = Errno::keep();
    // A child of vfork runs in its parent's memory: what it finds here is not its own.
    if foreign() {
        return;
    }
    reports::write(reason);
    if reason == "exit" {
        service::leave();
    } else {
        service::park();
    }
}

/// One mapping that is taken over.
pub(crate) struct Entry {
    pub(crate) served: Served,
    pub(crate) path: Arc<Path>,
}

/// Misses after which a mapping has paid for being taken over.
const PAYS: u64 = 256;
/// Most mappings that are left alone after one that did not pay, as a power of two.
const DOUBT_MAX: u32 = 16;
/// Most files that are remembered because somebody writes to them.
const WRITTEN_MAX: usize = 4096;

/// Whether taking mappings over has paid in this process. A program that maps a window, reads a little and unmaps it is
/// left alone after the first few, and looked at again ever more rarely.
#[derive(Default)]
pub(crate) struct Doubt {
    /// Mappings in a row that did not pay.
    unpaid: u32,
    /// Mappings to be left alone from now on.
    skip: u64,
}

impl Doubt {
    /// Whether the next mapping is to be left alone.
    pub(crate) fn passes(&mut self) -> bool {
        let pass = self.skip > 0;
        self.skip = self.skip.saturating_sub(1);
        pass
    }

    fn learn(&mut self, misses: u64) {
        if misses >= PAYS {
            *self = Doubt::default();
        } else {
            self.unpaid = (self.unpaid + 1).min(DOUBT_MAX);
            self.skip = 1 << self.unpaid;
        }
    }
}

/// What mappings of one file did that are gone.
#[derive(Default)]
pub(crate) struct Past {
    pub(crate) mappings: u64,
    pub(crate) bytes: u64,
    pub(crate) misses: u64,
    pub(crate) read: u64,
    /// How the bytes stay the file's: `lease`, `trust` or `live`.
    pub(crate) coherence: &'static str,
    /// Why it is served as it is.
    pub(crate) why: &'static str,
    pub(crate) put_back: u64,
    /// The misses among `misses` that were in live mappings.
    pub(crate) live_misses: u64,
}

/// A count of mappings, for one reason.
pub(crate) struct Tally {
    pub(crate) mappings: u64,
    pub(crate) bytes: u64,
    pub(crate) longest_ns: u64,
    pub(crate) example: PathBuf,
}

/// Everything behind the lock.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) pool: Option<Pool>,
    /// Why there can be no pool.
    pub(crate) no_pool: Option<String>,
    /// By serial number. (Addresses may be another's by now.)
    pub(crate) standing: BTreeMap<u64, Entry>,
    /// All that ever were taken over, by path.
    pub(crate) files: BTreeMap<PathBuf, Past>,
    pub(crate) left: BTreeMap<String, Tally>,
    pub(crate) handed_back: BTreeMap<&'static str, Tally>,
    /// Files on which the program has taken POSIX locks for writing.
    pub(crate) write_locked: Vec<FileId>,
    /// Files that somebody opened for writing while they were mapped: they are left to the kernel from then on.
    pub(crate) written: Vec<FileId>,
    /// Mappings of the kernel's that are taken over when the program has a second thread.
    pub(crate) waiting: Vec<Waiting>,
    /// Whether it pays.
    pub(crate) doubt: Doubt,
    /// The memory that this process may have, in bytes, where live mappings can be served, or why they cannot; asked when it is first
    /// needed.
    pub(crate) live: Option<Result<u64, String>>,
    /// Why nothing is taken over any more.
    pub(crate) closed: Option<&'static str>,
}

impl State {
    /// Entries that have a part of a range.
    pub(crate) fn over(&self, range: &Range<usize>) -> Vec<u64> {
        self.those(|e| e.served.touches(range))
    }

    /// Some of the entries.
    fn those(&self, is_one: impl Fn(&Entry) -> bool) -> Vec<u64> {
        let those = self.standing.iter().filter(|(_, e)| is_one(e));
        those.map(|(&serial, _)| serial).collect()
    }

    /// Counts a mapping that stays the kernel's.
    pub(crate) fn leave(&mut self, reason: &str, bytes: usize, path: impl FnOnce() -> PathBuf) {
        if let Some(known) = self.left.get_mut(reason) {
            return tally(known, bytes, 0);
        }
        let mut first = Tally::of(&path());
        tally(&mut first, bytes, 0);
        self.left.insert(reason.to_owned(), first);
    }

    /// Remembers that somebody writes to a file.
    fn note_written(&mut self, id: FileId) {
        if !self.written.contains(&id) {
            if self.written.len() == WRITTEN_MAX {
                self.written.remove(0);
            }
            self.written.push(id);
        }
    }

    /// Remembers that the program takes POSIX locks for writing on a file.
    pub(crate) fn note_write_locked(&mut self, id: FileId) {
        if !self.write_locked.contains(&id) {
            if self.write_locked.len() == WRITTEN_MAX {
                self.write_locked.remove(0);
            }
            self.write_locked.push(id);
        }
    }

    /// Counts a mapping that ended.
    fn count_end(&mut self, reason: &'static str, path: &Path, bytes: usize, longest_ns: u64) {
        let all = self.handed_back.entry(reason);
        tally(all.or_insert_with(|| Tally::of(path)), bytes, longest_ns);
    }

    /// Counts a mapping that would be served.
    pub(crate) fn would_serve(&mut self, path: &Path, bytes: usize, coherence: &'static str) {
        let past = self.files.entry(path.to_owned()).or_default();
        past.mappings += 1;
        past.bytes += bytes as u64;
        past.coherence = coherence;
        past.why = decide::why(coherence == "live");
    }

    /// Takes a mapping over.
    pub(crate) fn insert(&mut self, entry: Entry) {
        let past = self.files.entry(entry.path.to_path_buf()).or_default();
        past.mappings += 1;
        past.bytes += entry.served.range().len() as u64;
        past.coherence = entry.served.coherence();
        past.why = decide::why(entry.served.live().is_some());
        self.standing.insert(entry.served.serial(), entry);
        STANDING.fetch_add(1, Ordering::SeqCst);
    }

    /// Forgets a mapping, and keeps its figures. It counts in [`STANDING`] until [`ended`] says that it is gone: until then, calls
    /// about its addresses must come here.
    pub(crate) fn remove(&mut self, serial: u64) -> Option<Entry> {
        let entry = self.standing.remove(&serial)?;
        let happened = entry.served.happened();
        self.doubt.learn(happened.misses);
        let past = self.files.entry(entry.path.to_path_buf()).or_default();
        past.misses += happened.misses;
        if entry.served.live().is_some() {
            past.live_misses += happened.misses;
        }
        past.read += happened.read;
        past.put_back += happened.put_back;
        Some(entry)
    }

    /// Hands a mapping back to the kernel. `false` if the kernel did not take it.
    pub(crate) fn hand_back(&mut self, serial: u64, reason: &'static str) -> bool {
        let Some(entry) = self.remove(serial) else {
            return true;
        };
        let (path, bytes) = (entry.path.clone(), entry.served.range().len());
        let happened = entry.served.happened();
        match entry.served.hand_back() {
            Ok(longest) => {
                ended();
                self.count_end(reason, &path, bytes, longest);
                true
            }
            Err(failed) => {
                let (served, error) = *failed;
                say(&format!("faultless: {error}; it stays as it is\n"));
                // It goes on: `remove` has counted it as gone.
                let past = self.files.entry(path.to_path_buf()).or_default();
                past.misses -= happened.misses.min(past.misses);
                past.read -= happened.read.min(past.read);
                self.standing.insert(serial, Entry { served, path });
                false
            }
        }
    }

    /// Hands back all that have a part of a range.
    pub(crate) fn hand_back_over(&mut self, range: &Range<usize>, reason: &'static str) -> bool {
        let mut all = true;
        for serial in self.over(range) {
            // Whatever becomes of one, the others go too.
            all &= self.hand_back(serial, reason);
        }
        all
    }

    /// Hands back all.
    pub(crate) fn hand_back_all(&mut self, reason: &'static str) {
        let all: Vec<u64> = self.standing.keys().copied().collect();
        for serial in all {
            self.hand_back(serial, reason);
        }
    }

    /// Hands back all stand-ins for mappings of a file. (Live mappings bear all changes of a file.)
    pub(crate) fn hand_back_file(&mut self, id: FileId, reason: &'static str) {
        let is_its = |e: &Entry| e.served.file_id() == id && e.served.stand_in().is_some();
        for serial in self.those(is_its) {
            self.hand_back(serial, reason);
        }
    }

    /// Hands back all live mappings, or those of a file.
    pub(crate) fn hand_back_live(&mut self, id: Option<FileId>, reason: &'static str) -> bool {
        let is_its =
            |e: &Entry| e.served.live().is_some() && id.is_none_or(|id| e.served.file_id() == id);
        let live = self.those(is_its);
        for &serial in &live {
            self.hand_back(serial, reason);
        }
        !live.is_empty()
    }

    /// Hands all live mappings back, and serves none live any more.
    pub(crate) fn close_live(&mut self, reason: &'static str) {
        self.live = Some(Err(reason.to_owned()));
        self.hand_back_live(None, reason);
    }

    /// Hands everything back, and takes nothing over any more.
    pub(crate) fn close(&mut self, reason: &'static str) {
        self.closed = Some(reason);
        waiting::forget_all(self, reason);
        self.hand_back_all(reason);
    }
}

/// A mapping is gone that was removed from the state.
pub(crate) fn ended() {
    STANDING.fetch_sub(1, Ordering::SeqCst);
}

impl Tally {
    fn of(path: &Path) -> Self {
        Tally {
            mappings: 0,
            bytes: 0,
            longest_ns: 0,
            example: path.to_owned(),
        }
    }
}

fn tally(t: &mut Tally, bytes: usize, ns: u64) {
    t.mappings += 1;
    t.bytes += bytes as u64;
    t.longest_ns = t.longest_ns.max(ns);
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

/// The state, locked, with all signals of this thread blocked: a signal handler that maps memory would otherwise wait for
/// its own thread.
pub(crate) struct Locked {
    // Dropped in this order: the lock goes before signals come.
    guard: MutexGuard<'static, Option<State>>,
    _no_handler_here: signal::Blocked,
    _errno: Errno,
}

impl std::ops::Deref for Locked {
    type Target = State;
    fn deref(&self) -> &State {
        self.guard
            .as_ref()
            .unwrap_or_else(|| unreachable!("made by `lock`"))
    }
}

impl std::ops::DerefMut for Locked {
    fn deref_mut(&mut self) -> &mut State {
        self.guard.get_or_insert_default()
    }
}

/// Locks the state.
pub(crate) fn lock() -> Locked {
    /// How long to wait before looking again. (Signals come meanwhile: a thread that waits can be killed.)
    const NAP_NS: u64 = 50_000;
    let errno = Errno::keep();
    loop {
        let blocked = signal::Blocked::all();
        let mut guard = match STATE.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                drop(blocked);
                raw::nap(NAP_NS);
                continue;
            }
        };
        guard.get_or_insert_default();
        return Locked {
            guard,
            _no_handler_here: blocked,
            _errno: errno,
        };
    }
}

/// The process whose state this is: not that of a child of vfork, which runs in its parent's memory.
static HOME: AtomicUsize = AtomicUsize::new(0);

impl State {
    /// The pool, made when it is first needed.
    pub(crate) fn pool(&mut self) -> Result<Pool, String> {
        if let Some(pool) = &self.pool {
            return Ok(pool.clone());
        }
        if let Some(why) = &self.no_pool {
            return Err(why.clone());
        }
        let made = self.make_pool();
        if let Err(why) = &made {
            self.no_pool = Some(why.clone());
        }
        made
    }

    /// Prepares this process for live mappings.
    pub(crate) fn prepare_live(&mut self) -> Result<u64, String> {
        let prepare = || {
            limits::check()?;
            standin::keep_descriptors_high();
            standin::start_threads().map_err(|e| format!("cannot start a thread: {e}"))?;
            HAS_THREADS.store(true, Ordering::SeqCst);
            Self::start_service()?;
            // (It reads files of /proc.)
            let limit = standin::apart(faultless::internals::memory_limit);
            limit
                .map(ByteSize::get)
                .ok_or_else(|| "the keeper thread is gone".to_owned())
        };
        self.live.get_or_insert_with(prepare).clone()
    }

    /// Starts the parts of the engine that stand-ins and live mappings both need.
    fn start_service() -> Result<(), String> {
        if !standin::descriptors_are_apart() {
            return Err(
                "copies of the process could act on it by descriptors of the engine's, which this kernel does not keep apart (Linux 6.9 does)"
                    .to_owned(),
            );
        }
        standin::on_lease_broken(lease_broken);
        standin::on_lost(service::lost);
        service::start().map_err(|e| format!("cannot start a thread: {e}"))
    }

    fn make_pool(&mut self) -> Result<Pool, String> {
        limits::check()?;
        standin::keep_descriptors_high();
        let granted = service::join();
        let pool = Pool::builder()
            .memory(ByteSize::new(granted))
            .guest()
            .build()
            .map_err(|e| e.to_string())?;
        if let faultless::Backend::Mmap(why) = pool.backend() {
            return Err(format!("there is no userfaultfd: {why}"));
        }
        HAS_THREADS.store(true, Ordering::SeqCst);
        Self::start_service()?;
        lend::set_pinned_max(standin::hold_at_most(&pool));
        self.pool = Some(pool.clone());
        Ok(pool)
    }
}

/// Somebody wants to write to the file of a mapping, and waits until this returns.
fn lease_broken(serial: u64) -> bool {
    let mut state = lock();
    // One that is gone by now needs nothing.
    let Some(entry) = state.standing.get(&serial) else {
        return true;
    };
    let id = entry.served.file_id();
    state.note_written(id);
    state.hand_back(serial, "its file was opened for writing")
}

/// Ends mappings that have no addresses left, because of system calls that nobody saw.
pub(crate) fn settle_lost() {
    let mut state = lock();
    for serial in state.those(|e| e.served.range().is_empty()) {
        let Some(entry) = state.remove(serial) else {
            continue;
        };
        let (path, bytes) = (entry.path.clone(), entry.served.bytes());
        entry.served.end();
        ended();
        state.count_end(
            "the program unmapped or moved it past the C library",
            &path,
            bytes,
            0,
        );
    }
}

/// Whether the engine has threads in this process.
pub(crate) fn has_threads() -> bool {
    HAS_THREADS.load(Ordering::SeqCst)
}

static HAS_THREADS: AtomicBool = AtomicBool::new(false);

/// Hands everything back, takes nothing over any more, and ends the engine's threads.
pub(crate) fn step_aside(reason: &'static str) {
    let pool = {
        let mut state = lock();
        state.close(reason);
        if !state.standing.is_empty() {
            // The kernel did not take one back: it has to be served.
            return;
        }
        state.live = None;
        state.pool.take()
    };
    if HAS_THREADS.load(Ordering::SeqCst) {
        let _errno = Errno::keep();
        service::stop();
        // (No other thread closes what is still open then.)
        live::settle_until(live::holds_nothing);
        drop(pool);
        standin::stop_threads();
        HAS_THREADS.store(false, Ordering::SeqCst);
    }
}

/// Writes a message to stderr, which may be closed or full: that is no affair of the program's.
pub(crate) fn say(text: &str) {
    raw::write_stderr(text.as_bytes());
}

/// Whether this is not the process whose state this is, but a child of vfork in its memory: it must change nothing here.
pub(crate) fn foreign() -> bool {
    // (In a name space of its own, a copy can have the number of the process that it was copied from.)
    let foreign = HOME.load(Ordering::Relaxed) != raw::getpid() as usize || standin::is_bare_copy();
    if foreign {
        // A copy of the process, unless it is a child of vfork.
        standin::forsake();
    }
    foreign
}

// ---- fork

struct ForkSlot(UnsafeCell<Option<(Locked, service::Frozen)>>);
// SAFETY: written and emptied only by the thread that holds the lock which is put there.
unsafe impl Sync for ForkSlot {}
static FORKING: ForkSlot = ForkSlot(UnsafeCell::new(None));

/// After the engine's own handlers were registered: so ours runs before them, takes its lock before theirs, and in the
/// child runs when the kernel's mappings are in place.
fn watch_forks() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        standin::watch_forks();
        // SAFETY: static functions that do what pthread_atfork allows.
        unsafe { libc::pthread_atfork(Some(before_fork), Some(after_fork), Some(in_child)) };
    });
}

extern "C" fn before_fork() {
    // A copy of the process that was made without handlers: its locks may be held by threads that it has not. Nor may it take
    // what another thread of the original had put here.
    if foreign() {
        if standin::is_copy() {
            // SAFETY: a copy has one thread, and a child of vfork is none.
            std::mem::forget(unsafe { (*FORKING.0.get()).take() });
        }
        return;
    }
    // The order in which they are taken everywhere.
    let locked = (lock(), service::freeze());
    FORKER.store(raw::gettid(), Ordering::SeqCst);
    // Handlers of others run with what is held here: a miss of theirs is served.
    signals::open_faults();
    // SAFETY: we hold the lock, so no other thread is here.
    unsafe { *FORKING.0.get() = Some(locked) };
}

/// The thread that is forking, and has the lock meanwhile; 0: none.
static FORKER: AtomicU32 = AtomicU32::new(0);

/// Whether this thread has the lock, because it is in a fork handler of the program's.
pub(crate) fn forking() -> bool {
    let forker = FORKER.load(Ordering::Relaxed);
    forker != 0 && forker == raw::gettid()
}

extern "C" fn after_fork() {
    FORKER.store(0, Ordering::SeqCst);
    // SAFETY: `before_fork` took the lock on this thread.
    drop(unsafe { (*FORKING.0.get()).take() });
}

extern "C" fn in_child() {
    FORKER.store(0, Ordering::SeqCst);
    // SAFETY: as above; the child has no other thread.
    let Some((mut locked, shared)) = (unsafe { (*FORKING.0.get()).take() }) else {
        return;
    };
    // The mappings are the kernel's here, and what stood for them is the parent's.
    let old = std::mem::take(&mut *locked);
    std::mem::forget(old.standing);
    std::mem::forget(old.pool);
    STANDING.store(0, Ordering::SeqCst);
    HOME.store(raw::getpid() as usize, Ordering::Relaxed);
    LOOKED.store(false, Ordering::Relaxed);
    FORKED.store(true, Ordering::Relaxed);
    HAS_THREADS.store(false, Ordering::SeqCst);
    COPYING.store(0, Ordering::SeqCst);
    locked.closed = old.closed;
    locked.written = old.written;
    locked.write_locked = Vec::new();
    threads::in_child();
    waiting::in_child(&mut locked, old.waiting);
    service::in_child(shared);
}

/// Calls that are copying the process now, without handlers: nothing is taken over meanwhile.
pub(crate) static COPYING: AtomicUsize = AtomicUsize::new(0);

/// Makes a call that copies the process without running handlers. The child finds the kernel's mappings and its own signal
/// mask, and a state that is not its own; it may go on at another function and never return here, so that nothing is held.
pub(crate) fn copying<R>(call: impl FnOnce() -> R) -> R {
    {
        let mut state = lock();
        COPYING.fetch_add(1, Ordering::SeqCst);
        state.hand_back_all("the program copied itself without fork");
    }
    let result = call();
    COPYING.fetch_sub(1, Ordering::SeqCst);
    result
}

/// This process was forked from one that was served, and has executed nothing since.
pub(crate) static FORKED: AtomicBool = AtomicBool::new(false);

/// Whether anything was ever looked at, so that a report is worth writing.
pub(crate) static LOOKED: AtomicBool = AtomicBool::new(false);
