//! The program that a run makes up: threads that load, pin, prefetch, release and drop, beside other parties.

#![allow(unsafe_code, reason = "vouches for the bytes of its own files")]

use crate::kernel;
use crate::kernel::files::{self, word_of};
use crate::kernel::memory::PAGE;
use crate::oracle::{self, Origin, Truth};
use crate::plan::{CROWD_THREADS, OPERATION_NS};
use crate::scheduler;
use crate::world::{fail, with};
use faultless::{Advice, ByteSize, Error, Map, Pool, Source, Stats, simulation};
use std::cell::UnsafeCell;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// A map of the program's.
struct Mapped {
    map: Map,
    truth: Truth,
}

/// What the program's threads share.
#[derive(Default)]
struct Program {
    pool: Option<Pool>,
    maps: Vec<Option<Arc<Mapped>>>,
    /// What was kept of each map when its lease was given up.
    kept: Vec<Option<Vec<bool>>>,
    figures: Stats,
    /// Operations that each thread still has to do.
    left: Vec<u64>,
    /// The map that each thread is at work on. (Not on its stack: a thread that is taken out of an operation leaves nothing behind.)
    current: Vec<Option<Arc<Mapped>>>,
    over: bool,
    /// Descriptors that the program has opened.
    own: Vec<i32>,
}

struct Slot(UnsafeCell<Option<Program>>);
// SAFETY: the process has one thread.
unsafe impl Sync for Slot {}
static PROGRAM: Slot = Slot(UnsafeCell::new(None));

/// Looks at what is shared. `f` makes no call.
fn shared<R>(f: impl FnOnce(&mut Program) -> R) -> R {
    // SAFETY: one thread, and no two of these are nested.
    f(unsafe { (*PROGRAM.0.get()).get_or_insert_default() })
}

fn chance(n: u64) -> bool {
    with(|w| w.rng.once_in(n))
}

fn below(n: u64) -> u64 {
    with(|w| w.rng.below(n))
}

/// The program's own code, as a source.
struct Code {
    version: u64,
    len: u64,
    align: usize,
}

