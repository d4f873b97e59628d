//! Serving a miss: claim, charge, read, check, install, publish.
//!
//! [`serve`] is called by the SIGBUS handler (`Need::Load`), by pins and by prefetches. Everything here is safe in a
//! signal handler, with one exception that the types enforce: a user's [`Source`](crate::Source) is read only through
//! [`serve_from`], with a closure that ordinary contexts supply.

#![allow(unsafe_code, reason = "reads into raw buffers and installs pages")]

use super::ahead::Trips;
use super::core::{MapCore, Reading, Unit};
use super::counters::Count;
use super::fds::Fd;
use super::identity;
use super::page::{From, PINS_MAX, State, Word, futex_bits};
use super::process;
use super::report::Fault;
use super::table::GROUP_BYTES;
use crate::evict::policy::ghost_reach;
use faultless_sys::mem::{self, PAGE};
use faultless_sys::raw::{self, Errno};
use faultless_sys::{file, futex, signal, uffd};
use std::sync::atomic::{AtomicU32, Ordering};

/// Most units that one fill covers: bounds the stack that the handler needs.
pub(crate) const RUN_MAX: usize = 64;
/// How long to sleep on another's fill before asking whether its owner is alive.
const WAIT_NS: u64 = 100_000_000;
/// How long a miss waits for a budget that nothing gives back, before it fails.
const BUDGET_WAIT_NS: u64 = 10_000_000_000;
/// How long it waits in a map that stands in for the kernel's, before it goes over the budget.
const STAND_IN_WAIT_NS: u64 = 100_000_000;
/// How long to sleep before looking again whether the budget has room.
const BUDGET_LOOK_NS: u64 = 2_000_000;
/// The same for pages that are to be marked reclaimable, where memory is short: the evictor is at it.
const FIRM_NAP_NS: u64 = 100_000;
/// How long to wait for the evictor to take entries off its ring.
const RING_NAP_NS: u64 = 100_000;
/// Naps of 1 ms for a source that says EAGAIN.
const AGAIN_MAX: u32 = 2_000;
/// Tries to install a page while the kernel says ENOMEM.
const INSTALL_TRIES: u32 = 5_000;
/// Naps while the kernel says EAGAIN: more than a minute.
const BUSY_NAP_NS: u64 = 50_000;
const BUSY_MAX: u32 = 1_000_000;

/// Why a unit is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// A load at this address faulted.
    Load(usize),
    /// It is to be pinned.
    Pin,
    /// It may be wanted soon: never waits.
    Prefetch,
}

/// What a unit of a run was claimed from, in one byte: a run lies on the stack of a signal handler.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Origin {
    /// A miss.
    Cold,
    /// A miss soon after the unit was evicted.
    Hot,
    /// Its bytes are in the run's slot.
    Cool,
    Resident,
    Evicting,
}

/// A unit range whose words this thread owns.
pub(crate) struct Run {
    pub(crate) first: Unit,
    pub(crate) count: usize,
    me: u32,
    /// The slot in which the bytes of the first unit are, if it was cool.
    slot: u32,
    from: [Origin; RUN_MAX],
}

impl Run {
    /// Whether its one unit was absent, and nobody's.
    fn was_absent(&self) -> bool {
        self.count == 1 && matches!(self.from[0], Origin::Cold | Origin::Hot)
    }

    pub(crate) const fn new() -> Self {
        Run {
            first: 0,
            count: 0,
            me: 0,
            slot: 0,
            from: [Origin::Cold; RUN_MAX],
        }
    }
}

/// Serves a miss from a file, or hands it to the fill threads.
pub(crate) fn serve(core: &MapCore, unit: Unit, need: Need) -> Result<(), Fault> {
    let mut request = Handed {
        core,
        run: Run::new(),
        done: AtomicU32::new(0),
    };
    claim(core, unit, need, &mut request.run)?;
    match &core.reading {
        _ if request.run.count == 0 => Ok(()),
        _ if request.run.from[0] == Origin::Cool => rescue(core, &request.run, need),
        Reading::File { fd, .. } => {
            let fetch = &mut |at, end, keep| file_piece(core, fd, at, end, keep);
            let around = need != Need::Pin && core.reads_around() && request.run.was_absent();
            if around {
                read_around(core, &mut request.run);
            }
            let filled = fill(core, &request.run, need, None, fetch);
            let missing = || {
                let word = core.page(unit).load();
                word.state() == State::Absent && !word.cool()
            };
            if request.run.count == 1 || (filled.is_ok() && !missing()) {
                return filled;
            }
            // Something around it could not be read: the unit alone, then.
            request.run = Run::new();
            claim(core, unit, need, &mut request.run)?;
            match request.run.count {
                0 => Ok(()),
                _ if request.run.from[0] == Origin::Cool => rescue(core, &request.run, need),
                _ => fill(core, &request.run, need, None, fetch),
            }
        }
        Reading::Source { .. } => hand_over(core, &request),
    }
}

