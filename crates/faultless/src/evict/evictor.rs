//! The evictor: one thread for each pool, off the fault path.
//!
//! It learns from a ring what was filled, asks the [`policy`] what to take out, and does so in batches: up to 1,024
//! ranges in one `process_madvise`, which takes `mmap_lock` (for reading) once. Before that it copies the units into
//! the cooling area ([`cooler`]), where a touch can still rescue them. It starts while a *reserve* of the budget is still
//! free, so that misses go on while it waits for that lock behind somebody else. How large the reserve must be, it learns:
//! what was filled during its longest recent wait, and as much again.

#![allow(unsafe_code, reason = "discards memory by address")]

use crate::base::ids::{MapId, Nanos, Unit};
use crate::base::primitive::Ordering;
use crate::base::thread::block_signals;
use crate::base::{clock, memory};
use crate::evict::batch::Batch;
use crate::evict::cooler::Cooler;
use crate::evict::crew::{Crew, Spawn};
use crate::evict::limits::{look_at_limits, reserve_bounds, reserve_of};
use crate::evict::policy::{Item, Policy};
use crate::evict::pressure::Pressure;
use crate::fault::give_up::collect_group;
use crate::space::map_core::MapCore;
use crate::space::page::State;
use crate::space::pool_core::PoolCore;
use crate::space::table::GROUP_BYTES;
use faultless_sys::mem::{IoVec, PAGE};
use faultless_sys::{mem, raw};
use std::sync::Arc;

/// How often limits of the machine and the control group are looked at, while there is work.
const LOOK_AGAIN: Nanos = Nanos::from_millis(500);
/// The same, where loads have found that the kernel took back so many pages meanwhile: there is less memory than before.
const LOOK_SOON: Nanos = Nanos::from_millis(10);
const TAKEN_BACK: u32 = 64;
/// And in a control group, after this part of its memory was filled, as a divisor: so much, at most, is firm beyond what may be, after the
/// group was made smaller.
const LOOK_SHARE: u64 = 16;
/// Entries taken off the ring before anything else is seen to.
const DRAIN_MAX: usize = 1 << 16;
/// Arrivals that are counted together.
const COUNT_EACH: usize = 64;
/// Entries that a look for stale ones goes through before it lets go of the maps that it entered.
const COMPACT_AT_A_TIME: u32 = 4096;
/// Sleep without work.
const IDLE: Nanos = Nanos::from_secs(1);
/// Sleep when the budget is pressed but nothing can be evicted.
const STUCK: Nanos = Nanos::from_millis(2);
/// Turns in which nothing can leave, before the pool is believed to have nothing that can.
const IN_VAIN: u32 = 3;
/// The part of the group's memory that the pool keeps for other units, where some cannot leave; as a divisor.
const FLOOR_SHARE: u64 = 16;
/// What the floor comes down by with each look, as a divisor.
const FLOOR_STEP: u64 = 128;
/// Time in which a reserve that is not needed halves.
const RESERVE_HALVES: Nanos = Nanos::from_secs(4);

/// A batch that takes longer than this was held up by somebody.
const HELD_UP: Nanos = Nanos::from_millis(5);

pub(crate) struct Evictor {
    pub(super) pool: Arc<PoolCore>,
    pub(super) policy: Policy,
    pub(super) cooler: Option<Cooler>,
    pub(super) crew: Crew,
    policy_charged: u64,
    /// Units whose groups of words became empty.
    pub(super) emptied: Vec<(MapId, Unit)>,
    looked: Option<Nanos>,
    /// The least to which memory is capped, since less would leave no room beside what cannot leave; and whether that was found out
    /// since the last look.
    floor: u64,
    stuck: bool,
    /// Turns in which memory was short and no unit could leave, since one did.
    in_vain: u32,
    /// Bytes that were filled since the last look, and how many are to be before the next.
    filled: u64,
    look_after: u64,
    /// Pages that the kernel had taken back until the last look.
    taken_back: u32,
    pub(super) firm_target: u64,
    /// The most that a fill was waiting for as this pass began.
    wanted: u64,
    pressure: Pressure,
    /// Pages that cannot be marked: pinned, or kept because they cannot be read again. No fill waits for the marking of these.
    pub(super) must_stay: u64,
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
    /// `spawn` starts its helpers.
    pub(crate) fn new(pool: Arc<PoolCore>, spawn: Spawn) -> Self {
        let pidfd = if batches_work() {
            mem::pidfd_open(raw::getpid(), 0).ok()
        } else {
            None
        };
        let cooler = Cooler::new(&pool);
        Evictor {
            policy: Policy::new(cooler.is_some()),
            cooler,
            crew: Crew::new(pidfd, spawn),
            policy_charged: 0,
            emptied: Vec::new(),
            looked: None,
            floor: 0,
            stuck: false,
            in_vain: 0,
            filled: 0,
            look_after: u64::MAX,
            taken_back: 0,
            firm_target: u64::MAX,
            wanted: 0,
            pressure: Pressure::default(),
            must_stay: 0,
            memory: u64::MAX,
            reserve_at: (clock::now(), pool.budget.limit()),
            pool,
        }
    }

