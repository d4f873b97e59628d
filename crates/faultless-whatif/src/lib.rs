//! `faultless whatif`: every design for the major fault, on a workload, before anyone patches a kernel.
//!
//! An event-driven, deterministic model of threads, processors, `mmap_lock`, per-VMA locks, pages, reclaim and storage, in
//! which the design of the fault is a plug-in.
//!
//! * [`workload`]: what threads do, on which machine: text.
//! * [`run`]: runs one under a design; [`chain`]: who waited for whom in it.
//! * [`compare`]: all designs on one workload, sweeps, and the verdict.
//! * [`replay`]: a recorded trace as a workload.
//! * [`published`]: what was published, and what the model says of it.
//! * [`designs`]: the designs, a file each.
//! * `kernel`: what designs are made of. `calls`: what changes an address space. `rwsem`, `vma`, `cache`, `storage`: the parts.
//!   [`lock`]: `mmap_lock` by itself.
//! * `cpu`: time, processors, the scheduler, the queue of events. Threads are futures.
//! * [`costs`]: what things cost, with the source of each figure.
//!
//! ```
//! let workload = faultless_whatif::workload::Workload::parse(r#"
//!     name = "two"
//!     seconds = 0.1
//!     [[files]]
//!     name = "data"
//!     size = "1 GiB"
//!     [[threads]]
//!     name = "reader"
//!     count = 2
//!     loop = [{ read = { of = "data" } }]
//! "#)?;
//! let today = faultless_whatif::run::simulate(&workload, "vma-then-mmap", 1)?;
//! let hold = faultless_whatif::run::simulate(&workload, "vma-hold", 1)?;
//! // Nobody else wants mmap_lock, so it makes no difference to the readers that today's kernel takes it.
//! assert!((today.groups[0].per_second / hold.groups[0].per_second - 1.0).abs() < 0.1);
//! assert_eq!(hold.mmap_locks_per_second, 0.0);
//! # Ok::<(), faultless_whatif::workload::Error>(())
//! ```

mod cache;
mod calls;
pub mod chain;
pub mod compare;
pub mod costs;
mod cpu;
pub mod designs;
pub mod html;
mod kernel;
pub mod lock;
pub mod published;
pub mod replay;
pub mod run;
mod rwsem;
#[cfg(test)]
mod script;
mod stats;
mod storage;
mod vma;
pub mod workload;

pub use storage::Device;
