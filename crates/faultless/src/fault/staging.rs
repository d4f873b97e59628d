//! Buffers into which pages are read before they are installed.
//!
//! The memory is present before it is used (a system call that reads into an absent page would take `mmap_lock`), is
//! used last-in-first-out, so that few buffers stay warm in the processor's caches, and is bounded: who finds none
//! waits until one is given back. Lock-free, and never allocates memory from the heap: the fault path calls this.

#![allow(unsafe_code, reason = "hands out raw buffers, touches fresh pages")]

use super::area::Area;
use super::budget::Budget;
use super::process;
use faultless_sys::futex;
use faultless_sys::mem::PAGE;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Largest buffer, in bytes: larger fills are done in pieces.
pub(crate) const CHUNK_MAX: usize = 256 * 1024;
/// Sizes are 4 KiB shifted left by 0 to 6.
const CLASSES: usize = 7;
const _: () = assert!(PAGE << (CLASSES - 1) == CHUNK_MAX);

/// A stack of page numbers, linked through `next`. The upper half of a head is a tag that changes with every pop, so
/// that a head seen twice is the same head (the ABA problem).
#[derive(Debug, Default)]
struct Stack(AtomicU64);

/// Processors that have a warm buffer of their own; with more, some share.
const WARM: usize = 64;

#[derive(Debug, Default)]
#[repr(align(64))]
struct Warm(AtomicU32);

/// The pool of buffers.
#[derive(Debug)]
pub(crate) struct Staging {
    arena: Area,
    /// Link of each page that starts a free buffer (page number + 1; 0 ends the list).
    next: Area,
    free: [Stack; CLASSES],
    /// A free smallest buffer for each processor (page number + 1), the one that it used last.
    warm: [Warm; WARM],
    /// Bytes of the arena handed out for the first time so far.
    carved: AtomicUsize,
    /// Bumped when a buffer comes back while somebody waits.
    returned: AtomicU32,
    waiting: AtomicU32,
}

/// A buffer on loan. Give it back with [`Staging::give`].
#[derive(Debug)]
pub(crate) struct Buffer {
    addr: usize,
    class: usize,
}

impl Buffer {
    /// First address; page-aligned.
    pub(crate) fn addr(&self) -> usize {
        self.addr
    }
    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        PAGE << self.class
    }
}

impl Staging {
    /// An arena of at most `bytes` (at least one largest buffer).
    pub(crate) fn new(bytes: usize) -> std::io::Result<Self> {
        let bytes = bytes.max(CHUNK_MAX).next_multiple_of(CHUNK_MAX);
        Ok(Staging {
            arena: Area::new(bytes)?,
            next: Area::new(bytes / PAGE * 4)?,
            free: Default::default(),
            warm: std::array::from_fn(|_| Warm::default()),
            carved: AtomicUsize::new(0),
            returned: AtomicU32::new(0),
            waiting: AtomicU32::new(0),
        })
    }

    fn link(&self, page: u32) -> &AtomicU32 {
        // SAFETY: `next` has one zero-initialised u32 for each page of the arena.
        unsafe { &*self.next.at::<AtomicU32>(page as usize) }
    }

    fn pop(&self, class: usize) -> Option<u32> {
        let head = &self.free[class].0;
        let mut now = head.load(Ordering::Acquire);
        loop {
            let page = (now as u32).checked_sub(1)?;
            let below = self.link(page).load(Ordering::Relaxed);
            let tag = (now >> 32).wrapping_add(1) << 32;
            match head.compare_exchange_weak(
                now,
                tag | u64::from(below),
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => return Some(page),
                Err(other) => now = other,
            }
        }
    }

    fn push(&self, class: usize, page: u32) {
        let head = &self.free[class].0;
        let mut now = head.load(Ordering::Relaxed);
        loop {
            self.link(page).store(now as u32, Ordering::Relaxed);
            let to = (now & !u64::from(u32::MAX)) | u64::from(page + 1);
            match head.compare_exchange_weak(now, to, Ordering::Release, Ordering::Relaxed) {
                Ok(_) => return,
                Err(other) => now = other,
            }
        }
    }

