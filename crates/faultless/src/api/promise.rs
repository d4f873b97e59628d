//! Budgets: what they may be, and what all pools of the process have promised together.

use crate::base::error::Error;
use crate::base::memory;
use crate::base::primitive::{AtomicU64, Ordering};
use crate::base::size::ByteSize;

/// Smallest budget: below it, staging buffers would be a large share.
pub(crate) const MEMORY_MIN: ByteSize = ByteSize::mib(1);

pub(crate) fn check_budget(budget: ByteSize, machine: u64) -> Result<(), Error> {
    let wrong = |remedy| {
        Err(Error::InvalidOption {
            what: "the memory budget",
            value: budget.to_string(),
            remedy,
        })
    };
    if budget < MEMORY_MIN {
        return wrong("give it at least 1 MiB");
    }
    if budget.get() > machine {
        return wrong("it is more than the machine's physical memory; give it less");
    }
    Ok(())
}

/// A budget must have room for a few fill units: some in use while others make room.
pub(crate) fn check_units(budget: ByteSize, unit: u64) -> Result<(), Error> {
    if unit > budget.get() / UNITS_MIN {
        return Err(Error::InvalidOption {
            what: "the memory budget",
            value: format!("{budget}, with a fill unit of {}", ByteSize::new(unit)),
            remedy: "it must hold at least eight fill units; give it more, or choose a smaller unit",
        });
    }
    Ok(())
}

/// Fill units that a budget must have room for.
const UNITS_MIN: u64 = 8;

/// Budgets of all pools of the process, so that together they do not exceed physical memory.
static PROMISED: AtomicU64 = AtomicU64::new(0);

#[derive(Debug)]
pub(crate) struct Promise(pub(crate) u64);

impl Promise {
    pub(crate) fn new(budget: ByteSize) -> Result<Self, Error> {
        let mut promise = Promise(0);
        promise.change(budget)?;
        Ok(promise)
    }

    pub(crate) fn change(&mut self, budget: ByteSize) -> Result<(), Error> {
        let machine = memory::look().machine;
        PROMISED
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |p| {
                (p - self.0).checked_add(budget.get()).filter(|&sum| sum <= machine)
            })
            .map_err(|_| Error::InvalidOption {
                what: "the memory budget",
                value: budget.to_string(),
                remedy: "together with this process's other pools it exceeds physical memory; give them less, or share one pool",
            })?;
        self.0 = budget.get();
        Ok(())
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        PROMISED.fetch_sub(self.0, Ordering::AcqRel);
    }
}
