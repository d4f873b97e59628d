//! Descriptors that the kernel has just made.

use std::os::fd::FromRawFd;
use std::os::fd::OwnedFd;

#[allow(
    unsafe_code,
    reason = "takes ownership of a descriptor that the kernel just made"
)]
pub(crate) fn own(fd: i32) -> OwnedFd {
    // SAFETY: callers pass a descriptor that a system call returned to them, and that nobody else knows.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
