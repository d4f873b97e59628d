//! Files, open files, tables of descriptors, leases.

#![allow(
    unsafe_code,
    reason = "reads and writes memory that calls name by address"
)]

use super::memory::{self, PAGE};
use super::tell;
use super::{Answer, interrupted, read, signals, write};
use crate::rng::mix;
use crate::scheduler;
use crate::world::{fail, with};
use std::collections::BTreeMap;

/// A file.
pub(crate) struct Inode {
    pub(crate) len: u64,
    /// Its bytes are a function of this and of their position.
    pub(crate) version: u64,
    /// Open for writing, so often.
    writers: u32,
    /// The open file that has a lease on it.
    lease: Option<usize>,
    /// Address of the memory of a file in memory.
    block: Option<(usize, usize)>,
    /// Reads of this page fail.
    pub(crate) broken: Option<u64>,
}

/// What is open.
#[derive(Debug, Clone)]
pub(crate) enum Kind {
    File { inode: usize, direct: bool },
    Uffd,
    Epoll(BTreeMap<i32, u64>),
    Notice(bool),
    Pid(u32),
    Text(Vec<u8>, usize),
}

struct Lease {
    /// When it is taken by force, once it is being broken.
    until: Option<u64>,
}

struct Open {
    kind: Kind,
    lease: Option<Lease>,
    owner: u32,
    signal: i32,
}

pub(crate) struct Files {
    pub(crate) inodes: Vec<Inode>,
    open: Vec<Open>,
    tables: Vec<BTreeMap<i32, usize>>,
}

/// The eight bytes of a file from a position, which is a multiple of eight.
pub(crate) fn word_of(version: u64, at: u64) -> u64 {
    mix(version.wrapping_mul(0x1_0001) ^ at)
}

impl Files {
    pub(crate) fn new() -> Self {
        let mut table = BTreeMap::new();
        // The descriptors that every process has.
        let open = (0..3).map(|n| {
            table.insert(n, n as usize);
            Open {
                kind: Kind::Notice(false),
                lease: None,
                owner: 0,
                signal: 0,
            }
        });
        let open = open.collect();
        Files {
            inodes: Vec::new(),
            open,
            tables: vec![table],
        }
    }

    fn add(&mut self, table: usize, kind: Kind) -> i32 {
        self.open.push(Open {
            kind,
            lease: None,
            owner: 0,
            signal: libc::SIGIO,
        });
        self.put(table, self.open.len() - 1, 0)
    }

    fn put(&mut self, table: usize, open: usize, from: i32) -> i32 {
        let table = &mut self.tables[table];
        let number = (from..)
            .find(|n| !table.contains_key(n))
            .unwrap_or(i32::MAX);
        table.insert(number, open);
        number
    }

    /// Makes a file.
    pub(crate) fn create(&mut self, len: u64, version: u64) -> usize {
        self.inodes.push(Inode {
            len,
            version,
            writers: 0,
            lease: None,
            block: None,
            broken: None,
        });
        self.inodes.len() - 1
    }

    fn is_open(&self, open: usize) -> bool {
        self.tables.iter().any(|t| t.values().any(|&o| o == open))
    }

    /// Numbers of the program's table from 3 on.
    pub(crate) fn numbers(&self) -> Vec<i32> {
        self.tables[0].keys().copied().filter(|&n| n > 2).collect()
    }
}

/// The open file behind a number of the running thread's table.
pub(crate) fn open_file(fd: i32) -> Option<(usize, Kind)> {
    with(|w| {
        let table = w.scheduler.running().map_or(0, |t| t.table);
        let f = &w.kernel.files;
        let open = *f.tables[table].get(&fd)?;
        Some((open, f.open[open].kind.clone()))
    })
}

fn add(kind: Kind) -> Answer {
    Ok(with(|w| {
        let table = w.scheduler.running().map_or(0, |t| t.table);
        w.kernel.files.add(table, kind)
    }) as usize)
}

/// Opens a file for the program.
pub(crate) fn open_inode(inode: usize) -> i32 {
    let kind = Kind::File {
        inode,
        direct: false,
    };
    let fd = add(kind).unwrap_or(0) as i32;
    tell(|| format!("the program opens inode {inode} as {fd}"));
    fd
}

pub(crate) fn userfaultfd() -> Answer {
    add(Kind::Uffd)
}

