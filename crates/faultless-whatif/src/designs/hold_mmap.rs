//! `hold-mmap`: `mmap_sem` is held for reading across the read of the page.
//!
//! The kernel until 2.6.36. A thread that maps or unmaps waits for the slowest read of any other thread.

use super::{About, Design, stay};
use crate::kernel::{Access, Kernel, Running, Thread};

pub(crate) const ABOUT: About = About {
    id: "hold-mmap",
    what: "holds mmap_lock across the read",
    when: "to Linux 2.6.36",
    source: "commit d065bd810b6d (what it replaced)",
};

pub(crate) struct HoldMmap;

impl Design for HoldMmap {
    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a> {
        Box::pin(async move {
            k.mmap_read(t, &t.mm).await;
            stay(k, t, a).await;
            t.mm.mmap_lock.unlock_read(k, t.tid).await;
        })
    }

    fn has_vma_locks(&self) -> bool {
        false
    }
}
