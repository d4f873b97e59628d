//! Time and processors: an event queue, and a fair scheduler.
//!
//! Simulated threads are futures. Whatever a thread does between two awaits takes no time and happens on a processor; time
//! passes in [`Cpu::work`], [`Cpu::sleep`], [`Cpu::block`] and [`Cpu::spin`] alone. One queue holds whatever will happen,
//! in order of time and, at the same instant, in the order in which it was asked for; so a run is a function of its input.
//!
//! The scheduler is the kernel's, EEVDF (`kernel/sched/fair.c` of Linux 6.18), for threads of the same weight. Each processor has a
//! queue of its own:
//!
//! * Each thread has a virtual time, which is how long it has run. Whoever is not ahead of the average of all that want to run is
//!   *eligible*; of these, the one with the earliest *deadline* (its virtual time when it got its slice, and the slice) is next.
//! * Who sleeps keeps its lag behind the average, and gets it back when it wakes. Who is ahead of the average when it goes to sleep stays in
//!   the queue, and is counted there, until it would be its turn (DELAY_DEQUEUE); if it wakes before, it waits for that turn, with what is left of its
//!   slice. So one that sleeps most of the time runs as soon as it wakes, and one that has had much does not.
//! * Who runs is protected until its slice is used up, as long as it is eligible (RUN_TO_PARITY). That is looked at when somebody wakes
//!   on its processor, and at ticks. A slice is longer where there are more processors, up to eight.
//! * Who wakes gets the processor that it had last, if that is idle, or another idle one, which is looked for unless processors have been
//!   busy of late (SIS_UTIL); or else it waits for the one that it had. A processor that becomes idle takes a thread from the longest queue, but none
//!   that has run in the last half millisecond (`task_hot`); and it only looks as often as looking has helped of late (NI_RANDOM, since
//!   Linux 6.18.5 and 6.12.65). Otherwise it stays idle until it is woken or a tick finds a queue. So a processor can be idle while threads
//!   wait for another one, as on real machines.
//! * A kernel without preemption takes the processor from a thread only on its way back to user space, or where it says that it may
//!   (`cond_resched`): so not from one that holds `mmap_lock`, but for long walks.

use crate::costs::Costs;
use faultless_trace::Nanos;
use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, VecDeque};
use std::future::poll_fn;
use std::task::Poll;

/// A simulated thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Tid(pub(crate) u32);

impl Tid {
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// What will happen at an instant, other than on a processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Alarm {
    /// A thread's sleep is over.
    Wake(Tid),
    /// A read from storage has ended.
    Read(u32),
    /// The longest wait is looked at.
    Sample,
    /// What came before does not count.
    WarmedUp,
    /// The run is over.
    End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Happening {
    /// The thread on a processor gets to its next step, or its slice ends; if it is still that run of it.
    Core {
        core: u32,
        run: u64,
    },
    Alarm(Alarm),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running(u32),
    Runnable,
    Blocked,
    Ended,
}

/// How spinning ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spun {
    /// Somebody said that there is something to see.
    Notified,
    /// Another thread needs the processor.
    Reschedule,
    /// It has been long enough.
    TimedOut,
}

const FOREVER: Nanos = Nanos::MAX / 4;
/// A busy processor looks for longer queues each so many ticks.
const BALANCE_TICKS: u64 = 16;
/// Who has run so shortly before is not moved to another processor (`sysctl_sched_migration_cost`).
const HOT: Nanos = 500_000;

#[derive(Debug)]
struct Thread {
    state: State,
    /// The address space that it runs in.
    mm: u32,
    /// Virtual time.
    ran: i64,
    deadline: i64,
    /// Its number among those with the same deadline.
    entered: u64,
    /// Until then it is protected (`vprot`).
    protected: i64,
    /// How far behind the average it was when it went to sleep; negative: how far ahead.
    lag: i64,
    /// It sleeps, and is in the queue nevertheless: it has had more than its share (`sched_delayed`).
    delayed: bool,
    /// The processor that it ran on last.
    core: u32,
    /// It is in the kernel, where nobody takes the processor from it.
    in_kernel: bool,
    /// Another thread is to have its processor.
    need_resched: bool,
    /// What it has still to compute before its next step.
    left: Nanos,
    spinning: Option<Option<Spun>>,
    /// A wake-up that came before the thread slept.
    woken_early: bool,
    runnable_since: Nanos,
    waited_to_run: Nanos,
    /// When it last had a processor.
    ran_until: Nanos,
}

/// Who waits in a queue: the deadline, a number that orders those with the same, the thread.
type Entry = (i64, u64, Tid);

#[derive(Debug, Default, Clone)]
struct Core {
    current: Option<Tid>,
    /// Threads that wait for this processor, by deadline; and some that sleep.
    queue: BTreeSet<Entry>,
    /// How many of these sleep.
    delayed: usize,
    /// Of all these and the current one: how many, and the sum of their virtual times (the current one's at `since`).
    able: i64,
    ran: i64,
    /// The average when there was somebody.
    average: i64,
    /// When the time of the current thread was last brought up to date.
    since: Nanos,
    /// Since when nobody has had it, and for how long before that in all.
    idle_since: Nanos,
    idle: Nanos,
    /// The next tick.
    tick: Nanos,
    /// Counts changes of plan: events of former plans are stale.
    run: u64,
    newidle: Newidle,
}

