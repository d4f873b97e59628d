/* Each function that the library stands before, called with pointers that cannot be read. The kernel answers EFAULT, or the C
 * library follows the pointer and the process dies: either way the outcome must be the same with the library before it.
 *
 *     pointers FILE      one line for each function
 *     pointers FILE good the same for those that fill memory, where it can be filled
 *     pointers --names   the functions that are in the table
 *
 * A test compares the names with what the library exports, so that no function can be added without a row here. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* Arguments, a letter each: b a bad pointer; v a vector whose only part is bad; h a message whose vector is bad; f a socket;
 * r a file; a AT_FDCWD; p this process; n 16; 1 to 4; 0; - minus one; D MSG_DONTWAIT; G F_GETLK; A arguments; w another vector; s a path; u a signal; t a short time; m a mapping. */
static const struct row {
    const char *name, *arguments;
} rows[] = {
    { "write", "fbn" }, { "pwrite", "rbn0" }, { "pwrite64", "rbn0" }, { "send", "fbn0" }, { "sendto", "fbn000" },
    { "sendto", "fsnx" "bn" }, { "writev", "fb1" }, { "writev", "fv1" }, { "writev", "fv-" }, { "pwritev", "rb10" }, { "pwritev", "rv10" },
    { "pwritev64", "rb10" }, { "pwritev2", "rb100" }, { "pwritev2", "rv100" }, { "pwritev64v2", "rb100" }, { "vmsplice", "fb10" },
    { "vmsplice", "fv10" }, { "process_vm_writev", "pb1b10" }, { "process_vm_writev", "pv1v10" }, { "process_vm_readv", "pb1b10" },
    { "process_vm_readv", "pv1v10" }, { "sendmsg", "fb0" }, { "sendmsg", "fh0" }, { "sendmmsg", "fb10" }, { "pread", "rbn0" },
    { "pread64", "rbn0" }, { "read", "rbn" }, { "open", "b0" }, { "open64", "b0" }, { "openat", "ab0" }, { "openat64", "ab0" },
    { "__open_2", "b0" }, { "__open64_2", "b0" }, { "__openat_2", "ab0" }, { "__openat64_2", "ab0" }, { "creat", "b0" },
    { "creat64", "b0" }, { "stat", "bb" }, { "stat64", "bb" }, { "lstat", "bb" }, { "lstat64", "bb" }, { "fstatat", "abb0" },
    { "fstatat64", "abb0" }, { "statx", "ab0nb" }, { "__xstat", "1bb" }, { "__xstat64", "1bb" }, { "__lxstat", "1bb" },
    { "__lxstat64", "1bb" }, { "__fxstatat", "1abb0" }, { "__fxstatat64", "1abb0" }, { "statfs", "bb" }, { "statfs64", "bb" },
    { "statvfs", "bb" }, { "statvfs64", "bb" }, { "access", "b0" }, { "faccessat", "ab00" }, { "eaccess", "b0" },
    { "euidaccess", "b0" }, { "chmod", "b0" }, { "fchmodat", "ab00" }, { "chown", "b00" }, { "lchown", "b00" }, { "fchownat", "ab000" },
    { "unlink", "b" }, { "unlinkat", "ab0" }, { "rename", "bb" }, { "renameat", "abab" }, { "renameat2", "abab0" }, { "link", "bb" },
    { "linkat", "abab0" }, { "symlink", "bb" }, { "symlinkat", "bab" }, { "mkdir", "b0" }, { "mkdirat", "ab0" }, { "rmdir", "b" },
    { "mkfifo", "b0" }, { "mkfifoat", "ab0" }, { "mknod", "b00" }, { "mknodat", "ab00" }, { "chdir", "b" }, { "chroot", "b" },
    { "truncate", "b0" }, { "truncate64", "b0" }, { "utimensat", "ab00" }, { "utimes", "b0" }, { "utime", "b0" }, { "lutimes", "b0" },
    { "futimesat", "ab0" }, { "futimens", "rb" }, { "futimes", "rb" }, { "setxattr", "bbbn0" }, { "lsetxattr", "bbbn0" },
    { "fsetxattr", "rbbn0" }, { "removexattr", "bb" }, { "lremovexattr", "bb" }, { "fremovexattr", "rb" }, { "getxattr", "bbbn" },
    { "lgetxattr", "bbbn" }, { "fgetxattr", "rbbn" }, { "listxattr", "bbn" }, { "llistxattr", "bbn" }, { "inotify_add_watch", "fbn" },
    { "bind", "fbn" }, { "connect", "fbn" }, { "setsockopt", "f11bn" }, { "sethostname", "bn" }, { "setdomainname", "bn" },
    { "memfd_create", "b0" }, { "mount", "bbb0b" }, { "umount", "b" }, { "umount2", "b0" }, { "readlink", "bbn" },
    { "readlinkat", "abbn" }, { "__readlink_chk", "bbnn" }, { "__readlinkat_chk", "abbnn" }, { "mq_send", "fbn0" },
    { "mq_timedsend", "fbn0b" }, { "msgsnd", "0bn0" }, { "opendir", "b" }, { "fopen", "bb" }, { "fopen64", "bb" }, { "remove", "b" },
    { "ioctl", "fNb" }, { "epoll_ctl", "f1fb" }, { "nanosleep", "bb" }, { "clock_nanosleep", "10bb" }, { "timer_settime", "00bb" },
    { "timerfd_settime", "f0bb" }, { "clock_settime", "0b" }, { "settimeofday", "b0" }, { "adjtime", "bb" }, { "setitimer", "0bb" },
    { "setgroups", "1b" }, { "sched_setaffinity", "0nb" }, { "sched_setparam", "0b" }, { "sched_setscheduler", "00b" }, { "acct", "b" },
    { "swapon", "b0" }, { "swapoff", "b" }, { "quotactl", "0b0b" }, { "pivot_root", "bb" }, { "name_to_handle_at", "abbb0" },
    { "open_by_handle_at", "rb0" }, { "fanotify_mark", "f00ab" }, { "semop", "0b1" }, { "semtimedop", "0b1b" }, { "shmctl", "0nb" },
    { "msgctl", "0nb" }, { "mq_open", "b000" }, { "mq_unlink", "b" }, { "mq_setattr", "fbb" }, { "mq_notify", "fb" },
    { "sigtimedwait", "b0t" }, { "sigwaitinfo", "b0" }, { "sigwait", "bb" }, { "sigaltstack", "bb" }, { "scandir", "bb00" },
    { "scandir64", "bb00" }, { "ftw", "bb1" }, { "ftw64", "bb1" }, { "nftw", "bb10" }, { "nftw64", "bb10" }, { "shm_open", "b00" },
    { "shm_unlink", "b" }, { "sem_unlink", "b" }, { "fsopen", "b0" }, { "fspick", "ab0" }, { "fsconfig", "f1bb0" },
    { "move_mount", "abab0" }, { "open_tree", "ab0" }, { "mount_setattr", "ab0bn" }, { "prctl", "Pb000" }, { "fcntl", "rLb" },
    { "fcntl64", "rLb" }, { "lockf", "f1n" }, { "lockf64", "f1n" }, { "execve", "bb0" }, { "execve", "sb0" }, { "execve", "sB0" },
    { "execv", "bb" }, { "execv", "sb" }, { "execvp", "sb" }, { "execvpe", "sb0" }, { "execveat", "asb00" }, { "fexecve", "rb0" },
    { "sigaction", "ubb" }, { "sigprocmask", "0bb" }, { "pthread_sigmask", "0bb" }, { "sigsuspend", "b" }, { "ppoll", "b1t0" }, { "ppoll", "00tb" }, { "epoll_pwait", "fg1tb" }, { "pselect", "1000tb" },
    { "pselect", "1b00t0" }, { "epoll_pwait", "fb100" }, { "epoll_pwait2", "fb1t0" }, { "mincore", "mnb" }, { "setrlimit", "Rb" },
    { "setrlimit64", "Rb" }, { "prlimit", "0Rbb" }, { "prlimit64", "0Rbb" }, { "munmap", "0n" }, { "mprotect", "bn1" },
    { "pkey_mprotect", "bn1-" }, { "madvise", "bn-" }, { "posix_madvise", "bn-" }, { "mlock", "bn" }, { "mlock2", "bn0" },
    { "lchmod", "b0" }, { "signalfd", "-b0" }, { "ftok", "b1" }, { "scandirat", "abb00" }, { "scandirat64", "abb00" }, { "readv", "rb1" },
    { "preadv", "rb10" }, { "preadv64", "rb10" }, { "preadv2", "rb100" }, { "preadv64v2", "rb100" }, { "process_madvise", "fb100" },
    { "mq_timedreceive", "fbn0b" }, { "pathconf", "b1" }, { "capset", "bb" }, { "mremap", "0nn1" }, { "remap_file_pages", "0n000" },
};

