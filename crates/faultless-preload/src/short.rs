//! Calls that read something short through a pointer: a path, an address, a structure.

#![allow(
    unsafe_code,
    reason = "functions of the C library, with its pointers and its promises"
)]

use crate::counters::Counter;
use crate::fills::STACK;
use crate::lend::{GivenWords, filled, filled_parts, filled_through, kept, may_be_kept, range};
use crate::probe;
use crate::real::{errno, real};
use crate::state::{self, idle};
use faultless::standin;
use libc::iovec;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering};

/// Functions whose arguments are integers and pointers. Where the kernel could not read what a pointer points to, the call is made
/// again with the address of the kernel's own mapping of the same bytes. All arguments are passed on as words, which is how both
/// architectures pass them.
macro_rules! tried_again {
    ($kind:ty, $failed:expr, $before:path; $($name:ident($($arg:ident)*);)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name($($arg: usize),*) -> $kind {
            let real = real!($name as unsafe extern "C-unwind" fn($(tried_again!(@word $arg)),*) -> $kind);
            standin::forsake();
            // (What the call may write to needs no second try.)
            $before(&[$($arg),*]);
            if idle() {
                // SAFETY: the program's own arguments.
                return unsafe { real($($arg),*) };
            }
            let hand_backs = standin::hand_backs();
            // SAFETY: the program's own arguments.
            let result = unsafe { real($($arg),*) };
            if result != $failed || errno() != libc::EFAULT {
                return result;
            }
            static COUNTER: Counter = Counter::new(stringify!($name), true);
            let mut result = result;
            if let Some(given) = GivenWords::again([$($arg),*], hand_backs, &COUNTER) {
                let [$($arg),*] = given.words;
                // SAFETY: the same arguments, where pointers into our mappings are replaced by other addresses of the same bytes.
                result = unsafe { real($($arg),*) };
                if result != $failed || errno() != libc::EFAULT {
                    return result;
                }
            }
            if keeps_addresses(stringify!($name)) {
                // SAFETY: the program's own arguments.
                result = unsafe { real($($arg),*) };
            }
            result
        }
    )* };
    (@word $arg:ident) => { usize };
}

/// A call whose structures may have the addresses of memory, which the kernel or a device is to use by itself: registered buffers, the
/// memory of a virtual machine. Live mappings become the kernel's again, and the call is to be made once more. `false` if there are
/// none.
fn keeps_addresses(name: &str) -> bool {
    let reason = "the kernel, or a device, uses memory by itself (ioctl)";
    name == "ioctl" && !state::foreign() && state::lock().hand_back_live(None, reason)
}

/// The kernel is to write to the parts of a vector, which is the second argument; the third says how many there are.
fn fills_vector(words: &[usize]) {
    if let &[_, vector, count, ..] = words {
        // (An int.)
        let count = usize::try_from(count as c_int).unwrap_or(usize::MAX);
        filled_parts(vector as *const iovec, count);
    }
}

/// The kernel gets a stack for signal handlers, which it will write to in the midst of anything.
fn gives_stack(words: &[usize]) {
    filled_through(words);
    if may_be_kept()
        && let Some(new) = probe::copy(words[0] as *const libc::stack_t)
    {
        kept(&range(new.ss_sp, new.ss_size), STACK);
    }
}

/// The kernel may get memory to use by itself: what an `ioctl` is handed may have addresses in it. Most such calls fail if memory is absent.
/// Those about virtual machines do not fail: a guest that touches absent memory waits for it, perhaps for ever.
pub(crate) fn gives_memory(words: &[usize]) {
    filled_through(words);
    /// The types of the numbers of those for KVM, and for vhost.
    const MACHINES: [usize; 2] = [0xAE, 0xAF];
    static CLOSED: AtomicBool = AtomicBool::new(false);
    let kind = words[1] >> 8 & 0xFF;
    if MACHINES.contains(&kind)
        && !CLOSED.load(Ordering::SeqCst)
        && state::on()
        && !state::foreign()
        && !state::forking()
    {
        state::lock().close("the program runs virtual machines, which use its memory");
        CLOSED.store(true, Ordering::SeqCst);
    }
}

/// The kernel is to write a message, of the length that it is told.
fn fills_message(words: &[usize]) {
    filled_through(words);
    filled(&range(words[1] as *const c_void, words[2]));
}

