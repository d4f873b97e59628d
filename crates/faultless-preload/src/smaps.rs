//! `/proc/self/smaps`: what the kernel itself says of a mapping.

use std::ops::Range;

/// One mapping of the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Vma<'a> {
    pub(crate) range: Range<usize>,
    /// `r--p` and the like.
    pub(crate) access: &'a [u8],
    /// Offset in the file, in bytes.
    pub(crate) offset: u64,
    /// The file system's device, as its major and minor number.
    pub(crate) device: (u32, u32),
    pub(crate) inode: u64,
    /// The file's name, in which a newline is `\012`.
    pub(crate) path: &'a [u8],
    /// Kilobytes that are the process's own copies.
    anonymous: Option<u64>,
    swap: Option<u64>,
    /// Its key, other than 0 where the program has protected it by one.
    key: Option<u64>,
    /// Two letters each (proc(5), `VmFlags`).
    flags: Option<&'a [u8]>,
}

/// What a plain mapping for reading may be flagged with: that it may be read, written and executed after `mprotect`, that it is
/// shared, that its pages are tracked (soft-dirty), that no memory is reserved for it, and how it is read.
const PLAIN: [&[u8]; 10] = [
    b"rd", b"mr", b"mw", b"me", b"ms", b"sh", b"sd", b"nr", b"rr", b"sr",
];
/// And one for writing as well, if it is private, in addition: memory is reserved for its pages.
const WRITABLE: [&[u8]; 2] = [b"wr", b"ac"];

impl<'a> Vma<'a> {
    /// Whether nothing was done to it that a fresh mapping would not have: copies of pages, locks, advice.
    pub(crate) fn plain(&self) -> bool {
        self.anonymous == Some(0)
            && self.swap.unwrap_or(0) == 0
            && self.flags.is_some()
            && self.key.unwrap_or(0) == 0
            && self
                .flags()
                .all(|f| PLAIN.contains(&f) || self.is_writable() && WRITABLE.contains(&f))
    }

    /// Whether it is for reading and writing; otherwise, for reading alone.
    pub(crate) fn is_writable(&self) -> bool {
        self.access.starts_with(b"rw-")
    }

    /// Whether `mprotect` could make it writable for all that share it.
    pub(crate) fn may_be_written(&self) -> bool {
        self.has(b"ms") && self.has(b"mw")
    }

    /// The advice that it was given (`MADV_…`).
    pub(crate) fn advice(&self) -> i32 {
        match () {
            () if self.has(b"rr") => libc::MADV_RANDOM,
            () if self.has(b"sr") => libc::MADV_SEQUENTIAL,
            () => libc::MADV_NORMAL,
        }
    }

    fn has(&self, flag: &[u8]) -> bool {
        self.flags().any(|f| f == flag)
    }

    fn flags(&self) -> impl Iterator<Item = &'a [u8]> {
        let all = self.flags.unwrap_or_default();
        all.split(|b| *b == b' ').filter(|f| !f.is_empty())
    }
}

/// The mappings of files for reading, or for reading and writing.
pub(crate) fn files(text: &[u8]) -> Vec<Vma<'_>> {
    let mut found: Vec<Vma<'_>> = Vec::new();
    let mut here = false;
    for line in text.split(|b| *b == b'\n') {
        if let Some((name, value)) = field(line) {
            if let Some(vma) = found.last_mut().filter(|_| here) {
                match name {
                    b"Anonymous" => vma.anonymous = kilobytes(value),
                    b"Swap" => vma.swap = kilobytes(value),
                    b"ProtectionKey" => vma.key = number(value),
                    b"VmFlags" => vma.flags = Some(value),
                    _ => {}
                }
            }
        } else if let Some(vma) = first_line(line) {
            let data = vma.access.starts_with(b"r--") || vma.is_writable();
            here = vma.inode != 0 && data;
            found.extend(here.then_some(vma));
        }
    }
    found
}

