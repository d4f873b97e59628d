//! Signals: SIGBUS is the engine's, and never blocked; the program does not notice. Where mappings may be served live, the same holds for
//! SIGSEGV.
//!
//! A thread that blocks the signal and misses is killed by the kernel. So it is taken out of every mask that the program
//! sets, for a thread or for the time of a handler; that it wanted it there is remembered for the thread, and shown when it
//! asks. The program's own action for the signal is kept beside the engine's handler, which takes it for every fault that is not a
//! miss.

#![allow(
    unsafe_code,
    reason = "functions of the C library, with its pointers and its promises"
)]

use crate::fills::events_of;
use crate::lend::{filled, filled_through, range};
use crate::real::{real, set_errno};
use crate::{decide, probe, state, trap};
use faultless::live;
use faultless::standin::{self, Disposition};
use faultless_sys::signal::{self, SigSet};
use libc::{sigaction as Action, sighandler_t, sigset_t, timespec};
use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// The signals by which misses are told.
static FAULTS: AtomicU64 = AtomicU64::new(signal::set_of(libc::SIGBUS));

thread_local! {
    /// Those of them that the program believes to be blocked in this thread.
    static BELIEVES_BLOCKED: Cell<SigSet> = const { Cell::new(0) };
}

/// The signals by which misses are told.
pub(crate) fn faults() -> SigSet {
    FAULTS.load(Ordering::Relaxed)
}

/// Whether misses are told by a signal, so that its handler is the engine's, or will be once there is a mapping to serve.
pub(crate) fn is_fault(signo: c_int) -> bool {
    signo == libc::SIGBUS || signo == libc::SIGSEGV && faults() & signal::set_of(signo) != 0
}

/// Signals that must stay open.
fn kept() -> SigSet {
    faults()
        | if trap::active() {
            signal::set_of(libc::SIGSYS)
        } else {
            0
        }
}

/// The kernel's part of the C library's set.
fn bits(set: *const sigset_t) -> SigSet {
    // SAFETY: callers pass a valid set; its first 64 bits are the kernel's set.
    unsafe { *set.cast::<SigSet>() }
}

/// A copy of a set, which can be read, without the signals that must stay open.
fn without_kept(set: *const sigset_t) -> Option<sigset_t> {
    // SAFETY: null, or a set that the C library reads itself before it makes its call.
    let mut copy = *unsafe { set.as_ref() }?;
    // SAFETY: as in `bits`.
    unsafe { *(&raw mut copy).cast::<SigSet>() &= !kept() };
    Some(copy)
}

fn pointer(set: &Option<sigset_t>) -> *const sigset_t {
    set.as_ref().map_or(std::ptr::null(), std::ptr::from_ref)
}

