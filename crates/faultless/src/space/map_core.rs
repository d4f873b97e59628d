//! What the fault path knows of a map.

use crate::base::clock;
use crate::base::ids::{Addr, FileAt, LeaseId, MapId, Nanos, RegionAt, Serial, Unit};
use crate::base::primitive::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicU64, AtomicUsize, OnceLock, Ordering, fence,
};
use crate::base::source::Source;
use crate::space::alias::Alias;
use crate::space::around::{AROUND, Around, Guess};
use crate::space::counters::Counters;
use crate::space::fds::Fd;
use crate::space::live::Live;
use crate::space::page::{Page, State};
use crate::space::pool_core::PoolCore;
use crate::space::recorder::Recorder;
use crate::space::streams::Streams;
use crate::space::table::Table;
use faultless_sys::file::FileId;
use faultless_sys::futex;
use faultless_sys::mem::PAGE;
use std::ops::Range;
use std::sync::Arc;

/// How long misses wait for a hand-back: longer than the kernel lets a lease be broken, as a rule.
const HAND_BACK: Nanos = Nanos::from_secs(60);

/// How a map's pages are read.
pub(crate) enum Reading {
    /// From a file, by the thread that faults.
    File {
        fd: Fd,
        id: FileId,
        /// A lease guards the bytes: it is checked after every read.
        leased: bool,
    },
    /// By user code, which fill threads run.
    Source {
        source: Arc<dyn Source>,
        /// As the source said when it was mapped.
        align: u64,
    },
}

/// What is needed to make the kernel's own mapping of a file, where a map stands in for one.
#[derive(Debug)]
pub(crate) struct KernelMapping {
    /// `MAP_SHARED` or `MAP_PRIVATE`, and what else concerns the mapping rather than its making.
    pub(crate) flags: i32,
    /// The last `MADV_NORMAL`, `MADV_RANDOM` or `MADV_SEQUENTIAL`.
    pub(crate) advice: AtomicI32,
    /// `MADV_DONTFORK`: a forked child is to find nothing there.
    pub(crate) dont_fork: AtomicBool,
    /// When a miss first found the lease gone, in nanoseconds; 0: not yet.
    pub(crate) broken_at: AtomicU64,
    /// The range whose pages are being replaced by the kernel's mapping at this moment.
    pub(crate) replacing: [AtomicUsize; 2],
    /// System calls that count on pinned pages.
    pub(crate) holders: AtomicUsize,
    /// The kernel's mapping of the same bytes elsewhere, once a system call needed it.
    pub(crate) alias: AtomicPtr<Alias>,
    /// The kernel's mapping is taking the map's place, piece by piece: a page that cannot be installed any more is one
    /// that the kernel serves.
    pub(crate) leaving: AtomicBool,
}

/// One map, as the fault path sees it. Made before its gate opens, freed after it is shut.
pub(crate) struct MapCore {
    pub(crate) id: MapId,
    /// Unlike the gate, never used again.
    pub(crate) serial: Serial,
    pub(crate) pool: Arc<PoolCore>,
    /// First address and length of the region: whole units, whole granules.
    pub(crate) start: Addr,
    pub(crate) region_len: usize,
    /// The part of it that is still the map's own.
    pub(crate) live: Live,
    /// Offset in the source of the first byte of the region, a multiple of the page size.
    pub(crate) base: FileAt,
    /// Bytes of the region that the source backs; up to the end of the last page they read as zero.
    pub(crate) data_len: u64,
    pub(crate) unit_shift: u32,
    /// Units are huge pages, where the kernel has them.
    pub(crate) huge: bool,
    pub(crate) table: Table,
    pub(crate) reading: Reading,
    /// For messages.
    pub(crate) name: Box<str>,
    pub(crate) pid: u32,
    /// 0: normal; otherwise a `Refusal`: absent pages are refused from now on.
    pub(crate) refusal: AtomicU8,
    /// The lease that guards the file, once it is taken.
    pub(crate) lease: OnceLock<LeaseId>,
    /// Nothing may be evicted or marked: it could not be read again.
    pub(crate) keep_all: AtomicBool,
    /// The map is being dropped: whoever works on it in the background stops.
    pub(crate) closing: AtomicBool,
    /// Its counters are a part of what the pool remembers of maps that are gone.
    pub(crate) summed: AtomicBool,
    /// The kernel's mapping that this one stands in for, if it does.
    pub(crate) stands_for: Option<KernelMapping>,
    /// Who reads in order, to be read ahead of.
    pub(crate) streams: Box<Streams>,
    /// Which units are used, where somebody wants to know.
    pub(crate) recorder: Recorder,
    /// Whether neighbours of misses are wanted.
    pub(crate) around: Around,
    pub(crate) counters: Counters,
}

