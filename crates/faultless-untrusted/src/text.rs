//! Bytes of strangers, made fit for a terminal.

use std::ffi::{OsStr, OsString};
use std::fmt::{self, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Text that is shown without what could act on a terminal or forge lines: each control character, each character that
/// has no width or turns the direction of writing, and each part that is not UTF-8 is shown as U+FFFD.
///
/// It asks for no memory, so that a signal handler can use it.
#[derive(Clone, Copy)]
pub struct Printable<'a> {
    bytes: &'a [u8],
    lines: bool,
}

/// Text, or the name of a file, for a terminal.
///
/// ```
/// use faultless_untrusted::printable;
///
/// assert_eq!(printable("a\x1b[2J\nb").to_string(), "a\u{fffd}[2J\u{fffd}b");
/// assert_eq!(printable("Grüße").to_string(), "Grüße");
/// assert_eq!(printable(&b"\xffx"[..]).to_string(), "\u{fffd}x");
/// ```
pub fn printable<T: Bytes + ?Sized>(text: &T) -> Printable<'_> {
    Printable {
        bytes: text.bytes(),
        lines: false,
    }
}

impl Printable<'_> {
    /// Leaves the ends of lines: for a message of our own that has several.
    pub fn lines(self) -> Self {
        Printable {
            lines: true,
            ..self
        }
    }
}

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.bytes.utf8_chunks() {
            for c in chunk.valid().chars() {
                let shown = !acts(c) || (self.lines && c == '\n');
                f.write_char(if shown {
                    c
                } else {
                    char::REPLACEMENT_CHARACTER
                })?;
            }
            if !chunk.invalid().is_empty() {
                f.write_char(char::REPLACEMENT_CHARACTER)?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// JSON in which such characters are written by their numbers. (In JSON they stand in strings alone, but for the ends of lines,
/// which stay.)
///
/// ```
/// assert_eq!(faultless_untrusted::json("{\n\"a\u{9b}\": 1 }"), "{\n\"a\\u009b\": 1 }");
/// ```
pub fn json(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if !acts(c) || c == '\n' {
            out.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            let _ = write!(out, "\\u{unit:04x}");
        }
    }
    out
}

/// Whether a character does something other than to appear.
fn acts(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}'
            | '\u{61c}'
            | '\u{180e}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

/// A type whose bytes are meant as text.
pub trait Bytes {
    /// The bytes.
    fn bytes(&self) -> &[u8];
}

macro_rules! bytes {
    ($($type:ty: $self:ident => $bytes:expr;)*) => { $(
        impl Bytes for $type {
            fn bytes(&self) -> &[u8] {
                let $self = self;
                $bytes
            }
        }
    )* };
}
bytes! {
    str: s => s.as_bytes();
    String: s => s.as_bytes();
    [u8]: s => s;
    Vec<u8>: s => s;
    OsStr: s => s.as_bytes();
    OsString: s => OsStrExt::as_bytes(s.as_os_str());
    Path: s => s.as_os_str().as_bytes();
    PathBuf: s => s.as_os_str().as_bytes();
}

impl<T: Bytes + ?Sized> Bytes for &T {
    fn bytes(&self) -> &[u8] {
        T::bytes(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_acts_on_a_terminal_is_replaced_and_all_else_is_not() {
        for c in [
            '\0',
            '\x07',
            '\x08',
            '\n',
            '\r',
            '\x1b',
            '\x7f',
            '\u{9b}',
            '\u{202e}',
            '\u{2066}',
            '\u{200b}',
            '\u{2028}',
            '\u{feff}',
            '\u{e0041}',
        ] {
            assert_eq!(
                printable(&format!("a{c}b")).to_string(),
                "a\u{fffd}b",
                "{c:?}"
            );
        }
        for text in ["plain", "Grüße, 世界", "a b\u{a0}c", "“–”", "🦀"] {
            assert_eq!(printable(text).to_string(), text);
        }
    }

    #[test]
    fn what_is_not_text_is_marked_once_for_each_part() {
        assert_eq!(
            printable(&b"a\xf0\x9f\xff\xfeb"[..]).to_string(),
            "a\u{fffd}\u{fffd}\u{fffd}b"
        );
        let path = Path::new(OsStr::from_bytes(b"/d/\xff"));
        assert_eq!(printable(path).to_string(), "/d/\u{fffd}");
    }

    #[test]
    fn ends_of_lines_stay_where_they_are_ours() {
        assert_eq!(printable("a\n\x1bb").lines().to_string(), "a\n\u{fffd}b");
    }
}
