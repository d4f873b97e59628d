//! What is known of the watched processes: events go in, answers come out.
//!
//! Each wait for an mmap_lock is laid over the lock's [`Timeline`], which says who stood at its head and for how long; so
//! every microsecond of a wait is somebody's: a holder's, or the hand-over's (nobody held the lock: the next one was being
//! woken). Waits that had the same hold to thank for the most of their time are a *convoy*.
//!
//! Memory is bounded whatever happens: by so many holds for each lock, so many convoys, bins and threads.

use crate::names;
use crate::sums::{FaultSums, PARTS, Part, Parts};
use crate::timeline::{HoldNo, SEGMENTS_MAX, Segment, Timeline};
use faultless_trace::{
    CAUSES, Cause, Doing, Event, Fault, FileNo, Hold, LockId, Nanos, ProcessChange, StackNo, Wait,
};
use std::collections::{BTreeMap, HashMap, VecDeque};

/// A wait belongs to the convoy of the hold that this part of it (one in so many) was due to; a wait behind many short
/// holds belongs to none.
const HEAD_SHARE: Nanos = 4;
/// Waits that are at least this long make a convoy.
pub(crate) const CONVOY_MIN: Nanos = 1_000_000;
/// read, pread64, readv, sendfile, preadv, preadv2.
const READING: [u16; 6] = [0, 17, 19, 40, 295, 327];
/// A lock that waits for its next owner to get a processor is that one's, when it waits at least so long.
const GRANTED_MIN: Nanos = 20_000;
/// The lock word is read so long after the beginning of a wait, at most.
const OWNER_NEAR: Nanos = 5_000;
/// Victims of a convoy that are told one by one; all are counted.
const VICTIMS_MAX: usize = 32;
/// Convoys that may still grow.
const GROWING_MAX: usize = 256;
/// A convoy has ended when its hold has ended for this long.
const CONVOY_ENDS_AFTER: Nanos = 2_000_000_000;
/// How often convoys that have ended are looked for.
const SWEEP_EVERY: Nanos = 100_000_000;
/// The worst convoys of the whole time that are kept.
const WORST_MAX: usize = 128;
/// Waits of writers that are remembered, to say who was queued.
const QUEUED_MAX: usize = 1024;
/// Lanes of threads with bins over time; those that come later have sums alone.
const LANES_MAX: usize = 512;
/// Locks that are followed; those that nothing was heard of for the longest time are forgotten.
const LOCKS_MAX: usize = 64;
/// Holds and segments that are kept of all locks together, and at least of each.
const HOLDS_MAX: usize = SEGMENTS_MAX;
const HOLDS_MIN: usize = 512;
/// Sums of faults, by thread and file; when there are more, those of threads that have ended are put together.
const SUMS_MAX: usize = 8192;
/// So many threads must have ended, before it is worth while to put them together.
const FORGET_AT_LEAST: usize = 1024;
/// Rows of the table of blame; what comes later counts as "(others)".
const BLAMES_MAX: usize = 4096;
/// Reasons for sleeps that are told of each row of that table.
const REASONS_MAX: usize = 64;
/// Processes that are told by name.
const PROCESSES_MAX: usize = 256;
/// When there are more bins, two become one.
const BINS_MAX: usize = 512;
/// Names of threads and stacks that are remembered.
const NAMES_MAX: usize = 1 << 16;

/// What a holder did, for the table of blame.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum What {
    Fault {
        kernel: bool,
    },
    Call(u16),
    /// Read a file of `/proc`: which, without the process's number.
    ProcFile(String),
    KernelThread,
    Unknown,
}

impl What {
    fn of(doing: Doing, reads: &str) -> What {
        match doing {
            Doing::Fault => What::Fault { kernel: false },
            Doing::CallFault(_) => What::Fault { kernel: true },
            Doing::Call(_) if !reads.is_empty() => {
                let name = reads.rsplit('/').next().unwrap_or(reads);
                What::ProcFile(name.to_owned())
            }
            Doing::Call(no) => What::Call(no),
            Doing::KernelThread => What::KernelThread,
            Doing::Unknown => What::Unknown,
        }
    }
}

impl std::fmt::Display for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            What::Fault { kernel: false } => f.write_str("page fault"),
            What::Fault { kernel: true } => f.write_str("page fault in a system call"),
            What::Call(no) => f.write_str(&names::call(*no)),
            What::ProcFile(name) => write!(f, "read of /proc/PID/{name}"),
            What::KernelThread => f.write_str("kernel thread"),
            What::Unknown => f.write_str("unknown (before the observation)"),
        }
    }
}

/// Who, in the table of blame: threads of one process whose names differ in digits alone are one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Doer {
    /// The watched process; neighbours go by name.
    pub(crate) target: Option<u32>,
    pub(crate) group: String,
    pub(crate) what: What,
}

/// What somebody's holds did to others.
#[derive(Debug, Clone, Default)]
pub(crate) struct Blame {
    /// A process of them.
    pub(crate) pid: u32,
    pub(crate) holds: u64,
    pub(crate) held: Nanos,
    pub(crate) longest: Nanos,
    /// Where the holders got no further, themselves.
    pub(crate) causes: [Nanos; CAUSES],
    /// Time in which they had been given the lock, and had no processor to take it.
    pub(crate) granted: Nanos,
    /// Time that faults waited.
    pub(crate) of_faults: Nanos,
    /// Time that system calls (and whatever else) waited.
    pub(crate) of_calls: Nanos,
    pub(crate) waits: u64,
    /// Time asleep by what the stack of the longest sleep says.
    pub(crate) sleeps: BTreeMap<String, Nanos>,
    /// Of that, waits for VMAs: by the name of the thread that ended them, and by what it did with the VMA. (It needs no mmap_lock.)
    pub(crate) kept_by: BTreeMap<(String, What), Nanos>,
}

/// A wait in a convoy.
#[derive(Debug, Clone)]
pub(crate) struct Victim {
    pub(crate) wait: Wait,
    /// Of the fault that waited.
    pub(crate) fault: Option<Fault>,
}

/// Several that waited for the same hold.
#[derive(Debug, Clone)]
pub(crate) struct Convoy {
    pub(crate) no: u64,
    pub(crate) hold: Hold,
    /// The writer that was queued while readers held the lock.
    pub(crate) writer: Option<Queued>,
    pub(crate) victims: Vec<Victim>,
    pub(crate) waits: u64,
    /// What all its waits took, together.
    pub(crate) total: Nanos,
    pub(crate) from: Nanos,
    pub(crate) to: Nanos,
    head: HoldNo,
}

