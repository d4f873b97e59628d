//! `--compat`: system calls that bypass the C library.
//!
//! All mappings that are taken over lie in one window of addresses, which the kernel never hands out unasked. A seccomp
//! filter looks at each system call: one that is handed a pointer into the window raises SIGSYS, and the library's handler
//! makes the call itself with the pages in place. (What the parts of a vector point to, a filter cannot see: `writev` and
//! `sendmsg` that bypass the C library are not served. To stop each of them would end every program to which the filter comes
//! down and the library does not: statically linked ones, ones for another C library, ones without the environment.) It does so from one instruction at an
//! address that the filter knows, which the filter lets pass. The filter is installed before the program is executed, and its children have
//! it as well; the price is `no_new_privs`: setuid programs that they execute gain nothing.

#![allow(unsafe_code, reason = "installs a seccomp filter")]

use faultless_sys::{raw, signal};
use faultless_untrusted::output::random;
use std::io;
use std::ops::Range;

/// Where mappings lie that are taken over.
pub const WINDOW: Range<usize> = 0x2000_0000_0000..0x2800_0000_0000;

/// Where the page lies with the one instruction that may make any call: somewhere here, another one for each tree of processes, so
/// that nobody who can make a program jump knows where to.
pub const GATES: Range<usize> = 0x1000_0000_0000..0x1800_0000_0000;
/// Bytes from the page's beginning to behind that instruction, where a filter sees the call come from.
pub const GATE_RETURN: usize = 64;

/// Chooses an address for the page.
///
/// # Errors
///
/// The kernel has no randomness.
pub fn choose_gate() -> io::Result<usize> {
    const PAGE: usize = 4096;
    let pages = (GATES.end - GATES.start) / PAGE;
    let page = random()? as usize % pages;
    Ok(GATES.start + page * PAGE)
}

/// Whether a filter of this kind is installed already, as far as a child that may die of it can tell.
pub fn is_installed() -> bool {
    // SAFETY: the child makes two system calls and ends.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0);
            // (Past the C library, where a library of ours may stand.)
            let _ = signal::set_action(libc::SIGSYS, &signal::Action::default_action());
            signal::set_mask(0);
            raw::syscall(libc::SYS_write, [usize::MAX, WINDOW.start, 1, 0, 0, 0]);
            libc::_exit(0);
        }
        let mut status = 0;
        child > 0
            && libc::waitpid(child, &raw mut status, 0) == child
            && libc::WIFSIGNALED(status)
            && libc::WTERMSIG(status) == libc::SIGSYS
    }
}

/// The data of the filter's verdict, which the handler finds in `si_errno`: a program may have filters of its own.
pub const MARK: u16 = 0x0FA1;

/// Calls that come to the handler if one of these arguments, counted from 0, lies in the window. (Only these: the registers of
/// arguments that a call does not have hold whatever they held. All other calls pass: some cannot be made on another's behalf.)
pub const POINTERS: &[(&[u32], &[libc::c_long])] = &[
    (
        &[1],
        &[
            libc::SYS_write,
            libc::SYS_pwrite64,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_newfstatat,
            libc::SYS_statx,
            libc::SYS_faccessat,
            libc::SYS_faccessat2,
            libc::SYS_readlinkat,
            libc::SYS_unlinkat,
            libc::SYS_mkdirat,
            libc::SYS_mknodat,
            libc::SYS_fchmodat,
            libc::SYS_fchownat,
            libc::SYS_utimensat,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_inotify_add_watch,
            libc::SYS_mq_timedsend,
            libc::SYS_msgsnd,
            libc::SYS_execveat,
            libc::SYS_fgetxattr,
            libc::SYS_fremovexattr,
        ],
    ),
    (&[1, 4], &[libc::SYS_sendto]),
    (
        &[1, 3],
        &[libc::SYS_renameat2, libc::SYS_linkat, libc::SYS_renameat],
    ),
    (&[1, 2], &[libc::SYS_fsetxattr]),
    (&[0, 2], &[libc::SYS_symlinkat]),
    (&[3], &[libc::SYS_setsockopt]),
    (&[0, 4], &[libc::SYS_mremap]),
    (&[0, 1, 2], &[libc::SYS_setxattr, libc::SYS_lsetxattr]),
    (
        &[0, 1],
        &[
            libc::SYS_getxattr,
            libc::SYS_lgetxattr,
            libc::SYS_removexattr,
            libc::SYS_lremovexattr,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_rename,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_link,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_symlink,
        ],
    ),
    (
        &[0],
        &[
            libc::SYS_statfs,
            libc::SYS_truncate,
            libc::SYS_chdir,
            libc::SYS_listxattr,
            libc::SYS_llistxattr,
            libc::SYS_chroot,
            libc::SYS_memfd_create,
            libc::SYS_execve,
            libc::SYS_mmap,
            libc::SYS_munmap,
            libc::SYS_mprotect,
            libc::SYS_pkey_mprotect,
            libc::SYS_remap_file_pages,
            libc::SYS_madvise,
            libc::SYS_mlock,
            libc::SYS_mlock2,
            libc::SYS_mincore,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_open,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_creat,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_stat,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_lstat,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_access,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_readlink,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_unlink,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_mkdir,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_rmdir,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_chmod,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_chown,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_lchown,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_mknod,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_utimes,
        ],
    ),
];

/// Whether a call is one that may come to the handler.
pub fn comes(nr: libc::c_long) -> bool {
    POINTERS.iter().any(|(_, calls)| calls.contains(&nr))
}

const _: () = assert!(WINDOW.start.trailing_zeros() >= 32 && WINDOW.end.trailing_zeros() >= 32);

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const JUMP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

