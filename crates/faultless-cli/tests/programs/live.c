/* A file that changes while it is mapped, and a program that has a use for SIGSEGV: everything is as the kernel has it. */
#include "check.h"

static const size_t len = 16 << 20;
static const size_t mib = 1 << 20;
static sigjmp_buf back;
static volatile sig_atomic_t signo_seen, code_seen;
static void *volatile addr_seen;
/* What the handler reads, if anything. */
static const char *volatile handlers_page;
static volatile char read_there;
/* How often the handler has run, in memory that children share; and whether it opens the signal for itself. */
static int *entries;
static volatile int unblocks;

static void on_fault(int signo, siginfo_t *info, void *context)
{
    (void)context;
    signo_seen = signo;
    code_seen = info->si_code;
    addr_seen = info->si_addr;
    ++*entries;
    if (unblocks && *entries == 1) {
        sigset_t segv, was;
        sigemptyset(&segv);
        sigaddset(&segv, SIGSEGV);
        CHECK(sigprocmask(SIG_UNBLOCK, &segv, &was) == 0 && sigismember(&was, SIGSEGV) == 1 && sigismember(&was, SIGUSR1) == 0);
        (void)*(volatile char *)NULL;
    }
    if (handlers_page)
        read_there = *handlers_page;
    siglongjmp(back, 1);
}

/* What a load of a byte comes to: a signal, or 0. */
static int load(const volatile char *at)
{
    signo_seen = 0;
    if (sigsetjmp(back, 1) == 0)
        (void)*at;
    return signo_seen;
}
static int store(volatile char *at)
{
    signo_seen = 0;
    if (sigsetjmp(back, 1) == 0)
        *at = 1;
    return signo_seen;
}

static void catch(int signo, int flags)
{
    struct sigaction sa = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | flags };
    CHECK(sigaction(signo, &sa, NULL) == 0);
}

static char *map_shared(const char *path, int *fd)
{
    *fd = open(path, O_RDWR);
    CHECK(*fd >= 0);
    char *m = mmap(NULL, len, PROT_READ, MAP_SHARED, *fd, 0);
    CHECK(m != MAP_FAILED);
    return m;
}

/* Recursion without end, on a stack that ends. */
static int descend(volatile int depth)
{
    volatile char frame[4096];
    frame[0] = (char)depth;
    return depth < 0 ? 0 : descend(depth + 1) + frame[0];
}
static void *overflow(void *stack)
{
    stack_t alternate = { .ss_sp = stack, .ss_size = 64 << 10 };
    CHECK(sigaltstack(&alternate, NULL) == 0);
    signo_seen = 0;
    if (sigsetjmp(back, 1) == 0)
        descend(0);
    CHECK(signo_seen == SIGSEGV);
    return NULL;
}

static void writers(const char *path)
{
    int fd;
    char *m = map_shared(path, &fd);
    const char *same = map_file(path, 0, len);
    verify(m, 0, 0, len / 2);
    /* A page that was touched, and one that was not. */
    char page[4096];
    memset(page, 'X', sizeof page);
    CHECK(pwrite(fd, page, PAGE, mib) == (ssize_t)PAGE && pwrite(fd, page, PAGE, 12 * mib) == (ssize_t)PAGE);
    CHECK(memcmp(m + mib, page, PAGE) == 0 && memcmp(m + 12 * mib, page, PAGE) == 0);
    CHECK(memcmp(same + mib, page, PAGE) == 0 && memcmp(same + 12 * mib, page, PAGE) == 0);
    /* Another process writes, and its own mappings are there. */
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        verify(m, 0, 2 * mib, 3 * mib);
        verify(m, 0, 13 * mib, 14 * mib);
        memset(page, 'Y', sizeof page);
        CHECK(pwrite(fd, page, PAGE, 14 * mib) == (ssize_t)PAGE);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    memset(page, 'Y', sizeof page);
    CHECK(memcmp(m + 14 * mib, page, PAGE) == 0);
    /* Truncated, and grown again. */
    CHECK(ftruncate(fd, 10 * mib + 100) == 0);
    CHECK(load(m + 11 * mib) == SIGBUS && load(m + 15 * mib) == SIGBUS && load(m + 10 * mib + 50) == 0);
    CHECK(m[10 * mib + 200] == 0);
    CHECK(ftruncate(fd, len) == 0);
    CHECK(load(m + 11 * mib) == 0 && m[11 * mib] == 0 && m[15 * mib + 77] == 0);
    /* Made writable. */
    CHECK(mprotect(m, len, PROT_READ | PROT_WRITE) == 0);
    memset(m + 15 * mib, 'Z', PAGE);
    CHECK(pread(fd, page, PAGE, 15 * mib) == (ssize_t)PAGE && page[0] == 'Z' && page[4095] == 'Z');
    CHECK(same[15 * mib + 5] == 'Z');
    CHECK(munmap(m, len) == 0 && munmap((void *)same, len) == 0);
    close(fd);
}

