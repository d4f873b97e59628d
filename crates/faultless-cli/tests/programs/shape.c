/* A mapping is cut, replaced, protected, moved, locked and advised, as a program can do with the kernel's. */
#include "check.h"

static sigjmp_buf back;
static volatile sig_atomic_t which;
static void caught(int signo)
{
    which = signo;
    siglongjmp(back, 1);
}
/* The signal that a read raises; 0 if none. */
static int touch(const char *at)
{
    which = 0;
    if (sigsetjmp(back, 1) == 0)
        (void)*(const volatile char *)at;
    return which;
}

int main(int argc, char **argv)
{
    (void)argc;
    const size_t len = 16 << 20, off = 3 * PAGE;
    make(argv[1], len);
    struct sigaction sa = { .sa_handler = caught };
    CHECK(sigaction(SIGBUS, &sa, NULL) == 0 && sigaction(SIGSEGV, &sa, NULL) == 0);
    const size_t n = len - off;
    int fd = open(argv[1], O_RDONLY);

    /* Whole, and gone. */
    const char *m = map_file(argv[1], off, n);
    verify(m, off, 0, n);
    CHECK(munmap((void *)m, n) == 0 && touch(m) == SIGSEGV && touch(m + n - 1) == SIGSEGV);
    /* With a length that is not whole pages. */
    m = map_file(argv[1], off, n - 100);
    verify(m, off, 0, n);
    CHECK(munmap((void *)m, n - 200) == 0 && touch(m) == SIGSEGV);
    /* The middle, the front and the end are unmapped. */
    m = map_file(argv[1], off, n);
    CHECK(touch(m + 5 * PAGE) == 0);
    CHECK(munmap((void *)(m + 100 * PAGE), 50 * PAGE) == 0);
    CHECK(touch(m + 100 * PAGE) == SIGSEGV && touch(m + 149 * PAGE) == SIGSEGV);
    verify(m, off, 0, 100 * PAGE);
    verify(m, off, 150 * PAGE, n);
    CHECK(munmap((void *)m, PAGE) == 0 && munmap((void *)(m + n - PAGE), PAGE) == 0);
    CHECK(touch(m) == SIGSEGV && touch(m + n - PAGE) == SIGSEGV);
    verify(m, off, PAGE, 100 * PAGE);
    CHECK(munmap((void *)m, n) == 0);
    /* Arguments that the kernel refuses change nothing. */
    m = map_file(argv[1], off, n);
    CHECK(munmap((void *)(m + 1), n) == -1 && errno == EINVAL);
    CHECK(munmap((void *)m, 0) == -1 && errno == EINVAL);
    verify(m, off, 0, n);
    /* Two in one call. */
    const char *other = map_file(argv[1], off, n);
    (void)other;
    CHECK(munmap((void *)m, n) == 0);
    CHECK(munmap((void *)other, n) == 0);
    /* Something else is mapped over a part of it. */
    m = map_file(argv[1], off, n);
    CHECK(touch(m) == 0);
    char *over = mmap((void *)(m + 200 * PAGE), 100 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    CHECK(over == m + 200 * PAGE && over[5] == 0);
    over[5] = 1;
    verify(m, off, 0, 200 * PAGE);
    verify(m, off, 300 * PAGE, n);
    /* A mapping of the file itself, elsewhere in it. */
    over = mmap((void *)m, 10 * PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, fd, 20 * PAGE);
    CHECK(over == m);
    verify(m, 20 * PAGE, 0, 10 * PAGE);
    CHECK(munmap((void *)m, n) == 0);
    /* A mapping that cannot be made leaves what is there. */
    m = map_file(argv[1], off, n);
    CHECK(mmap((void *)m, n, PROT_READ, MAP_PRIVATE | MAP_FIXED, 9999, 0) == MAP_FAILED);
    verify(m, off, 0, n);
    /* Made writable: private changes. */
    CHECK(mprotect((void *)(m + 8 * PAGE), PAGE, PROT_READ | PROT_WRITE) == 0);
    verify(m, off, 0, n);
    ((char *)m)[8 * PAGE] = '!';
    CHECK(m[8 * PAGE] == '!');
    verify(m, off, 9 * PAGE, n);
    CHECK(munmap((void *)m, n) == 0);
    m = map_file(argv[1], off, n);
    CHECK(mprotect((void *)m, n, PROT_READ) == 0);
    verify(m, off, 0, n);
    CHECK(mprotect((void *)m, PAGE, PROT_NONE) == 0 && touch(m) == SIGSEGV && touch(m + PAGE) == 0);
    CHECK(munmap((void *)m, n) == 0);
    /* Writing to a read-only mapping is a fault. */
    m = map_file(argv[1], off, n);
    which = 0;
    if (sigsetjmp(back, 1) == 0)
        *(volatile char *)m = 1;
    CHECK(which == SIGSEGV);
    /* Moved, shrunk and grown. */
    char *moved = mremap((void *)m, n, n / 2 & ~(PAGE - 1), 0);
    CHECK(moved == m && touch(m + n - PAGE) == SIGSEGV);
    verify(m, off, 0, n / 2 & ~(PAGE - 1));
    moved = mremap((void *)m, n / 2 & ~(PAGE - 1), n, MREMAP_MAYMOVE);
    CHECK(moved != MAP_FAILED);
    verify(moved, off, 0, n);
    CHECK(munmap(moved, n) == 0);
    m = map_file(argv[1], off, n);
    char *target = mmap(NULL, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(mremap((void *)m, n, n, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target && touch(m) == SIGSEGV);
    verify(target, off, 0, n);
    CHECK(munmap(target, n) == 0);
    /* Onto a mapping of ours. */
    m = map_file(argv[1], off, n);
    char *plain = mmap(NULL, 10 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    plain[0] = 'x';
    CHECK(mremap(plain, 10 * PAGE, 10 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, m + 50 * PAGE) == m + 50 * PAGE);
    CHECK(m[50 * PAGE] == 'x');
    verify(m, off, 0, 50 * PAGE);
    verify(m, off, 60 * PAGE, n);
    CHECK(munmap((void *)m, n) == 0);
    /* Advice, residency. */
    m = map_file(argv[1], off, n);
    unsigned char seen[16384];
    CHECK(touch(m + 7 * PAGE) == 0 && mincore((void *)m, n, seen) == 0 && seen[7] == 1);
    CHECK(mincore((void *)(m + 1), PAGE, seen) == -1 && errno == EINVAL);
    CHECK(madvise((void *)m, n, MADV_RANDOM) == 0 && madvise((void *)m, n, MADV_SEQUENTIAL) == 0);
    verify(m, off, 0, n);
    CHECK(madvise((void *)m, n, MADV_NORMAL) == 0 && madvise((void *)m, n, MADV_WILLNEED) == 0);
    CHECK(madvise((void *)m, n, MADV_DONTNEED) == 0);
    verify(m, off, 0, n);
    CHECK(posix_madvise((void *)m, n, POSIX_MADV_DONTNEED) == 0 && posix_madvise((void *)m, n, POSIX_MADV_WILLNEED) == 0);
    CHECK(madvise((void *)m, 4 << 20, 22 /* MADV_POPULATE_READ */) == 0);
    CHECK(mincore((void *)m, 4 << 20, seen) == 0 && seen[0] && seen[1023]);
    CHECK(msync((void *)m, n, MS_SYNC) == 0);
    CHECK(mlock(m, 64 * PAGE) == 0 && munlock(m, 64 * PAGE) == 0);
    verify(m, off, 0, n);
    CHECK(munmap((void *)m, n) == 0);
    /* Beyond the end of the file. */
    m = map_file(argv[1], off, n + (1 << 20));
    verify(m, off, 0, n);
    CHECK(touch(m + n) == SIGBUS && touch(m + n + (1 << 20)) != SIGBUS);
    CHECK(write(1, m + n, 1) == -1 && errno == EFAULT);
    CHECK(munmap((void *)m, n + (1 << 20)) == 0);
    /* The program truncates the file that it has mapped. */
    m = map_file(argv[1], 0, len);
    CHECK(touch(m + len - PAGE) == 0);
    int w = open(argv[1], O_RDWR);
    CHECK(w >= 0 && ftruncate(w, 8 << 20) == 0);
    verify(m, 0, 0, 8 << 20);
    CHECK(touch(m + (8 << 20)) == SIGBUS && touch(m + len - PAGE) == SIGBUS);
    /* And writes to it: the mapping is the kernel's, and shows it. */
    char x = '?';
    CHECK(pwrite(w, &x, 1, 77) == 1 && m[77] == '?');
    close(w);
    CHECK(munmap((void *)m, len) == 0);
    printf("good\n");
    return 0;
}
