//! What happened to a program's page faults and to its mmap_lock, and the file that carries it.
//!
//! [`Event`] is one thing that happened: a fault, a wait for mmap_lock, a hold of it, a read from storage; beside them
//! stand the names of threads and files, and kernel stacks. The observer makes events out of a live kernel, and whoever
//! analyses or replays them needs nothing else: names are in the trace, not on the machine that it came from.
//!
//! [`Writer`] and [`Reader`] are the file format: a header, then chunks that are checked one by one, then a last chunk
//! that says how many events there were, so that a file that was cut off is told from a whole one. Both stream: memory
//! stays at a chunk, however long the trace is. The layout is described in [`mod@format`].
//!
//! ```
//! use faultless_trace::{Event, Header, Lost, Reader, Writer};
//!
//! let mut writer = Writer::new(Vec::new(), &Header::default())?;
//! writer.write(&Event::Lost(Lost { at: 5, records: 2 }))?;
//! let file = writer.finish()?;
//!
//! let mut reader = Reader::new(&file[..])?;
//! assert_eq!(reader.next().unwrap()?, Event::Lost(Lost { at: 5, records: 2 }));
//! assert!(reader.next().is_none());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod event;
pub mod format;

pub use event::{
    CAUSES, Cause, Doing, Ended, Event, Fault, File, FileNo, Hold, Io, Keeper, LockId, Lost, Nanos,
    Process, ProcessChange, Stack, StackNo, Stray, Thread, Wait,
};
pub use format::{Error, Header, Reader, VERSION, Writer};
