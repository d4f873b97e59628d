//! The cooling area, as the evictor sees it: a file in memory that it writes with the bytes of units that are to go.
//!
//! Writing is one `pwritev` for a run of slots. The kernel copies from the map's pages and answers EFAULT for one that
//! it has taken back meanwhile (it was marked MADV_FREE), where a load by this thread would be a miss. Rescuers read the
//! slots through a mapping, from which `UFFDIO_COPY` takes them as from a staging buffer.

#![allow(
    unsafe_code,
    reason = "maps a file in memory, writes from memory by address"
)]

use crate::base::ids::{Nanos, Slot};
use crate::base::primitive::{AtomicU64, Ordering};
use crate::base::{clock, memory};
use crate::evict::batch::{Batch, Taken, drop_from_slot};
use crate::evict::policy::{Logs, Occupant, Place, Worth};
use crate::space::cooling::Cooling;
use crate::space::pool_core::PoolCore;
use crate::space::registry;
use faultless_sys::mem::{BATCH_MAX, IoVec, PAGE};
use faultless_sys::{Errno, file, mem};
use std::sync::Arc;

/// How often the kernel answered EFAULT to a write of a page that it had taken back: no error, and no affair of the program's.
pub(crate) static OWN_EFAULTS: AtomicU64 = AtomicU64::new(0);

/// Slots that are looked at for a free one before a unit goes without.
const TRIES: usize = 16;
/// How long to leave logs as they are whose slots are in use.
const FIT_AGAIN: Nanos = Nanos::from_millis(100);
/// By what part of it the memory must have changed before they are made anew, as a divisor: all that cools goes with them.
const FIT_SHARE: u64 = 4;

pub(super) struct Cooler {
    pool: Arc<PoolCore>,
    /// The file, in the evictor's own table of descriptors.
    file: i32,
    /// Start and length of its mapping.
    mapped: (usize, usize),
    logs: Logs,
    worth: Worth,
    /// The memory that the logs are made for, and the most that there are flags for.
    limit: u64,
    most: u64,
    /// When it was last found that they cannot be changed yet.
    in_use: Option<Nanos>,
    /// Bytes charged to the budget.
    charged: u64,
    /// How far each slot is prepared.
    prepared: Vec<Prepared>,
}

/// The first time that a slot is used costs memory: later not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prepared {
    Not,
    /// Its memory is charged to the budget.
    Paid,
    /// Its page is mapped.
    Mapped,
}

impl Cooler {
    /// Makes the area. `None` where it cannot be had: units are then given up at once.
    pub(super) fn new(pool: &Arc<PoolCore>) -> Option<Self> {
        // As many as the largest budget could want.
        let most = memory::look().machine;
        let (fresh, main) = Logs::slots_for(most / PAGE as u64);
        let area = Cooling::new((fresh + main) as u32).ok()?;
        let file = file::memory_file(c"faultless-cooling", 0).ok()?;
        let _ = pool.cooling.set(area);
        Some(Cooler {
            pool: pool.clone(),
            file,
            mapped: (0, 0),
            logs: Logs::default(),
            worth: Worth::default(),
            limit: 0,
            most,
            in_use: None,
            charged: 0,
            prepared: Vec::new(),
        })
    }

    /// Maps the file anew, with a length for `slots` slots, empty. No unit is cool.
    fn remap(&mut self, slots: usize) -> Result<(), Errno> {
        let (start, len) = std::mem::take(&mut self.mapped);
        if len > 0 {
            // SAFETY: the area's former mapping, from which nobody reads any more.
            unsafe { mem::unmap(start, len)? };
        }
        file::set_len(self.file, 0)?;
        let len = slots * PAGE;
        if len == 0 {
            return Ok(());
        }
        file::set_len(self.file, len as u64)?;
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
        // Without access first, and unlocked: under mlockall the kernel would fill it at once.
        // SAFETY: the kernel chooses the range, which is then ours; no advice changes its contents.
        let start = unsafe {
            let start = mem::map_aside(len, libc::PROT_NONE, flags, self.file, 0)?;
            self.mapped = (start, len);
            mem::unlock(start, len)?;
            mem::protect(start, len, libc::PROT_READ)?;
            mem::madvise(start, len, libc::MADV_DONTFORK)?;
            mem::madvise(start, len, libc::MADV_DONTDUMP)?;
            start
        };
        if let Some(area) = self.pool.cooling.get() {
            area.set_start(start);
        }
        Ok(())
    }

