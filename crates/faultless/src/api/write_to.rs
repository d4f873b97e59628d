//! Writing a part of a map to a file, a socket, or whatever takes bytes.

use crate::api::map::Map;
use std::io::{self, Write};
use std::ops::RangeBounds;

/// Bytes that are pinned at a time.
const PIECE: usize = 1 << 20;

impl Map {
    /// Writes a range of the map, piece by piece: each is pinned while it is written, so that no system call meets EFAULT and no thread
    /// SIGBUS, and the next is read meanwhile. Returns how many bytes were written: all of the range.
    ///
    /// ```
    /// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
    /// # std::io::Write::write_all(&mut &file, &[7u8; 100_000])?;
    /// # let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    /// # let reader = std::fs::File::open(path)?;
    /// # drop(file);
    /// let pool = faultless::Pool::builder().memory(faultless::ByteSize::mib(64)).build()?;
    /// let map = pool.map(&reader)?;
    /// let (mut out, to) = std::io::pipe()?;
    /// let written = map.write_to(to, 1_000..21_000)?;
    /// assert_eq!(written, 20_000);
    /// # let mut all = Vec::new();
    /// # std::io::Read::read_to_end(&mut out, &mut all)?;
    /// # assert_eq!(all, [7; 20_000]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The writer's, or [`pin`](Self::pin)'s as an [`io::Error`] (whose inner error is the [`Error`](crate::Error)). What was written
    /// before stays written.
    pub fn write_to(
        &self,
        mut writer: impl Write,
        range: impl RangeBounds<usize>,
    ) -> io::Result<u64> {
        let bytes = self.range(range)?;
        let bytes = bytes.start - self.head..bytes.end - self.head;
        // (A pin may have no room for more.)
        let piece = (self.pool.budget().get() / 16).clamp(1 << 16, PIECE as u64) as usize;
        let end = |from: usize| (from + piece).min(bytes.end);
        let mut at = bytes.start;
        while at < bytes.end {
            let next = end(at);
            if next < bytes.end {
                // Advice: what it does not bring, the next pin does.
                let _ = self.prefetch(next..end(next));
            }
            writer.write_all(&self.pin(at..next)?)?;
            at = next;
        }
        Ok((bytes.end - bytes.start) as u64)
    }
}
