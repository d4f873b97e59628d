/* A file is cut short and written again while threads read it; a handler jumps back.
 *
 *     cut_short FILE */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/wait.h>
static const size_t n = 4 << 20; static unsigned char *m; static __thread sigjmp_buf back; static __thread volatile int armed;
static const char *file;
static int caught, wrong; static volatile int stop;
static void on_bus(int s) { if (armed) siglongjmp(back, 1); _exit(50); }
static unsigned char byte(size_t i) { return (unsigned char)(i / 4096 * 7 + 3); }
static void fill(const char *p) { static unsigned char b[1 << 20]; int fd = open(p, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    for (size_t at = 0; at < n; at += sizeof b) { for (size_t i = 0; i < sizeof b; i++) b[i] = byte(at + i); if (write(fd, b, sizeof b) != sizeof b) _exit(51); } close(fd); }
static void *go(void *a) {
    size_t at = (size_t)a * 4096;
    while (!stop) {
        if (sigsetjmp(back, 1)) { armed = 0; __atomic_fetch_add(&caught, 1, __ATOMIC_RELAXED); usleep(200); continue; }
        armed = 1; unsigned char x = *(volatile unsigned char *)(m + at); armed = 0;
        if (x != byte(at) && x != 0) __atomic_fetch_add(&wrong, 1, __ATOMIC_RELAXED);
        at = (at + 17 * 4096) % n;
    }
    return 0; }
int main(int argc, char **argv) {
    if (argc < 2) return 2;
    file = argv[1];
    struct sigaction sa; memset(&sa, 0, sizeof sa); sa.sa_handler = on_bus; sa.sa_flags = SA_NODEFER; sigaction(SIGBUS, &sa, 0);
    fill(file);
    for (int r = 0; r < 40; r++) {
        int fd = open(file, O_RDONLY); m = mmap(0, n, PROT_READ, MAP_SHARED, fd, 0); close(fd);
        if (m == MAP_FAILED) return 52;
        stop = 0; pthread_t t[4];
        for (long i = 0; i < 4; i++) pthread_create(t + i, 0, go, (void *)i);
        usleep(1000);
        pid_t p = fork();
        if (!p) { fd = open(file, O_WRONLY | O_TRUNC); usleep(2000); close(fd); fill(file); _exit(0); }
        int st; waitpid(p, &st, 0);
        usleep(1000); stop = 1;
        for (int i = 0; i < 4; i++) pthread_join(t[i], 0);
        munmap(m, n);
    }
    printf("wrong bytes: %d\nfaults were caught: %s\n", wrong, caught ? "yes" : "no");
    return 0;
}
