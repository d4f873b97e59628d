//! A recorded trace as a workload: what its threads did, to be done again under any design.
//!
//! A thread does again what it did under mmap_lock and what faults it took, in its order, with the pauses between them that it made.
//! What was waited for is not replayed: it comes from the model. A fault that read takes as long on the device as it did; one
//! that did not finds its page in the cache. A hold runs and sleeps as long as it did, less the time for which it had no processor.
//!
//! What is not in a trace is guessed: faults that neither slept nor took the lock, and what threads compute. A pause of a millisecond
//! at most counts as computing, a longer one as sleep; and all that computing is cut down, if need be, to what the processors can have
//! had time for. A hold for writing locks VMAs as well: a fork's all of them; that of mprotect, munmap and madvise those in which there
//! were faults at the addresses that it is about (a file that is mapped several times counts as one VMA); others none.

use crate::kernel::{Access, Kernel, Mm, Running, Thread};
use crate::stats::histogram;
use crate::vma::{Backing, Vma};
use crate::workload::GROUPS_MAX;
use faultless_trace::{Cause, Doing, Event, Fault, Hold, Nanos, Reader, Wait};
use faultless_untrusted::printable;
use hdrhistogram::Histogram;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Read;
use std::rc::Rc;

/// Most things that threads did of which all are done again.
const DEEDS_MAX: u64 = 1_000_000;
/// fork, vfork, clone, clone3 on x86-64.
const FORKS: [u16; 4] = [56, 57, 58, 435];
/// mprotect, munmap, madvise on x86-64: those whose arguments say which mapping they change.
const MPROTECT: u16 = 10;
const MUNMAP: u16 = 11;
const MADVISE: u16 = 28;
/// A longer pause is sleep.
const COMPUTES_MAX: Nanos = 1_000_000;
/// What a fault computes, about.
const FAULT_RUNS: Nanos = 15_000;
/// A wait that ended so long before a hold began was another one's.
const JOINED: Nanos = 1_000_000;

/// Something that a thread did.
#[derive(Debug, Clone, PartialEq)]
enum Deed {
    Fault {
        /// None: anonymous.
        file: Option<u32>,
        page: u64,
        /// Time on the device; None: the page was in memory.
        read: Option<Nanos>,
    },
    Hold {
        /// Whose lock.
        of: u32,
        write: bool,
        /// It goes on as a reader afterwards.
        downgrades: bool,
        /// It is what comes after a downgrade.
        downgraded: bool,
        runs: Nanos,
        sleeps: Nanos,
        forks: bool,
        /// The addresses that a call that writes is about.
        range: (u64, u64),
        what: &'static str,
    },
}

#[derive(Debug, Clone, PartialEq)]
struct Action {
    from: Nanos,
    to: Nanos,
    deed: Deed,
}

#[derive(Debug, Clone, PartialEq)]
struct Script {
    pid: u32,
    group: String,
    actions: Vec<Action>,
}

/// What was recorded.
#[derive(Debug, Clone, PartialEq)]
pub struct Recording {
    /// By number of the thread.
    scripts: BTreeMap<u32, Script>,
    /// Processes whose locks are in it.
    targets: Vec<u32>,
    names: BTreeMap<u32, String>,
    /// How long it took.
    pub seconds: f64,
    /// Processors of the machine.
    pub processors: u32,
    /// The trace had no end.
    pub cut_off: bool,
    /// Of a short pause, so much was spent computing.
    computed: f64,
    /// By process and file (none: anonymous memory), the addresses at which there were faults: from, to.
    ranges: BTreeMap<(u32, Option<u32>), (u64, u64)>,
}