/// Closes a number of the running thread's table.
pub(crate) fn close(fd: i32) -> Answer {
    let table = with(|w| w.scheduler.running().map_or(0, |t| t.table));
    close_in(table, fd)
}

fn close_in(table: usize, fd: i32) -> Answer {
    with(|w| {
        let f = &mut w.kernel.files;
        let open = f.tables[table].remove(&fd).ok_or(libc::EBADF)?;
        for o in &mut f.open {
            if let Kind::Epoll(set) = &mut o.kind
                && table != 0
            {
                set.remove(&fd);
            }
        }
        if !f.is_open(open) {
            match f.open[open].kind {
                Kind::Uffd => w.kernel.memory.disarm(open),
                Kind::File { inode, .. } if f.inodes[inode].lease == Some(open) => {
                    f.inodes[inode].lease = None
                }
                _ => {}
            }
        }
        Ok(0)
    })
}

/// The memory of a file in memory.
pub(crate) fn block(fd: i32) -> Option<usize> {
    let (_, Kind::File { inode, .. }) = open_file(fd)? else {
        return None;
    };
    with(|w| w.kernel.files.inodes[inode].block.map(|(at, _)| at))
}

fn inode_of(fd: i32) -> Result<(usize, usize, bool), i32> {
    match open_file(fd).ok_or(libc::EBADF)? {
        (open, Kind::File { inode, direct }) => Ok((open, inode, direct)),
        _ => Err(libc::EINVAL),
    }
}

/// Calls on files and descriptors. `None` if the call is none.
pub(crate) fn answer(nr: libc::c_long, a: [usize; 6]) -> Option<Answer> {
    let fd = a[0] as i32;
    Some(match nr {
        libc::SYS_close => close(fd),
        libc::SYS_pread64 => pread(fd, a[1], a[2], a[3] as u64),
        libc::SYS_pwritev => pwritev(fd, a[1], a[2], a[3]),
        libc::SYS_read => read_from(fd, a[1], a[2]),
        libc::SYS_write => notify(fd),
        libc::SYS_fstat => stat(fd, a[1]),
        libc::SYS_fstatfs => {
            let mut st = [0u64; 15];
            st[0] = 0xEF53;
            write(a[1], st);
            inode_of(fd).map(|_| 0)
        }
        libc::SYS_statx => Err(libc::ENOSYS),
        libc::SYS_fcntl => fcntl(fd, a[1] as i32, a[2]),
        libc::SYS_openat => open_path(a[1]),
        libc::SYS_memfd_create => {
            let inode = with(|w| w.kernel.files.create(0, 0));
            with(|w| w.kernel.files.inodes[inode].block = Some((0, 0)));
            add(Kind::File {
                inode,
                direct: false,
            })
        }
        libc::SYS_ftruncate => truncate(fd, a[1]),
        libc::SYS_fallocate => punch(fd, a[2], a[3]),
        libc::SYS_epoll_create1 => add(Kind::Epoll(BTreeMap::new())),
        libc::SYS_epoll_ctl => epoll_change(fd, a[1] as i32, a[2] as i32, a[3]),
        libc::SYS_epoll_pwait => epoll_wait(fd, a[1]),
        libc::SYS_eventfd2 => add(Kind::Notice(false)),
        libc::SYS_close_range => {
            with(|w| {
                w.kernel.files.tables.push(BTreeMap::new());
                w.scheduler.me().table = w.kernel.files.tables.len() - 1;
            });
            Ok(0)
        }
        libc::SYS_pidfd_open => {
            let (tid, thread) = (a[0] as u32, a[1] as i32 & libc::O_EXCL != 0);
            match !thread || signals::is_alive(tid) {
                true => add(Kind::Pid(tid)),
                false => Err(libc::ESRCH),
            }
        }
        libc::SYS_pidfd_getfd => fetch(fd, a[1] as i32),
        libc::SYS_kcmp => compare(a),
        _ => return None,
    })
}

fn table_of(tid: u32) -> Option<usize> {
    with(|w| w.scheduler.by_tid(tid).map(|t| t.table))
}

fn fetch(pidfd: i32, fd: i32) -> Answer {
    let (_, Kind::Pid(tid)) = open_file(pidfd).ok_or(libc::EBADF)? else {
        return Err(libc::EBADF);
    };
    let table = table_of(tid).ok_or(libc::ESRCH)?;
    with(|w| {
        let open = *w.kernel.files.tables[table].get(&fd).ok_or(libc::EBADF)?;
        let mine = w.scheduler.me().table;
        Ok(w.kernel.files.put(mine, open, 0) as usize)
    })
}

