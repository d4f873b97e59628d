//! A turnstile: threads that wait for room, and are let through one after the other.
//!
//! A thread that makes room wakes one of the waiting threads, whatever their number. That thread takes its part, and wakes the next
//! one if there is room left. So the thread that makes room does not spend its time on wake-ups, and threads do not wake in crowds.
//! (A newcomer may take the room before the thread that was woken for it.) The kernel wakes the thread that has slept longest.
//!
//! A thread that has waited for too long is *overdue*: it waits in a line of its own. As long as there is one, other threads take no
//! room, so that the room for a large wish can add up.
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
    /// It has waited for too long: it goes before others, as long as it answers so.
    Overdue,
}

/// How many threads wait, and the least that any of them wants, in one word.
#[derive(Clone, Copy)]
struct Line(u64);

impl Line {
    /// As many threads as Linux can have.
    const COUNT_BITS: u32 = 22;
    const LEAST_BITS: u32 = u64::BITS - Self::COUNT_BITS;
    const LEAST_MAX: u64 = (1 << Self::LEAST_BITS) - 1;

    fn count(self) -> u64 {
        self.0 >> Self::LEAST_BITS
    }

    fn least(self) -> u64 {
        self.0 & Self::LEAST_MAX
    }

    fn with(self, bytes: u64) -> Self {
        let bytes = bytes.min(Self::LEAST_MAX);
        let least = match self.count() {
            0 => bytes,
            _ => bytes.min(self.least()),
        };
        Line((self.count() + 1) << Self::LEAST_BITS | least)
    }

    /// (The least of those that remain is not known. One that is too small makes a thread wake in vain, no more.)
    fn without_one(self) -> Self {
        match self.count() {
            1 => Line(0),
            more => Line((more - 1) << Self::LEAST_BITS | self.least()),
        }
    }
}

/// Threads that wait for room.
#[derive(Debug, Default)]
pub(crate) struct Turnstile {
    /// A [`Line`].
    waiting: AtomicU64,
    /// How often room was made while a thread waited.
    calls: AtomicU32,
    called: Futex,
    /// Those of the waiting threads that are overdue.
    overdue: AtomicU32,
    overdue_called: Futex,
}

impl Turnstile {
    fn line(&self) -> Line {
        Line(self.waiting.load(Ordering::Relaxed))
    }

    /// Whether threads wait.
    pub(crate) fn crowded(&self) -> bool {
        self.line().count() > 0
    }

    /// Whether others are to take no room, though there may be some.
    pub(crate) fn has_overdue(&self) -> bool {
        self.overdue.load(Ordering::Relaxed) > 0
    }

    /// The least that a waiting thread wants, or less.
    pub(crate) fn least(&self) -> u64 {
        self.line().least()
    }

