//! A file system that is slow, fails, cuts reads short or never answers, as it is told: for tests and benchmarks.
//!
//! It has one file, under two names, whose contents are a function of the position, so that nothing lies behind it that could be
//! slow or fail by itself. It is served over FUSE by a process of its own ([`serve()`]), since a process that waits for its
//! own file system can wait for ever. Whoever wants it starts that process with [`Storage::start`] and sends it
//! [`Faults`], at any time.
//!
//! * [`faults`]: what can go wrong.
//! * [`serve`](mod@serve): the file system, in the process that serves it.
//! * [`storage`]: the handle, in the process that uses it.

pub mod faults;
pub mod serve;
pub mod storage;

pub use faults::{Delay, Faults};
pub use serve::serve;
pub use storage::Storage;
