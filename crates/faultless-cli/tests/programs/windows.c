/* Maps, reads a little of, and unmaps windows of a file that is in the page cache; prints microseconds a window.
 *
 *     windows FILE   a file of 8 MiB */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <fcntl.h>
#include <time.h>
#include <unistd.h>
#include <sys/mman.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec * 1e-9; }
int main(int argc, char **argv) {
    if (argc < 2) return 2;
    int fd = open(argv[1], O_RDONLY); unsigned s = 0; char b[65536];
    while (read(fd, b, sizeof b) > 0) ;
    double t = now();
    for (int i = 0; i < 3000; i++) {
        unsigned char *m = mmap(0, 1 << 20, PROT_READ, MAP_SHARED, fd, (off_t)(i % 7) << 20);
        s = s * 31 + m[4096 * (i % 250)];
        munmap(m, 1 << 20);
    }
    printf("%.1f us a window, sum %u\n", (now() - t) / 3000 * 1e6, s);
    return 0;
}
