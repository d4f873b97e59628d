//! The keeper: one thread for the whole process, with a descriptor table of its own.
//!
//! It holds a second copy of every descriptor that the engine needs, where the program's `close` cannot reach it: were
//! the last reference to a userfaultfd closed, absent pages would silently read as zeros. It receives the signals that
//! announce a broken lease. A second thread, which shares its table, reads the reports of ranges that were unmapped or
//! moved.
//! Closing its copies never drops the program's POSIX locks, since those belong to the program's table.

#![allow(unsafe_code, reason = "owns descriptors by number")]

use crate::fault::fds::{self, Fd};
use crate::fault::{identity, process};
use crate::thread::{self, Thread};
use crate::{moved, standin};
use faultless_sys::uffd::Event;
use faultless_sys::{Errno, fdtable, file, mem, raw, signal, uffd};
use std::collections::{HashMap, VecDeque};
use std::ffi::CStr;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::sync::{Mutex, MutexGuard};

type Task = Box<dyn FnOnce(&mut Keeper) + Send>;

/// What to do, once, when a lease is being broken.
pub(crate) type OnBreak = Box<dyn FnOnce() + Send>;

/// A lease that the keeper watches. Descriptor numbers are used again, serial numbers are not.
struct Lease {
    serial: u64,
    on_break: Option<OnBreak>,
}

/// A lease taken, to be given up by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LeaseId {
    number: i32,
    serial: u64,
}

static NEXT_LEASE: AtomicU64 = AtomicU64::new(1);

/// The keeper's own state, touched by its thread alone.
pub(crate) struct Keeper {
    /// The set of userfaultfds whose events are read.
    epoll: i32,
    /// Its last task has run.
    stopping: bool,
    /// Leases held, by descriptor.
    leases: HashMap<i32, Lease>,
}

struct Running {
    /// `None` in copies that are made to reach it.
    thread: Option<Thread>,
    pid: u32,
    tid: u32,
    signal: i32,
    /// Whether the keeper's table is private.
    private: bool,
    tasks: &'static Mutex<VecDeque<Task>>,
    /// Descriptors of dropped maps that must not be closed yet: the program holds POSIX locks on their files.
    lingering: Vec<(Fd, file::FileId)>,
}

static RUNNING: Mutex<Option<Running>> = Mutex::new(None);

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

/// The state lock, for `fork`: held across it so that a child never inherits it locked.
pub(crate) struct Frozen {
    _locking: MutexGuard<'static, ()>,
    taking: MutexGuard<'static, Vec<file::FileId>>,
    _state: MutexGuard<'static, Option<Running>>,
}

impl Frozen {
    /// Forgets the calls that were announced by [`locks_coming`].
    pub(crate) fn forget_calls(&mut self) {
        self.taking.clear();
    }
}

