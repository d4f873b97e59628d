//! What the designs are made of: pages are looked up, read, mapped; locks are taken, and their waits counted.
//!
//! A design of the fault ([`crate::designs`]) uses this and nothing else; so does whatever changes an address space
//! ([`crate::calls`]).

use crate::cache::{Cache, Found, PageKey, Reclaimed, Unmapped};
use crate::costs::Costs;
use crate::cpu::{Alarm, Cpu, Next, Tid};
use crate::designs::Design;
use crate::rwsem::{Rwsem, wake_all};
use crate::stats::{LockKind, Stats};
use crate::storage::Storage;
use crate::vma::{Backing, Vma};
use faultless_trace::Nanos;
use rustc_hash::FxHashMap;
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Waker};

/// A part of a simulation that takes its time.
pub(crate) type Running<'a, T = ()> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Pages that direct reclaim takes at a time (`SWAP_CLUSTER_MAX`).
const RECLAIM_BATCH: u64 = 32;
/// Attempts at that before it goes beyond the limit. (A control group would kill somebody.)
const RECLAIM_TRIES: u32 = 16;
/// How long a miss that has no memory waits before it looks again.
const EVICTION_POLL: Nanos = 50_000;
/// Pages that are charged at a time (`MEMCG_CHARGE_BATCH`).
const CHARGE_BATCH: u64 = 64;
/// Pages that a fault maps at a time (`fault_around_bytes`).
const FAULT_AROUND: u64 = 16;

/// A process's memory.
#[derive(Debug)]
pub(crate) struct Mm {
    pub(crate) no: u32,
    pub(crate) name: String,
    pub(crate) mmap_lock: Rwsem,
    pub(crate) siglock: Turn,
    /// `map_changing_lock` of the userfaultfd, which copies share.
    pub(crate) map_changing: Turn,
    pub(crate) vmas: RefCell<Vec<Rc<Vma>>>,
    pub(crate) monitor: crate::designs::uffd_monitor::Queue,
    pub(crate) ranges: crate::designs::range::Ranges,
}

impl Mm {
    pub(crate) fn new(no: u32, name: &str) -> Mm {
        Mm {
            no,
            name: name.to_owned(),
            mmap_lock: Rwsem::default(),
            siglock: Turn::default(),
            map_changing: Turn::default(),
            vmas: RefCell::default(),
            monitor: crate::designs::uffd_monitor::Queue::default(),
            ranges: crate::designs::range::Ranges::default(),
        }
    }
}

/// A spin lock whose critical section has a certain length, or a cache line that is written: one comes after the other, and who comes
/// later computes until it is its turn.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    free_at: Cell<Nanos>,
    /// The processor that had it last.
    last: Cell<Option<u32>>,
}

impl Turn {
    pub(crate) async fn pass(&self, k: &Kernel, t: Tid, kind: Option<LockKind>, section: Nanos) {
        let (now, core) = (k.cpu.now(), k.cpu.core(t));
        let transfer = match self.last.replace(Some(core)) {
            Some(last) if last == core => 0,
            _ => k.costs.line,
        };
        let section = k.cpu.scattered(section);
        let until = self.free_at.get().max(now) + transfer + section;
        self.free_at.set(until);
        if let Some(kind) = kind {
            k.stats.waited(kind, t, until - now - section);
        }
        k.cpu.work_exactly(t, until - now).await;
    }
}

/// A thread of a process.
#[derive(Debug, Clone)]
pub(crate) struct Thread {
    pub(crate) tid: Tid,
    pub(crate) mm: Rc<Mm>,
}

/// A touch of an absent page.
#[derive(Debug, Clone)]
pub(crate) struct Access {
    pub(crate) vma: Rc<Vma>,
    pub(crate) page: u64,
    /// How long its read took, where that was recorded.
    pub(crate) read: Option<Nanos>,
}

impl Access {
    pub(crate) fn key(&self) -> PageKey {
        PageKey {
            object: self.vma.backing.object(),
            page: self.page,
        }
    }

    pub(crate) fn is_anonymous(&self) -> bool {
        matches!(self.vma.backing, Backing::Anonymous { .. })
    }
}

