//! `vma-hold` (B): the VMA's lock is held across the read; there is no second attempt.
//!
//! Matthew Wilcox, discussed at LSFMM 2026; no code. The objection to it: a writer that wants this VMA (fork, munmap) waits for the read while it
//! holds `mmap_lock`, and so does everybody behind it, whatever VMA they want.

use super::{About, Design, stay, under_mmap_lock};
use crate::kernel::{Access, Kernel, Running, Thread};

pub(crate) const ABOUT: About = About {
    id: "vma-hold",
    what: "per-VMA lock, held across the read (B)",
    when: "discussed 2026",
    source: "LWN 1073071",
};

pub(crate) struct VmaHold;

impl Design for VmaHold {
    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a> {
        Box::pin(fault(k, t, a))
    }
}

pub(crate) async fn fault(k: &Kernel, t: &Thread, a: &Access) {
    if !k.vma_read(t, a).await {
        return under_mmap_lock(k, t, a).await;
    }
    stay(k, t, a).await;
    a.vma.end_read(k, t.tid).await;
}