pub(crate) fn freeze() -> Frozen {
    Frozen {
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
        let break_signal = libc::SIGRTMAX() - 1;
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

/// Runs `f` on the keeper's thread and waits for its result.
fn on_keeper<T: Send + 'static>(
    running: &Running,
    f: impl FnOnce(&mut Keeper) -> T + Send + 'static,
) -> io::Result<T> {
    let (tell, told) = mpsc::channel();
    lock(running.tasks).push_back(Box::new(move |k| drop(tell.send(f(k)))));
    // The queue of signals may be full: the keeper looks by itself now and then.
    let _ = signal::tgkill(running.pid, running.tid, running.signal);
    told.recv()
        .map_err(|_| io::Error::other("the keeper thread is gone"))
}

fn with<T: Send + 'static>(f: impl FnOnce(&mut Keeper) -> T + Send + 'static) -> io::Result<T> {
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

/// Runs something short on the keeper's thread, in its own table of descriptors.
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

/// Takes a descriptor into the engine: the program's table keeps `fd` (or a copy with a higher number), the keeper gets a
/// copy.
pub(crate) fn adopt(fd: OwnedFd) -> io::Result<Fd> {
    let fd = if fds::kept_high() {
        let coming = lock_may_come(fd.as_raw_fd());
        let _no_lock_meanwhile = nothing_announced();
        if coming() || posix_locked(fd.as_raw_fd()) {
            fd
        } else {
            crate::pool::own(fds::lift(fd.into_raw_fd()))
        }
    } else {
        fd
    };
    let number = fd.as_raw_fd();
    if fds::kept_high() && !fds::can_note(number) {
        // A copy of the process could not find it, and would keep it.
        close_unless_locked(fd);
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    let kept = if fds::protected() {
        let me = raw::gettid();
        let fetched = with(move |_| fdtable::fetch(me, number)).map(|r| r.map_err(io::Error::from));
        match fetched {
            Ok(Ok(kept)) => kept,
            Ok(Err(e)) | Err(e) => {
                close_unless_locked(fd);
                return Err(e);
            }
        }
    } else {
        -1
    };
    Ok(Fd::new(fd.into_raw_fd(), kept))
}

/// Closes a descriptor that came to nothing, unless that would cost the program its POSIX locks on the file.
fn close_unless_locked(fd: OwnedFd) {
    let coming = lock_may_come(fd.as_raw_fd());
    let _no_lock_meanwhile = nothing_announced();
    if coming() || posix_locked(fd.as_raw_fd()) {
        std::mem::forget(fd);
    }
}

/// Reads the events of a pool's userfaultfd from now on.
pub(crate) fn watch(fd: &Fd) -> io::Result<()> {
    let number = fd.engine_number();
    with(move |k| {
        let mut event = libc::epoll_event {
            events: libc::EPOLLIN as u32,
            u64: number as u64,
        };
        // SAFETY: two descriptors of this table, and a valid structure.
        match unsafe { libc::epoll_ctl(k.epoll, libc::EPOLL_CTL_ADD, number, &mut event) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    })?
}

/// Lets a pool's userfaultfd go.
pub(crate) fn unwatch(fd: Fd) {
    let (kept, number) = (fd.kept(), fd.engine_number());
    // First out of the set, while the number still names it: without a private table it is the one that is closed next.
    let _ = with(move |k| {
        // SAFETY: two descriptors of this table.
        unsafe { libc::epoll_ctl(k.epoll, libc::EPOLL_CTL_DEL, number, std::ptr::null_mut()) };
    });
    // Then the program's, which is told from others by the kept one.
    close_shared_uffd(&fd);
    if kept >= 0 {
        // SAFETY: the keeper's own copy, in the keeper's table.
        let _ = with(move |_| unsafe { file::close(kept) });
    }
}

/// Closes a userfaultfd's number in the program's table, if it still names one.
fn close_shared_uffd(fd: &Fd) {
    let number = fd.get();
    // Any other descriptor answers ENOTTY or EBADF; a userfaultfd wakes the (absent) waiters of a page.
    if fd.is_kept_open_file(number) && uffd::wake(number, 1 << 30, mem::PAGE).is_ok() {
        fds::forget(number);
        // SAFETY: still ours, as far as can be told.
        unsafe { file::close(number) };
    }
}

/// Takes a read lease on the open file of `fd`; `on_break` is called on the keeper's thread when it is being broken.
pub(crate) fn lease(fd: &Fd, on_break: OnBreak) -> io::Result<Result<LeaseId, Errno>> {
    let number = fd.engine_number();
    let running = lock(&RUNNING);
    let Some(r) = running.as_ref() else {
        return Err(io::Error::other("the keeper was not started"));
    };
    let (tid, break_signal) = (r.tid, r.signal);
    drop(running);
    with(move |k| {
        file::direct_signals(number, tid, break_signal)?;
        file::take_read_lease(number)?;
        let serial = NEXT_LEASE.fetch_add(1, Ordering::Relaxed);
        let on_break = Some(on_break);
        k.leases.insert(number, Lease { serial, on_break });
        Ok(LeaseId { number, serial })
    })
}

/// Gives a lease up, if it has not been already.
pub(crate) fn end_lease(id: LeaseId) {
    let _ = with(move |k| {
        if k.leases
            .get(&id.number)
            .is_some_and(|l| l.serial == id.serial)
        {
            k.leases.remove(&id.number);
            let _ = file::give_up_lease(id.number);
        }
    });
}

/// Lets the descriptor of a dropped map go, as soon as that costs the program no POSIX lock: closing *any* descriptor of
/// a file drops all locks that the process has on it.
pub(crate) fn retire(fd: Fd, id: file::FileId) {
    let mut go = vec![(fd, id)];
    if let Some(r) = lock(&RUNNING).as_mut() {
        go.append(&mut r.lingering);
    }
    for (fd, id) in go {
        let (shared, kept) = (fd.get(), fd.kept());
        let ours = file::status(shared).is_ok_and(|s| s.id == id) && fd.is_kept_open_file(shared);
        let _no_lock_meanwhile = nothing_announced();
        let taking = lock(&TAKING).contains(&id);
        if ours && (taking || posix_locked(shared)) {
            if let Some(r) = lock(&RUNNING).as_mut() {
                r.lingering.push((fd, id));
            }
            continue;
        }
        fds::forget(shared);
        if ours {
            // SAFETY: the number still names the file that the engine opened.
            unsafe { file::close(shared) };
        }
        if kept >= 0 {
            // SAFETY: the keeper's own copy, in the keeper's table.
            let _ = with(move |_| unsafe { file::close(kept) });
        }
    }
}

/// Held while a descriptor of a file is closed, or a POSIX lock on one is announced.
static LOCKING: Mutex<()> = Mutex::new(());
/// Files on which the program is taking POSIX locks, or may have taken some: descriptors of them linger.
static TAKING: Mutex<Vec<file::FileId>> = Mutex::new(Vec::new());

/// Keeps POSIX locks from being announced, where they are announced at all. (Elsewhere nobody is to wait for another's file
/// system: what is done under this lock may ask one.)
fn nothing_announced() -> Option<MutexGuard<'static, ()>> {
    fds::kept_high().then(|| lock(&LOCKING))
}

/// Asks a descriptor's file system, which may take its time, which file it is of; and later, at once, whether a lock on that
/// file has been announced.
fn lock_may_come(fd: i32) -> impl Fn() -> bool {
    let id = file::status(fd).map(|st| st.id);
    move || id.as_ref().is_ok_and(|id| lock(&TAKING).contains(id))
}

/// Says that the program is about to take a POSIX lock on a file (where `fcntl` is interposed): from when this returns, no
/// descriptor of it is closed until [`locks_settled`].
pub(crate) fn locks_coming(id: file::FileId) {
    let _no_handler_here = signal::Blocked::all();
    let _nothing_is_closed = lock(&LOCKING);
    lock(&TAKING).push(id);
}

/// The call that [`locks_coming`] announced is over: what it took, the kernel can tell.
pub(crate) fn locks_settled(id: file::FileId) {
    let _no_handler_here = signal::Blocked::all();
    let mut taking = lock(&TAKING);
    if let Some(i) = taking.iter().position(|&t| t == id) {
        taking.swap_remove(i);
    }
}

/// Whether somebody holds a POSIX lock on the file. Asked on behalf of the open file, which is another owner than the
/// process, so that the process's own locks are seen.
pub(crate) fn posix_locked(fd: i32) -> bool {
    let mut l = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: F_OFD_GETLK reads and writes the structure.
    let ok = unsafe { file::lock_command(fd, libc::F_OFD_GETLK, &mut l) }.is_ok();
    ok && l.l_type != libc::F_UNLCK as i16
}

/// Starts a thread that shares the keeper's descriptor table.
pub(crate) fn spawn(name: &'static CStr, f: impl FnOnce() + Send + 'static) -> io::Result<Thread> {
    with(move |_| thread::spawn(name, f))?
}

/// Blocks the signals that a service thread of the engine has no business with: all but the C library's own, without
/// which `setuid` would wait for the thread for ever, and the ones that report the thread's own faults.
pub(crate) fn block_signals() {
    let faults = [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
    ];
    let open = faults
        .iter()
        .fold(signal::set_of(32) | signal::set_of(33), |set, &s| {
            set | signal::set_of(s)
        });
    signal::set_mask(signal::ALL & !open);
}

fn run(
    tasks: &'static Mutex<VecDeque<Task>>,
    break_signal: i32,
    tell: &mpsc::Sender<Result<(u32, bool), Errno>>,
) {
    block_signals();
    let private = go_private();
    // SAFETY: makes a descriptor.
    let epoll = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    if epoll < 0 {
        let _ = tell.send(Err(Errno(libc::EMFILE)));
        return;
    }
    // Readable once the reader of reports is to end.
    // SAFETY: makes a descriptor.
    let end = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    let reader = watch_for_the_end(epoll, end)
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
        leases: HashMap::new(),
    };
    let set = signal::set_of(break_signal);
    // Signals are waited for by name. (A signalfd would do, but whoever polls one is woken by *every* signal of the
    // process, SIGBUS included: by every miss.) Whatever woke the keeper, it looks at everything: signals are lost when
    // their queue is full.
    while !keeper.stopping {
        let _ = signal::take_pending(set, LOOK_NS);
        for (&fd, lease) in &mut keeper.leases {
            if !file::holds_read_lease(fd)
                && let Some(on_break) = lease.on_break.take()
            {
                on_break();
            }
        }
        run_tasks(tasks, &mut keeper);
    }
    let once = 1u64;
    // SAFETY: writes eight bytes of a live local to a descriptor of this table.
    unsafe { libc::write(end, (&raw const once).cast(), size_of_val(&once)) };
    reader.join();
    for number in [epoll, end] {
        // SAFETY: made above; the reader has ended.
        unsafe { file::close(number) };
    }
}

/// The data of the event that ends the reader of reports: no number of a descriptor.
const END: u64 = u64::MAX;

/// Has `end` wake the reader of reports.
fn watch_for_the_end(epoll: i32, end: i32) -> io::Result<()> {
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: END,
    };
    // SAFETY: two descriptors of this table, and a valid structure.
    match unsafe { libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, end, &mut event) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// How long the keeper sleeps without a signal before it looks whether there is something to do.
const LOOK_NS: u64 = 1_000_000_000;

fn run_tasks(tasks: &Mutex<VecDeque<Task>>, keeper: &mut Keeper) {
    loop {
        let task = lock(tasks).pop_front();
        match task {
            Some(task) => task(keeper),
            None => return,
        }
    }
}

/// Reads the reports of all userfaultfds: a thread that unmapped or moved a range of ours waits in its system call until its
/// report is read. `identity.rs` says what follows from that. A moved range stays armed, so that a touch of an absent page in
/// it raises SIGBUS and never reads as zero.
fn read_reports(epoll: i32) {
    block_signals();
    loop {
        let mut ready = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: room for one event; the descriptor is closed after this thread has ended.
        if unsafe { libc::epoll_wait(epoll, &mut ready, 1, -1) } != 1 {
            continue;
        }
        let number = ready.u64;
        if number == END {
            return;
        }
        let report = identity::report_pending(number as i32);
        // One at a time: each is acted on before the next thread goes on.
        let mut events = [const { std::mem::MaybeUninit::uninit() }; 1];
        let Ok(read) = uffd::read_events(number as i32, &mut events) else {
            drop(report);
            raw::nap(1_000_000);
            continue;
        };
        let in_place = |core: &_, part: &Range<usize>| moved::put(core, part.start, part);
        for event in &events[..read] {
            // SAFETY: the kernel has written so many.
            let Event { event, arg, .. } = unsafe { event.assume_init() };
            let [a, b, c] = arg.map(|x| x as usize);
            match event {
                uffd::EVENT_UNMAP => report.gone(&(a..b), in_place, standin::lost),
                uffd::EVENT_REMAP => {
                    moved::follow(&report, &(a..a + c), b);
                    report.gone(&(a..a + c), in_place, standin::lost);
                }
                _ => {}
            }
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