/// How often it has helped that an idle processor looked for work (`update_newidle_stats`).
#[derive(Debug, Clone)]
struct Newidle {
    calls: u32,
    successes: u32,
    /// Of 1,024.
    ratio: u32,
}

impl Default for Newidle {
    fn default() -> Newidle {
        Newidle {
            calls: 512,
            successes: 256,
            ratio: 512,
        }
    }
}

impl Newidle {
    /// The weight of a look, if there is to be one: `dice` is below 1,024.
    fn weight(&self, dice: u32) -> Option<u32> {
        let weight = 1 + self.ratio;
        (dice <= weight).then(|| (1024 + weight / 2) / weight)
    }

    fn count(&mut self, success: u32) {
        self.calls += 1;
        self.successes += success;
        if self.calls >= 1024 {
            self.ratio = self.successes;
            self.calls /= 2;
            self.successes /= 2;
        }
    }
}

#[derive(Debug)]
struct Inner {
    queue: BinaryHeap<Reverse<(Nanos, u64, Happening)>>,
    asked: u64,
    threads: Vec<Thread>,
    cores: Vec<Core>,
    idle: BTreeSet<u32>,
    /// Threads that wait for a processor.
    queued: usize,
    ready: VecDeque<Tid>,
    /// Alarms to come that wake threads.
    alarms: u64,
    busy: Nanos,
    /// How busy processors have been of late, as a share, and how long all had been busy when that was looked at.
    used: f64,
    used_at: (Nanos, Nanos),
}

/// The processors, and the clock.
#[derive(Debug)]
pub(crate) struct Cpu {
    now: Cell<Nanos>,
    events: Cell<u64>,
    inner: RefCell<Inner>,
    switch: Nanos,
    wakeup: Nanos,
    slice: i64,
    tick: Nanos,
    /// The kernel is preempted as well (CONFIG_PREEMPT).
    preempts: bool,
    /// By how many percent times scatter.
    scatter: u64,
    random: Cell<u64>,
}

impl Cpu {
    pub(crate) fn new(cores: u32, costs: &Costs, preempts: bool, seed: u64) -> Cpu {
        Cpu {
            now: Cell::new(0),
            events: Cell::new(0),
            inner: RefCell::new(Inner {
                queue: BinaryHeap::new(),
                asked: 0,
                threads: Vec::new(),
                cores: vec![Core::default(); cores as usize],
                idle: (0..cores).collect(),
                queued: 0,
                ready: VecDeque::new(),
                alarms: 0,
                busy: 0,
                used: 0.0,
                used_at: (0, 0),
            }),
            switch: costs.context_switch,
            wakeup: costs.wakeup,
            // sched_update_scaling().
            slice: (costs.base_slice.max(1) * u64::from(1 + cores.clamp(1, 8).ilog2())) as i64,
            tick: costs.tick.max(1),
            preempts,
            scatter: costs.scatter.min(100),
            random: Cell::new(seed),
        }
    }

    pub(crate) fn now(&self) -> Nanos {
        self.now.get()
    }

    pub(crate) fn cores(&self) -> u32 {
        self.inner.borrow().cores.len() as u32
    }

    /// Steps of threads and alarms so far.
    pub(crate) fn events(&self) -> u64 {
        self.events.get()
    }

    /// Time that processors have been used, all together.
    pub(crate) fn busy(&self) -> Nanos {
        let inner = self.inner.borrow();
        let now = self.now.get();
        let open = inner.cores.iter().filter(|c| c.current.is_some());
        inner.busy + open.map(|c| now.saturating_sub(c.since)).sum::<Nanos>()
    }

    /// What is counted from event to event is what is there: threads that want to run, their virtual times, and each processor's time,
    /// which was spent on somebody or on nobody.
    ///
    /// # Panics
    ///
    /// When it is not.
    pub(crate) fn check(&self) {
        let inner = self.inner.borrow();
        let now = self.now.get();
        let (mut waiting, mut idle) = (0, 0);
        for (no, core) in inner.cores.iter().enumerate() {
            let queued = core.queue.iter().map(|e| e.2);
            let there: Vec<Tid> = queued.chain(core.current).collect();
            assert_eq!(core.able, there.len() as i64, "threads of processor {no}");
            let ran: i64 = there.iter().map(|t| inner.threads[t.index()].ran).sum();
            assert_eq!(core.ran, ran, "virtual times of processor {no}");
            for e in &core.queue {
                let thread = &inner.threads[e.2.index()];
                assert!(
                    thread.core == no as u32 && thread.deadline == e.0,
                    "thread {} waits for another processor than its own",
                    e.2.0
                );
            }
            assert_eq!(
                inner.idle.contains(&(no as u32)),
                core.current.is_none(),
                "processor {no}"
            );
            waiting += core.waiting();
            idle += core.idle;
            if core.current.is_none() {
                idle += now - core.idle_since;
            }
        }
        assert_eq!(inner.queued, waiting, "threads that wait for a processor");
        drop(inner);
        let all = now * u64::from(self.cores());
        assert_eq!(self.busy() + idle, all, "time of processors");
    }

