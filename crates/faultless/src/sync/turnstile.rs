//! A turnstile: threads that wait for room, and are let through one after the other.
//!
//! A thread that makes room wakes one of the waiting threads, whatever their number. That thread takes its part, and wakes the next
//! one if there is room left. So no thread wakes in vain, and the thread that makes room does not spend its time on wake-ups. The
//! kernel wakes the thread that has slept longest.
//!
//! A thread that waits counts itself *first* and looks for room *then*; one that makes room does so first and looks for waiting
//! threads then. The fences put both into one order, so that no room is overlooked.

use crate::base::futex::{Futex, Wake};
use crate::base::ids::Nanos;
use crate::base::primitive::{AtomicU32, AtomicU64, Ordering, fence};

/// The answer to a thread that asks to pass.
pub(crate) enum Answer<R> {
    Pass(R),
    Wait,
    /// It has waited for too long: it goes before newcomers from now on.
    Overdue,
}

/// Threads that wait for room.
#[derive(Debug, Default)]
pub(crate) struct Turnstile {
    waiting: AtomicU32,
    /// How often room was made while a thread waited.
    calls: AtomicU32,
    called: Futex,
    /// The least that any of them wants, and 0 while it is not known.
    least: AtomicU64,
    /// Threads that have waited for so long that newcomers let them go first.
    overdue: AtomicU32,
}

impl Turnstile {
    /// Whether threads wait.
    pub(crate) fn crowded(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Whether newcomers are to wait, though there may be room.
    pub(crate) fn has_overdue(&self) -> bool {
        self.overdue.load(Ordering::Relaxed) > 0
    }

    /// The least that a waiting thread wants.
    pub(crate) fn least(&self) -> u64 {
        self.least.load(Ordering::Relaxed)
    }

    fn wants(&self, bytes: u64) {
        let less = |least| (least == 0 || bytes < least).then_some(bytes);
        let _ = self
            .least
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// There may be room: wakes the thread that has slept longest.
    pub(crate) fn call(&self) {
        fence(Ordering::SeqCst);
        if self.crowded() {
            self.calls.fetch_add(1, Ordering::Relaxed);
            self.called.bump(Wake::One);
        }
    }

    /// Wakes all waiting threads: the conditions under which they wait have changed.
    pub(crate) fn call_all(&self) {
        fence(Ordering::SeqCst);
        if self.crowded() {
            self.called.bump(Wake::All);
        }
    }

    /// A thread that was called leaves room for another.
    fn hand_on(&self) {
        fence(Ordering::SeqCst);
        if self.crowded() {
            self.called.bump(Wake::One);
        }
    }

    /// Waits until `pass` has an answer. It is asked before each sleep, and after `look` at the latest; it says whether the thread has
    /// waited too long already. `room` says whether there is room for so many bytes.
    ///
    /// A thread that wants more than there is hands on a call that may be of use to another, once for each call, or two of that kind
    /// would wake each other without end.
    pub(crate) fn wait<R>(
        &self,
        bytes: u64,
        look: Nanos,
        room: impl Fn(u64) -> bool,
        mut pass: impl FnMut() -> Answer<R>,
    ) -> R {
        self.wants(bytes);
        self.waiting.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let (mut slept, mut handed_on, mut overdue) = (false, None, false);
        let answer = loop {
            let ticket = self.called.ticket();
            match pass() {
                Answer::Pass(answer) => break answer,
                Answer::Overdue if !overdue => {
                    overdue = true;
                    self.overdue.fetch_add(1, Ordering::Relaxed);
                }
                Answer::Overdue | Answer::Wait => {}
            }
            let calls = self.calls.load(Ordering::Relaxed);
            if slept && handed_on != Some(calls) && room(self.least()) {
                handed_on = Some(calls);
                self.hand_on();
            }
            self.called.wait(ticket, look);
            slept = true;
        };
        if overdue {
            self.overdue.fetch_sub(1, Ordering::Relaxed);
        }
        if self.waiting.fetch_sub(1, Ordering::Relaxed) == 1 {
            // (A thread that comes at this moment is taken for one that wants nothing: it is called too often then, not too seldom.)
            self.least.store(0, Ordering::Relaxed);
        }
        // (A thread that never slept was not called.)
        if slept && room(self.least()) {
            self.hand_on();
        }
        answer
    }
}

/// Time never runs out in the models: a thread that is not called sleeps for ever.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicU32;
    use loom::thread;

    #[derive(Default)]
    struct Shared {
        line: Turnstile,
        room: AtomicU32,
    }

    impl Shared {
        fn take(&self, parts: u32) -> Option<()> {
            let less = |room: u32| room.checked_sub(parts);
            let room = &self.room;
            room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
                .ok()
                .map(drop)
        }

        fn wait(&self, parts: u32) {
            let left = |least: u64| u64::from(self.room.load(Ordering::Relaxed)) >= least.max(1);
            let take = || self.take(parts).map_or(Answer::Wait, Answer::Pass);
            let wants = u64::from(parts);
            self.line.wait(wants, Nanos::from_secs(1), left, take);
        }
    }

    /// Threads that wait for so many parts each, and one that makes all of the room in steps.
    fn run(waiting: &'static [u32], steps: &'static [u32], preemptions: usize) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(preemptions);
        builder.check(move || {
            let shared = Arc::new(Shared::default());
            let threads: Vec<_> = waiting
                .iter()
                .map(|&parts| {
                    let shared = shared.clone();
                    thread::spawn(move || shared.wait(parts))
                })
                .collect();
            for &step in steps {
                shared.room.fetch_add(step, Ordering::Relaxed);
                shared.line.call();
            }
            for t in threads {
                t.join().unwrap();
            }
            assert_eq!(shared.room.load(Ordering::Relaxed), 0);
            assert!(!shared.line.crowded());
        });
    }

    #[test]
    fn room_for_all_that_is_made_in_one_step_lets_all_through() {
        run(&[1, 1], &[2], 3);
        run(&[1, 1, 1], &[3], 2);
    }

    #[test]
    fn each_step_lets_one_through() {
        run(&[1, 1], &[1, 1], 3);
    }

    /// The one that wants two is called for the first, and must not keep the call from the other.
    #[test]
    fn a_thread_that_wants_more_than_there_is_keeps_no_other_waiting() {
        run(&[2, 1], &[1, 2], 3);
        run(&[2, 1], &[3], 2);
    }
}
