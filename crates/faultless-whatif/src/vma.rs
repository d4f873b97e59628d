//! A mapping and its lock: the per-VMA lock of Linux 6.4 and later, as `vma->vm_refcnt` has had it since 6.15.
//!
//! Readers come in without waiting or not at all. A writer, which holds `mmap_lock` for writing, keeps new readers out and
//! waits until those that are in have left (`__vma_start_exclude_readers`); the VMA stays shut until the writer lets go of `mmap_lock`, or
//! downgrades. Who is kept out goes to `mmap_lock`, and queues up behind that writer.
//!
//! Invariant: nobody is in while a writer works.

use crate::cpu::Tid;
use crate::kernel::{Kernel, Turn};
use crate::rwsem::{Rwsem, wake_all};
use rustc_hash::FxHashMap;
use std::cell::{Cell, RefCell};
use std::rc::Rc;

/// What is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backing {
    /// A file; or a part of one that nobody has written, whose pages come from no device.
    File { object: u32, holes: bool },
    /// Anonymous memory: zeros at first. What has been swapped out is in the cache under this object.
    Anonymous { object: u32 },
}

impl Backing {
    pub(crate) fn object(self) -> u32 {
        match self {
            Backing::File { object, .. } | Backing::Anonymous { object } => object,
        }
    }
}

/// A mapping.
#[derive(Debug)]
pub(crate) struct Vma {
    pub(crate) no: u32,
    /// Whose: the number of the address space.
    pub(crate) mm: u32,
    pub(crate) backing: Backing,
    pub(crate) pages: u64,
    /// Pages that are read with the one that is missing; 0 or 1: none.
    pub(crate) read_ahead: u32,
    /// The `invalidate_lock` of the file.
    pub(crate) inode: Option<Rc<Rwsem>>,
    readers: RefCell<Vec<Tid>>,
    writer: Cell<Option<Tid>>,
    writer_waits: Cell<bool>,
    /// The cache line of `vm_refcnt`.
    line: Turn,
    /// Pages in the page table: with the stamp of the page in the cache.
    pub(crate) present: RefCell<FxHashMap<u64, u64>>,
    /// All pages are present, and anonymous: for what is there from the beginning.
    full: Cell<bool>,
    /// Its first page has been touched: it has an `anon_vma`.
    pub(crate) has_anon_vma: Cell<bool>,
    /// It has been unmapped.
    pub(crate) gone: Cell<bool>,
}

impl Vma {
    pub(crate) fn new(
        no: u32,
        mm: u32,
        backing: Backing,
        pages: u64,
        read_ahead: u32,
        inode: Option<Rc<Rwsem>>,
    ) -> Vma {
        Vma {
            no,
            mm,
            backing,
            pages,
            read_ahead,
            inode,
            readers: RefCell::default(),
            writer: Cell::new(None),
            writer_waits: Cell::new(false),
            line: Turn::default(),
            present: RefCell::default(),
            full: Cell::new(false),
            has_anon_vma: Cell::new(false),
            gone: Cell::new(false),
        }
    }

    /// All pages are there, and anonymous.
    pub(crate) fn fill(&self) {
        self.full.set(true);
        self.has_anon_vma.set(true);
    }

    /// Each page by itself, where pages are to go.
    pub(crate) fn tell_apart(&self) {
        if self.full.replace(false) {
            *self.present.borrow_mut() = (0..self.pages).map(|p| (p, u64::MAX)).collect();
        }
    }

    /// The stamp of a page in the page table.
    pub(crate) fn stamp(&self, page: u64) -> Option<u64> {
        match self.full.get() {
            true => Some(u64::MAX),
            false => self.present.borrow().get(&page).copied(),
        }
    }

    /// Pages in the page table.
    pub(crate) fn resident(&self) -> u64 {
        match self.full.get() {
            true => self.pages,
            false => self.present.borrow().len() as u64,
        }
    }

    /// Pages of anonymous memory in the page table.
    pub(crate) fn anonymous(&self) -> u64 {
        match self.full.get() {
            true => self.pages,
            false => {
                let present = self.present.borrow();
                present.values().filter(|&&s| s == u64::MAX).count() as u64
            }
        }
    }

    /// `vma_start_read`: whether the thread is in.
    pub(crate) async fn start_read(&self, k: &Kernel, t: Tid) -> bool {
        if self.writer.get().is_some() || self.gone.get() {
            return false;
        }
        self.line.pass(k, t, None, 0).await;
        if self.writer.get().is_some() || self.gone.get() {
            return false;
        }
        self.readers.borrow_mut().push(t);
        true
    }

