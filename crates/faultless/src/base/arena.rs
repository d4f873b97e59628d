//! Where the C library keeps what it allocates for a thread of the engine's.
//!
//! The C library maps an *arena* (64 MiB of addresses) for each thread that allocates, and `pthread_create` allocates. By itself the kernel
//! would put it into the highest hole that is large enough. A program with one thread knows what is in a range that it has unmapped: nothing.
//! It may unmap the range again, together with what lies around it, and would take the arena away. So while the one thread waits, all such
//! holes are filled, and the arena comes to lie below all that there is.

#![allow(
    unsafe_code,
    reason = "maps and unmaps memory, calls the C library's allocator"
)]

use crate::base::text;
use faultless_sys::mem::{map, unmap};

/// Bytes that the C library maps for an arena. It unmaps a part of them again, to align the arena.
const ARENA: usize = 128 << 20;
/// No program has a hole of that size among its mappings.
const GAP: usize = 1 << 40;
/// Lengths of the pieces that fill the holes. A hole takes few pieces of each length.
const LENGTHS: [usize; 4] = [64 << 30, 8 << 30, 1 << 30, ARENA];
/// Most pieces.
const MOST: usize = 256;

/// Gives the calling thread its arena, where no hole of the program's is. To be called by the first thread of the engine's, while the thread
/// that has started it waits, with all signals blocked. Where the program has others, it does nothing: they may map something at any time.
pub(crate) fn settle() {
    if !program_has_one_thread() {
        return;
    }
    let Some(end) = lowest() else {
        return;
    };
    let mut pieces = [(0, 0); MOST];
    let mut count = 0;
    'holes: for len in LENGTHS {
        loop {
            let Some(at) = reserve(len) else {
                break 'holes;
            };
            if at + len <= end || count == MOST {
                give_back(at, len);
                break;
            }
            pieces[count] = (at, len);
            count += 1;
        }
    }
    // SAFETY: allocates, and gives back.
    unsafe { libc::free(std::hint::black_box(libc::calloc(1, 64))) };
    for &(at, len) in &pieces[..count] {
        give_back(at, len);
    }
}

/// The program's thread and the caller.
fn program_has_one_thread() -> bool {
    let status = text::read("/proc/self/status");
    status.is_ok_and(|status| {
        let count = status
            .lines()
            .find_map(|line| line.strip_prefix("Threads:"));
        count.is_some_and(|count| count.trim() == "2")
    })
}

/// The lowest address of all mappings that the kernel has placed. `None` if the kernel refuses to try.
fn lowest() -> Option<usize> {
    let at = reserve(GAP)?;
    give_back(at, GAP);
    Some(at + GAP)
}

fn reserve(len: usize) -> Option<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: no MAP_FIXED: replaces nothing.
    unsafe { map(0, len, libc::PROT_NONE, flags, -1, 0) }.ok()
}

fn give_back(at: usize, len: usize) {
    // SAFETY: made by `reserve`; the program's only thread waits, so that nothing else has come to lie there.
    let _ = unsafe { unmap(at, len) };
}
