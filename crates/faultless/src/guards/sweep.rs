//! Installing markers, and putting them back on pages that the kernel has reclaimed.
//!
//! Both are done in steps of a chunk, off the fault path. A page that comes into memory between the look and the step loses its entry in the
//! page table, and nothing else: only mappings of which no page can hold anything but the file's bytes come here. Those are shared ones, and
//! private ones that nobody has had a chance to write to as yet.

#![allow(unsafe_code, reason = "installs markers by address")]

use crate::base::primitive::Ordering;
use crate::guards::mapping::{CHUNK, LiveMapping, Markers};
use crate::guards::table;
use faultless_sys::Errno;
use faultless_sys::file::{self, CacheState};
use faultless_sys::mem::{self, PAGE};
use std::ops::Range;

/// What one round does at most, in chunks: looks at the page cache, first markers, and markers put back.
#[derive(Debug)]
struct Budget {
    looks: usize,
    first: usize,
    put_back: usize,
}

impl Budget {
    const ROUND: Budget = Budget {
        looks: 1024,
        first: 64,
        put_back: 64,
    };

    /// What each of some mappings gets of it.
    fn share(&self, of: usize) -> Budget {
        let part = |all: usize| (all / of.max(1)).max(1);
        Budget {
            looks: part(self.looks),
            first: part(self.first),
            put_back: part(self.put_back),
        }
    }
}

/// Takes one from a budget, if it has one.
fn spend(left: &mut usize) -> bool {
    let some = *left > 0;
    *left -= usize::from(some);
    some
}

/// Installs the first markers of a new mapping: of `bytes` of a shared one, and of all of a private one, which may be written to later.
///
/// # Errors
///
/// The kernel's: the mapping is one that can have no markers.
pub(crate) fn install(live: &LiveMapping, bytes: usize) -> Result<(), Errno> {
    let _permission = live.first();
    let Some(fd) = live.file.number() else {
        return Err(Errno(libc::EBADF));
    };
    let chunks = match live.is_shared() {
        true => live.chunks().min(bytes.div_ceil(CHUNK)),
        false => live.chunks(),
    };
    (0..chunks).try_for_each(|number| guard(live, fd, number).map(drop))
}

/// One round of the work on all live mappings, on a thread of the keeper's. Returns whether there is more to do immediately.
pub(crate) fn round() -> bool {
    let Ok(maps) = file::open(c"/proc/self/maps", libc::O_RDONLY | libc::O_CLOEXEC) else {
        return false;
    };
    let mut mappings = 0;
    table::for_each(|live| mappings += usize::from(live.is_shared()));
    let mut more = false;
    table::for_each(|live| {
        // (A private mapping may hold what the program wrote, if only by a debugger's hand.)
        if live.is_shared() {
            more |= look(live, maps, &mut Budget::ROUND.share(mappings));
        }
    });
    // SAFETY: opened above, in a table that the program does not see.
    unsafe { file::close(maps) };
    table::free();
    more
}

/// Looks at chunks of one mapping. Returns whether there is more to do immediately.
fn look(live: &LiveMapping, maps: i32, budget: &mut Budget) -> bool {
    let fd = live.file.keepers_number();
    for _ in 0..live.chunks() {
        let number = live.hand.load(Ordering::Relaxed) % live.chunks();
        let part = live.chunk(number);
        let due = match live.markers(number) {
            _ if part.is_empty() => false,
            Markers::Installed => false,
            Markers::None => {
                if !spend(&mut budget.first) {
                    return true;
                }
                true
            }
            Markers::Opened | Markers::Removed => {
                if !spend(&mut budget.looks) {
                    return false;
                }
                let state = state_of(live, fd, &part);
                let due = state.is_some_and(|state| {
                    live.markers(number) == Markers::Removed || live.may_be_reclaimed(number, state)
                });
                if due && !spend(&mut budget.put_back) {
                    return false;
                }
                due
            }
        };
        if due && !put(live, maps, fd, number) {
            return false;
        }
        live.hand.fetch_add(1, Ordering::Relaxed);
    }
    false
}

/// Puts markers on the absent pages of a chunk, if it is still the program's mapping. `false` if that cannot be done now.
fn put(live: &LiveMapping, maps: i32, fd: i32, number: usize) -> bool {
    let Some(_permission) = live.installing() else {
        return false;
    };
    let part = live.chunk(number);
    if part.is_empty() {
        return true;
    }
    if !is_still_there(live, maps, &part) {
        // The program has put something else there by a call that nobody saw, or has cut the mapping in two. Nothing is done until a
        // marker of this chunk is touched, if it has any.
        live.set_markers(number, Markers::Installed);
        return true;
    }
    let first = live.markers(number) == Markers::None;
    let state = state_of(live, fd, &part);
    if let (Ok(pages), Some(state)) = (guard(live, fd, number), state) {
        live.settle(number, state);
        if !first {
            live.counts.put_back.fetch_add(pages, Ordering::Relaxed);
        }
    }
    true
}

/// Whether what lies in a part of the addresses is still the mapping of the file, for reading.
fn is_still_there(live: &LiveMapping, maps: i32, part: &Range<usize>) -> bool {
    let Ok(at) = mem::mapped_at(maps, part.start) else {
        return false;
    };
    let offset = at.offset + part.start.wrapping_sub(at.start) as u64;
    at.end >= part.end
        && !at.writable
        && at.shared
        && offset == live.offset_of(part.start)
        && at.inode == live.inode
        && at.device == live.device
}

fn state_of(live: &LiveMapping, fd: i32, part: &Range<usize>) -> Option<CacheState> {
    file::cache_state(fd, live.offset_of(part.start), part.len() as u64).ok()
}

/// Puts markers on the pages of a chunk that the page cache does not have. Returns how many pages those are. The caller has the
/// permission.
fn guard(live: &LiveMapping, fd: i32, number: usize) -> Result<u64, Errno> {
    let part = live.chunk(number);
    let pages = part.len() / PAGE;
    if pages == 0 {
        return Ok(0);
    }
    let state = state_of(live, fd, &part);
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
