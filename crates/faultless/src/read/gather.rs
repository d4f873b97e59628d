//! Reading many units at the depth at which a device works best, in the calling thread.
//!
//! It is a first pass, and does what can be done without waiting for other threads: the thread has claimed many units, and others may wait
//! for them. It leaves out units that other threads fill, units for which the budget has no room, and units that cannot be read. A second
//! pass ([`ask`](crate::fault::ask), pins) serves those one by one, and finds out what is wrong.

#![allow(
    unsafe_code,
    reason = "has the kernel read into buffers given by address"
)]

use crate::base::clock;
use crate::base::ids::{Nanos, Unit};
use crate::base::primitive::Ordering;
use crate::fault::ahead::part_units;
use crate::fault::claim::{claim, extend};
use crate::fault::fill::{fill, settle};
use crate::fault::give_up::abandon;
use crate::fault::install::{Filled, install_piece};
use crate::fault::piece::file_piece;
use crate::fault::read_file::{Seen, is_whole};
use crate::fault::refusal::Refusal;
use crate::fault::run::{Need, Origin, Run};
use crate::read::rings::{DEPTH, Rings};
use crate::read::uring::{Read, Uring};
use crate::space::counters::Count;
use crate::space::fds::Fd;
use crate::space::map_core::{MapCore, Reading};
use crate::space::page::State;
use crate::space::pool_core::PoolCore;
use crate::sync::staging::{Buffer, CHUNK_MAX};
use faultless_sys::signal;
use std::ops::Range;

/// How long to wait for reads that the kernel was told of, where it takes no more calls; and how often to look.
const END_WAIT: Nanos = Nanos::from_secs(10);
const END_NAP: Nanos = Nanos::from_millis(1);
/// Units that are read between two moments at which no unit is claimed and the thread's signals are open.
const WAVE: u64 = 1024;

/// A place in the units of a map that are wanted.
struct Cursor<'a> {
    core: &'a MapCore,
    fd: &'a Fd,
    need: Need,
    ranges: &'a [Range<Unit>],
    at: usize,
    unit: Unit,
}

impl Cursor<'_> {
    /// Goes on to the next unit that is absent, and that no thread reads. The units from there on that belong to the same range.
    fn next_absent(&mut self) -> Option<Range<Unit>> {
        if self.core.closing.load(Ordering::Relaxed) {
            return None;
        }
        loop {
            let units = self.ranges.get(self.at)?;
            while self.unit < units.end {
                if is_absent(self.core, self.unit) {
                    return Some(self.unit..units.end);
                }
                self.unit += 1;
            }
            self.at += 1;
            self.unit = self.ranges.get(self.at)?.start;
        }
    }
}

/// Whether a unit is absent, and no thread is at it.
pub(crate) fn is_absent(core: &MapCore, unit: Unit) -> bool {
    let word = core.page(unit).load();
    word.state() == State::Absent && !word.cool() && !word.batch()
}

/// Reads what is absent of some units of a map, which a program touches ([`Need::Ask`]) or may touch ([`Need::Prefetch`]). It waits for
/// devices alone. `alone` serves a unit for which there is no room, may take its time, and says whether to go on. (Users' sources, and
/// units larger than buffers, are left out.)
pub(crate) fn gather(
    rings: &Rings,
    core: &MapCore,
    need: Need,
    ranges: &[Range<Unit>],
    mut alone: impl FnMut(Unit) -> bool,
) {
    let (Reading::File { fd, .. }, Some(first)) = (&core.reading, ranges.first()) else {
        return;
    };
    if core.unit_bytes() > CHUNK_MAX as u64 {
        return;
    }
    let mut cursor = Cursor {
        core,
        fd,
        need,
        ranges,
        at: 0,
        unit: first.start,
    };
    let mut ring = None;
    while let Some(units) = cursor.next_absent() {
        let before = (cursor.at, cursor.unit);
        ring = match ring {
            Some(ring) => rings.still(ring),
            None => rings.take(),
        };
        {
            // A signal handler that does not return (longjmp), or a cancellation, would leave units claimed for ever.
            let blocked = signal::Blocked::all();
            let _serving = core.pool.withheld.serving(blocked.former());
            let mut starved = true;
            if let Some(uring) = ring.take() {
                (ring, starved) = wave(rings, uring, &mut cursor);
            }
            // A single read may wait for a buffer, as a miss does.
            if starved && before == (cursor.at, cursor.unit) {
                run_by_itself(&mut cursor, units);
            }
        }
        if before == (cursor.at, cursor.unit) {
            let unit = cursor.unit;
            cursor.unit += 1;
            if is_absent(core, unit) && !alone(unit) {
                break;
            }
        }
    }
    if let Some(ring) = ring {
        rings.give(ring);
    }
}

