//! The thread that keeps this process's share of the budget, and answers SIGUSR2.

#![allow(unsafe_code, reason = "installs a signal handler")]

use crate::state::{self, STANDING};
use crate::{decide, lend, reports};
use faultless::standin::Thread;
use faultless::{ByteSize, live, standin};
use faultless_run::tree::{LEAST, Share, Use};
use faultless_sys::{futex, raw, signal};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often shares are worked out anew.
const TICK_NS: u64 = 250_000_000;
/// The pause between two rounds of work on live mappings, if there is more.
const MORE_NS: u64 = 1_000_000;

static SHARE: Mutex<Option<Share>> = Mutex::new(None);
static GRANTED: AtomicU64 = AtomicU64::new(0);
static DUPLICATED: AtomicU64 = AtomicU64::new(0);
/// The work that the thread is asked to do: bits of `REPORT`, `SETTLE`, `STOP`, `WORK`.
static ASKED: AtomicU32 = AtomicU32::new(0);
/// Somebody sent SIGUSR2.
const REPORT: u32 = 1;
/// A mapping lost addresses.
const SETTLE: u32 = 2;
/// The engine steps aside.
const STOP: u32 = 4;
/// A large live mapping was made, and only its first part has markers. (The thread does that work in each turn, so it need only wake.)
const WORK: u32 = 8;
static RUNNING: AtomicBool = AtomicBool::new(false);
static THREAD: Mutex<Option<Thread>> = Mutex::new(None);
fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ask(what: u32) {
    ASKED.fetch_or(what, Ordering::SeqCst);
    futex::wake(&ASKED, futex::ALL);
}

/// Some mapping lost all addresses. Called where nobody may wait or ask for memory: the thread sees to it.
pub(crate) fn lost() {
    ask(SETTLE);
}

/// Some live mapping is to have more markers.
pub(crate) fn has_work() {
    ask(WORK);
}

fn share() -> MutexGuard<'static, Option<Share>> {
    SHARE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Joins the tree of processes; returns what this one may use to begin with.
pub(crate) fn join() -> u64 {
    let Some(settings) = state::settings() else {
        return LEAST;
    };
    let granted = match Share::join(&settings.tree, settings.memory, raw::getpid()) {
        Ok(mut joined) => {
            let granted = joined.settle(&Use {
                pressed: true,
                ..Use::default()
            });
            *share() = Some(joined);
            granted
        }
        Err(e) => {
            if settings.stats {
                state::say(&format!(
                    "faultless: this process cannot share the memory budget of the others, and uses an eighth of it: no file in /dev/shm for that: {e}\n"
                ));
            }
            (settings.memory / 8).max(LEAST)
        }
    };
    GRANTED.store(granted, Ordering::Relaxed);
    granted
}

/// What this process is granted, and what processes hold more than once.
pub(crate) fn figures() -> (u64, u64) {
    (
        GRANTED.load(Ordering::Relaxed),
        DUPLICATED.load(Ordering::Relaxed),
    )
}

/// Leaves the tree of processes.
pub(crate) fn leave() {
    let Ok(mut share) = SHARE.try_lock() else {
        return;
    };
    match (share.as_mut(), state::settings()) {
        (Some(share), _) => share.leave(),
        // One that has never joined can still be the tree's first.
        (None, Some(settings)) => settings.tree.end(),
        (None, None) => {}
    }
}

/// The lock on the share, held across `fork`.
pub(crate) struct Frozen(
    MutexGuard<'static, Option<Share>>,
    MutexGuard<'static, Option<Thread>>,
);

pub(crate) fn freeze() -> Frozen {
    Frozen(share(), locked(&THREAD))
}

/// A forked child has no thread of ours, and a place of its own once it needs one.
pub(crate) fn in_child(mut frozen: Frozen) {
    RUNNING.store(false, Ordering::Relaxed);
    ASKED.store(0, Ordering::Relaxed);
    std::mem::forget(frozen.0.take());
    std::mem::forget(frozen.1.take());
}

/// The program is about to execute another, which needs nothing as yet. If it cannot, the next tick tells the truth again.
pub(crate) fn park() {
    if let Ok(share) = SHARE.try_lock()
        && let Some(share) = share.as_ref()
    {
        share.park();
    }
}

