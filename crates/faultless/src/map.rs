//! Maps: how they are made, used and dropped.

#![allow(unsafe_code, reason = "makes slices of mapped memory, discards ranges")]

use crate::bytes::Bytes;
use crate::error::{Error, LeaseRefusal};
use crate::evict::{collect_group, settle_evicted};
use crate::fault::core::{MapCore, Reading};
use crate::fault::counters::{Count, Counters, Stats};
use crate::fault::fill::{self, Need};
use crate::fault::page::State;
use crate::fault::process;
use crate::fault::registry::{self, GRANULE};
use crate::fault::report::Fault;
use crate::fault::table::{GROUP, Table};
use crate::keeper;
use crate::lease::{self, OnBreak};
use crate::plain::Plain;
use crate::pool::{Engine, Pool, own};
use crate::source::{self, Source};
use crate::workers::{Job, PART, with_pieces};
use faultless_sys::mem::{self, PAGE};
use faultless_sys::{file, futex, signal, uffd};
use std::fmt;
use std::ops::{Deref, RangeBounds};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

/// Largest fill unit.
const UNIT_MAX: usize = 2 << 20;
/// What one miss reads under [`Advice::Sequential`].
const SEQUENTIAL_BYTES: usize = 256 * 1024;
/// Serial number of the next map.
static NEXT_SERIAL: AtomicU64 = AtomicU64::new(1);

/// Largest map: more than 48 bits of address space cannot be reserved.
const LEN_MAX: u64 = 1 << 46;

/// How a map will be read. As with `madvise`, it never changes what is read, only how soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Advice {
    /// Nothing is known: a miss fills one unit.
    #[default]
    Normal,
    /// Here and there: a miss fills one unit.
    Random,
    /// In order: a miss fills up to 256 KiB from the unit on.
    Sequential,
}

/// How files are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Reads {
    /// Directly where the file system can, buffered where it cannot: the pool's budget is the cache, and a second copy
    /// of the same bytes in the page cache would only take memory.
    #[default]
    Auto,
    /// Directly (`O_DIRECT`), or not at all.
    Direct,
    /// Through the page cache: right where other processes read the same file in other ways, or keep it cached.
    Buffered,
}

/// How a map is made.
///
/// ```
/// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
/// # std::io::Write::write_all(&mut &file, &[7u8; 100_000])?;
/// use faultless::{Advice, Bytes, Pool};
///
/// let pool = Pool::builder().memory(Bytes::mib(64)).build()?;
/// // SAFETY: nobody writes to the file while the map lives.
/// let map = unsafe {
///     pool.options().offset(10_000).len(50_000).unit(Bytes::kib(16)).advice(Advice::Random).map_trusted(file)
/// }?;
/// assert_eq!(map.len(), 50_000);
/// assert!(map.iter().all(|&b| b == 7));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct MapOptions {
    pool: Pool,
    offset: u64,
    len: Option<usize>,
    unit: Bytes,
    advice: Advice,
    reads: Reads,
    on_break: OnBreak,
}

impl MapOptions {
    pub(crate) fn new(pool: &Pool) -> Self {
        MapOptions {
            pool: pool.clone(),
            offset: 0,
            len: None,
            unit: Bytes::new(PAGE as u64),
            advice: Advice::Normal,
            reads: Reads::Auto,
            on_break: OnBreak::Snapshot,
        }
    }

    /// Where in the source the map begins, in bytes; any value. 0 by default.
    pub fn offset(mut self, offset: u64) -> Self {
        self.offset = offset;
        self
    }

    /// Length of the map in bytes. By default, up to the end of the source. As with mmap, a map may reach beyond the
    /// end; pages that lie wholly beyond it cannot be read.
    pub fn len(mut self, len: usize) -> Self {
        self.len = Some(len);
        self
    }

    /// What one miss reads: a power of two from 4 KiB (the default) to 2 MiB.
    pub fn unit(mut self, unit: Bytes) -> Self {
        self.unit = unit;
        self
    }

    /// How the map will be read; see [`Map::advise`].
    pub fn advice(mut self, advice: Advice) -> Self {
        self.advice = advice;
        self
    }