/// A writer that waited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Queued {
    pub(crate) from: Nanos,
    pub(crate) to: Nanos,
    pub(crate) tid: u32,
    pub(crate) pid: u32,
    pub(crate) doing: Doing,
    pub(crate) address: u64,
    pub(crate) length: u64,
}

#[derive(Debug, Default)]
struct Lock {
    timeline: Timeline,
    holds: VecDeque<(Hold, usize)>,
    /// The number of the first of `holds`.
    first: HoldNo,
    queued: VecDeque<Queued>,
    growing: VecDeque<Convoy>,
    /// Threads that have been seen to take it.
    seen: std::collections::HashSet<u32>,
    /// When something was last heard of it.
    heard: Nanos,
}

impl Lock {
    fn hold(&self, no: HoldNo) -> Option<&(Hold, usize)> {
        self.holds
            .get(usize::try_from(no.checked_sub(self.first)?).ok()?)
    }
}

/// A thread's time, in bins.
#[derive(Debug, Clone)]
pub(crate) struct Lane {
    pub(crate) tid: u32,
    pub(crate) pid: u32,
    pub(crate) bins: Vec<[f32; PARTS]>,
    pub(crate) parts: Parts,
}

/// What could not be told, or did not fit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Doubts {
    pub(crate) lost: u64,
    /// Releases and acquisitions without their counterpart.
    pub(crate) strays: u64,
    /// Waits at whose beginning the lock word named another writer than the one found here.
    pub(crate) out_of_step: u64,
    /// Waits at whose beginning the lock word named a writer.
    pub(crate) checked: u64,
    /// Time of waits for which no holder was seen, and that were longer than a hand-over takes.
    pub(crate) unexplained: Nanos,
    /// Time of all waits that were told singly.
    pub(crate) waited: Nanos,
}

/// Everything that is known.
#[derive(Debug, Default)]
pub(crate) struct Model {
    locks: HashMap<LockId, Lock>,
    threads: HashMap<u32, (u32, String)>,
    files: HashMap<FileNo, String>,
    /// What a thread read last under a lock.
    reads: HashMap<u32, String>,
    stacks: HashMap<StackNo, Vec<String>>,
    /// Watched processes that have not ended, and since when.
    pub(crate) targets: BTreeMap<u32, Nanos>,
    /// All that were watched, as far as there is room; and how many there were.
    pub(crate) processes: Vec<u32>,
    pub(crate) processes_seen: u64,
    /// Threads that have ended.
    ended: std::collections::HashSet<u32>,
    /// Of these, those that were kept when they were last put together.
    ended_kept: usize,
    next_sweep: Nanos,
    doers: HashMap<Doer, usize>,
    /// The same, by thread and what it does; forgotten when a thread gets another name.
    doers_of: HashMap<u32, Vec<(Doing, usize)>>,
    pub(crate) blames: Vec<(Doer, Blame)>,
    /// The convoy that a fault's wait went to; the fault itself is told later.
    joined: HashMap<u32, (LockId, HoldNo)>,
    worst: Vec<Convoy>,
    /// Convoys of the last seconds, for the live view.
    recent: VecDeque<Convoy>,
    pub(crate) convoys: u64,
    pub(crate) convoy_time: Nanos,
    /// By thread and file.
    pub(crate) faults: BTreeMap<(u32, u32, Option<FileNo>), FaultSums>,
    lanes: BTreeMap<u32, Lane>,
    pub(crate) bin: Nanos,
    /// Waits of faults, by part, and of whatever else.
    pub(crate) fault_waits: Parts,
    pub(crate) call_waits: Parts,
    pub(crate) calls: u64,
    /// Waits of others: neighbours and kernel threads.
    pub(crate) neighbour_waits: Nanos,
    /// Faults that had not ended.
    pub(crate) open_faults: u64,
    /// A trace that was cut off.
    pub(crate) cut_off: bool,
    /// Waits of system calls, and their time, by process and thread.
    pub(crate) calls_of: HashMap<(u32, u32), (u64, Nanos)>,
    pub(crate) doubts: Doubts,
    pub(crate) now: Nanos,
    pub(crate) io: IoSums,
    /// Faults are summed up from events, not given as sums.
    faults_from_events: bool,
}

/// Reads from storage.
#[derive(Debug, Clone, Default)]
pub(crate) struct IoSums {
    pub(crate) requests: u64,
    pub(crate) bytes: u64,
    pub(crate) took: Nanos,
    pub(crate) longest: Nanos,
}

impl Model {
    /// For a live process: faults are given as sums.
    pub(crate) fn new(bin: Nanos) -> Model {
        Model {
            bin,
            // Whoever had no room for a row of its own.
            threads: HashMap::from([(0, (0, "(others)".to_owned()))]),
            ..Model::default()
        }
    }

    /// For a trace: faults are all told as events.
    pub(crate) fn of_trace(bin: Nanos) -> Model {
        Model {
            faults_from_events: true,
            ..Model::new(bin)
        }
    }

