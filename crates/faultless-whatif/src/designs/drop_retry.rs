//! `drop-retry`: `mmap_lock` is given up while the page is read, and taken again for a second attempt, once.
//!
//! Linux 2.6.37 (Michel Lespinasse, 2010) to 6.3; for all reads since 5.1. The second attempt keeps the lock: if the page has gone
//! again, it is read under it.

use super::{About, Design, under_mmap_lock};
use crate::kernel::{Access, Kernel, Running, Thread};

pub(crate) const ABOUT: About = About {
    id: "drop-retry",
    what: "drops mmap_lock for the read, retries under it",
    when: "Linux 2.6.37 to 6.3",
    source: "commit d065bd810b6d (2010), 6b4c9f446981 (5.1)",
};

pub(crate) struct DropRetry;

impl Design for DropRetry {
    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a> {
        Box::pin(under_mmap_lock(k, t, a))
    }

    fn has_vma_locks(&self) -> bool {
        false
    }
}
