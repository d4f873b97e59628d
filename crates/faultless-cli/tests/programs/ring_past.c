/* A ring that is made past the C library and used immediately: a write from a mapping.
 *
 *     ring_past FILE OUT */

#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <fcntl.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <linux/io_uring.h>
static long sc(long n, long a, long b, long c, long d, long e) {
    long r; register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = 0;
    __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory"); return r; }
int main(int argc, char **argv) {
    if (argc < 3) return 2;
    size_t n = 8 << 20, at = 3 << 20, len = 1 << 20;
    int fd = open(argv[1], O_RDONLY);
    char *m = mmap(0, n, PROT_READ, MAP_SHARED, fd, 0); close(fd);
    volatile char x = m[0];
    struct io_uring_params p; memset(&p, 0, sizeof p);
    int r = sc(SYS_io_uring_setup, 4, (long)&p, 0, 0, 0);
    if (r < 0) { printf("no ring: %d\n", r); return 77; }
    char *sq = mmap(0, p.sq_off.array + p.sq_entries * 4, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r, IORING_OFF_SQ_RING);
    char *cq = mmap(0, p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r, IORING_OFF_CQ_RING);
    struct io_uring_sqe *s = mmap(0, p.sq_entries * sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r, IORING_OFF_SQES);
    int o = open(argv[2], O_RDWR | O_CREAT | O_TRUNC, 0600);
    memset(s, 0, sizeof *s); s->opcode = IORING_OP_WRITE; s->fd = o; s->addr = (unsigned long)(m + at); s->len = len;
    unsigned *tail = (unsigned *)(sq + p.sq_off.tail); ((unsigned *)(sq + p.sq_off.array))[0] = 0;
    __atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
    sc(SYS_io_uring_enter, r, 1, 1, IORING_ENTER_GETEVENTS, 0);
    struct io_uring_cqe *e = (void *)(cq + p.cq_off.cqes);
    printf("write from the mapping: %d\n", e->res);
    unlink(argv[2]);
    return 0;
}
