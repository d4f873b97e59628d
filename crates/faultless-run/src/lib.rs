//! What `faultless run` and `libfaultless_preload.so` agree on.
//!
//! The command looks whether a program can be served at all ([`check_program`]), puts its [`Settings`] into the environment, and
//! becomes the program. The library, in that process and in all that descend from it, reads them there, shares one memory
//! budget with the others through a page of shared memory ([`tree`]), and writes a [`Report`] when the process ends.

pub mod compat;
mod inspect;
mod program;
mod report;
mod sandbox;
mod settings;
pub mod tree;

pub use inspect::{Fitness, inspect, inspect_open};
pub use program::{Unservable, check as check_program, find as find_program};
pub use report::{
    Efaults, FileReport, FillTimes, HandedBack, LeftAlone, Report, Totals, read_reports,
};
pub use sandbox::{Sandbox, filters};
pub use settings::{Backend, Reads, Settings, VARIABLE, first_bad, matches};
