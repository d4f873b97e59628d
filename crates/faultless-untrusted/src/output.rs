//! Files that a user names for writing.
//!
//! A new file is written beside the place under a name that nobody can guess, and gets its own name when it is complete. A link at
//! the end of a path is followed only if it is this user's or root's: in a directory that all may write to, a stranger's link would
//! choose the file that root overwrites. (The kernel's `protected_symlinks` is that rule, where it is switched on.)

use crate::input::irregular;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Who may read a new file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readers {
    /// Those who may read the file that it replaces; otherwise those whom the user's `umask` lets.
    AsUsual,
    /// This user alone: it holds addresses, or names of another user's files.
    Owner,
}

/// What becomes of a file that could not be completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// It is removed.
    IfWhole,
    /// A part is of use as well: it stays, under the name that the error tells.
    InPart,
}

/// A file that has its name only when it is complete.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    /// None: it is written in its place.
    partial: Option<PathBuf>,
    /// What becomes of it if it cannot be completed.
    pub kept: Kept,
}

/// What is written to.
pub type Writer = io::BufWriter<File>;

/// Bytes that are gathered before they are written.
const BUFFER: usize = 1 << 18;
/// Most links that are followed.
const LINKS_MAX: u32 = 16;
/// Bytes of a name that are taken over into that of its part: names have 255 at most.
const NAME_MAX: usize = 200;
const NAMES_TRIED: u32 = 100;

impl Output {
    /// Begins a file. A device, or a pipe that somebody reads, is written as it is.
    ///
    /// # Errors
    ///
    /// The system's; [`io::ErrorKind::InvalidInput`] for a stranger's link, a directory and the like.
    pub fn create(path: &Path, readers: Readers, kept: Kept) -> io::Result<(Output, Writer)> {
        let path = followed(path)?;
        let buffered = |file| Writer::with_capacity(BUFFER, file);
        let looked = match of_proc(&path) {
            true => std::fs::metadata(&path),
            false => std::fs::symlink_metadata(&path),
        };
        let former = match looked {
            Ok(former) => Some(former),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(e),
        };
        if let Some(former) = &former {
            refuse_strangers(&path, former)?;
        }
        if former.as_ref().is_some_and(|f| !f.is_file()) {
            let file = open_special(&path)?;
            let output = Output {
                path,
                partial: None,
                kept,
            };
            return Ok((output, buffered(file)));
        }
        let mode = match readers {
            Readers::AsUsual => 0o666,
            Readers::Owner => 0o600,
        };
        let (file, partial) = create_beside(&path, mode)?;
        let output = Output {
            path,
            partial: Some(partial),
            kept,
        };
        if let (Readers::AsUsual, Some(former)) = (readers, former) {
            // (Root writes over somebody's file, which stays that user's.)
            let own = file.metadata()?;
            if (own.uid(), own.gid()) != (former.uid(), former.gid()) {
                let _ = std::os::unix::fs::fchown(&file, Some(former.uid()), Some(former.gid()));
            }
            file.set_permissions(Permissions::from_mode(former.mode() & 0o777))?;
        }
        Ok((output, buffered(file)))
    }

    /// Where it is until it is complete; none for what is written in its place.
    pub fn partial(&self) -> Option<&Path> {
        self.partial.as_deref()
    }

    /// Gives it its name, if it was written.
    ///
    /// # Errors
    ///
    /// What went wrong in writing it, or now; and where a part of it is.
    pub fn finish(mut self, written: io::Result<Writer>) -> Result<(), Unfinished> {
        let named = written
            .and_then(|mut file| file.flush())
            .and_then(|()| match &self.partial {
                Some(partial) => std::fs::rename(partial, &self.path),
                None => Ok(()),
            });
        match named {
            Ok(()) => {
                self.partial = None;
                Ok(())
            }
            Err(error) => Err(Unfinished {
                path: self.path.clone(),
                left: self.partial.clone().filter(|_| self.kept == Kept::InPart),
                error,
            }),
        }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let (Some(partial), Kept::IfWhole) = (&self.partial, self.kept) {
            let _ = std::fs::remove_file(partial);
        }
    }
}

/// A file that could not be completed.
#[derive(Debug)]
pub struct Unfinished {
    path: PathBuf,
    left: Option<PathBuf>,
    error: io::Error,
}