impl MapCore {
    /// Whether a miss reads what lies around it as well, as it does in the kernel's mappings: in those that stand in for one,
    /// unless the program said that it reads at random, and as long as all of the map fits the budget and there is room.
    pub(crate) fn reads_around(&self) -> bool {
        self.stands_for.is_some()
            && self.may_read_around()
            && self.data_len <= self.pool.budget.limit()
    }

    /// Whether there is room for what lies around a miss, and nothing is known of how the map will be read.
    fn may_read_around(&self) -> bool {
        let budget = &self.pool.budget;
        self.unit_bytes() == PAGE as u64
            && self.streams.detects()
            && budget.used() + self.pool.reserve.load(Ordering::Relaxed) < budget.limit()
    }

    /// Whether a miss brings what lies around it, as a rule.
    pub(crate) fn brings_neighbours(&self) -> bool {
        match self.stands_for {
            Some(_) => self.reads_around(),
            None => self.around.is_wanted() && self.may_read_around(),
        }
    }

    /// Decides what to read together with a unit that was missed.
    pub(crate) fn guess_around(&self, unit: Unit) -> Guess {
        if self.stands_for.is_some() {
            return match self.reads_around() {
                true => Guess::Around,
                false => Guess::Alone,
            };
        }
        match self.may_read_around() {
            true => self.around.guess(unit.get() / AROUND),
            false => Guess::Alone,
        }
    }

    /// Whether a unit is resident, as far as is known: the kernel may have taken it back.
    #[inline]
    pub(crate) fn is_resident(&self, unit: Unit) -> bool {
        self.page(unit).load().state() == State::Resident
    }

    /// Whether a unit is in memory: resident, or cool.
    pub(crate) fn is_present(&self, unit: Unit) -> bool {
        let word = self.page(unit).load();
        word.state() == State::Resident || word.cool()
    }

    /// Whether user code reads it.
    pub(crate) fn is_source(&self) -> bool {
        matches!(self.reading, Reading::Source { .. })
    }

    /// Whether the kernel's own mapping will take this map's place soon, now that its lease is broken. Not for ever: who hands
    /// the map back may itself be held up by who waits for that.
    pub(crate) fn being_handed_back(&self) -> bool {
        let Some(kernel) = &self.stands_for else {
            return false;
        };
        let now = clock::now();
        let first = match kernel.broken_at.compare_exchange(
            0,
            now.get(),
            Ordering::AcqRel,
            Ordering::Acquire,
        ) {
            Ok(_) => now,
            Err(then) => Nanos::new(then),
        };
        self.refusal.load(Ordering::Acquire) == 0 && now.since(first) < HAND_BACK
    }

    /// Whether the kernel's own mapping is taking this map's place.
    pub(crate) fn leaving(&self) -> bool {
        self.stands_for
            .as_ref()
            .is_some_and(|k| k.leaving.load(Ordering::SeqCst))
    }

    /// Whether it is the engine itself that takes a range of the map's addresses away.
    pub(crate) fn takes_away(&self, range: &Range<usize>) -> bool {
        self.closing.load(Ordering::SeqCst)
            || self.stands_for.as_ref().is_some_and(|kernel| {
                let from = kernel.replacing[0].load(Ordering::SeqCst);
                let to = kernel.replacing[1].load(Ordering::SeqCst);
                from <= range.start && range.end <= to
            })
    }

