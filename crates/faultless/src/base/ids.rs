//! Numbers that must not be taken for each other: each has a type of its own, with the arithmetic that makes sense for it.

use std::fmt;
use std::ops::{Add, AddAssign, Range, Sub};

/// Declares a number. (Public, since some are a part of what `internals` shows.)
macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[allow(unreachable_pub, reason = "some are shown")]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name($inner);

        #[allow(dead_code, unreachable_pub, reason = "the same for all numbers")]
        impl $name {
            /// This number.
            #[inline]
            pub const fn new(number: $inner) -> Self {
                $name(number)
            }

            /// The bare number.
            #[inline]
            pub const fn get(self) -> $inner {
                self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), " {}"), self.0)
            }
        }
    };
}

number! {
    /// A fill unit of a map, counted from the start of its region.
    Unit(u64)
}
number! {
    /// A page that holds the bytes of a unit which is not installed: in the cooling area, or among the trips.
    Slot(u32)
}
number! {
    /// A map's gate. Gates are used again.
    MapId(u32)
}
number! {
    /// A map. Never used again.
    Serial(u64)
}
number! {
    /// A byte of a source, from its start.
    FileAt(u64)
}
number! {
    /// A byte of a map's region, from its start.
    RegionAt(u64)
}
number! {
    /// An address.
    Addr(usize)
}
number! {
    /// A span of time, or a moment of the monotonic clock, in nanoseconds.
    Nanos(u64)
}

/// Numbers that an amount can be added to, and between which there are distances.
macro_rules! counted {
    ($name:ident, $amount:ty) => {
        impl Add<$amount> for $name {
            type Output = $name;
            fn add(self, amount: $amount) -> $name {
                $name(self.0 + amount)
            }
        }
        impl AddAssign<$amount> for $name {
            fn add_assign(&mut self, amount: $amount) {
                self.0 += amount;
            }
        }
        impl Sub for $name {
            type Output = $amount;
            fn sub(self, other: $name) -> $amount {
                self.0 - other.0
            }
        }
    };
}

counted!(Unit, u64);
counted!(FileAt, u64);
counted!(RegionAt, u64);
counted!(Addr, usize);

impl Unit {
    /// The unit before this one, if there is one.
    pub(crate) fn before(self) -> Option<Unit> {
        self.0.checked_sub(1).map(Unit)
    }

    /// The unit at a distance, which may be negative; a distance that leads below the first unit wraps.
    pub(crate) fn at_distance(self, distance: i64) -> Unit {
        Unit(self.0.wrapping_add_signed(distance))
    }

    /// The units from one to before another.
    pub(crate) fn each(units: Range<Unit>) -> impl Iterator<Item = Unit> + Clone {
        (units.start.0..units.end.0).map(Unit)
    }
}

impl Nanos {
    pub(crate) const fn from_secs(seconds: u64) -> Self {
        Nanos(seconds * 1_000_000_000)
    }
    pub(crate) const fn from_millis(millis: u64) -> Self {
        Nanos(millis * 1_000_000)
    }
    pub(crate) const fn from_micros(micros: u64) -> Self {
        Nanos(micros * 1_000)
    }
    pub(crate) const fn as_secs_f64(self) -> f64 {
        self.0 as f64 / 1e9
    }
    /// Nothing, if the other moment is later.
    pub(crate) const fn since(self, earlier: Nanos) -> Nanos {
        Nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add for Nanos {
    type Output = Nanos;
    fn add(self, more: Nanos) -> Nanos {
        Nanos(self.0.saturating_add(more.0))
    }
}

/// Enough for pages of any address that a process has without asking for more than 47 bits.
const UNIT_BITS: u32 = 38;
const ID_BITS: u32 = 17;
const SHIFT_BITS: u32 = 6;
/// Most gates that an entry can tell apart.
pub(crate) const IDS_MAX: usize = (1 << ID_BITS) - 1;

number! {
    /// An entry of the evictor's queues: which unit of which map, and how large it is. Zero is no entry.
    Entry(u64)
}

impl Entry {
    /// Marks a unit that was read ahead.
    const AHEAD: u64 = 1 << 63;
    /// Where the credit is, and the most of it.
    const CREDIT_AT: u32 = UNIT_BITS + ID_BITS + SHIFT_BITS;
    pub(crate) const CREDIT_MAX: u64 = 3;

    /// The entry of a unit.
    pub(crate) fn of(map: MapId, unit_shift: u32, unit: Unit) -> Self {
        debug_assert!(unit.0 < 1 << UNIT_BITS && unit_shift < 1 << SHIFT_BITS);
        let shift = u64::from(unit_shift) << (UNIT_BITS + ID_BITS);
        Entry(shift | (u64::from(map.0) + 1) << UNIT_BITS | unit.0)
    }

    /// The same, of a unit that was read ahead.
    pub(crate) fn marked_ahead(self) -> Self {
        Entry(self.0 | Self::AHEAD)
    }

    /// The same, of a unit that has so much credit: see [`Policy::arrive`](crate::evict::policy::Policy::arrive).
    pub(crate) fn with_credit(self, credit: u8) -> Self {
        Entry(self.0 | u64::from(credit).min(Self::CREDIT_MAX) << Self::CREDIT_AT)
    }

    /// Its credit.
    pub(crate) fn credit(self) -> u8 {
        (self.0 >> Self::CREDIT_AT & Self::CREDIT_MAX) as u8
    }

    /// Whether it is one.
    pub(crate) fn is_some(self) -> bool {
        self.0 != 0
    }

    /// The gate of the map.
    pub(crate) fn map(self) -> MapId {
        let id = (self.0 >> UNIT_BITS) as u32 & ((1 << ID_BITS) - 1);
        MapId(id.wrapping_sub(1))
    }

    /// The unit.
    pub(crate) fn unit(self) -> Unit {
        Unit(self.0 & ((1 << UNIT_BITS) - 1))
    }

    /// Whether the unit was read ahead.
    pub(crate) fn ahead(self) -> bool {
        self.0 & Self::AHEAD != 0
    }

    /// The size of the unit, in bytes.
    pub(crate) fn unit_bytes(self) -> u64 {
        1 << (self.0 >> (UNIT_BITS + ID_BITS) & ((1 << SHIFT_BITS) - 1))
    }
}

/// A lease that was taken, by which it is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LeaseId {
    /// The descriptor's number, in the keeper's table.
    pub(crate) number: i32,
    /// Descriptor numbers are used again, serial numbers are not.
    pub(crate) serial: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_gives_back_what_it_was_made_of() {
        for (map, shift, unit) in [(0, 12, 0), (65_535, 21, (1 << 34) - 1), (7, 12, 99)] {
            let entry = Entry::of(MapId(map), shift, Unit(unit));
            for entry in [entry, entry.marked_ahead(), entry.with_credit(2)] {
                assert!(entry.is_some());
                assert_eq!((entry.map().0, entry.unit().0), (map, unit));
                assert_eq!(entry.unit_bytes(), 1 << shift);
            }
            assert!(!entry.ahead() && entry.marked_ahead().ahead());
            assert_eq!((entry.credit(), entry.with_credit(9).credit()), (0, 3));
            assert_eq!(entry.with_credit(2).marked_ahead().credit(), 2);
        }
        assert!(!Entry::default().is_some());
    }
}
