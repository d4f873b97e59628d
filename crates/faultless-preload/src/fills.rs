//! Calls that have the kernel write to the program's memory. The kernel must find no markers there: when it learns that it cannot write, it
//! may have taken a message off a queue, or reaped a child. So the markers of what a call may write to are removed before it is made.
//! ([`crate::short`] has calls that read as well as write; [`crate::memory`] has `read` and `pread`.)
//!
//! Markers never come back in writable mappings, so nothing has to be held for the time of a call.

#![allow(
    unsafe_code,
    reason = "functions of the C library, with its pointers and its promises"
)]

use crate::lend::{filled, filled_parts, filled_through, kept, may_be_kept, range};
use crate::probe;
use crate::real::{Real, real};
use faultless::live;
use faultless_sys::raw;
use libc::{mmsghdr, msghdr};
use std::ffi::{c_int, c_uint, c_void};

/// Functions with a buffer of a given length.
macro_rules! fill_buffers {
    ($($kind:ty: $name:ident($($arg:ident)*) fills $at:ident for $len:expr;)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name($($arg: usize),*) -> $kind {
            let real = real!($name as unsafe extern "C-unwind" fn($(fill_buffers!(@word $arg)),*) -> $kind);
            filled(&range($at as *const c_void, $len));
            // (That one is done.)
            filled_through(&[$(if $arg == $at { 0 } else { $arg }),*]);
            // SAFETY: the program's own arguments, as words.
            unsafe { real($($arg),*) }
        }
    )* };
    (@word $arg:ident) => { usize };
}

fill_buffers! {
    isize: recv(fd buf len flags) fills buf for len;
    isize: __recv_chk(fd buf len room flags) fills buf for len;
    isize: recvfrom(fd buf len flags from from_len) fills buf for len;
    isize: __recvfrom_chk(fd buf len room flags from from_len) fills buf for len;
    isize: __read(fd buf len) fills buf for len;
    isize: __pread64(fd buf len offset) fills buf for len;
    isize: __read_chk(fd buf len room) fills buf for len;
    isize: __pread_chk(fd buf len offset room) fills buf for len;
    isize: __pread64_chk(fd buf len offset room) fills buf for len;
    isize: getrandom(buf len flags) fills buf for len;
    isize: getdents64(fd buf len) fills buf for len;
    isize: getdirentries(fd buf len base) fills buf for len;
    isize: getdirentries64(fd buf len base) fills buf for len;
    isize: flistxattr(fd buf len) fills buf for len;
    isize: mq_receive(queue buf len priority) fills buf for len;
    // (The message's type comes first.)
    isize: msgrcv(id buf len kind flags) fills buf for len.saturating_add(size_of::<libc::c_long>());
    // Into large buffers, streams read directly.
    usize: fread(buf size count stream) fills buf for size.saturating_mul(count);
    usize: fread_unlocked(buf size count stream) fills buf for size.saturating_mul(count);
    usize: __fread_chk(buf room size count stream) fills buf for size.saturating_mul(count);
    usize: __fread_unlocked_chk(buf room size count stream) fills buf for size.saturating_mul(count);
    usize: getcwd(buf len) fills buf for len;
    usize: __getcwd_chk(buf len room) fills buf for len;
    c_int: getentropy(buf len) fills buf for len;
    c_int: epoll_wait(fd events count timeout) fills events for events_of(count);
    c_int: klogctl(command to len) fills to for len & 0xFFFF_FFFF;
    c_int: poll(fds count timeout) fills fds for count.saturating_mul(size_of::<libc::pollfd>());
    c_int: __poll(fds count timeout) fills fds for count.saturating_mul(size_of::<libc::pollfd>());
    c_int: __poll_chk(fds count timeout room) fills fds for count.saturating_mul(size_of::<libc::pollfd>());
}

/// The bytes that so many events take. The count is an `int`.
pub(crate) fn events_of(count: usize) -> usize {
    let count = usize::try_from(count as c_int).unwrap_or(0);
    count * size_of::<libc::epoll_event>()
}

/// Functions whose pointers lead to something short.
macro_rules! fill_short {
    ($kind:ty; $($name:ident($($arg:ident)*);)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name($($arg: usize),*) -> $kind {
            let real = real!($name as unsafe extern "C-unwind" fn($(fill_short!(@word $arg)),*) -> $kind);
            filled_through(&[$($arg),*]);
            // SAFETY: the program's own arguments, as words.
            unsafe { real($($arg),*) }
        }
    )* };
    (@word $arg:ident) => { usize };
}

fill_short! { c_int;
    accept(fd address len);
    accept4(fd address len flags);
    getsockname(fd address len);
    getpeername(fd address len);
    getsockopt(fd level option value len);
    wait(status);
    waitpid(pid status options);
    wait3(status options usage);
    wait4(pid status options usage);
    waitid(kind id info options);
    select(count read write except timeout);
    __select(count read write except timeout);
    pipe(ends);
    pipe2(ends flags);
    socketpair(domain kind protocol ends);
    sigpending(set);
    fstat(fd to);
    fstat64(fd to);
    __fxstat(version fd to);
    __fxstat64(version fd to);
    fstatfs(fd to);
    fstatfs64(fd to);
    fstatvfs(fd to);
    fstatvfs64(fd to);
    getitimer(which to);
    timer_gettime(timer to);
    timerfd_gettime(fd to);
    clock_getres(clock to);
    clock_gettime(clock to);
    // (Where the machine's clock cannot be read without a system call.)
    gettimeofday(to zone);
    timespec_get(to base);
    clock_adjtime(clock to);
    adjtimex(to);
    ntp_adjtime(to);
    getrusage(of to);
    getrlimit(resource to);
    getrlimit64(resource to);
    sysinfo(to);
    uname(to);
    getresuid(real effective saved);
    getresgid(real effective saved);
    getgroups(count to);
    __getgroups_chk(count to room);
    sched_getaffinity(pid size to);
    sched_getparam(pid to);
    sched_rr_get_interval(pid to);
    pthread_getaffinity_np(thread size to);
    pthread_getname_np(thread to len);
    thrd_sleep(time left);
    ptsname_r(fd to len);
    __ptsname_r_chk(fd to len room);
    ttyname_r(fd to len);
    __ttyname_r_chk(fd to len room);
    eventfd_read(fd to);
    mq_getattr(queue to);
    semctl(id number command argument);
    capget(header to);
}

