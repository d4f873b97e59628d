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
    called: Futex,
}

impl Turnstile {
    /// Whether threads wait: a newcomer has others before it.
    pub(crate) fn crowded(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// There may be room: wakes the thread that has waited longest.
    pub(crate) fn call(&self) {
        fence(Ordering::SeqCst);
        if self.crowded() {
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

    /// Waits until `pass` has an answer. It is asked before each sleep, and after `look` at the latest. `room` says whether there is
    /// something left for the next thread.
    pub(crate) fn wait<R>(
        &self,
        look: Nanos,
        room: impl FnOnce() -> bool,
        mut pass: impl FnMut() -> Option<R>,
    ) -> R {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let answer = loop {
            let ticket = self.called.ticket();
            if let Some(answer) = pass() {
                break answer;
            }
            self.called.wait(ticket, look);
        };
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        if room() {
            self.call();
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
        fn take(&self) -> Option<()> {
            let less = |room: u32| room.checked_sub(1);
            let room = &self.room;
            room.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less)
                .ok()
                .map(drop)
        }

        fn wait(&self) {
            let left = || self.room.load(Ordering::Relaxed) > 0;
            self.line.wait(Nanos::from_secs(1), left, || self.take());
        }
    }

    /// Threads that wait for one part each, and one that makes all of the room in so many steps.
    fn run(waiting: usize, steps: &'static [u32], preemptions: usize) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(preemptions);
        builder.check(move || {
            let shared = Arc::new(Shared::default());
            let threads: Vec<_> = (0..waiting)
                .map(|_| {
                    let shared = shared.clone();
                    thread::spawn(move || shared.wait())
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
        run(2, &[2], 3);
        run(3, &[3], 2);
    }

    #[test]
    fn each_step_lets_one_through() {
        run(2, &[1, 1], 3);
    }
}
