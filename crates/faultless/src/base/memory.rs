//! How much memory there is: of the machine, and of the control group that this process is in.

use crate::base::ids::Nanos;
use crate::base::text;
use std::path::{Path, PathBuf};

/// What is known about memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Most that this process can have without being throttled or ended: physical memory, or the least of the limits of its control
    /// group and those above it (`memory.max` and `memory.high`; version 1: `memory.limit_in_bytes`).
    pub(crate) limit: u64,
    /// What it could have now without swapping, by the kernel's estimate.
    pub(crate) available: u64,
    /// Physical memory.
    pub(crate) machine: u64,
    /// Memory of the control group with the smallest limit that no file on a disk backs. `None` if there is none, or if it does not say.
    pub(crate) anonymous: Option<u64>,
    /// For how long threads of that group have waited for memory so far (`memory.pressure`); of the machine, if there is no such group.
    /// `None` if the kernel does not say.
    pub(crate) stalled: Option<Nanos>,
}

/// Files of a control group's directory.
#[derive(Debug, Clone, Copy)]
struct Files {
    limits: &'static [&'static str],
    usage: &'static str,
}

const VERSION_1: Files = Files {
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
};
const VERSION_2: Files = Files {
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
};

/// Memory of a control group that no file on a disk backs, by its `memory.stat` (version 2 or 1): anonymous and shared.
fn anonymous(dir: &Path) -> Option<u64> {
    anonymous_by(&text_of(&dir.join("memory.stat")).ok()?)
}

fn anonymous_by(text: &str) -> Option<u64> {
    let field = |name: &str| {
        let line = text
            .lines()
            .find(|l| l.strip_prefix(name).is_some_and(|r| r.starts_with(' ')))?;
        line.split(' ').nth(1)?.parse::<u64>().ok()
    };
    let (anonymous, shared) = match field("anon") {
        Some(anonymous) => (anonymous, field("shmem")),
        None => (field("total_rss")?, field("total_shmem")),
    };
    Some(anonymous + shared.unwrap_or(0))
}

/// The time for which some thread waited, by a file of pressure stall information.
fn stalled(path: &Path) -> Option<Nanos> {
    stalled_by(&text_of(path).ok()?)
}

fn stalled_by(text: &str) -> Option<Nanos> {
    let some = text.lines().find_map(|l| l.strip_prefix("some "))?;
    let total = some.split(' ').find_map(|f| f.strip_prefix("total="))?;
    let us: u64 = total.parse().ok()?;
    Some(Nanos::from_micros(us))
}

fn meminfo(field: &str) -> Option<u64> {
    let text = text::read("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with(field))?;
    line.split_whitespace()
        .nth(1)?
        .parse::<u64>()
        .ok()
        .map(|kib| kib << 10)
}

/// A limit or usage file of a control group; "max" is no limit.
fn number(path: PathBuf) -> Option<u64> {
    text_of(&path).ok()?.trim().parse().ok()
}

/// Directories of this process's memory control group, from its own up to the root.
fn groups() -> Vec<(PathBuf, Files)> {
    let Ok(text) = text::read("/proc/self/cgroup") else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for line in text.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let path = Path::new(path.trim_start_matches('/'));
        let (roots, files): (&[&str], _) = if controllers.is_empty() {
            (&["/sys/fs/cgroup", "/sys/fs/cgroup/unified"], VERSION_2)
        } else if controllers.split(',').any(|c| c == "memory") {
            (&["/sys/fs/cgroup/memory"], VERSION_1)
        } else {
            continue;
        };
        for root in roots {
            found.extend(path.ancestors().map(|p| (Path::new(root).join(p), files)));
        }
    }
    found
}

fn text_of(path: &Path) -> std::io::Result<String> {
    text::read(path.to_str().unwrap_or_default())
}

/// Looks at the machine and the control group as they are now.
pub(crate) fn look() -> Memory {
    let machine = meminfo("MemTotal:").unwrap_or(1 << 30);
    let mut memory = Memory {
        limit: machine,
        available: meminfo("MemAvailable:").unwrap_or(machine / 2),
        machine,
        anonymous: None,
        stalled: None,
    };
    let mut smallest = None;
    for (dir, files) in groups() {
        let limits = files
            .limits
            .iter()
            .filter_map(|file| number(dir.join(file)));
        let Some(limit) = limits.min().filter(|&l| l < machine) else {
            continue;
        };
        let used = number(dir.join(files.usage)).unwrap_or(0);
        memory.available = memory.available.min(limit.saturating_sub(used));
        if limit < memory.limit {
            memory.limit = limit;
            smallest = Some(dir);
        }
    }
    match smallest {
        Some(dir) => {
            memory.anonymous = anonymous(&dir);
            memory.stalled = stalled(&dir.join("memory.pressure"));
        }
        None => memory.stalled = stalled(Path::new("/proc/pressure/memory")),
    }
    memory
}

/// Bytes of page tables of this process (`VmPTE`).
pub(crate) fn page_tables() -> u64 {
    let Ok(text) = text::read("/proc/self/status") else {
        return 0;
    };
    text.lines()
        .find_map(|l| l.strip_prefix("VmPTE:"))
        .and_then(|v| v.split_whitespace().next()?.parse::<u64>().ok())
        .map_or(0, |kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_some_memory() {
        let m = look();
        assert!(m.machine >= m.limit && m.limit > 1 << 20, "{m:?}");
        assert!(page_tables() > 0);
    }

    #[test]
    fn a_group_counts_what_no_disk_backs() {
        let version_2 = "anon 8192\nfile 9999\nanon_thp 77\nshmem 4096\n";
        assert_eq!(anonymous_by(version_2), Some(12_288));
        let version_1 = "rss 1\nshmem 2\ntotal_rss 8192\ntotal_shmem 4096\n";
        assert_eq!(anonymous_by(version_1), Some(12_288));
        assert_eq!(anonymous_by("file 1\n"), None);
    }

    #[test]
    fn pressure_is_what_some_thread_waited() {
        let text = "some avg10=0.00 avg60=1.20 avg300=0.58 total=617748\n\
                    full avg10=0.00 avg60=0.00 avg300=0.18 total=201848\n";
        assert_eq!(stalled_by(text), Some(Nanos::from_micros(617_748)));
        for other in ["", "some avg10=0.00\n", "some total=x\n", "full total=1\n"] {
            assert_eq!(stalled_by(other), None, "{other}");
        }
    }
}
