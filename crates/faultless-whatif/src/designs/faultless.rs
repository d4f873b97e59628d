//! `faultless`: the miss is served in user space, in the thread that faulted.
//!
//! userfaultfd with UFFD_FEATURE_SIGBUS: under the VMA's lock the fault finds that the page is missing, and returns; the kernel
//! delivers SIGBUS; the handler reads the page directly into a buffer, with no lock of the memory management held, and installs it with
//! UFFDIO_COPY, under the VMA's lock again. `mmap_lock` is taken only where a writer has the VMA just then.

use super::{About, Design, vma_then_mmap};
use crate::cache::Found;
use crate::kernel::{Access, Kernel, Running, Thread};
use crate::stats::LockKind;

pub(crate) const ABOUT: About = About {
    id: "faultless",
    what: "SIGBUS, read and UFFDIO_COPY in the faulting thread",
    when: "this project",
    source: "ARCHITECTURE.md",
};

pub(crate) struct Faultless;

impl Design for Faultless {
    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a> {
        Box::pin(async move {
            if a.is_anonymous() {
                // Not the engine's: the kernel's own.
                vma_then_mmap::fault(k, t, a).await;
                return;
            }
            locked(k, t, a).await;
            t.mm.siglock
                .pass(k, t.tid, Some(LockKind::Siglock), k.costs.siglock)
                .await;
            k.cpu.work(t.tid, k.costs.signal + k.costs.engine).await;
            pread(k, t, a).await;
            copy(k, t, a).await;
        })
    }
}

/// In and out of the VMA; by way of `mmap_lock`, if a writer has it.
async fn locked(k: &Kernel, t: &Thread, a: &Access) {
    if a.vma.start_read(k, t.tid).await {
        a.vma.end_read(k, t.tid).await;
    } else {
        k.mmap_read(t, &t.mm).await;
        t.mm.mmap_lock.unlock_read(k, t.tid).await;
    }
}

/// Reads a page directly, under the file's own lock, which a direct read shares as a fault does its `invalidate_lock`; a page that
/// another thread reads is waited for.
pub(crate) async fn pread(k: &Kernel, t: &Thread, a: &Access) {
    loop {
        match k.cache.find(a.key()) {
            Found::UpToDate(_) | Found::Busy(_) => return,
            Found::Reading(no) => k.wait_for_page(t, a, no, false).await,
            Found::Absent => {
                k.charge(t, 1).await;
                if k.cache.find(a.key()) != Found::Absent {
                    continue;
                }
                let no = k.cache.insert(a.key(), t.tid);
                k.stats.read_begins(a.key());
                k.inode_lock(t, &a.vma, false).await;
                k.cpu.work(t.tid, k.costs.pread + k.costs.submit_read).await;
                k.storage.read(&k.cpu, no, a.read);
                k.wait_for_page(t, a, no, true).await;
                k.inode_unlock_shared(t, &a.vma).await;
            }
        }
    }
}

/// UFFDIO_COPY.
pub(crate) async fn copy(k: &Kernel, t: &Thread, a: &Access) {
    let inside = a.vma.start_read(k, t.tid).await;
    if !inside {
        k.mmap_read(t, &t.mm).await;
    }
    k.cpu.work(t.tid, k.costs.uffd_copy).await;
    if let Found::UpToDate(no) | Found::Busy(no) = k.cache.find(a.key()) {
        k.map(a, Some(no));
    }
    if inside {
        a.vma.end_read(k, t.tid).await;
    } else {
        t.mm.mmap_lock.unlock_read(k, t.tid).await;
    }
}