    fn area(&self) -> Option<&Cooling> {
        self.pool.cooling.get()
    }

    /// Whether there is no slot.
    pub(super) fn is_empty(&self) -> bool {
        self.logs.len() == 0
    }

    /// Makes the logs fit a budget of `limit` bytes, if it has changed by much. Whatever cools is given up then.
    pub(super) fn fit(&mut self, maps: &mut Batch<'_>, limit: u64) {
        let limit = limit.min(self.most);
        if limit.abs_diff(self.limit) <= self.limit / FIT_SHARE {
            self.in_use = None;
            return;
        }
        if self
            .in_use
            .is_some_and(|t| clock::now().since(t) < FIT_AGAIN)
        {
            return;
        }
        let pool = self.pool.clone();
        let Some(area) = pool.cooling.get() else {
            return;
        };
        for slot in (0..self.logs.len() as u32).map(Slot::new) {
            if self.prepared[slot.get() as usize] != Prepared::Not {
                self.clear(&pool, maps, slot);
            }
        }
        let used = |slot: Slot, o: Occupant| area.busy(slot) && owner_lives(o);
        if self.logs.slots().any(|(slot, o)| used(slot, o)) {
            // A rescuer still reads it, or it belongs to a map of which nothing may be given up: another time.
            self.in_use = Some(clock::now());
            return;
        }
        for (slot, _) in self.logs.slots() {
            area.give(slot);
        }
        self.in_use = None;
        // Nobody reads any slot.
        pool.budget.release(std::mem::take(&mut self.charged));
        self.limit = limit;
        self.logs = Logs::new(limit / PAGE as u64);
        if self.remap(self.logs.len()).is_err() {
            // No memory to be had: without slots, units go at once.
            self.logs = Logs::default();
        }
        self.prepared = vec![Prepared::Not; self.logs.len()];
        self.charged = self.logs.bytes() + self.prepared.len() as u64;
        pool.budget.charge_anyway(self.charged);
    }

    /// Gives up what lies in a slot. Returns whether the slot is free then.
    fn clear(&mut self, pool: &Arc<PoolCore>, maps: &mut Batch<'_>, slot: Slot) -> bool {
        let Some(area) = pool.cooling.get() else {
            return false;
        };
        let occupant = self.logs.at(slot);
        let free = drop_from_slot(pool, maps, slot, occupant, Place::Main)
            || !area.busy(slot)
            || !owner_lives(occupant);
        if free {
            area.give(slot);
            self.logs.put(slot, Occupant::default());
        }
        free
    }

    /// Gives up what cools, and the memory of its slots, up to `want` bytes. Returns how many were released.
    pub(super) fn give_back(&mut self, maps: &mut Batch<'_>, want: u64) -> u64 {
        let pool = self.pool.clone();
        let mut given = 0;
        for slot in (0..self.logs.len() as u32).map(Slot::new) {
            if given >= want || self.prepared[slot.get() as usize] == Prepared::Not {
                continue;
            }
            if self.clear(&pool, maps, slot)
                && file::punch_hole(self.file, u64::from(slot.get()) * PAGE as u64, PAGE as u64)
                    .is_ok()
            {
                self.prepared[slot.get() as usize] = Prepared::Not;
                self.charged -= PAGE as u64;
                pool.budget.release(PAGE as u64);
                given += PAGE as u64;
            }
        }
        given
    }

