//! What this machine lets Faultless and its observer do, and what each missing thing costs.

use crate::{Observer, Options, privilege};
use serde::Serialize;
use std::path::Path;

/// How a thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// As it should be.
    Good,
    /// Missing, and something works less well.
    Lacking,
    /// Missing, and something does not work.
    Missing,
}

/// A thing that was looked at.
#[derive(Debug, Clone, Serialize)]
pub struct Finding {
    /// What.
    pub what: String,
    /// How it stands.
    pub standing: Standing,
    /// What was found.
    pub found: String,
    /// What that costs, and what mends it; empty if nothing.
    pub costs: String,
}

fn finding(what: &str, standing: Standing, found: impl Into<String>, costs: &str) -> Finding {
    Finding {
        what: what.to_owned(),
        standing,
        found: found.into(),
        costs: if standing == Standing::Good {
            String::new()
        } else {
            costs.to_owned()
        },
    }
}

fn if_good(good: bool, otherwise: Standing) -> Standing {
    if good { Standing::Good } else { otherwise }
}

/// The version of a kernel, as far as it matters here.
pub(crate) fn version(release: &str) -> (u32, u32) {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || parts.next().and_then(|p| p.parse().ok()).unwrap_or(0);
    (next(), next())
}

fn setting(path: &str) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
}

/// The kernel's configuration, where it shows it.
fn configuration(release: &str) -> Option<String> {
    std::fs::read_to_string(format!("/boot/config-{release}"))
        .ok()
        .or_else(|| {
            let shown = std::process::Command::new("zcat")
                .arg("/proc/config.gz")
                .output()
                .ok()?;
            shown
                .status
                .success()
                .then(|| String::from_utf8_lossy(&shown.stdout).into_owned())
        })
}

/// Looks at what the observer needs.
pub fn observer() -> Vec<Finding> {
    use Standing::{Good, Lacking, Missing};
    let mut all = Vec::new();
    let release = crate::kernel_release();
    let (major, minor) = version(&release);
    all.push(finding(
        "kernel for observe",
        if_good((major, minor) >= (5, 18), Missing),
        release.clone(),
        "observe needs Linux 5.18 or later",
    ));
    all.push(finding(
        "file events of faults",
        if_good((major, minor) >= (6, 9), Lacking),
        release.clone(),
        "before Linux 6.9 a page that another thread is reading cannot be told from other sleeps (mm_filemap_fault is missing)",
    ));
    all.push(match crate::why_not() {
        None => finding("BPF programs", Good, "built in", ""),
        Some(why) => finding("BPF programs", Missing, "not built in", why),
    });
    let btf = "/sys/kernel/btf/vmlinux";
    all.push(finding(
        "type information (BTF)",
        if_good(Path::new(btf).exists(), Missing),
        if Path::new(btf).exists() { btf } else { "none" },
        "observe needs a kernel built with CONFIG_DEBUG_INFO_BTF=y",
    ));
    all.push(finding(
        "privilege to observe",
        if_good(privilege::may_observe(), Missing),
        if privilege::may_observe() { "CAP_BPF and CAP_PERFMON" } else { "neither root nor CAP_BPF with CAP_PERFMON" },
        "observe loads BPF programs: run it as root, or give the command both capabilities (setcap cap_bpf,cap_perfmon+ep)",
    ));
    if all.iter().all(|f| f.standing != Missing) {
        // (Nothing above prevents it.)
        let loaded = Observer::start(&Options {
            every_fault: true,
            follow_children: false,
        });
        let why = loaded.as_ref().err().map(|e| format!("{e:#}"));
        let missing = loaded.as_ref().map_or(&[][..], Observer::missing);
        let standing = match &loaded {
            Err(_) => Missing,
            Ok(_) if missing.is_empty() => Good,
            Ok(_) => Lacking,
        };
        let found = match standing {
            Good => "they load and attach".to_owned(),
            Lacking => format!("they load, without {}", missing.join(", ")),
            Missing => "it fails".to_owned(),
        };
        let without = "what those tracepoints tell is missing from reports (those of FUSE need CAP_SYS_ADMIN where it is a module)";
        all.push(finding(
            "loading the BPF programs",
            standing,
            found,
            why.as_deref().unwrap_or(without),
        ));
    }
    let lockdown = setting("/sys/kernel/security/lockdown").unwrap_or_default();
    all.push(finding(
        "kernel lockdown",
        if_good(!lockdown.contains("[confidentiality]"), Missing),
        if lockdown.is_empty() {
            "none".to_owned()
        } else {
            lockdown
        },
        "in confidentiality mode BPF programs may not read kernel memory, so observe cannot work",
    ));
    let symbols = std::fs::read_to_string("/proc/kallsyms").unwrap_or_default();
    let shown = symbols
        .lines()
        .any(|l| !l.starts_with("0000000000000000") && l.contains(" T "));
    all.push(finding(
        "kernel symbols",
        if_good(shown, Lacking),
        if shown { "shown" } else { "hidden" },
        "stacks have addresses instead of names; sysctl kernel.kptr_restrict=0, or run as root",
    ));
    if let Some(configuration) = configuration(&release) {
        let has = |name: &str| {
            configuration
                .lines()
                .any(|l| l == format!("CONFIG_{name}=y"))
        };
        for (name, standing, costs) in [
            (
                "PER_VMA_LOCK",
                Lacking,
                "every page fault takes mmap_lock, minor ones too: observe will show more waits, and `faultless run` gains more",
            ),
            (
                "MEMCG",
                Missing,
                "a lock's process cannot be told: mm_struct has no owner, so observe sees nothing",
            ),
            (
                "USERFAULTFD",
                Missing,
                "the engine falls back to the kernel's mmap, with its stalls",
            ),
        ] {
            all.push(finding(
                &format!("CONFIG_{name}"),
                if_good(has(name), standing),
                if has(name) { "y" } else { "not set" },
                costs,
            ));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_have_versions() {
        assert_eq!(version("6.18.44-fc-v595"), (6, 18));
        assert_eq!(version("5.15"), (5, 15));
        assert_eq!(version("odd"), (0, 0));
    }

    #[test]
    fn what_is_missing_says_what_it_costs() {
        for f in observer() {
            assert_eq!(f.costs.is_empty(), f.standing == Standing::Good, "{f:?}");
        }
    }
}
