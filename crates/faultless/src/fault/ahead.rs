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

use super::area::Area;
use super::core::{MapCore, Unit};
use super::counters::Count;
use super::fill::AROUND;
use super::ring::Handover;
use faultless_sys::mem::PAGE;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Streams that are followed in one map.
const STREAMS: usize = 32;
/// Last misses that are remembered: sets by thread, and candidates in each.
const SETS: usize = 64;
const WAYS: usize = 4;
/// Longest distance between the misses of a stream, in units.
const STRIDE_MAX: i64 = 1 << 12;
/// Distance up to which a miss is taken to continue the nearest one, whatever its distance was before.
const STRIDE_NEAR: i64 = 64;
/// Equal distances that make a stream, if they are 1, and if not.
const EQUAL_NEXT: u64 = 2;
const EQUAL_FAR: u64 = 3;
/// First and largest window of a stream that reads unit by unit, in bytes.
const WINDOW_FIRST: u64 = 64 << 10;
const WINDOW_MAX: u64 = 2 << 20;
/// The same of one that leaves units out, in units.
const FAR_FIRST: u64 = 4;
const FAR_MAX: u64 = 64;
/// Most units of one request.
pub(crate) const PART_UNITS: u64 = 64;

/// No unit.
const NONE: u64 = u64::MAX;

/// Which streams are read ahead of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Mode {
    /// None.
    Off,
    /// Those that are found out.
    Detect,
    /// Every miss is taken for the start of one that reads unit by unit.
    Eager,
}

/// One stream. Fields other than `trip` are touched by who holds `held`.
#[derive(Debug)]
#[repr(align(64))]
struct Stream {
    /// The unit whose miss asks for the next window.
    trip: AtomicU64,
    held: AtomicBool,
    stride: AtomicI64,
    /// First unit that was not asked for yet.
    next: AtomicU64,
    /// Units of the last window.
    window: AtomicU64,
}

impl Stream {
    /// Whether the unit lies in the last two windows.
    fn asked_for(&self, unit: Unit) -> bool {
        if self.trip.load(Ordering::Relaxed) == NONE {
            return false;
        }
        let next = self.next.load(Ordering::Relaxed) as i64;
        let reach =
            self.stride.load(Ordering::Relaxed) * self.window.load(Ordering::Relaxed) as i64;
        let behind = next - unit as i64;
        behind.signum() == reach.signum() && behind.abs() <= reach.abs() * 2
    }
}

/// What is known of one map's readers.
#[derive(Debug)]
pub(crate) struct Streams {
    mode: AtomicU8,
    active: [Stream; STREAMS],
    /// Which stream to give up for a new one.
    hand: AtomicU32,
    /// Last misses: the unit, the distance to the one before, and how often it was the same.
    recent: [[AtomicU64; WAYS]; SETS],
}

const UNIT_BITS: u32 = 40;
const STRIDE_BITS: u32 = 16;

#[derive(Clone, Copy)]
struct Recent {
    unit: u64,
    stride: i64,
    equal: u64,
}

impl Recent {
    /// Never zero.
    fn pack(self) -> u64 {
        let stride = (self.stride as u16 as u64) << UNIT_BITS;
        (self.unit + 1) | stride | self.equal.min(255) << (UNIT_BITS + STRIDE_BITS)
    }

    fn unpack(word: u64) -> Option<Recent> {
        let unit = (word & ((1 << UNIT_BITS) - 1)).checked_sub(1)?;
        Some(Recent {
            unit,
            stride: i64::from((word >> UNIT_BITS) as u16 as i16),
            equal: word >> (UNIT_BITS + STRIDE_BITS),
        })
    }
}

impl Streams {
    pub(crate) fn new() -> Box<Self> {
        Box::new(Streams {
            mode: AtomicU8::new(Mode::Detect as u8),
            active: std::array::from_fn(|_| Stream {
                trip: AtomicU64::new(NONE),
                held: AtomicBool::new(false),
                stride: AtomicI64::new(0),
                next: AtomicU64::new(0),
                window: AtomicU64::new(0),
            }),
            hand: AtomicU32::new(0),
            recent: [const { [const { AtomicU64::new(0) }; WAYS] }; SETS],
        })
    }

    pub(crate) fn set_mode(&self, mode: Mode) {
        self.mode.store(mode as u8, Ordering::Relaxed);
    }

