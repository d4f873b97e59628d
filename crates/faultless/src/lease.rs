//! Read leases: what makes a map of a file safe.
//!
//! `fcntl(F_SETLEASE, F_RDLCK)` is granted only while nobody has the file open for writing. From then on the kernel
//! holds a later opener back until the lease is given up, or `/proc/sys/fs/lease-break-time` is over. So bytes that were
//! read while the lease was held (which the fault path checks *after* each read) are the bytes that the file had when it
//! was mapped. This means something only where every write passes the lease: overlayfs and FUSE grant one and then let
//! the bytes change, so there is a list of file systems that can be trusted with it.

use crate::error::{Error, LeaseRefusal};
use crate::fault::core::{MapCore, Reading};
use crate::fault::fill;
use crate::fault::page::State;
use crate::fault::registry;
use crate::standin;
use crate::workers::Broken;
use faultless_sys::mem::PAGE;
use faultless_sys::{Errno, file, raw};
use std::io;
use std::sync::atomic::Ordering;

/// What happens to a safe map when somebody opens its file for writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnBreak {
    /// The writer is held back while the rest of the file is read into memory, as far as the pool's budget and the
    /// kernel's patience (`/proc/sys/fs/lease-break-time`, 45 s by default) go. From then on nothing of the map is
    /// evicted, and pages that are not in memory are refused.
    #[default]
    Snapshot,
    /// The writer goes ahead at once, and pages that are not in memory are refused from then on.
    Fail,
}

/// File systems on which all writes pass the lease: name and `statfs` magic number.
const TRUSTED: [(&str, u64); 5] = [
    ("ext2, ext3 or ext4", 0xEF53),
    ("xfs", 0x5846_5342),
    ("btrfs", 0x9123_683E),
    ("f2fs", 0xF2F5_2010),
    ("tmpfs", 0x0102_1994),
];

/// Names of others that people meet.
const OTHERS: [(&str, u64); 8] = [
    ("overlayfs", 0x794C_7630),
    ("FUSE", 0x6573_5546),
    ("NFS", 0x6969),
    ("CIFS", 0xFF53_4D42),
    ("9p", 0x0102_1997),
    ("proc", 0x9FA0),
    ("ZFS", 0x2FC1_2FC1),
    ("ramfs", 0x8584_58F6),
];

/// Checks what can be known before a lease is tried.
pub(crate) fn check_file(fd: i32) -> Result<(), LeaseRefusal> {
    let status = file::status(fd).map_err(|e| LeaseRefusal::Kernel(e.into()))?;
    let kind = match status.mode & libc::S_IFMT {
        libc::S_IFREG => None,
        libc::S_IFDIR => Some("a directory"),
        libc::S_IFBLK => Some("a block device"),
        libc::S_IFCHR => Some("a character device"),
        libc::S_IFIFO => Some("a pipe"),
        libc::S_IFSOCK => Some("a socket"),
        _ => Some("not a regular file"),
    };
    if let Some(kind) = kind {
        return Err(LeaseRefusal::NotRegular { kind });
    }
    let magic = file::fs_magic(fd).map_err(|e| LeaseRefusal::Kernel(e.into()))?;
    if TRUSTED.iter().any(|&(_, m)| m == magic) {
        return Ok(());
    }
    let file_system = OTHERS.iter().find(|&&(_, m)| m == magic).map_or_else(
        || format!("a file system of type {magic:#x}"),
        |&(n, _)| n.to_owned(),
    );
    Err(LeaseRefusal::FileSystem { file_system })
}

/// What the kernel's refusal means.
pub(crate) fn refusal(e: Errno) -> LeaseRefusal {
    match e.0 {
        libc::EAGAIN => LeaseRefusal::OpenForWriting,
        libc::EACCES | libc::EPERM => LeaseRefusal::NotOwner,
        _ => LeaseRefusal::Kernel(e.into()),
    }
}

pub(crate) fn error(name: &str, reason: LeaseRefusal) -> Error {
    Error::Lease {
        name: name.to_owned(),
        reason,
    }
}

/// The time by which a map must be saved, since the kernel takes its lease by force soon after. `None`: the kernel never does.
pub(crate) fn deadline() -> Option<std::time::Instant> {
    let text = std::fs::read_to_string("/proc/sys/fs/lease-break-time").unwrap_or_default();
    // Some time has passed since the kernel began to wait, and giving the lease up takes some.
    patience(&text).map(|patience| std::time::Instant::now() + patience.mul_f32(0.8))
}

