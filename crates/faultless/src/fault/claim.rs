//! Claiming: how a thread becomes the owner of a unit, and waits for another that is.

#![allow(unsafe_code, reason = "waits on a word by address")]

use crate::base::ids::{Nanos, RegionAt, Unit};
use crate::base::primitive::Ordering;
use crate::base::process;
use crate::fault::ahead;
use crate::fault::charge::{charge, release};
use crate::fault::give_up::{abandon, cool_again};
use crate::fault::publish::track;
use crate::fault::refusal::Refusal;
use crate::fault::run::{Need, Origin, RUN_MAX, Run, owner};
use crate::space::around::{AROUND, Guess};
use crate::space::counters::Count;
use crate::space::map_core::{MapCore, Reading};
use crate::space::page::{From, PINS_MAX, State, Word, futex_bits};
use crate::space::table::GROUP_BYTES;
use faultless_sys::futex;

/// How long to sleep on another's fill before looking again.
pub(crate) const WAIT: Nanos = Nanos::from_millis(100);

/// Waits for `seen` to change.
fn wait(core: &MapCore, unit: Unit, seen: Word) {
    let page = core.page(unit);
    if let Ok(word) = page.announce_waiter(seen) {
        core.counters.add(Count::Waits, 1);
        // SAFETY: the table lives as long as the core, which the caller holds.
        unsafe { futex::wait_at(page.futex(), futex_bits(word), WAIT.get()) };
    }
}

/// Claims one unit whose word was `seen`.
fn claim_one(core: &MapCore, unit: Unit, seen: Word, me: u32) -> Option<From> {
    let charge = || {
        core.counters.add(Count::Charged, GROUP_BYTES);
        core.pool.budget.charge_anyway(GROUP_BYTES);
    };
    match core.table.claim(unit, seen, me, charge) {
        Ok(from) => Some(from),
        Err(emptied) => {
            if emptied {
                track(core, unit);
            }
            None
        }
    }
}

/// Becomes the owner of `unit`. The run stays empty if nothing is left to do: the page is there (and pinned, if that was wanted).
pub(crate) fn claim(core: &MapCore, unit: Unit, need: Need, run: &mut Run) -> Result<(), Refusal> {
    // A child's handler finds no maps; other callers may come from what the child inherited.
    let load = matches!(need, Need::Load(_));
    if !load && (process::forked() || core.pid != process::pid()) {
        return Err(Refusal::Forked);
    }
    let source = matches!(core.reading, Reading::Source { .. });
    if source && need != Need::Prefetch && core.pool.reads_sources() {
        return Err(Refusal::Recursion);
    }
    let backed = core.backed(unit..unit + 1);
    if backed.is_empty() {
        return Err(Refusal::PastEnd);
    }
    if let Need::Load(addr) = need
        && RegionAt::new((addr - core.start) as u64) >= backed.end
    {
        return Err(Refusal::PastEnd);
    }
    let me = owner();
    let page = core.page(unit);
    let mut counted = false;
    let mut count_miss = || {
        if !std::mem::replace(&mut counted, true) {
            core.counters.add(Count::Misses, 1);
            match need {
                Need::Load(_) => ahead::on_miss(core, unit, me),
                Need::Ask => _ = ahead::on_trip(core, unit..unit + 1),
                Need::Pin | Need::Prefetch => {}
            }
        }
    };
    let from = loop {
        let seen = page.load();
        match (need, seen.state()) {
            (Need::Prefetch, State::Absent) if !seen.cool() => {}
            (Need::Prefetch, _) => return Ok(()),
            (_, State::Filling) => {
                count_miss();
                wait(core, unit, seen);
                continue;
            }
            (Need::Ask, State::Resident) => return Ok(()),
            (Need::Load(addr), State::Resident)
                if !core.pool.last_looks.again(me, addr, seen.bits()) =>
            {
                return Ok(());
            }
            (Need::Pin, State::Resident) if !seen.batch() && !seen.soft() => match page.pin(seen) {
                Ok(()) => return Ok(()),
                Err(_) if seen.pins() == PINS_MAX => return Err(Refusal::Budget),
                Err(_) => continue,
            },
            (Need::Pin, State::Evicting) => {
                wait(core, unit, seen);
                continue;
            }
            (Need::Pin, _) if seen.batch() => {
                wait(core, unit, seen);
                continue;
            }
            _ => {}
        }
        // A pin would discard what it cannot read again; a load on a resident unit may still find it there.
        // What cools was read while the lease was held.
        let refused = core.refusal.load(Ordering::Acquire) != 0 && !seen.cool();
        if refused && (need == Need::Pin || seen.state() != State::Resident) {
            return Err(Refusal::LeaseBroken);
        }
        count_miss();
        if let Some(from) = claim_one(core, unit, seen, me) {
            break from;
        }
    };
    if let From::Cool(slot) = from {
        run.slot = slot;
    }
    let from = origin(core, from);
    let due = if from == Origin::Resident {
        0
    } else {
        core.charge_of(unit)
    };
    let charged = if from == Origin::Cool && core.keep_all.load(Ordering::Acquire) {
        // Nowhere else are these bytes: they are not to be lost for want of a page's memory.
        core.counters.add(Count::Charged, due);
        core.pool.budget.charge_anyway(due);
        Ok(())
    } else if due > 0 {
        charge(core, due, need)
    } else {
        Ok(())
    };
    if let Err(why) = charged {
        match from {
            Origin::Cool => cool_again(core, unit, me, run.slot),
            _ => abandon(core, unit, from, me, false),
        }
        return Err(why);
    }
    (run.first, run.count, run.me, run.from[0]) = (unit, 1, me, from);
    Ok(())
}

