//! `uffd-monitor`: a userfaultfd, whose events monitor threads read; these read the page themselves and install it with
//! UFFDIO_COPY. The thread that faulted sleeps meanwhile, and retries under `mmap_lock`.
//!
//! Linux 4.3. One wait queue for each descriptor: an event is found, and its thread woken, by going through all that wait, under a
//! spin lock.

use super::{About, Design};
use crate::cpu::Tid;
use crate::kernel::{Access, Kernel, On, Running, Thread, Turn};
use crate::rwsem::wake_all;
use crate::stats::LockKind;
use faultless_trace::Nanos;
use std::cell::RefCell;
use std::collections::VecDeque;

pub(crate) const ABOUT: About = About {
    id: "uffd-monitor",
    what: "userfaultfd with monitor threads",
    when: "Linux 4.3",
    source: "fs/userfaultfd.c",
};

/// The descriptor.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    lock: Turn,
    events: RefCell<VecDeque<(Tid, Access)>>,
    served: RefCell<Vec<Tid>>,
    idle: RefCell<Vec<Tid>>,
    asleep: std::cell::Cell<u64>,
    /// Monitor threads.
    pub(crate) monitors: std::cell::Cell<usize>,
}

impl Queue {
    /// Whether a thread sleeps for a monitor that has served it, or that sleeps itself although there is an event.
    pub(crate) fn has_forgotten(&self, t: Tid) -> bool {
        let events = self.events.borrow();
        self.served.borrow().contains(&t)
            || (events.iter().any(|e| e.0 == t) && self.idle.borrow().len() == self.monitors.get())
    }
}

pub(crate) struct UffdMonitor;

impl Design for UffdMonitor {
    fn fault<'a>(&'a self, k: &'a Kernel, t: &'a Thread, a: &'a Access) -> Running<'a> {
        Box::pin(async move {
            if a.is_anonymous() {
                // Not registered: the kernel's own.
                return super::vma_then_mmap::fault(k, t, a).await;
            }
            let vma = a.vma.start_read(k, t.tid).await;
            // The event is sent under the VMA's lock (since Linux 6.6), which is given up for the sleep.
            let q = &t.mm.monitor;
            if !vma {
                k.mmap_read(t, &t.mm).await;
            }
            q.asleep.set(q.asleep.get() + 1);
            q.lock
                .pass(k, t.tid, Some(LockKind::Uffd), k.costs.uffd_queue)
                .await;
            q.events.borrow_mut().push_back((t.tid, a.clone()));
            let monitor = q.idle.borrow_mut().pop();
            if let Some(monitor) = monitor {
                k.cpu.work(t.tid, k.costs.wake).await;
                k.cpu.wake(monitor);
            }
            if vma {
                a.vma.end_read(k, t.tid).await;
            } else {
                t.mm.mmap_lock.unlock_read(k, t.tid).await;
            }
            let sleep = async {
                while !q.served.borrow().contains(&t.tid) {
                    k.cpu.block(t.tid).await;
                }
            };
            k.waits(t.tid, On::Monitor, sleep).await;
            q.served.borrow_mut().retain(|&s| s != t.tid);
            q.asleep.set(q.asleep.get() - 1);
            // VM_FAULT_RETRY: the second attempt is made under mmap_lock.
            k.mmap_read(t, &t.mm).await;
            k.cpu.work(t.tid, k.costs.fault).await;
            t.mm.mmap_lock.unlock_read(k, t.tid).await;
        })
    }

    fn has_monitors(&self) -> bool {
        true
    }
}

/// What a monitor thread does.
pub(crate) async fn monitor(k: &Kernel, t: &Thread) {
    let q = &t.mm.monitor;
    loop {
        let next = q.events.borrow_mut().pop_front();
        let Some((faulter, access)) = next else {
            if !q.idle.borrow().contains(&t.tid) {
                q.idle.borrow_mut().push(t.tid);
            }
            k.cpu.block(t.tid).await;
            q.idle.borrow_mut().retain(|&i| i != t.tid);
            continue;
        };
        // All that wait in the queue are looked at, for the event and for the wake-up.
        let all: Nanos = q.asleep.get() * k.costs.uffd_queue;
        q.lock.pass(k, t.tid, Some(LockKind::Uffd), all).await;
        k.cpu.work(t.tid, k.costs.uffd_event).await;
        let before = k.enter(t.tid, "read and UFFDIO_COPY");
        let no = super::faultless::pread(k, t, &access).await;
        super::faultless::copy(k, t, &access, no).await;
        k.leave(t.tid, before).await;
        q.lock.pass(k, t.tid, Some(LockKind::Uffd), all).await;
        q.served.borrow_mut().push(faulter);
        wake_all(k, t.tid, &[faulter]).await;
    }
}
