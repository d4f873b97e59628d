//! Address space: mappings with their locks, userfaultfd, and pages.
//!
//! The engine's own memory is real, at addresses of an arena. Ranges that userfaultfd watches are simulated: a table here has their
//! pages, a real access to their addresses crashes, and loads go through [`load`].

#![allow(
    unsafe_code,
    reason = "hands out real memory, reads what calls point to"
)]

use super::files::{self, Kind};
use super::signals::bus_error;
use super::{Answer, read, write};
use crate::scheduler;
use crate::world::{fail, with};
use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};

pub(crate) const PAGE: usize = 4096;

/// The arena: addresses that are the same in each run.
const ARENA: usize = 0x2000_0000_0000;
const ARENA_LEN: usize = 64 << 30;

/// A mapping.
#[derive(Debug, Clone)]
struct Vma {
    end: usize,
    /// The userfaultfd that it is armed by.
    armed: Option<usize>,
    /// It once was: its pages are simulated.
    simulated: bool,
    /// The reverse map is prepared.
    anon_vma: bool,
    /// Real memory, readable and writable.
    real: bool,
    /// Of a file in memory.
    file: bool,
}

/// A page of a simulated range.
struct Page {
    bytes: Box<[u8; PAGE]>,
    /// Marked `MADV_FREE`.
    lazy: bool,
}

#[derive(Default)]
struct Lock {
    writer: bool,
    waiting_writers: u32,
    readers: u32,
}

pub(crate) struct Memory {
    vmas: BTreeMap<usize, Vma>,
    pages: HashMap<usize, Page>,
    /// Pages that were there once, and are not any more.
    gone: HashSet<usize>,
    /// Pages in the order of their addresses, for choices that must be the same in each run.
    order: std::collections::BTreeSet<usize>,
    next: usize,
    /// Ranges that were unmapped and may be given out again.
    free: Vec<(usize, usize)>,
    lock: Lock,
    /// Each mapping is write-locked.
    pub(crate) forking: bool,
    /// Reports of ranges that were unmapped, for each userfaultfd: its first address and its end.
    reports: BTreeMap<usize, VecDeque<[usize; 2]>>,
    /// How often a fault took `mmap_lock` because the mapping was locked.
    pub(crate) fell_back: u64,
    /// Pages that the kernel has taken back.
    pub(crate) reclaimed: u64,
}

impl Memory {
    pub(crate) fn new() -> Self {
        let flags = libc::MAP_PRIVATE
            | libc::MAP_ANONYMOUS
            | libc::MAP_NORESERVE
            | libc::MAP_FIXED_NOREPLACE;
        // SAFETY: replaces nothing.
        let at = unsafe { libc::mmap(ARENA as *mut _, ARENA_LEN, libc::PROT_NONE, flags, -1, 0) };
        assert_eq!(at as usize, ARENA, "the arena's addresses are free");
        Memory {
            vmas: BTreeMap::new(),
            pages: HashMap::new(),
            gone: HashSet::new(),
            order: Default::default(),
            // Not at a multiple of everything.
            next: ARENA + 7 * PAGE,
            free: Vec::new(),
            lock: Lock::default(),
            forking: false,
            reports: BTreeMap::new(),
            fell_back: 0,
            reclaimed: 0,
        }
    }

    fn vma(&self, addr: usize) -> Option<(usize, &Vma)> {
        let (&start, vma) = self.vmas.range(..=addr).next_back()?;
        (addr < vma.end).then_some((start, vma))
    }

    /// Splits mappings so that a range begins and ends with one.
    fn split(&mut self, start: usize, end: usize) {
        for at in [start, end] {
            if let Some((from, vma)) = self.vma(at).map(|(s, v)| (s, v.clone()))
                && from < at
            {
                self.vmas.insert(at, vma.clone());
                self.vmas.insert(from, Vma { end: at, ..vma });
            }
        }
    }

    fn each(&mut self, start: usize, end: usize, mut f: impl FnMut(&mut Vma)) -> Answer {
        self.split(start, end);
        let mut covered = start;
        for (&s, vma) in self.vmas.range_mut(start..end) {
            if s != covered {
                return Err(libc::ENOMEM);
            }
            covered = vma.end;
            f(vma);
        }
        if covered < end {
            Err(libc::ENOMEM)
        } else {
            Ok(0)
        }
    }

