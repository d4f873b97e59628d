//! The scheduler: threads are coroutines of one thread of the process, and chance says which has its turn.

#![allow(unsafe_code, reason = "keeps the way back to the scheduler by address")]

use crate::plan::{Policy, STEPS_MAX};
use crate::world::{self, fail};
use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::fmt::Write as _;

/// How often threads are taken out of what they do: what they had pinned stays so.
const ABANDONED_MAX: u32 = 5;
/// Bytes of a thread's stack.
const STACK: usize = 512 << 10;

type Routine = Coroutine<(), (), (), DefaultStack>;

/// What a thread waits for.
pub(crate) enum State {
    Ready,
    /// Until this time, at the latest, or until it is woken.
    Asleep {
        until: u64,
        word: Option<usize>,
    },
    /// Until something is the case. (The closure lies on the thread's own stack.)
    Until(&'static str, *const dyn Fn() -> bool),
    Dead,
}

/// A thread.
pub(crate) struct Thread {
    pub(crate) name: String,
    pub(crate) state: State,
    routine: Option<Routine>,
    yielder: *const Yielder<(), ()>,
    /// Which table of descriptors it has.
    pub(crate) table: usize,
    /// Its mask of blocked signals, and those that are pending.
    pub(crate) mask: u64,
    pub(crate) pending: u64,
    /// Locks of the engine that it has.
    pub(crate) locks: i32,
    /// It is in the kernel.
    pub(crate) in_kernel: bool,
    /// How deep it is in handlers.
    pub(crate) handlers: u32,
    /// What to do instead, if it is taken out of what it does by a signal: for threads of the program, in operations that must
    /// bear that.
    pub(crate) detour: Option<fn()>,
    /// What it does.
    pub(crate) doing: String,
    /// When it began that.
    pub(crate) since: u64,
    priority: u64,
}

/// All threads. The number of a thread is its place here; numbers are not used again.
#[derive(Default)]
pub(crate) struct Scheduler {
    pub(crate) threads: Vec<Thread>,
    pub(crate) current: u32,
    running: bool,
    /// The running thread is taken out of what it does, and goes on with this.
    abandon: Option<fn()>,
    pub(crate) switches: u64,
}

/// Thread ids begin here.
pub(crate) const TID_BASE: u32 = 1000;

impl Scheduler {
    /// The thread that has its turn, if one has.
    pub(crate) fn running(&mut self) -> Option<&mut Thread> {
        if !self.running {
            return None;
        }
        self.threads.get_mut(self.current as usize)
    }

    /// The same, where one must.
    pub(crate) fn me(&mut self) -> &mut Thread {
        let current = self.current as usize;
        &mut self.threads[current]
    }

    pub(crate) fn by_tid(&mut self, tid: u32) -> Option<&mut Thread> {
        let at = tid.checked_sub(TID_BASE)? as usize;
        let thread = self.threads.get_mut(at)?;
        (!matches!(thread.state, State::Dead)).then_some(thread)
    }

    /// What all threads are at.
    pub(crate) fn describe(&self) -> String {
        let mut text = String::new();
        for (i, t) in self.threads.iter().enumerate() {
            let state = match &t.state {
                State::Ready => "can run".to_owned(),
                State::Asleep { until, word: None } => format!("sleeps until {until}"),
                State::Asleep {
                    until,
                    word: Some(w),
                } => format!("waits for {w:#x} until {until}"),
                State::Until(what, _) => format!("waits for {what}"),
                State::Dead => continue,
            };
            let _ = writeln!(text, "  thread {i} {}: {} ({state})", t.name, t.doing);
        }
        text
    }
}

/// Starts a thread. It shares the running one's descriptors.
pub(crate) fn spawn(name: String, body: Box<dyn FnOnce() + Send>) -> u32 {
    let stack = DefaultStack::new(STACK).expect("memory for a stack");
    world::with(|w| {
        let number = w.scheduler.threads.len() as u32;
        let routine = routine(number, stack, body);
        let (table, mask) = w.scheduler.running().map_or((0, 0), |t| (t.table, t.mask));
        w.scheduler.threads.push(Thread {
            name,
            state: State::Ready,
            routine: Some(routine),
            yielder: std::ptr::null(),
            table,
            mask,
            pending: 0,
            locks: 0,
            in_kernel: false,
            handlers: 0,
            detour: None,
            doing: String::new(),
            since: w.clock,
            priority: w.rng.next(),
        });
        number
    })
}

fn routine(number: u32, stack: DefaultStack, body: Box<dyn FnOnce() + Send>) -> Routine {
    Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
        world::with(|w| w.scheduler.threads[number as usize].yielder = yielder);
        body();
    })
}

