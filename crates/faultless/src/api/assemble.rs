//! The assembly of a map from its parts.

#![allow(unsafe_code, reason = "reserves and arms address space")]

use crate::api::advice::Reads;
use crate::api::backing::Backing;
use crate::api::builder::install_handler;
use crate::api::engine::Engine;
use crate::api::huge_pages;
use crate::api::kernel_map::KernelMap;
use crate::api::map::Map;
use crate::api::options::{MapOptions, UNIT_MAX};
use crate::api::promise::check_units;
use crate::base::descriptor::Owned;
use crate::base::error::{Error, LeaseRefusal};
use crate::base::ids::{Addr, FileAt, Serial};
use crate::base::primitive::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, OnceLock, Ordering,
};
use crate::base::size::ByteSize;
use crate::base::source::Source;
use crate::base::{process, source};
use crate::coherence::closing::{retire, retire_reading};
use crate::coherence::lease::Broken;
use crate::coherence::mmap::{Mmap, Part};
use crate::coherence::opening::{direct_works, reopen};
use crate::coherence::{keeper, lease};
use crate::space::around::Around;
use crate::space::counters::Counters;
use crate::space::fds::Fd;
use crate::space::live::Live;
use crate::space::map_core::{KernelMapping, MapCore, Reading};
use crate::space::recorder::Recorder;
use crate::space::region::{Former, Region};
use crate::space::registry::GRANULE;
use crate::space::streams::Streams;
use crate::space::table::Table;
use crate::space::{identity, registry};
use crate::sync::huge_slots::HugeSlots;
use faultless_sys::mem::PAGE;
use faultless_sys::{file, mem, uffd};
use std::os::fd::AsRawFd;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Serial number of the next map.
static NEXT_SERIAL: AtomicU64 = AtomicU64::new(1);

impl MapOptions {
    /// Maps a file safely.
    ///
    /// The map takes a read lease (`fcntl(2)`, `F_SETLEASE`): the kernel grants it while nobody has the file open for
    /// writing, and delays a writer until the map has done what [`on_break`](Self::on_break) says, for `lease-break-time` (45 s) at
    /// most. So the bytes of the map never change, and a `&[u8]` of it is sound. **After a break, pages that are not in memory
    /// are refused**: a plain load of one raises SIGBUS, and [`Map::pin`] returns [`Error::LeaseBroken`].
    ///
    /// The descriptor is not kept: the file is opened anew for reading.
    ///
    /// # Errors
    ///
    /// [`Error::Lease`] where no lease can be had: a writer, a file of another owner, a file system that does not
    /// honour leases. [`Error::TooLargeToCopy`] on the mmap backend, where a safe map is a copy in memory (the kernel's own
    /// mapping would show what a writer writes once the lease is taken by force). [`Error::InvalidOption`],
    /// [`Error::TooManyMaps`], [`Error::Kernel`].
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
    /// [`Error::Kernel`]. On the mmap backend, a source that is no file is read into memory when it is mapped, and
    /// [`Error::TooLargeToCopy`] says that it does not fit the budget.
    pub unsafe fn map_trusted(&self, source: impl Source) -> Result<Map, Error> {
        if let Some(fd) = source.file() {
            return self.map_file(fd, source.name(), false);
        }
        self.map_source(Arc::new(source))
    }

