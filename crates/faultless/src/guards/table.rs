//! From an address to the live mapping that it lies in, without a lock, and safe against mappings that end meanwhile.
//!
//! A mapping has one of a fixed number of slots. A slot that was left is used again when no thread is inside its gate any more.

#![allow(unsafe_code, reason = "frees what a gate has protected")]

use crate::base::primitive::{AtomicUsize, Mutex, MutexGuard, Ordering, lock};
use crate::base::process;
use crate::guards::mapping::LiveMapping;
use crate::space::gate::{self, USER_SHARDS};
use faultless_sys::signal;
use std::ops::Range;

/// Most live mappings at the same time. (All of them are looked at to find one.)
pub(crate) const MOST: usize = 1024;

type Gate = gate::Gate<LiveMapping>;
pub(crate) type Inside = gate::Inside<'static, LiveMapping>;

struct Slot {
    /// Where its mapping lies, as a hint; an end of 0: nowhere.
    start: AtomicUsize,
    end: AtomicUsize,
    gate: Gate,
}

impl Slot {
    const fn new() -> Self {
        Slot {
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            gate: Gate::new(),
        }
    }

    fn has_part_of(&self, range: &Range<usize>) -> bool {
        self.start.load(Ordering::SeqCst) < range.end
            && range.start < self.end.load(Ordering::SeqCst)
    }

    fn enter(&'static self) -> Option<Inside> {
        self.gate.enter(process::shard(USER_SHARDS))
    }
}

static SLOTS: [Slot; MOST] = [const { Slot::new() }; MOST];
/// From the lowest address of a writable mapping to the end of the highest one; an end of 0: there is none.
static WRITABLE: [AtomicUsize; 2] = [AtomicUsize::new(usize::MAX), AtomicUsize::new(0)];
/// Slots from this number on were never used.
static USED: AtomicUsize = AtomicUsize::new(0);

/// Which slots are in use, and what was taken out of the others and may still be looked at by threads inside.
#[derive(Debug)]
pub(crate) struct Slots {
    taken: [bool; MOST],
    leaving: Vec<(usize, Leaving)>,
}

/// A mapping that was taken out of its slot.
#[derive(Debug)]
struct Leaving(*mut LiveMapping);
// SAFETY: the pointer of a box, which belongs to the thread that has the lock on the slots.
unsafe impl Send for Leaving {}

static STATE: Mutex<Slots> = Mutex::new(Slots {
    taken: [false; MOST],
    leaving: Vec::new(),
});

/// The lock on the slots, held across `fork`.
pub(crate) fn freeze() -> MutexGuard<'static, Slots> {
    lock(&STATE)
}

fn used() -> &'static [Slot] {
    &SLOTS[..USED.load(Ordering::SeqCst).min(MOST)]
}

/// Whether there has been no live mapping in this process as yet.
pub(crate) fn is_unused() -> bool {
    USED.load(Ordering::SeqCst) == 0
}

/// Whether there is a live mapping that is writable.
#[inline]
pub(crate) fn any_writable() -> bool {
    WRITABLE[1].load(Ordering::Relaxed) != 0
}

/// Whether a writable live mapping may have a part of a range. Two loads.
#[inline]
pub(crate) fn may_be_writable(range: &Range<usize>) -> bool {
    range.start < WRITABLE[1].load(Ordering::Relaxed)
        && WRITABLE[0].load(Ordering::Relaxed) < range.end
}

/// Works out where the writable ones lie. The caller has the lock.
fn tell_where_writable() {
    let (mut start, mut end) = (usize::MAX, 0);
    for slot in used() {
        // SAFETY: what lies behind a gate is freed after it was taken from there, under the lock.
        if let Some(live) = unsafe { slot.gate.peek().as_ref() }
            && live.is_writable()
        {
            // (All that it began with: what was trimmed is given away, and does no harm here.)
            start = start.min(live.first);
            end = end.max(live.first + live.bytes);
        }
    }
    WRITABLE[0].store(start, Ordering::SeqCst);
    WRITABLE[1].store(end, Ordering::SeqCst);
}

/// Finds the mapping that `addr` lies in.
pub(crate) fn find(addr: usize) -> Option<Inside> {
    let byte = addr..addr.saturating_add(1);
    let mut near = used().iter().filter(|slot| slot.has_part_of(&byte));
    near.find_map(|slot| slot.enter().filter(|live| live.covers(addr)))
}

/// Whether a live mapping has a part of a range.
pub(crate) fn touches(range: &Range<usize>) -> bool {
    let mut near = used().iter().filter(|slot| slot.has_part_of(range));
    near.next().is_some()
}

