/* A program that makes random calls on mapped files and says what it observes.
 *
 *     torture SEED STEPS DIRECTORY [compat]
 *
 * All that it does follows from SEED, and what it prints depends neither on addresses nor on time. So two runs with the same
 * seed, one by itself and one under `faultless run`, print the same, or somebody is at fault. Addresses are never asked for
 * (what is free differs from run to run), `mincore` is asked whether it works and not what is cached, advice that divides a mapping is given
 * for all of it, and system calls that bypass the C library hand the kernel no mapped memory and change no protection unless
 * `compat` is given (docs/run.md has these points). */

#define _GNU_SOURCE
#include "../programs/past.h"
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define FILES 4
#define SLOTS 8

static uint64_t state;
static uint64_t roll(void)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state * 0x2545F4914F6CDD1Dull;
}
static size_t below(size_t n) { return n ? (size_t)((roll() >> 20) % n) : 0; }
static int chance(int percent) { return below(100) < (size_t)percent; }

struct slot {
    unsigned char *at; /* null: free */
    size_t len;
    int file, flags, prot;
};
static struct slot slots[SLOTS];
static char *names[FILES];
static size_t sizes[FILES];
static const char *dir;
static int step, compat;
static volatile int signals_seen;

#define SAY(...) (printf("%d ", step), printf(__VA_ARGS__), putchar('\n'), fflush(stdout))

/* A result, with its errno where it failed. */
static void result(const char *what, long r)
{
    int e = errno;
    if (r == -1)
        SAY("%s: errno %d", what, e);
    else
        SAY("%s: ok", what);
}

/* ---- loads that may fault */

static __thread sigjmp_buf back;
static __thread volatile int armed;
static void on_fault(int s)
{
    if (armed)
        siglongjmp(back, s);
    signal(s, SIG_DFL);
    raise(s);
}
static void on_user(int s)
{
    (void)s;
    signals_seen++;
    for (int i = 0; i < SLOTS; i++)
        if (slots[i].at && slots[i].prot & PROT_READ && !armed) {
            armed = 1;
            if (!sigsetjmp(back, 1))
                signals_seen += *(volatile unsigned char *)slots[i].at & 0;
            armed = 0;
        }
}

/* The byte, or minus the signal. */
static int load(const unsigned char *at)
{
    int s = sigsetjmp(back, 1), value;
    if (s) {
        armed = 0;
        return -s;
    }
    armed = 1;
    value = *(volatile const unsigned char *)at;
    armed = 0;
    return value;
}

static uint64_t hash(uint64_t h, uint64_t x) { return (h ^ x) * 0x100000001b3ull; }

static uint64_t look(const struct slot *s, int times)
{
    uint64_t h = 1469598103934665603ull;
    for (int i = 0; i < times; i++)
        h = hash(h, (uint64_t)load(s->at + below(s->len)));
    return h;
}

static uint64_t look_at_all(void)
{
    uint64_t h = 0;
    for (int i = 0; i < SLOTS; i++)
        if (slots[i].at)
            h = hash(h, look(&slots[i], 24));
    return h;
}

static void *reader(void *seed)
{
    uint64_t mine = (uint64_t)(uintptr_t)seed, h = 0;
    for (int i = 0; i < 200; i++) {
        mine = mine * 6364136223846793005ull + 1442695040888963407ull;
        struct slot *s = &slots[(mine >> 33) % SLOTS];
        if (s->at)
            h = hash(h, (uint64_t)load(s->at + (mine >> 20) % s->len));
    }
    return (void *)(uintptr_t)h;
}

/* ---- what is done */

static void make_file(int k)
{
    static unsigned char page[PAGE];
    int fd = open(names[k], O_CREAT | O_TRUNC | O_RDWR, 0600);
    for (size_t at = 0; at < sizes[k]; at += PAGE) {
        for (size_t i = 0; i < PAGE; i++)
            page[i] = (unsigned char)((at / PAGE + 1) * 31 + i * (size_t)(k + 3) + (at >> 16));
        size_t n = sizes[k] - at < PAGE ? sizes[k] - at : PAGE;
        if (write(fd, page, n) != (ssize_t)n)
            exit(90);
    }
    fsync(fd);
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
}

static struct slot *some(void)
{
    struct slot *s = &slots[below(SLOTS)];
    return s->at ? s : NULL;
}

