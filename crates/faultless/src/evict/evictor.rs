//! The evictor: one thread for each pool, off the fault path.
//!
//! It learns from a ring what was filled, asks the [`policy`] what to take out, and does so in batches: up to 1,024
//! ranges in one `process_madvise`, which takes `mmap_lock` (for reading) once. Before that it copies the units into
//! the cooling area ([`cooler`]), where a touch can still rescue them. It starts while a *reserve* of the budget is still
//! free, so that misses go on while it waits for that lock behind somebody else. How large the reserve must be, it learns:
//! what was filled during its longest recent wait, and as much again.

#![allow(unsafe_code, reason = "discards memory by address")]

use crate::base::ids::{Addr, MapId, Nanos, Serial, Unit};
use crate::base::primitive::Ordering;
use crate::base::thread::block_signals;
use crate::base::{clock, memory};
use crate::evict::batch::{Batch, Taken};
use crate::evict::cooler::Cooler;
use crate::evict::crew::Crew;
use crate::evict::limits::{batch_bytes, look_at_limits, reserve_bounds, reserve_of, tick};
use crate::evict::policy::{Item, Occupant, Place, Policy};
use crate::evict::pressure::Pressure;
use crate::fault::give_up::{begin_eviction, begin_softening, collect_group, settle_evicted};
use crate::space::counters::Count;
use crate::space::identity;
use crate::space::map_core::MapCore;
use crate::space::page::{Left, State};
use crate::space::pool_core::{EVICTOR_BACKLOG, PoolCore};
use crate::space::table::GROUP_BYTES;
use faultless_sys::mem::{IoVec, PAGE};
use faultless_sys::{mem, raw};
use std::sync::Arc;

/// How often limits of the machine and the control group are looked at, while there is work.
const LOOK_AGAIN: Nanos = Nanos::from_millis(500);
/// The same, where loads have found that the kernel took back so many pages meanwhile: there is less memory than before.
const LOOK_SOON: Nanos = Nanos::from_millis(10);
const TAKEN_BACK: u32 = 64;
/// Entries taken off the ring before anything else is seen to.
const DRAIN_MAX: usize = 1 << 16;
/// Entries that a look for stale ones goes through before it lets go of the maps that it entered.
const COMPACT_AT_A_TIME: u32 = 4096;
/// Sleep without work.
const IDLE: Nanos = Nanos::from_secs(1);
/// Sleep when the budget is pressed but nothing can be evicted.
const STUCK: Nanos = Nanos::from_millis(2);
/// Time in which a reserve that is not needed halves.
const RESERVE_HALVES: Nanos = Nanos::from_secs(4);

/// A batch that takes longer than this was held up by somebody.
const HELD_UP: Nanos = Nanos::from_millis(5);

pub(crate) struct Evictor {
    pool: Arc<PoolCore>,
    policy: Policy,
    cooler: Option<Cooler>,
    crew: Crew,
    policy_charged: u64,
    /// Units whose groups of words became empty.
    emptied: Vec<(MapId, Unit)>,
    looked: Option<Nanos>,
    /// Pages that the kernel had taken back until then.
    taken_back: u32,
    firm_target: u64,
    pressure: Pressure,
    /// Pages that cannot be marked: pinned, or kept because they cannot be read again. No fill waits for the marking of these.
    must_stay: u64,
    /// Memory of the machine or the control group, at the last look.
    memory: u64,
    /// When the reserve was last brought down, and the limit that it belongs to.
    reserve_at: (Nanos, u64),
}

/// Whether this kernel lets a process give batched DONTNEED advice to itself.
pub(crate) fn batches_work() -> bool {
    let Ok(pidfd) = mem::pidfd_open(raw::getpid(), 0) else {
        return false;
    };
    let Ok(addr) = mem::map_reserved(PAGE) else {
        return false;
    };
    let ranges = [IoVec { addr, len: PAGE }];
    // SAFETY: a page of our own that holds nothing.
    let ok = unsafe { mem::madvise_batch(pidfd, &ranges, libc::MADV_DONTNEED) }.is_ok();
    // SAFETY: both were made here.
    unsafe {
        let _ = mem::unmap(addr, PAGE);
        faultless_sys::file::close(pidfd);
    }
    ok
}