/// What a thread waits for.
#[derive(Debug, Clone)]
pub(crate) enum On {
    MmapLock {
        mm: Rc<Mm>,
        write: bool,
    },
    Vma {
        vma: Rc<Vma>,
    },
    Inode {
        vma: Rc<Vma>,
        write: bool,
    },
    /// By its place in the cache.
    Page(u32),
    Range {
        mm: Rc<Mm>,
        write: bool,
    },
    Monitor,
    /// Something to do.
    Work,
}

/// How a look for a page ended.
#[derive(Debug)]
pub(crate) enum Looked {
    /// It is mapped now.
    Mapped,
    /// It has to be waited for, by way of [`Kernel::get`].
    Missing(Missing),
}

/// A page that has to be waited for.
#[derive(Debug)]
pub(crate) struct Missing {
    /// Where it is in the cache; None: nobody has put it there yet.
    page: Option<u32>,
    /// The thread that looked is to read it.
    is_major: bool,
    /// It is up to date, and locked for a moment.
    is_busy: bool,
    /// The `invalidate_lock` is held.
    holds_inode: bool,
}

impl Missing {
    /// Whether the fault is a major one: the thread that looked is to read the page.
    pub(crate) fn is_major(&self) -> bool {
        self.is_major
    }

    /// Whether the page is up to date: somebody has locked it for a moment.
    pub(crate) fn is_up_to_date(&self) -> bool {
        self.is_busy
    }
}

/// What of the machine is not the same for all workloads.
pub(crate) struct Machine {
    pub(crate) cores: u32,
    pub(crate) costs: Costs,
    pub(crate) storage: Storage,
    /// Room for pages, and `memory.high`.
    pub(crate) memory: (u64, Option<u64>),
    /// Whether a rwsem may be taken before those that sleep (since Linux 3.10).
    pub(crate) steals: bool,
    /// Whether the kernel is preempted (CONFIG_PREEMPT).
    pub(crate) preempts: bool,
    pub(crate) seed: u64,
}

/// The machine.
pub(crate) struct Kernel {
    pub(crate) cpu: Cpu,
    pub(crate) costs: Costs,
    pub(crate) storage: Storage,
    pub(crate) cache: Cache,
    pub(crate) design: Rc<dyn Design>,
    pub(crate) stats: Stats,
    /// Whether a rwsem may be taken before those that sleep (since Linux 3.10).
    pub(crate) steals: bool,
    pub(crate) mms: RefCell<Vec<Rc<Mm>>>,
    /// What each thread waits for, and since when.
    pub(crate) waiting: RefCell<Vec<Option<(On, Nanos)>>>,
    /// What each thread is doing.
    doing: RefCell<Vec<&'static str>>,
    /// Pages that are read together with another one.
    ahead: RefCell<FxHashMap<u32, Vec<u32>>>,
    /// Pages that each thread has been charged for and has not taken yet; and those beyond `memory.high`.
    charged: RefCell<Vec<(u64, u64)>>,
    /// The spin lock of the lists of pages.
    lru_lock: Turn,
    /// The thread that reclaims ahead of need, if there is one: kswapd, or the evictor of the process.
    pub(crate) reclaimer: Cell<Option<Tid>>,
    /// The `invalidate_lock` of each file.
    inodes: RefCell<FxHashMap<u32, Rc<Rwsem>>>,
    /// Mappings whose pages can be reclaimed, by their number.
    mappings: RefCell<FxHashMap<u32, Rc<Vma>>>,
    /// Threads that have been granted what they wait for and will be woken.
    pub(crate) waking: Cell<u64>,
    /// Threads that were to end had not when time was over.
    pub(crate) unfinished: Cell<bool>,
    /// Pages of anonymous memory that are in no page table any more, and not free yet.
    pub(crate) freeing: Cell<u64>,
    next_object: Cell<u32>,
    next_vma: Cell<u32>,
}

impl Kernel {
    pub(crate) fn new(machine: Machine, design: Rc<dyn Design>) -> Kernel {
        Kernel {
            cpu: Cpu::new(
                machine.cores,
                &machine.costs,
                machine.preempts,
                machine.seed,
            ),
            costs: machine.costs,
            storage: machine.storage,
            cache: Cache::new(machine.memory.0, machine.memory.1),
            design,
            stats: Stats::default(),
            steals: machine.steals,
            mms: RefCell::default(),
            waiting: RefCell::default(),
            doing: RefCell::default(),
            ahead: RefCell::default(),
            charged: RefCell::default(),
            lru_lock: Turn::default(),
            reclaimer: Cell::new(None),
            inodes: RefCell::default(),
            mappings: RefCell::default(),
            waking: Cell::new(0),
            unfinished: Cell::new(false),
            freeing: Cell::new(0),
            next_object: Cell::new(0),
            next_vma: Cell::new(0),
        }
    }