/// They may have been blocked when the program was executed.
pub(crate) fn at_start() {
    if state::settings().is_some_and(decide::may_serve_live) {
        FAULTS.fetch_or(signal::set_of(libc::SIGSEGV), Ordering::Relaxed);
    }
    let before = signal::set_mask(signal::ALL);
    signal::set_mask(before & !faults());
    BELIEVES_BLOCKED.set(before & faults());
    crate::service::answer_sigusr2();
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sigaction(signo: c_int, new: *const Action, old: *mut Action) -> c_int {
    let real = real!(sigaction as unsafe extern "C" fn(c_int, *const Action, *mut Action) -> c_int);
    if !state::on() {
        // SAFETY: the program's own arguments.
        return unsafe { real(signo, new, old) };
    }
    // SAFETY: null or the program's own structure.
    let wanted = unsafe { new.as_ref() }.map(|new| {
        let mut wanted = *new;
        wanted.sa_mask = without_kept(&new.sa_mask).unwrap_or(new.sa_mask);
        wanted
    });
    if is_fault(signo) || signo == libc::SIGSYS {
        let disposition = wanted.as_ref().map(|w| Disposition {
            handler: w.sa_sigaction,
            flags: w.sa_flags as usize,
            mask: bits(&w.sa_mask),
        });
        // SAFETY: a copy of the program's own argument.
        let kernels = || unsafe {
            real(
                signo,
                wanted.as_ref().map_or(std::ptr::null(), std::ptr::from_ref),
                old,
            )
        };
        let replaced = if state::foreign() {
            // A child of vfork: its actions are its own, what is remembered here its parent's. Without our handler it must meet no
            // marker.
            if signo == libc::SIGSEGV && wanted.is_some() {
                live::open_all();
            }
            Err(kernels())
        } else if signo == libc::SIGSYS {
            trap::disposition(disposition).ok_or_else(kernels)
        } else {
            replace(signo, disposition, kernels)
        };
        let before = match replaced {
            Ok(before) => before,
            Err(result) => return result,
        };
        // SAFETY: null or the program's own structure, which may be uninitialised.
        if let Some(old) = unsafe { old.as_mut() } {
            old.sa_sigaction = before.handler;
            old.sa_flags = before.flags as c_int;
            old.sa_restorer = None;
            // SAFETY: a set of zeros is valid; its first 64 bits are the kernel's set.
            unsafe {
                old.sa_mask = std::mem::zeroed();
                *(&raw mut old.sa_mask).cast::<SigSet>() = before.mask;
            }
        }
        return 0;
    }
    let wanted = wanted.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: a copy of the program's own argument.
    unsafe { real(signo, wanted, old) }
}

/// Replaces the disposition of SIGBUS or SIGSEGV that the program believes in, or reads it. `Err`: the result of `kernels`, which is called
/// while the engine's handler is not installed.
fn replace<R>(
    signo: c_int,
    new: Option<Disposition>,
    kernels: impl FnOnce() -> R,
) -> Result<Disposition, R> {
    match signo {
        libc::SIGSEGV => live::sigsegv(new, kernels),
        _ => standin::sigbus(new, kernels),
    }
}

/// Whether the handler of a signal is this library's.
fn ours(signo: c_int) -> bool {
    state::on() && (is_fault(signo) || (signo == libc::SIGSYS && trap::active()))
}

/// `signal` and its kin for such signals, by `sigaction`.
fn handle(signo: c_int, handler: sighandler_t, flags: c_int) -> sighandler_t {
    // SAFETY: zeros are valid for both structures; `sigaction` above does the rest.
    unsafe {
        let mut new: Action = std::mem::zeroed();
        let mut old: Action = std::mem::zeroed();
        new.sa_sigaction = handler;
        new.sa_flags = flags;
        if sigaction(signo, &new, &mut old) == 0 {
            old.sa_sigaction
        } else {
            libc::SIG_ERR
        }
    }
}

macro_rules! simple_handlers {
    ($($name:ident: $flags:expr;)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name(signo: c_int, handler: sighandler_t) -> sighandler_t {
            if ours(signo) {
                return handle(signo, handler, $flags);
            }
            // SAFETY: the program's own arguments.
            unsafe { real!($name as unsafe extern "C" fn(c_int, sighandler_t) -> sighandler_t)(signo, handler) }
        }
    )* };
}

simple_handlers! {
    signal: libc::SA_RESTART;
    bsd_signal: libc::SA_RESTART;
    ssignal: libc::SA_RESTART;
    sysv_signal: libc::SA_RESETHAND | libc::SA_NODEFER;
    __sysv_signal: libc::SA_RESETHAND | libc::SA_NODEFER;
}

const SEGV: SigSet = signal::set_of(libc::SIGSEGV);

/// While the program's SIGSEGV handler runs, the signal is open and another one is blocked (`live::RUNS`), which the C library never
/// lets a program block or keep. The program is told that SIGSEGV was blocked, and what it wants of SIGSEGV is done to the other.
fn in_handler(how: c_int, asks: bool, names_segv: bool, before: &mut SigSet) {
    if faults() & SEGV == 0 || *before & live::RUNS == 0 {
        return;
    }
    *before = *before & !live::RUNS | SEGV;
    let mask = signal::set_mask(signal::ALL);
    let blocked = match how {
        _ if asks => true,
        libc::SIG_BLOCK => true,
        libc::SIG_UNBLOCK => !names_segv,
        _ => names_segv,
    };
    signal::set_mask(match blocked {
        true => mask | live::RUNS,
        false => mask & !live::RUNS,
    });
}