/// Reads one run, where there is no ring. The cursor stays where it is if there is no room.
fn run_by_itself(cursor: &mut Cursor<'_>, units: Range<Unit>) {
    let &mut Cursor { core, fd, need, .. } = cursor;
    match claim_run(core, units, part_units(core)) {
        Claimed::Run(run) => {
            let fetch = &mut |range, keep| file_piece(core, fd, range, keep);
            let _ = fill(core, &run, need, None, fetch);
            cursor.unit = run.end();
        }
        Claimed::Nothing => cursor.unit += 1,
        Claimed::NoRoom => {}
    }
}

enum Claimed {
    Run(Run),
    /// The unit is there by now, or another thread's.
    Nothing,
    NoRoom,
}

/// Claims a run of absent units, so many at most.
fn claim_run(core: &MapCore, units: Range<Unit>, most: u64) -> Claimed {
    let mut run = Run::new();
    match claim(core, units.start, Need::Prefetch, &mut run) {
        Err(Refusal::Budget) => return Claimed::NoRoom,
        Ok(()) if run.count > 0 && run.from[0] != Origin::Cool => {}
        _ => return Claimed::Nothing,
    }
    while (run.count as u64) < most && run.end() < units.end && extend(core, &mut run) {}
    core.counters.add(Count::Misses, run.count as u64 - 1);
    Claimed::Run(run)
}

/// A read that the kernel is at.
struct Flight<'a> {
    core: &'a MapCore,
    need: Need,
    run: Run,
    buffer: Buffer,
    want: usize,
    began: Nanos,
}

impl Flight<'_> {
    /// The read has ended.
    fn land(self, got: Option<usize>, spare: &mut Spare<'_>) {
        let Flight { core, run, .. } = &self;
        let start = core.backed(run.units()).start;
        let installed = got.map(|got| {
            let src = self.buffer.addr();
            let filled = Filled {
                src,
                got,
                want: self.want,
            };
            install_piece(core, start, &filled, None)
        });
        match installed {
            Some(Ok(piece)) => {
                let outcome = Ok((start + piece.present, piece.new));
                let _ = settle(core, run, self.need, None, self.began, outcome);
            }
            // The second pass finds out what is wrong.
            _ => self.give_up(),
        }
        spare.keep(self.buffer);
    }

    fn give_up(&self) {
        for (unit, &from) in Unit::each(self.run.units()).zip(&self.run.from) {
            abandon(self.core, unit, from, self.run.me, true);
        }
    }
}

/// Buffers of reads that have ended, for those that come next: the pool's are taken and given back once for many reads.
struct Spare<'a> {
    pool: &'a PoolCore,
    buffers: Vec<Buffer>,
}

impl<'a> Spare<'a> {
    fn new(pool: &'a PoolCore) -> Self {
        Spare {
            pool,
            buffers: Vec::with_capacity(DEPTH),
        }
    }

    fn take(&mut self, bytes: usize) -> Option<Buffer> {
        if let Some(at) = self.buffers.iter().rposition(|b| b.is_for(bytes)) {
            return Some(self.buffers.swap_remove(at));
        }
        let PoolCore {
            staging, budget, ..
        } = self.pool;
        staging.try_take(bytes, budget).or_else(|| {
            // (Those of other sizes count among what threads have on loan.)
            self.give_back().then(|| staging.try_take(bytes, budget))?
        })
    }

    fn keep(&mut self, buffer: Buffer) {
        self.buffers.push(buffer);
    }

    /// Returns whether there was anything to give back.
    fn give_back(&mut self) -> bool {
        let any = !self.buffers.is_empty();
        let give = |buffer| self.pool.staging.give_lent(buffer);
        self.buffers.drain(..).for_each(give);
        any
    }
}

impl Drop for Spare<'_> {
    fn drop(&mut self) {
        self.give_back();
    }
}

/// What came of an attempt to begin a read.
enum Begun {
    /// So many units are on their way, or need not be.
    Units(u64),
    /// All buffers are in use.
    NoBuffer,
    NoRoom,
}

/// Reads what comes next by a ring, through the descriptor as it is now. Gives the ring back, unless it is of no use any more, and says
/// whether a read should be done without one.
fn wave(rings: &Rings, mut ring: Uring, cursor: &mut Cursor<'_>) -> (Option<Uring>, bool) {
    let (core, fd) = (cursor.core, cursor.fd);
    // Any file may have that number by now: of a pipe, a read takes what is in it, or waits for ever. So the ring holds the file, and is
    // asked for nothing unless that was the map's.
    let seen = Seen::of(fd);
    if ring.hold(seen.number).is_err() {
        return (Some(ring), true);
    }
    let (mut ring, by_itself) = match seen.was_right(core, fd) {
        true => fly(rings, ring, cursor, seen),
        false => (Some(ring), true),
    };
    if let Some(ring) = &mut ring {
        ring.release();
    }
    (ring, by_itself)
}

