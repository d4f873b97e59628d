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
/// After so long without one unit that leaves, a thread's turn is in vain. (Beside a busy `mmap_lock` they leave slowly.)
const LULL: Nanos = Nanos::from_millis(100);
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

/// For how long nothing has happened that could help a thread which waits.
struct Hope {
    /// When a unit was last seen to leave, and the count of those that left.
    since: (Nanos, u32),
    /// The last look, if the thread went before others then.
    before_others: Option<Nanos>,
    /// All of the time in which it went before others in vain.
    in_vain: Nanos,
}

impl Hope {
    fn new(now: Nanos, evicted: u32) -> Self {
        Hope {
            since: (now, evicted),
            before_others: None,
            in_vain: Nanos::from_millis(0),
        }
    }

    /// A look. Returns the time without hope: since any unit left its map, or in all of the thread's own turns. What the others fill
    /// between two turns leaves in the next, which is no progress for this thread.
    fn look(&mut self, now: Nanos, evicted: u32) -> Nanos {
        if evicted != self.since.1 {
            self.since = (now, evicted);
        } else if let Some(then) = self.before_others
            && now.since(self.since.0) > LULL
        {
            self.in_vain = self.in_vain + now.since(then).min(LOOK);
        }
        now.since(self.since.0).max(self.in_vain)
    }
}

/// Waits in line for room. `refuse` says what comes of it, if the thread is not to wait any longer; it is given the time without hope
/// ([`Hope`]).
pub(crate) fn wait_for_room(
    pool: &PoolCore,
    wish: Wish,
    mut refuse: impl FnMut(Nanos) -> Option<Result<(), Refusal>>,
) -> Result<(), Refusal> {
    let began = clock::now();
    let mut hope = Hope::new(began, pool.evicted.load(Ordering::Relaxed));
    let pass = |my_turn: bool| {
        if (my_turn || !wish.pages) && wish.try_charge(pool) {
            return Answer::Pass(Ok(()));
        }
        let (now, evicted) = (clock::now(), pool.evicted.load(Ordering::Relaxed));
        if let Some(refused) = refuse(hope.look(now, evicted)) {
            return Answer::Pass(refused);
        }
        pool.wanted.fetch_max(wish.bytes, Ordering::Relaxed);
        pool.evict_bell.ring();
        let waited = now.since(began);
        let overdue = waited >= OVERDUE && now.get() % TURN.get() < TURN.get() / 2;
        hope.before_others = overdue.then_some(now);
        match overdue {
            true => Answer::Overdue,
            false => Answer::Wait,
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    /// Looks each 50 ms, for so long. `at` says for each whether the thread goes before others, and whether a unit has left since the
    /// last. The time without hope at the end.
    fn without_hope(millis: u64, at: impl Fn(u64) -> (bool, bool)) -> Nanos {
        let mut evicted = 7;
        let mut hope = Hope::new(Nanos::from_millis(0), evicted);
        let mut idle = Nanos::from_millis(0);
        for ms in (50..=millis).step_by(50) {
            let (before_others, left) = at(ms);
            evicted += u32::from(left);
            let now = Nanos::from_millis(ms);
            idle = hope.look(now, evicted);
            hope.before_others = before_others.then_some(now);
        }
        idle
    }

    #[test]
    fn a_thread_has_hope_while_units_leave() {
        assert_eq!(
            without_hope(30_000, |_| (false, true)),
            Nanos::from_millis(0)
        );
        assert_eq!(
            without_hope(30_000, |_| (true, true)),
            Nanos::from_millis(0)
        );
        let stuck = without_hope(30_000, |ms| (false, ms <= 20_000));
        assert_eq!(stuck, Nanos::from_secs(10));
    }

    /// Others fill between its turns, and what they filled leaves as each turn begins.
    #[test]
    fn what_others_fill_between_its_turns_is_no_hope() {
        let others = |ms: u64| {
            let turn = ms % 500 < 250;
            (turn, !turn || ms.is_multiple_of(500))
        };
        assert!(without_hope(5_000, others) < BUDGET_WAIT);
        assert!(without_hope(60_000, others) > BUDGET_WAIT);
    }
}
