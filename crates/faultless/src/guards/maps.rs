//! Asking the kernel which mapping lies at an address. On the keeper's thread: the file that it takes has no number of the program's.

#![allow(unsafe_code, reason = "closes a descriptor")]

use crate::guards::mapping::{LiveMapping, Named};
use faultless_sys::file;
use faultless_sys::mem;
use std::ops::Range;

/// Runs `f` with `/proc/self/maps` open. `None` if it cannot be opened.
pub(crate) fn with_maps<R>(f: impl FnOnce(i32) -> R) -> Option<R> {
    let maps = file::open(c"/proc/self/maps", libc::O_RDONLY | libc::O_CLOEXEC).ok()?;
    let result = f(maps);
    // SAFETY: opened above, in a table that the program does not see.
    unsafe { file::close(maps) };
    Some(result)
}

/// The file of the mapping at an address.
pub(crate) fn name_at(maps: i32, at: usize) -> Option<Named> {
    let mapped = mem::mapped_at(maps, at).ok()?;
    Some((mapped.inode, mapped.device))
}

/// Whether a part of a shared live mapping still is that mapping, for reading.
pub(crate) fn is_still_there(live: &LiveMapping, maps: i32, part: &Range<usize>) -> bool {
    let Ok(at) = mem::mapped_at(maps, part.start) else {
        return false;
    };
    let offset = at.offset + part.start.wrapping_sub(at.start) as u64;
    at.end >= part.end
        && !at.writable
        && at.shared
        && offset == live.offset_of(part.start)
        && (at.inode, at.device) == live.named
}