    /// Maps a file that may change: the kernel's own mapping, shared with all others, beside explicit loads that keep off `mmap_lock`.
    ///
    /// The bytes are the page cache's, at any time what the file is then: no lease, no second copy, no budget. A plain load of an absent page
    /// is a fault of the kernel's, unless [guard markers](Self::markers) are asked for. [`Map::load`] reads what is absent into the page cache by a descriptor, and returns the kernel's errors. The
    /// touch behind it finds the page, unless the kernel has reclaimed it meanwhile, and maps it under the lock of that mapping alone
    /// (`mmap_lock` 0.00 times per miss on Linux 6.12, 6.18 and 7.3; once on 6.1). So do [`Map::load_many`], pins, futures and [`Map::warm`].
    ///
    /// What differs from other maps:
    ///
    /// * Only the kernel knows what is in memory, so a hit of an explicit load costs what a read of the same bytes costs. Touch what is likely
    ///   to be there.
    /// * A pin keeps nothing in memory, and need not: system calls take any part of such a map. (With guard markers, what is pinned.)
    /// * A future is served by one of the pool's threads, also if the range is in memory; 16 of one map at a time.
    /// * [`Map::release`] takes pages out of this mapping. They stay in the page cache.
    /// * [`Map::is_resident`], [`Map::record`] and the figures of [`Map::warm`] say what the kernel says: of another user's file, it may say that all
    ///   of it is in memory.
    /// * [`Advice::Random`](crate::Advice::Random) holds for explicit loads. Plain loads are read around until the kernel finds that to be in vain.
    /// * [`Map::stats`] are zero, but for the misses of plain loads that guard markers have told.
    /// * [`unit`](Self::unit), [`huge_pages`](Self::huge_pages), [`reads`](Self::reads) and [`on_break`](Self::on_break) mean nothing.
    ///
    /// ```
    /// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
    /// # std::io::Write::write_all(&mut &file, &[7u8; 100_000])?;
    /// let pool = faultless::Pool::builder().memory(faultless::ByteSize::mib(64)).build()?;
    /// // SAFETY: nobody writes to the file, or truncates it, while a slice of the map is in use.
    /// let map = unsafe { pool.map_live(&file) }?;
    /// assert!(map.load(5_000..6_000)?.iter().all(|&b| b == 7));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Safety
    ///
    /// As for a mapping of `memmap2`: the map hands the file's bytes out as `&[u8]`. They must not change as long as such a slice is in use.
    /// If the file is truncated, a touch of a page that lies wholly behind the new end is SIGBUS. ([`Map::load`] says [`Error::PastEnd`].) So is
    /// the touch of a hole of a file on a full tmpfs.
    ///
    /// # Errors
    ///
    /// [`Error::Lease`] if it is not a regular file; [`Error::InvalidOption`]; [`Error::Kernel`].
    pub unsafe fn map_live(&self, file: impl AsFd) -> Result<Map, Error> {
        let file = file.as_fd();
        let name = source::file_name(file);
        self.check()?;
        let status = regular(file, &name)?;
        let (len, _) = self.extent(status.len, &name)?;
        if len == 0 {
            return Ok(Map::empty(self.pool.clone()));
        }
        let fd = open_buffered(file, &name)?;
        let head = (self.offset % PAGE as u64) as usize;
        let mmap = Mmap::live(Part {
            fd: adopt(fd, status.id, &name)?,
            id: status.id,
            name,
            base: self.offset - head as u64,
            len: (head + len).next_multiple_of(PAGE),
        })?;
        // SAFETY: made just now, of this file.
        let mmap = unsafe { KernelMap::live(mmap, file, self.markers) };
        let map = Map::new(self.pool.clone(), Backing::Mmap(mmap), head, len);
        map.advise(self.advice);
        Ok(map)
    }

