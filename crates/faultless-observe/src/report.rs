//! The answer, as data: what `--json` prints, and what tables and the page are made of.

use crate::doctor::version;
use crate::model::{self, Blame, Convoy, Doer, Model, Queued, Victim, What};
use crate::names;
use crate::sums::{FaultSums, PARTS, Part, Parts, bucket_bounds};
use faultless_trace::{CAUSES, Cause, Doing, FileNo, Hold, Nanos};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// Names the layout of [`Report`]; it changes when a reader of the former would misread the latter.
pub const SCHEMA: &str = "faultless.observe/1";

/// Rows of a table that are kept; what is left out is counted in the sums.
const ROWS_MAX: usize = 100;

/// What is said where [`Observed::other_mounts`].
pub const OTHER_MOUNTS: &str = "a watched process sees other mounts than this command: files have the names that it knows them by, which here may name other files, or none";

/// What the bounds of all times are.
const BOUNDS: &str = "times are between the kernel's tracepoints: a lock counts as held from just after it was taken to just before it is let go, so hand-overs look a little longer, and holds a little shorter, than they are";

/// Everything that was found. Times are in milliseconds unless their names say otherwise.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// What was watched.
    pub observed: Observed,
    /// The verdict in words, and what would help.
    pub verdict: Verdict,
    /// Page faults that slept or took mmap_lock.
    pub faults: Faults,
    /// Waits of system calls (and of whatever else is no fault) for mmap_lock, of at least 20 µs each.
    pub calls: Calls,
    /// Faults by group of threads: those of a process whose names differ in digits alone.
    pub groups: Vec<Group>,
    /// Faults by file.
    pub files: Vec<FileRow>,
    /// Who kept others waiting for mmap_lock, and for how long.
    pub blame: Vec<BlameRow>,
    /// The worst convoys: waits of at least a millisecond, grouped by the hold that most of their time was due to.
    pub convoys: Vec<ConvoyRow>,
    /// How many convoys there were in all.
    pub convoys_seen: u64,
    /// Reads from storage, where they were recorded one by one (`--trace`, `--perfetto`).
    pub reads: Reads,
    /// What was lost, or could not be explained.
    pub doubts: DoubtRow,
    /// What the times mean.
    pub bounds: &'static str,
    /// Time by thread.
    #[serde(skip)]
    pub timeline: Timeline,
}

/// What was watched.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Observed {
    /// The processes, as far as there is room.
    pub processes: Vec<ProcessRow>,
    /// How many there were.
    pub processes_seen: u64,
    /// The command that was run, if one was.
    pub command: Vec<String>,
    /// A process that was watched sees other mounts than the observer did: the names of its files may name others here, or none.
    pub other_mounts: bool,
    /// For how long.
    pub seconds: f64,
    /// When it began, in seconds since 1970.
    pub began_unix: f64,
    /// The kernel's release.
    pub kernel: String,
    /// When it began, in seconds of CLOCK_MONOTONIC.
    pub began_monotonic: f64,
    /// Processors online.
    pub processors: u32,
    /// Tracepoints that this kernel lacks.
    pub missing: Vec<String>,
    /// Processor time that the observer took itself, in seconds: in its process, and not in the kernel's tracepoints.
    pub own_cpu_seconds: f64,
}

/// A process.
#[derive(Debug, Clone, Serialize)]
pub struct ProcessRow {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub name: String,
}

/// Time by what it went to. Keys: device, page_lock, other_lock, reclaim, runnable, asleep, mmap_lock_behind_writer,
/// mmap_lock_behind_reader, mmap_lock_hand_over, running.
pub type TimeBy = BTreeMap<&'static str, f64>;

/// Page faults.
#[derive(Debug, Clone, Serialize)]
pub struct Faults {
    /// How many slept or took mmap_lock.
    pub stalled: u64,
    /// How many the kernel calls major: something had to be read.
    pub major: u64,
    /// Major faults in a second.
    pub major_per_second: f64,
    /// Of all these, those that had not ended.
    pub open: u64,
    /// Those whose page had gone when they were tried again, and was read a second time under mmap_lock.
    pub gone_at_retry: u64,
    /// Their time, all together.
    pub total_ms: f64,
    /// Before mmap_lock was asked for.
    pub first_attempt_ms: f64,
    /// Waiting for mmap_lock.
    pub lock_wait_ms: f64,
    /// Under mmap_lock.
    pub retry_ms: f64,
    /// Of that, asleep.
    pub retry_asleep_ms: f64,
    /// By what it went to.
    pub time_ms: TimeBy,
    /// How long a fault takes.
    pub latency_us: Quantiles,
    /// Counts by duration: `[from_us, to_us, faults]`; four buckets to an octave.
    pub histogram: Vec<(f64, f64, u64)>,
}

/// Durations that a share of all does not exceed, in microseconds; upper bounds of buckets that are 25 % wide.
#[derive(Debug, Clone, Serialize)]
pub struct Quantiles {
    /// Half of all.
    pub p50: f64,
    /// 90 %.
    pub p90: f64,
    /// 99 %.
    pub p99: f64,
    /// 99.9 %.
    pub p999: f64,
    /// The longest, exactly.
    pub max: f64,
}

