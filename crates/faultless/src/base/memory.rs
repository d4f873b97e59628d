//! How much memory there is: of the machine, and of the control group that this process is in.

use crate::base::text;
use std::path::{Path, PathBuf};

/// What is known about memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Most that this process can ever have: physical memory, or its control group's limit.
    pub(crate) limit: u64,
    /// What it could have now without swapping, by the kernel's estimate.
    pub(crate) available: u64,
    /// Physical memory.
    pub(crate) machine: u64,
    /// Anonymous memory of the control group with the smallest limit; 0 where there is none.
    pub(crate) anonymous: u64,
}

/// Anonymous memory of a control group, by its `memory.stat` (version 2 or 1).
fn anonymous(dir: &Path) -> Option<u64> {
    let text = text_of(&dir.join("memory.stat")).ok()?;
    let field = |name: &str| {
        let line = text
            .lines()
            .find(|l| l.strip_prefix(name).is_some_and(|r| r.starts_with(' ')))?;
        line.split(' ').nth(1)?.parse().ok()
    };
    field("anon").or_else(|| field("total_rss"))
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

/// Directories of this process's memory control group, from its own up to the root, with the names of the files that
/// hold limit and usage (version 1 or 2).
fn groups() -> Vec<(PathBuf, &'static str, &'static str)> {
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
        let (roots, limit, usage): (&[&str], _, _) = if controllers.is_empty() {
            (
                &["/sys/fs/cgroup", "/sys/fs/cgroup/unified"],
                "memory.max",
                "memory.current",
            )
        } else if controllers.split(',').any(|c| c == "memory") {
            (
                &["/sys/fs/cgroup/memory"],
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        } else {
            continue;
        };
        for root in roots {
            found.extend(
                path.ancestors()
                    .map(|p| (Path::new(root).join(p), limit, usage)),
            );
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
        anonymous: 0,
    };
    for (dir, limit, usage) in groups() {
        if let Some(limit) = number(dir.join(limit)).filter(|&l| l < machine) {
            if limit < memory.limit {
                memory.anonymous = anonymous(&dir).unwrap_or(0);
            }
            memory.limit = memory.limit.min(limit);
            let used = number(dir.join(usage)).unwrap_or(0);
            memory.available = memory.available.min(limit.saturating_sub(used));
        }
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
    #[test]
    fn there_is_some_memory() {
        let m = super::look();
        assert!(m.machine >= m.limit && m.limit > 1 << 20, "{m:?}");
        assert!(super::page_tables() > 0);
    }
}
