/* A mapping goes by a system call that nobody sees, and its addresses become other memory. What the program writes there must stay
 * while mappings elsewhere are evicted, and what it moved must read as before.
 *
 *     reuse FILE     a file of 32 MiB */

#define _GNU_SOURCE
#include "past.h"
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static const size_t small = 8 << 20, big = 32 << 20;
static int fd;
static unsigned char *other;

static unsigned char *map_and_read(void)
{
    unsigned char *m = mmap(NULL, small, PROT_READ, MAP_PRIVATE, fd, 0);
    volatile unsigned s = 0;
    for (size_t i = 0; i < small; i += 4096)
        s += m[i];
    return m;
}

/* Reads so much of another mapping that everything else would be evicted. */
static void press(void)
{
    volatile unsigned s = 0;
    if (!other)
        other = mmap(NULL, big, PROT_READ, MAP_PRIVATE, fd, 0);
    for (int k = 0; k < 4; k++)
        for (size_t i = 0; i < big; i += 4096)
            s += other[i];
}

static size_t changed(const unsigned char *at, size_t len)
{
    size_t bad = 0;
    for (size_t i = 0; i < len; i++)
        bad += at[i] != 0x5a;
    return bad;
}

static void *on_this_stack(void *arg)
{
    volatile unsigned char mine[256 << 10];
    (void)arg;
    memset((void *)mine, 0x5a, sizeof mine);
    press();
    return (void *)changed((unsigned char *)mine, sizeof mine);
}

int main(int argc, char **argv)
{
    if (argc < 2 || (fd = open(argv[1], O_RDONLY)) < 0)
        return 2;
    /* Unmapped, and given out again. */
    unsigned char *m = map_and_read();
    past(SYS_munmap, (long)m, (long)small, 0, 0, 0, 0);
    unsigned char *a = (void *)past(SYS_mmap, (long)m, (long)small, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    memset(a, 0x5a, small);
    press();
    printf("after munmap and mmap past the library: %zu bytes changed\n", changed(a, small));
    /* The same, where the new mapping is made by the C library. */
    m = map_and_read();
    past(SYS_munmap, (long)m, (long)small, 0, 0, 0, 0);
    a = mmap(m, small, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(a, 0x5a, small);
    press();
    printf("after munmap past the library: %zu bytes changed\n", changed(a, small));
    munmap(a, small);
    /* Mapped over. */
    m = map_and_read();
    a = (void *)past(SYS_mmap, (long)m, (long)small / 2, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    memset(a, 0x5a, small / 2);
    press();
    printf("after mmap over its first half: %zu bytes changed\n", changed(a, small / 2));
    printf("its second half is as before: %d\n", !memcmp(m + small / 2, other + small / 2, small / 2));
    munmap(m, small);
    /* A hole in the middle. */
    m = map_and_read();
    past(SYS_munmap, (long)m + (2 << 20), 4 << 20, 0, 0, 0, 0);
    press();
    printf("around a hole it is as before: %d\n", !memcmp(m, other, 2 << 20) && !memcmp(m + (6 << 20), other + (6 << 20), 2 << 20));
    munmap(m, small);
    /* Moved. */
    m = mmap(NULL, small, PROT_READ, MAP_PRIVATE, fd, 0);
    volatile unsigned char first = m[0];
    void *to = mmap(NULL, small, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    unsigned char *n = (void *)past(SYS_mremap, (long)m, (long)small, (long)small, MREMAP_MAYMOVE | MREMAP_FIXED, (long)to, 0);
    printf("moved: %d, read as before: %d\n", n == to, first == n[0] && !memcmp(n, other, small));
    munmap(n, small);
    /* A thread's stack. */
    m = map_and_read();
    past(SYS_munmap, (long)m, (long)small, 0, 0, 0, 0);
    void *stack = (void *)past(SYS_mmap, (long)m, (long)small, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0), *bad;
    pthread_attr_t attr;
    pthread_t t;
    pthread_attr_init(&attr);
    pthread_attr_setstack(&attr, stack, small);
    pthread_create(&t, &attr, on_this_stack, NULL);
    pthread_join(t, &bad);
    printf("a thread's stack there: %zu bytes changed\n", (size_t)bad);
    /* The program's heap, which grows into it: the break lies below a mapping at an address of its own. */
    unsigned char *end = sbrk(0);
    unsigned char *at = (unsigned char *)(((size_t)end + (4 << 20)) & ~((size_t)(2 << 20) - 1));
    m = mmap(at, small, PROT_READ, MAP_PRIVATE, fd, 0);
    for (size_t i = 0; i < small; i += 4096)
        first += m[i];
    past(SYS_munmap, (long)m, (long)small, 0, 0, 0, 0);
    size_t room = (size_t)(at - end) + small;
    if (m == at && past(SYS_brk, (long)(end + room), 0, 0, 0, 0, 0) == (long)(end + room)) {
        memset(at, 0x5a, small);
        press();
        printf("a heap that has grown there: %zu bytes changed\n", changed(at, small));
    } else
        printf("a heap that has grown there: 0 bytes changed\n");
    return 0;
}
