//! One miss in a live mapping.

#![allow(unsafe_code, reason = "reads into a byte of its own by address")]

use crate::base::primitive::Ordering;
use crate::coherence::page_cache::has_all;
use crate::guards::mapping::{LiveMapping, WINDOW};
use faultless_sys::mem::PAGE;
use faultless_sys::{Errno, file, raw};
use std::ops::Range;

/// Bytes that are read around a miss, as the kernel does for its mappings (`read_ahead_kb` is 128 unless it was changed).
const AROUND: usize = 128 << 10;
/// How far a thread that misses in one window after the other is read ahead of.
const AHEAD: usize = 512 << 10;

/// Brings the page at `addr` into the page cache, and removes its marker, with those of its neighbours where the page cache has all of
/// them. Whatever fails, the marker goes: then the kernel serves the load, or says why it cannot.
pub(crate) fn serve(live: &LiveMapping, addr: usize) {
    let page = addr & !(PAGE - 1);
    live.counts.misses.fetch_add(1, Ordering::Relaxed);
    live.opens(page);
    let window = live.window(page);
    let Some(fd) = live.file.number().filter(|_| window.contains(&page)) else {
        live.open(page..page + PAGE);
        return;
    };
    let cached = is_cached(live, fd, &window);
    if cached {
        live.counts.cached.fetch_add(1, Ordering::Relaxed);
    }
    let wanted = read_more(live, fd, page, &window, cached);
    read_byte(fd, live.offset_of(page));
    // (What was asked for just now may be there as a whole by the time that the page is.)
    if cached || wanted && is_cached(live, fd, &window) {
        live.open(window);
    } else {
        live.open(page..page + PAGE);
    }
}

/// Whether the page cache has all pages of a range. `false` where the kernel does not tell.
fn is_cached(live: &LiveMapping, fd: i32, range: &Range<usize>) -> bool {
    let start = live.offset_of(range.start);
    has_all(fd, &(start..start + range.len() as u64)) == Some(true)
}

/// Asks for what is likely to be wanted beside the page, without waiting for it. Returns whether that is all of the window.
fn read_more(
    live: &LiveMapping,
    fd: i32,
    page: usize,
    window: &Range<usize>,
    cached: bool,
) -> bool {
    let around = live.reads_around(cached);
    let advice = live.advice.load(Ordering::Relaxed);
    if advice == libc::MADV_RANDOM {
        return false;
    }
    let start = page & !(WINDOW - 1);
    let run = match live.run_of(raw::gettid(), start) {
        0 if advice == libc::MADV_SEQUENTIAL && !cached => 1,
        run => run,
    };
    // A half of the distance at a time.
    let due = match run {
        0 => None,
        1 => Some(start..start + AHEAD),
        _ if start.is_multiple_of(AHEAD / 2) => Some(start + AHEAD / 2..start + AHEAD),
        _ => None,
    };
    if let Some(due) = due {
        ask_for(live, fd, due);
    } else if around && run == 0 {
        let middle = (page - live.first).saturating_sub(AROUND / 2) + live.first;
        let from = middle.min(window.start);
        ask_for(live, fd, from..from + AROUND);
    } else {
        return false;
    }
    !cached
}

/// Has the page cache read a part of the mapping, without waiting for it.
pub(crate) fn ask_for(live: &LiveMapping, fd: i32, range: Range<usize>) {
    let range = live.with_data(range);
    if !range.is_empty() {
        let (at, len) = (live.offset_of(range.start), range.len() as u64);
        let _ = file::advise(fd, at, len, libc::POSIX_FADV_WILLNEED);
    }
}

/// Has the page cache read the page of a byte, and waits for it. The load will see whether that failed.
pub(crate) fn read_byte(fd: i32, offset: u64) {
    let mut byte = 0u8;
    let at = &raw mut byte as usize;
    // SAFETY: a byte of this frame.
    while unsafe { file::pread(fd, at, 1, offset) } == Err(Errno(libc::EINTR)) {}
}
