//! Whether a program can be served: found, of this machine's kind, dynamically linked with glibc, and not privileged.

use faultless_untrusted::input::open;
use faultless_untrusted::printable;
use object::elf;
use object::read::elf::{Dyn, FileHeader, ProgramHeader};
use object::{Endianness, ReadRef};
use std::ffi::{CString, OsStr};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Why a program cannot be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Unservable {
    /// It is nowhere.
    #[error("there is no program {0:?}; give its path, or put its directory into PATH")]
    NotFound(PathBuf),
    /// It cannot be looked at.
    #[error("cannot read the program {}: {error}", printable(path))]
    Unreadable {
        /// The program.
        path: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// It is not executable.
    #[error("{} is not executable; chmod +x it, or name its interpreter", printable(.0))]
    NotExecutable(PathBuf),
    /// Neither ELF nor a script.
    #[error(
        "{} is neither an ELF program nor a script that names its interpreter in a first line with #!; name the interpreter",
        printable(.0)
    )]
    NotAProgram(PathBuf),
    /// For another machine.
    #[error(
        "{} is not a 64-bit program of this machine's architecture, so the library cannot be loaded into it",
        printable(.0)
    )]
    OtherMachine(PathBuf),
    /// No dynamic loader.
    #[error(
        "{} is statically linked, so nothing can be preloaded into it; use a dynamically linked build",
        printable(.0)
    )]
    Static(PathBuf),
    /// Another C library.
    #[error(
        "{} uses the dynamic loader {}, not glibc's, so the library cannot be loaded into it; use a build for glibc",
        printable(path),
        printable(loader)
    )]
    OtherLibc {
        /// The program.
        path: PathBuf,
        /// The loader that it names.
        loader: String,
    },
    /// The loader ignores LD_PRELOAD.
    #[error(
        "{} gains privileges when it starts ({how}), so the dynamic loader ignores preloaded libraries; run it as the user whose privileges it gains, without {how}",
        printable(path)
    )]
    Privileged {
        /// The program.
        path: PathBuf,
        /// `setuid`, `setgid`, or `file capabilities`.
        how: &'static str,
    },
}

