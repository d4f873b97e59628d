//! The monotonic clock, and short sleeps. Safe in a signal handler.

use crate::base::ids::Nanos;
use faultless_sys::raw;

/// This moment.
pub(crate) fn now() -> Nanos {
    Nanos::new(raw::monotonic_ns())
}

/// Sleeps for a time, or less if a signal arrives.
pub(crate) fn nap(time: Nanos) {
    raw::nap(time.get());
}