/// Waits of system calls.
#[derive(Debug, Clone, Serialize)]
pub struct Calls {
    /// How many.
    pub waits: u64,
    /// Their time.
    pub total_ms: f64,
    /// By what it went to.
    pub time_ms: TimeBy,
    /// Waits of others for the same locks: neighbours, and the kernel's threads. They are in no other sum.
    pub neighbours_ms: f64,
}

/// A group of threads.
#[derive(Debug, Clone, Serialize)]
pub struct Group {
    /// Its process.
    pub pid: u32,
    /// The name of that.
    pub process: String,
    /// The threads' name; a `*` stands for digits.
    pub name: String,
    /// How many threads.
    pub threads: usize,
    /// Stalled faults.
    pub stalled: u64,
    /// Major faults.
    pub major: u64,
    /// Time in them.
    pub total_ms: f64,
    /// Waiting for mmap_lock.
    pub lock_wait_ms: f64,
    /// In reads, their own and others' of the same page.
    pub device_ms: f64,
    /// Waiting for a processor.
    pub runnable_ms: f64,
    /// Waits of system calls for mmap_lock, of at least 20 µs each.
    pub call_waits: u64,
    /// Their time.
    pub call_wait_ms: f64,
    /// How long a fault takes.
    pub latency_us: Quantiles,
}

/// A file.
#[derive(Debug, Clone, Serialize)]
pub struct FileRow {
    /// Its path; "(no file)" for anonymous memory.
    pub path: String,
    /// Stalled faults.
    pub stalled: u64,
    /// Major faults.
    pub major: u64,
    /// Whose page had gone at the retry.
    pub gone_at_retry: u64,
    /// Time in them.
    pub total_ms: f64,
    /// Waiting for mmap_lock.
    pub lock_wait_ms: f64,
    /// In reads.
    pub device_ms: f64,
    /// How long a fault takes.
    pub latency_us: Quantiles,
}

/// Somebody who kept others waiting.
#[derive(Debug, Clone, Serialize)]
pub struct BlameRow {
    /// The threads' name; a `*` stands for digits.
    pub who: String,
    /// Their process, or one of them.
    pub pid: u32,
    /// It is not one of the watched processes.
    pub neighbour: bool,
    /// What they did with the lock.
    pub what: String,
    /// Time that others waited for them.
    pub victim_ms: f64,
    /// Of that, in faults.
    pub victim_fault_ms: f64,
    /// Its share of all time that was waited for mmap_lock.
    pub share: f64,
    /// Waits that they had a part in.
    pub waits: u64,
    /// Holds that were seen: long ones, and those that others waited for.
    pub holds: u64,
    /// Their time.
    pub held_ms: f64,
    /// The longest.
    pub longest_ms: f64,
    /// Time in which they had been given the lock, and had no processor to take it; others waited for them all the same.
    pub granted_ms: f64,
    /// Where the holders themselves got no further: device, page_lock, other_lock, reclaim, runnable, asleep; the rest is
    /// running.
    pub holder_time_ms: TimeBy,
    /// What kernel stacks say of the holders' longest sleeps, and which threads kept them from mappings.
    pub asleep_ms: BTreeMap<String, f64>,
}

/// Somebody who held the lock or waited for it.
#[derive(Debug, Clone, Serialize)]
pub struct Deed {
    /// Thread.
    pub tid: u32,
    /// Process.
    pub pid: u32,
    /// The thread's name.
    pub thread: String,
    /// What it did: a system call, a page fault, a read of a file of /proc.
    pub what: String,
    /// With what: an address and a length, or the file and offset of a page.
    pub detail: String,
    /// For writing.
    pub write: bool,
    /// From, since the beginning.
    pub at_ms: f64,
    /// For how long.
    pub ms: f64,
}

/// A convoy.
#[derive(Debug, Clone, Serialize)]
pub struct ConvoyRow {
    /// When its first wait began.
    pub at_ms: f64,
    /// Until the last one ended.
    pub ms: f64,
    /// What its waits took, together.
    pub victim_ms: f64,
    /// How many waits.
    pub waits: u64,
    /// The process whose mmap_lock it is.
    pub lock_of: u32,
    /// Who held it.
    pub holder: Deed,
    /// What the holder did with its time.
    pub holder_was: String,
    /// The file whose page the holder slept for.
    pub holder_file: Option<String>,
    /// The kernel stack of its longest sleep.
    pub holder_stack: Vec<String>,
    /// If that was a wait for the lock of a VMA: the last thread that had to let go of that lock. (It need not have had mmap_lock.)
    pub kept_by: Option<Keeper>,
    /// The hold had not ended.
    pub goes_on: bool,
    /// The writer that was queued behind readers and stopped later ones.
    pub writer: Option<Deed>,
    /// Those who waited, the longest first.
    pub victims: Vec<VictimRow>,
    /// All that in a sentence.
    pub sentence: String,
}

/// A thread that used a VMA which a holder of mmap_lock wanted to change.
#[derive(Debug, Clone, Serialize)]
pub struct Keeper {
    /// Thread.
    pub tid: u32,
    /// Process.
    pub pid: u32,
    /// The thread's name.
    pub thread: String,
    /// What it did: a system call, a page fault, a read of a file of /proc.
    pub what: String,
    /// How long the holder slept for it.
    pub ms: f64,
}