impl Source for Code {
    fn len(&self) -> std::io::Result<u64> {
        Ok(self.len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> std::io::Result<usize> {
        let time = with(|w| w.rng.between(5_000, 300_000));
        scheduler::sleep(time);
        let (eio, short) = with(|w| {
            (
                w.rng.once_in(w.plan.faults.eio),
                w.rng.once_in(w.plan.faults.short),
            )
        });
        if eio {
            return Err(std::io::Error::from_raw_os_error(libc::EIO));
        }
        let mut n = buf.len().min(self.len.saturating_sub(offset) as usize);
        if short && n > self.align {
            n = (n / 2 / self.align * self.align).max(self.align);
        }
        for (i, b) in buf[..n].iter_mut().enumerate() {
            let at = offset + i as u64;
            *b = word_of(self.version, at & !7).to_le_bytes()[(at % 8) as usize];
        }
        Ok(n)
    }

    fn alignment(&self) -> usize {
        self.align
    }
}

fn doing(what: String) {
    with(|w| {
        let clock = w.clock;
        let t = w.scheduler.me();
        (t.doing, t.since) = (what, clock);
    });
}

/// Makes a map in place `at`, of a new file.
fn make_map(at: usize) {
    let pool = pool();
    let (sources, writer) = with(|w| (w.plan.sources, w.plan.parties.writer));
    let origin = match below(4) {
        0 if sources => Origin::Code,
        0 | 1 => Origin::Trusted,
        _ => Origin::Leased,
    };
    let (pages, odd) = with(|w| {
        // What must be kept of a map that loses its lease has to leave room for the others.
        let most = match origin {
            Origin::Leased if writer => w.plan.pages.min(40),
            _ => w.plan.pages,
        };
        let pages = w.rng.between(most / 2, most);
        (pages, w.rng.below(PAGE as u64 / 8) * 8)
    });
    let source_len = pages * PAGE as u64 - odd;
    let version = with(|w| w.rng.next()) | 1;
    let inode = with(|w| w.kernel.files.create(source_len, version));
    if chance(8) && with(|w| w.plan.faults.eio > 0) {
        let page = below(pages);
        with(|w| w.kernel.files.inodes[inode].broken = Some(page));
    }
    let offset = below(3) * PAGE as u64;
    let unit = *with(|w| w.rng.pick(&[4u64, 4, 4, 16]));
    let advice = *with(|w| {
        w.rng.pick(&[
            Advice::Normal,
            Advice::Normal,
            Advice::Random,
            Advice::Sequential,
        ])
    });
    let options = pool
        .options()
        .offset(offset)
        .unit(ByteSize::kib(unit))
        .advice(advice);
    doing(format!("maps a file ({origin:?})"));
    let made = match origin {
        Origin::Code => {
            let align = *with(|w| w.rng.pick(&[1usize, 4096, 32768]));
            let code = Code {
                version,
                len: source_len,
                align,
            };
            // SAFETY: its bytes are a function of their position.
            unsafe { options.map_trusted(code) }
        }
        _ => {
            let number = files::open_inode(inode);
            shared(|p| p.own.push(number));
            // SAFETY: the number is open until it is closed below.
            let file = unsafe { BorrowedFd::borrow_raw(number) };
            let made = match origin {
                Origin::Leased => options.map(file),
                // SAFETY: the file is written by nobody; it may lose its end.
                _ => unsafe { options.map_trusted(Borrowed(number, source_len)) },
            };
            shared(|p| p.own.retain(|n| *n != number));
            let _ = files::close(number);
            made
        }
    };
    let truth = Truth {
        origin,
        inode,
        version,
        offset,
        source_len,
        pages: (source_len - offset).div_ceil(PAGE as u64),
        unit: unit / 4,
    };
    match made {
        Ok(map) => {
            let made = Arc::new(Mapped { map, truth });
            let before = shared(|p| {
                p.kept[at] = None;
                p.maps[at].replace(made)
            });
            drop(before);
        }
        Err(error) => may_fail(&error),
    }
}

/// A file by its number.
struct Borrowed(i32, u64);

impl Source for Borrowed {
    fn len(&self) -> std::io::Result<u64> {
        Ok(self.1)
    }
    fn read_at(&self, _: &mut [u8], _: u64) -> std::io::Result<usize> {
        unreachable!("a file is read by the engine")
    }
    fn file(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: it is open while it is mapped.
        Some(unsafe { BorrowedFd::borrow_raw(self.0) })
    }
}

/// Making a map fails only if something was done to it.
fn may_fail(error: &Error) {
    let (faults, parties) = with(|w| (w.plan.faults, w.plan.parties));
    let excused = parties.closer
        || parties.writer
        || faults.eio > 0
        || faults.again > 0
        || faults.busy > 0
        || faults.no_memory > 0;
    if !excused {
        fail(&format!("a map cannot be made: {error}"));
    }
}

fn some_map() -> Option<(usize, Arc<Mapped>)> {
    let at = below(shared(|p| p.maps.len()) as u64) as usize;
    shared(|p| p.maps[at].clone()).map(|m| (at, m))
}

/// The pool, which stays where it is until the end.
fn pool() -> &'static Pool {
    // SAFETY: `end` takes it when no thread of the program is left.
    unsafe { &*shared(|p| std::ptr::from_ref(p.pool.as_ref().expect("a pool"))) }
}

/// Puts a map in the hands of the running thread, and lets the former one go.
fn at_work_on(mapped: Option<Arc<Mapped>>) {
    let me = with(|w| w.scheduler.current) as usize - 1;
    let former = shared(|p| std::mem::replace(&mut p.current[me], mapped));
    drop(former);
}

/// One thread of the program. If it is taken out of an operation, it goes on with the next.
fn thread() {
    let me = with(|w| {
        let me = w.scheduler.current;
        w.scheduler.me().detour = None;
        me as usize
    });
    let index = me - 1;
    at_work_on(None);
    let mut near = (0usize, 0u64);
    while shared(|p| {
        let left = &mut p.left[index];
        let go_on = *left > 0;
        *left = left.saturating_sub(1);
        go_on
    }) {
        let before = evictions();
        operation(&mut near);
        at_work_on(None);
        if let (Some(before), Some(after)) = (before, evictions())
            && after.wrapping_sub(before) > PATIENCE
        {
            let evicted = after.wrapping_sub(before);
            fail(&format!(
                "{evicted} pages were evicted during an operation: a thread starved"
            ));
        }
        with(|w| w.operations += 1);
        check_time(1);
        let pool = pool();
        oracle::check_budget(pool);
    }
    doing("has ended".into());
}

/// Checks the time since this thread last said what it does, or last came here. In that time it asked for `pages` pages.
fn check_time(pages: u64) {
    let (took, plan) = with(|w| {
        let clock = w.clock;
        let since = std::mem::replace(&mut w.scheduler.me().since, clock);
        (clock - since, w.plan.clone())
    });
    if took > OPERATION_NS {
        fail("an operation took longer than any may");
    }
    let many = if pages > 1 { OVERDUE_NS } else { 0 };
    let most = (CALM_NS + many + pages * PAGE_NS) * if plan.is_crowded() { CROWD } else { 1 };
    if plan.is_calm() && took > most {
        fail(&format!(
            "an operation took {} ms: a thread was forgotten",
            took / 1_000_000
        ));
    }
}

/// Pages evicted so far, among many threads that want more than there is.
fn evictions() -> Option<u32> {
    let crowded = with(|w| w.plan.is_crowded());
    crowded.then(|| simulation::evicted(pool()))
}

/// Pages that may be evicted before a thread has had its turn: all of memory once for each thread.
const PATIENCE: u32 = (CROWD_THREADS * (1 << 20)) as u32 / PAGE as u32;

/// What an operation may take where nothing holds it up: less than the time after which threads look again by themselves.
const CALM_NS: u64 = 40_000_000;
/// How much each page of a call adds to that. The engine may have to read all of them, and may evict them again for other threads.
const PAGE_NS: u64 = 250_000;
/// How much several pages add. A fill that wants room for a run waits while threads that want one page pass it, until it is overdue.
const OVERDUE_NS: u64 = 50_000_000;
/// How much longer it may take among many threads that want more than there is.
const CROWD: u64 = 8;

fn operation(near: &mut (usize, u64)) {
    let Some((at, mapped)) = some_map() else {
        let at = below(shared(|p| p.maps.len()) as u64) as usize;
        return make_map(at);
    };
    // SAFETY: the map is in this thread's hands until `at_work_on` is called again.
    let Mapped { map, truth } = unsafe { &*Arc::as_ptr(&mapped) };
    let is_current = {
        let address = Arc::as_ptr(&mapped);
        move || {
            shared(|p| {
                p.maps[at]
                    .as_ref()
                    .is_some_and(|m| Arc::as_ptr(m) == address)
            })
        }
    };
    at_work_on(Some(mapped));
    // A program maps a file again when the writer is done.
    if truth.origin == Origin::Leased && crate::world::quietly(|| simulation::look(map)).1 {
        with(|w| w.kept_maps = true);
        if chance(4) {
            at_work_on(None);
            return make_map(at);
        }
    }
    let page = below(truth.pages);
    let some = with(|w| w.rng.between(1, 12)).min(truth.pages - page);
    let bytes = |count: u64| {
        let end = ((page + count) * PAGE as u64).min(map.len() as u64);
        page as usize * PAGE..end as usize
    };
    match below(20) {
        0..=7 => {
            doing(format!("loads page {page} of map {at}"));
            oracle::load(map, truth, page);
            if truth.origin == Origin::Leased {
                let mut kept = shared(|p| p.kept[at].take());
                if is_current() {
                    oracle::check_kept(map, &mut kept);
                    shared(|p| p.kept[at] = kept);
                }
            }
        }
        8..=10 => {
            // In order.
            let (first, count) = match near {
                (m, next) if *m == at && *next < truth.pages => (*next, 8),
                _ => (page, 8),
            };
            let end = (first + count).min(truth.pages);
            doing(format!("loads pages {first}..{end} of map {at}"));
            for page in first..end {
                oracle::load(map, truth, page);
            }
            *near = (at, end);
        }
        // (Threads that hold pins and wait for more than all may have wait for each other.)
        11..=13 if with(|w| w.plan.is_crowded()) => {
            doing(format!("loads page {page} of map {at}"));
            oracle::load(map, truth, page);
        }
        11 if chance(2) => ask(map, truth, page, bytes(some)),
        12 if chance(3) => batch(map, truth),
        13 if chance(3) => future(map, truth, page, bytes(some.min(8))),
        11..=13 => pin(map, truth, page, bytes(some.min(8))),
        14 => {
            doing(format!("prefetches {some} pages from {page} of map {at}"));
            let _ = map.prefetch(bytes(some * 4));
        }
        15 => {
            doing(format!("releases {some} pages from {page} of map {at}"));
            with(|w| w.scheduler.me().detour = Some(thread));
            let _ = map.release(bytes(some));
            with(|w| w.scheduler.me().detour = None);
        }
        16 => {
            doing("asks for figures".into());
            let before = shared(|p| p.figures.clone());
            let pool = pool();
            with(|w| w.scheduler.me().detour = Some(thread));
            let after = pool.stats().maps;
            with(|w| w.scheduler.me().detour = None);
            oracle::check_figures(&before, &after);
            shared(|p| p.figures = after);
            let _ = map.is_resident(bytes(some));
        }
        17 if with(|w| w.plan.parties.resizes) => {
            doing("resizes the pool".into());
            let pool = pool();
            let mib = 1 + below(2);
            if let Err(error) = pool.resize(ByteSize::mib(mib)) {
                fail(&format!("a resize to {mib} MiB: {error}"));
            }
            with(|w| w.resized_at = w.clock);
        }
        18 => {
            at_work_on(None);
            doing(format!("drops map {at}"));
            let gone = shared(|p| p.maps[at].take());
            drop(gone);
            if chance(2) {
                make_map(at);
            }
        }
        _ => {
            doing(format!("makes map {at} anew"));
            at_work_on(None);
            make_map(at);
        }
    }
}

/// Asks for a range before it is touched.
fn ask(map: &Map, truth: &Truth, page: u64, bytes: std::ops::Range<usize>) {
    let pages = page..(bytes.end as u64).div_ceil(PAGE as u64);
    doing(format!("asks for pages {pages:?} of {:?}", truth.origin));
    with(|w| w.scheduler.me().detour = Some(thread));
    let asked = map.load(bytes).map(drop);
    with(|w| w.scheduler.me().detour = None);
    check_time(pages.end - pages.start);
    match asked {
        Ok(()) => {
            oracle::check_asked(map, truth, pages.clone());
            load_each(map, truth, pages);
        }
        Err(error) => oracle::check_error(truth, pages, &error),
    }
}

/// Loads some pages one by one.
fn load_each(map: &Map, truth: &Truth, pages: std::ops::Range<u64>) {
    for page in pages {
        oracle::load(map, truth, page);
        check_time(1);
    }
}

/// Pins a range as a task does: polls again and again, or loses interest.
fn future(map: &Map, truth: &Truth, page: u64, bytes: std::ops::Range<usize>) {
    let pages = page..(bytes.end as u64).div_ceil(PAGE as u64);
    doing(format!("waits for pages {pages:?} of {:?}", truth.origin));
    let mut future = std::pin::pin!(map.pin_async(bytes));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let patience = match chance(4) {
        true => below(3),
        false => u64::MAX,
    };
    for _ in 0..patience {
        with(|w| w.scheduler.me().detour = Some(thread));
        let polled = future.as_mut().poll(&mut context);
        with(|w| w.scheduler.me().detour = None);
        match polled {
            std::task::Poll::Pending => scheduler::sleep(with(|w| w.rng.between(1_000, 200_000))),
            std::task::Poll::Ready(Ok(pinned)) => {
                oracle::check_pinned(map, truth, pages);
                drop(pinned);
                return;
            }
            std::task::Poll::Ready(Err(error)) => {
                return oracle::check_error(truth, pages, &error);
            }
        }
    }
}

/// Asks for several ranges in one call, or pins them.
fn batch(map: &Map, truth: &Truth) {
    let pins = chance(2);
    // (A small budget has no room for more pins of several threads.)
    let most = if pins { 3 } else { 40 };
    let some = |_| {
        let page = below(truth.pages);
        page..(page + with(|w| w.rng.between(1, most))).min(truth.pages)
    };
    let pages: Vec<std::ops::Range<u64>> = (0..with(|w| w.rng.between(1, 4))).map(some).collect();
    let bytes = |pages: &std::ops::Range<u64>| {
        let end = (pages.end * PAGE as u64).min(map.len() as u64);
        pages.start as usize * PAGE..end as usize
    };
    let ranges: Vec<std::ops::Range<usize>> = pages.iter().map(bytes).collect();
    doing(format!(
        "{} pages {pages:?} of {:?}",
        if pins { "pins" } else { "asks for" },
        truth.origin
    ));
    with(|w| w.scheduler.me().detour = Some(thread));
    if pins {
        let pinned = map.pin_many(&ranges);
        with(|w| w.scheduler.me().detour = None);
        for (pinned, pages) in pinned.iter().zip(&pages) {
            match pinned {
                Ok(_) => oracle::check_pinned(map, truth, pages.clone()),
                Err(faultless::Error::BudgetExhausted { .. }) => {}
                Err(error) => oracle::check_error(truth, pages.clone(), error),
            }
        }
        return;
    }
    let asked = map.load_many(&ranges);
    with(|w| w.scheduler.me().detour = None);
    check_time(pages.iter().map(|pages| pages.end - pages.start).sum());
    for (asked, pages) in asked.iter().zip(pages) {
        match asked {
            Ok(_) => {
                oracle::check_asked(map, truth, pages.clone());
                load_each(map, truth, pages);
            }
            Err(error) => oracle::check_error(truth, pages, error),
        }
    }
}

fn pin(map: &Map, truth: &Truth, page: u64, bytes: std::ops::Range<usize>) {
    let pages = page..(bytes.end as u64).div_ceil(PAGE as u64);
    doing(format!("pins pages {pages:?} of {:?}", truth.origin));
    with(|w| w.scheduler.me().detour = Some(thread));
    let pinned = map.pin(bytes);
    with(|w| w.scheduler.me().detour = None);
    match pinned {
        Ok(pinned) => {
            for _ in 0..3 {
                oracle::check_pinned(map, truth, pages.clone());
                let time = below(200_000);
                scheduler::sleep(time);
            }
            oracle::check_pinned(map, truth, pages);
            drop(pinned);
        }
        Err(error) => oracle::check_error(truth, pages, &error),
    }
}

/// Runs `f` again and again, with pauses, while the program runs.
fn party(name: &str, pause: u64, f: fn()) {
    scheduler::spawn(
        name.to_owned(),
        Box::new(move || {
            while !shared(|p| p.over) {
                let time = with(|w| w.rng.between(pause / 4, pause));
                scheduler::sleep(time);
                f();
            }
        }),
    );
}

fn writer() {
    let Some((at, mapped)) = some_map() else {
        return;
    };
    let truth = mapped.truth;
    drop(mapped);
    if truth.origin != Origin::Leased {
        return;
    }
    with(|w| w.kept_maps = true);
    doing(format!("opens file {} for writing", truth.inode));
    let patience = with(|w| w.kernel.break_seconds) * 1_000_000_000;
    files::open_for_writing(truth.inode, patience);
    with(|w| {
        let new = w.rng.next() | 1;
        w.kernel.files.inodes[truth.inode].version = new;
    });
    let time = below(1_000_000);
    scheduler::sleep(time);
    files::end_writing(truth.inode);
    // The program learns of it, and maps another file: what must be kept would fill the budget for good.
    let time = below(20_000_000);
    scheduler::sleep(time);
    let gone = shared(|p| match &p.maps[at] {
        Some(m) if m.truth.inode == truth.inode => p.maps[at].take(),
        _ => None,
    });
    drop(gone);
}

fn truncation() {
    let Some((_, mapped)) = some_map() else {
        return;
    };
    let truth = mapped.truth;
    drop(mapped);
    if truth.origin == Origin::Trusted {
        let to = below(truth.source_len) & !7;
        with(|w| {
            let inode = &mut w.kernel.files.inodes[truth.inode];
            inode.len = inode.len.min(to);
        });
    }
}

fn closer() {
    let mut numbers = with(|w| w.kernel.files.numbers());
    // What it closes is not what it has just opened.
    numbers.retain(|n| shared(|p| !p.own.contains(n)));
    if !numbers.is_empty() {
        let number = *with(|w| w.rng.pick(&numbers));
        files::close_programs(number);
    }
}

fn fork() {
    doing("forks".into());
    simulation::before_fork();
    let time = below(3_000_000);
    kernel::fork(time);
    simulation::after_fork();
}

fn neighbour() {
    let (write, time) = (chance(3), below(150_000_000));
    kernel::hold_mmap_lock(write, time);
}

fn reclaim() {
    with(|w| {
        let turn = w.rng.next();
        w.kernel.memory.reclaim(turn);
    });
}

/// How the pool stands.
pub(crate) fn describe() -> String {
    match shared(|p| p.pool.is_some()) {
        true => simulation::describe(pool()),
        false => String::new(),
    }
}

/// The whole run.
pub(crate) fn run() {
    let plan = with(|w| w.plan.clone());
    with(|w| w.kernel.break_seconds = if plan.parties.impatient { 1 } else { 45 });
    let losses = plan.faults.abandoned > 0;
    simulation::LOSSES.store(losses, std::sync::atomic::Ordering::Relaxed);
    let budget = ByteSize::new(plan.budget);
    let pool = Pool::builder().memory(budget).fill_threads(2).build();
    let pool = pool.unwrap_or_else(|e| fail(&format!("a pool cannot be made: {e}")));
    shared(|p| {
        p.pool = Some(pool);
        p.maps.resize_with(plan.maps as usize, || None);
        p.kept.resize_with(plan.maps as usize, || None);
    });
    for at in 0..plan.maps as usize {
        make_map(at);
    }
    // The threads of the program come right behind this one: see `thread`.
    let first = with(|w| w.scheduler.threads.len());
    let most = first - 1 + plan.threads as usize;
    shared(|p| p.left = vec![0; most]);
    shared(|p| p.current.resize_with(most, || None));
    let threads: Vec<u32> = (0..plan.threads)
        .map(|i| {
            let number = scheduler::spawn(format!("program {i}"), Box::new(thread));
            shared(|p| p.left[number as usize - 1] = plan.operations);
            number
        })
        .collect();
    let p = plan.parties;
    let parties: [(bool, &str, u64, fn()); 6] = [
        (p.reclaim, "reclaim", 400_000, reclaim),
        (p.neighbour, "neighbour", 60_000_000, neighbour),
        (p.writer, "writer", 8_000_000, writer),
        (p.truncation, "truncation", 8_000_000, truncation),
        (p.closer, "closer", 2_000_000, closer),
        (p.forks, "forks", 80_000_000, fork),
    ];
    for (_, name, pause, f) in parties.into_iter().filter(|party| party.0) {
        party(name, pause, f);
    }
    for number in threads {
        faultless_sys::simulated::machine().join(number);
    }
    shared(|p| p.over = true);
    end(&plan);
}

/// Drops all, and looks whether anything is left.
fn end(plan: &crate::plan::Plan) {
    for at in 0..plan.maps as usize {
        doing(format!("drops map {at} at the end"));
        let gone = shared(|p| p.maps[at].take());
        drop(gone);
    }
    // Parties that were in the middle of something.
    scheduler::until("the other parties", &|| {
        with(|w| {
            let all = w.scheduler.threads.iter();
            let mut parties = all.filter(|t| {
                [
                    "reclaim",
                    "neighbour",
                    "writer",
                    "truncation",
                    "closer",
                    "forks",
                ]
                .contains(&t.name.as_str())
            });
            parties.all(|t| matches!(t.state, scheduler::State::Dead))
        })
    });
    let frames = with(|w| w.kernel.memory.frames());
    if frames > 0 {
        let where_ = with(|w| w.kernel.memory.describe());
        fail(&format!(
            "{frames} pages are left of maps that are gone:\n{where_}"
        ));
    }
    // (The evictor looks into gates now and then.)
    let mut looks = 0;
    while crate::world::quietly(simulation::inside) {
        looks += 1;
        if looks > 100 {
            fail("a thread is inside a map that is gone");
        }
        scheduler::sleep(1_000_000);
    }
    doing("drops the pool".into());
    let pool = shared(|p| p.pool.take());
    drop(pool);
    let left = || {
        with(|w| {
            let engine = w
                .scheduler
                .threads
                .iter()
                .filter(|t| t.name.starts_with("faultless"));
            let left = engine.filter(|t| !matches!(t.state, scheduler::State::Dead));
            left.map(|t| t.name.clone()).collect::<Vec<_>>()
        })
    };
    // Threads that serve futures end by themselves.
    let mut looks = 0;
    while looks < 100 && left().iter().any(|name| name == "faultless-async") {
        looks += 1;
        scheduler::sleep(1_000_000);
    }
    let left = left();
    if left
        .iter()
        .any(|n| n != "faultless-keep" && n != "faultless-move")
    {
        fail(&format!(
            "threads are left of a pool that is gone: {left:?}"
        ));
    }
}
