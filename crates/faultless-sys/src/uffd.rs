//! userfaultfd, as far as Faultless uses it.
//!
//! The numbers and structures are those of `include/uapi/linux/userfaultfd.h` of Linux 6.18; headers on today's
//! distributions lack some of them, so they are declared here and asserted at compile time.

#![allow(unsafe_code, reason = "ioctls take addresses of memory to be filled")]

use crate::file;
use crate::raw::{Errno, check, syscall};

/// Handle only faults from user mode: needs no privilege (5.11).
pub const USER_MODE_ONLY: u32 = 1;

/// The interface version.
const UFFD_API: u64 = 0xAA;

/// A fault in a registered range raises SIGBUS instead of an event (4.14).
pub const FEATURE_SIGBUS: u64 = 1 << 7;
/// `mremap` keeps the registration and reports an event (4.11); without it a moved range is silently disarmed.
pub const FEATURE_EVENT_REMAP: u64 = 1 << 2;
/// An unmapped range is reported, and the thread that unmapped it waits until the report is read (4.11).
pub const FEATURE_EVENT_UNMAP: u64 = 1 << 6;

/// Pages can be moved into a registered range (6.8).
pub const FEATURE_MOVE: u64 = 1 << 16;

/// Register for faults on absent pages.
const REGISTER_MODE_MISSING: u64 = 1;

/// Do not wake waiters after a copy: under SIGBUS there are none.
const COPY_MODE_DONTWAKE: u64 = 1;

/// The same after a move.
const MOVE_MODE_DONTWAKE: u64 = 1;

/// An event of [`read_events`]: a page fault (monitor mode).
pub const EVENT_PAGEFAULT: u8 = 0x12;
/// An event of [`read_events`]: a range was moved by `mremap`.
pub const EVENT_REMAP: u8 = 0x14;
/// An event of [`read_events`]: a range was unmapped.
pub const EVENT_UNMAP: u8 = 0x16;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct UffdRange {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Register {
    range: UffdRange,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct Move {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}

/// `struct uffd_msg`: one event.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Event {
    /// `EVENT_…`.
    pub event: u8,
    reserved: [u8; 7],
    /// The event's arguments. A page fault: flags, address, feature. A move: from, to, length. What was unmapped: start, end.
    pub arg: [u64; 3],
}

const fn iowr(nr: u32, size: usize) -> u32 {
    (3 << 30) | ((size as u32) << 16) | (0xAA << 8) | nr
}
const fn ior(nr: u32, size: usize) -> u32 {
    (2 << 30) | ((size as u32) << 16) | (0xAA << 8) | nr
}

const UFFDIO_API: u32 = iowr(0x3F, size_of::<Api>());
const UFFDIO_REGISTER: u32 = iowr(0x00, size_of::<Register>());
const UFFDIO_UNREGISTER: u32 = ior(0x01, size_of::<UffdRange>());
const UFFDIO_WAKE: u32 = ior(0x02, size_of::<UffdRange>());
const UFFDIO_COPY: u32 = iowr(0x03, size_of::<Copy>());
const UFFDIO_MOVE: u32 = iowr(0x05, size_of::<Move>());

const _: () = {
    assert!(UFFDIO_API == 0xC018_AA3F);
    assert!(UFFDIO_REGISTER == 0xC020_AA00);
    assert!(UFFDIO_UNREGISTER == 0x8010_AA01);
    assert!(UFFDIO_WAKE == 0x8010_AA02);
    assert!(UFFDIO_COPY == 0xC028_AA03);
    assert!(UFFDIO_MOVE == 0xC028_AA05);
    assert!(size_of::<Event>() == 32);
};

/// Opens a userfaultfd with `flags` (`O_…` and [`USER_MODE_ONLY`]).
pub fn open(flags: u32) -> Result<i32, Errno> {
    // SAFETY: no pointers.
    check(unsafe { syscall(libc::SYS_userfaultfd, [flags as usize, 0, 0, 0, 0, 0]) })
        .map(|fd| fd as i32)
}

unsafe fn ioctl<T>(fd: i32, nr: u32, arg: &mut T) -> Result<usize, Errno> {
    // SAFETY: `arg` has the layout and size that `nr` encodes; its effect is the caller's promise.
    check(unsafe {
        syscall(
            libc::SYS_ioctl,
            [fd as usize, nr as usize, arg as *mut T as usize, 0, 0, 0],
        )
    })
}

/// Agrees on the interface with `features` switched on. `EINVAL` where the kernel lacks one of them.
pub fn enable(fd: i32, features: u64) -> Result<(), Errno> {
    agree(fd, features).map(drop)
}

/// Returns the features that the kernel has.
fn agree(fd: i32, features: u64) -> Result<u64, Errno> {
    let mut api = Api {
        api: UFFD_API,
        features,
        ioctls: 0,
    };
    // SAFETY: has no effect on memory.
    unsafe { ioctl(fd, UFFDIO_API, &mut api) }.map(|_| api.features)
}

/// Arms a range: a touch of an absent page in it is reported.
///
/// # Safety
///
/// The range must be the caller's own mapping.
pub unsafe fn register(fd: i32, addr: usize, len: usize) -> Result<(), Errno> {
    let mut reg = Register {
        range: UffdRange {
            start: addr as u64,
            len: len as u64,
        },
        mode: REGISTER_MODE_MISSING,
        ioctls: 0,
    };
    // SAFETY: the caller owns the range.
    unsafe { ioctl(fd, UFFDIO_REGISTER, &mut reg) }.map(drop)
}

/// Disarms a range: absent pages in it read as zero from then on.
///
/// # Safety
///
/// The range must be the caller's own mapping, and nobody may read it afterwards.
pub unsafe fn unregister(fd: i32, addr: usize, len: usize) -> Result<(), Errno> {
    let mut range = UffdRange {
        start: addr as u64,
        len: len as u64,
    };
    // SAFETY: the caller owns the range.
    unsafe { ioctl(fd, UFFDIO_UNREGISTER, &mut range) }.map(drop)
}

/// How a copy ended: bytes installed from the start of the range, and the error that stopped it, if one did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Copied {
    /// Bytes installed.
    pub bytes: usize,
    /// Why it stopped before the end.
    pub error: Option<Errno>,
}