static void map_one(void)
{
    struct slot *s = &slots[below(SLOTS)];
    if (s->at)
        return;
    int k = (int)below(FILES), shared = chance(60);
    size_t pages = (sizes[k] + PAGE - 1) / PAGE, off = chance(70) ? 0 : below(pages);
    size_t len = (pages - off) * PAGE;
    if (chance(15))
        len += below(64) * PAGE;
    else if (chance(30))
        len = (1 + below(pages - off)) * PAGE;
    int prot = chance(85) ? PROT_READ : PROT_READ | PROT_WRITE;
    int fd = open(names[k], shared && prot & PROT_WRITE ? O_RDWR : chance(85) ? O_RDONLY : O_RDWR);
    int flags = (shared ? MAP_SHARED : MAP_PRIVATE) | (chance(20) ? MAP_POPULATE : 0) | (chance(20) ? MAP_NORESERVE : 0);
    if (chance(3))
        flags &= ~MAP_TYPE;
    unsigned char *at = mmap(NULL, chance(10) ? len - below(PAGE) : len, prot, flags, fd, (off_t)(off * PAGE));
    int e = errno;
    close(fd);
    if (at == MAP_FAILED)
        SAY("map: errno %d", e);
    else {
        *s = (struct slot){ at, len, k, flags, prot };
        SAY("map file %d: %016llx", k, (unsigned long long)look(s, 8));
    }
}

static void unmap_some(void)
{
    struct slot *s = some();
    if (!s)
        return;
    size_t pages = s->len / PAGE, from = 0, to = pages;
    if (pages > 2 && chance(50)) {
        size_t a = below(pages), b = below(pages);
        from = chance(40) ? 0 : a < b ? a : b;
        to = chance(40) ? pages : (a < b ? b : a) + 1;
        if (to <= from)
            to = from + 1;
    }
    unsigned char *at = s->at + from * PAGE;
    size_t len = (to - from) * PAGE;
    long r = chance(50) ? munmap(at, len) : chance(50) ? syscall(SYS_munmap, at, len) : past(SYS_munmap, (long)at, (long)len, 0, 0, 0, 0);
    result("unmap", r);
    /* The larger rest goes on. */
    struct slot head = *s, tail = *s;
    head.len = from * PAGE;
    tail.at += to * PAGE, tail.len -= to * PAGE;
    if (head.len && tail.len)
        munmap(head.len < tail.len ? head.at : tail.at, head.len < tail.len ? head.len : tail.len);
    *s = head.len < tail.len ? tail : head;
    if (!s->len)
        s->at = NULL;
    else
        SAY("rest: %016llx", (unsigned long long)look(s, 8));
    /* Other memory at these addresses, as the kernel gives them out again. */
    if (chance(40)) {
        unsigned char *m = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(m, 0x5a, len);
        (void)look_at_all();
        size_t bad = 0;
        for (size_t i = 0; i < len; i++)
            bad += m[i] != 0x5a;
        SAY("memory that changed: %zu", bad);
        munmap(m, len);
    }
}

