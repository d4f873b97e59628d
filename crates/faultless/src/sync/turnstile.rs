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
use crate::base::primitive::{AtomicU32, Ordering, fence};

/// Threads that wait for room.
#[derive(Debug, Default)]
pub(crate) struct Turnstile {
    waiting: AtomicU32,
    /// How often room was made while a thread waited.
    calls: AtomicU32,
    called: Futex,
}

impl Turnstile {
    /// Whether threads wait.
    pub(crate) fn crowded(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// There may be room: wakes the thread that has slept longest.
    pub(crate) fn call(&self) {
        fence(Ordering::SeqCst);
        if self.crowded() {
            self.calls.fetch_add(1, Ordering::Relaxed);
            self.called.bump(Wake::One);
        }
    }

    /// What the threads wait for has changed for all of them.
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

    /// Waits until `pass` has an answer. It is asked before each sleep, and after `look` at the latest. `room` says whether there is
    /// something left for a thread that wants little.
    ///
    /// A thread that wants more than there is hands on a call that may be of use to another, once for each call, or two of that kind
    /// would wake each other without end.
    pub(crate) fn wait<R>(
        &self,
        look: Nanos,
        room: impl Fn() -> bool,
        mut pass: impl FnMut() -> Option<R>,
    ) -> R {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let (mut slept, mut handed_on) = (false, None);
        let answer = loop {
            let ticket = self.called.ticket();
            if let Some(answer) = pass() {
                break answer;
            }
            let calls = self.calls.load(Ordering::Relaxed);
            if slept && handed_on != Some(calls) && room() {
                handed_on = Some(calls);
                self.hand_on();
            }
            self.called.wait(ticket, look);
            slept = true;
        };
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        // (A thread that never slept was not called.)
        if slept && room() {
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
            let left = || self.room.load(Ordering::Relaxed) > 0;
            self.line
                .wait(Nanos::from_secs(1), left, || self.take(parts));
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
        run(&[2, 1], &[3], 3);
    }
}