    /// How a file is read: directly or through the page cache.
    pub fn reads(mut self, reads: Reads) -> Self {
        self.reads = reads;
        self
    }

    /// What happens when somebody opens the file of a safe map for writing.
    pub fn on_break(mut self, what: OnBreak) -> Self {
        self.on_break = what;
        self
    }

    fn check(&self) -> Result<(), Error> {
        let unit = self.unit.get();
        if !unit.is_power_of_two() || !(PAGE as u64..=UNIT_MAX as u64).contains(&unit) {
            return Err(Error::InvalidOption {
                what: "the fill unit",
                value: self.unit.to_string(),
                remedy: "choose a power of two from 4 KiB to 2 MiB",
            });
        }
        if process::forked() || process::pid() != self.pool.0.pid {
            return Err(Error::Forked);
        }
        Ok(())
    }

    /// Bytes from the offset to the end of the map, and to the end of the source.
    fn extent(&self, source_len: u64, name: &str) -> Result<(usize, u64), Error> {
        let rest = source_len.saturating_sub(self.offset);
        let len = self.len.map_or(rest, |l| l as u64);
        if len > LEN_MAX || self.offset > i64::MAX as u64 - LEN_MAX {
            return Err(Error::InvalidOption {
                what: "the length of the map",
                value: format!("{len} bytes from offset {} of {name}", self.offset),
                remedy: "map at most 64 TiB at once",
            });
        }
        if self.offset > source_len {
            return Err(Error::InvalidOption {
                what: "the offset of the map",
                value: self.offset.to_string(),
                remedy: "it lies behind the end of the source; choose a smaller one",
            });
        }
        Ok((len as usize, rest))
    }

    /// Maps a file safely.
    ///
    /// The map takes a read lease (`fcntl(2)`, `F_SETLEASE`): the kernel grants it while nobody has the file open for
    /// writing, and holds back who wants to, until the map has done what [`on_break`](Self::on_break) says. So the
    /// bytes of the map never change, and a `&[u8]` of it is sound.
    ///
    /// The descriptor is not kept: the file is opened anew for reading.
    ///
    /// # Errors
    ///
    /// [`Error::Lease`] where no lease can be had: a writer, a file of another owner, a file system that does not
    /// honour leases. [`Error::InvalidOption`], [`Error::TooManyMaps`], [`Error::Kernel`].
    pub fn map(&self, file: impl AsFd) -> Result<Map, Error> {
        let file = file.as_fd();
        let name = source::file_name(file);
        lease::check_file(file.as_raw_fd()).map_err(|r| lease::error(&name, r))?;
        self.map_file(file, name, true)
    }

    /// Maps a source for whose bytes the caller vouches: a file that cannot be leased, or anything that implements
    /// [`Source`].
    ///
    /// # Safety
    ///
    /// The bytes of the source must not change while the map lives: the map hands them out as `&[u8]`.
    ///
    /// # Errors
    ///
    /// [`Error::Read`] if the source does not tell its length; [`Error::InvalidOption`], [`Error::TooManyMaps`],
    /// [`Error::Kernel`]. On the mmap backend, a source that is no file is read into memory at once, and
    /// [`Error::BudgetExhausted`] says that it is larger than the budget.
    pub unsafe fn map_trusted(&self, source: impl Source) -> Result<Map, Error> {
        if let Some(fd) = source.file() {
            return self.map_file(fd, source.name(), false);
        }
        self.map_source(Arc::new(source))
    }

