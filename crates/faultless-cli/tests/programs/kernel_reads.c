/* The kernel reads pages of a mapping that nobody has touched, in ways other than write and send.
 *
 *     kernel_reads FILE GONE   a file as the test makes it; the name in it of a file to be removed */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>
#include <unistd.h>
#include <fcntl.h>
#include <spawn.h>
#include <time.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <linux/futex.h>
extern char **environ;
static char buf[4096];
#define SAY(what, r) do { long r_ = (long)(r); int e_ = errno; printf("%s: %ld, errno %d\n", what, r_, r_ < 0 ? e_ : 0); fflush(stdout); errno = 0; } while (0)
int main(int argc, char **argv) {
    if (argc < 3) return 2;
    size_t n = 16 << 20; int st, pf[2]; pid_t pid;
    int fd = open(argv[1], O_RDONLY);
    char *m = mmap(0, n, PROT_READ, MAP_SHARED, fd, 0);
    madvise(m, n, MADV_RANDOM);
    close(fd);
    errno = 0;
    struct iovec l = { buf, 4096 }, r1 = { m + 100 * 4096, 4096 };
    SAY("process_vm_readv of itself", process_vm_readv(getpid(), &l, 1, &r1, 1, 0));
    int mem = open("/proc/self/mem", O_RDONLY);
    SAY("pread of /proc/self/mem", pread(mem, buf, 4096, (off_t)(m + 1000 * 4096)));
    char *none[] = { "x", 0 }, *two[] = { "echo", m + (2 << 20), 0 };
    int e = posix_spawn(&pid, m + (1 << 20), 0, 0, none, environ); SAY("posix_spawn, path", e); if (!e) waitpid(pid, &st, 0); errno = 0;
    e = posix_spawn(&pid, "/bin/echo", 0, 0, two, environ); if (!e) waitpid(pid, &st, 0); errno = 0; SAY("posix_spawn, argument", e);
    close(open(argv[2], O_CREAT | O_WRONLY, 0600)); errno = 0;
    SAY("remove", remove(m + (3 << 20))); unlink(argv[2]); errno = 0;
    if (!(pid = vfork())) { execl("/bin/echo", "echo", m + (4 << 20), (char *)0); _exit(9); }
    waitpid(pid, &st, 0); errno = 0; SAY("vfork and execl", WEXITSTATUS(st));
    if (!(pid = vfork())) { char *a[] = { "echo", m + (5 << 20), 0 }; execv("/bin/echo", a); _exit(9); }
    waitpid(pid, &st, 0); errno = 0; SAY("vfork and execv", WEXITSTATUS(st));
    st = system(m + (6 << 20)); errno = 0; SAY("system", WEXITSTATUS(st));
    pipe(pf); int ep = epoll_create1(0); errno = 0;
    SAY("epoll_ctl", epoll_ctl(ep, EPOLL_CTL_ADD, pf[0], (void *)(m + 2100 * 4096)));
    SAY("ioctl FIONBIO", ioctl(pf[0], FIONBIO, m + 2200 * 4096));
    SAY("nanosleep", nanosleep((void *)(m + 2300 * 4096), 0));
    SAY("prctl PR_SET_NAME", prctl(PR_SET_NAME, m + (7 << 20)));
    struct timespec t = { 0, 1000000 };
    SAY("futex, a value that differs", syscall(SYS_futex, m + 2500 * 4096, FUTEX_WAIT, 12345, &t, 0, 0));
    SAY("clock_nanosleep", clock_nanosleep(CLOCK_MONOTONIC, 0, (void *)(m + 2600 * 4096), 0));
    SAY("write to a pipe", write(pf[1], m + 2700 * 4096, 4096));
    return 0;
}
