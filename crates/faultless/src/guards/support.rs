//! Whether this kernel can serve live mappings, and what that gains.

#![allow(unsafe_code, reason = "a scratch mapping")]

use crate::base::primitive::OnceLock;
use crate::base::text;
use faultless_sys::mem::PAGE;
use faultless_sys::{Errno, file, mem};

/// What live mappings come to on this kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// A miss takes no `mmap_lock` (Linux 6.19).
    Free,
    /// The removal of a marker takes `mmap_lock`, so that nothing is gained (Linux 6.15).
    Locked,
}

/// What this kernel can do.
///
/// # Errors
///
/// What it lacks.
pub fn support() -> Result<Support, &'static str> {
    static FOUND: OnceLock<Result<Support, &'static str>> = OnceLock::new();
    *FOUND.get_or_init(look)
}

fn look() -> Result<Support, &'static str> {
    const UNKNOWN: &str =
        "this kernel knows no guard markers in mappings of files; Linux 6.15 does";
    let version = text::kernel_version();
    if version.is_some_and(|version| version < (6, 15)) {
        return Err(UNKNOWN);
    }
    match scratch() {
        Ok(()) if version.is_some_and(frees_the_lock) => Ok(Support::Free),
        Ok(()) => Ok(Support::Locked),
        Err(Errno(libc::EINVAL)) => Err(UNKNOWN),
        Err(_) => Err("this kernel refuses guard markers in a mapping of a file"),
    }
}

/// Since when `MADV_GUARD_REMOVE` takes the VMA's own lock alone.
fn frees_the_lock(version: (u32, u32)) -> bool {
    version >= (6, 19)
}

/// Installs and removes a marker in a mapping that nobody else knows.
fn scratch() -> Result<(), Errno> {
    let fd = file::memory_file(c"faultless-guard", PAGE as u64)?;
    let made = mem::map_aside(PAGE, libc::PROT_READ, libc::MAP_SHARED, fd, 0);
    // SAFETY: made above; a mapping keeps the file.
    unsafe { file::close(fd) };
    let at = made?;
    // SAFETY: mapped just now, empty, and shown to nobody.
    let installed = unsafe { mem::install_guards(at, PAGE) };
    let removed = installed.and_then(|()| mem::remove_guards(at, PAGE));
    // SAFETY: as above.
    let _ = unsafe { mem::unmap(at, PAGE) };
    removed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_is_free_since_6_19() {
        let free = [(6, 15), (6, 18), (6, 19), (7, 0), (7, 3)].map(frees_the_lock);
        assert_eq!(free, [false, false, true, true, true]);
    }
}