    /// Cuts a fresh buffer off the arena and makes its pages present.
    fn carve(&self, class: usize, budget: &Budget) -> Option<u32> {
        let bytes = PAGE << class;
        // The smallest buffers are charged without asking: a miss must have one, and together they are a small share of
        // the budget. Who wants a larger one can do with a smaller.
        if class > 0 && !budget.try_charge(bytes as u64) {
            return None;
        }
        let at = self
            .carved
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |c| {
                (c + bytes <= self.arena.len()).then_some(c + bytes)
            });
        let Ok(at) = at else {
            if class > 0 {
                budget.release(bytes as u64);
            }
            return None;
        };
        if class == 0 {
            budget.charge_anyway(bytes as u64);
        }
        for page in (at..at + bytes).step_by(PAGE) {
            // SAFETY: inside the arena, and nobody else's: `carved` was advanced past it by us.
            unsafe { core::ptr::write_volatile((self.arena.start() + page) as *mut u8, 0) };
        }
        Some((at / PAGE) as u32)
    }

    /// A buffer of `bytes` if there is one, else of any size: callers read in pieces of [`Buffer::len`]. Waits if all
    /// are on loan.
    pub(crate) fn take(&self, bytes: usize, budget: &Budget) -> Buffer {
        let want = (bytes.clamp(PAGE, CHUNK_MAX) / PAGE)
            .next_power_of_two()
            .trailing_zeros() as usize;
        if want == 0 {
            let page = self.warm[process::shard(WARM)].0.swap(0, Ordering::Acquire);
            if let Some(page) = page.checked_sub(1) {
                return Buffer {
                    addr: self.arena.start() + page as usize * PAGE,
                    class: 0,
                };
            }
        }
        loop {
            let ticket = self.returned.load(Ordering::Acquire);
            let exact = self.pop(want).map(|p| (p, want));
            let found = exact
                .or_else(|| self.carve(want, budget).map(|p| (p, want)))
                .or_else(|| {
                    (want + 1..CLASSES)
                        .chain((0..want).rev())
                        .find_map(|c| Some((self.pop(c)?, c)))
                })
                .or_else(|| {
                    (0..want)
                        .rev()
                        .find_map(|c| Some((self.carve(c, budget)?, c)))
                });
            if let Some((page, class)) = found {
                return Buffer {
                    addr: self.arena.start() + page as usize * PAGE,
                    class,
                };
            }
            self.waiting.fetch_add(1, Ordering::SeqCst);
            // Look again now that givers can see us; then sleep, at most for a moment.
            // Warm buffers of other processors are not looked at before the others are gone.
            for warm in &self.warm {
                if let Some(page) = warm.0.swap(0, Ordering::SeqCst).checked_sub(1) {
                    self.push(0, page);
                }
            }
            if (0..CLASSES).all(|c| self.free[c].0.load(Ordering::SeqCst) as u32 == 0) {
                futex::wait(&self.returned, ticket, 10_000_000);
            }
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Gives a buffer back.
    pub(crate) fn give(&self, buffer: Buffer) {
        let mut page = ((buffer.addr - self.arena.start()) / PAGE) as u32;
        if buffer.class == 0 {
            // The one that was warm here goes to the stack; with none, there is nothing more to do.
            let before = self.warm[process::shard(WARM)]
                .0
                .swap(page + 1, Ordering::SeqCst);
            page = before.wrapping_sub(1);
        }
        if page != u32::MAX {
            self.push(buffer.class, page);
        }
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.returned.fetch_add(1, Ordering::SeqCst);
            futex::wake(&self.returned, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_never_overlap_while_on_loan() {
        let staging = Staging::new(CHUNK_MAX).expect("memory");
        let budget = Budget::new(1 << 30);
        std::thread::scope(|s| {
            for me in 1..=4u8 {
                let (staging, budget) = (&staging, &budget);
                s.spawn(move || {
                    for round in 0..2_000usize {
                        let b = staging.take(PAGE << (round % 5), budget);
                        // SAFETY: on loan to us alone.
                        let bytes = unsafe {
                            core::slice::from_raw_parts_mut(b.addr() as *mut u8, b.len())
                        };
                        bytes.fill(me);
                        assert!(bytes.iter().all(|&x| x == me));
                        staging.give(b);
                    }
                });
            }
        });
        assert!(
            budget.used() <= CHUNK_MAX as u64,
            "never more than the arena"
        );
    }

    #[test]
    fn a_large_wish_is_met_in_pieces_when_the_arena_is_cut_small() {
        let staging = Staging::new(CHUNK_MAX).expect("memory");
        let budget = Budget::new(1 << 30);
        let small: Vec<_> = (0..CHUNK_MAX / PAGE)
            .map(|_| staging.take(PAGE, &budget))
            .collect();
        small.into_iter().for_each(|b| staging.give(b));
        assert_eq!(staging.take(CHUNK_MAX, &budget).len(), PAGE);
    }
}
