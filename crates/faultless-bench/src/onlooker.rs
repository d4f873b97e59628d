//! Who looks on: a process that observes the one that is measured, so that its cost can be told.

#![allow(unsafe_code, reason = "kill(2) and wait4(2)")]

use anyhow::{Context, bail, ensure};
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How a process looks on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// `faultless observe`, with a report at the end: what the live view needs as well.
    Observe,
    /// The same, with `--trace`.
    Trace,
    /// `perf record` of the tracepoints that `faultless observe` looks at.
    Perf,
}

/// The tracepoints of `faultless observe` that the workloads here reach.
const EVENTS: [&str; 13] = [
    "mmap_lock:*",
    "exceptions:page_fault_user",
    "exceptions:page_fault_kernel",
    "filemap:mm_filemap_fault",
    "filemap:mm_filemap_add_to_page_cache",
    "sched:sched_switch",
    "sched:sched_waking",
    "sched:sched_wakeup",
    "lock:contention_begin",
    "lock:contention_end",
    "vmscan:mm_vmscan_direct_reclaim_begin",
    "vmscan:mm_vmscan_direct_reclaim_end",
    "block:block_rq_complete",
];

/// How long it may take to begin, and to end.
const BUDGET: Duration = Duration::from_secs(60);

/// What it took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Done {
    /// Processor seconds, from its start to its end, and not in the tracepoints.
    pub cpu_s: f64,
    /// The most memory that it had while it looked on, in bytes.
    pub resident_max_bytes: u64,
    /// Records that it lost, where it says so.
    pub lost: Option<u64>,
}

/// A process that looks on.
#[derive(Debug)]
pub struct Onlooker {
    /// None: it has been waited for.
    child: Option<Child>,
    way: Way,
    out: Option<std::thread::JoinHandle<String>>,
    /// Where it writes.
    _dir: tempfile::TempDir,
}

impl Onlooker {
    /// Starts it, and waits until it looks.
    ///
    /// # Errors
    ///
    /// It cannot be started, or ended.
    pub fn start(way: Way) -> anyhow::Result<Onlooker> {
        let pid = std::process::id().to_string();
        let dir = crate::private_dir().context("no place for what an onlooker writes")?;
        let file = dir.path().join("recorded");
        let mut command = match way {
            Way::Observe | Way::Trace => {
                let mut c = Command::new(std::env::current_exe()?);
                c.args([
                    "observe",
                    "--json",
                    "--no-children",
                    "--duration",
                    "1h",
                    "-p",
                    &pid,
                ]);
                if way == Way::Trace {
                    c.arg("--trace").arg(&file);
                }
                c
            }
            Way::Perf => {
                let mut c = Command::new("perf");
                c.args(["record", "-q", "-p", &pid, "-o"]).arg(&file);
                for event in EVENTS {
                    c.args(["-e", event]);
                }
                c
            }
        };
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| match way {
                Way::Perf => "cannot start perf; apt install linux-perf".to_owned(),
                _ => "cannot start `faultless observe`".to_owned(),
            })?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let mut this = Onlooker {
            child: Some(child),
            way,
            out: None,
            _dir: dir,
        };
        let read = |mut from: Box<dyn Read + Send>| {
            std::thread::spawn(move || {
                let mut text = String::new();
                let _ = from.read_to_string(&mut text);
                text
            })
        };
        this.out = stdout.map(|o| read(Box::new(o)));
        let err = stderr.map(|e| read(Box::new(e)));
        // It looks when it has opened what it looks through, and opens no more.
        let began = Instant::now();
        let (mut count, mut since) = (0, Instant::now());
        loop {
            let Some(child) = &mut this.child else {
                bail!("what looks on is gone");
            };
            let now = watching(child.id());
            if now != count {
                (count, since) = (now, Instant::now());
            }
            if count > 8 && since.elapsed() > Duration::from_millis(200) {
                break;
            }
            if let Some(status) = child.try_wait()? {
                let says = err.and_then(|e| e.join().ok()).unwrap_or_default();
                bail!("what looks on ended with {status}: {}", says.trim());
            }
            if began.elapsed() > BUDGET {
                bail!("what looks on did not begin within {BUDGET:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(this)
    }

    /// Ends it, and says what it took.
    ///
    /// # Errors
    ///
    /// It failed.
    pub fn stop(mut self) -> anyhow::Result<Done> {
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        let Some(child) = &self.child else {
            bail!("what looks on is gone");
        };
        let (mut status, id) = (0, child.id());
        let pid = id as i32;
        // Not the usage's: that has what the process had before it executed another program.
        let mut resident = high_water(id);
        let began = Instant::now();
        // SAFETY: a signal to our own child, which has not been waited for; the structures are valid for writing.
        let usage = unsafe {
            libc::kill(pid, libc::SIGINT);
            loop {
                match libc::wait4(pid, &mut status, libc::WNOHANG, usage.as_mut_ptr()) {
                    0 if began.elapsed() < BUDGET => {
                        resident = resident.max(high_water(id));
                        std::thread::sleep(Duration::from_millis(2));
                    }
                    0 => {
                        bail!("what looks on did not end within {BUDGET:?}");
                    }
                    n if n == pid => break usage.assume_init(),
                    _ => bail!("what looks on cannot be waited for"),
                }
            }
        };
        self.child = None;
        let status = std::process::ExitStatus::from_raw(status);
        let text = self
            .out
            .take()
            .and_then(|o| o.join().ok())
            .unwrap_or_default();
        let lost = match self.way {
            Way::Perf => None,
            _ => {
                ensure!(status.success(), "what looks on ended with {status}");
                let report: serde_json::Value = serde_json::from_str(&text)
                    .context("the report of what looks on cannot be read")?;
                report["doubts"]["lost"].as_u64()
            }
        };
        let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
        Ok(Done {
            cpu_s: seconds(usage.ru_utime) + seconds(usage.ru_stime),
            resident_max_bytes: resident,
            lost,
        })
    }
}

impl Drop for Onlooker {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The most memory that a process has had, in bytes.
fn high_water(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = status
        .lines()
        .find_map(|l| l.strip_prefix("VmHWM:"))
        .and_then(|l| l.trim().strip_suffix("kB"))
        .and_then(|n| n.trim().parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

/// How many BPF links and perf events a process has open.
fn watching(pid: u32) -> usize {
    let Ok(all) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
        return 0;
    };
    all.flatten()
        .filter_map(|fd| std::fs::read_link(fd.path()).ok())
        .filter(|to| {
            let to = to.to_string_lossy();
            to.contains("bpf") || to.contains("[perf_event]")
        })
        .count()
}