impl Recording {
    /// Reads a trace.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or is damaged.
    pub fn read<R: Read>(mut trace: Reader<R>) -> Result<Recording, faultless_trace::Error> {
        let processors = trace.header().processors.clamp(1, 1024);
        let mut names: HashMap<u32, (u32, String)> = HashMap::new();
        let mut scripts: BTreeMap<u32, (u32, Vec<Action>)> = BTreeMap::new();
        let mut waits: HashMap<u32, Wait> = HashMap::new();
        let mut ranges: BTreeMap<(u32, Option<u32>), (u64, u64)> = BTreeMap::new();
        let (mut cut_off, mut last, mut deeds) = (false, 0, 0u64);
        for event in &mut trace {
            let event = match event {
                Ok(event) => event,
                Err(faultless_trace::Error::CutOff { events, .. }) if events > 0 => {
                    cut_off = true;
                    break;
                }
                Err(e) => return Err(e),
            };
            last = last.max(event.at().unwrap_or(0));
            match event {
                Event::Thread(e) => {
                    names.insert(e.tid, (e.pid, printable(&e.name).to_string()));
                }
                Event::Fault(e) if !e.open => {
                    let file = e.file.map(|f| f.0);
                    let range = ranges
                        .entry((e.pid, file))
                        .or_insert((e.address, e.address));
                    *range = (range.0.min(e.address), range.1.max(e.address));
                    let script = scripts.entry(e.tid).or_insert_with(|| (e.pid, Vec::new()));
                    script.1.push(fault(&e));
                    deeds += 1;
                }
                Event::Wait(e) => {
                    waits.insert(e.tid, e);
                }
                Event::Hold(e) if !e.open => {
                    let Some(action) = hold(&e, waits.get(&e.tid)) else {
                        continue;
                    };
                    let script = scripts.entry(e.tid).or_insert_with(|| (e.pid, Vec::new()));
                    script.1.push(action);
                    deeds += 1;
                }
                _ => {}
            }
            if deeds > DEEDS_MAX {
                return Err(faultless_trace::Error::Io(std::io::Error::new(
                    std::io::ErrorKind::FileTooLarge,
                    format!(
                        "it has more than {DEEDS_MAX} faults and holds, which is more than can be done again; record a shorter time"
                    ),
                )));
            }
        }
        let mut targets = BTreeSet::new();
        let mut known = BTreeMap::new();
        let mut whole = BTreeMap::new();
        for (tid, (pid, mut actions)) in scripts {
            actions.sort_by_key(|a| a.from);
            join_downgrades(&mut actions);
            for action in &actions {
                let of = match action.deed {
                    Deed::Fault { .. } => pid,
                    Deed::Hold { of, .. } => of,
                };
                targets.insert(of);
            }
            let name = names.get(&tid).map_or("?", |n| n.1.as_str());
            let process = names.get(&pid).map_or("?", |n| n.1.as_str());
            known.insert(pid, format!("{process} ({pid})"));
            let group = name.trim_end_matches(|c: char| c.is_ascii_digit());
            let group = if group.is_empty() { name } else { group };
            whole.insert(
                tid,
                Script {
                    pid,
                    group: group.to_owned(),
                    actions,
                },
            );
        }
        join_small_groups(&mut whole);
        let (mut paused, mut busy): (Nanos, Nanos) = (0, 0);
        for script in whole.values() {
            let mut before = 0;
            for action in &script.actions {
                let pause = action.from.saturating_sub(before);
                before = before.max(action.to);
                if pause <= COMPUTES_MAX {
                    paused = pause.saturating_add(paused);
                }
                let ran = match action.deed {
                    Deed::Hold { runs, .. } => runs,
                    Deed::Fault { .. } => FAULT_RUNS,
                };
                busy = ran.saturating_add(busy);
            }
        }
        let had = (u64::from(processors).saturating_mul(last)).saturating_sub(busy);
        Ok(Recording {
            computed: (had as f64 / (paused as f64).max(1.0)).min(1.0),
            scripts: whole,
            targets: targets.into_iter().collect(),
            names: known,
            seconds: last as f64 / 1e9,
            processors,
            cut_off,
            ranges,
        })
    }

    /// Events after which doing it again is given up.
    pub(crate) fn events_max(&self) -> u64 {
        /// What is allowed to any trace: some seconds' work.
        const ANY: u64 = 20_000_000;
        /// And for each thing that a thread did.
        const EACH: u64 = 50;
        let deeds = self.scripts.values().map(|s| s.actions.len() as u64);
        deeds.sum::<u64>().saturating_mul(EACH).saturating_add(ANY)
    }

    /// Whether there is anything to be done again.
    pub fn is_empty(&self) -> bool {
        self.scripts.is_empty()
    }

    /// Threads, the group with the most faults first; and how many there are of it.
    pub(crate) fn groups(&self) -> Vec<(String, u32)> {
        groups(&self.scripts)
    }

