/* System calls that bypass the C library, with memory that is absent. */
#include "check.h"

static const size_t len = 16 << 20;
static const char *map;

#if defined __x86_64__
static long raw(long nr, long a, long b, long c, long d, long e, long f)
{
    long result;
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    __asm__ volatile("syscall" : "=a"(result) : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return result;
}
#else
static long raw(long nr, long a, long b, long c, long d, long e, long f)
{
    register long x8 __asm__("x8") = nr, x0 __asm__("x0") = a, x1 __asm__("x1") = b, x2 __asm__("x2") = c, x3 __asm__("x3") = d,
                  x4 __asm__("x4") = e, x5 __asm__("x5") = f;
    __asm__ volatile("svc 0" : "+r"(x0) : "r"(x8), "r"(x1), "r"(x2), "r"(x3), "r"(x4), "r"(x5) : "memory");
    return x0;
}
#endif

static const char *cold(size_t at)
{
    CHECK(madvise((void *)map, len, MADV_DONTNEED) == 0);
    return map + at;
}
static int pair[2];
static void *late_reader(void *unused)
{
    (void)unused;
    usleep(100000);
    static char b[1 << 20];
    size_t n = 0;
    while (n < 8 << 20) {
        ssize_t r = read(pair[1], b, sizeof b);
        CHECK(r > 0);
        n += r;
    }
    return NULL;
}
static volatile int alarms;
static void on_alarm(int signo)
{
    (void)signo;
    alarms++;
    /* A miss and a raw call, in a handler that interrupts one. */
    CHECK(*(const volatile uint64_t *)(map + (3 << 20)) == word((3 << 20) / 8));
    int null = open("/dev/null", O_WRONLY);
    CHECK(raw(SYS_write, null, (long)(map + (4 << 20)), 100, 0, 0, 0) == 100);
    close(null);
}

int main(int argc, char **argv)
{
    make(argv[1], len);
    map = map_file(argv[1], 0, len);
    char path[4096];
    snprintf(path, sizeof path, "%s.out", argv[1]);
    int out = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    const size_t odd = 12345, n = 9 << 20;
    char *copy = malloc(len), *back = malloc(len);
    int fd = open(argv[1], O_RDONLY);
    CHECK(pread(fd, copy, len, 0) == (ssize_t)len);
    if (argc > 2) {
        /* Without --compat: what the kernel says. */
        long r = raw(SYS_write, out, (long)cold(odd), 100, 0, 0, 0);
        printf("%ld\n", r);
        return 0;
    }
    CHECK(raw(SYS_write, out, (long)cold(odd), n, 0, 0, 0) == (long)n);
    CHECK(pread(out, back, n, 0) == (ssize_t)n && memcmp(back, copy + odd, n) == 0);
    CHECK(raw(SYS_pwrite64, out, (long)cold(odd + 77), n, 0, 0, 0) == (long)n);
    CHECK(pread(out, back, n, 0) == (ssize_t)n && memcmp(back, copy + odd + 77, n) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    struct stat st;
    CHECK(raw(SYS_newfstatat, AT_FDCWD, (long)cold(0), (long)&st, 0, 0, 0) == -ENAMETOOLONG || raw(SYS_newfstatat, AT_FDCWD, (long)cold(0), (long)&st, 0, 0, 0) == -ENOENT);
    /* Signals come while such a call waits. */
    struct sigaction sa = { .sa_handler = on_alarm, .sa_flags = SA_RESTART };
    CHECK(sigaction(SIGALRM, &sa, NULL) == 0);
    pthread_t t;
    CHECK(pthread_create(&t, NULL, late_reader, NULL) == 0);
    ualarm(20000, 0);
    long sent = 0;
    while (sent < 8 << 20) {
        long r = raw(SYS_write, pair[0], (long)(map + sent), (8 << 20) - sent, 0, 0, 0);
        CHECK(r > 0 || r == -EINTR);
        sent += r > 0 ? r : 0;
    }
    CHECK(pthread_join(t, NULL) == 0 && alarms == 1);
    /* Mappings of ours, cut by raw calls. */
    CHECK(raw(SYS_munmap, (long)(map + (8 << 20)), 1 << 20, 0, 0, 0, 0) == 0);
    verify(map, 0, 0, 8 << 20);
    verify(map, 0, 9 << 20, len);
    const char *again = map_file(argv[1], 0, len);
    verify(again, 0, 0, len);
    CHECK(raw(SYS_munmap, (long)again, len, 0, 0, 0, 0) == 0);
    /* A child has the filter as well. */
    again = map_file(argv[1], 0, len);
    pid_t child = fork();
    if (child == 0) {
        const char *own = map_file(argv[1], 0, len);
        CHECK(raw(SYS_pwrite64, out, (long)(own + odd), n, 0, 0, 0) == (long)n);
        CHECK(pread(out, back, n, 0) == (ssize_t)n && memcmp(back, copy + odd, n) == 0);
        execl("/proc/self/exe", argv[0], argv[1], "child", NULL);
        _exit(9);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    unlink(path);
    printf("good\n");
    return 0;
}
