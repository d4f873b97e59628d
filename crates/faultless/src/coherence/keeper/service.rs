//! The keeper's thread, and running something on it.

#![allow(unsafe_code, reason = "owns descriptors by number")]

#[cfg(not(faultless_sim))]
use crate::base::arena;
use crate::base::ids::Nanos;
use crate::base::primitive::{Mutex, MutexGuard, lock, mpsc};
use crate::base::thread::{Thread, block_signals};
use crate::base::{process, thread};
use crate::coherence::keeper::posix_locks::{LOCKING, TAKING};
use crate::coherence::keeper::reports::{END, read_reports};
use crate::space::fds;
use crate::space::fds::Fd;
use faultless_sys::{Errno, fdtable, file, mem, poll, raw, signal};
use std::collections::{BTreeMap, VecDeque};
use std::ffi::CStr;
use std::io;

type Task = Box<dyn FnOnce(&mut Keeper) + Send>;

/// What to do, once, when a lease is being broken.
pub(crate) type BreakCall = Box<dyn FnOnce() + Send>;

/// A lease that the keeper watches. Descriptor numbers are used again, serial numbers are not.
pub(super) struct Lease {
    pub(super) serial: u64,
    pub(super) on_break: Option<BreakCall>,
}

/// The keeper's own state, touched by its thread alone.
pub(crate) struct Keeper {
    /// The set of userfaultfds whose events are read.
    pub(super) epoll: i32,
    /// Its last task has run.
    stopping: bool,
    /// Leases held, by descriptor.
    pub(super) leases: BTreeMap<i32, Lease>,
}

pub(super) struct Running {
    /// `None` in copies that are made to reach it.
    thread: Option<Thread>,
    pub(super) pid: u32,
    pub(super) tid: u32,
    pub(super) signal: i32,
    /// Whether the keeper's table is private.
    pub(super) private: bool,
    tasks: &'static Mutex<VecDeque<Task>>,
    /// Descriptors of dropped maps that must not be closed yet: the program holds POSIX locks on their files.
    pub(super) lingering: Vec<(Fd, file::FileId)>,
}

pub(super) static RUNNING: Mutex<Option<Running>> = Mutex::new(None);

/// The state lock, for `fork`: held across it so that a child never inherits it locked.
pub(crate) struct KeeperLocks {
    _locking: MutexGuard<'static, ()>,
    taking: MutexGuard<'static, Vec<file::FileId>>,
    _state: MutexGuard<'static, Option<Running>>,
}

impl KeeperLocks {
    /// Forgets the calls that were announced by [`locks_coming`].
    pub(crate) fn forget_calls(&mut self) {
        self.taking.clear();
    }
}

pub(crate) fn freeze() -> KeeperLocks {
    KeeperLocks {
        _locking: lock(&LOCKING),
        taking: lock(&TAKING),
        _state: lock(&RUNNING),
    }
}

/// Starts the keeper of this process if it does not run yet. Returns why descriptors are unprotected, if they are.
pub(crate) fn start() -> io::Result<Option<&'static str>> {
    let mut running = lock(&RUNNING);
    let stale = |r: &Running| r.pid != raw::getpid() || process::forked();
    if running.as_ref().is_none_or(stale) {
        process::settle_here()?;
        fds::set_keeper(0);
        let tasks: &'static Mutex<VecDeque<Task>> = Box::leak(Box::default());
        // Directed at the keeper's thread alone, where it is blocked. A program that blocks the same number in all of its
        // threads and waits for it should use another: the keeper could take it.
        let break_signal = signal::LAST - 1;
        let (tell, told) = mpsc::channel();
        let thread = thread::spawn(c"faultless-keep", move || run(tasks, break_signal, &tell))?;
        let (tid, private) = told
            .recv()
            .map_err(|_| io::Error::other("the keeper thread did not start"))??;
        if private {
            fds::set_keeper(tid);
        }
        *running = Some(Running {
            thread: Some(thread),
            pid: raw::getpid(),
            tid,
            signal: break_signal,
            private,
            tasks,
            lingering: Vec::new(),
        });
    }
    Ok(match running.as_ref() {
        Some(r) if r.private => None,
        _ => Some(
            "descriptors are not protected against a program that closes them all (close_range with UNSHARE, or a thread's pidfd, is refused here)",
        ),
    })
}

/// Has the keeper do something, and does not wait for it.
fn post(running: &Running, task: Task) {
    lock(running.tasks).push_back(task);
    // The queue of signals may be full: the keeper looks by itself now and then.
    let _ = signal::tgkill(running.pid, running.tid, running.signal);
}

/// Runs `f` on the keeper's thread and waits for its result.
fn on_keeper<T: Send + 'static>(
    running: &Running,
    f: impl FnOnce(&mut Keeper) -> T + Send + 'static,
) -> io::Result<T> {
    let (tell, told) = mpsc::channel();
    post(
        running,
        Box::new(move |k| {
            let _ = tell.send(f(k));
        }),
    );
    told.recv()
        .map_err(|_| io::Error::other("the keeper thread is gone"))
}

