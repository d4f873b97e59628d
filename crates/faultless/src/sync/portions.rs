//! Portions of a shared sum, one for each processor.
//!
//! A thread that adds a little to a sum writes a cache line that all other processors want as well. So it adds a portion, and leaves
//! what it does not need to its processor: the next threads there take of that, and the sum is written once for many. The sum is never
//! less than what is in use; what lies in portions can be gathered. (What a thread takes was added before: hence the orderings.)

use crate::base::padded::Padded;
use crate::base::primitive::{AtomicU64, Ordering};
use crate::base::process;

/// Processors that have a portion of their own; with more, some share.
#[cfg(not(loom))]
pub(crate) const SHARDS: usize = 16;
#[cfg(loom)]
pub(crate) const SHARDS: usize = 2;

/// What the processors have left.
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

    /// Takes so much of what this processor has left, if that is enough.
    pub(crate) fn take(&self, amount: u64) -> bool {
        let less = |left: u64| left.checked_sub(amount);
        let mine = self.mine();
        mine.load(Ordering::Relaxed) >= amount
            && mine
                .fetch_update(Ordering::AcqRel, Ordering::Relaxed, less)
                .is_ok()
    }

    /// Leaves so much to this processor. Returns what it had left before, which is the caller's: no processor has more than one portion.
    pub(crate) fn leave(&self, amount: u64) -> u64 {
        self.mine().swap(amount, Ordering::AcqRel)
    }

    /// Takes all that any processor has left.
    pub(crate) fn gather(&self) -> u64 {
        let all = self.0.iter();
        // (A line that is only looked at stays where it is, too.)
        let some = all.filter(|left| left.load(Ordering::Relaxed) > 0);
        some.map(|left| left.swap(0, Ordering::AcqRel)).sum()
    }

    /// What all of them have left.
    pub(crate) fn left(&self) -> u64 {
        let all = self.0.iter();
        all.map(|left| left.load(Ordering::Relaxed)).sum()
    }
}
