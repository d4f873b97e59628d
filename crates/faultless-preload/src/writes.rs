//! Calls that hand the kernel memory to write or send. Each makes exactly one call of the C library's.

#![allow(
    unsafe_code,
    reason = "functions of the C library, with its pointers and its promises"
)]

use crate::lend::{Given, GivenVector, filled_parts, vector_reaches};
use crate::probe;
use crate::real::real;
use crate::state::idle;
use faultless::standin;
use libc::{iovec, mmsghdr, msghdr, sockaddr, socklen_t};
use std::ffi::{c_int, c_uint, c_void};

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn write(fd: c_int, buf: *const c_void, len: usize) -> isize {
    let real = real!(write as unsafe extern "C-unwind" fn(c_int, *const c_void, usize) -> isize);
    standin::forsake();
    if idle() {
        // SAFETY: the program's own arguments.
        return unsafe { real(fd, buf, len) };
    }
    let given = Given::new(buf, len);
    // SAFETY: the program's own arguments; the kernel checks the pointer.
    unsafe { real(fd, given.at(), len) }
}

macro_rules! positioned_writes {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C-unwind" fn $name(fd: c_int, buf: *const c_void, len: usize, offset: i64) -> isize {
            let real = real!($name as unsafe extern "C-unwind" fn(c_int, *const c_void, usize, i64) -> isize);
            let given = Given::new(buf, len);
            // SAFETY: the program's own arguments; the kernel checks the pointer.
            unsafe { real(fd, given.at(), len, offset) }
        }
    )* };
}
positioned_writes! { pwrite pwrite64 }

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn send(fd: c_int, buf: *const c_void, len: usize, flags: c_int) -> isize {
    let real =
        real!(send as unsafe extern "C-unwind" fn(c_int, *const c_void, usize, c_int) -> isize);
    let given = Given::new(buf, len);
    // SAFETY: the program's own arguments; the kernel checks the pointer.
    unsafe { real(fd, given.at(), len, flags) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn sendto(
    fd: c_int,
    buf: *const c_void,
    len: usize,
    flags: c_int,
    to: *const sockaddr,
    to_len: socklen_t,
) -> isize {
    type Sendto = unsafe extern "C-unwind" fn(
        c_int,
        *const c_void,
        usize,
        c_int,
        *const sockaddr,
        socklen_t,
    ) -> isize;
    let real = real!(sendto as Sendto);
    let (given, address) = (Given::new(buf, len), Given::new(to.cast(), to_len as usize));
    // SAFETY: the program's own arguments; the kernel checks the pointers.
    unsafe { real(fd, given.at(), len, flags, address.at().cast(), to_len) }
}

/// Makes a call with a vector that the kernel can read.
fn with_vector(
    vector: *const iovec,
    count: usize,
    call: impl FnOnce(*const iovec) -> isize,
) -> isize {
    if !vector_reaches(vector, count) {
        return call(vector);
    }
    match GivenVector::new(vector, count) {
        Some(given) => call(given.parts()),
        None => call(vector),
    }
}

/// The number of parts of a vector; what is no number of parts is refused by the kernel.
fn parts(count: c_int) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn writev(
    fd: c_int,
    vector: *const iovec,
    count: c_int,
) -> isize {
    let real = real!(writev as unsafe extern "C-unwind" fn(c_int, *const iovec, c_int) -> isize);
    // SAFETY: the program's own arguments; the kernel checks the pointers.
    with_vector(vector, parts(count), |v| unsafe { real(fd, v, count) })
}

macro_rules! positioned_vectors {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C-unwind" fn $name(fd: c_int, vector: *const iovec, count: c_int, offset: i64) -> isize {
            let real = real!($name as unsafe extern "C-unwind" fn(c_int, *const iovec, c_int, i64) -> isize);
            // SAFETY: the program's own arguments; the kernel checks the pointers.
            with_vector(vector, parts(count), |v| unsafe { real(fd, v, count, offset) })
        }
    )* };
}
positioned_vectors! { pwritev pwritev64 }

macro_rules! flagged_vectors {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        pub(crate) unsafe extern "C-unwind" fn $name(fd: c_int, vector: *const iovec, count: c_int, offset: i64, flags: c_int) -> isize {
            let real = real!($name as unsafe extern "C-unwind" fn(c_int, *const iovec, c_int, i64, c_int) -> isize);
            // SAFETY: the program's own arguments; the kernel checks the pointers.
            with_vector(vector, parts(count), |v| unsafe { real(fd, v, count, offset, flags) })
        }
    )* };
}
flagged_vectors! { pwritev2 pwritev64v2 }

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn vmsplice(
    fd: c_int,
    vector: *const iovec,
    count: usize,
    flags: c_uint,
) -> isize {
    let real =
        real!(vmsplice as unsafe extern "C-unwind" fn(c_int, *const iovec, usize, c_uint) -> isize);
    if vector_reaches(vector, count) && !crate::state::foreign() {
        // The pipe keeps the pages themselves, for as long as it likes: they must be the file's.
        hand_back_vector(
            vector,
            count,
            "the program spliced it into a pipe (vmsplice)",
        );
    }
    // SAFETY: the program's own arguments; the kernel checks the pointers.
    unsafe { real(fd, vector, count, flags) }
}

