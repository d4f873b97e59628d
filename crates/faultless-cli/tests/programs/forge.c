/* What a copy of the process that is trusted less can do to the process that it was copied from.
 *
 *     forge HOW FILE   HOW: which way of making a copy; prints what the copy could reach, and whether its parent's bytes are right */

#include "check.h"
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>

#define LEN (4ul << 20)
#define UFFDIO_COPY_ 0xC028AA03
#define UFFDIO_WAKE_ 0x8010AA02

static volatile uint64_t *shared;
static const char *path;
static volatile int stop;
static int threads;

/* Descriptors of the copy's that can act on another process, and those of the file. (The program itself has one of the file.) */
static int child(void *unused)
{
    (void)unused;
    static char evil[PAGE] __attribute__((aligned(PAGE)));
    char link[64], target[300], name[64];
    unsigned reached = 0, files = 0;
    /* (By number: `setuid` of the C library waits for the threads of which it knows, and a bare copy has none of them.) */
    int user = getuid() == 0 ? 65534 : (int)getuid();
    CHECK(!threads || user != 65534 || syscall(SYS_setgid, user) == 0);
    CHECK(threads || user != 65534 || setgid(user) == 0);
    CHECK((threads ? (int)syscall(SYS_setuid, user) : setuid((uid_t)user)) == 0);
    memset(evil, 0x42, sizeof evil);
    while (!shared[0])
        usleep(1000);
    snprintf(name, sizeof name, "%s", strrchr(path, '/'));
    for (int fd = 3; fd < 70000; fd++) {
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
        ssize_t n = readlink(link, target, sizeof target - 1);
        struct { uint64_t to, from, len, mode; int64_t done; } copy = { shared[0] + (3 << 20), (uint64_t)evil, PAGE, 0, 0 };
        struct { uint64_t at, len; } wake = { shared[0], PAGE };
        reached += ioctl(fd, UFFDIO_COPY_, &copy) == 0 || ioctl(fd, UFFDIO_WAKE_, &wake) == 0;
        if (n <= 0)
            continue;
        target[n] = 0;
        files += strstr(target, name) != NULL;
    }
    printf("the copy reaches %u, and has %u of the file\n", reached, files);
    fflush(stdout);
    shared[1] = 1;
    _exit(0);
}

static void *reads(void *map)
{
    while (!stop)
        verify(map, 0, 0, LEN);
    return NULL;
}

int main(int argc, char **argv)
{
    CHECK(argc == 3);
    path = argv[2];
    make(path, LEN);
    shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    setvbuf(stdout, NULL, _IOFBF, 0);
    int fd = open(path, O_RDONLY);
    char *map = mmap(NULL, LEN, PROT_READ, MAP_PRIVATE, fd, 0);
    CHECK(map != MAP_FAILED);
    pthread_t readers[2];
    int how = atoi(argv[1]);
    threads = how >= 10 ? 2 : 0;
    verify(map, 0, 0, PAGE);
    for (int i = 0; i < threads; i++)
        CHECK(pthread_create(&readers[i], NULL, reads, map) == 0);
    static char stack[65536] __attribute__((aligned(16)));
    long pid = -1;
    switch (how % 10) {
    case 0: pid = fork(); break;
    case 1: pid = syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0); break;
    case 2: pid = clone(child, stack + sizeof stack, SIGCHLD, NULL); break;
    case 3: { uint64_t a[8] = { 0, 0, 0, 0, SIGCHLD }; pid = syscall(435, a, sizeof a); break; }
    case 4: pid = _Fork(); break;
#if defined(__x86_64__)
    case 5: pid = syscall(SYS_fork); break;
    case 6: { register long r __asm__("rax") = SYS_fork; __asm__ volatile("syscall" : "+r"(r) : : "rcx", "r11", "memory"); pid = r; break; }
    case 7: { register long r __asm__("rax") = SYS_clone; register long f __asm__("rdi") = SIGCHLD, s __asm__("rsi") = 0, p __asm__("rdx") = 0, c __asm__("r10") = 0, t __asm__("r8") = 0;
        __asm__ volatile("syscall" : "+r"(r) : "r"(f), "r"(s), "r"(p), "r"(c), "r"(t) : "rcx", "r11", "memory"); pid = r; break; }
#else
    case 5: case 6: case 7: pid = _Fork(); break;
#endif
    case 8:
        /* The child of vfork runs in this very memory, so it executes something: which finds nothing. */
        if (!(pid = vfork())) {
            execl("/bin/sh", "sh", "-c", "ls -l /proc/self/fd | grep -c userfaultfd", (char *)NULL);
            _exit(99);
        }
        shared[1] = 1;
        break;
    }
    if (!pid)
        child(NULL);
    CHECK(pid > 0);
    char *later = mmap(NULL, LEN, PROT_READ, MAP_PRIVATE, fd, 0);
    CHECK(later != MAP_FAILED);
    verify(later, 0, 0, PAGE);
    shared[0] = (uint64_t)later;
    while (!shared[1])
        usleep(1000);
    int status;
    CHECK(waitpid((pid_t)pid, &status, 0) == pid && WIFEXITED(status));
    verify(later, 0, 0, LEN);
    stop = 1;
    for (int i = 0; i < threads; i++)
        pthread_join(readers[i], NULL);
    printf("%d: the bytes are right, status %d\n", how, WEXITSTATUS(status));
    unlink(path);
    return 0;
}