    pub(crate) fn event(&mut self, event: &Event) {
        if let Some(at) = event.at() {
            self.now = self.now.max(at);
        }
        match event {
            Event::Thread(e) => {
                self.ended.remove(&e.tid);
                self.doers_of.remove(&e.tid);
                if self.threads.len() >= NAMES_MAX && !self.threads.contains_key(&e.tid) {
                    self.forget_the_ended();
                    if self.threads.len() >= NAMES_MAX {
                        return;
                    }
                }
                self.threads.insert(e.tid, (e.pid, printable(&e.name)));
            }
            Event::Process(e) => match e.change {
                ProcessChange::Watched | ProcessChange::Forked { .. } => {
                    self.targets.insert(e.pid, e.at);
                    self.processes_seen += 1;
                    if self.processes.len() < PROCESSES_MAX && !self.processes.contains(&e.pid) {
                        self.processes.push(e.pid);
                    }
                }
                ProcessChange::ThreadExited { tid } => {
                    if self.ended.len() >= NAMES_MAX {
                        self.forget_the_ended();
                    }
                    self.ended.insert(tid);
                }
                ProcessChange::Executed => {}
            },
            Event::File(e) => {
                self.files.insert(e.no, printable(&e.path));
            }
            Event::Stack(e) if self.stacks.len() < NAMES_MAX => {
                let functions = e.functions.iter().map(|f| printable(f)).collect();
                self.stacks.insert(e.no, functions);
            }
            Event::Fault(e) => self.fault(e),
            Event::Wait(e) => self.wait(e),
            Event::Hold(e) => self.hold(e.clone()),
            Event::Io(e) => {
                self.io.requests += 1;
                self.io.bytes += u64::from(e.bytes);
                self.io.took += e.took;
                self.io.longest = self.io.longest.max(e.took);
            }
            Event::Stray(e) => {
                self.doubts.strays += 1;
                let lock = self.locks.get(&e.lock);
                let known = lock.is_some_and(|lock| lock.seen.contains(&e.tid));
                // It held the lock when the observation began, but not before a writer did.
                let since = self.targets.get(&e.target).copied().unwrap_or(e.at);
                let since = lock
                    .and_then(|lock| lock.timeline.last_writer())
                    .map_or(since, |to| to.max(since));
                if e.release && !known && self.doubts.lost == 0 && since < e.at {
                    self.hold(Hold {
                        at: since,
                        took: e.at - since,
                        lock: e.lock,
                        target: e.target,
                        tid: e.tid,
                        pid: e.pid,
                        write: e.write,
                        downgraded: false,
                        contended: true,
                        open: false,
                        doing: Doing::Unknown,
                        address: 0,
                        length: 0,
                        file: None,
                        page: 0,
                        causes: [0; CAUSES],
                        longest_sleep: 0,
                        stack: None,
                        reads: String::new(),
                        kept_by: None,
                    });
                }
            }
            Event::Lost(e) => self.doubts.lost = self.doubts.lost.saturating_add(e.records),
            _ => {}
        }
    }

    pub(crate) fn thread_name(&self, tid: u32) -> &str {
        self.threads.get(&tid).map_or("?", |(_, name)| name)
    }

    pub(crate) fn process_name(&self, pid: u32) -> &str {
        self.thread_name(pid)
    }

    pub(crate) fn file_name(&self, file: FileNo) -> &str {
        self.files.get(&file).map_or("?", String::as_str)
    }

    pub(crate) fn stack(&self, stack: StackNo) -> &[String] {
        self.stacks.get(&stack).map_or(&[], Vec::as_slice)
    }

    // ---- Locks ----

    fn doer(&mut self, hold: &Hold) -> usize {
        // Most holds are like the one before, of the same thread.
        let is_short = hold.reads.is_empty();
        let known = self.doers_of.get(&hold.tid).filter(|_| is_short);
        if let Some(&(_, no)) = known.and_then(|all| all.iter().find(|d| d.0 == hold.doing)) {
            return no;
        }
        let is_target = self.targets.contains_key(&hold.pid);
        let mut key = Doer {
            target: is_target.then_some(hold.pid),
            group: group(self.thread_name(hold.tid)),
            what: What::of(hold.doing, &hold.reads),
        };
        if self.blames.len() >= BLAMES_MAX && !self.doers.contains_key(&key) {
            (key.target, key.group) = (None, "(others)".to_owned());
        }
        let no = *self.doers.entry(key.clone()).or_insert_with(|| {
            self.blames.push((key, Blame::default()));
            self.blames.len() - 1
        });
        self.blames[no].1.pid = hold.pid;
        if is_short && (self.doers_of.len() < NAMES_MAX || self.doers_of.contains_key(&hold.tid)) {
            let all = self.doers_of.entry(hold.tid).or_default();
            if all.len() < 64 {
                all.push((hold.doing, no));
            }
        }
        no
    }

    fn hold(&mut self, mut hold: Hold) {
        if !hold.reads.is_empty() {
            hold.reads = printable(&hold.reads);
        }
        if hold.reads.is_empty() {
            self.reads.remove(&hold.tid);
        } else if self.reads.len() < NAMES_MAX {
            self.reads.insert(hold.tid, hold.reads.clone());
        }
        self.held(hold, false);
    }

    /// Takes in a hold, or the time in which a lock had been given to somebody who could not run.
    fn held(&mut self, hold: Hold, granted: bool) {
        let to = hold.at.saturating_add(hold.took);
        self.now = self.now.max(to);
        let doer = self.doer(&hold);
        let keeper = hold.kept_by.as_ref().map(|by| {
            let name = group(&printable(&by.name));
            (name, What::of(by.doing, &printable(&by.reads)))
        });
        let sleep = hold.stack.filter(|_| hold.longest_sleep > 0);
        let sleep = sleep.map(|stack| match &keeper {
            Some((name, what)) => kept(name, &keepers_deed(what)),
            None => asleep_in(self.stack(stack)),
        });
        let blame = &mut self.blames[doer].1;
        if granted {
            blame.granted += hold.took;
        } else {
            blame.holds += 1;
            blame.held += hold.took;
            blame.longest = blame.longest.max(hold.took);
            for (sum, &ns) in blame.causes.iter_mut().zip(&hold.causes) {
                *sum = sum.saturating_add(ns);
            }
        }
        if let Some(sleep) = sleep {
            let others = || "(others)".to_owned();
            add_bounded(&mut blame.sleeps, sleep, others, hold.longest_sleep);
        }
        if let Some(keeper) = keeper {
            let others = || ("(others)".to_owned(), What::Unknown);
            add_bounded(&mut blame.kept_by, keeper, others, hold.longest_sleep);
        }
        self.make_room_for(hold.lock);
        let most = (HOLDS_MAX / self.locks.len().max(1)).max(HOLDS_MIN);
        let lock = self.locks.entry(hold.lock).or_default();
        lock.heard = self.now;
        if lock.seen.len() < NAMES_MAX {
            lock.seen.insert(hold.tid);
        }
        while lock.holds.len() >= most {
            lock.holds.pop_front();
            lock.first += 1;
        }
        let segment = Segment {
            from: hold.at,
            to,
            hold: lock.first + lock.holds.len() as u64,
            tid: hold.tid,
            doer: doer as u32,
            write: hold.write,
        };
        if granted {
            lock.timeline.add_between(segment, most);
        } else {
            lock.timeline.add(segment, most);
        }
        lock.holds.push_back((hold, doer));
    }