    /// Looks how busy processors are, for `used`: it has a half-life of 32 ms, as `util_avg` has.
    pub(crate) fn look_at_use(&self) {
        let (busy, now) = (self.busy(), self.now.get());
        let inner = &mut *self.inner.borrow_mut();
        let (busy_then, then) = inner.used_at;
        if now > then {
            let gone = (now - then) as f64;
            let share = (busy - busy_then) as f64 / gone / inner.cores.len() as f64;
            let keeps = 0.5_f64.powf(gone / 32e6);
            inner.used = inner.used * keeps + share * (1.0 - keeps);
            inner.used_at = (busy, now);
        }
    }

    /// Time that a thread could have run and had no processor.
    pub(crate) fn waited_to_run(&self, t: Tid) -> Nanos {
        let inner = self.inner.borrow();
        let thread = &inner.threads[t.index()];
        let open = match thread.state {
            State::Runnable => self.now.get() - thread.runnable_since,
            _ => 0,
        };
        thread.waited_to_run + open
    }

    pub(crate) fn is_running(&self, t: Tid) -> bool {
        matches!(
            self.inner.borrow().threads[t.index()].state,
            State::Running(_)
        )
    }

    /// The processor that a thread has, or had last.
    pub(crate) fn core(&self, t: Tid) -> u32 {
        self.inner.borrow().threads[t.index()].core
    }

    /// Nobody runs or can run, and nothing will happen that could wake anybody.
    pub(crate) fn stands_still(&self) -> bool {
        let inner = self.inner.borrow();
        inner.ready.is_empty()
            && inner.queued == 0
            && inner.alarms == 0
            && inner.idle.len() == inner.cores.len()
    }

    pub(crate) fn is_blocked(&self, t: Tid) -> bool {
        let inner = self.inner.borrow();
        let thread = &inner.threads[t.index()];
        thread.state == State::Blocked && !thread.woken_early
    }

    /// Processors, besides a thread's own, on which threads of an address space run.
    pub(crate) fn others_running(&self, mm: u32, t: Tid) -> u32 {
        let inner = self.inner.borrow();
        let others = inner.cores.iter().filter_map(|c| c.current);
        others
            .filter(|&o| o != t && inner.threads[o.index()].mm == mm)
            .count() as u32
    }

    /// Takes time from the threads of an address space that run on other processors: they answer an interrupt.
    pub(crate) fn interrupt(&self, mm: u32, t: Tid, ns: Nanos) {
        let inner = &mut *self.inner.borrow_mut();
        let now = self.now.get();
        for no in 0..inner.cores.len() {
            let Some(other) = inner.cores[no].current else {
                continue;
            };
            if other == t || inner.threads[other.index()].mm != mm {
                continue;
            }
            inner.bring_up_to_date(no, now);
            let thread = &mut inner.threads[other.index()];
            // (Who comes to its next step too early for that plans again.)
            if thread.left < FOREVER / 2 {
                thread.left = thread.left.saturating_add(ns);
            }
        }
    }

    // ---- Threads ----

    /// A new thread, which can run.
    pub(crate) fn spawn(&self, mm: u32) -> Tid {
        let inner = &mut *self.inner.borrow_mut();
        let t = Tid(inner.threads.len() as u32);
        inner.threads.push(Thread {
            state: State::Blocked,
            mm,
            ran: 0,
            deadline: 0,
            entered: 0,
            protected: 0,
            lag: 0,
            delayed: false,
            core: t.0 % inner.cores.len() as u32,
            in_kernel: false,
            need_resched: false,
            left: 0,
            spinning: None,
            woken_early: false,
            runnable_since: self.now.get(),
            waited_to_run: 0,
            ran_until: 0,
        });
        self.make_runnable(inner, t);
        t
    }

    /// The thread is over; its processor is free.
    pub(crate) fn exit(&self, t: Tid) {
        let inner = &mut *self.inner.borrow_mut();
        self.leave(inner, t, State::Ended);
    }

