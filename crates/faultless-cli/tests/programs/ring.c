/* Writes from a mapping of a file through io_uring. */
#include "check.h"
#include <liburing.h>

int main(int argc, char **argv)
{
    (void)argc;
    const size_t len = 8 << 20;
    make(argv[1], len);
    const char *map = map_file(argv[1], 0, len);
    char path[4096];
    snprintf(path, sizeof path, "%s.out", argv[1]);
    int out = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    struct io_uring ring;
    int made = io_uring_queue_init(8, &ring, 0);
    if (made < 0) {
        printf("no ring: %d\n", made);
        return 77;
    }
    madvise((void *)map, len, MADV_DONTNEED);
    struct io_uring_sqe *sqe = io_uring_get_sqe(&ring);
    io_uring_prep_write(sqe, out, map + 12345, 1 << 20, 0);
    CHECK(io_uring_submit(&ring) == 1);
    struct io_uring_cqe *cqe;
    CHECK(io_uring_wait_cqe(&ring, &cqe) == 0);
    CHECK(cqe->res == 1 << 20);
    char *back = malloc(1 << 20);
    CHECK(pread(out, back, 1 << 20, 0) == 1 << 20 && memcmp(back, map + 12345, 1 << 20) == 0);
    unlink(path);
    printf("good\n");
    return 0;
}
