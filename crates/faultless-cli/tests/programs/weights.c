/* How model servers map their weights.
 *
 *     weights FILE HOW   a file of 48 MiB; w: whole, p: populated, h: head and tail unmapped */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>
#include <sys/mman.h>
static unsigned char *m; static size_t from, to; static unsigned sum[4];
static void *go(void *a) { long me = (long)a; for (size_t i = from + me * 4096; i < to; i += 4 * 4096) sum[me] = sum[me] * 31 + m[i + i / 4096 % 4096]; return 0; }
int main(int c, char **v) {
    size_t n = 48 << 20; int fd = open(v[1], O_RDONLY); pthread_t t[4];
    from = 0; to = n;
    switch (v[2][0]) {
    case 'w': m = mmap(0, n, PROT_READ, MAP_SHARED, fd, 0); break;
    case 'p': m = mmap(0, n, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0); posix_madvise(m, n, POSIX_MADV_WILLNEED); break;
    case 'h': m = mmap(0, n, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0); from = 1 << 20; to = n - (4 << 20); munmap(m, from); munmap(m + to, n - to); break;
    case 't': m = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0); break;
    case 'r': m = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0); mprotect(m, n, PROT_READ); break;
    case 'o': close(fd); fd = open(v[1], O_RDWR); m = mmap(0, n, PROT_READ, MAP_SHARED, fd, 0); break;
    }
    for (long i = 0; i < 4; i++) pthread_create(t + i, 0, go, (void *)i);
    for (int i = 0; i < 4; i++) pthread_join(t[i], 0);
    printf("%u %u %u %u\n", sum[0], sum[1], sum[2], sum[3]);
    return 0;
}
