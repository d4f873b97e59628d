//! Calls that need something to stay as it is, and a thread that would change it.
//!
//! A call is counted *first*, and then waits until no thread changes anything. A thread that would change something says so *first*, and then
//! looks whether a call is counted. Both steps are in one order that all threads agree on, so one of the two sees the other. Calls come
//! often and wait for one short change at most; the thread that changes never waits. The model at the end of this file checks it.

use crate::base::primitive::{AtomicBool, AtomicUsize, Ordering};

/// How many calls hold it, and whether a thread changes it.
#[derive(Debug)]
pub(crate) struct Holders {
    calls: AtomicUsize,
    changing: AtomicBool,
}

/// While this lives, it may be changed.
pub(crate) struct Changing<'a>(&'a Holders);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.changing.store(false, Ordering::SeqCst);
    }
}

impl Holders {
    /// Changing from the beginning: the thread that makes it calls [`first`](Self::first).
    pub(crate) fn changing() -> Self {
        Holders {
            calls: AtomicUsize::new(0),
            changing: AtomicBool::new(true),
        }
    }

    /// The permission that it was made with. To be called once.
    pub(crate) fn first(&self) -> Changing<'_> {
        Changing(self)
    }

    /// Keeps it from being changed until [`release`](Self::release). `nap` is called while a thread still changes it, and says whether that
    /// thread may exist.
    pub(crate) fn hold(&self, mut nap: impl FnMut() -> bool) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        self.wait(&mut nap);
    }

    /// Waits for a thread that changes it. The caller has seen to it that no other begins to: by what `others` says in
    /// [`change`](Self::change).
    pub(crate) fn wait(&self, mut nap: impl FnMut() -> bool) {
        while self.changing.load(Ordering::SeqCst) {
            if !nap() {
                return;
            }
        }
    }

    pub(crate) fn release(&self) {
        self.calls.fetch_sub(1, Ordering::SeqCst);
    }

    /// Permission to change it. `None` if a call holds it, or `others` says so of calls that hold more, or another thread is at it.
    pub(crate) fn change(&self, others: impl Fn() -> bool) -> Option<Changing<'_>> {
        if self.changing.swap(true, Ordering::SeqCst) {
            return None;
        }
        let permission = Changing(self);
        // (Adding nothing reads the newest value, in the order that all threads agree on.)
        let held = self.calls.fetch_add(0, Ordering::SeqCst) > 0 || others();
        (!held).then_some(permission)
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// A call that holds it, and a thread that would change it: neither sees the other's half.
    #[test]
    fn what_a_call_holds_does_not_change() {
        loom::model(|| {
            let holders = Arc::new(Holders::changing());
            drop(holders.first());
            let thing = Arc::new(AtomicUsize::new(0));
            let changes = {
                let (holders, thing) = (holders.clone(), thing.clone());
                thread::spawn(move || {
                    if let Some(_permission) = holders.change(|| false) {
                        thing.store(1, Ordering::Relaxed);
                        thing.store(2, Ordering::Relaxed);
                    }
                })
            };
            holders.hold(|| {
                thread::yield_now();
                true
            });
            let seen = [(); 2].map(|()| thing.load(Ordering::Relaxed));
            assert!(seen[0] == seen[1] && seen[0] != 1, "{seen:?}");
            holders.release();
            changes.join().unwrap();
        });
    }
}