    /// Address space for so many bytes.
    fn place(&mut self, len: usize, again: bool) -> usize {
        if again && let Some(at) = self.free.iter().position(|&(_, l)| l >= len) {
            let (start, l) = self.free.swap_remove(at);
            if l > len {
                self.free.push((start + len, l - len));
            }
            return start;
        }
        let at = self.next;
        // With a page between: what runs over the end of one is in no other.
        self.next += len + PAGE;
        assert!(self.next < ARENA + ARENA_LEN, "the arena is used up");
        at
    }

    fn drop_page(&mut self, page: usize) {
        if self.pages.remove(&page).is_some() {
            self.gone.insert(page);
        }
        self.order.remove(&page);
    }

    /// Pages that are present in simulated ranges.
    pub(crate) fn frames(&self) -> u64 {
        self.pages.len() as u64
    }

    /// Where some of them are, and what is mapped there.
    pub(crate) fn describe(&self) -> String {
        let some = self.order.iter().take(8);
        let lines = some.map(|&p| format!("  page {p:#x} in {:x?}\n", self.vma(p)));
        lines.collect()
    }

    /// Takes some page back that is marked `MADV_FREE`.
    pub(crate) fn reclaim(&mut self, turn: u64) {
        let lazy: Vec<usize> = self
            .order
            .iter()
            .copied()
            .filter(|p| self.pages[p].lazy)
            .collect();
        if !lazy.is_empty() {
            self.reclaimed += 1;
            self.drop_page(lazy[(turn % lazy.len() as u64) as usize]);
        }
    }

    /// No userfaultfd with this number is open any more.
    pub(crate) fn disarm(&mut self, uffd: usize) {
        for vma in self.vmas.values_mut() {
            if vma.armed == Some(uffd) {
                vma.armed = None;
            }
        }
    }

    /// Whether a userfaultfd has a report to be read.
    pub(crate) fn has_report(&self, uffd: usize) -> bool {
        self.reports.get(&uffd).is_some_and(|r| !r.is_empty())
    }

    /// Reads one.
    pub(crate) fn take_report(&mut self, uffd: usize) -> Option<[usize; 2]> {
        self.reports.get_mut(&uffd)?.pop_front()
    }

    /// Whether the simulated page at an address is present, or was there once.
    pub(crate) fn has_been_there(&self, addr: usize) -> bool {
        let page = addr & !(PAGE - 1);
        self.pages.contains_key(&page) || self.gone.contains(&page)
    }

    /// Whether the simulated page at an address is present, and not the kernel's to take.
    pub(crate) fn is_firm(&self, addr: usize) -> bool {
        self.pages
            .get(&(addr & !(PAGE - 1)))
            .is_some_and(|p| !p.lazy)
    }
}

/// `mmap_lock`, held until this is dropped.
pub(crate) struct MmapLock(bool);

impl MmapLock {
    pub(crate) fn take(write: bool) -> Self {
        if write {
            with(|w| w.kernel.memory.lock.waiting_writers += 1);
        }
        // A writer that waits keeps later readers out.
        scheduler::until("mmap_lock", &move || {
            with(|w| {
                let lock = &w.kernel.memory.lock;
                match write {
                    true => !lock.writer && lock.readers == 0,
                    false => !lock.writer && lock.waiting_writers == 0,
                }
            })
        });
        with(|w| {
            let lock = &mut w.kernel.memory.lock;
            match write {
                true => (lock.writer, lock.waiting_writers) = (true, lock.waiting_writers - 1),
                false => lock.readers += 1,
            }
        });
        MmapLock(write)
    }
}

impl Drop for MmapLock {
    fn drop(&mut self) {
        with(|w| {
            let lock = &mut w.kernel.memory.lock;
            match self.0 {
                true => lock.writer = false,
                false => lock.readers -= 1,
            }
        });
    }
}

