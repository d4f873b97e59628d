//! `skip-uptodate` (D): as today, but a fault keeps the VMA's lock where the page is up to date and only locked, and so
//! needs no second attempt.
//!
//! The second part of Barry Song's v2. A page that is up to date is locked by whoever maps it just then, or takes it out (MADV_PAGEOUT), for
//! a moment; such locks are not modelled: here a page is locked while it is read, and for that this design does what today's kernel
//! does. So it is today's kernel, in this model.

use super::{About, Design, vma_then_mmap};
use crate::kernel::{Access, Kernel, Running, Thread};

pub(crate) const ABOUT: About = About {
    id: "skip-uptodate",
    what: "no retry where the page is up to date and only locked (D); here as today",
    when: "proposed April 2026",
    source: "lore 20260430040427.4672-1-baohua@kernel.org",
};

pub(crate) struct SkipUptodate;

impl Design for SkipUptodate {
    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a> {
        Box::pin(vma_then_mmap::fault(k, t, a))
    }
}
