//! Buffers for reads of users' sources, which come in whole blocks of the source's alignment.
//!
//! A buffer is charged to the budget like a page: a thread that wants one waits for room. Some are kept to be used again. For
//! ordinary contexts: there is a lock, and the heap.

use crate::base::primitive::{Mutex, lock};
use crate::sync::budget::Budget;

/// Share of the budget that buffers may take which are kept and not in use, as a divisor.
const SPARE_SHARE: u64 = 16;

/// The buffers of a pool that are kept.
#[derive(Debug, Default)]
pub(crate) struct Blocks {
    spare: Mutex<Vec<Vec<u8>>>,
}

/// A buffer in use. It goes back when it is dropped.
#[derive(Debug)]
pub(crate) struct Block<'a> {
    of: &'a Blocks,
    budget: &'a Budget,
    bytes: Vec<u8>,
}

fn bytes_of(spare: &[Vec<u8>]) -> u64 {
    spare.iter().map(|b| b.len() as u64).sum()
}

impl Blocks {
    /// A buffer of at least `len` bytes: one that was kept, or a new one, if `charge` finds room for it.
    pub(crate) fn take<'a, E>(
        &'a self,
        len: usize,
        budget: &'a Budget,
        charge: impl FnOnce(u64) -> Result<(), E>,
    ) -> Result<Block<'a>, E> {
        let kept = {
            let mut spare = lock(&self.spare);
            let at = spare.iter().position(|b| b.len() >= len);
            at.map(|at| spare.swap_remove(at))
        };
        let bytes = match kept {
            Some(bytes) => bytes,
            None => {
                // Those that are too small make room.
                for small in lock(&self.spare).drain(..) {
                    budget.release(small.len() as u64);
                }
                charge(len as u64)?;
                vec![0; len]
            }
        };
        Ok(Block {
            of: self,
            budget,
            bytes,
        })
    }

    /// Lets go of what is kept beyond its share of the budget.
    pub(crate) fn trim(&self, budget: &Budget) {
        let mut spare = lock(&self.spare);
        let mut bytes = bytes_of(&spare);
        while bytes > budget.limit() / SPARE_SHARE
            && let Some(gone) = spare.pop()
        {
            bytes -= gone.len() as u64;
            budget.release(gone.len() as u64);
        }
    }

    /// Bytes that are charged for buffers which are kept.
    pub(crate) fn spare_bytes(&self) -> u64 {
        bytes_of(&lock(&self.spare))
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
        lock(&self.of.spare).push(std::mem::take(&mut self.bytes));
        self.of.trim(self.budget);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_charged_and_used_again_and_a_share_of_them_is_kept() {
        let (blocks, budget) = (Blocks::default(), Budget::new(16 << 20));
        let charge = |bytes| match budget.try_charge(bytes) {
            true => Ok(()),
            false => Err("no room"),
        };
        let take = |len| blocks.take(len, &budget, charge);
        let (first, second) = (take(1 << 20).expect("room"), take(1 << 20).expect("room"));
        assert_eq!(budget.charged(), 2 << 20);
        drop((first, second));
        assert_eq!((budget.charged(), blocks.spare_bytes()), (1 << 20, 1 << 20));
        let mut again = take(4096).expect("the one that was kept");
        assert_eq!(again.bytes().len(), 1 << 20);
        assert_eq!(budget.charged(), 1 << 20);
        assert_eq!(
            take(16 << 20).expect_err("all but a megabyte is free"),
            "no room"
        );
        drop(again);
        // A smaller budget keeps less.
        budget.set_limit(8 << 20);
        blocks.trim(&budget);
        assert_eq!((budget.charged(), blocks.spare_bytes()), (0, 0));
    }
}
