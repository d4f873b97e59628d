//! `vma-retry` (A): as today, but the second attempt is made under the VMA's lock again, and falls back to `mmap_lock` only if a
//! writer has it.
//!
//! Barry Song, RFC of November 2025, v2 of April 2026.

use super::{About, Design, retry_under_mmap_lock, stay, under_mmap_lock};
use crate::kernel::{Access, Kernel, Looked, Running, Thread};

pub(crate) const ABOUT: About = About {
    id: "vma-retry",
    what: "per-VMA lock; drops it for the read, retries under it (A)",
    when: "proposed 2025, v2 April 2026",
    source: "lore 20260430040427.4672-1-baohua@kernel.org",
};

pub(crate) struct VmaRetry;

impl Design for VmaRetry {
    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a> {
        Box::pin(fault(k, t, a))
    }
}

pub(crate) async fn fault(k: &Kernel, t: &Thread, a: &Access) {
    if !k.vma_read(t, a).await {
        return under_mmap_lock(k, t, a).await;
    }
    let looked = k.look(t, a).await;
    a.vma.end_read(k, t.tid).await;
    let Looked::Missing(missing) = looked else {
        return;
    };
    k.get(t, a, missing).await;
    if !a.vma.start_read(k, t.tid).await {
        return retry_under_mmap_lock(k, t, a).await;
    }
    k.stats.retried(k, a);
    stay(k, t, a).await;
    a.vma.end_read(k, t.tid).await;
}
