//! Who waits for which lock behind whose I/O, in a live process.
//!
//! A page fault that has to read gives its lock up for the read and then queues for mmap_lock, which all threads of the
//! process share. Tracepoints show that thread waiting; they do not show for whom, nor what that one was doing. This crate
//! joins the pieces:
//!
//! 1. BPF programs (`bpf/observe.bpf.c`) on the kernel's tracepoints follow each thread: the fault that it is in, the lock
//!    that it waits for or holds, and why it sleeps meanwhile. Faults are summed up in the kernel; long waits, and holds
//!    that others waited for, come out singly, through a ring.
//! 2. A *session* loads them, a *translator* gives numbers their names, and what comes out are the
//!    [events](faultless_trace::Event) of a trace.
//! 3. The *model* lays each wait over the *timeline* of its lock: who stood at the head of it, at every instant.
//! 4. A [`Report`] says it all: sums, blame, convoys, a verdict and remedies; [`html`] draws it, [`perfetto`] writes the
//!    events for the Perfetto UI.
//!
//! [`Observer`] watches live processes; [`report_of`] answers the same of a recorded trace.

#![cfg_attr(
    not(have_bpf),
    allow(dead_code, reason = "what live observations alone use")
)]

pub mod doctor;
pub mod html;
mod model;
mod names;
#[cfg_attr(not(have_bpf), path = "blind.rs")]
mod observer;
pub mod perfetto;
mod privilege;
mod process;
mod raw;
mod report;
#[cfg(have_bpf)]
mod session;
mod sums;
mod timeline;
#[cfg(have_bpf)]
mod translate;

pub use observer::{Observer, Sink};
pub use report::{
    BlameRow, Calls, ConvoyRow, Deed, DoubtRow, Faults, FileRow, Group, LaneRow, OTHER_MOUNTS,
    Observed, ProcessRow, Quantiles, Reads, Remedy, Report, SCHEMA, TimeBy, Timeline, Verdict,
    VictimRow, duration,
};

use faultless_trace::{Error, Reader};
use std::io::Read;
use std::time::Duration;

/// Waits for mmap_lock that are shorter are summed up only.
pub const WAIT_MIN: Duration = Duration::from_micros(20);
/// Holds that are shorter, and that nobody waited for, are not told.
pub const HOLD_MIN: Duration = Duration::from_millis(1);

/// Why this build cannot watch a live process; nothing, if it can.
pub fn why_not() -> Option<&'static str> {
    Some(env!("FAULTLESS_WITHOUT_BPF")).filter(|why| !why.is_empty())
}

/// How to watch.
#[derive(Debug, Clone)]
pub struct Options {
    /// Tell each fault, each hold for writing and each read of a file singly: for traces.
    pub every_fault: bool,
    /// Watch what the processes fork from now on as well.
    pub follow_children: bool,
}

/// What a recorded trace has to say.
///
/// A trace that was cut off is reported on as far as it goes, and [`DoubtRow::cut_off`] says so.
///
/// # Errors
///
/// When the trace cannot be read, or is damaged.
pub fn report_of<R: Read>(mut trace: Reader<R>) -> Result<Report, Error> {
    const BIN: u64 = 10_000_000;
    let header = trace.header().clone();
    let mut model = model::Model::of_trace(BIN);
    for event in &mut trace {
        match event {
            Ok(event) => model.event(&event),
            Err(Error::CutOff { events, .. }) if events > 0 => model.cut_off = true,
            Err(e) => return Err(e),
        }
    }
    let observed = Observed {
        processes: report::processes(&model),
        processes_seen: model.processes_seen,
        command: header.command.iter().map(|c| model::printable(c)).collect(),
        other_mounts: false,
        seconds: model.now as f64 / 1e9,
        began_unix: header.began_unix as f64 / 1e9,
        began_monotonic: header.began_monotonic as f64 / 1e9,
        kernel: model::printable(&header.kernel),
        processors: header.processors,
        missing: header.missing.iter().map(|m| model::printable(m)).collect(),
        own_cpu_seconds: 0.0,
    };
    Ok(report::report(&model, observed, None))
}

/// Whether a process can be watched at all.
///
/// # Errors
///
/// A sentence that says why not: it is not there, it is a thread, or it is the kernel's.
pub fn check_process(pid: u32) -> anyhow::Result<()> {
    process::name(pid).map(|_| ())
}

/// As `uname -r` has it.
pub fn kernel_release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "unknown".to_owned(), |s| s.trim().to_owned())
}

fn processors() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

/// Processor time of this process.
#[allow(unsafe_code, reason = "getrusage(2)")]
fn own_cpu_seconds() -> f64 {
    // SAFETY: zeros are a valid value of the structure, which the call fills.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}