pub(super) fn with<T: Send + 'static>(
    f: impl FnOnce(&mut Keeper) -> T + Send + 'static,
) -> io::Result<T> {
    // Only the tid is needed outside the lock, and the keeper lives as long as the process.
    let target = {
        let running = lock(&RUNNING);
        let r = running
            .as_ref()
            .filter(|r| r.pid == raw::getpid() && !process::forked())
            .ok_or_else(|| io::Error::other("the keeper thread is not in this process"))?;
        Running {
            thread: None,
            lingering: Vec::new(),
            ..*r
        }
    };
    on_keeper(&target, f)
}

/// Runs something on the keeper's thread, in its own table of descriptors. Answers to lease breaks wait for it, and so do calls of the
/// program: it is to take a few milliseconds at most.
pub(crate) fn apart<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    with(move |_| f()).ok()
}

/// Ends the keeper's threads, where no pool needs them any more. The next pool starts new ones.
pub(crate) fn stop() {
    let mut running = lock(&RUNNING);
    let here = |r: &Running| r.pid == raw::getpid() && !process::forked();
    let Some(mut r) = running.take_if(|r| here(r) && r.lingering.is_empty()) else {
        return;
    };
    fds::set_keeper(0);
    drop(running);
    let thread = r.thread.take();
    let _ = on_keeper(&r, |k| k.stopping = true);
    if let Some(thread) = thread {
        thread.join();
    }
}

/// Starts a thread that shares the keeper's descriptor table.
pub(crate) fn spawn(name: &'static CStr, f: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
    with(move |_| thread::spawn(name, f))?
}

/// As [`spawn`], but returns immediately. The keeper sends the thread or the error through `tell`. If there is no keeper, it sends nothing.
pub(crate) fn spawn_later(
    name: &'static CStr,
    f: Box<dyn FnOnce() + Send>,
    tell: mpsc::Sender<io::Result<Thread>>,
) {
    let running = lock(&RUNNING);
    let here = |r: &&Running| r.pid == raw::getpid() && !process::forked();
    if let Some(r) = running.as_ref().filter(here) {
        post(
            r,
            Box::new(move |_| {
                let _ = tell.send(thread::spawn(name, f));
            }),
        );
    }
}

fn run(
    tasks: &'static Mutex<VecDeque<Task>>,
    break_signal: i32,
    tell: &mpsc::Sender<Result<(u32, bool), Errno>>,
) {
    block_signals();
    // (In a program that does not know of the engine. Its thread waits, with all signals blocked, until it is told.)
    #[cfg(not(faultless_sim))]
    if fds::kept_high() {
        arena::settle();
    }
    let private = go_private();
    let descriptors = poll::create().and_then(|epoll| Ok((epoll, poll::notice()?)));
    // (The second is readable once the reader of reports is to end.)
    let (epoll, end) = match descriptors {
        Ok(both) => both,
        Err(e) => {
            let _ = tell.send(Err(e));
            return;
        }
    };
    let reader = poll::add(epoll, end, END)
        .map_err(io::Error::from)
        .and_then(|()| thread::spawn(c"faultless-move", move || read_reports(epoll)));
    let reader = match reader {
        Ok(reader) => reader,
        Err(e) => {
            // Without it, whoever unmaps a map would wait for ever.
            let _ = tell.send(Err(Errno(e.raw_os_error().unwrap_or(libc::EAGAIN))));
            return;
        }
    };
    let _ = tell.send(Ok((raw::gettid(), private)));

    let mut keeper = Keeper {
        epoll,
        stopping: false,
        leases: BTreeMap::new(),
    };
    let set = signal::set_of(break_signal);
    // Signals are waited for by name. (A signalfd would do, but whoever polls one is woken by *every* signal of the
    // process, SIGBUS included: by every miss.) Whatever woke the keeper, it looks at everything: signals are lost when
    // their queue is full.
    while !keeper.stopping {
        let _ = signal::take_pending(set, LOOK.get());
        for (&fd, lease) in &mut keeper.leases {
            if !file::holds_read_lease(fd)
                && let Some(on_break) = lease.on_break.take()
            {
                on_break();
            }
        }
        run_tasks(tasks, &mut keeper);
    }
    let _ = poll::notify(end);
    reader.join();
    for number in [epoll, end] {
        // SAFETY: made above; the reader has ended.
        unsafe { file::close(number) };
    }
}

/// How long the keeper sleeps without a signal before it looks whether there is something to do.
const LOOK: Nanos = Nanos::from_secs(1);

fn run_tasks(tasks: &Mutex<VecDeque<Task>>, keeper: &mut Keeper) {
    loop {
        let task = lock(tasks).pop_front();
        match task {
            Some(task) => task(keeper),
            None => return,
        }
    }
}

/// Gives this thread a table of its own. `false` if the kernel will not have it.
fn go_private() -> bool {
    // A thread's pidfd (6.9) is what descriptors are fetched through; without it a private table would be a trap.
    let Ok(probe) = mem::pidfd_open(raw::gettid(), mem::PIDFD_THREAD) else {
        return false;
    };
    // SAFETY: made just now.
    unsafe { file::close(probe) };
    // SAFETY: this thread, and those that it will start, use only descriptors that they are given later.
    unsafe { fdtable::privatise() }.is_ok()
}
