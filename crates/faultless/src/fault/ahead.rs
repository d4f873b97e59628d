//! Reading ahead: who reads in order is found out from misses alone, and what comes next is asked for in time.
//!
//! A load of a resident page is invisible, so a reader of pages that were read ahead could not be followed. Hence the
//! *trip*: the first unit of each window that is read ahead is not installed; its bytes wait in a slot beside (as those
//! of a cool unit do). The reader stumbles over it, cheaply, and by that asks for the next window, while it reads this
//! one.
//!
//! Streams are found by thread: four of them at once for each thread, in a small table of the last misses; three misses
//! at the same distance (four, if it is not 1) make a stream. Thirty-two streams of a map are followed at once. All
//! this runs in the SIGBUS handler: relaxed atomics, no lock that is waited for, and a race costs a guess, never a byte.

use crate::base::ids::Unit;
use crate::base::primitive::Ordering;
use crate::space::around::AROUND;
use crate::space::counters::Count;
use crate::space::map_core::MapCore;
use crate::space::streams::{
    FAR_FIRST, FAR_MAX, Mode, NO_UNIT, PART_UNITS, Request, StreamGuard, WINDOW_FIRST, WINDOW_MAX,
};
use std::ops::Range;

/// A thread touched a unit that was absent.
pub(crate) fn on_miss(core: &MapCore, unit: Unit, thread: u32) {
    let left_out = core.around.missed(unit);
    // (A unit that was left out says nothing of where a thread goes.)
    if on_trip(core, unit..unit + 1) || left_out {
        return;
    }
    if let Some(stride) = stride_of(core, unit..unit + 1, thread) {
        // Where each miss brings what lies around it, a reader in order misses once in each window.
        let in_order = core.brings_neighbours() && (1..=AROUND as i64).contains(&stride);
        // (This miss brings the rest of its window: what comes next is behind that.)
        let last = Unit::new(unit.get() / AROUND * AROUND + AROUND - 1);
        match in_order {
            true => start(core, last, 1),
            false => start(core, unit, stride),
        }
    }
}

/// A thread asks for some units, the first of which is absent.
pub(crate) fn on_ask(core: &MapCore, units: Range<Unit>, thread: u32) {
    if on_trip(core, units.clone()) {
        return;
    }
    let single = units.end - units.start == 1;
    let last = units.start + (units.end - units.start - 1);
    match stride_of(core, units, thread) {
        // Of larger pieces, only those that follow each other are expected.
        Some(stride) if stride == 1 || single => start(core, last, stride),
        _ => {}
    }
}

/// If the trip of a stream is among some units that a thread touches, the next window is asked for. Returns whether it is.
pub(crate) fn on_trip(core: &MapCore, units: Range<Unit>) -> bool {
    let Some(s) = core.streams.trip_in(&units) else {
        return false;
    };
    if let Some(held) = s.hold()
        && (units.start.get()..units.end.get()).contains(&held.trip.load(Ordering::Relaxed))
    {
        if held.stride.load(Ordering::Relaxed) == 1 {
            // (A large piece may reach beyond what was to be next.)
            let next = held.next.load(Ordering::Relaxed).max(units.end.get());
            held.next.store(next, Ordering::Relaxed);
        }
        let entered = held.window.load(Ordering::Relaxed);
        core.counters.add(Count::AheadUsed, entered);
        match core.streams.mode() {
            None | Some(Mode::Off) => held.trip.store(NO_UNIT, Ordering::Relaxed),
            Some(_) => advance(core, &held),
        }
    }
    true
}

/// The distance at which a thread reads that misses some units now, if it is known.
fn stride_of(core: &MapCore, units: Range<Unit>, thread: u32) -> Option<i64> {
    let streams = &*core.streams;
    let mode = streams.mode().filter(|&mode| mode != Mode::Off)?;
    // A reader that is faster than the device waits for units that are on their way: nothing new.
    if streams.asked_for(units.start) {
        return None;
    }
    streams.stride_of(units, thread, mode == Mode::Eager)
}

/// Follows a new stream, which has come to `unit`.
fn start(core: &MapCore, unit: Unit, stride: i64) {
    let next = unit.at_distance(stride);
    if next >= core.units_end() {
        return;
    }
    let Some(held) = core.streams.free_one().hold() else {
        return;
    };
    give_up(core, &held);
    held.stride.store(stride, Ordering::Relaxed);
    held.next.store(next.get(), Ordering::Relaxed);
    held.window.store(0, Ordering::Relaxed);
    advance(core, &held);
}

/// Books what was read ahead for streams that no reader goes on with: the map is being dropped.
pub(crate) fn give_up_all(core: &MapCore) {
    for s in core.streams.all() {
        if let Some(held) = s.hold() {
            give_up(core, &held);
        }
    }
}

/// A window that was asked for and never entered is waste.
fn give_up(core: &MapCore, held: &StreamGuard<'_>) {
    if held.trip.swap(NO_UNIT, Ordering::Relaxed) != NO_UNIT {
        let window = held.window.load(Ordering::Relaxed);
        core.counters.add(Count::AheadWasted, window);
    }
}

/// Asks for the next window.
fn advance(core: &MapCore, s: &StreamGuard<'_>) {
    let (stride, first) = (
        s.stride.load(Ordering::Relaxed),
        Unit::new(s.next.load(Ordering::Relaxed)),
    );
    let (least, most) = if stride == 1 {
        // A small budget is not for one stream alone.
        let most = WINDOW_MAX.min(core.pool.budget.limit() / 64);
        (
            (WINDOW_FIRST >> core.unit_shift).max(1),
            (most >> core.unit_shift).max(1),
        )
    } else {
        (FAR_FIRST, FAR_MAX)
    };
    let window = (s.window.load(Ordering::Relaxed) * 2).max(least).min(most);
    // As far as there is something to read.
    let rest = match stride {
        1.. => (core.units_end().max(first) - first).div_ceil(stride as u64),
        _ if first < core.units_end() => first.get() / stride.unsigned_abs() + 1,
        _ => 0,
    };
    let window = window.min(rest);
    s.window.store(window, Ordering::Relaxed);
    if window == 0 {
        s.trip.store(NO_UNIT, Ordering::Relaxed);
        return;
    }
    let beyond = first.at_distance(stride * window as i64);
    s.next.store(beyond.get(), Ordering::Relaxed);
    s.trip.store(first.get(), Ordering::Relaxed);
    core.counters.add(Count::Ahead, window);
    let stream = core.streams.index(s);
    let (mut at, mut left) = (first, window);
    // The parts are for several threads at once; where units are left out, each is a read of its own.
    let part = if stride == 1 {
        part_units(core)
    } else {
        window.div_ceil(8)
    };
    while left > 0 {
        let units = part.min(left);
        let request = Request {
            map: core.id,
            unit: at,
            units,
            trip: at == first,
            stream,
        };
        if !core.pool.ahead.push(request.pack()) {
            core.counters.add(Count::PrefetchDropped, 1);
            break;
        }
        core.pool.work_bell.ring();
        at = at.at_distance(stride * units as i64);
        left -= units;
    }
}

/// Units of a part that one thread reads at a time: 256 KiB, or one unit if that is larger.
pub(crate) fn part_units(core: &MapCore) -> u64 {
    PART_UNITS.min((256 << 10 >> core.unit_shift).max(1))
}
