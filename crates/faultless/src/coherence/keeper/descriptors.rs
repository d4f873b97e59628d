//! Descriptors that the engine takes, watches and lets go.

#![allow(unsafe_code, reason = "owns descriptors by number")]

use crate::base::descriptor::Owned;
use crate::base::primitive::lock;
use crate::coherence::keeper::posix_locks::{
    TAKING, lock_may_come, nothing_announced, posix_locked,
};
use crate::coherence::keeper::service::{Keeper, RUNNING, with};
use crate::space::fds;
use crate::space::fds::Fd;
use faultless_sys::file::FileId;
use faultless_sys::{Errno, fdtable, file, mem, poll, raw, uffd};
use std::io;

/// Takes a descriptor into the engine: the program's table keeps `fd` (or a copy with a higher number), the keeper gets a
/// copy. With `id`, it must be a descriptor of that file still: a program that closes all descriptors may have closed it, and
/// have put another file in its place.
pub(crate) fn adopt(fd: Owned, id: Option<FileId>) -> io::Result<Fd> {
    let fd = if fds::kept_high() {
        let coming = lock_may_come(fd.number());
        let _no_lock_meanwhile = nothing_announced();
        if coming() || posix_locked(fd.number()) {
            fd
        } else {
            Owned::new(fds::lift(fd.into_number()))
        }
    } else {
        fd
    };
    let number = fd.number();
    if fds::kept_high() && !fds::can_note(number) {
        // A copy of the process could not find it, and would keep it.
        close_unless_locked(fd);
        return Err(io::Error::from_raw_os_error(libc::EMFILE));
    }
    let kept = if fds::protected() {
        let me = raw::gettid();
        let fetch = move |_: &mut Keeper| {
            let kept = fdtable::fetch(me, number)?;
            let same = id.is_none_or(|id| file::cached_id(kept).is_ok_and(|now| now == id));
            if !same {
                // SAFETY: fetched just now, into this table.
                unsafe { file::close(kept) };
                return Err(Errno(libc::EBADF));
            }
            Ok(kept)
        };
        let fetched = with(fetch).map(|r| r.map_err(io::Error::from));
        match fetched {
            Ok(Ok(kept)) => kept,
            Ok(Err(e)) | Err(e) => {
                close_unless_locked(fd);
                return Err(e);
            }
        }
    } else {
        -1
    };
    Ok(Fd::new(fd.into_number(), kept))
}

/// Closes a descriptor that came to nothing, unless that would cost the program its POSIX locks on the file.
fn close_unless_locked(fd: Owned) {
    let coming = lock_may_come(fd.number());
    let _no_lock_meanwhile = nothing_announced();
    if coming() || posix_locked(fd.number()) {
        std::mem::forget(fd);
    }
}

/// Reads the events of a pool's userfaultfd from now on.
pub(crate) fn watch(fd: &Fd) -> io::Result<()> {
    let number = fd.engine_number();
    with(move |k| poll::add(k.epoll, number, number as u64))?.map_err(io::Error::from)
}

/// Lets a pool's userfaultfd go.
pub(crate) fn unwatch(fd: Fd) {
    let (kept, number) = (fd.kept(), fd.engine_number());
    // First out of the set, while the number still names it: without a private table it is the one that is closed next.
    let _ = with(move |k| poll::remove(k.epoll, number));
    // Then the program's, which is told from others by the kept one.
    close_shared_uffd(&fd);
    if kept >= 0 {
        // SAFETY: the keeper's own copy, in the keeper's table.
        let _ = with(move |_| unsafe { file::close(kept) });
    }
}

/// Closes a userfaultfd's number in the program's table, if it still names one.
fn close_shared_uffd(fd: &Fd) {
    let number = fd.get();
    // Any other descriptor answers ENOTTY or EBADF; a userfaultfd wakes the (absent) waiters of a page.
    if fd.is_kept_open_file(number) && uffd::wake(number, 1 << 30, mem::PAGE).is_ok() {
        fds::forget(number);
        // SAFETY: still ours, as far as can be told.
        unsafe { file::close(number) };
    }
}

/// Lets the descriptor of a dropped map go, as soon as that costs the program no POSIX lock: closing *any* descriptor of
/// a file drops all locks that the process has on it.
pub(crate) fn retire(fd: Fd, id: file::FileId) {
    let mut go = vec![(fd, id)];
    if let Some(r) = lock(&RUNNING).as_mut() {
        go.append(&mut r.lingering);
    }
    for (fd, id) in go {
        let (shared, kept) = (fd.get(), fd.kept());
        let ours = file::status(shared).is_ok_and(|s| s.id == id) && fd.is_kept_open_file(shared);
        let _no_lock_meanwhile = nothing_announced();
        let taking = lock(&TAKING).contains(&id);
        if ours && (taking || posix_locked(shared)) {
            if let Some(r) = lock(&RUNNING).as_mut() {
                r.lingering.push((fd, id));
            }
            continue;
        }
        fds::forget(shared);
        if ours {
            // SAFETY: the number still names the file that the engine opened.
            unsafe { file::close(shared) };
        }
        if kept >= 0 {
            // SAFETY: the keeper's own copy, in the keeper's table.
            let _ = with(move |_| unsafe { file::close(kept) });
        }
    }
}