static void move_one(void)
{
    struct slot *s = some();
    if (!s)
        return;
    size_t len = chance(40) ? s->len : (1 + below(s->len / PAGE)) * PAGE;
    int by = (int)below(3);
    void *at;
    if (chance(50)) {
        /* To an address of its own. */
        void *to = mmap(NULL, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        int flags = MREMAP_MAYMOVE | MREMAP_FIXED;
        at = by == 0   ? mremap(s->at, s->len, len, flags, to)
             : by == 1 ? (void *)syscall(SYS_mremap, s->at, s->len, len, flags, to)
                       : (void *)past(SYS_mremap, (long)s->at, (long)s->len, (long)len, flags, (long)to, 0);
    } else {
        /* (What grows where it is, past the C library, is seen by --compat alone.) */
        if (!compat && len > s->len)
            by %= 2;
        at = by == 0   ? mremap(s->at, s->len, len, MREMAP_MAYMOVE)
             : by == 1 ? (void *)syscall(SYS_mremap, s->at, s->len, len, MREMAP_MAYMOVE, 0)
                       : (void *)past(SYS_mremap, (long)s->at, (long)s->len, (long)len, MREMAP_MAYMOVE, 0, 0);
    }
    result("move", at == MAP_FAILED ? -1 : 0);
    if (at != MAP_FAILED) {
        s->at = at, s->len = len;
        SAY("moved: %016llx", (unsigned long long)look(s, 16));
    }
}

static void protect_one(void)
{
    static const int prots[] = { PROT_NONE, PROT_READ, PROT_READ | PROT_WRITE };
    struct slot *s = some();
    if (!s)
        return;
    int prot = prots[below(3)];
    /* (A change of protection past the C library is seen by --compat alone.) */
    int by = (int)below(compat ? 3 : 2);
    long r = by == 0   ? mprotect(s->at, s->len, prot)
             : by == 1 ? syscall(SYS_mprotect, s->at, s->len, prot)
                       : past(SYS_mprotect, (long)s->at, (long)s->len, prot, 0, 0, 0);
    result("protect", r);
    if (r == 0)
        s->prot = prot;
    SAY("protected %d: %016llx", prot, (unsigned long long)look(s, 8));
}

static void store_one(void)
{
    struct slot *s = some();
    if (!s || s->flags & MAP_SHARED)
        return;
    size_t at = below(s->len);
    int sig = sigsetjmp(back, 1);
    if (!sig) {
        armed = 1;
        *(volatile unsigned char *)(s->at + at) = 0xa5;
    }
    armed = 0;
    SAY("store: %d, then %d", sig, load(s->at + at));
}

static void advise_one(void)
{
    static const int advice[] = { MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_DONTNEED, MADV_DONTDUMP, MADV_DODUMP,
                                  MADV_FREE, MADV_DONTFORK, MADV_DOFORK, 20 /* COLD */, 21 /* PAGEOUT */, 22 /* POPULATE_READ */, 18 /* WIPEONFORK */, 12345 };
    struct slot *s = some();
    if (!s)
        return;
    int a = advice[below(sizeof advice / sizeof *advice)];
    size_t from = below(s->len / PAGE), len = (1 + below(s->len / PAGE - from)) * PAGE;
    /* Private pages that were written would be lost, which is right, but depends on what was taken back before. */
    if ((a == MADV_DONTNEED || a == 21) && s->prot & PROT_WRITE)
        return;
    /* Advice that is kept with the mapping divides it in two where it is given for a part, and mremap then refuses the whole. The
     * engine does not divide a mapping for that. */
    if (a <= MADV_SEQUENTIAL || a == MADV_DONTDUMP || a == MADV_DODUMP || a == MADV_DONTFORK || a == MADV_DOFORK || a == 18)
        from = 0, len = s->len;
    result("advise", chance(50) ? madvise(s->at + from * PAGE, len, a) : syscall(SYS_madvise, s->at + from * PAGE, len, a));
    SAY("advised %d: %016llx", a, (unsigned long long)look(s, 8));
    if (a == MADV_DONTFORK)
        madvise(s->at, s->len, MADV_DOFORK);
}

static void lock_one(void)
{
    struct slot *s = some();
    if (!s)
        return;
    switch (below(5)) {
    case 0: result("lock", mlock(s->at, s->len)); result("unlock", munlock(s->at, s->len)); break;
    case 1: {
        unsigned char *v = malloc(s->len / PAGE + 1);
        result("mincore", mincore(s->at, s->len, v));
        free(v);
        break;
    }
    case 2: result("msync", msync(s->at, s->len, chance(50) ? MS_ASYNC : MS_SYNC)); break;
    case 3: result("posix_madvise", posix_madvise(s->at, s->len, (int)below(5)) ? -1 : 0); break;
    default: result("mincore of nothing", mincore(s->at, s->len, (unsigned char *)16)); break;
    }
    SAY("after: %016llx", (unsigned long long)look(s, 8));
}

static void children(void)
{
    int st = 0;
    pid_t p;
    fflush(stdout);
    switch (below(4)) {
    case 0:
    case 1:
        if (!(p = fork())) {
            uint64_t h = look_at_all();
            _exit((int)(h % 251));
        }
        break;
    case 2:
        if (!(p = vfork()))
            _exit(7);
        break;
    default:
        if (!(p = fork())) {
            execl("/proc/self/exe", "torture", "sum", names[below(FILES)], (char *)NULL);
            _exit(99);
        }
        (void)below(FILES);
        break;
    }
    waitpid(p, &st, 0);
    SAY("child: %x", st);
}

/* Drops what is mapped for reading, and the page cache: what waits for a second thread is then worth taking over. */
static void cool_all(void)
{
    for (int i = 0; i < SLOTS; i++)
        if (slots[i].at && slots[i].prot == PROT_READ && slots[i].flags & MAP_SHARED)
            madvise(slots[i].at, slots[i].len, MADV_DONTNEED);
    for (int k = 0; k < FILES; k++) {
        int fd = open(names[k], O_RDONLY);
        posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
        close(fd);
    }
}

static void threads(void)
{
    pthread_t t[4];
    uint64_t h = 0;
    if (chance(60))
        cool_all();
    for (int i = 0; i < 4; i++)
        pthread_create(&t[i], NULL, reader, (void *)(uintptr_t)(roll() | 1));
    for (int i = 0; i < 4; i++) {
        void *r;
        pthread_join(t[i], &r);
        h = hash(h, (uint64_t)(uintptr_t)r);
    }
    SAY("threads: %016llx", (unsigned long long)h);
}

static void signal_things(void)
{
    sigset_t set, old;
    switch (below(4)) {
    case 0:
        raise(SIGUSR1);
        SAY("signals: %d", signals_seen);
        break;
    case 1:
        sigemptyset(&set);
        sigaddset(&set, SIGBUS);
        sigaddset(&set, SIGUSR2);
        sigprocmask(SIG_BLOCK, &set, &old);
        sigset_t now;
        sigprocmask(SIG_UNBLOCK, &set, &now);
        SAY("masks: %d %d, %d %d", sigismember(&old, SIGBUS), sigismember(&old, SIGUSR2), sigismember(&now, SIGBUS), sigismember(&now, SIGUSR2));
        break;
    case 2: {
        struct sigaction a;
        sigaction(SIGBUS, NULL, &a);
        SAY("action: %d %x", a.sa_handler == on_fault, (unsigned)a.sa_flags & ~0x04000000u);
        break;
    }
    default: {
        long r = syscall(SYS_rt_sigprocmask, ~0, chance(50) ? (void *)&set : (void *)16, NULL, 8);
        result("probe", r);
        break;
    }
    }
}

/* Hands mapped memory to the kernel, and looks at what came out. */
static void hand_over(void)
{
    static unsigned char out[1 << 18];
    struct slot *s = some();
    if (!s || s->len < 2 * PAGE || !(s->prot & PROT_READ))
        return;
    size_t from = below(s->len - 1), len = 1 + below(s->len - from);
    if (len > sizeof out)
        len = sizeof out;
    char path[4096];
    snprintf(path, sizeof path, "%s/out", dir);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | (chance(30) ? O_APPEND : 0), 0600);
    int pair[2];
    struct iovec v[3] = { { s->at + from, len / 2 }, { out, 0 }, { s->at + from + len / 2, len - len / 2 } };
    struct msghdr m = { 0 };
    ssize_t n = -1;
    errno = 0;
    int how = (int)below(compat ? 8 : 7);
    switch (how) {
    case 0: n = write(fd, s->at + from, len); break;
    case 1: n = pwrite(fd, s->at + from, len, 100); break;
    case 2: n = writev(fd, v, 3); break;
    case 3: n = syscall(SYS_write, fd, s->at + from, len); break;
    case 4: {
        FILE *f = fdopen(dup(fd), "w");
        n = (ssize_t)fwrite(s->at + from, 1, len, f);
        fclose(f);
        break;
    }
    case 5:
    case 6:
        socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
        len = len > 60000 ? 60000 : len;
        m.msg_iov = v, m.msg_iovlen = 1, v[0].iov_len = len;
        n = how == 5 ? sendmsg(pair[0], &m, 0) : send(pair[0], s->at + from, len, 0);
        close(pair[0]);
        if (n > 0) {
            ssize_t got = 0, k;
            while ((k = read(pair[1], out + got, sizeof out - (size_t)got)) > 0)
                got += k;
            if (write(fd, out, (size_t)got) != got)
                n = -2;
        }
        close(pair[1]);
        break;
    default: n = past(SYS_write, fd, (long)(s->at + from), (long)len, 0, 0, 0); break;
    }
    int e = errno;
    uint64_t h = 0;
    ssize_t got = pread(fd, out, sizeof out, 0);
    for (ssize_t i = 0; i < got; i++)
        h = hash(h, out[i]);
    SAY("handed over %d: %zd, errno %d, %016llx", how, n, n < 0 ? e : 0, (unsigned long long)h);
    close(fd);
}

