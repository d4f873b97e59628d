//! `skip-uptodate` (D): as today, but a fault keeps the VMA's lock where the page is up to date and only locked, and so
//! needs no second attempt.
//!
//! The second part of Barry Song's v2. Here a page is locked while somebody reads it, and for no other reason; so what remains of it is that the
//! thread which waited for *another* one's read goes on without `mmap_lock`: the page is up to date when it gets to see it. Workloads in
//! which threads do not share pages gain nothing.

use super::{About, Design, retry_under_mmap_lock, stay, under_mmap_lock};
use crate::kernel::{Access, Kernel, Looked, Running, Thread};

pub(crate) const ABOUT: About = About {
    id: "skip-uptodate",
    what: "as today, without a retry where another thread has read the page (D)",
    when: "proposed April 2026",
    source: "lore 20260430040427.4672-1-baohua@kernel.org",
};

pub(crate) struct SkipUptodate;

impl Design for SkipUptodate {
    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a> {
        Box::pin(async move {
            if !a.vma.start_read(k, t.tid).await {
                return under_mmap_lock(k, t, a).await;
            }
            let looked = k.look(t, a).await;
            let Looked::Reading(no) = looked else {
                return a.vma.end_read(k, t.tid).await;
            };
            if k.cache.reader(no) != t.tid {
                k.wait_for_page(t, a, no).await;
                stay(k, t, a).await;
                return a.vma.end_read(k, t.tid).await;
            }
            a.vma.end_read(k, t.tid).await;
            k.wait_for_page(t, a, no).await;
            retry_under_mmap_lock(k, t, a).await;
        })
    }
}
