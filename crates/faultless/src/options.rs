//! How a map is made: what of the source, how it is read, and the assembly of its parts.

#![allow(unsafe_code, reason = "reserves and arms address space")]

use crate::bytes::Bytes;
use crate::error::{Error, LeaseRefusal};
use crate::fault::ahead::Streams;
use crate::fault::core::{KernelMapping, MapCore, Reading};
use crate::fault::counters::Counters;
use crate::fault::identity::{self, Live};
use crate::fault::process;
use crate::fault::registry::{self, GRANULE};
use crate::fault::table::Table;
use crate::keeper;
use crate::lease::{self, OnBreak};
use crate::map::Map;
use crate::plain::Plain;
use crate::pool::{Engine, Pool, own};
use crate::source::{self, Source};
use crate::workers::Broken;
use faultless_sys::mem::{self, PAGE};
use faultless_sys::{file, uffd};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, Ordering,
};

/// Largest fill unit.
const UNIT_MAX: usize = 2 << 20;
/// Serial number of the next map.
static NEXT_SERIAL: AtomicU64 = AtomicU64::new(1);

/// Largest map: more than 48 bits of address space cannot be reserved.
const LEN_MAX: u64 = 1 << 46;

/// How a map will be read. As with `madvise`, it never changes what is read, only how soon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Advice {
    /// Nothing is known: a miss fills one unit. Threads that turn out to read in order, one unit after the other or at
    /// equal distances, forwards or backwards, are read ahead of. (In files. A user's [`Source`] is not called for a guess:
    /// say `Sequential`.)
    #[default]
    Normal,
    /// Here and there: a miss fills one unit, and nothing is read ahead.
    Random,
    /// In order: from the first miss on, what comes next is read ahead.
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
    /// The map stands in for a mapping of the kernel's, made with these flags.
    stands_for: Option<i32>,
    /// Where it is to lie, if there is room; 0: anywhere.
    place: usize,
    /// The kernel's mapping of the same bytes lies at `place`, with this advice, and is replaced.
    over: Option<i32>,
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
            stands_for: None,
            place: 0,
            over: None,
        }
    }

    /// Has the map stand in for a mapping that the kernel would make with these flags, at `place` if there is room.
    pub(crate) fn stand_for(mut self, flags: i32, place: usize) -> Self {
        self.stands_for = Some(flags);
        self.place = place;
        self
    }

    /// Has the stand-in replace the kernel's mapping of the same bytes, which lies at its place. It takes no lease by itself.
    pub(crate) fn over(mut self, over: Option<i32>) -> Self {
        self.over = over;
        self
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
            return Ok(Map::empty(self.pool.clone()));
        }
        let unit = self.unit.get().max(align as u64);
        let head = (self.offset % (PAGE.max(align)) as u64) as usize;
        let base = self.offset - head as u64;
        let Some(engine) = &self.pool.0.engine else {
            // Whole blocks: a source is never asked for less.
            let whole = (head + len).next_multiple_of(PAGE.max(align));
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

    pub(crate) fn map_file(
        &self,
        file: BorrowedFd<'_>,
        name: String,
        leased: bool,
    ) -> Result<Map, Error> {
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
            return Ok(Map::empty(self.pool.clone()));
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
        if leased && self.over.is_none() {
            let what = match self.stands_for {
                Some(_) => Broken::HandBack,
                None => Broken::Save(self.on_break),
            };
            map.take_lease(what, status.len)?;
        }
        Ok(map)
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
                    Ok(fd) => match file::clear_direct(fd.as_raw_fd()) {
                        Ok(()) => Ok(fd),
                        Err(e) => {
                            retire(fd);
                            let what = format!("cannot read {name} through the page cache");
                            Err(Error::kernel(what, e))
                        }
                    },
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
        let former = self.former(&reading, base);
        let reserved = crate::pool::check_units(self.pool.budget(), unit)
            .and_then(|()| crate::pool::install_handler())
            .and_then(|()| self.reserve(engine, &name, head + len, unit, former?))
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
        engine.core.budget.charge_anyway(table.fixed_bytes());
        let core = registry::open(Box::new(MapCore {
            id,
            serial: NEXT_SERIAL.fetch_add(1, Ordering::Relaxed),
            pool: engine.core.clone(),
            start: region.start,
            region_len: region.len,
            live: Live::new(region.start..region.start + region.len),
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
            summed: AtomicBool::new(false),
            stands_for: self.stands_for.map(|flags| KernelMapping {
                flags,
                advice: AtomicI32::new(self.over.unwrap_or(libc::MADV_NORMAL)),
                dont_fork: AtomicBool::new(false),
                broken_at: AtomicU64::new(0),
                replacing: Default::default(),
                holders: AtomicUsize::new(0),
                alias: AtomicPtr::default(),
                leaving: AtomicBool::new(false),
            }),
            streams: Streams::new(),
            counters: Counters::new(),
        }));
        std::mem::forget(region);
        let map = Map::engine(self.pool.clone(), core, head, len);
        map.advise(self.advice);
        Ok(map)
    }

    /// The kernel's mapping that a stand-in replaces, if it replaces one.
    fn former(&self, reading: &Reading, base: u64) -> Result<Option<Former>, Error> {
        let (Some(flags), Some(advice), Reading::File { fd, id, .. }) =
            (self.stands_for, self.over, reading)
        else {
            return Ok(None);
        };
        let number = fd
            .current(*id)
            .map_err(|e| Error::kernel("cannot reach the descriptor of the file", e))?;
        Ok(Some(Former {
            number,
            flags,
            offset: base,
            advice,
        }))
    }

    /// Reserves and arms address space for `span` bytes, with a table of its units.
    fn reserve(
        &self,
        engine: &Engine,
        name: &str,
        span: usize,
        unit: u64,
        former: Option<Former>,
    ) -> Result<(Region, Table), Error> {
        let failed = |e: std::io::Error| {
            Error::kernel(format!("cannot reserve address space for {name}"), e)
        };
        let region = match self.stands_for {
            // Exactly as long as the kernel's: what lies behind it is the program's.
            Some(_) => match former {
                Some(former) => Region::over(self.place, span.next_multiple_of(PAGE), former),
                None => Region::exact(span.next_multiple_of(PAGE), self.place),
            },
            None => Region::anywhere(span.next_multiple_of(GRANULE)),
        }
        .map_err(failed)?;
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
        identity::wait_for_older_reports(number, region.start).map_err(refused)?;
        Ok((region, table))
    }
}