fill_short! { isize;
    times(to);
    sendfile(to from offset count);
    sendfile64(to from offset count);
    splice(from from_offset to to_offset len flags);
    copy_file_range(from from_offset to to_offset len flags);
    ptrace(request pid address data);
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn recvmsg(
    fd: c_int,
    message: *mut msghdr,
    flags: c_int,
) -> isize {
    let real = real!(recvmsg as unsafe extern "C-unwind" fn(c_int, *mut msghdr, c_int) -> isize);
    filled_message(message);
    // SAFETY: the program's own arguments; the kernel checks the pointers.
    unsafe { real(fd, message, flags) }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C-unwind" fn recvmmsg(
    fd: c_int,
    messages: *mut mmsghdr,
    count: c_uint,
    flags: c_int,
    timeout: usize,
) -> c_int {
    type Recvmmsg = unsafe extern "C-unwind" fn(c_int, *mut mmsghdr, c_uint, c_int, usize) -> c_int;
    let real = real!(recvmmsg as Recvmmsg);
    filled_messages(messages, count, timeout);
    // SAFETY: the program's own arguments; the kernel checks the pointers.
    unsafe { real(fd, messages, count, flags, timeout) }
}

/// A message is to be received: where its header says, and into the header.
pub(crate) fn filled_message(message: *mut msghdr) {
    if live::any_writable() {
        filled_through(&[message as usize]);
        if let Some(header) = probe::copy(message) {
            filled_by(&header);
        }
    }
}

fn filled_by(header: &msghdr) {
    filled(&range(header.msg_name, header.msg_namelen as usize));
    filled(&range(header.msg_control, header.msg_controllen));
    filled_parts(header.msg_iov, header.msg_iovlen);
}

/// The same for some messages. (The kernel takes so many at most.)
pub(crate) fn filled_messages(messages: *mut mmsghdr, count: c_uint, timeout: usize) {
    if !live::any_writable() {
        return;
    }
    let count = count.min(libc::UIO_MAXIOV as c_uint) as usize;
    filled_through(&[timeout]);
    filled(&range(messages.cast(), count * size_of::<mmsghdr>()));
    if probe::readable(messages as usize, count * size_of::<mmsghdr>()) {
        for i in 0..count {
            // SAFETY: found to be there; the program's own array.
            filled_by(&unsafe { messages.add(i).read_unaligned() }.msg_hdr);
        }
    }
}

/// Random bytes. Not every C library that this one fits has it, and a program that finds it here counts on it.
#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn arc4random_buf(buf: usize, len: usize) {
    filled(&range(buf as *const c_void, len));
    #[unsafe(link_section = "faultless_real")]
    static REAL: Real = Real::new(c"arc4random_buf");
    if let Some(real) = REAL.found() {
        // SAFETY: the C library's function of that name has this type; the program's own arguments.
        unsafe {
            let real: unsafe extern "C-unwind" fn(usize, usize) = std::mem::transmute(real);
            return real(buf, len);
        }
    }
    let mut at = buf;
    let end = buf.saturating_add(len);
    while at < end {
        let args = [at, end - at, 0, 0, 0, 0];
        // SAFETY: the program's own buffer; the kernel checks the pointer.
        match raw::check(unsafe { raw::syscall(libc::SYS_getrandom, args) }) {
            Ok(got) => at += got,
            Err(e) if e.0 == libc::EINTR => {}
            // As the C library's: it never returns without them.
            // SAFETY: ends the process.
            Err(_) => unsafe { libc::abort() },
        }
    }
}

/// Functions that give memory to a user which bears no markers: a stream gets a buffer, a thread or the kernel gets a stack.
macro_rules! keep_memory {
    ($($name:ident($($arg:ident)*) keeps $at:ident for $len:expr, $reason:expr;)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name($($arg: usize),*) -> c_int {
            let real = real!($name as unsafe extern "C-unwind" fn($(keep_memory!(@word $arg)),*) -> c_int);
            if may_be_kept() {
                kept(&range($at as *const c_void, $len), $reason);
            }
            // SAFETY: the program's own arguments, as words.
            unsafe { real($($arg),*) }
        }
    )* };
    (@word $arg:ident) => { usize };
}

const BUFFER: &str = "it is the buffer of a stream (setvbuf)";
pub(crate) const STACK: &str = "it is the stack of a thread";

keep_memory! {
    setvbuf(stream buf mode len) keeps buf for len, BUFFER;
    // (These return nothing.)
    setbuf(stream buf) keeps buf for libc::BUFSIZ as usize, BUFFER;
    setbuffer(stream buf len) keeps buf for len, BUFFER;
    pthread_attr_setstack(attributes at len) keeps at for len, STACK;
}

/// A stack that ends at an address.
#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn pthread_attr_setstackaddr(attributes: usize, end: usize) -> c_int {
    let real =
        real!(pthread_attr_setstackaddr as unsafe extern "C-unwind" fn(usize, usize) -> c_int);
    if may_be_kept() {
        kept(&(end.saturating_sub(1)..end), STACK);
    }
    // SAFETY: the program's own arguments.
    unsafe { real(attributes, end) }
}
