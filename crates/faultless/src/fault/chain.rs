//! A signal whose handler is the engine's. For a fault that is not the engine's, it does what the program has asked for.

#![allow(
    unsafe_code,
    reason = "installs a signal handler, calls handlers of others by address"
)]

use crate::base::primitive::{
    AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Mutex, MutexGuard, Ordering, lock,
};
use faultless_sys::signal::Action;
use faultless_sys::{Errno, raw, signal};

/// What a program wants done about a signal: the parts of a `struct sigaction` that say so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disposition {
    /// Address of the handler, or `SIG_DFL`, or `SIG_IGN`.
    pub handler: usize,
    /// `SA_…` flags.
    pub flags: usize,
    /// Signals blocked while the handler runs.
    pub mask: signal::SigSet,
}

/// The program's own disposition: what was there before ours, or what it has asked for since (where `sigaction` is
/// interposed). Written under the `installing` lock with all signals blocked; read by the handler, which tries again if
/// the version changed meanwhile.
struct Former {
    /// Odd while the rest is being written.
    version: AtomicU32,
    handler: AtomicUsize,
    flags: AtomicUsize,
    mask: AtomicU64,
}

impl Former {
    const fn new() -> Self {
        Former {
            version: AtomicU32::new(0),
            handler: AtomicUsize::new(libc::SIG_DFL),
            flags: AtomicUsize::new(0),
            mask: AtomicU64::new(0),
        }
    }

    fn read(&self) -> Disposition {
        loop {
            let version = self.version.load(Ordering::SeqCst);
            let seen = Disposition {
                handler: self.handler.load(Ordering::SeqCst),
                flags: self.flags.load(Ordering::SeqCst),
                mask: self.mask.load(Ordering::SeqCst),
            };
            if version & 1 == 0 && self.version.load(Ordering::SeqCst) == version {
                return seen;
            }
            raw::sched_yield();
        }
    }

    /// The caller holds the lock, and has all signals blocked: a handler on this thread would wait for it for ever.
    fn write(&self, new: Disposition) {
        self.version.fetch_add(1, Ordering::SeqCst);
        self.handler.store(new.handler, Ordering::SeqCst);
        self.flags.store(new.flags, Ordering::SeqCst);
        self.mask.store(new.mask, Ordering::SeqCst);
        self.version.fetch_add(1, Ordering::SeqCst);
    }
}

/// Why the handler is not in place.
#[derive(Debug)]
pub(crate) enum NotInstalled {
    /// Somebody replaced it by a handler at this address.
    Replaced(usize),
    /// The kernel refused.
    Refused(Errno),
}

/// Blocked while the program's handler runs: the signal by which the C library cancels threads, which a program cannot block itself. (A
/// handler that leaves by `longjmp` and does not restore the mask leaves it blocked, as it would leave its own signal.)
pub const RUNS: signal::SigSet = signal::set_of(32);

/// A signal handler, as the kernel calls it.
type Handler = extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void);

/// One signal that is the engine's.
pub(crate) struct Chain {
    signo: i32,
    handler: Handler,
    former: Former,
    installed: AtomicBool,
    installing: Mutex<()>,
    /// The former handler was to be called once only (`SA_RESETHAND`), and has been.
    spent: AtomicBool,
    /// The signal stays open while the program's handler runs, and these are blocked instead.
    runs: Option<signal::SigSet>,
}

/// The lock on a signal's installation, held across `fork`.
pub(crate) struct HandlerLock {
    _installing: MutexGuard<'static, ()>,
}

impl Chain {
    pub(crate) const fn new(signo: i32, handler: Handler) -> Self {
        Chain {
            signo,
            handler,
            former: Former::new(),
            installed: AtomicBool::new(false),
            installing: Mutex::new(()),
            spent: AtomicBool::new(false),
            runs: None,
        }
    }

    /// The same for a signal that may mean a miss in the program's own handler of it. Masks are interposed, and tell the program that the
    /// signal is blocked.
    pub(crate) const fn open_in_handlers(self) -> Self {
        Chain {
            runs: Some(RUNS),
            ..self
        }
    }

    pub(crate) fn freeze(&'static self) -> HandlerLock {
        HandlerLock {
            _installing: lock(&self.installing),
        }
    }

    fn ours(&self) -> Action {
        Action::new(self.handler, signal::ALL)
    }

    /// The program's own action, for faults that are not the engine's.
    pub(crate) fn former(&self) -> Disposition {
        self.former.read()
    }

    /// Replaces the disposition that faults which are not ours go on to, and returns the one before. While the engine's handler
    /// is not installed, the kernel's is the one to replace: `kernels` does that, and the handler is not installed meanwhile.
    pub(crate) fn replace_former<R>(
        &self,
        new: Option<Disposition>,
        kernels: impl FnOnce() -> R,
    ) -> Result<Disposition, R> {
        let _no_handler_here = signal::Blocked::all();
        let _one_at_a_time = lock(&self.installing);
        if !self.installed.load(Ordering::Acquire) {
            return Err(kernels());
        }
        let mut before = self.former.read();
        if self.spent.load(Ordering::Relaxed) {
            before.handler = libc::SIG_DFL;
        }
        if let Some(new) = new {
            self.former.write(new);
            self.spent.store(false, Ordering::Relaxed);
        }
        Ok(before)
    }