/// Starts the thread.
pub(crate) fn start() -> io::Result<()> {
    if RUNNING.swap(true, Ordering::SeqCst) {
        return Ok(());
    }
    let started = standin::spawn(c"faultless-serve", || {
        // All signals were blocked by whoever started it, and stay so, but for the C library's own.
        signal::set_mask(signal::ALL & !(signal::set_of(32) | signal::set_of(33)));
        let (mut more, mut ticked, mut ticks) = (false, Instant::now(), 0u32);
        loop {
            futex::wait(&ASKED, 0, if more { MORE_NS } else { TICK_NS });
            let asked = ASKED.swap(0, Ordering::SeqCst);
            if asked & STOP != 0 {
                return;
            }
            if asked & SETTLE != 0 {
                state::settle_lost();
            }
            if asked & REPORT != 0 {
                reports::write("asked");
            }
            more = live::work();
            // (The rest is done at its own pace, however often there is work.)
            if ticked.elapsed() < Duration::from_nanos(TICK_NS) && asked & !WORK == 0 {
                continue;
            }
            ticked = Instant::now();
            ticks = ticks.wrapping_add(1);
            if live::handler_is_lost() {
                state::lock()
                    .close_live("the program installed a SIGSEGV handler past the C library");
            }
            tick();
            // A ring that was made by a system call of the program's own.
            if ticks % 4 == 0
                && STANDING.load(Ordering::Relaxed) != 0
                && standin::apart(decide::has_ring) == Some(true)
            {
                state::lock().close("the program uses io_uring");
            }
        }
    });
    let started = started.inspect_err(|_| RUNNING.store(false, Ordering::SeqCst))?;
    *locked(&THREAD) = Some(started);
    Ok(())
}

/// Ends the thread.
pub(crate) fn stop() {
    let thread = locked(&THREAD).take();
    if let Some(thread) = thread {
        ask(STOP);
        thread.join();
    }
    RUNNING.store(false, Ordering::SeqCst);
}

fn tick() {
    // What is used is asked for under the lock, the rest is done without: others may wait for it.
    let (pool, held) = {
        let state = state::lock();
        let Some(pool) = state.pool.clone() else {
            return;
        };
        let mut held = std::collections::BTreeMap::<(u64, u64), u64>::new();
        for e in state.standing.values() {
            let id = e.served.file_id();
            *held.entry((id.dev, id.ino)).or_default() += e.served.happened().resident;
        }
        (pool, held)
    };
    // (It reads a file of /proc.)
    let asked = pool.clone();
    let Some(stats) = standin::apart(move || asked.stats()) else {
        return;
    };
    let granted = pool.budget().get();
    let used = stats.used.get();
    // The evictor keeps a reserve of an eighth at most.
    let pressed = used + granted / 6 > granted;
    lend::set_pinned_max(standin::hold_at_most(&pool));
    let mut files: Vec<_> = held
        .into_iter()
        .map(|((d, i), bytes)| (d, i, bytes))
        .collect();
    files.sort_by_key(|&(_, _, bytes)| std::cmp::Reverse(bytes));
    let now = Use {
        used,
        pressed,
        files,
    };
    // (It opens a file.)
    let settled = standin::apart(move || {
        share()
            .as_mut()
            .map(|share| (share.settle(&now), share.duplicated()))
    });
    let Some(Some((now, duplicated))) = settled else {
        return;
    };
    DUPLICATED.store(duplicated, Ordering::Relaxed);
    // Small changes are not worth the evictor's trouble.
    if now.abs_diff(granted) > granted / 64 && pool.resize(ByteSize::new(now)).is_ok() {
        GRANTED.store(now, Ordering::Relaxed);
    }
}

/// With `--stats`: SIGUSR2 asks for a report, unless the program has a use for it.
pub(crate) fn answer_sigusr2() {
    if !state::settings().is_some_and(|s| s.stats || s.stats_json.is_some()) {
        return;
    }
    let default = signal::action(libc::SIGUSR2).is_ok_and(|a| a.handler == libc::SIG_DFL);
    if default {
        // SAFETY: the handler sets a word and wakes a thread, and replaces the default action.
        let _ = unsafe { signal::set_action(libc::SIGUSR2, &signal::Action::new(on_sigusr2, 0)) };
    }
}

extern "C" fn on_sigusr2(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if RUNNING.load(Ordering::Relaxed) {
        ask(REPORT);
    } else {
        raw::write_stderr(b"faultless: nothing has been taken over in this process so far\n");
    }
}