/// What was installed of a piece of the region.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece {
    /// Bytes present now, from the start of the piece.
    present: u64,
    /// Bytes of these that were not there before.
    new: u64,
    /// Bytes that would be present had the source its full length.
    wanted: u64,
}

/// Reads and installs a piece that starts at one byte of the region and ends at another at the latest. Where an address
/// is given, the bytes of the first page go there and are not installed.
pub(crate) type Fetch<'a> = &'a mut dyn FnMut(u64, u64, Option<usize>) -> Result<Piece, Fault>;

/// Serves a miss through `fetch`, in an ordinary context.
pub(crate) fn serve_from(
    core: &MapCore,
    unit: Unit,
    need: Need,
    fetch: Fetch<'_>,
) -> Result<(), Fault> {
    let mut run = Run::new();
    claim(core, unit, need, &mut run)?;
    match run.count {
        0 => Ok(()),
        _ if run.from[0] == Origin::Cool => rescue(core, &run, need),
        _ => fill(core, &run, need, None, fetch),
    }
}

/// Set in owners that cannot die while they fill: a handler runs with every signal blocked, so nothing but the end of
/// the process gets in between. The other bits tell threads apart by their stacks, which saves a system call in each
/// miss. Owners without it are thread ids.
const IMMORTAL: u32 = 1 << 31;

/// The number under which this thread claims.
fn owner(need: Need) -> u32 {
    match need {
        Need::Load(_) => {
            let here = 0u8;
            IMMORTAL | ((&raw const here as usize >> 12) as u32)
        }
        _ => raw::gettid(),
    }
}

/// Waits for `seen` to change, and recovers the claim of an owner that died.
fn wait(core: &MapCore, unit: Unit, seen: Word) -> Result<(), Fault> {
    let page = core.page(unit);
    let owner = seen.number();
    let mortal = seen.state() == State::Filling && owner & IMMORTAL == 0;
    if mortal && owner == raw::gettid() {
        return Err(Fault::Recursion);
    }
    let Ok(word) = page.announce_waiter(seen) else {
        return Ok(());
    };
    core.counters.add(Count::Waits, 1);
    // SAFETY: the table lives as long as the core, which the caller holds.
    let woken = unsafe { futex::wait_at(page.futex(), futex_bits(word), WAIT_NS) };
    if woken == futex::Woken::TimedOut
        && mortal
        && signal::tgkill(process::pid(), owner, 0) == Err(Errno(libc::ESRCH))
        && let Some(due) = page.abandon(owner, 0)
    {
        // Whether it came to charging the unit is not known. The map's own account is settled when it is dropped.
        core.table.leave(unit);
        if due.wake {
            futex::wake_at(page.futex(), futex::ALL);
        }
    }
    Ok(())
}

fn release(core: &MapCore, bytes: u64) {
    core.counters.add(Count::Released, bytes);
    core.pool.budget.release(bytes);
}

/// Charges `bytes`; waits for the evictor if they do not fit, unless this is a prefetch.
fn charge(core: &MapCore, bytes: u64, need: Need) -> Result<(), Fault> {
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
    // Nobody may wait in a map that is about to go: who takes it away waits for them. And a program whose mapping this
    // stands for knows of no budget: with the kernel's it would not have failed.
    let patience = match core.stands_for {
        Some(_) => STAND_IN_WAIT_NS,
        None => BUDGET_WAIT_NS,
    };
    let anyway = || {
        core.counters.add(Count::Charged, bytes);
        pool.budget.charge_anyway(bytes);
        Ok(())
    };
    if need == Need::Prefetch {
        return Err(Fault::Budget);
    }
    if core.leaving() {
        return anyway();
    }
    core.counters.add(Count::Waits, 1);
    let mut since = (raw::monotonic_ns(), pool.evicted.load(Ordering::Relaxed));
    loop {
        pool.wanted.fetch_max(bytes, Ordering::Relaxed);
        pool.evict_bell.ring();
        if firm() > firm_max {
            raw::nap(FIRM_NAP_NS);
        } else {
            pool.budget.wait(bytes, BUDGET_LOOK_NS);
        }
        if firm() <= firm_max && pool.budget.try_charge(bytes) {
            core.counters.add(Count::Charged, bytes);
            return Ok(());
        }
        if core.leaving() {
            return anyway();
        }
        let evicted = pool.evicted.load(Ordering::Relaxed);
        if evicted != since.1 {
            since = (raw::monotonic_ns(), evicted);
        } else if raw::monotonic_ns() - since.0 > patience {
            return match core.stands_for {
                Some(_) => anyway(),
                None => Err(Fault::Budget),
            };
        }
    }
}

