//! One turn of the evictor: a batch of units that leave their maps, a batch of units that are marked `MADV_FREE`, and the advice on
//! both. Each piece of advice takes `mmap_lock`. Behind a thread that holds it for long, a turn is all that can be done while it is free, so
//! the advice on both batches waits for it together.

#![allow(unsafe_code, reason = "discards memory by address")]

use crate::base::ids::{Addr, Serial, Slot, Unit};
use crate::base::primitive::Ordering;
use crate::evict::batch::{Batch, Taken};
use crate::evict::evictor::Evictor;
use crate::evict::limits::{batch_bytes, tick};
use crate::evict::policy::{Item, Occupant, Place, Victim};
use crate::fault::give_up::{begin_eviction, begin_softening, settle_evicted};
use crate::space::counters::Count;
use crate::space::identity;
use crate::space::map_core::MapCore;
use crate::space::page::{Left, State};
use faultless_sys::mem::{IoVec, PAGE};

/// The results of a turn.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Done {
    /// Units that left, and the bytes that were released by it.
    pub(super) left: usize,
    pub(super) released: u64,
    /// Units that were marked.
    pub(super) softened: usize,
}

/// What came of the attempt to take a unit out of its map.
enum Try {
    Taken(Addr, usize, Serial),
    /// It was touched, it is pinned, or a thread fills it.
    InUse,
    Gone,
}

/// Tries to take a unit for a batch that leaves.
fn try_to_take(core: &MapCore, unit: Unit, victim: Victim) -> Try {
    let page = core.page(unit);
    if core.keep_all.load(Ordering::Acquire) {
        return Try::Gone;
    }
    let word = page.load();
    if victim.soft && word.state() == State::Resident && !word.soft() {
        return Try::Gone; // filled afresh since: it has another entry
    }
    if page.take_seen() {
        return Try::InUse;
    }
    if begin_eviction(core, unit).is_some() {
        let (addr, len) = (core.unit_addr(unit), core.charge_of(unit) as usize);
        return Try::Taken(addr, len, core.serial);
    }
    match page.load().state() {
        _ if core.keep_all.load(Ordering::Acquire) => Try::Gone,
        State::Absent if page.untrack_absent() => Try::Gone,
        // Pinned, or being filled, or in a batch.
        _ => Try::InUse,
    }
}

/// The ranges of a batch that are still their maps' own, in order; neighbours are merged. The caller holds up reports.
fn ranges(batch: &Batch<'_>, taken: &mut [Taken]) -> Vec<IoVec> {
    taken.sort_unstable_by_key(|t| t.addr);
    let mut ranges: Vec<IoVec> = Vec::with_capacity(taken.len());
    for &Taken {
        addr, len, item, ..
    } in &*taken
    {
        let addr = addr.get();
        let map = batch.maps.get(&item.entry.map());
        if !map.is_some_and(|core| core.live.covers(addr, len)) {
            continue;
        }
        match ranges.last_mut() {
            Some(r) if r.addr + r.len == addr => r.len += len,
            _ => ranges.push(IoVec { addr, len }),
        }
    }
    ranges
}

impl Evictor {
    /// Takes a batch of units out of their maps, if memory is `pressed`, and marks a batch of others, if too much is firm.
    pub(super) fn turn(&mut self, pressed: bool) -> Done {
        let mut batch = Batch::default();
        let mut leaving = match pressed {
            true => self.choose_leaving(&mut batch),
            false => Vec::new(),
        };
        let mut softening = Vec::new();
        if self.policy.firm_pages() * PAGE as u64 > self.firm_target {
            softening = self.choose_softening(&mut batch, leaving.len());
        } else {
            self.must_stay = 0;
        }
        {
            let _ours = identity::discarding();
            let gone = ranges(&batch, &mut leaving);
            let free = ranges(&batch, &mut softening);
            let advice = [
                (&gone[..], libc::MADV_DONTNEED),
                (&free[..], libc::MADV_FREE),
            ];
            // SAFETY: all ranges are units of ours that `begin_eviction` or `begin_softening` put into this batch's hands:
            // unpinned, and readable again; and still their maps' own, for as long as no report is acted on.
            unsafe { self.crew.advise(&advice) };
        }
        let released = self.settle_leaving(&mut batch, &leaving);
        for t in &softening {
            let (id, unit) = (t.item.entry.map(), t.item.entry.unit());
            if let Some(core) = batch.maps.get(&id)
                && core.page(unit).settle(Left::Shadow(0)).1.wake
            {
                core.wake(unit);
            }
        }
        // In one step: a release of each page would call a waiting thread each time.
        self.pool
            .evicted
            .fetch_add(leaving.len() as u32, Ordering::Relaxed);
        self.pool.budget.release(released);
        self.emptied.append(&mut batch.emptied);
        drop(batch);
        self.collect_words();
        Done {
            left: leaving.len(),
            released,
            softened: softening.len(),
        }
    }

