//! The evictor: one thread for each pool, off the fault path.
//!
//! It learns from a ring what was filled, asks the [`policy`] what to give up, and does so in batches: up to 1,024
//! ranges in one `process_madvise`, which takes `mmap_lock` (for reading) once. It starts while a *reserve* of the
//! budget is still free, so that misses go on while it waits for that lock behind somebody else.

#![allow(unsafe_code, reason = "discards memory by address")]

pub(crate) mod policy;

use crate::fault::core::{EVICTOR_BACKLOG, MapCore, PoolCore};
use crate::fault::counters::Count;
use crate::fault::fill::{cancel_eviction, entry_bytes, entry_parts};
use crate::fault::page::State;
use crate::fault::registry::{self, Inside};
use crate::fault::table::GROUP_BYTES;
use crate::memory;
use faultless_sys::mem::{self, BATCH_MAX, PAGE, Range};
use faultless_sys::{Errno, futex, raw};
use policy::{Item, Policy};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How often limits of the machine and the control group are looked at, while there is work.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// Entries taken off the ring before anything else is seen to.
const DRAIN_MAX: usize = 1 << 16;
/// Sleep without work.
const IDLE_NS: u64 = 1_000_000_000;
/// Sleep when the budget is pressed but nothing can be evicted.
const STUCK_NS: u64 = 2_000_000;

/// How much of the budget to keep free, for misses that come while the evictor is held up.
///
/// Behind a reader of `/proc/PID/smaps` a batch can wait for 150 ms; 88,000 misses of 4 KiB in that time are 50 MB.
pub(crate) fn reserve_of(limit: u64) -> u64 {
    (limit / 8).min(256 << 20)
}

pub(crate) struct Evictor {
    pool: Arc<PoolCore>,
    policy: Policy,
    /// Names this process to `process_madvise`; `None` where the kernel will not advise a process on itself.
    pidfd: Option<i32>,
    policy_charged: u64,
    /// Units whose groups of words became empty.
    emptied: Vec<(u32, u64)>,
    looked: Option<Instant>,
    firm_target: u64,
}

/// A batch in the making: units whose words are in the batch's hands, and their ranges.
#[derive(Default)]
struct Batch<'a> {
    maps: HashMap<u32, Option<Inside<'a>>>,
    items: Vec<(usize, Item)>,
}