    /// A thread missed a unit.
    pub(crate) fn on_miss(&self, core: &MapCore, unit: Unit, thread: u32) {
        let mode = self.mode.load(Ordering::Relaxed);
        if mode == Mode::Off as u8 {
            return;
        }
        if let Some(s) = self
            .active
            .iter()
            .find(|s| s.trip.load(Ordering::Relaxed) == unit)
        {
            if let Some(held) = Held::take(s)
                && s.trip.load(Ordering::Relaxed) == unit
            {
                let entered = s.window.load(Ordering::Relaxed);
                core.counters.add(Count::AheadUsed, entered);
                held.advance(core);
            }
            return;
        }
        // A reader that is faster than the device waits for units that are on their way: nothing new.
        if self.active.iter().any(|s| s.asked_for(unit)) {
            return;
        }
        let eager = mode == Mode::Eager as u8;
        if let Some(stride) = self.stride_of(unit, thread, eager) {
            // Where each miss brings what lies around it, a reader in order misses once in each window.
            let in_order = core.reads_around() && (1..=AROUND as i64).contains(&stride);
            self.start(core, unit, if in_order { 1 } else { stride });
        }
    }

    /// Whether streams are to be found out: nothing is known of how the map will be read.
    pub(crate) fn detects(&self) -> bool {
        self.mode.load(Ordering::Relaxed) == Mode::Detect as u8
    }

    /// Notes a miss. The distance at which its thread reads, if this miss confirms one.
    fn stride_of(&self, unit: Unit, thread: u32, eager: bool) -> Option<i64> {
        let hash = thread.wrapping_mul(0x9E37_79B9);
        let set = &self.recent[(hash >> 26) as usize % SETS];
        let seen = |way: &AtomicU64| Recent::unpack(way.load(Ordering::Relaxed));
        let distance = |r: Recent| unit as i64 - r.unit as i64;
        // One that goes on as it did; then one that is near; then the place of any.
        let going_on = set.iter().find_map(|way| {
            let r = seen(way)?;
            (r.stride != 0 && distance(r) == r.stride).then_some((way, r.stride, r.equal + 1))
        });
        let least_useful = || {
            // What goes on nowhere makes room first; otherwise chance decides.
            let chance = (unit ^ (unit >> 7)) as usize;
            (0..WAYS)
                .map(|i| &set[(chance + i) % WAYS])
                .min_by_key(|way| seen(way).map_or(0, |r| 1 + r.equal.min(2)))
                .unwrap_or(&set[0])
        };
        let near = || {
            let near = set
                .iter()
                .filter_map(|way| Some((way, distance(seen(way)?))));
            let (way, d) = near
                .filter(|&(_, d)| d != 0 && d.abs() <= STRIDE_MAX)
                .min_by_key(|&(_, d)| d.abs())?;
            // What is farther off may be another stream: that one stays known.
            let way = if d.abs() <= STRIDE_NEAR {
                way
            } else {
                least_useful()
            };
            Some((way, d, 1))
        };
        let (way, stride, equal) = going_on
            .or_else(near)
            .unwrap_or_else(|| (least_useful(), 0, 0));
        let now = Recent {
            unit,
            stride,
            equal,
        };
        way.store(now.pack(), Ordering::Relaxed);
        match stride {
            _ if eager => Some(if equal > EQUAL_FAR { stride } else { 1 }),
            1 if equal >= EQUAL_NEXT => Some(1),
            0 => None,
            _ if equal >= EQUAL_FAR => Some(stride),
            _ => None,
        }
    }

    /// Follows a new stream, which has come to `unit`.
    fn start(&self, core: &MapCore, unit: Unit, stride: i64) {
        let next = unit.wrapping_add_signed(stride);
        if next >= core.data_units() {
            return;
        }
        // A free one, or whose turn it is.
        let free = self
            .active
            .iter()
            .find(|s| s.trip.load(Ordering::Relaxed) == NONE);
        let s = free.unwrap_or_else(|| {
            &self.active[self.hand.fetch_add(1, Ordering::Relaxed) as usize % STREAMS]
        });
        let Some(held) = Held::take(s) else {
            return;
        };
        held.give_up(core);
        s.stride.store(stride, Ordering::Relaxed);
        s.next.store(next, Ordering::Relaxed);
        s.window.store(0, Ordering::Relaxed);
        held.advance(core);
    }

    /// Books what was read ahead for streams that nobody goes on with: the map is being dropped.
    pub(crate) fn give_up(&self, core: &MapCore) {
        for s in &self.active {
            if let Some(held) = Held::take(s) {
                held.give_up(core);
            }
        }
    }

    /// The distance at which a stream reads.
    pub(crate) fn stride(&self, stream: usize) -> i64 {
        self.active[stream % STREAMS].stride.load(Ordering::Relaxed)
    }

    fn index(&self, s: &Stream) -> usize {
        let at = s as *const Stream as usize - self.active.as_ptr() as usize;
        at / size_of::<Stream>()
    }
}