    pub(crate) fn new_mm(&self, name: &str) -> Rc<Mm> {
        let mut all = self.mms.borrow_mut();
        let mm = Rc::new(Mm::new(all.len() as u32, name));
        all.push(Rc::clone(&mm));
        mm
    }

    pub(crate) fn new_thread(&self, mm: &Rc<Mm>, group: usize) -> Thread {
        let tid = self.cpu.spawn(mm.no);
        self.waiting.borrow_mut().push(None);
        self.doing.borrow_mut().push("");
        self.charged.borrow_mut().push((0, 0));
        self.stats.new_thread(tid, group);
        Thread {
            tid,
            mm: Rc::clone(mm),
        }
    }

    pub(crate) fn new_object(&self) -> u32 {
        self.next_object.replace(self.next_object.get() + 1)
    }

    pub(crate) fn new_vma(
        &self,
        mm: &Mm,
        backing: Backing,
        pages: u64,
        read_ahead: u32,
    ) -> Rc<Vma> {
        let no = self.next_vma.replace(self.next_vma.get() + 1);
        let inode = match backing {
            Backing::Anonymous { .. } => None,
            Backing::File { object, .. } => {
                let mut inodes = self.inodes.borrow_mut();
                Some(Rc::clone(inodes.entry(object).or_default()))
            }
        };
        let vma = Rc::new(Vma::new(no, mm.no, backing, pages, read_ahead, inode));
        self.mappings.borrow_mut().insert(no, Rc::clone(&vma));
        vma
    }

    /// A mapping has gone, with its page table.
    pub(crate) fn forget_vma(&self, vma: &Vma) {
        self.mappings.borrow_mut().remove(&vma.no);
    }