impl Evictor {
    /// The thread's whole life.
    pub(crate) fn run(pool: Arc<PoolCore>) {
        block_signals();
        let pidfd = if batches_work() {
            mem::pidfd_open(raw::getpid(), 0).ok()
        } else {
            None
        };
        let cooler = Cooler::new(&pool);
        let mut evictor = Evictor {
            policy: Policy::new(cooler.is_some()),
            cooler,
            crew: Crew::new(pidfd),
            policy_charged: 0,
            emptied: Vec::new(),
            looked: None,
            taken_back: 0,
            firm_target: u64::MAX,
            pressure: Pressure::default(),
            must_stay: 0,
            memory: u64::MAX,
            reserve_at: (clock::now(), pool.budget.limit()),
            pool,
        };
        while !evictor.pool.stopping.load(Ordering::Acquire) {
            evictor.look_at_limits();
            if !evictor.pass() {
                let pool = evictor.pool.clone();
                // Pressed, or threads wait, and nothing could be evicted: all of it is pinned. Look again soon, not immediately.
                if evictor.pressed() || pool.budget.line.crowded() {
                    // (Not by the bell: each thread that waits rings it.)
                    clock::nap(STUCK);
                    continue;
                }
                pool.evict_bell.sleep(IDLE, || {
                    pool.fresh.load(Ordering::Relaxed) < EVICTOR_BACKLOG
                        && !pool.budget.line.crowded()
                        && !pool.stopping.load(Ordering::Acquire)
                });
            }
        }
        if let Some(cooler) = evictor.cooler {
            cooler.end();
        }
        evictor.pool.budget.release(evictor.policy_charged);
        evictor.crew.end();
    }

    /// Finds out how much may stay unmarked, so that the kernel finds enough to take back.
    fn look_at_limits(&mut self) {
        let taken_back = self.pool.taken_back.load(Ordering::Relaxed);
        let pause = match taken_back.wrapping_sub(self.taken_back) >= TAKEN_BACK {
            true => LOOK_SOON,
            false => LOOK_AGAIN,
        };
        if self.looked.is_some_and(|t| clock::now().since(t) < pause) {
            return;
        }
        (self.looked, self.taken_back) = (Some(clock::now()), taken_back);
        self.pool.withheld.take();
        let memory = memory::look();
        self.pressure.look(clock::now(), memory.stalled);
        let limits = look_at_limits(&self.pool, &memory);
        self.firm_target = self.pressure.of(limits.firm);
        if std::mem::replace(&mut self.memory, limits.memory) > limits.memory {
            self.fit_slots(true);
        }
    }

    /// How much is to be free: the reserve, or what a fill is waiting for.
    fn headroom(&self) -> u64 {
        let reserve = self.pool.reserve.load(Ordering::Relaxed);
        reserve.max(self.pool.wanted.load(Ordering::Relaxed))
    }

    fn pressed(&self) -> bool {
        let b = &self.pool.budget;
        b.used() + self.headroom() > b.limit()
    }

    /// Adapts the reserve: while the last batch was under way, for so long, `filled` bytes were charged beyond `before`.
    fn learn_reserve(&mut self, before: u64, filled: u64, took: Nanos) {
        let limit = self.pool.budget.limit();
        let (least, most) = reserve_bounds(limit);
        let (at, of) = self.reserve_at;
        let mut now = self.pool.reserve.load(Ordering::Relaxed);
        if of != limit {
            now = reserve_of(limit);
            self.reserve_at = (clock::now(), limit);
        } else if clock::now().since(at).get() >= RESERVE_HALVES.get() / 16 {
            let halvings = clock::now().since(at).as_secs_f64() / RESERVE_HALVES.as_secs_f64();
            now = (now as f64 * 0.5f64.powf(halvings)) as u64;
            self.reserve_at.0 = clock::now();
        }
        // Held up until nothing was left: nobody knows how much more would have been filled.
        let exhausted = took > HELD_UP && before + filled + least / 2 >= limit;
        let need = if exhausted { most } else { filled * 2 };
        let now = now.max(need).clamp(least, most);
        self.pool.reserve.store(now, Ordering::Relaxed);
    }

