//! The process that is to be watched.

use anyhow::{Context, bail};
use faultless_untrusted::input::kernel_text;
use faultless_untrusted::printable;
use std::path::Path;

/// The name of a process, or why it cannot be watched.
pub(crate) fn name(pid: u32) -> anyhow::Result<String> {
    if !Path::new(&format!("/proc/{pid}")).exists() {
        bail!("there is no process {pid}; `pgrep -a NAME` finds the numbers of processes");
    }
    let status = kernel_text(format!("/proc/{pid}/status"))
        .with_context(|| format!("process {pid} has ended"))?;
    let field = |name: &str| {
        status
            .lines()
            .find_map(|l| l.strip_prefix(name))
            .map(str::trim)
    };
    let tgid: u32 = field("Tgid:").and_then(|t| t.parse().ok()).unwrap_or(pid);
    if tgid != pid {
        bail!("{pid} is a thread of process {tgid}; observe process {tgid}");
    }
    if field("VmSize:").is_none() && field("Kthread:") == Some("1") {
        bail!("process {pid} is a kernel thread, which has no memory of its own to fault in");
    }
    Ok(printable(field("Name:").unwrap_or("?")).to_string())
}