    /// Gets into the kernel, to do something. What it did before.
    pub(crate) fn enter(&self, t: Tid, what: &'static str) -> &'static str {
        self.cpu.enter_kernel(t);
        self.now_does(t, what)
    }

    /// Goes on with what it did before.
    pub(crate) async fn leave(&self, t: Tid, before: &'static str) {
        self.now_does(t, before);
        if before.is_empty() {
            self.cpu.leave_kernel(t).await;
        }
    }

    pub(crate) fn now_does(&self, t: Tid, what: &'static str) -> &'static str {
        std::mem::replace(&mut self.doing.borrow_mut()[t.index()], what)
    }

    pub(crate) fn does(&self, t: Tid) -> &'static str {
        self.doing.borrow()[t.index()]
    }

    /// Waits, and says meanwhile for what.
    pub(crate) async fn waits<T>(&self, t: Tid, on: On, what: impl Future<Output = T>) -> T {
        let outer = self.waiting.borrow_mut()[t.index()].replace((on, self.cpu.now()));
        let result = what.await;
        self.waiting.borrow_mut()[t.index()] = outer;
        result
    }

    // ---- Locks ----

    /// `mmap_read_lock`.
    pub(crate) async fn mmap_read(&self, t: &Thread, mm: &Rc<Mm>) {
        let from = self.cpu.now();
        let on = On::MmapLock {
            mm: Rc::clone(mm),
            write: false,
        };
        self.waits(t.tid, on, mm.mmap_lock.read(self, t.tid)).await;
        self.stats
            .waited(LockKind::MmapRead, t.tid, self.cpu.now() - from);
    }

    /// `mmap_write_lock`.
    pub(crate) async fn mmap_write(&self, t: &Thread, mm: &Rc<Mm>) {
        let from = self.cpu.now();
        let on = On::MmapLock {
            mm: Rc::clone(mm),
            write: true,
        };
        self.waits(t.tid, on, mm.mmap_lock.write(self, t.tid)).await;
        self.stats
            .waited(LockKind::MmapWrite, t.tid, self.cpu.now() - from);
    }

    /// `vma_start_write`, under `mmap_lock` for writing.
    pub(crate) async fn vma_write(&self, t: &Thread, vma: &Rc<Vma>) {
        let from = self.cpu.now();
        let on = On::Vma {
            vma: Rc::clone(vma),
        };
        self.waits(t.tid, on, vma.start_write(self, t.tid)).await;
        self.stats
            .waited(LockKind::VmaWrite, t.tid, self.cpu.now() - from);
    }

    /// `vma_start_read`, and what the first fault in anonymous memory needs besides: an `anon_vma`, for which it tries to get
    /// `mmap_lock` (`__vmf_anon_prepare`). Where that fails, the fault has to be made under `mmap_lock`.
    pub(crate) async fn vma_read(&self, t: &Thread, a: &Access) -> bool {
        if !a.vma.start_read(self, t.tid).await {
            return false;
        }
        if a.is_anonymous() && !a.vma.has_anon_vma.get() {
            let from = self.cpu.now();
            if !t.mm.mmap_lock.try_read(self, t.tid).await {
                a.vma.end_read(self, t.tid).await;
                return false;
            }
            a.vma.has_anon_vma.set(true);
            t.mm.mmap_lock.unlock_read(self, t.tid).await;
            self.stats
                .waited(LockKind::MmapRead, t.tid, self.cpu.now() - from);
        }
        true
    }

    /// `filemap_invalidate_lock` of a file, shared or not.
    pub(crate) async fn inode_lock(&self, t: &Thread, vma: &Rc<Vma>, write: bool) {
        let Some(inode) = &vma.inode else { return };
        let from = self.cpu.now();
        let on = On::Inode {
            vma: Rc::clone(vma),
            write,
        };
        let wait = async {
            match write {
                true => inode.write(self, t.tid).await,
                false => inode.read(self, t.tid).await,
            }
        };
        self.waits(t.tid, on, wait).await;
        self.stats
            .waited(LockKind::Inode, t.tid, self.cpu.now() - from);
    }

    /// And back.
    pub(crate) async fn inode_unlock_shared(&self, t: &Thread, vma: &Vma) {
        if let Some(inode) = &vma.inode {
            inode.unlock_read(self, t.tid).await;
        }
    }

    // ---- Pages ----

    /// Looks for the page of an access. One that is there, or that needs no reading, is mapped; for another one it has to wait.
    ///
    /// (`filemap_fault`, `do_swap_page`, `do_anonymous_page`, up to where the fault may give up the lock that it is made under.)
    pub(crate) async fn look(&self, t: &Thread, a: &Access) -> Looked {
        let mut holds_inode = false;
        let missing = |page, is_major, is_busy, holds_inode| {
            Looked::Missing(Missing {
                page,
                is_major,
                is_busy,
                holds_inode,
            })
        };
        let looked = loop {
            match self.cache.find(a.key()) {
                Found::UpToDate(no) => {
                    self.cache.lock(no);
                    self.cpu.work(t.tid, self.costs.map_page).await;
                    self.map(a, Some(no));
                    let woken = self.cache.unlock(no);
                    wake_all(self, t.tid, &woken).await;
                    self.map_around(t, a).await;
                    break Looked::Mapped;
                }
                Found::Busy(no) => break missing(Some(no), false, true, holds_inode),
                Found::Absent if a.is_anonymous() => {
                    if !self.stats.is_swapped(a.key()) {
                        a.vma.has_anon_vma.set(true);
                        self.charge(t, 1).await;
                        let ns = self.costs.alloc_page + self.costs.zero_page;
                        self.cpu.work(t.tid, ns).await;
                        if !a.vma.gone.get() && !a.vma.present.borrow().contains_key(&a.page) {
                            self.cache.count(1);
                            self.map(a, None);
                        }
                        break Looked::Mapped;
                    }
                    // Swap is asked before the lock is given up.
                    if let Some(no) = self.insert(t, a).await {
                        self.begin_read(t, a, no).await;
                        break missing(Some(no), true, false, false);
                    }
                }
                Found::Reading(no) if a.is_anonymous() => {
                    break missing(Some(no), self.cache.reader(no) == t.tid, false, false);
                }
                // do_sync_mmap_readahead gives the lock up before it does anything.
                Found::Absent if a.vma.read_ahead > 1 => {
                    break missing(None, true, false, holds_inode);
                }
                // With MADV_RANDOM, and where somebody reads the page already, the invalidate_lock comes first.
                Found::Absent | Found::Reading(_) if !holds_inode => {
                    self.inode_lock(t, &a.vma, false).await;
                    holds_inode = true;
                }
                Found::Reading(no) => break missing(Some(no), false, false, true),
                Found::Absent => {
                    if let Some(no) = self.insert(t, a).await {
                        break missing(Some(no), true, false, true);
                    }
                }
            }
        };
        if holds_inode && matches!(looked, Looked::Mapped) {
            self.inode_unlock_shared(t, &a.vma).await;
        }
        looked
    }

    /// Waits for a page that was missing; reads it, if that falls to this thread.
    pub(crate) async fn get(&self, t: &Thread, a: &Access, missing: Missing) {
        let mut m = missing;
        if m.page.is_none() {
            if !m.holds_inode {
                self.inode_lock(t, &a.vma, false).await;
                m.holds_inode = true;
            }
            m.page = self.insert(t, a).await;
            // Another thread may have come first.
            m.is_major = m.page.is_some();
            if let Found::Reading(no) | Found::Busy(no) = self.cache.find(a.key()) {
                m.page = Some(no);
            }
        }
        if let Some(no) = m.page {
            if m.is_major && !a.is_anonymous() {
                self.begin_read(t, a, no).await;
            }
            self.wait_for_page(t, a, no, m.is_major).await;
        }
        if m.holds_inode {
            self.inode_unlock_shared(t, &a.vma).await;
        }
    }

    /// Puts the page of an access into the cache, locked, unless another thread has done so meanwhile.
    async fn insert(&self, t: &Thread, a: &Access) -> Option<u32> {
        self.charge(t, 1).await;
        self.cpu.work(t.tid, self.costs.alloc_page).await;
        if self.cache.find(a.key()) != Found::Absent {
            return None;
        }
        let no = self.cache.insert(a.key(), t.tid);
        self.stats.read_begins(a.key());
        Some(no)
    }

    /// Has the page of an access read, and those around it that are read ahead.
    pub(crate) async fn begin_read(&self, t: &Thread, a: &Access, no: u32) {
        let mut ahead = Vec::new();
        let window = u64::from(a.vma.read_ahead);
        if window > 1 {
            // do_sync_mmap_readahead: read around.
            let from = a.page.saturating_sub(window / 2);
            for page in from..(from + window).min(a.vma.pages) {
                let key = PageKey { page, ..a.key() };
                if self.cache.find(key) == Found::Absent {
                    ahead.push(self.cache.insert(key, t.tid));
                    self.stats.read_begins(key);
                }
            }
            self.charge(t, ahead.len() as u64).await;
            let ns = self.costs.alloc_page * ahead.len() as u64;
            self.cpu.work(t.tid, ns).await;
        }
        if matches!(a.vma.backing, Backing::File { holes: true, .. }) {
            // Nothing is read: zeros are made, here and now.
            let pages = 1 + ahead.len() as u64;
            self.cpu.work(t.tid, self.costs.zero_page * pages).await;
            // The thread itself has a reference to what it wants.
            self.cache.pin(no);
            for no in std::iter::once(no).chain(ahead) {
                let woken = self.cache.read(no);
                wake_all(self, t.tid, &woken).await;
            }
            self.cache.unpin(no);
            return;
        }
        self.cpu.work(t.tid, self.costs.submit_read).await;
        if !ahead.is_empty() {
            self.ahead.borrow_mut().insert(no, ahead);
        }
        self.storage.read(&self.cpu, no, a.read);
    }

    /// Maps the pages around that are in the cache (`do_fault_around`), where pages are read ahead.
    async fn map_around(&self, t: &Thread, a: &Access) {
        if a.vma.read_ahead > 1 {
            let mapped = self.map_near(a, FAULT_AROUND);
            self.cpu.work(t.tid, self.costs.map_around * mapped).await;
        }
    }

    /// Maps those of so many pages around that are in the cache. How many.
    pub(crate) fn map_near(&self, a: &Access, window: u64) -> u64 {
        if window <= 1 {
            return 0;
        }
        let from = a.page - a.page % window;
        let mut mapped = 0;
        for page in (from..(from + window).min(a.vma.pages)).filter(|&p| p != a.page) {
            let key = PageKey { page, ..a.key() };
            if !a.vma.present.borrow().contains_key(&page)
                && let Found::UpToDate(no) = self.cache.find(key)
                && !a.vma.gone.get()
            {
                let stamp = self.cache.map(no, a.vma.no, false);
                a.vma.present.borrow_mut().insert(page, stamp);
                mapped += 1;
            }
        }
        mapped
    }

    /// Sleeps until the page of an access has been read, or is not locked any more.
    pub(crate) async fn wait_for_page(&self, t: &Thread, a: &Access, no: u32, is_mine: bool) {
        let from = self.cpu.now();
        let is_locked = || {
            let found = self.cache.find(a.key());
            found == Found::Reading(no) || found == Found::Busy(no)
        };
        if !is_locked() {
            return;
        }
        self.cache.pin(no);
        let sleep = async {
            while is_locked() {
                self.cache.wait(no, t.tid);
                self.cpu.block(t.tid).await;
            }
        };
        self.waits(t.tid, On::Page(no), sleep).await;
        if is_mine {
            self.cpu.work(t.tid, self.costs.complete_read).await;
        }
        self.cache.unpin(no);
        self.stats
            .waited(LockKind::Page, t.tid, self.cpu.now() - from);
    }

    /// Puts a page into the page table.
    pub(crate) fn map(&self, a: &Access, no: Option<u32>) {
        if a.vma.gone.get() {
            return;
        }
        let stamp = no.map_or(u64::MAX, |no| self.cache.map(no, a.vma.no, true));
        let before = a.vma.present.borrow_mut().insert(a.page, stamp);
        // A page of zeros that somebody else has put there meanwhile goes.
        if before == Some(u64::MAX) && stamp != u64::MAX {
            self.cache.count(-1);
        }
    }

    /// Whether a page is in the page table; it has been touched then.
    pub(crate) fn is_present(&self, a: &Access) -> bool {
        let Some(stamp) = a.vma.stamp(a.page) else {
            return false;
        };
        stamp == u64::MAX || self.cache.touch_mapped(a.key(), stamp)
    }

    /// Takes memory: reclaims if there is none (`try_charge_memcg`).
    pub(crate) async fn charge(&self, t: &Thread, pages: u64) {
        for _ in 0..RECLAIM_TRIES {
            self.wake_reclaimer(t.tid).await;
            let excess = self.cache.excess(pages);
            if excess == 0 {
                break;
            }
            if self.design.has_evictor() && self.reclaimer.get().is_some() {
                // The budget is gone: it waits for the evictor.
                self.cpu.sleep(t.tid, EVICTION_POLL).await;
                continue;
            }
            let from = self.cpu.now();
            self.reclaim(t.tid, excess.max(RECLAIM_BATCH)).await;
            self.stats
                .waited(LockKind::Reclaim, t.tid, self.cpu.now() - from);
        }
        if !self.cache.has_high() {
            return;
        }
        // Charges come in batches, of which the rest is kept for later ones.
        let over = {
            let (stock, over) = &mut self.charged.borrow_mut()[t.tid.index()];
            if *stock >= pages {
                *stock -= pages;
                return;
            }
            let batch = pages.max(CHARGE_BATCH);
            *stock += batch - pages;
            if self.cache.over_high().0 == 0 {
                return;
            }
            *over += batch;
            *over
        };
        // More than a batch since it got into the kernel: it is held up here and now, with the locks that it has.
        if over > CHARGE_BATCH {
            self.handle_over_high(t).await;
        }
    }

    /// On the way back to user space: who has taken pages beyond `memory.high` is held up.
    pub(crate) async fn slow_down(&self, t: &Thread) {
        if self.charged.borrow()[t.tid.index()].1 > 0 {
            self.handle_over_high(t).await;
        }
    }

    /// `__mem_cgroup_handle_over_high`: reclaims as much as was taken, and more while that helps; where nothing can be reclaimed it
    /// sleeps, for the longer the further `memory.high` is exceeded.
    async fn handle_over_high(&self, t: &Thread) {
        let taken = std::mem::take(&mut self.charged.borrow_mut()[t.tid.index()].1);
        let from = self.cpu.now();
        let (mut wanted, mut retries) = (taken, 16);
        loop {
            let mut gone = 0;
            if self.cache.over_high().0 > 0 {
                gone = self.reclaim(t.tid, wanted).await;
            }
            wanted = RECLAIM_BATCH;
            let (over, high) = self.cache.over_high();
            // calculate_high_delay(), with its shifts: seconds = (overage x 2^20)^2 >> 20 >> 14, for each batch of 64 pages.
            let overage = over as f64 / high as f64 * f64::from(1 << 20);
            let seconds = overage * overage / f64::from(1 << 20) / f64::from(1 << 14);
            let seconds = (seconds * taken as f64 / CHARGE_BATCH as f64).min(2.0);
            if seconds <= 0.01 {
                break;
            }
            if gone > 0 {
                continue;
            }
            if retries > 0 {
                retries -= 1;
                continue;
            }
            self.cpu.sleep(t.tid, (seconds * 1e9) as Nanos).await;
            break;
        }
        self.stats
            .waited(LockKind::Reclaim, t.tid, self.cpu.now() - from);
    }

    /// Reclaims pages (`shrink_inactive_list`): off the lists under their spin lock, out of page tables, with an interrupt to the
    /// processors that may have them in their TLBs. How many.
    pub(crate) async fn reclaim(&self, t: Tid, wanted: u64) -> u64 {
        let Reclaimed {
            pages,
            scanned,
            unmapped,
        } = self.cache.reclaim(wanted);
        let section = self.costs.scan_page * scanned.max(1);
        self.lru_lock.pass(self, t, None, section).await;
        self.unmap(&unmapped);
        self.flush(t, &unmapped).await;
        let ns = pages.saturating_mul(self.costs.reclaim_page);
        self.cpu.work(t, ns.max(1_000)).await;
        pages
    }

    /// Takes pages that have gone out of page tables.
    pub(crate) fn unmap(&self, unmapped: &[Unmapped]) {
        let mappings = self.mappings.borrow();
        for u in unmapped {
            let Some(vma) = mappings.get(&u.vma) else {
                continue;
            };
            // It may have been read and mapped again since.
            let mut present = vma.present.borrow_mut();
            if present.get(&u.page) == Some(&u.stamp) {
                present.remove(&u.page);
            }
        }
    }

    /// Has the processors forget pages that were taken out of page tables: those that run threads of the processes.
    pub(crate) async fn flush(&self, t: Tid, unmapped: &[Unmapped]) {
        let mut mms: Vec<u32> = {
            let mappings = self.mappings.borrow();
            let mms = unmapped.iter().filter_map(|u| mappings.get(&u.vma));
            mms.map(|vma| vma.mm).collect()
        };
        mms.sort_unstable();
        mms.dedup();
        // One request for all of them (`try_to_unmap_flush`).
        self.shoot_down(t, &mms).await;
    }

    /// A TLB shootdown: an interrupt to the other processors that run threads of processes, and the wait for their answers.
    pub(crate) async fn shoot_down(&self, t: Tid, mms: &[u32]) {
        let others = mms.iter().map(|&mm| self.cpu.others_running(mm, t)).sum();
        for &mm in mms {
            self.cpu.interrupt(mm, t, self.costs.ipi_handle);
        }
        self.cpu.work(t, self.costs.shootdown(others)).await;
    }

    /// How much room kswapd sees to: it is woken when there is less than the first, and sleeps when there is the second
    /// (`__setup_per_zone_wmarks`: a thousandth of memory, or a quarter of `min_free_kbytes`, above the minimum; twice that).
    pub(crate) fn watermarks(&self) -> (u64, u64) {
        let limit = self.cache.limit();
        let min_free_pages = ((limit * 4) as f64).sqrt() as u64;
        let step = (limit / 1_000).max(min_free_pages / 4).max(RECLAIM_BATCH);
        (step, 2 * step)
    }

    async fn wake_reclaimer(&self, t: Tid) {
        if let Some(reclaimer) = self.reclaimer.get()
            && self.cache.room() < self.watermarks().0
            && matches!(
                self.waiting.borrow()[reclaimer.index()],
                Some((On::Work, _))
            )
        {
            self.cpu.work(t, self.costs.wake).await;
            self.cpu.wake(reclaimer);
        }
    }

    /// What kswapd does.
    pub(crate) async fn reclaim_ahead(&self, t: &Thread) {
        let before = self.enter(t.tid, "reclaim");
        loop {
            while self.cache.room() < self.watermarks().1 {
                let gone = self.reclaim(t.tid, RECLAIM_BATCH).await;
                self.cpu.walk(t.tid, 1).await;
                if gone == 0 {
                    break;
                }
            }
            self.now_does(t.tid, before);
            self.waits(t.tid, On::Work, self.cpu.block(t.tid)).await;
            self.now_does(t.tid, "reclaim");
        }
    }

    // ---- The loop ----

    /// Runs threads until the end, or until the first so many have all ended.
    pub(crate) fn run<'a>(
        self: &'a Rc<Self>,
        mut bodies: Vec<(Tid, Running<'a>)>,
        ends: usize,
        end: Nanos,
        warm_up: Nanos,
        most_events: u64,
    ) -> bool {
        bodies.sort_by_key(|b| b.0);
        let mut bodies: Vec<Option<Running<'a>>> = bodies.into_iter().map(|b| Some(b.1)).collect();
        let mut context = Context::from_waker(Waker::noop());
        let mut alive = ends;
        self.cpu.alarm(warm_up, Alarm::WarmedUp);
        self.cpu.alarm(end, Alarm::End);
        // (Of very long runs as often as can be afforded.)
        let every = SAMPLE_EVERY.max(end / SAMPLES_MAX);
        self.cpu.alarm(every, Alarm::Sample);
        while let Some(next) = self.cpu.next() {
            if self.cpu.events() > most_events {
                return false;
            }
            match next {
                Next::Step(t) => {
                    let slot = &mut bodies[t.index()];
                    let body = slot.as_mut().expect("a thread that has not ended");
                    if body.as_mut().poll(&mut context).is_ready() {
                        *slot = None;
                        self.cpu.exit(t);
                        alive = alive.saturating_sub(usize::from(t.index() < ends));
                        if alive == 0 {
                            break;
                        }
                    }
                }
                Next::Alarm(Alarm::Wake(t)) => self.cpu.wake(t),
                Next::Alarm(Alarm::Read(no)) => {
                    self.storage.ended(&self.cpu);
                    let ahead = self.ahead.borrow_mut().remove(&no).unwrap_or_default();
                    for no in std::iter::once(no).chain(ahead) {
                        for t in self.cache.read(no) {
                            self.cpu.wake(t);
                        }
                    }
                }
                Next::Alarm(Alarm::WarmedUp) => self.stats.begin(self),
                Next::Alarm(Alarm::Sample) => {
                    assert!(
                        !self.cpu.stands_still(),
                        "every thread waits for another one"
                    );
                    crate::chain::sample(self);
                    self.check_waits();
                    self.cpu.check();
                    self.cpu.look_at_use();
                    self.cpu.alarm(every, Alarm::Sample);
                }
                Next::Alarm(Alarm::End) => break,
            }
        }
        self.unfinished.set(alive > 0);
        self.stats.end(self);
        self.cache.check();
        self.check_waits();
        self.cpu.check();
        self.check_anonymous();
        true
    }

    /// Every page of anonymous memory that is charged is in a page table.
    fn check_anonymous(&self) {
        let mappings = self.mappings.borrow();
        let present: u64 = mappings.values().map(|vma| vma.anonymous()).sum();
        assert_eq!(
            self.cache.anonymous(),
            present + self.freeing.get(),
            "pages of anonymous memory are lost"
        );
    }

    /// Nobody sleeps for something that has come.
    fn check_waits(&self) {
        if self.waking.get() > 0 {
            return;
        }
        for (no, wait) in self.waiting.borrow().iter().enumerate() {
            let Some((on, _)) = wait else { continue };
            let t = Tid(no as u32);
            if !self.cpu.is_blocked(t) {
                continue;
            }
            let lost = match on {
                On::MmapLock { mm, .. } => mm.mmap_lock.has_forgotten(&self.cpu, t),
                On::Inode { vma, .. } => vma
                    .inode
                    .as_ref()
                    .is_some_and(|i| i.has_forgotten(&self.cpu, t)),
                On::Vma { vma } => vma.readers().is_empty(),
                On::Page(no) => !self.cache.is_locked(*no),
                On::Range { mm, .. } => mm.ranges.has_forgotten(t),
                On::Monitor => self
                    .mms
                    .borrow()
                    .iter()
                    .any(|mm| mm.monitor.has_forgotten(t)),
                On::Work => false,
            };
            assert!(!lost, "thread {no} sleeps for {on:?}, which is to be had");
        }
    }
}

/// How often the longest wait is looked at.
const SAMPLE_EVERY: Nanos = 1_000_000;
/// How often at most.
const SAMPLES_MAX: Nanos = 1_000_000;