fn compare([a, b, what, x, y, _]: [usize; 6]) -> Answer {
    let (ta, tb) = (
        table_of(a as u32).ok_or(libc::ESRCH)?,
        table_of(b as u32).ok_or(libc::ESRCH)?,
    );
    if what != 0 {
        return Ok(usize::from(ta != tb));
    }
    with(|w| {
        let f = &w.kernel.files;
        let x = f.tables[ta].get(&(x as i32)).ok_or(libc::EBADF)?;
        let y = f.tables[tb].get(&(y as i32)).ok_or(libc::EBADF)?;
        Ok(usize::from(x != y))
    })
}

fn pread(fd: i32, buf: usize, len: usize, at: u64) -> Answer {
    if interrupted() {
        return Err(libc::EINTR);
    }
    let (_, inode, direct) = inode_of(fd)?;
    if direct && (buf | len | at as usize) % PAGE != 0 {
        return Err(libc::EINVAL);
    }
    let (faults, version, end, broken) = with(|w| {
        let i = &w.kernel.files.inodes[inode];
        (w.plan.faults, i.version, i.len, i.broken)
    });
    if with(|w| w.rng.once_in(faults.again)) {
        return Err(libc::EAGAIN);
    }
    let mut len = len.min(end.saturating_sub(at) as usize);
    if len > 1 && with(|w| w.rng.once_in(faults.short)) {
        len = with(|w| w.rng.between(1, len as u64 - 1)) as usize;
        if direct {
            len = (len & !(PAGE - 1)).max(PAGE.min(len));
        }
    }
    // The device takes its time. A file that changes meanwhile may give old bytes, or new ones.
    let late = with(|w| w.rng.once_in(2));
    let time = with(|w| w.rng.between(20_000, 200_000));
    scheduler::sleep(time);
    let version = if late {
        with(|w| w.kernel.files.inodes[inode].version)
    } else {
        version
    };
    if with(|w| w.rng.once_in(faults.eio)) {
        return Err(libc::EIO);
    }
    if let Some(page) = broken
        && (at / PAGE as u64..=(at + len.max(1) as u64 - 1) / PAGE as u64).contains(&page)
    {
        return Err(libc::EIO);
    }
    for word in (0..len).step_by(8) {
        let from = at + word as u64;
        let shift = from % 8;
        let bytes = word_of(version, from - shift).to_le_bytes();
        debug_assert_eq!(shift, 0);
        let n = (len - word).min(8);
        // SAFETY: the caller's buffer of `len` bytes.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), (buf + word) as *mut u8, n) };
    }
    Ok(len)
}

fn pwritev(fd: i32, ranges: usize, count: usize, at: usize) -> Answer {
    let (_, inode, _) = inode_of(fd)?;
    if interrupted() {
        return Err(libc::EINTR);
    }
    let Some((block, len)) = with(|w| w.kernel.files.inodes[inode].block) else {
        return Err(libc::EBADF);
    };
    memory::read_pages(ranges, count, |done, bytes| {
        if at + done + PAGE > len {
            fail("a slot behind the end of the cooling area is written");
        }
        // SAFETY: inside the file's memory.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), (block + at + done) as *mut u8, PAGE)
        };
    })
}

fn truncate(fd: i32, len: usize) -> Answer {
    let (_, inode, _) = inode_of(fd)?;
    let (old, old_len) = with(|w| w.kernel.files.inodes[inode].block).ok_or(libc::EINVAL)?;
    if old_len > 0 {
        memory::make_unreal(old, old_len);
    }
    let block = if len > 0 {
        memory::new_block(len.next_multiple_of(PAGE))
    } else {
        0
    };
    with(|w| w.kernel.files.inodes[inode].block = Some((block, len)));
    Ok(0)
}

fn punch(fd: i32, at: usize, len: usize) -> Answer {
    let (_, inode, _) = inode_of(fd)?;
    let (block, _) = with(|w| w.kernel.files.inodes[inode].block).ok_or(libc::EINVAL)?;
    // SAFETY: inside the file's memory.
    unsafe { std::ptr::write_bytes((block + at) as *mut u8, 0, len) };
    Ok(0)
}

