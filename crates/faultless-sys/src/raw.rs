//! The system-call instruction itself.
//!
//! The C library's wrappers set `errno`, may be cancellation points, and may be interposed. A fault handler that runs at
//! any instruction of any program can afford none of these, so the calls that it makes go through [`syscall`].

#![allow(unsafe_code, reason = "inline assembly is the point of this module")]

use core::fmt;
use core::sync::atomic::{AtomicUsize, Ordering};

/// An error number that a system call returned, as in `errno(3)`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(pub i32);

impl Errno {
    /// The same error as the standard library's type.
    pub fn into_io(self) -> std::io::Error {
        std::io::Error::from_raw_os_error(self.0)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({}: {})", self.0, self.into_io())
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.into_io().fmt(f)
    }
}

impl std::error::Error for Errno {}

impl From<Errno> for std::io::Error {
    fn from(e: Errno) -> Self {
        e.into_io()
    }
}

/// The largest error number that the kernel returns (`MAX_ERRNO` in `include/linux/err.h`).
const MAX_ERRNO: isize = 4095;

/// Turns the kernel's return value into a result.
#[inline]
pub fn check(ret: isize) -> Result<usize, Errno> {
    if (-MAX_ERRNO..0).contains(&ret) {
        Err(Errno(-ret as i32))
    } else {
        Ok(ret as usize)
    }
}

/// Makes system call `nr` with six arguments (those that the call does not take are ignored).
///
/// # Safety
///
/// The arguments must be what system call `nr` demands: pointers valid for what it reads and writes, and effects that
/// no other code's invariants forbid.
#[cfg(all(target_arch = "x86_64", not(faultless_sim)))]
#[inline]
pub unsafe fn syscall(nr: libc::c_long, a: [usize; 6]) -> isize {
    let ret: isize;
    // SAFETY: the x86-64 system-call convention: number in rax, arguments in these six registers; rcx and r11 are
    // clobbered; memory is not marked untouched, so the compiler assumes that it may be written. The rest is the
    // caller's promise.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") nr as isize => ret,
            in("rdi") a[0],
            in("rsi") a[1],
            in("rdx") a[2],
            in("r10") a[3],
            in("r8") a[4],
            in("r9") a[5],
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    ret
}

/// Makes system call `nr` with six arguments (those that the call does not take are ignored).
///
/// # Safety
///
/// The arguments must be what system call `nr` demands: pointers valid for what it reads and writes, and effects that
/// no other code's invariants forbid.
#[cfg(all(target_arch = "aarch64", not(faultless_sim)))]
#[inline]
pub unsafe fn syscall(nr: libc::c_long, a: [usize; 6]) -> isize {
    let ret: isize;
    // SAFETY: the arm64 system-call convention: number in x8, arguments in x0 to x5, result in x0. The rest is the
    // caller's promise.
    unsafe {
        core::arch::asm!(
            "svc 0",
            in("x8") nr,
            inlateout("x0") a[0] as isize => ret,
            in("x1") a[1],
            in("x2") a[2],
            in("x3") a[3],
            in("x4") a[4],
            in("x5") a[5],
            options(nostack),
        );
    }
    ret
}

/// Has the simulated kernel make system call `nr`.
///
/// # Safety
///
/// As for the real one.
#[cfg(faultless_sim)]
pub unsafe fn syscall(nr: libc::c_long, a: [usize; 6]) -> isize {
    crate::simulated::machine().syscall(nr, a)
}

/// Where calls are made that a seccomp filter would stop; 0: here.
static GATE: AtomicUsize = AtomicUsize::new(0);

/// Has the calls that concern address space, and vectors, made by a function at another address: one that a seccomp filter
/// of the program's knows, and lets pass.
///
/// # Safety
///
/// `gate` must be a function of the C calling convention that makes the system call with its first argument as the number
/// and six more as the arguments, and returns what the kernel returns. It stays there for ever.
pub unsafe fn set_gate(gate: usize) {
    GATE.store(gate, Ordering::SeqCst);
}