    /// A random number below 2^32 (splitmix64).
    fn random(&self) -> u64 {
        let seed = self.random.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.random.set(seed);
        let mut z = seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) >> 32
    }

    /// Caches, branches and interrupts make the same work take longer or shorter: evenly around what it costs.
    pub(crate) fn scattered(&self, ns: Nanos) -> Nanos {
        if ns == 0 {
            return 0;
        }
        // A number from -scatter to scatter percent.
        let percent = (self.random() * (2 * self.scatter + 1)) >> 32;
        (ns / 100)
            .saturating_mul(100 + percent - self.scatter)
            .saturating_add(ns % 100)
    }

    /// Computes for about so long.
    pub(crate) async fn work(&self, t: Tid, ns: Nanos) {
        self.work_exactly(t, self.scattered(ns)).await;
    }

    /// Computes for so long.
    pub(crate) async fn work_exactly(&self, t: Tid, ns: Nanos) {
        if ns == 0 {
            return;
        }
        let mut begun = false;
        poll_fn(|_| {
            if begun {
                return Poll::Ready(());
            }
            begun = true;
            let inner = &mut *self.inner.borrow_mut();
            let State::Running(core) = inner.threads[t.index()].state else {
                unreachable!("a thread computes where it has no processor");
            };
            // A kernel that is preempted gives way here, to whom it has woken.
            if inner.threads[t.index()].need_resched && !inner.threads[t.index()].in_kernel {
                inner.bring_up_to_date(core as usize, self.now.get());
                inner.threads[t.index()].left = ns;
                inner.threads[t.index()].need_resched = false;
                if self.reschedule(inner, core) {
                    return Poll::Pending;
                }
                inner.threads[t.index()].left = 0;
            }
            // Nothing else happens meanwhile: no event is needed.
            let until = self.now.get().saturating_add(ns);
            let next = inner.queue.peek().map_or(FOREVER, |Reverse(e)| e.0);
            if until < next && inner.ready.is_empty() && until < inner.cores[core as usize].tick {
                self.now.set(until);
                self.events.set(self.events.get() + 1);
                return Poll::Ready(());
            }
            inner.bring_up_to_date(core as usize, self.now.get());
            inner.threads[t.index()].left = ns;
            self.plan(inner, core);
            Poll::Pending
        })
        .await;
    }

    /// Computes for long in the kernel, at a place where the processor may be taken.
    pub(crate) async fn walk(&self, t: Tid, ns: Nanos) {
        let inside = std::mem::replace(&mut self.thread(t).in_kernel, false);
        self.give_way(t).await;
        self.work(t, ns).await;
        self.thread(t).in_kernel = inside;
    }

    /// Gets into the kernel.
    pub(crate) fn enter_kernel(&self, t: Tid) {
        self.thread(t).in_kernel = !self.preempts;
    }

    /// Gets back to user space.
    pub(crate) async fn leave_kernel(&self, t: Tid) {
        self.thread(t).in_kernel = false;
        self.give_way(t).await;
    }

    fn thread(&self, t: Tid) -> std::cell::RefMut<'_, Thread> {
        std::cell::RefMut::map(self.inner.borrow_mut(), |i| &mut i.threads[t.index()])
    }

    /// Lets another thread have the processor, if one is to have it.
    async fn give_way(&self, t: Tid) {
        let mut begun = false;
        poll_fn(|_| {
            let inner = &mut *self.inner.borrow_mut();
            if begun || !std::mem::take(&mut inner.threads[t.index()].need_resched) {
                return Poll::Ready(());
            }
            begun = true;
            let State::Running(core) = inner.threads[t.index()].state else {
                unreachable!("a thread is in user space where it has no processor");
            };
            inner.bring_up_to_date(core as usize, self.now.get());
            match self.reschedule(inner, core) {
                true => Poll::Pending,
                false => Poll::Ready(()),
            }
        })
        .await;
    }

    /// Sleeps for a time.
    pub(crate) async fn sleep(&self, t: Tid, ns: Nanos) {
        let until = self.now().saturating_add(ns);
        self.alarm(ns, Alarm::Wake(t));
        while self.now() < until {
            self.block(t).await;
        }
    }

    /// Sleeps until it is woken; or not at all, if that has come before. It may have been meant for an earlier sleep, so who
    /// sleeps looks whether what it waits for has come.
    pub(crate) async fn block(&self, t: Tid) {
        let mut begun = false;
        poll_fn(|_| {
            if begun {
                return Poll::Ready(());
            }
            begun = true;
            let inner = &mut *self.inner.borrow_mut();
            let thread = &mut inner.threads[t.index()];
            if std::mem::take(&mut thread.woken_early) {
                return Poll::Ready(());
            }
            self.leave(inner, t, State::Blocked);
            Poll::Pending
        })
        .await;
    }

    /// Computes until somebody has something to say, another thread needs the processor, or a time is over.
    pub(crate) async fn spin(&self, t: Tid, at_most: Nanos) -> Spun {
        let mut begun = false;
        poll_fn(|_| {
            let inner = &mut *self.inner.borrow_mut();
            let thread = &mut inner.threads[t.index()];
            if begun {
                let how = thread.spinning.take().flatten();
                return Poll::Ready(how.unwrap_or(Spun::TimedOut));
            }
            begun = true;
            let State::Running(core) = thread.state else {
                unreachable!("a thread spins where it has no processor");
            };
            thread.spinning = Some(None);
            inner.bring_up_to_date(core as usize, self.now.get());
            inner.threads[t.index()].left = at_most.clamp(1, FOREVER);
            self.plan(inner, core);
            Poll::Pending
        })
        .await
    }

    /// Tells a spinning thread that there is something to see; it sees it after a while.
    pub(crate) fn notify(&self, t: Tid, after: Nanos) {
        let inner = &mut *self.inner.borrow_mut();
        let thread = &mut inner.threads[t.index()];
        if thread.spinning != Some(None) {
            return;
        }
        thread.spinning = Some(Some(Spun::Notified));
        let State::Running(core) = thread.state else {
            unreachable!("a thread spins where it has no processor");
        };
        inner.bring_up_to_date(core as usize, self.now.get());
        inner.threads[t.index()].left = after.max(1);
        self.plan(inner, core);
    }

    /// Whether another thread is to have the processor of this one.
    pub(crate) fn must_reschedule(&self, t: Tid) -> bool {
        let inner = self.inner.borrow();
        let thread = &inner.threads[t.index()];
        thread.need_resched || !matches!(thread.state, State::Running(_))
    }

    /// Wakes a thread.
    pub(crate) fn wake(&self, t: Tid) {
        let inner = &mut *self.inner.borrow_mut();
        match inner.threads[t.index()].state {
            State::Blocked => self.make_runnable(inner, t),
            State::Ended => {}
            _ => inner.threads[t.index()].woken_early = true,
        }
    }

    pub(crate) fn alarm(&self, after: Nanos, alarm: Alarm) {
        let inner = &mut *self.inner.borrow_mut();
        let at = self.now.get().saturating_add(after);
        inner.alarms += u64::from(matches!(alarm, Alarm::Wake(_) | Alarm::Read(_)));
        inner.ask(at, Happening::Alarm(alarm));
    }

    // ---- The loop ----

    /// What is next: a thread's step, or an alarm. None: nothing will happen any more.
    pub(crate) fn next(&self) -> Option<Next> {
        let inner = &mut *self.inner.borrow_mut();
        loop {
            if let Some(t) = inner.ready.pop_front() {
                self.events.set(self.events.get() + 1);
                return Some(Next::Step(t));
            }
            let Reverse((at, _, happening)) = inner.queue.pop()?;
            match happening {
                Happening::Alarm(alarm) => {
                    inner.alarms -= u64::from(matches!(alarm, Alarm::Wake(_) | Alarm::Read(_)));
                    self.now.set(at.max(self.now.get()));
                    self.events.set(self.events.get() + 1);
                    return Some(Next::Alarm(alarm));
                }
                Happening::Core { core, run } => {
                    if inner.cores[core as usize].run != run {
                        continue;
                    }
                    self.now.set(at.max(self.now.get()));
                    self.core_is_due(inner, core);
                }
            }
        }
    }

    fn core_is_due(&self, inner: &mut Inner, core: u32) {
        let now = self.now.get();
        inner.bring_up_to_date(core as usize, now);
        let Some(t) = inner.cores[core as usize].current else {
            return;
        };
        if inner.cores[core as usize].tick <= now {
            inner.cores[core as usize].tick = self.tick_after(core, now);
            if (now / self.tick).is_multiple_of(BALANCE_TICKS) {
                self.balance_busy(inner, core);
            }
            // Who waits here may run elsewhere.
            if inner.cores[core as usize].waiting() > 0
                && let Some(&idle) = inner.idle.first()
            {
                self.balance(inner, idle);
            }
            if self.is_used_up(inner, t) && self.preempt(inner, core) {
                return;
            }
        }
        if inner.threads[t.index()].left == 0 {
            inner.cores[core as usize].run += 1;
            inner.ready.push_back(t);
        } else {
            self.plan(inner, core);
        }
    }

    /// `update_curr`: whether the slice of the thread that has a processor is used up, and somebody else is there. It gets another
    /// slice then.
    fn is_used_up(&self, inner: &mut Inner, t: Tid) -> bool {
        let thread = &mut inner.threads[t.index()];
        let used_up = thread.ran >= thread.deadline.min(thread.protected);
        if thread.ran >= thread.deadline {
            thread.deadline = thread.ran + self.slice;
        }
        used_up && !inner.cores[thread.core as usize].queue.is_empty()
    }

    /// Another thread is to have a processor, if it deserves it: as soon as the one that is there can give it up. Whether it has.
    fn preempt(&self, inner: &mut Inner, core: u32) -> bool {
        let Some(t) = inner.cores[core as usize].current else {
            return false;
        };
        let thread = &mut inner.threads[t.index()];
        if thread.spinning == Some(None) {
            // It stops by itself.
            thread.need_resched = true;
            thread.spinning = Some(Some(Spun::Reschedule));
            thread.left = 0;
            inner.cores[core as usize].run += 1;
            inner.ready.push_back(t);
            return true;
        }
        // One that is at its next step just now gives it up on its way to user space, or at the next tick.
        if thread.in_kernel || thread.left == 0 {
            thread.need_resched = true;
            return false;
        }
        self.reschedule(inner, core)
    }

    /// `pick_next_task`: whether another thread has the processor then.
    fn reschedule(&self, inner: &mut Inner, core: u32) -> bool {
        let now = self.now.get();
        let Some(t) = inner.cores[core as usize].current else {
            return false;
        };
        let Some(next) = self.pick_awake(inner, core) else {
            return false;
        };
        let thread = &mut inner.threads[t.index()];
        thread.need_resched = false;
        if next == t {
            return false;
        }
        thread.state = State::Runnable;
        thread.runnable_since = now;
        thread.ran_until = now;
        inner.free(core);
        inner.enqueue(t, core);
        self.fill(inner, core);
        true
    }

    fn leave(&self, inner: &mut Inner, t: Tid, state: State) {
        let State::Running(core) = inner.threads[t.index()].state else {
            unreachable!("a thread leaves a processor that it has not got");
        };
        let now = self.now.get();
        inner.bring_up_to_date(core as usize, now);
        let average = inner.average(core, now);
        inner.free(core);
        let thread = &mut inner.threads[t.index()];
        thread.state = state;
        thread.need_resched = false;
        thread.ran_until = now;
        // DELAY_DEQUEUE: who has had more than its share goes on competing for the processor in its sleep, until it has not.
        if state == State::Blocked && thread.ran > average {
            thread.delayed = true;
            inner.cores[core as usize].delayed += 1;
            inner.enqueue(t, core);
        } else {
            inner.dequeue(t, core, now, self.lag_most());
        }
        self.fill(inner, core);
    }

    /// What lag is kept, at most (`update_entity_lag`).
    fn lag_most(&self) -> i64 {
        (2 * self.slice).max(self.tick as i64)
    }

    /// Who is to have a processor: the one that is there, or one of those that wait. Those that sleep leave the queue when it is
    /// their turn (`pick_next_entity`).
    fn pick_awake(&self, inner: &mut Inner, core: u32) -> Option<Tid> {
        let now = self.now.get();
        loop {
            let t = inner.pick(core, now)?;
            if !inner.threads[t.index()].delayed {
                return Some(t);
            }
            inner.remove(t, core);
            inner.dequeue(t, core, now, self.lag_most());
            let thread = &mut inner.threads[t.index()];
            thread.delayed = false;
            // DELAY_ZERO.
            thread.lag = thread.lag.min(0);
        }
    }

    /// Gives a free processor to the thread that is next; to one of another queue, if its own is empty.
    fn fill(&self, inner: &mut Inner, core: u32) {
        if let Some(next) = self.pick_awake(inner, core) {
            inner.remove(next, core);
            self.dispatch(inner, core, next, self.switch);
            return;
        }
        inner.idle.insert(core);
        if inner.queued == 0 {
            return;
        }
        let dice = (self.random() % 1024) as u32;
        let weight = inner.cores[core as usize].newidle.weight(dice);
        let success = match weight {
            Some(weight) if self.balance(inner, core) => weight,
            _ => 0,
        };
        inner.cores[core as usize].newidle.count(success);
    }

    /// `sched_balance_newidle`, `nohz_idle_balance`: an idle processor takes a thread of the longest queue. Whether it has.
    fn balance(&self, inner: &mut Inner, core: u32) -> bool {
        if inner.queued == 0 {
            return false;
        }
        let longest = (0..inner.cores.len()).max_by_key(|&c| (inner.cores[c].waiting(), !c));
        let Some(t) = longest.and_then(|from| self.pull(inner, from as u32, core)) else {
            return false;
        };
        inner.idle.remove(&core);
        self.dispatch(inner, core, t, self.switch);
        true
    }

    /// Takes a thread out of the queue of a processor, for another one: the next that has not run of late. It keeps what it has of its
    /// slice (PLACE_REL_DEADLINE).
    fn pull(&self, inner: &mut Inner, from: u32, core: u32) -> Option<Tid> {
        let now = self.now.get();
        let may_go = |e: &&Entry| {
            let thread = &inner.threads[e.2.index()];
            !thread.delayed && now - thread.ran_until >= HOT
        };
        let t = inner.cores[from as usize].queue.iter().find(may_go)?.2;
        inner.remove(t, from);
        inner.dequeue(t, from, now, self.lag_most());
        let thread = &inner.threads[t.index()];
        let left = thread.deadline - thread.ran;
        inner.place(t, core, now, left);
        Some(t)
    }

    fn make_runnable(&self, inner: &mut Inner, t: Tid) {
        let now = self.now.get();
        let thread = &mut inner.threads[t.index()];
        thread.state = State::Runnable;
        thread.runnable_since = now;
        let last = thread.core;
        if thread.delayed {
            self.requeue(inner, t, last);
            return;
        }
        // `update_idle_cpu_scan`: as many are looked at, and none if that is not one.
        let looks = inner.cores.len() as f64 * (1.0 - 1.17 * 1.17 * inner.used * inner.used);
        let idle = match inner.idle.contains(&last) {
            true => Some(last),
            false if looks >= 1.0 => inner.idle.first().copied(),
            false => None,
        };
        if let Some(core) = idle {
            inner.idle.remove(&core);
            inner.place(t, core, now, self.slice);
            self.dispatch(inner, core, t, self.wakeup);
            return;
        }
        inner.bring_up_to_date(last as usize, now);
        let used_up = self.is_current_used_up(inner, last);
        inner.place(t, last, now, self.slice);
        inner.enqueue(t, last);
        self.preempt_for(inner, t, last, used_up);
    }

    /// `requeue_delayed_entity`: who wakes while it is in the queue stays where it is, with what it has left of its slice.
    fn requeue(&self, inner: &mut Inner, t: Tid, core: u32) {
        let now = self.now.get();
        inner.bring_up_to_date(core as usize, now);
        let used_up = self.is_current_used_up(inner, core);
        inner.remove(t, core);
        inner.threads[t.index()].delayed = false;
        if inner.average(core, now) > inner.threads[t.index()].ran {
            inner.dequeue(t, core, now, self.lag_most());
            inner.threads[t.index()].lag = 0;
            inner.place(t, core, now, self.slice);
        }
        inner.enqueue(t, core);
        self.preempt_for(inner, t, core, used_up);
    }

    fn is_current_used_up(&self, inner: &mut Inner, core: u32) -> bool {
        inner.cores[core as usize]
            .current
            .is_some_and(|current| self.is_used_up(inner, current))
    }

    /// `check_preempt_wakeup_fair`.
    fn preempt_for(&self, inner: &mut Inner, t: Tid, core: u32, used_up: bool) {
        if used_up || inner.pick(core, self.now.get()) == Some(t) {
            self.preempt(inner, core);
        }
    }

    fn tick_after(&self, core: u32, at: Nanos) -> Nanos {
        // Ticks of different processors do not come together.
        let offset = u64::from(core) * 997_001 % self.tick;
        (at.saturating_sub(offset) / self.tick + 1) * self.tick + offset
    }

    fn dispatch(&self, inner: &mut Inner, core: u32, t: Tid, cost: Nanos) {
        let now = self.now.get();
        let thread = &mut inner.threads[t.index()];
        thread.waited_to_run += now - thread.runnable_since;
        thread.state = State::Running(core);
        thread.core = core;
        thread.protected = thread.deadline;
        thread.left = thread.left.saturating_add(cost.max(1));
        let at = &mut inner.cores[core as usize];
        at.idle += now - at.idle_since;
        at.current = Some(t);
        at.since = now;
        at.tick = self.tick_after(core, now);
        self.plan(inner, core);
    }

    /// `sched_balance_rq` of a processor that is busy: takes half of what the longest queue has more.
    fn balance_busy(&self, inner: &mut Inner, core: u32) {
        let longest = (0..inner.cores.len()).max_by_key(|&c| (inner.cores[c].waiting(), !c));
        let Some(from) = longest else { return };
        let waiting = inner.cores[core as usize].waiting();
        let more = inner.cores[from].waiting().saturating_sub(waiting);
        for _ in 0..more / 2 {
            let Some(t) = self.pull(inner, from as u32, core) else {
                return;
            };
            inner.enqueue(t, core);
        }
    }

    /// Asks for the moment at which something changes on a processor.
    fn plan(&self, inner: &mut Inner, core: u32) {
        let at = &mut inner.cores[core as usize];
        let Some(t) = at.current else { return };
        at.run += 1;
        let run = at.run;
        let done = at.since.saturating_add(inner.threads[t.index()].left);
        let until = done.min(at.tick.max(self.now.get()));
        if until < FOREVER / 2 {
            inner.ask(until, Happening::Core { core, run });
        }
    }
}

