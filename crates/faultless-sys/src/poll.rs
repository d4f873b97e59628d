//! Waiting for several descriptors (`epoll(7)`), and a descriptor to wake such a wait (`eventfd(2)`).

#![allow(unsafe_code, reason = "passes structures to the kernel by address")]

use crate::raw::{Errno, check, syscall};

/// A set of descriptors that can be waited for.
pub fn create() -> Result<i32, Errno> {
    // SAFETY: no pointers.
    check(unsafe {
        syscall(
            libc::SYS_epoll_create1,
            [libc::EPOLL_CLOEXEC as usize, 0, 0, 0, 0, 0],
        )
    })
    .map(|fd| fd as i32)
}

/// Has the set say `data` when `fd` is readable.
pub fn add(set: i32, fd: i32, data: u64) -> Result<(), Errno> {
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: data,
    };
    control(set, libc::EPOLL_CTL_ADD, fd, &raw mut event as usize)
}

/// Takes a descriptor out of the set.
pub fn remove(set: i32, fd: i32) -> Result<(), Errno> {
    control(set, libc::EPOLL_CTL_DEL, fd, 0)
}

fn control(set: i32, what: i32, fd: i32, event: usize) -> Result<(), Errno> {
    let args = [set as usize, what as usize, fd as usize, event, 0, 0];
    // SAFETY: `event` is null where none is wanted, or a structure that the caller keeps during the call.
    check(unsafe { syscall(libc::SYS_epoll_ctl, args) }).map(drop)
}

/// Waits until some descriptor of the set is readable, and says what [`add`] was given for it. `EINTR` after a signal.
pub fn wait(set: i32) -> Result<u64, Errno> {
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    let for_ever = -1isize as usize;
    let args = [set as usize, &raw mut event as usize, 1, for_ever, 0, 8];
    // SAFETY: room for one event, which is all that is asked for; no mask is passed.
    let ready = check(unsafe { syscall(libc::SYS_epoll_pwait, args) })?;
    match ready {
        0 => Err(Errno(libc::EINTR)),
        _ => Ok(event.u64),
    }
}

/// A descriptor that becomes readable by [`notify`].
pub fn notice() -> Result<i32, Errno> {
    let args = [0, libc::EFD_CLOEXEC as usize, 0, 0, 0, 0];
    // SAFETY: no pointers.
    check(unsafe { syscall(libc::SYS_eventfd2, args) }).map(|fd| fd as i32)
}

/// Makes a [`notice`] readable.
pub fn notify(notice: i32) -> Result<(), Errno> {
    let once = 1u64;
    let args = [notice as usize, &raw const once as usize, 8, 0, 0, 0];
    // SAFETY: eight bytes of a live local.
    check(unsafe { syscall(libc::SYS_write, args) }).map(drop)
}
