//! What a run is measured by. Everything counts from the end of the warm-up.

use crate::cache::PageKey;
use crate::cpu::Tid;
use crate::kernel::{Access, Kernel, On};
use faultless_trace::Nanos;
use hdrhistogram::Histogram;
use rustc_hash::FxHashSet;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};

/// What threads wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LockKind {
    MmapRead,
    MmapWrite,
    VmaWrite,
    Page,
    Siglock,
    Reclaim,
    Inode,
    Ranges,
    Uffd,
}

/// How many there are.
pub(crate) const LOCK_KINDS: usize = 9;

/// For machines; in the order of [`LockKind`].
pub(crate) const LOCK_KEYS: [&str; LOCK_KINDS] = [
    "mmap_lock_read",
    "mmap_lock_write",
    "vma_write",
    "page",
    "siglock",
    "reclaim",
    "invalidate_lock",
    "range_tree",
    "userfaultfd_queue",
];

/// Times of a group of threads.
#[derive(Debug, Clone)]
pub(crate) struct Group {
    pub(crate) name: String,
    pub(crate) threads: u32,
    pub(crate) rounds: u64,
    /// Durations of rounds of its loop, in nanoseconds.
    pub(crate) round: Histogram<u64>,
    pub(crate) faults: u64,
    /// Durations of faults, in nanoseconds.
    pub(crate) fault: Histogram<u64>,
    /// Waits, by [`LockKind`].
    pub(crate) waited: [Nanos; LOCK_KINDS],
    pub(crate) no_processor: Nanos,
}

/// All figures of a run.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    counts: Cell<bool>,
    pub(crate) from: Cell<Nanos>,
    pub(crate) until: Cell<Nanos>,
    pub(crate) busy: Cell<Nanos>,
    pub(crate) groups: RefCell<Vec<Group>>,
    group_of: RefCell<Vec<usize>>,
    /// Since when each thread has been at its round and at its fault.
    open: RefCell<Vec<[Option<Nanos>; 2]>>,
    runnable_before: RefCell<Vec<Nanos>>,
    /// Pages that have been read, at any time; and reads of pages that had been read before.
    seen: RefCell<FxHashSet<PageKey>>,
    pub(crate) reads: Cell<u64>,
    pub(crate) reads_again: Cell<u64>,
    /// Second attempts, and those that found the page gone.
    pub(crate) retries: Cell<u64>,
    pub(crate) gone: Cell<u64>,
    /// Pages of anonymous memory that have been swapped out.
    swapped: RefCell<BTreeMap<u32, BTreeSet<u64>>>,
    pub(crate) mmap_locks: Cell<u64>,
    pub(crate) longest_mmap_wait: Cell<Nanos>,
    pub(crate) chain: RefCell<Option<crate::chain::Chain>>,
}

/// Durations up to a minute, to three digits.
pub(crate) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("bounds that are in order")
}

impl Stats {
    pub(crate) fn new_group(&self, name: &str) -> usize {
        let mut groups = self.groups.borrow_mut();
        groups.push(Group {
            name: name.to_owned(),
            threads: 0,
            rounds: 0,
            round: histogram(),
            faults: 0,
            fault: histogram(),
            waited: [0; LOCK_KINDS],
            no_processor: 0,
        });
        groups.len() - 1
    }

    pub(crate) fn new_thread(&self, t: Tid, group: usize) {
        let mut of = self.group_of.borrow_mut();
        assert_eq!(of.len(), t.index(), "threads come in order");
        of.push(group);
        self.open.borrow_mut().push([None; 2]);
        self.groups.borrow_mut()[group].threads += 1;
    }

    pub(crate) fn group_of(&self, t: Tid) -> String {
        let group = self.group_of.borrow()[t.index()];
        self.groups.borrow()[group].name.clone()
    }

    fn with(&self, t: Tid, f: impl FnOnce(&mut Group)) {
        if self.counts.get() {
            let group = self.group_of.borrow()[t.index()];
            f(&mut self.groups.borrow_mut()[group]);
        }
    }

    /// The warm-up is over.
    pub(crate) fn begin(&self, k: &Kernel) {
        self.counts.set(true);
        self.from.set(k.cpu.now());
        self.busy.set(k.cpu.busy());
        let threads = self.group_of.borrow().len() as u32;
        *self.runnable_before.borrow_mut() =
            (0..threads).map(|t| k.cpu.waited_to_run(Tid(t))).collect();
    }