impl Core {
    /// Threads that wait for this processor.
    fn waiting(&self) -> usize {
        self.queue.len() - self.delayed
    }
}

impl Inner {
    fn ask(&mut self, at: Nanos, happening: Happening) {
        self.asked += 1;
        self.queue.push(Reverse((at, self.asked, happening)));
    }

    fn enqueue(&mut self, t: Tid, core: u32) {
        self.asked += 1;
        let thread = &mut self.threads[t.index()];
        thread.entered = self.asked;
        self.queued += usize::from(!thread.delayed);
        let entry = (thread.deadline, thread.entered, t);
        self.cores[core as usize].queue.insert(entry);
    }

    fn remove(&mut self, t: Tid, core: u32) {
        let thread = &self.threads[t.index()];
        let at = &mut self.cores[core as usize];
        at.queue.remove(&(thread.deadline, thread.entered, t));
        at.delayed -= usize::from(thread.delayed);
        self.queued -= usize::from(!thread.delayed);
    }

    /// `place_entity`: a thread is counted among those of a processor, and its lag is as it was, once it is.
    fn place(&mut self, t: Tid, core: u32, now: Nanos, slice: i64) {
        let average = self.average(core, now);
        let thread = &mut self.threads[t.index()];
        let at = &mut self.cores[core as usize];
        thread.ran = match at.able {
            0 => average,
            able => average - thread.lag * (able + 1) / able,
        };
        thread.deadline = thread.ran + slice;
        thread.core = core;
        at.able += 1;
        at.ran += thread.ran;
    }

