//! The SIGBUS handler: ours are the faults on absent pages of our regions; every other goes where it went before.

#![allow(
    unsafe_code,
    reason = "a signal handler: reads siginfo, calls handlers of others by address"
)]

use crate::base::clock;
use crate::base::ids::{Addr, Nanos, RegionAt};
use crate::base::primitive::{
    AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Mutex, MutexGuard, Ordering, lock,
};
use crate::fault::refusal::Refusal;
use crate::fault::report;
use crate::fault::run::Need;
use crate::fault::serve::serve;
use crate::space::last_looks::LastLooks;
use crate::space::map_core::MapCore;
use crate::space::{identity, registry};
use faultless_sys::mem::PAGE;
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
/// interposed). Written under the `INSTALLING` lock with all signals blocked; read by the handler, which tries again if
/// the version changed meanwhile.
struct Former {
    /// Odd while the rest is being written.
    version: AtomicU32,
    handler: AtomicUsize,
    flags: AtomicUsize,
    mask: AtomicU64,
}

impl Former {
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

static FORMER: Former = Former {
    version: AtomicU32::new(0),
    handler: AtomicUsize::new(libc::SIG_DFL),
    flags: AtomicUsize::new(0),
    mask: AtomicU64::new(0),
};
static INSTALLED: AtomicBool = AtomicBool::new(false);
static INSTALLING: Mutex<()> = Mutex::new(());

/// The former handler was to be called once only (`SA_RESETHAND`), and has been.
static SPENT: AtomicBool = AtomicBool::new(false);

/// Some map was handed back to the kernel: a SIGBUS that was raised just before may find no map.
/// How often that happened: a second time at the same address is another matter.
static HANDED_BACK: AtomicU64 = AtomicU64::new(0);
/// Who has looked once at such an address.
static LATE_LOOKS: LastLooks = LastLooks::new();

/// How often that was said.
pub(crate) fn hand_backs() -> u64 {
    HANDED_BACK.load(Ordering::SeqCst)
}

/// Says that a map is about to go whose addresses stay in use.
pub(crate) fn expect_latecomers() {
    HANDED_BACK.fetch_add(1, Ordering::SeqCst);
}

/// Replaces the disposition that faults which are not ours go on to, and returns the one before. While the engine's handler
/// is not installed, the kernel's is the one to replace: `kernels` does that, and the handler is not installed meanwhile.
pub(crate) fn replace_former<R>(
    new: Option<Disposition>,
    kernels: impl FnOnce() -> R,
) -> Result<Disposition, R> {
    let _no_handler_here = signal::Blocked::all();
    let _one_at_a_time = lock(&INSTALLING);
    if !INSTALLED.load(Ordering::Acquire) {
        return Err(kernels());
    }
    let mut before = FORMER.read();
    if SPENT.load(Ordering::Relaxed) {
        before.handler = libc::SIG_DFL;
    }
    if let Some(new) = new {
        FORMER.write(new);
        SPENT.store(false, Ordering::Relaxed);
    }
    Ok(before)
}

/// The lock on the installation, held across `fork`.
pub(crate) struct HandlerLock {
    _installing: MutexGuard<'static, ()>,
}

pub(crate) fn freeze() -> HandlerLock {
    HandlerLock {
        _installing: lock(&INSTALLING),
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

fn ours() -> Action {
    Action::new(on_sigbus, signal::ALL)
}

/// Puts the handler in place, or makes sure that it still is.
pub(crate) fn install() -> Result<(), NotInstalled> {
    let _no_handler_here = signal::Blocked::all();
    let _one_at_a_time = lock(&INSTALLING);
    let now = signal::action(libc::SIGBUS).map_err(NotInstalled::Refused)?;
    if INSTALLED.load(Ordering::Acquire) {
        // Chaining to a newcomer that itself chains to us would never end: say so instead.
        return if now.handler == ours().handler {
            Ok(())
        } else {
            Err(NotInstalled::Replaced(now.handler))
        };
    }
    FORMER.write(Disposition {
        handler: now.handler,
        flags: now.flags,
        mask: now.mask,
    });
    // Before it can run: it must find itself installed.
    INSTALLED.store(true, Ordering::Release);
    // SAFETY: the handler is made to run at any instruction, and chains to the former action.
    let set = unsafe { signal::set_action(libc::SIGBUS, &ours()) };
    if set.is_err() {
        INSTALLED.store(false, Ordering::Release);
    }
    set.map(drop).map_err(NotInstalled::Refused)
}

/// Runs with every signal blocked. Touches no errno, no heap, no lock, no thread-local.
extern "C" fn on_sigbus(signo: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for the time of the handler.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // Only "no such page" can be ours: a hardware memory error (BUS_MCEERR_*) or a signal sent by somebody never is.
    if code == libc::BUS_ADRERR {
        if let Some(core) = registry::find(addr) {
            let at = Addr::new(addr);
            // SAFETY: the context is the kernel's.
            let serving = core.pool.withheld.serving(unsafe { interrupted(context) });
            let served = serve(&core, core.unit_of(at), Need::Load(at));
            drop(serving);
            let Err(why) = served else {
                return;
            };
            // The lease is gone before the kernel's mapping is in place: it will be soon.
            if why == Refusal::LeaseBroken && core.being_handed_back() {
                drop(core);
                clock::nap(HAND_BACK_NAP);
                return;
            }
            // Where a map stands in for the kernel's, a program that handles its own faults expects no word of ours.
            if core.stands_for.is_none() || FORMER.read().handler == libc::SIG_DFL {
                report_at(&core, addr, why);
            }
        } else if identity::may_have_moved() {
            clock::nap(HAND_BACK_NAP);
            return;
        } else if came_late(addr) {
            // The map was handed back to the kernel between the fault and this look: the kernel serves the load when it
            // runs again. If not, this thread will be here at once with the same address.
            return;
        } else if let Some(core) = registry::find_parents(addr) {
            report_at(&core, addr, Refusal::Forked);
        }
    }
    // SAFETY: the three arguments are the kernel's own.
    unsafe { chain(signo, info, context, code) };
}

/// The signals that were blocked where a handler was called.
///
/// # Safety
///
/// The context is the one that the kernel gave the handler.
unsafe fn interrupted(context: *mut libc::c_void) -> signal::SigSet {
    // SAFETY: the caller's promise; uc_sigmask begins with the kernel's 8-byte set.
    unsafe { *(&raw const (*context.cast::<libc::ucontext_t>()).uc_sigmask).cast() }
}

/// How long a miss waits for the kernel's mapping before it looks again.
const HAND_BACK_NAP: Nanos = Nanos::from_millis(1);

/// Whether a fault at an address that is no map's may be one that was raised before the map there was handed back.
fn came_late(addr: usize) -> bool {
    let count = HANDED_BACK.load(Ordering::SeqCst);
    count > 0 && !LATE_LOOKS.again(raw::gettid(), Addr::new(addr), count)
}

fn report_at(core: &MapCore, addr: usize, why: Refusal) {
    let page = (Addr::new(addr) - core.start) as u64 & !(PAGE as u64 - 1);
    let offset = core.source_at(RegionAt::new(page));
    // (In a forked child there is no thread that could tell.)
    let told = match &core.pool.outbox {
        Some(outbox) if why != Refusal::Forked => {
            outbox.post(core.name.as_bytes(), offset, why.encode())
        }
        _ => false,
    };
    if !told {
        report::print(core, offset, why);
    }
}

/// Does what would have been done if our handler did not exist.
///
/// # Safety
///
/// To be called from the handler, with its arguments.
unsafe fn chain(signo: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void, code: i32) {
    let former = FORMER.read();
    // By kill, tgkill, sigqueue, or as a mere notice of broken memory: no instruction would run into it again.
    let sent = code <= 0 || code == libc::BUS_MCEERR_AO;
    let handler = if SPENT.load(Ordering::Relaxed) {
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
            // SAFETY: the context is the kernel's.
            let interrupted = unsafe { interrupted(context) };
            let itself = if former.flags & libc::SA_NODEFER as usize != 0 {
                0
            } else {
                signal::set_of(signo)
            };
            let mine = signal::set_mask(interrupted | former.mask | itself);
            if former.flags & libc::SA_RESETHAND as usize != 0 {
                SPENT.store(true, Ordering::Relaxed);
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
