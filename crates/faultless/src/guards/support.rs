//! Whether this kernel can serve live mappings, and what that gains.

use faultless_sys::mem::{PAGE, kernel_page_size};
use std::sync::OnceLock;

/// What live mappings come to on this kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Support {
    /// A miss takes no `mmap_lock` (Linux 6.19).
    Free,
    /// The removal of a marker takes `mmap_lock`, so that nothing is gained (Linux 6.15).
    Locked,
}

/// What this kernel can do, by its version: nothing is tried, so that any process may ask at any time. (A kernel that refuses after
/// all says so when the first markers are installed.)
///
/// # Errors
///
/// What it lacks.
pub fn support() -> Result<Support, &'static str> {
    static FOUND: OnceLock<Option<(u32, u32)>> = OnceLock::new();
    let version = *FOUND.get_or_init(faultless_sys::raw::kernel_version);
    judge(version, kernel_page_size())
}

fn judge(version: Option<(u32, u32)>, page: usize) -> Result<Support, &'static str> {
    match version {
        _ if page != PAGE => Err("the pages of this kernel are larger than 4 KiB"),
        // Since when `MADV_GUARD_REMOVE` takes the VMA's own lock alone.
        Some(version) if version >= (6, 19) => Ok(Support::Free),
        Some(version) if version >= (6, 15) => Ok(Support::Locked),
        _ => Err("this kernel knows no guard markers in mappings of files; Linux 6.15 does"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_known_since_6_15_and_free_the_lock_since_6_19() {
        let old = [None, Some((6, 1)), Some((6, 14))].map(|v| judge(v, PAGE));
        assert!(old.iter().all(Result::is_err));
        let locked = [(6, 15), (6, 18)].map(|v| judge(Some(v), PAGE));
        assert_eq!(locked, [Ok(Support::Locked); 2]);
        let free = [(6, 19), (7, 0), (7, 3)].map(|v| judge(Some(v), PAGE));
        assert_eq!(free, [Ok(Support::Free); 3]);
        assert!(
            judge(Some((7, 3)), 64 << 10).is_err(),
            "an arm64 kernel with large pages"
        );
    }
}
