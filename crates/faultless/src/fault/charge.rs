//! Charging a claim to the budget, and waiting for room.

use crate::base::clock;
use crate::base::ids::Nanos;
use crate::base::primitive::Ordering;
use crate::fault::refusal::Refusal;
use crate::fault::run::Need;
use crate::space::counters::Count;
use crate::space::map_core::MapCore;

/// How long a miss waits for a budget that nothing gives back, before it fails.
pub(crate) const BUDGET_WAIT: Nanos = Nanos::from_secs(10);
/// How long it waits in a map that stands in for the kernel's, before it goes over the budget.
const STAND_IN_WAIT: Nanos = Nanos::from_millis(100);
/// How long to sleep before looking again whether the budget has room.
const BUDGET_LOOK: Nanos = Nanos::from_millis(2);
/// The same for pages that are to be marked reclaimable, where memory is short: the evictor is at it.
const FIRM_NAP: Nanos = Nanos::from_micros(100);

pub(crate) fn release(core: &MapCore, bytes: u64) {
    core.counters.add(Count::Released, bytes);
    core.pool.budget.release(bytes);
}

/// Charges `bytes`; waits for the evictor if they do not fit, unless this is a prefetch.
pub(crate) fn charge(core: &MapCore, bytes: u64, need: Need) -> Result<(), Refusal> {
    let pool = &*core.pool;
    // Where memory is shorter than the budget, new pages wait until older ones are marked as reclaimable.
    let firm_max = pool.firm_max.load(Ordering::Relaxed);
    let firm = || match firm_max {
        u64::MAX => 0,
        _ => pool.firm.load(Ordering::Relaxed) + pool.fresh.load(Ordering::Relaxed),
    };
    if firm() <= firm_max && pool.budget.try_charge(bytes) {
        core.counters.add(Count::Charged, bytes);
        return Ok(());
    }
    // No thread may wait in a map that is about to go: the thread that takes it away waits for them. And a program whose mapping this
    // stands for knows of no budget: with the kernel's it would not have failed.
    let patience = match core.stands_for {
        Some(_) => STAND_IN_WAIT,
        None => BUDGET_WAIT,
    };
    let anyway = || {
        core.counters.add(Count::Charged, bytes);
        pool.budget.charge_anyway(bytes);
        Ok(())
    };
    if need == Need::Prefetch {
        return Err(Refusal::Budget);
    }
    if core.leaving() {
        return anyway();
    }
    core.counters.add(Count::Waits, 1);
    let mut since = (clock::now(), pool.evicted.load(Ordering::Relaxed));
    loop {
        pool.wanted.fetch_max(bytes, Ordering::Relaxed);
        pool.evict_bell.ring();
        if firm() > firm_max {
            clock::nap(FIRM_NAP);
        } else {
            pool.budget.wait(bytes, BUDGET_LOOK);
        }
        if firm() <= firm_max && pool.budget.try_charge(bytes) {
            core.counters.add(Count::Charged, bytes);
            return Ok(());
        }
        if core.leaving() {
            return anyway();
        }
        // Only threads of the engine's are left in a map that is being dropped, and the drop waits for them.
        if core.closing.load(Ordering::Relaxed) {
            return Err(Refusal::Budget);
        }
        let evicted = pool.evicted.load(Ordering::Relaxed);
        if evicted != since.1 {
            since = (clock::now(), evicted);
        } else if clock::now().since(since.0) > patience {
            return match core.stands_for {
                Some(_) => anyway(),
                None => Err(Refusal::Budget),
            };
        }
    }
}