/// Offsets in `struct seccomp_data` (little-endian machines).
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const INSTRUCTION: u32 = 8;
const ARGUMENTS: u32 = 16;

#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const AUDIT_ARCH: u32 = 0xC000_00B7;

fn step(code: u16, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

/// The filter program.
fn filter(gate: usize) -> Vec<libc::sock_filter> {
    let allow = || step(RETURN, libc::SECCOMP_RET_ALLOW, 0, 0);
    let trap = || step(RETURN, libc::SECCOMP_RET_TRAP | u32::from(MARK), 0, 0);
    let (low, high) = ((WINDOW.start >> 32) as u32, (WINDOW.end >> 32) as u32);
    // Programs for another architecture have no such addresses.
    let mut f = vec![
        step(LOAD, ARCHITECTURE, 0, 0),
        step(EQUAL, AUDIT_ARCH, 1, 0),
        allow(),
    ];
    for (arguments, calls) in POINTERS {
        // Not a call of this group: over the checks to the next group.
        let checks = 3 * arguments.len() + 1 + 6;
        f.push(step(LOAD, NUMBER, 0, 0));
        for (i, &nr) in calls.iter().enumerate() {
            f.push(step(EQUAL, nr as u32, (calls.len() - i) as u8, 0));
        }
        f.push(step(JUMP, checks as u32, 0, 0));
        for (i, &argument) in arguments.iter().enumerate() {
            let left = 3 * (arguments.len() - i - 1) + 1;
            f.push(step(LOAD, ARGUMENTS + 8 * argument + 4, 0, 0));
            f.push(step(AT_LEAST, high, 1, 0));
            f.push(step(AT_LEAST, low, left as u8, 0));
        }
        f.push(allow());
        // Not from the gate: to the handler.
        f.extend([
            step(LOAD, INSTRUCTION, 0, 0),
            step(EQUAL, (gate + GATE_RETURN) as u32, 0, 3),
            step(LOAD, INSTRUCTION + 4, 0, 0),
            step(EQUAL, ((gate + GATE_RETURN) >> 32) as u32, 0, 1),
            allow(),
            trap(),
        ]);
    }
    f.push(allow());
    f
}

/// Installs the filter in this process, for good, and for all that descend from it. `gate` is what [`choose_gate`] chose.
///
/// # Errors
///
/// The kernel has no seccomp filters, or this process may not have them.
pub fn install(gate: usize) -> io::Result<()> {
    let mut filter = filter(gate);
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: plain numbers; the second call reads the program, which outlives it.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                0,
                &raw const program,
            ) == 0
    };
    if done {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEST_GATE: usize = 0x1234_5678_9000;

    #[test]
    fn gates_lie_in_their_place_and_differ() {
        let gates: Vec<usize> = (0..4).map(|_| choose_gate().expect("random")).collect();
        assert!(gates.iter().all(|g| GATES.contains(g) && g % 4096 == 0));
        assert!(gates.iter().any(|g| *g != gates[0]));
        assert!(!is_installed());
    }

    /// Runs the filter, as the kernel would.
    fn judge(nr: libc::c_long, args: [u64; 6], instruction: usize) -> u32 {
        let mut data = [0u32; 16];
        data[0] = nr as u32;
        data[1] = AUDIT_ARCH;
        data[2] = instruction as u32;
        data[3] = (instruction >> 32) as u32;
        for (i, a) in args.iter().enumerate() {
            data[4 + 2 * i] = *a as u32;
            data[5 + 2 * i] = (*a >> 32) as u32;
        }
        let (program, mut at, mut acc) = (filter(TEST_GATE), 0, 0u32);
        loop {
            let s = program[at];
            at += 1;
            match s.code {
                LOAD => acc = data[s.k as usize / 4],
                EQUAL => at += usize::from(if acc == s.k { s.jt } else { s.jf }),
                AT_LEAST => at += usize::from(if acc >= s.k { s.jt } else { s.jf }),
                JUMP => at += s.k as usize,
                RETURN => return s.k,
                other => panic!("no such instruction: {other}"),
            }
        }
    }

    #[test]
    fn only_pointers_into_the_window_come_to_the_handler() {
        let inside = WINDOW.start as u64 + 12345;
        let (yes, no) = (
            libc::SECCOMP_RET_TRAP | u32::from(MARK),
            libc::SECCOMP_RET_ALLOW,
        );
        for &(arguments, calls) in POINTERS {
            for &nr in calls {
                assert_eq!(judge(nr, [7; 6], 1), no);
                for argument in 0..6 {
                    let mut args = [7; 6];
                    args[argument] = inside;
                    if !arguments.contains(&(argument as u32)) {
                        assert_eq!(judge(nr, args, 1), no, "call {nr}, argument {argument}");
                        continue;
                    }
                    assert_eq!(judge(nr, args, 1), yes, "call {nr}, argument {argument}");
                    assert_eq!(judge(nr, args, TEST_GATE + GATE_RETURN), no);
                    args[argument] = WINDOW.end as u64;
                    assert_eq!(judge(nr, args, 1), no);
                    args[argument] = WINDOW.end as u64 - 1;
                    assert_eq!(judge(nr, args, 1), yes);
                    args[argument] = WINDOW.start as u64 - 1;
                    assert_eq!(judge(nr, args, 1), no);
                }
            }
        }
        for nr in [
            libc::SYS_read,
            libc::SYS_futex,
            libc::SYS_clone,
            libc::SYS_rt_sigreturn,
        ] {
            assert_eq!(judge(nr, [inside; 6], 1), no, "call {nr}");
        }
    }
}
