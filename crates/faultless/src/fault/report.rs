//! Why a fill failed, and the one line on stderr that a fault which cannot be served leaves behind.

use super::core::MapCore;
use faultless_sys::raw;
use faultless_untrusted::printable;
use std::fmt::{self, Write};

/// Why a unit could not be filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
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

impl Fault {
    /// As a number, to be passed through an atomic.
    pub(crate) fn encode(self) -> u32 {
        match self {
            Fault::Read(e) => 0x1_0000 | (e as u32 & 0xFFFF),
            Fault::Source => 0x2_0000,
            Fault::PastEnd => 0x3_0000,
            Fault::LeaseBroken => 0x4_0000,
            Fault::Budget => 0x5_0000,
            Fault::Install(e) => 0x6_0000 | (e as u32 & 0xFFFF),
            Fault::Forked => 0x7_0000,
            Fault::Recursion => 0x8_0000,
        }
    }

    pub(crate) fn decode(code: u32) -> Fault {
        let number = (code & 0xFFFF) as i32;
        match code >> 16 {
            1 => Fault::Read(number),
            3 => Fault::PastEnd,
            4 => Fault::LeaseBroken,
            5 => Fault::Budget,
            6 => Fault::Install(number),
            7 => Fault::Forked,
            8 => Fault::Recursion,
            _ => Fault::Source,
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

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Read(e) => write!(f, "read failed: error {e} ({})", errno_name(*e)),
            Fault::Source => f.write_str("the source failed"),
            Fault::PastEnd => f.write_str("the source ends before this page"),
            Fault::LeaseBroken => f.write_str(
                "the file was opened for writing after it was mapped, and this page was not in memory; map a file that nobody writes, or vouch for it with map_trusted",
            ),
            Fault::Budget => f.write_str("the memory budget is used up by pinned pages; unpin some or raise it"),
            Fault::Install(e) => write!(f, "the page could not be installed: error {e} ({})", errno_name(*e)),
            Fault::Forked => {
                f.write_str("maps do not survive fork; open the file again in the child, or use exec")
            }
            Fault::Recursion => f.write_str("a source reads this map, or another user's source in the same pool, to be read itself; give the inner map a pool of its own"),
        }
    }
}

/// Most bytes of a name that are told.
const NAME_MAX: usize = 160;

/// A line being composed, on the stack.
struct Line {
    bytes: [u8; 1024],
    len: usize,
}

impl Write for Line {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let n = s.len().min(self.bytes.len() - 1 - self.len);
        self.bytes[self.len..self.len + n].copy_from_slice(&s.as_bytes()[..n]);
        self.len += n;
        Ok(())
    }
}

/// Writes `faultless: NAME, offset N: WHY` to stderr. May be called in a signal handler: formatting of strings and
/// integers neither allocates nor locks.
pub(crate) fn print(core: &MapCore, offset: u64, why: Fault) {
    let mut line = Line {
        bytes: [0; 1024],
        len: 0,
    };
    // The end of a long name tells more than its beginning, and the reason has to find room.
    let name = core.name.as_bytes();
    let short = &name[name.len().saturating_sub(NAME_MAX)..];
    let cut = if short.len() < name.len() { "…" } else { "" };
    let name = printable(short);
    let _ = write!(line, "faultless: {cut}{name}, offset {offset}: {why}");
    line.bytes[line.len] = b'\n';
    raw::write_stderr(&line.bytes[..=line.len]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_survive_their_encoding() {
        for f in [
            Fault::Read(libc::EIO),
            Fault::Source,
            Fault::PastEnd,
            Fault::LeaseBroken,
            Fault::Budget,
            Fault::Install(libc::ENOMEM),
            Fault::Forked,
            Fault::Recursion,
        ] {
            assert_eq!(Fault::decode(f.encode()), f);
            assert_ne!(f.encode(), 0);
        }
    }

    #[test]
    fn a_line_that_is_too_long_is_cut() {
        let mut line = Line {
            bytes: [0; 1024],
            len: 0,
        };
        for _ in 0..200 {
            let _ = line.write_str("0123456789");
        }
        assert_eq!(line.len, 1023);
    }
}