    /// The thread's whole life.
    pub(crate) fn run(mut self) {
        block_signals();
        while !self.pool.stopping.load(Ordering::Acquire) {
            self.look_at_limits();
            if !self.pass() {
                self.rest();
            }
        }
        self.end();
    }

    /// Sleeps after a pass that found nothing to do.
    fn rest(&self) {
        let pool = &self.pool;
        // Nothing could be evicted: all of it is pinned. Look again soon, not immediately.
        if self.pressed() {
            // (Not by the bell: each thread that waits rings it.)
            clock::nap(STUCK);
            return;
        }
        // Threads that were called may still be on their way to what is free. Once that is used up, the next ones ring.
        let crowded = pool.budget.line.crowded();
        let most = if crowded { STUCK } else { IDLE };
        pool.evict_bell.sleep(most, || {
            !pool.has_work_for_evictor()
                && (crowded || !pool.budget.line.crowded())
                && !pool.stopping.load(Ordering::Acquire)
        });
    }

    pub(crate) fn end(self) {
        if let Some(cooler) = self.cooler {
            cooler.end();
        }
        self.pool.budget.release(self.policy_charged);
        self.crew.end();
    }

    /// Finds out how much may stay unmarked, so that the kernel finds enough to take back.
    fn look_at_limits(&mut self) {
        let taken_back = self.pool.taken_back.load(Ordering::Relaxed);
        let pause = match taken_back.wrapping_sub(self.taken_back) >= TAKEN_BACK {
            true => LOOK_SOON,
            false => LOOK_AGAIN,
        };
        let due = self.filled >= self.look_after
            || self.looked.is_none_or(|t| clock::now().since(t) >= pause);
        if !due {
            return;
        }
        (self.looked, self.taken_back) = (Some(clock::now()), taken_back);
        self.pool.withheld.take();
        let memory = memory::look();
        self.filled = 0;
        self.look_after = match memory.limit < memory.machine {
            true => memory.limit / LOOK_SHARE,
            false => u64::MAX,
        };
        self.pressure.look(clock::now(), memory.stalled);
        if !std::mem::replace(&mut self.stuck, false) {
            // What could not leave then, may now. (By degrees: with a cap far too low, all that can leave would go each time.)
            self.floor -= self.floor / FLOOR_STEP;
        }
        let limits = look_at_limits(&self.pool, &memory, self.floor);
        self.firm_target = self.pressure.of(limits.firm);
        if std::mem::replace(&mut self.memory, limits.memory) > limits.memory {
            self.fit_slots(true);
        }
    }

    /// How much is to be free: the reserve, or what a fill is waiting for.
    pub(super) fn headroom(&self) -> u64 {
        self.pool.reserve.load(Ordering::Relaxed).max(self.wanted)
    }

