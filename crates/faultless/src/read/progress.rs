//! How far something is that is done in parts by other threads, for threads and tasks that wait for its end.

use crate::base::futex::{Futex, Wake};
use crate::base::ids::Nanos;
use crate::base::primitive::{AtomicU64, AtomicUsize, Mutex, Ordering, lock};
use crate::base::thread;
use crate::base::thread::block_signals;
use std::collections::VecDeque;
use std::sync::Arc;
use std::task::Waker;

/// How long a thread sleeps before it looks by itself.
const LOOK: Nanos = Nanos::from_secs(1);
/// Threads that wake tasks, of a pool; and how long one stays without work.
const WAKERS_MAX: usize = 16;
const WAKERS_IDLE: Nanos = Nanos::from_secs(2);

/// Parts that are to be done.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Parts that are not over yet.
    left: AtomicUsize,
    /// Bytes of the parts, and those that were brought in.
    wanted: AtomicU64,
    done: AtomicU64,
    ended: Futex,
    wakers: Mutex<Vec<Waker>>,
    waking: Arc<Wakers>,
}

/// One of the parts. It is over when this is dropped.
#[derive(Debug)]
pub(crate) struct Part {
    of: Arc<Progress>,
    /// Bytes of it, and those that were not brought in so far.
    bytes: u64,
    undone: u64,
}

impl Progress {
    /// Nothing so far. Tasks are woken by the pool's threads for that.
    pub(crate) fn new(waking: &Arc<Wakers>) -> Arc<Self> {
        Arc::new(Progress {
            waking: waking.clone(),
            ..Progress::default()
        })
    }

    /// A part that will bring in so many bytes.
    pub(crate) fn part(self: &Arc<Self>, bytes: u64) -> Part {
        self.left.fetch_add(1, Ordering::Relaxed);
        self.wanted.fetch_add(bytes, Ordering::Relaxed);
        Part {
            of: self.clone(),
            bytes,
            undone: bytes,
        }
    }

    /// Whether all parts are over that were begun.
    pub(crate) fn is_over(&self) -> bool {
        self.left.load(Ordering::Acquire) == 0
    }

    /// Bytes that were not brought in, or not yet.
    pub(crate) fn missing(&self) -> u64 {
        let done = self.done.load(Ordering::Relaxed);
        self.wanted.load(Ordering::Relaxed).saturating_sub(done)
    }

    /// Waits until all parts are over, or in vain.
    pub(crate) fn wait(&self, is_in_vain: impl Fn() -> bool) {
        loop {
            let ticket = self.ended.ticket();
            if self.is_over() || is_in_vain() {
                return;
            }
            self.ended.wait(ticket, LOOK);
        }
    }

    /// Whether all parts are over. If not, `waker` is woken then.
    pub(crate) fn poll(&self, waker: &Waker) -> bool {
        if self.is_over() {
            return true;
        }
        // (Wakers are the program's code: cloned and dropped without the lock.)
        let waker = waker.clone();
        let mut wakers = lock(&self.wakers);
        // (The last part ends before it takes the lock, and wakes what it finds then.)
        if self.is_over() {
            drop(wakers);
            return true;
        }
        let known = wakers.iter().any(|w| w.will_wake(&waker));
        let left = if known {
            Some(waker)
        } else {
            wakers.push(waker);
            None
        };
        drop(wakers);
        drop(left);
        false
    }
}

impl Part {
    /// So many bytes of it are another part's.
    pub(crate) fn leave(&mut self, bytes: u64) {
        self.bytes -= bytes;
        self.undone -= bytes;
        self.of.wanted.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// So many bytes of it are there.
    pub(crate) fn did(&mut self, bytes: u64) {
        self.undone = self.undone.saturating_sub(bytes);
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let done = self.bytes - self.undone;
        self.of.done.fetch_add(done, Ordering::Relaxed);
        if self.of.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.of.ended.bump(Wake::All);
            let wakers = std::mem::take(&mut *lock(&self.of.wakers));
            self.of.waking.wake(wakers);
        }
    }
}

/// Tasks to wake, and the threads that do it. The program's code, which they may be in, may wait for a thread that drops the pool, and so
/// for the pool's other threads. So nobody waits for these; they end when they are not needed.
#[derive(Debug, Default)]
pub(crate) struct Wakers {
    state: Mutex<WakersState>,
    more: Futex,
}

#[derive(Debug, Default)]
struct WakersState {
    due: VecDeque<Waker>,
    threads: usize,
    idle: usize,
}

impl WakersState {
    /// Whether more is due than there are threads for. If so, one more is counted.
    fn wants_a_thread(&mut self) -> bool {
        let wants = self.due.len() > self.idle && self.threads < WAKERS_MAX;
        self.threads += usize::from(wants);
        wants
    }
}

impl Wakers {
    fn wake(self: &Arc<Self>, wakers: Vec<Waker>) {
        if wakers.is_empty() {
            return;
        }
        let mut state = lock(&self.state);
        state.due.extend(wakers);
        let starts = state.wants_a_thread();
        drop(state);
        self.more.bump(Wake::All);
        if starts {
            self.start();
        }
    }

    /// Starts a thread that was counted.
    fn start(self: &Arc<Self>) {
        let me = self.clone();
        if thread::spawn(c"faultless-async", move || me.run()).is_err() {
            let mut state = lock(&self.state);
            state.threads -= 1;
            // (Threads that there are will come to it.)
            let alone = state.threads == 0;
            let due = if alone {
                std::mem::take(&mut state.due)
            } else {
                VecDeque::new()
            };
            drop(state);
            wake(due.into());
        }
    }

    /// The life of a thread.
    fn run(self: &Arc<Self>) {
        block_signals();
        let mut slept = false;
        loop {
            let ticket = self.more.ticket();
            let mut state = lock(&self.state);
            match state.due.pop_front() {
                Some(waker) => {
                    // (It may be held up in the program's code: what is behind it has a thread of its own.)
                    let starts = state.wants_a_thread();
                    drop(state);
                    if starts {
                        self.start();
                    }
                    slept = false;
                    wake(vec![waker]);
                }
                None if slept => {
                    state.threads -= 1;
                    return;
                }
                None => {
                    state.idle += 1;
                    drop(state);
                    self.more.wait(ticket, WAKERS_IDLE);
                    slept = true;
                    lock(&self.state).idle -= 1;
                }
            }
        }
    }
}

/// Wakes tasks. That is the program's code: it may take its time, and may panic.
pub(crate) fn wake(wakers: Vec<Waker>) {
    for waker in wakers {
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| waker.wake()));
    }
}