impl std::fmt::Display for Unfinished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot write {}", crate::printable(&self.path))?;
        match &self.left {
            Some(left) => write!(f, "; what there is of it is in {}", crate::printable(left)),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Unfinished {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

/// Opens a regular file to append to, or makes it, with nothing in it. Returns where it is.
///
/// # Errors
///
/// As [`Output::create`]; and for all that is no regular file.
pub fn start_log(path: &Path) -> io::Result<(PathBuf, File)> {
    let path = followed(path)?;
    let open = |make: bool| {
        OpenOptions::new()
            .append(true)
            .create_new(make)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&path)
    };
    let file = match open(true) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => open(false)?,
        made => made?,
    };
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(irregular(found.file_type()));
    }
    refuse_strangers(&path, &found)?;
    file.set_len(0)?;
    // (Its directory is there, since it could be opened in it.)
    let dir = directory(&path).canonicalize()?;
    let place = dir.join(path.file_name().unwrap_or_default());
    Ok((place, file))
}

/// Opens what [`start_log`] made, by its device and inode, to append to it.
///
/// # Errors
///
/// The system's; [`io::ErrorKind::NotFound`] if something else has its name.
pub fn reopen_log(path: &Path, device: u64, inode: u64) -> io::Result<File> {
    let file = OpenOptions::new()
        .append(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)?;
    let found = file.metadata()?;
    match found.is_file() && (found.dev(), found.ino()) == (device, inode) {
        true => Ok(file),
        false => Err(io::ErrorKind::NotFound.into()),
    }
}

/// Makes a file with a name of its own beside a path, for reading and writing.
fn create_beside(path: &Path, mode: u32) -> io::Result<(File, PathBuf)> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let name = std::os::unix::ffi::OsStrExt::as_bytes(name);
    let mut last = io::ErrorKind::AlreadyExists.into();
    for _ in 0..NAMES_TRIED {
        let mut fresh = name[..name.len().min(NAME_MAX)].to_vec();
        fresh.extend(format!(".{:016x}.partial", random()?).bytes());
        let fresh = <std::ffi::OsString as std::os::unix::ffi::OsStringExt>::from_vec(fresh);
        let partial = path.with_file_name(fresh);
        let made = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&partial);
        match made {
            Ok(file) => return Ok((file, partial)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => last = e,
            Err(e) => return Err(e),
        }
    }
    Err(last)
}

/// In a directory that others may write to, what is neither this user's nor root's may have been put there to be written to, and so
/// may another name of a file.
fn refuse_strangers(path: &Path, found: &std::fs::Metadata) -> io::Result<()> {
    if of_proc(path) {
        return Ok(());
    }
    let dir = std::fs::metadata(directory(path))?;
    let shared = dir.mode() & 0o022 != 0;
    let foreign = found.uid() != user() && found.uid() != 0;
    if shared && (foreign || (found.is_file() && found.nlink() > 1)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "it is there already, of user {}, in a directory that others may write to; name a file elsewhere",
                found.uid()
            ),
        ));
    }
    Ok(())
}

/// Whether a path names an open file of this process (`/dev/stdout`, `/dev/fd/63`).
fn of_proc(path: &Path) -> bool {
    directory(path)
        .canonicalize()
        .is_ok_and(|dir| dir.starts_with("/proc"))
}

/// A device, or a pipe that somebody reads.
fn open_special(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::FileTypeExt as _;
    let follow = if of_proc(path) { 0 } else { libc::O_NOFOLLOW };
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(follow | libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|e| match e.raw_os_error() {
            Some(libc::ENXIO) => io::Error::new(e.kind(), "it is a pipe that nobody reads"),
            _ => e,
        })?;
    let found = file.metadata()?;
    let kind = found.file_type();
    if !(kind.is_fifo() || kind.is_char_device()) {
        return Err(irregular(kind));
    }
    refuse_strangers(path, &found)?;
    // The reader may be slower than this process.
    // SAFETY: flags of a descriptor of our own.
    #[allow(unsafe_code, reason = "fcntl(2)")]
    unsafe {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        let flags = libc::fcntl(fd, libc::F_GETFL);
        libc::fcntl(fd, libc::F_SETFL, flags & !libc::O_NONBLOCK);
    }
    Ok(file)
}

