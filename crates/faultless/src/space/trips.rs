//! Slots for the bytes of trips: units over which readers in order are to stumble (`fault/ahead.rs`).

use crate::base::area::Area;
use crate::base::ids::{Addr, MapId, Serial, Slot, Unit};
use crate::base::primitive::{AtomicU8, AtomicU32, Mutex, Ordering, lock};
use faultless_sys::mem::PAGE;

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
    pub(crate) map: MapId,
    pub(crate) serial: Serial,
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
    pub(crate) fn is_trip(slot: Slot) -> bool {
        slot.get() & TRIP != 0
    }

    /// Address of a slot's bytes.
    pub(crate) fn addr(&self, slot: Slot) -> Addr {
        let at = (slot.get() & !TRIP) as usize;
        assert!(at < self.busy.len());
        Addr::new(self.area.start() + at * PAGE)
    }

    /// A slot for `owner`: a free one, or one that `steal` can take from who has it. For ordinary contexts.
    pub(crate) fn take(
        &self,
        owner: Owner,
        steal: impl FnOnce(Slot, Owner) -> bool,
    ) -> Option<Slot> {
        let mut owners = lock(&self.owners);
        let turn = self.hand.fetch_add(1, Ordering::Relaxed) as usize;
        let mut order = (0..self.busy.len()).map(|i| (turn + i) % self.busy.len());
        let free = order.find(|&at| {
            let flag = &self.busy[at];
            flag.compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        });
        let at = free.or_else(|| {
            let at = turn % self.busy.len();
            steal(Slot::new(at as u32 | TRIP), owners[at]).then_some(at)
        })?;
        self.busy[at].store(1, Ordering::Relaxed);
        owners[at] = owner;
        Some(Slot::new(at as u32 | TRIP))
    }

    /// Gives a slot back.
    pub(crate) fn give(&self, slot: Slot) {
        self.busy[(slot.get() & !TRIP) as usize].store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trips_are_taken_once() {
        let trips = Trips::new(1 << 20).expect("memory");
        assert_eq!(trips.bytes(), 4 * PAGE as u64);
        let owner = |unit| Owner {
            map: MapId::new(1),
            serial: Serial::new(2),
            unit: Unit::new(unit),
        };
        let never = |_, _| panic!("there are free ones");
        let all: Vec<Slot> = (0..4)
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
