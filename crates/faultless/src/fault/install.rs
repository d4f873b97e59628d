//! Installing pages in a map's region.

#![allow(unsafe_code, reason = "installs pages by address")]

use crate::base::clock;
use crate::base::ids::{Addr, Nanos, RegionAt};
use crate::base::primitive::Ordering;
use crate::fault::refusal::Refusal;
use crate::fault::run::Piece;
use crate::space::counters::Count;
use crate::space::fds::Fd;
use crate::space::map_core::MapCore;
use faultless_sys::mem::PAGE;
use faultless_sys::{Errno, raw, uffd};

/// Tries to install a page while the kernel says ENOMEM.
const INSTALL_TRIES: u32 = 5_000;
/// Tries with another descriptor, where the program closes the engine's.
pub(crate) const DESCRIPTOR_TRIES: u32 = 8;
/// Naps of 1 ms while there is no memory or no number for another descriptor.
pub(crate) const SCARCE_MAX: u32 = 2_000;
/// Naps while the kernel says EAGAIN: more than a minute.
const BUSY_NAP: Nanos = Nanos::from_micros(50);
const BUSY_MAX: u32 = 1_000_000;

/// What a buffer holds for a piece of the region: whole pages at `src`, of which the source filled the first `got` bytes.
pub(crate) struct Filled {
    pub(crate) src: Addr,
    pub(crate) got: usize,
    /// Length of the buffer's part that is meant, whole pages.
    pub(crate) want: usize,
}

/// Installs what a buffer holds as the piece of the region that starts at `at`.
pub(crate) fn install_piece(
    core: &MapCore,
    at: RegionAt,
    filled: &Filled,
    keep: Option<Addr>,
) -> Result<Piece, Refusal> {
    let &Filled { src, want, .. } = filled;
    let got = filled.got.min(want);
    let data = data_of(core, at, want);
    core.counters.add(Count::BytesRead, got as u64);
    // What lies behind the mapped length but in its last page reads as the file has it, as with mmap; behind the end
    // of the source it is zero.
    let pages = if got >= data {
        want
    } else {
        got.next_multiple_of(PAGE)
    };
    // SAFETY: the buffer is the caller's, and `got <= pages <= want`, its length.
    unsafe { core::ptr::write_bytes((src + got).get() as *mut u8, 0, pages - got) };
    let kept = match keep {
        Some(slot) if pages > 0 => {
            let (src, slot) = (src.get() as *const u8, slot.get() as *mut u8);
            // SAFETY: a slot of one page, which is the caller's, and at least one page at `src`.
            unsafe { core::ptr::copy_nonoverlapping(src, slot, PAGE) };
            PAGE
        }
        _ => 0,
    };
    let new = install(core, core.addr(at) + kept, src + kept, pages - kept)?;
    Ok(Piece {
        present: pages as u64,
        new,
        wanted: want as u64,
    })
}

/// How many of the `want` bytes of the region from `at` on the source backs.
pub(crate) fn data_of(core: &MapCore, at: RegionAt, want: usize) -> usize {
    want.min(core.data_len.saturating_sub(at.get()) as usize)
}

/// Fetches the descriptor again whose number the program closed. That takes memory, and a number: if there is none, this thread
/// waits for a while, `patience` milliseconds at most. Returns the number as it was, if there is no other.
pub(crate) fn another_descriptor(core: &MapCore, fd: &Fd, number: i32, patience: &mut u32) -> i32 {
    loop {
        match fd.recover(number) {
            Ok(found) => return found,
            // (No thread is kept waiting in a map that is about to go.)
            Err(Errno(libc::ENOMEM | libc::EMFILE | libc::ENFILE))
                if *patience > 0 && !core.leaving() && !core.closing.load(Ordering::Relaxed) =>
            {
                *patience -= 1;
                core.pool.evict_bell.ring();
                clock::nap(Nanos::from_millis(1));
            }
            Err(_) => return number,
        }
    }
}

/// Installs `len` bytes at `dst`; pages that are there already stay. Returns how many bytes were installed.
pub(crate) fn install(core: &MapCore, dst: Addr, src: Addr, len: usize) -> Result<u64, Refusal> {
    let (dst, src) = (dst.get(), src.get());
    let fd = &core.pool.uffd;
    let mut number = fd.get();
    let mut done = 0;
    let mut new = 0;
    let (mut tries, mut lost, mut busy) = (0, 0, 0);
    let mut patience = SCARCE_MAX;
    let mut step = len;
    while done < len {
        let part = step.min(len - done);
        // SAFETY: the region is ours and registered; the staging buffer holds the right bytes for it.
        let copied = unsafe { uffd::copy(number, dst + done, src + done, part, false) };
        done += copied.bytes;
        new += copied.bytes as u64;
        if copied.bytes > 0 {
            lost = 0;
        }
        let Some(Errno(error)) = copied.error else {
            continue;
        };
        tries += 1;
        match error {
            libc::EEXIST => {
                // Somebody was faster with this page, or it never went away.
                done += PAGE;
                tries -= 1;
                lost = 0;
            }
            _ if tries > INSTALL_TRIES => return Err(Refusal::Install(error)),
            // The kernel's own mapping is there by now, at least for a part of the range: it serves that.
            libc::ENOENT | libc::EINVAL if core.leaving() || !core.live.covers(dst, len) => {
                tries -= 1;
                if step > PAGE {
                    step = PAGE;
                } else {
                    done += PAGE;
                }
            }
            // A range is being unmapped or moved, and the report of it is not read yet: that is no failure.
            libc::EAGAIN if busy < BUSY_MAX => {
                tries -= 1;
                lost = 0;
                busy += 1;
                if busy < 100 {
                    raw::sched_yield();
                } else {
                    clock::nap(BUSY_NAP);
                }
            }
            libc::ENOMEM => {
                // (The number was the userfaultfd's at least: a program may close it again and again.)
                lost = 0;
                core.pool.evict_bell.ring();
                clock::nap(Nanos::from_millis(1));
            }
            // The number is closed, or names something that is no userfaultfd, or one that was never enabled.
            libc::EBADF | libc::ENOTTY | libc::EINVAL | libc::EOPNOTSUPP | libc::EPERM
                if lost < DESCRIPTOR_TRIES =>
            {
                lost += 1;
                number = another_descriptor(core, fd, number, &mut patience);
            }
            _ => return Err(Refusal::Install(error)),
        }
    }
    Ok(new)
}
