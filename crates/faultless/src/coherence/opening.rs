//! Opening a program's file anew, for the engine's own reads.

use crate::base::area::Area;
use crate::space::fds::Fd;
use faultless_sys::mem::PAGE;
use faultless_sys::{Errno, file, raw};
use std::io;

/// Opens the file behind `fd` anew, for reading only: a lease, and direct I/O, belong to an open file of our own.
pub(crate) fn reopen(fd: i32, direct: bool) -> io::Result<i32> {
    // (Without the heap: a copy of the process may be in a signal handler here.)
    let mut path = [0; 64];
    let path = file::numbered_path("/proc/thread-self/fd/", fd, &mut path);
    let flags = libc::O_RDONLY
        | libc::O_CLOEXEC
        | libc::O_NONBLOCK
        | if direct { libc::O_DIRECT } else { 0 };
    // Loads from a mapping change no access time. (Only the owner may ask for that.)
    let number = match file::open(path, flags | libc::O_NOATIME) {
        Err(Errno(libc::EPERM)) => file::open(path, flags)?,
        other => other?,
    };
    Fd::came(number);
    Ok(number)
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
    let Ok(page) = Area::new(PAGE) else {
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
