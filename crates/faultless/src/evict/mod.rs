//! The evictor: one thread for each pool, off the fault path.
//!
//! It learns from a ring what was filled, asks the [`policy`] what to take out, and does so in batches: up to 1,024
//! ranges in one `process_madvise`, which takes `mmap_lock` (for reading) once. Before that it copies the units into
//! the cooling area ([`cooler`]), where a touch can still rescue them. It starts while a *reserve* of the budget is still
//! free, so that misses go on while it waits for that lock behind somebody else. How large the reserve must be, it learns:
//! what was filled during its longest recent wait, and as much again.

#![allow(unsafe_code, reason = "discards memory by address")]

pub(crate) mod cooler;
mod crew;
pub mod policy;

use crate::fault::core::{EVICTOR_BACKLOG, MapCore, PoolCore};
use crate::fault::counters::Count;
use crate::fault::fill::{cancel_eviction, entry_ahead, entry_bytes, entry_parts};
use crate::fault::identity;
use crate::fault::page::{Left, State};
use crate::fault::registry::{self, Inside};
use crate::fault::table::{GROUP, GROUP_BYTES};
use crate::memory;
use cooler::Cooler;
use crew::Crew;
use faultless_sys::mem::{self, PAGE, Range};
use faultless_sys::{futex, raw};
use policy::{Item, Occupant, Place, Policy};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How often limits of the machine and the control group are looked at, while there is work.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Entries taken off the ring before anything else is seen to.
const DRAIN_MAX: usize = 1 << 16;
/// Sleep without work.
const IDLE_NS: u64 = 1_000_000_000;
/// Sleep when the budget is pressed but nothing can be evicted.
const STUCK_NS: u64 = 2_000_000;
/// Time in which a reserve that is not needed halves.
const RESERVE_HALVES: Duration = Duration::from_secs(4);

/// A batch that takes longer than this was held up by somebody.
const HELD_UP: Duration = Duration::from_millis(5);

/// Bounds of the part of the budget that is kept free, for misses that come while the evictor is held up.
///
/// Behind a reader of `/proc/PID/smaps` a batch can wait for 150 ms; 88,000 misses of 4 KiB in that time are 50 MB.
fn reserve_bounds(limit: u64) -> (u64, u64) {
    let step = batch_bytes(limit);
    (step / 2, (limit / 8).min(256 << 20).max(step))
}

/// The reserve to begin with.
pub(crate) fn reserve_of(limit: u64) -> u64 {
    let (least, most) = reserve_bounds(limit);
    (limit / 64).clamp(least, most)
}

/// What one batch makes free: enough for a system call to be worth its while, little enough not to be missed.
fn batch_bytes(limit: u64) -> u64 {
    (limit / 128).clamp(16 * PAGE as u64, 4 << 20)
}

/// Sets how much may be unmarked before fills wait, and says at how much to start marking, and how much memory there is.
///
/// The kernel must find enough to take back where the machine or the control group has less than the budget.
pub(crate) fn look_at_limits(pool: &PoolCore) -> (u64, u64) {
    let memory = memory::look();
    let limit = pool.budget.limit();
    if pool.guest && memory.limit < memory.machine {
        // Reclaim is the program's: what it would find of page cache, it must find of ours.
        let max = guest_firm_max(&memory);
        pool.firm_max.store(max, Ordering::Relaxed);
        // (The cooling area is memory that the kernel cannot take back at all.)
        return (max / 2, 0);
    }
    // Fills beyond this wait for the marking to catch up. It can bind only where memory is short.
    let max = if memory.limit / 2 < limit {
        memory.limit / 2
    } else {
        u64::MAX
    };
    pool.firm_max.store(max, Ordering::Relaxed);
    ((limit / 2).min(memory.limit / 4), memory.limit)
}

/// Bounds of what a guest keeps from the kernel in a control group with a limit.
const GUEST_FIRM: std::ops::Range<u64> = 1 << 20..64 << 20;

/// How much a guest may keep from the kernel: little, and less where the group's programs need nearly all that it has.
fn guest_firm_max(memory: &memory::Memory) -> u64 {
    let most = if memory.anonymous > memory.limit / 4 * 3 {
        memory.limit.saturating_sub(memory.anonymous) / 16
    } else {
        memory.limit / 64
    };
    most.clamp(GUEST_FIRM.start, GUEST_FIRM.end)
}

/// Advances the clock of the shadows by so many pages, and says what it shows. Never zero.
fn tick(pool: &PoolCore, pages: u32) -> u32 {
    let clock = pool
        .clock
        .load(Ordering::Relaxed)
        .wrapping_add(pages)
        .max(1);
    pool.clock.store(clock, Ordering::Relaxed);
    clock
}