/// How long the kernel waits before it takes a lease by force, from the text of its setting. 0 means that it waits for ever.
fn patience(text: &str) -> Option<std::time::Duration> {
    /// The kernel's default, in seconds.
    const DEFAULT: u64 = 45;
    let seconds = text.trim().parse().unwrap_or(DEFAULT);
    (seconds > 0).then(|| std::time::Duration::from_secs(seconds))
}

/// Saves what can be saved of a map whose lease is being broken, then gives the lease up. Runs on a worker thread.
///
/// Whatever this does or leaves undone, bytes stay right: the fault path asks the kernel about the lease after each
/// read. What is at stake here is only how much survives.
pub(crate) fn on_break(core: &MapCore, what: OnBreak) {
    if core.keep_all.swap(true, Ordering::SeqCst) {
        return;
    }
    if what == OnBreak::Snapshot {
        let deadline = deadline();
        for unit in 0..core.data_units() {
            let closing = core.closing.load(Ordering::Acquire);
            if deadline.is_some_and(|d| std::time::Instant::now() > d) || closing {
                break;
            }
            // Where there is no room for more, what is there still has to be made to stay.
            keep(core, unit);
        }
    }
    core.refusal.store(1, Ordering::Release);
    // It may have been broken before the thread that took it could note it down.
    crate::keeper::end_lease(*core.lease.wait());
}

/// Makes one unit resident for good, if there is room for it.
fn keep(core: &MapCore, unit: u64) {
    let Reading::File { fd, .. } = &core.reading else {
        return;
    };
    let word = core.page(unit).load();
    match word.state() {
        State::Resident if !word.soft() && !word.batch() => {}
        // What cools stays where it is, and is served from there.
        State::Absent if word.cool() => {}
        State::Absent => {
            let budget = &core.pool.budget;
            if budget.used() + core.unit_bytes() <= budget.limit() {
                let fetch = &mut |at, end, keep| fill::file_piece(core, fd, at, end, keep);
                let _ = fill::prefetch(core, unit, fill::RUN_MAX as u64, fetch);
            }
        }
        // In a batch, or marked MADV_FREE: wait for the one, renew the other. A pin does both.
        _ => {
            if fill::serve(core, unit, fill::Need::Pin).is_ok() {
                core.page(unit).unpin();
            }
        }
    }
}

/// Runs [`on_break`] for the map with gate `id`, if it is still the one with this serial number.
pub(crate) fn broken(id: u32, serial: u64, what: Broken) {
    let Some(core) = registry::gate(id)
        .and_then(registry::enter)
        .filter(|core| core.serial == serial)
    else {
        return;
    };
    match what {
        Broken::Save(what) => on_break(&core, what),
        Broken::HandBack => {
            // The thread that hands the map back waits until nobody is inside.
            drop(core);
            if !standin::lease_broken(serial) {
                broken(id, serial, Broken::Save(OnBreak::Snapshot));
            }
        }
    }
}

/// Opens the file behind `fd` anew, for reading only: a lease, and direct I/O, belong to an open file of our own.
pub(crate) fn reopen(fd: i32, direct: bool) -> io::Result<i32> {
    let path = std::ffi::CString::new(format!("/proc/thread-self/fd/{fd}"))?;
    let flags = libc::O_RDONLY
        | libc::O_CLOEXEC
        | libc::O_NONBLOCK
        | if direct { libc::O_DIRECT } else { 0 };
    // Loads from a mapping change no access time. (Only the owner may ask for that.)
    match file::open(&path, flags | libc::O_NOATIME) {
        Err(Errno(libc::EPERM)) => Ok(file::open(&path, flags)?),
        other => Ok(other?),
    }
}

/// Whether a direct read of the first page works.
pub(crate) fn direct_works(fd: i32) -> bool {
    match file::direct_io(fd) {
        file::DirectIo::Unsupported => return false,
        file::DirectIo::Aligned { memory, offset }
            if memory as usize > PAGE || offset as usize > PAGE =>
        {
            return false;
        }
        _ => {}
    }
    let Ok(page) = crate::fault::area::Area::new(PAGE) else {
        return false;
    };
    loop {
        #[allow(unsafe_code, reason = "a probe into a page of our own")]
        // SAFETY: the area is PAGE bytes long and nobody else knows it.
        let read = unsafe { file::pread(fd, page.start(), PAGE, 0) };
        match read {
            Err(Errno(libc::EINTR)) => raw::sched_yield(),
            other => return other.is_ok(),
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_break_time_of_zero_means_that_the_kernel_waits_for_ever() {
        assert_eq!(patience("0\n"), None);
        assert_eq!(patience("45\n"), Some(Duration::from_secs(45)));
        assert_eq!(patience("1"), Some(Duration::from_secs(1)));
        assert_eq!(patience(""), Some(Duration::from_secs(45)));
    }
}
