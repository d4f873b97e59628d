//! From an address to the map that it lies in, without a lock, and safe against maps that are dropped meanwhile.
//!
//! Regions begin at multiples of 2 MiB, and no two maps have live addresses in the same 2 MiB granule, so a two-level table
//! indexed by address finds the *gate* of the region in two loads. Leaves and gates are never freed (gates are used again), so a reader needs no protection to
//! reach a gate. What is behind the gate, the [`MapCore`], is freed when its map is dropped; `gate.rs` says how.

#![allow(unsafe_code, reason = "dereferences what the gate protects")]

use crate::base::ids::{IDS_MAX, MapId, Nanos, Serial};
use crate::base::primitive::{AtomicPtr, AtomicU32, Mutex, MutexGuard, Ordering, lock};
use crate::base::{clock, process};
use crate::space::gate::USER_SHARDS;
use crate::space::map_core::MapCore;
use faultless_sys::{mem, raw, signal};
use std::ops::Range;

/// Bytes of address space that one entry of the table covers; regions are aligned to it.
pub(crate) const GRANULE: usize = 2 << 20;
const GRANULE_SHIFT: u32 = GRANULE.trailing_zeros();
/// 48 bits of address: all that `mmap` hands out unasked, on both architectures.
const LEAF_BITS: u32 = 13;
const LEAF: usize = 1 << LEAF_BITS;
const ROOT: usize = 1 << (48 - GRANULE_SHIFT - LEAF_BITS);

/// How often a dropper looks whether somebody is still inside.
const SHUT_NAP: Nanos = Nanos::from_micros(20);

/// Most maps that can live at once: more than `vm.max_map_count` lets a process map.
pub(crate) const MAPS_MAX: usize = 1 << 16;
const _: () = assert!(MAPS_MAX < IDS_MAX);
const GATES_PER_CHUNK: usize = 64;

#[repr(transparent)]
struct Leaf([AtomicU32; LEAF]);

/// The door to one map.
pub(crate) type Gate = super::gate::Gate<MapCore>;
/// Somebody who is inside a map's gate.
pub(crate) type Inside<'a> = super::gate::Inside<'a, MapCore>;

/// Goes in through a gate, counted with others on this processor.
pub(crate) fn enter(gate: &Gate) -> Option<Inside<'_>> {
    gate.enter(process::shard(USER_SHARDS))
}

/// Goes into the map with gate `id`, if it still is the one with this serial number.
pub(crate) fn enter_map(id: MapId, serial: Serial) -> Option<Inside<'static>> {
    gate(id)
        .and_then(enter)
        .filter(|core| core.serial == serial)
}

static TABLE: [AtomicPtr<Leaf>; ROOT] = [const { AtomicPtr::new(std::ptr::null_mut()) }; ROOT];
static GATES: [AtomicPtr<[Gate; GATES_PER_CHUNK]>; MAPS_MAX / GATES_PER_CHUNK] =
    [const { AtomicPtr::new(std::ptr::null_mut()) }; MAPS_MAX / GATES_PER_CHUNK];

struct Free {
    /// Gates made so far.
    made: usize,
    /// Gates whose map is gone.
    again: Vec<MapId>,
}

static FREE: Mutex<Free> = Mutex::new(Free {
    made: 0,
    again: Vec::new(),
});

/// The gate with number `id`.
pub(crate) fn gate(id: MapId) -> Option<&'static Gate> {
    let chunk = GATES
        .get(id.get() as usize / GATES_PER_CHUNK)?
        .load(Ordering::Acquire);
    // SAFETY: chunks are leaked when made, and never freed.
    (!chunk.is_null()).then(|| unsafe { &(&*chunk)[id.get() as usize % GATES_PER_CHUNK] })
}

/// Whether the map with gate `id` and this serial number may still be in use by somebody: it is open, or those inside
/// have not left yet.
pub(crate) fn may_be_in_use(id: MapId, serial: Serial) -> bool {
    let Some(gate) = gate(id) else { return false };
    match enter(gate) {
        // A gate is opened again only after all have left.
        Some(core) => core.serial == serial,
        None => !gate.vacant(),
    }
}

/// The map that an entry of the table names.
fn map_of(entry: u32) -> Option<MapId> {
    entry.checked_sub(1).map(MapId::new)
}

