//! Leases that the keeper watches.

use crate::base::ids::LeaseId;
use crate::base::primitive::Ordering;
use crate::base::primitive::{AtomicU64, lock};
use crate::coherence::keeper::service::{BreakCall, Lease, RUNNING, with};
use crate::space::fds::Fd;
use faultless_sys::{Errno, file};
use std::io;

static NEXT_LEASE: AtomicU64 = AtomicU64::new(1);

/// Takes a read lease on the open file of `fd`; `on_break` is called on the keeper's thread when it is being broken.
pub(crate) fn lease(fd: &Fd, on_break: BreakCall) -> io::Result<Result<LeaseId, Errno>> {
    let number = fd.engine_number();
    let running = lock(&RUNNING);
    let Some(r) = running.as_ref() else {
        return Err(io::Error::other("the keeper was not started"));
    };
    let (tid, break_signal) = (r.tid, r.signal);
    drop(running);
    with(move |k| {
        file::direct_signals(number, tid, break_signal)?;
        file::take_read_lease(number)?;
        let serial = NEXT_LEASE.fetch_add(1, Ordering::Relaxed);
        let on_break = Some(on_break);
        k.leases.insert(number, Lease { serial, on_break });
        Ok(LeaseId { number, serial })
    })
}

/// Gives a lease up, if it has not been already.
pub(crate) fn end_lease(id: LeaseId) {
    let _ = with(move |k| {
        if k.leases
            .get(&id.number)
            .is_some_and(|l| l.serial == id.serial)
        {
            k.leases.remove(&id.number);
            let _ = file::give_up_lease(id.number);
        }
    });
}