pub(crate) fn map(a: [usize; 6]) -> Answer {
    let [_, len, prot, flags, fd, _] = a;
    let (prot, flags, fd) = (prot as i32, flags as i32, fd as i32);
    if flags & (libc::MAP_FIXED | libc::MAP_FIXED_NOREPLACE) != 0 {
        fail("mappings at given addresses are not simulated");
    }
    let len = len.next_multiple_of(PAGE);
    let _lock = MmapLock::take(true);
    if fd >= 0 {
        let block = files::block(fd).ok_or(libc::ENODEV)?;
        with(|w| {
            let vma = Vma {
                end: block + len,
                armed: None,
                simulated: false,
                anon_vma: false,
                real: true,
                file: true,
            };
            w.kernel.memory.vmas.insert(block, vma);
        });
        return Ok(block);
    }
    let write = prot & libc::PROT_WRITE != 0;
    let at = with(|w| {
        let again = w.rng.once_in(2);
        let at = w.kernel.memory.place(len, again);
        let vma = Vma {
            end: at + len,
            armed: None,
            simulated: false,
            anon_vma: false,
            real: false,
            file: false,
        };
        w.kernel.memory.vmas.insert(at, vma);
        at
    });
    if write {
        make_real(at, len);
    }
    Ok(at)
}

/// Real memory, which is zero.
pub(crate) fn make_real(at: usize, len: usize) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: inside the arena, which is ours.
    let made = unsafe {
        libc::mmap(
            at as *mut _,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            -1,
            0,
        )
    };
    assert_eq!(made as usize, at);
    with(|w| {
        let _ = w.kernel.memory.each(at, at + len, |vma| vma.real = true);
    });
}

/// No access: whoever comes late crashes.
pub(crate) fn make_unreal(at: usize, len: usize) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: inside the arena, which is ours.
    unsafe { libc::mmap(at as *mut _, len, libc::PROT_NONE, flags, -1, 0) };
}

/// A block of real memory for a file.
pub(crate) fn new_block(len: usize) -> usize {
    let at = with(|w| w.kernel.memory.place(len, false));
    make_real(at, len);
    at
}

pub(crate) fn unmap(start: usize, len: usize) -> Answer {
    let lock = MmapLock::take(true);
    let end = start + len.next_multiple_of(PAGE);
    let mut reported = Vec::new();
    let (real, file) = with(|w| {
        let m = &mut w.kernel.memory;
        m.split(start, end);
        let gone: Vec<(usize, Vma)> = m
            .vmas
            .range(start..end)
            .map(|(s, v)| (*s, v.clone()))
            .collect();
        let mut real = Vec::new();
        let mut file = false;
        for (s, vma) in gone {
            if let Some(uffd) = vma.armed {
                m.reports.entry(uffd).or_default().push_back([s, vma.end]);
                reported.push((uffd, [s, vma.end]));
            }
            m.vmas.remove(&s);
            file |= vma.file;
            if vma.real && !vma.file {
                real.push((s, vma.end - s));
            }
        }
        for page in m.order.range(start..end).copied().collect::<Vec<_>>() {
            m.drop_page(page);
        }
        (real, file)
    });
    for (at, len) in real {
        make_unreal(at, len);
    }
    if !file {
        with(|w| w.kernel.memory.free.push((start, end - start)));
    }
    drop(lock);
    // The thread goes on when its reports have been read.
    scheduler::until("its report to be read", &|| {
        with(|w| {
            let m = &w.kernel.memory;
            let pending = |(uffd, range)| m.reports.get(uffd).is_some_and(|r| r.contains(range));
            !reported.iter().any(|(uffd, range)| pending((uffd, range)))
        })
    });
    Ok(0)
}

pub(crate) fn protect(start: usize, len: usize, prot: i32) -> Answer {
    let _lock = MmapLock::take(true);
    let (simulated, known) = with(|w| {
        let vma = w.kernel.memory.vma(start).map(|(_, v)| v.clone());
        (
            vma.as_ref()
                .is_some_and(|v| v.simulated || v.file || v.real),
            vma.is_some(),
        )
    });
    if !known {
        return Err(libc::ENOMEM);
    }
    if prot & libc::PROT_WRITE != 0 && !simulated {
        make_real(start, len);
    }
    Ok(0)
}

const DONTNEED_LOCKED: i32 = 24;

