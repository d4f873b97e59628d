//! `faultless`: the miss is served in user space, in the thread that faulted.
//!
//! userfaultfd with UFFD_FEATURE_SIGBUS: under the VMA's lock the fault finds that the page is missing, and returns; the kernel
//! delivers SIGBUS; the handler reads the page directly into a buffer, with no lock of the memory management held, and installs it with
//! UFFDIO_COPY, under the VMA's lock again. `mmap_lock` is taken only where a writer has the VMA just then.

use super::{About, Design, vma_then_mmap};
use crate::cache::Found;
use crate::kernel::{Access, Kernel, On, Running, Thread};
use crate::stats::LockKind;

pub(crate) const ABOUT: About = About {
    id: "faultless",
    what: "SIGBUS, read and UFFDIO_COPY in the faulting thread",
    when: "this project",
    source: "ARCHITECTURE.md",
};

/// Pages that the evictor takes at a time.
const EVICTED_AT_A_TIME: u64 = 256;

pub(crate) struct Faultless;

impl Design for Faultless {
    fn has_evictor(&self) -> bool {
        true
    }

    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a> {
        Box::pin(async move {
            if a.is_anonymous() {
                // Not the engine's: the kernel's own.
                vma_then_mmap::fault(k, t, a).await;
                return;
            }
            locked(k, t, a).await;
            // force_sig and dequeue_signal; rt_sigreturn, which restores the mask, on the way back.
            siglock(k, t).await;
            siglock(k, t).await;
            k.cpu.work(t.tid, k.costs.signal + k.costs.engine).await;
            let no = pread(k, t, a).await;
            copy(k, t, a, no).await;
            siglock(k, t).await;
        })
    }
}

async fn siglock(k: &Kernel, t: &Thread) {
    let kind = Some(LockKind::Siglock);
    t.mm.siglock.pass(k, t.tid, kind, k.costs.siglock).await;
}

/// What the engine's evictor does: it keeps room for misses, ahead of need, in batches, each under `mmap_lock` for reading (MADV_DONTNEED).
pub(crate) async fn evict(k: &Kernel, t: &Thread) {
    loop {
        while k.cache.room() < k.watermarks().1 {
            let before = k.enter(t.tid, "madvise(MADV_DONTNEED)");
            k.cpu.work(t.tid, k.costs.syscall).await;
            k.mmap_read(t, &t.mm).await;
            let gone = k.reclaim(t.tid, EVICTED_AT_A_TIME).await;
            t.mm.mmap_lock.unlock_read(k, t.tid).await;
            k.leave(t.tid, before).await;
            if gone == 0 {
                break;
            }
        }
        k.waits(t.tid, On::Work, k.cpu.block(t.tid)).await;
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
///
/// The page stays, since its bytes are in a buffer of the engine's, until [`copy`] gives it back.
pub(crate) async fn pread(k: &Kernel, t: &Thread, a: &Access) -> u32 {
    loop {
        match k.cache.find(a.key()) {
            Found::UpToDate(no) | Found::Busy(no) => {
                k.cache.pin(no);
                return no;
            }
            Found::Reading(no) => k.wait_for_page(t, a, no, false).await,
            Found::Absent => {
                k.charge(t, 1).await;
                if k.cache.find(a.key()) != Found::Absent {
                    continue;
                }
                let no = k.cache.insert(a.key(), t.tid);
                k.stats.read_begins(a.key());
                k.inode_lock(t, &a.vma, false).await;
                k.cpu.work(t.tid, k.costs.pread).await;
                k.cache.pin(no);
                k.begin_read(t, a, no).await;
                k.wait_for_page(t, a, no, true).await;
                k.inode_unlock_shared(t, &a.vma).await;
                return no;
            }
        }
    }
}

/// UFFDIO_COPY.
pub(crate) async fn copy(k: &Kernel, t: &Thread, a: &Access, no: u32) {
    let lock = &t.mm.map_changing;
    lock.pass(k, t.tid, Some(LockKind::Uffd), 0).await;
    let inside = a.vma.start_read(k, t.tid).await;
    if !inside {
        k.mmap_read(t, &t.mm).await;
    }
    // What was read ahead with it is installed by the same call.
    let more = k.map_near(a, u64::from(a.vma.read_ahead));
    let ns = k.costs.uffd_copy + k.costs.uffd_copy_more * more;
    k.cpu.work(t.tid, ns).await;
    k.map(a, Some(no));
    k.cache.unpin(no);
    lock.pass(k, t.tid, Some(LockKind::Uffd), 0).await;
    if inside {
        a.vma.end_read(k, t.tid).await;
    } else {
        t.mm.mmap_lock.unlock_read(k, t.tid).await;
    }
}
