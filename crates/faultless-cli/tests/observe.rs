//! `faultless observe` beside processes that know who kept whom waiting.
//!
//! The tests establish the truth without the observer, and never by how long something takes:
//!
//! * [`Watcher`] looks at the victims from outside, in `/proc`. A thread that sleeps in the same place, and has not left a
//!   processor since it was looked at before, has slept all the while: it waited for mmap_lock from then until now. While all
//!   threads that could want a lock sleep for it, the one thread that is left over has it.
//! * The victims time each step by themselves: a wait lies within its step.
//! * Where the lock is kept for a read, the [`Storage`] does not answer that read before the victims have been seen asleep.
//!
//! So what the observer says is held against bounds that no scheduling can move, and a single transgression fails. What
//! scheduling can do is keep a scene from coming about, or from being seen: then, and only then, it is done again
//! ([`until_it_comes_about`]).

mod common;

use common::{FAULTLESS, commands, compile, once, possible, scratch, tell};
use faultless_storage::{Faults, Storage};
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Observations disturb each other's victims: one at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Whether this machine lets tests observe. (`doctor` observes for a moment to find out, so it runs once.)
fn observable() -> Result<(), String> {
    static FOUND: OnceLock<Result<(), String>> = OnceLock::new();
    FOUND.get_or_init(ask_doctor).clone()
}

fn ask_doctor() -> Result<(), String> {
    let found = Command::new(FAULTLESS)
        .args(["doctor", "--json"])
        .output()
        .expect("the command starts");
    let all: Vec<Value> = serde_json::from_slice(&found.stdout).expect("JSON");
    let needed = [
        "BPF programs",
        "type information (BTF)",
        "privilege to observe",
        "kernel for observe",
    ];
    for f in all {
        let what = f["what"].as_str().unwrap_or_default();
        if needed.contains(&what) && f["standing"] == "missing" {
            return Err(f["costs"].to_string());
        }
    }
    Ok(())
}

fn cold_file() -> PathBuf {
    once("observed.data", |path| {
        let mut file = std::fs::File::create(path).expect("writable");
        let block: Vec<u8> = (0..1u32 << 20).map(|i| (i * 7) as u8).collect();
        for _ in 0..256 {
            file.write_all(&block).expect("room for 256 MiB");
        }
        // (What is not on the disk yet stays in memory.)
        file.sync_all().expect("synced");
    })
}

/// What a process says of itself: `tests/programs/convoy.c`.
struct Truth(Value);

impl Truth {
    fn tid(&self, thread: &str) -> u64 {
        self.0[thread]["tid"].as_u64().expect("a number")
    }
    /// Milliseconds that all steps of a thread took.
    fn wall(&self, thread: &str) -> f64 {
        number(&self.0[thread]["wall"]) / 1e6
    }
    /// Of these, milliseconds in which it slept.
    fn asleep(&self, thread: &str) -> f64 {
        number(&self.0[thread]["asleep"]) / 1e6
    }
    fn steps(&self, thread: &str) -> Vec<Span> {
        let all = self.0[thread]["steps"].as_array().expect("a list");
        all.iter()
            .map(|s| Span {
                from: number(&s[0]) / 1e6,
                until: number(&s[1]) / 1e6,
            })
            .collect()
    }
    /// How long a thread slept in each of its steps.
    fn asleep_in_steps(&self, thread: &str) -> Vec<f64> {
        let all = self.0[thread]["steps"].as_array().expect("a list");
        all.iter().map(|s| number(&s[2]) / 1e6).collect()
    }
    /// The step that a thread was in all through a time.
    fn step(&self, thread: &str, span: Span) -> Option<Span> {
        self.steps(thread).into_iter().find(|s| s.holds(span))
    }
}

struct Convoy {
    process: Child,
    pid: u32,
    out: BufReader<std::process::ChildStdout>,
}

impl Convoy {
    fn start(mode: &str, rounds: u32, more: &[&Path]) -> Convoy {
        let program = compile("convoy", &[]);
        Convoy::of(
            Command::new("timeout")
                .args(["--foreground", "--signal=KILL", "120"])
                .arg(program)
                .args([mode, &rounds.to_string()])
                .arg(cold_file())
                .args(more),
        )
    }

    fn of(command: &mut Command) -> Convoy {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut out = BufReader::new(process.stdout.take().expect("piped"));
        let mut line = String::new();
        out.read_line(&mut line).expect("it is ready");
        let pid = line
            .strip_prefix("ready ")
            .and_then(|n| n.trim().parse().ok())
            .expect("its number");
        Convoy { process, pid, out }
    }

    fn go(&mut self) {
        assert!(self.tell("go\n"), "it listens");
    }

    /// Whether it could be told: not when it has ended.
    fn tell(&mut self, line: &str) -> bool {
        let to = self.process.stdin.as_mut().expect("piped");
        to.write_all(line.as_bytes()).is_ok()
    }

    fn lives(&mut self) -> bool {
        self.process.try_wait().expect("a child").is_none()
    }

    /// The next line that it says.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).expect("it answers");
        line.trim_end().to_owned()
    }

    fn truth(mut self) -> Truth {
        let mut text = String::new();
        self.out.read_to_string(&mut text).expect("it answers");
        assert!(self.process.wait().expect("it ends").success(), "{text}");
        Truth(serde_json::from_str(&text).expect("JSON"))
    }
}

/// An observation that has begun.
struct Observation(Child);

