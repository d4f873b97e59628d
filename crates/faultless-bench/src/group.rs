//! A memory control group, version 1 or 2, for one process.

use anyhow::Context;
use faultless_untrusted::printable;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A control group that is removed when dropped.
#[derive(Debug)]
pub struct Group {
    dir: PathBuf,
    /// The file that holds the limit.
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
        let limit = dir.join(file);
        let group = Group { dir, limit };
        fs::write(&group.limit, bytes.to_string()).with_context(|| {
            format!(
                "cannot limit memory through {}; the memory controller is missing",
                printable(&group.limit)
            )
        })?;
        // Swapping would be another measurement. Where there is none, there is nothing to forbid.
        let _ = fs::write(group.dir.join("memory.swap.max"), "0");
        let _ = fs::write(group.dir.join("memory.swappiness"), "0");
        Ok(group)
    }

    /// The file that holds the limit.
    pub fn limit_file(&self) -> &Path {
        &self.limit
    }

    /// Moves a process into the group.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    pub fn admit(&self, pid: u32) -> anyhow::Result<()> {
        fs::write(self.dir.join("cgroup.procs"), pid.to_string())
            .with_context(|| format!("cannot move a process into {}", printable(&self.dir)))
    }
}

/// Lowers the limit of a group whose processes may have more memory than that. The kernel takes back what it can: version 1 refuses as long
/// as that is too little, and version 2 ends processes.
///
/// # Errors
///
/// The kernel still refuses after ten seconds.
pub fn lower(limit_file: &Path, bytes: u64) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        match fs::write(limit_file, bytes.to_string()) {
            Err(e)
                if e.raw_os_error() == Some(libc::EBUSY)
                    && began.elapsed() < Duration::from_secs(10) =>
            {
                std::thread::sleep(Duration::from_millis(10));
            }
            done => {
                return done.with_context(|| {
                    format!("cannot lower {} to {bytes}", printable(&limit_file))
                });
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