    /// Forgets the lock that nothing was heard of for the longest time, if another one needs its place.
    fn make_room_for(&mut self, lock: LockId) {
        if self.locks.len() < LOCKS_MAX || self.locks.contains_key(&lock) {
            return;
        }
        let oldest = self.locks.iter().min_by_key(|(_, l)| l.heard).map(|l| *l.0);
        if let Some(mut gone) = oldest.and_then(|id| self.locks.remove(&id)) {
            for convoy in std::mem::take(&mut gone.growing) {
                self.put_away(convoy);
            }
        }
    }

    fn wait(&mut self, wait: &Wait) {
        let (from, to) = (wait.at, wait.at.saturating_add(wait.took));
        self.now = self.now.max(to);
        self.make_room_for(wait.lock);
        let is_ours = self.targets.contains_key(&wait.pid);
        let mut parts = [0; PARTS];
        let lock = self.locks.entry(wait.lock).or_default();
        lock.heard = self.now;
        if lock.seen.len() < NAMES_MAX {
            lock.seen.insert(wait.tid);
        }

        let queued = lock
            .queued
            .iter()
            .rev()
            .take_while(|q| q.to > from)
            .filter(|q| q.from < to && q.tid != wait.tid && !wait.write)
            .min_by_key(|q| q.from)
            .cloned();
        // Readers do not stop a reader. Those at the end were woken together with it, and the others stood between it and
        // the lock only because a writer was queued behind them.
        let mut shared = wait.write || (wait.failed && queued.is_some());
        let mut explained = 0;
        let mut head: Option<(HoldNo, Nanos)> = None;
        let is_fault = matches!(wait.doing, Doing::Fault | Doing::CallFault(_));
        let mut granted = None;
        let mut charged: Vec<(u32, Nanos)> = Vec::new();
        for segment in lock.timeline.between(from, to) {
            if segment.tid == wait.tid {
                continue;
            }
            shared |= segment.write;
            if !shared && queued.is_none() {
                continue;
            }
            if !shared && !segment.write && segment.to == to && !wait.open {
                continue;
            }
            let ns = segment.to - segment.from;
            explained += ns;
            let part = if segment.write {
                Part::Writer
            } else {
                Part::Reader
            };
            parts[part as usize] += ns;
            match charged.iter_mut().find(|c| c.0 == segment.doer) {
                Some(c) => c.1 += ns,
                None => charged.push((segment.doer, ns)),
            }
            if head.is_none_or(|h| ns > h.1) {
                head = Some((segment.hold, ns));
            }
        }
        // The lock word itself said who the writer was when the wait began. One that let go before this waiter was
        // queued is not told; any other must be the head here as well.
        if let Some(owner) = wait.owner {
            self.doubts.checked += 1;
            let near = (from + OWNER_NEAR).min(to);
            // (A downgrade is told just before the lock word changes, so the owner may count as a reader already.)
            let named = |s: Segment| s.tid == owner;
            let covers = |s: &Segment| s.from == from && s.to == near;
            // While a lock waits for the processor of its next owner, another one may take it, and let it go unseen.
            let seen = |s: &Segment| lock.hold(s.hold).is_some_and(|(h, _)| !is_granted(h));
            let right = lock.timeline.between(from, near).any(named)
                || match lock.timeline.between(from, near).filter(seen).last() {
                    Some(s) => !covers(&s),
                    // Nobody is known: then the hold was short, and another one follows soon.
                    None => lock
                        .timeline
                        .between(from, to)
                        .last()
                        .is_none_or(|s| s.from < from + CONVOY_MIN),
                };
            self.doubts.out_of_step += u64::from(!right);
        }
        let unexplained = wait.took.saturating_sub(explained);
        parts[Part::Cpu as usize] = unexplained.min(wait.cpu);
        parts[Part::HandOver as usize] = unexplained - parts[Part::Cpu as usize];
        if explained == 0 && parts[Part::HandOver as usize] > CONVOY_MIN {
            self.doubts.unexplained += parts[Part::HandOver as usize];
        }
        if is_ours {
            self.doubts.waited += wait.took;
        } else {
            self.neighbour_waits += wait.took;
        }

        if wait.write {
            lock.queued.push_back(Queued {
                from,
                to,
                tid: wait.tid,
                pid: wait.pid,
                doing: wait.doing,
                address: wait.address,
                length: wait.length,
            });
            if lock.queued.len() > QUEUED_MAX {
                lock.queued.pop_front();
            }
        }
        if wait.granted >= GRANTED_MIN && !wait.failed && !wait.open {
            granted = Some(Hold {
                at: to - wait.granted.min(wait.took),
                took: wait.granted.min(wait.took),
                lock: wait.lock,
                target: wait.target,
                tid: wait.tid,
                pid: wait.pid,
                write: wait.write,
                downgraded: false,
                contended: false,
                open: false,
                doing: wait.doing,
                address: wait.address,
                length: wait.length,
                file: wait.file,
                page: wait.page,
                causes: std::array::from_fn(|c| match c == Cause::Cpu as usize {
                    true => wait.granted.min(wait.took),
                    false => 0,
                }),
                longest_sleep: 0,
                stack: None,
                reads: String::new(),
                kept_by: None,
            });
        }
        let had = |h: &(HoldNo, Nanos)| {
            is_ours && wait.took >= CONVOY_MIN && h.1.saturating_mul(HEAD_SHARE) >= wait.took
        };
        if let Some((head, _)) = head.filter(had) {
            self.convoy_time += wait.took;
            self.convoys += u64::from(Self::join(lock, head, wait, queued, self.convoys + 1));
            if is_fault && (self.joined.len() < NAMES_MAX || self.joined.contains_key(&wait.tid)) {
                self.joined.insert(wait.tid, (wait.lock, head));
            }
        }
        if is_ours {
            for (doer, ns) in charged {
                let blame = &mut self.blames[doer as usize].1;
                blame.waits += 1;
                if is_fault {
                    blame.of_faults += ns;
                } else {
                    blame.of_calls += ns;
                }
            }
            if is_fault {
                add_parts(&mut self.fault_waits, &parts);
            } else {
                add_parts(&mut self.call_waits, &parts);
                self.calls += 1;
                let of = (wait.pid, wait.tid);
                if self.calls_of.len() < NAMES_MAX || self.calls_of.contains_key(&of) {
                    let calls = self.calls_of.entry(of).or_default();
                    calls.0 += 1;
                    calls.1 += wait.took;
                }
            }
            self.spread(wait.tid, wait.pid, from, to, &parts);
        }
        // It kept others out from the moment when it was woken, although it could not run; but a writer that was woken may
        // be overtaken.
        if let Some(mut granted) = granted {
            if matches!(wait.doing, Doing::Call(no) if READING.contains(&no)) {
                granted.reads = self.reads.get(&wait.tid).cloned().unwrap_or_default();
            }
            self.held(granted, true);
        }
        self.retire();
    }