/// The first address of a range that a live mapping has.
pub(crate) fn next_part(range: Range<usize>) -> Option<usize> {
    let near = used().iter().filter(|slot| slot.has_part_of(&range));
    near.map(|slot| slot.start.load(Ordering::SeqCst).max(range.start))
        .min()
}

/// Runs `f` on all of them, one after the other, with the signals of the thread blocked.
pub(crate) fn for_each(mut f: impl FnMut(&LiveMapping)) {
    for slot in used() {
        // A handler that does not return would leave the counter of those inside raised for ever.
        let _blocked = signal::Blocked::all();
        if let Some(live) = slot.enter() {
            f(&live);
        }
    }
}

/// Puts a mapping into a slot: from now on touches of its markers are served. `None` if there is no slot.
pub(crate) fn insert(live: LiveMapping) -> Option<&'static LiveMapping> {
    let _no_handler_here = signal::Blocked::all();
    let mut state = lock(&STATE);
    free_left(&mut state);
    let number = state.taken.iter().position(|taken| !taken)?;
    state.taken[number] = true;
    let range = live.range();
    let live = Box::into_raw(Box::new(live));
    let slot = &SLOTS[number];
    slot.gate.open(live);
    slot.start.store(range.start, Ordering::SeqCst);
    slot.end.store(range.end, Ordering::SeqCst);
    USED.fetch_max(number + 1, Ordering::SeqCst);
    tell_where_writable();
    // SAFETY: it is freed after `remove`, which consumes this reference.
    Some(unsafe { &*live })
}

/// The number of a mapping's slot. The caller has the lock.
fn number_of(live: &LiveMapping) -> Option<usize> {
    let is_its = |slot: &Slot| std::ptr::eq(slot.gate.peek(), live);
    used().iter().position(is_its)
}

/// Says that a mapping has lost a part.
pub(crate) fn trimmed(live: &LiveMapping) {
    let _no_handler_here = signal::Blocked::all();
    let _nothing_is_removed = lock(&STATE);
    if let Some(number) = number_of(live) {
        let (slot, range) = (&SLOTS[number], live.range());
        slot.start.store(range.start, Ordering::SeqCst);
        slot.end.store(range.end, Ordering::SeqCst);
    }
}

/// Takes a mapping out of its slot. Threads that are inside go on with it.
///
/// # Safety
///
/// `live` comes from [`insert`], and is not used any more.
pub(crate) unsafe fn remove(live: &'static LiveMapping) {
    let _no_handler_here = signal::Blocked::all();
    let mut state = lock(&STATE);
    let Some(number) = number_of(live) else {
        return;
    };
    SLOTS[number].end.store(0, Ordering::SeqCst);
    let taken = SLOTS[number].gate.take();
    tell_where_writable();
    state.leaving.push((number, Leaving(taken)));
    free_left(&mut state);
}

/// Frees the mappings that no thread is inside of any more.
pub(crate) fn free() {
    let _no_handler_here = signal::Blocked::all();
    free_left(&mut lock(&STATE));
}

fn free_left(state: &mut Slots) {
    let Slots { taken, leaving } = state;
    leaving.retain(|(number, leaving)| {
        let vacant = SLOTS[*number].gate.vacant();
        if vacant {
            // SAFETY: from `Box::into_raw` in `insert`; it was taken out of the gate, and nobody is inside.
            drop(unsafe { Box::from_raw(leaving.0) });
            taken[*number] = false;
        }
        !vacant
    });
}

/// In the child of a fork, whose only thread is the caller: runs `f` on all of them.
pub(crate) fn for_each_after_fork(f: impl Fn(&LiveMapping)) {
    for slot in used() {
        // SAFETY: what lies behind a gate is freed after it was taken from there, and the child has no other thread.
        if let Some(live) = unsafe { slot.gate.peek().as_ref() } {
            f(live);
        }
    }
}

/// In the child of a fork, whose only thread is the caller: runs `f` on all of them, and forgets them.
pub(crate) fn forget(mut state: MutexGuard<'static, Slots>, mut f: impl FnMut(&LiveMapping)) {
    for slot in used() {
        slot.end.store(0, Ordering::SeqCst);
        // SAFETY: what lies behind a gate is freed after it was taken from there, and the child has no other thread.
        if let Some(live) = unsafe { slot.gate.take().as_ref() } {
            f(live);
        }
        slot.gate.forget_users();
    }
    USED.store(0, Ordering::SeqCst);
    tell_where_writable();
    std::mem::forget(std::mem::take(&mut state.leaving));
    state.taken = [false; MOST];
}
