//! `--compat`: system calls that bypass the C library, made on the program's behalf.
//!
//! See [`faultless_run::compat`] for the filter that raises SIGSYS. The handler runs with all signals blocked, in a thread
//! that is at a system call of the program's own, so it may do what a function of ours may do there; only calls about
//! mappings of ours take the lock and allocate. The engine's own calls about address space go through the gate: its threads
//! have SIGSYS blocked.

#![allow(
    unsafe_code,
    reason = "a signal handler that makes another's system calls"
)]

use crate::counters::Counter;
use crate::lend::{Given, GivenWords};
use crate::real::{Errno, errno};
use crate::state::{self, STANDING};
use crate::{mappings, signals};
use faultless::standin::Disposition;
use faultless_run::compat::{GATE_RETURN, GATES, MARK, WINDOW};
use faultless_sys::mem::{self, PAGE};
use faultless_sys::raw;
use faultless_sys::signal::{self, Action, SigSet};
use libc::c_long;
use std::ffi::{c_int, c_void};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Whether this process has filter, gate and handler.
static ACTIVE: AtomicBool = AtomicBool::new(false);
/// Where the next mapping is tried.
static NEXT: AtomicUsize = AtomicUsize::new(WINDOW.start);
/// Mappings begin at multiples of this.
const GRANULE: usize = 2 << 20;

const SIGSYS: SigSet = signal::set_of(libc::SIGSYS);

/// Whether system calls that bypass the C library come here.
pub(crate) fn active() -> bool {
    ACTIVE.load(Ordering::Relaxed)
}

// From the gate's page the numbers are as in `system_call(nr, a, b, c, d, e, f)`; the instruction ends at byte 64.
#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".pushsection .rodata",
    ".globl faultless_gate_code",
    ".hidden faultless_gate_code",
    "faultless_gate_code:",
    "mov rax, rdi",
    "mov rdi, rsi",
    "mov rsi, rdx",
    "mov rdx, rcx",
    "mov r10, r8",
    "mov r8, r9",
    "mov r9, [rsp + 8]",
    ".skip 62 - (. - faultless_gate_code), 0x90",
    "syscall",
    "ret",
    ".popsection",
);
#[cfg(target_arch = "aarch64")]
std::arch::global_asm!(
    ".pushsection .rodata",
    ".balign 4",
    ".globl faultless_gate_code",
    ".hidden faultless_gate_code",
    "faultless_gate_code:",
    "mov x8, x0",
    "mov x0, x1",
    "mov x1, x2",
    "mov x2, x3",
    "mov x3, x4",
    "mov x4, x5",
    "mov x5, x6",
    ".rept 8",
    "nop",
    ".endr",
    "svc 0",
    "ret",
    ".popsection",
);
unsafe extern "C" {
    static faultless_gate_code: [u8; GATE_LEN];
}
const GATE_LEN: usize = 68;
const _: () = assert!(GATE_RETURN == 64);

/// Prepares the gate and the handler: before `main`, where the filter is in place already.
pub(crate) fn at_start() {
    let Some(settings) = state::settings().filter(|s| s.compat) else {
        return;
    };
    if let Err(why) = prepare(settings.gate) {
        raw::write_stderr(
            b"faultless: --compat does not work in this process, which is left alone: ",
        );
        raw::write_stderr(why.as_bytes());
        raw::write_stderr(b"\n");
        state::lock().close("--compat does not work in this process");
        return;
    }
    ACTIVE.store(true, Ordering::SeqCst);
}

