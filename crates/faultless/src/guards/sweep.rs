//! Installing markers, and putting them back on pages that the kernel has reclaimed.
//!
//! Both are done in steps of a chunk, off the fault path. A page that comes into memory between the look and the step loses its entry in the
//! page table, and nothing else.

#![allow(unsafe_code, reason = "installs markers by address")]

use crate::base::primitive::Ordering;
use crate::guards::mapping::{CHUNK, LiveMapping, Markers};
use crate::guards::table;
use faultless_sys::file::{self, CacheState};
use faultless_sys::mem::{self, PAGE};
use std::ops::Range;

/// Chunks of one mapping that are looked at in one round, and chunks whose markers are put back in one.
const LOOKS: usize = 1024;
const PUT_BACK: usize = 64;

/// Installs the first markers of some chunks, `bytes` at most. Returns whether all chunks have them.
///
/// # Errors
///
/// The kernel's: the mapping is one that can have no markers.
pub(crate) fn install(live: &LiveMapping, bytes: usize) -> Result<bool, faultless_sys::Errno> {
    let mut left = bytes.div_ceil(CHUNK);
    for number in 0..live.chunks() {
        if live.markers(number) != Markers::None {
            continue;
        }
        if left == 0 {
            return Ok(false);
        }
        left -= 1;
        if guard(live, number)?.is_none() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// One round of the work on all live mappings. Returns whether there is more to do immediately.
pub(crate) fn round(bytes: usize) -> bool {
    let mut more = false;
    table::for_each(|live| {
        // (A mapping that changed since its first markers were installed is the kernel's affair.)
        more |= !install(live, bytes).unwrap_or(true);
        put_back(live);
    });
    table::free();
    more
}

/// Looks at some chunks of which pages were brought in, and puts markers on those pages that were reclaimed since.
fn put_back(live: &LiveMapping) {
    let mut left = PUT_BACK;
    let Some(fd) = live.file.number() else {
        return;
    };
    for _ in 0..LOOKS.min(live.chunks()) {
        let number = live.hand.fetch_add(1, Ordering::Relaxed) % live.chunks();
        if live.markers(number) != Markers::Opened {
            continue;
        }
        let Some(state) = state_of(live, fd, &live.chunk(number)) else {
            return;
        };
        if !live.may_be_reclaimed(number, state) {
            continue;
        }
        let Ok(Some(pages)) = guard(live, number) else {
            return;
        };
        live.settle(number, state);
        live.counts.put_back.fetch_add(pages, Ordering::Relaxed);
        left -= 1;
        if left == 0 {
            return;
        }
    }
}

fn state_of(live: &LiveMapping, fd: i32, part: &Range<usize>) -> Option<CacheState> {
    file::cache_state(fd, live.offset_of(part.start), part.len() as u64).ok()
}

/// Puts markers on the pages of a chunk that the page cache does not have. Returns how many pages those are; `None` if it cannot be done
/// now.
fn guard(live: &LiveMapping, number: usize) -> Result<Option<u64>, faultless_sys::Errno> {
    let Some(_permission) = live.installing() else {
        return Ok(None);
    };
    let part = live.chunk(number);
    let pages = part.len() / PAGE;
    let fd = live.file.number();
    let state = fd.and_then(|fd| state_of(live, fd, &part));
    let none_cached = pages > 0 && state.is_some_and(|state| state.cached == 0);
    // Before: a touch of a marker must find this said, and say otherwise.
    let markers = [Markers::Opened, Markers::Installed][usize::from(none_cached)];
    live.set_markers(number, markers);
    if none_cached {
        return install_over(part).map(|()| Some(pages as u64));
    }
    if pages == 0 || state.is_some_and(|state| state.cached >= pages as u64) {
        return Ok(Some(0));
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
    Ok(Some(guarded))
}

fn install_over(range: Range<usize>) -> Result<(), faultless_sys::Errno> {
    // SAFETY: a part of a live mapping of a file. Only mappings that hold nothing but the file's bytes come here: those that nobody
    // has written to as yet, and those that share their pages with the file.
    unsafe { mem::install_guards(range.start, range.len()) }
}
