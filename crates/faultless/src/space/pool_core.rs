//! What the fault path knows of a pool.

use crate::base::padded::Padded;
use crate::base::primitive::{AtomicBool, AtomicU32, AtomicU64, Mutex, OnceLock, Ordering};
use crate::base::stats::Stats;
use crate::space::cooling::Cooling;
use crate::space::fds::Fd;
use crate::space::last_looks::LastLooks;
use crate::space::streams::Requests;
use crate::space::trips::Trips;
use crate::sync::arrivals::Arrivals;
use crate::sync::bell::Bell;
use crate::sync::blocks::Blocks;
use crate::sync::budget::{Budget, portion_of};
use crate::sync::handover::Handover;
use crate::sync::huge_slots::HugeSlots;
use crate::sync::outbox::Outbox;
use crate::sync::staging::Staging;
use crate::sync::withheld::Withheld;
use faultless_sys::raw;

/// What a pool's maps share. (Fields that some threads write often are padded, so that other threads need not fetch the neighbouring fields again.)
pub(crate) struct PoolCore {
    pub(crate) budget: Budget,
    pub(crate) uffd: Fd,
    pub(crate) staging: Staging,
    /// Where huge pages are filled, once a map has any.
    pub(crate) huge: OnceLock<HugeSlots>,
    /// Buffers for reads of users' sources.
    pub(crate) blocks: Blocks,
    /// Units filled, on their way to the evictor.
    pub(crate) filled: Arrivals,
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
    pub(crate) clock: Padded<AtomicU32>,
    /// Units taken out of their maps so far: as long as it moves, who waits for memory has hope.
    pub(crate) evicted: Padded<AtomicU32>,
    /// Where units cool; set by the evictor as it starts, if it can be had.
    pub(crate) cooling: OnceLock<Cooling>,
    /// Resident units that the kernel had taken back, as loads found out.
    pub(crate) taken_back: Padded<AtomicU32>,
    /// Bytes of the largest unit that any map of the pool has had.
    pub(crate) largest_unit: AtomicU64,
    /// Bytes that the evictor knows of and can still mark MADV_FREE.
    pub(crate) firm: Padded<AtomicU64>,
    /// The process does not know of the pool: in a control group with a limit, the kernel must be able to take back nearly all
    /// of its memory.
    pub(crate) guest: bool,
    /// Most of both together, before fills wait for the marking.
    pub(crate) firm_max: AtomicU64,
    /// Bytes below the limit at which the evictor starts.
    pub(crate) reserve: AtomicU64,
    /// Pages given up, after which a refault does not count as soon any more: the evictor's policy says how many.
    pub(crate) ghost_reach: AtomicU64,
    /// The most that a thread has said it waits for, since the evictor last looked.
    pub(crate) wanted: Padded<AtomicU64>,
    /// How many threads read users' sources.
    pub(crate) source_readers: AtomicU32,
    /// Their thread ids.
    pub(crate) source_reader: [AtomicU32; SOURCE_READERS_MAX],
    pub(crate) last_looks: LastLooks,
    /// Signals that threads which serve misses would have taken.
    pub(crate) withheld: Withheld,
    pub(crate) stopping: AtomicBool,
    /// Loads that failed, where the program wants to be told.
    pub(crate) outbox: Option<Outbox>,
    /// Counters of maps that are gone. (No handler takes the lock.)
    pub(crate) past: Mutex<Stats>,
}

impl PoolCore {
    /// The calling thread runs users' sources from now on.
    pub(crate) fn will_read_sources(&self) {
        let at = self.source_readers.fetch_add(1, Ordering::AcqRel) as usize;
        if let Some(tid) = self.source_reader.get(at) {
            tid.store(raw::gettid(), Ordering::Release);
        }
    }

    /// Whether the calling thread runs users' sources for this pool. If it waited for one itself, it might wait for ever.
    pub(crate) fn reads_sources(&self) -> bool {
        let me = raw::gettid();
        let count = self.source_readers.load(Ordering::Acquire) as usize;
        self.source_reader[..count.min(SOURCE_READERS_MAX)]
            .iter()
            .any(|tid| tid.load(Ordering::Acquire) == me)
    }

    /// Bytes that are charged while the pool has no map and no thread: what its queues and buffers have come to.
    pub(crate) fn fixed_bytes(&self) -> u64 {
        self.filled.memory()
            + self.trips.bytes()
            + self.staging.charged_bytes()
            + self.blocks.spare_bytes()
    }

    /// Whether so much is not marked as reclaimable that new pages must wait for the marking.
    pub(crate) fn too_firm(&self) -> bool {
        let most = self.firm_max.load(Ordering::Relaxed);
        // (In this order: a unit is counted as firm before it is no longer counted as on its way.)
        most != u64::MAX && self.filled.bytes() + self.firm.load(Ordering::Relaxed) > most
    }

    /// The portions in which bytes of filled units are counted: small beside what may be unmarked.
    pub(crate) fn fill_portion(&self) -> u64 {
        let firm_max = self.firm_max.load(Ordering::Relaxed);
        portion_of(self.budget.limit().min(firm_max))
    }

    /// Whether a fill may take so many bytes.
    pub(crate) fn has_room(&self, bytes: u64) -> bool {
        !self.too_firm() && self.budget.makes_room(bytes)
    }

    /// Whether there is enough for the evictor to do.
    pub(crate) fn has_work_for_evictor(&self) -> bool {
        let backlog = self.filled.bytes();
        self.budget.used() + self.reserve.load(Ordering::Relaxed) > self.budget.limit()
            || backlog >= EVICTOR_BACKLOG
            || backlog > self.firm_max.load(Ordering::Relaxed) / 4
    }

    /// Wakes the evictor if there is enough for it to do. Cheap when there is not.
    pub(crate) fn nudge_evictor(&self) {
        if self.has_work_for_evictor() {
            self.evict_bell.ring();
        }
    }
}

/// Most fill threads of a pool.
pub(crate) const FILLERS_MAX: usize = 1024;

/// Most threads that read sources: fill threads and workers.
pub(crate) const SOURCE_READERS_MAX: usize = FILLERS_MAX + 16;

/// Bytes of new fills after which the evictor is woken though the budget is not pressed.
const EVICTOR_BACKLOG: u64 = 4 << 20;

/// Threads were taken out of what they did, so that what they had charged may be lost.
#[cfg(faultless_sim)]
pub static LOSSES: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);

#[cfg(faultless_sim)]
impl PoolCore {
    /// All that was charged has been given back, by the maps and by the threads.
    pub(crate) fn check_settled(&self) {
        if !LOSSES.load(std::sync::atomic::Ordering::Relaxed) {
            let (used, fixed) = (self.budget.charged(), self.fixed_bytes());
            assert_eq!(used, fixed, "charged, and what the pool itself has");
        }
    }
}