    /// `vma_end_read`.
    pub(crate) async fn end_read(&self, k: &Kernel, t: Tid) {
        self.line.pass(k, t, None, 0).await;
        let last = {
            let mut readers = self.readers.borrow_mut();
            let at = readers.iter().position(|&r| r == t);
            readers.swap_remove(at.expect("a reader leaves the VMA that it is in"));
            readers.is_empty()
        };
        if last && self.writer_waits.replace(false) {
            let writer = self.writer.get().expect("a writer that waits");
            wake_all(k, t, &[writer]).await;
        }
    }

    /// Threads that are in.
    pub(crate) fn readers(&self) -> Vec<Tid> {
        self.readers.borrow().clone()
    }

    /// `vma_start_write`: keeps readers out, and waits for those that are in. Whether it had to wait.
    pub(crate) async fn start_write(&self, k: &Kernel, t: Tid) -> bool {
        self.line.pass(k, t, None, 0).await;
        assert!(
            self.writer.get().is_none_or(|w| w == t),
            "two writers of a VMA"
        );
        self.writer.set(Some(t));
        let mut waited = false;
        while !self.readers.borrow().is_empty() {
            waited = true;
            self.writer_waits.set(true);
            k.cpu.block(t).await;
        }
        self.writer_waits.set(false);
        waited
    }

    /// `vma_end_write_all`, of this one.
    pub(crate) fn end_write(&self) {
        assert!(
            self.readers.borrow().is_empty(),
            "somebody got into a VMA beside its writer"
        );
        self.writer.set(None);
    }
}

#[cfg(test)]
mod tests {
    use crate::calls;
    use crate::kernel::Access;
    use crate::script::{Body, MS, play};
    use crate::vma::Backing;
    use std::cell::RefCell;
    use std::rc::Rc;

    /// Two mappings; a fault in the first reads for 50 ms; a fork comes while it does; another thread maps.
    fn scene(design: &str) -> Vec<(f64, String)> {
        let shared: Rc<RefCell<Option<Access>>> = Rc::default();
        let slow: Body = {
            let shared = Rc::clone(&shared);
            Box::new(move |k, t, log| {
                let shared = Rc::clone(&shared);
                Box::pin(async move {
                    let object = k.new_object();
                    let backing = Backing::File {
                        object,
                        holes: false,
                    };
                    let vma = calls::mmap(k, t, backing, 16, 0).await;
                    let a = Access {
                        vma,
                        page: 0,
                        read: None,
                    };
                    *shared.borrow_mut() = Some(a.clone());
                    calls::touch(k, t, &a).await;
                    log.tell(k, "fault served");
                })
            })
        };
        let forks: Body = Box::new(|k, t, log| {
            Box::pin(async move {
                k.cpu.sleep(t.tid, 10 * MS).await;
                calls::fork(k, t).await;
                log.tell(k, "forked");
            })
        });
        let maps: Body = Box::new(|k, t, log| {
            Box::pin(async move {
                k.cpu.sleep(t.tid, 20 * MS).await;
                let object = k.new_object();
                calls::mmap(k, t, Backing::Anonymous { object }, 1, 0).await;
                log.tell(k, "mapped");
            })
        });
        play(8, design, 50 * MS, 1 << 20, vec![slow, forks, maps])
    }

    /// The objection to holding the VMA's lock across the read.
    #[test]
    fn under_vma_hold_a_slow_fault_stops_a_writer_and_all_behind_it() {
        let log = scene("vma-hold");
        let at = |what: &str| log.iter().find(|l| l.1 == what).expect("it happens").0;
        assert_eq!(at("fault served"), 50.0);
        assert_eq!(at("forked"), 50.0);
        assert_eq!(at("mapped"), 50.0);
    }

    #[test]
    fn under_vma_retry_it_stops_nobody() {
        for design in ["vma-retry", "vma-then-mmap", "retry-hard", "faultless"] {
            let log = scene(design);
            let at = |what: &str| log.iter().find(|l| l.1 == what).expect("it happens").0;
            assert_eq!(at("fault served"), 50.0, "{design}");
            assert_eq!(at("forked"), 10.0, "{design}");
            assert_eq!(at("mapped"), 20.0, "{design}");
        }
    }
}
