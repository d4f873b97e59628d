//! How a map is made: what of the source, how it is read, and the assembly of its parts.

#![allow(unsafe_code, reason = "reserves and arms address space")]

use crate::api::advice::{Advice, GuardMarkers, Reads};
use crate::api::map::Map;
use crate::api::pool::Pool;
use crate::base::error::Error;
use crate::base::process;
use crate::base::size::ByteSize;
use crate::base::source::Source;
use crate::coherence::lease::OnBreak;
use faultless_sys::mem::PAGE;
use std::os::fd::AsFd;

/// Largest fill unit.
pub(crate) const UNIT_MAX: usize = 2 << 20;

/// Largest map: more than 48 bits of address space cannot be reserved.
pub(crate) const LEN_MAX: u64 = 1 << 46;

/// How a map is made.
///
/// ```
/// # let file = tempfile::tempfile_in(std::env::current_dir().unwrap())?;
/// # std::io::Write::write_all(&mut &file, &[7u8; 100_000])?;
/// use faultless::{Advice, ByteSize, Pool};
///
/// let pool = Pool::builder().memory(ByteSize::mib(64)).build()?;
/// // SAFETY: nobody writes to the file while the map lives.
/// let map = unsafe {
///     pool.options().offset(10_000).len(50_000).unit(ByteSize::kib(16)).advice(Advice::Random).map_trusted(file)
/// }?;
/// assert_eq!(map.len(), 50_000);
/// assert!(map.iter().all(|&b| b == 7));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[must_use]
pub struct MapOptions {
    pub(crate) pool: Pool,
    pub(crate) offset: u64,
    pub(crate) len: Option<usize>,
    pub(crate) unit: ByteSize,
    /// Units are huge pages.
    pub(crate) huge: bool,
    pub(crate) advice: Advice,
    pub(crate) markers: GuardMarkers,
    pub(crate) reads: Reads,
    pub(crate) on_break: OnBreak,
    /// The map stands in for a mapping of the kernel's, made with these flags.
    pub(crate) stands_for: Option<i32>,
    /// Where it is to lie, if there is room; 0: anywhere.
    pub(crate) place: usize,
    /// The kernel's mapping of the same bytes lies at `place`, with this advice, and is replaced.
    pub(crate) over: Option<i32>,
}

