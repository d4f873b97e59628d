//! A kernel that can be faked: under `--cfg faultless_sim`, every system call of this crate goes to a [`Machine`] instead, and so do
//! the clock, the number of the processor, and the creation of threads. The code above is the code that ships.
//!
//! A machine runs all of its threads on one thread of the process, one at a time. It may switch between them at each system call
//! and at each access to one of the [atomics](AtomicU32) and [locks](Mutex) of this module, which stand in for the standard library's.

#![allow(
    unsafe_code,
    reason = "one machine for the process, and locks of its own"
)]
#![allow(
    missing_docs,
    reason = "the standard library's interfaces, as far as the engine uses them"
)]

use core::cell::UnsafeCell;
use std::collections::VecDeque;
use std::ffi::CStr;
use std::io;
use std::sync::{Arc, LockResult, PoisonError};

pub use std::sync::atomic::{Ordering, fence};

/// What a thread is to do.
pub type Body = Box<dyn FnOnce() + Send>;

/// A kernel, its machine and its scheduler.
pub trait Machine {
    /// Makes a system call for the running thread.
    fn syscall(&self, nr: libc::c_long, args: [usize; 6]) -> isize;
    /// The monotonic clock.
    fn now_ns(&self) -> u64;
    /// The processor that the running thread is on.
    fn processor(&self) -> usize;
    /// The running thread is about to access memory that others access.
    fn step(&self);
    /// The running thread sleeps until something is the case.
    fn until(&self, what: &'static str, ready: &dyn Fn() -> bool);
    /// The running thread took a lock, or gave one back.
    fn holds(&self, locks: i32);
    /// Starts a thread, which is named by the result.
    fn spawn(&self, name: &'static CStr, body: Body) -> io::Result<u32>;
    /// Waits for the end of a thread.
    fn join(&self, thread: u32);
    /// The running thread.
    fn this_thread(&self) -> u32;
    /// What a file of the kernel's says.
    fn text(&self, path: &str) -> Option<String>;
}

struct Slot(UnsafeCell<Option<&'static dyn Machine>>);
// SAFETY: a machine and all that it runs are on one thread.
unsafe impl Sync for Slot {}
static MACHINE: Slot = Slot(UnsafeCell::new(None));

/// Sets the machine of this process, which has one thread.
pub fn install(machine: &'static dyn Machine) {
    // SAFETY: no other thread is here.
    unsafe { *MACHINE.0.get() = Some(machine) };
}

/// The machine.
pub fn machine() -> &'static dyn Machine {
    try_machine().expect("a machine is installed before the engine runs")
}

fn try_machine() -> Option<&'static dyn Machine> {
    // SAFETY: written once, by the only thread, before all else.
    unsafe { *MACHINE.0.get() }
}

fn step() {
    if let Some(machine) = try_machine() {
        machine.step();
    }
}

macro_rules! atomic {
    ($name:ident, $inner:ty) => {
        #[derive(Debug, Default)]
        #[repr(transparent)]
        pub struct $name(std::sync::atomic::$name);

        impl $name {
            pub const fn new(value: $inner) -> Self {
                $name(std::sync::atomic::$name::new(value))
            }
            /// The word as the system calls of this crate take it.
            pub fn real(&self) -> &std::sync::atomic::$name {
                &self.0
            }
            pub fn as_ptr(&self) -> *mut $inner {
                self.0.as_ptr()
            }
            pub fn load(&self, order: Ordering) -> $inner {
                step();
                self.0.load(order)
            }
            pub fn store(&self, value: $inner, order: Ordering) {
                step();
                self.0.store(value, order)
            }
            pub fn swap(&self, value: $inner, order: Ordering) -> $inner {
                step();
                self.0.swap(value, order)
            }
            pub fn compare_exchange(
                &self,
                from: $inner,
                to: $inner,
                good: Ordering,
                bad: Ordering,
            ) -> Result<$inner, $inner> {
                step();
                self.0.compare_exchange(from, to, good, bad)
            }
            pub fn compare_exchange_weak(
                &self,
                from: $inner,
                to: $inner,
                good: Ordering,
                bad: Ordering,
            ) -> Result<$inner, $inner> {
                step();
                self.0.compare_exchange(from, to, good, bad)
            }
            pub fn fetch_update(
                &self,
                good: Ordering,
                bad: Ordering,
                f: impl FnMut($inner) -> Option<$inner>,
            ) -> Result<$inner, $inner> {
                step();
                self.0.fetch_update(good, bad, f)
            }
        }
    };
}

macro_rules! arithmetic {
    ($name:ident, $inner:ty, $($f:ident)*) => {
        atomic!($name, $inner);
        impl $name {
            $(pub fn $f(&self, value: $inner, order: Ordering) -> $inner {
                step();
                self.0.$f(value, order)
            })*
        }
    };
}

atomic!(AtomicBool, bool);
arithmetic!(AtomicU8, u8, fetch_add fetch_sub);
arithmetic!(AtomicI32, i32, fetch_add fetch_sub);
arithmetic!(AtomicI64, i64, fetch_add fetch_sub);
arithmetic!(AtomicU32, u32, fetch_add fetch_sub fetch_and fetch_or fetch_max);
arithmetic!(AtomicU64, u64, fetch_add fetch_sub fetch_and fetch_or fetch_max);
arithmetic!(AtomicUsize, usize, fetch_add fetch_sub fetch_and fetch_or fetch_max);

#[derive(Debug)]
#[repr(transparent)]
pub struct AtomicPtr<T>(std::sync::atomic::AtomicPtr<T>);

impl<T> Default for AtomicPtr<T> {
    fn default() -> Self {
        Self::new(core::ptr::null_mut())
    }
}

impl<T> AtomicPtr<T> {
    pub const fn new(value: *mut T) -> Self {
        AtomicPtr(std::sync::atomic::AtomicPtr::new(value))
    }
    pub fn load(&self, order: Ordering) -> *mut T {
        step();
        self.0.load(order)
    }
    pub fn store(&self, value: *mut T, order: Ordering) {
        step();
        self.0.store(value, order)
    }
    pub fn swap(&self, value: *mut T, order: Ordering) -> *mut T {
        step();
        self.0.swap(value, order)
    }
    pub fn compare_exchange(
        &self,
        from: *mut T,
        to: *mut T,
        good: Ordering,
        bad: Ordering,
    ) -> Result<*mut T, *mut T> {
        step();
        self.0.compare_exchange(from, to, good, bad)
    }
}

/// A lock between threads of the machine.
#[derive(Debug, Default)]
pub struct Mutex<T> {
    locked: std::sync::atomic::AtomicBool,
    value: UnsafeCell<T>,
}

// SAFETY: the guard alone reaches the value, and there is one at a time.
unsafe impl<T: Send> Sync for Mutex<T> {}
// SAFETY: owns the value.
unsafe impl<T: Send> Send for Mutex<T> {}

/// Who has the lock.
#[derive(Debug)]
pub struct MutexGuard<'a, T>(&'a Mutex<T>);

