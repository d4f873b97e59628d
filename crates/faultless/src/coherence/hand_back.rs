//! Putting the kernel's own mapping in the place of a stand-in, piece by piece.

#![allow(unsafe_code, reason = "replaces mappings by address")]

use crate::base::ids::Addr;
use crate::base::primitive::Ordering;
use crate::space::map_core::{KernelMapping, MapCore, Reading};
use crate::space::table::Table;
use crate::space::{identity, registry};
use faultless_sys::{Errno, mem, uffd};
use std::ops::Range;

/// Most bytes with resident pages that are replaced at once when a stand-in is handed back: some 0.1 ms. Readers of the piece
/// are held up for that long, and each piece takes `mmap_lock` once.
const PIECE: usize = 2 << 20;

/// The pages of a stand-in, moved out of its addresses, to be freed when this is dropped.
///
/// Moving the page tables of a gibibyte takes 0.3 ms, freeing its pages 140 ms (2 virtual processors), and whoever opened the
/// file for writing waits only for the former. The addresses themselves stay armed and are empty: a load in between is a
/// miss, and is served while the lease still holds.
pub(crate) struct Aside {
    start: usize,
    len: usize,
}

impl Aside {
    /// `None` where the kernel does not do it: then nothing has changed.
    pub(crate) fn take(
        core: &MapCore,
        kernel: &KernelMapping,
        live: &Range<usize>,
    ) -> Option<Aside> {
        let len = live.len();
        if len < 2 * PIECE {
            return None;
        }
        // At the same distance from a page table's boundary, so that whole tables are moved.
        let reserved = mem::map_reserved(len + 2 * registry::GRANULE).ok()?;
        let start = reserved.next_multiple_of(registry::GRANULE) + live.start % registry::GRANULE;
        // SAFETY: the target is ours, reserved just now; the source is the map's own, and whoever reads it is served.
        let moved = replacing(kernel, live.clone(), || unsafe {
            mem::move_pages_away(live.start, len, start)
        });
        // SAFETY: what was reserved around the target, which nobody knows.
        unsafe {
            let _ = mem::unmap(reserved, start - reserved);
            let _ = mem::unmap(start + len, reserved + 2 * registry::GRANULE - start);
            // (If it failed, the target may be gone already and be somebody else's: it is left as it is.)
            moved.ok()?;
            // Disarmed, so that no report is waited for when it is unmapped.
            let _ = uffd::unregister(core.pool.uffd.get(), start, len);
        }
        Some(Aside { start, len })
    }
}

/// Bytes that are freed at a time: others get `mmap_lock` in between.
const FREED_AT_A_TIME: usize = 32 << 20;

impl Drop for Aside {
    fn drop(&mut self) {
        let end = self.start + self.len;
        for at in (self.start..end).step_by(FREED_AT_A_TIME) {
            // SAFETY: pages that nobody can reach any more.
            let _ = unsafe { mem::unmap(at, FREED_AT_A_TIME.min(end - at)) };
        }
    }
}

/// The end of the piece to be replaced next: as far as nothing is resident, and [`PIECE`] beyond that.
pub(crate) fn piece_end(core: &MapCore, at: usize, end: usize) -> usize {
    let data_end = core.addr(core.pages_end()).get();
    let mut to = at;
    while to < end.min(data_end) {
        let unit = core.unit_of(Addr::new(to));
        if core.table.live(unit) > 0 {
            break;
        }
        to = core.unit_addr(Table::group_of(unit).end).get();
    }
    match to {
        to if to >= data_end => end,
        to => (to + PIECE).min(end),
    }
}

/// Runs `f` while reports about a range are about what the engine itself does.
fn replacing<R>(kernel: &KernelMapping, range: Range<usize>, f: impl FnOnce() -> R) -> R {
    kernel.replacing[0].store(range.start, Ordering::SeqCst);
    kernel.replacing[1].store(range.end, Ordering::SeqCst);
    let result = f();
    // A call returns when its report has been read, which is before it has been acted on.
    identity::wait_for_report();
    kernel.replacing[1].store(0, Ordering::SeqCst);
    result
}

/// Puts the kernel's mapping of the same bytes in the place of a part of a map.
pub(crate) fn replace(
    core: &MapCore,
    kernel: &KernelMapping,
    at: usize,
    len: usize,
) -> Result<(), Errno> {
    let Reading::File { fd, id, .. } = &core.reading else {
        return Err(Errno(libc::ENODEV));
    };
    let number = fd.current(*id)?;
    replacing(kernel, at..at + len, || {
        put_kernels(core, kernel, number, at, at, len)
    })
}

/// Puts the kernel's mapping of the bytes that a map has at `from` to `at`, where a part of the map is, or was moved. `number` is
/// the file's, in the calling thread's table of descriptors.
pub(crate) fn put_kernels(
    core: &MapCore,
    kernel: &KernelMapping,
    number: i32,
    from: usize,
    at: usize,
    len: usize,
) -> Result<(), Errno> {
    let offset = core.base + (Addr::new(from) - core.start) as u64;
    let flags = kernel.flags | libc::MAP_FIXED;
    // SAFETY: replaces a part of the map's region, or the range that it was moved to, by the same bytes.
    unsafe { mem::map(at, len, libc::PROT_READ, flags, number, offset.get())? };
    let advice = kernel.advice.load(Ordering::Relaxed);
    // SAFETY: mapped just now; this advice changes no contents.
    unsafe {
        if advice != libc::MADV_NORMAL {
            let _ = mem::madvise(at, len, advice);
        }
        if kernel.dont_fork.load(Ordering::Relaxed) {
            let _ = mem::madvise(at, len, libc::MADV_DONTFORK);
        }
    }
    Ok(())
}