    /// Does what there is to do. `false` if that was nothing.
    fn pass(&mut self) -> bool {
        let mut busy = self.drain() > 0;
        self.pool.budget.note_peak();
        if self.pressed() {
            self.fit_slots(false);
            let (before, began) = (self.pool.budget.used(), clock::now());
            let (units, released) = self.evict();
            busy |= units > 0;
            if units == 0 && self.pressed() {
                // Nothing is left but what cools.
                busy |= self.give_slots_back();
                if !busy && self.pool.budget.cap() != u64::MAX {
                    // All of it is pinned. What the user allows, the user gets, until the next look.
                    self.pool.budget.set_cap(u64::MAX);
                    busy = true;
                }
            }
            let filled = (self.pool.budget.used() + released).saturating_sub(before);
            let took = clock::now().since(began);
            if took > HELD_UP + HELD_UP {
                self.crew.call_helpers();
            }
            self.learn_reserve(before, filled, took);
        }
        if self.policy.firm_pages() * PAGE as u64 > self.firm_target {
            busy |= self.soften() > 0;
        } else {
            self.must_stay = 0;
        }
        self.publish_firm();
        // There may be less that is firm.
        let line = &self.pool.budget.line;
        if line.crowded() && self.pool.has_room(line.least()) {
            line.call();
        }
        self.compact();
        let now = self.policy.bytes();
        if now > self.policy_charged {
            self.pool.budget.charge_anyway(now - self.policy_charged);
        } else {
            self.pool.budget.release(self.policy_charged - now);
        }
        self.policy_charged = now;
        busy
    }

    /// Makes the slots fit the memory. The kernel cannot take them back: where memory is short, they are few. `in_use`: only if there
    /// are any already.
    fn fit_slots(&mut self, in_use: bool) {
        if let Some(cooler) = &mut self.cooler
            && !(in_use && cooler.is_empty())
        {
            cooler.fit(self.pool.budget.limit().min(self.memory / 2));
        }
    }

    fn publish_firm(&self) {
        let pages = self.policy.firm_pages().saturating_sub(self.must_stay);
        let bytes = pages * PAGE as u64;
        self.pool.firm.store(bytes, Ordering::Relaxed);
    }

    /// Takes arrivals off the ring.
    fn drain(&mut self) -> usize {
        let mut maps = Batch::default();
        let mut n = 0;
        while n < DRAIN_MAX {
            let Some(entry) = self.pool.filled.pop() else {
                break;
            };
            n += 1;
            let (id, unit) = (entry.map(), entry.unit());
            if let Some(core) = maps.map(id)
                && Arc::ptr_eq(&core.pool, &self.pool)
                && unit < core.units_end()
                && entry.unit_bytes() == core.unit_bytes()
            {
                if core.page(unit).load().tracked() {
                    let hot = core.page(unit).take_seen();
                    let pages = (core.charge_of(unit) / PAGE as u64) as u32;
                    self.policy.arrive(Item { entry, pages }, hot);
                } else if core.table.live(unit) == 0 {
                    // It is gone already, or its fill failed.
                    self.emptied.push((id, unit));
                }
            }
            // Counted in one place before it leaves the other: never less than there is.
            self.publish_firm();
            self.pool
                .fresh
                .fetch_sub(entry.unit_bytes(), Ordering::Relaxed);
        }
        n
    }

