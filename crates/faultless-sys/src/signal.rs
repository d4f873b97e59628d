//! Signals as the kernel has them: actions with *every* signal blocked (the C library quietly leaves two of its own
//! unblocked), masks, and signals sent to one thread.

#![allow(unsafe_code, reason = "installs signal handlers")]

use crate::raw::{Errno, check, syscall};

/// A set of signals, one bit each (bit `n - 1` for signal `n`), as the kernel has it.
pub type SigSet = u64;

/// Every signal, the C library's 32 and 33 included.
pub const ALL: SigSet = !0;

/// The last signal, which is the last real-time signal.
pub const LAST: i32 = 64;

/// The set with just `signal` in it.
pub const fn set_of(signal: i32) -> SigSet {
    1 << (signal - 1)
}

/// `SA_RESTORER`: the action names the code that returns from the handler (x86-64).
#[cfg(target_arch = "x86_64")]
const SA_RESTORER: usize = 0x0400_0000;

/// The kernel's `struct sigaction`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Action {
    /// Address of the handler, or `SIG_DFL` (0), or `SIG_IGN` (1).
    pub handler: usize,
    /// `SA_…` flags.
    pub flags: usize,
    #[cfg(target_arch = "x86_64")]
    restorer: usize,
    /// Signals blocked while the handler runs.
    pub mask: SigSet,
}

#[cfg(target_arch = "x86_64")]
const _: () = assert!(size_of::<Action>() == 32);
#[cfg(target_arch = "aarch64")]
const _: () = assert!(size_of::<Action>() == 24);

// Debuggers and unwinders know a signal frame by exactly these bytes at its return address.
#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    ".text",
    ".globl faultless_sys_restore_rt",
    ".hidden faultless_sys_restore_rt",
    ".type faultless_sys_restore_rt, @function",
    ".balign 16",
    "nop",
    "faultless_sys_restore_rt:",
    "mov rax, 15",
    "syscall",
);

#[cfg(target_arch = "x86_64")]
unsafe extern "C" {
    fn faultless_sys_restore_rt();
}

impl Action {
    /// An action that calls `handler` with three arguments, on the alternate stack where there is one, with `mask`
    /// blocked, and that restarts interrupted system calls.
    pub fn new(
        handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void),
        mask: SigSet,
    ) -> Self {
        let flags = (libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART) as usize;
        Action {
            handler: handler as *const () as usize,
            #[cfg(target_arch = "x86_64")]
            flags: flags | SA_RESTORER,
            #[cfg(not(target_arch = "x86_64"))]
            flags,
            #[cfg(target_arch = "x86_64")]
            restorer: faultless_sys_restore_rt as *const () as usize,
            mask,
        }
    }

    /// The default action.
    pub fn default_action() -> Self {
        Action {
            handler: libc::SIG_DFL,
            flags: 0,
            #[cfg(target_arch = "x86_64")]
            restorer: 0,
            mask: 0,
        }
    }
}

/// Reads the action of `signal`.
pub fn action(signal: i32) -> Result<Action, Errno> {
    let mut old = Action::default_action();
    // SAFETY: `old` has the kernel's layout and is written only; 8 is the size of the kernel's set.
    check(unsafe {
        syscall(
            libc::SYS_rt_sigaction,
            [signal as usize, 0, &raw mut old as usize, 8, 0, 0],
        )
    })?;
    Ok(old)
}

/// Replaces the action of `signal`, and returns the one that was there.
///
/// # Safety
///
/// The handler must be safe to run at any instruction of any thread, and the former one must be chained to, or its
/// loss be known not to matter.
pub unsafe fn set_action(signal: i32, new: &Action) -> Result<Action, Errno> {
    let mut old = Action::default_action();
    // SAFETY: both structures have the kernel's layout; what the handler does is the caller's promise.
    check(unsafe {
        syscall(
            libc::SYS_rt_sigaction,
            [
                signal as usize,
                new as *const Action as usize,
                &raw mut old as usize,
                8,
                0,
                0,
            ],
        )
    })?;
    Ok(old)
}

/// Sets this thread's mask of blocked signals and returns the former one.
#[inline]
pub fn set_mask(mask: SigSet) -> SigSet {
    let mut old: SigSet = 0;
    // SAFETY: both sets are valid 8-byte words.
    unsafe {
        syscall(
            libc::SYS_rt_sigprocmask,
            [
                libc::SIG_SETMASK as usize,
                &raw const mask as usize,
                &raw mut old as usize,
                8,
                0,
                0,
            ],
        )
    };
    old
}

/// Blocks every signal while it lives; gives the former mask back when dropped.
#[derive(Debug)]
pub struct Blocked {
    former: SigSet,
}

impl Blocked {
    /// Blocks all signals of this thread.
    pub fn all() -> Self {
        Blocked {
            former: set_mask(ALL),
        }
    }

    /// What was blocked before.
    pub fn former(&self) -> SigSet {
        self.former
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        set_mask(self.former);
    }
}

/// Sends `signal` to thread `tid` of process `pid` (`tgkill(2)`); signal 0 only asks whether the thread exists.
pub fn tgkill(pid: u32, tid: u32, signal: i32) -> Result<(), Errno> {
    // SAFETY: no pointers.
    check(unsafe {
        syscall(
            libc::SYS_tgkill,
            [pid as usize, tid as usize, signal as usize, 0, 0, 0],
        )
    })
    .map(drop)
}

/// Takes one pending signal out of `set`, which the caller has blocked; waits for `timeout_ns` at most.
/// Returns its number and the descriptor in its `si_fd` (meaningful for lease signals only).
pub fn take_pending(set: SigSet, timeout_ns: u64) -> Option<(i32, i32)> {
    let t = libc::timespec {
        tv_sec: (timeout_ns / 1_000_000_000) as libc::time_t,
        tv_nsec: (timeout_ns % 1_000_000_000) as libc::c_long,
    };
    let mut info = [0u32; 32];
    // SAFETY: the set and the timespec are read, 128 bytes of siginfo are written.
    let ret = unsafe {
        syscall(
            libc::SYS_rt_sigtimedwait,
            [
                &raw const set as usize,
                info.as_mut_ptr() as usize,
                &raw const t as usize,
                8,
                0,
                0,
            ],
        )
    };
    // siginfo_t for POLL_*: si_signo, si_errno, si_code, padding, si_band (8 bytes), si_fd.
    check(ret).ok().map(|n| (n as i32, info[6] as i32))
}
