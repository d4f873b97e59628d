//! Maps that stand in for mappings which a program asked the kernel for, and did not know that it would get ours.
//!
//! A stand-in lies at the kernel's kind of address, has the kernel's length, and can at any time be *handed back*: the
//! kernel's own mapping of the file takes its place, piece by piece, while other threads read it. Each piece is one
//! `mmap(MAP_FIXED)`, which replaces at most 2 MiB of resident pages and any length without, so no reader waits for long. If
//! a miss is in progress when its piece is replaced, `UFFDIO_COPY` returns `ENOENT` and the load is retried on the kernel's
//! mapping.
//!
//! This is the ground for `libfaultless_preload.so`, and no part of the crate's interface.

#![allow(
    unsafe_code,
    reason = "replaces mappings by address, reads pages in on behalf of others"
)]
#![allow(missing_docs, reason = "not a part of the interface")]

use crate::api::advice::{Advice, Reads};
use crate::api::map::Map;
use crate::api::pool::Pool;
use crate::base::error::Error;
use crate::base::ids::{Addr, Nanos};
use crate::base::primitive::Ordering;
use crate::base::stats::Stats;
use crate::base::{clock, process, source};
use crate::coherence::closing::{close, settle, unmap_live};
use crate::coherence::hand_back::{Aside, piece_end, replace};
use crate::coherence::hooks;
use crate::coherence::lease::Broken;
use crate::coherence::{keeper, lease};
use crate::evict::cooler::OWN_EFAULTS;
use crate::evict::release::forget_units;
use crate::fault::handler;
use crate::space::counters::Count;
use crate::space::map_core::{KernelMapping, MapCore, Reading};
use crate::space::{fds, identity, registry};
use faultless_sys::file::FileId;
use faultless_sys::{file, signal};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::fd::BorrowedFd;

pub use crate::base::thread::{Thread, spawn};
pub use crate::coherence::lend::{Lent, lend};
pub use crate::fault::chain::Disposition;

mod held;

pub use crate::coherence::hooks::{on_lease_broken, on_lost};
pub use held::{Held, hold_at_most, read_range};

/// How often, and how long after each other, a mapping is given back that the kernel does not take.
const HAND_BACK_TRIES: u32 = 100;
const HAND_BACK_NAP: Nanos = Nanos::from_millis(10);

/// What a stand-in is to be.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// The file, open for reading. The descriptor is not kept.
    pub file: BorrowedFd<'a>,
    /// Where it should lie, if there is room; 0: anywhere.
    pub place: usize,
    /// At `place` lies the kernel's mapping of the same bytes, with this advice (`MADV_…`), and is replaced. No thread may use
    /// that mapping, or change it, until the stand-in is made or refused. After a refusal such a mapping lies there again.
    pub over: Option<i32>,
    /// Bytes, a multiple of the page size.
    pub len: usize,
    /// Offset in the file, a multiple of the page size.
    pub offset: u64,
    /// `MAP_PRIVATE` or `MAP_SHARED`, with what else concerns the mapping rather than its making.
    pub flags: i32,
    /// Whether a lease guards the bytes. Without one the user vouches for them.
    pub leased: bool,
    /// How the file is read.
    pub reads: Reads,
}

/// A map in the place of a mapping of the kernel's. Dropping it unmaps it.
#[derive(Debug)]
pub struct StandIn(Map);

impl StandIn {
    /// Makes one.
    ///
    /// # Errors
    ///
    /// As [`MapOptions::map`](crate::MapOptions::map). On the mmap backend there is nothing to be gained, and
    /// [`Error::InvalidOption`] says so.
    pub fn new(pool: &Pool, wanted: &Wanted<'_>) -> Result<StandIn, Error> {
        let name = source::file_name(wanted.file);
        if wanted.leased {
            lease::check_file(wanted.file.as_raw_fd()).map_err(|r| lease::error(&name, r))?;
        }
        let len = file::status(wanted.file.as_raw_fd())
            .map_err(|e| Error::kernel(format!("cannot stat {name}"), e))?
            .len;
        let map = pool
            .options()
            .offset(wanted.offset)
            .len(wanted.len)
            .reads(wanted.reads)
            .stand_for(wanted.flags, wanted.place)
            .over(wanted.over)
            .map_file(wanted.file, name, wanted.leased)?;
        match map.core() {
            Some(_) if wanted.over.is_some() && wanted.leased => {
                StandIn(map).lease_or_give_back(len)
            }
            Some(_) => Ok(StandIn(map)),
            None => Err(Error::InvalidOption {
                what: "the backend",
                value: pool.backend().to_string(),
                remedy: "only the engine can stand in for the kernel's mmap",
            }),
        }
    }