    fn map_source(&self, source: Arc<dyn Source>) -> Result<Map, Error> {
        self.check()?;
        let name = source.name();
        let align = source.alignment();
        if !align.is_power_of_two() || align > UNIT_MAX {
            return Err(Error::InvalidOption {
                what: "the alignment of the source",
                value: align.to_string(),
                remedy: "it must be a power of two, at most 2 MiB",
            });
        }
        let source_len = source.len().map_err(|error| Error::Read {
            name: name.clone(),
            offset: 0,
            error,
        })?;
        let (len, rest) = self.extent(source_len, &name)?;
        if len == 0 {
            return Ok(Map::empty(self.pool.clone(), name));
        }
        let unit = self.unit.get().max(align as u64);
        let head = (self.offset % (PAGE.max(align)) as u64) as usize;
        let base = self.offset - head as u64;
        let Some(engine) = &self.pool.0.engine else {
            let whole = (head + len).next_multiple_of(PAGE);
            if whole as u64 > self.pool.budget().get() {
                return Err(Error::BudgetExhausted {
                    budget: self.pool.budget(),
                });
            }
            let plain = Plain::copy(&*source, name, base, whole)?;
            return Ok(Map::plain(self.pool.clone(), plain, head, len));
        };
        self.pool
            .0
            .workers
            .ensure_fillers(&engine.core, self.pool.0.fill_threads)
            .map_err(|e| Error::kernel("cannot start fill threads", e))?;
        let data_len = head as u64 + rest;
        self.engine_map(
            engine,
            Reading::Source {
                source,
                align: align as u64,
            },
            name,
            base,
            head,
            len,
            data_len,
            unit,
        )
    }

    fn map_file(&self, file: BorrowedFd<'_>, name: String, leased: bool) -> Result<Map, Error> {
        self.check()?;
        let cannot = |what: &str, e| Error::kernel(format!("cannot {what} {name}"), e);
        let status = file::status(file.as_raw_fd()).map_err(|e| cannot("stat", e))?;
        if status.mode & libc::S_IFMT != libc::S_IFREG {
            return Err(lease::error(
                &name,
                LeaseRefusal::NotRegular {
                    kind: "not a regular file",
                },
            ));
        }
        let (len, _) = self.extent(status.len, &name)?;
        if len == 0 {
            return Ok(Map::empty(self.pool.clone(), name));
        }
        let fd = self.open(file, &name)?;
        let id = status.id;
        let fd = keeper::adopt(fd).map_err(|e| Error::kernel("cannot share a descriptor", e))?;
        let head = (self.offset % PAGE as u64) as usize;
        let base = self.offset - head as u64;
        let Some(engine) = &self.pool.0.engine else {
            let whole = (head + len).next_multiple_of(PAGE);
            let lease = leased.then(|| (self.on_break, self.pool.budget().get()));
            let plain = Plain::file(fd, id, name, base, whole, lease)?;
            let map = Map::plain(self.pool.clone(), plain, head, len);
            map.advise(self.advice);
            return Ok(map);
        };
        let reading = Reading::File { fd, id, leased };
        // Under a lease the length is asked again: it cannot change any more.
        let unit = self.unit.get();
        let data_len = head as u64 + status.len.saturating_sub(self.offset);
        let map = self.engine_map(engine, reading, name, base, head, len, data_len, unit)?;
        if leased {
            map.take_lease(self.on_break, status.len)
        } else {
            Ok(map)
        }
    }

    /// Opens the file anew, for reading, directly where that is wanted and works.
    fn open(&self, file: BorrowedFd<'_>, name: &str) -> Result<std::os::fd::OwnedFd, Error> {
        let buffered = || {
            lease::reopen(file.as_raw_fd(), false)
                .map(own)
                .map_err(|e| Error::kernel(format!("cannot open {name} for reading"), e))
        };
        // On the kernel's mmap, direct I/O has no meaning.
        if self.reads == Reads::Buffered || self.pool.0.engine.is_none() {
            return buffered();
        }
        match lease::reopen(file.as_raw_fd(), true).map(own) {
            Ok(fd) if lease::direct_works(fd.as_raw_fd()) => Ok(fd),
            refused => {
                // Closing it would drop the program's POSIX locks: it is switched to buffered reads instead.
                if self.reads == Reads::Direct {
                    if let Ok(fd) = refused {
                        retire(fd);
                    }
                    return Err(Error::InvalidOption {
                        what: "the way to read",
                        value: format!("direct, for {name}"),
                        remedy: "its file system does not read 4 KiB directly; choose Reads::Auto or Reads::Buffered",
                    });
                }
                match refused {
                    Ok(fd) => file::clear_direct(fd.as_raw_fd())
                        .map(|()| fd)
                        .map_err(|e| {
                            Error::kernel(format!("cannot read {name} through the page cache"), e)
                        }),
                    Err(_) => buffered(),
                }
            }
        }
    }