impl Observation {
    fn begin(pid: u32, more: &[&str]) -> Observation {
        let mut child = Command::new("timeout")
            .args(["--foreground", "--signal=KILL", "150"])
            .arg(FAULTLESS)
            .args(["observe", "-p", &pid.to_string(), "--json"])
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it starts");
        let mut err = BufReader::new(child.stderr.take().expect("piped"));
        let mut line = String::new();
        err.read_line(&mut line).expect("a line");
        assert_eq!(line, "faultless: observing\n");
        Observation(child)
    }

    fn report(self) -> Value {
        let out = self.0.wait_with_output().expect("it ends");
        assert!(out.status.success(), "{:?}", out.status);
        serde_json::from_slice(&out.stdout).expect("JSON")
    }
}

// ---- What is true ----

/// A time, in milliseconds of CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Span {
    from: f64,
    until: f64,
}

impl Span {
    fn ms(self) -> f64 {
        self.until - self.from
    }
    /// Whether another time lies within this one.
    fn holds(self, other: Span) -> bool {
        self.from <= other.from && other.until <= self.until
    }
    /// The same for times of two sources, which round differently, and whose processors' clocks may differ.
    fn about_holds(self, other: Span) -> bool {
        self.from <= other.from + SLACK && other.until <= self.until + SLACK
    }
}

/// Milliseconds by which two sources of times may differ.
const SLACK: f64 = 0.05;
/// Both victims must be seen asleep for so many milliseconds together; the observer tells waits of one singly.
const LEAST: f64 = 3.0;
/// Of a victim's step, this share must be known to be the holder's. Then whatever else kept the victim waiting (it was woken
/// and had no processor, or another thread came first) is at most half of that. So of all holds in the wait the holder's is the
/// longest, even if the observer tells it in two parts, as it does where a writer becomes a reader.
const CLEAR: f64 = 2.0 / 3.0;
/// So many times each victim must have been seen to wait so clearly.
const SEEN_LEAST: usize = 2;

/// Where threads sleep that wait for mmap_lock, in `/proc/PID/wchan`: what calls the lock. (A thread that reads a page sleeps
/// deeper.)
const WAITS: [&str; 5] = [
    "vm_mmap_pgoff",
    "__vm_munmap",
    "lock_mm_and_find_vma",
    "do_user_addr_fault",
    "do_page_fault",
];
const LOOK_EVERY: Duration = Duration::from_micros(500);

/// A thread, looked at from outside.
struct Looked {
    wchan: File,
    status: File,
    /// The wait for mmap_lock that it sleeps in.
    sleep: Option<Sleep>,
}

#[derive(Clone, Copy)]
struct Sleep {
    /// How often the thread has left a processor: that is, which of its sleeps this is.
    no: u64,
    /// It slept all the while.
    span: Span,
}

impl Looked {
    fn at(pid: u32, tid: u32) -> Option<Looked> {
        let open = |what: &str| File::open(format!("/proc/{pid}/task/{tid}/{what}")).ok();
        Some(Looked {
            wchan: open("wchan")?,
            status: open("status")?,
            sleep: None,
        })
    }

    /// Looks once. None: the thread has ended.
    ///
    /// The number of times that it left a processor is read last. If it is what it was at the look before, the thread, which
    /// sleeps now, has left none since then; and a thread that woke up meanwhile could only sleep again by leaving one. So it
    /// has slept here from the end of that look to the beginning of this one.
    fn look(&mut self) -> Option<()> {
        let now = monotonic_ms();
        let waits = WAITS.contains(&read_again(&self.wchan)?.as_str());
        let no = times_off_processor(&read_again(&self.status)?)?;
        self.sleep = match self.sleep {
            _ if !waits => None,
            Some(before) if before.no == no => Some(Sleep {
                no,
                span: Span {
                    until: now,
                    ..before.span
                },
            }),
            _ => {
                let from = monotonic_ms();
                Some(Sleep {
                    no,
                    span: Span { from, until: from },
                })
            }
        };
        Some(())
    }
}

/// What a file of `/proc` says now.
fn read_again(file: &File) -> Option<String> {
    let mut bytes = [0; 4096];
    let len = file.read_at(&mut bytes, 0).ok()?;
    Some(String::from_utf8_lossy(&bytes[..len]).into_owned())
}

/// Of `/proc/PID/status`.
fn times_off_processor(status: &str) -> Option<u64> {
    let count = |name: &str| -> Option<u64> {
        let rest = status.lines().find_map(|l| l.strip_prefix(name))?;
        rest.trim().parse().ok()
    };
    Some(count("voluntary_ctxt_switches:")? + count("nonvoluntary_ctxt_switches:")?)
}

/// Looks at both victims of a convoy.
struct Watcher {
    writer: Looked,
    reader: Looked,
}

