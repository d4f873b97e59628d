//! A plain program in C, by itself and under `faultless run`: what a program gains that was not changed.

use crate::cell::{Cell, Measured, Purpose, QUANTILES, Setting, WARM_PER_SECOND};
use crate::contender::{self, Kind};
use crate::machine::LockTracepoint;
use crate::neighbour::{histogram, start_agent};
use crate::scenario::{Access, Disturbance, Scenario};
use anyhow::{Context, bail};
use faultless_run::read_reports;
use faultless_sys::mem::PAGE;
use faultless_untrusted::printable;
use serde::Deserialize;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};

/// The program, as it was compiled with this crate.
const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/unmodified"));

/// What it prints.
#[derive(Debug, Deserialize)]
struct Printed {
    seconds: f64,
    reads: u64,
    wrong: u64,
    major_faults: u64,
    /// Those of each reader's first read, which is not timed.
    first_major_faults: u64,
    cpu_s: f64,
    rounds_per_s: f64,
    /// How long it took to open the file for writing.
    open_ns: u64,
    longest_ns: u64,
    locks_readers: Option<u64>,
    locks_process: Option<u64>,
    /// Upper ends of buckets, in nanoseconds, and how many reads each has.
    times: Vec<(u64, u64)>,
}

/// Whether a scenario can be played to a program that is not changed: its memory, its storage and the way it reads are its
/// own.
pub fn suits(scenario: Scenario) -> bool {
    matches!(scenario.access(), Access::Cold | Access::Resident)
        && scenario.storage_delay_us().is_none()
}

/// The program as a file, for as long as this lives.
#[derive(Debug)]
pub struct Program {
    /// Nobody else can write to it.
    dir: tempfile::TempDir,
}

impl Program {
    /// Writes it.
    ///
    /// # Errors
    ///
    /// The temporary directory cannot be written to.
    pub fn new() -> anyhow::Result<Program> {
        let program = Program {
            dir: crate::private_dir().context("cannot make a directory for the program")?,
        };
        let path = program.path();
        std::fs::File::options()
            .write(true)
            .create_new(true)
            .mode(0o700)
            .open(&path)
            .and_then(|mut f| f.write_all(PROGRAM))
            .with_context(|| format!("cannot write {}", printable(&path)))?;
        Ok(program)
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("program")
    }

