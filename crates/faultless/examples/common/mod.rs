//! What the examples that measure something share: a file whose bytes can be checked, without its pages in the page cache.

#![allow(dead_code, reason = "not every example uses all of it")]

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::fd::AsRawFd;
use std::time::Duration;
use tempfile::NamedTempFile;

pub(crate) const PAGE: usize = 4096;

/// Makes a file of so many pages in the current directory. Page `n` consists of words that are [`word`]`(n)`.
pub(crate) fn make(pages: usize) -> Result<NamedTempFile, Box<dyn Error>> {
    let made = NamedTempFile::new_in(".")?;
    let mut to = BufWriter::with_capacity(1 << 20, made.as_file());
    for page in 0..pages {
        to.write_all(&word(page).to_le_bytes().repeat(PAGE / 8))?;
    }
    to.flush()?;
    drop(to);
    made.as_file().sync_all()?;
    Ok(made)
}

/// The word of which page `n` consists.
pub(crate) fn word(page: usize) -> u64 {
    (page as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// Checks whole pages, the first of which is page `first` of the file.
pub(crate) fn check(bytes: &[u8], first: usize) {
    for (i, page) in bytes.chunks(PAGE).enumerate() {
        let expected = word(first + i).to_le_bytes();
        assert!(page.chunks(8).all(|word| word == expected), "wrong bytes");
    }
}

/// Takes the file's pages out of the page cache.
pub(crate) fn evict_cache(file: &File) {
    // SAFETY: advice on a descriptor that is open.
    #[allow(unsafe_code, reason = "gives advice")]
    unsafe {
        libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED);
    }
}

/// The median of some times.
pub(crate) fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