/* Somebody else changes a file. */
static void writers(void)
{
    int k = (int)below(FILES), st, what = (int)below(3);
    size_t at = below(sizes[k] / PAGE) * PAGE;
    unsigned char byte = (unsigned char)roll();
    fflush(stdout);
    pid_t p = fork();
    if (!p) {
        int fd = open(names[k], O_RDWR);
        if (what == 0 && pwrite(fd, &byte, 1, (off_t)at) != 1)
            _exit(1);
        if (what == 1) {
            struct stat was;
            fstat(fd, &was);
            if (ftruncate(fd, (off_t)at) || ftruncate(fd, was.st_size))
                _exit(2);
        }
        close(fd);
        _exit(fd < 0);
    }
    waitpid(p, &st, 0);
    SAY("writer %d: %x, then %016llx", what, st, (unsigned long long)look_at_all());
}

static int (*plugin_unmap)(void *, size_t);
static void *(*plugin_map)(size_t, int);
static void plugin(void)
{
    struct slot *s = some();
    if (!plugin_unmap || !s)
        return;
    size_t len = s->len;
    result("a plugin unmaps", plugin_unmap(s->at, len));
    s->at = NULL;
    unsigned char *m = plugin_map(len, 0x77);
    (void)look_at_all();
    size_t bad = 0;
    for (size_t i = 0; i < len; i++)
        bad += m[i] != 0x77;
    SAY("a plugin's memory that changed: %zu", bad);
    plugin_unmap(m, len);
}

