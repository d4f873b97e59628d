//! Runs seeds: each in a process of its own, so that nothing is left of one when the next begins.

#![allow(unsafe_code, reason = "forks, and waits for children")]

use crate::plan::Plan;
use crate::{scheduler, workload, world};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Seeds that once failed, and must not again.
const CORPUS: &str = include_str!("../corpus.txt");

const USAGE: &str =
    "usage: faultless-sim [--seconds N | --seeds N | --seed N] [--from N] [--jobs N]

  --seconds N   run fresh seeds for so many seconds (120)
  --seeds N     run so many fresh seeds
  --seed N      run one seed again, and say how it went
  --from N      the first fresh seed (by the clock)
  --jobs N      run so many at a time (2)
  --no-corpus   leave out the seeds that once failed
  --keep-going  go on after a failure
  --trace       with --seed: tell each system call";

struct Options {
    seconds: u64,
    seeds: u64,
    seed: Option<u64>,
    from: u64,
    jobs: usize,
    corpus: bool,
    keep_going: bool,
    trace: bool,
}

fn options() -> Result<Options, String> {
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let mut options = Options {
        seconds: 120,
        seeds: u64::MAX,
        seed: None,
        from: clock.map_or(1, |d| d.as_nanos() as u64 >> 10 << 20),
        jobs: 2,
        corpus: true,
        keep_going: false,
        trace: false,
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        if arg == "--no-corpus" {
            options.corpus = false;
            continue;
        }
        if arg == "--trace" {
            options.trace = true;
            continue;
        }
        if arg == "--keep-going" {
            options.keep_going = true;
            continue;
        }
        let text = args.next().ok_or(format!("{arg} wants a number"))?;
        let number: u64 = text
            .parse()
            .map_err(|_| format!("{arg} {text:?}: not a number"))?;
        match arg.as_str() {
            "--seconds" => options.seconds = number,
            "--seeds" => (options.seeds, options.seconds) = (number, u64::MAX / 2),
            "--seed" => options.seed = Some(number),
            "--from" => options.from = number,
            "--jobs" => options.jobs = number.clamp(1, 256) as usize,
            _ => return Err(format!("{arg}: there is no such option")),
        }
    }
    Ok(options)
}

pub(crate) fn main() -> ExitCode {
    let options = match options() {
        Ok(options) => options,
        Err(wrong) => {
            eprintln!("faultless-sim: {wrong}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if let Some(seed) = options.seed {
        let plan = Plan::of(seed);
        eprintln!("{plan:#?}");
        let sums = run(plan, options.trace);
        println!(
            "seed {seed}: passed; {} steps, {} operations",
            sums.steps, sums.operations
        );
        return ExitCode::SUCCESS;
    }
    all(&options)
}

/// What a run came to.
#[derive(Debug, Default, Clone, Copy)]
#[repr(C)]
struct Sums {
    steps: u64,
    operations: u64,
    switches: u64,
    nanoseconds: u64,
}

/// Runs one plan in this process, which ends if something is wrong.
fn run(plan: Plan, trace: bool) -> Sums {
    world::create(plan);
    world::with(|w| w.trace = trace);
    scheduler::spawn("main".into(), Box::new(workload::run));
    scheduler::run();
    world::with(|w| Sums {
        steps: w.steps,
        operations: w.operations,
        switches: w.scheduler.switches,
        nanoseconds: w.clock,
    })
}

/// A seed that runs in a child.
struct Child {
    pid: i32,
    seed: u64,
    began: Instant,
    out: i32,
}

/// Real time after which a run counts as hung.
const HUNG: Duration = Duration::from_secs(120);

fn start(seed: u64) -> std::io::Result<Child> {
    let mut pipe = [0; 2];
    // SAFETY: room for two numbers.
    if unsafe { libc::pipe(pipe.as_mut_ptr()) } != 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()),
        0 => {
            let sums = run(Plan::of(seed), false);
            let at = &raw const sums;
            // SAFETY: a plain structure; then the process ends, without anything to clean up.
            unsafe {
                libc::write(pipe[1], at.cast(), size_of::<Sums>());
                libc::_exit(0)
            }
        }
        pid => {
            // SAFETY: the child's end.
            unsafe { libc::close(pipe[1]) };
            Ok(Child {
                pid,
                seed,
                began: Instant::now(),
                out: pipe[0],
            })
        }
    }
}