    /// Calls `begin` on the unit of an item if its map is still there and is ours to take from.
    fn with_unit<R>(
        &self,
        batch: &mut Batch<'_>,
        item: Item,
        f: impl FnOnce(&MapCore, Unit) -> R,
    ) -> Option<R> {
        let (id, unit) = (item.entry.map(), item.entry.unit());
        let core = batch.map(id)?;
        // An entry of a map that is gone may name a unit of the one that has its gate now. One of the same size is as good
        // as its own.
        if !Arc::ptr_eq(&core.pool, &self.pool)
            || unit >= core.units_end()
            || item.entry.unit_bytes() != core.unit_bytes()
            || !core.page(unit).load().tracked()
        {
            return None;
        }
        Some(f(core, unit))
    }

    /// Takes one batch of units out of their maps. Returns their number, and how many bytes were released.
    fn evict(&mut self) -> (usize, u64) {
        enum Try {
            Taken(Addr, usize, Serial),
            InUse,
            Gone,
        }
        let b = &self.pool.budget;
        let limit = b.limit();
        let headroom = self.headroom();
        self.pool.wanted.store(0, Ordering::Relaxed);
        // A batch beyond it, so that the next is not due at once.
        let want = b.used() + headroom + batch_bytes(limit);
        let mut want = want.saturating_sub(limit);
        let mut batch = Batch::default();
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
            let item = victim.item;
            let tried = self.with_unit(&mut batch, item, |core, unit| {
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
            });
            match tried {
                Some(Try::Taken(addr, len, serial)) => {
                    want = want.saturating_sub(len as u64);
                    let place = victim.place;
                    // Slots have the size of a page; larger units are few, and go at once.
                    let slot = match &mut self.cooler {
                        // Nor is a unit kept that was read ahead: it has been read by now, or never will be.
                        Some(cooler)
                            if len == PAGE
                                && item.entry.unit_bytes() == PAGE as u64
                                && !item.entry.ahead() =>
                        {
                            let entry = item.entry;
                            cooler.slot(&mut batch, place, Occupant { entry, serial })
                        }
                        _ => None,
                    };
                    taken.push(Taken {
                        addr,
                        len,
                        item,
                        place,
                        slot,
                    });
                }
                Some(Try::InUse) => back.push(item),
                Some(Try::Gone) | None => {}
            }
        }
        for item in back {
            self.policy.arrive(item, true);
        }
        if let Some(cooler) = &mut self.cooler {
            cooler.keep(&mut taken);
        }
        let n = taken.len();
        self.advise(&batch, &mut taken, libc::MADV_DONTNEED);
        let mut released = 0;
        for t in &taken {
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
        // In one step: a release of each page would call a waiting thread each time.
        self.pool.evicted.fetch_add(n as u32, Ordering::Relaxed);
        self.pool.budget.release(released);
        self.emptied.append(&mut batch.emptied);
        drop(batch);
        self.collect_words();
        (n, released)
    }

    /// Gives up what cools, for want of anything else. Returns whether anything came of it.
    fn give_slots_back(&mut self) -> bool {
        let limit = self.pool.budget.limit();
        let want = (self.pool.budget.used() + self.headroom()).saturating_sub(limit);
        let mut batch = Batch::default();
        let given = match &mut self.cooler {
            Some(cooler) => cooler.give_back(&mut batch, want),
            None => 0,
        };
        self.emptied.append(&mut batch.emptied);
        if given > 0 {
            self.pool.evicted.fetch_add(1, Ordering::Relaxed);
        }
        given > 0
    }

    /// Gives the words of emptied groups back once they are a noticeable share of the budget: those of sparse maps, and
    /// of those that are read from one end to the other.
    fn collect_words(&mut self) {
        if self.emptied.len() as u64 * GROUP_BYTES < self.pool.budget.limit() / 128 {
            return;
        }
        let mut maps = Batch::default();
        for (id, unit) in std::mem::take(&mut self.emptied) {
            if let Some(core) = maps.map(id)
                && Arc::ptr_eq(&core.pool, &self.pool)
                && unit < core.units_end()
            {
                collect_group(core, unit);
            }
        }
    }