/// The mapping that contains a whole range.
pub(crate) fn containing<'a>(all: &[Vma<'a>], range: &Range<usize>) -> Option<Vma<'a>> {
    let contains = |vma: &&Vma<'_>| vma.range.start <= range.start && range.end <= vma.range.end;
    all.iter().find(contains).cloned()
}

/// `55d0a8c00000-55d0a8c01000 r--p 00000000 fe:00 1234      /path`
fn first_line(line: &[u8]) -> Option<Vma<'_>> {
    let mut rest = line;
    let [range, access, offset, device, inode] = [(); 5].map(|()| word(&mut rest));
    let (start, end) = pair(range?, b'-')?;
    let (major, minor) = pair(device?, b':')?;
    let inode = std::str::from_utf8(inode?).ok()?.parse().ok()?;
    Some(Vma {
        range: usize::try_from(start).ok()?..usize::try_from(end).ok()?,
        access: access?,
        offset: hex(offset?)?,
        device: (u32::try_from(major).ok()?, u32::try_from(minor).ok()?),
        inode,
        path: rest.trim_ascii_start(),
        anonymous: None,
        swap: None,
        key: None,
        flags: None,
    })
}

/// `Name:   value`, which no first line is.
fn field(line: &[u8]) -> Option<(&[u8], &[u8])> {
    let colon = line.iter().position(|b| *b == b':')?;
    let (name, value) = line.split_at(colon);
    (name.first()?.is_ascii_uppercase() && !name.contains(&b' '))
        .then(|| (name, value[1..].trim_ascii()))
}

fn kilobytes(value: &[u8]) -> Option<u64> {
    number(value.strip_suffix(b" kB")?)
}

fn number(value: &[u8]) -> Option<u64> {
    std::str::from_utf8(value).ok()?.trim().parse().ok()
}

/// The next word, and the space behind it.
fn word<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = rest.iter().position(|b| *b == b' ').unwrap_or(rest.len());
    let (word, left) = rest.split_at(end);
    *rest = left.get(1..).unwrap_or_default();
    (!word.is_empty()).then_some(word)
}

fn pair(text: &[u8], between: u8) -> Option<(u64, u64)> {
    let at = text.iter().position(|b| *b == between)?;
    Some((hex(&text[..at])?, hex(&text[at + 1..])?))
}

