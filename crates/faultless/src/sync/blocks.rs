//! Buffers for reads of users' sources, which come in whole blocks of the source's alignment.
//!
//! All of them together are charged to the budget, and take an eighth of it at most (or what one read wants, if that is more): a
//! thread that finds none waits until another gives one back. For ordinary contexts: there is a lock, and the heap.

use crate::base::futex::{Futex, Wake};
use crate::base::ids::Nanos;
use crate::base::primitive::{Mutex, lock};
use crate::sync::budget::Budget;

/// How long to wait for a buffer before looking again.
const WAIT: Nanos = Nanos::from_millis(10);
/// Share of the budget that the buffers take at most, as a divisor.
const SHARE: u64 = 8;

/// The buffers of a pool.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    state: Mutex<State>,
    returned: Futex,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<Vec<u8>>,
    /// Bytes of all buffers, free or on loan.
    bytes: u64,
}

/// A buffer on loan, which goes back when it is dropped.
#[derive(Debug)]
pub(crate) struct Block<'a> {
    of: &'a Blocks,
    bytes: Vec<u8>,
}

impl Blocks {
    /// A buffer of at least `len` bytes.
    pub(crate) fn take(&self, len: usize, budget: &Budget) -> Block<'_> {
        loop {
            let ticket = self.returned.ticket();
            if let Some(bytes) = self.try_take(len, budget) {
                return Block { of: self, bytes };
            }
            self.returned.wait(ticket, WAIT);
        }
    }

    fn try_take(&self, len: usize, budget: &Budget) -> Option<Vec<u8>> {
        let mut state = lock(&self.state);
        if let Some(at) = state.free.iter().position(|b| b.len() >= len) {
            return Some(state.free.swap_remove(at));
        }
        let most = (budget.limit() / SHARE).max(len as u64);
        while state.bytes + len as u64 > most {
            // Smaller ones make room.
            let smaller = state.free.pop()?;
            state.bytes -= smaller.len() as u64;
            budget.release(smaller.len() as u64);
        }
        state.bytes += len as u64;
        budget.charge_anyway(len as u64);
        Some(vec![0; len])
    }

    /// Bytes that are charged for buffers.
    pub(crate) fn charged_bytes(&self) -> u64 {
        lock(&self.state).bytes
    }
}

impl Block<'_> {
    /// The bytes. They are what was last read into the buffer.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Block<'_> {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        lock(&self.of.state).free.push(bytes);
        self.of.returned.bump(Wake::One);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn buffers_take_a_share_of_the_budget_and_are_used_again() {
        let (blocks, budget) = (Blocks::default(), Budget::new(8 << 20));
        let first = blocks.take(512 << 10, &budget);
        let second = blocks.take(512 << 10, &budget);
        assert_eq!(budget.used(), 1 << 20);
        assert!(blocks.try_take(4096, &budget).is_none(), "an eighth is out");
        drop(first);
        let mut again = blocks.take(4096, &budget);
        assert_eq!(again.bytes().len(), 512 << 10);
        assert_eq!(budget.used(), 1 << 20);
        drop((second, again));
        // What one read wants is there, though it be more than the share; smaller ones make room.
        let large = blocks.take(2 << 20, &budget);
        assert_eq!(budget.used(), 2 << 20);
        drop(large);
        assert_eq!(blocks.charged_bytes(), 2 << 20);
    }

    #[test]
    fn a_thread_waits_for_a_buffer_that_another_has() {
        let (blocks, budget) = (Blocks::default(), Budget::new(1 << 20));
        let held = blocks.take(128 << 10, &budget);
        std::thread::scope(|s| {
            let waits = s.spawn(|| blocks.take(128 << 10, &budget).bytes().len());
            drop(held);
            assert_eq!(waits.join().expect("it gets one"), 128 << 10);
        });
        assert_eq!(budget.used(), 128 << 10);
    }
}