impl MapOptions {
    pub(crate) fn new(pool: &Pool) -> Self {
        MapOptions {
            pool: pool.clone(),
            offset: 0,
            len: None,
            unit: ByteSize::new(PAGE as u64),
            huge: false,
            advice: Advice::Normal,
            markers: GuardMarkers::Never,
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
    pub fn unit(mut self, unit: ByteSize) -> Self {
        self.unit = unit;
        self
    }

    /// Reads the file in units of 2 MiB, and keeps each as one huge page: random loads from what is in memory miss the processor's
    /// translation cache less often. Off by default.
    ///
    /// It wants a budget of 16 MiB or more, and memory for 2 MiB where a byte is wanted. Where the kernel finds no huge page at the
    /// moment, the unit has small ones. Users' sources have small ones always. So has the mmap backend what the kernel gives it.
    ///
    /// What it gives up: the kernel moves huge pages between writable mappings alone, so the map is writable. A stray write through a
    /// wild pointer changes the map's memory, and does not end the program. (The file is never changed.)
    pub fn huge_pages(mut self, huge: bool) -> Self {
        self.huge = huge;
        self
    }

    /// What one miss reads, in bytes.
    pub(crate) fn unit_bytes(&self) -> u64 {
        match self.huge {
            true => UNIT_MAX as u64,
            false => self.unit.get(),
        }
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

    /// Whether plain loads of a [live map](Self::map_live) are served by guard markers, which keep their misses off `mmap_lock`.
    ///
    /// Markers (`MADV_GUARD_INSTALL`) stand in the page table where pages are not in memory. The touch of one is SIGSEGV in the thread. The
    /// engine's handler has the page cache read the page, by a read that takes no lock of the memory management, removes the marker, and
    /// returns to the load. The mapping stays the kernel's: a page that cannot be read is SIGBUS, as without markers.
    ///
    /// What that asks of the program:
    ///
    /// * A system call that is handed a pointer to an absent page fails with `EFAULT`. [Pin](Map::pin) the range first, or
    ///   [write it out](Map::write_to).
    /// * Install handlers of SIGSEGV before the first such map. A fault that is none of a marker goes to the handler that was there. If the
    ///   program installs one later, the engine notices within half a second and removes all markers; a miss meanwhile is the
    ///   program's SIGSEGV.
    /// * A thread that blocks SIGSEGV, or a handler whose mask does, is killed by the kernel if it misses.
    /// * Page tables for all of the map: 2 MiB for each GiB. The first 64 MiB get their markers before the map is there, the rest soon after.
    /// * While a part is pinned, no marker is installed anywhere in the map. Do not keep a pin for the life of the map.
    /// * An explicit load removes the markers of what it has read, by a system call more, whether they are there or not.
    /// * The map cannot be locked (`mlock`). In a process that locks all memory it will map (`mlockall`), there are no markers.
    ///
    /// Where markers are not possible, the map is as without them ([`Map::has_markers`]).
    pub fn markers(mut self, markers: GuardMarkers) -> Self {
        self.markers = markers;
        self
    }

    /// What happens when somebody opens the file of a safe map for writing.
    pub fn on_break(mut self, what: OnBreak) -> Self {
        self.on_break = what;
        self
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let unit = self.unit.get();
        if !unit.is_power_of_two() || !(PAGE as u64..=UNIT_MAX as u64).contains(&unit) {
            return Err(Error::InvalidOption {
                what: "the fill unit",
                value: self.unit.to_string(),
                remedy: "choose a power of two from 4 KiB to 2 MiB",
            });
        }
        if self.huge && unit != PAGE as u64 && unit != UNIT_MAX as u64 {
            return Err(Error::InvalidOption {
                what: "the fill unit",
                value: self.unit.to_string(),
                remedy: "a map with huge pages has units of 2 MiB; leave the unit out",
            });
        }
        if process::forked() || process::pid() != self.pool.0.pid {
            return Err(Error::Forked);
        }
        Ok(())
    }

    /// Bytes from the offset to the end of the map, and to the end of the source.
    pub(crate) fn extent(&self, source_len: u64, name: &str) -> Result<(usize, u64), Error> {
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
}

impl Pool {
    /// Starts to describe a map: a part of a file, another fill unit, and so on.
    pub fn options(&self) -> MapOptions {
        MapOptions::new(self)
    }

    /// Maps a whole file, safely: a read lease guarantees that its bytes do not change under the map. See
    /// [`MapOptions::map`].
    ///
    /// # Errors
    ///
    /// [`Error::Lease`] where a lease cannot be had, with the reason and the remedy.
    pub fn map(&self, file: impl AsFd) -> Result<Map, Error> {
        self.options().map(file)
    }

    /// Maps a whole file that may change. See [`MapOptions::map_live`].
    ///
    /// # Errors
    ///
    /// As [`MapOptions::map_live`].
    ///
    /// # Safety
    ///
    /// As [`MapOptions::map_live`].
    pub unsafe fn map_live(&self, file: impl AsFd) -> Result<Map, Error> {
        // SAFETY: the caller's promise.
        unsafe { self.options().map_live(file) }
    }

    /// Maps a whole source for whose bytes the caller vouches. See [`MapOptions::map_trusted`].
    ///
    /// # Safety
    ///
    /// The bytes of the source must not change while the map lives: the map hands them out as `&[u8]`.
    ///
    /// # Errors
    ///
    /// As [`MapOptions::map_trusted`].
    #[allow(unsafe_code, reason = "the caller vouches for the bytes")]
    pub unsafe fn map_trusted(&self, source: impl Source) -> Result<Map, Error> {
        // SAFETY: the caller's promise is the same.
        unsafe { self.options().map_trusted(source) }
    }
}