    /// Finds out what fills are waiting for. (A thread that waits says so now and then. Until it does again, the least that any of them
    /// wants is known.)
    fn look_at_wishes(&mut self) {
        let line = &self.pool.budget.line;
        let wanted = self.pool.wanted.swap(0, Ordering::Relaxed);
        self.wanted = match line.crowded() {
            true => wanted.max(line.least()),
            false => 0,
        };
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
    pub(crate) fn pass(&mut self) -> bool {
        let mut busy = self.drain() > 0;
        self.pool.budget.note_peak();
        self.look_at_wishes();
        let pressed = self.pressed();
        if pressed {
            self.fit_slots(false);
        }
        let (before, began) = (self.pool.budget.used(), clock::now());
        let done = self.turn(pressed);
        busy |= done.left + done.softened > 0;
        let took = clock::now().since(began);
        if took > HELD_UP + HELD_UP {
            self.crew.call_helpers();
        }
        if pressed {
            match done.left == 0 && self.pressed() {
                true => busy |= self.give_what_there_is(),
                false => self.in_vain = 0,
            }
            let filled = (self.pool.budget.used() + done.released).saturating_sub(before);
            self.learn_reserve(before, filled, took);
        }
        self.publish_firm();
        // There may be less that is firm.
        let line = &self.pool.budget.line;
        if line.crowded() && self.pool.has_room(line.least()) {
            line.call();
        }
        self.compact();
        self.charge_policy();
        busy
    }

    /// Charges what the policy's own queues take.
    fn charge_policy(&mut self) {
        let now = self.policy.bytes();
        if now > self.policy_charged {
            self.pool.budget.charge_anyway(now - self.policy_charged);
        } else {
            self.pool.budget.release(self.policy_charged - now);
        }
        self.policy_charged = now;
    }

    /// Memory is short, and no unit can leave. Returns whether anything came of it.
    fn give_what_there_is(&mut self) -> bool {
        if self.give_slots_back() {
            return true;
        }
        // (Units that are being used now, or have not arrived yet, can leave in a moment.)
        self.in_vain += 1;
        if self.in_vain < IN_VAIN || !self.pool.filled.is_empty() {
            return false;
        }
        // What is left cannot leave. Beside it, the rest of the map is to have room.
        let budget = &self.pool.budget;
        let share = self.memory.min(budget.allowed()) / FLOOR_SHARE;
        let needed = budget.used() + self.headroom() + share;
        if budget.cap() >= needed.min(budget.allowed()) {
            return false;
        }
        (self.floor, self.stuck) = (needed, true);
        budget.set_cap(needed);
        true
    }

    /// Makes the slots fit the memory. The kernel cannot take them back: where memory is short, they are few. `in_use`: only if there
    /// are any already.
    fn fit_slots(&mut self, in_use: bool) {
        if let Some(cooler) = &mut self.cooler
            && !(in_use && cooler.is_empty())
        {
            let mut maps = Batch::default();
            cooler.fit(&mut maps, self.pool.budget.limit().min(self.memory / 2));
            self.emptied.append(&mut maps.emptied);
        }
    }

    fn publish_firm(&self) {
        let pages = self.policy.firm_pages().saturating_sub(self.must_stay);
        let bytes = pages * PAGE as u64;
        self.pool.firm.store(bytes, Ordering::Relaxed);
    }

    /// Takes what has arrived.
    fn drain(&mut self) -> usize {
        let mut maps = Batch::default();
        let (mut n, mut taken) = (0, 0);
        while n < DRAIN_MAX {
            let Some(entry) = self.pool.filled.pop() else {
                break;
            };
            n += 1;
            self.filled += entry.unit_bytes();
            taken += entry.unit_bytes();
            let (id, unit) = (entry.map(), entry.unit());
            if let Some(core) = maps.map(id)
                && Arc::ptr_eq(&core.pool, &self.pool)
                && unit < core.units_end()
                && entry.unit_bytes() == core.unit_bytes()
            {
                core.recorder.note(unit);
                if core.page(unit).load().tracked() {
                    let hot = core.page(unit).take_seen();
                    let pages = (core.charge_of(unit) / PAGE as u64) as u32;
                    self.policy
                        .arrive(Item { entry, pages }, hot, entry.credit());
                } else if core.table.is_spent(unit) {
                    // Its fill failed.
                    self.emptied.push((id, unit));
                }
            }
            // (Threads that wait for the evictor to mark pages look at both sums.)
            if n % COUNT_EACH == 0 {
                self.count_arrived(std::mem::take(&mut taken));
            }
        }
        if taken > 0 {
            self.count_arrived(taken);
        }
        n
    }

    /// Units of so many bytes are the policy's. They are counted in one place before they leave the other: never less than there are.
    fn count_arrived(&self, bytes: u64) {
        self.publish_firm();
        self.pool.filled.take_off(bytes);
    }

    /// Calls `begin` on the unit of an item if its map is still there and is ours to take from.
    pub(super) fn with_unit<R>(
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
    pub(super) fn collect_words(&mut self) {
        if self.emptied.len() as u64 * GROUP_BYTES < self.pool.budget.limit() / 128 {
            return;
        }
        let mut maps = Batch::default();
        for (id, unit) in std::mem::take(&mut self.emptied) {
            if let Some(core) = maps.map(id)
                && Arc::ptr_eq(&core.pool, &self.pool)
                && unit < core.units_end()
                && !collect_group(core, unit)
            {
                self.emptied.push((id, unit));
            }
        }
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
