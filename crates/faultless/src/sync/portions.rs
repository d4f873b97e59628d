//! Portions of a shared sum, one for each processor.
//!
//! A thread that adds a little to a sum writes a cache line that all other processors want as well. So it adds a whole portion, and leaves
//! the rest of the portion to its processor. The next threads on that processor take from the rest, so that the sum is written once for
//! many of them. The sum is never less than the amount in use. Any thread can gather all rests. (A thread takes only what was added to the
//! sum before: the orderings see to that.)

use crate::base::padded::Padded;
use crate::base::primitive::{AtomicU64, Ordering};
use crate::base::process;

/// Processors that have a portion of their own; with more, some share.
#[cfg(not(loom))]
pub(crate) const SHARDS: usize = 16;
#[cfg(loom)]
pub(crate) const SHARDS: usize = 2;

/// The rests, one for each processor.
#[derive(Debug)]
pub(crate) struct Portions([Padded<AtomicU64>; SHARDS]);

impl Default for Portions {
    fn default() -> Self {
        Portions(std::array::from_fn(|_| Padded(AtomicU64::new(0))))
    }
}

impl Portions {
    fn mine(&self) -> &AtomicU64 {
        &self.0[process::shard(SHARDS)]
    }

    /// Takes that amount from this processor's rest, if the rest is large enough.
    pub(crate) fn take(&self, amount: u64) -> bool {
        let less = |left: u64| left.checked_sub(amount);
        let mine = self.mine();
        mine.load(Ordering::Relaxed) >= amount
            && mine
                .fetch_update(Ordering::AcqRel, Ordering::Relaxed, less)
                .is_ok()
    }

    /// Leaves that amount to this processor. Returns the former rest, which the caller gets, so that no processor has more than one portion.
    pub(crate) fn leave(&self, amount: u64) -> u64 {
        self.mine().swap(amount, Ordering::AcqRel)
    }

    /// Takes the rests of all processors.
    pub(crate) fn gather(&self) -> u64 {
        let all = self.0.iter();
        // (A load leaves the line in the other processor's cache.)
        let some = all.filter(|left| left.load(Ordering::Relaxed) > 0);
        some.map(|left| left.swap(0, Ordering::AcqRel)).sum()
    }

    /// The sum of the rests.
    pub(crate) fn left(&self) -> u64 {
        let all = self.0.iter();
        all.map(|left| left.load(Ordering::Relaxed)).sum()
    }
}
