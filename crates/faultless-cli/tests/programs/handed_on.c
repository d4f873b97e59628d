/* Large mappings come and go while other threads are given their addresses: what is written there stays. */
#include "check.h"

static const size_t len = 512 << 20, part = 8 << 20;
static const char *path;
static volatile int stop;

static void *mapper(void *unused)
{
    (void)unused;
    for (int i = 0; !stop; i++) {
        int fd = open(path, i % 2 ? O_RDWR : O_RDONLY);
        CHECK(fd >= 0);
        char *m = mmap(NULL, len, PROT_READ, i % 3 ? MAP_SHARED : MAP_PRIVATE, fd, 0);
        CHECK(m != MAP_FAILED);
        close(fd);
        for (size_t at = 0; at < len; at += 64 * part / 7 * 3)
            CHECK(*(volatile char *)(m + at) == 0);
        switch (i % 4) {
        case 0:
            /* Made writable: memory of the program's own from then on. */
            if (i % 3 == 0) {
                CHECK(mprotect(m, len, PROT_READ | PROT_WRITE) == 0);
                for (size_t at = 0; at < len; at += part)
                    m[at] = 77;
                usleep(20000);
                for (size_t at = 0; at < len; at += part)
                    CHECK(m[at] == 77);
            }
            break;
        case 1:
            CHECK(munmap(m + len / 2, len / 2) == 0);
            usleep(10000);
            CHECK(*(volatile char *)(m + len / 2 - PAGE) == 0 && munmap(m, len / 2) == 0);
            continue;
        case 2:
            CHECK(mmap(m + len / 4, part, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == m + len / 4);
            memset(m + len / 4, 5, part);
            usleep(20000);
            for (size_t at = 0; at < part; at += PAGE)
                CHECK(m[len / 4 + at] == 5);
            break;
        }
        CHECK(munmap(m, len) == 0);
    }
    return NULL;
}

/* Memory, of the kind that lies where mappings of files have been. */
static void *user(void *unused)
{
    (void)unused;
    while (!stop) {
        size_t n = len / 2;
        char *m = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(m != MAP_FAILED);
        for (size_t at = 0; at < n; at += part / 2)
            m[at] = 9;
        usleep(3000);
        for (size_t at = 0; at < n; at += part / 2)
            CHECK(m[at] == 9);
        CHECK(munmap(m, n) == 0);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    CHECK(argc > 1);
    path = argv[1];
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    CHECK(fd >= 0 && ftruncate(fd, len) == 0);
    close(fd);
    pthread_t t[4];
    for (int i = 0; i < 4; i++)
        CHECK(pthread_create(&t[i], NULL, i < 2 ? mapper : user, NULL) == 0);
    sleep(3);
    stop = 1;
    for (int i = 0; i < 4; i++)
        CHECK(pthread_join(t[i], NULL) == 0);
    printf("good\n");
    return 0;
}
