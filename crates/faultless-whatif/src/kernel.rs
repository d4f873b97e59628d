//! What the designs are made of: pages are looked up, read, mapped; locks are taken, and their waits counted.
//!
//! A design of the fault ([`crate::designs`]) uses this and nothing else; so does whatever changes an address space
//! ([`crate::calls`]).

use crate::cache::{Cache, Found, PageKey};
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
            vmas: RefCell::default(),
            monitor: crate::designs::uffd_monitor::Queue::default(),
            ranges: crate::designs::range::Ranges::default(),
        }
    }
}

/// A spin lock whose critical section has a fixed length: who comes later computes until it is its turn.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    free_at: Cell<Nanos>,
    last: Cell<Option<Tid>>,
}

impl Turn {
    pub(crate) async fn pass(&self, k: &Kernel, t: Tid, section: Nanos) {
        let now = k.cpu.now();
        let transfer = match self.last.replace(Some(t)) {
            Some(last) if last != t => k.costs.line,
            _ => 0,
        };
        let until = self.free_at.get().max(now) + transfer + section;
        self.free_at.set(until);
        k.stats.waited(LockKind::Siglock, t, until - now - section);
        k.cpu.work(t, until - now).await;
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
    MmapLock { mm: Rc<Mm>, write: bool },
    Vma { vma: Rc<Vma> },
    Page,
    Range { holder: Option<Tid> },
    Monitor,
}

/// How a look for a page ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Looked {
    /// It is mapped now.
    Mapped,
    /// It is being read; a thread that wants it waits for the page.
    Reading(u32),
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
    /// Pages that each thread has taken since it was last looked at for `memory.high`.
    charged: RefCell<Vec<u64>>,
    next_object: Cell<u32>,
    next_vma: Cell<u32>,
}