static void *own_table(void *arg)
{
    (void)arg;
    if (unshare(CLONE_FILES))
        return (void *)1;
    for (int i = 3; i < 200; i++)
        close(i);
    return (void *)(uintptr_t)look_at_all();
}

static void descriptors(void)
{
    struct rlimit was, now;
    int n = 0, fds[256];
    void *r;
    pthread_t t;
    switch (below(4)) {
    case 0:
        getrlimit(RLIMIT_NOFILE, &was);
        now = was, now.rlim_cur = 100;
        setrlimit(RLIMIT_NOFILE, &now);
        while (n < 256 && (fds[n] = open("/dev/null", O_RDONLY)) >= 0)
            n++;
        SAY("free descriptors: %d, errno %d", n, errno);
        while (n)
            close(fds[--n]);
        setrlimit(RLIMIT_NOFILE, &was);
        break;
    case 1:
        for (int i = 3; i < 300; i++)
            close(i);
        SAY("closed: %016llx", (unsigned long long)look_at_all());
        break;
    case 2:
        syscall(SYS_close_range, 3, ~0u, 0);
        SAY("closed all: %016llx", (unsigned long long)look_at_all());
        break;
    default:
        pthread_create(&t, NULL, own_table, NULL);
        pthread_join(t, &r);
        SAY("a table of its own: %016llx", (unsigned long long)(uintptr_t)r);
        break;
    }
}

static void name_space(void)
{
    int st;
    fflush(stdout);
    pid_t p = fork();
    if (!p) {
        int fd = open(names[0], O_RDONLY);
        volatile unsigned char *m = mmap(NULL, sizes[0], PROT_READ, MAP_SHARED, fd, 0);
        int a = m[5], r = unshare(CLONE_NEWUSER), e = r ? errno : 0;
        printf("name space: %d %d %d, then %d\n", a, r, e, load((unsigned char *)m + sizes[0] / 2));
        fflush(stdout);
        _exit(0);
    }
    waitpid(p, &st, 0);
    SAY("in a name space: %x", st);
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "sum")) {
        struct stat st;
        int fd = open(argv[2], O_RDONLY);
        uint64_t h = 0;
        fstat(fd, &st);
        unsigned char *m = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
        for (off_t i = 0; i < st.st_size; i += 511)
            h = hash(h, m[i]);
        return (int)(h % 251);
    }
    if (argc < 4)
        return 2;
    state = strtoull(argv[1], NULL, 10) * 2654435761u + 88172645463325252ull;
    int steps = atoi(argv[2]);
    dir = argv[3];
    compat = argc > 4;
    for (int i = 0; i < 8; i++)
        roll();
    for (int k = 0; k < FILES; k++) {
        names[k] = malloc(4096);
        snprintf(names[k], 4096, "%s/file%d", dir, k);
        sizes[k] = (64 + below(800)) * PAGE - (chance(50) ? below(PAGE) : 0);
        make_file(k);
    }
    char path[4096];
    snprintf(path, sizeof path, "%s/plugin.so", dir);
    void *h = dlopen(path, RTLD_NOW | RTLD_DEEPBIND);
    if (h) {
        *(void **)&plugin_unmap = dlsym(h, "plugin_unmap");
        *(void **)&plugin_map = dlsym(h, "plugin_map");
    }
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_handler = on_fault;
    a.sa_flags = SA_NODEFER;
    sigaction(SIGBUS, &a, NULL);
    sigaction(SIGSEGV, &a, NULL);
    a.sa_handler = on_user;
    sigaction(SIGUSR1, &a, NULL);
    static void (*const does[])(void) = {
        map_one, map_one, map_one, map_one, map_one, unmap_some, unmap_some, move_one, protect_one, store_one, advise_one, advise_one,
        lock_one, children, threads, threads, signal_things, hand_over, hand_over, writers, plugin, descriptors, name_space,
    };
    for (step = 0; step < steps; step++) {
        does[below(sizeof does / sizeof *does)]();
        if (chance(10))
            SAY("all: %016llx", (unsigned long long)look_at_all());
    }
    return 0;
}