    #[allow(
        clippy::too_many_arguments,
        reason = "the parts of one structure, assembled in one place"
    )]
    fn engine_map(
        &self,
        engine: &Engine,
        reading: Reading,
        name: String,
        base: u64,
        head: usize,
        len: usize,
        data_len: u64,
        unit: u64,
    ) -> Result<Map, Error> {
        let reserved = crate::pool::check_units(self.pool.budget(), unit)
            .and_then(|()| crate::pool::install_handler())
            .and_then(|()| self.reserve(engine, &name, head + len, unit))
            .and_then(|parts| {
                let id = registry::reserve(&(parts.0.start..parts.0.start + parts.0.len))
                    .map_err(|e| Error::kernel("cannot reserve memory for the map's index", e))?;
                Ok((id.ok_or(Error::TooManyMaps(registry::MAPS_MAX))?, parts))
            });
        let (id, (region, table)) = match reserved {
            Ok(parts) => parts,
            Err(e) => {
                retire_reading(reading);
                return Err(e);
            }
        };
        engine.core.unit_max.fetch_max(unit, Ordering::Relaxed);
        engine.core.budget.charge_anyway(table.fixed_bytes());
        let core = registry::open(Box::new(MapCore {
            id,
            serial: NEXT_SERIAL.fetch_add(1, Ordering::Relaxed),
            pool: engine.core.clone(),
            start: region.start,
            region_len: region.len,
            base,
            // Bytes that can be read: as far as both the map and the source go.
            data_len: data_len.min((head + len) as u64),
            unit_shift: unit.trailing_zeros(),
            table,
            reading,
            name: name.into_boxed_str(),
            pid: process::pid(),
            refusal: AtomicU8::new(0),
            lease: std::sync::OnceLock::new(),
            keep_all: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            run_units: AtomicU32::new(1),
            counters: Counters::new(),
        }));
        std::mem::forget(region);
        let map = Map {
            ptr: core.start + head,
            len,
            head,
            inner: Inner::Engine(core),
            pool: self.pool.clone(),
        };
        map.advise(self.advice);
        Ok(map)
    }

    /// Reserves and arms address space for `span` bytes, with a table of its units.
    fn reserve(
        &self,
        engine: &Engine,
        name: &str,
        span: usize,
        unit: u64,
    ) -> Result<(Region, Table), Error> {
        let failed = |e: std::io::Error| {
            Error::kernel(format!("cannot reserve address space for {name}"), e)
        };
        let region = Region::new(span).map_err(failed)?;
        let units = (region.len as u64).div_ceil(unit);
        let table = Table::new(units).map_err(failed)?;
        if table.fixed_bytes() > self.pool.budget().get() / 4 {
            return Err(Error::InvalidOption {
                what: "the memory budget",
                value: format!(
                    "{}, for a map of {}",
                    self.pool.budget(),
                    Bytes::new(span as u64)
                ),
                remedy: "the map's page counters alone would take a quarter of it; give it more, or choose a larger unit",
            });
        }
        let refused = |e: faultless_sys::Errno| {
            Error::kernel(format!("cannot register the map of {name}"), e)
        };
        let fd = &engine.core.uffd;
        let mut number = fd.get();
        // SAFETY: the region was mapped just now and is ours.
        let mut armed = unsafe { uffd::register(number, region.start, region.len) };
        if let Err(faultless_sys::Errno(libc::EBADF | libc::ENOTTY | libc::EPERM)) = armed {
            // The program closed it: fetch it again.
            number = fd.recover(number).map_err(refused)?;
            // SAFETY: as above.
            armed = unsafe { uffd::register(number, region.start, region.len) };
        }
        armed.map_err(refused)?;
        // SAFETY: ours, armed, and nobody has a reference into it yet.
        unsafe { mem::protect(region.start, region.len, libc::PROT_READ) }.map_err(refused)?;
        Ok((region, table))
    }
}

fn retire(fd: std::os::fd::OwnedFd) {
    let id = file::status(fd.as_raw_fd()).map(|s| s.id);
    if let (Ok(fd), Ok(id)) = (keeper::adopt(fd), id) {
        keeper::retire(fd, id);
    }
}

fn retire_reading(reading: Reading) {
    if let Reading::File { fd, id, .. } = reading {
        keeper::retire(fd, id);
    }
}

