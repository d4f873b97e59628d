/* One write, or one vector, of a large record to a file that others append to as well: it comes out in one piece.
 *
 *     append FILE LOG write|vector */

#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
int main(int c, char **v) {
    size_t n = 16 << 20, i = 0;
    int fd = open(v[1], O_RDONLY), o = open(v[2], O_RDWR | O_CREAT | O_TRUNC | O_APPEND, 0600);
    char *m = mmap(0, n, PROT_READ, MAP_SHARED, fd, 0);
    pid_t p = fork();
    if (!p) { char b[64]; memset(b, '#', 64); for (;;) if (write(o, b, 64) != 64) _exit(1); }
    usleep(3000);
    struct iovec two[2] = { { m, n / 2 }, { m + n / 2, n / 2 } };
    ssize_t took = v[3][0] == 'v' ? writev(o, two, 2) : write(o, m, n);
    kill(p, SIGKILL); waitpid(p, 0, 0);
    off_t size = lseek(o, 0, SEEK_END);
    char *w = mmap(0, size, PROT_READ, MAP_PRIVATE, o, 0), *at = memmem(w, size, m, 4096);
    while (at && i < n && at + i < w + size && at[i] == m[i]) i++;
    printf("written: %zd\nin one piece: %s\n", took, i == n ? "yes" : "no");
    fprintf(stderr, "%zu of %zu bytes in one piece\n", i, n);
    unlink(v[2]);
    return 0;
}