/// A stream in the hands of one thread. Others go on without: it is all guessing.
struct Held<'a>(&'a Stream);

impl<'a> Held<'a> {
    fn take(s: &'a Stream) -> Option<Self> {
        (!s.held.swap(true, Ordering::Acquire)).then_some(Held(s))
    }

    /// A window that was asked for and never entered is waste.
    fn give_up(&self, core: &MapCore) {
        let s = self.0;
        if s.trip.swap(NONE, Ordering::Relaxed) != NONE {
            let window = s.window.load(Ordering::Relaxed);
            core.counters.add(Count::AheadWasted, window);
        }
    }

    /// Asks for the next window.
    fn advance(&self, core: &MapCore) {
        let s = self.0;
        let (stride, first) = (
            s.stride.load(Ordering::Relaxed),
            s.next.load(Ordering::Relaxed),
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
            1.. => (core.data_units().saturating_sub(first)).div_ceil(stride as u64),
            _ if first < core.data_units() => first / stride.unsigned_abs() + 1,
            _ => 0,
        };
        let window = window.min(rest);
        s.window.store(window, Ordering::Relaxed);
        if window == 0 {
            s.trip.store(NONE, Ordering::Relaxed);
            return;
        }
        let beyond = first.wrapping_add_signed(stride * window as i64);
        s.next.store(beyond, Ordering::Relaxed);
        s.trip.store(first, Ordering::Relaxed);
        core.counters.add(Count::Ahead, window);
        let stream = core.streams.index(s);
        let (mut at, mut left) = (first, window);
        // The parts are for several threads at once; where units are left out, each is a read of its own.
        let part = if stride == 1 {
            PART_UNITS.min((256 << 10 >> core.unit_shift).max(1))
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
            at = at.wrapping_add_signed(stride * units as i64);
            left -= units;
        }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.held.store(false, Ordering::Release);
    }
}

/// A part of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    /// The number of the map's gate. Another map may have it by now; reading ahead there is of no use, and no harm.
    pub(crate) map: u32,
    pub(crate) unit: Unit,
    pub(crate) units: u64,
    /// The first unit is the window's trip.
    pub(crate) trip: bool,
    pub(crate) stream: usize,
}

const MAP_BITS: u32 = 17;
const COUNT_BITS: u32 = 6;
const UNITS_BITS: u32 = 64 - MAP_BITS - COUNT_BITS - 1 - STREAM_BITS;
const STREAM_BITS: u32 = STREAMS.trailing_zeros();
// The largest map is 64 TiB.
const _: () = assert!(PART_UNITS == 1 << COUNT_BITS && UNITS_BITS >= 34);

impl Request {
    fn pack(self) -> usize {
        let mut word = self.unit & ((1 << UNITS_BITS) - 1);
        word = word << COUNT_BITS | (self.units - 1) & (PART_UNITS - 1);
        word = word << 1 | u64::from(self.trip);
        word = word << STREAM_BITS | self.stream as u64;
        (word << MAP_BITS | u64::from(self.map)) as usize
    }

    pub(crate) fn unpack(word: usize) -> Self {
        let mut word = word as u64;
        let mut take = |bits: u32| {
            let value = word & ((1 << bits) - 1);
            word >>= bits;
            value
        };
        Request {
            map: take(MAP_BITS) as u32,
            stream: take(STREAM_BITS) as usize,
            trip: take(1) == 1,
            units: take(COUNT_BITS) + 1,
            unit: take(UNITS_BITS),
        }
    }
}

/// The queue of requests.
pub(crate) type Requests = Handover;

/// Marks the numbers of trip slots among those of all slots.
const TRIP: u32 = 1 << 31;

/// Slots for the bytes of trips.
#[derive(Debug)]
pub(crate) struct Trips {
    area: Area,
    busy: Box<[AtomicU8]>,
    hand: AtomicU32,
    /// Whose bytes are, or were, in the slots. Who takes a slot holds the lock until it is noted here.
    owners: Mutex<Vec<Owner>>,
}

/// Whose bytes a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Owner {
    pub(crate) map: u32,
    pub(crate) serial: u64,
    pub(crate) unit: Unit,
}

/// Most memory for trips.
const TRIPS_MAX: u64 = 256;

impl Trips {
    /// As many slots as become a budget of `limit` bytes.
    pub(crate) fn new(limit: u64) -> std::io::Result<Self> {
        let slots = (limit / 64 / PAGE as u64).clamp(2, TRIPS_MAX) as usize;
        Ok(Trips {
            area: Area::new(slots * PAGE)?,
            busy: (0..slots).map(|_| AtomicU8::new(0)).collect(),
            hand: AtomicU32::new(0),
            owners: Mutex::new(vec![Owner::default(); slots]),
        })
    }

