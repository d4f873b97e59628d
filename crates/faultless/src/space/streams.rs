//! What is known of a map's readers: the streams that are followed, and the last misses, from which new ones are found.

use crate::base::ids::{MapId, Unit};
use crate::base::primitive::{AtomicBool, AtomicI64, AtomicU8, AtomicU32, AtomicU64, Ordering};
use crate::sync::handover::Handover;
use std::ops::{Deref, Range};

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
pub(crate) const WINDOW_FIRST: u64 = 64 << 10;
pub(crate) const WINDOW_MAX: u64 = 2 << 20;
/// The same of one that leaves units out, in units.
pub(crate) const FAR_FIRST: u64 = 4;
pub(crate) const FAR_MAX: u64 = 64;
/// Most units of one request.
pub(crate) const PART_UNITS: u64 = 64;

/// No unit.
pub(crate) const NO_UNIT: u64 = u64::MAX;

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
pub(crate) struct Stream {
    /// The unit whose miss asks for the next window.
    pub(crate) trip: AtomicU64,
    held: AtomicBool,
    pub(crate) stride: AtomicI64,
    /// First unit that was not asked for yet.
    pub(crate) next: AtomicU64,
    /// Units of the last window.
    pub(crate) window: AtomicU64,
}

impl Stream {
    /// Whether the unit lies in the last two windows.
    fn asked_for(&self, unit: Unit) -> bool {
        if self.trip.load(Ordering::Relaxed) == NO_UNIT {
            return false;
        }
        let next = self.next.load(Ordering::Relaxed) as i64;
        let reach =
            self.stride.load(Ordering::Relaxed) * self.window.load(Ordering::Relaxed) as i64;
        let behind = next - unit.get() as i64;
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
                trip: AtomicU64::new(NO_UNIT),
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

    /// How streams are read ahead of.
    pub(crate) fn mode(&self) -> Option<Mode> {
        const MODES: [Mode; 3] = [Mode::Off, Mode::Detect, Mode::Eager];
        MODES
            .get(usize::from(self.mode.load(Ordering::Relaxed)))
            .copied()
    }

    /// A stream whose next window a miss of one of these units asks for.
    pub(crate) fn trip_in(&self, units: &Range<Unit>) -> Option<&Stream> {
        let among = |s: &&Stream| {
            let trip = s.trip.load(Ordering::Relaxed);
            (units.start.get()..units.end.get()).contains(&trip)
        };
        self.active.iter().find(among)
    }

    /// Whether a unit lies in a window that was asked for.
    pub(crate) fn asked_for(&self, unit: Unit) -> bool {
        self.active.iter().any(|s| s.asked_for(unit))
    }

    /// A free stream, or the one whose turn it is to be given up.
    pub(crate) fn free_one(&self) -> &Stream {
        let free = self
            .active
            .iter()
            .find(|s| s.trip.load(Ordering::Relaxed) == NO_UNIT);
        free.unwrap_or_else(|| {
            &self.active[self.hand.fetch_add(1, Ordering::Relaxed) as usize % STREAMS]
        })
    }

    /// All streams, followed or not.
    pub(crate) fn all(&self) -> &[Stream] {
        &self.active
    }

    /// Whether streams are to be found out: nothing is known of how the map will be read.
    pub(crate) fn detects(&self) -> bool {
        self.mode.load(Ordering::Relaxed) == Mode::Detect as u8
    }

    /// Notes that a thread misses some units in order. The distance at which it reads, if this miss confirms one.
    pub(crate) fn stride_of(&self, units: Range<Unit>, thread: u32, eager: bool) -> Option<i64> {
        let unit = units.start;
        let hash = thread.wrapping_mul(0x9E37_79B9);
        let set = &self.recent[(hash >> 26) as usize % SETS];
        let seen = |way: &AtomicU64| Recent::unpack(way.load(Ordering::Relaxed));
        let distance = |r: Recent| unit.get() as i64 - r.unit as i64;
        // One that goes on as it did; then one that is near; then the place of any.
        let going_on = set.iter().find_map(|way| {
            let r = seen(way)?;
            (r.stride != 0 && distance(r) == r.stride).then_some((way, r.stride, r.equal + 1))
        });
        let least_useful = || {
            // What goes on nowhere makes room first; otherwise chance decides.
            let chance = (unit.get() ^ (unit.get() >> 7)) as usize;
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
            unit: units.end.get() - 1,
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

    /// The distance at which a stream reads.
    pub(crate) fn stride(&self, stream: usize) -> i64 {
        self.active[stream % STREAMS].stride.load(Ordering::Relaxed)
    }

    pub(crate) fn index(&self, s: &Stream) -> usize {
        let at = s as *const Stream as usize - self.active.as_ptr() as usize;
        at / size_of::<Stream>()
    }
}

/// A stream in the hands of one thread. Others go on without: it is all guessing.
pub(crate) struct StreamGuard<'a>(&'a Stream);

impl Stream {
    /// Takes the stream, if no other thread has it.
    pub(crate) fn hold(&self) -> Option<StreamGuard<'_>> {
        (!self.held.swap(true, Ordering::Acquire)).then_some(StreamGuard(self))
    }
}

impl Deref for StreamGuard<'_> {
    type Target = Stream;
    fn deref(&self) -> &Stream {
        self.0
    }
}

impl Drop for StreamGuard<'_> {
    fn drop(&mut self) {
        self.0.held.store(false, Ordering::Release);
    }
}

/// A part of a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    /// The number of the map's gate. Another map may have it by now; reading ahead there is of no use, and no harm.
    pub(crate) map: MapId,
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
    pub(crate) fn pack(self) -> usize {
        let mut word = self.unit.get() & ((1 << UNITS_BITS) - 1);
        word = word << COUNT_BITS | (self.units - 1) & (PART_UNITS - 1);
        word = word << 1 | u64::from(self.trip);
        word = word << STREAM_BITS | self.stream as u64;
        (word << MAP_BITS | u64::from(self.map.get())) as usize
    }

    pub(crate) fn unpack(word: usize) -> Self {
        let mut word = word as u64;
        let mut take = |bits: u32| {
            let value = word & ((1 << bits) - 1);
            word >>= bits;
            value
        };
        Request {
            map: MapId::new(take(MAP_BITS) as u32),
            stream: take(STREAM_BITS) as usize,
            trip: take(1) == 1,
            units: take(COUNT_BITS) + 1,
            unit: Unit::new(take(UNITS_BITS)),
        }
    }
}

/// The queue of requests.
pub(crate) type Requests = Handover;

#[cfg(test)]
mod tests {
    use super::*;

    fn one(unit: u64) -> Range<Unit> {
        Unit::new(unit)..Unit::new(unit + 1)
    }

    #[test]
    fn requests_survive_their_packing() {
        for units in [1, 2, 63, 64] {
            for trip in [false, true] {
                let r = Request {
                    map: MapId::new(65_535),
                    unit: Unit::new((1 << 34) - 1),
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
            .filter_map(|&u| streams.stride_of(one(u), 77, eager))
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
            .map(|u| streams.stride_of(one(u), 3, false))
            .collect();
        assert!(found[12..].contains(&Some(1)), "{found:?}");
    }

    #[test]
    fn a_random_reader_is_never_taken_for_a_stream() {
        let streams = Streams::new();
        let mut x = 1u64;
        for _ in 0..1_000_000 {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            assert_eq!(
                streams.stride_of(one((x >> 40) % (1 << 20)), 1, false),
                None
            );
        }
    }
}
