//! `PAGEMAP_SCAN` (Linux 6.7): which pages of a process are in memory. Checkpoints and estimators of working sets ask that.

#![allow(unsafe_code, reason = "an ioctl with a structure that has addresses")]

use faultless_untrusted::printable;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// `struct page_region` of `linux/fs.h`: neighbouring pages of the same kinds.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = 0xC060_6610;
const _: () = assert!(size_of::<Scan>() == 0x60);
/// `PAGE_IS_PRESENT`.
const PRESENT: u64 = 1 << 3;

/// A process's page tables.
pub(crate) struct Pagemap(File);

impl Pagemap {
    /// Opens those of a process.
    pub(crate) fn open(pid: u32) -> io::Result<Self> {
        let path = format!("/proc/{pid}/pagemap");
        File::open(&path)
            .map(Pagemap)
            .map_err(|e| io::Error::new(e.kind(), format!("cannot open {}: {e}", printable(&path))))
    }

    /// Counts the pages that are in memory. The kernel has `mmap_lock` for reading while it looks.
    pub(crate) fn present(&self) -> io::Result<u64> {
        let mut regions = [Region::default(); 1024];
        // (No user memory lies above, on x86-64 with four levels; nor on arm64.)
        let end = (1 << 47) - 4096;
        let (mut at, mut count) = (0, 0);
        while at < end {
            let mut scan = Scan {
                size: size_of::<Scan>() as u64,
                start: at,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                category_mask: PRESENT,
                return_mask: PRESENT,
                ..Scan::default()
            };
            // SAFETY: the structure is the ioctl's, and names an array of so many regions, which outlives the call.
            let found = unsafe { libc::ioctl(self.0.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
            let found = usize::try_from(found).map_err(|_| {
                let e = io::Error::last_os_error();
                io::Error::new(e.kind(), format!("PAGEMAP_SCAN is refused: {e}"))
            })?;
            let pages = |r: &Region| (r.end - r.start) / 4096;
            count += regions.iter().take(found).map(pages).sum::<u64>();
            // (It has walked to the end, or to where the array was full.)
            at = scan.walk_end.max(at + 1);
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_were_touched_are_counted_where_the_kernel_counts() {
        let pagemap = Pagemap::open(std::process::id()).expect("one's own");
        match pagemap.present() {
            Ok(before) => {
                let touched = vec![1u8; 8 << 20];
                let now = pagemap.present().expect("as before");
                assert!(before > 100 && now >= before + 1500, "{before} {now}");
                drop(touched);
            }
            Err(e) => assert!(e.to_string().contains("PAGEMAP_SCAN"), "{e}"),
        }
    }
}
