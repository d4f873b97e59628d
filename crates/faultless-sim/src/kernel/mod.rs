//! The simulated kernel: what system calls do.

#![allow(
    unsafe_code,
    reason = "reads and writes memory that calls name by address"
)]

pub(crate) mod files;
pub(crate) mod memory;
mod signals;

use crate::plan::Plan;
use crate::scheduler;
use crate::world::{self, fail, with};
use files::Files;
use memory::Memory;
use signals::Signals;

/// The number of the process.
pub(crate) const PID: u32 = 1000;

/// What the kernel keeps.
pub(crate) struct Kernel {
    pub(crate) memory: Memory,
    pub(crate) files: Files,
    pub(crate) signals: Signals,
    /// Bytes of the machine's memory, and of the control group's limit.
    machine: u64,
    limit: u64,
    /// The control group says what its memory is.
    accounts: bool,
    /// What was written to the standard error output.
    pub(crate) stderr: String,
    /// Seconds that the kernel waits before it takes a lease.
    pub(crate) break_seconds: u64,
}

/// What a call answers: a number, or an error.
pub(crate) type Answer = Result<usize, i32>;

impl Kernel {
    pub(crate) fn new(plan: &Plan) -> Self {
        Kernel {
            memory: Memory::new(),
            files: Files::new(),
            signals: Signals::default(),
            machine: 64 << 20,
            limit: if plan.scarce {
                plan.budget / 2
            } else {
                64 << 20
            },
            // Where it does not say, a pool must let it take pages away.
            accounts: !plan.parties.reclaim,
            stderr: String::new(),
            break_seconds: 45,
        }
    }

    /// What a file of `/proc` or `/sys` says.
    pub(crate) fn text(&self, path: &str) -> Option<String> {
        Some(match path {
            "/proc/meminfo" => {
                let kib = self.machine >> 10;
                format!("MemTotal: {kib} kB\nMemAvailable: {kib} kB\n")
            }
            "/proc/self/cgroup" => "0::/x\n".to_owned(),
            "/sys/fs/cgroup/x/memory.max" => "max\n".to_owned(),
            "/sys/fs/cgroup/x/memory.high" => format!("{}\n", self.limit),
            // Each page that was taken back is one for which a thread waited.
            "/sys/fs/cgroup/x/memory.pressure" => {
                let us = self.memory.reclaimed * 10_000;
                format!("some avg10=0.00 avg60=0.00 avg300=0.00 total={us}\n")
            }
            "/sys/fs/cgroup/x/memory.current" => "0\n".to_owned(),
            "/sys/fs/cgroup/x/memory.stat" if self.accounts => "anon 0\nshmem 0\n".to_owned(),
            "/proc/sys/fs/lease-break-time" => format!("{}\n", self.break_seconds),
            "/proc/self/status" => "VmPTE: 4 kB\n".to_owned(),
            _ => return None,
        })
    }
}

/// A call that can be interrupted is, now.
pub(crate) fn interrupted() -> bool {
    with(|w| w.rng.once_in(w.plan.faults.interrupted))
}

/// Reads something that a call points to.
pub(crate) fn read<T: Copy>(at: usize) -> T {
    // SAFETY: the engine passes structures of the kernel's layout to calls.
    unsafe { (at as *const T).read_unaligned() }
}

/// Writes something to where a call points.
pub(crate) fn write<T>(at: usize, value: T) {
    // SAFETY: as above, and writable.
    unsafe { (at as *mut T).write_unaligned(value) }
}

