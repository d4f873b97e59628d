//! EFAULT of system calls, counted without a lock: those that were mended here, and those that the kernel counts.

#![allow(unsafe_code, reason = "a list of static counters")]

use crate::state;
use faultless::standin;
use faultless_run::Efaults;
use faultless_sys::{file, perf, raw};
use std::ffi::c_int;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};

/// EFAULT from one function, counted without a lock.
pub(crate) struct Counter {
    name: &'static str,
    count: AtomicU64,
    mended: bool,
    next: AtomicPtr<Counter>,
}

static COUNTERS: AtomicPtr<Counter> = AtomicPtr::new(std::ptr::null_mut());

impl Counter {
    pub(crate) const fn new(name: &'static str, mended: bool) -> Self {
        Counter {
            name,
            count: AtomicU64::new(0),
            mended,
            next: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    pub(crate) fn add(&'static self) {
        if self.count.fetch_add(1, Ordering::Relaxed) > 0 {
            return;
        }
        // The first time: into the list.
        let me = std::ptr::from_ref(self).cast_mut();
        let mut head = COUNTERS.load(Ordering::Acquire);
        loop {
            self.next.store(head, Ordering::Relaxed);
            match COUNTERS.compare_exchange(head, me, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(other) => head = other,
            }
        }
    }
}

/// What was counted.
pub(crate) fn efaults() -> Vec<Efaults> {
    let mut all = Vec::new();
    let mut at = COUNTERS.load(Ordering::Acquire);
    // SAFETY: counters are static.
    while let Some(counter) = unsafe { at.as_ref() } {
        all.push(Efaults {
            call: counter.name.to_owned(),
            count: counter.count.load(Ordering::Relaxed),
            mended: counter.mended,
        });
        at = counter.next.load(Ordering::Acquire);
    }
    for (call, counter, pid) in WATCHED.get().into_iter().flatten() {
        // A child's copy counts its parent's; and the program may have put something else there.
        if *pid != raw::getpid() || !counter.is_there() {
            continue;
        }
        // The engine's threads descend from the program's, and are counted with them.
        let own = match call.as_str() {
            "pwritev" => standin::own_efaults(),
            _ => 0,
        };
        let count = counter.read().unwrap_or(0).saturating_sub(own);
        if count > 0 {
            all.push(Efaults {
                call: call.clone(),
                count,
                mended: false,
            });
        }
    }
    all.sort_by(|a, b| a.call.cmp(&b.call));
    all
}

/// EFAULT of system calls, whoever made them: counted by the kernel.
static WATCHED: OnceLock<Vec<(String, perf::Counter, u32)>> = OnceLock::new();

static WATCHING: AtomicBool = AtomicBool::new(false);

/// Whether a number is the descriptor of one of these counters.
#[inline]
pub(crate) fn watches(fd: c_int) -> bool {
    WATCHING.load(Ordering::Relaxed) && is_watched(fd)
}

#[cold]
fn is_watched(fd: c_int) -> bool {
    let mut all = WATCHED.get().into_iter().flatten();
    all.any(|(_, counter, _)| counter.number() == fd && counter.is_there())
}

/// Has the kernel count them from now on, in this thread and those that it starts.
pub(crate) fn watch() {
    /// Numbers of these descriptors are at least this, out of the program's way.
    const FLOOR: i32 = 500;
    let room = file::descriptor_limit(None).is_ok_and(|l| l.soft > 2 * FLOOR as u64);
    let settings = state::settings().filter(|s| room && !s.efault_tracepoints.is_empty());
    let Some(settings) = settings else {
        return;
    };
    let open = |(call, id): &(String, u64)| {
        let mut counter = perf::Counter::tracepoint(*id, perf::Scope::ThreadAndDescendants).ok()?;
        counter.filter(c"ret == -14").ok()?;
        counter.lift(FLOOR);
        Some((call.clone(), counter, raw::getpid()))
    };
    if let Some(all) = settings.efault_tracepoints.iter().map(open).collect() {
        let _ = WATCHED.set(all);
        WATCHING.store(true, Ordering::Relaxed);
    }
}

/// Whether they are counted.
pub(crate) fn watched() -> bool {
    WATCHED.get().is_some()
}
