/* Mappings that are for writing as well: what the program and the kernel write there, they find again. */
#include "check.h"
#include <dlfcn.h>
#include <mqueue.h>
#include <poll.h>
#include <spawn.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/msg.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/statvfs.h>
#include <sys/sysinfo.h>
#include <sys/times.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/vfs.h>

static const size_t len = 128 << 20;
static const size_t mib = 1 << 20;
static const char *path;
static char *map;
static int shared, file;

/* A place that nobody has touched, with nothing but such places around it, at the end of a page. */
static size_t next;
static char *fresh(void)
{
    next += 2 * mib;
    CHECK(next + 2 * mib <= len);
    return map + next + 5 * PAGE - 16;
}

/* The page behind it still has the bytes of the file, from `n` bytes on. */
static void around(const char *at, size_t n)
{
    size_t end = ((size_t)(at + n - map) + PAGE - 1) / PAGE * PAGE;
    verify(map, 0, end, end + 4 * PAGE);
    CHECK(*(const volatile uint64_t *)(map + next) == word(next / 8));
}

static void buffers(void)
{
    int ends[2], pair[2];
    char *sent = malloc(mib), *at;
    for (size_t i = 0; i < mib; i++)
        sent[i] = (char)(i * 7 + i / 4096);
    const size_t n = 60000;
#define GOT(bytes)                                  \
    do {                                            \
        CHECK(memcmp(at, sent, bytes) == 0);        \
        around(at, bytes);                          \
    } while (0)
    CHECK(pipe(ends) == 0 && socketpair(AF_UNIX, SOCK_DGRAM, 0, pair) == 0);
    at = fresh();
    CHECK(write(ends[1], sent, n) == (ssize_t)n && read(ends[0], at, n) == (ssize_t)n);
    GOT(n);
    at = fresh();
    CHECK(write(ends[1], sent, n) == (ssize_t)n && syscall(SYS_read, ends[0], at, n) == (ssize_t)n);
    GOT(n);
    at = fresh();
    struct iovec parts[2] = { { at, 100 }, { at + 100, n - 100 } };
    CHECK(write(ends[1], sent, n) == (ssize_t)n && readv(ends[0], parts, 2) == (ssize_t)n);
    GOT(n);
    char name[4096];
    snprintf(name, sizeof name, "%s.out", path);
    int out = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(write(out, sent, mib) == (ssize_t)mib);
    at = fresh();
    CHECK(pread(out, at, n, 0) == (ssize_t)n);
    GOT(n);
    at = fresh();
    parts[0].iov_base = at, parts[1].iov_base = at + 100;
    CHECK(preadv(out, parts, 2, 0) == (ssize_t)n);
    GOT(n);
    at = fresh();
    parts[0].iov_base = at, parts[1].iov_base = at + 100;
    CHECK(preadv2(out, parts, 2, 0, 0) == (ssize_t)n);
    GOT(n);
    /* Streams read directly into large buffers; and have buffers that they are given. */
    FILE *stream = fopen(name, "r");
    at = fresh();
    CHECK(stream && fread(at, 1, 600000, stream) == 600000);
    GOT(600000);
    fclose(stream);
    stream = fopen(name, "r");
    at = fresh();
    CHECK(stream && setvbuf(stream, at, _IOFBF, 16 * PAGE) == 0);
    for (size_t i = 0; i < 40 * PAGE; i++)
        CHECK(fgetc(stream) == (sent[i] & 0xFF));
    fclose(stream);
    /* Datagrams: what does not arrive is lost. */
    at = fresh();
    CHECK(send(pair[0], sent, n, 0) == (ssize_t)n && recv(pair[1], at, n, 0) == (ssize_t)n);
    GOT(n);
    at = fresh();
    struct sockaddr_un *from = (struct sockaddr_un *)fresh();
    socklen_t *from_len = (socklen_t *)fresh();
    *from_len = sizeof *from;
    CHECK(send(pair[0], sent, n, 0) == (ssize_t)n);
    CHECK(recvfrom(pair[1], at, n, 0, (struct sockaddr *)from, from_len) == (ssize_t)n && *from_len == 0);
    CHECK(memcmp(at, sent, n) == 0);
    at = fresh();
    struct msghdr *message = (struct msghdr *)fresh();
    struct iovec *part = (struct iovec *)fresh();
    *part = (struct iovec){ at, n };
    *message = (struct msghdr){ .msg_iov = part, .msg_iovlen = 1 };
    CHECK(send(pair[0], sent, n, 0) == (ssize_t)n && recvmsg(pair[1], message, 0) == (ssize_t)n && memcmp(at, sent, n) == 0);
    at = fresh();
    struct iovec one = { at, n };
    struct mmsghdr several[2] = { { .msg_hdr = { .msg_iov = &one, .msg_iovlen = 1 } } };
    CHECK(send(pair[0], sent, n, 0) == (ssize_t)n && recvmmsg(pair[1], several, 1, 0, NULL) == 1);
    GOT(n);
    /* Names of sockets. */
    from = (struct sockaddr_un *)fresh();
    from_len = (socklen_t *)fresh();
    *from_len = sizeof *from;
    CHECK(getsockname(pair[0], (struct sockaddr *)from, from_len) == 0 && from->sun_family == AF_UNIX);
    int *value = (int *)fresh();
    from_len = (socklen_t *)fresh();
    *from_len = sizeof *value;
    CHECK(getsockopt(pair[0], SOL_SOCKET, SO_TYPE, value, from_len) == 0 && *value == SOCK_DGRAM);
    /* A connection that is accepted and cannot be told is lost. */
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
    struct sockaddr_un here = { .sun_family = AF_UNIX };
    CHECK(bind(listener, (struct sockaddr *)&here, sizeof(sa_family_t)) == 0 && listen(listener, 4) == 0);
    socklen_t its = sizeof here;
    CHECK(getsockname(listener, (struct sockaddr *)&here, &its) == 0 && connect(client, (struct sockaddr *)&here, its) == 0);
    from = (struct sockaddr_un *)fresh();
    from_len = (socklen_t *)fresh();
    *from_len = sizeof *from;
    CHECK(accept(listener, (struct sockaddr *)from, from_len) >= 0 && from->sun_family == AF_UNIX);
    /* Messages. */
    int queue = msgget(IPC_PRIVATE, 0600);
    if (queue >= 0) {
        struct { long kind; char text[3000]; } *got = (void *)fresh(), *given = (void *)sent;
        given->kind = 5;
        CHECK(msgsnd(queue, given, 3000, 0) == 0 && msgrcv(queue, got, 3000, 5, 0) == 3000 && got->kind == 5);
        CHECK(memcmp(got->text, given->text, 3000) == 0 && msgctl(queue, IPC_RMID, NULL) == 0);
    }
    at = fresh();
    CHECK(getrandom(at, 256, 0) == 256 && *(uint64_t *)at != word((at - map) / 8));
    at = fresh();
    CHECK(getentropy(at, 200) == 0 && *(uint64_t *)at != word((at - map) / 8));
    void (*arc4random)(void *, size_t) = (void (*)(void *, size_t))dlsym(RTLD_DEFAULT, "arc4random_buf");
    at = fresh();
    if (arc4random)
        arc4random(at, 300000);
    CHECK(!arc4random || (*(uint64_t *)at != word((at - map) / 8) && *(uint64_t *)(at + 299992) != word((at + 299992 - map) / 8)));
    /* Between memories. */
    at = fresh();
    struct iovec there = { sent, n }, local = { at, n };
    CHECK(process_vm_readv(getpid(), &local, 1, &there, 1, 0) == (ssize_t)n);
    GOT(n);
    at = fresh();
    local = (struct iovec){ sent, n }, there = (struct iovec){ at, n };
    CHECK(process_vm_writev(getpid(), &local, 1, &there, 1, 0) == (ssize_t)n);
    GOT(n);
    unlink(name);
    close(out);
    free(sent);
}

