//! How much memory the engine may use, and how much it keeps free.

use crate::base::memory::Memory;
use crate::base::primitive::Ordering;
use crate::evict::policy::ghost_reach;
use crate::space::pool_core::PoolCore;
use faultless_sys::mem::PAGE;

/// Bounds of the part of the budget that is kept free, for misses that come while the evictor is held up.
///
/// Behind a reader of `/proc/PID/smaps` a batch can wait for 150 ms; 88,000 misses of 4 KiB in that time are 50 MB.
pub(crate) fn reserve_bounds(limit: u64) -> (u64, u64) {
    let step = batch_bytes(limit);
    (step / 2, (limit / 8).min(256 << 20).max(step))
}

/// The reserve to begin with.
pub(crate) fn reserve_of(limit: u64) -> u64 {
    let (least, most) = reserve_bounds(limit);
    (limit / 64).clamp(least, most)
}

/// What one batch makes free: enough for a system call to be worth its while, little enough not to be missed.
pub(crate) fn batch_bytes(limit: u64) -> u64 {
    (limit / 128).clamp(16 * PAGE as u64, 4 << 20)
}

/// What a look at the machine and the control group says about a pool, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// From how much on units are to be marked as reclaimable.
    pub(crate) firm: u64,
    /// How much memory there is.
    pub(crate) memory: u64,
}

/// Sets how much may be unmarked before fills wait.
///
/// The kernel must find enough to take back where the machine or the control group has less than the budget.
///
/// `floor` is what the pool has that cannot leave, as far as that is known: no cap is below it.
pub(crate) fn look_at_limits(pool: &PoolCore, memory: &Memory, floor: u64) -> Limits {
    if pool.guest && memory.limit < memory.machine {
        // Reclaim is the program's: what it would find of page cache, it must find of ours.
        let max = guest_firm_max(memory);
        set_firm_max(pool, max);
        return Limits {
            firm: max / 2,
            // (The cooling area is memory that the kernel cannot take back at all.)
            memory: 0,
        };
    }
    follow_group(pool, memory, floor);
    let limit = pool.budget.limit();
    // Fills beyond this wait for the marking to catch up. It can bind only where memory is short. With the slots (an eighth) and the
    // program's own, it is what must still fit after the group was halved between two looks.
    let max = if memory.limit / 2 < pool.budget.allowed() {
        memory.limit / 8 * 3
    } else {
        u64::MAX
    };
    set_firm_max(pool, max);
    Limits {
        firm: (limit / 2).min(memory.limit / 4),
        memory: memory.limit,
    }
}

fn set_firm_max(pool: &PoolCore, bytes: u64) {
    pool.firm_max.store(bytes, Ordering::Relaxed);
    if bytes < u64::MAX {
        // (What was left when more was allowed would count for ever, if no thread fills there any more.)
        pool.filled.gather();
    }
}

/// The part of a control group's memory that stays free of the budget and of the program's own, as a divisor: for what the kernel keeps for
/// its processes, and for what the program allocates before the next look.
const SPARE_SHARE: u64 = 16;
/// The least part that a pool gets, whatever else is in the group.
const LEAST_SHARE: u64 = 8;
/// What the cap moves by at least, as a divisor: with it, all that was made to its measure is made anew.
const STEP_SHARE: u64 = 32;
/// Units of the largest size that any cap has room for.
const UNITS_MIN: u64 = 8;

/// Caps the budget where its control group has no room for all of it, so that the pool evicts by its own judgement, and the kernel
/// need not take pages away.
fn follow_group(pool: &PoolCore, memory: &Memory, floor: u64) {
    let budget = &pool.budget;
    let room = match memory.anonymous {
        Some(anonymous) if memory.limit < memory.machine => {
            let others = anonymous.saturating_sub(budget.used());
            let room = memory
                .limit
                .saturating_sub(others + memory.limit / SPARE_SHARE);
            let unit = pool.largest_unit.load(Ordering::Relaxed);
            room.max(memory.limit / LEAST_SHARE)
                .max(unit * UNITS_MIN)
                .max(floor)
        }
        _ => u64::MAX,
    };
    let (cap, step) = (budget.cap(), memory.limit / STEP_SHARE);
    if room.saturating_add(step) >= budget.allowed() {
        if cap != u64::MAX {
            budget.set_cap(u64::MAX);
        }
    } else if room.abs_diff(cap) >= step {
        budget.set_cap(room);
    }
}

/// Bounds of what a guest keeps from the kernel in a control group with a limit.
const GUEST_FIRM: std::ops::Range<u64> = 1 << 20..64 << 20;

/// How much a guest may keep from the kernel: little, and less where the group's programs need nearly all that it has.
fn guest_firm_max(memory: &Memory) -> u64 {
    let anonymous = memory.anonymous.unwrap_or(0);
    let most = if anonymous > memory.limit / 4 * 3 {
        memory.limit.saturating_sub(anonymous) / 16
    } else {
        memory.limit / 64
    };
    most.clamp(GUEST_FIRM.start, GUEST_FIRM.end)
}

/// Advances the clock of the shadows by so many pages, and says what it shows. Never zero.
pub(crate) fn tick(pool: &PoolCore, pages: u32) -> u32 {
    let clock = pool
        .clock
        .load(Ordering::Relaxed)
        .wrapping_add(pages)
        .max(1);
    pool.clock.store(clock, Ordering::Relaxed);
    clock
}

/// Changes the budget of a pool. The evictor reaches a smaller one soon after.
pub(crate) fn set_budget(pool: &PoolCore, bytes: u64) {
    pool.reserve.store(reserve_of(bytes), Ordering::Relaxed);
    let reach = ghost_reach(bytes / PAGE as u64);
    pool.ghost_reach.store(reach, Ordering::Relaxed);
    pool.budget.set_limit(bytes);
    pool.blocks.trim(&pool.budget);
    pool.evict_bell.ring();
}
