//! The events.
//!
//! Times (`at`) are nanoseconds since the trace began; durations are nanoseconds. A thing that takes time is told when it
//! ends, so events are nearly, not strictly, in the order of their ends.

use serde::{Deserialize, Serialize};

/// Nanoseconds: since the trace began for a time, or as a duration.
pub type Nanos = u64;

/// A file of the trace; [`File`] events name them before they are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileNo(pub u32);

/// A kernel stack of the trace; [`Stack`] events give them before they are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct StackNo(pub u32);

/// An mmap_lock. There is one for each address space; it stays the same until an execve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LockId(pub u64);

/// Why a thread got no further, other than for mmap_lock. Indexes the `causes` of faults and holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[repr(usize)]
pub enum Cause {
    /// A read from storage that this thread started.
    Device,
    /// A page that another thread has locked, most often because it is reading it.
    Page,
    /// A sleeping lock other than mmap_lock.
    Lock,
    /// Direct reclaim of memory, running and asleep.
    Reclaim,
    /// The thread could run, and no processor was free.
    Cpu,
    /// Asleep for a reason that the stack tells.
    Other,
}

/// How many causes there are.
pub const CAUSES: usize = 6;

impl Cause {
    /// All of them, in the order of `causes`.
    pub const ALL: [Cause; CAUSES] = [
        Cause::Device,
        Cause::Page,
        Cause::Lock,
        Cause::Reclaim,
        Cause::Cpu,
        Cause::Other,
    ];
}

/// What a thread was doing in the kernel when it took, or waited for, the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Doing {
    /// Nothing that the observer can tell.
    Unknown,
    /// A page fault of user code.
    Fault,
    /// A system call, by its number on this architecture.
    Call(u16),
    /// A system call that touched user memory which was not there.
    CallFault(u16),
    /// The work of a kernel thread.
    KernelThread,
}

/// A thread got its name, or another one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Thread {
    /// When it was learned.
    pub at: Nanos,
    /// Its number.
    pub tid: u32,
    /// Its process.
    pub pid: u32,
    /// At most 15 bytes, as in `/proc/PID/comm`.
    pub name: String,
}

/// What became of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ProcessChange {
    /// It is watched from now on, because it was asked for.
    Watched,
    /// A watched process forked it, and it is watched as well.
    Forked {
        /// The one that did.
        parent: u32,
    },
    /// It executed another program.
    Executed,
    /// One of its threads ended.
    ThreadExited {
        /// Which.
        tid: u32,
    },
}

/// Something became of a watched process.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Process {
    /// When.
    pub at: Nanos,
    /// Which.
    pub pid: u32,
    /// What.
    pub change: ProcessChange,
}

/// A file's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct File {
    /// How events call it.
    pub no: FileNo,
    /// Its file system's device: major << 20 | minor.
    pub device: u32,
    /// Its inode.
    pub inode: u64,
    /// Its file system's type, as in statfs(2).
    pub magic: u32,
    /// Its path; from the file system's root, where that could not be completed.
    pub path: String,
}

/// A kernel stack, innermost function first.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Stack {
    /// How events call it.
    pub no: StackNo,
    /// Function names.
    pub functions: Vec<String>,
}

/// A page fault that slept or took mmap_lock. (Others are nobody's stall, and are not told.)
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fault {
    /// When the page was touched.
    pub at: Nanos,
    /// How long the whole fault took.
    pub took: Nanos,
    /// Who touched it.
    pub tid: u32,
    /// Whose address space it is.
    pub pid: u32,
    /// The address.
    pub address: u64,
    /// The instruction.
    pub ip: u64,
    /// The file that is mapped there, where the page cache was asked for it.
    pub file: Option<FileNo>,
    /// Which page of the file, in units of the system's page size.
    pub page: u64,
    /// The kernel counted it as major: something had to be read.
    pub major: bool,
    /// The page had gone when the fault was tried again, and was read a second time under mmap_lock.
    pub gone: bool,
    /// It took mmap_lock.
    pub locked: bool,
    /// The page was to be written.
    pub write: bool,
    /// The kernel touched it, for a system call.
    pub kernel: bool,
    /// It had not ended when the trace did; `took` is what had passed.
    pub open: bool,
    /// The attempt before mmap_lock was asked for, with its sleeps. All of the fault, if it never was.
    pub first: Nanos,
    /// The wait for mmap_lock.
    pub wait: Nanos,
    /// What was done under mmap_lock.
    pub retry: Nanos,
    /// Of that, asleep.
    pub retry_asleep: Nanos,
    /// Where the first attempt and the retry got no further, by [`Cause`].
    pub causes: [Nanos; CAUSES],
    /// The stack of its last sleep of [`Cause::Other`].
    pub stack: Option<StackNo>,
}

