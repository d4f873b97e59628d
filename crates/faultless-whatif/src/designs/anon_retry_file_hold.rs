//! `anon-retry-file-hold` (C): anonymous memory (swap) as in `vma-retry`, files as in `vma-hold`.
//!
//! Discussed in 2026, after Matthew Wilcox's third option: those that fork with much anonymous memory are spared the wait for swap.

use super::{About, Design, vma_hold, vma_retry};
use crate::kernel::{Access, Kernel, Running, Thread};

pub(crate) const ABOUT: About = About {
    id: "anon-retry-file-hold",
    what: "A for anonymous memory, B for files (C)",
    when: "discussed 2026",
    source: "LWN 1073071",
};

pub(crate) struct AnonRetryFileHold;

impl Design for AnonRetryFileHold {
    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a> {
        if a.is_anonymous() {
            Box::pin(vma_retry::fault(k, t, a))
        } else {
            Box::pin(vma_hold::fault(k, t, a))
        }
    }
}