fn retire(fd: std::os::fd::OwnedFd) {
    let id = file::status(fd.as_raw_fd()).map(|s| s.id);
    if let (Ok(fd), Ok(id)) = (keeper::adopt(fd), id) {
        keeper::retire(fd, id);
    }
}

/// Lets go of what a map was read from.
pub(crate) fn retire_reading(reading: Reading) {
    if let Reading::File { fd, id, .. } = reading {
        keeper::retire(fd, id);
    }
}

/// The kernel's mapping that lay where a region lies now, of the file with the number in the caller's table.
#[derive(Debug, Clone, Copy)]
struct Former {
    number: i32,
    flags: i32,
    offset: u64,
    advice: i32,
}

/// A range of address space that begins at a granule. Dropping it unmaps it, or puts back what it replaced.
struct Region {
    start: usize,
    len: usize,
    former: Option<Former>,
}

impl Former {
    /// Puts it back.
    ///
    /// # Safety
    ///
    /// The range is the one where it lay.
    unsafe fn put_back(&self, start: usize, len: usize) -> Result<(), faultless_sys::Errno> {
        let flags = self.flags | libc::MAP_FIXED;
        let map = || {
            // SAFETY: the caller's promise.
            unsafe { mem::map(start, len, libc::PROT_READ, flags, self.number, self.offset) }
        };
        map().or_else(|_| map())?;
        if self.advice != libc::MADV_NORMAL {
            // SAFETY: mapped just now; this advice changes no contents.
            let _ = unsafe { mem::madvise(start, len, self.advice) };
        }
        Ok(())
    }
}

impl Region {
    /// Where the kernel finds room.
    fn anywhere(len: usize) -> std::io::Result<Self> {
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
        Self::prepare(start, len)
    }

    /// At `place`, if that is not 0, begins a granule, and is free; otherwise anywhere.
    fn exact(len: usize, place: usize) -> std::io::Result<Self> {
        if place != 0 && place.is_multiple_of(GRANULE) {
            let flags = libc::MAP_PRIVATE
                | libc::MAP_ANONYMOUS
                | libc::MAP_NORESERVE
                | mem::MAP_FIXED_NOREPLACE;
            // SAFETY: replaces nothing.
            if let Ok(at) = unsafe { mem::map(place, len, libc::PROT_NONE, flags, -1, 0) } {
                if at == place && mem::unlock(at, len).is_ok() {
                    return Self::prepare(at, len);
                }
                // SAFETY: mapped just now, shown to nobody.
                let _ = unsafe { mem::unmap(at, len) };
            }
        }
        Self::anywhere(len)
    }

    /// In the place of a mapping of the kernel's, which nobody touches meanwhile.
    fn over(place: usize, len: usize, former: Former) -> std::io::Result<Self> {
        if place == 0 || !place.is_multiple_of(GRANULE) {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // Before anything is replaced: a call that fails may have unmapped what was there.
        let region = Region {
            start: place,
            len,
            former: Some(former),
        };
        // SAFETY: the caller of `StandIn::new` vouches that a mapping of the same bytes lies there, and that no thread uses it
        // before the stand-in is complete.
        unsafe { mem::map(place, len, libc::PROT_NONE, flags, -1, 0)? };
        mem::unlock(place, len)?;
        region.advise()?;
        Ok(region)
    }

    fn prepare(start: usize, len: usize) -> std::io::Result<Self> {
        let region = Region {
            start,
            len,
            former: None,
        };
        region.advise()?;
        Ok(region)
    }

    fn advise(&self) -> std::io::Result<()> {
        let Region { start, len, .. } = *self;
        // SAFETY: ours; no contents yet.
        unsafe {
            mem::madvise(start, len, libc::MADV_DONTFORK)?;
            mem::madvise(start, len, libc::MADV_DONTDUMP)?;
            let _ = mem::madvise(start, len, libc::MADV_NOHUGEPAGE);
        }
        Ok(())
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: ours; a Region is forgotten once it became a map. What comes back holds the bytes that were there before.
        let _ = unsafe {
            match self.former {
                Some(former) => former.put_back(self.start, self.len),
                None => mem::unmap(self.start, self.len),
            }
        };
    }
}
