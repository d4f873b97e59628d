//! What this user may do.

use anyhow::bail;

/// capabilities(7): numbers of those that the observer needs.
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;
const CAP_SYS_ADMIN: u32 = 21;

/// Whether this process has a capability.
pub(crate) fn has(capability: u32) -> bool {
    let status = faultless_untrusted::input::kernel_text("/proc/self/status").unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .and_then(|l| u64::from_str_radix(l.trim(), 16).ok())
        .unwrap_or(0);
    effective >> capability & 1 == 1
}

/// Whether this process may look at the types of the kernel's modules.
pub(crate) fn is_admin() -> bool {
    has(CAP_SYS_ADMIN)
}

/// Whether this process may load the observer's programs, as far as capabilities go.
pub(crate) fn may_observe() -> bool {
    has(CAP_SYS_ADMIN) || (has(CAP_BPF) && has(CAP_PERFMON))
}

/// One sentence, if it may not.
pub(crate) fn check() -> anyhow::Result<()> {
    if !may_observe() {
        bail!(
            "observe loads BPF programs, which this user may not: run it as root (sudo faultless observe …), or give the command the capabilities CAP_BPF and CAP_PERFMON"
        );
    }
    Ok(())
}
