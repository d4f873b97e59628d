//! The functions about mappings. For a mapping of ours each does what it would do for the kernel's; what it does not know
//! how to do exactly, it has the kernel do, after the mapping was handed back.

#![allow(
    unsafe_code,
    reason = "functions of the C library, with its pointers and its promises"
)]

use crate::decide::{self, Call, Taken};
use crate::real::{real, returned};
use crate::state::{self, STANDING, State};
use crate::{lend, serving, waiting};
use faultless::{live, standin};
use faultless_sys::Errno;
use faultless_sys::mem::PAGE;
use faultless_sys::raw::{check, gated};
use std::ffi::{c_int, c_uint, c_void};
use std::ops::Range;
use std::sync::atomic::Ordering;

/// Addresses from `addr` on, whole pages.
fn pages(addr: usize, len: usize) -> Range<usize> {
    let start = addr & !(PAGE - 1);
    let end = addr.saturating_add(len).checked_next_multiple_of(PAGE);
    start..end.unwrap_or(usize::MAX)
}

/// Whether a range may have a part of a mapping of ours.
#[inline]
pub(crate) fn reaches(range: &Range<usize>) -> bool {
    STANDING.load(Ordering::Relaxed) != 0 && serving::touches(range)
}

/// Whether a range has a part of a mapping of ours that this process may change.
fn concerns(range: &Range<usize>) -> bool {
    reaches(range) && !state::foreign()
}

/// The kernel's call, as the C library returns it.
fn kernel(nr: libc::c_long, args: [usize; 6]) -> isize {
    // SAFETY: the program's own call, with its own arguments.
    returned(check(unsafe { gated(nr, args) }))
}

/// Has the kernel do something to a range after what is ours there was handed back, so that nothing comes in between.
fn with_kernels(
    range: &Range<usize>,
    reason: &'static str,
    nr: libc::c_long,
    args: [usize; 6],
) -> isize {
    waiting::changing(range);
    if !concerns(range) {
        return kernel(nr, args);
    }
    let result = {
        let mut state = state::lock();
        if state.hand_back_over(range, reason) {
            // SAFETY: the program's own call, with its own arguments.
            check(unsafe { gated(nr, args) })
        } else {
            Err(Errno(libc::ENOMEM))
        }
    };
    returned(result)
}

/// What may be served, beside what is for reading alone.
const WRITABLE: c_int = libc::PROT_READ | libc::PROT_WRITE;