/// Where a path leads by links of this user's and of root's.
fn followed(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..LINKS_MAX {
        let found = match std::fs::symlink_metadata(&path) {
            Ok(found) => found,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(path),
            Err(e) => return Err(e),
        };
        if !found.file_type().is_symlink() {
            return Ok(path);
        }
        if found.uid() != user() && found.uid() != 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "it is a symbolic link of user {}; name the file itself",
                    found.uid()
                ),
            ));
        }
        // (A link of /proc's leads to an open file, whatever it says.)
        if of_proc(&path) {
            return match std::fs::metadata(&path)?.is_file() {
                true => path.canonicalize(),
                false => Ok(path),
            };
        }
        path = directory(&path).join(std::fs::read_link(&path)?);
    }
    Err(io::Error::from_raw_os_error(libc::ELOOP))
}

fn directory(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

fn user() -> u32 {
    #[allow(unsafe_code, reason = "geteuid(2)")]
    // SAFETY: no arguments.
    unsafe {
        libc::geteuid()
    }
}

/// A number that nobody can guess.
///
/// # Errors
///
/// The kernel has no randomness (`getrandom(2)` is forbidden).
pub fn random() -> io::Result<u64> {
    let mut bytes = [0u8; 8];
    #[allow(unsafe_code, reason = "getrandom(2)")]
    // SAFETY: writes as many bytes as there are.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match got {
        8 => Ok(u64::from_ne_bytes(bytes)),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn write(path: &Path, readers: Readers, text: &str) -> io::Result<()> {
        let (output, mut file) = Output::create(path, readers, Kept::IfWhole)?;
        let written = file.write_all(text.as_bytes()).map(|()| file);
        output.finish(written).map_err(io::Error::other)
    }

    fn names(dir: &Path) -> Vec<String> {
        let all = std::fs::read_dir(dir).expect("there").flatten();
        let mut names: Vec<_> = all
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_appears_whole_with_the_mode_of_the_one_that_it_replaces() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("page");
        write(&path, Readers::AsUsual, "one").expect("written");
        std::fs::set_permissions(&path, Permissions::from_mode(0o640)).expect("set");
        let (output, mut file) =
            Output::create(&path, Readers::AsUsual, Kept::IfWhole).expect("begun");
        file.write_all(b"two").expect("written");
        file.flush().expect("written");
        assert_eq!(std::fs::read(&path).expect("there"), b"one", "not yet");
        output.finish(Ok(file)).expect("named");
        assert_eq!(std::fs::read(&path).expect("there"), b"two");
        let mode = |p: &Path| std::fs::metadata(p).expect("there").mode() & 0o777;
        assert_eq!(mode(&path), 0o640);
        write(&path, Readers::Owner, "three").expect("written");
        assert_eq!(mode(&path), 0o600);
        assert_eq!(names(dir.path()), ["page"]);
    }

    #[test]
    fn what_is_not_finished_leaves_nothing_unless_its_part_is_wanted() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("page");
        drop(Output::create(&path, Readers::AsUsual, Kept::IfWhole).expect("begun"));
        assert!(names(dir.path()).is_empty());
        let (output, _file) = Output::create(&path, Readers::AsUsual, Kept::InPart).expect("begun");
        let failed = output.finish(Err(io::ErrorKind::StorageFull.into()));
        let told = failed.expect_err("it failed").to_string();
        let [left] = &names(dir.path())[..] else {
            panic!("not one file")
        };
        assert!(told.contains(left), "{told}");
    }

    #[test]
    fn a_name_that_leaves_no_room_for_more_can_be_written() {
        let dir = tempfile::tempdir().expect("a directory");
        write(&dir.path().join("n".repeat(255)), Readers::AsUsual, "x").expect("written");
        assert!(write(&dir.path().join("d/none"), Readers::AsUsual, "x").is_err());
        assert!(
            write(dir.path(), Readers::AsUsual, "x").is_err(),
            "a directory"
        );
    }

    #[test]
    fn a_planted_part_is_not_touched() {
        let dir = tempfile::tempdir().expect("a directory");
        let victim = dir.path().join("victim");
        std::fs::write(&victim, "precious").expect("written");
        symlink(&victim, dir.path().join("page.partial")).expect("a link");
        write(&dir.path().join("page"), Readers::AsUsual, "x").expect("written");
        assert_eq!(std::fs::read(&victim).expect("there"), b"precious");
        assert_eq!(names(dir.path()), ["page", "page.partial", "victim"]);
    }

    #[test]
    fn ones_own_link_is_followed_and_a_strangers_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let (link, target) = (dir.path().join("link"), dir.path().join("target"));
        symlink("target", &link).expect("a link");
        write(&link, Readers::AsUsual, "x").expect("written");
        assert_eq!(std::fs::read(&target).expect("there"), b"x");
        let (_, log) = start_log(&link).expect("begun");
        assert_eq!(log.metadata().expect("there").len(), 0);
        // Only root can make one of another user's.
        if user() == 0 {
            std::os::unix::fs::lchown(&link, Some(65534), None).expect("root may");
            std::fs::write(&target, "precious").expect("written");
            assert!(write(&link, Readers::AsUsual, "y").is_err());
            assert!(start_log(&link).is_err());
            assert_eq!(std::fs::read(&target).expect("there"), b"precious");
        }
        symlink("b", dir.path().join("a")).expect("a link");
        symlink("a", dir.path().join("b")).expect("a link");
        assert!(
            write(&dir.path().join("a"), Readers::AsUsual, "x").is_err(),
            "a loop"
        );
    }

    #[test]
    fn devices_stay_and_a_pipe_that_nobody_reads_is_an_error() {
        write(Path::new("/dev/null"), Readers::AsUsual, "x").expect("written");
        let kind = std::fs::metadata("/dev/null").expect("there").file_type();
        assert!(std::os::unix::fs::FileTypeExt::is_char_device(&kind));
        let dir = tempfile::tempdir().expect("a directory");
        let pipe = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.expect("coreutils").success());
        assert!(write(&pipe, Readers::AsUsual, "x").is_err());
        assert!(start_log(&pipe).is_err());
    }

    #[test]
    fn the_pipe_of_a_shell_is_written_as_it_is() {
        use std::io::Read as _;
        use std::os::fd::AsRawFd as _;
        let (mut read, written) = io::pipe().expect("a pipe");
        let name = format!("/dev/fd/{}", written.as_raw_fd());
        write(Path::new(&name), Readers::Owner, "x").expect("written");
        drop(written);
        let mut text = String::new();
        read.read_to_string(&mut text).expect("read");
        assert_eq!(text, "x");
    }

    #[test]
    fn what_strangers_may_have_put_there_is_not_written_to() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::set_permissions(dir.path(), Permissions::from_mode(0o1777)).expect("own");
        let path = dir.path().join("page");
        write(&path, Readers::AsUsual, "x").expect("one's own");
        std::fs::hard_link(&path, dir.path().join("again")).expect("a link");
        assert!(start_log(&path).is_err(), "another name of a file");
        std::fs::remove_file(dir.path().join("again")).expect("own");
        start_log(&path).expect("one's own");
        // Only root can make files of another user's.
        if user() == 0 {
            let pipe = dir.path().join("pipe");
            let made = std::process::Command::new("mkfifo").arg(&pipe).status();
            assert!(made.expect("coreutils").success());
            let _reader = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&pipe)
                .expect("own");
            for path in [&path, &pipe] {
                std::os::unix::fs::chown(path, Some(65534), None).expect("root may");
                assert!(write(path, Readers::Owner, "x").is_err(), "{path:?}");
                assert!(start_log(path).is_err(), "{path:?}");
            }
        }
    }

    #[test]
    fn a_log_is_found_again_as_itself_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, file) = start_log(&dir.path().join("log")).expect("begun");
        let id = file.metadata().expect("there");
        reopen_log(&path, id.dev(), id.ino()).expect("the same");
        std::fs::rename(&path, dir.path().join("away")).expect("moved");
        assert!(
            reopen_log(&path, id.dev(), id.ino()).is_err(),
            "none is made"
        );
        std::fs::write(&path, "another").expect("written");
        assert!(reopen_log(&path, id.dev(), id.ino()).is_err());
    }
}
