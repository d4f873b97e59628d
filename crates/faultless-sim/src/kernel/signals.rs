//! Signals: actions, masks, those that are pending, and what a fault raises.

#![allow(unsafe_code, reason = "calls a handler by address")]

use super::{Answer, read, write};
use crate::scheduler::{self, State, TID_BASE};
use crate::world::{fail, with};
use std::collections::BTreeMap;

/// `struct sigaction` of the kernel, on x86-64: handler, flags, restorer, mask.
type Action = [usize; 4];

#[derive(Default)]
pub(crate) struct Signals {
    actions: BTreeMap<i32, Action>,
    /// The action of SIGBUS that the engine installed.
    installed: Option<Action>,
}

pub(crate) fn mask(a: [usize; 6]) -> Answer {
    let set: u64 = read(a[1]);
    let old = with(|w| std::mem::replace(&mut w.scheduler.me().mask, set));
    if a[2] != 0 {
        write(a[2], old);
    }
    Ok(0)
}

pub(crate) fn action(a: [usize; 6]) -> Answer {
    let signal = a[0] as i32;
    let old = with(|w| w.kernel.signals.actions.get(&signal).copied());
    if a[1] != 0 {
        let new: Action = read(a[1]);
        with(|w| {
            let signals = &mut w.kernel.signals;
            signals.actions.insert(signal, new);
            if signal == libc::SIGBUS && new[0] > libc::SIG_IGN {
                signals.installed = Some(new);
            }
        });
    }
    if a[2] != 0 {
        write(a[2], old.unwrap_or_default());
    }
    Ok(0)
}

/// Sends a signal to a thread; 0 asks whether there is one.
pub(crate) fn send(tid: u32, signal: i32) -> Answer {
    with(|w| {
        let thread = w.scheduler.by_tid(tid).ok_or(libc::ESRCH)?;
        if signal > 0 {
            thread.pending |= 1 << (signal - 1);
            // (Threads of the engine wait for signals by name, and sleep in nothing else that they could be woken from.)
            if let State::Asleep { word: None, .. } = thread.state {
                thread.state = State::Ready;
            }
        }
        Ok(0)
    })
}

/// `rt_sigtimedwait`.
pub(crate) fn take(set: usize, time: usize) -> Answer {
    let set: u64 = read(set);
    let end = with(|w| w.clock) + super::span(time);
    loop {
        let taken = with(|w| {
            let pending = w.scheduler.me().pending & set;
            (pending != 0).then(|| {
                w.scheduler.me().pending &= !(1 << pending.trailing_zeros());
                pending.trailing_zeros() as usize + 1
            })
        });
        if let Some(signal) = taken {
            return Ok(signal);
        }
        let now = with(|w| w.clock);
        if now >= end {
            return Err(libc::EAGAIN);
        }
        scheduler::sleep(end - now);
    }
}

/// A load at an address faulted. Returns whether the process lives on: the handler returned, and did not give the signal its
/// default action back.
pub(crate) fn bus_error(addr: usize) -> bool {
    let action = with(|w| w.kernel.signals.actions.get(&libc::SIGBUS).copied());
    let Some([handler, _, _, mask]) = action.filter(|a| a[0] > libc::SIG_IGN) else {
        fail("SIGBUS, and there is no handler");
    };
    let blocked = with(|w| {
        let t = w.scheduler.me();
        let blocked = t.mask & 1 << (libc::SIGBUS - 1) != 0;
        t.handlers += 1;
        (blocked, std::mem::replace(&mut t.mask, mask as u64))
    });
    let (blocked, before) = blocked;
    if blocked {
        fail("SIGBUS while it is blocked");
    }
    // The kernel's siginfo: signal, errno, code, padding, address.
    let mut info = [0u64; 16];
    info[0] = libc::SIGBUS as u64;
    info[1] = libc::BUS_ADRERR as u64;
    info[2] = addr as u64;
    let mut context = [0u64; 128];
    // SAFETY: installed as such a function.
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
        unsafe { std::mem::transmute(handler) };
    handler(
        libc::SIGBUS,
        info.as_mut_ptr().cast(),
        context.as_mut_ptr().cast(),
    );
    with(|w| {
        let t = w.scheduler.me();
        t.handlers -= 1;
        t.mask = before;
        let signals = &mut w.kernel.signals;
        let lives = signals.actions[&libc::SIGBUS][0] > libc::SIG_IGN;
        // A program that dies of it would be the end of the run: it goes on as if it had caught the signal.
        if let Some(installed) = signals.installed {
            signals.actions.insert(libc::SIGBUS, installed);
        }
        lives
    })
}

/// Whether a thread is there.
pub(crate) fn is_alive(tid: u32) -> bool {
    tid >= TID_BASE && with(|w| w.scheduler.by_tid(tid).is_some())
}