    /// Wakes the threads that wait for a change of a unit's word.
    pub(crate) fn wake(&self, unit: Unit) {
        futex::wake_at(self.page(unit).futex(), futex::ALL);
    }

    /// Whether nothing of the map may be evicted or marked any more, asked by a thread that has just changed a unit's word. The
    /// thread that says so looks at the words afterwards ([`keep_all_from_now`](Self::keep_all_from_now)): one of the two
    /// sees the other.
    pub(crate) fn must_keep(&self) -> bool {
        fence(Ordering::SeqCst);
        self.keep_all.load(Ordering::Relaxed)
    }

    /// Nothing may be evicted or marked from now on. `false` if that has been said before.
    pub(crate) fn keep_all_from_now(&self) -> bool {
        let before = self.keep_all.swap(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        !before
    }

    /// The addresses of the region.
    pub(crate) fn region(&self) -> Range<usize> {
        self.start.get()..self.start.get() + self.region_len
    }

    pub(crate) fn unit_bytes(&self) -> u64 {
        1 << self.unit_shift
    }

    #[inline]
    pub(crate) fn page(&self, unit: Unit) -> &Page {
        self.table.page(unit)
    }

    /// Whether all units of some bytes of the region are resident, which are not none.
    #[inline]
    pub(crate) fn has_resident(&self, bytes: &Range<usize>) -> bool {
        if bytes.start >= bytes.end || bytes.end as u64 > self.pages_end().get() {
            return false;
        }
        let last = self.unit_at(RegionAt::new(bytes.end as u64 - 1));
        let mut unit = self.unit_at(RegionAt::new(bytes.start as u64));
        while self.is_resident(unit) {
            if unit == last {
                return true;
            }
            unit += 1;
        }
        false
    }

    /// The unit that an address of the region lies in.
    pub(crate) fn unit_of(&self, addr: Addr) -> Unit {
        self.unit_at(RegionAt::new((addr - self.start) as u64))
    }

    /// The unit that a byte of the region lies in.
    #[inline]
    pub(crate) fn unit_at(&self, at: RegionAt) -> Unit {
        Unit::new(at.get() >> self.unit_shift)
    }

    /// The first byte of a unit.
    pub(crate) fn unit_start(&self, unit: Unit) -> RegionAt {
        RegionAt::new(unit.get() << self.unit_shift)
    }

    /// The address of a byte of the region.
    pub(crate) fn addr(&self, at: RegionAt) -> Addr {
        self.start + at.get() as usize
    }

    /// Where in the source a byte of the region comes from.
    pub(crate) fn source_at(&self, at: RegionAt) -> FileAt {
        self.base + at.get()
    }

    pub(crate) fn unit_addr(&self, unit: Unit) -> Addr {
        self.addr(self.unit_start(unit))
    }

    /// The end of the units that hold data.
    pub(crate) fn units_end(&self) -> Unit {
        Unit::new(self.data_len.div_ceil(self.unit_bytes()))
    }

    /// The end of the pages that the source backs.
    #[inline]
    pub(crate) fn pages_end(&self) -> RegionAt {
        RegionAt::new(self.data_len.next_multiple_of(PAGE as u64))
    }

    /// Bytes of some units that pages of the source back: whole pages, cut off at the end of the data.
    pub(crate) fn backed(&self, units: Range<Unit>) -> Range<RegionAt> {
        let end = self.pages_end();
        self.unit_start(units.start).min(end)..self.unit_start(units.end).min(end)
    }

    /// The addresses of those.
    pub(crate) fn backed_addrs(&self, units: Range<Unit>) -> (Addr, usize) {
        let bytes = self.backed(units);
        (self.addr(bytes.start), (bytes.end - bytes.start) as usize)
    }

    /// What the budget is charged for one unit: the bytes of its pages that exist.
    pub(crate) fn charge_of(&self, unit: Unit) -> u64 {
        let bytes = self.backed(unit..unit + 1);
        bytes.end - bytes.start
    }
}