    /// Takes the lease of one that has replaced the kernel's mapping, or puts that back.
    fn lease_or_give_back(self, len: u64) -> Result<StandIn, Error> {
        let workers = &self.0.pool().0.workers;
        let Err(refused) = lease::take(self.core(), workers, Broken::HandBack, len) else {
            return Ok(self);
        };
        let mut given = self.hand_back();
        for _ in 0..HAND_BACK_TRIES {
            match given {
                Ok(_) => return Err(refused),
                // The kernel is out of memory for a moment.
                Err(kept) => {
                    clock::nap(HAND_BACK_NAP);
                    given = kept.0.hand_back();
                }
            }
        }
        match given {
            Ok(_) => Err(refused),
            // The program's bytes come from nowhere else now.
            Err(kept) => Ok(kept.0),
        }
    }

    fn core(&self) -> &'static MapCore {
        self.0
            .core()
            .expect("a stand-in has an engine from `new` until it is consumed")
    }

    fn kernel(&self) -> &'static KernelMapping {
        self.core()
            .stands_for
            .as_ref()
            .expect("`stand_for` was called in `new`")
    }

    /// From the first address that is still its own to the end of the last; empty if there are none.
    pub fn range(&self) -> Range<usize> {
        self.core().live.get().hull()
    }

    /// Whether some of a range is still its own.
    pub fn touches(&self, range: &Range<usize>) -> bool {
        self.core().live.get().touch(range)
    }

    /// Whether all of a range is still its own.
    pub fn covers(&self, range: &Range<usize>) -> bool {
        self.core().live.covers(range.start, range.len())
    }

    /// The address of the map's first byte, which may be the program's by now.
    pub fn first(&self) -> usize {
        self.core().start.get()
    }

    /// How many bytes the program has mapped with it, at first.
    pub fn bytes(&self) -> usize {
        self.core().region_len
    }

    /// Never used again by another map of the process.
    pub fn serial(&self) -> u64 {
        self.core().serial.get()
    }

    /// Whether a lease guards it.
    pub fn leased(&self) -> bool {
        matches!(self.core().reading, Reading::File { leased: true, .. })
    }

    /// Which file it is of.
    pub fn file_id(&self) -> FileId {
        match &self.core().reading {
            Reading::File { id, .. } => *id,
            Reading::Source { .. } => unreachable!("stand-ins are made of files"),
        }
    }

    /// The map.
    pub fn map(&self) -> &Map {
        &self.0
    }

    /// What happened in it.
    pub fn stats(&self) -> Stats {
        self.0.stats()
    }

    /// Bytes that it holds of the budget.
    pub fn resident(&self) -> u64 {
        let counters = &self.core().counters;
        counters
            .get(Count::Charged)
            .wrapping_sub(counters.get(Count::Released))
    }

    /// `MADV_NORMAL`, `MADV_RANDOM` or `MADV_SEQUENTIAL`.
    pub fn advise(&self, advice: i32) {
        self.kernel().advice.store(advice, Ordering::Relaxed);
        self.0.advise(match advice {
            libc::MADV_RANDOM => Advice::Random,
            libc::MADV_SEQUENTIAL => Advice::Sequential,
            _ => Advice::Normal,
        });
    }

    /// `MADV_DONTFORK` or `MADV_DOFORK`.
    pub fn set_dont_fork(&self, dont: bool) {
        self.kernel().dont_fork.store(dont, Ordering::Relaxed);
    }

    /// Ends it with a call that unmaps its addresses: `unmap` runs when no fill is in flight any more.
    pub fn unmap_with<R>(mut self, unmap: impl FnOnce() -> R) -> R {
        let core = self.core();
        self.0.take_core();
        // SAFETY: taken out of the map, whose only owner is consumed here.
        let core = unsafe { close(core) };
        unmap_live(&core, |_, _| ());
        let result = unmap();
        settle(core);
        result
    }

    /// Whether a part can be unmapped, and the rest be served.
    pub fn can_be_trimmed(&self, gone: &Range<usize>) -> bool {
        let (left, dropped) = self.core().live.get().without(gone);
        dropped.is_none() && !left.hull().is_empty()
    }

    /// Unmaps a part, by a call that does so. The rest goes on to be served.
    ///
    /// # Errors
    ///
    /// The call's. The part is the kernel's mapping then.
    pub fn trim_with<E>(
        &self,
        gone: &Range<usize>,
        unmap: impl Fn() -> Result<usize, E>,
    ) -> Result<usize, E> {
        let core = self.core();
        let before = core.live.get();
        core.live.cut(gone);
        identity::wait_for_discards();
        // A fill that is in flight finds nothing to install into, and its load runs again, as the kernel has it.
        let mut result = unmap();
        if result.is_err() {
            // It is still mapped, and the map's no longer. (All of the parts that it lies in, so that no mapping has to be cut.)
            for part in before
                .iter()
                .filter(|p| p.start < gone.end && gone.start < p.end)
            {
                if replace(core, self.kernel(), part.start, part.len()).is_ok() {
                    core.live.cut(&part);
                }
            }
            result = unmap();
        }
        let region = core.region();
        let within = |at: usize| core.unit_of(Addr::new(at.clamp(region.start, region.end)));
        forget_units(core, within(gone.start)..within(gone.end));
        result
    }

    /// Puts the kernel's own mapping in its place. Returns the longest time that one piece took, in nanoseconds.
    ///
    /// # Errors
    ///
    /// The kernel refused a piece, and left it as it was: the stand-in goes on to serve those that were not replaced.
    pub fn hand_back(mut self) -> Result<u64, Box<(StandIn, Error)>> {
        let core = self.core();
        let mut longest = 0;
        self.give_way();
        let mut aside = Vec::new();
        for part in core.live.get().iter() {
            let before = clock::now();
            // (A system call that counts on pinned pages must find some page at each moment.)
            let moved = match self.kernel().holders.load(Ordering::SeqCst) {
                0 => Aside::take(core, self.kernel(), &part),
                _ => None,
            };
            let whole = moved.is_some();
            aside.extend(moved);
            let mut at = part.start;
            while at < part.end {
                let before = if whole { before } else { clock::now() };
                let end = if whole {
                    part.end
                } else {
                    piece_end(core, at, part.end)
                };
                // Looked at anew each time: the program may take addresses away meanwhile by a call that nobody sees.
                if core.live.covers(at, end - at)
                    && let Err(e) = replace(core, self.kernel(), at, end - at)
                {
                    self.kernel().leaving.store(false, Ordering::SeqCst);
                    let what = format!("cannot hand the map of {} back to the kernel", core.name);
                    return Err(Box::new((self, Error::kernel(what, e))));
                }
                longest = longest.max(clock::now().since(before).get());
                at = end;
            }
        }
        self.finish(aside);
        Ok(longest)
    }

    /// Ends a stand-in that has no addresses left.
    pub fn end(mut self) {
        self.give_way();
        self.finish(Vec::new());
    }

    /// From now on a page that cannot be installed is one that the kernel serves.
    fn give_way(&self) {
        // (An eviction that is on its way concerns the kernel's mapping, if that is there by then, which loses nothing by it.)
        self.kernel().leaving.store(true, Ordering::SeqCst);
        self.core().pool.budget.line.call_all();
        handler::expect_latecomers();
    }

    /// Ends the service where the kernel's mapping is in place.
    fn finish(&mut self, aside: Vec<Aside>) {
        let core = self.core();
        // Before nobody finds the map any more: a call that failed on a page of it is made again.
        handler::expect_latecomers();
        self.0.take_core();
        // SAFETY: taken out of the map, which serves nothing any more: it is consumed by all callers.
        let core = unsafe { close(core) };
        if let Some(&lease) = core.lease.get() {
            // Before the memory is freed, which takes a hundred times as long as all that was done so far.
            keeper::end_lease(lease);
        }
        drop(aside);
        settle(core);
    }
}

