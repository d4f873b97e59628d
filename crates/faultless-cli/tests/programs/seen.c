/* What a program can see of a mapping beside its bytes.
 *
 *     seen FILE   a file of 8 MiB */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
static size_t n = 8 << 20; static int fd; static sigjmp_buf back;
static void jump(int s) { siglongjmp(back, s); }
static void patch(int s, siginfo_t *i, void *c) { mmap((void *)((size_t)i->si_addr & ~4095ul), 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0); }
static char *map(void) { return mmap(0, n, PROT_READ, MAP_SHARED, fd, 0); }
int main(int argc, char **argv) {
    if (argc < 2) return 2;
    fd = open(argv[1], O_RDONLY); char *m, *o; unsigned char *v = malloc(n / 4096); long k = 0; int st;
    errno = 0; m = mmap(0, n, PROT_READ, 0, fd, 0); printf("mmap that is neither shared nor private: %s, errno %d\n", m == MAP_FAILED ? "refused" : "mapped", errno);
    m = mmap((void *)0x200000001000, n, PROT_READ, MAP_SHARED, fd, 0); printf("a free address that was asked for: %s\n", m == (char *)0x200000001000 ? "given" : "not given");
    o = mmap(0, n * 4, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); munmap(o, n * 4);
    m = mmap(o, n, PROT_READ, MAP_SHARED, fd, 0); char *q = mmap(o + n, n, PROT_READ, MAP_PRIVATE, fd, 0); printf("two mappings side by side: %s\n", m == o && q == o + n ? "yes" : "no");
    char *buf = malloc(1 << 20); lseek(fd, 0, SEEK_SET); while (read(fd, buf, 1 << 20) > 0) ;
    m = map(); mincore(m, n, v); for (size_t i = 0; i < n / 4096; i++) k += v[i] & 1; printf("mincore of a file in the page cache, pages: %ld\n", k);
    m = mmap(0, n, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0); k = 0; mincore(m, n, v); for (size_t i = 0; i < n / 4096; i++) k += v[i] & 1; printf("mincore after MAP_POPULATE, pages: %ld\n", k);
    m = mmap(0, 2 * n, PROT_READ, MAP_SHARED, fd, 0); struct sigaction a; memset(&a, 0, sizeof a); a.sa_sigaction = patch; a.sa_flags = SA_SIGINFO; sigaction(SIGBUS, &a, 0);
    printf("a SIGBUS handler that puts a page there: %d %d\n", m[n + 4096], m[n - 1] != 0 || 1);
    memset(&a, 0, sizeof a); a.sa_handler = jump; a.sa_flags = SA_NODEFER; sigaction(SIGBUS, &a, 0); sigaction(SIGSEGV, &a, 0);
    m = map(); st = sigsetjmp(back, 1); if (!st) { *(volatile char *)(m + 5) = 1; puts("a store went through"); } else printf("a store: signal %d\n", st);
    st = sigsetjmp(back, 1); m = mmap(0, 2 * n, PROT_READ, MAP_SHARED, fd, 0); if (!st) { volatile char x = m[n + 5]; puts("a load beyond the end went through"); } else printf("a load beyond the end: signal %d\n", st);
    signal(SIGBUS, SIG_DFL); signal(SIGSEGV, SIG_DFL); fflush(stdout); m = map(); volatile char x = m[99];
    if (!fork()) { m = map(); x = m[4096]; errno = 0; int r = unshare(CLONE_NEWUSER); printf("unshare(CLONE_NEWUSER): %d, errno %d\n", r, errno); fflush(stdout); _exit(0); } wait(&st);
    if (!fork()) { struct rlimit r = { 300 << 20, 300 << 20 }; setrlimit(RLIMIT_AS, &r); m = map(); if (m != MAP_FAILED) x = m[8192]; char *h = malloc(150 << 20); printf("a mapping of 8 MiB in 300 MiB of addresses: %s\n150 MiB of heap beside it: %s\n", m == MAP_FAILED ? "refused" : "had", h ? "had" : "refused"); fflush(stdout); _exit(0); } wait(&st);
    return 0;
}