impl Child {
    /// Whether it has ended: with what it came to, or why not.
    fn ended(&self) -> Option<Result<Sums, String>> {
        let mut status = 0;
        // SAFETY: a child of this process.
        let ended = unsafe { libc::waitpid(self.pid, &mut status, libc::WNOHANG) };
        if ended == 0 {
            if self.began.elapsed() < HUNG {
                return None;
            }
            // SAFETY: the same; it is waited for at the next look.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
            // SAFETY: as above.
            unsafe { libc::waitpid(self.pid, &mut status, 0) };
            return Some(Err(format!("it hung for {} s", HUNG.as_secs())));
        }
        let mut sums = Sums::default();
        // SAFETY: a plain structure; any bytes are valid.
        let read = unsafe { libc::read(self.out, (&raw mut sums).cast(), size_of::<Sums>()) };
        // SAFETY: opened by `start`.
        unsafe { libc::close(self.out) };
        Some(match (libc::WIFEXITED(status), libc::WEXITSTATUS(status)) {
            (true, 0) if read == size_of::<Sums>() as isize => Ok(sums),
            (true, code) => Err(format!("exit status {code}")),
            (false, _) => Err(format!("killed by signal {}", libc::WTERMSIG(status))),
        })
    }
}

/// Runs many seeds.
fn all(options: &Options) -> ExitCode {
    let began = Instant::now();
    let corpus = CORPUS
        .lines()
        .filter_map(|l| l.split('#').next()?.trim().parse().ok());
    let mut seeds: Box<dyn Iterator<Item = u64>> = match options.corpus {
        true => Box::new(corpus.chain((0..options.seeds).map(|n| options.from.wrapping_add(n)))),
        false => Box::new((0..options.seeds).map(|n| options.from.wrapping_add(n))),
    };
    let (mut children, mut runs, mut sums, mut failed) =
        (Vec::<Child>::new(), 0u64, Sums::default(), Vec::new());
    let mut more = true;
    let terminal = std::io::stderr().is_terminal();
    let mut told = Instant::now();
    loop {
        more &= began.elapsed().as_secs() < options.seconds
            && (failed.is_empty() || options.keep_going);
        while more && children.len() < options.jobs {
            match seeds.next().map(start) {
                None => more = false,
                Some(Ok(child)) => children.push(child),
                Some(Err(e)) => {
                    eprintln!(
                        "faultless-sim: cannot start a process: {e}; end some, and run it again"
                    );
                    return ExitCode::FAILURE;
                }
            }
        }
        if children.is_empty() {
            break;
        }
        children.retain(|child| match child.ended() {
            None => true,
            Some(Ok(s)) => {
                runs += 1;
                sums.steps += s.steps;
                sums.operations += s.operations;
                sums.switches += s.switches;
                sums.nanoseconds += s.nanoseconds;
                false
            }
            Some(Err(why)) => {
                eprintln!(
                    "seed {}: {why}\n  again: ./run simulate --seed {}",
                    child.seed, child.seed
                );
                failed.push(child.seed);
                false
            }
        });
        if terminal && told.elapsed() > Duration::from_millis(500) {
            told = Instant::now();
            eprint!("\r{runs} runs, {} M steps", sums.steps / 1_000_000);
            let _ = std::io::stderr().flush();
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    if terminal {
        eprintln!();
    }
    let secs = began.elapsed().as_secs_f64();
    println!(
        "{runs} runs in {secs:.1} s: {} operations, {:.2} M steps ({:.2} M in a second), {:.2} M switches, {:.0} simulated seconds; {} failed",
        sums.operations,
        sums.steps as f64 / 1e6,
        sums.steps as f64 / 1e6 / secs,
        sums.switches as f64 / 1e6,
        sums.nanoseconds as f64 / 1e9,
        failed.len(),
    );
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