/// Reads many runs at a time from the file that the ring holds, until all that was claimed is there. As for [`wave`], it says whether it
/// ended for want of a buffer.
fn fly(
    rings: &Rings,
    mut ring: Uring,
    cursor: &mut Cursor<'_>,
    seen: Seen,
) -> (Option<Uring>, bool) {
    let mut flights: Vec<Option<Flight<'_>>> = (0..DEPTH).map(|_| None).collect();
    let (mut flying, mut left, mut starved) = (0, WAVE, false);
    let mut failed: Option<Nanos> = None;
    let mut spare = Spare::new(&cursor.core.pool);
    loop {
        while flying < DEPTH
            && left > 0
            && let Some(units) = cursor.next_absent()
        {
            let Some(free) = flights.iter().position(Option::is_none) else {
                break;
            };
            let most = part_units(cursor.core).min(left);
            let units = units.start..units.end.min(units.start + most);
            match begin(
                &mut ring,
                cursor,
                units,
                free,
                &mut flights[free],
                &mut spare,
            ) {
                Begun::Units(n) => {
                    cursor.unit += n;
                    flying += usize::from(flights[free].is_some());
                    left = left.saturating_sub(n);
                }
                Begun::NoBuffer if flying > 0 => break,
                Begun::NoBuffer => (left, starved) = (0, true),
                Begun::NoRoom => left = 0,
            }
        }
        if flying == 0 {
            return (failed.is_none().then_some(ring), starved);
        }
        let mut landed: [Option<Option<usize>>; DEPTH] = [None; DEPTH];
        match failed {
            None => {
                if let Err(e) = ring.submit_and_wait() {
                    // No call is made any more: it could have the kernel do what is given up here.
                    rings.refuse(format!("io_uring_enter: {e}"));
                    (failed, left) = (Some(clock::now()), 0);
                    // What the kernel was never told of is over. What it was told of ends by itself.
                    ring.never_told(|token| landed[token as usize] = Some(None));
                }
            }
            Some(then) if clock::now().since(then) > END_WAIT => {
                for flight in flights.iter().flatten() {
                    // (The buffers are not given back: the kernel may yet write to them.)
                    flight.give_up();
                    flight.core.pool.staging.keep_for_ever();
                }
                ring.leave();
                return (None, false);
            }
            Some(_) => clock::nap(END_NAP),
        }
        ring.reap(|token, got| landed[token as usize] = Some(got.ok()));
        // All of these reads have ended: one look is good for all of them.
        let mut right = None;
        for (slot, got) in landed.into_iter().enumerate() {
            let Some(got) = got else { continue };
            let Some(flight) = flights[slot].take() else {
                continue;
            };
            flying -= 1;
            let core = flight.core;
            let offset = core.source_at(core.backed(flight.run.units()).start);
            let got = got.filter(|&got| is_whole(core, got, flight.want, offset));
            let is_right = *right.get_or_insert_with(|| seen.was_right(core, cursor.fd));
            flight.land(got.filter(|_| is_right), &mut spare);
        }
    }
}

/// Claims what comes next, and queues the read of it.
fn begin<'a>(
    ring: &mut Uring,
    &Cursor { core, need, .. }: &Cursor<'a>,
    units: Range<Unit>,
    slot: usize,
    flight: &mut Option<Flight<'a>>,
    spare: &mut Spare<'_>,
) -> Begun {
    let absent = Unit::each(units.clone()).take_while(|&u| is_absent(core, u));
    let mut most = (absent.count() as u64).max(1);
    let mut take = |units: u64| spare.take((units << core.unit_shift) as usize);
    let mut buffer = take(most);
    while buffer.is_none() && most > 1 {
        most /= 2;
        buffer = take(most);
    }
    let Some(buffer) = buffer else {
        return Begun::NoBuffer;
    };
    let run = match claim_run(core, units, most) {
        Claimed::Run(run) => run,
        Claimed::Nothing => {
            spare.keep(buffer);
            return Begun::Units(1);
        }
        Claimed::NoRoom => {
            spare.keep(buffer);
            return Begun::NoRoom;
        }
    };
    let count = run.count as u64;
    let backed = core.backed(run.units());
    let want = (backed.end - backed.start) as usize;
    let begun = Flight {
        core,
        need,
        run,
        want,
        began: clock::now(),
        buffer,
    };
    let read = Read {
        token: slot as u64,
        buf: begun.buffer.addr(),
        len: want,
        offset: core.source_at(backed.start).get(),
    };
    // SAFETY: the buffer is on loan to this thread, has room for the units, and is given back once the read has ended, or never.
    let queued = unsafe { ring.queue(read) };
    if queued {
        *flight = Some(begun);
    } else {
        begun.give_up();
        spare.keep(begun.buffer);
    }
    Begun::Units(count)
}