static volatile sig_atomic_t handled;
static void *volatile handlers_frame;
static void on_usr1(int signo)
{
    (void)signo;
    handlers_frame = __builtin_frame_address(0);
    handled++;
}
static void *on_stack(void *argument)
{
    volatile char large[64 << 10];
    for (size_t i = 0; i < sizeof large; i += 512)
        large[i] = 1;
    return argument;
}

static void short_things(void)
{
    /* A child that is reaped and cannot be told is lost. */
    pid_t child = fork();
    if (child == 0)
        _exit(7);
    int *status = (int *)fresh();
    struct rusage *usage = (struct rusage *)fresh();
    CHECK(wait4(child, status, 0, usage) == child && WEXITSTATUS(*status) == 7);
    child = fork();
    if (child == 0)
        _exit(8);
    status = (int *)fresh();
    CHECK(waitpid(child, status, 0) == child && WEXITSTATUS(*status) == 8);
    child = fork();
    if (child == 0)
        _exit(9);
    siginfo_t *info = (siginfo_t *)fresh();
    CHECK(waitid(P_PID, child, info, WEXITED) == 0 && info->si_status == 9);
    /* Signals that are taken off their queue. */
    sigset_t usr2, *set;
    sigemptyset(&usr2);
    sigaddset(&usr2, SIGUSR2);
    CHECK(sigprocmask(SIG_BLOCK, &usr2, NULL) == 0 && raise(SIGUSR2) == 0);
    set = (sigset_t *)fresh();
    CHECK(sigpending(set) == 0 && sigismember(set, SIGUSR2) == 1);
    info = (siginfo_t *)fresh();
    CHECK(sigwaitinfo(&usr2, info) == SIGUSR2 && info->si_pid == getpid());
    set = (sigset_t *)fresh();
    CHECK(sigprocmask(SIG_UNBLOCK, &usr2, set) == 0 && sigismember(set, SIGUSR2) == 1);
    /* A number that the C library stores with all signals blocked. */
    pid_t *number = (pid_t *)fresh();
    char *arguments[] = { "true", NULL };
    CHECK(posix_spawnp(number, "true", NULL, NULL, arguments, environ) == 0);
    CHECK(waitpid(*number, NULL, 0) == *number);
    /* Descriptors. */
    int *ends = (int *)fresh();
    CHECK(pipe(ends) == 0 && write(ends[1], "x", 1) == 1);
    struct pollfd *polled = (struct pollfd *)fresh();
    *polled = (struct pollfd){ .fd = ends[0], .events = POLLIN };
    CHECK(poll(polled, 1, 1000) == 1 && polled->revents == POLLIN);
    int epoll = epoll_create1(0);
    struct epoll_event wanted = { .events = EPOLLIN, .data = { .u64 = 77 } }, *events = (struct epoll_event *)fresh();
    CHECK(epoll_ctl(epoll, EPOLL_CTL_ADD, ends[0], &wanted) == 0);
    CHECK(epoll_wait(epoll, events, 1, 1000) == 1 && events->data.u64 == 77);
    int event = eventfd(5, 0);
    eventfd_t *count = (eventfd_t *)fresh();
    CHECK(eventfd_read(event, count) == 0 && *count == 5);
    off_t *offset = (off_t *)fresh();
    *offset = 100;
    CHECK(sendfile(ends[1], file, offset, 1000) == 1000 && *offset == 1100);
    struct flock *lock = (struct flock *)fresh();
    *lock = (struct flock){ .l_type = F_WRLCK };
    CHECK(fcntl(file, F_GETLK, lock) == 0 && lock->l_type == F_UNLCK);
    /* What the kernel says of files, of the machine, of the process. */
    struct stat *st = (struct stat *)fresh();
    CHECK(fstat(file, st) == 0 && st->st_size == (off_t)len);
    st = (struct stat *)fresh();
    CHECK(stat(path, st) == 0 && st->st_size == (off_t)len);
    struct statfs *fs = (struct statfs *)fresh();
    CHECK(fstatfs(file, fs) == 0 && fs->f_bsize > 0);
    char *text = fresh(), *here = getcwd(NULL, 0);
    CHECK(getcwd(text, 4096) == text && strcmp(text, here) == 0);
    text = fresh();
    CHECK(readlink("/proc/self/cwd", text, 4096) == (ssize_t)strlen(here) && memcmp(text, here, strlen(here)) == 0);
    struct utsname *machine = (struct utsname *)fresh();
    CHECK(uname(machine) == 0 && strcmp(machine->sysname, "Linux") == 0);
    struct rlimit *limit = (struct rlimit *)fresh();
    CHECK(getrlimit(RLIMIT_NOFILE, limit) == 0 && limit->rlim_cur > 0);
    struct timespec *time = (struct timespec *)fresh();
    CHECK(clock_gettime(CLOCK_THREAD_CPUTIME_ID, time) == 0 && time->tv_nsec >= 0);
    struct tms *spent = (struct tms *)fresh();
    CHECK(times(spent) != (clock_t)-1);
    /* The kernel's own use of memory: futexes, stacks for signal handlers; and other threads' stacks. */
    uint32_t *futex = (uint32_t *)fresh();
    CHECK(syscall(SYS_futex, futex, 1, 1, NULL, NULL, 0) == 0);
    char *stack = fresh() + 16;
    stack_t alternate = { .ss_sp = stack, .ss_size = 256 << 10 }, none = { .ss_flags = SS_DISABLE };
    struct sigaction action = { .sa_handler = on_usr1, .sa_flags = SA_ONSTACK };
    handled = 0;
    CHECK(sigaltstack(&alternate, NULL) == 0 && sigaction(SIGUSR1, &action, NULL) == 0 && raise(SIGUSR1) == 0 && handled == 1);
    CHECK((char *)handlers_frame > stack && (char *)handlers_frame < stack + (256 << 10));
    CHECK(sigaltstack(&none, NULL) == 0);
}