#[inline]
fn map(addr: usize, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void {
    let mut args = [
        addr,
        len,
        prot as usize,
        flags as usize,
        fd as usize,
        offset as usize,
    ];
    standin::forsake();
    let mut later = None;
    if flags & libc::MAP_ANONYMOUS == 0
        && (prot == libc::PROT_READ || prot == WRITABLE && decide::may_serve_writable())
        && len.saturating_add(PAGE - 1) >= state::min_size()
        && fd >= 0
        && offset >= 0
        && len > 0
        && let Some(len) = len.checked_next_multiple_of(PAGE)
        && len >= state::min_size()
    {
        let call = Call {
            addr,
            len,
            writable: prot == WRITABLE,
            flags,
            fd,
            offset: offset as u64,
        };
        match decide::take(call) {
            Taken::At(at) => return at as *mut c_void,
            Taken::Later(waiting) => {
                args[0] = waiting.place();
                later = Some(waiting);
            }
            Taken::No => {}
        }
    }
    if flags & libc::MAP_FIXED != 0 {
        let reason = "the program mapped something else there (MAP_FIXED)";
        return with_kernels(&pages(addr, len), reason, libc::SYS_mmap, args) as *mut c_void;
    }
    let at = kernel(libc::SYS_mmap, args);
    if at != -1 {
        given_out(at as usize, len);
        if let Some(waiting) = later {
            waiting.remember(at as usize);
        }
        if fd >= 0 && !state::idle() && decide::is_ring(fd) && !state::foreign() {
            // Its requests may be submitted as soon as this returns.
            state::lock().close("the program uses io_uring");
        }
    }
    at as *mut c_void
}

/// Looks whether the kernel has given out addresses that were thought to be ours: then a system call that nobody saw had
/// freed them. Before the program learns of them.
pub(crate) fn given_out(at: usize, len: usize) {
    let range = pages(at, len);
    if reaches(&range) {
        standin::given_out(&range);
        live::given_out(&range);
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mmap(
    addr: *mut c_void,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    map(addr as usize, len, prot, flags, fd, offset)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mmap64(
    addr: *mut c_void,
    len: usize,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: i64,
) -> *mut c_void {
    map(addr as usize, len, prot, flags, fd, offset)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn munmap(addr: *mut c_void, len: usize) -> c_int {
    let addr = addr as usize;
    let args = [addr, len, 0, 0, 0, 0];
    let range = pages(addr, len);
    standin::forsake();
    waiting::changing(&range);
    // What the kernel refuses.
    if !concerns(&range) || !addr.is_multiple_of(PAGE) || len == 0 {
        return kernel(libc::SYS_munmap, args) as c_int;
    }
    let result = {
        let mut state = state::lock();
        let whole = match state.over(&range)[..] {
            [serial] => state
                .standing
                .get(&serial)
                .is_some_and(|e| e.served.range() == range),
            _ => false,
        };
        // SAFETY: the program's own call, with its own arguments.
        let unmap = || check(unsafe { gated(libc::SYS_munmap, args) });
        if whole
            && let [serial] = state.over(&range)[..]
            && let Some(entry) = state.remove(serial)
        {
            let result = entry.served.unmap_with(unmap);
            state::ended();
            result
        } else if let Some(result) = trim(&state, &range, unmap) {
            result
        } else if state.hand_back_over(&range, "a part of it was unmapped") {
            unmap()
        } else {
            Err(Errno(libc::ENOMEM))
        }
    };
    returned(result) as c_int
}

/// Unmaps a part of one mapping of ours, the rest of which goes on to be served.
fn trim(
    state: &State,
    gone: &Range<usize>,
    unmap: impl Fn() -> Result<usize, Errno>,
) -> Option<Result<usize, Errno>> {
    let [serial] = state.over(gone)[..] else {
        return None;
    };
    let entry = state.standing.get(&serial)?;
    if !entry.served.can_be_trimmed(gone) {
        return None;
    }
    Some(entry.served.trim_with(gone, unmap))
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mremap(
    old: *mut c_void,
    old_len: usize,
    new_len: usize,
    flags: c_int,
    new: *mut c_void,
) -> *mut c_void {
    let args = [
        old as usize,
        old_len,
        new_len,
        flags as usize,
        new as usize,
        0,
    ];
    let from = pages(old as usize, old_len.max(1));
    let to = pages(new as usize, new_len);
    let fixed = flags & libc::MREMAP_FIXED != 0;
    waiting::changing(&from);
    if fixed {
        waiting::changing(&to);
    }
    if !(concerns(&from) || fixed && concerns(&to)) {
        let at = kernel(libc::SYS_mremap, args);
        if at != -1 {
            given_out(at as usize, new_len);
        }
        return at as *mut c_void;
    }
    let result = {
        let mut state = state::lock();
        let good = state.hand_back_over(&from, "the program moved or resized it (mremap)")
            && (!fixed
                || state.hand_back_over(&to, "the program moved something else there (mremap)"));
        if good {
            // SAFETY: the program's own call, with its own arguments.
            check(unsafe { gated(libc::SYS_mremap, args) })
        } else {
            Err(Errno(libc::ENOMEM))
        }
    };
    returned(result) as *mut c_void
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn remap_file_pages(
    addr: *mut c_void,
    len: usize,
    prot: c_int,
    pgoff: usize,
    flags: c_int,
) -> c_int {
    let args = [addr as usize, len, prot as usize, pgoff, flags as usize, 0];
    with_kernels(
        &pages(addr as usize, len),
        "the program rearranged it (remap_file_pages)",
        libc::SYS_remap_file_pages,
        args,
    ) as c_int
}

fn protect(nr: libc::c_long, args: [usize; 6]) -> c_int {
    let [addr, len, prot, ..] = args;
    let range = pages(addr, len);
    // What is for reading alone may be so again; what is writable may be both.
    let stays = prot == libc::PROT_READ as usize || prot == WRITABLE as usize && writable(&range);
    if stays && nr == libc::SYS_mprotect {
        return kernel(nr, args) as c_int;
    }
    with_kernels(
        &range,
        "the program changed its protection (mprotect)",
        nr,
        args,
    ) as c_int
}

/// Whether all that is ours of a range is in live mappings that the program made writable.
fn writable(range: &Range<usize>) -> bool {
    live::any_writable() && concerns(range) && {
        let state = state::lock();
        let mut ours = state.over(range).into_iter();
        let live = |serial| state.standing.get(&serial).and_then(|e| e.served.live());
        ours.all(|serial| live(serial).is_some_and(live::Live::is_writable))
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mprotect(addr: *mut c_void, len: usize, prot: c_int) -> c_int {
    protect(
        libc::SYS_mprotect,
        [addr as usize, len, prot as usize, 0, 0, 0],
    )
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn pkey_mprotect(
    addr: *mut c_void,
    len: usize,
    prot: c_int,
    key: c_int,
) -> c_int {
    if key == -1 {
        return protect(
            libc::SYS_mprotect,
            [addr as usize, len, prot as usize, 0, 0, 0],
        );
    }
    protect(
        libc::SYS_pkey_mprotect,
        [addr as usize, len, prot as usize, key as usize, 0, 0],
    )
}

/// `MADV_…` that C libraries of today do not all declare.
const MADV_COLD: c_int = 20;
const MADV_PAGEOUT: c_int = 21;
const MADV_POPULATE_READ: c_int = 22;

/// Follows advice for the stand-ins in a range. `None`: it is none that is known.
fn advise(state: &State, range: &Range<usize>, advice: c_int) -> Option<()> {
    for start in state.over(range) {
        let Some(entry) = state.standing.get(&start) else {
            continue;
        };
        let standin = entry.served.stand_in()?;
        let whole = standin.range();
        let part = range.start.max(whole.start)..range.end.min(whole.end);
        let first = standin.first();
        let within = part.start - first..part.end - first;
        let map = standin.map();
        match advice {
            libc::MADV_NORMAL | libc::MADV_RANDOM | libc::MADV_SEQUENTIAL => {
                standin.advise(advice);
            }
            libc::MADV_WILLNEED => _ = map.prefetch(within),
            libc::MADV_DONTNEED | MADV_COLD | MADV_PAGEOUT => _ = map.release(within),
            libc::MADV_DONTFORK | libc::MADV_DOFORK if part == whole => {
                standin.set_dont_fork(advice == libc::MADV_DONTFORK);
            }
            // They change nothing that a program can see of a file's mapping, or nothing at all.
            libc::MADV_HUGEPAGE
            | libc::MADV_NOHUGEPAGE
            | libc::MADV_DONTDUMP
            | libc::MADV_DODUMP
            | libc::MADV_MERGEABLE
            | libc::MADV_UNMERGEABLE => {}
            _ => return None,
        }
    }
    Some(())
}

/// Notes advice for the live mappings in a range, which the kernel gets as well. `false`: it may change the markers.
fn advise_live(state: &State, range: &Range<usize>, advice: c_int) -> bool {
    for serial in state.over(range) {
        let live = state.standing.get(&serial).and_then(|e| e.served.live());
        match (live, advice) {
            (Some(live), libc::MADV_NORMAL | libc::MADV_RANDOM | libc::MADV_SEQUENTIAL) => {
                live.advise(advice);
            }
            // (Of a part: the kernel alone can have it so.)
            (Some(live), libc::MADV_DONTFORK | libc::MADV_DOFORK)
                if range.start <= live.range().start && live.range().end <= range.end =>
            {
                live.set_dont_fork(advice == libc::MADV_DONTFORK);
            }
            (Some(_), libc::MADV_DONTDUMP | libc::MADV_DODUMP) => {}
            (Some(_), advice) if harmless(advice) => {}
            _ => return false,
        }
    }
    true
}

/// Advice that leaves a mapping a plain one.
fn harmless(advice: c_int) -> bool {
    const HARMLESS: [c_int; 7] = [
        libc::MADV_NORMAL,
        libc::MADV_RANDOM,
        libc::MADV_SEQUENTIAL,
        libc::MADV_WILLNEED,
        libc::MADV_DONTNEED,
        MADV_COLD,
        MADV_PAGEOUT,
    ];
    HARMLESS.contains(&advice) || advice == MADV_POPULATE_READ
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn madvise(addr: *mut c_void, len: usize, advice: c_int) -> c_int {
    let args = [addr as usize, len, advice as usize, 0, 0, 0];
    let range = pages(addr as usize, len);
    if !harmless(advice) {
        waiting::changing(&range);
    }
    if !concerns(&range) || !(addr as usize).is_multiple_of(PAGE) {
        return kernel(libc::SYS_madvise, args) as c_int;
    }
    if live::touches(&range) {
        let known = advise_live(&state::lock(), &range, advice);
        if known {
            // (The kernel would stop at a marker.)
            let _opened = (advice == MADV_POPULATE_READ).then(|| lend::opened(&range));
            return kernel(libc::SYS_madvise, args) as c_int;
        }
    }
    let (inside, followed) = {
        let state = state::lock();
        let inside = state.over(&range).first().is_some_and(|start| {
            state
                .standing
                .get(start)
                .is_some_and(|e| e.served.covers(&range))
        });
        // What is not all in one mapping of ours concerns the kernel as well.
        (inside, inside && advise(&state, &range, advice).is_some())
    };
    if followed {
        return 0;
    }
    if inside && advice == MADV_POPULATE_READ {
        // Long: others need the lock meanwhile. What is unmapped meanwhile is the program's affair.
        return match standin::read_range(range) {
            Some(false) => returned(Err(Errno(libc::EFAULT))) as c_int,
            _ => 0,
        };
    }
    let reason = "advice that the engine does not know (madvise)";
    with_kernels(&range, reason, libc::SYS_madvise, args) as c_int
}

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_madvise(addr: *mut c_void, len: usize, advice: c_int) -> c_int {
    // As the C library has it: it never discards, and returns the error.
    if advice == libc::POSIX_MADV_DONTNEED {
        return 0;
    }
    let errno = crate::real::Errno::keep();
    // SAFETY: the program's own arguments; the numbers of the other advice are the same.
    let failed = unsafe { madvise(addr, len, advice) } != 0;
    let error = crate::real::errno();
    drop(errno);
    if failed { error } else { 0 }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mlock(addr: *const c_void, len: usize) -> c_int {
    let args = [addr as usize, len, 0, 0, 0, 0];
    with_kernels(
        &pages(addr as usize, len),
        "the program locked it in memory (mlock)",
        libc::SYS_mlock,
        args,
    ) as c_int
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mlock2(addr: *const c_void, len: usize, flags: c_uint) -> c_int {
    let args = [addr as usize, len, flags as usize, 0, 0, 0];
    with_kernels(
        &pages(addr as usize, len),
        "the program locked it in memory (mlock2)",
        libc::SYS_mlock2,
        args,
    ) as c_int
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mlockall(flags: c_int) -> c_int {
    if state::on() && !state::foreign() {
        let mut state = state::lock();
        let reason = "the program locks all its memory (mlockall)";
        if flags & libc::MCL_FUTURE != 0 {
            state.close(reason);
        } else {
            state.hand_back_all(reason);
        }
    }
    // SAFETY: no pointers.
    unsafe { real!(mlockall as unsafe extern "C" fn(c_int) -> c_int)(flags) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn mincore(addr: *mut c_void, len: usize, seen: *mut u8) -> c_int {
    let args = [addr as usize, len, seen as usize, 0, 0, 0];
    lend::filled(&lend::range(seen.cast(), len.div_ceil(PAGE)));
    let range = pages(addr as usize, len);
    if !concerns(&range) || !(addr as usize).is_multiple_of(PAGE) {
        return kernel(libc::SYS_mincore, args) as c_int;
    }
    // The kernel first: it knows which addresses are mapped, and whether the vector can be written.
    let result = kernel(libc::SYS_mincore, args) as c_int;
    let mut page = range.start;
    while result == 0 && page < range.end {
        // In parts: the program's memory is not touched under the lock.
        let mut there = [None; 256];
        let end = range.end.min(page + there.len() * PAGE);
        resident(&(page..end), &mut there);
        for (i, there) in there.iter().enumerate() {
            if let Some(there) = there {
                let at = seen.wrapping_add((page - range.start) / PAGE + i);
                // SAFETY: one byte for each page of the range, which the kernel has just written.
                unsafe { at.write(u8::from(*there)) };
            }
        }
        page = end;
    }
    result
}

/// Which pages of a range are in memory, where mappings of ours have them: in the engine's, or in the page cache.
fn resident(range: &Range<usize>, there: &mut [Option<bool>; 256]) {
    let state = state::lock();
    for start in state.over(range) {
        let Some(entry) = state.standing.get(&start) else {
            continue;
        };
        // (Of a live mapping the kernel knows it.)
        let Some(standin) = entry.served.stand_in() else {
            continue;
        };
        let whole = standin.range();
        let part = range.start.max(whole.start)..range.end.min(whole.end);
        let mut cached = [0u8; 256];
        if let Some(lent) = standin::lend(&part) {
            let args = [lent.at(), part.len(), cached.as_mut_ptr() as usize, 0, 0, 0];
            // SAFETY: a mapping of the kernel's, and a byte for each of its pages.
            let _ = unsafe { gated(libc::SYS_mincore, args) };
        }
        for (i, page) in part.clone().step_by(PAGE).enumerate() {
            if !standin.touches(&(page..page + PAGE)) {
                continue;
            }
            let at = page - standin.first();
            let held = standin.map().is_resident(at..at + 1);
            there[(page - range.start) / PAGE] = Some(held || cached[i] & 1 != 0);
        }
    }
}

/// A range is about to be sealed (`mseal`): what is sealed could never be handed back.
pub(crate) fn sealing(addr: usize, len: usize) {
    let range = pages(addr, len);
    waiting::changing(&range);
    if concerns(&range) {
        state::lock().hand_back_over(&range, "the program seals it (mseal)");
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn mseal(addr: *mut c_void, len: usize, flags: std::ffi::c_ulong) -> c_int {
    /// `mseal(2)` (6.10).
    const SYS_MSEAL: libc::c_long = 462;
    sealing(addr as usize, len);
    kernel(SYS_MSEAL, [addr as usize, len, flags as usize, 0, 0, 0]) as c_int
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_whole_pages_and_end_where_addresses_end() {
        assert_eq!(pages(0, 0), 0..0);
        assert_eq!(pages(0x1000, 1), 0x1000..0x2000);
        assert_eq!(pages(0x1fff, 2), 0x1000..0x3000);
        assert_eq!(pages(0x1000, 0x1000), 0x1000..0x2000);
        assert_eq!(pages(0x1001, 0), 0x1000..0x2000);
        assert_eq!(pages(usize::MAX, 1), (usize::MAX & !(PAGE - 1))..usize::MAX);
        assert_eq!(pages(0x1000, usize::MAX), 0x1000..usize::MAX);
    }

    #[test]
    fn only_advice_that_changes_no_mapping_is_harmless() {
        for advice in [libc::MADV_WILLNEED, libc::MADV_DONTNEED, MADV_POPULATE_READ] {
            assert!(harmless(advice), "{advice}");
        }
        for advice in [
            libc::MADV_DONTFORK,
            libc::MADV_WIPEONFORK,
            libc::MADV_HUGEPAGE,
            libc::MADV_MERGEABLE,
            libc::MADV_REMOVE,
            libc::MADV_HWPOISON,
            -1,
        ] {
            assert!(!harmless(advice), "{advice}");
        }
    }
}