/// Claims one more unit for a run, if it is absent and its memory needs no waiting.
fn claim_more(core: &MapCore, run: &Run, unit: Unit) -> Option<Origin> {
    if run.count == RUN_MAX {
        return None;
    }
    let seen = core.page(unit).load();
    if seen.state() != State::Absent
        || seen.cool()
        || seen.batch()
        || charge(core, core.charge_of(unit), Need::Prefetch).is_err()
    {
        return None;
    }
    match claim_one(core, unit, seen, run.me) {
        Some(from) => Some(origin(core, from)),
        None => {
            release(core, core.charge_of(unit));
            None
        }
    }
}

/// Adds the unit behind a run to it, if it can be had.
pub(crate) fn extend(core: &MapCore, run: &mut Run) -> bool {
    let unit = run.end();
    if unit >= core.units_end() {
        return false;
    }
    let Some(from) = claim_more(core, run, unit) else {
        return false;
    };
    run.from[run.count] = from;
    run.count += 1;
    true
}

/// Adds the unit before a run to it, on the same terms.
fn extend_back(core: &MapCore, run: &mut Run) -> bool {
    let Some(unit) = run.first.before() else {
        return false;
    };
    let Some(from) = claim_more(core, run, unit) else {
        return false;
    };
    run.from.copy_within(0..run.count, 1);
    run.from[0] = from;
    run.first = unit;
    run.count += 1;
    true
}

/// Adds what is absent around the unit of a run, where that is likely to be wanted, up to the ends of the window that it lies in.
pub(crate) fn read_around(core: &MapCore, run: &mut Run) {
    let missed = run.first;
    let guess = core.guess_around(missed);
    if guess == Guess::Alone {
        return;
    }
    let mut first = Unit::new(missed.get() / AROUND * AROUND);
    let mut end = (first + AROUND).min(core.units_end());
    if guess == Guess::LeaveOut {
        let (before, behind) = (missed - first, end - missed - 1);
        let (farthest, rest) = match before > behind {
            true => (first, first + 1..end),
            false => (missed + behind, first..missed + behind),
        };
        let word = core.page(farthest).load();
        if farthest != missed && word.state() == State::Absent && !word.cool() {
            core.around.leave_out(farthest);
            (first, end) = (rest.start, rest.end);
        }
    }
    while run.first > first && extend_back(core, run) {}
    while run.end() < end && extend(core, run) {}
}

/// A refault is soon if less was evicted meanwhile than the budget holds.
fn origin(core: &MapCore, from: From) -> Origin {
    match from {
        From::Absent(0) => Origin::Cold,
        From::Absent(then) => {
            let now = core.pool.clock.load(Ordering::Relaxed);
            let evicted = u64::from(now.wrapping_sub(then));
            let reach = core.pool.ghost_reach.load(Ordering::Relaxed);
            if evicted <= reach {
                Origin::Hot
            } else {
                Origin::Cold
            }
        }
        From::Cool(_) => Origin::Cool,
        From::Resident => Origin::Resident,
        From::Evicting => Origin::Evicting,
    }
}
