//! The door to something that may be taken away while others use it.
//!
//! * Who goes in announces itself in one of the gate's counters, *then* looks whether something is behind the gate.
//! * Who shuts the gate takes the thing away, *then* waits until all counters are zero.
//!
//! Both steps are sequentially consistent, so either the one who enters sees the thing gone, or the one who shuts sees
//! somebody inside. Gates are never freed, and may be used again. The model at the end of this file checks it.

#![allow(unsafe_code, reason = "dereferences what the gate protects")]

use crate::base::primitive::{AtomicPtr, AtomicU32, Ordering};

/// Counters of those inside, spread by processor.
#[cfg(not(loom))]
pub(crate) const USER_SHARDS: usize = 16;
#[cfg(loom)]
pub(crate) const USER_SHARDS: usize = 2;

#[derive(Debug)]
#[repr(align(64))]
struct Users(AtomicU32);

/// A gate, with a `T` behind it or nothing.
#[derive(Debug)]
pub(crate) struct Gate<T> {
    thing: AtomicPtr<T>,
    users: [Users; USER_SHARDS],
}

impl<T> Default for Gate<T> {
    fn default() -> Self {
        Gate {
            thing: AtomicPtr::new(std::ptr::null_mut()),
            users: std::array::from_fn(|_| Users(AtomicU32::new(0))),
        }
    }
}

#[cfg(not(loom))]
impl<T> Gate<T> {
    /// With nothing behind it.
    pub(crate) const fn new() -> Self {
        Gate {
            thing: AtomicPtr::new(std::ptr::null_mut()),
            users: [const { Users(AtomicU32::new(0)) }; USER_SHARDS],
        }
    }

    /// Takes the thing away, and does not wait for threads that are inside: what is taken may be freed when the gate is
    /// [`vacant`](Self::vacant).
    pub(crate) fn take(&self) -> *mut T {
        self.thing.swap(std::ptr::null_mut(), Ordering::SeqCst)
    }

    /// Forgets the threads that were inside: in the child of a fork, which has only the one that calls.
    #[cfg_attr(
        faultless_sim,
        allow(dead_code, reason = "a simulated fork has no child")
    )]
    pub(crate) fn forget_users(&self) {
        for users in &self.users {
            users.0.store(0, Ordering::SeqCst);
        }
    }
}

/// Somebody who is inside a gate: what is behind it cannot be freed while this lives.
pub(crate) struct Inside<'a, T> {
    thing: &'a T,
    users: &'a AtomicU32,
}

impl<T> std::ops::Deref for Inside<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.thing
    }
}

impl<T> Drop for Inside<'_, T> {
    fn drop(&mut self) {
        self.users.fetch_sub(1, Ordering::Release);
    }
}

impl<T> Gate<T> {
    /// Goes in, if something is behind the gate. Any `shard` below [`USER_SHARDS`] is right.
    pub(crate) fn enter(&self, shard: usize) -> Option<Inside<'_, T>> {
        let users = &self.users[shard].0;
        users.fetch_add(1, Ordering::SeqCst);
        let thing = self.thing.load(Ordering::SeqCst);
        if thing.is_null() {
            users.fetch_sub(1, Ordering::Release);
            return None;
        }
        // SAFETY: whoever takes the thing away waits for the counter that was raised before the thing was seen.
        let thing = unsafe { &*thing };
        Some(Inside { thing, users })
    }

    /// Puts a thing behind the gate. It must stay valid until [`shut`](Self::shut) has returned.
    pub(crate) fn open(&self, thing: *mut T) {
        self.thing.store(thing, Ordering::SeqCst);
    }

    /// Takes the thing away and waits, with `nap` between looks, until nobody is inside.
    pub(crate) fn shut(&self, mut nap: impl FnMut()) {
        // A read-modify-write, so that it cannot be held back behind the looks at the counters.
        self.thing.swap(std::ptr::null_mut(), Ordering::SeqCst);
        for users in &self.users {
            // Adding nothing reads the newest value, in the order that all threads agree on.
            while users.0.fetch_add(0, Ordering::SeqCst) != 0 {
                nap();
            }
        }
    }

    /// Whether nothing is behind the gate, and nobody who saw something there is still inside.
    pub(crate) fn vacant(&self) -> bool {
        // Once nothing is there nobody new gets in: a counter that reads zero has nobody left.
        self.thing.load(Ordering::SeqCst).is_null()
            && self
                .users
                .iter()
                .all(|u| u.0.fetch_add(0, Ordering::SeqCst) == 0)
    }

    /// Whether a thread is inside.
    #[cfg(faultless_sim)]
    pub(crate) fn crowded(&self) -> bool {
        self.users.iter().any(|u| u.0.load(Ordering::SeqCst) != 0)
    }

    /// What is behind the gate, unprotected: for the child of a fork, whose only thread is the caller.
    #[cfg(not(loom))]
    pub(crate) fn peek(&self) -> *mut T {
        self.thing.load(Ordering::SeqCst)
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicBool;
    use loom::thread;

    /// A map being dropped while two threads fault in it.
    #[test]
    fn a_drop_waits_for_those_inside_and_keeps_out_those_who_come_later() {
        loom::model(|| {
            let gate = Arc::new(Gate::<AtomicBool>::default());
            let alive = Box::into_raw(Box::new(AtomicBool::new(true)));
            gate.open(alive);
            let users: Vec<_> = (0..2)
                .map(|shard| {
                    let gate = gate.clone();
                    thread::spawn(move || {
                        if let Some(thing) = gate.enter(shard) {
                            assert!(
                                thing.load(Ordering::Relaxed),
                                "inside, and the thing is gone"
                            );
                        }
                    })
                })
                .collect();
            gate.shut(thread::yield_now);
            // SAFETY: the gate is shut and nobody is inside; freed at the end of the model.
            let gone = unsafe { &*alive };
            gone.store(false, Ordering::Relaxed);
            for u in users {
                u.join().unwrap();
            }
            assert!(gate.enter(0).is_none());
            // SAFETY: from `Box::into_raw` above, and nobody has it any more.
            drop(unsafe { Box::from_raw(alive) });
        });
    }
}
