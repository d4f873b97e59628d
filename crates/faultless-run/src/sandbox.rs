//! Sandboxes that a program inherits: seccomp filters that end a process for a system call which the engine makes and the
//! program does not.
//!
//! The command tries the engine's calls in a child that may die, and passes on the answer together with the number of filters
//! for which it holds. A process that finds more filters than that was confined since, by rules that nobody has tried: it is
//! left alone.

#![allow(unsafe_code, reason = "system calls in a forked child")]

use faultless_sys::{file, raw};
use serde::{Deserialize, Serialize};

/// What is known about the seccomp filters that were in place when the program was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Sandbox {
    /// How many there were.
    pub filters: u32,
    /// They end nobody for the engine's system calls.
    pub permitted: bool,
}

impl Sandbox {
    /// Tries the engine's system calls under the filters of this process, if there are any, in a child.
    pub fn try_here() -> Sandbox {
        let filters = filters();
        Sandbox {
            filters,
            permitted: filters == 0 || child_survives(),
        }
    }

    /// Whether the answer holds for this process.
    pub fn covers_this_process(&self) -> bool {
        self.permitted && filters() <= self.filters
    }
}

/// How many seccomp filters this process has. `u32::MAX` where the kernel does not say.
pub fn filters() -> u32 {
    let mut text = [0; 16384];
    let Ok(fd) = file::open(
        c"/proc/thread-self/status",
        libc::O_RDONLY | libc::O_CLOEXEC,
    ) else {
        return u32::MAX;
    };
    let got = file::read(fd, &mut text).unwrap_or(0);
    // SAFETY: opened above, and used by nobody else.
    unsafe { file::close(fd) };
    let number = |field: &[u8]| {
        let at = text[..got].windows(field.len()).position(|w| w == field)?;
        let rest = text[at + field.len()..got].trim_ascii_start();
        let end = rest.iter().position(|b| !b.is_ascii_digit())?;
        std::str::from_utf8(&rest[..end]).ok()?.parse().ok()
    };
    if got == text.len() && number(b"\nSeccomp:").is_none() {
        // (Longer than it should be: a user with very many groups.)
        return u32::MAX;
    }
    match (number(b"\nSeccomp_filters:"), number(b"\nSeccomp:")) {
        (Some(filters), _) => filters,
        // A kernel without seccomp, or one before 5.9.
        (None, None | Some(0)) => 0,
        (None, Some(_)) => u32::MAX,
    }
}

fn child_survives() -> bool {
    // SAFETY: the command has one thread; the child makes system calls of its own and ends.
    match unsafe { libc::fork() } {
        -1 => false,
        0 => {
            // SAFETY: the default action; no core is to be left behind; ends the child without handlers.
            unsafe {
                libc::signal(libc::SIGSYS, libc::SIG_DFL);
                let none = libc::rlimit {
                    rlim_cur: 0,
                    rlim_max: 0,
                };
                libc::setrlimit(libc::RLIMIT_CORE, &none);
                // A filter may ask a supervisor that never answers.
                libc::alarm(PATIENCE_S);
            }
            make_unusual_calls();
            // SAFETY: as above.
            unsafe { libc::_exit(0) }
        }
        child => {
            let mut status = -1;
            // SAFETY: our own child; the status is writable.
            let ended = unsafe { libc::waitpid(child, &mut status, 0) } == child;
            ended && libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
        }
    }
}

/// How long the calls may take.
const PATIENCE_S: u32 = 5;

