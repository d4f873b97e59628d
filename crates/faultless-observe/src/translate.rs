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

    /// The thread that ended a sleep, if it is known, and the sleep was a wait for a VMA.
    fn keeper(r: &raw::Waker, waited_for_vma: bool) -> Option<Box<Keeper>> {
        (r.tid != 0 && waited_for_vma).then(|| {
            Box::new(Keeper {
                tid: r.tid,
                pid: r.pid,
                name: raw::text(&r.comm),
                doing: Self::doing(r.doing, r.syscall),
                reads: Self::reads(&r.parent, &r.name),
            })
        })
    }

    /// The first arguments of a system call, where they are the watched process's own. (Those of a neighbour say nothing of it.)
    fn arguments(header: &raw::Header, address: u64, length: u64) -> (u64, u64) {
        match header.pid == header.target {
            true => (address, length),
            false => (0, 0),
        }
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
                let (address, length) = Self::arguments(&r.header, r.address, r.length);
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
                    address,
                    length,
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
                let kept_by = Self::keeper(&r.waker, stack.is_some_and(|s| s.1));
                let (address, length) = Self::arguments(&r.header, r.address, r.length);
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
                    address,
                    length,
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

#[cfg(test)]
mod tests {
    use super::*;
    use zerocopy::FromZeros;

    #[test]
    fn a_keeper_is_told_of_a_wait_for_a_vma_alone() {
        let mut waker = raw::Waker::new_zeroed();
        assert_eq!(Translator::keeper(&waker, true), None, "not known");
        (waker.tid, waker.pid, waker.doing) = (17, 16, 2);
        waker.comm[..5].copy_from_slice(b"agent");
        waker.name[..5].copy_from_slice(b"smaps");
        waker.parent[..3].copy_from_slice(b"812");
        assert_eq!(Translator::keeper(&waker, false), None);
        let keeper = Translator::keeper(&waker, true).expect("known");
        assert_eq!((keeper.tid, keeper.pid), (17, 16));
        assert_eq!((&keeper.name[..], keeper.doing), ("agent", Doing::Call(0)));
        assert_eq!(keeper.reads, "812/smaps");
    }

    #[test]
    fn what_a_neighbour_s_system_call_was_given_is_not_told() {
        let mut header = raw::Header::new_zeroed();
        (header.pid, header.target) = (5, 5);
        assert_eq!(Translator::arguments(&header, 1, 2), (1, 2));
        header.pid = 6;
        assert_eq!(Translator::arguments(&header, 1, 2), (0, 0));
    }
}