impl<T> Mutex<T> {
    pub const fn new(value: T) -> Self {
        Mutex {
            locked: std::sync::atomic::AtomicBool::new(false),
            value: UnsafeCell::new(value),
        }
    }

    pub fn lock(&self) -> LockResult<MutexGuard<'_, T>> {
        if let Some(machine) = try_machine() {
            machine.step();
            machine.until("a lock", &|| !self.locked.load(Ordering::Relaxed));
            machine.holds(1);
        }
        self.locked.store(true, Ordering::Relaxed);
        Ok::<_, PoisonError<_>>(MutexGuard(self))
    }
}

impl<T> core::ops::Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: this guard is the only one.
        unsafe { &*self.0.value.get() }
    }
}

impl<T> core::ops::DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: this guard is the only one, and is borrowed for writing.
        unsafe { &mut *self.0.value.get() }
    }
}

impl<T> Drop for MutexGuard<'_, T> {
    fn drop(&mut self) {
        self.0.locked.store(false, Ordering::Relaxed);
        if let Some(machine) = try_machine() {
            machine.holds(-1);
            machine.step();
        }
    }
}

/// A value that is set once.
#[derive(Debug, Default)]
pub struct OnceLock<T>(std::sync::OnceLock<T>);

impl<T> OnceLock<T> {
    pub const fn new() -> Self {
        OnceLock(std::sync::OnceLock::new())
    }
    pub fn get(&self) -> Option<&T> {
        step();
        self.0.get()
    }
    pub fn set(&self, value: T) -> Result<(), T> {
        step();
        self.0.set(value)
    }
    pub fn wait(&self) -> &T {
        machine().until("a value that is set once", &|| self.0.get().is_some());
        self.0.get().expect("waited for")
    }
}

