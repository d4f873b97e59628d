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
    let (moved, piece) = fill(core, fd, slot, range.start);
    if moved < HUGE {
        // SAFETY: the place is this thread's, and nothing of it is wanted any more.
        unsafe { mem::discard(slot.get(), HUGE) };
    }
    slots.renew(slot);
    slots.give(slot);
    Some(piece)
}

/// Reads a unit, and installs it. Says as well how much of it was moved out of the place.
fn fill(core: &MapCore, fd: &Fd, slot: Addr, at: RegionAt) -> (usize, Result<Piece, Refusal>) {
    // Here the kernel takes a huge page, or small ones if it has none. (For a page that it finds absent as it reads, it takes mmap_lock.)
    for page in (0..HUGE).step_by(mem::PAGE) {
        // SAFETY: the place is mapped, writable and this thread's.
        unsafe { core::ptr::write_volatile((slot + page).get() as *mut u8, 0) };
    }
    let got = match read_file(core, fd, slot, HUGE, core.source_at(at)) {
        Ok(got) => got.min(HUGE),
        Err(why) => return (0, Err(why)),
    };
    let is_all = got >= data_of(core, at, HUGE);
    let moved = if is_all {
        core.counters.add(Count::BytesRead, got as u64);
        // SAFETY: the place has so many bytes.
        unsafe { core::ptr::write_bytes((slot + got).get() as *mut u8, 0, HUGE - got) };
        move_in(core, core.addr(at), slot)
    } else {
        // The file was truncated.
        0
    };
    if moved == HUGE {
        let whole = HUGE as u64;
        let piece = Piece {
            present: whole,
            new: whole,
            wanted: whole,
        };
        return (moved, Ok(piece));
    }
    // The rest is copied: where pages are there already, or somebody else holds them. It is in memory twice meanwhile.
    core.pool.budget.charge_anyway(HUGE as u64);
    let piece = match is_all {
        true => copy_rest(core, slot, at, moved),
        false => {
            let (src, want) = (slot, HUGE);
            install_piece(core, at, &Filled { src, got, want }, None)
        }
    };
    core.pool.budget.release(HUGE as u64);
    (moved, piece)
}

/// Copies what was not moved out of a place.
fn copy_rest(core: &MapCore, slot: Addr, at: RegionAt, moved: usize) -> Result<Piece, Refusal> {
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
