//! Watching live processes: starts the BPF programs, and feeds what they see to the model and to whoever records it.

use crate::model::Model;
use crate::process;
use crate::raw::{self, Raw};
use crate::report::{self, Observed, Report};
use crate::session::{Session, Settings};
use crate::sums::FaultSums;
use crate::translate::Translator;
use crate::{HOLD_MIN, Options, WAIT_MIN};
use anyhow::Context;
use faultless_trace::{Ended, Event, FileNo, Header, Lost, Nanos, Process, ProcessChange, Thread};
use faultless_untrusted::input::kernel_text;
use faultless_untrusted::printable;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::{Duration, Instant, SystemTime};

/// Sums are read this often, at most; seldom where there are many.
const SUMS_EVERY: Duration = Duration::from_millis(50);
/// Reading sums may take this share of the time.
const SUMS_SHARE: u32 = 50;
/// Processes that ended are looked for this often.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// Takes each event as it comes.
pub type Sink = Box<dyn FnMut(&Event) -> anyhow::Result<()>>;

/// Watches until it is dropped.
pub struct Observer {
    session: Session,
    translator: Translator,
    model: Model,
    sinks: Vec<Sink>,
    began: Instant,
    began_monotonic: u64,
    /// When it ended.
    over: Option<Nanos>,
    began_system: SystemTime,
    command: Vec<String>,
    /// A process that is watched sees other mounts than this one.
    other_mounts: bool,
    /// Processes that are watched and were alive when they were last looked for.
    alive: BTreeSet<u32>,
    before: HashMap<(u32, u32, raw::FileId), FaultSums>,
    ended: HashSet<u32>,
    next_sums: Instant,
    next_look: Instant,
    losses: raw::Losses,
    failure: Option<anyhow::Error>,
}

impl std::fmt::Debug for Observer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observer")
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

impl Observer {
    /// Loads the programs. Nothing is watched yet.
    ///
    /// # Errors
    ///
    /// A sentence: no privilege, or a kernel that lacks something.
    pub fn start(options: &Options) -> anyhow::Result<Observer> {
        let session = Session::start(Settings {
            every_fault: options.every_fault,
            follow_children: options.follow_children,
            wait_min: WAIT_MIN,
            hold_min: HOLD_MIN,
            fault_min: Duration::from_millis(1),
        })?;
        // It takes a while to read the kernel's symbols.
        let mut translator = Translator::new();
        let began_monotonic = monotonic();
        let now = Instant::now();
        translator.count_from(began_monotonic);
        Ok(Observer {
            session,
            translator,
            model: Model::new(SUMS_EVERY.as_nanos() as Nanos),
            sinks: Vec::new(),
            began: now,
            began_monotonic,
            over: None,
            began_system: SystemTime::now(),
            command: Vec::new(),
            other_mounts: false,
            alive: BTreeSet::new(),
            before: HashMap::new(),
            ended: HashSet::new(),
            next_sums: now + SUMS_EVERY,
            next_look: now + LOOK_EVERY,
            losses: raw::Losses::default(),
            failure: None,
        })
    }

    /// Tracepoints that the observer does without: the kernel lacks them, or this user may not use them.
    pub fn missing(&self) -> &[String] {
        &self.session.missing
    }

    /// Watches a process that runs.
    ///
    /// # Errors
    ///
    /// A sentence, when there is no such process.
    pub fn watch(&mut self, pid: u32) -> anyhow::Result<()> {
        let name = process::name(pid)?;
        self.session.watch(pid, raw::TARGET_WATCHED)?;
        self.alive.insert(pid);
        let mounts = |of: &str| std::fs::read_link(format!("/proc/{of}/ns/mnt")).ok();
        self.other_mounts |= mounts(&pid.to_string()) != mounts("self");
        let at = self.elapsed();
        self.tell(&[
            Event::Thread(Thread {
                at,
                tid: pid,
                pid,
                name,
            }),
            Event::Process(Process {
                at,
                pid,
                change: ProcessChange::Watched,
            }),
        ]);
        Ok(())
    }

