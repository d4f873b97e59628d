//! The SIGBUS handler: ours are the faults on absent pages of our regions; every other goes where it went before.

#![allow(
    unsafe_code,
    reason = "a signal handler: reads siginfo, calls handlers of others by address"
)]

use super::core::MapCore;
use super::fill::{self, Need};
use super::registry;
use super::report::{self, Fault};
use faultless_sys::mem::PAGE;
use faultless_sys::signal::{self, Action};
use faultless_sys::{Errno, raw};
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

/// The action that was there before ours. Written once, before `INSTALLED` is set, and only read from then on.
struct Former(UnsafeCell<Option<Action>>);
// SAFETY: written under the `INSTALLING` lock before INSTALLED is released; read only after it was acquired.
unsafe impl Sync for Former {}

static FORMER: Former = Former(UnsafeCell::new(None));
static INSTALLED: AtomicBool = AtomicBool::new(false);
static INSTALLING: Mutex<()> = Mutex::new(());

/// The former handler was to be called once only (`SA_RESETHAND`), and has been.
static SPENT: AtomicBool = AtomicBool::new(false);

/// The lock on the installation, held across `fork`.
pub(crate) struct Frozen {
    _installing: MutexGuard<'static, ()>,
}

pub(crate) fn freeze() -> Frozen {
    Frozen {
        _installing: INSTALLING.lock().unwrap_or_else(|e| e.into_inner()),
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
    let _one_at_a_time = INSTALLING.lock().unwrap_or_else(|e| e.into_inner());
    let now = signal::action(libc::SIGBUS).map_err(NotInstalled::Refused)?;
    if INSTALLED.load(Ordering::Acquire) {
        // Chaining to a newcomer that itself chains to us would never end: say so instead.
        return if now.handler == ours().handler {
            Ok(())
        } else {
            Err(NotInstalled::Replaced(now.handler))
        };
    }
    // SAFETY: INSTALLED is not set, so nobody reads it, and the lock keeps other writers out.
    unsafe { *FORMER.0.get() = Some(now) };
    INSTALLED.store(true, Ordering::Release);
    // SAFETY: the handler is made to run at any instruction, and chains to the former action.
    unsafe { signal::set_action(libc::SIGBUS, &ours()) }.map_err(NotInstalled::Refused)?;
    Ok(())
}

/// Runs with every signal blocked. Touches no errno, no heap, no lock, no thread-local.
extern "C" fn on_sigbus(signo: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo for the time of the handler.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // Only "no such page" can be ours: a hardware memory error (BUS_MCEERR_*) or a signal sent by somebody never is.
    if code == libc::BUS_ADRERR {
        if let Some(core) = registry::find(addr) {
            let unit = core.unit_of(addr);
            let Err(why) = fill::serve(&core, unit, Need::Load(addr)) else {
                return;
            };
            report_at(&core, addr, why);
        } else if let Some(core) = registry::find_parents(addr) {
            report_at(&core, addr, Fault::Forked);
        }
    }
    // SAFETY: the three arguments are the kernel's own.
    unsafe { chain(signo, info, context, code) };
}

fn report_at(core: &MapCore, addr: usize, why: Fault) {
    let page = (addr - core.start) as u64 & !(PAGE as u64 - 1);
    report::print(core, core.base + page, why);
}

/// Does what would have been done if our handler did not exist.
///
/// # Safety
///
/// To be called from the handler, with its arguments.
unsafe fn chain(signo: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void, code: i32) {
    // SAFETY: INSTALLED was set before our action could run, and FORMER is not written after that.
    let former = unsafe { (*FORMER.0.get()).unwrap_or_else(Action::default_action) };
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
            // SAFETY: the context is the kernel's; uc_sigmask begins with the kernel's 8-byte set.
            let interrupted = unsafe {
                *(&raw const (*context.cast::<libc::ucontext_t>()).uc_sigmask).cast::<u64>()
            };
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