    /// A slot for a unit that leaves `place`, which is noted there at once: the log may come round before the batch is
    /// through. What lay there is given up.
    pub(super) fn slot(
        &mut self,
        maps: &mut Batch<'_>,
        place: Place,
        unit: Occupant,
    ) -> Option<Slot> {
        let pool = self.pool.clone();
        let area = pool.cooling.get()?;
        // While the logs wait to be made anew, nothing is put into the old ones.
        if self.in_use.is_some() || (place == Place::Fresh && !self.worth.keeps()) {
            return None;
        }
        for _ in 0..TRIES {
            let (slot, occupant) = self.logs.turn(place)?;
            area.set_main(self.logs.main_slots());
            let dropped = drop_from_slot(&pool, maps, slot, occupant, place);
            if place == Place::Fresh && occupant.entry.is_some() {
                self.worth.came_round(!dropped);
            }
            if dropped || !area.busy(slot) || !owner_lives(occupant) {
                self.logs.put(slot, Occupant::default());
                let prepared = &mut self.prepared[slot.get() as usize];
                if *prepared == Prepared::Not {
                    if !pool.budget.try_charge(PAGE as u64) {
                        return None;
                    }
                    self.charged += PAGE as u64;
                    *prepared = Prepared::Paid;
                }
                self.logs.put(slot, unit);
                area.fill(slot);
                return Some(slot);
            }
        }
        None
    }

    /// Copies units into their slots. What could not be copied loses its slot.
    pub(super) fn keep(&mut self, items: &mut [Taken]) {
        let mut order: Vec<usize> = (0..items.len())
            .filter(|&i| items[i].slot.is_some())
            .collect();
        order.sort_unstable_by_key(|&i| items[i].slot);
        let mut at = 0;
        while at < order.len() {
            let first = items[order[at]].slot.unwrap_or_default().get();
            let run = order[at..]
                .iter()
                .enumerate()
                .take_while(|&(n, &i)| items[i].slot == Some(Slot::new(first + n as u32)))
                .take(BATCH_MAX)
                .count();
            let ranges: Vec<IoVec> = order[at..at + run]
                .iter()
                .map(|&i| IoVec {
                    addr: items[i].addr.get(),
                    len: PAGE,
                })
                .collect();
            // SAFETY: pages of units that `begin_eviction` put into this thread's hands: their bytes do not change.
            let written =
                unsafe { file::pwritev(self.file, &ranges, u64::from(first) * PAGE as u64) };
            let whole = match written {
                Ok(bytes) => bytes / PAGE,
                Err(Errno(libc::EINTR)) => continue,
                Err(e) => {
                    if e == Errno(libc::EFAULT) {
                        OWN_EFAULTS.fetch_add(1, Ordering::Relaxed);
                    }
                    0
                }
            };
            if whole < run {
                // The kernel has taken this page back, or there is no memory: it goes without.
                if let Some(slot) = items[order[at + whole]].slot.take() {
                    self.unfill(slot);
                }
            }
            at += (whole + 1).min(run);
        }
        self.map_first_lap(items);
    }

    /// Touches slots that were never used, so that rescuers find their pages mapped.
    fn map_first_lap(&mut self, items: &[Taken]) {
        let Some(area) = self.pool.cooling.get() else {
            return;
        };
        for slot in items.iter().filter_map(|t| t.slot) {
            let prepared = &mut self.prepared[slot.get() as usize];
            if *prepared == Prepared::Paid {
                *prepared = Prepared::Mapped;
                // SAFETY: inside the mapping, and written above, so that the file has the page.
                unsafe { core::ptr::read_volatile(area.addr(slot).get() as *const u8) };
            }
        }
    }

    /// Gives a slot back whose unit did not come: it could not be copied, or a miss was faster.
    pub(super) fn unfill(&mut self, slot: Slot) {
        self.logs.put(slot, Occupant::default());
        if let Some(area) = self.area() {
            area.give(slot);
        }
    }

    /// Lets the area go. No map of the pool is left.
    pub(super) fn end(mut self) {
        self.pool.budget.release(self.charged);
        let _ = self.remap(0);
        // SAFETY: made in `new`.
        unsafe { file::close(self.file) };
    }
}

/// Whether somebody may be reading what lies in a slot: its map is there, or those inside have not left yet.
fn owner_lives(occupant: Occupant) -> bool {
    occupant.entry.is_some() && registry::may_be_in_use(occupant.entry.map(), occupant.serial)
}