    /// Runs a command, and watches it from its first instruction on.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn spawn(
        &mut self,
        command: &mut std::process::Command,
    ) -> anyhow::Result<std::process::Child> {
        // What this process forks is watched: the kernel's part sees the fork before the child runs.
        let own = std::process::id();
        self.session.watch(own, raw::TARGET_CHILDREN)?;
        let child = command.spawn();
        self.session.unwatch(own);
        let child =
            child.with_context(|| format!("cannot start {}", printable(command.get_program())))?;
        self.command = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(|a| printable(a).to_string())
            .collect();
        self.alive.insert(child.id());
        Ok(child)
    }

    /// Gives every event from now on to a sink as well.
    pub fn record(&mut self, sink: Sink) {
        self.sinks.push(sink);
    }

    /// What a trace of this observation begins with.
    pub fn header(&self, targets: &[u32], command: &[String]) -> Header {
        let unix = self.began_system.duration_since(SystemTime::UNIX_EPOCH);
        Header {
            writer: concat!("faultless ", env!("CARGO_PKG_VERSION")).to_owned(),
            kernel: crate::kernel_release(),
            machine: std::env::consts::ARCH.to_owned(),
            processors: crate::processors(),
            page_size: 4096,
            began_unix: unix.map_or(0, |d| d.as_nanos() as u64),
            began_monotonic: self.began_monotonic,
            targets: targets.to_vec(),
            command: command.to_vec(),
            wait_min: WAIT_MIN.as_nanos() as Nanos,
            hold_min: HOLD_MIN.as_nanos() as Nanos,
            missing: self.session.missing.clone(),
        }
    }

    /// Takes in what happened; waits for a while if there is nothing.
    pub fn tick(&mut self, wait: Duration) {
        let records = self.session.records(wait);
        self.take_in(&records);
        let now = Instant::now();
        if now >= self.next_sums {
            self.sums();
            let took = now.elapsed();
            self.next_sums = now + SUMS_EVERY.max(took * SUMS_SHARE);
            self.note_losses();
        }
        if now >= self.next_look {
            self.next_look = now + LOOK_EVERY;
            self.look_for_the_ended();
        }
    }

    fn take_in(&mut self, records: &[Raw]) {
        let mut events = Vec::new();
        for record in records {
            if let Raw::Task(task) = record {
                match task.what {
                    raw::task::FORK => {
                        self.alive.insert(task.header.pid);
                        self.ended.remove(&task.header.tid);
                    }
                    raw::task::SEEN | raw::task::EXEC => {
                        self.ended.remove(&task.header.tid);
                    }
                    raw::task::EXIT => {
                        self.ended.insert(task.header.tid);
                    }
                    _ => {}
                }
            }
            let session = &self.session;
            self.translator
                .translate(record, &|id| session.stack(id), &mut |e| events.push(e));
        }
        self.tell(&events);
    }

    /// A sink that fails gets nothing more; the observation goes on.
    fn tell(&mut self, events: &[Event]) {
        for event in events {
            self.model.event(event);
            let failure = &mut self.failure;
            self.sinks.retain_mut(|sink| match sink(event) {
                Ok(()) => true,
                Err(e) => {
                    failure.get_or_insert(e);
                    false
                }
            });
        }
    }

    /// Why a sink failed, if one did.
    pub fn failure(&mut self) -> Option<anyhow::Error> {
        self.failure.take()
    }

    /// Reads the kernel's sums, and adds what is new in them.
    fn sums(&mut self) {
        let until = self.elapsed();
        let mut news: Vec<(u32, u32, Option<FileNo>, FaultSums)> = Vec::new();
        let mut over = Vec::new();
        let (session, before) = (&self.session, &mut self.before);
        let (translator, ended) = (&mut self.translator, &self.ended);
        let mut files = Vec::new();
        session.tallies(|key, tally| {
            let now = FaultSums::from(&tally);
            let old = before.entry((key.tid, key.pid, key.file)).or_default();
            let mut new = now.clone();
            new.subtract(old);
            if new.faults > 0 {
                *old = now;
                let file = translator.file(key.file, &mut |e| files.push(e));
                // The kernel's rest, by processor, is one row.
                let tid = if key.pid == 0 { 0 } else { key.tid };
                news.push((tid, key.pid, file, new));
            } else if key.pid != 0 && ended.contains(&key.tid) {
                over.push(key);
            }
        });
        for key in over {
            self.session.forget(key);
            self.before.remove(&(key.tid, key.pid, key.file));
        }
        if self.ended.len() > 1 << 16 {
            self.ended.clear();
        }
        self.tell(&files);
        for (tid, pid, file, new) in news {
            self.model.add_faults(tid, pid, file, &new, until);
        }
    }

    fn note_losses(&mut self) {
        let now = self.session.losses();
        // (A file whose name did not come goes by its number; nothing else is lost with it.)
        let all = |l: &raw::Losses| l.ring + l.tallies + l.threads + l.targets + l.slots;
        let (records, before) = (all(&now), all(&self.losses));
        self.losses = now;
        if records > before {
            let at = self.elapsed();
            self.tell(&[Event::Lost(Lost {
                at,
                records: records - before,
            })]);
        }
    }

    fn look_for_the_ended(&mut self) {
        let session = &self.session;
        self.alive.retain(|&pid| {
            let alive = is_alive(pid);
            if !alive {
                session.unwatch(pid);
            }
            alive
        });
    }

    /// Whether one of the watched processes lives.
    pub fn is_anyone_there(&self) -> bool {
        !self.alive.is_empty()
    }

    /// Time since the beginning, or how long it was.
    pub fn elapsed(&self) -> Nanos {
        self.over
            .unwrap_or_else(|| self.began.elapsed().as_nanos() as Nanos)
    }

    /// What is known by now; with `recent`, convoys of the time since then alone.
    pub fn report(&self, recent: Option<Duration>) -> Report {
        let since = recent.map(|r| self.elapsed().saturating_sub(r.as_nanos() as Nanos).max(1));
        report::report(&self.model, self.observed(), since)
    }

    /// Waits and holds that go on just now, the longest first, in a line each.
    pub fn going_on(&mut self) -> Vec<String> {
        let open = self.session.going_on();
        let mut events = Vec::new();
        let session = &self.session;
        for record in &open {
            self.translator
                .translate(record, &|id| session.stack(id), &mut |e| events.push(e));
        }
        // Names are told once, so everybody must hear them.
        let (names, open): (Vec<Event>, Vec<Event>) = events
            .into_iter()
            .partition(|e| matches!(e, Event::File(_) | Event::Stack(_)));
        self.tell(&names);
        report::going_on(&self.model, &open)
    }

    fn observed(&self) -> Observed {
        let unix = self.began_system.duration_since(SystemTime::UNIX_EPOCH);
        Observed {
            processes: report::processes(&self.model),
            processes_seen: self.model.processes_seen,
            command: self.command.clone(),
            other_mounts: self.other_mounts,
            seconds: self.elapsed() as f64 / 1e9,
            began_unix: unix.map_or(0.0, |d| d.as_secs_f64()),
            began_monotonic: self.began_monotonic as f64 / 1e9,
            kernel: crate::kernel_release(),
            processors: crate::processors(),
            missing: self.session.missing.clone(),
            own_cpu_seconds: crate::own_cpu_seconds(),
        }
    }

    /// Ends the observation: takes in the rest, what goes on just now included, and reports.
    pub fn finish(&mut self) -> Report {
        // From here on nothing changes any more, so nothing is told twice.
        let now = monotonic();
        self.session.end(now);
        self.over = Some(now.saturating_sub(self.began_monotonic));
        loop {
            let records = self.session.records(Duration::ZERO);
            if records.is_empty() {
                break;
            }
            self.take_in(&records);
        }
        let mut open = self.session.going_on();
        // Holds first: they explain the waits; then writers, who stop readers.
        open.sort_by_key(|r| match r {
            Raw::Hold(_) => 0,
            Raw::Wait(w) if w.flags & raw::lock::WRITE != 0 => 1,
            Raw::Wait(_) => 2,
            _ => 3,
        });
        self.take_in(&open);
        self.sums();
        self.note_losses();
        let at = self.elapsed();
        self.tell(&[Event::Ended(Ended { at })]);
        self.report(None)
    }
}

impl From<&raw::Tally> for FaultSums {
    fn from(t: &raw::Tally) -> Self {
        FaultSums {
            faults: t.faults,
            major: t.major,
            gone: t.gone,
            total: t.total,
            longest: t.longest,
            first: t.first,
            wait: t.wait,
            retry: t.retry,
            retry_asleep: t.retry_asleep,
            causes: t.causes,
            buckets: t.buckets.map(u64::from),
        }
    }
}

/// Whether a thread of a process lives; its first one may have ended before the others.
fn is_alive(pid: u32) -> bool {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return false;
    };
    threads.flatten().any(|thread| {
        let stat = kernel_text(thread.path().join("stat")).unwrap_or_default();
        let state = stat
            .rsplit(')')
            .next()
            .and_then(|rest| rest.trim_start().chars().next());
        state.is_some_and(|s| !matches!(s, 'Z' | 'X'))
    })
}

#[allow(unsafe_code, reason = "clock_gettime(2)")]
fn monotonic() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: fills the structure.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
