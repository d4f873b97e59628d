/* fork, vfork and exec; descriptors closed by a program that closes them all; POSIX locks. */
#include "check.h"
#include <spawn.h>

static const size_t len = 16 << 20;
extern char **environ;

/* Whether another process sees a lock of this one on the file. */
static int locked(const char *path)
{
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        int fd = open(path, O_RDONLY);
        struct flock l = { .l_type = F_RDLCK, .l_whence = SEEK_SET };
        struct flock w = { .l_type = F_WRLCK, .l_whence = SEEK_SET };
        (void)l;
        CHECK(fcntl(fd, F_GETLK, &w) == 0);
        _exit(w.l_type != F_UNLCK);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status));
    return WEXITSTATUS(status);
}

int main(int argc, char **argv)
{
    if (argc > 2 && strcmp(argv[2], "again") == 0) {
        const char *m = map_file(argv[1], 0, len);
        verify(m, 0, 0, len);
        return 0;
    }
    closefrom(3);
    make(argv[1], len);
    int status;
    const char *m = map_file(argv[1], 0, len);
    const char *n = map_file(argv[1], PAGE, len - PAGE);
    verify(m, 0, 0, len / 2);
    /* A child finds the mappings, whole, and can cut them and make its own. */
    for (int i = 0; i < 3; i++) {
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            verify(m, 0, 0, len);
            verify(n, PAGE, 0, len - PAGE);
            CHECK(munmap((void *)m, len / 2) == 0);
            verify(m, 0, len / 2, len);
            const char *own = map_file(argv[1], 0, len);
            verify(own, 0, 0, len);
            pid_t grandchild = fork();
            if (grandchild == 0) {
                verify(own, 0, 0, len);
                verify(n, PAGE, 0, len - PAGE);
                exit(0);
            }
            CHECK(waitpid(grandchild, &status, 0) == grandchild && status == 0);
            if (i == 0)
                exit(0);
            if (i == 1)
                _exit(0);
            execl("/proc/self/exe", argv[0], argv[1], "again", NULL);
            _exit(9);
        }
        CHECK(waitpid(child, &status, 0) == child && status == 0);
        verify(m, 0, 0, len);
    }
    pid_t child = vfork();
    if (child == 0) {
        execl("/proc/self/exe", argv[0], argv[1], "again", NULL);
        _exit(9);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    char *arguments[] = { argv[0], argv[1], "again", NULL };
    CHECK(posix_spawn(&child, "/proc/self/exe", NULL, NULL, arguments, environ) == 0);
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(system("true") == 0);

    /* New descriptors have low numbers, and those of others cannot be seen. */
    int low = open("/dev/null", O_RDONLY);
    CHECK(low == 3);
    close(low);
    /* Everything is closed, in all ways. */
    madvise((void *)m, len, MADV_DONTNEED);
    for (int fd = 3; fd < 4096; fd++)
        CHECK(close(fd) == 0 || errno == EBADF);
    verify(m, 0, 0, len);
    madvise((void *)m, len, MADV_DONTNEED);
    CHECK(close_range(3, ~0u, 0) == 0);
    verify(m, 0, 0, len);
    madvise((void *)m, len, MADV_DONTNEED);
    /* By calls that nothing stands before. */
    for (int fd = 3; fd < 4096; fd++)
        syscall(SYS_close, fd);
    verify(m, 0, 0, len);
    madvise((void *)m, len, MADV_DONTNEED);
    /* And numbers used for something else. */
    int null = open("/dev/null", O_RDONLY);
    for (int fd = 700; fd < 1000; fd++)
        CHECK(dup2(null, fd) == fd);
    verify(m, 0, 0, len);
    for (int fd = 700; fd < 1000; fd++)
        CHECK(close(fd) == 0);
    close(null);

    /* A lock for reading survives mappings that come and go. */
    int fd = open(argv[1], O_RDONLY);
    struct flock l = { .l_type = F_RDLCK, .l_whence = SEEK_SET, .l_len = 1 };
    CHECK(fcntl(fd, F_SETLK, &l) == 0 && locked(argv[1]));
    for (int i = 0; i < 5; i++) {
        const char *x = mmap(NULL, len, PROT_READ, MAP_SHARED, fd, 0);
        CHECK(x != MAP_FAILED);
        verify(x, 0, 0, len / 4);
        CHECK(munmap((void *)x, len) == 0 && locked(argv[1]));
    }
    CHECK(munmap((void *)m, len) == 0 && munmap((void *)n, len - PAGE) == 0 && locked(argv[1]));
    l.l_type = F_UNLCK;
    CHECK(fcntl(fd, F_SETLK, &l) == 0 && !locked(argv[1]));
    m = map_file(argv[1], 0, len);
    /* One that is taken while a mapping is there. */
    l.l_type = F_RDLCK;
    CHECK(fcntl(fd, F_SETLK, &l) == 0);
    verify(m, 0, 0, len);
    CHECK(munmap((void *)m, len) == 0 && locked(argv[1]));
    l.l_type = F_UNLCK;
    CHECK(fcntl(fd, F_SETLK, &l) == 0 && !locked(argv[1]));
    close(fd);
    /* For writing: the mapping becomes the kernel's. */
    m = map_file(argv[1], 0, len);
    verify(m, 0, 0, PAGE * 10);
    fd = open(argv[1], O_RDWR);
    l.l_type = F_WRLCK;
    CHECK(fcntl(fd, F_SETLK, &l) == 0 && locked(argv[1]));
    verify(m, 0, 0, len);
    const char *x = map_file(argv[1], 0, len);
    verify(x, 0, 0, len);
    printf("good\n");
    return 0;
}