    /// A thread is counted no longer; its lag is kept.
    fn dequeue(&mut self, t: Tid, core: u32, now: Nanos, most: i64) {
        let average = self.average(core, now);
        let thread = &mut self.threads[t.index()];
        thread.lag = (average - thread.ran).clamp(-most, most);
        let at = &mut self.cores[core as usize];
        at.average = average;
        at.able -= 1;
        at.ran -= thread.ran;
    }

    /// `avg_vruntime`.
    fn average(&self, core: u32, now: Nanos) -> i64 {
        let at = &self.cores[core as usize];
        let running = match at.current {
            Some(_) => now.saturating_sub(at.since) as i64,
            None => 0,
        };
        match at.able {
            0 => at.average,
            n => (at.ran + running) / n,
        }
    }

    /// `pick_eevdf`: the one that is there, if it is protected; or the earliest deadline of one that is eligible.
    fn pick(&self, core: u32, now: Nanos) -> Option<Tid> {
        let average = self.average(core, now);
        let at = &self.cores[core as usize];
        let running = now.saturating_sub(at.since) as i64;
        let current = at.current.filter(|t| {
            let thread = &self.threads[t.index()];
            thread.ran + running <= average
        });
        if let Some(t) = current
            && {
                let thread = &self.threads[t.index()];
                thread.ran + running < thread.protected
            }
        {
            return Some(t);
        }
        let ran = |e: &Entry| self.threads[e.2.index()].ran;
        let eligible = at.queue.iter().find(|e| ran(e) <= average);
        match (current, eligible) {
            (Some(t), Some(e)) if self.threads[t.index()].deadline < e.0 => Some(t),
            (_, Some(e)) => Some(e.2),
            (Some(t), None) => Some(t),
            // (An average is rounded.)
            (None, None) => at
                .queue
                .iter()
                .min_by_key(|e| (ran(e), e.1))
                .map(|e| e.2)
                .or(at.current),
        }
    }

