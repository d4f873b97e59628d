//! Records into events: numbers get names, times count from the beginning.

use crate::names::{self, Mounts, Symbols};
use crate::raw::{self, Raw};
use faultless_trace::{
    Doing, Event, Fault, File, FileNo, Hold, Io, Keeper, LockId, Nanos, Process, ProcessChange,
    Stack, StackNo, Stray, Thread, Wait,
};
use std::collections::HashMap;

/// Files that are told by name; what concerns others concerns no file.
const FILES_MAX: usize = 1 << 17;

#[derive(Debug)]
pub(crate) struct Translator {
    began: u64,
    symbols: Symbols,
    mounts: Mounts,
    files: HashMap<raw::FileId, FileNo>,
    /// Stacks that were told, and whether they wait for a VMA.
    stacks: HashMap<u32, (StackNo, bool)>,
    /// Numbers of locks, by their addresses in the kernel, which are nobody's business.
    locks: HashMap<u64, LockId>,
}

impl Translator {
    pub(crate) fn new() -> Translator {
        Translator {
            began: 0,
            symbols: Symbols::of_this_kernel(),
            mounts: Mounts::of(None),
            files: HashMap::new(),
            stacks: HashMap::new(),
            locks: HashMap::new(),
        }
    }

    fn lock(&mut self, mm: u64) -> LockId {
        let next = LockId(self.locks.len() as u64 + 1);
        *self.locks.entry(mm).or_insert(next)
    }

    /// Times count from an instant of CLOCK_MONOTONIC.
    pub(crate) fn count_from(&mut self, began: u64) {
        self.began = began;
    }

    fn at(&self, monotonic: u64) -> Nanos {
        monotonic.saturating_sub(self.began)
    }

    /// The number of a file, which is told under a number if its name has not come.
    pub(crate) fn file(&mut self, id: raw::FileId, tell: &mut impl FnMut(Event)) -> Option<FileNo> {
        if id.is_none() {
            return None;
        }
        if let Some(&no) = self.files.get(&id) {
            return Some(no);
        }
        if self.files.len() >= FILES_MAX {
            return None;
        }
        let no = FileNo(self.files.len() as u32);
        self.files.insert(id, no);
        tell(Event::File(File {
            no,
            device: id.dev,
            inode: id.ino,
            magic: 0,
            path: format!(
                "inode {} of device {}:{}",
                id.ino,
                id.dev >> 20,
                id.dev & 0xf_ffff
            ),
        }));
        Some(no)
    }

    fn named(&mut self, record: &raw::File, tell: &mut impl FnMut(Event)) {
        let parts = (record.parts as usize).min(raw::PATH_PARTS);
        let mut path = String::new();
        if parts == raw::PATH_PARTS {
            path.push_str("/…");
        }
        for part in record.part[..parts].iter().rev() {
            path.push('/');
            path.push_str(&raw::text(part));
        }
        if parts == 0 {
            // The root itself, or a file without a name: memfd, shared memory.
            path = format!("inode {}", record.file.ino);
        } else if record.header.pid != 0 {
            let known = self.mounts.path(record.file.dev, &path);
            path = if known == path {
                // Mounted since, or in another mount namespace.
                self.mounts = Mounts::of(Some(record.header.pid));
                self.mounts.path(record.file.dev, &path)
            } else {
                known
            };
        }
        if self.files.len() >= FILES_MAX && !self.files.contains_key(&record.file) {
            return;
        }
        let next = FileNo(self.files.len() as u32);
        let no = *self.files.entry(record.file).or_insert(next);
        tell(Event::File(File {
            no,
            device: record.file.dev,
            inode: record.file.ino,
            magic: record.magic,
            path,
        }));
    }

    fn stack(
        &mut self,
        id: i32,
        stack_of: &impl Fn(u32) -> Vec<u64>,
        tell: &mut impl FnMut(Event),
    ) -> Option<(StackNo, bool)> {
        let id = u32::try_from(id).ok()?;
        if let Some(&known) = self.stacks.get(&id) {
            return Some(known);
        }
        let addresses = stack_of(id);
        let functions: Vec<String> = addresses
            .iter()
            .map(|&a| self.symbols.function(a))
            .collect();
        let no = StackNo(self.stacks.len() as u32);
        let known = (no, names::waits_for_vma(&functions));
        self.stacks.insert(id, known);
        tell(Event::Stack(Stack { no, functions }));
        Some(known)
    }

    fn doing(doing: u8, syscall: u16) -> Doing {
        match doing {
            1 => Doing::Fault,
            2 => Doing::Call(syscall),
            3 => Doing::CallFault(syscall),
            4 => Doing::KernelThread,
            _ => Doing::Unknown,
        }
    }

    /// The thread that ended a wait for a VMA. (A signal may have ended it, which a killer sent.)
    fn keeper(r: &raw::Waker) -> Option<Box<Keeper>> {
        let doing = Self::doing(r.doing, r.syscall);
        let kills = matches!(doing, Doing::Call(no) if names::KILLING.contains(&no));
        (r.tid != 0 && !kills).then(|| {
            Box::new(Keeper {
                tid: r.tid,
                pid: r.pid,
                name: raw::text(&r.comm),
                doing,
                reads: Self::reads(&r.parent, &r.name),
            })
        })
    }