impl Watcher {
    /// Once the victims are there. None: the process has ended.
    fn of(pid: u32) -> Option<Watcher> {
        let named = |name: &str| -> std::io::Result<Option<u32>> {
            for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
                let thread = thread?;
                let comm = std::fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
                if comm.trim_end() == name {
                    return Ok(thread.file_name().to_str().and_then(|n| n.parse().ok()));
                }
            }
            Ok(None)
        };
        loop {
            if let (Some(writer), Some(reader)) = (named("writer").ok()?, named("reader").ok()?) {
                return Some(Watcher {
                    writer: Looked::at(pid, writer)?,
                    reader: Looked::at(pid, reader)?,
                });
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// Looks at both, after a while. False: one has ended.
    fn look(&mut self) -> bool {
        std::thread::sleep(LOOK_EVERY);
        self.writer.look().is_some() && self.reader.look().is_some()
    }

    /// Which sleeps both are in, and the time in which they have been so together.
    fn together(&self) -> Option<((u64, u64), Span)> {
        let (w, r) = (self.writer.sleep?, self.reader.sleep?);
        let span = Span {
            from: w.span.from.max(r.span.from),
            until: w.span.until.min(r.span.until),
        };
        Some(((w.no, r.no), span))
    }
}

/// Does something on a thread that gets a processor before all ordinary ones, where that is permitted: beside busy neighbours,
/// it sees more.
fn ahead_of_others<T: Send>(what: impl FnOnce() -> T + Send) -> T {
    let ahead = || {
        let how = libc::sched_param { sched_priority: 1 };
        let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
        #[allow(unsafe_code, reason = "sched_setscheduler(2)")]
        // SAFETY: the call reads `how`, which lives until it returns; 0 is this thread, and no other one changes.
        unsafe {
            libc::sched_setscheduler(0, policy, &how)
        };
        what()
    };
    std::thread::scope(|s| s.spawn(ahead).join().expect("it looks"))
}

/// Times in which both victims of a convoy slept for the lock, of `LEAST` and more. Ends when there are enough, or when the
/// process ends.
fn see(pid: u32, enough: usize) -> Vec<Span> {
    ahead_of_others(|| {
        let Some(mut watcher) = Watcher::of(pid) else {
            return Vec::new();
        };
        let mut seen: Vec<Span> = Vec::new();
        let mut last: Option<((u64, u64), Span)> = None;
        loop {
            let lives = watcher.look();
            let now = watcher.together().filter(|_| lives);
            // The sleeps that were together before are over: one of the two is another one, or none.
            if let Some((sleeps, span)) = last
                && now.is_none_or(|n| n.0 != sleeps)
                && span.ms() >= LEAST
            {
                seen.push(span);
            }
            last = now;
            if !lives || (last.is_none() && seen.len() >= enough) {
                return seen;
            }
        }
    })
}

/// What an observation says, what the observed one says, and what was seen from outside: so often, if it can be.
fn observed(mut convoy: Convoy, options: &[&str], enough: usize) -> (Value, Truth, Vec<Span>) {
    let observation = Observation::begin(convoy.pid, options);
    convoy.go();
    let seen = see(convoy.pid, enough);
    // (It may have done all its rounds.)
    convoy.tell("enough\n");
    let truth = convoy.truth();
    (observation.report(), truth, seen)
}

fn number(v: &Value) -> f64 {
    v.as_f64().unwrap_or_else(|| panic!("{v} is a number"))
}

/// Does a scene until it has come about, `TRIES` times at most, and says how often it has not. An error of the scene says why
/// it has not: that is never something that the observer said. What the observer said wrongly panics, in the scene, the first
/// time.
fn until_it_comes_about(test: &str, mut scene: impl FnMut() -> Result<(), String>) {
    const TRIES: usize = 5;
    let missed: Vec<String> = (0..TRIES).map_while(|_| scene().err()).collect();
    let times = TRIES.min(missed.len() + 1);
    let line = format!(
        "{test}: {} of {times} times, it did not come about",
        missed.len()
    );
    if missed.is_empty() {
        println!("{line}");
    } else {
        tell(&format!("DONE AGAIN: {line}: {missed:?}\n"));
    }
    assert!(missed.len() < TRIES, "{line}: {missed:#?}");
}

/// Holds an observation against what is true. `windows` are the times in which the holder did what it was to do, and
/// `is_right` says whether a convoy is the one in which such a thread waited at such a time. Returns the time that victims are
/// known to have waited for the holder, all together; or why too little is known.
fn check(
    report: &Value,
    truth: &Truth,
    seen: &[Span],
    windows: &[Span],
    is_right: impl Fn(&Value, &str, Span) -> bool,
) -> Result<f64, String> {
    let convoys = report["convoys"].as_array().expect("a list");
    // If there are more, the report has those that took the most time.
    let left_out = match convoys.last() {
        Some(least) if number(&report["convoys_seen"]) > convoys.len() as f64 => {
            number(&least["victim_ms"])
        }
        _ => 0.0,
    };
    let victims: Vec<(&Value, &Value)> = convoys
        .iter()
        .flat_map(|c| {
            let victims = c["victims"].as_array().expect("a list");
            victims.iter().map(move |v| (c, v))
        })
        .collect();
    let mut clear = [0, 0];
    let mut waited = 0.0;
    for &span in seen {
        if span.ms() < LEAST.max(left_out) || !windows.iter().any(|w| w.holds(span)) {
            continue;
        }
        for (count, thread) in clear.iter_mut().zip(["writer", "reader"]) {
            let Some(step) = truth.step(thread, span) else {
                continue;
            };
            if span.ms() < CLEAR * step.ms() {
                continue;
            }
            *count += 1;
            waited += span.ms();
            let is_this = |v: &Value| v["tid"] == truth.tid(thread);
            let found = victims
                .iter()
                .find(|(_, v)| is_this(v) && times(report, v).about_holds(span));
            let Some(&(convoy, victim)) = found else {
                let its: Vec<_> = victims.iter().filter(|(_, v)| is_this(v)).collect();
                panic!("{thread} slept for the lock in {span:?}, and no wait says so: {its:#?}");
            };
            let wait = times(report, victim);
            assert!(
                step.about_holds(wait),
                "{thread} waited in {wait:?}, but its step was {step:?}: {victim:#}"
            );
            // What the fault attempted came before the wait, or after it: a fault that finds the mapping locked asks for mmap_lock
            // immediately, gives it up to read, and asks again.
            let attempt = victim["first_attempt_ms"].as_f64().unwrap_or(0.0);
            assert!(
                wait.ms() + attempt <= step.ms() + SLACK,
                "{thread} waited for {wait:?} and attempted for {attempt} ms in {step:?}: {victim:#}"
            );
            assert!(
                is_right(convoy, thread, span),
                "{thread} waited in {span:?}, and not so: {convoy:#}"
            );
        }
    }
    println!("clear waits of the writer and the reader: {clear:?}, {waited:.1} ms");
    check_sums(report, truth)?;
    if clear.iter().all(|&n| n >= SEEN_LEAST) {
        Ok(waited)
    } else {
        Err(format!(
            "the writer and the reader were seen to wait {clear:?} times; slept together {seen:?}; holder {windows:?}"
        ))
    }
}

/// When something in a report happened.
fn times(report: &Value, it: &Value) -> Span {
    let began = number(&report["observed"]["began_monotonic"]) * 1e3;
    let from = began + number(&it["at_ms"]);
    Span {
        from,
        until: from + number(&it["ms"]),
    }
}

/// The sums of the reader's faults lie between the time that it slept in its steps and the time that these took.
fn check_sums(report: &Value, truth: &Truth) -> Result<(), String> {
    let (asleep, wall) = (truth.asleep("reader"), truth.wall("reader"));
    let files = report["files"].as_array().expect("a list");
    let path = cold_file();
    // The reader alone touches this file; it has other faults, in memory that a fork has made copy-on-write.
    let of_file = files
        .iter()
        .find(|f| f["path"] == path.to_str().expect("Unicode"));
    let groups = report["groups"].as_array().expect("a list");
    let of_reader = groups
        .iter()
        .find(|g| g["name"] == "reader" && g["pid"] == truth_pid(report));
    if asleep < 1.0 {
        return Err(format!("the reader slept for {asleep} ms: it read nothing"));
    }
    let of_file = number(&of_file.unwrap_or_else(|| panic!("{path:?} in {files:#?}"))["total_ms"]);
    let of_reader =
        number(&of_reader.unwrap_or_else(|| panic!("reader in {groups:#?}"))["total_ms"]);
    println!(
        "the reader slept for {asleep:.2} of {wall:.2} ms; its faults: {of_reader:.2} ms, {of_file:.2} ms in the file"
    );
    assert!(of_file <= wall + SLACK, "{of_file} ms of {wall}");
    // (The kernel's clocks of processor time leave out what a hypervisor took.)
    assert!(
        of_reader >= 0.98 * asleep - 1.0,
        "{of_reader} ms of {asleep}"
    );
    // Each microsecond of the faults is somebody's, once.
    let parts = report["faults"]["time_ms"].as_object().expect("a table");
    let parts: f64 = parts.values().map(number).sum();
    let total = number(&report["faults"]["total_ms"]);
    assert!((parts - total).abs() <= 0.01 * total, "{parts} of {total}");
    let doubts = &report["doubts"];
    assert_eq!(doubts["lost"], 0);
    // The lock word changes just after the event that says so, or before it. A hypervisor that takes the processor between
    // these two, or an interrupt, makes a doubt; that is seldom.
    let (doubted, checked) = (number(&doubts["out_of_step"]), number(&doubts["checked"]));
    assert!(doubted <= (checked / 20.0).max(1.0), "{doubts:#}");
    Ok(())
}

#[test]
fn a_large_munmap() {
    if !possible("a_large_munmap", observable()) {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    until_it_comes_about("a_large_munmap", || {
        let (report, truth, seen) = observed(Convoy::start("munmap", 30, &[]), &[], 6);
        let holder = truth.tid("holder");
        check(&report, &truth, &seen, &truth.steps("holder"), |c, _, _| {
            c["holder"]["tid"] == holder
                && c["holder"]["what"] == "munmap"
                && c["holder"]["detail"] == "1 GiB"
        })?;
        Ok(())
    });
}

#[test]
fn a_fork() {
    if !possible("a_fork", observable()) {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    until_it_comes_about("a_fork", || {
        // A fork keeps the lock for some milliseconds, and then the child takes a processor that the victims want as well; so
        // many of these waits are not clear, and more of them must be seen.
        let (report, truth, seen) = observed(Convoy::start("fork", 200, &[]), &[], 24);
        let holder = truth.tid("holder");
        check(&report, &truth, &seen, &truth.steps("holder"), |c, _, _| {
            // The call has the lock for writing while it copies. Where it tells the child's number, it faults, and has it for reading.
            let (what, writes) = (&c["holder"]["what"], &c["holder"]["write"]);
            c["holder"]["tid"] == holder
                && ((what == "clone" && writes == true) || what == "page fault in clone")
        })?;
        Ok(())
    });
}

/// Whether pages can be given back under the lock of their mapping alone.
fn gives_back_without_mmap_lock() -> Result<(), String> {
    observable()?;
    match faultless_sys::raw::kernel_version() {
        Some(version) if version >= (6, 17) => Ok(()),
        version => Err(format!(
            "this kernel is {version:?}, and MADV_DONTNEED takes mmap_lock before 6.17"
        )),
    }
}

/// The holder of mmap_lock sleeps, for a thread that has none: that one must be named.
#[test]
fn a_thread_that_keeps_a_holder_from_a_mapping() {
    let test = "a_thread_that_keeps_a_holder_from_a_mapping";
    if !possible(test, gives_back_without_mmap_lock()) {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    until_it_comes_about(test, || {
        let (report, truth, seen) = observed(Convoy::start("vma", 60, &[]), &[], 12);
        let (holder, keeper) = (truth.tid("holder"), truth.tid("keeper"));
        let steps = truth.steps("holder");
        check(&report, &truth, &seen, &steps, |c, _, _| {
            c["holder"]["tid"] == holder && c["holder"]["what"] == "madvise"
        })?;
        // Where the holder slept for most of a step in whose midst the keeper was done, it slept for the keeper.
        let asleep = truth.asleep_in_steps("holder");
        let ends: Vec<f64> = truth.steps("keeper").iter().map(|s| s.until).collect();
        let slept_for_it = |of: Span| {
            let is_it = |(step, asleep): &(&Span, &f64)| {
                let ends_in_it = |&end: &f64| step.from + LEAST < end && end < step.until;
                step.about_holds(of) && ends.iter().any(ends_in_it) && **asleep > CLEAR * step.ms()
            };
            steps.iter().zip(&asleep).any(|s| is_it(&s))
        };
        let says = format!("waits until keeper ({keeper}) lets go of a VMA (madvise)");
        let mut named = 0;
        for c in report["convoys"].as_array().expect("a list") {
            let by = &c["kept_by"];
            let is_keeper =
                by["tid"] == keeper && by["thread"] == "keeper" && by["what"] == "madvise";
            assert!(by.is_null() || is_keeper, "{c:#}");
            if c["holder"]["tid"] == holder && slept_for_it(times(&report, &c["holder"])) {
                let sentence = c["sentence"].as_str().expect("text");
                assert!(is_keeper && sentence.contains(&says), "{c:#}");
                named += 1;
            }
        }
        if named < SEEN_LEAST {
            return Err(format!("the holder slept for the keeper {named} times"));
        }
        let blame = report["blame"].as_array().expect("a list");
        let says = "waits until keeper lets go of a VMA (madvise)";
        let row = blame.iter().find(|b| b["asleep_ms"].get(says).is_some());
        assert!(row.is_some(), "{blame:#?}");
        let remedies = report["verdict"]["remedies"].as_array().expect("a list");
        let names_it = |r: &Value| {
            let text = r["text"].as_str().unwrap_or_default();
            text.starts_with("Let keeper call madvise for smaller parts")
        };
        assert!(remedies.iter().any(names_it), "{remedies:#?}");
        Ok(())
    });
}

/// Starts a storage of so many bytes.
fn storage(len: u64) -> std::io::Result<Storage> {
    Storage::start(|at| {
        let mut c = Command::new(FAULTLESS);
        c.arg("bench-storage").arg(at).arg(len.to_string());
        c
    })
}

/// The same, if this machine lets tests observe and mount.
fn storage_beside_observe(len: u64) -> Result<Storage, String> {
    observable()?;
    storage(len).map_err(|e| e.to_string())
}

/// The first read of each of these pages, 64 apart, fails; the second one gets no answer.
fn kept_waiting(pages: std::ops::Range<usize>) -> Faults {
    let pages = pages.map(|i| i as u64 * 64 * 4096);
    let bytes: Vec<_> = pages.map(|at| at..at + 1).collect();
    Faults {
        broken_once: bytes.clone(),
        stuck: bytes,
        ..Faults::default()
    }
}

/// The page's first read fails, so it is read again under mmap_lock, and gets no answer before the victims have been seen
/// asleep for a while.
#[test]
fn a_fault_that_reads_under_the_lock() {
    const LEN: u64 = 16 << 20;
    const ROUNDS: usize = 3;
    // Milliseconds: much more than it takes a thread to get a processor, so that a victim's step is mostly this.
    const KEPT: f64 = 300.0;
    let possibly = storage_beside_observe(LEN).map(drop);
    if !possible("a_fault_that_reads_under_the_lock", possibly) {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    until_it_comes_about("a_fault_that_reads_under_the_lock", || {
        // Another storage each time: what was read of the last one is in the page cache.
        let mut storage = storage(LEN).expect("another one was mounted");
        storage.set(&kept_waiting(0..ROUNDS)).expect("it listens");
        let slow = storage.file();
        let mut convoy = Convoy::start("fault", ROUNDS as u32, &[&slow]);
        let observation = Observation::begin(convoy.pid, &[]);
        convoy.go();
        let pid = convoy.pid;
        let seen = ahead_of_others(|| {
            let mut seen = Vec::new();
            let mut watcher = Watcher::of(pid)?;
            for round in 1..=ROUNDS {
                while storage.stuck().expect("it listens") == 0 {
                    watcher.look().then_some(())?;
                }
                // From here until the storage is told something else, the holder reads under the lock.
                let since = monotonic_ms();
                let span = loop {
                    watcher.look().then_some(())?;
                    if let Some((_, both)) = watcher.together() {
                        let from = both.from.max(since);
                        let span = Span { from, ..both };
                        if span.ms() >= KEPT {
                            break span;
                        }
                    }
                };
                seen.push(span);
                storage
                    .set(&kept_waiting(round..ROUNDS))
                    .expect("it listens");
            }
            Some(seen)
        });
        let truth = convoy.truth();
        let report = observation.report();
        let seen = seen.expect("the victims live for as long as the holder reads");
        let holder = truth.tid("holder");
        let path = slow.to_str().expect("Unicode");
        let windows = truth.steps("holder");
        check(&report, &truth, &seen, &windows, |c, thread, span| {
            let held = times(&report, &c["holder"]);
            c["holder"]["tid"] == holder
                && c["holder"]["what"] == "page fault"
                && c["holder"]["write"] == false
                && c["holder_file"] == path
                && c["holder_was"]
                    .as_str()
                    .is_some_and(|w| w.starts_with("reading"))
                && held.about_holds(span)
                && windows.iter().any(|w| w.about_holds(held))
                // One reader stops another for the writer's sake alone.
                && (thread == "writer" || c["writer"]["tid"] == truth.tid("writer"))
        })?;
        let of_file = report["files"].as_array().expect("a list");
        assert!(
            of_file
                .iter()
                .any(|f| f["path"] == path && f["gone_at_retry"] == ROUNDS),
            "{of_file:#?}"
        );
        Ok(())
    });
}

/// The model of mmap_lock in `faultless whatif`, beside the kernel's: the same requests get it in the same order. Each comes
/// when the one before it was seen to have had the lock or to sleep for it, and the lock is kept until all have come; so there
/// is nothing here that could fail to come about.
#[test]
fn the_kernel_grants_mmap_lock_in_the_order_of_the_model() {
    const PATTERNS: [&str; 7] = [
        "wr",
        "rwr",
        "wwr",
        "wrwrrw",
        "wwrrw",
        "rrwrwrwr",
        "wrrrwwrrwr",
    ];
    let possibly = storage_beside_observe((PATTERNS.len() as u64) * 64 * 4096);
    let mut storage = match possibly {
        Ok(storage) => storage,
        Err(why) => {
            possible(
                "the_kernel_grants_mmap_lock_in_the_order_of_the_model",
                Err(why),
            );
            return;
        }
    };
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let program = compile("queue", &[]);
    let trace = scratch().join("queue.trace");
    storage
        .set(&kept_waiting(0..PATTERNS.len()))
        .expect("it listens");
    let mut convoy = Convoy::of(
        Command::new("timeout")
            .args(["--foreground", "--signal=KILL", "120"])
            .arg(&program)
            .arg(storage.file())
            .args(PATTERNS),
    );
    let pid = convoy.pid;
    let observation = Observation::begin(pid, &["--trace", trace.to_str().expect("Unicode")]);
    convoy.go();
    let mut opened = Vec::new();
    for no in 0..PATTERNS.len() {
        assert_eq!(convoy.line(), format!("scene {no}"));
        while storage.stuck().expect("it listens") == 0 {
            assert!(convoy.lives(), "scene {no}");
            std::thread::sleep(LOOK_EVERY);
        }
        assert!(convoy.tell("held\n"), "it listens");
        assert_eq!(convoy.line(), "queued");
        opened.push(faultless_sys::raw::monotonic_ns());
        storage
            .set(&kept_waiting(no + 1..PATTERNS.len()))
            .expect("it listens");
    }
    let truth = convoy.truth();
    observation.report();
    let scenes = truth.0.as_array().expect("a list");
    assert_eq!(scenes.len(), PATTERNS.len());
    let file = File::open(&trace).expect("written");
    let reader = faultless_trace::Reader::new(BufReader::new(file)).expect("a trace");
    let began = reader.header().began_monotonic;
    let waits: Vec<faultless_trace::Wait> = reader
        .filter_map(|event| match event.expect("whole") {
            faultless_trace::Event::Wait(w) if w.target == pid && !w.failed => {
                Some(faultless_trace::Wait {
                    at: began + w.at,
                    ..w
                })
            }
            _ => None,
        })
        .collect();
    for ((pattern, scene), opened) in PATTERNS.iter().zip(scenes).zip(opened) {
        in_the_same_order(pattern, scene, opened, &waits);
    }
}

/// Those that came in the order of a pattern got the lock as the model says, and the observer saw it. `opened` is when the lock
/// was let go, at the earliest; times are of CLOCK_MONOTONIC.
fn in_the_same_order(pattern: &str, scene: &Value, opened: u64, waits: &[faultless_trace::Wait]) {
    use faultless_whatif::lock::{Request, granted};
    const MS: u64 = 1_000_000;
    /// As [`SLACK`].
    const NEAR: u64 = 50_000;
    let comers: Vec<bool> = pattern.chars().map(|c| c == 'w').collect();
    let mut requests = vec![Request {
        at: 0,
        write: false,
        keep: 1_000 * MS,
    }];
    requests.extend(comers.iter().enumerate().map(|(no, &write)| Request {
        at: (no as u64 + 1) * 10 * MS,
        write,
        keep: MS,
    }));
    let expected = granted(&requests);
    // When each got it; None: without waiting.
    let mut got: Vec<Option<u64>> = Vec::new();
    for (no, &write) in comers.iter().enumerate() {
        let of = |part: usize| scene[no + 1][part].as_u64().expect("a number");
        let (tid, came, seen) = (of(0), of(1), of(2));
        let its = |w: &&faultless_trace::Wait| {
            u64::from(w.tid) == tid && w.took > MS && w.at + NEAR >= came && w.at < opened
        };
        let told = waits.iter().find(its);
        let waits_in_the_model = expected[no + 1] - requests[no + 1].at > MS;
        assert_eq!(
            seen != 0,
            waits_in_the_model,
            "{pattern}: the kernel lets number {} wait, or the model does, and not both",
            no + 1
        );
        assert_eq!(
            told.is_some(),
            seen != 0,
            "{pattern}: number {} was seen asleep at {seen}, and the observer says {told:?}",
            no + 1
        );
        if let Some(wait) = told {
            let end = wait.at + wait.took;
            assert!(
                wait.write == write && wait.at <= seen + NEAR && end + NEAR >= opened,
                "{pattern}: number {} came at {came}, was asleep at {seen} and at {opened}: {wait:?}",
                no + 1
            );
        }
        got.push(told.map(|w| w.at + w.took));
    }
    for a in 1..=comers.len() {
        for b in 1..=comers.len() {
            let (Some(first), Some(then)) = (got[a - 1], got[b - 1]) else {
                continue;
            };
            if expected[a] + MS / 2 < expected[b] {
                assert!(
                    first < then,
                    "{pattern}: the model lets number {a} in before number {b}, the kernel does not: {got:?}"
                );
            }
        }
    }
    println!("{pattern}: as in the model");
}

/// Another process reads this one's smaps_rollup; a writer queues up behind it, and faults behind that.
#[test]
fn an_agent_that_reads_smaps() {
    if !possible("an_agent_that_reads_smaps", observable()) {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    until_it_comes_about("an_agent_that_reads_smaps", || {
        let mut convoy = Convoy::start("idle", 100, &[]);
        let pid = convoy.pid;
        let observation = Observation::begin(pid, &[]);
        let stop = Arc::new(AtomicBool::new(false));
        let agent = std::thread::spawn({
            let stop = Arc::clone(&stop);
            let path = format!("/proc/{pid}/smaps_rollup");
            move || {
                let mut reads = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let from = monotonic_ms();
                    let _ = std::fs::read(&path);
                    let until = monotonic_ms();
                    reads.push(Span { from, until });
                    std::thread::sleep(Duration::from_millis(30));
                }
                reads
            }
        });
        convoy.go();
        let seen = see(pid, 12);
        convoy.tell("enough\n");
        let truth = convoy.truth();
        stop.store(true, Ordering::Relaxed);
        let reads = agent.join().expect("it ends");
        let report = observation.report();
        let own = std::process::id();
        let what = format!("read of /proc/{pid}/smaps_rollup");
        let waited = check(&report, &truth, &seen, &reads, |c, thread, _| {
            c["holder"]["pid"] == own
                && c["holder"]["what"] == what.as_str()
                && c["holder"]["write"] == false
                // Readers keep nobody out but writers, and whoever comes after these.
                && (thread == "writer" || c["writer"]["tid"] == truth.tid("writer"))
        })?;
        let blame = report["blame"].as_array().expect("a list");
        let blamed: f64 = blame
            .iter()
            .filter(|b| b["neighbour"] == true && b["what"] == "read of /proc/PID/smaps_rollup")
            .map(|b| number(&b["victim_ms"]))
            .sum();
        assert!(
            blamed >= waited - 1.0,
            "{blamed} ms of {waited}: {blame:#?}"
        );
        Ok(())
    });
}

/// The clock of the processes that are observed, in milliseconds.
fn monotonic_ms() -> f64 {
    faultless_sys::raw::monotonic_ns() as f64 / 1e6
}

fn truth_pid(report: &Value) -> u64 {
    report["observed"]["processes"][0]["pid"]
        .as_u64()
        .expect("a number")
}

fn fails(args: &[&str], status: i32, says: &str) {
    let out = Command::new("timeout")
        .arg("60")
        .arg(FAULTLESS)
        .args(args)
        .output()
        .expect("it starts");
    let err = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(status), "{err}");
    assert!(err.contains(says), "{err}");
    assert!(
        out.stdout.is_empty(),
        "{}",
        String::from_utf8_lossy(&out.stdout)
    );
}

#[test]
fn what_cannot_be_observed_is_said_in_a_sentence() {
    fails(&["observe"], 2, "--pid");
    fails(
        &["observe", "-p", "1", "--duration", "10"],
        2,
        "such as 500ms",
    );
    fails(
        &["observe", "--from", "/nowhere"],
        1,
        "cannot open the trace /nowhere",
    );
    if !possible(
        "what_cannot_be_observed_is_said_in_a_sentence",
        observable(),
    ) {
        return;
    }
    fails(
        &["observe", "-p", "4194304"],
        1,
        "there is no process 4194304",
    );
    fails(&["observe", "-p", "2"], 1, "kernel thread");
    fails(
        &["observe", "--", "/nowhere/program"],
        1,
        "cannot start /nowhere/program",
    );
    fails(
        &[
            "observe",
            "-p",
            &std::process::id().to_string(),
            "--html",
            "/nowhere/report.html",
        ],
        1,
        "/nowhere/report.html",
    );
}

/// Another user may not: as nobody, in a sentence.
#[test]
fn without_privilege() {
    let root = commands(&["setpriv"]).and_then(|()| {
        std::fs::metadata("/proc/self/mem").map_err(|e| e.to_string())?;
        observable()
    });
    if !possible("without_privilege", root) {
        return;
    }
    // Where nobody can execute it.
    let dir = tempfile::tempdir().expect("a directory");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(dir.path(), mode).expect("ours");
    let copy = dir.path().join("faultless");
    std::fs::copy(FAULTLESS, &copy).expect("copied");
    let out = Command::new("setpriv")
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--bounding-set=-all",
            "--inh-caps=-all",
        ])
        .arg(&copy)
        .args(["observe", "-p", "1"])
        .output()
        .expect("it starts");
    let err = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{err}");
    assert!(
        err.contains("run it as root") && err.contains("CAP_BPF"),
        "{err}"
    );
    assert_eq!(err.trim().lines().count(), 1, "{err}");
}

#[test]
fn a_trace_says_what_the_observation_said() {
    if !possible("a_trace_says_what_the_observation_said", observable()) {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (trace, perfetto) = (
        scratch().join("observed.trace"),
        scratch().join("observed.json"),
    );
    until_it_comes_about("a_trace_says_what_the_observation_said", || {
        let (live, truth, seen) = observed(
            Convoy::start("munmap", 30, &[]),
            &[
                "--trace",
                trace.to_str().expect("Unicode"),
                "--perfetto",
                perfetto.to_str().expect("Unicode"),
            ],
            6,
        );
        let out = Command::new(FAULTLESS)
            .args(["observe", "--json", "--from"])
            .arg(&trace)
            .output()
            .expect("it starts");
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        let recorded: Value = serde_json::from_slice(&out.stdout).expect("JSON");
        let checked = [&live, &recorded].map(|report| {
            check(report, &truth, &seen, &truth.steps("holder"), |c, _, _| {
                c["holder"]["tid"] == truth.tid("holder") && c["holder"]["what"] == "munmap"
            })
        });
        for what in ["stalled", "major", "total_ms", "lock_wait_ms"] {
            assert_eq!(live["faults"][what], recorded["faults"][what], "{what}");
        }
        assert_eq!(live["blame"], recorded["blame"]);
        assert!(
            recorded["reads"]["requests"]
                .as_u64()
                .is_some_and(|n| n > 0)
        );
        let slices: Vec<Value> =
            serde_json::from_slice(&std::fs::read(&perfetto).expect("written")).expect("an array");
        assert!(slices.iter().any(|s| s["name"] == "major fault"));

        let bytes = std::fs::read(&trace).expect("written");
        let cut = scratch().join("cut.trace");
        std::fs::write(&cut, &bytes[..bytes.len() - 9]).expect("written");
        let out = Command::new(FAULTLESS)
            .args(["observe", "--json", "--from"])
            .arg(&cut)
            .output()
            .expect("it starts");
        let err = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{err}");
        assert!(err.contains("the trace was cut off"), "{err}");
        let cut: Value = serde_json::from_slice(&out.stdout).expect("JSON");
        assert_eq!(cut["doubts"]["cut_off"], true);
        assert_eq!(recorded["doubts"]["cut_off"], false);
        assert!(number(&cut["faults"]["major"]) > 0.0);
        checked.into_iter().try_for_each(|c| c.map(|_| ()))
    });
}

#[test]
fn a_program_is_watched_from_its_first_instruction_and_its_status_kept() {
    if !possible(
        "a_program_is_watched_from_its_first_instruction_and_its_status_kept",
        observable(),
    ) {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let out = Command::new(FAULTLESS)
        .args(["observe", "--json", "--", "sh", "-c", "(exit 3); exit 7"])
        .output()
        .expect("it starts");
    assert_eq!(out.status.code(), Some(7));
    let report: Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(report["schema"], "faultless.observe/1");
    let processes = report["observed"]["processes"].as_array().expect("a list");
    assert!(processes.iter().any(|p| p["name"] == "sh"), "{processes:?}");
}

/// The time is over before the program is: the report is written then, and the program is waited for. It does not end before
/// it is told to, when the report has been read.
#[test]
fn a_program_outlives_its_observation() {
    if !possible("a_program_outlives_its_observation", observable()) {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let page = scratch().join("observed.html");
    let page = page.to_str().expect("Unicode");
    let mut child = Command::new("timeout")
        .args(["--foreground", "--signal=KILL", "60", FAULTLESS])
        .args(["observe", "--duration", "100ms", "--html", page])
        .args(["--trace", "/dev/null", "--perfetto", "/dev/null", "--"])
        .args(["sh", "-c", "read told; echo done $told; exit 5"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    let mut text = String::new();
    while !text.contains("Observed ") && out.read_line(&mut text).expect("Unicode") > 0 {}
    assert!(text.contains("Observed "), "{text}");
    let mut to = child.stdin.take().expect("piped");
    to.write_all(b"now\n").expect("the program lives");
    out.read_to_string(&mut text).expect("Unicode");
    assert!(text.contains("done now\n"), "{text}");
    let out = child.wait_with_output().expect("it ends");
    let err = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(5), "{err}");
    let page = std::fs::read_to_string(page).expect("written");
    assert!(page.starts_with("<!doctype html>"), "{page:.80}");
    // Nothing is fetched from elsewhere.
    for loads in ["src=\"http", "href=\"http", "url(http", "@import"] {
        assert!(!page.contains(loads), "{loads}");
    }
    assert!(!Path::new("/dev/null.partial").exists());
    assert_eq!(err, "");
}

/// A supervisor knows this command alone.
#[test]
fn a_signal_to_end_reaches_the_program() {
    if !possible("a_signal_to_end_reaches_the_program", observable()) {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let script = "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done";
    let mut child = Command::new("timeout")
        .args(["--foreground", "--signal=KILL", "60", FAULTLESS])
        .args(["observe", "--", "sh", "-c", script])
        .stdout(Stdio::piped())
        .spawn()
        .expect("it starts");
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    out.read_line(&mut line).expect("a line");
    assert_eq!(line, "ready\n");
    // `timeout` hands it on.
    let told = Command::new("kill").arg(child.id().to_string()).status();
    assert!(told.expect("it starts").success());
    let mut report = String::new();
    out.read_to_string(&mut report).expect("a report");
    assert!(report.contains("Observed sh"), "{report}");
    assert_eq!(child.wait().expect("it ends").code(), Some(9));
}
