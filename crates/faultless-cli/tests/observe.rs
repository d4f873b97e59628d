//! `faultless observe` beside processes that know who kept whom waiting.

mod common;

use common::{FAULTLESS, commands, compile, once, possible, scratch};
use faultless_storage::{Delay, Faults, Storage};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Observations disturb each other's victims: one at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Whether this machine lets tests observe.
fn observable() -> Result<(), String> {
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
    fn sum_ms(&self, thread: &str) -> f64 {
        self.0[thread]["sum"].as_f64().expect("a number") / 1e6
    }
    fn steps(&self, thread: &str) -> Vec<(f64, f64)> {
        let all = self.0[thread]["steps"].as_array().expect("a list");
        all.iter()
            .map(|s| {
                (
                    s[0].as_f64().expect("ns") / 1e6,
                    s[1].as_f64().expect("ns") / 1e6,
                )
            })
            .collect()
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
        self.process
            .stdin
            .as_mut()
            .expect("piped")
            .write_all(b"go\n")
            .expect("it listens");
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

/// What an observation says, and what the observed one says.
fn observed(mut convoy: Convoy, options: &[&str]) -> (Value, Truth) {
    let observation = Observation::begin(convoy.pid, options);
    convoy.go();
    let truth = convoy.truth();
    (observation.report(), truth)
}

fn number(v: &Value) -> f64 {
    v.as_f64().unwrap_or_else(|| panic!("{v} is a number"))
}

/// A hypervisor or another process sometimes takes time from the victims, so that they measure more, and events of two processors
/// may come out of step. So sums and stalls may be compared again, with another observation; nothing
/// else may fail at all.
fn attempts(mut observe: impl FnMut() -> Result<(), String>) {
    let failures: Vec<String> = (0..3).map_while(|_| observe().err()).collect();
    assert!(failures.len() < 3, "{failures:#?}");
}

/// Every long step of a victim, during something that the holder did, is in a convoy behind the holder; and the time that
/// is accounted for is the time that the victims measured, or else that is said.
fn check(
    report: &Value,
    truth: &Truth,
    windows: &[(f64, f64)],
    is_right: impl Fn(&Value) -> bool,
) -> Result<(), String> {
    let began = number(&report["observed"]["began_monotonic"]) * 1e3;
    let convoys = report["convoys"].as_array().expect("a list");
    let (mut stalls, mut right) = (0, 0);
    let (mut seen, mut measured) = (0.0, 0.0);
    let mut wrong = Vec::new();
    for thread in ["writer", "reader"] {
        for (from, to) in truth.steps(thread) {
            let in_window: f64 = windows
                .iter()
                .map(|w| (to.min(w.1) - from.max(w.0)).max(0.0))
                .sum();
            if in_window < 1.0 || in_window < 0.5 * (to - from) {
                continue;
            }
            stalls += 1;
            let is_this = |v: &&Value| {
                let at = began + number(&v["at_ms"]);
                v["tid"] == truth.tid(thread)
                    && at < to
                    && at + number(&v["ms"]) > from
                    && number(&v["ms"]) > 0.5 * (to - from)
            };
            let found = convoys.iter().find_map(|c| {
                let victims = c["victims"].as_array().expect("a list");
                Some((c, victims.iter().find(is_this)?))
            });
            match found {
                Some((c, victim)) if is_right(c) => {
                    right += 1;
                    // What a fault read before it waited.
                    let first = victim["first_attempt_ms"].as_f64().unwrap_or(0.0);
                    seen += first + number(&victim["ms"]);
                    measured += to - from;
                }
                Some((c, _)) => wrong.push(c["sentence"].to_string()),
                None => wrong.push(format!("no convoy for {thread} at {}", from - began)),
            }
        }
    }
    println!("{right} of {stalls} stalls are explained");
    assert!(stalls >= 3, "nothing stalled: {windows:?}");
    if right * 100 < stalls * 95 {
        return Err(format!("{right} of {stalls} are right; wrong: {wrong:#?}"));
    }
    let close = |what: &str, seen: f64, measured: f64| {
        let sentence = format!("{what}: {seen:.2} ms seen, {measured:.2} ms measured");
        println!("{sentence}");
        if (seen - measured).abs() <= 0.05 * measured.max(seen) {
            Ok(())
        } else {
            Err(sentence)
        }
    };
    close("stalls", seen, measured).expect("the same");
    // The reader alone touches this file; it has other faults, in memory that a fork has made copy-on-write.
    let files = report["files"].as_array().expect("a list");
    let path = cold_file();
    let file = files
        .iter()
        .find(|f| f["path"] == path.to_str().expect("Unicode"))
        .unwrap_or_else(|| panic!("{} in {files:#?}", path.display()));
    let faults = close(
        "the reader's faults",
        number(&file["total_ms"]),
        truth.sum_ms("reader"),
    );
    // Each microsecond of the faults is somebody's, once.
    let parts = report["faults"]["time_ms"].as_object().expect("a table");
    let parts: f64 = parts.values().map(number).sum();
    let total = number(&report["faults"]["total_ms"]);
    assert!((parts - total).abs() <= 0.01 * total, "{parts} of {total}");
    assert_eq!(report["doubts"]["lost"], 0);
    // Two processors' clocks, or a loss of time between two events of one: the observation says so itself, and is made again.
    if report["doubts"]["out_of_step"] != 0 {
        return Err(format!("out of step: {:#?}", report["doubts"]));
    }
    faults
}

#[test]
fn a_large_munmap() {
    if !possible("a_large_munmap", observable()) {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    attempts(|| {
        let (report, truth) = observed(Convoy::start("munmap", 4, &[]), &[]);
        let holder = truth.tid("holder");
        check(&report, &truth, &truth.steps("holder"), |c| {
            c["holder"]["tid"] == holder
                && c["holder"]["what"] == "munmap"
                && c["holder"]["detail"] == "1 GiB"
        })
    });
}

#[test]
fn a_fork() {
    if !possible("a_fork", observable()) {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    attempts(|| {
        let (report, truth) = observed(Convoy::start("fork", 30, &[]), &[]);
        let holder = truth.tid("holder");
        check(&report, &truth, &truth.steps("holder"), |c| {
            let forks = c["holder"]["tid"] == holder
                && c["holder"]["what"] == "clone"
                && c["holder"]["write"] == true;
            // The call ends later than the lock is let go. Meanwhile the lock may wait for its next owner, and that one for a
            // processor, of which the child has one.
            let ours = ["holder", "writer", "reader"].map(|t| truth.tid(t));
            forks
                || (c["holder_was"] == "without a processor"
                    && ours.iter().any(|&t| c["holder"]["tid"] == t))
        })
    });
}

/// The page's first read fails, so it is read again under mmap_lock: for two seconds.
#[test]
fn a_fault_that_reads_under_the_lock() {
    const LEN: u64 = 16 << 20;
    let mut storage = None;
    let possibly = observable().and_then(|()| {
        let serve = |at: &Path| {
            let mut c = Command::new(FAULTLESS);
            c.arg("bench-storage").arg(at).arg(LEN.to_string());
            c
        };
        storage = Some(Storage::start(serve).map_err(|e| e.to_string())?);
        Ok(())
    });
    if !possible("a_fault_that_reads_under_the_lock", possibly) {
        return;
    }
    let mut storage = storage.expect("started");
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    attempts(|| {
        storage
            .set(&Faults {
                delay: Delay::fixed(Duration::from_secs(2)),
                broken_once: (0..2).map(|i| i * 64 * 4096..i * 64 * 4096 + 1).collect(),
                ..Faults::default()
            })
            .expect("it listens");
        let slow = storage.file();
        let (report, truth) = observed(Convoy::start("fault", 2, &[&slow]), &[]);
        let holder = truth.tid("holder");
        let path = slow.to_str().expect("Unicode");
        let sums = check(&report, &truth, &truth.steps("holder"), |c| {
            c["holder"]["tid"] == holder
                && c["holder"]["what"] == "page fault"
                && c["holder_file"] == path
                && c["holder_was"]
                    .as_str()
                    .is_some_and(|w| w.starts_with("reading"))
        });
        let convoys = report["convoys"].as_array().expect("a list");
        assert!(
            number(&convoys[0]["holder"]["ms"]) > 1990.0,
            "{:#}",
            convoys[0]
        );
        let of_file = report["files"].as_array().expect("a list");
        assert!(
            of_file
                .iter()
                .any(|f| f["path"] == path && f["gone_at_retry"] == 2),
            "{of_file:#?}"
        );
        sums
    });
}

/// The model of mmap_lock in `faultless whatif`, beside the kernel's: the same requests get it in the same order.
#[test]
fn the_kernel_grants_mmap_lock_in_the_order_of_the_model() {
    const DELAY: Duration = Duration::from_millis(400);
    const PATTERNS: [&str; 7] = [
        "wr",
        "rwr",
        "wwr",
        "wrwrrw",
        "wwrrw",
        "rrwrwrwr",
        "wrrrwwrrwr",
    ];
    let len = (PATTERNS.len() as u64) * 64 * 4096;
    let mut storage = None;
    let possibly = observable().and_then(|()| {
        let serve = |at: &Path| {
            let mut c = Command::new(FAULTLESS);
            c.arg("bench-storage").arg(at).arg(len.to_string());
            c
        };
        storage = Some(Storage::start(serve).map_err(|e| e.to_string())?);
        Ok(())
    });
    if !possible(
        "the_kernel_grants_mmap_lock_in_the_order_of_the_model",
        possibly,
    ) {
        return;
    }
    let mut storage = storage.expect("started");
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let program = compile("queue", &[]);
    let trace = scratch().join("queue.trace");
    attempts(|| {
        storage
            .set(&Faults {
                delay: Delay::fixed(DELAY),
                broken_once: (0..PATTERNS.len() as u64)
                    .map(|i| i * 64 * 4096..i * 64 * 4096 + 1)
                    .collect(),
                ..Faults::default()
            })
            .expect("it listens");
        let convoy = Convoy::of(
            Command::new("timeout")
                .args(["--foreground", "--signal=KILL", "120"])
                .arg(&program)
                .arg(storage.file())
                .arg(DELAY.as_millis().to_string())
                .args(PATTERNS),
        );
        let pid = convoy.pid;
        let path = trace.to_str().expect("Unicode");
        let (_, truth) = observed(convoy, &["--trace", path]);
        let scenes = truth.0.as_array().expect("a list");
        assert_eq!(scenes.len(), PATTERNS.len());
        let file = std::fs::File::open(&trace).expect("written");
        let waits: Vec<faultless_trace::Wait> =
            faultless_trace::Reader::new(std::io::BufReader::new(file))
                .expect("a trace")
                .filter_map(|event| match event.expect("whole") {
                    faultless_trace::Event::Wait(w) if w.target == pid && !w.failed => Some(w),
                    _ => None,
                })
                .collect();
        for (pattern, scene) in PATTERNS.iter().zip(scenes) {
            in_the_same_order(pattern, scene, &waits)?;
        }
        Ok(())
    });
}

/// Whether those that came in the order of a pattern got the lock as the model says. An error: they came in another order.
fn in_the_same_order(
    pattern: &str,
    scene: &Value,
    waits: &[faultless_trace::Wait],
) -> Result<(), String> {
    use faultless_whatif::lock::{Request, granted};
    const MS: u64 = 1_000_000;
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
    // When each came and got it; None: without waiting.
    let seen: Vec<Option<(u64, u64)>> = comers
        .iter()
        .enumerate()
        .map(|(no, &write)| {
            let tid = scene[no + 1].as_u64();
            let is_its = |w: &&faultless_trace::Wait| {
                Some(u64::from(w.tid)) == tid && w.write == write && w.took > MS
            };
            waits.iter().find(is_its).map(|w| (w.at, w.at + w.took))
        })
        .collect();
    let came: Vec<u64> = seen.iter().flatten().map(|s| s.0).collect();
    if !came.is_sorted() {
        return Err(format!("{pattern}: they came at {came:?}"));
    }
    for (no, (&expected, request)) in expected.iter().zip(&requests).enumerate().skip(1) {
        let waits_in_the_model = expected - request.at > MS;
        if waits_in_the_model != seen[no - 1].is_some() {
            return Err(format!(
                "{pattern}: number {no} waits in the model: {waits_in_the_model}; here: {:?}",
                seen[no - 1]
            ));
        }
    }
    for a in 1..=comers.len() {
        for b in 1..=comers.len() {
            let (Some((_, first)), Some((_, then))) = (seen[a - 1], seen[b - 1]) else {
                continue;
            };
            if expected[a] + MS / 2 < expected[b] {
                assert!(
                    first < then,
                    "{pattern}: the model lets number {a} in before number {b}, the kernel does not: {seen:?}"
                );
            }
        }
    }
    println!("{pattern}: as in the model");
    Ok(())
}

/// Another process reads this one's smaps_rollup; a writer queues up behind it, and faults behind that.
#[test]
fn an_agent_that_reads_smaps() {
    if !possible("an_agent_that_reads_smaps", observable()) {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    attempts(|| {
        let mut convoy = Convoy::start("idle", 8, &[]);
        let observation = Observation::begin(convoy.pid, &[]);
        let stop = Arc::new(AtomicBool::new(false));
        let agent = std::thread::spawn({
            let (stop, path) = (
                Arc::clone(&stop),
                format!("/proc/{}/smaps_rollup", convoy.pid),
            );
            move || {
                let mut reads = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let from = monotonic_ms();
                    let _ = std::fs::read(&path);
                    reads.push((from, monotonic_ms()));
                    std::thread::sleep(Duration::from_millis(30));
                }
                reads
            }
        });
        convoy.go();
        let truth = convoy.truth();
        stop.store(true, Ordering::Relaxed);
        let reads = agent.join().expect("it ends");
        let report = observation.report();
        let own = std::process::id();
        let what = format!("read of /proc/{}/smaps_rollup", truth_pid(&report));
        // Readers keep nobody out but writers, and whoever comes after these.
        let mut windows = Vec::new();
        for (from, to) in truth.steps("writer") {
            for &(read, done) in &reads {
                if from.max(read) < to.min(done) {
                    windows.push((from.max(read), to.min(done)));
                }
            }
        }
        let sums = check(&report, &truth, &windows, |c| {
            c["holder"]["pid"] == own && c["holder"]["what"] == what.as_str()
        });
        let blame = &report["blame"][0];
        assert_eq!(blame["neighbour"], true);
        assert_eq!(blame["what"], "read of /proc/PID/smaps_rollup");
        let queued = |c: &&Value| c["writer"]["thread"] == "writer";
        let convoys = report["convoys"].as_array().expect("a list");
        assert!(
            convoys.iter().any(|c| queued(&c)),
            "a writer was queued: {convoys:#?}"
        );
        sums
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
    attempts(|| {
        let (live, truth) = observed(
            Convoy::start("munmap", 2, &[]),
            &[
                "--trace",
                trace.to_str().expect("Unicode"),
                "--perfetto",
                perfetto.to_str().expect("Unicode"),
            ],
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
        let sums = [&live, &recorded].map(|report| {
            check(report, &truth, &truth.steps("holder"), |c| {
                c["holder"]["what"] == "munmap"
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
        sums.into_iter().collect()
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

/// The time is over before the program is: the report is written then, and the program is waited for.
#[test]
fn a_program_outlives_its_observation() {
    if !possible("a_program_outlives_its_observation", observable()) {
        return;
    }
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let page = scratch().join("observed.html");
    let page = page.to_str().expect("Unicode");
    let out = Command::new("timeout")
        .arg("60")
        .arg(FAULTLESS)
        .args(["observe", "--duration", "100ms", "--html", page])
        .args(["--trace", "/dev/null", "--perfetto", "/dev/null", "--"])
        .args(["sh", "-c", "sleep 1; echo done; exit 5"])
        .output()
        .expect("it starts");
    let (text, err) = (
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr),
    );
    assert_eq!(out.status.code(), Some(5), "{err}");
    let (report, done) = (text.find("Observed "), text.find("done"));
    assert!(report.is_some() && report < done, "{text}");
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