/// Channels, as `std::sync::mpsc` has them.
pub mod mpsc {
    use super::*;

    struct Shared<T> {
        queue: UnsafeCell<VecDeque<T>>,
        senders: std::sync::atomic::AtomicUsize,
        receiver: std::sync::atomic::AtomicBool,
    }
    // SAFETY: a machine and all that it runs are on one thread.
    unsafe impl<T: Send> Sync for Shared<T> {}
    // SAFETY: owns the values.
    unsafe impl<T: Send> Send for Shared<T> {}

    pub struct Sender<T>(Arc<Shared<T>>);
    pub struct Receiver<T>(Arc<Shared<T>>);
    /// The receiver is gone.
    #[derive(Debug)]
    pub struct SendError<T>(pub T);
    /// All senders are gone.
    #[derive(Debug)]
    pub struct RecvError;

    pub fn channel<T>() -> (Sender<T>, Receiver<T>) {
        let shared = Arc::new(Shared {
            queue: UnsafeCell::default(),
            senders: 1.into(),
            receiver: true.into(),
        });
        (Sender(shared.clone()), Receiver(shared))
    }

    impl<T> Sender<T> {
        pub fn send(&self, value: T) -> Result<(), SendError<T>> {
            step();
            if !self.0.receiver.load(Ordering::Relaxed) {
                return Err(SendError(value));
            }
            // SAFETY: no other thread is here, and no reference into the queue outlives a call.
            unsafe { (*self.0.queue.get()).push_back(value) };
            Ok(())
        }
    }

    impl<T> Clone for Sender<T> {
        fn clone(&self) -> Self {
            self.0.senders.fetch_add(1, Ordering::Relaxed);
            Sender(self.0.clone())
        }
    }

    impl<T> Drop for Sender<T> {
        fn drop(&mut self) {
            self.0.senders.fetch_sub(1, Ordering::Relaxed);
        }
    }

    impl<T> Receiver<T> {
        pub fn try_recv(&self) -> Option<T> {
            step();
            // SAFETY: as in `send`.
            unsafe { (*self.0.queue.get()).pop_front() }
        }

        pub fn recv(&self) -> Result<T, RecvError> {
            let gone = || self.0.senders.load(Ordering::Relaxed) == 0;
            // SAFETY: as in `send`.
            let empty = || unsafe { (*self.0.queue.get()).is_empty() };
            machine().until("a message", &|| !empty() || gone());
            // SAFETY: as in `send`.
            unsafe { (*self.0.queue.get()).pop_front() }.ok_or(RecvError)
        }
    }

    impl<T> IntoIterator for Receiver<T> {
        type Item = T;
        type IntoIter = IntoIter<T>;
        fn into_iter(self) -> IntoIter<T> {
            IntoIter(self)
        }
    }

    pub struct IntoIter<T>(Receiver<T>);

    impl<T> Iterator for IntoIter<T> {
        type Item = T;
        fn next(&mut self) -> Option<T> {
            self.0.recv().ok()
        }
    }

    impl<T> Drop for Receiver<T> {
        fn drop(&mut self) {
            self.0.receiver.store(false, Ordering::Relaxed);
        }
    }
}
