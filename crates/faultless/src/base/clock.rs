//! The monotonic clock, and short sleeps. Safe in a signal handler.

use crate::base::ids::Nanos;
use faultless_sys::raw;

/// This moment.
#[cfg(not(loom))]
pub(crate) fn now() -> Nanos {
    Nanos::new(raw::monotonic_ns())
}

/// Sleeps for a time, or less if a signal arrives.
#[cfg(not(loom))]
pub(crate) fn nap(time: Nanos) {
    raw::nap(time.get());
}

/// In a model, no time passes,
#[cfg(loom)]
pub(crate) fn now() -> Nanos {
    Nanos::new(0)
}

/// and a thread that naps lets the others go on.
#[cfg(loom)]
pub(crate) fn nap(_: Nanos) {
    loom::thread::yield_now();
}
