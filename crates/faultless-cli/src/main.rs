//! The `faultless` command: parses, calls, prints.

mod bench;
mod doctor;
mod live;
mod observe;
mod output;
mod run;
mod whatif;

use clap::{Parser, Subcommand};
use faultless_untrusted::printable;
use std::process::ExitCode;

/// Major page faults without mmap_lock.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure the kernel's mmap, pread, userfaultfd with monitor threads, and Faultless, beside busy neighbours.
    Bench(bench::Args),
    /// Run a program whose large file mappings are served without mmap_lock.
    Run(run::Args),
    /// Say who waits for which lock behind whose I/O, in a live process.
    Observe(observe::Args),
    /// Say what each design of the page fault would do to a workload: a model.
    Whatif(whatif::Args),
    /// Say what Faultless and its observer can do on this machine, and what each missing thing costs.
    ///
    /// Where the user may observe, it loads the observer's BPF programs for a moment.
    Doctor(doctor::Args),
    /// (internal) One setting's measurements.
    #[command(name = faultless_bench::plan::WORKER_COMMAND, hide = true)]
    Worker,
    /// (internal) Serves the data as a file system.
    #[command(name = faultless_bench::plan::STORAGE_COMMAND, hide = true)]
    Storage {
        /// Where.
        mountpoint: std::path::PathBuf,
        /// Bytes of data.
        len: u64,
    },
    /// (internal) Makes a disk in memory, and takes it down.
    #[command(name = faultless_bench::fast::COMMAND, hide = true)]
    Fast {
        /// Bytes of data.
        len: u64,
    },
    /// (internal) Looks at a process, again and again.
    #[command(name = faultless_bench::neighbour::AGENT_COMMAND, hide = true)]
    Agent {
        /// Whose.
        pid: u32,
        /// How often, in milliseconds; 0: without pause.
        every_ms: u64,
        /// At what: smaps or pagemap.
        what: faultless_bench::neighbour::Look,
    },
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Bench(args) => bench::run(args),
        Command::Run(args) => run::run(args),
        Command::Observe(args) => observe::run(args),
        Command::Whatif(args) => whatif::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Worker => faultless_bench::plan::work(),
        Command::Storage { mountpoint, len } => {
            faultless_bench::plan::serve_storage(&mountpoint, len)
        }
        Command::Fast { len } => faultless_bench::fast::serve(len),
        Command::Agent {
            pid,
            every_ms,
            what,
        } => {
            let every = std::time::Duration::from_millis(every_ms);
            faultless_bench::neighbour::agent(pid, every, what)
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("faultless: {}", printable(&format!("{e:#}")).lines());
            ExitCode::FAILURE
        }
    }
}