/// Finds the map that `addr` lies in.
pub(crate) fn find(addr: usize) -> Option<Inside<'static>> {
    let granule = addr >> GRANULE_SHIFT;
    let leaf = TABLE.get(granule >> LEAF_BITS)?.load(Ordering::Acquire);
    if leaf.is_null() {
        return None;
    }
    // SAFETY: leaves are leaked when made, and never freed.
    let entry = unsafe { &(&*leaf).0[granule & (LEAF - 1)] }.load(Ordering::Acquire);
    let inside = enter(gate(map_of(entry)?)?)?;
    // The gate may serve another map by now.
    inside.live.covers(addr, 1).then_some(inside)
}

/// Whether some map has a part of `range`. Takes no lock.
pub(crate) fn touches(range: &Range<usize>) -> bool {
    if range.is_empty() {
        return false;
    }
    let last = (range.end - 1) >> GRANULE_SHIFT;
    let mut granule = range.start >> GRANULE_SHIFT;
    while granule <= last {
        let Some(slot) = TABLE.get(granule >> LEAF_BITS) else {
            return false;
        };
        let leaf = slot.load(Ordering::Acquire);
        if leaf.is_null() {
            granule = ((granule >> LEAF_BITS) + 1) << LEAF_BITS;
            continue;
        }
        // SAFETY: leaves are never freed.
        let entry = unsafe { &(&*leaf).0[granule & (LEAF - 1)] }.load(Ordering::Acquire);
        let has_part = |core: Inside<'_>| core.live.get().touch(range);
        let Some(map) = map_of(entry) else {
            granule += 1;
            continue;
        };
        // A handler that does not return would leave the counter of those inside raised for ever.
        let _blocked = signal::Blocked::all();
        if gate(map).and_then(enter).is_some_and(has_part) {
            return true;
        }
        granule += 1;
    }
    false
}

/// Runs `f` on every open map that has a part of a range.
pub(crate) fn for_each_in(range: &Range<usize>, mut f: impl FnMut(&MapCore)) {
    for_each(|core| {
        if core.live.get().touch(range) {
            f(core);
        }
    });
}

/// Reserves the number of a gate for a map that will lie at `region`. `None` if there are too many maps.
pub(crate) fn reserve(region: &Range<usize>) -> std::io::Result<Option<MapId>> {
    make_leaves(region)?;
    if shares_a_granule(region) {
        return Err(std::io::ErrorKind::AddrInUse.into());
    }
    Ok(reserve_number())
}

fn reserve_number() -> Option<MapId> {
    let mut free = lock(&FREE);
    if let Some(id) = free.again.pop() {
        return Some(id);
    }
    let id = free.made;
    if id == MAPS_MAX {
        return None;
    }
    if id.is_multiple_of(GATES_PER_CHUNK) {
        let chunk: Box<[Gate; GATES_PER_CHUNK]> =
            Box::new(std::array::from_fn(|_| Gate::default()));
        GATES[id / GATES_PER_CHUNK].store(Box::into_raw(chunk), Ordering::Release);
    }
    free.made += 1;
    Some(MapId::new(id as u32))
}

/// Gives an unused reservation back.
pub(crate) fn unreserve(id: MapId) {
    lock(&FREE).again.push(id);
}

/// Makes leaves for a region, where there are none.
///
/// A forked child finds them empty (`MADV_WIPEONFORK`): it has no maps, and its handler learns so at no cost.
fn make_leaves(region: &Range<usize>) -> std::io::Result<()> {
    let first = region.start >> GRANULE_SHIFT >> LEAF_BITS;
    let last = (region.end - 1) >> GRANULE_SHIFT >> LEAF_BITS;
    for slot in &TABLE[first..=last] {
        if !slot.load(Ordering::Acquire).is_null() {
            continue;
        }
        let fresh = mem::map_anonymous(size_of::<Leaf>())?;
        // SAFETY: mapped just now, ours, zero either way.
        unsafe { mem::madvise(fresh, size_of::<Leaf>(), process::MADV_WIPEONFORK)? };
        let null = std::ptr::null_mut();
        if slot
            .compare_exchange(
                null,
                fresh as *mut Leaf,
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .is_err()
        {
            // SAFETY: never published.
            let _ = unsafe { mem::unmap(fresh, size_of::<Leaf>()) };
        }
    }
    Ok(())
}

/// Runs `f` on the entries of a region's granules, as far as there are leaves for them.
fn for_each_entry(region: &Range<usize>, mut f: impl FnMut(usize, &AtomicU32)) {
    for granule in region.start >> GRANULE_SHIFT..=(region.end - 1) >> GRANULE_SHIFT {
        let leaf = TABLE[granule >> LEAF_BITS].load(Ordering::Acquire);
        // SAFETY: leaves are never freed.
        if let Some(leaf) = unsafe { leaf.as_ref() } {
            f(granule, &leaf.0[granule & (LEAF - 1)]);
        }
    }
}

/// Whether an open map's region has, or had, a part of one of a region's granules.
fn shares_a_granule(region: &Range<usize>) -> bool {
    let mut shared = false;
    for_each_entry(region, |granule, entry| {
        let map = map_of(entry.load(Ordering::Acquire)).and_then(gate);
        // (One whose gate is being shut is in the way as well.)
        shared |= map.is_some_and(|gate| {
            enter(gate).is_none_or(|core| {
                // Also what the map has lost: a fill that is in flight there must not find another map's range.
                let (region, start) = (core.region(), granule << GRANULE_SHIFT);
                region.start < start + GRANULE && start < region.end
            })
        });
    });
    shared
}

/// Opens the gate that `core` reserved: from now on faults in its region are served. Takes ownership of the core.
pub(crate) fn open(core: Box<MapCore>) -> &'static MapCore {
    let core: &'static MapCore = Box::leak(core);
    if let Some(gate) = gate(core.id) {
        gate.open(core as *const MapCore as *mut MapCore);
    }
    for_each_entry(&core.region(), |_, entry| {
        entry.store(core.id.get() + 1, Ordering::Release)
    });
    core
}