    /// Nobody is on a processor any more.
    fn free(&mut self, core: u32) {
        let at = &mut self.cores[core as usize];
        // (Its time has been brought up to date.)
        at.idle_since = at.since;
        at.current = None;
        at.run += 1;
    }

    /// Takes the time that has gone by from what the current thread has to do.
    fn bring_up_to_date(&mut self, core: usize, now: Nanos) {
        let at = &mut self.cores[core];
        let Some(t) = at.current else { return };
        let gone = now.saturating_sub(at.since);
        at.since += gone;
        at.ran += gone as i64;
        let thread = &mut self.threads[t.index()];
        thread.ran += gone as i64;
        if thread.left < FOREVER / 2 {
            thread.left = thread.left.saturating_sub(gone);
        }
        self.busy += gone;
    }
}

/// What the loop is to do.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Next {
    Step(Tid),
    Alarm(Alarm),
}

#[cfg(test)]
mod tests {
    use super::Newidle;
    use crate::script::{Body, MS, play};

    /// Of many looks, so many in a hundred of which help: how many are made.
    fn looks(helps: u32) -> u32 {
        let mut newidle = Newidle::default();
        let (mut made, mut dice) = (0, 7);
        for no in 0..100_000 {
            dice = (dice * 1_664_525 + 1_013_904_223) % (1u64 << 32);
            let weight = newidle.weight((dice >> 22) as u32);
            made += u32::from(weight.is_some() && no >= 90_000);
            newidle.count(weight.filter(|_| no * 37 % 100 < helps).unwrap_or(0));
        }
        made
    }

