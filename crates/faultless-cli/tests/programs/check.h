/* What the test programs share: a file whose words tell where they belong, and checks that end the program. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sys/select.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define CHECK(c)                                                                                                      \
    do {                                                                                                              \
        if (!(c)) {                                                                                                   \
            int e_ = errno;                                                                                           \
            char m_[300];                                                                                             \
            int n_ = snprintf(m_, sizeof m_, "%s:%d: %s (errno %d, %s)\n", __FILE__, __LINE__, #c, e_, strerror(e_));  \
            if (syscall(SYS_write, 2, m_, n_)) {}                                                                     \
            abort();                                                                                                  \
        }                                                                                                             \
    } while (0)

/* The word at index i of the file (printable text, so that it can be a C string; every 64 KiB ends one). */
static inline uint64_t word(uint64_t i)
{
    uint64_t x = i * 0x9E3779B97F4A7C15ull, w = 0;
    for (int b = 0; b < 8; b++)
        w |= (uint64_t)('a' + ((x >> (b * 7 + 3)) % 26)) << (b * 8);
    return i % 8192 == 8191 ? w & 0x00FFFFFFFFFFFFFFull : w;
}

__attribute__((unused)) static void make(const char *path, size_t len)
{
    uint64_t *b = malloc(1 << 20);
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0644);
    CHECK(fd >= 0);
    for (size_t at = 0; at < len; at += 1 << 20) {
        for (size_t i = 0; i < (1 << 17); i++)
            b[i] = word(at / 8 + i);
        CHECK(pwrite(fd, b, 1 << 20, at) == 1 << 20);
    }
    CHECK(fsync(fd) == 0);
    CHECK(posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) == 0);
    close(fd);
    free(b);
}

__attribute__((unused)) static const char *map_file(const char *path, size_t offset, size_t len)
{
    int fd = open(path, O_RDONLY);
    CHECK(fd >= 0);
    const char *m = mmap(NULL, len, PROT_READ, MAP_PRIVATE, fd, offset);
    CHECK(m != MAP_FAILED);
    close(fd);
    return m;
}

/* Checks every page of a part of a map of the file that begins at `offset`. */
__attribute__((unused)) static void verify(const char *map, size_t offset, size_t from, size_t to)
{
    for (size_t at = from; at < to; at += PAGE) {
        const volatile uint64_t *w = (const volatile uint64_t *)(map + at);
        CHECK(w[0] == word((offset + at) / 8));
        CHECK(w[511] == word((offset + at) / 8 + 511));
    }
}