/// Whether some stand-in (or another map of the engine's) has a part of the range. Takes no lock.
pub fn touches(range: &Range<usize>) -> bool {
    registry::touches(range)
}

/// The kernel has given out addresses that were thought to be a stand-in's: whichever they belonged to has lost them. To be
/// called before the program learns the addresses.
pub fn given_out(range: &Range<usize>) {
    let _no_handler_here = signal::Blocked::all();
    registry::for_each_in(range, |core| {
        if !core.takes_away(range) && core.live.cut(range).0.hull().is_empty() {
            hooks::lost();
        }
    });
    identity::wait_for_discards();
}

/// How many `pwritev` calls of the engine's own were answered by EFAULT: they are not the program's.
pub fn own_efaults() -> u64 {
    OWN_EFAULTS.load(Ordering::Relaxed)
}

/// Starts the engine's threads that belong to no pool.
///
/// # Errors
///
/// The system refuses a thread.
pub fn start_threads() -> std::io::Result<()> {
    keeper::start().map(drop)
}

/// Ends the engine's threads that belong to no pool, where there is none any more.
pub fn stop_threads() {
    keeper::stop();
}

/// Replaces (or, without a new one, reads) the disposition of SIGBUS that the program believes in. While the engine's handler
/// is not installed, `kernels` is called instead.
///
/// # Errors
///
/// What `kernels` returned.
pub fn sigbus<R>(new: Option<Disposition>, kernels: impl FnOnce() -> R) -> Result<Disposition, R> {
    handler::SIGBUS.replace_former(new, kernels)
}