static void faults(const char *path)
{
    int fd;
    char *m = map_shared(path, &fd);
    CHECK(load(m + 100) == 0);
    struct sigaction old;
    CHECK(sigaction(SIGSEGV, NULL, &old) == 0 && old.sa_sigaction == on_fault && (old.sa_flags & SA_SIGINFO));
    /* Null pointers, stores into what is for reading, signals that somebody sends. */
    CHECK(load(NULL) == SIGSEGV && code_seen == SEGV_MAPERR && addr_seen == NULL);
    CHECK(store(m + 5 * mib) == SIGSEGV && code_seen == SEGV_ACCERR && addr_seen == m + 5 * mib);
    signo_seen = 0;
    if (sigsetjmp(back, 1) == 0)
        raise(SIGSEGV);
    CHECK(signo_seen == SIGSEGV && code_seen <= 0);
    /* A miss in the handler itself; and a fault there, which ends the process. */
    handlers_page = m + 11 * mib;
    CHECK(load(NULL) == SIGSEGV && read_there == m[11 * mib]);
    handlers_page = NULL;
    *entries = 0;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        verify(m, 0, 12 * mib, 13 * mib);
        handlers_page = (const char *)8;
        load(NULL);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV && *entries == 1);
    *entries = 0;
    child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        /* The same where misses are served. */
        char *again = mmap(NULL, len, PROT_READ, MAP_SHARED, fd, 0);
        verify(again, 0, 12 * mib, 13 * mib);
        handlers_page = (const char *)8;
        load(NULL);
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV && *entries == 1);
    /* The handler opens the signal, and is called for the fault that it meets then. */
    *entries = 0;
    unblocks = 1;
    CHECK(load(NULL) == SIGSEGV && *entries == 2);
    unblocks = 0;
    /* It left by a jump: it is called again. */
    CHECK(load(NULL) == SIGSEGV && load(NULL) == SIGSEGV && *entries == 4);
    /* Blocked, as far as the program can see. */
    sigset_t all, was, none;
    sigfillset(&all);
    sigemptyset(&none);
    CHECK(sigprocmask(SIG_BLOCK, &all, &was) == 0 && sigismember(&was, SIGSEGV) == 0);
    CHECK(sigprocmask(SIG_BLOCK, NULL, &was) == 0 && sigismember(&was, SIGSEGV) == 1);
    verify(m, 0, 2 * mib, 3 * mib);
    CHECK(sigprocmask(SIG_SETMASK, &none, &was) == 0 && sigismember(&was, SIGSEGV) == 1 && sigismember(&was, SIGBUS) == 1);
    CHECK(sigprocmask(SIG_SETMASK, NULL, &was) == 0 && sigismember(&was, SIGSEGV) == 0);
    /* A stack that overflows. */
    catch(SIGSEGV, SA_ONSTACK);
    pthread_t t;
    pthread_attr_t attributes;
    CHECK(pthread_attr_init(&attributes) == 0 && pthread_attr_setstacksize(&attributes, 256 << 10) == 0);
    CHECK(pthread_create(&t, &attributes, overflow, malloc(64 << 10)) == 0 && pthread_join(t, NULL) == 0);
    catch(SIGSEGV, 0);
    /* Head and tail unmapped: the rest goes on, and they are gone. */
    CHECK(munmap(m, mib) == 0 && munmap(m + 9 * mib, 7 * mib) == 0);
    CHECK(load(m + 100) == SIGSEGV && code_seen == SEGV_MAPERR && load(m + 9 * mib) == SIGSEGV);
    verify(m, 0, 4 * mib, 9 * mib);
    /* A hole, and something else in its place. */
    CHECK(munmap(m + 5 * mib, mib) == 0 && load(m + 5 * mib) == SIGSEGV && load(m + 6 * mib) == 0);
    char *other = mmap(m + 5 * mib, mib, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(other == m + 5 * mib && store(other) == 0 && other[0] == 1);
    verify(m, 0, 6 * mib, 9 * mib);
    CHECK(munmap(m + mib, 8 * mib) == 0);
    close(fd);
}