/// A span of time that a call points to, in nanoseconds.
fn span(at: usize) -> u64 {
    let t: libc::timespec = read(at);
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

/// Makes a call.
pub(crate) fn call(nr: libc::c_long, a: [usize; 6]) -> isize {
    let enter = |inside| {
        with(|w| {
            w.clock += 100 + w.rng.below(200);
            if let Some(t) = w.scheduler.running() {
                t.in_kernel = inside;
            }
        });
    };
    enter(true);
    let answer = answer(nr, a);
    enter(false);
    tell(|| format!("call {nr} {a:x?} = {answer:?}"));
    match answer {
        Ok(n) => n as isize,
        Err(e) => -(e as isize),
    }
}

/// With `--trace`: tells what the running thread does.
pub(crate) fn tell(what: impl FnOnce() -> String) {
    if with(|w| w.trace) {
        let (clock, thread) = with(|w| (w.clock, w.scheduler.current));
        eprintln!("{clock} thread {thread}: {}", what());
    }
}

fn answer(nr: libc::c_long, a: [usize; 6]) -> Answer {
    let fd = a[0] as i32;
    match nr {
        libc::SYS_getpid => Ok(PID as usize),
        libc::SYS_gettid => Ok(with(|w| w.scheduler.current + scheduler::TID_BASE) as usize),
        libc::SYS_geteuid => Ok(0),
        libc::SYS_uname => {
            // SAFETY: zeros are valid.
            let mut name: libc::utsname = unsafe { std::mem::zeroed() };
            for (to, &from) in name.release.iter_mut().zip(b"6.18.0") {
                *to = from as libc::c_char;
            }
            write(a[0], name);
            Ok(0)
        }
        libc::SYS_sched_yield => {
            scheduler::give_way();
            Ok(0)
        }
        libc::SYS_nanosleep => {
            scheduler::sleep(span(a[0]));
            Ok(0)
        }
        libc::SYS_futex => futex(a),
        libc::SYS_rt_sigprocmask => signals::mask(a),
        libc::SYS_rt_sigaction => signals::action(a),
        libc::SYS_rt_sigtimedwait => signals::take(a[0], a[2]),
        libc::SYS_tgkill => signals::send(a[1] as u32, a[2] as i32),
        libc::SYS_mmap => memory::map(a),
        libc::SYS_munmap => memory::unmap(a[0], a[1]),
        libc::SYS_mprotect => memory::protect(a[0], a[1], a[2] as i32),
        libc::SYS_madvise => memory::advise(a[0], a[1], a[2] as i32).map(|_| 0),
        libc::SYS_process_madvise => memory::advise_batch(a[1], a[2], a[3] as i32),
        libc::SYS_munlock => Ok(0),
        libc::SYS_userfaultfd => files::userfaultfd(),
        libc::SYS_ioctl => memory::ioctl(fd, a[1] as u32, a[2]),
        libc::SYS_write if fd == 2 => {
            // SAFETY: the caller's bytes.
            let bytes = unsafe { std::slice::from_raw_parts(a[1] as *const u8, a[2]) };
            with(|w| w.kernel.stderr.push_str(&String::from_utf8_lossy(bytes)));
            Ok(a[2])
        }
        _ => match files::answer(nr, a) {
            Some(answer) => answer,
            None => fail(&format!("system call {nr} is not simulated")),
        },
    }
}

fn futex(a: [usize; 6]) -> Answer {
    match a[1] as i32 & !libc::FUTEX_PRIVATE_FLAG {
        libc::FUTEX_WAIT => {
            if read::<u32>(a[0]) != a[2] as u32 {
                return Err(libc::EAGAIN);
            }
            if interrupted() {
                return Err(libc::EINTR);
            }
            match scheduler::wait(a[0], span(a[3])) {
                true => Err(libc::ETIMEDOUT),
                false => Ok(0),
            }
        }
        libc::FUTEX_WAKE => {
            scheduler::wake(a[0], a[2]);
            Ok(0)
        }
        other => fail(&format!("futex operation {other} is not simulated")),
    }
}

/// Somebody keeps a lock of the kernel's for a time.
pub(crate) fn hold_mmap_lock(write: bool, ns: u64) {
    let lock = memory::MmapLock::take(write);
    scheduler::sleep(ns);
    drop(lock);
}

/// The process forks: each mapping is write-locked while page tables are copied.
pub(crate) fn fork(ns: u64) {
    let lock = memory::MmapLock::take(true);
    with(|w| w.kernel.memory.forking = true);
    scheduler::sleep(ns);
    with(|w| w.kernel.memory.forking = false);
    drop(lock);
    world::quietly(|| ());
}