tried_again! { c_int, -1, filled_through;
    open(path flags mode);
    open64(path flags mode);
    openat(dir path flags mode);
    openat64(dir path flags mode);
    __open_2(path flags);
    __open64_2(path flags);
    __openat_2(dir path flags);
    __openat64_2(dir path flags);
    creat(path mode);
    creat64(path mode);
    stat(path to);
    stat64(path to);
    lstat(path to);
    lstat64(path to);
    fstatat(dir path to flags);
    fstatat64(dir path to flags);
    statx(dir path flags mask to);
    __xstat(version path to);
    __xstat64(version path to);
    __lxstat(version path to);
    __lxstat64(version path to);
    __fxstatat(version dir path to flags);
    __fxstatat64(version dir path to flags);
    statfs(path to);
    statfs64(path to);
    statvfs(path to);
    statvfs64(path to);
    access(path mode);
    faccessat(dir path mode flags);
    eaccess(path mode);
    euidaccess(path mode);
    chmod(path mode);
    fchmodat(dir path mode flags);
    chown(path user group);
    lchown(path user group);
    fchownat(dir path user group flags);
    unlink(path);
    unlinkat(dir path flags);
    rename(from to);
    renameat(from_dir from to_dir to);
    renameat2(from_dir from to_dir to flags);
    link(from to);
    linkat(from_dir from to_dir to flags);
    symlink(from to);
    symlinkat(from dir to);
    mkdir(path mode);
    mkdirat(dir path mode);
    rmdir(path);
    mkfifo(path mode);
    mknod(path mode device);
    mknodat(dir path mode device);
    chdir(path);
    chroot(path);
    truncate(path len);
    truncate64(path len);
    utimensat(dir path times flags);
    utimes(path times);
    utime(path times);
    setxattr(path name value size flags);
    lsetxattr(path name value size flags);
    fsetxattr(fd name value size flags);
    removexattr(path name);
    inotify_add_watch(fd path mask);
    bind(fd address len);
    connect(fd address len);
    setsockopt(fd level option value len);
    sethostname(name len);
    memfd_create(name flags);
    mount(source target kind flags data);
    umount(target);
    umount2(target flags);
    remove(path);
    epoll_ctl(fd operation other event);
    nanosleep(time left);
    timer_settime(timer flags time before);
    timerfd_settime(fd flags time before);
    clock_settime(clock time);
    settimeofday(time zone);
    adjtime(delta before);
    setitimer(which time before);
    sched_setaffinity(pid size mask);
    sched_setparam(pid parameters);
    sched_setscheduler(pid policy parameters);
    acct(path);
    swapon(path flags);
    swapoff(path);
    quotactl(command special id address);
    pivot_root(new old);
    name_to_handle_at(dir path handle mount flags);
    open_by_handle_at(mount handle flags);
    fanotify_mark(fd flags mask dir path);
    semop(set operations count);
    semtimedop(set operations count timeout);
    shmctl(id command buffer);
    msgctl(id command buffer);
    mq_open(name flags mode attributes);
    mq_unlink(name);
    mq_setattr(queue new old);
    mq_notify(queue event);
    mq_timedsend(queue message len priority timeout);
    mq_send(queue message len priority);
    lchmod(path mode);
    signalfd(fd mask flags);
    ftok(path id);
    scandirat(dir path list filter compare);
    scandirat64(dir path list filter compare);
    msgsnd(queue message len flags);
    futimens(fd times);
    futimes(fd times);
    futimesat(dir path times);
    lutimes(path times);
    lremovexattr(path name);
    fremovexattr(fd name);
    mkfifoat(dir path mode);
    setdomainname(name len);
    sigtimedwait(set info timeout);
    sigwaitinfo(set info);
    scandir(path list filter compare);
    scandir64(path list filter compare);
    ftw(path function depth);
    ftw64(path function depth);
    nftw(path function depth flags);
    nftw64(path function depth flags);
    shm_open(name flags mode);
    shm_unlink(name);
    sem_unlink(name);
    fsopen(name flags);
    fspick(dir path flags);
    fsconfig(fd command key value aux);
    move_mount(from_dir from to_dir to flags);
    open_tree(dir path flags);
    mount_setattr(dir path flags attributes size);
}

/// The same for functions that return the error instead of setting errno.
macro_rules! tried_again_error {
    ($($name:ident($($arg:ident)*);)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name($($arg: usize),*) -> c_int {
            let real = real!($name as unsafe extern "C-unwind" fn($(tried_again!(@word $arg)),*) -> c_int);
            filled_through(&[$($arg),*]);
            let hand_backs = standin::hand_backs();
            // SAFETY: the program's own arguments.
            let error = unsafe { real($($arg),*) };
            if error != libc::EFAULT {
                return error;
            }
            static COUNTER: Counter = Counter::new(stringify!($name), true);
            let Some(given) = GivenWords::again([$($arg),*], hand_backs, &COUNTER) else {
                return error;
            };
            let [$($arg),*] = given.words;
            // SAFETY: the same arguments, where pointers into our mappings are replaced by other addresses of the same bytes.
            unsafe { real($($arg),*) }
        }
    )* };
}

tried_again_error! {
    clock_nanosleep(clock flags time left);
    sigwait(set signal);
    pthread_setaffinity_np(thread size mask);
    pthread_setschedparam(thread policy parameters);
}

tried_again! { c_int, -1, gives_stack;
    sigaltstack(new old);
}

tried_again! { c_int, -1, gives_memory;
    ioctl(fd request argument);
}

tried_again! { isize, -1, fills_message;
    mq_timedreceive(queue message len priority timeout);
}

tried_again! { isize, -1, fills_vector;
    readv(fd vector count);
    preadv(fd vector count offset);
    preadv64(fd vector count offset);
    preadv2(fd vector count offset flags);
    preadv64v2(fd vector count offset flags);
}

tried_again! { isize, -1, filled_through;
    readlink(path to size);
    readlinkat(dir path to size);
    __readlink_chk(path to size room);
    __readlinkat_chk(dir path to size room);
    getxattr(path name to size);
    lgetxattr(path name to size);
    fgetxattr(fd name to size);
    listxattr(path to size);
    llistxattr(path to size);
    process_madvise(process vector count advice flags);
    pathconf(path name);
}

tried_again! { usize, 0, filled_through;
    opendir(path);
    fopen(path mode);
    fopen64(path mode);
    setmntent(path mode);
}

/// Closes before it opens, so that it cannot be made again.
macro_rules! reopens {
    ($($name:ident)*) => { $(
        #[unsafe(no_mangle)]
        unsafe extern "C-unwind" fn $name(path: usize, mode: usize, stream: usize) -> usize {
            let given = GivenWords::new([path, mode]);
            let [path, mode] = given.as_ref().map_or([path, mode], |g| g.words);
            // SAFETY: the program's own arguments, or other addresses of the same strings.
            unsafe { real!($name as unsafe extern "C-unwind" fn(usize, usize, usize) -> usize)(path, mode, stream) }
        }
    )* };
}
reopens! { freopen freopen64 }