pub(crate) struct Evictor {
    pool: Arc<PoolCore>,
    policy: Policy,
    cooler: Option<Cooler>,
    crew: Crew,
    policy_charged: u64,
    /// Units whose groups of words became empty.
    emptied: Vec<(u32, u64)>,
    looked: Option<Instant>,
    firm_target: u64,
    /// Memory of the machine or the control group, at the last look.
    memory: u64,
    /// When the reserve was last brought down, and the limit that it belongs to.
    reserve_at: (Instant, u64),
}

/// A unit in the hands of a batch.
#[derive(Debug, Clone, Copy)]
struct Taken {
    addr: usize,
    /// Bytes of the unit that pages of its source back.
    len: usize,
    item: Item,
    place: Place,
    /// Where its bytes are to be kept.
    slot: Option<u32>,
}

/// A batch in the making: the maps that it entered.
#[derive(Default)]
struct Batch<'a> {
    maps: HashMap<u32, Inside<'a>>,
    /// Units whose groups of words became empty.
    emptied: Vec<(u32, u64)>,
}

impl<'a> Batch<'a> {
    fn map(&mut self, id: u32) -> Option<&Inside<'a>> {
        // A map that is not there may be there at the next look: its gate may serve another.
        if let std::collections::hash_map::Entry::Vacant(v) = self.maps.entry(id) {
            v.insert(registry::enter(registry::gate(id)?)?);
        }
        self.maps.get(&id)
    }
}

/// Gives up what cools in a slot, if it still does. `true` if it did: the slot is free.
fn drop_from_slot(
    pool: &Arc<PoolCore>,
    maps: &mut Batch<'_>,
    slot: u32,
    occupant: Occupant,
    place: Place,
) -> bool {
    if occupant.entry == 0 {
        return false;
    }
    let (id, unit) = entry_parts(occupant.entry);
    let Some(core) = maps.map(id).filter(|core| {
        Arc::ptr_eq(&core.pool, pool) && core.serial == occupant.serial && unit < core.data_units()
    }) else {
        return false;
    };
    let shadow = match place {
        Place::Fresh => pool.clock.load(Ordering::Relaxed).wrapping_add(1).max(1),
        Place::Main => 0,
    };
    if core.keep_all.load(Ordering::SeqCst) || !core.page(unit).drop_cool(slot, shadow) {
        return false;
    }
    if place == Place::Fresh {
        tick(pool, 1);
    }
    if let Some(area) = pool.cooling.get() {
        area.give(slot);
    }
    core.counters.add(Count::Evictions, 1);
    if core.table.leave(unit) {
        maps.emptied.push((id, unit));
    }
    true
}