/* Those have the kernel, or the C library with all signals blocked, write. They are called with memory that can be written, too. */
static const struct row fills[] = {
    { "read", "rbn" }, { "pread", "rbn0" }, { "pread64", "rbn0" }, { "readv", "rv1" }, { "preadv", "rv10" }, { "preadv64", "rv10" },
    { "preadv2", "rv100" }, { "preadv64v2", "rv100" }, { "stat", "sb" }, { "stat64", "sb" }, { "lstat", "sb" }, { "lstat64", "sb" },
    { "fstatat", "asb0" }, { "fstatat64", "asb0" }, { "statx", "as0nb" }, { "__xstat", "1sb" }, { "__lxstat", "1sb" }, { "statfs", "sb" },
    { "statvfs", "sb" }, { "readlink", "sbn" }, { "readlinkat", "asbn" }, { "sigprocmask", "00b" }, { "pthread_sigmask", "00b" },
    { "prlimit", "0R0b" }, { "prlimit64", "0R0b" }, { "sigaltstack", "0b" }, { "fcntl", "rGb" }, { "fcntl64", "rGb" }, { "prctl", "nb000" },
    { "posix_spawn", "bs00AA" }, { "posix_spawnp", "bs00AA" }, { "mincore", "mnb" }, { "ppoll", "b1t0" }, { "pselect", "nb00t0" },
    { "process_vm_readv", "pv1w10" }, { "process_vm_writev", "pw1v10" }, { "ioctl", "fNb" },
    { "recv", "fbnD" }, { "__recv_chk", "fbnnD" }, { "recvfrom", "fbnD00" }, { "recvfrom", "fsnDbb" }, { "__recvfrom_chk", "fbnnD0" },
    { "recvmsg", "fbD" }, { "recvmsg", "fhD" }, { "recvmmsg", "fb1D0" }, { "recvmmsg", "fb1Db" }, { "__read", "rbn" }, { "__pread64", "rbn0" },
    { "__read_chk", "rbnn" }, { "__pread_chk", "rbn0n" }, { "__pread64_chk", "rbn0n" }, { "getrandom", "bn0" }, { "getentropy", "bn" },
    { "getdents64", "rbn" }, { "getdirentries", "rbnb" }, { "getdirentries64", "rbnb" }, { "flistxattr", "rbn" },
    { "mq_receive", "fbn0" }, { "msgrcv", "0bn00" }, { "getcwd", "bN" }, { "__getcwd_chk", "bN-" }, { "poll", "b10" }, { "__poll", "b10" },
    { "__poll_chk", "b10n" }, { "select", "nb00t" }, { "__select", "nb00t" }, { "accept", "fbb" }, { "accept4", "fbb0" }, { "getsockname", "fbb" },
    { "getpeername", "fbb" }, { "getsockopt", "f13bb" }, { "wait", "b" }, { "waitpid", "-b0" }, { "wait3", "b00" }, { "wait4", "-b0b" },
    { "waitid", "00b4" }, { "epoll_wait", "fb10" }, { "pipe", "b" }, { "pipe2", "b0" }, { "socketpair", "110b" }, { "sigpending", "b" },
    { "fstat", "rb" }, { "fstat64", "rb" }, { "__fxstat", "1rb" }, { "__fxstat64", "1rb" }, { "fstatfs", "rb" }, { "fstatfs64", "rb" },
    { "fstatvfs", "rb" }, { "fstatvfs64", "rb" }, { "getitimer", "0b" }, { "timerfd_gettime", "fb" }, { "clock_getres", "1b" },
    { "clock_getres", "3b" }, { "clock_gettime", "1b" }, { "clock_gettime", "3b" }, { "gettimeofday", "b0" }, { "timespec_get", "b1" }, { "clock_adjtime", "0b" }, { "adjtimex", "b" },
    { "ntp_adjtime", "b" }, { "getrusage", "0b" }, { "getrlimit", "Rb" }, { "getrlimit64", "Rb" }, { "sysinfo", "b" }, { "uname", "b" },
    { "getresuid", "bbb" }, { "getresgid", "bbb" }, { "getgroups", "nb" }, { "__getgroups_chk", "nb-" }, { "sched_getaffinity", "0nb" },
    { "sched_getparam", "0b" }, { "sched_rr_get_interval", "0b" }, { "ptsname_r", "fbn" }, { "__ptsname_r_chk", "fbnn" }, { "ttyname_r", "fbn" },
    { "__ttyname_r_chk", "fbnn" }, { "eventfd_read", "fb" }, { "mq_getattr", "fb" }, { "semctl", "002b" }, { "capget", "bb" }, { "klogctl", "3bn" },
    { "times", "b" }, { "thrd_sleep", "bb" }, { "sendfile", "frbn" }, { "sendfile64", "frbn" }, { "splice", "rbf0n0" },
    { "copy_file_range", "rbr0n0" },
};