/// Gives the turn back, in the state that the caller has set.
fn suspend() {
    let yielder = world::with(|w| w.scheduler.me().yielder);
    // SAFETY: the running thread's own, which lives as long as its routine.
    unsafe { (*yielder).suspend(()) };
}

/// The running thread is at a point where another may get its turn.
pub(crate) fn step() {
    enum Next {
        GoOn,
        Switch,
        TooLong,
    }
    let next = world::with(|w| {
        if w.quiet > 0 || !w.scheduler.running {
            return Next::GoOn;
        }
        w.steps += 1;
        w.clock += 15;
        if w.steps > STEPS_MAX {
            return Next::TooLong;
        }
        let jump = w.plan.faults.abandoned;
        if let Some(detour) = w.scheduler.me().detour
            && jump > 0
            && w.scheduler.me().mask == 0
            && w.scheduler.me().locks == 0
            && w.scheduler.me().handlers == 0
            && !w.scheduler.me().in_kernel
            && w.abandoned < ABANDONED_MAX
            && w.rng.once_in(jump)
        {
            w.abandoned += 1;
            w.scheduler.abandon = Some(detour);
            return Next::Switch;
        }
        let switch = match w.plan.policy {
            Policy::Random(n) => w.rng.once_in(n),
            Policy::Priorities(n) => {
                if w.rng.once_in(n) {
                    w.scheduler.me().priority = w.rng.next();
                }
                w.rng.once_in(10)
            }
        };
        if switch { Next::Switch } else { Next::GoOn }
    });
    match next {
        Next::GoOn => {}
        Next::Switch => suspend(),
        Next::TooLong => fail("it does not come to an end"),
    }
}

/// The running thread lets others run first.
pub(crate) fn give_way() {
    world::with(|w| {
        w.clock += 100;
        // Below all others for now: a thread that spins must not keep the one out that it waits for.
        w.scheduler.me().priority >>= 8;
    });
    suspend();
}

/// Sleeps until a time. Returns early if it is told to.
pub(crate) fn sleep(ns: u64) {
    world::with(|w| {
        let ns = if w.rng.once_in(w.plan.faults.interrupted) {
            w.rng.below(ns.max(1))
        } else {
            ns
        };
        let until = w.clock + ns;
        w.scheduler.me().state = State::Asleep { until, word: None };
    });
    suspend();
}

/// Sleeps on a word. Returns whether the time was up.
pub(crate) fn wait(word: usize, ns: u64) -> bool {
    let until = world::with(|w| {
        let until = w.clock.saturating_add(ns);
        w.scheduler.me().state = State::Asleep {
            until,
            word: Some(word),
        };
        until
    });
    suspend();
    world::with(|w| w.clock >= until)
}

/// Wakes up to `n` threads that sleep on a word.
pub(crate) fn wake(word: usize, n: usize) {
    world::with(|w| {
        let sleeping: Vec<usize> = (0..w.scheduler.threads.len())
            .filter(|&i| matches!(w.scheduler.threads[i].state, State::Asleep { word: Some(x), .. } if x == word))
            .collect();
        // In any order.
        let turn = if sleeping.is_empty() {
            0
        } else {
            w.rng.below(sleeping.len() as u64) as usize
        };
        for i in (0..sleeping.len().min(n)).map(|k| sleeping[(turn + k) % sleeping.len()]) {
            w.scheduler.threads[i].state = State::Ready;
        }
    });
}