    /// Chooses units that are to leave, and copies them to where they cool.
    fn choose_leaving(&mut self, batch: &mut Batch<'_>) -> Vec<Taken> {
        let b = &self.pool.budget;
        let limit = b.limit();
        let headroom = self.headroom();
        // One batch more, so that the next turn is not due immediately.
        let want = b.used() + headroom + batch_bytes(limit);
        let mut want = want.saturating_sub(limit);
        let mut taken: Vec<Taken> = Vec::new();
        let mut back = Vec::new();
        let (tracked, most) = (self.policy.len(), self.crew.capacity());
        for _ in 0..tracked {
            if want == 0 || taken.len() >= most {
                break;
            }
            let Some(victim) = self.policy.next_victim() else {
                break;
            };
            let tried = self.with_unit(batch, victim.item, |core, unit| {
                try_to_take(core, unit, victim)
            });
            match tried {
                Some(Try::Taken(addr, len, serial)) => {
                    want = want.saturating_sub(len as u64);
                    let item = victim.item;
                    let slot = self.slot_for(batch, victim, len, serial);
                    taken.push(Taken {
                        addr,
                        len,
                        item,
                        place: victim.place,
                        slot,
                    });
                }
                Some(Try::InUse) => back.push(victim.item),
                Some(Try::Gone) | None => {}
            }
        }
        for item in back {
            self.policy.arrive(item, true, 0);
        }
        if let Some(cooler) = &mut self.cooler {
            cooler.keep(&mut taken);
        }
        taken
    }

    /// The slot in which a unit of `len` bytes that leaves is to cool. `None` for a unit larger than a page, since slots are pages and such
    /// units are few, and for a unit that was read ahead: the program has touched it by now, or never will.
    fn slot_for(
        &mut self,
        batch: &mut Batch<'_>,
        victim: Victim,
        len: usize,
        serial: Serial,
    ) -> Option<Slot> {
        let entry = victim.item.entry;
        let cools = len == PAGE && entry.unit_bytes() == PAGE as u64 && !entry.ahead();
        let cooler = self.cooler.as_mut().filter(|_| cools)?;
        cooler.slot(batch, victim.place, Occupant { entry, serial })
    }

    /// Books units out that have left. Returns the bytes that are to be released.
    fn settle_leaving(&mut self, batch: &mut Batch<'_>, taken: &[Taken]) -> u64 {
        let mut released = 0;
        for t in taken {
            let (id, unit) = (t.item.entry.map(), t.item.entry.unit());
            let Some(core) = batch.maps.get(&id) else {
                continue;
            };
            let left = match (t.slot, t.place) {
                (Some(slot), _) => Left::Slot(slot),
                (None, Place::Fresh) => Left::Shadow(tick(&self.pool, (t.len / PAGE) as u32)),
                (None, Place::Main) => Left::Shadow(0),
            };
            let settled = settle_evicted(core, unit, left);
            let bytes = core.charge_of(unit);
            core.counters.add(Count::Released, bytes);
            released += bytes;
            if !settled.absent
                && let (Some(cooler), Some(slot)) = (&mut self.cooler, t.slot)
            {
                cooler.unfill(slot);
            }
            if settled.emptied {
                batch.emptied.push((id, unit));
            }
        }
        released
    }

    /// Chooses the oldest units to mark, beside so many that leave in the same turn.
    fn choose_softening(&mut self, batch: &mut Batch<'_>, leaving: usize) -> Vec<Taken> {
        let mut taken: Vec<Taken> = Vec::new();
        let mut marked = Vec::new();
        let mut excess =
            (self.policy.firm_pages() * PAGE as u64).saturating_sub(self.firm_target) / PAGE as u64;
        let most = self.crew.capacity_beside(leaving);
        let (mut again, mut swept) = (false, false);
        // All of the queue, from wherever the last look ended.
        for _ in 0..=2 * self.policy.len() {
            if excess == 0 || taken.len() >= most {
                break;
            }
            let mut next = self.policy.next_to_soften();
            if next.is_none() && !std::mem::replace(&mut again, true) {
                // Those that were pinned, or being filled, when they had their turn.
                self.policy.offer_again();
                next = self.policy.next_to_soften();
            }
            let Some((item, offered)) = next else {
                swept = true;
                break;
            };
            // Nothing is left of what an entry named that is not tracked any more, so nothing of it is firm.
            let (soft, begun) = self
                .with_unit(batch, item, try_to_soften)
                .unwrap_or((true, None));
            if soft {
                excess = excess.saturating_sub(u64::from(item.pages));
                marked.push(offered);
            }
            taken.extend(begun.map(|(addr, len)| to_mark(item, addr, len)));
        }
        for offered in marked {
            self.policy.softened(offered);
        }
        self.must_stay = match swept {
            true => self.policy.firm_pages(),
            false => 0,
        };
        taken
    }
}

/// Tries to take a unit for a batch that is marked: whether it is, or will be, and what is to be marked.
fn try_to_soften(core: &MapCore, unit: Unit) -> (bool, Option<(Addr, usize)>) {
    if !core.keep_all.load(Ordering::Acquire) && begin_softening(core, unit) {
        let len = core.charge_of(unit) as usize;
        return (true, Some((core.unit_addr(unit), len)));
    }
    // Filled under a batch, it is soft already. Pinned, or being filled, it stays firm.
    (core.page(unit).load().soft(), None)
}

fn to_mark(item: Item, addr: Addr, len: usize) -> Taken {
    Taken {
        addr,
        len,
        item,
        place: Place::Main,
        slot: None,
    }
}