    /// Marks one batch of the oldest units MADV_FREE. Returns the number of units.
    fn soften(&mut self) -> usize {
        let mut batch = Batch::default();
        let mut taken: Vec<Taken> = Vec::new();
        let mut marked = Vec::new();
        let mut excess =
            (self.policy.firm_pages() * PAGE as u64).saturating_sub(self.firm_target) / PAGE as u64;
        let most = self.crew.capacity();
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
            let begun = self.with_unit(&mut batch, item, |core, unit| {
                if !core.keep_all.load(Ordering::Acquire) && begin_softening(core, unit) {
                    let len = core.charge_of(unit) as usize;
                    return (true, Some((core.unit_addr(unit), len)));
                }
                // Filled under a batch, it is soft already. Pinned, or being filled, it stays firm.
                (core.page(unit).load().soft(), None)
            });
            let Some((soft, begun)) = begun else {
                // Nothing is left of what the entry named, so nothing of it is firm.
                excess = excess.saturating_sub(u64::from(item.pages));
                marked.push(offered);
                continue;
            };
            if soft {
                excess = excess.saturating_sub(u64::from(item.pages));
                marked.push(offered);
            }
            if let Some((addr, len)) = begun {
                taken.push(Taken {
                    addr,
                    len,
                    item,
                    place: Place::Main,
                    slot: None,
                });
            }
        }
        for offered in marked {
            self.policy.softened(offered);
        }
        self.must_stay = match swept {
            true => self.policy.firm_pages(),
            false => 0,
        };
        let n = taken.len();
        self.advise(&batch, &mut taken, libc::MADV_FREE);
        for t in &taken {
            let (id, unit) = (t.item.entry.map(), t.item.entry.unit());
            if let Some(core) = batch.maps.get(&id) {
                let page = core.page(unit);
                if page.settle(Left::Shadow(0)).1.wake {
                    core.wake(unit);
                }
            }
        }
        n
    }

    /// Gives one piece of advice on all ranges of a batch that are still their maps' own; neighbours are merged.
    fn advise(&mut self, batch: &Batch<'_>, taken: &mut [Taken], advice: i32) {
        taken.sort_unstable_by_key(|t| t.addr);
        let mut ranges: Vec<IoVec> = Vec::with_capacity(taken.len());
        let _ours = identity::discarding();
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
        // SAFETY: all ranges are units of ours that `begin_eviction` or `begin_softening` put into this batch's hands:
        // unpinned, and readable again; and still their maps' own, for as long as no report is acted on.
        unsafe { self.crew.advise(&ranges, advice) };
    }

    /// Forgets entries of maps that are gone, and those that were replaced, when they outnumber the units that can be resident.
    fn compact(&mut self) {
        let can_be = (self.pool.budget.limit().max(self.pool.budget.used()) / PAGE as u64) as usize;
        let live = (self.pool.budget.used() / PAGE as u64) as usize;
        if self.policy.len() < (live * 2 + 8192).min(can_be * 2 + 1024) {
            return;
        }
        let (mut maps, mut at_a_time) = (Batch::default(), 0);
        let pool = self.pool.clone();
        self.policy.retain(|item, soft| {
            at_a_time += 1;
            if at_a_time == COMPACT_AT_A_TIME {
                // A map that is being dropped waits for this thread.
                (maps, at_a_time) = (Batch::default(), 0);
            }
            let (id, unit) = (item.entry.map(), item.entry.unit());
            maps.map(id).is_some_and(|core| {
                let ours = Arc::ptr_eq(&core.pool, &pool) && unit < core.units_end();
                ours && {
                    let word = core.page(unit).load();
                    // One that was filled afresh after it was marked has another entry.
                    let afresh = soft && word.state() == State::Resident && !word.soft();
                    word.tracked() && !afresh
                }
            })
        });
    }
}