    /// The file of `/proc` that a system call reads, if it reads one.
    fn reads(parent: &[u8], name: &[u8]) -> String {
        if name[0] == 0 {
            return String::new();
        }
        let (parent, name) = (raw::text(parent), raw::text(name));
        match parent.as_str() {
            "" | "/" => name,
            parent => format!("{parent}/{name}"),
        }
    }

    /// Tells what a record says.
    pub(crate) fn translate(
        &mut self,
        record: &Raw,
        stack_of: &impl Fn(u32) -> Vec<u64>,
        tell: &mut impl FnMut(Event),
    ) {
        match record {
            Raw::File(r) => self.named(r, tell),
            Raw::Task(r) => {
                let at = self.at(r.at);
                let (tid, pid) = (r.header.tid, r.header.pid);
                let change = match r.what {
                    raw::task::FORK => Some(ProcessChange::Forked { parent: r.parent }),
                    raw::task::EXEC => Some(ProcessChange::Executed),
                    raw::task::EXIT => Some(ProcessChange::ThreadExited { tid }),
                    _ => None,
                };
                if matches!(r.what, raw::task::SEEN | raw::task::EXEC | raw::task::FORK) {
                    let name = raw::text(&r.comm);
                    tell(Event::Thread(Thread { at, tid, pid, name }));
                }
                if let Some(change) = change {
                    tell(Event::Process(Process { at, pid, change }));
                }
            }
            Raw::Fault(r) => {
                let file = self.file(r.file, tell);
                let stack = self.stack(r.stack, stack_of, tell).map(|s| s.0);
                let has = |flag| r.flags & flag != 0;
                tell(Event::Fault(Fault {
                    at: self.at(r.at),
                    took: r.took,
                    tid: r.header.tid,
                    pid: r.header.pid,
                    address: r.address,
                    ip: r.ip,
                    file,
                    page: r.page,
                    major: has(raw::fault::MAJOR),
                    gone: has(raw::fault::GONE),
                    locked: has(raw::fault::LOCKED),
                    write: has(raw::fault::WRITE),
                    kernel: has(raw::fault::KERNEL),
                    open: has(raw::fault::OPEN),
                    first: r.first,
                    wait: r.wait,
                    retry: r.retry,
                    retry_asleep: r.retry_asleep,
                    causes: r.causes,
                    stack,
                }));
            }
            Raw::Wait(r) => {
                let file = self.file(r.file, tell);
                let has = |flag| r.flags & flag != 0;
                tell(Event::Wait(Wait {
                    at: self.at(r.at),
                    took: r.until.saturating_sub(r.at.max(self.began)),
                    lock: self.lock(r.mm),
                    target: r.header.target,
                    tid: r.header.tid,
                    pid: r.header.pid,
                    write: has(raw::lock::WRITE),
                    failed: has(raw::lock::FAILED),
                    open: has(raw::lock::OPEN),
                    doing: Self::doing(r.header.doing, r.header.syscall),
                    address: r.address,
                    length: r.length,
                    file,
                    page: r.page,
                    owner: (r.owner != 0).then_some(r.owner),
                    cpu: r.cpu,
                    granted: r.granted,
                }));
            }
            Raw::Hold(r) => {
                let file = self.file(r.file, tell);
                let stack = self.stack(r.stack, stack_of, tell);
                let kept_by = match stack {
                    Some((_, true)) => Self::keeper(&r.waker),
                    _ => None,
                };
                let has = |flag| r.flags & flag != 0;
                tell(Event::Hold(Hold {
                    at: self.at(r.at),
                    took: r.until.saturating_sub(r.at.max(self.began)),
                    lock: self.lock(r.mm),
                    target: r.header.target,
                    tid: r.header.tid,
                    pid: r.header.pid,
                    write: has(raw::lock::WRITE),
                    downgraded: has(raw::lock::DOWNGRADED),
                    contended: has(raw::lock::CONTENDED),
                    open: has(raw::lock::OPEN),
                    doing: Self::doing(r.header.doing, r.header.syscall),
                    address: r.address,
                    length: r.length,
                    file,
                    page: r.page,
                    causes: r.causes,
                    longest_sleep: r.longest,
                    stack: stack.map(|s| s.0),
                    reads: Self::reads(&r.parent, &r.name),
                    kept_by,
                }));
            }
            Raw::Stray(r) => tell(Event::Stray(Stray {
                at: self.at(r.at),
                lock: self.lock(r.mm),
                target: r.header.target,
                tid: r.header.tid,
                pid: r.header.pid,
                write: r.flags & raw::lock::WRITE != 0,
                release: r.what == raw::STRAY_RELEASE,
            })),
            Raw::Io(r) => {
                if let Some(file) = self.file(r.file, tell) {
                    tell(Event::Io(Io {
                        at: self.at(r.at),
                        took: r.until.saturating_sub(r.at.max(self.began)),
                        file,
                        page: r.page,
                        bytes: r.bytes,
                        fuse: r.flags & raw::IO_FUSE != 0,
                    }));
                }
            }
        }
    }
}
