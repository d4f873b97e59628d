//! Buffers into which pages are read before they are installed.
//!
//! The memory is present before it is used (a system call that reads into an absent page would take `mmap_lock`), is
//! used last-in-first-out, so that few buffers stay warm in the processor's caches, and is bounded: who finds none
//! waits until one is given back. Lock-free, and never allocates memory from the heap: the fault path calls this.
//!
//! The largest buffers lie in huge pages, where the budget is not too small for them: a device that is handed 64 scattered
//! pages reads at half the speed at which it fills one piece of memory.

#![allow(unsafe_code, reason = "hands out raw buffers, touches fresh pages")]

use crate::base::area::{Area, HUGE};
use crate::base::array::Array;
use crate::base::futex::{Futex, Wake};
use crate::base::ids::{Addr, Nanos};
use crate::base::primitive::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use crate::base::process;
use crate::sync::budget::Budget;
use faultless_sys::mem::PAGE;

/// Largest buffer, in bytes: larger fills are done in pieces.
pub(crate) const CHUNK_MAX: usize = PAGE << (CLASSES - 1);
/// Most memory for largest buffers in huge pages.
const LARGE_MAX: usize = 8 << 20;
/// Sizes are 4 KiB shifted left by 0 to 6: up to 256 KiB. (A model has buffers of one page, and few.)
const CLASSES: usize = if cfg!(loom) { 1 } else { 7 };

/// A stack of page numbers, linked through `next`. The upper half of a head is a tag that changes with every pop, so
/// that a head seen twice is the same head (the ABA problem).
#[derive(Debug, Default)]
struct Stack(AtomicU64);

/// Processors that have a warm buffer of their own; with more, some share.
#[cfg(not(loom))]
const WARM: usize = 64;
#[cfg(loom)]
const WARM: usize = 2;

#[derive(Debug, Default)]
#[repr(align(64))]
struct Warm(AtomicU32);

/// The pool of buffers.
#[derive(Debug)]
pub(crate) struct Staging {
    arena: Area,
    /// Memory of the largest buffers; its first address, and its length, 0 if there is none.
    large: Option<Area>,
    large_start: usize,
    large_len: usize,
    /// Bytes of it cut off so far.
    large_carved: AtomicUsize,
    /// Link of each page that starts a free buffer (page number + 1; 0 ends the list).
    next: Array<AtomicU32>,
    free: [Stack; CLASSES],
    /// A free smallest buffer for each processor (page number + 1), the one that it used last.
    warm: [Warm; WARM],
    /// Bytes of the arena handed out for the first time so far.
    carved: AtomicUsize,
    /// Bytes of buffers that are lent to threads which have several.
    lent: AtomicUsize,
    /// Bumped when a buffer comes back while somebody waits.
    returned: Futex,
    waiting: AtomicU32,
}

/// A buffer on loan. Give it back with [`Staging::give`].
#[derive(Debug)]
pub(crate) struct Buffer {
    addr: Addr,
    class: usize,
}

impl Buffer {
    /// First address; page-aligned.
    pub(crate) fn addr(&self) -> Addr {
        self.addr
    }
    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        PAGE << self.class
    }
    /// Whether a thread that asks for `bytes` is given one of this size.
    #[cfg(not(loom))]
    pub(crate) fn is_for(&self, bytes: usize) -> bool {
        self.class == class_of(bytes)
    }
}

/// The smallest class whose buffers have `bytes`; the largest, if none has.
fn class_of(bytes: usize) -> usize {
    let pages = bytes.clamp(PAGE, CHUNK_MAX).div_ceil(PAGE);
    pages.next_power_of_two().trailing_zeros() as usize
}

impl Staging {
    /// Buffers of at most `bytes` together (at least one largest buffer).
    pub(crate) fn new(bytes: usize) -> std::io::Result<Self> {
        let bytes = bytes.max(CHUNK_MAX).next_multiple_of(CHUNK_MAX);
        let large_len = (bytes / 2 / HUGE * HUGE).min(LARGE_MAX);
        let (large, large_start) = match large_len {
            0 => (None, 0),
            len => {
                let (area, start) = Area::huge(len)?;
                (Some(area), start)
            }
        };
        Ok(Staging {
            arena: Area::new(bytes - large_len)?,
            large,
            large_start,
            large_len,
            large_carved: AtomicUsize::new(0),
            next: Array::new(bytes / PAGE)?,
            free: Default::default(),
            warm: std::array::from_fn(|_| Warm::default()),
            carved: AtomicUsize::new(0),
            lent: AtomicUsize::new(0),
            returned: Futex::default(),
            waiting: AtomicU32::new(0),
        })
    }

    /// Pages are numbered through both parts.
    fn addr(&self, page: u32) -> Addr {
        let at = page as usize * PAGE;
        Addr::new(match at.checked_sub(self.arena.len()) {
            None => self.arena.start() + at,
            Some(at) => self.large_start + at,
        })
    }

