//! Which threads have looked at which state once.

use crate::base::ids::Addr;
use crate::base::primitive::{AtomicU64, Ordering};

/// Remembers, for threads that found a unit resident when they faulted on it, that they have looked once.
///
/// The usual reason is that another thread installed the page between the fault and the look: then the load succeeds
/// when it is executed again. If the same thread comes again with the same unit in the same state, the page is really
/// gone. A forgotten entry costs one more look, a false one a read that finds the page there (EEXIST).
pub(crate) struct LastLooks([AtomicU64; LOOKS]);
const LOOKS: usize = 512;

impl LastLooks {
    pub(crate) const fn new() -> Self {
        LastLooks([const { AtomicU64::new(0) }; LOOKS])
    }

    /// Whether this thread looked at exactly this before. Notes it if not.
    pub(crate) fn again(&self, tid: u32, addr: Addr, word: u64) -> bool {
        let mix = |x: u64| (x ^ (x >> 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let print = mix(mix(u64::from(tid)) ^ (addr.get() >> 12) as u64) ^ mix(word) | 1;
        let slot = &self.0[(mix(u64::from(tid)) >> 55) as usize];
        if slot.load(Ordering::Relaxed) == print {
            slot.store(0, Ordering::Relaxed);
            return true;
        }
        slot.store(print, Ordering::Relaxed);
        false
    }
}
const _: () = assert!(LOOKS == 1 << (64 - 55));