    /// How long what each group did took then: all of it, and faults alone, in nanoseconds.
    pub(crate) fn durations(&self) -> Vec<(String, u32, Histogram<u64>, Histogram<u64>)> {
        let mut all = Vec::new();
        for (name, threads) in self.groups() {
            let (mut round, mut fault) = (histogram(), histogram());
            let scripts = self.scripts.values().filter(|s| s.group == name);
            let mut begun = None;
            for action in scripts.flat_map(|s| &s.actions) {
                let (downgrades, downgraded) = match action.deed {
                    Deed::Hold {
                        downgrades,
                        downgraded,
                        ..
                    } => (downgrades, downgraded),
                    Deed::Fault { .. } => (false, false),
                };
                let from = begun.filter(|_| downgraded).unwrap_or(action.from);
                begun = downgrades.then_some(from);
                if downgrades {
                    continue;
                }
                let ns = action.to.saturating_sub(from);
                round.saturating_record(ns);
                if matches!(action.deed, Deed::Fault { .. }) {
                    fault.saturating_record(ns);
                }
            }
            all.push((name, threads, round, fault));
        }
        all
    }

    /// Its threads on a machine.
    pub(crate) fn bodies<'a>(
        &'a self,
        k: &'a Rc<Kernel>,
        given: bool,
    ) -> Vec<(crate::cpu::Tid, Running<'a>)> {
        let groups: Vec<(String, usize)> = self
            .groups()
            .into_iter()
            .map(|(name, _)| {
                let no = k.stats.new_group(&name);
                (name, no)
            })
            .collect();
        let mut mms: BTreeMap<u32, Rc<Mm>> = BTreeMap::new();
        let pids = self
            .targets
            .iter()
            .chain(self.scripts.values().map(|s| &s.pid));
        for &pid in pids {
            let name = self
                .names
                .get(&pid)
                .cloned()
                .unwrap_or_else(|| format!("process {pid}"));
            mms.entry(pid).or_insert_with(|| k.new_mm(&name));
        }
        let mut vmas: BTreeMap<(u32, Option<u32>), Rc<Vma>> = BTreeMap::new();
        for script in self.scripts.values() {
            for action in &script.actions {
                if let Deed::Fault { file, .. } = action.deed {
                    vmas.entry((script.pid, file)).or_insert_with(|| {
                        // Files are shared by processes; anonymous memory is not.
                        let object = file.unwrap_or(u32::MAX - script.pid);
                        let backing = match file {
                            Some(_) => Backing::File {
                                object,
                                holes: false,
                            },
                            None => Backing::Anonymous { object },
                        };
                        let vma = k.new_vma(&mms[&script.pid], backing, u64::MAX, 0);
                        mms[&script.pid].vmas.borrow_mut().push(Rc::clone(&vma));
                        vma
                    });
                }
            }
        }
        let mut touched: BTreeMap<u32, Vec<Touched>> = BTreeMap::new();
        for ((pid, file), vma) in &vmas {
            if let Some(range) = self.ranges.get(&(*pid, *file)) {
                let all = touched.entry(*pid).or_default();
                all.push((Rc::clone(vma), *range));
            }
        }
        let again = Rc::new(Again {
            vmas,
            touched,
            mms,
            given,
            computed: self.computed,
        });
        let mms = &again.mms;
        let mut bodies: Vec<(crate::cpu::Tid, Running<'a>)> = Vec::new();
        for script in self.scripts.values() {
            let no = groups
                .iter()
                .find(|g| g.0 == script.group)
                .map_or(0, |g| g.1);
            let t = k.new_thread(&mms[&script.pid], no);
            bodies.push((t.tid, Box::pin(play(k, script, t, Rc::clone(&again)))));
        }
        bodies
    }
}

fn groups(scripts: &BTreeMap<u32, Script>) -> Vec<(String, u32)> {
    let mut all: BTreeMap<&str, (usize, u32)> = BTreeMap::new();
    for script in scripts.values() {
        let faults = script
            .actions
            .iter()
            .filter(|a| matches!(a.deed, Deed::Fault { .. }));
        let group = all.entry(&script.group).or_default();
        group.0 += faults.count();
        group.1 += 1;
    }
    let mut all: Vec<(&str, (usize, u32))> = all.into_iter().collect();
    all.sort_by_key(|(name, (faults, _))| (std::cmp::Reverse(*faults), *name));
    all.into_iter()
        .map(|(name, (_, n))| (name.to_owned(), n))
        .collect()
}