/// Sleeps until something is the case.
pub(crate) fn until(what: &'static str, ready: &dyn Fn() -> bool) {
    while !ready() {
        if world::with(|w| !w.scheduler.running || w.quiet > 0) {
            fail(&format!("the oracle would wait for {what}"));
        }
        // SAFETY: only the lifetime changes. The closure lives while this thread waits here, and is called by the scheduler in that time alone.
        let ready: &'static dyn Fn() -> bool = unsafe { std::mem::transmute(ready) };
        world::with(|w| w.scheduler.me().state = State::Until(what, ready));
        suspend();
    }
}

/// Whose turn it is, if it is anybody's now.
fn pick() -> Option<usize> {
    let closures: Vec<(usize, *const dyn Fn() -> bool)> = world::with(|w| {
        let threads = w.scheduler.threads.iter().enumerate();
        let waiting = threads.filter_map(|(i, t)| match t.state {
            State::Until(_, ready) => Some((i, ready)),
            _ => None,
        });
        waiting.collect()
    });
    for (i, ready) in closures {
        // SAFETY: on the stack of a thread that waits for it.
        if unsafe { (*ready)() } {
            world::with(|w| w.scheduler.threads[i].state = State::Ready);
        }
    }
    world::with(|w| {
        let clock = w.clock;
        for t in &mut w.scheduler.threads {
            if matches!(t.state, State::Asleep { until, .. } if until <= clock) {
                t.state = State::Ready;
            }
        }
        let ready: Vec<usize> = (0..w.scheduler.threads.len())
            .filter(|&i| matches!(w.scheduler.threads[i].state, State::Ready))
            .collect();
        match (ready.as_slice(), w.plan.policy) {
            ([], _) => None,
            (some, Policy::Random(_)) => Some(*w.rng.pick(some)),
            (some, Policy::Priorities(_)) => some
                .iter()
                .copied()
                .max_by_key(|&i| w.scheduler.threads[i].priority),
        }
    })
}

/// Lets time pass until a thread wakes. `false` if none ever will.
fn pass_time() -> bool {
    world::with(|w| {
        let times = w.scheduler.threads.iter().filter_map(|t| match t.state {
            State::Asleep { until, .. } => Some(until),
            _ => None,
        });
        let Some(next) = times.min() else {
            return false;
        };
        w.clock = w.clock.max(next);
        true
    })
}

/// Runs threads until the first one has ended.
pub(crate) fn run() {
    loop {
        let Some(next) = pick() else {
            if !pass_time() {
                fail("all threads wait for ever");
            }
            continue;
        };
        let mut routine = world::with(|w| {
            w.scheduler.current = next as u32;
            w.scheduler.running = true;
            w.scheduler.switches += 1;
            w.scheduler.threads[next]
                .routine
                .take()
                .expect("it is not running")
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| routine.resume(())));
        let abandoned = world::with(|w| {
            w.scheduler.running = false;
            w.scheduler.abandon.take()
        });
        match result {
            Err(_) => fail("a thread panicked"),
            Ok(CoroutineResult::Return(())) => {
                world::with(|w| w.scheduler.threads[next].state = State::Dead);
                if next == 0 {
                    return;
                }
            }
            Ok(CoroutineResult::Yield(())) => match abandoned {
                None => world::with(|w| w.scheduler.threads[next].routine = Some(routine)),
                Some(detour) => take_out(next, routine, detour),
            },
        }
    }
}

/// A thread leaves all that it was in the middle of, as by `siglongjmp`: no destructor runs. Its stack stays as it is.
fn take_out(number: usize, routine: Routine, detour: fn()) {
    std::mem::forget(routine);
    let stack = DefaultStack::new(STACK).expect("memory for a stack");
    let routine = self::routine(number as u32, stack, Box::new(detour));
    world::with(|w| w.scheduler.threads[number].routine = Some(routine));
}
