//! The handle of a storage, in the process that uses it.

use crate::faults::Faults;
use crate::serve::{FILE, READY, STUCK, UNCACHED};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A storage that runs in a process of its own, until this is dropped.
#[derive(Debug)]
pub struct Storage {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    dir: tempfile::TempDir,
}

impl Storage {
    /// Starts a storage: `server` makes the command that runs [`serve`](crate::serve()) at the mount point that it is given.
    ///
    /// # Errors
    ///
    /// The process cannot be started, or cannot mount.
    pub fn start(server: impl FnOnce(&Path) -> Command) -> io::Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("faultless-storage-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .tempdir()?;
        let mut child = server(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let orders = child.stdin.take();
        let mut answers = BufReader::new(
            child
                .stdout
                .take()
                .ok_or_else(|| io::Error::other("the storage has no output"))?,
        );
        // A test program that serves prints its own lines first.
        let mut line = String::new();
        while !line.trim_end().ends_with(READY) {
            line.clear();
            if answers.read_line(&mut line)? == 0 {
                let _ = child.wait();
                return Err(io::Error::other(
                    "the storage could not be mounted; FUSE wants root, or fusermount3 (package fuse3), and /dev/fuse",
                ));
            }
        }
        Ok(Storage {
            child,
            orders,
            answers,
            dir,
        })
    }

    /// The file.
    pub fn file(&self) -> PathBuf {
        self.dir.path().join(FILE)
    }

    /// The same file, none of whose reads is answered by the page cache.
    pub fn uncached(&self) -> PathBuf {
        self.dir.path().join(UNCACHED)
    }

    /// From now on, reads meet these faults: those that come after this returned do for sure. Of those that wait for
    /// their answer, the stuck ones are let go if they are stuck no more.
    ///
    /// # Errors
    ///
    /// The process has ended.
    pub fn set(&mut self, faults: &Faults) -> io::Result<()> {
        match self.order(&serde_json::to_string(faults)?)? {
            answer if answer == READY => Ok(()),
            answer => Err(io::Error::other(answer)),
        }
    }

    /// How many reads have come that are stuck, and that only [`Storage::set`] lets go. (One that
    /// [`Faults::broken_once`] failed has its answer, and is none of them.)
    ///
    /// # Errors
    ///
    /// The process has ended.
    pub fn stuck(&mut self) -> io::Result<usize> {
        self.order(STUCK)?.parse().map_err(io::Error::other)
    }

    /// Sends a line, and waits for the line that answers it.
    fn order(&mut self, order: &str) -> io::Result<String> {
        let gone = || io::Error::other("the storage has ended");
        let orders = self.orders.as_mut().ok_or_else(gone)?;
        orders.write_all(format!("{order}\n").as_bytes())?;
        orders.flush()?;
        let mut line = String::new();
        match self.answers.read_line(&mut line)? {
            0 => Err(gone()),
            _ => Ok(line.trim_end().to_owned()),
        }
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        // It unmounts when its input ends.
        drop(self.orders.take());
        let _ = self.child.wait();
        // If it died instead, the mount is left behind.
        if let Ok(dir) = std::ffi::CString::new(self.dir.path().as_os_str().as_encoded_bytes()) {
            #[allow(unsafe_code, reason = "umount2 has no wrapper in the standard library")]
            // SAFETY: a NUL-terminated path of a directory of ours; it fails if nothing is mounted there.
            unsafe {
                libc::umount2(dir.as_ptr(), libc::MNT_DETACH)
            };
        }
    }
}