/// Returns how many bytes were advised.
pub(crate) fn advise(start: usize, len: usize, advice: i32) -> Answer {
    if !matches!(
        advice,
        libc::MADV_DONTNEED | DONTNEED_LOCKED | libc::MADV_FREE
    ) {
        return Ok(len);
    }
    let _lock = MmapLock::take(false);
    for page in (start..start + len).step_by(PAGE) {
        scheduler::step();
        advise_page(page, advice)?;
    }
    Ok(len)
}

fn advise_page(page: usize, advice: i32) -> Answer {
    let real = with(|w| {
        let m = &mut w.kernel.memory;
        let (_, vma) = m.vma(page).ok_or(libc::ENOMEM)?;
        let (real, simulated) = (vma.real, vma.simulated);
        match advice {
            libc::MADV_FREE => {
                if let Some(p) = m.pages.get_mut(&page) {
                    p.lazy = true;
                }
            }
            _ if simulated => m.drop_page(page),
            _ => {}
        }
        Ok::<bool, i32>(real && !simulated)
    })?;
    if real && advice != libc::MADV_FREE {
        // SAFETY: a page of real memory that may go.
        unsafe { std::ptr::write_bytes(page as *mut u8, 0, PAGE) };
    }
    Ok(0)
}

pub(crate) fn advise_batch(ranges: usize, count: usize, advice: i32) -> Answer {
    if with(|w| w.rng.once_in(w.plan.faults.batch)) {
        return Err(*with(|w| w.rng.pick(&[libc::EINTR, libc::EAGAIN])));
    }
    let mut done = 0;
    let _lock = MmapLock::take(false);
    for i in 0..count {
        if done > 0 && with(|w| w.rng.once_in(w.plan.faults.batch)) {
            break;
        }
        let [at, len]: [usize; 2] = read(ranges + i * 16);
        for page in (at..at + len).step_by(PAGE) {
            scheduler::step();
            if let Err(e) = advise_page(page, advice) {
                return if done > 0 { Ok(done) } else { Err(e) };
            }
        }
        done += len;
    }
    Ok(done)
}

const UFFDIO_API: u32 = 0xC018_AA3F;
const UFFDIO_REGISTER: u32 = 0xC020_AA00;
const UFFDIO_UNREGISTER: u32 = 0x8010_AA01;
const UFFDIO_WAKE: u32 = 0x8010_AA02;
const UFFDIO_COPY: u32 = 0xC028_AA03;

pub(crate) fn ioctl(fd: i32, nr: u32, arg: usize) -> Answer {
    let (id, kind) = files::open_file(fd).ok_or(libc::EBADF)?;
    if !matches!(kind, Kind::Uffd) {
        return Err(libc::ENOTTY);
    }
    match nr {
        UFFDIO_API | UFFDIO_WAKE => Ok(0),
        UFFDIO_REGISTER => {
            let [start, len]: [usize; 2] = read(arg);
            let _lock = MmapLock::take(true);
            with(|w| {
                w.kernel.memory.each(start, start + len, |vma| {
                    assert!(!vma.real, "memory of the engine's own is armed");
                    (vma.armed, vma.simulated) = (Some(id), true);
                })
            })
        }
        UFFDIO_UNREGISTER => {
            let [start, len]: [usize; 2] = read(arg);
            let _lock = MmapLock::take(true);
            with(|w| {
                w.kernel
                    .memory
                    .each(start, start + len, |vma| vma.armed = None)
            })
        }
        UFFDIO_COPY => {
            let [dst, src, len]: [usize; 3] = read(arg);
            let (done, error) = copy(id, dst, src, len);
            write::<i64>(
                arg + 32,
                if done > 0 {
                    done as i64
                } else {
                    -i64::from(error)
                },
            );
            match error {
                0 => Ok(0),
                // The call reports what it installed before, and the caller tries the rest again.
                _ if done > 0 => Err(libc::EAGAIN),
                e => Err(e),
            }
        }
        _ => Err(libc::EINVAL),
    }
}

/// Installs pages. Returns how many bytes, and the error that stopped it.
fn copy(uffd: usize, dst: usize, src: usize, len: usize) -> (usize, i32) {
    for done in (0..len).step_by(PAGE) {
        scheduler::step();
        if let Err(e) = copy_page(uffd, dst + done, src + done) {
            return (done, e);
        }
    }
    (len, 0)
}

