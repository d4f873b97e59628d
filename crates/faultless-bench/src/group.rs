//! A memory control group, version 1 or 2, for one process.

use anyhow::Context;
use faultless_untrusted::printable;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A control group that is removed when dropped.
#[derive(Debug)]
pub struct Group(PathBuf);

impl Group {
    /// Makes a group whose processes may use `bytes` of memory.
    ///
    /// # Errors
    ///
    /// Without root, or without a memory controller.
    pub fn new(name: &str, bytes: u64) -> anyhow::Result<Self> {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let (root, file) = if v1.join("memory.limit_in_bytes").exists() {
            (v1, "memory.limit_in_bytes")
        } else {
            (Path::new("/sys/fs/cgroup"), "memory.max")
        };
        sweep(root, name);
        let dir = root.join(format!("{name}-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| {
            format!(
                "cannot make the control group {}; run as root",
                printable(&dir)
            )
        })?;
        let group = Group(dir);
        let limit = group.0.join(file);
        fs::write(&limit, bytes.to_string()).with_context(|| {
            format!(
                "cannot limit memory through {}; the memory controller is missing",
                printable(&limit)
            )
        })?;
        // Swapping would be another measurement. Where there is none, there is nothing to forbid.
        let _ = fs::write(group.0.join("memory.swap.max"), "0");
        let _ = fs::write(group.0.join("memory.swappiness"), "0");
        Ok(group)
    }

    /// Moves a process into the group.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn admit(&self, pid: u32) -> anyhow::Result<()> {
        fs::write(self.0.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("cannot move a process into {}", printable(&self.0)))
    }
}

/// Removes groups that processes left behind which were ended from outside.
fn sweep(root: &Path, name: &str) {
    let Ok(entries) = fs::read_dir(root) else {
        return;
    };
    for entry in entries.flatten() {
        let file_name = entry.file_name();
        let pid = file_name
            .to_str()
            .and_then(|n| n.strip_prefix(name)?.strip_prefix('-')?.parse::<u32>().ok());
        if pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            // It has no process, or this fails.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // A process that has just ended may still be counted.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
