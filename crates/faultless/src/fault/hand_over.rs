//! Handing a run to the fill threads, and sleeping until one of them has served it.

#![allow(unsafe_code, reason = "answers requests on other threads' stacks")]

use crate::base::clock;
use crate::base::ids::Nanos;
use crate::base::primitive::{AtomicU32, Ordering, real};
use crate::fault::claim::WAIT;
use crate::fault::refusal::Refusal;
use crate::fault::run::{Need, Run};
use crate::space::map_core::MapCore;
use faultless_sys::futex;

/// What a faulting thread leaves for a fill thread. It lives on the faulting thread's stack until `done` is set.
pub(crate) struct Handed {
    pub(crate) core: *const MapCore,
    pub(crate) need: Need,
    pub(crate) run: Run,
    /// 0: not yet; 1: filled; otherwise an encoded [`Refusal`].
    pub(crate) done: AtomicU32,
}

/// Has a fill thread serve a run, and sleeps until it did.
pub(crate) fn hand_over(core: &MapCore, request: &Handed) -> Result<(), Refusal> {
    let pool = &*core.pool;
    // (No count bounds the two loops: a source may take as long as it likes, and a fill thread has the request until it answers.
    // SIGTERM ends a program whose source never answers: `sync/withheld.rs`.)
    while !pool.handover.push(request as *const Handed as usize) {
        pool.fill_bell.ring();
        clock::nap(Nanos::from_micros(100));
    }
    pool.fill_bell.ring();
    loop {
        match request.done.load(Ordering::Acquire) {
            0 => {
                futex::wait(real(&request.done), 0, WAIT.get());
                // A bell rung before the fill threads slept is not lost, but a second ring is cheap.
                if request.done.load(Ordering::Acquire) == 0 {
                    pool.fill_bell.ring();
                }
            }
            1 => return Ok(()),
            code => return Err(Refusal::decode(code)),
        }
    }
}

/// Answers a request. Its memory belongs to the faulting thread again from the moment that `done` is set.
///
/// # Safety
///
/// `request` must come from the pool's handover queue and be answered once only.
pub(crate) unsafe fn answer(request: *const Handed, result: Result<(), Refusal>) {
    // SAFETY: the faulting thread keeps the request until `done` is set, which happens here.
    let done = unsafe { &raw const (*request).done };
    let code = result.map_or_else(Refusal::encode, |()| 1);
    // SAFETY: as above, for the store; the wake names the address only.
    unsafe { (*done).store(code, Ordering::Release) };
    futex::wake_at(done.cast(), 1);
}