/// Whether this kernel lets a process give batched DONTNEED advice to itself.
pub(crate) fn batches_work() -> bool {
    let Ok(pidfd) = mem::pidfd_open(raw::getpid(), 0) else {
        return false;
    };
    let Ok(addr) = mem::map_reserved(PAGE) else {
        return false;
    };
    let ranges = [Range { addr, len: PAGE }];
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
        crate::keeper::block_signals();
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
            firm_target: u64::MAX,
            memory: u64::MAX,
            reserve_at: (Instant::now(), pool.budget.limit()),
            pool,
        };
        while !evictor.pool.stopping.load(Ordering::Acquire) {
            evictor.look_at_limits();
            if !evictor.pass() {
                let pool = evictor.pool.clone();
                // Pressed, and nothing could be evicted: all of it is pinned. Look again soon, not at once.
                let ns = if evictor.pressed() { STUCK_NS } else { IDLE_NS };
                pool.evict_bell.sleep(ns, || {
                    pool.fresh.load(Ordering::Relaxed) < EVICTOR_BACKLOG
                        && !pool.stopping.load(Ordering::Acquire)
                });
            }
        }
        if let Some(cooler) = evictor.cooler {
            cooler.end();
        }
        evictor.crew.end();
    }

    /// How much may stay unmarked, so that the kernel finds enough to take back.
    fn look_at_limits(&mut self) {
        if self.looked.is_some_and(|t| t.elapsed() < LOOK_AGAIN) {
            return;
        }
        self.looked = Some(Instant::now());
        (self.firm_target, self.memory) = look_at_limits(&self.pool);
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
    fn learn_reserve(&mut self, before: u64, filled: u64, took: Duration) {
        let limit = self.pool.budget.limit();
        let (least, most) = reserve_bounds(limit);
        let (at, of) = self.reserve_at;
        let mut now = self.pool.reserve.load(Ordering::Relaxed);
        if of != limit {
            now = reserve_of(limit);
            self.reserve_at = (Instant::now(), limit);
        } else if at.elapsed() >= RESERVE_HALVES / 16 {
            let halvings = at.elapsed().as_secs_f64() / RESERVE_HALVES.as_secs_f64();
            now = (now as f64 * 0.5f64.powf(halvings)) as u64;
            self.reserve_at.0 = Instant::now();
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
            if let Some(cooler) = &mut self.cooler {
                // The kernel cannot take slots back: where memory is short, they are few.
                cooler.fit(self.pool.budget.limit().min(self.memory / 2));
            }
            let (before, began) = (self.pool.budget.used(), Instant::now());
            let (units, released) = self.evict();
            busy |= units > 0;
            if units == 0 && self.pressed() {
                // Nothing is left but what cools.
                busy |= self.give_slots_back();
            }
            let filled = (self.pool.budget.used() + released).saturating_sub(before);
            let took = began.elapsed();
            if took > HELD_UP * 2 {
                self.crew.call_helpers();
            }
            self.learn_reserve(before, filled, took);
        }
        if self.policy.firm_pages() * PAGE as u64 > self.firm_target {
            busy |= self.soften() > 0;
        }
        self.publish_firm();
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

    fn publish_firm(&self) {
        let bytes = self.policy.firm_pages() * PAGE as u64;
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
            let (id, unit) = entry_parts(entry);
            if let Some(core) = maps.map(id)
                && Arc::ptr_eq(&core.pool, &self.pool)
                && unit < core.data_units()
                && entry_bytes(entry) == core.unit_bytes()
            {
                let hot = core.page(unit).take_seen();
                let pages = (core.charge_of(unit) / PAGE as u64) as u32;
                self.policy.arrive(Item { entry, pages }, hot);
            }
            // Counted in one place before it leaves the other: never less than there is.
            self.publish_firm();
            self.pool
                .fresh
                .fetch_sub(entry_bytes(entry), Ordering::Relaxed);
        }
        n
    }

    /// Calls `begin` on the unit of an item if its map is still there and is ours to take from.
    fn with_unit<R>(
        &self,
        batch: &mut Batch<'_>,
        item: Item,
        f: impl FnOnce(&MapCore, u64) -> R,
    ) -> Option<R> {
        let (id, unit) = entry_parts(item.entry);
        let core = batch.map(id)?;
        // An entry of a map that is gone may name a unit of the one that has its gate now. One of the same size is as good
        // as its own.
        if !Arc::ptr_eq(&core.pool, &self.pool)
            || unit >= core.data_units()
            || entry_bytes(item.entry) != core.unit_bytes()
            || !core.page(unit).load().tracked()
        {
            return None;
        }
        Some(f(core, unit))
    }

    /// Takes one batch of units out of their maps. Returns their number, and how many bytes were released.
    fn evict(&mut self) -> (usize, u64) {
        enum Try {
            Taken(usize, usize, u64),
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
                if let Some(was_soft) = page.begin_evict() {
                    // Who sets `keep_all` looks at the words afterwards: one of the two sees the other.
                    if !core.keep_all.load(Ordering::SeqCst) {
                        let (addr, len) = (core.unit_addr(unit), core.charge_of(unit) as usize);
                        return Try::Taken(addr, len, core.serial);
                    }
                    cancel_eviction(core, unit, was_soft);
                    return Try::Gone;
                }
                match page.load().state() {
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
                                && entry_bytes(item.entry) == PAGE as u64
                                && !entry_ahead(item.entry) =>
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
            let (id, unit) = entry_parts(t.item.entry);
            let Some(core) = batch.maps.get(&id) else {
                continue;
            };
            let left = match (t.slot, t.place) {
                (Some(slot), _) => Left::Slot(slot),
                (None, Place::Fresh) => Left::Shadow(tick(&self.pool, (t.len / PAGE) as u32)),
                (None, Place::Main) => Left::Shadow(0),
            };
            let settled = settle_evicted(core, unit, left);
            released += core.charge_of(unit);
            if !settled.absent
                && let (Some(cooler), Some(slot)) = (&mut self.cooler, t.slot)
            {
                cooler.unfill(slot);
            }
            if settled.emptied {
                batch.emptied.push((id, unit));
            }
        }
        self.pool.evicted.fetch_add(n as u32, Ordering::Relaxed);
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
                && unit < core.data_units()
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
        for _ in 0..self.policy.len() {
            if excess == 0 || taken.len() >= most {
                break;
            }
            let Some((item, offered)) = self.policy.next_to_soften() else {
                break;
            };
            let begun = self.with_unit(&mut batch, item, |core, unit| {
                let page = core.page(unit);
                if !core.keep_all.load(Ordering::Acquire) && page.begin_soften() {
                    // As in `evict`: who sets `keep_all` looks at the words afterwards.
                    if !core.keep_all.load(Ordering::SeqCst) {
                        let len = core.charge_of(unit) as usize;
                        return (true, core.unit_addr(unit), len);
                    }
                    if page.cancel_soften() {
                        futex::wake_at(page.futex(), futex::ALL);
                    }
                }
                // Filled under a batch, it is soft already. Pinned, or being filled, it stays firm.
                (page.load().soft(), 0, 0)
            });
            let Some((soft, addr, len)) = begun else {
                continue;
            };
            if soft {
                excess = excess.saturating_sub(u64::from(item.pages));
                marked.push(offered);
            }
            if addr != 0 {
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
        let n = taken.len();
        self.advise(&batch, &mut taken, libc::MADV_FREE);
        for t in &taken {
            let (id, unit) = entry_parts(t.item.entry);
            if let Some(core) = batch.maps.get(&id) {
                let page = core.page(unit);
                if page.settle(Left::Shadow(0)).1.wake {
                    futex::wake_at(page.futex(), futex::ALL);
                }
            }
        }
        n
    }

    /// Gives one piece of advice on all ranges of a batch that are still their maps' own; neighbours are merged.
    fn advise(&mut self, batch: &Batch<'_>, taken: &mut [Taken], advice: i32) {
        taken.sort_unstable_by_key(|t| t.addr);
        let mut ranges: Vec<Range> = Vec::with_capacity(taken.len());
        let _ours = identity::discarding();
        for &Taken {
            addr, len, item, ..
        } in &*taken
        {
            let map = batch.maps.get(&entry_parts(item.entry).0);
            if !map.is_some_and(|core| core.live.covers(addr, len)) {
                continue;
            }
            match ranges.last_mut() {
                Some(r) if r.addr + r.len == addr => r.len += len,
                _ => ranges.push(Range { addr, len }),
            }
        }
        // SAFETY: all ranges are units of ours that `begin_evict` or `begin_soften` put into this batch's hands:
        // unpinned, and readable again; and still their maps' own, for as long as no report is acted on.
        unsafe { self.crew.advise(&ranges, advice) };
    }

    /// Forgets entries of maps that are gone, and duplicates, when they outnumber the units that can be resident.
    fn compact(&mut self) {
        let can_be = (self.pool.budget.limit().max(self.pool.budget.used()) / PAGE as u64) as usize;
        let live = (self.pool.budget.used() / PAGE as u64) as usize;
        if self.policy.len() < (live * 2 + 8192).min(can_be * 2 + 1024) {
            return;
        }
        let mut maps = Batch::default();
        let mut seen = std::collections::HashSet::new();
        let pool = self.pool.clone();
        self.policy.retain(|item| {
            let (id, unit) = entry_parts(item.entry);
            let alive = maps.map(id).is_some_and(|core| {
                Arc::ptr_eq(&core.pool, &pool)
                    && unit < core.data_units()
                    && core.page(unit).load().tracked()
            });
            alive && seen.insert(item.entry)
        });
    }
}

/// Gives the words of an empty group back, and its page tables: a group of the smallest units is 2 MiB of the map, which is
/// what one page of them covers. Kernels with CONFIG_PT_RECLAIM (6.14) free it when the whole range is discarded at once.
pub(crate) fn collect_group(core: &MapCore, unit: u64) {
    let first = unit / GROUP * GROUP;
    let bytes = core.table.collect(unit, || {
        let start = core.unit_addr(first);
        let end = (start + ((GROUP as usize) << core.unit_shift)).min(core.region().end);
        let _ours = identity::discarding();
        if core.live.covers(start, end - start) {
            // SAFETY: all units of the range are absent, and none can be claimed before this returns; the range is still the
            // map's own, for as long as no report is acted on.
            unsafe { mem::discard(start, end - start) };
        }
    });
    if bytes > 0 {
        core.counters.add(Count::Released, bytes);
        core.pool.budget.release(bytes);
    }
}

/// What became of a unit that was taken out.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settled {
    /// It is absent now: no miss was faster.
    pub(crate) absent: bool,
    /// Its group of words is empty now.
    pub(crate) emptied: bool,
}

/// Books one unit out after its memory was discarded.
pub(crate) fn settle_evicted(core: &MapCore, unit: u64, left: Left) -> Settled {
    let page = core.page(unit);
    let (absent, due) = page.settle(left);
    let cools = absent && matches!(left, Left::Slot(_));
    core.counters.add(
        if cools {
            Count::Cooled
        } else {
            Count::Evictions
        },
        1,
    );
    let bytes = core.charge_of(unit);
    core.counters.add(Count::Released, bytes);
    core.pool.budget.release(bytes);
    if due.wake {
        futex::wake_at(page.futex(), futex::ALL);
    }
    Settled {
        absent,
        // A cool unit still counts in its group.
        emptied: absent && !cools && core.table.leave(unit),
    }
}
