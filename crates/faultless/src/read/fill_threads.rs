//! Fill threads: they read users' sources for threads that fault.

#![allow(
    unsafe_code,
    reason = "answers requests that lie on faulting threads' stacks"
)]

use crate::base::ids::Nanos;
use crate::base::primitive::Ordering;
use crate::base::thread::block_signals;
use crate::fault::fill::fill;
use crate::fault::hand_over::{Handed, answer};
use crate::read::blocks::with_pieces;
use crate::space::map_core::MapCore;
use crate::space::pool_core::PoolCore;

/// How long a fill thread sleeps before it looks by itself.
const IDLE: Nanos = Nanos::from_secs(1);

/// A fill thread's life: serves requests of faulting threads.
pub(crate) fn fill_for(pool: &PoolCore) {
    block_signals();
    pool.will_read_sources();
    while !pool.stopping.load(Ordering::Acquire) {
        let Some(at) = pool.handover.pop() else {
            pool.fill_bell.sleep(IDLE, || {
                !pool.stopping.load(Ordering::Acquire) && pool.handover.is_empty()
            });
            continue;
        };
        // (Requests behind one that was not published yet have rung in vain.)
        if !pool.handover.is_empty() {
            pool.fill_bell.ring();
        }
        let request = at as *const Handed;
        // SAFETY: the faulting thread keeps its request, and is inside the map's gate, until it is answered.
        let (core, request): (&MapCore, &Handed) = unsafe { (&*(*request).core, &*request) };
        let (run, need) = (&request.run, request.need);
        let result = with_pieces(core, need, |fetch| fill(core, run, need, None, fetch));
        // SAFETY: popped from the queue, so nobody else answers it.
        unsafe { answer(request, result) };
    }
}
