//! What the fault path knows of a pool and of a map.

use super::ahead::{Requests, Streams, Trips};
use super::budget::Budget;
use super::cooling::Cooling;
use super::counters::Counters;
use super::fds::Fd;
use super::identity::Live;
use super::page::Page;
use super::ring::{Handover, Ring};
use super::staging::Staging;
use super::table::Table;
use faultless_sys::file::FileId;
use faultless_sys::futex;
use faultless_sys::mem::PAGE;
use faultless_sys::raw;
use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering,
};

/// A number of a fill unit within a map.
pub(crate) type Unit = u64;

/// What a pool's maps share.
pub(crate) struct PoolCore {
    pub(crate) budget: Budget,
    pub(crate) uffd: Fd,
    pub(crate) staging: Staging,
    /// Units filled, on their way to the evictor.
    pub(crate) filled: Ring,
    /// Requests of faulting threads to the fill threads.
    pub(crate) handover: Handover,
    pub(crate) fill_bell: Bell,
    /// What to read ahead.
    pub(crate) ahead: Requests,
    /// Wakes those who do.
    pub(crate) work_bell: Bell,
    /// Wakes who saves maps whose leases are being broken.
    pub(crate) save_bell: Bell,
    /// Where the units wait over which readers are to stumble.
    pub(crate) trips: Trips,
    pub(crate) evict_bell: Bell,
    /// The clock by which refault distances are measured: pages that were given up before they proved themselves.
    pub(crate) clock: AtomicU32,
    /// Units taken out of their maps so far: as long as it moves, who waits for memory has hope.
    pub(crate) evicted: AtomicU32,
    /// Where units cool; set by the evictor as it starts, if it can be had.
    pub(crate) cooling: std::sync::OnceLock<Cooling>,
    /// Bytes of units in the ring.
    pub(crate) fresh: AtomicU64,
    /// Bytes that the evictor knows of and has not marked MADV_FREE.
    pub(crate) firm: AtomicU64,
    /// The process does not know of the pool: in a control group with a limit, the kernel must be able to take back nearly all
    /// of its memory.
    pub(crate) guest: bool,
    /// Most of both together, before fills wait for the marking.
    pub(crate) firm_max: AtomicU64,
    /// Bytes below the limit at which the evictor starts.
    pub(crate) reserve: AtomicU64,
    /// Most bytes that a fill is waiting for.
    pub(crate) wanted: AtomicU64,
    /// How many fill threads were started.
    pub(crate) fillers_started: AtomicU32,
    /// Their thread ids; 0 until one has begun to run.
    pub(crate) fillers: [AtomicU32; FILLERS_MAX],
    pub(crate) last_looks: LastLooks,
    pub(crate) stopping: AtomicBool,
}

impl PoolCore {
    /// Whether the calling thread is one of this pool's fill threads.
    pub(crate) fn is_filler(&self) -> bool {
        let me = faultless_sys::raw::gettid();
        let started = self.fillers_started.load(Ordering::Relaxed) as usize;
        self.fillers[..started.min(FILLERS_MAX)]
            .iter()
            .any(|f| f.load(Ordering::Relaxed) == me)
    }

    /// Wakes the evictor if there is enough for it to do. Cheap when there is not.
    pub(crate) fn nudge_evictor(&self) {
        let pressed =
            self.budget.used() + self.reserve.load(Ordering::Relaxed) > self.budget.limit();
        let backlog = self.fresh.load(Ordering::Relaxed);
        if pressed
            || backlog >= EVICTOR_BACKLOG
            || backlog > self.firm_max.load(Ordering::Relaxed) / 4
        {
            self.evict_bell.ring();
        }
    }
}

/// How long misses wait for a hand-back: longer than the kernel lets a lease be broken, as a rule.
const HAND_BACK_NS: u64 = 60_000_000_000;

/// Most fill threads of a pool.
pub(crate) const FILLERS_MAX: usize = 1024;

/// Bytes of new fills after which the evictor is woken though the budget is not pressed.
pub(crate) const EVICTOR_BACKLOG: u64 = 4 << 20;

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
        source: Arc<dyn crate::source::Source>,
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
    pub(crate) alias: AtomicPtr<crate::alias::Alias>,
    /// The kernel's mapping is taking the map's place, piece by piece: a page that cannot be installed any more is one
    /// that the kernel serves.
    pub(crate) leaving: AtomicBool,
}

/// One map, as the fault path sees it. Made before its gate opens, freed after it is shut.
pub(crate) struct MapCore {
    pub(crate) id: u32,
    /// Unlike the gate, never used again.
    pub(crate) serial: u64,
    pub(crate) pool: Arc<PoolCore>,
    /// First address and length of the region: whole units, whole granules.
    pub(crate) start: usize,
    pub(crate) region_len: usize,
    /// The part of it that is still the map's own.
    pub(crate) live: Live,
    /// Offset in the source of the first byte of the region, a multiple of the page size.
    pub(crate) base: u64,
    /// Bytes of the region that the source backs; up to the end of the last page they read as zero.
    pub(crate) data_len: u64,
    pub(crate) unit_shift: u32,
    pub(crate) table: Table,
    pub(crate) reading: Reading,
    /// For messages.
    pub(crate) name: Box<str>,
    pub(crate) pid: u32,
    /// 0: normal; otherwise a `Refusal`: absent pages are refused from now on.
    pub(crate) refusal: AtomicU8,
    /// The lease that guards the file, once it is taken.
    pub(crate) lease: std::sync::OnceLock<crate::keeper::LeaseId>,
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
    pub(crate) counters: Counters,
}