/// A wait in a convoy.
#[derive(Debug, Clone, Serialize)]
pub struct VictimRow {
    /// Who waited, for what.
    #[serde(flatten)]
    pub deed: Deed,
    /// Of a fault: how long it tried before it asked for the lock for the last time. A fault that finds the mapping locked asks
    /// immediately, gives the lock up to read, and asks again; then this time lies behind the wait.
    pub first_attempt_ms: Option<f64>,
    /// Of that, in reads.
    pub io_ms: Option<f64>,
    /// Of a fault: the page had gone when it had the lock.
    pub gone_at_retry: Option<bool>,
    /// It was still waiting.
    pub goes_on: bool,
}

/// Reads from storage.
#[derive(Debug, Clone, Serialize)]
pub struct Reads {
    /// Requests.
    pub requests: u64,
    /// Bytes.
    pub bytes: u64,
    /// How long one takes, on average.
    pub mean_us: f64,
    /// The longest.
    pub max_us: f64,
}

/// What could not be told.
#[derive(Debug, Clone, Serialize)]
pub struct DoubtRow {
    /// Records that did not fit the ring, or a map.
    pub lost: u64,
    /// Acquisitions and releases without their counterpart.
    pub strays: u64,
    /// Waits at whose beginning the lock word named a writer.
    pub checked: u64,
    /// Of those: where the reconstruction had another one.
    pub out_of_step: u64,
    /// Waits for which no holder was seen.
    pub unexplained_ms: f64,
    /// All waits that were told singly.
    pub waited_ms: f64,
    /// The trace was cut off: this is what there is of it.
    pub cut_off: bool,
}

/// In plain words.
#[derive(Debug, Clone, Serialize)]
pub struct Verdict {
    /// Some sentences.
    pub text: String,
    /// Time in which threads of the watched processes got no further: in faults and for mmap_lock.
    pub stalled_ms: f64,
    /// What would remove some of it, the most helpful first.
    pub remedies: Vec<Remedy>,
}

/// Something to do.
#[derive(Debug, Clone, Serialize)]
pub struct Remedy {
    /// What.
    pub text: String,
    /// The time that it concerns.
    pub ms: f64,
    /// Its share of the stalled time. Shares overlap.
    pub share: f64,
}

/// Time by thread.
#[derive(Debug, Clone, Default)]
pub struct Timeline {
    /// Width of a bin.
    pub bin_ms: f64,
    /// One for each thread, the most stalled first.
    pub lanes: Vec<LaneRow>,
}

/// A thread's time.
#[derive(Debug, Clone)]
pub struct LaneRow {
    /// The thread.
    pub tid: u32,
    /// Its process.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// For each bin, the share of it that went to each part.
    pub bins: Vec<[f32; PARTS]>,
    /// All its time, by part, in milliseconds.
    pub parts_ms: [f64; PARTS],
}

/// The processes that were watched.
pub(crate) fn processes(model: &Model) -> Vec<ProcessRow> {
    let row = |&pid: &u32| ProcessRow {
        pid,
        name: model.process_name(pid).to_owned(),
    };
    model.processes.iter().map(row).collect()
}

pub(crate) fn ms(ns: Nanos) -> f64 {
    (ns as f64 / 1e3).round() / 1e3
}

fn time_by(parts: &Parts) -> TimeBy {
    Part::ALL
        .into_iter()
        .map(|p| (p.key(), ms(parts[p as usize])))
        .collect()
}

fn quantiles(sums: &FaultSums) -> Quantiles {
    let us = |share| sums.quantile(share) as f64 / 1e3;
    Quantiles {
        p50: us(0.5),
        p90: us(0.9),
        p99: us(0.99),
        p999: us(0.999),
        max: sums.longest as f64 / 1e3,
    }
}

fn device(sums: &FaultSums) -> Nanos {
    sums.causes[Cause::Device as usize] + sums.causes[Cause::Page as usize]
}