/* Memory that is given away while the program has one thread, in mappings of their own: they stay the kernel's, or become so. Another one is
 * served from the second thread on. */
static void given_away(void)
{
    char *m[4];
    for (int i = 0; i < 4; i++) {
        m[i] = mmap(NULL, 16 * mib, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, i * 16 * mib);
        CHECK(m[i] != MAP_FAILED);
    }
    pthread_t t;
    pthread_attr_t attributes;
    CHECK(pthread_attr_init(&attributes) == 0 && pthread_attr_setstack(&attributes, m[0] + mib, mib) == 0);
    stack_t alternate = { .ss_sp = m[1] + mib, .ss_size = 256 << 10 }, none = { .ss_flags = SS_DISABLE };
    struct sigaction action = { .sa_handler = on_usr1, .sa_flags = SA_ONSTACK };
    CHECK(sigaltstack(&alternate, NULL) == 0 && sigaction(SIGUSR1, &action, NULL) == 0);
    FILE *stream = fopen(path, "r");
    CHECK(stream && setvbuf(stream, m[2] + mib, _IOFBF, 16 * PAGE) == 0);

    CHECK(pthread_create(&t, &attributes, on_stack, NULL) == 0 && pthread_join(t, NULL) == 0);
    handled = 0;
    CHECK(raise(SIGUSR1) == 0 && handled == 1 && sigaltstack(&none, NULL) == 0);
    for (size_t i = 0; i < 40 * PAGE; i++)
        CHECK(fgetc(stream) == (int)(word(i / 8) >> (i % 8 * 8) & 0xFF));
    fclose(stream);
    verify(m[3], 48 * mib, 0, 16 * mib);
    memset(m[3], 'x', 16 * mib);
    for (int i = 0; i < 4; i++)
        CHECK(munmap(m[i], 16 * mib) == 0);
}

