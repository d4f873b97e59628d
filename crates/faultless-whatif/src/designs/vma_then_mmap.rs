//! `vma-then-mmap`: the first attempt is made under the VMA's own lock; where a read is needed that is dropped, and the second
//! attempt is made under `mmap_lock`.
//!
//! Linux 6.4 (Suren Baghdasaryan, 2023) to today.

use super::{About, Design, retry_under_mmap_lock, under_mmap_lock};
use crate::kernel::{Access, Kernel, Looked, Missing, Running, Thread};

pub(crate) const ABOUT: About = About {
    id: "vma-then-mmap",
    what: "per-VMA lock; drops it for the read, retries under mmap_lock",
    when: "Linux 6.4 to today",
    source: "arch/x86/mm/fault.c, mm/filemap.c of 6.18",
};

pub(crate) struct VmaThenMmap;

impl Design for VmaThenMmap {
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
    get_and_retry(k, t, a, missing).await;
}

/// With the VMA's lock given up: waits for the page, and makes the second attempt.
pub(crate) async fn get_and_retry(k: &Kernel, t: &Thread, a: &Access, missing: Missing) {
    // FAULT_FLAG_TRIED is set for a fault that was major: one that waited for another's read may give the lock up again.
    let is_major = missing.is_major();
    k.get(t, a, missing).await;
    if is_major {
        retry_under_mmap_lock(k, t, a).await;
    } else {
        under_mmap_lock(k, t, a).await;
    }
}