/// How often some stand-in has begun to be handed back. A system call that failed on an absent page is to be made again if that
/// has changed meanwhile.
pub fn hand_backs() -> u64 {
    handler::hand_backs()
}

/// Runs `f` on a thread of the engine's with descriptors of its own: what it opens takes no number of the program's. `None` where
/// there is no such thread.
pub fn apart<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    keeper::apart(f)
}

/// Whether this process is a copy of the one in which the engine runs.
pub fn is_copy() -> bool {
    process::forked()
}

/// In a copy of the process that was made without fork handlers: closes what it has of the engine's descriptors, with which it could
/// act on the process that it was copied from. Elsewhere it does nothing, at the price of two loads.
#[inline]
pub fn forsake() {
    if fds::is_bare_copy() {
        fds::forsake(hooks::in_child);
    }
}

/// Whether this is a copy of the process that the C library's `fork` did not make.
#[inline]
pub fn is_bare_copy() -> bool {
    fds::is_bare_copy()
}

/// Whether the engine's threads have descriptors of their own, which no copy of the process gets.
pub fn descriptors_are_apart() -> bool {
    fds::protected()
}

/// Has the engine's descriptors keep away from low numbers.
pub fn keep_descriptors_high() {
    fds::keep_high();
}

/// Whether a number of the program's table is a descriptor of the engine's.
pub fn is_engines_descriptor(number: i32) -> bool {
    fds::is_engines(number)
}

/// Says that the program has put something of its own under a number.
pub fn descriptor_is_programs(number: i32) {
    fds::forget(number);
}

/// Runs `f` on all numbers that may be the engine's.
pub fn for_each_descriptor(f: impl FnMut(i32)) {
    fds::for_each_number(f);
}

/// Says that the program is about to take a POSIX lock on a file. From then on the engine closes no descriptor of it while
/// there are locks on it.
pub fn locks_coming(id: FileId) {
    keeper::locks_coming(id);
}

/// Says that the call is over that [`locks_coming`] announced.
pub fn locks_settled(id: FileId) {
    keeper::locks_settled(id);
}

/// Who holds a POSIX lock on the file that conflicts with a lock for writing on all of it.
pub fn posix_locked(fd: i32) -> bool {
    keeper::posix_locked(fd)
}

/// Starts the engine's bookkeeping of forks, so that a handler registered after it runs before it.
pub fn watch_forks() {
    crate::coherence::fork::watch();
    crate::guards::fork::watch();
}
