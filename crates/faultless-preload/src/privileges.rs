//! Calls with which a process gives up a privilege.
//!
//! A copy of the process that the C library's `fork` did not make has copies of the engine's descriptors, with which it could act on
//! the process that it was copied from: write into its memory, give up its leases. Copies that are made through the C library
//! close them before the program goes on there (`process`). One that the program makes by an instruction of its own closes them
//! here, before it becomes one that is trusted less; and in any other function of ours that it calls.

#![allow(
    unsafe_code,
    reason = "functions of the C library, with its pointers and its promises"
)]

use crate::counters::Counter;
use crate::lend::GivenWords;
use crate::real::{errno, real, returned};
use crate::{state, threads};
use faultless::standin;
use faultless_sys::raw::{check, gated};
use std::ffi::{c_char, c_int};

macro_rules! gives_up {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
            standin::forsake();
            type Call = unsafe extern "C" fn($($type),*) -> c_int;
            // SAFETY: the program's own arguments.
            unsafe { real!($name as Call)($($argument),*) }
        }
    )* };
}

gives_up! {
    setfsuid(user: u32);
    setfsgid(group: u32);
    capset(header: usize, data: usize);
}

/// Whether this is a copy that the C library does not know for one. Its functions have all threads change their user, and wait for
/// those of which they know: here the engine's, which are in the process that was copied.
fn by_itself() -> bool {
    standin::forsake();
    standin::is_bare_copy() && state::on() && threads::counted() == Some(1)
}

macro_rules! changes_all_threads {
    ($($name:ident($($argument:ident: $type:ty),*) by $number:ident($($word:expr),*) $(unless $invalid:expr)?;)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
            if by_itself() {
                $(if $invalid {
                    return returned(Err(faultless_sys::Errno(libc::EINVAL))) as c_int;
                })?
                let mut args = [0; 6];
                for (to, from) in args.iter_mut().zip([$($word as usize),*]) {
                    *to = from;
                }
                // SAFETY: no pointers.
                return returned(check(unsafe { gated(libc::$number, args) })) as c_int;
            }
            type Call = unsafe extern "C" fn($($type),*) -> c_int;
            // SAFETY: the program's own arguments.
            unsafe { real!($name as Call)($($argument),*) }
        }
    )* };
}

changes_all_threads! {
    setuid(user: u32) by SYS_setuid(user);
    setgid(group: u32) by SYS_setgid(group);
    seteuid(user: u32) by SYS_setresuid(u32::MAX, user, u32::MAX) unless user == u32::MAX;
    setegid(group: u32) by SYS_setresgid(u32::MAX, group, u32::MAX) unless group == u32::MAX;
    setreuid(real: u32, effective: u32) by SYS_setreuid(real, effective);
    setregid(real: u32, effective: u32) by SYS_setregid(real, effective);
    setresuid(real: u32, effective: u32, saved: u32) by SYS_setresuid(real, effective, saved);
    setresgid(real: u32, effective: u32, saved: u32) by SYS_setresgid(real, effective, saved);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn setgroups(count: usize, list: *const libc::gid_t) -> c_int {
    let by_itself = by_itself();
    let call = |list: usize| {
        if by_itself {
            // SAFETY: the program's own arguments, or another address of the same groups.
            let result = check(unsafe { gated(libc::SYS_setgroups, [count, list, 0, 0, 0, 0]) });
            return returned(result) as c_int;
        }
        type Call = unsafe extern "C" fn(usize, usize) -> c_int;
        // SAFETY: as above.
        unsafe { real!(setgroups as Call)(count, list) }
    };
    let hand_backs = standin::hand_backs();
    let result = call(list as usize);
    if result != -1 || errno() != libc::EFAULT {
        return result;
    }
    static COUNTER: Counter = Counter::new("setgroups", true);
    match GivenWords::again([list as usize], hand_backs, &COUNTER) {
        Some(given) => call(given.words[0]),
        None => result,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn initgroups(user: *const c_char, group: libc::gid_t) -> c_int {
    /// Most groups that a user can be in (`NGROUPS_MAX`).
    const MOST: usize = 65_536;
    if !by_itself() {
        type Call = unsafe extern "C" fn(*const c_char, libc::gid_t) -> c_int;
        // SAFETY: the program's own arguments.
        return unsafe { real!(initgroups as Call)(user, group) };
    }
    let mut groups = vec![0; MOST];
    let mut count = MOST as c_int;
    // SAFETY: the program's own name; room for as many groups as `count` says.
    unsafe { libc::getgrouplist(user, group, groups.as_mut_ptr(), &mut count) };
    // SAFETY: so many groups were written.
    unsafe { setgroups(count.max(0) as usize, groups.as_ptr()) }
}
