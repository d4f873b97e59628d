//! Designs of the page fault: what the kernel had, has, or discusses, and what user space can do instead.
//!
//! Each is a file that reads as its description. They differ in the fault alone: whatever changes an address space
//! (`calls.rs`) is today's kernel, except that `range` has its own locks.

use crate::kernel::{Access, Kernel, Looked, Running, Thread};

pub(crate) mod anon_retry_file_hold;
pub(crate) mod drop_retry;
pub(crate) mod faultless;
pub(crate) mod hold_mmap;
pub(crate) mod range;
pub(crate) mod retry_hard;
pub(crate) mod skip_uptodate;
pub(crate) mod speculative;
pub(crate) mod uffd_monitor;
pub(crate) mod vma_hold;
pub(crate) mod vma_retry;
pub(crate) mod vma_then_mmap;

/// A design of the page fault.
pub(crate) trait Design {
    /// Serves a fault: when it is over, the access is tried again.
    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a>;

    /// Whether writers wait for the readers of a VMA.
    fn has_vma_locks(&self) -> bool {
        true
    }

    /// Whether mappings are locked by their addresses instead of `mmap_lock`.
    fn has_range_locks(&self) -> bool {
        false
    }

    /// Whether a thread of the process keeps memory within its budget, instead of the kernel's reclaim.
    fn has_evictor(&self) -> bool {
        false
    }

    /// Whether threads of the process serve its faults.
    fn has_monitors(&self) -> bool {
        false
    }
}

/// What is known of a design.
#[derive(Debug, Clone, Copy)]
pub struct About {
    /// As `--design` has it.
    pub id: &'static str,
    /// In a sentence.
    pub what: &'static str,
    /// Since when, or who proposed it.
    pub when: &'static str,
    /// Where that can be read.
    pub source: &'static str,
}

/// All designs, in the order in which they came up.
pub const DESIGNS: [About; 12] = [
    hold_mmap::ABOUT,
    drop_retry::ABOUT,
    speculative::ABOUT,
    range::ABOUT,
    vma_then_mmap::ABOUT,
    vma_retry::ABOUT,
    vma_hold::ABOUT,
    anon_retry_file_hold::ABOUT,
    skip_uptodate::ABOUT,
    retry_hard::ABOUT,
    uffd_monitor::ABOUT,
    faultless::ABOUT,
];

/// Today's kernel, to which the others are compared.
pub const TODAY: &str = vma_then_mmap::ABOUT.id;

/// The design of that name.
pub(crate) fn of(id: &str) -> Option<std::rc::Rc<dyn Design>> {
    Some(match id {
        "hold-mmap" => std::rc::Rc::new(hold_mmap::HoldMmap),
        "drop-retry" => std::rc::Rc::new(drop_retry::DropRetry),
        "speculative" => std::rc::Rc::new(speculative::Speculative),
        "range" => std::rc::Rc::new(range::Range),
        "vma-then-mmap" => std::rc::Rc::new(vma_then_mmap::VmaThenMmap),
        "vma-retry" => std::rc::Rc::new(vma_retry::VmaRetry),
        "vma-hold" => std::rc::Rc::new(vma_hold::VmaHold),
        "anon-retry-file-hold" => std::rc::Rc::new(anon_retry_file_hold::AnonRetryFileHold),
        "skip-uptodate" => std::rc::Rc::new(skip_uptodate::SkipUptodate),
        "retry-hard" => std::rc::Rc::new(retry_hard::RetryHard),
        "uffd-monitor" => std::rc::Rc::new(uffd_monitor::UffdMonitor),
        "faultless" => std::rc::Rc::new(faultless::Faultless),
        _ => return None,
    })
}

/// Looks for the page until it is mapped, and waits for reads with whatever locks are held: the last attempt of most designs.
pub(crate) async fn stay(k: &Kernel, t: &Thread, a: &Access) {
    while let Looked::Missing(missing) = k.look(t, a).await {
        k.get(t, a, missing).await;
    }
}

/// A fault under `mmap_lock` from the start, which gives it up for one read: `drop-retry`, and what others fall back to.
pub(crate) async fn under_mmap_lock(k: &Kernel, t: &Thread, a: &Access) {
    k.mmap_read(t, &t.mm).await;
    let looked = k.look(t, a).await;
    t.mm.mmap_lock.unlock_read(k, t.tid).await;
    let Looked::Missing(missing) = looked else {
        return;
    };
    k.get(t, a, missing).await;
    retry_under_mmap_lock(k, t, a).await;
}

/// The second attempt (`FAULT_FLAG_TRIED`): it keeps `mmap_lock`, even while a page that has gone is read again.
pub(crate) async fn retry_under_mmap_lock(k: &Kernel, t: &Thread, a: &Access) {
    k.mmap_read(t, &t.mm).await;
    k.stats.retried(k, a);
    stay(k, t, a).await;
    t.mm.mmap_lock.unlock_read(k, t.tid).await;
}