    /// Runs it once.
    ///
    /// # Errors
    ///
    /// It fails, or what it needs cannot be started.
    pub fn run(&self, setting: &Setting, cell: &Cell) -> anyhow::Result<Measured> {
        if setting.scenario.access() == Access::Resident {
            // What readers notice of the change is the question, not the disk: afterwards the kernel finds its pages.
            fill_cache(setting)?;
        } else {
            contender::drop_cache(&setting.file)?;
        }
        let reports = self.dir.path().join("reports.json");
        let mut command = match cell.kind {
            Kind::ProgramServed => {
                let mut command = Command::new(std::env::current_exe()?);
                command
                    .args([
                        "run",
                        "--memory",
                        &setting.memory.to_string(),
                        "--stats-json",
                    ])
                    .arg(&reports)
                    .args(["--backend", "stand-in", "--reads", "direct", "--"])
                    .arg(self.path());
                command
            }
            Kind::ProgramLive => {
                let mut command = Command::new(std::env::current_exe()?);
                command
                    .args(["run", "--backend", "live", "--stats-json"])
                    .arg(&reports)
                    .arg("--")
                    .arg(self.path());
                command
            }
            _ => Command::new(self.path()),
        };
        let pages = setting.size / PAGE as u64;
        let parts = setting.parts.max(1);
        let first = pages / parts as u64 * (cell.part % parts) as u64;
        let disturbance = setting.scenario.disturbance();
        let neighbour = match disturbance {
            // (A gentle agent has no thread beside it.)
            Disturbance::None | Disturbance::SmapsGentle => "none",
            Disturbance::Churn => "churn",
            // (The agent is another process.)
            Disturbance::Smaps | Disturbance::Pagemap => "smaps",
            Disturbance::Fork => "fork",
            Disturbance::Bigfree => "bigfree",
            Disturbance::Writer => "writer",
        };
        let warm = ((setting.seconds * WARM_PER_SECOND as f64) as u64).min(setting.size);
        // Counting costs the program that takes the lock most: it has a round of its own.
        let tracepoint = match LockTracepoint::find() {
            Ok(id) if cell.purpose == Purpose::Counted => id.0,
            _ => 0,
        };
        let mut program = command
            .arg(&setting.file)
            .args([setting.size, first, setting.threads as u64].map(|n| n.to_string()))
            .args([&setting.seconds.to_string(), neighbour])
            .args([setting.scenario.ballast(), warm, tracepoint].map(|n| n.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start the program")?;
        let out = program.stdout.take().context("the program has no output")?;
        let printed = converse(&mut program, out, disturbance);
        let status = program.wait()?;
        let (printed, agents) =
            printed.with_context(|| format!("the program ended with {status}"))?;
        anyhow::ensure!(status.success(), "the program ended with {status}");
        let (misses, first_misses) = match cell.kind {
            Kind::ProgramServed | Kind::ProgramLive => {
                let all = read_reports(&reports).context("cannot read the report")?;
                let _ = std::fs::remove_file(&reports);
                let misses: u64 = all.iter().map(|r| r.totals.misses).sum();
                anyhow::ensure!(
                    misses > 0,
                    "nothing was taken over: {}",
                    all.iter().map(|r| r.to_string()).collect::<String>()
                );
                // The report is of the whole process: the first reads are in it.
                (misses, 0)
            }
            _ => (printed.major_faults, printed.first_major_faults),
        };
        let mut measured = measured(&printed, misses, agents, disturbance)?;
        measured.first_misses = first_misses;
        Ok(measured)
    }
}

/// Reads the data into the page cache.
fn fill_cache(setting: &Setting) -> anyhow::Result<()> {
    let file = faultless_untrusted::input::open(&setting.file)?;
    std::io::copy(&mut file.take(setting.size), &mut std::io::sink())?;
    Ok(())
}

/// Waits until the program is ready, starts the process that reads its smaps if there is one, and has it measure. Returns
/// what it printed, and what the other process did: rounds per second, and the 99th percentile of one in microseconds.
fn converse(
    program: &mut Child,
    out: ChildStdout,
    disturbance: Disturbance,
) -> anyhow::Result<(Printed, Option<(f64, f64)>)> {
    let mut lines = BufReader::new(out).lines();
    let mut next = || {
        lines
            .next()
            .context("it said nothing")?
            .map_err(anyhow::Error::from)
    };
    anyhow::ensure!(next()? == "ready", "it is not ready");
    let agent = start_agent(program.id(), disturbance)?;
    // Let the neighbour get going.
    std::thread::sleep(std::time::Duration::from_millis(100));
    let mut input = program.stdin.take().context("the program has no input")?;
    input.write_all(b"go\n")?;
    let line = next();
    let mut did = None;
    if let Some(mut agent) = agent {
        // It ends when its input does.
        drop(agent.stdin.take());
        let mut text = String::new();
        if let Some(out) = agent.stdout.take() {
            BufReader::new(out).read_line(&mut text)?;
        }
        let status = agent.wait()?;
        // The program may have ended just before: then it has nothing to read.
        let numbers: Vec<f64> = text
            .split_whitespace()
            .filter_map(|w| w.parse().ok())
            .collect();
        match numbers[..] {
            [per_s, p99] => did = Some((per_s, p99)),
            _ if line.is_ok() && status.code() == Some(1) => {}
            _ => bail!("the process that reads smaps_rollup ended with {status}"),
        }
    }
    Ok((
        serde_json::from_str(&line?).context("it printed something odd")?,
        did,
    ))
}

fn measured(
    printed: &Printed,
    misses: u64,
    agent: Option<(f64, f64)>,
    disturbance: Disturbance,
) -> anyhow::Result<Measured> {
    let mut times = histogram();
    for &(ns, count) in &printed.times {
        times.saturating_record_n(ns, count);
    }
    anyhow::ensure!(
        printed.reads > 0,
        "nothing was read in {:.2} s",
        printed.seconds
    );
    let us = |q: f64| times.value_at_quantile(q) as f64 / 1e3;
    Ok(Measured {
        seconds: printed.seconds,
        reads: printed.reads,
        p50_us: us(0.5),
        p99_us: us(0.99),
        p999_us: us(0.999),
        max_us: printed.longest_ns as f64 / 1e3,
        latency_us: QUANTILES.iter().map(|&q| us(q)).collect(),
        neighbour_per_s: match (agent, disturbance) {
            (_, Disturbance::None) => None,
            (_, Disturbance::Writer) => Some(1.0 / printed.seconds),
            (Some((per_s, _)), _) => Some(per_s),
            _ => Some(printed.rounds_per_s),
        },
        neighbour_p99_us: match disturbance {
            Disturbance::Writer => Some(printed.open_ns as f64 / 1e3),
            _ => agent.map(|(_, p99)| p99),
        },
        misses,
        locks_readers: printed.locks_readers,
        locks_process: printed.locks_process,
        cpu_s: printed.cpu_s,
        wrong_bytes: printed.wrong,
        ..Measured::default()
    })
}

#[cfg(test)]
mod tests {
    use crate::neighbour::{BIG, CHURN_THREADS, MAP_EVERY, SMALL};

    /// A row's title has the numbers of neighbour.rs, also where the neighbour is the program's own.
    #[test]
    fn the_program_has_the_same_neighbours() {
        let program = include_str!("unmodified.c");
        for line in [
            format!("#define CHURN_THREADS {CHURN_THREADS}\n"),
            format!("#define SMALL ({}ul << 10)\n", SMALL >> 10),
            format!("#define BIG ({}ul << 30)\n", BIG >> 30),
            format!("#define MAP_EVERY_US {}\n", MAP_EVERY.as_micros()),
        ] {
            assert!(program.contains(&line), "{line}");
        }
    }
}