    fn page(&self, addr: usize) -> u32 {
        let at = match addr.checked_sub(self.large_start) {
            Some(at) if at < self.large_len => at + self.arena.len(),
            _ => addr - self.arena.start(),
        };
        (at / PAGE) as u32
    }

    fn link(&self, page: u32) -> &AtomicU32 {
        self.next.at(page as usize)
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
        if bytes == CHUNK_MAX && self.large_len > 0 {
            return self.carve_large(budget);
        }
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

    /// Cuts a huge page into largest buffers: one for the caller, the others for the stack.
    fn carve_large(&self, budget: &Budget) -> Option<u32> {
        if !budget.try_charge(HUGE as u64) {
            return None;
        }
        let cut = self
            .large_carved
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |c| {
                (c + HUGE <= self.large_len).then_some(c + HUGE)
            });
        let Ok(at) = cut else {
            budget.release(HUGE as u64);
            return None;
        };
        for page in (at..at + HUGE).step_by(PAGE) {
            // SAFETY: inside the part, and nobody else's: `large_carved` was advanced past it by us.
            unsafe { core::ptr::write_volatile((self.large_start + page) as *mut u8, 0) };
        }
        let first = self.page(self.large_start + at);
        let step = (CHUNK_MAX / PAGE) as u32;
        for n in 1..(HUGE / CHUNK_MAX) as u32 {
            self.push(CLASSES - 1, first + n * step);
        }
        Some(first)
    }

    /// Bytes that have been charged for buffers so far.
    pub(crate) fn charged_bytes(&self) -> u64 {
        let carved = self.carved.load(Ordering::Relaxed);
        (carved + self.large_carved.load(Ordering::Relaxed)) as u64
    }

    /// A buffer of `bytes` if there is one, else of any size: callers read in pieces of [`Buffer::len`]. Waits if all
    /// are on loan.
    pub(crate) fn take(&self, bytes: usize, budget: &Budget) -> Buffer {
        let want = class_of(bytes);
        if want == 0 {
            let page = self.warm[process::shard(WARM)].0.swap(0, Ordering::Acquire);
            if let Some(page) = page.checked_sub(1) {
                return self.buffer(page, want);
            }
        }
        loop {
            let ticket = self.returned.ticket();
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
                return self.buffer(page, class);
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
                self.returned.wait(ticket, Nanos::from_millis(10));
            }
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// A buffer of `bytes`, if there is one of that size. Never waits, so that a thread may have several. All such buffers together are
    /// half of what there is at most: misses are to find some, whose storage may be another, and faster.
    pub(crate) fn try_take(&self, bytes: usize, budget: &Budget) -> Option<Buffer> {
        let class = class_of(bytes);
        // (Of the large ones, only those that there are by now: there may be no room for more.)
        let large = self.large_carved.load(Ordering::Relaxed);
        let most = (self.arena.len() + large) / 2;
        let more = |lent: usize| Some(lent + (PAGE << class)).filter(|&lent| lent <= most);
        let lent = &self.lent;
        lent.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .ok()?;
        let buffer = self.try_pop(class, budget);
        if buffer.is_none() {
            self.lent.fetch_sub(PAGE << class, Ordering::Relaxed);
        }
        buffer
    }

    /// The kernel may yet write to buffers that are never given back: all of the memory stays mapped for ever.
    #[cfg(not(loom))]
    pub(crate) fn keep_for_ever(&self) {
        self.arena.keep_for_ever();
        self.large.iter().for_each(Area::keep_for_ever);
    }

    /// Gives a buffer back that [`try_take`](Self::try_take) has lent.
    pub(crate) fn give_lent(&self, buffer: Buffer) {
        self.lent.fetch_sub(buffer.len(), Ordering::Relaxed);
        self.give(buffer);
    }

    fn try_pop(&self, class: usize, budget: &Budget) -> Option<Buffer> {
        if class == 0 {
            let page = self.warm[process::shard(WARM)].0.swap(0, Ordering::Acquire);
            if let Some(page) = page.checked_sub(1) {
                return Some(self.buffer(page, class));
            }
        }
        let page = self.pop(class).or_else(|| self.carve(class, budget))?;
        Some(self.buffer(page, class))
    }

    fn buffer(&self, page: u32, class: usize) -> Buffer {
        Buffer {
            addr: self.addr(page),
            class,
        }
    }

    /// Gives a buffer back.
    pub(crate) fn give(&self, buffer: Buffer) {
        let mut page = self.page(buffer.addr.get());
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
            self.returned.bump(Wake::One);
        }
    }
}

