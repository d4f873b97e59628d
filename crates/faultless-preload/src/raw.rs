//! The C library's `syscall`: calls that are functions here are made as such.

#![allow(
    unsafe_code,
    reason = "functions of the C library, with its pointers and its promises"
)]

use crate::counters::Counter;
use crate::fills::{filled_message, filled_messages};
use crate::lend::{GivenWords, filled, filled_parts, filled_through, range};
use crate::process::{confines, copies};
use crate::real::{errno, real};
use crate::short::gives_memory;
use crate::state::{self, STANDING};
use crate::writes::*;
use crate::{descriptors, exec, probe, signals};
use faultless::standin;
use libc::{iovec, mmsghdr, msghdr, sockaddr, socklen_t};
use std::ffi::{c_int, c_long, c_uint, c_void};
use std::sync::atomic::Ordering;

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
    standin::forsake();
    if !state::on() {
        // SAFETY: the program's own arguments.
        return unsafe { real(nr, a, b, c, d, e, f) };
    }
    if nr == libc::SYS_rt_sigaction && signals::is_fault(a as c_int) && !state::foreign() {
        // SAFETY: the program's own arguments.
        let kernels = || unsafe { real(nr, a, b, c, d, e, f) };
        return signals::raw_sigaction(
            a as c_int,
            b as *const c_void,
            c as *mut c_void,
            d,
            kernels,
        );
    }
    if matches!(nr, libc::SYS_execve | libc::SYS_execveat) {
        return exec::by_number(nr, [a, b, c, d, e, f]);
    }
    match nr {
        libc::SYS_close => {
            // SAFETY: the program's own argument.
            return c_long::from(unsafe { descriptors::close(a as c_int) });
        }
        libc::SYS_close_range => {
            // SAFETY: the program's own arguments.
            return c_long::from(unsafe {
                descriptors::close_range(a as c_uint, b as c_uint, c as c_int)
            });
        }
        #[cfg(target_arch = "x86_64")]
        libc::SYS_dup2 => {
            // SAFETY: the program's own arguments.
            return c_long::from(unsafe { descriptors::dup2(a as c_int, b as c_int) });
        }
        libc::SYS_dup3 => {
            // SAFETY: the program's own arguments.
            return c_long::from(unsafe { descriptors::dup3(a as c_int, b as c_int, c as c_int) });
        }
        libc::SYS_unshare => {
            // SAFETY: no pointers.
            return c_long::from(unsafe { crate::process::unshare(a as c_int) });
        }
        libc::SYS_setns => {
            // SAFETY: no pointers.
            return c_long::from(unsafe { crate::process::setns(a as c_int, b as c_int) });
        }
        // `mseal(2)` (6.10): what is sealed can never be handed back.
        462 if !state::foreign() => {
            crate::mappings::sealing(a, b);
        }
        // What the entries point to, the kernel reads when it likes.
        libc::SYS_io_uring_setup if !state::foreign() => {
            state::lock().close("the program uses io_uring");
        }
        libc::SYS_io_setup if !state::foreign() => {
            state::lock().close("the program uses asynchronous I/O (io_setup)");
        }
        libc::SYS_clone => {
            // (The order of the last two depends on the processor.)
            filled_through(&[c, d, e]);
            // SAFETY: the program's own arguments.
            return copies(a, || unsafe { real(nr, a, b, c, d, e, f) });
        }
        libc::SYS_clone3 if !state::foreign() => {
            // The first word of the structure that it is given: its flags.
            if let Some(flags) = probe::copy(a as *const u64) {
                // The next ones: where numbers are stored.
                if let Some([_, pidfd, child, parent]) = probe::copy(a as *const [u64; 4]) {
                    filled_through(&[pidfd, child, parent].map(|at| at as usize));
                }
                // SAFETY: the program's own arguments.
                return copies(flags as usize, || unsafe { real(nr, a, b, c, d, e, f) });
            }
        }
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        libc::SYS_fork => return copies(0, || unsafe { real(nr, a, b, c, d, e, f) }),
        // What sets a filter, not what asks for what there is.
        libc::SYS_seccomp if a == 0 || (a == 1 && c != 0) => confines(),
        libc::SYS_prctl if a as c_int == libc::PR_SET_SECCOMP => confines(),
        libc::SYS_rt_sigprocmask if d == 8 => {
            filled_through(&[c]);
            if let Some(set) = signals::raw_mask(a as c_int, b as *const u64) {
                // SAFETY: the program's own arguments, with a copy of the set.
                return unsafe { real(nr, a, &raw const set as usize, c, d, e, f) };
            }
        }
        _ => {}
    }
    if nr == libc::SYS_ioctl {
        gives_memory(&[a, b, c]);
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
            libc::SYS_process_vm_readv => process_vm_readv(
                a as libc::pid_t,
                b as *const iovec,
                c,
                d as *const iovec,
                e,
                f,
            ) as c_long,
            _ => {
                filled_by_number(nr, [a, b, c, d, e, f]);
                let hand_backs = standin::hand_backs();
                let result = real(nr, a, b, c, d, e, f);
                if result != -1 || errno() != libc::EFAULT {
                    return result;
                }
                static COUNTER: Counter = Counter::new("syscall", true);
                let Some(given) = GivenWords::again([a, b, c, d, e, f], hand_backs, &COUNTER)
                else {
                    return result;
                };
                let [a, b, c, d, e, f] = given.words;
                real(nr, a, b, c, d, e, f)
            }
        }
    }
}

/// The kernel is about to write where a call says that has no function here.
fn filled_by_number(nr: c_long, args: [usize; 6]) {
    let [a, b, c, _, e, _] = args;
    match nr {
        libc::SYS_read | libc::SYS_pread64 | libc::SYS_recvfrom | libc::SYS_getdents64 => {
            filled(&range(b as *const c_void, c));
        }
        libc::SYS_getrandom => filled(&range(a as *const c_void, b)),
        libc::SYS_readv | libc::SYS_preadv | libc::SYS_preadv2 => {
            filled_parts(b as *const iovec, c);
        }
        libc::SYS_recvmsg => filled_message(b as *mut msghdr),
        libc::SYS_recvmmsg => filled_messages(b as *mut mmsghdr, c as c_uint, e),
        _ => {}
    }
    filled_through(&args);
}
