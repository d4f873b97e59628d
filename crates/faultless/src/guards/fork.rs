//! What a forked child finds where its parent had live mappings: the kernel's, without markers.
//!
//! A fork copies all page tables of a mapping that may have markers: 40 ms for 4 GiB. So the mapping is left out of forks, and the child
//! maps it anew, where our descriptor can make the very same mapping.

#![allow(
    unsafe_code,
    reason = "registers fork handlers, keeps locks across a fork"
)]

use crate::base::primitive::MutexGuard;
use crate::base::process;
use crate::coherence::hooks;
use crate::fault::chain::HandlerLock;
use crate::guards::files::{self, LiveFile};
use crate::guards::handler::SIGSEGV;
use crate::guards::mapping::{self, LiveMapping};
use crate::guards::sweeper;
use crate::guards::table::{self, Slots};
use std::cell::UnsafeCell;
use std::sync::{Arc, Once};

type Locks = (
    MutexGuard<'static, u32>,
    HandlerLock,
    MutexGuard<'static, Vec<Arc<LiveFile>>>,
    MutexGuard<'static, Slots>,
);

struct Place(UnsafeCell<Option<Locks>>);
// SAFETY: written and emptied only by the thread that holds the locks in question.
unsafe impl Sync for Place {}
static PLACE: Place = Place(UnsafeCell::new(None));

/// Registers the handlers, once for the life of the program.
pub(crate) fn watch() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        hooks::on_child(|| table::for_each_after_fork(LiveMapping::map_anew));
        // (A simulated fork has no live mappings.)
        #[cfg(not(faultless_sim))]
        // SAFETY: static functions that do what pthread_atfork allows.
        unsafe {
            libc::pthread_atfork(Some(before), Some(after), Some(in_child))
        };
    });
}

extern "C" fn before() {
    // A copy that was made without these handlers has perhaps locks that nobody gives back.
    if process::forked() {
        return;
    }
    // What a child's mappings are made from must be there when the table of descriptors is copied.
    table::for_each(LiveMapping::before_fork);
    let locks = (
        sweeper::freeze(),
        SIGSEGV.freeze(),
        files::freeze(),
        table::freeze(),
    );
    // SAFETY: we hold the locks, so no other thread is here.
    unsafe { *PLACE.0.get() = Some(locks) };
}

extern "C" fn after() {
    // SAFETY: `before` took the locks on this thread.
    drop(unsafe { (*PLACE.0.get()).take() });
}

extern "C" fn in_child() {
    // SAFETY: as above; the child has no other thread.
    if let Some((_sweeper, _handler, open, slots)) = unsafe { (*PLACE.0.get()).take() } {
        table::forget(slots, LiveMapping::in_child);
        mapping::forget_holders();
        files::forget(open);
    }
}
