//! What changes an address space, and what looks at it: mmap, munmap, fork, smaps, MADV_PAGEOUT. Today's kernel, under any design of
//! the fault.

use crate::cache::{Found, PageKey};
use crate::designs::range::Span;
use crate::kernel::{Access, Kernel, Mm, Thread};
use crate::rwsem::wake_all;
use crate::vma::{Backing, Vma};
use std::rc::Rc;

/// Pages that MADV_PAGEOUT takes out of page tables at a time (`SWAP_CLUSTER_MAX`).
const FLUSH_BATCH: usize = 32;

/// `mmap`: a new mapping.
pub(crate) async fn mmap(
    k: &Kernel,
    t: &Thread,
    backing: Backing,
    pages: u64,
    read_ahead: u32,
) -> Rc<Vma> {
    let before = k.enter(t.tid, "mmap");
    k.cpu.work(t.tid, k.costs.syscall).await;
    let vma = k.new_vma(&t.mm, backing, pages, read_ahead);
    lock(k, t, Span::Mapping(vma.no)).await;
    k.cpu.work(t.tid, k.costs.mmap).await;
    t.mm.vmas.borrow_mut().push(Rc::clone(&vma));
    unlock(k, t).await;
    k.leave(t.tid, before).await;
    vma
}

/// `munmap`: out of the tree under the write lock, then downgraded; pages are freed under the read lock.
pub(crate) async fn munmap(k: &Kernel, t: &Thread, vma: &Rc<Vma>) {
    let before = k.enter(t.tid, "munmap");
    k.cpu.work(t.tid, k.costs.syscall).await;
    lock(k, t, Span::Mapping(vma.no)).await;
    k.cpu.work(t.tid, k.costs.munmap).await;
    if k.design.has_vma_locks() {
        k.vma_write(t, vma).await;
    }
    vma.gone.set(true);
    t.mm.vmas.borrow_mut().retain(|v| !Rc::ptr_eq(v, vma));
    if k.design.has_vma_locks() {
        vma.end_write();
    }
    if !k.design.has_range_locks() {
        t.mm.mmap_lock.downgrade(k, t.tid).await;
    }
    vma.tell_apart();
    let anonymous = vma.anonymous();
    let present = std::mem::take(&mut *vma.present.borrow_mut());
    k.forget_vma(vma);
    k.freeing.set(k.freeing.get() + anonymous);
    let object = vma.backing.object();
    for (&page, &stamp) in present.iter().filter(|p| *p.1 != u64::MAX) {
        k.cache.unmap(PageKey { object, page }, stamp, vma.no);
    }
    k.cpu
        .walk(t.tid, k.costs.unmap_page * present.len() as u64)
        .await;
    if !present.is_empty() {
        k.shoot_down(t.tid, &[t.mm.no]).await;
    }
    k.freeing.set(k.freeing.get() - anonymous);
    k.cache.count(-(anonymous as i64));
    if let Backing::Anonymous { object } = vma.backing {
        for page in k.stats.forget(object) {
            k.cache.drop_page(PageKey { object, page });
        }
    }
    unlock_looked(k, t, &t.mm).await;
    k.leave(t.tid, before).await;
}

/// `fork`, in the parent: every VMA is locked while its page tables are copied. The child ends at once; the parent waits for it.
pub(crate) async fn fork(k: &Kernel, t: &Thread) {
    let before = k.enter(t.tid, "fork");
    k.cpu.work(t.tid, k.costs.syscall + k.costs.fork / 2).await;
    lock(k, t, Span::All).await;
    let vmas: Vec<Rc<Vma>> = t.mm.vmas.borrow().clone();
    let mut copied = 0;
    for vma in &vmas {
        if k.design.has_vma_locks() {
            k.vma_write(t, vma).await;
        }
        // File mappings are not copied: the child faults them in again (`vma_needs_copy`).
        let anonymous = matches!(vma.backing, Backing::Anonymous { .. });
        if anonymous {
            let pages = vma.resident();
            let ns = k.costs.fork_page.saturating_mul(pages);
            k.cpu.walk(t.tid, ns).await;
            copied += pages;
        }
        k.cpu.walk(t.tid, k.costs.fork_vma).await;
    }
    if copied > 0 {
        // What was writable is write-protected.
        k.shoot_down(t.tid, &[t.mm.no]).await;
    }
    if k.design.has_vma_locks() {
        vmas.iter().for_each(|v| v.end_write());
    }
    unlock(k, t).await;
    k.now_does(t.tid, "wait");
    k.cpu.work(t.tid, k.costs.fork / 2).await;
    // The child takes its copy of the page tables apart; the parent, which waits for it, stands for it.
    let child = (k.costs.exit_page.saturating_mul(copied))
        .saturating_add(k.costs.fork_vma / 2 * vmas.len() as u64)
        .saturating_add(k.costs.wakeup);
    k.cpu.walk(t.tid, child).await;
    k.leave(t.tid, before).await;
}

/// Reads `/proc/PID/smaps_rollup` of a process: under its lock for reading, which is given up between mappings where somebody waits.
pub(crate) async fn smaps(k: &Kernel, t: &Thread, of: &Rc<Mm>) {
    let before = k.enter(t.tid, "read of smaps_rollup");
    k.cpu.work(t.tid, k.costs.syscall).await;
    lock_to_look(k, t, of).await;
    let vmas: Vec<Rc<Vma>> = of.vmas.borrow().clone();
    for vma in vmas {
        let pages = vma.resident();
        let ns = k.costs.smaps_page.saturating_mul(pages);
        k.cpu.walk(t.tid, ns).await;
        if !k.design.has_range_locks() && of.mmap_lock.is_contended() {
            of.mmap_lock.unlock_read(k, t.tid).await;
            k.mmap_read(t, of).await;
        }
    }
    unlock_looked(k, t, of).await;
    k.leave(t.tid, before).await;
}

