//! The world of a run, and the machine that the engine sees.

#![allow(
    unsafe_code,
    reason = "one world for the process, which has one thread"
)]

use crate::kernel::Kernel;
use crate::plan::Plan;
use crate::rng::Rng;
use crate::scheduler::{self, Scheduler, State};
use faultless_sys::simulated::{Body, Machine};
use std::cell::UnsafeCell;
use std::ffi::CStr;
use std::io;

/// All that there is.
pub(crate) struct World {
    pub(crate) plan: Plan,
    pub(crate) rng: Rng,
    /// Nanoseconds of the monotonic clock.
    pub(crate) clock: u64,
    pub(crate) scheduler: Scheduler,
    pub(crate) kernel: Kernel,
    /// While it is not zero, no thread but the running one gets its turn: the oracle looks.
    pub(crate) quiet: u32,
    /// The run has failed, and is being described.
    pub(crate) failed: bool,
    /// Accesses and calls so far.
    pub(crate) steps: u64,
    /// Operations of the program that have ended.
    pub(crate) operations: u64,
    /// When the budget was last changed.
    pub(crate) resized_at: u64,
    /// Each call is told on the standard error output.
    pub(crate) trace: bool,
    /// How often a thread was taken out of what it did.
    pub(crate) abandoned: u32,
    /// Some map has kept what it had when its lease was broken.
    pub(crate) kept_maps: bool,
    /// Bytes that can be pinned beyond the budget.
    pub(crate) largest_pins: u64,
}

struct Slot(UnsafeCell<Option<World>>);
// SAFETY: the process has one thread.
unsafe impl Sync for Slot {}
static WORLD: Slot = Slot(UnsafeCell::new(None));

/// Makes the world of a run.
pub(crate) fn create(plan: Plan) {
    let world = World {
        rng: Rng::new(plan.seed ^ 0x5EED),
        clock: 1_000_000_000,
        scheduler: Scheduler::default(),
        kernel: Kernel::new(&plan),
        quiet: 0,
        failed: false,
        steps: 0,
        operations: 0,
        resized_at: 0,
        trace: false,
        abandoned: 0,
        kept_maps: false,
        largest_pins: 0,
        plan,
    };
    // SAFETY: the only thread, before anything else looks.
    unsafe { *WORLD.0.get() = Some(world) };
    faultless_sys::simulated::install(&MACHINE);
}

/// Looks at the world, or changes it. `f` must not let another thread have its turn.
pub(crate) fn with<R>(f: impl FnOnce(&mut World) -> R) -> R {
    // SAFETY: one thread, and no two of these are nested: what is called in here makes no system call and no switch.
    let world = unsafe { &mut *WORLD.0.get() };
    f(world.as_mut().expect("a world"))
}

/// Ends the run: something is wrong.
pub(crate) fn fail(what: &str) -> ! {
    let (seed, clock, steps, threads) =
        with(|w| (w.plan.seed, w.clock, w.steps, w.scheduler.describe()));
    let pool = match with(|w| std::mem::replace(&mut w.failed, true)) {
        true => String::new(),
        false => quietly(crate::workload::describe),
    };
    let secs = clock as f64 / 1e9;
    eprintln!("seed {seed}: {what}\n  at {secs:.6} s, step {steps}\n  {pool}\n{threads}");
    // SAFETY: ends the process, and nothing is to be cleaned up.
    unsafe { libc::_exit(1) }
}

/// Runs `f` while no other thread gets its turn.
pub(crate) fn quietly<R>(f: impl FnOnce() -> R) -> R {
    with(|w| w.quiet += 1);
    let result = f();
    with(|w| w.quiet -= 1);
    result
}

struct Simulated;
static MACHINE: Simulated = Simulated;

impl Machine for Simulated {
    fn syscall(&self, nr: libc::c_long, args: [usize; 6]) -> isize {
        self.step();
        crate::kernel::call(nr, args)
    }

    fn now_ns(&self) -> u64 {
        with(|w| {
            w.clock += 30;
            w.clock
        })
    }

    fn processor(&self) -> usize {
        with(|w| w.scheduler.current as usize % 4)
    }

    fn step(&self) {
        scheduler::step();
    }

    fn until(&self, what: &'static str, ready: &dyn Fn() -> bool) {
        scheduler::until(what, ready);
    }

    fn holds(&self, locks: i32) {
        with(|w| {
            if let Some(t) = w.scheduler.running() {
                t.locks += locks;
            }
        });
    }

    fn spawn(&self, name: &'static CStr, body: Body) -> io::Result<u32> {
        let name = name.to_str().unwrap_or("engine").to_owned();
        Ok(scheduler::spawn(name, body))
    }

    fn join(&self, thread: u32) {
        let ended =
            move || with(|w| matches!(w.scheduler.threads[thread as usize].state, State::Dead));
        scheduler::until("the end of a thread", &ended);
    }

    fn this_thread(&self) -> u32 {
        with(|w| w.scheduler.current)
    }

    fn text(&self, path: &str) -> Option<String> {
        with(|w| w.kernel.text(path))
    }
}