/// Where threads have more names than can be told, those with the fewest faults are one group.
fn join_small_groups(scripts: &mut BTreeMap<u32, Script>) {
    let all = groups(scripts);
    if all.len() <= GROUPS_MAX {
        return;
    }
    let small: BTreeSet<&str> = all[GROUPS_MAX - 1..].iter().map(|g| g.0.as_str()).collect();
    for script in scripts.values_mut() {
        if small.contains(script.group.as_str()) {
            "(others)".clone_into(&mut script.group);
        }
    }
}

fn fault(e: &Fault) -> Action {
    let device = e.causes[Cause::Device as usize];
    Action {
        from: e.at,
        to: e.at.saturating_add(e.took),
        deed: Deed::Fault {
            file: e.file.map(|f| f.0),
            page: if e.file.is_some() {
                e.page
            } else {
                e.address >> 12
            },
            read: (e.major && device > 0).then_some(device),
        },
    }
}

/// A hold that is told in two parts is one: the first part ends with a downgrade, if the second one follows.
fn join_downgrades(actions: &mut [Action]) {
    for no in 0..actions.len() {
        let (before, rest) = actions.split_at_mut(no);
        let Deed::Hold {
            of: mine,
            downgraded: downgraded @ true,
            ..
        } = &mut rest[0].deed
        else {
            continue;
        };
        match before.last_mut() {
            Some(Action {
                to,
                deed:
                    Deed::Hold {
                        of,
                        write: true,
                        downgrades,
                        ..
                    },
                ..
            }) if of == mine && to.abs_diff(rest[0].from) < JOINED => *downgrades = true,
            // Its first part was not told: then it is a reader's.
            _ => *downgraded = false,
        }
    }
}

/// What a system call did under the lock; a fault's hold is the fault's.
fn hold(e: &Hold, waited: Option<&Wait>) -> Option<Action> {
    let call = match e.doing {
        Doing::Call(no) => no,
        Doing::Fault | Doing::CallFault(_) => return None,
        Doing::KernelThread | Doing::Unknown => u16::MAX,
    };
    let waited = waited.filter(|w| {
        let end = w.at.saturating_add(w.took);
        !e.downgraded && w.lock == e.lock && w.at < e.at && end.abs_diff(e.at) < JOINED
    });
    let slept: Nanos = Cause::ALL
        .into_iter()
        .filter(|c| *c != Cause::Cpu)
        .map(|c| e.causes[c as usize])
        .fold(0, Nanos::saturating_add);
    let without = e.causes[Cause::Cpu as usize];
    Some(Action {
        from: waited.map_or(e.at, |w| w.at),
        to: e.at.saturating_add(e.took),
        deed: Deed::Hold {
            of: e.target,
            // What comes after a downgrade reads.
            write: e.write && !e.downgraded,
            downgrades: false,
            downgraded: e.downgraded,
            runs: e.took.saturating_sub(slept).saturating_sub(without),
            sleeps: slept,
            forks: FORKS.contains(&call),
            range: match call {
                _ if !e.write || e.downgraded => (0, 0),
                MPROTECT | MUNMAP | MADVISE => (e.address, e.address.saturating_add(e.length)),
                _ => (0, 0),
            },
            what: if !e.reads.is_empty() {
                "read of a file of /proc"
            } else if FORKS.contains(&call) {
                "fork"
            } else if e.write {
                "a call that changes mappings"
            } else {
                "a call that looks at mappings"
            },
        },
    })
}

/// A mapping, and from where to where there were faults in it.
type Touched = (Rc<Vma>, (u64, u64));

/// What threads that do something again need for it.
struct Again {
    /// Mappings, by process and file.
    vmas: BTreeMap<(u32, Option<u32>), Rc<Vma>>,
    /// The same, by process, with the addresses at which there were faults.
    touched: BTreeMap<u32, Vec<Touched>>,
    mms: BTreeMap<u32, Rc<Mm>>,
    /// Reads take as long as they did.
    given: bool,
    /// Of a short pause, so much was spent computing.
    computed: f64,
}