    /// Adds a wait to the convoy of a hold; whether that is a new one.
    fn join(lock: &mut Lock, head: HoldNo, wait: &Wait, queued: Option<Queued>, no: u64) -> bool {
        let (from, to) = (wait.at, wait.at + wait.took);
        let found = lock.growing.iter().rposition(|c| c.head == head);
        let at = match found {
            Some(at) => at,
            None => {
                let Some((hold, _)) = lock.hold(head) else {
                    return false;
                };
                let convoy = Convoy {
                    no,
                    hold: hold.clone(),
                    writer: None,
                    victims: Vec::new(),
                    waits: 0,
                    total: 0,
                    from,
                    to,
                    head,
                };
                if lock.growing.len() >= 2 * GROWING_MAX {
                    lock.growing.pop_front();
                }
                lock.growing.push_back(convoy);
                lock.growing.len() - 1
            }
        };
        let convoy = &mut lock.growing[at];
        convoy.waits += 1;
        convoy.total += wait.took;
        convoy.from = convoy.from.min(from);
        convoy.to = convoy.to.max(to);
        if !convoy.hold.write && !wait.write {
            let held_until = convoy.hold.at + convoy.hold.took;
            let better = |q: &Queued| {
                q.from < held_until && convoy.writer.as_ref().is_none_or(|w| q.from < w.from)
            };
            if let Some(queued) = queued.filter(better) {
                convoy.writer = Some(queued);
            }
        }
        let victim = Victim {
            wait: wait.clone(),
            fault: None,
        };
        if convoy.victims.len() < VICTIMS_MAX {
            convoy.victims.push(victim);
        } else if let Some(least) = convoy
            .victims
            .iter_mut()
            .min_by_key(|v| v.wait.took)
            .filter(|v| v.wait.took < wait.took)
        {
            *least = victim;
        }
        found.is_none()
    }

    /// Now and then, puts convoys that have ended among the worst and the recent ones.
    fn retire(&mut self) {
        if self.now < self.next_sweep {
            return;
        }
        self.next_sweep = self.now + SWEEP_EVERY;
        let now = self.now;
        let mut over = Vec::new();
        for lock in self.locks.values_mut() {
            while let Some(first) = lock.growing.front() {
                let ended = first.hold.at.saturating_add(first.hold.took);
                if ended.saturating_add(CONVOY_ENDS_AFTER) >= now
                    && lock.growing.len() <= GROWING_MAX
                {
                    break;
                }
                over.extend(lock.growing.pop_front());
            }
        }
        for convoy in over {
            self.put_away(convoy);
        }
    }

    fn put_away(&mut self, convoy: Convoy) {
        self.recent.push_back(convoy.clone());
        if self.recent.len() > GROWING_MAX {
            self.recent.pop_front();
        }
        self.worst.push(convoy);
        if self.worst.len() > 2 * WORST_MAX {
            self.worst.sort_by_key(|c| std::cmp::Reverse(c.total));
            self.worst.truncate(WORST_MAX);
        }
    }

    /// The convoys that took the most time of their victims, worst first.
    pub(crate) fn worst_convoys(&self, since: Nanos) -> Vec<&Convoy> {
        let all: Box<dyn Iterator<Item = &Convoy>> = if since == 0 {
            Box::new(self.worst.iter())
        } else {
            Box::new(self.recent.iter().filter(move |c| c.to >= since))
        };
        let growing = self.locks.values().flat_map(|l| &l.growing);
        let mut all: Vec<&Convoy> = all.chain(growing.filter(|c| c.to >= since)).collect();
        all.sort_by_key(|c| (std::cmp::Reverse(c.total), c.no));
        all.truncate(WORST_MAX);
        all
    }

    // ---- Faults ----

    fn fault(&mut self, fault: &Fault) {
        self.now = self.now.max(fault.at.saturating_add(fault.took));
        if let Some((lock, head)) = self.joined.remove(&fault.tid) {
            let span = fault.at..=fault.at.saturating_add(fault.took);
            let lock = self.locks.get_mut(&lock);
            let convoys = lock.into_iter().flat_map(|l| l.growing.iter_mut().rev());
            let mut victims = convoys
                .filter(|c| c.head == head)
                .flat_map(|c| c.victims.iter_mut().rev());
            let of_this = |v: &&mut Victim| v.wait.tid == fault.tid && span.contains(&v.wait.at);
            if let Some(victim) = victims.find(of_this) {
                victim.fault = Some(fault.clone());
            }
        }
        // The kernel's sums have those that have ended.
        if self.faults_from_events || fault.open {
            self.open_faults += u64::from(fault.open);
            let sums = FaultSums::one(fault);
            let until = fault.at.saturating_add(fault.took);
            self.add_faults(fault.tid, fault.pid, fault.file, &sums, until);
        }
    }

    /// Adds faults that ended by an instant, since the last such sum.
    pub(crate) fn add_faults(
        &mut self,
        tid: u32,
        pid: u32,
        file: Option<FileNo>,
        sums: &FaultSums,
        until: Nanos,
    ) {
        self.now = self.now.max(until);
        if self.faults.len() >= SUMS_MAX && !self.faults.contains_key(&(pid, tid, file)) {
            self.forget_the_ended();
        }
        // Where there is no room even so, the rest has one row.
        let key = if self.faults.len() < 2 * SUMS_MAX || self.faults.contains_key(&(pid, tid, file))
        {
            (pid, tid, file)
        } else {
            (0, 0, None)
        };
        self.faults.entry(key).or_default().add(sums);
        let mut parts = [0; PARTS];
        parts[..CAUSES].copy_from_slice(&sums.causes);
        let elsewhere = sums
            .causes
            .iter()
            .fold(sums.wait, |a, &b| a.saturating_add(b));
        parts[Part::Running as usize] = sums.total.saturating_sub(elsewhere);
        let spent = parts.iter().fold(0, |a: Nanos, &b| a.saturating_add(b));
        self.spread(tid, pid, until.saturating_sub(spent), until, &parts);
    }

