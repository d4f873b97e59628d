//! A batch of units that leave their maps together.

use crate::base::ids::{Addr, MapId, Slot, Unit};
use crate::base::primitive::Ordering;
use crate::evict::limits::tick;
use crate::evict::policy::{Item, Occupant, Place};
use crate::fault::give_up::give_up_cool;
use crate::space::pool_core::PoolCore;
use crate::space::registry;
use crate::space::registry::Inside;
use std::collections::BTreeMap;
use std::sync::Arc;

/// A unit in the hands of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taken {
    pub(crate) addr: Addr,
    /// Bytes of the unit that pages of its source back.
    pub(crate) len: usize,
    pub(crate) item: Item,
    pub(crate) place: Place,
    /// Where its bytes are to be kept.
    pub(crate) slot: Option<Slot>,
}

/// A batch in the making: the maps that it entered.
#[derive(Default)]
pub(crate) struct Batch<'a> {
    pub(crate) maps: BTreeMap<MapId, Inside<'a>>,
    /// Units whose groups of words became empty.
    pub(crate) emptied: Vec<(MapId, Unit)>,
}

impl<'a> Batch<'a> {
    pub(crate) fn map(&mut self, id: MapId) -> Option<&Inside<'a>> {
        // A map that is not there may be there at the next look: its gate may serve another.
        if let std::collections::btree_map::Entry::Vacant(v) = self.maps.entry(id) {
            v.insert(registry::enter(registry::gate(id)?)?);
        }
        self.maps.get(&id)
    }
}

/// Gives up what cools in a slot, if it still does. `true` if it did: the slot is free.
pub(crate) fn drop_from_slot(
    pool: &Arc<PoolCore>,
    maps: &mut Batch<'_>,
    slot: Slot,
    occupant: Occupant,
    place: Place,
) -> bool {
    if !occupant.entry.is_some() {
        return false;
    }
    let (id, unit) = (occupant.entry.map(), occupant.entry.unit());
    let Some(core) = maps.map(id).filter(|core| {
        Arc::ptr_eq(&core.pool, pool) && core.serial == occupant.serial && unit < core.units_end()
    }) else {
        return false;
    };
    let shadow = match place {
        Place::Fresh => pool.clock.load(Ordering::Relaxed).wrapping_add(1).max(1),
        Place::Main => 0,
    };
    let Some(given) = give_up_cool(core, unit, Some(slot), shadow) else {
        return false;
    };
    if place == Place::Fresh {
        tick(pool, 1);
    }
    if given.emptied {
        maps.emptied.push((id, unit));
    }
    true
}
