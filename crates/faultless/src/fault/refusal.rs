//! Why a unit could not be filled.

use crate::base::error::Error;
use crate::base::size::ByteSize;
use std::{fmt, io};

/// Why a unit could not be filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The source failed with this error number.
    Read(i32),
    /// A user's source returned an error without a number, or panicked.
    Source,
    /// The source ends before this page.
    PastEnd,
    /// The lease was broken, and this page is not in memory.
    LeaseBroken,
    /// Everything that the budget allows is pinned or kept.
    Budget,
    /// The kernel refused to install the page, with this error number.
    Install(i32),
    /// This is a forked child of the process that made the map.
    Forked,
    /// The fill of this page depends on itself.
    Recursion,
}

impl Refusal {
    /// As a number, to be passed through an atomic.
    pub(crate) fn encode(self) -> u32 {
        match self {
            Refusal::Read(e) => 0x1_0000 | (e as u32 & 0xFFFF),
            Refusal::Source => 0x2_0000,
            Refusal::PastEnd => 0x3_0000,
            Refusal::LeaseBroken => 0x4_0000,
            Refusal::Budget => 0x5_0000,
            Refusal::Install(e) => 0x6_0000 | (e as u32 & 0xFFFF),
            Refusal::Forked => 0x7_0000,
            Refusal::Recursion => 0x8_0000,
        }
    }

    pub(crate) fn decode(code: u32) -> Refusal {
        let number = (code & 0xFFFF) as i32;
        match code >> 16 {
            1 => Refusal::Read(number),
            3 => Refusal::PastEnd,
            4 => Refusal::LeaseBroken,
            5 => Refusal::Budget,
            6 => Refusal::Install(number),
            7 => Refusal::Forked,
            8 => Refusal::Recursion,
            _ => Refusal::Source,
        }
    }
}

/// Names of the errors that storage returns. `strerror` is not safe in a signal handler.
fn errno_name(e: i32) -> &'static str {
    match e {
        libc::EIO => "EIO, input/output error",
        libc::EBADF => "EBADF, the descriptor was closed",
        libc::EINVAL => "EINVAL, invalid argument",
        libc::ENOMEM => "ENOMEM, out of memory",
        libc::ENODEV => "ENODEV, no such device",
        libc::ENXIO => "ENXIO, no such device or address",
        libc::ESTALE => "ESTALE, stale file handle",
        libc::ENOTCONN => "ENOTCONN, not connected",
        libc::ETIMEDOUT => "ETIMEDOUT, timed out",
        libc::ENODATA => "ENODATA, medium error",
        libc::EREMOTEIO => "EREMOTEIO, remote I/O error",
        libc::EAGAIN => "EAGAIN, try again",
        libc::EACCES => "EACCES, permission denied",
        libc::EPERM => "EPERM, not permitted",
        libc::EISDIR => "EISDIR, is a directory",
        libc::EFAULT => "EFAULT, bad address",
        libc::ENOENT => "ENOENT, the range is no longer mapped",
        libc::EBUSY => "EBUSY, busy",
        libc::ENOSPC => "ENOSPC, no space",
        _ => "see errno(3)",
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Read(e) => write!(f, "read failed: error {e} ({})", errno_name(*e)),
            Refusal::Source => f.write_str("the source failed"),
            Refusal::PastEnd => f.write_str("the source ends before this page"),
            Refusal::LeaseBroken => f.write_str(
                "the file was opened for writing after it was mapped, and this page was not in memory; map a file that nobody writes, or vouch for it with map_trusted",
            ),
            Refusal::Budget => f.write_str("the memory budget is used up by pinned pages; unpin some or raise it"),
            Refusal::Install(e) => write!(f, "the page could not be installed: error {e} ({})", errno_name(*e)),
            Refusal::Forked => {
                f.write_str("maps do not survive fork; open the file again in the child, or use exec")
            }
            Refusal::Recursion => f.write_str("a source reads this map, or another user's source in the same pool, to be read itself; give the inner map a pool of its own"),
        }
    }
}

impl Refusal {
    /// What a failed fill of the page at `offset` means for the thread that asked for it.
    pub(crate) fn into_error(self, name: &str, offset: u64, budget: ByteSize) -> Error {
        let name = name.to_owned();
        match self {
            Refusal::Read(e) => Error::Read {
                name,
                offset,
                error: io::Error::from_raw_os_error(e),
            },
            Refusal::Source => Error::Read {
                name,
                offset,
                error: io::Error::other("the source failed"),
            },
            Refusal::PastEnd => Error::PastEnd { name, offset },
            Refusal::LeaseBroken => Error::LeaseBroken { name, offset },
            Refusal::Budget => Error::BudgetExhausted { budget },
            Refusal::Install(e) => Error::kernel(
                format!("cannot install the page of {name} at offset {offset}"),
                io::Error::from_raw_os_error(e),
            ),
            Refusal::Forked => Error::Forked,
            Refusal::Recursion => Error::Recursion { name, offset },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_survive_their_encoding() {
        for f in [
            Refusal::Read(libc::EIO),
            Refusal::Source,
            Refusal::PastEnd,
            Refusal::LeaseBroken,
            Refusal::Budget,
            Refusal::Install(libc::ENOMEM),
            Refusal::Forked,
            Refusal::Recursion,
        ] {
            assert_eq!(Refusal::decode(f.encode()), f);
            assert_ne!(f.encode(), 0);
        }
    }
}