impl<'a> Batch<'a> {
    fn map(&mut self, id: u32) -> Option<&Inside<'a>> {
        self.maps
            .entry(id)
            .or_insert_with(|| registry::enter(registry::gate(id)?))
            .as_ref()
    }
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
        let mut evictor = Evictor {
            pool,
            policy: Policy::default(),
            pidfd,
            policy_charged: 0,
            emptied: Vec::new(),
            looked: None,
            firm_target: u64::MAX,
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
        if let Some(fd) = evictor.pidfd {
            // SAFETY: made above.
            unsafe { faultless_sys::file::close(fd) };
        }
    }

    /// How much may stay unmarked, so that the kernel finds enough to take back.
    fn look_at_limits(&mut self) {
        if self.looked.is_some_and(|t| t.elapsed() < LOOK_AGAIN) {
            return;
        }
        self.looked = Some(Instant::now());
        let memory = memory::look();
        let limit = self.pool.budget.limit();
        self.firm_target = (limit / 2).min(memory.limit / 4);
        // Fills beyond this wait for the marking to catch up. It can bind only where memory is short.
        let max = if memory.limit / 2 < limit {
            memory.limit / 2
        } else {
            u64::MAX
        };
        self.pool.firm_max.store(max, Ordering::Relaxed);
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

    /// Does what there is to do. `false` if that was nothing.
    fn pass(&mut self) -> bool {
        let mut busy = self.drain() > 0;
        self.pool.budget.note_peak();
        if self.pressed() {
            busy |= self.evict() > 0;
        }
        if self.policy.firm_pages() * PAGE as u64 > self.firm_target {
            busy |= self.cool() > 0;
        }
        self.pool
            .firm
            .store(self.policy.firm_pages() * PAGE as u64, Ordering::Relaxed);
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
        if !Arc::ptr_eq(&core.pool, &self.pool)
            || unit >= core.data_units()
            || !core.page(unit).load().tracked()
        {
            return None;
        }
        Some(f(core, unit))
    }

    /// Evicts one batch. Returns the number of units that went.
    fn evict(&mut self) -> usize {
        enum Try {
            Taken(usize),
            Kept,
            Seen,
            Gone,
        }
        let b = &self.pool.budget;
        let headroom = self.headroom();
        self.pool.wanted.store(0, Ordering::Relaxed);
        // A little beyond it, so that the next batch is not due at once.
        let mut want = (b.used() + headroom + headroom / 8).saturating_sub(b.limit());
        let mut batch = Batch::default();
        let mut back = Vec::new();
        let tracked = self.policy.len();
        for _ in 0..tracked {
            if want == 0 || batch.items.len() >= BATCH_MAX {
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
                if victim.cold && word.state() == State::Resident && !word.soft() {
                    return Try::Gone; // filled afresh since: it has another entry
                }
                if page.take_seen() {
                    return Try::Seen;
                }
                if let Some(was_soft) = page.begin_evict() {
                    // Who sets `keep_all` looks at the words afterwards: one of the two sees the other.
                    if !core.keep_all.load(Ordering::SeqCst) {
                        return Try::Taken(core.unit_addr(unit));
                    }
                    cancel_eviction(core, unit, was_soft);
                    return Try::Gone;
                }
                match page.load().state() {
                    State::Absent if page.untrack_absent() => Try::Gone,
                    _ => Try::Kept,
                }
            });
            match tried {
                Some(Try::Taken(addr)) => {
                    want = want.saturating_sub(u64::from(item.pages) * PAGE as u64);
                    batch.items.push((addr, item));
                }
                Some(Try::Seen) => back.push((item, true)),
                Some(Try::Kept) => back.push((item, false)),
                Some(Try::Gone) | None => {}
            }
        }
        for (item, hot) in back {
            self.policy.arrive(item, hot);
        }
        let n = batch.items.len();
        self.advise(&mut batch, libc::MADV_DONTNEED);
        let clock = self
            .pool
            .clock
            .load(Ordering::Relaxed)
            .wrapping_add(n as u32)
            .max(1);
        self.pool.clock.store(clock, Ordering::Relaxed);
        for (_, item) in &batch.items {
            let (id, unit) = entry_parts(item.entry);
            if let Some(Some(core)) = batch.maps.get(&id)
                && settle_evicted(core, unit, clock)
            {
                self.emptied.push((id, unit));
            }
        }
        drop(batch);
        self.collect_words();
        n
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
    fn cool(&mut self) -> usize {
        let mut batch = Batch::default();
        let mut cooled = Vec::new();
        let mut back = Vec::new();
        let mut excess =
            (self.policy.firm_pages() * PAGE as u64).saturating_sub(self.firm_target) / PAGE as u64;
        for _ in 0..self.policy.len() {
            if excess == 0 || batch.items.len() >= BATCH_MAX {
                break;
            }
            let Some(item) = self.policy.next_to_cool() else {
                break;
            };
            excess = excess.saturating_sub(u64::from(item.pages));
            let begun = self.with_unit(&mut batch, item, |core, unit| {
                let page = core.page(unit);
                if core.keep_all.load(Ordering::Acquire) {
                    return None;
                }
                let word = page.load();
                if page.take_seen() || word.pins() > 0 {
                    return Some((true, 0));
                }
                if page.begin_soften() {
                    // As in `evict`: who sets `keep_all` looks at the words afterwards.
                    if !core.keep_all.load(Ordering::SeqCst) {
                        return Some((false, core.unit_addr(unit)));
                    }
                    if page.cancel_soften() {
                        futex::wake_at(page.futex(), futex::ALL);
                    }
                    return None;
                }
                // Soft already (filled under a batch), or absent: nothing to mark. Being filled: it stays as it is.
                let word = page.load();
                Some((!word.soft() && word.state() != State::Absent, 0))
            });
            match begun {
                Some(Some((true, _))) => back.push(item),
                Some(Some((false, 0))) => cooled.push(item),
                Some(Some((false, addr))) => {
                    batch.items.push((addr, item));
                    cooled.push(item);
                }
                Some(None) | None => {}
            }
        }
        for item in back {
            self.policy.arrive(item, true);
        }
        for item in cooled {
            self.policy.cooled(item);
        }
        let n = batch.items.len();
        self.advise(&mut batch, libc::MADV_FREE);
        for (_, item) in &batch.items {
            let (id, unit) = entry_parts(item.entry);
            if let Some(Some(core)) = batch.maps.get(&id) {
                let page = core.page(unit);
                if page.settle(0).1.wake {
                    futex::wake_at(page.futex(), futex::ALL);
                }
            }
        }
        n
    }

    /// Gives one piece of advice on all ranges of a batch; neighbours are merged.
    fn advise(&mut self, batch: &mut Batch<'_>, advice: i32) {
        batch.items.sort_unstable_by_key(|&(addr, _)| addr);
        let mut ranges: Vec<Range> = Vec::with_capacity(batch.items.len());
        for &(addr, item) in &batch.items {
            let len = item.pages as usize * PAGE;
            match ranges.last_mut() {
                Some(r) if r.addr + r.len == addr => r.len += len,
                _ => ranges.push(Range { addr, len }),
            }
        }
        let mut rest = &ranges[..];
        while !rest.is_empty() {
            if let Some(pidfd) = self.pidfd {
                // SAFETY: all ranges are units of ours that `begin_evict` or `begin_soften` put into this batch's
                // hands: unpinned, and readable again.
                match unsafe { mem::madvise_batch(pidfd, rest, advice) } {
                    Ok(mut bytes) => {
                        while let Some(first) = rest.first().filter(|r| r.len <= bytes) {
                            bytes -= first.len;
                            rest = &rest[1..];
                        }
                        if rest.is_empty() {
                            return;
                        }
                    }
                    Err(Errno(libc::EINTR | libc::EAGAIN)) => continue,
                    Err(_) => {}
                }
            }
            // One by one: no batches here, or the first of the rest was refused.
            let Some((first, others)) = rest.split_first() else {
                return;
            };
            // SAFETY: as above.
            unsafe {
                match advice {
                    libc::MADV_DONTNEED => _ = mem::discard(first.addr, first.len),
                    _ => _ = mem::madvise(first.addr, first.len, advice),
                }
            }
            rest = others;
        }
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

/// Gives the words of an empty group back.
pub(crate) fn collect_group(core: &MapCore, unit: u64) {
    let bytes = core.table.collect(unit);
    if bytes > 0 {
        core.counters.add(Count::Released, bytes);
        core.pool.budget.release(bytes);
    }
}

/// Books one unit out after its memory was discarded. Returns whether its group of words is empty now.
pub(crate) fn settle_evicted(core: &MapCore, unit: u64, clock: u32) -> bool {
    let page = core.page(unit);
    let (absent, due) = page.settle(clock);
    core.counters.add(Count::Evictions, 1);
    let bytes = core.charge_of(unit);
    core.counters.add(Count::Released, bytes);
    core.pool.budget.release(bytes);
    if due.wake {
        futex::wake_at(page.futex(), futex::ALL);
    }
    absent && core.table.leave(unit)
}