/// Finds a program as `execvp` does.
///
/// # Errors
///
/// It is nowhere.
pub fn find(name: &OsStr) -> Result<PathBuf, Unservable> {
    let not_found = || Unservable::NotFound(name.into());
    if name.as_bytes().contains(&b'/') {
        let path = PathBuf::from(name);
        return if path.exists() {
            Ok(path)
        } else {
            Err(not_found())
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|p| p.is_file() && executable(p))
        .ok_or_else(not_found)
}

fn executable(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    #[allow(unsafe_code, reason = "access(2)")]
    // SAFETY: a NUL-terminated path.
    let refused = unsafe { libc::access(path.as_ptr(), libc::X_OK) };
    refused == 0
}

/// How a script names its interpreter, at most.
const HEAD: usize = 256;
/// Interpreters that are scripts themselves.
const SCRIPTS: usize = 4;

/// Checks that a program can be served.
///
/// # Errors
///
/// Why not.
pub fn check(path: &Path) -> Result<(), Unservable> {
    let mut path = path.to_owned();
    for _ in 0..SCRIPTS {
        let unreadable = |error| Unservable::Unreadable {
            path: path.clone(),
            error,
        };
        if !executable(&path) || !path.is_file() {
            return Err(Unservable::NotExecutable(path));
        }
        let mut file = open(&path).map_err(unreadable)?;
        let mut head = Vec::with_capacity(HEAD);
        (&mut file)
            .take(HEAD as u64)
            .read_to_end(&mut head)
            .map_err(unreadable)?;
        match head.strip_prefix(b"#!") {
            Some(line) => {
                let line = line.split(|&b| b == b'\n').next().unwrap_or_default();
                let mut words = line
                    .split(|b| b.is_ascii_whitespace())
                    .filter(|w| !w.is_empty())
                    .map(OsStr::from_bytes);
                let Some(interpreter) = words.next() else {
                    return Err(Unservable::NotAProgram(path));
                };
                // What runs in the end is what `env` finds; unless it is told more than that, by options with values or by
                // assignments: then the program is known when it runs.
                let is_env = Path::new(interpreter).file_name() == Some(OsStr::new("env"));
                let mut words =
                    words.filter(|w| !matches!(w.as_bytes(), b"-S" | b"--split-string"));
                let simple = |w: &&OsStr| !w.as_bytes().contains(&b'=') && w.as_bytes()[0] != b'-';
                path = match words.next().filter(simple) {
                    Some(name) if is_env => find(name)?,
                    _ => PathBuf::from(interpreter),
                };
            }
            None => return check_elf(&path),
        }
    }
    Err(Unservable::NotAProgram(path))
}

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = elf::EM_X86_64;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = elf::EM_AARCH64;

fn check_elf(path: &Path) -> Result<(), Unservable> {
    let path_buf = || path.to_owned();
    let unreadable = |error| Unservable::Unreadable {
        path: path_buf(),
        error,
    };
    privileged(path)
        .map_err(unreadable)?
        .map_or(Ok(()), |how| {
            Err(Unservable::Privileged {
                path: path_buf(),
                how,
            })
        })?;
    let file = open(path).map_err(unreadable)?;
    let data = object::ReadCache::new(file);
    let ident = (&data).read_bytes_at(0, 20).unwrap_or_default();
    if ident.get(..4) != Some(&elf::ELFMAG) {
        return Err(Unservable::NotAProgram(path_buf()));
    }
    let other = |_| Unservable::OtherMachine(path_buf());
    let header = elf::FileHeader64::<Endianness>::parse(&data).map_err(other)?;
    let endian = header.endian().map_err(other)?;
    if header.e_machine(endian) != MACHINE {
        return Err(Unservable::OtherMachine(path_buf()));
    }
    let segments = header.program_headers(endian, &data).map_err(other)?;
    // The dynamic loader itself, which is told the program: it preloads for that one.
    let file_name = path.file_name().unwrap_or_default();
    if file_name.as_bytes().starts_with(b"ld-linux") {
        return Ok(());
    }
    let loader = segments
        .iter()
        .find_map(|s| s.interpreter(endian, &data).ok().flatten());
    let Some(loader) = loader else {
        return Err(Unservable::Static(path_buf()));
    };
    // glibc's is called ld-linux-x86-64.so.2 or ld-linux-aarch64.so.1, whatever the directory.
    let loader = String::from_utf8_lossy(loader).into_owned();
    let name = Path::new(&loader).file_name().unwrap_or_default();
    if !name.as_bytes().starts_with(b"ld-linux") {
        return Err(Unservable::OtherLibc {
            path: path_buf(),
            loader,
        });
    }
    // A program that is dynamic in form alone (static-pie with an interpreter) has no libraries.
    let needs = segments
        .iter()
        .find_map(|s| s.dynamic(endian, &data).ok().flatten())
        .is_some_and(|dynamic| {
            dynamic
                .iter()
                .any(|d| d.tag32(endian) == Some(elf::DT_NEEDED))
        });
    if needs {
        Ok(())
    } else {
        Err(Unservable::Static(path_buf()))
    }
}

/// How a program gains privileges, if it does.
fn privileged(path: &Path) -> io::Result<Option<&'static str>> {
    let st = std::fs::metadata(path)?;
    #[allow(unsafe_code, reason = "geteuid(2), getegid(2)")]
    // SAFETY: no arguments.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    if st.mode() & libc::S_ISUID != 0 && st.uid() != user {
        return Ok(Some("setuid"));
    }
    if st.mode() & libc::S_ISGID != 0 && st.mode() & libc::S_IXGRP != 0 && st.gid() != group {
        return Ok(Some("setgid"));
    }
    let name = CString::new(path.as_os_str().as_bytes())?;
    #[allow(unsafe_code, reason = "getxattr(2)")]
    // SAFETY: two NUL-terminated strings; with a length of 0 nothing is written.
    let capabilities = unsafe {
        libc::getxattr(
            name.as_ptr(),
            c"security.capability".as_ptr(),
            std::ptr::null_mut(),
            0,
        )
    };
    // Root has them all anyway, so that the loader does not see a difference.
    Ok((capabilities > 0 && user != 0).then_some("file capabilities"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn file(dir: &Path, name: &str, bytes: &[u8], mode: u32) -> PathBuf {
        let path = dir.join(name);
        std::fs::write(&path, bytes).expect("a temporary directory");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("chmod");
        path
    }

    #[test]
    fn programs_of_the_distribution_can_be_served_and_scripts_through_their_interpreters() {
        let shell = find(OsStr::new("sh")).expect("every machine has one");
        check(&shell).expect("dynamically linked");
        let dir = tempfile::tempdir().expect("a temporary directory");
        check(&file(dir.path(), "a", b"#!/bin/sh\n", 0o755)).expect("a script");
        check(&file(dir.path(), "b", b"#! /usr/bin/env -S sh -e\n", 0o755)).expect("by env");
    }

    #[test]
    fn what_cannot_be_served_is_told_apart() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let dir = dir.path();
        assert!(matches!(
            find(OsStr::new("no-such-program")),
            Err(Unservable::NotFound(_))
        ));
        assert!(matches!(
            find(OsStr::new("./no/such")),
            Err(Unservable::NotFound(_))
        ));
        let plain = file(dir, "plain", b"hello", 0o755);
        assert!(matches!(check(&plain), Err(Unservable::NotAProgram(_))));
        let closed = file(dir, "closed", b"#!/bin/sh\n", 0o644);
        assert!(matches!(check(&closed), Err(Unservable::NotExecutable(_))));
        let script = file(dir, "s", b"#!/no/such/interpreter\n", 0o755);
        assert!(matches!(check(&script), Err(Unservable::NotExecutable(_))));
        // A 32-bit ELF header, and a 64-bit one for another machine.
        let mut header = vec![0u8; 64];
        header[..6].copy_from_slice(b"\x7fELF\x01\x01");
        assert!(matches!(
            check(&file(dir, "e32", &header, 0o755)),
            Err(Unservable::OtherMachine(_))
        ));
    }

    #[test]
    fn a_program_without_a_loader_is_called_static() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut header = vec![0u8; 64];
        header[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        header[16] = 2; // ET_EXEC
        header[18..20].copy_from_slice(&MACHINE.to_le_bytes());
        header[20] = 1;
        header[52] = 64;
        assert!(matches!(
            check(&file(dir.path(), "static", &header, 0o755)),
            Err(Unservable::Static(_))
        ));
    }
}