    #[test]
    fn an_idle_processor_looks_for_work_as_often_as_that_helps() {
        assert!(looks(100) > 9_000, "{}", looks(100));
        assert!((4_000..6_000).contains(&looks(50)), "{}", looks(50));
        assert!(looks(0) < 100, "{}", looks(0));
    }

    fn works(name: &'static str, after: u64, ns: u64) -> Body {
        Box::new(move |k, t, log| {
            Box::pin(async move {
                k.cpu.sleep(t.tid, after).await;
                k.cpu.work(t.tid, ns).await;
                log.tell(k, name);
            })
        })
    }

    #[test]
    fn one_processor_is_shared_in_slices() {
        let log = play(
            1,
            "faultless",
            MS,
            1 << 20,
            vec![works("a", 0, 10 * MS), works("b", 0, 10 * MS)],
        );
        let (first, last) = (log[0].0, log[1].0);
        assert!((last - 20.0).abs() < 0.1, "{log:?}");
        // Neither waits until the other has done all.
        assert!(first > 15.0, "{log:?}");
    }

    #[test]
    fn as_many_threads_as_processors_do_not_wait() {
        let log = play(
            2,
            "faultless",
            MS,
            1 << 20,
            vec![works("a", 0, 10 * MS), works("b", 0, 10 * MS)],
        );
        assert!(log.iter().all(|l| (l.0 - 10.0).abs() < 0.05), "{log:?}");
    }

    /// DELAY_DEQUEUE: a short sleep is not forgiven.
    #[test]
    fn one_that_has_had_more_than_its_share_waits_although_it_sleeps_at_times() {
        // Each second computation of the one comes after a sleep that is far shorter than what it has had more.
        let sleeper: Body = Box::new(|k, t, log| {
            Box::pin(async move {
                for _ in 0..20 {
                    k.cpu.work(t.tid, MS).await;
                    k.cpu.sleep(t.tid, MS / 100).await;
                }
                log.tell(k, "sleeper");
            })
        });
        let log = play(
            1,
            "faultless",
            MS,
            1 << 20,
            vec![sleeper, works("hog", 0, 20 * MS)],
        );
        // Both get half of the processor, to about a slice.
        let first = log[0].0;
        assert!((36.0..=41.0).contains(&first), "{log:?}");
    }

    #[test]
    fn one_that_slept_runs_when_a_slice_is_used_up() {
        let log = play(
            1,
            "faultless",
            MS,
            1 << 20,
            vec![
                works("hog", MS / 10, 50 * MS),
                works("slept", 3 * MS, MS / 10),
            ],
        );
        // The hog has had more than its slice of 1.4 ms when the other wakes.
        assert_eq!(log[0].1, "slept");
        assert!((log[0].0 - 3.1).abs() < 0.05, "{log:?}");
    }
}
