//! Installing markers, and putting them back on pages that the kernel has reclaimed.
//!
//! Both are done in steps of a chunk, off the fault path. A page that comes into memory between the look and the step loses its entry in the
//! page table, and nothing else: only mappings of which no page can hold anything but the file's bytes come here. Those are shared ones that
//! are not writable, and others of which the program has not learnt as yet.

#![allow(unsafe_code, reason = "installs markers by address")]

use crate::base::primitive::{AtomicUsize, Ordering};
use crate::guards::mapping::{CHUNK, LiveMapping, Markers};
use crate::guards::{maps, table};
use faultless_sys::Errno;
use faultless_sys::file::{self, CacheState};
use faultless_sys::mem::{self, PAGE};
use std::ops::Range;

/// A round has so many parts.
pub(crate) const PARTS: usize = 4;

/// The most that one part of a round does, in chunks: looks at the page cache, first markers, and markers put back.
#[derive(Debug, Clone, Copy)]
struct Budget {
    looks: usize,
    first: usize,
    put_back: usize,
}

impl Budget {
    const PART: Budget = Budget {
        looks: 256,
        first: 16,
        put_back: 16,
    };

    /// The part of it that each of some mappings gets, so that all of them come to their turn.
    fn share(self, of: usize) -> Budget {
        let part = |all: usize| (all / of.max(1)).max(1);
        Budget {
            looks: part(self.looks),
            first: part(self.first),
            put_back: part(self.put_back),
        }
    }

    /// Less what was spent of a share of which `left` is left.
    fn less(self, share: Budget, left: Budget) -> Budget {
        Budget {
            looks: self.looks.saturating_sub(share.looks - left.looks),
            first: self.first.saturating_sub(share.first - left.first),
            put_back: self.put_back.saturating_sub(share.put_back - left.put_back),
        }
    }

    fn is_spent(self) -> bool {
        self.looks == 0 || self.first == 0 || self.put_back == 0
    }
}

/// Takes one from a budget, if it has one.
fn spend(left: &mut usize) -> bool {
    let some = *left > 0;
    *left -= usize::from(some);
    some
}

/// Installs the first markers of a new mapping: of `bytes` of it, or of all if it may get none later.
///
/// # Errors
///
/// The kernel's: the mapping is one that can have no markers.
pub(crate) fn install(live: &LiveMapping, bytes: usize) -> Result<(), Errno> {
    let _permission = live.first();
    let Some(fd) = live.file.number() else {
        return Err(Errno(libc::EBADF));
    };
    let chunks = match live.may_get_more() {
        true => live.chunks().min(bytes.div_ceil(CHUNK)),
        false => live.chunks(),
    };
    (0..chunks).try_for_each(|number| {
        let state = state_of(live, fd, &live.chunk(number));
        guard(live, number, state).map(drop)
    })
}

/// One part of a round of the work on all live mappings, on a thread of the keeper's. Returns whether there is more to do immediately.
///
/// It takes no lock that a thread which forks holds: such a thread may wait for the keeper.
pub(crate) fn part_of_round() -> bool {
    maps::with_maps(look_at_all).unwrap_or(false)
}

/// The number of the mapping at which the next part begins.
static NEXT: AtomicUsize = AtomicUsize::new(0);

fn look_at_all(maps: i32) -> bool {
    let mut mappings = 0;
    table::for_each(|live| mappings += usize::from(live.may_get_more()));
    let begin = NEXT.load(Ordering::Relaxed);
    let begin = if begin < mappings { begin } else { 0 };
    let (mut left, share, mut more) = (Budget::PART, Budget::PART.share(mappings), false);
    for turn in [begin..usize::MAX, 0..begin] {
        let mut number = 0;
        table::for_each(|live| {
            if !live.may_get_more() {
                return;
            }
            if turn.contains(&number) && !left.is_spent() {
                let mut its = share;
                more |= look(live, maps, &mut its);
                left = left.less(share, its);
                NEXT.store(number + 1, Ordering::Relaxed);
            }
            number += 1;
        });
    }
    more
}

