//! `range`: instead of `mmap_lock` there is a lock for ranges of addresses: a fault takes its page's, a system call that of the
//! mapping that it changes; fork and smaps take all.
//!
//! After Laurent Dufour and Davidlohr Bueso, 2017 and 2018; never merged. This is the lock as it was meant: their series took the whole
//! range in system calls, and gained nothing ("there is no improvement of concurrency per se"). Ranges do not overlap, so the fault keeps
//! its own across the read.
//! A spin lock guards the tree of ranges; every operation takes it (measured then: what a range lock costs is what it gains).

use super::{About, Design, stay};
use crate::cpu::Tid;
use crate::kernel::{Access, Kernel, Mm, On, Running, Thread, Turn};
use crate::rwsem::wake_all;
use crate::stats::LockKind;
use std::cell::RefCell;
use std::rc::Rc;

pub(crate) const ABOUT: About = About {
    id: "range",
    what: "range locks instead of mmap_lock, held across the read; as they were meant",
    when: "proposed 2017, 2018",
    source: "LWN 724502; lkml 1802.0/02953",
};

/// What is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Span {
    /// The page of a mapping.
    Page(u32, u64),
    /// A mapping.
    Mapping(u32),
    /// Everything.
    All,
}

impl Span {
    fn overlaps(self, other: Span) -> bool {
        match (self, other) {
            (Span::All, _) | (_, Span::All) => true,
            (Span::Page(a, p), Span::Page(b, q)) => a == b && p == q,
            (Span::Page(a, _), Span::Mapping(b))
            | (Span::Mapping(a), Span::Page(b, _))
            | (Span::Mapping(a), Span::Mapping(b)) => a == b,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Request {
    t: Tid,
    span: Span,
    write: bool,
}

/// The lock: who has a range, and who waits for one, in order.
#[derive(Debug, Default)]
pub(crate) struct Ranges {
    tree: Turn,
    held: RefCell<Vec<Request>>,
    waiting: RefCell<Vec<Request>>,
}

impl Ranges {
    /// Takes a range of a process, whose lock this is.
    pub(crate) async fn lock(&self, k: &Kernel, t: &Thread, mm: &Rc<Mm>, span: Span, write: bool) {
        let from = k.cpu.now();
        self.tree
            .pass(k, t.tid, Some(LockKind::Ranges), k.costs.range_tree)
            .await;
        let request = Request {
            t: t.tid,
            span,
            write,
        };
        let blocker = self.blocker(request, self.waiting.borrow().len());
        if blocker.is_none() {
            self.held.borrow_mut().push(request);
        } else {
            self.waiting.borrow_mut().push(request);
            let on = On::Range {
                mm: Rc::clone(mm),
                write,
            };
            let wait = async {
                while !self.held.borrow().iter().any(|h| h.t == t.tid) {
                    k.cpu.block(t.tid).await;
                }
            };
            k.waits(t.tid, on, wait).await;
        }
        let kind = if write {
            LockKind::MmapWrite
        } else {
            LockKind::MmapRead
        };
        k.stats.waited(kind, t.tid, k.cpu.now() - from);
    }

    pub(crate) async fn unlock(&self, k: &Kernel, t: &Thread) {
        self.tree
            .pass(k, t.tid, Some(LockKind::Ranges), k.costs.range_tree)
            .await;
        self.held.borrow_mut().retain(|h| h.t != t.tid);
        let mut woken = Vec::new();
        let mut no = 0;
        while no < self.waiting.borrow().len() {
            let request = self.waiting.borrow()[no];
            if self.blocker(request, no).is_none() {
                self.waiting.borrow_mut().remove(no);
                self.held.borrow_mut().push(request);
                woken.push(request.t);
            } else {
                no += 1;
            }
        }
        wake_all(k, t.tid, &woken).await;
    }

    /// Who is in the way of a thread that waits.
    pub(crate) fn in_the_way_of(&self, t: Tid) -> Option<Tid> {
        let (no, request) = {
            let waiting = self.waiting.borrow();
            let no = waiting.iter().position(|w| w.t == t)?;
            (no, waiting[no])
        };
        self.blocker(request, no)
    }

    /// Whether a thread sleeps for a range that is to be had, or that it has.
    pub(crate) fn has_forgotten(&self, t: Tid) -> bool {
        self.in_the_way_of(t).is_none()
    }

    /// Who is in the way of a request: a holder, or one that has waited for longer.
    fn blocker(&self, request: Request, before: usize) -> Option<Tid> {
        let in_the_way = |o: &&Request| {
            (o.write || request.write) && o.t != request.t && o.span.overlaps(request.span)
        };
        let held = self.held.borrow();
        let waiting = self.waiting.borrow();
        let mut all = held.iter().chain(&waiting[..before]);
        all.find(in_the_way).map(|o| o.t)
    }
}

pub(crate) struct Range;

impl Design for Range {
    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a> {
        Box::pin(async move {
            let span = Span::Page(a.vma.no, a.page);
            t.mm.ranges.lock(k, t, &t.mm, span, false).await;
            stay(k, t, a).await;
            t.mm.ranges.unlock(k, t).await;
        })
    }

    fn has_vma_locks(&self) -> bool {
        false
    }

    fn has_range_locks(&self) -> bool {
        true
    }
}