    fn map_source(&self, source: Arc<dyn Source>) -> Result<Map, Error> {
        self.check()?;
        if self.huge {
            // (The engine copies bytes that user code delivers, as small pages.)
            let mut copied = self.clone();
            (copied.huge, copied.unit) = (false, ByteSize::new(UNIT_MAX as u64));
            return copied.map_source(source);
        }
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
        let unit = self.unit_bytes().max(align as u64);
        let head = (self.offset % (PAGE.max(align)) as u64) as usize;
        let base = self.offset - head as u64;
        let Some(engine) = &self.pool.0.engine else {
            // Whole blocks: a source is never asked for less.
            let whole = (head + len).next_multiple_of(PAGE.max(align));
            let mmap = Mmap::copy(&*source, name, base, whole, &self.pool.0.copies)?;
            return Ok(Map::new(
                self.pool.clone(),
                Backing::Mmap(KernelMap::plain(mmap)),
                head,
                len,
            ));
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
        let status = regular(file, &name)?;
        let (len, _) = self.extent(status.len, &name)?;
        if len == 0 {
            return Ok(Map::empty(self.pool.clone()));
        }
        let fd = self.open(file, &name)?;
        let id = status.id;
        let fd = adopt(fd, id, &name)?;
        let head = (self.offset % PAGE as u64) as usize;
        let base = self.offset - head as u64;
        let Some(engine) = &self.pool.0.engine else {
            let part = Part {
                fd,
                id,
                name,
                base,
                len: (head + len).next_multiple_of(PAGE),
            };
            let mmap = match leased {
                true => Mmap::leased(part, status.len, &self.pool.0.copies)?,
                false => Mmap::trusted(part)?,
            };
            let map = Map::new(
                self.pool.clone(),
                Backing::Mmap(KernelMap::plain(mmap)),
                head,
                len,
            );
            map.advise(self.advice);
            return Ok(map);
        };
        let reading = Reading::File { fd, id, leased };
        // Under a lease the length is asked again: it cannot change any more.
        let unit = self.unit_bytes();
        let data_len = head as u64 + status.len.saturating_sub(self.offset);
        let map = self.engine_map(engine, reading, name, base, head, len, data_len, unit)?;
        if leased && self.over.is_none() {
            let what = match self.stands_for {
                Some(_) => Broken::HandBack,
                None => Broken::Save(self.on_break),
            };
            if let Some(core) = map.core() {
                lease::take(core, &self.pool.0.workers, what, status.len)?;
            }
        }
        Ok(map)
    }

    /// Opens the file anew, for reading, directly where that is wanted and works.
    fn open(&self, file: BorrowedFd<'_>, name: &str) -> Result<Owned, Error> {
        let buffered = || open_buffered(file, name);
        // On the kernel's mmap, direct I/O has no meaning.
        if self.reads == Reads::Buffered || self.pool.0.engine.is_none() {
            return buffered();
        }
        match reopen(file.as_raw_fd(), true).map(Owned::new) {
            Ok(fd) if direct_works(fd.number()) => Ok(fd),
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
                    Ok(fd) => match file::clear_direct(fd.number()) {
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
        let reserved = check_units(self.pool.budget(), unit)
            .and_then(|()| self.prepare_huge(engine))
            .and_then(|()| install_handler())
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
        engine.core.largest_unit.fetch_max(unit, Ordering::Relaxed);
        let core = registry::open(Box::new(MapCore {
            id,
            serial: Serial::new(NEXT_SERIAL.fetch_add(1, Ordering::Relaxed)),
            pool: engine.core.clone(),
            start: Addr::new(region.start),
            region_len: region.len,
            live: Live::new(region.start..region.start + region.len),
            base: FileAt::new(base),
            // Bytes that can be read: as far as both the map and the source go.
            data_len: data_len.min((head + len) as u64),
            unit_shift: unit.trailing_zeros(),
            huge: self.huge,
            table,
            reading,
            name: name.into_boxed_str(),
            pid: process::pid(),
            refusal: AtomicU8::new(0),
            lease: OnceLock::new(),
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
            recorder: Recorder::default(),
            around: Around::new(region.len as u64 >> unit.trailing_zeros()),
            counters: Counters::new(),
        }));
        std::mem::forget(region);
        let map = Map::new(self.pool.clone(), Backing::Engine(core), head, len);
        map.advise(self.advice);
        Ok(map)
    }

    /// Where huge pages are filled, if the map is to have any.
    fn prepare_huge(&self, engine: &Engine) -> Result<(), Error> {
        if self.huge && engine.core.huge.get().is_none() {
            huge_pages::check()?;
            let slots = HugeSlots::new()
                .map_err(|e| Error::kernel("cannot reserve memory for huge pages", e))?;
            // (Another thread may have been faster: one is as good as the other.)
            let _ = engine.core.huge.set(slots);
        }
        Ok(())
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
        let barrier = if self.huge { GRANULE } else { 0 };
        let region = match self.stands_for {
            // Exactly as long as the kernel's: what lies behind it is the program's.
            Some(_) => match former {
                Some(former) => Region::over(self.place, span.next_multiple_of(PAGE), former),
                None => Region::exact(span.next_multiple_of(PAGE), self.place),
            },
            // (With huge pages, a granule more: the look for older reports leaves a page table where it looks.)
            None => Region::anywhere(span.next_multiple_of(GRANULE) + barrier),
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
                    ByteSize::new(span as u64)
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
        let access = match self.huge {
            // (The kernel moves pages between writable mappings alone.)
            true => libc::PROT_READ | libc::PROT_WRITE,
            false => libc::PROT_READ,
        };
        if self.huge {
            // Otherwise the touch of an absent page has the kernel make a page table, which stands in a huge page's place.
            // SAFETY: ours, and empty; changes no contents.
            unsafe { mem::madvise(region.start, region.len, libc::MADV_HUGEPAGE) }
                .map_err(refused)?;
        }
        // SAFETY: ours, armed, and nobody has a reference into it yet.
        unsafe { mem::protect(region.start, region.len, access) }.map_err(refused)?;
        let looked_at = match self.huge {
            true => region.start + region.len - barrier,
            false => region.start,
        };
        identity::wait_for_older_reports(number, looked_at).map_err(refused)?;
        Ok((region, table))
    }
}

/// What the kernel says of a file, if it is a regular one.
fn regular(file: BorrowedFd<'_>, name: &str) -> Result<file::Status, Error> {
    let status = file::status(file.as_raw_fd())
        .map_err(|e| Error::kernel(format!("cannot stat {name}"), e))?;
    match status.mode & libc::S_IFMT {
        libc::S_IFREG => Ok(status),
        _ => Err(lease::error(
            name,
            LeaseRefusal::NotRegular {
                kind: "not a regular file",
            },
        )),
    }
}

fn open_buffered(file: BorrowedFd<'_>, name: &str) -> Result<Owned, Error> {
    reopen(file.as_raw_fd(), false)
        .map(Owned::new)
        .map_err(|e| Error::kernel(format!("cannot open {name} for reading"), e))
}

/// Shares a descriptor with the engine's threads.
fn adopt(fd: Owned, id: file::FileId, name: &str) -> Result<Fd, Error> {
    keeper::adopt(fd, Some(id))
        .map_err(|e| Error::kernel(format!("cannot share a descriptor of {name}"), e))
}