    pub(crate) fn end(&self, k: &Kernel) {
        self.until.set(k.cpu.now());
        self.busy.set(k.cpu.busy() - self.busy.get());
        // Waits that are not over.
        for (no, wait) in k.waiting.borrow().iter().enumerate() {
            let Some((on, since)) = wait else { continue };
            let kind = match on {
                On::MmapLock { write: false, .. } | On::Range { write: false, .. } => {
                    LockKind::MmapRead
                }
                On::MmapLock { .. } | On::Range { .. } => LockKind::MmapWrite,
                On::Vma { .. } => LockKind::VmaWrite,
                On::Inode { .. } => LockKind::Inode,
                On::Page(_) => LockKind::Page,
                On::Monitor | On::Work => continue,
            };
            let ns = k.cpu.now() - (*since).max(self.from.get());
            if matches!(kind, LockKind::MmapRead | LockKind::MmapWrite) {
                self.longest_mmap_wait
                    .set(self.longest_mmap_wait.get().max(ns));
            }
            self.with(Tid(no as u32), |g| g.waited[kind as usize] += ns);
        }
        // Rounds and faults that are not over have taken at least so long. They count as that where it is long: else a design under which
        // threads never get through would have the shortest tail.
        for (no, open) in self.open.borrow().iter().enumerate() {
            let so_far = |since: &Nanos| k.cpu.now() - since;
            let [round, fault] = open.each_ref().map(|o| o.as_ref().map(so_far));
            self.with(Tid(no as u32), |g| {
                for (so_far, all) in [(round, &mut g.round), (fault, &mut g.fault)] {
                    if let Some(ns) = so_far.filter(|&ns| ns > all.value_at_quantile(0.5)) {
                        all.saturating_record(ns);
                    }
                }
            });
        }
        let before = self.runnable_before.borrow();
        for t in (0..self.group_of.borrow().len() as u32).map(Tid) {
            let ns = k.cpu.waited_to_run(t) - before.get(t.index()).copied().unwrap_or(0);
            self.with(t, |g| g.no_processor += ns);
        }
    }

    pub(crate) fn waited(&self, kind: LockKind, t: Tid, ns: Nanos) {
        let is_mmap = matches!(kind, LockKind::MmapRead | LockKind::MmapWrite);
        if is_mmap && self.counts.get() {
            self.mmap_locks.set(self.mmap_locks.get() + 1);
            self.longest_mmap_wait
                .set(self.longest_mmap_wait.get().max(ns));
        }
        self.with(t, |g| {
            g.waited[kind as usize] += ns;
        });
    }

    pub(crate) fn round_begins(&self, t: Tid, now: Nanos) {
        self.open.borrow_mut()[t.index()][0] = Some(now);
    }

    pub(crate) fn fault_begins(&self, t: Tid, now: Nanos) {
        self.open.borrow_mut()[t.index()][1] = Some(now);
    }

    pub(crate) fn round(&self, t: Tid, ns: Nanos) {
        self.open.borrow_mut()[t.index()][0] = None;
        self.with(t, |g| {
            g.rounds += 1;
            g.round.saturating_record(ns);
        });
    }

    pub(crate) fn fault(&self, t: Tid, ns: Nanos) {
        self.open.borrow_mut()[t.index()][1] = None;
        self.with(t, |g| {
            g.faults += 1;
            g.fault.saturating_record(ns);
        });
    }

    pub(crate) fn read_begins(&self, key: PageKey) {
        let is_new = self.seen.borrow_mut().insert(key);
        if self.counts.get() {
            self.reads.set(self.reads.get() + 1);
            self.reads_again
                .set(self.reads_again.get() + u64::from(!is_new));
        }
    }

    /// A second attempt begins.
    pub(crate) fn retried(&self, k: &Kernel, a: &Access) {
        if self.counts.get() {
            self.retries.set(self.retries.get() + 1);
            let gone = k.cache.find(a.key()) == crate::cache::Found::Absent;
            self.gone.set(self.gone.get() + u64::from(gone));
        }
    }

    pub(crate) fn is_swapped(&self, key: PageKey) -> bool {
        let swapped = self.swapped.borrow();
        swapped
            .get(&key.object)
            .is_some_and(|s| s.contains(&key.page))
    }

    pub(crate) fn swap_out(&self, key: PageKey) {
        let mut swapped = self.swapped.borrow_mut();
        swapped.entry(key.object).or_default().insert(key.page);
    }

    /// Nothing is known of an object any more. Its pages that were swapped out.
    pub(crate) fn forget(&self, object: u32) -> BTreeSet<u64> {
        self.swapped
            .borrow_mut()
            .remove(&object)
            .unwrap_or_default()
    }

    /// Whether the warm-up is over.
    pub(crate) fn counts(&self) -> bool {
        self.counts.get()
    }
}
