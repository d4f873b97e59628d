//! The model of `mmap_lock` by itself: in which order requests get it.
//!
//! ```
//! use faultless_whatif::lock::{Request, granted};
//!
//! const MS: u64 = 1_000_000;
//! let reader = Request { at: 0, write: false, keep: 10 * MS };
//! let writer = Request { at: MS, write: true, keep: MS };
//! let late = Request { at: 2 * MS, ..reader };
//! let at = granted(&[reader, writer, late]);
//! // The queued writer stops the late reader.
//! assert!(at[0] < at[1] && at[1] < at[2]);
//! ```

use crate::costs::Costs;
use crate::cpu::Tid;
use crate::kernel::{Kernel, Machine, Running};
use crate::storage::{Device, Storage};
use faultless_trace::Nanos;
use std::cell::RefCell;
use std::rc::Rc;

/// Somebody who wants the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// When, in nanoseconds.
    pub at: Nanos,
    /// For writing.
    pub write: bool,
    /// For how long.
    pub keep: Nanos,
}

/// When each request gets the lock, on a machine with a processor for each, where nothing but the lock takes any time.
///
/// # Panics
///
/// When an invariant of the lock is broken.
pub fn granted(requests: &[Request]) -> Vec<Nanos> {
    let end = requests
        .iter()
        .fold(1, |end, r| end.max(r.at) + r.keep)
        .saturating_mul(2);
    let k = Rc::new(Kernel::new(
        Machine {
            cores: requests.len().clamp(1, 1024) as u32,
            costs: Costs::none(),
            storage: Storage::new(Device::fixed(1.0), 1),
            memory: (1, None),
            steals: true,
            preempts: true,
            seed: 1,
        },
        crate::designs::of(crate::designs::TODAY).expect("today's kernel"),
    ));
    let mm = k.new_mm("process");
    let group = k.stats.new_group("thread");
    let log = RefCell::new(vec![Nanos::MAX; requests.len()]);
    let mut bodies: Vec<(Tid, Running<'_>)> = Vec::new();
    for (no, request) in requests.iter().enumerate() {
        let t = k.new_thread(&mm, group);
        let (k, log) = (&k, &log);
        bodies.push((
            t.tid,
            Box::pin(async move {
                k.cpu.sleep(t.tid, request.at.max(1)).await;
                if request.write {
                    k.mmap_write(&t, &t.mm).await;
                } else {
                    k.mmap_read(&t, &t.mm).await;
                }
                log.borrow_mut()[no] = k.cpu.now();
                k.cpu.sleep(t.tid, request.keep.max(1)).await;
                if request.write {
                    t.mm.mmap_lock.unlock_write(k, t.tid).await;
                } else {
                    t.mm.mmap_lock.unlock_read(k, t.tid).await;
                }
            }),
        ));
    }
    k.run(bodies, requests.len(), end, 0, u64::MAX);
    log.into_inner()
}
