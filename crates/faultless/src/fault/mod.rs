//! The fault path: what serves a miss, in the SIGBUS handler or for a pin, a prefetch or a load that asks first.
//!
//! Code on this floor, and what it calls on the floors below, may run at any instruction of any thread. It keeps these
//! rules: raw system calls, atomics and futexes only; no heap, no lock, no thread-local, no panic that a caller could provoke;
//! little stack; every loop bounded or waiting for a thread that makes progress; every wait with a time limit after which the
//! thread looks again. (Constructors and destructors run in ordinary contexts and may do more: the functions that return owned
//! values or take a `Mutex`.)
//!
//! The way of a miss: [`handler`] → `space/registry.rs` and `space/gate.rs` (whose address is it?) → [`serve`] → [`claim`]
//! (become the owner of the unit's word) → [`charge`] (room in the budget) → [`read_file`] (read into a staging buffer, and
//! check) → [`install`] (`UFFDIO_COPY`) → [`publish`] (resident; tell the evictor) → back to the load.

pub(crate) mod ahead;
pub(crate) mod ask;
pub(crate) mod chain;
pub(crate) mod charge;
pub(crate) mod claim;
pub(crate) mod fill;
pub(crate) mod give_up;
pub(crate) mod hand_over;
pub(crate) mod handler;
pub(crate) mod huge;
pub(crate) mod install;
pub(crate) mod piece;
pub(crate) mod publish;
pub(crate) mod read_file;
pub(crate) mod refusal;
pub(crate) mod report;
pub(crate) mod rescue;
pub(crate) mod run;
pub(crate) mod serve;
