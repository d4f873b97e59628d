//! What major page faults cost beside a neighbour, measured: the kernel's mmap, pread, userfaultfd with monitor threads,
//! and Faultless, on the same pages of the same file, interleaved.
//!
//! * [`data`]: the file, whose bytes are a function of their position, and the order in which its pages are read.
//! * [`fast`]: a disk in memory, for the file.
//! * [`contender`]: ways to read a page.
//! * `floor`: what a miss costs at least that a signal serves.
//! * `deep`: contenders with many reads in flight.
//! * [`neighbour`]: what disturbs the readers.
//! * [`onlooker`]: who observes them, so that its cost can be told.
//! * [`cell`]: one measurement: one contender beside one neighbour.
//! * [`plan`]: all measurements of a run: which, in which process; and the rows that come out.
//! * [`order`]: which contender goes first in which round.
//! * [`spread`]: medians, how far rounds lie apart, and ratios that say how far.
//! * [`unmodified`]: a plain C program, by itself and under `faultless run`.
//! * [`micro`]: what single operations cost, for the model of `faultless whatif`.
//! * [`machine`]: what it ran on.
//!
//! Every byte of every page that is read is checked, in every contender but fio. A measurement with wrong bytes is worth
//! nothing, and says so.

pub mod cell;
pub mod contender;
pub mod data;
mod deep;
pub mod fast;
pub mod fio;
mod floor;
pub mod group;
pub mod html;
pub mod machine;
pub mod micro;
pub mod neighbour;
pub mod onlooker;
pub mod order;
mod pagemap;
pub mod plan;
pub mod scenario;
pub mod simulate;
pub mod spread;
pub mod unmodified;

/// A directory for files of our own, which nobody else can read or write.
fn private_dir() -> std::io::Result<tempfile::TempDir> {
    use std::os::unix::fs::PermissionsExt as _;
    tempfile::Builder::new()
        .prefix("faultless-")
        .permissions(std::fs::Permissions::from_mode(0o700))
        .tempdir()
}