/// Hands back what a vector points to, whose array was found to be there.
fn hand_back_vector(vector: *const iovec, count: usize, reason: &'static str) {
    for i in 0..count {
        // SAFETY: found to be there by `vector_reaches`.
        if let Some(part) = probe::copy(unsafe { vector.add(i) }) {
            let range = crate::lend::range(part.iov_base, part.iov_len);
            crate::state::lock().hand_back_over(&range, reason);
        }
    }
}

/// `process_vm_readv` and `process_vm_writev`.
type BetweenProcesses = unsafe extern "C-unwind" fn(
    libc::pid_t,
    *const iovec,
    usize,
    *const iovec,
    usize,
    usize,
) -> isize;

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn process_vm_writev(
    pid: libc::pid_t,
    local: *const iovec,
    local_count: usize,
    remote: *const iovec,
    remote_count: usize,
    flags: usize,
) -> isize {
    let real = real!(process_vm_writev as BetweenProcesses);
    if pid as u32 == faultless_sys::raw::getpid() {
        filled_parts(remote, remote_count);
    }
    // SAFETY: the program's own arguments; the kernel checks the pointers.
    with_vector(local, local_count, |v| unsafe {
        real(pid, v, local_count, remote, remote_count, flags)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn process_vm_readv(
    pid: libc::pid_t,
    local: *const iovec,
    local_count: usize,
    remote: *const iovec,
    remote_count: usize,
    flags: usize,
) -> isize {
    let real = real!(process_vm_readv as BetweenProcesses);
    filled_parts(local, local_count);
    // SAFETY: the program's own arguments; the kernel checks the pointers.
    let call = |v| unsafe { real(pid, local, local_count, v, remote_count, flags) };
    if pid as u32 == faultless_sys::raw::getpid() {
        with_vector(remote, remote_count, call)
    } else {
        call(remote)
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn sendmsg(
    fd: c_int,
    message: *const msghdr,
    flags: c_int,
) -> isize {
    let real = real!(sendmsg as unsafe extern "C-unwind" fn(c_int, *const msghdr, c_int) -> isize);
    // SAFETY: the program's own arguments; the kernel checks the pointers.
    let call = |message| unsafe { real(fd, message, flags) };
    if idle() {
        return call(message);
    }
    let Some(mut copy) = probe::copy(message) else {
        return call(message);
    };
    let name = Given::new(copy.msg_name, copy.msg_namelen as usize);
    let control = Given::new(copy.msg_control, copy.msg_controllen);
    copy.msg_name = name.at().cast_mut();
    copy.msg_control = control.at().cast_mut();
    with_vector(copy.msg_iov, copy.msg_iovlen, |v| {
        copy.msg_iov = v.cast_mut();
        call(&copy)
    })
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn sendmmsg(
    fd: c_int,
    messages: *mut mmsghdr,
    count: c_uint,
    flags: c_int,
) -> c_int {
    let real =
        real!(sendmmsg as unsafe extern "C-unwind" fn(c_int, *mut mmsghdr, c_uint, c_int) -> c_int);
    // The kernel sends no more at a time.
    let count = count.min(libc::UIO_MAXIOV as c_uint);
    if idle() || !any_message_reaches(messages, count as usize) {
        // SAFETY: the program's own arguments; the kernel checks the pointers.
        return unsafe { real(fd, messages, count, flags) };
    }
    // One by one, as the kernel does; each is one call.
    for sent in 0..count {
        // SAFETY: an element of the array, which was found to be there.
        let at = unsafe { messages.add(sent as usize) };
        let Some(one) = probe::copy(at) else {
            return sent as c_int;
        };
        // SAFETY: the program's own message.
        let took = unsafe { sendmsg(fd, &raw const (*at).msg_hdr, flags) };
        if took < 0 {
            return if sent > 0 { sent as c_int } else { -1 };
        }
        // SAFETY: a field of the element; it is written after the kernel found that it can be.
        unsafe {
            let len = &raw mut (*at).msg_len;
            if probe::writable(len as usize) {
                len.write(took as c_uint);
            }
        }
        let whole = (0..one.msg_hdr.msg_iovlen)
            // SAFETY: the kernel has read the vector just now.
            .filter_map(|i| probe::copy(unsafe { one.msg_hdr.msg_iov.add(i) }))
            .fold(0usize, |sum, part| sum.saturating_add(part.iov_len));
        if (took as usize) < whole {
            return sent as c_int + 1;
        }
    }
    count as c_int
}

/// Whether one of some messages points to memory of ours.
fn any_message_reaches(messages: *const mmsghdr, count: usize) -> bool {
    probe::readable(messages as usize, count * size_of::<mmsghdr>())
        && (0..count).any(|i| {
            // SAFETY: an element of an array that was found to be there.
            let one = unsafe { messages.add(i).read_unaligned() }.msg_hdr;
            let part =
                |at: *mut c_void, len| crate::mappings::reaches(&crate::lend::range(at, len));
            vector_reaches(one.msg_iov, one.msg_iovlen)
                || part(one.msg_name, one.msg_namelen as usize)
                || part(one.msg_control, one.msg_controllen)
        })
}
