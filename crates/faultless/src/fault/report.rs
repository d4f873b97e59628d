//! The one line on stderr that a fault which cannot be served leaves behind.

use crate::base::ids::FileAt;
use crate::fault::refusal::Refusal;
use crate::space::map_core::MapCore;
use faultless_sys::raw;
use faultless_untrusted::printable;
use std::fmt;
use std::fmt::Write;

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
pub(crate) fn print(core: &MapCore, offset: FileAt, why: Refusal) {
    let mut line = Line {
        bytes: [0; 1024],
        len: 0,
    };
    // The end of a long name tells more than its beginning, and the reason has to find room.
    let name = core.name.as_bytes();
    let short = &name[name.len().saturating_sub(NAME_MAX)..];
    let cut = if short.len() < name.len() { "…" } else { "" };
    let name = printable(short);
    let offset = offset.get();
    let _ = write!(line, "faultless: {cut}{name}, offset {offset}: {why}");
    line.bytes[line.len] = b'\n';
    raw::write_stderr(&line.bytes[..=line.len]);
}

#[cfg(test)]
mod tests {
    use super::*;

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