    /// Whether the handler was put in place and is no longer: the program has replaced it by a call that nobody saw.
    pub(crate) fn is_lost(&self) -> bool {
        if !self.installed.load(Ordering::Acquire) {
            return false;
        }
        let _no_handler_here = signal::Blocked::all();
        let _one_at_a_time = lock(&self.installing);
        let now = signal::action(self.signo).map(|now| now.handler);
        now != Ok(self.ours().handler)
    }

    /// Puts the handler in place, or makes sure that it still is.
    pub(crate) fn install(&self) -> Result<(), NotInstalled> {
        let _no_handler_here = signal::Blocked::all();
        let _one_at_a_time = lock(&self.installing);
        let now = signal::action(self.signo).map_err(NotInstalled::Refused)?;
        if self.installed.load(Ordering::Acquire) {
            // Chaining to a newcomer that itself chains to us would never end: say so instead.
            return if now.handler == self.ours().handler {
                Ok(())
            } else {
                Err(NotInstalled::Replaced(now.handler))
            };
        }
        self.former.write(Disposition {
            handler: now.handler,
            flags: now.flags,
            mask: now.mask,
        });
        // Before it can run: it must find itself installed.
        self.installed.store(true, Ordering::Release);
        // SAFETY: the handler is made to run at any instruction, and chains to the former action.
        let set = unsafe { signal::set_action(self.signo, &self.ours()) };
        if set.is_err() {
            self.installed.store(false, Ordering::Release);
        }
        set.map(drop).map_err(NotInstalled::Refused)
    }

    /// Does what would have been done if our handler did not exist.
    ///
    /// # Safety
    ///
    /// To be called from the handler, with its arguments.
    pub(crate) unsafe fn pass_on(
        &self,
        info: *mut libc::siginfo_t,
        context: *mut libc::c_void,
        code: i32,
    ) {
        let signo = self.signo;
        let former = self.former.read();
        // By kill, tgkill, sigqueue, or as a mere notice of broken memory: no instruction would run into it again.
        let sent = code <= 0 || code == libc::BUS_MCEERR_AO;
        // SAFETY: the context is the kernel's.
        let interrupted = unsafe { interrupted(context) };
        // A fault of a handler that has the signal blocked, as far as it can see, ends the process.
        let in_handler = !sent && interrupted & self.runs.unwrap_or(0) != 0;
        let handler = if in_handler || self.spent.load(Ordering::Relaxed) {
            libc::SIG_DFL
        } else {
            former.handler
        };
        match handler {
            libc::SIG_IGN if sent => {}
            libc::SIG_DFL | libc::SIG_IGN => {
                // The kernel does not let a fault be ignored. With the default action back in place, the faulting
                // instruction runs again and ends the process where it stands, so that a core dump shows it.
                // SAFETY: the default action needs no promise.
                let _ = unsafe { signal::set_action(signo, &Action::default_action()) };
                if sent {
                    let _ = signal::tgkill(raw::getpid(), raw::gettid(), signo);
                }
            }
            handler => {
                // The former handler gets the signal mask that it asked for, not ours: it may never return (longjmp).
                let own = signal::set_of(signo);
                let (blocked, open) = match self.runs {
                    _ if former.flags & libc::SA_NODEFER as usize != 0 => (0, 0),
                    // The handler may miss. That it runs is told by another signal in the mask.
                    Some(runs) => (runs, own),
                    None => (own, 0),
                };
                let mine = signal::set_mask((interrupted | former.mask | blocked) & !open);
                if former.flags & libc::SA_RESETHAND as usize != 0 {
                    self.spent.store(true, Ordering::Relaxed);
                }
                if former.flags & libc::SA_SIGINFO as usize != 0 {
                    // SAFETY: it was installed as a three-argument handler for this signal.
                    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                        unsafe { core::mem::transmute(handler) };
                    handler(signo, info, context);
                } else {
                    // SAFETY: it was installed as a one-argument handler for this signal.
                    let handler: extern "C" fn(i32) = unsafe { core::mem::transmute(handler) };
                    handler(signo);
                }
                signal::set_mask(mine);
            }
        }
    }
}

/// The signals that were blocked where a handler was called.
///
/// # Safety
///
/// The context is the one that the kernel gave the handler.
pub(crate) unsafe fn interrupted(context: *mut libc::c_void) -> signal::SigSet {
    // SAFETY: the caller's promise; uc_sigmask begins with the kernel's 8-byte set.
    unsafe { *(&raw const (*context.cast::<libc::ucontext_t>()).uc_sigmask).cast() }
}
