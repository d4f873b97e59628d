//! `skip-uptodate` (D): as today, but where the page is up to date and only locked, a fault waits for it under the VMA's lock, and
//! so needs no second attempt.
//!
//! A part of Barry Song's v2. A page that is up to date is locked for a moment by whoever maps it just then, or takes it out
//! (MADV_PAGEOUT); it is those that meet it who gain: threads that swap the same memory in together, above all.

use super::{About, Design, under_mmap_lock, vma_then_mmap};
use crate::kernel::{Access, Kernel, Looked, Running, Thread};

pub(crate) const ABOUT: About = About {
    id: "skip-uptodate",
    what: "as today, without a retry where the page is up to date and only locked (D)",
    when: "proposed April 2026",
    source: "lore 20260430040427.4672-1-baohua@kernel.org",
};

pub(crate) struct SkipUptodate;

impl Design for SkipUptodate {
    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a> {
        Box::pin(async move {
            if !k.vma_read(t, a).await {
                return under_mmap_lock(k, t, a).await;
            }
            loop {
                match k.look(t, a).await {
                    Looked::Mapped => return a.vma.end_read(k, t.tid).await,
                    Looked::Missing(missing) if missing.is_up_to_date() => {
                        k.get(t, a, missing).await;
                    }
                    Looked::Missing(missing) => {
                        a.vma.end_read(k, t.tid).await;
                        return vma_then_mmap::get_and_retry(k, t, a, missing).await;
                    }
                }
            }
        })
    }
}