    /// Puts the sums of threads that have ended together, by the names of process and thread, and forgets them. Not for a
    /// few: it goes over everything.
    fn forget_the_ended(&mut self) {
        if self.ended.len() < self.ended_kept + FORGET_AT_LEAST {
            return;
        }
        let mut heir: HashMap<(String, String), (u32, u32)> = HashMap::new();
        let mut heir_of = |model: &Self, pid: u32, tid: u32| {
            if !model.ended.contains(&tid) {
                return (pid, tid);
            }
            let names = (
                group(model.process_name(pid)),
                group(model.thread_name(tid)),
            );
            *heir.entry(names).or_insert((pid, tid))
        };
        for ((pid, tid, file), sums) in std::mem::take(&mut self.faults) {
            let (pid, tid) = heir_of(self, pid, tid);
            self.faults.entry((pid, tid, file)).or_default().add(&sums);
        }
        for ((pid, tid), calls) in std::mem::take(&mut self.calls_of) {
            let sum = self.calls_of.entry(heir_of(self, pid, tid)).or_default();
            sum.0 += calls.0;
            sum.1 += calls.1;
        }
        let heirs: std::collections::HashSet<u32> = heir
            .into_values()
            .flat_map(|(pid, tid)| [pid, tid])
            .collect();
        let ended = std::mem::take(&mut self.ended);
        let stays = |tid: &u32| !ended.contains(tid) || heirs.contains(tid);
        self.threads.retain(|tid, _| stays(tid));
        self.doers_of.retain(|tid, _| stays(tid));
        self.reads.retain(|tid, _| stays(tid));
        self.joined.retain(|tid, _| stays(tid));
        self.targets.retain(|pid, _| stays(pid));
        for lock in self.locks.values_mut() {
            lock.seen.retain(stays);
        }
        self.ended = heirs;
        self.ended_kept = self.ended.len();
    }

    // ---- Lanes ----

    /// Adds time to a thread's lane, evenly from one instant to another.
    fn spread(&mut self, tid: u32, pid: u32, from: Nanos, to: Nanos, parts: &Parts) {
        if self.bin == 0 {
            return;
        }
        while (to / self.bin) as usize >= BINS_MAX {
            self.bin *= 2;
            for lane in self.lanes.values_mut() {
                lane.bins = lane
                    .bins
                    .chunks(2)
                    .map(|pair| {
                        let mut sum = pair[0];
                        if let Some(second) = pair.get(1) {
                            for (a, b) in sum.iter_mut().zip(second) {
                                *a += b;
                            }
                        }
                        sum
                    })
                    .collect();
            }
        }
        if !self.lanes.contains_key(&tid) && self.lanes.len() >= LANES_MAX {
            return;
        }
        let lane = self.lanes.entry(tid).or_insert_with(|| Lane {
            tid,
            pid,
            bins: Vec::new(),
            parts: [0; PARTS],
        });
        for (sum, &ns) in lane.parts.iter_mut().zip(parts) {
            *sum += ns;
        }
        let (first, last) = ((from / self.bin) as usize, (to / self.bin) as usize);
        if lane.bins.len() <= last {
            lane.bins.resize(last + 1, [0.0; PARTS]);
        }
        let width = (to - from).max(1) as f32;
        for bin in first..=last {
            let begin = (bin as u64 * self.bin).max(from);
            let end = ((bin as u64 + 1) * self.bin).min(to);
            let share = if to == from {
                1.0
            } else {
                end.saturating_sub(begin) as f32 / width
            };
            for (sum, &ns) in lane.bins[bin].iter_mut().zip(parts) {
                *sum += ns as f32 * share;
            }
        }
    }

    /// The lanes, the most stalled first.
    pub(crate) fn lanes(&self) -> Vec<&Lane> {
        let mut all: Vec<&Lane> = self.lanes.values().collect();
        let stalled = |l: &Lane| l.parts[..Part::Running as usize].iter().sum::<Nanos>();
        all.sort_by_key(|l| (std::cmp::Reverse(stalled(l)), l.tid));
        all
    }

    /// All faults of a kind, summed up.
    pub(crate) fn fault_total(&self) -> FaultSums {
        let mut all = FaultSums::default();
        for sums in self.faults.values() {
            all.add(sums);
        }
        all
    }

    /// Where the time of all faults went. The waits that were told singly say behind whom; the rest is hand-over.
    pub(crate) fn fault_parts(&self) -> Parts {
        let all = self.fault_total();
        let mut parts = self.fault_waits;
        let told: Nanos = parts.iter().sum();
        parts[Part::HandOver as usize] += all.wait.saturating_sub(told);
        for (cause, ns) in Cause::ALL.into_iter().zip(all.causes) {
            parts[cause as usize] += ns;
        }
        let elsewhere: Nanos = all.causes.iter().sum::<Nanos>() + all.wait;
        parts[Part::Running as usize] = all.total.saturating_sub(elsewhere);
        parts
    }
}

fn add_parts(sums: &mut Parts, parts: &Parts) {
    for (sum, &ns) in sums.iter_mut().zip(parts) {
        *sum = sum.saturating_add(ns);
    }
}

/// A name that does nothing to a terminal.
pub(crate) fn printable(name: &str) -> String {
    faultless_untrusted::printable(name).to_string()
}

/// Whether this is the time in which a lock waited for its next owner to run.
fn is_granted(hold: &Hold) -> bool {
    !hold.contended && hold.took > 0 && hold.causes[Cause::Cpu as usize] == hold.took
}

/// A thread's name without the number at its end: `worker-12` is `worker-*`.
pub(crate) fn group(name: &str) -> String {
    let kept = name.trim_end_matches(|c: char| c.is_ascii_digit());
    if kept.is_empty() || kept.len() == name.len() {
        name.to_owned()
    } else {
        format!("{kept}*")
    }
}

/// Adds to a sum, or to the last one: that of all for which there was no room.
fn add_bounded<K: Ord>(
    sums: &mut BTreeMap<K, Nanos>,
    key: K,
    others: impl FnOnce() -> K,
    ns: Nanos,
) {
    let has_room = sums.len() < REASONS_MAX || sums.contains_key(&key);
    let sum = match has_room {
        true => sums.entry(key).or_default(),
        false => sums.entry(others()).or_default(),
    };
    *sum = sum.saturating_add(ns);
}

/// What a thread did that kept another one from a VMA.
fn keepers_deed(what: &What) -> String {
    match what {
        What::Unknown => "unknown".to_owned(),
        what => what.to_string(),
    }
}