/// Shuts the gate of `core`, waits until nobody is inside, and hands the core back.
///
/// # Safety
///
/// `core` must come from [`open`], be shut once only, and not be used again except through the returned box.
pub(crate) unsafe fn shut(core: &'static MapCore) -> Box<MapCore> {
    if let Some(gate) = gate(core.id) {
        gate.shut(|| clock::nap(SHUT_NAP));
    }
    // Only now: until nobody is inside, no other map may begin here.
    for_each_entry(&core.region(), |_, entry| {
        let ours = core.id.get() + 1;
        let _ = entry.compare_exchange(ours, 0, Ordering::AcqRel, Ordering::Relaxed);
    });
    // SAFETY: `open` leaked it from a box; nobody inside holds it any more, and the caller gives its reference up.
    unsafe { Box::from_raw(core as *const MapCore as *mut MapCore) }
}

/// The lock on gates, held across `fork`.
pub(crate) struct GatesLock {
    _free: MutexGuard<'static, Free>,
}

pub(crate) fn freeze() -> GatesLock {
    GatesLock { _free: lock(&FREE) }
}

/// Runs `f` on every open map. For the child of a fork, whose only thread is the caller: gates are not
/// entered, since counters of threads that do not exist here would never fall again.
pub(crate) fn for_each_after_fork(mut f: impl FnMut(&MapCore)) {
    for chunk in &GATES {
        let chunk = chunk.load(Ordering::Acquire);
        if chunk.is_null() {
            break;
        }
        // SAFETY: chunks are never freed.
        for gate in unsafe { &*chunk } {
            let core = gate.peek();
            // SAFETY: a core is freed only after it was taken from its gate, and this child has no other thread.
            if let Some(core) = unsafe { core.as_ref() } {
                f(core);
            }
        }
    }
}

/// Finds the map that a forked child's parent had at `addr`: for a message, so it may be slow.
pub(crate) fn find_parents(addr: usize) -> Option<Inside<'static>> {
    let chunks = GATES
        .iter()
        .map(|c| c.load(Ordering::Acquire))
        .take_while(|c| !c.is_null());
    // SAFETY: chunks are never freed.
    let mut maps = chunks.flat_map(|c| unsafe { &*c }).filter_map(enter);
    maps.find(|core| {
        core.pid != raw::getpid() && core.stands_for.is_none() && core.region().contains(&addr)
    })
}

/// Whether some thread is inside some gate.
#[cfg(faultless_sim)]
pub(crate) fn any_inside() -> bool {
    let chunks = GATES.iter().map(|c| c.load(Ordering::Acquire));
    let chunks = chunks.take_while(|c| !c.is_null());
    // SAFETY: chunks are never freed.
    let mut gates = chunks.flat_map(|c| unsafe { &*c });
    gates.any(|gate| gate.crowded())
}

/// Runs `f` on every open map.
pub(crate) fn for_each(mut f: impl FnMut(&MapCore)) {
    // A handler that does not return would leave the counter of those inside raised for ever.
    let _blocked = signal::Blocked::all();
    for chunk in &GATES {
        let chunk = chunk.load(Ordering::Acquire);
        if chunk.is_null() {
            break;
        }
        // SAFETY: chunks are never freed.
        for gate in unsafe { &*chunk } {
            if let Some(core) = enter(gate) {
                f(&core);
            }
        }
    }
}