impl MapCore {
    /// Whether a miss reads what lies around it as well, as it does in the kernel's mappings: in those that stand in for one,
    /// unless the program said that it reads at random, and as long as all of the map fits the budget and there is room.
    pub(crate) fn reads_around(&self) -> bool {
        let budget = &self.pool.budget;
        self.stands_for.is_some()
            && self.unit_bytes() == PAGE as u64
            && self.streams.detects()
            && self.data_len <= budget.limit()
            && budget.used() + self.pool.reserve.load(Ordering::Relaxed) < budget.limit()
    }

    /// Whether the kernel's own mapping will take this map's place soon, now that its lease is broken. Not for ever: who hands
    /// the map back may itself be held up by who waits for that.
    pub(crate) fn being_handed_back(&self) -> bool {
        let Some(kernel) = &self.stands_for else {
            return false;
        };
        let now = raw::monotonic_ns();
        let first =
            match kernel
                .broken_at
                .compare_exchange(0, now, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => now,
                Err(then) => then,
            };
        self.refusal.load(Ordering::Acquire) == 0 && now - first < HAND_BACK_NS
    }

    /// Whether the kernel's own mapping is taking this map's place.
    pub(crate) fn leaving(&self) -> bool {
        self.stands_for
            .as_ref()
            .is_some_and(|k| k.leaving.load(Ordering::SeqCst))
    }

    /// Whether it is the engine itself that takes a range of the map's addresses away.
    pub(crate) fn takes_away(&self, range: &std::ops::Range<usize>) -> bool {
        self.closing.load(Ordering::SeqCst)
            || self.stands_for.as_ref().is_some_and(|kernel| {
                let from = kernel.replacing[0].load(Ordering::SeqCst);
                let to = kernel.replacing[1].load(Ordering::SeqCst);
                from <= range.start && range.end <= to
            })
    }

    pub(crate) fn region(&self) -> std::ops::Range<usize> {
        self.start..self.start + self.region_len
    }

    pub(crate) fn unit_bytes(&self) -> u64 {
        1 << self.unit_shift
    }

    pub(crate) fn page(&self, unit: Unit) -> &Page {
        self.table.page(unit)
    }

    pub(crate) fn unit_of(&self, addr: usize) -> Unit {
        ((addr - self.start) >> self.unit_shift) as Unit
    }

    pub(crate) fn unit_addr(&self, unit: Unit) -> usize {
        self.start + ((unit as usize) << self.unit_shift)
    }

    /// Units that hold data.
    pub(crate) fn data_units(&self) -> u64 {
        self.data_len.div_ceil(self.unit_bytes())
    }

    /// Bytes of `count` units from `first` that pages of the source back: whole pages, cut off at the end of the data.
    pub(crate) fn backed(&self, first: Unit, count: u64) -> std::ops::Range<u64> {
        let end = self.data_len.next_multiple_of(PAGE as u64);
        let from = first << self.unit_shift;
        from.min(end)..(from + (count << self.unit_shift)).min(end)
    }

    /// What the budget is charged for one unit: the bytes of its pages that exist.
    pub(crate) fn charge_of(&self, unit: Unit) -> u64 {
        let r = self.backed(unit, 1);
        r.end - r.start
    }
}

/// Something to wait for and to ring.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rung: AtomicU32,
    sleepers: AtomicU32,
}

impl Bell {
    /// Wakes one sleeper, if there is one.
    pub(crate) fn ring(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            self.rung.fetch_add(1, Ordering::SeqCst);
            futex::wake(&self.rung, 1);
        }
    }

    /// Wakes all sleepers.
    pub(crate) fn ring_all(&self) {
        self.rung.fetch_add(1, Ordering::SeqCst);
        futex::wake(&self.rung, futex::ALL);
    }

    /// Sleeps until rung, unless `idle` says (after this sleeper can be seen) that there is something to do.
    pub(crate) fn sleep(&self, timeout_ns: u64, idle: impl FnOnce() -> bool) {
        let ticket = self.rung.load(Ordering::SeqCst);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        if idle() {
            futex::wait(&self.rung, ticket, timeout_ns);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Remembers, for threads that found a unit resident when they faulted on it, that they have looked once.
///
/// The usual reason is that another thread installed the page between the fault and the look: then the load succeeds
/// when it is executed again. If the same thread comes again with the same unit in the same state, the page is really
/// gone. A forgotten entry costs one more look, a false one a read that finds the page there (EEXIST).
pub(crate) struct LastLooks([AtomicU64; LOOKS]);
const LOOKS: usize = 512;

impl LastLooks {
    pub(crate) const fn new() -> Self {
        LastLooks([const { AtomicU64::new(0) }; LOOKS])
    }

    /// Whether this thread looked at exactly this before. Notes it if not.
    pub(crate) fn again(&self, tid: u32, addr: usize, word: u64) -> bool {
        let mix = |x: u64| (x ^ (x >> 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let print = mix(mix(u64::from(tid)) ^ (addr >> 12) as u64) ^ mix(word) | 1;
        let slot = &self.0[(mix(u64::from(tid)) >> 55) as usize];
        if slot.load(Ordering::Relaxed) == print {
            slot.store(0, Ordering::Relaxed);
            return true;
        }
        slot.store(print, Ordering::Relaxed);
        false
    }
}
const _: () = assert!(LOOKS == 1 << (64 - 55));
