//! What a benchmark ran on, and what the machine lets it count.

#![allow(
    unsafe_code,
    reason = "mounts tracefs for a moment where it is not mounted; asks for processors"
)]

use anyhow::{Context, bail};
use faultless::ByteSize;
use faultless_sys::perf;
use faultless_untrusted::input::kernel_text;
use faultless_untrusted::printable;
use serde::Serialize;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// A machine.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Kernel release.
    pub kernel: String,
    /// Processors that this process may use.
    pub cores: usize,
    /// Model of the processor.
    pub processor: String,
    /// Memory in bytes.
    pub memory: u64,
    /// The device that the data file lies on, and its file system.
    pub storage: String,
    /// Why acquisitions of `mmap_lock` cannot be counted, if they cannot.
    pub mmap_lock_uncounted: Option<String>,
}

impl Machine {
    /// Looks at this machine, with the storage under `file`.
    pub fn look(file: &Path) -> Self {
        let read = |p: &str| fs::read_to_string(p).unwrap_or_default();
        let field = |text: String, name: &str| {
            text.lines()
                .find_map(|l| l.strip_prefix(name))
                .map(|v| v.trim_start_matches([':', '\t', ' ']).trim().to_owned())
        };
        let kib: u64 = field(read("/proc/meminfo"), "MemTotal")
            .and_then(|v| v.split_whitespace().next()?.parse().ok())
            .unwrap_or(0);
        Machine {
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            processor: field(read("/proc/cpuinfo"), "model name")
                .unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            memory: kib << 10,
            storage: storage(file).unwrap_or_else(|| "unknown".to_owned()),
            mmap_lock_uncounted: LockTracepoint::countable().err().map(|e| format!("{e:#}")),
        }
    }

    /// In one line.
    pub fn line(&self) -> String {
        format!(
            "Linux {}, {} × {}, {} of memory, {}",
            self.kernel,
            self.cores,
            self.processor,
            ByteSize::new(self.memory),
            self.storage
        )
    }
}

/// Has this process, and what it starts, use the first so many of the processors that it may use.
///
/// # Errors
///
/// It may not use so many, or the kernel refuses.
pub fn use_processors(count: usize) -> anyhow::Result<()> {
    // SAFETY: a set of bits, for which zero is a value.
    let (mut may, mut chosen): (libc::cpu_set_t, libc::cpu_set_t) = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::cpu_set_t>();
    // SAFETY: the set is as long as is said.
    let got = unsafe { libc::sched_getaffinity(0, size, &mut may) };
    if got != 0 {
        return Err(std::io::Error::last_os_error()).context("cannot ask which there are");
    }
    // SAFETY: numbers that the sets have.
    let all = (0..8 * size).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &may) });
    let all: Vec<usize> = all.collect();
    if count > all.len() {
        bail!("there are {}; ask for that many at most", all.len());
    }
    // SAFETY: as above.
    all[..count]
        .iter()
        .for_each(|&cpu| unsafe { libc::CPU_SET(cpu, &mut chosen) });
    // SAFETY: the set is as long as is said.
    if unsafe { libc::sched_setaffinity(0, size, &chosen) } != 0 {
        return Err(std::io::Error::last_os_error()).context("the kernel refuses");
    }
    Ok(())
}

fn storage(file: &Path) -> Option<String> {
    let dev = fs::metadata(file)
        .ok()
        .or_else(|| fs::metadata(file.parent()?).ok())?
        .dev();
    let id = format!("{}:{}", libc::major(dev), libc::minor(dev));
    let mounts = kernel_text("/proc/self/mountinfo").ok()?;
    let mount = mounts.lines().find(|l| l.split(' ').nth(2) == Some(&id))?;
    let mut tail = mount.split(" - ").nth(1)?.split(' ');
    let (fs_type, device) = (tail.next()?, tail.next()?);
    let spinning = fs::read_to_string(format!("/sys/dev/block/{id}/queue/rotational")).ok();
    let kind = match spinning.as_deref().map(str::trim) {
        Some("0") => " (not rotational)",
        Some("1") => " (reported as rotational)",
        _ => "",
    };
    Some(format!(
        "{} on {}{kind}",
        printable(fs_type),
        printable(device)
    ))
}

/// The kernel's tracepoint at each acquisition of `mmap_lock`.
#[derive(Debug, Clone, Copy)]
pub struct LockTracepoint(pub u64);

impl LockTracepoint {
    /// Finds its number.
    pub fn find() -> anyhow::Result<Self> {
        let ids = perf::tracepoint_ids(&["mmap_lock/mmap_lock_start_locking"]).context(
            "the tracepoint mmap_lock_start_locking cannot be read; run as root, on a kernel with CONFIG_TRACING",
        )?;
        Ok(LockTracepoint(ids[0]))
    }

    /// Whether it can be counted on.
    pub fn countable() -> anyhow::Result<()> {
        let id = Self::find()?;
        match perf::Counter::tracepoint(id.0, perf::Scope::Thread) {
            Ok(_) => Ok(()),
            Err(e) => bail!(
                "perf_event_open is refused ({e}); run as root, or set kernel.perf_event_paranoid to -1"
            ),
        }
    }
}