fn stat(fd: i32, at: usize) -> Answer {
    let (inode, len) = match open_file(fd).ok_or(libc::EBADF)? {
        (_, Kind::File { inode, .. }) => (inode as u64, with(|w| w.kernel.files.inodes[inode].len)),
        (open, _) => (1 << 32 | open as u64, 0),
    };
    // SAFETY: all zero is a valid structure.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    (st.st_dev, st.st_ino) = (7, inode);
    st.st_mode = libc::S_IFREG | 0o644;
    st.st_size = len as i64;
    write(at, st);
    Ok(0)
}

fn open_path(at: usize) -> Answer {
    // SAFETY: the caller's path.
    let path = unsafe { std::ffi::CStr::from_ptr(at as *const _) }
        .to_str()
        .unwrap_or_default();
    let number = |prefix: &str| {
        path.strip_prefix(prefix)
            .and_then(|n| n.parse::<i32>().ok())
    };
    if let Some(fd) = number("/proc/thread-self/fdinfo/") {
        let (open, _) = open_file(fd).ok_or(libc::ENOENT)?;
        let leased = with(|w| w.kernel.files.open[open].lease.is_some());
        let text = if leased {
            "lock: 1: LEASE ACTIVE READ\n"
        } else {
            "pos: 0\n"
        };
        return add(Kind::Text(text.as_bytes().to_vec(), 0));
    }
    if let Some(fd) = number("/proc/thread-self/fd/") {
        let (_, inode, _) = inode_of(fd)?;
        let direct = with(|w| w.rng.once_in(2));
        return add(Kind::File { inode, direct });
    }
    Err(libc::ENOENT)
}

fn read_from(fd: i32, buf: usize, len: usize) -> Answer {
    if interrupted() {
        return Err(libc::EINTR);
    }
    let (open, kind) = open_file(fd).ok_or(libc::EBADF)?;
    if let Kind::Uffd = kind {
        const EVENT_UNMAP: u64 = 0x16;
        let [start, end] = with(|w| w.kernel.memory.take_report(open)).ok_or(libc::EAGAIN)?;
        write(buf, [EVENT_UNMAP, start as u64, end as u64, 0]);
        return Ok(32);
    }
    let Kind::Text(text, pos) = kind else {
        return Err(libc::EINVAL);
    };
    let n = len.min(text.len() - pos);
    // SAFETY: the caller's buffer.
    unsafe { std::ptr::copy_nonoverlapping(text[pos..].as_ptr(), buf as *mut u8, n) };
    with(|w| w.kernel.files.open[open].kind = Kind::Text(text, pos + n));
    Ok(n)
}

fn notify(fd: i32) -> Answer {
    let (open, _) = open_file(fd).ok_or(libc::EBADF)?;
    with(|w| w.kernel.files.open[open].kind = Kind::Notice(true));
    Ok(8)
}

fn epoll_change(epoll: i32, what: i32, fd: i32, event: usize) -> Answer {
    let (open, Kind::Epoll(mut set)) = open_file(epoll).ok_or(libc::EBADF)? else {
        return Err(libc::EINVAL);
    };
    match what {
        libc::EPOLL_CTL_ADD => {
            open_file(fd).ok_or(libc::EBADF)?;
            let event: libc::epoll_event = read(event);
            set.insert(fd, event.u64);
        }
        _ => _ = set.remove(&fd).ok_or(libc::ENOENT)?,
    }
    with(|w| w.kernel.files.open[open].kind = Kind::Epoll(set));
    Ok(0)
}

fn epoll_wait(epoll: i32, event: usize) -> Answer {
    let table = with(|w| w.scheduler.me().table);
    // (The scheduler asks; then the running thread is another.)
    let ready = move || {
        with(|w| {
            let f = &w.kernel.files;
            let open = |fd: &i32| f.tables[table].get(fd).copied();
            let Some(Kind::Epoll(set)) = open(&epoll).map(|o| &f.open[o].kind) else {
                return Some(Err(libc::EBADF));
            };
            let is_ready = |fd: &i32| {
                open(fd).is_some_and(|o| match f.open[o].kind {
                    Kind::Notice(rung) => rung,
                    Kind::Uffd => w.kernel.memory.has_report(o),
                    _ => false,
                })
            };
            set.iter()
                .find(|(fd, _)| is_ready(fd))
                .map(|(_, data)| Ok(*data))
        })
    };
    scheduler::until("an event", &move || ready().is_some());
    let data = ready().unwrap_or(Err(libc::EINTR))?;
    let events = libc::EPOLLIN as u32;
    write(event, libc::epoll_event { events, u64: data });
    Ok(1)
}