/// Claims one unit whose word was `seen`.
fn claim_one(core: &MapCore, unit: Unit, seen: Word, me: u32) -> Result<From, Word> {
    // A cool unit counts in its group as it did when it was resident.
    let absent = seen.state() == State::Absent && !seen.cool();
    if absent && core.table.enter(unit) {
        core.counters.add(Count::Charged, GROUP_BYTES);
        core.pool.budget.charge_anyway(GROUP_BYTES);
    }
    let claimed = core.page(unit).claim(seen, me);
    if absent && claimed.is_err() {
        core.table.leave(unit);
    }
    claimed
}

/// Becomes the owner of `unit`. The run stays empty if nothing is left to do: the page is there (and pinned, if that was wanted).
fn claim(core: &MapCore, unit: Unit, need: Need, run: &mut Run) -> Result<(), Fault> {
    // A child's handler finds no maps; other callers may come from what the child inherited.
    let load = matches!(need, Need::Load(_));
    if !load && (process::forked() || core.pid != process::pid()) {
        return Err(Fault::Forked);
    }
    if !matches!(core.reading, Reading::File { .. }) && core.pool.is_filler() {
        return Err(Fault::Recursion);
    }
    let backed = core.backed(unit, 1);
    if backed.is_empty() {
        return Err(Fault::PastEnd);
    }
    if let Need::Load(addr) = need
        && (addr - core.start) as u64 >= backed.end
    {
        return Err(Fault::PastEnd);
    }
    let me = owner(need);
    let page = core.page(unit);
    let mut counted = false;
    let mut count_miss = || {
        if !std::mem::replace(&mut counted, true) {
            core.counters.add(Count::Misses, 1);
            if load {
                core.streams.on_miss(core, unit, me);
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
                wait(core, unit, seen)?;
                continue;
            }
            (Need::Load(addr), State::Resident)
                if !core.pool.last_looks.again(me, addr, seen.bits()) =>
            {
                return Ok(());
            }
            (Need::Pin, State::Resident) if !seen.batch() && !seen.soft() => match page.pin(seen) {
                Ok(()) => return Ok(()),
                Err(_) if seen.pins() == PINS_MAX => return Err(Fault::Budget),
                Err(_) => continue,
            },
            (Need::Pin, State::Evicting) => {
                wait(core, unit, seen)?;
                continue;
            }
            (Need::Pin, _) if seen.batch() => {
                wait(core, unit, seen)?;
                continue;
            }
            _ => {}
        }
        // A pin would discard what it cannot read again; a load on a resident unit may still find it there.
        // What cools was read while the lease was held.
        let refused = core.refusal.load(Ordering::Acquire) != 0 && !seen.cool();
        if refused && (need == Need::Pin || seen.state() != State::Resident) {
            return Err(Fault::LeaseBroken);
        }
        count_miss();
        if let Ok(from) = claim_one(core, unit, seen, me) {
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
        Ok(from) => Some(origin(core, from)),
        Err(_) => {
            release(core, core.charge_of(unit));
            None
        }
    }
}

/// Adds the unit behind a run to it, if it can be had.
fn extend(core: &MapCore, run: &mut Run) -> bool {
    let unit = run.first + run.count as u64;
    if unit >= core.data_units() {
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
    let Some(unit) = run.first.checked_sub(1) else {
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

/// Units that are read with one that is missed, where that is done: 128 KiB of pages, as the kernel does for its mappings.
pub(crate) const AROUND: u64 = 32;

/// Adds what is absent around the unit of a run, up to the ends of the window that it lies in.
fn read_around(core: &MapCore, run: &mut Run) {
    let window = run.first / AROUND * AROUND;
    while run.first > window && extend_back(core, run) {}
    let end = window + AROUND;
    while run.first + (run.count as u64) < end && extend(core, run) {}
}

/// Gives one claimed unit up. `charged`: its memory was charged by this claim.
fn abandon(core: &MapCore, unit: Unit, from: Origin, me: u32, charged: bool) {
    let page = core.page(unit);
    if from == Origin::Resident && page.load().pins() > 0 {
        // Somebody pinned it while it was there: then it still is, and it is only this look that failed.
        publish(core, unit, me, Published::default());
        return;
    }
    if charged || from == Origin::Resident {
        // What a part of the fill has installed must not stay behind a word that says absent.
        discard_unit(core, unit);
    }
    if let Some(due) = page.abandon(me, 0) {
        if charged || from == Origin::Resident {
            release(core, core.charge_of(unit));
        }
        core.table.leave(unit);
        if due.wake {
            futex::wake_at(page.futex(), futex::ALL);
        }
    }
}

/// Takes the memory of a unit away that this thread owns: its bytes can be read again.
fn discard_unit(core: &MapCore, unit: Unit) {
    let r = core.backed(unit, 1);
    let (addr, len) = (core.start + r.start as usize, (r.end - r.start) as usize);
    let _ours = identity::discarding();
    if core.live.covers(addr, len) {
        // SAFETY: the caller owns the unit, whose bytes can be read again; its addresses are still the map's own, for as long
        // as no report is acted on.
        unsafe { mem::discard(addr, len) };
    }
}

/// How a unit becomes resident.
#[derive(Debug, Clone, Copy, Default)]
struct Published {
    pin: bool,
    hot: bool,
    soft: bool,
    /// It was read ahead.
    ahead: bool,
}

/// Makes a filled unit resident.
fn publish(core: &MapCore, unit: Unit, me: u32, how: Published) {
    let page = core.page(unit);
    let pool = &*core.pool;
    let clock = pool.clock.load(Ordering::Relaxed);
    let Some(due) = page.finish(me, clock, how.pin, how.hot, how.soft) else {
        return;
    };
    if due.wake {
        futex::wake_at(page.futex(), futex::ALL);
    }
    if due.track {
        track(core, unit, how.ahead);
    }
}

/// Tells the evictor of a unit.
pub(crate) fn track(core: &MapCore, unit: Unit, ahead: bool) {
    let pool = &*core.pool;
    pool.fresh.fetch_add(core.unit_bytes(), Ordering::Relaxed);
    let entry = track_entry(core.id, core.unit_shift, unit) | if ahead { AHEAD } else { 0 };
    // The ring is large; it can be full only while the evictor is held up for long.
    while !pool.filled.push(entry) {
        pool.evict_bell.ring();
        raw::nap(RING_NAP_NS);
    }
}

/// Takes back an eviction whose batch was not sent.
pub(crate) fn cancel_eviction(core: &MapCore, unit: Unit, was_soft: bool) {
    let page = core.page(unit);
    let cancelled = page.cancel_evict(was_soft);
    if cancelled.claimed {
        release(core, core.charge_of(unit));
    }
    if cancelled.wake {
        futex::wake_at(page.futex(), futex::ALL);
    }
}

const UNIT_BITS: u32 = 40;
const ID_BITS: u32 = 17;
const _: () = assert!(super::registry::MAPS_MAX < 1 << ID_BITS);

/// An entry of the evictor's queue: which unit of which map, and how large it is. Never zero.
pub(crate) fn track_entry(id: u32, unit_shift: u32, unit: Unit) -> u64 {
    u64::from(unit_shift) << (UNIT_BITS + ID_BITS) | (u64::from(id) + 1) << UNIT_BITS | unit
}

/// Undoes [`track_entry`]: the map's gate, and the unit.
pub(crate) fn entry_parts(entry: u64) -> (u32, Unit) {
    let id = (entry >> UNIT_BITS) as u32 & ((1 << ID_BITS) - 1);
    (id - 1, entry & ((1 << UNIT_BITS) - 1))
}

/// Marks the entry of a unit that was read ahead.
const AHEAD: u64 = 1 << 63;

/// Whether the unit was read ahead.
pub(crate) fn entry_ahead(entry: u64) -> bool {
    entry & AHEAD != 0
}

/// The size of an entry's unit, in bytes.
pub(crate) fn entry_bytes(entry: u64) -> u64 {
    1 << ((entry & !AHEAD) >> (UNIT_BITS + ID_BITS))
}

/// A refault is soon if less was evicted meanwhile than the budget holds.
fn origin(core: &MapCore, from: From) -> Origin {
    match from {
        From::Absent(0) => Origin::Cold,
        From::Absent(then) => {
            let now = core.pool.clock.load(Ordering::Relaxed);
            let evicted = u64::from(now.wrapping_sub(then));
            let reach = ghost_reach(core.pool.budget.limit() / PAGE as u64);
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

/// Gives a slot of the cooling area back.
pub(crate) fn give_slot(core: &MapCore, slot: u32) {
    if Trips::is_trip(slot) {
        core.pool.trips.give(slot);
    } else if let Some(cooling) = core.pool.cooling.get() {
        cooling.give(slot);
    }
}

/// Leaves a unit in its slot that could not be rescued now: its bytes are as good as they were.
fn cool_again(core: &MapCore, unit: Unit, me: u32, slot: u32) {
    match core.page(unit).finish_cool(me, slot) {
        Some(due) if due.wake => futex::wake_at(core.page(unit).futex(), futex::ALL),
        Some(_) => {}
        // The claim was taken for a dead one's.
        None => give_slot(core, slot),
    }
}

/// Installs a cool unit, which this thread owns, from its slot. No device is asked, so its source is not either.
fn rescue(core: &MapCore, run: &Run, need: Need) -> Result<(), Fault> {
    let backed = core.backed(run.first, 1);
    let trip = Trips::is_trip(run.slot);
    let from = match core.pool.cooling.get() {
        _ if trip => Some(core.pool.trips.addr(run.slot)),
        cooling => cooling.map(|c| c.addr(run.slot)),
    };
    let installed = match from {
        // Slots are pages, and only units of a page are put there.
        Some(from) if backed.end - backed.start == PAGE as u64 => {
            install(core, core.start + backed.start as usize, from, PAGE)
        }
        _ => Err(Fault::Source),
    };
    match installed {
        Ok(_) => {
            give_slot(core, run.slot);
            let how = Published {
                pin: need == Need::Pin,
                // That a trip is touched says nothing: it was meant to be.
                hot: !trip,
                ahead: trip,
                soft: false,
            };
            publish(core, run.first, run.me, how);
            let what = if trip { Count::Fills } else { Count::Rescued };
            core.counters.add(what, 1);
        }
        Err(_) => {
            release(core, core.charge_of(run.first));
            cool_again(core, run.first, run.me, run.slot);
            core.counters.add(Count::Errors, 1);
        }
    }
    core.pool.nudge_evictor();
    installed.map(drop)
}

/// Reads and installs a run that this thread owns, and publishes its units.
///
/// With `trip`, the first unit's bytes go to that slot, and the unit becomes cool.
pub(crate) fn fill(
    core: &MapCore,
    run: &Run,
    need: Need,
    trip: Option<u32>,
    fetch: Fetch<'_>,
) -> Result<(), Fault> {
    let began = raw::monotonic_ns();
    if need == Need::Pin && run.from[0] == Origin::Resident {
        // Renewal: what is there may be marked MADV_FREE; only a fresh page can be pinned.
        discard_unit(core, run.first);
    }
    let backed = core.backed(run.first, run.count as u64);
    let keep = trip.map(|slot| core.pool.trips.addr(slot));
    let result = read_and_install(&backed, keep, fetch);
    let (good, installed_new) = match result {
        Ok((end, new)) => (end, new),
        Err((end, _)) => (end, 0),
    };
    let mut filled = 0;
    for i in 0..run.count {
        let unit = run.first + i as u64;
        let whole = core.backed(unit, 1).end <= good;
        if whole {
            let how = Published {
                pin: need == Need::Pin,
                hot: run.from[i] == Origin::Hot,
                // A unit of several pages, some of which were there: those may still be marked MADV_FREE.
                soft: run.from[i] == Origin::Resident && installed_new < backed.end - backed.start,
                ahead: need == Need::Prefetch,
            };
            match trip {
                Some(slot) if i == 0 => park(core, unit, run, slot),
                _ => publish(core, unit, run.me, how),
            }
            filled += 1;
        } else {
            abandon(core, unit, run.from[i], run.me, true);
            if i == 0
                && let Some(slot) = trip
            {
                core.pool.trips.give(slot);
            }
        }
    }
    core.counters.add(
        Count::Fills,
        filled - u64::from(trip.is_some() && filled > 0),
    );
    core.counters.record_fill_ns(raw::monotonic_ns() - began);
    if run.from[0] == Origin::Resident && need != Need::Pin && installed_new > 0 {
        core.counters.add(Count::TakenBack, 1);
    }
    core.pool.nudge_evictor();
    match result {
        Err((_, why)) if filled == 0 => {
            core.counters.add(Count::Errors, 1);
            Err(why)
        }
        // The unit that was wanted is there; the rest of the run was a guess.
        _ if filled > 0 => Ok(()),
        _ => Err(Fault::PastEnd),
    }
}

/// Leaves a unit that was read in its slot.
fn park(core: &MapCore, unit: Unit, run: &Run, slot: u32) {
    match core.page(unit).finish_cool(run.me, slot) {
        // The slots are charged by themselves.
        Some(due) => {
            release(core, core.charge_of(unit));
            if due.wake {
                futex::wake_at(core.page(unit).futex(), futex::ALL);
            }
        }
        None => {
            core.pool.trips.give(slot);
            abandon(core, unit, run.from[0], run.me, true);
        }
    }
}

/// Reads `range` (bytes of the region, whole pages) in pieces and installs them, but for the first page if it is to be
/// kept elsewhere. Returns the end of what is installed, and how many bytes were not there before; with an error, the end
/// of what was installed before it.
fn read_and_install(
    range: &std::ops::Range<u64>,
    mut keep: Option<usize>,
    fetch: Fetch<'_>,
) -> Result<(u64, u64), (u64, Fault)> {
    let mut at = range.start;
    let mut new = 0;
    while at < range.end {
        let piece = fetch(at, range.end, keep.take()).map_err(|why| (at, why))?;
        at += piece.present;
        new += piece.new;
        if piece.present < piece.wanted {
            // The source ended early: it was truncated since it was mapped.
            break;
        }
    }
    Ok((at, new))
}

/// Fetches a piece from the map's file, through a staging buffer.
pub(crate) fn file_piece(
    core: &MapCore,
    fd: &Fd,
    at: u64,
    end: u64,
    keep: Option<usize>,
) -> Result<Piece, Fault> {
    let pool = &*core.pool;
    let buffer = pool.staging.take((end - at) as usize, &pool.budget);
    // Direct reads want whole pages; the source may well end in the last.
    let want = ((end - at) as usize).min(buffer.len());
    let piece = read_file(core, fd, buffer.addr(), want, core.base + at)
        .and_then(|got| install_piece(core, at, buffer.addr(), got, want, keep));
    pool.staging.give(buffer);
    piece
}

/// Installs `got` bytes at `src` (a buffer of `want` bytes, whole pages) as the piece of the region that starts at `at`.
pub(crate) fn install_piece(
    core: &MapCore,
    at: u64,
    src: usize,
    got: usize,
    want: usize,
    keep: Option<usize>,
) -> Result<Piece, Fault> {
    let got = got.min(want);
    let data = want.min((core.data_len - at.min(core.data_len)) as usize);
    core.counters.add(Count::BytesRead, got as u64);
    // What lies behind the mapped length but in its last page reads as the file has it, as with mmap; behind the end
    // of the source it is zero.
    let pages = if got >= data {
        want
    } else {
        got.next_multiple_of(PAGE)
    };
    // SAFETY: the buffer is the caller's, and `got <= pages <= want`, its length.
    unsafe { core::ptr::write_bytes((src + got) as *mut u8, 0, pages - got) };
    let kept = match keep {
        Some(slot) if pages > 0 => {
            // SAFETY: a slot of one page, which is the caller's, and at least one page at `src`.
            unsafe { core::ptr::copy_nonoverlapping(src as *const u8, slot as *mut u8, PAGE) };
            PAGE
        }
        _ => 0,
    };
    let at = core.start + at as usize;
    let new = install(core, at + kept, src + kept, pages - kept)?;
    Ok(Piece {
        present: pages as u64,
        new,
        wanted: want as u64,
    })
}

/// Installs `len` bytes at `dst`; pages that are there already stay. Returns how many bytes were installed.
fn install(core: &MapCore, dst: usize, src: usize, len: usize) -> Result<u64, Fault> {
    let fd = &core.pool.uffd;
    let mut number = fd.get();
    let mut done = 0;
    let mut new = 0;
    let (mut tries, mut busy) = (0, 0);
    let mut step = len;
    while done < len {
        let part = step.min(len - done);
        // SAFETY: the region is ours and registered; the staging buffer holds the right bytes for it.
        let copied = unsafe { uffd::copy(number, dst + done, src + done, part, false) };
        done += copied.bytes;
        new += copied.bytes as u64;
        let Some(Errno(error)) = copied.error else {
            continue;
        };
        tries += 1;
        match error {
            libc::EEXIST => {
                // Somebody was faster with this page, or it never went away.
                done += PAGE;
                tries -= 1;
            }
            _ if tries > INSTALL_TRIES => return Err(Fault::Install(error)),
            // The kernel's own mapping is there by now, at least for a part of the range: it serves that.
            libc::ENOENT | libc::EINVAL if core.leaving() || !core.live.covers(dst, len) => {
                tries -= 1;
                if step > PAGE {
                    step = PAGE;
                } else {
                    done += PAGE;
                }
            }
            // A range is being unmapped or moved, and the report of it is not read yet: that is no failure.
            libc::EAGAIN if busy < BUSY_MAX => {
                tries -= 1;
                busy += 1;
                if busy < 100 {
                    raw::sched_yield();
                } else {
                    raw::nap(BUSY_NAP_NS);
                }
            }
            libc::ENOMEM => {
                core.pool.evict_bell.ring();
                raw::nap(1_000_000);
            }
            // The number is closed, or names something that is no userfaultfd, or one that was never enabled.
            libc::EBADF | libc::ENOTTY | libc::EINVAL | libc::EOPNOTSUPP | libc::EPERM
                if tries <= 3 =>
            {
                number = fd.recover(number).map_err(|_| Fault::Install(error))?;
            }
            _ => return Err(Fault::Install(error)),
        }
    }
    Ok(new)
}

/// Whether what was just read through `number` came from the map's file, under its lease.
///
/// A number that the program closed may name another file by now. Under a lease one question answers both: of all
/// descriptors only those of leased maps hold one, and `fds` knows which map has which number. Without a lease, device
/// and inode are compared.
fn verify(core: &MapCore, fd: &Fd, number: i32) -> Result<(), Fault> {
    let Reading::File { id, leased, .. } = &core.reading else {
        return Ok(());
    };
    if !*leased {
        return match file::status(number) {
            Ok(st) if st.id == *id => Ok(()),
            _ => Err(Fault::Read(libc::EBADF)),
        };
    }
    // While the lease is being broken F_GETLEASE no longer tells it apart from one that is gone; the kernel's list does.
    let held = file::holds_read_lease(number) || file::lease_still_listed(number);
    // Numbers too large to be remembered are compared as files.
    let ours = fd
        .owns(number)
        .unwrap_or_else(|| file::status(number).is_ok_and(|st| st.id == *id));
    match (held, ours) {
        (true, true) => Ok(()),
        (true, false) => Err(Fault::Read(libc::EBADF)),
        // Gone for good if this is our descriptor; otherwise the real one may still have it.
        (false, _) if file::status(number).is_ok_and(|st| st.id == *id) => Err(Fault::LeaseBroken),
        (false, _) => Err(Fault::Read(libc::EBADF)),
    }
}

/// Reads `len` bytes of the map's file, fewer only at its end, and makes sure that they are the file's.
fn read_file(core: &MapCore, fd: &Fd, buf: usize, len: usize, offset: u64) -> Result<usize, Fault> {
    let mut number = fd.get();
    let mut last = None;
    // Once with the descriptor as it is, once with one that the keeper kept.
    for _ in 0..3 {
        let read = read_whole(number, buf, len, offset);
        match (read, verify(core, fd, number)) {
            (Ok(got), Ok(())) => return whole_or_end(core, number, got, len, offset),
            (Err(e), Ok(())) if e != libc::EBADF => return Err(Fault::Read(e)),
            // The right file without the lease: ours, or one of the program's own under our number. The keeper knows.
            (_, Err(Fault::LeaseBroken)) if fd.is_kept_open_file(number) => {
                return Err(Fault::LeaseBroken);
            }
            (_, Err(why)) => last = Some(why),
            _ => last = Some(Fault::Read(libc::EBADF)),
        }
        // A foreign or closed number, or a lease that this number does not hold: ask for the real one.
        match fd.recover(number) {
            Ok(fresh) => number = fresh,
            Err(_) => break,
        }
    }
    Err(last.unwrap_or(Fault::Read(libc::EBADF)))
}

/// Takes a short read for the end of the file only if the file says so: zeros in the place of bytes that a storage did
/// not deliver would be wrong bytes.
fn whole_or_end(
    core: &MapCore,
    number: i32,
    got: usize,
    len: usize,
    offset: u64,
) -> Result<usize, Fault> {
    let data = (core.base + core.data_len).saturating_sub(offset);
    if got as u64 >= data.min(len as u64) {
        return Ok(got);
    }
    let ours = |st: &file::Status| match &core.reading {
        Reading::File { id, .. } => st.id == *id,
        Reading::Source { .. } => true,
    };
    match file::status(number) {
        // The number was closed since, and names another file.
        Ok(st) if !ours(&st) => Err(Fault::Read(libc::EBADF)),
        Ok(st) if st.len <= offset + got as u64 => Ok(got),
        Ok(_) => Err(Fault::Read(libc::EIO)),
        Err(Errno(e)) => Err(Fault::Read(e)),
    }
}

/// `pread` until `len` bytes are there, the file ends, or nothing new comes.
fn read_whole(number: i32, buf: usize, len: usize, offset: u64) -> Result<usize, i32> {
    let mut got = 0;
    let mut again = 0;
    while got < len {
        // A direct read continues only at a page: after an odd count, the last page is read again.
        let from = got & !(PAGE - 1);
        // SAFETY: the staging buffer is on loan to this thread and `from <= got < len`, its length at most.
        match unsafe { file::pread(number, buf + from, len - from, offset + from as u64) } {
            Ok(n) if from + n <= got => return Ok(got),
            Ok(n) => got = from + n,
            Err(Errno(libc::EINTR)) => {}
            Err(Errno(libc::EAGAIN)) if again < AGAIN_MAX => {
                again += 1;
                raw::nap(1_000_000);
            }
            Err(Errno(e)) => return Err(e),
        }
    }
    Ok(got)
}

/// What a faulting thread leaves for a fill thread. It lives on the faulting thread's stack until `done` is set.
pub(crate) struct Handed {
    pub(crate) core: *const MapCore,
    pub(crate) run: Run,
    /// 0: not yet; 1: filled; otherwise an encoded [`Fault`].
    pub(crate) done: AtomicU32,
}

/// Has a fill thread serve a run, and sleeps until it did.
fn hand_over(core: &MapCore, request: &Handed) -> Result<(), Fault> {
    let pool = &*core.pool;
    while !pool.handover.push(request as *const Handed as usize) {
        pool.fill_bell.ring();
        raw::nap(100_000);
    }
    pool.fill_bell.ring();
    loop {
        match request.done.load(Ordering::Acquire) {
            0 => {
                futex::wait(&request.done, 0, WAIT_NS);
                // A bell rung before the fill threads slept is not lost, but a second ring is cheap.
                if request.done.load(Ordering::Acquire) == 0 {
                    pool.fill_bell.ring();
                }
            }
            1 => return Ok(()),
            code => return Err(Fault::decode(code)),
        }
    }
}

/// Answers a request. Its memory belongs to the faulting thread again from the moment that `done` is set.
///
/// # Safety
///
/// `request` must come from the pool's handover queue and be answered once only.
pub(crate) unsafe fn answer(request: *const Handed, result: Result<(), Fault>) {
    // SAFETY: the faulting thread keeps the request until `done` is set, which happens here.
    let done = unsafe { &raw const (*request).done };
    let code = result.map_or_else(Fault::encode, |()| 1);
    // SAFETY: as above, for the store; the wake names the address only.
    unsafe { (*done).store(code, Ordering::Release) };
    futex::wake_at(done.cast(), 1);
}

/// Fills what the pool's budget has room for, from `unit` on, up to `count` units, never waiting: a prefetch.
/// Returns how many units were looked at.
pub(crate) fn prefetch(
    core: &MapCore,
    unit: Unit,
    count: u64,
    fetch: Fetch<'_>,
) -> Result<u64, Fault> {
    let mut run = Run::new();
    claim(core, unit, Need::Prefetch, &mut run)?;
    if run.count == 0 {
        return Ok(1);
    }
    if run.from[0] == Origin::Cool {
        // Cannot be: who prefetches leaves cool units where they are.
        return rescue(core, &run, Need::Prefetch).map(|()| 1);
    }
    while (run.count as u64) < count && extend(core, &mut run) {}
    fill(core, &run, Need::Prefetch, None, fetch)?;
    Ok(run.count as u64)
}

/// As [`prefetch`], for one run whose first unit is a trip: its bytes go to `slot`, which is given back if that does not
/// come to pass.
pub(crate) fn prefetch_trip(
    core: &MapCore,
    unit: Unit,
    count: u64,
    slot: u32,
    fetch: Fetch<'_>,
) -> Result<u64, Fault> {
    let mut run = Run::new();
    let claimed = claim(core, unit, Need::Prefetch, &mut run);
    if claimed.is_err() || run.count == 0 {
        // It is there already, or there is no room.
        core.pool.trips.give(slot);
        return claimed.map(|()| 1);
    }
    while (run.count as u64) < count && extend(core, &mut run) {}
    fill(core, &run, Need::Prefetch, Some(slot), fetch)?;
    Ok(run.count as u64)
}