impl Kernel {
    pub(crate) fn new(
        cores: u32,
        costs: Costs,
        storage: Storage,
        memory: (u64, Option<u64>),
        design: Rc<dyn Design>,
        steals: bool,
    ) -> Kernel {
        Kernel {
            cpu: Cpu::new(cores, &costs),
            costs,
            storage,
            cache: Cache::new(memory.0, memory.1),
            design,
            stats: Stats::default(),
            steals,
            mms: RefCell::default(),
            waiting: RefCell::default(),
            doing: RefCell::default(),
            ahead: RefCell::default(),
            charged: RefCell::default(),
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
        self.charged.borrow_mut().push(0);
        self.stats.new_thread(tid, group);
        Thread {
            tid,
            mm: Rc::clone(mm),
        }
    }

    pub(crate) fn new_object(&self) -> u32 {
        self.next_object.replace(self.next_object.get() + 1)
    }

    pub(crate) fn new_vma(&self, backing: Backing, pages: u64, read_ahead: u32) -> Rc<Vma> {
        let no = self.next_vma.replace(self.next_vma.get() + 1);
        Rc::new(Vma::new(no, backing, pages, read_ahead))
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

    // ---- Pages ----

    /// Looks for the page of an access. One that is there, or that needs no reading, is mapped; else a read has begun.
    pub(crate) async fn look(&self, t: &Thread, a: &Access) -> Looked {
        loop {
            match self.cache.find(a.key()) {
                Found::UpToDate(no) => {
                    self.cpu.work(t.tid, self.costs.map_page).await;
                    // It may have been reclaimed meanwhile.
                    if self.cache.find(a.key()) == Found::UpToDate(no) {
                        self.map(a, Some(no));
                        self.map_around(t, a).await;
                        return Looked::Mapped;
                    }
                }
                Found::Locked(no) => return Looked::Reading(no),
                Found::Absent => match a.vma.backing {
                    Backing::Anonymous { .. } if !self.stats.is_swapped(a.key()) => {
                        a.vma.has_anon_vma.set(true);
                        self.charge(t, 1).await;
                        let ns = self.costs.alloc_page + self.costs.zero_page + self.costs.map_page;
                        self.cpu.work(t.tid, ns).await;
                        if !a.vma.gone.get() {
                            self.cache.count(1);
                            self.map(a, None);
                        }
                        return Looked::Mapped;
                    }
                    backing => {
                        self.charge(t, 1).await;
                        self.cpu.work(t.tid, self.costs.alloc_page).await;
                        // While memory was found, another thread may have come first.
                        if self.cache.find(a.key()) != Found::Absent {
                            continue;
                        }
                        return Looked::Reading(self.begin_read(t, a, backing).await);
                    }
                },
            }
        }
    }

    /// Puts the page of an access into the cache, with what is read ahead around it, and has them read.
    async fn begin_read(&self, t: &Thread, a: &Access, backing: Backing) -> u32 {
        let no = self.cache.insert(a.key(), t.tid);
        self.stats.read_begins(a.key());
        let mut ahead = Vec::new();
        let window = u64::from(a.vma.read_ahead);
        if window > 1 {
            let from = a.page.saturating_sub(window / 4);
            for page in from..(from + window).min(a.vma.pages) {
                let key = PageKey { page, ..a.key() };
                if self.cache.find(key) == Found::Absent {
                    ahead.push(self.cache.insert(key, t.tid));
                }
            }
            // They are charged as well; what is over the limit then is reclaimed by whoever comes next.
            self.charged.borrow_mut()[t.tid.index()] += ahead.len() as u64;
            self.cpu
                .work(t.tid, self.costs.alloc_page * ahead.len() as u64)
                .await;
        }
        if matches!(backing, Backing::File { holes: true, .. }) {
            // Nothing is read: zeros are made, here and now.
            let pages = 1 + ahead.len() as u64;
            self.cpu.work(t.tid, self.costs.zero_page * pages).await;
            for no in std::iter::once(no).chain(ahead) {
                let woken = self.cache.read(no);
                wake_all(self, t.tid, &woken).await;
            }
            return no;
        }
        self.cpu.work(t.tid, self.costs.submit_read).await;
        if !ahead.is_empty() {
            self.ahead.borrow_mut().insert(no, ahead);
        }
        self.storage.read(&self.cpu, no, a.read);
        no
    }

    /// Maps the pages around that are in the cache (`do_fault_around`), where pages are read ahead.
    async fn map_around(&self, t: &Thread, a: &Access) {
        if a.vma.read_ahead <= 1 {
            return;
        }
        let from = a.page - a.page % FAULT_AROUND;
        let mut mapped = 0;
        for page in (from..(from + FAULT_AROUND).min(a.vma.pages)).filter(|&p| p != a.page) {
            let near = Access { page, ..a.clone() };
            if !a.vma.present.borrow().contains_key(&page)
                && let Found::UpToDate(no) = self.cache.find(near.key())
            {
                let stamp = self.cache.map(no);
                a.vma.present.borrow_mut().insert(page, stamp);
                mapped += 1;
            }
        }
        self.cpu.work(t.tid, self.costs.map_around * mapped).await;
    }

    /// Sleeps until the page of an access has been read.
    pub(crate) async fn wait_for_page(&self, t: &Thread, a: &Access, no: u32) {
        let from = self.cpu.now();
        if self.cache.find(a.key()) != Found::Locked(no) {
            return;
        }
        let mine = self.cache.reader(no) == t.tid;
        self.cache.pin(no);
        let sleep = async {
            while self.cache.find(a.key()) == Found::Locked(no) {
                self.cache.wait(no, t.tid);
                self.cpu.block(t.tid).await;
            }
        };
        self.waits(t.tid, On::Page, sleep).await;
        if mine {
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
        let stamp = no.map_or(u64::MAX, |no| self.cache.touch(no));
        a.vma.present.borrow_mut().insert(a.page, stamp);
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
        self.charged.borrow_mut()[t.tid.index()] += pages;
        for _ in 0..4 {
            let excess = self.cache.excess(pages);
            if excess == 0 {
                return;
            }
            let from = self.cpu.now();
            let (gone, mapped) = self.cache.reclaim(excess.max(RECLAIM_BATCH));
            let mut ns = gone * self.costs.reclaim_page;
            if mapped > 0 {
                let others = self.cpu.others_running(t.mm.no, t.tid);
                ns += self.costs.shootdown(others);
                self.cpu.interrupt(t.mm.no, t.tid, self.costs.ipi_handle);
            }
            self.cpu.work(t.tid, ns.max(1_000)).await;
            self.stats
                .waited(LockKind::Reclaim, t.tid, self.cpu.now() - from);
        }
    }

    /// On the way back to user space: who has taken pages beyond `memory.high` reclaims as many, and sleeps for the longer the
    /// further it is exceeded (`mem_cgroup_handle_over_high`).
    pub(crate) async fn slow_down(&self, t: &Thread) {
        let taken = self.charged.borrow()[t.tid.index()];
        if taken < CHARGE_BATCH {
            return;
        }
        self.charged.borrow_mut()[t.tid.index()] = 0;
        if self.cache.over_high().0 == 0 {
            return;
        }
        let (gone, _) = self.cache.reclaim(taken);
        self.cpu.work(t.tid, gone * self.costs.reclaim_page).await;
        let (over, high) = self.cache.over_high();
        // calculate_high_delay(), with its shifts: seconds = (overage x 2^20)^2 >> 20 >> 14, for each batch of 64 pages.
        let overage = over as f64 / high as f64 * f64::from(1 << 20);
        let seconds = overage * overage / f64::from(1 << 20) / f64::from(1 << 14);
        let seconds = (seconds * taken as f64 / CHARGE_BATCH as f64).min(2.0);
        if seconds > 0.01 {
            self.cpu.sleep(t.tid, (seconds * 1e9) as Nanos).await;
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
    ) {
        bodies.sort_by_key(|b| b.0);
        let mut bodies: Vec<Option<Running<'a>>> = bodies.into_iter().map(|b| Some(b.1)).collect();
        let mut context = Context::from_waker(Waker::noop());
        let mut alive = ends;
        self.cpu.alarm(warm_up, Alarm::WarmedUp);
        self.cpu.alarm(end, Alarm::End);
        self.cpu.alarm(SAMPLE_EVERY, Alarm::Sample);
        while let Some(next) = self.cpu.next() {
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
                    crate::chain::sample(self);
                    self.cpu.alarm(SAMPLE_EVERY, Alarm::Sample);
                }
                Next::Alarm(Alarm::End) => break,
            }
        }
        self.stats.end(self);
        self.cache.check();
    }
}

/// How often the longest wait is looked at.
const SAMPLE_EVERY: Nanos = 1_000_000;