fn copy_page(uffd: usize, dst: usize, src: usize) -> Result<(), i32> {
    let (busy, no_memory) = with(|w| {
        let f = w.plan.faults;
        (w.rng.once_in(f.busy), w.rng.once_in(f.no_memory))
    });
    if busy {
        return Err(libc::EAGAIN);
    }
    // Until the reports have been read, nothing is installed.
    if with(|w| w.kernel.memory.has_report(uffd)) {
        return Err(libc::EAGAIN);
    }
    let (locked, prepared) = with(|w| {
        let m = &w.kernel.memory;
        let prepared = m.vma(dst).is_none_or(|(_, v)| v.anon_vma);
        (m.forking, prepared)
    });
    if locked || !prepared {
        if !prepared && with(|w| w.scheduler.me().handlers > 0) {
            fail("a miss takes mmap_lock: the kernel has to prepare the mapping");
        }
        let _lock = MmapLock::take(false);
        with(|w| {
            w.kernel.memory.fell_back += 1;
            let m = &mut w.kernel.memory;
            if let Some(start) = m.vma(dst).map(|(s, _)| s)
                && let Some(vma) = m.vmas.get_mut(&start)
            {
                vma.anon_vma = true;
            }
        });
    }
    if no_memory {
        return Err(libc::ENOMEM);
    }
    // The bytes are read before the page is installed.
    // SAFETY: the engine's own memory; if it is gone, this crashes, which is what it is for.
    let bytes: [u8; PAGE] = unsafe { *(src as *const [u8; PAGE]) };
    scheduler::step();
    with(|w| {
        let m = &mut w.kernel.memory;
        match m.vma(dst) {
            Some((_, vma)) if vma.armed == Some(uffd) => {}
            _ => return Err(libc::ENOENT),
        }
        if m.pages.contains_key(&dst) {
            return Err(libc::EEXIST);
        }
        m.order.insert(dst);
        m.pages.insert(
            dst,
            Page {
                bytes: Box::new(bytes),
                lazy: false,
            },
        );
        Ok(())
    })
}

/// What a load sees.
pub(crate) enum Loaded {
    Bytes(Box<[u8; PAGE]>),
    /// The process would have been killed.
    Killed,
}

/// The program loads from an address of a map.
pub(crate) fn load(addr: usize) -> Loaded {
    let page = addr & !(PAGE - 1);
    let mut faults = 0;
    loop {
        scheduler::step();
        enum Seen {
            Page(Box<[u8; PAGE]>),
            Absent,
            Disarmed,
            Nothing,
        }
        let seen = with(|w| {
            let m = &mut w.kernel.memory;
            match m.vma(page).map(|(_, v)| v.armed.is_some()) {
                None => Seen::Nothing,
                Some(armed) => match m.pages.get(&page) {
                    Some(p) => Seen::Page(p.bytes.clone()),
                    None if armed => Seen::Absent,
                    None => Seen::Disarmed,
                },
            }
        });
        match seen {
            Seen::Page(bytes) => return Loaded::Bytes(bytes),
            Seen::Nothing => fail("a load finds nothing mapped"),
            // The kernel gives a page of zeros.
            Seen::Disarmed => return Loaded::Bytes(Box::new([0; PAGE])),
            Seen::Absent => {
                faults += 1;
                if faults > 100_000 {
                    fail("a load faults for ever");
                }
                if with(|w| w.kernel.memory.forking) {
                    drop(MmapLock::take(false));
                }
                if !bus_error(addr) {
                    return Loaded::Killed;
                }
            }
        }
    }
}

/// Copies pages of simulated ranges to a file: how much could be read.
pub(crate) fn read_pages(
    ranges: usize,
    count: usize,
    mut put: impl FnMut(usize, &[u8; PAGE]),
) -> Answer {
    let mut done = 0;
    for i in 0..count {
        let [at, len]: [usize; 2] = read(ranges + i * 16);
        for page in (at..at + len).step_by(PAGE) {
            scheduler::step();
            let bytes = with(|w| w.kernel.memory.pages.get(&page).map(|p| p.bytes.clone()));
            match bytes {
                Some(bytes) => put(done, &bytes),
                None if done > 0 => return Ok(done),
                None => return Err(libc::EFAULT),
            }
            done += PAGE;
        }
    }
    Ok(done)
}