/// A wait for a VMA that ended when that thread let go of it.
pub(crate) fn kept(thread: &str, what: &str) -> String {
    format!("waits until {thread} lets go of a VMA ({what})")
}

/// What a kernel stack says of the reason for a sleep.
pub(crate) fn asleep_in(functions: &[String]) -> String {
    if names::waits_for_vma(functions) {
        return "waits until other threads let go of a VMA".to_owned();
    }
    let has = |part: &str| functions.iter().any(|f| f.contains(part));
    let known = [
        ("shrink_", "reclaims memory"),
        ("try_to_free", "reclaims memory"),
        ("do_swap_page", "reads from swap"),
        ("swap_read", "reads from swap"),
        ("filemap_fault", "waits for a page of a file"),
        ("folio_wait_", "waits for a page"),
        ("__folio_lock", "waits for a page"),
        ("fuse_", "waits for a FUSE server"),
        ("io_schedule", "waits for storage"),
        ("blk_", "waits for storage"),
        ("rwsem_down", "waits for another lock"),
        ("mutex_lock", "waits for another lock"),
        ("synchronize_", "waits for other processors"),
        ("__cond_resched", "gives way"),
        ("handle_userfault", "waits for a userfaultfd monitor"),
    ];
    for (part, meaning) in known {
        if has(part) {
            return meaning.to_owned();
        }
    }
    let noise = |f: &&String| {
        !(f.starts_with("__schedule")
            || f.starts_with("schedule")
            || f.starts_with("__traceiter")
            || f.starts_with("bpf_"))
    };
    functions
        .iter()
        .find(noise)
        .map_or_else(|| "asleep".to_owned(), |f| format!("asleep in {f}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use faultless_trace::{Process, Thread};

    pub(crate) fn hold(at: Nanos, took: Nanos, tid: u32, write: bool, doing: Doing) -> Hold {
        Hold {
            at,
            took,
            lock: LockId(1),
            target: 10,
            tid,
            pid: 10,
            write,
            downgraded: false,
            contended: true,
            open: false,
            doing,
            address: 0,
            length: 0,
            file: None,
            page: 0,
            causes: [0; CAUSES],
            longest_sleep: 0,
            stack: None,
            reads: String::new(),
            kept_by: None,
        }
    }

    pub(crate) fn wait(at: Nanos, took: Nanos, tid: u32, write: bool, doing: Doing) -> Wait {
        Wait {
            at,
            took,
            lock: LockId(1),
            target: 10,
            tid,
            pid: 10,
            write,
            failed: false,
            open: false,
            doing,
            address: 0,
            length: 0,
            file: None,
            page: 0,
            owner: None,
            cpu: 0,
            granted: 0,
        }
    }

    const MS: Nanos = 1_000_000;

    fn model() -> Model {
        let mut model = Model::new(0);
        model.event(&Event::Process(Process {
            at: 0,
            pid: 10,
            change: ProcessChange::Watched,
        }));
        for tid in 10..40 {
            model.event(&Event::Thread(Thread {
                at: 0,
                tid,
                pid: if tid < 30 { 10 } else { 30 },
                name: format!("t-{tid}"),
            }));
        }
        model
    }

    /// The classic: an agent reads smaps, a writer is queued, and a fault waits behind it.
    #[test]
    fn a_fault_behind_a_queued_writer_behind_a_reader_is_blamed_on_the_reader() {
        let mut model = model();
        let mut read = hold(0, 50 * MS, 30, false, Doing::Call(0));
        read.pid = 30;
        read.reads = "10/smaps".to_owned();
        model.event(&Event::Hold(read));
        model.event(&Event::Wait(wait(
            10 * MS,
            40 * MS,
            20,
            true,
            Doing::Call(9),
        )));
        model.event(&Event::Hold(hold(50 * MS, MS, 20, true, Doing::Call(9))));
        model.event(&Event::Wait(wait(
            20 * MS,
            31 * MS,
            21,
            false,
            Doing::Fault,
        )));

        let convoys = model.worst_convoys(0);
        assert_eq!(convoys.len(), 1);
        let convoy = convoys[0];
        assert_eq!(convoy.hold.tid, 30);
        assert_eq!(convoy.waits, 2);
        assert_eq!(convoy.total, 71 * MS);
        assert_eq!(convoy.writer.as_ref().map(|w| w.tid), Some(20));
        let of = |tid: u32| {
            let found = model.blames.iter().find(|(d, _)| match tid {
                30 => d.what == What::ProcFile("smaps".into()),
                _ => d.what == What::Call(9),
            });
            found
                .map(|(_, b)| (b.of_faults, b.of_calls))
                .expect("blamed")
        };
        assert_eq!(of(30), (30 * MS, 40 * MS));
        assert_eq!(of(20), (MS, 0));
        assert_eq!(model.fault_waits[Part::Reader as usize], 30 * MS);
        assert_eq!(model.fault_waits[Part::Writer as usize], MS);
    }

    /// A fork holds mmap_lock, and sleeps for a thread that reads smaps with a VMA's own lock.
    #[test]
    fn a_thread_that_keeps_a_holder_from_a_vma_is_named() {
        let mut model = model();
        model.event(&Event::Stack(faultless_trace::Stack {
            no: StackNo(1),
            functions: vec!["__vma_start_write".to_owned()],
        }));
        let mut fork = hold(0, 50 * MS, 20, true, Doing::Call(57));
        (fork.stack, fork.longest_sleep) = (Some(StackNo(1)), 40 * MS);
        let agent = |n: usize| {
            Box::new(faultless_trace::Keeper {
                tid: 35,
                pid: 30,
                name: format!("agent{}", "x".repeat(n)),
                doing: Doing::Call(0),
                reads: "10/smaps".to_owned(),
            })
        };
        for n in 0..REASONS_MAX + 10 {
            fork.kept_by = Some(agent(n));
            model.event(&Event::Hold(fork.clone()));
        }
        let blame = &model.blames[0].1;
        let what = What::ProcFile("smaps".to_owned());
        assert_eq!(blame.kept_by[&("agent".to_owned(), what)], 40 * MS);
        let says = "waits until agent lets go of a VMA (read of /proc/PID/smaps)";
        assert_eq!(blame.sleeps[says], 40 * MS);
        // However many there are.
        assert_eq!(blame.sleeps.len(), REASONS_MAX + 1);
        assert_eq!(blame.sleeps["(others)"], 10 * 40 * MS);
    }

    #[test]
    fn readers_that_were_woken_together_do_not_blame_each_other() {
        let mut model = model();
        model.event(&Event::Hold(hold(0, 5 * MS, 20, true, Doing::Call(11))));
        model.event(&Event::Hold(hold(5 * MS, MS, 22, false, Doing::Fault)));
        model.event(&Event::Wait(wait(0, 6 * MS, 21, false, Doing::Fault)));
        assert_eq!(model.fault_waits[Part::Writer as usize], 5 * MS);
        assert_eq!(model.fault_waits[Part::Reader as usize], 0);
        assert_eq!(model.fault_waits[Part::HandOver as usize], MS);
    }

    /// Nobody has let go when the observation ends: then all end at that instant, and this is no waking together.
    #[test]
    fn what_is_stuck_at_the_end_has_its_culprit() {
        let mut model = model();
        let mut read = hold(0, 50 * MS, 30, false, Doing::Call(0));
        (read.pid, read.open) = (30, true);
        model.event(&Event::Hold(read));
        let mut writer = wait(10 * MS, 40 * MS, 22, true, Doing::Call(9));
        writer.open = true;
        model.event(&Event::Wait(writer));
        let mut fault = wait(20 * MS, 30 * MS, 21, false, Doing::Fault);
        fault.open = true;
        model.event(&Event::Wait(fault));
        assert_eq!(model.fault_waits[Part::Reader as usize], 30 * MS);
        assert_eq!(model.worst_convoys(0)[0].waits, 2);
        assert_eq!(model.doubts.unexplained, 0);
    }

    /// A build: each process ends, and none is like another but by name.
    #[test]
    fn processes_that_come_and_go_leave_one_row_behind() {
        let mut model = model();
        let sums = FaultSums {
            faults: 1,
            total: 10,
            ..FaultSums::default()
        };
        let all = 40_000;
        for pid in 100..100 + all {
            let name = "cc1".to_owned();
            let (at, tid) = (u64::from(pid), pid);
            model.event(&Event::Thread(Thread { at, tid, pid, name }));
            model.event(&Event::Process(Process {
                at,
                pid,
                change: ProcessChange::Forked { parent: 10 },
            }));
            model.add_faults(tid, pid, Some(FileNo(pid % 7)), &sums, at);
            model.event(&Event::Process(Process {
                at,
                pid,
                change: ProcessChange::ThreadExited { tid },
            }));
        }
        assert!(model.faults.len() <= 2 * SUMS_MAX, "{}", model.faults.len());
        assert_eq!(model.fault_total().faults, u64::from(all));
    }

    #[test]
    fn a_reader_without_a_queued_writer_has_only_itself_to_blame() {
        let mut model = model();
        model.event(&Event::Hold(hold(0, 5 * MS, 22, false, Doing::Fault)));
        model.event(&Event::Wait(wait(MS, 3 * MS, 21, false, Doing::Fault)));
        assert_eq!(model.fault_waits[Part::HandOver as usize], 3 * MS);
    }

    #[test]
    fn a_waiter_that_was_woken_and_has_no_processor_keeps_the_next_one_waiting() {
        let mut model = model();
        model.event(&Event::Hold(hold(0, 5 * MS, 20, true, Doing::Call(56))));
        let mut woken = wait(MS, 7 * MS, 21, false, Doing::Fault);
        (woken.cpu, woken.granted) = (3 * MS, 3 * MS);
        model.event(&Event::Wait(woken));
        assert_eq!(model.fault_waits[Part::Writer as usize], 4 * MS);
        assert_eq!(model.fault_waits[Part::Cpu as usize], 3 * MS);
        model.event(&Event::Wait(wait(5 * MS, 3 * MS, 22, true, Doing::Call(9))));
        let convoys = model.worst_convoys(0);
        let second = convoys
            .iter()
            .find(|c| c.victims[0].wait.tid == 22)
            .unwrap();
        assert_eq!(second.hold.tid, 21);
        assert_eq!(second.hold.causes[Cause::Cpu as usize], 3 * MS);
    }

    #[test]
    fn a_hold_from_before_the_observation_is_unknown_but_counted() {
        let mut model = model();
        model.event(&Event::Stray(faultless_trace::Stray {
            at: 9 * MS,
            lock: LockId(1),
            target: 10,
            tid: 35,
            pid: 30,
            write: false,
            release: true,
        }));
        model.event(&Event::Wait(wait(MS, 8 * MS, 20, true, Doing::Call(9))));
        let convoys = model.worst_convoys(0);
        assert_eq!(convoys[0].hold.tid, 35);
        assert_eq!(model.blames[0].0.what, What::Unknown);
        assert_eq!(model.doubts.strays, 1);
    }

    #[test]
    fn a_writer_that_the_lock_word_names_and_the_events_do_not_is_a_doubt() {
        let mut model = model();
        model.event(&Event::Hold(hold(0, 5 * MS, 20, true, Doing::Call(11))));
        let mut right = wait(MS, 4 * MS, 21, false, Doing::Fault);
        right.owner = Some(20);
        model.event(&Event::Wait(right));
        assert_eq!((model.doubts.checked, model.doubts.out_of_step), (1, 0));
        let mut wrong = wait(2 * MS, 3 * MS, 22, false, Doing::Fault);
        wrong.owner = Some(25);
        model.event(&Event::Wait(wrong));
        assert_eq!((model.doubts.checked, model.doubts.out_of_step), (2, 1));
    }

    #[test]
    fn bins_hold_as_much_time_however_often_they_are_merged() {
        let mut model = Model::new(1000);
        let mut parts = [0; PARTS];
        parts[Part::Device as usize] = 500;
        for i in 0..5000u64 {
            model.spread(1, 1, i * 1000, i * 1000 + 900, &parts);
        }
        let lane = model.lanes()[0];
        assert!(lane.bins.len() <= BINS_MAX);
        let sum: f32 = lane.bins.iter().map(|b| b[Part::Device as usize]).sum();
        assert!((sum / 2_500_000.0 - 1.0).abs() < 0.01, "{sum}");
    }

    #[test]
    fn names_that_differ_in_digits_are_a_group() {
        assert_eq!(group("worker-12"), "worker-*");
        assert_eq!(group("main"), "main");
        assert_eq!(group("42"), "42");
    }
}
