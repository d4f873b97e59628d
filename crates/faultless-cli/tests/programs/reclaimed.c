/* Pages of a live mapping that the kernel has reclaimed get their markers back. The program sees them by PAGEMAP_SCAN (Linux 6.7). */
#include "check.h"
#include <sys/ioctl.h>

static const size_t len = 8 << 20;

/* Whether a page of a range is one whose entry has a guard marker. */
static int is_marked(const char *at, size_t n)
{
    uint64_t found[3];
    uint64_t arg[12] = { sizeof arg, 0, (uintptr_t)at, (uintptr_t)at + n, 0, (uintptr_t)found, 1, 1, 0, 1 << 8, 0, 1 << 8 };
    int fd = open("/proc/self/pagemap", O_RDONLY);
    int pages = ioctl(fd, 0xC0606610, arg);
    close(fd);
    CHECK(pages >= 0);
    return pages > 0;
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    make(argv[1], len);
    int fd = open(argv[1], O_RDONLY);
    const char *m = mmap(NULL, len, PROT_READ, MAP_SHARED, fd, 0);
    CHECK(m != MAP_FAILED);
    CHECK(is_marked(m + len / 2, PAGE));
    verify(m, 0, 0, len);
    CHECK(!is_marked(m, len));
    for (int i = 0;; i++) {
        /* (The kernel leaves pages alone that it has seen in use just now.) */
        CHECK(i < 1000 && madvise((void *)m, len, MADV_PAGEOUT) == 0);
        for (int j = 0; j < 10 && !is_marked(m, len); j++)
            usleep(100000);
        if (is_marked(m, len))
            break;
    }
    verify(m, 0, 0, len);
    printf("good\n");
    return 0;
}