/// Each system call that the engine makes and that a program's own sandbox may not have foreseen. What they answer does not
/// matter, only that the process survives them.
fn make_unusual_calls() {
    use libc::*;
    let call = |nr: c_long, args: [usize; 6]| {
        // SAFETY: integers, null pointers, or the addresses of live locals; made descriptors go with the child.
        unsafe { raw::syscall(nr, args) }
    };
    let me = raw::getpid() as usize;
    let mut buffer = [0u8; 4096];
    let at = buffer.as_mut_ptr() as usize;
    let exe = call(
        SYS_openat,
        [
            AT_FDCWD as usize,
            c"/proc/self/exe".as_ptr() as usize,
            O_RDONLY as usize,
            0,
            0,
            0,
        ],
    );
    let exe = exe.max(0) as usize;
    call(SYS_openat2, [AT_FDCWD as usize, 0, 0, 0, 0, 0]);
    let uffd = call(SYS_userfaultfd, [O_CLOEXEC as usize | 1, 0, 0, 0, 0, 0]).max(0) as usize;
    /// `UFFDIO_API`, with nothing behind it.
    const UFFDIO_API: usize = 0xC018_AA3F;
    call(SYS_ioctl, [uffd, UFFDIO_API, at, 0, 0, 0]);
    let pidfd = call(SYS_pidfd_open, [me, 0, 0, 0, 0, 0]).max(0) as usize;
    call(SYS_pidfd_open, [me, O_EXCL as usize, 0, 0, 0, 0]);
    call(SYS_pidfd_getfd, [pidfd, exe, 0, 0, 0, 0]);
    call(SYS_process_madvise, [pidfd, 0, 0, MADV_COLD as usize, 0, 0]);
    call(SYS_kcmp, [me, me, 0, exe, exe, 0]);
    call(
        SYS_memfd_create,
        [c"faultless".as_ptr() as usize, 1, 0, 0, 0, 0],
    );
    /// `cachestat(2)` (6.5).
    const SYS_CACHESTAT: c_long = 451;
    call(SYS_CACHESTAT, [exe, at, at, 0, 0, 0]);
    for guard in [102, 103] {
        // `MADV_GUARD_INSTALL` and `MADV_GUARD_REMOVE` (6.13), of nothing.
        call(SYS_madvise, [at & !4095, 0, guard, 0, 0, 0]);
    }
    call(SYS_fadvise64, [exe, 0, 0, POSIX_FADV_RANDOM as usize, 0, 0]);
    /// `FS_IOC_FIEMAP`, with no room for an answer.
    const FIEMAP: usize = 0xC020_660B;
    call(SYS_ioctl, [exe, FIEMAP, at, 0, 0, 0]);
    call(SYS_get_robust_list, [0, at, at + 8, 0, 0, 0]);
    /// `F_SETSIG`.
    const SETSIG: i32 = 10;
    for command in [F_GETLEASE, SETSIG, F_SETOWN, F_OFD_GETLK] {
        call(SYS_fcntl, [exe, command as usize, 0, 0, 0, 0]);
    }
    /// `F_SETOWN_EX`.
    const SETOWN_EX: usize = 15;
    call(SYS_fcntl, [exe, SETOWN_EX, 0, 0, 0, 0]);
    call(
        SYS_fcntl,
        [exe, F_SETLEASE as usize, F_UNLCK as usize, 0, 0, 0],
    );
    call(
        SYS_statx,
        [exe, c"".as_ptr() as usize, AT_EMPTY_PATH as usize, 0, at, 0],
    );
    call(SYS_fstatfs, [exe, at, 0, 0, 0, 0]);
    call(SYS_pread64, [exe, at, buffer.len(), 0, 0, 0]);
    call(SYS_eventfd2, [0, EFD_CLOEXEC as usize, 0, 0, 0, 0]);
    let epoll = call(SYS_epoll_create1, [0; 6]).max(0) as usize;
    call(SYS_epoll_ctl, [epoll, EPOLL_CTL_DEL as usize, exe, 0, 0, 0]);
    call(SYS_epoll_pwait, [epoll, at, 1, 0, 0, 0]);
    call(SYS_mincore, [at & !4095, 4096, at, 0, 0, 0]);
    call(SYS_madvise, [at & !4095, 0, MADV_FREE as usize, 0, 0, 0]);
    call(
        SYS_madvise,
        [at & !4095, 0, MADV_DONTNEED as usize, 0, 0, 0],
    );
    call(
        SYS_process_madvise,
        [pidfd, 0, 0, MADV_DONTNEED as usize, 0, 0],
    );
    call(SYS_munlock, [at & !4095, 4096, 0, 0, 0, 0]);
    call(SYS_mremap, [at & !4095, 4096, 4096, 0, 0, 0]);
    call(SYS_mprotect, [at & !4095, 0, PROT_READ as usize, 0, 0, 0]);
    call(SYS_prlimit64, [0, RLIMIT_NOFILE as usize, 0, at, 0, 0]);
    call(SYS_pwritev, [exe, 0, 0, 0, 0, 0]);
    call(SYS_ftruncate, [exe, 0, 0, 0, 0, 0]);
    call(SYS_fallocate, [exe, 0, 0, 0, 0, 0]);
    call(
        SYS_readlinkat,
        [
            AT_FDCWD as usize,
            c"/proc/self/exe".as_ptr() as usize,
            at,
            16,
            0,
            0,
        ],
    );
    call(SYS_sched_yield, [0; 6]);
    call(SYS_sigaltstack, [0; 6]);
    call(SYS_tgkill, [me, me, 0, 0, 0, 0]);
    let instant = timespec {
        tv_sec: 0,
        tv_nsec: 1,
    };
    let set = 1u64 << (SIGUSR2 - 1);
    let set_at = &raw const set as usize;
    let instant_at = &raw const instant as usize;
    call(SYS_rt_sigtimedwait, [set_at, 0, instant_at, 8, 0, 0]);
    call(SYS_nanosleep, [instant_at, 0, 0, 0, 0, 0]);
    call(
        SYS_clock_nanosleep,
        [CLOCK_MONOTONIC as usize, 0, instant_at, 0, 0, 0],
    );
    let word = 0u32;
    call(
        SYS_futex,
        [
            &raw const word as usize,
            FUTEX_WAIT as usize | 128,
            1,
            instant_at,
            0,
            0,
        ],
    );
    // Threads: with what the C library needs for them. A table of descriptors of its own comes last.
    let _ = std::thread::Builder::new().spawn(|| ()).map(|t| t.join());
    /// `CLOSE_RANGE_UNSHARE`.
    const UNSHARE: usize = 2;
    call(
        SYS_close_range,
        [u32::MAX as usize - 1, u32::MAX as usize, UNSHARE, 0, 0, 0],
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Installs a filter that does `action` to userfaultfd, and lets all else through.
    fn confine(action: u32) {
        let op = |code: u32, jt, jf, k| libc::sock_filter {
            code: code as u16,
            jt,
            jf,
            k,
        };
        let mut program = [
            op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
            op(
                libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
                0,
                1,
                libc::SYS_userfaultfd as u32,
            ),
            op(libc::BPF_RET | libc::BPF_K, 0, 0, action),
            op(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        ];
        let filter = libc::sock_fprog {
            len: program.len() as u16,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: a valid filter, which the kernel copies; it confines this thread alone.
        unsafe {
            assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
            let set = libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter);
            assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
        }
    }

    /// A thread of its own: filters stay for good.
    fn confined<T: Send + 'static>(action: u32, f: impl FnOnce() -> T + Send + 'static) -> T {
        std::thread::spawn(move || {
            confine(action);
            f()
        })
        .join()
        .expect("it survives: the calls are made in a child")
    }

    #[test]
    fn without_a_filter_all_is_permitted_and_one_that_comes_later_is_noticed() {
        let here = Sandbox::try_here();
        assert!(here.permitted && here.covers_this_process());
        assert!(confined(libc::SECCOMP_RET_ALLOW, move || !here.covers_this_process()));
    }

    #[test]
    fn a_filter_that_kills_or_traps_is_found_by_a_child_and_one_that_refuses_is_harmless() {
        for action in [
            libc::SECCOMP_RET_KILL_PROCESS,
            libc::SECCOMP_RET_KILL_THREAD,
            libc::SECCOMP_RET_TRAP,
        ] {
            let found = confined(action, Sandbox::try_here);
            assert!(!found.permitted, "{action:#x}");
        }
        let refusal = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
        let found = confined(refusal, || {
            let found = Sandbox::try_here();
            found.permitted && found.covers_this_process()
        });
        assert!(found);
    }
}
