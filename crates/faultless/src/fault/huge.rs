//! Huge pages: a unit is read into a huge page, which moves into the map as it is.

#![allow(unsafe_code, reason = "moves pages by address")]

use crate::base::area::HUGE;
use crate::base::ids::{Addr, RegionAt};
use crate::fault::install::{Filled, data_of, install, install_piece};
use crate::fault::read_file::read_file;
use crate::fault::refusal::Refusal;
use crate::fault::run::Piece;
use crate::space::counters::Count;
use crate::space::fds::Fd;
use crate::space::map_core::MapCore;
use faultless_sys::{Errno, mem, raw, uffd};
use std::ops::Range;

/// Tries to move a page that the kernel says is in use at this moment.
const BUSY_TRIES: u32 = 100;

/// Fetches the first unit of a range from the map's file, as a huge page. `None` if the map has none, the range has no whole unit, or all
/// places are in use: then it is to be fetched as other pieces are.
pub(crate) fn huge_piece(
    core: &MapCore,
    fd: &Fd,
    range: &Range<RegionAt>,
) -> Option<Result<Piece, Refusal>> {
    let is_whole = core.huge
        && range.end - range.start >= HUGE as u64
        && range.start.get().is_multiple_of(HUGE as u64);
    let slots = core.pool.huge.get().filter(|_| is_whole)?;
    let slot = slots.take()?;
    let piece = fill(core, fd, slot, range.start);
    // What was moved is gone from here. The rest is small pages, or what came of an error.
    // SAFETY: the place is this thread's, and nothing of it is wanted any more.
    unsafe { mem::discard(slot.get(), HUGE) };
    slots.give(slot);
    Some(piece)
}

fn fill(core: &MapCore, fd: &Fd, slot: Addr, at: RegionAt) -> Result<Piece, Refusal> {
    // Here the kernel takes a huge page, if it has one. (It takes mmap_lock for a page that it finds absent as it reads.)
    // SAFETY: the place is mapped, writable and this thread's.
    unsafe { core::ptr::write_volatile(slot.get() as *mut u8, 0) };
    let got = read_file(core, fd, slot, HUGE, core.source_at(at))?.min(HUGE);
    let data = data_of(core, at, HUGE);
    if got < data {
        // The file was truncated.
        let filled = Filled {
            src: slot,
            got,
            want: HUGE,
        };
        return install_piece(core, at, &filled, None);
    }
    core.counters.add(Count::BytesRead, got as u64);
    // SAFETY: the place has so many bytes.
    unsafe { core::ptr::write_bytes((slot + got).get() as *mut u8, 0, HUGE - got) };
    let moved = move_in(core, core.addr(at), slot);
    // (A part that could not be moved is copied: pages that are there already, or that somebody else holds.)
    let copied = install(core, core.addr(at) + moved, slot + moved, HUGE - moved)?;
    Ok(Piece {
        present: HUGE as u64,
        new: moved as u64 + copied,
        wanted: HUGE as u64,
    })
}

/// Moves what a place holds to `dst`, as far as the kernel does that. Returns how many bytes.
fn move_in(core: &MapCore, dst: Addr, slot: Addr) -> usize {
    let number = core.pool.uffd.get();
    let (mut done, mut tries) = (0, 0);
    while done < HUGE {
        let (to, from) = ((dst + done).get(), (slot + done).get());
        // SAFETY: the region is ours and registered, and this thread fills this unit; the place is its own, and holds the unit's bytes.
        let moved = unsafe { uffd::move_pages(number, to, from, HUGE - done) };
        done += moved.bytes;
        match moved.error {
            None => {}
            Some(Errno(libc::EAGAIN | libc::EBUSY)) if tries < BUSY_TRIES => {
                tries += 1;
                raw::sched_yield();
            }
            Some(_) => break,
        }
    }
    done
}
