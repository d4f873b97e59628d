//! Whether the library may be preloaded into a program that is about to be executed, decided without memory of the heap.
//!
//! `execve` is called between `fork` and the end of the child, in children of `vfork`, and by programs whose allocator is
//! locked at that moment. So this file reads the program's headers with plain system calls into the stack, and gives up as
//! soon as it meets anything that it does not expect: a program that is not understood runs without the library.

#![allow(unsafe_code, reason = "reads headers into structures of bytes")]

use faultless_sys::file;
use std::ffi::CStr;

/// What preloading the library would do to a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fitness {
    /// A dynamically linked program of this machine, for glibc, or a script whose interpreter is one.
    Fit,
    /// It contains a sanitizer's runtime, which has to come before every other library and which checks memory that the
    /// engine shares with the program.
    Sanitized,
    /// The library would be refused, ignored or in the way: another C library, another machine, no dynamic loader, or a file
    /// that cannot be read.
    Unfit,
}

/// Interpreters that may themselves be scripts; the kernel follows as many.
const SCRIPTS_MAX: usize = 4;
/// Bytes of a script's first line that the kernel looks at.
const HEAD: usize = 256;
/// Program headers that are looked at.
const SEGMENTS_MAX: u16 = 64;
/// Bytes of the table of names that are searched for a sanitizer.
const NAMES_MAX: u64 = 8 << 20;

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;

/// Names by which the dynamic symbols of a program give a sanitizer away, linked as a library or into the program.
const SANITIZERS: [&[u8]; 5] = [
    b"__asan_init",
    b"__tsan_init",
    b"__hwasan_init",
    b"__msan_init",
    b"liblsan.so",
];

/// Looks at the program at `path`, following the interpreters of scripts.
pub fn inspect(path: &CStr) -> Fitness {
    let mut name = [0u8; HEAD];
    let mut found = open_and_look(path, &mut name);
    for _ in 0..SCRIPTS_MAX {
        match found {
            Found::Program(fitness) => return fitness,
            Found::Script => {
                let next = name;
                let Ok(next) = CStr::from_bytes_until_nul(&next) else {
                    return Fitness::Unfit;
                };
                found = open_and_look(next, &mut name);
            }
        }
    }
    Fitness::Unfit
}

/// Looks at the program that is open as `fd`. A script counts as [`Fitness::Unfit`]: its interpreter opens it by another name.
pub fn inspect_open(fd: i32) -> Fitness {
    match look(fd, &mut [0; HEAD]) {
        Found::Program(fitness) => fitness,
        Found::Script => Fitness::Unfit,
    }
}

enum Found {
    Program(Fitness),
    /// A script, whose interpreter's path was written to the caller's array, with a zero behind it.
    Script,
}

fn open_and_look(path: &CStr, name: &mut [u8; HEAD]) -> Found {
    let flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NONBLOCK | libc::O_NOCTTY;
    let Ok(fd) = file::open(path, flags) else {
        return Found::Program(Fitness::Unfit);
    };
    let found = look(fd, name);
    // SAFETY: opened above, and used by nobody else.
    unsafe { file::close(fd) };
    found
}

fn look(fd: i32, name: &mut [u8; HEAD]) -> Found {
    let regular = file::status(fd).is_ok_and(|st| st.mode & libc::S_IFMT == libc::S_IFREG);
    let mut head = [0; HEAD];
    let got = read_at(fd, 0, &mut head).filter(|_| regular).unwrap_or(0);
    let head = &head[..got];
    match head.strip_prefix(b"#!") {
        None => Found::Program(elf(fd, head).unwrap_or(Fitness::Unfit)),
        Some(line) => match interpreter(line, name) {
            Some(()) => Found::Script,
            None => Found::Program(Fitness::Unfit),
        },
    }
}

