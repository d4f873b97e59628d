//! Files that a user names for reading.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a regular file for reading, without waiting.
///
/// A pipe, a device or a directory is an error: reading one may hang for ever, never end, or do something.
///
/// # Errors
///
/// The system's, and [`io::ErrorKind::InvalidInput`] for what is no regular file.
pub fn open(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    let kind = file.metadata()?.file_type();
    match kind.is_file() {
        true => Ok(file),
        false => Err(irregular(kind)),
    }
}

/// The whole of a file of at most `most` bytes.
///
/// # Errors
///
/// As [`open`]; [`io::ErrorKind::FileTooLarge`] if there is more.
pub fn read(path: &Path, most: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    open(path)?
        .take(most.saturating_add(1))
        .read_to_end(&mut bytes)?;
    if bytes.len() as u64 > most {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it is longer than {} KiB", most.div_ceil(1024)),
        ));
    }
    Ok(bytes)
}

/// The same, as text.
///
/// # Errors
///
/// As [`read`]; [`io::ErrorKind::InvalidData`] if it is not UTF-8.
pub fn text(path: &Path, most: u64) -> io::Result<String> {
    String::from_utf8(read(path, most)?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not text (UTF-8)"))
}

/// A text of the kernel's (in `/proc` or `/sys`), in which names of strangers may be no UTF-8: what is none becomes U+FFFD.
///
/// # Errors
///
/// The system's.
pub fn kernel_text(path: impl AsRef<Path>) -> io::Result<String> {
    let bytes = std::fs::read(path)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

pub(crate) fn irregular(kind: std::fs::FileType) -> io::Error {
    use std::os::unix::fs::FileTypeExt as _;
    let what = match kind {
        k if k.is_dir() => "a directory",
        k if k.is_fifo() => "a pipe",
        k if k.is_socket() => "a socket",
        k if k.is_char_device() || k.is_block_device() => "a device",
        k if k.is_symlink() => "a symbolic link",
        _ => "something else",
    };
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("it is {what}, and must be a regular file"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn a_pipe_a_directory_and_a_device_are_refused_without_waiting() {
        let dir = tempfile::tempdir().expect("a directory");
        let pipe = dir.path().join("pipe");
        let name = CString::new(pipe.as_os_str().as_bytes()).expect("a plain path");
        #[allow(unsafe_code, reason = "mkfifo(3)")]
        // SAFETY: a NUL-terminated path.
        let made = unsafe { libc::mkfifo(name.as_ptr(), 0o600) };
        assert_eq!(made, 0);
        for (path, what) in [
            (pipe.as_path(), "a pipe"),
            (dir.path(), "a directory"),
            (Path::new("/dev/zero"), "a device"),
        ] {
            let error = open(path).expect_err(what);
            assert!(error.to_string().contains(what), "{error}");
            assert!(read(path, 10).is_err() && text(path, 10).is_err());
        }
    }

    #[test]
    fn a_file_is_read_as_far_as_it_may_be_long() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("f");
        std::fs::write(&path, b"0123456789").expect("written");
        assert_eq!(text(&path, 10).expect("short enough"), "0123456789");
        let error = read(&path, 9).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        std::fs::write(&path, b"\xff").expect("written");
        assert!(text(&path, 10).is_err());
    }
}