const F_SETOWN_EX: i32 = 15;
const F_SETSIG: i32 = 10;

fn fcntl(fd: i32, what: i32, arg: usize) -> Answer {
    let (open, kind) = open_file(fd).ok_or(libc::EBADF)?;
    let inode = match kind {
        Kind::File { inode, .. } => Some(inode),
        _ => None,
    };
    match what {
        libc::F_DUPFD_CLOEXEC => Ok(with(|w| {
            let table = w.scheduler.me().table;
            w.kernel.files.put(table, open, arg as i32)
        }) as usize),
        F_SETOWN_EX => {
            let [_, tid]: [u32; 2] = read(arg);
            with(|w| w.kernel.files.open[open].owner = tid);
            Ok(0)
        }
        F_SETSIG => {
            with(|w| w.kernel.files.open[open].signal = arg as i32);
            Ok(0)
        }
        libc::F_GETFL => Ok(match kind {
            Kind::File { direct: true, .. } => libc::O_DIRECT as usize,
            _ => 0,
        }),
        libc::F_SETFL => {
            if let Some(inode) = inode {
                let direct = arg as i32 & libc::O_DIRECT != 0;
                with(|w| w.kernel.files.open[open].kind = Kind::File { inode, direct });
            }
            Ok(0)
        }
        libc::F_OFD_GETLK => {
            let mut lock: libc::flock = read(arg);
            lock.l_type = libc::F_UNLCK as i16;
            write(arg, lock);
            Ok(0)
        }
        libc::F_GETLEASE => with(|w| {
            let lease = &w.kernel.files.open[open].lease;
            Ok(match lease {
                Some(Lease { until: None }) => libc::F_RDLCK as usize,
                _ => libc::F_UNLCK as usize,
            })
        }),
        libc::F_SETLEASE => set_lease(open, inode.ok_or(libc::EINVAL)?, arg as i32),
        other => fail(&format!("fcntl command {other} is not simulated")),
    }
}

fn set_lease(open: usize, inode: usize, kind: i32) -> Answer {
    with(|w| {
        let f = &mut w.kernel.files;
        match kind {
            libc::F_RDLCK if f.inodes[inode].writers > 0 => Err(libc::EAGAIN),
            libc::F_RDLCK => {
                f.open[open].lease = Some(Lease { until: None });
                f.inodes[inode].lease = Some(open);
                Ok(0)
            }
            _ => {
                f.open[open].lease = None;
                if f.inodes[inode].lease == Some(open) {
                    f.inodes[inode].lease = None;
                }
                Ok(0)
            }
        }
    })
}

/// All open files that have a lease on an inode.
fn leases(f: &Files, inode: usize) -> Vec<usize> {
    (0..f.open.len())
        .filter(|&o| {
            matches!(f.open[o].kind, Kind::File { inode: i, .. } if i == inode)
                && f.open[o].lease.is_some()
                && f.is_open(o)
        })
        .collect()
}

/// Somebody opens a file for writing, which waits until no lease keeps it out. Returns whether a lease was taken by force.
pub(crate) fn open_for_writing(inode: usize, patience: u64) -> bool {
    let (told, end) = with(|w| {
        let end = w.clock + patience;
        w.kernel.files.inodes[inode].writers += 1;
        let f = &mut w.kernel.files;
        let mut told = Vec::new();
        for o in leases(f, inode) {
            if let Some(lease) = &mut f.open[o].lease {
                lease.until.get_or_insert(end);
            }
            told.push((f.open[o].owner, f.open[o].signal));
        }
        (told, end)
    });
    for (tid, signal) in told {
        let _ = signals::send(tid, signal);
    }
    loop {
        let (left, now) = with(|w| (leases(&w.kernel.files, inode).len(), w.clock));
        if left == 0 {
            return false;
        }
        if now >= end {
            with(|w| {
                for o in leases(&w.kernel.files, inode) {
                    w.kernel.files.open[o].lease = None;
                }
                w.kernel.files.inodes[inode].lease = None;
            });
            return true;
        }
        scheduler::sleep(1_000_000);
    }
}

/// It has written, and closes the file.
pub(crate) fn end_writing(inode: usize) {
    with(|w| w.kernel.files.inodes[inode].writers -= 1);
}

/// The program closes a number of its own table.
pub(crate) fn close_programs(fd: i32) {
    tell(|| format!("the program closes {fd}"));
    let _ = close_in(0, fd);
}