/// A wait for an mmap_lock.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Wait {
    /// When it began.
    pub at: Nanos,
    /// How long it took.
    pub took: Nanos,
    /// The lock.
    pub lock: LockId,
    /// The process whose lock it is.
    pub target: u32,
    /// Who waited.
    pub tid: u32,
    /// The waiter's process.
    pub pid: u32,
    /// For writing (exclusively).
    pub write: bool,
    /// It ended without the lock: a signal came, or it was a mere try.
    pub failed: bool,
    /// It had not ended when the trace did; `took` is what had passed.
    pub open: bool,
    /// What for.
    pub doing: Doing,
    /// The fault's address, or the system call's first argument.
    pub address: u64,
    /// The system call's second argument: a length, for most calls that concern memory.
    pub length: u64,
    /// The page that the fault is about.
    pub file: Option<FileNo>,
    /// Which page of the file.
    pub page: u64,
    /// The thread that the lock word named as its writer when the wait began.
    pub owner: Option<u32>,
    /// Of the wait: able to run, and no processor was free.
    pub cpu: Nanos,
    /// The last of that: the lock was the waiter's already, or free for it, and it could not run to take it.
    pub granted: Nanos,
}

/// A hold of an mmap_lock that was long, or that others waited for.
///
/// A hold for writing that is downgraded is told in two parts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Hold {
    /// When the lock was had.
    pub at: Nanos,
    /// Until it was let go (or downgraded).
    pub took: Nanos,
    /// The lock.
    pub lock: LockId,
    /// The process whose lock it is.
    pub target: u32,
    /// Who held it.
    pub tid: u32,
    /// The holder's process.
    pub pid: u32,
    /// For writing (exclusively).
    pub write: bool,
    /// This is the part after a downgrade.
    pub downgraded: bool,
    /// Somebody was queued when it ended.
    pub contended: bool,
    /// It had not ended when the trace did; `took` is what had passed.
    pub open: bool,
    /// What for.
    pub doing: Doing,
    /// The fault's address, or the system call's first argument.
    pub address: u64,
    /// The system call's second argument.
    pub length: u64,
    /// The page that it slept for.
    pub file: Option<FileNo>,
    /// Which page of the file.
    pub page: u64,
    /// Where it got no further, by [`Cause`]; the rest of `took` it ran.
    pub causes: [Nanos; CAUSES],
    /// Its longest sleep.
    pub longest_sleep: Nanos,
    /// The stack of that.
    pub stack: Option<StackNo>,
    /// What its system call reads, if it reads: `4711/smaps`.
    pub reads: String,
    /// If its longest sleep was a wait for the lock of a VMA, which it wanted to change: the last thread that had to let go of that lock.
    pub kept_by: Option<Box<Keeper>>,
}

/// A thread that used a VMA under the VMA's own lock. It need not have mmap_lock.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Keeper {
    /// Its number.
    pub tid: u32,
    /// Its process.
    pub pid: u32,
    /// Its name then: at most 15 bytes, as in `/proc/PID/comm`.
    pub name: String,
    /// What it was doing.
    pub doing: Doing,
    /// What its system call reads, if it reads: `4711/smaps`.
    pub reads: String,
}

/// A read from storage into the page cache.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Io {
    /// When the request was made.
    pub at: Nanos,
    /// Until the device (or the FUSE server) answered.
    pub took: Nanos,
    /// The file.
    pub file: FileNo,
    /// The first page.
    pub page: u64,
    /// How much; 0 where it is not known.
    pub bytes: u32,
    /// A FUSE server was asked, not a block device.
    pub fuse: bool,
}

