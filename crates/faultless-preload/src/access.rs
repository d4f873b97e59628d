//! Calls that hand the kernel memory to read.
//!
//! The kernel cannot be interrupted by SIGBUS in the middle of a system call: an absent page of ours is EFAULT to it. So what
//! is written or sent is read in and held for the time of the call; and a call that reads something short, a path or an
//! address, is made again if it says EFAULT, with the pages in place.

#![allow(
    unsafe_code,
    reason = "functions of the C library, with its pointers and its promises"
)]

use crate::mappings::reaches;
use crate::real::{Errno, errno, real, set_errno};
use crate::signals;
use crate::state::{self, STANDING};
use faultless::standin::{self, Held};
use faultless_run::Efaults;
use faultless_sys::mem::PAGE;
use faultless_sys::{perf, raw};
use libc::{iovec, mmsghdr, msghdr, sockaddr, socklen_t};
use std::ffi::{c_char, c_int, c_long, c_uint, c_void};
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};

/// Most bytes that are held for one call.
static CHUNK: AtomicUsize = AtomicUsize::new(1 << 20);
/// What is not held, a path, an address, an attribute, is not longer.
const SHORT: usize = 128 << 10;
/// How often a call is made again.
const TRIES: usize = 4;

/// Says how much one call may hold: little enough that many calls can, in the budget as it is now.
pub(crate) fn set_chunk(bytes: usize) {
    CHUNK.store(bytes, Ordering::Relaxed);
}

/// How much one call may hold.
fn chunk() -> usize {
    CHUNK.load(Ordering::Relaxed)
}

// ---- what is counted

/// EFAULT from one function, counted without a lock.
pub(crate) struct Counter {
    name: &'static str,
    count: AtomicU64,
    mended: bool,
    next: AtomicPtr<Counter>,
}

static COUNTERS: AtomicPtr<Counter> = AtomicPtr::new(std::ptr::null_mut());

impl Counter {
    pub(crate) const fn new(name: &'static str, mended: bool) -> Self {
        Counter {
            name,
            count: AtomicU64::new(0),
            mended,
            next: AtomicPtr::new(std::ptr::null_mut()),
        }
    }

    pub(crate) fn add(&'static self) {
        if self.count.fetch_add(1, Ordering::Relaxed) > 0 {
            return;
        }
        // The first time: into the list.
        let me = std::ptr::from_ref(self).cast_mut();
        let mut head = COUNTERS.load(Ordering::Acquire);
        loop {
            self.next.store(head, Ordering::Relaxed);
            match COUNTERS.compare_exchange(head, me, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(other) => head = other,
            }
        }
    }
}

/// What was counted.
pub(crate) fn efaults() -> Vec<Efaults> {
    let mut all = Vec::new();
    let mut at = COUNTERS.load(Ordering::Acquire);
    // SAFETY: counters are static.
    while let Some(counter) = unsafe { at.as_ref() } {
        all.push(Efaults {
            call: counter.name.to_owned(),
            count: counter.count.load(Ordering::Relaxed),
            mended: counter.mended,
        });
        at = counter.next.load(Ordering::Acquire);
    }
    for (call, counter, pid) in WATCHED.get().into_iter().flatten() {
        // A child's copy counts its parent's; and the program may have put something else there.
        if *pid != raw::getpid() || !counter.is_there() {
            continue;
        }
        match counter.read() {
            Ok(count) if count > 0 => all.push(Efaults {
                call: call.clone(),
                count,
                mended: false,
            }),
            _ => {}
        }
    }
    all.sort_by(|a, b| a.call.cmp(&b.call));
    all
}

/// EFAULT of system calls, whoever made them: counted by the kernel.
static WATCHED: OnceLock<Vec<(String, perf::Counter, u32)>> = OnceLock::new();

static WATCHING: AtomicBool = AtomicBool::new(false);

/// Whether a number is the descriptor of one of these counters.
#[inline]
pub(crate) fn watches(fd: c_int) -> bool {
    WATCHING.load(Ordering::Relaxed) && is_watched(fd)
}

#[cold]
fn is_watched(fd: c_int) -> bool {
    let mut all = WATCHED.get().into_iter().flatten();
    all.any(|(_, counter, _)| counter.number() == fd && counter.is_there())
}

/// Has the kernel count them from now on, in this thread and those that it starts.
pub(crate) fn watch() {
    /// Numbers of these descriptors are at least this, out of the program's way.
    const FLOOR: i32 = 500;
    let Some(settings) = state::settings().filter(|s| !s.efault_tracepoints.is_empty()) else {
        return;
    };
    let open = |(call, id): &(String, u64)| {
        let mut counter = perf::Counter::tracepoint(*id, perf::Scope::ThreadAndDescendants).ok()?;
        counter.filter(c"ret == -14").ok()?;
        counter.lift(FLOOR);
        Some((call.clone(), counter, raw::getpid()))
    };
    if let Some(all) = settings.efault_tracepoints.iter().map(open).collect() {
        let _ = WATCHED.set(all);
        WATCHING.store(true, Ordering::Relaxed);
    }
}

