//! A map: bytes that are read as they are touched.

#![allow(unsafe_code, reason = "makes slices of mapped memory, discards ranges")]

use crate::api::advice::Advice;
use crate::api::pool::Pool;
use crate::base::error::Error;
use crate::base::process;
use crate::base::stats::Stats;
use crate::coherence::closing::{close, settle, unmap_live};
use crate::coherence::mmap::Mmap;
use crate::evict::release::release_units;
use crate::read::prefetch::{PART, Prefetch};
use crate::space::counters::Count;
use crate::space::map_core::{MapCore, Reading};
use crate::space::page::State;
use crate::space::streams::Mode;
use faultless_sys::mem;
use faultless_sys::mem::PAGE;
use std::fmt;
use std::ops::{Deref, RangeBounds};

pub(crate) enum Inner {
    Engine(&'static MapCore),
    Mmap(Mmap),
    Empty,
}

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
/// map.prefetch(..)?; // returns at once
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # What a load can meet
///
/// * A read error, or a page beyond the end of a file that was truncated: the process gets SIGBUS, as with mmap, after
///   one line on stderr. [`pin`](Self::pin) reports the same as an error value.
/// * A system call that is handed a pointer to a page which is not resident fails with `EFAULT`. Pin the range first.
/// * A thread that blocks SIGBUS and misses is killed by the kernel. Do not block SIGBUS.
pub struct Map {
    pub(crate) ptr: usize,
    pub(crate) len: usize,
    /// Bytes between the start of the region and the start of the map.
    pub(crate) head: usize,
    pub(crate) inner: Inner,
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
    pub(crate) fn empty(pool: Pool) -> Map {
        Map {
            ptr: std::ptr::dangling::<u8>() as usize,
            len: 0,
            head: 0,
            inner: Inner::Empty,
            pool,
        }
    }

    pub(crate) fn engine(pool: Pool, core: &'static MapCore, head: usize, len: usize) -> Map {
        Map {
            ptr: core.start + head,
            len,
            head,
            inner: Inner::Engine(core),
            pool,
        }
    }

    pub(crate) fn mmap(pool: Pool, mmap: Mmap, head: usize, len: usize) -> Map {
        Map {
            ptr: mmap.range.start + head,
            len,
            head,
            inner: Inner::Mmap(mmap),
            pool,
        }
    }

    /// The pool that the map belongs to.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Name of the source.
    pub fn name(&self) -> &str {
        match &self.inner {
            Inner::Engine(core) => &core.name,
            Inner::Mmap(mmap) => &mmap.name,
            Inner::Empty => "an empty source",
        }
    }

    /// Checks a range of the map, and turns it into bytes of the region.
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

    /// Asks for a range to be read soon, and returns at once. Parts for which there is no room are dropped (counted in
    /// [`Stats::prefetch_dropped`]).
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; [`Error::Kernel`] if the worker threads cannot be started; [`Error::Forked`].
    pub fn prefetch(&self, range: impl RangeBounds<usize>) -> Result<(), Error> {
        let bytes = self.range(range)?;
        self.check_process()?;
        if bytes.is_empty() {
            return Ok(());
        }
        match &self.inner {
            Inner::Empty => {}
            Inner::Mmap(mmap) => {
                let start = bytes.start & !(PAGE - 1);
                mmap.advise(start, bytes.end - start, libc::MADV_WILLNEED);
            }
            Inner::Engine(core) => {
                let workers = &self.pool.0.workers;
                workers
                    .all(&core.pool)
                    .map_err(|e| Error::kernel("cannot start worker threads", e))?;
                let end = (core.unit_of(core.start + bytes.end - 1) + 1).min(core.data_units());
                let step = (PART >> core.unit_shift).max(1);
                let mut unit = core.unit_of(core.start + bytes.start);
                while unit < end {
                    let count = step.min(end - unit);
                    let job = Prefetch {
                        id: core.id,
                        serial: core.serial,
                        unit,
                        count,
                    };
                    if !workers.prefetch(&core.pool, job) {
                        core.counters
                            .add(Count::PrefetchDropped, (end - unit).div_ceil(step));
                        break;
                    }
                    unit += count;
                }
            }
        }
        Ok(())
    }