#[cfg(all(test, not(loom)))]
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
                            core::slice::from_raw_parts_mut(b.addr().get() as *mut u8, b.len())
                        };
                        bytes.fill(me);
                        assert!(bytes.iter().all(|&x| x == me));
                        staging.give(b);
                    }
                });
            }
        });
        assert!(
            budget.charged() <= CHUNK_MAX as u64,
            "never more than the arena"
        );
    }

    #[test]
    fn the_largest_buffers_lie_in_huge_pages_and_are_charged_by_them() {
        let staging = Staging::new(16 << 20).expect("memory");
        let budget = Budget::new(1 << 30);
        let all: Vec<_> = (0..8).map(|_| staging.take(CHUNK_MAX, &budget)).collect();
        assert_eq!(budget.charged(), HUGE as u64);
        assert!(
            all.iter()
                .all(|b| b.addr().get() / HUGE == all[0].addr().get() / HUGE)
        );
        let small = staging.take(PAGE, &budget);
        assert_ne!(small.addr().get() / HUGE, all[0].addr().get() / HUGE);
        for b in all.into_iter().chain([small]) {
            assert_eq!(staging.addr(staging.page(b.addr().get())), b.addr());
            staging.give(b);
        }
        staging.take(CHUNK_MAX, &budget);
        assert_eq!(budget.charged(), (HUGE + PAGE) as u64);
        // Without room for a huge page, smaller ones do.
        let tight = Budget::new(1 << 20);
        let staging = Staging::new(16 << 20).expect("memory");
        assert!(staging.take(CHUNK_MAX, &tight).len() < CHUNK_MAX);
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

/// Time never runs out in the models: a thread that a giver forgets sleeps for ever.
#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    struct Shared {
        staging: Staging,
        budget: Budget,
        /// What lies in each buffer. loom tells if two threads have it, or if one does not see what the other left.
        bytes: Vec<UnsafeCell<u32>>,
    }

    impl Shared {
        fn new(buffers: usize) -> Arc<Self> {
            Arc::new(Shared {
                staging: Staging::new(buffers * PAGE).expect("memory"),
                budget: Budget::new(1 << 30),
                bytes: (0..buffers).map(|_| UnsafeCell::new(0)).collect(),
            })
        }

        fn take(&self, processor: usize) -> Buffer {
            process::PROCESSOR.with(|p| p.set(processor));
            let buffer = self.staging.take(PAGE, &self.budget);
            self.write(&buffer);
            buffer
        }

        fn write(&self, buffer: &Buffer) {
            let page = self.staging.page(buffer.addr().get()) as usize;
            // SAFETY: the buffer is on loan to this thread; loom checks that.
            self.bytes[page].with_mut(|b| unsafe { *b += 1 });
        }

        fn give(&self, buffer: Buffer) {
            self.write(&buffer);
            self.staging.give(buffer);
        }

        /// Takes so many buffers as a thread on this processor, and gives them back.
        fn use_some(&self, processor: usize, buffers: usize) {
            let taken: Vec<_> = (0..buffers).map(|_| self.take(processor)).collect();
            taken.into_iter().for_each(|buffer| self.give(buffer));
        }
    }

    /// Threads, each of which uses a buffer as often as its list says, on the processor in the list.
    fn run(buffers: usize, processors: Vec<Vec<usize>>) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(move || {
            let shared = Shared::new(buffers);
            let threads: Vec<_> = processors
                .iter()
                .cloned()
                .map(|turns| {
                    let shared = shared.clone();
                    thread::spawn(move || turns.iter().for_each(|&p| shared.use_some(p, 1)))
                })
                .collect();
            for t in threads {
                t.join().unwrap();
            }
            assert_eq!(shared.budget.charged(), shared.staging.charged_bytes());
        });
    }

    #[test]
    fn one_buffer_goes_round_on_one_processor() {
        run(1, vec![vec![0, 0], vec![0, 0]]);
    }

    #[test]
    fn one_buffer_goes_round_between_processors() {
        run(1, vec![vec![0, 0], vec![1, 1]]);
    }

    #[test]
    fn two_buffers_serve_three_threads() {
        run(2, vec![vec![0], vec![1], vec![0]]);
    }

    /// A buffer that is back on top of the stack is not taken for the one that was seen there, beneath which lay another.
    #[test]
    fn a_buffer_that_returns_to_the_stack_is_not_taken_for_what_it_was() {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(|| {
            let shared = Shared::new(5);
            // One is warm on processor 1 now, and four are on the stack.
            shared.use_some(1, 5);
            let other = {
                let shared = shared.clone();
                thread::spawn(move || shared.use_some(0, 2))
            };
            let [warm, first, second] = [(); 3].map(|()| shared.take(1));
            // The first goes back onto the stack as the warm one takes its place, and the second stays out.
            shared.give(first);
            shared.give(warm);
            shared.give(second);
            other.join().unwrap();
        });
    }
}