static sigjmp_buf back;
static volatile sig_atomic_t code_seen;
static void on_segv(int signo, siginfo_t *info, void *context)
{
    (void)signo, (void)context;
    code_seen = info->si_code;
    siglongjmp(back, 1);
}
static int store(volatile char *at)
{
    code_seen = 0;
    if (sigsetjmp(back, 1) == 0)
        *at = 'S';
    return code_seen;
}

/* Every fourth page from the thread's own on: stores first, or loads first. */
static void *writer(void *number)
{
    for (size_t page = (size_t)number; page < 40 * mib / PAGE; page += 4) {
        char *at = map + page * PAGE;
        if (page / 4 % 2)
            CHECK(*(volatile uint64_t *)at == word(page * PAGE / 8));
        *(volatile uint64_t *)(at + 1024) = page;
        CHECK(*(volatile uint64_t *)at == word(page * PAGE / 8));
    }
    return NULL;
}

static void threads(void)
{
    pthread_t t[4];
    for (size_t i = 0; i < 4; i++)
        CHECK(pthread_create(t + i, NULL, writer, (void *)i) == 0);
    for (size_t i = 0; i < 4; i++)
        CHECK(pthread_join(t[i], NULL) == 0);
    for (size_t page = 0; page < 40 * mib / PAGE; page++) {
        uint64_t there, in_file;
        memcpy(&there, map + page * PAGE + 1024, 8);
        CHECK(there == page && pread(file, &in_file, 8, page * PAGE + 1024) == 8);
        CHECK(in_file == (shared ? page : word((page * PAGE + 1024) / 8)));
    }
}

struct owned {
    pthread_mutex_t mutex;
    int value;
};