/// Looks at chunks of one mapping. Returns whether there is more to do immediately.
fn look(live: &LiveMapping, maps: i32, budget: &mut Budget) -> bool {
    let fd = live.file.keepers_number();
    for _ in 0..live.chunks() {
        let number = live.hand.load(Ordering::Relaxed) % live.chunks();
        let part = live.chunk(number);
        let markers = live.markers(number);
        if !part.is_empty() && markers != Markers::Installed {
            let is_first = markers == Markers::None;
            if is_first && !spend(&mut budget.first) {
                return true;
            }
            if !is_first && !spend(&mut budget.looks) {
                return false;
            }
            let state = || state_of(live, fd, &part);
            let is_due = match markers {
                Markers::None => true,
                Markers::Opened => state().is_some_and(|s| live.may_be_reclaimed(number, s)),
                Markers::Installed | Markers::Removed => state().is_some(),
            };
            if is_due && !is_first && !spend(&mut budget.put_back) {
                return false;
            }
            if is_due && !put(live, maps, number, fd) {
                return false;
            }
        }
        live.hand.fetch_add(1, Ordering::Relaxed);
    }
    false
}

/// Puts markers on the absent pages of a chunk, if it is still the program's mapping. `false` if that cannot be done now.
fn put(live: &LiveMapping, maps: i32, number: usize, fd: i32) -> bool {
    let Some(_permission) = live.installing() else {
        return false;
    };
    let part = live.chunk(number);
    if part.is_empty() {
        return true;
    }
    if !maps::is_still_there(live, maps, &part) {
        // The program has put something else there by a call that nobody saw, or has cut the mapping in two. Nothing is done until a
        // marker of this chunk is touched, if it has any.
        live.set_markers(number, Markers::Installed);
        return true;
    }
    let first = live.markers(number) == Markers::None;
    // (Anew: until there was the permission, calls may have used the chunk, and the mapping may have been cut.)
    let state = state_of(live, fd, &part);
    if let (Ok(pages), Some(state)) = (guard(live, number, state), state) {
        live.settle(number, state);
        if !first {
            live.counts.put_back.fetch_add(pages, Ordering::Relaxed);
        }
    }
    true
}

fn state_of(live: &LiveMapping, fd: i32, part: &Range<usize>) -> Option<CacheState> {
    file::cache_state(fd, live.offset_of(part.start), part.len() as u64).ok()
}

/// Puts markers on the pages of a chunk that the page cache does not have. Returns how many pages those are. `state`: of the chunk, if the
/// kernel tells. The caller has the permission.
fn guard(live: &LiveMapping, number: usize, state: Option<CacheState>) -> Result<u64, Errno> {
    let part = live.chunk(number);
    let pages = part.len() / PAGE;
    if pages == 0 {
        return Ok(0);
    }
    let none_cached = state.is_some_and(|state| state.cached == 0);
    // Before: a touch of a marker must find this said, and say otherwise.
    let markers = [Markers::Opened, Markers::Installed][usize::from(none_cached)];
    live.set_markers(number, markers);
    if none_cached {
        let installed = install_over(part).map(|()| pages as u64);
        return installed.inspect_err(|_| live.set_markers(number, Markers::Opened));
    }
    if state.is_some_and(|state| state.cached >= pages as u64) {
        return Ok(0);
    }
    let mut seen = [0u8; CHUNK / PAGE];
    let seen = &mut seen[..pages];
    mem::in_memory(part.start, seen)?;
    let mut guarded = 0;
    let mut page = 0;
    while page < pages {
        let is_there = |&p: &usize| seen[p] & 1 != 0;
        let from = (page..pages).find(|p| !is_there(p)).unwrap_or(pages);
        page = (from..pages).find(is_there).unwrap_or(pages);
        if from < page {
            install_over(part.start + from * PAGE..part.start + page * PAGE)?;
            guarded += (page - from) as u64;
        }
    }
    Ok(guarded)
}

fn install_over(range: Range<usize>) -> Result<(), Errno> {
    // SAFETY: a part of a live mapping, which the caller keeps from being unmapped or handed back meanwhile. No page of it holds anything
    // but the file's bytes: it is shared, or was made just now.
    unsafe { mem::install_guards(range.start, range.len()) }
}
