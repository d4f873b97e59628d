//! What somebody else may have a hand in: files that are read, places where files are created, and text that is printed.
//!
//! Everything in this workspace that opens a file which a user named goes through [`input`], everything that creates one through
//! [`output`], and all text of strangers (names of threads, programs and files; what a trace or a workload says) through
//! [`printable`] on its way to a terminal. `docs/security.md` says what that promises.

pub mod input;
pub mod output;
mod text;

pub use text::{Printable, json, printable};

#[cfg(feature = "fuzz")]
pub mod fuzz;