/// Copies the interpreter's path out of a script's first line.
fn interpreter(line: &[u8], name: &mut [u8; HEAD]) -> Option<()> {
    let blank = |b: &u8| matches!(b, b' ' | b'\t');
    let from = line.iter().position(|b| !blank(b))?;
    let rest = &line[from..];
    let len = rest
        .iter()
        .position(|b| blank(b) || matches!(b, b'\n' | b'\r' | 0))?;
    if len == 0 {
        return None;
    }
    name.fill(0);
    name[..len].copy_from_slice(&rest[..len]);
    Some(())
}

/// Reads what there is at an offset of a file.
fn read_at(fd: i32, offset: u64, into: &mut [u8]) -> Option<usize> {
    // SAFETY: the buffer is writable for its length.
    unsafe { file::pread(fd, into.as_mut_ptr() as usize, into.len(), offset) }.ok()
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// A program header: what it is about, and where it lies in the file and in memory.
#[derive(Clone, Copy)]
struct Segment {
    kind: u32,
    offset: u64,
    addr: u64,
    len: u64,
}

const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;

/// The `index`th program header.
fn segment(fd: i32, table: u64, index: u16) -> Option<Segment> {
    /// `sizeof(Elf64_Phdr)`.
    const SIZE: usize = 56;
    let mut raw = [0; SIZE];
    let at = table.checked_add(u64::from(index) * SIZE as u64)?;
    (read_at(fd, at, &mut raw)? == SIZE).then_some(())?;
    Some(Segment {
        kind: u32_at(&raw, 0)?,
        offset: u64_at(&raw, 8)?,
        addr: u64_at(&raw, 16)?,
        len: u64_at(&raw, 32)?,
    })
}

/// Judges an ELF file by its headers (`elf(5)`). `None` where they make no sense.
fn elf(fd: i32, head: &[u8]) -> Option<Fitness> {
    let ours = head.starts_with(b"\x7fELF\x02\x01") && u16_at(head, 18)? == MACHINE;
    let (table, count) = (u64_at(head, 32)?, u16_at(head, 56)?);
    if !ours || u16_at(head, 54)? != 56 || count > SEGMENTS_MAX {
        return Some(Fitness::Unfit);
    }
    let all = || (0..count).filter_map(|i| segment(fd, table, i));
    let interpreter = all().find(|s| s.kind == PT_INTERP);
    let dynamic = all().find(|s| s.kind == PT_DYNAMIC);
    let (Some(interpreter), Some(dynamic)) = (interpreter, dynamic) else {
        return Some(Fitness::Unfit);
    };
    let mut loader = [0; HEAD];
    let got = read_at(fd, interpreter.offset, &mut loader)?.min(interpreter.len as usize);
    let loader = loader[..got].split(|&b| b == 0).next()?;
    // glibc's is called ld-linux-x86-64.so.2 or ld-linux-aarch64.so.1, whatever the directory.
    if !loader
        .rsplit(|&b| b == b'/')
        .next()?
        .starts_with(b"ld-linux")
    {
        return Some(Fitness::Unfit);
    }
    let (addr, len) = names(fd, dynamic)?;
    let offset = all()
        .find(|s| s.kind == PT_LOAD && (s.addr..s.addr.saturating_add(s.len)).contains(&addr))
        .and_then(|s| s.offset.checked_add(addr - s.addr))?;
    Some(if sanitized(fd, offset, len.min(NAMES_MAX))? {
        Fitness::Sanitized
    } else {
        Fitness::Fit
    })
}

/// Address and length of the table of dynamic names.
fn names(fd: i32, dynamic: Segment) -> Option<(u64, u64)> {
    const DT_NULL: u64 = 0;
    const DT_STRTAB: u64 = 5;
    const DT_STRSZ: u64 = 10;
    let (mut addr, mut len) = (None, None);
    /// Bytes of a table that are looked at: what is longer was made to be long.
    const MOST: u64 = 64 << 10;
    let mut entries = [0; 64 * 16];
    for at in (0..dynamic.len.min(MOST)).step_by(entries.len()) {
        let got = read_at(fd, dynamic.offset.checked_add(at)?, &mut entries)?;
        if got == 0 {
            break;
        }
        for entry in entries[..got].chunks_exact(16) {
            match u64_at(entry, 0)? {
                DT_NULL => return Some((addr?, len?)),
                DT_STRTAB => addr = u64_at(entry, 8),
                DT_STRSZ => len = u64_at(entry, 8),
                _ => {}
            }
        }
    }
    Some((addr?, len?))
}

/// Whether a table of names has one of a sanitizer's.
fn sanitized(fd: i32, offset: u64, len: u64) -> Option<bool> {
    /// Longer than any of the names, so that none is missed where two parts meet.
    const OVERLAP: u64 = 16;
    let mut part = [0; 4096];
    for at in (0..len).step_by(part.len() - OVERLAP as usize) {
        let got = read_at(fd, offset.checked_add(at)?, &mut part)?.min((len - at) as usize);
        if got == 0 {
            break;
        }
        let found = SANITIZERS
            .iter()
            .any(|name| part[..got].windows(name.len()).any(|w| w == *name));
        if found {
            return Some(true);
        }
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;
    use std::path::{Path, PathBuf};

    fn of(path: &Path) -> Fitness {
        inspect(&CString::new(path.as_os_str().as_bytes()).expect("no zero in it"))
    }

    fn compiled(dir: &Path, name: &str, flags: &[&str]) -> PathBuf {
        let source = dir.join("main.c");
        std::fs::write(&source, "int main(void) { return 0; }").expect("a temporary directory");
        let program = dir.join(name);
        let status = std::process::Command::new("cc")
            .args(flags)
            .arg("-o")
            .arg(&program)
            .arg(&source)
            .status()
            .expect("a C compiler");
        assert!(status.success(), "cc {flags:?}");
        program
    }

    #[test]
    fn programs_of_the_distribution_are_fit_and_so_are_their_scripts() {
        assert_eq!(of(Path::new("/bin/sh")), Fitness::Fit);
        let dir = tempfile::tempdir().expect("a temporary directory");
        let script = dir.path().join("script");
        std::fs::write(&script, "#! /bin/sh -e\ntrue\n").expect("writable");
        assert_eq!(of(&script), Fitness::Fit);
    }

    #[test]
    fn static_programs_files_that_are_none_and_loops_of_scripts_are_unfit() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        assert_eq!(
            of(&compiled(dir.path(), "static", &["-static"])),
            Fitness::Unfit
        );
        assert_eq!(of(dir.path()), Fitness::Unfit);
        assert_eq!(of(Path::new("/no/such/program")), Fitness::Unfit);
        let looped = dir.path().join("looped");
        std::fs::write(&looped, format!("#!{}\n", looped.display())).expect("writable");
        assert_eq!(of(&looped), Fitness::Unfit);
        std::fs::write(&looped, "#!").expect("writable");
        assert_eq!(of(&looped), Fitness::Unfit);
        std::fs::write(&looped, b"\x7fELF\x02\x01").expect("writable");
        assert_eq!(of(&looped), Fitness::Unfit);
    }

    #[test]
    fn a_sanitizer_is_found_in_a_program() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for kind in ["address", "thread"] {
            let flag = format!("-fsanitize={kind}");
            assert_eq!(
                of(&compiled(dir.path(), kind, &[&flag])),
                Fitness::Sanitized,
                "{kind}"
            );
        }
    }

    #[test]
    fn headers_cut_short_anywhere_are_refused_and_nothing_panics() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let whole = std::fs::read("/bin/true").expect("every machine has it");
        let cut = dir.path().join("cut");
        for len in (0..2048).step_by(13) {
            std::fs::write(&cut, &whole[..len.min(whole.len())]).expect("writable");
            assert_eq!(of(&cut), Fitness::Unfit, "{len}");
        }
    }
}
