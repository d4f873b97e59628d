//! Read leases: what makes a map of a file safe.
//!
//! `fcntl(F_SETLEASE, F_RDLCK)` is granted only while nobody has the file open for writing. From then on the kernel
//! holds a later opener back until the lease is given up, or `/proc/sys/fs/lease-break-time` is over. So bytes that were
//! read while the lease was held (which the fault path checks *after* each read) are the bytes that the file had when it
//! was mapped. This means something only where every write passes the lease: overlayfs and FUSE grant one and then let
//! the bytes change, so there is a list of file systems that can be trusted with it.

use crate::base::error::{Error, LeaseRefusal};
use crate::base::ids::{MapId, Nanos, Serial, Unit};
use crate::base::primitive::Ordering;
use crate::base::{clock, text};
use crate::coherence::{hooks, keeper};
use crate::fault::piece::file_piece;
use crate::fault::run::{Need, RUN_MAX};
use crate::fault::serve::serve;
use crate::read::prefetch::prefetch;
use crate::read::workers::Workers;
use crate::space::map_core::{MapCore, Reading};
use crate::space::page::State;
use crate::space::registry;
use faultless_sys::{Errno, file};
use std::sync::Arc;

/// What happens to a safe map when somebody opens its file for writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OnBreak {
    /// The writer is held back while the rest of the file is read into memory, as far as the pool's budget and the
    /// kernel's patience (`/proc/sys/fs/lease-break-time`, 45 s by default) go. From then on nothing of the map is
    /// evicted, and pages that are not in memory are refused: [`pin`](crate::Map::pin) returns
    /// [`Error::LeaseBroken`](crate::Error::LeaseBroken), and a plain load is SIGBUS.
    #[default]
    Snapshot,
    /// The writer goes ahead immediately, and pages that are not in memory are refused from then on.
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
pub(crate) fn deadline() -> Option<Nanos> {
    let text = text::read("/proc/sys/fs/lease-break-time").unwrap_or_default();
    // Some time has passed since the kernel began to wait, and giving the lease up takes some.
    patience(&text).map(|patience| clock::now() + Nanos::new(patience.get() / 5 * 4))
}

/// How long the kernel waits before it takes a lease by force, from the text of its setting. 0 means that it waits for ever.
fn patience(text: &str) -> Option<Nanos> {
    /// The kernel's default, in seconds.
    const DEFAULT: u64 = 45;
    let seconds = text.trim().parse().unwrap_or(DEFAULT);
    (seconds > 0).then(|| Nanos::from_secs(seconds))
}

/// Saves what can be saved of a map whose lease is being broken, then gives the lease up. Runs on a worker thread.
///
/// Whatever this does or leaves undone, bytes stay right: the fault path asks the kernel about the lease after each
/// read. What is at stake here is only how much survives.
pub(crate) fn on_break(core: &MapCore, what: OnBreak) {
    if !core.keep_all_from_now() {
        return;
    }
    if what == OnBreak::Snapshot {
        let deadline = deadline();
        let over = || {
            let closing = core.closing.load(Ordering::Acquire);
            closing || deadline.is_some_and(|d| clock::now() > d)
        };
        for unit in Unit::each(Unit::new(0)..core.units_end()) {
            while !over() && !keep(core, unit) {
                clock::nap(BATCH_NAP);
            }
            if over() {
                break;
            }
        }
    }
    core.refusal.store(1, Ordering::Release);
    // It may have been broken before the thread that took it could note it down.
    keeper::end_lease(*core.lease.wait());
}

/// How long to wait for a batch of the evictor's before looking again.
const BATCH_NAP: Nanos = Nanos::from_micros(200);

/// Makes one unit resident for good, if there is room for it. Where there is none for more, what is there still has to be made
/// to stay. `false` while a batch of the evictor's has it, which is soon through.
fn keep(core: &MapCore, unit: Unit) -> bool {
    let Reading::File { fd, .. } = &core.reading else {
        return true;
    };
    let word = core.page(unit).load();
    match word.state() {
        _ if word.batch() => return false,
        State::Resident if !word.soft() => {}
        // What cools stays where it is, and is served from there.
        State::Absent if word.cool() => {}
        State::Absent => {
            if core.pool.budget.makes_room(core.unit_bytes()) {
                let fetch = &mut |range, keep| file_piece(core, fd, range, keep);
                let _ = prefetch(core, unit, RUN_MAX as u64, fetch);
            }
        }
        // Marked MADV_FREE: a pin renews it.
        _ => {
            if serve(core, unit, Need::Pin).is_ok() {
                core.page(unit).unpin();
            }
        }
    }
    true
}

/// What is to be done about a broken lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// As the owner of the map wished.
    Save(OnBreak),
    /// The kernel's own mapping takes the map's place.
    HandBack,
}

/// Takes the lease that makes a map safe. `len_before` is the file's length that the map was made for.
pub(crate) fn take(
    core: &MapCore,
    workers: &Arc<Workers>,
    what: Broken,
    len_before: u64,
) -> Result<(), Error> {
    let Reading::File { fd, .. } = &core.reading else {
        return Ok(());
    };
    workers
        .ensure(&core.pool, 1)
        .map_err(|e| Error::kernel("cannot start a worker thread", e))?;
    let (id, serial) = (core.id, core.serial);
    let (pool, workers) = (core.pool.clone(), workers.clone());
    let on_break = Box::new(move || {
        workers.save(&pool, Box::new(move || broken(id, serial, what)));
    });
    let id = keeper::lease(fd, on_break)
        .map_err(|e| Error::kernel("cannot reach the keeper thread", e))?
        .map_err(|e| error(&core.name, refusal(e)))?;
    let _ = core.lease.set(id);
    // A writer may have truncated it between the look at its length and the lease.
    match file::status(fd.get()) {
        Ok(st) if st.len == len_before => Ok(()),
        Ok(_) => Err(error(&core.name, LeaseRefusal::OpenForWriting)),
        Err(e) => Err(Error::kernel(format!("cannot stat {}", core.name), e)),
    }
}

/// Runs [`on_break`] for the map with gate `id`, if it is still the one with this serial number.
pub(crate) fn broken(id: MapId, serial: Serial, what: Broken) {
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
            if !hooks::lease_broken(serial.get()) {
                broken(id, serial, Broken::Save(OnBreak::Snapshot));
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_break_time_of_zero_means_that_the_kernel_waits_for_ever() {
        assert_eq!(patience("0\n"), None);
        assert_eq!(patience("45\n"), Some(Nanos::from_secs(45)));
        assert_eq!(patience("1"), Some(Nanos::from_secs(1)));
        assert_eq!(patience(""), Some(Nanos::from_secs(45)));
    }
}