fn hex(text: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(text).ok()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"55d0a8c00000-55d0a8c02000 r-xp 00001000 fe:01 99                         /usr/bin/a:b\n\
Size:                  8 kB\nAnonymous:             8 kB\nVmFlags: rd ex mr mw me sd \n\
7f0000000000-7f0002000000 r--s 00200000 08:11 1234                       /data/a file\\012x\n\
Size:              32768 kB\nAnonymous:             0 kB\nSwap:                  0 kB\nVmFlags: rd mr me ms rr \n\
7f0002000000-7f0004000000 r--p 00000000 08:11 1235                       /data/b\n\
Anonymous:             4 kB\nSwap:                  0 kB\nVmFlags: rd mr mw me \n\
7f0004000000-7f0005000000 r--p 00000000 08:11 1235                       /data/b\n\
Anonymous:             0 kB\nVmFlags: rd mr mw me lo \n\
7f0006000000-7f0007000000 rw-p 00000000 00:00 0 \nAnonymous:             0 kB\nVmFlags: rd wr mr mw me ac \n\
7f0008000000-7f0009000000 r--s 00000000 08:11 7 /data/c\nAnonymous: 0 kB\nVmFlags: rd sh mr mw me ms \n\
7f0009000000-7f000a000000 r--p 00000000 08:11 7 /data/c\nAnonymous: 0 kB\nProtectionKey:         3\nVmFlags: rd mr mw me \n\
7f000a000000-7f000b000000 rw-s 00000000 08:11 8 /data/d\nAnonymous: 0 kB\nVmFlags: rd wr sh mr mw me ms sd \n\
7f000b000000-7f000c000000 rw-p 00000000 08:11 8 /data/d\nAnonymous: 0 kB\nVmFlags: rd wr mr mw me ac sd \n\
7f000c000000-7f000d000000 rw-p 00000000 08:11 8 /data/d\nAnonymous: 4 kB\nVmFlags: rd wr mr mw me ac sd \n\
7f000d000000-7f000e000000 r--p 00000000 08:11 8 /data/d\nAnonymous: 0 kB\nVmFlags: rd mr mw me ac sd \n";

    fn at(text: &[u8], range: Range<usize>) -> Option<Vma<'_>> {
        containing(&files(text), &range)
    }

    #[test]
    fn the_mapping_that_contains_a_range_is_found_with_all_that_is_said_of_it() {
        let vma = at(TEXT, 0x7f00_0000_1000..0x7f00_0100_0000).expect("there");
        assert_eq!(vma.range, 0x7f00_0000_0000..0x7f00_0200_0000);
        assert_eq!((vma.offset, vma.inode), (0x20_0000, 1234));
        assert_eq!(vma.device, (8, 0x11));
        assert_eq!(vma.path, b"/data/a file\\012x");
        assert_eq!(vma.advice(), libc::MADV_RANDOM);
        assert!(vma.plain());
    }

    #[test]
    fn what_was_written_to_locked_or_is_otherwise_more_than_a_plain_mapping_is_not_plain() {
        for (start, why) in [
            (0x7f00_0200_0000, "a copied page"),
            (0x7f00_0400_0000, "locked"),
            (0x7f00_0900_0000, "protected by a key"),
            (0x7f00_0c00_0000, "written to"),
            (0x7f00_0d00_0000, "writable before"),
        ] {
            let vma = at(TEXT, start..start + 4096).expect(why);
            assert!(!vma.plain(), "{why}");
        }
        let shared = at(TEXT, 0x7f00_0800_0000..0x7f00_0800_1000).expect("there");
        assert!(shared.plain() && shared.may_be_written() && !shared.is_writable());
        for start in [0x7f00_0a00_0000, 0x7f00_0b00_0000] {
            let writable = at(TEXT, start..start + 4096).expect("there");
            assert!(writable.plain() && writable.is_writable());
        }
        for (start, why) in [(0x55d0_a8c0_0000, "code"), (0x7f00_0600_0000, "memory")] {
            assert_eq!(at(TEXT, start..start + 4096), None, "{why}");
        }
    }

    #[test]
    fn a_range_that_no_one_mapping_contains_is_none() {
        assert_eq!(at(TEXT, 0x7f00_01ff_f000..0x7f00_0200_1000), None);
        assert_eq!(at(TEXT, 0x1000..0x2000), None);
        assert_eq!(at(b"", 0x1000..0x2000), None);
        assert_eq!(at(b"7f-\nVmFlags\n:\n", 0x1000..0x2000), None);
    }

    #[test]
    fn a_text_that_lacks_what_is_needed_makes_nothing_plain() {
        let text = b"1000-3000 r--p 00000000 08:11 1 /a\nSize: 8 kB\n";
        assert!(!at(text, 0x1000..0x2000).expect("there").plain());
    }

    #[test]
    fn the_kernels_own_text_is_understood() {
        let text = std::fs::read("/proc/self/smaps").expect("readable");
        let all = files(&text);
        // The C library has constants, in a mapping of their own.
        assert!(
            all.iter()
                .any(|v| v.path.ends_with(b".so.6") && v.flags.is_some() && v.anonymous.is_some())
        );
    }

    #[test]
    fn no_text_is_too_much() {
        faultless_untrusted::fuzz::run("smaps", &[TEXT.to_vec()], |bytes, _| {
            for vma in files(bytes) {
                let _ = (vma.plain(), vma.advice());
                let _ = containing(std::slice::from_ref(&vma), &vma.range);
            }
        });
    }
}