/// A release without an acquisition, or the reverse: the observer came in the middle, or was out of step.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Stray {
    /// When.
    pub at: Nanos,
    /// The lock.
    pub lock: LockId,
    /// The process whose lock it is.
    pub target: u32,
    /// Who.
    pub tid: u32,
    /// Whose thread that is.
    pub pid: u32,
    /// For writing.
    pub write: bool,
    /// It was a release.
    pub release: bool,
}

/// Records that did not reach the observer.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Lost {
    /// When it was noticed.
    pub at: Nanos,
    /// How many.
    pub records: u64,
}

/// The observation ended, and was not cut off.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Ended {
    /// When.
    pub at: Nanos,
}

/// One thing that happened. (A variant that is added makes another [`VERSION`](crate::VERSION).)
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Event {
    /// A thread's name.
    Thread(Thread),
    /// A change of a process.
    Process(Process),
    /// A file's name.
    File(File),
    /// A kernel stack.
    Stack(Stack),
    /// A page fault.
    Fault(Fault),
    /// A wait for mmap_lock.
    Wait(Wait),
    /// A hold of it.
    Hold(Hold),
    /// A read from storage.
    Io(Io),
    /// Something out of step.
    Stray(Stray),
    /// Records that were lost.
    Lost(Lost),
    /// The end.
    Ended(Ended),
}

impl Event {
    /// When it happened, or began.
    pub fn at(&self) -> Option<Nanos> {
        match self {
            Event::Thread(e) => Some(e.at),
            Event::Process(e) => Some(e.at),
            Event::File(_) | Event::Stack(_) => None,
            Event::Fault(e) => Some(e.at),
            Event::Wait(e) => Some(e.at),
            Event::Hold(e) => Some(e.at),
            Event::Io(e) => Some(e.at),
            Event::Stray(e) => Some(e.at),
            Event::Lost(e) => Some(e.at),
            Event::Ended(e) => Some(e.at),
        }
    }

    pub(crate) fn at_mut(&mut self) -> Option<&mut Nanos> {
        match self {
            Event::Thread(e) => Some(&mut e.at),
            Event::Process(e) => Some(&mut e.at),
            Event::File(_) | Event::Stack(_) => None,
            Event::Fault(e) => Some(&mut e.at),
            Event::Wait(e) => Some(&mut e.at),
            Event::Hold(e) => Some(&mut e.at),
            Event::Io(e) => Some(&mut e.at),
            Event::Stray(e) => Some(&mut e.at),
            Event::Lost(e) => Some(&mut e.at),
            Event::Ended(e) => Some(&mut e.at),
        }
    }

    /// Whether its times can be: a trace of more than a few years has been tampered with.
    pub(crate) fn is_possible(&self) -> bool {
        const LONGEST: Nanos = 1 << 56;
        const READS_MAX: usize = 256;
        let short = |all: &[Nanos]| all.iter().all(|&t| t < LONGEST);
        self.at().is_none_or(|at| at < LONGEST)
            && match self {
                Event::Fault(e) => {
                    short(&[e.took, e.first, e.wait, e.retry, e.retry_asleep]) && short(&e.causes)
                }
                Event::Wait(e) => short(&[e.took, e.cpu, e.granted]),
                Event::Hold(e) => {
                    short(&[e.took, e.longest_sleep])
                        && short(&e.causes)
                        && e.reads.len() <= READS_MAX
                        && e.kept_by
                            .as_ref()
                            .is_none_or(|w| w.name.len() <= READS_MAX && w.reads.len() <= READS_MAX)
                }
                Event::Lost(e) => e.records < 1 << 48,
                Event::Io(e) => short(&[e.took]),
                Event::Stack(e) => e.functions.len() <= 1024,
                _ => true,
            }
    }

    /// The file that it speaks of.
    pub(crate) fn file(&self) -> Option<FileNo> {
        match self {
            Event::Fault(e) => e.file,
            Event::Wait(e) => e.file,
            Event::Hold(e) => e.file,
            Event::Io(e) => Some(e.file),
            _ => None,
        }
    }

    /// The stack that it speaks of.
    pub(crate) fn stack(&self) -> Option<StackNo> {
        match self {
            Event::Fault(e) => e.stack,
            Event::Hold(e) => e.stack,
            _ => None,
        }
    }
}
