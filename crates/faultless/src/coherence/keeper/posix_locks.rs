//! POSIX locks of the program, which the engine must not drop.

#![allow(unsafe_code, reason = "asks for locks by a structure of the kernel's")]

use crate::base::primitive::{Mutex, MutexGuard, lock};
use crate::space::fds;
use faultless_sys::{file, signal};

/// Held while a descriptor of a file is closed, or a POSIX lock on one is announced.
pub(super) static LOCKING: Mutex<()> = Mutex::new(());
/// Files on which the program is taking POSIX locks, or may have taken some: descriptors of them linger.
pub(super) static TAKING: Mutex<Vec<file::FileId>> = Mutex::new(Vec::new());

/// Keeps POSIX locks from being announced, where they are announced at all. (Elsewhere nobody is to wait for another's file
/// system: what is done under this lock may ask one.)
pub(super) fn nothing_announced() -> Option<MutexGuard<'static, ()>> {
    fds::kept_high().then(|| lock(&LOCKING))
}

/// Asks a descriptor's file system, which may take its time, which file it is of; and later, at once, whether a lock on that
/// file has been announced.
pub(super) fn lock_may_come(fd: i32) -> impl Fn() -> bool {
    let id = file::status(fd).map(|st| st.id);
    move || id.as_ref().is_ok_and(|id| lock(&TAKING).contains(id))
}

/// Says that the program is about to take a POSIX lock on a file (where `fcntl` is interposed): from when this returns, no
/// descriptor of it is closed until [`locks_settled`].
pub(crate) fn locks_coming(id: file::FileId) {
    let _no_handler_here = signal::Blocked::all();
    let _nothing_is_closed = lock(&LOCKING);
    lock(&TAKING).push(id);
}

/// The call that [`locks_coming`] announced is over: what it took, the kernel can tell.
pub(crate) fn locks_settled(id: file::FileId) {
    let _no_handler_here = signal::Blocked::all();
    let mut taking = lock(&TAKING);
    if let Some(i) = taking.iter().position(|&t| t == id) {
        taking.swap_remove(i);
    }
}

/// Whether somebody holds a POSIX lock on the file. Asked on behalf of the open file, which is another owner than the
/// process, so that the process's own locks are seen.
pub(crate) fn posix_locked(fd: i32) -> bool {
    let mut l = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    // SAFETY: F_OFD_GETLK reads and writes the structure.
    let ok = unsafe { file::lock_command(fd, libc::F_OFD_GETLK, &mut l) }.is_ok();
    ok && l.l_type != libc::F_UNLCK as i16
}