/* Functions whose arguments are no pointers to be read, or that cannot be called so, with the reason. */
static const struct row others[] = {
    { "initgroups", "the C library reads it" }, { "pthread_create", "the C library reads it" }, { "thrd_create", "the C library reads it" }, { "setegid", "integers" }, { "seteuid", "integers" }, { "setfsgid", "integers" }, { "setfsuid", "integers" }, { "setgid", "integers" }, { "setregid", "integers" }, { "setresgid", "integers" }, { "setresuid", "integers" }, { "setreuid", "integers" }, { "setuid", "integers" }, 
    { "_exit", "integers" }, { "_Exit", "integers" }, { "_Fork", "integers" }, { "clone", "runs the pointer" }, { "close", "integers" },
    { "close_range", "integers" }, { "closefrom", "integers" }, { "dup2", "integers" }, { "dup3", "integers" }, { "ftruncate", "integers" },
    { "ftruncate64", "integers" }, { "mlockall", "integers" }, { "mmap", "the kernel reads nothing" }, { "mmap64", "the kernel reads nothing" },
    { "setns", "integers" }, { "mseal", "not in every C library; by number below" }, { "unshare", "integers" }, { "sigblock", "integers" }, { "sighold", "integers" }, { "sigignore", "integers" },
    { "sigset", "integers" }, { "sigsetmask", "integers" }, { "signal", "integers" }, { "bsd_signal", "integers" }, { "ssignal", "integers" },
    { "sysv_signal", "integers" }, { "__sysv_signal", "integers" }, { "syscall", "has rows of its own" },
    { "aio_write", "the C library reads it" }, { "aio_write64", "the C library reads it" }, { "lio_listio", "the C library reads it" },
    { "lio_listio64", "the C library reads it" }, { "pthread_attr_setsigmask_np", "the C library reads it" },
    { "fputs", "the C library reads it" }, { "fputs_unlocked", "the C library reads it" }, { "fwrite", "the C library reads it" },
    { "fwrite_unlocked", "the C library reads it" }, { "freopen", "the C library reads it" }, { "freopen64", "the C library reads it" },
    { "puts", "the C library reads it" }, { "popen", "the C library reads it" }, { "system", "runs a shell" },
    { "posix_spawn", "the C library reads it" }, { "posix_spawnp", "the C library reads it" }, { "execl", "the C library reads it" },
    { "execle", "the C library reads it" }, { "execlp", "the C library reads it" }, { "printf", "the C library reads it" },
    { "fprintf", "the C library reads it" }, { "dprintf", "the C library reads it" }, { "vprintf", "the C library reads it" },
    { "vfprintf", "the C library reads it" }, { "vdprintf", "the C library reads it" }, { "__printf_chk", "the C library reads it" },
    { "__fprintf_chk", "the C library reads it" }, { "__dprintf_chk", "the C library reads it" }, { "__vprintf_chk", "the C library reads it" },
    { "__vfprintf_chk", "the C library reads it" }, { "setmntent", "as fopen" }, { "pthread_setaffinity_np", "wants a thread" },
    { "pthread_setschedparam", "wants a thread" }, { "__vdprintf_chk", "the C library reads it" }, { "__ppoll_chk", "as ppoll" },
    { "aio_read", "the C library uses it" }, { "aio_read64", "the C library uses it" }, { "fread", "the C library uses it" },
    { "fread_unlocked", "the C library uses it" }, { "__fread_chk", "the C library uses it" }, { "__fread_unlocked_chk", "the C library uses it" },
    { "setvbuf", "the C library uses it" }, { "setbuf", "the C library uses it" }, { "setbuffer", "the C library uses it" },
    { "pthread_attr_setstack", "the C library uses it" }, { "pthread_attr_setstackaddr", "the C library uses it" },
    { "pthread_getaffinity_np", "wants a thread" }, { "pthread_getname_np", "wants a thread" }, { "ptrace", "stops a process" }, { "arc4random_buf", "returns nothing" },
    { "timer_gettime", "wants a timer" },
};

