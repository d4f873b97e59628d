/* Reads a mapping of 64 MiB, then needs a heap, then reads again.
 *
 *     heap FILE MIB */

#include <stdio.h>
#include <stdlib.h>
#include <fcntl.h>
#include <unistd.h>
#include <sys/mman.h>
int main(int c, char **v) {
    size_t n = 64 << 20, h = (size_t)atoi(v[2]) << 20; unsigned s = 0;
    int fd = open(v[1], O_RDONLY);
    unsigned char *m = mmap(0, n, PROT_READ, MAP_SHARED, fd, 0); close(fd);
    for (int k = 0; k < 2; k++) for (size_t i = 0; i < n; i += 4096) s += m[i];
    char *heap = malloc(h);
    for (size_t i = 0; i < h; i += 4096) heap[i] = 1;
    for (size_t i = 0; i < n; i += 4096) s += m[i];
    printf("%u\n", s);
    return 0;
}