    /// Bytes that the slots take.
    pub(crate) fn bytes(&self) -> u64 {
        self.area.len() as u64
    }

    /// Whether a slot is one of these.
    pub(crate) fn is_trip(slot: u32) -> bool {
        slot & TRIP != 0
    }

    /// Address of a slot's bytes.
    pub(crate) fn addr(&self, slot: u32) -> usize {
        let at = (slot & !TRIP) as usize;
        assert!(at < self.busy.len());
        self.area.start() + at * PAGE
    }

    /// A slot for `owner`: a free one, or one that `steal` can take from who has it. For ordinary contexts.
    pub(crate) fn take(&self, owner: Owner, steal: impl FnOnce(u32, Owner) -> bool) -> Option<u32> {
        let mut owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = self.hand.fetch_add(1, Ordering::Relaxed) as usize;
        let mut order = (0..self.busy.len()).map(|i| (turn + i) % self.busy.len());
        let free = order.find(|&at| {
            let flag = &self.busy[at];
            flag.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        });
        let at = free.or_else(|| {
            let at = turn % self.busy.len();
            steal(at as u32 | TRIP, owners[at]).then_some(at)
        })?;
        self.busy[at].store(1, Ordering::Relaxed);
        owners[at] = owner;
        Some(at as u32 | TRIP)
    }

    /// Gives a slot back.
    pub(crate) fn give(&self, slot: u32) {
        self.busy[(slot & !TRIP) as usize].store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_their_packing() {
        for units in [1, 2, 63, 64] {
            for trip in [false, true] {
                let r = Request {
                    map: 65_535,
                    unit: (1 << 34) - 1,
                    units,
                    trip,
                    stream: 31,
                };
                assert_eq!(Request::unpack(r.pack()), r);
            }
        }
    }

    fn found(misses: &[u64], eager: bool) -> Option<i64> {
        let streams = Streams::new();
        misses
            .iter()
            .filter_map(|&u| streams.stride_of(u, 77, eager))
            .last()
    }

    #[test]
    fn readers_in_order_are_found_and_others_are_not() {
        assert_eq!(found(&[10, 11], false), None, "too early");
        assert_eq!(found(&[10, 11, 12], false), Some(1));
        assert_eq!(found(&[0, 7, 14], false), None, "too early");
        assert_eq!(found(&[0, 7, 14, 21], false), Some(7));
        assert_eq!(found(&[90, 89, 88, 87], false), Some(-1), "backwards");
        assert_eq!(found(&[5, 900, 33, 812, 77, 1, 400, 212], false), None);
        assert_eq!(found(&[5, 5, 5, 5], false), None);
        assert_eq!(found(&[5], true), Some(1), "it was said");
    }

    #[test]
    fn one_thread_may_read_several_streams() {
        let streams = Streams::new();
        let starts = [1u64 << 20, 1 << 25, 1 << 30, 1 << 33];
        let found: Vec<Option<i64>> = (0..4)
            .flat_map(|i| starts.map(|s| s + i + (s >> 19)))
            .map(|u| streams.stride_of(u, 3, false))
            .collect();
        assert!(found[12..].contains(&Some(1)), "{found:?}");
    }

    #[test]
    fn a_random_reader_is_never_taken_for_a_stream() {
        let streams = Streams::new();
        let mut x = 1u64;
        for _ in 0..1_000_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            assert_eq!(streams.stride_of((x >> 40) % (1 << 20), 1, false), None);
        }
    }

    #[test]
    fn trips_are_taken_once() {
        let trips = Trips::new(1 << 20).expect("memory");
        assert_eq!(trips.bytes(), 4 * PAGE as u64);
        let owner = |unit| Owner {
            map: 1,
            serial: 2,
            unit,
        };
        let never = |_, _| panic!("there are free ones");
        let all: Vec<u32> = (0..4)
            .map(|u| trips.take(owner(u), never).expect("free"))
            .collect();
        assert!(all.iter().all(|&t| Trips::is_trip(t)));
        assert_eq!(trips.take(owner(9), |_, _| false), None, "all in use");
        let mut asked = None;
        let stolen = trips.take(owner(9), |slot, from| {
            asked = Some((slot, from));
            true
        });
        let at = all
            .iter()
            .position(|&t| Some(t) == stolen)
            .expect("one of them");
        assert_eq!(asked, Some((all[at], owner(at as u64))));
        trips.give(all[2]);
        assert_eq!(trips.take(owner(5), never), Some(all[2]));
    }
}