/// A range of address space, aligned to granules, unmapped when dropped.
struct Region {
    start: usize,
    len: usize,
}

impl Region {
    fn new(bytes: usize) -> std::io::Result<Self> {
        let len = bytes.next_multiple_of(GRANULE);
        // Without access until it is armed: under mlockall the kernel would fill it with zeros at once.
        let raw = mem::map_reserved(len + GRANULE)?;
        let start = raw.next_multiple_of(GRANULE);
        // SAFETY: the parts before and behind the aligned range are ours, and nobody knows them.
        unsafe {
            if start > raw {
                let _ = mem::unmap(raw, start - raw);
            }
            let end = raw + len + GRANULE;
            if end > start + len {
                let _ = mem::unmap(start + len, end - start - len);
            }
        }
        let region = Region { start, len };
        // SAFETY: ours; no contents yet.
        unsafe {
            mem::madvise(start, len, libc::MADV_DONTFORK)?;
            mem::madvise(start, len, libc::MADV_DONTDUMP)?;
            let _ = mem::madvise(start, len, libc::MADV_NOHUGEPAGE);
        }
        Ok(region)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: ours; a Region is forgotten once it became a map.
        let _ = unsafe { mem::unmap(self.start, self.len) };
    }
}

enum Inner {
    Engine(&'static MapCore),
    Plain(Plain),
    Empty,
}

/// A file, or another [`Source`], as memory: a `&[u8]` that is read as it is touched.
///
/// ```
/// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
/// # std::io::Write::write_all(&mut &file, &[7u8; 100_000])?;
/// # let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
/// # let reader = std::fs::File::open(path)?;
/// # drop(file);
/// use faultless::{Bytes, Pool};
///
/// let pool = Pool::builder().memory(Bytes::mib(64)).build()?;
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
    ptr: usize,
    len: usize,
    /// Bytes between the start of the region and the start of the map.
    head: usize,
    inner: Inner,
    pool: Pool,
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
    fn empty(pool: Pool, _name: String) -> Map {
        Map {
            ptr: std::ptr::dangling::<u8>() as usize,
            len: 0,
            head: 0,
            inner: Inner::Empty,
            pool,
        }
    }

    fn plain(pool: Pool, plain: Plain, head: usize, len: usize) -> Map {
        Map {
            ptr: plain.range.start + head,
            len,
            head,
            inner: Inner::Plain(plain),
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
            Inner::Plain(plain) => &plain.name,
            Inner::Empty => "an empty source",
        }
    }

    fn take_lease(self, what: OnBreak, len_before: u64) -> Result<Map, Error> {
        let Inner::Engine(core) = &self.inner else {
            return Ok(self);
        };
        let Reading::File { fd, .. } = &core.reading else {
            return Ok(self);
        };
        self.pool
            .0
            .workers
            .ensure(1)
            .map_err(|e| Error::kernel("cannot start a worker thread", e))?;
        let (id, serial, workers) = (core.id, core.serial, self.pool.0.workers.clone());
        let on_break = Box::new(move || {
            workers.push(Job::LeaseBreak { id, serial, what });
        });
        let id = keeper::lease(fd, on_break)
            .map_err(|e| Error::kernel("cannot reach the keeper thread", e))?
            .map_err(|e| lease::error(&core.name, lease::refusal(e)))?;
        let _ = core.lease.set(id);
        // Somebody may have truncated it between the look at its length and the lease.
        match file::status(fd.get()) {
            Ok(st) if st.len == len_before => Ok(self),
            Ok(_) => Err(lease::error(&core.name, LeaseRefusal::OpenForWriting)),
            Err(e) => Err(Error::kernel(format!("cannot stat {}", core.name), e)),
        }
    }