/// MADV_PAGEOUT of an anonymous mapping: what is in memory goes to swap.
pub(crate) async fn page_out(k: &Kernel, t: &Thread, vma: &Rc<Vma>) {
    let before = k.enter(t.tid, "madvise(MADV_PAGEOUT)");
    k.cpu.work(t.tid, k.costs.syscall).await;
    lock_to_look(k, t, &t.mm).await;
    vma.tell_apart();
    let object = vma.backing.object();
    k.cpu
        .work(t.tid, k.costs.walk_page.saturating_mul(vma.pages))
        .await;
    let present: Vec<u64> = {
        let mut pages: Vec<u64> = vma.present.borrow().keys().copied().collect();
        pages.sort_unstable();
        pages
    };
    for (no, page) in present.into_iter().enumerate() {
        // Pages are taken out of the page table in batches (`try_to_unmap_flush`).
        if no % FLUSH_BATCH == 0 {
            k.shoot_down(t.tid, &[t.mm.no]).await;
        }
        let key = PageKey { object, page };
        // Somebody else has locked it: it is passed over.
        if matches!(k.cache.find(key), Found::Busy(_) | Found::Reading(_)) {
            continue;
        }
        let Some(stamp) = vma.present.borrow_mut().remove(&page) else {
            continue;
        };
        // In the swap cache, locked, while it is written.
        if stamp == u64::MAX {
            k.cache.count(-1);
            k.cache.set(key, true, t.tid);
        }
        k.stats.swap_out(key);
        let Found::UpToDate(no) = k.cache.find(key) else {
            continue;
        };
        k.cache.lock(no);
        k.cpu.work(t.tid, k.costs.reclaim_page).await;
        let woken = k.cache.unlock(no);
        k.cache.drop_page(key);
        wake_all(k, t.tid, &woken).await;
    }
    unlock_looked(k, t, &t.mm).await;
    k.leave(t.tid, before).await;
}

/// `mprotect` of a mapping that others may be faulting in: its lock is taken under `mmap_lock`.
pub(crate) async fn protect(k: &Kernel, t: &Thread, vma: &Rc<Vma>) {
    let before = k.enter(t.tid, "mprotect");
    k.cpu.work(t.tid, k.costs.syscall).await;
    lock(k, t, Span::Mapping(vma.no)).await;
    if k.design.has_vma_locks() {
        k.vma_write(t, vma).await;
    }
    k.cpu.work(t.tid, k.costs.mprotect).await;
    let pages = vma.resident();
    let ns = k.costs.mprotect_page.saturating_mul(pages);
    k.cpu.walk(t.tid, ns).await;
    if pages > 0 {
        k.shoot_down(t.tid, &[t.mm.no]).await;
    }
    if k.design.has_vma_locks() {
        vma.end_write();
    }
    unlock(k, t).await;
    k.leave(t.tid, before).await;
}

/// `fallocate(FALLOC_FL_PUNCH_HOLE)` of a page of a file: under its `invalidate_lock`, so after the reads that are under way, and
/// before all later ones.
pub(crate) async fn punch(k: &Kernel, t: &Thread, vma: &Rc<Vma>, page: u64) {
    let before = k.enter(t.tid, "fallocate(PUNCH_HOLE)");
    k.cpu.work(t.tid, k.costs.syscall).await;
    k.inode_lock(t, vma, true).await;
    k.cpu.work(t.tid, k.costs.punch).await;
    let object = vma.backing.object();
    let unmapped = k.cache.drop_page(PageKey { object, page });
    k.unmap(&unmapped);
    k.flush(t.tid, &unmapped).await;
    if let Some(inode) = &vma.inode {
        inode.unlock_write(k, t.tid).await;
    }
    k.leave(t.tid, before).await;
}

/// Touches a page: nothing, if it is present, else a fault, again until it is.
pub(crate) async fn touch(k: &Kernel, t: &Thread, a: &Access) {
    if k.is_present(a) {
        return;
    }
    let from = k.cpu.now();
    k.stats.fault_begins(t.tid, from);
    let before = k.enter(t.tid, "page fault");
    while !a.vma.gone.get() {
        k.cpu.work(t.tid, k.costs.fault).await;
        k.design.fault(k, t, a).await;
        k.slow_down(t).await;
        if k.is_present(a) {
            break;
        }
    }
    k.leave(t.tid, before).await;
    k.stats.fault(t.tid, k.cpu.now() - from);
}

async fn lock(k: &Kernel, t: &Thread, span: Span) {
    if k.design.has_range_locks() {
        t.mm.ranges.lock(k, t, &t.mm, span, true).await;
    } else {
        k.mmap_write(t, &t.mm).await;
    }
}

async fn unlock(k: &Kernel, t: &Thread) {
    if k.design.has_range_locks() {
        t.mm.ranges.unlock(k, t).await;
    } else {
        t.mm.mmap_lock.unlock_write(k, t.tid).await;
    }
}

async fn unlock_looked(k: &Kernel, t: &Thread, of: &Rc<Mm>) {
    if k.design.has_range_locks() {
        of.ranges.unlock(k, t).await;
    } else {
        of.mmap_lock.unlock_read(k, t.tid).await;
    }
}

async fn lock_to_look(k: &Kernel, t: &Thread, of: &Rc<Mm>) {
    if k.design.has_range_locks() {
        of.ranges.lock(k, t, of, Span::All, false).await;
    } else {
        k.mmap_read(t, of).await;
    }
}
