//! Charging a claim to the budget, and waiting for room.

use crate::base::clock;
use crate::base::ids::Nanos;
use crate::base::primitive::Ordering;
use crate::fault::refusal::Refusal;
use crate::fault::run::Need;
use crate::space::counters::Count;
use crate::space::map_core::MapCore;
use crate::space::pool_core::PoolCore;
use crate::sync::turnstile::Answer;

/// How long a miss waits for a budget that nothing gives back, before it fails.
pub(crate) const BUDGET_WAIT: Nanos = Nanos::from_secs(10);
/// How long it waits in a map that stands in for the kernel's, before it goes over the budget.
const STAND_IN_WAIT: Nanos = Nanos::from_millis(100);
/// After so long a thread that waits goes before others.
const OVERDUE: Nanos = Nanos::from_millis(50);
/// So often the turn of all such threads begins anew, and for half of that time it lasts: what one of them wants may never be there, and
/// all others would wait for it.
const TURN: Nanos = Nanos::from_millis(500);
/// [`Wish::look`] of a miss: long, since it is called.
const LOOK: Nanos = OVERDUE;

pub(crate) fn release(core: &MapCore, bytes: u64) {
    core.counters.add(Count::Released, bytes);
    core.pool.budget.release(bytes);
}

/// Room that a thread asks for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wish {
    pub(crate) bytes: u64,
    /// It is for pages. Where memory is shorter than the budget, new ones wait until older ones are marked as reclaimable. And they
    /// leave room to threads that are overdue: what is not for pages is for a fill that is under way, for which others may wait.
    pub(crate) pages: bool,
    /// How long to sleep before looking again, if no thread says that there is room.
    pub(crate) look: Nanos,
}

impl Wish {
    fn permitted(self, pool: &PoolCore) -> bool {
        !(self.pages && pool.too_firm())
    }

    fn try_charge(self, pool: &PoolCore) -> bool {
        self.permitted(pool) && pool.budget.try_charge(self.bytes)
    }
}

/// Waits in line for room. `refuse` says what comes of it, if the thread is not to wait any longer; it is given the time in which nothing
/// was evicted.
pub(crate) fn wait_for_room(
    pool: &PoolCore,
    wish: Wish,
    mut refuse: impl FnMut(Nanos) -> Option<Result<(), Refusal>>,
) -> Result<(), Refusal> {
    let began = clock::now();
    let mut since = (began, pool.evicted.load(Ordering::Relaxed));
    let pass = |my_turn: bool| {
        if (my_turn || !wish.pages) && wish.try_charge(pool) {
            return Answer::Pass(Ok(()));
        }
        let (now, evicted) = (clock::now(), pool.evicted.load(Ordering::Relaxed));
        if evicted != since.1 {
            since = (now, evicted);
        }
        if let Some(refused) = refuse(now.since(since.0)) {
            return Answer::Pass(refused);
        }
        pool.wanted.fetch_max(wish.bytes, Ordering::Relaxed);
        pool.evict_bell.ring();
        let waited = now.since(began);
        match waited < OVERDUE || now.get() % TURN.get() >= TURN.get() / 2 {
            true => Answer::Wait,
            false => Answer::Overdue,
        }
    };
    let room = |bytes| pool.has_room(bytes);
    pool.budget.line.wait(wish.bytes, wish.look, room, pass)
}

/// Charges `bytes`; waits for the evictor if they do not fit, unless this is a prefetch.
pub(crate) fn charge(core: &MapCore, bytes: u64, need: Need) -> Result<(), Refusal> {
    let pool = &*core.pool;
    // No thread may wait in a map that is about to go: the thread that takes it away waits for them. And a program whose mapping this
    // stands for knows of no budget: with the kernel's it would not have failed.
    let patience = match core.stands_for {
        Some(_) => STAND_IN_WAIT,
        None => BUDGET_WAIT,
    };
    let wish = Wish {
        bytes,
        pages: true,
        look: LOOK.min(patience),
    };
    // (A map whose lease is being broken saves its pages now or never, so it does not leave room to others.)
    let saves = need == Need::Prefetch && core.keep_all.load(Ordering::Acquire);
    if (saves || !pool.budget.line.has_overdue()) && wish.try_charge(pool) {
        core.counters.add(Count::Charged, bytes);
        return Ok(());
    }
    if need == Need::Prefetch {
        return Err(Refusal::Budget);
    }
    let anyway = || {
        pool.budget.charge_anyway(bytes);
        Ok(())
    };
    let refuse = |idle: Nanos| {
        if core.leaving() {
            return Some(anyway());
        }
        // Only threads of the engine's are left in a map that is being dropped, and the drop waits for them.
        if core.closing.load(Ordering::Relaxed) {
            return Some(Err(Refusal::Budget));
        }
        (idle > patience).then(|| match core.stands_for {
            Some(_) => anyway(),
            None => Err(Refusal::Budget),
        })
    };
    core.counters.add(Count::Waits, 1);
    wait_for_room(pool, wish, refuse)?;
    core.counters.add(Count::Charged, bytes);
    Ok(())
}