    /// Says how the map will be read from now on.
    pub fn advise(&self, advice: Advice) {
        match &self.inner {
            Inner::Empty => {}
            Inner::Mmap(mmap) => {
                let advice = match advice {
                    Advice::Normal => libc::MADV_NORMAL,
                    Advice::Random => libc::MADV_RANDOM,
                    Advice::Sequential => libc::MADV_SEQUENTIAL,
                };
                mmap.advise(0, mmap.range.len, advice);
            }
            Inner::Engine(core) => {
                if self.check_process().is_err() {
                    return;
                }
                let mode = match advice {
                    Advice::Random => Mode::Off,
                    // A user's code is not called for a guess.
                    Advice::Normal if matches!(core.reading, Reading::Source { .. }) => Mode::Off,
                    Advice::Normal => Mode::Detect,
                    Advice::Sequential => Mode::Eager,
                };
                // Without threads that could read ahead, nothing is read ahead.
                let ready = mode == Mode::Off || self.pool.0.workers.all(&core.pool).is_ok();
                core.streams.set_mode(if ready { mode } else { Mode::Off });
            }
        }
    }

    /// Gives the memory of a range back now: of the units that lie wholly in it and are not pinned. They are read
    /// again when touched.
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; [`Error::Forked`].
    pub fn release(&self, range: impl RangeBounds<usize>) -> Result<(), Error> {
        let bytes = self.range(range)?;
        self.check_process()?;
        match &self.inner {
            Inner::Empty => {}
            Inner::Mmap(mmap) => {
                let (start, end) = (bytes.start.next_multiple_of(PAGE), bytes.end & !(PAGE - 1));
                if start < end {
                    mmap.release(start, end - start);
                }
            }
            Inner::Engine(core) => {
                let unit = core.unit_bytes() as usize;
                // The last unit is wholly inside if the range reaches the end of the map.
                let to_end = bytes.end == self.head + self.len;
                let first = bytes.start.div_ceil(unit);
                let first = if bytes.start <= self.head { 0 } else { first };
                let end = if to_end {
                    bytes.end.div_ceil(unit)
                } else {
                    bytes.end / unit
                };
                release_units(core, first as u64..(end as u64).min(core.data_units()));
            }
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
        match &self.inner {
            Inner::Empty => true,
            Inner::Mmap(mmap) => {
                let start = bytes.start & !(PAGE - 1);
                mmap.is_resident(start, bytes.end - start)
            }
            Inner::Engine(core) => {
                let mut units = core.unit_of(core.start + bytes.start)
                    ..core.unit_of(core.start + bytes.end - 1) + 1;
                units.all(|u| {
                    let word = core.page(u).load();
                    word.state() == State::Resident || word.cool()
                })
            }
        }
    }

    /// What happened in the map so far. All zero on the mmap backend, where the kernel does not tell.
    pub fn stats(&self) -> Stats {
        match &self.inner {
            Inner::Engine(core) => core.counters.snapshot(),
            _ => Stats::default(),
        }
    }
}

impl Map {
    /// Takes the engine's part out of the map, which is empty from then on.
    pub(crate) fn take_core(&mut self) -> Option<&'static MapCore> {
        match std::mem::replace(&mut self.inner, Inner::Empty) {
            Inner::Engine(core) => Some(core),
            other => {
                self.inner = other;
                None
            }
        }
    }

    /// The engine's part of the map.
    pub(crate) fn core(&self) -> Option<&'static MapCore> {
        match &self.inner {
            Inner::Engine(core) => Some(core),
            _ => None,
        }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        let Inner::Engine(core) = &self.inner else {
            return;
        };
        let core: &'static MapCore = core;
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