/// Makes a report of what a model knows. `recent`: convoys since an instant alone.
pub(crate) fn report(model: &Model, observed: Observed, recent: Option<Nanos>) -> Report {
    let seconds = observed.seconds.max(1e-9);
    let all = model.fault_total();
    let parts = model.fault_parts();
    let blame = blame(model);
    let convoys: Vec<ConvoyRow> = model
        .worst_convoys(recent.unwrap_or(0))
        .into_iter()
        .take(ROWS_MAX)
        .map(|c| convoy(model, c))
        .collect();
    let verdict = verdict(model, &observed, &all, &parts, &blame);
    Report {
        schema: SCHEMA,
        verdict,
        faults: Faults {
            stalled: all.faults,
            major: all.major,
            major_per_second: (all.major as f64 / seconds * 10.0).round() / 10.0,
            open: model.open_faults,
            gone_at_retry: all.gone,
            total_ms: ms(all.total),
            first_attempt_ms: ms(all.first),
            lock_wait_ms: ms(all.wait),
            retry_ms: ms(all.retry),
            retry_asleep_ms: ms(all.retry_asleep),
            time_ms: time_by(&parts),
            latency_us: quantiles(&all),
            histogram: histogram(&all),
        },
        calls: Calls {
            waits: model.calls,
            total_ms: ms(model.call_waits.iter().sum()),
            time_ms: time_by(&model.call_waits),
            neighbours_ms: ms(model.neighbour_waits),
        },
        groups: groups(model),
        files: files(model),
        blame,
        convoys,
        convoys_seen: model.convoys,
        reads: Reads {
            requests: model.io.requests,
            bytes: model.io.bytes,
            mean_us: model.io.took as f64 / 1e3 / model.io.requests.max(1) as f64,
            max_us: model.io.longest as f64 / 1e3,
        },
        doubts: DoubtRow {
            lost: model.doubts.lost,
            strays: model.doubts.strays,
            checked: model.doubts.checked,
            out_of_step: model.doubts.out_of_step,
            unexplained_ms: ms(model.doubts.unexplained),
            waited_ms: ms(model.doubts.waited),
            cut_off: model.cut_off,
        },
        bounds: BOUNDS,
        // What is shown twice a second has no use for it.
        timeline: match recent {
            None => timeline(model),
            Some(_) => Timeline::default(),
        },
        observed,
    }
}

fn histogram(sums: &FaultSums) -> Vec<(f64, f64, u64)> {
    let filled = |n: &(usize, &u64)| *n.1 > 0;
    let first = sums.buckets.iter().enumerate().find(filled).map(|n| n.0);
    let last = sums.buckets.iter().enumerate().rev().find(filled);
    let (Some(first), Some((last, _))) = (first, last) else {
        return Vec::new();
    };
    (first..=last)
        .map(|b| {
            let (from, to) = bucket_bounds(b);
            (from as f64 / 1e3, to as f64 / 1e3, sums.buckets[b])
        })
        .collect()
}

fn groups(model: &Model) -> Vec<Group> {
    #[derive(Default)]
    struct Sums {
        threads: BTreeSet<u32>,
        faults: FaultSums,
        calls: (u64, Nanos),
    }
    let mut all: BTreeMap<(u32, String), Sums> = BTreeMap::new();
    let of = |pid, tid| (pid, model::group(model.thread_name(tid)));
    for (&(pid, tid, _), sums) in &model.faults {
        let group = all.entry(of(pid, tid)).or_default();
        group.threads.insert(tid);
        group.faults.add(sums);
    }
    for (&(pid, tid), calls) in &model.calls_of {
        let group = all.entry(of(pid, tid)).or_default();
        group.threads.insert(tid);
        group.calls.0 += calls.0;
        group.calls.1 += calls.1;
    }
    let mut rows: Vec<Group> = all
        .into_iter()
        .map(|((pid, name), sums)| Group {
            pid,
            process: model.process_name(pid).to_owned(),
            name,
            threads: sums.threads.len(),
            stalled: sums.faults.faults,
            major: sums.faults.major,
            total_ms: ms(sums.faults.total),
            lock_wait_ms: ms(sums.faults.wait),
            device_ms: ms(device(&sums.faults)),
            runnable_ms: ms(sums.faults.causes[Cause::Cpu as usize]),
            call_waits: sums.calls.0,
            call_wait_ms: ms(sums.calls.1),
            latency_us: quantiles(&sums.faults),
        })
        .collect();
    rows.sort_by(|a, b| (b.total_ms + b.call_wait_ms).total_cmp(&(a.total_ms + a.call_wait_ms)));
    rows.truncate(ROWS_MAX);
    rows
}

fn files(model: &Model) -> Vec<FileRow> {
    let mut all: BTreeMap<Option<FileNo>, FaultSums> = BTreeMap::new();
    for (&(_, _, file), sums) in &model.faults {
        all.entry(file).or_default().add(sums);
    }
    let mut rows: Vec<FileRow> = all
        .into_iter()
        .map(|(file, sums)| FileRow {
            path: file.map_or("(no file)", |f| model.file_name(f)).to_owned(),
            stalled: sums.faults,
            major: sums.major,
            gone_at_retry: sums.gone,
            total_ms: ms(sums.total),
            lock_wait_ms: ms(sums.wait),
            device_ms: ms(device(&sums)),
            latency_us: quantiles(&sums),
        })
        .collect();
    rows.sort_by(|a, b| b.total_ms.total_cmp(&a.total_ms));
    rows.truncate(ROWS_MAX);
    rows
}

fn causes_by(causes: &[Nanos; CAUSES]) -> TimeBy {
    Part::ALL
        .into_iter()
        .zip(causes)
        .filter(|(_, ns)| **ns > 0)
        .map(|(p, &ns)| (p.key(), ms(ns)))
        .collect()
}

