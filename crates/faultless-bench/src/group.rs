//! A memory control group, version 1 or 2, for one process.

use anyhow::Context;
use faultless_untrusted::printable;
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A control group that is removed when dropped.
#[derive(Debug)]
pub struct Group {
    dir: PathBuf,
    place: Place,
}

/// Where a process joins a group, and where the group's limit is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Place {
    processes: PathBuf,
    limit: PathBuf,
}

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
        let place = Place {
            processes: dir.join("cgroup.procs"),
            limit: dir.join(file),
        };
        let group = Group { dir, place };
        let limit = &group.place.limit;
        fs::write(limit, bytes.to_string()).with_context(|| {
            format!(
                "cannot limit memory through {}; the memory controller is missing",
                printable(limit)
            )
        })?;
        // Swapping would be another measurement. Where there is none, there is nothing to forbid.
        let _ = fs::write(group.dir.join("memory.swap.max"), "0");
        let _ = fs::write(group.dir.join("memory.swappiness"), "0");
        Ok(group)
    }

    /// Where its files are.
    pub fn place(&self) -> &Place {
        &self.place
    }
}

impl Place {
    /// Moves the calling process into the group. What it has already stays charged where it was.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn join(&self) -> anyhow::Result<()> {
        fs::write(&self.processes, std::process::id().to_string()).with_context(|| {
            format!(
                "cannot move this process into a group by {}",
                printable(&self.processes)
            )
        })
    }

    /// Lowers the limit, though the group may have more memory than that. The kernel takes back what it can: version 1 refuses as long
    /// as that is too little, and version 2 ends processes.
    ///
    /// # Errors
    ///
    /// The kernel still refuses after ten seconds.
    pub fn lower(&self, bytes: u64) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            match fs::write(&self.limit, bytes.to_string()) {
                Err(e)
                    if e.raw_os_error() == Some(libc::EBUSY)
                        && began.elapsed() < Duration::from_secs(10) =>
                {
                    std::thread::sleep(Duration::from_millis(10));
                }
                done => {
                    return done.with_context(|| {
                        format!("cannot lower {} to {bytes}", printable(&self.limit))
                    });
                }
            }
        }
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
            if fs::remove_dir(&self.dir).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