/// As [`syscall`], by the gate if there is one.
///
/// # Safety
///
/// As for [`syscall`].
#[inline]
pub unsafe fn gated(nr: libc::c_long, a: [usize; 6]) -> isize {
    let gate = GATE.load(Ordering::Relaxed);
    if gate == 0 {
        // SAFETY: the caller's promise.
        return unsafe { syscall(nr, a) };
    }
    type Gate =
        unsafe extern "C" fn(libc::c_long, usize, usize, usize, usize, usize, usize) -> isize;
    // SAFETY: `set_gate` was promised such a function.
    let gate = unsafe { core::mem::transmute::<usize, Gate>(gate) };
    // SAFETY: the caller's promise.
    unsafe { gate(nr, a[0], a[1], a[2], a[3], a[4], a[5]) }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("Faultless knows the system-call instruction of x86-64 and arm64 only");

/// The number of the thread that calls (`gettid(2)`).
#[inline]
pub fn gettid() -> u32 {
    // SAFETY: takes no pointers, cannot fail.
    unsafe { syscall(libc::SYS_gettid, [0; 6]) as u32 }
}

/// Major and minor version of the kernel (`uname(2)`). `None` if its release does not begin with two numbers.
pub fn kernel_version() -> Option<(u32, u32)> {
    // SAFETY: the structure is writable, and any bytes are valid.
    let release = unsafe {
        let mut name: libc::utsname = core::mem::zeroed();
        check(syscall(
            libc::SYS_uname,
            [&raw mut name as usize, 0, 0, 0, 0, 0],
        ))
        .ok()?;
        name.release
    };
    let mut numbers = release.split(|&c| !(c as u8).is_ascii_digit());
    let mut number = || {
        let digits = numbers.next().filter(|d| !d.is_empty())?;
        let value = |sum: u32, &c: &libc::c_char| {
            sum.checked_mul(10)?.checked_add(u32::from(c as u8 - b'0'))
        };
        digits.iter().try_fold(0, value)
    };
    Some((number()?, number()?))
}

/// The number of the process that calls (`getpid(2)`).
#[inline]
pub fn getpid() -> u32 {
    // SAFETY: takes no pointers, cannot fail.
    unsafe { syscall(libc::SYS_getpid, [0; 6]) as u32 }
}

/// The user whose rights this thread has.
pub fn geteuid() -> u32 {
    // SAFETY: takes no pointers, cannot fail.
    unsafe { syscall(libc::SYS_geteuid, [0; 6]) as u32 }
}

/// Nanoseconds of the monotonic clock. Safe in a signal handler (`clock_gettime` is on POSIX's list).
#[inline]
#[cfg(not(faultless_sim))]
pub fn monotonic_ns() -> u64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `t` is a valid timespec; CLOCK_MONOTONIC always exists, so errno is not touched.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// Nanoseconds of the simulated clock.
#[cfg(faultless_sim)]
pub fn monotonic_ns() -> u64 {
    crate::simulated::machine().now_ns()
}

/// The number of the processor that this thread is on. (It may be on another by the time that this returns.)
#[inline]
#[cfg(not(faultless_sim))]
pub fn processor() -> usize {
    // SAFETY: takes nothing. It reads the thread's rseq area or the vDSO, is safe in a handler, and sets errno only on
    // kernels that have neither.
    unsafe { libc::sched_getcpu() }.max(0) as usize
}

/// The number of the simulated processor.
#[cfg(faultless_sim)]
pub fn processor() -> usize {
    crate::simulated::machine().processor()
}

/// Gives the processor away once (`sched_yield(2)`).
#[inline]
pub fn sched_yield() {
    // SAFETY: takes no pointers.
    unsafe { syscall(libc::SYS_sched_yield, [0; 6]) };
}

/// Sleeps for `ns` nanoseconds, or less if a signal arrives.
pub fn nap(ns: u64) {
    let t = libc::timespec {
        tv_sec: (ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (ns % 1_000_000_000) as libc::c_long,
    };
    // SAFETY: `t` is a valid timespec that outlives the call.
    unsafe { syscall(libc::SYS_nanosleep, [&raw const t as usize, 0, 0, 0, 0, 0]) };
}

/// Whether this process has privileges that whoever started it lacks (`AT_SECURE`: set-user-id programs and the like). Then
/// nothing in its environment is to be believed.
pub fn is_privileged() -> bool {
    // SAFETY: no pointers.
    unsafe { libc::getauxval(libc::AT_SECURE) != 0 }
}

/// Writes `bytes` to the standard error output; what cannot be written is dropped.
pub fn write_stderr(mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: the kernel reads `bytes` only.
        let ret = unsafe {
            syscall(
                libc::SYS_write,
                [2, bytes.as_ptr() as usize, bytes.len(), 0, 0, 0],
            )
        };
        match check(ret) {
            Ok(0) => return,
            Ok(n) => bytes = &bytes[n..],
            Err(Errno(libc::EINTR)) => {}
            Err(_) => return,
        }
    }
}

/// Whether the calling thread holds no robust mutex (`get_robust_list(2)`). `false` if the kernel does not tell.
pub fn has_no_robust_mutex() -> bool {
    let (mut head, mut len) = (0usize, 0usize);
    let args = [
        0,
        (&raw mut head) as usize,
        (&raw mut len) as usize,
        0,
        0,
        0,
    ];
    // SAFETY: two words, which are writable.
    let told = check(unsafe { syscall(libc::SYS_get_robust_list, args) }).is_ok();
    // An empty list is one that leads to its head.
    // SAFETY: the C library's structure of this thread, which begins with a pointer.
    told && (head == 0 || unsafe { (head as *const usize).read() } == head)
}