    fn change(&self, change: impl Fn(Line) -> Line) {
        let change = |line| Some(change(Line(line)).0);
        let _ = self
            .waiting
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, change);
    }

    /// Wakes the thread that has slept longest: of those that are overdue, if there are any.
    fn wake_one(&self) {
        match self.has_overdue() {
            true => self.overdue_called.bump(Wake::One),
            false => self.called.bump(Wake::One),
        }
    }

    /// There may be room: wakes a thread that waits for it.
    pub(crate) fn call(&self) {
        fence(Ordering::SeqCst);
        if self.crowded() {
            self.calls.fetch_add(1, Ordering::Relaxed);
            self.wake_one();
        }
    }

    /// Wakes all waiting threads: the conditions under which they wait have changed.
    pub(crate) fn call_all(&self) {
        fence(Ordering::SeqCst);
        if self.crowded() {
            self.overdue_called.bump(Wake::All);
            self.called.bump(Wake::All);
        }
    }

    /// A thread that was called leaves room for another.
    fn hand_on(&self, room: &impl Fn(u64) -> bool) {
        fence(Ordering::SeqCst);
        if self.crowded() && room(self.least()) {
            self.wake_one();
        }
    }

    fn leave_overdue(&self) {
        self.overdue.fetch_sub(1, Ordering::Relaxed);
    }

    /// Waits until `pass` has an answer. It is asked before each sleep, and after `look` at the latest. It is told whether the thread
    /// may take room now, and says whether it has waited too long already. `room` says whether there is room for so many bytes.
    ///
    /// A thread that takes nothing hands on a call that may be of use to another, once for each call, or two of that kind would wake
    /// each other without end.
    pub(crate) fn wait<R>(
        &self,
        bytes: u64,
        look: Nanos,
        room: impl Fn(u64) -> bool,
        mut pass: impl FnMut(bool) -> Answer<R>,
    ) -> R {
        self.change(|line| line.with(bytes));
        fence(Ordering::SeqCst);
        let (mut slept, mut handed_on, mut overdue) = (false, None, false);
        let answer = loop {
            let line = match overdue {
                true => &self.overdue_called,
                false => &self.called,
            };
            let ticket = line.ticket();
            match pass(overdue || !self.has_overdue()) {
                Answer::Pass(answer) => break answer,
                Answer::Overdue if !overdue => {
                    overdue = true;
                    self.overdue.fetch_add(1, Ordering::Relaxed);
                    // Room that was made until now called another line.
                    fence(Ordering::SeqCst);
                    continue;
                }
                Answer::Wait if overdue => {
                    overdue = false;
                    self.leave_overdue();
                    // For the others, room that was made meanwhile is news.
                    self.calls.fetch_add(1, Ordering::Relaxed);
                    self.hand_on(&room);
                    continue;
                }
                Answer::Overdue | Answer::Wait => {}
            }
            let calls = self.calls.load(Ordering::Relaxed);
            if slept && handed_on != Some(calls) {
                handed_on = Some(calls);
                self.hand_on(&room);
            }
            line.wait(ticket, look);
            slept = true;
        };
        if overdue {
            self.leave_overdue();
            self.calls.fetch_add(1, Ordering::Relaxed);
        }
        self.change(Line::without_one);
        // (A thread that never slept was not called, unless it kept others from what they were called for.)
        if slept || overdue {
            self.hand_on(&room);
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
            self.wait_or(parts, || Answer::Wait);
        }

        /// `otherwise` is what a thread answers that finds no room, or may not take any.
        fn wait_or(&self, parts: u32, otherwise: impl Fn() -> Answer<()>) {
            let left = |least: u64| u64::from(self.room.load(Ordering::Relaxed)) >= least.max(1);
            let take = |mine: bool| match mine.then(|| self.take(parts)).flatten() {
                Some(()) => Answer::Pass(()),
                None => otherwise(),
            };
            let wants = u64::from(parts);
            self.line.wait(wants, Nanos::from_secs(1), left, take);
        }
    }

    fn spawn(shared: &Arc<Shared>, wait: fn(&Shared)) -> thread::JoinHandle<()> {
        let shared = shared.clone();
        thread::spawn(move || wait(&shared))
    }

    /// Threads that each do their part, and one that makes all of the room in steps.
    fn run_all(threads: &'static [fn(&Shared)], steps: &'static [u32], preemptions: usize) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(preemptions);
        builder.check(move || {
            let shared = Arc::new(Shared::default());
            let threads: Vec<_> = threads.iter().map(|&wait| spawn(&shared, wait)).collect();
            for &step in steps {
                shared.room.fetch_add(step, Ordering::Relaxed);
                shared.line.call();
            }
            for t in threads {
                t.join().unwrap();
            }
            assert_eq!(shared.room.load(Ordering::Relaxed), 0);
            assert!(!shared.line.crowded() && !shared.line.has_overdue());
        });
    }

    /// A thread that wants one part; one that wants two; and the same as threads that are overdue from the start.
    const ONE: fn(&Shared) = |s| s.wait(1);
    const TWO: fn(&Shared) = |s| s.wait(2);
    const OVERDUE_ONE: fn(&Shared) = |s| s.wait_or(1, || Answer::Overdue);
    const OVERDUE_TWO: fn(&Shared) = |s| s.wait_or(2, || Answer::Overdue);
    /// A thread that goes before others once, and then lets them go first again.
    const ONCE_OVERDUE_TWO: fn(&Shared) = |s| {
        let looks = std::cell::Cell::new(0);
        s.wait_or(2, || {
            looks.set(looks.get() + 1);
            match looks.get() {
                1 | 2 => Answer::Overdue,
                _ => Answer::Wait,
            }
        });
    };

    #[test]
    fn room_for_all_that_is_made_in_one_step_lets_all_through() {
        run_all(&[ONE, ONE], &[2], 3);
        run_all(&[ONE, ONE, ONE], &[3], 2);
    }

    #[test]
    fn each_step_lets_one_through() {
        run_all(&[ONE, ONE], &[1, 1], 3);
    }

    /// The one that wants two is called for the first, and must not keep the call from the other.
    #[test]
    fn a_thread_that_wants_more_than_there_is_keeps_no_other_waiting() {
        run_all(&[TWO, ONE], &[1, 2], 3);
        run_all(&[TWO, ONE], &[3], 2);
    }

    /// The same, and no more room is made before that other is through.
    #[test]
    fn a_call_that_is_of_no_use_to_one_thread_reaches_another() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(2);
        builder.check(|| {
            let shared = Arc::new(Shared::default());
            let [two, one] = [TWO, ONE].map(|wait| spawn(&shared, wait));
            shared.room.fetch_add(1, Ordering::Relaxed);
            shared.line.call();
            one.join().unwrap();
            shared.room.fetch_add(2, Ordering::Relaxed);
            shared.line.call();
            two.join().unwrap();
        });
    }

    /// Nothing is lost as a thread changes lines, or leaves that of the overdue behind it empty.
    #[test]
    fn threads_that_are_overdue_hold_nothing_up_when_they_are_through() {
        run_all(&[OVERDUE_TWO, ONE], &[1, 2], 2);
        run_all(&[OVERDUE_TWO, ONE], &[3], 2);
        run_all(&[OVERDUE_ONE, OVERDUE_TWO], &[1, 2], 2);
        run_all(&[ONCE_OVERDUE_TWO, ONE], &[1, 2], 2);
        run_all(&[OVERDUE_ONE, ONE, ONE], &[3], 1);
    }

    /// A newcomer would take the first part, and the second, and so on.
    #[test]
    fn room_adds_up_for_a_thread_that_is_overdue() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(2);
        builder.check(|| {
            let shared = Arc::new(Shared::default());
            let late = spawn(&shared, OVERDUE_TWO);
            while !shared.line.has_overdue() {
                thread::yield_now();
            }
            shared.room.fetch_add(1, Ordering::Relaxed);
            let newcomer = spawn(&shared, ONE);
            shared.line.call();
            // The newcomer leaves this part alone: with it, there are two.
            shared.room.fetch_add(1, Ordering::Relaxed);
            shared.line.call();
            late.join().unwrap();
            shared.room.fetch_add(1, Ordering::Relaxed);
            shared.line.call();
            newcomer.join().unwrap();
            assert_eq!(shared.room.load(Ordering::Relaxed), 0);
        });
    }

    #[test]
    fn the_least_is_that_of_threads_that_wait() {
        let none = Line(0);
        let two = none.with(8).with(4);
        assert_eq!((two.count(), two.least()), (2, 4));
        let last = two.without_one();
        assert!(last.count() == 1 && last.least() <= 8);
        assert_eq!(last.without_one().with(9).least(), 9);
        assert_eq!(none.with(u64::MAX).least(), Line::LEAST_MAX);
    }
}
