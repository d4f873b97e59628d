//! What serves the misses of a pool, and what this kernel permits.

use crate::base::descriptor::Owned;
use crate::base::primitive::{AtomicBool, Ordering};
use crate::evict::evictor::batches_work;
use faultless_sys::raw::kernel_version;
use faultless_sys::{mem, raw, uffd};
use std::fmt;

/// What serves the misses.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Backend {
    /// The engine, with everything that it can do: misses stay off `mmap_lock`, except while the process forks.
    Full,
    /// The engine, short of something that this kernel lacks or refuses; the text says what.
    Partial(String),
    /// The kernel's mmap, because there is no userfaultfd; the text says why.
    Mmap(String),
}

impl Backend {
    /// Whether misses stay off `mmap_lock`, except while the process forks. On kernels before 6.9 the engine works, and its misses take
    /// that lock as those of the kernel's mmap do.
    pub fn avoids_mmap_lock(&self) -> bool {
        match self {
            Backend::Full => true,
            Backend::Partial(_) => kernel_version().is_some_and(installs_without_lock),
            Backend::Mmap(_) => false,
        }
    }
}

/// Whether a kernel serves faults in armed mappings without `mmap_lock`.
fn faults_without_lock(version: (u32, u32)) -> bool {
    version >= (6, 6)
}

/// Whether a kernel installs pages without `mmap_lock`.
fn installs_without_lock(version: (u32, u32)) -> bool {
    version >= (6, 9)
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Backend::Full => f.write_str("full"),
            Backend::Partial(why) => write!(f, "partial ({why})"),
            Backend::Mmap(why) => write!(f, "mmap ({why})"),
        }
    }
}

/// Which backend a pool may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum BackendChoice {
    /// The best that this kernel allows.
    #[default]
    Best,
    /// The kernel's mmap, whatever the kernel allows: for comparison, and for tests.
    Mmap,
}

/// Opens a userfaultfd in the mode that the engine needs, or says why not.
pub(crate) fn open_uffd(choice: BackendChoice) -> Result<Owned, String> {
    if choice == BackendChoice::Mmap
        || (!raw::is_privileged()
            && std::env::var_os("FAULTLESS_BACKEND").is_some_and(|v| v == "mmap"))
    {
        return Err("it was asked for".to_owned());
    }
    if mem::kernel_page_size() != mem::PAGE {
        return Err(format!(
            "the kernel's pages have {} bytes, and the engine wants 4096",
            mem::kernel_page_size()
        ));
    }
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u32 | uffd::USER_MODE_ONLY;
    let fd = uffd::open(flags).map_err(|e| match e.0 {
        libc::ENOSYS => "the kernel has no userfaultfd, or a seccomp filter hides it".to_owned(),
        libc::EPERM => {
            "userfaultfd is forbidden here (a seccomp filter or a container's policy)".to_owned()
        }
        libc::EINVAL => {
            "the kernel's userfaultfd lacks UFFD_USER_MODE_ONLY (Linux 5.11)".to_owned()
        }
        _ => format!("userfaultfd failed: {e}"),
    })?;

    let fd = Owned::new(fd);
    uffd::enable(
        fd.number(),
        uffd::FEATURE_SIGBUS | uffd::FEATURE_EVENT_REMAP | uffd::FEATURE_EVENT_UNMAP,
    )
    .map_err(|e| format!("userfaultfd lacks SIGBUS mode (Linux 4.14): {e}"))?;
    Ok(fd)
}

/// What this kernel lacks.
pub(crate) fn rate(unprotected: Option<&'static str>) -> Backend {
    let mut lacks = Vec::new();
    if let Some((major, minor)) = kernel_version() {
        if !faults_without_lock((major, minor)) {
            lacks.push(format!("Linux {major}.{minor} serves faults in armed mappings under mmap_lock; 6.6 does not"));
        }
        if !installs_without_lock((major, minor)) {
            lacks.push(format!(
                "Linux {major}.{minor} installs pages under mmap_lock; 6.9 does not"
            ));
        }
    }
    if !batches_work() {
        lacks.push("process_madvise does not take MADV_DONTNEED for the own process, so eviction costs more".to_owned());
    }
    lacks.extend(unprotected.map(str::to_owned));
    if lacks.is_empty() {
        Backend::Full
    } else {
        Backend::Partial(lacks.join("; "))
    }
}

/// One line on stderr for each process whose engine is not all that it could be.
pub(crate) fn report_once(backend: &Backend) {
    static SAID: AtomicBool = AtomicBool::new(false);
    if *backend != Backend::Full && !SAID.swap(true, Ordering::Relaxed) {
        // (Standard error may be a broken pipe, which is no reason to panic.)
        faultless_sys::raw::write_stderr(format!("faultless: backend {backend}\n").as_bytes());
    }
}

#[cfg(all(test, not(loom), not(faultless_sim)))]
mod tests {
    use super::*;

    #[test]
    fn what_serves_misses_says_whether_it_avoids_the_lock() {
        assert!(Backend::Full.avoids_mmap_lock());
        assert!(!Backend::Mmap("asked for".to_owned()).avoids_mmap_lock());
        let without = [(5, 15), (6, 1), (6, 8), (6, 9), (7, 0)].map(installs_without_lock);
        assert_eq!(without, [false, false, false, true, true]);
        let without = [(6, 5), (6, 6), (6, 18)].map(faults_without_lock);
        assert_eq!(without, [false, true, true]);
    }
}