fn prepare(gate: usize) -> Result<(), &'static str> {
    if !GATES.contains(&gate) || !gate.is_multiple_of(PAGE) {
        return Err("the address of the gate is none");
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | mem::MAP_FIXED_NOREPLACE;
    // SAFETY: replaces nothing.
    let at = unsafe { mem::map(gate, PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if at != Ok(gate) {
        return Err("the address of the gate is taken");
    }
    // SAFETY: mapped just now, writable, longer than the code.
    unsafe {
        std::ptr::copy_nonoverlapping(
            (&raw const faultless_gate_code).cast::<u8>(),
            gate as *mut u8,
            GATE_LEN,
        );
    }
    // SAFETY: ours, and nobody runs there yet.
    unsafe { mem::protect(gate, PAGE, libc::PROT_READ | libc::PROT_EXEC) }
        .map_err(|_| "the kernel does not let memory become executable")?;
    // SAFETY: the handler is made for this, and what was there before is chained to.
    let before = unsafe { signal::set_action(libc::SIGSYS, &Action::new(on_sigsys, signal::ALL)) }
        .map_err(|_| "the kernel refuses a SIGSYS handler")?;
    *former() = Disposition {
        handler: before.handler,
        flags: before.flags,
        mask: before.mask,
    };
    // SAFETY: the code above.
    unsafe { raw::set_gate(gate) };
    let blocked = signal::set_mask(signal::ALL);
    signal::set_mask(blocked & !SIGSYS);
    Ok(())
}

/// Where a mapping of so many bytes should lie.
pub(crate) fn place(len: usize) -> usize {
    let len = len.next_multiple_of(GRANULE);
    let at = NEXT.fetch_add(len, Ordering::Relaxed);
    if at + len <= WINDOW.end {
        return at;
    }
    NEXT.store(WINDOW.start + len, Ordering::Relaxed);
    WINDOW.start
}

/// Whether a mapping lies where the filter looks.
pub(crate) fn in_window(at: usize) -> bool {
    WINDOW.contains(&at)
}

// ---- the program's own SIGSYS

static FORMER: Mutex<Disposition> = Mutex::new(Disposition {
    handler: libc::SIG_DFL,
    flags: 0,
    mask: 0,
});

fn former() -> std::sync::MutexGuard<'static, Disposition> {
    FORMER
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Replaces, or reads, the disposition of SIGSYS that the program believes in.
pub(crate) fn disposition(new: Option<Disposition>) -> Option<Disposition> {
    if !active() {
        return None;
    }
    let _no_handler_here = signal::Blocked::all();
    let mut former = former();
    let before = *former;
    if let Some(new) = new {
        *former = new;
    }
    Some(before)
}

// ---- the handler

#[cfg(target_arch = "x86_64")]
mod registers {
    use libc::{REG_R8, REG_R9, REG_R10, REG_RAX, REG_RDI, REG_RDX, REG_RSI, ucontext_t};
    pub(super) fn arguments(c: &ucontext_t) -> [usize; 6] {
        let g = &c.uc_mcontext.gregs;
        [REG_RDI, REG_RSI, REG_RDX, REG_R10, REG_R8, REG_R9].map(|r| g[r as usize] as usize)
    }
    pub(super) fn set_result(c: &mut ucontext_t, result: isize) {
        c.uc_mcontext.gregs[REG_RAX as usize] = result as i64;
    }
}
#[cfg(target_arch = "aarch64")]
mod registers {
    use libc::ucontext_t;
    pub(super) fn arguments(c: &ucontext_t) -> [usize; 6] {
        std::array::from_fn(|i| c.uc_mcontext.regs[i] as usize)
    }
    pub(super) fn set_result(c: &mut ucontext_t, result: isize) {
        c.uc_mcontext.regs[0] = result as u64;
    }
}

/// `si_code` of a signal that a filter raised.
const SYS_SECCOMP: i32 = 1;

extern "C" fn on_sigsys(signo: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    let _errno = Errno::keep();
    // SAFETY: the kernel passes valid structures for the time of the handler. In siginfo, `si_syscall` lies at byte 24.
    let (code, nr, c) = unsafe {
        (
            (*info).si_code,
            info.cast::<i32>().add(6).read(),
            &mut *context.cast::<libc::ucontext_t>(),
        )
    };
    let nr = c_long::from(nr);
    // SAFETY: as above: `si_errno` lies at byte 4.
    let data = unsafe { info.cast::<i32>().add(1).read() };
    if code != SYS_SECCOMP || data != i32::from(MARK) || !faultless_run::compat::comes(nr) {
        return not_ours(signo, info, context);
    }
    let args = registers::arguments(c);
    // SAFETY: `uc_sigmask` begins with the kernel's 8-byte set.
    let mask = unsafe { *(&raw const c.uc_sigmask).cast::<SigSet>() };
    let result = serve(nr, args, mask);
    registers::set_result(c, result);
}

/// A filter of the program's own raised it, or somebody sent it.
fn not_ours(signo: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    // All signals are blocked, and whoever holds the lock has them blocked too.
    let former = *former();
    // SAFETY: `uc_sigmask` begins with the kernel's 8-byte set.
    let interrupted =
        unsafe { *(&raw const (*context.cast::<libc::ucontext_t>()).uc_sigmask).cast::<SigSet>() };
    let kept = signals::faults();
    signal::set_mask((interrupted | former.mask | SIGSYS) & !kept);
    match former.handler {
        libc::SIG_IGN => {}
        libc::SIG_DFL => {
            // SAFETY: the default action needs no promise; it strikes when the handler returns.
            let _ = unsafe { signal::set_action(signo, &Action::default_action()) };
            let _ = signal::tgkill(raw::getpid(), raw::gettid(), signo);
        }
        handler if former.flags & libc::SA_SIGINFO as usize != 0 => {
            // SAFETY: it was installed as a three-argument handler for this signal.
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signo, info, context);
        }
        handler => {
            // SAFETY: it was installed as a one-argument handler for this signal.
            let handler: extern "C" fn(i32) = unsafe { std::mem::transmute(handler) };
            handler(signo);
        }
    }
}

/// Makes a call, with the signals that the program has open: it may last.
fn pass(nr: c_long, args: [usize; 6], mask: SigSet) -> isize {
    let mine = signal::set_mask(mask & !SIGSYS);
    // SAFETY: a system call of the program's own, with its own arguments.
    let result = unsafe { raw::gated(nr, args) };
    signal::set_mask(mine);
    result
}

/// What a function of ours returned, as the kernel returns it.
fn as_kernel(result: isize) -> isize {
    if result == -1 {
        -(errno() as isize)
    } else {
        result
    }
}

/// Does what the call asks for, and returns what the kernel would.
fn serve(nr: c_long, a: [usize; 6], mask: SigSet) -> isize {
    if STANDING.load(Ordering::Relaxed) == 0 {
        return pass(nr, a, mask);
    }
    match nr {
        // About mappings: as if the C library's functions had been called.
        libc::SYS_munmap => {
            // SAFETY: the program's own arguments.
            return as_kernel(unsafe { mappings::munmap(a[0] as *mut c_void, a[1]) } as isize);
        }
        libc::SYS_mprotect => {
            // SAFETY: as above.
            return as_kernel(
                unsafe { mappings::mprotect(a[0] as *mut c_void, a[1], a[2] as c_int) } as isize,
            );
        }
        libc::SYS_madvise => {
            // SAFETY: as above.
            return as_kernel(
                unsafe { mappings::madvise(a[0] as *mut c_void, a[1], a[2] as c_int) } as isize,
            );
        }
        libc::SYS_mremap => {
            // SAFETY: as above.
            return as_kernel(unsafe {
                mappings::mremap(
                    a[0] as *mut c_void,
                    a[1],
                    a[2],
                    a[3] as c_int,
                    a[4] as *mut c_void,
                )
            } as isize);
        }
        libc::SYS_mmap => {
            // SAFETY: as above.
            return as_kernel(unsafe {
                mappings::mmap(
                    a[0] as *mut c_void,
                    a[1],
                    a[2] as c_int,
                    a[3] as c_int,
                    a[4] as c_int,
                    a[5] as i64,
                )
            } as isize);
        }
        libc::SYS_mlock2 => {
            // SAFETY: as above.
            return as_kernel(
                unsafe { mappings::mlock2(a[0] as *const c_void, a[1], a[2] as u32) } as isize,
            );
        }
        libc::SYS_mlock => {
            // SAFETY: as above.
            return as_kernel(unsafe { mappings::mlock(a[0] as *const c_void, a[1]) } as isize);
        }
        libc::SYS_pkey_mprotect => {
            // SAFETY: as above.
            return as_kernel(unsafe {
                mappings::pkey_mprotect(a[0] as *mut c_void, a[1], a[2] as c_int, a[3] as c_int)
            } as isize);
        }
        libc::SYS_remap_file_pages => {
            // SAFETY: as above.
            return as_kernel(unsafe {
                mappings::remap_file_pages(
                    a[0] as *mut c_void,
                    a[1],
                    a[2] as c_int,
                    a[3],
                    a[4] as c_int,
                )
            } as isize);
        }
        libc::SYS_mincore => {
            // SAFETY: as above.
            return as_kernel(unsafe {
                mappings::mincore(a[0] as *mut c_void, a[1], a[2] as *mut u8)
            } as isize);
        }
        libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_sendto => {
            static COUNTER: Counter =
                Counter::new("write, pwrite64 or sendto without the C library", true);
            // These read `a[2]` bytes at `a[1]`.
            let given = Given::new(a[1] as *const c_void, a[2]);
            let mut args = a;
            args[1] = given.at() as usize;
            COUNTER.add();
            return pass(nr, args, mask);
        }
        _ => {}
    }
    let result = pass(nr, a, mask);
    if result == -(libc::EFAULT as isize)
        && let Some(given) = GivenWords::after_fault(a)
    {
        static COUNTER: Counter = Counter::new("calls without the C library", true);
        COUNTER.add();
        return pass(nr, given.words, mask);
    }
    result
}