/// Whether they are counted.
pub(crate) fn watched() -> bool {
    WATCHED.get().is_some()
}

// ---- what is written and sent

fn range(at: *const c_void, len: usize) -> Range<usize> {
    at as usize..(at as usize).saturating_add(len)
}

/// Whether nothing is taken over: then every function here passes its call on.
#[inline(always)]
fn idle() -> bool {
    STANDING.load(Ordering::Relaxed) == 0
}

/// Makes a call that reads `len` bytes at `at` and returns how many it took, in parts whose pages are held meanwhile. The call
/// is given an address, a length, and how much was taken before; a negative result is an error.
#[inline]
pub(crate) fn held(
    at: *const c_void,
    len: usize,
    mut call: impl FnMut(*const c_void, usize, usize) -> isize,
) -> isize {
    if !reaches(&range(at, len)) {
        return call(at, len, 0);
    }
    let mut done = 0;
    loop {
        let part = (len - done).min(chunk());
        // SAFETY: inside the program's own buffer.
        let from = unsafe { at.byte_add(done) };
        let mut pages = Held::new();
        pages.hold(range(from, part));
        let took = call(from, part, done);
        drop(pages);
        if took < 0 {
            return if done > 0 { done as isize } else { took };
        }
        done += took as usize;
        if (took as usize) < part || done == len {
            return done as isize;
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn write(fd: c_int, buf: *const c_void, len: usize) -> isize {
    let real = real!(write as unsafe extern "C-unwind" fn(c_int, *const c_void, usize) -> isize);
    if idle() {
        // SAFETY: the program's own arguments.
        return unsafe { real(fd, buf, len) };
    }
    // SAFETY: the program's own arguments, in parts.
    held(buf, len, |at, n, _| unsafe { real(fd, at, n) })
}

macro_rules! positioned_writes {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(fd: c_int, buf: *const c_void, len: usize, offset: i64) -> isize {
            let real = real!($name as unsafe extern "C-unwind" fn(c_int, *const c_void, usize, i64) -> isize);
            // SAFETY: the program's own arguments, in parts.
            held(buf, len, |at, n, done| unsafe { real(fd, at, n, offset + done as i64) })
        }
    )* };
}
positioned_writes! { pwrite pwrite64 }

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn send(fd: c_int, buf: *const c_void, len: usize, flags: c_int) -> isize {
    let real =
        real!(send as unsafe extern "C-unwind" fn(c_int, *const c_void, usize, c_int) -> isize);
    // SAFETY: the program's own arguments, in parts.
    held(buf, len, |at, n, _| unsafe { real(fd, at, n, flags) })
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn sendto(
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
    let mut address = Held::new();
    if reaches(&range(to.cast(), to_len as usize)) {
        address.hold(range(to.cast(), to_len as usize));
    }
    // SAFETY: the program's own arguments, in parts.
    held(buf, len, |at, n, _| unsafe {
        real(fd, at, n, flags, to, to_len)
    })
}

/// The parts of a vector, where all of it can be looked at.
fn parts<'a>(vector: *const iovec, count: usize) -> &'a [iovec] {
    if vector.is_null() || count == 0 || count > libc::UIO_MAXIOV as usize {
        return &[];
    }
    // SAFETY: the program's own vector; if it lies in a mapping of ours, this thread reads it in.
    unsafe { std::slice::from_raw_parts(vector, count) }
}

/// Whether a vector, or a part of it, may lie in a mapping of ours.
fn vector_reaches(vector: *const iovec, count: usize) -> bool {
    STANDING.load(Ordering::Relaxed) != 0
        && parts(vector, count)
            .iter()
            .any(|p| reaches(&range(p.iov_base, p.iov_len)))
}

/// Makes a call with a vector whose pages are held meanwhile: with as much of it as can be held at once.
fn held_vector(
    vector: *const iovec,
    count: usize,
    call: impl FnOnce(*const iovec, usize) -> isize,
) -> isize {
    let mut pages = Vec::new();
    let mut short = Vec::with_capacity(count);
    let mut room = chunk();
    for part in parts(vector, count) {
        let mut part = *part;
        if reaches(&range(part.iov_base, part.iov_len)) {
            part.iov_len = part.iov_len.min(room);
            room -= part.iov_len;
            let mut held = Held::new();
            held.hold(range(part.iov_base, part.iov_len));
            pages.push(held);
        }
        short.push(part);
        if room == 0 {
            break;
        }
    }
    call(short.as_ptr(), short.len())
}

/// Writes a vector as `call` would, part after part until all is written or a call takes less than it was given.
fn write_vector(
    vector: *const iovec,
    count: c_int,
    mut call: impl FnMut(*const iovec, c_int, i64) -> isize,
) -> isize {
    if !vector_reaches(vector, count as usize) {
        return call(vector, count, 0);
    }
    let mut rest: Vec<iovec> = parts(vector, count as usize).to_vec();
    let mut done = 0;
    loop {
        let mut given = 0;
        let took = held_vector(rest.as_ptr(), rest.len(), |v, n| {
            given = parts(v, n).iter().map(|p| p.iov_len).sum();
            call(v, n as c_int, done as i64)
        });
        if took < 0 {
            return if done > 0 { done as isize } else { took };
        }
        done += took as usize;
        let mut gone = took as usize;
        rest.retain_mut(|p| {
            let n = p.iov_len.min(gone);
            // SAFETY: inside the program's own buffer.
            p.iov_base = unsafe { p.iov_base.byte_add(n) };
            p.iov_len -= n;
            gone -= n;
            p.iov_len > 0
        });
        if (took as usize) < given || rest.is_empty() {
            return done as isize;
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn writev(fd: c_int, vector: *const iovec, count: c_int) -> isize {
    let real = real!(writev as unsafe extern "C-unwind" fn(c_int, *const iovec, c_int) -> isize);
    // SAFETY: the program's own arguments, in parts.
    write_vector(vector, count, |v, n, _| unsafe { real(fd, v, n) })
}

macro_rules! positioned_vectors {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(fd: c_int, vector: *const iovec, count: c_int, offset: i64) -> isize {
            let real = real!($name as unsafe extern "C-unwind" fn(c_int, *const iovec, c_int, i64) -> isize);
            // SAFETY: the program's own arguments, in parts.
            write_vector(vector, count, |v, n, done| unsafe { real(fd, v, n, offset + done) })
        }
    )* };
}
positioned_vectors! { pwritev pwritev64 }

macro_rules! flagged_vectors {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(fd: c_int, vector: *const iovec, count: c_int, offset: i64, flags: c_int) -> isize {
            let real = real!($name as unsafe extern "C-unwind" fn(c_int, *const iovec, c_int, i64, c_int) -> isize);
            // An offset of −1 is the file's own.
            // SAFETY: the program's own arguments, in parts.
            write_vector(vector, count, |v, n, done| unsafe { real(fd, v, n, if offset < 0 { offset } else { offset + done }, flags) })
        }
    )* };
}
flagged_vectors! { pwritev2 pwritev64v2 }

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn vmsplice(
    fd: c_int,
    vector: *const iovec,
    count: usize,
    flags: c_uint,
) -> isize {
    let real =
        real!(vmsplice as unsafe extern "C-unwind" fn(c_int, *const iovec, usize, c_uint) -> isize);
    if !vector_reaches(vector, count) {
        // SAFETY: the program's own arguments.
        return unsafe { real(fd, vector, count, flags) };
    }
    // SAFETY: as above, less of it.
    held_vector(vector, count, |v, n| unsafe { real(fd, v, n, flags) })
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn process_vm_writev(
    pid: libc::pid_t,
    local: *const iovec,
    local_count: usize,
    remote: *const iovec,
    remote_count: usize,
    flags: usize,
) -> isize {
    type Call = unsafe extern "C-unwind" fn(
        libc::pid_t,
        *const iovec,
        usize,
        *const iovec,
        usize,
        usize,
    ) -> isize;
    let real = real!(process_vm_writev as Call);
    if !vector_reaches(local, local_count) {
        // SAFETY: the program's own arguments.
        return unsafe { real(pid, local, local_count, remote, remote_count, flags) };
    }
    // SAFETY: as above, less of it.
    held_vector(local, local_count, |v, n| unsafe {
        real(pid, v, n, remote, remote_count, flags)
    })
}

/// Holds what a message has beside its bytes.
fn hold_rest(message: &msghdr) -> [Held; 2] {
    let hold = |at: *const c_void, len: usize| {
        let mut held = Held::new();
        if reaches(&range(at, len)) {
            held.hold(range(at, len));
        }
        held
    };
    [
        hold(message.msg_name, message.msg_namelen as usize),
        hold(message.msg_control, message.msg_controllen),
    ]
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn sendmsg(fd: c_int, message: *const msghdr, flags: c_int) -> isize {
    let real = real!(sendmsg as unsafe extern "C-unwind" fn(c_int, *const msghdr, c_int) -> isize);
    if STANDING.load(Ordering::Relaxed) == 0 || message.is_null() {
        // SAFETY: the program's own arguments.
        return unsafe { real(fd, message, flags) };
    }
    // SAFETY: the program's own structure.
    let mut copy = unsafe { *message };
    let elsewhere = !vector_reaches(copy.msg_iov, copy.msg_iovlen)
        && !reaches(&range(copy.msg_name, copy.msg_namelen as usize))
        && !reaches(&range(copy.msg_control, copy.msg_controllen));
    if elsewhere || copy.msg_iovlen > libc::UIO_MAXIOV as usize {
        // SAFETY: the program's own arguments.
        return unsafe { real(fd, message, flags) };
    }
    let _rest = hold_rest(&copy);
    write_vector(copy.msg_iov, copy.msg_iovlen as c_int, |v, n, done| {
        (copy.msg_iov, copy.msg_iovlen) = (v.cast_mut(), n as usize);
        if done > 0 {
            // What comes with a message comes with its first byte.
            (copy.msg_control, copy.msg_controllen) = (std::ptr::null_mut(), 0);
        }
        // SAFETY: a copy of the program's structure.
        unsafe { real(fd, &copy, flags) }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn sendmmsg(
    fd: c_int,
    messages: *mut mmsghdr,
    count: c_uint,
    flags: c_int,
) -> c_int {
    let real =
        real!(sendmmsg as unsafe extern "C-unwind" fn(c_int, *mut mmsghdr, c_uint, c_int) -> c_int);
    if STANDING.load(Ordering::Relaxed) == 0
        || messages.is_null()
        || count > libc::UIO_MAXIOV as c_uint
    {
        // SAFETY: the program's own arguments.
        return unsafe { real(fd, messages, count, flags) };
    }
    // SAFETY: the program's own array.
    let all = unsafe { std::slice::from_raw_parts_mut(messages, count as usize) };
    let mut sent = 0;
    for one in all {
        // SAFETY: the program's own structure.
        let n = unsafe { sendmsg(fd, &one.msg_hdr, flags) };
        if n < 0 {
            return if sent > 0 { sent } else { -1 };
        }
        one.msg_len = n as c_uint;
        sent += 1;
        let whole = parts(one.msg_hdr.msg_iov, one.msg_hdr.msg_iovlen);
        if (n as usize) < whole.iter().map(|p| p.iov_len).sum() {
            break;
        }
    }
    sent
}

// ---- standard output streams: they hand large buffers on as they are

macro_rules! block_writes {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(buf: *const c_void, size: usize, count: usize, stream: *mut libc::FILE) -> usize {
            let real = real!($name as unsafe extern "C-unwind" fn(*const c_void, usize, usize, *mut libc::FILE) -> usize);
            if idle() {
                // SAFETY: the program's own arguments.
                return unsafe { real(buf, size, count, stream) };
            }
            let Some(len) = size.checked_mul(count).filter(|&n| n > 0 && reaches(&range(buf, n))) else {
                // SAFETY: the program's own arguments.
                return unsafe { real(buf, size, count, stream) };
            };
            // In bytes, so that it can be done in parts; whole elements are reported.
            // SAFETY: the program's own buffer and stream.
            let took = held(buf, len, |at, n, _| unsafe { real(at, 1, n, stream) } as isize);
            took as usize / size
        }
    )* };
}
block_writes! { fwrite fwrite_unlocked }

macro_rules! string_writes {
    ($($name:ident: $writer:ident;)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(text: *const c_char, stream: *mut libc::FILE) -> c_int {
            let real = real!($name as unsafe extern "C-unwind" fn(*const c_char, *mut libc::FILE) -> c_int);
            if idle() || !reaches(&range(text.cast(), 1)) {
                // SAFETY: the program's own arguments.
                return unsafe { real(text, stream) };
            }
            // SAFETY: the program's own string, and its stream.
            unsafe {
                let len = libc::strlen(text);
                if $writer(text.cast(), 1, len, stream) == len { 1 } else { libc::EOF }
            }
        }
    )* };
}
string_writes! {
    fputs: fwrite;
    fputs_unlocked: fwrite_unlocked;
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn puts(text: *const c_char) -> c_int {
    let real = real!(puts as unsafe extern "C-unwind" fn(*const c_char) -> c_int);
    if !reaches(&range(text.cast(), 1)) {
        // SAFETY: the program's own argument.
        return unsafe { real(text) };
    }
    unsafe extern "C" {
        static mut stdout: *mut libc::FILE;
        fn flockfile(stream: *mut libc::FILE);
        fn funlockfile(stream: *mut libc::FILE);
    }
    // SAFETY: the program's own string; the C library's stream, locked so that line and newline stay together.
    unsafe {
        let stream = stdout;
        let len = libc::strlen(text);
        /// Also where the thread is cancelled.
        struct Unlock(*mut libc::FILE);
        impl Drop for Unlock {
            fn drop(&mut self) {
                // SAFETY: locked below by this thread.
                unsafe { funlockfile(self.0) };
            }
        }
        flockfile(stream);
        let _unlock = Unlock(stream);
        let whole = fwrite(text.cast(), 1, len, stream) == len
            && libc::fputc(c_int::from(b'\n'), stream) != libc::EOF;
        if whole {
            c_int::try_from(len + 1).unwrap_or(c_int::MAX)
        } else {
            libc::EOF
        }
    }
}

/// For the C part: whether anything is taken over, so that strings may have to be copied before they are printed.
#[unsafe(no_mangle)]
extern "C" fn faultless_preload_active() -> c_int {
    c_int::from(STANDING.load(Ordering::Relaxed) != 0 && prints_from_strings())
}

/// Whether this C library may hand a string that it prints to the kernel: from 2.37 on it copies them.
fn prints_from_strings() -> bool {
    static ANSWER: AtomicU64 = AtomicU64::new(0);
    match ANSWER.load(Ordering::Relaxed) {
        0 => {
            unsafe extern "C" {
                fn gnu_get_libc_version() -> *const c_char;
            }
            // SAFETY: a static, NUL-terminated string such as 2.36.
            let version = unsafe { std::ffi::CStr::from_ptr(gnu_get_libc_version()) };
            let minor = version
                .to_str()
                .ok()
                .and_then(|v| v.strip_prefix("2."))
                .and_then(|v| v.parse::<u32>().ok());
            let may = minor.is_some_and(|m| m < 37);
            ANSWER.store(1 + u64::from(may), Ordering::Relaxed);
            may
        }
        answer => answer == 2,
    }
}

/// The functions of the C part, under the C library's names. (Rust cannot define functions with a variable number of
/// arguments, and only what Rust defines is exported.)
macro_rules! variadic {
    ($($name:ident => $target:ident;)*) => { $(
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        unsafe extern "C" fn $name() {
            unsafe extern "C" { fn $target(); }
            #[cfg(target_arch = "x86_64")]
            std::arch::naked_asm!("jmp {}", sym $target);
            #[cfg(target_arch = "aarch64")]
            std::arch::naked_asm!("b {}", sym $target);
        }
    )* };
}
variadic! {
    printf => faultless_printf;
    fprintf => faultless_fprintf;
    dprintf => faultless_dprintf;
    vprintf => faultless_vprintf;
    vfprintf => faultless_vfprintf;
    vdprintf => faultless_vdprintf;
    __printf_chk => faultless_printf_chk;
    __fprintf_chk => faultless_fprintf_chk;
    __dprintf_chk => faultless_dprintf_chk;
    __vprintf_chk => faultless_vprintf_chk;
    __vfprintf_chk => faultless_vfprintf_chk;
    __vdprintf_chk => faultless_vdprintf_chk;
}

// ---- calls that read something short

/// Reads in what arguments of a call may point to. `true` if one of them points into a mapping of ours.
pub(crate) fn supply(args: &[usize]) -> bool {
    let _errno = Errno::keep();
    let mut any = false;
    for &at in args {
        if at >= PAGE && reaches(&(at..at.saturating_add(1))) {
            any |= standin::read_range(at..at.saturating_add(SHORT)).is_some();
        }
    }
    any
}

/// Functions whose arguments are integers and pointers, made again where the kernel could not read what a pointer points
/// to. All arguments are passed on as words, which is how both architectures pass them.
macro_rules! tried_again {
    ($kind:ty, $failed:expr; $($name:ident($($arg:ident)*);)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name($($arg: usize),*) -> $kind {
            let real = real!($name as unsafe extern "C-unwind" fn($(tried_again!(@word $arg)),*) -> $kind);
            if idle() {
                // SAFETY: the program's own arguments.
                return unsafe { real($($arg),*) };
            }
            for _ in 0..TRIES {
                // SAFETY: the program's own arguments.
                let result = unsafe { real($($arg),*) };
                if STANDING.load(Ordering::Relaxed) == 0
                    || result != $failed
                    || errno() != libc::EFAULT
                    || !supply(&[$($arg),*])
                {
                    return result;
                }
                static COUNTER: Counter = Counter::new(stringify!($name), true);
                COUNTER.add();
            }
            // SAFETY: as above.
            unsafe { real($($arg),*) }
        }
    )* };
    (@word $arg:ident) => { usize };
}

tried_again! { c_int, -1;
    open(path flags mode);
    open64(path flags mode);
    openat(dir path flags mode);
    openat64(dir path flags mode);
    __open_2(path flags);
    __open64_2(path flags);
    __openat_2(dir path flags);
    __openat64_2(dir path flags);
    creat(path mode);
    creat64(path mode);
    stat(path to);
    stat64(path to);
    lstat(path to);
    lstat64(path to);
    fstatat(dir path to flags);
    fstatat64(dir path to flags);
    statx(dir path flags mask to);
    __xstat(version path to);
    __xstat64(version path to);
    __lxstat(version path to);
    __lxstat64(version path to);
    __fxstatat(version dir path to flags);
    __fxstatat64(version dir path to flags);
    statfs(path to);
    statfs64(path to);
    statvfs(path to);
    statvfs64(path to);
    access(path mode);
    faccessat(dir path mode flags);
    eaccess(path mode);
    euidaccess(path mode);
    chmod(path mode);
    fchmodat(dir path mode flags);
    chown(path user group);
    lchown(path user group);
    fchownat(dir path user group flags);
    unlink(path);
    unlinkat(dir path flags);
    rename(from to);
    renameat(from_dir from to_dir to);
    renameat2(from_dir from to_dir to flags);
    link(from to);
    linkat(from_dir from to_dir to flags);
    symlink(from to);
    symlinkat(from dir to);
    mkdir(path mode);
    mkdirat(dir path mode);
    rmdir(path);
    mkfifo(path mode);
    mknod(path mode device);
    mknodat(dir path mode device);
    chdir(path);
    chroot(path);
    truncate(path len);
    truncate64(path len);
    utimensat(dir path times flags);
    utimes(path times);
    utime(path times);
    setxattr(path name value size flags);
    lsetxattr(path name value size flags);
    fsetxattr(fd name value size flags);
    removexattr(path name);
    inotify_add_watch(fd path mask);
    bind(fd address len);
    connect(fd address len);
    setsockopt(fd level option value len);
    sethostname(name len);
    memfd_create(name flags);
    mount(source target kind flags data);
    umount(target);
    umount2(target flags);
}

tried_again! { isize, -1;
    readlink(path to size);
    readlinkat(dir path to size);
    __readlink_chk(path to size room);
    __readlinkat_chk(dir path to size room);
    getxattr(path name to size);
    lgetxattr(path name to size);
    fgetxattr(fd name to size);
    listxattr(path to size);
    llistxattr(path to size);
    mq_send(queue message len priority);
    msgsnd(queue message len flags);
}

tried_again! { usize, 0;
    opendir(path);
    fopen(path mode);
    fopen64(path mode);
}

/// Closes before it opens, so that it cannot be made again.
macro_rules! reopens {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(path: usize, mode: usize, stream: usize) -> usize {
            if !idle() {
                supply(&[path, mode]);
            }
            // SAFETY: the program's own arguments.
            unsafe { real!($name as unsafe extern "C-unwind" fn(usize, usize, usize) -> usize)(path, mode, stream) }
        }
    )* };
}
reopens! { freopen freopen64 }

// ---- what ends here, or goes on as another program

/// Reads in the strings of a list that ends with a null pointer.
fn supply_strings(list: usize) {
    let mut at = list as *const usize;
    // SAFETY: the program's own list; if it lies in a mapping of ours, this thread reads it in.
    while let Some(&text) = unsafe { at.as_ref() }.filter(|&&text| text != 0) {
        supply(&[text]);
        // SAFETY: not the last.
        at = unsafe { at.add(1) };
    }
}

/// The lists among the arguments of functions that execute a program, by their names.
macro_rules! strings {
    (arguments, $list:expr) => {
        supply_strings($list)
    };
    (environment, $list:expr) => {
        supply_strings($list)
    };
    ($other:ident, $value:expr) => {};
}

macro_rules! last_words {
    ($($name:ident($($arg:ident)*);)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name($($arg: usize),*) -> c_int {
            let served = state::on() && !state::foreign();
            if STANDING.load(Ordering::Relaxed) != 0 {
                supply(&[$($arg),*]);
                $(strings!($arg, $arg);)*
            }
            if served {
                state::end("exec");
            }
            let real = real!($name as unsafe extern "C-unwind" fn($(tried_again!(@word $arg)),*) -> c_int);
            for _ in 0..TRIES {
                // SAFETY: the program's own arguments. It returns only if it failed.
                let failed = unsafe { real($($arg),*) };
                if errno() != libc::EFAULT || idle() {
                    return failed;
                }
                supply(&[$($arg),*]);
                $(strings!($arg, $arg);)*
            }
            // SAFETY: as above.
            unsafe { real($($arg),*) }
        }
    )* };
}
last_words! {
    execve(path arguments environment);
    execv(path arguments);
    execvp(name arguments);
    execvpe(name arguments environment);
    fexecve(fd arguments environment);
    execveat(dir path arguments environment flags);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn _exit(status: c_int) -> ! {
    if state::on() {
        state::end("exit");
    }
    // SAFETY: ends the process.
    unsafe { real!(_exit as unsafe extern "C" fn(c_int) -> !)(status) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn _Exit(status: c_int) -> ! {
    // SAFETY: the same.
    unsafe { _exit(status) }
}

// ---- what copies the process, or confines it

#[unsafe(no_mangle)]
unsafe extern "C" fn _Fork() -> c_int {
    copies(0, || {
        // SAFETY: no arguments.
        unsafe { real!(_Fork as unsafe extern "C" fn() -> c_int)() }
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn clone(
    function: usize,
    stack: usize,
    flags: c_int,
    arg: usize,
    parent: usize,
    tls: usize,
    child: usize,
) -> c_int {
    type Clone = unsafe extern "C" fn(usize, usize, c_int, usize, usize, usize, usize) -> c_int;
    copies(flags as usize, || {
        // SAFETY: the program's own arguments.
        unsafe { real!(clone as Clone)(function, stack, flags, arg, parent, tls, child) }
    })
}

/// Makes a call that copies this process, or starts a thread, without handlers.
fn copies<R>(flags: usize, call: impl FnOnce() -> R) -> R {
    if flags & libc::CLONE_VM as usize == 0 && state::on() && !state::foreign() {
        state::copying(call)
    } else {
        call()
    }
}

/// A program that lets only some system calls through from now on: misses need others.
fn confines() {
    if state::on() && !state::foreign() {
        state::lock().close("the program confines itself (seccomp)");
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn prctl(option: c_int, a: usize, b: usize, c: usize, d: usize) -> c_int {
    if option == libc::PR_SET_SECCOMP {
        confines();
    }
    type Prctl = unsafe extern "C" fn(c_int, usize, usize, usize, usize) -> c_int;
    // SAFETY: the program's own arguments.
    unsafe { real!(prctl as Prctl)(option, a, b, c, d) }
}

// ---- what reads later

/// Writes that are made behind the program's back: their memory becomes the kernel's.
unsafe fn reads_later(request: *const libc::aiocb) {
    // SAFETY: null or the program's own request.
    if let Some(r) = unsafe { request.as_ref() }
        && reaches(&range(r.aio_buf.cast_const(), r.aio_nbytes))
        && !state::foreign()
    {
        let range = range(r.aio_buf.cast_const(), r.aio_nbytes);
        state::lock().hand_back_over(&range, "the program writes it in the background (aio)");
    }
}

macro_rules! background_writes {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(request: *mut libc::aiocb) -> c_int {
            // SAFETY: the program's own request.
            unsafe {
                reads_later(request);
                real!($name as unsafe extern "C" fn(*mut libc::aiocb) -> c_int)(request)
            }
        }
    )* };
}
background_writes! { aio_write aio_write64 }

macro_rules! background_lists {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(mode: c_int, list: *const *mut libc::aiocb, count: c_int, event: usize) -> c_int {
            type List = unsafe extern "C" fn(c_int, *const *mut libc::aiocb, c_int, usize) -> c_int;
            // SAFETY: the program's own list.
            unsafe {
                for i in 0..count.max(0) as usize {
                    reads_later(*list.add(i));
                }
                real!($name as List)(mode, list, count, event)
            }
        }
    )* };
}
background_lists! { lio_listio lio_listio64 }

// ---- the C library's `syscall`

/// System calls made through the C library's `syscall`: those that are functions here are made as such.
#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn syscall(
    nr: c_long,
    a: usize,
    b: usize,
    c: usize,
    d: usize,
    e: usize,
    f: usize,
) -> c_long {
    type Call =
        unsafe extern "C-unwind" fn(c_long, usize, usize, usize, usize, usize, usize) -> c_long;
    let real = real!(syscall as Call);
    if !state::on() {
        // SAFETY: the program's own arguments.
        return unsafe { real(nr, a, b, c, d, e, f) };
    }
    if nr == libc::SYS_rt_sigaction && a as c_int == libc::SIGBUS && !state::foreign() {
        // SAFETY: the program's own arguments.
        let kernels = || unsafe { real(nr, a, b, c, d, e, f) };
        return signals::raw_sigaction(b as *const c_void, c as *mut c_void, d, kernels);
    }
    match nr {
        // What the entries point to, the kernel reads when it likes.
        libc::SYS_io_uring_setup if !state::foreign() => {
            state::lock().close("the program uses io_uring");
        }
        libc::SYS_io_setup if !state::foreign() => {
            state::lock().close("the program uses asynchronous I/O (io_setup)");
        }
        // SAFETY: the program's own arguments.
        libc::SYS_clone => return copies(a, || unsafe { real(nr, a, b, c, d, e, f) }),
        libc::SYS_clone3 if a != 0 && !state::foreign() => {
            // SAFETY: the first word of the structure that it is given: its flags.
            let flags = unsafe { *(a as *const u64) } as usize;
            // SAFETY: as above.
            return copies(flags, || unsafe { real(nr, a, b, c, d, e, f) });
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        libc::SYS_fork => return copies(0, || unsafe { real(nr, a, b, c, d, e, f) }),
        // What sets a filter, not what asks for what there is.
        libc::SYS_seccomp if a == 0 || (a == 1 && c != 0) => confines(),
        libc::SYS_prctl if a as c_int == libc::PR_SET_SECCOMP => confines(),
        libc::SYS_rt_sigprocmask if d == 8 => {
            if let Some(set) = signals::raw_mask(a as c_int, b as *const u64) {
                // SAFETY: the program's own arguments, with a copy of the set.
                return unsafe { real(nr, a, &raw const set as usize, c, d, e, f) };
            }
        }
        _ => {}
    }
    if STANDING.load(Ordering::Relaxed) == 0 {
        // SAFETY: as above.
        return unsafe { real(nr, a, b, c, d, e, f) };
    }
    // SAFETY: the same call by another name, with the same arguments.
    unsafe {
        match nr {
            libc::SYS_munmap => crate::mappings::munmap(a as *mut c_void, b) as c_long,
            libc::SYS_mremap => {
                crate::mappings::mremap(a as *mut c_void, b, c, d as c_int, e as *mut c_void)
                    as c_long
            }
            libc::SYS_mprotect => {
                crate::mappings::mprotect(a as *mut c_void, b, c as c_int) as c_long
            }
            libc::SYS_madvise => {
                crate::mappings::madvise(a as *mut c_void, b, c as c_int) as c_long
            }
            libc::SYS_mmap if d as c_int & libc::MAP_FIXED != 0 => crate::mappings::mmap(
                a as *mut c_void,
                b,
                c as c_int,
                d as c_int,
                e as c_int,
                f as i64,
            ) as c_long,
            libc::SYS_write => write(a as c_int, b as *const c_void, c) as c_long,
            libc::SYS_pwrite64 => pwrite64(a as c_int, b as *const c_void, c, d as i64) as c_long,
            libc::SYS_writev => writev(a as c_int, b as *const iovec, c as c_int) as c_long,
            libc::SYS_pwritev => {
                pwritev64(a as c_int, b as *const iovec, c as c_int, d as i64) as c_long
            }
            libc::SYS_sendto => sendto(
                a as c_int,
                b as *const c_void,
                c,
                d as c_int,
                e as *const sockaddr,
                f as socklen_t,
            ) as c_long,
            libc::SYS_sendmsg => sendmsg(a as c_int, b as *const msghdr, c as c_int) as c_long,
            libc::SYS_pwritev2 => pwritev64v2(
                a as c_int,
                b as *const iovec,
                c as c_int,
                d as i64,
                f as c_int,
            ) as c_long,
            libc::SYS_sendmmsg => c_long::from(sendmmsg(
                a as c_int,
                b as *mut mmsghdr,
                c as c_uint,
                d as c_int,
            )),
            libc::SYS_process_vm_writev => process_vm_writev(
                a as libc::pid_t,
                b as *const iovec,
                c,
                d as *const iovec,
                e,
                f,
            ) as c_long,
            libc::SYS_mlock => c_long::from(crate::mappings::mlock(a as *const c_void, b)),
            libc::SYS_mlock2 => {
                c_long::from(crate::mappings::mlock2(a as *const c_void, b, c as c_uint))
            }
            libc::SYS_mincore => {
                c_long::from(crate::mappings::mincore(a as *mut c_void, b, c as *mut u8))
            }
            libc::SYS_remap_file_pages => c_long::from(crate::mappings::remap_file_pages(
                a as *mut c_void,
                b,
                c as c_int,
                d,
                e as c_int,
            )),
            libc::SYS_vmsplice => vmsplice(a as c_int, b as *const iovec, c, d as c_uint) as c_long,
            _ => {
                for _ in 0..TRIES {
                    let result = real(nr, a, b, c, d, e, f);
                    if result != -1 || errno() != libc::EFAULT || !supply(&[a, b, c, d, e, f]) {
                        return result;
                    }
                    static COUNTER: Counter = Counter::new("syscall", true);
                    COUNTER.add();
                }
                set_errno(libc::EFAULT);
                -1
            }
        }
    }
}