static void system_calls(const char *path)
{
    int fd, ends[2];
    char *m = map_shared(path, &fd);
    char *copy = malloc(mib);
    CHECK(pipe(ends) == 0 && fcntl(ends[1], F_SETPIPE_SZ, mib) >= (int)mib);
    CHECK(write(ends[1], m + 3 * mib, mib / 2) == (ssize_t)mib / 2 && read(ends[0], copy, mib) == (ssize_t)mib / 2);
    verify(copy, 3 * mib, 0, mib / 2);
    struct iovec parts[] = { { m + 4 * mib, PAGE }, { m + 6 * mib, PAGE }, { m + 5 * mib, PAGE } };
    CHECK(writev(ends[1], parts, 3) == (ssize_t)(3 * PAGE) && read(ends[0], copy, mib) == (ssize_t)(3 * PAGE));
    verify(copy, 4 * mib, 0, PAGE);
    verify(copy + PAGE, 6 * mib, 0, PAGE);
    verify(copy + 2 * PAGE, 5 * mib, 0, PAGE);
    /* A name in the file, advice, and a question about its pages. */
    CHECK(access(m + 8 * mib, F_OK) == -1 && errno != EFAULT);
    CHECK(madvise(m + 2 * mib, mib, MADV_POPULATE_READ) == 0 || errno == EINVAL);
    CHECK(madvise(m, len, MADV_RANDOM) == 0 && madvise(m, len, MADV_WILLNEED) == 0 && madvise(m, len, MADV_DONTNEED) == 0);
    unsigned char seen[4096];
    CHECK(mincore(m, len, seen) == 0);
    verify(m, 0, 0, 10 * mib);
    CHECK(mlock(m + 9 * mib, PAGE) == 0 || errno == EPERM || errno == ENOMEM);
    CHECK(munmap(m, len) == 0);
    close(fd);
    /* The kernel grants this lease only to a process that alone has the file open. */
    m = map_shared(path, &fd);
    CHECK(load(m + 13 * mib) == 0);
    CHECK(fcntl(fd, F_SETLEASE, F_WRLCK) == 0 && fcntl(fd, F_SETLEASE, F_UNLCK) == 0);
    verify(m, 0, 13 * mib, 14 * mib);
    CHECK(munmap(m, len) == 0);
    free(copy);
    close(fd);
    close(ends[0]);
    close(ends[1]);
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    entries = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(entries != MAP_FAILED);
    catch(SIGSEGV, 0);
    catch(SIGBUS, 0);
    make(argv[1], len);
    system_calls(argv[1]);
    make(argv[1], len);
    faults(argv[1]);
    make(argv[1], len);
    writers(argv[1]);
    printf("good\n");
    return 0;
}
