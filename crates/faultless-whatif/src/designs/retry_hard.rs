//! `retry-hard` (E): VM_FAULT_RETRY is split in two: most faults are tried again under the VMA's lock, and only those that are known to need
//! `mmap_lock` under that.
//!
//! Suren Baghdasaryan, discussed at LSFMM 2026, draft of May 2026. Of the faults that are modelled here none needs `mmap_lock`, so its second
//! attempt never falls back: where a writer has the VMA, it waits for that writer, and tries the VMA's lock again.

use super::{About, Design, stay, under_mmap_lock};
use crate::kernel::{Access, Kernel, Looked, Running, Thread};

pub(crate) const ABOUT: About = About {
    id: "retry-hard",
    what: "retries under the per-VMA lock, mmap_lock only where it must be (E)",
    when: "draft May 2026",
    source: "LWN 1073071",
};

pub(crate) struct RetryHard;

impl Design for RetryHard {
    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a> {
        Box::pin(async move {
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
                // By way of mmap_lock, under which no writer can have the VMA, and which is not kept (vma_start_read_locked).
                k.mmap_read(t, &t.mm).await;
                let inside = a.vma.start_read(k, t.tid).await;
                t.mm.mmap_lock.unlock_read(k, t.tid).await;
                if !inside {
                    assert!(a.vma.gone.get(), "a writer of a VMA without mmap_lock");
                    return;
                }
            }
            k.stats.retried(k, a);
            stay(k, t, a).await;
            a.vma.end_read(k, t.tid).await;
        })
    }
}
