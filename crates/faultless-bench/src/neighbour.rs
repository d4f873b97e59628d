//! What disturbs the readers: threads, and processes, that need `mmap_lock` for their own ordinary ends.

#![allow(unsafe_code, reason = "neighbours map, unmap, touch and fork")]

use crate::pagemap::Pagemap;
use crate::scenario::Disturbance;
use anyhow::Context;
use faultless_sys::mem::{self, PAGE};
use hdrhistogram::Histogram;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

// (src/unmodified.c has the same numbers; a test in unmodified.rs compares them.)
/// Threads of [`Disturbance::Churn`].
pub(crate) const CHURN_THREADS: usize = 8;
/// Bytes that a thread of churn, and the thread beside an eager agent, maps and unmaps.
pub(crate) const SMALL: usize = 64 << 10;
/// Bytes that the thread of [`Disturbance::Bigfree`] maps and unmaps.
pub(crate) const BIG: usize = 1 << 30;
/// How often the thread beside an eager agent maps and unmaps.
pub(crate) const MAP_EVERY: Duration = Duration::from_millis(1);
/// How often a gentle agent looks.
pub(crate) const AGENT_EVERY: Duration = Duration::from_secs(1);

/// Touched anonymous memory, given back when dropped.
pub struct Ballast {
    start: usize,
    len: usize,
}

impl Ballast {
    /// Maps and touches `bytes`, with two threads.
    pub fn new(bytes: u64) -> anyhow::Result<Self> {
        let len = bytes as usize;
        if len == 0 {
            return Ok(Ballast { start: 0, len });
        }
        let start = mem::map_anonymous(len).context("cannot map memory")?;
        std::thread::scope(|s| {
            let half = (len / 2).next_multiple_of(PAGE);
            s.spawn(move || touch(start, half));
            touch(start + half, len - half);
        });
        Ok(Ballast { start, len })
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: ours; addresses are known to nobody else.
            let _ = unsafe { mem::unmap(self.start, self.len) };
        }
    }
}

/// Writes one byte to each page. For ranges that the caller has mapped writable, and that nobody else knows.
fn touch(start: usize, len: usize) {
    for at in (start..start + len).step_by(PAGE) {
        // SAFETY: the callers in this module pass ranges that they mapped writable themselves.
        unsafe { core::ptr::write_volatile(at as *mut u8, 1) };
    }
}

fn map_touch_unmap(len: usize, pages: bool) {
    if let Ok(start) = mem::map_anonymous(len) {
        if pages {
            touch(start, len);
        }
        // SAFETY: mapped above.
        let _ = unsafe { mem::unmap(start, len) };
    }
}

/// What a neighbour got done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Done {
    /// Rounds of its loop per second.
    pub per_s: f64,
    /// 99th percentile of a round, in microseconds.
    pub p99_us: f64,
}

/// A running neighbour.
pub struct Neighbour {
    began: Instant,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Histogram<u64>>>,
    agent: Option<Child>,
}

impl Neighbour {
    /// Starts a neighbour. `None` where there is none.
    pub fn start(kind: Disturbance) -> anyhow::Result<Option<Self>> {
        let mut n = Neighbour {
            began: Instant::now(),
            stop: Arc::default(),
            threads: Vec::new(),
            agent: None,
        };
        match kind {
            // A writer is a part of the program that reads.
            Disturbance::None | Disturbance::Writer => return Ok(None),
            Disturbance::Churn => {
                (0..CHURN_THREADS).for_each(|_| n.repeat(|| map_touch_unmap(SMALL, true)))
            }
            Disturbance::Bigfree => n.repeat(|| map_touch_unmap(BIG, true)),
            Disturbance::Fork => n.repeat(|| {
                // SAFETY: the child does nothing but exit.
                unsafe {
                    match libc::fork() {
                        0 => libc::_exit(0),
                        pid if pid > 0 => {
                            libc::waitpid(pid, std::ptr::null_mut(), 0);
                        }
                        _ => std::thread::sleep(Duration::from_millis(1)),
                    }
                }
            }),
            // The agent alone, which is started below.
            Disturbance::SmapsGentle => {}
            Disturbance::Smaps | Disturbance::Pagemap => {
                let stop = n.stop.clone();
                // Its rounds are not the neighbour's: the agent's are.
                n.threads.push(std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        map_touch_unmap(SMALL, false);
                        std::thread::sleep(MAP_EVERY);
                    }
                    histogram()
                }));
            }
        }
        n.agent = start_agent(std::process::id(), kind)?;
        Ok(Some(n))
    }

    fn repeat(&mut self, mut f: impl FnMut() + Send + 'static) {
        let stop = self.stop.clone();
        self.threads.push(std::thread::spawn(move || {
            let mut times = histogram();
            while !stop.load(Ordering::Relaxed) {
                let began = Instant::now();
                f();
                times.saturating_record(began.elapsed().as_nanos() as u64);
            }
            times
        }));
    }

    /// Stops it, and says what it got done.
    ///
    /// # Errors
    ///
    /// The neighbour was another process, and failed: then there was none.
    pub fn stop(mut self) -> anyhow::Result<Done> {
        self.stop.store(true, Ordering::Relaxed);
        let mut times = histogram();
        for t in self.threads.drain(..) {
            if let Ok(t) = t.join() {
                let _ = times.add(t);
            }
        }
        if let Some(mut agent) = self.agent.take() {
            // It ends when its input does.
            drop(agent.stdin.take());
            let mut line = String::new();
            if let Some(out) = agent.stdout.take() {
                let _ = BufReader::new(out).read_line(&mut line);
            }
            let status = agent.wait()?;
            anyhow::ensure!(
                status.success(),
                "the process that looks at this one ended with {status}"
            );
            let mut words = line.split_whitespace();
            let mut next = || {
                words
                    .next()
                    .and_then(|w| w.parse::<f64>().ok())
                    .unwrap_or(0.0)
            };
            return Ok(Done {
                per_s: next(),
                p99_us: next(),
            });
        }
        let seconds = self.began.elapsed().as_secs_f64();
        Ok(Done {
            per_s: times.len() as f64 / seconds,
            p99_us: times.value_at_quantile(0.99) as f64 / 1e3,
        })
    }
}

