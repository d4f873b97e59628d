/* Programs that use files as memory: nobody has to read what was never written. */
#include "check.h"

static const size_t len = 64 << 20;

static void use(int fd)
{
    char *m = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(m != MAP_FAILED);
    for (size_t at = 0; at < len; at += 64 << 10) {
        CHECK(m[at] == 0);
        m[at] = 1;
    }
    CHECK(munmap(m, len) == 0);
    close(fd);
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    int fd = open(argv[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0 && ftruncate(fd, len) == 0);
    use(fd);
    /* Reserved, and never written to. (A file system that cannot do that is not asked twice.) */
    fd = open(argv[1], O_RDWR | O_TRUNC);
    CHECK(fd >= 0);
    if (fallocate(fd, 0, 0, len) == 0)
        use(fd);
    /* Written, but without a name. */
    make(argv[1], len);
    fd = open(argv[1], O_RDWR);
    CHECK(fd >= 0 && unlink(argv[1]) == 0);
    char *m = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    CHECK(m != MAP_FAILED);
    verify(m, 0, 0, len);
    printf("good\n");
    return 0;
}