/* System calls by number, through `syscall`. */
static const struct {
    long number;
    const char *arguments;
} numbers[] = {
    { SYS_rt_sigprocmask, "-b0n" }, { SYS_rt_sigprocmask, "0b08" }, { SYS_rt_sigaction, "Bb08" }, { SYS_rt_sigaction, "B0b8" },
    { SYS_rt_sigaction, "Bb0n" }, { SYS_clone3, "bN" }, { SYS_execve, "bb0" }, { SYS_execve, "sb0" }, { SYS_write, "fbn" },
    { SYS_writev, "fb1" }, { SYS_sendmsg, "fb0" }, { SYS_sendmmsg, "fb10" }, { SYS_process_vm_readv, "pb1b10" }, { SYS_openat, "ab0" },
    { SYS_mincore, "mnb" }, { SYS_futex, "b01000" }, { SYS_unlinkat, "ab0" }, { SYS_pwritev2, "rb1000" }, { SYS_munmap, "bn" }, { 462 /* mseal */, "0n1" },
};

static char *bad, *mapped;
static int sockets[2], file;
static char there[16], *nothing[] = { "true", NULL };
static struct iovec vector, other = { there, 10 };
static struct msghdr message;
/* Pointers are good, and lead to memory that nobody has touched. */
static int good;

