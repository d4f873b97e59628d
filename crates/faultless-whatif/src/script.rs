//! For tests: threads that do what a script says, on a machine where nothing costs anything.

use crate::costs::Costs;
use crate::cpu::Tid;
use crate::kernel::{Kernel, Machine, Mm, Running, Thread};
use crate::storage::{Device, Storage};
use faultless_trace::Nanos;
use std::cell::RefCell;
use std::rc::Rc;

/// Milliseconds.
pub(crate) const MS: Nanos = 1_000_000;

/// What threads have told, and when, in milliseconds.
#[derive(Debug, Default, Clone)]
pub(crate) struct Log(Rc<RefCell<Vec<(f64, String)>>>);

impl Log {
    pub(crate) fn tell(&self, k: &Kernel, what: &str) {
        let at = (k.cpu.now() as f64 / 1e4).round() / 100.0;
        self.0.borrow_mut().push((at, what.to_owned()));
    }

    pub(crate) fn all(&self) -> Vec<(f64, String)> {
        self.0.borrow().clone()
    }
}

/// A thread of a script.
pub(crate) type Body = Box<dyn for<'a> Fn(&'a Kernel, &'a Thread, &'a Log) -> Running<'a>>;

/// Runs threads under a design, on a device whose reads take a time.
pub(crate) fn play(
    cores: u32,
    design: &str,
    read: Nanos,
    memory: u64,
    bodies: Vec<Body>,
) -> Vec<(f64, String)> {
    play_on(cores, design, read, memory, bodies).0
}

/// The same, and the machine as it is then.
pub(crate) fn play_on(
    cores: u32,
    design: &str,
    read: Nanos,
    memory: u64,
    bodies: Vec<Body>,
) -> (Vec<(f64, String)>, Rc<Kernel>) {
    let storage = Storage::new(Device::fixed(read as f64 / 1e3), 1);
    let design = crate::designs::of(design).expect("a design");
    let machine = Machine {
        cores,
        costs: Costs::none(),
        storage,
        memory: (memory, None),
        steals: true,
        preempts: true,
        seed: 1,
    };
    let k = Rc::new(Kernel::new(machine, design));
    let mm: Rc<Mm> = k.new_mm("app");
    let group = k.stats.new_group("thread");
    let log = Log::default();
    let threads: Vec<Thread> = bodies.iter().map(|_| k.new_thread(&mm, group)).collect();
    let mut running: Vec<(Tid, Running<'_>)> = Vec::new();
    for (thread, body) in threads.iter().zip(&bodies) {
        running.push((thread.tid, body(&k, thread, &log)));
    }
    let ends = running.len();
    k.run(running, ends, 10_000 * MS, 0, u64::MAX);
    (log.all(), k)
}

/// A thread that begins after a while, takes mmap_lock, keeps it for a while, and lets go.
pub(crate) fn holder(name: &'static str, after: Nanos, write: bool, keep: Nanos) -> Body {
    Box::new(move |k, t, log| {
        Box::pin(async move {
            k.cpu.sleep(t.tid, after).await;
            if write {
                k.mmap_write(t, &t.mm).await;
            } else {
                k.mmap_read(t, &t.mm).await;
            }
            log.tell(k, name);
            k.cpu.sleep(t.tid, keep).await;
            if write {
                t.mm.mmap_lock.unlock_write(k, t.tid).await;
            } else {
                t.mm.mmap_lock.unlock_read(k, t.tid).await;
            }
        })
    })
}