fn blame(model: &Model) -> Vec<BlameRow> {
    let waited = model.doubts.waited.max(1) as f64;
    let mut rows: Vec<BlameRow> = model
        .blames
        .iter()
        .filter(|(_, b)| b.of_faults + b.of_calls > 0)
        .map(|(doer, b)| BlameRow {
            who: doer.group.clone(),
            pid: b.pid,
            neighbour: doer.target.is_none(),
            what: doer.what.to_string(),
            victim_ms: ms(b.of_faults + b.of_calls),
            victim_fault_ms: ms(b.of_faults),
            share: (b.of_faults + b.of_calls) as f64 / waited,
            waits: b.waits,
            holds: b.holds,
            held_ms: ms(b.held),
            longest_ms: ms(b.longest),
            granted_ms: ms(b.granted),
            holder_time_ms: causes_by(&b.causes),
            asleep_ms: b.sleeps.iter().map(|(k, &v)| (k.clone(), ms(v))).collect(),
        })
        .collect();
    rows.sort_by(|a, b| b.victim_ms.total_cmp(&a.victim_ms));
    rows.truncate(ROWS_MAX);
    rows
}

fn what(doing: Doing, reads: &str) -> String {
    match doing {
        Doing::Call(_) if !reads.is_empty() => match reads.split_once('/') {
            Some((pid, file)) if pid.parse::<u32>().is_ok() => {
                format!("read of /proc/{pid}/{file}")
            }
            _ => format!("read of {reads}"),
        },
        Doing::Call(no) => names::call(no),
        Doing::CallFault(no) => format!("page fault in {}", names::call(no)),
        Doing::Fault => "page fault".to_owned(),
        Doing::KernelThread => "kernel thread".to_owned(),
        Doing::Unknown => "unknown".to_owned(),
    }
}

/// System calls whose second argument is a length.
const WITH_LENGTH: [u16; 8] = [9, 10, 11, 25, 27, 28, 149, 150];