    /// Checks a range of the map, and turns it into bytes of the region.
    fn range(&self, range: impl RangeBounds<usize>) -> Result<std::ops::Range<usize>, Error> {
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

    fn check_process(&self) -> Result<(), Error> {
        if process::forked() || process::pid() != self.pool.0.pid {
            Err(Error::Forked)
        } else {
            Ok(())
        }
    }

    /// Makes a range resident and keeps it so until the result is dropped. The bytes may then be handed to system
    /// calls, and touching them never faults. (On the mmap backend the range is read in; it stays as long as memory lasts,
    /// and system calls take it in either way.)
    ///
    /// # Errors
    ///
    /// [`Error::OutOfRange`]; [`Error::Read`], [`Error::PastEnd`], [`Error::LeaseBroken`] if a page cannot be read;
    /// [`Error::BudgetExhausted`] if the budget has no room for it beside what is pinned already (after up to ten
    /// seconds without any progress, or at once if the range is larger than the budget); [`Error::Forked`].
    pub fn pin(&self, range: impl RangeBounds<usize>) -> Result<Pinned<'_>, Error> {
        let bytes = self.range(range)?;
        self.check_process()?;
        let slice = (self.ptr - self.head + bytes.start, bytes.len());
        let mut pinned = Pinned {
            map: self,
            slice,
            first: 0,
            end: 0,
        };
        if bytes.is_empty() {
            return Ok(pinned);
        }
        match &self.inner {
            Inner::Empty => {}
            Inner::Plain(plain) => {
                let (start, end) = (bytes.start & !(PAGE - 1), bytes.end.next_multiple_of(PAGE));
                plain
                    .populate(start, end - start)
                    .map_err(|error| Error::Read {
                        name: plain.name.clone(),
                        offset: bytes.start as u64,
                        error,
                    })?;
            }
            Inner::Engine(core) => {
                let units = core.unit_of(core.start + bytes.start)
                    ..core.unit_of(core.start + bytes.end - 1) + 1;
                let budget = self.pool.budget();
                if (units.end - units.start).saturating_mul(core.unit_bytes()) > budget.get() {
                    return Err(Error::BudgetExhausted { budget });
                }
                if bytes.end as u64 > core.data_len.next_multiple_of(PAGE as u64) {
                    return Err(Error::PastEnd {
                        name: core.name.to_string(),
                        offset: core.base + core.data_len.next_multiple_of(PAGE as u64),
                    });
                }
                pinned.first = units.start;
                pinned.end = units.start;
                for unit in units {
                    pin_unit(core, unit).map_err(|fault| {
                        let offset = core.base + (unit << core.unit_shift);
                        Error::from_fault(fault, &core.name, offset, budget)
                    })?;
                    pinned.end = unit + 1;
                }
            }
        }
        Ok(pinned)
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
            Inner::Plain(plain) => {
                let start = bytes.start & !(PAGE - 1);
                plain.advise(start, bytes.end - start, libc::MADV_WILLNEED);
            }
            Inner::Engine(core) => {
                let workers = &self.pool.0.workers;
                workers
                    .all()
                    .map_err(|e| Error::kernel("cannot start worker threads", e))?;
                let end = (core.unit_of(core.start + bytes.end - 1) + 1).min(core.data_units());
                let step = (PART >> core.unit_shift).max(1);
                let mut unit = core.unit_of(core.start + bytes.start);
                while unit < end {
                    let count = step.min(end - unit);
                    if !workers.push(Job::Prefetch {
                        id: core.id,
                        serial: core.serial,
                        unit,
                        count,
                    }) {
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
            Inner::Plain(plain) => {
                let advice = match advice {
                    Advice::Normal => libc::MADV_NORMAL,
                    Advice::Random => libc::MADV_RANDOM,
                    Advice::Sequential => libc::MADV_SEQUENTIAL,
                };
                plain.advise(0, plain.range.len, advice);
            }
            Inner::Engine(core) => {
                let bytes = if advice == Advice::Sequential {
                    SEQUENTIAL_BYTES
                } else {
                    1
                };
                let units = (bytes >> core.unit_shift).clamp(1, fill::RUN_MAX);
                core.run_units.store(units as u32, Ordering::Relaxed);
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
            Inner::Plain(plain) => {
                let (start, end) = (bytes.start.next_multiple_of(PAGE), bytes.end & !(PAGE - 1));
                if start < end {
                    plain.release(start, end - start);
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
            Inner::Plain(plain) => {
                let start = bytes.start & !(PAGE - 1);
                plain.is_resident(start, bytes.end - start)
            }
            Inner::Engine(core) => {
                let mut units = core.unit_of(core.start + bytes.start)
                    ..core.unit_of(core.start + bytes.end - 1) + 1;
                units.all(|u| core.page(u).load().state() == State::Resident)
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

fn pin_unit(core: &MapCore, unit: u64) -> Result<(), Fault> {
    match &core.reading {
        Reading::File { .. } => {
            // A signal handler that does not return (longjmp), or a cancelled thread, would leave the unit claimed
            // until others find its owner dead. With a fill to do, none may come in between.
            let word = core.page(unit).load();
            if core.page(unit).pin(word).is_ok() {
                return Ok(());
            }
            let _blocked = signal::Blocked::all();
            fill::serve(core, unit, Need::Pin)
        }
        Reading::Source { .. } => {
            with_pieces(core, |fetch| fill::serve_from(core, unit, Need::Pin, fetch))
        }
    }
}

/// Evicts the unpinned units of a range, now.
fn release_units(core: &MapCore, units: std::ops::Range<u64>) {
    let mut unit = units.start;
    while unit < units.end && !core.keep_all.load(Ordering::Acquire) {
        // Skip groups in which nothing is resident: a map may be huge and sparse.
        if core.table.live(unit) == 0 {
            unit = (unit / GROUP + 1) * GROUP;
            continue;
        }
        // A handler that does not return would leave the units in our hands for ever.
        let _blocked = signal::Blocked::all();
        let first = unit;
        while unit < units.end && unit - first < GROUP && core.page(unit).begin_evict() {
            unit += 1;
        }
        if unit == first {
            unit += 1;
            continue;
        }
        let bytes = core.backed(first, unit - first);
        // Who sets `keep_all` looks at the words afterwards: one of the two sees the other.
        let go = !core.keep_all.load(Ordering::SeqCst)
            // SAFETY: `begin_evict` put these units into our hands: unpinned, and readable again.
            && unsafe { mem::discard(core.start + bytes.start as usize, (bytes.end - bytes.start) as usize) };
        for u in first..unit {
            if !go {
                let page = core.page(u);
                if page.cancel_evict() {
                    futex::wake_at(page.futex(), futex::ALL);
                }
            } else if settle_evicted(core, u, 0) {
                collect_group(core, u);
            }
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
        core.closing.store(true, Ordering::Release);
        self.pool
            .0
            .past
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .add(&core.counters.snapshot());
        // From here on nobody finds the map; who is inside (the evictor, a worker) has left when this returns.
        // SAFETY: `self` is the only owner, and is being dropped.
        let core = unsafe { registry::shut(core) };
        // SAFETY: nobody is inside, nobody holds a slice, and no fill is in flight.
        let _ = unsafe { mem::unmap(core.start, core.region_len) };
        let resident = core
            .counters
            .get(Count::Charged)
            .wrapping_sub(core.counters.get(Count::Released));
        core.pool
            .budget
            .release(resident + core.table.fixed_bytes());
        let MapCore {
            id,
            reading,
            lease: core_lease,
            ..
        } = *core;
        if let Some(&lease) = core_lease.get() {
            keeper::end_lease(lease);
        }
        // The lease first: nobody is told of its break under a gate that serves another map.
        retire_reading(reading);
        registry::unreserve(id);
    }
}

/// A part of a map that is resident and stays so until this is dropped. See [`Map::pin`].
pub struct Pinned<'a> {
    map: &'a Map,
    slice: (usize, usize),
    first: u64,
    end: u64,
}

impl Deref for Pinned<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: a checked part of the map, which outlives self.
        unsafe { std::slice::from_raw_parts(self.slice.0 as *const u8, self.slice.1) }
    }
}

impl AsRef<[u8]> for Pinned<'_> {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Pinned<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pinned")
            .field("source", &self.map.name())
            .field("len", &self.slice.1)
            .finish_non_exhaustive()
    }
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        if let Inner::Engine(core) = &self.map.inner
            && self.map.check_process().is_ok()
        {
            for unit in self.first..self.end {
                core.page(unit).unpin();
            }
        }
    }
}

const _: fn() = || {
    fn shared<T: Send + Sync>() {}
    shared::<Map>();
    shared::<Pinned<'static>>();
};
