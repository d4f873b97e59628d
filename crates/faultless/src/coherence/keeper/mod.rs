//! The keeper: one thread for the whole process, with a descriptor table of its own.
//!
//! It holds a second copy of every descriptor that the engine needs, where the program's `close` cannot reach it: were
//! the last reference to a userfaultfd closed, absent pages would silently read as zeros. It receives the signals that
//! announce a broken lease. A second thread, which shares its table, reads the reports of ranges that were unmapped or
//! moved. When the keeper closes its copies, the program loses no POSIX lock: those belong to the program's table.

mod descriptors;
mod leases;
mod posix_locks;
mod reports;
mod service;

pub(crate) use descriptors::{adopt, retire, unwatch, watch};
pub(crate) use leases::{end_lease, lease};
pub(crate) use posix_locks::{locks_coming, locks_settled, posix_locked};
pub(crate) use service::{KeeperLocks, apart, freeze, spawn, spawn_later, start, stop};
