//! `read` and `pread`. They fill the program's memory (see [`crate::fills`]). And debuggers, profilers and crash reporters read the
//! process's own memory by them, from `/proc/PID/mem`, where an absent page of ours is `EIO`: such a read is made again at the kernel's own
//! mapping of the same bytes.

#![allow(
    unsafe_code,
    reason = "functions of the C library, with its pointers and its promises"
)]

use crate::lend::{filled, opened, range};
use crate::mappings::reaches;
use crate::real::{Errno, errno, real, returned, set_errno};
use crate::state::idle;
use faultless::standin;
use faultless_sys::raw;
use std::ffi::{c_int, c_void};
use std::io::Write;

/// Formats a short name into an array, with zeros behind it. Returns its length.
fn format(into: &mut [u8; 48], name: std::fmt::Arguments<'_>) -> usize {
    let room = into.len() - 1;
    let mut rest = &mut into[..room];
    let _ = rest.write_fmt(name);
    room - rest.len()
}

/// Whether a descriptor is of this process's `/proc/PID/mem`.
fn is_own_memory(fd: c_int) -> bool {
    let (mut name, mut own, mut link) = ([0; 48], [0; 48], [0u8; 64]);
    format(&mut name, format_args!("/proc/self/fd/{fd}"));
    let len = format(&mut own, format_args!("/proc/{}/", raw::getpid()));
    let args = [
        libc::AT_FDCWD as usize,
        name.as_ptr() as usize,
        link.as_mut_ptr() as usize,
        link.len(),
        0,
        0,
    ];
    // SAFETY: a path that ends with a zero; a buffer that is writable for its length.
    let got = raw::check(unsafe { raw::syscall(libc::SYS_readlinkat, args) }).unwrap_or(0);
    link[..got].starts_with(&own[..len]) && link[..got].ends_with(b"/mem")
}

/// Reads `len` bytes of this process's memory at `offset` again, where `result` says that some of them were absent.
fn again_from_memory(
    fd: c_int,
    buf: *mut c_void,
    len: usize,
    offset: i64,
    result: isize,
) -> Option<isize> {
    let at = offset as usize as *const c_void;
    if result == len as isize || !reaches(&range(at, len)) {
        return None;
    }
    let errno = Errno::keep();
    if !is_own_memory(fd) {
        return None;
    }
    let memory = range(at, len);
    let lent = standin::lend(&memory);
    let opened = opened(&memory);
    let at = match &lent {
        Some(lent) => lent.at(),
        None if opened.is_some() => memory.start,
        None => return None,
    };
    drop(errno);
    // SAFETY: the program's own buffer; the kernel checks the pointer.
    Some(returned(raw::check(unsafe {
        raw::syscall(
            libc::SYS_pread64,
            [fd as usize, buf as usize, len, at, 0, 0],
        )
    })))
}

macro_rules! positioned_reads {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C-unwind" fn $name(fd: c_int, buf: *mut c_void, len: usize, offset: i64) -> isize {
            let real = real!($name as unsafe extern "C-unwind" fn(c_int, *mut c_void, usize, i64) -> isize);
            filled(&range(buf, len));
            // SAFETY: the program's own arguments.
            let result = unsafe { real(fd, buf, len, offset) };
            if idle() {
                return result;
            }
            again_from_memory(fd, buf, len, offset, result).unwrap_or(result)
        }
    )* };
}
positioned_reads! { pread pread64 }

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn read(fd: c_int, buf: *mut c_void, len: usize) -> isize {
    let real = real!(read as unsafe extern "C-unwind" fn(c_int, *mut c_void, usize) -> isize);
    filled(&range(buf, len));
    // SAFETY: the program's own arguments.
    let result = unsafe { real(fd, buf, len) };
    if idle() || result >= 0 || errno() != libc::EIO {
        return result;
    }
    // SAFETY: no pointers.
    let offset = unsafe { libc::lseek(fd, 0, libc::SEEK_CUR) };
    match again_from_memory(fd, buf, len, offset, result) {
        Some(got) if got > 0 => {
            // SAFETY: no pointers.
            unsafe { libc::lseek(fd, got as i64, libc::SEEK_CUR) };
            got
        }
        _ => {
            set_errno(libc::EIO);
            result
        }
    }
}
