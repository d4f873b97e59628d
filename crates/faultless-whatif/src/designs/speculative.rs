//! `speculative`: a fault is served without any lock, and what it found is checked by a sequence count; where it would sleep it falls
//! back to `mmap_lock`.
//!
//! Laurent Dufour, Michel Lespinasse, 2017 to 2022; never merged. A read sleeps, so a page that is not in memory is served as in
//! `drop-retry`, and only pages that are there, and fresh anonymous ones, gain.

use super::{About, Design, under_mmap_lock};
use crate::cache::Found;
use crate::kernel::{Access, Kernel, Looked, Running, Thread};

pub(crate) const ABOUT: About = About {
    id: "speculative",
    what: "no lock where the page is in memory; else as drop-retry",
    when: "proposed 2017 to 2022",
    source: "LWN 754739, 851853; mm/memory.c of the series: ->fault may not sleep",
};

pub(crate) struct Speculative;

impl Design for Speculative {
    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a> {
        Box::pin(async move {
            let there = match k.cache.find(a.key()) {
                Found::UpToDate(_) => true,
                // Without an anon_vma it could not be.
                Found::Absent => {
                    a.is_anonymous() && a.vma.has_anon_vma.get() && !k.stats.is_swapped(a.key())
                }
                Found::Reading(_) | Found::Busy(_) => false,
            };
            // A writer that is at work bumps the sequence count: the attempt is in vain.
            if there && !t.mm.mmap_lock.is_written() {
                match k.look(t, a).await {
                    // A writer that came meanwhile has made it in vain.
                    Looked::Mapped if !t.mm.mmap_lock.is_written() => return,
                    Looked::Mapped => {}
                    Looked::Missing(missing) => k.get(t, a, missing).await,
                }
            }
            under_mmap_lock(k, t, a).await;
        })
    }

    fn has_vma_locks(&self) -> bool {
        false
    }
}