/// Sets the thread's mask by `real`, without the signals that must stay open.
fn mask(
    real: unsafe extern "C" fn(c_int, *const sigset_t, *mut sigset_t) -> c_int,
    how: c_int,
    new: *const sigset_t,
    old: *mut sigset_t,
) -> c_int {
    if !state::on() {
        // SAFETY: the program's own arguments.
        return unsafe { real(how, new, old) };
    }
    let named = if new.is_null() {
        0
    } else {
        bits(new) & faults()
    };
    let wanted = if how == libc::SIG_UNBLOCK {
        // Unblocking them does no harm.
        None
    } else {
        without_kept(new)
    };
    let set = if wanted.is_some() {
        pointer(&wanted)
    } else {
        new
    };
    // The former mask is needed even if the program does not ask for it.
    let mut before = MaybeUninit::<sigset_t>::zeroed();
    let told = match old.is_null() {
        true => before.as_mut_ptr(),
        false => old,
    };
    filled_through(&[told as usize]);
    // SAFETY: the program's own arguments, or a copy.
    let result = unsafe { real(how, set, told) };
    if result == 0 {
        // SAFETY: written just now; its first 64 bits are the kernel's set.
        in_handler(how, new.is_null(), named & SEGV != 0, unsafe {
            &mut *told.cast::<SigSet>()
        });
        let believed = BELIEVES_BLOCKED.get();
        if !old.is_null() && believed != 0 {
            // SAFETY: written just now; its first 64 bits are the kernel's set.
            unsafe { *old.cast::<SigSet>() |= believed };
        }
        // (A child of vfork has its mask for itself, and shares what is remembered with its parent.)
        if !new.is_null() && (named | believed) != 0 && !state::foreign() {
            BELIEVES_BLOCKED.set(match how {
                libc::SIG_BLOCK => believed | named,
                libc::SIG_UNBLOCK => believed & !named,
                _ => named,
            });
        }
    }
    result
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sigprocmask(how: c_int, new: *const sigset_t, old: *mut sigset_t) -> c_int {
    mask(
        real!(sigprocmask as unsafe extern "C" fn(c_int, *const sigset_t, *mut sigset_t) -> c_int),
        how,
        new,
        old,
    )
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_sigmask(
    how: c_int,
    new: *const sigset_t,
    old: *mut sigset_t,
) -> c_int {
    mask(
        real!(
            pthread_sigmask as unsafe extern "C" fn(c_int, *const sigset_t, *mut sigset_t) -> c_int
        ),
        how,
        new,
        old,
    )
}

/// A mask for the time of a call, in which handlers may run: without the signals that must stay open, where this process is served.
struct Meanwhile {
    copy: Option<sigset_t>,
    own: *const sigset_t,
}

impl Meanwhile {
    fn new(own: *const sigset_t) -> Self {
        // (The C library hands the kernel the pointer as it is.)
        let there =
            state::on() && !own.is_null() && probe::readable(own as usize, size_of::<SigSet>());
        let copy = if there { without_kept(own) } else { None };
        Meanwhile { copy, own }
    }

    fn get(&self) -> *const sigset_t {
        if self.copy.is_some() {
            pointer(&self.copy)
        } else {
            self.own
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn sigsuspend(set: *const sigset_t) -> c_int {
    let set = Meanwhile::new(set);
    // SAFETY: the program's own argument, or a copy.
    unsafe { real!(sigsuspend as unsafe extern "C-unwind" fn(*const sigset_t) -> c_int)(set.get()) }
}

/// What `poll` writes to.
fn polled(fds: *mut libc::pollfd, count: libc::nfds_t) -> Range<usize> {
    range(
        fds.cast(),
        (count as usize).saturating_mul(size_of::<libc::pollfd>()),
    )
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn ppoll(
    fds: *mut libc::pollfd,
    count: libc::nfds_t,
    timeout: *const timespec,
    set: *const sigset_t,
) -> c_int {
    type Ppoll = unsafe extern "C-unwind" fn(
        *mut libc::pollfd,
        libc::nfds_t,
        *const timespec,
        *const sigset_t,
    ) -> c_int;
    let set = Meanwhile::new(set);
    filled(&polled(fds, count));
    // SAFETY: the program's own arguments, or a copy.
    unsafe { real!(ppoll as Ppoll)(fds, count, timeout, set.get()) }
}

/// As programs call it that are compiled with `_FORTIFY_SOURCE`.
#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn __ppoll_chk(
    fds: *mut libc::pollfd,
    count: libc::nfds_t,
    timeout: *const timespec,
    set: *const sigset_t,
    size: usize,
) -> c_int {
    type PpollChk = unsafe extern "C-unwind" fn(
        *mut libc::pollfd,
        libc::nfds_t,
        *const timespec,
        *const sigset_t,
        usize,
    ) -> c_int;
    let set = Meanwhile::new(set);
    filled(&polled(fds, count));
    // SAFETY: the program's own arguments, or a copy.
    unsafe { real!(__ppoll_chk as PpollChk)(fds, count, timeout, set.get(), size) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn pselect(
    count: c_int,
    read: *mut libc::fd_set,
    write: *mut libc::fd_set,
    except: *mut libc::fd_set,
    timeout: *const timespec,
    set: *const sigset_t,
) -> c_int {
    type Set = *mut libc::fd_set;
    type Pselect = unsafe extern "C-unwind" fn(
        c_int,
        Set,
        Set,
        Set,
        *const timespec,
        *const sigset_t,
    ) -> c_int;
    let set = Meanwhile::new(set);
    filled_through(&[read as usize, write as usize, except as usize]);
    // SAFETY: the program's own arguments, or a copy.
    unsafe { real!(pselect as Pselect)(count, read, write, except, timeout, set.get()) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn epoll_pwait(
    fd: c_int,
    events: *mut libc::epoll_event,
    count: c_int,
    timeout: c_int,
    set: *const sigset_t,
) -> c_int {
    type EpollPwait = unsafe extern "C-unwind" fn(
        c_int,
        *mut libc::epoll_event,
        c_int,
        c_int,
        *const sigset_t,
    ) -> c_int;
    let set = Meanwhile::new(set);
    filled(&range(events.cast(), events_of(count as usize)));
    // SAFETY: the program's own arguments, or a copy.
    unsafe { real!(epoll_pwait as EpollPwait)(fd, events, count, timeout, set.get()) }
}

#[unsafe(no_mangle)]
unsafe extern "C-unwind" fn epoll_pwait2(
    fd: c_int,
    events: *mut libc::epoll_event,
    count: c_int,
    timeout: *const timespec,
    set: *const sigset_t,
) -> c_int {
    type EpollPwait2 = unsafe extern "C-unwind" fn(
        c_int,
        *mut libc::epoll_event,
        c_int,
        *const timespec,
        *const sigset_t,
    ) -> c_int;
    let set = Meanwhile::new(set);
    filled(&range(events.cast(), events_of(count as usize)));
    // SAFETY: the program's own arguments, or a copy.
    unsafe { real!(epoll_pwait2 as EpollPwait2)(fd, events, count, timeout, set.get()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn pthread_attr_setsigmask_np(
    attr: *mut libc::pthread_attr_t,
    set: *const sigset_t,
) -> c_int {
    type SetMask = unsafe extern "C" fn(*mut libc::pthread_attr_t, *const sigset_t) -> c_int;
    let set = Meanwhile::new(set);
    // SAFETY: the program's own arguments, or a copy.
    unsafe { real!(pthread_attr_setsigmask_np as SetMask)(attr, set.get()) }
}

// The old functions of BSD, with their sets of 32.

#[unsafe(no_mangle)]
unsafe extern "C" fn sigblock(set: c_int) -> c_int {
    let set = if state::on() {
        set & !(kept() as c_int)
    } else {
        set
    };
    // SAFETY: no pointers.
    unsafe { real!(sigblock as unsafe extern "C" fn(c_int) -> c_int)(set) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn sigsetmask(set: c_int) -> c_int {
    let set = if state::on() {
        set & !(kept() as c_int)
    } else {
        set
    };
    // SAFETY: no pointers.
    unsafe { real!(sigsetmask as unsafe extern "C" fn(c_int) -> c_int)(set) }
}

/// System V's: blocks one signal.
#[unsafe(no_mangle)]
unsafe extern "C" fn sighold(signo: c_int) -> c_int {
    if ours(signo) {
        if is_fault(signo) {
            BELIEVES_BLOCKED.set(BELIEVES_BLOCKED.get() | signal::set_of(signo));
        }
        return 0;
    }
    // SAFETY: no pointers.
    unsafe { real!(sighold as unsafe extern "C" fn(c_int) -> c_int)(signo) }
}

/// System V's: ignores one signal.
#[unsafe(no_mangle)]
unsafe extern "C" fn sigignore(signo: c_int) -> c_int {
    if ours(signo) {
        return if handle(signo, libc::SIG_IGN, 0) == libc::SIG_ERR {
            -1
        } else {
            0
        };
    }
    // SAFETY: no pointers.
    unsafe { real!(sigignore as unsafe extern "C" fn(c_int) -> c_int)(signo) }
}

/// System V's: sets a handler, or blocks.
#[unsafe(no_mangle)]
unsafe extern "C" fn sigset(signo: c_int, handler: sighandler_t) -> sighandler_t {
    const SIG_HOLD: sighandler_t = 2;
    if !ours(signo) {
        // SAFETY: the program's own arguments.
        return unsafe {
            real!(sigset as unsafe extern "C" fn(c_int, sighandler_t) -> sighandler_t)(
                signo, handler,
            )
        };
    }
    let (believed, own) = (BELIEVES_BLOCKED.get(), signal::set_of(signo) & faults());
    let held = believed & own != 0;
    BELIEVES_BLOCKED.set(match handler {
        SIG_HOLD => believed | own,
        _ => believed & !own,
    });
    let before = if handler == SIG_HOLD {
        // SAFETY: asks only.
        unsafe {
            let mut old: Action = std::mem::zeroed();
            sigaction(signo, std::ptr::null(), &mut old);
            old.sa_sigaction
        }
    } else {
        handle(signo, handler, 0)
    };
    if held { SIG_HOLD } else { before }
}

/// Opens the signals that must stay open, where all were blocked.
pub(crate) fn open_faults() {
    let mask = signal::set_mask(signal::ALL);
    signal::set_mask(mask & !kept());
}

/// The same call by the kernel's own name, with a set of 8 bytes: without the signals that must stay open.
pub(crate) fn raw_mask(how: c_int, new: *const SigSet) -> Option<SigSet> {
    if new.is_null() || how == libc::SIG_UNBLOCK {
        return None;
    }
    // What cannot be read, the kernel refuses.
    Some(probe::copy(new)? & !kept())
}

/// Nobody but this library may do this to the signals by which misses are told; a program that asks the kernel itself is told what it
/// believes.
pub(crate) fn raw_sigaction(
    signo: c_int,
    new: *const c_void,
    old: *mut c_void,
    size: usize,
    kernels: impl FnOnce() -> libc::c_long,
) -> libc::c_long {
    let refuse = |error| {
        set_errno(error);
        -1
    };
    if size != 8 {
        return refuse(libc::EINVAL);
    }
    // The kernel's structure: handler, flags, restorer (on x86-64), mask.
    let wanted = if new.is_null() {
        None
    } else {
        match probe::copy(new.cast::<[usize; MASK_AT + 1]>()) {
            Some(words) => Some(Disposition {
                handler: words[0],
                flags: words[1],
                mask: words[MASK_AT] as SigSet & !faults(),
            }),
            None => return refuse(libc::EFAULT),
        }
    };
    let before = match replace(signo, wanted, kernels) {
        Ok(before) => before,
        Err(result) => return result,
    };
    if !old.is_null() {
        let mut words = [0; MASK_AT + 1];
        (words[0], words[1], words[MASK_AT]) = (before.handler, before.flags, before.mask as usize);
        filled_through(&[old as usize]);
        let last = old as usize + MASK_AT * size_of::<usize>();
        if !probe::writable(old as usize) || !probe::writable(last) {
            return refuse(libc::EFAULT);
        }
        // SAFETY: found to be writable at both ends, and shorter than a page.
        unsafe { old.cast::<[usize; MASK_AT + 1]>().write_unaligned(words) };
    }
    0
}

#[cfg(target_arch = "x86_64")]
const MASK_AT: usize = 3;
#[cfg(target_arch = "aarch64")]
const MASK_AT: usize = 2;