static long value(char letter)
{
    static struct timespec soon = { 0, 1000 };
    switch (letter) {
    case 'b': return (long)bad;
    case 'v': return (long)&vector;
    case 'h': return (long)&message;
    case 'f': return sockets[0];
    case 'r': return file;
    case 'a': return AT_FDCWD;
    case 'p': return getpid();
    case 'n': return 16;
    case 'N': return 0x5421;
    case 'P': return 15;
    case 'R': return 7;
    case 'L': return F_SETLK;
    case 'B': return SIGBUS;
    case 's': return (long)"/bin/true";
    case 'u': return SIGUSR2;
    case 't': return (long)&soon;
    case 'm': return (long)mapped;
    case 'x': return 0;
    case 'g': return (long)&message;
    case 'D': return MSG_DONTWAIT;
    case 'G': return F_GETLK;
    case 'A': return (long)nothing;
    case 'w': return (long)&other;
    case '-': return -1;
    default: return letter - '0';
    }
}

static void report(const char *name, const char *arguments, long (*call)(long, long, long, long, long, long), long first)
{
    fflush(stdout);
    posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    pid_t p = fork();
    if (!p) {
        long a[6] = { 0 };
        int n = 0, by_number = first >= 0;
        /* (What lives on in a child is not served as its parent was: the mapping is made here.) */
        mapped = mmap(NULL, 8 << 20, PROT_READ, MAP_SHARED, file, 0);
        volatile char touch = mapped[4096];
        (void)touch;
        /* One that is writable, and something to receive. */
        char *writable = mmap(NULL, 8 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
        writable[4096] = 1;
        if (good) {
            bad = writable + (6 << 20) - 16;
            vector.iov_base = bad;
            message = (struct msghdr){ .msg_iov = &vector, .msg_iovlen = 1 };
        }
        if (send(sockets[1], "0123456789abcdef", 16, MSG_DONTWAIT)) {}
        for (const char *l = arguments; *l && n < 6; l++)
            a[n++] = value(*l);
        alarm(5);
        errno = 0;
        long r = by_number ? ((long (*)(long, long, long, long, long, long, long))(void *)call)(first, a[0], a[1], a[2], a[3], a[4], a[5])
                           : call(a[0], a[1], a[2], a[3], a[4], a[5]);
        int e = errno;
        /* Pointers and descriptors differ from run to run. */
        printf("%s %s: %s, errno %d\n", name, arguments, (int)r == -1 ? "-1" : r == 0 ? "0" : "some", e);
        fflush(stdout);
        _exit(0);
    }
    int st;
    waitpid(p, &st, 0);
    if (WIFSIGNALED(st))
        printf("%s %s: killed by signal %d\n", name, arguments, WTERMSIG(st));
}

static void row(const struct row *row)
{
    void *call = dlsym(RTLD_DEFAULT, row->name);
    if (call)
        report(row->name, row->arguments, (long (*)(long, long, long, long, long, long))call, -1);
}

int main(int argc, char **argv)
{
    size_t i;
    if (argc < 2)
        return 2;
    if (!strcmp(argv[1], "--names")) {
        for (i = 0; i < sizeof rows / sizeof *rows; i++)
            puts(rows[i].name);
        for (i = 0; i < sizeof fills / sizeof *fills; i++)
            puts(fills[i].name);
        for (i = 0; i < sizeof others / sizeof *others; i++)
            puts(others[i].name);
        return 0;
    }
    bad = mmap(NULL, 1 << 20, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    vector = (struct iovec){ bad, 10 };
    message = (struct msghdr){ .msg_iov = (void *)bad, .msg_iovlen = 1 };
    socketpair(AF_UNIX, SOCK_STREAM, 0, sockets);
    file = open(argv[1], O_CREAT | O_TRUNC | O_RDWR, 0600);
    static char zeros[8 << 20];
    if (write(file, zeros, sizeof zeros) != sizeof zeros)
        return 1;
    fsync(file);
    posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
    close(file);
    file = open(argv[1], O_RDONLY);
    if (argc > 2) {
        good = 1;
        for (i = 0; i < sizeof fills / sizeof *fills; i++)
            row(fills + i);
        return 0;
    }
    for (i = 0; i < sizeof rows / sizeof *rows; i++)
        row(rows + i);
    for (i = 0; i < sizeof fills / sizeof *fills; i++)
        row(fills + i);
    for (i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        char name[40];
        snprintf(name, sizeof name, "call %ld", numbers[i].number);
        report(name, numbers[i].arguments, (long (*)(long, long, long, long, long, long))(void *)syscall, numbers[i].number);
    }
    return 0;
}
