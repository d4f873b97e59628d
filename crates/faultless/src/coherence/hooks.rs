//! What the program's side of the engine is told: it sets functions here, and the engine calls them.

use crate::base::primitive::OnceLock;

static ON_LOST: OnceLock<fn()> = OnceLock::new();

/// Sets what is called when some stand-in has no addresses left, because of system calls that nobody saw. It must not wait, ask for
/// memory, or take a lock.
pub fn on_lost(f: fn()) {
    let _ = ON_LOST.set(f);
}

/// Passes on that some stand-in has no addresses left.
pub(crate) fn lost() {
    if let Some(tell) = ON_LOST.get() {
        tell();
    }
}

static IN_CHILD: OnceLock<fn()> = OnceLock::new();

/// Sets what is called in a forked child while the engine's descriptors are still open there.
pub(crate) fn on_child(f: fn()) {
    let _ = IN_CHILD.set(f);
}

/// This is a forked child, and the engine's descriptors are about to be closed.
pub(crate) fn in_child() {
    if let Some(call) = IN_CHILD.get() {
        call();
    }
}

static ON_LEASE_BROKEN: OnceLock<fn(u64) -> bool> = OnceLock::new();

/// Sets what is called, on a thread of the engine's that may wait, when the lease of the stand-in with a serial number is
/// being broken. It is to hand that one back, and says whether it could: if not, what can be saved of the
/// map is read in and kept.
pub fn on_lease_broken(f: fn(u64) -> bool) {
    let _ = ON_LEASE_BROKEN.set(f);
}

/// `false` if it could not be handed back.
pub(crate) fn lease_broken(serial: u64) -> bool {
    ON_LEASE_BROKEN.get().is_some_and(|f| f(serial))
}
