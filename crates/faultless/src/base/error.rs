//! What can go wrong, in words that name the thing, its value and the remedy.

use crate::base::size::ByteSize;
use std::io;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option has a value that cannot be.
    #[error("{what} is {value}: {remedy}")]
    InvalidOption {
        /// The option.
        what: &'static str,
        /// Its value.
        value: String,
        /// What it may be instead.
        remedy: &'static str,
    },
    /// A range does not lie in the map.
    #[error("the range {start}..{end} does not lie in the map, which has {len} bytes")]
    OutOfRange {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
        /// Length of the map, in bytes.
        len: usize,
    },
    /// The file cannot be guarded by a read lease, so a safe map of it cannot be made.
    #[error("cannot map {name} safely: {reason}")]
    Lease {
        /// The file.
        name: String,
        /// Why not.
        reason: LeaseRefusal,
    },
    /// The source could not be read.
    #[error("cannot read {name} at offset {offset}: {error}")]
    Read {
        /// The source.
        name: String,
        /// Where, in bytes from its start.
        offset: u64,
        /// What the source said.
        #[source]
        error: io::Error,
    },
    /// The source ends before the page: it was truncated after it was mapped.
    #[error("{name} ends before offset {offset}: it was truncated after it was mapped")]
    PastEnd {
        /// The source.
        name: String,
        /// Where, in bytes from its start.
        offset: u64,
    },
    /// The file was opened for writing after it was mapped, and the page is not in memory.
    #[error(
        "{name} was opened for writing after it was mapped, and the page at offset {offset} was not in memory; map it again once the writer is done"
    )]
    LeaseBroken {
        /// The file.
        name: String,
        /// Where, in bytes from its start.
        offset: u64,
    },
    /// Everything that the budget allows is pinned, or kept because it cannot be read again.
    #[error(
        "the memory budget of {budget} is used up by pages that must stay; unpin some, or raise it with Pool::resize"
    )]
    BudgetExhausted {
        /// The pool's budget.
        budget: ByteSize,
    },
    /// Without the engine, a safe map of a file, and any map of a source that is no file, is a copy in memory, and the budget has
    /// no room for this one.
    #[error(
        "cannot map {name} without userfaultfd: its {len} bytes would be copied into memory, and the budget of {budget} has no room for them; raise it, or map a file for whose bytes you vouch with map_trusted"
    )]
    TooLargeToCopy {
        /// The source.
        name: String,
        /// Bytes of the copy.
        len: u64,
        /// The pool's budget.
        budget: ByteSize,
    },
    /// A system call failed.
    #[error("{what}: {error}")]
    Kernel {
        /// What was attempted.
        what: String,
        /// What the kernel said.
        #[source]
        error: io::Error,
    },
    /// Another part of the program replaced the engine's SIGBUS handler.
    #[error(
        "the SIGBUS handler was replaced by the one at {handler:#x}, so misses cannot be served; install that one before the first pool is built"
    )]
    HandlerReplaced {
        /// Address of the handler that is there now.
        handler: usize,
    },
    /// The pool was made by the process that this one was forked from.
    #[error(
        "this pool belongs to the process that forked this one; build a pool of its own in the child"
    )]
    Forked,
    /// There are as many maps as the engine can tell apart.
    #[error("there are {0} maps already, which is the most that can live at once; drop some")]
    TooManyMaps(usize),
    /// A source needs its own map to be read.
    #[error("reading {name} at offset {offset} needs the same page of its own map")]
    Recursion {
        /// The source.
        name: String,
        /// Where, in bytes from its start.
        offset: u64,
    },
}

/// Why a read lease cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseRefusal {
    /// Somebody has the file open for writing.
    #[error(
        "it is open for writing, here or in another process; close the writer, or vouch for the bytes with map_trusted"
    )]
    OpenForWriting,
    /// Leases are for owners.
    #[error(
        "only its owner, or a process with CAP_LEASE, may take a lease on it; run as its owner, or vouch for the bytes with map_trusted"
    )]
    NotOwner,
    /// The file system does not see every write, or cannot hold a writer back.
    #[error(
        "it lies on {file_system}, where a lease does not keep the bytes from changing (it does on ext4, xfs, btrfs, f2fs and tmpfs); copy it there, or vouch for the bytes with map_trusted"
    )]
    FileSystem {
        /// The file system's name, or its magic number.
        file_system: String,
    },
    /// It is a directory, a device, a pipe …
    #[error("it is {kind}, and only a regular file can be leased")]
    NotRegular {
        /// What it is.
        kind: &'static str,
    },
    /// The kernel refused for another reason.
    #[error("the kernel refuses a lease on it ({0}); vouch for the bytes with map_trusted")]
    Kernel(io::Error),
}

impl Error {
    pub(crate) fn kernel(what: impl Into<String>, error: impl Into<io::Error>) -> Self {
        Error::Kernel {
            what: what.into(),
            error: error.into(),
        }
    }
}

impl From<Error> for io::Error {
    fn from(e: Error) -> io::Error {
        let kind = match &e {
            Error::InvalidOption { .. } | Error::OutOfRange { .. } => io::ErrorKind::InvalidInput,
            Error::Read { error, .. } | Error::Kernel { error, .. } => error.kind(),
            Error::PastEnd { .. } => io::ErrorKind::UnexpectedEof,
            Error::BudgetExhausted { .. } | Error::TooLargeToCopy { .. } => {
                io::ErrorKind::OutOfMemory
            }
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, e)
    }
}
