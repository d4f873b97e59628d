//! A map: bytes that are read as they are touched.

#![allow(unsafe_code, reason = "makes slices of mapped memory, discards ranges")]

use crate::api::advice::Advice;
use crate::api::backing::Backing;
use crate::api::pool::Pool;
use crate::base::error::Error;
use crate::base::process;
use crate::base::stats::Stats;
use crate::coherence::closing::{close, settle, unmap_live};
use crate::space::map_core::MapCore;
use faultless_sys::mem;
use std::fmt;
use std::ops::{Deref, RangeBounds};

/// A file, or another [`Source`](crate::Source), as memory: a `&[u8]` that is read as it is touched.
///
/// ```
/// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
/// # std::io::Write::write_all(&mut &file, &[7u8; 100_000])?;
/// # let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
/// # let reader = std::fs::File::open(path)?;
/// # drop(file);
/// use faultless::{ByteSize, Pool};
///
/// let pool = Pool::builder().memory(ByteSize::mib(64)).build()?;
/// let map = pool.map(&reader)?;
/// assert_eq!(map[99_999], 7); // a miss: read now, by this thread
/// let part = map.pin(5_000..6_000)?; // resident until dropped; a read error would be an Err
/// std::io::Write::write_all(&mut std::io::sink(), &part)?; // safe to hand to a system call
/// map.prefetch(..)?; // returns immediately
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # What a load can meet
///
/// * An absent page that cannot be had: the thread gets SIGBUS, as with mmap, after one line on stderr (or after
///   [`on_event`](crate::PoolBuilder::on_event) was told). [`pin`](Self::pin) returns the same as an error value. The causes are
///   a read error; a page beyond the end of a file that was truncated; a lease that was broken, because another process has opened
///   the file for writing (see [`OnBreak`](crate::OnBreak)); a budget that pinned and kept pages have used up for ten
///   seconds; and a map of the parent's in a forked child.
/// * A system call that is handed a pointer to a page which is not resident fails with `EFAULT`. Pin the range first.
/// * A thread that blocks SIGBUS and misses is killed by the kernel. Do not block SIGBUS.
pub struct Map {
    pub(crate) ptr: usize,
    pub(crate) len: usize,
    /// Bytes between the start of the region and the start of the map.
    pub(crate) head: usize,
    pub(crate) backing: Backing,
    pub(crate) pool: Pool,
}

impl fmt::Debug for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Map")
            .field("source", &self.name())
            .field("len", &self.len)
            .finish_non_exhaustive()
    }
}

impl Deref for Map {
    type Target = [u8];

    #[inline]
    fn deref(&self) -> &[u8] {
        // SAFETY: the range is mapped for as long as self lives; its bytes do not change, by the lease or by the
        // promise of the caller of `map_trusted`; an empty map has a dangling, aligned pointer.
        unsafe { std::slice::from_raw_parts(self.ptr as *const u8, self.len) }
    }
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Map {
    /// `len` bytes that begin `head` bytes behind the start of a region.
    pub(crate) fn new(pool: Pool, backing: Backing, head: usize, len: usize) -> Map {
        Map {
            ptr: backing.start() + head,
            len,
            head,
            backing,
            pool,
        }
    }

    pub(crate) fn empty(pool: Pool) -> Map {
        Map::new(pool, Backing::Empty, 0, 0)
    }

    /// The pool that the map belongs to.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Name of the source.
    pub fn name(&self) -> &str {
        self.backing.name()
    }

    /// Checks a range of the map, and turns it into bytes of the region.
    #[inline]
    pub(crate) fn range(
        &self,
        range: impl RangeBounds<usize>,
    ) -> Result<std::ops::Range<usize>, Error> {
        use std::ops::Bound::{Excluded, Included, Unbounded};
        let start = match range.start_bound() {
            Included(&s) => s,
            Excluded(&s) => s.saturating_add(1),
            Unbounded => 0,
        };
        let end = match range.end_bound() {
            Included(&e) => e.saturating_add(1),
            Excluded(&e) => e,
            Unbounded => self.len,
        };
        if start > end || end > self.len {
            return Err(Error::OutOfRange {
                start,
                end,
                len: self.len,
            });
        }
        Ok(self.head + start..self.head + end)
    }

    pub(crate) fn check_process(&self) -> Result<(), Error> {
        if process::forked() || process::pid() != self.pool.0.pid {
            Err(Error::Forked)
        } else {
            Ok(())
        }
    }

    /// Says how the map will be read from now on.
    pub fn advise(&self, advice: Advice) {
        if self.check_process().is_ok() {
            self.backing.advise(advice, &self.pool);
        }
    }

    /// Gives the memory of a range back now: of the units that lie wholly in it and are not pinned. They are read
    /// again when touched. (Of a live map, and on the mmap backend, the page cache keeps them.)
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; [`Error::Forked`].
    pub fn release(&self, range: impl RangeBounds<usize>) -> Result<(), Error> {
        let bytes = self.range(range)?;
        self.check_process()?;
        let (from_start, to_end) = (bytes.start <= self.head, bytes.end == self.head + self.len);
        if !bytes.is_empty() {
            self.backing.release(&bytes, from_start, to_end);
        }
        Ok(())
    }

    /// Whether a whole range is in memory, as far as is known: under memory pressure, the kernel may have taken cold
    /// pages back. `false` for ranges outside the map.
    pub fn is_resident(&self, range: impl RangeBounds<usize>) -> bool {
        let Ok(bytes) = self.range(range) else {
            return false;
        };
        if bytes.is_empty() || self.check_process().is_err() {
            return bytes.is_empty();
        }
        self.backing.is_resident(&bytes)
    }

    /// Whether guard markers were installed when it was made, so that they serve plain loads ([`MapOptions::markers`](crate::MapOptions::markers)).
    pub fn has_markers(&self) -> bool {
        matches!(&self.backing, Backing::Mmap(mmap) if mmap.has_markers())
    }

    /// What happened in the map so far. All zero on the mmap backend and of a live map, where the kernel does not tell; with
    /// [guard markers](Self::has_markers), [`misses`](Stats::misses) counts those of plain loads.
    pub fn stats(&self) -> Stats {
        self.backing.stats()
    }
}

impl Map {
    /// Takes the engine's part out of the map, which is empty from then on.
    pub(crate) fn take_core(&mut self) -> Option<&'static MapCore> {
        let core = self.backing.core()?;
        self.backing = Backing::Empty;
        Some(core)
    }

    /// The engine's part of the map.
    pub(crate) fn core(&self) -> Option<&'static MapCore> {
        self.backing.core()
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        let Some(core) = self.core() else {
            return;
        };
        if self.check_process().is_err() {
            // A forked child: the bar at the addresses stays, and all else is its parent's.
            return;
        }
        // SAFETY: `self` is the only owner, and is being dropped: nobody holds a slice.
        unsafe {
            let core = close(core);
            unmap_live(&core, |at, len| {
                let _ = mem::unmap(at, len);
            });
            settle(core);
        }
    }
}