/// A histogram of nanoseconds, from 100 ns to 100 s, precise to 1 %: small, since every reader has one and what it
/// touches is not what is measured.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(100, 100_000_000_000, 2)
        .unwrap_or_else(|e| unreachable!("constant bounds: {e}"))
}

/// The hidden subcommand that runs [`agent`].
pub const AGENT_COMMAND: &str = "bench-agent";

/// What an agent looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// `/proc/PID/smaps_rollup`.
    Smaps,
    /// The page tables, by `PAGEMAP_SCAN`.
    Pagemap,
}

impl std::str::FromStr for Look {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "smaps" => Ok(Look::Smaps),
            "pagemap" => Ok(Look::Pagemap),
            _ => Err(format!("{name} is neither smaps nor pagemap")),
        }
    }
}

/// Starts the process that looks at process `pid`, if the neighbour is one.
pub(crate) fn start_agent(pid: u32, kind: Disturbance) -> anyhow::Result<Option<Child>> {
    let Some(every) = kind.agent_every() else {
        return Ok(None);
    };
    Command::new(std::env::current_exe()?)
        .arg(AGENT_COMMAND)
        .args([pid.to_string(), every.as_millis().to_string()])
        .arg(match kind {
            Disturbance::Pagemap => "pagemap",
            _ => "smaps",
        })
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map(Some)
        .context("cannot start the process that looks at this one")
}

/// Looks at a process every so often (zero: in a loop without pause) until standard input ends, then prints how often per second, and the
/// 99th percentile in microseconds.
///
/// # Errors
///
/// The process is gone, or may not be looked at.
pub fn agent(pid: u32, every: Duration, what: Look) -> anyhow::Result<()> {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read(&mut [0]);
        let _ = tell.send(());
    });
    let path = format!("/proc/{pid}/smaps_rollup");
    let pagemap = match what {
        Look::Pagemap => Some(Pagemap::open(pid)?),
        Look::Smaps => None,
    };
    let mut times = histogram();
    let mut text = String::new();
    let start = Instant::now();
    for look in 1u32.. {
        let began = Instant::now();
        if let Some(pagemap) = &pagemap {
            pagemap.present()?;
        } else {
            text.clear();
            std::fs::File::open(&path)
                .and_then(|mut f| f.read_to_string(&mut text))
                .with_context(|| format!("cannot read {path}"))?;
        }
        times.saturating_record(began.elapsed().as_nanos() as u64);
        let is_over = if every.is_zero() {
            told.try_recv() != Err(TryRecvError::Empty)
        } else {
            // At equal distances, however long a look takes.
            let next = start + every * look;
            let pause = next.saturating_duration_since(Instant::now());
            told.recv_timeout(pause) != Err(RecvTimeoutError::Timeout)
        };
        if is_over {
            break;
        }
    }
    writeln!(
        std::io::stdout(),
        "{} {}",
        times.len() as f64 / start.elapsed().as_secs_f64(),
        times.value_at_quantile(0.99) as f64 / 1e3
    )?;
    Ok(())
}
