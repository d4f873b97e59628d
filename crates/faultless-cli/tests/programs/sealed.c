/* A mapping is sealed, and its file is written to.
 *
 *     sealed FILE   a file of 4 MiB */

#include <stdio.h>
#include <fcntl.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
int main(int argc, char **argv) {
    if (argc < 2) return 2;
    int fd = open(argv[1], O_RDONLY); volatile unsigned char *m = mmap(0, 4 << 20, PROT_READ, MAP_SHARED, fd, 0); close(fd);
    unsigned char first = m[0];
    if (syscall(462, m, 4ul << 20, 0)) { puts("no mseal here"); return 77; }
    fd = open(argv[1], O_RDWR); unsigned char new = first ^ 0x55;
    pwrite(fd, &new, 1, 0); pwrite(fd, &new, 1, 3 << 20);
    printf("shared, sealed, and then written to by others: %s\n", m[0] == new && m[3 << 20] == new ? "the new bytes" : "old bytes");
    return 0;
}