fn bytes(n: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = n as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() == 0.0 || unit == 0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// What a fault or a call was about.
fn detail(
    model: &Model,
    doing: Doing,
    address: u64,
    length: u64,
    file: Option<FileNo>,
    page: u64,
) -> String {
    match (doing, file) {
        (Doing::Fault | Doing::CallFault(_), Some(file)) => {
            format!("{} at {:#x}", model.file_name(file), page << 12)
        }
        (Doing::Fault | Doing::CallFault(_), None) => format!("{address:#x}"),
        (Doing::Call(no), _) if WITH_LENGTH.contains(&no) => bytes(length),
        _ => String::new(),
    }
}

fn holder_deed(model: &Model, hold: &Hold) -> Deed {
    Deed {
        tid: hold.tid,
        pid: hold.pid,
        thread: model.thread_name(hold.tid).to_owned(),
        what: what(hold.doing, &hold.reads),
        detail: detail(
            model,
            hold.doing,
            hold.address,
            hold.length,
            hold.file,
            hold.page,
        ),
        write: hold.write,
        at_ms: ms(hold.at),
        ms: ms(hold.took),
    }
}

/// The thread that kept a holder from a mapping, if it slept for one.
fn keeper_of(hold: &Hold) -> Option<Keeper> {
    hold.kept_by.as_ref().map(|by| Keeper {
        tid: by.tid,
        pid: by.pid,
        thread: model::printable(&by.name),
        what: what(by.doing, &model::printable(&by.reads)),
        ms: ms(hold.longest_sleep),
    })
}

/// What a holder did with its time, the largest part first.
fn holder_was(model: &Model, hold: &Hold) -> String {
    let elsewhere: Nanos = hold.causes.iter().sum();
    let mut parts: Vec<(Nanos, String)> =
        vec![(hold.took.saturating_sub(elsewhere), "running".to_owned())];
    for (cause, &ns) in Cause::ALL.into_iter().zip(&hold.causes) {
        // (Of many short sleeps, the longest says too little.)
        let kept = || {
            let keeper = keeper_of(hold).filter(|_| 2 * hold.longest_sleep >= ns)?;
            let thread = format!("{} ({})", keeper.thread, keeper.tid);
            Some(model::kept(&thread, &keeper.what))
        };
        let asleep = || kept().or_else(|| Some(model::asleep_in(model.stack(hold.stack?))));
        let text = match cause {
            Cause::Device | Cause::Page => {
                let own_read = || {
                    hold.stack.is_some_and(|s| {
                        model
                            .stack(s)
                            .iter()
                            .any(|f| f.starts_with("filemap_read_folio"))
                    })
                };
                let how = if cause == Cause::Device || own_read() {
                    "reading"
                } else {
                    "waiting for others to read"
                };
                match hold.file {
                    Some(file) => {
                        format!("{how} {} at {:#x}", model.file_name(file), hold.page << 12)
                    }
                    None => format!("{how} a page"),
                }
            }
            Cause::Lock => "waiting for another lock".to_owned(),
            Cause::Reclaim => "reclaiming memory".to_owned(),
            Cause::Cpu => "without a processor".to_owned(),
            Cause::Other => asleep().unwrap_or_else(|| "asleep".to_owned()),
        };
        parts.push((ns, text));
    }
    parts.retain(|p| p.0 * 10 >= hold.took && p.0 > 0);
    parts.sort_by_key(|p| std::cmp::Reverse(p.0));
    match parts.len() {
        0 => "running".to_owned(),
        1 => parts.swap_remove(0).1,
        _ => {
            let share = |ns: Nanos| 100 * ns / hold.took.max(1);
            let all: Vec<String> = parts
                .iter()
                .map(|(ns, text)| format!("{text} ({} %)", share(*ns)))
                .collect();
            all.join(", ")
        }
    }
}

fn writer_deed(model: &Model, q: &Queued) -> Deed {
    Deed {
        tid: q.tid,
        pid: q.pid,
        thread: model.thread_name(q.tid).to_owned(),
        what: what(q.doing, ""),
        detail: detail(model, q.doing, q.address, q.length, None, 0),
        write: true,
        at_ms: ms(q.from),
        ms: ms(q.to - q.from),
    }
}

fn victim(model: &Model, v: &Victim) -> VictimRow {
    let wait = &v.wait;
    let fault = v.fault.as_ref();
    VictimRow {
        deed: Deed {
            tid: wait.tid,
            pid: wait.pid,
            thread: model.thread_name(wait.tid).to_owned(),
            what: what(wait.doing, ""),
            detail: detail(
                model,
                wait.doing,
                wait.address,
                wait.length,
                wait.file,
                wait.page,
            ),
            write: wait.write,
            at_ms: ms(wait.at),
            ms: ms(wait.took),
        },
        first_attempt_ms: fault.map(|f| ms(f.first)),
        io_ms: fault.map(|f| ms(f.causes[Cause::Device as usize] + f.causes[Cause::Page as usize])),
        gone_at_retry: fault.map(|f| f.gone),
        goes_on: wait.open,
    }
}

fn convoy(model: &Model, c: &Convoy) -> ConvoyRow {
    let holder = holder_deed(model, &c.hold);
    let was = holder_was(model, &c.hold);
    let writer = c.writer.as_ref().map(|w| writer_deed(model, w));
    let mut victims: Vec<VictimRow> = c.victims.iter().map(|v| victim(model, v)).collect();
    victims.sort_by(|a, b| b.deed.ms.total_cmp(&a.deed.ms));
    let longest = victims.first().map_or(0.0, |v| v.deed.ms);
    let who = |d: &Deed| match d.detail.as_str() {
        "" => format!("{} ({}) in {}", d.thread, d.tid, d.what),
        detail => format!("{} ({}) in {} of {}", d.thread, d.tid, d.what, detail),
    };
    let waits = match c.waits {
        1 => "A wait".to_owned(),
        n => format!("{n} waits"),
    };
    let together = match c.waits {
        1 => duration(longest),
        _ => format!(
            "{} together, up to {}",
            duration(ms(c.total)),
            duration(longest)
        ),
    };
    let mut sentence = format!(
        "{waits} for the mmap_lock of {} ({}) took {together}: {} held it for {}, {}, {was}",
        model.process_name(c.hold.target),
        c.hold.target,
        who(&holder),
        if c.hold.write { "writing" } else { "reading" },
        duration(holder.ms),
    );
    if c.hold.open {
        sentence.push_str(", and still does");
    }
    if let Some(writer) = &writer {
        sentence.push_str(&format!(
            "; {} was queued behind it and stopped later readers",
            who(writer)
        ));
    }
    sentence.push('.');
    ConvoyRow {
        at_ms: ms(c.from),
        ms: ms(c.to - c.from),
        victim_ms: ms(c.total),
        waits: c.waits,
        lock_of: c.hold.target,
        holder,
        holder_was: was,
        holder_file: c.hold.file.map(|f| model.file_name(f).to_owned()),
        holder_stack: c
            .hold
            .stack
            .map(|s| model.stack(s).to_vec())
            .unwrap_or_default(),
        kept_by: keeper_of(&c.hold),
        goes_on: c.hold.open,
        writer,
        victims,
        sentence,
    }
}

/// A duration for people.
pub fn duration(ms: f64) -> String {
    match ms {
        ms if ms >= 600_000.0 => format!("{:.0} min", ms / 60_000.0),
        ms if ms >= 10_000.0 => format!("{:.1} s", ms / 1_000.0),
        ms if ms >= 1_000.0 => format!("{:.2} s", ms / 1_000.0),
        ms if ms >= 10.0 => format!("{ms:.0} ms"),
        ms if ms >= 1.0 => format!("{ms:.1} ms"),
        ms => format!("{:.0} µs", ms * 1e3),
    }
}

fn percent(share: f64) -> String {
    match share * 100.0 {
        p if p >= 9.95 => format!("{p:.0} %"),
        p => format!("{p:.1} %"),
    }
}

fn timeline(model: &Model) -> Timeline {
    let bin = model.bin.max(1) as f32;
    let lanes = model
        .lanes()
        .into_iter()
        .map(|lane| {
            let mut bins: Vec<[f32; PARTS]> =
                lane.bins.iter().map(|b| b.map(|ns| ns / bin)).collect();
            // A fault is told when it ends, so its time may not fit the bin: it began before.
            for no in (1..bins.len()).rev() {
                let (earlier, this) = bins.split_at_mut(no);
                let sum: f32 = this[0].iter().sum();
                if sum > 1.0 {
                    for (part, before) in this[0].iter_mut().zip(&mut earlier[no - 1]) {
                        let over = *part * (1.0 - 1.0 / sum);
                        *part -= over;
                        *before += over;
                    }
                }
            }
            LaneRow {
                tid: lane.tid,
                pid: lane.pid,
                name: model.thread_name(lane.tid).to_owned(),
                bins,
                parts_ms: lane.parts.map(ms),
            }
        })
        .collect();
    Timeline {
        bin_ms: ms(model.bin),
        lanes,
    }
}

/// System calls that change the address space, and what to do about them.
fn advice(doer: &Doer, blame: &Blame, kernel: &str) -> String {
    let who = &doer.group;
    let cpu = blame.causes[Cause::Cpu as usize].saturating_add(blame.granted);
    let starved = cpu.saturating_mul(2) > blame.held.saturating_add(blame.granted);
    let preempted = if starved {
        " (most of the time it had the lock and no processor: more processors, or fewer threads, help as well)"
    } else {
        ""
    };
    match &doer.what {
        What::ProcFile(name) => format!(
            "Let {who} read /proc/PID/{name} of this process less often, or not at all: monitoring agents have a setting for it, and cgroup memory.stat or statm tell memory without the lock"
        ),
        What::Call(no) => {
            let call = names::call(*no);
            let how = match call.as_str() {
                "munmap" | "mmap" => {
                    "map once and keep it: reuse buffers, reserve one large region beforehand; for malloc raise M_MMAP_THRESHOLD and M_TRIM_THRESHOLD"
                }
                "brk" => {
                    "keep the heap: raise malloc's M_TOP_PAD and M_TRIM_THRESHOLD, or use another allocator"
                }
                "fork" | "vfork" | "clone" | "clone3" => {
                    "start processes with posix_spawn or from a small helper process that was forked early; fork copies page tables with every VMA locked"
                }
                "mprotect" | "pkey_mprotect" => {
                    "change protections less often, or of fewer, larger regions"
                }
                "madvise" | "process_madvise" => {
                    "give memory back less often and in larger parts: the allocator's decay or background thread has a setting"
                }
                "exit" | "exit_group" => "end threads and processes less often: keep a pool",
                "execve" | "execveat" => "this happens once, at the start",
                _ => "do it less often, or in smaller parts",
            };
            format!("Fewer {call} calls by {who}: {how}{preempted}")
        }
        What::Fault { .. } if starved => format!(
            "More processors, or fewer threads: {who} had mmap_lock for page faults, and no processor to get done with them"
        ),
        What::Fault { .. } => {
            let or = match run_helps(kernel) {
                true => ", or `faultless run`, which reads without the lock",
                false => ", or Linux 6.9 and `faultless run`, which then reads without the lock",
            };
            format!(
                "Page faults of {who} hold mmap_lock while they read or allocate: more memory for the page cache (fewer pages gone at the retry){or}"
            )
        }
        What::KernelThread => {
            format!("{who} is a kernel thread: khugepaged and ksmd have settings in /sys/kernel/mm")
        }
        What::Unknown => {
            "Observe for longer: what the holder did is not known; most often it was there before the observation began".to_owned()
        }
    }
}

/// What to do about a thread that keeps a holder of mmap_lock from a VMA.
fn keeper_advice(holder: &Doer, thread: &str, what: &What) -> String {
    let less = match what {
        What::ProcFile(name) => {
            format!("Let {thread} read /proc/PID/{name} of this process less often, or not at all")
        }
        What::Call(no) => match names::call(*no).as_str() {
            call @ ("madvise" | "process_madvise") => {
                format!("Let {thread} call {call} for smaller parts")
            }
            call => format!("Fewer or shorter {call} calls of {thread}"),
        },
        What::Fault { .. } => format!("Fewer or shorter page faults of {thread}"),
        What::KernelThread | What::Unknown => format!("Less of what {thread} does"),
    };
    format!(
        "{less}: it uses a VMA, for which {} ({}) waits while it holds mmap_lock",
        holder.group, holder.what
    )
}

/// Whether `faultless run` serves programs on a kernel of this release.
fn run_helps(kernel: &str) -> bool {
    version(kernel) >= (6, 9)
}

fn verdict(
    model: &Model,
    observed: &Observed,
    all: &FaultSums,
    parts: &Parts,
    rows: &[BlameRow],
) -> Verdict {
    let lock = |p: &Parts| {
        p[Part::Writer as usize] + p[Part::Reader as usize] + p[Part::HandOver as usize]
    };
    let calls: Nanos = model.call_waits.iter().sum();
    let running = parts[Part::Running as usize];
    let stalled = parts.iter().sum::<Nanos>().saturating_sub(running) + calls;
    let share = |ns: Nanos| ns as f64 / stalled.max(1) as f64;
    let mut remedies: Vec<Remedy> = Vec::new();
    let mut add = |text: String, ns: Nanos| {
        if share(ns) >= 0.01 {
            remedies.push(Remedy {
                text,
                ms: ms(ns),
                share: share(ns),
            });
        }
    };
    for (doer, blame) in &model.blames {
        let victims = blame.of_faults + blame.of_calls;
        add(advice(doer, blame, &observed.kernel), victims);
        let told = blame.kept_by.iter().filter(|k| k.0.0 != "(others)");
        for ((thread, what), &kept) in told {
            let share = kept as f64 / blame.held.max(1) as f64;
            let ns = (victims as f64 * share.min(1.0)) as Nanos;
            add(keeper_advice(doer, thread, what), ns);
        }
    }
    let of_files: Nanos = model
        .faults
        .iter()
        .filter(|((_, _, file), _)| file.is_some())
        .map(|(_, sums)| sums.wait)
        .sum();
    let run = match run_helps(&observed.kernel) {
        true => {
            "Run the program under `faultless run`, or map its files with the library: misses in large file mappings then stay off mmap_lock (--dry-run says which those are)"
        }
        false => {
            "Use Linux 6.9 or later, and run the program under `faultless run`, or map its files with the library: misses in large file mappings then stay off mmap_lock"
        }
    };
    add(run.to_owned(), of_files);
    let storage = parts[Part::Device as usize] + parts[Part::Page as usize];
    add(
        "Faster storage, more memory, or reading ahead (madvise, prefetch): this is the time of the reads themselves".to_owned(),
        storage,
    );
    add(
        "More processors, or fewer threads: pages were there, and the threads waited to run"
            .to_owned(),
        parts[Part::Cpu as usize],
    );
    add(
        "More memory, or a higher limit of the cgroup: faults reclaimed memory themselves"
            .to_owned(),
        parts[Part::Reclaim as usize],
    );
    remedies.sort_by(|a, b| b.share.total_cmp(&a.share));

    let faults_lock = lock(parts);
    let spent = parts.iter().sum::<Nanos>().max(1) as f64;
    let mut text = Vec::new();
    if all.faults == 0 && calls == 0 && parts.iter().all(|&ns| ns == 0) {
        text.push("Nothing stalled: no page fault slept or took mmap_lock, and no system call waited for it.".to_owned());
    } else {
        text.push(format!(
            "In {} there were {} major faults ({:.0} a second); faults took {} of the threads' time together, {} of it waiting for mmap_lock and {} in reads.",
            duration(observed.seconds * 1e3),
            all.major,
            all.major as f64 / observed.seconds.max(1e-9),
            duration(ms(all.total)),
            percent(faults_lock as f64 / spent),
            percent(storage as f64 / spent),
        ));
        if calls > 0 {
            text.push(format!(
                "System calls waited {} for mmap_lock.",
                duration(ms(calls))
            ));
        }
        if let Some(first) = rows.first().filter(|r| r.share >= 0.05) {
            text.push(format!(
                "{} of all waiting for mmap_lock was behind {}{} in {}, held {} times for up to {}.",
                percent(first.share),
                first.who,
                if first.neighbour { format!(" (process {}, a neighbour)", first.pid) } else { String::new() },
                first.what,
                first.holds,
                duration(first.longest_ms),
            ));
        } else if share(storage) > 0.5 {
            text.push("Threads wait for storage, hardly for locks.".to_owned());
        }
        if model.open_faults > 0 {
            text.push(format!(
                "{} faults had not ended when the observation did.",
                model.open_faults
            ));
        }
        if all.gone > 0 {
            text.push(format!(
                "{} faults found their page gone when they had the lock, and read it again while they held it.",
                all.gone
            ));
        }
    }
    if model.cut_off {
        text.push("The trace was cut off: this is what there is of it.".to_owned());
    }
    if model.doubts.lost > 0 {
        text.push(format!(
            "{} records were lost, so sums of waits are too small.",
            model.doubts.lost
        ));
    }
    Verdict {
        text: text.join(" "),
        stalled_ms: ms(stalled),
        remedies,
    }
}

/// Waits and holds that have not ended, in a line each, the longest first.
pub(crate) fn going_on(model: &Model, events: &[faultless_trace::Event]) -> Vec<String> {
    use faultless_trace::Event;
    let mut lines: Vec<(Nanos, String)> = Vec::new();
    for event in events {
        match event {
            Event::Hold(h) => lines.push((
                h.took,
                format!(
                    "{} ({}) has held the mmap_lock of {} for {} for {}: {}, {}",
                    model.thread_name(h.tid),
                    h.tid,
                    h.target,
                    if h.write { "writing" } else { "reading" },
                    duration(ms(h.took)),
                    what(h.doing, &crate::model::printable(&h.reads)),
                    holder_was(model, h),
                ),
            )),
            Event::Wait(w) => lines.push((
                w.took,
                format!(
                    "{} ({}) has waited for the mmap_lock of {} for {}: {}",
                    model.thread_name(w.tid),
                    w.tid,
                    w.target,
                    duration(ms(w.took)),
                    what(w.doing, ""),
                ),
            )),
            _ => {}
        }
    }
    lines.retain(|l| l.0 >= model::CONVOY_MIN);
    lines.sort_by_key(|l| std::cmp::Reverse(l.0));
    lines.into_iter().map(|l| l.1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_faultless_run_serves_nothing_a_newer_kernel_is_part_of_the_remedy() {
        assert!(run_helps("6.18.44") && run_helps("7.3.4") && run_helps("6.9"));
        assert!(!run_helps("6.1.0-56-cloud-amd64") && !run_helps("5.15"));
    }
}