/* A thread that ends with a mutex, whose page was written to the file and reclaimed meanwhile: the kernel says so to the next one. */
static void *owner(void *owned)
{
    struct owned *its = owned;
    CHECK(pthread_mutex_lock(&its->mutex) == 0);
    its->value = 42;
    char *page = (char *)((size_t)owned / PAGE * PAGE);
    CHECK(msync(page, 2 * PAGE, MS_SYNC) == 0 && madvise(page, 2 * PAGE, MADV_DONTNEED) == 0);
    CHECK(posix_fadvise(file, page - map, 2 * PAGE, POSIX_FADV_DONTNEED) == 0);
    /* (Whoever looks for pages that were reclaimed had time to find them.) */
    usleep(700000);
    return NULL;
}
static void robust(void)
{
    struct owned *owned = (struct owned *)fresh();
    pthread_mutexattr_t attributes;
    pthread_t t;
    CHECK(pthread_mutexattr_init(&attributes) == 0 && pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST) == 0);
    CHECK(pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED) == 0 && pthread_mutex_init(&owned->mutex, &attributes) == 0);
    CHECK(pthread_create(&t, NULL, owner, owned) == 0 && pthread_join(t, NULL) == 0);
    alarm(20);
    CHECK(pthread_mutex_lock(&owned->mutex) == EOWNERDEAD && owned->value == 42);
    CHECK(pthread_mutex_consistent(&owned->mutex) == 0 && pthread_mutex_unlock(&owned->mutex) == 0);
    alarm(0);
}

static void forked(void)
{
    char *at = fresh(), *later = fresh();
    *at = 'P';
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        CHECK(*at == 'P');
        verify(map, 0, len - 8 * mib, len - 6 * mib);
        *at = 'C';
        *later = 'L';
        /* The kernel writes there, too. */
        int ends[2];
        CHECK(pipe(ends) == 0 && write(ends[1], "abc", 3) == 3 && read(ends[0], map + len - 5 * mib, 3) == 3);
        CHECK(memcmp(map + len - 5 * mib, "abc", 3) == 0);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(*at == (shared ? 'C' : 'P'));
    char before;
    CHECK(pread(file, &before, 1, later - map) == 1 && (*later == 'L') == shared && (before == 'L') == shared);
}

static void protected(void)
{
    /* Databases that watch for stores: for reading alone, and open again. */
    char *page = map + len - 2 * mib;
    CHECK(mprotect(page, mib, PROT_READ) == 0);
    CHECK(*(volatile uint64_t *)page == word((len - 2 * mib) / 8));
    CHECK(store(page) == SEGV_ACCERR && store(page + mib / 2) == SEGV_ACCERR);
    CHECK(mprotect(page, mib, PROT_READ | PROT_WRITE) == 0 && store(page) == 0 && store(page + mib / 2) == 0);
    CHECK(page[0] == 'S' && page[mib / 2] == 'S');
    CHECK(*(volatile uint64_t *)(page + 64) == word((len - 2 * mib + 64) / 8));
    CHECK(mprotect(page, mib, PROT_NONE) == 0 && store(page + PAGE) == SEGV_ACCERR);
    CHECK(mprotect(page, mib, PROT_READ | PROT_WRITE) == 0 && store(page + PAGE) == 0);
    /* Private copies go; what was shared stays. */
    CHECK(madvise(page, mib, MADV_DONTNEED) == 0);
    CHECK(page[0] == (shared ? 'S' : (char)word((len - 2 * mib) / 8)));
}

static void all(int how)
{
    shared = how == MAP_SHARED;
    next = 40 * mib;
    make(path, len);
    file = open(path, O_RDWR);
    CHECK(file >= 0);
    map = mmap(NULL, len, PROT_READ | PROT_WRITE, how, file, 0);
    CHECK(map != MAP_FAILED);
    threads();
    buffers();
    CHECK(munmap(map, len) == 0);

    next = 0;
    make(path, len);
    map = mmap(NULL, len, PROT_READ | PROT_WRITE, how, file, 0);
    CHECK(map != MAP_FAILED);
    short_things();
    forked();
    if (shared)
        robust();
    CHECK(munmap(map, len) == 0);

    make(path, len);
    map = mmap(NULL, len, PROT_READ | PROT_WRITE, how, file, 0);
    CHECK(map != MAP_FAILED);
    protected();
    CHECK(munmap(map, len) == 0);
    close(file);
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    path = argv[1];
    struct sigaction action = { .sa_sigaction = on_segv, .sa_flags = SA_SIGINFO };
    CHECK(sigaction(SIGSEGV, &action, NULL) == 0);
    make(path, 64 * mib);
    file = open(path, O_RDONLY);
    CHECK(file >= 0);
    given_away();
    close(file);
    all(MAP_SHARED);
    all(MAP_PRIVATE);
    printf("good\n");
    return 0;
}
