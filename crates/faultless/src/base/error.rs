//! What can go wrong, in words that name the thing, its value and the remedy.

use crate::base::size::ByteSize;
use std::fmt;
use std::io;

/// An error of this crate.
#[derive(Debug)]
#[non_exhaustive]
pub enum Error {
    /// An option has a value that cannot be.
    InvalidOption {
        /// The option.
        what: &'static str,
        /// Its value.
        value: String,
        /// What it may be instead.
        remedy: &'static str,
    },
    /// A range does not lie in the map.
    OutOfRange {
        /// First byte.
        start: usize,
        /// One past the last byte.
        end: usize,
        /// Length of the map, in bytes.
        len: usize,
    },
    /// The file cannot be guarded by a read lease, so a safe map of it cannot be made.
    Lease {
        /// The file.
        name: String,
        /// Why not.
        reason: LeaseRefusal,
    },
    /// The source could not be read.
    Read {
        /// The source.
        name: String,
        /// Where, in bytes from its start.
        offset: u64,
        /// What the source said.
        error: io::Error,
    },
    /// The source ends before the page: it was truncated after it was mapped.
    PastEnd {
        /// The source.
        name: String,
        /// Where, in bytes from its start.
        offset: u64,
    },
    /// The file was opened for writing after it was mapped, and the page is not in memory.
    LeaseBroken {
        /// The file.
        name: String,
        /// Where, in bytes from its start.
        offset: u64,
    },
    /// Everything that the budget allows is pinned, or kept because it cannot be read again.
    BudgetExhausted {
        /// The pool's budget.
        budget: ByteSize,
    },
    /// Without the engine, a safe map of a file, and any map of a source that is no file, is a copy in memory, and the budget has
    /// no room for this one.
    TooLargeToCopy {
        /// The source.
        name: String,
        /// Bytes of the copy.
        len: u64,
        /// The pool's budget.
        budget: ByteSize,
    },
    /// A system call failed.
    Kernel {
        /// What was attempted.
        what: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// Another part of the program replaced the engine's SIGBUS handler.
    HandlerReplaced {
        /// Address of the handler that is there now.
        handler: usize,
    },
    /// The pool was to have all of the engine, and this machine does not permit that.
    NotFull(
        /// The backend that it would have, and what that lacks.
        String,
    ),
    /// The pool was made by the process that this one was forked from.
    Forked,
    /// There are as many maps as the engine can tell apart.
    TooManyMaps(usize),
    /// A source needs its own map to be read.
    Recursion {
        /// The source.
        name: String,
        /// Where, in bytes from its start.
        offset: u64,
    },
}

/// Why a read lease cannot be had.
#[derive(Debug)]
#[non_exhaustive]
pub enum LeaseRefusal {
    /// Somebody has the file open for writing.
    OpenForWriting,
    /// Leases are for owners.
    NotOwner,
    /// The file system does not see every write, or cannot hold a writer back.
    FileSystem {
        /// The file system's name, or its magic number.
        file_system: String,
    },
    /// It is a directory, a device, a pipe …
    NotRegular {
        /// What it is.
        kind: &'static str,
    },
    /// The kernel refused for another reason.
    Kernel(io::Error),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::InvalidOption { what, value, remedy } => write!(f, "{what} is {value}: {remedy}"),
            Error::OutOfRange { start, end, len } => write!(f, "the range {start}..{end} does not lie in the map, which has {len} bytes"),
            Error::Lease { name, reason } => write!(f, "cannot map {name} safely: {reason}"),
            Error::Read { name, offset, error } => write!(f, "cannot read {name} at offset {offset}: {error}"),
            Error::PastEnd { name, offset } => write!(f, "{name} ends before offset {offset}: it was truncated after it was mapped"),
            Error::LeaseBroken { name, offset } => write!(f, "{name} was opened for writing after it was mapped, and the page at offset {offset} was not in memory; map it again once the writer is done"),
            Error::BudgetExhausted { budget } => write!(f, "the memory budget of {budget} is used up by pages that must stay; unpin some, or raise it with Pool::resize"),
            Error::TooLargeToCopy { name, len, budget } => write!(f, "cannot map {name} without userfaultfd: its {len} bytes would be copied into memory, and the budget of {budget} has no room for them; raise it, or map a file for whose bytes you vouch with map_trusted"),
            Error::Kernel { what, error } => write!(f, "{what}: {error}"),
            Error::HandlerReplaced { handler } => write!(f, "the SIGBUS handler was replaced by the one at {handler:#x}, so misses cannot be served; install that one before the first pool is built"),
            Error::NotFull(backend) => write!(f, "the pool's backend would be {backend}, and all of the engine is required; permit what is missing, or do without require_full"),
            Error::Forked => f.write_str("this pool belongs to the process that forked this one; build a pool of its own in the child"),
            Error::TooManyMaps(it) => write!(f, "there are {it} maps already, which is the most that can live at once; drop some"),
            Error::Recursion { name, offset } => write!(f, "reading {name} at offset {offset} needs the same page of its own map"),
        }
    }
}

impl fmt::Display for LeaseRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LeaseRefusal::OpenForWriting => f.write_str("it is open for writing, here or in another process; close the writer, or vouch for the bytes with map_trusted"),
            LeaseRefusal::NotOwner => f.write_str("only its owner, or a process with CAP_LEASE, may take a lease on it; run as its owner, or vouch for the bytes with map_trusted"),
            LeaseRefusal::FileSystem { file_system } => write!(f, "it lies on {file_system}, where a lease does not keep the bytes from changing (it does on ext4, xfs, btrfs, f2fs and tmpfs); copy it there, or vouch for the bytes with map_trusted"),
            LeaseRefusal::NotRegular { kind } => write!(f, "it is {kind}, and only a regular file can be leased"),
            LeaseRefusal::Kernel(it) => write!(f, "the kernel refuses a lease on it ({it}); vouch for the bytes with map_trusted"),
        }
    }
}

/// A message says all of its immediate cause, so `source` leads on from there: a chain says nothing twice.
impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Error::Read { error, .. } | Error::Kernel { error, .. } => error.source(),
            Error::Lease { reason, .. } => reason.source(),
            _ => None,
        }
    }
}

impl std::error::Error for LeaseRefusal {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            LeaseRefusal::Kernel(error) => error.source(),
            _ => None,
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::error::Error as _;

    #[derive(Debug)]
    struct Outer(io::Error);

    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("the bucket did not answer")
        }
    }

    impl std::error::Error for Outer {
        fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
            Some(&self.0)
        }
    }

    fn chain(e: &dyn std::error::Error) -> Vec<String> {
        let mut all = vec![e.to_string()];
        let mut at = e.source();
        while let Some(cause) = at {
            all.push(cause.to_string());
            at = cause.source();
        }
        all
    }

    #[test]
    fn a_chain_says_nothing_twice_and_loses_nothing() {
        let deepest = io::Error::other("no route to host");
        let e = Error::Read {
            name: "a source".into(),
            offset: 4096,
            error: io::Error::other(Outer(deepest)),
        };
        let whole = "cannot read a source at offset 4096: the bucket did not answer";
        assert_eq!(chain(&e), [whole, "no route to host"]);
        assert_eq!(chain(&io::Error::from(e)), [whole, "no route to host"]);
        let e = Error::Lease {
            name: "f".into(),
            reason: LeaseRefusal::Kernel(io::Error::from_raw_os_error(libc::EAGAIN)),
        };
        assert!(e.source().is_none(), "all of it is said already");
        assert_eq!(e.to_string().matches("os error").count(), 1, "{e}");
    }
}