impl Copied {
    /// `len` bytes were asked for; before an error, the kernel did `done`.
    fn of(result: Result<usize, Errno>, len: usize, done: i64) -> Self {
        match result {
            Ok(_) => Copied {
                bytes: len,
                error: None,
            },
            Err(e) => Copied {
                bytes: done.max(0) as usize,
                error: Some(e),
            },
        }
    }
}

/// Installs `len` bytes from `src` as new pages at `dst`, atomically for each page. Takes the per-VMA lock, never
/// `mmap_lock`, from 6.9 on.
///
/// # Safety
///
/// `dst` must lie in a range registered by the caller, and `src` be readable for `len` bytes. Whoever may read `dst`
/// must be content with the bytes of `src`.
#[inline]
pub unsafe fn copy(fd: i32, dst: usize, src: usize, len: usize, wake: bool) -> Copied {
    let mode = if wake { 0 } else { COPY_MODE_DONTWAKE };
    let mut arg = Copy {
        dst: dst as u64,
        src: src as u64,
        len: len as u64,
        mode,
        copy: 0,
    };
    // SAFETY: the caller's promise.
    let result = unsafe { ioctl(fd, UFFDIO_COPY, &mut arg) };
    Copied::of(result, len, arg.copy)
}

/// Moves the pages of a range of private anonymous memory to `dst`, a huge page in one piece, and leaves the range empty (6.8). Both
/// ranges must be writable. As for [`copy`], it says how many bytes were moved.
///
/// # Safety
///
/// `dst` must lie in a range registered by the caller, and `src` be the caller's own memory, of which nothing is wanted any more. Whoever
/// may read `dst` must be content with the bytes of `src`.
pub unsafe fn move_pages(fd: i32, dst: usize, src: usize, len: usize) -> Copied {
    let mut arg = Move {
        dst: dst as u64,
        src: src as u64,
        len: len as u64,
        mode: MOVE_MODE_DONTWAKE,
        moved: 0,
    };
    // SAFETY: the caller's promise.
    let result = unsafe { ioctl(fd, UFFDIO_MOVE, &mut arg) };
    Copied::of(result, len, arg.moved)
}

/// The features that the kernel has, as a set of `FEATURE_…`.
pub fn features() -> Result<u64, Errno> {
    let fd = open(libc::O_CLOEXEC as u32 | USER_MODE_ONLY)?;
    let all = agree(fd, 0);
    // SAFETY: opened above, and nobody else's.
    unsafe { file::close(fd) };
    all
}

/// Wakes the threads that wait for pages of a range (monitor mode).
pub fn wake(fd: i32, addr: usize, len: usize) -> Result<(), Errno> {
    let mut range = UffdRange {
        start: addr as u64,
        len: len as u64,
    };
    // SAFETY: wakes threads only.
    unsafe { ioctl(fd, UFFDIO_WAKE, &mut range) }.map(drop)
}

/// Reads as many events as fit. `EAGAIN` where there is none and the descriptor does not block.
pub fn read_events(fd: i32, events: &mut [core::mem::MaybeUninit<Event>]) -> Result<usize, Errno> {
    let bytes = size_of_val(events);
    // SAFETY: the buffer is writable for its size; the kernel writes whole events.
    check(unsafe {
        syscall(
            libc::SYS_read,
            [fd as usize, events.as_mut_ptr() as usize, bytes, 0, 0, 0],
        )
    })
    .map(|n| n / size_of::<Event>())
}