async fn play(k: &Rc<Kernel>, script: &Script, t: Thread, again: Rc<Again>) {
    let (mut before, mut begun) = (0, None);
    for action in &script.actions {
        let pause = action.from.saturating_sub(before);
        before = before.max(action.to);
        let is_next = matches!(
            action.deed,
            Deed::Hold {
                downgraded: true,
                ..
            }
        );
        if is_next {
            // Nothing came between.
        } else if pause > COMPUTES_MAX {
            k.cpu.sleep(t.tid, pause).await;
        } else {
            k.cpu
                .work(t.tid, (pause as f64 * again.computed) as Nanos)
                .await;
        }
        // What follows a downgrade is the same call.
        let from = match (is_next, begun) {
            (true, Some(begun)) => begun,
            _ => k.cpu.now(),
        };
        begun = Some(from);
        k.stats.round_begins(t.tid, from);
        match &action.deed {
            Deed::Fault { file, page, read } => {
                let a = Access {
                    vma: Rc::clone(&again.vmas[&(script.pid, *file)]),
                    page: *page,
                    read: read.filter(|_| again.given),
                };
                if file.is_some() {
                    let unmapped = k.cache.set(a.key(), read.is_none(), t.tid);
                    k.unmap(&unmapped);
                } else if read.is_some() {
                    // It comes from swap.
                    let unmapped = k.cache.drop_page(a.key());
                    k.unmap(&unmapped);
                    k.stats.swap_out(a.key());
                }
                if a.vma.present.borrow_mut().remove(page) == Some(u64::MAX) {
                    k.cache.count(-1);
                }
                crate::calls::touch(k, &t, &a).await;
                k.stats.round(t.tid, k.cpu.now() - from);
            }
            Deed::Hold {
                of,
                what,
                downgrades,
                ..
            } => {
                let outer = k.enter(t.tid, what);
                let touched = again.touched.get(of).map_or(&[][..], Vec::as_slice);
                hold_again(k, &t, &again.mms[of], &action.deed, touched).await;
                k.leave(t.tid, outer).await;
                if !downgrades {
                    k.stats.round(t.tid, k.cpu.now() - from);
                }
            }
        }
    }
}

/// The same hold; `touched` are mappings of the process whose lock it is, with the addresses at which there were faults.
async fn hold_again(k: &Kernel, t: &Thread, mm: &Rc<Mm>, deed: &Deed, touched: &[Touched]) {
    use crate::designs::range::Span;
    let &Deed::Hold {
        write,
        downgrades,
        downgraded,
        runs,
        sleeps,
        forks,
        range: (from, to),
        ..
    } = deed
    else {
        return;
    };
    // A fork changes all mappings; a call that says where, those in which there were faults there; another one, none of these.
    let changed: Vec<Rc<Vma>> = match write {
        true if forks => mm.vmas.borrow().clone(),
        true => touched
            .iter()
            .filter(|(_, (first, last))| *first < to && from <= *last)
            .map(|(vma, _)| Rc::clone(vma))
            .collect(),
        false => Vec::new(),
    };
    let ranges = k.design.has_range_locks();
    if !downgraded {
        match (ranges, write) {
            (true, true) if !forks => {
                let own = u32::MAX - t.tid.0;
                let span = Span::Mapping(changed.first().map_or(own, |vma| vma.no));
                mm.ranges.lock(k, t, mm, span, true).await;
            }
            (true, _) => mm.ranges.lock(k, t, mm, Span::All, write).await,
            (false, true) => k.mmap_write(t, mm).await,
            (false, false) => k.mmap_read(t, mm).await,
        }
    }
    let locked = match k.design.has_vma_locks() {
        true => changed,
        false => Vec::new(),
    };
    for vma in &locked {
        k.vma_write(t, vma).await;
    }
    k.cpu.walk(t.tid, runs).await;
    if sleeps > 0 {
        k.cpu.sleep(t.tid, sleeps).await;
    }
    locked.iter().for_each(|v| v.end_write());
    match (ranges, write) {
        (true, _) if downgrades => {}
        (true, _) => mm.ranges.unlock(k, t).await,
        (false, true) if downgrades => mm.mmap_lock.downgrade(k, t.tid).await,
        (false, true) => mm.mmap_lock.unlock_write(k, t.tid).await,
        (false, false) => mm.mmap_lock.unlock_read(k, t.tid).await,
    }
}
